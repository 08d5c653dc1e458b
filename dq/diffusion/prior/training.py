"""The training loop that codec and denoiser share: parameter averages, schedules, checkpoints, resume.

The batch of step s is a pure function of (seed, s). The state of a training is therefore its parameters, their
averages, the optimizer's moments and the step, and a resumed training equals an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dq.config.dtypes import USES, Dtypes, folder_dtypes, record_dtypes
from dq.core.errors import InputError, RunError
from dq.core.files import append_jsonl, is_done, read_json, read_metadata, read_tensors, write_json, write_tensors
from dq.core.progress import progress
from dq.core.seeds import derive_seed, digest_of
from dq.core.trackers import report
from dq.diffusion.codec import DTYPES
from dq.diffusion.prior.curves import draw_curves
from dq.networks.optimizers import MuonAdamW, muon_groups

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_BYTES = 8 << 30  # of training data held in memory
LOOK_EVERY = 20  # steps; reading the loss makes the host wait for the device


@dataclass(frozen=True)
class Recipe:
    """What the loop needs to know of a training."""

    name: str  # "codec" or "denoiser"
    folder: Path  # the prior's folder
    product: Path  # the model folder that this training makes
    identity: dict[str, Any]  # everything that decides the result
    steps: int
    batch_size: int  # over all processes
    lr: float
    emas: tuple[float, ...]  # decays of the averages
    save_every: int
    dtype: str  # of the autocast
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    accumulate: int = 1
    compile: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    output_layers: tuple[str, ...] = ()  # muon: see `muon_groups`
    extra_saves: tuple[int, ...] = ()  # steps at which there is a save, whatever `save_every`
    parts: tuple[str, ...] = ()  # files in `folder` that the training leaves beside the product
    auto: Dtypes | None = None  # what `dtype: auto` stands for in the folder

    @property
    def digest(self) -> str:
        return digest_of(self.identity)

    @property
    def scratch(self) -> Path:
        return self.folder / f".training-{self.name}"

    @property
    def checkpoint(self) -> Path:
        return self.scratch / "checkpoint.safetensors"


@dataclass(frozen=True)
class Fitted:
    """What a training cost and which average it left in the model."""

    seconds: float  # over all interruptions, without the time between them
    ema: float
    held_out: float | None  # loss of that average on held-out data, None where nothing was held out


def training_dtypes(folder: Path, name: str, product: Path, where: Accelerator | torch.device | str) -> Dtypes:
    """What `dtype: auto` stands for in a training of the prior: the dtype of the model that is there, else that of the
    folder, in which `fit` keeps it."""
    dtypes = folder_dtypes(folder, where, begun="float32" if (folder / f".training-{name}").exists() else None)
    made = product / "training.json"
    if made.is_file():
        return dict.fromkeys(USES, str(read_json(made)["settings"].get("dtype", "float32")))
    return dtypes


def finished(recipe: Recipe) -> bool:
    """Whether this very training is done.

    Raises:
        RunError: if the folder holds a model or a checkpoint of another training, or lacks a part of this one.
    """
    way_out = "choose another prior.output_dir, or delete that folder"
    record = recipe.product / "training.json"
    if recipe.product.exists():
        if not record.is_file():
            raise RunError(f"{recipe.product} holds a model that was not trained here; {way_out}")
        if read_json(record)["digest"] != recipe.digest:
            raise RunError(f"{recipe.product} holds a {recipe.name} of other settings, data or classes; {way_out}")
        lost = next((p for p in recipe.parts if not (recipe.folder / p).is_file()), None)
        if lost is not None:
            raise RunError(
                f"{recipe.folder} lacks {lost} of a finished {recipe.name}, which only the whole training makes: put "
                f"it back, choose another prior.output_dir, or delete {recipe.product} to train again"
            )
        return True
    if is_done(recipe.checkpoint) and read_metadata(recipe.checkpoint)["digest"] != recipe.digest:
        raise RunError(
            f"{recipe.scratch} holds an unfinished {recipe.name} of other settings, data or classes; {way_out}"
        )
    return False


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
    """Minimise the mean of `objective(**batch(step))["loss"]` and leave the best average of the parameters in
    `objective`.

    Args:
        objective: holds the model; gives named terms, each (b,), for a batch. A module and not a function because
            DDP sums gradients over processes only for what passes through `forward`. Parameters that need no gradient
            are neither trained nor averaged.
        batch: the whole batch of a step on the CPU, the same in every process, each tensor with batch_size rows.
        on_save: called by the main process every `save_every` steps, at `extra_saves` and at the last, while
            `objective` holds the averaged parameters; draws samples and returns numbers for the log.
        save: writes the model that `objective` holds into a folder; used when the training diverges.
        score: loss on held-out data of whatever parameters `objective` holds. It chooses among several averages;
            without it the first decay is taken.

    Raises:
        InputError: if there are more processes or parts than rows in a batch.
        RunError: if a loss or its gradient is not finite, or the disk lacks room for the checkpoints.
    """
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    main = accelerator.is_main_process
    if recipe.batch_size < world * recipe.accumulate:
        raise InputError(
            f"prior.{recipe.name}.batch_size={recipe.batch_size} is less than its {recipe.accumulate} part(s) on "
            f"{world} process(es); raise it"
        )
    objective.to(device).train()
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    averages = [{name: p.detach().clone() for name, p in trained.items()} for _ in recipe.emas]
    optimizer = new_optimizer(recipe, objective)
    first, seconds = _restore(recipe, trained, averages, optimizer)
    _check_disk(recipe, sum(p.numel() * 4 for p in parameters))
    # no process may write before all have read
    accelerator.wait_for_everyone()
    if recipe.auto is not None:
        record_dtypes(recipe.folder, recipe.auto, main=accelerator.is_main_process)
    forward: Any = torch.compile(objective, dynamic=False) if recipe.compile else objective
    forward = accelerator.prepare(forward) if world > 1 else forward
    autocast = torch.autocast(device.type, DTYPES[recipe.dtype], enabled=recipe.dtype != "float32")
    # Gradients are averaged over processes; shares that differ in size still add up to the mean of the batch.
    cuts = [i * recipe.batch_size // (world * recipe.accumulate) for i in range(world * recipe.accumulate + 1)]
    parts = [slice(cuts[i], cuts[i + 1]) for i in range(rank * recipe.accumulate, (rank + 1) * recipe.accumulate)]
    sums: dict[str, Tensor] = {}  # of the terms since the last save
    since = first
    began = time.perf_counter()
    with progress(
        [], desc=f"train {recipe.name}", total=recipe.steps, unit="step", main=main and recipe.steps > 0
    ) as bar:
        bar.initial = bar.n = first
        for step in range(first, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate(step, recipe.steps, recipe.schedule, recipe.warmup_steps)
            objective.zero_grad(set_to_none=True)
            whole = batch(step)
            means: dict[str, Tensor] = {}
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                with contextlib.nullcontext() if last or world == 1 else forward.no_sync():
                    with autocast:
                        terms = forward(**{k: v[part].to(device, non_blocking=True) for k, v in whole.items()})
                    (terms["loss"].sum() * world / recipe.batch_size).backward()
                means = {k: means.get(k, 0) + v.detach().sum() / recipe.batch_size for k, v in terms.items()}
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            for decay, average in zip(recipe.emas, averages):
                # a short average at first, so that the start does not linger
                decay = min(decay, (1 + step) / (10 + step))
                get_ema_multi_avg_fn(decay)(list(average.values()), [p.detach() for p in parameters], None)
            means["grad_norm"] = norm / world
            sums = {k: sums.get(k, 0) + v for k, v in means.items()}
            done = step + 1
            bar.update()
            if done % LOOK_EVERY == 0:
                # the norm is the same in every process, so that all of them stop
                if not math.isfinite(float(norm)):
                    _diverged(recipe, objective, save, "gradient", done, accelerator)
                bar.set_postfix(loss=f"{float(means['loss']) * world:.4f}", refresh=False)
            if done % recipe.save_every == 0 or done == recipe.steps or done in recipe.extra_saves:
                logged = {k: float(accelerator.reduce(v, "sum")) / (done - since) for k, v in sums.items()}
                broken = next((k for k, v in logged.items() if not math.isfinite(v)), None)
                if broken:
                    _diverged(recipe, objective, save, broken, done, accelerator)
                if main:
                    best, scores = _best(objective, averages, score)
                    if not all(math.isfinite(v) for v in scores):  # the last update broke it, after a good loss
                        _diverged(recipe, objective, save, "held-out loss", done, accelerator)
                    with _holding(objective, averages[best]):
                        numbers = on_save(done)
                    numbers |= {f"held_out_{decay:g}": v for decay, v in zip(recipe.emas, scores)}
                    record = {"stage": recipe.name, "step": done, **logged, **numbers}
                    append_jsonl(recipe.folder / "metrics.jsonl", record)
                    report(accelerator, {f"{recipe.name}/{k}": v for k, v in (logged | numbers).items()}, done)
                    draw_curves(recipe.folder / "metrics.jsonl", recipe.folder / "samples" / "losses.png")
                    _save(recipe, trained, averages, optimizer, done, seconds + time.perf_counter() - began)
                sums, since = {}, done
                accelerator.wait_for_everyone()
    best, scores = _best(objective, averages, score) if main else (0, [])
    objective.load_state_dict(averages[best], strict=False)
    objective.eval()
    spent = seconds + time.perf_counter() - began
    return Fitted(spent, recipe.emas[best], scores[best] if scores else None)


def new_optimizer(recipe: Recipe, objective: nn.Module) -> torch.optim.Optimizer:
    """AdamW for all parameters, or Muon for hidden matrices and AdamW for the rest.

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
    """Number of the average with the least score, and all scores; without a score the first and none."""
    if score is None:
        return 0, []
    scores = []
    for average in averages:
        with _holding(objective, average):
            scores.append(score())
    return min(range(len(scores)), key=scores.__getitem__), scores


def rate(step: int, steps: int, schedule: str, warmup_steps: int) -> float:
    """Factor of the learning rate: rises linearly over the first steps, then stays at 1 or falls to 0 by half a cosine
    at the last."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    if schedule == "constant" or step < warmup_steps:
        return warm
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def hardware(accelerator: Accelerator) -> str:
    """What a training ran on, for its record."""
    device = accelerator.device
    if device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(device)}"
    return f"{accelerator.num_processes} process(es) of {torch.get_num_threads()} CPU thread(s), {platform.machine()}"


def publish(
    recipe: Recipe, save: Callable[[Path], None], numbers: dict[str, Any], fitted: Fitted, accelerator: Accelerator
) -> None:
    """Save the model folder whole or not at all, with its `training.json`, and drop the checkpoint."""
    import diffusers

    whole = recipe.scratch / recipe.product.name
    if whole.exists():
        shutil.rmtree(whole)
    save(whole)
    record = {
        "digest": recipe.digest,
        "settings": recipe.identity,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "hardware": hardware(accelerator),
        "seconds": round(fitted.seconds, 1),
        "images_per_s": round(recipe.steps * recipe.batch_size / fitted.seconds, 1) if recipe.steps else None,
        "ema": fitted.ema,
        "held_out_loss": fitted.held_out,
        **numbers,
    }
    write_json(whole / "training.json", record)
    os.replace(whole, recipe.product)
    shutil.rmtree(recipe.scratch)


@contextlib.contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """A block in which modules initialize from `derive_seed(*parts)`, since their constructors know only the global
    generator; afterwards that is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*parts))
        yield


@contextlib.contextmanager
def _holding(objective: nn.Module, average: dict[str, Tensor]) -> Iterator[None]:
    """The module with these parameters, in evaluation mode, for the time of a block."""
    own = {name: p.detach().clone() for name, p in objective.named_parameters() if name in average}
    objective.load_state_dict(average, strict=False)
    objective.eval()
    with torch.no_grad():
        yield
    objective.load_state_dict(own, strict=False)
    objective.train()


def _diverged(
    recipe: Recipe,
    objective: nn.Module,
    save: Callable[[Path], None],
    what: str,
    done: int,
    accelerator: Accelerator,
) -> NoReturn:
    """Stop, and leave the averaged model of the last checkpoint where it can be opened.

    Raises:
        RunError: always.
    """
    kept = "no earlier step was saved"
    if is_done(recipe.checkpoint):
        step, good = int(read_metadata(recipe.checkpoint)["step"]), recipe.scratch / "last-good"
        kept = f"the averaged model of step {step} is in {good}"
        if accelerator.is_main_process:
            tensors, _ = read_tensors(recipe.checkpoint)
            average = {k.removeprefix("average.0."): v for k, v in tensors.items() if k.startswith("average.0.")}
            objective.load_state_dict(average, strict=False)
            save(good)
    accelerator.wait_for_everyone()  # a process that ends first would take the others with it
    raise RunError(
        f"the {what} of the {recipe.name} became NaN or infinite before step {done}; {kept}; lower "
        f"prior.{recipe.name}.lr or raise its warmup_steps, and train in another prior.output_dir"
    )


def _check_disk(recipe: Recipe, model_bytes: int) -> None:
    """Room for two checkpoints (the next is written before the last goes) and the model."""
    need = model_bytes * (2 * (3 + len(recipe.emas)) + 1)
    if recipe.checkpoint.is_file():
        need -= recipe.checkpoint.stat().st_size
    recipe.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(recipe.folder).free
    if free < need:
        raise RunError(
            f"the checkpoints of the {recipe.name} need {need / 2**20:.0f} MiB but {recipe.folder} has "
            f"{free / 2**20:.0f} MiB free; free some, or choose another prior.output_dir"
        )


def _save(
    recipe: Recipe,
    trained: dict[str, nn.Parameter],
    averages: list[dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
    tensors: dict[str, Tensor] = {f"parameter.{name}": p for name, p in trained.items()}
    for i, average in enumerate(averages):
        tensors |= {f"average.{i}.{name}": v for name, v in average.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"moment.{i}.{k}": v for k, v in state.items()}
    write_tensors(recipe.checkpoint, tensors, {"step": step, "digest": recipe.digest, "seconds": seconds})


def _restore(
    recipe: Recipe,
    trained: dict[str, nn.Parameter],
    averages: list[dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float]:
    """Continue from the checkpoint if there is one; returns the number of steps done and the seconds they took."""
    if not is_done(recipe.checkpoint):
        return 0, 0.0
    tensors, metadata = read_tensors(recipe.checkpoint)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(tensors[f"parameter.{name}"])
            for i, average in enumerate(averages):
                average[name].copy_(tensors[f"average.{i}.{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, v in tensors.items():
        if key.startswith("moment."):
            _, number, name = key.split(".")
            moments.setdefault(int(number), {})[name] = v
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"]), float(metadata["seconds"])
