"""Views: draws that depend on nothing but their arguments, and arithmetic against its definitions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dq.config.students import ViewConfig
from dq.core.errors import InputError
from dq.data.rand_augment import rand_augment
from dq.data.views import (
    GRAY,
    LIGHT_VALUES,
    LIGHT_VECTORS,
    Views,
    apply_views,
    batches,
    crop_and_flip,
    draw_views,
    jitter,
    lighting,
    mix,
    parts,
    shuffle_patches,
)

# every draw that there is
ALL = ViewConfig(rand_augment=2, shuffle=2, crop_scale=(0.08, 1.0), flip=0.5, jitter=0.4, lighting=0.1, mix="cutmix")
DRAWN = ("order", "shuffle", "box", "flip", "partner", "kept", "cut", "color", "color_order", "light", "operations")


def draw(config: ViewConfig = ALL, n: int = 21, side: int = 16, **changes) -> Views:
    return draw_views(config, n, side, **{"batch_size": 8, "accumulate": 1, "seed": 0, "epoch": 0, **changes})


def pictures(n: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def same(a: Views, b: Views) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Views))


# --- draws --------------------------------------------------------------------------------------------------------


def test_draws_are_a_function_of_seed_and_epoch_alone():
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before, before_np = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = draw(seed=3, epoch=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_np).all()  # noqa: NPY002
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    draw(seed=4)
    again = draw(seed=3, epoch=5)
    assert same(first, again)
    assert first.digest() == again.digest()
    for other in (draw(seed=4, epoch=5), draw(seed=3, epoch=6)):
        assert first.digest() != other.digest()
        for name in DRAWN:
            assert not torch.equal(getattr(first, name), getattr(other, name)), name


def test_digest_sees_every_field():
    views = draw()
    seen = {views.digest()}
    for f in dataclasses.fields(Views):
        value = getattr(views, f.name).clone()
        value.view(-1)[-1] += 1
        seen.add(dataclasses.replace(views, **{f.name: value}).digest())
    assert len(seen) == 1 + len(dataclasses.fields(Views))
    assert all(0 <= d < 2**63 for d in seen)


def test_every_image_once_per_epoch_and_partners_within_their_batch():
    for n, batch, accumulate in ((1, 4, 1), (7, 4, 2), (17, 16, 1), (21, 8, 1)):
        views = draw(n=n, batch_size=batch, accumulate=accumulate)
        assert views.order.sort().values.tolist() == list(range(n))
        spans = batches(n, batch, accumulate)
        assert len(views.kept) == len(views.cut) == len(spans)
        for s in spans:
            assert views.partner[s].sort().values.tolist() == list(range(s.stop - s.start))


def test_nothing_is_drawn_that_was_not_asked_for():
    views = draw(ViewConfig())
    assert views.box.tolist() == [[0, 0, 16, 16]] * 21
    assert not views.flip.any()
    assert (views.kept == 1).all()
    assert not views.cut.any()
    for name in ("shuffle", "color", "color_order", "light", "operations"):
        assert getattr(views, name).shape == (21, 0)
    assert views.partner.tolist() == [*range(8), *range(8), *range(5)]
    x = pictures(21)
    assert torch.equal(apply_views(ViewConfig(), x, views, 1, slice(8, 16)), x[views.order[8:16].long()])


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 1.0)])
def test_boxes_lie_inside_and_have_the_areas_and_ratios_asked_for(scale):
    n, side = 20_000, 224
    box = draw(ViewConfig(crop_scale=scale), n=n, side=side).box.double()
    top, left, height, width = box.unbind(1)
    assert (box[:, 2:] >= 1).all()
    assert (box[:, :2] >= 0).all()
    assert (top + height <= side).all()
    assert (left + width <= side).all()
    area, ratio = height * width / side**2, width / height
    rounding = 1 / math.sqrt(scale[0]) / side  # half a pixel on either side of the smallest box
    assert (area >= scale[0] * (1 - 2 * rounding)).all()
    assert (area <= 1).all()
    assert (ratio >= 0.75 * (1 - 2 * rounding)).all()
    assert (ratio <= 4 / 3 * (1 + 2 * rounding)).all()
    # areas below what fits at any ratio are never refused, so uniform there: the share of each half of [low, 0.75]
    low = scale[0]
    inside = area[area < 0.75]
    share = float((inside < (low + 0.75) / 2).double().mean())
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(len(inside))
    # the logarithm of the ratio is symmetric about 0, and so is the place
    log_ratio = ratio.log()[area < 0.75]
    assert abs(log_ratio.mean()) < 4 * math.log(4 / 3) / math.sqrt(3 * len(log_ratio))
    free = side - width
    at = (left / free)[free > 20]
    assert abs(at.mean() - 0.5) < 4 * 0.3 / math.sqrt(len(at))


def test_crops_that_never_fit_are_the_largest_central_ones():
    wide = draw(ViewConfig(crop_scale=(1.0, 1.0), crop_ratio=(2.0, 2.0)), side=16)
    assert wide.box.tolist() == [[4, 0, 8, 16]] * 21
    tall = draw(ViewConfig(crop_scale=(1.0, 1.0), crop_ratio=(0.5, 0.5)), side=16)
    assert tall.box.tolist() == [[0, 4, 16, 8]] * 21
    # a side of half a pixel is one pixel
    narrow = draw(ViewConfig(crop_scale=(1.0, 1.0), crop_ratio=(0.125, 0.125)), side=4)
    assert narrow.box.tolist() == [[0, 1, 4, 1]] * 21
    flat = draw(ViewConfig(crop_scale=(1.0, 1.0), crop_ratio=(8.0, 8.0)), side=4)
    assert flat.box.tolist() == [[1, 0, 1, 4]] * 21
    whole = draw(ViewConfig(crop_scale=(1.0, 1.0)), n=500, side=16).box
    assert whole.tolist() == [[0, 0, 16, 16]] * 500


def test_half_of_the_images_are_mirrored():
    flips = draw(ViewConfig(flip=0.5), n=10_000).flip.double()
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / 100
    assert draw(ViewConfig(flip=1.0)).flip.all()


@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_mixing_shares_follow_the_beta_law(alpha):
    kept = draw(ViewConfig(mix="mixup", mix_alpha=alpha), n=20_000, batch_size=2).kept.double()
    assert ((kept >= 0) & (kept <= 1)).all()
    assert abs(kept.mean() - 0.5) < 4 * 0.3 / 100
    variance = 1 / (4 * (2 * alpha + 1))
    assert kept.var() == pytest.approx(variance, rel=0.06)


@pytest.mark.parametrize("side", [7, 8, 32])
def test_kept_is_the_share_of_pixels_that_cutmix_leaves(side):
    config = ViewConfig(mix="cutmix")
    views = draw(config, n=400, side=side, batch_size=2)
    # images that differ from one another in every pixel
    images = torch.arange(400, dtype=torch.float32)[:, None, None, None].expand(-1, 3, side, side) / 400
    clipped = 0
    for i, span in enumerate(batches(400, 2)):
        own = images[views.order[span].long()]
        x = apply_views(config, images, views, i, span)
        if views.partner[span].tolist() == [1, 0]:
            left = float((x == own).double().mean())
            assert left == pytest.approx(float(views.kept[i]), abs=1e-6)
            top, first, height, width = views.cut[i].tolist()
            clipped += height != width
            assert 0 <= top <= top + height <= side
            assert 0 <= first <= first + width <= side
        else:
            assert torch.equal(x, own)
    assert clipped > 20  # boxes over the edge, whose area is not 1 - lambda, were among them


@pytest.mark.parametrize("grid", [2, 3])
def test_patches_change_places_by_columns_and_then_by_rows(grid):
    """RDED's ShufflePatches: 4 arrangements of 2 x 2 patches, each as often, and not 24; 36 of 3 x 3."""
    n = 20_000
    orders = draw(ViewConfig(shuffle=grid), n=n).shuffle
    assert orders.dtype == torch.uint8
    arrangements, counts = orders.unique(dim=0, return_counts=True)
    number = math.factorial(grid) ** 2
    assert len(arrangements) == number
    assert (abs(counts - n / number) < 5 * math.sqrt(n / number)).all()
    if grid == 2:
        assert arrangements.tolist() == [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]
    # strips of columns, then of rows, change places
    x = pictures(1, 6)
    i = int(orders.ne(torch.arange(grid**2)).any(1).nonzero()[0])
    order = orders[i].view(grid, grid)
    columns, rows = order[0] % grid, order[:, 0] // grid
    strips = torch.cat([x.chunk(grid, 3)[c] for c in columns], 3)
    expected = torch.cat([strips.chunk(grid, 2)[r] for r in rows], 2)
    assert torch.equal(shuffle_patches(x, orders[i : i + 1], grid), expected)


@pytest.mark.parametrize(("side", "pad"), [(32, 4), (8, 1)])
def test_a_padded_crop_is_a_window_of_the_image_with_a_black_border(side, pad):
    """CIFAR's usual crop, as SRe2L's relabel_cifar.py takes it: 4 px of padding on every side of 32 px."""
    config = ViewConfig(crop_pad=0.125, flip=0.5)
    x = pictures(40, side)
    views = draw(config, n=40, side=side, batch_size=40)
    assert views.box[:, :2].min() == -pad
    assert views.box[:, :2].max() == pad
    assert (views.box[:, 2:] == side).all()
    cropped = apply_views(config, x, views, 0, slice(0, 40))
    padded = F.pad(x[views.order.long()], (pad,) * 4)
    for i, (top, left, _, _) in enumerate(views.box.tolist()):
        window = padded[i, :, top + pad : top + pad + side, left + pad : left + pad + side]
        assert torch.equal(cropped[i], window.flip(2) if views.flip[i] else window)


def test_rand_augment_comes_before_every_other_change():
    config = ViewConfig(rand_augment=2, flip=1.0)
    images = (pictures(21) * 255).round().to(torch.uint8)
    views = draw(config)
    first = rand_augment(images[views.order.long()], views.operations, 9)
    assert not torch.equal(first, images[views.order.long()])
    assert torch.equal(apply_views(config, images, views, 0, slice(0, 21)), (first.float() / 255).flip(3))
    # a view more draws nothing else again
    assert same(
        dataclasses.replace(views, operations=draw(ViewConfig(flip=1.0)).operations), draw(ViewConfig(flip=1.0))
    )


def test_nonsense_is_refused():
    for bad in (
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.5,)},
        {"crop_ratio": (2.0, 1.0)},
        {"flip": 1.5},
        {"crop_pad": 1.5},
        {"crop_pad": 0.125, "crop_scale": (0.5, 1.0)},
        {"rand_magnitude": 31},
        {"rand_augment": -1},
    ):
        with pytest.raises(InputError, match=next(iter(bad))):
            ViewConfig(**bad)


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_batches_cover_all_and_the_last_is_never_too_small(accumulate):
    for n in range(1, 70):
        for size in (1, 4, 10, 16, 100):
            spans = batches(n, size, accumulate)
            assert [i for s in spans for i in range(s.start, s.stop)] == list(range(n))
            assert all(s.stop - s.start == size for s in spans[:-1])
            if len(spans) > 1 and size >= 2 * accumulate:
                last = spans[-1].stop - spans[-1].start
                assert last < size + 2 * accumulate
                assert all(p.stop - p.start >= 2 for p in parts(last, accumulate))


def test_parts_cover_in_order_and_are_nearly_equal():
    for n in range(1, 40):
        for accumulate in (1, 2, 3, 5):
            result = parts(n, accumulate)
            assert [i for p in result for i in range(p.start, p.stop)] == list(range(n))
            sizes = [p.stop - p.start for p in result]
            assert min(sizes) >= 1
            assert max(sizes) - min(sizes) <= 1
            assert len(result) == min(n, accumulate)
    assert parts(16, 2) == [slice(0, 8), slice(8, 16)]
    assert parts(7, 2) == [slice(0, 3), slice(3, 7)]


# --- arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [7, 32])
def test_crop_is_interpolation_of_the_cut_out_box_and_its_mirror(side):
    box = draw(ViewConfig(crop_scale=(0.01, 1.0)), n=60, side=side).box
    box[0], box[1] = torch.tensor([0, 0, side, side]), torch.tensor([side - 1, 2, 1, 1])
    flip = torch.arange(60) % 2 == 1
    x = pictures(60, side)
    result = crop_and_flip(x, box, flip)
    for i, (top, left, height, width) in enumerate(box.tolist()):
        cut = x[i : i + 1, :, top : top + height, left : left + width]
        expected = F.interpolate(cut, size=(side, side), mode="bilinear", align_corners=False)
        expected = expected.flip(3) if flip[i] else expected
        assert (result[i] - expected[0]).abs().max() < 1e-5, i
    assert torch.equal(result[0], x[0])


def test_patches_are_put_where_the_order_says():
    x = pictures(5, 8)
    orders = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    orders[0] = torch.arange(4)
    result = shuffle_patches(x, orders, 2)
    assert torch.equal(result[0], x[0])
    place = [(slice(4 * (j // 2), 4 * (j // 2) + 4), slice(4 * (j % 2), 4 * (j % 2) + 4)) for j in range(4)]
    for b, order in enumerate(orders.tolist()):
        for j, p in enumerate(order):
            assert torch.equal(result[b][(..., *place[j])], x[b][(..., *place[p])])
    # nothing is lost or doubled
    assert torch.equal(result.flatten(2).sort().values, x.flatten(2).sort().values)


def test_pixels_that_no_patch_holds_stay():
    x = pictures(3, 7)
    result = shuffle_patches(x, torch.tensor([[1, 0, 3, 2]]).expand(3, -1), 2)
    assert torch.equal(result[:, :, 6], x[:, :, 6])
    assert torch.equal(result[..., 6], x[..., 6])
    assert torch.equal(result[:, :, :3, :3], x[:, :, :3, 3:6])


def test_jitter_of_one_changes_nothing_and_brightness_zero_is_black():
    x = pictures(6, 8)
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    assert torch.allclose(jitter(x, torch.ones(6, 3), orders), x, atol=1e-6)
    black = torch.ones(6, 3)
    black[:, 0] = 0
    assert jitter(x, black, orders).abs().max() < 1e-6


def test_saturation_and_contrast_zero_are_gray_and_flat():
    x = pictures(2, 8)
    luma = sum(w * x[:, c] for c, w in enumerate(GRAY))
    order = torch.tensor([[0, 1, 2]] * 2)
    gray = jitter(x, torch.tensor([[1.0, 0.0, 1.0]] * 2), order)
    assert torch.allclose(gray, luma[:, None].expand(-1, 3, -1, -1), atol=1e-6)
    flat = jitter(x, torch.tensor([[1.0, 1.0, 0.0]] * 2), order)
    assert torch.allclose(flat, luma.mean((1, 2))[:, None, None, None].expand_as(x), atol=1e-6)


def test_jitter_follows_each_image_s_own_order():
    x = pictures(1, 8).expand(2, -1, -1, -1)
    # contrast about the mean gray, then twice as bright; and the other way round
    mean = sum(w * x[0, c] for c, w in enumerate(GRAY)).mean()
    result = jitter(x, torch.tensor([[2.0, 1.0, 0.5]] * 2), torch.tensor([[2, 0, 1], [0, 2, 1]]))
    assert torch.allclose(result[0], 2 * (mean + 0.5 * (x[0] - mean)), atol=1e-5)
    assert torch.allclose(result[1], 2 * mean + 0.5 * (2 * x[0] - 2 * mean), atol=1e-5)
    tinted = jitter(x, torch.tensor([[0.5, 0.0, 1.0], [0.5, 1.0, 1.0]]), torch.tensor([[0, 1, 2]] * 2))
    assert torch.allclose(tinted[1], 0.5 * x[1], atol=1e-6)
    assert torch.allclose(tinted[0, 0], tinted[0, 1], atol=1e-6)


def test_lighting_moves_colors_along_the_principal_ones():
    shift = lighting(torch.eye(3))
    for k in range(3):
        expected = torch.tensor([v[k] for v in LIGHT_VECTORS]) * LIGHT_VALUES[k]
        assert torch.allclose(shift[k, :, 0, 0], expected, atol=1e-7)
    vectors = torch.tensor(LIGHT_VECTORS)
    assert torch.allclose(vectors.T @ vectors, torch.eye(3), atol=1e-3)


def test_cutmix_and_mixup_by_hand():
    x, other = torch.zeros(2, 1, 2, 3), torch.ones(2, 1, 2, 3)
    assert mix(x, other, 5 / 6, [1, 2, 1, 1], "cutmix").tolist() == [[[[0, 0, 0], [0, 0, 1]]]] * 2
    assert mix(x, other, 1 / 3, [0, 0, 2, 2], "cutmix").tolist() == [[[[1, 1, 0], [1, 1, 0]]]] * 2
    assert mix(x + 0.2, other, 0.75, [0, 0, 0, 0], "mixup").flatten().tolist() == pytest.approx([0.4] * 12)


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_a_mix_takes_the_partners_unmixed_and_changes_no_alias(kind):
    config = ViewConfig(mix=kind)
    images = pictures(6, 8)
    before = images.clone()
    views = draw(config, n=6, side=8, batch_size=6)
    views = dataclasses.replace(
        views,
        order=torch.arange(6, dtype=torch.int32),
        partner=torch.tensor([1, 2, 3, 4, 5, 0], dtype=torch.int16),
        kept=torch.tensor([0.75]),
        cut=torch.tensor([[0, 0, 4, 4]], dtype=torch.int16),
    )
    result = apply_views(config, images, views, 0, slice(0, 6))
    assert torch.equal(images, before)
    partners = before.roll(-1, 0)
    if kind == "mixup":
        assert torch.equal(result, 0.75 * before + 0.25 * partners)
    else:
        assert torch.equal(result[..., :4, :4], partners[..., :4, :4])
        assert torch.equal(result[..., 4:], before[..., 4:])
        assert torch.equal(result[..., 4:, :4], before[..., 4:, :4])
    batch = images[:3]
    kept = batch.clone()
    mix(batch, batch[[1, 2, 0]], 0.75, [0, 0, 4, 4], kind)
    assert torch.equal(batch, kept)


def test_views_of_8_bit_and_float_images_are_the_same():
    images = (pictures(21) * 255).round().to(torch.uint8)
    views = draw()
    for i, span in enumerate(batches(21, 8)):
        a = apply_views(ALL, images, views, i, span)
        b = apply_views(ALL, images.float() / 255, views, i, span)
        assert torch.equal(a, b)
        assert a.shape == (span.stop - span.start, 3, 16, 16)


def test_a_batch_is_its_images_one_by_one():
    config = dataclasses.replace(ALL, mix="none")
    images, views = pictures(21), draw(dataclasses.replace(ALL, mix="none"))
    whole = apply_views(config, images, views, 0, slice(0, 21))
    for i in range(21):
        assert torch.allclose(apply_views(config, images, views, 0, slice(i, i + 1))[0], whole[i], atol=1e-6)
