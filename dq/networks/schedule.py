"""Learning rates and evaluations of a training by epoch."""

from __future__ import annotations

import math

from dq.config.students import StudentConfig
from dq.core.errors import InputError


def evaluation_epochs(epochs: int, tests: int) -> list[int]:
    """Return `tests` evenly spaced epochs (at most all), the last included."""
    if tests < 1:
        raise InputError(f"a student must be tested at least once, not {tests} times; set tests to 1 or more")
    return sorted({-(-epochs * i // tests) for i in range(1, tests + 1)})


def second_half(epochs: int) -> int:
    """Return the first epoch with the lower learning rate of the step schedule.

    DC's code passes E + 1 times over its images for E epochs, and lowers lr after pass E // 2 + 2: of 1001 passes, 502
    have lr and 499 have lr / 10.
    """
    return (epochs - 1) // 2 + 3


def learning_rate(config: StudentConfig, epoch: int, epochs: int) -> float:
    """Return the learning rate of an epoch from 1 to `epochs`.

    With s = epoch - 1 and E = `epochs`:

    constant: lr. step: lr / 10 in the second half, see `second_half`. multistep: times `step_factor` at each of the
    `milestones`, which are shares of E: 0.2 at 2/3 and 5/6 is Minimax's, 0.5 at 0.8, 0.9 and 0.95 EDC's for CIFAR-10.
    cosine: lr (1 + cos(pi s / (zeta E))) / 2, which ends at 0 for zeta = 1 and at lr / 2 for zeta = 2;
    with `lr_floor` f it is f lr + (1 - f) times that.
    linear: lr (1 - s / (zeta E)).
    cos2 (EDC): the cosine for s <= 5 E / 6, then its value there times the share of epochs that is left. As released,
    so lr falls by a factor of six at the switch.

    The first `warmup` epochs have lr (0.01 + 0.99 s / warmup); the schedule then counts from them.
    """
    step = epoch - 1
    if step < config.warmup:
        return config.lr * (0.01 + 0.99 * step / config.warmup)
    step, epochs = step - config.warmup, epochs - config.warmup
    if config.schedule == "step":
        return config.lr * (0.1 if step + 1 >= second_half(epochs) else 1.0)
    if config.schedule == "multistep":
        # 2 / 3 as a float times 300 must not become 199
        passed = sum(step >= math.floor(m * epochs + 1e-6) for m in config.milestones)
        return config.lr * config.step_factor**passed
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "linear":
        return config.lr * (1 - step / (config.zeta * epochs))
    if config.schedule == "cos2" and 6 * step > 5 * epochs:
        return config.lr * 0.5 * (1 + math.cos(math.pi * 5 / (6 * config.zeta))) * (1 - step / epochs)
    cosine = config.lr * 0.5 * (1 + math.cos(math.pi * step / (config.zeta * epochs)))
    return config.lr_floor * config.lr + (1 - config.lr_floor) * cosine
