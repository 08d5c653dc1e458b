"""FRePo's regression against numbers that are known without a long run; on real images where DQ_TEST_DATA has them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def anchors() -> ModuleType:
    spec = importlib.util.spec_from_file_location("frepo_anchors", ROOT / "pipelines" / "frepo_anchors.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None].expand(-1, 3, -1, -1) / 16
    labels = torch.from_numpy(data.target)
    return (images[:1347], labels[:1347]), (images[1347:], labels[1347:])


def test_one_learned_digit_per_class_is_as_good_as_all_digits(anchors: ModuleType) -> None:
    """Linear features: Chen et al., NeurIPS 2024."""
    accuracies = anchors.linear_anchor(*digits(), steps=300)
    assert 0.85 < accuracies["full"] < 0.95
    assert accuracies["learned"] == pytest.approx(accuracies["full"], abs=0.005)  # two of 450 images


def test_learned_images_give_the_weights_of_all_data(anchors: ModuleType) -> None:
    (images, labels), _ = digits()
    x = anchors.linear_features(images, anchors.fit_whitening(images, zca=False))
    moments = anchors.second_moments(x, labels, 10) / len(x)
    full, learned = anchors.ridge_weights(moments, 10, 1e-2), anchors.learn_linear(moments, 10, 1e-2, steps=300)
    expected = anchors.centered_targets(labels, 10).double()
    explicit = torch.linalg.solve(
        x.T @ x + 1e-2 * len(x) * (x.square().mean()) * torch.eye(64, dtype=x.dtype), x.T @ expected
    )
    torch.testing.assert_close(full, explicit)
    assert (x @ (learned - full)).norm() < 0.02 * (x @ full).norm()


def test_more_real_digits_predict_better_through_a_random_network(anchors: ModuleType) -> None:
    train, test = digits()
    whitening = anchors.fit_whitening(train[0])
    accuracies = anchors.random_feature_accuracies(train, test, whitening, 0, sizes=(10, 100), net="frepoconv3w32")
    assert 0.3 < accuracies[10, False] < accuracies[100, False] - 0.05
    assert accuracies == anchors.random_feature_accuracies(train, test, whitening, 0, (10, 100), "frepoconv3w32")


def real(name: str) -> Path:
    folder = Path(os.environ.get("DQ_TEST_DATA", ""), name)
    if "DQ_TEST_DATA" not in os.environ or not folder.is_dir():
        pytest.skip(f"DQ_TEST_DATA names no folder with {name} in it")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "published"), [("cifar10", 32, 0.3948), ("fashion-mnist", 28, None)])
def test_one_learned_image_per_class_is_as_good_as_all_images(
    anchors: ModuleType, name: str, side: int, published: float | None
) -> None:
    from dq.data.load import load_source

    source = load_source(str(real(name)))
    accuracies = anchors.linear_anchor(anchors.read(source.train, side), anchors.read(source.test, side))
    assert accuracies["learned"] == pytest.approx(accuracies["full"], abs=0.005)
    if published is not None:
        assert accuracies["learned"] == pytest.approx(published, abs=0.01)


@pytest.mark.slow
def test_random_features_of_real_images_are_worth_what_was_measured(anchors: ModuleType) -> None:
    from dq.data.load import load_source

    source = load_source(str(real("cifar10")))
    train = anchors.read(source.train, 32)
    sizes = (10, 100, 500)
    accuracies = anchors.random_feature_accuracies(
        train, anchors.read(source.test, 32, 500), anchors.fit_whitening(train[0]), 0, sizes
    )
    for (n, mirrors), accuracy in accuracies.items():
        if (n, mirrors) in anchors.EXPECTED:
            # of 500 images: two standard errors of the measured number and two of this one, and other images
            assert 100 * accuracy == pytest.approx(anchors.EXPECTED[n, mirrors], abs=6)
