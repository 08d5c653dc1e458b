"""FADRM and FADRM+: pixels pushed towards teachers' statistics and classes, the start blended back in between blocks.

"FADRM: Fast and Accurate Data Residual Matching for Dataset Distillation", NeurIPS 2025, arXiv 2506.24125; settings of
the released code. With one teacher it is FADRM; with several, one per step in turn, FADRM+.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dq.config.reader import unknown_key
from dq.config.refinement import FADRM
from dq.core.errors import InputError
from dq.networks.teacher import Teacher
from dq.refine.optimize import MatchedTeacher, Progress, Refined, Schedule, check_alone, match_teachers, optimize

# Released recipes. `one` and `plus` change a preset for FADRM and FADRM+. CIFAR-10 has no recipe of its own: it takes
# CIFAR-100's with a batch of its ten classes.
_SMALL: dict[str, Any] = {"side": 32, "sizes": (32,) * 4, "steps": (500,) * 4, "lr": 0.25, "jitter": 4}
_LARGE: dict[str, Any] = {"side": 224, "sizes": (200, 224, 200, 224), "steps": (500,) * 4, "lr": 0.25, "jitter": 32}
PRESETS: dict[str, dict[str, Any]] = {
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
    """The settings with every None filled in: from the preset, else as the released recipes treat images of this side.

    Args:
        side: of the images in px.
        teachers: number of teachers that are matched.

    Raises:
        InputError: for an unknown preset, one for other images, or blocks that do not fit the images.
    """
    if config.preset is None:
        small = side <= SINGLE_SIZE
        reduced = round(side * REDUCED)
        settings: dict[str, Any] = {
            "sizes": (side,) * 4 if small else (reduced, side, reduced, side),
            "steps": (500,) * 4,
            "lr": 0.25,
            "batch_size": 100,
            "jitter": 4 if small else round(side / 7),  # 32 of 224
        }
    elif config.preset not in PRESETS:
        raise InputError(unknown_key(config.preset, config.preset, list(PRESETS)).replace("setting", "preset"))
    else:
        settings = dict(PRESETS[config.preset])
        own = {"one": settings.pop("one", {}), "plus": settings.pop("plus", {})}
        settings |= own["plus" if teachers > 1 else "one"]
        if settings.pop("side") != side and config.sizes is None:
            raise InputError(
                f"preset {config.preset!r} is for images of {PRESETS[config.preset]['side']} px, not {side}; "
                "leave preset out, or set sizes"
            )
    given = {k: getattr(config, k) for k in settings if getattr(config, k) is not None}
    if "sizes" in given and "steps" not in given:
        settings["steps"] = (settings["steps"][0],) * len(given["sizes"])
    elif "steps" in given and "sizes" not in given:
        # the last sizes of the recipe, which ends at the images' side
        sizes, blocks = settings["sizes"], len(given["steps"])
        settings["sizes"] = tuple(sizes[i % len(sizes)] for i in range(len(sizes) - blocks, len(sizes)))
    settings |= given
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


def schedule_of(config: FADRM) -> Schedule:
    """The blocks of settings that `resolve` has filled in."""
    settings = {k: getattr(config, k) for k in ("sizes", "steps", "lr", "alpha", "jitter")}
    return Schedule(**settings)


def refine(
    images: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    config: FADRM,
    teachers: Sequence[Teacher],
    *,
    critics: Sequence[MatchedTeacher] | None = None,
    anchors: Tensor | None = None,
    retrieve: Callable[[Tensor, int], Tensor] | None = None,
    seed: int = 0,
    resume: Progress | None = None,
    on_block: Callable[[Progress], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Refined:
    """Refine one batch of images; a pure function of its arguments. A batch of the paper's is one image of each of B
    classes; where there are fewer classes, several images of each make batch statistics less of a caricature.

        x <- alpha resample(x) + (1 - alpha) resample(anchor)      behind every block but the last

    Args:
        images: (B, 3, S, S) float32 in [0, 1], as many different classes as may be.
        labels: (B,) classes.
        weights: (B,) of the images in the set, for `config.weighted`; None: all alike.
        config: settings; what is None is filled in as `resolve` says.
        teachers: in evaluation mode or not; used in turn, one per step, and left as they were.
        critics: the same teachers through `match_teachers`, if that has been done.
        anchors: (B, 3, S, S) in [0, 1]; None: the images.
        retrieve: gives the anchors of each merge from the images at hand, in place of `anchors`.
        resume, on_block, on_step: see `optimize`.

    Returns:
        Images of the same shape, with the losses of all steps and the images at the end of each block.

    Raises:
        InputError: for settings or teachers that do not fit.
        RunError: if the loss stops being a number.
    """
    if critics is None:
        check_alone(config)
    if (config.anchors != "init" and anchors is None) or (config.retrieve != "none" and retrieve is None):
        raise InputError(
            f"anchors={config.anchors} and retrieve={config.retrieve} are read by a run; here, give `anchors` or "
            "`retrieve` themselves"
        )
    side = images.shape[-1]
    settings = resolve(config, side=side, teachers=len(teachers))
    schedule = schedule_of(settings)
    critics = critics or match_teachers(teachers, settings, side=side, sizes=schedule.sizes)
    anchors = images if anchors is None else anchors
    return optimize(
        anchors if config.start == "anchor" else images,
        labels,
        config=settings,
        schedule=schedule,
        critics=critics,
        choose=lambda step: step % len(teachers),  # goes on across blocks
        seed=seed,
        anchors=retrieve or anchors,
        image_weights=weights,
        resume=resume,
        on_block=on_block,
        on_step=on_step,
    )
