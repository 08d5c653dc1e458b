"""The one training loop, of students and teachers."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dq.config.dtypes import device_dtypes, resolve_dtypes
from dq.config.reader import to_dict
from dq.config.students import Dtype, StudentConfig, ViewConfig
from dq.core.constants import constant
from dq.core.devices import resolve_dtype
from dq.core.errors import InputError, RunError
from dq.core.files import is_done, read_tensors, write_tensors
from dq.core.seeds import derive_seed, digest_of, digest_of_tensors, generator, seeded
from dq.data.augment import augment
from dq.data.views import Views, apply_views, batches, draw_views, parts
from dq.networks.optimizers import MuonAdamW, muon_groups
from dq.networks.zoo import fast_layout, make_net

AT_ONCE = 64 << 20  # pixels of a set whose normalized copy is held in memory
Pixels = Callable[[Tensor], Tensor]  # images (B, 3, S, S), uint8 or float in [0, 1] -> what a network is given


class EpochTargets(Protocol):
    """Targets of one epoch: the views that they belong to, and a teacher's logits of these."""

    @property
    def views(self) -> Views: ...

    @property
    def logits(self) -> Tensor: ...  # (N, C) float32, by position in `views.order`

    def check(self, images: int, student: StudentConfig) -> None:
        """Raise `InputError` if the targets were made for another number of images or other settings."""
        ...


TargetSource = Callable[[int], EpochTargets]  # epoch from 1 -> its targets; `dq.labels` provides one


@dataclass(frozen=True)
class Fitted:
    """A trained network."""

    net: nn.Module  # averaged parameters if the recipe averages
    looks: tuple[tuple[int, float], ...]
    best_state: dict[str, Tensor]  # of the best look; empty without looks
    seconds: float  # of training, without the looks


def fit(
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    config: StudentConfig,
    weights: Tensor | None = None,
    soft_labels: Tensor | TargetSource | None = None,
    pixels: Pixels,
    seed: int,
    net: nn.Module | None = None,
    look: Callable[[nn.Module, int], float] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_s: float = 60.0,
) -> Fitted:
    """The training loop of students and teachers.

    The loss of a batch of B images is (1/B) sum_i w_i l_i, with 1/B and not 1/sum w, so that an image weighs the same
    in whatever batch it falls; see `image_losses` for l_i. In a batch mixed with kept share k, an image's weight is
    k w_i + (1 - k) w_partner. The KL shrinks gradients by about T^2. AdamW and Muon do not notice, and the
    published soft-label recipes, all AdamW, leave it so; SGD would hardly train, hence with `optimizer: sgd` the KL is
    multiplied by T^2.

    Initial weights, batch order, views, augmentation and dropout are drawn from generators derived from `seed` (views
    from the label plan's where labels belong to them); on one device and thread count, the same arguments give the
    same result, and a training that goes on from its checkpoint gives the result of an uninterrupted one.

    Args:
        x: (N, 3, S, S), uint8 or float in [0, 1], on the device to train on.
        y: (N,) int64 there.
        net: where to start, trained in place; None: a fresh `config.net`.
        look: measures the network after some epochs (`looks_at`), whose number it is given; the best is kept.
    """
    device, epochs = x.device, config.epochs
    config = resolve_dtypes(config, device_dtypes(device))
    looks = set(looks_at(epochs, config.tests)) if look is not None else set()
    if net is None:
        choices: dict[str, Any] = {"norm": config.norm, "init": config.init}
        net = make_net(config.net, num_classes, x.shape[-1], **choices, seed=derive_seed(seed, "student init"))
    net.to(device, memory_format=fast_layout(net))  # type: ignore[call-overload]  # a keyword the stubs lack
    w = (torch.ones(len(y)) if weights is None else weights).to(device, torch.float32)
    source = soft_labels if config.labels == "soft" and not isinstance(soft_labels, Tensor) else None
    fixed = (
        soft_labels.to(device, torch.float32) if config.labels == "fixed" and isinstance(soft_labels, Tensor) else None
    )
    plain = config.views == ViewConfig()
    given = pixels(x) if plain and x.numel() <= AT_ONCE else None  # the same pixels in every epoch
    average = {k: p.detach().clone() for k, p in net.named_parameters()} if config.ema else None
    state = _State(net, make_optimizer(net, config), average)
    if checkpoint is not None and is_done(checkpoint):
        identity = _training_digest(x, y, w, soft_labels, config, seed)
        _restore(checkpoint, state, config, identity)
    saved = time.perf_counter()
    for epoch in range(state.epoch + 1, epochs + 1):
        start = time.perf_counter()
        if config.schedule == "step" and epoch - config.warmup == second_half(epochs - config.warmup):
            state.optimizer = make_optimizer(net, config)  # the momentum starts anew, as in DC's code
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch, epochs)
        net.train()
        total = torch.zeros((), device=device)
        draws = generator(seed, "student augmentation", epoch)
        labelled = source(epoch) if source is not None else None
        if labelled is not None:
            labelled.check(len(y), config)
        views = labelled.views if labelled is not None else _own_views(config, x, seed, epoch)
        logits_now = labelled.logits.to(device) if labelled is not None else None
        order, partners = views.order.long().to(device), views.partner.long().to(device)
        for i, span in enumerate(batches(len(y), config.batch_size, config.accumulate)):
            rows = order[span]
            batch = given[rows] if given is not None else pixels(apply_views(config.views, x, views, i, span))
            batch = augment(config.augment, batch, draws)
            partner = rows[partners[span]]
            kept = float(views.kept[i])
            batch_weights = w[rows] if kept == 1 else kept * w[rows] + (1 - kept) * w[partner]
            teacher = logits_now[span] if logits_now is not None else fixed[rows] if fixed is not None else None
            state.optimizer.zero_grad()
            for part in parts(len(rows), config.accumulate):
                # dropout knows only the global generators
                own = seeded(derive_seed(seed, "student dropout", epoch, i, part.start), device)
                with own, torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                    logits = net(batch[part])
                losses = image_losses(
                    logits, y[rows[part]], y[partner[part]], kept, None if teacher is None else teacher[part], config
                )
                loss = (batch_weights[part] * losses).mean() * ((part.stop - part.start) / len(rows))
                loss.backward()
                total += loss.detach() * len(rows)
            state.optimizer.step()
            if state.average is not None:
                now = [p.detach() for p in net.parameters()]
                get_ema_multi_avg_fn(config.ema)(list(state.average.values()), now, None)
        mean_loss = float(total) / len(y)
        state.seconds += time.perf_counter() - start
        if not math.isfinite(mean_loss):
            raise RunError(
                f"the loss of student {config.net!r} (seed {seed}) is {mean_loss} in epoch {epoch} of {epochs}; "
                f"lower its lr, now {config.lr:g}"
            )
        if look is not None and epoch in looks:
            with _averaged(net, state.average):
                found = look(net, epoch)
                if not state.looks or found > max(a for _, a in state.looks):
                    state.best = {k: v.detach().clone() for k, v in net.state_dict().items()}
            state.looks.append((epoch, found))
        state.epoch = epoch
        if on_epoch is not None:
            on_epoch(epoch, mean_loss)
        if checkpoint is not None and time.perf_counter() - saved > checkpoint_s and epoch < epochs:
            _save(checkpoint, state, _training_digest(x, y, w, soft_labels, config, seed))
            saved = time.perf_counter()
    if state.average is not None:
        net.load_state_dict(state.average, strict=False)
    return Fitted(net, tuple(state.looks), state.best, state.seconds)


def _own_views(config: StudentConfig, x: Tensor, seed: int, epoch: int) -> Views:
    side, size, accumulate = x.shape[-1], config.batch_size, config.accumulate
    return draw_views(config.views, len(x), side, batch_size=size, accumulate=accumulate, seed=seed, epoch=epoch)


def image_losses(
    logits: Tensor, y: Tensor, other: Tensor, kept: float, teacher: Tensor | None, config: StudentConfig
) -> Tensor:
    """The loss of each image of a batch, (B,), in float32.

    hard: CE with the class; in a mix, k CE(class) + (1 - k) CE(class of the partner).
    kl: KL(softmax(t/T) || softmax(s/T)), times T^2 with SGD.
    mse (FRePo): 1/2 sum over classes of (s - t)^2.
    mse_gt (EDC): mean over classes of (s - t)^2, plus `gt_weight` CE with the class of the image itself.

    Args:
        logits: (B, C) of the student.
        y, other: (B,) classes of the images and of their partners.
        kept: share of the image itself, 1 if the batch is not mixed.
        teacher: (B, C) logits, or regression labels for mse; None for hard labels.
    """
    logits = logits.float()
    if teacher is None:
        own = F.cross_entropy(logits, y, reduction="none")
        return own if kept == 1 else kept * own + (1 - kept) * F.cross_entropy(logits, other, reduction="none")
    if config.loss == "mse":
        return 0.5 * (logits - teacher).square().sum(1)
    if config.loss == "mse_gt":
        return (logits - teacher).square().mean(1) + config.gt_weight * F.cross_entropy(logits, y, reduction="none")
    t = config.temperature
    student, target = F.log_softmax(logits / t, 1), F.log_softmax(teacher / t, 1)
    divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(1)
    return divergence * t**2 if config.optimizer == "sgd" else divergence


@torch.no_grad()
def accuracy(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    pixels: Pixels,
    batch_size: int = 100,
    dtype: Dtype = "float32",
) -> float:
    """Fraction of images (N, 3, S, S) whose highest logit is their label; leaves `net` in evaluation mode."""
    net.eval()
    device = next(net.parameters()).device
    half = resolve_dtype(dtype, device, "training") == "bfloat16"
    hits = torch.zeros((), dtype=torch.int64, device=device)
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = net(pixels(x.to(device)))
        hits += (logits.argmax(1) == y.to(device)).sum()
    return int(hits) / len(labels)


def normalizer(mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """(x - mean) / std per channel, in float32, of images (B, 3, S, S), uint8 or float in [0, 1]."""

    def normalize(images: Tensor) -> Tensor:
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        m, s = (constant(v, x.device, torch.float32).view(1, -1, 1, 1) for v in (mean, std))
        return (x - m) / s

    return normalize


@dataclass
class _State:
    """What a training is made of between two epochs."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None
    epoch: int = 0
    seconds: float = 0.0
    looks: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


def _training_digest(
    x: Tensor, y: Tensor, w: Tensor, soft_labels: Tensor | TargetSource | None, config: StudentConfig, seed: int
) -> str:
    tensors = {"x": x, "y": y, "w": w}
    if isinstance(soft_labels, Tensor):
        tensors["soft"] = soft_labels
    return digest_of([digest_of_tensors(tensors), to_dict(config), seed])


def _save(path: Path, state: _State, identity: str) -> None:
    tensors = {f"net.{k}": v for k, v in state.net.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in (state.average or {}).items()}
    tensors |= {f"best.{k}": v for k, v in state.best.items()}
    for i, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"moment.{i}.{k}": v for k, v in moments.items() if v is not None}
    facts = {"identity": identity, "epoch": state.epoch, "seconds": state.seconds, "looks": state.looks}
    write_tensors(path, tensors, facts)


def _restore(path: Path, state: _State, config: StudentConfig, identity: str) -> None:
    """Go on from a checkpoint of this very training; one of another training is ignored and overwritten."""
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
        # a file has an order of its own, and the averages go by that of the parameters
        state.average = {k: groups["average"][k] for k in state.average}
    state.best = groups.get("best", {})
    state.epoch, state.seconds = facts["epoch"], facts["seconds"]
    state.looks = [(int(e), float(a)) for e, a in facts["looks"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in groups.get("moment", {}).items():
        i, _, name = key.partition(".")
        moments.setdefault(int(i), {})[name] = tensors[f"moment.{key}"] if name == "step" else value
    state.optimizer.load_state_dict({"state": moments, "param_groups": state.optimizer.state_dict()["param_groups"]})


@contextlib.contextmanager
def _averaged(net: nn.Module, average: dict[str, Tensor] | None) -> Iterator[None]:
    """The network with its averaged parameters for the time of a block; batch statistics stay its own."""
    if average is None:
        yield
        return
    own = {k: p.detach().clone() for k, p in net.named_parameters()}
    net.load_state_dict(average, strict=False)
    yield
    net.load_state_dict(own, strict=False)


def looks_at(epochs: int, tests: int) -> list[int]:
    """After which epochs to test: `tests` of them (all, if there are fewer), evenly spaced, the last one included."""
    if tests < 1:
        raise InputError(f"a student must be tested at least once, not {tests} times; set tests to 1 or more")
    return sorted({-(-epochs * i // tests) for i in range(1, tests + 1)})


def second_half(epochs: int) -> int:
    """The first epoch with the lower learning rate of the step schedule.

    DC's code passes E + 1 times over its images for E epochs, and lowers lr after pass E // 2 + 2: of 1001 passes, 502
    have lr and 499 have lr / 10.
    """
    return (epochs - 1) // 2 + 3


def learning_rate(config: StudentConfig, epoch: int, epochs: int) -> float:
    """Learning rate throughout epoch 1, ..., `epochs`. With s = epoch - 1 and E = `epochs`:

    constant: lr. step: lr / 10 in the second half, see `second_half`. multistep: times `step_factor` at each of the
    `milestones`, which are shares of E: 0.2 at 2/3 and 5/6 is Minimax's, 0.5 at 0.8, 0.9 and 0.95 EDC's for CIFAR-10.
    cosine: lr (1 + cos(pi s / (zeta E))) / 2, which ends at 0 for zeta = 1 and at lr / 2 for zeta = 2;
    with `lr_floor` f it is f lr + (1 - f) times that.
    linear: lr (1 - s / (zeta E)).
    cos2 (EDC): the cosine for s <= 5 E / 6, then its value there times the share of epochs that is left. As released,
    so lr falls by a factor of six at the switch.

    The first `warmup` epochs have lr (0.01 + 0.99 s / warmup); the schedule then counts from them.
    """
    step = epoch - 1
    if step < config.warmup:
        return config.lr * (0.01 + 0.99 * step / config.warmup)
    step, epochs = step - config.warmup, epochs - config.warmup
    if config.schedule == "step":
        return config.lr * (0.1 if step + 1 >= second_half(epochs) else 1.0)
    if config.schedule == "multistep":
        # 2 / 3 as a float times 300 must not become 199
        passed = sum(step >= math.floor(m * epochs + 1e-6) for m in config.milestones)
        return config.lr * config.step_factor**passed
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "linear":
        return config.lr * (1 - step / (config.zeta * epochs))
    if config.schedule == "cos2" and 6 * step > 5 * epochs:
        return config.lr * 0.5 * (1 + math.cos(math.pi * 5 / (6 * config.zeta))) * (1 - step / epochs)
    cosine = config.lr * 0.5 * (1 + math.cos(math.pi * step / (config.zeta * epochs)))
    return config.lr_floor * config.lr + (1 - config.lr_floor) * cosine


def make_optimizer(net: nn.Module, config: StudentConfig) -> torch.optim.Optimizer:
    """SGD decays every parameter, AdamW only those with more than one dimension, each as most published recipes do;
    `decay_vectors` chooses otherwise. Muon takes hidden matrices and kernels; AdamW, as before, the others."""
    decay_vectors = config.optimizer == "sgd" if config.decay_vectors is None else config.decay_vectors
    hidden = list(muon_groups(net, convolutions=True)[0].values()) if config.optimizer == "muon" else []
    taken = set(map(id, hidden))
    matrices = [p for p in net.parameters() if p.ndim > 1 and id(p) not in taken]
    vectors = [p for p in net.parameters() if p.ndim <= 1]  # biases and norms
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": config.weight_decay}]
    groups.append({"params": vectors, "weight_decay": config.weight_decay if decay_vectors else 0.0})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    if config.optimizer == "muon":
        return MuonAdamW(hidden, groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr)
