"""The dry run's arithmetic: counts, bytes and seconds against numbers worked out by hand and against real runs."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import time
from pathlib import Path

import pytest
import torch
import yaml
from refining import SHORT, TEDDY, refining
from runs import config, full

from dq.cli.main import main, resolve
from dq.cli.parser import build_parser
from dq.config.overrides import apply_settings
from dq.config.reader import from_dict
from dq.config.schema import RunConfig, load_config
from dq.core.errors import InputError
from dq.run.planning.clock import Speed, timed
from dq.run.planning.costs import StagePlan, busiest, seconds_of, stage_plans
from dq.run.planning.page import report_plan
from dq.run.planning.plan import LIKE, like_source
from dq.run.planning.sets import planned_sets
from dq.run.planning.timings import Speeds

ROOT = Path(__file__).parents[2]
EXAMPLE = {
    "codec.resolution": 256,
    "ipc": [10],
    "generate.mode": "dit",
    "generate.num_inference_steps": 50,
    "evaluate.seeds": 2,
    "evaluate.baselines": ["random", "full"],
    "evaluate.full_seeds": 1,
    "evaluate.students": [{"net": "convnet3", "epochs": {"default": 30, "full": 3}, "tests": 1}],
}


def by_stage(plans: list[StagePlan]) -> dict[str, StagePlan]:
    return {p.stage: p for p in plans}


def test_known_sets_have_their_counts() -> None:
    for name, (classes, train, test) in LIKE.items():
        source = like_source(name)
        counts = source.class_counts()
        assert (len(counts), counts.sum()) == (classes, train)
        assert counts.max() - counts.min() <= 1
        assert (len(source.test) if source.test_name else 0) == test
    assert like_source("3x7").class_counts().tolist() == [7, 7, 7]
    with pytest.raises(InputError, match="leave it out to read any"):
        like_source("3x7").train.read(0)
    for wrong in ("imagenet", "0x5", "3x", "-1x4", "3x7x2"):
        with pytest.raises(InputError, match="--like takes cifar10, imagenet-1k"):
            like_source(wrong)


def test_the_worked_example_of_the_documentation() -> None:
    """docs/how-to/many-machines.md works these out by hand."""
    source = like_source("imagenet-1k")
    settings = apply_settings(RunConfig(), EXAMPLE)
    plans = by_stage(stage_plans(settings, source, latent=(4, 32, 32), denoiser_steps=28))
    assert plans["encode"].calls == {"read": 1_281_167, "encode": 1_281_167}
    assert plans["encode"].bytes == 1_281_167 * (4 * 32 * 32 * 2 + 12) == 10_510_694_068
    assert plans["cluster"].bytes == 10_000 * (4 * 32 * 32 * 4 * 2 + 24) + 1_281_167 * 12 == 343_294_004
    assert plans["cluster"].calls == {"cluster torch latents ipc 10": 1_281_167}
    assert plans["generate"].calls == {"decode": 10_000, "denoise": 280_000}
    assert plans["generate"].bytes == 10_000 * 3 * 256 * 256 == 1_966_080_000
    # ddoq and random, two seeds each, 10,000 images, 30 epochs; full, once, 3 epochs
    assert plans["evaluate"].calls["student 0"] == 2 * 2 * 10_000 * 30 + 1_281_167 * 3
    assert plans["evaluate"].calls["test 0"] == (2 * 2 + 1) * 50_000
    assert plans["evaluate"].units == "5 trainings"
    # every process reads the test images and, for the full data, all of train
    assert plans["evaluate"].each == {"read": 50_000 + 1_281_167}
    seconds = seconds_of(plans["generate"], {"decode": 0.01, "denoise": 0.02}, overlap=True)
    assert seconds == pytest.approx(10_000 * 0.01 + 280_000 * 0.02)
    # without knowing the walk, all nominal steps count
    more = by_stage(stage_plans(settings, source, latent=None, denoiser_steps=None))
    assert more["generate"].calls["denoise"] == 500_000
    assert more["encode"].bytes is None


def test_methods_that_share_work_count_once() -> None:
    source = like_source("4x20")
    methods = {
        "a": {"weights": "sqrt"},
        "b": {"weights": "uniform"},  # the same images
        "c": {"representative": "medoid"},  # the same prototypes
        "d": {"override": {"cluster.n_init": 3}},
        "e": {"representative": "real"},
    }
    changes = {"methods": methods, "ipc": [2], "evaluate.students": []}
    plans = by_stage(stage_plans(apply_settings(RunConfig(), changes), source, latent=(4, 8, 8), denoiser_steps=None))
    assert plans["cluster"].calls == {"cluster torch latents ipc 2": 2 * 80}
    assert plans["generate"].calls == {"decode": 3 * 8, "read": 8}
    assert plans["label"].bytes == 5 * 8 * 3 * 64 * 64  # but every method has a set


def test_small_classes_have_fewer_prototypes() -> None:
    source = like_source("3x4")
    changes = {"ipc": [10], "generate.images_per_prototype": 3, "generate.mode": "dit", "evaluate.students": []}
    plans = by_stage(stage_plans(apply_settings(RunConfig(), changes), source, latent=(1, 2, 2), denoiser_steps=5))
    assert plans["generate"].calls == {"decode": 36, "denoise": 180}
    assert plans["cluster"].bytes == 12 * (4 * 8 + 24) + 12 * 12  # and the cell of each image


def test_the_busiest_process_decides() -> None:
    assert busiest([1.0] * 8, 4) == 0.25
    assert busiest([8.0, 3, 3, 2], 2) == 0.5
    assert busiest([5.0, 1, 1], 3) == pytest.approx(5 / 7)
    assert busiest([1.0], 16) == 1.0
    assert busiest([], 3) == 1.0
    # it divides as a run does
    from dq.core.processes import assign_units

    costs = [5.0, 1, 1, 8, 3, 3, 2, 1, 7.5]
    for world_size in (1, 2, 3, 5):
        largest = max(sum(costs[i] for i in assign_units(costs, r, world_size)) for r in range(world_size))
        assert busiest(costs, world_size) == pytest.approx(largest / sum(costs))


def test_seconds_follow_speeds_and_processes() -> None:
    plan = StagePlan("encode", "", {"read": 100, "encode": 100}, share=0.25)
    assert seconds_of(plan, {"read": 1.0, "encode": 2.0}, overlap=False) == 75
    assert seconds_of(plan, {"read": 1.0, "encode": 2.0}, overlap=True) == 50
    assert seconds_of(plan, {"encode": 2.0}, overlap=True) is None
    test = StagePlan("evaluate", "", {"student 0": 100}, {"read": 10}, share=0.5)
    assert seconds_of(test, {"student 0": 1.0, "read": 1.0}, overlap=True) == 60
    source = like_source("imagenet-1k")
    settings = apply_settings(RunConfig(), EXAMPLE)
    for processes in (8, 16):
        for p in stage_plans(settings, source, latent=(4, 32, 32), denoiser_steps=28, processes=processes):
            if p.stage == "evaluate":
                # five trainings do not divide by eight: the longest one, on the full data, decides
                assert p.share == pytest.approx(1_281_167 * 3 / (1_281_167 * 3 + 2 * 2 * 300_000))
            elif p.stage != "label":
                assert p.share == pytest.approx(1 / processes, rel=0.01)


def test_labels_of_views_are_counted_as_the_label_stage_counts_them() -> None:
    from dq.labels.plan import label_bytes
    from dq.run.planning.plan import trainings

    student = {"labels": "soft", "augment": "none", "epochs": 3, "tests": 1, "batch_size": 4}
    changes = {
        "ipc": [2],
        "teachers": [{"net": "resnet20", "path": "x"}],
        "evaluate.students": [student, {**student, "lr": 0.5}],  # a second that sees the same views
        "evaluate.baselines": [],
    }
    settings = apply_settings(RunConfig(), changes)
    source = like_source("5x9")
    each = next(trainings(settings, source.class_counts(), {("ddoq", "2"): 10}))
    plan = by_stage(stage_plans(settings, source, latent=(1, 2, 2), denoiser_steps=None))["evaluate"]
    assert plan.bytes == label_bytes(10, 3, 5, each.config.relabel, 4, each.config.views).total
    assert plan.calls["teacher"] == 30


# --- speeds -------------------------------------------------------------------------------------------------------


def test_batches_grow_while_the_budget_lasts() -> None:
    cpu = torch.device("cpu")
    assert timed(lambda n: 0.001 * n, 64, device=cpu).batch == 64
    seconds = timed(lambda n: 0.1 * n, 64, device=cpu, budget_s=1.0)
    assert seconds.batch == 2  # three of 0.2 s fit, three of 0.4 s do not
    assert seconds.seconds == pytest.approx(0.1)
    assert timed(lambda n: 100.0, 64, device=cpu, smallest=2).batch == 2
    took = iter([9.0, 3, 2, 1, 6])
    seconds = timed(lambda n: next(took), 1, device=cpu)
    assert (seconds.seconds, seconds.least, seconds.most) == (2, 1, 6)


def dry(file: Path, *flags: str) -> list[str]:
    return ["run", "--config", str(file), "--cpu", "--dry-run", *flags]


@pytest.fixture(scope="module")
def measured(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A configuration, the speeds that its dry run saved, and what that printed."""
    folder = tmp_path_factory.mktemp("measured")
    file, speeds, output = full(world, folder), folder / "speeds.json", io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(dry(file, "--save_speeds", str(speeds))) == 0
    return file, speeds, output.getvalue()


def test_a_dry_run_measures_saves_and_plans(measured: tuple[Path, Path, str], capsys: pytest.CaptureFixture) -> None:
    file, speeds, output = measured
    for stage in ("encode", "cluster", "generate", "label", "evaluate", "all"):
        assert any(line.startswith(f"  {stage} ") for line in output.splitlines()), stage
    assert "not known" not in output
    speeds_read = Speeds.load(speeds)
    wanted = {"read", "encode", "decode", "denoise", "teacher", "student 0", "test 0", "student 1", "test 1"}
    assert wanted <= set(speeds_read.speeds)
    assert {"cluster torch latents ipc 1", "cluster minibatch latents ipc 3"} <= set(speeds_read.speeds)
    for speed in speeds_read.speeds.values():
        assert 0 <= speed.least <= speed.seconds <= speed.most < 1
    assert speeds_read.facts["latent"] == [4, 4, 4]
    assert speeds_read.facts["versions"]["torch"] == torch.__version__
    assert not (file.parent / "run").exists()
    assert not (file.parent / "cache").exists()
    # the same from the file, for another number of processes and another set
    assert main(dry(file, "--speeds", str(speeds), "--processes", "16", "--like", "imagenet-21k")) == 0
    output = capsys.readouterr().out
    assert "14197122 train images, 21841 classes" in output
    assert "on 16 processes" in output
    encode = next(line for line in output.splitlines() if line.startswith("  encode"))
    assert "1.99 GB on disk" in encode  # 14,197,122 x (64 x 2 + 12)
    assert "not timed" not in output


def test_the_file_decides_the_seconds(
    measured: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file, speeds = measured[0], tmp_path / "speeds.json"
    data = json.loads(measured[1].read_text())
    data["speeds"]["read"]["seconds"] = 1.0
    data["speeds"]["encode"]["seconds"] = 4.0
    speeds.write_text(json.dumps(data))
    assert main(dry(file, "--speeds", str(speeds), "--like", "6x10")) == 0
    assert "60 images in 8 parts: about 5 min" in capsys.readouterr().out  # 60 x 5 s, no overlap on a CPU
    data["overlap"] = True
    speeds.write_text(json.dumps(data))
    assert main(dry(file, "--speeds", str(speeds), "--like", "6x10", "--processes", "6")) == 0
    assert "60 images in 8 parts: about 56 s" in capsys.readouterr().out  # two of 7 images on the busiest
    del data["speeds"]["encode"]
    speeds.write_text(json.dumps(data))
    assert main(dry(file, "--speeds", str(speeds))) == 0
    output = capsys.readouterr().out
    assert "parts: time not known" in output
    assert "  all       at least" in output


def test_inputs_are_made_outside_of_the_clock() -> None:
    made = []

    def prepare(size: int) -> int:
        time.sleep(0.05)
        made.append(size)
        return size

    seconds = timed(lambda n: None, 2, device=torch.device("cpu"), budget_s=0.01, prepare=prepare)
    assert len(made) > 3
    assert seconds.most < 0.02


def test_a_step_of_refinement_is_timed(
    world: Path,
    teachers: list[dict],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    file = refining(world, tmp_path, teachers, [SHORT, TEDDY])
    speeds = tmp_path / "speeds.json"
    assert main(dry(file, "--save_speeds", str(speeds))) == 0
    names = [n.split()[1] for n in Speeds.load(speeds).speeds if n.startswith("refine ")]
    assert names == ["fadrm", "teddy"]
    output = capsys.readouterr().out
    # 9 images: 9 steps in batches of 3, and 4 steps in one of 9
    assert "  refine    4 batches: about" in output
    assert "81 refine fadrm" in output
    assert "36 refine teddy" in output


def test_what_is_not_at_hand_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("codec: {path: some/where}\nevaluate: {students: []}\n")
    assert main(dry(file, "--like", "cifar10")) == 0
    output = capsys.readouterr().out
    assert "time not known, disk not known" in output
    assert "not timed: some/where is not a folder here" in output
    assert "not timed: images are not at hand, so neither reading nor teachers" in output


def test_a_shortage_of_disk_is_said(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = config(world, tmp_path, evaluate__students=[])
    (tmp_path / "speeds.json").write_text('{"speeds": {}, "latent": [4, 4, 4], "resolution": 8}')
    options = ["--speeds", str(tmp_path / "speeds.json")]
    assert main(dry(file, *options)) == 0
    assert "\nshortage " not in capsys.readouterr().out
    # images of 30 TB each
    assert main(dry(file, *options, "--set", "source.image_size=3000000")) == 0
    output = capsys.readouterr().out.splitlines()[-1]
    assert output.startswith("shortage    ")
    assert output.endswith(" TB are needed")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--like", "cifar10"], "--like is for a plan; add --dry-run"),
        (["--processes", "2"], "--processes is for a plan; add --dry-run"),
        (["--dry-run", "--processes", "0"], "--processes must be at least 1"),
        (["--dry-run", "--speeds", "a", "--save_speeds", "b"], "give one of them"),
        (["--dry-run", "--speeds", "nowhere.json"], "there are no speeds in nowhere.json"),
        (["--speeds", "nowhere.json"], "there are no speeds in nowhere.json"),
    ],
)
def test_flags_that_do_not_fit(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    flags: list[str],
    problem: str,
) -> None:
    assert main(["run", "--config", str(config(world, tmp_path)), "--cpu", *flags]) == 2
    assert problem in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="is not a file of speeds"):
        Speeds.load(tmp_path / "x.json")


# --- the bytes that a run really leaves ---------------------------------------------------------------------------


def test_the_disk_plan_is_what_a_run_leaves(world: Path, tmp_path: Path) -> None:
    from dq.data.load import load_source

    file = config(world, tmp_path, ipc=[3], evaluate__students=[])
    assert main(["run", "--config", str(file), "--cpu"]) == 0
    settings = resolve(build_parser().parse_args(["run", "--config", str(file)]))
    plans = by_stage(stage_plans(settings, load_source(settings.source), latent=(4, 4, 4), denoiser_steps=None))

    def tensors(pattern: str) -> int:
        """Bytes of tensors, without the headers, which are larger here than what they head."""
        from safetensors.torch import load_file

        return sum(t.numel() * t.element_size() for f in tmp_path.glob(pattern) for t in load_file(f).values())

    assert tensors("cache/*/part*") == plans["encode"].bytes
    assert tensors("run/images/*/class*") == plans["generate"].bytes
    assert tensors("run/prototypes/*/class*") == pytest.approx(plans["cluster"].bytes, rel=0.02)


def test_a_run_is_compared_with_its_estimate(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "pipelines"))
    check = importlib.import_module("scale_estimates").check
    events = [("encode", 3.0), ("encode", 9.0), ("features", 1.0), ("cluster", 4.0), ("quantization", None)]
    lines = [{"stage": stage} | ({"seconds": s} if s is not None else {}) for stage, s in events]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    speeds = {name: Speed(seconds, seconds, seconds, 1) for name, seconds in (("read", 0.25), ("encode", 0.75))}
    settings = from_dict(RunConfig, yaml.safe_load(config(world, tmp_path, ipc=[3]).read_text()))
    rows = check(settings, Speeds(speeds, {"latent": [4, 4, 4], "resolution": 8}), tmp_path)
    # 24 images of a second each; without a speed of clustering it has no estimate
    assert [(r["stage"], r["estimated_s"], r["took_s"], r["took_by_estimated"]) for r in rows] == [
        ("encode", 24.0, 12.0, 0.5)
    ]


def test_a_plan_names_the_side_of_students_and_counts_start_and_report(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(world, tmp_path, ipc=[3])
    saved = tmp_path / "speeds.json"
    assert main(["run", "--config", str(file), "--cpu", "--dry-run", "--save_speeds", str(saved)]) == 0
    text = capsys.readouterr().out
    settings = load_config(file)
    assert f"trainings at {settings.image_size} px" in text
    rows = [line.split()[0] for line in text.partition("estimate")[2].splitlines()[1:]]
    assert rows[0] == "start-up"
    assert rows[rows.index("all") - 1] == "report"
    # a file of an earlier version has no such speeds, and its plan no such rows
    facts = json.loads(saved.read_text())
    facts["speeds"] = {k: v for k, v in facts["speeds"].items() if k not in ("start", "figure", "picture")}
    saved.write_text(json.dumps(facts))
    assert main(["run", "--config", str(file), "--cpu", "--dry-run", "--speeds", str(saved)]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.partition("estimate")[2].splitlines()[1:]]
    assert not {"start-up", "report"} & set(rows)


def test_the_report_shows_at_most_what_its_plan_counts() -> None:
    source, changes = like_source("30x20"), {"ipc": [1, 20], "source.image_size": 8}
    settings = apply_settings(RunConfig(), changes)
    plan = report_plan(settings, planned_sets(settings, source), 30)
    methods = len(settings.methods)
    assert plan.each["picture"] == methods * 20 * (1 + 10) + 2 * 20 * 10  # 20 classes, 10 images of each
    assert plan.each["read"] == 2 * 20 * 10
