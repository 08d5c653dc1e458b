"""Structured pruning of a trained network's channels."""

from __future__ import annotations

import copy

import torch
from torch import nn

from dq.core.errors import InputError


def prune(net: nn.Module, image_size: int, ratio: float, criterion: str, *, seed: int) -> nn.Module:
    """Return a copy of a network without a share `ratio` of its channels (DepGraph, Fang et al. 2023).

    Structurally pruned group by group by the torch-pruning library. The channels of the classifier's output stay. Of a
    network whose shortcuts pad channels with zeros only the inner channels of its blocks are pruned, since no group of
    channels runs through such a shortcut. `criterion` "magnitude" removes the channels with the smallest norm of
    weights, "random" any, drawn by `seed`.

    Raises:
        InputError: if torch-pruning is not installed, or cannot prune the network.
    """
    try:
        import torch_pruning as tp
    except ImportError as e:
        raise InputError(
            "generation=post needs torch-pruning, which is not installed; pip install 'dq-distill[pruning]', "
            "or set train_pool.generation=prior"
        ) from e
    from dq.core.seeds import seeded
    from dq.networks.classic import ShortcutA

    device = next(net.parameters()).device
    copied = copy.deepcopy(net).eval().requires_grad_(True)
    heads = [m for m in copied.modules() if isinstance(m, nn.Linear)]
    ignored: list[nn.Module] = [heads[-1]] if heads else []
    if any(isinstance(m, ShortcutA) for m in copied.modules()):
        ignored += [
            m for n, m in copied.named_modules() if isinstance(m, nn.Conv2d) and (n == "conv1" or n.endswith("conv2"))
        ]
    importance = (
        tp.importance.MagnitudeImportance(p=2) if criterion == "magnitude" else tp.importance.RandomImportance()
    )
    example = torch.zeros(1, 3, image_size, image_size, device=device)
    try:
        with seeded(seed):
            pruner = tp.pruner.BasePruner(
                copied, example, importance=importance, pruning_ratio=ratio, ignored_layers=ignored
            )
            pruner.step()
        with torch.no_grad():
            copied(example)
    except (ArithmeticError, AssertionError, AttributeError, IndexError, RuntimeError, ValueError) as e:
        message = " ".join(str(e).split())[:120]
        raise InputError(
            f"torch-pruning cannot prune this {type(net).__name__} ({type(e).__name__}: {message}); choose another "
            "train_pool.base, or train_pool.generation=prior"
        ) from e
    return copied
