"""The scores of DD-Ranking (arXiv 2505.13300), from accuracies as fractions.

The package `ddranking` 0.2.0 puts percentages into the exponentials below, which saturates them; hence our own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from dq.core.errors import InputError
from dq.evaluation.statistics import mean_std


def hlr(full: float, distilled: float) -> float:
    """Hard-label recovery: accuracy of training on all real data less that on the distilled set, both with hard
    labels. Lower is better."""
    return _accuracy("full", full) - _accuracy("distilled", distilled)


def ior(distilled: float, random: float) -> float:
    """Improvement over random: accuracy of the distilled set with its own labels and recipe less that of as many
    random real images with the same labels and recipe. Higher is better."""
    return _accuracy("distilled", distilled) - _accuracy("random", random)


def lrs(ior: float, hlr: float, weight: float = 0.5) -> float:
    """Label-robust score (e^a - e^-1) / (e - e^-1) with a = weight * IOR - (1 - weight) * HLR, in [0, 1].

    A set as good as random images that recovers all of the accuracy with hard labels has a = 0, a score of 0.269.
    """
    return _score(_weight(weight) * _difference("IOR", ior) - (1 - weight) * _difference("HLR", hlr))


def ars(augmented: float, plain: float, weight: float = 0.5) -> float:
    """Augmentation-robust score (e^b - e^-1) / (e - e^-1) with b = weight * augmented + (1 - weight) * plain.

    Args:
        augmented: improvement over random (see `ior`) of trainings with augmentation.
        plain: the same without augmentation.
    """
    return _score(_weight(weight) * _difference("augmented", augmented) + (1 - weight) * _difference("plain", plain))


def _score(exponent: float) -> float:
    return (math.exp(exponent) - math.exp(-1)) / (math.e - math.exp(-1))


def _accuracy(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise InputError(f"the accuracy {name}={value} is not a fraction in [0, 1]; divide percentages by 100")
    return value


def _difference(name: str, value: float) -> float:
    if not -1 <= value <= 1:
        raise InputError(f"{name}={value} is not a difference of fractions; divide percentages by 100")
    return value


def _weight(value: float) -> float:
    if not 0 <= value <= 1:
        raise InputError(f"the weight of a score must lie in [0, 1], not {value}")
    return value


@dataclass(frozen=True)
class DDRanking:
    """Test accuracies per seed, as fractions, and the scores that follow from them.

    Empty fields leave out the scores that need them. `full` may hold a single value for all seeds, since it costs
    more than the others together.

    Example:
        DDRanking(full=(0.84,), hard=(0.61, 0.63), own=(0.70, 0.71), random=(0.66, 0.67)).summary()["lrs"]
    """

    full: tuple[float, ...] = ()  # all real data, hard labels
    hard: tuple[float, ...] = ()  # the set, hard labels
    own: tuple[float, ...] = ()  # the set, its own labels and recipe
    random: tuple[float, ...] = ()  # random real images, the same labels and recipe
    augmented: tuple[float, ...] = ()  # the set, with augmentation
    random_augmented: tuple[float, ...] = ()
    plain: tuple[float, ...] = ()  # the set, without augmentation
    random_plain: tuple[float, ...] = ()
    weight: float = 0.5  # of IOR in the LRS, of the augmented part in the ARS

    def __post_init__(self) -> None:
        _weight(self.weight)
        sizes = {}
        for f in fields(self)[:-1]:
            values = getattr(self, f.name)
            for value in values:
                _accuracy(f.name, value)
            if values and not (f.name == "full" and len(values) == 1):
                sizes[f.name] = len(values)
        if len(set(sizes.values())) > 1:
            raise InputError(f"accuracies need the same seeds, but there are {sizes}; give one of every seed to each")

    def per_seed(self) -> dict[str, tuple[float, ...]]:
        """Every score that the accuracies allow, by name: hlr, ior, lrs, ars; one value a seed."""
        scores: dict[str, tuple[float, ...]] = {}
        full: Sequence[float] = self.full * len(self.hard) if len(self.full) == 1 else self.full
        if full and self.hard:
            scores["hlr"] = tuple(hlr(f, h) for f, h in zip(full, self.hard, strict=True))
        if self.own and self.random:
            scores["ior"] = tuple(ior(o, r) for o, r in zip(self.own, self.random, strict=True))
        if "hlr" in scores and "ior" in scores:
            scores["lrs"] = tuple(lrs(i, h, self.weight) for i, h in zip(scores["ior"], scores["hlr"], strict=True))
        if self.augmented and self.random_augmented and self.plain and self.random_plain:
            gains = zip(self.augmented, self.random_augmented, self.plain, self.random_plain, strict=True)
            scores["ars"] = tuple(ars(ior(a, ra), ior(p, rp), self.weight) for a, ra, p, rp in gains)
        return scores

    def summary(self) -> dict[str, tuple[float, float | None]]:
        """Mean and sample standard deviation over seeds of every score; the deviation of one seed is None."""
        return {name: mean_std(values) for name, values in self.per_seed().items()}
