"""Labels of views: replay is what was labeled, students cannot tell, and files say what they are."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dq.config.protocols import student_config
from dq.config.students import RelabelConfig, StudentConfig, ViewConfig
from dq.core.errors import InputError, RunError
from dq.core.files import read_json, write_json
from dq.data.views import Views, apply_views, batches, parts
from dq.distilled.external import set_from_tensors
from dq.distilled.set import DistilledSet
from dq.evaluation import trainings as stage
from dq.evaluation.entries import Entry, Work
from dq.evaluation.student import RealImages, train_student
from dq.labels.compute import label_epoch, mean_logits, online_labels
from dq.labels.files import MANIFEST, read_labels, shard_file, write_manifest, write_shard
from dq.labels.packing import pack, unpack
from dq.labels.plan import LabelPlan, LabelSource, label_bytes, make_plan, plan_bytes
from dq.networks.group_statistics import GroupStatistics
from dq.networks.real_data import RealData
from dq.networks.teacher import Teacher
from dq.networks.training import TrainingSet, normalizer

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
VIEWS = ViewConfig(crop_scale=(0.08, 1.0), flip=0.5, mix="cutmix")
BATCH = RelabelConfig(statistics="batch")


def pictures(n: int = 22, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def make_teacher(classes: int = 5, seed: int = 0, dropout: float = 0.5) -> Teacher:
    """Two convolutions with batch norm, whose running statistics are those of no batch."""
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8 * 64, classes),
    )
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * (1 if p.ndim == 1 else 3 / math.sqrt(p[0].numel()))
    for m in net:
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.num_features, generator=g))
            m.running_var.copy_(1 + torch.rand(m.num_features, generator=g))
            m.num_batches_tracked.fill_(17)
    return Teacher(net.eval().requires_grad_(False), MEAN, STD, 256, f"teacher{seed}", f"teacher{seed}")


def linear_teacher(classes: int) -> Teacher:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
    net[1].weight.data = torch.randn(classes, 192, generator=torch.Generator().manual_seed(0))
    return Teacher(net.eval().requires_grad_(False), MEAN, STD, 256, "linear", "linear")


def student(relabel: RelabelConfig | None = None, **changes) -> StudentConfig:
    settings = {"net": "convnet3-bn", "labels": "soft", "epochs": 5, "batch_size": 8, "accumulate": 2, "lr": 1e-3}
    settings |= {"optimizer": "adamw", "schedule": "cosine", "augment": "none", "temperature": 4.0, "views": VIEWS}
    return StudentConfig(**{**settings, "relabel": relabel or BATCH, **changes})


def plan_for(images: torch.Tensor, teachers: list[Teacher], config: StudentConfig, classes: int = 5) -> LabelPlan:
    return make_plan(images, teachers, classes, config)


def write(folder: Path, images: torch.Tensor, teachers: list[Teacher], plan: LabelPlan) -> Path:
    write_manifest(folder, images, plan, teachers)
    for epochs in plan.shards():
        write_shard(folder, images, teachers, plan, epochs)
    return folder


def assert_same_views(a: Views, b: Views) -> None:
    for f in dataclasses.fields(Views):
        x, y = getattr(a, f.name), getattr(b, f.name)
        assert x.dtype == y.dtype, f.name
        assert torch.equal(x, y), f.name


def on_disk(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


# --- replay -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"statistics": "batch"},
        {"statistics": "running"},
        {"statistics": "batch", "dropout": True},
        {"statistics": "batch", "bits": 8},
        {"statistics": "running", "top_k": 2},
        {"statistics": "batch", "top_k": 1, "bits": 8, "views": "seed"},
        {"statistics": "batch", "views": "seed"},
        {"statistics": "running", "epochs": 3},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
@pytest.mark.parametrize("count", [1, 2])
def test_replay_is_online_bit_for_bit(tmp_path, settings, count):
    images, teachers = pictures(), [make_teacher(seed=i) for i in range(count)]
    # shuffled patches and RandAugment too, so that every kind of draw that labels can have is stored
    config = student(RelabelConfig(**settings), views=dataclasses.replace(VIEWS, shuffle=2, rand_augment=2))
    plan = plan_for(images, teachers, config)
    online, replayed = (
        online_labels(images, teachers, plan),
        read_labels(write(tmp_path, images, teachers, plan), images),
    )
    seen = []
    for epoch in [3, 1, 2, 5, 4, 6]:  # any order, and beyond the label epochs
        a, b = online(epoch), replayed(epoch)
        assert_same_views(a.views, b.views)
        assert a.logits.dtype == b.logits.dtype == torch.float32
        assert torch.equal(a.logits, b.logits)
        seen.append(a)
    assert not torch.equal(seen[0].logits, seen[1].logits)
    assert plan.epochs == settings.get("epochs", 5)
    again = online(1 + plan.epochs)
    assert torch.equal(again.logits, seen[1].logits)
    assert_same_views(again.views, seen[1].views)


CHANGED_VIEWS = [
    VIEWS,
    dataclasses.replace(VIEWS, shuffle=2, rand_augment=2),
    ViewConfig(crop_pad=0.125, flip=0.5, mix="mixup", mix_alpha=0.8),
]


@pytest.mark.parametrize("settings", [{"statistics": "batch"}, {"statistics": "running", "epochs": 2, "bits": 8}])
@pytest.mark.parametrize("views", CHANGED_VIEWS)
def test_a_student_of_replayed_labels_is_the_student_of_an_online_teacher(tmp_path, settings, views):
    images, teachers = pictures(), [make_teacher()]
    config = student(RelabelConfig(**settings), epochs=3, views=views)
    plan = plan_for(images, teachers, config)
    write(tmp_path, images, teachers, plan)

    def train(source: LabelSource) -> tuple[list[float], float]:
        losses: list[float] = []
        result = train_student(
            TrainingSet(images, torch.arange(22) % 5, 5, normalizer(MEAN, STD), soft_labels=source),
            config,
            RealImages((pictures(10, seed=1), torch.arange(10) % 5)),
            seed=0,
            on_epoch=lambda epoch, loss: losses.append(loss),
        )
        return losses, result.last

    replayed = train(read_labels(tmp_path, images))
    assert replayed == train(online_labels(images, teachers, plan))
    assert len(replayed[0]) == 3
    other = [make_teacher(seed=1)]
    assert replayed[0] != train(online_labels(images, other, plan_for(images, other, config)))[0]


@pytest.mark.parametrize(
    ("n", "expected"), [(7, [3, 4]), (16, [4, 4, 4, 4]), (19, [4, 4, 5, 6]), (20, [4, 4, 4, 4, 2, 2])]
)
@pytest.mark.parametrize("views", CHANGED_VIEWS)
def test_teacher_and_student_see_the_same_images_in_the_same_parts(n, expected, views):
    images, teachers = pictures(n), [make_teacher()]
    config = student(epochs=1, views=views)
    plan = plan_for(images, teachers, config)
    seen: list[torch.Tensor] = []

    def see(module, args):
        # the first convolution of either network
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            seen.append(args[0].clone())

    hook = nn.modules.module.register_module_forward_pre_hook(see)
    try:
        labels = online_labels(images, teachers, plan)(1)
        by_teacher, seen = seen, []
        train_student(
            TrainingSet(images, torch.arange(n) % 5, 5, normalizer(MEAN, STD), soft_labels=lambda epoch: labels),
            config,
            RealImages((pictures(10), torch.arange(10) % 5)),
            seed=0,
        )
    finally:
        hook.remove()
    assert [len(x) for x in by_teacher] == expected
    assert len(seen) == len(expected) + 1  # the last is the test
    assert all(torch.equal(a, b) for a, b in zip(by_teacher, seen[:-1], strict=True))


RECIPES = [
    ("edc", "cifar10"),
    ("edc", "cifar100"),
    ("edc", "imagenet10"),
    ("edc", "imagenet1k"),
    ("edc", "tinyimagenet"),
    ("fadrm", "cifar100"),
    ("rded", "imagenette"),
    ("sre2l", "cifar100"),
    ("sre2l", "tinyimagenet"),
    ("sre2l", "imagenet1k"),
]


@pytest.mark.parametrize(("protocol", "dataset"), RECIPES)
def test_every_published_recipe_trains_on_labels_of_its_own_views(tmp_path, protocol, dataset):
    spec = {"protocol": protocol, "dataset": dataset, "net": "convnet3-bn", "epochs": 3, "batch_size": 8, "tests": 1}
    config = student_config(spec, ipc="10", classes=5, image_size=224)
    images, teachers = pictures(), [make_teacher()]
    plan = plan_for(images, teachers, config)
    sources = online_labels(images, teachers, plan), read_labels(write(tmp_path, images, teachers, plan), images)
    losses: list[list[float]] = []
    for source in sources:
        losses.append([])
        train_student(
            TrainingSet(images, torch.arange(22) % 5, 5, normalizer(MEAN, STD), soft_labels=source),
            config,
            RealImages((pictures(10, seed=1), torch.arange(10) % 5)),
            seed=0,
            on_epoch=lambda epoch, loss: losses[-1].append(loss),
        )
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


# --- what teachers say --------------------------------------------------------------------------------------------


def test_labels_are_those_of_the_mixed_image():
    images, teacher = pictures(), make_teacher()
    plan = plan_for(images, [teacher], student(RelabelConfig()))
    views, logits = label_epoch(images, [teacher], plan, 0)
    apart = 0
    for i, span in enumerate(batches(22, 8, 2)):
        mixed = apply_views(VIEWS, images, views, i, span)
        assert torch.allclose(logits[span], teacher(mixed), atol=1e-4)
        own = teacher(apply_views(dataclasses.replace(VIEWS, mix="none"), images, views, i, span))
        apart += int(((logits[span] - own).abs().amax(1) > 0.1).sum())
    assert apart > 5


def test_batch_statistics_are_those_of_each_part():
    images, teacher = pictures(), make_teacher()
    plan = plan_for(images, [teacher], student())
    views, logits = label_epoch(images, [teacher], plan, 1)
    trained = copy.deepcopy(teacher.net)
    for m in trained:
        m.train(isinstance(m, nn.BatchNorm2d))
    by_hand = dataclasses.replace(teacher, net=trained)
    for i, span in enumerate(batches(22, 8, 2)):
        x = apply_views(VIEWS, images, views, i, span)
        expected = torch.cat([by_hand(x[p]) for p in parts(len(x), 2)])
        assert torch.allclose(logits[span], expected, atol=1e-5)
        assert not torch.allclose(logits[span], by_hand(x), atol=1e-2)
    evaluated = label_epoch(images, [teacher], plan_for(images, [teacher], student(RelabelConfig())), 1)
    assert_same_views(views, evaluated[0])
    assert (logits - evaluated[1]).abs().mean() > 0.1


@pytest.mark.parametrize("settings", [{}, {"batch_size": 9, "accumulate": 2}, {"batch_size": 22, "accumulate": 4}])
@pytest.mark.parametrize("at_once", [8, 1000])
def test_parts_together_have_the_labels_of_one_after_another(settings, at_once):
    images, teachers = pictures(), [make_teacher(seed=i) for i in range(2)]
    plan = plan_for(images, teachers, student(**settings))
    views, alone = label_epoch(images, teachers, plan, 1, at_once=1)
    sizes: list[int] = []
    hook = teachers[0].net[0].register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    other_views, together = label_epoch(images, teachers, plan, 1, at_once=at_once)
    hook.remove()
    assert_same_views(views, other_views)
    assert (together - alone).abs().max() < 3e-6 * alone.abs().max()  # rounding of float32
    assert max(sizes) > max(len(x) for x in batches_of(plan)), "parts went through one after another"
    assert torch.equal(label_epoch(images, teachers, plan, 1)[1], alone), "on a CPU the bits are those of a part alone"


def batches_of(plan: LabelPlan) -> list[range]:
    """The parts of an epoch."""
    spans = batches(plan.images, plan.batch_size, plan.accumulate)
    return [range(p.start, p.stop) for s in spans for p in parts(s.stop - s.start, plan.accumulate)]


def test_parts_together_leave_dropout_to_its_batch():
    images, dropping = pictures(), RelabelConfig(statistics="batch", dropout=True)
    with_dropout, without = make_teacher(dropout=0.5), make_teacher()
    without.net[7] = nn.Identity()
    for teacher, equal in ((with_dropout, True), (without, False)):
        plan = plan_for(images, [teacher], student(dropping))
        alone = label_epoch(images, [teacher], plan, 0, at_once=1)[1]
        sizes: list[int] = []
        hook = teacher.net[0].register_forward_pre_hook(lambda module, args, sizes=sizes: sizes.append(len(args[0])))
        together = label_epoch(images, [teacher], plan, 0, at_once=1000)[1]
        hook.remove()
        assert torch.equal(together, alone) or not equal
        assert torch.allclose(together, alone, atol=1e-4)
        assert (max(sizes) <= 8) == equal


def test_statistics_of_groups_are_bit_for_bit_those_of_each():
    x = torch.randn(12, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    norm = nn.BatchNorm2d(5).train()
    norm.weight.data, norm.bias.data = torch.randn(5), torch.randn(5)
    expected = torch.cat([norm(part) for part in x.split(3)])
    mean = norm.running_mean.clone()
    with GroupStatistics(4):
        together = norm(x)
        evaluated = norm.eval()(x)
    assert torch.equal(together, expected)
    assert torch.equal(norm.running_mean, mean)
    assert torch.equal(evaluated, norm(x))


def test_parts_together_go_in_halves_where_memory_is_short():
    images, teacher = pictures(), make_teacher()
    plan = plan_for(images, [teacher], student())
    alone = label_epoch(images, [teacher], plan, 0)[1]

    def fail(module, args):
        if len(args[0]) > 8:
            raise torch.OutOfMemoryError("injected")

    hook = teacher.net[0].register_forward_pre_hook(fail)
    assert torch.allclose(label_epoch(images, [teacher], plan, 0, at_once=1000)[1], alone, atol=1e-4)
    hook.remove()

    def always(module, args):
        raise torch.OutOfMemoryError("injected")

    teacher.net[0].register_forward_pre_hook(always)
    with pytest.raises(torch.OutOfMemoryError):  # a part is never divided
        label_epoch(images, [teacher], plan, 0, at_once=1000)


def test_batch_statistics_equal_running_ones_that_were_set_to_them():
    images, teacher = pictures(12), make_teacher()
    config = student(batch_size=12, accumulate=1)
    plan = plan_for(images, [teacher], config)
    views, by_batch = label_epoch(images, [teacher], plan, 0)

    def adopt(module: nn.BatchNorm2d, args) -> None:
        module.running_mean.copy_(args[0].mean((0, 2, 3)))
        module.running_var.copy_(args[0].var((0, 2, 3), unbiased=False))

    hooks = [m.register_forward_pre_hook(adopt) for m in teacher.net if isinstance(m, nn.BatchNorm2d)]
    teacher(apply_views(VIEWS, images, views, 0, slice(0, 12)))  # layer by layer, since it is in evaluation mode
    for h in hooks:
        h.remove()
    running = plan_for(images, [teacher], dataclasses.replace(config, relabel=RelabelConfig()))
    _, by_running = label_epoch(images, [teacher], running, 0)
    scale = by_running.abs().max()
    assert (by_batch - by_running).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("settings", [{}, {"statistics": "batch"}, {"statistics": "batch", "dropout": True}])
@pytest.mark.parametrize("training", [False, True])
def test_labelling_leaves_the_teacher_as_it_was(settings, training):
    images, teacher = pictures(), make_teacher()
    teacher.net[1].train(training)
    teacher.net[4].momentum = None
    state = {k: v.clone() for k, v in teacher.net.state_dict().items()}
    modes = [(m.training, getattr(m, "momentum", 0)) for m in teacher.net.modules()]
    torch.manual_seed(0)
    rng = torch.get_rng_state()
    plan = plan_for(images, [teacher, teacher], student(RelabelConfig(**settings)))
    _, logits = label_epoch(images, [teacher, teacher], plan, 0)
    assert [(m.training, getattr(m, "momentum", 0)) for m in teacher.net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in teacher.net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    # nor does the mode that it happens to be in change a label
    teacher.net.eval()
    assert torch.equal(label_epoch(images, [teacher, teacher], plan, 0)[1], logits)


def test_a_teacher_that_fails_is_left_as_it_was():
    images, teacher = pictures(), make_teacher()

    def fail(module, args):
        raise RuntimeError("out of memory")

    teacher.net[8].register_forward_pre_hook(fail)
    state = {k: v.clone() for k, v in teacher.net.state_dict().items()}
    with pytest.raises(RuntimeError, match="out of memory"):
        label_epoch(images, [teacher], plan_for(images, [teacher], student()), 0)
    assert not any(m.training for m in teacher.net.modules())
    assert teacher.net[1].momentum == 0.1
    assert all(torch.equal(v, state[k]) for k, v in teacher.net.state_dict().items())


def test_dropout_is_off_unless_asked_for():
    images, teacher, without = pictures(), make_teacher(dropout=0.5), make_teacher(dropout=0.0)
    plan = plan_for(images, [teacher], student())
    dropping = plan_for(images, [teacher], student(RelabelConfig(statistics="batch", dropout=True)))
    plain = label_epoch(images, [without], plan, 0)[1]
    assert torch.equal(label_epoch(images, [teacher], plan, 0)[1], plain)
    dropped = label_epoch(images, [teacher], dropping, 0)[1]
    assert (dropped - plain).abs().mean() > 0.1
    torch.manual_seed(5)
    assert torch.equal(label_epoch(images, [teacher], dropping, 0)[1], dropped)


def test_several_teachers_give_the_mean_of_their_logits():
    images, teachers = pictures(), [make_teacher(seed=i) for i in range(3)]
    x = images.float() / 255
    logits = torch.stack([t(x) for t in teachers])
    assert torch.allclose(mean_logits(teachers, x), logits.mean(0), atol=1e-5)
    of_probabilities = logits.softmax(2).mean(0)
    assert (mean_logits(teachers, x).softmax(1) - of_probabilities).abs().max() > 0.05
    plan = plan_for(images, teachers, student())
    each = torch.stack([label_epoch(images, [t], plan, 2)[1] for t in teachers])
    assert torch.allclose(label_epoch(images, teachers, plan, 2)[1], each.mean(0), atol=1e-4)


# --- keeping logits -----------------------------------------------------------------------------------------------


def random_logits(n: int = 200, classes: int = 50) -> torch.Tensor:
    return 4 * torch.randn(n, classes, generator=torch.Generator().manual_seed(0))


def test_16_bits_are_half_precision():
    logits = random_logits()
    packed = pack(logits, RelabelConfig())
    assert {k: v.dtype for k, v in packed.items()} == {"logits": torch.float16}
    assert torch.equal(unpack(packed, 50), logits.half().float())


def test_8_bits_err_by_half_a_step_at_most():
    logits = random_logits()
    packed = pack(logits, RelabelConfig(bits=8))
    assert packed["logits"].dtype == torch.uint8
    step = (logits.max() - logits.min()) / 255
    error = (unpack(packed, 50) - logits).abs().max()
    assert step / 4 < error <= step / 2 * (1 + 1e-4)
    constant = torch.full((3, 4), 2.5)
    assert torch.allclose(unpack(pack(constant, RelabelConfig(bits=8)), 4), constant)


@pytest.mark.parametrize("classes", [50, 300])
@pytest.mark.parametrize("bits", [16, 8])
def test_top_k_keeps_the_largest_up_to_a_constant_and_the_mean_of_the_tail(classes, bits):
    logits, k = random_logits(classes=classes), 5
    packed = pack(logits, RelabelConfig(top_k=k, bits=bits))
    assert packed["index"].dtype == (torch.uint8 if classes == 50 else torch.int16)
    assert packed["above"].shape == (200, k)
    result = unpack(packed, classes)
    top, index = logits.topk(k, 1)
    rest = (logits.sum(1) - top.sum(1)) / (classes - k)
    error = float((top - rest[:, None]).max()) * (2**-11 if bits == 16 else 1 / 510) * (1 + 1e-3)
    assert (result.gather(1, index) - (top - rest[:, None])).abs().max() <= error
    tail = torch.ones_like(logits).scatter_(1, index, 0).bool()
    assert (result[tail] == 0).all()
    # softmax sees only the tail: it is the softmax of the logits with the tail at its mean
    flattened = torch.where(tail, rest[:, None].expand_as(logits), logits)
    assert torch.allclose(result.softmax(1), flattened.softmax(1), atol=2 * error)
    clear = top[:, 0] - top[:, 1] > 2 * error
    assert clear.sum() > 100
    assert torch.equal(result.argmax(1)[clear], logits.argmax(1)[clear])


def test_top_k_without_a_tail_to_average_is_refused():
    with pytest.raises(InputError, match=r"relabel.top_k=5 keeps all of 5 classes"):
        plan_for(pictures(), [make_teacher()], student(RelabelConfig(top_k=5)))
    plan_for(pictures(), [make_teacher()], student(RelabelConfig(top_k=4)))


def test_plans_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="need a teacher"):
        plan_for(pictures(), [], student())
    with pytest.raises(InputError, match=r"batch_size=3 in 2 parts"):
        plan_for(pictures(), [make_teacher()], student(batch_size=3))
    plan_for(pictures(), [make_teacher()], student(RelabelConfig(), batch_size=3))


# --- bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "epochs", "expected"),
    [  # (bytes at ipc 1, 10 and 50) of evaluation protocols in the literature
        (10, 1000, (0.2e6, 2e6, 10e6)),
        (100, 1000, (20e6, 0.2e9, 1.0e9)),
        (200, 300, (24e6, 0.24e9, 1.2e9)),
        (10, 300, (60e3, 0.6e6, 3e6)),
        (1000, 300, (0.6e9, 6.0e9, 30.0e9)),
    ],
    ids=["cifar10", "cifar100", "tinyimagenet", "imagenette", "imagenet1k"],
)
def test_bytes_of_logits_are_those_of_the_literature(classes, epochs, expected):
    for ipc, size in zip((1, 10, 50), expected, strict=True):
        assert label_bytes(ipc * classes, epochs, classes).logits == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(
    "settings",
    [{}, {"bits": 8}, {"top_k": 4}, {"views": "seed"}],
    ids=lambda s: "-".join(map(str, s.values())) or "full",
)
def test_bytes_are_known_before_anything_is_written(tmp_path, classes, settings):
    images, teachers = pictures(100), [linear_teacher(classes)]
    views = dataclasses.replace(VIEWS, shuffle=2, rand_augment=2)
    config = student(RelabelConfig(**settings), epochs=40, batch_size=16, views=views)
    plan = plan_for(images, teachers, config, classes)
    write(tmp_path, images, teachers, plan)
    expected = plan_bytes(plan)
    assert expected == label_bytes(100, 40, classes, config.relabel, 16, config.views)
    headers = 1000 * len(plan.shards())  # some hundred bytes of a header per file, which only small sets notice
    tolerance = 0.05 * expected.total if expected.total > 20 * headers else headers
    assert expected.total <= on_disk(tmp_path) <= expected.total + tolerance


def test_labels_of_other_views_lie_in_another_folder():
    images, teachers = pictures(), [make_teacher()]

    def digest(**changes) -> str:
        views = dataclasses.replace(VIEWS, crop_scale=(), **changes)
        return plan_for(images, teachers, student(views=views)).digest

    digests = [digest(**c) for c in ({}, {"rand_augment": 1}, {"rand_augment": 1, "rand_magnitude": 8})]
    digests += [digest(crop_pad=0.125), digest(shuffle=2)]
    assert len(set(digests)) == 5
    assert digest(rand_magnitude=8) == digest()  # which no view depends on


@pytest.mark.parametrize("top_k", [1, 2])
def test_compact_labels_are_an_eighth_of_full_ones(tmp_path, top_k):
    images, teachers = pictures(100), [linear_teacher(10)]
    config = student(epochs=40, batch_size=16)
    compact = dataclasses.replace(config, relabel=RelabelConfig(top_k=top_k, bits=8, views="seed"))
    sizes = []
    for name, c in (("full", config), ("compact", compact)):
        plan = plan_for(images, teachers, c, 10)
        sizes.append(on_disk(write(tmp_path / name, images, teachers, plan)))
    assert sizes[0] >= 7.9 * sizes[1]  # an eighth but for the headers of small files


# --- files --------------------------------------------------------------------------------------------------------


def test_files_do_not_depend_on_who_writes_them_and_in_which_order(tmp_path):
    images = pictures()
    plan = plan_for(images, [make_teacher()], student(epochs=9))
    assert [list(s) for s in plan.shards()] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    write(tmp_path / "one", images, [make_teacher()], plan)
    for shards in (plan.shards()[::-2], plan.shards()[1::2]):  # two processes, each with its own teacher
        teachers = [make_teacher()]
        write_manifest(tmp_path / "two", images, plan, teachers)
        for epochs in shards:
            write_shard(tmp_path / "two", images, teachers, plan, epochs)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    assert len(one) == 4


def test_a_manifest_says_what_labels_are_of(tmp_path):
    images, teachers = pictures(), [make_teacher()]
    plan = plan_for(images, teachers, student())
    write_manifest(tmp_path, images, plan, teachers, set="mine")
    record = json.loads((tmp_path / MANIFEST).read_text())
    assert record["set"] == "mine"
    assert record["teachers"] == [{"name": "teacher0", "digest": "teacher0"}]
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["checksums"]) == 22
    assert record["plan"]["accumulate"] == 2
    before = (tmp_path / MANIFEST).stat().st_mtime_ns
    write_manifest(tmp_path, images, plan, teachers, set="another")
    assert (tmp_path / MANIFEST).stat().st_mtime_ns == before


def test_only_the_epoch_asked_for_is_read(tmp_path):
    images, teachers = pictures(), [make_teacher()]
    plan = dataclasses.replace(plan_for(images, teachers, student()), shard_epochs=5)
    write(tmp_path, images, teachers, plan)
    file = shard_file(tmp_path, 0)
    source, fresh = read_labels(tmp_path, images), online_labels(images, teachers, plan)
    assert torch.equal(source(1).logits, fresh(1).logits)  # the file is open now
    data, then = file.read_bytes(), file.stat()
    at = data.index(fresh(4).logits.half().numpy().tobytes())
    with open(file, "r+b") as f:
        f.seek(at)
        f.write(bytes(22 * 5 * 2))
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))  # else it would be compared with its checksum again
    assert not source(4).logits.any()  # so it was not in memory
    for epoch in (1, 2, 3, 5):
        assert torch.equal(source(epoch).logits, fresh(epoch).logits)


def test_one_file_is_enough_for_its_epochs(tmp_path):
    images, teachers = pictures(), [make_teacher()]
    plan = plan_for(images, teachers, student(epochs=4))
    source = read_labels(write(tmp_path, images, teachers, plan), images)
    for first in (0, 2, 3):
        shard_file(tmp_path, first).unlink()
    assert torch.equal(source(2).logits, online_labels(images, teachers, plan)(2).logits)
    with pytest.raises(RunError, match=r"epoch-00001.safetensors cannot be read"):
        source(1)


def test_labels_of_other_images_are_refused(tmp_path):
    images, teachers = pictures(), [make_teacher()]
    write(tmp_path, images, teachers, plan_for(images, teachers, student()))
    other = images.clone()
    other[[4, 9], 0, 0, 0] ^= 1
    with pytest.raises(InputError, match=r"other images: 2 of 22 .*image 4; run `dq label`"):
        read_labels(tmp_path, other)
    with pytest.raises(InputError, match=r"are for 22 images, not 21"):
        read_labels(tmp_path, images[:21])
    with pytest.raises(InputError, match="made for other images"):
        read_labels(tmp_path, images.float() / 255)


def test_missing_files_are_named(tmp_path):
    images, teachers = pictures(), [make_teacher()]
    plan = plan_for(images, teachers, student(epochs=4))
    with pytest.raises(InputError, match=rf"no soft labels \(no {MANIFEST}\); make them with `dq label`"):
        read_labels(tmp_path, images)
    write(tmp_path, images, teachers, plan)
    shard_file(tmp_path, 1).unlink()
    shard_file(tmp_path, 3).unlink()
    with pytest.raises(InputError, match=r"lacks 2 of 4 label files, first epoch-00002.safetensors"):
        read_labels(tmp_path, images)


def test_a_damaged_file_is_one_sentence(tmp_path):
    images, teachers = pictures(), [make_teacher()]
    write(tmp_path, images, teachers, plan_for(images, teachers, student(epochs=4)))
    file = shard_file(tmp_path, 2)
    file.write_bytes(file.read_bytes()[:-50])
    source = read_labels(tmp_path, images)
    source(2)
    with pytest.raises(RunError, match=r"epoch-00003.safetensors cannot be read .* delete it"):
        source(3)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(RunError, match=f"{MANIFEST} cannot be read"):
        read_labels(tmp_path, images)


def test_views_that_would_be_drawn_otherwise_are_noticed(tmp_path):
    images, teachers = pictures(), [make_teacher()]
    config = student(RelabelConfig(views="seed"))
    write(tmp_path, images, teachers, plan_for(images, teachers, config))
    record = read_json(tmp_path / MANIFEST)
    record["plan"]["relabel"]["seed"] = 43  # as if another version of numpy drew the same seed
    write_json(tmp_path / MANIFEST, record)
    with pytest.raises(InputError, match=r"cannot be drawn again: .* relabel.views=stored"):
        read_labels(tmp_path, images)(1)


def test_a_digest_names_what_labels_depend_on_and_nothing_else():
    images, teachers = pictures(), [make_teacher()]
    base = student(RelabelConfig())

    def digest(config: StudentConfig = base, x: torch.Tensor = images, t: list[Teacher] = teachers) -> str:
        return plan_for(x, t, config).digest

    same = [
        dataclasses.replace(base, lr=0.5, net="resnet20", temperature=1.0, tests=4),
        dataclasses.replace(base, relabel=RelabelConfig(storage="online")),
        dataclasses.replace(base, relabel=RelabelConfig(dropout=True)),  # nothing drops out in evaluation mode
        dataclasses.replace(base, relabel=RelabelConfig(epochs=9)),
    ]
    assert {digest(c) for c in same} == {digest()}
    relabels = [{"statistics": "batch"}, {"bits": 8}, {"top_k": 2}, {"epochs": 4}, {"views": "seed"}, {"seed": 1}]
    other = [dataclasses.replace(base, relabel=RelabelConfig(**r)) for r in relabels]
    other += [dataclasses.replace(base, **c) for c in ({"batch_size": 16}, {"accumulate": 1}, {"epochs": 6})]
    other.append(dataclasses.replace(base, views=dataclasses.replace(VIEWS, flip=0.0)))
    digests = {digest(), *map(digest, other), digest(x=pictures(seed=1)), digest(t=[make_teacher(seed=1)])}
    assert len(digests) == 3 + len(other)


# --- the stage ----------------------------------------------------------------------------------------------------


def small_set(n: int) -> DistilledSet:
    return set_from_tensors(pictures(n), (torch.arange(n) % 3).sort().values, ("red", "green", "blue"))


def alone() -> SimpleNamespace:
    return SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None)


@pytest.fixture
def bench(toy_source, tmp_path) -> RealData:
    teachers = (make_teacher(classes=3),)
    return RealData(
        toy_source,
        8,
        tmp_path / "cache",
        torch.device("cpu"),
        teachers,
        np.array([], np.int64),
        MEAN,
        STD,
    )


def training(s: DistilledSet, config: StudentConfig, name: str = "mine", images: int | None = None) -> stage.Training:
    entry = Entry(name, "8", images or len(s), f"identity of {name}", lambda: s, (0, 1))
    return stage.Training(entry, 0, config, 0, Path("unused"))


def test_labels_that_are_there_are_not_made_again(bench, tmp_path):
    t, work = training(small_set(22), student(epochs=8)), Work(tmp_path, alone())
    stage.write_labels([t, t], bench, work)
    folder = stage.label_folder(work, t, bench)
    files = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.glob("*.safetensors")}
    assert len(files) == 4
    torn = shard_file(folder, 2)
    torn.unlink()
    stage.write_labels([t], bench, work)
    assert {f: f.read_bytes() for f in files} == {f: data for f, (_, data) in files.items()}
    assert [f for f, (stamp, _) in files.items() if f.stat().st_mtime_ns != stamp] == [torn]
    stage.write_labels([t], bench, work)
    # without a manifest nobody knows of what they are labels
    (folder / MANIFEST).unlink()
    stage.write_labels([t], bench, work)
    read_labels(folder, t.entry.load().images)(1)


def test_a_process_that_comes_late_leaves_no_gap(bench, tmp_path):
    t = training(small_set(22), student(epochs=8))
    stage.write_labels([t], bench, Work(tmp_path / "one", alone()))
    barrier, looked = threading.Barrier(2), threading.Event()
    first, late = alone(), alone()
    for rank, process in enumerate((first, late)):
        process.process_index, process.num_processes = rank, 2
    first.wait_for_everyone = lambda: (looked.set(), barrier.wait(timeout=20))

    def write_first() -> None:
        own = dataclasses.replace(bench, teachers=(make_teacher(classes=3),))
        stage.write_labels([t], own, Work(tmp_path / "two", first))
        looked.set()

    thread = threading.Thread(target=write_first)
    # one at a time, since temporary files carry the number of the process and these are one
    met: list[int] = []
    late.wait_for_everyone = lambda: (barrier.wait(timeout=20), met.append(1), len(met) == 2 and thread.join())
    thread.start()
    looked.wait(timeout=20)  # the first has waited, or has written all that it took for its own
    stage.write_labels([t], bench, Work(tmp_path / "two", late))
    thread.join()
    one, two = (
        {f.name: f.read_bytes() for f in stage.label_folder(Work(tmp_path / n, alone()), t, bench).iterdir()}
        for n in ("one", "two")
    )
    assert one == two


def test_recipes_share_labels_only_if_their_batches_are_the_same(bench, tmp_path):
    # 19 images: in one part a last batch of 3, in two parts it joins the batch before
    s, work = small_set(19), Work(tmp_path, alone())
    recipes = [student(RelabelConfig(), accumulate=a, lr=lr) for a in (1, 2) for lr in (0.1, 0.2)]
    trainings = [training(s, c) for c in recipes]
    stage.write_labels(trainings, bench, work)
    folders = [stage.label_folder(work, t, bench) for t in trainings]
    assert folders[0] == folders[1] != folders[2] == folders[3]
    for t, folder in zip(trainings, folders, strict=True):
        source = read_labels(folder, s.images)
        plan = make_plan(s.images, bench.teachers, 3, t.config)
        assert_same_views(source(1).views, plan.draw(0))
        assert len(source(1).views.kept) == len(batches(19, 8, t.config.accumulate))


def test_a_set_smaller_than_announced_is_labeled_all_the_same(bench, tmp_path, monkeypatch):
    s, config = small_set(15), student(epochs=16)
    # three epochs of the announced images to a file, but four of the real ones
    monkeypatch.setattr("dq.labels.plan.SHARD_BYTES", 3 * label_bytes(22, 1, 3, config.relabel, 8, VIEWS).total)
    t, work = training(s, config, images=22), Work(tmp_path, alone())
    assert make_plan(s.images, bench.teachers, 3, config).shard_epochs == 4
    stage.write_labels([t], bench, work)
    source = read_labels(stage.label_folder(work, t, bench), s.images)
    online = online_labels(s.images, bench.teachers, make_plan(s.images, bench.teachers, 3, config))
    assert all(torch.equal(source(e).logits, online(e).logits) for e in range(1, 17))


def test_a_full_disk_is_seen_before_anything_is_written(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    work = Work(tmp_path, alone())
    with pytest.raises(RunError, match=r"the soft labels need .* kB but .* has 1 kB left; set relabel.bits=8"):
        stage.write_labels([training(small_set(22), student())], bench, work)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_online_and_full_data_labels_are_never_stored(bench, tmp_path):
    work = Work(tmp_path, alone())
    online = training(small_set(22), student(RelabelConfig(storage="online")))
    full = training(small_set(22), student())
    full = dataclasses.replace(full, entry=dataclasses.replace(full.entry, ipc="full"))
    hard = training(small_set(22), StudentConfig())
    stage.write_labels([online, full, hard], bench, work)
    assert not (tmp_path / "labels").exists()
