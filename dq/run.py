"""The stages of a run over a run folder: encode, refine, label, assemble. Cluster is in `dq.quantize`, generate in
`dq.draw`, evaluate in `dq.evaluation`.

Every stage divides its units of work over processes, writes one file per unit, skips units whose file is there, and
meets the other processes only at its end. A unit's folder is named by a digest of everything that decides its content,
so results of other settings are never taken for this one's.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq.cluster import choose_engine
from dq.config.reader import to_dict
from dq.config.schema import ClusterConfig, GenerateConfig, MethodConfig
from dq.core.errors import InputError
from dq.core.files import (
    is_done,
    open_tensors,
    read_checksum,
    read_json,
    read_metadata,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from dq.core.progress import progress, unit_done
from dq.core.seeds import digest_of
from dq.diffusion.codec import Codec
from dq.diffusion.latents import LatentCache, encode_source, open_cache
from dq.distilled.card import write_dataset_card
from dq.distilled.format import has_set
from dq.distilled.parquet import write_set
from dq.distilled.set import DistilledSet
from dq.draw import drawn_folders, generate
from dq.networks.teacher import pooled_logits
from dq.networks.teacher_loading import load_teachers
from dq.quantize import cluster, load_prototypes, prototype_folder
from dq.refine import chain
from dq.refine.stage import refine as refine_drawn
from dq.runfolder import SPEED, Run, class_file, copies_of
from dq.spaces import known_features

log = logging.getLogger("dq")

__all__ = ["assemble", "cluster", "encode", "generate", "label", "load_set", "refine"]


# --- encode -------------------------------------------------------------------------------------------------------


def encode(run: Run, codec: Codec) -> LatentCache:
    """Encode every image into the latent cache; files that are there are left alone."""
    began = time.perf_counter()
    c = run.config
    codec.to(run.device)
    cache = open_cache(c.cache_dir, run.source, codec, c.source, c.codec, c.seed)
    encode_source(run.source, codec, cache, c.source, c.codec, seed=c.seed, mine=run.mine, main=run.main)
    run.finish("encode", began, images=cache.images, cache=cache.key)
    cache.check()
    if run.main:
        write_json(run.folder / "latents.json", {"key": cache.key, "shape": list(cache.shape)})
    run.accelerator.wait_for_everyone()
    if run.main and (bad := cache.bad_images()):
        write_text(run.folder / "bad_images.txt", "\n".join(bad) + "\n")
        log.warning("%d images were set aside, listed in %s", len(bad), run.folder / "bad_images.txt")
    return cache


# --- refine -------------------------------------------------------------------------------------------------------


def refine(run: Run) -> None:
    """Put the drawn images of every method through its stages (`refine`), in their order."""
    cache = cache_of(run)

    def weights_of(ipc: int, method: str) -> dict[int, Tensor]:
        m, cluster_config, cfg = run.resolved(method)
        copies = copies_of(m, cfg)
        points = load_prototypes(run, cache, ipc, cluster_config)
        return {p.label: p.weights(m.weights, m.normalize).repeat_interleave(copies, 0) for p in points}

    refine_drawn(run, drawn_folders(run, cache), weights_of)


# --- label --------------------------------------------------------------------------------------------------------


def _image_folders(run: Run) -> dict[str, Path]:
    """Folders of the images of the sets by "ipc/method": behind the stages of refinement, where there are any."""
    drawn = drawn_folders(run, cache_of(run))
    return {k: chain.refined_folder(run, int(k.split("/")[0]), k.split("/", 1)[1], v) for k, v in drawn.items()}


def label(run: Run) -> None:
    """Label the stored images of every set with the teachers, after checking these on real images; a class of a set is
    a unit of work. Without a teacher there is nothing to do."""
    c = run.config
    if not c.teachers:
        return
    began = time.perf_counter()
    teachers = load_teachers(c.teachers, run.source, c.source, c.image_size, run.device)
    digest = digest_of([t.digest for t in teachers])
    meta = {"teachers": [t.name for t in teachers], "digest": digest}
    folders = sorted(set(_image_folders(run).values()))
    units = [(f, label) for f in folders for label in range(len(run.source.class_names))]
    mine = [units[i] for i in run.mine([1.0] * len(units))]
    todo = [(f, label) for f, label in mine if not is_done(class_file(_label_folder(run, f, digest), label))]
    for folder, label in progress(todo, desc="label", unit="class", main=run.main and bool(todo)):
        started = time.perf_counter()
        images = read_tensors(class_file(folder, label))[0]["images"]
        logits = pooled_logits(teachers, images).half()
        write_tensors(class_file(_label_folder(run, folder, digest), label), {"logits": logits}, meta)
        unit_done("label", run.source.class_names[label], time.perf_counter() - started, images=len(images))
    run.finish("label", began, sets=len(folders))
    if run.main:
        # which labels are these teachers'; those of earlier ones stay beside them
        known = {f.name: _label_folder(run, f, digest).name for f in folders}
        write_json(run.folder / "labels" / "index.json", known)
    run.accelerator.wait_for_everyone()


def _label_folder(run: Run, images: Path, digest: str) -> Path:
    return run.folder / "labels" / f"{images.name}-{digest}"


def _find_labels(run: Run, images: Path) -> Path | None:
    """The folder of the labels of stored images, if there are any."""
    index = run.folder / "labels" / "index.json"
    name = read_json(index).get(images.name) if run.config.teachers and index.is_file() else None
    return run.folder / "labels" / name if name else None


# --- assemble -----------------------------------------------------------------------------------------------------


def assemble(run: Run) -> None:
    """Put images, labels and weights together in `dataset/`, one set per ipc and method. A set is a unit of work, and
    one class of it at a time is in memory."""
    folders = _image_folders(run)
    cache = cache_of(run)
    base = run.folder / "dataset"
    units = [(ipc, method) for ipc in run.config.ipc for method in run.config.methods]
    mine = [units[i] for i in run.mine([float(ipc) for ipc, _ in units])]
    for ipc, method in progress(mine, desc="assemble", unit="set", main=run.main):
        parts = Parts(run, cache, ipc, method, folders[f"{ipc}/{method}"])
        if not has_set(base, f"ipc{ipc}-{method}", parts.recipe):
            write_set(
                base, f"ipc{ipc}-{method}", iter(parts), {**parts.provenance, "recipe": parts.recipe}, card=False
            )
    run.accelerator.wait_for_everyone()
    if run.main:
        write_dataset_card(base)
    run.accelerator.wait_for_everyone()


@dataclass(frozen=True)
class Parts:
    """What a set is put together from, class by class."""

    run: Run
    cache: LatentCache
    ipc: int
    method: str
    images: Path  # folder

    def __iter__(self) -> Iterator[DistilledSet]:
        m, cluster_config, _ = self.run.resolved(self.method)
        for p in load_prototypes(self.run, self.cache, self.ipc, cluster_config):
            tensors, meta = read_tensors(class_file(self.images, p.label))
            logits = tensors.get("logits")  # that the last stage of refinement gave
            if logits is None and self.labels:
                logits = read_tensors(class_file(self.labels, p.label))[0]["logits"]
            copies = meta["copies"]
            yield DistilledSet(
                images=tensors["images"],
                labels=torch.full_like(p.counts, p.label).repeat_interleave(copies),
                weights=p.weights(m.weights, m.normalize).repeat_interleave(copies),
                class_names=self.run.source.class_names,
                prototype=torch.arange(len(p.counts)).repeat_interleave(copies),
                counts=p.counts.repeat_interleave(copies),
                source_row=p.medoid_rows.repeat_interleave(copies),
                soft_labels=logits,
            )

    @functools.cached_property
    def labels(self) -> Path | None:
        return _find_labels(self.run, self.images)

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        m, cluster_config, generate_config = self.run.resolved(self.method)
        with open_tensors(class_file(self.images, 0)) as f:
            labelled = "logits" in f.keys()  # noqa: SIM118  (not a dict)
        by = {"by": "the teachers of the last stage of refinement"} if labelled else None
        return {
            **{k: v for k, v in read_json(self.run.folder / "provenance.json").items() if k != "settings"},
            "ipc": self.ipc,
            "method": _method_provenance(self.method, m),
            "codec": to_dict(self.run.config.codec),
            "cluster": _cluster_provenance(self.run, cluster_config),
            "generate": {**to_dict(generate_config), "start": read_metadata(class_file(self.images, 0))["start"]},
            "refine": chain.provenance(self.run, self.method, self.images),
            "labels": by or (read_metadata(class_file(self.labels, 0)) if self.labels else None),
        }

    @functools.cached_property
    def recipe(self) -> str:
        """Digest of all that decides the set."""
        _, cluster_config, _ = self.run.resolved(self.method)
        folders = [self.images, prototype_folder(self.run, self.cache, self.ipc, cluster_config), self.labels]
        classes = range(len(self.run.source.class_names))
        files = [read_checksum(class_file(f, c)) for f in folders if f for c in classes]
        return digest_of([files, {k: v for k, v in self.provenance.items() if k != "processes"}])


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
    images = len(run.source.train)
    cache = LatentCache(folder, run.source.class_names, known["key"], images, tuple(known["shape"]))
    cache.check()
    return cache


def _cluster_provenance(run: Run, cluster: ClusterConfig) -> dict[str, Any]:
    """How the points of a set were found, with the digest of the teacher whose features they were found by."""
    teacher = {"teacher": known_features(run)["digest"]} if cluster.uses_features else {}
    return {**to_dict(cluster), "engine": choose_engine(cluster.engine), **teacher}


def _method_provenance(name: str, method: MethodConfig) -> dict[str, Any]:
    """Name and settings of a method; its stages are recorded with their teachers, under `refine`."""
    return {"name": name, **{k: v for k, v in to_dict(method).items() if k != "refine"}}
