"""The prune stage: difficulty scores and selection of train images.

Policies depend on the ipc, and latents are cached for all images, so images are pruned after they were encoded: the
cluster stage takes the rows of the latents that are kept, with the result of a filter before encoding. Train and
validation images of teachers, students and baselines are never pruned.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from dq.cluster.engines import choose_engine
from dq.config.methods import resolved_method
from dq.config.pruning import Policy, PruneConfig
from dq.config.reader import to_dict
from dq.config.schema import RunConfig
from dq.core.errors import InputError
from dq.core.files import write_text
from dq.core.plain import PlainDict
from dq.core.seeds import digest_of
from dq.data.pruning import Pruned, prune_class, rank_band
from dq.data.source import ImageSource
from dq.evaluation.baselines import BY_DIFFICULTY
from dq.networks.difficulty import (
    DifficultyCache,
    difficulty_recipe,
    find_difficulty,
    make_difficulty,
    order_file,
    rank_agreement,
)
from dq.networks.zoo import check_net
from dq.run.folder import Run

log = logging.getLogger("dq")

FILE = "pruning.csv"
SHOWN = 20  # classes of the table that `dq prune` prints


def prune_settings(prune: PruneConfig) -> PlainDict:
    """The settings of pruning beside the scores; empty without pruning."""
    if not prune.active:
        return {}
    names = ["policy", "share", "where", "keep_per_ipc", "keep_share"]
    names += ["outside_weight"] * (prune.where == "weight") + ["score", "runs"] * prune.uses_scores
    return {name: getattr(prune, name) for name in names}


def prune_identity(run: Run, prune: PruneConfig) -> PlainDict:
    """The settings with the digest of the scores; empty without pruning."""
    scores = {"scores": difficulty_of(run.config, run.source, prune).key} if prune.uses_scores else {}
    return prune_settings(prune) | scores


def difficulty_of(config: RunConfig, source: ImageSource, prune: PruneConfig) -> DifficultyCache:
    """The cache of the scores of these settings."""
    return find_difficulty(config.cache_dir, source, config.image_size, prune)


def scored_settings(config: RunConfig, *, always: bool = False) -> list[PruneConfig]:
    """Settings of the distinct runs of agents that methods and baselines need.

    Of equal ones those with the most runs; with `always` those of the run itself where nothing needs any.
    """
    return [max(settings, key=lambda p: p.runs) for settings in _by_agent(config, always)]


def _by_agent(config: RunConfig, always: bool) -> list[list[PruneConfig]]:
    """Settings that methods and baselines need, grouped by equal runs of agents."""
    needed = [p for m in config.methods if (p := resolved_method(config, m).prune).uses_scores]
    baselines = set(config.evaluate.baselines if config.evaluate.students else ())
    if baselines & set(BY_DIFFICULTY) or (always and not needed):
        needed.append(config.prune)
    groups: dict[str, list[PruneConfig]] = {}
    for p in needed:
        groups.setdefault(digest_of([p.path, to_dict(difficulty_recipe(p)), p.cad_window, p.seed]), []).append(p)
    return list(groups.values())


def check_pruning(config: RunConfig, source: ImageSource, *, always: bool = False) -> None:
    """Check that the settings of pruning fit the images.

    Raises:
        InputError: for an agent that does not fit, scores of other images, an engine without weights, or a policy that
            leaves fewer images of a class than there are to be.
    """
    for p in scored_settings(config, always=always):
        check_net(p.net, len(source.class_names), config.image_size)
        difficulty_of(config, source, p)
    counts = source.class_counts().tolist()
    for method in config.methods:
        resolved = resolved_method(config, method)
        p, engine = resolved.prune, choose_engine(resolved.cluster.engine)
        if p.active and p.where == "weight" and engine in ("minibatch", "barycenter"):
            raise InputError(
                f"method {method!r} has prune.where=weight, but cluster.engine={engine} takes no point weights; set "
                "prune.where=filter or another engine"
            )
        for ipc in config.ipc:
            _check_counts(method, p, ipc, counts, source.class_names)


def _check_counts(method: str, p: PruneConfig, ipc: int, counts: Sequence[int], names: Sequence[str]) -> None:
    """Refuse policies that leave too few images; warn of limited ones."""
    free = dataclasses.replace(p, keep_per_ipc=0.0, keep_share=0.0) if p.policy != "window" else p
    limited = []
    for label, n in enumerate(counts):
        number = len(rank_band(n, ipc, p))
        if number < min(n, ipc):
            raise InputError(
                f"method {method!r} has prune.policy={p.policy}, which leaves {number} of the {n} images of class "
                f"{label} {names[label]!r} at ipc={ipc}; set prune.keep_per_ipc to 1 or more, or a smaller prune.share"
            )
        if len(rank_band(n, ipc, free)) < number:
            limited.append((label, n, number))
    if limited:
        label, n, number = limited[0]
        log.warning(
            "prune.policy=%s of method %r drops less than it would at ipc %d in %d classes, first %r, where %d of %d "
            "images stay (prune.keep_per_ipc, prune.keep_share)",
            *(p.policy, method, ipc, len(limited), names[label], number, n),
        )


def prune(run: Run, *, always: bool = False) -> list[Path]:
    """Score the train images where methods need it, and write counts by policy.

    Scores are in the cache folder for all runs; finished runs of the agent are not repeated. With `always` images are
    scored even where no method needs it.

    Returns:
        The files of the orders from easy to hard.
    """
    began = time.perf_counter()
    numbers: PlainDict = {}
    orders: list[Path] = []
    for group in _by_agent(run.config, always):
        p = max(group, key=lambda p: p.runs)
        options: PlainDict = {"device": run.device, "local_units": run.local_units, "main": run.main}
        cache = make_difficulty(run.config.cache_dir, run.source, run.config.image_size, p, **options)
        run.accelerator.wait_for_everyone()
        for score, runs in sorted({(q.score, q.runs) for q in group}):
            orders.append(cache.folder / order_file(score, runs))
            if run.main:
                cache.save_orders(run.source, score, runs)
        if run.main:
            scores, rows = cache.runs(p.score, p.runs)
            numbers = {"scores": cache.key, "score": p.score, "runs": p.runs}
            if p.runs > 1:
                numbers["spearman"] = round(rank_agreement(scores, torch.from_numpy(run.source.train.labels)[rows]), 4)
            log.info(
                "difficulty: %s of %d runs of %s after %d epochs in %s%s",
                *(p.score, p.runs, *cache.agent(), cache.folder),
                f", Spearman {numbers['spearman']:.2f} between two runs" if p.runs > 1 else "",
            )
    if run.main:
        write_text(run.folder / FILE, _csv_text(run.config, run.source))
    run.finish("prune", began, **numbers)
    return orders


@dataclass(frozen=True)
class Pruning:
    """Settings of pruning with the scores of all train images."""

    settings: PruneConfig
    scores: Tensor | None  # (n,) by row of train, NaN for images that cannot be read; None: the policy needs none
    seed: int  # of the run, for the policy `random`
    folder: str = ""  # of the scores, for messages

    def of_class(self, label: int, rows: Tensor, ipc: int) -> Pruned | None:
        """Prune the images `rows` (n,) of a class; None without pruning.

        Raises:
            InputError: if one of them has no score.
        """
        if not self.settings.active:
            return None
        order = torch.arange(len(rows))
        if self.scores is not None:
            scores = self.scores[rows]
            if scores.isnan().any():
                raise InputError(
                    f"row {int(rows[scores.isnan()][0])} of train has a latent and no difficulty score; delete "
                    f"{self.folder} and run `dq prune` again"
                )
            order = scores.argsort(stable=True)
        return prune_class(order, ipc, self.settings, self.seed, label)


def load_pruning(run: Run, settings: PruneConfig) -> Pruning:
    """Load the difficulty scores that `settings.score` names from the cache.

    Raises:
        InputError: if there are none.
    """
    if not settings.uses_scores:
        return Pruning(settings, None, run.config.seed)
    cache = difficulty_of(run.config, run.source, settings)
    by_row = cache.by_row(settings.score, settings.runs, len(run.source.train))
    return Pruning(settings, by_row, run.config.seed, str(cache.folder))


# --- numbers of images after pruning ------------------------------------------------------------------------------


def pruned_counts(config: RunConfig, counts: np.ndarray) -> Iterator[tuple[int, str, list[int]]]:
    """Ipc, policy or "method NAME", and class sizes after pruning."""
    for ipc in config.ipc:
        columns = {policy: _with_policy(config.prune, policy) for policy in get_args(Policy)}
        methods = {f"method {m}": resolved_method(config, m).prune for m in config.methods}
        columns |= {name: p for name, p in methods.items() if p.active}
        for name, p in columns.items():
            yield ipc, name, [len(rank_band(n, ipc, p)) for n in counts.tolist()]


def _with_policy(prune: PruneConfig, policy: Policy) -> PruneConfig:
    share = prune.share if policy == prune.policy else None
    return dataclasses.replace(prune, policy=policy, share=share)


def _csv_text(config: RunConfig, source: ImageSource) -> str:
    counts = source.class_counts()
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["ipc", "policy", "class", "name", "images", "kept"])
    for ipc, policy, numbers in pruned_counts(config, counts):
        writer.writerows([ipc, policy, c, source.class_names[c], counts[c], k] for c, k in enumerate(numbers))
    return out.getvalue()


def pruned_text(config: RunConfig, source: ImageSource) -> str:
    """A table of the numbers of the first classes by policy."""
    counts = source.class_counts()
    lines = []
    for ipc in config.ipc:
        columns = [(name, numbers) for at, name, numbers in pruned_counts(config, counts) if at == ipc]
        width = max(10, *(len(n) for n in source.class_names[:SHOWN]))
        lines.append(f"ipc {ipc}".ljust(width) + f"{'images':>8}" + "".join(f"  {name:>8}" for name, _ in columns))
        for c, name in enumerate(source.class_names[:SHOWN]):
            values = "".join(f"  {numbers[c]:>{max(8, len(column))}}" for column, numbers in columns)
            lines.append(name.ljust(width) + f"{counts[c]:>8}" + values)
        if len(counts) > SHOWN:
            lines.append(f"... and {len(counts) - SHOWN} classes in the file")
    return "\n".join(lines)
