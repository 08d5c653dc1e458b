"""Training loop of students and teachers."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dq.config.dtypes import device_dtypes, resolve_dtypes
from dq.config.reader import to_dict
from dq.config.students import Dtype, StudentConfig, ViewConfig
from dq.core.constants import constant
from dq.core.devices import resolve_dtype
from dq.core.errors import RunError
from dq.core.files import is_done, read_tensors, write_tensors
from dq.core.memory import list_in_pieces
from dq.core.seeds import derive_seed, digest_of, digest_of_tensors, generator, seeded
from dq.core.transfer import to_device
from dq.data.augment import Step, apply_steps, draw_steps, steps_on_device
from dq.data.views import Views, apply_views, batches, draw_views, parts
from dq.networks.layers import count_on_host, counters_to, draws_randomly
from dq.networks.losses import image_losses
from dq.networks.optimizers import make_optimizer, take_gradients
from dq.networks.schedule import evaluation_epochs, learning_rate, second_half
from dq.networks.zoo import make_net, move_net

MAX_NORMALIZED = 64 << 20  # numbers of a set whose normalized copy is held in memory
Pixels = Callable[[Tensor], Tensor]  # images (B, 3, S, S), uint8 or float in [0, 1] -> what a network is given


class EpochTargets(Protocol):
    """Views of one epoch and a teacher's logits of them."""

    @property
    def views(self) -> Views: ...

    @property
    def logits(self) -> Tensor: ...  # (N, C) float32, by position in `views.order`

    def check(self, images: int, student: StudentConfig) -> None:
        """Raise `InputError` if the targets are of other images or settings."""
        ...


TargetSource = Callable[[int], EpochTargets]  # epoch from 1 -> its targets; `dq.labels` provides one


@dataclass(frozen=True)
class TrainingSet:
    """Images to train on, their labels, and how a network gets them."""

    images: Tensor  # (N, 3, S, S), uint8 or float in [0, 1], on the device to train on
    labels: Tensor  # (N,) int64 there
    num_classes: int
    pixels: Pixels
    weights: Tensor | None = None  # (N,) of the images; None: all ones
    soft_labels: Tensor | TargetSource | None = None  # (N, C) logits for labels "fixed"; a source for "soft"


@dataclass(frozen=True)
class Checkpoint:
    """File from which a killed training resumes."""

    path: Path
    every_s: float = 60.0  # between two writes


@dataclass(frozen=True)
class Fitted:
    """A trained network."""

    net: nn.Module  # averaged parameters if the recipe averages
    scores: tuple[tuple[int, float], ...]  # (epoch, what `evaluate` returned), ascending
    best_state: dict[str, Tensor]  # of the epoch with the best score; empty without scores
    seconds: float  # of training, without evaluation


def fit(
    data: TrainingSet,
    config: StudentConfig,
    *,
    seed: int,
    net: nn.Module | None = None,
    evaluate: Callable[[nn.Module, int], float] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Fitted:
    """Train a network: the loop of students and teachers.

    The loss of a batch of B images is (1/B) sum_i w_i l_i, with 1/B and not 1/sum w, so that an image weighs the same
    in whatever batch it falls; see `image_losses` for l_i. In a batch mixed with share k, an image's weight is
    k w_i + (1 - k) w_partner. The KL shrinks gradients by about T^2. AdamW and Muon do not notice, and the
    published soft-label recipes, all AdamW, leave it so; SGD would hardly train, hence with `optimizer: sgd` the KL is
    multiplied by T^2.

    Initial weights, batch order, views, augmentation and dropout are drawn from generators derived from `seed` (views
    from the label plan's where labels belong to them); on one device and thread count, the same arguments give the
    same result, and a training resumed from its checkpoint gives the result of an uninterrupted one.

    `net` is trained in place; None: a fresh `config.net`. `evaluate` scores the network after the epochs of
    `evaluation_epochs`, whose number it is given. `on_epoch` is called with the number of epochs done and the mean
    loss of the last one. A `checkpoint` of another training is ignored and overwritten.

    Raises:
        RunError: if the loss is not a finite number.
    """
    config = resolve_dtypes(config, device_dtypes(data.images.device))
    evaluated = evaluation_epochs(config.epochs, config.tests) if evaluate is not None else []
    training = _Training.make(data, config, seed)
    state = _initial_state(training, net)
    if checkpoint is not None and is_done(checkpoint.path):
        _restore(checkpoint.path, state, training.digest())
    saved = time.perf_counter()
    for epoch in range(state.epoch + 1, config.epochs + 1):
        start = time.perf_counter()
        _set_learning_rate(state, config, epoch)
        mean_loss = _train_epoch(training, state, epoch)
        state.seconds += time.perf_counter() - start
        if not math.isfinite(mean_loss):
            raise RunError(
                f"the loss of student {config.net!r} (seed {seed}) is {mean_loss} in epoch {epoch} of "
                f"{config.epochs}; lower its lr, now {config.lr:g}"
            )
        if evaluate is not None and epoch in evaluated:
            _evaluate(state, evaluate, epoch)
        state.epoch = epoch
        if on_epoch is not None:
            on_epoch(epoch, mean_loss)
        if checkpoint and time.perf_counter() - saved > checkpoint.every_s and epoch < config.epochs:
            _save(checkpoint.path, state, training.digest())
            saved = time.perf_counter()
    if state.average is not None:
        state.net.load_state_dict(state.average, strict=False)
    counters_to(data.images.device, state.net)
    return Fitted(state.net, tuple(state.scores), state.best, state.seconds)


# --- an epoch -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Training:
    """What decides a training, on its device."""

    data: TrainingSet
    config: StudentConfig  # with dtypes resolved
    seed: int
    weights: Tensor  # (N,) float32
    fixed_labels: Tensor | None  # (N, C) float32 logits, one for each image
    inputs: Tensor | None  # (N, 3, S, S) of the network, where they are the same in every epoch and fit into memory

    @classmethod
    def make(cls, data: TrainingSet, config: StudentConfig, seed: int) -> _Training:
        x, device, labels = data.images, data.images.device, data.soft_labels
        weights = (torch.ones(len(x)) if data.weights is None else data.weights).to(device, torch.float32)
        fixed = None
        if config.labels == "fixed" and isinstance(labels, Tensor):
            fixed = labels.to(device, torch.float32)
        inputs = data.pixels(x) if config.views == ViewConfig() and x.numel() <= MAX_NORMALIZED else None
        return cls(data, config, seed, weights, fixed, inputs)

    def digest(self) -> str:
        tensors = {"x": self.data.images, "y": self.data.labels, "w": self.weights}
        if isinstance(self.data.soft_labels, Tensor):
            tensors["soft"] = self.data.soft_labels
        return digest_of([digest_of_tensors(tensors), to_dict(self.config), self.seed])


@dataclass(frozen=True)
class _Epoch:
    """Draws and replayed logits of one epoch on the device, by position.

    They are copied there before the first batch, since a copy in a step would hold the host up.
    """

    views: Views
    augmentation: list[list[Step]]  # of each batch
    labels: Tensor  # (N,)
    partner_labels: Tensor  # (N,) of the images that are mixed in
    weights: Tensor  # (N,) float32, those of an image and its partner mixed as the images are
    logits: Tensor | None  # (N, C) of a teacher for these views; None: labels do not belong to views


@dataclass(frozen=True)
class _Batch:
    """Images of a batch as the network gets them, and what their loss depends on."""

    images: Tensor  # (B, 3, S, S)
    labels: Tensor  # (B,)
    partner_labels: Tensor  # (B,)
    share: float  # of the image itself in a mix
    weights: Tensor  # (B,)
    teacher: Tensor | None  # (B, C); None for hard labels

    def losses(self, part: slice, logits: Tensor, config: StudentConfig) -> Tensor:
        """Weighted losses of a part of the batch."""
        teacher = None if self.teacher is None else self.teacher[part]
        y, partner_y = self.labels[part], self.partner_labels[part]
        return self.weights[part] * image_losses(logits, y, partner_y, self.share, teacher, config)


def _train_epoch(t: _Training, state: _State, epoch: int) -> float:
    """Train for an epoch; the mean loss."""
    n, config = len(t.data.labels), t.config
    state.net.train()
    total = torch.zeros((), device=t.data.images.device)
    spans = batches(n, config.batch_size, config.accumulate)
    draws = _draw_epoch(t, epoch, spans)
    for i, span in enumerate(spans):
        batch = _batch(t, draws, i, span)
        state.optimizer.zero_grad()
        for loss in _backward(t, state, batch, ("student dropout", epoch, i)):
            total += loss
        state.optimizer.step()
        if state.average is not None:
            parameters = [p.detach() for p in state.net.parameters()]
            get_ema_multi_avg_fn(config.ema)(list(state.average.values()), parameters, None)
    return float(total) / n


def _draw_epoch(t: _Training, epoch: int, spans: Sequence[slice]) -> _Epoch:
    config, x, labels = t.config, t.data.images, t.data.soft_labels
    side, device = x.shape[-1], x.device
    logits = None
    if config.labels == "soft" and labels is not None and not isinstance(labels, Tensor):
        targets = labels(epoch)
        targets.check(len(x), config)
        views, logits = targets.views, targets.logits.to(device)
    else:
        sizes = {"batch_size": config.batch_size, "accumulate": config.accumulate}
        views = draw_views(config.views, len(x), side, **sizes, seed=t.seed, epoch=epoch)
    augmentation = generator(t.seed, "student augmentation", epoch)
    steps = [draw_steps(config.augment, s.stop - s.start, side, augmentation) for s in spans]
    # shares and first positions of the batches, for each position
    counts = torch.tensor([s.stop - s.start for s in spans])
    share = views.kept.repeat_interleave(counts)
    start = torch.tensor([s.start for s in spans]).repeat_interleave(counts)
    order, partners = views.order.long(), views.order.long()[start + views.partner.long()]
    rows, partner_rows = to_device(torch.stack([order, partners]), device)
    shares, others = to_device(torch.stack([share, (1 - share.double()).float()]), device)
    return _Epoch(
        views=views.on_device(device),
        augmentation=steps_on_device(steps, device),
        labels=t.data.labels[rows],
        partner_labels=t.data.labels[partner_rows],
        weights=shares * t.weights[rows] + others * t.weights[partner_rows],
        logits=logits,
    )


def _batch(t: _Training, epoch: _Epoch, i: int, span: slice) -> _Batch:
    rows = epoch.views.order[span]
    if t.inputs is not None:
        images = t.inputs[rows]
    else:
        images = t.data.pixels(apply_views(t.config.views, t.data.images, epoch.views, i, span))
    teacher = None if epoch.logits is None else epoch.logits[span]
    if t.fixed_labels is not None:
        teacher = t.fixed_labels[rows]
    return _Batch(
        images=apply_steps(images, epoch.augmentation[i]),
        labels=epoch.labels[span],
        partner_labels=epoch.partner_labels[span],
        share=float(epoch.views.kept[i]),
        weights=epoch.weights[span],
        teacher=teacher,
    )


def _backward(t: _Training, state: _State, batch: _Batch, seed: tuple[object, ...]) -> list[Tensor]:
    """Set the gradients of a batch, the sum of those of its parts; return the sums () of the losses of its parts."""
    device, size, half = t.data.images.device, len(batch.labels), t.config.dtype == "bfloat16"
    totals, gradients = [], None
    # one context for all parts, which casts weights once
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        for part in parts(size, t.config.accumulate):
            with _seeded_dropout(t, state, (*seed, part.start)):
                logits = state.net(batch.images[part])
            with torch.autocast(device.type, enabled=False) if half else contextlib.nullcontext():
                loss = batch.losses(part, logits, t.config).mean() * ((part.stop - part.start) / size)
                loss.backward()
            totals.append(loss.detach() * size)
            gradients = take_gradients(state.net, gradients)
    for p, gradient in (gradients or {}).items():
        p.grad = gradient
    return totals


def _seeded_dropout(t: _Training, state: _State, seed: tuple[object, ...]) -> contextlib.AbstractContextManager[None]:
    """Seed the global generators, the only ones that dropout knows, where a network may draw from them."""
    if not state.draws:
        return contextlib.nullcontext()
    return seeded(derive_seed(t.seed, *seed), t.data.images.device)


def _set_learning_rate(state: _State, config: StudentConfig, epoch: int) -> None:
    if config.schedule == "step" and epoch - config.warmup == second_half(config.epochs - config.warmup):
        state.optimizer = make_optimizer(state.net, config)  # the momentum restarts, as in DC's code
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch, config.epochs)


def _evaluate(state: _State, evaluate: Callable[[nn.Module, int], float], epoch: int) -> None:
    with _averaged(state.net, state.average):
        score = evaluate(state.net, epoch)
        if not state.scores or score > max(s for _, s in state.scores):
            state.best = {k: v.detach().clone() for k, v in state.net.state_dict().items()}
    state.scores.append((epoch, score))


# --- the state between epochs -------------------------------------------------------------------------------------


@dataclass
class _State:
    """What a training changes, between two epochs."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None  # of the parameters, by name
    draws: bool  # whether the network may draw random numbers in training
    epoch: int = 0
    seconds: float = 0.0
    scores: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


def _initial_state(t: _Training, net: nn.Module | None) -> _State:
    config, x = t.config, t.data.images
    if net is None:
        seed = derive_seed(t.seed, "student init")
        net = make_net(config.net, t.data.num_classes, x.shape[-1], norm=config.norm, init=config.init, seed=seed)
    move_net(net, x.device)
    count_on_host(net)
    average = {k: p.detach().clone() for k, p in net.named_parameters()} if config.ema else None
    return _State(net, make_optimizer(net, config), average, draws_randomly(net))


def _save(path: Path, state: _State, identity: str) -> None:
    tensors = {f"net.{k}": v for k, v in state.net.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in (state.average or {}).items()}
    tensors |= {f"best.{k}": v for k, v in state.best.items()}
    for i, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"moment.{i}.{k}": v for k, v in moments.items() if v is not None}
    facts = {"identity": identity, "epoch": state.epoch, "seconds": state.seconds, "looks": state.scores}
    write_tensors(path, tensors, facts)


def _restore(path: Path, state: _State, identity: str) -> None:
    """Resume from a checkpoint unless it is of another training."""
    tensors, facts = read_tensors(path)
    if facts["identity"] != identity:
        return
    device = next(state.net.parameters()).device
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        head, _, name = key.partition(".")
        groups.setdefault(head, {})[name] = value.to(device)
    state.net.load_state_dict(groups["net"])
    if state.average is not None:
        # in the order of the parameters, which that of a file need not be
        state.average = {k: groups["average"][k] for k in state.average}
    state.best = groups.get("best", {})
    state.epoch, state.seconds = facts["epoch"], facts["seconds"]
    state.scores = [(int(e), float(a)) for e, a in facts["looks"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in groups.get("moment", {}).items():
        i, _, name = key.partition(".")
        moments.setdefault(int(i), {})[name] = tensors[f"moment.{key}"] if name == "step" else value
    state.optimizer.load_state_dict({"state": moments, "param_groups": state.optimizer.state_dict()["param_groups"]})


@contextlib.contextmanager
def _averaged(net: nn.Module, average: dict[str, Tensor] | None) -> Iterator[None]:
    """Load averaged parameters within the block; batch statistics stay."""
    if average is None:
        yield
        return
    trained = {k: p.detach().clone() for k, p in net.named_parameters()}
    net.load_state_dict(average, strict=False)
    yield
    net.load_state_dict(trained, strict=False)


# --- accuracy and preprocessing --------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    pixels: Pixels,
    batch_size: int | None = None,
    dtype: Dtype = "float32",
) -> float:
    """Return the top-1 accuracy on images (N, 3, S, S); leaves `net` in evaluation mode.

    Images may lie on the CPU: each batch is copied to the network's device. `batch_size` is halved where memory is
    short; None: 100 on a CPU, 1,000 elsewhere.
    """
    net.eval()
    device = next(net.parameters()).device
    half = resolve_dtype(dtype, device, "training") == "bfloat16"
    batch_size = batch_size or (100 if device.type == "cpu" else 1000)
    labels = to_device(labels, device)
    like = (sum(p.numel() for p in net.parameters()), *images.shape[1:])

    def hits(rows: slice) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = net(pixels(to_device(images[rows], device)))
        return (logits.argmax(1) == labels[rows]).sum()

    total = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(labels), batch_size):
        size = min(batch_size, len(labels) - start)

        def batch_hits(s: slice, start: int = start) -> Tensor:
            return hits(slice(start + s.start, start + s.stop))

        for n in list_in_pieces("test", size, batch_hits, like=like):
            total += n
    return int(total) / len(labels)


def normalizer(mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """Return a function that gives (x - mean) / std per channel in float32.

    It takes images (B, 3, S, S), uint8 or float in [0, 1].
    """

    def normalize(images: Tensor) -> Tensor:
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        m, s = (constant(v, x.device, torch.float32).view(1, -1, 1, 1) for v in (mean, std))
        return (x - m) / s

    return normalize
