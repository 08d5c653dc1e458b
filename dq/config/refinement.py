"""Settings of the methods of refinement."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, GetCoreSchemaHandler, model_validator
from pydantic_core import ArgsKwargs, CoreSchema, core_schema

from dq.config.kinds import (
    Auto,
    Count,
    Many,
    ManySettings,
    NonNegative,
    Off,
    PathText,
    Positive,
    PositiveShare,
    Preset,
    Share,
    ShareBelowOne,
    Whole,
)
from dq.config.students import Dtype, check_crops
from dq.config.teachers import TeacherConfig
from dq.config.validation import Checked, settings
from dq.core.errors import InputError
from dq.core.text import nearest_name, short


@settings
class DepthConfig(Checked):
    """Layers whose statistics are matched (PAD's second filter, arXiv 2408.03360).

    Layers count in the order in which the network calls them.
    """

    drop: Annotated[
        Auto[ShareBelowOne],
        Field(description="layers up to this share of the depth are left out; auto: PAD's rule by ipc"),
    ] = 0.0
    unit: Annotated[
        Literal["layer", "channel", "param"],
        Field(description="what the share counts: layers, their channels, or weights of convolutions"),
    ] = "layer"
    keep: Annotated[
        Literal["deep", "shallow"], Field(description="shallow: a control that matches what deep leaves out")
    ] = "deep"
    renorm: Annotated[
        Literal["scale", "count", "none"],
        Field(description="scale: the sum begins as large as that of all layers; count: times layers / kept layers"),
    ] = "scale"
    ramp: Annotated[
        NonNegative, Field(description="layer l of L weighs ((l + 1) / L)^ramp beside its other weight")
    ] = 0.0

    @model_validator(mode="after")
    def _check_depth(self) -> Self:
        if self.keep == "shallow" and self.drop == 0:
            raise InputError("keep=shallow keeps what drop leaves out, which is nothing: set drop above 0")
        return self


STAGES: dict[str, type[RefineConfig]] = {}  # settings of every method of refinement by the name of its stage


@settings
class RefineConfig(Checked):
    """Settings of every method of refinement.

    A subclass sets its `stage`, by which a configuration names it.
    """

    stage: Annotated[str, Field(description="method of refinement")] = ""
    teachers: Annotated[
        ManySettings[TeacherConfig], Field(description="teachers of this stage; empty: those of the run")
    ] = ()
    validation_teachers: Annotated[
        ManySettings[TeacherConfig], Field(description="teachers that only measure the images, before and after")
    ] = ()
    weighted: Annotated[bool, Field(description="whether a batch counts its images by their weights in the set")] = (
        False
    )
    dtype: Annotated[Dtype, Field(description="dtype of the teachers; statistics and pixels are in float32")] = "auto"
    # index: the first image of every class, then the second, ...; dealt: every batch takes from all classes alike;
    # rank: a batch has the images of one rank alone; whole: the whole set is one batch
    compose: Annotated[
        Literal["index", "dealt", "rank", "whole"],
        Field(description="images of a batch: by index in their class, dealt from all classes, of one rank, or all"),
    ] = "index"
    min_classes: Annotated[
        Count, Field(description="different classes that a batch must hold (all, if there are fewer)")
    ] = 5

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.stage:
            STAGES[cls.stage] = cls

    @classmethod
    def variant(cls, data: object) -> type[Checked]:
        """The settings class of the stage that plain data name."""
        stage = data.get("stage") if isinstance(data, dict) else None
        return cls if cls.stage or not isinstance(stage, str) else STAGES.get(stage, cls)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = super().__get_pydantic_core_schema__(source, handler)
        return schema if cls.stage else core_schema.no_info_before_validator_function(cls._read_stage, schema)

    @classmethod
    def _read_stage(cls, data: object) -> Any:
        """Settings of the stage that a mapping names; anything else is left to the check."""
        if isinstance(data, (RefineConfig, ArgsKwargs)):
            return data
        settings_class = cls.variant(data)
        if settings_class is cls:
            stage = data.get("stage") if isinstance(data, dict) else None
            close = nearest_name(stage, list(STAGES)) if isinstance(stage, str) else None
            hint = f"; did you mean {close!r}?" if close else ""
            names = ", ".join(map(repr, STAGES))
            raise InputError(f"must be a mapping whose stage is one of {names}, not {short(data)}{hint}")
        return settings_class.__pydantic_validator__.validate_python(data)

    @property
    def labels_images(self) -> bool:
        """Whether the stage gives its images labels."""
        return False

    @property
    def labels_need_mse(self) -> bool:
        """Whether these labels are regression targets without a temperature, which cross-entropy cannot learn."""
        return False

    def unread(self) -> tuple[str, ...]:
        """Settings that nothing reads beside the present others, so that they decide nothing."""
        return ()

    def paths(self) -> dict[str, str]:
        """Files that the stage reads beside its teachers, by the name of the setting."""
        return {}


@settings
class MatchingConfig(RefineConfig):
    """What the methods share that optimize pixels so that teachers see their classes and their statistics."""

    betas: Annotated[Many[ShareBelowOne], Field(description="both decays of Adam")] = (0.5, 0.9)
    r_bn: Annotated[
        NonNegative, Field(description="weight of the distance of statistics; 0.01 is right for a ResNet-18")
    ] = 0.01
    bn_share: Annotated[
        Off[Positive],
        Field(description="r_bn of each teacher is this times ln(classes) / its first distance; off: r_bn as it is"),
    ] = None
    first_bn_weight: Annotated[NonNegative, Field(description="weight of the first layer; the others have 1")] = 10.0
    norm: Annotated[Literal["l2", "squared"], Field(description="of the differences of means and variances")] = "l2"
    depth: Annotated[DepthConfig, Field(description="layers whose statistics are matched")] = DepthConfig()
    class_weight: Annotated[
        NonNegative,
        Field(description="weight of the distance between a class's mean last feature and that of its real images"),
    ] = 0.0
    proximity: Annotated[
        NonNegative, Field(description="weight of the mean squared distance to the start, in normalized pixels")
    ] = 0.0
    crop_scale: Annotated[
        Many[PositiveShare], Field(description="random resized crop of each step, for the whole batch; empty: no crop")
    ] = (0.08, 1.0)
    crop_ratio: Annotated[
        Many[Positive], Field(description="random resized crop: least and largest ratio of the sides")
    ] = (0.75, 4 / 3)
    flip: Annotated[Share, Field(description="probability that a step sees the batch mirrored")] = 0.5
    # PSM, arXiv 2609.34299. gps: by their distance to the teachers' statistics
    groups: Annotated[
        Literal["none", "gps", "cells"],
        Field(description="groups of a class's real images, one per image of the set: easy to hard, or by prototype"),
    ] = "none"
    statistics: Annotated[
        Literal["running", "group"],
        Field(
            description="what a batch is matched to: batch norm's running statistics, or those of its rank's groups"
        ),
    ] = "running"

    def unread(self) -> tuple[str, ...]:
        return (*super().unread(), *(("groups", "statistics") if self.groups == "none" else ()))

    @property
    def reads_groups(self) -> bool:
        """Whether a setting reads the groups."""
        return self.statistics == "group"

    @model_validator(mode="after")
    def _check_matching(self) -> Self:
        if self.reads_groups and self.groups == "none":
            raise InputError("statistics=group and anchors=group need groups: set groups=gps or groups=cells")
        if self.groups != "none" and not self.reads_groups:
            raise InputError(
                f"groups={self.groups} decides nothing here: set statistics=group, or anchors=group of fadrm, or "
                "leave groups out"
            )
        if self.statistics == "group" and self.compose != "rank":
            raise InputError(
                f"statistics=group matches a batch to the groups of its rank: set compose=rank, not {self.compose}"
            )
        if len(self.betas) != 2:
            raise InputError(f"betas must be two decays in [0, 1), not {list(self.betas)}")
        check_crops(self.crop_scale, self.crop_ratio)
        return self


# released recipes, in `dq.refine.fadrm`
FADRM_PRESETS = ("cifar10", "cifar100", "tinyimagenet", "imagenette", "imagewoof", "imagenet1k")


@settings
class FADRM(MatchingConfig):
    """Data residual matching (arXiv 2506.24125).

    With several teachers it is FADRM+: one per step, in turn. Settings that are None come from the preset.
    """

    stage: Annotated[Literal["fadrm"], Field(description="method of refinement")] = "fadrm"
    preset: Annotated[
        Auto[str],
        Field(description="released recipe: cifar10, cifar100, tinyimagenet, imagenette, imagewoof, imagenet1k"),
    ] = None
    sizes: Annotated[
        Preset[Many[Count]], Field(description="side in px in each block, the last that of the images")
    ] = None
    steps: Annotated[Preset[Many[Count]], Field(description="steps of each block")] = None
    lr: Annotated[Preset[NonNegative], Field(description="learning rate, one cosine to 0 over all blocks")] = None
    jitter: Annotated[Preset[Whole], Field(description="px of circular shift at most")] = None
    batch_size: Annotated[Preset[Count], Field(description="images that are optimized together")] = None
    alpha: Annotated[
        Share, Field(description="share of the optimized image in the merge after each block but the last")
    ] = 0.5
    # init: the images that come in; real_patch: the crops of real images that the first teacher knows best; group:
    # for each image such a crop of an image of its group; file: a set that `dq.load_set` opens
    anchors: Annotated[
        Literal["init", "real_patch", "group", "file"],
        Field(description="images merged with: the start, crops of real images, of the group's images, or a set"),
    ] = "init"
    anchor_path: Annotated[Off[PathText], Field(description="anchors=file: the set")] = None
    anchor_rank: Annotated[
        Literal["easy", "medium"], Field(description="patches: of lowest cross-entropy, or nearest to the median")
    ] = "easy"
    start: Annotated[Literal["anchor", "image"], Field(description="what the first block starts from")] = "anchor"
    # after RETA
    retrieve: Annotated[
        Literal["none", "patches", "prototypes"],
        Field(description="merge with the class's nearest patch of real images, or image of the set, in features"),
    ] = "none"
    retrieve_pool: Annotated[Count, Field(description="retrieve=patches: candidates of a class")] = 50
    retrieve_complexity: Annotated[
        NonNegative, Field(description="weight of an anchor's total variation in the choice, features of unit length")
    ] = 0.0

    def unread(self) -> tuple[str, ...]:
        patches = self.anchors in ("real_patch", "group") or self.retrieve == "patches"
        return (
            *super().unread(),
            *(() if patches else ("anchor_rank",)),
            *(("start",) if self.anchors == "init" else ()),
            *(() if self.retrieve == "patches" else ("retrieve_pool",)),
            *(("retrieve_complexity",) if self.retrieve == "none" else ()),
        )

    @property
    def reads_groups(self) -> bool:
        return self.statistics == "group" or self.anchors == "group"

    def paths(self) -> dict[str, str]:
        return {} if self.anchor_path is None else {"anchor_path": self.anchor_path}

    @model_validator(mode="after")
    def _check_fadrm(self) -> Self:
        for name in ("sizes", "steps"):
            if getattr(self, name) == ():
                raise InputError(f"{name} must list whole numbers of at least 1, one per block, not []")
        if self.sizes is not None and self.steps is not None and len(self.sizes) != len(self.steps):
            raise InputError(
                f"sizes={list(self.sizes)} has {len(self.sizes)} blocks but steps={list(self.steps)} has "
                f"{len(self.steps)}; give one of each per block"
            )
        if (self.anchors == "file") != (self.anchor_path is not None):
            raise InputError("anchors=file and anchor_path belong together: set both, or neither")
        return self


@settings
class Teddy(MatchingConfig):
    """Matching against a pool of weak teachers (Teddy, arXiv 2410.07579).

    The paper does not state its settings: the defaults are of SRe2L's kind, for a short refinement of realistic
    images.
    """

    stage: Annotated[Literal["teddy"], Field(description="method of refinement")] = "teddy"
    steps: Annotated[Whole, Field(description="steps; 0: labels only")] = 300
    lr: Annotated[NonNegative, Field(description="learning rate, a cosine to 0")] = 0.02
    jitter: Annotated[Auto[Whole], Field(description="px of circular shift at most; auto: an eighth of the side")] = (
        None
    )
    batch_size: Annotated[Count, Field(description="images that are optimized together")] = 100
    proximity: Annotated[
        NonNegative, Field(description="weight of the mean squared distance to the start, in normalized pixels")
    ] = 0.1
    ensemble_labels: Annotated[
        bool, Field(description="store the weighted mean logits of all teachers for the images")
    ] = True

    @property
    def labels_images(self) -> bool:
        return self.ensemble_labels


# steps, and lr of images and labels: the paper's 3e-4 is for its 500 000 steps, and the path of LAMB has at most the
# length lr times steps, so that shorter runs take longer steps
BUDGETS: dict[str, tuple[int, float]] = {"quick": (2_000, 3e-3), "standard": (20_000, 1e-3), "paper": (500_000, 3e-4)}


@settings
class FRePo(RefineConfig):
    """Neural feature regression with pooling (FRePo, arXiv 2206.00719).

    Images and labels are learned together by the gradient of a kernel ridge regression on the features of a pool of
    networks. The whole set is one batch.
    """

    stage: Annotated[Literal["frepo"], Field(description="method of refinement")] = "frepo"
    mode: Annotated[
        Literal["pixel", "labels_only", "latent"],
        Field(
            description="what is learned: pixels and labels, labels alone, or latents of the run's codec and labels"
        ),
    ] = "pixel"
    budget: Annotated[
        Literal["quick", "standard", "paper"], Field(description="preset of steps and lr, where these are not set")
    ] = "standard"
    steps: Annotated[Preset[Count], Field(description="updates of the set; preset: by budget")] = None
    lr: Annotated[
        Preset[NonNegative],
        Field(description="LAMB: share of their norm by which a step moves images and labels; preset: by budget"),
    ] = None
    lr_floor: Annotated[Share, Field(description="share of lr at which the cosine ends")] = 0.1
    # real: the paper. With mode=latent, the latents of these, or noise with the mean and std of real images' latents
    start: Annotated[
        Literal["drawn", "real", "noise"],
        Field(description="first images: those that come in, as many random train images of each class, or noise"),
    ] = "drawn"
    first_labels: Annotated[
        Literal["classes", "teachers"], Field(description="first labels: classes, or the teachers' probabilities")
    ] = "classes"
    learn_labels: Annotated[bool, Field(description="whether labels are learned")] = True
    label_margin: Annotated[
        NonNegative, Field(description="weight of the gap between a label's two largest entries, up to 1 / classes")
    ] = 1.0
    # empty: frepoconv3, from 64 px frepoconv4, from 128 px frepoconv5
    nets: Annotated[
        Many[str], Field(description="architectures of the pool, in turn; empty: frepoconv3, -4 or -5 by the side")
    ] = ()
    norm: Annotated[
        Auto[Literal["instance", "batch", "none"]],
        Field(description="normalization of the pool's networks; auto: each network's usual one"),
    ] = "batch"
    pool_size: Annotated[Count, Field(description="networks of the pool")] = 10
    max_online: Annotated[Count, Field(description="training steps after which a network is replaced")] = 100
    online_lr: Annotated[NonNegative, Field(description="learning rate of the networks, Adam")] = 3e-4
    online_batch: Annotated[Count, Field(description="images of a training step of a network, at most")] = 1000
    real_batch: Annotated[Count, Field(description="real images whose labels are predicted in a step")] = 1024
    # mse: half the squared error of predictions (the paper); the temperature of ce_temp is fixed, since predictions
    # are linear in the labels, so that learned labels scale it
    outer_loss: Annotated[
        Literal["mse", "ce_temp"],
        Field(description="mse, or cross-entropy of softmax(predictions / outer_temperature)"),
    ] = "mse"
    outer_temperature: Annotated[Positive, Field(description="temperature of ce_temp")] = 0.1
    ridge: Annotated[PositiveShare, Field(description="ridge, as a share of the kernel's mean diagonal")] = 1e-6
    flip: Annotated[
        Auto[bool], Field(description="mirror images beside; auto: for color images, below 1000 images of the set")
    ] = None
    whiten: Annotated[
        Auto[bool], Field(description="ZCA whitening; auto: of color images, gray ones are standardized alone")
    ] = None
    chunk: Annotated[
        Off[Count], Field(description="images whose activations, a decoder's too, are held at once; off: all")
    ] = None
    # the released code chooses on the test split
    checks: Annotated[
        Whole,
        Field(description="times that the set is tested on held-out train images, to keep the best; 0: the last"),
    ] = 0
    check_nets: Annotated[Count, Field(description="networks of a check")] = 2
    # students with labels=fixed can then learn by cross-entropy
    fit_temperature: Annotated[
        bool, Field(description="fit a temperature for softmax(labels / temperature) on held-out train images")
    ] = False
    held_out: Annotated[
        float, Field(gt=0, le=0.2, description="share of train for checks and temperature, which is not learned from")
    ] = 0.05
    compose: Annotated[Literal["whole"], Field(description="images of a batch: the whole set")] = "whole"
    dtype: Annotated[Literal["float32"], Field(description="dtype of the networks: kernels are nearly singular")] = (
        "float32"
    )

    @property
    def labels_images(self) -> bool:
        return True

    @property
    def labels_need_mse(self) -> bool:
        return not self.fit_temperature

    def unread(self) -> tuple[str, ...]:
        labels_only, no_checks = self.mode == "labels_only", self.checks == 0
        mse = self.outer_loss == "mse"
        return (
            *("start",) * labels_only,
            *("check_nets",) * no_checks,
            *("held_out",) * (no_checks and not self.fit_temperature),
            *("outer_temperature",) * mse,
        )

    @model_validator(mode="after")
    def _check_frepo(self) -> Self:
        if self.mode == "labels_only" and not self.learn_labels:
            raise InputError("mode=labels_only with learn_labels=false leaves nothing to learn; change one of them")
        if len(self.nets) > self.pool_size:
            raise InputError(
                f"nets names {len(self.nets)} architectures for a pool of {self.pool_size}; raise pool_size"
            )
        return self
