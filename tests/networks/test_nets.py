"""Networks: sizes and parameter names that others rely on, the functions they compute, and seeded initial weights."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dq.core.errors import InputError
from dq.networks.layers import counters_to, draws_randomly
from dq.networks.zoo import check_net, fast_layout, make_net, net_of_weights


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
        ("resnet50", 1000, 224, 25557032),
        ("resnet101", 1000, 224, 44549160),
        # conv 9,728 + 614,592 + 442,624 + 442,560 + 331,968, linear 192 * 4 * 4 * 10 + 10
        ("alexnet", 10, 32, 1872202),
        ("vgg11", 10, 32, 9231114),
        ("vgg11-bn", 10, 32, 9231114),
        # those of resnet18, but the classifier sees 4x4 pixels: 512 * 15 * 10 weights more
        ("resnet18ap", 10, 32, 11173962 + 76800),
        # stem 9,536; stages 73,984 + 230,144 + 919,040 + 3,673,088; linear 5,130
        ("resnetap10", 10, 224, 4910922),
        # those of torchvision's mobilenet_v2, shufflenet_v2_x1_0, shufflenet_v2_x0_5 and densenet121
        ("mobilenetv2", 1000, 224, 3504872),
        ("shufflenetv2", 1000, 224, 2278604),
        ("shufflenetv2x05", 1000, 224, 1366792),
        ("densenet121", 1000, 224, 7978856),
    ],
)
def test_parameter_counts_of_the_literature(name, num_classes, side, parameters):
    net = make_net(name, num_classes, side, seed=0)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("convnet3", 8),
        ("convnet3", 28),
        ("convnet4", 64),
        ("resnet20", 32),
        ("resnet18", 32),
        ("resnet18", 96),
        ("resnet50", 16),
        ("resnet101", 72),
        ("alexnet", 28),
        ("vgg11", 32),
        ("vgg11", 64),
        ("resnet18ap", 32),
        ("resnet18ap", 72),
        ("resnetap10", 32),
        ("resnetap10", 72),
        ("resnetap10", 132),
    ],
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


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "pool", "map_side"),
    # IDC and MinimaxDiffusion 969fc6f: a 3x3 stem of stride 1 up to 128 px, with torchvision's max pool from 65 px
    [
        (32, 3, 1, nn.Identity, 32),
        (64, 3, 1, nn.Identity, 64),
        (65, 3, 1, nn.MaxPool2d, 33),
        (128, 3, 1, nn.MaxPool2d, 64),
        (129, 7, 2, nn.MaxPool2d, 33),
    ],
)
def test_the_stem_of_resnet18_follows_the_side(side, kernel, stride, pool, map_side):
    net = make_net("resnet18", 10, side, seed=0).eval()
    assert (net.conv1.kernel_size[0], net.conv1.stride[0], type(net.maxpool)) == (kernel, stride, pool)
    sizes = []
    net.layer1.register_forward_hook(lambda m, x, y: sizes.append(y.shape[-1]))
    with torch.no_grad():
        net(images(1, side))
    assert sizes == [map_side]


def deviation(name: str, layer: str, side: int = 32, **options) -> float:
    return make_net(name, 100, side, seed=0, **options).get_submodule(layer).weight.std().item()


def test_networks_for_small_images_start_from_the_default_of_pytorch():
    """A 3x3 convolution of 64 channels: 1/sqrt(3 * 576) = 0.0241, and sqrt(2 / 576) = 0.0589 by He's law."""
    for name in ("resnet18", "resnet18ap", "resnet18-in"):
        assert deviation(name, "layer1.0.conv1") == pytest.approx(0.0241, rel=0.02)
    # 3 channels: 1/sqrt(3 * 27)
    assert deviation("resnet18", "conv1") == pytest.approx(0.111, rel=0.05)
    # 128 channels: 1/sqrt(3 * 1152)
    assert deviation("densenet121", "features.denseblock1.denselayer1.conv2") == pytest.approx(0.0170, rel=0.02)
    # 96 channels: 1/sqrt(3 * 96)
    assert deviation("mobilenetv2", "features.2.conv.0.0") == pytest.approx(1 / 48**0.5, rel=0.05)
    # larger images: torchvision's initialization
    assert deviation("resnet18", "layer1.0.conv1", 65) == pytest.approx(0.0589, rel=0.02)
    # IDC's, at any side
    assert deviation("resnetap10", "layer1.0.conv1") == pytest.approx(0.0589, rel=0.02)


def test_small_resnets_have_a_choice_of_initialization():
    """RDED and SRe2L replace the stem of torchvision's network; IDC draws all convolutions alike."""
    for init, stem in (("torchvision", 0.111), ("fan_out", 0.0589)):
        assert deviation("resnet18", "layer1.0.conv1", init=init) == pytest.approx(0.0589, rel=0.02)
        assert deviation("resnet18", "conv1", init=init) == pytest.approx(stem, rel=0.05)
    with pytest.raises(InputError, match=r"'resnet20' .*resnet18, resnet50, resnet101"):
        make_net("resnet20", 10, 32, init="fan_out", seed=0)
    with pytest.raises(InputError, match="init must be one of 'torchvision', 'fan_out', not 'normal'"):
        make_net("resnet18", 10, 32, init="normal", seed=0)
    with pytest.raises(InputError, match="comes with its own initialization"):
        make_net("torchvision:resnet18", 10, 32, init="fan_out", seed=0)


def test_small_mobilenetv2_is_that_of_fadrm():
    """FADRM f445e38: 2,412,212 parameters for 100 classes."""
    net = make_net("mobilenetv2", 100, 32, seed=0)
    assert sum(p.numel() for p in net.parameters()) == 2412212
    kinds = [type(m) for m in net.modules()]
    assert nn.ReLU in kinds
    assert nn.ReLU6 not in kinds
    assert nn.Dropout not in kinds
    blocks = net.features[1:-1]
    # stages 1, 5 and 7 change the channels at stride 1, and so does stage 2 here
    shortcuts = [i for i, b in enumerate(blocks) if isinstance(b.shortcut, nn.Sequential)]
    assert [(blocks[i].shortcut[0].in_channels, blocks[i].shortcut[0].out_channels) for i in shortcuts] == [
        (32, 16),
        (16, 24),
        (64, 96),
        (160, 320),
    ]
    x = images(2, 32)
    with torch.no_grad():
        assert net.features(x).shape == (2, 1280, 4, 4)
        y = net.features[0](x)
        torch.testing.assert_close(blocks[0](y), blocks[0].conv(y) + blocks[0].shortcut(y))


def test_small_densenet_has_no_norm_behind_the_stem():
    """FADRM f445e38: 120 batch norms, the first that of the first dense layer."""
    norms = [n for n, m in make_net("densenet121", 100, 32, seed=0).named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 120
    assert norms[0] == "features.denseblock1.denselayer1.norm1"
    assert sum(isinstance(m, nn.BatchNorm2d) for m in make_net("densenet121", 100, 224, seed=0).modules()) == 121


def test_saved_weights_bring_their_stem():
    """Weights of 96 px images from before these got a 3x3 stem."""
    old = make_net("resnet18", 10, 224, seed=1).eval()
    net = net_of_weights("resnet18", 10, 96, old.state_dict()).eval()
    net.load_state_dict(old.state_dict())
    with torch.no_grad():
        assert torch.equal(net(images(2, 96)), old(images(2, 96)))
    new = make_net("resnet18", 10, 96, seed=1).state_dict()
    assert net_of_weights("resnet18", 10, 96, new).conv1.kernel_size == (3, 3)


def test_resnet50_has_the_names_and_strides_of_torchvision():
    net = make_net("resnet50", 1000, 224, seed=0)
    state = net.state_dict()
    assert len(state) == 320
    assert state["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert state["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert net.layer2[0].conv1.stride == (1, 1)
    assert net.layer2[0].conv2.stride == (2, 2)


@pytest.mark.parametrize(
    ("name", "side", "maps"),
    [
        ("resnetap10", 32, [32, 32, 16, 8, 4]),
        ("resnetap10", 128, [64, 64, 32, 16, 8]),
        ("resnetap10", 160, [40, 40, 20, 10, 5]),
        ("resnet18ap", 32, [32, 32, 16, 8, 4]),
    ],
)
def test_resnet_ap_shrinks_by_average_pools_alone(name, side, maps):
    net = make_net(name, 10, side, seed=0).eval()
    assert all(m.stride == (1, 1) for m in net.modules() if isinstance(m, nn.Conv2d))
    assert not any(isinstance(m, nn.MaxPool2d) for m in net.modules())
    assert net.conv1.kernel_size == ((7, 7) if side > 128 else (3, 3))
    sizes = []
    for part in (net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4):
        part.register_forward_hook(lambda m, x, y: sizes.append(y.shape[-1]))
    with torch.no_grad():
        net(images(1, side))
    assert sizes == maps


def test_pooled_block_is_conv_pool_conv_beside_conv_pool():
    """The first block of a stage of ResNetAP-10, written out."""
    block = make_net("resnetap10", 10, 32, seed=3).layer2[0]
    p = dict(block.named_parameters())

    def norm(y, name):
        return F.group_norm(y, 128, p[f"{name}.weight"], p[f"{name}.bias"])

    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = F.avg_pool2d(norm(F.conv2d(x, p["conv1.weight"], padding=1), "bn1").relu(), 2)
        y = norm(F.conv2d(y, p["conv2.weight"], padding=1), "bn2")
        beside = norm(F.avg_pool2d(F.conv2d(x, p["downsample.0.weight"]), 2), "downsample.2")
        torch.testing.assert_close(block(x), (y + beside).relu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "pools"), [("alexnet", [True, True, False, False, True]), ("vgg11", [1, 1, 0, 1, 0, 1, 0, 1])]
)
def test_alexnet_and_vgg11_are_convolutions_relus_and_max_pools(name, pools):
    net = make_net(name, 10, 32, seed=3)
    p = list(net.features.parameters())
    y = x = images(2, 32)
    with torch.no_grad():
        for pool in pools:
            weight = p.pop(0)
            y = F.conv2d(y, weight, p.pop(0), padding=weight.shape[-1] // 2)
            if name == "vgg11":
                y = F.group_norm(y, weight.shape[0], p.pop(0), p.pop(0))
            y = F.max_pool2d(y.relu(), 2) if pool else y.relu()
        head = list(net.parameters())[-2:]
        torch.testing.assert_close(net(x), y.flatten(1) @ head[0].T + head[1], rtol=1e-4, atol=1e-4)
    assert p == []


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
    for name in ("vgg12", "convnet3-gn", "convnet2", "", "tim:resnet18"):
        with pytest.raises(InputError, match=r"convnet3, convnet4.*resnet20, resnet56, resnet18.*torchvision:NAME"):
            make_net(name, 10, 32, seed=0)
    with pytest.raises(InputError, match=r"'resnet19'; nearest: resnet18, .*; choose among convnet3"):
        make_net("resnet19", 10, 32, seed=0)
    for name, norm in (("alexnet-bn", None), ("alexnet", "instance")):
        with pytest.raises(InputError, match="'alexnet' has no norm"):
            make_net(name, 10, 32, norm=norm, seed=0)
    with pytest.raises(InputError, match="only one"):
        make_net("convnet3-bn", 10, 32, norm="instance", seed=0)
    with pytest.raises(InputError, match="'instance', 'batch' or 'none'"):
        make_net("convnet3", 10, 32, norm="layer", seed=0)


@pytest.mark.parametrize(
    ("name", "side", "least"),
    [
        ("convnet4", 8, 16),
        ("convnet3", 7, 8),
        ("resnet18", 8, 9),
        ("resnet20-in", 4, 5),
        ("resnet50-in", 8, 9),
        ("alexnet", 7, 8),
        ("vgg11", 28, 32),
        ("resnetap10", 15, 16),
        ("resnet18ap-in", 15, 16),
    ],
)
def test_images_too_small_for_the_depth_are_refused(name, side, least):
    with pytest.raises(InputError, match=f"at least {least} px, not {side}"):
        make_net(name, 10, side, seed=0)
    with pytest.raises(InputError, match=f"at least {least} px, not {side}"):
        check_net(name, 10, side)
    assert make_net(name, 10, least, seed=0).train()(images(2, least)).std() > 0


@pytest.mark.parametrize("name", ["convnet6w9999", "resnet50", "vgg11-bn", "densenet121", "frepoconv5"])
def test_a_check_draws_no_weights(name, monkeypatch):
    """The first of these has 3.6 G weights."""
    kinds = set()
    build = nn.Module.__setattr__

    def recorded(self, key, value):
        if isinstance(value, nn.Parameter):
            kinds.add(value.device.type)
        build(self, key, value)

    monkeypatch.setattr(nn.Module, "__setattr__", recorded)
    before = torch.get_rng_state()
    check_net(name, 1000, 224)
    assert kinds == {"meta"}
    assert torch.equal(torch.get_rng_state(), before)
    assert make_net("convnet3", 10, 32, seed=0).classifier.weight.device.type == "cpu"


@pytest.mark.parametrize("prefix", ["timm", "torchvision"])
def test_a_library_that_is_not_installed_is_named(prefix, monkeypatch):
    monkeypatch.setitem(sys.modules, prefix, None)
    monkeypatch.delitem(sys.modules, "torchvision.models", raising=False)
    with pytest.raises(InputError, match=rf"needs {prefix}, .*pip install 'dq-distill\[vision\]'"):
        make_net(f"{prefix}:resnet18", 10, 32, seed=0)


@pytest.mark.parametrize(
    ("name", "side"), [("timm:test_resnet", 32), ("timm:test_vit", 64), ("torchvision:squeezenet1_1", 32)]
)
def test_networks_of_libraries_are_seeded_too(name, side):
    pytest.importorskip(name.partition(":")[0])
    before = torch.get_rng_state()
    net = make_net(name, 7, side, seed=1).eval()
    assert torch.equal(torch.get_rng_state(), before)
    again, other = (make_net(name, 7, side, seed=s).eval() for s in (1, 2))
    with torch.no_grad():
        x = images(2, side)
        assert net(x).shape == (2, 7)
        assert torch.equal(net(x), again(x))
        assert not torch.equal(net(x), other(x))


@pytest.mark.parametrize(("name", "maps"), [("mobilenetv2", 4), ("shufflenetv2x05", 4), ("densenet121", 4)])
def test_light_networks_keep_the_resolution_of_small_images_in_the_stem(name, maps):
    net = make_net(name, 10, 32, seed=0).eval()
    sides = []
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda m, args, out: sides.append(out.shape[-1]))
    with torch.no_grad():
        assert net(images(2, 32)).shape == (2, 10)
    assert sides[0] == 32
    assert sides[-1] == maps


def test_a_shuffle_unit_interleaves_its_halves():
    from dq.networks.torchvision_like import ShuffleUnit

    unit = ShuffleUnit(4, 4, 1, nn.BatchNorm2d).eval()
    x = images(1, 5)[:, [0, 1, 2, 0]]
    with torch.no_grad():
        left, right = x[:, :2], unit.branch2(x[:, 2:])
        assert torch.equal(unit(x), torch.stack([left[:, 0], right[:, 0], left[:, 1], right[:, 1]], 1))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("resnet18", "resnet18"),
        ("resnet50", "resnet50"),
        ("mobilenetv2", "mobilenet_v2"),
        ("shufflenetv2", "shufflenet_v2_x1_0"),
        ("shufflenetv2x05", "shufflenet_v2_x0_5"),
        ("densenet121", "densenet121"),
    ],
)
def test_networks_are_those_of_torchvision(name, theirs):
    pytest.importorskip("torchvision")
    other = make_net(f"torchvision:{theirs}", 10, 224, seed=0).eval()
    own = make_net(name, 10, 224, seed=1).eval()
    own.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(own(images(2, 224)), other(images(2, 224)))


def test_small_resnet18_is_that_of_torchvision_with_another_stem():
    """As RDED 3f6453d and SRe2L 8d00cba build it."""
    pytest.importorskip("torchvision")
    other = make_net("torchvision:resnet18", 10, 32, seed=0)
    other.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    other.maxpool = nn.Identity()
    own = make_net("resnet18", 10, 32, init="torchvision", seed=1)
    for name, value in other.state_dict().items():
        if value.ndim == 4:
            assert own.state_dict()[name].std().item() == pytest.approx(value.std().item(), rel=0.05), name
    own.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(own.eval()(images(2, 32)), other.eval()(images(2, 32)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet19", "timm has no classifier called 'resnet19'; nearest: resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no classifier"),
        ("torchvision:vit_b_16", "'torchvision:vit_b_16' cannot be built for 17 px images"),
    ],
)
def test_what_a_library_cannot_build_is_named(name, message):
    pytest.importorskip(name.partition(":")[0])
    with pytest.raises(InputError, match=message):
        make_net(name, 10, 17, seed=0)
    with pytest.raises(InputError, match="comes with its own norm"):
        make_net(name, 10, 17, norm="batch", seed=0)


# --- what a training loop asks of layers -----------------------------------------------------------------------------


class FunctionalDropout(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize(
    "name", ["convnet3", "resnet18", "resnetap10", "alexnet", "vgg11", "frepoconv3w32", "densenet121", "mobilenetv2"]
)
def test_networks_draw_in_training_only_if_they_have_dropout(name: str) -> None:
    for side in (32, 128):
        net = make_net(name, 4, side, seed=0).train()
        assert draws_randomly(net) == any(isinstance(m, nn.Dropout) for m in net.modules())
        if not draws_randomly(net):
            state = torch.get_rng_state()
            net(images(2, side))
            assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.Dropout2d(0.1), nn.RReLU(), nn.MultiheadAttention(4, 2), FunctionalDropout()]
)
def test_layers_that_may_draw_are_known(layer: nn.Module) -> None:
    assert draws_randomly(nn.Sequential(nn.Linear(4, 4), layer))


def test_batch_counters_move_alone() -> None:
    net = make_net("convnet3-bn", 4, 32, seed=0).train()
    net(images(2, 32))
    counters_to(torch.device("meta"), net)
    devices = {name: x.device.type for name, x in net.state_dict().items()}
    assert {d for name, d in devices.items() if name.endswith("num_batches_tracked")} == {"meta"}
    assert {d for name, d in devices.items() if not name.endswith("num_batches_tracked")} == {"cpu"}
