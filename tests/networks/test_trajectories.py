"""Expert trajectories: curriculum, GSAM, batched training, files, resuming, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dq.config.overrides import apply_settings
from dq.config.schema import RunConfig
from dq.config.trajectories import CurriculumConfig, TrainExpertsConfig
from dq.core.errors import InputError, RunError
from dq.core.files import read_json, read_metadata
from dq.data.zca import fit_zca
from dq.networks import train_experts as training
from dq.networks.flat_parameters import FlatNet
from dq.networks.train_experts import check_expert_training, train_experts
from dq.networks.training import TrainingSet, normalizer
from dq.networks.trajectories import (
    curriculum_rows,
    expert_file,
    flat_accuracy,
    gsam_gradient,
    open_experts,
    read_orders,
    train_trajectories,
)
from dq.networks.zoo import make_net

PAD = CurriculumConfig(order="unused")  # the paper's numbers for CIFAR-10
NET = "convnet2w4"
SMALL = TrainExpertsConfig(net=NET, epochs=4, batch_size=8, lr=0.1, optimizer="sgd", augment="dsa", whiten=False)
PIXELS = normalizer((0.5,) * 3, (0.25,) * 3)


def toy(n: int = 48, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Images of 8 px whose class is a bright column."""
    labels = torch.arange(n) % classes
    x = 0.4 + 0.1 * torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for c in range(classes):
        x[labels == c, :, :, 2 * c : 2 * c + 2] += 0.4
    return (x.clamp(0, 1) * 255).to(torch.uint8), labels


def trained(config: TrainExpertsConfig = SMALL, seeds: tuple[int, ...] = (5,), **more: Any) -> Tensor:
    images, labels = toy()
    data = TrainingSet(images, labels, 3, PIXELS)
    return train_trajectories(FlatNet(NET, 3, 8), data, config, seeds=seeds, **more)


# --- curriculum ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(500,), (5000,), (7, 500, 1, 5000)])
def test_sizes_of_the_curriculum_follow_the_paper(sizes: tuple[int, ...]) -> None:
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    orders = [
        o + torch.randperm(n, generator=torch.Generator().manual_seed(o)) for o, n in zip(offsets, sizes, strict=True)
    ]
    expected = {
        0: [max(1, int(0.75 * n)) for n in sizes],
        10: [max(1, int(0.875 * n)) for n in sizes],
        20: list(sizes),
        40: list(sizes),
        41: [n - int(0.1 * n) for n in sizes],
        60: [n - int(0.1 * n) for n in sizes],
        61: [n - int(0.2 * n) for n in sizes],
    }
    for epoch, counts in expected.items():
        rows = curriculum_rows(epoch, orders, PAD)
        assert torch.equal(rows, rows.unique())  # sorted, none twice
        for first, n, order, count in zip(offsets, sizes, orders, counts, strict=True):
            chosen = rows[(rows >= first) & (rows < first + n)]
            assert len(chosen) == count > 0
            easy = order[:count] if epoch <= 20 else order[n - count :]
            assert torch.equal(chosen, easy.sort().values)


def test_a_curriculum_that_is_complete_at_once_has_all_images() -> None:
    c = CurriculumConfig(order="unused", complete_at=0, removals=())
    assert [len(curriculum_rows(e, [torch.arange(9)], c)) for e in range(3)] == [9, 9, 9]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": ""}, "must name the file"),
        ({"initial": 0.0}, "initial .*0.0"),
        ({"removals": ((10, 0.1),)}, r"rising epochs of at least complete_at=20"),
        ({"removals": ((60, 0.1), (40, 0.2))}, "rising epochs"),
        ({"removals": ((40, 1.0),)}, r"a share in \[0, 1\)"),
    ],
)
def test_curricula_that_are_none_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PAD, **settings)


def test_orders_are_read_by_rows_of_the_split_without_held_out_ones(tmp_path: Path) -> None:
    file = tmp_path / "order.safetensors"
    save_file({"class-00000": torch.tensor([6, 0, 2, 4]), "class-00001": torch.tensor([5, 1, 3, 7])}, file)
    rows = torch.tensor([0, 1, 2, 4, 5, 6, 7])  # row 3 is held out
    orders = read_orders(file, torch.tensor([0, 1, 0, 0, 1, 0, 1]), rows)
    assert [o.tolist() for o in orders] == [[5, 0, 2, 3], [4, 1, 6]]
    with pytest.raises(InputError, match=r"5 train images of class 0, .*but 4"):
        read_orders(file, torch.tensor([0, 0, 0, 0, 1, 0, 1]), rows)
    with pytest.raises(InputError, match="there is no file"):
        read_orders(tmp_path / "none", torch.tensor([0]), torch.tensor([0]))


def test_images_outside_of_the_curriculum_are_not_seen() -> None:
    images, labels = toy()
    orders = [(labels == c).nonzero()[:, 0] for c in range(3)]
    hidden = torch.cat([o[12:] for o in orders])  # beyond three quarters of 16
    config = dataclasses.replace(SMALL, epochs=1, curriculum=PAD)
    other = images.clone()
    other[hidden] = 0
    ends = [
        train_trajectories(FlatNet(NET, 3, 8), TrainingSet(x, labels, 3, PIXELS), config, seeds=(1,), orders=orders)
        for x in (images, other)
    ]
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], trained(dataclasses.replace(SMALL, epochs=1), (1,)))


# --- networks as functions of a vector ------------------------------------------------------------------------------


def test_a_flat_network_is_the_network_and_its_gradient() -> None:
    flat, net = FlatNet(NET, 3, 8), make_net(NET, 3, 8, seed=7)
    theta = flat.initial(7).requires_grad_(True)
    x = PIXELS(toy()[0])
    torch.testing.assert_close(flat(theta, x), net(x))
    flat(theta, x).square().sum().backward()
    net(x).square().sum().backward()
    assert theta.grad is not None
    torch.testing.assert_close(theta.grad, torch.cat([p.grad.flatten() for p in net.parameters()]))


@pytest.mark.parametrize(
    ("classes", "depth", "share", "layer", "dropped"),
    [
        (10, 3, 0.25, "features.4", 0.52),
        (10, 3, 0.5, "features.8", 0.06),
        (10, 3, 0.75, "features.8", 0.60),
        (100, 3, 0.25, "features.4", 0.83),
        (100, 3, 0.5, "features.8", 0.68),
        (100, 3, 0.75, "classifier", 0.38),
        (200, 4, 0.25, "features.8", 0.43),
        (200, 4, 0.5, "features.12", 0.88),
        (200, 4, 0.75, "classifier", 0.48),
    ],
)
def test_a_share_of_the_parameters_ends_where_pad_has_it(
    classes: int, depth: int, share: float, layer: str, dropped: float
) -> None:
    net = FlatNet(f"convnet{depth}", classes, 64 if depth == 4 else 32)
    assert net.size == {10: 320_010, 100: 504_420, 200: 857_160}[classes]
    cut = net.cut(share)
    assert (cut.first, cut.layer) == (int(share * net.size), layer)
    assert cut.share == pytest.approx(dropped, abs=0.01)
    assert net.cut(0.0) == (0, "features.0", 0.0)
    with pytest.raises(InputError, match=r"lies in \[0, 1\)"):
        net.cut(1.0)


def test_statistics_over_batches_are_refused() -> None:
    with pytest.raises(InputError, match="'convnet3-bn' gathers statistics over batches"):
        FlatNet("convnet3-bn", 10, 32)


# --- training -----------------------------------------------------------------------------------------------------


def test_every_epoch_is_kept_and_the_first_is_the_start() -> None:
    t = trained()
    assert t.shape == (1, 5, FlatNet(NET, 3, 8).size)
    assert torch.equal(t[0, 0], FlatNet(NET, 3, 8).initial(5))
    steps = (t[0, 1:] - t[0, :-1]).norm(dim=1)
    assert (steps > 1e-3).all()  # checkpoints that share storage would be equal
    assert torch.equal(t, trained())
    assert not torch.equal(t, trained(seeds=(6,)))


def test_sgd_is_plain_and_in_the_order_of_the_seed() -> None:
    config = dataclasses.replace(SMALL, epochs=1, batch_size=48, augment="none")
    images, labels = toy()
    net = make_net(NET, 3, 8, seed=5)
    optimizer = torch.optim.SGD(net.parameters(), lr=config.lr)
    F.cross_entropy(net(PIXELS(images)), labels).backward()
    optimizer.step()
    end = torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(trained(config)[0, 1], end, rtol=1e-4, atol=1e-6)


def test_experts_side_by_side_are_those_of_separate_trainings() -> None:
    for optimizer in ("sgd", "gsam"):
        config = dataclasses.replace(SMALL, optimizer=optimizer, epochs=2)
        together = trained(config, (1, 2, 3))
        for i, seed in enumerate((1, 2, 3)):
            torch.testing.assert_close(together[i : i + 1], trained(config, (seed,)), rtol=1e-3, atol=2e-5)


def test_a_training_goes_on_bit_for_bit_from_any_epoch() -> None:
    whole = trained(dataclasses.replace(SMALL, optimizer="gsam"))
    for done in range(5):
        again = trained(dataclasses.replace(SMALL, optimizer="gsam"), resume=whole[:, : done + 1].clone())
        assert torch.equal(again, whole)


def test_gsam_is_its_formula_and_without_a_step_uphill_plain_sgd() -> None:
    theta = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
    a = torch.tensor([3.0, 1.0], dtype=torch.float64)

    def gradient(t: Tensor) -> tuple[Tensor, Tensor]:  # of sum a t^4 / 4
        return (a * t**4).sum(1) / 4, a * t**3

    losses, g = gsam_gradient(theta, gradient, 0.1, 0.3)
    torch.testing.assert_close(losses, (a * theta**4).sum(1) / 4)
    for row, result in zip(theta, g, strict=True):
        g1 = a * row**3
        up = row + 0.1 * row**2 * g1 / (row.abs() * g1).norm()
        g2 = a * up**3
        cos = g1 @ g2 / (g1.norm() * g2.norm())
        torch.testing.assert_close(result, g2 - 0.3 * (g1 - cos * g1.norm() * g2 / g2.norm()))
        # what is taken off lies across g2
        assert float((g2 - result) @ g2) == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(gsam_gradient(theta, gradient, 0.0, 0.3)[1], gradient(theta)[1])


def test_a_loss_that_is_no_number_stops_it() -> None:
    with pytest.raises(RunError, match=r"lower train_experts.lr=1e\+30"):
        trained(dataclasses.replace(SMALL, lr=1e30))


def test_zca_as_a_whitening_is_the_same_and_inverts() -> None:
    images, _ = toy()
    zca = fit_zca(images)
    w = zca.whitening()
    assert torch.equal(w(images), zca(images))
    torch.testing.assert_close(w.invert(w(images)), images.float() / 255, atol=1e-4, rtol=0)
    assert w.summary()["recipe"] == "mtt"


# --- files --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source() -> Any:
    from dq.data.load import load_source

    return load_source({"train": toy(), "test": toy(12)}, class_names=["a", "b", "c"])


def settings(folder: Path, **more: Any) -> RunConfig:
    t = {"net": NET, "epochs": 3, "batch_size": 8, "lr": 0.1, "optimizer": "sgd", "whiten": False, "number": 2}
    t |= {"output_dir": str(folder / "experts"), **more}
    values = {f"train_experts.{k}": v for k, v in t.items()} | {"source.image_size": 8, "cache_dir": str(folder / "c")}
    return apply_settings(RunConfig(), {**values, "evaluate.validation_images": 9})


def test_experts_are_written_measured_and_opened(source: Any, accelerator: Any, tmp_path: Path) -> None:
    folder = train_experts(settings(tmp_path, whiten=True), source, accelerator=accelerator)
    experts = open_experts(folder)
    assert (experts.number, experts.epochs, experts.net.name) == (2, 3, NET)
    assert experts.whitening.summary()["recipe"] == "mtt"
    assert not torch.equal(experts.parameters(0, 0), experts.parameters(1, 0))
    assert not torch.equal(experts.parameters(0, 2), experts.parameters(0, 3))
    # the accuracy is that of the last epoch on the train images that were set aside
    from dq.data.splits import validation_rows

    images, labels = toy()
    rows = torch.from_numpy(validation_rows(labels.numpy(), 9))
    hits = flat_accuracy(experts.net, experts.parameters(1, 3), images[rows], labels[rows], experts.whitening)
    assert read_metadata(expert_file(folder, 1))["accuracy"] == hits == experts.accuracies[1]
    # more experts leave those that are there alone, and are those of one training of all
    before = {p.name: p.read_bytes() for p in folder.glob("expert-*")}
    train_experts(settings(tmp_path, whiten=True, number=3), source, accelerator=accelerator)
    assert {n: (folder / n).read_bytes() for n in before} == before
    assert open_experts(folder).number == 3
    assert open_experts(folder).digest != experts.digest


def test_a_killed_training_goes_on_bit_for_bit(
    source: Any, accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_experts(train_experts(settings(tmp_path / "whole"), source, accelerator=accelerator))
    config = settings(tmp_path, checkpoint_s=1e-9)
    real, calls = training._Saver.__call__, []

    def killed(self: Any, epoch: int, loss: float, kept: Any) -> None:
        real(self, epoch, loss, kept)
        calls.append(epoch)
        if len(calls) == 5:  # in the second expert, behind its second epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._Saver, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            train_experts(config, source, accelerator=accelerator)
    folder = tmp_path / "experts"
    with pytest.raises(InputError, match="holds no finished experts"):
        open_experts(folder)
    calls.clear()
    monkeypatch.setattr(
        training._Saver,
        "__call__",
        lambda self, epoch, loss, kept: calls.append(epoch) or real(self, epoch, loss, kept),
    )
    train_experts(config, source, accelerator=accelerator)
    assert calls == [3]
    experts = open_experts(folder)
    for i in range(2):
        for epoch in range(4):
            assert torch.equal(experts.parameters(i, epoch), whole.parameters(i, epoch))
    assert not list(folder.glob("*.partial*"))


def test_experts_of_other_settings_and_broken_files_are_refused(source: Any, accelerator: Any, tmp_path: Path) -> None:
    folder = train_experts(settings(tmp_path), source, accelerator=accelerator)
    with pytest.raises(RunError, match=r"other settings or data; .*train_experts"):
        check_expert_training(settings(tmp_path, lr=0.2), source, accelerator)
    file = expert_file(folder, 1)
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(
        RunError, match=r"expert-0001.safetensors is damaged or missing .*give `dq train-experts` again"
    ):
        open_experts(folder)
    # the same command makes it again, the same bits
    train_experts(settings(tmp_path), source, accelerator=accelerator)
    assert open_experts(folder).parameters(1, 3).shape == (FlatNet(NET, 3, 8).size,)
    other = train_experts(settings(tmp_path / "other", seed=1), source, accelerator=accelerator)
    file.write_bytes(expert_file(other, 1).read_bytes())
    with pytest.raises(RunError, match=r"another training than experts\.json"):
        open_experts(folder)
    assert read_json(folder / "experts.json")["facts"]["net"] == NET


def test_the_order_of_a_curriculum_is_part_of_what_experts_are(source: Any, accelerator: Any, tmp_path: Path) -> None:
    _, labels = toy()
    order = {f"class-{c:05d}": (labels == c).nonzero()[:, 0] for c in range(3)}
    save_file(order, tmp_path / "order.safetensors")
    curriculum = {"order": str(tmp_path / "order.safetensors"), "complete_at": 2, "removals": [[2, 0.5]]}
    config = settings(tmp_path, curriculum=curriculum)
    identity = check_expert_training(config, source, accelerator).identity
    save_file({k: v.flip(0).contiguous() for k, v in order.items()}, tmp_path / "order.safetensors")
    assert check_expert_training(config, source, accelerator).identity != identity
    train_experts(config, source, accelerator=accelerator)
    save_file({"class-00000": order["class-00000"]}, tmp_path / "order.safetensors")
    with pytest.raises(InputError, match="13 train images of class 1"):
        check_expert_training(config, source, accelerator)
