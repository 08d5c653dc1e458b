"""Train a student on a small labelled set and test it on real images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.config import Dtype, StudentConfig
from dq.dist import derive_seed, generator
from dq.errors import InputError, RunError
from dq.evaluation.augment import augment
from dq.nets import fast_layout, make_net


@dataclass(frozen=True)
class StudentResult:
    """What one student reached. Accuracies are fractions of the test images."""

    last: float  # after the last epoch: the number to report
    best: float  # highest of `tests`: chosen on the test images, so optimistic; most papers print this one
    best_epoch: int  # the first that reached `best`, counted from 1
    tests: tuple[tuple[int, float], ...]  # (epochs trained, accuracy), ascending, the last epoch included
    train_seconds: float  # without the tests


def train_student(
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    config: StudentConfig,
    ipc_key: str,
    test: tuple[Tensor, Tensor],
    weights: Tensor | None = None,
    soft_labels: Tensor | None = None,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    device: torch.device | str,
    on_epoch: Callable[[int, float], None] | None = None,
) -> StudentResult:
    """Train a freshly initialised student on weighted images and test it, last and best accuracy kept apart.

    The loss of a batch of B images is (1/B) sum_i w_i l_i, with 1/B and not 1/sum w, so that an image weighs the same
    in whatever batch it falls. l_i is the cross-entropy for hard labels and KL(softmax(t_i/T) || softmax(s_i/T)) for
    soft ones. The KL shrinks gradients by about T^2. AdamW does not notice, and the published soft-label recipes, all
    AdamW, leave it so; SGD would hardly train, hence with `optimizer: sgd` the KL is multiplied by T^2.

    Initial weights, batch order and augmentation are drawn from generators derived from `seed`; on one device and
    thread count, the same arguments give the same result.

    Args:
        images: (N, 3, S, S), uint8 or float in [0, 1].
        labels: (N,) class indices.
        num_classes: number of classes of the data set.
        config: network, recipe and tests.
        ipc_key: which entry of `config.epochs` holds, e.g. "10" or "full"; "default" stands in for a missing one.
        test: real images and labels, shaped as above.
        weights: (N,) weight of each image; None for all ones.
        soft_labels: (N, `num_classes`) logits of a teacher, used if `config.labels` is "soft".
        mean: per channel, in [0, 1].
        std: per channel.
        seed: of this student.
        device: where all of it happens; everything is copied there once.
        on_epoch: called with the number of epochs done and the mean training loss of the last one.

    Raises:
        InputError: if tensors or settings do not fit together.
        RunError: if the loss is not a finite number.
    """
    epochs = epochs_for(config, ipc_key)
    looks = set(looks_at(epochs, config.tests))
    _check(images, labels, num_classes, config, test, weights, soft_labels)
    device = torch.device(device)
    net = make_net(config.net, num_classes, images.shape[-1], seed=derive_seed(seed, "student init"))
    net.to(device, memory_format=fast_layout(net))  # type: ignore[call-overload]  # a keyword the stubs lack
    soft = soft_labels.to(device, torch.float32) if config.labels == "soft" and soft_labels is not None else None
    scale = config.temperature**2 if soft is not None and config.optimizer == "sgd" else 1.0
    # One code path: multiplying by 1 is exact, so weights of 1 are bit-identical to none.
    w = (torch.ones(len(labels)) if weights is None else weights).to(device, torch.float32)
    x, y = images.to(device), labels.to(device, torch.int64)
    test_x, test_y = test[0].to(device), test[1].to(device, torch.int64)

    tests = []
    seconds = 0.0
    optimizer = make_optimizer(net, config)
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        if config.schedule == "step" and epoch == second_half(epochs):
            optimizer = make_optimizer(net, config)  # the momentum starts anew, as in DC's code
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch, epochs)
        net.train()
        total = torch.zeros((), device=device)
        draws = generator(seed, "student augmentation", epoch)
        order = torch.randperm(len(y), generator=generator(seed, "student order", epoch)).to(device)
        for rows in order.split(config.batch_size):
            batch = augment(config.augment, normalize(x[rows], mean, std), draws)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                logits = net(batch)
            targets = y[rows] if soft is None else soft[rows]
            loss = scale * weighted_loss(logits, targets, w[rows], temperature=config.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
        mean_loss = float(total) / len(y)
        seconds += time.perf_counter() - start
        if not math.isfinite(mean_loss):
            raise RunError(
                f"the loss of student {config.net!r} (seed {seed}) is {mean_loss} in epoch {epoch} of {epochs}; "
                f"lower its lr, now {config.lr:g}"
            )
        if epoch in looks:
            tests.append((epoch, accuracy(net, test_x, test_y, mean=mean, std=std, dtype=config.dtype)))
        if on_epoch is not None:
            on_epoch(epoch, mean_loss)
    best_epoch, best = max(tests, key=lambda t: t[1])
    return StudentResult(tests[-1][1], best, best_epoch, tuple(tests), seconds)


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor, *, temperature: float = 1.0) -> Tensor:
    """(1/B) sum_i w_i l_i over a batch, in float32.

    Args:
        logits: (B, C) of the student.
        targets: (B,) class indices for cross-entropy, or (B, C) logits of a teacher for KL.
        weights: (B,).
        temperature: T of the KL, which gets no factor T^2 here; without effect on class indices.
    """
    logits = logits.float()
    if targets.ndim == 1:
        per_image = F.cross_entropy(logits, targets, reduction="none")
    else:
        student, teacher = F.log_softmax(logits / temperature, 1), F.log_softmax(targets / temperature, 1)
        per_image = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    return (weights * per_image).mean()


@torch.no_grad()
def accuracy(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 100,
    dtype: Dtype = "float32",
) -> float:
    """Fraction of images (N, 3, S, S) whose highest logit is their label; leaves `net` in evaluation mode."""
    net.eval()
    device = next(net.parameters()).device
    hits = torch.zeros((), dtype=torch.int64, device=device)
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = net(normalize(x.to(device), mean, std))
        hits += (logits.argmax(1) == y.to(device)).sum()
    return int(hits) / len(labels)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std per channel, in float32, of images (B, 3, S, S), uint8 or float in [0, 1]."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    m, s = (torch.tensor(v, dtype=torch.float32, device=x.device).view(1, -1, 1, 1) for v in (mean, std))
    return (x - m) / s


# --- recipe -------------------------------------------------------------------------------------------------------


def epochs_for(config: StudentConfig, ipc_key: str) -> int:
    """Epochs for a set of `ipc_key` images per class; "default" stands in for a missing entry."""
    epochs = config.epochs.get(ipc_key, config.epochs.get("default"))
    if epochs is None:
        known = ", ".join(config.epochs) or "nothing"
        raise InputError(f"student {config.net!r} has epochs for {known} but not for {ipc_key!r}; add 'default'")
    if epochs < 1:
        raise InputError(f"student {config.net!r} needs at least 1 epoch for {ipc_key!r}, not {epochs}")
    return epochs


def looks_at(epochs: int, tests: int) -> list[int]:
    """After which epochs to test: `tests` of them (all, if there are fewer), evenly spaced, the last one included."""
    if tests < 1:
        raise InputError(f"a student must be tested at least once, not {tests} times; set tests to 1 or more")
    return sorted({-(-epochs * i // tests) for i in range(1, tests + 1)})


def second_half(epochs: int) -> int:
    """The first epoch with the lower learning rate of the step schedule."""
    return (epochs + 1) // 2 + 1


def learning_rate(config: StudentConfig, epoch: int, epochs: int) -> float:
    """Learning rate throughout epoch 1, ..., `epochs`: lr; "step": lr/10 in the second half; "cosine": falling to 0
    as lr (1 + cos(pi (epoch - 1)/epochs)) / 2."""
    if config.schedule == "step":
        return config.lr * (0.1 if epoch >= second_half(epochs) else 1.0)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
    return config.lr


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
    test: tuple[Tensor, Tensor],
    weights: Tensor | None,
    soft_labels: Tensor | None,
) -> None:
    _check_pair("training", images, labels, num_classes)
    _check_pair("test", *test, num_classes)
    if images.shape[-1] != test[0].shape[-1]:
        raise InputError(
            f"training images are {images.shape[-1]} px wide but test images {test[0].shape[-1]} px; "
            "read both at the same size"
        )
    if weights is not None:
        if weights.shape != labels.shape:
            raise InputError(f"{len(labels)} images need weights ({len(labels)},), not {tuple(weights.shape)}")
        if not (torch.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise InputError("weights must be finite, none negative and not all zero; recompute them from the counts")
    if config.labels == "soft":
        if soft_labels is None:
            raise InputError(f"student {config.net!r} learns from soft labels but there are none; name a teacher")
        if soft_labels.shape != (len(labels), num_classes):
            raise InputError(
                f"soft labels must be logits ({len(labels)}, {num_classes}), not {tuple(soft_labels.shape)}; "
                "the teacher has to know the same classes"
            )
    if config.dtype == "float16":
        raise InputError(f"student {config.net!r} cannot train in float16, which needs loss scaling; use bfloat16")


def _check_pair(what: str, images: Tensor, labels: Tensor, num_classes: int) -> None:
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or labels.shape != shape[:1] or not len(labels):
        raise InputError(
            f"{what} images must be (N, 3, S, S) with labels (N,), N > 0, not {shape} and {tuple(labels.shape)}"
        )
    if images.dtype != torch.uint8 and not (images.min() >= 0 and images.max() <= 1):
        raise InputError(
            f"{what} images are floats from {float(images.min()):.3g} to {float(images.max()):.3g} but must lie in "
            "[0, 1]; give them as they were before normalisation"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"{what} labels go from {int(labels.min())} to {int(labels.max())} but num_classes is {num_classes}"
        )
