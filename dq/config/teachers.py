"""Settings of teachers, of their training and of pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dq.config.reader import Checked
from dq.config.students import Dtype
from dq.core.errors import InputError


@dataclass(frozen=True)
class TeacherConfig(Checked):
    net: str = "resnet56"  # a network of `dq.networks.zoo`, timm:NAME, torchvision:NAME, "transformers", or "pool"
    # safetensors file, or folder with model.safetensors; with timm: or torchvision: also "pretrained"; with
    # "transformers": model folder or Hub id; with "pool": folder of `dq train-pool`, whose members it stands for
    path: str = ""
    mean: tuple[float, ...] | None = None  # None: what the model comes with, else ImageNet's
    std: tuple[float, ...] | None = None
    classes: tuple[int, ...] | None = None  # output of the network for each class of the data; None: all, in order
    image_size: int | None = None  # side in px at which the network sees the images; None: as they are
    batch_size: int = 256
    check_images: int = 500  # real train images on which the teacher is checked before it labels anything
    weight: float = 1.0  # of its logits in the mean of several teachers


def only_teacher(teachers: Sequence[TeacherConfig]) -> str | None:
    """Network of the only teacher; None if there is none, or there are several."""
    return teachers[0].net if len(teachers) == 1 else None


@dataclass(frozen=True)
class TrainTeachersConfig(Checked):
    output_dir: str = "runs/teachers"  # one folder per network
    nets: tuple[str, ...] = ("resnet20",)
    seed: int = 0
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    checkpoint_s: float = 60.0  # seconds between checkpoints
    dtype: Dtype = "auto"


@dataclass(frozen=True)
class TrainPoolConfig(Checked):
    """A pool of weak teachers: early checkpoints of one training, or pruned copies of a trained network."""

    generation: Literal["prior", "post"] = "prior"
    output_dir: str = "runs/pool"
    net: str = "resnet20"  # prior: trained by the settings of `train_teachers`; post: that of `base`
    epochs: tuple[int, ...] = (5, 8, 11, 14, 17, 20, 23, 26, 29, 32)  # prior: whose ends give the members
    base: TeacherConfig | None = None  # post: the trained network
    size: int = 8  # post: number of pruned copies
    prune: tuple[float, ...] = (0.2, 0.5)  # post: least and largest share of channels taken out, evenly spaced
    criteria: tuple[Literal["magnitude", "random"], ...] = ("magnitude", "random")  # post: in turn
    recovery_epochs: int = 1  # post: short training afterwards
    recovery_lr: float = 0.01
    statistics_images: int = 10000  # train images over which batch norm statistics are estimated anew
    window: tuple[float, ...] = (0.25, 0.9)  # accuracy of a member by that of the base; others are not used
    keep_base: bool = True  # the fully trained network labels too; it is never matched

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generation == "post" and self.base is None:
            raise InputError("generation=post prunes a trained network; set train_pool.base.net and .path")
        if not self.epochs or min(self.epochs) < 1 or len(set(self.epochs)) < len(self.epochs):
            raise InputError(f"epochs must list different epochs from 1, not {list(self.epochs)}")
        for name in ("prune", "window"):
            pair = getattr(self, name)
            if not (len(pair) == 2 and 0 <= pair[0] <= pair[1]):
                raise InputError(f"{name} must be two rising shares such as {getattr(type(self), name)}, not {pair}")
        if self.prune[1] >= 1 or not self.criteria:
            raise InputError(f"prune must stay below 1 and criteria name at least one, not {list(self.prune)}")
