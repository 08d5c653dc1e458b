"""Settings of teachers, of their training and of pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dq.config.kinds import Auto, Count, Many, NonNegative, Off, PathText, Positive, Whole
from dq.config.students import Dtype
from dq.config.validation import Checked, settings
from dq.core.errors import InputError


@settings
class TeacherConfig(Checked):
    """A trained classifier that labels or scores images."""

    net: Annotated[
        str, Field(description="network: a name of dq, timm:NAME, torchvision:NAME, transformers, or pool")
    ] = "resnet56"
    # with timm: or torchvision: also "pretrained"; with "pool": folder of `dq train-pool`, whose members it stands for
    path: Annotated[
        PathText, Field(description="weights: safetensors file, folder with model.safetensors, or Hub id")
    ] = ""
    mean: Annotated[
        Auto[Many[float]], Field(description="mean of each color channel; auto: the model's, else ImageNet's")
    ] = None
    std: Annotated[
        Auto[Many[Positive]], Field(description="deviation of each color channel; auto: the model's, else ImageNet's")
    ] = None
    classes: Annotated[
        Auto[Many[Whole]], Field(description="output of the network for each class of the data; auto: all, in order")
    ] = None
    image_size: Annotated[
        Auto[Count], Field(description="side in px at which the network sees images; auto: as they are")
    ] = None
    batch_size: Annotated[Count, Field(description="images that go through the network at once")] = 256
    check_images: Annotated[
        Count, Field(description="real train images on which the teacher is tested before it is used")
    ] = 500
    weight: Annotated[Positive, Field(description="weight of its logits in the mean of several teachers")] = 1.0


def only_teacher(teachers: Sequence[TeacherConfig]) -> str | None:
    """Network of the only teacher; None if there is none, or there are several."""
    return teachers[0].net if len(teachers) == 1 else None


@settings
class TrainTeachersConfig(Checked):
    """Training of classifiers on the source (`dq train-teachers`)."""

    output_dir: Annotated[PathText, Field(description="folder of the teachers, one inside for each network")] = (
        "runs/teachers"
    )
    nets: Annotated[Many[str], Field(description="networks to train")] = ("resnet20",)
    seed: Annotated[int, Field(description="seed of weights and batches")] = 0
    epochs: Annotated[Count, Field(description="epochs of the training")] = 30
    batch_size: Annotated[Count, Field(description="images of a training step")] = 128
    lr: Annotated[NonNegative, Field(description="learning rate of SGD")] = 0.1
    momentum: Annotated[NonNegative, Field(description="momentum of SGD")] = 0.9
    weight_decay: Annotated[NonNegative, Field(description="weight decay")] = 5e-4
    checkpoint_s: Annotated[Positive, Field(description="seconds between checkpoints")] = 60.0
    dtype: Annotated[Dtype, Field(description="dtype of the training; auto: what the device is fast in")] = "auto"


@settings
class TrainPoolConfig(Checked):
    """A pool of weak teachers.

    Members are early checkpoints of one training, or pruned copies of a trained network.
    """

    generation: Annotated[
        Literal["prior", "post"],
        Field(description="prior: early checkpoints of one training; post: pruned copies of a trained network"),
    ] = "prior"
    output_dir: Annotated[PathText, Field(description="folder of the pool")] = "runs/pool"
    net: Annotated[str, Field(description="prior: network, trained as train_teachers says; post has that of base")] = (
        "resnet20"
    )
    epochs: Annotated[Many[Count], Field(description="prior: epochs whose ends give the members")] = (
        *(5, 8, 11, 14, 17, 20, 23, 26, 29, 32),
    )
    base: Annotated[Off[TeacherConfig], Field(description="post: the trained network")] = None
    size: Annotated[Count, Field(description="post: number of pruned copies")] = 8
    prune: Annotated[
        Many[NonNegative],
        Field(description="post: least and largest share of channels that are removed, evenly spaced"),
    ] = (0.2, 0.5)
    criteria: Annotated[
        Many[Literal["magnitude", "random"]], Field(description="post: how channels are chosen, in turn")
    ] = ("magnitude", "random")
    recovery_epochs: Annotated[Whole, Field(description="post: epochs of training after the pruning")] = 1
    recovery_lr: Annotated[NonNegative, Field(description="post: learning rate of that training")] = 0.01
    statistics_images: Annotated[
        Count, Field(description="train images over which batch norm statistics are estimated")
    ] = 10000
    window: Annotated[
        Many[NonNegative], Field(description="least and largest accuracy of a member, as shares of the base's")
    ] = (0.25, 0.9)
    keep_base: Annotated[
        bool, Field(description="whether the fully trained network labels too; it is never matched")
    ] = True

    @model_validator(mode="after")
    def _check_pool(self) -> Self:
        if self.generation == "post" and self.base is None:
            raise InputError("generation=post prunes a trained network; set train_pool.base.net and .path")
        if not self.epochs or len(set(self.epochs)) < len(self.epochs):
            raise InputError(f"epochs must list different epochs from 1, not {list(self.epochs)}")
        for name, example in (("prune", [0.2, 0.5]), ("window", [0.25, 0.9])):
            pair = getattr(self, name)
            if not (len(pair) == 2 and pair[0] <= pair[1]):
                raise InputError(f"{name} must be two rising shares such as {example}, not {list(pair)}")
        if self.prune[1] >= 1:
            raise InputError(f"prune must stay below 1, not {list(self.prune)}")
        if not self.criteria:
            raise InputError("criteria must name at least one of 'magnitude' and 'random', not []")
        return self
