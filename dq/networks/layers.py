"""What the layers of a network ask of a training loop."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

# layers of torch that draw in training mode; others, such as those of transformers, draw through these
DRAWING = (_DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.MultiheadAttention, nn.RNNBase)
KNOWN = ("torch.nn.", "dq.networks.")  # modules whose other layers draw nothing


def draws_randomly(net: nn.Module) -> bool:
    """Return whether a forward pass in training mode may draw random numbers.

    Layers of other libraries are taken to: many call dropout as a function.
    """
    return any(isinstance(m, DRAWING) or not type(m).__module__.startswith(KNOWN) for m in net.modules())


def count_on_host(net: nn.Module) -> None:
    """Keep the batch counters of batch norm on the CPU, where counting launches no kernel."""
    counters_to(torch.device("cpu"), net)


def counters_to(device: torch.device, net: nn.Module) -> None:
    """Move the batch counters of batch norm to a device."""
    for m in net.modules():
        if isinstance(m, _BatchNorm) and m.num_batches_tracked is not None:
            m.num_batches_tracked = m.num_batches_tracked.to(device)
