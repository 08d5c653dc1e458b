"""Pools of weak teachers (Teddy, arXiv 2410.07579; what the paper leaves open is a setting of `train_pool`).

Prior generation by one training's early checkpoints, post generation by structured pruning.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dq.config.dtypes import Dtypes, folder_dtypes, record_dtypes, resolve_dtypes
from dq.config.reader import to_dict
from dq.config.schema import RunConfig
from dq.config.students import StudentConfig
from dq.core.errors import InputError, RunError
from dq.core.files import check_place, is_done, read_json, write_json, write_tensors
from dq.core.plain import PlainDict
from dq.core.processes import assign_units
from dq.core.progress import progress
from dq.core.seeds import derive_seed, digest_of, generator
from dq.core.text import plural
from dq.data.source import ImageSource
from dq.networks.pool import MANIFEST, reestimate_bn
from dq.networks.prune_channels import prune
from dq.networks.real_data import RealData
from dq.networks.teacher_check import naming
from dq.networks.teacher_loading import load_teacher
from dq.networks.train_teachers import teacher_data, teacher_data_identity, teacher_recipe
from dq.networks.training import Checkpoint, Pixels, TrainingSet, accuracy, fit, normalizer
from dq.networks.zoo import check_net, make_net

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dq")
SETTINGS = "settings.json"  # in the folder of a pool: what decides it
BATCH = 500  # images at once where statistics are estimated


def train_pool(config: RunConfig, source: ImageSource, *, accelerator: Accelerator) -> Path:
    """Make the pool that `config.train_pool` describes, in `config.train_pool.output_dir`.

    Prior generation trains one network by the settings of `train_teachers` and saves it after some epochs. Post
    generation prunes channels of a trained network and trains each copy briefly. Batch norm statistics of every member
    are estimated over train images. Members outside the window of accuracies stay in the folder and are not used.
    A killed call resumes; copies are divided over processes.

    Raises:
        InputError: if torch-pruning is needed and not installed, or the settings do not fit.
        RunError: if the folder holds a pool of other settings, or no member falls within the window.
    """
    config, dtypes, settings = check_pool(config, source, accelerator)
    p, folder = config.train_pool, Path(config.train_pool.output_dir)
    recipe = teacher_recipe(config.train_teachers)
    real_data = teacher_data(config, source, recipe, accelerator.device)
    net = p.base.net if p.generation == "post" and p.base else p.net
    accelerator.wait_for_everyone()
    record_dtypes(folder, dtypes, main=accelerator.is_main_process)
    if accelerator.is_main_process:
        write_json(folder / SETTINGS, {"digest": digest_of(settings), **settings})
    if p.generation == "prior":
        mean, std = real_data.mean, real_data.std
        names = _checkpoints(config, real_data, folder, recipe, accelerator)
    else:
        names, (mean, std) = _pruned(config, real_data, folder, recipe, accelerator)
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
            accuracies = ", ".join(f"{m['accuracy']:.1%}" for m in members)
            raise RunError(
                f"no member of the pool is within {low:.1%} to {high:.1%} (they reach {accuracies}); choose other "
                "train_pool.epochs or .prune, or widen train_pool.window"
            )
        facts = {
            "generation": p.generation,
            "net": net,
            "mean": mean,
            "std": std,
            "classes": list(source.class_names),
            "image_size": real_data.image_size,
            "base": base,
            "members": members,
            "window": list(p.window),
            "keep_base": p.keep_base,
            "validation_images": len(real_data.validation_rows),
            "source": {"origin": source.origin, "fingerprint": source.fingerprint},
            "settings": settings,
        }
        write_json(folder / MANIFEST, facts)  # the pool is complete once this file exists
    accelerator.wait_for_everyone()
    return folder


def check_pool(
    config: RunConfig, source: ImageSource, accelerator: Accelerator
) -> tuple[RunConfig, Dtypes, PlainDict]:
    """Check whether a pool of these settings can be made.

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
        check_net(p.net, classes, size)
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
) -> tuple[RunConfig, Dtypes, PlainDict]:
    """What `check_pool` returns, for a network to be pruned of the digest `base`."""
    folder = Path(config.train_pool.output_dir)
    file = folder / SETTINGS
    begun = str(read_json(file)["recipe"].get("dtype", "float32")) if is_done(file) else None
    dtypes = folder_dtypes(folder, accelerator, begun=begun)
    config = resolve_dtypes(config, dtypes)
    recipe, pool = teacher_recipe(config.train_teachers), to_dict(config.train_pool)
    for key in ("output_dir", "window", "keep_base"):
        pool.pop(key)
    settings: PlainDict = {
        "pool": pool,
        "world": teacher_data_identity(config, source, recipe),
        "recipe": to_dict(recipe),
        "seed": config.train_teachers.seed,
    }
    if base is not None:
        # the digest of its weights stands for the path
        pool["base"].pop("path")
        settings["base"] = base
    if is_done(file) and read_json(file)["digest"] != digest_of(settings):
        raise RunError(f"{folder} holds a pool of other settings or data; choose another train_pool.output_dir")
    return config, dtypes, settings


def pool_text(config: RunConfig) -> str:
    """Describe in a sentence how a pool is made."""
    p, t = config.train_pool, config.train_teachers
    if p.generation == "prior":
        epochs = ", ".join(map(str, sorted(p.epochs)))
        return (
            f"{p.net} is trained for train_teachers.epochs={t.epochs} epochs: "
            f"its state after {epochs} are the members, "
            "and its last is the base that they are measured by"
        )
    return f"{p.size} copies of the base are pruned and trained for {plural(p.recovery_epochs, 'epoch')} each"


def _checkpoints(
    config: RunConfig, real_data: RealData, folder: Path, recipe: StudentConfig, accelerator: Accelerator
) -> list[str]:
    """Prior generation, by the main process: one training is one unit of work."""
    p, t = config.train_pool, config.train_teachers
    fresh = make_net(p.net, real_data.classes, real_data.image_size, seed=0)
    if not any(isinstance(m, nn.BatchNorm2d) for m in fresh.modules()):
        log.warning("note: %s has no batch norm, so that this pool can label but has no statistics to match", p.net)
    log.info("%s", pool_text(config))
    names = [f"epoch-{e:04d}" for e in sorted(p.epochs)]
    if not accelerator.is_main_process or all(_is_saved(folder, n) for n in (*names, "base")):
        return names
    recipe = dataclasses.replace(recipe, net=p.net, tests=t.epochs)  # evaluated after every epoch
    pixels = real_data.pixels(recipe)
    images, labels = _train_images(real_data)

    def save(net: nn.Module, epoch: int) -> float:
        if epoch in p.epochs or epoch == t.epochs:
            name = "base" if epoch == t.epochs else f"epoch-{epoch:04d}"
            return _save(copy.deepcopy(net), name, folder, real_data, pixels, images, config, epoch=epoch)["accuracy"]
        return 0.0

    with progress([], desc=f"train {p.net}", total=t.epochs, unit="epoch") as bar:
        fit(
            TrainingSet(images, labels, real_data.classes, pixels),
            recipe,
            seed=derive_seed(t.seed, "pool", p.net),
            evaluate=save,
            on_epoch=lambda epoch, loss: _show(bar, epoch, loss),
            checkpoint=Checkpoint(folder / "checkpoint.safetensors", t.checkpoint_s),
        )
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    return names


def _is_saved(folder: Path, name: str) -> bool:
    return is_done(folder / f"{name}.json") and is_done(folder / f"{name}.safetensors")


def _show(bar: tqdm, epoch: int, loss: float) -> None:
    bar.update(epoch - bar.n)
    bar.set_postfix(loss=f"{loss:.3f}")


def _pruned(
    config: RunConfig, real_data: RealData, folder: Path, recipe: StudentConfig, accelerator: Accelerator
) -> tuple[list[str], tuple[tuple[float, ...], tuple[float, ...]]]:
    """Post generation: copies are units of work."""
    p, t = config.train_pool, config.train_teachers
    assert p.base is not None
    with naming("train_pool.base"):
        base = load_teacher(p.base, real_data.classes, real_data.image_size, real_data.device)
    recipe = dataclasses.replace(recipe, net=p.base.net, epochs=max(1, p.recovery_epochs), lr=p.recovery_lr, tests=1)
    pixels = normalizer(base.mean, base.std)
    names = [f"pruned-{i:04d}" for i in range(p.size)]
    todo = ["base", *names]
    assigned = [todo[i] for i in assign_units([1.0] * len(todo), accelerator.process_index, accelerator.num_processes)]
    assigned = [n for n in assigned if not _is_saved(folder, n)]
    if assigned:
        images, labels = _train_images(real_data)
    for name in progress(assigned, desc="prune", unit="net", main=accelerator.is_main_process):
        if name == "base":
            net = copy.deepcopy(base.net)
            _save(net, name, folder, real_data, pixels, None, config)
            continue
        i = names.index(name)
        ratio = p.prune[0] + (p.prune[1] - p.prune[0]) * (i / (p.size - 1) if p.size > 1 else 0.5)
        criterion = p.criteria[i % len(p.criteria)]
        seed = derive_seed(t.seed, "prune", name)
        small = prune(base.net, real_data.image_size, ratio, criterion, seed=seed)
        if p.recovery_epochs:
            checkpoint = Checkpoint(folder / f"{name}.checkpoint.safetensors", t.checkpoint_s)
            trained_on = TrainingSet(images, labels, real_data.classes, pixels)
            small = fit(trained_on, recipe, seed=seed, net=small, checkpoint=checkpoint).net
        _save(small, name, folder, real_data, pixels, images, config, ratio=round(ratio, 4), criterion=criterion)
        (folder / f"{name}.checkpoint.safetensors").unlink(missing_ok=True)
    return names, (base.mean, base.std)


def _train_images(real_data: RealData) -> tuple[Tensor, Tensor]:
    images, labels = real_data.read(real_data.source.train, real_data.candidates)
    return images.to(real_data.device), labels.to(real_data.device)


def _save(
    net: nn.Module,
    name: str,
    folder: Path,
    real_data: RealData,
    pixels: Pixels,
    images: Tensor | None,
    config: RunConfig,
    **facts: object,
) -> PlainDict:
    """Write a member of the pool and its record, which is returned.

    Batch norm statistics are estimated again over `images`, if there are any.
    """
    if images is not None:
        reestimate_bn(net, list(_sample(images, pixels, config.train_pool.statistics_images)))
    held_out = real_data.validation(1.0)
    if held_out is None:
        raise InputError("a pool is measured on validation images; set evaluate.validation_images")
    measured = accuracy(net, *held_out, pixels=pixels)
    write_tensors(folder / f"{name}.safetensors", net.state_dict())
    channels = sum(m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d))
    record = {"name": name, "file": f"{name}.safetensors", "accuracy": measured, "channels": channels, **facts}
    write_json(folder / f"{name}.json", record)
    return record


def _sample(images: Tensor, pixels: Pixels, number: int) -> Iterator[Tensor]:
    rows = torch.randperm(len(images), generator=generator("pool statistics"))[:number]
    for part in rows.tensor_split(-(-len(rows) // BATCH)):  # nearly equal, since all count alike
        yield pixels(images[part.to(images.device)])
