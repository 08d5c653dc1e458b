"""Scores of DD-Ranking (arXiv 2505.13300), from accuracies as fractions.

The package `ddranking` 0.2.0 puts percentages into the exponentials below, which saturates them; hence this
implementation.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq.config.students import Baseline
from dq.core.errors import InputError
from dq.core.files import write_text
from dq.core.plain import PlainDict
from dq.core.text import markdown_table
from dq.data.source import ImageSource
from dq.distilled.set import DistilledSet
from dq.evaluation.evaluate import EvaluationSettings, check_sets, evaluate_records
from dq.evaluation.results import to_csv
from dq.evaluation.statistics import format_mean_std, mean_std

if TYPE_CHECKING:
    from accelerate import Accelerator


def hlr(full: float, distilled: float) -> float:
    """Hard-label recovery: full-data accuracy less that of the distilled set.

    Both are trained with hard labels. Lower is better.
    """
    return _accuracy("full", full) - _accuracy("distilled", distilled)


def ior(distilled: float, random: float) -> float:
    """Improvement over random: accuracy of the set less random images' accuracy.

    The set has its own labels and recipe; as many random real images have the same. Higher is better.
    """
    return _accuracy("distilled", distilled) - _accuracy("random", random)


def lrs(ior: float, hlr: float, weight: float = 0.5) -> float:
    """Label-robust score, in [0, 1].

    (e^a - e^-1) / (e - e^-1) with a = weight * IOR - (1 - weight) * HLR. A set as good as random images that recovers
    all of the accuracy with hard labels has a = 0, a score of 0.269.
    """
    return _score(_weight(weight) * _difference("IOR", ior) - (1 - weight) * _difference("HLR", hlr))


def ars(augmented: float, plain: float, weight: float = 0.5) -> float:
    """Augmentation-robust score, in [0, 1].

    (e^b - e^-1) / (e - e^-1) with b = weight * augmented + (1 - weight) * plain, where `augmented` is the improvement
    over random (see `ior`) of trainings with augmentation, and `plain` the same without.
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
    """Test accuracies per seed, as fractions, and their scores.

    Empty fields leave out the scores that need them. `full` may hold a single value for all seeds, since it costs more
    than the others together.

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
        """Available scores by name (hlr, ior, lrs, ars), one per seed."""
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
        """Mean and sample standard deviation of every score over seeds.

        The deviation of one seed is None.
        """
        return {name: mean_std(values) for name, values in self.per_seed().items()}


log = logging.getLogger("dq")
LEARNING_RATES = (0.001, 0.005, 0.01, 0.05, 0.1)  # as in the ddranking package
PLAIN_VIEWS = {
    **{"rand_augment": 0, "shuffle": 1, "crop_scale": [], "crop_pad": 0.0},
    **{"flip": 0.0, "jitter": 0.0, "lighting": 0.0, "mix": "none"},
}


@dataclasses.dataclass(frozen=True)
class DDRScores:
    """Scores of every set under every recipe; prints as a table."""

    rows: tuple[PlainDict, ...]

    def __str__(self) -> str:
        names = ("hlr", "ior", "lrs", "ars")
        body = [
            [r["set"], r["student"], *(format_mean_std(r[n], digits=3) if r[n] else "" for n in names)]
            for r in self.rows
        ]
        table = markdown_table(["set", "student", "HLR (low is good)", "IOR", "LRS", "ARS"], body, left=2)
        used = "; ".join(dict.fromkeys(f"{r['student']}: {r['protocol']}, {r['settings']}" for r in self.rows))
        note = f"DD-Ranking's scores from fractions; raw accuracies and tuned lr are in eval/ddr.csv. Recipes: {used}."
        return "\n".join([table, "", note])


def count_trainings(sets: int, students: int, seeds: int) -> int:
    """Number of trainings of `evaluate_ddr`.

    Own and hard labels under every lr, augmented and plain, and the full data.
    """
    rates = len(LEARNING_RATES)
    return students * (seeds * (rates * (sets + 1) + rates * sets + 2 * (sets + 1)) + 1)


def ddr_groups(
    recipes: list[PlainDict], *, hard_augmented: bool = False
) -> dict[str, tuple[list[PlainDict], tuple[Baseline, ...]]]:
    """Students and baselines of every part of `evaluate_ddr`, by name."""
    # evaluated at half time and at the end, so that the last score can choose an lr
    base = [{**s, "tests": 2, "select": "validation"} for s in recipes]
    hard = [{**s, "labels": "hard", "loss": "kl"} for s in base]
    if not hard_augmented:
        hard = [{**s, "augment": "none", "views": {**s.get("views", {}), "mix": "none"}} for s in hard]
    plain = [{**s, "views": PLAIN_VIEWS, "augment": "none"} for s in base]
    return {
        "own": (_tuned(base), ("random",)),
        "augmented": (base, ("random",)),
        "hard": (_tuned(hard), ()),
        "full": (hard, ("full",)),
        "plain": (plain, ("random",)),
    }


def _tuned(specs: list[PlainDict]) -> list[PlainDict]:
    return [{**s, "lr": lr} for s in specs for lr in LEARNING_RATES]


def check_ddr(
    sets: dict[str, DistilledSet],
    source: ImageSource,
    settings: EvaluationSettings,
    *,
    hard_augmented: bool = False,
) -> int:
    """Check `evaluate_ddr` before its first training.

    Returns:
        Side in px at which students train.

    Raises:
        InputError: see `evaluate_ddr` and `check_sets`.
    """
    if len({s.ipc for s in sets.values()}) != 1:
        raise InputError("ddr compares sets of equal size; score sets of different ipc one by one")
    sizes = {s.images.shape[-1] for s in sets.values()}
    if settings.image_size is None and len(sizes) > 1:
        raise InputError(f"the sets have images of {sorted(sizes)} px; say at which size to train: --image_size")
    side, ipc = settings.image_size or max(sizes), next(iter(sets.values())).ipc
    config = dataclasses.replace(settings.config, full_seeds=1)
    settings = dataclasses.replace(settings, config=config, image_size=side, ipcs=[ipc])
    for name, part in _parts(settings, hard_augmented).items():
        check_sets({} if name == "full" else sets, source, part)
    return side


def _parts(settings: EvaluationSettings, hard_augmented: bool) -> dict[str, EvaluationSettings]:
    """Settings of every part of `evaluate_ddr`."""
    groups = ddr_groups([dict(s) for s in settings.config.students], hard_augmented=hard_augmented)
    configs = {
        name: dataclasses.replace(settings.config, students=tuple(students), baselines=baselines)
        for name, (students, baselines) in groups.items()
    }
    return {name: dataclasses.replace(settings, config=config) for name, config in configs.items()}


def evaluate_ddr(
    sets: dict[str, DistilledSet],
    source: ImageSource,
    *,
    folder: Path,
    cache_dir: Path,
    accelerator: Accelerator,
    hard_augmented: bool = False,
    **settings: Any,
) -> DDRScores:
    """HLR, IOR, LRS and ARS of sets, per seed, then averaged.

    `settings` are those of `EvaluationSettings`, of which `ipcs` follows from the sets. Every student of `config` is
    the sets' own recipe: its labels, optimizer and augmentation. From it follow
    - own: the recipe on the set and on a random subset of equal size, lr tuned for each;
    - hard: the same on the set with hard labels, lr tuned, without mixes and augmentation as in the package, where the
    crops and mirrors of its image transforms stay; `hard_augmented` keeps all of the recipe;
    - plain: the recipe without crops, mixes and augmentation, on both, with the recipe's own lr, as the recipe itself
    is compared for ARS.
    lr is tuned per seed over `LEARNING_RATES` on the validation part of train, not on test images as in the package.
    The full data is trained as the set is with hard labels, for the epochs that the recipe names for "full".

    Raises:
        InputError: if the sets differ in size, since a random subset has to equal each.
    """
    options = EvaluationSettings(**settings)
    side = check_ddr(sets, source, options, hard_augmented=hard_augmented)
    config = dataclasses.replace(options.config, full_seeds=1, redundancy=False)
    ipc = next(iter(sets.values())).ipc
    options = dataclasses.replace(options, config=config, image_size=side, ipcs=[ipc])
    places: PlainDict = {"folder": folder, "cache_dir": cache_dir, "accelerator": accelerator}
    records: dict[str, list[PlainDict]] = {}
    for name, part in _parts(options, hard_augmented).items():
        log.info("ddr: %s", name)
        records[name] = evaluate_records({} if name == "full" else sets, source, part, **places)
    rows = [_scores(records, name, j) for j in range(len(config.students)) for name in sets]
    if accelerator.is_main_process:
        seed_records = [_seed_record(row, seed) for row in rows for seed in range(config.seeds)]
        write_text(folder / "eval" / "ddr.csv", to_csv(seed_records))
        lines = "".join(json.dumps({"part": n, **r}) + "\n" for n, part in records.items() for r in part)
        write_text(folder / "eval" / "ddr-trainings.jsonl", lines)  # trainings.jsonl is that of summary.csv
    accelerator.wait_for_everyone()
    return DDRScores(tuple(rows))


def _scores(records: dict[str, list[PlainDict]], name: str, recipe: int) -> PlainDict:
    """Scores of a set under a recipe: a row of `DDRScores`."""
    rates = {
        "hard": _best_rates(records["hard"], name, recipe),
        "own": _best_rates(records["own"], name, recipe),
        "random": _best_rates(records["own"], "random", recipe),
    }
    accuracies = DDRanking(
        full=_accuracies(records["full"], "full", recipe),
        hard=_last(rates["hard"]),
        own=_last(rates["own"]),
        random=_last(rates["random"]),
        augmented=_accuracies(records["augmented"], name, recipe),
        random_augmented=_accuracies(records["augmented"], "random", recipe),
        plain=_accuracies(records["plain"], name, recipe),
        random_plain=_accuracies(records["plain"], "random", recipe),
    )
    first = next(r for r in records["augmented"] if r["recipe"] == recipe)
    facts = {k: first[k] for k in ("student", "protocol", "settings")}
    return {"set": name, **facts, "raw": accuracies, "rates": rates, **accuracies.per_seed()}


def _seed_record(row: PlainDict, seed: int) -> PlainDict:
    """Scores, accuracies and learning rates of one seed."""
    raw = {k: v for k, v in dataclasses.asdict(row["raw"]).items() if isinstance(v, tuple) and v}
    return {
        **{k: row[k] for k in ("set", "student", "protocol", "settings")},
        "seed": seed,
        **{k: row[k][seed] for k in ("hlr", "ior", "lrs", "ars") if row[k]},
        **{f"accuracy_{k}": v[min(seed, len(v) - 1)] for k, v in raw.items()},
        **{f"lr_{k}": best[seed]["config"]["lr"] for k, best in row["rates"].items()},
    }


def _accuracies(records: list[PlainDict], name: str, recipe: int) -> tuple[float, ...]:
    """Last-epoch accuracies by seed."""
    matching = sorted((r for r in records if r["set"] == name and r["recipe"] == recipe), key=lambda r: r["seed"])
    return tuple(r["last"] for r in matching)


def _last(records: list[PlainDict]) -> tuple[float, ...]:
    return tuple(r["last"] for r in records)


def _best_rates(records: list[PlainDict], name: str, recipe: int) -> list[PlainDict]:
    """By seed, the training under the best lr.

    Best is the last score on the validation images.
    """
    rates = len(LEARNING_RATES)
    matching = [r for r in records if r["set"] == name and r["recipe"] // rates == recipe]
    chosen = []
    for seed in sorted({r["seed"] for r in matching}):
        chosen.append(max((r for r in matching if r["seed"] == seed), key=lambda r: r["looks"][-1][1]))
    return chosen
