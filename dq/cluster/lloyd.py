"""Seeding, exact assignment and Lloyd iterations for many classes at once.

Shapes: x (B, n, d) float32, B classes padded to n points; weights (B, n), zero where a row is padding;
centroids (B, k, d). Every function works on any device. One class is the case B = 1. On a CPU the same call gives the
same bits. On CUDA sums over cells are matrix products with a one-hot assignment, never atomic additions, and
cumulative sums are products too, so that nothing depends on the timing of threads; but a batched product may round
differently for another B, so classes in another group agree to rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Elements of the largest temporary (a chunk of the score matrix): 64 MiB in float32.
CHUNK_ELEMENTS = 1 << 24
# Elements of a block of points that is worked on several times and should stay in a core's cache.
CACHED_ELEMENTS = 1 << 18
# Terms of a cumulative sum that one triangular product adds up.
CUMULATIVE_BLOCK = 256
# Size of the multistart.
MULTISTART_STARTS = 4
MULTISTART_MANY = 20
MULTISTART_DIMENSIONS = 64
MULTISTART_POINTS = 2048
MULTISTART_POINTS_PER_CENTROID = 32
MULTISTART_ITERATIONS = 25


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Index (B, n) int64 of the nearest centroid; ties go to the lower.

    argmin_k |x - c_k|^2 = argmax_k <x, c_k> - |c_k|^2 / 2, so that |x|^2 is never needed. Points should be centered:
    the product loses digits under large offsets.
    """
    half = centroids.square().sum(-1).mul_(0.5).unsqueeze(1)  # (B, 1, k)
    step = max(1, CHUNK_ELEMENTS // max(1, centroids.shape[0] * centroids.shape[1]))
    parts = [torch.baddbmm(half, part, centroids.transpose(1, 2), beta=-1).argmax(-1) for part in x.split(step, dim=1)]
    return torch.cat(parts, 1)


def squared_norms(x: Tensor) -> Tensor:
    """|x|^2 over the last axis, without a temporary as large as x."""
    return torch.linalg.vector_norm(x, dim=-1).square_()


def cell_sums(x: Tensor, labels: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weighted sums (B, k, d) of the points of each cell, and weights (B, k)."""
    weights = weights.to(x.dtype)
    sums = x.new_zeros(x.shape[0], k, x.shape[2])
    mass = x.new_zeros(x.shape[0], k)
    step = max(1, CHUNK_ELEMENTS // max(1, x.shape[0] * k))
    parts = zip(x.split(step, 1), labels.split(step, 1), weights.split(step, 1), strict=True)
    for part, label, weight in parts:
        member = torch.zeros(*label.shape, k, dtype=x.dtype, device=x.device)
        member.scatter_(2, label.unsqueeze(2), weight.unsqueeze(2))
        sums.baddbmm_(member.transpose(1, 2), part)
        mass += member.sum(1)
    return sums, mass


def cell_totals(values: Tensor, labels: Tensor, k: int) -> Tensor:
    """Sum of values (n,) over each cell of one class, (k,) float64."""
    column = values.double()[None, :, None]
    return cell_sums(column, labels[None], column[:, :, 0].new_ones(1, len(values)), k)[0][0, :, 0]


def cumulative_sums(values: Tensor) -> Tensor:
    """Cumulative sums along the rows of values (B, n).

    torch's scan of a single row on CUDA adds in an order that changes from call to call; products with triangular
    matrices do not.
    """
    if values.device.type == "cpu":
        return values.cumsum(1)
    return _cumulative_products(values)


def _cumulative_products(values: Tensor) -> Tensor:
    B, n = values.shape
    if not n:
        return values
    blocks = torch.nn.functional.pad(values, (0, -n % CUMULATIVE_BLOCK)).view(B, -1, CUMULATIVE_BLOCK)
    upper = torch.ones(CUMULATIVE_BLOCK, CUMULATIVE_BLOCK, dtype=values.dtype, device=values.device).triu_()
    within = blocks @ upper
    if blocks.shape[1] > 1:
        within[:, 1:] += _cumulative_products(within[:, :-1, -1]).unsqueeze(2)
    return within.reshape(B, -1)[:, :n].contiguous()


def squared_distances(x: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """Squared distances (B, n) to the centroids of labels, from differences.

    Exact to rounding even in tight cells.
    """
    B, n, d = x.shape
    out = x.new_empty(B, n)
    flat = centroids.reshape(-1, d)
    rows = labels + torch.arange(B, device=x.device)[:, None] * centroids.shape[1]
    elements = CACHED_ELEMENTS if x.device.type == "cpu" else CHUNK_ELEMENTS
    step = max(1, elements // (B * d))
    for start in range(0, n, step):
        nearest = flat.index_select(0, rows[:, start : start + step].flatten()).view(B, -1, d)
        out[:, start : start + step] = nearest.sub_(x[:, start : start + step]).square_().sum(-1)
    return out


def kmeans_plusplus(x: Tensor, weights: Tensor, k: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Greedy k-means++: indices (B, k) of the starting points.

    Arthur & Vassilvitskii 2007, with the best of 2 + ln k candidates at each step, as scikit-learn does. `generators`
    has one CPU generator per class, so that a class draws the same points alone and in a batch.
    """
    B = len(x)
    trials = 2 + int(torch.tensor(float(k)).log())
    draws = torch.stack([torch.rand(k, trials, generator=g, dtype=torch.float64) for g in generators]).to(x.device)
    norms = squared_norms(x)
    rows = torch.arange(B, device=x.device)
    chosen = torch.empty(B, k, dtype=torch.int64, device=x.device)

    def pick(mass: Tensor, u: Tensor) -> Tensor:
        """Sample points with probability ~ mass by inverse transform; without mass, uniformly."""
        cumulative = cumulative_sums(mass.double())
        total = cumulative[:, -1:]
        sampled = torch.searchsorted(cumulative, u * total, right=True)
        last = weights.gt(0).sum(1, keepdim=True) - 1
        spread = (u * (last + 1)).long()
        return torch.where(total > 0, sampled, spread).minimum(last)

    chosen[:, 0] = pick(weights, draws[:, 0, :1])[:, 0]
    closest = _to_candidates(x, norms, chosen[:, :1])[:, 0]
    for j in range(1, k):
        candidates = pick(weights * closest, draws[:, j])  # (B, trials)
        distance = torch.minimum(_to_candidates(x, norms, candidates), closest.unsqueeze(1))
        best = (distance * weights.unsqueeze(1)).sum(-1).argmin(1)
        chosen[:, j] = candidates[rows, best]
        closest = distance[rows, best]
    return chosen


def _to_candidates(x: Tensor, norms: Tensor, candidates: Tensor) -> Tensor:
    """Squared distances (B, t, n) of candidates (B, t) to all points."""
    points = x.gather(1, candidates.unsqueeze(2).expand(-1, -1, x.shape[2]))
    candidate_norms = norms.gather(1, candidates).unsqueeze(2)
    distance = torch.baddbmm(candidate_norms + norms.unsqueeze(1), points, x.transpose(1, 2), alpha=-2).clamp_(min=0)
    return distance.scatter_(2, candidates.unsqueeze(2), 0.0)  # rounding must not leave a chosen point some mass


def _sample(weights: Tensor, m: int, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Rows (B, <= m) of a sample of each class, and their weights."""
    B, n = weights.shape
    if n <= m:
        return torch.arange(n, device=weights.device).expand(B, n), weights
    rows, inside = [], []
    for w, g in zip(weights, generators, strict=True):
        last = int(w.gt(0).nonzero().max()) + 1  # padding stands at the end and must not use up the sample
        rows.append(torch.randperm(last, generator=g).repeat(m // last + 1)[:m])
        inside.append(min(last, m))
    index = torch.stack(rows).to(weights.device)
    valid = torch.arange(m, device=weights.device) < torch.tensor(inside, device=weights.device)[:, None]
    return index, weights.gather(1, index) * valid


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, m, d) of x (B, n, d) at index (B, m)."""
    flat = index + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.reshape(-1, x.shape[2]).index_select(0, flat.flatten()).view(*index.shape, x.shape[2])


def principal_basis(x: Tensor, weights: Tensor, r: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Orthonormal basis (B, d, r) of about the r leading principal directions.

    Of centered points, by one power iteration from a random start (Halko, Martinsson & Tropp 2011).
    """
    probe = torch.stack([torch.randn(x.shape[2], r, generator=g) for g in generators]).to(x.device)
    scaled = x * weights.sqrt().unsqueeze(2)
    return torch.linalg.qr(scaled.transpose(1, 2) @ (scaled @ probe)).Q


def pca_multistart(x: Tensor, weights: Tensor, k: int, generators: Sequence[torch.Generator], *, tol: float) -> Tensor:
    """Starting centroids (B, k, d) of the best of several starts in a principal subspace.

    Several starts run Lloyd on a sample in the leading principal subspace, where an iteration is cheap; all points
    then settle there from the best start, and the means of their cells are returned.

    Projection keeps the k-means cost of every partition up to the variance left out (Cohen et al. 2015), and what
    sample and projection leave out is settled by the Lloyd iterations that follow, on all points in all dimensions.
    """
    B, n, d = x.shape
    index, sample_weights = _sample(weights, max(MULTISTART_POINTS, MULTISTART_POINTS_PER_CENTROID * k), generators)
    y = x
    if d > 2 * MULTISTART_DIMENSIONS and n > MULTISTART_DIMENSIONS:
        few = index[:, : MULTISTART_POINTS // 2]
        basis = principal_basis(
            _rows(x, few), sample_weights[:, : MULTISTART_POINTS // 2], MULTISTART_DIMENSIONS, generators
        )
        y = x @ basis
    sample = _rows(y, index)
    starts = (
        MULTISTART_STARTS if k <= MULTISTART_MANY else MULTISTART_STARTS // 2
    )  # the more cells, the less a start differs from another
    # All starts of all classes are one batch: row s * B + b is start s of class b.
    many, many_weights = sample.repeat(starts, 1, 1), sample_weights.repeat(starts, 1)
    draws = [int(torch.randint(2**62, (), generator=g)) for _ in range(starts) for g in generators]
    chosen = kmeans_plusplus(many, many_weights, k, [torch.Generator().manual_seed(s) for s in draws])
    start = _rows(many, chosen)
    centers, _, _ = lloyd(many, start, many_weights, n_iter=MULTISTART_ITERATIONS, tol=10 * tol)
    cost = (squared_distances(many, centers, assign(many, centers)) * many_weights).sum(1).view(starts, B)
    winner = centers.view(starts, B, k, -1)[cost.argmin(0), torch.arange(B, device=x.device)]
    settled, _, _ = lloyd(y, winner, weights, n_iter=MULTISTART_ITERATIONS, tol=tol)
    labels = assign(y, settled)
    sums, mass = cell_sums(x, labels, weights, k)
    centroids = sums / mass.unsqueeze(2).clamp(min=1e-30)
    for b in (mass <= 0).any(1).nonzero()[:, 0].tolist():
        centroids[b] = fill_empty(x[b], centroids[b], labels[b], weights[b], mass[b])[0]
    return centroids


def peak_bytes(n: int, d: int) -> int:
    """Upper bound of the bytes of k-means per class, for points (n, d).

    Start points included: 3.5 to 6.6 times the points were measured for d >= 256, and up to 17.5 times for small d,
    where the several starts are not in a subspace of fewer dimensions.
    """
    return 4 * n * (7 * d + 12 * min(d, 2 * MULTISTART_DIMENSIONS))


def fill_empty(x: Tensor, centroids: Tensor, labels: Tensor, weights: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Move every empty centroid of one class onto a distinct point.

    The farthest from its centroid first, by scikit-learn's rule, but that a point next to one that was just taken is
    not far any more, so that two cells never move onto equal points. x (n, d), centroids (k, d), labels (n,), weights
    (n,), mass (k,).

    Returns:
        centroids (k, d), and labels (n,) where the points that were taken belong to the moved ones.
    """
    empty = (mass <= 0).nonzero()[:, 0]
    distance = squared_distances(x[None], centroids[None], labels[None])[0] * (weights > 0)
    out, labels = centroids.clone(), labels.clone()
    for e in empty.tolist():
        far = int(distance.argmax())
        if distance[far] <= 0:
            break  # fewer distinct points than centroids
        out[e], labels[far] = x[far], e
        distance = torch.minimum(distance, (x - x[far]).square().sum(-1))
    return out, labels


def fill_empty_alone(x: Tensor, centroids: Tensor, labels: Tensor, weights: Tensor, mass: Tensor) -> Tensor:
    """Move every empty centroid as `fill_empty` does, emptying no other cell.

    Candidates are the farthest points of each cell, the farthest first; taken is the first that leaves every cell a
    point, or else the first. x (n, d), centroids (k, d), labels (n,), weights (n,), mass (k,).
    """
    k = len(centroids)
    distance = squared_distances(x[None], centroids[None], labels[None])[0] * (weights > 0)
    out, labels, owns = centroids.clone(), labels.clone(), mass > 0
    for e in (~owns).nonzero()[:, 0].tolist():
        order = distance.argsort(descending=True, stable=True)
        order = order[distance[order] > 0]
        farthest = {c: i for i, c in reversed(list(zip(order.tolist(), labels[order].tolist(), strict=True)))}
        moves = []
        for far in sorted(farthest.values(), key=lambda i: -float(distance[i])):
            to_far = (x - x[far]).square().sum(-1)
            moves.append((far, to_far))
            if (cell_totals(weights * (to_far > distance), labels, k)[owns] > 0).all():
                moves = moves[-1:]
                break
        if not moves:
            break  # fewer distinct points than centroids
        far, to_far = moves[0]
        out[e], owns[e] = x[far], True
        labels[to_far <= distance] = e
        distance = torch.minimum(distance, to_far)
    return out


def lloyd(
    x: Tensor,
    centroids: Tensor,
    weights: Tensor,
    *,
    n_iter: int,
    tol: float,
    nearest: Callable[[Tensor, Tensor], Tensor] = assign,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run Lloyd's algorithm on B classes at once.

    A class stops when its labels no longer change, or when an iteration lowers its weighted distortion by less than
    the share `tol`; the others go on without it. An empty cell is moved by `fill_empty` and the iterations go on.
    `nearest` assigns points (B, n, d) to centroids (B, k, d), as `assign` does.

    Returns:
        centroids (B, k, d), iterations (B,), converged (B,) bool.
    """
    B, k = x.shape[0], centroids.shape[1]
    result = centroids.clone()
    iterations = torch.zeros(B, dtype=torch.int64)
    converged = torch.zeros(B, dtype=torch.bool)
    active = torch.arange(B, device=x.device)
    c, labels = result, torch.full(x.shape[:2], -1, device=x.device)
    power = (squared_norms(x) * weights).sum(1)  # (B,)
    previous = torch.full((B,), torch.inf, device=x.device)
    for _ in range(n_iter):
        new = nearest(x, c)
        sums, mass = cell_sums(x, new, weights, k)
        c = torch.where(mass.unsqueeze(2) > 0, sums / mass.unsqueeze(2).clamp(min=1e-30), c)
        full = (mass > 0).all(1)
        for b in (~full).nonzero()[:, 0].tolist():
            moved, taken = fill_empty(x[b], c[b], new[b], weights[b], mass[b])
            # The cells that lost a point go on without it, as scikit-learn has it.
            one, one_mass = cell_sums(x[b : b + 1], taken[None], weights[b : b + 1], k)
            c[b] = torch.where(one_mass[0, :, None] > 0, one[0] / one_mass[0, :, None].clamp(min=1e-30), moved)
            mass[b] = one_mass[0]
        # Distortion after the update: sum w |x|^2 - sum_k mass_k |c_k|^2 (cells and means belong together).
        sse = power - (mass * c.square().sum(-1)).sum(1)
        same = ((new == labels) | (weights <= 0)).all(1)
        done = same | ((previous - sse).abs() <= tol * sse) & full & (tol > 0)
        iterations[active.cpu()] += 1
        result[active] = c
        converged[active[done].cpu()] = True
        if done.all():
            break
        labels, previous = new, sse
        if done.any():
            keep = ~done
            active, c, labels, previous = active[keep], c[keep], labels[keep], previous[keep]
            x, weights, power = x[keep], weights[keep], power[keep]
    return result, iterations, converged
