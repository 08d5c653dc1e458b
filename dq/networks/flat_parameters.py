"""Network as a function of one vector of all its parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from dq.core.errors import InputError
from dq.networks.zoo import make_net


class Cut(NamedTuple):
    """End of a share of the parameters."""

    first: int  # index of the first parameter after the cut
    layer: str  # that holds it
    share: float  # of this layer's parameters before the cut


class FlatNet:
    """Network of `make_net` as a function of its parameters (P,).

    They are in the order of registration, the weight of a layer before its bias: for a ConvNet from the shallowest to
    the deepest.
    """

    def __init__(self, name: str, num_classes: int, image_size: int) -> None:
        """Build the network's structure; its own weights are never used.

        Raises:
            InputError: if it is unknown, or gathers statistics over batches, which a vector of parameters leaves out.
        """
        self.name, self.classes, self.side = name, num_classes, image_size
        self.net = make_net(name, num_classes, image_size, seed=0)
        if len(list(self.net.buffers())):
            raise InputError(
                f"network {name!r} gathers statistics over batches, which trajectories of parameters do not hold; "
                "take one with instance norm, such as convnet3"
            )
        parameters = dict(self.net.named_parameters())
        self.names = tuple(parameters)
        self.shapes = tuple(tuple(p.shape) for p in parameters.values())
        self.sizes = tuple(p.numel() for p in parameters.values())
        self.size = sum(self.sizes)

    def to(self, device: torch.device | str) -> FlatNet:
        """Move the structure to a device."""
        self.net.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def initial(self, seed: int) -> Tensor:
        """Draw initial parameters (P,) float32 on the CPU."""
        net = make_net(self.name, self.classes, self.side, seed=seed)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, 3, S, S) for parameters (P,).

        They are differentiable any number of times in both.
        """
        parts = zip(self.names, theta.split(self.sizes), self.shapes, strict=True)
        return functional_call(self.net, {name: part.view(shape) for name, part, shape in parts}, (x,))

    def cut(self, share: float) -> Cut:
        """Return the position after the first `share` of all parameters, in [0, 1)."""
        index = int(share * self.size)
        layers: dict[str, int] = {}
        for name, size in zip(self.names, self.sizes, strict=True):
            layer = name.rpartition(".")[0]
            layers[layer] = layers.get(layer, 0) + size
        begin = 0
        for layer, size in layers.items():
            if index < begin + size:
                return Cut(index, layer, (index - begin) / size)
            begin += size
        raise InputError(f"a share of the parameters lies in [0, 1), not {share:g}")
