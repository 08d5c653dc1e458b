"""Train a student on a small labelled set and test it on real images."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.config.reader import to_dict
from dq.config.students import Dtype, StudentConfig, ViewConfig
from dq.core.errors import InputError, RunError
from dq.core.files import is_done, read_tensors, write_tensors
from dq.core.seeds import derive_seed, digest_of, digest_of_tensors, generator, seeded
from dq.data.augment import augment
from dq.data.views import Views, apply_views, batches, draw_views, parts
from dq.labels import LabelSource
from dq.nets import fast_layout, make_net

AT_ONCE = 64 << 20  # pixels of a set whose normalised copy is held in memory


Pixels = Callable[[Tensor], Tensor]  # images (B, 3, S, S), uint8 or float in [0, 1] -> what a network is given


@dataclass(frozen=True)
class StudentResult:
    """What one student reached. Accuracies are fractions of the test images."""

    last: float  # after the last epoch: the number to report
    best: float  # of the epoch that was best where `selected_on` says
    best_epoch: int  # the first that was best, counted from 1
    selected_on: str  # validation; test: chosen on the test images, so optimistic (most papers); none: the last epoch
    looks: tuple[tuple[int, float], ...]  # (epochs trained, accuracy there), ascending, the last epoch included
    train_seconds: float  # without the looks


def train_student(
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    config: StudentConfig,
    test: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor] | None = None,
    weights: Tensor | None = None,
    soft_labels: Tensor | LabelSource | None = None,
    bounded: bool = True,
    pixels: Pixels,
    seed: int,
    device: torch.device | str,
    on_epoch: Callable[[int, float], None] | None = None,
    checkpoint: Path | None = None,
) -> StudentResult:
    """Train a freshly initialised student on weighted images and test it.

    The test images are used once, at the end: for the last parameters, and for those of the epoch that was best on
    the validation images if the student looks at them (`config.tests` > 1). With `config.select: test` the looks
    themselves are at the test images, as in most published code.

    Args:
        images: (N, 3, S, S), uint8 or float in [0, 1].
        labels: (N,) class indices.
        num_classes: number of classes of the data set.
        config: network, recipe and looks.
        test: real images and labels, shaped as above.
        validation: real images and labels to choose an epoch by.
        weights: (N,) weight of each image, positive; None for all ones.
        soft_labels: (N, `num_classes`) logits of a teacher for labels "fixed"; a source of label epochs for "soft".
        bounded: float images lie in [0, 1]; False for images of methods that do not keep them there.
        pixels: what is done to images before a network gets them, see `normalizer` and `dq.data.zca`.
        seed: of this student.
        device: where all of it happens; everything is copied there once.
        on_epoch: called with the number of epochs done and the mean training loss of the last one.
        checkpoint: file from which a killed training goes on, written about once a minute. It stays: delete it once
            the result is safe. It knows images, labels, weights, settings and seed, not a source of label epochs.

    Raises:
        InputError: if tensors or settings do not fit together.
        RunError: if the loss is not a finite number.
    """
    _check(images, labels, num_classes, config, weights, soft_labels, bounded)
    for what, pair in (("test", test), ("validation", validation)):
        if pair is not None:
            _check_pair(what, *pair, num_classes)
            _check_sides(images, pair[0], what)
    device = torch.device(device)
    watch = {"test": test, "validation": validation}[config.select] if config.tests > 1 else None
    if watch is None and config.tests > 1:
        raise InputError(
            f"student {config.net!r} chooses its best of {config.tests} looks on validation images but there are "
            "none; set evaluate.validation_images, or tests=1"
        )

    def score(net: nn.Module, pair: tuple[Tensor, Tensor]) -> float:
        return accuracy(net, pair[0].to(device), pair[1].to(device), pixels=pixels, dtype=config.dtype)

    fitted = fit(
        images.to(device),
        labels.to(device, torch.int64),
        num_classes=num_classes,
        config=config,
        weights=weights,
        soft_labels=soft_labels,
        pixels=pixels,
        seed=seed,
        look=None if watch is None else lambda net, epoch: score(net, watch),
        on_epoch=on_epoch,
        checkpoint=checkpoint,
    )
    last = score(fitted.net, test)
    if watch is None:
        return StudentResult(last, last, config.epochs, "none", (), fitted.seconds)
    best_epoch, best = max(fitted.looks, key=lambda t: t[1])
    if config.select == "validation":
        fitted.net.load_state_dict(fitted.best_state)
        best = last if best_epoch == config.epochs else score(fitted.net, test)
    return StudentResult(last, best, best_epoch, config.select, fitted.looks, fitted.seconds)


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
    soft_labels: Tensor | LabelSource | None = None,
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
    k w_i + (1 - k) w_partner. The KL shrinks gradients by about T^2. AdamW does not notice, and the published
    soft-label recipes, all AdamW, leave it so; SGD would hardly train, hence with `optimizer: sgd` the KL is
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
    looks = set(looks_at(epochs, config.tests)) if look is not None else set()
    if net is None:
        net = make_net(config.net, num_classes, x.shape[-1], norm=config.norm, seed=derive_seed(seed, "student init"))
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
        if config.schedule == "step" and epoch == second_half(epochs):
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
        order = views.order.long().to(device)
        for i, span in enumerate(batches(len(y), config.batch_size, config.accumulate)):
            rows = order[span]
            batch = given[rows] if given is not None else pixels(apply_views(config.views, x, views, i, span))
            batch = augment(config.augment, batch, draws)
            partner = rows[views.partner[span].long().to(device)]
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
                torch._foreach_lerp_(list(state.average.values()), now, 1 - config.ema)
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
    mse_gt (EDC): mean over classes of (s - t)^2, plus `gt_weight` CE with the class of the image itself.

    Args:
        logits: (B, C) of the student.
        y, other: (B,) classes of the images and of their partners.
        kept: share of the image itself, 1 if the batch is not mixed.
        teacher: (B, C) logits, or None for hard labels.
    """
    logits = logits.float()
    if teacher is None:
        own = F.cross_entropy(logits, y, reduction="none")
        return own if kept == 1 else kept * own + (1 - kept) * F.cross_entropy(logits, other, reduction="none")
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
    hits = torch.zeros((), dtype=torch.int64, device=device)
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = net(pixels(x.to(device)))
        hits += (logits.argmax(1) == y.to(device)).sum()
    return int(hits) / len(labels)


def normalizer(mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """(x - mean) / std per channel, in float32, of images (B, 3, S, S), uint8 or float in [0, 1]."""

    def normalize(images: Tensor) -> Tensor:
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        m, s = (torch.tensor(v, dtype=torch.float32, device=x.device).view(1, -1, 1, 1) for v in (mean, std))
        return (x - m) / s

    return normalize


# --- checkpoints --------------------------------------------------------------------------------------------------


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
    x: Tensor, y: Tensor, w: Tensor, soft_labels: Tensor | LabelSource | None, config: StudentConfig, seed: int
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


# --- recipe -------------------------------------------------------------------------------------------------------


def looks_at(epochs: int, tests: int) -> list[int]:
    """After which epochs to test: `tests` of them (all, if there are fewer), evenly spaced, the last one included."""
    if tests < 1:
        raise InputError(f"a student must be tested at least once, not {tests} times; set tests to 1 or more")
    return sorted({-(-epochs * i // tests) for i in range(1, tests + 1)})


def second_half(epochs: int) -> int:
    """The first epoch with the lower learning rate of the step schedule."""
    return (epochs + 1) // 2 + 1


def learning_rate(config: StudentConfig, epoch: int, epochs: int) -> float:
    """Learning rate throughout epoch 1, ..., `epochs`.

    constant: lr. step: lr/10 in the second half. multistep: times 0.2 at 2/3 and again at 5/6 (Minimax).
    cosine: lr (1 + cos(pi (epoch - 1)/(zeta epochs))) / 2, which ends at 0 for zeta = 1 and at lr/2 for zeta = 2.
    cos2 (EDC): the same up to 5/6 of the epochs, then the value there times the share of epochs that is left. As
    released, so lr falls by a factor of six at the switch.
    """
    done = (epoch - 1) / epochs
    if config.schedule == "step":
        return config.lr * (0.1 if epoch >= second_half(epochs) else 1.0)
    if config.schedule == "multistep":
        return config.lr * 0.2 ** sum(epoch - 1 >= m for m in (2 * epochs // 3, 5 * epochs // 6))
    if config.schedule == "constant":
        return config.lr
    switch = 5 / 6
    if config.schedule == "cos2" and done >= switch:
        return config.lr * 0.5 * (1 + math.cos(math.pi * switch / config.zeta)) * (1 - done)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done / config.zeta))


def make_optimizer(net: nn.Module, config: StudentConfig) -> torch.optim.Optimizer:
    """SGD decays every parameter, AdamW only those with more than one dimension, each as its published recipes do."""
    decay = config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=decay)
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]  # biases and norms
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr)


# --- the door -----------------------------------------------------------------------------------------------------


def _check(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    config: StudentConfig,
    weights: Tensor | None,
    soft_labels: Tensor | LabelSource | None,
    bounded: bool,
) -> None:
    _check_pair("training", images, labels, num_classes, bounded=bounded)
    if weights is not None:
        if weights.shape != labels.shape:
            raise InputError(f"{len(labels)} images need weights ({len(labels)},), not {tuple(weights.shape)}")
        wrong = (~(torch.isfinite(weights) & (weights > 0))).nonzero()
        if len(wrong):
            i = int(wrong[0])
            raise InputError(
                f"weights must be finite and more than 0, but image {i} has {float(weights[i]):g}; "
                "leave such images out, or recompute the weights from the counts"
            )
    if config.labels == "hard":
        return
    if soft_labels is None:
        raise InputError(
            f"student {config.net!r} learns from {config.labels} labels but there are none; name a teacher"
        )
    if (config.labels == "fixed") != isinstance(soft_labels, Tensor):
        kind = "a tensor of logits (N, C)" if config.labels == "fixed" else "a source of label epochs"
        raise InputError(f"labels={config.labels} need {kind}, not {type(soft_labels).__name__}")
    if isinstance(soft_labels, Tensor) and soft_labels.shape != (len(labels), num_classes):
        raise InputError(
            f"fixed labels must be logits ({len(labels)}, {num_classes}), not {tuple(soft_labels.shape)}; "
            "the teacher has to know the same classes"
        )


def _check_sides(images: Tensor, others: Tensor, what: str) -> None:
    if images.shape[-1] != others.shape[-1]:
        raise InputError(
            f"training images are {images.shape[-1]} px wide but {what} images {others.shape[-1]} px; "
            "read both at the same size"
        )


def _check_pair(what: str, images: Tensor, labels: Tensor, num_classes: int, *, bounded: bool = True) -> None:
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or labels.shape != shape[:1] or not len(labels):
        raise InputError(
            f"{what} images must be (N, 3, S, S) with labels (N,), N > 0, not {shape} and {tuple(labels.shape)}"
        )
    if bounded and images.dtype != torch.uint8 and not (images.min() >= 0 and images.max() <= 1):
        raise InputError(
            f"{what} images are floats from {float(images.min()):.3g} to {float(images.max()):.3g} but must lie in "
            "[0, 1]; give them as they were before normalisation"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"{what} labels go from {int(labels.min())} to {int(labels.max())} but num_classes is {num_classes}"
        )
