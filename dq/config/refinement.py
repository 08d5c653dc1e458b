"""Settings of the methods of refinement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dq.config.reader import Checked
from dq.config.students import Dtype, ViewConfig
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError
from dq.core.text import short


@dataclass(frozen=True)
class DepthConfig(Checked):
    """Which layers' statistics are matched (PAD's second filter on statistics, arXiv 2408.03360). Layers count in the
    order in which the network calls them."""

    drop: float | None = 0.0  # layers up to this share of the depth are left out; None: PAD's rule by ipc
    unit: Literal["layer", "channel", "param"] = "layer"  # share of layers, of their channels, of convolution weights
    keep: Literal["deep", "shallow"] = "deep"  # shallow: a control that matches what "deep" leaves out
    # scale: the sum is multiplied so that it begins as large as that of all layers; count: by layers / kept layers
    renorm: Literal["scale", "count", "none"] = "scale"
    ramp: float = 0.0  # layer l of L weighs ((l + 1) / L)^ramp beside its other weight

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop is not None and not 0 <= self.drop < 1:
            raise InputError(f"drop is a share of the depth in [0, 1), not {self.drop}")
        if self.keep == "shallow" and self.drop == 0:
            raise InputError("keep=shallow keeps what drop leaves out, which is nothing: set drop above 0")


STAGES: dict[str, type[RefineConfig]] = {}  # settings of every method of refinement by the name of its stage


@dataclass(frozen=True)
class RefineConfig(Checked):
    """Settings of every method of refinement. A subclass names its `stage`, by which a configuration asks for it."""

    stage: str = ""
    teachers: tuple[TeacherConfig, ...] = ()  # none: those of the run
    judges: tuple[TeacherConfig, ...] = ()  # teachers that only measure the images, before and after
    weighted: bool = False  # a batch counts its images by their weights in the set
    dtype: Dtype = "auto"  # of the teachers; statistics and pixels are in float32
    # index: the first image of every class, then the second, ...; dealt: every batch takes from all classes alike;
    # rank: a batch has the images of one rank alone; whole: the whole set is one batch
    compose: Literal["index", "dealt", "rank", "whole"] = "index"
    min_classes: int = 5  # different classes that a batch must hold (all, if there are fewer)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.stage:
            STAGES[cls.stage] = cls

    @classmethod
    def variant(cls, data: Any, where: str) -> type[RefineConfig]:
        """The settings class of the stage that plain data name.

        Raises:
            InputError: if there is no such stage.
        """
        if cls is not RefineConfig:
            return cls
        stage = data.get("stage") if isinstance(data, dict) else None
        if not isinstance(stage, str) or stage not in STAGES:
            raise InputError(
                f"{where} must be a mapping whose stage is one of {', '.join(map(repr, STAGES))}, not {short(data)}"
            )
        return STAGES[stage]

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


@dataclass(frozen=True)
class MatchingConfig(RefineConfig):
    """What the methods share that optimize pixels so that teachers see their classes and their statistics."""

    betas: tuple[float, ...] = (0.5, 0.9)  # of Adam
    r_bn: float = 0.01  # weight of the distance of statistics; right for a ResNet-18
    # None: r_bn as it is. Else r_bn of each teacher becomes this many times ln(classes) / its distance at the start
    bn_share: float | None = None
    first_bn_weight: float = 10.0  # of the first layer; the others have 1
    norm: Literal["l2", "squared"] = "l2"  # of the differences of means and variances
    depth: DepthConfig = DepthConfig()
    class_weight: float = 0.0  # of the distance between a class's mean last feature and that of its real images
    proximity: float = 0.0  # of the mean squared distance to the start, in normalised pixels
    crop_scale: tuple[float, ...] = (0.08, 1.0)  # one random resized crop a step for the whole batch; none: no crop
    crop_ratio: tuple[float, ...] = (0.75, 4 / 3)
    flip: float = 0.5  # probability that a step sees the batch mirrored
    # groups of the real images of a class, one for each of its images in the set (PSM, arXiv 2609.34299). gps: as many
    # from easy to hard, by their distance to the teachers' statistics; cells: those of its prototypes
    groups: Literal["none", "gps", "cells"] = "none"
    # what a batch is matched to. running: what the teachers' layers keep; group: the statistics of the groups of its
    # rank, with compose=rank
    statistics: Literal["running", "group"] = "running"

    def unread(self) -> tuple[str, ...]:
        return (*super().unread(), *(("groups", "statistics") if self.groups == "none" else ()))

    @property
    def reads_groups(self) -> bool:
        """Whether a setting reads the groups."""
        return self.statistics == "group"

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise InputError(f"betas must be two decays in [0, 1), not {list(self.betas)}")
        ViewConfig(crop_scale=self.crop_scale, crop_ratio=self.crop_ratio, flip=self.flip)


@dataclass(frozen=True)
class FADRM(MatchingConfig):
    """Data residual matching (arXiv 2506.24125). With several teachers it is FADRM+: one per step, in turn. What is
    None comes from the preset."""

    stage: Literal["fadrm"] = "fadrm"
    # whose released recipe: cifar10, cifar100, tinyimagenet, imagenette, imagewoof, imagenet1k; None: the usual one
    # for the size of the images
    preset: str | None = None
    sizes: tuple[int, ...] | None = None  # side in px in each block, the last that of the images
    steps: tuple[int, ...] | None = None  # of each block
    lr: float | None = None  # one cosine to 0 over all blocks
    jitter: int | None = None  # px of circular shift at most
    batch_size: int | None = None  # images optimised together; several of a class where there are fewer classes
    alpha: float = 0.5  # share of the optimised image in the merge behind each block but the last
    # init: the images that come in; real_patch: the crops of real images that the first teacher knows best; group:
    # for each image such a crop of an image of its group; file: a set that `dq.load_set` opens
    anchors: Literal["init", "real_patch", "group", "file"] = "init"
    anchor_path: str | None = None
    anchor_rank: Literal["easy", "medium"] = "easy"  # of patches: lowest cross-entropy, or nearest to the median
    start: Literal["anchor", "image"] = "anchor"  # what the first block starts from
    # patches, prototypes: every merge takes the nearest of the class's patches of real images, or of its images in the
    # set, in features (after RETA)
    retrieve: Literal["none", "patches", "prototypes"] = "none"
    retrieve_pool: int = 50  # patches: candidates of a class
    retrieve_complexity: float = 0.0  # of an anchor's total variation in the choice, features having unit length

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha is a share and must lie in [0, 1], not {self.alpha}")
        for name in ("sizes", "steps"):
            values = getattr(self, name)
            if values is not None and (not values or min(values) < 1):
                raise InputError(f"{name} must list whole numbers of at least 1, one per block, not {list(values)}")
        if self.sizes is not None and self.steps is not None and len(self.sizes) != len(self.steps):
            raise InputError(
                f"sizes={list(self.sizes)} has {len(self.sizes)} blocks but steps={list(self.steps)} has "
                f"{len(self.steps)}; give one of each per block"
            )
        if (self.anchors == "file") != (self.anchor_path is not None):
            raise InputError("anchors=file and anchor_path belong together: set both, or neither")


@dataclass(frozen=True)
class Teddy(MatchingConfig):
    """Matching against a pool of weak teachers (arXiv 2410.07579). The paper's settings are not known to us: the
    defaults are of SRe2L's kind, for a short refinement of images that look real already."""

    stage: Literal["teddy"] = "teddy"
    steps: int = 300  # 0: labels only
    lr: float = 0.02  # cosine to 0
    jitter: int | None = None  # None: an eighth of the side
    batch_size: int = 100
    proximity: float = 0.1
    ensemble_labels: bool = True  # store the weighted mean logits of all teachers for the images

    @property
    def labels_images(self) -> bool:
        return self.ensemble_labels


# steps, and lr of images and labels: the paper's 3e-4 is for its 500 000 steps, and the path of LAMB has at most the
# length lr times steps, so that shorter runs take longer steps
BUDGETS: dict[str, tuple[int, float]] = {"quick": (2_000, 3e-3), "standard": (20_000, 1e-3), "paper": (500_000, 3e-4)}


@dataclass(frozen=True)
class FRePo(RefineConfig):
    """Neural feature regression with pooling (arXiv 2206.00719): images and labels are learned together by the
    gradient of a kernel ridge regression on the features of a pool of networks. The whole set is one batch."""

    stage: Literal["frepo"] = "frepo"
    # labels_only: images stay as they come in; latent: latents of the run's codec are learned, and images are decoded
    mode: Literal["pixel", "labels_only", "latent"] = "pixel"
    budget: Literal["quick", "standard", "paper"] = "standard"  # steps and lr, where these are not set
    steps: int | None = None
    lr: float | None = None  # of LAMB, for images and for labels: each step moves them by this share of their norm
    lr_floor: float = 0.1  # share of lr at which the cosine ends
    # drawn: the images that come in; real: as many random train images of each class (the paper); noise. With
    # mode=latent, the latents of these, or noise with the mean and std of real images' latents
    start: Literal["drawn", "real", "noise"] = "drawn"
    first_labels: Literal["classes", "teachers"] = "classes"  # where labels start; teachers: their probabilities
    learn_labels: bool = True
    label_margin: float = 1.0  # weight of the gap between the two largest entries of a label, up to 1 / classes
    # architectures of the pool, in turn; none: frepoconv3, from 64 px frepoconv4, from 128 px frepoconv5
    nets: tuple[str, ...] = ()
    norm: Literal["instance", "batch", "none"] | None = "batch"  # of the pool's networks
    pool_size: int = 10
    max_online: int = 100  # training steps after which a network is replaced
    online_lr: float = 3e-4  # Adam
    online_batch: int = 1000  # images of a training step, at most
    real_batch: int = 1024  # real images whose labels are predicted in a step
    # mse: half the squared error of predictions (the paper); ce_temp: cross-entropy of softmax(predictions /
    # outer_temperature), which is fixed, since predictions are linear in the labels, so that learned labels scale it
    outer_loss: Literal["mse", "ce_temp"] = "mse"
    outer_temperature: float = 0.1
    ridge: float = 1e-6  # of the mean diagonal of the kernel
    flip: bool | None = None  # mirror images beside; None: for color images, if the set has fewer than 1000
    whiten: bool | None = None  # None: color images; grey ones are standardized alone
    chunk: int | None = None  # images whose activations, a decoder's too, are held at once; None: all
    # times, evenly spread, that networks trained on the set are tested on held-out train images, the best set being
    # returned; 0: the last one. The released code chooses on the test split
    checks: int = 0
    check_nets: int = 2  # networks of a check
    # a temperature for softmax(labels / temperature) is fitted on held-out train images and recorded, so that students
    # with labels=fixed can learn by cross-entropy
    fit_temperature: bool = False
    # share of train for checks and the temperature, at most 0.2, which the regression then does not see
    held_out: float = 0.05
    compose: Literal["index", "dealt", "rank", "whole"] = "whole"
    dtype: Dtype = "float32"  # of all networks; nothing else is allowed

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compose != "whole":
            raise InputError(f"frepo refines the whole set at once: set compose=whole, not {self.compose}")
        if self.mode == "labels_only" and not self.learn_labels:
            raise InputError("mode=labels_only with learn_labels=false leaves nothing to learn; change one of them")
        if self.dtype != "float32":
            raise InputError(
                f"frepo needs features in float32, since its kernels are nearly singular: leave out dtype={self.dtype}"
            )
        if len(self.nets) > self.pool_size:
            raise InputError(
                f"nets names {len(self.nets)} architectures for a pool of {self.pool_size}; raise pool_size"
            )
        for name in ("steps", "pool_size", "max_online", "online_batch", "real_batch", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} of frepo must be at least 1, not {value}")
        if self.checks < 0 or self.check_nets < 1 or not 0 < self.held_out <= 0.2:
            raise InputError("frepo needs checks >= 0, check_nets >= 1 and a share held_out of at most 0.2")
        if not 0 < self.ridge <= 1:
            raise InputError(f"ridge is a share of the kernel's diagonal in (0, 1], not {self.ridge:g}")
        if not 0 <= self.lr_floor <= 1:
            raise InputError(f"lr_floor is a share of lr in [0, 1], not {self.lr_floor:g}")
