"""Training of experts: trajectories of networks on the source's own images, as units of work over processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dq.config.reader import to_dict
from dq.config.schema import RunConfig
from dq.config.students import EvaluateConfig, StudentConfig
from dq.config.trajectories import TrainExpertsConfig
from dq.core.errors import InputError, RunError
from dq.core.files import (
    check_place,
    is_done,
    read_checksum,
    read_metadata,
    read_tensors,
    write_json,
    write_tensors,
)
from dq.core.processes import assign_units
from dq.core.progress import duration, progress
from dq.core.seeds import derive_seed, digest_of, digest_of_tensors
from dq.core.text import format_bytes
from dq.data.source import ImageSource
from dq.data.zca import Whitening
from dq.networks.flat_parameters import FlatNet
from dq.networks.real_data import RealData, check_whitened, load_real_data, rows_set_aside, world_of
from dq.networks.trajectories import (
    MANIFEST,
    PREPROCESSING,
    expert_file,
    flat_accuracy,
    read_orders,
    train_trajectories,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dq")
SIDE_BY_SIDE = 10  # experts in a batched model on an accelerator
SPEED = ("output_dir", "number", "side_by_side", "checkpoint_s")  # settings that do not decide a trajectory


@dataclass(frozen=True)
class Planned:
    """What is to be trained."""

    net: FlatNet
    facts: dict[str, Any]  # what decides all trajectories
    identity: str
    orders: list[Tensor] | None  # of the curriculum
    groups: list[list[int]]  # experts that are trained together, without finished ones


def _recipe(t: TrainExpertsConfig) -> StudentConfig:
    """The settings on which real images depend, as those of a student."""
    # two tests, so that validation images are set aside
    return StudentConfig(net=t.net, whiten=t.whiten, augment=t.augment, tests=2)


def check_expert_training(config: RunConfig, source: ImageSource, accelerator: Accelerator) -> Planned:
    """Whether the experts of `config.train_experts` can be trained on these images, and what is left to do.

    Raises:
        InputError: for an unknown network, one with statistics over batches, images too large to be whitened, or an
            order of other images.
        RunError: if the folder holds experts of other settings or data.
    """
    t = config.train_experts
    check_place(t.output_dir, "train_experts.output_dir")
    check_place(config.cache_dir, "cache_dir", reads=True)
    if t.whiten:
        check_whitened(config.image_size)
    net = FlatNet(t.net, len(source.class_names), config.image_size)
    held_out = rows_set_aside(source, config.evaluate, [_recipe(t)])
    orders = None
    if t.curriculum is not None:
        rows = torch.ones(len(source.train), dtype=torch.bool)
        rows[torch.from_numpy(held_out)] = False
        candidates = rows.nonzero()[:, 0]
        orders = read_orders(t.curriculum.order, torch.from_numpy(source.train.labels)[candidates], candidates)
    settings = {k: v for k, v in to_dict(t).items() if k not in SPEED}
    if orders is not None:
        settings["curriculum"]["order"] = digest_of_tensors({str(c): o for c, o in enumerate(orders)})
    facts = {
        "net": t.net,
        "parameters": net.size,
        "classes": list(source.class_names),
        "image_size": config.image_size,
        "fingerprint": source.fingerprint,
        "world": world_of(source, config.image_size, held_out),
        "preprocess": source.preprocess,
        "validation_images": config.evaluate.validation_images,
        "epochs": t.epochs,
        "settings": settings,
    }
    identity = digest_of(facts)
    folder = Path(t.output_dir)
    finished = []
    for i in range(t.number):
        path = expert_file(folder, i)
        if is_done(path):
            if read_metadata(path)["identity"] != identity:
                raise RunError(
                    f"{folder} holds experts of other settings or data; choose another train_experts.output_dir"
                )
            finished.append(i)
    side = t.side_by_side or (1 if accelerator.device.type == "cpu" else SIDE_BY_SIDE)
    groups = [list(range(first, min(first + side, t.number))) for first in range(0, t.number, side)]
    todo = [[i for i in group if i not in finished] for group in groups]
    return Planned(net, facts, identity, orders, [group for group in todo if group])


def experts_text(config: RunConfig, source: ImageSource) -> str:
    """One line of a plan: experts, epochs and bytes."""
    t = config.train_experts
    net = FlatNet(t.net, len(source.class_names), config.image_size)
    size = format_bytes(4 * net.size * (t.epochs + 1) * t.number)
    passes = 2 if t.optimizer == "gsam" else 1
    return (
        f"{t.number} x {t.net} at {config.image_size} px, {t.epochs} epochs each by {t.optimizer}, "
        f"{t.number * t.epochs * passes * len(source.train)} images forward and backward, {size} of parameters"
    )


def train_experts(config: RunConfig, source: ImageSource, *, accelerator: Accelerator) -> Path:
    """Train the experts of `config.train_experts`, divided over processes; finished ones are left alone.

    The validation part of train is left out and measures each expert. A killed training goes on bit for bit from its
    last checkpoint. All train images are held in memory.

    Returns:
        The folder, with `expert-0000.safetensors`, ... (`parameters`: (epochs + 1, P) float32), the preprocessing and,
        once all are there, `experts.json`. `dq.networks.trajectories.open_experts` opens it.

    Raises:
        InputError, RunError: see `check_expert_training`; if no image is set aside, or a loss is not finite.
    """
    t, folder = config.train_experts, Path(config.train_experts.output_dir)
    planned = check_expert_training(config, source, accelerator)
    bench = load_real_data(
        source,
        EvaluateConfig(baselines=(), validation_images=config.evaluate.validation_images),
        [_recipe(t)],
        image_size=config.image_size,
        cache_dir=Path(config.cache_dir),
        teachers=(),
        device=accelerator.device,
    )
    whitening = _preprocessing(bench, t, folder, accelerator)
    assigned = assign_units(
        [float(len(g)) for g in planned.groups], accelerator.process_index, accelerator.num_processes
    )
    groups = [planned.groups[i] for i in assigned]
    held_out = bench.validation(1.0)
    if held_out is None:
        raise InputError("experts are measured on validation images; set evaluate.validation_images")
    if groups:
        images, labels = bench.read(bench.source.train, bench.candidates)
        if planned.orders is not None and len(labels) != len(bench.candidates):
            raise InputError("a curriculum needs every train image, but some cannot be read; leave curriculum out")
    total = sum(map(len, groups)) * t.epochs
    main = accelerator.is_main_process
    with progress([], desc="train experts", total=total, unit="epoch", main=main and bool(groups)) as bar:
        for group in groups:
            began = time.perf_counter()
            partial = folder / f"experts-{group[0]:04d}-{group[-1]:04d}.partial.safetensors"
            resume = None
            if is_done(partial):
                tensors, meta = read_tensors(partial)
                resume = tensors["parameters"] if meta["identity"] == [planned.identity, group] else None
            done = 0 if resume is None else resume.shape[1] - 1
            bar.update(len(group) * done)
            trajectories = train_trajectories(
                planned.net,
                images,
                labels,
                t,
                pixels=whitening.to(accelerator.device),
                seeds=[derive_seed(t.seed, "expert", i) for i in group],
                orders=planned.orders,
                device=accelerator.device,
                resume=resume,
                on_epoch=_Saver(bar, partial, [planned.identity, group], t.checkpoint_s, t.epochs),
            )
            seconds = time.perf_counter() - began
            for i, trajectory in zip(group, trajectories):
                end = trajectory[-1].to(accelerator.device)
                accuracy = flat_accuracy(planned.net, end, *held_out, whitening)
                per_epoch = round(seconds / len(group) / max(1, t.epochs - done), 3)
                facts = {
                    "expert": i,
                    "identity": planned.identity,
                    "facts": planned.facts,
                    "layers": list(zip(planned.net.names, planned.net.shapes)),
                    "accuracy": accuracy,
                    "seconds_per_epoch": per_epoch,
                }
                write_tensors(expert_file(folder, i), {"parameters": trajectory}, facts)
                log.info(
                    "expert %d: %.1f %% of %d held-out train images, %s per epoch",
                    i,
                    100 * accuracy,
                    len(held_out[1]),
                    duration(per_epoch),
                )
            partial.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    if main:
        records = []
        for path in (expert_file(folder, i) for i in range(t.number)):
            meta = read_metadata(path)
            records.append({k: meta[k] for k in ("expert", "accuracy", "seconds_per_epoch")})
            records[-1] |= {"file": path.name, "checksum": read_checksum(path)}
        facts = {**planned.facts, "preprocessing": whitening.to("cpu").summary()}
        write_json(folder / MANIFEST, {"identity": planned.identity, "facts": facts, "experts": records})
    accelerator.wait_for_everyone()
    return folder


class _Saver:
    """Shows the epochs of a group of experts and keeps them in a file now and then."""

    def __init__(self, bar: Any, path: Path, identity: list[Any], every_s: float, epochs: int) -> None:
        self.bar, self.path, self.identity, self.every_s, self.epochs = bar, path, identity, every_s, epochs
        self.saved = time.perf_counter()

    def __call__(self, epoch: int, loss: float, checkpoints: Sequence[Tensor]) -> None:
        self.bar.update(len(checkpoints[0]))
        self.bar.set_postfix(loss=f"{loss:.3f}")
        if time.perf_counter() - self.saved > self.every_s and epoch < self.epochs:
            write_tensors(self.path, {"parameters": torch.stack(list(checkpoints), 1)}, {"identity": self.identity})
            self.saved = time.perf_counter()


def _preprocessing(bench: RealData, t: TrainExpertsConfig, folder: Path, accelerator: Accelerator) -> Whitening:
    """What images go through before experts see them, from the folder, or fitted by the main process."""
    path = folder / PREPROCESSING
    if accelerator.is_main_process and not is_done(path):
        plain = Whitening(torch.tensor(bench.mean), torch.tensor(bench.std))
        write_tensors(path, (bench.mtt_whitening() if t.whiten else plain).tensors())
    accelerator.wait_for_everyone()
    return Whitening(**read_tensors(path)[0])
