"""Students and FADRM on a card: steps, processes side by side, and where the time goes."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_measure import NotHere, Session, compare, difference, load_script, no_tf32, wait
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from dq.config.refinement import FADRM
from dq.config.students import StudentConfig, ViewConfig
from dq.core.devices import available_cores
from dq.data.views import Views, draw_views
from dq.networks.teacher import IMAGENET, Teacher
from dq.networks.training import TrainingSet, fit, normalizer
from dq.networks.zoo import make_net
from dq.refine import fadrm as method
from dq.refine.matched import match_teachers
from dq.refine.method import Batch

PIXELS = normalizer(*IMAGENET)
VIEWS = ViewConfig(crop_scale=(0.08, 1.0), flip=0.5)
MIXED = ViewConfig(crop_scale=(0.08, 1.0), flip=0.5, mix="cutmix")


# --- students -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Targets:
    """Views of an epoch and made-up logits of them."""

    views: Views
    logits: Tensor

    def check(self, images: int, student: StudentConfig) -> None:
        """Fits by construction."""


def student_data(s: Session, images: int, side: int, classes: int) -> TrainingSet:
    """Random images on the device, with soft labels of every epoch."""
    g = torch.Generator().manual_seed(s.seed)
    x = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=g)
    y = torch.arange(images) % classes
    logits = torch.randn(images, classes, generator=g)

    def targets(epoch: int) -> _Targets:
        return _Targets(draw_views(MIXED, images, side, batch_size=16, accumulate=2, seed=s.seed, epoch=epoch), logits)

    return TrainingSet(x.to(s.device), y.to(s.device), classes, PIXELS, soft_labels=targets)


def student(net: str, batch: int, accumulate: int, dtype: str) -> StudentConfig:
    """One epoch: 16 in two parts as the FADRM protocol trains (AdamW, soft labels, CutMix), whole batches by SGD."""
    base: dict[str, Any] = {"net": net, "epochs": 1, "batch_size": batch, "accumulate": accumulate, "dtype": dtype}
    base |= {"tests": 1, "schedule": "constant", "augment": "none"}
    if accumulate > 1:
        return StudentConfig(**base, optimizer="adamw", lr=0.001, labels="soft", temperature=20.0, views=MIXED)
    return StudentConfig(**base, optimizer="sgd", lr=0.01, views=VIEWS)


def students(s: Session) -> None:
    """An epoch by network, batch and dtype, against a loop of DataLoader and PIL in float32."""
    small, side = s.size("resnet18", "convnet3w32"), s.size(224, 16)
    plans = [
        (small, side, 16, 2, s.size(30, 2)),
        (s.size("convnet3", "convnet3w32"), s.size(32, 8), s.size(256, 8), 1, s.size(60, 2)),
        (small, side, s.size(128, 8), 1, s.size(10, 2)),
        (small, side, s.size(64, 4), 1, s.size(15, 2)),
    ]
    parity = student_parity(s)
    usual = load_script("benchmarks/student.py")
    for net, side, batch, accumulate, steps in plans:
        data, step = (student_data(s, n * batch, side, s.size(100, 4)) for n in (steps, 1))
        ways: dict[str, Callable[[], Any]] = {}
        counted: dict[str, Callable[[], Any]] = {}
        for dtype in ("float32", "bfloat16"):
            config = student(net, batch, accumulate, dtype)
            ways[f"dq, {dtype}"] = _epoch_of(data, config, s.seed)
            counted[f"dq, {dtype}"] = _epoch_of(step, config, s.seed)
        against = "dq, float32"
        if accumulate == 1:
            against = "DataLoader and PIL, float32"
            ways[against] = functools.partial(plain_epoch, s, usual, net, data, batch)
        group = f"student {net}, {side} px, batch {batch}" + (f" in {accumulate} parts" if accumulate > 1 else "")
        rows: dict[str, Any] = {"units": steps * batch, "unit": "image", "against": against, "parity": parity}
        compare(s, group, ways, **rows, counted=counted, scale=steps, repeats=s.size(3, 1))


def _epoch_of(data: TrainingSet, config: StudentConfig, seed: int) -> Callable[[], float]:
    return lambda: fit(data, config, seed=seed).seconds


def plain_epoch(s: Session, usual: Any, net: str, data: TrainingSet, batch: int) -> float:
    """Seconds of an epoch of the loop that most scripts have."""
    files = usual.Files(data.images.cpu(), data.labels.cpu())
    workers = s.size(min(8, available_cores()), 0)
    loader = torch.utils.data.DataLoader(files, batch, shuffle=True, num_workers=workers)
    fresh = make_net(net, data.num_classes, data.images.shape[-1], seed=s.seed)
    return float(usual.usual(fresh, loader, 1, s.device))


def student_parity(s: Session) -> dict[str, float]:
    """Difference of the update of one SGD step in float32 from that on the CPU."""
    size = {"images": s.size(8, 4), "side": s.size(64, 8), "classes": 4}
    config = dataclasses.replace(student("convnet3w32", size["images"], 1, "float32"), momentum=0.0, weight_decay=0.0)
    updates = []
    for device in (s.device, torch.device("cpu")):
        data = student_data(dataclasses.replace(s, device=device), **size)
        net = make_net(config.net, size["classes"], size["side"], seed=s.seed).to(device)
        before = parameters_to_vector(net.parameters()).detach().clone()
        with no_tf32():
            after = parameters_to_vector(fit(data, config, seed=s.seed, net=net).net.parameters())
        updates.append((after - before).cpu())
    return {"update in float32 against the CPU": difference(updates[0], updates[1])}


# --- several processes on one card -----------------------------------------------------------------------------


def students_side_by_side(s: Session) -> None:
    """Images per second of 1 to 4 trainings at once on one card, batches of 16 in two parts, bfloat16."""
    for processes in s.size((1, 2, 3, 4), (2,)):
        context = multiprocessing.get_context("spawn")
        barrier, results = context.Barrier(processes), context.Queue()
        workers = [context.Process(target=_train_beside, args=(s, barrier, results)) for _ in range(processes)]
        for w in workers:
            w.start()
        rates = [results.get(timeout=90) for _ in workers]
        for w in workers:
            w.join()
        if failures := [r for r in rates if isinstance(r, str)]:
            raise RuntimeError(f"a training beside others failed: {failures[0]}")
        name = f"students side by side: {processes} process(es)"
        s.write(name, numbers={"images_per_s": sum(rates), "of_the_slowest": min(rates)})


def _train_beside(s: Session, barrier: Any, results: Any) -> None:
    """Train for a while beside other processes and report images per second, or an error."""
    try:
        steps = s.size(60, 2)
        config = student(s.size("resnet18", "convnet3w32"), 16, 2, "bfloat16")
        data = student_data(s, 16 * steps, s.size(224, 16), s.size(100, 4))
        fit(data, config, seed=s.seed)
        barrier.wait(60)
        began = time.perf_counter()
        fit(data, config, seed=s.seed)
        wait(s.device)
        results.put(len(data.labels) / (time.perf_counter() - began))
    except Exception as e:
        results.put(f"{type(e).__name__}: {e}"[:300])


# --- FADRM --------------------------------------------------------------------------------------------------------


def fadrm_teacher(s: Session, net: str, side: int, device: torch.device) -> Teacher:
    """A network with freshly drawn weights."""
    module = make_net(net, s.size(100, 4), side, seed=s.seed).eval().requires_grad_(False)
    return Teacher(module.to(device, memory_format=torch.channels_last), *IMAGENET, 256, "gpu session", net)


def fadrm_batch(s: Session, size: int, side: int) -> Batch:
    """Images smoother than noise."""
    x = torch.rand(size, 3, side, side, generator=torch.Generator().manual_seed(s.seed))
    smooth = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
    return Batch(smooth.to(s.device), (torch.arange(size) % s.size(100, 4)).to(s.device))


def fadrm(s: Session) -> None:
    """Steps of FADRM by size of image and batch and by dtype, against a plain loop in float32."""
    net = s.size("resnet18", "convnet3-bn")
    plans = [(s.size(224, 16), s.size(100, 8)), (s.size(32, 8), 10), (s.size(224, 16), 10), (s.size(32, 8), 100)]
    for side, size in plans[: s.size(4, 2)]:
        steps = s.size(10 if size > 10 else 20, 2)
        batch, teacher = fadrm_batch(s, size, side), fadrm_teacher(s, net, side, s.device)
        configs = {dtype: fadrm_settings(side, steps, dtype) for dtype in ("float32", "bfloat16", "float16")}
        matched = match_teachers([teacher], configs["float32"], side=side, sizes=(side,))
        ways: dict[str, Callable[[], Any]] = {}
        for dtype, config in configs.items():
            ways[f"dq, {dtype}"] = _refining(batch, config, teacher, matched)
        counted = dict(ways)
        ways["plain loop, float32"] = plain_loop(s, net, side, batch, teacher, configs["float32"])
        rows: dict[str, Any] = {"units": size * steps, "unit": "image step", "against": "plain loop, float32"}
        rows["parity"] = fadrm_parity(s, net, side)
        compare(s, f"FADRM {net}, {side} px, batch {size}", ways, **rows, counted=counted, repeats=s.size(3, 1))


def fadrm_settings(side: int, steps: int, dtype: str) -> FADRM:
    return method.resolve(FADRM(sizes=(side,), steps=(steps,), dtype=dtype), side=side, teachers=1)  # type: ignore[arg-type]


def _refining(batch: Batch, config: FADRM, teacher: Teacher, matched: Any) -> Callable[[], object]:
    return lambda: method.refine(batch, config, [teacher], matched=matched)


def plain_loop(
    s: Session, net: str, side: int, batch: Batch, teacher: Teacher, config: FADRM
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The released recipe's loop of `benchmarks/refine.py` on the same images."""
    plain = load_script("benchmarks/refine.py").plain
    module = make_net(net, s.size(100, 4), side, seed=s.seed).eval().requires_grad_(False).to(s.device)
    module.load_state_dict(teacher.net.state_dict())
    mean, std = (torch.tensor(v, device=s.device).view(1, 3, 1, 1) for v in IMAGENET)
    return lambda: plain(module, batch.images, batch.labels, config, mean, std, s.seed)


def fadrm_parity(s: Session, net: str, side: int) -> dict[str, float]:
    """Largest relative difference of the losses of a few steps in float32 from those on the CPU."""
    config = fadrm_settings(side, s.size(3, 2), "float32")
    # rounding of a gradient that vanishes moves a pixel by twice the rate of Adam's first steps
    config, traces = dataclasses.replace(config, lr=config.lr / 100), []
    for device in (s.device, torch.device("cpu")):
        there = dataclasses.replace(s, device=device)
        with no_tf32():
            refined = method.refine(fadrm_batch(there, 4, side), config, [fadrm_teacher(there, net, side, device)])
        traces.append(refined.trace[:, :2].cpu())
    gap = (traces[0] - traces[1]).abs() / traces[1].abs().clamp(min=1)
    return {"losses in float32 against the CPU": float(gap.max())}


# --- where the time goes --------------------------------------------------------------------------------------


def profile(s: Session, name: str, work: Callable[[], object]) -> None:
    """Append the operations that take most time to OUT/NAME.txt."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if s.device.type == "cuda" else [])]
    work()
    wait(s.device)
    with record(activities=activities) as recorded:
        work()
        wait(s.device)
    order = "self_cuda_time_total" if s.device.type == "cuda" else "self_cpu_time_total"
    averages = recorded.key_averages()
    with open(s.output / f"{s.item}.txt", "a") as f:
        print(f"== {name}\n{averages.table(sort_by=order, row_limit=30)}", file=f)
    s.write(f"profile of {name}", numbers={"operations": len(averages), "file": f"{s.item}.txt"})


def profile_train(s: Session) -> None:
    """Profiles of an epoch of a student and of some steps of FADRM."""
    if s.device.type == "cuda" and "Fake" in torch.cuda.get_device_name():
        raise NotHere("a profile needs a device")
    net, side = s.size("resnet18", "convnet3-bn"), s.size(224, 16)
    data = student_data(s, s.size(160, 16), side, 4)
    profile(s, "a student in bfloat16, batches of 16 in 2 parts", _epoch_of(data, student(net, 16, 2, "bfloat16"), 0))
    batch, teacher = fadrm_batch(s, s.size(100, 4), side), fadrm_teacher(s, net, side, s.device)
    config = fadrm_settings(side, s.size(10, 2), "bfloat16")
    matched = match_teachers([teacher], config, side=side, sizes=(side,))
    profile(s, "FADRM in bfloat16", _refining(batch, config, teacher, matched))


if __name__ == "__main__":
    raise SystemExit("gpu_items_train is a module of gpu_session.py; run that")
