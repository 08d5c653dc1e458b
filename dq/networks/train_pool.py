"""Making pools of weak teachers: prior generation by one training's early checkpoints, post generation by structured
pruning (Teddy, arXiv 2410.07579; what the paper leaves open is a setting of `train_pool`)."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dq.config.dtypes import Dtypes, folder_dtypes, record_dtypes, resolve_dtypes
from dq.config.reader import to_dict
from dq.config.schema import RunConfig
from dq.config.students import StudentConfig
from dq.core.errors import InputError, RunError
from dq.core.files import check_place, is_done, read_json, write_json, write_tensors
from dq.core.processes import assign_units
from dq.core.progress import progress
from dq.core.seeds import derive_seed, digest_of, generator
from dq.data.source import ImageSource
from dq.networks.pool import MANIFEST, reestimate_bn
from dq.networks.prune_channels import prune
from dq.networks.real_data import RealData
from dq.networks.teacher_check import naming
from dq.networks.teacher_loading import load_teacher
from dq.networks.train_teachers import teacher_data, teacher_recipe, teacher_world
from dq.networks.training import Checkpoint, Pixels, TrainingSet, accuracy, fit, normalizer
from dq.networks.zoo import make_net

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dq")
SETTINGS = "settings.json"  # in the folder of a pool: what decides it
BATCH = 500  # images at once where statistics are estimated


def train_pool(config: RunConfig, source: ImageSource, *, accelerator: Accelerator) -> Path:
    """Make the pool that `config.train_pool` describes, in `config.train_pool.output_dir`.

    Prior generation trains one network by the settings of `train_teachers` and keeps it as it was at the end of some
    epochs. Post generation takes channels out of a trained network and trains each copy briefly. Batch norm
    statistics of every member are estimated anew over train images. Members outside the window of accuracies are kept
    in the folder and not used. A killed call goes on where it was; copies are divided over processes.

    Raises:
        InputError: if torch-pruning is needed and not installed, or the settings do not fit.
        RunError: if the folder holds a pool of other settings, or no member falls within the window.
    """
    config, dtypes, settings = check_pool(config, source, accelerator)
    p, folder = config.train_pool, Path(config.train_pool.output_dir)
    recipe = teacher_recipe(config.train_teachers)
    bench = teacher_data(config, source, recipe, accelerator.device)
    net = p.base.net if p.generation == "post" and p.base else p.net
    accelerator.wait_for_everyone()
    record_dtypes(folder, dtypes, main=accelerator.is_main_process)
    if accelerator.is_main_process:
        write_json(folder / SETTINGS, {"digest": digest_of(settings), **settings})
    if p.generation == "prior":
        mean, std = bench.mean, bench.std
        names = _checkpoints(config, bench, folder, recipe, accelerator)
    else:
        names, (mean, std) = _pruned(config, bench, folder, recipe, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        members = [read_json(folder / f"{n}.json") for n in names]
        base = read_json(folder / "base.json")
        low, high = (w * base["accuracy"] for w in p.window)
        for m in members:
            m["used"] = low <= m["accuracy"] <= high
            verdict = "" if m["used"] else f", outside of {low:.1%} to {high:.1%} and not used"
            log.info("%s: %.1f %%%s", m["name"], 100 * m["accuracy"], verdict)
        if not any(m["used"] for m in members):
            found = ", ".join(f"{m['accuracy']:.1%}" for m in members)
            raise RunError(
                f"no member of the pool is within {low:.1%} to {high:.1%} (they reach {found}); choose other "
                "train_pool.epochs or .prune, or widen train_pool.window"
            )
        facts = {
            "generation": p.generation,
            "net": net,
            "mean": mean,
            "std": std,
            "classes": list(source.class_names),
            "image_size": bench.image_size,
            "base": base,
            "members": members,
            "window": list(p.window),
            "keep_base": p.keep_base,
            "validation_images": len(bench.validation_rows),
            "source": {"origin": source.origin, "fingerprint": source.fingerprint},
            "settings": settings,
        }
        write_json(folder / MANIFEST, facts)  # the pool is whole once this file is there
    accelerator.wait_for_everyone()
    return folder


def check_pool(
    config: RunConfig, source: ImageSource, accelerator: Accelerator
) -> tuple[RunConfig, Dtypes, dict[str, Any]]:
    """Whether a pool of these settings can be made.

    Returns:
        The configuration without `dtype: auto`, what that stands for, and the settings that decide the pool.

    Raises:
        InputError: for epochs that the training does not have, an unknown network, a missing package or base.
        RunError: if the folder holds a pool of other settings.
    """
    p, t = config.train_pool, config.train_teachers
    classes, size = len(source.class_names), config.image_size
    check_place(p.output_dir, "train_pool.output_dir")
    check_place(config.cache_dir, "cache_dir", reads=True)
    if p.generation == "prior":
        make_net(p.net, classes, size, seed=0)
        if max(p.epochs) >= t.epochs:
            raise InputError(
                f"train_pool.epochs={list(p.epochs)} must end before the training does, at train_teachers.epochs="
                f"{t.epochs}; the last epoch is the base"
            )
        return _settings(config, source, accelerator, None)
    if importlib.util.find_spec("torch_pruning") is None:
        raise InputError("pruning needs torch-pruning, which is not installed; pip install 'dq-distill[pruning]'")
    assert p.base is not None
    with naming("train_pool.base"):
        base = load_teacher(p.base, classes, size)
    if base.classes is not None or base.image_size not in (None, size):
        raise InputError("a pool is pruned from a network that sees the images as they are and has just their classes")
    return _settings(config, source, accelerator, base.digest)


def _settings(
    config: RunConfig, source: ImageSource, accelerator: Accelerator, base: str | None
) -> tuple[RunConfig, Dtypes, dict[str, Any]]:
    """What `check_pool` returns, for a network to be pruned of the digest `base`."""
    folder = Path(config.train_pool.output_dir)
    known = folder / SETTINGS
    begun = str(read_json(known)["recipe"].get("dtype", "float32")) if is_done(known) else None
    dtypes = folder_dtypes(folder, accelerator, begun=begun)
    config = resolve_dtypes(config, dtypes)
    recipe, pool = teacher_recipe(config.train_teachers), to_dict(config.train_pool)
    for key in ("output_dir", "window", "keep_base"):
        pool.pop(key)
    settings: dict[str, Any] = {
        "pool": pool,
        "world": teacher_world(config, source, recipe),
        "recipe": to_dict(recipe),
        "seed": config.train_teachers.seed,
    }
    if base is not None:
        # where the network lies does not matter, its weights do
        pool["base"].pop("path")
        settings["base"] = base
    if is_done(known) and read_json(known)["digest"] != digest_of(settings):
        raise RunError(f"{folder} holds a pool of other settings or data; choose another train_pool.output_dir")
    return config, dtypes, settings


def pool_text(config: RunConfig) -> str:
    """What a pool is made by, in a sentence."""
    p, t = config.train_pool, config.train_teachers
    if p.generation == "prior":
        kept = ", ".join(map(str, sorted(p.epochs)))
        return (
            f"{p.net} is trained for train_teachers.epochs={t.epochs} epochs: its state after {kept} are the members, "
            "and its last is the base that they are measured by"
        )
    return f"{p.size} copies of the base are pruned and trained for {p.recovery_epochs} epochs each"


def _checkpoints(
    config: RunConfig, bench: RealData, folder: Path, recipe: StudentConfig, accelerator: Accelerator
) -> list[str]:
    """Prior generation, by the main process: one training is one unit of work."""
    p, t = config.train_pool, config.train_teachers
    fresh = make_net(p.net, bench.classes, bench.image_size, seed=0)
    if not any(isinstance(m, nn.BatchNorm2d) for m in fresh.modules()):
        log.warning("note: %s has no batch norm, so that this pool can label but has no statistics to match", p.net)
    log.info("%s", pool_text(config))
    names = [f"epoch-{e:04d}" for e in sorted(p.epochs)]
    if not accelerator.is_main_process or all(_is_kept(folder, n) for n in (*names, "base")):
        return names
    recipe = dataclasses.replace(recipe, net=p.net, tests=t.epochs)  # a look after every epoch
    pixels = bench.pixels(recipe)
    images, labels = _train_images(bench)

    def keep(net: nn.Module, epoch: int) -> float:
        if epoch in p.epochs or epoch == t.epochs:
            name = "base" if epoch == t.epochs else f"epoch-{epoch:04d}"
            return _keep(copy.deepcopy(net), name, folder, bench, pixels, images, config, epoch=epoch)["accuracy"]
        return 0.0

    with progress([], desc=f"train {p.net}", total=t.epochs, unit="epoch") as bar:
        fit(
            TrainingSet(images, labels, bench.classes, pixels),
            recipe,
            seed=derive_seed(t.seed, "pool", p.net),
            evaluate=keep,
            on_epoch=lambda epoch, loss: _show(bar, epoch, loss),
            checkpoint=Checkpoint(folder / "checkpoint.safetensors", t.checkpoint_s),
        )
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    return names


def _is_kept(folder: Path, name: str) -> bool:
    return is_done(folder / f"{name}.json") and is_done(folder / f"{name}.safetensors")


def _show(bar: Any, epoch: int, loss: float) -> None:
    bar.update(epoch - bar.n)
    bar.set_postfix(loss=f"{loss:.3f}")


def _pruned(
    config: RunConfig, bench: RealData, folder: Path, recipe: StudentConfig, accelerator: Accelerator
) -> tuple[list[str], tuple[tuple[float, ...], tuple[float, ...]]]:
    """Post generation: copies are units of work."""
    p, t = config.train_pool, config.train_teachers
    assert p.base is not None
    with naming("train_pool.base"):
        base = load_teacher(p.base, bench.classes, bench.image_size, bench.device)
    recipe = dataclasses.replace(recipe, net=p.base.net, epochs=max(1, p.recovery_epochs), lr=p.recovery_lr, tests=1)
    pixels = normalizer(base.mean, base.std)
    names = [f"pruned-{i:04d}" for i in range(p.size)]
    todo = ["base", *names]
    assigned = [todo[i] for i in assign_units([1.0] * len(todo), accelerator.process_index, accelerator.num_processes)]
    assigned = [n for n in assigned if not _is_kept(folder, n)]
    if assigned:
        images, labels = _train_images(bench)
    for name in progress(assigned, desc="prune", unit="net", main=accelerator.is_main_process):
        if name == "base":
            net = copy.deepcopy(base.net)
            _keep(net, name, folder, bench, pixels, None, config)
            continue
        i = names.index(name)
        ratio = p.prune[0] + (p.prune[1] - p.prune[0]) * (i / (p.size - 1) if p.size > 1 else 0.5)
        criterion = p.criteria[i % len(p.criteria)]
        seed = derive_seed(t.seed, "prune", name)
        small = prune(base.net, bench.image_size, ratio, criterion, seed=seed)
        if p.recovery_epochs:
            checkpoint = Checkpoint(folder / f"{name}.checkpoint.safetensors", t.checkpoint_s)
            trained_on = TrainingSet(images, labels, bench.classes, pixels)
            small = fit(trained_on, recipe, seed=seed, net=small, checkpoint=checkpoint).net
        _keep(small, name, folder, bench, pixels, images, config, ratio=round(ratio, 4), criterion=criterion)
        (folder / f"{name}.checkpoint.safetensors").unlink(missing_ok=True)
    return names, (base.mean, base.std)


def _train_images(bench: RealData) -> tuple[Tensor, Tensor]:
    images, labels = bench.read(bench.source.train, bench.candidates)
    return images.to(bench.device), labels.to(bench.device)


def _keep(
    net: nn.Module,
    name: str,
    folder: Path,
    bench: RealData,
    pixels: Pixels,
    images: Tensor | None,
    config: RunConfig,
    **facts: Any,
) -> dict[str, Any]:
    """Estimate batch norm statistics anew (not without `images`), measure on validation images, write; returns what
    was written beside the weights."""
    if images is not None:
        reestimate_bn(net, list(_sample(images, pixels, config.train_pool.statistics_images)))
    held_out = bench.validation(1.0)
    if held_out is None:
        raise InputError("a pool is measured on validation images; set evaluate.validation_images")
    found = accuracy(net, *held_out, pixels=pixels)
    write_tensors(folder / f"{name}.safetensors", net.state_dict())
    channels = sum(m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d))
    record = {"name": name, "file": f"{name}.safetensors", "accuracy": found, "channels": channels, **facts}
    write_json(folder / f"{name}.json", record)
    return record


def _sample(images: Tensor, pixels: Pixels, number: int) -> Iterator[Tensor]:
    rows = torch.randperm(len(images), generator=generator("pool statistics"))[:number]
    for part in rows.tensor_split(-(-len(rows) // BATCH)):  # nearly equal, since all count alike
        yield pixels(images[part.to(images.device)])
