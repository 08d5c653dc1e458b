"""A run folder: its owner, the settings of its methods, and its units."""

from __future__ import annotations

import dataclasses
import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dq.config.dtypes import Dtypes, folder_dtypes, note_slow, record_dtypes, resolve_dtypes
from dq.config.methods import ResolvedMethod, check_methods, resolved_method
from dq.config.overrides import apply_settings
from dq.config.reader import dump_config, to_dict
from dq.config.schema import GenerateConfig, MethodConfig, RunConfig, load_config
from dq.core.errors import InputError
from dq.core.files import append_jsonl, check_place, is_done, read_json, write_json, write_text
from dq.core.plain import PlainDict
from dq.core.processes import assign_units
from dq.core.trackers import report, stage_numbers
from dq.data.source import ImageSource
from dq.diffusion.latents import cached_dtype

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dq")

# Settings that decide what a run folder holds. The others (more ipc, more methods, another student) may change
# between calls: their units are named by digests of their own.
IDENTITY = ("seed", "source", "codec", "cluster", "generate", "teachers")
# ... of which these change speed, or whether there is a result, and never which
SPEED = ("batch_size", "compile", "path", "model", "on_bad_image", "on_small")
# ... and of which these decide nothing before there is a folder of their results
LATER = {"cluster": "prototypes", "generate": "images"}


@dataclass(frozen=True)
class Run:
    """One run: its settings, data, processes and folder."""

    config: RunConfig
    source: ImageSource
    accelerator: Accelerator
    folder: Path

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def local_units(self, costs: list[float]) -> list[int]:
        """Indices of the units that this process works on."""
        return assign_units(costs, self.accelerator.process_index, self.accelerator.num_processes)

    def resolved(self, method: str) -> ResolvedMethod:
        """A method with the settings that hold for it."""
        return resolved_method(self.config, method)

    def finish(self, stage: str, began: float, **numbers: Any) -> None:
        """Meet the other processes; the main one logs the stage, and tells the trackers."""
        self.accelerator.wait_for_everyone()
        if self.main:
            record = {"stage": stage, "seconds": round(time.perf_counter() - began, 3), **numbers}
            append_jsonl(self.folder / "metrics.jsonl", record)
            report(self.accelerator, stage_numbers(stage, record["seconds"], numbers))
            log.debug("%s: %.1f s", stage, record["seconds"])


def copies_of(method: MethodConfig, generate: GenerateConfig) -> int:
    """Images of a prototype.

    Decoding twice gives the same image, and so does copying a real one.
    """
    single = generate.mode == "decode" or method.representative == "real"
    return 1 if single else generate.images_per_prototype


def images_per_class(resolved: ResolvedMethod, ipc: int, class_counts: Sequence[int]) -> list[int]:
    """Images of every class in the set of a method.

    A class with fewer train images than `ipc` gives fewer, unless `cluster.prototypes_per_class` has its prototypes
    share `ipc` images.
    """
    copies = copies_of(resolved.method, resolved.generate)
    fixed = resolved.cluster.prototypes_per_class is not None
    return [(ipc if fixed else min(int(n), ipc)) * copies for n in class_counts]


def deciding(settings: PlainDict) -> PlainDict:
    """A section's settings without those that change speed alone, in it and in its selecting teacher."""
    decisive = {k: v for k, v in settings.items() if k not in SPEED}
    if decisive.get("select_teacher"):
        passed = (*SPEED, "check_images")
        decisive["select_teacher"] = {k: v for k, v in decisive["select_teacher"].items() if k not in passed}
    return decisive


def class_file(folder: Path, label: int) -> Path:
    """The file of a class in a folder of prototypes or images."""
    return folder / f"class-{label:05d}.safetensors"


def settle_dtypes(
    config: RunConfig, source: ImageSource, accelerator: Accelerator, loaded: Mapping[str, str] | None = None
) -> tuple[RunConfig, Dtypes]:
    """The configuration of a run without `dtype: auto`, and its folder's dtypes.

    Nothing is written.

    A run that was begun keeps its dtypes, and latents in the cache keep theirs.

    Args:
        config: of the run, as resolved from file and options.
        source: the images.
        accelerator: processes and device.
        loaded: dtypes of models that are loaded already, by section: "codec", "generate".
    """
    folder = Path(config.output_dir)
    begun = holds_work(folder)
    old = _recorded(folder)[1] if begun else None
    dtypes = folder_dtypes(folder, accelerator, begun=None if old is None else "float32", forget=not begun)
    for section in ("codec", "generate"):
        if getattr(config, section).dtype == "auto":
            recorded = ((old or {}).get(section) or {}).get("dtype", "auto")
            dtype = (loaded or {}).get(section, "auto") if recorded == "auto" else recorded
            if dtype == "auto" and section == "codec" and config.codec.path:
                read = dataclasses.replace(source, preprocess=config.source.preprocess)
                dtype = cached_dtype(config.cache_dir, read, config.codec, config.seed, dtypes["inference"])
            if dtype not in ("auto", dtypes["inference"]):
                note_slow(dtype, accelerator.device, f"{section}.dtype=auto stays {dtype} in {folder}, as before")
            config = apply_settings(config, {f"{section}.dtype": dtype})
    return resolve_dtypes(config, dtypes), dtypes


def _recorded(folder: Path) -> tuple[PlainDict, PlainDict | None]:
    """The provenance of a run folder, and the settings that it was begun with.

    The settings are None if there are none.
    """
    record, settings_file = folder / "provenance.json", folder / "config.yaml"
    facts = read_json(record) if is_done(record) else {}
    if facts.get("settings") or not settings_file.is_file():
        return facts, facts.get("settings")
    # the configuration says what was asked for, and the record of dtypes what auto stood for
    dtypes = folder_dtypes(folder, "cpu", begun="float32")
    return facts, to_dict(resolve_dtypes(load_config(settings_file), dtypes))


def check_folder(config: RunConfig, source: ImageSource) -> PlainDict:
    """Whether `config.output_dir` may hold this run.

    Returns:
        The record of what made it; empty for a new folder.

    Raises:
        InputError: if the folder belongs to a run with other settings or data, or holds something else, or it or that
            of the cache cannot be written.
    """
    folder = Path(config.output_dir)
    check_place(folder, "output_dir")
    check_place(config.cache_dir, "cache_dir", reads=True)
    settings = {key: to_dict(config)[key] for key in IDENTITY}
    provenance_record, old = _recorded(folder)
    if old is not None and not holds_work(folder):  # of an attempt that made nothing
        old, provenance_record = settings, {}
    if old is None and _holds_something(folder):
        raise InputError(f"{folder} is not empty and not a run of dq; choose another --output_dir")
    if old is not None:  # what nothing was made by yet may change
        old = old | {key: settings[key] for key, results in LATER.items() if not (folder / results).exists()}
    if old is not None and (changed := sorted(_changed(old, settings))):
        raise InputError(
            f"{folder} belongs to a run with other settings ({', '.join(changed[:4])}); "
            "choose another --output_dir, or delete that folder"
        )
    fingerprint = provenance_record.get("source", {}).get("fingerprint", source.fingerprint)
    if fingerprint != source.fingerprint:
        raise InputError(
            f"{folder} was made from other data (fingerprint {fingerprint}, now {source.fingerprint}); "
            "choose another --output_dir"
        )
    return provenance_record


def open_run(
    config: RunConfig, source: ImageSource, accelerator: Accelerator, loaded: Mapping[str, str] | None = None
) -> Run:
    """Open or continue the run in `config.output_dir`; what `dtype: auto` stands for is settled here.

    Args:
        config: of the run, as resolved from file and options.
        source: the images.
        accelerator: processes and device.
        loaded: dtypes of models that are loaded already, by section: "codec", "generate".

    Raises:
        InputError: if the folder belongs to a run with other settings or data, or holds something else.
    """
    check_methods(config)
    folder = Path(config.output_dir)
    settings_file = folder / "config.yaml"
    requested = config
    config, dtypes = settle_dtypes(config, source, accelerator, loaded)
    reading = {"preprocess": config.source.preprocess, "on_bad_image": config.source.on_bad_image}
    run = Run(config, dataclasses.replace(source, **reading), accelerator, folder)  # type: ignore[arg-type]
    record, settings = folder / "provenance.json", {key: to_dict(config)[key] for key in IDENTITY}
    facts = check_folder(config, source)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if facts.get("settings") != settings:  # the record, and not config.yaml, says whose folder it is
            write_json(record, {**(facts or provenance(run)), "settings": settings})
        write_text(settings_file, dump_config(requested))
    record_dtypes(folder, dtypes, main=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    return run


def holds_work(folder: Path) -> bool:
    """Whether anything was made in a run folder, apart from its settings and logs."""
    no_work = ("config.yaml", "provenance.json", "logs", "bad_images.txt")
    return folder.is_dir() and any(f.name not in no_work and f.name[0] != "." for f in folder.iterdir())


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(f.name != "provenance.json" and f.name[0] != "." for f in folder.iterdir())


def _changed(a: PlainDict, b: PlainDict) -> Iterator[str]:
    for section in IDENTITY:
        if isinstance(a[section], dict) and isinstance(b[section], dict):
            old, new = deciding(a[section]), deciding(b[section])
            for key in old:
                if old[key] != new[key]:
                    yield f"{section}.{key}: {old[key]} -> {new[key]}"
        elif isinstance(a[section], list):
            # teachers may be named later, and may lie elsewhere
            old_list, new_list = ([{k: v for k, v in x.items() if k not in SPEED} for x in y[section]] for y in (a, b))
            if old_list and new_list and old_list != new_list:
                yield f"{section}: {old_list} -> {new_list}"
        elif a[section] != b[section]:
            yield f"{section}: {a[section]} -> {b[section]}"


def provenance(run: Run) -> PlainDict:
    """What made this run: versions, hardware, data."""
    import accelerate
    import datasets
    import diffusers

    from dq.core.version import __version__

    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None
    return {
        "dq": __version__,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "accelerate": accelerate.__version__,
            "datasets": datasets.__version__,
        },
        "hardware": {
            "machine": platform.machine(),
            "device": gpu or run.device.type,
            "threads": torch.get_num_threads(),
        },
        "processes": run.accelerator.num_processes,
        "source": {
            "origin": run.source.origin,
            "fingerprint": run.source.fingerprint,
            "classes": list(run.source.class_names),
            "train_counts": run.source.class_counts().tolist(),
        },
        "seed": run.config.seed,
    }
