"""Stages of refinement: images before and after, measures, losses."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq.core.figures import new_figure, save_figure, save_image
from dq.core.files import read_json, read_tensors
from dq.core.plain import PlainDict
from dq.data.grid import image_grid
from dq.run.folder import Run, class_file
from dq.run.pages import Table
from dq.run.refinement import Trace, read_trace, refined_folders
from dq.run.sections.pictures import PictureClass, picture_row

MAX_CLASSES, MAX_COLUMNS = 5, 10  # of the images before and after
TRACE_PARTS = 5  # of the steps of a refinement, whose means are printed
NOT_FACTS = ("method", "from", "checks", "images", "batches", "before", "after", "checksum")  # of a refined folder


def refinement_content(run: Run, shown_ipc: int) -> list[PlainDict]:
    """Content of every stage of refinement that is finished, those of the shown images per class first."""
    titles = sorted(refined_folders(run).items(), key=lambda item: f", IPC {shown_ipc}:" not in item[0])
    return [_stage(run, title, folder) for title, folder in titles]


def _stage(run: Run, title: str, folder: Path) -> PlainDict:
    """Facts of a refined folder.

    They are images and measures before and after, losses over steps, images after each block, and records of the
    method.
    """
    summary = read_json(folder / "summary.json")
    rows = []
    for group in ("teachers", "validation_teachers"):
        for a, b in zip(summary["before"][group], summary["after"][group], strict=True):
            accuracies = [f"{100 * x['accuracy']:.1f} %" for x in (a, b)]
            entropies = [f"{x['cross_entropy']:.3f}" for x in (a, b)]
            rows.append([f"{a['name']} ({group[:-1].replace('_', ' ')})", *accuracies, *entropies])
    for key, what in (("variation", "total variation"), ("anchor_distance", "distance to the anchor")):
        rows.append([f"{what}, gray levels", *(f"{summary[w][key]:.2f}" for w in ("before", "after")), "", ""])
    head = ["", "before", "after", "CE before", "CE after"]
    if not any(r[3] for r in rows):
        head, rows = head[:3], [r[:3] for r in rows]
    trace = read_trace(folder)
    losses = run.folder / "figures" / f"{folder.name}-losses.png" if len(trace.losses) else None
    if losses:
        save_figure(_loss_figure(trace), losses)
    blocks = run.folder / "figures" / f"{folder.name}-blocks.png" if losses and trace.blocks is not None else None
    if blocks and trace.blocks is not None:
        scale = max(1, round(64 / trace.blocks.shape[-1]))
        save_image(image_grid([list(images) for images in trace.blocks], scale=scale), blocks)
    checks = [[steps, f"{100 * accuracy:.1f} %"] for steps, accuracy in summary.get("checks") or ()]
    return {
        "title": title,
        "classes": _before_and_after(run, folder.parent / summary["from"], folder),
        "measures": (head, rows),
        "checks": (["steps", "held-out train images, networks trained on the set"], checks) if checks else None,
        "facts": _recorded(summary),
        "trace": _trace_table(trace) if losses else None,
        "losses": losses,
        "blocks": blocks,
    }


def _before_and_after(run: Run, before: Path, after: Path) -> list[PictureClass]:
    """The first images of some classes in two folders of images."""
    classes = []
    for label, name in enumerate(run.source.class_names[:MAX_CLASSES]):
        rows = []
        for kind, folder in (("before", before), ("after", after)):
            images = _as_uint8(read_tensors(class_file(folder, label))[0]["images"][:MAX_COLUMNS])
            alts = [f"class {name}, image {i + 1} {kind} refinement" for i in range(len(images))]
            rows.append(picture_row(kind, list(images), alts))
        classes.append(PictureClass(name, tuple(rows)))
    return classes


def _as_uint8(images: Tensor) -> Tensor:
    return images if images.dtype == torch.uint8 else (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def _recorded(summary: PlainDict) -> str:
    """What a method records of its work on the whole set: skipped steps, ..."""
    shown = {k: v for k, v in summary.items() if k not in NOT_FACTS and not isinstance(v, dict)}
    parts = [f"{k.replace('_', ' ')} {', '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in shown.items()]
    return "; ".join(parts)


def _trace_table(trace: Trace) -> Table:
    """Terms in five parts of the steps, as means."""
    steps = len(trace.losses)
    ends = sorted({max(1, round(steps * i / TRACE_PARTS)) for i in range(1, TRACE_PARTS + 1)})
    rows = []
    for first, end in pairwise((0, *ends)):
        values = trace.losses[first:end].mean(0).tolist()
        rows.append([f"{first + 1} to {end}", *(f"{v:.4g}" for v in values)])
    return ["steps", *(t.replace("_", " ") for t in trace.terms)], rows


def _loss_figure(trace: Trace) -> Any:
    """Mean loss terms (steps, terms) over steps."""
    figure = new_figure(8, 3)
    ax = figure.subplots()
    # earlier files have fewer terms
    for name, values in zip(trace.terms, trace.losses.T, strict=False):
        if (values != 0).any():
            ax.plot(values.numpy(), lw=0.8, label=name.replace("_", " "))
    ax.set(xlabel="step", ylabel="weighted loss term")
    ax.set_yscale("log")
    ax.legend(fontsize=8)
    return figure
