"""Entries of a results table: sets, selected real images, and full data."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dq.config.pruning import DifficultyConfig
from dq.config.students import Baseline, EvaluateConfig
from dq.core.errors import InputError
from dq.core.files import Damaged
from dq.core.plain import PlainDict
from dq.core.processes import assign_units
from dq.core.seeds import digest_of
from dq.distilled.external import set_from_tensors
from dq.distilled.set import DistilledSet
from dq.evaluation.baselines import BY_DIFFICULTY, BY_FEATURES, BY_PREDICTION, select
from dq.networks.difficulty import DifficultyCache, find_difficulty, make_difficulty
from dq.networks.real_data import RealData
from dq.networks.zoo import check_net

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dq")


@dataclass(frozen=True)
class Entry:
    """A set on which students are trained, loaded when it is needed."""

    name: str  # method, baseline or external set
    ipc: str  # "10", or "full"
    images: int
    identity: str  # of what `load` gives
    load: Callable[[], DistilledSet]
    seeds: tuple[int, ...]  # that train on it; a random subset serves one seed
    origin: str = "selected from train"  # where it came from, for the record
    step_size: float | None = None  # that was learned with the set
    test: Callable[[], tuple[Tensor, Tensor]] | None = None  # images and labels to test on; None: the test split


@dataclass(frozen=True)
class Work:
    """Folder and processes of an evaluation."""

    folder: Path
    accelerator: Accelerator

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def local_units(self, costs: Sequence[float]) -> list[int]:
        return assign_units(costs, self.accelerator.process_index, self.accelerator.num_processes)


def baseline_entries(real_data: RealData, evaluate: EvaluateConfig, work: Work, sizes: dict[str, int]) -> list[Entry]:
    """Entries of selection baselines and the full data.

    Each selected set is saved once. `sizes` holds images per class of the baselines for each ipc of the table, which
    differ where several images are drawn from one prototype.
    """
    counts = np.bincount(real_data.source.train.labels[real_data.candidates], minlength=real_data.classes)
    seeds = tuple(range(evaluate.seeds))
    entries = []
    for key, ipc in sizes.items():
        images = int(counts.clip(max=ipc).sum())
        for name in evaluate.baselines:
            if name == "full":
                continue
            # only a random subset is another one for another seed
            for group in [(s,) for s in seeds] if name == "random" else [seeds]:
                factor = evaluate.patch_factor or (2 if real_data.image_size >= 128 and ipc >= 2 else 1)
                settings: list[object] = [real_data.identity, name, ipc, group[0], factor]
                if name in (*BY_FEATURES, *BY_PREDICTION, "patches"):
                    settings.append(real_data.teachers[0].digest if real_data.teachers else "pooled")
                if name in BY_DIFFICULTY:
                    settings += [_difficulty(real_data).key, real_data.difficulty.runs]
                if name == "window":
                    settings.append(evaluate.window_start)
                folder = work.folder / "baselines" / f"ipc{ipc}-{name}-seed{group[0]}-{digest_of(settings)}"
                options: PlainDict = {"seed": group[0], "factor": factor, "window_start": evaluate.window_start}
                load = functools.partial(_selected, real_data, folder, name, ipc, options)
                identity = digest_of(settings)
                entries.append(Entry(name, key, images, identity, load, group))
    if "full" in evaluate.baselines:
        identity = digest_of([real_data.identity, "full"])
        load = functools.partial(_full, real_data)
        entries.append(Entry("full", "full", len(real_data.candidates), identity, load, seeds[: evaluate.full_seeds]))
    return entries


def _selected(real_data: RealData, folder: Path, name: str, ipc: int, options: PlainDict) -> DistilledSet:
    try:
        return DistilledSet.load(folder, "set")
    except (InputError, Damaged) as e:  # not there, or not any more
        if isinstance(e, Damaged):
            log.warning("%s; it is made again", e)
            (folder / "set" / "provenance.json").unlink(missing_ok=True)
    selected = select(
        name,
        real_data.source,
        ipc,
        image_size=real_data.image_size,
        features=real_data.features,
        scores=functools.partial(_score, real_data),
        teacher=real_data.teachers[0] if real_data.teachers else None,
        candidates=real_data.candidates,
        **options,
    )
    selected.save(folder, "set")
    return DistilledSet.load(folder, "set")


def _difficulty(real_data: RealData) -> DifficultyCache:
    return find_difficulty(real_data.cache_dir, real_data.source, real_data.image_size, real_data.difficulty)


def _score(real_data: RealData, score: str) -> Tensor:
    """A score (n,) of all train images, by teachers or difficulty."""
    if score in ("probability", "entropy"):
        return real_data.predictions()[score]
    return _difficulty(real_data).by_row(score, real_data.difficulty.runs, len(real_data.source.train))


def prepare_selections(names: Iterable[str], real_data: RealData, work: Work) -> None:
    """Compute features, predictions and difficulty before processes share baselines.

    Features and predictions are made once, by the main process, and runs of difficulty scores by all.
    """
    chosen = set(names)
    if work.main and chosen & set(BY_FEATURES):
        real_data.features()
    if work.main and chosen & set(BY_PREDICTION):
        real_data.predictions()
    if chosen & set(BY_DIFFICULTY):
        options: Any = {"device": real_data.device, "local_units": work.local_units, "main": work.main}
        make_difficulty(real_data.cache_dir, real_data.source, real_data.image_size, real_data.difficulty, **options)
    work.accelerator.wait_for_everyone()


def check_difficulty(
    baselines: Sequence[Baseline], difficulty: DifficultyConfig, classes: int, image_size: int
) -> None:
    """Check that difficulty can be scored as the baselines need it.

    Raises:
        InputError: for a network that does not fit the images, or runs too short for a deviation over epochs.
    """
    if set(baselines) & set(BY_DIFFICULTY):
        check_net(difficulty.net, classes, image_size)
    if "facility_cad" in baselines and difficulty.trained_epochs < 2:
        raise InputError(
            "the baseline 'facility_cad' goes by a deviation over epochs and difficulty is scored after 1; set "
            "prune.score_epoch to 2 or more, or leave it out of baselines"
        )


def _full(real_data: RealData) -> DistilledSet:
    images, labels = real_data.read(real_data.source.train, real_data.candidates)
    return set_from_tensors(images, labels, real_data.source.class_names, origin="all of train")
