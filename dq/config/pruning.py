"""Settings of difficulty scores and of the pruning of train images by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dq.config.reader import Checked
from dq.config.students import Dtype
from dq.core.errors import InputError

Score = Literal["el2n", "grand_last", "forgetting", "uncertainty", "loss", "cad"]
Policy = Literal["none", "pad", "hard", "easy", "window", "random", "reversed"]
# None of `share`: the shares at which trajectory and gradient matching did best in PAD's plots, and SelMatch's least
# beta
DEFAULT_SHARES = {"hard": 0.2, "easy": 0.1, "window": 0.2}


@dataclass(frozen=True)
class DifficultyConfig(Checked):
    """How the difficulty of train images is measured: short runs of an agent network (PAD, arXiv 2408.03360).

    PAD says neither which network nor which epoch nor how many runs it averaged. These are the recommendations of Data
    Diet (arXiv 2107.07075) for EL2N, on PAD's agent network.
    """

    score: Score = "el2n"
    net: str = "convnet3"  # the agent
    runs: int = 10  # whose scores are averaged
    epochs: int = 100  # of the training of which a run is the beginning
    score_epoch: int | None = None  # after which scores are taken; None: max(1, round(0.1 epochs))
    cad_window: int = 6  # cad: epochs of a window; fewer where a run has no two windows of this length
    batch_size: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: Literal["dsa", "crop_flip", "none"] = "crop_flip"  # while training; never while scoring
    seed: int = 0  # of the runs, and not the run's own, so that all runs share the scores
    # folder of scores that were made before, difficulty-<digest> of a cache; None: that of these settings in cache_dir
    path: str | None = None
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_epoch is not None and self.score_epoch > self.epochs:
            raise InputError(f"score_epoch={self.score_epoch} comes after the last of {self.epochs} epochs; lower it")
        if self.score == "cad" and self.trained_epochs < 2:
            raise InputError(
                f"score=cad is a deviation over epochs and a run has {self.trained_epochs}; set score_epoch to 2 or "
                "more"
            )

    @property
    def trained_epochs(self) -> int:
        """Epochs of a run."""
        return self.score_epoch or max(1, round(0.1 * self.epochs))


@dataclass(frozen=True)
class PruneConfig(DifficultyConfig):
    """Which images of a class the clusters are made from, by their difficulty; see `dq.data.pruning`."""

    policy: Policy = "none"
    share: float | None = None  # hard, easy: of a class that is dropped (None: 0.2, 0.1); window: beta (None: 0.2)
    # filter: dropped images are not clustered; weight: they weigh `outside_weight`; cluster: whole clusters go
    where: Literal["filter", "weight", "cluster"] = "filter"
    outside_weight: float = 0.25
    keep_per_ipc: float = 10.0  # at least so many images of a class stay for each of the ipc ...
    keep_share: float = 0.5  # ... and this share of the class

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and self.policy not in DEFAULT_SHARES:
            raise InputError(
                f"policy={self.policy} has no share, which {', '.join(DEFAULT_SHARES)} have; leave share out"
            )
        bound = float("inf") if self.policy == "window" else 1
        if self.share is not None and not 0 <= self.share < bound:
            raise InputError(f"share of policy={self.policy} must lie in [0, {bound:g}), not {self.share:g}")
        if self.keep_share > 1:
            raise InputError(f"keep_share is a share of a class in [0, 1], not {self.keep_share:g}")

    @property
    def active(self) -> bool:
        """Whether anything is pruned."""
        return self.policy != "none"

    @property
    def uses_scores(self) -> bool:
        """Whether the policy goes by difficulty."""
        return self.policy not in ("none", "random")
