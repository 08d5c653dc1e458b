"""The training loop that codec and denoiser share: EMA, checkpoints, resume, samples.

Step s draws all its randomness from generators derived from (seed, s), so that the state of a training is its
parameters, their average, the optimiser's moments and the step, and a resumed training equals an uninterrupted one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dq.codec import DTYPES
from dq.dist import append_jsonl, progress, read_json, read_tensors, write_json, write_tensors
from dq.errors import InputError, RunError


@dataclass(frozen=True)
class Recipe:
    """What the loop needs to know of a training."""

    name: str  # "codec" or "denoiser"
    folder: Path  # the prior's folder
    digest: str  # of everything that decides the result
    steps: int
    lr: float
    warmup_steps: int
    weight_decay: float
    ema: float
    save_every: int
    dtype: str  # of the autocast


def finished(recipe: Recipe) -> bool:
    """Whether this very training is done. Raises `InputError` where the folder holds another one."""
    record = recipe.folder / f"training-{recipe.name}.json"
    if not record.is_file():
        return False
    known = read_json(record)["digest"]
    if known != recipe.digest:
        raise InputError(
            f"{recipe.folder} holds a {recipe.name} trained with other settings or data; "
            "choose another prior.output_dir, or delete that folder"
        )
    return True


def fit(
    recipe: Recipe,
    model: nn.Module,
    loss: Callable[[nn.Module, int], tuple[Tensor, dict[str, float]]],
    accelerator: Any,
    *,
    sample: Callable[[nn.Module, int], dict[str, float]],
) -> nn.Module:
    """Train `model` in place and give it the averaged parameters.

    Args:
        loss: `loss(model, step)` is the loss of this process's share of the batch of a step, and terms to log.
        sample: called by the main process with the averaged model at every save; draws a grid, returns numbers.
    """
    device = accelerator.device
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    average = {k: v.detach().clone() for k, v in model.named_parameters()}
    checkpoint = recipe.folder / f".checkpoint-{recipe.name}.safetensors"
    first = _restore(checkpoint, recipe, model, average, optimizer)
    wrapped = accelerator.prepare(model) if accelerator.num_processes > 1 else model
    metrics = recipe.folder / f"metrics-{recipe.name}.jsonl"
    autocast = torch.autocast(device.type, DTYPES[recipe.dtype], enabled=recipe.dtype != "float32")
    main = accelerator.is_main_process
    desc = f"train {recipe.name}"
    with progress([], desc=desc, total=recipe.steps, unit="step", main=main) as bar:
        bar.update(first)
        for step in range(first, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * min(1.0, (step + 1) / max(1, recipe.warmup_steps))
            with autocast:
                value, terms = loss(wrapped, step)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            # a short average at first, so that the start does not linger
            decay = min(recipe.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, p in model.named_parameters():
                    average[name].lerp_(p, 1 - decay)
            bar.update()
            done = step + 1
            if done % 20 == 0:
                number = float(value.detach())
                if number != number:
                    raise RunError(f"the loss of the {recipe.name} is NaN at step {done}; lower its lr")
                bar.set_postfix(loss=f"{number:.4f}")
            if done % recipe.save_every == 0 or done == recipe.steps:
                if main:
                    with averaged(model, average):
                        numbers = sample(model, done)
                    append_jsonl(metrics, {"step": done, "loss": float(value.detach()), **terms, **numbers})
                    if done < recipe.steps:
                        _save(checkpoint, recipe, model, average, optimizer, done)
                accelerator.wait_for_everyone()
    model.load_state_dict({**model.state_dict(), **average})
    return model.eval()


def finish(recipe: Recipe, record: dict[str, Any]) -> None:
    """Mark the training done and drop its checkpoint."""
    write_json(recipe.folder / f"training-{recipe.name}.json", {"digest": recipe.digest, **record})
    (recipe.folder / f".checkpoint-{recipe.name}.safetensors").unlink(missing_ok=True)


@contextlib.contextmanager
def averaged(model: nn.Module, average: dict[str, Tensor]) -> Any:
    """The model with its averaged parameters, in evaluation mode, for the time of a block."""
    own = {k: v.detach().clone() for k, v in model.named_parameters()}
    model.load_state_dict(average, strict=False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.load_state_dict(own, strict=False)
        model.train()


def _save(path: Path, recipe: Recipe, model: nn.Module, average: dict[str, Tensor], optimizer: Any, step: int) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in average.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    write_tensors(path, tensors, {"step": step, "digest": recipe.digest})


def _restore(path: Path, recipe: Recipe, model: nn.Module, average: dict[str, Tensor], optimizer: Any) -> int:
    """Continue from a checkpoint if there is one; returns the number of steps done."""
    if not path.is_file():
        return 0
    tensors, meta = read_tensors(path)
    if meta["digest"] != recipe.digest:
        raise InputError(
            f"{path.parent} holds an unfinished {recipe.name} with other settings or data; "
            "choose another prior.output_dir, or delete that folder"
        )
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for name, v in average.items():
        v.copy_(tensors[f"ema.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, v in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".", 2)
            state.setdefault(int(i), {})[name] = v
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(meta["step"])


def share(indices: Tensor, accelerator: Any) -> tuple[Tensor, slice]:
    """This process's part of a step's batch, and where it lies in it."""
    n, world, rank = len(indices), accelerator.num_processes, accelerator.process_index
    if n % world:
        raise InputError(f"batch_size={n} of the prior must be a multiple of the {world} processes")
    part = slice(rank * n // world, (rank + 1) * n // world)
    return indices[part], part
