"""Settings of difficulty scores and of the pruning of train images by them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dq.config.kinds import Auto, Count, NonNegative, PathText, Positive, Share
from dq.config.students import Dtype
from dq.config.validation import Checked, settings
from dq.core.errors import InputError

Score = Literal["el2n", "grand_last", "forgetting", "uncertainty", "loss", "cad"]
Policy = Literal["none", "pad", "hard", "easy", "window", "random", "reversed"]
# `share: auto`: the shares at which trajectory and gradient matching did best in PAD's plots, and SelMatch's least
# beta
DEFAULT_SHARES = {"hard": 0.2, "easy": 0.1, "window": 0.2}


@settings
class DifficultyConfig(Checked):
    """Difficulty scores of train images (PAD, arXiv 2408.03360).

    They come from short runs of an agent network.

    PAD says neither which network nor which epoch nor how many runs it averaged. These are the recommendations of Data
    Diet (arXiv 2107.07075) for EL2N, on PAD's agent network.
    """

    score: Annotated[Score, Field(description="measure of difficulty")] = "el2n"
    net: Annotated[str, Field(description="agent network whose training gives the scores")] = "convnet3"
    runs: Annotated[Count, Field(description="trainings whose scores are averaged")] = 10
    epochs: Annotated[Count, Field(description="epochs of the training of which a run is the beginning")] = 100
    score_epoch: Annotated[
        Auto[Count], Field(description="epoch after which scores are taken; auto: a tenth of epochs, at least 1")
    ] = None
    cad_window: Annotated[
        int, Field(ge=2, description="cad: epochs of a window; fewer where a run has no two windows of this length")
    ] = 6
    batch_size: Annotated[Count, Field(description="images of a training step")] = 256
    lr: Annotated[NonNegative, Field(description="learning rate of SGD")] = 0.01
    momentum: Annotated[NonNegative, Field(description="momentum of SGD")] = 0.9
    weight_decay: Annotated[NonNegative, Field(description="weight decay")] = 5e-4
    augment: Annotated[
        Literal["dsa", "crop_flip", "none"], Field(description="augmentation in training; scores are taken without")
    ] = "crop_flip"
    # not the run's own, so that all runs share the scores
    seed: Annotated[int, Field(description="seed of the trainings, apart from the seed of the run")] = 0
    path: Annotated[
        Auto[PathText],
        Field(description="folder of finished scores (difficulty-<digest>); auto: by these settings in cache_dir"),
    ] = None
    dtype: Annotated[Dtype, Field(description="dtype of the trainings; auto: what the device is fast in")] = "auto"

    @model_validator(mode="after")
    def _check_scores(self) -> Self:
        if self.score_epoch is not None and self.score_epoch > self.epochs:
            raise InputError(f"score_epoch={self.score_epoch} comes after the last of {self.epochs} epochs; lower it")
        if self.score == "cad" and self.trained_epochs < 2:
            raise InputError(
                f"score=cad is a deviation over epochs and a run has {self.trained_epochs}; set score_epoch to 2 or "
                "more"
            )
        return self

    @property
    def trained_epochs(self) -> int:
        """Epochs of a run."""
        return self.score_epoch or max(1, round(0.1 * self.epochs))


@settings
class PruneConfig(DifficultyConfig):
    """Which images of a class the clusters are made from, by their difficulty; see `dq.data.pruning`."""

    policy: Annotated[Policy, Field(description="which images of a class are left out before it is clustered")] = (
        "none"
    )
    share: Annotated[
        Auto[NonNegative],
        Field(description="hard, easy: share of a class that is left out, auto: 0.2, 0.1; window: beta, auto: 0.2"),
    ] = None
    where: Annotated[
        Literal["filter", "weight", "cluster"],
        Field(description="left-out images are not clustered (filter), weigh less, or whole clusters are left out"),
    ] = "filter"
    outside_weight: Annotated[Positive, Field(description="weight: of a left-out image, others having 1")] = 0.25
    keep_per_ipc: Annotated[
        NonNegative, Field(description="images of a class that are kept at least for each of the ipc")
    ] = 10.0
    keep_share: Annotated[Share, Field(description="share of a class that is kept at least")] = 0.5

    @model_validator(mode="after")
    def _check_policy(self) -> Self:
        if self.share is not None and self.policy not in DEFAULT_SHARES:
            raise InputError(
                f"policy={self.policy} has no share, which {', '.join(DEFAULT_SHARES)} have; leave share out"
            )
        if self.share is not None and self.policy != "window" and self.share >= 1:
            raise InputError(f"share of policy={self.policy} must be a number in [0, 1), not {self.share:g}")
        return self

    @property
    def active(self) -> bool:
        """Whether anything is pruned."""
        return self.policy != "none"

    @property
    def uses_scores(self) -> bool:
        """Whether the policy goes by difficulty."""
        return self.policy not in ("none", "random")
