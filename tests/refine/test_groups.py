"""GPS, groups of real images and their statistics: formulas, closed forms, partitions, and what they do to a batch."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from tiny_teachers import MEAN, STD, TinyNet, drawn, images_of, teacher_of, trained
from torch import nn

from dq.config.refinement import FADRM, Teddy
from dq.core.errors import InputError
from dq.refine import fadrm
from dq.refine.batches import compose_batches, largest_batch
from dq.refine.groups import cut_by_score, groups_by_cell, groups_by_score, image_moments, mean_rank
from dq.refine.matched import MatchedTeacher, evaluating, match_teachers, with_statistics
from dq.refine.matching import StatMatcher
from dq.refine.method import Batch
from dq.refine.moments import Moments, gps, pool_moments
from dq.run.refinement import stage_settings

LABELS = torch.arange(12) % 4
GROUPED = {"groups": "gps", "statistics": "group", "compose": "rank"}
STILL = {"crop_scale": (), "flip": 0.0, "jitter": 0}


def matched_of(teacher, **settings) -> MatchedTeacher:
    return match_teachers([teacher], FADRM(**settings), side=16, sizes=(16,))[0]


def distance(matched: MatchedTeacher, images: torch.Tensor) -> float:
    """S of a batch to what a teacher is matched to."""
    weights = torch.ones(len(matched.layers))
    matcher = StatMatcher(matched.layers, weights, targets=matched.targets)
    with torch.no_grad(), evaluating([matched.teacher]), matcher:
        matched.teacher(images)
        return float(matcher.distance())


def test_gps_is_the_formula_on_the_inputs_of_each_layer() -> None:
    net = drawn(TinyNet(), seed=3)
    teacher, images = teacher_of(net), images_of(LABELS)
    norms = [net.bn1, net.bn2, net.late]
    seen: list[torch.Tensor] = []
    hooks = [m.register_forward_hook(lambda module, args, out: seen.append(args[0].double())) for m in norms]
    expected = []
    for image in images:
        seen.clear()
        teacher(image[None])
        terms = []
        for norm, x in zip(norms, seen, strict=True):
            pixels = x[0].flatten(1)
            shift = sum((float(pixels[c].mean()) - float(norm.running_mean[c])) ** 2 for c in range(len(pixels)))
            ratio = [
                math.log((float(pixels[c].var(correction=0)) + 1e-6) / (float(norm.running_var[c]) + 1e-6))
                for c in range(len(pixels))
            ]
            scale = sum(r**2 for r in ratio)
            terms.append((math.sqrt(shift) + 0.5 * math.sqrt(scale)) / math.sqrt(len(pixels)))
        expected.append(sum(terms) / 3)
    for hook in hooks:
        hook.remove()
    layers = matched_of(teacher).layers
    running = [Moments(a.mean, a.var) for a in layers]
    scores = gps(image_moments(teacher, layers, images).split([a.channels for a in layers]), running, beta=0.5)
    assert scores.tolist() == pytest.approx(expected, rel=1e-4)
    assert len({round(s, 4) for s in expected}) == len(images)


def test_gps_is_nought_at_the_running_statistics_and_grows_with_the_distance() -> None:
    running = [Moments(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])), Moments(torch.zeros(3), torch.ones(3))]
    shifts = torch.tensor([0.0, 1.0, 2.0])[:, None]
    moments = [Moments(r.mean + shifts, r.var.expand(3, -1)) for r in running]
    assert gps(moments, running).tolist() == pytest.approx([0, 1, 2])  # |t 1|_2 / sqrt(C) = t
    spread = [Moments(r.mean.expand(3, -1), r.var * torch.exp(shifts)) for r in running]
    assert gps(spread, running).tolist() == pytest.approx([0, 1, 2], abs=1e-5)
    assert gps(spread, running, beta=0.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_moments_in_closed_form_are_those_of_one_pass_over_the_whole_group(batch: int) -> None:
    net = drawn(TinyNet(), seed=1)
    teacher = dataclasses.replace(teacher_of(net), batch_size=batch)
    images = images_of(torch.arange(23) % 4, seed=2)
    matched = matched_of(teacher)
    each = image_moments(teacher, matched.layers, (images * 255).round().to(torch.uint8))
    parts = [Moments(each.mean[i : i + 7], each.var[i : i + 7]) for i in range(0, 23, 7)]
    pooled = [pool_moments(p, torch.ones(len(p.mean))) for p in parts]
    counts = torch.tensor([len(p.mean) for p in parts])
    total = pool_moments(Moments(*map(torch.stack, zip(*pooled, strict=True))), counts)
    seen: list[torch.Tensor] = []
    hooks = [a.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].double())) for a in matched.layers]
    teacher((images * 255).round() / 255)
    for hook in hooks:
        hook.remove()
    mean = torch.cat([x.mean((0, 2, 3)) for x in seen])
    var = torch.cat([x.transpose(0, 1).flatten(1).var(1, correction=0) for x in seen])
    torch.testing.assert_close(total.mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.var, var, rtol=1e-5, atol=1e-6)
    # parts that differ have more variance together than on average
    assert (total.var > (counts[:, None] * torch.stack([p.var for p in pooled])).sum(0) / 23).all()


def test_reading_moments_leaves_a_network_as_it_was() -> None:
    net = TinyNet()
    net.train()
    teacher = teacher_of(net)
    layers = matched_of(teacher).layers
    image_moments(teacher, layers, images_of(LABELS))
    assert net.training
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert net.bn1.num_batches_tracked == 0


@pytest.mark.parametrize(("n", "number"), [(10, 3), (9, 3), (7, 7), (5, 1)])
def test_groups_by_score_cut_a_class_from_easy_to_hard(n: int, number: int) -> None:
    g = torch.Generator().manual_seed(n)
    rows, scores = torch.arange(100, 100 + n), torch.randn(n, generator=g)
    groups = cut_by_score(rows, scores, number)
    assert torch.cat(groups).sort().values.tolist() == rows.tolist()
    sizes = [len(rows) for rows in groups]
    assert len(sizes) == number
    assert max(sizes) - min(sizes) <= 1
    for easy, hard in itertools.pairwise(groups):
        assert scores[easy - 100].max() <= scores[hard - 100].min()
    assert all((rows.diff() > 0).all() for rows in groups)


def test_images_of_a_class_have_the_groups_of_their_ranks_or_cells() -> None:
    rows = torch.arange(6)
    assert groups_by_score(rows, rows.float(), 3).of_image == [0, 1, 2]
    few = groups_by_score(rows[:2], rows[:2].float(), 5)  # two real images for five
    assert ([r.tolist() for r in few.rows], few.of_image) == ([[0], [1]], [0, 0, 0, 1, 1])
    cells = groups_by_cell(rows, torch.tensor([0, 1, 0, 2, 0, 1]), [2, 0, 1])
    assert [r.tolist() for r in cells.rows] == [[0, 2, 4], [1, 5], [3]]
    assert cells.of_image == [0, 0, 2]


def test_several_scores_are_averaged_by_rank() -> None:
    one, other = torch.tensor([0.1, 50.0, 0.2]), torch.tensor([7.0, 7.0, 6.0])
    assert mean_rank([one]).tolist() == [0, 2, 1]
    assert mean_rank([one, other]).tolist() == [0.5, 2, 0.5]


def test_a_batch_of_a_rank_has_no_image_of_another() -> None:
    counts = [3, 1, 3, 2, 3]
    batches = compose_batches(counts, 4, compose="rank", min_classes=2)
    assert sorted(row for b in batches for row in b) == [(c, r) for c, n in enumerate(counts) for r in range(n)]
    assert [{r for _, r in b} for b in batches] == [{0}, {0}, {1}, {2}]
    assert [len(b) for b in batches] == [2, 3, 4, 3]
    assert compose_batches([2] * 3, 3, compose="rank") == compose_batches([2] * 3, 3)
    with pytest.raises(InputError, match=r"1 class, fewer than 3: .*batch_size \(now 2\)"):
        compose_batches(counts, 2, compose="rank", min_classes=3)
    assert [largest_batch("rank", 100, 10), largest_batch("index", 100, 10), largest_batch("rank", 100, None)] == [
        10,
        100,
        100,
    ]


def test_a_batch_with_the_statistics_of_its_group_is_at_no_distance() -> None:
    teacher, images = trained(), images_of(LABELS)
    matched = matched_of(teacher)
    each = image_moments(teacher, matched.layers, images)
    one, other = (pool_moments(Moments(each.mean[s], each.var[s]), torch.ones(6)) for s in (slice(0, 6), slice(6, 12)))
    (first,), (second,) = with_statistics([matched], [one]), with_statistics([matched], [other])
    assert distance(first, images[:6]) == pytest.approx(0, abs=1e-4)
    assert distance(second, images[6:]) == pytest.approx(0, abs=1e-4)
    assert distance(first, images[6:]) > 0.05
    assert distance(matched, images[:6]) > 0.05
    assert with_statistics([matched], None) == (matched,)


def test_other_statistics_give_other_images_and_the_running_ones_the_same_bits() -> None:
    teacher, labels = trained(), LABELS[:8]
    images = images_of(labels, seed=5)
    config = FADRM(sizes=(16,) * 2, steps=(4,) * 2, lr=0.05, batch_size=8, r_bn=0.1, **STILL)
    plain = fadrm.refine(Batch(images, labels), config, [teacher])
    matched = matched_of(teacher, r_bn=0.1)
    running = Moments(torch.cat([a.mean for a in matched.layers]), torch.cat([a.var for a in matched.layers]))
    each = image_moments(teacher, matched.layers, images_of(LABELS, seed=9))
    groups = [pool_moments(Moments(each.mean[s], each.var[s]), torch.ones(6)) for s in (slice(0, 6), slice(6, 12))]
    results = [
        fadrm.refine(Batch(images, labels), config, [teacher], matched=with_statistics([matched], [m])).images
        for m in (running, *groups)
    ]
    assert torch.equal(results[0], plain.images)
    assert not torch.equal(results[1], results[2])
    assert not torch.equal(results[1], plain.images)


def test_settings_that_are_off_leave_old_folders_their_names() -> None:
    for stage in (FADRM(), Teddy()):
        assert not {"groups", "statistics"} & stage_settings(stage).keys()
    on = stage_settings(FADRM(**GROUPED))
    assert (on["groups"], on["statistics"]) == ("gps", "group")
    assert "anchor_rank" in stage_settings(FADRM(groups="cells", anchors="group"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"statistics": "group", "compose": "rank"}, "need groups: set groups=gps or groups=cells"),
        ({"anchors": "group"}, "need groups: set groups=gps or groups=cells"),
        ({"groups": "cells"}, "groups=cells decides nothing here: set statistics=group"),
        ({"groups": "gps", "statistics": "group"}, "set compose=rank, not index"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FADRM(**settings)


def test_a_batch_alone_has_no_groups() -> None:
    labels = LABELS[:4]
    config = FADRM(sizes=(16,), steps=(1,), batch_size=4, **GROUPED)
    with pytest.raises(InputError, match="statistics=group is worked out by a run"):
        fadrm.refine(Batch(images_of(labels), labels), config, [teacher_of(drawn(TinyNet()))])
    brief = fadrm.FadrmMethod().brief(dataclasses.replace(config, anchors="group"))
    assert (brief.groups, brief.statistics, brief.anchors) == ("none", "running", "init")


def test_a_network_without_batch_norm_has_no_moments() -> None:
    teacher = teacher_of(drawn(TinyNet(norm=nn.InstanceNorm2d)))
    with pytest.raises(InputError, match="no teacher has batch norm"):
        matched_of(teacher)
    assert (teacher.mean, teacher.std) == (MEAN, STD)
