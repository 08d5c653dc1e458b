"""Settings of expert trajectories, and of a distilled set that is matched to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from dq.config.kinds import (
    Auto,
    Count,
    Many,
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
from dq.config.refinement import RefineConfig
from dq.config.validation import Checked, settings
from dq.core.errors import InputError


def _pairs(value: Any) -> Any:
    """Lists of lists as tuples of tuples."""
    is_list = isinstance(value, (list, tuple))
    return tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value) if is_list else value


@settings
class CurriculumConfig(Checked):
    """PAD's data schedule of experts (arXiv 2408.03360, section 3.2).

    In every class the easy images come first, then all, then all without the easiest.
    """

    order: Annotated[
        PathText, Field(description="safetensors file with the rows of each class from easy to hard (`dq prune`)")
    ] = ""
    initial: Annotated[
        PositiveShare, Field(description="share of a class, the easiest, in epoch 0 (the paper's IR)")
    ] = 0.75
    complete_at: Annotated[
        Whole, Field(description="epoch, from 0, with all images (AEE); the paper has 40 for CIFAR-100 and Tiny")
    ] = 20
    # released for CIFAR-10 alone
    removals: Annotated[
        tuple[tuple[NonNegative, ...], ...],
        BeforeValidator(_pairs),
        Field(description="[epoch, share]: from this epoch on the easiest share of a class is left out"),
    ] = ((40, 0.1), (60, 0.2))

    @model_validator(mode="after")
    def _check_curriculum(self) -> Self:
        if not self.order:
            raise InputError("order of a curriculum must name the file of the images' order; leave curriculum out")
        pairs = all(len(r) == 2 and 0 <= r[1] < 1 for r in self.removals)
        epochs = [r[0] for r in self.removals] if pairs else []
        if not pairs or epochs != sorted(set(epochs)) or any(e < self.complete_at for e in epochs):
            raise InputError(
                f"removals must list rising epochs of at least complete_at={self.complete_at}, each with a share in "
                f"[0, 1), such as [[40, 0.1], [60, 0.2]], not {[list(r) for r in self.removals]}"
            )
        return self


@settings
class TrainExpertsConfig(Checked):
    """Training of experts, whose parameters after every epoch are stored.

    Defaults are those of DATM and PAD; MTT has `optimizer: sgd` and 50 epochs.
    """

    output_dir: Annotated[PathText, Field(description="folder of the experts")] = "runs/experts"
    number: Annotated[Count, Field(description="experts to train")] = 100
    seed: Annotated[int, Field(description="seed of weights and batches")] = 0
    net: Annotated[str, Field(description="network, without batch norm")] = "convnet3"
    epochs: Annotated[Count, Field(description="epochs of the training")] = 100
    batch_size: Annotated[Count, Field(description="images of a training step")] = 256
    optimizer: Annotated[
        Literal["sgd", "gsam"],
        Field(description="without momentum and decay; gsam passes twice through the network"),
    ] = "gsam"
    lr: Annotated[NonNegative, Field(description="constant learning rate")] = 0.01
    rho: Annotated[NonNegative, Field(description="gsam: length of the step uphill")] = 0.01
    gsam_alpha: Annotated[
        Share, Field(description="gsam: share of the part of the gradient that lies across the one uphill")
    ] = 0.3
    augment: Annotated[Literal["dsa", "crop_flip", "none"], Field(description="augmentation in training")] = "dsa"
    whiten: Annotated[bool, Field(description="MTT's ZCA, fitted on these images, in place of mean and deviation")] = (
        True
    )
    curriculum: Annotated[
        Off[CurriculumConfig], Field(description="PAD's schedule of the data; off: all images in every epoch (DATM)")
    ] = None
    # on a CPU more than one are slower (results/experts.csv)
    side_by_side: Annotated[
        Auto[Count],
        Field(description="experts trained as one batched model, the same up to rounding; auto: 1 on a CPU, else 10"),
    ] = None
    checkpoint_s: Annotated[Positive, Field(description="seconds between checkpoints")] = 60.0


class Published(NamedTuple):
    """Settings and accuracies of a data set and ipc in PAD's tables (arXiv 2408.03360)."""

    student_steps: int
    expert_epochs: int
    start_epochs: tuple[int, int, int]
    expand_every: int
    inner_batch: int
    lr_labels: float
    lr_images: float
    alpha: float
    lr_step: float
    datm: float  # % of test images, DATM as compiled in PAD's table 1
    pad: float
    start: str = "correct"
    threshold: float = 1.0


# Where the released configurations differ from the paper, the paper's column is here, as its author advises
PRESETS: dict[str, dict[int, Published]] = {
    "cifar10": {
        1: Published(80, 2, (0, 4, 4), 0, 10, 5, 100, 0.0, 1e-7, 46.9, 47.2, threshold=1.1),
        10: Published(80, 2, (0, 10, 20), 100, 100, 2, 100, 0.25, 1e-5, 66.8, 67.4),
        50: Published(80, 2, (0, 20, 40), 100, 500, 2, 1000, 0.25, 1e-5, 76.1, 77.0),
        500: Published(80, 2, (40, 60, 60), 0, 1000, 10, 50, 0.5, 1e-5, 83.5, 84.6),
        1000: Published(80, 2, (40, 60, 60), 0, 1000, 10, 50, 0.75, 1e-5, 85.5, 86.7),
    },
    "cifar100": {
        1: Published(40, 3, (0, 10, 20), 100, 100, 10, 1000, 0.0, 1e-5, 27.9, 28.4),
        10: Published(80, 2, (0, 20, 40), 100, 1000, 10, 1000, 0.25, 1e-5, 47.2, 47.8),
        50: Published(80, 2, (40, 60, 80), 100, 1000, 10, 1000, 0.5, 1e-5, 55.0, 55.9, start="real"),
        100: Published(80, 2, (40, 80, 80), 0, 1000, 10, 50, 0.5, 1e-5, 57.5, 58.5),
    },
    "tinyimagenet": {
        1: Published(60, 2, (0, 15, 30), 400, 200, 10, 10000, 0.0, 1e-4, 17.1, 17.7),
        10: Published(60, 2, (0, 20, 40), 100, 250, 10, 100, 0.25, 1e-4, 31.1, 32.3),
        50: Published(60, 2, (20, 40, 60), 100, 250, 10, 100, 0.5, 1e-4, 39.7, 41.6),
    },
}
# without a preset: that of CIFAR-10 at 10 images per class, with fewer steps of the student
GENERAL = Published(20, 2, (0, 10, 20), 100, 0, 2, 100, 0.0, 1e-5, 0.0, 0.0, start="drawn")


@settings
class Trajectory(RefineConfig):
    """Matching of training trajectories (MTT, with extensions of DATM and PAD).

    Images, soft labels and the student's learning rate are learned so that training on the set ends where an expert's
    training on real images ends. Soft labels and the growing range of epochs are DATM's, the choice of parameters is
    PAD's. The whole set is one batch. Settings that are None come from the preset.
    """

    stage: Annotated[Literal["trajectory"], Field(description="method of refinement")] = "trajectory"
    experts: Annotated[
        PathText, Field(description="folder of `dq train-experts`, whose network and preprocessing are used")
    ] = ""
    mode: Annotated[
        Literal["pixel", "latent"], Field(description="what is learned: pixels, or latents of the run's codec")
    ] = "pixel"
    chunk: Annotated[
        Off[Count],
        Field(description="mode=latent: images whose activations in the decoder are held at once; off: all"),
    ] = None
    preset: Annotated[
        Off[str], Field(description="published settings by ipc: cifar10, cifar100, tinyimagenet; off: general ones")
    ] = None
    steps: Annotated[Whole, Field(description="updates of the set")] = 10_000
    student_steps: Annotated[
        Preset[Count], Field(description="steps of SGD on the set between two checkpoints of an expert (N)")
    ] = None
    expert_epochs: Annotated[Preset[Count], Field(description="epochs between these two checkpoints (M)")] = None
    # students start from an epoch drawn from `first` up to, without, the bound, which rises by one every
    # `expand_every` steps
    start_epochs: Annotated[
        Preset[Many[Whole]], Field(description="[first, bound, last bound] of the epochs that students start from")
    ] = None
    expand_every: Annotated[
        Preset[Whole], Field(description="steps after which the bound rises by one; 0: it is the last one at once")
    ] = None
    inner_batch: Annotated[Preset[Whole], Field(description="images of a student's step; 0: all")] = None
    alpha: Annotated[
        Preset[ShareBelowOne],
        Field(description="share of the parameters that are not compared (PAD); without a preset its rule by ipc"),
    ] = None
    select: Annotated[
        Literal["depth", "loss"],
        Field(description="parameters that are not compared: the shallowest, or those that differ least"),
    ] = "depth"
    unroll: Annotated[
        Literal["exact", "tesla"],
        Field(description="tesla: in the memory of one step, with approximate gradients"),
    ] = "exact"
    start: Annotated[
        Preset[Literal["drawn", "real", "correct", "noise"]],
        Field(description="first images; correct: real images that an expert classifies correctly"),
    ] = None
    first_labels: Annotated[
        Literal["experts", "classes"],
        Field(description="first labels: mean logits of the experts that are right, or classes"),
    ] = "experts"
    learn_labels: Annotated[bool, Field(description="whether labels are learned")] = True
    learn_step: Annotated[bool, Field(description="whether the student's learning rate is learned")] = True
    first_step: Annotated[Positive, Field(description="learning rate of the student at the start")] = 0.01
    lr_images: Annotated[Preset[NonNegative], Field(description="learning rate of images or latents")] = None
    lr_labels: Annotated[Preset[NonNegative], Field(description="learning rate of labels")] = None
    lr_step: Annotated[Preset[NonNegative], Field(description="learning rate of the student's learning rate")] = None
    momentum_images: Annotated[ShareBelowOne, Field(description="momentum of images or latents")] = 0.5
    momentum_labels: Annotated[ShareBelowOne, Field(description="momentum of labels")] = 0.9
    momentum_step: Annotated[ShareBelowOne, Field(description="momentum of the student's learning rate")] = 0.5
    # the released code lets it become negative
    least_step: Annotated[Positive, Field(description="least learning rate of the student")] = 1e-6
    threshold: Annotated[Preset[Positive], Field(description="a step whose loss is larger changes nothing")] = None
    augment: Annotated[Literal["dsa", "crop_flip", "none"], Field(description="augmentation of the student")] = "dsa"
    min_accuracy: Annotated[
        Auto[Share], Field(description="least accuracy of every expert on held-out images; auto: twice that of chance")
    ] = None
    # the train images that were held out from the experts; the released code chooses on the test split
    checks: Annotated[
        Whole,
        Field(description="times that the set is tested on held-out train images, to keep the best; 0: the last"),
    ] = 0
    check_nets: Annotated[Count, Field(description="networks of a check")] = 2
    check_epochs: Annotated[Count, Field(description="epochs of a network of a check")] = 300
    compose: Annotated[Literal["whole"], Field(description="images of a batch: the whole set")] = "whole"
    dtype: Annotated[Literal["float32"], Field(description="dtype of all networks: steps of a student are small")] = (
        "float32"
    )

    @property
    def labels_images(self) -> bool:
        return True

    def paths(self) -> dict[str, str]:
        return {"experts": str(Path(self.experts) / "experts.json")}

    def unread(self) -> tuple[str, ...]:
        return (
            *("chunk",) * (self.mode == "pixel"),
            *("check_nets", "check_epochs") * (self.checks == 0),
            *("select",) * (self.alpha == 0),
            *("lr_labels", "momentum_labels") * (not self.learn_labels),
            *("lr_step", "momentum_step", "least_step") * (not self.learn_step),
        )

    @model_validator(mode="after")
    def _check_trajectory(self) -> Self:
        if not self.experts:
            raise InputError("experts must be a folder of experts; make one by `dq train-experts`")
        e = self.start_epochs
        if e is not None and not (len(e) == 3 and e[0] < e[1] <= e[2]):
            raise InputError(f"start_epochs must be [first, bound, last bound], such as [0, 10, 20], not {list(e)}")
        if self.least_step > self.first_step:
            raise InputError(f"least_step={self.least_step:g} must be at most first_step={self.first_step:g}")
        if self.start == "noise" and self.first_labels == "experts":
            raise InputError("experts see no class in noise; with start=noise set first_labels=classes")
        return self
