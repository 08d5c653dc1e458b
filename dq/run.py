"""The stages of a run over a run folder: encode, refine, label, assemble. Cluster is in `dq.run.stages.cluster`, generate in
`dq.run.stages.generate`, evaluate in `dq.evaluation`.

Every stage divides its units of work over processes, writes one file per unit, skips units whose file is there, and
meets the other processes only at its end. A unit's folder is named by a digest of everything that decides its content,
so results of other settings are never taken for this one's.
"""

from __future__ import annotations

import logging

from torch import Tensor

from dq.run.folder import Run, copies_of
from dq.run.stages.cluster import cluster, load_prototypes
from dq.run.stages.encode import cache_of
from dq.run.stages.generate import drawn_folders, generate
from dq.run.stages.refine import refine as refine_drawn

log = logging.getLogger("dq")

__all__ = ["assemble", "cluster", "encode", "generate", "label", "load_set", "refine"]


# --- refine -------------------------------------------------------------------------------------------------------


def refine(run: Run) -> None:
    """Put the drawn images of every method through its stages (`refine`), in their order."""
    cache = cache_of(run)

    def weights_of(ipc: int, method: str) -> dict[int, Tensor]:
        m, cluster_config, cfg = run.resolved(method)
        copies = copies_of(m, cfg)
        points = load_prototypes(run, cache, ipc, cluster_config)
        return {p.label: p.weights(m.weights, m.normalize).repeat_interleave(copies, 0) for p in points}

    refine_drawn(run, drawn_folders(run, cache), weights_of)
