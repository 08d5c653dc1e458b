"""The contract of a method of refinement.

A method is one file of this package that can be read beside its paper, and one entry of
`dq.refine.registry.METHODS`. The refine stage of a run (`dq.run.stages.refine`) does the rest: files, resuming,
division over processes, measures, provenance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dq.config.refinement import RefineConfig
from dq.config.students import LabelKind
from dq.core.plain import PlainDict, PlainMapping
from dq.core.seeds import derive_seed
from dq.diffusion.image_codec import ImageCodec
from dq.networks.patches import Rank
from dq.networks.teacher import Teacher
from dq.networks.trajectories import Experts
from dq.refine.batches import Rows, compose_batches
from dq.refine.moments import Moments

V = TypeVar("V")


@dataclass(frozen=True)
class Context:
    """Properties of the images that are known before anything is loaded."""

    side: int  # of an image, px
    matched: int  # networks that the stage matches
    ipc: int | None = None  # images per class; None: not one number
    classes: int | None = None
    class_size: int | None = None  # mean number of train images of a class


@dataclass(frozen=True)
class AnchorNeeds:
    """Images that are blended into those that are refined, or candidates for them."""

    patches: Mapping[str, int | None] = field(default_factory=dict)  # real patches per class by name; None: as images
    rank: Rank = "easy"  # which patches come first
    # which of `patches`, "file", or "group", patches of the groups, are the anchors of the images; None: the images
    source: str | None = None
    file: str | None = None  # a set whose images, class by class, are the anchors
    candidates: str | None = None  # which of `patches`, or "set", are candidate anchors of a class


@dataclass(frozen=True)
class GroupNeeds:
    """Groups of the real images of a class, one per image."""

    by: str  # "gps" or "cells"
    statistics: bool = False  # batch norm statistics of the groups, in `Batch.statistics`


@dataclass(frozen=True)
class Needs:
    """What the run has to load for a stage."""

    teachers: bool = True  # those of the stage, else those of the run
    class_features: bool = False  # mean features of the real images of each class
    real_images: bool = False  # all train images, in memory
    experts: str | None = None  # folder of trajectories
    codec: bool = False  # the run's autoencoder
    anchors: AnchorNeeds = AnchorNeeds()
    groups: GroupNeeds | None = None


@dataclass(frozen=True)
class Cost:
    """Number of steps and of images in a step, for plans and estimates."""

    steps: int  # forward and backward passes over every image
    batch_size: int | None  # images of a batch; None: the whole set
    checks: int = 0  # networks that are trained on the set in between, whose time no estimate has


@dataclass(frozen=True)
class RealImages:
    """The train images of a run, at the size of its images."""

    images: Tensor  # (N, 3, S, S) uint8
    labels: Tensor  # (N,) int64


@dataclass(frozen=True)
class Batch:
    """Images that are refined together."""

    images: Tensor  # (B, 3, S, S) float32 in [0, 1]
    labels: Tensor  # (B,) int64
    weights: Tensor | None = None  # (B,) in the set, for stages with `weighted`
    anchors: Tensor | None = None  # (B, 3, S, S) float32 in [0, 1], of `AnchorNeeds.source`
    # of `GroupNeeds.statistics`: for each matched teacher, moments (sum C_l,) of its batch norm layers' inputs
    statistics: tuple[Moments, ...] | None = None


@dataclass(frozen=True)
class State:
    """State from which an interrupted batch resumes, kept in a file."""

    tensors: dict[str, Tensor]
    facts: PlainDict  # plain data
    steps: int  # that are done


@dataclass(frozen=True)
class Refined:
    """The result of a method for a batch."""

    images: Tensor  # (B, 3, S, S) float32 in [0, 1], unless not `bounded`
    trace: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # (steps, terms) float32 terms of the loss
    terms: tuple[str, ...] = ()  # names of the columns of the trace
    blocks: Tensor | None = None  # (k, n, 3, S, S) in [0, 1]: the first images of the batch, start to end
    soft_labels: Tensor | None = None  # (B, C) label vectors of the images
    label_kind: LabelKind = "logits"  # what these are
    step_size: float | None = None  # learned learning rate of a student, where the batch is the whole set
    precision: str = "float32"  # of the teachers
    bounded: bool = True  # False: pixels may leave [0, 1] and are stored as floats
    uniform_weights: bool = False  # the images weigh alike from now on, whatever the weights of their prototypes
    facts: PlainMapping = field(default_factory=dict)  # plain data for the record of the stage
    preprocessing: Mapping[str, Tensor] = field(default_factory=dict)  # by which networks see the images, for a file


def _ignore(_: object) -> None:
    pass


@dataclass(frozen=True)
class Session:
    """Seed, resume point and callbacks of the refinement of one batch."""

    seed: int = 0
    resume: State | None = None  # None: from the start
    step: Callable[[int], None] = _ignore  # called with the number of each step that is done, from 0
    save: Callable[[State], None] = _ignore  # called with states from which the batch could resume

    def derived(self, name: str) -> Session:
        """This session with a seed of its own for a method."""
        return dataclasses.replace(self, seed=derive_seed(self.seed, name))


@dataclass(frozen=True)
class Resources:
    """Models and data that are the same for all batches of a stage."""

    side: int  # of an image, px
    classes: int
    teachers: tuple[Teacher, ...] = ()  # all of the stage; those with `matched` are matched, all may label
    candidates: tuple[Tensor, ...] | None = None  # (P_c, 3, S, S) uint8 by class
    class_means: tuple[Tensor, ...] | None = None  # (C, d) mean features of real images, by matched teacher
    facts: PlainMapping = field(default_factory=dict)  # of `Method.prepare`
    real: RealImages | None = None  # of `Needs.real_images`
    experts: Experts | None = None  # of `Needs.experts`
    codec: ImageCodec | None = None  # of `Needs.codec`
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # for methods without teachers
    _memory: PlainDict = field(default_factory=dict)

    @property
    def matched(self) -> tuple[Teacher, ...]:
        return tuple(t for t in self.teachers if t.matched)

    def once(self, key: str, make: Callable[[], V]) -> V:
        """The result of `make`, called once and kept for the other batches."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]


class Method(Protocol):
    """A method of refinement.

    The defaults suit a method of batches of at most `stage.batch_size` images.
    """

    config: type[RefineConfig]  # its settings

    def resolve(self, stage: Any, context: Context) -> Any:
        """Fill in every None of the settings.

        Raises:
            InputError: if they do not fit the images.
        """
        return stage

    def needs(self, stage: Any) -> Needs:
        """What the run has to load."""
        return Needs()

    def batches(self, stage: Any, counts: Sequence[int]) -> list[Rows]:
        """Compose batches, lists of (class, rank in the class), from the images of each class.

        `stage` has been filled in by `resolve`.
        """
        size = getattr(stage, "batch_size", None) or sum(counts)
        return compose_batches(counts, size, compose=stage.compose, min_classes=stage.min_classes)

    def prepare(self, stage: Any, resources: Resources, first: Batch, *, seed: int) -> PlainDict:
        """Plain data that all batches share, computed once from the first batch.

        An entry `teachers` has a mapping for each matched teacher.
        """
        return {}

    def run(self, batch: Batch, stage: Any, resources: Resources, session: Session) -> Refined:
        """Refine one batch: a pure function of its arguments, whatever the callbacks do."""
        ...

    def brief(self, stage: Any) -> Any:
        """The settings with a few steps of every kind, for timing."""
        return stage

    def cost(self, stage: Any, context: Context) -> Cost:
        """Number of steps and batch size, of settings that `resolve` has filled in."""
        ...
