"""Which classes are clustered at once on an accelerator, and what happens when they do not fit."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
from models import tiny_kl

from dq.cluster.kmeans import kmeans_many
from dq.cluster.lloyd import peak_bytes
from dq.cluster.prototypes import Prototypes
from dq.config.reader import from_dict
from dq.config.schema import ClusterConfig, RunConfig
from dq.core import memory
from dq.run.folder import Run, open_run
from dq.run.stages import cluster as stage
from dq.run.stages.encode import cache_of, encode


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_limits", {})
    monkeypatch.setattr(memory, "_fitted", {})


def clustered(out: Path, source, accelerator) -> list[Prototypes]:
    data = {"output_dir": str(out), "cache_dir": str(out / "cache"), "codec": {"resolution": 8}, "ipc": [2]}
    run: Run = open_run(from_dict(RunConfig, data), source, accelerator)
    encode(run, tiny_kl())
    stage.cluster(run, cache_of(run))
    return list(stage.load_prototypes(run, cache_of(run), 2, run.resolved(next(iter(run.config.methods)))))


def test_groups_fill_the_budget_and_no_more() -> None:
    classes = [(0, 100), (1, 100), (2, 100), (3, 50), (4, 300), (5, 10)]
    three = 3 * peak_bytes(100, 64)
    assert list(stage.groups(classes, 64, three)) == [[0, 1, 2], [3], [4], [5]]  # 4 is padded to 300
    assert list(stage.groups(classes, 64, 0)) == [[c] for c, _ in classes]
    assert list(stage.groups(classes, 0, 0)) == [[c] for c, _ in classes]
    assert list(stage.groups(classes, 64, 6 * peak_bytes(300, 64))) == [[0, 1, 2, 3, 4, 5]]
    assert list(stage.groups([], 64, three)) == []


def test_the_budget_does_not_depend_on_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for free in (1 << 30, 9 << 30):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 << 30))
        assert stage.group_budget(cuda) == 5 << 30
    assert stage.group_budget(torch.device("cpu")) == 0


def test_classes_go_one_at_a_time_without_a_budget(tmp_path: Path, toy_source, accelerator, monkeypatch) -> None:
    sizes = []

    def counted(xs, *args, **kwargs):
        sizes.append(len(xs))
        return kmeans_many(xs, *args, **kwargs)

    monkeypatch.setattr(stage, "kmeans_many", counted)
    clustered(tmp_path, toy_source, accelerator)
    assert sizes == [1, 1, 1]


@pytest.mark.parametrize("at_most", [1, 2])
def test_classes_that_do_not_fit_together_are_clustered_in_halves(
    at_most: int, tmp_path: Path, toy_source, accelerator, monkeypatch, caplog
) -> None:
    alone = clustered(tmp_path / "alone", toy_source, accelerator)
    sizes = []

    def limited(xs, *args, **kwargs):
        sizes.append(len(xs))
        if len(xs) > at_most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return kmeans_many(xs, *args, **kwargs)

    monkeypatch.setattr(stage, "kmeans_many", limited)
    monkeypatch.setattr(stage, "group_budget", lambda device: 1 << 40)
    with caplog.at_level(logging.WARNING, "dq"):
        together = clustered(tmp_path / "together", toy_source, accelerator)
    assert sizes == [3, 1, 1, 1]  # halves of 3 are 1
    assert "a batch of 3 does not fit in memory; going on with 1" in caplog.text
    for a, b in zip(alone, together, strict=True):
        assert (a.label, a.name, a.stats) == (b.label, b.name, b.stats)
        assert torch.equal(a.centroids, b.centroids)
        assert torch.equal(a.medoid_rows, b.medoid_rows)


@pytest.mark.parametrize(("n", "d", "k"), [(500, 16, 10), (500, 128, 10), (500, 129, 50), (300, 1024, 10)])
def test_the_peak_of_k_means_is_within_its_bound(n: int, d: int, k: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, d, generator=g) for _ in range(10)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            kmeans_many(xs, k, config=ClusterConfig(engine="torch", tol=0.0))
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, most = 0, 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    points = sum(x.nbytes for x in xs)
    assert 2 * points < most + points < 10 * peak_bytes(n, d)
