"""Students: training on a small labeled set, tests on real images."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dq.config.students import StudentConfig
from dq.core.errors import InputError
from dq.data.regression_labels import (
    centered_targets,
    first_labels,
    labels_to_probabilities,
    probabilities_to_labels,
)
from dq.data.splits import resized
from dq.data.zca import same_whitening
from dq.distilled.set import DistilledSet
from dq.networks.real_data import RealData
from dq.networks.teacher import evaluation_mode, head_inputs
from dq.networks.training import Checkpoint, Pixels, TargetSource, TrainingSet, accuracy, fit
from dq.refine.ridge import predict, solve_ridge

KRR_BATCH = 500  # images at once


@dataclass(frozen=True)
class StudentResult:
    """Accuracies of a student, as fractions of the test images."""

    last: float  # after the last epoch: the number to report
    best: float  # of the epoch that was best where `selected_on` says
    best_epoch: int  # the first that was best, counted from 1
    selected_on: str  # validation; test: chosen on the test images, so optimistic (most papers); none: the last epoch
    looks: tuple[tuple[int, float], ...]  # (epochs trained, accuracy there), ascending, the last epoch included
    train_seconds: float  # without the looks
    krr: float | None = None  # of a ridge regression on the last features and the label vectors, with loss=mse


@dataclass(frozen=True)
class RealImages:
    """Real images (M, 3, S, S) and labels (M,) to evaluate on."""

    test: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor] | None = None  # to choose an epoch by


def train_student(
    data: TrainingSet,
    config: StudentConfig,
    real: RealImages,
    *,
    seed: int,
    bounded: bool = True,
    on_epoch: Callable[[int, float], None] | None = None,
    checkpoint: Path | None = None,
) -> StudentResult:
    """Train a freshly initialized student on weighted images and test it.

    The test images are used once, at the end: for the last parameters, and for those of the epoch that was best on
    the validation images if `config.tests` > 1. With `config.select: test` all evaluations are on the test images, as
    in most published code.

    Args:
        data: what it learns from. Everything happens on the device of its images.
        config: network, recipe and evaluations.
        real: images to evaluate on, of the size of those of `data`.
        seed: of this student.
        bounded: float images lie in [0, 1]; False for images of methods that do not keep them there.
        on_epoch: called with the number of epochs done and the mean training loss of the last one.
        checkpoint: file from which a killed training goes on, written about once a minute. It stays: delete it once
            the result is safe. It records images, labels, weights, settings and seed, not a source of label epochs.

    Raises:
        InputError: if tensors or settings do not fit together.
        RunError: if the loss is not a finite number.
    """
    _check(data, config, real, bounded)
    device, test = data.images.device, real.test
    watched = {"test": test, "validation": real.validation}[config.select] if config.tests > 1 else None
    if watched is None and config.tests > 1:
        raise InputError(
            f"student {config.net!r} chooses its best of {config.tests} evaluations on validation images but there "
            "are none; set evaluate.validation_images, or tests=1"
        )

    def score(net: nn.Module, images: tuple[Tensor, Tensor]) -> float:
        return accuracy(net, *images, pixels=data.pixels, dtype=config.dtype)

    fitted = fit(
        dataclasses.replace(data, labels=data.labels.to(device, torch.int64)),
        config,
        seed=seed,
        evaluate=None if watched is None else lambda net, epoch: score(net, watched),
        on_epoch=on_epoch,
        checkpoint=None if checkpoint is None else Checkpoint(checkpoint),
    )
    last = score(fitted.net, test)
    krr = None
    if config.loss == "mse" and isinstance(data.soft_labels, Tensor):
        krr = krr_accuracy(fitted.net, data.images, data.soft_labels.to(device), test, pixels=data.pixels)
    if watched is None:
        return StudentResult(last, last, config.epochs, "none", (), fitted.seconds, krr)
    best_epoch, best = max(fitted.scores, key=lambda t: t[1])
    if config.select == "validation":
        fitted.net.load_state_dict(fitted.best_state)
        best = last if best_epoch == config.epochs else score(fitted.net, test)
    return StudentResult(last, best, best_epoch, config.select, fitted.scores, fitted.seconds, krr)


@torch.no_grad()
def krr_accuracy(
    net: nn.Module, images: Tensor, targets: Tensor, test: tuple[Tensor, Tensor], *, pixels: Pixels
) -> float:
    """Accuracy of FRePo's kernel ridge regression on a network's last features.

    The distilled set is the support, and the prediction of a test image its largest output.

    Args:
        net: trained network.
        images: (N, 3, S, S) on the network's device, uint8 or float.
        targets: (N, C) regression labels.
        test: images and labels.
        pixels: what is done to images before the network.
    """
    with evaluation_mode(net), head_inputs(net) as seen:

        def features(x: Tensor) -> Tensor:
            seen.clear()
            net(pixels(x.to(images.device)))
            return seen.pop().flatten(1).float()

        support = torch.cat([features(x) for x in images.split(KRR_BATCH)])
        solution = solve_ridge(support, targets)
        classes = [predict(solution, support, features(x)).argmax(1).cpu() for x in test[0].split(KRR_BATCH)]
    return float((torch.cat(classes) == test[1].cpu()).double().mean())


# --- validation ---------------------------------------------------------------------------------------------------


def _check(data: TrainingSet, config: StudentConfig, real: RealImages, bounded: bool) -> None:
    _check_training(data, config, bounded)
    for kind, pair in (("test", real.test), ("validation", real.validation)):
        if pair is not None:
            _check_pair(kind, *pair, data.num_classes, bounded=bounded)
            _check_sides(data.images, pair[0], kind)


def _check_training(data: TrainingSet, config: StudentConfig, bounded: bool) -> None:
    labels, weights, soft_labels, num_classes = data.labels, data.weights, data.soft_labels, data.num_classes
    _check_pair("training", data.images, labels, num_classes, bounded=bounded)
    check_bounded(bounded, "training", [config])
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


def check_bounded(bounded: bool, name: str, students: Iterable[StudentConfig]) -> None:
    """Refuse RandAugment for pixels outside [0, 1], which it would clip.

    Raises:
        InputError: that names the set and the student.
    """
    for student in students:
        if student.views.rand_augment and not bounded:
            raise InputError(
                f"the set {name!r} has pixels outside [0, 1], but views.rand_augment of student {student.net!r} works "
                "on 8-bit pixels; set views.rand_augment=0"
            )


def _check_sides(images: Tensor, others: Tensor, kind: str) -> None:
    if images.shape[-1] != others.shape[-1]:
        raise InputError(
            f"training images are {images.shape[-1]} px wide but {kind} images {others.shape[-1]} px; "
            "read both at the same size"
        )


def _check_pair(kind: str, images: Tensor, labels: Tensor, num_classes: int, *, bounded: bool = True) -> None:
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or labels.shape != shape[:1] or not len(labels):
        raise InputError(
            f"{kind} images must be (N, 3, S, S) with labels (N,), N > 0, not {shape} and {tuple(labels.shape)}"
        )
    if bounded and images.dtype != torch.uint8 and not (images.min() >= 0 and images.max() <= 1):
        raise InputError(
            f"{kind} images are floats from {float(images.min()):.3g} to {float(images.max()):.3g} but must lie in "
            "[0, 1]; give them as they were before normalization"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"{kind} labels go from {int(labels.min())} to {int(labels.max())} but num_classes is {num_classes}"
        )


log = logging.getLogger("dq")
WHITENINGS = {"mtt": "MTT's ZCA", "frepo": "FRePo's whitening", "standardize": "mean and deviation"}
MIN_PROBABILITY = 1e-7  # below float16, in which label vectors are stored


@dataclass(frozen=True)
class StudentData:
    """Images and labels of a set to train on."""

    images: Tensor  # (N, 3, S, S) uint8 or float32 in [0, 1]
    labels: Tensor  # (N,) int64
    weights: Tensor | None = None  # (N,)
    soft_labels: Tensor | TargetSource | None = None  # (N, C) logits, or a source of label epochs
    bounded: bool = True  # pixels in [0, 1]


def training_data(s: DistilledSet, image_size: int) -> StudentData:
    """A set as training data, at the students' size in px.

    Probabilities become their logarithms.
    """
    images = resized(s.images, image_size, bounded=s.bounded)
    soft = s.soft_labels
    if soft is not None and s.label_kind == "probabilities":
        soft = soft.float().clamp(min=MIN_PROBABILITY).log()
    return StudentData(images, s.labels, s.weights, soft, s.bounded)


def regression_labels(s: DistilledSet) -> Tensor:
    """Regression labels (N, C) for a student with loss=mse.

    A set's regression labels, else its probabilities or logits turned into such, else its classes (FRePo's scaling).
    """
    if s.soft_labels is None:
        return first_labels(centered_targets(s.labels, len(s.class_names)))
    soft = s.soft_labels.float()
    if s.label_kind == "regression":
        return soft
    return probabilities_to_labels(soft if s.label_kind == "probabilities" else soft.softmax(1))


def fixed_labels(s: DistilledSet, data: StudentData, student: StudentConfig) -> Tensor | TargetSource | None:
    """Label vectors (N, C) for a student with labels=fixed.

    None if the set has no label vectors and the loss needs a teacher's. For loss=kl, regression labels are the logits
    labels / temperature, with the set's recorded one.
    """
    if student.loss == "mse":
        return regression_labels(s)
    temperature = recorded_temperature(s)
    if student.loss == "kl" and temperature is not None and s.soft_labels is not None:
        return labels_to_probabilities(s.soft_labels.float(), temperature).clamp(min=MIN_PROBABILITY).log()
    return data.soft_labels


def recorded_temperature(s: DistilledSet) -> float | None:
    """The temperature fitted for a set's regression labels, or None."""
    stages = s.provenance.get("refine") or []
    fitted = [t for r in stages if (t := r.get("summary", {}).get("label_temperature")) is not None]
    return fitted[-1] if fitted and s.label_kind == "regression" else None


def check_whitening(s: DistilledSet, name: str, student: StudentConfig, real_data: RealData) -> None:
    """Refuse a set learned behind the whitening of other images.

    A student that whitens otherwise, or not at all, is a protocol of its own, which is logged.

    Raises:
        InputError: that names the set.
    """
    stages = s.provenance.get("refine") or []
    learned = [w for r in stages if (w := r.get("summary", {}).get("whitening"))]
    if not learned:
        return
    recipe = learned[-1].get("recipe")
    preprocessing = student.zca if student.whiten else "standardize"
    if preprocessing == "frepo" and recipe == "standardize":
        preprocessing = recipe  # FRePo's whitening of gray images is no more than that
    if preprocessing != recipe:
        log.warning(
            "note: the images of %s were learned behind the preprocessing %s, and student %s sees them behind %s",
            *(name, WHITENINGS.get(recipe, recipe), student.net, WHITENINGS[preprocessing]),
        )
    mtt = recipe == "mtt"
    if not student.whiten or mtt != (student.zca == "mtt"):
        return
    whitening = real_data.mtt_whitening() if mtt else real_data.frepo_whitening()
    if not same_whitening(learned[-1], whitening.summary()):
        raise InputError(
            f"the set {name!r} was learned behind the whitening of other images than those of "
            f"{real_data.source.origin}; score it on the data and at the side it was made from, or set whiten=false"
        )


def check_label_kind(s: DistilledSet, name: str, students: Iterable[StudentConfig]) -> None:
    """Refuse label vectors that a student with labels=fixed cannot learn from.

    Raises:
        InputError: that names the set, its kind of labels and the student.
    """
    if s.soft_labels is None:
        return
    fits = {
        "kl": ("logits", "probabilities"),
        "mse": ("regression", "probabilities", "logits"),
        "mse_gt": ("logits", "regression"),
    }
    if recorded_temperature(s) is not None:
        fits["kl"] += ("regression",)
    for student in students:
        if student.labels == "fixed" and s.label_kind not in fits[student.loss]:
            others = " or ".join(loss for loss, kinds in fits.items() if s.label_kind in kinds)
            raise InputError(
                f"the set {name!r} has label_kind={s.label_kind}, which the student {student.net!r} cannot learn from "
                f"with loss={student.loss}; set loss={others}, or labels=hard"
            )
