"""What the recommended recipe (`dq distill`) takes from the data and from the prior, where settings leave it open."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from dq.config.methods import resolved_method
from dq.config.overrides import apply_settings
from dq.config.schema import RunConfig
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError
from dq.core.model_files import open_model
from dq.data.images import image_side
from dq.networks.teacher import TEACHER_FACTS

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dq.data.source import ImageSource


def fill_recipe(config: RunConfig, source: ImageSource, *, sizes: bool = True) -> RunConfig:
    """Fill in what depends on the prior and the data.

    Args:
        sizes: whether `codec.resolution` becomes the side in px that the prior was made for, and `source.image_size`,
            if it is not set, that of the first train image, or the former where it is less.

    Returns:
        The settings, whose codec is that of the prior, and whose `generate.select_teacher`, if the rule of selection
        needs one and none is named, is the first network of `train_teachers`, to be trained beside the run folder.

    Raises:
        InputError: if no prior is named, or it is no pipeline of a DiT.
    """
    prior = config.generate.model
    if not prior:
        raise InputError("name a diffusion prior with --prior FOLDER (or generate.model), e.g. checkpoints/cifar10")
    changes: dict[str, object] = {}
    if not config.codec.path:
        changes["codec.path"] = prior
    if sizes:
        side = native_resolution(prior)
        changes["codec.resolution"] = side
        if config.source.image_size is None:
            changes["source.image_size"] = min(side, image_side(source.train))
    if any(_selects_alone(config, method) for method in config.methods):
        net, folder = config.train_teachers.nets[0], f"{config.output_dir}-teacher"
        changes["train_teachers.output_dir"] = folder
        changes["generate.select_teacher"] = {"net": net, "path": str(Path(folder) / net.replace(":", "_"))}
    return apply_settings(config, changes)


def native_resolution(path: str) -> int:
    """Side in px of the images that the DiT pipeline in `path` was made for.

    Raises:
        InputError: if it has no transformer, or no autoencoder.
    """
    files = open_model(path)
    denoiser, codec = files.json("transformer/config.json"), files.json("vae/config.json")
    if denoiser is None or codec is None:
        raise InputError(
            f"{path} is no pipeline of a DiT with transformer/ and vae/; name another prior, or use `dq run` with a "
            "configuration of your own"
        )
    blocks = codec.get("block_out_channels") or codec.get("encoder_block_out_channels") or [0]
    return int(denoiser["sample_size"]) * 2 ** (len(blocks) - 1)


def trained_selector(config: RunConfig) -> bool:
    """Whether the teacher that selects is there, or none is needed."""
    teacher = config.generate.select_teacher
    return teacher is None or not _is_own(config, teacher) or (Path(teacher.path) / TEACHER_FACTS).is_file()


def train_selector(config: RunConfig, source: ImageSource, accelerator: Accelerator) -> None:
    """Train the teacher that selects among draws, if it is one that `train_teachers` makes and not there."""
    if not trained_selector(config):
        from dq.networks.train_teachers import train_teachers

        train_teachers(config, source, accelerator=accelerator)
        accelerator.wait_for_everyone()


def without_selection(config: RunConfig) -> RunConfig:
    """The settings without a selecting teacher, to be checked before there is one."""
    generate = dataclasses.replace(config.generate, candidates=1, select="none", select_teacher=None)
    methods = {
        name: dataclasses.replace(m, override={k: v for k, v in m.override.items() if k != "generate"})
        for name, m in config.methods.items()
    }
    return dataclasses.replace(config, generate=generate, methods=methods)


def _selects_alone(config: RunConfig, method: str) -> bool:
    """Whether a method selects among draws and names no teacher for it."""
    generate = resolved_method(config, method).generate
    return generate.select != "none" and generate.select_teacher is None


def _is_own(config: RunConfig, teacher: TeacherConfig) -> bool:
    t = config.train_teachers
    return teacher.net in t.nets and Path(teacher.path) == Path(t.output_dir) / teacher.net.replace(":", "_")
