"""The scripts of `pipelines/` run from end to end on images of eight pixels, and refuse what is not there."""

from __future__ import annotations

import csv
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from forking import Forked
from PIL import Image

from dq.cli.main import main as dq
from dq.core.files import read_json
from dq.distilled.set import DistilledSet

PIPELINES = Path(__file__).parents[2] / "pipelines"
Script = Callable[..., None]
Rows = list[dict[str, str]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Script:
    """Runs a script of `pipelines/` as `python pipelines/NAME.py ARGUMENTS` would, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(PIPELINES))

    def run(name: str, *arguments: object) -> None:
        path = str(PIPELINES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        runpy.run_path(path, run_name="__main__")

    return run


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs `python -m dq.cli VERB` in a fork, which has everything imported; the calls."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "dq.cli"]
        calls.append(command[3:])
        process = Forked(lambda: dq(command[3:]))
        _, err = process.communicate(240)
        sys.stderr.write(err)
        return subprocess.CompletedProcess(command, process.returncode or 0)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def read(path: Path, *, head: str = "") -> Rows:
    """Rows of a CSV file, whose first line is a comment with `head` if that is given."""
    text = path.read_text()
    if head:
        comment, _, text = text.partition("\n")
        assert comment.startswith(head), comment
    return list(csv.DictReader(io.StringIO(text)))


def teacher(world: Path, net: str = "convnet3-bn", name: str = "bn") -> dict[str, Any]:
    return {"net": net, "path": str(world / f"{name}.safetensors"), "mean": [0.5] * 3, "std": [0.5] * 3}


def settings(world: Path, **sections: Any) -> dict[str, Any]:
    """A configuration that draws one image per class by the tiny DiT."""
    return {
        "output_dir": "run",
        "cache_dir": "cache",
        "source": {"path": "nowhere", "image_size": 8},  # --data replaces it
        "codec": {"path": str(world / "vae"), "resolution": 8, "batch_size": 8, "dtype": "float32"},
        "ipc": [1],
        "generate": {
            "mode": "dit",
            "model": str(world / "dit"),
            "num_inference_steps": 3,
            "snr": 0.1,
            "guidance_scale": 2.0,
            "dtype": "float32",
        },
        "teachers": [teacher(world)],
        **sections,
    }


def write(data: dict[str, Any]) -> Path:
    Path("config.yaml").write_text(yaml.safe_dump(data))
    return Path("config.yaml")


SOFT = {"protocol": "fadrm", "dataset": "cifar10", "net": "convnet3w32", "epochs": 2, "tests": 1, "batch_size": 8}
SOFT |= {"dtype": "float32"}
HARD = {"net": "convnet3w32", "labels": "hard", "epochs": 2, "tests": 1, "batch_size": 8, "augment": "dsa"}
HARD |= {"dtype": "float32"}


def test_the_ceiling_of_a_codec(script: Script, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", world / "images", "--codecs", world / "vae", "--teacher", world / "teacher.safetensors"]
    arguments += ["--net", "convnet3", "--size", 8, "--resolution", 8, "--images", 6, "--csv", "new/ceiling.csv"]
    script("codec_ceiling", *arguments)
    head = (
        "# python pipelines/codec_ceiling.py --data images --codecs vae --teacher teacher.safetensors --net convnet3 "
    )
    rows = read(Path("new/ceiling.csv"), head=head)
    assert [(r["codec"], r["dtype"]) for r in rows] == [("none", ""), ("vae", "float32"), ("vae", "bfloat16")]
    assert {(r["resolution"], r["images"]) for r in rows} == {("8", "6")}
    assert rows[0]["psnr_db"] == ""
    assert float(rows[0]["teacher_accuracy"]) == 1  # the world's teacher knows its images
    assert all(0 < float(r["psnr_db"]) < 30 for r in rows[1:])  # of an untrained codec
    assert {round(6 * float(r["teacher_accuracy"]), 2) for r in rows} <= set(range(7))
    assert capsys.readouterr().out.count("'codec': 'vae'") == 2


def test_images_are_distilled_and_a_second_call_continues(
    script: Script, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [world / "images", world / "dit", "--ipc", 2, "--resolution", 8, "--epochs", 1, "--output_dir", "out"]
    script("distill_images", *arguments)
    out = capsys.readouterr().out
    assert out.startswith("DistilledSet(6 images of 8x8 px, 3 classes) in out/dataset\n")
    assert "| random | " in out
    assert "mean ± std over 3 seeds" in out
    distilled = DistilledSet.load("out/dataset", "ipc2-ddoq")
    assert distilled.class_names == ("blue", "green", "red")
    assert distilled.labels.tolist() == [0, 0, 1, 1, 2, 2]
    times = {p: p.stat().st_mtime_ns for p in Path("out/images").rglob("*.safetensors")}
    assert times
    script("distill_images", *arguments)
    assert times == {p: p.stat().st_mtime_ns for p in Path("out/images").rglob("*.safetensors")}
    assert capsys.readouterr().out == out


def test_label_storages_are_compared(script: Script, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (world / "images" / "train").iterdir():
        for file in sorted(folder.iterdir())[:3]:
            Path("set", folder.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, Path("set", folder.name))
    arguments = ["set", "--data", world / "images", "--teacher", f"convnet3={world}/teacher.safetensors"]
    arguments += ["--student", "convnet3w32", "--dataset", "cifar10", "--dtype", "float32"]
    arguments += ["--seeds", 2, "--output_dir", "out", "--csv", "new/labels.csv"]
    with pytest.raises(SystemExit):
        script("label_storage", *arguments, "--epochs", 3)
    assert "--epochs is at least 4" in capsys.readouterr().err
    script("label_storage", *arguments, "--epochs", 8)
    rows = read(Path("new/labels.csv"))
    assert [r["kept"] for r in rows][::5] == ["all logits, 16 bits, views stored", "top 1, 8 bits, views by seed"]
    assert {(r["views"], r["classes"], r["seeds"], r["images"]) for r in rows} == {("72", "3", "2", "9")}
    size = {r["kept"]: int(r["label_bytes"]) for r in rows}
    stored, seeded, quarter, top, half, _ = size.values()
    assert stored > seeded > 2 * quarter
    assert top > half
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(" bytes")[0] for line in printed] == [f"{k}: {v}" for k, v in size.items()]
    trainings = Path("out/eval/trainings.jsonl").read_text()
    assert len(trainings.splitlines()) == 6 * 2
    script("label_storage", *arguments, "--epochs", 8)
    assert Path("out/eval/trainings.jsonl").read_text() == trainings
    assert read(Path("new/labels.csv")) == rows


PRIOR = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "batch_size": 8,
    "ema": 0.5,
    "held_out": 6,
}


@pytest.mark.slow
def test_options_of_denoiser_training_are_compared(script: Script, world: Path, verbs: list[list[str]]) -> None:
    prior = {"output_dir": "prior", "denoiser": PRIOR}
    report = {"per_class": 4}
    file = write(settings(world, prior=prior, prior_report=report, generate={"mode": "dit", "dtype": "float32"}))
    arguments = ["--config", file, "--data", world / "images", "--seconds", 0.1, "--steps", 2, "--work", "work"]
    arguments += ["--calibration", 2, 62, "--csv", "new/tricks.csv", "--variants", "base", "head, internal guidance"]
    script("prior_tricks", *arguments)
    head = "# python pipelines/prior_tricks.py --config config.yaml --data images --seconds 0.1 "
    rows = read(Path("new/tricks.csv"), head=head)
    assert [r["variant"] for r in rows] == ["base", "head, internal guidance"]
    assert [r["changes"] for r in rows] == ["", "intermediate_head=0.5 internal_guidance=1.5"]
    for row in rows:
        assert int(row["steps"]) == pytest.approx(0.1 / float(row["s_per_step"]), rel=0.1, abs=1)
        assert float(row["held_out_loss"]) > 0
        assert {f"{m}_{g}" for m in ("accuracy", "frechet", "coverage") for g in (1, 2)} < row.keys()
        assert all(0 <= float(row[f"accuracy_{g}"]) <= 1 for g in (1, 2))
    assert [c[0] for c in verbs] == [
        "train-denoiser",
        *["train-denoiser", "train-denoiser", "train-denoiser", "prior-report"] * 2,
    ]
    # a second time no step is timed again, and the table stays
    verbs.clear()
    script("prior_tricks", *arguments[:-1])
    assert [c[0] for c in verbs] == ["train-denoiser", "train-denoiser", "prior-report"]
    assert read(Path("new/tricks.csv"), head=head) == rows[:1]
    with pytest.raises(
        SystemExit, match=r"prior_tricks: a step of base takes .* more than --seconds 1e-06; give more"
    ):
        script("prior_tricks", *arguments, "--seconds", 1e-6)


def test_a_step_is_timed_by_two_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PIPELINES))
    from prior_tricks import seconds_per_step

    from dq.core.errors import InputError

    assert seconds_per_step((5, 25), (3.0, 5.0)) == 0.1
    with pytest.raises(InputError, match=r"5 and 25 steps took 3\.10 and 3\.00 s, .*--calibration"):
        seconds_per_step((5, 25), (3.1, 3.0))


def test_numbers_of_sampling_steps_are_compared(script: Script, world: Path, verbs: list[list[str]]) -> None:
    file = write(settings(world))
    arguments = ["--config", file, "--data", world / "images", "--prior", world / "dit", "--net", "convnet3"]
    arguments += ["--teacher", world / "teacher.safetensors", "--steps", 2, 3, "--per_class", 4]
    arguments += ["--work", "work", "--csv", "new/steps.csv"]
    script("sampling_steps", *arguments)
    head = "# python pipelines/sampling_steps.py --config config.yaml --data images --prior dit --net convnet3 "
    rows = read(Path("new/steps.csv"), head=head)
    assert [(r["row"], r["steps"], r["model_calls"]) for r in rows] == [
        ("real train", "", ""),
        ("codec", "", ""),
        ("guidance 1.5", "2", "4"),  # guidance above 1 calls the denoiser twice a step
        ("guidance 1.5", "3", "6"),
    ]
    assert {(r["images"], r["teacher"]) for r in rows} == {("12", "convnet3")}
    assert float(rows[0]["accuracy"]) == 1
    assert all(float(r["frechet"]) > float(rows[0]["frechet"]) for r in rows[1:])
    assert rows[2]["frechet"] != rows[3]["frechet"]
    script("sampling_steps", *arguments)
    assert read(Path("new/steps.csv"), head=head) == rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:whitening .* images")
def test_arms_of_the_ablation_run_and_are_collected(
    script: Script, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = {"seeds": 2, "baselines": ["random"], "students": [HARD]}
    file = write(settings(world, methods={"default": {"weights": "sqrt"}}, evaluate=evaluate))
    # of every kind: other points, weights, representatives and draws, whitened classes of few images, other latents
    only = ["points", "weights", "representative_medoid", "space_whitened-64", "noise", "rivals", "posterior"]
    arguments = ["--config", file, "--data", world / "images", "--only", *only]
    with pytest.raises(SystemExit, match=r"ablation: there is no run/main/eval/trainings.jsonl to collect"):
        script("ablation", *arguments, "--collect", "out")
    script("ablation", *arguments)
    assert capsys.readouterr().out.split() == ["run/main/eval/summary.csv", "run/posterior/eval/summary.csv"]
    script("ablation", *arguments, "--collect", "out")
    rows = read(Path("out/ablation.csv"))
    factors = [r["factor"] for r in rows]
    assert {f: factors.count(f) for f in factors} == {
        "default": 1,
        "points": 3,
        "weights": 2,
        "representative": 1,
        "space": 1,
        "noise": 1,
        "rivals": 7,  # with random real images
        "posterior": 1,
    }
    assert {(r["ipc"], r["seeds"], r["student"], r["labels"]) for r in rows} == {("1", "2", "convnet3w32", "hard")}
    by_arm = {(r["factor"], r["level"]): r for r in rows}
    default, prior = by_arm["default", ""], by_arm["rivals", "prior samples"]
    assert default["difference"] == ""
    difference = float(prior["mean"]) - float(default["mean"])
    assert float(prior["difference"]) == pytest.approx(difference, abs=2e-5)
    assert float(prior["low"]) <= difference + 2e-5
    assert len(Path("out/trainings.jsonl").read_text().splitlines()) == 2 * len(rows)
    assert str(world) not in "".join(f.read_text() for f in Path("out").iterdir())
    assert read_json(Path("out/run.json"))["command"].endswith(f" --only {' '.join(only)}")
    # given again, it trains nothing
    trainings = Path("run/main/eval/trainings.jsonl").read_text()
    script("ablation", *arguments)
    assert Path("run/main/eval/trainings.jsonl").read_text() == trainings


@pytest.mark.slow
def test_refinements_are_labeled_by_several_and_collected(
    script: Script, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"stage": "fadrm", "sizes": [8, 8, 8], "steps": [2, 2, 2], "batch_size": 3, "jitter": 1}
    one |= {"teachers": [teacher(world)], "validation_teachers": [teacher(world, "convnet3", "teacher")]}
    names = {"fadrm": 0.05, "fadrm-plus": 0.1, "teddy": 0.2}
    methods = {"ddoq": {"weights": "sqrt"}}
    methods |= {name: {"weights": "sqrt", "refine": [one | {"lr": lr}]} for name, lr in names.items()}
    file = write(settings(world, methods=methods, evaluate={"seeds": 2, "baselines": [], "students": [SOFT]}))
    arguments = ["--config", file, "--data", world / "images"]
    with pytest.raises(SystemExit, match="refinement: there is no evaluation in run to collect"):
        script("refinement", *arguments, "--collect", "out")
    with pytest.raises(SystemExit, match="refinement: there is no method 'tedy' in the configuration; it has ddoq, "):
        script("refinement", *arguments, "--methods", "tedy")
    script("refinement", *arguments, "--methods", "ddoq", "fadrm", "--evaluations")
    assert capsys.readouterr().out == "run/main/report.html\n"
    assert not Path("run/one").exists()
    evaluations = ["one", "plus", "pool", "hard"]  # larger students see no image of eight pixels
    script("refinement", *arguments, "--evaluations", *evaluations)
    assert capsys.readouterr().out.split()[1:] == [f"run/{name}/eval/summary.csv" for name in evaluations]
    script("refinement", *arguments, "--collect", "out")
    accuracy = read(Path("out/accuracy.csv"))
    assert [(r["set"], r["labels"]) for r in accuracy] == [
        *((s, "one") for s in ("ddoq", "fadrm", "teddy", "random", "patches")),
        *((s, "plus") for s in ("ddoq", "fadrm", "fadrm-plus", "patches")),
        *((s, "pool") for s in ("ddoq", "teddy")),
        *((s, "hard") for s in ("ddoq", "fadrm", "fadrm-plus", "teddy", "random", "patches")),
    ]
    assert {(r["student"], r["ipc"], r["seeds"]) for r in accuracy} == {("convnet3w32", "1", "2")}
    mean = {(r["set"], r["labels"]): float(r["mean"]) for r in accuracy}
    differences = {r["question"]: r for r in read(Path("out/differences.csv"))}
    assert len(differences) == 12
    for question, pair in {
        "FADRM refines DDOQ": (("fadrm", "one"), ("ddoq", "one")),
        "Teddy, both": (("teddy", "pool"), ("ddoq", "one")),
        "FADRM, hard labels": (("fadrm", "hard"), ("ddoq", "hard")),
    }.items():
        assert differences[question]["pairs"] == "2"
        assert float(differences[question]["mean"]) == pytest.approx(mean[pair[0]] - mean[pair[1]], abs=3e-5)
    steps = read(Path("out/refinement.csv"))
    assert [(r["set"], r["stage"]) for r in steps] == [(name, "fadrm") for name in names]
    distances = [float(r["anchor_distance_after"]) for r in steps]
    assert all(float(r["anchor_distance_before"]) == 0 for r in steps)
    assert 0 < distances[0] < distances[1] < distances[2]  # with the rate
    assert Image.open("out/blocks.png").width > 8
    assert len(Path("out/trainings.jsonl").read_text().splitlines()) == 2 * len(accuracy)


@pytest.mark.slow
def test_results_of_a_run_are_collected(script: Script, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frepo = {"stage": "frepo", "steps": 4, "lr": 0.02, "nets": ["frepoconv3w32"], "pool_size": 2, "real_batch": 8}
    frepo |= {"checks": 2, "check_nets": 1, "held_out": 0.2}
    methods = {"ddoq": {"weights": "sqrt"}, "whitened": {"override": {"cluster.space": "whitened"}}}
    methods["frepo"] = {"representative": "medoid", "refine": [frepo]}
    evaluate = {"seeds": 2, "baselines": ["random"], "students": [HARD]}
    data = settings(world, methods=methods, evaluate=evaluate)
    file = write(data)
    assert dq(["run", "--config", str(file), "--data", str(world / "images"), "--cpu"]) == 0
    script("collect_results", "run", "out", "--command", "dq run --config config.yaml")
    assert capsys.readouterr().out.splitlines()[-1] == "out"
    assert Path("out/accuracy.csv").read_bytes() == Path("run/eval/summary.csv").read_bytes()
    assert {r["set"] for r in read(Path("out/accuracy.csv"))} == {"ddoq", "whitened", "frepo", "random"}
    events = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    rows = read(Path("out/quantization.csv"))
    assert [(r["ipc"], r["space"], r["classes"]) for r in rows] == [("1", "latents", "3"), ("1", "whitened", "3")]
    for row in rows:
        values = [e["w2_mass"] for e in events if e["stage"] == "quantization" and e["space"] == row["space"]]
        assert float(row["w2_mass"]) == pytest.approx(sum(values) / 3, abs=1e-4)
    assert len(Path("out/trainings.jsonl").read_text().splitlines()) == 4 * 2
    checks = read(Path("out/checks.csv"))
    assert [(r["set"], r["stage"], r["start"], r["images"], r["steps"]) for r in checks] == [
        ("frepo", "frepo", "drawn from each medoid", "3", "2"),
        ("frepo", "frepo", "drawn from each medoid", "3", "4"),
    ]
    assert all(0 <= float(r["accuracy"]) <= 1 for r in checks)
    facts = read_json(Path("out/run.json"))
    assert facts["command"] == "dq run --config config.yaml"
    assert facts["settings"]["generate"]["model"] == "dit"
    assert str(world) not in "".join(f.read_text() for f in Path("out").iterdir())


@pytest.mark.slow
def test_estimates_are_made_from_speeds_and_compared_with_a_run(
    script: Script, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(settings(world, methods={"ddoq": {}}, evaluate={"students": []}))
    run = ["run", "--config", str(file), "--data", str(world / "images"), "--cpu"]
    assert dq([*run, "--dry-run", "--save_speeds", "speeds.json"]) == 0
    capsys.readouterr()
    shipped = PIPELINES.parent / "results" / "scale"
    before = {f: f.read_bytes() for f in shipped.iterdir()}
    script("scale_estimates", "--config", file, "--speeds", "speeds.json", "--csv", "new/estimates.csv")
    assert capsys.readouterr().out == "new/estimates.csv\n"
    rows = read(Path("new/estimates.csv"))
    cases = [("cifar10", "10"), ("imagenet-1k", "10"), ("imagenet-1k", "50"), ("imagenet-21k", "10")]
    expected = [(*case, processes) for case in cases for processes in ("1", "16", "128")]
    assert list(dict.fromkeys((r["set"], r["ipc"], r["processes"]) for r in rows)) == expected
    units = {(r["set"], r["processes"], r["stage"]): r["units"] for r in rows}
    assert units["cifar10", "1", "encode"].startswith("50000 images in ")
    assert units["cifar10", "1", "generate"] == "100 images"
    seconds = {(r["set"], r["ipc"], r["processes"]): float(r["seconds"]) for r in rows if r["stage"] == "encode"}
    assert seconds["imagenet-1k", "10", "1"] > 20 * seconds["cifar10", "10", "1"]  # 25.6 times as many images
    assert seconds["imagenet-1k", "10", "16"] == pytest.approx(seconds["imagenet-1k", "10", "1"] / 16, rel=0.05)
    arguments = ["--config", file, "--speeds", "speeds.json", "--data", world / "images", "--csv", "new/check.csv"]
    with pytest.raises(SystemExit, match=r"scale_estimates: there is no run/metrics\.jsonl; .* as --run"):
        script("scale_estimates", *arguments, "--run", "run")
    assert dq(run) == 0
    script("scale_estimates", *arguments, "--run", "run")
    events = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    rows = read(Path("new/check.csv"))
    assert {"encode", "cluster", "generate"} <= {r["stage"] for r in rows}
    for row in rows:
        took = sum(e["seconds"] for e in events if e["stage"] == row["stage"] and "seconds" in e)
        assert float(row["took_s"]) == pytest.approx(took, abs=0.06)
        assert row["set"] == "images"
    assert {f: f.read_bytes() for f in shipped.iterdir()} == before


DATA = ["--data", "nowhere"]
REFUSED: dict[str, tuple[str, list[str], str]] = {
    "codec_ceiling, data": ("codec_ceiling", [*DATA, "--codecs", "VAE", "--teacher", "TEACHER"], "no folder nowhere"),
    "codec_ceiling, codec": (
        "codec_ceiling",
        ["--data=IMAGES", "--codecs=VAEs", "--teacher=TEACHER", "--net=convnet3", "--size=8", "--resolution=8"],
        r"no model folder .*vaes \(did you mean .*vae",
    ),
    "codec_ceiling, teacher": (
        "codec_ceiling",
        ["--data=IMAGES", "--codecs=VAE", "--teacher=nowhere", "--net=convnet3", "--size=8", "--resolution=8"],
        "no teacher at nowhere",
    ),
    "distill_images, data": ("distill_images", ["nowhere", "DIT"], "no folder nowhere"),
    "distill_images, model": ("distill_images", ["IMAGES", "DITs"], "no model folder .*dits"),
    "label_storage, set": (
        "label_storage",
        ["nowhere", "--data=IMAGES", "--teacher=a=b"],
        "nowhere is not a distilled",
    ),
    "label_storage, data": ("label_storage", ["nowhere", *DATA, "--teacher=a=b"], "no folder nowhere"),
    "label_storage, teacher": ("label_storage", ["x", *DATA, "--teacher=a"], "--teacher is NET=PATH, .* not 'a'"),
    "sampling_steps, prior": (
        "sampling_steps",
        ["--config=CONFIG", "--data=IMAGES", "--prior=DITs", "--teacher=TEACHER"],
        r"no folder .*dits \(did you mean .*dit.*; .* --prior",
    ),
    "sampling_steps, configuration": (
        "sampling_steps",
        ["--config=nowhere.yaml", "--data=IMAGES", "--prior=DIT", "--teacher=TEACHER"],
        "no configuration file nowhere.yaml",
    ),
    "sampling_steps, teacher": (
        "sampling_steps",
        ["--config=CONFIG", "--data=IMAGES", "--prior=DIT", "--teacher=nowhere", "--net=convnet3"],
        "no teacher at nowhere",
    ),
    "prior_tricks, configuration": ("prior_tricks", ["--config=nowhere.yaml", *DATA], "no configuration file nowhere"),
    "prior_tricks, data": ("prior_tricks", ["--config=CONFIG", *DATA], "no folder nowhere"),
    "prior_tricks, calibration": (
        "prior_tricks",
        ["--config=CONFIG", *DATA, "--calibration", "5", "5"],
        "--calibration needs two rising numbers of steps, not 5 5",
    ),
    "ablation, configuration": ("ablation", ["--config=nowhere.yaml"], "no configuration file nowhere.yaml"),
    "ablation, data": ("ablation", ["--config=CONFIG", *DATA], "no folder nowhere"),
    "ablation, codec": (
        "ablation",
        ["--config=CONFIG", "--data=IMAGES", "--set", "codec.path=nowhere"],
        "no model folder nowhere",
    ),
    "refinement, configuration": ("refinement", ["--config=nowhere.yaml"], "no configuration file nowhere.yaml"),
    "refinement, methods": (
        "refinement",
        ["--config=CONFIG", *DATA],
        "no methods.fadrm-plus with a stage of refine, .*; start from configs/cifar10_refine.yaml",
    ),
    "collect_results": (
        "collect_results",
        ["nowhere", "out", "--command=x"],
        "no folder nowhere; give the output_dir",
    ),
    "collect_results, not evaluated": (
        "collect_results",
        ["IMAGES", "out", "--command=x"],
        "no .*images/eval/summary.csv to collect; evaluate the run first",
    ),
    "scale_estimates, configuration": (
        "scale_estimates",
        ["--config=nowhere.yaml", "--speeds=nowhere.json"],
        "no configuration file nowhere.yaml",
    ),
    "scale_estimates, speeds": (
        "scale_estimates",
        ["--config=CONFIG", "--speeds=nowhere.json"],
        "no speeds in nowhere",
    ),
    "difficulty, data": ("difficulty", DATA, "no folder nowhere"),
    "difficulty, class": (
        "difficulty",
        ["--data=IMAGES", "--classes=gren", "--picture=x.jpg"],
        "no class 'gren' in .*images; it has blue, green, red",
    ),
    "difficulty, picture": (
        "difficulty",
        [*DATA, "--picture=x.jpg"],
        "--picture shows the classes named by --classes",
    ),
    "frepo_anchors": ("frepo_anchors", ["--cifar10=nowhere", "--fashion_mnist=IMAGES"], "no folder nowhere"),
    "continual_learning": ("continual_learning", [*DATA, "--csv=a", "--output_dir=b"], "no folder nowhere"),
    "membership_inference": ("membership_inference", [*DATA, "--csv=a", "--output_dir=b"], "no folder nowhere"),
    "hold_out": ("hold_out", ["nowhere", "out"], r"no train\*.parquet below nowhere"),
    "readme_tables": ("readme_tables", ["nowhere.md"], "no file nowhere.md"),
    "gpu_session": (
        "gpu_session",
        ["--output=CONFIG"],
        "config.yaml cannot be made a folder .*; choose another --output",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_there_is_refused_in_a_sentence(
    case: str, script: Script, verbs: list[list[str]], world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, arguments, message = REFUSED[case]
    config = write(settings(world, methods={"default": {}}, prior={"output_dir": "prior", "denoiser": PRIOR}))
    places = {"IMAGES": world / "images", "VAE": world / "vae", "DIT": world / "dit", "CONFIG": config}
    places["TEACHER"] = world / "teacher.safetensors"
    for word, path in places.items():
        arguments = [a.replace(word, str(path)) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        script(name, *arguments)
    text = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert stop.value.code not in (0, None)
    assert re.search(message, text)
    assert "Traceback" not in text
    assert not Path("out").exists()
