"""Real images as baselines: rules on points with known answers, a teacher's patches, and the sets they make."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dq.core.errors import InputError
from dq.core.seeds import generator
from dq.data.coresets import herding_rows, k_center_rows, random_rows
from dq.data.load import load_source
from dq.data.source import ImageSource
from dq.data.tensors import from_tensors
from dq.distilled.set import DistilledSet
from dq.evaluation.baselines import BASELINES, BY_SCORE, bps_rows, nearest_rows, select
from dq.networks.patches import (
    PatchRecipe,
    best_crops,
    crop_boxes,
    cut_in_turn,
    cut_together,
    mosaics,
    patch_images,
    rank_order,
)
from dq.networks.teacher import Teacher

ONE = np.zeros(5, np.int64)
LINE = torch.tensor([[0.0], [1.0], [2.0], [3.0], [14.0]])  # mean 4


def points(n: int = 60, d: int = 3, classes: int = 2) -> tuple[torch.Tensor, np.ndarray]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=g), np.arange(n) % classes


class Brightness(nn.Module):
    """Two logits, +-10 times the mean of what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.gain * x.mean((1, 2, 3))
        return torch.stack([mean, -mean], 1)


def bright_teacher(mean: float = 0.0) -> Teacher:
    return Teacher(Brightness(), (mean,) * 3, (1.0,) * 3, 64, "bright", "bright")


def conv_teacher(batch_size: int, classes: int = 3) -> Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes)
        )
    return Teacher(net.eval(), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), batch_size, "conv", "conv")


def flat_source(values: list[int], size: int = 8) -> ImageSource:
    """Images of one gray each, all of one class."""
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, size, size)
    return from_tensors((images, torch.zeros(len(values), dtype=torch.int64)))


# --- rules --------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_class_and_size_alone() -> None:
    labels = np.array([2, 0, 0, 1, 2, 2, 0, 1])
    mirrored = labels[::-1].copy()
    other = np.array([2, 0, 0, 1, 2, 2, 0, 1, 1, 1])
    for seed in range(3):
        rows, moved, grown = (random_rows(y, 2, seed).tolist() for y in (labels, mirrored, other))
        assert len(rows) == 6
        places = {c: np.flatnonzero(labels == c).tolist() for c in range(3)}
        moved_places = {c: np.flatnonzero(mirrored == c).tolist() for c in range(3)}
        for c in range(3):
            chosen = [places[c].index(r) for r in rows[2 * c : 2 * c + 2]]
            assert chosen == [moved_places[c].index(r) for r in moved[2 * c : 2 * c + 2]]
            order = torch.randperm(len(places[c]), generator=generator(seed, "random rows", c))
            assert chosen == sorted(order[:2].tolist())
        assert rows[:2] + rows[4:] == grown[:2] + grown[4:]  # class 1 alone has grown


def test_herding_by_hand() -> None:
    # 3 is nearest to 4 (distance 1); then (3+3)/2 would be, but rows are taken once: (3+2)/2 = 2.5, (3+14)/2 = 8.5;
    # then (3+2+14)/3 = 6.33 is 2.33 away, (3+2+1)/3 = 2 only 2
    assert herding_rows(LINE, ONE, 3).tolist() == [3, 2, 1]
    assert herding_rows(LINE, ONE, 4).tolist() == [3, 2, 1, 4]
    assert herding_rows(LINE, ONE, 9).tolist() == [3, 2, 1, 4, 0]


def test_k_center_by_hand() -> None:
    # 3 is nearest to the mean, 14 farthest from it, then 0 (3 away), then 1 before 2 by its row
    assert k_center_rows(LINE, ONE, 4).tolist() == [3, 4, 0, 1]


def test_k_center_takes_copies_of_a_center_but_no_row_twice() -> None:
    same = torch.ones(4, 2)
    assert sorted(k_center_rows(same, np.zeros(4, np.int64), 3).tolist()) == [0, 1, 2]
    assert sorted(herding_rows(same, np.zeros(4, np.int64), 9).tolist()) == [0, 1, 2, 3]


def test_herding_starts_at_the_mean_and_follows_it_better_than_random_rows() -> None:
    x, labels = points()
    for ipc in (1, 3, 5, 10, 30):
        herded = herding_rows(x, labels, ipc)
        for c in (0, 1):
            mean = x[labels == c].mean(0)
            own = herded[labels[herded] == c]
            if ipc == 1:
                assert own[0] == np.flatnonzero(labels == c)[(x[labels == c] - mean).norm(dim=1).argmin()]
            else:
                error = (x[own].mean(0) - mean).norm()
                drawn = [random_rows(labels, ipc, seed) for seed in range(20)]
                others = [(x[r[labels[r] == c]].mean(0) - mean).norm() for r in drawn]
                assert error <= min(others) + 1e-6  # ipc=30 is the whole class


def test_k_center_covers_within_twice_the_optimum() -> None:
    for seed in range(10):
        x = torch.randn(9, 2, generator=torch.Generator().manual_seed(seed)).double()
        distance = torch.cdist(x, x)
        best = min(float(distance[:, list(c)].min(1).values.max()) for c in itertools.combinations(range(9), 3))
        result = k_center_rows(x, np.zeros(9, np.int64), 3)
        assert float(distance[:, result].min(1).values.max()) <= 2 * best + 1e-9


def test_nearest_rows_are_real_points_in_the_middle_of_their_cells() -> None:
    center = torch.tensor([[0.0, 0], [100, 0], [0, 100]])
    around = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    x = torch.cat([center[:1] + around, center[1:2] + around[:3], center[2:]])
    rows, counts = nearest_rows(x, np.zeros(9, np.int64), 3, 0)
    assert rows.tolist() == [0, 5, 8]
    assert counts.tolist() == [5, 3, 1]


@pytest.mark.parametrize("rule", [herding_rows, k_center_rows, lambda x, y, ipc: nearest_rows(x, y, ipc, 0)[0]])
def test_rules_give_rows_in_class_order_once_and_all_of_a_small_class(rule) -> None:
    x, _ = points(20)
    labels = np.array([1, 0, 2, 1, 0] * 4)
    rows = rule(x, labels, 6)
    assert rows.dtype == np.int64
    assert len(set(rows.tolist())) == len(rows)
    assert labels[rows].tolist() == [0] * 6 + [1] * 6 + [2] * 4


@pytest.mark.parametrize("rule", [herding_rows, k_center_rows])
def test_permuted_rows_give_the_same_points(rule) -> None:
    x, labels = points()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)).numpy()
    assert order[rule(x[order], labels[order], 7)].tolist() == rule(x, labels, 7).tolist()


def test_bps_takes_prototypes_and_boundary_images_of_every_cell() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.cat([5 * torch.eye(4)[c] + 0.1 * torch.randn(25, 4, generator=g) for c in range(4)])
    labels, entropy = np.zeros(100, np.int64), torch.rand(100, generator=g)
    rows = bps_rows(x, labels, 8, entropy, 0)  # four cells of equal mass, two images of each
    assert sorted((rows // 25).tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    centers = torch.stack([x[25 * c : 25 * c + 25].mean(0) for c in range(4)])
    near, boundary = rows[::2], rows[1::2]
    for row in near:
        distance = (x[row // 25 * 25 :][:25] - centers[row // 25]).norm(dim=1)
        assert row % 25 == int(distance.argmin())
    assert float(entropy[boundary].min()) > 0.7
    assert bps_rows(x, labels, 1, entropy, 0).tolist() == [int((x - x.mean(0)).norm(dim=1).argmin())]


def test_rules_refuse_what_they_cannot_use() -> None:
    bad = LINE.clone()
    bad[2] = torch.nan
    with pytest.raises(InputError, match="first in row 2"):
        herding_rows(bad, ONE, 2)
    with pytest.raises(InputError, match="at least 1 image per class, not 0"):
        k_center_rows(LINE, ONE, 0)
    with pytest.raises(InputError, match=r"features must be \(5, d\)"):
        nearest_rows(LINE[:4], ONE, 2, 0)


# --- patches ------------------------------------------------------------------------------------------------------


def test_crop_boxes_have_the_areas_of_random_resized_crops() -> None:
    boxes = crop_boxes(100, 2000, torch.Generator().manual_seed(0))
    assert all(min(top, left) >= 0 and max(top, left) + side <= 100 for top, left, side in boxes)
    assert min(side for _, _, side in boxes) == 28  # sqrt(0.08) of 100
    areas = np.array([side**2 / 1e4 for _, _, side in boxes])
    # mean of the uniform law on (0.08, 1), five standard errors; rounding to pixels moves an area by 1 % at most
    assert abs(areas.mean() - 0.54) < 5 * 0.92 / 12**0.5 / 2000**0.5 + 0.01


def test_rank_order_by_hand() -> None:
    loss = torch.tensor([0.5, 0.1, 0.4, 0.2, 0.3])
    assert rank_order(loss, "easy").tolist() == [1, 3, 4, 2, 0]
    assert rank_order(loss, "medium").tolist() == [4, 3, 2, 1, 0]
    assert rank_order(loss[:4], "medium").tolist() == [3, 2, 1, 0]  # ranks 1 and 2 of 0..3 are the middle


def test_mosaics_spread_the_ranks_over_the_images() -> None:
    patches = torch.arange(8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    first, second = mosaics(patches, 2)[:, 0]
    assert first.tolist() == [[0, 0, 2, 2], [0, 0, 2, 2], [4, 4, 6, 6], [4, 4, 6, 6]]
    assert torch.equal(second, first + 1)


def test_best_crop_is_the_brightest_and_its_score_is_that_of_the_stored_patch() -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 8, 8), generator=g, dtype=torch.uint8)
    options = {"teacher": bright_teacher(0.5), "crops": 6, "seed": 0}
    best, loss = best_crops(images, [3, 1, 4, 1], 0, factor=2, **options)
    assert best.shape == (4, 3, 4, 4)
    # the same image row draws the same crops
    again, _ = best_crops(images[1:2], [1], 0, factor=2, **options)
    assert torch.equal(best[1:2], again)
    # a crop of half the side fills a quarter of what the teacher sees; the rest is zero after normalization
    mean = (best.double().mean((1, 2, 3)) / 255 - 0.5) / 4
    assert torch.allclose(loss, torch.log1p(torch.exp(-20 * mean)), atol=1e-6)
    darker = [best_crops(images, [3, 1, 4, 1], 0, factor=2, **{**options, "crops": n})[1] for n in (1, 3)]
    assert (loss <= darker[1]).all()
    assert (darker[1] <= darker[0]).all()


@pytest.mark.parametrize("factor", [1, 2])
def test_patches_come_easiest_first(factor: int) -> None:
    source = flat_source([40, 200, 90, 250, 10, 120, 160, 70, 220, 30])
    tiles = factor**2
    result = patch_images(source, 2, PatchRecipe(8, factor=factor, pool=20), teacher=bright_teacher())
    assert result.images.shape == (2, 3, 8, 8)
    assert result.images.dtype == torch.uint8
    assert result.rows.tolist() == [3, 8]  # 250 and 220
    ranked = [250, 220, 200, 160, 120, 90, 70, 40][: 2 * tiles]
    side = 8 // factor
    for j in range(2):
        corners = result.images[j, 0, ::side, ::side].flatten().tolist()
        assert corners == ranked[j::2]
    medium = patch_images(source, 2, PatchRecipe(8, pool=20, rank="medium"), teacher=bright_teacher())
    assert medium.rows.tolist() == [5, 2]  # of 250 220 200 160 [120 90] 70 40 30 10


@pytest.mark.parametrize("factor", [1, 2])
def test_patches_repeat_and_do_not_depend_on_batches(toy_source, factor: int, monkeypatch) -> None:
    recipe = PatchRecipe(8, factor=factor, pool=8)
    one = patch_images(toy_source, 1, recipe, teacher=conv_teacher(64))
    monkeypatch.setattr("dq.networks.patches.CHUNK_BYTES", 1)
    two = patch_images(toy_source, 1, recipe, teacher=conv_teacher(3))
    assert torch.equal(one.images, two.images)
    assert one.rows.tolist() == two.rows.tolist()
    other = patch_images(toy_source, 1, recipe, teacher=conv_teacher(3), seed=1)
    assert not torch.equal(one.images, other.images)


@pytest.mark.parametrize(("size", "side"), [(32, 32), (32, 16), (9, 3), (24, 24)])
def test_crops_together_are_those_in_turn(size: int, side: int) -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8, generator=g)
    boxes = torch.tensor([crop_boxes(size, 5, g) for _ in range(6)])
    boxes[0, 0] = torch.tensor([0, 0, size])
    boxes[0, 1] = torch.tensor([size - 1, 0, 1])
    in_turn, together = cut_in_turn(images, boxes, side), cut_together(images, boxes, side)
    difference = (in_turn.int() - together.int()).abs()
    assert difference.max() <= 1  # where a value lies between two levels
    assert (difference > 0).float().mean() < 0.002
    assert in_turn.float().std() > 10


def test_patches_of_small_classes(toy_source) -> None:
    teacher = conv_teacher(64)
    # 9, 8 and 7 images give two, two and one mosaics of 4
    result = patch_images(toy_source, 3, PatchRecipe(8, factor=2), teacher=teacher)
    assert toy_source.train.labels[result.rows].tolist() == [0, 0, 1, 1, 2]
    with pytest.raises(InputError, match="class 0 'red' has 9 images but a mosaic needs 16"):
        patch_images(toy_source, 3, PatchRecipe(8, factor=4), teacher=teacher)
    with pytest.raises(InputError, match=r"pool=11 .* 3 mosaics of 4"):
        patch_images(toy_source, 3, PatchRecipe(8, factor=2, pool=11), teacher=teacher)
    with pytest.raises(InputError, match=r"3 patches .* 8 px"):
        patch_images(toy_source, 3, PatchRecipe(8, factor=3), teacher=teacher)
    with pytest.raises(InputError, match=r"2 outputs .*class 2"):
        patch_images(toy_source, 3, PatchRecipe(8), teacher=conv_teacher(64, classes=2))


# --- sets ---------------------------------------------------------------------------------------------------------


def toy_features(source) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack([source.train.read(i) for i in range(len(source.train))]))
    return pixels.flatten(1).float() / 255


def toy_scores(name: str) -> torch.Tensor:
    assert name in BY_SCORE.values()
    return torch.rand(24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", BY_SCORE)
def test_selections_by_scores_need_scores_of_all_images(toy_source, name: str) -> None:
    options = {"image_size": 8, "features": toy_features(toy_source)}
    with pytest.raises(InputError, match=f"the selection '{name}' goes by scores of the images"):
        select(name, toy_source, 2, **options)
    with pytest.raises(InputError, match=r"scores must be \(24,\), .*not \(3,\)"):
        select(name, toy_source, 2, **options, scores=lambda name: torch.ones(3))


@pytest.mark.parametrize("name", BASELINES)
def test_selected_sets(toy_source, tmp_path: Path, name: str) -> None:
    candidates = np.array([r for r in range(24) if r % 4], np.int64)
    options = {"image_size": 8, "features": lambda: toy_features(toy_source), "teacher": conv_teacher(64)}
    options |= {"scores": toy_scores}
    s = select(name, toy_source, 2, candidates=candidates, **options)
    assert s.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert s.prototype.tolist() == [0, 1] * 3
    assert set(s.source_row.tolist()) <= set(candidates.tolist())
    assert len(set(s.source_row.tolist())) == 6
    assert toy_source.train.labels[s.source_row].tolist() == s.labels.tolist()
    assert torch.equal(s.weights, torch.ones(6))
    if name != "patches":
        for row, image in zip(s.source_row.tolist(), s.images, strict=True):
            assert np.array_equal(toy_source.train.read(row), image.numpy())
    if name == "nearest":
        in_class = np.bincount(toy_source.train.labels[candidates])
        assert s.counts.view(3, 2).sum(1).tolist() == in_class.tolist()
    else:
        assert s.counts.tolist() == [1] * 6
    again = select(name, toy_source, 2, candidates=candidates, **options)
    assert torch.equal(s.images, again.images)

    s.save(tmp_path, f"ipc2-{name}")
    t = DistilledSet.load(tmp_path)
    for field in ("images", "labels", "weights", "prototype", "counts", "source_row"):
        assert torch.equal(getattr(s, field), getattr(t, field)), field
    assert t.provenance["selection"] == s.provenance["selection"]
    assert t.provenance["selection"]["candidates"]["rows"] == 18
    assert re.search(rf"\| `ipc2-{name}`[^|]*\| 6 \| 2 \| [^|]* \| {name} \(", (tmp_path / "README.md").read_text())


@pytest.mark.parametrize("name", ["herding", "bps"])
def test_arrays_select_as_tensors_do(toy_source, name: str) -> None:
    x = toy_features(toy_source)
    s = select(name, toy_source, 2, image_size=8, features=x, scores=toy_scores)
    options = {"features": x.numpy(), "scores": lambda score: toy_scores(score).numpy()}
    assert select(name, toy_source, 2, image_size=8, **options).source_row.tolist() == s.source_row.tolist()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("herding", {"features": "pixels"}, "features must be a tensor or an array of numbers, not"),
        ("herding", {"features": lambda: None}, "features must be a tensor or an array of numbers, not"),
        ("herding", {"features": np.ones((24, 3), int)}, r"features must be \(24, d\) float"),
        ("window", {"scores": torch.ones(24)}, "scores must be a function of a name such as 'el2n' .*, not Tensor"),
        ("window", {"scores": lambda name: None}, "scores must be a tensor or an array of numbers, not"),
        ("random", {"candidates": [0, 9, 20]}, "candidates must be an array of ascending int64 rows, not list"),
    ],
)
def test_what_cannot_be_selected_by_is_refused(toy_source, name: str, change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        select(name, toy_source, 2, image_size=8, **change)


def test_selection_without_candidates_equals_all_candidates(toy_source) -> None:
    for name in ("random", "herding"):
        a = select(name, toy_source, 3, image_size=8, features=toy_features(toy_source))
        b = select(name, toy_source, 3, image_size=8, features=toy_features(toy_source), candidates=np.arange(24))
        assert a.source_row.tolist() == b.source_row.tolist()


def test_unreadable_images_are_left_out_where_that_is_wished(toy_source) -> None:
    def read(row: int):
        if row == broken:
            raise OSError("gone")
        return toy_source.train.read(row)

    full = select("nearest", toy_source, 3, image_size=8, features=toy_features(toy_source))
    broken = int(full.source_row[0])
    split = dataclasses.replace(toy_source.train, read=read)
    source = dataclasses.replace(toy_source, splits={"train": split})
    with pytest.raises(InputError, match="gone"):
        select("nearest", source, 3, image_size=8, features=toy_features(toy_source))
    skipping = load_source(source, on_bad_image="skip")
    s = select("nearest", skipping, 3, image_size=8, features=toy_features(toy_source))
    assert s.source_row.tolist() == full.source_row[1:].tolist()
    assert s.counts.tolist() == full.counts[1:].tolist()
    assert s.prototype.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert s.provenance["selection"]["unreadable"] == 1


def test_selection_refuses_what_it_cannot_do(toy_source) -> None:
    with pytest.raises(InputError, match="'forgettable'; choose random, herding"):
        select("forgettable", toy_source, 1, image_size=8)
    with pytest.raises(InputError, match="'herding' compares images by features"):
        select("herding", toy_source, 1, image_size=8)
    with pytest.raises(InputError, match=r"features must be \(24, d\) float, .* not \(23, 4\)"):
        select("k-center", toy_source, 1, image_size=8, features=torch.zeros(23, 4))
    with pytest.raises(InputError, match="'patches' needs a teacher"):
        select("patches", toy_source, 1, image_size=8)
    with pytest.raises(InputError, match="class 1 'green' has no candidates"):
        only = np.array([0, 1, 20], np.int64)
        select("random", toy_source, 1, image_size=8, candidates=only)
    for wrong in ([3, 1], [1, 1], [0, 24], [-1, 2], []):
        with pytest.raises(InputError, match=r"candidates must be ascending int64 rows in 0\.\.23"):
            select("random", toy_source, 1, image_size=8, candidates=np.array(wrong, np.int64))
