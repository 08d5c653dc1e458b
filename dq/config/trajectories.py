"""Settings of expert trajectories, and of a distilled set that is matched to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from dq.config.reader import Checked
from dq.config.refinement import RefineConfig
from dq.config.students import Dtype
from dq.core.errors import InputError


@dataclass(frozen=True)
class CurriculumConfig(Checked):
    """PAD's data schedule of experts (arXiv 2408.03360, section 3.2): in every class the easy images first, then all,
    then without the easiest."""

    order: str = ""  # safetensors file with the rows of each class from easy to hard, see `read_orders`
    initial: float = 0.75  # share of a class, the easiest, in epoch 0 (the paper's IR)
    complete_at: int = 20  # epoch, from 0, in which all images are in (AEE); the paper has 40 for CIFAR-100 and Tiny
    # [epoch, share]: behind this epoch the easiest share of a class is left out. Released for CIFAR-10 alone
    removals: tuple[tuple[float, ...], ...] = ((40, 0.1), (60, 0.2))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.order:
            raise InputError("order of a curriculum must name the file of the images' order; leave curriculum out")
        if not 0 < self.initial <= 1 or self.complete_at < 0:
            raise InputError(
                f"a curriculum begins with a share initial in (0, 1] and is complete at an epoch of at least 0, not "
                f"{self.initial:g} and {self.complete_at}"
            )
        pairs = all(len(r) == 2 and 0 <= r[1] < 1 for r in self.removals)
        epochs = [r[0] for r in self.removals] if pairs else []
        if not pairs or epochs != sorted(set(epochs)) or any(e < self.complete_at for e in epochs):
            raise InputError(
                f"removals must list rising epochs of at least complete_at={self.complete_at}, each with a share in "
                f"[0, 1), such as [[40, 0.1], [60, 0.2]], not {[list(r) for r in self.removals]}"
            )


@dataclass(frozen=True)
class TrainExpertsConfig(Checked):
    """Networks trained on real data whose parameters at the end of every epoch are kept, for matching of trajectories.
    Defaults are those of DATM and PAD; MTT has `optimizer: sgd` and 50 epochs."""

    output_dir: str = "runs/experts"
    number: int = 100
    seed: int = 0
    net: str = "convnet3"  # without statistics that are gathered over batches, so no batch norm
    epochs: int = 100
    batch_size: int = 256
    optimizer: Literal["sgd", "gsam"] = "gsam"  # without momentum and decay; gsam passes twice through the network
    lr: float = 0.01  # constant
    rho: float = 0.01  # gsam: length of the step uphill
    gsam_alpha: float = 0.3  # gsam: share of the part of the gradient that lies across the one uphill
    augment: Literal["dsa", "crop_flip", "none"] = "dsa"
    whiten: bool = True  # MTT's ZCA, fitted on these images, instead of mean and std
    curriculum: CurriculumConfig | None = None  # None: all images in every epoch (DATM)
    # experts that are trained as one batched model, with the same result up to rounding; None: 1 on a CPU, where more
    # are slower (results/experts.csv), else 10
    side_by_side: int | None = None
    checkpoint_s: float = 60.0  # seconds between checkpoints

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.number < 1 or (self.side_by_side is not None and self.side_by_side < 1):
            raise InputError(
                f"number and side_by_side of experts must be at least 1, not {self.number} and {self.side_by_side}"
            )
        if self.rho < 0 or not 0 <= self.gsam_alpha <= 1:
            raise InputError(
                f"gsam needs rho of at least 0 and gsam_alpha in [0, 1], not {self.rho:g}, {self.gsam_alpha:g}"
            )


class Published(NamedTuple):
    """Settings of a data set and ipc in PAD's paper (its tables, arXiv 2408.03360), and the accuracies it prints."""

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
MINIMA = {"student_steps": 1, "expert_epochs": 1, "expand_every": 0, "inner_batch": 0, "chunk": 1}  # of `Trajectory`


@dataclass(frozen=True)
class Trajectory(RefineConfig):
    """Matching of trajectories: images, soft labels and the student's learning rate are learned, so that a network's
    training on the set ends where an expert's on real images ends (MTT; DATM's soft labels and growing range of
    epochs; PAD's choice of parameters). The whole set is one batch. What is None comes from the preset."""

    stage: Literal["trajectory"] = "trajectory"
    experts: str = ""  # folder of `dq train-experts`, whose network and preprocessing the stage has
    # latent: latents of the run's codec are learned, with `lr_images`, and images are decoded
    mode: Literal["pixel", "latent"] = "pixel"
    chunk: int | None = None  # mode=latent: images whose activations in the decoder are held at once; None: all
    preset: str | None = None  # published settings by ipc: cifar10, cifar100, tinyimagenet; None: general ones
    steps: int = 10_000  # updates of the set
    student_steps: int | None = None  # of SGD on the set between two checkpoints of an expert (N)
    expert_epochs: int | None = None  # between these two (M)
    # [first, bound, last bound]: students start from an epoch drawn from `first` up to, without, the bound, which
    # rises by one every `expand_every` steps; 0: it is the last one from the beginning
    start_epochs: tuple[int, ...] | None = None
    expand_every: int | None = None
    inner_batch: int | None = None  # images of a student's step; 0: all
    # share of the parameters that are not compared (PAD); without a preset None is the paper's rule by ipc
    alpha: float | None = None
    select: Literal["depth", "loss"] = "depth"  # which: the shallowest, or those that differ least
    unroll: Literal["exact", "tesla"] = "exact"  # tesla: in the memory of one step, with approximate gradients
    start: Literal["drawn", "real", "correct", "noise"] | None = None  # correct: real images that an expert knows
    first_labels: Literal["experts", "classes"] = "experts"  # the mean logits of the experts that are right
    learn_labels: bool = True
    learn_step: bool = True
    first_step: float = 0.01  # learning rate of the student at the start
    lr_images: float | None = None
    lr_labels: float | None = None
    lr_step: float | None = None
    momentum_images: float = 0.5
    momentum_labels: float = 0.9
    momentum_step: float = 0.5
    least_step: float = 1e-6  # the learning rate is kept at or above this; the released code lets it become negative
    threshold: float | None = None  # a step whose loss is larger changes nothing
    augment: Literal["dsa", "crop_flip", "none"] = "dsa"  # of the student
    min_accuracy: float | None = None  # of every expert on held-out images; None: twice that of chance
    # times, evenly spread, that networks trained on the set are tested on the train images that were held out from the
    # experts, the best set being returned; 0: the last one. The released code chooses on the test split
    checks: int = 0
    check_nets: int = 2
    check_epochs: int = 300
    compose: Literal["index", "dealt", "rank", "whole"] = "whole"
    dtype: Dtype = "float32"  # of all networks; nothing else is allowed

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compose != "whole":
            raise InputError(f"trajectory refines the whole set at once: set compose=whole, not {self.compose}")
        if self.dtype != "float32":
            raise InputError(f"trajectory needs float32, since steps of a student are small: not dtype={self.dtype}")
        if not self.experts:
            raise InputError("experts must name a folder of `dq train-experts`")
        for name, low in MINIMA.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"{name} of trajectory must be at least {low}, not {value}")
        e = self.start_epochs
        if e is not None and not (len(e) == 3 and 0 <= e[0] < e[1] <= e[2]):
            raise InputError(f"start_epochs must be [first, bound, last bound], such as [0, 10, 20], not {list(e)}")
        if self.alpha is not None and not 0 <= self.alpha < 1:
            raise InputError(f"alpha is a share of the parameters in [0, 1), not {self.alpha:g}")
        for name in ("lr_images", "lr_labels", "lr_step", "momentum_images", "momentum_labels", "momentum_step"):
            value = getattr(self, name)
            if value is not None and not (0 <= value < (1 if "momentum" in name else float("inf"))):
                raise InputError(f"{name} of trajectory cannot be {value:g}")
        if not 0 < self.least_step <= self.first_step < float("inf"):
            raise InputError(
                f"a learning rate must be positive: 0 < least_step <= first_step, not {self.least_step:g} and "
                f"{self.first_step:g}"
            )
        if self.min_accuracy is not None and not 0 <= self.min_accuracy <= 1:
            raise InputError(f"min_accuracy is a share of images in [0, 1], not {self.min_accuracy:g}")
        if self.checks < 0 or self.check_nets < 1 or self.check_epochs < 1:
            raise InputError("trajectory needs checks >= 0, check_nets >= 1 and check_epochs >= 1")
        if self.start == "noise" and self.first_labels == "experts":
            raise InputError("experts see no class in noise; with start=noise set first_labels=classes")
