"""Expert trajectories: parameters after every epoch of SGD or GSAM.

Cazenavette et al., "Dataset Distillation by Matching Training Trajectories", CVPR 2022; with GSAM as FTD and DATM
train them, and PAD's curriculum (arXiv 2408.03360).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.func import vmap

from dq.config.trajectories import CurriculumConfig, TrainExpertsConfig
from dq.core.errors import InputError, RunError
from dq.core.files import Damaged, open_tensors, read_checksum, read_json, read_metadata, read_tensors, readable
from dq.core.plain import PlainDict
from dq.core.seeds import digest_of, generator
from dq.data.augment import augment
from dq.data.splits import validation_rows
from dq.data.zca import Whitening
from dq.networks.flat_parameters import FlatNet
from dq.networks.training import Pixels, TrainingSet

MANIFEST = "experts.json"  # in the folder of experts, which is complete once it exists
PREPROCESSING = "preprocessing.safetensors"
MAX_PREPROCESSED = 1 << 28  # numbers of preprocessed images that are held in memory
CHUNK = 1000  # images at once
TINY = 1e-12  # as released, in place of a norm of zero
Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]  # parameters (E, P) -> losses (E,) and their gradients (E, P)
Orders = Sequence[Tensor]  # by class: indices of its images from easy to hard


def curriculum_rows(epoch: int, orders: Orders, c: CurriculumConfig) -> Tensor:
    """Return indices of the images of an epoch of the curriculum, ascending.

    Of a class of n images, from easy to hard, in epoch 0, 1, ...:

        epoch <= A: the first max(1, int(p n)), with p = min(1, IR + (1 - IR) epoch / A)
        later:      all but the first int(q n), with q of the last removal whose epoch has passed, 0 before the first

    with IR = `c.initial` and A = `c.complete_at`. A class that has images keeps at least one.
    """
    chosen = []
    for order in orders:
        n = len(order)
        if epoch <= c.complete_at:
            share = min(1.0, c.initial + (1 - c.initial) * epoch / c.complete_at) if c.complete_at else 1.0
            chosen.append(order[: max(1, int(share * n + 1e-9))])
        else:
            share = next((q for e, q in reversed(c.removals) if epoch > e), 0.0)
            chosen.append(order[int(share * n + 1e-9) :])
    return torch.cat(chosen).sort().values


def read_orders(path: str | Path, labels: Tensor, rows: Tensor) -> list[Tensor]:
    """Read orders of images from a file, as indices into `rows`.

    The file has a tensor for every class c, named `class-` and five digits, e.g. `class-00003`: rows of the train
    split, (n_c,) int64, from easy to hard. Rows that are not in `rows` are left out. `labels` (n,) are the
    classes of the images that experts train on, `rows` (n,) their rows in the train split, ascending.

    Raises:
        InputError: if there is no such file, or a class's images are not in it once each.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path} with the order of the images; correct curriculum.order")
    with readable(path):
        tensors = load_file(path)
    place = {row: i for i, row in enumerate(rows.tolist())}
    orders = []
    for c in range(int(labels.max()) + 1):
        images = (labels == c).nonzero()[:, 0]
        listed = tensors.get(f"class-{c:05d}", torch.empty(0)).tolist()
        order = torch.tensor([place[row] for row in listed if row in place], dtype=torch.long)
        if not torch.equal(order.sort().values, images):
            raise InputError(
                f"{path} does not order the {len(images)} train images of class {c}, each once, but {len(order)} of "
                "them; make it from the same data"
            )
        orders.append(order)
    return orders


def gsam_gradient(theta: Tensor, gradient: Gradient, rho: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Return losses (E,) and gradients (E, P) of surrogate gap minimization (GSAM).

    GSAM (Zhuang et al. 2022) with ASAM's step, as FTD's code has it, for each row of `theta`:

        g1 = grad L(theta),  theta' = theta + rho theta^2 g1 / ||theta g1||,  g2 = grad L(theta')
        g = g2 - alpha (g1 - cos(g1, g2) ||g1|| g2 / ||g2||)

    `theta` is (E, P); `gradient` gives losses (E,) and gradients (E, P) on one batch.
    """

    def norm(v: Tensor) -> Tensor:
        return v.norm(dim=1, keepdim=True)

    losses, g1 = gradient(theta)
    uphill = theta + rho / (norm(theta * g1) + TINY) * theta.square() * g1
    _, g2 = gradient(uphill)
    cosine = (g1 * g2).sum(1, keepdim=True) / (norm(g1) * norm(g2) + TINY)
    across = g1 - cosine * norm(g1) * g2 / (norm(g2) + TINY)
    return losses, g2 - alpha * across


def train_trajectories(
    net: FlatNet,
    data: TrainingSet,
    config: TrainExpertsConfig,
    *,
    seeds: Sequence[int],
    orders: Orders | None = None,
    resume: Tensor | None = None,
    on_epoch: Callable[[int, float, list[Tensor]], None] | None = None,
) -> Tensor:
    """Train a network from each of E seeds and return its parameters after every epoch.

    Weights, order of the images and augmentation of a network depend on its seed and the epoch alone, so that a
    training resumes bit for bit from the end of any epoch, and networks that are trained together, as one batched
    model, are those of separate trainings up to rounding.

    Args:
        net: on the device to train on.
        data: uint8 images and labels, which may be on the CPU. Weights and soft labels are not used.
        config: optimizer, epochs, augmentation and curriculum.
        seeds: one for each network.
        orders: for `config.curriculum`, see `read_orders`.
        resume: (E, k + 1, P) of an earlier call.
        on_epoch: called with the number of epochs done, their last mean loss and the parameters of each epoch so far,
            each (E, P) on the CPU.

    Returns:
        (E, epochs + 1, P) float32 on the CPU, the initial parameters first.

    Raises:
        RunError: if a loss is not a finite number.
    """
    inputs = _Inputs.prepare(data, net.device)
    if resume is not None:
        checkpoints = list(resume.unbind(1))
    else:
        checkpoints = [torch.stack([net.initial(seed) for seed in seeds])]
    theta = checkpoints[-1].to(net.device, copy=True)
    all_rows = torch.arange(len(data.labels))
    for epoch in range(len(checkpoints) - 1, config.epochs):
        rows = all_rows
        if config.curriculum is not None and orders is not None:
            rows = curriculum_rows(epoch, orders, config.curriculum)
        order = torch.stack([rows[torch.randperm(len(rows), generator=generator(s, "order", epoch))] for s in seeds])
        augmentation = [generator(s, "augmentation", epoch) for s in seeds]
        theta, loss = _train_epoch(net, theta, inputs, order, augmentation, config)
        if not torch.isfinite(theta).all() or loss != loss:
            raise RunError(f"an expert's loss is {loss} in epoch {epoch + 1}; lower train_experts.lr={config.lr:g}")
        checkpoints.append(theta.detach().cpu().clone())  # on a CPU `.cpu()` would be the same storage
        if on_epoch is not None:
            on_epoch(epoch + 1, loss, checkpoints)
    return torch.stack(checkpoints, 1)


@dataclass(frozen=True)
class _Inputs:
    """Images of trainings, preprocessed once if they fit into memory."""

    data: TrainingSet
    labels: Tensor  # (N,) on the device to train on
    preprocessed: Tensor | None  # (N, 3, S, S) there

    @classmethod
    def prepare(cls, data: TrainingSet, device: torch.device) -> _Inputs:
        preprocessed = None
        if data.images.numel() <= MAX_PREPROCESSED:
            preprocessed = torch.cat([data.pixels(part.to(device)) for part in data.images.split(CHUNK)])
        return cls(data, data.labels.to(device), preprocessed)

    def batch(self, rows: Tensor) -> tuple[Iterator[Tensor], Tensor]:
        """Inputs (B, 3, S, S) of each network for rows (E, B) on the CPU, and the labels (E, B)."""
        device_rows = rows.to(self.labels.device)
        if self.preprocessed is not None:
            inputs = (self.preprocessed[r] for r in device_rows)
        else:
            inputs = (self.data.pixels(self.data.images[r].to(self.labels.device)) for r in rows)
        return inputs, self.labels[device_rows]


def _train_epoch(
    net: FlatNet,
    theta: Tensor,
    inputs: _Inputs,
    order: Tensor,
    augmentation: Sequence[torch.Generator],
    config: TrainExpertsConfig,
) -> tuple[Tensor, float]:
    """Train networks (E, P) on rows (E, n) for an epoch; their parameters and mean loss."""
    total = torch.zeros((), device=theta.device)
    for rows in order.split(config.batch_size, 1):  # (E, B)
        images, labels = inputs.batch(rows)
        x = torch.stack([augment(config.augment, image, g) for image, g in zip(images, augmentation, strict=True)])
        gradient = _cross_entropy_gradient(net, x, labels)
        if config.optimizer == "gsam":
            losses, step = gsam_gradient(theta, gradient, config.rho, config.gsam_alpha)
        else:
            losses, step = gradient(theta)
        theta = theta - config.lr * step
        total += losses.mean() * rows.shape[1]
    return theta, float(total) / order.shape[1]


def _cross_entropy_gradient(net: FlatNet, x: Tensor, labels: Tensor) -> Gradient:
    """Losses and gradients of E networks on batches (E, B, 3, S, S) of their own."""

    def gradient(theta: Tensor) -> tuple[Tensor, Tensor]:
        theta = theta.detach().requires_grad_(True)
        # a batched model is slower than a plain one, and one network needs none
        logits = vmap(net)(theta, x) if len(x) > 1 else net(theta[0], x[0])[None]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(len(x), -1).mean(1)
        return losses.detach(), torch.autograd.grad(losses.sum(), theta)[0]

    return gradient


@torch.no_grad()
def flat_accuracy(net: FlatNet, theta: Tensor, images: Tensor, labels: Tensor, pixels: Pixels) -> float:
    """Return the top-1 accuracy on images (N, 3, S, S) for parameters (P,)."""
    parts = images.split(CHUNK)
    hits = [net(theta, pixels(x.to(theta.device))).argmax(1).cpu() for x in parts]
    return float((torch.cat(hits) == labels.cpu()).double().mean())


# --- trajectories on disk -----------------------------------------------------------------------------------------


def expert_file(folder: Path, number: int) -> Path:
    return folder / f"expert-{number:04d}.safetensors"


@dataclass(frozen=True)
class Experts:
    """Trajectories of a folder, read an epoch at a time."""

    folder: Path
    facts: PlainDict  # identity of the trainings: data, network, preprocessing, optimizer, seed
    accuracies: tuple[float, ...]  # on held-out train images, after the last epoch
    whitening: Whitening
    digest: str  # of all of it

    @property
    def number(self) -> int:
        return len(self.accuracies)

    @property
    def epochs(self) -> int:
        return int(self.facts["epochs"])

    def held_out_rows(self, labels: Tensor) -> Tensor:
        """Return which train images the experts were not trained on, (N,) bool.

        `labels` (N,) are those of all train images.
        """
        held = torch.zeros(len(labels), dtype=torch.bool)
        held[torch.from_numpy(validation_rows(labels.numpy(), self.facts["validation_images"]))] = True
        return held

    @functools.cached_property
    def net(self) -> FlatNet:
        return FlatNet(self.facts["net"], len(self.facts["classes"]), self.facts["image_size"])

    def parameters(self, expert: int, epoch: int) -> Tensor:
        """Read parameters (P,) of an expert after `epoch` epochs.

        Raises:
            Damaged: if its file cannot be read.
        """
        with open_tensors(expert_file(self.folder, expert)) as f:
            return f.get_slice("parameters")[epoch]


def open_experts(folder: str | Path) -> Experts:
    """Open a folder of `dq train-experts`.

    Raises:
        InputError: if it holds no experts, or their training is not finished.
        RunError: if a file is missing, cut off or of another training.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} holds no finished experts; make them by `dq train-experts`, or correct the path")
    manifest = read_json(folder / MANIFEST)
    facts = manifest["facts"]
    for i in range(len(manifest["experts"])):
        path = expert_file(folder, i)
        try:
            meta = read_metadata(path)
            with open_tensors(path) as f:
                epochs = f.get_slice("parameters").get_shape()[0] - 1
        except Damaged as e:
            raise RunError(f"{path} is damaged or missing ({e.__cause__}); give `dq train-experts` again") from e
        if meta["identity"] != manifest["identity"] or epochs != facts["epochs"]:
            raise RunError(f"{path} is of another training than {MANIFEST} beside it; give `dq train-experts` again")
    tensors, _ = read_tensors(folder / PREPROCESSING)
    files = [expert_file(folder, i) for i in range(len(manifest["experts"]))]
    digest = digest_of([manifest["identity"], [read_checksum(f) for f in files]])
    return Experts(folder, facts, tuple(x["accuracy"] for x in manifest["experts"]), Whitening(**tensors), digest)
