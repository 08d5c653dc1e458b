"""Jobs of the refine stage: a method of refinement on the images of one folder, and all that it reads."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq.config.reader import to_dict
from dq.config.refinement import RefineConfig
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError
from dq.core.files import is_done, open_tensors, read_json, read_metadata, read_tensors, write_json, write_tensors
from dq.core.seeds import derive_seed, digest_of, digest_of_tensors
from dq.diffusion.codec import Codec, load_codec
from dq.diffusion.image_codec import ImageCodec
from dq.distilled.external import load_set
from dq.networks.features import extract_features, open_features
from dq.networks.teacher import Teacher
from dq.networks.teacher_check import TEACHERS, naming
from dq.networks.teacher_loading import load_teachers
from dq.refine.anchors import anchors_by_class, patch_anchors
from dq.refine.batches import Rows
from dq.refine.method import Batch, Context, Cost, Method, Needs, Resources
from dq.refine.moments import Moments
from dq.refine.registry import method_of
from dq.run.folder import Run, class_file
from dq.run.refinement import batch_file, check_codec_path, experts_of, setting_of, stage_settings
from dq.run.stages.cluster import load_prototypes
from dq.run.stages.encode import cache_of
from dq.run.stages.generate import check_codec

STATISTICS = "group_statistics.safetensors"  # in the folder of a job, of the groups of each rank


@dataclass(frozen=True)
class Job:
    """One stage on the images of one folder."""

    stage: RefineConfig  # with every None filled in
    method: Method
    needs: Needs
    cost: Cost
    level: int  # stages before it
    ipc: int
    name: str  # of a method of the run
    source: Path  # folder of class files
    folder: Path
    counts: tuple[int, ...]
    batches: list[Rows]
    teachers: tuple[Teacher, ...]  # all
    validation_teachers: tuple[Teacher, ...]
    weights: dict[int, Tensor] | None  # by class, of the images in the set

    @property
    def matched(self) -> tuple[Teacher, ...]:
        return tuple(t for t in self.teachers if t.matched)

    @functools.cached_property
    def places(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Batch and position of every (class, rank)."""
        return {row: (j, i) for j, batch in enumerate(self.batches) for i, row in enumerate(batch)}

    def batch_file(self, number: int) -> Path:
        return batch_file(self.folder, number)


def job_of(
    run: Run,
    stage: RefineConfig,
    level: int,
    ipc: int,
    name: str,
    source: Path,
    loaded: dict[str, tuple[Teacher, ...]],
) -> Job:
    """The stage `stage` of the method `name`, with its teachers loaded."""
    c = run.config

    def load(configs: Sequence[TeacherConfig], group: str) -> tuple[Teacher, ...]:
        key = digest_of([to_dict(t) for t in configs])
        if key not in loaded:
            with naming(f"{setting_of(c, name, level)}.{group}.N" if getattr(stage, group) else TEACHERS):
                loaded[key] = load_teachers(configs, run.source, c.image_size, run.device)
        return loaded[key]

    method = method_of(stage)
    named = stage.teachers or (c.teachers if method.needs(stage).teachers else ())
    teachers, validation_teachers = (
        load(named, "teachers") if named else (),
        load(stage.validation_teachers, "validation_teachers") if stage.validation_teachers else (),
    )
    classes = run.source.class_counts()
    size = round(classes.sum() / len(classes))
    context = Context(c.image_size, sum(t.matched for t in teachers), ipc, len(classes), size)
    stage = method.resolve(stage, context)
    needs = method.needs(stage)
    counts = tuple(_count(class_file(source, i)) for i in range(len(classes)))
    weights = _weights_of(run, ipc, name, source) if stage.weighted else None
    identity: list[Any] = [
        source.name,
        stage_settings(stage),
        [t.digest for t in teachers],
        [t.digest for t in validation_teachers],
        run.config.seed,
        level,
    ]
    if weights is not None:
        identity.append(digest_of_tensors({str(k): v for k, v in weights.items()}))
    if needs.file:
        identity.append(digest_of_tensors({"anchors": torch.cat(_file_anchors(run, needs.file, counts))}))
    experts = experts_of(run.source, c.image_size, needs)
    if experts is not None:
        identity.append(experts.digest)
    folder = run.folder / "images" / f"ipc{ipc:05d}-{stage.stage}-{digest_of(identity)}"
    batches, cost = method.batches(stage, counts), method.cost(stage, context)
    return Job(
        stage,
        method,
        needs,
        cost,
        level,
        ipc,
        name,
        source,
        folder,
        counts,
        batches,
        teachers,
        validation_teachers,
        weights,
    )


def _weights_of(run: Run, ipc: int, method: str, images: Path) -> dict[int, Tensor]:
    """Weights of the images of a set, by class; `images` is their folder."""
    resolved = run.resolved(method)
    m = resolved.method
    points = load_prototypes(run, cache_of(run), ipc, resolved)
    numbers = {
        label: read_metadata(class_file(images, label))["copies"] for label in range(len(run.source.class_names))
    }
    return {p.label: p.image_weights(numbers[p.label], m.weights, m.normalize) for p in points}


def _file_anchors(run: Run, path: str, counts: Sequence[int]) -> list[Tensor]:
    """The first images of every class of a set from a file, (n_c, 3, S, S) uint8."""
    side = run.config.image_size
    # its labels are not looked at
    s = load_set(
        path, run.source.class_names, image_size=side, label_kind="logits", on_bad_image=run.source.on_bad_image
    )
    if s.images.shape[-1] != side:
        raise InputError(f"the anchors in {path} have {s.images.shape[-1]} px, the images {side}; resize them")
    return anchors_by_class(s.images_uint8(), s.labels, counts, run.source.class_names, path)


def prepare(run: Run, job: Job, facts: Mapping[str, Any]) -> None:
    """What all batches of a job share: anchors and candidates by class, features of real classes, the manifest.

    Args:
        facts: of its groups, for the manifest.
    """
    c = run.config
    for label in run.local_units([float(n) for n in job.counts]):
        for name, number in job.needs.patches.items():
            path = class_file(job.folder / name, label)
            if not is_done(path):
                images = patch_anchors(
                    run.source,
                    label,
                    number or job.counts[label],
                    teacher=job.matched[0],
                    image_size=c.image_size,
                    rank=job.needs.rank,
                    seed=c.seed,
                )
                write_tensors(path, {"images": images})
    if job.needs.file and run.main:
        for label, images in enumerate(_file_anchors(run, job.needs.file, job.counts)):
            write_tensors(class_file(job.folder / "file", label), {"images": images})
    if job.needs.class_features:
        for teacher in job.matched:
            cache = open_features(c.cache_dir, run.source, c.image_size, teacher.digest)
            extract_features(run.source, teacher, cache, c.image_size, local_units=run.local_units, main=run.main)
    run.accelerator.wait_for_everyone()
    manifest = job.folder / "manifest.json"
    if run.main and not is_done(manifest):
        seed = derive_seed(c.seed, "calibrate")
        manifest_facts = {
            "settings": stage_settings(job.stage),
            **job.method.prepare(job.stage, resources_of(run, job), read_batch(job, 0), seed=seed),
            **facts,
            "batches": len(job.batches),
            "images_per_batch": [min(map(len, job.batches)), max(map(len, job.batches))],
            "classes_per_batch": min(len({c for c, _ in b}) for b in job.batches),
        }
        write_json(manifest, manifest_facts)


def resources_of(run: Run, job: Job) -> Resources:
    """What the method of a job needs; the facts of its manifest are there once that is written."""
    c, needs = run.config, job.needs
    means = None
    if needs.class_features:
        caches = [open_features(c.cache_dir, run.source, c.image_size, t.digest) for t in job.matched]
        means = tuple(torch.stack([f.load(i)[0].mean(0) for i in range(len(job.counts))]) for f in caches)
    candidates = None
    if needs.candidates:
        base = job.source if needs.candidates == "set" else job.folder / needs.candidates
        files = [class_file(base, i) for i in range(len(job.counts))]
        candidates = tuple(as_bytes(read_tensors(f)[0]["images"]) for f in files)
    manifest = job.folder / "manifest.json"
    facts = read_json(manifest) if manifest.is_file() else {}
    experts = experts_of(run.source, c.image_size, needs)
    return Resources(
        c.image_size, len(job.counts), job.teachers, candidates, means, facts, experts=experts, device=run.device
    )


def image_codec(run: Run, codec: Codec | None = None) -> ImageCodec:
    """The codec of a run, whose latents are learned.

    Args:
        codec: if it is loaded already.

    Raises:
        InputError: if none is named, or it is not the one that made the latents of the run.
    """
    c = run.config.codec
    if codec is None:
        check_codec_path(run.config)
        codec = load_codec(c.path, subfolder=c.subfolder, revision=c.revision, dtype=c.dtype)
    check_codec(codec, cache_of(run))
    return ImageCodec.of(codec, c.resolution, run.config.image_size, run.device)


def read_batch(job: Job, number: int) -> Batch:
    """The images of a batch, with their weights in the set and their anchors."""
    rows = job.batches[number]
    weights = None if job.weights is None else torch.stack([job.weights[c][r] for c, r in rows])
    anchors = None if job.needs.anchors is None else _read_rows(job.folder / job.needs.anchors, rows)
    statistics = read_statistics(job.folder, rows[0][1], len(job.matched)) if job.needs.group_statistics else None
    return Batch(_read_rows(job.source, rows), torch.tensor([c for c, _ in rows]), weights, anchors, statistics)


def read_statistics(folder: Path, rank: int, teachers: int) -> tuple[Moments, ...]:
    """The statistics that the batch of a rank is matched to, of every matched teacher of a job: (sum C_l,) each."""
    with open_tensors(folder / STATISTICS) as f:
        rows = slice(rank, rank + 1)
        read = [(f.get_slice(f"mean-{i}")[rows][0], f.get_slice(f"var-{i}")[rows][0]) for i in range(teachers)]
    return tuple(Moments(mean, var) for mean, var in read)


def _count(path: Path) -> int:
    with open_tensors(path) as f:
        return int(f.get_slice("images").get_shape()[0])


def as_bytes(images: Tensor) -> Tensor:
    return images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)


def _read_rows(folder: Path, rows: Sequence[tuple[int, int]]) -> Tensor:
    """Images of (class, rank) pairs as float32 in [0, 1]; only these are read."""
    by_row: dict[tuple[int, int], Tensor] = {}
    for label in sorted({c for c, _ in rows}):
        path = class_file(folder, label)
        with open_tensors(path) as f:
            images = f.get_slice("images")
            for c, r in rows:
                if c == label:
                    by_row[(c, r)] = images[r : r + 1]
    x = torch.cat([by_row[row] for row in rows])
    return x.float() / 255 if x.dtype == torch.uint8 else x
