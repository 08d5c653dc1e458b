"""Experiment trackers: TensorBoard, Trackio and Weights & Biases.

The trackers are accelerate's and hang on the accelerator that every stage has; without any, `report` does nothing and
no tracker is imported. A tracker that fails later is left out with one warning: a run outlives its audience.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq.core.errors import InputError
from dq.core.plain import PlainMapping

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dq")

TRACKERS = ("trackio", "tensorboard", "wandb")
PROJECT = "dq"
SECRET = re.compile(r"token|secret|passw|credential|api_?key", re.IGNORECASE)
USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not there, before any work begins.

    Raises:
        InputError: with the command that installs the first of them.
    """
    missing = next((name for name in names if not is_installed(name)), None)
    if missing:
        raise InputError(f"report_to names {missing}, which is not installed; pip install {missing}")


def start_trackers(accelerator: Accelerator, names: Sequence[str], settings: PlainMapping, folder: Path) -> None:
    """Start trackers on the accelerator with a run's settings; their files go below `folder`/logs.

    Raises:
        InputError: if one is not installed or cannot start.
    """
    end_trackers(accelerator)  # those of a part of the command that is over
    names = list(dict.fromkeys(names))
    check_trackers(names)
    if not names or not accelerator.is_main_process:
        return
    from accelerate.tracking import filter_trackers

    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRACKIO_DIR", str(logs / "trackio"))  # read at its import; else in the Hub's cache
    accelerator.log_with = filter_trackers(names, str(logs))
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.project_configuration.logging_dir = str(logs)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
            accelerator.init_trackers(
                PROJECT, config=flat_settings(settings), init_kwargs={"wandb": {"dir": str(logs)}}
            )
    except Exception as e:  # a tracker raises what it likes
        raise InputError(
            f"the tracker {', '.join(names)} cannot start ({_first_line(e)}); check its login and the network, or "
            "leave out --report_to"
        ) from e


def report(accelerator: Accelerator, values: PlainMapping, step: int | None = None) -> None:
    """Send the finite ones of some numbers to the trackers of this process."""
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
    for tracker in list(accelerator.trackers) if numbers else ():
        try:
            tracker.log(numbers, step=step)
        except Exception as e:  # the network, a full disk, a service: none of it may end a run
            _drop(accelerator, tracker, e)


def end_trackers(accelerator: Accelerator) -> None:
    """Let the trackers finish."""
    for tracker in list(accelerator.trackers):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                tracker.finish()
        except Exception as e:  # as above
            _drop(accelerator, tracker, e)
    accelerator.trackers = []


def _drop(accelerator: Accelerator, tracker: Any, error: Exception) -> None:
    accelerator.trackers.remove(tracker)
    log.warning(
        "note: the tracker %s failed (%s) and is left out from here on; metrics.jsonl has all numbers",
        tracker.name,
        _first_line(error),
    )


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"


# --- what is sent -------------------------------------------------------------------------------------------------


def flat_settings(settings: PlainMapping) -> dict[str, str | int | float | bool]:
    """All settings by dotted name, as values that every tracker takes, without secrets."""
    return dict(_flat(settings))


def _flat(node: object, prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        name = f"{prefix}{key}"
        if SECRET.search(str(key)):
            continue
        if isinstance(value, dict | list) and value:
            yield from _flat(value, f"{name}.")
        elif isinstance(value, str):
            yield name, USER_IN_URL.sub("", value)
        else:
            yield name, value if isinstance(value, int | float) else json.dumps(value)


def stage_numbers(stage: str, seconds: float, numbers: PlainMapping) -> dict[str, float]:
    """What is sent at the end of a stage: seconds, counts, and counts per second."""
    counts = {k: v for k, v in numbers.items() if isinstance(v, int | float)}
    rates = {f"{k}_per_s": v / seconds for k, v in counts.items() if seconds > 0}
    return {f"{stage}/{k}": float(v) for k, v in ({"seconds": seconds} | counts | rates).items()}
