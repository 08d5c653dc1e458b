"""k-means, labels of views, patches, and the end of memory: what needs no diffusion model."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_items_train import MIXED, PIXELS, fadrm_teacher
from gpu_measure import NotHere, Session, compare, difference, no_tf32, wait
from torch import Tensor

from dq.cluster.kmeans import Clustering, kmeans_many, quantization_stats
from dq.cluster.prototypes import make_prototypes
from dq.config.schema import ClusterConfig
from dq.config.students import RelabelConfig, StudentConfig
from dq.core.seeds import derive_seed
from dq.data.source import ImageSource, Split
from dq.labels.compute import label_epoch
from dq.labels.plan import LabelPlan, make_plan
from dq.networks.patches import PatchRecipe, patch_images
from dq.networks.teacher import Teacher
from dq.networks.training import accuracy
from dq.run.stages.cluster import group_budget, groups

# --- k-means ------------------------------------------------------------------------------------------------------


def kmeans(s: Session) -> None:
    """Classes of latents to prototypes, in groups as a run clusters them, with their host part, by step."""
    classes, n, k = s.size((200, 1300, 50), (3, 20, 2))
    shape = s.size((4, 32, 32), (4, 2, 2))
    config = ClusterConfig(engine="torch", uniform_w2=has_transport())
    g = torch.Generator().manual_seed(s.seed)
    # a mixture: points of real classes lie in clumps
    centers = 2 * torch.randn(k, *shape, generator=g)
    host = [
        (centers[torch.randint(k, (n,), generator=g)] + torch.randn(n, *shape, generator=g)).half()
        for _ in range(s.size(8, 3))
    ]
    width = int(np.prod(shape))
    sizes = [len(group) for group in groups([(c, n) for c in range(classes)], width, group_budget(s.device))]
    ways = {"whole stage": lambda: _cluster(s, host, sizes, k, config, {})}
    parity = kmeans_parity(s, host[0], k, config)
    compare(s, f"k-means of {classes} classes", ways, units=classes, unit="class", parity=parity, repeats=1)
    steps: dict[str, float] = {}
    _cluster(s, host, sizes, k, config, steps)
    s.write(
        f"k-means of {classes} classes by step",
        numbers={**steps, "classes_at_once": max(sizes), "uniform_w2": config.uniform_w2},
    )


def has_transport() -> bool:
    """Whether POT is installed, without which the exact transport of one logged number is left out."""
    try:
        import ot  # noqa: F401
    except ImportError:
        return False
    return True


def _cluster(
    s: Session, host: list[Tensor], sizes: list[int], k: int, config: ClusterConfig, steps: dict[str, float]
) -> None:
    """Load, cluster, measure and save groups of classes; seconds of each step are added to `steps`."""
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            with _step(s, steps, "load_s"):
                z = [host[(done + i) % len(host)].to(s.device).float() for i in range(size)]
            with _step(s, steps, "cluster_s"):
                results = _clusterings(z, k, config, done)
            with _step(s, steps, "statistics_s"):
                for x, result in zip(z, results, strict=True):
                    quantization_stats(x.flatten(1), result, with_uniform=config.uniform_w2)
            with _step(s, steps, "save_s"):
                for i, (x, result) in enumerate(zip(z, results, strict=True)):
                    p = make_prototypes(done + i, "class", x, torch.arange(len(x)), result)
                    p.save(Path(folder) / f"{done + i}.safetensors")
            done += size


def _clusterings(z: list[Tensor], k: int, config: ClusterConfig, first: int) -> list[Clustering]:
    seeds = [derive_seed("gpu session", first + i) for i in range(len(z))]
    names = [f"class {first + i}" for i in range(len(z))]
    return kmeans_many([x.flatten(1) for x in z], k, config=config, seeds=seeds, names=names)


class _step:
    """Adds the seconds of a block to a sum by name."""

    def __init__(self, s: Session, steps: dict[str, float], name: str) -> None:
        self.device, self.steps, self.name = s.device, steps, name

    def __enter__(self) -> None:
        wait(self.device)
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        wait(self.device)
        self.steps[self.name] = self.steps.get(self.name, 0.0) + time.perf_counter() - self.began


def kmeans_parity(s: Session, z: Tensor, k: int, config: ClusterConfig) -> dict[str, float]:
    """One class on the device against the CPU: inertia, and share of points in another cell."""
    there, here = (_clusterings([z.float().to(d)], k, config, 0)[0] for d in (s.device, torch.device("cpu")))
    moved = float((there.labels.cpu() != here.labels).float().mean())
    twice = _clusterings([z.float().to(s.device)], k, config, 0)[0]
    return {
        "inertia against the CPU": abs(there.inertia / here.inertia - 1),
        "points in another cell": moved,
        "centroids of a second call": difference(twice.centroids, there.centroids),
    }


# --- teachers -----------------------------------------------------------------------------------------------------


def labels(s: Session) -> None:
    """An epoch of views labeled with batch statistics of parts and with stored ones, and plain evaluation."""
    side, n, net = s.size(224, 16), s.size(2048, 32), s.size("resnet18", "convnet3-bn")
    x = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(s.seed))
    teacher, images = fadrm_teacher(s, net, side, s.device), x.to(s.device)
    ways = {}
    for statistics in ("batch", "running"):
        plan = _plan(s, x, teacher, statistics)
        ways[f"{statistics} statistics, batches of 16 in 2 parts"] = _labeling(images, teacher, plan)
    against = next(iter(ways))
    parity = label_parity(s, net, side)
    compare(s, f"labels of views, {net} {side} px", ways, units=n, unit="image", against=against, parity=parity)
    y = torch.zeros(n, dtype=torch.int64)

    def test(batch: int) -> None:
        accuracy(teacher.net, x, y, pixels=PIXELS, batch_size=batch, dtype="bfloat16")

    tests = {f"batches of {batch}, bfloat16": functools.partial(test, batch) for batch in (100, 1000)}
    compare(s, f"test of a student, {net} {side} px", tests, units=n, unit="image", against=next(iter(tests)))


def _plan(s: Session, images: Tensor, teacher: Teacher, statistics: Any) -> LabelPlan:
    relabel = RelabelConfig(statistics=statistics)
    settings = StudentConfig(
        net=teacher.name, batch_size=16, accumulate=2, augment="none", labels="soft", views=MIXED, relabel=relabel
    )
    return make_plan(images, [teacher], s.size(100, 4), settings)


def _labeling(images: Tensor, teacher: Teacher, plan: LabelPlan) -> Callable[[], object]:
    return lambda: label_epoch(images, [teacher], plan, 1)


def label_parity(s: Session, net: str, side: int) -> dict[str, float]:
    """Logits of an epoch on the device against the CPU, float32."""
    g = torch.Generator().manual_seed(s.seed)
    x = torch.randint(0, 256, (16, 3, side, side), dtype=torch.uint8, generator=g)
    logits = []
    for device in (s.device, torch.device("cpu")):
        teacher = fadrm_teacher(s, net, side, device)
        with no_tf32():
            logits.append(label_epoch(x.to(device), [teacher], _plan(s, x, teacher, "batch"), 1)[1])
    return {"logits in float32 against the CPU": difference(*logits)}


def patches(s: Session) -> None:
    """The best crops of the images of some classes, as RDED cuts them."""
    side, pool, classes = s.size(224, 16), s.size(300, 6), s.size(4, 2)
    source = random_source(s, classes, pool, side)
    teacher = fadrm_teacher(s, s.size("resnet18", "convnet3-bn"), side, s.device)
    recipe = PatchRecipe(side, pool=pool, factor=2)
    ways = {"patches": lambda: patch_images(source, 1, recipe, teacher=teacher, seed=s.seed)}
    group = f"RDED, {pool} images of a class, {side} px"
    compare(s, group, ways, units=classes, unit="class", repeats=s.size(2, 1))


def random_source(s: Session, classes: int, per_class: int, side: int) -> ImageSource:
    """Images of noise in memory, as arrays."""
    rng = np.random.default_rng(s.seed)
    images = rng.integers(0, 256, (classes * per_class, 3, side, side), dtype=np.uint8)
    split = Split(np.repeat(np.arange(classes), per_class), lambda row: images[row], "train")
    return ImageSource({"train": split}, tuple(f"c{i}" for i in range(classes)), f"gpu session {s.seed}", "noise")


# --- memory -------------------------------------------------------------------------------------------------------


def memory(s: Session) -> None:
    """Batches that do not fit go in halves, with equal results; and whether reserved memory grows over repeats."""
    if s.device.type != "cuda":
        raise NotHere("the end of memory needs a CUDA device")
    for name, work in _greedy(s):
        whole = work()
        wait(s.device)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(s.device).total_memory
        peak = torch.cuda.max_memory_allocated(s.device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, 0.5 * peak / total), s.device)
        try:
            halved = work()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, s.device)
        numbers = {"peak_gib": peak / 2**30, "difference_in_half_the_memory": difference(halved, whole)}
        s.write(f"half the memory: {name}", numbers=numbers)
    reserved = []
    work = next(iter(_greedy(s)))[1]
    for _ in range(s.size(200, 2)):
        work()
        reserved.append(torch.cuda.memory_reserved(s.device))
    s.write(
        "reserved memory over 200 repeats",
        numbers={"first_gib": reserved[0] / 2**30, "last_gib": reserved[-1] / 2**30},
    )


def _greedy(s: Session) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Work of which the batch is as large as it is asked for, by name."""
    side, n = s.size(224, 16), s.size(1024, 32)
    teacher = fadrm_teacher(s, s.size("resnet18", "convnet3-bn"), side, s.device)
    teacher = dataclasses.replace(teacher, batch_size=n)
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    torch.cuda.reset_peak_memory_stats(s.device)
    yield "logits of a teacher", lambda: teacher.logits(images)
    g = torch.Generator().manual_seed(s.seed)
    points = [torch.randn(s.size(1300, 20), s.size(4096, 16), generator=g).to(s.device) for _ in range(s.size(16, 2))]
    config = ClusterConfig(engine="torch")
    torch.cuda.reset_peak_memory_stats(s.device)

    def centroids() -> Tensor:
        from dq.core.memory import list_in_pieces

        pieces = list_in_pieces("cluster", len(points), lambda p: _clusterings(points[p], 2, config, p.start))
        return torch.stack([torch.as_tensor(r.centroids) for piece in pieces for r in piece])

    yield "k-means of 16 classes", centroids


if __name__ == "__main__":
    raise SystemExit("gpu_items_label is a module of gpu_session.py; run that")
