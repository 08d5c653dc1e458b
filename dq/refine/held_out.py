"""Held-out accuracy of networks trained on a set, to choose among its states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq.config.protocols import student_config
from dq.config.students import StudentConfig
from dq.core.errors import InputError
from dq.core.plain import PlainDict
from dq.core.seeds import derive_seed
from dq.data.regression_labels import fit_temperature
from dq.data.splits import validation_rows
from dq.data.zca import Whitening, is_gray
from dq.networks.online_pool import OnlinePool
from dq.networks.training import TrainingSet, accuracy, fit
from dq.refine.method import RealImages
from dq.refine.ridge import predict, solve_ridge

AT_ONCE = 1000  # images
HARD_LOGIT = 20.0  # of an image's class, where labels are not learned: softmax gives it all but 1e-8


@dataclass(frozen=True)
class HeldOut:
    """Held-out train images, and the networks that are tested on them."""

    real: RealImages
    whitening: Whitening
    net: str  # architecture
    nets: int = 1  # networks of a check


def split_off(real: RealImages, share: float) -> tuple[RealImages, RealImages]:
    """Divide train images into the others and a stratified share.

    Raises:
        InputError: if too few would be left.
    """
    number = max(1, round(share * len(real.labels)))
    if number >= len(real.labels) - len(real.labels.unique()):
        raise InputError(
            f"{len(real.labels)} train images are too few to hold out any for checks; set checks=0 and leave "
            "fit_temperature out"
        )
    held_out = torch.zeros(len(real.labels), dtype=torch.bool)
    held_out[torch.from_numpy(validation_rows(real.labels.numpy(), number))] = True
    return divide(real, held_out)


def divide(real: RealImages, held_out: Tensor) -> tuple[RealImages, RealImages]:
    """Divide train images into others and those of `held_out` (N,) bool."""
    others = RealImages(real.images[~held_out], real.labels[~held_out])
    return others, RealImages(real.images[held_out], real.labels[held_out])


def check_steps(steps: int, checks: int) -> set[int]:
    """Evenly spread numbers of steps after which a set is tested."""
    return {-(-steps * i // checks) for i in range(1, checks + 1)}


def held_out_accuracy(x: Tensor, y: Tensor, held_out: HeldOut, *, seed: int) -> float:
    """Mean held-out accuracy of networks trained by the protocol `frepo`.

    On whitened images x (n, 3, S, S) with regression labels y (n, C).
    """
    augment = "frepo_noflip" if is_gray(held_out.real.images) else "frepo"
    spec = {"protocol": "frepo", "net": held_out.net, "augment": augment}
    return mean_accuracy(x, y, held_out, _student(spec, x, y), seed=seed)


def classic_accuracy(
    x: Tensor, logits: Tensor, held_out: HeldOut, *, epochs: int, augment: str, lr: float | None = None, seed: int
) -> float:
    """Mean held-out accuracy of networks trained by the protocol `classic`.

    Args:
        x: (n, 3, S, S) images as networks see them.
        logits: (n, C) of their labels.
        held_out: images and networks.
        epochs: of the training.
        augment: augmentation.
        lr: learning rate; None: the protocol's.
        seed: of the networks.
    """
    spec: PlainDict = {"protocol": "classic", "net": held_out.net, "labels": "fixed", "augment": augment}
    spec |= {"epochs": epochs, "dtype": "float32"} | ({} if lr is None else {"lr": lr})
    return mean_accuracy(x, logits, held_out, _student(spec, x, logits), seed=seed)


def _student(spec: PlainDict, x: Tensor, y: Tensor) -> StudentConfig:
    """Settings of a student for images x with label vectors y (n, C)."""
    classes = y.shape[1]
    ipc = max(1, round(len(x) / classes))
    return student_config(spec, ipc=str(ipc), classes=classes, image_size=x.shape[-1])


def mean_accuracy(x: Tensor, y: Tensor, held_out: HeldOut, config: StudentConfig, *, seed: int) -> float:
    """Mean held-out accuracy of networks trained with the settings of a student.

    On whitened images x (n, 3, S, S) with label vectors y (n, C).
    """
    data = TrainingSet(x, y.argmax(1), y.shape[1], lambda images: images, soft_labels=y)
    real, total = held_out.real, 0.0
    for k in range(held_out.nets):
        fitted = fit(data, config, seed=derive_seed(seed, "check", k))
        total += accuracy(fitted.net, real.images, real.labels, pixels=held_out.whitening)
    return total / held_out.nets


@torch.no_grad()
def label_temperature(
    pool: OnlinePool, x: Tensor, y: Tensor, held_out: HeldOut, *, ridge: float, weights: Tensor | None = None
) -> float:
    """Fit the temperature of softmax(y / temperature) for regression labels y.

    A student that learns these by cross-entropy has about the regression's predictions over the temperature as its
    logits. So the temperature is the one at which kernel ridge regressions on the features of the pool's networks,
    which were trained a few steps on the set, have the least cross-entropy on held-out images; no student is trained.

    Args:
        pool: networks that were trained a few steps on the set.
        x: (n, 3, S, S) whitened images.
        y: (n, C) regression labels.
        held_out: images that are predicted.
        ridge: see `solve_ridge`.
        weights: (n,) of the images in the regression.
    """
    real, predictions = held_out.real, []
    for i in range(len(pool.members)):
        with pool.features(i) as features:
            support = torch.cat([features(part) for part in x.split(AT_ONCE)])
            solution = solve_ridge(support, y, ridge=ridge, weights=weights)
            for part in real.images.split(AT_ONCE):
                predictions.append(predict(solution, support, features(held_out.whitening(part.to(x.device)))))
    return fit_temperature(torch.cat(predictions), real.labels.repeat(len(pool.members)))
