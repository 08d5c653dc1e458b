"""dq: dataset distillation by optimal quantization in the latent space of a diffusion model.

`import dq` costs torch and nothing heavier; public names are loaded on first use.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if "torch" not in sys.modules:
    # OpenMP reads it when torch is imported. Its threads would else spin while they wait, which takes the cores from
    # any other process and, once the machine is busy, from one another.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch as torch

from dq.core.version import __version__ as __version__

_HOME = {
    "LatentGenerator": "dq.diffusion.generator",
    "MethodConfig": "dq.config.schema",
    "GenerateConfig": "dq.config.schema",
    "ClusterConfig": "dq.config.schema",
    "PruneConfig": "dq.config.pruning",
    "FADRM": "dq.config.refinement",
    "FRePo": "dq.config.refinement",
    "Trajectory": "dq.config.trajectories",
    "Teddy": "dq.config.refinement",
    "DistillPipeline": "dq.run.distill",
    "DistilledSet": "dq.distilled.set",
    "ImageSource": "dq.data.source",
    "InputError": "dq.core.errors",
    "Prototypes": "dq.cluster.prototypes",
    "RunConfig": "dq.config.schema",
    "RunError": "dq.core.errors",
    "StudentConfig": "dq.config.students",
    "TeacherConfig": "dq.config.teachers",
    "evaluate": "dq.evaluation.evaluate",
    "image_weights": "dq.cluster.prototypes",
    "kmeans": "dq.cluster.kmeans",
    "load_config": "dq.config.schema",
    "load_source": "dq.data.load",
    "list_protocols": "dq.config.protocols",
    "pull": "dq.run.share",
    "push_folder": "dq.distilled.hub",
    "push_model": "dq.run.share",
    "load_set": "dq.distilled.external",
    "select": "dq.evaluation.baselines",
    "student_config": "dq.config.protocols",
}

if TYPE_CHECKING:
    from dq.cluster.kmeans import kmeans
    from dq.cluster.prototypes import Prototypes, image_weights
    from dq.config.protocols import list_protocols, student_config
    from dq.config.pruning import PruneConfig
    from dq.config.refinement import FADRM, FRePo, Teddy
    from dq.config.schema import ClusterConfig, GenerateConfig, MethodConfig, RunConfig, load_config
    from dq.config.students import StudentConfig
    from dq.config.teachers import TeacherConfig
    from dq.config.trajectories import Trajectory
    from dq.core.errors import InputError, RunError
    from dq.data.load import load_source
    from dq.data.source import ImageSource
    from dq.diffusion.generator import LatentGenerator
    from dq.distilled.external import load_set
    from dq.distilled.hub import push_folder
    from dq.distilled.set import DistilledSet
    from dq.evaluation.baselines import select
    from dq.evaluation.evaluate import evaluate
    from dq.run.distill import DistillPipeline
    from dq.run.share import pull, push_model


__all__ = [
    "FADRM",
    "ClusterConfig",
    "DistillPipeline",
    "DistilledSet",
    "FRePo",
    "GenerateConfig",
    "ImageSource",
    "InputError",
    "LatentGenerator",
    "MethodConfig",
    "Prototypes",
    "PruneConfig",
    "RunConfig",
    "RunError",
    "StudentConfig",
    "TeacherConfig",
    "Teddy",
    "Trajectory",
    "evaluate",
    "image_weights",
    "kmeans",
    "list_protocols",
    "load_config",
    "load_set",
    "load_source",
    "pull",
    "push_folder",
    "push_model",
    "select",
    "student_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
