"""Figures of results: accuracy by images per class, network, and label bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from dq.core.plain import PlainDict
from dq.evaluation.results import recipe_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NewFigure: TypeAlias = "Callable[[float, float], Figure]"  # of width and height in inches

COLORS = ("#3b6ea5", "#c8553d", "#588157", "#8d6a9f", "#b8860b", "#444444", "#2a9d8f", "#a23b72")
MARKERS = "osD^vPX*"


def results_figures(records: list[dict[str, str]], new_figure: NewFigure) -> Iterable[tuple[str, Figure]]:
    """Yield (name, figure) for everything that `summary.csv` allows.

    `records` are rows as read from the file; accuracies are fractions. `new_figure` makes an empty figure.
    """
    names = recipe_names(records)
    by_recipe: dict[str, list[dict[str, str]]] = {}
    for r in records:
        by_recipe.setdefault(names[int(r["recipe"])], []).append(r)
    if len({r["ipc"] for r in records} - {"full"}) > 1:
        yield "accuracy", against_ipc(by_recipe, new_figure)
    if len(by_recipe) > 1 and len({r["student"] for r in records}) > 1:
        yield "networks", across_networks(records, new_figure)
    if len({int(r["label_bytes"]) for r in records if int(r["label_bytes"])}) > 1:
        yield "label-bytes", against_label_bytes(records, new_figure)


def against_ipc(by_recipe: dict[str, list[dict[str, str]]], new_figure: NewFigure) -> Figure:
    """Accuracy over images per class, one panel per recipe.

    Full data is a horizontal line.
    """
    drawn = new_figure(5.2 * len(by_recipe), 4)
    for ax, (recipe, rows) in zip(drawn.subplots(1, len(by_recipe), squeeze=False)[0], by_recipe.items(), strict=True):
        for i, name in enumerate(_sets(rows)):
            points = sorted((r for r in rows if r["set"] == name), key=lambda r: int(r["ipc"]))
            x = [int(r["ipc"]) for r in points]
            ax.errorbar(x, *_accuracies(points), label=name, **_style(i), capsize=3)
        for r in rows:
            if r["ipc"] == "full":
                ax.axhline(100 * float(r["last_mean"]), color="#222", lw=1, ls=":", label="all of train")
        ticks = sorted({int(r["ipc"]) for r in rows if r["ipc"] != "full"})
        ax.set(xscale="log", xlabel="images per class", ylabel="test accuracy, %", title=recipe)
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.legend(fontsize=7)
    return drawn


def across_networks(records: list[dict[str, str]], new_figure: NewFigure) -> Figure:
    """Bars per network and set at each number of images per class."""
    ipcs = sorted({int(r["ipc"]) for r in records if r["ipc"] != "full"})
    names = recipe_names(records)
    drawn = new_figure(max(7, 1.6 * len({r["student"] for r in records}) * len(ipcs)), 3.6)
    for ax, ipc in zip(drawn.subplots(1, len(ipcs), squeeze=False)[0], ipcs, strict=True):
        rows = [r for r in records if r["ipc"] == str(ipc)]
        recipes = list(dict.fromkeys(int(r["recipe"]) for r in rows))
        sets = _sets(records)
        width = 0.8 / len(sets)
        for i, name in enumerate(sets):
            points = [r for r in rows if r["set"] == name]
            x = [recipes.index(int(r["recipe"])) + (i - (len(sets) - 1) / 2) * width for r in points]
            height, error = _accuracies(points)
            ax.bar(x, height, width, yerr=error, label=name, color=COLORS[i % len(COLORS)], capsize=2)
        ax.set(ylabel="test accuracy, %", title=f"{ipc} images per class")
        ax.set_xticks(range(len(recipes)), [names[n] for n in recipes], fontsize=8)
        ax.legend(fontsize=7)
    return drawn


def against_label_bytes(records: list[dict[str, str]], new_figure: NewFigure) -> Figure:
    """Accuracy over the bytes of stored labels, for sets with them."""
    drawn = new_figure(7, 4)
    ax = drawn.subplots()
    rows = [r for r in records if int(r["label_bytes"]) and r["ipc"] != "full"]
    for i, key in enumerate(dict.fromkeys((r["set"], r["ipc"]) for r in rows)):
        points = sorted((r for r in rows if (r["set"], r["ipc"]) == key), key=lambda r: int(r["label_bytes"]))
        x = [int(r["label_bytes"]) for r in points]
        ax.errorbar(x, *_accuracies(points), label=f"{key[0]}, IPC {key[1]}", **_style(i), capsize=3)
    ax.set(xscale="log", xlabel="bytes of soft labels", ylabel="test accuracy, %")
    ax.legend(fontsize=7)
    return drawn


def _sets(rows: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(r["set"] for r in rows if r["ipc"] != "full"))


def _accuracies(rows: list[dict[str, str]]) -> tuple[list[float], list[float]]:
    """Means and standard deviations in percent (0 for a single seed)."""
    return [100 * float(r["last_mean"]) for r in rows], [100 * float(r["last_std"] or 0) for r in rows]


def _style(i: int) -> PlainDict:
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "ms": 5, "lw": 1.2}
