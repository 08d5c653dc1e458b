"""Training of teachers on real images, by the loop of students."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from dq.config.dtypes import RECORD, Dtypes, folder_dtypes, record_dtypes, resolve_dtypes
from dq.config.reader import to_dict
from dq.config.schema import RunConfig
from dq.config.students import StudentConfig
from dq.config.teachers import TrainTeachersConfig
from dq.core.errors import InputError, RunError
from dq.core.files import check_place, is_done, read_json, write_json, write_tensors
from dq.core.processes import assign_units
from dq.core.progress import progress
from dq.core.seeds import derive_seed, digest_of
from dq.data.source import ImageSource
from dq.networks.real_data import RealData, identity_of, load_real_data, rows_set_aside
from dq.networks.teacher import TEACHER_FACTS
from dq.networks.training import Checkpoint, TrainingSet, accuracy, fit
from dq.networks.zoo import check_net

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dq")


def teacher_recipe(t: TrainTeachersConfig) -> StudentConfig:
    """Return the settings of a teacher's training as those of a student."""
    return StudentConfig(
        labels="hard",
        epochs=t.epochs,
        batch_size=t.batch_size,
        optimizer="sgd",
        lr=t.lr,
        momentum=t.momentum,
        weight_decay=t.weight_decay,
        schedule="cosine",
        augment="crop_flip",
        dtype=t.dtype,
        tests=2,  # so that validation images are set aside
    )


def teacher_data(config: RunConfig, source: ImageSource, recipe: StudentConfig, device: torch.device) -> RealData:
    """Load the real images that teachers are trained and validated on."""
    rows = rows_set_aside(source, config.evaluate, [recipe])
    return load_real_data(
        source, config.image_size, cache_dir=Path(config.cache_dir), device=device, validation_rows=rows
    )


def teacher_data_identity(config: RunConfig, source: ImageSource, recipe: StudentConfig) -> list[object]:
    """Return what decides the images of `teacher_data`, without reading one."""
    return identity_of(source, config.image_size, rows_set_aside(source, config.evaluate, [recipe]))


class Planned(NamedTuple):
    """Network that is to be trained."""

    recipe: StudentConfig
    auto: Dtypes  # what `dtype: auto` stands for in its folder
    folder: Path
    digest: str
    done: bool


def check_teacher_training(config: RunConfig, source: ImageSource, accelerator: Accelerator) -> list[Planned]:
    """Check whether the networks of `config.train_teachers` can be trained on these images.

    Returns:
        The networks, of which some may be trained already.

    Raises:
        InputError: for no network, or one that is unknown, named twice or not for this size.
        RunError: if a folder holds a teacher of other settings or data.
    """
    check_place(config.train_teachers.output_dir, "train_teachers.output_dir")
    check_place(config.cache_dir, "cache_dir", reads=True)
    nets = config.train_teachers.nets
    if not nets or len(set(nets)) < len(nets):
        raise InputError(f"train_teachers.nets must name networks, each once, not {list(nets)}")
    for net in nets:
        check_net(net, len(source.class_names), config.image_size)
    return [_planned(net, config, source, accelerator) for net in nets]


def teacher_folder(output_dir: str, net: str) -> Path:
    """Return the folder in which `train_teachers` writes a network."""
    return Path(output_dir) / net.replace(":", "_")


def _planned(net: str, config: RunConfig, source: ImageSource, accelerator: Accelerator) -> Planned:
    t = config.train_teachers
    folder = teacher_folder(t.output_dir, net)
    auto = _dtypes(folder, accelerator)
    recipe = resolve_dtypes(teacher_recipe(t), auto)
    identity = teacher_data_identity(config, source, recipe)
    digest = digest_of({"net": net, "world": identity, "student": to_dict(recipe), "seed": t.seed})
    record = folder / TEACHER_FACTS
    done = is_done(record) and is_done(folder / "model.safetensors")
    if done and read_json(record)["digest"] != digest:
        raise RunError(f"{folder} holds a teacher of other settings or data; choose another train_teachers.output_dir")
    return Planned(dataclasses.replace(recipe, net=net), auto, folder, digest, done)


def _dtypes(folder: Path, accelerator: Accelerator) -> Dtypes:
    """What `dtype: auto` stands for in the folder of a network, trained, in training or missing."""
    record = folder / TEACHER_FACTS
    begun = "float32" if (folder / "checkpoint.safetensors").is_file() else None
    if record.is_file():
        begun = str(read_json(record).get("recipe", {}).get("dtype", "float32"))
    return folder_dtypes(folder, accelerator, begun=begun)


def train_teachers(config: RunConfig, source: ImageSource, *, accelerator: Accelerator) -> list[Path]:
    """Train `config.train_teachers.nets` on the train split, one network per process at a time.

    SGD with momentum, cosine to 0, random crop and mirror. The validation part of train (see
    `EvaluateConfig.validation_images`) is left out and measures the result; the test split is not touched. Published
    teachers of distillation are deliberately not trained to convergence (CV-DD), hence the short default.

    A killed training resumes from its checkpoint; a finished one is skipped. All train images are held in memory.

    Returns:
        The folders `<output_dir>/<net>` with `model.safetensors` and `teacher.json`, to be named as a teacher's path.

    Raises:
        RunError: if a folder holds a teacher of other settings or data.
    """
    planned = check_teacher_training(config, source, accelerator)
    real_data = teacher_data(config, source, planned[0].recipe, accelerator.device)
    assigned = assign_units([1.0] * len(planned), accelerator.process_index, accelerator.num_processes)
    todo = [planned[i] for i in assigned if not planned[i].done]
    if todo:
        images, labels = real_data.read(source.train, real_data.candidates)
        images, labels = images.to(real_data.device), labels.to(real_data.device)
    for p in todo:
        data = TrainingSet(images, labels, real_data.classes, real_data.pixels(p.recipe))
        _train_teacher(p, data, real_data, config.train_teachers, main=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    return [p.folder for p in planned]


def _train_teacher(p: Planned, data: TrainingSet, real_data: RealData, t: TrainTeachersConfig, *, main: bool) -> None:
    """Train and measure one network and write its weights and record."""
    net, folder, source = p.recipe.net, p.folder, real_data.source
    record_dtypes(folder, p.auto)  # until the network is trained, when its record has it
    with progress([], desc=f"train {net}", total=t.epochs, unit="epoch", main=main) as bar:

        def show(epoch: int, loss: float) -> None:
            bar.update(epoch - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}")

        seed = derive_seed(t.seed, "teacher", net)
        checkpoint = Checkpoint(folder / "checkpoint.safetensors", t.checkpoint_s)
        fitted = fit(data, p.recipe, seed=seed, on_epoch=show, checkpoint=checkpoint)
    held_out = real_data.validation(1.0)
    validated = accuracy(fitted.net, *held_out, pixels=data.pixels, dtype=p.recipe.dtype) if held_out else None
    write_tensors(folder / "model.safetensors", fitted.net.state_dict())
    facts = {
        "net": net,
        "mean": real_data.mean,
        "std": real_data.std,
        "classes": list(source.class_names),
        "validation_accuracy": validated,
        "validation_images": len(real_data.validation_rows),
        "source": {"origin": source.origin, "fingerprint": source.fingerprint},
        "image_size": real_data.image_size,
        "recipe": to_dict(p.recipe),
        "seed": t.seed,
        "seconds": round(fitted.seconds, 1),
        "digest": p.digest,
    }
    write_json(folder / TEACHER_FACTS, facts)  # the teacher is complete once this file exists
    for name in ("checkpoint.safetensors", RECORD):
        (folder / name).unlink(missing_ok=True)
    log.info(
        "teacher %s: %.1f %% of %d validation images", net, 100 * (validated or 0), len(real_data.validation_rows)
    )
