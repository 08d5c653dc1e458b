"""Verdicts: which set is best, which sets beat random images, in words and from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from dq.core.files import write_text
from dq.evaluation.results import compare, read_records, summarize, to_csv
from dq.evaluation.verdicts import rankings, verdict_text

LEVELS = {"ddoq": 0.55, "d4m": 0.41, "random": 0.4, "nearest": 0.45}
NOISE = (0.0, 0.01, -0.01)


def record(name: str, seed: int, last: float, *, ipc: str = "10", recipe: int = 0, images: int = 100) -> dict:
    facts = {"set": name, "ipc": ipc, "images": images, "seed": seed, "recipe": recipe, "last": last, "best": last}
    facts |= {"student": "convnet3", "labels": "hard", "protocol": "p", "settings": f"lr {recipe}"}
    facts |= {"test_images": 1000, "selected_on": "none", "image_bytes": 1, "label_bytes": 0, "train_seconds": 1.0}
    return facts


def trained(levels: dict[str, float], seeds: int = 3, **facts) -> list[dict]:
    shift = {name: i + 1 for i, name in enumerate(levels)}  # sets do not move together
    return [record(n, s, v + shift[n] * NOISE[s] / 4, **facts) for n, v in levels.items() for s in range(seeds)]


def of(records: list[dict]):
    rows = summarize(records)
    return rankings([r.record() for r in rows], [c.record() for c in compare(rows)])


def test_the_best_set_and_what_beats_random_are_named() -> None:
    lines = verdict_text(summarize(trained(LEVELS))).splitlines()
    assert lines[0] == "convnet3, hard, IPC 10: ddoq +15.0 over random, better, 3 seeds"
    assert lines[1].startswith("  ddoq 55.0 ± 0.2 %, random images 40.0 ± 0.8 %; 95 % interval +")
    assert lines[2] == "  beside random images better: ddoq (+15.0), nearest (+5.0); undecided: d4m (+1.0)"
    assert lines[3] == "  ddoq beside other sets better: d4m (+14.0)"
    assert lines[4].startswith("3 of 4 comparisons of pairs are decided")
    assert len(lines) == 5


def test_a_best_set_below_real_images_is_said_to_be() -> None:
    lines = verdict_text(summarize(trained({**LEVELS, "ddoq": 0.42}))).splitlines()
    assert "  higher: nearest real images, 45.0 ± 1.0 %" in lines
    lines = verdict_text(summarize(trained({"ddoq": 0.2, "random": 0.4}))).splitlines()
    assert lines[0].endswith("ddoq -20.0 over random, worse, 3 seeds")
    assert lines[2] == "  higher: random real images, 40.0 ± 0.5 %"


def test_one_seed_decides_nothing() -> None:
    (ranking,) = of(trained({"ddoq": 0.9, "random": 0.1}, seeds=1))
    assert ranking.headline == "ddoq +80.0 over random, undecided, 1 seed"
    assert ranking.best is not None
    assert ranking.best.gap is not None
    assert (ranking.best.gap.low, ranking.best.gap.interval, str(ranking.best)) == (None, "", "90.0")


def test_every_student_and_size_has_its_own_best() -> None:
    records = trained({"a": 0.5, "b": 0.6, "random": 0.4})
    records += trained({"a": 0.7, "b": 0.6, "random": 0.4}, ipc="1")
    records += trained({"a": 0.2, "random": 0.4}, recipe=1) + trained({"full": 0.9}, seeds=1, ipc="full")
    ranked = of(records)
    assert [(r.recipe, r.ipc, r.best.set if r.best else None) for r in ranked] == [
        (0, "10", "b"),
        (0, "1", "a"),
        (1, "10", "a"),
    ]
    assert [r.full.mean if r.full else None for r in ranked] == [90.0, 90.0, None]
    assert "full" not in verdict_text(summarize(records))


def test_a_difference_seen_from_the_other_set_has_the_other_sign() -> None:
    (ranking,) = of(trained({"low": 0.3, "high": 0.6}))
    assert ranking.best is not None
    assert ranking.best.set == "high"
    gap = ranking.others["low"]
    assert gap.points == pytest.approx(30)
    assert gap.verdict == "better"
    assert gap.low is not None
    assert gap.high is not None
    assert gap.low < 30 < gap.high


def test_files_give_the_same_verdicts_and_old_ones_need_no_correction(tmp_path: Path) -> None:
    rows = summarize(trained(LEVELS))
    compared = [c.record() for c in compare(rows)]
    write_text(tmp_path / "summary.csv", to_csv([r.record() for r in rows]))
    write_text(tmp_path / "comparisons.csv", to_csv(compared))
    (read,) = rankings(read_records(tmp_path / "summary.csv"), read_records(tmp_path / "comparisons.csv"))
    (measured,) = of(trained(LEVELS))
    assert read.headline == measured.headline
    assert [str(s) for s in read.scores] == [str(s) for s in measured.scores]
    old = [{k: v for k, v in c.items() if not k.endswith("holm")} for c in compared]
    (earlier,) = rankings([r.record() for r in rows], old)
    assert earlier.headline == measured.headline


def test_a_verdict_that_the_correction_takes_back_says_so() -> None:
    (ranking,) = of(trained(LEVELS))
    rows = summarize(trained(LEVELS))
    compared = [{**c.record(), "verdict_holm": "undecided"} for c in compare(rows)]
    (taken_back,) = rankings([r.record() for r in rows], compared)
    assert ranking.headline == "ddoq +15.0 over random, better, 3 seeds"
    assert taken_back.headline == "ddoq +15.0 over random, better, undecided after Holm's correction, 3 seeds"
