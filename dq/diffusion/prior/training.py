"""Training loop of codec and denoiser: averages, schedules, checkpoints and resume.

The batch of step s is a pure function of (seed, s). The state of a training is therefore its parameters, their
averages, the optimizer's moments and the step, and a resumed training equals an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dq.config.dtypes import record_dtypes
from dq.core.compilation import missing_compiler
from dq.core.errors import InputError, RunError
from dq.core.files import append_jsonl, is_done, read_metadata, read_tensors, write_tensors
from dq.core.plain import PlainDict
from dq.core.progress import progress
from dq.core.seeds import derive_seed
from dq.core.text import plural
from dq.core.trackers import report
from dq.diffusion.codec import DTYPES
from dq.diffusion.prior.curves import draw_curves
from dq.diffusion.prior.recipe import Fitted, Recipe
from dq.networks.optimizers import MuonAdamW, muon_groups

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dq")

MAX_BYTES = 8 << 30  # of training data held in memory
LOG_EVERY = 20  # steps; reading the loss makes the host wait for the device


def fit(
    recipe: Recipe,
    objective: nn.Module,
    batch: Callable[[int], dict[str, Tensor]],
    *,
    accelerator: Accelerator,
    on_save: Callable[[int], dict[str, float]],
    save: Callable[[Path], None],
    score: Callable[[], float] | None = None,
) -> Fitted:
    """Minimize the mean of `objective(**batch(step))["loss"]`, with averaged parameters.

    The best average of the parameters is left in `objective`.

    Args:
        recipe: settings of the loop.
        objective: holds the model; gives named terms, each (b,), for a batch. A module and not a function because DDP
            sums gradients over processes only for what passes through `forward`. Parameters that need no gradient are
            neither trained nor averaged.
        batch: the batch of a step on the CPU, the same in every process, each tensor with batch_size rows.
        accelerator: device and processes.
        on_save: called by the main process every `save_every` steps, at `extra_saves` and at the last, while
            `objective` holds the averaged parameters; draws samples and returns numbers for the log.
        save: writes the model that `objective` holds into a folder; used when the training diverges.
        score: loss on held-out data of the parameters that `objective` holds. It chooses among several averages;
            without it the first decay is taken.

    Raises:
        InputError: if there are more processes or parts than rows in a batch.
        RunError: if a loss or its gradient is not finite, or the disk lacks space for the checkpoints.
    """
    world, main = accelerator.num_processes, accelerator.is_main_process
    if recipe.batch_size < world * recipe.accumulate:
        raise InputError(
            f"prior.{recipe.name}.batch_size={recipe.batch_size} is less than "
            f"its {plural(recipe.accumulate, 'part')} on {plural(world, 'process')}; raise it"
        )
    objective.to(accelerator.device).train()
    state = _new_state(recipe, objective)
    run = _Run(recipe, objective, state, accelerator, on_save, save, score)
    restored = _restore(recipe, state, main=main)
    first = restored.step
    _check_disk(recipe, sum(p.numel() * 4 for p in state.trained.values()))
    # no process may write before all have read
    accelerator.wait_for_everyone()
    if recipe.auto is not None:
        record_dtypes(recipe.folder, recipe.auto, main=main)
    backward = _backward(recipe, objective, accelerator)
    sums: dict[str, Tensor] = {}  # of the terms since the last save
    last_save = first
    began = time.perf_counter()
    options: PlainDict = {"total": recipe.steps, "unit": "step", "main": main and recipe.steps > 0}
    with progress([], desc=f"train {recipe.name}", **options) as bar:
        bar.initial = bar.n = first
        for step in range(first, recipe.steps):
            means = _train_step(run, backward, batch(step), step)
            sums = {k: sums.get(k, 0) + v for k, v in means.items()}
            done = step + 1
            bar.update()
            if done % LOG_EVERY == 0:
                # the norm is the same in every process, so that all of them stop
                _check_finite(run, [("gradient", float(means["grad_norm"]))], done)
                bar.set_postfix(loss=f"{float(means['loss']) * world:.4f}", refresh=False)
            if done % recipe.save_every == 0 or done == recipe.steps or done in recipe.extra_saves:
                losses = {k: float(accelerator.reduce(v, "sum")) / (done - last_save) for k, v in sums.items()}
                _check_finite(run, losses.items(), done)
                if main:
                    _log(run, done, losses)
                    seconds = restored.seconds + time.perf_counter() - began
                    _save(recipe, state, restored._replace(step=done, seconds=seconds))
                sums, last_save = {}, done
                accelerator.wait_for_everyone()
    best, scores = _best(objective, state.averages, score) if main else (0, [])
    objective.load_state_dict(state.averages[best], strict=False)
    objective.eval()
    spent = restored.seconds + time.perf_counter() - began
    return Fitted(spent, recipe.emas[best], scores[best] if scores else None, restored.earlier_steps)


@dataclass(frozen=True)
class _State:
    """What a checkpoint holds of a training, beside the step."""

    trained: dict[str, nn.Parameter]
    averages: list[dict[str, Tensor]]  # one per decay, by name of the parameter
    optimizer: torch.optim.Optimizer


class _Progress(NamedTuple):
    """How far a training is."""

    step: int = 0
    seconds: float = 0.0
    earlier_steps: Sequence[Sequence[int]] = ()  # see `Fitted`


@dataclass(frozen=True)
class _Run:
    """The arguments of one call of `fit`, and its state."""

    recipe: Recipe
    objective: nn.Module
    state: _State
    accelerator: Accelerator
    on_save: Callable[[int], dict[str, float]]
    save: Callable[[Path], None]
    score: Callable[[], float] | None


def _new_state(recipe: Recipe, objective: nn.Module) -> _State:
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    averages = [{name: p.detach().clone() for name, p in trained.items()} for _ in recipe.emas]
    return _State(trained, averages, new_optimizer(recipe, objective))


def _backward(
    recipe: Recipe, objective: nn.Module, accelerator: Accelerator
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Function that adds gradients of a batch and returns its mean terms.

    Every process takes `recipe.accumulate` parts of the batch; its terms are sums over its rows divided by the batch
    size.
    """
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    missing = missing_compiler(device) if recipe.compile else None
    if missing and accelerator.is_main_process:
        log.warning("prior.%s.compile: the model is not compiled, as %s", recipe.name, missing)
    forward: Any = torch.compile(objective, dynamic=False) if recipe.compile and not missing else objective
    forward = accelerator.prepare(forward) if world > 1 else forward
    autocast = torch.autocast(device.type, DTYPES[recipe.dtype], enabled=recipe.dtype != "float32")
    # gradients are averaged over processes; parts that differ in size still add up to the mean of the batch
    cuts = [i * recipe.batch_size // (world * recipe.accumulate) for i in range(world * recipe.accumulate + 1)]
    parts = [slice(cuts[i], cuts[i + 1]) for i in range(rank * recipe.accumulate, (rank + 1) * recipe.accumulate)]

    def backward(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        means: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            is_last = i == len(parts) - 1
            with contextlib.nullcontext() if is_last or world == 1 else forward.no_sync():
                with autocast:
                    terms = forward(**{k: v[part].to(device, non_blocking=True) for k, v in batch.items()})
                (terms["loss"].sum() * world / recipe.batch_size).backward()
            means = {k: means.get(k, 0) + v.detach().sum() / recipe.batch_size for k, v in terms.items()}
        return means

    return backward


def _train_step(
    run: _Run,
    backward: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    batch: dict[str, Tensor],
    step: int,
) -> dict[str, Tensor]:
    """Update parameters and averages; return this process's share of the mean terms."""
    recipe, state = run.recipe, run.state
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.lr * rate(step, recipe.steps, recipe.schedule, recipe.warmup_steps)
    run.objective.zero_grad(set_to_none=True)
    means = backward(batch)
    norm = nn.utils.clip_grad_norm_(list(state.trained.values()), 1.0)
    state.optimizer.step()
    _update_averages(recipe, state, step)
    return {**means, "grad_norm": norm / run.accelerator.num_processes}


def _update_averages(recipe: Recipe, state: _State, step: int) -> None:
    """Update the averages, with short ones at first."""
    parameters = [p.detach() for p in state.trained.values()]
    for decay, average in zip(recipe.emas, state.averages, strict=True):
        get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(list(average.values()), parameters, None)


def _log(run: _Run, done: int, losses: dict[str, float]) -> None:
    """Score the averages, draw samples and log both beside the losses."""
    recipe = run.recipe
    best, scores = _best(run.objective, run.state.averages, run.score)
    # the last update may break it after a finite loss
    _check_finite(run, [("held-out loss", score) for score in scores], done)
    with _holding(run.objective, run.state.averages[best]):
        numbers = run.on_save(done)
    # no scores where nothing is held out
    numbers |= {f"held_out_{decay:g}": v for decay, v in zip(recipe.emas, scores, strict=False)}
    append_jsonl(recipe.folder / "metrics.jsonl", {"stage": recipe.name, "step": done, **losses, **numbers})
    report(run.accelerator, {f"{recipe.name}/{k}": v for k, v in (losses | numbers).items()}, done)
    draw_curves(recipe.folder / "metrics.jsonl", recipe.folder / "samples" / "losses.png")


def new_optimizer(recipe: Recipe, objective: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or Muon for hidden matrices and AdamW for the rest.

    Raises:
        InputError: for Muon without hidden matrices, or with a torch that lacks it.
    """
    decay = recipe.weight_decay
    if recipe.optimizer == "muon":
        hidden, rest = (list(p.values()) for p in muon_groups(objective, recipe.output_layers))
        groups = [{"params": rest, "weight_decay": decay, "fused": True}]
        return MuonAdamW(hidden, groups, lr=recipe.lr, weight_decay=decay)
    trained = [p for p in objective.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=decay, fused=True)


def _best(
    objective: nn.Module, averages: list[dict[str, Tensor]], score: Callable[[], float] | None
) -> tuple[int, list[float]]:
    """Index of the average with the smallest score, and all scores.

    Without a score the first average and no scores.
    """
    if score is None:
        return 0, []
    scores = []
    for average in averages:
        with _holding(objective, average):
            scores.append(score())
    return min(range(len(scores)), key=scores.__getitem__), scores


def rate(step: int, steps: int, schedule: str, warmup_steps: int) -> float:
    """Factor of the learning rate: linear warm-up, then constant or cosine.

    The cosine falls to 0 at the last step.
    """
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    if schedule == "constant" or step < warmup_steps:
        return warm
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


@contextlib.contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Initialize modules within the block from `derive_seed(*parts)`.

    Their constructors know only the global generator, whose state is restored afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*parts))
        yield


@contextlib.contextmanager
def _holding(objective: nn.Module, average: dict[str, Tensor]) -> Iterator[None]:
    """Within the block the module has these parameters, in evaluation mode."""
    current = {name: p.detach().clone() for name, p in objective.named_parameters() if name in average}
    objective.load_state_dict(average, strict=False)
    objective.eval()
    with torch.no_grad():
        yield
    objective.load_state_dict(current, strict=False)
    objective.train()


def _check_finite(run: _Run, values: Iterable[tuple[str, float]], done: int) -> None:
    """Stop a training that diverged.

    The averaged model of the last checkpoint is saved where it can be opened.

    Raises:
        RunError: that names the first value that is not finite.
    """
    name = next((name for name, value in values if not math.isfinite(value)), None)
    if name is None:
        return
    recipe, outcome = run.recipe, "no earlier step was saved"
    if is_done(recipe.checkpoint):
        step, folder = int(read_metadata(recipe.checkpoint)["step"]), recipe.scratch / "last-good"
        outcome = f"the averaged model of step {step} is in {folder}"
        if run.accelerator.is_main_process:
            tensors, _ = read_tensors(recipe.checkpoint)
            average = {k.removeprefix("average.0."): v for k, v in tensors.items() if k.startswith("average.0.")}
            run.objective.load_state_dict(average, strict=False)
            run.save(folder)
    run.accelerator.wait_for_everyone()  # a process that ends first would take the others with it
    raise RunError(
        f"the {name} of the {recipe.name} became NaN or infinite before step {done}; {outcome}; lower "
        f"prior.{recipe.name}.lr or raise its warmup_steps, and train in another prior.output_dir"
    )


def _check_disk(recipe: Recipe, model_bytes: int) -> None:
    """Check the space for two checkpoints and the model.

    The next checkpoint is written before the last is deleted.
    """
    needed = model_bytes * (2 * (3 + len(recipe.emas)) + 1)
    if recipe.checkpoint.is_file():
        needed -= recipe.checkpoint.stat().st_size
    recipe.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(recipe.folder).free
    if free < needed:
        raise RunError(
            f"the checkpoints of the {recipe.name} need {needed / 2**20:.0f} MiB but {recipe.folder} has "
            f"{free / 2**20:.0f} MiB free; free some, or choose another prior.output_dir"
        )


def _save(recipe: Recipe, state: _State, reached: _Progress) -> None:
    tensors: dict[str, Tensor] = {f"parameter.{name}": p for name, p in state.trained.items()}
    for i, average in enumerate(state.averages):
        tensors |= {f"average.{i}.{name}": v for name, v in average.items()}
    for i, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"moment.{i}.{k}": v for k, v in moments.items()}
    digests = {"digest": recipe.digest, "digest_without_steps": recipe.digest_without_steps}
    write_tensors(recipe.checkpoint, tensors, {**reached._asdict(), **digests, "steps": recipe.steps})


def _restore(recipe: Recipe, state: _State, *, main: bool) -> _Progress:
    """Continue from an existing checkpoint."""
    if not is_done(recipe.checkpoint):
        return _Progress()
    tensors, metadata = read_tensors(recipe.checkpoint)
    with torch.no_grad():
        for name, p in state.trained.items():
            p.copy_(tensors[f"parameter.{name}"])
            for i, average in enumerate(state.averages):
                average[name].copy_(tensors[f"average.{i}.{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, v in tensors.items():
        if key.startswith("moment."):
            _, number, name = key.split(".")
            moments.setdefault(int(number), {})[name] = v
    state.optimizer.load_state_dict({"state": moments, "param_groups": state.optimizer.state_dict()["param_groups"]})
    reached = _Progress(**{field: metadata[field] for field in _Progress._fields if field in metadata})
    step, steps = reached.step, metadata.get("steps", recipe.steps)
    if steps != recipe.steps:
        reached = reached._replace(earlier_steps=[*reached.earlier_steps, [steps, step]])
        if main:
            log.info(
                "continuing an unfinished %s from step %d with %d steps in all in place of %d; its rate follows "
                "from the new number from here on",
                *(recipe.name, step, recipe.steps, steps),
            )
    return reached
