"""The stages of a run over a run folder: encode, cluster, generate, refine, label, assemble, evaluate.

Every stage divides its units of work over processes, writes one file per unit, skips units whose file is there, and
meets the other processes only at its end. A unit's folder is named by a digest of everything that decides its content,
so results of other settings are never taken for this one's.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dq.cluster import choose_engine, kmeans_many, quantization_stats
from dq.codec import Codec, codec_digest
from dq.config import ClusterConfig, GenerateConfig, MethodConfig
from dq.data import read_images
from dq.dist import (
    append_jsonl,
    derive_seed,
    digest_of,
    generator,
    progress,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from dq.distilled import DistilledSet
from dq.errors import InputError
from dq.latents import LatentCache, encode_source, open_cache
from dq.prototypes import Prototypes, latent_stats, make_prototypes
from dq.refine import chain
from dq.refine.stage import refine as refine_drawn
from dq.runfolder import SPEED, Run, class_file
from dq.settings import to_dict
from dq.spaces import embed, features_of, known_features, prepare_features
from dq.teachers import load_teachers, pooled_logits

if TYPE_CHECKING:
    from dq.pipeline import DistillPipeline

log = logging.getLogger("dq")


# --- encode -------------------------------------------------------------------------------------------------------


def encode(run: Run, codec: Codec) -> LatentCache:
    """Encode every class into the latent cache; classes that are there are left alone."""
    began = time.perf_counter()
    c = run.config
    codec.to(run.device)
    cache = open_cache(c.cache_dir, run.source, codec, c.source, c.codec, c.seed)
    costs = [float(n) for n in run.source.class_counts()]
    mine = run.mine(costs)
    encode_source(run.source, codec, cache, c.source, c.codec, labels=mine, seed=c.seed, main=run.main)
    run.finish("encode", began, images=int(sum(costs)), cache=cache.key)
    if run.main:
        write_json(run.folder / "latents.json", {"key": cache.key, "shape": list(cache.shape)})
    run.accelerator.wait_for_everyone()
    if run.main and (bad := cache.bad_images()):
        write_text(run.folder / "bad_images.txt", "\n".join(bad) + "\n")
        log.warning("%d images were set aside, listed in %s", len(bad), run.folder / "bad_images.txt")
    return cache


# --- cluster ------------------------------------------------------------------------------------------------------


def prototype_folder(run: Run, cache: LatentCache, ipc: int, cluster: ClusterConfig) -> Path:
    """Where the prototypes of these settings are."""
    settings = cluster_settings(cluster)
    identity = [cache.key, settings, run.config.seed]
    if cluster.uses_features:
        identity.append(features_of(run).key)
    parts = [f"ipc{ipc:05d}", settings["engine"], *([settings["space"]] if "space" in settings else [])]
    return run.folder / "prototypes" / "-".join([*parts, digest_of(identity)])


def cluster_settings(cluster: ClusterConfig) -> dict[str, Any]:
    """The settings that decide prototypes: the engine by its name, and of the space what is read of it. The latents'
    own leaves none, so that it has the digests of folders from before there was a choice."""
    settings = dict(to_dict(cluster), engine=choose_engine(cluster.engine))
    if cluster.space not in ("pca", "whitened"):
        del settings["dims"]
    if cluster.space != "joint":
        del settings["feature_weight"]
    if cluster.space == "latents":
        del settings["space"]
    return settings


def clusterings(run: Run) -> list[tuple[int, ClusterConfig]]:
    """The distinct (ipc, settings) that the methods ask for."""
    found: dict[str, tuple[int, ClusterConfig]] = {}
    for ipc in run.config.ipc:
        for method in run.config.methods:
            cluster = run.resolved(method)[1]
            found.setdefault(digest_of([ipc, cluster_settings(cluster)]), (ipc, cluster))
    return list(found.values())


def cluster(run: Run, cache: LatentCache) -> None:
    """Quantize every class for every ipc and clustering setting."""
    if any(cfg.uses_features for _, cfg in clusterings(run)):
        prepare_features(run)
    began = time.perf_counter()
    counts = run.source.class_counts()
    units = [(ipc, cfg, c) for ipc, cfg in clusterings(run) for c in range(len(counts))]
    mine = [units[i] for i in run.mine([float(counts[c]) * ipc for ipc, _, c in units])]
    todo = [u for u in mine if not class_file(prototype_folder(run, cache, u[0], u[1]), u[2]).is_file()]
    with progress([], desc="cluster", total=len(todo), unit="class", main=run.main and bool(todo)) as bar:
        for ipc, cfg, labels in _batches(run, cache, todo):
            _cluster_classes(run, cache, ipc, cfg, labels)
            bar.update(len(labels))
    run.finish("cluster", began, units=len(units))
    if run.main:
        for ipc, cfg in clusterings(run):
            _log_distortion(run, cache, ipc, cfg)


def _batches(
    run: Run, cache: LatentCache, units: list[tuple[int, ClusterConfig, int]]
) -> Iterator[tuple[int, ClusterConfig, list[int]]]:
    """Group units for one call each: many classes at once on an accelerator, as memory allows, else one by one."""
    counts = run.source.class_counts()
    latent_width = 4 * cache.shape[0] * cache.shape[1] * cache.shape[2]
    budget = torch.cuda.mem_get_info(run.device)[0] // 6 if run.device.type == "cuda" else 0
    group: list[int] = []
    for i, (ipc, cfg, label) in enumerate(units):
        group.append(label)
        following = units[i + 1] if i + 1 < len(units) else None
        largest = max(int(counts[c]) for c in (*group, following[2] if following else label))
        width = latent_width + (4 * features_of(run).width() if budget and cfg.uses_features else 0)
        full = (len(group) + 1) * largest * width > budget or choose_engine(cfg.engine) != "torch"
        if following is None or following[:2] != (ipc, cfg) or full:
            yield ipc, cfg, group
            group = []


def _cluster_classes(run: Run, cache: LatentCache, ipc: int, cfg: ClusterConfig, labels: list[int]) -> None:
    folder = prototype_folder(run, cache, ipc, cfg)
    names = [f"class {c} {run.source.class_names[c]!r}" for c in labels]
    data = [cache.load(c) for c in labels]
    features = features_of(run) if cfg.uses_features else None
    xs = []
    for c, (z, rows) in zip(labels, data):
        f = features.load_rows(c, rows).to(run.device) if features else None
        xs.append(embed(z.to(run.device), f, cfg))
    seeds = [derive_seed(run.config.seed, "cluster", ipc, c) for c in labels]
    results = kmeans_many(xs, ipc, config=cfg, seeds=seeds, names=names)
    for c, x, (z, rows), result in zip(labels, xs, data, results):
        stats = {**quantization_stats(x, result, with_uniform=cfg.uniform_w2), "engine": result.engine}
        z = z.to(run.device)
        points = None if cfg.space == "latents" else x
        p = make_prototypes(c, run.source.class_names[c], z, rows, result, stats, points=points)
        stats |= {"space": cfg.space, **latent_stats(z, result.labels, p.centroids)}
        dataclasses.replace(p, stats=stats).save(class_file(folder, c))


def _log_distortion(run: Run, cache: LatentCache, ipc: int, cfg: ClusterConfig) -> None:
    """Append one record per class to metrics.jsonl, once."""
    folder = prototype_folder(run, cache, ipc, cfg)
    marker = folder / "stats.json"
    if marker.is_file():
        return
    stats = [Prototypes.load(class_file(folder, c)) for c in range(len(run.source.class_names))]
    for p in stats:
        record = {"stage": "quantization", "ipc": ipc, "class": p.label, "name": p.name, **p.stats}
        append_jsonl(run.folder / "metrics.jsonl", record)
    write_json(marker, [p.stats for p in stats])


def load_prototypes(run: Run, cache: LatentCache, ipc: int, cfg: ClusterConfig) -> list[Prototypes]:
    """Prototypes of all classes under these settings."""
    folder = prototype_folder(run, cache, ipc, cfg)
    missing = [c for c in range(len(run.source.class_names)) if not class_file(folder, c).is_file()]
    if missing:
        raise InputError(
            f"class {missing[0]} {run.source.class_names[missing[0]]!r} has no prototypes for ipc {ipc}; "
            "run `dq cluster` first"
        )
    return [Prototypes.load(class_file(folder, c)) for c in range(len(run.source.class_names))]


# --- generate -----------------------------------------------------------------------------------------------------


def image_folder(run: Run, cache: LatentCache, ipc: int, method: str, pipe_digest: str | None) -> Path:
    """Where the images of a method are. Methods that differ in weights alone share them."""
    m, cluster_config, generate_config = run.resolved(method)
    settings = to_dict(generate_config)
    for key in (*SPEED, "revision"):
        settings.pop(key, None)
    identity = [
        prototype_folder(run, cache, ipc, cluster_config).name,
        m.representative,
        run.config.image_size,
        # real images need no generator
        ["real", run.config.source.preprocess] if m.representative == "real" else [settings, pipe_digest],
    ]
    return run.folder / "images" / f"ipc{ipc:05d}-{m.representative}-{digest_of(identity)}"


def generate(run: Run, pipe: DistillPipeline, cache: LatentCache) -> None:
    """Draw every prototype of every method as images, one file per class."""
    began = time.perf_counter()
    pipe.to(run.device)
    pipe.set_progress_bar_config(disable=True)
    drawn = 0
    folders: dict[str, str] = {}
    digests: dict[str, str] = {}
    for method in run.config.methods:
        m, cluster_config, cfg = run.resolved(method)
        digest = None
        ids: list[int] = []
        if m.representative != "real":
            _check_codec(pipe, cache)
            ids = pipe.check_inputs(cfg, run.config.codec.resolution, run.source.class_names)
            digest = digests.setdefault(cfg.mode, "") or pipe.digest(cfg.mode)
            digests[cfg.mode] = digest
        for ipc in run.config.ipc:
            folder = image_folder(run, cache, ipc, method, digest)
            folders[f"{ipc}/{method}"] = folder.name
            mine = run.mine([1.0] * len(run.source.class_names))
            todo = [c for c in mine if not class_file(folder, c).is_file()]
            prototypes = [p for p in load_prototypes(run, cache, ipc, cluster_config) if p.label in todo]
            if m.representative == "real":
                _copy_real(run, prototypes, folder)
            else:
                drawn += _draw(run, pipe, prototypes, folder, cfg, m, ids, desc=f"generate {method} ipc {ipc}")
    run.finish("generate", began, images=drawn)
    if run.main:
        write_json(run.folder / "images" / "index.json", folders)
    run.accelerator.wait_for_everyone()


def _check_codec(pipe: DistillPipeline, cache: LatentCache) -> None:
    """The latents must be decoded by the codec that made them."""
    made_by = read_json(cache.folder / "manifest.json")["codec"]
    if codec_digest(pipe.vae) != made_by:
        raise InputError(
            f"the latents in {cache.folder} were made by another codec (digest {made_by}) than the one given; "
            "set codec.path and codec.dtype back, or start again with `dq encode` in another --output_dir"
        )


def _draw(
    run: Run,
    pipe: DistillPipeline,
    prototypes: list[Prototypes],
    folder: Path,
    cfg: GenerateConfig,
    method: MethodConfig,
    ids: list[int],
    desc: str,
) -> int:
    """Batches run across classes; a class is written as soon as its last image is there."""
    copies = cfg.images_per_prototype if cfg.mode != "decode" else 1  # decoding twice gives the same image twice
    queue = [(p, k, i) for p in prototypes for k in range(len(p.counts)) for i in range(copies)]
    done: dict[int, list[Tensor]] = {p.label: [] for p in prototypes}
    points = {p.label: p.points(method.representative, rescale=cfg.rescale) for p in prototypes}
    start = pipe.start(cfg)
    with progress([], desc=desc, total=len(queue), unit="img", main=run.main and bool(queue)) as bar:
        for first in range(0, len(queue), cfg.batch_size):
            batch = queue[first : first + cfg.batch_size]
            images = pipe.synthesize(
                torch.stack([points[p.label][k] for p, k, _ in batch]),
                [p.label for p, _, _ in batch],
                [generator(run.config.seed, "generate", p.label, k, i) for p, k, i in batch],
                cfg,
                class_names=run.source.class_names,
                condition_ids=ids,
                image_size=run.config.image_size,
            )
            if cfg.image_dtype == "uint8":
                images = (images * 255).round().to(torch.uint8)
            for (p, _, _), image in zip(batch, images):
                done[p.label].append(image)
                if len(done[p.label]) == len(p.counts) * copies:
                    tensors = {"images": torch.stack(done.pop(p.label))}
                    meta = {"start": dataclasses.asdict(start) if start else None, "copies": copies}
                    write_tensors(class_file(folder, p.label), tensors, meta)
            bar.update(len(batch))
    return len(queue)


def _copy_real(run: Run, prototypes: list[Prototypes], folder: Path) -> None:
    for p in prototypes:
        images = nearest_images(run, p)
        write_tensors(class_file(folder, p.label), {"images": images}, {"start": None, "copies": 1})


def nearest_images(run: Run, p: Prototypes) -> Tensor:
    """The real image nearest to each prototype, (K, 3, H, W) uint8, at the size of the distilled images."""
    rows = p.medoid_rows.tolist()
    return read_images(run.source.train, rows, run.config.image_size, run.config.source.preprocess)[0]


# --- refine -------------------------------------------------------------------------------------------------------


def refine(run: Run) -> None:
    """Put the drawn images of every method through its stages (`refine`), in their order."""
    cache = cache_of(run)

    def weights_of(ipc: int, method: str) -> dict[int, Tensor]:
        m, cluster_config, cfg = run.resolved(method)
        copies = cfg.images_per_prototype if cfg.mode != "decode" and m.representative != "real" else 1
        points = load_prototypes(run, cache, ipc, cluster_config)
        return {p.label: p.weights(m.weights, m.normalize).repeat_interleave(copies, 0) for p in points}

    drawn = {k: v for k, v in _drawn_folders(run).items() if _is_asked(run, k)}
    refine_drawn(run, drawn, weights_of)


def _is_asked(run: Run, key: str) -> bool:
    ipc, method = key.split("/", 1)
    return int(ipc) in run.config.ipc and method in run.config.methods


# --- label --------------------------------------------------------------------------------------------------------


def _drawn_folders(run: Run) -> dict[str, Path]:
    """Folders of the generator's images by "ipc/method"."""
    index = run.folder / "images" / "index.json"
    if not index.is_file():
        raise InputError(f"{run.folder} has no images yet; run `dq generate` first")
    return {k: run.folder / "images" / v for k, v in read_json(index).items()}


def _image_folders(run: Run) -> dict[str, Path]:
    """Folders of the images of the sets by "ipc/method": behind the stages of refinement, where there are any."""
    drawn = {k: v for k, v in _drawn_folders(run).items() if _is_asked(run, k)}
    return {k: chain.refined_folder(run, int(k.split("/")[0]), k.split("/", 1)[1], v) for k, v in drawn.items()}


def _images(run: Run, folder: Path) -> tuple[list[Tensor], dict[str, Any]]:
    files = [read_tensors(class_file(folder, c)) for c in range(len(run.source.class_names))]
    return [t["images"] for t, _ in files], files[0][1]


def _stage_labels(run: Run, folder: Path) -> Tensor | None:
    """Logits (N, C) that the last stage of refinement gave the images; None if it gave none."""
    files = [read_tensors(class_file(folder, c))[0] for c in range(len(run.source.class_names))]
    return torch.cat([t["logits"] for t in files]) if all("logits" in t for t in files) else None


def label(run: Run) -> None:
    """Label the stored images of every set with the teachers, after checking these on real images. Without a teacher
    there is nothing to do."""
    c = run.config
    if not c.teachers:
        return
    began = time.perf_counter()
    teachers = load_teachers(c.teachers, run.source, c.source, c.image_size, run.device)
    digest = digest_of([t.digest for t in teachers])
    folders = sorted(set(_image_folders(run).values()))
    names = [_label_file(run, f, digest) for f in folders]
    todo = [i for i in run.mine([1.0] * len(folders)) if not names[i].is_file()]
    for i in progress(todo, desc="label", unit="set", main=run.main and bool(todo)):
        images = torch.cat(_images(run, folders[i])[0])
        meta = {"teachers": [t.name for t in teachers], "digest": digest}
        write_tensors(names[i], {"logits": pooled_logits(teachers, images).half()}, meta)
    run.finish("label", began, sets=len(folders))
    if run.main:
        # which labels are these teachers'; those of earlier ones stay beside them
        write_json(run.folder / "labels" / "index.json", {f.name: n.name for f, n in zip(folders, names)})
    run.accelerator.wait_for_everyone()


def _label_file(run: Run, folder: Path, digest: str) -> Path:
    return run.folder / "labels" / f"{folder.name}-{digest}.safetensors"


def _find_labels(run: Run, folder: Path) -> Path | None:
    index = run.folder / "labels" / "index.json"
    name = read_json(index).get(folder.name) if run.config.teachers and index.is_file() else None
    return run.folder / "labels" / name if name else None


# --- assemble -----------------------------------------------------------------------------------------------------


def assemble(run: Run) -> dict[tuple[int, str], DistilledSet]:
    """Put images, labels and weights together, one set per ipc and method; the main process saves them in
    `dataset/`."""
    folders = _image_folders(run)
    cache = cache_of(run)
    sets = {}
    for ipc in run.config.ipc:
        for method in run.config.methods:
            key = f"{ipc}/{method}"
            if key not in folders:
                raise InputError(
                    f"{run.folder} has no images of method {method!r} at ipc {ipc}; run `dq generate` first"
                )
            sets[(ipc, method)] = _assemble_one(run, cache, ipc, method, folders[key])
    if run.main:
        base = run.folder / "dataset"
        for (ipc, method), s in progress(sets.items(), desc="assemble", unit="set"):
            s.save(base, f"ipc{ipc}-{method}")
    run.accelerator.wait_for_everyone()
    return sets


def load_set(run: Run, ipc: int, method: str) -> DistilledSet:
    """A set of the run as it was saved.

    Raises:
        InputError: if it is not there, or was made under other settings of this method than the present ones.
    """
    name = f"ipc{ipc}-{method}"
    m, cluster_config, generate_config = run.resolved(method)
    s = DistilledSet.load(run.folder / "dataset", name)
    now = {
        "method": _method_provenance(method, m),
        "cluster": _cluster_provenance(run, cluster_config),
        "generate": to_dict(generate_config),
    }
    # a setting that came later had the value that is now its default
    before = {"cluster": to_dict(ClusterConfig()), "generate": to_dict(GenerateConfig())}
    for section, settings in now.items():
        for key, value in settings.items():
            made_with = s.provenance[section].get(key, before.get(section, {}).get(key))
            if key not in SPEED and made_with != value:
                raise InputError(
                    f"the set {name} was made with {section}.{key}={made_with}, not {value}; "
                    "run `dq label` to put it together again, or `dq run`"
                )
    stages = s.provenance.get("refine", [])
    folder = _image_folders(run)[f"{ipc}/{method}"].name if stages or chain.stages_of(run.config, method) else None
    if [r["settings"] for r in stages] != chain.asked_settings(run.config, method) or (
        stages and stages[-1]["folder"] != folder
    ):
        raise InputError(f"the set {name} was refined otherwise; run `dq refine` and `dq label`, or `dq run`")
    return s


def cache_of(run: Run) -> LatentCache:
    """The latent cache that the encode stage of this run used, without loading the codec."""
    pointer = run.folder / "latents.json"
    if not pointer.is_file():
        raise InputError(f"{run.folder} has no latents yet; run `dq encode` first")
    known = read_json(pointer)
    folder = Path(run.config.cache_dir) / f"latents-{known['key']}"
    cache = LatentCache(folder, tuple(known["shape"]), run.source.class_names, known["key"])
    if missing := cache.missing():
        raise InputError(
            f"class {missing[0]} {run.source.class_names[missing[0]]!r} has no latents in {folder}; "
            "run `dq encode` first"
        )
    return cache


def _cluster_provenance(run: Run, cluster: ClusterConfig) -> dict[str, Any]:
    """How the points of a set were found, with the digest of the teacher whose features they were found by."""
    teacher = {"teacher": known_features(run)["digest"]} if cluster.uses_features else {}
    return {**to_dict(cluster), "engine": choose_engine(cluster.engine), **teacher}


def _method_provenance(name: str, method: MethodConfig) -> dict[str, Any]:
    """Name and settings of a method; its stages are recorded with their teachers, under `refine`."""
    return {"name": name, **{k: v for k, v in to_dict(method).items() if k != "refine"}}


def _assemble_one(run: Run, cache: LatentCache, ipc: int, method: str, folder: Path) -> DistilledSet:
    m, cluster_config, generate_config = run.resolved(method)
    prototypes = load_prototypes(run, cache, ipc, cluster_config)
    images, meta = _images(run, folder)
    copies = meta["copies"]
    soft_file = _find_labels(run, folder)
    soft, soft_meta = read_tensors(soft_file) if soft_file else ({}, None)
    if (own := _stage_labels(run, folder)) is not None:
        soft, soft_meta = {"logits": own}, {"by": "the teachers of the last stage of refinement"}

    def spread(per_prototype: list[Tensor]) -> Tensor:
        return torch.cat([t.repeat_interleave(copies, 0) for t in per_prototype])

    return DistilledSet(
        images=torch.cat(images),
        labels=spread([torch.full_like(p.counts, p.label) for p in prototypes]),
        weights=spread([p.weights(m.weights, m.normalize) for p in prototypes]),
        class_names=run.source.class_names,
        prototype=spread([torch.arange(len(p.counts)) for p in prototypes]),
        counts=spread([p.counts for p in prototypes]),
        source_row=spread([p.medoid_rows for p in prototypes]),
        soft_labels=soft.get("logits"),
        provenance={
            **read_json(run.folder / "provenance.json"),
            "ipc": ipc,
            "method": _method_provenance(method, m),
            "codec": to_dict(run.config.codec),
            "cluster": _cluster_provenance(run, cluster_config),
            "generate": {**to_dict(generate_config), "start": meta["start"]},
            "refine": chain.provenance(run, method, folder),
            "labels": soft_meta,
        },
    )
