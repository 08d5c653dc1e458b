"""Selection rules of images of every class on features, scores and cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dq.core.errors import InputError
from dq.core.seeds import generator

SIMILARITY_BYTES = 1 << 30  # of a matrix of similarities that is held; rows of a larger one are computed when needed
EVALUATED_ROWS = 512  # candidates that are evaluated at once, at most ...
FIRST_ROWS = 16  # ... and first of all in a step
BOUNDARY_SHARE = 0.2  # of a class that is near the decision boundary: the upper end of BPS's 10 to 20 %
MIXTURE_POINTS = 10  # entropies that two Gaussians are fitted to, at least


def random_rows(labels: np.ndarray, ipc: int, seed: int) -> np.ndarray:
    """Draw a stratified random subset without replacement.

    Rows are `ipc` of every class, in class order. A class with fewer than `ipc` images gives all that it has, as a
    distilled set of that size does. Another seed draws another subset; the draw within a class depends on nothing but
    the seed, the class and its size.

    Args:
        labels: (n,) class indices.
        ipc: images per class.
        seed: of the draw.

    Returns:
        (rows,) int64, ascending within each class.
    """
    if ipc < 1:
        raise InputError(f"a random subset needs at least 1 image per class, not {ipc}")
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        order = torch.randperm(len(rows), generator=generator(seed, "random rows", int(label)))
        chosen.append(np.sort(rows[order[:ipc].numpy()]))
    return np.concatenate(chosen).astype(np.int64)


def herding_rows(features: Tensor, labels: np.ndarray, ipc: int) -> np.ndarray:
    """Select a greedy coreset whose mean approximates the class mean (herding).

    Welling 2009; as in iCaRL, without replacement. Pick t of a class minimizes |mu - (f_1 + ... + f_{t-1} + f) / t|
    over the points f not yet picked; ties go to the lowest row. A class with fewer than `ipc` images gives all that it
    has.

    Args:
        features: (n, d) float, the space in which images are compared.
        labels: (n,) class indices.
        ipc: images per class.

    Returns:
        (rows,) int64 in class order, within a class in the order of picking.
    """
    chosen = []
    for _, rows, x in centered_classes(features, labels, ipc):
        square = x.square().sum(1)
        total = torch.zeros_like(x[0])
        free = torch.zeros_like(square)  # infinite where a point is taken
        for _ in range(min(ipc, len(rows))):
            # x is centered, so |mu - (total + f) / t| is |total + f| / t; |total|^2 is the same for all
            pick = int((square + 2 * (x @ total) + free).argmin())
            free[pick] = torch.inf
            total = total + x[pick]
            chosen.append(rows[pick])
    return np.array(chosen, np.int64)


def k_center_rows(features: Tensor, labels: np.ndarray, ipc: int) -> np.ndarray:
    """Select the greedy solution of the k-center problem in every class (Gonzalez 1985).

    For coresets by Sener & Savarese 2018. Its covering radius is at most twice the smallest possible one. The first
    center is the point nearest to the class mean, every further one the point farthest from the centers so far; ties
    go to the lowest row. Arguments and result as for `herding_rows`.
    """
    chosen = []
    for _, rows, x in centered_classes(features, labels, ipc):
        pick = int(x.square().sum(1).argmin())
        distance = torch.full_like(x[:, 0], torch.inf)
        for _ in range(min(ipc, len(rows))):
            chosen.append(rows[pick])
            # a center is below every distance, so that copies of it are picked before it is picked again
            distance = torch.minimum(distance, (x - x[pick]).square().sum(1))
            distance[pick] = -1
            pick = int(distance.argmax())
    return np.array(chosen, np.int64)


def facility_location(
    points: Tensor,
    k: int,
    *,
    weights: Tensor | None = None,
    candidates: Tensor | None = None,
    quotas: tuple[Tensor, Sequence[int]] | None = None,
    name: str = "the data",
) -> np.ndarray:
    """Maximize the facility location function greedily.

    Wei et al. 2015, "Submodularity in data subset selection":

        F(A) = sum_i w_i max_{j in A} max(0, cos(points_i, candidates_j))

    Greedy picks reach (1 - 1/e) of the optimum (Nemhauser et al. 1978). Evaluation is lazy (Minoux 1978): gains never
    grow, so that an earlier gain bounds the present one, and only candidates whose bound exceeds the best gain are
    evaluated. Cosines are rounded to float32 and gains summed in float64 in a fixed order, in which rounding
    keeps gains from growing too: picks equal those of plain greedy evaluation. Ties go to the lowest row. A vector of
    length 0 has similarity 0.

    Args:
        points: (n, d) float, which are to be covered.
        k: number of picks; fewer candidates give all that there are.
        weights: (n,) non-negative weights w of the points; None: 1.
        candidates: (m, d) float, which may be picked; None: the points themselves.
        quotas: group (m,) int64 of every candidate, and how many of each group may be picked; None: any. Greedy picks
            reach half of the optimum then (Fisher et al. 1978).
        name: how messages name the points, e.g. "class 3".

    Returns:
        (min(k, m),) int64 rows of the candidates in the order of picking, or as many as the quotas allow.

    Raises:
        InputError: for values that are NaN or infinite, other shapes, or weights that are negative or all zero.
    """
    if k < 1:
        raise InputError(f"a selection needs at least 1 image per class, not {k}")
    x = _directions(points, name)
    c = x if candidates is None else _directions(candidates, f"the candidates of {name}")
    if c.shape[1] != x.shape[1]:
        raise InputError(
            f"candidates of {name} have {c.shape[1]} features and the points {x.shape[1]}; give those of one network"
        )
    w = np.ones(len(x)) if weights is None else weights.detach().cpu().double().numpy()
    if w.shape != (len(x),) or not (np.isfinite(w).all() and (w >= 0).all() and w.any()):
        raise InputError(f"weights of {name} must be ({len(x)},), finite, non-negative and not all zero")

    def similarities(rows: np.ndarray) -> np.ndarray:
        return (c[rows] @ x.T).clip(0).astype(np.float32)

    groups, limits = np.arange(len(c)), np.ones(len(c), np.int64)
    if quotas is not None:
        groups, limits = quotas[0].cpu().numpy(), np.asarray(quotas[1], np.int64)
    k = min(k, int(np.minimum(np.bincount(groups, minlength=len(limits)), limits).sum()))
    if 4 * len(c) * len(x) > SIMILARITY_BYTES:
        return _lazy_greedy(similarities, w, groups, limits, k)
    blocks = np.array_split(np.arange(len(c)), -(-len(c) // EVALUATED_ROWS))
    matrix = np.concatenate([similarities(rows) for rows in blocks])
    return _lazy_greedy(lambda rows: matrix[rows], w, groups, limits, k)


def _lazy_greedy(
    similarities: Callable[[np.ndarray], np.ndarray],
    weights: np.ndarray,
    groups: np.ndarray,
    quotas: np.ndarray,
    k: int,
) -> np.ndarray:
    """The k picks of `facility_location`, at most `quotas` (g,) of every group.

    `similarities` gives rows (b, n) float32 of the similarity matrix.
    """
    candidates, left = len(groups), quotas.copy()
    cover = np.zeros(len(weights), np.float32)  # similarity of each point to its nearest pick
    bounds = np.full(candidates, np.inf)
    picks = np.empty(k, np.int64)
    for t in range(k):
        stale = left[groups] > 0
        stale[picks[:t]] = False
        best, best_gain, size = candidates, -np.inf, FIRST_ROWS
        while True:
            rows = np.flatnonzero(stale & (bounds >= best_gain))
            rows = rows[(bounds[rows] > best_gain) | (rows < best)]  # of equal gains the lowest row wins
            if not len(rows):
                break
            # the largest bounds first, in growing blocks: one block evaluates many candidates at once
            rows = rows[np.argsort(-bounds[rows], kind="stable")[:size]]
            size = min(2 * size, EVALUATED_ROWS)
            gains = (np.maximum(similarities(rows) - cover, 0) * weights).sum(1)
            bounds[rows], stale[rows] = gains, False
            gain = gains.max()
            row = rows[gains == gain].min()
            if gain > best_gain or (gain == best_gain and row < best):
                best, best_gain = int(row), float(gain)
        picks[t] = best
        left[groups[best]] -= 1
        cover = np.maximum(cover, similarities(picks[t : t + 1])[0])
    return picks


def _directions(x: Tensor, name: str) -> np.ndarray:
    """Rows of x (n, d) divided by their lengths, float64; rows of length 0 stay."""
    if x.ndim != 2 or not x.numel():
        raise InputError(f"features of {name} must be a non-empty (n, d) array, not {tuple(x.shape)}")
    x = x.detach().cpu().double()
    bad = (~torch.isfinite(x)).any(1).nonzero()
    if len(bad):
        raise InputError(
            f"features of {name} have NaN or infinite values, first in row {int(bad[0])}; make them again"
        )
    x = x / x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)  # squares of large values overflow
    return (x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)).numpy()


def facility_rows(features: Tensor, labels: np.ndarray, ipc: int, weights: Tensor | None = None) -> np.ndarray:
    """Select images of every class by greedy facility location; see `facility_location`.

    Args:
        features: (n, d) float, of a network; compared by their cosines.
        labels: (n,) class indices.
        ipc: images per class; a class with fewer gives all that it has.
        weights: (n,) non-negative weights of the images, such as their difficulty; None: 1.

    Returns:
        (rows,) int64 in class order, within a class in the order of picking.
    """
    if weights is not None and weights.shape != (len(labels),):
        raise InputError(f"weights must be ({len(labels)},), one per label, not {tuple(weights.shape)}")
    chosen = []
    for label, rows, x in _classes(features, labels, ipc):
        w = None if weights is None else weights[torch.from_numpy(rows)]
        chosen.append(rows[facility_location(x, ipc, weights=w, name=f"class {label}")])
    return np.concatenate(chosen)


def window_rows(scores: Tensor, labels: np.ndarray, ipc: int, start: float = 0.5) -> np.ndarray:
    """Select `ipc` images of neighboring difficulty in every class.

    Of n images from easy to hard, round(start (n - ipc)) stay before the window: 0 takes the easiest, 1 the hardest.
    Windows of EL2N are due to Paul et al. (2021, arXiv 2107.07075), who train on all sizes; here the size is the ipc.

    Args:
        scores: (n,) difficulty, larger is harder; of equal ones the lowest row counts as the harder.
        labels: (n,) class indices.
        ipc: images per class; a class with fewer gives all that it has.
        start: in [0, 1].

    Returns:
        (rows,) int64 in class order, within a class from hard to easy.
    """
    if not 0 <= start <= 1:
        raise InputError(f"a window starts at a share in [0, 1] of the images from easy to hard, not {start:g}")
    chosen = []
    for rows, values in _scored_classes(scores, labels, ipc):
        size = min(ipc, len(rows))
        first = len(rows) - size - round(start * (len(rows) - size))
        chosen.append(rows[np.argsort(-values, kind="stable")[first : first + size]])
    return np.concatenate(chosen)


def median_rows(scores: Tensor, labels: np.ndarray, ipc: int) -> np.ndarray:
    """Select the images of every class whose scores are nearest to the median.

    The nearest is first. With a teacher's probabilities of the class these are images of median confidence. Ties go to
    the lowest row; other arguments and result as for `herding_rows`.
    """
    chosen = []
    for rows, values in _scored_classes(scores, labels, ipc):
        chosen.append(rows[np.argsort(np.abs(values - np.median(values)), kind="stable")[:ipc]])
    return np.concatenate(chosen)


def largest_remainder(masses: np.ndarray, total: int) -> np.ndarray:
    """Divide a total into whole numbers in proportion to masses (Hamilton's method).

    Numbers are (k,) int64 for masses (k,). Of equal remainders the first is rounded up.

    Raises:
        InputError: for masses that are negative, not finite or all zero, or a negative total.
    """
    masses = np.asarray(masses)
    if masses.ndim != 1 or not (np.isfinite(masses).all() and (masses >= 0).all() and masses.any()):
        raise InputError("masses to share by must be a list of numbers: finite, non-negative and not all zero")
    if total < 0:
        raise InputError(f"a total to share must be at least 0, not {total}")
    shares, remainders = np.divmod(total * masses, masses.sum())
    numbers = shares.astype(np.int64)
    numbers[np.argsort(-remainders, kind="stable")[: total - numbers.sum()]] += 1
    return numbers


def boundary_band(entropy: np.ndarray, share: float = BOUNDARY_SHARE) -> tuple[float, float]:
    """Return the range of entropies of images near the decision boundary, without noise.

    The highest `share` of the entropies is described by a mixture of two Gaussians; the band reaches from the lower
    mean to where the weighted densities cross. Without two components, as for equal entropies or fewer than
    `MIXTURE_POINTS`, nothing counts as noise.

    Args:
        entropy: (n,) of a teacher's predictions for the images of one class.
        share: of the class that is near the boundary.
    """
    top = np.sort(entropy)[-max(1, math.ceil(share * len(entropy))) :]
    full_range = float(top[0]), float(top[-1])
    spread = float(top.std())
    if len(top) < MIXTURE_POINTS or spread <= 1e-9 * max(1.0, full_range[1]):
        return full_range
    from sklearn.mixture import GaussianMixture

    scaled = (top - top.mean()) / spread
    mixture = GaussianMixture(2, max_iter=500, random_state=0).fit(scaled[:, None])
    low, high = np.argsort(mixture.means_[:, 0])
    (m, n), (v, u) = mixture.means_[[low, high], 0], mixture.covariances_[[low, high], 0, 0]
    log_ratio = np.log(mixture.weights_[low] / mixture.weights_[high]) - 0.5 * np.log(v / u)
    # log of the ratio of the weighted densities, a polynomial of the entropy
    roots = np.roots([0.5 / u - 0.5 / v, m / v - n / u, log_ratio - 0.5 * m**2 / v + 0.5 * n**2 / u])
    between = [float(r.real) for r in roots if abs(r.imag) < 1e-9 and m < r.real < n]
    crossing = min(between, default=float(n))
    return float(m * spread + top.mean()), float(crossing * spread + top.mean())


def boundary_prototype_rows(
    labels: np.ndarray, ipc: int, *, cells: np.ndarray, distances: np.ndarray, entropy: np.ndarray
) -> np.ndarray:
    """Select prototypes and boundary images of every cell of every class (after BPS).

    Cells share the images in proportion to their masses (`largest_remainder`). Half of a cell's share, rounded up, is
    nearest to its center; the other half has the highest entropy in the class's `boundary_band`. A cell with too few
    images in the band continues with the highest entropies below it, then with the lowest above it.

    The paper's cells are communities of a graph, and its order of the images near the boundary is not available.

    Args:
        labels: (n,) class indices.
        ipc: images per class; a class with fewer gives all that it has.
        cells: (n,) index of the cell of each image within its class, from 0.
        distances: (n,) of each image to the center of its cell.
        entropy: (n,) of a teacher's predictions.

    Returns:
        (rows,) int64 in class order, within a class by cells, prototypes first.
    """
    chosen = []
    for rows, values in _scored_classes(torch.as_tensor(entropy), labels, ipc):
        band = boundary_band(values)
        budgets = largest_remainder(np.bincount(cells[rows]), min(ipc, len(rows)))
        for cell, budget in enumerate(budgets.tolist()):
            inside = np.flatnonzero(cells[rows] == cell)
            near = inside[np.argsort(distances[rows[inside]], kind="stable")]
            prototypes, others = near[: budget - budget // 2], near[budget - budget // 2 :]
            noisy = values[others] > band[1]
            order = np.lexsort((others, np.where(noisy, values[others], -values[others]), noisy))
            chosen.append(rows[np.concatenate([prototypes, others[order[: budget // 2]]])])
    return np.concatenate(chosen)


def _scored_classes(scores: Tensor, labels: np.ndarray, ipc: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of every class its rows (n,) and scores (n,) float64."""
    if scores.shape != (len(labels),):
        raise InputError(f"scores must be ({len(labels)},), one per label, not {tuple(scores.shape)}")
    for _, rows, values in _classes(scores[:, None], labels, ipc, "scores"):
        yield rows, values[:, 0].numpy()


def centered_classes(features: Tensor, labels: np.ndarray, ipc: int) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """Yield index, rows and features (n, d) of every class, float64 with mean zero."""
    for label, rows, x in _classes(features, labels, ipc):
        yield label, rows, x - x.mean(0)


def _classes(
    features: Tensor, labels: np.ndarray, ipc: int, what: str = "features"
) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """Of every class: its index, its rows, and its features (n, d) as float64."""
    if ipc < 1:
        raise InputError(f"a selection needs at least 1 image per class, not {ipc}")
    if features.ndim != 2 or len(features) != len(labels):
        raise InputError(f"features must be ({len(labels)}, d), a row per label, not {tuple(features.shape)}")
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        x = features[torch.from_numpy(rows)].detach().cpu().double()
        bad = (~torch.isfinite(x)).any(1).nonzero()
        if len(bad):
            raise InputError(f"{what} have NaN or infinite values, first in row {rows[int(bad[0])]}; make them again")
        yield int(label), rows, x
