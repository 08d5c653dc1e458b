"""Students: weighted and soft losses, recipes, resumed trainings, looks, augmentation, and statistics of results."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dq.config.protocols import student_config
from dq.config.students import RelabelConfig, StudentConfig, ViewConfig
from dq.core.errors import InputError, RunError
from dq.core.seeds import derive_seed
from dq.data import augment as aug
from dq.data.coresets import random_rows
from dq.data.views import draw_views, parts
from dq.evaluation.statistics import format_mean_std, mean_std, paired_difference
from dq.evaluation.student import RealImages, train_student
from dq.labels.plan import EpochLabels, LabelPlan
from dq.networks.losses import image_losses
from dq.networks.optimizers import make_optimizer
from dq.networks.schedule import evaluation_epochs, learning_rate
from dq.networks.training import Checkpoint, Fitted, TrainingSet, accuracy, fit, normalizer
from dq.networks.zoo import make_net, move_net

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
PIXELS = normalizer(MEAN, STD)
WHOLE_STEP = StudentConfig(lr=0.2, schedule="step")
PLAIN = StudentConfig(epochs=6, batch_size=16, augment="none", schedule="constant", tests=3)


def stripes(n: int, seed: int, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Four linearly separable classes: horizontal, vertical and diagonal stripes and a checkerboard, with noise."""
    g = torch.Generator().manual_seed(seed)
    i, j = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    patterns = torch.stack([i // 2 % 2, j // 2 % 2, (i + j) // 2 % 2, (i + j) % 2]).float()
    labels = torch.arange(n) % 4
    images = 0.3 + 0.4 * patterns[labels][:, None] + 0.2 * torch.rand(n, 3, side, side, generator=g)
    return (images * 255).to(torch.uint8), labels


def train(config: StudentConfig = PLAIN, *, n: int = 24, data=None, seed: int = 0, **changes):
    """A student on stripes; returns the result and the training loss of every epoch."""
    images, labels = data or stripes(n, 0)
    losses: list[float] = []
    real = {"test": stripes(40, 1, images.shape[-1]), "validation": stripes(40, 2, images.shape[-1])}
    real |= {k: changes.pop(k) for k in real if k in changes}
    fields = {"num_classes": 4, "pixels": PIXELS}
    fields |= {k: changes.pop(k) for k in (*fields, "weights", "soft_labels") if k in changes}
    images = images.to(changes.pop("device", "cpu"))
    options = {"seed": seed, "on_epoch": lambda epoch, loss: losses.append(loss)} | changes
    return train_student(TrainingSet(images, labels, **fields), config, RealImages(**real), **options), losses


def movement(images: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, soft=None, **changes) -> torch.Tensor:
    """What one step of plain SGD at lr 1 on a single batch takes from every parameter: the gradient."""
    config = StudentConfig(
        labels="hard" if soft is None else "fixed",
        epochs=1,
        batch_size=100,
        lr=1.0,
        momentum=0.0,
        weight_decay=0.0,
        schedule="constant",
        augment="none",
        temperature=2.0,
    )
    config = dataclasses.replace(config, **changes)
    fitted = fit(TrainingSet(images, labels, 4, PIXELS, weights=weights, soft_labels=soft), config, seed=0)
    start = make_net(config.net, 4, images.shape[-1], norm=config.norm, seed=derive_seed(0, "student init"))
    return parameters(start) - parameters(fitted.net)


def parameters(net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


# --- learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"labels": "fixed", "temperature": 4.0},
        {"labels": "fixed", "optimizer": "adamw", "lr": 0.003, "schedule": "cosine"},
        {"net": "resnet20", "lr": 0.05},
        # half a minute or more on CPUs that emulate bfloat16
        pytest.param({"augment": "crop_flip", "dtype": "bfloat16"}, marks=pytest.mark.slow),
        {"augment": "crop_flip"},
    ],
    ids=lambda c: "-".join(map(str, c.values())) or "hard",
)
def test_student_learns_separable_classes(changes):
    config = dataclasses.replace(PLAIN, epochs=30, **changes)
    images, labels = stripes(48, 0)
    soft = 8.0 * F.one_hot(labels, 4) if config.labels == "fixed" else None
    result, losses = train(config, data=(images, labels), soft_labels=soft)
    assert result.last > 0.95
    assert losses[-1] < 0.9 * losses[0]


def test_float_images_are_the_same_as_8_bit_ones():
    images, labels = stripes(24, 0)
    x, y = stripes(40, 1)
    assert train(data=(images, labels))[1] == train(data=(images.float() / 255, labels), test=(x.float() / 255, y))[1]


def test_same_seed_same_student_and_nothing_global():
    config = dataclasses.replace(PLAIN, augment="dsa")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, losses = train(config, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, losses_again = train(config, seed=3)
    assert losses == losses_again
    assert dataclasses.replace(first, train_seconds=0) == dataclasses.replace(again, train_seconds=0)
    assert losses != train(config, seed=4)[1]


def test_dropout_is_drawn_from_the_seed_of_the_student(monkeypatch):
    """Networks of timm and torchvision have dropout, which knows the global generator alone."""

    def make(*args, **options) -> torch.nn.Module:
        torch.manual_seed(7)
        layers = torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(48, 4)
        net = torch.nn.Sequential(*layers)
        torch.manual_seed(next(states))  # where the global generator stands, as far as the caller knows
        return net

    monkeypatch.setattr("dq.networks.training.make_net", make)
    states = iter((1, 2, 3))
    first, again, other = (train(seed=s)[1] for s in (0, 0, 1))
    assert first == again != other
    states = iter((4,))
    config = dataclasses.replace(PLAIN, epochs=3, lr=0.0, weight_decay=0.0, batch_size=24)
    assert len(set(train(config)[1])) == 3  # another mask in every epoch


def test_last_and_best_are_kept_apart():
    config = dataclasses.replace(PLAIN, epochs=12, lr=0.05, tests=12, select="test")
    results = [train(config, n=8, seed=s)[0] for s in range(3)]
    for r in results:
        assert [epoch for epoch, _ in r.looks] == list(range(1, 13))
        assert r.last == r.looks[-1][1]
        assert r.best == max(a for _, a in r.looks)
        assert r.best_epoch == next(e for e, a in r.looks if a == r.best)
        assert r.selected_on == "test"
        assert r.train_seconds > 0
    assert any(r.best > r.last or r.best_epoch < 12 for r in results)  # else nothing was told apart


def test_training_is_the_written_out_loop():
    """Full batches without augmentation: SGD with momentum, a tenth of the lr and fresh momentum after half time."""
    config = dataclasses.replace(PLAIN, epochs=7, batch_size=100, schedule="step", weight_decay=0.01)
    images, labels = stripes(12, 0)
    weights = torch.linspace(0.5, 1.5, 12)
    _, losses = train(config, data=(images, labels), weights=weights, seed=7)
    net = make_net("convnet3", 4, 8, seed=derive_seed(7, "student init")).train()
    x = (images.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = []
    for lr, passes in ((0.01, 5), (0.001, 2)):
        optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
        for _ in range(passes):
            loss = (weights * F.cross_entropy(net(x), labels, reduction="none")).sum() / 12
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-4)


def test_every_epoch_has_its_own_order():
    """Nothing is learnt at lr 0, so with batch norm the loss tells which images shared a batch."""
    config = dataclasses.replace(PLAIN, net="resnet20", lr=0.0, weight_decay=0.0, batch_size=12)
    assert len(set(train(config)[1])) == 6


@pytest.mark.parametrize("select", ["validation", "test"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_looking_does_not_change_training(select, ema):
    config = dataclasses.replace(PLAIN, net="resnet20", augment="dsa", select=select, ema=ema)
    often, losses = train(dataclasses.replace(config, tests=6))
    once, losses_once = train(dataclasses.replace(config, tests=1))
    assert losses == losses_once
    assert often.last == once.last


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_of_parts_are_those_of_autograd_bit_for_bit(accumulate):
    """Weights are rounded to bfloat16 once for all parts, and gradients are added for all parameters at once."""
    config = dataclasses.replace(PLAIN, epochs=1, batch_size=24, accumulate=accumulate, dtype="bfloat16", momentum=0.0)
    config = dataclasses.replace(config, net="resnet20", weight_decay=0.0, lr=0.5, optimizer="sgd")
    images, labels = stripes(24, 0)
    data = TrainingSet(images, labels, 4, PIXELS)
    trained = parameters(fit(data, config, seed=0).net)
    net = make_net("resnet20", 4, 8, seed=derive_seed(0, "student init"))
    move_net(net, "cpu")
    order = draw_views(config.views, 24, 8, batch_size=24, accumulate=accumulate, seed=0, epoch=1).order.long()
    x, y = PIXELS(images)[order], labels[order]
    for part in parts(24, accumulate):
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x[part])
        loss = F.cross_entropy(logits.float(), y[part], reduction="none").mean() * (len(y[part]) / 24)
        loss.backward()
    assert torch.equal(trained, parameters(net) - 0.5 * torch.cat([p.grad.flatten() for p in net.parameters()]))


@pytest.mark.parametrize("kind", ["dsa", "crop_flip", "frepo", "frepo_noflip", "none"])
def test_draws_of_an_epoch_are_those_of_its_batches(kind):
    images = torch.rand(60, 3, 16, 16, generator=seeded(0))
    batches = images.split(7)
    one_by_one, before = seeded(1), seeded(1)
    steps = [aug.draw_steps(kind, len(x), 16, before) for x in batches]
    for x, drawn in zip(batches, aug.steps_on_device(steps, torch.device("cpu")), strict=True):
        assert torch.equal(aug.apply_steps(x, drawn), aug.augment(kind, x, one_by_one))
    assert torch.equal(before.get_state(), one_by_one.get_state())


def test_augmentation_is_the_one_asked_for():
    losses = {kind: train(dataclasses.replace(PLAIN, augment=kind))[1] for kind in ("none", "crop_flip", "dsa")}
    assert losses["none"] != losses["crop_flip"] != losses["dsa"] != losses["none"]


def test_bfloat16_is_near_float32_but_not_it():
    _, exact = train()
    _, rounded = train(dataclasses.replace(PLAIN, dtype="bfloat16"))
    assert rounded != exact
    # bfloat16 keeps 8 bits: 0.4 % per operation, a dozen operations deep
    assert rounded == pytest.approx(exact, rel=0.05)


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["hard", "fixed"])
def test_weights_of_one_are_bit_identical_to_none(labels):
    config = dataclasses.replace(PLAIN, augment="dsa", labels=labels, batch_size=10)
    soft = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    without, losses = train(config, soft_labels=soft)
    ones, losses_ones = train(config, soft_labels=soft, weights=torch.ones(24))
    assert losses == losses_ones
    assert without.looks == ones.looks
    assert losses != train(config, soft_labels=soft, weights=torch.full((24,), 0.5))[1]


@pytest.mark.parametrize("soft", [False, True])
def test_weight_two_is_the_image_twice(soft):
    images, labels = stripes(5, 0)
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) if soft else None
    weighted = movement(images, labels, torch.tensor([1.0, 1, 2, 1, 1]), logits)
    twice = [0, 1, 2, 2, 3, 4]
    repeated = movement(images[twice], labels[twice], torch.ones(6), logits[twice] if soft else None)
    # means over 5 and over 6
    torch.testing.assert_close(5 * weighted, 6 * repeated, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(weighted, movement(images, labels, torch.ones(5), logits), rtol=1e-2)


def test_loss_is_divided_by_the_batch_and_not_by_the_weights():
    images, labels = stripes(5, 0)
    w = torch.tensor([0.5, 1, 2, 1, 1])
    torch.testing.assert_close(movement(images, labels, 2 * w), 2 * movement(images, labels, w), rtol=1e-5, atol=1e-6)


def test_an_image_of_vanishing_weight_has_no_influence():
    images, labels = stripes(24, 0)
    other_images, other_labels = images.clone(), labels.clone()
    other_images[5] = torch.arange(192).view(3, 8, 8).to(torch.uint8)
    other_labels[5] = 3 - labels[5]
    w = torch.ones(24)
    w[5] = 1e-30  # times a loss near 1, lost in a float32 sum
    config = dataclasses.replace(PLAIN, batch_size=24)
    assert train(config, data=(images, labels), weights=w)[1] == pytest.approx(
        train(config, data=(other_images, other_labels), weights=w)[1], rel=1e-6
    )
    assert train(config, data=(images, labels))[1] != train(config, data=(other_images, other_labels))[1]


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_a_mixed_batch_by_hand(mix):
    """At lr 0 the loss of an epoch is that of the initial network: (1/B) sum_i v_i l_i with
    v_i = k w_i + (1 - k) w_partner."""
    views = ViewConfig(mix=mix)
    config = dataclasses.replace(PLAIN, epochs=3, batch_size=10, lr=0.0, weight_decay=0.0, views=views)
    images, labels = stripes(10, 0)
    w = torch.linspace(0.2, 2, 10)
    _, losses = train(config, data=(images, labels), weights=w, seed=3)
    net = make_net("convnet3", 4, 8, seed=derive_seed(3, "student init"))
    kept = []
    for epoch, loss in enumerate(losses, 1):
        drawn = draw_views(views, 10, 8, batch_size=10, accumulate=1, seed=3, epoch=epoch)
        own = drawn.order.tolist()
        other = [own[j] for j in drawn.partner.tolist()]
        assert sorted(other) == sorted(own)
        k = drawn.kept.item()
        top, left, height, width = drawn.cut[0].tolist()
        expected = 0.0
        for i, j in zip(own, other, strict=True):
            x = images[i : i + 1].float() / 255
            y = images[j : j + 1].float() / 255
            if mix == "mixup":
                x = k * x + (1 - k) * y
            else:
                inside = (..., slice(top, top + height), slice(left, left + width))
                x[inside] = y[inside]
            log_p = net(PIXELS(x)).detach().log_softmax(1)[0]
            loss_i = -(k * log_p[labels[i]] + (1 - k) * log_p[labels[j]])
            expected += float((k * w[i] + (1 - k) * w[j]) * loss_i) / 10
        assert loss == pytest.approx(expected, rel=1e-5)
        kept.append(k)
    assert min(kept) < 0.99  # else nothing was mixed


# --- losses -------------------------------------------------------------------------------------------------------


def losses_of(logits, y, *, other=None, kept=1.0, teacher=None, **settings) -> list[float]:
    y = torch.tensor(y)
    other = y if other is None else torch.tensor(other)
    return image_losses(logits, y, other, kept, teacher, StudentConfig(**settings)).tolist()


HALF_AND_SURE = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])  # probabilities (1/2, 1/2) and (1/4, 3/4)


def test_kl_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, 2 * math.log(3)]])
    teacher = torch.tensor([[0.0, 2 * math.log(3)], [0.0, 2 * math.log(3)]])
    # at T = 2 the teacher says (1/4, 3/4), the first student (1/2, 1/2), the second agrees with the teacher
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    losses = losses_of(logits, [0, 0], teacher=teacher, labels="fixed", temperature=2.0, optimizer="adamw")
    assert losses == pytest.approx([kl, 0], rel=1e-5, abs=1e-7)
    # the labels of a view are the teacher's: the mix is in them already
    mixed = losses_of(
        logits, [0, 0], other=[1, 1], kept=0.3, teacher=teacher, labels="fixed", temperature=2.0, optimizer="adamw"
    )
    assert mixed == losses


def test_cross_entropy_by_hand():
    assert losses_of(HALF_AND_SURE, [0, 1]) == pytest.approx([math.log(2), math.log(4 / 3)], rel=1e-5)


def test_cross_entropy_of_a_mix_by_hand():
    result = losses_of(HALF_AND_SURE, [1, 1], other=[0, 0], kept=0.7)
    assert result == pytest.approx([math.log(2), 0.7 * math.log(4 / 3) + 0.3 * math.log(4)], rel=1e-5)
    assert losses_of(HALF_AND_SURE, [1, 1], other=[0, 0], kept=1.0) == losses_of(HALF_AND_SURE, [1, 1])


def test_mse_gt_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    teacher = torch.tensor([[1.0, -2.0], [0.0, math.log(3)]])
    settings = {"labels": "fixed", "loss": "mse_gt", "gt_weight": 0.5}
    expected = [(1 + 4) / 2 + 0.5 * math.log(2), 0.5 * math.log(4)]
    assert losses_of(logits, [0, 0], teacher=teacher, **settings) == pytest.approx(expected, rel=1e-5)
    # in a mix the class is that of the image itself, with all of the weight (EDC's code)
    mixed = losses_of(logits, [0, 0], other=[1, 1], kept=0.3, teacher=teacher, **settings)
    assert mixed == pytest.approx(expected, rel=1e-5)


def test_losses_of_bfloat16_logits_are_taken_in_float32():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.arange(6) % 4
    result = image_losses(logits, y, y, 1.0, None, PLAIN)
    torch.testing.assert_close(result, F.cross_entropy(logits.float(), y, reduction="none"))


def test_certain_fixed_labels_are_hard_labels():
    config = dataclasses.replace(PLAIN, temperature=1.0)
    _, hard = train(config)
    certain = 50.0 * F.one_hot(stripes(24, 0)[1], 4)
    _, fixed = train(dataclasses.replace(config, labels="fixed"), soft_labels=certain)
    assert fixed == pytest.approx(hard, rel=1e-4)
    assert train(config, soft_labels=torch.randn(24, 4))[1] == hard  # not asked for, not used


PLAN = LabelPlan(
    images=24,
    image_digest="",
    side=8,
    classes=4,
    teachers=(),
    epochs=6,
    batch_size=16,
    accumulate=1,
    views=ViewConfig(),
    relabel=RelabelConfig(),
    shard_epochs=6,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 8}, "batch_size=16 but the student has 8"),
        ({"accumulate": 2}, "accumulate=1 but the student has 2"),
        ({"views": ViewConfig(flip=0.5)}, "views="),
    ],
)
def test_labels_of_other_batches_are_refused(changes, message):
    def source(epoch: int) -> EpochLabels:
        return EpochLabels(PLAN, PLAN.draw(epoch), torch.zeros(24, 4))

    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(PLAIN, labels="soft", **changes), soft_labels=source)


def test_soft_labels_belong_to_positions_and_fixed_ones_to_images():
    """A source that gives every view the label of its image teaches what fixed labels teach."""
    logits = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    epochs_read = []

    def source(epoch: int) -> EpochLabels:
        epochs_read.append(epoch)
        views = draw_views(ViewConfig(), 24, 8, batch_size=16, accumulate=1, seed=0, epoch=epoch)
        return EpochLabels(PLAN, views, logits[views.order.long()])

    soft = train(dataclasses.replace(PLAIN, labels="soft"), soft_labels=source)[1]
    assert soft == train(dataclasses.replace(PLAIN, labels="fixed"), soft_labels=logits)[1]
    assert epochs_read == [1, 2, 3, 4, 5, 6]


def test_only_sgd_makes_up_for_the_temperature():
    soft = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    config = dataclasses.replace(PLAIN, labels="fixed", temperature=3.0, batch_size=24)
    first = {o: train(dataclasses.replace(config, optimizer=o), soft_labels=soft)[1][0] for o in ("sgd", "adamw")}
    assert first["sgd"] == pytest.approx(9 * first["adamw"], rel=1e-5)


# --- looks --------------------------------------------------------------------------------------------------------

WILD = dataclasses.replace(PLAIN, epochs=8, lr=0.1, tests=8)  # unsteady enough for a best epoch before the last


def test_the_best_on_validation_is_the_test_accuracy_of_that_epoch():
    chosen = []
    for seed in range(4):
        r = train(WILD, n=8, seed=seed)[0]
        assert r.selected_on == "validation"
        assert [epoch for epoch, _ in r.looks] == list(range(1, 9))
        assert r.best_epoch == next(e for e, a in r.looks if a == max(a for _, a in r.looks))
        # the schedule is constant: a shorter training is the beginning of the longer one
        again = train(dataclasses.replace(WILD, epochs=r.best_epoch, tests=1), n=8, seed=seed)[0]
        assert r.best == again.last
        chosen.append(r)
    assert any(r.best_epoch < 8 and r.best != r.last for r in chosen)  # else nothing was told apart


def test_the_test_images_choose_nothing():
    others = stripes(40, 1)[0], stripes(40, 1)[1].roll(1)
    for seed in range(3):
        a, losses = train(WILD, n=8, seed=seed)
        b, losses_b = train(WILD, n=8, seed=seed, test=others)
        assert (a.looks, a.best_epoch, losses) == (b.looks, b.best_epoch, losses_b)
        assert (a.last, a.best) != (b.last, b.best)
        c, losses_c = train(WILD, n=8, seed=seed, validation=stripes(40, 5))
        assert (c.last, losses_c) == (a.last, losses)


def test_test_images_are_used_at_the_end_alone():
    """`pixels` sees every image that a network sees."""
    test = torch.full((6, 3, 8, 8), 201, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
    seen: list[str] = []

    def pixels(x: torch.Tensor) -> torch.Tensor:
        seen.append("test" if x.dtype == torch.uint8 and bool((x == 201).all()) else "other")
        return PIXELS(x)

    epochs: list[int] = []
    config = dataclasses.replace(WILD, views=ViewConfig(flip=0.5))
    r = train(config, n=8, test=test, pixels=pixels, on_epoch=lambda epoch, loss: epochs.append(len(seen)))[0]
    assert "test" not in seen[: epochs[-1]]
    assert seen.count("test") == (1 if r.best_epoch == 8 else 2)
    assert epochs[0] < epochs[-1]
    chosen = dataclasses.replace(config, select="test")
    seen.clear()
    train(chosen, n=8, test=test, pixels=pixels)
    assert seen.count("test") == 9


def test_one_look_chooses_nothing():
    r = train(dataclasses.replace(WILD, tests=1), n=8, validation=None)[0]
    assert (r.best, r.best_epoch, r.selected_on, r.looks) == (r.last, 8, "none", ())


# --- checkpoints --------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def fitted(config: StudentConfig, on_epoch: Callable[[int, float], None], **more) -> Fitted:
    x, y = stripes(24, 0)
    held_out = stripes(40, 2)
    w = torch.linspace(0.5, 1.5, 24)
    soft = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)) if config.labels == "fixed" else None
    return fit(
        TrainingSet(x, y, 4, PIXELS, weights=w, soft_labels=soft),
        config,
        seed=1,
        evaluate=lambda net, epoch: accuracy(net, *held_out, pixels=PIXELS),
        on_epoch=on_epoch,
        **more,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "step", "augment": "dsa"},
        {"optimizer": "adamw", "schedule": "cosine", "ema": 0.9, "net": "resnet20", "lr": 0.003},
        {"optimizer": "muon", "schedule": "cosine", "net": "resnet20", "lr": 0.003},
        {"optimizer": "adamw", "ema": 0.9, "labels": "fixed", "accumulate": 2, "lr": 0.003},
        {"views": ViewConfig(crop_scale=(0.5, 1), flip=0.5, jitter=0.4, mix="cutmix"), "net": "resnet20"},
    ],
    ids=["sgd-step", "adamw-ema", "muon", "fixed-parts", "views"],
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, changes):
    config = dataclasses.replace(WILD, epochs=9, tests=9, **changes)
    whole: list[tuple[int, float]] = []
    uninterrupted = fitted(config, lambda *done: whole.append(done))
    file = tmp_path / "checkpoint.safetensors"
    seen: list[tuple[int, float]] = []

    def killed_after(epochs: int) -> Callable[[int, float], None]:
        def on_epoch(epoch: int, loss: float) -> None:
            seen.append((epoch, loss))
            if len(seen) == epochs:
                raise Killed

        return on_epoch

    # a kill before the checkpoint of an epoch is written loses this epoch; the second half of `step` begins with 6
    for epochs in (3, 7, 9):
        with pytest.raises(Killed):
            fitted(config, killed_after(epochs), checkpoint=Checkpoint(file, 0.0))
    resumed = fitted(config, lambda *done: seen.append(done), checkpoint=Checkpoint(file, 0.0))
    assert [epoch for epoch, _ in seen] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 7, 8, 9]
    assert set(seen) == set(whole)
    assert resumed.scores == uninterrupted.scores
    for a, b in (
        (resumed.net.state_dict(), uninterrupted.net.state_dict()),
        (resumed.best_state, uninterrupted.best_state),
    ):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in b)
    assert file.exists()  # its owner deletes it once the result is safe


def test_a_resumed_student_keeps_its_best_epoch(tmp_path):
    """The best look lies before the kill."""
    for seed in range(8):
        whole = train(WILD, n=8, seed=seed)[0]
        if whole.best_epoch < 7 and whole.best != whole.last:
            break
    else:
        pytest.fail("no seed has its best epoch before the kill")
    file = tmp_path / "checkpoint.safetensors"

    def kill(epoch: int, loss: float) -> None:
        if epoch == 7:
            raise Killed

    x, y = stripes(8, 0)
    held_out = stripes(40, 2)
    with pytest.raises(Killed):
        fit(
            TrainingSet(x, y, 4, PIXELS),
            WILD,
            seed=seed,
            evaluate=lambda net, epoch: accuracy(net, *held_out, pixels=PIXELS),
            on_epoch=kill,
            checkpoint=Checkpoint(file, 0.0),
        )
    assert file.exists()
    resumed, losses = train(WILD, n=8, seed=seed, checkpoint=file)
    assert len(losses) == 2
    assert dataclasses.replace(resumed, train_seconds=0) == dataclasses.replace(whole, train_seconds=0)


def first_epoch(config: StudentConfig, checkpoint: Path) -> int:
    epochs: list[int] = []
    fitted(config, lambda epoch, loss: epochs.append(epoch), checkpoint=Checkpoint(checkpoint))
    return epochs[0]


def test_a_checkpoint_of_another_training_is_not_used(tmp_path):
    file = tmp_path / "checkpoint.safetensors"

    def kill(epoch: int, loss: float) -> None:
        if epoch == 4:
            raise Killed

    with pytest.raises(Killed):
        fitted(WILD, kill, checkpoint=Checkpoint(file, 0.0))
    left = file.read_bytes()
    for changes in ({"lr": 0.04}, {"epochs": 7}, {"labels": "fixed"}):
        file.write_bytes(left)
        assert first_epoch(dataclasses.replace(WILD, **changes), file) == 1
    file.write_bytes(left)
    assert first_epoch(WILD, file) == 4


# --- parts and averages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_of_a_batch_make_the_step_of_the_whole(parts):
    """The network norms each image by itself."""
    images, labels = stripes(13, 0)
    w = torch.linspace(0.5, 2, 13)
    whole = movement(images, labels, w)
    # sums of 13 float32 terms in another order
    torch.testing.assert_close(movement(images, labels, w, accumulate=parts), whole, rtol=1e-4, atol=2e-5)


def test_batch_norm_sees_the_parts():
    images, labels = stripes(12, 0)
    whole = movement(images, labels, torch.ones(12), net="resnet20")
    assert not torch.allclose(movement(images, labels, torch.ones(12), net="resnet20", accumulate=2), whole, rtol=0.01)


def test_averaged_parameters_by_hand():
    """One batch per epoch: a = 0.8 a + 0.2 p after each step, from the initial parameters."""
    config = dataclasses.replace(PLAIN, net="resnet20", epochs=4, batch_size=24, lr=0.05)
    x, y = stripes(24, 0)
    data = TrainingSet(x, y, 4, PIXELS)
    average = parameters(make_net("resnet20", 4, 8, seed=derive_seed(2, "student init")))
    for epochs in range(1, 5):
        plain = fit(data, dataclasses.replace(config, epochs=epochs), seed=2)
        average = 0.8 * average + 0.2 * parameters(plain.net)
    averaged = fit(data, dataclasses.replace(config, ema=0.8), seed=2).net
    torch.testing.assert_close(parameters(averaged), average, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(parameters(plain.net), average, rtol=1e-2)
    # statistics of batches are those of the network in training
    for (name, a), (_, b) in zip(averaged.named_buffers(), plain.net.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_the_average_is_what_is_tested():
    """With a decay this slow the average stays at the initial parameters."""
    config = dataclasses.replace(PLAIN, epochs=8, lr=0.05, ema=0.999999, tests=8)
    r = train(config, n=8)[0]
    untrained = train(dataclasses.replace(config, lr=0.0, weight_decay=0.0, ema=0.0), n=8)[0]
    assert r.looks == untrained.looks
    assert (r.last, r.best) == (untrained.last, untrained.best)
    assert train(dataclasses.replace(config, ema=0.0), n=8)[0].last > r.last + 0.5


# --- recipe -------------------------------------------------------------------------------------------------------


def test_schedules():
    def rates(schedule: str, epochs: int) -> list[float]:
        config = StudentConfig(lr=0.2, schedule=schedule)
        return [learning_rate(config, e, epochs) for e in range(1, epochs + 1)]

    assert rates("constant", 3) == [0.2, 0.2, 0.2]
    # DC's code for E epochs: E + 1 passes, lr falls after pass E // 2 + 2
    assert rates("step", 1001) == pytest.approx([0.2] * 502 + [0.02] * 499)
    assert rates("step", 301) == pytest.approx([0.2] * 152 + [0.02] * 149)
    assert rates("step", 5) == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.02])
    assert rates("step", 1) == [0.2]
    assert rates("linear", 4) == pytest.approx([0.2, 0.15, 0.1, 0.05])
    assert rates("cosine", 4) == pytest.approx([0.2, 0.2 * (0.5 + 8**-0.5), 0.1, 0.2 * (0.5 - 8**-0.5)])
    assert rates("multistep", 6) == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.04, 0.008])
    assert rates("multistep", 12) == pytest.approx([0.2] * 8 + [0.04] * 2 + [0.008] * 2)
    for epochs in (100, 300, 1300, 1500, 2000, 3000):  # Minimax: MultiStepLR at 2 E // 3 and 5 E // 6
        falls = [
            e
            for e, (a, b) in enumerate(
                zip(rates("multistep", epochs)[:-1], rates("multistep", epochs)[1:], strict=True), 1
            )
            if b < a
        ]
        assert falls == [2 * epochs // 3, 5 * epochs // 6]
    edc = StudentConfig(lr=0.2, schedule="multistep", milestones=(0.8, 0.9, 0.95), step_factor=0.5)
    halves = [learning_rate(edc, e, 1000) for e in range(1, 1001)]  # MultiStepLR([800, 900, 950], 0.5)
    assert halves == pytest.approx([0.2] * 800 + [0.1] * 100 + [0.05] * 50 + [0.025] * 50)


def test_a_warm_up_rises_from_a_hundredth_and_the_schedule_takes_the_rest():
    """LinearLR(start_factor=0.01, total_iters=5), then CosineAnnealingLR(T_max=95): SRe2L's for Tiny-ImageNet."""
    config = StudentConfig(lr=0.2, schedule="cosine", warmup=5)
    rates = [learning_rate(config, e, 100) for e in range(1, 101)]
    assert rates[:5] == pytest.approx([0.002, 0.0416, 0.0812, 0.1208, 0.1604])
    assert rates[5:] == pytest.approx([0.1 * (1 + math.cos(math.pi * s / 95)) for s in range(95)])
    late = StudentConfig(lr=0.2, schedule="step", warmup=4)
    assert [learning_rate(late, e, 9) for e in range(5, 10)] == [learning_rate(WHOLE_STEP, e, 5) for e in range(1, 6)]


def test_schedules_are_those_of_torch():
    """Against the schedulers that the released code of Minimax, EDC and SRe2L makes."""
    schedulers = torch.optim.lr_scheduler

    def torch_rates(make, epochs: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
        scheduler = make(optimizer)
        rates = []
        for _ in range(epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    def warm(optimizer):
        parts = [
            schedulers.LinearLR(optimizer, start_factor=0.01, total_iters=5),
            schedulers.CosineAnnealingLR(optimizer, T_max=95),
        ]
        return schedulers.SequentialLR(optimizer, parts, milestones=[5])

    steps = {"milestones": (0.8, 0.9, 0.95), "step_factor": 0.5}
    for settings, epochs, make in (
        ({"schedule": "multistep"}, 300, lambda o: schedulers.MultiStepLR(o, [200, 250], 0.2)),
        ({"schedule": "multistep", **steps}, 1000, lambda o: schedulers.MultiStepLR(o, [800, 900, 950], 0.5)),
        ({"schedule": "cosine"}, 400, lambda o: schedulers.CosineAnnealingLR(o, T_max=400)),
        ({"schedule": "cosine", "warmup": 5}, 100, warm),
    ):
        config = StudentConfig(lr=0.2, **settings)
        rates = [learning_rate(config, e, epochs) for e in range(1, epochs + 1)]
        assert rates == pytest.approx(torch_rates(make, epochs), rel=1e-9, abs=1e-13)


def test_half_a_cosine_ends_at_half():
    config = StudentConfig(lr=0.2, schedule="cosine", zeta=2.0)
    assert [learning_rate(config, e, 2) for e in (1, 2)] == pytest.approx([0.2, 0.1 * (1 + 2**-0.5)])
    rates = [learning_rate(config, e, 10_000) for e in range(1, 10_001)]
    assert rates == sorted(rates, reverse=True)
    # one step before the end the slope is pi / 4 of lr per training
    assert 0.1 < rates[-1] < 0.1 + 0.2 * math.pi / 4 / 10_000 * 1.001


@pytest.mark.parametrize("zeta", [1.0, 2.0])
def test_the_broken_cosine_falls_by_six(zeta):
    whole = StudentConfig(lr=0.2, schedule="cosine", zeta=zeta)
    broken = dataclasses.replace(whole, schedule="cos2")
    for epochs in (6, 60, 300, 1000):
        last = 5 * epochs // 6 + 1  # the last epoch of the cosine: the released code says step <= 5 E / 6
        for e in range(1, last + 1):
            assert learning_rate(broken, e, epochs) == learning_rate(whole, e, epochs)
        value = 0.1 * (1 + math.cos(math.pi * 5 / 6 / zeta))
        for e in range(last + 1, epochs + 1):
            assert learning_rate(broken, e, epochs) == pytest.approx(value * (epochs - e + 1) / epochs)
        assert learning_rate(broken, last + 1, epochs) < value / 5.9


def test_the_broken_cosine_of_edc_by_its_numbers():
    """E = 300 and zeta = 2: the released lambda gives 0.6294 at step 250 and 0.1028 at step 251."""
    config = StudentConfig(lr=1.0, schedule="cos2", zeta=2.0)
    assert learning_rate(config, 251, 300) == pytest.approx(0.6294, abs=5e-5)
    assert learning_rate(config, 252, 300) == pytest.approx(0.1028, abs=5e-5)


def test_tests_are_evenly_spaced_and_end_with_the_last_epoch():
    assert evaluation_epochs(1000, 5) == [200, 400, 600, 800, 1000]
    assert evaluation_epochs(10, 3) == [4, 7, 10]
    assert evaluation_epochs(3, 5) == [1, 2, 3]
    assert evaluation_epochs(300, 1) == [300]
    with pytest.raises(InputError, match="at least once"):
        evaluation_epochs(10, 0)


def test_epochs_by_images_per_class():
    def epochs(spec, ipc: str) -> int:
        return student_config({"epochs": spec}, ipc=ipc, classes=10, image_size=32).epochs

    by_ipc = {"1": 1000, "full": 20, "default": 300}
    assert [epochs(by_ipc, k) for k in ("1", "full", "10")] == [1000, 20, 300]
    assert epochs({1: 7, "default": 3}, "1") == 7  # YAML reads bare keys as numbers
    assert epochs(5, "full") == 5
    assert student_config({}, ipc="1", classes=10, image_size=32) == StudentConfig()
    with pytest.raises(InputError, match=r"epochs .* 1, full .*'10'.*epochs\.default"):
        epochs({"1": 5, "full": 2}, "10")
    with pytest.raises(InputError, match="epochs must be a whole number of at least 1"):
        epochs({"10": 0}, "10")
    assert len(train(dataclasses.replace(PLAIN, epochs=2))[1]) == 2
    assert len(train(dataclasses.replace(PLAIN, epochs=5))[1]) == 5


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("both", [False, True])
def test_a_setting_chooses_whether_biases_and_norms_decay(optimizer, both):
    net = make_net("resnet20", 4, 8, seed=0)
    for p in net.parameters():
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    make_optimizer(net, StudentConfig(optimizer=optimizer, lr=0.1, weight_decay=0.5, decay_vectors=both)).step()
    means = {p.ndim > 1: round(p.mean().item(), 5) for p in net.parameters()}
    assert means == {True: 0.95, False: 0.95 if both else 1.0}


def test_adamw_decays_matrices_alone():
    net = make_net("convnet3", 4, 8, seed=0)
    for p in net.parameters():
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    settings = StudentConfig(lr=0.1, weight_decay=0.5)
    make_optimizer(net, dataclasses.replace(settings, optimizer="adamw")).step()
    assert {p.ndim > 1: round(p.mean().item(), 5) for p in net.parameters()} == {True: 0.95, False: 1.0}
    make_optimizer(net, settings).step()
    assert {p.ndim > 1: round(p.mean().item(), 5) for p in net.parameters()} == {True: 0.9025, False: 0.95}


def test_accuracy_counts_hits_in_any_batch_size():
    # the logits are the three channels, so the brightest channel is the prediction
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3, bias=False))
    net[2].weight.data = torch.eye(3)
    images = torch.zeros(5, 3, 2, 2, dtype=torch.uint8)
    images[range(5), [0, 1, 2, 0, 1]] = 200
    labels = torch.tensor([0, 1, 2, 1, 1])
    for batch_size in (1, 2, 5, 100):
        result = accuracy(net, images, labels, pixels=normalizer((0.5,) * 3, (0.5,) * 3), batch_size=batch_size)
        assert result == 0.8
    # a mean that darkens channel 2 turns its image over to another class
    assert accuracy(net, images, labels, pixels=normalizer((0, 0, 2.0), (1.0,) * 3)) == 0.6


def test_accuracy_does_not_depend_on_who_shares_a_batch():
    net = make_net("resnet20", 4, 8, seed=0).train()
    images, labels = stripes(40, 1)
    before = net.bn1.running_mean.clone()
    results = {accuracy(net, images, labels, pixels=PIXELS, batch_size=b) for b in (1, 7, 40)}
    assert len(results) == 1
    assert torch.equal(net.bn1.running_mean, before)


def test_normalizer_by_hand():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([-2.0, -1.0, 0.7 / 0.3]).view(1, 3, 1, 1)
    torch.testing.assert_close(PIXELS(images), expected)
    torch.testing.assert_close(PIXELS(images / 255), expected)


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_diverging_student_is_named():
    with pytest.raises(RunError, match=r"'convnet3' \(seed 5\) is .* in epoch \d+ of 6; lower its lr, now 1e\+20"):
        train(dataclasses.replace(PLAIN, lr=1e20), seed=5)


X, Y = stripes(24, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": dataclasses.replace(PLAIN, labels="soft")}, "soft labels but there are none"),
        ({"config": dataclasses.replace(PLAIN, labels="fixed")}, "fixed labels but there are none"),
        ({"config": dataclasses.replace(PLAIN, labels="fixed"), "soft_labels": X[:, 0, 0, :5]}, r"\(24, 4\), not"),
        ({"config": dataclasses.replace(PLAIN, labels="soft"), "soft_labels": X[:, 0, 0, :4]}, "source of label ep"),
        ({"config": dataclasses.replace(PLAIN, labels="fixed"), "soft_labels": print}, "need a tensor of logits"),
        ({"validation": None}, "best of 3 evaluations on validation images but there are none; set evaluate.valid"),
        ({"config": dataclasses.replace(PLAIN, net="vgg")}, "no network is called 'vgg'"),
        ({"weights": torch.ones(23)}, r"24 images need weights \(24,\)"),
        ({"weights": torch.zeros(24)}, "more than 0, but image 0 has 0; leave such images out"),
        ({"weights": torch.arange(3.0, -21, -1)}, "more than 0, but image 3 has 0"),
        ({"weights": -torch.ones(24)}, "more than 0, but image 0 has -1"),
        ({"weights": torch.full((24,), torch.nan)}, "finite"),
        ({"data": (X.float(), Y)}, r"floats from .* must lie in \[0, 1\]"),
        ({"data": (X / 255 * torch.nan, Y)}, r"must lie in \[0, 1\]"),
        ({"data": (X[:, :1], Y)}, r"\(N, 3, S, S\)"),
        ({"data": (X, Y[:5])}, r"labels \(N,\)"),
        ({"data": (X[:0], Y[:0])}, "N > 0"),
        ({"num_classes": 3}, "labels go from 0 to 3 but num_classes is 3"),
        ({"test": stripes(8, 1, side=16)}, "8 px wide but test images 16 px"),
        ({"validation": stripes(8, 1, side=16)}, "8 px wide but validation images 16 px"),
        ({"validation": (X[:, :1], Y)}, r"validation images must be \(N, 3, S, S\)"),
        ({"test": (X, Y - 1)}, "test labels go from -1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(changes, message):
    with pytest.raises(InputError, match=message):
        train(**changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "float16.*use bfloat16"),
        ({"labels": "soft"}, "labels=soft belong to the view.*augment=none"),
        ({"labels": "soft", "augment": "none", "views": ViewConfig(jitter=0.4)}, r"views\.jitter=0"),
        ({"labels": "fixed", "views": ViewConfig(mix="cutmix")}, r"views\.mix=none"),
        ({"whiten": True, "views": ViewConfig(flip=0.5)}, "whiten works on whole images"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        StudentConfig(**settings)


# --- augmentation -------------------------------------------------------------------------------------------------


def batch(n: int = 64, side: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(9))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_identity_parameters_leave_images_alone():
    x = batch(4)
    zero, one = torch.zeros(4), torch.ones(4)
    whole = torch.zeros(4, dtype=torch.int64)
    torch.testing.assert_close(aug.brightness(x, zero), x)
    torch.testing.assert_close(aug.saturation(x, one), x)
    torch.testing.assert_close(aug.contrast(x, one), x)
    assert torch.equal(aug.flip(x, whole.bool()), x)
    assert torch.equal(aug.shift(x, whole, whole, 4), x)
    assert torch.equal(aug.cutout(x, whole, whole, 0), x)
    # the sampling grid is exact to a few ulp of the side, pixels differ by a few units
    torch.testing.assert_close(aug.affine(x, torch.eye(2).expand(4, 2, 2)), x, rtol=0, atol=1e-4)
    assert aug.augment("none", x, seeded(0)) is x


def test_color_operations_by_hand():
    x = torch.tensor([[1.0, 2, 6], [0, 0, 3]]).view(2, 3, 1, 1).repeat(1, 1, 1, 2)
    x[:, :, :, 1] += 2
    parameter = torch.tensor([2.0, 0.5])
    torch.testing.assert_close(aug.brightness(x, parameter), x + torch.tensor([2.0, 0.5]).view(2, 1, 1, 1))
    saturated = aug.saturation(x, parameter)
    torch.testing.assert_close(saturated[0, :, 0, 0], torch.tensor([-1.0, 1, 9]))  # gray 3
    torch.testing.assert_close(saturated[1, :, 0, 1], torch.tensor([2.5, 2.5, 4]))  # gray 3
    contrasted = aug.contrast(x, parameter)
    torch.testing.assert_close(contrasted[0, :, 0, 0], torch.tensor([-2.0, 0, 8]))  # mean 4
    torch.testing.assert_close(contrasted[1, :, 0, 1], torch.tensor([2.0, 2, 3.5]))  # mean 2


def test_geometric_operations_by_hand():
    x = batch(3, side=4)
    mirrored = aug.flip(x, torch.tensor([True, False, True]))
    assert torch.equal(mirrored[0], x[0].flip(2))
    assert torch.equal(mirrored[1], x[1])
    moved = aug.shift(x, torch.tensor([1, 0, -2]), torch.tensor([0, 2, 1]), 2)
    assert torch.equal(moved[0], F.pad(x[0, :, 1:], (0, 0, 0, 1)))  # window one row down
    assert torch.equal(moved[1], F.pad(x[1, :, :, 2:], (0, 2)))  # two columns to the right
    assert torch.equal(moved[2], F.pad(x[2, :, :2, 1:], (0, 1, 2, 0)))
    half_turn = -torch.eye(2).expand(3, 2, 2)
    torch.testing.assert_close(aug.affine(x, half_turn), x.flip((2, 3)), rtol=0, atol=1e-5)
    # reading at twice the distance shrinks the image to its central half; the four outer corners read zeros
    shrunk = aug.affine(torch.ones(1, 3, 8, 8), 2 * torch.eye(2)[None])
    assert torch.equal(shrunk[0, 0].bool(), F.pad(torch.ones(4, 4), (2, 2, 2, 2)).bool())


def test_cutout_by_hand():
    x = torch.ones(3, 3, 8, 8)
    hole = aug.cutout(x, torch.tensor([4, 0, 8]), torch.tensor([4, 8, 1]), 4) == 0
    expected = torch.zeros(3, 8, 8, dtype=torch.bool)
    expected[0, 2:6, 2:6] = True
    expected[1, 0:2, 6:8] = True
    expected[2, 6:8, 0:3] = True
    assert torch.equal(hole, expected[:, None].expand(3, 3, 8, 8))


@pytest.mark.parametrize("operation", aug.OPERATIONS)
def test_each_operation_changes_images_one_by_one(operation):
    x = batch()
    before = x.clone()
    y = aug.dsa(x, seeded(0), operation=operation)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert torch.equal(x, before)
    assert torch.isfinite(y).all()
    assert torch.equal(y, aug.dsa(x, seeded(0), operation=operation))
    assert not torch.equal(y, aug.dsa(x, seeded(1), operation=operation))
    same = aug.dsa(x[:1].expand_as(x), seeded(0), operation=operation).flatten(1)
    assert len(torch.unique(same, dim=0)) == (2 if operation == "flip" else pytest.approx(64, abs=24))


def test_dsa_ranges():
    n = 400
    gray = torch.full((n, 3, 32, 32), 2.0)
    shifted = aug.dsa(gray, seeded(0), operation="color")  # gray has neither saturation nor contrast
    assert shifted.std((1, 2, 3)).max() < 1e-5
    amount = shifted[:, 0, 0, 0] - 2
    assert -0.5 <= amount.min() < -0.45
    assert 0.45 < amount.max() <= 0.5

    # images with one contrast of 2 around 0: brightness cannot change a difference, saturation not that of gray pixels
    split = torch.cat([torch.ones(n, 3, 16, 32), -torch.ones(n, 3, 16, 32)], 2)
    y = aug.dsa(split, seeded(0), operation="color")
    ratio = (y[:, 0, 0, 0] - y[:, 0, -1, 0]) / 2
    assert 0.5 <= ratio.min() < 0.52
    assert 1.48 < ratio.max() <= 1.5

    # images without contrast along the sides: color channels -1, 0, 1
    color = torch.tensor([-1.0, 0, 1]).view(1, 3, 1, 1).expand(n, 3, 32, 32)
    y = aug.dsa(color, seeded(0), operation="color")
    chroma = (y[:, 2, 0, 0] - y[:, 0, 0, 0]) / 2
    assert 0 <= chroma.min() < 0.1
    assert 2 < chroma.max() <= 2 * 1.5

    point = torch.zeros(n, 3, 32, 32)
    point[:, :, 16, 16] = 1
    at = aug.dsa(point, seeded(0), operation="crop")[:, 0].nonzero()[:, 1:]
    assert set(at.flatten().tolist()) == set(range(12, 21))

    hole = aug.dsa(gray, seeded(0), operation="cutout")[:, 0] == 0
    assert hole.sum((1, 2)).max() == 16 * 16
    for axis in (1, 2):
        touched = hole.any(axis)  # (B, S)
        assert touched[touched[:, 0]].sum(1).min() == 8  # a center on the border leaves half of the square ...
        assert touched[touched[:, -1]].sum(1).min() == 8  # ... on either side

    flipped = aug.dsa(torch.arange(32.0).expand(n, 3, 32, 32), seeded(0), operation="flip")[:, 0, 0, 0] == 31
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / n**0.5)

    # the coordinate of each pixel as its value shows where it was read
    i = ((torch.arange(32) + 0.5) / 16 - 1).view(32, 1).expand(n, 3, 32, 32)
    j = i.transpose(2, 3)
    sy = aug.dsa(i, seeded(0), operation="scale")[:, 0, 20, 16] / i[0, 0, 20, 16]
    sx = aug.dsa(j, seeded(0), operation="scale")[:, 0, 16, 20] / j[0, 0, 16, 20]
    for s in (sx, sy):
        assert 1 / 1.2 - 1e-4 < s.min() < 0.85
        assert 1.18 < s.max() < 1.2 + 1e-4
    assert (sx - sy).abs().max() > 0.2

    rotated_i, rotated_j = (aug.dsa(v, seeded(0), operation="rotate")[:, 0, 16] for v in (i, j))
    angle = torch.atan2(rotated_i[:, 24] - rotated_i[:, 8], rotated_j[:, 24] - rotated_j[:, 8]).rad2deg()
    assert -15.01 < angle.min() < -14
    assert 14 < angle.max() < 15.01


def test_dsa_draws_one_of_six_operations_per_batch():
    x = batch(8, side=8)
    seen = set()
    for seed in range(60):
        g = seeded(seed)
        name = aug.OPERATIONS[int(torch.randint(6, (), generator=g))]
        assert torch.equal(aug.dsa(x, seeded(seed)), aug.dsa(x, g, operation=name))
        seen.add(name)
    assert seen == set(aug.OPERATIONS)
    with pytest.raises(InputError, match="color, crop, cutout"):
        aug.dsa(x, seeded(0), operation="blur")


@pytest.mark.parametrize(("side", "pad"), [(32, 4), (64, 8), (8, 1)])
def test_crop_flip_shifts_and_mirrors(side, pad):
    n = 600
    x = torch.zeros(n, 3, side, side)
    x[:, :, side // 2, side // 2] = 1  # at the middle: mirrored, one pixel to the left
    x[:, :, side // 2, side // 2 + 1] = 2
    y = aug.crop_flip(x, seeded(0))
    at = (y[:, 0] == 1).nonzero()
    assert len(at) == n
    rows, columns = at[:, 1] - side // 2, at[:, 2] - side // 2
    right_is_two = y[at[:, 0], 0, at[:, 1], at[:, 2] + 1] == 2
    assert set(rows.tolist()) == set(range(-pad, pad + 1))
    assert set(columns[right_is_two].tolist()) == set(range(-pad, pad + 1))
    assert set(columns[~right_is_two].tolist()) == set(range(-pad - 1, pad))
    assert right_is_two.float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / n**0.5)
    assert torch.equal(aug.augment("crop_flip", x, seeded(0)), y)
    assert torch.equal(aug.augment("dsa", x, seeded(0)), aug.dsa(x, seeded(0)))
    with pytest.raises(InputError, match="not 'mixup'"):
        aug.augment("mixup", x, seeded(0))


# --- baselines and statistics -------------------------------------------------------------------------------------


def test_random_rows_are_stratified_distinct_and_seeded():
    labels = np.array([2, 0, 1, 0, 2, 0, 1, 0, 2, 0] * 5)
    rows = random_rows(labels, 4, seed=0)
    assert rows.dtype == np.int64
    assert labels[rows].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(rows.tolist())) == 12
    assert random_rows(labels, 4, seed=0).tolist() == rows.tolist()
    draws = [random_rows(labels, 1, seed=s)[0] for s in range(200)]
    assert set(draws) == set(np.flatnonzero(labels == 0))  # 25 rows, each missed with a chance of 0.03 %


def test_a_small_class_gives_all_that_it_has():
    labels = np.array([0] * 7 + [1] * 2)
    rows = random_rows(labels, 3, seed=1)
    assert labels[rows].tolist() == [0, 0, 0, 1, 1]
    assert rows[3:].tolist() == [7, 8]
    with pytest.raises(InputError, match="at least 1 image per class, not 0"):
        random_rows(labels, 0, seed=1)


def test_mean_and_standard_deviation():
    assert mean_std([2.0, 4.0, 9.0]) == pytest.approx((5.0, 13**0.5))
    assert mean_std([0.5]) == (0.5, None)
    assert format_mean_std([12.0, 12.3, 12.6]) == "12.3 ± 0.3"
    assert format_mean_std([12.34]) == "12.3"
    assert format_mean_std([1.0, 2.0], digits=2) == "1.50 ± 0.71"
    with pytest.raises(InputError, match="at least one seed"):
        mean_std([])


def test_paired_difference_by_hand():
    # differences 1, 2, 3 and 6: mean 3, std sqrt(14/3); Student's t for 3 degrees of freedom at 97.5 % is 3.182446
    d = paired_difference([11, 12, 13, 16], [10.0, 10, 10, 10])
    half = 3.182446 * (14 / 3) ** 0.5 / 2
    assert (d.mean, d.low, d.high) == pytest.approx((3, 3 - half, 3 + half), rel=1e-6)
    assert (d.pairs, d.verdict) == (4, "undecided")
    # at 90 % it is 2.353363
    d = paired_difference([11, 12, 13, 16], [10.0, 10, 10, 10], confidence=0.9)
    assert d.low == pytest.approx(3 - 2.353363 * (14 / 3) ** 0.5 / 2, rel=1e-5)
    assert d.verdict == "better"
    other = paired_difference([10.0, 10, 10, 10], [11, 12, 13, 16], confidence=0.9)
    assert (other.mean, other.low, other.high) == (-d.mean, -d.high, -d.low)
    assert other.verdict == "worse"


def test_the_draw_of_test_images_widens_an_interval():
    # three equal differences of 1/450: Student's t is 4.302653, McNemar's least variance (d - d^2) / 450
    a, b = [0.5 + 1 / 450] * 3, [0.5] * 3
    assert paired_difference(a, b).verdict == "better"  # of these very images
    d = paired_difference(a, b, test_images=450)
    half = 4.302653 * ((1 / 450 - 1 / 450**2) / 450) ** 0.5
    assert (d.mean, d.low, d.high) == pytest.approx((1 / 450, 1 / 450 - half, 1 / 450 + half), rel=1e-5)
    assert d.verdict == "undecided"
    # beside the spread of seeds: differences 0.1, 0.2 and 0.3 on 9 images
    d = paired_difference([0.6, 0.7, 0.8], b, test_images=9)
    assert d.high - d.mean == pytest.approx(4.302653 * (0.01 / 3 + 0.16 / 9) ** 0.5, rel=1e-5)
    other = paired_difference(b, [0.6, 0.7, 0.8], test_images=9)
    assert (other.mean, other.low, other.high) == pytest.approx((-d.mean, -d.high, -d.low))


def test_pairs_tell_more_than_means():
    """What both sides share, such as easy initial weights, does not blur their difference."""
    base = [10.0, 30.0, 50.0]
    assert paired_difference([b + 1 for b in base], [b + 0.01 * i for i, b in enumerate(base)]).verdict == "better"
    assert paired_difference([b + 1 for b in base], base[::-1]).verdict == "undecided"


def test_what_cannot_be_decided():
    single = paired_difference([0.9], [0.1])
    assert (single.mean, single.low, single.high, single.pairs) == (0.8, -math.inf, math.inf, 1)
    assert single.verdict == "undecided"
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).verdict == "undecided"
    with pytest.raises(InputError, match="same seeds on both sides, not 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


# --- accelerator --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_student_on_the_gpu_sees_the_same_draws():
    config = dataclasses.replace(PLAIN, augment="dsa", dtype="float32")
    assert train(config, device="cuda")[1] == pytest.approx(train(config)[1], rel=1e-2)
