"""The assemble stage of a run: images, labels and weights as sets."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dq.cluster.engines import choose_engine
from dq.config.pruning import PruneConfig
from dq.config.reader import to_dict
from dq.config.schema import ClusterConfig, GenerateConfig, MethodConfig
from dq.core.errors import InputError
from dq.core.files import open_tensors, read_checksum, read_json, read_metadata, read_tensors
from dq.core.plain import PlainDict
from dq.core.progress import progress
from dq.core.seeds import digest_of
from dq.diffusion.latents import LatentCache
from dq.distilled.card import write_dataset_card
from dq.distilled.format import has_set
from dq.distilled.parquet import write_set
from dq.distilled.set import DistilledSet
from dq.run import refinement as chain
from dq.run.folder import Run, class_file, deciding
from dq.run.stages.cluster import load_prototypes, prototype_folder
from dq.run.stages.encode import cache_of
from dq.run.stages.features import features_record
from dq.run.stages.generate import folder_selection
from dq.run.stages.label import image_folders, label_folder
from dq.run.stages.prune import prune_identity
from dq.run.stages.refine import SOFT_LABELS


def assemble(run: Run) -> None:
    """Write images, labels and weights as sets, by ipc and method.

    A set is a unit of work, and one class of it at a time is in memory.
    """
    folders = image_folders(run)
    cache = cache_of(run)
    base = run.folder / "dataset"
    units = [(ipc, method) for ipc in run.config.ipc for method in run.config.methods]
    assigned = [units[i] for i in run.local_units([float(ipc) for ipc, _ in units])]
    for ipc, method in progress(assigned, desc="assemble", unit="set", main=run.main):
        parts = Parts(run, cache, ipc, method, folders[f"{ipc}/{method}"])
        if not has_set(base, f"ipc{ipc}-{method}", parts.recipe):
            write_set(base, f"ipc{ipc}-{method}", iter(parts), {**parts.provenance, "recipe": parts.recipe})
    run.accelerator.wait_for_everyone()
    if run.main:
        write_dataset_card(base)
    run.accelerator.wait_for_everyone()


@dataclass(frozen=True)
class Parts:
    """The parts of a set, class by class."""

    run: Run
    cache: LatentCache
    ipc: int
    method: str
    images: Path  # folder

    def __iter__(self) -> Iterator[DistilledSet]:
        resolved = self.run.resolved(self.method)
        m = resolved.method
        for p in load_prototypes(self.run, self.cache, self.ipc, resolved):
            tensors, meta = read_tensors(class_file(self.images, p.label))
            # of the last stage of refinement
            soft_labels = next((tensors[name] for name in SOFT_LABELS if name in tensors), None)
            if soft_labels is None and self.labels:
                soft_labels = read_tensors(class_file(self.labels, p.label))[0]["logits"]
            weights = p.image_weights(meta["copies"], m.weights, m.normalize)
            copies = torch.as_tensor(meta["copies"]).expand(len(p.counts))
            rows = p.medoid_rows.repeat_interleave(copies)
            if "source_rows" in meta:  # images that are real ones
                own = torch.tensor(meta["source_rows"])
                rows = torch.where(own >= 0, own, rows)
            yield DistilledSet(
                images=tensors["images"],
                labels=torch.full_like(p.counts, p.label).repeat_interleave(copies),
                weights=torch.ones_like(weights) if meta.get("uniform_weights") else weights,
                class_names=self.run.source.class_names,
                prototype=torch.arange(len(p.counts)).repeat_interleave(copies),
                counts=p.counts.repeat_interleave(copies),
                source_row=rows,
                soft_labels=soft_labels,
                bounded=meta.get("bounded", True),
                label_kind=meta.get("label_kind", "logits"),
                step_size=meta.get("step_size"),
            )

    @functools.cached_property
    def labels(self) -> Path | None:
        return label_folder(self.run, self.images)

    @functools.cached_property
    def provenance(self) -> PlainDict:
        m, cluster_config, generate_config, prune_config = self.run.resolved(self.method)
        with open_tensors(class_file(self.images, 0)) as f:
            labeled = bool(set(SOFT_LABELS) & set(f.keys()))
        by = {"by": "the teachers of the last stage of refinement"} if labeled else None
        labels = by or (read_metadata(class_file(self.labels, 0)) if self.labels else None)
        start = read_metadata(class_file(self.images, 0))["start"]
        selection = folder_selection(self.images, len(self.run.source.class_names))
        if selection and labels and "digests" in labels:
            selection["labels_too"] = selection["digest"] in labels["digests"]
        drawing = {"start": start} | ({"selection": selection} if selection else {})
        return {
            **{k: v for k, v in read_json(self.run.folder / "provenance.json").items() if k != "settings"},
            "ipc": self.ipc,
            "method": _method_provenance(self.method, m),
            "codec": to_dict(self.run.config.codec),
            **_prune_provenance(self.run, prune_config),
            "cluster": _cluster_provenance(self.run, cluster_config),
            "generate": {**to_dict(generate_config), **drawing},
            "refine": chain.provenance(self.run, self.method, self.images),
            "labels": labels,
        }

    @functools.cached_property
    def recipe(self) -> str:
        """Digest of everything that determines the set."""
        points = prototype_folder(self.run, self.cache, self.ipc, self.run.resolved(self.method))
        folders = [self.images, points, self.labels]
        classes = range(len(self.run.source.class_names))
        files = [read_checksum(class_file(f, c)) for f in folders if f for c in classes]
        return digest_of([files, {k: v for k, v in self.provenance.items() if k != "processes"}])


def load_set_of_run(run: Run, ipc: int, method: str) -> DistilledSet:
    """Load a saved set of the run.

    Raises:
        InputError: if it does not exist, or was made under other settings of this method than the present ones.
    """
    name = f"ipc{ipc}-{method}"
    m, cluster_config, generate_config, prune_config = run.resolved(method)
    s = DistilledSet.load(run.folder / "dataset", name)
    now = {
        "method": _method_provenance(method, m),
        "cluster": _cluster_provenance(run, cluster_config),
        "generate": to_dict(generate_config),
    }
    # a setting that came later had the value that is now its default
    before = {"cluster": to_dict(ClusterConfig()), "generate": to_dict(GenerateConfig())}
    for section, settings in now.items():
        earlier = deciding({**before.get(section, {}), **s.provenance[section]})
        for key, value in deciding(settings).items():
            made_with = earlier.get(key)
            if made_with != value:
                raise InputError(
                    f"the set {name} was made with {section}.{key}={made_with}, not {value}; "
                    "run `dq label` to put it together again, or `dq run`"
                )
    if s.provenance.get("prune") != _prune_provenance(run, prune_config).get("prune"):
        raise InputError(f"the set {name} was made with other settings of prune; run `dq cluster` and what follows")
    stages = s.provenance.get("refine", [])
    folder = image_folders(run)[f"{ipc}/{method}"].name if stages or chain.stages_of(run.config, method) else None
    if [r["settings"] for r in stages] != chain.requested_settings(run.config, method) or (
        stages and stages[-1]["folder"] != folder
    ):
        raise InputError(f"the set {name} was refined otherwise; run `dq refine` and `dq label`, or `dq run`")
    return s


def _cluster_provenance(run: Run, cluster: ClusterConfig) -> PlainDict:
    """Settings of clustering, with the digest of the teacher whose features were used."""
    teacher = {"teacher": features_record(run)["digest"]} if cluster.uses_features else {}
    return {**to_dict(cluster), "engine": choose_engine(cluster.engine), **teacher}


def _prune_provenance(run: Run, prune: PruneConfig) -> PlainDict:
    """Settings of pruning with the digest of the scores; empty without pruning."""
    return {"prune": prune_identity(run, prune)} if prune.active else {}


def _method_provenance(name: str, method: MethodConfig) -> PlainDict:
    """Name and settings of a method, without its stages, which `refine` records."""
    return {"name": name, **{k: v for k, v in to_dict(method).items() if k != "refine"}}
