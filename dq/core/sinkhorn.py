"""Sinkhorn's iteration for entropic optimal transport, batched, in the log domain."""

from __future__ import annotations

from torch import Tensor


def sinkhorn(
    log_kernel: Tensor, *, log_a: Tensor | float, log_b: Tensor | float, n_iter: int, tol: float = 0.0
) -> Tensor:
    """Entropic transport plans (B, n, k) of the kernels exp(-cost / regularization) (Cuturi 2013).

    The last update is on the side of b, so that columns sum to b up to rounding; rows come as near to a as `n_iter`
    or `tol` allow. It starts from the potential log b, so that a column that comes twice with halves of its mass is as
    one at every iteration.

    Args:
        log_kernel: (B, n, k), finite.
        log_a: logarithms of the masses of rows, (B, n, 1) or what broadcasts to it; a number: the same for all.
        log_b: of columns, (B, 1, k).
        n_iter: updates of each side at most, from 1.
        tol: stop when no potential moves by as much; 0: never, and no value is read from the device.
    """
    # ot.batch of POT starts from zero potentials, where halves of a column are not as one, and reads a value back
    v = log_kernel.new_zeros(len(log_kernel), 1, log_kernel.shape[2])
    v = v + log_b if isinstance(log_b, Tensor) else v  # equal masses move all potentials alike
    for _ in range(n_iter):
        u = log_a - (log_kernel + v).logsumexp(2, keepdim=True)
        previous, v = v, log_b - (log_kernel + u).logsumexp(1, keepdim=True)
        if tol and (v - previous).abs().amax() < tol:
            break
    return (log_kernel + u + v).exp()
