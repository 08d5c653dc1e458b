"""FRePo without a long run: linear features, and random features of real images.

    python pipelines/frepo_anchors.py --cifar10 DIR --fashion_mnist DIR --csv results/frepo_anchors.csv

Linear features: one learned image per class is enough to match linear ridge regression on all train images (Chen et
al., "Provable and Efficient Dataset Distillation for Kernel Ridge Regression", NeurIPS 2024); features are flattened
pixels, standardized by channel and rotated and scaled by the square root of their covariance, which is linear too. The
penalty is chosen on a tenth of the train images, and the test images are looked at once. Random features: ridge
regression on n real images of CIFAR-10 (n / 10 of a class), whitened, through one freshly drawn frepoconv3, with and
without mirror images, tested on the first --test_images test images.

Prints the rows of the file. Takes 20 minutes on a thread that it shares.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

from dq.core.errors import InputError, RunError
from dq.core.seeds import generator
from dq.data.images import read_images
from dq.data.load import load_source
from dq.data.regression_labels import centered_targets
from dq.data.source import Split
from dq.data.splits import validation_rows
from dq.data.zca import Whitening, fit_whitening, is_gray
from dq.networks.online_pool import OnlinePool, PoolSettings
from dq.refine.lamb import Lamb, cosine_lr
from dq.refine.ridge import Objective, meta_gradient, predict, solve_ridge

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of the mean squared feature
STEPS, LR = 600, 0.05
SIZES = (10, 100, 500, 1000, 2000)
# measured with one network on 500 test images, with mirror images for two sizes
EXPECTED = {(10, False): 20, (100, False): 29, (500, False): 34, (1000, False): 38, (2000, False): 40}
EXPECTED |= {(100, True): 31, (500, True): 38}
PUBLISHED = {"cifar10": 39.48}  # full-data linear ridge regression and one learned image per class, Chen et al.


def linear_features(images: Tensor, fitted: Whitening) -> Tensor:
    """Flattened pixels (N, D) float64, standardized by channel; one channel of gray images."""
    x = fitted(images)
    return (x[:, :1] if is_gray(images[:100]) else x).flatten(1).double()


def second_moments(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Z^T Z (D + C, D + C) of the rows z = (features, centered target)."""
    both = torch.cat([x, centered_targets(labels, classes).double()], 1)
    return both.T @ both


def ridge_weights(moments: Tensor, classes: int, penalty: float) -> Tensor:
    """W (D, C) of min |X W - Y|^2 + penalty s |W|^2 from second moments.

    s is the mean of the diagonal of X^T X.
    """
    gram, cross = moments[:-classes, :-classes], moments[:-classes, -classes:]
    scale = penalty * gram.diagonal().mean()
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram + scale * torch.eye(len(gram), dtype=gram.dtype)))


def learn_linear(
    moments: Tensor, classes: int, penalty: float, *, steps: int = STEPS, lr: float = LR, seed: int = 0
) -> Tensor:
    """Learn one image and label vector per class by FRePo's meta-gradient.

    Their ridge regression approaches that of all data.

    The loss is that on all data with the penalty: D + C rows with the same second moments stand for them, rows of the
    triangular factor of [X Y; sqrt(penalty) I 0], so that a step costs nothing that grows with N.

    Args:
        moments: (D + C, D + C) means of `second_moments`.
        classes: number of classes.
        penalty: as in `ridge_weights`.
        steps: number of updates.
        lr: learning rate.
        seed: of the random numbers.

    Returns:
        Weights (D, C) that the C learned images give.
    """
    d = len(moments) - classes
    # the penalty as data, and a trace of noise for targets that sum to zero, whose moments are singular
    added = torch.full((len(moments),), 1e-9, dtype=moments.dtype)
    added[:d] = penalty * moments.diagonal()[:d].mean()
    moments = moments + torch.diag(added)
    rows = torch.linalg.cholesky(moments).T * (d + classes) ** 0.5  # R with R^T R the moments of d + C rows
    root = rows[:d, :d] / (d + classes) ** 0.5  # X^T X / N + penalty = root^T root
    features = torch.linalg.solve_triangular(root, rows[:, :d], upper=True, left=False)  # x root^-1: covariance I
    images = Lamb.of(torch.randn(classes, d, generator=generator(seed, "images"), dtype=rows.dtype))
    learned = Lamb.of(torch.eye(classes, dtype=rows.dtype) - 1 / classes)
    objective = Objective(margin_weight=0.0)
    for step in range(steps):
        g = meta_gradient(lambda z: z, images.value, learned.value, features, rows[:, d:], objective)
        assert g.images is not None
        rate = cosine_lr(step, steps, lr, 0.0)
        images.step(g.images, rate)
        learned.step(g.labels, rate)
    solution = solve_ridge(images.value, learned.value)
    return torch.linalg.solve_triangular(root, images.value.T @ solution.dual, upper=True)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    return float((predictions.argmax(1) == labels).double().mean())


def linear_anchor(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int = 10, steps: int = STEPS
) -> dict[str, float]:
    """Test accuracies of linear ridge regression on all and on learned images.

    Args:
        train: images (N, 3, S, S) and labels (N,).
        test: images and labels of the test split.
        classes: number of classes.
        steps: number of updates.
    """
    images, labels = train
    fitted = fit_whitening(images, zca=False)
    x = linear_features(images, fitted)
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[torch.from_numpy(validation_rows(labels.numpy(), len(labels) // 10))] = True
    seen = second_moments(x[~held], labels[~held], classes)
    scores = {p: accuracy(x[held] @ ridge_weights(seen, classes, p), labels[held]) for p in PENALTIES}
    penalty = max(scores, key=scores.__getitem__)
    moments = (seen + second_moments(x[held], labels[held], classes)) / len(x)
    full, learned = ridge_weights(moments, classes, penalty), learn_linear(moments, classes, penalty, steps=steps)
    queries = linear_features(test[0], fitted)
    accuracies = {"penalty": penalty, "full": accuracy(queries @ full, test[1])}
    return accuracies | {"learned": accuracy(queries @ learned, test[1])}


def random_feature_accuracies(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    whitening: Whitening,
    seed: int,
    sizes: tuple[int, ...] = SIZES,
    net: str = "frepoconv3",
) -> dict[tuple[int, bool], float]:
    """Accuracy of ridge regression on n real images through one random network.

    Keys are n and the use of mirror images.

    The images of a smaller n are among those of a larger; classes have equal numbers.
    """
    images, labels = train
    classes, side = int(labels.max()) + 1, images.shape[-1]
    order = torch.randperm(len(labels), generator=generator(seed, "real images"))
    ranked = [order[labels[order] == c] for c in range(classes)]
    rows = torch.stack([r[: max(sizes) // classes] for r in ranked], 1).flatten()  # one of every class before a second
    pool = OnlinePool((net,), classes, side, PoolSettings(size=1), seed=seed)
    with pool.features(0) as features, torch.no_grad():

        def look(x: Tensor) -> Tensor:
            return torch.cat([features(part) for part in x.split(100)])

        x = whitening(images[rows])
        support, mirrored, queries = look(x), look(x.flip(-1)), look(whitening(test[0]))
    y = centered_targets(labels[rows], classes)
    accuracies = {}
    for n in sizes:
        for mirrors in (False, True):
            f = torch.cat([support[:n], mirrored[:n]]) if mirrors else support[:n]
            targets = torch.cat([y[:n], y[:n]]) if mirrors else y[:n]
            solution = solve_ridge(f, targets)
            accuracies[n, mirrors] = accuracy(predict(solution, f, queries), test[1])
    return accuracies


def read(split: Split, side: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (N, 3, S, S) uint8 and labels of a split, or of its first rows."""
    n = min(limit or len(split), len(split))
    images = read_images(split, list(range(n)), side, "crop")[0]
    return images, torch.from_numpy(split.labels[:n]).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", required=True)
    parser.add_argument("--fashion_mnist", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test_images", type=int, default=500)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []

    def add(
        anchor: str, data: str, n: int, mirrors: str, values: list[float], test_images: int, expected: object
    ) -> None:
        spread = f"{100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
        row: dict[str, object] = {"anchor": anchor, "data": data, "n": n, "mirrors": mirrors, "seeds": len(values)}
        row |= {"test_images": test_images, "accuracy": f"{100 * statistics.mean(values):.2f}", "std": spread}
        rows.append(row | {"expected": expected})
        print(", ".join(f"{k} {v}" for k, v in rows[-1].items() if v != ""), flush=True)
        if args.csv:
            args.csv.parent.mkdir(parents=True, exist_ok=True)
            with open(args.csv, "w", newline="") as f:
                command = f"python pipelines/frepo_anchors.py --seeds {args.seeds} --test_images {args.test_images}"
                f.write(f"# {command} --cifar10 DIR --fashion_mnist DIR, torch {torch.__version__}\n")
                writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)

    paths = (("fashion-mnist", args.fashion_mnist, 28), ("cifar10", args.cifar10, 32))
    for name, source, side in [(name, load_source(path), side) for name, path, side in paths]:
        train, test = read(source.train, side), read(source.test, side)
        accuracies = linear_anchor(train, test)
        expected = PUBLISHED.get(name, "")
        kind = f"linear, all images, penalty {accuracies['penalty']:g}"
        add(kind, name, len(train[1]), "no", [accuracies["full"]], len(test[1]), expected)
        add("linear, one learned image per class", name, 10, "no", [accuracies["learned"]], len(test[1]), expected)
    whitening = fit_whitening(train[0])
    few = (test[0][: args.test_images], test[1][: args.test_images])
    by_seed = []
    for seed in range(args.seeds):
        by_seed.append(random_feature_accuracies(train, few, whitening, seed))
        shown = {f"{n}{' mirrored' if m else ''}": a for (n, m), a in by_seed[-1].items()}
        print(f"random network {seed + 1} of {args.seeds}: {shown}", file=sys.stderr)
    for n, mirrors in by_seed[0]:
        values = [accuracies[n, mirrors] for accuracies in by_seed]
        add(
            "random features", name, n, "yes" if mirrors else "no", values, len(few[1]), EXPECTED.get((n, mirrors), "")
        )


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError) as e:
        sys.exit(f"frepo_anchors: {e}")
