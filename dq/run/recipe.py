"""Settings of the recommended recipe (`dq distill`) that depend on data and prior."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dq.config.methods import resolved_method
from dq.config.overrides import apply_settings
from dq.config.schema import RunConfig
from dq.config.teachers import TeacherConfig, TrainTeachersConfig
from dq.core.errors import InputError
from dq.core.model_files import open_model
from dq.data.images import image_side
from dq.diffusion.codec import downscale_of
from dq.networks.train_teachers import check_teacher_training, teacher_folder, train_teachers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dq.data.source import ImageSource


def fill_recipe(
    config: RunConfig, source: ImageSource, *, resolution: bool = True, image_size: bool = True
) -> RunConfig:
    """Fill in what depends on the prior and the data.

    Args:
        config: the recipe with what the user set; `generate.model` names the prior.
        source: the images.
        resolution: whether `codec.resolution` becomes the side in px that the prior was made for.
        image_size: whether `source.image_size`, if it is not set, becomes the side of the first train image, or
            `codec.resolution` where that is less.

    Returns:
        The settings, whose codec is that of the prior, and whose `generate.select_teacher`, if the rule of selection
        needs one and none is named, is the first network of `train_teachers`, to be trained beside the run folder,
        unless `train_teachers.output_dir` names another.

    Raises:
        InputError: if no prior is named, or it is no pipeline of a DiT, or there is no network to train.
    """
    prior = config.generate.model
    if not prior:
        raise InputError("name a diffusion prior with --prior FOLDER (or generate.model), e.g. checkpoints/cifar10")
    changes: dict[str, object] = {}
    if not config.codec.path:
        changes["codec.path"] = prior
    side = native_resolution(prior) if resolution else config.codec.resolution
    changes["codec.resolution"] = side
    if image_size and config.source.image_size is None:
        changes["source.image_size"] = min(side, image_side(source.train))
    if any(_selects_alone(config, method) for method in config.methods):
        t = config.train_teachers
        if not t.nets:
            raise InputError("train_teachers.nets must name the network that selects, or set generate.select_teacher")
        default = t.output_dir == TrainTeachersConfig().output_dir
        folder = f"{Path(config.output_dir)}-teacher" if default else t.output_dir
        changes["train_teachers.output_dir"] = folder
        changes["generate.select_teacher"] = {"net": t.nets[0], "path": str(teacher_folder(folder, t.nets[0]))}
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
    side = denoiser.get("sample_size")
    if (
        not isinstance(side, int)
        or side < 1
        or not {"block_out_channels", "encoder_block_out_channels"} & codec.keys()
    ):
        raise InputError(f"the configurations in {path} lack sample_size or block_out_channels; get the prior again")
    return side * downscale_of(codec)


def untrained_selector(config: RunConfig, source: ImageSource, accelerator: Accelerator) -> TeacherConfig | None:
    """The teacher that selects, if it is one that `train_teachers` makes and is not trained yet.

    Raises:
        InputError: see `check_teacher_training`.
        RunError: if its folder holds a teacher of other settings or data.
    """
    teacher, t = config.generate.select_teacher, config.train_teachers
    if teacher is None or teacher.net not in t.nets:
        return None
    if Path(teacher.path) != teacher_folder(t.output_dir, teacher.net):
        return None
    done = {planned.recipe.net: planned.done for planned in check_teacher_training(config, source, accelerator)}
    return None if done[teacher.net] else teacher


def train_selector(config: RunConfig, source: ImageSource, accelerator: Accelerator) -> None:
    """Train the selecting teacher unless it exists, if `train_teachers` makes it."""
    if untrained_selector(config, source, accelerator):
        train_teachers(config, source, accelerator=accelerator)
        accelerator.wait_for_everyone()


def _selects_alone(config: RunConfig, method: str) -> bool:
    """Whether a method selects among draws and names no teacher for it."""
    generate = resolved_method(config, method).generate
    return generate.select != "none" and generate.select_teacher is None
