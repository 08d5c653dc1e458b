"""The report of a run: valid, with its verdict first, and honest about what the folder lacks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from page_check import Page, checked_page
from runs import config

from dq.cli.main import main
from dq.config.overrides import apply_settings
from dq.config.schema import RunConfig
from dq.core.text import plural
from dq.distilled.set import DistilledSet
from dq.distilled.snippet import training_snippet
from dq.evaluation.verdicts import Gap, Ranking, Score
from dq.run.sections.accuracy import panel, varying
from dq.run.sections.pictures import data_uri
from dq.run.sections.settings import changed_settings, stage_times


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with students: what `dq run` leaves."""
    out = tmp_path_factory.mktemp("reported")
    assert main(["run", "--config", str(config(world, out, ipc=[3], seed=3)), "--cpu"]) == 0
    return out


def page_of(out: Path) -> Page:
    return checked_page((out / "run" / "report.html").read_text())


def reported(finished: Path, tmp_path: Path, *more: str) -> Path:
    """A copy of the run, whose report is written by the returned folder's configuration."""
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    return tmp_path


def write(finished: Path, out: Path, *more: str) -> Page:
    file = str(finished / "config.yaml")
    folders = ["--output_dir", str(out / "run")]
    assert main(["report", "--config", file, "--cpu", *folders, *more]) == 0
    return page_of(out)


def test_the_verdict_comes_first_and_headings_in_order(finished: Path) -> None:
    page = page_of(finished)
    sections = ["Accuracy", "Images", "Use", "Quantization", "Time by stage", "Settings", "Provenance"]
    assert [text for level, text in page.headings if level == 2] == sections
    verdict = re.search(r"(\w+) [+-]\d+\.\d over random, (better|undecided|worse)[^.]*, 2 seeds", page.words)
    assert verdict
    assert verdict[1] in ("ddoq", "d4m", "real")
    assert page.words.index(verdict[0]) < page.words.index("Accuracy")


def test_every_image_says_what_it_is(finished: Path) -> None:
    page = page_of(finished)
    s = DistilledSet.load(finished / "run" / "dataset", "ipc3-ddoq")
    for c, name in enumerate(s.class_names):
        rows = (s.labels == c).nonzero()[:, 0].tolist()
        for number, i in enumerate(rows):
            weight, count = float(s.weights[i]), int(s.counts[i])
            alt = f"class {name}, image {number + 1}, weight {weight:.2f}, stands for {plural(count, 'real image')}"
            assert alt in page.alts
        assert len([a for a in page.alts if a.startswith(f"random real image of class {name}, row ")]) > 3
    assert sum(a.startswith("real image nearest to image") for a in page.alts) == 9  # of the first set
    assert "All images have the training weight 1." in page.words  # of d4m
    classes = [text for tag, text in page.cells if tag == "th" and text in s.class_names]
    assert len(classes) >= 3 * 3


def test_weights_stand_below_images_where_they_differ(finished: Path) -> None:
    page = (finished / "run" / "report.html").read_text()
    s = DistilledSet.load(finished / "run" / "dataset", "ipc3-ddoq")
    assert not bool((s.weights == s.weights[0]).all())
    for weight in s.weights.tolist():
        assert f'<span class="caption">{weight:.2f}</span>' in page


def test_the_code_of_the_page_trains_as_pasted(finished: Path) -> None:
    (code, *_) = page_of(finished).codes
    assert str((finished / "run" / "dataset").absolute()) in code
    names: dict = {}
    torch.manual_seed(0)
    exec(compile(code, "pasted", "exec"), names)
    assert names["loss"].item() < 0.5  # log(3) before; the classes of the toy set are colors


def test_paths_with_quotes_are_python_text() -> None:
    code = training_snippet('/a "b"\\c', "ipc1-x", 2)
    assert 'load_dataset("/a \\"b\\"\\\\c", "ipc1-x", split="train")' in code


def test_changed_settings_come_first_and_the_rest_is_folded(finished: Path) -> None:
    page = (finished / "run" / "report.html").read_text()
    table = page[page.index("Settings that are not at their defaults") : page.index("All settings")]
    assert '<th scope="row">ipc</th><td>[3]</td>' in table
    assert '<th scope="row">seed</th><td>3</td>' in table
    assert "cluster.n_init" not in table
    assert "<details><summary>All settings</summary>" in page
    head, rows = changed_settings(apply_settings(RunConfig(), {"generate.snr": 0.25}))
    assert head == ["setting", "value", "default"]
    assert rows == [["generate.snr", "0.25", "0.1"]]


def test_time_is_that_of_all_commands(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = ('{"stage": "encode", "seconds": 30}', '{"stage": "quantization", "ipc": 1}', '{"stage": "generate"')
    metrics.write_text("\n".join([lines[0], lines[1], lines[0], '{"stage": "features", "seconds": 15}', lines[2]]))
    times, total = stage_times(metrics)
    assert [(t.stage, t.text, t.share, t.calls) for t in times] == [("encode", "60 s", 100, 2)]
    assert total == "60 s"  # features are computed within another stage
    assert stage_times(tmp_path / "none.jsonl") == ([], "0.0 s")


# --- what a folder lacks ------------------------------------------------------------------------------------------


def test_a_run_that_is_half_done_has_a_report(world: Path, tmp_path: Path) -> None:
    file = config(world, tmp_path, ipc=[2])
    for verb in ("encode", "cluster"):
        assert main([verb, "--config", str(file), "--cpu"]) == 0
    assert main(["report", "--config", str(file), "--cpu"]) == 0
    page = page_of(tmp_path)
    assert "No set is made yet" in page.words
    assert "Not evaluated yet" in page.words
    headings = [text for level, text in page.headings if level == 2]
    assert headings == ["Quantization", "Time by stage", "Settings", "Provenance"]
    # earlier still: nothing is quantized
    shutil.rmtree(tmp_path / "run" / "prototypes")
    assert main(["report", "--config", str(file), "--cpu"]) == 0
    assert "has no prototypes for ipc 2; run `dq cluster` first" in page_of(tmp_path).words


def test_a_set_that_was_removed_is_named(finished: Path, tmp_path: Path) -> None:
    out = reported(finished, tmp_path)
    shutil.rmtree(out / "run" / "dataset" / "ipc3-d4m")
    page = write(finished, out)
    assert "Not made yet, or removed: d4m at IPC 3." in page.words
    assert "Images of ddoq, IPC 3" in page.words
    assert "Images of d4m, IPC 3" not in page.words


def test_a_damaged_set_is_named_and_the_others_are_shown(finished: Path, tmp_path: Path) -> None:
    out = reported(finished, tmp_path)
    (file,) = (out / "run" / "dataset" / "ipc3-ddoq").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-40])
    page = write(finished, out)
    assert "The set ddoq at IPC 3 cannot be shown: " in page.words
    assert "Images of d4m, IPC 3" in page.words


def test_without_an_evaluation_the_page_says_so(finished: Path, tmp_path: Path) -> None:
    out = reported(finished, tmp_path)
    shutil.rmtree(out / "run" / "eval")
    page = write(finished, out)
    assert "Not evaluated yet: `dq evaluate` with the same settings trains students on the sets." in page.words
    assert "Accuracy" not in [text for _, text in page.headings]
    page = write(finished, out, "--set", "evaluate.students=[]")
    assert "Not evaluated: the settings name no students." in page.words


# --- parts --------------------------------------------------------------------------------------------------------


def ranking(*scores: Score, full: Score | None = None) -> Ranking:
    return Ranking("net, hard", 0, "10", "p", scores, full, {})


def test_bars_are_placed_in_percent_of_their_axes() -> None:
    gap = Gap(10.0, -10.0, 30.0, 3, "undecided", "undecided")
    scores = (Score("a", 100, 60.0, 5.0, 3, gap), Score("random", 100, 50.0, None, 1, None))
    p = panel(ranking(*scores, full=Score("full", 5000, 99.0, 3.0, 2, None)))
    assert (p.best, p.reach, p.headline) == ("a", 30.0, "a +10.0 over random, undecided, 3 seeds")
    a, random, full = p.bars
    assert (a.kind, a.length, a.whisker, a.cut) == ("distilled", 60.0, (55.0, 65.0), False)
    assert (a.point, a.interval) == (pytest.approx(50 + 50 / 3), (pytest.approx(50 - 50 / 3), 100.0))
    assert (random.kind, random.whisker, random.point, random.interval) == ("real", None, None, None)
    assert (full.kind, full.name, full.whisker) == ("full", "all train images", (96.0, 100.0))


def test_an_interval_much_longer_than_the_differences_is_cut() -> None:
    gap = Gap(2.0, -80.0, 84.0, 2, "undecided", "undecided")
    p = panel(ranking(Score("a", 10, 60.0, 5.0, 2, gap)))
    assert p.reach == 6.0
    assert (p.bars[0].interval, p.bars[0].cut) == ((0.0, 100.0), True)


def test_columns_that_say_nothing_are_hidden() -> None:
    table = (["set", "images", "seeds", "x"], [["a", 10, 2, ""], ["b", 20, 2, ""]])
    assert varying(table) == ((["set", "images"], [["a", 10], ["b", 20]]), "seeds 2")
    one = (["set", "images"], [["a", 10]])
    assert varying(one) == (one, "")


def test_pictures_are_exact_while_they_are_small() -> None:
    import base64
    import io

    import numpy as np
    from PIL import Image

    image = torch.randint(0, 256, (3, 32, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    head, data = data_uri(image).split(",")
    assert head == "data:image/png;base64"
    stored = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(stored, image.permute(1, 2, 0).numpy())
    large = torch.zeros(3, 400, 400, dtype=torch.uint8)
    head, data = data_uri(large).split(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (192, 192)
