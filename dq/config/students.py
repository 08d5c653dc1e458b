"""Settings of students, of their views and labels, and of an evaluation."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dq.config.kinds import Auto, Count, Many, NonNegative, Off, Positive, PositiveShare, Share, Whole
from dq.config.validation import Checked, settings
from dq.core.errors import InputError
from dq.core.plain import PlainDict, PlainMapping
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


@settings
class ViewConfig(Checked):
    """What a network sees of an image.

    The order is RandAugment, patches shuffled, cropped, mirrored, colors changed, mixed with another image of the
    batch.
    """

    rand_augment: Annotated[
        Whole, Field(description="operations of RandAugment per image (torchvision: 2), on 8-bit pixels")
    ] = 0
    rand_magnitude: Annotated[int, Field(ge=0, le=30, description="magnitude of these operations")] = 9
    shuffle: Annotated[
        Count, Field(description="strips of columns, then of rows, that change places in an image (RDED); 1: off")
    ] = 1
    crop_scale: Annotated[
        Many[PositiveShare],
        Field(description="random resized crop: least and largest share of the area; empty: no crop"),
    ] = ()
    crop_ratio: Annotated[
        Many[Positive], Field(description="random resized crop: least and largest ratio of the sides")
    ] = (0.75, 4 / 3)
    crop_pad: Annotated[
        Share, Field(description="random window of the image padded with black by this share of the side (CIFAR: 1/8)")
    ] = 0.0
    flip: Annotated[Share, Field(description="probability of a mirror image")] = 0.0
    jitter: Annotated[
        NonNegative, Field(description="brightness, contrast and saturation change by a factor in 1 +- this")
    ] = 0.0
    lighting: Annotated[
        NonNegative, Field(description="deviation of the noise along the principal colors of ImageNet")
    ] = 0.0
    mix: Annotated[Literal["none", "cutmix", "mixup"], Field(description="mix with another image of the batch")] = (
        "none"
    )
    mix_alpha: Annotated[
        Positive, Field(description="both parameters of the Beta distribution of the mixing share")
    ] = 1.0

    @model_validator(mode="after")
    def _check_crops(self) -> Self:
        check_crops(self.crop_scale, self.crop_ratio)
        if self.crop_pad and self.crop_scale:
            raise InputError("crop_pad and crop_scale are two kinds of crops; set crop_pad=0, or crop_scale=[]")
        return self


def check_crops(scale: Sequence[float], ratio: Sequence[float]) -> None:
    """Refuse ranges of a random resized crop that are no ranges.

    Raises:
        InputError: that begins with the name of the setting.
    """
    if scale and not (len(scale) == 2 and scale[0] <= scale[1]):
        raise InputError(f"crop_scale must be two shares such as [0.08, 1], not {list(scale)}")
    if not (len(ratio) == 2 and ratio[0] <= ratio[1]):
        raise InputError(f"crop_ratio must be two numbers such as [0.75, 1.33], not {list(ratio)}")


@settings
class RelabelConfig(Checked):
    """Labels of every view of a student with `labels: soft`, and their storage."""

    storage: Annotated[
        Literal["shards", "online"],
        Field(description="shards: stored in files; online: computed when needed; the same bits"),
    ] = "shards"
    statistics: Annotated[
        Literal["running", "batch"], Field(description="batch norm statistics of the teachers; batch: BSSL")
    ] = "running"
    average: Annotated[
        Literal["logits", "probabilities"], Field(description="what is averaged over teachers, by their weights")
    ] = "logits"
    dropout: Annotated[
        bool, Field(description="with statistics=batch: dropout of the teachers is on, as in the released code")
    ] = False
    bits: Annotated[Literal[16, 8], Field(description="bits of a stored logit")] = 16
    top_k: Annotated[
        Off[Count], Field(description="keep so many of the largest logits, the others become their mean; off: all")
    ] = None
    epochs: Annotated[
        Auto[Count], Field(description="label epochs; fewer than the student's are repeated; auto: the student's")
    ] = None
    views: Annotated[
        Literal["stored", "seed"], Field(description="seed: crops and mixes are drawn again at replay and compared")
    ] = "stored"
    seed: Annotated[int, Field(description="seed of order, crops and mixes")] = 42


@settings
class StudentConfig(Checked):
    """All settings of one training.

    In a configuration a student is a mapping of these and of `protocol` (a preset, see `dq.config.protocols`) and
    `dataset` (whose published settings to take); `epochs` may be a mapping by ipc.
    """

    protocol: Annotated[str, Field(description="preset that the settings come from; see `dq ls`")] = "custom"
    net: Annotated[str, Field(description="network: a name of dq, timm:NAME or torchvision:NAME")] = "convnet3"
    norm: Annotated[
        Auto[Literal["instance", "batch", "none"]], Field(description="normalization; auto: the network's usual one")
    ] = None
    # fan_out without torchvision's stem: RDED and SRe2L have their own up to 64 px; IDC and Minimax use it everywhere
    init: Annotated[
        Auto[Literal["torchvision", "fan_out"]],
        Field(description="ResNet-18, -50, -101 up to 64 px: He's init but for the stem, or all; auto: PyTorch's"),
    ] = None
    labels: Annotated[
        Literal["hard", "soft", "fixed"],
        Field(description="hard: classes; soft: a teacher's labels of every view; fixed: one label vector per image"),
    ] = "hard"
    epochs: Annotated[Count, Field(description="epochs; in a configuration also a mapping by ipc")] = 300
    batch_size: Annotated[Count, Field(description="images of a training step")] = 256
    accumulate: Annotated[
        Count, Field(description="parts in which a batch passes through the network; batch norm sees the parts")
    ] = 1
    optimizer: Annotated[
        Literal["sgd", "adamw", "muon"],
        Field(description="muon: Muon for hidden matrices and kernels, AdamW for the rest"),
    ] = "sgd"
    lr: Annotated[NonNegative, Field(description="learning rate")] = 0.01
    learned_lr: Annotated[
        bool, Field(description="with sgd: lr is the step size learned with the set, where there is one")
    ] = False
    momentum: Annotated[NonNegative, Field(description="momentum of SGD and Muon")] = 0.9
    weight_decay: Annotated[NonNegative, Field(description="weight decay")] = 5e-4
    decay_vectors: Annotated[
        Auto[bool], Field(description="whether biases and norms decay too; auto: with sgd, and not otherwise")
    ] = None
    schedule: Annotated[
        Literal["step", "multistep", "cosine", "cos2", "linear", "constant"],
        Field(description="schedule of the learning rate"),
    ] = "step"
    lr_floor: Annotated[Share, Field(description="cosine: share of lr at which it ends")] = 0.0
    zeta: Annotated[Positive, Field(description="cosine and linear: end at 0 for 1, at half of lr for 2")] = 1.0
    milestones: Annotated[
        Many[PositiveShare], Field(description="multistep: ascending shares of the epochs after which lr falls")
    ] = (2 / 3, 5 / 6)
    step_factor: Annotated[Positive, Field(description="multistep: factor of lr at a milestone")] = 0.2
    warmup: Annotated[
        Whole, Field(description="epochs of linear warm-up from a hundredth of lr; the schedule takes the others")
    ] = 0
    views: Annotated[ViewConfig, Field(description="what the network sees of an image")] = ViewConfig()
    augment: Annotated[
        Literal["dsa", "crop_flip", "frepo", "frepo_noflip", "none"],
        Field(description="augmentation of normalized images; not with labels=soft"),
    ] = "dsa"
    whiten: Annotated[
        bool, Field(description="ZCA whitening, fitted on the train split, in place of mean and deviation")
    ] = False
    zca: Annotated[
        Literal["mtt", "frepo"], Field(description="whose ZCA; frepo: after standardization, the only step for gray")
    ] = "mtt"
    loss: Annotated[
        Literal["kl", "mse_gt", "mse"],
        Field(
            description="soft, fixed: kl; mse_gt: MSE of logits plus cross-entropy; mse (fixed): of regression labels"
        ),
    ] = "kl"
    temperature: Annotated[Positive, Field(description="temperature of kl")] = 4.0
    gt_weight: Annotated[NonNegative, Field(description="mse_gt: weight of the cross-entropy with the class")] = 0.025
    ema: Annotated[
        NonNegative,
        Field(description="decay of the averaged parameters that are tested; 0: the parameters themselves"),
    ] = 0.0
    relabel: Annotated[RelabelConfig, Field(description="how teachers label views")] = RelabelConfig()
    # the center of a smaller image would be no whole one
    test_scale: Annotated[
        float, Field(ge=1, description="test images are resized to this many times the side, then cut at the center")
    ] = 1.0
    select: Annotated[
        Literal["validation", "test"],
        Field(description="split on which the best epoch is chosen; test is what papers report"),
    ] = "validation"
    tests: Annotated[
        Count, Field(description="tests during a training, the last epoch included; 1: no choice of an epoch")
    ] = 1
    dtype: Annotated[Dtype, Field(description="dtype of the training; auto: what the device is fast in")] = "auto"

    @model_validator(mode="after")
    def _check_student(self) -> Self:
        v = self.views
        if self.labels == "soft" and (self.augment != "none" or v.jitter or v.lighting):
            raise InputError(
                "labels=soft belong to the view that the teacher saw: set augment=none, views.jitter=0 and "
                "views.lighting=0, or take labels=fixed"
            )
        if self.labels == "fixed" and v.mix != "none":
            raise InputError("labels=fixed describe one image and not a mix: set views.mix=none, or take labels=soft")
        changed = v.rand_augment or v.crop_scale or v.crop_pad or v.flip or v.shuffle > 1 or v.jitter or v.lighting
        if self.whiten and (changed or v.mix != "none"):
            raise InputError("whiten works on whole images: leave views at its defaults and use augment")
        if not all(0 < a < b for a, b in pairwise((1e-9, *self.milestones))):
            raise InputError(f"milestones must be ascending shares such as [0.5, 0.75], not {list(self.milestones)}")
        if self.relabel.top_k and self.loss == "mse_gt":
            raise InputError("relabel.top_k keeps logits up to a constant, which loss=mse_gt needs; set top_k=off")
        if self.loss == "mse" and self.labels == "soft":
            raise InputError("loss=mse is for one label vector per image: set labels=fixed, or loss=kl or mse_gt")
        if self.dtype == "float16":
            raise InputError(f"dtype=float16 needs loss scaling, which {self.net!r} is trained without; use bfloat16")
        return self

    def for_step_size(self, step_size: float | None) -> StudentConfig:
        """The settings on a set with this learned step size.

        It is `lr`, if the student takes it.
        """
        if step_size is None or not self.learned_lr or self.optimizer != "sgd":
            return self
        return dataclasses.replace(self, lr=step_size)

    @property
    def asks_teachers(self) -> bool:
        """Whether images without label vectors need a teacher."""
        return self.labels == "soft" or (self.labels == "fixed" and self.loss != "mse")


def label_columns(student: PlainMapping) -> list[PlainDict]:
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
    off: dict[Any, PlainDict] = {"fixed": {"mix": "none"}, "soft": {"jitter": 0.0, "lighting": 0.0}}
    students = []
    for kind in kinds:
        settings = {**student, "labels": kind}
        if kind in off:
            settings["views"] = {**views, **off[kind]}
        if kind == "soft":
            settings["augment"] = "none"
        students.append(settings)
    return students


def _student_columns(students: object) -> Any:
    """Turn students into a tuple, with one for each kind of labels.

    One student may stand alone, and a name for a network.
    """
    if isinstance(students, (str, Mapping)):
        students = [students]
    if not isinstance(students, (list, tuple)):
        return students
    columns: list[object] = []
    for i, student in enumerate(students):
        student = {"net": student} if isinstance(student, str) else student
        try:
            columns += label_columns(student) if isinstance(student, Mapping) else [student]
        except InputError as e:
            raise InputError(f"{i}.{e}") from None
    return tuple(columns)


@settings
class EvaluateConfig(Checked):
    """How sets are evaluated: students, seeds, baselines."""

    seeds: Annotated[Count, Field(description="trainings of each student on each set")] = 3
    full_seeds: Annotated[
        Count, Field(description="trainings of each student on all of train, the most expensive baseline")
    ] = 1
    baselines: Annotated[Many[Baseline], Field(description="selections of real images that are evaluated too")] = (
        *("random", "nearest", "full"),
    )
    patch_factor: Annotated[
        Auto[Count],
        Field(description="patches: factor x factor crops an image; auto: RDED's, 2 from 128 px and ipc 2, else 1"),
    ] = None
    window_start: Annotated[
        Share, Field(description="window: share of the other images of a class that are easier than the window")
    ] = 0.5
    # see `dq.evaluation.redundancy`
    redundancy: Annotated[
        bool, Field(description="also test students of a first slice of every set on the next slice")
    ] = False
    validation_images: Annotated[
        Count, Field(description="stratified part of train that no baseline uses, if a student chooses its epoch")
    ] = 1000
    # `labels` of a student may be a list, which stands for a student of each kind (see `label_columns`)
    students: Annotated[
        tuple[PlainDict, ...],
        BeforeValidator(_student_columns),
        Field(description="students as settings of StudentConfig, protocol and dataset; empty: no evaluation"),
    ] = ({"protocol": "classic"},)

    @model_validator(mode="after")
    def _check_baselines(self) -> Self:
        if len(set(self.baselines)) < len(self.baselines):
            raise InputError(f"baselines={list(self.baselines)} names one twice; give every baseline once")
        return self


def default_baselines(teachers: Sequence[object]) -> tuple[Baseline, ...]:
    """Baselines of an evaluation that names none: random images and, with a teacher, the strongest selection."""
    if teachers:
        return ("random", "facility")
    log.info("baselines: random images alone, since no teacher is named whose features 'facility' could select by")
    return ("random",)
