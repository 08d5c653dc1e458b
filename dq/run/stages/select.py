"""Selection among candidates in the generate stage: several draws of every prototype.

A rule keeps as many as the set has images. Draws are in files until all of a class exist; images of one file are in
memory at a time, and of all others the outputs of the selecting teacher.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dq.cluster.prototypes import Prototypes, cell_means
from dq.cluster.selection import (
    Selection,
    nearest_of_cells,
    select_confident,
    select_correct,
    select_facility,
    select_transport,
)
from dq.cluster.transport import squared_cost
from dq.config.methods import ResolvedMethod, selects
from dq.config.reader import to_dict
from dq.config.schema import GenerateConfig, MethodConfig, RunConfig
from dq.config.teachers import TeacherConfig
from dq.core.files import read_tensors
from dq.core.plain import PlainDict, PlainMapping
from dq.core.seeds import digest_of
from dq.data.images import read_images
from dq.diffusion.latents import LatentCache
from dq.networks.features import FeatureCache
from dq.networks.teacher import Teacher
from dq.networks.teacher_check import checked_accuracy, naming
from dq.networks.teacher_loading import load_teacher
from dq.run.folder import Run
from dq.run.stages.cluster import ClassImages, class_images
from dq.run.stages.features import features_by
from dq.run.stages.prune import Pruning, load_pruning

log = logging.getLogger("dq")

BY_FEATURES = ("facility", "transport")  # rules that compare candidates with the real images of the class
# over classes; other facts are averaged
SUMMED = ("prototypes", "images", "lacking", "changes", "unrepresented", "real_kept")


class Selected(NamedTuple):
    """The images of a class after selection."""

    images: Tensor  # (M, 3, H, W), prototype by prototype
    numbers: list[int]  # images of every prototype
    record: dict[str, Tensor]  # of every candidate: pool_prototype, pool_draw, pool_probability, _correct, _kept (N,)
    facts: PlainDict
    source_rows: list[int] | None = None  # of the images, in the train split; -1: a draw. None: all are draws


class _RealCandidates(NamedTuple):
    """Real images of a class that are candidates."""

    rows: Tensor  # (n,) of the train split
    prototype: Tensor  # (n,)
    images: Tensor  # (n, 3, H, W) uint8
    features: Tensor | None  # (n, D) by the selecting teacher


@dataclass(frozen=True)
class Selector:
    """The rule of a method, its teacher and the real images of comparison."""

    config: GenerateConfig
    teacher: Teacher
    cache: LatentCache
    ipc: int
    pruning: Pruning
    features: FeatureCache | None  # None: the rule compares with no real images
    read: Callable[[Tensor], Tensor]  # reads images (n, 3, H, W) uint8 of rows (n,) of the train split
    real: bool = False  # whether the representatives are real images

    def select(
        self, p: Prototypes, numbers: Sequence[int], pool: Sequence[tuple[int, int]], parts: Sequence[Path]
    ) -> Selected:
        """Select among the candidates of a class.

        Args:
            p: prototypes of the class.
            numbers: images of every prototype.
            pool: prototype and number of every draw, in the order of the files.
            parts: files of the draws.
        """
        logits, features = [], []
        for part in parts:
            images = read_tensors(part)[0]["images"]
            logits.append(self.teacher.logits(images))
            if self.features is not None:
                features.append(self.teacher.features(images))
        prototype, draw = (torch.tensor(numbers) for numbers in zip(*pool, strict=True))
        real = self._real_candidates(p)
        if len(real.rows):
            logits.append(self.teacher.logits(real.images))
            if real.features is not None:
                features.append(real.features)
        prototype = torch.cat([prototype, real.prototype])
        scores = torch.cat(logits)
        probability, correct = scores.softmax(1)[:, p.label], scores.argmax(1) == p.label
        if self.config.select == "correct":
            chosen = select_correct(correct, probability, prototype, numbers)
        elif self.config.select == "confident":
            chosen = select_confident(probability, prototype, numbers)
        else:
            chosen = self._by_features(p, torch.cat(features), prototype, numbers)
        is_selected = torch.zeros(len(prototype), dtype=torch.bool)
        is_selected[chosen.rows] = True
        record = {
            "pool_prototype": prototype,
            "pool_draw": torch.cat([draw, torch.full_like(real.rows, -1)]),
            "pool_probability": probability,
            "pool_correct": correct,
            "pool_kept": is_selected,
        }
        if self.config.real_candidates:
            record["pool_row"] = torch.cat([torch.full_like(draw, -1), real.rows])  # of the source; -1: a draw
        facts = {
            "rule": self.config.select,
            "candidates": self.config.candidates,
            "teacher": self.teacher.name,
            "digest": self.teacher.digest,
            "prototypes": len(numbers),
            "images": len(chosen.rows),
            "probability_drawn": float(probability.mean()),
            "probability_kept": float(probability[is_selected].mean()),
            **chosen.facts,
        }
        if self.config.real_candidates:
            facts |= {"real_candidates": self.config.real_candidates, "real_kept": int(is_selected[len(pool) :].sum())}
        each = torch.bincount(prototype[chosen.rows], minlength=len(numbers)).tolist()
        rows = record["pool_row"][chosen.rows].tolist() if self.config.real_candidates else None
        return Selected(_picked(parts, chosen.rows, real.images), each, record, facts, rows)

    def _real_candidates(self, p: Prototypes) -> _RealCandidates:
        """The images nearest to the centroid of each cell, of those of the cell.

        Without the representatives where these are real images themselves.
        """
        number, none = self.config.real_candidates, torch.zeros(0, dtype=torch.int64)
        if not number:
            return _RealCandidates(none, none, none, None)
        real = class_images(self.cache, p.label, self.ipc, self.pruning, self.features)
        others = torch.arange(len(real.rows))
        if self.real:
            others = others[~torch.isin(real.rows, p.medoid_rows)]
        if not len(others):
            return _RealCandidates(none, none, none, None)
        near, prototype = nearest_of_cells(real.z[others].flatten(1).float(), p.centroids.flatten(1), number)
        index = others[near]
        rows, features = real.rows[index], None if real.features is None else real.features[index]
        return _RealCandidates(rows, prototype, self.read(rows), features)

    def _by_features(self, p: Prototypes, features: Tensor, prototype: Tensor, numbers: Sequence[int]) -> Selection:
        real = class_images(self.cache, p.label, self.ipc, self.pruning, self.features)
        assert real.features is not None
        if self.config.select == "facility":
            one = self.config.one_per_prototype
            options: PlainDict = {"weights": real.weights, "one_per_prototype": one}
            return select_facility(real.features, features, prototype, numbers, **options)
        masses = p.counts if p.masses is None else p.masses
        return select_transport(
            real.features,
            features,
            prototype,
            numbers,
            masses,
            centers=_cell_features(p, real),
            weights=real.weights,
        )


def _cell_features(p: Prototypes, real: ClassImages) -> Tensor:
    """Mean features (K, D) of the images whose latents are nearest to each centroid.

    Where none is, those of the image nearest to it. A search begins there, so that cells of another space are not
    needed.
    """
    assert real.features is not None
    cost = squared_cost(real.z.flatten(1).float(), p.centroids.flatten(1))
    cells = cost.argmin(1)
    means = real.features[cost.argmin(0)].double()
    present, labels = cells.unique(return_inverse=True)
    means[present] = cell_means(real.features.double(), labels, len(present), real.weights)
    return means


def _picked(parts: Sequence[Path], rows: Tensor, real: Tensor) -> Tensor:
    """Read images of the pool in the order of `rows`, file by file; its last are real images (n, 3, H, W) uint8."""
    images: dict[int, Tensor] = {}
    requested, first = set(rows.tolist()), 0
    for part in parts:
        batch = read_tensors(part)[0]["images"]
        images |= {first + i: batch[i].clone() for i in range(len(batch)) if first + i in requested}
        first += len(batch)
    for row in sorted(row for row in requested if row >= first):
        image = real[row - first]
        images[row] = image if batch.dtype == torch.uint8 else image.to(batch.dtype) / 255
    return torch.stack([images[row] for row in rows.tolist()])


def make_selector(run: Run, cache: LatentCache, ipc: int, resolved: ResolvedMethod, teacher: Teacher) -> Selector:
    """Make the selector of a method; computes features of real images if needed."""
    config = resolved.generate
    assert config.select_teacher is not None
    compares = config.select in BY_FEATURES
    features = features_by(run, teacher, config.select_teacher) if compares else None
    source, side = run.source, run.config.image_size
    return Selector(
        config,
        teacher,
        cache,
        ipc,
        load_pruning(run, resolved.prune),
        features,
        lambda rows: read_images(source.train, rows.tolist(), side, source.preprocess)[0],
        resolved.method.representative == "real",
    )


def selecting_teachers(run: Run) -> dict[str, Teacher]:
    """Load the selecting teachers of methods, checked on real images.

    Raises:
        InputError: if one cannot be loaded or is near chance.
    """
    loaded: dict[str, Teacher] = {}
    by_method = {}
    for method in run.config.methods:
        resolved = run.resolved(method)
        settings = selecting_teacher(resolved.method, resolved.generate)
        if settings is not None:
            key = digest_of(to_dict(settings))
            if key not in loaded:
                side = run.config.image_size
                with naming(select_setting(run.config, method)):
                    loaded[key] = load_teacher(settings, len(run.source.class_names), side, run.device)
                    cache_dir = run.config.cache_dir
                    checked_accuracy(loaded[key], run.source, settings, side, cache_dir=cache_dir)
            by_method[method] = loaded[key]
    return by_method


def selecting_teacher(method: MethodConfig, generate: GenerateConfig) -> TeacherConfig | None:
    """Settings of the teacher that selects among candidates; None without candidates."""
    return generate.select_teacher if selects(method, generate) else None


def select_setting(config: RunConfig, method: str) -> str:
    """The setting that names the selecting teacher of a method, for messages."""
    overrides = "select_teacher" in config.methods[method].override.get("generate", {})
    return f"methods.{method}.override.generate.select_teacher" if overrides else "generate.select_teacher"


def selection_summary(facts: Iterable[PlainMapping]) -> PlainDict:
    """Summarize selections of classes: settings, summed counts, means of the rest."""
    classes = list(facts)
    summary = dict(classes[0])
    for key, value in classes[0].items():
        values = [c[key] for c in classes]
        if key in SUMMED:
            summary[key] = sum(values)
        elif isinstance(value, float):
            summary[key] = sum(values) / len(values)
    return summary


def selection_sentences(summary: PlainMapping) -> list[str]:
    """Warnings about a selection."""
    sentences = []
    if summary.get("lacking"):
        lack = "no candidate" if summary["images"] == summary["prototypes"] else "fewer candidates than images"
        sentences.append(
            f"{summary['lacking']} of {summary['prototypes']} prototypes have {lack} that the teacher "
            f"{summary['teacher']} classifies rightly; the most confident others stand in"
        )
    if summary.get("unrepresented"):
        sentences.append(
            f"{summary['unrepresented']} of {summary['prototypes']} prototypes have no image, since others cover the "
            "real images better"
        )
    if summary.get("labels_too"):
        sentences.append(
            f"the teacher {summary['teacher']} that selects among candidates labels the set too, so that students "
            "gain by its own mistakes"
        )
    return sentences
