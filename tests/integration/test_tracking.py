"""Trackers: what a run tells TensorBoard, that nothing is imported without one, and that a broken one ends no run."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer
from runs import config, launch, results

from dq.cli.main import main
from dq.config.overrides import apply_settings
from dq.config.reader import to_dict
from dq.config.schema import RunConfig
from dq.core import progress as stage_progress
from dq.core.errors import InputError
from dq.core.progress import StageTimer, duration, progress, unit_done
from dq.core.trackers import check_trackers, end_trackers, flat_settings, report, start_trackers
from dq.run.stages.cluster import distortion_numbers

ROOT = Path(__file__).parents[2]
MAIN = """
import sys
from dq.cli.main import main
assert main(sys.argv[1:]) == 0
"""

Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Runs code in a process that has imported nothing of what reads settings of progress bars, nor a tracker."""
    env = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"} | {"PYTHONPATH": str(ROOT)}
    server = ForkServer(env, "torch", "scipy", "sklearn.cluster", "matplotlib.pyplot")
    folder = tmp_path_factory.mktemp("started")
    yield lambda code, *arguments: server.run(code, *arguments, cwd=folder, environment=env)
    server.close()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of all scalars in the event files below a folder, hyper-parameters aside."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged: dict[str, list[tuple[int, float]]] = {}
    for directory in sorted({f.parent for f in folder.rglob("events.*")}):
        events = EventAccumulator(str(directory)).Reload()
        for tag in events.Tags()["scalars"]:
            logged.setdefault(tag, []).extend((e.step, e.value) for e in events.Scalars(tag))
    return logged


@pytest.fixture(scope="module")
def tracked(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tracked")
    file = config(world, out, source__path=str(world / "images"))
    assert main(["run", "--config", str(file), "--cpu", "--report_to", "tensorboard"]) == 0
    return out


def test_tensorboard_has_the_numbers_of_a_run(tracked: Path) -> None:
    import csv

    logged = scalars(tracked / "run" / "logs")
    lines = [json.loads(line) for line in (tracked / "run" / "metrics.jsonl").read_text().splitlines()]
    stages = {r["stage"]: r for r in lines if "seconds" in r}
    for stage in ("encode", "cluster", "generate", "evaluate"):
        assert logged[f"{stage}/seconds"][0][1] == pytest.approx(stages[stage]["seconds"])
    assert logged["encode/images"] == [(0, 24.0)]
    assert logged["encode/images_per_s"][0][1] == pytest.approx(24 / stages["encode"]["seconds"], rel=1e-5)
    # distortion over classes
    rows = [r for r in lines if r["stage"] == "quantization" and r["ipc"] == 3 and r["engine"] == "torch"]
    assert len(rows) == 3
    mean = sum(r["distortion"] for r in rows) / 3
    assert logged["cluster/ipc3-torch-latents/distortion_mean"][0][1] == pytest.approx(mean, rel=1e-5)
    least = logged["cluster/ipc3-torch-latents/w2_mass_min"][0][1]
    assert least == pytest.approx(min(r["w2_mass"] for r in rows), rel=1e-5)
    # every training
    trainings = [json.loads(t) for t in (tracked / "run" / "eval" / "trainings.jsonl").read_text().splitlines()]
    for t in trainings:
        name = f"evaluate/{t['set']}-ipc{t['ipc']}-{t['student']}-{t['labels']}-recipe{t['recipe']}"
        assert logged[f"{name}-seed{t['seed']}/last"] == [(0, pytest.approx(t["last"]))]
    assert sum(len(v) for k, v in logged.items() if k.endswith("/last")) == len(trainings)
    with open(tracked / "run" / "eval" / "summary.csv", newline="") as f:
        assert len(list(csv.DictReader(f))) > 0


def test_tensorboard_has_the_settings(tracked: Path) -> None:
    import yaml

    files = list((tracked / "run" / "logs").rglob("hparams.yml"))
    assert len(files) == 1
    settings = yaml.safe_load(files[0].read_text())
    assert settings["codec.resolution"] == 8
    assert settings["methods.d4m.override.cluster.engine"] == "minibatch"


def test_trackers_write_nowhere_else(tracked: Path) -> None:
    events = list(tracked.rglob("events.*"))
    assert events
    assert all((tracked / "run" / "logs") in e.parents for e in events)


def test_a_run_continues_with_or_without_a_tracker(tracked: Path, tmp_path: Path) -> None:
    shutil.copytree(tracked / "run", tmp_path / "run")  # others read what the first run left
    out = ["--output_dir", str(tmp_path / "run")]
    before = len(list(tmp_path.rglob("events.*")))
    file = str(tracked / "config.yaml")
    assert main(["evaluate", "--config", file, "--cpu", *out]) == 0
    assert len(list(tmp_path.rglob("events.*"))) == before
    assert main(["evaluate", "--config", file, "--cpu", *out, "--set", "report_to=[tensorboard]"]) == 0
    assert len(list(tmp_path.rglob("events.*"))) > before


@pytest.mark.slow
def test_nothing_is_imported_without_a_tracker(start: Start, world: Path, tmp_path: Path) -> None:
    file = config(world, tmp_path, evaluate__students=[])
    code = (
        MAIN + "print([m for m in ('tensorboard', 'wandb', 'trackio', 'torch.utils.tensorboard') if m in sys.modules])"
    )
    done = start(code, "run", "--config", str(file), "--cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.slow
@pytest.mark.multi_process
def test_one_process_tells(world: Path, tmp_path: Path) -> None:
    file = config(world, tmp_path)
    done = launch(file, "run", "--report_to", "tensorboard", processes=2)
    _, errors = done.communicate(timeout=240)
    assert done.returncode == 0, errors
    logged = scalars(tmp_path / "run" / "logs")
    assert len(logged["encode/seconds"]) == 1
    # trainings of both processes are told
    assert sum(len(v) for k, v in logged.items() if k.endswith("/last")) == 2 * 5 * 2 + 1


def test_losses_of_a_prior_are_told(toy_source, accelerator, tmp_path: Path) -> None:
    from small_prior import CODEC, prior_in

    from dq.diffusion.prior.train_codec import train_codec

    prior = prior_in(tmp_path / "prior")
    settings = apply_settings(RunConfig(), {"report_to": ["tensorboard"]})
    start_trackers(accelerator, settings.report_to, to_dict(settings), tmp_path / "prior")
    try:
        train_codec(toy_source, CODEC, prior, accelerator=accelerator)
    finally:
        end_trackers(accelerator)
    logged = scalars(tmp_path / "prior" / "logs")
    lines = [json.loads(line) for line in (tmp_path / "prior" / "metrics.jsonl").read_text().splitlines()]
    wanted = [(r["step"], pytest.approx(r["loss"], rel=1e-5)) for r in lines if r["stage"] == "codec"]
    assert logged["codec/loss"] == wanted
    assert wanted


def test_a_missing_tracker_is_one_sentence_before_any_work(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    file = config(world, tmp_path)
    assert main(["run", "--config", str(file), "--cpu", "--report_to", "tensorboard,wandb"]) == 2
    assert capsys.readouterr().err.strip().endswith("report_to names wandb, which is not installed; pip install wandb")
    assert not (tmp_path / "run").exists()
    assert main(["run", "--config", str(file), "--cpu", "--report_to", "tensorbored"]) == 2
    assert "report_to.0 must be one of 'trackio', 'tensorboard', 'wandb'" in capsys.readouterr().err
    with pytest.raises(InputError, match="pip install trackio"):
        check_trackers(["tensorboard", "trackio"])
    check_trackers(["tensorboard"])


class Unreachable:
    """A tracker whose service has gone."""

    name = "far"

    def __init__(self) -> None:
        self.calls = 0

    def log(self, values, step=None) -> None:
        self.calls += 1
        raise ConnectionError("no route to host")


class Diary:
    name = "near"

    def __init__(self) -> None:
        self.logged_values: list = []

    def log(self, values, step=None) -> None:
        self.logged_values.append((values, step))

    def finish(self) -> None:
        print("thank you for tracking")
        self.logged_values.append("end")


def test_a_tracker_that_fails_is_left_out_with_one_warning(
    accelerator, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    far, near = Unreachable(), Diary()
    accelerator.trackers = [far, near]
    with caplog.at_level(logging.WARNING, "dq"):
        for step in range(3):
            report(accelerator, {"loss": 0.5, "name": "x", "bad": float("nan")}, step)
    assert far.calls == 1
    assert [r.getMessage() for r in caplog.records] == [
        "note: the tracker far failed (ConnectionError: no route to host) and is left out from here on; "
        "metrics.jsonl has all numbers"
    ]
    end_trackers(accelerator)
    assert near.logged_values == [({"loss": 0.5}, 0), ({"loss": 0.5}, 1), ({"loss": 0.5}, 2), "end"]
    assert accelerator.trackers == []
    assert capsys.readouterr() == ("", "thank you for tracking\n")  # standard output is for results


def test_a_tracker_that_cannot_start_stops_before_work(accelerator, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "dq").write_text("a file where the folder of events should be")
    settings = apply_settings(RunConfig(), {"report_to": ["tensorboard"]})
    with pytest.raises(InputError, match=r"tensorboard cannot start .* leave out --report_to"):
        start_trackers(accelerator, settings.report_to, to_dict(settings), tmp_path)
    end_trackers(accelerator)


def test_settings_are_flat_and_without_secrets() -> None:
    changed = {
        "source.path": "https://me:hunter2@example.org/set",
        "generate.class_map": {"red": "1", "api_key": "hunter2"},
        "evaluate.students": [{"net": "convnet3", "token": "hunter2"}],
    }
    flat = flat_settings(to_dict(apply_settings(RunConfig(), changed)))
    assert "hunter2" not in repr(flat)
    assert flat["source.path"] == "https://example.org/set"
    assert flat["generate.class_map.red"] == "1"
    assert flat["evaluate.students.0.net"] == "convnet3"
    assert flat["cluster.n_iter"] == 100
    assert flat["refine"] == "[]"
    assert all(isinstance(v, str | int | float | bool) for v in flat.values())


def test_distortion_is_summarised_over_classes() -> None:
    def row(ipc, value):
        return {
            "stage": "quantization",
            "ipc": ipc,
            "engine": "torch",
            "distortion": value,
            "w2_uniform": float("nan"),
        }

    logged = distortion_numbers([row(1, 2.0), row(1, 4.0), row(10, 1.0), {"stage": "encode", "seconds": 3}])
    assert logged == {
        "cluster/ipc1-torch-latents/distortion_mean": 3.0,
        "cluster/ipc1-torch-latents/distortion_min": 2.0,
        "cluster/ipc1-torch-latents/distortion_max": 4.0,
        "cluster/ipc10-torch-latents/distortion_mean": 1.0,
        "cluster/ipc10-torch-latents/distortion_min": 1.0,
        "cluster/ipc10-torch-latents/distortion_max": 1.0,
    }


# --- time by stage --------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def walked(expected: dict[str, float], took: list[float], caplog: pytest.LogCaptureFixture) -> list[str]:
    clock = Clock()
    way = StageTimer(("encode", "cluster", "report"), expected, clock=clock)
    caplog.clear()
    with caplog.at_level(logging.INFO, "dq"):
        for name, seconds in zip(way.stages, took, strict=True):
            with way.stage(name):
                clock.now += seconds
    return [r.getMessage() for r in caplog.records]


def test_what_is_left_is_scaled_by_what_was_taken(caplog: pytest.LogCaptureFixture) -> None:
    lines = walked({"encode": 100, "cluster": 60, "report": 0}, [200, 60, 1], caplog)
    assert lines == [
        "encode (1 of 3) 3 min; about 2 min left in all",  # twice as slow as planned: 2 x 60 s
        "cluster (2 of 3) 60 s",
        "report (3 of 3) 1.0 s",
    ]


def test_nothing_is_said_that_nobody_knows(caplog: pytest.LogCaptureFixture) -> None:
    assert "left" not in " ".join(walked({}, [2, 2, 2], caplog))
    lines = walked({"encode": 2, "report": 5}, [2, 2, 2], caplog)
    assert "left" not in lines[0]  # cluster is not known
    assert lines[1].endswith("; about 5.0 s left in all")


def test_a_resumed_stage_tells_no_speed(caplog: pytest.LogCaptureFixture) -> None:
    lines = walked({"encode": 500, "cluster": 60, "report": 0}, [0.5, 60, 1], caplog)
    assert lines[0] == "encode (1 of 3) 0.5 s; about 60 s left in all"


def test_a_long_stage_is_announced_by_its_estimate(caplog: pytest.LogCaptureFixture) -> None:
    lines = walked({"encode": 10, "cluster": 400, "report": 0}, [20, 800, 1], caplog)
    assert lines[:2] == ["encode (1 of 3) 20 s; about 13 min left in all", "cluster (2 of 3) takes about 13 min"]


def test_speeds_of_stages_to_come_are_measured_once_some_time_is_spent(caplog: pytest.LogCaptureFixture) -> None:
    clock, calls = Clock(), []

    def measure() -> dict[str, float]:
        calls.append(clock.now)
        return {"encode": 10.0, "cluster": 8.0, "generate": 20.0, "report": 2.0}

    timer = StageTimer(("encode", "cluster", "generate", "report"), {}, measure=measure, clock=clock)
    with caplog.at_level(logging.INFO, "dq"):
        for name, seconds in zip(timer.stages, (5, 8, 20, 2), strict=True):
            with timer.stage(name):
                clock.now += seconds
    assert calls == [13.0]  # not after five seconds, and not again
    lines = [r.getMessage() for r in caplog.records]
    assert lines[0] == "encode (1 of 4) 5.0 s"
    assert lines[1] == "cluster (2 of 4) 8.0 s; about 16 s left in all"  # 13 s for what was measured as 18 s
    assert timer.summary() == "35 s: encode 5.0 s, cluster 8.0 s, generate 20 s, report 2.0 s"


def stepped(timer: StageTimer, clock: Clock, each: float, items: int = 100, *, first: int = 0) -> list[str]:
    """Text behind the bar of a loop after each item."""
    shown = []
    with timer.stage("encode"), progress([], desc="encode", total=items, unit="img") as bar:
        bar.initial = bar.n = first
        for _ in range(items - first):
            clock.now += each
            bar.update()
            shown.append(bar.format_dict["in_all"])
    return shown


def test_a_loop_tells_the_remaining_time_of_all_stages(caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    clock = Clock()
    timer = StageTimer(("encode", "cluster"), {"cluster": 50.0}, clock=clock)
    with caplog.at_level(logging.INFO, "dq"):
        shown = stepped(timer, clock, 1.0)
    assert shown[9] == " about 2 min left in all"  # 90 s here and 50 s there
    assert shown[79] == " about 70 s left in all"
    assert [r.getMessage() for r in caplog.records] == [
        "encode: 60 %, about 40 s left, 90 s in all",  # once a minute at most, unless it is long
        "encode (1 of 2) 100 s; about 50 s left in all",
    ]


def test_a_long_loop_is_announced_after_seconds(caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    clock = Clock()
    with caplog.at_level(logging.INFO, "dq"):
        stepped(StageTimer(("encode",), clock=clock), clock, 100.0)
    lines = [r.getMessage() for r in caplog.records]
    assert lines[0] == "encode: 1 %, about 2 h 45 min left"
    assert len(lines) == 8  # at 100 s, 200, 400, 800, 1600, 3200 and 6400, and at the end


@pytest.mark.parametrize(
    ("disabled", "main", "expected"),
    [("1", True, ["train: 60 %, about 40 s left"]), ("1", False, []), ("0", True, [])],
)
def test_a_loop_outside_of_stages_logs_where_it_has_no_bar(
    disabled: str, main: bool, expected: list[str], caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", disabled)
    clock = Clock()
    with caplog.at_level(logging.INFO, "dq"), progress([], desc="train", total=100, main=main) as bar:
        bar.clock, bar.began = clock, 0.0
        for _ in range(100):
            clock.now += 1.0
            bar.update()
    assert [r.getMessage() for r in caplog.records] == expected


def test_a_resumed_loop_counts_only_items_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    clock = Clock()
    shown = stepped(StageTimer(("encode",), clock=clock), clock, 2.0, first=90)
    assert shown[0] == " about 18 s left in all"
    assert shown[-1] == ""


def test_a_bar_goes_away_within_a_stage_and_stays_outside(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "0")
    assert list(progress(range(3), desc="alone")) == [0, 1, 2]
    assert capsys.readouterr().err.endswith("\n")
    timer = StageTimer(("encode", "cluster"))
    with timer.stage("cluster"):
        assert list(progress(range(3), desc="classes")) == [0, 1, 2]
    text = capsys.readouterr().err
    assert "classes (2 of 2)" in text
    assert "\n" not in text


def test_speeds_measured_within_a_run_change_no_result(
    tracked: Path, world: Path, tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_progress, "MEASURED_AFTER_S", 0.0)
    file = config(world, tmp_path, source__path=str(world / "images"))
    with caplog.at_level(logging.INFO, "dq"):
        assert main(["run", "--config", str(file), "--cpu"]) == 0
    lines = [r.getMessage() for r in caplog.records if re.match(r"\w+ \(\d of 6\) ", r.getMessage())]
    assert [line.split()[0] for line in lines] == ["encode", "cluster", "generate", "label", "evaluate", "report"]
    assert re.search(r"; about \d.* left in all$", lines[0])
    assert any(r.getMessage().startswith("run took ") for r in caplog.records)
    assert results(tmp_path) == results(tracked)


def test_lines_have_colors_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from dq.cli.logs import LogHandler

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def written(stream: io.StringIO) -> list[str]:
        handler = LogHandler(stream)
        for level in (logging.INFO, logging.WARNING):
            handler.emit(logging.LogRecord("dq", level, "", 0, "text", None, None))
        return stream.getvalue().splitlines()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert written(Terminal()) == ["text", "\033[33mtext\033[0m"]
    assert written(io.StringIO()) == ["text", "text"]
    monkeypatch.setenv("NO_COLOR", "1")
    assert written(Terminal()) == ["text", "text"]
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert written(Terminal()) == ["text", "text"]


def test_durations_read_well() -> None:
    lines = [duration(s) for s in (0.04, 12.4, 119, 240, 12_000, 4 * 3600 + 59.9 * 60, 190_000)]
    assert lines == ["0.0 s", "12 s", "119 s", "4 min", "3 h 20 min", "5 h 0 min", "2 d 5 h"]


@pytest.mark.slow
def test_a_run_says_where_it_is(world: Path, tmp_path: Path) -> None:
    file = config(world, tmp_path, ipc=[1], evaluate__students=[])
    speeds_file = tmp_path / "speeds.json"

    def stage_lines(*more: str) -> list[str]:
        done = launch(file, "run", *more)
        _, errors = done.communicate(timeout=120)
        assert done.returncode == 0, errors
        assert "%|" not in errors  # this is no terminal
        return [line for line in errors.splitlines() if " of 5" in line]

    stage_lines("--dry-run", "--save_speeds", str(speeds_file))
    lines = stage_lines("--speeds", str(speeds_file))
    stages = ("encode", "cluster", "generate", "label", "report")
    assert [line.split()[0] for line in lines] == list(stages)  # one line for each
    # now as if a step of encoding took minutes
    speeds = json.loads(speeds_file.read_text())
    speeds["speeds"]["decode"]["seconds"] = 600.0
    speeds_file.write_text(json.dumps(speeds))
    lines = stage_lines("--output_dir", str(tmp_path / "again"), "--speeds", str(speeds_file))
    # encode and cluster; then generate is over
    assert [line for line in lines if "left in all" in line] == lines[:2]
    assert "generate (3 of 5) takes about" in lines[2]


@pytest.mark.slow
def test_quiet_leaves_results_and_warnings(start: Start, world: Path, tmp_path: Path) -> None:
    file = config(world, tmp_path, ipc=[1], evaluate__seeds=1)
    done = start(MAIN, "run", "--config", str(file), "--cpu", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "summary.csv" in done.stdout
    # a warning is heard all the same
    (world_copy := tmp_path / "bad").mkdir()
    again = config(world, world_copy, ipc=[9], source__on_bad_image="skip")
    bad = world / "images" / "train" / "red" / "zzz.png"
    bad.write_bytes(b"no image")
    try:
        done = start(MAIN, "encode", "--config", str(again), "--cpu", "--quiet")
    finally:
        bad.unlink()
    assert "1 unreadable image set aside" in done.stderr
    assert " of " not in done.stderr


@pytest.mark.slow
def test_verbose_names_every_training(start: Start, world: Path, tmp_path: Path) -> None:
    file = config(world, tmp_path, ipc=[1])
    arguments = ["run", "--config", str(file), "--cpu", "--verbose"]
    done = start(MAIN, *arguments)
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr.replace("Loading pipeline", "")  # lines take the place of bars
    lines = [line for line in done.stderr.splitlines() if line.startswith("evaluate: ")]
    assert len([line for line in lines if " seed " in line]) == 5 * 2 + 1
    assert any(line.startswith("evaluate: ddoq ipc 1 convnet3 hard seed 0: last 0.") for line in lines)
    with pytest.raises(SystemExit):
        main([*arguments, "--quiet"])


def test_a_unit_is_named_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dq"):
        unit_done("cluster", "class 3 'cat'", 1.234, distortion=0.51234567, n=10)
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, "dq"):
        unit_done("cluster", "class 3 'cat'", 1.234, distortion=0.51234567, n=10)
    assert caplog.records[0].getMessage() == "cluster: class 3 'cat': distortion 0.5123, n 10, 1.23 s"
