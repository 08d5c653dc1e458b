"""Teachers' logits of the views of an epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dq.config.students import RelabelConfig
from dq.core.memory import run_with_batch_backoff
from dq.core.seeds import derive_seed, seeded
from dq.data.views import Views, apply_views, batches, parts
from dq.labels.packing import pack, unpack
from dq.labels.plan import EpochLabels, LabelPlan, LabelSource
from dq.networks.teacher import Teacher, average_logits

TEACHER_BATCH = 256  # images at once where batches do not matter


@torch.inference_mode()
def label_epoch(images: Tensor, teachers: Sequence[Teacher], plan: LabelPlan, epoch: int) -> tuple[Views, Tensor]:
    """Return views of one epoch and the teachers' mean logits of them.

    Logits are (N, C) float32, by position; images are (N, 3, S, S), uint8 or float in [0, 1], on the teachers' device.
    With `relabel.statistics: batch` the teachers' batch norm uses the statistics of each part of a batch (BSSL, the
    FADRM code): teacher and student, which takes the same parts, then normalize over the same images.
    """
    views = plan.draw(epoch)
    spans = batches(plan.images, plan.batch_size, plan.accumulate)
    grouped = plan.relabel.statistics == "batch"
    logits: list[Tensor] = []
    pending: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for t in teachers:
            stack.enter_context(_modes(t.net, plan.relabel))
        for i, span in enumerate(spans):
            x = apply_views(plan.views, images, views, i, span)
            if not grouped:
                # in evaluation mode batches do not change results, and large ones are faster
                pending.append(x)
                if sum(map(len, pending)) >= TEACHER_BATCH or i + 1 == len(spans):
                    logits.append(_mean_in_pieces(teachers, torch.cat(pending), plan.relabel.average))
                    pending = []
                continue
            with seeded(derive_seed(plan.relabel.seed, "dropout", epoch, i), images.device):  # global generators only
                for part in parts(len(x), plan.accumulate):
                    logits.append(mean_logits(teachers, x[part], plan.relabel.average).cpu())
    return views, torch.cat(logits)


def _mean_in_pieces(teachers: Sequence[Teacher], x: Tensor, average: str) -> Tensor:
    like = (*(t.digest for t in teachers), *x.shape[1:])
    return run_with_batch_backoff("label", len(x), lambda s: mean_logits(teachers, x[s], average).cpu(), like=like)


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
