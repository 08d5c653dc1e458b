"""Tables, grids and the README: what is shown is what was measured."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from page_check import checked_page
from sets import make

from dq.config.students import RelabelConfig, StudentConfig, ViewConfig
from dq.core.errors import InputError
from dq.core.files import read_json, write_text
from dq.data.grid import GAP, image_grid
from dq.distilled.set import DistilledSet
from dq.evaluation.evaluate import evaluate
from dq.evaluation.figures import results_figures
from dq.evaluation.results import compare, recipe_names, settings_line, summarize, to_csv
from dq.evaluation.statistics import holm, paired_difference
from dq.evaluation.tables import accuracy_table, tables_text
from dq.evaluation.trainings import Work, write_tables
from dq.evaluation.verdicts import verdict_text
from dq.run.pages import write_page
from dq.run.sections.accuracy import accuracy_content
from dq.run.stages.evaluate import outdated_rows

ROOT = Path(__file__).parents[2]


def record(
    name: str, seed: int, last: float, *, ipc: str = "10", best: float = 0.9, student: str = "convnet3"
) -> dict:
    return {
        "set": name,
        "ipc": ipc,
        "images": 100,
        "student": student,
        "labels": "hard",
        "seed": seed,
        "recipe": 0,
        "test_images": 450,
        "protocol": "p",
        "settings": "all of them",
        "selected_on": "validation",
        "image_bytes": 3000,
        "label_bytes": 10 * (seed + 1),
        "last": last,
        "best": best,
        "train_seconds": 2.0 + seed,
    }


def test_seeds_are_grouped_and_last_and_best_kept_apart() -> None:
    rows = summarize([record("b", 1, 0.5), record("a", 0, 0.2), record("b", 0, 0.3), record("b", 2, 0.4)])
    assert [r.set for r in rows] == ["b", "a"]
    assert rows[0].last == (0.3, 0.5, 0.4)
    assert rows[0].best == (0.9, 0.9, 0.9)
    r = rows[0].record()
    assert (r["last_mean"], r["last_std"], r["best_mean"], r["seeds"]) == (0.4, 0.1, 0.9, 3)
    assert rows[1].record()["last_std"] is None
    assert to_csv([r.record() for r in rows]).splitlines()[1:] == [
        "b,10,100,convnet3,hard,0,3,0.4,0.1,0.9,0.0,validation,3.0,3000,20,p,all of them",
        "a,10,100,convnet3,hard,0,1,0.2,,0.9,,validation,2.0,3000,10,p,all of them",
    ]


def test_other_settings_are_another_row() -> None:
    records = [record("a", 0, 0.2), {**record("a", 1, 0.4), "settings": "others"}]
    assert [r.last for r in summarize(records)] == [(0.2,), (0.4,)]


def test_every_set_is_compared_with_random_over_common_seeds() -> None:
    records = [record("random", s, 0.1 * s) for s in (0, 1, 2, 4)]
    records += [record("a", s, 0.1 * s + 0.2 + 0.01 * s) for s in (2, 1, 0, 3)]
    records += [record("b", s, 0.1 * s, ipc="50") for s in range(3)]  # no random set of this size
    records += [{**record("b", s, 0.1 * s), "recipe": 1} for s in range(3)]  # nor under this recipe
    records += [record("c", 4, 0.9), record("d", 9, 0.9)]
    comparisons = compare(summarize(records))
    assert [(c.a.set, c.b.set, c.difference.pairs) for c in comparisons] == [("a", "random", 3), ("c", "random", 1)]
    # differences 0.20, 0.21 and 0.22: std 0.01, and Student's t for 2 degrees of freedom at 97.5 % is 4.302653; one
    # draw of 450 test images has a variance of (0.21 - 0.21^2) / 450 at least
    d, half = comparisons[0].difference, 4.302653 * (0.01**2 / 3 + (0.21 - 0.21**2) / 450) ** 0.5
    assert (d.mean, d.low, d.high) == pytest.approx((0.21, 0.21 - half, 0.21 + half))
    assert comparisons[0].record()["verdict"] == "better"
    assert (
        str(comparisons[0]) == "convnet3, hard #1, IPC 10: a beats random (+21.0 points, 95% interval +12.4 to +29.6)"
    )
    assert comparisons[1].record()["verdict"] == "undecided"
    assert (comparisons[1].record()["low"], comparisons[1].record()["high"]) == (None, None)
    assert str(comparisons[1]).endswith("c and random cannot be compared with one seed")
    (turned,) = compare(summarize([{**r, "last": 1 - r["last"]} for r in records[:8]]))
    assert (turned.difference.mean, turned.difference.verdict) == (pytest.approx(-0.21), "worse")
    assert "random beats a (-21.0 points" in str(turned)


def test_sets_are_compared_with_one_another_once_and_baselines_with_random_alone() -> None:
    level = {"theirs": 0.5, "random": 0.2, "ours": 0.7, "herding": 0.4, "nearest": 0.1}
    rows = summarize([record(name, s, v) for name, v in level.items() for s in range(2)])
    comparisons = {(c.a.set, c.b.set): c for c in compare(rows)}
    assert list(comparisons) == [
        ("theirs", "random"),
        ("theirs", "ours"),
        ("ours", "random"),
        ("herding", "random"),
        ("nearest", "random"),
    ]
    assert comparisons["theirs", "ours"].difference.mean == pytest.approx(-0.2)
    decided = [c for c in compare(rows) if c.difference.verdict != "undecided"]
    hold = sum(c.p_holm < 0.05 for c in decided)
    assert verdict_text(rows).splitlines()[-1] == (
        f"{len(decided)} of 5 comparisons of pairs are decided at 95 % each; {hold} of them after Holm's correction "
        "for their number."
    )
    # two sets need no random images between them, and one comparison no warning of many
    rows = summarize([record(name, s, level[name]) for name in ("theirs", "ours") for s in range(3)])
    assert verdict_text(rows).splitlines() == [
        "convnet3, hard, IPC 10: ours 70.0 %, not compared with random images, 3 seeds",
        "  ours beside other sets better: theirs (+20.0)",
    ]
    rows = summarize([record("full", s, 0.9, ipc="full") for s in range(2)])
    assert (compare(rows), verdict_text(rows)) == ([], "")


def test_unequal_numbers_are_not_compared_and_that_is_said() -> None:
    records = [record("random", s, 0.1) for s in range(2)]
    records += [{**record("b", s, 0.9), "images": 99} for s in range(2)]
    records += [{**record("a", s, 0.5), "images": 101} for s in range(2)]
    rows = summarize(records)
    assert compare(rows) == []
    sentence = "  not compared with random images, which are not of equal number: "
    assert verdict_text(rows).splitlines()[-1] == f"{sentence}b, a"
    assert verdict_text(rows) in tables_text(rows)
    # the equal ones among them are
    rows = summarize([*records, *(record("c", s, 0.9) for s in range(2))])
    assert [(c.a.set, c.b.set) for c in compare(rows)] == [("c", "random")]
    assert verdict_text(rows).splitlines()[-1] == f"{sentence}b, a"
    # of one number of images are two sets of the wrong one
    rows = summarize([*records, *({**record("d", s, 0.9), "images": 99} for s in range(2))])
    assert [(c.a.set, c.b.set) for c in compare(rows)] == [("b", "d")]


def test_an_interval_with_zero_decides_nothing() -> None:
    records = [record("random", s, 0.5) for s in range(3)]
    records += [record("a", s, 0.5 + d) for s, d in enumerate((0.3, 0.1, -0.1))]
    (c,) = compare(summarize(records))
    assert c.difference.low < 0 < c.difference.mean
    assert c.record()["verdict"] == "undecided"
    assert "3 seeds do not tell a from random" in str(c)


def test_one_of_450_test_images_decides_nothing() -> None:
    records = [record(name, s, right / 450) for name, right in (("a", 301), ("random", 300)) for s in range(3)]
    (c,) = compare(summarize(records))
    # no spread over seeds at all; McNemar's least variance of the mean 1/450 is (1/450 - 1/450^2) / 450
    half = 4.302653 * ((1 / 450 - 1 / 450**2) / 450) ** 0.5
    assert (c.difference.low, c.difference.high) == pytest.approx((1 / 450 - half, 1 / 450 + half), rel=1e-5)
    assert c.record()["verdict"] == "undecided"
    # the same share of so many images that chance would not move it so far
    (c,) = compare(summarize([{**r, "test_images": 450_000} for r in records]))
    assert c.record()["verdict"] == "better"


def test_comparisons_tell_two_students_of_one_network_apart() -> None:
    records = [
        {**record(name, s, 0.1 * j + gap), "recipe": j, "protocol": "pq"[j], "settings": f"lr {j}"}
        for name, gap in (("a", 0.5), ("random", 0.2))
        for j in range(2)
        for s in range(2)
    ]
    comparisons = [c.record() for c in compare(summarize(records))]
    assert [(r["student"], r["recipe"], r["protocol"], r["settings"]) for r in comparisons] == [
        ("convnet3", 0, "p", "lr 0"),
        ("convnet3", 1, "q", "lr 1"),
    ]
    assert [str(c).split(", IPC")[0] for c in compare(summarize(records))] == [
        "convnet3, hard, p, lr 0",
        "convnet3, hard, q, lr 1",
    ]


def test_table_orders_ipc_as_numbers() -> None:
    records = [record("a", s, 0.1 * (s + 1), ipc=i) for i in ("50", "1", "10") for s in range(2)]
    records += [record("full", 0, 0.8, ipc="full")]
    lines = accuracy_table(summarize(records)).splitlines()
    assert (
        lines[0]
        == "| set | convnet3, hard, IPC 1 | convnet3, hard, IPC 10 | convnet3, hard, IPC 50 | convnet3, hard, full |"
    )
    assert lines[2] == "| a | 15.0 ± 7.1 | 15.0 ± 7.1 | 15.0 ± 7.1 |  |"
    assert lines[3] == "| full |  |  |  | 80.0 |"
    assert lines[-2:] == [
        "Top-1 test accuracy in %, last epoch, mean ± std over 1/2 seeds.",
        "Protocols: p, convnet3: all of them.",
    ]
    best = accuracy_table(summarize(records), which="best").splitlines()
    assert best[2] == "| a | 90.0 ± 0.0 | 90.0 ± 0.0 | 90.0 ± 0.0 |  |"
    assert best[-2].startswith("Top-1 test accuracy in %, best epoch, chosen on validation, mean")


def test_two_recipes_of_one_network_are_two_columns() -> None:
    records = [record("a", 0, 0.2), {**record("a", 0, 0.4), "recipe": 1}]
    lines = accuracy_table(summarize(records)).splitlines()
    assert lines[0] == "| set | convnet3, hard #1, IPC 10 | convnet3, hard #2, IPC 10 |"
    assert lines[2] == "| a | 20.0 | 40.0 |"


def test_recipes_are_named_by_what_differs() -> None:
    settings = ("300 epochs, batch 25, sgd lr 0.1", "300 epochs, batch 50, sgd lr 0.1")
    rows = [
        {"recipe": str(n), "student": "resnet18", "labels": "soft", "protocol": "fadrm", "settings": s}
        for n, s in enumerate(settings)
    ]
    assert recipe_names(rows) == {0: "resnet18, soft, batch 25", 1: "resnet18, soft, batch 50"}
    hard = {**rows[0], "recipe": "1", "labels": "hard"}
    assert recipe_names([rows[0], hard]) == {0: "resnet18, soft", 1: "resnet18, hard"}
    other = {**rows[0], "recipe": "1", "protocol": "rded"}
    assert recipe_names([rows[0], other]) == {0: "resnet18, soft, fadrm", 1: "resnet18, soft, rded"}
    # what all rows of a recipe share tells it apart, not what changes with the number of images
    many = [*rows, {**rows[0], "settings": settings[0].replace("300", "100")}]
    assert recipe_names(many)[0] == "resnet18, soft, batch 25"
    # too much differs, or it is not enough
    far = {**rows[0], "recipe": "2", "settings": "100 epochs, batch 9, adamw lr 2"}
    assert recipe_names([rows[0], far]) == {0: "resnet18, soft #1", 2: "resnet18, soft #3"}


def accuracy_page(folder: Path) -> str:
    accuracy = accuracy_content(folder, outdated_rows(folder))
    content = {"title": "", "verdict": "", "accuracy": accuracy, "dd_ranking": None}
    return write_page(folder / "page.html", "results.html", **content).read_text()


def test_holm_adjusts_as_by_hand_and_in_any_order() -> None:
    p = [0.01, 0.04, 0.03, 0.005]
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, and none below one before it
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(p[::-1]) == holm(p)[::-1]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@pytest.mark.parametrize("test_images", [None, 450])
def test_a_p_value_is_below_a_level_where_the_interval_leaves_zero_out(test_images: int | None) -> None:
    from scipy.stats import ttest_rel

    a, b = [0.31, 0.33, 0.36], [0.3, 0.3, 0.3]
    d = paired_difference(a, b, test_images=test_images)
    assert d.p_value is not None
    touching = paired_difference(a, b, test_images=test_images, confidence=1 - d.p_value)
    assert touching.low == pytest.approx(0, abs=1e-12)
    if test_images is None:
        assert d.p_value == pytest.approx(ttest_rel(a, b).pvalue)
    assert paired_difference([1.0], [0.0]).p_value is None
    assert paired_difference([1.0, 1.0], [0.0, 0.0]).p_value == 0
    assert paired_difference([1.0, 1.0], [1.0, 1.0]).p_value == 1


def test_a_verdict_may_be_lost_by_the_correction_for_the_number_of_comparisons() -> None:
    noise = (-0.01, 0.0, 0.01)  # of differences: standard error 0.00577
    lasts = {"random": [0.2] * 3, "z": [0.9, 0.9001, 0.9]} | {n: [0.2324 + x for x in noise] for n in "abc"}
    records = [{**record(n, s, v[s]), "test_images": 10**9} for n, v in lasts.items() for s in range(3)]
    rows = summarize(records)
    comparisons = {(c.a.set, c.b.set): c for c in compare(rows)}
    assert len(comparisons) == 10
    for name in "abc":
        c = comparisons[name, "random"]
        assert c.difference.p_value == pytest.approx(0.03, abs=0.001)
        # the four against z are smaller
        assert c.p_holm == pytest.approx(6 * c.difference.p_value)
        assert (c.record()["verdict"], c.record()["verdict_holm"]) == ("better", "undecided")
        assert str(c).endswith("; undecided after Holm's correction)")
    assert comparisons["z", "random"].verdict_holm == "better"
    assert "Holm" not in str(comparisons["z", "random"])
    assert verdict_text(rows).splitlines()[-1] == (
        "7 of 10 comparisons of pairs are decided at 95 % each; 4 of them after Holm's correction for their number."
    )
    alone = summarize([r for r in records if r["set"] in ("a", "random")])
    assert [c.verdict_holm for c in compare(alone)] == ["better"]


def test_a_report_of_comparisons_without_the_corrected_verdict_is_written(tmp_path: Path) -> None:
    from dq.run.report import write_results_report

    rows = summarize([record(name, s, 0.2 + gap) for name, gap in (("a", 0.1), ("random", 0)) for s in range(3)])
    compared = [c.record() for c in compare(rows)]
    write_text(tmp_path / "eval" / "summary.csv", to_csv([r.record() for r in rows]))
    for keys, corrected in ((list(compared[0]), True), (list(compared[0])[:-3], False)):
        assert keys[-1] == ("verdict_holm" if corrected else "verdict")
        write_text(tmp_path / "eval" / "comparisons.csv", to_csv([{k: c[k] for k in keys} for c in compared]))
        page = write_results_report(tmp_path).read_text()
        assert "<td>+10.0</td>" in page
        assert ("after Holm" in page) == corrected


def test_report_tells_students_of_other_labels_apart(tmp_path: Path) -> None:
    from dq.run.report import write_results_report

    records = [
        {**record(name, s, 0.1 * j + gap + 0.01 * s), "labels": labels, "recipe": j}
        for name, gap in (("a", 0.5), ("random", 0.2))
        for j, labels in enumerate(("hard", "soft"))
        for s in range(2)
    ]
    rows = summarize(records)
    write_text(tmp_path / "eval" / "summary.csv", to_csv([r.record() for r in rows]))
    write_text(tmp_path / "eval" / "comparisons.csv", to_csv([c.record() for c in compare(rows)]))
    page = write_results_report(tmp_path).read_text()
    differences = page[page.index("Differences of pairs") :]
    assert [differences.count(f"<td>convnet3, {kind}</td>") for kind in ("hard", "soft")] == [1, 1]
    assert checked_page(page).headings == [(1, f"Results of {tmp_path.name}"), (2, "Accuracy")]


def test_rows_that_leave_the_table_are_named(tmp_path: Path, accelerator, caplog: pytest.LogCaptureFixture) -> None:
    work = Work(tmp_path, accelerator)
    first = [{**record("a", 0, 0.5), "data": {}}, {**record("a", 0, 0.6, ipc="1"), "data": {}}]
    write_tables(first, work)
    assert not caplog.records
    write_tables([*first, {**record("b", 0, 0.5), "data": {}}], work)
    assert not caplog.records
    write_tables([{**first[0], "settings": "200 epochs"}], work)
    (warning,) = caplog.records
    assert "3 of 3 rows leave" in warning.getMessage()
    assert "the first is a, IPC 10, convnet3, hard labels, all of them" in warning.getMessage()


def measured(digest: str, seeds: int, *, labels: str = "hard", **data: object) -> list[dict]:
    """Records of row `a`, measured on a set of this digest."""
    facts = {"set_digest": digest, "fingerprint": "f", "image_size": 8, "validation_images": 0, **data}
    return [{**record("a", s, 0.5), "labels": labels, "data": facts} for s in range(seeds)]


TAUGHT = [{**r, "teachers": [{"digest": "t"}]} for r in measured("x", 1, labels="soft")]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (measured("x", 2), measured("y", 2), r"1 of 1 rows .* again on .* all of them \(other images of the set\)"),
        (measured("x", 1), measured("x", 1, fingerprint="g"), r"\(other real images\)"),
        (TAUGHT, [{**TAUGHT[0], "teachers": [{"digest": "u"}]}], r"first is a, IPC 10, .*\(other teachers\)"),
        (measured("x", 3), measured("x", 1), r"1 of 1 rows .* lose seeds; .* \(without seeds 1, 2\)"),
        (measured("x", 1), measured("x", 3), None),
        (measured("x", 2), measured("x", 2), None),
        ([{**record("a", 0, 0.5), "data": {}}], measured("x", 1), None),  # of a release that kept no digest
    ],
)
def test_rows_that_are_replaced_or_shrink_are_named(tmp_path, accelerator, caplog, first, second, message) -> None:
    work = Work(tmp_path, accelerator)
    write_tables(first, work)
    assert not caplog.records
    write_tables(second, work)
    assert len(caplog.records) == (message is not None)
    assert message is None or re.search(message, caplog.text)


def test_a_damaged_table_stops_no_new_one(tmp_path: Path, accelerator) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "summary.csv").write_text("garbage\nmore\n")
    (tmp_path / "eval" / "trainings.jsonl").write_text('{"seed": 0, "data": 3, "teachers": null}\n[]\n{')
    write_tables(measured("x", 1), Work(tmp_path, accelerator))
    assert "convnet3" in (tmp_path / "eval" / "summary.csv").read_text()


def test_the_report_leaves_out_rows_of_a_set_that_was_made_anew(tmp_path, accelerator, caplog) -> None:
    s = make()
    s.save(tmp_path / "dataset", "ipc2-ours")
    own = read_json(tmp_path / "dataset" / "ipc2-ours" / "provenance.json")
    name = own["method"]["name"]
    digests = {name: own["content"], "random": "r"}
    records = [
        {**record(n, k, 0.1 * k + 0.2, ipc="2"), "data": {"set_digest": d}} for n, d in digests.items() for k in (0, 1)
    ]
    write_tables(records, Work(tmp_path, accelerator))
    assert outdated_rows(tmp_path) == []
    assert "Left out" not in accuracy_page(tmp_path)
    changed = s.images_uint8().clone()
    changed[0] = 255 - changed[0]
    dataclasses.replace(s, images=changed).save(tmp_path / "dataset", "ipc2-ours")
    assert outdated_rows(tmp_path) == [(name, "2")]
    text = accuracy_page(tmp_path)
    assert f"made again after it was evaluated: {name} at IPC 2" in text
    assert f">{name}</th>" not in text
    assert '<th scope="row">random</th>' in text
    assert "summary.csv has rows of sets that were made again since" in caplog.text


def test_recipes_of_one_network_are_drawn_apart() -> None:
    from matplotlib.figure import Figure

    records = [
        {**record("a", s, 0.1 * (j + 1)), "ipc": ipc, "recipe": j}
        for j, ipc in ((0, "1"), (0, "10"), (1, "1"), (1, "10"))
        for s in range(2)
    ]
    rows = [{k: str(v) for k, v in r.record().items()} for r in summarize(records)]
    drawn = dict(results_figures(rows, lambda w, h: Figure(figsize=(w, h))))
    panels = drawn["accuracy"].axes
    assert [ax.get_title() for ax in panels] == ["convnet3, hard #1", "convnet3, hard #2"]
    for ax, height in zip(panels, (10, 20), strict=True):
        assert ax.lines[0].get_ydata() == pytest.approx([height, height])


def test_class_names_that_look_like_formulas_are_drawn(tmp_path: Path, toy_source) -> None:
    from dq.cluster.kmeans import kmeans, quantization_stats
    from dq.cluster.prototypes import make_prototypes
    from dq.run.sections.quantization import _plot_sizes

    z = torch.rand(9, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    r = kmeans(z.flatten(1), 3)
    stats = quantization_stats(z.flatten(1), r)
    points = [make_prototypes(i, n, z, torch.arange(9), r) for i, n in enumerate(("$5_vs_$10%", "$^$", "_x"))]
    points = [dataclasses.replace(p, stats=stats) for p in points]
    _plot_sizes(points, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 1000


HARD = StudentConfig(epochs=7)
FIXED = StudentConfig(epochs=7, labels="fixed")
SOFT = StudentConfig(epochs=7, labels="soft", augment="none")
# of every setting that changes results: where it does so, and another value
CHANGES = {
    "labels": [(HARD, "fixed")],
    "norm": [(HARD, "batch")],
    "init": [(HARD, "torchvision"), (HARD, "fan_out")],
    "epochs": [(HARD, 8)],
    "batch_size": [(HARD, 255)],
    "accumulate": [(HARD, 2)],
    "optimizer": [(HARD, "adamw")],
    "lr": [(HARD, 0.0101)],
    "learned_lr": [(HARD, True)],
    "momentum": [(HARD, 0.91)],
    "weight_decay": [(HARD, 0.00051)],
    "decay_vectors": [(HARD, False), (HARD, True)],
    "schedule": [(HARD, s) for s in ("multistep", "cosine", "cos2", "linear", "constant")],
    "milestones": [(dataclasses.replace(HARD, schedule="multistep"), (0.8, 0.9, 0.95))],
    "step_factor": [(dataclasses.replace(HARD, schedule="multistep"), 0.5)],
    "warmup": [(HARD, 5)],
    "zeta": [(dataclasses.replace(HARD, schedule="cosine"), 2.0)],
    "augment": [(HARD, "crop_flip"), (HARD, "frepo"), (HARD, "frepo_noflip"), (HARD, "none")],
    "whiten": [(HARD, True)],
    "zca": [(dataclasses.replace(HARD, whiten=True), "frepo")],
    "loss": [(FIXED, "mse_gt"), (FIXED, "mse"), (SOFT, "mse_gt")],
    "lr_floor": [(dataclasses.replace(HARD, schedule="cosine"), 0.01)],
    "temperature": [(FIXED, 4.5), (SOFT, 20.0)],
    "gt_weight": [(dataclasses.replace(SOFT, loss="mse_gt"), 0.026)],
    "ema": [(HARD, 0.99)],
    "test_scale": [(HARD, 8 / 7)],
    "select": [(dataclasses.replace(HARD, tests=2), "test")],
    "tests": [(HARD, 2), (dataclasses.replace(HARD, tests=2), 3)],
    "dtype": [(HARD, "bfloat16")],
    "views": [
        (HARD, ViewConfig(**{name: value}))
        for name, value in {
            "rand_augment": 2,
            "rand_magnitude": 8,
            "shuffle": 2,
            "crop_scale": (0.08, 1.0),
            "crop_ratio": (0.5, 2.0),
            "crop_pad": 0.125,
            "flip": 0.5,
            "jitter": 0.4,
            "lighting": 0.1,
            "mix": "cutmix",
            "mix_alpha": 0.8,
        }.items()
    ],
    "relabel": [
        (SOFT, RelabelConfig(**{name: value}))
        for name, value in {
            "statistics": "batch",
            "average": "probabilities",
            "dropout": True,
            "bits": 8,
            "top_k": 5,
            "epochs": 3,
            "views": "seed",
            "seed": 43,
        }.items()
    ],
}


def test_settings_line_names_every_setting() -> None:
    # network and protocol have columns of their own, and where labels are kept does not change results
    fields = {f.name for f in dataclasses.fields(StudentConfig)}
    assert set(CHANGES) == fields - {"net", "protocol"}
    assert len(CHANGES["views"]) == len(dataclasses.fields(ViewConfig))
    assert len(CHANGES["relabel"]) == len(dataclasses.fields(RelabelConfig)) - 1
    lines = set()
    count = 0
    for name, cases in CHANGES.items():
        for base, value in cases:
            changed = settings_line(dataclasses.replace(base, **{name: value}))
            assert changed != settings_line(base), (name, value)
            lines |= {changed}
            count += 1
    assert len(lines) == count  # no two of them read alike
    assert settings_line(HARD) not in lines


def test_settings_line_can_be_read() -> None:
    line = settings_line(StudentConfig(labels="fixed", temperature=4.0, epochs=7, dtype="float32"))
    for part in (
        "7 epochs",
        "batch 256",
        "sgd lr 0.01 wd 0.0005 momentum 0.9",
        "step",
        "augment dsa",
        "fixed labels, KL T=4",
        "float32",
    ):
        assert part in line
    views = ViewConfig(crop_scale=(0.08, 1), mix="cutmix")
    line = settings_line(StudentConfig(labels="soft", augment="none", views=views, accumulate=2, tests=3, ema=0.99))
    for part in (
        "batch 256 in 2 parts",
        "crop_scale 0.08-1",
        "mix cutmix",
        "label statistics running",
        "EMA 0.99",
        "best of 3 looks at validation",
    ):
        assert part in line


def test_grid_places_images_by_row_and_column() -> None:
    images = [torch.full((3, 4, 4), v, dtype=torch.uint8) for v in (10, 60, 110)]
    grid = image_grid([images[:2], images[2:]], scale=2)
    assert grid.size == (2 * (2 * (4 + GAP) - GAP), 2 * (2 * (4 + GAP) - GAP))
    step = 2 * (4 + GAP)
    assert grid.getpixel((0, 0))[0] == 10
    assert grid.getpixel((step, 0))[0] == 60
    assert grid.getpixel((0, step))[0] == 110
    assert grid.getpixel((step, step)) == (255, 255, 255)


def small_set(toy_images) -> DistilledSet:
    images, labels = toy_images["train"]
    rows = [0, 1, 9, 10, 17, 18]
    return DistilledSet(
        images=(images[rows] * 255).to(torch.uint8),
        labels=labels[rows],
        weights=torch.ones(6),
        class_names=("red", "green", "blue"),
        prototype=torch.tensor([0, 1] * 3),
        counts=torch.ones(6, dtype=torch.int64),
        source_row=torch.tensor(rows),
    )


def test_evaluate_trains_on_the_set_and_on_its_baselines(toy_source, toy_images) -> None:
    settings = {"epochs": {"default": 40}, "augment": "none", "tests": 1, "optimizer": "adamw", "lr": 1e-3}
    results = evaluate(
        small_set(toy_images), toy_source, n_seeds=2, baselines=("random", "nearest", "full"), **settings
    )
    assert [(r.set, r.ipc, r.images, len(r.last)) for r in results.rows] == [
        ("set", "2", 6, 2),
        ("random", "2", 6, 2),
        ("nearest", "2", 6, 2),
        ("full", "full", 24, 1),
    ]
    assert all(min(r.last) > 0.8 for r in results.rows)  # the classes differ in color
    assert {r.protocol for r in results.rows} == {"classic"}
    assert all("40 epochs" in r.settings and "best" not in r.settings for r in results.rows)
    assert [(c.a.set, c.b.set) for c in results.comparisons] == [("set", "random"), ("nearest", "random")]
    assert "| set |" in str(results)
    assert "convnet3, hard, IPC 2: set " in str(results)


def test_validation_images_are_not_trained_on(toy_source, toy_images) -> None:
    settings = {"epochs": 2, "augment": "none", "tests": 2}
    results = evaluate(small_set(toy_images), toy_source, n_seeds=1, baselines=("full",), **settings)
    # a fifth of each class at most: one of 9, 8 and 7
    assert [(r.set, r.images, r.selected_on) for r in results.rows] == [
        ("set", 6, "validation"),
        ("full", 21, "validation"),
    ]


def test_evaluate_sees_wrong_labels(toy_source, toy_images) -> None:
    good = small_set(toy_images)
    wrong = dataclasses.replace(good, labels=good.labels.roll(2))
    settings = {"epochs": {"default": 30}, "augment": "none", "tests": 1}
    results = evaluate(wrong, toy_source, n_seeds=2, baselines=("random",), **settings)
    accuracies = {r.set: r.last for r in results.rows}
    assert max(accuracies["set"]) < 0.2
    (c,) = results.comparisons
    assert (c.a.set, c.b.set) == ("set", "random")
    assert c.difference.mean < -0.5
    assert c.difference == paired_difference(accuracies["set"], accuracies["random"], test_images=12)


def test_evaluate_refuses_what_it_cannot_do(toy_source, toy_images) -> None:
    small = small_set(toy_images)
    with pytest.raises(InputError, match="labels=soft need a teacher"):
        evaluate(small, toy_source, protocol="rded", students="convnet3")
    with pytest.raises(InputError, match=r"'set' .*labels=fixed; set teachers"):
        evaluate(small, toy_source, labels="fixed", epochs=1)
    with pytest.raises(InputError, match="'patches' needs a teacher"):
        evaluate(small, toy_source, baselines=("patches",))
    with pytest.raises(InputError, match=r"baselines.0 must be one of 'random'"):
        evaluate(small, toy_source, baselines=("herd",))
    with pytest.raises(InputError, match="the set 'set' has other classes than"):
        evaluate(dataclasses.replace(small, class_names=("green", "red", "blue")), toy_source)
    with pytest.raises(InputError, match=r"class 2 'blue' .*'set'"):
        evaluate(dataclasses.replace(small, labels=small.labels.clamp(max=1)), toy_source)


@pytest.fixture
def readme_tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "pipelines"))
    return importlib.import_module("readme_tables")


def test_readme_tables_say_what_the_result_files_say(readme_tables: ModuleType) -> None:
    files = readme_tables.marked_files()
    pages = ("results/index.md", "results/priors.md", "how-to/many-machines.md")
    assert {ROOT / "README.md", *(ROOT / "docs" / page for page in pages)} <= set(files)
    texts = [f.read_text() for f in files]
    for text in texts:
        assert readme_tables.render(text) == text
    names = [name for text in texts for name in readme_tables.names_in(text)]
    assert sorted(names) == sorted(readme_tables.TABLES)
    assert sum(text.count("<!-- table") for text in texts) == len(names)


def test_readme_tables_are_written_in_the_given_files_alone(
    readme_tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text("before\n<!-- table student -->\nold\n<!-- end -->\nafter\n")
    other.write_text(page.read_text())
    monkeypatch.setattr("sys.argv", ["readme_tables.py", "--check", str(page)])
    assert readme_tables.main() == 1
    assert f"{page} differ from results/" in capsys.readouterr().err
    assert page.read_text() == other.read_text()

    monkeypatch.setattr("sys.argv", ["readme_tables.py", str(page)])
    assert readme_tables.main() == 0
    new = f"<!-- table student -->\n{readme_tables.student_speed()}\n<!-- end -->"
    assert page.read_text() == f"before\n{new}\nafter\n"
    assert "old" in other.read_text()

    page.write_text("<!-- table nowhere -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="2"):
        readme_tables.main()
    assert "'nowhere', which is none of" in capsys.readouterr().err
