"""The training loop that codec and denoiser share: parameter average, warm-up, checkpoints, resume.

The batch of step s is a pure function of (seed, s). The state of a training is therefore its parameters, their
average, the optimiser's moments and the step, and a resumed training equals an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dq.codec import DTYPES
from dq.dist import (
    append_jsonl,
    derive_seed,
    digest_of,
    progress,
    read_json,
    read_metadata,
    read_tensors,
    write_json,
    write_tensors,
)
from dq.errors import InputError, RunError

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_BYTES = 8 << 30  # of training data held in memory
BAR_EVERY = 20  # steps; reading the loss makes the host wait for the device


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
    ema: float
    save_every: int
    dtype: str  # of the autocast
    warmup_steps: int = 0
    weight_decay: float = 0.0

    @property
    def digest(self) -> str:
        return digest_of(self.identity)

    @property
    def scratch(self) -> Path:
        return self.folder / f".training-{self.name}"

    @property
    def checkpoint(self) -> Path:
        return self.scratch / "checkpoint.safetensors"


def finished(recipe: Recipe) -> bool:
    """Whether this very training is done.

    Raises:
        RunError: if the folder holds a model or a checkpoint of another training.
    """
    way_out = f"choose another prior.output_dir, or delete {recipe.folder}"
    record = recipe.product / "training.json"
    if recipe.product.exists():
        if not record.is_file():
            raise RunError(f"{recipe.product} holds a model that was not trained here; {way_out}")
        if read_json(record)["digest"] != recipe.digest:
            raise RunError(f"{recipe.product} holds a {recipe.name} of other settings, data or classes; {way_out}")
        return True
    if recipe.checkpoint.is_file() and read_metadata(recipe.checkpoint)["digest"] != recipe.digest:
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
) -> None:
    """Minimise the mean of `objective(**batch(step))["loss"]` and leave the averaged parameters in `objective`.

    Args:
        objective: holds the model; gives named terms, each (b,), for a batch. A module and not a function because
            DDP sums gradients over processes only for what passes through `forward`.
        batch: the whole batch of a step on the CPU, the same in every process, each tensor with batch_size rows.
        on_save: called by the main process every `save_every` steps and at the last, while `objective` holds the
            averaged parameters; draws samples and returns numbers for the log.

    Raises:
        InputError: if there are more processes than rows in a batch, or the dtype is float16.
        RunError: if the loss or its gradient is not finite.
    """
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    if recipe.batch_size < world:
        raise InputError(f"prior.{recipe.name}.batch_size={recipe.batch_size} is less than the {world} processes")
    if recipe.dtype == "float16":
        # its gradients underflow without loss scaling, whose state would have to be saved too
        raise InputError(f"prior.{recipe.name}.dtype=float16 cannot be trained in; use bfloat16 or float32")
    objective.to(device).train()
    names = [name for name, _ in objective.named_parameters()]
    parameters = list(objective.parameters())
    average = {name: p.detach().clone() for name, p in zip(names, parameters)}
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    first = _restore(recipe, objective, average, optimizer)
    # no process may write before all have read
    accelerator.wait_for_everyone()
    forward = accelerator.prepare(objective) if world > 1 else objective
    autocast = torch.autocast(device.type, DTYPES[recipe.dtype], enabled=recipe.dtype != "float32")
    # Gradients are averaged over processes; shares that differ in size still add up to the mean of the batch.
    share = slice(rank * recipe.batch_size // world, (rank + 1) * recipe.batch_size // world)
    sums: dict[str, Tensor] = {}  # of the terms since the last save
    since = first
    desc, main = f"train {recipe.name}", accelerator.is_main_process
    with progress([], desc=desc, total=recipe.steps, unit="step", main=main) as bar:
        bar.initial = bar.n = first
        for step in range(first, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * warmup(step, recipe.warmup_steps)
            with autocast:
                terms = forward(**{k: v[share].to(device, non_blocking=True) for k, v in batch(step).items()})
            optimizer.zero_grad(set_to_none=True)
            (terms["loss"].sum() * world / recipe.batch_size).backward()
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            # a short average at first, so that the start does not linger
            decay = min(recipe.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters], 1 - decay)
            means = {k: v.detach().sum() / recipe.batch_size for k, v in terms.items()} | {"grad_norm": norm / world}
            sums = {k: sums.get(k, 0) + v for k, v in means.items()}
            done = step + 1
            bar.update()
            if done % BAR_EVERY == 0:
                bar.set_postfix(loss=f"{float(terms['loss'].detach().mean()):.4f}", refresh=False)
            if done % recipe.save_every == 0 or done == recipe.steps:
                logged = {k: float(accelerator.reduce(v, "sum")) / (done - since) for k, v in sums.items()}
                broken = next((k for k, v in logged.items() if not math.isfinite(v)), None)
                if broken:
                    raise RunError(
                        f"the {broken} of the {recipe.name} became NaN or infinite between steps {since} and {done}; "
                        f"lower prior.{recipe.name}.lr and train in another prior.output_dir"
                    )
                if main:
                    with _averaged(objective, average):
                        numbers = on_save(done)
                    record = {"stage": recipe.name, "step": done, **logged, **numbers}
                    append_jsonl(recipe.folder / "metrics.jsonl", record)
                    _save(recipe, objective, average, optimizer, done)
                sums, since = {}, done
                accelerator.wait_for_everyone()
    objective.load_state_dict(average, strict=False)
    objective.eval()


def warmup(step: int, warmup_steps: int) -> float:
    """Factor of the learning rate: rises linearly over the first steps, then stays at 1."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def publish(recipe: Recipe, save: Callable[[Path], None], numbers: dict[str, float]) -> None:
    """Save the model folder whole or not at all, with its `training.json`, and drop the checkpoint."""
    import diffusers

    whole = recipe.scratch / recipe.product.name
    if whole.exists():
        shutil.rmtree(whole)
    save(whole)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    record = {"digest": recipe.digest, "settings": recipe.identity, "versions": versions, **numbers}
    write_json(whole / "training.json", record)
    os.replace(whole, recipe.product)
    shutil.rmtree(recipe.scratch)


@contextlib.contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """A block in which modules initialise from `derive_seed(*parts)`, since their constructors know only the global
    generator; afterwards that is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*parts))
        yield


@contextlib.contextmanager
def _averaged(objective: nn.Module, average: dict[str, Tensor]) -> Iterator[None]:
    """The module with its averaged parameters, in evaluation mode, for the time of a block."""
    own = {name: p.detach().clone() for name, p in objective.named_parameters()}
    objective.load_state_dict(average, strict=False)
    objective.eval()
    with torch.no_grad():
        yield
    objective.load_state_dict(own, strict=False)
    objective.train()


def _save(
    recipe: Recipe, objective: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int
) -> None:
    tensors: dict[str, Tensor] = {f"parameter.{name}": p for name, p in objective.named_parameters()}
    tensors |= {f"average.{name}": v for name, v in average.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"moment.{i}.{k}": v for k, v in state.items()}
    write_tensors(recipe.checkpoint, tensors, {"step": step, "digest": recipe.digest})


def _restore(
    recipe: Recipe, objective: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Continue from the checkpoint if there is one; returns the number of steps done."""
    if not recipe.checkpoint.is_file():
        return 0
    tensors, metadata = read_tensors(recipe.checkpoint)
    moments: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad():
        for name, p in objective.named_parameters():
            p.copy_(tensors[f"parameter.{name}"])
            average[name].copy_(tensors[f"average.{name}"])
    for key, v in tensors.items():
        if key.startswith("moment."):
            _, i, name = key.split(".")
            moments.setdefault(int(i), {})[name] = v
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])
