"""Accuracies of a results folder: verdicts, bars with intervals, tables, protocols."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dq.core.figures import new_figure, save_figure
from dq.core.plain import PlainDict
from dq.evaluation.figures import results_figures
from dq.evaluation.results import read_records, recipe_names
from dq.evaluation.verdicts import Ranking, Score, rankings
from dq.run.pages import Table

log = logging.getLogger("dq")

LEAST_POINTS = 5.0  # that the axis of differences reaches in both directions
WIDEST = 3.0  # half of this axis, in units of the largest difference, where intervals are wider


@dataclass(frozen=True)
class Bar:
    """Places of a set's accuracy and of its difference from random images, in percent of an axis."""

    score: Score
    name: str
    kind: str  # distilled, real or full
    length: float
    whisker: tuple[float, float] | None  # mean minus and plus the standard deviation
    point: float | None  # of the difference
    interval: tuple[float, float] | None
    cut: bool  # whether the interval is longer than the axis


@dataclass(frozen=True)
class Panel:
    """Bars of the sets of one student and number of images per class."""

    title: str
    ipc: str
    best: str  # name of the best set
    headline: str
    bars: tuple[Bar, ...]
    top: float  # percent at the end of the axis of accuracies
    reach: float  # points that the axis of differences reaches, 0 without any


def panel(ranking: Ranking) -> Panel:
    """Bars of a ranking, in its order, with full data at the end."""
    scores = [*ranking.scores, *([ranking.full] if ranking.full else [])]
    gaps = [s.gap for s in scores if s.gap is not None]
    ends = [abs(x) for g in gaps for x in (g.low, g.high) if x is not None]
    largest = max((abs(g.points) for g in gaps), default=0.0)
    reach = min(max([largest, *ends], default=0.0), max(WIDEST * largest, LEAST_POINTS)) if gaps else 0.0

    highest = max((s.mean + (s.std or 0.0) for s in scores), default=100.0)
    top = min(100.0, 10.0 * math.ceil(highest / 10 + 1e-9))

    def place(points: float) -> float:
        return 50 + 50 * max(-1.0, min(1.0, points / reach)) if reach else 50.0

    bars = []
    for s in scores:
        g, std = s.gap, s.std
        kind = "full" if s is ranking.full else "real" if s.is_real else "distilled"
        name = "all train images" if kind == "full" else s.set
        whisker = None if std is None else (100 * max(0.0, s.mean - std) / top, 100 * min(top, s.mean + std) / top)
        interval = None if g is None or g.low is None or g.high is None else (place(g.low), place(g.high))
        cut = interval is not None and g is not None and max(-(g.low or 0), g.high or 0) > reach
        point = None if g is None else place(g.points)
        bars.append(Bar(s, name, kind, 100 * s.mean / top, whisker, point, interval, cut))
    title = f"{ranking.student}, {'full data' if ranking.ipc == 'full' else f'IPC {ranking.ipc}'}"
    best = ranking.best.set if ranking.best else ""
    return Panel(title, ranking.ipc, best, ranking.headline, tuple(bars), top, reach)


def accuracy_content(
    folder: Path, outdated: Sequence[tuple[str, str]] = (), *, shown_ipc: int | None = None
) -> PlainDict:
    """Verdicts, tables and figures of the results in a folder; nothing if there are none.

    Args:
        folder: the folder.
        outdated: name and ipc of sets whose rows are left out, since they are of other images than the folder's.
        shown_ipc: images per class whose bars come first.
    """
    summary, comparisons = folder / "eval" / "summary.csv", folder / "eval" / "comparisons.csv"
    if not summary.is_file():
        return {}
    every = read_records(summary)
    records = [r for r in every if (r["set"], r["ipc"]) not in outdated]
    accuracy: PlainDict = {"outdated": "", "panels": [], "table": None, "figures": [], "differences": None}
    if len(records) < len(every):
        accuracy["outdated"] = ", ".join(f"{name} at IPC {ipc}" for name, ipc in outdated)
        log.warning(
            "%s has rows of sets that were made again since (%s); the report leaves them out",
            summary,
            accuracy["outdated"],
        )
    if not records:
        return accuracy
    compared = read_records(comparisons) if comparisons.is_file() else []
    compared = [r for r in compared if not {(r[k], r["ipc"]) for k in ("set", "against")} & set(outdated)]
    ranked = sorted(rankings(records, compared), key=lambda r: (r.ipc != str(shown_ipc), r.recipe))
    accuracy["panels"] = [panel(r) for r in ranked]
    accuracy["protocols"] = list(dict.fromkeys(f"{r.student}: {r.protocol}" for r in ranked))
    accuracy["table"], accuracy["same"] = varying(_result_table(records))
    for name, figure in results_figures(records, new_figure):
        path = folder / "figures" / f"{name}.png"
        save_figure(figure, path)
        accuracy["figures"].append(path)
    if compared:
        accuracy["differences"] = _difference_table(compared, recipe_names(records))
    return accuracy


def varying(table: Table) -> tuple[Table, str]:
    """A table without the columns whose values are all equal, and these as text.

    The first column, and all columns of a table of one row, stay.
    """
    head, rows = table
    constant = [i for i in range(1, len(head)) if len(rows) > 1 and len({str(r[i]) for r in rows}) == 1]
    same = ", ".join(f"{head[i]} {rows[0][i]}" for i in constant if str(rows[0][i]))
    columns = [i for i in range(len(head)) if i not in constant]
    return ([head[i] for i in columns], [[r[i] for i in columns] for r in rows]), same


def _result_table(records: Sequence[dict[str, str]]) -> Table:
    names = recipe_names(records)
    measures = ["last", *(["best"] if any(r["selected_on"] != "none" for r in records) else [])]
    measures += ["redundancy"] if any(r.get("redundancy_mean") for r in records) else []

    def percent(r: dict[str, str], which: str) -> str:
        if not r[f"{which}_mean"]:
            return ""
        std = f" ± {100 * float(r[f'{which}_std']):.1f}" if r[f"{which}_std"] else ""
        return f"{100 * float(r[f'{which}_mean']):.1f}{std}"

    head = ["set", "student and labels", "IPC", "images", "seeds", *(f"{which} %" for which in measures)]
    head += ["best chosen on", "label bytes"]
    rows = [
        [r["set"], names[int(r["recipe"])], r["ipc"], r["images"], r["seeds"]]
        + [percent(r, which) for which in measures]
        + [r["selected_on"], r["label_bytes"]]
        for r in records
    ]
    return head, rows


def _difference_table(compared: Sequence[dict[str, str]], names: dict[int, str]) -> tuple[Table, str]:
    head = ["set", "against", "student and labels", "IPC", "pairs", "difference, points", "interval", "verdict"]
    corrected = "verdict_holm" in compared[0]  # which files of earlier versions lack
    rows = []
    for r in compared:
        interval = f"{100 * float(r['low']):+.1f} to {100 * float(r['high']):+.1f}" if r["low"] else ""
        row = [r["set"], r["against"], names[int(r["recipe"])], r["ipc"], r["pairs"]]
        row += [f"{100 * float(r['difference']):+.1f}", interval, r["verdict"]]
        rows.append([*row, r["verdict_holm"]] if corrected else row)
    return varying(([*head, "after Holm's correction"] if corrected else head, rows))
