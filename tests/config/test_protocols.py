"""Presets of published protocols, cell by cell, and how a user's settings win over them."""

from __future__ import annotations

import pytest

from dq.config.protocols import FOLDER, list_protocols, student_config
from dq.config.reader import from_dict
from dq.config.students import EvaluateConfig, StudentConfig
from dq.core.errors import InputError
from dq.networks.schedule import learning_rate
from dq.networks.zoo import make_net

# classes, side in px
DATA = {
    "cifar10": (10, 32),
    "cifar100": (100, 32),
    "tinyimagenet": (200, 64),
    "imagenette": (10, 224),
    "imagewoof": (10, 224),
    "imagenet1k": (1000, 224),
    "imagenet10": (10, 224),  # EDC's alone
}
COMMON = sorted(set(DATA) - {"imagenet10"})


def preset(name: str, dataset: str, ipc: int | str = 10, *, named: bool = True, **own) -> StudentConfig:
    """The student of a preset on a data set; `named` says whether its published settings are asked for."""
    classes, side = DATA[dataset]
    spec = {"protocol": name, **({"dataset": dataset} if named else {}), **own}
    return student_config(spec, ipc=str(ipc), classes=classes, image_size=side)


@pytest.mark.parametrize("name", sorted(list_protocols()))
def test_every_preset_is_complete_for_every_data_set(name):
    for dataset, (classes, side) in DATA.items():
        for ipc in (1, 10, 50, 2000, "full"):
            c = preset(name, dataset, ipc, named=False)
            assert c.protocol == name
            assert c.epochs >= 1
        if side <= 64:  # larger networks take long to fill with random numbers
            make_net(c.net, classes, side, norm=c.norm, init=c.init, seed=0)
    assert list_protocols()[name]


def test_every_published_data_set_of_a_protocol_may_be_named():
    published = {
        "sre2l": ("cifar100", "tinyimagenet", "imagenet1k"),
        "rded": ("cifar10", "cifar100", "tinyimagenet", "imagenette", "imagewoof", "imagenet1k"),
        "edc": ("cifar10", "cifar100", "tinyimagenet", "imagenet10", "imagenet1k"),
        "fadrm": tuple(COMMON),
    }
    for name, datasets in published.items():
        for dataset in datasets:
            for ipc in (1, 10, 50, "full"):
                assert preset(name, dataset, ipc).labels == "soft"
    with pytest.raises(InputError, match=r"'edc' has settings for .*cifar100.*, not for 'cifar1000'"):
        student_config({"protocol": "edc", "dataset": "cifar1000"}, ipc="1", classes=10, image_size=32)
    with pytest.raises(InputError, match="'classic' has settings for no data set"):
        preset("classic", "cifar10")
    with pytest.raises(InputError, match=r"'sre2l' has no settings for 'cifar10': SRe2L released no recipe"):
        preset("sre2l", "cifar10")


def test_the_files_are_what_the_names_say():
    assert sorted(list_protocols()) == sorted(p.stem for p in FOLDER.glob("*.yaml"))
    assert set(list_protocols()) == {"classic", "edc", "fadrm", "frepo", "hard", "rd3", "rded", "sre2l"}


def test_rd3_is_one_recipe_for_all():
    for dataset in DATA:
        for ipc in (1, 50):
            c = preset("rd3", dataset, ipc, named=False)
            assert (c.net, c.labels, c.epochs, c.batch_size) == ("resnet18", "soft", 400, 50)
            assert (c.optimizer, c.lr) == ("adamw", 1e-3)
            assert (c.schedule, c.views.flip, c.views.mix) == ("cosine", 0.5, "cutmix")
            assert c.views.crop_scale == (0.08, 1.0)
    assert learning_rate(c, 400, 400) > c.lr / 2  # half a cosine


def test_a_list_of_labels_is_a_student_of_each_kind():
    spec = {"protocol": "rd3", "labels": ["hard", "fixed", "soft"], "views": {"flip": 0.0, "jitter": 0.4}}
    evaluate = from_dict(EvaluateConfig, {"students": [spec, {"net": "convnet3"}]}, "evaluate")
    assert [s.get("labels") for s in evaluate.students] == ["hard", "fixed", "soft", None]
    hard, fixed, soft = (student_config(s, ipc="10", classes=10, image_size=32) for s in evaluate.students[:3])
    assert {c.views.flip for c in (hard, fixed, soft)} == {0.0}
    assert [c.views.mix for c in (hard, fixed, soft)] == ["cutmix", "none", "cutmix"]
    assert [c.views.jitter for c in (hard, fixed, soft)] == [0.4, 0.4, 0.0]
    assert {(c.epochs, c.batch_size, c.lr, c.views.crop_scale) for c in (hard, fixed, soft)} == {
        (400, 50, 1e-3, (0.08, 1))
    }
    classic = EvaluateConfig(students=({"protocol": "classic", "labels": ["hard", "soft"]},)).students
    dsa, views = (student_config(s, ipc="10", classes=10, image_size=32) for s in classic)
    assert (dsa.augment, views.augment) == ("dsa", "none")
    assert EvaluateConfig(students=evaluate.students) == evaluate
    for wrong in ([], ["hard", "hard"]):
        with pytest.raises(InputError, match=r"labels lists kinds such as \[hard, fixed, soft\]"):
            EvaluateConfig(students=({"labels": wrong},))
    with pytest.raises(InputError, match="labels must be one of 'hard'"):
        student_config(EvaluateConfig(students=({"labels": ["firm"]},)).students[0], ipc="1", classes=2, image_size=8)


# --- fadrm --------------------------------------------------------------------------------------------------------

FADRM = [  # data set, network, (lr, zeta) for ipc 1, 10 and 50
    ("cifar100", "resnet18", (5e-4, 2), (1e-3, 2), (1e-3, 1)),
    ("cifar100", "resnet50", (1e-3, 1), (1e-3, 2), (1e-3, 1)),
    ("cifar100", "resnet101", (5e-4, 1), (5e-4, 1), (5e-4, 1)),
    ("tinyimagenet", "resnet18", (1e-3, 2), (1e-3, 2), (1e-3, 1)),
    ("tinyimagenet", "resnet50", (5e-4, 2), (5e-4, 2), (5e-4, 1)),
    ("tinyimagenet", "resnet101", (5e-4, 2), (5e-4, 2), (5e-4, 1)),
    ("imagenette", "resnet18", (5e-4, 2), (5e-4, 1), (5e-4, 2)),
    ("imagenette", "resnet50", (5e-4, 2), (5e-4, 1), (5e-4, 1)),
    ("imagenette", "resnet101", (5e-4, 2), (5e-4, 2), (1e-3, 2)),
    ("imagewoof", "resnet18", (5e-4, 2), (5e-4, 1), (1e-3, 2)),
    ("imagewoof", "resnet50", (5e-4, 2), (5e-3, 1), (5e-4, 1)),
    ("imagewoof", "resnet101", (1e-3, 1), (5e-4, 2), (5e-4, 1)),
    ("imagenet1k", "resnet18", (1e-3, 2), (1e-3, 2), (1e-3, 1)),
    ("imagenet1k", "resnet50", (5e-4, 2), (1e-3, 2), (1e-3, 1)),
    ("imagenet1k", "resnet101", (3.5e-3, 2), (1e-3, 2), (5e-4, 1)),
    ("cifar10", "resnet18", (1e-3, 1), (1e-3, 1), (1e-3, 1)),
    ("cifar10", "resnet50", (1e-3, 1), (1e-3, 1), (1e-3, 1)),
    ("cifar10", "resnet101", (5e-4, 1), (5e-4, 1), (5e-4, 1)),
]


@pytest.mark.parametrize(("dataset", "net", "one", "ten", "fifty"), FADRM)
def test_fadrm_learning_rates(dataset, net, one, ten, fifty):
    # between the published ipc, and beyond them, the next lower one
    for ipcs, expected in (((1, 2, 9), one), ((10, 20, 49), ten), ((50, 100, "full"), fifty)):
        for ipc in ipcs:
            c = preset("fadrm", dataset, ipc, net=net)
            assert (c.lr, c.zeta) == expected, ipc
    torchvision = preset("fadrm", dataset, 10, net=f"torchvision:{net}")
    assert (torchvision.lr, torchvision.zeta) == ten


def test_fadrm_recipe():
    for dataset in COMMON:
        c = preset("fadrm", dataset)
        small = dataset in ("imagenette", "imagewoof")
        assert (c.batch_size, c.accumulate) == (10 if small else 16, 2)
        assert c.epochs == (1000 if dataset == "cifar100" else 300)
        assert c.epochs // c.tests == 10  # a look every ten epochs
        assert (c.optimizer, c.weight_decay, c.schedule) == ("adamw", 0.01, "cosine")
        assert (c.labels, c.loss, c.temperature, c.ema) == ("soft", "kl", 20.0, 0.0)
        assert (c.views.crop_scale, c.views.flip, c.views.mix, c.views.mix_alpha) == ((0.08, 1.0), 0.5, "cutmix", 1.0)
        assert (c.views.shuffle, c.augment) == (1, "none")
        assert (c.relabel.statistics, c.relabel.seed, c.relabel.bits, c.relabel.top_k) == ("batch", 42, 16, None)
        assert round(c.test_scale * DATA[dataset][1]) == (256 if DATA[dataset][1] == 224 else DATA[dataset][1])


def test_fadrm_epochs_of_tiny_imagenet():
    for ipc, epochs in ((1, 1000), (10, 300), (50, 300), ("full", 300)):
        for net in ("resnet18", "resnet50", "resnet101"):
            c = preset("fadrm", "tinyimagenet", ipc, net=net)
            assert (c.epochs, c.epochs // c.tests) == (epochs, 10)
    assert preset("fadrm", "tinyimagenet", 1, named=False).epochs == 300


# --- other soft ones ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", COMMON)
def test_rded_batches(dataset):
    doubled = 2 if DATA[dataset][0] in (100, 1000) else 1
    for ipc, batch in ((1, 10), (10, 50), (50, 100)):
        expected = 100 if dataset == "tinyimagenet" else batch * doubled
        assert preset("rded", dataset, ipc).batch_size == expected


@pytest.mark.parametrize(
    ("net", "lr"),
    [
        ("resnet18", 1e-3),
        ("resnet50", 1e-3),
        ("resnet101", 1e-3),
        ("vgg11", 5e-4),
        ("alexnet", 1e-4),
        ("torchvision:mobilenet_v2", 2.5e-3),
        ("torchvision:efficientnet_b0", 2e-3),
        ("timm:efficientnet_b0", 2e-3),
        ("torchvision:vgg11", 5e-4),
        ("torchvision:vit_b_16", 1e-4),
        ("torchvision:swin_v2_t", 1e-4),
    ],
)
def test_rded_learning_rates(net, lr):
    assert preset("rded", "imagenet1k", net=net).lr == lr


def test_rded_recipe():
    for dataset in COMMON:
        side = DATA[dataset][1]
        for ipc in (1, 10):
            c = preset("rded", dataset, ipc)
            mosaic = side == 224 and ipc == 10
            assert c.views.crop_scale == ((0.5, 1.0) if mosaic else (1.0, 1.0))
            assert c.views.shuffle == (2 if mosaic else 1)
            assert (c.relabel.storage, c.relabel.statistics) == ("online", "running")
            assert (c.epochs, c.schedule, c.zeta, c.temperature, c.accumulate) == (300, "cosine", 2.0, 20.0, 1)
            assert round(c.test_scale * side) == {32: 32, 64: 72, 224: 256}[side]
    for side, resized in ((28, 28), (32, 32), (64, 72), (96, 104), (128, 144), (224, 256), (256, 288)):
        c = student_config({"protocol": "rded"}, ipc="10", classes=10, image_size=side)
        assert round(c.test_scale * side) == resized, side


def test_rded_convnet_of_cifar100():
    def cell(teacher: str | None, dataset: str = "cifar100", net: str = "convnet3", ipc: str = "10"):
        spec = {"protocol": "rded", "dataset": dataset, "net": net}
        c = student_config(spec, ipc=ipc, classes=DATA[dataset][0], image_size=32, teacher=teacher)
        return c.lr, c.batch_size

    for ipc in ("1", "10", "50"):
        assert cell("convnet3", ipc=ipc) == (2e-3, 25)
    assert cell("convnet3-bn", net="convnet3-bn") == (2e-3, 25)
    assert cell("resnet18") == cell(None) == (1e-3, 100)
    assert cell("convnet3", net="resnet18") == (1e-3, 100)
    assert cell("convnet3", dataset="cifar10") == (1e-3, 50)


def test_the_only_teacher_of_a_run_is_a_fact_of_its_students():
    from dq.config.students import EvaluateConfig
    from dq.config.teachers import TeacherConfig
    from dq.evaluation.trainings import students_of

    evaluate = EvaluateConfig(students=({"protocol": "rded", "dataset": "cifar100", "net": "convnet3"},))
    teacher, other = TeacherConfig(net="convnet3", path="a"), TeacherConfig(net="resnet18", path="b")
    for teachers, lr in (((teacher,), 2e-3), ((other,), 1e-3), ((teacher, other), 1e-3), ((), 1e-3)):
        assert students_of(evaluate, ["10"], 100, 32, teachers)[(0, "10")].lr == lr


def test_sre2l_recipe():
    for c in (preset("sre2l", "imagenet1k"), preset("sre2l", "cifar10", named=False)):
        assert (c.batch_size, c.accumulate, c.epochs) == (1024, 2, 300)  # batch norm sees 512 images
        assert (c.optimizer, c.lr, c.weight_decay, c.decay_vectors) == ("adamw", 1e-3, 0.01, None)
        assert (c.schedule, c.zeta, c.warmup) == ("cosine", 1.0, 0)
        assert (c.loss, c.temperature, c.relabel.statistics) == ("kl", 20.0, "running")
        assert (c.views.crop_scale, c.views.crop_pad, c.views.mix) == ((0.08, 1.0), 0.0, "cutmix")


def test_sre2l_recipe_of_cifar100():
    """relabel_cifar.py and relabel_cifar.sh"""
    c = preset("sre2l", "cifar100")
    assert (c.batch_size, c.accumulate, c.epochs) == (128, 1, 400)
    assert (c.optimizer, c.lr, c.weight_decay, c.decay_vectors) == ("adamw", 1e-3, 0.01, True)
    assert (c.schedule, c.zeta, c.loss, c.temperature) == ("cosine", 1.0, "kl", 30.0)
    assert (c.views.mix, c.views.mix_alpha) == ("mixup", 0.8)
    assert (c.views.crop_pad * 32, c.views.crop_scale, c.views.flip) == (4, (), 0.5)
    assert c.relabel.statistics == "batch"  # the teacher is never put in evaluation mode


def test_sre2l_recipe_of_tiny_imagenet():
    """zeyuanyin/tiny-imagenet, train_kd.py and train_kd.sh"""
    c = preset("sre2l", "tinyimagenet")
    assert (c.batch_size, c.accumulate, c.epochs, c.warmup) == (256, 1, 100, 5)
    assert (c.optimizer, c.lr, c.momentum, c.weight_decay, c.decay_vectors) == ("sgd", 0.2, 0.9, 1e-4, None)
    assert (c.schedule, c.zeta, c.loss, c.temperature) == ("cosine", 1.0, "kl", 20.0)  # with SGD times T^2
    assert (c.views.mix, c.views.crop_scale, c.views.flip) == ("none", (0.08, 1.0), 0.5)
    assert c.relabel.statistics == "running"


def test_edc_recipe():
    cells = {  # (epochs, batch, optimizer, lr, schedule) by data set and ipc
        ("imagenet1k", 10): (300, 100, "adamw", 1e-3, "linear"),
        ("imagenet10", 10): (1000, 50, "adamw", 1e-3, "cos2"),
        ("tinyimagenet", 1): (1000, 100, "sgd", 0.1, "cosine"),
        ("tinyimagenet", 10): (300, 100, "sgd", 0.1, "cosine"),
        ("cifar100", 10): (1000, 50, "sgd", 0.1, "cos2"),
        ("cifar10", 1): (1000, 10, "adamw", 1e-3, "multistep"),
        ("cifar10", 10): (1000, 50, "adamw", 1e-3, "multistep"),
    }
    for (dataset, ipc), expected in cells.items():
        c = preset("edc", dataset, ipc)
        assert (c.epochs, c.batch_size, c.optimizer, c.lr, c.schedule) == expected, (dataset, ipc)
        sgd = c.optimizer == "sgd"
        assert (c.momentum, c.weight_decay) == ((0.875, 5e-4) if sgd else (0.9, 0.01))
        assert c.decay_vectors is (False if sgd else None)  # neither decays biases and norms
        assert (c.loss, c.gt_weight, c.ema, c.zeta) == ("mse_gt", 0.025, 0.99, 2.0)
        assert (c.views.crop_scale, c.views.mix) == ((0.08 if dataset == "cifar10" else 0.5, 1.0), "cutmix")
        assert c.views.shuffle == 1  # the released shuffle leaves images as they are
        assert (c.views.rand_augment, c.views.rand_magnitude) == (0 if dataset == "imagenet1k" else 2, 9)
    steps = preset("edc", "cifar10", 1)
    assert [m * steps.epochs for m in steps.milestones] == [800, 900, 950]
    assert steps.step_factor == 0.5


@pytest.mark.parametrize("name", ["classic", "hard", "rded", "fadrm"])
def test_decay_of_the_others_is_the_usual_one_of_their_optimizer(name):
    assert preset(name, "cifar100", named=False).decay_vectors is None


# --- hard labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ipcs", "ten", "hundred"),
    [
        ((1,), 3000, 2000),
        ((2, 10), 2000, 1300),
        ((11, 20, 50), 1500, 1000),
        ((51, 100, 200), 1000, 600),
        ((201, 500), 500, 300),
        ((501, 1300, "full"), 300, 200),
    ],
)
def test_hard_epochs(ipcs, ten, hundred):
    for ipc in ipcs:
        for classes, expected in ((10, ten), (100, hundred)):
            c = student_config({"protocol": "hard"}, ipc=str(ipc), classes=classes, image_size=224)
            assert c.epochs == expected
            assert hundred == ten * 2 // 3 // 100 * 100
        for classes in (99, 101, 200, 1000):  # released: `if nclass == 100`
            c = student_config({"protocol": "hard"}, ipc=str(ipc), classes=classes, image_size=224)
            assert c.epochs == ten


def test_hard_recipe():
    c = preset("hard", "imagenette", named=False)
    assert (c.net, c.norm, c.labels) == ("resnetap10", "instance", "hard")
    assert (c.optimizer, c.lr, c.momentum, c.weight_decay, c.batch_size) == ("sgd", 0.01, 0.9, 5e-4, 64)
    assert c.schedule == "multistep"
    v = c.views
    assert (v.crop_scale, v.flip, v.jitter, v.lighting, v.mix) == ((0.5, 1.0), 0.5, 0.4, 0.1, "cutmix")
    assert (c.tests, c.test_scale) == (100, 1.0)
    hundred = student_config({"protocol": "hard"}, ipc="10", classes=100, image_size=224)
    assert (hundred.lr, hundred.weight_decay, hundred.batch_size) == (0.01, 5e-4, 64)
    thousand = preset("hard", "imagenet1k", named=False)
    assert (thousand.lr, thousand.weight_decay) == (0.1, 1e-4)
    assert thousand.batch_size >= 128


def test_the_name_of_a_network_wins_over_the_norm_of_a_preset():
    assert preset("hard", "imagenette", named=False, net="convnet6").norm == "instance"
    assert preset("hard", "imagenette", named=False, net="resnet18").norm == "instance"
    assert preset("hard", "imagenette", named=False, net="resnet18-bn").norm is None
    assert preset("hard", "imagenette", named=False, net="torchvision:resnet18").norm is None
    assert preset("hard", "imagenette", named=False, net="alexnet", norm=None).norm is None


# --- classic ------------------------------------------------------------------------------------------------------


def test_classic_recipe():
    for dataset, net in (("cifar10", "convnet3"), ("cifar100", "convnet3"), ("tinyimagenet", "convnet4")):
        for ipc in (1, 10, 50):
            c = preset("classic", dataset, ipc, named=False)
            assert (c.net, c.norm, c.labels, c.epochs, c.tests) == (net, None, "hard", 1001, 1)
            assert (c.optimizer, c.lr, c.momentum, c.weight_decay, c.batch_size) == ("sgd", 0.01, 0.9, 5e-4, 256)
            assert (c.schedule, c.augment, c.whiten, c.accumulate) == ("step", "dsa", False, 1)
            assert c.views.mix == "none"
            assert not c.views.crop_scale
    assert preset("classic", "cifar10", "full", named=False).epochs == 200  # dq's own, not DC's
    for classes, parameters, image_size in ((10, 320_010, 32), (100, 504_420, 32), (200, 857_160, 64)):
        name = student_config({"protocol": "classic"}, ipc="1", classes=classes, image_size=image_size).net
        net = make_net(name, classes, image_size, seed=0)
        assert sum(p.numel() for p in net.parameters()) == parameters


# --- a user's own settings ----------------------------------------------------------------------------------------


def test_own_settings_win_over_a_preset_and_leave_the_rest():
    base = preset("fadrm", "cifar100")
    c = preset("fadrm", "cifar100", lr=0.5, views={"flip": 0.0}, relabel={"bits": 8}, epochs=7, temperature=4)
    assert (c.lr, c.epochs, c.temperature) == (0.5, 7, 4.0)
    assert (c.views.flip, c.views.crop_scale, c.views.mix) == (0.0, (0.08, 1.0), "cutmix")
    assert (c.relabel.bits, c.relabel.statistics) == (8, "batch")
    assert (c.zeta, c.batch_size) == (base.zeta, base.batch_size)
    # and asking for one student changes no other
    assert preset("fadrm", "cifar100") == base


def test_custom_has_no_preset():
    assert student_config({}, ipc="1", classes=10, image_size=32) == StudentConfig()
    assert student_config({"lr": 1e-3}, ipc="1", classes=10, image_size=32).lr == 1e-3
    with pytest.raises(InputError, match="dataset chooses the settings of a protocol"):
        student_config({"dataset": "cifar10"}, ipc="1", classes=10, image_size=32)


def test_epochs_may_depend_on_ipc():
    epochs = {1: 30, "10": 20, "default": 5}
    epochs_by_ipc = {
        i: preset("classic", "cifar10", i, named=False, epochs=epochs).epochs for i in (1, 10, 50, "full")
    }
    assert epochs_by_ipc == {1: 30, 10: 20, 50: 5, "full": 5}
    assert preset("classic", "cifar10", "full", named=False, epochs={"full": 2, "default": 9}).epochs == 2
    with pytest.raises(InputError, match=r"student\.epochs has entries for 1, 10 but not for '50'"):
        preset("classic", "cifar10", 50, named=False, epochs={1: 30, 10: 20})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"protocol": "fadmr"}, r"unknown protocol 'fadmr'; did you mean 'fadrm'\?"),
        ({"protocol": "clasic"}, r"did you mean 'classic'\?"),
        ({"protocol": "classic", "bach_size": 3}, r"bach_size'; did you mean 'student.batch_size'\?"),
        ({"protocol": "fadrm", "views": {"flop": 1}}, r"views.flop'; did you mean 'student.views.flip'\?"),
        ({"protocol": "fadrm", "relabel": {"topk": 1}}, r"relabel.topk'; did you mean 'student.relabel.top_k'\?"),
        ({"protocol": "fadrm", "relabel": {"bits": 4}}, "relabel.bits must be one of 16, 8, not 4"),
        ({"protocol": "fadrm", "augment": "dsa"}, "labels=soft belong to the view"),
        ({"protocol": "edc", "relabel": {"top_k": 2}}, "relabel.top_k keeps logits up to a constant"),
    ],
)
def test_mistakes_are_answered_with_the_nearest_name(spec, message):
    with pytest.raises(InputError, match=message):
        student_config(spec, ipc="10", classes=10, image_size=32)


def test_an_unknown_network_is_answered_with_the_nearest_name():
    from dq.config.students import EvaluateConfig
    from dq.evaluation.trainings import students_of

    evaluate = EvaluateConfig(students=({"protocol": "classic", "net": "convnet33"},))
    with pytest.raises(InputError, match=r"no network is called 'convnet33'; nearest: convnet3"):
        students_of(evaluate, ["1"], 10, 32)


@pytest.mark.parametrize(
    ("protocol", "small"),
    [
        ("fadrm", None),
        ("edc", None),
        ("classic", None),
        ("rded", "torchvision"),
        ("sre2l", "torchvision"),
        ("hard", "fan_out"),
    ],
)
def test_small_resnets_start_as_in_the_released_code(protocol, small):
    for name in ("resnet18", "resnet18-bn", "resnet50", "resnet101"):
        assert preset(protocol, "cifar100", named=False, net=name).init == small
        assert preset(protocol, "imagenette", named=False, net=name).init is None
    for name in ("convnet3", "torchvision:resnet18"):
        assert preset(protocol, "cifar100", named=False, net=name).init is None
    assert preset(protocol, "cifar100", named=False, net="resnet18", init=None).init is None
