"""Recipe and record of a training of the prior."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from dq.config.dtypes import USES, Dtypes, folder_dtypes
from dq.core.errors import RunError
from dq.core.files import is_done, read_json, read_metadata, write_json
from dq.core.plain import PlainDict
from dq.core.seeds import digest_of
from dq.core.text import plural

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Recipe:
    """Settings of the training loop."""

    name: str  # "codec" or "denoiser"
    folder: Path  # the prior's folder
    product: Path  # the model folder that this training makes
    identity: PlainDict  # everything that decides the result
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
    early: tuple[str, ...] = ()  # of `parts`, those that are written at `extra_saves`
    parts: tuple[str, ...] = ()  # files in `folder` that the training leaves beside the product
    auto: Dtypes | None = None  # what `dtype: auto` stands for in the folder

    @property
    def digest(self) -> str:
        return digest_of(self.identity)

    @property
    def digest_without_steps(self) -> str:
        return digest_of({k: v for k, v in self.identity.items() if k != "steps"})

    @property
    def scratch(self) -> Path:
        return self.folder / f".training-{self.name}"

    @property
    def checkpoint(self) -> Path:
        return self.scratch / "checkpoint.safetensors"


@dataclass(frozen=True)
class Fitted:
    """Cost of a training, and the average left in the model."""

    seconds: float  # over all interruptions, without the time between them
    ema: float
    held_out: float | None  # loss of that average on held-out data, None where nothing was held out
    earlier_steps: Sequence[Sequence[int]]  # [steps, step]: numbers of steps set before, and until which step


def training_dtypes(folder: Path, name: str, product: Path, where: Accelerator | torch.device | str) -> Dtypes:
    """What `dtype: auto` stands for in a training of the prior.

    It is the dtype of an existing model, else that of the folder, in which `fit` keeps it.
    """
    dtypes = folder_dtypes(folder, where, begun="float32" if (folder / f".training-{name}").exists() else None)
    record = product / "training.json"
    if record.is_file():
        return dict.fromkeys(USES, str(read_json(record)["settings"].get("dtype", "float32")))
    return dtypes


def finished(recipe: Recipe) -> bool:
    """Whether a training with this recipe is done.

    A checkpoint of another number of steps belongs to it, too, if it has made fewer.

    Raises:
        RunError: if the folder holds a model or a checkpoint of another training, or lacks a part of this one.
    """
    advice = "choose another prior.output_dir, or delete that folder"
    record = recipe.product / "training.json"
    if recipe.product.exists():
        if not record.is_file():
            raise RunError(f"{recipe.product} holds a model that was not trained here; {advice}")
        if read_json(record)["digest"] != recipe.digest:
            raise RunError(
                f"{recipe.product} holds a {recipe.name} of other settings, data or classes; {advice}, or train it "
                f"further in another prior.output_dir with prior.{recipe.name}.init={recipe.folder}"
            )
        missing = next((p for p in recipe.parts if not (recipe.folder / p).is_file()), None)
        if missing is not None:
            raise RunError(
                f"{recipe.folder} lacks {missing} of a finished {recipe.name}, which only the whole training makes: "
                f"put it back, choose another prior.output_dir, or delete {recipe.product} to train again"
            )
        return True
    if is_done(recipe.checkpoint):
        _check_checkpoint(recipe, read_metadata(recipe.checkpoint), advice)
    return False


def _check_checkpoint(recipe: Recipe, saved: PlainDict, advice: str) -> None:
    if saved["digest"] == recipe.digest:
        return
    if saved.get("digest_without_steps") != recipe.digest_without_steps:
        raise RunError(
            f"{recipe.scratch} holds an unfinished {recipe.name} of other settings, data or classes; {advice}"
        )
    done = int(saved["step"])
    if done >= recipe.steps:
        raise RunError(
            f"{recipe.scratch} holds an unfinished {recipe.name} that has made {plural(done, 'step')}; set "
            f"prior.{recipe.name}.steps to more than these, or {advice}"
        )
    passed = [step for step in recipe.extra_saves if step <= done]
    if passed and not all((recipe.folder / part).is_file() for part in recipe.early):
        raise RunError(
            f"{recipe.scratch} holds an unfinished {recipe.name} that is past step {passed[0]}, where its early "
            f"average is saved with prior.{recipe.name}.steps={recipe.steps}; set more steps, or {advice}"
        )


def hardware(accelerator: Accelerator) -> str:
    """Hardware of a training, for its record."""
    device = accelerator.device
    if device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(device)}"
    processes, threads = plural(accelerator.num_processes, "process"), plural(torch.get_num_threads(), "CPU thread")
    return f"{processes} of {threads}, {platform.machine()}"


def publish(
    recipe: Recipe, save: Callable[[Path], None], numbers: PlainDict, fitted: Fitted, accelerator: Accelerator
) -> None:
    """Save the model folder atomically with its `training.json`; drop the checkpoint."""
    import diffusers

    complete = recipe.scratch / recipe.product.name
    if complete.exists():
        shutil.rmtree(complete)
    save(complete)
    record = {
        "digest": recipe.digest,
        "settings": recipe.identity,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "hardware": hardware(accelerator),
        "seconds": round(fitted.seconds, 1),
        "images_per_s": round(recipe.steps * recipe.batch_size / fitted.seconds, 1) if recipe.steps else None,
        "ema": fitted.ema,
        "held_out_loss": fitted.held_out,
        **({"earlier_steps": fitted.earlier_steps} if fitted.earlier_steps else {}),
        **numbers,
    }
    write_json(complete / "training.json", record)
    for part in recipe.early:  # it may have been saved when other steps were set
        write_json(recipe.folder / part, {"digest": recipe.digest})
    os.replace(complete, recipe.product)
    shutil.rmtree(recipe.scratch)
