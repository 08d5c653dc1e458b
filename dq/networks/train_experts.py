"""Training of experts: trajectories of networks on real images, divided over processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from dq.config.reader import to_dict
from dq.config.schema import RunConfig
from dq.config.students import StudentConfig
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
from dq.core.plain import PlainDict
from dq.core.processes import assign_units
from dq.core.progress import duration, progress
from dq.core.seeds import derive_seed, digest_of, digest_of_tensors
from dq.core.text import format_bytes, plural
from dq.data.source import ImageSource
from dq.data.zca import Whitening
from dq.networks.flat_parameters import FlatNet
from dq.networks.real_data import RealData, check_whitened, identity_of, load_real_data, rows_set_aside
from dq.networks.training import TrainingSet
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
IRRELEVANT = ("output_dir", "number", "side_by_side", "checkpoint_s")  # settings that do not decide a trajectory


@dataclass(frozen=True)
class Planned:
    """Experts that are to be trained."""

    folder: Path
    settings: TrainExpertsConfig
    net: FlatNet
    facts: PlainDict  # what decides all trajectories
    identity: str
    orders: list[Tensor] | None  # of the curriculum
    groups: list[list[int]]  # experts that are trained together, without finished ones


def _recipe(t: TrainExpertsConfig) -> StudentConfig:
    """Settings that real images depend on, as those of a student."""
    # two tests, so that validation images are set aside
    return StudentConfig(net=t.net, whiten=t.whiten, augment=t.augment, tests=2)


def check_expert_training(config: RunConfig, source: ImageSource, accelerator: Accelerator) -> Planned:
    """Check whether the experts of `config.train_experts` can be trained, and return those left.

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
    settings = {k: v for k, v in to_dict(t).items() if k not in IRRELEVANT}
    if orders is not None:
        settings["curriculum"]["order"] = digest_of_tensors({str(c): o for c, o in enumerate(orders)})
    facts = {
        "net": t.net,
        "parameters": net.size,
        "classes": list(source.class_names),
        "image_size": config.image_size,
        "fingerprint": source.fingerprint,
        "world": identity_of(source, config.image_size, held_out),
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
    return Planned(folder, t, net, facts, identity, orders, [group for group in todo if group])


def experts_text(config: RunConfig, source: ImageSource) -> str:
    """Return one line of a plan: experts, epochs and bytes."""
    t = config.train_experts
    net = FlatNet(t.net, len(source.class_names), config.image_size)
    size = format_bytes(4 * net.size * (t.epochs + 1) * t.number)
    passes = 2 if t.optimizer == "gsam" else 1
    return (
        f"{t.number} x {t.net} at {config.image_size} px, {plural(t.epochs, 'epoch')} each by {t.optimizer}, "
        f"{t.number * t.epochs * passes * len(source.train)} images forward and backward, {size} of parameters"
    )


def train_experts(config: RunConfig, source: ImageSource, *, accelerator: Accelerator) -> Path:
    """Train the experts of `config.train_experts`, divided over processes.

    Finished ones are skipped. The validation part of train is left out and measures each expert. A killed training
    resumes bit for bit from its last checkpoint. All train images are held in memory.

    Returns:
        The folder, with `expert-0000.safetensors`, ... (`parameters`: (epochs + 1, P) float32), the preprocessing and,
        once all are finished, `experts.json`. `dq.networks.trajectories.open_experts` opens it.

    Raises:
        InputError, RunError: see `check_expert_training`; if no image is set aside, or a loss is not finite.
    """
    planned = check_expert_training(config, source, accelerator)
    t, device, main = planned.settings, accelerator.device, accelerator.is_main_process
    real_data = load_real_data(
        source,
        config.image_size,
        cache_dir=Path(config.cache_dir),
        device=device,
        validation_rows=rows_set_aside(source, config.evaluate, [_recipe(t)]),
    )
    whitening = _preprocessing(real_data, t, planned.folder, accelerator)
    costs = [float(len(g)) for g in planned.groups]
    assigned = assign_units(costs, accelerator.process_index, accelerator.num_processes)
    groups = [planned.groups[i] for i in assigned]
    held_out = real_data.validation(1.0)
    if held_out is None:
        raise InputError("experts are measured on validation images; set evaluate.validation_images")
    if groups:
        images, labels = real_data.read(source.train, real_data.candidates)
        if planned.orders is not None and len(labels) != len(real_data.candidates):
            raise InputError("a curriculum needs every train image, but some cannot be read; leave curriculum out")
        data = TrainingSet(images, labels, real_data.classes, whitening.to(device))
        planned.net.to(device)
    total = sum(map(len, groups)) * t.epochs
    with progress([], desc="train experts", total=total, unit="epoch", main=main and bool(groups)) as bar:
        for group in groups:
            _train_group(group, planned, data, held_out, bar)
    accelerator.wait_for_everyone()
    if main:
        _write_manifest(planned, whitening)
    accelerator.wait_for_everyone()
    return planned.folder


def _train_group(
    group: list[int], planned: Planned, data: TrainingSet, held_out: tuple[Tensor, Tensor], bar: tqdm
) -> None:
    """Train experts as one batched model, measure and write each."""
    began, t, identity = time.perf_counter(), planned.settings, [planned.identity, group]
    partial = planned.folder / f"experts-{group[0]:04d}-{group[-1]:04d}.partial.safetensors"
    resume = None
    if is_done(partial):
        tensors, meta = read_tensors(partial)
        resume = tensors["parameters"] if meta["identity"] == identity else None
    done = 0 if resume is None else resume.shape[1] - 1
    bar.update(len(group) * done)
    trajectories = train_trajectories(
        planned.net,
        data,
        t,
        seeds=[derive_seed(t.seed, "expert", i) for i in group],
        orders=planned.orders,
        resume=resume,
        on_epoch=_Saver(bar, partial, identity, t.checkpoint_s, t.epochs),
    )
    seconds = time.perf_counter() - began
    per_epoch = round(seconds / len(group) / max(1, t.epochs - done), 3)
    for i, trajectory in zip(group, trajectories, strict=True):
        accuracy = flat_accuracy(planned.net, trajectory[-1].to(planned.net.device), *held_out, data.pixels)
        facts = {
            "expert": i,
            "identity": planned.identity,
            "facts": planned.facts,
            "layers": list(zip(planned.net.names, planned.net.shapes, strict=True)),
            "accuracy": accuracy,
            "seconds_per_epoch": per_epoch,
        }
        write_tensors(expert_file(planned.folder, i), {"parameters": trajectory}, facts)
        numbers = (i, 100 * accuracy, len(held_out[1]), duration(per_epoch))
        log.info("expert %d: %.1f %% of %d held-out train images, %s per epoch", *numbers)
    partial.unlink(missing_ok=True)


def _write_manifest(planned: Planned, whitening: Whitening) -> None:
    records = []
    for path in (expert_file(planned.folder, i) for i in range(planned.settings.number)):
        meta = read_metadata(path)
        records.append({k: meta[k] for k in ("expert", "accuracy", "seconds_per_epoch")})
        records[-1] |= {"file": path.name, "checksum": read_checksum(path)}
    facts = {**planned.facts, "preprocessing": whitening.to("cpu").summary()}
    write_json(planned.folder / MANIFEST, {"identity": planned.identity, "facts": facts, "experts": records})


class _Saver:
    """Callback that shows the epochs of a group of experts and writes a checkpoint at intervals."""

    def __init__(self, bar: tqdm, path: Path, identity: Sequence[object], every_s: float, epochs: int) -> None:
        self.bar, self.path, self.identity, self.every_s, self.epochs = bar, path, identity, every_s, epochs
        self.saved = time.perf_counter()

    def __call__(self, epoch: int, loss: float, checkpoints: Sequence[Tensor]) -> None:
        self.bar.update(len(checkpoints[0]))
        self.bar.set_postfix(loss=f"{loss:.3f}")
        if time.perf_counter() - self.saved > self.every_s and epoch < self.epochs:
            write_tensors(self.path, {"parameters": torch.stack(list(checkpoints), 1)}, {"identity": self.identity})
            self.saved = time.perf_counter()


def _preprocessing(real_data: RealData, t: TrainExpertsConfig, folder: Path, accelerator: Accelerator) -> Whitening:
    """Read the preprocessing from the folder; the main process fits it there first."""
    path = folder / PREPROCESSING
    if accelerator.is_main_process and not is_done(path):
        plain = Whitening(torch.tensor(real_data.mean), torch.tensor(real_data.std))
        write_tensors(path, (real_data.mtt_whitening() if t.whiten else plain).tensors())
    accelerator.wait_for_everyone()
    return Whitening(**read_tensors(path)[0])
