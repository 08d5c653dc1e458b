"""Optimizers of networks, and Muon with AdamW as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dq.config.students import StudentConfig
from dq.core.devices import is_slow
from dq.core.errors import InputError
from dq.core.plain import PlainDict, PlainMapping


def muon_groups(
    model: nn.Module, output_layers: Sequence[str] = (), *, convolutions: bool = False
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Split parameters into hidden matrices, for Muon, and others, for AdamW (Jordan et al. 2024).

    Both by name. Hidden matrices are the weights (out, in) of linear layers except output layers. Embeddings,
    convolutions, norms and biases go to AdamW. Parameters that need no gradient are in neither.

    `output_layers` are last parts of the names of modules that are output layers; none: the last linear layer, or the
    last convolution where there is no linear layer and convolutions count. With `convolutions`, kernels (out, in, h,
    w) are hidden matrices (out, in h w), the first layer's included, as in Jordan's networks for CIFAR-10.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    kernels = {name: m for name, m in model.named_modules() if convolutions and isinstance(m, nn.Conv2d)}
    layers = [*linear, *kernels]
    outputs = {n for n in layers if n.rpartition(".")[2] in output_layers}
    outputs = outputs if output_layers else set(list(linear or kernels)[-1:])
    matrices = {f"{name}.weight".lstrip(".") for name in layers if name not in outputs}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = {name: p for name, p in trained.items() if name in matrices}
    return hidden, {name: p for name, p in trained.items() if name not in hidden}


class MuonAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for all other parameters, as one optimizer.

    `torch.optim.Muon` takes parameters of two dimensions alone: it is given the kernels of convolutions as matrices
    (out, in h w) that share their memory. Its updates are scaled to the size of AdamW's, 0.2 sqrt(max(out, in)) times
    the orthogonal matrix (Liu et al. 2025), so that both take the same learning rate and weight decay.

    A step in bfloat16 is torch's, bit for bit. Where the device emulates bfloat16, the matrices are orthogonalized in
    float32, which torch cannot. The dtype is part of the state: a training goes on in that in which it began.

    Args:
        hidden: parameters of two or four dimensions.
        others: groups of the other parameters, as `torch.optim.AdamW` takes them.
        lr: of both.
        weight_decay: of the hidden matrices.
        dtype: in which matrices are orthogonalized, "bfloat16" or "float32". None: bfloat16 unless the device of the
            hidden matrices emulates it.

    Raises:
        InputError: if nothing is hidden, or this torch has no Muon.
    """

    def __init__(
        self,
        hidden: Sequence[nn.Parameter],
        others: Sequence[PlainDict],
        *,
        lr: float,
        weight_decay: float,
        dtype: str | None = None,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise InputError(f"optimizer=muon needs torch 2.9 or newer, not {torch.__version__}; take adamw")
        if not hidden:
            raise InputError("optimizer=muon needs a network with hidden matrices, and this one has none; take adamw")
        super().__init__([*hidden, *(p for group in others for p in group["params"])], {"lr": lr})
        self.hidden = tuple(hidden)
        self.matrices = tuple(nn.Parameter(as_matrix(p.detach(), p)) for p in hidden)
        options: PlainDict = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        self.muon = torch.optim.Muon(self.matrices, **options)
        dtype = dtype or ("float32" if is_slow("bfloat16", hidden[0].device) else "bfloat16")
        self.muon.param_groups[0]["dtype"] = dtype
        self.adamw = torch.optim.AdamW(others, lr=lr)
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for matrix, p in zip(self.matrices, self.hidden, strict=True):
            matrix.data = as_matrix(p.detach(), p)
            matrix.grad = None if p.grad is None else as_matrix(p.grad, p)
        for p in self.matrices:
            if p.grad is not None:
                _muon_step(p, p.grad, self.muon.state[p], self.muon.param_groups[0])
        self.adamw.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of both; those of hidden matrices to None in any case."""
        for p in self.hidden:
            p.grad = None
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> PlainDict:
        """Return states by number, hidden matrices first, and the groups of both."""
        first, second = self.muon.state_dict(), self.adamw.state_dict()
        states = first["state"] | {len(self.hidden) + i: state for i, state in second["state"].items()}
        return {"state": states, "param_groups": [*first["param_groups"], *second["param_groups"]]}

    def load_state_dict(self, state_dict: PlainMapping) -> None:
        """Load the result of `state_dict`."""
        groups, n = state_dict["param_groups"], len(self.hidden)
        first = {i: state for i, state in state_dict["state"].items() if i < n}
        second = {i - n: state for i, state in state_dict["state"].items() if i >= n}
        # states from before the dtype was part of them are of bfloat16
        self.muon.load_state_dict({"state": first, "param_groups": [{"dtype": "bfloat16"} | groups[0]]})
        self.adamw.load_state_dict({"state": second, "param_groups": groups[1:]})
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]


def _muon_step(p: nn.Parameter, gradient: Tensor, state: PlainDict, group: PlainDict) -> None:
    """Step a matrix along its orthogonalized momentum, in place (`torch.optim.Muon`, Nesterov).

    `group` has the settings of `torch.optim.Muon` and "dtype".
    """
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(gradient)
    buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
    update = orthogonalize(gradient.lerp(buffer, group["momentum"]), getattr(torch, group["dtype"]))
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.add_(update, alpha=-group["lr"] * (0.2 * max(p.shape) ** 0.5))


def orthogonalize(x: Tensor, dtype: torch.dtype, *, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Replace the singular values of a matrix by numbers between about 0.5 and 1.5 (Jordan et al. 2024).

    Newton-Schulz iterations of the polynomial 3.4445 x - 4.775 x^3 + 2.0315 x^5, as in `torch.optim.Muon`, which
    computes in bfloat16 alone.

    Args:
        x: (n, m).
        dtype: of the products and of the result.
        steps: number of iterations.
        eps: least norm by which x is divided.
    """
    wide = len(x) <= x.shape[1]
    y = (x if wide else x.T).to(dtype)
    y = y / y.norm().clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), y, beta=3.4445)
    return y if wide else y.T


def as_matrix(x: Tensor, p: Tensor) -> Tensor:
    """Reshape x, of the shape of p, to a matrix (out, in h w).

    Its columns are in the order of p's memory.

    The result for p itself is a view. Kernels in the layout `channels_last` become (out, h w in): orthogonalization
    does not depend on the order of columns.
    """
    if p.ndim == 4 and not p.is_contiguous():
        return x.permute(0, 2, 3, 1).reshape(len(x), -1)
    return x.reshape(len(x), -1)


def make_optimizer(net: nn.Module, config: StudentConfig) -> torch.optim.Optimizer:
    """Make the optimizer of a training, with its weight decay.

    SGD decays every parameter, AdamW only those with more than one dimension, each as most published recipes do;
    `decay_vectors` overrides that. Muon takes hidden matrices and kernels, AdamW the others.
    """
    decay_vectors = config.optimizer == "sgd" if config.decay_vectors is None else config.decay_vectors
    hidden = list(muon_groups(net, convolutions=True)[0].values()) if config.optimizer == "muon" else []
    taken = set(map(id, hidden))
    matrices = [p for p in net.parameters() if p.ndim > 1 and id(p) not in taken]
    vectors = [p for p in net.parameters() if p.ndim <= 1]  # biases and norms
    groups: list[PlainDict] = [{"params": matrices, "weight_decay": config.weight_decay}]
    groups.append({"params": vectors, "weight_decay": config.weight_decay if decay_vectors else 0.0})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused_on(net))
    if config.optimizer == "muon":
        return MuonAdamW(hidden, groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, fused=fused_on(net))


def fused_on(net: nn.Module) -> bool | None:
    """Return whether the optimizer of a network is one kernel: on CUDA.

    On a CPU it rounds otherwise than torch's default, with which results were made.
    """
    return all(p.is_cuda and p.is_floating_point() for p in net.parameters()) or None


def take_gradients(net: nn.Module, before: dict[nn.Parameter, Tensor] | None) -> dict[nn.Parameter, Tensor]:
    """Take the gradients from the parameters of a network and add those of the parts of a batch before.

    They are added to those of all parameters at once, where autograd would launch a kernel for each parameter.
    """
    now = {p: p.grad for p in net.parameters() if p.grad is not None}
    for p in now:
        p.grad = None
    if not before:
        return now
    both = [p for p in now if p in before]
    torch._foreach_add_([before[p] for p in both], [now[p] for p in both])
    return now | before
