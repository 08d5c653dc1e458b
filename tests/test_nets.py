"""Networks: sizes and parameter names that others rely on, the functions they compute, and seeded initial weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dq.errors import InputError
from dq.nets import fast_layout, make_net


def images(n: int, side: int) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "num_classes", "side", "parameters"),
    [
        ("convnet3", 10, 32, 320010),
        ("convnet3", 100, 32, 504420),
        ("convnet3-bn", 10, 32, 320010),
        ("convnet4", 200, 64, 857160),
        ("convnet6", 10, 224, 754570),
        ("resnet20", 10, 32, 269722),
        ("resnet56", 10, 32, 853018),
        ("resnet18", 10, 32, 11173962),
        ("resnet18-in", 10, 32, 11173962),
        ("resnet18", 1000, 224, 11689512),
    ],
)
def test_parameter_counts_of_the_literature(name, num_classes, side, parameters):
    net = make_net(name, num_classes, side, seed=0)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "side"),
    [("convnet3", 8), ("convnet3", 28), ("convnet4", 64), ("resnet20", 32), ("resnet18", 32), ("resnet18", 96)],
)
def test_logits_have_one_column_per_class(name, side):
    net = make_net(name, 7, side, seed=0).eval()
    with torch.no_grad():
        logits = net(images(2, side))
    assert logits.shape == (2, 7)
    assert logits.std() > 0


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 3), ("resnet56", 9)])
def test_cifar_resnet_has_the_names_of_its_published_weights(name, blocks):
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{p}" for p in norm)}
    for stage in (1, 2, 3):
        for i in range(blocks):
            for j in (1, 2):
                expected.add(f"layer{stage}.{i}.conv{j}.weight")
                expected.update(f"layer{stage}.{i}.bn{j}.{p}" for p in norm)
    state = make_net(name, 10, 32, seed=0).state_dict()
    assert set(state) == expected
    assert state["layer1.0.conv1.weight"].shape == (16, 16, 3, 3)
    assert state["layer3.0.conv1.weight"].shape == (64, 32, 3, 3)
    assert state["linear.weight"].shape == (10, 64)


def test_resnet18_has_the_names_of_torchvision():
    keys = set(make_net("resnet18", 1000, 224, seed=0).state_dict())
    assert len(keys) == 122
    assert {"conv1.weight", "bn1.running_var", "layer1.1.conv2.weight", "layer4.1.bn2.bias", "fc.bias"} <= keys
    assert {k for k in keys if "downsample.0" in k} == {f"layer{i}.0.downsample.0.weight" for i in (2, 3, 4)}


def test_resnet18_keeps_the_resolution_of_small_images():
    sizes = {}
    for side in (32, 64, 128):
        net = make_net("resnet18", 10, side, seed=0).eval()
        net.layer1.register_forward_hook(lambda m, x, y, side=side: sizes.__setitem__(side, y.shape[-1]))
        with torch.no_grad():
            net(images(1, side))
    assert sizes == {32: 32, 64: 64, 128: 32}


def test_convnet_is_conv_instance_norm_relu_pool():
    net = make_net("convnet3", 10, 16, seed=3)
    p = dict(net.named_parameters())
    x = images(2, 16)
    y = x
    with torch.no_grad():
        for i in (0, 4, 8):
            y = F.conv2d(y, p[f"features.{i}.weight"], p[f"features.{i}.bias"], padding=1)
            var, mean = torch.var_mean(y, (2, 3), correction=0, keepdim=True)
            y = (y - mean) / (var + 1e-5).sqrt()
            y = y * p[f"features.{i + 1}.weight"].view(1, -1, 1, 1) + p[f"features.{i + 1}.bias"].view(1, -1, 1, 1)
            y = y.clamp(min=0).unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
        y = y.flatten(1) @ p["classifier.weight"].T + p["classifier.bias"]
        torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)


def test_resnet20_is_the_published_function():
    """Written out once more with option A shortcuts, in training mode: no running statistics are needed."""
    net = make_net("resnet20", 10, 8, seed=3).train()
    p = dict(net.named_parameters())

    def conv_norm(y, conv, norm, stride=1):
        y = F.conv2d(y, p[f"{conv}.weight"], stride=stride, padding=1)
        return F.batch_norm(y, None, None, p[f"{norm}.weight"], p[f"{norm}.bias"], training=True)

    x = images(4, 8)
    with torch.no_grad():
        y = conv_norm(x, "conv1", "bn1").relu()
        for stage, width in ((1, 16), (2, 32), (3, 64)):
            for i in range(3):
                block = f"layer{stage}.{i}"
                narrow = stage > 1 and i == 0
                z = conv_norm(y, f"{block}.conv1", f"{block}.bn1", stride=2 if narrow else 1).relu()
                z = conv_norm(z, f"{block}.conv2", f"{block}.bn2")
                if narrow:
                    zeros = torch.zeros(4, width // 4, *z.shape[2:])
                    y = torch.cat([zeros, y[:, :, ::2, ::2], zeros], 1)
                y = (z + y).relu()
        expected = y.mean((2, 3)) @ p["linear.weight"].T + p["linear.bias"]
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "norm", "alone"),
    [
        ("convnet3", None, True),
        ("convnet3-bn", None, False),
        ("convnet3", "batch", False),
        ("resnet20", None, False),
        ("resnet20-in", None, True),
        ("resnet20", "instance", True),
    ],
)
def test_instance_norm_looks_at_one_image_and_batch_norm_at_all(name, norm, alone):
    net = make_net(name, 10, 16, norm=norm, seed=0).train()
    x = images(3, 16)
    with torch.no_grad():
        same = torch.allclose(net(x)[:2], net(x[:2]), rtol=1e-4, atol=1e-5)
    assert same == alone


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("convnet3", torch.contiguous_format),
        ("resnet20", torch.channels_last),
        ("resnet20-in", torch.contiguous_format),
    ],
)
def test_layout_follows_the_norm_and_leaves_the_function_alone(name, layout):
    net = make_net(name, 10, 16, seed=0)
    assert fast_layout(net) is layout
    with torch.no_grad():
        before = net(images(3, 16))
        moved = net.to(memory_format=layout)
        torch.testing.assert_close(moved(images(3, 16)), before, rtol=1e-4, atol=1e-5)
    assert moved.state_dict().keys() == make_net(name, 10, 16, seed=1).state_dict().keys()


def test_weights_depend_on_the_seed_and_on_nothing_global():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = make_net("convnet3", 10, 8, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = (make_net("convnet3", 10, 8, seed=s).state_dict() for s in (1, 2))
    for key, value in first.items():
        assert torch.equal(value, again[key])
        if key.endswith("weight") and value.ndim > 1:
            assert not torch.equal(value, other[key])


def test_resnet_convolutions_start_with_he_variance():
    net = make_net("resnet20", 10, 32, seed=0)
    weight = net.layer3[1].conv1.weight  # fan in 64 * 9
    # 36,864 draws: the relative error of the sample variance is sqrt(2 / n) = 0.7 %
    assert weight.var().item() == pytest.approx(2 / (64 * 9), rel=0.04)
    assert all(
        torch.equal(m.weight, torch.ones_like(m.weight)) for m in net.modules() if isinstance(m, nn.BatchNorm2d)
    )


def test_unknown_names_list_the_known_ones():
    for name in ("vgg11", "convnet3-gn", "convnet2", ""):
        with pytest.raises(InputError, match=r"convnet3, convnet4.*resnet20, resnet56, resnet18"):
            make_net(name, 10, 32, seed=0)
    with pytest.raises(InputError, match="only one"):
        make_net("convnet3-bn", 10, 32, norm="instance", seed=0)
    with pytest.raises(InputError, match="'instance' or 'batch'"):
        make_net("convnet3", 10, 32, norm="layer", seed=0)


@pytest.mark.parametrize(
    ("name", "side", "least"), [("convnet4", 8, 16), ("convnet3", 7, 8), ("resnet18", 8, 9), ("resnet20-in", 4, 5)]
)
def test_images_too_small_for_the_depth_are_refused(name, side, least):
    with pytest.raises(InputError, match=f"at least {least} px, not {side}"):
        make_net(name, 10, side, seed=0)
    assert make_net(name, 10, least, seed=0).train()(images(2, least)).std() > 0
