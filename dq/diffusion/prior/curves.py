"""Loss curves of a prior's trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dq.core.figures import new_figure, save_figure
from dq.core.files import read_jsonl

Curves = dict[str, dict[str, list[tuple[int, float]]]]  # stage -> key -> (step, value)


def read_curves(path: Path) -> Curves:
    """Losses over steps, by stage, of a training's `metrics.jsonl`.

    These are `loss`, `held_out...` and `grad_norm`; {} without such a file. Of a step that was logged twice the later
    record counts.
    """
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for r in read_jsonl(path):
        for key, value in r.items():
            is_curve = key in ("loss", "grad_norm") or key.startswith("held_out")
            if is_curve and "step" in r and isinstance(value, int | float):
                curves.setdefault(r["stage"], {}).setdefault(key, {})[r["step"]] = float(value)
    return {s: {k: sorted(v.items()) for k, v in keys.items()} for s, keys in curves.items()}


def loss_figure(curves: Curves) -> Any:
    """One column per stage: losses above, the norm of the gradient below."""
    figure = new_figure(5.2 * len(curves), 5)
    panels = figure.subplots(2, len(curves), squeeze=False, sharex="col", height_ratios=(3, 1))
    for column, (stage, keys) in enumerate(curves.items()):
        upper, lower = panels[0][column], panels[1][column]
        for key, points in keys.items():
            ax = lower if key == "grad_norm" else upper
            ax.plot(*zip(*points, strict=True), label=key.replace("_", " "), lw=1.2)
        upper.set(title=stage, ylabel="loss")
        lower.set(xlabel="step", ylabel="gradient")
        for ax in (upper, lower):
            values = [v for line in ax.lines for v in line.get_ydata()]
            if values and min(values) > 0:
                ax.set_yscale("log")
        if upper.lines:
            upper.legend(fontsize=8)
    return figure


def draw_curves(metrics: Path, picture: Path) -> bool:
    """Write the curves of a `metrics.jsonl` as PNG, if any.

    Returns:
        Whether there were any.
    """
    curves = read_curves(metrics)
    if curves:
        save_figure(loss_figure(curves), picture)
    return bool(curves)
