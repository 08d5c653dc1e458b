"""Tests on the card, runs of every verb on it and on the CPU, training of a prior, and estimates against a run."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from gpu_items_label import random_source
from gpu_measure import ROOT, Session, difference
from safetensors.torch import load_file

HELPERS = ROOT / "tests" / "helpers"


def gpu_tests(s: Session) -> None:
    """The tests that are marked `gpu`."""
    report = s.output / "gpu_tests.xml"
    tests = s.size(["tests"], ["tests/data/test_rand_augment.py"])
    command = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:randomly", f"--junitxml={report}", *tests]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment).returncode
    suite = next(ET.parse(report).getroot().iter("testsuite"))
    numbers: dict[str, Any] = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    broken = [
        c.get("name") for c in suite.iter("testcase") if c.find("failure") is not None or c.find("error") is not None
    ]
    s.write("tests marked gpu", numbers={**numbers, "exit_code": code, "failed": ", ".join(map(str, broken))})


# --- runs ---------------------------------------------------------------------------------------------------------


def verbs(s: Session) -> None:
    """A toy run of all stages on the card against the CPU, against itself, and killed and resumed."""
    folder = s.output / "verbs"
    world = toy_world(folder / "world")
    outputs = {name: folder / name for name in s.size(("card", "card again", "killed", "cpu"), ("card", "killed"))}
    for name, out in outputs.items():
        file = toy_config(s, world, out)
        arguments = ["--cpu"] if name == "cpu" or s.device.type == "cpu" else []
        if name == "killed":
            _kill_when_drawing(file, arguments, out)
        began = time.perf_counter()
        dq_run(file, *arguments)
        s.write(f"toy run: {name}", numbers={"seconds": time.perf_counter() - began})
    first = outputs.pop("card")
    for name, out in outputs.items():
        s.write(f"toy run on the card against: {name}", numbers=dict(run_differences(first / "run", out / "run")))


def toy_world(root: Path) -> Path:
    """Images by class, a codec, a DiT and teachers of a few parameters on the disk."""
    sys.path.insert(0, str(HELPERS))
    try:
        from toy_world import make_world
    finally:
        sys.path.remove(str(HELPERS))
    return root if (root / "bn.safetensors").is_file() else Path(make_world(root))


def toy_config(s: Session, world: Path, out: Path) -> Path:
    """A run of every kind of unit, in float32, so that cards and CPUs can be compared."""
    from toy_world import every_stage

    file = Path(every_stage(world, out))
    data: dict[str, Any] = yaml.safe_load(file.read_text())
    data |= {"output_dir": str(out / "run"), "cache_dir": str(out / "cache")}
    data["codec"]["dtype"] = data["generate"]["dtype"] = "float32"
    for student in data["evaluate"]["students"]:
        student["dtype"] = "float32"
    data["methods"]["refined"]["refine"][0]["dtype"] = "float32"
    if s.tiny:
        data["methods"] = {"ddoq": {}}
        data["evaluate"] = {"seeds": 1, "baselines": [], "students": data["evaluate"]["students"][:1]}
    file.write_text(yaml.safe_dump(data))
    return file


def dq_command(file: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "dq.cli", "run", "--config", str(file), "--quiet", *arguments]


def dq_run(file: Path, *arguments: str) -> None:
    """Run `dq run` in a process of its own.

    Raises:
        RuntimeError: if it fails, with the end of its output.
    """
    done = subprocess.run(dq_command(file, *arguments), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"dq run --config {file} {' '.join(arguments)} failed: {done.stderr[-1500:]}")


def _kill_when_drawing(file: Path, arguments: list[str], out: Path) -> None:
    """Start a run and kill it as soon as a unit of images is on the disk, or when it ends."""
    process = subprocess.Popen(dq_command(file, *arguments), cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any((out / "run" / "images").rglob("*.safetensors")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def run_differences(run: Path, other: Path) -> Iterator[tuple[str, float | int]]:
    """Differences of prototypes, images and accuracies of two runs of one configuration."""
    files = {p.relative_to(run) for p in run.rglob("*.safetensors")}
    others = {p.relative_to(other) for p in other.rglob("*.safetensors")}
    yield "files_of_one_alone", len(files ^ others)
    points, gray, labels = 0.0, 0.0, 0.0
    for path in sorted(files & others):
        a, b = load_file(run / path), load_file(other / path)
        for key in a.keys() & b.keys():
            if a[key].shape != b[key].shape:
                yield f"shape of {key} in {path}", 1
            elif path.parts[0] == "prototypes" and key == "centroids":
                points = max(points, difference(a[key], b[key]))
            elif path.parts[0] == "images" and key == "images":
                gap = (a[key].double() - b[key].double()).abs().max()
                gray = max(gray, float(gap) * (1 if a[key].dtype == torch.uint8 else 255))
            elif path.parts[0] == "labels" and a[key].is_floating_point():
                labels = max(labels, difference(a[key], b[key]))
    yield from {"centroids": points, "gray_levels": gray, "stored_logits": labels}.items()
    rows, other_rows = (list(csv.DictReader((r / "eval" / "summary.csv").open())) for r in (run, other))
    yield "rows_of_results_that_differ", sum(a != b for a, b in zip(rows, other_rows, strict=False))


def estimates(s: Session) -> None:
    """Seconds of every stage that `--dry-run` expects, and what the run then takes."""
    from dq.config.dtypes import device_dtypes, resolve_dtypes
    from dq.config.schema import load_config
    from dq.core.files import write_json
    from dq.data.load import load_source
    from dq.run.planning.remaining import expected_seconds
    from dq.run.planning.timings import Speeds

    folder = s.output / "verbs"
    file = (
        toy_config(s, toy_world(folder / "world"), folder / "estimates") if s.tiny else _digits(folder / "estimates")
    )
    arguments = ["--cpu"] if s.device.type == "cpu" else []
    speeds = s.output / "speeds.json"
    dq_run(file, *arguments, "--dry-run", "--save_speeds", str(speeds))
    dq_run(file, *arguments)
    config = resolve_dtypes(load_config(file), device_dtypes(s.device))
    expected = expected_seconds(config, load_source(config.source), 1, Speeds.load(speeds))
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    took = {r["stage"]: r["seconds"] for r in map(json.loads, lines) if "seconds" in r and "stage" in r}
    for stage, seconds in expected.items():
        if took.get(stage):
            numbers = {
                "expected_s": seconds,
                "took_s": took[stage],
                "took_over_expected": took[stage] / max(seconds, 1e-9),
            }
            s.write(f"estimate of {stage}", numbers=numbers)
    write_json(s.output / "estimates.json", {"expected": expected, "took": took}, checksum=False)


def _digits(out: Path) -> Path:
    """A run on scikit-learn's digits with the shipped prior of CIFAR-10."""
    prior = ROOT / "checkpoints" / "cifar10"
    levels = len(json.loads((prior / "vae" / "config.json").read_text())["block_out_channels"])
    side = json.loads((prior / "transformer" / "config.json").read_text())["sample_size"] * 2 ** (levels - 1)
    names = [str(c) for c in range(10)]
    generate = {"mode": "dit", "model": str(prior), "class_map": {n: int(n) for n in names}, "guidance_scale": 2.0}
    data = {
        "output_dir": str(out / "run"),
        "cache_dir": str(out / "cache"),
        "source": {"path": "sklearn:digits"},
        "codec": {"path": str(prior), "resolution": side, "batch_size": 256},
        "generate": {**generate, "num_inference_steps": 25, "batch_size": 100},
        "ipc": [50],
        "methods": {"ddoq": {}},
        "evaluate": {
            "seeds": 1,
            "baselines": [],
            "students": [{"net": "convnet3", "epochs": {"default": 20}, "tests": 1}],
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    file = out / "config.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


# --- prior --------------------------------------------------------------------------------------------------------


def prior(s: Session) -> None:
    """Seconds of a training step of a denoiser by size, and compiled, from trainings of two lengths."""
    batch, few, many = s.size((256, 15, 45), (4, 1, 2))
    for size in s.size(("S", "B"), (None,)):
        for compiled in s.size((False, True), (False,)):
            seconds = [_denoiser_seconds(s, size, compiled, steps, batch) for steps in (few, many)]
            step = (seconds[1] - seconds[0]) / (many - few)
            name = f"training of a DiT-{size or 'tiny'}, batch {batch}" + (", compile=true" if compiled else "")
            s.write(name, numbers={"s_per_step": step, "images_per_s": batch / step if step > 0 else 0.0})


def _denoiser_seconds(s: Session, size: Any, compiled: bool, steps: int, batch: int) -> float:
    from accelerate import Accelerator
    from gpu_items_draw import kl

    from dq.config.prior import PriorConfig, TrainDenoiserConfig
    from dq.config.schema import CodecConfig
    from dq.diffusion.latents import encode_source, open_cache
    from dq.diffusion.prior.train_denoiser import train_denoiser

    side, out = s.size(64, 8), s.output / "prior"
    source = random_source(s, 4, s.size(256, 8), side)
    codec = kl(dataclasses.replace(s, tiny=True), s.device)
    config = CodecConfig(resolution=side, dtype="float32", batch_size=64)
    cache = open_cache(out / "cache", source, codec, config, 0)
    encode_source(source, codec, cache, config, seed=0, main=False)
    small = {"size": size} if size else {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    settings = TrainDenoiserConfig(**small, steps=steps, batch_size=batch, compile=compiled, save_every=10**6)  # type: ignore[arg-type]
    name = f"{size}-{int(compiled)}-{steps}-{time.time_ns()}"
    folder = PriorConfig(output_dir=str(out / name), denoiser=settings)
    accelerator = Accelerator(cpu=s.device.type == "cpu")
    trained = train_denoiser(cache, codec, folder, class_names=source.class_names, accelerator=accelerator)
    record = json.loads((trained / "transformer" / "training.json").read_text())
    return float(record["seconds"])


if __name__ == "__main__":
    raise SystemExit("gpu_items_whole is a module of gpu_session.py; run that")
