"""The stages of refinement that a run asks for, and the folders in which their images are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from dq.config import FADRM, RunConfig, Teddy
from dq.dist import digest_of, read_json, read_tensors, readable
from dq.errors import InputError
from dq.refine import fadrm, teddy
from dq.runfolder import Run
from dq.settings import to_dict
from dq.teachers import POOL, teacher_file

Stage = FADRM | Teddy
INDEX = "refined.json"  # in images/: which folder holds the refined images of a method
SPEED = ("path", "batch_size", "check_images")  # of a teacher: where it lies and how fast it looks


def class_file(folder: Path, label: int) -> Path:
    return folder / f"class-{label:05d}.safetensors"


def batch_file(folder: Path, number: int) -> Path:
    return folder / f"batch-{number:05d}.safetensors"


def stages_of(config: RunConfig, method: str) -> tuple[Stage, ...]:
    """The stages behind the generator for a method, in order."""
    own = config.methods[method].refine
    return config.refine if own is None else own


def stage_settings(stage: Stage) -> dict[str, Any]:
    """The settings of a stage that decide its images, as plain data."""
    settings = to_dict(stage)
    for group in ("teachers", "judges"):
        settings[group] = [{k: v for k, v in t.items() if k not in SPEED} for t in settings[group]]
    return settings


def refined_folder(run: Run, ipc: int, method: str, drawn: Path) -> Path:
    """Where the images of a method are behind its stages; `drawn` if it has none.

    Raises:
        InputError: if the stages have not been run on these images with these settings.
    """
    stages = stages_of(run.config, method)
    if not stages:
        return drawn
    index = run.folder / "images" / INDEX
    known = read_json(index).get(f"{ipc}/{method}") if index.is_file() else None
    if known is None or known["asked"] != asked(run.config, method, drawn):
        raise InputError(
            f"{run.folder} has no refined images of method {method!r} at ipc {ipc} for the present settings; "
            "run `dq refine` first"
        )
    return run.folder / "images" / known["folder"]


class Planned(NamedTuple):
    """What a stage will do, known before anything is loaded."""

    name: str
    steps: tuple[int, ...]
    batch_size: int


def planned(config: RunConfig, method: str) -> list[Planned]:
    """The stages of a method with their settings filled in; a pool counts as several teachers.

    Raises:
        InputError: if settings do not fit the size of the images, or a stage has no teacher.
    """
    found = []
    for level, stage in enumerate(stages_of(config, method)):
        teachers = stage.teachers or config.teachers
        if not teachers:
            raise InputError(f"the stage {stage.stage!r} needs a teacher; set teachers, or refine.{level}.teachers")
        for t in (*teachers, *stage.judges):
            teacher_file(t)
        if isinstance(stage, FADRM):
            number = 2 if any(t.net == POOL for t in teachers) else len(teachers)
            stage = fadrm.resolve(stage, side=config.image_size, teachers=number)
            schedule = fadrm.schedule_of(stage)
        else:
            schedule = teddy.schedule_of(stage, side=config.image_size)
        found.append(Planned(stage.stage, schedule.steps, stage.batch_size or 1))
    return found


def asked_settings(config: RunConfig, method: str) -> list[dict[str, Any]]:
    """`stage_settings` of a method's stages with the teachers that they fall back on."""
    stages = stages_of(config, method)
    return [stage_settings(s if s.teachers else dataclasses.replace(s, teachers=config.teachers)) for s in stages]


def provenance(run: Run, method: str, folder: Path) -> list[dict[str, Any]]:
    """What was done to the images in `folder`, stage by stage: settings as asked and as filled in, teachers, measures
    before and after."""
    chain: list[dict[str, Any]] = []
    for settings in reversed(asked_settings(run.config, method)):
        summary, manifest = read_json(folder / "summary.json"), read_json(folder / "manifest.json")
        chain.insert(0, {"settings": settings, "resolved": manifest["settings"], "summary": summary})
        chain[0]["teachers"] = [{k: t[k] for k in ("name", "digest", "r_bn")} for t in manifest["teachers"]]
        folder = folder.parent / summary["from"]
    return chain


def asked(config: RunConfig, method: str, drawn: Path) -> str:
    """Digest of what a user asked for, which needs no teacher to be loaded."""
    return digest_of([drawn.name, asked_settings(config, method)])


def refined_folders(run: Run) -> dict[str, Path]:
    """The finished folders of all stages of the run's methods, by what they are of; one that several methods share
    comes once."""
    index = run.folder / "images" / INDEX
    found: dict[Path, str] = {}
    for key, known in read_json(index).items() if index.is_file() else ():
        ipc, method = key.split("/", 1)
        if int(ipc) not in run.config.ipc or method not in run.config.methods:
            continue
        chain: list[Path] = []
        folder = run.folder / "images" / known["folder"]
        while (folder / "summary.json").is_file():
            chain.insert(0, folder)
            folder = folder.parent / read_json(folder / "summary.json")["from"]
        for level, folder in enumerate(chain):
            stage = read_json(folder / "summary.json")["method"]
            found.setdefault(folder, f"{method}, IPC {ipc}: stage {level + 1}, {stage}")
    return {title: folder for folder, title in found.items()}


def read_refined(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean terms of the loss over batches (steps, 4), and the first images of the first batch at the start and at the
    end of every block (blocks + 1, n, 3, S, S) uint8."""
    first = batch_file(folder, 0)
    traces = []
    for j in range(read_json(folder / "manifest.json")["batches"]):
        with readable(batch_file(folder, j)), safe_open(batch_file(folder, j), framework="pt") as f:
            traces.append(f.get_tensor("trace"))
    return torch.stack(traces).mean(0), read_tensors(first)[0]["strip"]
