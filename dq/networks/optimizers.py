"""Which parameters of a network which optimizer takes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def muon_groups(
    model: nn.Module, output_layers: Sequence[str] = ()
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Hidden matrices, for Muon, and all other parameters, for AdamW, both by name (Jordan et al. 2024).

    Hidden matrices are the weights (out, in) of linear layers except output layers. Embeddings, convolutions, norms
    and biases go to AdamW. Parameters that need no gradient are in neither.

    Args:
        output_layers: last parts of the names of modules that are output layers; none: the last linear layer.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    outputs = {n for n in linear if n.rpartition(".")[2] in output_layers} if output_layers else set(list(linear)[-1:])
    matrices = {f"{name}.weight".lstrip(".") for name in linear if name not in outputs}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = {name: p for name, p in trained.items() if name in matrices}
    return hidden, {name: p for name, p in trained.items() if name not in hidden}
