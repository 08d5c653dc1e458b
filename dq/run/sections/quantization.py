"""Quantization of every class: tables, cluster sizes, and a map of latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dq.cluster.prototypes import Prototypes
from dq.core.figures import new_figure, save_figure
from dq.core.plain import PlainDict
from dq.core.seeds import generator
from dq.diffusion.latents import LatentCache
from dq.run.folder import Run
from dq.run.pages import Table
from dq.run.stages.cluster import clusterings, load_prototypes, prototype_folder

MAX_POINTS = 2000  # of the map of latents
MAX_ROWS = 100  # of a table


def quantization_content(run: Run, cache: LatentCache, shown_ipc: int) -> PlainDict:
    """A table of every clustering, the figure of its sizes, and a map of the latents of some classes."""
    figures, parts = run.folder / "figures", []
    for ipc, resolved in sorted(clusterings(run), key=lambda c: c[0] != shown_ipc):
        points = list(load_prototypes(run, cache, ipc, resolved))
        name = prototype_folder(run, cache, ipc, resolved).name
        space = "" if resolved.cluster.space == "latents" else f", in the space {resolved.cluster.space!r}"
        policy = f", pruned by {resolved.prune.policy!r}" if resolved.prune.active else ""
        sizes = figures / f"{name}-sizes.png" if ipc > 1 else None
        if sizes:
            _plot_sizes(points, sizes)
        title = f"IPC {ipc}, engine {points[0].stats['engine']}{space}{policy}"
        parts.append({"title": title, "table": _quantization_table(points), "sizes": sizes})
    ipc, first = next(((i, r) for i, r in clusterings(run) if i == shown_ipc), clusterings(run)[0])
    latents = figures / "latents.png"
    _plot_latents(cache, list(load_prototypes(run, cache, ipc, first)), latents)
    return {"parts": parts, "latents": latents, "latents_ipc": ipc}


def _quantization_table(points: list[Prototypes]) -> Table:
    head = ["class", "images", "prototypes", "distortion", "explained", "W2 masses", "W2 uniform"]
    head += ["ESS masses", "ESS roots"]
    formats = {"n": "", "k": "", "distortion": ".3f", "explained": ".1%", "w2_mass": ".3f", "w2_uniform": ".3f"}
    formats |= {"ess_mass": ".1f", "ess_sqrt": ".1f"}
    rows: list[list[object]] = []
    for p in points[:MAX_ROWS]:
        rows.append([p.name, *(f"{p.stats[k]:z{f}}" if f else p.stats[k] for k, f in formats.items())])
    means = {k: float(np.mean([p.stats[k] for p in points])) for k in formats if k not in ("n", "k")}
    rows.append(["mean", "", "", *(f"{v:z{formats[k]}}" for k, v in means.items())])
    return head, rows


def plain_name(name: str) -> str:
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
    names = [plain_name(p.name) for p in points[:40]]
    right.bar(range(len(names)), [p.stats["distortion"] for p in points[:40]], color="#3b6ea5")
    right.set(ylabel="distortion")
    right.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    save_figure(figure, path)


def _plot_latents(cache: LatentCache, points: list[Prototypes], path: Path) -> None:
    """Latents of some classes on their two leading principal axes, with prototypes sized by mass."""
    shown = points[:10]
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
        ax.scatter(flat[:, 0].numpy(), flat[:, 1].numpy(), s=3, color=palette(i % 10), alpha=0.3)
        size = (30 + 170 * p.counts / p.counts.max()).numpy()
        color = palette(i % 10)
        px, py = prototypes.T.numpy()
        ax.scatter(px, py, s=size, color=color, edgecolor="black", lw=0.7, label=plain_name(p.name))
    ax.set(xlabel="first principal axis", ylabel="second principal axis")
    ax.legend(fontsize=7, markerscale=0.5)
    save_figure(figure, path)
