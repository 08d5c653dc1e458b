"""The table of methods of refinement."""

from __future__ import annotations

from dq.config.refinement import RefineConfig
from dq.core.errors import InputError
from dq.refine.distribution_matching import DistributionMethod
from dq.refine.fadrm import FadrmMethod
from dq.refine.frepo import FrepoMethod
from dq.refine.gradient_matching import GradientMethod
from dq.refine.method import Method
from dq.refine.spectral_matching import SpectralMethod
from dq.refine.teddy import TeddyMethod
from dq.refine.trajectory import TrajectoryMethod

METHODS: dict[str, Method] = {
    "fadrm": FadrmMethod(),
    "teddy": TeddyMethod(),
    "frepo": FrepoMethod(),
    "trajectory": TrajectoryMethod(),
    "gradient": GradientMethod(),
    "distribution": DistributionMethod(),
    "spectral": SpectralMethod(),
}


def method_of(stage: RefineConfig) -> Method:
    """The method of a stage's settings.

    Raises:
        InputError: if there is none of this name.
    """
    if stage.stage not in METHODS:
        raise InputError(f"there is no method of refinement {stage.stage!r}; choose one of {', '.join(METHODS)}")
    return METHODS[stage.stage]
