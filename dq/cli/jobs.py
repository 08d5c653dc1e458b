"""Parts of a verb that works on images: call, checks, plan and work."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dq.config.schema import RunConfig
    from dq.data.source import ImageSource
    from dq.diffusion.generator import LatentGenerator
    from dq.distilled.set import DistilledSet


@dataclass(frozen=True)
class Call:
    """Options, settings, images and processes of one call of a verb."""

    args: argparse.Namespace
    config: RunConfig
    source: ImageSource
    accelerator: Accelerator
    began: float  # of the command, by time.perf_counter

    @property
    def verb(self) -> str:
        return str(self.args.verb)


@dataclass(frozen=True)
class Checked:
    """What the checks of a verb have opened, so that it is not opened twice."""

    pipe: LatentGenerator | None = None
    unknown: list[str] = field(default_factory=list)  # why a plan has no generator
    sets: dict[str, DistilledSet] = field(default_factory=dict)  # of --distilled, by name


@dataclass(frozen=True)
class Job:
    """Functions of a verb that works on images.

    `check` raises what `work` would end in, before the first unit of work; a dry run calls it too.
    """

    check: Callable[[Call], Checked]
    plan: Callable[[Call, Checked], str]  # what a dry run prints
    work: Callable[[Call, Checked], None]
    check_settings: Callable[[RunConfig], None] | None = None  # before the images are opened
    fill: Callable[[Call], RunConfig] | None = None  # settings that depend on the images
    checks_counts: bool = False  # whether --like, which has counts without images, is checked too
