"""Difficulty scores of train images: their formulas, their orders, and the folder in which they are kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq.config.pruning import DifficultyConfig
from dq.config.reader import from_dict
from dq.config.students import StudentConfig
from dq.core.errors import InputError
from dq.core.seeds import derive_seed, seeded
from dq.data.load import load_source
from dq.networks import difficulty
from dq.networks.difficulty import (
    cad,
    easy_to_hard,
    el2n,
    find_difficulty,
    forgetting,
    grand_last,
    make_difficulty,
    rank_agreement,
)
from dq.networks.training import TrainingSet, accuracy, fit, normalizer
from dq.networks.trajectories import read_orders

CPU = torch.device("cpu")
TOY = DifficultyConfig(runs=2, score_epoch=3, batch_size=8, lr=0.02, augment="none", dtype="float32")


def test_el2n_of_two_classes() -> None:
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]))
    expected = torch.tensor([0.1, 0.5, 0.8]) * 2**0.5
    assert torch.allclose(el2n(logits, torch.tensor([0, 1, 0])), expected)


def test_last_layer_grand_is_the_norm_of_the_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    layer, h, y = nn.Linear(6, 4), torch.randn(5, 6, generator=g), torch.tensor([0, 1, 2, 3, 0])
    norms = []
    for i in range(5):
        layer.zero_grad()
        F.cross_entropy(layer(h[i : i + 1]), y[i : i + 1]).backward()
        norms.append(torch.cat([p.grad.flatten() for p in layer.parameters()]).norm())
    assert torch.allclose(grand_last(layer(h), y, h), torch.stack(norms), rtol=1e-5)


def test_forgetting_counts_falls_and_what_is_never_learned_is_hardest() -> None:
    correct = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).T.flip(0).bool()
    always = torch.ones(6, 1, dtype=torch.bool)
    # read from below: 1 1 1 1 0 0; 0 1 0 1 0 1
    assert forgetting(torch.cat([correct, always], 1)).tolist() == [1, 2, 6, 0]


def test_cad_is_the_mean_of_the_last_two_windows() -> None:
    p = torch.tensor([[0.0, 0.5], [1.0, 0.5], [0.0, 0.5], [1.0, 0.5], [1.0, 0.5]])
    assert cad(p, 2)[0] == pytest.approx((0.5 + 0.0) / 2)
    windows = [p[1:4, 0].std(correction=0), p[2:5, 0].std(correction=0)]
    assert cad(p, 3)[0] == pytest.approx(float(sum(windows) / 2))
    assert torch.equal(cad(p, 4), cad(p, 40))  # of five epochs no two windows are longer
    assert cad(p, 3)[1] == 0
    assert cad(p[:2], 6).tolist() == [0.5, 0]


def test_orders_are_permutations_of_classes_of_any_size_from_easy_to_hard() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 17 + [1] + [3] * 5)[torch.randperm(23, generator=g)]
    scores = torch.rand(23, generator=g).round(decimals=1)
    orders = easy_to_hard(scores, labels, 4)
    assert [len(o) for o in orders] == [17, 1, 0, 5]
    for c, order in enumerate(orders):
        assert order.sort().values.tolist() == (labels == c).nonzero()[:, 0].tolist()
        ranked = list(zip(scores[order].tolist(), order.tolist(), strict=True))
        assert ranked == sorted(ranked)  # ties by position


def test_agreement_of_rankings() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    rising = torch.tensor([1.0, 2, 3, 7, 8, 9, 4])
    assert rank_agreement(torch.stack([rising, rising * 2 + 1]), labels) == pytest.approx(1)
    assert rank_agreement(torch.stack([rising, -rising, rising]), labels) == pytest.approx(-1 / 3)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, toy_source) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    make_difficulty(folder, toy_source, 8, TOY, device=CPU)
    return folder


def test_all_scores_are_there_for_all_images(scored: Path, toy_source) -> None:
    cache = find_difficulty(scored, toy_source, 8, TOY)
    n = len(toy_source.train)
    for score in ("el2n", "grand_last", "forgetting", "uncertainty", "loss", "cad"):
        values, rows = cache.runs(score, 2)
        assert values.shape == (2, n)
        assert torch.isfinite(values).all()
        assert rows.tolist() == list(range(n))
    errors, loss = cache.runs("el2n", 2)[0], cache.runs("loss", 2)[0]
    assert not torch.equal(errors[0], errors[1])  # of other seeds
    # with p of the own class: sqrt(1/2) (1 - p) sqrt(C / (C - 1)) <= |p - y| / sqrt(2) <= 1 - p, and loss = -log p
    p = (-loss).exp()
    assert (errors >= (1 - p) * (3 / 2) ** 0.5 - 1e-5).all()
    assert (errors <= (1 - p) * 2**0.5 + 1e-5).all()
    orders = cache.orders(toy_source, "el2n", 2)
    assert [len(o) for o in orders] == toy_source.class_counts().tolist()
    file = cache.save_orders(toy_source, "el2n", 2)
    labels = torch.from_numpy(toy_source.train.labels)
    read = read_orders(file, labels[1:], torch.arange(1, n))  # without row 0
    assert [(o + 1).tolist() for o in read] == [[row for row in o.tolist() if row] for o in orders]
    means = errors.mean(0)
    assert all((means[o].diff() >= 0).all() for o in orders)


def test_runs_are_resumed_and_added(scored: Path, toy_source, tmp_path: Path, monkeypatch) -> None:
    first = find_difficulty(scored, toy_source, 8, TOY)
    stopped = difficulty.score_run

    def killed(*args, **options):
        if options["seed"] == seeds[1]:
            raise KeyboardInterrupt
        return stopped(*args, **options)

    seeds = [derive_seed(0, "difficulty", run) for run in range(3)]
    monkeypatch.setattr(difficulty, "score_run", killed)
    with pytest.raises(KeyboardInterrupt):
        make_difficulty(tmp_path, toy_source, 8, TOY, device=CPU)
    monkeypatch.undo()
    again = find_difficulty(tmp_path, toy_source, 8, TOY)
    assert again.missing(2) == [1]
    before = again.path(0).stat().st_mtime_ns
    with pytest.raises(InputError, match=r"lacks 1 of 2 runs .*`dq prune`"):
        again.runs("el2n", 2)
    make_difficulty(tmp_path, toy_source, 8, TOY, device=CPU)
    assert again.path(0).stat().st_mtime_ns == before
    assert [again.path(r).read_bytes() for r in (0, 1)] == [first.path(r).read_bytes() for r in (0, 1)]
    more = make_difficulty(tmp_path, toy_source, 8, dataclasses.replace(TOY, runs=3), device=CPU)
    assert more == again
    assert again.path(1).read_bytes() == first.path(1).read_bytes()
    assert again.missing(3) == []


@pytest.mark.parametrize("changes", [{"seed": 1}, {"lr": 0.03}, {"score_epoch": 2}, {"net": "convnet4"}])
def test_other_settings_have_other_folders(scored: Path, toy_source, changes: dict) -> None:
    other = find_difficulty(scored, toy_source, 8, dataclasses.replace(TOY, **changes))
    assert other.folder != find_difficulty(scored, toy_source, 8, TOY).folder
    assert find_difficulty(scored, toy_source, 9, TOY) != find_difficulty(scored, toy_source, 8, TOY)


def test_scores_of_other_images_are_refused(scored: Path, toy_source, toy_images, tmp_path: Path) -> None:
    cache = find_difficulty(scored, toy_source, 8, TOY)
    named = dataclasses.replace(TOY, path=str(cache.folder))
    moved = make_difficulty(tmp_path, toy_source, 8, named, device=CPU)
    assert torch.equal(moved.runs("el2n", 2)[0], cache.runs("el2n", 2)[0])
    with pytest.raises(InputError, match=r"2 of 5 runs; .*prune\.runs.*prune\.path"):
        make_difficulty(tmp_path, toy_source, 8, dataclasses.replace(named, runs=5), device=CPU)
    images, labels = toy_images["train"]
    other = load_source({**toy_images, "train": (images, labels.roll(1))}, class_names=["red", "green", "blue"])
    with pytest.raises(InputError, match=r"are of other images \(fingerprint .*\); leave prune.path out"):
        make_difficulty(tmp_path, other, 8, named, device=CPU)
    with pytest.raises(InputError, match=r"no difficulty scores.*difficulty-"):
        find_difficulty(tmp_path, toy_source, 8, dataclasses.replace(TOY, path=str(tmp_path)))


def test_a_damaged_run_is_made_again(scored: Path, toy_source, tmp_path: Path) -> None:
    cache = make_difficulty(tmp_path, toy_source, 8, TOY, device=CPU)
    good = cache.path(0).read_bytes()
    cache.path(0).write_bytes(good[:-4])
    make_difficulty(tmp_path, toy_source, 8, TOY, device=CPU)
    assert cache.path(0).read_bytes() == good


def test_runs_of_one_epoch_have_no_cad(toy_source, tmp_path: Path) -> None:
    short = dataclasses.replace(TOY, runs=1, score_epoch=1)
    cache = make_difficulty(tmp_path, toy_source, 8, short, device=CPU)
    assert cache.runs("forgetting", 1)[0].shape == (1, len(toy_source.train))
    with pytest.raises(InputError, match=r"one epoch .*'cad'"):
        cache.runs("cad", 1)


def selected(orders: list[Tensor], ipc: int, which: str, seed: int) -> Tensor:
    if which == "random":
        g = torch.Generator().manual_seed(seed)
        return torch.cat([o[torch.randperm(len(o), generator=g)[:ipc]] for o in orders])
    return torch.cat([o[:ipc] if which == "easiest" else o[-ipc:] for o in orders])


def small_net(seed: int) -> nn.Module:
    """A ConvNet of depth 2 and width 16 for images of 8 px."""
    layers: list[nn.Module] = []
    with seeded(seed):
        for channels in (3, 16):
            layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.GroupNorm(16, 16), nn.ReLU(), nn.AvgPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.slow
def test_easy_images_teach_best_alone_and_worse_than_random_ones_in_tens(tmp_path: Path) -> None:
    source = load_source("sklearn:digits")
    settings = {"runs": 3, "score_epoch": 6, "batch_size": 64, "lr": 0.1, "augment": "none", "dtype": "float32"}
    agent = from_dict(DifficultyConfig, {"net": "convnet3w32", **settings})
    orders = make_difficulty(tmp_path, source, 8, agent, device=CPU).orders(source, "el2n", 3)
    splits = [source.train, source.test]
    images, tests = (
        torch.stack([torch.as_tensor(s.read(i)) for i in range(len(s))]).expand(-1, 3, -1, -1) for s in splits
    )
    labels, test_labels = (torch.from_numpy(s.labels) for s in splits)
    pixels = normalizer((0.3,) * 3, (0.37,) * 3)
    student = StudentConfig(epochs=100, batch_size=100, lr=0.05, schedule="constant", augment="none", dtype="float32")

    def score(ipc: int, which: str) -> float:
        total = 0.0
        for seed in range(3):
            rows = selected(orders, ipc, which, seed)
            data = TrainingSet(images[rows], labels[rows], 10, pixels)
            net = fit(data, student, seed=seed, net=small_net(seed)).net
            total += accuracy(net, tests, test_labels, pixels=pixels)
        return total / 3

    # measured over six seeds: 0.77, 0.59 and 0.22 at ipc 1, with a std of 0.02 to 0.07; 0.84 and 0.91 at ipc 10
    assert score(1, "easiest") > score(1, "hardest") + 0.2
    assert score(1, "easiest") > score(1, "random")
    assert score(10, "easiest") < score(10, "random")
