"""dq: dataset distillation by optimal quantization in the latent space of a diffusion model.

Public names are listed in `__init__.pyi` and loaded on first use, so that `import dq` loads no other library.
"""

import os
import sys

import lazy_loader

from dq.core.version import __version__ as __version__

if "torch" not in sys.modules:
    # OpenMP reads it when torch is imported. Its threads would else spin while they wait, which takes the cores from
    # any other process and, once the machine is busy, from one another.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
