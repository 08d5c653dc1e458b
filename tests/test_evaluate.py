"""Students: weighted and soft losses, recipes, augmentation, results, baselines and their statistics."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dq.config import StudentConfig
from dq.dist import derive_seed
from dq.errors import InputError, RunError
from dq.evaluation import augment as aug
from dq.evaluation.baselines import random_rows
from dq.evaluation.statistics import format_mean_std, mean_std
from dq.evaluation.train import (
    accuracy,
    epochs_for,
    learning_rate,
    looks_at,
    make_optimizer,
    normalize,
    train_student,
    weighted_loss,
)
from dq.nets import make_net

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
PLAIN = StudentConfig(epochs={"default": 6}, batch_size=16, augment="none", schedule="constant", tests=3)


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
    arguments = {
        "num_classes": 4,
        "config": config,
        "ipc_key": "6",
        "test": stripes(40, 1, images.shape[-1]),
        "mean": MEAN,
        "std": STD,
        "seed": seed,
        "device": "cpu",
        "on_epoch": lambda epoch, loss: losses.append(loss),
    }
    return train_student(images, labels, **(arguments | changes)), losses


def gradient(images: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    net = make_net("convnet3", 4, images.shape[-1], seed=0)
    weighted_loss(net(normalize(images, MEAN, STD)), targets, weights, temperature=2.0).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


# --- learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"labels": "soft", "temperature": 4.0},
        {"labels": "soft", "optimizer": "adamw", "lr": 0.003, "schedule": "cosine"},
        {"net": "resnet20", "lr": 0.05},
        {"augment": "crop_flip", "dtype": "bfloat16"},
    ],
    ids=lambda c: "-".join(map(str, c.values())) or "hard",
)
def test_student_learns_separable_classes(changes):
    config = dataclasses.replace(PLAIN, epochs={"default": 30}, **changes)
    images, labels = stripes(48, 0)
    soft = 8.0 * F.one_hot(labels, 4) if config.labels == "soft" else None
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


def test_last_and_best_are_kept_apart():
    config = dataclasses.replace(PLAIN, epochs={"default": 12}, lr=0.05, tests=12)
    results = [train(config, n=8, seed=s)[0] for s in range(3)]
    for r in results:
        assert [epoch for epoch, _ in r.tests] == list(range(1, 13))
        assert r.last == r.tests[-1][1]
        assert r.best == max(a for _, a in r.tests)
        assert r.best_epoch == next(e for e, a in r.tests if a == r.best)
        assert r.train_seconds > 0
    assert any(r.best > r.last or r.best_epoch < 12 for r in results)  # else nothing was told apart


def test_training_is_the_written_out_loop():
    """Full batches without augmentation: SGD with momentum, a tenth of the lr and fresh momentum at half time."""
    config = dataclasses.replace(PLAIN, epochs={"default": 6}, batch_size=100, schedule="step", weight_decay=0.01)
    images, labels = stripes(12, 0)
    weights = torch.linspace(0.5, 1.5, 12)
    _, losses = train(config, data=(images, labels), weights=weights, seed=7)
    net = make_net("convnet3", 4, 8, seed=derive_seed(7, "student init")).train()
    x = (images.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = []
    for lr in (0.01, 0.001):
        optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
        for _ in range(3):
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


def test_looking_at_the_test_images_does_not_change_training():
    config = dataclasses.replace(PLAIN, net="resnet20", augment="dsa")
    often, losses = train(dataclasses.replace(config, tests=6))
    once, losses_once = train(dataclasses.replace(config, tests=1))
    assert losses == losses_once
    assert often.last == once.last


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


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_weights_of_one_are_bit_identical_to_none(labels):
    config = dataclasses.replace(PLAIN, augment="dsa", labels=labels, batch_size=10)
    soft = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    without, losses = train(config, soft_labels=soft)
    ones, losses_ones = train(config, soft_labels=soft, weights=torch.ones(24))
    assert losses == losses_ones
    assert without.tests == ones.tests
    assert losses != train(config, soft_labels=soft, weights=torch.full((24,), 0.5))[1]


@pytest.mark.parametrize("soft", [False, True])
def test_weight_two_is_the_image_twice(soft):
    images, labels = stripes(5, 0)
    targets = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) if soft else labels
    weighted = gradient(images, targets, torch.tensor([1.0, 1, 2, 1, 1]))
    twice = [0, 1, 2, 2, 3, 4]
    repeated = gradient(images[twice], targets[twice], torch.ones(6))
    # means over 5 and over 6
    torch.testing.assert_close(5 * weighted, 6 * repeated, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(weighted, gradient(images, targets, torch.ones(5)), rtol=1e-2)


def test_loss_is_divided_by_the_batch_and_not_by_the_weights():
    images, labels = stripes(5, 0)
    w = torch.tensor([0.5, 1, 2, 1, 1])
    torch.testing.assert_close(gradient(images, labels, 2 * w), 2 * gradient(images, labels, w))


def test_an_image_of_weight_zero_has_no_influence():
    images, labels = stripes(24, 0)
    other_images, other_labels = images.clone(), labels.clone()
    other_images[5] = torch.arange(192).view(3, 8, 8).to(torch.uint8)
    other_labels[5] = 3 - labels[5]
    zero = torch.ones(24)
    zero[5] = 0
    config = dataclasses.replace(PLAIN, batch_size=24)
    assert (
        train(config, data=(images, labels), weights=zero)[1]
        == train(config, data=(other_images, other_labels), weights=zero)[1]
    )
    assert train(config, data=(images, labels))[1] != train(config, data=(other_images, other_labels))[1]


# --- soft labels --------------------------------------------------------------------------------------------------


def test_kl_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, 2 * math.log(3)]])
    teacher = torch.tensor([[0.0, 2 * math.log(3)], [0.0, 2 * math.log(3)]])
    # at T = 2 the teacher says (1/4, 3/4), the first student (1/2, 1/2), the second agrees with the teacher
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    loss = weighted_loss(logits, teacher, torch.tensor([3.0, 5.0]), temperature=2.0)
    assert loss.item() == pytest.approx(3 * kl / 2, rel=1e-5)


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    loss = weighted_loss(logits, torch.tensor([0, 1]), torch.tensor([3.0, 5.0]), temperature=2.0)
    assert loss.item() == pytest.approx((3 * math.log(2) + 5 * math.log(4 / 3)) / 2, rel=1e-5)


def test_certain_soft_labels_are_hard_labels():
    config = dataclasses.replace(PLAIN, temperature=1.0)
    _, hard = train(config)
    certain = 50.0 * F.one_hot(stripes(24, 0)[1], 4)
    _, soft = train(dataclasses.replace(config, labels="soft"), soft_labels=certain)
    assert soft == pytest.approx(hard, rel=1e-4)
    assert train(config, soft_labels=torch.randn(24, 4))[1] == hard  # not asked for, not used


def test_only_sgd_makes_up_for_the_temperature():
    soft = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    config = dataclasses.replace(PLAIN, labels="soft", temperature=3.0, batch_size=24)
    first = {o: train(dataclasses.replace(config, optimizer=o), soft_labels=soft)[1][0] for o in ("sgd", "adamw")}
    assert first["sgd"] == pytest.approx(9 * first["adamw"], rel=1e-5)


# --- recipe -------------------------------------------------------------------------------------------------------


def test_schedules():
    def rates(schedule: str, epochs: int) -> list[float]:
        config = StudentConfig(lr=0.2, schedule=schedule)
        return [learning_rate(config, e, epochs) for e in range(1, epochs + 1)]

    assert rates("constant", 3) == [0.2, 0.2, 0.2]
    assert rates("step", 4) == pytest.approx([0.2, 0.2, 0.02, 0.02])
    assert rates("step", 3) == pytest.approx([0.2, 0.2, 0.02])
    assert rates("step", 1) == [0.2]
    assert rates("cosine", 4) == pytest.approx([0.2, 0.2 * (0.5 + 8**-0.5), 0.1, 0.2 * (0.5 - 8**-0.5)])


def test_tests_are_evenly_spaced_and_end_with_the_last_epoch():
    assert looks_at(1000, 5) == [200, 400, 600, 800, 1000]
    assert looks_at(10, 3) == [4, 7, 10]
    assert looks_at(3, 5) == [1, 2, 3]
    assert looks_at(300, 1) == [300]
    with pytest.raises(InputError, match="at least once"):
        looks_at(10, 0)


def test_epochs_by_images_per_class():
    config = StudentConfig(epochs={"1": 1000, "full": 20, "default": 300})
    assert [epochs_for(config, k) for k in ("1", "full", "10")] == [1000, 20, 300]
    with pytest.raises(InputError, match=r"epochs for 1, full but not for '10'; add 'default'"):
        epochs_for(StudentConfig(epochs={"1": 5, "full": 2}), "10")
    with pytest.raises(InputError, match="at least 1 epoch"):
        epochs_for(StudentConfig(epochs={"10": 0}), "10")
    config = dataclasses.replace(PLAIN, epochs={"6": 2, "default": 5})
    assert len(train(config)[1]) == 2
    assert len(train(config, ipc_key="7")[1]) == 5


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
        found = accuracy(net, images, labels, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=batch_size)
        assert found == 0.8
    # a mean that darkens channel 2 turns its image over to another class
    assert accuracy(net, images, labels, mean=(0, 0, 2.0), std=(1.0,) * 3) == 0.6


def test_accuracy_does_not_depend_on_who_shares_a_batch():
    net = make_net("resnet20", 4, 8, seed=0).train()
    images, labels = stripes(40, 1)
    before = net.bn1.running_mean.clone()
    found = {accuracy(net, images, labels, mean=MEAN, std=STD, batch_size=b) for b in (1, 7, 40)}
    assert len(found) == 1
    assert torch.equal(net.bn1.running_mean, before)


def test_normalize_by_hand():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([-2.0, -1.0, 0.7 / 0.3]).view(1, 3, 1, 1)
    torch.testing.assert_close(normalize(images, MEAN, STD), expected)
    torch.testing.assert_close(normalize(images / 255, MEAN, STD), expected)


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_diverging_student_is_named():
    with pytest.raises(
        RunError, match=r"student 'convnet3' \(seed 5\) is .* in epoch \d+ of 6; lower its lr, now 1e\+20"
    ):
        train(dataclasses.replace(PLAIN, lr=1e20), seed=5)


X, Y = stripes(24, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": dataclasses.replace(PLAIN, labels="soft")}, "soft labels but there are none"),
        ({"config": dataclasses.replace(PLAIN, labels="soft"), "soft_labels": X[:, 0, 0, :5]}, r"\(24, 4\), not"),
        ({"config": dataclasses.replace(PLAIN, dtype="float16")}, "float16.*use bfloat16"),
        ({"config": dataclasses.replace(PLAIN, net="vgg")}, "no network is called 'vgg'"),
        ({"weights": torch.ones(23)}, r"24 images need weights \(24,\)"),
        ({"weights": torch.zeros(24)}, "not all zero"),
        ({"weights": -torch.ones(24)}, "none negative"),
        ({"weights": torch.full((24,), torch.nan)}, "finite"),
        ({"data": (X.float(), Y)}, r"floats from .* must lie in \[0, 1\]"),
        ({"data": (X / 255 * torch.nan, Y)}, r"must lie in \[0, 1\]"),
        ({"data": (X[:, :1], Y)}, r"\(N, 3, S, S\)"),
        ({"data": (X, Y[:5])}, r"labels \(N,\)"),
        ({"data": (X[:0], Y[:0])}, "N > 0"),
        ({"num_classes": 3}, "labels go from 0 to 3 but num_classes is 3"),
        ({"test": stripes(8, 1, side=16)}, "8 px wide but test images 16 px"),
        ({"test": (X, Y - 1)}, "test labels go from -1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(changes, message):
    with pytest.raises(InputError, match=message):
        train(**changes)


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


def test_colour_operations_by_hand():
    x = torch.tensor([[1.0, 2, 6], [0, 0, 3]]).view(2, 3, 1, 1).repeat(1, 1, 1, 2)
    x[:, :, :, 1] += 2
    parameter = torch.tensor([2.0, 0.5])
    torch.testing.assert_close(aug.brightness(x, parameter), x + torch.tensor([2.0, 0.5]).view(2, 1, 1, 1))
    saturated = aug.saturation(x, parameter)
    torch.testing.assert_close(saturated[0, :, 0, 0], torch.tensor([-1.0, 1, 9]))  # grey 3
    torch.testing.assert_close(saturated[1, :, 0, 1], torch.tensor([2.5, 2.5, 4]))  # grey 3
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
    grey = torch.full((n, 3, 32, 32), 2.0)
    shifted = aug.dsa(grey, seeded(0), operation="color")  # grey has neither saturation nor contrast
    assert shifted.std((1, 2, 3)).max() < 1e-5
    amount = shifted[:, 0, 0, 0] - 2
    assert -0.5 <= amount.min() < -0.45
    assert 0.45 < amount.max() <= 0.5

    # images with one contrast of 2 around 0: brightness cannot change a difference, saturation not that of grey pixels
    split = torch.cat([torch.ones(n, 3, 16, 32), -torch.ones(n, 3, 16, 32)], 2)
    y = aug.dsa(split, seeded(0), operation="color")
    ratio = (y[:, 0, 0, 0] - y[:, 0, -1, 0]) / 2
    assert 0.5 <= ratio.min() < 0.52
    assert 1.48 < ratio.max() <= 1.5

    # images without contrast along the sides: colour channels -1, 0, 1
    colour = torch.tensor([-1.0, 0, 1]).view(1, 3, 1, 1).expand(n, 3, 32, 32)
    y = aug.dsa(colour, seeded(0), operation="color")
    chroma = (y[:, 2, 0, 0] - y[:, 0, 0, 0]) / 2
    assert 0 <= chroma.min() < 0.1
    assert 2 < chroma.max() <= 2 * 1.5

    point = torch.zeros(n, 3, 32, 32)
    point[:, :, 16, 16] = 1
    at = aug.dsa(point, seeded(0), operation="crop")[:, 0].nonzero()[:, 1:]
    assert set(at.flatten().tolist()) == set(range(12, 21))

    hole = aug.dsa(grey, seeded(0), operation="cutout")[:, 0] == 0
    assert hole.sum((1, 2)).max() == 16 * 16
    for axis in (1, 2):
        touched = hole.any(axis)  # (B, S)
        assert touched[touched[:, 0]].sum(1).min() == 8  # a centre on the border leaves half of the square ...
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


# --- accelerator --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_student_on_the_gpu_sees_the_same_draws():
    config = dataclasses.replace(PLAIN, augment="dsa")
    assert train(config, device="cuda")[1] == pytest.approx(train(config)[1], rel=1e-2)
