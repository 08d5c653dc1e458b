"""FADRM and Teddy as functions of a batch: the acceptance checks of the methods, and what users get wrong."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_teachers import MEAN, STD, TinyNet, drawn, images_of, teacher_of, trained
from torch import nn

from dq.config.refinement import FADRM, DepthConfig, Teddy
from dq.core.errors import InputError, RunError
from dq.data.views import crop_and_flip
from dq.refine import fadrm, teddy
from dq.refine.anchors import make_pool, nearest_anchors
from dq.refine.batches import compose_batches
from dq.refine.matched import calibrate, match_teachers
from dq.refine.measure import measure, total_variation
from dq.refine.method import Batch, Session
from dq.refine.optimize import class_distance
from dq.refine.views import Schedule, StepViews, View, apply_view, draw_view, resample

LABELS = torch.arange(8) % 4
mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))


@pytest.fixture(scope="module")
def teacher():
    return trained()


@pytest.fixture(scope="module")
def images():
    return images_of(LABELS, seed=5)


def short(**settings) -> FADRM:
    """A refinement of three blocks of 16 px."""
    return FADRM(**{"sizes": (16,) * 3, "steps": (4,) * 3, "lr": 0.05, "batch_size": 8, "jitter": 2, **settings})


def run(images, teachers, config, labels=LABELS, *, anchors=None, matched=None, retrieve=None, **session):
    batch = Batch(images, labels, anchors=anchors)
    return fadrm.refine(batch, config, teachers, Session(**session), matched=matched, retrieve=retrieve)


class Watching(TinyNet):
    """Notes the sides of what it is shown while gradients are recorded, and by whom."""

    def __init__(self, log: list, name: str) -> None:
        super().__init__()
        self.log, self.name = log, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.log.append((self.name, x.shape[-1]))
        return super().forward(x)


def watching(number: int):
    log: list[tuple[str, int]] = []
    return [teacher_of(drawn(Watching(log, str(i)), i), f"watch{i}") for i in range(number)], log


# --- fadrm --------------------------------------------------------------------------------------------------------


def test_loss_is_lower_after_than_before(teacher, images):
    other = (LABELS + 1) % 4
    refined = run(images, [teacher], short(steps=(60, 60, 60)), labels=other)
    loss = refined.trace.sum(1)
    assert loss[-10:].mean() < 0.5 * loss[:10].mean()
    with torch.no_grad():
        before, after = (F.cross_entropy(teacher(x), other) for x in (images, refined.images))
    assert after < 0.5 * before


def plain_loop(images, teachers, config, anchor, seed):
    """The released recipe written out: hooks, one Adam per block, `interpolate`, channel by channel."""
    x = (anchor - mean) / std
    trace, step, total = [], 0, sum(config.steps)
    for block, (size, steps) in enumerate(zip(config.sizes, config.steps, strict=True)):
        if block:
            x, back = (F.interpolate(v, (size, size), mode="bilinear") for v in (x, (anchor - mean) / std))
            x = config.alpha * x + (1 - config.alpha) * back
        elif size != x.shape[-1]:
            x = F.interpolate(x, (size, size), mode="bilinear")
        x = x.detach().clone().requires_grad_(True)
        optimizer = torch.optim.Adam([x], lr=config.lr, betas=config.betas, eps=1e-8)
        for _ in range(steps):
            optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * step / total)) * config.lr
            net, losses = teachers[step % len(teachers)].net, []
            norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
            hooks = [m.register_forward_hook(lambda m, args, out, to=losses: to.append((m, args[0]))) for m in norms]
            view = draw_view(config, size, config.jitter, seed=seed, step=step)
            top, left, height, width = view.box
            crop = x[:, :, top : top + height, left : left + width]
            seen = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
            seen = torch.roll(seen.flip(3) if view.flip else seen, view.shift, (2, 3))
            entropy = F.cross_entropy(net(seen), LABELS)
            statistics = torch.zeros(())
            for i, (m, f) in enumerate(losses):
                parts = m.running_var - f.var((0, 2, 3), unbiased=False), m.running_mean - f.mean((0, 2, 3))
                distance = sum(p.norm() if config.norm == "l2" else p.square().sum() for p in parts)
                statistics = statistics + (1 if i else config.first_bn_weight) * distance
            for h in hooks:
                h.remove()
            optimizer.zero_grad()
            (entropy + config.r_bn * statistics).backward()
            optimizer.step()
            with torch.no_grad():
                for c in range(3):
                    x[:, c].clamp_(-MEAN[c] / STD[c], (1 - MEAN[c]) / STD[c])
            trace.append([entropy.item(), config.r_bn * statistics.item()])
            step += 1
    return (x.detach() * std + mean), torch.tensor(trace)


@pytest.mark.parametrize("settings", [{}, {"norm": "squared", "first_bn_weight": 3.0}, {"betas": (0.9, 0.99)}])
def test_the_walk_is_that_of_a_plain_loop(images, settings):
    teachers = [trained(0), trained(1)]
    for t in teachers:
        t.net.requires_grad_(False)
    config = short(sizes=(12, 16, 16), steps=(5, 4, 6), lr=0.01, **settings)
    anchor = images.clone()
    anchor[0] = (anchor[0] > 0.5).float()  # at the bounds of pixels, where steps end
    expected, losses = plain_loop(images, teachers, config, anchor, seed=3)
    refined = run(images, teachers, config, anchors=anchor, seed=3)
    torch.testing.assert_close(refined.trace[:, :2], losses, rtol=1e-4, atol=1e-4)
    # half of the rate, for the few pixels whose gradient vanishes and whose step is a sign of rounding
    assert (refined.images - expected).abs().max() < 0.005 * max(STD)
    assert (refined.images - expected).abs().mean() < 1e-5


def test_alpha_1_is_a_run_without_residual(teacher, images):
    merged = run(images, [teacher], short(alpha=1.0))
    other = run(images, [teacher], short(alpha=1.0), anchors=None, retrieve=lambda x, merge: torch.rand_like(x))
    assert torch.equal(merged.images, other.images)  # nothing of an anchor comes in
    assert not torch.equal(merged.images, run(images, [teacher], short(alpha=0.5)).images)


def test_alpha_0_leaves_the_resampled_anchor_after_an_injection(teacher, images):
    anchor = images_of(LABELS, seed=9)
    sizes = (16, 12, 16)
    config = short(alpha=0.0, sizes=sizes, steps=(3, 1, 1), lr=0.0)  # no step moves a pixel
    refined = run(images, [teacher], config, anchors=anchor)
    expected = resample(resample(anchor, 12), 16)
    torch.testing.assert_close(refined.blocks[2], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        refined.blocks[3], anchor, rtol=0, atol=1e-5
    )  # from the anchor, not from its small copy


def test_nothing_is_merged_behind_the_last_block(teacher, images):
    one = run(images, [teacher], short(sizes=(16,), steps=(5,), alpha=0.0))
    other = run(images, [teacher], short(sizes=(16,), steps=(5,), alpha=1.0))
    assert torch.equal(one.images, other.images)
    assert not torch.equal(one.images, images)


def test_the_learning_rate_is_one_cosine_and_every_block_has_a_fresh_adam(teacher, images):
    config = fadrm.resolve(short(steps=(1, 1, 1), alpha=1.0, lr=0.04, crop_scale=(), flip=0.0), side=16, teachers=1)
    inner = images * 0.4 + 0.3  # far from the bounds of pixels
    refined = run(inner, [teacher], config)
    for step in range(3):
        rate = 0.5 * (1 + math.cos(math.pi * step / 3)) * 0.04
        assert fadrm.schedule_of(config).rate(step) == pytest.approx(rate)
        # a first step of Adam is the rate times the sign of the gradient; with old moments it would be another
        moved = ((refined.blocks[step + 1] - refined.blocks[step]) / std).abs()
        assert moved.max().item() == pytest.approx(rate, rel=1e-3)
        assert moved.median().item() == pytest.approx(rate, rel=1e-3)


def test_teachers_take_turns_across_blocks_and_see_the_sizes_of_the_blocks(images):
    teachers, log = watching(3)
    config = short(sizes=(12, 16, 12, 16), steps=(2, 3, 1, 4))
    refined = run(images, teachers, config)
    assert [int(name) for name, _ in log] == [t % 3 for t in range(10)]
    assert [side for _, side in log] == [12] * 2 + [16] * 3 + [12] + [16] * 4
    assert refined.images.shape == images.shape


def test_pixels_stay_in_range(teacher, images):
    refined = run(images, [teacher], short(lr=2.0))
    assert refined.images.min() >= 0
    assert refined.images.max() <= 1
    assert (refined.images == 0).any()  # the bound was met


def test_the_statistics_term_is_linear_in_its_weight(teacher, images):
    traces = [run(images, [teacher], short(r_bn=r, lr=0.0)).trace for r in (0.01, 0.03)]
    torch.testing.assert_close(3 * traces[0][:, 1], traces[1][:, 1])
    assert torch.equal(traces[0][:, 0], traces[1][:, 0])


def test_a_run_repeats_under_its_seed_and_leaves_teachers_alone(teacher, images):
    before = {k: v.clone() for k, v in teacher.net.state_dict().items()}
    state = torch.get_rng_state()
    teacher.net.train()
    one = run(images, [teacher], short(), seed=3)
    assert teacher.net.training
    teacher.net.eval()
    two = run(images, [teacher], short(), seed=3)
    assert torch.equal(one.images, two.images)
    assert not torch.equal(one.images, run(images, [teacher], short(), seed=4).images)
    assert all(torch.equal(v, teacher.net.state_dict()[k]) for k, v in before.items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("stop", [1, 2])
def test_an_interrupted_batch_ends_bit_equal(teacher, images, stop):
    config = short(sizes=(12, 16, 16))
    kept = []
    whole = run(images, [teacher], config, save=kept.append)
    assert [p.facts["block"] for p in kept] == [1, 2]
    again = run(images, [teacher], config, resume=kept[stop - 1])
    assert torch.equal(whole.images, again.images)
    assert torch.equal(whole.trace, again.trace)
    assert torch.equal(whole.blocks, again.blocks)


def test_bfloat16_and_float16_come_near(teacher, images):
    one = run(images, [teacher], short(lr=0.01))
    for dtype in ("bfloat16", "float16"):
        refined = run(images, [teacher], short(lr=0.01, dtype=dtype))
        assert refined.precision == dtype
        assert refined.images.dtype == torch.float32
        torch.testing.assert_close(refined.trace.sum(1), one.trace.sum(1), rtol=0.05, atol=0.05)
        assert not torch.equal(refined.trace, one.trace)


def test_overflow_in_float16_falls_back_to_float32(images, caplog):
    net = drawn(TinyNet())
    with torch.no_grad():
        net.conv1.weight.mul_(3e5)  # features of over 65,504, which the norm behind brings back
        net.bn1.running_mean.mul_(3e5)
        net.bn1.running_var.mul_(9e10)
    kept = []
    refined = run(images, [teacher_of(net)], short(dtype="float16", r_bn=1e-6), save=kept.append)
    assert refined.precision == "float32"
    again = run(images, [teacher_of(net)], short(dtype="float16", r_bn=1e-6), resume=kept[0])
    assert torch.equal(refined.images, again.images)  # it does not go back to float16
    assert again.precision == "float32"
    assert "done again in float32" in caplog.text
    assert torch.equal(refined.images, run(images, [teacher_of(net)], short(r_bn=1e-6)).images)


def test_a_scale_that_is_far_too_large_costs_no_step(images):
    """Gradients overflow until the scale has come down; the steps lost to that are walked again."""
    net = drawn(TinyNet())
    with torch.no_grad():
        net.head.weight.mul_(100)
    teacher = teacher_of(net)
    config = short(alpha=1.0, lr=0.02)
    kept = []
    refined = run(images, [teacher], dataclasses.replace(config, dtype="float16"), save=kept.append)
    exact = run(images, [teacher], config)
    moved = [(x.blocks[1] - x.blocks[0]).abs().mean() for x in (refined, exact)]
    assert float(moved[0]) == pytest.approx(float(moved[1]), rel=0.02)
    assert refined.precision == "float16"
    assert kept[0].facts["scale"] < 65536
    steps: list[bool] = []
    net.register_forward_pre_hook(lambda *_: steps.append(torch.is_grad_enabled()))
    again = run(images, [teacher], dataclasses.replace(config, dtype="float16"), resume=kept[0])
    assert torch.equal(refined.images, again.images)
    assert sum(steps) == sum(config.steps[1:])  # with the scale that was reached no step is lost


def test_a_loss_that_is_no_number_is_said(images):
    net = drawn(TinyNet())
    with torch.no_grad():
        net.head.bias[1] = float("nan")
    with pytest.raises(RunError, match=r"step 0 of 12 \(teacher tiny, float32\); .*lr"):
        run(images, [teacher_of(net)], short())


def test_one_teachers_normalization_holds_the_pixels_and_each_sees_its_own(images):
    net = drawn(TinyNet())
    own = teacher_of(net)
    other = dataclasses.replace(own, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    config = short(sizes=(16,), steps=(2,), crop_scale=(), flip=0.0, jitter=0, lr=0.0)
    trace = run(images, [own, other], config).trace
    with torch.no_grad():
        entropies = [F.cross_entropy(t(images), LABELS) for t in (own, other)]
    torch.testing.assert_close(trace[:, 0], torch.stack(entropies))


def test_start_and_anchor_are_told_apart(teacher, images):
    anchor = images_of(LABELS, seed=9)
    still = short(lr=0.0, sizes=(16, 16), steps=(1, 1))
    from_anchor = run(images, [teacher], still, anchors=anchor)
    from_image = run(images, [teacher], dataclasses.replace(still, start="image"), anchors=anchor)
    torch.testing.assert_close(from_anchor.images, anchor, rtol=0, atol=1e-5)
    torch.testing.assert_close(from_image.images, (images + anchor) / 2, rtol=0, atol=1e-5)


def test_a_merge_may_ask_for_its_anchors(teacher, images):
    merges = []

    def retrieve(x, merge):
        merges.append((x, merge))
        return torch.full_like(x, 0.25)

    refined = run(images, [teacher], short(alpha=0.0, lr=0.0), retrieve=retrieve)
    assert [merge for _, merge in merges] == [0, 1]
    torch.testing.assert_close(merges[0][0], images, rtol=0, atol=1e-5)
    torch.testing.assert_close(refined.images, torch.full_like(images, 0.25), rtol=0, atol=1e-5)


def test_the_nearest_candidate_of_the_class_is_retrieved(teacher, images):
    by_class = [(images_of(torch.full((5,), c), seed=c) * 255).round().to(torch.uint8) for c in range(4)]
    pool = make_pool(by_class, teacher)
    wanted = torch.stack([by_class[c][i] for c, i in ((2, 3), (0, 1), (2, 0))]).float() / 255
    anchors = nearest_anchors(wanted, torch.tensor([2, 0, 2]), pool, teacher, 0.0)
    assert torch.equal(anchors, wanted)  # the image itself is in the pool
    calm = nearest_anchors(wanted, torch.tensor([2, 0, 2]), pool, teacher, 1e6)
    least = [by_class[c][int(total_variation(by_class[c]).argmin())] for c in (2, 0, 2)]
    assert torch.equal(calm, torch.stack(least).float() / 255)


def test_depth_scale_keeps_the_size_of_the_statistics_term(teacher, images):
    full = run(images, [teacher], short(lr=0.0))
    deep = run(images, [teacher], short(lr=0.0, depth=DepthConfig(drop=0.34)))
    bare = run(images, [teacher], short(lr=0.0, depth=DepthConfig(drop=0.34, renorm="none")))
    assert deep.trace[0, 1].item() == pytest.approx(full.trace[0, 1].item(), rel=1e-4)
    assert bare.trace[0, 1] < full.trace[0, 1]
    # the factor is frozen: later steps differ from the full sum, and by the same factor from the bare one
    torch.testing.assert_close(deep.trace[:, 1] / bare.trace[:, 1], (deep.trace[0, 1] / bare.trace[0, 1]).expand(12))


def test_calibration_gives_every_teacher_the_same_say(images):
    wide = drawn(TinyNet(), 1)
    with torch.no_grad():
        for m in wide.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.mul_(30)
    teachers = [teacher_of(drawn(TinyNet(), 0)), teacher_of(wide)]
    config = fadrm.resolve(short(bn_share=0.5), side=16, teachers=2)
    schedule = fadrm.schedule_of(config)
    matched = match_teachers(teachers, config, side=16, sizes=(16,))
    rates = calibrate(matched, images, config, schedule, 4, seed=0)
    assert rates[1] < rates[0] / 3
    still = dataclasses.replace(config, lr=0.0, steps=(16, 16, 16))
    matched = [dataclasses.replace(c, r_bn=r) for c, r in zip(matched, rates, strict=True)]
    terms = run(images, teachers, still, matched=matched).trace[:, 1]
    for turn in (terms[0::2], terms[1::2]):
        assert turn.mean().item() == pytest.approx(0.5 * math.log(4), rel=0.2)
    assert calibrate(matched, images, dataclasses.replace(config, bn_share=None), schedule, 4, seed=0) == rates


def test_presets_are_the_released_recipes():
    def settings(preset, side, teachers):
        c = fadrm.resolve(FADRM(preset=preset), side=side, teachers=teachers)
        return c.sizes, c.steps, c.lr, c.batch_size, c.jitter

    blocks = (500,) * 4
    assert settings("cifar100", 32, 1) == ((32,) * 4, blocks, 0.25, 100, 4)
    assert settings("cifar10", 32, 4) == ((32,) * 4, blocks, 0.25, 10, 4)
    assert settings("tinyimagenet", 64, 1) == ((64, 64), (500, 500), 0.01, 100, 4)
    assert settings("tinyimagenet", 64, 4) == ((64,) * 4, blocks, 0.25, 100, 4)
    assert settings("imagenette", 224, 1) == ((200, 224, 200, 224), blocks, 0.05, 10, 32)
    assert settings("imagenette", 224, 3) == ((200, 224, 200, 224), blocks, 0.25, 10, 32)
    assert settings("imagewoof", 224, 1) == ((200, 224, 200, 224), blocks, 0.25, 10, 32)
    assert settings("imagenet1k", 224, 1) == ((200, 224, 200, 224), blocks, 0.25, 100, 32)
    assert settings(None, 32, 1) == ((32,) * 4, blocks, 0.25, 100, 4)
    assert settings(None, 128, 1) == ((114, 128, 114, 128), blocks, 0.25, 100, 18)


def test_what_is_set_wins_over_the_preset():
    c = fadrm.resolve(FADRM(preset="imagenet1k", steps=(10, 20), lr=0.1), side=224, teachers=1)
    assert (c.sizes, c.steps, c.lr, c.batch_size) == ((200, 224), (10, 20), 0.1, 100)
    c = fadrm.resolve(FADRM(sizes=(24, 32)), side=32, teachers=1)
    assert c.steps == (500, 500)
    assert fadrm.resolve(c, side=32, teachers=1) == c


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": (32, 32), "steps": (1, 1, 1)}, r"sizes=\[32, 32\] has 2 blocks but steps=\[1, 1, 1\] has 3"),
        ({"sizes": (32, 24)}, r"the last of sizes=\[32, 24\] must be the side of the images, 32 px"),
        ({"alpha": 1.1}, r"alpha must be a number in \[0, 1\], not 1.1"),
        ({"alpha": -0.1}, r"alpha must be a number in \[0, 1\], not -0.1"),
        ({"steps": ()}, r"steps must list whole numbers of at least 1"),
        ({"preset": "cifar"}, r"unknown preset 'cifar'; did you mean 'cifar100'|'cifar10'"),
        ({"preset": "imagenet1k"}, r"preset 'imagenet1k' is for images of 224 px, not 32"),
        ({"anchors": "file"}, r"anchors=file and anchor_path belong together"),
        ({"crop_scale": (0.5, 0.1)}, r"crop_scale must be two shares"),
        ({"betas": (0.5,)}, r"betas must be two decays"),
        ({"bn_share": 0.0}, r"bn_share must be a number of more than 0 or 'off', not 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        fadrm.resolve(FADRM(**settings), side=32, teachers=1)


def test_teachers_that_do_not_fit_are_refused(images):
    with pytest.raises(InputError, match="needs a teacher"):
        run(images, [], short())
    bare = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 16 * 16, 4)).eval()
    with pytest.raises(InputError, match=r"no teacher has batch norm \(bare\).*r_bn=0"):
        run(images, [teacher_of(bare, "bare")], short())
    with pytest.raises(InputError, match=r"bare cannot see images of 12 px .*set sizes to the side"):
        run(images, [teacher_of(bare, "bare"), trained()], short(sizes=(12, 16, 16)))


@pytest.mark.parametrize(
    ("batch", "labels", "message"),
    [
        (lambda x: (x * 255).to(torch.uint8), LABELS, "float images"),
        (lambda x: x * 2 - 1, LABELS, r"must lie in \[0, 1\]; a decoder's \[-1, 1\] has to be shifted"),
        (lambda x: x, LABELS + 1, "labels go from 1 to 4 but a teacher has 4 outputs"),
        (lambda x: x, LABELS[:3], r"labels \(B,\)"),
    ],
)
def test_batches_that_are_none_are_refused(teacher, images, batch, labels, message):
    with pytest.raises(InputError, match=message):
        run(batch(images), [teacher], short(), labels=labels)


def test_settings_that_need_a_run_are_refused_for_a_batch_alone(teacher, images):
    for settings in ({"bn_share": 1.0}, {"class_weight": 1.0}, {"depth": DepthConfig(drop=None)}):
        with pytest.raises(InputError, match="worked out by a run"):
            run(images, [teacher], short(**settings))
    with pytest.raises(InputError, match="worked out by a run"):
        teddy.refine(Batch(images, LABELS), tender(bn_share=1.0), [teacher])
    for settings in ({"anchors": "real_patch"}, {"retrieve": "patches"}):
        with pytest.raises(InputError, match="are read by a run"):
            run(images, [teacher], short(**settings))


def test_the_ratio_of_depths_knows_the_weights_of_images(teacher, images):
    weights = torch.tensor([8.0, 1, 1, 1, 1, 1, 1, 1])

    def first(**settings) -> float:
        config = short(lr=0.0, weighted=True, **settings)
        return fadrm.refine(Batch(images, LABELS, weights), config, [teacher]).trace[0, 1].item()

    assert first(depth=DepthConfig(drop=0.34)) == pytest.approx(first(), rel=1e-4)


def test_a_teacher_without_batch_norm_adds_its_cross_entropy(teacher, images):
    bare = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 16 * 16, 4)).eval()
    trace = run(images, [teacher, teacher_of(bare, "bare")], short()).trace
    assert (trace[0::2, 1] > 0).all()
    assert (trace[1::2, 1] == 0).all()
    assert (trace[:, 0] > 0).all()
    alone = run(images, [teacher_of(bare, "bare")], short(r_bn=0.0))
    assert (alone.trace[:, 1] == 0).all()


def test_a_teacher_with_a_side_of_its_own_sees_every_block(images):
    bare = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16 * 16, 4)).eval()
    refined = run(images, [teacher_of(bare, "bare", image_size=16)], short(sizes=(12, 16, 16)))
    assert refined.images.shape == images.shape


# --- views --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [(0, 0), (3, 1)])
def test_a_look_is_crop_resize_mirror_roll(images, flip, shift):
    box = (2, 3, 9, 11)
    viewed = apply_view(images, View(box, flip, shift))
    crop = images[:, :, 2:11, 3:14]
    expected = F.interpolate(crop, (16, 16), mode="bilinear", antialias=True)
    expected = torch.roll(expected.flip(3) if flip else expected, shift, (2, 3))
    torch.testing.assert_close(viewed, expected, rtol=0, atol=1e-5)
    boxes = torch.tensor([box]).expand(8, -1)
    each = crop_and_flip(images, boxes, torch.full((8,), flip))
    torch.testing.assert_close(viewed, torch.roll(each, shift, (2, 3)), rtol=0, atol=1e-6)
    whole = apply_view(images, View((0, 0, 16, 16), flip, shift))
    assert torch.equal(whole, torch.roll(images.flip(3) if flip else images, shift, (2, 3)))


def test_views_are_drawn_by_step_alone_and_within_their_ranges():
    config = FADRM()
    views = [draw_view(config, 32, 4, seed=1, step=t) for t in range(300)]
    assert views == [draw_view(config, 32, 4, seed=1, step=t) for t in range(300)]
    assert {v.shift[0] for v in views} == {v.shift[1] for v in views} == {0, 1, 2, 3, 4}
    assert 0.35 < sum(v.flip for v in views) / 300 < 0.65
    areas = [v.box[2] * v.box[3] / 32**2 for v in views]
    assert min(areas) < 0.15
    assert max(areas) > 0.9
    assert all(
        v.box == (0, 0, 32, 32) for v in [draw_view(FADRM(crop_scale=()), 32, 4, seed=1, step=t) for t in (0, 1)]
    )


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("number", [1, 5, 64])
def test_views_of_many_steps_are_those_of_each_bit_for_bit(images, monkeypatch, side, number):
    monkeypatch.setattr("dq.refine.views.VIEW_BYTES", number * 8 * side * side)
    config, x = FADRM(crop_scale=(0.9, 1.0)), resample(images, side)
    views = StepViews(config, side, 3, seed=1, device=x.device)
    steps = [*range(70), 3, 4, 200, 5]  # a block that is done again goes back
    drawn_views = [draw_view(config, side, 3, seed=1, step=t) for t in steps]
    assert {v.box[2:] == (side, side) for v in drawn_views} == {True, False}
    for step, view in zip(steps, drawn_views, strict=True):
        assert torch.equal(views.apply(x, step), apply_view(x, view)), step


# --- batches ------------------------------------------------------------------------------------------------------


def test_one_image_of_every_class_makes_a_batch():
    batches = compose_batches([3] * 10, 10)
    assert batches == [[(c, i) for c in range(10)] for i in range(3)]
    assert compose_batches([1] * 100, 50) == [[(c, 0) for c in range(50)], [(c, 0) for c in range(50, 100)]]


@pytest.mark.parametrize("compose", ["index", "dealt"])
@pytest.mark.parametrize(("counts", "size"), [([7] * 12, 25), ([5, 9, 7, 8, 6, 8], 12), ([2] * 30, 17)])
def test_every_image_is_in_one_batch_and_no_batch_is_a_small_rest(compose, counts, size):
    batches = compose_batches(counts, size, compose=compose, min_classes=5)
    assert sorted(row for b in batches for row in b) == [(c, r) for c, n in enumerate(counts) for r in range(n)]
    assert max(map(len, batches)) <= size
    assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_a_batch_of_too_few_classes_is_refused():
    with pytest.raises(InputError, match=r"batch 6 of 7 .* 1 class, fewer than 5: .*batch_size"):
        compose_batches([20] + [5] * 9, 10)
    batches = compose_batches([20] + [5] * 9, 10, compose="dealt")
    assert min(len({c for c, _ in b}) for b in batches) >= 5
    assert compose_batches([4, 4, 4], 3) == [[(c, r) for c in range(3)] for r in range(4)]  # there are but three


# --- teddy --------------------------------------------------------------------------------------------------------


def tender(**settings) -> Teddy:
    return Teddy(**{"steps": 60, "lr": 0.03, "batch_size": 8, **settings})


def test_teddy_lowers_the_loss_and_labels_by_the_ensemble(images):
    pool = [dataclasses.replace(trained(i), weight=w) for i, w in ((0, 0.9), (1, 0.3))]
    refined = teddy.refine(Batch(images, LABELS), tender(proximity=0.0, r_bn=0.05), pool)
    loss = refined.trace.sum(1)
    assert loss[-20:].mean() < loss[:20].mean()
    with torch.no_grad():
        logits = [t(refined.images) for t in pool]
    torch.testing.assert_close(refined.soft_labels, 0.75 * logits[0] + 0.25 * logits[1])
    assert teddy.refine(Batch(images, LABELS), tender(steps=1, ensemble_labels=False), pool).soft_labels is None


def test_teddy_without_steps_only_labels(images, teacher):
    refined = teddy.refine(Batch(images, LABELS), tender(steps=0), [teacher], labelers=[trained(1)])
    assert torch.equal(refined.images, images)
    assert refined.trace.shape == (0, 4)
    torch.testing.assert_close(refined.soft_labels, trained(1)(images))


def test_proximity_holds_images_near_their_start(images, teacher):
    far, near = (teddy.refine(Batch(images, LABELS), tender(proximity=p), [teacher]).images for p in (0.0, 100.0))
    assert (near - images).square().mean() < 0.2 * (far - images).square().mean()


def test_teddys_teachers_are_drawn_uniformly(images):
    teachers, log = watching(3)
    teddy.refine(Batch(images, LABELS), tender(steps=150, ensemble_labels=False), teachers, Session(seed=2))
    counts = [sum(name == str(i) for name, _ in log) for i in range(3)]
    assert sum(counts) == 150
    assert min(counts) > 30  # 50 expected, deviation 5.8
    order = [name for name, _ in log]
    assert order != sorted(order)


def test_class_means_are_matched(images):
    features = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.stack([features[c == LABELS].mean(0) for c in range(4)])
    assert class_distance(features, LABELS, targets).item() == pytest.approx(0, abs=1e-6)
    moved = targets + torch.tensor([3.0, 4.0, 0, 0, 0])
    assert class_distance(features, LABELS, moved).item() == pytest.approx(5, rel=1e-5)
    # a class that is not in the batch counts for nothing
    moved[3] = 1e6
    keep = LABELS != 3
    assert class_distance(features[keep], LABELS[keep], moved).item() == pytest.approx(5, rel=1e-5)


def test_the_class_term_pulls_features_to_their_means(images, teacher):
    targets = torch.stack([teacher.features(images_of(torch.full((40,), c))).mean(0) for c in range(4)])
    config = tender(class_weight=1.0, r_bn=0.0, steps=80)
    matched = match_teachers([teacher], config, side=16, sizes=(16,), class_means=[targets])
    trace = teddy.refine(Batch(images, LABELS), config, [teacher], matched=matched).trace
    assert trace[-20:, 2].mean() < 0.8 * trace[:20, 2].mean()
    assert (trace[:, 1] == 0).all()


def test_weights_of_images_enter_the_statistics(images, teacher):
    weights = torch.tensor([8.0, 1, 1, 1, 1, 1, 1, 1])
    plain = tender(lr=0.0, steps=1, crop_scale=(), flip=0.0, jitter=0)
    weighted = dataclasses.replace(plain, weighted=True)
    one = teddy.refine(Batch(images, LABELS, weights), weighted, [teacher]).trace[0, 1]
    repeated = torch.cat([images[:1].expand(7, -1, -1, -1), images])
    labels = torch.cat([LABELS[:1].expand(7), LABELS])
    two = teddy.refine(Batch(repeated, labels), plain, [teacher]).trace[0, 1]
    torch.testing.assert_close(one, two)
    off = teddy.refine(Batch(images, LABELS, weights), plain, [teacher]).trace[0, 1]
    assert off != one


# --- measures -----------------------------------------------------------------------------------------------------


def test_measures_of_known_images(teacher):
    flat = torch.full((2, 3, 4, 4), 0.5)
    stripes = torch.zeros(2, 3, 4, 4)
    stripes[:, :, ::2] = 1.0
    assert total_variation(flat).tolist() == [0, 0]
    assert total_variation(stripes).tolist() == [127.5, 127.5]  # 255 down, 0 across
    assert torch.equal(total_variation((stripes * 255).to(torch.uint8)), total_variation(stripes))
    labels = LABELS[:4]
    x = images_of(labels)
    measures = measure(x, labels, (x - 0.1).clamp(min=-1), [teacher], [])
    assert measures["anchor_distance"] == pytest.approx(4 * 25.5, rel=1e-4)
    assert measures["teachers"][0]["hits"] == int((teacher.logits(x).argmax(1) == labels).sum())
    assert measures["validation_teachers"] == []


def test_a_schedule_is_one_cosine_to_zero():
    schedule = Schedule((8, 8), (3, 5), 0.2)
    assert schedule.rate(0) == 0.2
    assert schedule.rate(4) == pytest.approx(0.1)
    assert schedule.rate(7) == pytest.approx(0.1 * (1 + math.cos(math.pi * 7 / 8)))


# --- accelerators -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_gpu_walks_as_the_cpu_does(images, dtype):
    teacher = trained()
    config = short(lr=1e-4)  # so small that rounding does not change the way
    here = run(images, [teacher], config)
    on_device = teacher_of(trained().net.cuda())
    refined = run(images, [on_device], dataclasses.replace(config, dtype=dtype))
    assert refined.images.device.type == "cpu"
    assert refined.precision == dtype
    tolerance = 1e-3 if dtype == "float32" else 0.05
    torch.testing.assert_close(refined.trace, here.trace, rtol=tolerance, atol=tolerance)
