"""Teachers: trained classifiers that label images and are matched."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.core.constants import constant
from dq.core.errors import InputError
from dq.core.memory import run_with_batch_backoff

TEACHER_FACTS = "teacher.json"  # beside the weights: network and normalization, as `dq train-teachers` writes it
Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std by channel, of pixels in [0, 1]
IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Teacher:
    """Trained classifier with its normalization and classes."""

    net: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int
    digest: str  # of network, weights, normalization, classes and side
    name: str  # for tables
    classes: tuple[int, ...] | None = None  # output of the network for each class; None: all, in order
    image_size: int | None = None  # side in px at which the network sees the images; None: as they are
    weight: float = 1.0  # of its logits in the mean of several teachers
    matched: bool = True  # False: it labels, and refinement does not match it

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return `differentiable` without recording gradients."""
        return self.differentiable(x)

    def differentiable(self, x: Tensor) -> Tensor:
        """Return logits (B, C) float32 of float pixels (B, 3, S, S) in [0, 1].

        Both are on the teacher's device. The network stays in its mode, training or evaluation; gradients reach x and
        no weight.
        """
        if self.image_size is not None and x.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (constant(v, x.device, x.dtype).view(1, -1, 1, 1) for v in (self.mean, self.std))
        x = (x - mean) / std
        logits = self.net(x).float()
        return logits if self.classes is None else logits[:, constant(self.classes, logits.device, torch.int64)]

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (N, C) float32 on the CPU in evaluation mode.

        Images (N, 3, H, W) are uint8 or float in [0, 1].
        """
        with evaluation_mode(self.net):
            return self.in_batches(images, lambda x: self(x).cpu())

    def features(self, images: Tensor) -> Tensor:
        """Return inputs (N, D) of the last linear layer, float32 on the CPU, in evaluation mode.

        Images are (N, 3, H, W). For a network without a linear layer, those of its last convolution.
        """
        with evaluation_mode(self.net), head_inputs(self.net) as inputs:

            def features(x: Tensor) -> Tensor:
                inputs.clear()
                self(x)
                return inputs[-1].flatten(1).float().cpu()

            return self.in_batches(images, features)

    def in_batches(self, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function to all images (N, 3, H, W) in batches that fit into memory.

        It takes float pixels (B, 3, H, W) in [0, 1] on the teacher's device.
        """

        def one(x: Tensor) -> Tensor:
            return run_with_batch_backoff("teacher", len(x), lambda s: compute(x[s]), like=(self.digest, *x.shape[1:]))

        return torch.cat([one(x) for x in self._batches(images)])

    def _batches(self, images: Tensor) -> Iterator[Tensor]:
        device = next(self.net.parameters()).device
        for batch in images.split(self.batch_size):
            yield batch.to(device, non_blocking=True).float() / (255 if batch.dtype == torch.uint8 else 1)


def pooled_logits(teachers: Sequence[Teacher], images: Tensor) -> Tensor:
    """Return `average_logits` of `Teacher.logits`, (N, C) float32 on the CPU."""
    return average_logits([t.logits(images) for t in teachers], [t.weight for t in teachers])


def average_logits(logits: Sequence[Tensor], weights: Sequence[float], *, probabilities: bool = False) -> Tensor:
    """Average several teachers' logits (N, C) by weights, as EDC and CV-DD do.

    With `probabilities`, return the log of the weighted mean of their probabilities.
    """
    if len(logits) == 1:
        return logits[0]
    shares = [w / sum(weights) for w in weights]
    if probabilities:
        logs = [F.log_softmax(x, 1) + math.log(s) for x, s in zip(logits, shares, strict=True)]
        return torch.logsumexp(torch.stack(logs), 0)
    total = logits[0] * shares[0]
    for x, share in zip(logits[1:], shares[1:], strict=True):
        total = total + x * share
    return total


@contextlib.contextmanager
def head_inputs(net: nn.Module, *, enabled: bool = True) -> Iterator[list[Tensor]]:
    """Collect the last linear layer's inputs of every forward pass within the block.

    The list stays empty unless `enabled`.
    """
    inputs: list[Tensor] = []
    if not enabled:
        yield inputs
        return
    hook = head_of(net)[1].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        hook.remove()


@contextlib.contextmanager
def evaluation_mode(net: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside the block, and restore all modes after it."""
    training = [m for m in net.modules() if m.training]
    net.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def head_of(net: nn.Module) -> tuple[str, nn.Module]:
    """Return the last linear layer or else convolution, with its name."""
    for kind in (nn.Linear, nn.Conv2d):
        layers = [(name, m) for name, m in net.named_modules() if isinstance(m, kind)]
        if layers:
            return layers[-1]
    raise InputError(f"{type(net).__name__} has neither a linear layer nor a convolution; choose another network")
