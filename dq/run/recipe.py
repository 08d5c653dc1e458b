"""Settings of the recommended recipe (`dq distill`) that depend on data and prior."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dq.config.methods import resolved_method, selects
from dq.config.overrides import apply_settings
from dq.config.reader import to_dict
from dq.config.schema import GenerateConfig, RunConfig
from dq.config.teachers import TeacherConfig, TrainTeachersConfig
from dq.core.errors import InputError
from dq.core.model_files import open_model
from dq.data.images import image_side
from dq.diffusion.codec import downscale_of
from dq.networks.train_teachers import check_teacher_training, teacher_folder, train_teachers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dq.data.source import ImageSource

log = logging.getLogger("dq")
CHECKPOINTS = "checkpoints"  # folder of the repository with priors, beside the package or in the working folder
CODEC = "cifar10/vae"  # in it: TAESD, which encodes any images
SIDES = {"cpu": 64, "cuda": 128}  # px up to which images are distilled unless asked otherwise: students take minutes


def shipped(name: str) -> Path | None:
    """Folder of a checkpoint of the repository, in the working folder or beside the package; None if not here."""
    for root in (Path(CHECKPOINTS), Path(__file__).parents[2] / CHECKPOINTS):
        if (root / name).is_dir():
            return root / name
    return None


def prior_of_classes(names: Sequence[str]) -> Path | None:
    """The checkpoint of the repository that was trained on classes of these names, in this order; None without one."""
    wanted = [name.casefold() for name in names]
    root = shipped("")
    for folder in sorted(root.iterdir()) if root else ():
        index = open_model(str(folder)).json("model_index.json") if (folder / "model_index.json").is_file() else None
        labels = (index or {}).get("id2label")
        if isinstance(labels, dict) and [str(v).casefold() for v in labels.values()] == wanted:
            return folder
    return None


def fill_representatives(
    config: RunConfig, source: ImageSource, device: str, given: Callable[[str], bool]
) -> RunConfig:
    """Settings for data without a prior: real images nearest to the points of k-means, at a size that fits the images.

    With `generate.real_candidates`, the recipe's rule selects among those of each cell, by a teacher that it trains.

    Args:
        config: the settings.
        source: the images.
        device: "cpu" or "cuda", which bounds the side of the images unless it is set.
        given: whether the user set a setting, which then stays as it is.

    Raises:
        InputError: if no codec is named and that of the repository is not here.
    """
    plain = {f"generate.{k}": v for k, v in to_dict(GenerateConfig(mode="decode")).items()}  # nothing is drawn
    plain |= {"train_teachers": to_dict(TrainTeachersConfig()), "methods.recommended.representative": "real"}
    if config.generate.real_candidates:
        kept = ("generate.real_candidates", "generate.select", "train_teachers")
        plain = {key: value for key, value in plain.items() if key not in kept}
    changes = {key: value for key, value in plain.items() if not (given(key) or given(key.split(".")[0]))}
    if not config.codec.path:
        codec = shipped(CODEC)
        if codec is None:
            raise InputError(
                "images are compared in the latents of an autoencoder, and that of the repository, "
                f"{CHECKPOINTS}/{CODEC}, is not here; name one with --set codec.path=FOLDER_OR_HUB_ID, such as "
                "madebyollin/taesd3, or a prior with --prior FOLDER"
            )
        changes["codec.path"] = str(codec)
    side = config.source.image_size
    if side is None:
        shorter = image_side(source.train, sample=1 if source.sequential else 32)
        side = min(shorter, SIDES.get(device, SIDES["cuda"]))
        if side < shorter:
            log.info(
                "images have a shorter side of %d px (median) and are distilled at %d px, at which students of this "
                "machine take minutes; --image_size N changes that",
                *(shorter, side),
            )
        changes["source.image_size"] = side
    if not given("codec.resolution"):
        changes["codec.resolution"] = max(32, -(-side // 8) * 8)
    return _fill_selector(apply_settings(config, changes))


def fit_students(config: RunConfig, device: str) -> RunConfig:
    """Settings whose ConvNet students fit the side of the images and the device.

    Three blocks up to 32 px, four up to 64 px, five up to 128 px, six beyond (as in MTT, arXiv 2203.11932, section 4).
    On a CPU, above 32 px, a width of 32 and half of the epochs, so that students take minutes.
    """
    depth = min(max(3, math.ceil(math.log2(config.image_size)) - 2), 6)
    students = [dict(s) for s in config.evaluate.students]
    for student in students:
        net = re.fullmatch(r"convnet\dw(\d+)(.*)", str(student.get("net", "")))
        small = device == "cpu" and depth > 3
        if net:
            student["net"] = f"convnet{depth}w{32 if small else net[1]}{net[2]}"
            if small and isinstance(student.get("epochs"), int):
                student["epochs"] //= 2
    return apply_settings(config, {"evaluate.students": students})


def fill_codec(config: RunConfig) -> RunConfig:
    """Settings whose codec, if none is named, is that of the DiT pipeline in `generate.model`, at its side in px.

    Raises:
        InputError: if that is no pipeline of a DiT with an autoencoder.
    """
    prior = config.generate.model
    if config.codec.path or not prior or config.generate.mode != "dit":
        return config
    return apply_settings(config, {"codec.path": prior, "codec.resolution": native_resolution(prior)})


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
    return _fill_selector(apply_settings(config, changes))


def _fill_selector(config: RunConfig) -> RunConfig:
    """Settings whose selecting teacher, if one is needed and none is named, is the first of `train_teachers`."""
    if not any(_selects_alone(config, method) for method in config.methods):
        return config
    t = config.train_teachers
    if not t.nets:
        raise InputError("train_teachers.nets must name the network that selects, or set generate.select_teacher")
    default = t.output_dir == TrainTeachersConfig().output_dir
    folder = f"{Path(config.output_dir)}-teacher" if default else t.output_dir
    teacher = {"net": t.nets[0], "path": str(teacher_folder(folder, t.nets[0]))}
    return apply_settings(config, {"train_teachers.output_dir": folder, "generate.select_teacher": teacher})


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
    """Whether a method selects among candidates and names no teacher for it."""
    m, _, generate, _ = resolved_method(config, method)
    return selects(m, generate) and generate.select_teacher is None
