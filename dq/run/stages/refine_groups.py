"""Groups of real images for a job of the refine stage.

Scores and statistics are in files that all runs share: scores in parts of a cache like that of features, statistics in
one file for each class; both are divided over processes, and existing files are not made again. What a job reads of
them is copied into its folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dq.config.refinement import MatchingConfig
from dq.core.devices import reader_threads
from dq.core.errors import InputError, RunError
from dq.core.files import is_done, read_metadata, read_tensors, write_tensors
from dq.core.plain import PlainDict
from dq.core.progress import progress, unit_done
from dq.core.seeds import digest_of, digest_of_tensors
from dq.data.image_cache import ImageCache, Reading, fill, write_manifest
from dq.data.images import read_images
from dq.networks.features import open_teacher_cache, teacher_identity
from dq.networks.patches import PatchRecipe
from dq.refine.anchors import patch_anchors
from dq.refine.groups import ClassGroups, groups_by_cell, groups_by_score, image_moments, mean_rank
from dq.refine.matched import MatchedTeacher, match_teachers
from dq.refine.moments import Moments, gps, pool_moments
from dq.run.folder import Run, class_file
from dq.run.stages.cluster import load_prototypes
from dq.run.stages.encode import cache_of
from dq.run.stages.refine_jobs import STATISTICS, Job

Groups = list[ClassGroups]  # by class


@dataclass(frozen=True)
class ScoreCache(ImageCache):
    """GPS () float32 of every train image under a teacher."""

    name: ClassVar[str] = "gps"
    verb: ClassVar[str] = "refine"


def prepare_groups(run: Run, job: Job) -> PlainDict:
    """Write statistics and anchors of the groups of a job.

    Returns:
        Facts for its manifest.

    Raises:
        InputError: if no matched teacher has batch norm, or a group has too few images for its anchors.
    """
    assert isinstance(job.stage, MatchingConfig)
    assert job.needs.groups is not None
    side = run.config.image_size
    matched = match_teachers(job.matched, job.stage, side=side, sizes=(side,))
    if not any(t.layers for t in matched):
        names = ", ".join(t.teacher.name for t in matched)
        raise InputError(f"groups need a teacher with batch norm, and {names} has none; add one, or set groups=none")
    groups = _groups_of(run, job, job.needs.groups.by, matched)
    sizes = [len(rows) for of_class in groups for rows in of_class.rows]
    facts: PlainDict = {"by": job.needs.groups.by, "groups": len(sizes), "images": [min(sizes), max(sizes)]}
    if job.needs.groups.statistics:
        folders = [_class_statistics(run, t, groups) if t.layers else None for t in matched]
        facts["statistics"] = [None if f is None else f.name for f in folders]
        run.accelerator.wait_for_everyone()
        if run.main and not is_done(job.folder / STATISTICS):
            write_tensors(job.folder / STATISTICS, _rank_statistics(groups, folders))
    if job.needs.anchors.source == "group":
        for label in run.local_units([float(n) for n in job.counts]):
            path = class_file(job.folder / "group", label)
            if not is_done(path):
                write_tensors(path, {"images": _group_anchors(run, job, label, groups[label])})
    return {"groups": facts}


# --- groups -------------------------------------------------------------------------------------------------------


def _groups_of(run: Run, job: Job, by: str, matched: Sequence[MatchedTeacher]) -> Groups:
    """The groups of the quantized images of every class."""
    scores = [_scores(run, t) for t in matched if t.layers] if by == "gps" else []
    run.accelerator.wait_for_everyone()  # scores are divided over processes
    groups: Groups = []
    for p in load_prototypes(run, cache_of(run), job.inputs.ipc, run.resolved(job.inputs.method)):
        rows, cells = p.members()
        if scores:
            ranks = mean_rank([_scores_of(cache, p.label, rows) for cache in scores])
            groups.append(groups_by_score(rows, ranks, job.counts[p.label]))
        else:
            copies = read_metadata(class_file(job.inputs.source, p.label))["copies"]
            copies = [copies] * len(p.counts) if isinstance(copies, int) else copies
            groups.append(groups_by_cell(rows, cells, copies))
    return groups


def _scores(run: Run, matched: MatchedTeacher) -> ScoreCache:
    """Put GPS of every train image under a teacher into its cache."""
    teacher, side = matched.teacher, run.config.image_size
    identity = {**teacher_identity(run.source, side, teacher.digest), "score": "gps"}
    cache = open_teacher_cache(ScoreCache, "gps", run.config.cache_dir, run.source, identity)
    channels = [a.channels for a in matched.layers]
    running = [Moments(a.mean.cpu(), a.var.cpu()) for a in matched.layers]

    def compute(images: Tensor, rows: list[int]) -> Tensor:
        scores = gps(image_moments(teacher, matched.layers, images).split(channels), running)
        return _finite(scores, run, teacher.name, rows)

    reading = Reading(side, teacher.batch_size, reader_threads(run.device))
    fill(cache, run.source, compute, reading, local_units=run.local_units, main=run.main)
    return cache


def _finite(values: Tensor, run: Run, teacher: str, rows: Sequence[int]) -> Tensor:
    finite = torch.isfinite(values.reshape(len(values), -1)).all(1)
    if not finite.all():
        row = rows[int((~finite).nonzero()[0])]
        raise InputError(
            f"the teacher {teacher} gives NaN or infinite batch norm inputs for {run.source.train.where(row)}; name "
            "another teacher"
        )
    return values


def _scores_of(cache: ScoreCache, label: int, rows: Tensor) -> Tensor:
    """Scores (n,) of those rows of a class."""
    scores, scored = cache.load(label)
    at = torch.searchsorted(scored, rows).clamp(max=len(scored) - 1)
    if not torch.equal(scored[at], rows):
        raise RunError(
            f"{cache.folder} lacks scores of images of class {label} {cache.class_names[label]!r} that are clustered; "
            "delete it and give the same command again"
        )
    return scores[at]


# --- statistics ---------------------------------------------------------------------------------------------------


def _class_statistics(run: Run, matched: MatchedTeacher, groups: Groups) -> Path:
    """Put the statistics of all groups under a teacher into the cache.

    A file of each class with images (G,), mean and var (G, sum C_l).
    """
    teacher, config = matched.teacher, run.config
    content = {f"{c}-{g}": rows for c, of_class in enumerate(groups) for g, rows in enumerate(of_class.rows)}
    identity = teacher_identity(run.source, config.image_size, teacher.digest)
    identity |= {"groups": digest_of_tensors(content), "layers": [a.name for a in matched.layers]}
    folder = Path(config.cache_dir) / f"group-statistics-{digest_of(identity)}"
    write_manifest(folder, {**identity, "origin": run.source.origin})
    sizes = [sum(map(len, of_class.rows)) for of_class in groups]
    todo = [c for c in run.local_units([float(n) for n in sizes]) if not is_done(class_file(folder, c))]
    total = sum(sizes[c] for c in todo)
    with progress([], desc="group statistics", total=total, unit="img", main=run.main and bool(todo)) as bar:
        for label in todo:
            statistics = [_statistics(run, matched, rows, bar) for rows in groups[label].rows]
            tensors = {name: torch.stack([s[name] for s in statistics]) for name in statistics[0]}
            write_tensors(class_file(folder, label), tensors)
            elapsed = bar.format_dict["elapsed"]
            unit_done("group statistics", run.source.class_names[label], elapsed, images=sizes[label])
    return folder


def _statistics(run: Run, matched: MatchedTeacher, rows: Tensor, bar: Any) -> dict[str, Tensor]:
    """Images read, mean and var (sum C_l,) float32 of one group."""
    source, teacher = run.source, matched.teacher
    parts: list[Moments] = []
    counts: list[int] = []
    for batch in rows.split(teacher.batch_size):
        side, threads = run.config.image_size, reader_threads(run.device)
        options: PlainDict = {"on_bad": source.on_bad_image, "threads": threads}
        images, read, _ = read_images(source.train, batch.tolist(), side, source.preprocess, **options)
        if read:
            each = image_moments(teacher, matched.layers, images)
            _finite(each.var, run, teacher.name, read)
            parts.append(pool_moments(each, torch.ones(len(read))))
            counts.append(len(read))
        bar.update(len(batch))
    if not parts:
        raise InputError(
            f"none of {len(rows)} images of a group can be read, first {source.train.where(int(rows[0]))}"
        )
    stacked = Moments(*map(torch.stack, zip(*parts, strict=True)))
    mean, var = pool_moments(stacked, torch.tensor(counts))
    return {"images": torch.tensor(sum(counts)), "mean": mean.float(), "var": var.float()}


def _rank_statistics(groups: Groups, folders: Sequence[Path | None]) -> dict[str, Tensor]:
    """Statistics of the groups of each rank.

    Over the classes that have an image of it; `mean-i` and `var-i` (R, sum C_l) of matched teacher i, with no channels
    for one without batch norm.
    """
    ranks = range(max(len(of_class.of_image) for of_class in groups))
    tensors: dict[str, Tensor] = {}
    for i, folder in enumerate(folders):
        if folder is None:
            tensors |= {f"{name}-{i}": torch.zeros(len(ranks), 0) for name in ("mean", "var")}
            continue
        classes = [(read_tensors(class_file(folder, c))[0], of_class.of_image) for c, of_class in enumerate(groups)]
        pooled = []
        for rank in ranks:
            of = [(t, of_image[rank]) for t, of_image in classes if rank < len(of_image)]
            parts = Moments(*(torch.stack([t[name][g] for t, g in of]) for name in ("mean", "var")))
            pooled.append(pool_moments(parts, torch.stack([t["images"][g] for t, g in of])))
        means, variances = zip(*pooled, strict=True)
        tensors |= {f"mean-{i}": torch.stack(means).float(), f"var-{i}": torch.stack(variances).float()}
    return tensors


# --- anchors ------------------------------------------------------------------------------------------------------


def _group_anchors(run: Run, job: Job, label: int, groups: ClassGroups) -> Tensor:
    """Patches (n_c, 3, S, S) uint8 of the groups, one for each image.

    Together the groups have as many candidates as a class with anchors=real_patch.
    """
    recipe = PatchRecipe(run.config.image_size, rank=job.needs.anchors.rank)
    recipe = dataclasses.replace(recipe, pool=recipe.pool // len(groups.rows))
    anchors = []
    for g in sorted(set(groups.of_image)):
        options: PlainDict = {"teacher": job.matched[0], "seed": run.config.seed}
        options["candidates"] = groups.rows[g].numpy()
        anchors.append(patch_anchors(run.source, label, groups.of_image.count(g), recipe, **options))
    return torch.cat(anchors)
