"""The cluster stage: prototypes of every class, by ipc and settings.

A class is a unit of work; classes are dealt out largest first.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dq.cluster.engines import choose_engine
from dq.cluster.kmeans import Clustering, kmeans_many, quantization_stats, uniform_quantization_w2
from dq.cluster.lloyd import peak_bytes
from dq.cluster.prototypes import Prototypes, latent_stats, make_prototypes, select_clusters
from dq.cluster.spaces import embed
from dq.config.methods import ResolvedMethod
from dq.config.reader import to_dict
from dq.config.schema import ClusterConfig
from dq.core.devices import reader_threads
from dq.core.errors import InputError
from dq.core.files import append_jsonl, is_done, read_jsonl, write_json
from dq.core.memory import list_in_pieces
from dq.core.plain import PlainDict, PlainMapping
from dq.core.progress import progress, unit_done
from dq.core.seeds import derive_seed, digest_of
from dq.core.threads import Writer
from dq.core.trackers import report
from dq.data.pruning import Pruned, clusters_in_band
from dq.diffusion.latents import LatentCache
from dq.networks.features import FeatureCache
from dq.run.folder import Run, class_file
from dq.run.stages.features import features_of, prepare_features
from dq.run.stages.prune import Pruning, load_pruning, prune_identity

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dq")


def prototype_folder(run: Run, cache: LatentCache, ipc: int, resolved: ResolvedMethod) -> Path:
    """Folder of the prototypes of these settings."""
    cluster, prune = resolved.cluster, resolved.prune
    settings = cluster_settings(cluster)
    identity = [cache.key, settings, run.config.seed]
    if cluster.uses_features:
        identity.append(features_of(run).key)
    if prune.active:
        identity.append(prune_identity(run, prune))
    parts = [f"ipc{ipc:05d}", settings["engine"], *([settings["space"]] if "space" in settings else [])]
    parts += [prune.policy] if prune.active else []
    return run.folder / "prototypes" / "-".join([*parts, digest_of(identity)])


def cluster_settings(cluster: ClusterConfig) -> PlainDict:
    """The settings that determine prototypes, with the name of the engine.

    Those that the space does not read are left out; that of the latents leaves none, so that it has the digests of
    folders from before there was a choice.
    """
    settings = dict(to_dict(cluster), engine=choose_engine(cluster.engine))
    if cluster.space not in ("pca", "whitened"):
        del settings["dims"]
    if cluster.space != "joint":
        del settings["feature_weight"]
    if cluster.space == "latents":
        del settings["space"]
    if cluster.prototypes_per_class is None:
        del settings["prototypes_per_class"]
    return settings


def clusterings(run: Run) -> list[tuple[int, ResolvedMethod]]:
    """Distinct (ipc, settings) of clustering and pruning of the methods."""
    by_digest: dict[str, tuple[int, ResolvedMethod]] = {}
    for ipc in run.config.ipc:
        for method in run.config.methods:
            r = run.resolved(method)
            key = digest_of([ipc, cluster_settings(r.cluster), prune_identity(run, r.prune)])
            by_digest.setdefault(key, (ipc, r))
    return list(by_digest.values())


def cluster(run: Run, cache: LatentCache) -> None:
    """Cluster every class for every ipc and setting of clustering and pruning."""
    if any(r.cluster.uses_features for _, r in clusterings(run)):
        prepare_features(run)
    began = time.perf_counter()
    counts = run.source.class_counts()
    prunings = {r.prune: load_pruning(run, r.prune) for _, r in clusterings(run)}
    units = [(ipc, r, c) for ipc, r in clusterings(run) for c in range(len(counts))]
    assigned = [units[i] for i in run.local_units([float(counts[c]) * ipc for ipc, _, c in units])]
    todo = [u for u in assigned if not is_done(class_file(prototype_folder(run, cache, u[0], u[1]), u[2]))]
    order = tuple(c for _, _, c in todo)
    cache = dataclasses.replace(cache, order=order)
    features = None
    if any(r.cluster.uses_features for _, r in clusterings(run)):
        features = dataclasses.replace(features_of(run), order=order)
    with (
        progress([], desc="cluster", total=len(todo), unit="class", main=run.main and bool(todo)) as bar,
        Writer(reader_threads(run.device)) as writer,
    ):
        for ipc, resolved, labels in _batches(run, cache, todo):
            data = _Data(cache, features if resolved.cluster.uses_features else None, prunings[resolved.prune])
            _cluster_classes(run, data, ipc, resolved, labels, writer)
            bar.update(len(labels))
    run.finish("cluster", began, units=len(units))
    if run.main:
        for ipc, resolved in clusterings(run):
            _log_distortion(run, cache, ipc, resolved)


def _batches(
    run: Run, cache: LatentCache, units: list[tuple[int, ResolvedMethod, int]]
) -> Iterator[tuple[int, ResolvedMethod, list[int]]]:
    """Group units for one call each: several classes on an accelerator, else one."""
    counts = [int(n) for n in run.source.class_counts()]
    budget = group_budget(run.device)
    for (ipc, resolved), members in itertools.groupby(units, key=lambda u: (u[0], u[1])):
        together = budget if choose_engine(resolved.cluster.engine) == "torch" else 0
        width = _width(run, cache, resolved.cluster) if together else 0
        for group in groups([(label, counts[label]) for _, _, label in members], width, together):
            yield ipc, resolved, group


def _width(run: Run, cache: LatentCache, cfg: ClusterConfig) -> int:
    """Numbers per image on the device while its class is clustered."""
    latent = math.prod(cache.shape)
    return latent + (features_of(run).width() if cfg.uses_features else 0)


def group_budget(device: torch.device) -> int:
    """Bytes for classes clustered at once; 0: one at a time.

    Half of all memory of the device, not of what is free at the moment, so that the same classes go together every
    time: batched products round differently for other numbers of classes.
    """
    return torch.cuda.mem_get_info(device)[1] // 2 if device.type == "cuda" else 0


def groups(classes: Iterable[tuple[int, int]], width: int, budget: int) -> Iterator[list[int]]:
    """Group labels of consecutive classes within `budget` bytes, at least one each; 0 bytes: one each.

    `classes` are (label, number of images), `width` the numbers of an image.
    """
    group: list[int] = []
    largest = 0
    for label, count in classes:
        if group and (not budget or (len(group) + 1) * peak_bytes(max(largest, count), width) > budget):
            yield group
            group, largest = [], 0
        group.append(label)
        largest = max(largest, count)
    if group:
        yield group


@dataclass(frozen=True)
class _Data:
    """What is clustered."""

    cache: LatentCache
    features: FeatureCache | None
    pruning: Pruning


def _cluster_classes(
    run: Run, data: _Data, ipc: int, resolved: ResolvedMethod, labels: list[int], writer: Writer
) -> None:
    """Cluster classes and save their prototypes; in halves where memory is short.

    Threads of the writer compute the exact transport that is only logged, and save, while other classes are clustered.
    """
    folder, cfg = prototype_folder(run, data.cache, ipc, resolved), resolved.cluster
    began = time.perf_counter()
    largest = max(int(run.source.class_counts()[c]) for c in labels)
    pieces = list_in_pieces(
        "cluster",
        len(labels),
        lambda piece: _prototypes(run, data, ipc, cfg, labels[piece]),
        like=(choose_engine(cfg.engine), cfg.space, largest, *data.cache.shape),
    )
    seconds = (time.perf_counter() - began) / len(labels)
    for quantized in itertools.chain(*pieces):
        writer.submit(functools.partial(_save, quantized, folder, seconds))


class _Quantized(NamedTuple):
    """Prototypes of a class without the exact W2 of uniform weights, and what computes it; None: it is not logged."""

    prototypes: Prototypes
    uniform_w2: Callable[[], float] | None


def _save(quantized: _Quantized, folder: Path, seconds: float) -> None:
    p = quantized.prototypes
    if quantized.uniform_w2 is not None:
        p = dataclasses.replace(p, stats={**p.stats, "w2_uniform": quantized.uniform_w2()})
    p.save(class_file(folder, p.label))
    numbers = {"images": p.stats["n"], "prototypes": len(p.counts), "w2": p.stats["w2_mass"]}
    unit_done("cluster", p.name, seconds, **numbers)


@dataclass(frozen=True)
class _ClassPoints:
    """Points, latents and weights of one class."""

    z: Tensor  # (n, C, h, w) latents
    x: Tensor  # (n, d) the same images in the space of clustering
    rows: Tensor  # (n,) of the source
    pruned: Pruned | None
    weights: Tensor | None = None  # (n,)

    def of(self, members: Tensor) -> _ClassPoints:
        """Only the images of `members` (n,) bool."""
        at = members.to(self.z.device)
        weights = None if self.weights is None else self.weights[at]
        return dataclasses.replace(self, z=self.z[at], x=self.x[at], rows=self.rows[members.cpu()], weights=weights)


class ClassImages(NamedTuple):
    """The clustered images of a class, after pruning."""

    z: Tensor  # (n, C, h, w) latents
    features: Tensor | None  # (n, D) of a teacher
    rows: Tensor  # (n,) of the source
    pruned: Pruned | None
    weights: Tensor | None  # (n,)


def class_images(
    cache: LatentCache, label: int, ipc: int, pruning: Pruning, features: FeatureCache | None = None
) -> ClassImages:
    """The clustered images of a class, with their features in a cache.

    All images where whole clusters are pruned, since these are known only after clustering.
    """
    prune = pruning.settings
    z, rows = cache.load(label)
    f = None if features is None else features.load_rows(label, rows)
    pruned = pruning.of_class(label, rows, ipc)
    if pruned is not None and prune.where == "filter":
        z, rows, f = z[pruned.mask], rows[pruned.mask], None if f is None else f[pruned.mask]
    weigh = pruned is not None and prune.where == "weight"
    weights = pruned.weights(prune.outside_weight) if pruned is not None and weigh else None
    return ClassImages(z, f, rows, pruned, weights)


def _class_points(run: Run, data: _Data, ipc: int, cfg: ClusterConfig, label: int) -> _ClassPoints:
    c = class_images(data.cache, label, ipc, data.pruning, data.features)
    z = c.z.to(run.device)
    f = None if c.features is None else c.features.to(run.device)
    return _ClassPoints(z, embed(z, f, cfg), c.rows, c.pruned, c.weights)


def _prototypes(run: Run, inputs: _Data, ipc: int, cfg: ClusterConfig, labels: list[int]) -> list[_Quantized]:
    """Cluster classes at once."""
    prune, number = inputs.pruning.settings, cfg.prototypes(ipc)
    data = [_class_points(run, inputs, ipc, cfg, c) for c in labels]
    names = [f"class {c} {run.source.class_names[c]!r}" for c in labels]
    seeds = [derive_seed(run.config.seed, "cluster", ipc, c) for c in labels]
    results: list[Clustering] = []
    if prune.active and prune.where == "cluster":  # more clusters, of which ipc are left
        for i, (d, seed, name) in enumerate(zip(data, seeds, names, strict=True)):
            k = min(math.ceil(number * d.pruned.cells), max(number, len(d.x))) if d.pruned is not None else number
            (result,) = kmeans_many([d.x], k, config=cfg, seeds=[seed], names=[name])
            if d.pruned is not None:
                result, members = select_clusters(
                    result, clusters_in_band(result.labels, d.pruned, number), requested=number
                )
                data[i] = d.of(members)
            results.append(result)
    else:
        weights = [d.weights for d in data]
        results = kmeans_many([d.x for d in data], number, config=cfg, weights=weights, seeds=seeds, names=names)
    quantized = []
    for c, d, result in zip(labels, data, results, strict=True):
        numbers = quantization_stats(d.x, result, weights=d.weights, with_uniform=False)
        stats: PlainDict = {**numbers, "engine": result.engine}
        points = None if cfg.space == "latents" else d.x
        p = make_prototypes(c, run.source.class_names[c], d.z, d.rows, result, points=points, weights=d.weights)
        stats |= {"space": cfg.space, **latent_stats(d.z, result.labels, p.centroids)}
        if d.pruned is not None:
            images = {"class_images": len(d.pruned.mask), "kept_images": len(d.pruned.band)}
            stats |= {"policy": prune.policy, "where": prune.where, **images}
        logged = functools.partial(uniform_quantization_w2, d.x, result, weights=d.weights)
        quantized.append(_Quantized(dataclasses.replace(p, stats=stats), logged if cfg.uniform_w2 else None))
    return quantized


def _log_distortion(run: Run, cache: LatentCache, ipc: int, resolved: ResolvedMethod) -> None:
    """Append one record per class to metrics.jsonl, once."""
    folder = prototype_folder(run, cache, ipc, resolved)
    marker = folder / "stats.json"
    if is_done(marker):
        return
    stats = [Prototypes.load(class_file(folder, c)) for c in range(len(run.source.class_names))]
    for p in stats:
        record = {"stage": "quantization", "ipc": ipc, "class": p.label, "name": p.name, **p.stats}
        append_jsonl(run.folder / "metrics.jsonl", record)
    write_json(marker, {"classes": [p.stats for p in stats]})


def load_prototypes(run: Run, cache: LatentCache, ipc: int, resolved: ResolvedMethod) -> Iterator[Prototypes]:
    """Prototypes of all classes under these settings, one class at a time."""
    folder = prototype_folder(run, cache, ipc, resolved)
    missing = [c for c in range(len(run.source.class_names)) if not class_file(folder, c).is_file()]
    if missing:
        raise InputError(
            f"class {missing[0]} {run.source.class_names[missing[0]]!r} has no prototypes for ipc {ipc}; "
            "run `dq cluster` first"
        )
    return (Prototypes.load(class_file(folder, c)) for c in range(len(run.source.class_names)))


DISTORTION = ("distortion", "w2_mass", "w2_uniform", "explained")  # per class, of the records of the cluster stage


def report_distortion(accelerator: Accelerator, metrics: Path) -> None:
    """Send a summary over classes of the cluster stage to trackers."""
    if accelerator.trackers:
        report(accelerator, distortion_numbers(read_jsonl(metrics)))


def distortion_numbers(records: Sequence[PlainMapping]) -> dict[str, float]:
    """Mean, minimum and maximum over classes in the records of metrics.jsonl.

    By ipc and engine.
    """
    groups: dict[str, list[PlainMapping]] = {}
    for r in records:
        if r.get("stage") == "quantization":
            pruned = [r["policy"], r["where"]] if "policy" in r else []
            name = "-".join([f"ipc{r['ipc']}", r.get("engine", ""), r.get("space", "latents"), *pruned])
            groups.setdefault(name, []).append(r)
    numbers: dict[str, float] = {}
    for group, rows in groups.items():
        for key in DISTORTION:
            values = [float(r[key]) for r in rows if r.get(key) is not None and math.isfinite(float(r[key]))]
            if values:
                statistics = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
                numbers |= {f"cluster/{group}/{key}_{name}": v for name, v in statistics.items()}
    return numbers
