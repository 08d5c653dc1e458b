"""The `ddr` protocol: DD-Ranking's scores (arXiv 2505.13300) by trainings of our own, from accuracies as fractions."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq.config.students import Baseline, EvaluateConfig
from dq.core.errors import InputError
from dq.core.files import write_text
from dq.data.source import ImageSource
from dq.distilled.set import DistilledSet
from dq.evaluation.scores import DDRanking
from dq.evaluation.stage import evaluate_records
from dq.evaluation.statistics import format_mean_std
from dq.evaluation.tables import to_csv
from dq.evaluation.trainings import students_of

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dq")

LEARNING_RATES = (0.001, 0.005, 0.01, 0.05, 0.1)  # as in the ddranking package
PLAIN_VIEWS = {"shuffle": 1, "crop_scale": [], "flip": 0.0, "jitter": 0.0, "lighting": 0.0, "mix": "none"}


@dataclasses.dataclass(frozen=True)
class DDRScores:
    """Scores of every set under every recipe; prints as a table."""

    rows: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        names = ("hlr", "ior", "lrs", "ars")
        lines = [
            "| set | student | HLR (low is good) | IOR | LRS | ARS |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
        ]
        for r in self.rows:
            cells = [format_mean_std(r[n], digits=3) if r[n] else "" for n in names]
            lines.append(f"| {r['set']} | {r['student']} | {' | '.join(cells)} |")
        used = "; ".join(dict.fromkeys(f"{r['student']}: {r['protocol']}, {r['settings']}" for r in self.rows))
        note = f"DD-Ranking's scores from fractions; raw accuracies and tuned lr are in eval/ddr.csv. Recipes: {used}."
        return "\n".join([*lines, "", note])


def count_trainings(sets: int, students: int, seeds: int) -> int:
    """How many trainings `evaluate_ddr` does: own and hard under every lr, augmented and plain, and the full data."""
    rates = len(LEARNING_RATES)
    return students * (seeds * (rates * (sets + 1) + rates * sets + 2 * (sets + 1)) + 1)


def evaluate_ddr(
    sets: dict[str, DistilledSet],
    source: ImageSource,
    *,
    config: EvaluateConfig,
    image_size: int | None = None,
    folder: Path,
    accelerator: Accelerator,
    **options: Any,
) -> DDRScores:
    """HLR, IOR, LRS and ARS of sets, per seed, then averaged; `options` are those of `evaluate_records`.

    Every student of `config` is the sets' own recipe: its labels, optimiser and augmentation. From it follow
    - own: the recipe on the set and on a random subset of equal size, lr tuned for each;
    - hard: the same on the set with hard labels, lr tuned;
    - plain: the recipe without crops, mixes and augmentation, on both, with the recipe's own lr, as the recipe itself
      is compared for ARS.
    lr is tuned per seed over `LEARNING_RATES` on the validation part of train, not on test images as in the package.
    The full data is trained with hard labels for the epochs that the recipe names for "full".

    Raises:
        InputError: if the sets differ in size, since a random subset has to equal each.
    """
    if len({s.ipc for s in sets.values()}) != 1:
        raise InputError("ddr compares sets of equal size; score sets of different ipc one by one")
    sizes = {s.images.shape[-1] for s in sets.values()}
    if image_size is None and len(sizes) > 1:
        raise InputError(f"the sets have images of {sorted(sizes)} px; say at which size to train: --image_size")
    config = dataclasses.replace(config, full_seeds=1)
    own = [dict(s) for s in config.students]
    # looks at half time and at the end, so that the last one can choose an lr
    base = [{**s, "tests": 2, "select": "validation"} for s in own]
    hard = [{**s, "labels": "hard", "loss": "kl"} for s in base]
    plain = [{**s, "views": PLAIN_VIEWS, "augment": "none"} for s in base]
    tuned = lambda specs: [{**s, "lr": lr} for s in specs for lr in LEARNING_RATES]  # noqa: E731
    groups: dict[str, tuple[list[dict[str, Any]], tuple[Baseline, ...]]] = {
        "own": (tuned(base), ("random",)),
        "augmented": (base, ("random",)),
        "hard": (tuned(hard), ()),
        "full": (hard, ("full",)),
        "plain": (plain, ("random",)),
    }
    side, ipc = image_size or max(sizes), next(iter(sets.values())).ipc
    for students, baselines in groups.values():  # what is wrong with the last should not come out after the first
        wanted = dataclasses.replace(config, students=tuple(students))
        students_of(wanted, ["full"] if "full" in baselines else [str(ipc)], len(source.class_names), side)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (students, baselines) in groups.items():
        log.info("ddr: %s", name)
        found[name] = evaluate_records(
            {} if name == "full" else sets,
            source,
            config=dataclasses.replace(config, students=tuple(students), baselines=baselines),
            image_size=side,
            folder=folder,
            accelerator=accelerator,
            ipcs=[ipc],
            **options,
        )
    rows = []
    for j in range(len(own)):
        recipe = next(r for r in found["augmented"] if r["recipe"] == j)
        for name in sets:
            scores = DDRanking(
                full=_accuracies(found["full"], "full", j),
                hard=_last(hard_best := _best_rates(found["hard"], name, j)),
                own=_last(own_best := _best_rates(found["own"], name, j)),
                random=_last(random_best := _best_rates(found["own"], "random", j)),
                augmented=_accuracies(found["augmented"], name, j),
                random_augmented=_accuracies(found["augmented"], "random", j),
                plain=_accuracies(found["plain"], name, j),
                random_plain=_accuracies(found["plain"], "random", j),
            )
            rates = {"hard": hard_best, "own": own_best, "random": random_best}
            facts = {k: recipe[k] for k in ("student", "protocol", "settings")}
            rows.append({"set": name, **facts, "raw": scores, "rates": rates, **scores.per_seed()})
    if accelerator.is_main_process:
        records = []
        for r in rows:
            raw = dataclasses.asdict(r["raw"])
            for seed in range(config.seeds):
                at = {k: v[min(seed, len(v) - 1)] for k, v in raw.items() if isinstance(v, tuple) and v}
                scores_of_seed = {k: r[k][seed] for k in ("hlr", "ior", "lrs", "ars") if r[k]}
                named = {f"accuracy_{k}": v for k, v in at.items()}
                tuned_to = {f"lr_{k}": v[seed]["config"]["lr"] for k, v in r["rates"].items()}
                facts = {k: r[k] for k in ("set", "student", "protocol", "settings")}
                records.append({**facts, "seed": seed, **scores_of_seed, **named, **tuned_to})
        write_text(folder / "eval" / "ddr.csv", to_csv(records))
        lines = "".join(json.dumps({"part": n, **r}) + "\n" for n, part in found.items() for r in part)
        write_text(folder / "eval" / "trainings.jsonl", lines)
    accelerator.wait_for_everyone()
    return DDRScores(tuple(rows))


def _accuracies(records: list[dict[str, Any]], name: str, recipe: int) -> tuple[float, ...]:
    """Last-epoch accuracies by seed."""
    mine = sorted((r for r in records if r["set"] == name and r["recipe"] == recipe), key=lambda r: r["seed"])
    return tuple(r["last"] for r in mine)


def _last(records: list[dict[str, Any]]) -> tuple[float, ...]:
    return tuple(r["last"] for r in records)


def _best_rates(records: list[dict[str, Any]], name: str, recipe: int) -> list[dict[str, Any]]:
    """By seed, the training under the lr whose last look at the validation images was best."""
    rates = len(LEARNING_RATES)
    mine = [r for r in records if r["set"] == name and r["recipe"] // rates == recipe]
    chosen = []
    for seed in sorted({r["seed"] for r in mine}):
        chosen.append(max((r for r in mine if r["seed"] == seed), key=lambda r: r["looks"][-1][1]))
    return chosen
