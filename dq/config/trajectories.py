"""Settings of expert trajectories: how networks are trained on real data, every epoch of which is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dq.config.reader import Checked
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
