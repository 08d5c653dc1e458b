"""Figures and one self-contained HTML page from what a run folder holds."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq.cluster.prototypes import Prototypes
from dq.config.reader import dump_config
from dq.core.errors import InputError
from dq.core.figures import new_figure, save_figure, save_image
from dq.core.files import read_json
from dq.core.seeds import generator
from dq.data.grid import image_grid
from dq.distilled.set import DistilledSet
from dq.evaluation.figures import results_figures
from dq.evaluation.results import read_records, recipe_names
from dq.run.folder import Run
from dq.run.pages import Table, write_page
from dq.run.refinement import Trace, read_trace, refined_folders
from dq.run.stages.assemble import load_set_of_run
from dq.run.stages.cluster import clusterings, load_prototypes, prototype_folder
from dq.run.stages.encode import cache_of
from dq.run.stages.evaluate import describe_evaluation, outdated_rows
from dq.run.stages.generate import nearest_images
from dq.run.stages.select import selection_sentences

log = logging.getLogger("dq")
MAX_CLASSES, MAX_COLUMNS, MAX_POINTS = 20, 10, 2000
TRACE_PARTS = 5  # of the steps of a refinement, whose means are printed
NOT_FACTS = ("method", "from", "checks", "images", "batches", "before", "after", "checksum")  # of a refined folder


def set_grid(small: DistilledSet, nearest: list[Tensor] | None = None) -> Image.Image:
    """A grid with classes as rows and prototypes by weight as columns.

    With `nearest`, each image has its nearest real image at its right.
    """
    images = small.images_uint8()
    rows = []
    for c in range(min(MAX_CLASSES, len(small.class_names))):
        rows_of_class = (small.labels == c).nonzero()[:, 0][:MAX_COLUMNS].tolist()
        row: list[Tensor] = []
        for i in rows_of_class:
            row.append(images[i])
            if nearest is not None:
                row.append(nearest[c][int(small.prototype[i])])
        rows.append(row)
    return image_grid(rows, scale=max(1, round(64 / images.shape[-1])))


def write_report(run: Run) -> Path:
    """Write `report.html` and `figures/*.png`; returns the path of the page.

    Raises:
        InputError: if the folder holds no sets yet.
    """
    base = run.folder / "dataset"
    c = run.config
    present = [(i, m) for i in c.ipc for m in c.methods if (base / f"ipc{i}-{m}" / "provenance.json").is_file()]
    if not present:
        raise InputError(f"{base} holds no distilled sets yet; run `dq run` or its stages first")
    describe_evaluation(run.folder)
    cache = cache_of(run)
    figures = run.folder / "figures"
    accuracy = accuracy_content(run.folder, outdated_rows(run.folder))
    grids = []
    shown = sorted(present, key=lambda p: (p[0] != _shown_ipc(c.ipc), list(c.methods).index(p[1]), p[0]))
    for ipc, method in shown[:8]:
        small = load_set_of_run(run, ipc, method)
        few = itertools.islice(load_prototypes(run, cache, ipc, run.resolved(method)), MAX_CLASSES)
        path = figures / f"grid-ipc{ipc}-{method}.png"
        save_image(set_grid(small, [nearest_images(run, p) for p in few]), path)
        grids.append((f"{method}, IPC {ipc}", path))
    quantization: list[tuple[str, Table, Path | None]] = []
    for ipc, resolved in clusterings(run):
        points = list(load_prototypes(run, cache, ipc, resolved))
        name = prototype_folder(run, cache, ipc, resolved).name
        space = "" if resolved.cluster.space == "latents" else f", in the space {resolved.cluster.space!r}"
        policy = f", pruned by {resolved.prune.policy!r}" if resolved.prune.active else ""
        heading = f"IPC {ipc}, engine {points[0].stats['engine']}{space}{policy}"
        sizes = figures / f"{name}-sizes.png" if ipc > 1 else None
        if sizes:
            _plot_sizes(points, sizes)
        quantization.append((heading, _quantization_table(points), sizes))
    ipc, first = next(((i, r) for i, r in clusterings(run) if i == _shown_ipc(c.ipc)), clusterings(run)[0])
    latents = figures / "latents.png"
    _plot_latents(run, list(load_prototypes(run, cache, ipc, first)), latents)
    counts = run.source.class_counts()
    provenance = run.folder / "provenance.json"
    return write_page(
        run.folder / "report.html",
        "report.html",
        title=str(run.source.origin),
        images=int(counts.sum()),
        classes=len(counts),
        fingerprint=run.source.fingerprint,
        accuracy=accuracy,
        grids=grids,
        selection=_selections(run, present),
        refinement=[_refinement(run, heading, folder) for heading, folder in refined_folders(run).items()],
        quantization=quantization,
        latents_ipc=ipc,
        latents=latents,
        settings=dump_config(c),
        provenance=read_json(provenance),
        provenance_text=provenance.read_text(),
    )


def write_results_report(folder: Path) -> Path:
    """Write `report.html` and figures of a folder that holds an evaluation and no run.

    Raises:
        InputError: if it holds no results.
    """
    ddr = folder / "eval" / "ddr.csv"
    accuracy = accuracy_content(folder)
    rows = read_records(ddr) if ddr.is_file() else []
    if not accuracy and not rows:
        raise InputError(
            f"{folder} holds no results (no eval/summary.csv); run `dq evaluate` first, or name a --config"
        )
    dd_ranking = (list(rows[0]), [list(r.values()) for r in rows]) if rows else None
    return write_page(
        folder / "report.html", "results.html", title=folder.name, accuracy=accuracy, dd_ranking=dd_ranking
    )


def _shown_ipc(ipcs: tuple[int, ...]) -> int:
    """The ipc whose pictures say most: ten if there, else the largest up to a screenful."""
    return 10 if 10 in ipcs else max((i for i in ipcs if i <= 20), default=min(ipcs))


def accuracy_content(folder: Path, outdated: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """Tables and figures of the results in a folder; nothing if there are none.

    Args:
        folder: the folder.
        outdated: name and ipc of sets whose rows are left out, since they are of other images than the folder's.
    """
    summary, comparisons = folder / "eval" / "summary.csv", folder / "eval" / "comparisons.csv"
    if not summary.is_file():
        return {}
    every = read_records(summary)
    records = [r for r in every if (r["set"], r["ipc"]) not in outdated]
    accuracy: dict[str, Any] = {"outdated": "", "table": None, "figures": [], "differences": None}
    if len(records) < len(every):
        accuracy["outdated"] = ", ".join(f"{name} at IPC {ipc}" for name, ipc in outdated)
        log.warning(
            "%s has rows of sets that were made again since (%s); the report leaves them out",
            summary,
            accuracy["outdated"],
        )
    if not records:
        return accuracy

    def percent(r: dict[str, str], which: str) -> str:
        std = f" ± {100 * float(r[f'{which}_std']):.1f}" if r[f"{which}_std"] else ""
        return f"{100 * float(r[f'{which}_mean']):.1f}{std}"

    names = recipe_names(records)
    sliced = ["redundancy"] if any(r.get("redundancy_mean") for r in records) else []
    head = ["set", "IPC", "images", "student and labels", "seeds", "last %", "best %", "best chosen on"]
    head += [*(f"{which} %" for which in sliced), "label bytes"]
    rows = []
    for r in records:
        row = [r["set"], r["ipc"], r["images"], names[int(r["recipe"])], r["seeds"]]
        row += [percent(r, "last"), percent(r, "best"), r["selected_on"]]
        row += [*(percent(r, which) if r[f"{which}_mean"] else "" for which in sliced), r["label_bytes"]]
        rows.append([*row, f"{r['protocol']}: {r['settings']}"])
    accuracy["table"] = ([*head, "protocol"], rows)
    for name, figure in results_figures(records, new_figure):
        path = folder / "figures" / f"{name}.png"
        save_figure(figure, path)
        accuracy["figures"].append(path)
    compared = read_records(comparisons) if comparisons.is_file() else []
    compared = [r for r in compared if not {(r[k], r["ipc"]) for k in ("set", "against")} & set(outdated)]
    if compared:
        head = ["set", "against", "IPC", "student and labels", "pairs", "difference, points", "interval", "verdict"]
        rows = []
        for r in compared:
            interval = f"{100 * float(r['low']):+.1f} to {100 * float(r['high']):+.1f}" if r["low"] else ""
            row = [r["set"], r["against"], r["ipc"], names[int(r["recipe"])], r["pairs"]]
            rows.append([*row, f"{100 * float(r['difference']):+.1f}", interval, r["verdict"]])
        if "verdict_holm" in compared[0]:  # which files of earlier versions lack
            head.append("after Holm's correction")
            rows = [[*row, r["verdict_holm"]] for row, r in zip(rows, compared, strict=True)]
        accuracy["differences"] = (head, rows)
    return accuracy


def _selections(run: Run, present: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """Table and sentences on the sets that were selected from candidates.

    Empty without any.
    """
    rows, sentences = [], []
    for ipc, method in present:
        provenance = read_json(run.folder / "dataset" / f"ipc{ipc}-{method}" / "provenance.json")
        s = provenance["generate"].get("selection")
        if s:
            p_drawn, p_kept = (f"{100 * s[name]:.1f} %" for name in ("probability_drawn", "probability_kept"))
            measures = ((n, s[f"{n}_first"], s[n]) for n in ("w2", "coverage") if n in s)
            w2 = ", ".join(f"{name} {first:.3f} to {last:.3f}" for name, first, last in measures)
            rows.append([method, ipc, s["rule"], s["candidates"], s["teacher"], s["images"], p_drawn, p_kept, w2])
            sentences += [f"{method} at IPC {ipc}: {sentence}." for sentence in selection_sentences(s)]
    head = ["method", "IPC", "rule", "candidates", "teacher", "images", "p(y) of all", "p(y) of the kept"]
    table = ([*head, "from the first draws to the kept"], rows)
    return {"table": table, "sentences": sentences} if rows else {}


def _refinement(run: Run, heading: str, folder: Path) -> dict[str, Any]:
    """Facts of a refined folder.

    They are measures of its teachers before and after, losses over steps, images after each block, and records of the
    method.
    """
    summary = read_json(folder / "summary.json")
    rows = []
    for group in ("teachers", "validation_teachers"):
        for a, b in zip(summary["before"][group], summary["after"][group], strict=True):
            accuracies = [f"{100 * x['accuracy']:.1f} %" for x in (a, b)]
            rows.append(
                [
                    f"{a['name']} ({group[:-1].replace('_', ' ')})",
                    *accuracies,
                    *(f"{x['cross_entropy']:.3f}" for x in (a, b)),
                ]
            )
    for key, what in (("variation", "total variation"), ("anchor_distance", "distance to the anchor")):
        rows.append([f"{what}, gray levels", *(f"{summary[w][key]:.2f}" for w in ("before", "after")), "", ""])
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
        "heading": heading,
        "measures": (["", "before", "after", "CE before", "CE after"], rows),
        "checks": (["steps", "held-out train images, networks trained on the set"], checks) if checks else None,
        "facts": _recorded(summary),
        "trace": _trace_table(trace) if losses else None,
        "losses": losses,
        "blocks": blocks,
    }


def _recorded(summary: dict[str, Any]) -> str:
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


def _quantization_table(points: list[Prototypes]) -> Table:
    head = [
        "class",
        "images",
        "prototypes",
        "distortion",
        "explained",
        "W2 masses",
        "W2 uniform",
        "ESS masses",
        "ESS roots",
    ]
    rows = [
        [
            p.name,
            p.stats["n"],
            p.stats["k"],
            f"{p.stats['distortion']:.3f}",
            f"{p.stats['explained']:.1%}",
            f"{p.stats['w2_mass']:.3f}",
            f"{p.stats['w2_uniform']:.3f}",
            f"{p.stats['ess_mass']:.1f}",
            f"{p.stats['ess_sqrt']:.1f}",
        ]
        for p in points[:100]
    ]
    means = [np.mean([p.stats[k] for p in points]) for k in ("distortion", "explained", "w2_mass", "w2_uniform")]
    rows.append(["mean", "", "", f"{means[0]:.3f}", f"{means[1]:.1%}", f"{means[2]:.3f}", f"{means[3]:.3f}", "", ""])
    return head, rows


def _plain(name: str) -> str:
    """A class name that matplotlib neither sets as a formula nor hides from the legend."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _plot_sizes(points: list[Prototypes], path: Path) -> None:
    """Cluster sizes as shares of an equal share, and distortion per class."""
    figure = new_figure(10, 3)
    left, right = figure.subplots(1, 2)
    ratios = torch.cat([p.counts * len(p.counts) / p.counts.sum() for p in points]).numpy()
    left.hist(ratios, bins=30, color="#3b6ea5")
    left.axvline(1, color="#222", lw=1)
    left.set(xlabel="cluster size / equal share", ylabel="prototypes")
    names = [_plain(p.name) for p in points[:40]]
    right.bar(range(len(names)), [p.stats["distortion"] for p in points[:40]], color="#3b6ea5")
    right.set(ylabel="distortion")
    right.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    save_figure(figure, path)


def _plot_latents(run: Run, points: list[Prototypes], path: Path) -> None:
    """Latents of some classes on their two leading principal axes, with prototypes sized by mass."""
    shown = points[:10]
    cache = cache_of(run)
    samples = []
    for p in shown:
        z, _ = cache.load(p.label)
        pick = torch.randperm(len(z), generator=generator("map", p.label))[: MAX_POINTS // len(shown)]
        samples.append(z[pick].flatten(1).float())
    x = torch.cat(samples)
    mean = x.mean(0)
    g = generator("map", "basis")
    probe = torch.randn(x.shape[1], 8, generator=g)
    q = torch.linalg.qr((x - mean).T @ ((x - mean) @ probe)).Q  # one power iteration, then exact within its span
    axes = q @ torch.linalg.svd(((x - mean) @ q).T, full_matrices=False).U[:, :2]
    figure = new_figure(7, 6)
    ax = figure.subplots()
    from matplotlib import colormaps

    palette = colormaps["tab10"]
    for i, (p, s) in enumerate(zip(shown, samples, strict=True)):
        flat = (s - mean) @ axes
        prototypes = (p.centroids.flatten(1) - mean) @ axes
        ax.scatter(*flat.T.numpy(), s=3, color=palette(i % 10), alpha=0.3)
        size = (30 + 170 * p.counts / p.counts.max()).numpy()
        ax.scatter(
            *prototypes.T.numpy(), s=size, color=palette(i % 10), edgecolor="black", lw=0.7, label=_plain(p.name)
        )
    ax.set(xlabel="first principal axis", ylabel="second principal axis")
    ax.legend(fontsize=7, markerscale=0.5)
    save_figure(figure, path)
