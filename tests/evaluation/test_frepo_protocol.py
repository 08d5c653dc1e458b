"""The protocol `frepo`: its settings by size, squared error, augmentation, and sets that it refuses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_kl
from torch import nn

from dq.config.overrides import apply_settings
from dq.config.protocols import student_config
from dq.config.schema import RunConfig
from dq.config.students import StudentConfig
from dq.core.errors import InputError
from dq.data import augment as aug
from dq.distilled.external import set_from_tensors
from dq.evaluation.evaluate import evaluate
from dq.evaluation.results import to_csv
from dq.evaluation.student import (
    check_label_kind,
    fixed_labels,
    krr_accuracy,
    recorded_temperature,
    regression_labels,
    training_data,
)
from dq.evaluation.tables import tables_text
from dq.networks.losses import image_losses
from dq.networks.real_data import check_whitened
from dq.networks.schedule import learning_rate
from dq.networks.training import Pixels


def protocol(ipc: int | str, classes: int = 10, side: int = 32, **own: Any) -> StudentConfig:
    return student_config({"protocol": "frepo", **own}, ipc=str(ipc), classes=classes, image_size=side)


@pytest.mark.parametrize(
    ("ipc", "classes", "steps"),
    [
        (1, 10, 1000),
        (10, 10, 2000),
        (1, 100, 2000),
        (1, 200, 20_000),
        (50, 10, 5000),
        (10, 100, 10_000),
        (10, 200, 40_000),
        (50, 100, 40_000),
    ],
)
def test_steps_are_the_published_ones(ipc: int, classes: int, steps: int) -> None:
    c = protocol(ipc, classes)
    per_epoch = math.ceil(ipc * classes / c.batch_size)
    assert c.epochs * per_epoch == steps
    assert c.warmup * per_epoch == 500


def test_it_is_a_squared_error_with_adam_and_no_norm() -> None:
    c = protocol(1)
    assert (c.net, c.norm, c.labels, c.loss) == ("frepoconv3", "none", "fixed", "mse")
    assert (c.optimizer, c.lr, c.weight_decay, c.tests, c.zca) == ("adamw", 3e-4, 0.0, 1, "frepo")
    assert learning_rate(c, 501, c.epochs) == pytest.approx(3e-4)
    assert learning_rate(c, 1000, c.epochs) == pytest.approx(3e-6, rel=0.01)
    assert protocol(1, 200, 64).net == "frepoconv4"
    assert protocol(1, dataset="fashion_mnist").augment == "frepo_noflip"
    assert protocol(1).augment == "frepo"
    assert protocol(1, net="alexnet").norm is None
    assert protocol(1, net="vgg11").norm == "none"


def test_the_loss_is_half_the_squared_error_summed_over_classes() -> None:
    logits, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.0]])
    y = torch.zeros(1, dtype=torch.int64)
    assert image_losses(logits, y, y, 1.0, target, protocol(1)).tolist() == [0.5 * (0.25 + 4)]
    with pytest.raises(InputError, match=r"loss=mse .*one label vector"):
        StudentConfig(labels="soft", augment="none", loss="mse")


@pytest.mark.parametrize("operation", aug.FREPO_OPERATIONS)
def test_every_operation_keeps_shapes_and_differs_between_images(operation: str) -> None:
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    y = aug.frepo(x[:1].expand_as(x), torch.Generator().manual_seed(0), operation=operation)
    assert y.shape == x.shape
    assert torch.isfinite(y).all()
    assert len(y.flatten(1).unique(dim=0)) > 1
    if operation == "cutout":
        assert int((y[:, 0] == 0).flatten(1).sum(1).max()) == 16
    if operation == "zoom":
        assert not torch.allclose(y, x[:1])


def test_one_operation_is_drawn_for_a_batch_and_digits_are_not_mirrored() -> None:
    x = torch.arange(8.0).expand(40, 3, 8, 8)
    mirrored = x.flip(3)
    for kind, expected in (("frepo", True), ("frepo_noflip", False)):
        results = [aug.augment(kind, x, torch.Generator().manual_seed(s)) for s in range(60)]
        # a batch whose images are all themselves or mirrored comes of a flip (an angle of zero has no probability)
        whole = [
            all(bool((v == a).all() or (v == b).all()) for v, a, b in zip(y, x, mirrored, strict=True))
            for y in results
        ]
        assert any(whole) == expected
    with pytest.raises(InputError, match="no operation 'blur'; it has color, zoom"):
        aug.frepo(x, torch.Generator(), operation="blur")


def labeled(kind: str | None) -> Any:
    x, y = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.arange(3)
    s = set_from_tensors(x, y, ("a", "b", "c"), origin="here")
    if kind is None:
        return s
    vectors = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    vectors = vectors.log() if kind == "logits" else vectors
    return dataclasses.replace(s, soft_labels=vectors, label_kind=kind)


def test_every_kind_of_labels_becomes_regression_labels() -> None:
    scale = (3 / 10) ** 0.5
    torch.testing.assert_close(regression_labels(labeled(None)), (torch.eye(3) - 1 / 3) / scale)
    expected = (labeled("probabilities").soft_labels - 1 / 3) / scale
    torch.testing.assert_close(regression_labels(labeled("probabilities")), expected)
    torch.testing.assert_close(regression_labels(labeled("logits")), expected)
    torch.testing.assert_close(regression_labels(labeled("regression")), labeled("regression").soft_labels)


def test_regression_labels_are_refused_by_a_cross_entropy_student() -> None:
    kl = StudentConfig(labels="fixed")
    with pytest.raises(
        InputError, match=r"label_kind=regression, which .* cannot learn from with loss=kl; set loss=mse"
    ):
        check_label_kind(labeled("regression"), "set", [kl])
    for kind in ("regression", "probabilities", "logits"):
        check_label_kind(labeled(kind), "set", [protocol(1)])
    broken = torch.full((3, 3), float("nan"))
    with pytest.raises(InputError, match="soft_labels of a distilled set must be finite"):
        dataclasses.replace(labeled("regression"), soft_labels=broken)


def test_a_recorded_temperature_lets_a_cross_entropy_student_learn_from_regression_labels() -> None:
    kl, s = StudentConfig(labels="fixed", temperature=1.0), labeled("regression")
    recorded = dataclasses.replace(s, provenance={"refine": [{"summary": {"label_temperature": 0.2}}]})
    check_label_kind(recorded, "set", [kl, protocol(1)])
    logits = fixed_labels(recorded, training_data(recorded, 8), kl)
    torch.testing.assert_close(logits.softmax(1), (s.soft_labels / 0.2).softmax(1))
    assert torch.equal(fixed_labels(recorded, training_data(recorded, 8), protocol(1)), s.soft_labels)
    # labels of a later stage are no regression labels, and have no temperature
    assert recorded_temperature(dataclasses.replace(recorded, label_kind="probabilities")) is None


def test_frepo_whitens_images_up_to_128_px_and_mtt_up_to_64() -> None:
    check_whitened(64)
    check_whitened(128, "frepo")
    assert student_config({"protocol": "frepo"}, ipc="1", classes=10, image_size=128).net == "frepoconv5"
    for side, kind in ((66, "mtt"), (130, "frepo")):
        with pytest.raises(InputError, match=f"too large at {side} px; leave it out"):
            check_whitened(side, kind)


def test_ridge_regression_on_features_predicts_what_the_formula_does() -> None:
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 7), nn.ReLU(), nn.Linear(7, 3))
    x, y = torch.rand(5, 3, 4, 4, generator=g), torch.randn(5, 3, generator=g)
    queries = torch.rand(40, 3, 4, 4, generator=g)
    pixels: Pixels = lambda v: v.float()  # noqa: E731
    f, q = (net[:3](v).double().detach() for v in (x, queries))
    a = f @ f.T + 1e-6 * f.square().sum() / 5 * torch.eye(5, dtype=torch.float64)
    expected = (q @ f.T @ torch.linalg.solve(a, y.double())).argmax(1)
    assert krr_accuracy(net, x, y, (queries, expected), pixels=pixels) == 1
    assert krr_accuracy(net, x, y, (queries, (expected + 1) % 3), pixels=pixels) == 0


def test_a_table_of_rows_with_and_without_a_second_predictor_is_whole() -> None:
    assert to_csv([{"set": "a"}, {"set": "b", "krr_mean": 0.5}]) == "set,krr_mean\na,\nb,0.5\n"


def distilled(toy_source: Any, accelerator: Any, out: Path) -> Any:
    from dq.run.distill import DistillPipeline

    small = {"steps": 4, "lr": 0.02, "nets": ["frepoconv3w32"], "pool_size": 2, "real_batch": 8}
    config = apply_settings(
        RunConfig(output_dir=str(out / "run"), cache_dir=str(out / "cache")),
        {"codec.resolution": 8, "ipc": [2], "refine": [{"stage": "frepo", **small}]},
    )
    pipe = DistillPipeline(vae=tiny_kl())
    return pipe.distill(toy_source, ipc=2, config=config, output_dir=config.output_dir, accelerator=accelerator)


def test_a_learned_set_and_random_images_are_scored_without_a_teacher(
    toy_source: Any, toy_images: Any, accelerator: Any, tmp_path: Path
) -> None:
    s = distilled(toy_source, accelerator, tmp_path)
    settings: dict[str, Any] = {
        "protocol": "frepo",
        "students": "frepoconv3w32",
        "epochs": 3,
        "n_seeds": 1,
        "baselines": ("random",),
        "cache_dir": tmp_path / "cache",
    }
    rows = evaluate(s, toy_source, **settings, output_dir=tmp_path / "scores").rows
    assert {r.set for r in rows} == {"set", "random"}
    assert all("squared error" in r.settings and "ZCA of FRePo" in r.settings for r in rows)
    assert all(len(r.krr) == 1 and 0 <= r.krr[0] <= 1 and "krr_mean" in r.record() for r in rows)
    assert "In parentheses: kernel ridge regression" in tables_text(list(rows))
    rows = evaluate(s, toy_source, **{**settings, "protocol": "classic"}, output_dir=tmp_path / "classic").rows
    assert {r.labels for r in rows} == {"hard"}
    assert all(r.krr == () and "krr_mean" not in r.record() for r in rows)
    # the same set on images of another brightness
    from dq.data.load import load_source

    darker = {name: (x * 0.5, y) for name, (x, y) in toy_images.items()}
    other = load_source(darker, class_names=["red", "green", "blue"])
    with pytest.raises(InputError, match=r"'set' .*whitening of other images"):
        evaluate(s, other, **settings, output_dir=tmp_path / "other")
