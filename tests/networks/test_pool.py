"""Pools of weak teachers: early checkpoints, pruned copies, statistics estimated again, windows, and what labels."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from tiny_teachers import TinyNet, drawn, images_of, teacher_of
from torch import nn

from dq.cli.main import main
from dq.config.schema import RunConfig, SourceConfig
from dq.config.teachers import TeacherConfig, TrainPoolConfig, TrainTeachersConfig
from dq.core.errors import InputError, RunError
from dq.core.files import read_json, read_tensors
from dq.data.load import load_source
from dq.labels.compute import mean_logits
from dq.networks.pool import TeacherPool, reestimate_bn, resize_to
from dq.networks.prune_channels import prune
from dq.networks.teacher import average_logits, pooled_logits
from dq.networks.teacher_loading import load_teacher, load_teachers
from dq.networks.train_pool import train_pool
from dq.networks.zoo import make_net
from dq.refine.matching import StatMatcher, trace_layers

NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def source():
    labels = torch.arange(240) % 4
    train, test = (images_of(labels, 8, seed) for seed in (1, 2))
    return load_source({"train": (train, labels), "test": (test[:40], labels[:40])}, class_names=list(NAMES))


def config(folder: Path, **pool) -> RunConfig:
    settings = {"net": "convnet3-bn", "epochs": (1, 2, 4), "window": (0.0, 1.5), "statistics_images": 100, **pool}
    return RunConfig(
        cache_dir=str(folder / "cache"),
        source=SourceConfig(image_size=8),
        train_teachers=TrainTeachersConfig(epochs=6, batch_size=64, lr=0.002, momentum=0.5),
        train_pool=TrainPoolConfig(output_dir=str(folder / "pool"), **settings),
    )


@pytest.fixture(scope="module")
def prior(source, accelerator, tmp_path_factory):
    """A pool of early checkpoints."""
    folder = tmp_path_factory.mktemp("prior")
    train_pool(config(folder), source, accelerator=accelerator)
    return folder / "pool"


# --- statistics ---------------------------------------------------------------------------------------------------


def test_statistics_of_one_batch_are_matched_by_that_batch():
    net = drawn(TinyNet())
    x = images_of(torch.arange(16) % 4)
    weights = {k: v.clone() for k, v in net.state_dict().items() if "running" not in k and "tracked" not in k}
    before = net.bn2.running_mean.clone()
    reestimate_bn(net, [x])
    assert not net.training
    assert not torch.equal(before, net.bn2.running_mean)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in weights.items())
    assert net.bn1.momentum == 0.1
    # running variances are unbiased, those of a batch are not
    for m, n in ((net.bn1, 16 * 16 * 16), (net.bn2, 16 * 8 * 8), (net.late, 16 * 8 * 8)):
        m.running_var.mul_((n - 1) / n)
    # a layer looks at what the ones before it make of running statistics, which now are the batch's up to that factor
    layers = trace_layers(net, lambda: net(x[:1]))
    with StatMatcher(layers, torch.ones(3)) as matcher:
        net(x)
        assert matcher.distance().item() < 0.02


def test_statistics_are_cumulative_over_batches():
    net = drawn(TinyNet())
    x = images_of(torch.arange(24) % 4)
    reestimate_bn(net, list(x.split(8)))
    means = [net.conv1(part).mean((0, 2, 3)) for part in x.split(8)]
    torch.testing.assert_close(net.bn1.running_mean, torch.stack(means).mean(0).detach())


# --- prior generation ---------------------------------------------------------------------------------------------


def test_a_prior_pool_holds_early_checkpoints_with_their_accuracies(prior, source):
    facts = read_json(prior / "pool.json")
    assert [m["epoch"] for m in facts["members"]] == [1, 2, 4]
    assert facts["base"]["epoch"] == 6
    pool = TeacherPool.load(prior)
    assert [t.weight for t in pool.members] == pytest.approx([m["accuracy"] for m in facts["members"]])
    assert pool.base is not None
    assert [t.matched for t in pool.teachers] == [True, True, True, False]
    assert facts["base"]["accuracy"] > 0.6
    # what a member is said to reach on validation images it reaches
    images = images_of(torch.arange(240) % 4, 8, 1)
    accuracy = (pool.base.logits(images).argmax(1) == torch.arange(240) % 4).float().mean()
    assert accuracy > 0.5
    assert len({t.digest for t in pool.teachers}) == 4


def test_a_killed_pool_goes_on_and_ends_the_same(prior, source, accelerator, tmp_path, monkeypatch):
    import dq.networks.train_pool as pooling

    class Killed(Exception):
        pass

    real, seen = pooling._save, []

    def die(*args, **facts):
        seen.append(facts.get("epoch"))
        if len(seen) == 3:
            raise Killed
        return real(*args, **facts)

    c = config(tmp_path)
    c = dataclasses.replace(c, train_teachers=dataclasses.replace(c.train_teachers, checkpoint_s=1e-9))
    monkeypatch.setattr(pooling, "_save", die)
    with pytest.raises(Killed):
        train_pool(c, source, accelerator=accelerator)
    monkeypatch.setattr(pooling, "_save", real)
    train_pool(c, source, accelerator=accelerator)
    for name in ("epoch-0001", "epoch-0002", "epoch-0004", "base"):
        one, two = (read_tensors(p / f"{name}.safetensors")[0] for p in (prior, tmp_path / "pool"))
        assert all(torch.equal(one[k], two[k]) for k in one)
    # finished: nothing is done again
    monkeypatch.setattr(pooling, "fit", None)
    train_pool(c, source, accelerator=accelerator)


def test_other_settings_and_late_epochs_are_refused(source, accelerator, tmp_path, prior):
    c = config(prior.parent)
    other = dataclasses.replace(c, train_teachers=dataclasses.replace(c.train_teachers, lr=0.5))
    with pytest.raises(RunError, match="holds a pool of other settings"):
        train_pool(other, source, accelerator=accelerator)
    with pytest.raises(InputError, match=r"epochs=\[3, 6\] must end before the training does"):
        train_pool(config(tmp_path, epochs=(3, 6)), source, accelerator=accelerator)
    with pytest.raises(InputError, match="epochs must list different epochs"):
        TrainPoolConfig(epochs=(1, 1))
    with pytest.raises(InputError, match=r"set train_pool\.base\.net"):
        TrainPoolConfig(generation="post")


def test_the_window_decides_who_is_used(source, accelerator, prior, tmp_path):
    facts = read_json(prior / "pool.json")
    best = facts["base"]["accuracy"]
    order = sorted(facts["members"], key=lambda m: m["accuracy"])
    assert order[0]["accuracy"] < order[-1]["accuracy"]
    shutil.copytree(prior, tmp_path / "pool")
    between = (order[0]["accuracy"] + order[-1]["accuracy"]) / 2 / best
    train_pool(config(tmp_path, window=(0.0, between)), source, accelerator=accelerator)
    used = [m["name"] for m in read_json(tmp_path / "pool" / "pool.json")["members"] if m["used"]]
    assert order[0]["name"] in used
    assert order[-1]["name"] not in used
    assert len(TeacherPool.load(tmp_path / "pool").members) == len(used)
    with pytest.raises(RunError, match=r"no member of the pool is within .*widen train_pool.window"):
        train_pool(config(tmp_path, window=(3.0, 4.0)), source, accelerator=accelerator)


# --- post generation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "convnet3-bn", "mobilenetv2"])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_a_pruned_copy_has_fewer_channels_and_is_rebuilt_from_its_weights(name, criterion):
    pytest.importorskip("torch_pruning")
    side = 32
    net = make_net(name, 10, side, seed=0).eval()
    whole = {k: v.clone() for k, v in net.state_dict().items()}
    small = prune(net, side, 0.4, criterion, seed=1)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in whole.items())  # the original is untouched
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in net.parameters())
    again = prune(net, side, 0.4, criterion, seed=1)
    fresh = make_net(name, 10, side, seed=5).eval()
    resize_to(fresh, small.state_dict())
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert small(x).shape == (2, 10)
        assert torch.equal(small(x), again(x))
        assert torch.equal(small(x), fresh(x))


def test_weights_of_another_network_are_refused():
    with pytest.raises(InputError, match="not of this network"):
        resize_to(make_net("convnet3-bn", 4, 8, seed=0), make_net("resnet20", 4, 8, seed=0).state_dict())


def test_a_post_pool_is_pruned_from_a_trained_network(prior, source, accelerator, tmp_path):
    pytest.importorskip("torch_pruning")
    facts = read_json(prior / "pool.json")
    base = TeacherConfig("convnet3-bn", str(prior / "base.safetensors"), tuple(facts["mean"]), tuple(facts["std"]))
    c = config(tmp_path, generation="post", base=base, size=3, prune=(0.2, 0.6))
    train_pool(c, source, accelerator=accelerator)
    facts = read_json(tmp_path / "pool" / "pool.json")
    assert [m["ratio"] for m in facts["members"]] == [0.2, 0.4, 0.6]
    assert [m["criterion"] for m in facts["members"]] == ["magnitude", "random", "magnitude"]
    channels = [m["channels"] for m in facts["members"]]
    assert facts["base"]["channels"] > channels[0] > channels[1] > channels[2]
    pool = TeacherPool.load(tmp_path / "pool")
    given = load_teacher(base, 4, 8)
    images = images_of(torch.arange(8) % 4, 8)
    assert torch.equal(pool.base.logits(images), given.logits(images))
    assert all(torch.isfinite(t.logits(images)).all() for t in pool.members)


def test_another_base_makes_another_pool(prior, source, accelerator, tmp_path):
    pytest.importorskip("torch_pruning")
    facts = read_json(prior / "pool.json")
    file = tmp_path / "base.safetensors"
    shutil.copyfile(prior / "base.safetensors", file)
    base = TeacherConfig("convnet3-bn", str(file), tuple(facts["mean"]), tuple(facts["std"]))
    c = config(tmp_path, generation="post", base=base, size=1, recovery_epochs=0)
    train_pool(c, source, accelerator=accelerator)
    shutil.copyfile(prior / "epoch-0004.safetensors", file)
    with pytest.raises(RunError, match="holds a pool of other settings"):
        train_pool(c, source, accelerator=accelerator)


def test_grouped_convolutions_keep_their_groups():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8))
    twin = copy.deepcopy(net)
    resize_to(twin, net.state_dict())
    assert [m.groups for m in twin] == [2, 8]
    x = torch.rand(1, 8, 9, 9)
    assert torch.equal(net(x), twin(x))


def test_torch_pruning_that_is_missing_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(InputError, match=r"pip install 'dq-distill\[pruning\]'"):
        prune(make_net("convnet3-bn", 4, 8, seed=0), 8, 0.3, "magnitude", seed=0)


# --- ensembles ----------------------------------------------------------------------------------------------------


def test_members_are_sampled_uniformly(prior):
    pool = TeacherPool.load(prior)
    drawn_ = [pool.sample(step, seed=1).name for step in range(600)]
    assert drawn_ == [pool.sample(step, seed=1).name for step in range(600)]
    counts = [drawn_.count(t.name) for t in pool.members]
    assert sum(counts) == 600
    assert min(counts) > 150  # 200 expected, deviation 11.5


def test_an_ensemble_of_identical_teachers_is_one_of_them():
    one = teacher_of(drawn(TinyNet()))
    others = [dataclasses.replace(one, net=copy.deepcopy(one.net), weight=w) for w in (0.3, 1.0, 2.0)]
    x = images_of(torch.arange(5) % 4)
    torch.testing.assert_close(pooled_logits(others, x), one.logits(x))
    torch.testing.assert_close(mean_logits(others, x, "probabilities").softmax(1), one(x).softmax(1))


def test_means_of_teachers_are_weighted():
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert average_logits([a, b], [3.0, 1.0]).tolist() == [[1.5, 1.0]]
    assert average_logits([a, b], [1.0, 1.0]).tolist() == [[1.0, 2.0]]
    result = average_logits([a, b], [3.0, 1.0], probabilities=True)
    torch.testing.assert_close(result.exp(), 0.75 * a.softmax(1) + 0.25 * b.softmax(1))


def test_a_pool_stands_for_its_teachers_wherever_teachers_are_named(prior, source):
    c = TeacherConfig("pool", str(prior), weight=0.5)
    teachers = load_teachers([c], source, 8, torch.device("cpu"))
    pool = TeacherPool.load(prior)
    assert [t.name for t in teachers] == [t.name for t in pool.teachers]
    assert [t.weight for t in teachers] == pytest.approx([t.weight / 2 for t in pool.teachers])
    whole = load_teachers([dataclasses.replace(c, weight=1.0)], source, 8, torch.device("cpu"))
    assert {t.digest for t in teachers}.isdisjoint(t.digest for t in whole)
    x = images_of(torch.arange(6) % 4, 8)
    torch.testing.assert_close(pooled_logits(teachers, x), pool.ensemble_logits(x))
    with pytest.raises(InputError, match="a pool stands for several networks"):
        load_teacher(c, 4, 8)
    with pytest.raises(InputError, match="made for 4 classes and images of 8 px"):
        load_teachers([c], source, 16, torch.device("cpu"))
    with pytest.raises(InputError, match="holds no finished pool"):
        TeacherPool.load(prior.parent)


def test_weights_enter_a_teachers_digest(prior):
    facts = read_json(prior / "pool.json")
    one = TeacherConfig("convnet3-bn", str(prior / "base.safetensors"), tuple(facts["mean"]), tuple(facts["std"]))
    two = dataclasses.replace(one, weight=2.0)
    assert load_teacher(one, 4, 8).digest != load_teacher(two, 4, 8).digest


def test_the_verb_makes_a_pool_of_digits(tmp_path, capsys):
    settings = ["source.image_size=8", f"train_pool.output_dir={tmp_path / 'pool'}", "train_pool.net=convnet3-bn"]
    settings += ["train_pool.epochs=[1]", "train_teachers.epochs=2", "train_pool.window=[0.0, 2.0]"]
    command = ["train-pool", "--data", "sklearn:digits", "--cache_dir", str(tmp_path / "cache"), "--cpu"]
    assert main([*command, "--set", *settings]) == 0
    assert capsys.readouterr().out.strip().endswith("pool")
    assert len(TeacherPool.load(tmp_path / "pool").teachers) == 2
    assert isinstance(TeacherPool.load(tmp_path / "pool").members[0].net, nn.Module)
