"""FADRM and FADRM+: batch norm statistics matching with residual merges.

"FADRM: Fast and Accurate Data Residual Matching for Dataset Distillation", NeurIPS 2025, arXiv 2506.24125; settings of
the released code. With one teacher it is FADRM; with several, one per step in turn, FADRM+.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from dq.config.refinement import FADRM
from dq.config.validation import unknown_key
from dq.core.errors import InputError
from dq.core.plain import PlainDict
from dq.networks.teacher import Teacher
from dq.refine.anchors import make_pool, nearest_anchors
from dq.refine.batches import largest_batch
from dq.refine.matched import (
    MatchedTeacher,
    alone,
    check_alone,
    match_teachers,
    matched_teachers,
    matching_facts,
    with_statistics,
)
from dq.refine.matching import resolve_depth
from dq.refine.method import (
    AnchorNeeds,
    Batch,
    Context,
    Cost,
    GroupNeeds,
    Method,
    Needs,
    Refined,
    Resources,
    Session,
)
from dq.refine.optimize import Matching, optimize
from dq.refine.views import Schedule

# Released recipes. `one` and `plus` change a preset for FADRM and FADRM+. CIFAR-10 has no recipe of its own: it takes
# CIFAR-100's with a batch of its ten classes.
_SMALL: PlainDict = {"side": 32, "sizes": (32,) * 4, "steps": (500,) * 4, "lr": 0.25, "jitter": 4}
_LARGE: PlainDict = {"side": 224, "sizes": (200, 224, 200, 224), "steps": (500,) * 4, "lr": 0.25, "jitter": 32}
PRESETS: dict[str, PlainDict] = {
    "cifar10": {**_SMALL, "batch_size": 10},
    "cifar100": {**_SMALL, "batch_size": 100},
    "tinyimagenet": {
        "side": 64,
        "batch_size": 100,
        "jitter": 4,
        "one": {"sizes": (64,) * 2, "steps": (500,) * 2, "lr": 0.01},
        "plus": {"sizes": (64,) * 4, "steps": (500,) * 4, "lr": 0.25},
    },
    "imagenette": {**_LARGE, "batch_size": 10, "one": {"lr": 0.05}},
    "imagewoof": {**_LARGE, "batch_size": 10},
    "imagenet1k": {**_LARGE, "batch_size": 100},
}
SINGLE_SIZE = 64  # px up to which all blocks have the size of the images
REDUCED = 200 / 224  # smaller side of multi-resolution blocks, of the images'


def resolve(config: FADRM, *, side: int, teachers: int) -> FADRM:
    """Fill in every None of the settings.

    From the preset, else as the released recipes treat images of this side.

    Args:
        config: settings.
        side: of the images in px.
        teachers: number of teachers that are matched.

    Raises:
        InputError: for an unknown preset, one for other images, or blocks that do not fit the images.
    """
    settings = _recipe(config, side, teachers)
    explicit = {k: getattr(config, k) for k in settings if getattr(config, k) is not None}
    if "sizes" in explicit and "steps" not in explicit:
        settings["steps"] = (settings["steps"][0],) * len(explicit["sizes"])
    elif "steps" in explicit and "sizes" not in explicit:
        # the last sizes of the recipe, which ends at the images' side
        sizes, blocks = settings["sizes"], len(explicit["steps"])
        settings["sizes"] = tuple(sizes[i % len(sizes)] for i in range(len(sizes) - blocks, len(sizes)))
    settings |= explicit
    if settings["sizes"][-1] != side:
        raise InputError(
            f"the last of sizes={list(settings['sizes'])} must be the side of the images, {side} px; "
            "a refined image has the size of its start"
        )
    if len(settings["sizes"]) != len(settings["steps"]):
        raise InputError(
            f"sizes={list(settings['sizes'])} has {len(settings['sizes'])} blocks but "
            f"steps={list(settings['steps'])} has {len(settings['steps'])}; give one of each per block"
        )
    return dataclasses.replace(config, **settings)


def _recipe(config: FADRM, side: int, teachers: int) -> PlainDict:
    """Open settings from the preset, or for images of this side."""
    if config.preset is None:
        small = side <= SINGLE_SIZE
        reduced = round(side * REDUCED)
        return {
            "sizes": (side,) * 4 if small else (reduced, side, reduced, side),
            "steps": (500,) * 4,
            "lr": 0.25,
            "batch_size": 100,
            "jitter": 4 if small else round(side / 7),  # 32 of 224
        }
    if config.preset not in PRESETS:
        raise InputError(unknown_key(config.preset, config.preset, list(PRESETS), kind="preset"))
    settings = dict(PRESETS[config.preset])
    changes = {"one": settings.pop("one", {}), "plus": settings.pop("plus", {})}
    settings |= changes["plus" if teachers > 1 else "one"]
    if settings.pop("side") != side and config.sizes is None:
        raise InputError(
            f"preset {config.preset!r} is for images of {PRESETS[config.preset]['side']} px, not {side}; "
            "leave preset out, or set sizes"
        )
    return settings


def schedule_of(config: FADRM) -> Schedule:
    """The blocks of settings that `resolve` has filled in."""
    settings = {k: getattr(config, k) for k in ("sizes", "steps", "lr", "alpha", "jitter")}
    return Schedule(**settings)


def refine(
    batch: Batch,
    config: FADRM,
    teachers: Sequence[Teacher],
    session: Session | None = None,
    *,
    matched: Sequence[MatchedTeacher] | None = None,
    retrieve: Callable[[Tensor, int], Tensor] | None = None,
) -> Refined:
    """Refine one batch by FADRM; a pure function of its arguments.

        x <- alpha resample(x) + (1 - alpha) resample(anchor)      behind every block but the last

    A batch of the paper's is one image of each of B classes; where there are fewer classes, several images of each
    bring batch statistics nearer to those of the data.

    Args:
        batch: images, as many different classes as may be; their anchors, or None for the images themselves; and
            weights for `config.weighted`.
        config: settings; what is None is filled in as `resolve` says.
        teachers: in evaluation mode or not; used in turn, one per step, and left as they were.
        session: seed, state to resume from and callbacks.
        matched: the same teachers through `match_teachers`, if that has been done.
        retrieve: gives the anchors of each merge from the present images, in place of those of the batch.

    Returns:
        Images of the same shape, with the losses of all steps and the images at the end of each block.

    Raises:
        InputError: for settings or teachers that do not fit.
        RunError: if the loss stops being a number.
    """
    if matched is None:
        check_alone(config)
    if (config.anchors != "init" and batch.anchors is None) or (config.retrieve != "none" and retrieve is None):
        raise InputError(
            f"anchors={config.anchors} and retrieve={config.retrieve} are read by a run; here, give `Batch.anchors` "
            "or `retrieve`"
        )
    side = batch.images.shape[-1]
    settings = resolve(config, side=side, teachers=len(teachers))
    schedule = schedule_of(settings)
    matched = matched or match_teachers(teachers, settings, side=side, sizes=schedule.sizes)
    anchors = batch.images if batch.anchors is None else batch.anchors
    return optimize(
        anchors if config.start == "anchor" else batch.images,
        batch.labels,
        Matching(settings, schedule, matched, lambda step: step % len(teachers)),  # goes on across blocks
        session or Session(),
        anchors=retrieve or anchors,
        image_weights=batch.weights,
    )


def _retrieval(batch: Batch, stage: FADRM, resources: Resources) -> Callable[[Tensor, int], Tensor] | None:
    """Retrieval of the nearest candidates at each merge; None without candidates."""
    if resources.candidates is None:
        return None
    images, teacher = list(resources.candidates), resources.matched[0]
    pool = resources.once("pool", lambda: make_pool(images, teacher))

    def retrieve(x: Tensor, merge: int) -> Tensor:
        return nearest_anchors(x, batch.labels, pool, teacher, stage.retrieve_complexity)

    return retrieve


class FadrmMethod(Method):
    """FADRM, and FADRM+ with several teachers, as a stage of a run."""

    config = FADRM

    def resolve(self, stage: FADRM, context: Context) -> FADRM:
        return resolve_depth(resolve(stage, side=context.side, teachers=context.matched), context)

    def needs(self, stage: FADRM) -> Needs:
        patches: dict[str, int | None] = {}
        if stage.anchors == "real_patch":
            patches["anchors"] = None
        if stage.retrieve == "patches":
            patches["candidates"] = stage.retrieve_pool
        anchors = AnchorNeeds(
            patches,
            stage.anchor_rank,
            source={"init": None, "real_patch": "anchors", "group": "group", "file": "file"}[stage.anchors],
            file=stage.anchor_path,
            candidates={"none": None, "patches": "candidates", "prototypes": "set"}[stage.retrieve],
        )
        groups = None if stage.groups == "none" else GroupNeeds(stage.groups, stage.statistics == "group")
        return Needs(class_features=stage.class_weight > 0, anchors=anchors, groups=groups)

    def prepare(self, stage: FADRM, resources: Resources, first: Batch, *, seed: int) -> PlainDict:
        if stage.start == "anchor" and first.anchors is not None:
            first = dataclasses.replace(first, images=first.anchors)
        return matching_facts(stage, schedule_of(stage), resources, first, seed=seed)

    def run(self, batch: Batch, stage: FADRM, resources: Resources, session: Session) -> Refined:
        matched = matched_teachers(stage, schedule_of(stage), resources)
        if batch.anchors is None:
            batch = dataclasses.replace(batch, anchors=batch.images)
        return refine(
            batch,
            stage,
            resources.matched,
            session,
            matched=with_statistics(matched, batch.statistics),
            retrieve=_retrieval(batch, stage, resources),
        )

    def brief(self, stage: FADRM) -> FADRM:
        steps = (2,) * len(stage.steps or ())
        return alone(stage, anchors="init", anchor_path=None, retrieve="none", steps=steps)

    def cost(self, stage: FADRM, context: Context) -> Cost:
        return Cost(
            sum(schedule_of(stage).steps), largest_batch(stage.compose, stage.batch_size or 1, context.classes)
        )
