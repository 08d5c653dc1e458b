"""Teachers' logits of the views of an epoch."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dq.config.students import RelabelConfig
from dq.core.memory import run_with_batch_backoff
from dq.core.seeds import derive_seed, seeded
from dq.data.views import Views, apply_views, batches, parts
from dq.labels.packing import pack, unpack
from dq.labels.plan import EpochLabels, LabelPlan, LabelSource
from dq.networks.group_statistics import GroupStatistics
from dq.networks.teacher import Teacher, average_logits

TEACHER_BATCH = 256  # images at once where batches do not matter, and of parts that go through a teacher together
DEVICE_BYTES = 1 << 30  # of an epoch's logits that stay on the device until its end


@torch.inference_mode()
def label_epoch(
    images: Tensor, teachers: Sequence[Teacher], plan: LabelPlan, epoch: int, *, at_once: int | None = None
) -> tuple[Views, Tensor]:
    """Return views of one epoch and the teachers' mean logits of them.

    Logits are (N, C) float32, by position; images are (N, 3, S, S), uint8 or float in [0, 1], on the teachers' device.
    With `relabel.statistics: batch` the teachers' batch norm uses the statistics of each part of a batch (BSSL, the
    FADRM code): teacher and student, which takes the same parts, then normalize over the same images.

    Args:
        images: of the set.
        teachers: whose logits are averaged.
        plan: of the labels.
        epoch: label epoch, from 0.
        at_once: about how many images of parts go through the teachers together, each part with statistics of its
            own; 1: one part after another. Logits differ at most by the rounding of products in batches of another
            size. None: `TEACHER_BATCH` on an accelerator, 1 on the CPU, whose bits stay those of a part alone.
    """
    views = plan.draw(epoch)
    spans = batches(plan.images, plan.batch_size, plan.accumulate)
    together = (1 if images.device.type == "cpu" else TEACHER_BATCH) if at_once is None else at_once
    moved = views.on_device(images.device)
    mixed = (apply_views(plan.views, images, moved, i, span) for i, span in enumerate(spans))
    with contextlib.ExitStack() as stack:
        for t in teachers:
            stack.enter_context(_modes(t.net, plan.relabel))
        if plan.relabel.statistics == "running":
            logits = _of_images(teachers, mixed, plan)
        elif together == 1 or _draws_numbers(teachers, images, plan):
            logits = _of_parts(teachers, mixed, plan, epoch)
        else:
            logits = _of_groups(teachers, mixed, plan, together)
    return views, torch.cat(logits).cpu()


def _held(plan: LabelPlan) -> Callable[[Tensor], Tensor]:
    """What becomes of logits until the end of the epoch: they stay where they are, unless they are large."""
    return Tensor.cpu if plan.images * plan.classes * 4 > DEVICE_BYTES else lambda logits: logits


def _of_images(teachers: Sequence[Teacher], mixed: Iterable[Tensor], plan: LabelPlan) -> list[Tensor]:
    """Logits in evaluation mode, where batches do not change results and large ones are faster."""
    hold = _held(plan)
    logits: list[Tensor] = []
    pending: list[Tensor] = []

    def flush() -> None:
        x = torch.cat(pending)
        like = (*(t.digest for t in teachers), *x.shape[1:])
        call = functools.partial(mean_logits, teachers, average=plan.relabel.average)
        logits.append(hold(run_with_batch_backoff("label", len(x), lambda s: call(x[s]), like=like)))
        pending.clear()

    for x in mixed:
        pending.append(x)
        if sum(map(len, pending)) >= TEACHER_BATCH:
            flush()
    if pending:
        flush()
    return logits


def _of_parts(teachers: Sequence[Teacher], mixed: Iterable[Tensor], plan: LabelPlan, epoch: int) -> list[Tensor]:
    """Logits with the statistics of each part, one part after another."""
    hold, logits = _held(plan), []
    for i, x in enumerate(mixed):
        with seeded(derive_seed(plan.relabel.seed, "dropout", epoch, i), x.device):  # global generators only
            for part in parts(len(x), plan.accumulate):
                logits.append(hold(mean_logits(teachers, x[part], plan.relabel.average)))
    return logits


def _of_groups(teachers: Sequence[Teacher], mixed: Iterable[Tensor], plan: LabelPlan, at_once: int) -> list[Tensor]:
    """Logits with the statistics of each part, of about `at_once` images of parts of one size together."""
    hold = _held(plan)
    logits: dict[int, Tensor] = {}
    waiting: dict[int, list[tuple[int, Tensor]]] = {}  # by size of the part

    def flush(size: int) -> None:
        numbers, tensors = zip(*waiting.pop(size), strict=True)
        x = torch.stack(tensors)  # (G, P, 3, S, S)

        def some(s: slice) -> Tensor:
            with GroupStatistics(len(x[s])):
                return mean_logits(teachers, x[s].flatten(0, 1), plan.relabel.average).unflatten(0, (-1, size))

        like = ("parts", *(t.digest for t in teachers), *x.shape[1:])
        logits.update(zip(numbers, hold(run_with_batch_backoff("label", len(x), some, like=like)), strict=True))

    number = itertools.count()
    for x in mixed:
        for part in parts(len(x), plan.accumulate):
            size = part.stop - part.start
            waiting.setdefault(size, []).append((next(number), x[part]))
            if size * len(waiting[size]) >= at_once:
                flush(size)
    for size in list(waiting):
        flush(size)
    return [logits[i] for i in range(len(logits))]


def _draws_numbers(teachers: Sequence[Teacher], images: Tensor, plan: LabelPlan) -> bool:
    """Whether the teachers draw random numbers, which belong to the batch: some have dropout and some have not."""
    if not plan.relabel.dropout:
        return False
    x = images[:2].float() / (255 if images.dtype == torch.uint8 else 1)
    with seeded(0, images.device):
        before = _generator_states(images.device)
        mean_logits(teachers, x)
        return any(not torch.equal(a, b) for a, b in zip(before, _generator_states(images.device), strict=True))


def _generator_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def mean_logits(teachers: Sequence[Teacher], x: Tensor, average: str = "logits") -> Tensor:
    """Return `average_logits` of the teachers for pixels (B, 3, S, S)."""
    return average_logits(
        [t(x) for t in teachers], [t.weight for t in teachers], probabilities=average == "probabilities"
    )


@contextlib.contextmanager
def _modes(net: nn.Module, relabel: RelabelConfig) -> Iterator[None]:
    """Set evaluation mode within a block; with `statistics: batch` training mode of batch norm.

    The running statistics are not changed. The released code puts all of the network in training mode, dropout too,
    and changes the running statistics.
    """
    grouped = relabel.statistics == "batch"
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    modes = [(m, m.training) for m in net.modules()]
    momenta = [m.momentum for m in norms]
    counters = [None if m.num_batches_tracked is None else m.num_batches_tracked.clone() for m in norms]
    net.train(grouped and relabel.dropout)
    for m in norms:
        m.train(grouped)
        m.momentum = 0.0
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for m, momentum, counter in zip(norms, momenta, counters, strict=True):
            m.momentum = momentum
            if m.num_batches_tracked is not None and counter is not None:
                m.num_batches_tracked.copy_(counter)


def online_labels(images: Tensor, teachers: Sequence[Teacher], plan: LabelPlan) -> LabelSource:
    """Return labels that are computed on demand, with the rounding of stored ones."""

    def epoch_labels(epoch: int) -> EpochLabels:
        views, logits = label_epoch(images, teachers, plan, (epoch - 1) % plan.epochs)
        return EpochLabels(plan, views, unpack(pack(logits, plan.relabel), plan.classes))

    return epoch_labels
