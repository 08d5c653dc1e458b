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
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dq.config.refinement import DepthConfig, MatchingConfig
from dq.core.errors import InputError
from dq.refine.batch_statistics import InputSums, NormAndSums, StatisticsDistance, Sums
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
        read = weights.tolist()
        running = [Moments(a.mean, a.var) for a in layers] if targets is None else targets
        targets = [m for m, w in zip(running, read, strict=True) if w]
        self.layers = [a for a, w in zip(layers, read, strict=True) if w]
        self.image_weights = None if image_weights is None else image_weights / image_weights.sum()
        self._distance: StatisticsDistance | None = None
        if self.layers:
            centers = [a.mean for a in self.layers]
            self._distance = StatisticsDistance.of(targets, centers, norm)
            self._weights = torch.tensor([w for w in read if w]).to(centers[0].device)
        self._seen: dict[str, tuple[Sums, int]] = {}
        self._hooks: list[RemovableHandle] = []
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
            y, *sums = NormAndSums.apply(x, layer.norm, self.image_weights, scale)
            self._note(layer, x, sums)
            return y

        return forward

    def _reader(self, layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._note(layer, args[0], InputSums.apply(args[0], layer.mean, self.image_weights))

        return read

    def _note(self, layer: Layer, x: Tensor, sums: Sequence[Tensor]) -> None:
        # the weights of images sum to 1
        values = x.shape[2] * x.shape[3] * (len(x) if self.image_weights is None else 1)
        self._seen[layer.name] = ((sums[0], sums[1]), values)

    def terms(self) -> Tensor:
        """Distances (L,) of the read layers in the last forward pass, without their weights."""
        if self._distance is None:
            return torch.zeros(0)
        seen = [self._seen[a.name] for a in self.layers]
        return self._distance([sums for sums, _ in seen], tuple(values for _, values in seen))

    def distance(self) -> Tensor:
        """S () of the last forward pass, 0 without batch norm; frees its sums."""
        terms = self.terms()
        self._seen.clear()
        return (terms * self._weights).sum() if len(terms) else terms.sum()
