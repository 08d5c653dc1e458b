"""Tables, grids and the README: what is shown is what was measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from dq.config import StudentConfig
from dq.distilled import DistilledSet
from dq.errors import InputError
from dq.evaluation import evaluate
from dq.evaluation.stage import markdown_table, protocol_name, summarize, to_csv
from dq.report import GAP, image_grid

ROOT = Path(__file__).parents[1]


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
        "protocol": "p",
        "recipe": 0,
        "last": last,
        "best": best,
        "train_seconds": 2.0,
    }


def test_seeds_are_grouped_and_last_and_best_kept_apart() -> None:
    rows = summarize([record("b", 1, 0.5), record("a", 0, 0.2), record("b", 0, 0.3), record("b", 2, 0.4)])
    assert [r.set for r in rows] == ["b", "a"]
    assert rows[0].last == (0.3, 0.5, 0.4)
    assert rows[0].best == (0.9, 0.9, 0.9)
    r = rows[0].record()
    assert (r["last_mean"], r["last_std"], r["best_mean"], r["seeds"]) == (0.4, 0.1, 0.9, 3)
    assert rows[1].record()["last_std"] is None
    assert to_csv(rows).splitlines()[1].startswith("b,10,100,convnet3,hard,3,0.4,0.1,0.9,0.0,")


def test_table_orders_ipc_as_numbers() -> None:
    records = [record("a", s, 0.1 * (s + 1), ipc=i) for i in ("50", "1", "10") for s in range(2)]
    records += [record("full", 0, 0.8, ipc="full")]
    lines = markdown_table(summarize(records)).splitlines()
    assert (
        lines[0]
        == "| set | convnet3, hard, IPC 1 | convnet3, hard, IPC 10 | convnet3, hard, IPC 50 | convnet3, hard, full |"
    )
    assert lines[2] == "| a | 15.0 ± 7.1 | 15.0 ± 7.1 | 15.0 ± 7.1 |  |"
    assert lines[3] == "| full |  |  |  | 80.0 |"
    assert lines[-1] == "Top-1 test accuracy in %, last epoch, mean ± std over 1/2 seeds."


def test_two_recipes_of_one_network_are_two_columns() -> None:
    records = [record("a", 0, 0.2), {**record("a", 0, 0.4), "recipe": 1}]
    lines = markdown_table(summarize(records)).splitlines()
    assert lines[0] == "| set | convnet3 #1, hard, IPC 10 | convnet3 #2, hard, IPC 10 |"
    assert lines[2] == "| a | 20.0 | 40.0 |"


def test_class_names_that_look_like_formulas_are_drawn(tmp_path: Path, toy_source) -> None:
    from dq.cluster import kmeans, quantization_stats
    from dq.prototypes import make_prototypes
    from dq.report import _plot_sizes

    z = torch.rand(9, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    r = kmeans(z.flatten(1), 3)
    stats = quantization_stats(z.flatten(1), r)
    points = [make_prototypes(i, n, z, torch.arange(9), r, stats) for i, n in enumerate(("$5_vs_$10%", "$^$", "_x"))]
    _plot_sizes(points, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 1000


def test_protocol_names_every_setting() -> None:
    name = protocol_name(StudentConfig(labels="soft", temperature=4.0, epochs={"10": 7}), "10")
    for part in (
        "7 epochs",
        "batch 256",
        "sgd lr 0.01 wd 0.0005 momentum 0.9",
        "step",
        "augment dsa",
        "soft T=4",
        "float32",
    ):
        assert part in name


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
    results = evaluate(small_set(toy_images), toy_source, seeds=2, baselines=("random", "full"), **settings)
    assert [(r.set, r.ipc, r.images, len(r.last)) for r in results.rows] == [
        ("set", "2", 6, 2),
        ("random", "2", 6, 2),
        ("full", "full", 24, 2),
    ]
    assert all(min(r.last) > 0.8 for r in results.rows)  # the classes differ in colour
    assert "| set |" in str(results)


def test_evaluate_sees_wrong_labels(toy_source, toy_images) -> None:
    import dataclasses

    good = small_set(toy_images)
    wrong = dataclasses.replace(good, labels=good.labels.roll(2))
    result = evaluate(wrong, toy_source, seeds=1, baselines=(), epochs={"default": 30}, augment="none", tests=1)
    assert result.rows[0].last[0] < 0.2


def test_evaluate_refuses_what_it_cannot_do(toy_source, toy_images) -> None:
    with pytest.raises(InputError, match="labels=soft need a teacher"):
        evaluate(small_set(toy_images), toy_source, labels="soft")
    with pytest.raises(InputError, match="baselines of a bare set"):
        evaluate(small_set(toy_images), toy_source, baselines=("nearest",))


def test_readme_tables_say_what_the_result_files_say() -> None:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "pipelines" / "readme_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "README.md").read_text()
    assert module.render(text) == text
    assert text.count("<!-- table") == len(module.TABLES)
