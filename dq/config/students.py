"""Settings of students, of their views and labels, and of an evaluation."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dq.config.reader import Checked
from dq.core.errors import InputError
from dq.core.text import short

log = logging.getLogger("dq")

# auto: what the device is fast in, or what the folder was begun with (`dq.config.dtypes`)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LabelKind = Literal["logits", "probabilities", "regression"]  # what the label vectors of a set are
Baseline = Literal[
    "random",
    "herding",
    "k-center",
    "nearest",
    "facility",
    "facility_cad",
    "bps",
    "window",
    "forgetting",
    "confidence",
    "patches",
    "full",
]
TAUGHT: tuple[Baseline, ...] = ("facility", "facility_cad", "bps", "confidence", "patches")  # need a teacher


LIBRARIES = {"timm": "timm", "torchvision": "torchvision.models"}  # prefix of a name -> module


def is_library_net(name: str) -> bool:
    """Whether `name` is timm:NAME or torchvision:NAME."""
    return name.partition(":")[0] in LIBRARIES


@dataclass(frozen=True)
class ViewConfig(Checked):
    """What a network sees of an image, in this order: RandAugment, patches shuffled, cropped, mirrored, colours
    changed, mixed with another image of the batch."""

    rand_augment: int = 0  # operations of RandAugment per image (torchvision: 2), on 8-bit pixels
    rand_magnitude: int = 9  # of these operations, 0 to 30
    shuffle: int = 1  # the image is cut into so many strips of columns, then of rows, which change places (RDED)
    crop_scale: tuple[float, ...] = ()  # random resized crop: least and largest share of the area; none: no crop
    crop_ratio: tuple[float, ...] = (0.75, 4 / 3)
    crop_pad: float = 0.0  # random window of the image padded with black by this share of the side (CIFAR: 1/8)
    flip: float = 0.0  # probability of a mirror image
    jitter: float = 0.0  # brightness, contrast and saturation, each drawn in 1 +- this, in random order
    lighting: float = 0.0  # standard deviation of the noise along the principal colours of ImageNet
    mix: Literal["none", "cutmix", "mixup"] = "none"
    mix_alpha: float = 1.0  # both parameters of the Beta law of the mixing share

    def __post_init__(self) -> None:
        super().__post_init__()
        low_high = self.crop_scale
        if low_high and not (len(low_high) == 2 and 0 < low_high[0] <= low_high[1] <= 1):
            raise InputError(f"crop_scale must be two shares such as [0.08, 1], not {list(low_high)}")
        if not (len(self.crop_ratio) == 2 and 0 < self.crop_ratio[0] <= self.crop_ratio[1]):
            raise InputError(f"crop_ratio must be two numbers such as [0.75, 1.33], not {list(self.crop_ratio)}")
        if self.crop_pad and self.crop_scale:
            raise InputError("crop_pad and crop_scale are two kinds of crops; set crop_pad=0, or crop_scale=[]")
        if self.crop_pad > 1:
            raise InputError(f"crop_pad is a share of the side and cannot be {self.crop_pad}")
        if self.rand_magnitude > 30:
            raise InputError(f"rand_magnitude lies between 0 and 30 and cannot be {self.rand_magnitude}")
        if self.flip > 1:
            raise InputError(f"flip is a probability and cannot be {self.flip}")


@dataclass(frozen=True)
class RelabelConfig(Checked):
    """How teachers label every view of a student with `labels: soft`, and what is kept of it."""

    storage: Literal["shards", "online"] = "shards"  # online: computed when needed, nothing stored, the same bits
    statistics: Literal["running", "batch"] = "running"  # of the teachers' batch norm; batch: BSSL
    average: Literal["logits", "probabilities"] = "logits"  # of several teachers, by their weights
    dropout: bool = False  # with batch statistics: dropout on too, as train mode has it in the released code
    bits: Literal[16, 8] = 16  # of a logit
    top_k: int | None = None  # keep the largest logits, the others become their mean
    epochs: int | None = None  # label epochs; fewer than the student's are used again and again
    views: Literal["stored", "seed"] = "stored"  # seed: crops and mixes are drawn again at replay, and compared
    seed: int = 42  # of order, crops and mixes


@dataclass(frozen=True)
class StudentConfig(Checked):
    """All settings of one training. In a configuration a student is a mapping of these and of `protocol` (a preset,
    see `dq.config.protocols`) and `dataset` (whose published settings to take); `epochs` may be a mapping by ipc."""

    protocol: str = "custom"  # where the settings come from
    net: str = "convnet3"
    norm: Literal["instance", "batch", "none"] | None = None  # in place of the network's usual one
    # of ResNet-18, -50 and -101 up to 64 px: He's law but for the stem (RDED, SRe2L), or everywhere (IDC, Minimax);
    # None: PyTorch's default
    init: Literal["torchvision", "fan_out"] | None = None
    labels: Literal["hard", "soft", "fixed"] = "hard"  # soft: a teacher's for every view; fixed: one per image
    epochs: int = 300
    batch_size: int = 256
    accumulate: int = 1  # a batch goes through in so many parts; batch norm sees the parts
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"  # muon: of hidden matrices and kernels, adamw of the rest
    lr: float = 0.01
    # lr is the step size that was learned with a set, where there is one and the optimizer is sgd
    learned_lr: bool = False
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_vectors: bool | None = None  # also of biases and norms; None: with sgd they decay, else they do not
    schedule: Literal["step", "multistep", "cosine", "cos2", "linear", "constant"] = "step"
    lr_floor: float = 0.0  # cosine: the share of lr at which it ends
    zeta: float = 1.0  # cosine and linear: end at 0 for 1, at half of lr for 2
    milestones: tuple[float, ...] = (2 / 3, 5 / 6)  # multistep: shares of the epochs after which lr falls ...
    step_factor: float = 0.2  # ... to this many times itself
    warmup: int = 0  # epochs in which lr rises linearly from a hundredth; the schedule takes the others
    views: ViewConfig = ViewConfig()
    augment: Literal["dsa", "crop_flip", "frepo", "frepo_noflip", "none"] = "dsa"  # normalised; not with labels=soft
    whiten: bool = False  # ZCA, fitted on the train split, instead of mean and std
    zca: Literal["mtt", "frepo"] = "mtt"  # whose; frepo: behind mean and std, which are all for grey images
    # soft and fixed labels; mse_gt: between logits, plus a share of the class; mse (fixed): half the squared error to
    # regression labels, which classes give where a set has no label vectors
    loss: Literal["kl", "mse_gt", "mse"] = "kl"
    temperature: float = 4.0
    gt_weight: float = 0.025  # of the cross-entropy with the class in mse_gt
    ema: float = 0.0  # decay of the averaged parameters that are tested; 0: the parameters themselves
    relabel: RelabelConfig = RelabelConfig()
    test_scale: float = 1.0  # test images are resized to this many times the side, then the centre is cut out
    select: Literal["validation", "test"] = "validation"  # where the best epoch is chosen; test is what papers print
    tests: int = 1  # looks during a training, the last epoch included; 1: no choice of an epoch
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        v = self.views
        if self.labels == "soft" and (self.augment != "none" or v.jitter or v.lighting):
            raise InputError(
                "labels=soft belong to the view that the teacher saw: set augment=none, views.jitter=0 and "
                "views.lighting=0, or take labels=fixed"
            )
        if self.labels == "fixed" and v.mix != "none":
            raise InputError("labels=fixed describe one image and not a mix: set views.mix=none, or take labels=soft")
        if self.whiten and (
            v.rand_augment
            or v.crop_scale
            or v.crop_pad
            or v.flip
            or v.shuffle > 1
            or v.jitter
            or v.lighting
            or v.mix != "none"
        ):
            raise InputError("whiten works on whole images: leave views at its defaults and use augment")
        if not all(0 < a < b <= 1 for a, b in zip((1e-9, *self.milestones), self.milestones)):
            raise InputError(f"milestones must be ascending shares such as [0.5, 0.75], not {list(self.milestones)}")
        if self.relabel.top_k and self.loss == "mse_gt":
            raise InputError("relabel.top_k keeps logits up to a constant, which loss=mse_gt needs; set top_k=null")
        if self.loss == "mse" and self.labels == "soft":
            raise InputError("loss=mse is for one label vector per image: set labels=fixed, or loss=kl or mse_gt")
        if not 0 <= self.lr_floor <= 1:
            raise InputError(f"lr_floor is a share of lr in [0, 1], not {self.lr_floor:g}")
        if self.dtype == "float16":
            raise InputError(f"student {self.net!r} cannot train in float16, which needs loss scaling; use bfloat16")

    def for_step_size(self, step_size: float | None) -> StudentConfig:
        """The settings on a set with this learned step size: it is `lr`, if the student takes it."""
        if step_size is None or not self.learned_lr or self.optimizer != "sgd":
            return self
        return dataclasses.replace(self, lr=step_size)

    @property
    def asks_teachers(self) -> bool:
        """Whether images without label vectors need a teacher."""
        return self.labels == "soft" or (self.labels == "fixed" and self.loss != "mse")


def label_columns(student: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A student for each kind of labels, where `labels` lists several; else the student itself.

    What a kind of labels excludes is switched off in its own column alone: mixes for fixed labels, which describe one
    image; augmentation behind the views, jitter and lighting for soft ones, which belong to the view that the teacher
    saw.

    Raises:
        InputError: for an empty list, what is no kind, a kind that stands in it twice, or views that are no mapping.
    """
    kinds = student.get("labels")
    if not isinstance(kinds, (list, tuple)):
        return [dict(student)]
    if not kinds or any(not isinstance(kind, str) or kinds.count(kind) > 1 for kind in kinds):
        raise InputError(f"labels lists kinds such as [hard, fixed, soft], each once, not {short(list(kinds))}")
    views = student.get("views", {})
    if not isinstance(views, Mapping):
        raise InputError(f"views of a student must be a mapping of settings, not {short(views)}")
    off: dict[Any, dict[str, Any]] = {"fixed": {"mix": "none"}, "soft": {"jitter": 0.0, "lighting": 0.0}}
    students = []
    for kind in kinds:
        settings = {**student, "labels": kind}
        if kind in off:
            settings["views"] = {**views, **off[kind]}
        if kind == "soft":
            settings["augment"] = "none"
        students.append(settings)
    return students


@dataclass(frozen=True)
class EvaluateConfig(Checked):
    seeds: int = 3
    full_seeds: int = 1  # of the full-data baseline, which costs more than all the others together
    baselines: tuple[Baseline, ...] = ("random", "nearest", "full")
    # patches: a baseline image is a mosaic of factor x factor crops; None: RDED's, 2 from 128 px and ipc 2, else 1
    patch_factor: int | None = None
    window_start: float = 0.5  # window: share of the other images of a class that are easier than those of the window
    redundancy: bool = (
        False  # also test students of a first slice of every set on its next (`dq.evaluation.redundancy`)
    )
    validation_images: int = 1000  # stratified part of train that no baseline uses, if a student chooses its epoch
    # settings of `StudentConfig`, `protocol` and `dataset`; none: `dq run` does not evaluate. `labels` may be a list,
    # which stands for a student of each kind (see `label_columns`)
    students: tuple[dict[str, Any], ...] = ({"protocol": "classic"},)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "students", tuple(c for s in self.students for c in label_columns(s)))
        if len(set(self.baselines)) < len(self.baselines):
            raise InputError(f"baselines={list(self.baselines)} names one twice; give every baseline once")
        if not 0 <= self.window_start <= 1:
            raise InputError(f"window_start is a share and must lie in [0, 1], not {self.window_start:g}")


def default_baselines(teachers: Sequence[Any]) -> tuple[Baseline, ...]:
    """Baselines of an evaluation that names none: random images and, with a teacher, the strongest selection."""
    if teachers:
        return ("random", "facility")
    log.info("baselines: random images alone, since no teacher is named whose features 'facility' could select by")
    return ("random",)
