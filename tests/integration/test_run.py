"""Whole runs on a toy set through the command line: results, resume, kills, processes, and faults a user meets."""

from __future__ import annotations

import html
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from models import tiny_kl
from page_check import checked_page
from PIL import Image
from runs import config, full, launch, results

from dq.cli.main import main
from dq.config.reader import from_dict
from dq.config.schema import RunConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One complete, uninterrupted run with a DiT and a teacher."""
    out = tmp_path_factory.mktemp("finished")
    assert main(["run", "--config", str(full(world, out)), "--cpu"]) == 0
    return out


# --- what a run leaves --------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    from datasets import load_dataset

    run = finished / "run"
    for name in ("config.yaml", "provenance.json", "metrics.jsonl", "report.html"):
        assert (run / name).is_file(), name
    for name in ("summary.csv", "comparisons.csv", "trainings.jsonl"):
        assert (run / "eval" / name).is_file(), name
    rows = load_dataset(str(run / "dataset"), "ipc3-ddoq", split="train")
    assert len(rows) == 9
    assert rows.features["label"].names == ["blue", "green", "red"]
    assert "soft_label" in rows.features
    page = checked_page((run / "report.html").read_text())
    headings = ["Accuracy", "Images", "Use", "Quantization", "Time by stage", "Settings", "Provenance"]
    assert [text for level, text in page.headings if level == 2] == headings
    for name, images in zip(("blue", "green", "red"), (7, 8, 9), strict=True):
        assert [page.cells[i + 1] for i, cell in enumerate(page.cells) if cell == ("th", name)].count(
            ("td", str(images))
        ) == len({1, 3}) * 2  # ipc x engines
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for stage in ("encode", "cluster", "generate", "label", "evaluate"):
        assert any(e["stage"] == stage for e in events), stage
    quantized = [e for e in events if e["stage"] == "quantization"]
    assert len(quantized) == 2 * 2 * 3  # ipc x engines x classes
    assert all(e["w2_uniform"] >= e["w2_mass"] - 1e-6 for e in quantized)


def test_real_images_are_the_sources_own(finished: Path, toy_images) -> None:
    from dq.distilled.set import DistilledSet

    s = DistilledSet.load(finished / "run" / "dataset", "ipc3-real")
    real_images = {x.numpy().tobytes() for x in (toy_images["train"][0] * 255).round().to(torch.uint8)}
    assert all(x.numpy().tobytes() in real_images for x in s.images)
    assert s.counts.sum() == 24


def test_summary_has_every_set_student_and_baseline(finished: Path) -> None:
    import csv

    with open(finished / "run" / "eval" / "summary.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    sets = {(r["set"], r["ipc"], r["student"]) for r in rows}
    for student in ("convnet3", "resnet20"):
        for name in ("ddoq", "d4m", "real", "random", "nearest"):
            assert {(name, "1", student), (name, "3", student)} <= sets
        assert ("full", "full", student) in sets
    assert all(r["seeds"] == ("1" if r["set"] == "full" else "2") for r in rows)
    # chosen on the test images the best is the highest; not looked for, it is the last
    assert all(0 <= float(r["last_mean"]) <= float(r["best_mean"]) <= 1 for r in rows)
    assert {(r["student"], r["selected_on"]) for r in rows} == {("convnet3", "test"), ("resnet20", "none")}
    assert all(r["last_mean"] == r["best_mean"] for r in rows if r["selected_on"] == "none")
    # one float16 vector per image
    assert {(r["student"], r["label_bytes"]) for r in rows if r["set"] == "ddoq" and r["ipc"] == "3"} == {
        ("convnet3", "0"),
        ("resnet20", str(9 * 3 * 2)),
    }
    with open(finished / "run" / "eval" / "comparisons.csv", newline="") as f:
        compared = list(csv.DictReader(f))
    result = [(r["set"], r["against"], r["ipc"], r["student"]) for r in compared]
    expected = {(s, "random", i, net) for s, i, net in sets if s not in ("random", "full")}
    methods = (("d4m", "ddoq"), ("d4m", "real"), ("ddoq", "real"))  # in the order of the file
    expected |= {(*pair, i, net) for pair in methods for i in "13" for net in ("convnet3", "resnet20")}
    assert len(result) == len(expected)
    assert set(result) == expected
    assert all(r["pairs"] == "2" for r in compared)


def test_a_record_tells_how_to_do_its_training_again(finished: Path) -> None:
    from dq.config.students import StudentConfig

    records = [json.loads(line) for line in (finished / "run" / "eval" / "trainings.jsonl").read_text().splitlines()]
    # 2 students x (2 ipc x 5 sets x 2 seeds + full)
    assert len(records) == 2 * (2 * 5 * 2 + 1)
    for r in records:
        s = from_dict(StudentConfig, r["config"])
        assert (s.net, s.labels, s.protocol) == (r["student"], r["labels"], r["protocol"])
        assert r["settings"].startswith(f"{s.epochs} epoch")
        assert r["teachers"][0]["digest"]
        assert {"python", "torch"} <= r["software"].keys()
        if s.tests > 1:
            assert [epoch for epoch, _ in r["looks"]] == [1, 2]
            assert r["best"] == max(a for _, a in r["looks"])
    by_student = {n: {r["config"]["epochs"] for r in records if r["student"] == n} for n in ("convnet3", "resnet20")}
    assert by_student == {"convnet3": {2}, "resnet20": {1}}


def test_validation_images_serve_no_baseline(world: Path, tmp_path: Path) -> None:
    import csv

    file = config(world, tmp_path, evaluate__seeds=1)
    assert main(["run", "--config", str(file), "--cpu", "--ipc", "1"]) == 0
    with open(tmp_path / "run" / "eval" / "summary.csv", newline="") as f:
        rows = {r["set"]: r for r in csv.DictReader(f)}
    assert {r["selected_on"] for r in rows.values()} == {"validation"}
    assert rows["full"]["images"] == "21"  # a fifth of 9, 8 and 7 images at most is set aside


def test_the_same_command_again_does_no_unit_again(finished: Path, world: Path, capsys: pytest.CaptureFixture) -> None:
    stamps = {f: f.stat().st_mtime_ns for f in finished.rglob("*.safetensors")}
    stamps |= {f: f.stat().st_mtime_ns for f in finished.glob("run/eval/units/*.json")}
    before = (finished / "run" / "eval" / "summary.csv").read_text()
    assert main(["run", "--config", str(finished / "config.yaml"), "--cpu"]) == 0
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps
    assert (finished / "run" / "eval" / "summary.csv").read_text() == before
    assert "| ddoq |" in capsys.readouterr().out


def test_stages_one_by_one_equal_the_whole_run(world: Path, finished: Path, tmp_path: Path) -> None:
    file = full(world, tmp_path)
    for verb in ("encode", "cluster", "generate", "label"):
        assert main([verb, "--config", str(file), "--cpu"]) == 0
    # the whole run has evaluated too, and its baselines need features
    assert results(tmp_path) == {k: v for k, v in results(finished).items() if "features-" not in k}


def test_another_generation_batch_gives_the_same_images(world: Path, finished: Path, tmp_path: Path) -> None:
    from dq.distilled.set import DistilledSet

    assert main(["encode", "--config", str(full(world, tmp_path)), "--cpu"]) == 0
    for verb in ("cluster", "generate"):
        assert main([verb, "--config", str(tmp_path / "config.yaml"), "--cpu", "--set", "generate.batch_size=2"]) == 0
    for name in ("ipc3-ddoq", "ipc1-d4m"):
        a = DistilledSet.load(tmp_path / "run" / "dataset", name).images.int()
        b = DistilledSet.load(finished / "run" / "dataset", name).images.int()
        assert (a - b).abs().max() <= 1


def test_more_ipc_and_students_may_be_added_later(world: Path, tmp_path: Path) -> None:
    file = config(world, tmp_path)
    assert main(["run", "--config", str(file), "--cpu", "--ipc", "1", "--set", "evaluate.seeds=1"]) == 0
    first = results(tmp_path)
    assert main(["run", "--config", str(file), "--cpu", "--ipc", "1,2", "--set", "evaluate.seeds=1"]) == 0
    after = results(tmp_path)
    assert first.items() <= after.items()
    assert len(after) > len(first)


# --- kills and processes ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.multi_process
def test_killed_and_restarted_equals_uninterrupted(world: Path, finished: Path, tmp_path: Path) -> None:
    file = full(world, tmp_path)
    watched = ["cache/*/part-*.safetensors", "run/prototypes/*/class-*", "run/images/*/class-*", "run/eval/units/*"]
    for pattern in watched:
        process = launch(file)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(pattern)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert list(tmp_path.glob(pattern)), pattern
    process = launch(file)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-2000:]
    assert results(tmp_path) == results(finished)
    summary = "run/eval/summary.csv"
    before_seconds = [line.split(",")[:12] for line in (tmp_path / summary).read_text().splitlines()]
    assert before_seconds == [line.split(",")[:12] for line in (finished / summary).read_text().splitlines()]
    assert before_seconds[0][-1] == "selected_on"
    assert not list(tmp_path.rglob("*.checkpoint.safetensors"))


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(("processes", "evaluated"), [(2, True), (3, False)])
def test_several_processes_give_the_bytes_of_one(
    world: Path, finished: Path, tmp_path: Path, processes: int, evaluated: bool
) -> None:
    more = {} if evaluated else {"evaluate__students": []}
    process = launch(full(world, tmp_path, **more), processes=processes)
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors[-3000:]
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["processes"] == processes
    # without an evaluation nothing needs features
    assert results(tmp_path) == {k: v for k, v in results(finished).items() if evaluated or "features-" not in k}


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_give_the_bytes_of_one_in_every_space(world: Path, tmp_path: Path) -> None:
    spaces = ("latents", "pca", "whitened", "features", "joint")
    methods = {s: {"override": {"cluster": {"space": s, "dims": 3}}} for s in spaces}
    teacher = {"path": str(world / "teacher.safetensors"), "net": "convnet3", "mean": [0.5] * 3, "std": [0.5] * 3}
    settings = {"methods": methods, "teachers": [teacher], "evaluate__students": [], "ipc": [2]}
    one, two = tmp_path / "one", tmp_path / "two"
    process = launch(config(world, two, **settings), processes=2)
    assert main(["run", "--config", str(config(world, one, **settings)), "--cpu"]) == 0
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors[-3000:]
    assert json.loads((two / "run" / "provenance.json").read_text())["processes"] == 2
    assert len(list(one.glob("cache/features-*/part-*"))) == 3
    assert results(two) == results(one)
    assert "in the space 'features'" in html.unescape((one / "run" / "report.html").read_text())


@pytest.mark.multi_process
def test_ctrl_c_says_how_to_go_on(world: Path, tmp_path: Path) -> None:
    process = launch(full(world, tmp_path))
    deadline = time.monotonic() + 120
    # the first sign of a run, so that a busy machine, which wakes this loop late, still finds it running
    while not (tmp_path / "run" / "config.yaml").is_file() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; give the same command again to continue" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("*.tmp"))


# --- faults: exit code, one sentence, nothing half-written ---------------------------------------------------------


def fails(args: list[str], capsys: pytest.CaptureFixture, *, code: int = 2) -> str:
    capsys.readouterr()
    assert main([*args, "--cpu"]) == code
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dq ")]
    assert len(message) == 1
    return message[0]


def test_misspelt_key(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = config(world, tmp_path)
    message = fails(["run", "--config", str(file), "--set", "cluster.engin=torch"], capsys)
    assert "unknown setting 'cluster.engin'; did you mean 'cluster.engine'?" in message
    assert not (tmp_path / "run").exists()


def test_missing_data_and_missing_split(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = config(world, tmp_path)
    assert "/nowhere is not a folder" in fails(["run", "--config", str(file), "--data", "/nowhere"], capsys)
    message = fails(["run", "--config", str(file), "--data", str(world / "images" / "train")], capsys)
    assert "has no test split" in message


def test_class_that_the_generator_lacks(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "set" / "train").mkdir(parents=True)
    for i, name in enumerate(("a", "b", "c", "d")):
        (tmp_path / "set" / "train" / name).mkdir()
        for j in range(3):
            Image.new("RGB", (8, 8), (60 * i, j, 0)).save(tmp_path / "set" / "train" / name / f"{j}.png")
    file = full(world, tmp_path)
    for verb in ("encode", "generate"):
        command = [verb, "--config", str(file), "--data", str(tmp_path / "set"), "--ipc", "1"]
        message = fails([*command, "--set", "teachers=[]"], capsys)
        assert "the generator (3 classes) lacks class 'a'; map it with generate.class_map" in message
    assert not (tmp_path / "cache").exists()


def test_codec_that_does_not_fit_the_denoiser(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_kl(latent_channels=3).save_pretrained(tmp_path / "three")
    file = full(world, tmp_path)
    message = fails(["run", "--config", str(file), "--set", f"codec.path={tmp_path / 'three'}"], capsys)
    assert "the codec has 3 latent channels but the denoiser takes 4" in message


def test_one_image_in_a_class_and_fewer_than_ipc(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    from dq.distilled.set import DistilledSet

    for name, n in (("a", 1), ("b", 4)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for j in range(n):
            Image.new("RGB", (8, 8), (50 * j, 90, 10 * n)).save(tmp_path / "set" / name / f"{j}.png")
    file = config(world, tmp_path)
    for verb in ("encode", "cluster", "generate"):
        assert main([verb, "--config", str(file), "--cpu", "--data", str(tmp_path / "set")]) == 0
    assert "class 0 'a' has only 1 distinct points to offer for ipc=3; it gets 1 prototype" in caplog.text
    s = DistilledSet.load(tmp_path / "run" / "dataset", "ipc3-ddoq")
    assert torch.bincount(s.labels).tolist() == [1, 3]
    strict = ["--config", str(config(world, tmp_path / "x")), "--data", str(tmp_path / "set")]
    strict += ["--set", "cluster.on_small=raise"]
    for verb in ("encode", "cluster"):
        message = fails([verb, *strict], capsys)
        assert "class 0 'a' has 1 image but ipc=3" in message


def test_unreadable_image(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for j in range(3):
        (tmp_path / "set" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (50 * j, 90, 1)).save(tmp_path / "set" / "a" / f"{j}.png")
    (tmp_path / "set" / "a" / "1.png").write_bytes(b"\x89PNG broken")
    file = config(world, tmp_path)
    message = fails(["encode", "--config", str(file), "--data", str(tmp_path / "set")], capsys)
    assert "a/1.png cannot be read" in message
    assert "source.on_bad_image=skip" in message
    # as advised, in the same folder, with the same cache
    skip = ["--data", str(tmp_path / "set"), "--set", "source.on_bad_image=skip"]
    assert main(["encode", "--config", str(file), "--cpu", *skip]) == 0
    assert "1.png" in (tmp_path / "run" / "bad_images.txt").read_text()
    assert len(list((tmp_path / "cache").glob("latents-*"))) == 1
    # images that were left out are not passed by under the other setting
    assert "a/1.png cannot be read" in fails(
        ["encode", "--config", str(file), "--data", str(tmp_path / "set")], capsys
    )


def test_a_refused_attempt_does_not_bind_its_folder(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = config(world, tmp_path, evaluate__students=[], ipc=[1])
    assert "9" in fails(["encode", "--config", str(file), "--set", "codec.resolution=9"], capsys)
    assert main(["encode", "--config", str(file), "--cpu"]) == 0
    # now something was made
    assert "other settings (codec.resolution: 8 -> 16)" in fails(
        ["encode", "--config", str(file), "--set", "codec.resolution=16"], capsys
    )


def test_sets_are_scored_where_a_run_was_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = ["--data", str(world / "images"), "--output_dir", str(tmp_path / "run"), "--cpu"]
    fails(["encode", "--config", str(config(world, tmp_path)), "--set", "codec.resolution=9"], capsys)
    student = ["--set", "evaluate.students=[{net: convnet3, epochs: 1, augment: none}]", "source.image_size=8"]
    given = ["--distilled", str(world / "images" / "test"), "--seeds", "1", "--baselines", "random"]
    given += ["--cache_dir", str(tmp_path / "cache")]
    assert main(["evaluate", *data, *given, *student]) == 0, capsys.readouterr().err


def test_nan_latents(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    codec = tiny_kl()
    codec.encoder.conv_out.weight.data.fill_(float("nan"))
    codec.save_pretrained(tmp_path / "broken")
    file = config(world, tmp_path, codec__path=str(tmp_path / "broken"))
    message = fails(["run", "--config", str(file)], capsys, code=1)
    assert "the codec gave NaN or infinite latents in float32; use --set codec.dtype=bfloat16" in message
    assert not list(tmp_path.glob("cache/*/part-*"))


def test_folder_of_another_run(world: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    message = fails(["run", "--config", str(finished / "config.yaml"), "--seed", "9"], capsys)
    assert "belongs to a run with other settings (seed: 0 -> 9); choose another --output_dir" in message
    message = fails(["run", "--config", str(finished / "config.yaml"), "--set", "cluster.n_init=2"], capsys)
    assert "cluster.n_init: 1 -> 2" in message
    message = fails(["run", "--config", str(finished / "config.yaml"), "--data", "sklearn:digits"], capsys)
    assert "was made from other data" in message
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    message = fails(["run", "--config", str(config(world, tmp_path)), "--output_dir", str(tmp_path / "mine")], capsys)
    assert "is not empty and not a run of dq" in message
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_whose_folder_it_is_does_not_hang_on_one_file(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import shutil

    file = config(world, tmp_path, evaluate__students=[], ipc=[1])
    base = ["run", "--config", str(file)]
    assert main([*base, "--cpu"]) == 0
    config_file, record = tmp_path / "run" / "config.yaml", tmp_path / "run" / "provenance.json"
    text = config_file.read_text()
    config_file.write_text(text.replace("seed: 0", "seed: 7"))
    message = fails(["run", "--config", str(config_file)], capsys)
    assert "belongs to a run with other settings (seed: 0 -> 7)" in message
    for damaged in ("", "{[", None):
        config_file.unlink()
        if damaged is not None:
            config_file.write_text(damaged)
        assert "seed: 0 -> 7" in fails([*base, "--seed", "7"], capsys)
        assert main([*base, "--cpu"]) == 0  # and config.yaml is there again
        assert config_file.read_text() == text
    shutil.copytree(world / "images", tmp_path / "set")
    next((tmp_path / "set" / "train" / "red").iterdir()).unlink()
    other = ["--set", f"source.path={tmp_path / 'set'}"]
    assert "was made from other data" in fails([*base, *other], capsys)
    record.write_bytes(record.read_bytes()[:-40])
    assert "seed: 0 -> 7" in fails([*base, "--seed", "7"], capsys)  # config.yaml tells as well
    assert main([*base, "--cpu"]) == 0
    assert json.loads(record.read_text())["seed"] == 0


def test_what_belongs_to_a_set_is_mended_with_it(world: Path, tmp_path: Path) -> None:
    file = config(world, tmp_path, evaluate__seeds=1, ipc=[1])
    assert main(["run", "--config", str(file), "--cpu"]) == 0
    folder = tmp_path / "run" / "dataset" / "ipc1-real"
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert {"evaluation.json", "grid.png"} <= before.keys()
    for name in ("evaluation.json", "grid.png"):
        (folder / name).write_bytes(before[name].replace(b"e", b"f", 1))
        assert main(["run", "--config", str(file), "--cpu"]) == 0
        assert (folder / name).read_bytes() == before[name]


def test_stage_before_its_time(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = config(world, tmp_path)
    assert "run `dq encode` first" in fails(["cluster", "--config", str(file)], capsys)
    assert "run `dq encode` first" in fails(["generate", "--config", str(file)], capsys)
    assert "run `dq encode` first" in fails(["label", "--config", str(file)], capsys)
    assert "has no set" in fails(["evaluate", "--config", str(file)], capsys)
    assert main(["report", "--config", str(file), "--cpu"]) == 0  # of what there is
    assert "No set is made yet" in (tmp_path / "run" / "report.html").read_text()


def test_images_of_other_settings_are_not_refined_or_labeled(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = ["--config", str(config(world, tmp_path, evaluate__students=[], ipc=[1, 2]))]
    for verb in ("encode", "cluster"):
        assert main([verb, *file, "--cpu"]) == 0
    message = fails(["label", *file], capsys)
    assert "has no images yet; run `dq generate` first" in message
    assert main(["generate", *file, "--ipc", "1", "--cpu"]) == 0
    message = fails(["label", *file], capsys)
    assert "has no images of method 'd4m' at ipc 2 yet; run `dq generate` first" in message
    assert main(["generate", *file, "--ipc", "2", "--cpu"]) == 0
    assert main(["label", *file, "--cpu"]) == 0  # those of the first call are still known
    medoids = ["--set", "methods.ddoq.representative=medoid"]
    for verb in ("refine", "label"):
        message = fails([verb, *file, *medoids], capsys)
        assert "has no images of method 'ddoq' at ipc 1 for the present settings; run `dq generate` first" in message
    assert main(["generate", *file, *medoids, "--cpu"]) == 0
    assert main(["label", *file, *medoids, "--cpu"]) == 0


def test_teacher_of_another_class_order_is_stopped(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(world / "teacher.safetensors")
    for key in ("classifier.weight", "classifier.bias"):
        state[key] = state[key].roll(1, 0).contiguous()
    save_file(state, tmp_path / "rolled.safetensors")
    file = full(world, tmp_path, tmp_path / "rolled.safetensors")
    message = fails(["run", "--config", str(file)], capsys)
    assert "near the chance of 33.3%: its class order or input normalization is probably not that of" in message
    # output of the rolled teacher for blue, green and red
    assert message.endswith("with class order [1, 2, 0] it would get 100.0%; set teachers.N.classes=[1, 2, 0]")
    classes_set = ["--set", "teachers.0.classes=[1, 2, 0]", "--output_dir", str(tmp_path / "told")]
    assert (
        main(["run", "--config", str(file), "--cpu", "--ipc", "1", "--set", "evaluate.students=[]", *classes_set]) == 0
    )
    message = fails(
        ["run", "--config", str(file), "--set", "teachers.0.net=resnet20", "--output_dir", str(tmp_path / "b")], capsys
    )
    assert "are not a resnet20 for 3 classes" in message


def test_another_teacher_labels_anew(world: Path, tmp_path: Path) -> None:
    from dq.distilled.set import DistilledSet

    file = full(world, tmp_path)
    for verb in ("encode", "cluster", "generate", "label"):
        assert main([verb, "--config", str(file), "--cpu"]) == 0
    first = DistilledSet.load(tmp_path / "run" / "dataset", "ipc3-ddoq")
    from safetensors.torch import load_file, save_file

    state = load_file(world / "teacher.safetensors")
    state["classifier.bias"] = state["classifier.bias"] + 0.01
    save_file(state, tmp_path / "other.safetensors")
    other = ["--set", f"teachers.0.path={tmp_path / 'other.safetensors'}"]
    assert main(["label", "--config", str(file), "--cpu", *other]) == 0
    second = DistilledSet.load(tmp_path / "run" / "dataset", "ipc3-ddoq")
    assert second.provenance["labels"]["digest"] != first.provenance["labels"]["digest"]
    assert not torch.equal(second.soft_labels, first.soft_labels)
    assert main(["label", "--config", str(file), "--cpu"]) == 0
    assert torch.equal(DistilledSet.load(tmp_path / "run" / "dataset", "ipc3-ddoq").soft_labels, first.soft_labels)


def test_latents_of_another_codec_are_not_decoded(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_kl(seed=7).save_pretrained(tmp_path / "other")
    file = config(world, tmp_path)
    for verb in ("encode", "cluster"):
        assert main([verb, "--config", str(file), "--cpu"]) == 0
    message = fails(["generate", "--config", str(file), "--set", f"codec.path={tmp_path / 'other'}"], capsys)
    assert "were made by another codec" in message


def test_a_set_of_other_settings_is_not_evaluated(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = config(world, tmp_path, evaluate__seeds=1)
    assert main(["run", "--config", str(file), "--cpu", "--ipc", "1"]) == 0
    mass = ["--config", str(file), "--ipc", "1", "--set", "methods.ddoq.weights=mass"]
    message = fails(["evaluate", *mass], capsys)
    assert "the set ipc1-ddoq was made with method.weights=sqrt, not mass; run `dq label`" in message
    assert main(["label", *mass, "--cpu"]) == 0
    assert main(["evaluate", *mass, "--cpu"]) == 0


def test_names_and_numbers_that_cannot_be(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = ["run", "--config", str(config(world, tmp_path))]
    assert "ipc=[2, 2] names a number twice" in fails([*file, "--ipc", "2,2"], capsys)
    assert "'random' is that of a baseline" in fails([*file, "--set", "methods.random.weights=mass"], capsys)
    message = fails([*file, "--set", "methods={../../out: {weights: mass}}"], capsys)
    assert "'../../out' must be letters, digits" in message
    assert not (tmp_path / "run").exists()
    message = fails([*file, "--set", "methods.x.override={generate.model: other}"], capsys)
    assert "cannot change generate.model: one model draws all methods of a run" in message


def test_a_nested_override_changes_one_value() -> None:
    from dq.config.overrides import apply_settings
    from dq.run.folder import Run

    base = apply_settings(RunConfig(), ["cluster.n_iter=7", "methods.x.override.cluster.engine=faiss"])
    run = Run(base, None, None, Path())  # type: ignore[arg-type]
    assert (run.resolved("x")[1].engine, run.resolved("x")[1].n_iter) == ("faiss", 7)
    assert run.resolved("ddoq")[1].engine == "auto"


def test_every_knob_of_the_generator_is_part_of_the_images_identity(tmp_path: Path, toy_source, accelerator) -> None:
    from dq.diffusion.latents import LatentCache
    from dq.run.folder import Run
    from dq.run.stages.generate import image_folder

    knobs = [
        {"scheduler": "UniPCMultistepScheduler"},
        {"guidance_interval": [0.1, 5]},
        {"noise": "inversion"},
        {"rescale": "norm"},
        {"prototype_guidance": 0.1},
        {"prototype_guidance_stop": 0.6},
        {"snr": 0.2},
        {"images_per_prototype": 2},
        {"measure_guidance": 0.1},
        {"measure_interval": [0.1, 0.5]},
        {"measure_entropy": 0.2},
        {"measure_iterations": 6},
        {"measure_weights": "mass"},
        {"repulsion": 0.1},
        {"repulsion_interval": [0.1, 0.5]},
        {"repulsion_ridge": 0.2},
    ]
    methods = {"plain": {}, "same": {"override": {"generate.batch_size": 3}}}
    methods |= {f"m{i}": {"override": {f"generate.{k}": v for k, v in knob.items()}} for i, knob in enumerate(knobs)}
    run = Run(from_dict(RunConfig, {"methods": methods}), toy_source, accelerator, tmp_path)
    cache = LatentCache(tmp_path, toy_source.class_names, "key", 24, (4, 4, 4))
    folders = {name: image_folder(run, cache, 1, name, "digest") for name in methods}
    assert folders["plain"] == folders["same"]  # how many at a time changes nothing
    assert len(set(folders.values())) == len(knobs) + 1


def test_generation_with_the_knobs(world: Path, tmp_path: Path) -> None:
    knobs = {
        "guidance_interval": [0.2, 3.0],
        "noise": "inversion",
        "prototype_guidance": 0.2,
        "scheduler": "EulerDiscreteScheduler",
    }
    file = config(
        world,
        tmp_path,
        ipc=[2],
        methods={"plain": {}, "knobs": {"override": {"generate": knobs}}},
        generate__mode="dit",
        generate__model=str(world / "dit"),
        generate__num_inference_steps=4,
        evaluate__students=[],
    )
    assert main(["run", "--config", str(file), "--cpu"]) == 0
    index = json.loads((tmp_path / "run/images/index.json").read_text())
    assert index["2/plain"] != index["2/knobs"]
    assert len(list((tmp_path / "run/images" / index["2/knobs"]["folder"]).glob("class-*.safetensors"))) == 3


def test_unreadable_test_images_are_not_dropped_in_silence(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    shutil.copytree(world / "images", tmp_path / "set")
    broken = next((tmp_path / "set" / "test" / "red").iterdir())
    broken.write_bytes(b"garbage")
    args = ["--config", str(config(world, tmp_path, evaluate__seeds=1)), "--data", str(tmp_path / "set"), "--ipc", "1"]
    assert f"test/red/{broken.name} cannot be read" in fails(["run", *args], capsys)
    made = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*/*/*.safetensors")}
    assert main(["run", *args, "--set", "source.on_bad_image=skip", "--cpu"]) == 0
    assert {f: f.stat().st_mtime_ns for f in made} == made
    assert "1 of 12 images of split 'test' are left out" in caplog.text


def test_faults_of_the_label_and_evaluate_stages_are_found_before_the_first(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = ["run", "--config", str(full(world, tmp_path))]
    assert "there is no teacher at /nope" in fails([*file, "--set", "teachers.0.path=/nope"], capsys)
    assert "no network is called 'resnt20'" in fails([*file, "--set", "evaluate.students.1.net=resnt20"], capsys)
    message = fails([*file, "--set", "evaluate.students.1.epoch=3"], capsys)
    assert "unknown setting 'evaluate.students.1.epoch'; did you mean 'evaluate.students.1.epochs'?" in message
    message = fails([*file, "--set", "evaluate.students.1.epochs={1: 5}"], capsys)
    assert "evaluate.students.1.epochs has entries for 1 but not for '3'" in message
    assert "evaluate.students.0.protocol: unknown protocol 'clasic'" in fails(
        [*file, "--set", "evaluate.students.0.protocol=clasic"], capsys
    )
    assert "need a teacher" in fails([*file, "--set", "teachers=[]"], capsys)
    hard = ["--set", "teachers=[]", "--set", "evaluate.students=[{epochs: 1}]"]
    message = fails([*file, *hard, "--set", "evaluate.baselines=[patches]"], capsys)
    assert "'patches' needs a teacher" in message
    assert not (tmp_path / "cache").exists()


def test_the_folder_of_a_run_is_not_that_of_an_evaluation(
    world: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {f: f.read_bytes() for f in (finished / "run" / "eval").glob("*.*")}
    more = ["--data", str(world / "images"), "--cache_dir", str(tmp_path), "--output_dir", str(finished / "run")]
    message = fails(["evaluate", "--distilled", str(finished / "run" / "dataset" / "ipc1-real"), *more], capsys)
    assert "is a run, whose results would be replaced; choose another --output_dir" in message
    assert {f: f.read_bytes() for f in (finished / "run" / "eval").glob("*.*")} == before


def test_damaged_files_are_named(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = config(world, tmp_path, evaluate__students=[])
    assert main(["run", "--config", str(file), "--cpu", "--ipc", "1"]) == 0
    pointer = tmp_path / "run" / "latents.json"
    pointer.write_text("{")
    assert "latents.json cannot be read" in fails(["cluster", "--config", str(file), "--ipc", "1"], capsys, code=1)
    taken = tmp_path / "file"
    taken.write_text("")
    message = fails(["run", "--config", str(file), "--output_dir", str(taken / "below")], capsys)
    assert "below lies under " in message
    assert "which is not a folder; choose another" in message


def test_full_disk(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    file = config(world, tmp_path)
    write = Path.write_bytes

    def full_disk(self: Path, data: bytes) -> int:
        if "part-000001" in self.name:
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    message = fails(["run", "--config", str(file)], capsys, code=1)
    assert "the disk is full while writing" in message
    assert "give the same command again, finished work is kept" in message
    assert [f.name for f in tmp_path.glob("cache/*/*part*")] == ["part-000000.safetensors"]
    monkeypatch.undo()
    assert main(["run", "--config", str(file), "--cpu"]) == 0


def test_dry_run_prints_the_plan_and_writes_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["run", "--config", str(full(world, tmp_path)), "--cpu", "--dry-run"]) == 0
    output = capsys.readouterr().out
    for part in ("24 train images, 3 classes of 7 to 9", "in 3 units", "9 prototypes", "denoiser calls", "trainings"):
        assert part in output
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_usage(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dq 0.")
    with pytest.raises(SystemExit):
        main(["destil"])
