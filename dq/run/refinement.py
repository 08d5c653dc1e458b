"""The stages of refinement of a run, and the folders of their images."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dq.config.methods import resolved_method
from dq.config.reader import to_dict
from dq.config.refinement import RefineConfig
from dq.config.schema import RunConfig
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError
from dq.core.files import open_tensors, read_json, read_tensors
from dq.core.plain import PlainDict
from dq.core.seeds import digest_of, digest_of_file
from dq.data.images import read_images
from dq.data.source import ImageSource
from dq.networks.teacher_check import TEACHERS, naming
from dq.networks.teacher_loading import POOL, PRETRAINED, teacher_file
from dq.networks.trajectories import Experts, open_experts
from dq.refine.method import Context, Needs, RealImages
from dq.refine.optimize import TERMS
from dq.refine.registry import method_of
from dq.run.folder import Run, images_per_class

log = logging.getLogger("dq")

INDEX = "refined.json"  # in images/: which folder holds the refined images of a method
SPEED = ("path", "batch_size", "check_images")  # of a teacher: where it lies and how fast it looks


def batch_file(folder: Path, number: int) -> Path:
    return folder / f"batch-{number:05d}.safetensors"


def stages_of(config: RunConfig, method: str) -> tuple[RefineConfig, ...]:
    """The stages of refinement of a method, in order."""
    override = config.methods[method].refine
    return config.refine if override is None else override


def setting_of(config: RunConfig, method: str, level: int) -> str:
    """The setting that names a stage of a method, for messages."""
    return f"refine.{level}" if config.methods[method].refine is None else f"methods.{method}.refine.{level}"


def stage_settings(stage: RefineConfig) -> PlainDict:
    """The settings of a stage that determine its images, as plain data."""
    settings = to_dict(stage)
    for group in ("teachers", "validation_teachers"):
        settings[group] = [{k: v for k, v in t.items() if k not in SPEED} for t in settings[group]]
    return {k: v for k, v in settings.items() if k not in stage.unread()}


def refined_folder(run: Run, ipc: int, method: str, drawn: Path) -> Path:
    """Folder of the refined images of a method; `drawn` without stages.

    Raises:
        InputError: if the stages have not been run on these images with these settings.
    """
    stages = stages_of(run.config, method)
    if not stages:
        return drawn
    index = run.folder / "images" / INDEX
    record = read_json(index).get(f"{ipc}/{method}") if index.is_file() else None
    if record is None or record["asked"] != requested_digest(run.config, method, drawn):
        raise InputError(
            f"{run.folder} has no refined images of method {method!r} at ipc {ipc} for the present settings; "
            "run `dq refine` first"
        )
    for path, content in files_of(run.config, method).items():
        if content is not None and content not in record["files"]:
            raise InputError(
                f"the images of method {method!r} at ipc {ipc} were refined with other files than {path}; "
                "run `dq refine` first"
            )
    return run.folder / "images" / record["folder"]


def needs_codec(config: RunConfig) -> bool:
    """Whether a stage of the run learns latents of its codec."""
    return any(method_of(s).needs(s).codec for method in config.methods for s in stages_of(config, method))


def check_codec_path(config: RunConfig) -> None:
    """Check that a codec is named if a stage needs it.

    Raises:
        InputError: if none is.
    """
    if needs_codec(config) and not config.codec.path:
        raise InputError(
            "a stage of refinement learns latents of the codec, but no codec is named; set codec.path, or mode=pixel"
        )


class Planned(NamedTuple):
    """Steps and batches of a stage, known before anything is loaded."""

    name: str
    steps: int  # forward and backward passes over every image
    batch_size: int | None  # None: the whole set is one batch
    checks: int = 0  # networks that are trained on the set in between, whose time no estimate has

    def batches(self, images: int) -> int:
        """Number of batches of a set of so many images."""
        return 1 if self.batch_size is None else -(-images // self.batch_size)


def planned(config: RunConfig, method: str, class_counts: Sequence[int] = ()) -> list[Planned]:
    """Plan the stages of a method with their settings filled in.

    With `class_counts`, the train images of each class, batches are checked.

    Raises:
        InputError: if settings do not fit the size or the number of the images, if there is no such stage, or one has
            no teacher or anchors.
    """
    plans = []
    stages = stages_of(config, method)
    for level, stage in enumerate(stages):
        refinement = method_of(stage)
        teachers, setting = stage.teachers or config.teachers, setting_of(config, method, level)
        if refinement.needs(stage).teachers and not teachers:
            raise InputError(f"the stage {stage.stage!r} needs a teacher; set teachers, or {setting}.teachers")
        named = {TEACHERS: config.teachers} if not stage.teachers else {f"{setting}.teachers.N": stage.teachers}
        for where, group in (named | {f"{setting}.validation_teachers.N": stage.validation_teachers}).items():
            for t in group:
                with naming(where):
                    teacher_file(t)
        for name, path in stage.paths().items():
            if not Path(path).exists():
                otherwise = ", or make experts by `dq train-experts`" if name == "experts" else ""
                raise InputError(f"{setting}.{name}: {path} does not exist; correct the path{otherwise}")
        ipc = config.ipc[0] if len(config.ipc) == 1 else None
        context = Context(config.image_size, sum(map(_matched, teachers)), ipc, classes=len(class_counts) or None)
        resolved = refinement.resolve(stage, context)
        if stage.labels_images and level + 1 < len(stages):
            log.warning(
                "note: the labels of stage %d, %s, are lost: later stages change its images", level + 1, stage.stage
            )
        for ipc in config.ipc if len(class_counts) else ():
            size = round(sum(class_counts) / len(class_counts))
            one = refinement.resolve(stage, dataclasses.replace(context, ipc=ipc, class_size=size))
            refinement.batches(one, images_per_class(resolved_method(config, method), ipc, class_counts))
        cost = refinement.cost(resolved, context)
        plans.append(Planned(stage.stage, cost.steps, cost.batch_size, cost.checks))
    return plans


def real_images(run: Run) -> RealImages:
    """Read all readable train images of a run at its size."""
    s, split = run.source, run.source.train
    rows = range(len(split))
    images, read, bad = read_images(split, rows, run.config.image_size, s.preprocess, on_bad=s.on_bad_image)
    if bad:
        log.warning("%d of %d train images are left out, first: %s", len(bad), len(split), bad[0])
    return RealImages(images, torch.from_numpy(split.labels[read]).long())


def experts_of(source: ImageSource, image_size: int, needs: Needs) -> Experts | None:
    """Open the expert trajectories of a stage.

    Raises:
        InputError: if they were trained on other images than those of the source at this size.
        RunError: if a file is damaged.
    """
    if needs.experts is None:
        return None
    experts = open_experts(needs.experts)
    names = ("fingerprint", "classes", "preprocess", "image_size")
    present = (source.fingerprint, list(source.class_names), source.preprocess, image_size)
    for name, value in zip(names, present, strict=True):
        if experts.facts[name] != value:
            raise InputError(
                f"the experts in {needs.experts} were trained on other images than those of {source.origin} at "
                f"{image_size} px ({name} differs); train them on these, in another train_experts.output_dir"
            )
    return experts


def _matched(teacher: TeacherConfig) -> int:
    """Number of networks of a teacher: those of a pool, else one."""
    if teacher.net != POOL:
        return 1
    return sum(m["used"] for m in read_json(teacher_file(teacher) or Path())["members"])


def labeled(config: RunConfig, method: str) -> bool:
    """Whether the last stage of a method labels its images."""
    stages = stages_of(config, method)
    return bool(stages) and stages[-1].labels_images


def files_of(config: RunConfig, method: str) -> dict[str, str | None]:
    """Digests of the files that the stages of a method read, by path.

    Teachers and anchors; None for missing files. Models that libraries download are not listed.
    """
    paths: list[Path] = []
    for stage in stages_of(config, method):
        for t in stage.teachers or config.teachers:
            local = t.net != "transformers" and t.path not in ("", PRETRAINED)
            paths += [Path(t.path)] if local else []
        paths += map(Path, stage.paths().values())
    return {str(p): _digest_of_files(p) for p in paths}


def _digest_of_files(path: Path) -> str | None:
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else ([path] if path.is_file() else [])
    if not files:
        return None
    return digest_of([_digest_of_file(f, f.stat().st_mtime_ns, f.stat().st_size) for f in files])


@functools.cache
def _digest_of_file(path: Path, changed_ns: int, size: int) -> str:
    return digest_of_file(path, size=64)[:16]  # as in folders of earlier versions


def requested_settings(config: RunConfig, method: str) -> list[PlainDict]:
    """`stage_settings` of a method's stages, with the teachers of the run as default."""
    stages = stages_of(config, method)
    return [stage_settings(s if s.teachers else dataclasses.replace(s, teachers=config.teachers)) for s in stages]


def provenance(run: Run, method: str, folder: Path) -> list[PlainDict]:
    """Record of the refinement of the images in `folder`, stage by stage.

    Settings as requested and as filled in, teachers, measures before and after.
    """
    chain: list[PlainDict] = []
    for settings in reversed(requested_settings(run.config, method)):
        summary, manifest = read_json(folder / "summary.json"), read_json(folder / "manifest.json")
        chain.insert(0, {"settings": settings, "resolved": manifest["settings"], "summary": summary})
        chain[0]["folder"] = folder.name
        teachers = manifest.get("teachers", [])
        chain[0]["teachers"] = [{k: v for k, v in t.items() if k != "layers"} for t in teachers]
        folder = folder.parent / summary["from"]
    return chain


def requested_digest(config: RunConfig, method: str, drawn: Path) -> str:
    """Digest of the requested settings, without loading a teacher."""
    parts: list[object] = [drawn.name, requested_settings(config, method)]
    if any(s.weighted for s in stages_of(config, method)):
        m = config.methods[method]
        parts.append([m.weights, m.normalize])
    return digest_of(parts)


def refined_folders(run: Run) -> dict[str, Path]:
    """Finished folders of all stages of the run's methods, by title.

    One that several methods share comes once.
    """
    index = run.folder / "images" / INDEX
    titles: dict[Path, str] = {}
    for key, record in read_json(index).items() if index.is_file() else ():
        ipc, method = key.split("/", 1)
        if int(ipc) not in run.config.ipc or method not in run.config.methods:
            continue
        chain: list[Path] = []
        folder = run.folder / "images" / record["folder"]
        while (folder / "summary.json").is_file():
            chain.insert(0, folder)
            folder = folder.parent / read_json(folder / "summary.json")["from"]
        for level, folder in enumerate(chain):
            stage = read_json(folder / "summary.json")["method"]
            titles.setdefault(folder, f"{method}, IPC {ipc}: stage {level + 1}, {stage}")
    return {title: folder for folder, title in titles.items()}


class Trace(NamedTuple):
    """Losses and pictures of a stage, for a report."""

    terms: tuple[str, ...]  # names of the terms of the loss
    losses: Tensor  # (steps, terms), means over batches
    blocks: Tensor | None  # (k, n, 3, S, S) uint8: the first images of the first batch, start to end


def read_trace(folder: Path) -> Trace:
    """Read the losses of a refined folder, and pictures of its first images."""
    manifest = read_json(folder / "manifest.json")
    traces = []
    for j in range(manifest["batches"]):
        with open_tensors(batch_file(folder, j)) as f:
            traces.append(f.get_tensor("trace"))
    tensors, facts = read_tensors(batch_file(folder, 0))
    return Trace(tuple(facts.get("terms", TERMS)), torch.stack(traces).mean(0), tensors.get("strip"))
