"""Settings of a run: those that differ from their defaults, and seconds of its stages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq.config.reader import to_dict
from dq.config.schema import RunConfig
from dq.core.files import read_jsonl
from dq.core.plain import PlainMapping
from dq.core.progress import duration
from dq.run.pages import Table

LONGEST = 160  # characters of a value
WITHIN = ("features",)  # stages whose time is part of another's


def changed_settings(config: RunConfig) -> Table:
    """Settings whose value is not the default, with both."""
    values, defaults = (dict(_flat(to_dict(c))) for c in (config, RunConfig()))
    missing = object()
    keys = [k for k, v in values.items() if defaults.get(k, missing) != v]
    rows = [[k, _text(values[k]), _text(defaults[k]) if k in defaults else ""] for k in keys]
    return ["setting", "value", "default"], rows


def _flat(settings: PlainMapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; lists stay whole."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]} …"


@dataclass(frozen=True)
class StageTime:
    """Seconds of a stage over all commands on a folder."""

    stage: str
    text: str
    share: float  # percent of the longest stage
    calls: int


def stage_times(metrics: Path) -> tuple[list[StageTime], str]:
    """Time by stage from `metrics.jsonl`, and the sum in words."""
    seconds: dict[str, list[float]] = {}
    for r in read_jsonl(metrics):
        timed = isinstance(r, dict) and isinstance(r.get("seconds"), int | float)
        if timed and isinstance(r.get("stage"), str) and r["stage"] not in WITHIN:
            seconds.setdefault(r["stage"], []).append(float(r["seconds"]))
    sums = {stage: sum(s) for stage, s in seconds.items()}
    longest = max(sums.values(), default=0.0) or 1.0
    times = [StageTime(k, duration(s), 100 * s / longest, len(seconds[k])) for k, s in sums.items()]
    return times, duration(sum(sums.values()))
