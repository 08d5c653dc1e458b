"""Jobs of the refine stage: a method on the images of a folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dq.config.reader import to_dict
from dq.config.refinement import RefineConfig
from dq.config.teachers import TeacherConfig
from dq.core.files import is_done, open_tensors, read_json, read_metadata, write_json
from dq.core.plain import PlainMapping
from dq.core.seeds import derive_seed, digest_of, digest_of_tensors
from dq.diffusion.codec import Codec, load_codec
from dq.diffusion.image_codec import ImageCodec
from dq.networks.features import extract_features, open_features
from dq.networks.teacher import Teacher
from dq.networks.teacher_check import TEACHERS, naming
from dq.networks.teacher_loading import load_teachers
from dq.refine.batches import Rows
from dq.refine.method import Batch, Context, Cost, Method, Needs, Resources
from dq.refine.moments import Moments
from dq.refine.registry import method_of
from dq.run.folder import Run, class_file
from dq.run.refinement import batch_file, check_codec_path, experts_of, setting_of, stage_settings
from dq.run.stages.cluster import load_prototypes
from dq.run.stages.encode import cache_of
from dq.run.stages.generate import check_codec
from dq.run.stages.image_files import count_images, read_images_at
from dq.run.stages.refine_anchors import file_anchors, prepare_anchors, read_candidates

STATISTICS = "group_statistics.safetensors"  # in the folder of a job, of the groups of each rank


@dataclass(frozen=True)
class Inputs:
    """The images that a job refines."""

    ipc: int
    method: str  # name of a method of the run
    level: int  # stages before it
    source: Path  # folder of class files


@dataclass(frozen=True)
class Job:
    """One stage on the images of one folder."""

    stage: RefineConfig  # with every None filled in
    refinement: Method
    cost: Cost
    inputs: Inputs
    folder: Path
    counts: tuple[int, ...]  # images of each class
    teachers: tuple[Teacher, ...]  # all
    validation_teachers: tuple[Teacher, ...]
    weights: dict[int, Tensor] | None  # by class, of the images in the set

    @property
    def matched(self) -> tuple[Teacher, ...]:
        return tuple(t for t in self.teachers if t.matched)

    @functools.cached_property
    def needs(self) -> Needs:
        return self.refinement.needs(self.stage)

    @functools.cached_property
    def batches(self) -> list[Rows]:
        return self.refinement.batches(self.stage, self.counts)

    @functools.cached_property
    def places(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Batch and position of every (class, rank)."""
        return {row: (j, i) for j, batch in enumerate(self.batches) for i, row in enumerate(batch)}

    def batch_file(self, number: int) -> Path:
        return batch_file(self.folder, number)


def job_of(run: Run, stage: RefineConfig, inputs: Inputs, loaded: dict[str, tuple[Teacher, ...]]) -> Job:
    """The job of a stage on images, with its teachers loaded.

    `loaded` keeps teachers by their settings, for several jobs.
    """
    refinement, class_counts = method_of(stage), run.source.class_counts()
    needs_teachers = refinement.needs(stage).teachers
    named = stage.teachers or (run.config.teachers if needs_teachers else ())
    teachers = _load_teachers(run, stage, inputs, named, "teachers", loaded)
    group = "validation_teachers"
    validation_teachers = _load_teachers(run, stage, inputs, stage.validation_teachers, group, loaded)
    size = round(class_counts.sum() / len(class_counts))
    matched = sum(t.matched for t in teachers)
    context = Context(run.config.image_size, matched, inputs.ipc, len(class_counts), size)
    stage = refinement.resolve(stage, context)
    counts = tuple(count_images(class_file(inputs.source, i)) for i in range(len(class_counts)))
    weights = _weights_of(run, inputs) if stage.weighted else None
    cost = refinement.cost(stage, context)
    job = Job(stage, refinement, cost, inputs, inputs.source, counts, teachers, validation_teachers, weights)
    # the folder is named by a digest of all else
    name = f"ipc{inputs.ipc:05d}-{stage.stage}-{digest_of(_identity(run, job))}"
    return dataclasses.replace(job, folder=run.folder / "images" / name)


def _load_teachers(
    run: Run,
    stage: RefineConfig,
    inputs: Inputs,
    configs: Sequence[TeacherConfig],
    group: str,
    loaded: dict[str, tuple[Teacher, ...]],
) -> tuple[Teacher, ...]:
    """Load a group of teachers of a stage or the run once."""
    if not configs:
        return ()
    key = digest_of([to_dict(t) for t in configs])
    if key not in loaded:
        setting = f"{setting_of(run.config, inputs.method, inputs.level)}.{group}.N"
        with naming(setting if getattr(stage, group) else TEACHERS):
            c = run.config
            loaded[key] = load_teachers(configs, run.source, c.image_size, run.device, cache_dir=c.cache_dir)
    return loaded[key]


def _identity(run: Run, job: Job) -> list[object]:
    """What determines the images of a job."""
    identity: list[object] = [
        job.inputs.source.name,
        stage_settings(job.stage),
        [t.digest for t in job.teachers],
        [t.digest for t in job.validation_teachers],
        run.config.seed,
        job.inputs.level,
    ]
    if job.weights is not None:
        identity.append(digest_of_tensors({str(k): v for k, v in job.weights.items()}))
    if job.needs.anchors.file:
        anchors = torch.cat(file_anchors(run, job.needs.anchors.file, job.counts))
        identity.append(digest_of_tensors({"anchors": anchors}))
    experts = experts_of(run.source, run.config.image_size, job.needs)
    if experts is not None:
        identity.append(experts.digest)
    return identity


def _weights_of(run: Run, inputs: Inputs) -> dict[int, Tensor]:
    """Weights of the images of a set, by class."""
    resolved = run.resolved(inputs.method)
    m, classes = resolved.method, range(len(run.source.class_names))
    numbers = [read_metadata(class_file(inputs.source, label))["copies"] for label in classes]
    points = load_prototypes(run, cache_of(run), inputs.ipc, resolved)
    return {p.label: p.image_weights(numbers[p.label], m.weights, m.normalize) for p in points}


def prepare(run: Run, job: Job, facts: PlainMapping) -> None:
    """Write anchors, candidates, class features and manifest of a job.

    `facts` of its groups go into the manifest.
    """
    c = run.config
    prepare_anchors(run, job.needs.anchors, job.folder, job.counts, job.matched)
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
            **job.refinement.prepare(job.stage, resources_of(run, job), read_batch(job, 0), seed=seed),
            **facts,
            "batches": len(job.batches),
            "images_per_batch": [min(map(len, job.batches)), max(map(len, job.batches))],
            "classes_per_batch": min(len({c for c, _ in b}) for b in job.batches),
        }
        write_json(manifest, manifest_facts)


def resources_of(run: Run, job: Job) -> Resources:
    """Models, data and manifest facts of a job."""
    c, needs = run.config, job.needs
    means = None
    if needs.class_features:
        caches = [open_features(c.cache_dir, run.source, c.image_size, t.digest) for t in job.matched]
        means = tuple(torch.stack([f.load(i)[0].mean(0) for i in range(len(job.counts))]) for f in caches)
    manifest = job.folder / "manifest.json"
    return Resources(
        c.image_size,
        len(job.counts),
        job.teachers,
        candidates=read_candidates(needs.anchors, job.inputs.source, job.folder, len(job.counts)),
        class_means=means,
        facts=read_json(manifest) if manifest.is_file() else {},
        experts=experts_of(run.source, c.image_size, needs),
        device=run.device,
    )


def image_codec(run: Run, codec: Codec | None = None) -> ImageCodec:
    """The codec of a run for images; `codec` if it is loaded.

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
    """Read the images, weights, anchors and statistics of a batch."""
    rows, needs = job.batches[number], job.needs
    weights = None if job.weights is None else torch.stack([job.weights[c][r] for c, r in rows])
    source, statistics = needs.anchors.source, None
    anchors = None if source is None else read_images_at(job.folder / source, rows)
    if needs.groups and needs.groups.statistics:
        statistics = read_statistics(job.folder, rows[0][1], len(job.matched))
    labels = torch.tensor([c for c, _ in rows])
    return Batch(read_images_at(job.inputs.source, rows), labels, weights, anchors, statistics)


def read_statistics(folder: Path, rank: int, teachers: int) -> tuple[Moments, ...]:
    """Read the statistics (sum C_l,) of a rank for every matched teacher."""
    with open_tensors(folder / STATISTICS) as f:
        rows = slice(rank, rank + 1)
        read = [(f.get_slice(f"mean-{i}")[rows][0], f.get_slice(f"var-{i}")[rows][0]) for i in range(teachers)]
    return tuple(Moments(mean, var) for mean, var in read)
