"""Settings of the methods that compare a set with real images on freshly drawn networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dq.config.kinds import Auto, Count, NonNegative, Off, PathText, Preset, ShareBelowOne, Whole
from dq.config.refinement import RefineConfig
from dq.config.validation import settings
from dq.core.errors import InputError


@settings
class Condensation(RefineConfig):
    """What these methods share. The whole set is one batch; labels stay what they are."""

    net: Annotated[str, Field(description="network, of instance norm")] = "convnet3"
    # latent: in none of the papers
    mode: Annotated[
        Literal["pixel", "latent"], Field(description="what is learned: pixels, or latents of the run's codec")
    ] = "pixel"
    chunk: Annotated[
        Off[Count],
        Field(description="mode=latent: images whose activations in the decoder are held at once; off: all"),
    ] = None
    lr: Annotated[NonNegative, Field(description="learning rate of the images, or of the latents, SGD")] = 1.0
    momentum: Annotated[ShareBelowOne, Field(description="momentum of the images")] = 0.5
    real_batch: Annotated[Count, Field(description="real images of a class in a step")] = 256
    # real: the papers
    start: Annotated[
        Literal["drawn", "real", "noise"],
        Field(description="first images: those that come in, as many random train images of each class, or noise"),
    ] = "drawn"
    augment: Annotated[
        Literal["dsa", "none"],
        Field(description="augmentation, with the same draw for real and learned images of a class"),
    ] = "dsa"
    # the released code chooses on the test split
    checks: Annotated[
        Whole,
        Field(description="times that the set is tested on held-out train images, to keep the best; 0: the last"),
    ] = 0
    check_nets: Annotated[Count, Field(description="networks of a check")] = 2
    check_epochs: Annotated[Count, Field(description="epochs of a network of a check")] = 300
    held_out: Annotated[float, Field(gt=0, le=0.2, description="share of train for checks, which is not compared")] = (
        0.05
    )
    compose: Annotated[Literal["whole"], Field(description="images of a batch: the whole set")] = "whole"
    dtype: Annotated[Literal["float32"], Field(description="dtype of the networks")] = "float32"

    def unread(self) -> tuple[str, ...]:
        no_checks = self.checks == 0
        return (*("chunk",) * (self.mode == "pixel"), *("check_nets", "check_epochs", "held_out") * no_checks)


@settings
class DistributionMatching(Condensation):
    """Distribution matching (DM, Zhao and Bilen, WACV 2023)."""

    stage: Annotated[Literal["distribution"], Field(description="method of refinement")] = "distribution"
    # an image moves the mean of its class by its share, so that its gradient falls with their number
    lr: Annotated[
        Auto[NonNegative],
        Field(description="learning rate of the images, or of the latents, SGD; auto: the images of a class"),
    ] = 1.0  # type: ignore[assignment]  # a number in the other methods
    steps: Annotated[Whole, Field(description="updates of the set")] = 20_000
    # A share: the outputs of all pooled blocks but the first int(alpha L) of L (PAD's second filter, whose paper does
    # not say which layers its own DM compares)
    alpha: Annotated[
        Off[ShareBelowOne],
        Field(description="share of the blocks, the first, that are not compared; off: the last embedding alone"),
    ] = None


@settings
class SpectralMatching(Condensation):
    """Neural characteristic function matching (NCFM, Wang et al., CVPR 2025).

    Defaults are the released settings of CIFAR-10 where the methods of this file do not share one.
    """

    stage: Annotated[Literal["spectral"], Field(description="method of refinement")] = "spectral"
    lr: Annotated[NonNegative, Field(description="learning rate of the images, or of the latents, SGD")] = 0.1
    steps: Annotated[Whole, Field(description="updates of the set")] = 20_000
    real_batch: Annotated[Count, Field(description="real images of a class in a step")] = 1024
    frequencies: Annotated[
        Count, Field(description="points t at which characteristic functions are compared in a step")
    ] = 4096
    amplitude: Annotated[NonNegative, Field(description="weight of the difference of amplitudes: diversity")] = 0.5
    phase: Annotated[NonNegative, Field(description="weight of the difference of phases: realism")] = 0.5
    sampler: Annotated[
        Literal["gaussian", "network"],
        Field(description="t is standard normal, or comes from a small network trained to enlarge the loss"),
    ] = "gaussian"
    sampler_lr: Annotated[
        NonNegative, Field(description="learning rate of that network, SGD with the momentum of the images")
    ] = 1e-3
    # networks are random points between the first and the last parameters of an expert, as published, with the
    # experts' preprocessing
    experts: Annotated[
        Off[PathText], Field(description="folder of `dq train-experts` to draw networks from; off: fresh networks")
    ] = None

    def unread(self) -> tuple[str, ...]:
        held_out = ("held_out",) if self.experts and self.checks else ()
        return (*super().unread(), *held_out, *("sampler_lr",) * (self.sampler == "gaussian"))

    def paths(self) -> dict[str, str]:
        return {} if self.experts is None else {"experts": str(Path(self.experts) / "experts.json")}

    @model_validator(mode="after")
    def _check_spectral(self) -> Self:
        if self.amplitude + self.phase == 0:
            raise InputError("amplitude and phase are both 0, which leaves nothing to compare: set one above 0")
        if self.sampler == "network" and self.frequencies < 2:
            raise InputError("sampler=network standardizes over frequencies: set frequencies to at least 2")
        return self


# passes over the classes for a drawn network, and epochs of the network on the set between two of them, by the images
# per class from which these hold (DC's and DSA's code; numbers between are those of the one below)
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


@settings
class GradientMatching(Condensation):
    """Gradient matching (DC, Zhao et al., ICLR 2021).

    With `augment: dsa` it is DSA (Zhao and Bilen, ICML 2021).
    """

    stage: Annotated[Literal["gradient"], Field(description="method of refinement")] = "gradient"
    lr: Annotated[NonNegative, Field(description="learning rate of the images, or of the latents, SGD")] = 0.1
    networks: Annotated[Whole, Field(description="networks that are drawn, one after another")] = 1000
    passes: Annotated[
        Preset[Count], Field(description="updates of the images for a network; preset: the published ones by ipc")
    ] = None
    net_epochs: Annotated[
        Preset[Whole], Field(description="epochs of the network on the set between two updates; preset: by ipc")
    ] = None
    net_lr: Annotated[NonNegative, Field(description="learning rate of the network, SGD")] = 0.01
    net_batch: Annotated[Count, Field(description="images of a training step of the network")] = 256
    # PAD's second filter
    alpha: Annotated[
        ShareBelowOne,
        Field(description="share of the parameters, the shallowest, whose gradients are not compared"),
    ] = 0.0
