"""Kernel ridge regression on last-layer features, its loss and its gradient.

The inner problem of FRePo (Zhou, Nezhadarya and Ba, "Dataset Distillation using Neural Feature Regression", NeurIPS
2022, arXiv 2206.00719; constants of the released code). Gram matrix, factorization and solve are in float64 whatever
the networks compute in: post-ReLU features share one large direction, so that a relative ridge of 1e-6 is close to
float32's rounding, and copies of an image make float32's factorization fail.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.core.errors import RunError

log = logging.getLogger("dq")

RIDGE = 1e-6  # of the mean diagonal of the Gram matrix
SMALLEST_RETRY = 1e-9  # first ridge that is tried after a ridge of 0
LARGEST_RIDGE = 1e-3  # at which retries end; then eigenvalues are clipped
DUPLICATE_COSINE = 0.9999  # of centered features, from which two images count as copies
DUPLICATE_ROWS = 1024  # rows of the matrix of cosines at once


@dataclass(frozen=True)
class Solution:
    """A ridge regression in the space of its samples."""

    dual: Tensor  # (n, C) float64: A^-1 Y
    ridge: float  # that was used: the one asked for, or a larger one where the factorization failed
    condition: Tensor  # () float64: (largest / smallest pivot)^2 of the Cholesky factor, at most the condition of A


def solve_ridge(features: Tensor, targets: Tensor, *, ridge: float = RIDGE, weights: Tensor | None = None) -> Solution:
    """Solve the kernel ridge regression A a = Y, A = F F^T + ridge s diag(1 / w).

    Here s is the weighted mean of the diagonal of F F^T. The same predictor as
    min_W sum_i w_i |f_i W - y_i|^2 + ridge s |W|^2 (W = F^T a), for n < d and n > d. Without weights s is the trace
    over n, as in the released code; the weighted mean makes an image of weight 2 the same as the image given twice.
    Gradients flow through s as well. If the factorization fails, the ridge grows tenfold up to 1e-3, and then the
    eigenvalues are clipped from below; both are logged.

    Args:
        features: (n, d) float.
        targets: (n, C) float.
        ridge: relative to s; 0 gives the least-norm interpolation where it exists.
        weights: (n,) positive; None: all 1.

    Raises:
        RunError: if features or targets are not finite.
    """
    finite = torch.isfinite(features.detach()).all() & torch.isfinite(targets.detach()).all()
    f, y = features.double(), targets.double()
    gram = f @ f.T
    diagonal = gram.diagonal()
    if weights is None:
        scale, inverse = diagonal.mean(), torch.ones_like(diagonal)
    else:
        w = weights.to(diagonal)
        scale, inverse = (w * diagonal).sum() / w.sum(), 1 / w
    used = ridge
    while used <= LARGEST_RIDGE * (1 + 1e-9) or used == ridge:
        a = gram + torch.diag(used * scale * inverse)
        factor, info = torch.linalg.cholesky_ex(a)
        usable, factored = torch.stack([finite, info == 0]).tolist()  # one wait for the device
        if not usable:
            raise RunError(
                "the features or the labels of a ridge regression are not finite numbers; lower the learning rate of "
                "the networks or of the images"
            )
        if factored:
            if used != ridge:
                log.warning("note: a ridge of %g leaves a singular kernel; %g is used", ridge, used)
            pivots = factor.detach().diagonal()
            return Solution(torch.cholesky_solve(y, factor), used, (pivots.max() / pivots.min()).square())
        used = max(10 * used, SMALLEST_RETRY)
    log.warning("note: the kernel stays singular with a ridge of %g; its eigenvalues are clipped", LARGEST_RIDGE)
    return _clipped(gram + torch.diag(LARGEST_RIDGE * scale * inverse), y)


def _clipped(a: Tensor, y: Tensor) -> Solution:
    """Solve with the eigenvalues of A raised to a share of the largest.

    What is added counts as a constant, since the gradient of eigenvectors does not exist where eigenvalues coincide.
    """
    values, vectors = torch.linalg.eigh(a.detach())
    top = float(values[-1])
    floor = LARGEST_RIDGE * top if top > 0 else 1.0  # all features zero: any number gives the prediction 0
    raised = values.clamp(min=floor)
    a = a + (vectors * (raised - values)) @ vectors.T
    factor = torch.linalg.cholesky(a)
    pivots = factor.detach().diagonal()
    return Solution(torch.cholesky_solve(y, factor), LARGEST_RIDGE, (pivots.max() / pivots.min()).square())


def predict(solution: Solution, support: Tensor, queries: Tensor) -> Tensor:
    """Predictions (B, C) float64 for features `queries` (B, d) from `support` (n, d)."""
    # K_ts a as F_t (F_s^T a): (B + n) d C products, not B n d
    return queries.double() @ (support.double().T @ solution.dual)


def krr_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean over images of half the squared error of (B, C), summed over classes."""
    return 0.5 * (predictions - targets).square().sum(1).mean()


def temperature_cross_entropy(predictions: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of softmax(predictions / temperature) with the largest targets.

    Both are (B, C). As in CLP-DD (arXiv 2605.07194) and RCIG, which report it better than squared error there.
    """
    return F.cross_entropy(predictions / temperature, targets.argmax(1))


def label_margin(labels: Tensor) -> Tensor:
    """Mean of min(largest - second largest entry, 1/C) of label vectors (n, C).

    The released code maximizes it.
    """
    first, second = labels.topk(2, 1).values.unbind(1)
    return (first - second).clamp(max=1 / labels.shape[1]).mean()


def duplicates(features: Tensor) -> Tensor:
    """Which rows (n,) bool are nearly copies of an earlier one.

    By the cosine of centered features (n, d).
    """
    x = features.double().flatten(1)
    x = F.normalize(x - x.mean(0), dim=1)
    copied = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for start in range(0, len(x), DUPLICATE_ROWS):
        cosines = (x[start : start + DUPLICATE_ROWS] @ x.T).tril(start - 1)  # with earlier rows alone
        copied[start : start + DUPLICATE_ROWS] = (cosines > DUPLICATE_COSINE).any(1)
    # rows that equal the mean have no direction; the second and later of them are copies of the first
    still = (x.abs().sum(1) == 0).nonzero()[1:, 0]
    copied[still] = True
    return copied


@dataclass(frozen=True)
class MetaGradient:
    """Loss and gradients of one step on the distilled set."""

    images: Tensor | None  # (n, ...) gradient, of latents where these are learned; None if neither is
    labels: Tensor  # (n, C) gradient
    krr: Tensor  # () loss on the real batch
    margin: Tensor  # () mean label margin, at most 1/C
    condition: Tensor  # () see `Solution`
    ridge: float  # that was used


@dataclass(frozen=True)
class Objective:
    """The loss outer_loss - margin_weight label_margin and its computation."""

    chunk: int | None = None  # images whose activations are held at once; None: all
    flip: bool = False  # regress on the images and their mirror images, with the same labels
    margin_weight: float = 1.0
    ridge: float = RIDGE
    weights: Tensor | None = None  # (n,) of the images in the regression; None: all alike
    learn_images: bool = True  # False leaves out the gradient of the images, and with it the second pass
    # from what is learned, such as latents (m, C, h, w), to images as the network sees them, (m, 3, S, S), which are
    # what is mirrored; the gradient goes through it. None: images are learned
    render: Callable[[Tensor], Tensor] | None = None
    outer_loss: Callable[[Tensor, Tensor], Tensor] = krr_loss  # of predictions and targets (B, C), a mean over B


def meta_gradient(
    features_of: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    real_features: Tensor,
    real_targets: Tensor,
    objective: Objective | None = None,
) -> MetaGradient:
    """Compute the gradients of FRePo's loss with respect to distilled images and labels.

    With chunks, features are computed without a graph, the regression gives their gradient, and every chunk is
    computed once more with a graph to carry its rows back: the same gradient up to rounding, with the activations of
    one chunk in memory. That is exact since `features_of` and `render` treat every image by itself.

    Args:
        features_of: images (m, ...) to features (m, d), each row from its image alone, such as a network in evaluation
            mode.
        images: (n, ...) distilled images as the network sees them, or what `render` makes them from.
        labels: (n, C) learned labels.
        real_features: (B, d) of the real batch, without a graph.
        real_targets: (B, C), see `centered_targets`.
        objective: the loss; None: its defaults.

    Raises:
        RunError: if features or labels are not finite.
    """
    o = objective or Objective()
    spans = _spans(len(images), o.chunk)
    one_pass = o.learn_images and len(spans) == 1
    leaf = images.detach().requires_grad_(True)
    with torch.set_grad_enabled(one_pass):
        parts = [_support(features_of, leaf[a:b], o) for a, b in spans]
        support = parts[0] if one_pass else torch.cat(parts, 1).detach().requires_grad_(o.learn_images)
    y = labels.detach().requires_grad_(True)
    with torch.enable_grad():
        solution, krr, margin = _regress(support, y, real_features, real_targets, o)
        loss = krr - o.margin_weight * margin.double()
    gradient = None
    if not o.learn_images:
        (dy,) = torch.autograd.grad(loss, [y])
    elif one_pass:
        gradient, dy = torch.autograd.grad(loss, [leaf, y])
    else:
        rows, dy = torch.autograd.grad(loss, [support, y])  # rows: (copies, n, d)
        gradient = torch.empty_like(images)
        for a, b in spans:
            part = images[a:b].detach().requires_grad_(True)
            with torch.enable_grad():
                again = _support(features_of, part, o)
            (gradient[a:b],) = torch.autograd.grad(again, [part], rows[:, a:b])
    return MetaGradient(gradient, dy, krr.detach(), margin.detach(), solution.condition, solution.ridge)


def _support(features_of: Callable[[Tensor], Tensor], values: Tensor, o: Objective) -> Tensor:
    """Features (1 or 2, m, d) of images, and of their mirror images."""
    x = values if o.render is None else o.render(values)
    return features_of(torch.cat([x, x.flip(-1)])).unflatten(0, (2, -1)) if o.flip else features_of(x)[None]


def _regress(
    support: Tensor, y: Tensor, real_features: Tensor, real_targets: Tensor, o: Objective
) -> tuple[Solution, Tensor, Tensor]:
    """Regression from the support (copies, n, d), its loss and label margin."""
    copies = len(support)
    support = support.flatten(0, 1)  # (copies n, d)
    weights = None if o.weights is None else o.weights.repeat(copies)
    solution = solve_ridge(support, y.repeat(copies, 1), ridge=o.ridge, weights=weights)
    krr = o.outer_loss(predict(solution, support, real_features.detach()), real_targets.double())
    return solution, krr, label_margin(y)


def _spans(n: int, chunk: int | None) -> Sequence[tuple[int, int]]:
    step = chunk or n
    return [(a, min(a + step, n)) for a in range(0, n, step)]
