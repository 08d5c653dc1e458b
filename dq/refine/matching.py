"""Differentiable distance of batch norm statistics to those of training data.

For the inputs f_l of the teacher's batch norm layers, l in the order in which the network calls them:

    S(x) = sum_l w_l ( | v_l - Var f_l(x) |_2 + | m_l - Mean f_l(x) |_2 ),

Mean and biased Var per channel over batch and pixels, m_l and v_l the running statistics (Yin et al. 2020; unsquared
and w_0 = 10 as in SRe2L and FADRM), or those of a group of real images (`dq.refine.groups`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.config.refinement import DepthConfig, MatchingConfig
from dq.core.errors import InputError
from dq.refine.method import Context
from dq.refine.moments import Moments

M = TypeVar("M", bound=MatchingConfig)


@dataclass(frozen=True)
class Layer:
    """A batch norm layer where the network calls it."""

    name: str
    norm: nn.BatchNorm2d
    params: int  # weights of the convolutions called since the layer before

    @property
    def channels(self) -> int:
        return self.norm.num_features

    @property
    def mean(self) -> Tensor:
        """(C,) running mean of the layer's inputs."""
        return self.norm.running_mean  # type: ignore[return-value]

    @property
    def var(self) -> Tensor:
        """(C,) running variance."""
        return self.norm.running_var  # type: ignore[return-value]


class _Moments(torch.autograd.Function):
    """Mean and biased variance of x (B, C, H, W) per channel, in float32.

    The gradient of both is an affine function of x, so one pass gives it: d/dx = p (g_m + 2 g_v (x - m)) / HW with
    image weights p. Deviations are taken from `center` (a value near the mean), so that nothing cancels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, center: Tensor, p: Tensor | None) -> tuple[Tensor, Tensor]:
        first, second = _centered_moments(x, center, p)
        mean = center + first
        ctx.save_for_backward(x, mean, *([] if p is None else [p]))
        return mean, second - first.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, mean, *p = ctx.saved_tensors
        return _moment_gradient(x, mean, grads[0], grads[1], p[0] if p else None).to(x.dtype), None, None


class _NormAndMoments(torch.autograd.Function):
    """Batch norm in evaluation mode together with `_Moments` of its input.

    One saved tensor and two passes backwards, where autograd would need six.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, p: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        norm, center = layer.norm, layer.mean
        first, second = _centered_moments(x, center, p)
        mean = center + first
        ctx.save_for_backward(x, mean, scale, *([] if p is None else [p]))
        y = F.batch_norm(x, center, layer.var, norm.weight, norm.bias, False, 0.0, norm.eps)
        return y, mean, second - first.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, mean, scale, *p = ctx.saved_tensors
        total = _moment_gradient(x, mean, grads[1], grads[2], p[0] if p else None)
        return total.addcmul_(grads[0], scale.view(1, -1, 1, 1)).to(x.dtype), None, None, None


def _centered_moments(x: Tensor, center: Tensor, p: Tensor | None) -> tuple[Tensor, Tensor]:
    # The two-pass sum is up to forty times as fast on a CPU as torch.var, which goes channel by channel
    d = x.float() - center.view(1, -1, 1, 1)
    if p is None:
        first = d.mean((0, 2, 3))
        return first, d.square_().mean((0, 2, 3))
    first = p @ d.mean((2, 3))
    return first, p @ d.square_().mean((2, 3))


def _moment_gradient(x: Tensor, mean: Tensor, g_mean: Tensor, g_var: Tensor, p: Tensor | None) -> Tensor:
    b, _, h, w = x.shape
    share = 1 / (b * h * w) if p is None else p.view(-1, 1, 1, 1) / (h * w)
    slope = 2 * g_var
    offset = (g_mean - slope * mean).view(1, -1, 1, 1)
    slope = slope.view(1, -1, 1, 1)
    if p is None:
        return torch.addcmul(offset * share, x.float(), slope * share)
    return torch.addcmul(offset, x.float(), slope).mul_(share)


def trace_layers(net: nn.Module, see: Callable[[], Any]) -> list[Layer]:
    """Trace the batch norm layers of a network in order of calls.

    `see` shows the network an image.
    """
    layers: list[Layer] = []
    pending = 0
    names = {m: name for name, m in net.named_modules()}

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal pending
        if isinstance(module, nn.BatchNorm2d):
            layers.append(Layer(names[module], module, pending))
            pending = 0
        elif isinstance(module, nn.Conv2d):
            pending += module.weight.numel()

    kinds = (nn.BatchNorm2d, nn.Conv2d)
    hooks = [m.register_forward_pre_hook(note) for m in net.modules() if isinstance(m, kinds)]
    try:
        see()
    finally:
        for hook in hooks:
            hook.remove()
    stateless = next((a.name for a in layers if a.norm.running_mean is None), None)
    if stateless is not None:
        raise InputError(f"the norm {stateless!r} of a teacher keeps no running statistics; choose another teacher")
    twice = next((a.name for i, a in enumerate(layers) if any(a.norm is b.norm for b in layers[:i])), None)
    if twice is not None:
        raise InputError(f"the teacher calls its norm {twice!r} twice for one image; choose another teacher")
    return layers


def pad_drop(ipc: int, class_size: int) -> float:
    """PAD's rule for `DepthConfig.drop` (arXiv 2408.03360, section 4).

    0 at one image per class, .25 below a tenth of the data, .5 from there, .75 from 1,000 images per class.
    """
    if ipc <= 1:
        return 0.0
    if ipc >= 1000:
        return 0.75
    return 0.5 if ipc >= 0.1 * class_size else 0.25


def resolve_depth(config: M, context: Context) -> M:
    """Fill in a `depth.drop` of None by PAD's rule."""
    if config.depth.drop is not None or context.ipc is None or context.class_size is None:
        return config
    drop = pad_drop(context.ipc, context.class_size)
    return dataclasses.replace(config, depth=dataclasses.replace(config.depth, drop=drop))


def layer_weights(
    layers: Sequence[Layer], depth: DepthConfig, *, first_weight: float = 10.0, drop: float | None = None
) -> tuple[Tensor, Tensor]:
    """Weights (L,) of all layers and of the matched ones, 0 for others.

    A layer is dropped if the share of depth up to and with it is at most `drop`. In layers that is l < int(drop L).
    `drop` takes the place of `depth.drop`, if that is left to a rule.
    """
    total = len(layers)
    weights = torch.ones(total)
    if not total:
        return weights, weights
    weights[0] = first_weight
    ramp = ((torch.arange(total) + 1) / total) ** depth.ramp
    amount = {"layer": [1] * total, "channel": [a.channels for a in layers], "param": [a.params for a in layers]}
    passed = torch.tensor(amount[depth.unit], dtype=torch.float64).cumsum(0)
    drop = (depth.drop if drop is None else drop) or 0.0
    shallow = (passed <= drop * passed[-1] * (1 + 1e-12)) & (drop > 0)
    keep = shallow if depth.keep == "shallow" else ~shallow
    if not keep.any():
        change = "raise it, or set keep=deep" if depth.keep == "shallow" else "lower it"
        raise InputError(f"drop={drop:g} of depth leaves none of {total} layers to match; {change}")
    matched = weights * ramp * keep
    if depth.renorm == "count":
        matched = matched * (total / int(keep.sum()))
    return weights, matched


class StatMatcher:
    """Reads the statistics of a network's batch norm inputs in forward passes.

    A context manager: what it changes in the network is undone on exit. The network must be in evaluation mode.

    Example:
        with StatMatcher(net, layers, weights) as matcher:
            loss = criterion(net(x), y) + 0.01 * matcher.distance()
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        weights: Tensor,
        *,
        norm: Literal["l2", "squared"] = "l2",
        image_weights: Tensor | None = None,
        targets: Sequence[Moments] | None = None,
    ) -> None:
        """Choose the layers that are read.

        Args:
            layers: of `trace_layers`.
            weights: (L,), of `layer_weights`; layers of weight 0 are not read.
            norm: "l2" as above, "squared" for squared norms (Teddy's formula).
            image_weights: (B,) weights of the images of a batch in its statistics; None: all alike.
            targets: (C_l,) of every layer, on its device, in place of its running statistics; None: these.
        """
        self.weights = weights.tolist()
        running = [Moments(a.mean, a.var) for a in layers] if targets is None else targets
        self.targets = [m for m, w in zip(running, self.weights, strict=True) if w]
        self.layers = [a for a, w in zip(layers, self.weights, strict=True) if w]
        self.weights = [w for w in self.weights if w]
        self.norm = norm
        self.image_weights = None if image_weights is None else image_weights / image_weights.sum()
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._hooks: list[Any] = []
        self._fused = [self._fuse(a) if type(a.norm) is nn.BatchNorm2d else None for a in self.layers]

    def __enter__(self) -> StatMatcher:
        for layer, fused in zip(self.layers, self._fused, strict=True):
            if layer.norm.training:
                raise InputError(f"the norm {layer.name!r} is in training mode; call eval() on the teacher")
            if fused is not None:
                layer.norm.forward = fused  # type: ignore[method-assign, assignment]
            else:  # a subclass does more than normalize (timm's also activates)
                self._hooks.append(layer.norm.register_forward_pre_hook(self._reader(layer)))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for layer in self.layers:
            layer.norm.__dict__.pop("forward", None)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._seen.clear()

    def _fuse(self, layer: Layer) -> Callable[[Tensor], Tensor]:
        """A forward function that also notes the moments of its input."""
        scale = torch.rsqrt(layer.var + layer.norm.eps)
        if layer.norm.weight is not None:
            scale = scale * layer.norm.weight.detach()

        def forward(x: Tensor) -> Tensor:
            y, mean, var = _NormAndMoments.apply(x, layer, self.image_weights, scale)
            self._seen[layer.name] = (mean, var)
            return y

        return forward

    def _reader(self, layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._seen[layer.name] = _Moments.apply(args[0], layer.mean, self.image_weights)

        return read

    def terms(self) -> list[Tensor]:
        """Distance of every read layer in the last forward pass, without its weight."""
        terms = []
        for layer, target in zip(self.layers, self.targets, strict=True):
            mean, var = self._seen[layer.name]
            differences = (target.var - var, target.mean - mean)
            if self.norm == "l2":
                terms.append(sum(torch.linalg.vector_norm(d) for d in differences))
            else:
                terms.append(sum(d.square().sum() for d in differences))
        return terms

    def distance(self) -> Tensor:
        """S () of the last forward pass, 0 without batch norm; frees its moments."""
        terms = self.terms()
        total = torch.zeros((), device=terms[0].device if terms else None)
        for weight, term in zip(self.weights, terms, strict=True):
            total = total + weight * term
        self._seen.clear()
        return total
