"""Records of `gpu_session.py`, and the tables of what they say.

They are read and written without `dq.core.files`, which needs torch and xxhash, as a session records what a machine
lacks.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dq.core.text import markdown_table

UNITS = {"gemm_bf16": "TFLOP/s", "gemm_tf32": "TFLOP/s", "gemm_float32": "TFLOP/s", "conv_bf16": "TFLOP/s"}
UNITS |= {"conv_tf32": "TFLOP/s", "copy": "GB/s", "pageable": "GB/s", "pinned": "GB/s"}


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line of JSON to a file; the line is on the disk when this returns."""
    with open(path, "a") as f:
        f.write(json.dumps(row) + "\n")
        f.flush()
        os.fsync(f.fileno())


def read_records(path: Path) -> list[dict[str, Any]]:
    """Rows in their order, without lines that a kill has cut."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def summary(records: Sequence[dict[str, Any]], items: Iterable[tuple[int, str, str]]) -> str:
    """The tables in Markdown, by card.

    Args:
        records: rows of `records.jsonl`; the last of a name counts.
        items: part, name and command of everything that can be measured.
    """
    lines = ["# Measurements on a GPU", ""]
    if any(r.get("tiny") for r in records):
        lines += ["A rehearsal in tiny sizes: these numbers mean nothing.", ""]
    for card in dict.fromkeys(r.get("card") for r in records):
        rows = [r for r in records if r.get("card") == card]
        lines += [f"## {card or 'No card'}", "", *_ceilings(rows), *_timings(rows), *_numbers(rows)]
        lines += _outcomes(rows, items)
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    cells = [[("" if v is None else str(v)).replace("|", "/").replace("\n", " ") for v in row] for row in rows]
    return [markdown_table(head, cells), ""]


def _ceilings(rows: Sequence[dict[str, Any]]) -> list[str]:
    measured = [r for r in rows if "ceilings" in r]
    if not measured:
        return []
    values = measured[-1]["ceilings"]
    cells = [(k, f"{v / (1e12 if UNITS[k] == 'TFLOP/s' else 1e9):.1f}", UNITS[k]) for k, v in values.items()]
    versions = ", ".join(f"{k} {v}" for k, v in measured[-1]["versions"].items() if v)
    return [f"{versions}.", "", *_table(("ceiling", "measured", "unit"), cells)]


def _timings(rows: Sequence[dict[str, Any]]) -> list[str]:
    timed = {r["name"]: r for r in rows if r.get("status") in ("measured", "out of memory")}
    if not timed:
        return []
    cells = []
    for name, r in timed.items():
        if r["status"] == "out of memory":
            cells.append((name, "out of memory", *[None] * 6))
            continue
        reference = timed.get(r.get("against") or "")
        ratio = reference["median_s"] / r["median_s"] if reference and "median_s" in reference else None
        memory = None
        if reference and r["peak_bytes"] and reference.get("peak_bytes"):
            memory = r["peak_bytes"] / reference["peak_bytes"]
        parity = "; ".join(f"{k} {v:.1e}" for k, v in r["parity"].items())
        peak = f"{r['peak_bytes'] / 2**30:.2f}" if r["peak_bytes"] else None
        spread = f"{r['median_s']:.4g} ({r['least_s']:.4g} to {r['most_s']:.4g}, {r['repeats']})"
        share = f"{r['share']:.2f}" if r.get("share") else None
        rate = f"{r['per_second']:.4g} {r['unit']}/s"
        cells.append((name, spread, rate, *(None if v is None else f"{v:.2f}" for v in (ratio, memory)), peak, share))
        cells[-1] = (*cells[-1], parity)
    head = ("what", "median s (least to most, repeats)", "rate", "times as fast as its reference")
    return _table((*head, "memory against it", "peak GiB", "share of roofline", "difference"), cells)


def _numbers(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of numbers that are no timings."""
    numbers = {r["name"]: r["numbers"] for r in rows if "numbers" in r}
    cells = [(n, "; ".join(f"{k} {_short(v)}" for k, v in values.items())) for n, values in numbers.items()]
    return _table(("what", "numbers"), cells) if cells else []


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _outcomes(rows: Sequence[dict[str, Any]], items: Iterable[tuple[int, str, str]]) -> list[str]:
    """What became of every item, with the command that measures what is missing."""
    ended = {r["item"]: r for r in rows if "part" in r}
    cells = []
    for part, name, command in items:
        r = ended.get(name, {"status": "not run", "reason": "", "seconds": 0.0})
        again = None if r["status"] == "done" else f"`{command}`"
        reason = r["reason"].splitlines()[-1][-160:] if r["reason"] else None
        cells.append((name, part, r["status"], f"{r['seconds']:.0f}", reason, again))
    return _table(("item", "part", "outcome", "s", "why", "command that measures it"), cells)


if __name__ == "__main__":
    raise SystemExit("gpu_summary is a module of gpu_session.py; run that")
