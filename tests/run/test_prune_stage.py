"""Pruning in a run: what is clustered, under which folder, and what is refused before anything is made."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_kl

from dq.cli.parser import build_parser
from dq.cluster.kmeans import kmeans
from dq.cluster.prototypes import Prototypes
from dq.config.pruning import PruneConfig
from dq.config.reader import from_dict
from dq.config.schema import ClusterConfig, RunConfig
from dq.core.errors import InputError
from dq.data.load import load_source
from dq.networks.difficulty import find_difficulty
from dq.run.checks import check_settings
from dq.run.distill import DistillPipeline
from dq.run.folder import Run, open_run
from dq.run.planning.costs import agent_operation, stage_plans
from dq.run.planning.plan import plan
from dq.run.stages import cluster as stage
from dq.run.stages.encode import cache_of, encode
from dq.run.stages.prune import Pruning, check_pruning, prune, scored_settings

SCORES = {"runs": 2, "score_epoch": 2, "batch_size": 8, "lr": 0.02, "augment": "none", "dtype": "float32"}
METHODS = {
    "plain": {},
    "kept": {"override": {"prune.policy": "hard", "prune.share": 0.3}},
    "weighed": {"override": {"prune": {"policy": "hard", "share": 0.3, "where": "weight"}}},
    "dropped": {"override": {"prune.policy": "hard", "prune.share": 0.3, "prune.where": "cluster"}},
    "drawn": {"override": {"prune.policy": "random"}},
}


def settings(out: Path, **changes: Any) -> RunConfig:
    data = {
        "output_dir": str(out),
        "cache_dir": str(out.parent / "cache"),
        "codec": {"resolution": 8, "dtype": "float32"},
        "ipc": [2],
        "prune": {**SCORES, "keep_per_ipc": 1},
        "methods": METHODS,
        "cluster": {"n_init": 5, "tol": 0.0},
        **changes,
    }
    return from_dict(RunConfig, data)


def opened(out: Path, source: Any, accelerator: Any, **changes: Any) -> Run:
    return open_run(settings(out, **changes), source, accelerator)


def clustered(run: Run) -> dict[str, list[Prototypes]]:
    encode(run, tiny_kl())
    prune(run)
    stage.cluster(run, cache_of(run))
    return {m: list(stage.load_prototypes(run, cache_of(run), 2, run.resolved(m))) for m in run.config.methods}


@pytest.fixture(scope="module")
def done(tmp_path_factory, toy_source, accelerator) -> tuple[Run, dict[str, list[Prototypes]]]:
    run = opened(tmp_path_factory.mktemp("pruned") / "run", toy_source, accelerator)
    return run, clustered(run)


def orders(run: Run) -> list[torch.Tensor]:
    p = run.resolved("kept").prune
    return find_difficulty(run.config.cache_dir, run.source, 8, p).orders(run.source, "el2n", 2)


def test_hard_images_are_not_clustered(done) -> None:
    run, by_method = done
    for p, order in zip(by_method["kept"], orders(run), strict=True):
        kept = len(order) - int(0.3 * len(order))
        assert p.counts.sum() == p.stats["kept_images"] == kept
        assert p.stats["class_images"] == len(order)
        assert set(p.medoid_rows.tolist()) <= set(order[:kept].tolist())
        z, rows = cache_of(run).load(p.label)
        mean = z[torch.isin(rows, order[:kept])].float().mean(0)
        shares = (p.counts / p.counts.sum()).view(-1, 1, 1, 1)
        assert torch.allclose((p.centroids * shares).sum(0), mean, atol=1e-4)
    assert all(p.counts.sum() == n for p, n in zip(by_method["plain"], run.source.class_counts(), strict=True))
    assert "policy" not in by_method["plain"][0].stats


def test_weights_are_repeated_images(done) -> None:
    run, by_method = done
    for p, order in zip(by_method["weighed"], orders(run), strict=True):
        kept = len(order) - int(0.3 * len(order))
        z, rows = cache_of(run).load(p.label)
        inside = torch.isin(rows, order[:kept])
        repeated = z.float().flatten(1).repeat_interleave(torch.where(inside, 4, 1), 0)
        assert p.masses is not None
        assert p.masses.sum() == pytest.approx(kept + 0.25 * (len(order) - kept))
        assert p.counts.sum() == len(order)
        mean = repeated.mean(0)
        shares = p.masses / p.masses.sum()
        assert torch.allclose((p.centroids.flatten(1) * shares[:, None]).sum(0).float(), mean, atol=1e-4)
        best = min(kmeans(repeated, 2, config=ClusterConfig(tol=0.0), seed=s).inertia for s in range(10))
        assert p.stats["distortion"] == pytest.approx(best / len(repeated), rel=1e-3)
        assert torch.allclose(p.weights("mass"), (2 * shares).float())


def test_the_hardest_clusters_are_dropped_and_ipc_are_left(done) -> None:
    run, by_method = done
    for p, order in zip(by_method["dropped"], orders(run), strict=True):
        n = len(order)
        k = math.ceil(2 * n / (n - int(0.3 * n)))
        assert k == 3
        assert len(p.counts) == 2
        assert 0 < p.counts.sum() < n
        z, rows = cache_of(run).load(p.label)
        result = kmeans(
            z.flatten(1),
            k,
            config=run.config.cluster,
            seed=stage.derive_seed(0, "cluster", 2, p.label),
            name="the class",
        )
        ranks = torch.empty(len(run.source.train))
        ranks[order] = torch.arange(n).float()
        means = torch.stack([ranks[rows[result.labels == c]].mean() for c in range(k)])
        left = means.argsort()[:2].sort().values
        assert torch.allclose(p.centroids.flatten(1), result.centroids[left], atol=1e-5)
        assert torch.equal(p.counts, result.counts[left])


def test_a_random_policy_needs_no_scores(tmp_path: Path, toy_source, accelerator) -> None:
    run = opened(tmp_path / "run", toy_source, accelerator, methods={"drawn": METHODS["drawn"]})
    by_method = clustered(run)["drawn"]
    assert not list(tmp_path.glob("cache/difficulty-*"))
    # ipc 2 of 7 to 9 images is far above 10 %; the floor of half the class stays away
    assert [p.stats["kept_images"] for p in by_method] == [n - int(0.1 * n) for n in run.source.class_counts()]


def test_the_same_call_again_does_nothing_and_another_policy_clusters_anew(done, toy_source, accelerator) -> None:
    run, _ = done
    files = sorted(
        [*run.folder.glob("prototypes/*/*.safetensors"), *Path(run.config.cache_dir).rglob("*.safetensors")]
    )
    before = [(f, f.stat().st_mtime_ns) for f in files]
    clustered(opened(run.folder, toy_source, accelerator))
    assert [(f, f.stat().st_mtime_ns) for f in files] == before
    folder = stage.prototype_folder(run, cache_of(run), 2, run.resolved("kept"))
    changed = {"kept": {"override": {"prune.policy": "easy", "prune.share": 0.3}}}
    other = opened(run.folder, toy_source, accelerator, methods=changed)
    assert stage.prototype_folder(other, cache_of(other), 2, other.resolved("kept")) != folder
    with pytest.raises(InputError, match=r"no prototypes for ipc 2; .*`dq cluster`"):
        stage.load_prototypes(other, cache_of(other), 2, other.resolved("kept"))
    by_method = clustered(other)["kept"]
    for p, order in zip(by_method, orders(other), strict=True):
        assert set(p.medoid_rows.tolist()) <= set(order[int(0.3 * len(order)) :].tolist())
    assert [(f, f.stat().st_mtime_ns) for f in files] == before  # the others are still there


@pytest.mark.parametrize("changes", [{"runs": 1}, {"score": "loss"}, {"seed": 1}, {"keep_share": 0.9}])
def test_scores_and_floors_are_part_of_the_identity(done, changes: dict, toy_source, accelerator) -> None:
    run, _ = done
    other = dataclasses.replace(run, config=settings(run.folder, prune={**SCORES, "keep_per_ipc": 1, **changes}))
    for method, same in (("plain", True), ("kept", False), ("drawn", "keep_share" not in changes)):
        folders = [stage.prototype_folder(r, cache_of(r), 2, r.resolved(method)) for r in (run, other)]
        assert (folders[0] == folders[1]) == same


def test_what_is_kept_is_written(done) -> None:
    run, by_method = done
    with open(run.folder / "pruning.csv") as f:
        rows = list(csv.DictReader(f))
    kept = {(r["policy"], int(r["class"])): int(r["kept"]) for r in rows}
    for p in by_method["kept"]:
        assert kept["method kept", p.label] == p.stats["kept_images"]
        assert kept["none", p.label] == p.stats["class_images"]
        assert kept["random", p.label] == kept["reversed", p.label] == kept["pad", p.label]


def test_clusters_without_scores_are_refused(tmp_path: Path, toy_source, accelerator) -> None:
    run = opened(tmp_path / "run", toy_source, accelerator)
    encode(run, tiny_kl())
    with pytest.raises(InputError, match=r"lacks 2 of 2 runs .*`dq prune`"):
        stage.cluster(run, cache_of(run))


def test_an_image_without_a_score_is_named() -> None:
    scores = torch.tensor([0.1, torch.nan, 0.3])
    pruning = Pruning(PruneConfig(policy="pad"), scores, 0, "cache/difficulty-1")
    with pytest.raises(InputError, match=r"row 1 of train .*score; delete cache/diff"):
        pruning.of_class(0, torch.arange(3), 1)


POLICIES = ("none", "pad", "hard", "easy", "window", "random", "reversed")


@pytest.mark.parametrize("where", ["filter", "weight", "cluster"])
def test_a_class_of_one_image_goes_through_every_policy(where: str, tmp_path: Path, toy_images, accelerator) -> None:
    images, labels = toy_images["train"]
    rows = np.concatenate([np.flatnonzero(labels != 2), np.flatnonzero(labels == 2)[:1]])
    source = load_source((images[rows], labels[rows]), class_names=["red", "green", "blue"])
    methods = {f"m-{p}": {"override": {"prune.policy": p, "prune.where": where}} for p in POLICIES}
    prune_settings = {**SCORES, "runs": 1, "score_epoch": 1}
    run = opened(tmp_path / "run", source, accelerator, methods=methods, prune=prune_settings)
    with pytest.warns(UserWarning, match="has only 1 distinct points"):
        by_method = clustered(run)
    assert {m: len(points[2].counts) for m, points in by_method.items()} == dict.fromkeys(methods, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "prune": {"keep_per_ipc": 0, "keep_share": 0},
                "methods": {"x": {"override": {"prune": {"policy": "hard", "share": 0.95}}}},
            },
            r"method 'x' has prune.policy=hard, which leaves 1 of the 9 images of class 0 'red' at ipc=2; "
            r"set prune.keep_per_ipc to 1 or more, or a smaller prune.share",
        ),
        (
            {
                "prune": {"policy": "pad", "where": "weight"},
                "methods": {"x": {"override": {"cluster.engine": "minibatch"}}},
            },
            "cluster.engine=minibatch takes no point weights; set prune.where=filter or another engine",
        ),
        ({"prune": {"net": "convnet99", "policy": "pad"}}, "convnet99"),
        ({"prune": {"policy": "pad", "path": "nowhere"}}, "prune.path=nowhere holds no difficulty scores"),
        ({"methods": {"x": {"override": {"teachers": []}}}}, r"may set prune.\*, cluster.\* and generate.\*, not"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_image(
    changes: dict, message: str, tmp_path: Path, toy_source
) -> None:
    with pytest.raises(InputError, match=message):
        check_settings(settings(tmp_path / "run", **{"methods": {"x": {}}, **changes}), toy_source, "run")
    assert not (tmp_path / "run").exists()


def test_a_policy_that_is_held_back_says_so(tmp_path: Path, toy_source, caplog) -> None:
    methods = {"x": {"override": {"prune.policy": "hard", "prune.share": 0.9}}}
    check_pruning(settings(tmp_path / "run", methods=methods), toy_source)
    assert "prune.policy=hard of method 'x' drops less than it would at ipc 2 in 3 classes" in caplog.text
    assert "where 5 of 9 images stay" in caplog.text


def test_a_pipeline_prunes_and_the_set_says_how(tmp_path: Path, toy_source) -> None:
    pipe = DistillPipeline(tiny_kl())
    options: dict[str, Any] = {
        "ipc": 2,
        "resolution": 8,
        "output_dir": tmp_path / "run",
        "cache_dir": tmp_path / "cache",
        "prune": from_dict(PruneConfig, {**SCORES, "policy": "hard", "share": 0.3, "keep_per_ipc": 1}),
    }
    made = pipe.distill(toy_source, **options)
    assert made.counts.view(3, 2).sum(1).tolist() == [n - int(0.3 * n) for n in toy_source.class_counts()]
    record = made.provenance["prune"]
    assert (record["policy"], record["share"], record["score"], record["runs"]) == ("hard", 0.3, "el2n", 2)
    assert (tmp_path / "cache" / f"difficulty-{record['scores']}" / "order-el2n-2.safetensors").is_file()
    again = pipe.distill(toy_source, **options)
    assert torch.equal(made.images, again.images)
    options["prune"] = dataclasses.replace(options["prune"], policy="easy")
    assert pipe.distill(toy_source, **options).provenance["prune"]["policy"] == "easy"


@pytest.mark.parametrize(("baselines", "runs"), [(["random"], 0), (["window", "forgetting"], 1)])
def test_scores_that_baselines_go_by_are_made_by_the_stage(
    tmp_path: Path, toy_source, accelerator, baselines: list[str], runs: int
) -> None:
    run = opened(tmp_path / "run", toy_source, accelerator, methods={"plain": {}}, evaluate={"baselines": baselines})
    assert len(scored_settings(run.config)) == runs
    assert len(prune(run)) == runs
    assert len(find_difficulty(run.config.cache_dir, toy_source, 8, run.config.prune).missing(2)) == 2 - 2 * runs
    plain = opened(tmp_path / "run", toy_source, accelerator, evaluate={"baselines": baselines, "students": []})
    assert len(scored_settings(plain.config)) == len(
        scored_settings(opened(tmp_path / "run", toy_source, accelerator).config)
    )


def test_the_plan_counts_the_passes_of_the_agents(tmp_path: Path, toy_source) -> None:
    config = settings(tmp_path / "run")
    plans = {p.stage: p for p in stage_plans(config, toy_source, latent=(4, 4, 4), denoiser_steps=None)}
    n = len(toy_source.train)
    agent = agent_operation(config.prune)
    assert plans["prune"].calls == {agent: 4 * n, f"test {agent}": 4 * n}  # two runs of two epochs
    assert plans["prune"].each == {"read": n}
    lines = plan(config, toy_source).splitlines()
    assert "prune       2 runs of convnet3, 2 epochs each, unless the scores are in the cache" in lines
    kept = sum(k - int(0.3 * k) for k in toy_source.class_counts().tolist())
    assert f"prune       method kept ipc 2: hard (filter) keeps {kept} of {n} images" in lines
    unpruned = settings(tmp_path / "run", methods={"plain": {}})
    assert "prune" not in {p.stage for p in stage_plans(unpruned, toy_source, latent=(4, 4, 4), denoiser_steps=None)}


def test_the_help_of_the_verb_has_an_example(capsys) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["prune", "--help"])
    assert "example: dq prune --config" in capsys.readouterr().out
