"""Seconds that the stages of a run will take, by speeds of a file or measured while it works."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dq.config.schema import RunConfig
from dq.core.errors import InputError, RunError
from dq.run.folder import Run
from dq.run.planning.clock import BUDGET_S
from dq.run.planning.costs import seconds_of
from dq.run.planning.timings import Speeds, measure_speeds, planned_stages

if TYPE_CHECKING:
    from dq.data.source import ImageSource
    from dq.diffusion.generator import LatentGenerator

log = logging.getLogger("dq")

PASSING_S = 0.5  # for the repeats of one operation that is measured while a run is at work


def expected_seconds(config: RunConfig, source: ImageSource, processes: int, speeds: Speeds) -> dict[str, float]:
    """Seconds by stage, without stages of unknown speed."""
    plans = planned_stages(config, source, speeds, processes)
    overlap = bool(speeds.facts.get("overlap"))
    # what no plan speaks of takes no time worth speaking of
    times: dict[str, float | None] = dict.fromkeys(("prune", "refine", "label", "evaluate", "report"), 0.0)
    times |= {p.stage: seconds_of(p, speeds.seconds, overlap=overlap) for p in plans}
    return {stage: seconds for stage, seconds in times.items() if seconds is not None}


def measured_seconds(run: Run, pipe: LatentGenerator | None) -> dict[str, float]:
    """`expected_seconds` by speeds that are measured in passing, while a run is at work.

    Each operation gets a fraction of a second; stages of unknown speed are left out.
    """
    token = BUDGET_S.set(PASSING_S)
    try:
        speeds = measure_speeds(run.config, run.source, pipe, run.device)
        return expected_seconds(run.config, run.source, run.accelerator.num_processes, speeds)
    except (InputError, RunError) as e:  # the stage that needs it will say so
        log.debug("no estimate of the remaining time: %s", e)
        return {}
    finally:
        BUDGET_S.reset(token)
