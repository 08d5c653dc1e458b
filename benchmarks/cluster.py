"""Time and distortion of every clustering engine against scikit-learn and against D4M's recipe, in one run.

    python benchmarks/cluster.py [--latents DIR] [--seeds 5] [--csv results/cluster.csv]

Data: Gaussian mixtures of 30 modes at the sizes of one ImageNet class of DiT latents and of CIFAR-10 classes, and real
latents where a latent cache is given (classes with at least 5,000 latents of 1,024 numbers, first two). Rows are taken
in turn seed by seed, so that a busy moment hits all. With a CUDA device it also clusters 1,000 classes of 1300 x 4096
at once. Every engine's time includes its start points, final assignment and counts; `minibatch` is followed by the
same exact assignment, scikit-learn's `KMeans` by none.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.cluster import KMeans, MiniBatchKMeans

from dq.cluster.engines import choose_engine
from dq.cluster.faiss_engine import has_faiss
from dq.cluster.kmeans import kmeans, kmeans_many
from dq.config.schema import ClusterConfig
from dq.core.progress import progress

SIZES = [(1300, 4096, 50), (5000, 256, 50), (5000, 1024, 10)]


def mixture(n: int, d: int, modes: int = 30, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(modes, d))
    return torch.from_numpy((centers[rng.integers(0, modes, n)] + rng.normal(size=(n, d))).astype(np.float32))


def problems(latents: Path | None) -> list[tuple[str, torch.Tensor, int]]:
    cases = [(f"mixture {n}x{d}", mixture(n, d), k) for n, d, k in SIZES]
    if latents is not None:
        for file in sorted(latents.glob("class-*.safetensors"))[:2]:
            z = load_file(file)["latents"].flatten(1).float()
            # the mixtures' dimensions: 256 numbers are the first channels of a latent
            for d, k in ((256, 50), (1024, 10), (1024, 50)):
                cases.append((f"{file.stem} {len(z)}x{d}", z[:, :d].contiguous(), k))
    return cases


def d4m_recipe(x: np.ndarray, k: int, expand: int, seed: int) -> float:
    """One pass of `partial_fit` over shuffled data, as the released code does; distortion of its centers."""
    order = np.random.default_rng(seed).permutation(len(x))
    model = MiniBatchKMeans(n_clusters=k, random_state=seed, n_init="auto")
    size = expand * k
    for start in range(0, len(x) - size + 1, size):
        model.partial_fit(x[order[start : start + size]])
    return -model.score(x)


def contestants() -> dict[str, Callable[[torch.Tensor, int, int], float]]:
    def engine(**settings) -> Callable[[torch.Tensor, int, int], float]:
        config = ClusterConfig(**settings)
        return lambda x, k, seed: kmeans(x, k, config=config, seed=seed).inertia

    rows = {
        "scikit-learn KMeans": lambda x, k, seed: KMeans(k, n_init=1, random_state=seed).fit(x.numpy()).inertia_,
        "D4M partial_fit, expand 1": lambda x, k, seed: d4m_recipe(x.numpy(), k, 1, seed),
        "D4M partial_fit, expand 10": lambda x, k, seed: d4m_recipe(x.numpy(), k, 10, seed),
        f"dq default ({choose_engine('auto')})": engine(),
        "dq torch": engine(engine="torch"),
        "dq torch, converged": engine(engine="torch", tol=0.0, n_iter=500),
        "dq torch, plain k-means++": engine(engine="torch", init="k-means++"),
        "dq clvq, 1 pass": engine(engine="clvq"),
        "dq clvq, 5 passes": engine(engine="clvq", passes=5),
        "dq minibatch": engine(engine="minibatch"),
        "dq barycenter, entropic": engine(engine="barycenter", transport="entropic", entropy=0.05, n_iter=10),
    }
    if has_faiss():
        rows["dq faiss"] = engine(engine="faiss")
        rows["dq faiss, random start"] = engine(engine="faiss", init="random")
    return rows


def measure(latents: Path | None, seeds: int) -> list[dict[str, object]]:
    table = []
    for name, x, k in problems(latents):
        times: dict[str, list[float]] = {}
        costs: dict[str, list[float]] = {}
        rows = contestants()
        if k * len(x) > 200_000:
            rows.pop("dq barycenter, entropic")
        for seed in progress(range(-1, seeds), desc=f"{name}, k={k}", unit="seed"):
            for label, fit in rows.items():
                began = time.perf_counter()
                cost = fit(x, k, seed % 1000)
                if seed >= 0:  # the first round warms up
                    times.setdefault(label, []).append(time.perf_counter() - began)
                    costs.setdefault(label, []).append(cost / len(x))
        base_time = statistics.median(times["scikit-learn KMeans"])
        base_cost = statistics.mean(costs["scikit-learn KMeans"])
        for label in times:
            table.append(
                {
                    "data": name,
                    "k": k,
                    "method": label,
                    "seconds": round(statistics.median(times[label]), 4),
                    "time_ratio": round(statistics.median(times[label]) / base_time, 3),
                    "distortion": round(statistics.mean(costs[label]), 4),
                    "distortion_ratio": round(statistics.mean(costs[label]) / base_cost, 5),
                    "seeds": seeds,
                }
            )
    return table


def on_gpu() -> None:
    """Time 1,000 classes of 1300 x 4096 at once.

    Reported are the ratio to this machine's CPU and the share of the memory bandwidth.
    """
    classes, n, d, k = 1000, 1300, 4096, 50
    config = ClusterConfig(engine="torch", init="k-means++", tol=0.0, n_iter=20)
    block = torch.empty(256 << 20, device="cuda", dtype=torch.float32)
    torch.cuda.synchronize()
    began = time.perf_counter()
    block.copy_(block.roll(1))
    torch.cuda.synchronize()
    bandwidth = 4 * block.numel() * 4 / (time.perf_counter() - began)
    g = torch.Generator("cuda").manual_seed(0)
    xs = [torch.randn(n, d, device="cuda", generator=g) for _ in range(classes)]
    kmeans_many(xs[:8], k, config=config)
    torch.cuda.synchronize()
    began = time.perf_counter()
    results = [r for i in range(0, classes, 100) for r in kmeans_many(xs[i : i + 100], k, config=config)]
    torch.cuda.synchronize()
    gpu = time.perf_counter() - began
    began = time.perf_counter()
    kmeans(xs[0].cpu(), k, config=dataclasses.replace(config))
    cpu = (time.perf_counter() - began) * classes
    passes = 2 * statistics.mean(r.n_iter for r in results) + k + 4
    share = passes * classes * n * d * 4 / gpu / bandwidth
    print(
        f"\n{torch.cuda.get_device_name()}: 1,000 classes in {gpu:.1f} s, {cpu / gpu:.0f} times this CPU, "
        f"{share:.0%} of the measured memory bandwidth"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, help="a latent cache folder, latents-*")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    table = measure(args.latents, args.seeds)
    for row in table:
        print(
            f"{row['data']:24} k={row['k']:<3} {row['method']:28} {row['seconds']:8.3f} s  "
            f"time x{row['time_ratio']:<6} distortion x{row['distortion_ratio']}"
        )
    note = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(note)
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as f:
            f.write(f"# python {' '.join(sys.argv)}  ({note})\n")
            writer = csv.DictWriter(f, fieldnames=list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    if torch.cuda.is_available():
        on_gpu()
    else:
        print("GPU row: not measured, no CUDA device here")


if __name__ == "__main__":
    main()
