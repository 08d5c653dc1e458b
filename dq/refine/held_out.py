"""Choosing among stages of a set by networks trained on it and tested on train images that were held out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dq.config.protocols import student_config
from dq.config.students import StudentConfig
from dq.core.errors import InputError
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


def split_off(real: RealImages, share: float) -> tuple[RealImages, RealImages]:
    """Train images without a stratified share of them, and that share.

    Raises:
        InputError: if too few would be left.
    """
    number = max(1, round(share * len(real.labels)))
    if number >= len(real.labels) - len(real.labels.unique()):
        raise InputError(
            f"{len(real.labels)} train images are too few to hold out any for checks; set checks=0 and leave "
            "fit_temperature out"
        )
    held = torch.zeros(len(real.labels), dtype=torch.bool)
    held[torch.from_numpy(validation_rows(real.labels.numpy(), number))] = True
    return divide(real, held)


def divide(real: RealImages, held: Tensor) -> tuple[RealImages, RealImages]:
    """Train images without those that `held` (N,) bool names, and these."""
    return RealImages(real.images[~held], real.labels[~held]), RealImages(real.images[held], real.labels[held])


def check_steps(steps: int, checks: int) -> set[int]:
    """After how many of `steps` steps a set is tested, `checks` times evenly spread, the last step included."""
    return {-(-steps * i // checks) for i in range(1, checks + 1)}


def record_check(facts: dict[str, Any], steps: int, score: float) -> bool:
    """Add the accuracy of a check to `facts["checks"]`; whether it is the best so far."""
    earlier = facts.get("checks", [])
    facts["checks"] = [*earlier, [steps, round(score, 5)]]
    return score > max((s for _, s in earlier), default=-1.0)


def held_out_accuracy(
    x: Tensor, y: Tensor, held: RealImages, whitening: Whitening, *, net: str, classes: int, nets: int, seed: int
) -> float:
    """Mean accuracy on held-out images of fresh networks trained on a set as the protocol `frepo` trains them.

    Args:
        x: (n, 3, S, S) whitened images.
        y: (n, C) regression labels.
        net: their architecture.
        nets: how many.
    """
    spec = {"protocol": "frepo", "net": net, "augment": "frepo_noflip" if is_gray(held.images) else "frepo"}
    ipc = max(1, round(len(x) / classes))
    config = student_config(spec, ipc=str(ipc), classes=classes, image_size=x.shape[-1])
    return mean_accuracy(x, y, held, whitening, config, nets=nets, seed=seed)


def classic_accuracy(
    x: Tensor,
    logits: Tensor,
    held: RealImages,
    whitening: Whitening,
    *,
    net: str,
    epochs: int,
    augment: str,
    lr: float | None = None,
    nets: int,
    seed: int,
) -> float:
    """Mean accuracy on held-out images of fresh networks trained on a set as the protocol `classic` trains them.

    Args:
        x: (n, 3, S, S) images as networks see them.
        logits: (n, C) of their labels.
        net: architecture of the networks.
        lr: their learning rate; None: the protocol's.
        nets: how many.
    """
    spec: dict[str, Any] = {"protocol": "classic", "net": net, "labels": "fixed", "augment": augment}
    spec |= {"epochs": epochs, "dtype": "float32"} | ({} if lr is None else {"lr": lr})
    classes = logits.shape[1]
    ipc = max(1, round(len(x) / classes))
    config = student_config(spec, ipc=str(ipc), classes=classes, image_size=x.shape[-1])
    return mean_accuracy(x, logits, held, whitening, config, nets=nets, seed=seed)


def mean_accuracy(
    x: Tensor, y: Tensor, held: RealImages, whitening: Whitening, config: StudentConfig, *, nets: int, seed: int
) -> float:
    """Mean accuracy on held-out images of fresh networks trained on a set with the settings of a student.

    Args:
        x: (n, 3, S, S) whitened images.
        y: (n, C) label vectors.
        nets: how many.
    """
    data = TrainingSet(x, y.argmax(1), y.shape[1], lambda images: images, soft_labels=y)
    total = 0.0
    for k in range(nets):
        fitted = fit(data, config, seed=derive_seed(seed, "check", k))
        total += accuracy(fitted.net, held.images, held.labels, pixels=whitening)
    return total / nets


@torch.no_grad()
def label_temperature(
    pool: OnlinePool,
    x: Tensor,
    y: Tensor,
    held: RealImages,
    whitening: Whitening,
    *,
    ridge: float,
    weights: Tensor | None = None,
) -> float:
    """Temperature that turns a set's regression labels y into the probabilities softmax(y / temperature).

    A student that learns these by cross-entropy has about the regression's predictions over the temperature as its
    logits. So the temperature is the one at which kernel ridge regressions on the features of the pool's networks,
    which were trained a few steps on the set, have the least cross-entropy on held-out images; no student is trained.

    Args:
        x: (n, 3, S, S) whitened images.
        y: (n, C) regression labels.
        weights: (n,) of the images in the regression.
    """
    predictions = []
    for i in range(len(pool.members)):
        with pool.features(i) as features:
            support = torch.cat([features(part) for part in x.split(AT_ONCE)])
            solution = solve_ridge(support, y, ridge=ridge, weights=weights)
            for part in held.images.split(AT_ONCE):
                predictions.append(predict(solution, support, features(whitening(part.to(x.device)))))
    return fit_temperature(torch.cat(predictions), held.labels.repeat(len(pool.members)))
