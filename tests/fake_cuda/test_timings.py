"""Speeds of a dry run on the device: what is timed is what a run does there."""

from __future__ import annotations

import torch
from models import toy_splits

from dq.config.schema import ClusterConfig, RunConfig, SourceConfig
from dq.data.load import load_source
from dq.run.planning.timings import _clustering


def test_clustering_is_timed_with_as_many_classes_at_once_as_a_run_clusters() -> None:
    source = load_source(toy_splits(), class_names=["red", "green", "blue"])
    for device, classes in ((torch.device("cuda"), 2), (torch.device("cpu"), 1)):
        config = RunConfig(ipc=(2,), cluster=ClusterConfig(engine="torch"), source=SourceConfig(path="toy"))
        ((_, speed),) = _clustering(config, source, (2, 2, 2), device)
        assert speed.batch >= 9 * classes  # the largest class has 9 images; slow machines stop at two classes
        assert 0 < speed.least <= speed.seconds <= speed.most
