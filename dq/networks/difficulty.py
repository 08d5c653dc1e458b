"""Difficulty scores of train images from short runs of an agent network.

A run trains the agent by the loop of students and teachers and evaluates it on all train images after every epoch,
without augmentation, in evaluation mode. One pass gives all scores: EL2N, last-layer GraNd, uncertainty and loss after
the last epoch, forgetting and CAD from all of them. Larger is harder. A score is the mean over runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.config.pruning import DifficultyConfig
from dq.config.reader import to_dict
from dq.config.students import StudentConfig
from dq.core.devices import resolve_dtype
from dq.core.errors import InputError
from dq.core.files import is_done, read_json, read_tensors, write_tensors
from dq.core.plain import PlainDict
from dq.core.progress import progress, unit_done
from dq.core.seeds import derive_seed, digest_of
from dq.data.image_cache import write_manifest
from dq.data.source import ImageSource
from dq.networks.real_data import RealData, load_real_data
from dq.networks.teacher import evaluation_mode, head_inputs
from dq.networks.training import TrainingSet, fit

log = logging.getLogger("dq")

WINDOWS = 2  # of CAD that are averaged, the last ones
BATCH = 500  # images that are scored at once


# --- scores of one run --------------------------------------------------------------------------------------------


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """Return EL2N of each image, (n,) (Paul et al. 2021, arXiv 2107.07075).

    EL2N = |softmax(logits) - onehot(label)|_2 for logits (n, C) and labels (n,) int64.
    """
    return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])).norm(dim=1)


def grand_last(logits: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    """Return last-layer GraNd of each image, (n,).

    The norm of the gradient of the cross-entropy by weight and bias of the last linear layer: EL2N times
    sqrt(1 + |h|^2) for features h (n, D). DeepCore calls it GraNd, and the released index files of PAD hold it.
    """
    return el2n(logits, labels) * (1 + features.square().sum(1)).sqrt()


def forgetting(correct: Tensor) -> Tensor:
    """Count forgetting events of each image, (n,) float32 (Toneva et al. 2019, arXiv 1812.05159).

    Epochs after which an image is classified wrongly and before which it was not; the number of epochs E for one that
    was never right. Counted after every epoch, and not, as in the paper, each time that an image is in a batch.
    `correct` is (E, n) bool, epochs in order.
    """
    events = (correct[:-1] & ~correct[1:]).sum(0)
    return torch.where(correct.any(0), events, len(correct)).float()


def cad(probabilities: Tensor, window: int) -> Tensor:
    """Return CAD: deviation of the class probability in windows of epochs, (n,).

    Averaged over the last two windows:

        U_k = std of p_k, ..., p_(k + J - 1);  CAD = (U_(E - J) + U_(E - J + 1)) / 2

    with the population's std and the last epoch E. A run without two windows has shorter ones, J = E - 1, and one of
    two epochs has the single window of both. Meant for runs of a student's length: after few epochs, easy images have
    the larger deviations (results/difficulty.csv).

    Args:
        probabilities: (E, n) of each image's own class, epochs in order, E >= 2.
        window: J, at least 2.
    """
    epochs = len(probabilities)
    J = max(2, min(window, epochs - WINDOWS + 1))
    deviations = probabilities.unfold(0, J, 1).std(-1, correction=0)  # (E - J + 1, n)
    return deviations[-WINDOWS:].mean(0)


@dataclass(frozen=True)
class Epoch:
    """Predictions of all images after one epoch."""

    probability: Tensor  # (n,) float32, of the image's class
    correct: Tensor  # (n,) bool
    last: dict[str, Tensor]  # scores that need one epoch; of the last epoch only


@torch.no_grad()
def _measure(net: nn.Module, data: TrainingSet, *, half: bool, is_last: bool) -> Epoch:
    parts: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    with evaluation_mode(net), head_inputs(net, enabled=is_last) as inputs:
        for x, y in zip(data.images.split(BATCH), data.labels.split(BATCH), strict=True):
            inputs.clear()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
                logits = net(data.pixels(x))
            logits = logits.float()
            p = logits.softmax(1)
            last = {}
            if is_last:
                last = {
                    "el2n": el2n(logits, y),
                    "grand_last": grand_last(logits, y, inputs[-1].flatten(1).float()),
                    "uncertainty": torch.special.entr(p).sum(1),  # entropy of the prediction
                    "loss": F.cross_entropy(logits, y, reduction="none"),
                }
            parts.append((p.gather(1, y[:, None])[:, 0], logits.argmax(1) == y, last))
    last = {name: torch.cat([f[2][name] for f in parts]).cpu() for name in parts[0][2]}
    return Epoch(torch.cat([f[0] for f in parts]).cpu(), torch.cat([f[1] for f in parts]).cpu(), last)


def score_run(
    data: TrainingSet,
    recipe: StudentConfig,
    *,
    seed: int,
    cad_window: int,
    on_epoch: Callable[[int, float], None] | None = None,
) -> dict[str, Tensor]:
    """Train the agent and score all n images, (n,) float32 by score."""
    epochs: list[Epoch] = []
    half = resolve_dtype(recipe.dtype, data.images.device, "training") == "bfloat16"

    def evaluate(net: nn.Module, epoch: int) -> float:
        epochs.append(_measure(net, data, half=half, is_last=epoch == recipe.epochs))
        return 0.0

    # after every epoch, without setting validation images aside
    fit(data, dataclasses.replace(recipe, tests=recipe.epochs), seed=seed, evaluate=evaluate, on_epoch=on_epoch)
    correct = torch.stack([e.correct for e in epochs])
    scores = {**epochs[-1].last, "forgetting": forgetting(correct)}
    if len(epochs) > 1:
        scores["cad"] = cad(torch.stack([e.probability for e in epochs]), cad_window)
    return scores


# --- scores of several runs, on disk ------------------------------------------------------------------------------


def difficulty_recipe(settings: DifficultyConfig) -> StudentConfig:
    """Return the settings of a run as those of a student.

    The learning rate stays constant, as it is at the beginning of any schedule.
    """
    return StudentConfig(
        net=settings.net,
        labels="hard",
        epochs=settings.trained_epochs,
        batch_size=settings.batch_size,
        optimizer="sgd",
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        schedule="constant",
        augment=settings.augment,
        dtype=settings.dtype,
    )


def order_file(score: str, runs: int) -> str:
    """Return the file name of the orders by a score."""
    return f"order-{score}-{runs}.safetensors"


@dataclass(frozen=True)
class DifficultyCache:
    """Folder of scores, one file per run.

    The number of runs is not part of its identity, so that runs can be added.
    """

    folder: Path
    key: str  # digest of all that decides a run's scores beside its number

    def path(self, run: int) -> Path:
        return self.folder / f"run-{run:03d}.safetensors"

    def agent(self) -> tuple[str, int]:
        """Return the network of the runs and its epochs, from the folder."""
        recipe = read_json(self.folder / "manifest.json")["recipe"]
        return recipe["net"], recipe["epochs"]

    def missing(self, runs: int) -> list[int]:
        """Return the missing runs below `runs`; a damaged file is removed."""
        return [r for r in range(runs) if not is_done(self.path(r))]

    def runs(self, score: str, runs: int) -> tuple[Tensor, Tensor]:
        """Load scores of the first runs and the rows of their images.

        Scores are (runs, n) float32, rows (n,) int64 of train.

        Raises:
            InputError: if runs are missing, or have no such score.
        """
        if missing := self.missing(runs):
            raise InputError(
                f"{self.folder} lacks {len(missing)} of {runs} runs of difficulty scores; run `dq prune` first"
            )
        tensors = [read_tensors(self.path(r))[0] for r in range(runs)]
        if any(score not in t for t in tensors):
            raise InputError(f"the runs in {self.folder} are of one epoch and have no score {score!r}; choose another")
        return torch.stack([t[score] for t in tensors]), tensors[0]["rows"]

    def by_row(self, score: str, runs: int, n: int) -> Tensor:
        """Return mean scores over runs by row, (n,) float32.

        NaN for images that cannot be read.
        """
        scores, rows = self.runs(score, runs)
        by_row = torch.full((n,), torch.nan)
        by_row[rows] = scores.mean(0)
        return by_row

    def orders(self, source: ImageSource, score: str, runs: int) -> list[Tensor]:
        """Return the rows of every class from easy to hard.

        They are (n_c,) int64, of train; see `easy_to_hard`.
        """
        scores, rows = self.runs(score, runs)
        labels = torch.from_numpy(source.train.labels)[rows]
        return [rows[order] for order in easy_to_hard(scores.mean(0), labels, len(source.class_names))]

    def save_orders(self, source: ImageSource, score: str, runs: int) -> Path:
        """Write `orders` in `order_file` beside the runs, unless it exists.

        A tensor `class-00003` of each class, as `dq.networks.trajectories.read_orders` takes them.
        """
        path = self.folder / order_file(score, runs)
        if not is_done(path):
            orders = self.orders(source, score, runs)
            write_tensors(path, {f"class-{c:05d}": order for c, order in enumerate(orders)})
        return path


def difficulty_identity(source: ImageSource, image_size: int, settings: DifficultyConfig) -> PlainDict:
    """Return what decides the scores of a run, for a digest."""
    return {
        "data": source.fingerprint,
        "image_size": image_size,
        "preprocess": source.preprocess,
        "on_bad_image": "raise",  # decides whether there is a result, never which
        "recipe": to_dict(difficulty_recipe(settings)),
        "cad_window": settings.cad_window,
        "seed": settings.seed,
    }


def find_difficulty(
    cache_dir: str | Path, source: ImageSource, image_size: int, settings: DifficultyConfig
) -> DifficultyCache:
    """Return the cache of these data and settings, or of the folder `settings.path`.

    Nothing is written.

    Raises:
        InputError: if the folder named holds no scores, or those of other images.
    """
    if settings.path is None:
        key = digest_of(difficulty_identity(source, image_size, settings))
        return DifficultyCache(Path(cache_dir) / f"difficulty-{key}", key)
    folder = Path(settings.path)
    if not (folder / "manifest.json").is_file():
        raise InputError(f"prune.path={folder} holds no difficulty scores; name a folder difficulty-... of a cache")
    facts = {k: v for k, v in read_json(folder / "manifest.json").items() if k not in ("origin", "classes")}
    if facts.get("data") != source.fingerprint:
        raise InputError(
            f"the difficulty scores in {folder} are of other images (fingerprint {facts.get('data')}, these have "
            f"{source.fingerprint}); leave prune.path out, or name scores of these images"
        )
    if (facts.get("image_size"), facts.get("preprocess")) != (image_size, source.preprocess):
        log.warning(
            "note: the difficulty scores in %s are of these images at %s px (%s), and the run has them at %d px (%s)",
            *(folder, facts.get("image_size"), facts.get("preprocess"), image_size, source.preprocess),
        )
    return DifficultyCache(folder, digest_of(facts))


def make_difficulty(
    cache_dir: str | Path,
    source: ImageSource,
    image_size: int,
    settings: DifficultyConfig,
    *,
    device: torch.device,
    local_units: Callable[[list[float]], list[int]] | None = None,
    main: bool = True,
) -> DifficultyCache:
    """Make the runs that the cache lacks.

    A finished run is kept, so that a killed call resumes with the next one. The agent learns from all train images,
    since all of them are to be scored: the scores of images that it has not seen would not compare. All train images
    are held in memory.

    `local_units` picks from the costs of all runs those that this process makes; None: all.

    Raises:
        InputError: if the network does not fit the images, or `settings.path` lacks runs.
    """
    cache = find_difficulty(cache_dir, source, image_size, settings)
    missing = cache.missing(settings.runs)
    if not missing:
        return cache
    if settings.path is not None:
        raise InputError(
            f"{cache.folder} has {settings.runs - len(missing)} of {settings.runs} runs; lower prune.runs, or leave "
            "prune.path out"
        )
    identity = difficulty_identity(source, image_size, settings)
    write_manifest(cache.folder, {**identity, "origin": source.origin, "classes": list(source.class_names)})
    local = local_units([1.0] * settings.runs) if local_units else range(settings.runs)
    todo = [run for run in local if run in missing]
    if todo:
        real_data = load_real_data(source, image_size, cache_dir=Path(cache_dir), device=device)
        _make_runs(cache, real_data, settings, todo, main=main)
    return cache


def _make_runs(
    cache: DifficultyCache, real_data: RealData, settings: DifficultyConfig, runs: Sequence[int], *, main: bool
) -> None:
    recipe = difficulty_recipe(settings)
    images, rows = _readable(real_data)
    labels = torch.from_numpy(real_data.source.train.labels)[rows]
    device, pixels = real_data.device, real_data.pixels(recipe)
    data = TrainingSet(images.to(device), labels.to(device), real_data.classes, pixels)
    with progress([], desc="prune", total=len(runs) * recipe.epochs, unit="epoch", main=main) as bar:
        for run in runs:

            def show(epoch: int, loss: float, run: int = run) -> None:
                bar.update(1)
                bar.set_postfix(run=run, loss=f"{loss:.3f}")

            seed = derive_seed(settings.seed, "difficulty", run)
            scores = score_run(data, recipe, seed=seed, cad_window=settings.cad_window, on_epoch=show)
            write_tensors(cache.path(run), {**scores, "rows": rows}, {"run": run})
            unit_done("prune", cache.path(run).name, bar.format_dict["elapsed"], images=len(rows))


def _readable(real_data: RealData) -> tuple[Tensor, Tensor]:
    """All train images that can be read, and their rows (n,) int64."""
    # with rows for labels, which are returned for the images that could be read
    split = dataclasses.replace(real_data.source.train, labels=np.arange(len(real_data.source.train)))
    return real_data.read(split, np.arange(len(split)))


# --- orders -------------------------------------------------------------------------------------------------------


def easy_to_hard(scores: Tensor, labels: Tensor, classes: int) -> list[Tensor]:
    """Sort the images of every class by difficulty scores (n,), lowest first.

    Returns positions (n_c,) int64; ties go by position. `labels` is (n,) int64.
    """
    positions = [(labels == c).nonzero()[:, 0] for c in range(classes)]
    return [p[scores[p].argsort(stable=True)] for p in positions]


def rank_agreement(scores: Tensor, labels: Tensor) -> float:
    """Return the mean Spearman correlation within classes between the scores of two runs.

    Over all pairs and classes; NaN if no class has scores that differ. `scores` is (R, n), of R >= 2 runs or means of
    runs, `labels` (n,) int64.
    """
    from scipy.stats import spearmanr

    values: list[float] = []
    for c in labels.unique().tolist():
        of_class = scores[:, labels == c].double().numpy()
        varied = [x for x in of_class if np.ptp(x) > 0]  # ranks of equal scores correlate with nothing
        values += [float(spearmanr(a, b).statistic) for a, b in itertools.combinations(varied, 2)]
    return float(np.mean(values)) if values else float("nan")
