"""Settings of the methods that compare a set with real images on freshly drawn networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dq.config.refinement import RefineConfig
from dq.config.students import Dtype
from dq.core.errors import InputError


@dataclass(frozen=True)
class Condensation(RefineConfig):
    """What these methods share. The whole set is one batch; labels stay what they are."""

    net: str = "convnet3"  # of instance norm
    # latent: latents of the run's codec are learned, and images are decoded; in none of the papers
    mode: Literal["pixel", "latent"] = "pixel"
    chunk: int | None = None  # mode=latent: images whose activations in the decoder are held at once; None: all
    lr: float = 1.0  # of the images, or of the latents, SGD
    momentum: float = 0.5
    real_batch: int = 256  # real images of a class in a step
    # drawn: the images that come in; real: as many random train images of each class (the papers); noise
    start: Literal["drawn", "real", "noise"] = "drawn"
    augment: Literal["dsa", "none"] = "dsa"  # the same draw for real and learned images of a class
    # times, evenly spread, that networks trained on the set are tested on held-out train images, the best set being
    # returned; 0: the last one. The released code chooses on the test split
    checks: int = 0
    check_nets: int = 2
    check_epochs: int = 300
    held_out: float = 0.05  # share of train for checks, at most 0.2, which is not compared then
    compose: Literal["index", "dealt", "rank", "whole"] = "whole"
    dtype: Dtype = "float32"  # of the networks; nothing else is allowed

    def unread(self) -> tuple[str, ...]:
        no_checks = self.checks == 0
        return (*("chunk",) * (self.mode == "pixel"), *("check_nets", "check_epochs", "held_out") * no_checks)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checks < 0 or self.check_nets < 1 or self.check_epochs < 1 or not 0 < self.held_out <= 0.2:
            raise InputError(
                f"{self.stage} needs checks >= 0, check_nets and check_epochs >= 1 and a share held_out of at most 0.2"
            )
        if self.compose != "whole":
            raise InputError(f"{self.stage} refines the whole set at once: set compose=whole, not {self.compose}")
        if self.dtype != "float32":
            raise InputError(f"{self.stage} works in float32: leave out dtype={self.dtype}")
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"chunk of {self.stage} must be at least 1, not {self.chunk}")
        if self.real_batch < 1 or not self.momentum < 1:
            raise InputError(
                f"{self.stage} needs real_batch of at least 1 and momentum below 1, not {self.real_batch} and "
                f"{self.momentum:g}"
            )


@dataclass(frozen=True)
class DistributionMatching(Condensation):
    """Distribution matching (DM, Zhao and Bilen, WACV 2023)."""

    stage: Literal["distribution"] = "distribution"
    steps: int = 20_000
    # None: the last embedding alone, as published. A share in [0, 1): the outputs of all pooled blocks but the first
    # int(alpha L) of L (PAD's second filter, whose paper does not say which layers its own DM compares)
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not 0 <= self.alpha < 1:
            raise InputError(f"alpha is a share of the layers in [0, 1), not {self.alpha:g}")


@dataclass(frozen=True)
class SpectralMatching(Condensation):
    """Neural characteristic function matching (NCFM, Wang et al., CVPR 2025), with the released settings of CIFAR-10
    where the methods of this file do not share one."""

    stage: Literal["spectral"] = "spectral"
    lr: float = 0.1
    steps: int = 20_000
    real_batch: int = 1024
    frequencies: int = 4096  # points t at which characteristic functions are compared in a step
    amplitude: float = 0.5  # weight of the difference of amplitudes (alpha), which is about diversity
    phase: float = 0.5  # weight of the difference of phases (beta), which is about realism
    # gaussian: t is standard normal; network: t comes from a small network that is trained to enlarge the loss
    sampler: Literal["gaussian", "network"] = "gaussian"
    sampler_lr: float = 1e-3  # SGD, with the momentum of the images
    # folder of `dq train-experts`: networks are random points between the first and the last parameters of an expert,
    # as published, with the experts' preprocessing; None: freshly drawn ones, as distribution matching has them
    experts: str | None = None

    def unread(self) -> tuple[str, ...]:
        held_out = ("held_out",) if self.experts and self.checks else ()
        return (*super().unread(), *held_out, *("sampler_lr",) * (self.sampler == "gaussian"))

    def paths(self) -> dict[str, str]:
        return {} if self.experts is None else {"experts": str(Path(self.experts) / "experts.json")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frequencies < 1 or min(self.amplitude, self.phase) < 0 or self.amplitude + self.phase == 0:
            raise InputError(
                "spectral needs frequencies of at least 1 and weights amplitude and phase of at least 0, not both 0: "
                f"not {self.frequencies}, {self.amplitude:g} and {self.phase:g}"
            )
        if self.sampler == "network" and self.frequencies < 2:
            raise InputError("sampler=network standardizes over frequencies: set frequencies to at least 2")


# passes over the classes for a drawn network, and epochs of the network on the set between two of them, by the images
# per class from which these hold (DC's and DSA's code; numbers between are those of the one below)
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


@dataclass(frozen=True)
class GradientMatching(Condensation):
    """Gradient matching (DC, Zhao et al., ICLR 2021; DSA, Zhao and Bilen, ICML 2021, with `augment: dsa`)."""

    stage: Literal["gradient"] = "gradient"
    lr: float = 0.1
    networks: int = 1000  # that are drawn, one after another
    passes: int | None = None  # updates of the images for a network; None: the published ones by ipc
    net_epochs: int | None = None  # of the network on the set between two of them; likewise
    net_lr: float = 0.01  # SGD
    net_batch: int = 256
    alpha: float = (
        0.0  # share of the parameters, the shallowest, whose gradients are not compared (PAD's second filter)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < 1:
            raise InputError(f"alpha is a share of the parameters in [0, 1), not {self.alpha:g}")
        for name, low in (("networks", 0), ("passes", 1), ("net_epochs", 0), ("net_batch", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"{name} of gradient must be at least {low}, not {value}")
