"""Teachers: every way to load one gives the network it names, and what does not fit is named with the way out."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from dq.config.overrides import apply_settings
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError
from dq.data.load import load_source
from dq.networks.teacher import IMAGENET
from dq.networks.teacher_check import check_teacher, class_order, reordered_accuracy
from dq.networks.teacher_loading import load_teacher, load_teachers, teacher_file
from dq.networks.zoo import make_net

ORDER = (2, 0, 3, 1)  # output of the permuted teacher for each class


def images(n: int = 5, side: int = 8) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def saved(tmp_path, net: nn.Module, name: str = "teacher.safetensors") -> str:
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / name)
    return str(tmp_path / name)


def normalized(x: torch.Tensor, mean, std) -> torch.Tensor:
    return (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


def trained_in_part(net: nn.Module) -> nn.Module:
    """Running statistics that are not those of a fresh network."""
    net.train()(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2)))
    return net.eval()


@pytest.fixture
def convnet(tmp_path):
    net = make_net("convnet3", 4, 8, seed=1).eval()
    return net, TeacherConfig(net="convnet3", path=saved(tmp_path, net), batch_size=2)


def test_logits_are_those_of_the_normalized_images(convnet):
    net, config = convnet
    x = images()
    expected = net(normalized(x, *IMAGENET)).detach()
    teacher = load_teacher(config, 4, 8)
    assert (teacher.name, teacher.mean, teacher.std) == ("convnet3", *IMAGENET)
    torch.testing.assert_close(teacher.logits(x), expected)
    torch.testing.assert_close(teacher(x), expected)
    bytes_ = (x * 255).round().to(torch.uint8)
    torch.testing.assert_close(teacher.logits(bytes_), teacher.logits(bytes_.float() / 255))
    assert not teacher(x.clone().requires_grad_()).requires_grad
    other = load_teacher(dataclasses.replace(config, mean=(0.5,), std=(0.2, 0.3, 0.4)), 4, 8)
    torch.testing.assert_close(other.logits(x), net(normalized(x, (0.5,), (0.2, 0.3, 0.4))).detach())


def test_classes_select_outputs_and_image_size_resizes(convnet):
    net, config = convnet
    x = images(side=13)
    small = F.interpolate(x, (8, 8), mode="bilinear", antialias=True)
    expected = net(normalized(small, *IMAGENET)).detach()[:, [3, 1]]
    teacher = load_teacher(dataclasses.replace(config, classes=(3, 1), image_size=8), 2, 13)
    torch.testing.assert_close(teacher.logits(x), expected)
    torch.testing.assert_close(teacher(x), expected)


def test_features_are_what_the_classifier_sees(convnet):
    net, config = convnet
    teacher = load_teacher(config, 4, 8)
    features = teacher.features(images())
    assert features.shape == (5, 128)
    torch.testing.assert_close(net.classifier(features).detach(), teacher.logits(images()))
    assert not teacher.net.classifier._forward_pre_hooks
    without_linear = dataclasses.replace(teacher, net=nn.Sequential(nn.Conv2d(3, 6, 8), nn.Flatten()))
    torch.testing.assert_close(
        without_linear.features(images()), normalized(images(), *IMAGENET).flatten(1), rtol=1e-5, atol=1e-6
    )


def test_the_caller_decides_the_mode_of_a_call_and_logits_bring_it_back(tmp_path):
    net = trained_in_part(make_net("resnet20", 4, 16, seed=1))
    teacher = load_teacher(TeacherConfig(net="resnet20", path=saved(tmp_path, net)), 4, 16)
    x = images(side=16)
    expected = teacher(x)
    teacher.net.train()
    teacher.net.layer1.eval()
    torch.testing.assert_close(teacher.logits(x), expected)
    assert teacher.net.training
    assert teacher.net.layer2.training
    assert not teacher.net.layer1[0].bn1.training
    assert not torch.allclose(teacher(x), expected, atol=1e-2)


def test_digest_covers_all_that_changes_the_labels(convnet, tmp_path):
    _, config = convnet
    other = saved(tmp_path, make_net("convnet3", 4, 8, seed=2), "other.safetensors")
    same = saved(tmp_path, make_net("convnet3", 4, 8, seed=1), "same.safetensors")
    changes = ({}, {"path": other}, {"mean": (0.5,)}, {"std": (0.5,)}, {"classes": (0, 1, 2, 3)}, {"image_size": 8})
    digests = [load_teacher(dataclasses.replace(config, **c), 4, 8).digest for c in changes]
    assert len(set(digests)) == len(changes)
    again = dataclasses.replace(config, path=same, mean=IMAGENET[0], std=IMAGENET[1], batch_size=7)
    assert load_teacher(again, 4, 8).digest == digests[0]


def test_files_in_half_precision_and_without_batch_norm_counters_load(tmp_path):
    net = trained_in_part(make_net("resnet20", 4, 16, seed=1))
    state = {k: v.half() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "model.safetensors")
    teacher = load_teacher(TeacherConfig(net="resnet20", path=str(tmp_path)), 4, 16)
    assert {p.dtype for p in teacher.net.parameters()} == {torch.float32}
    x = images(side=16)
    # 20 layers, each rounded to 11 bits
    torch.testing.assert_close(teacher.logits(x), net(normalized(x, *IMAGENET)).detach(), rtol=0.02, atol=0.02)
    del state["layer1.0.bn1.running_var"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"not a resnet20 for 4 classes.*running_var"):
        load_teacher(TeacherConfig(net="resnet20", path=str(tmp_path)), 4, 16)


def test_a_teacher_of_more_classes_needs_to_be_told_which(convnet):
    _, config = convnet
    for changes, num_classes, message in (
        ({}, 3, "has 4 outputs but the data has 3 classes; set teachers.N.classes"),
        ({}, 5, "has 4 outputs but the data has 5 classes; take a teacher that was trained on all of them"),
        ({"classes": (0, 1)}, 3, "lists 2 different outputs in 2 entries but the data has 3 classes"),
        ({"classes": (0, 1, 1)}, 3, "lists 2 different outputs in 3 entries"),
        ({"classes": (0, 4, 1)}, 3, r"lists output 4 but those of .*teacher\.safetensors are 0 to 3"),
        ({"classes": (0, -1, 1)}, 3, r"classes.1 .*-1"),
        ({"mean": (0.5, 0.5)}, 4, r"teachers.N.mean=\[0.5, 0.5\]"),
        ({"std": (0.5, 0.0, 0.5)}, 4, r"std.1 .*0.0"),
        ({"image_size": 16}, 4, "not a convnet3 for 4 classes and 16 px.*teachers.N.image_size"),
        ({"net": "resnet20"}, 4, "not a resnet20 for 4 classes"),
    ):
        with pytest.raises(InputError, match=message):
            load_teacher(dataclasses.replace(config, **changes), num_classes, 8)


def test_missing_and_corrupt_files_are_named(convnet, tmp_path):
    _, config = convnet
    for path in (tmp_path / "no.safetensors", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=r"there is no teacher at .*; set teachers.N.path"):
            load_teacher(dataclasses.replace(config, path=str(path)), 4, 8)
    whole = (tmp_path / "teacher.safetensors").read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"<html>" * 20):
        (tmp_path / "teacher.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"teacher.safetensors is not a readable safetensors file"):
            load_teacher(config, 4, 8)


@pytest.mark.parametrize(
    ("before", "between"),
    [
        ("module.", ""),
        ("_orig_mod.", ""),
        ("module._orig_mod.", ""),
        ("_orig_mod.module.", ""),
        ("", "_orig_mod."),
        ("module.", "module."),
        ("net.", ""),
        ("model.module.", ""),
    ],
)
def test_names_of_wrapped_networks_are_those_of_the_network(tmp_path, before, between):
    """DataParallel, DistributedDataParallel, torch.compile of all or of parts, and a network kept as an attribute."""
    net = trained_in_part(make_net("resnet20", 4, 16, seed=1))
    state = {before + k.replace("layer1.", f"layer1.{between}"): v.contiguous() for k, v in net.state_dict().items()}
    save_file(state | {"n_averaged": torch.tensor(3)}, tmp_path / "teacher.safetensors")
    teacher = load_teacher(TeacherConfig(net="resnet20", path=str(tmp_path / "teacher.safetensors")), 4, 16)
    x = images(side=16)
    torch.testing.assert_close(teacher.logits(x), net(normalized(x, *IMAGENET)).detach())


def test_prefixes_that_cannot_be_taken_off_are_named(convnet, tmp_path):
    net, config = convnet
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    several = {f"{p}.{k}": v.clone() for k, v in state.items() for p in ("model", "ema")}
    save_file(several, tmp_path / "teacher.safetensors")
    with pytest.raises(InputError, match=r"prefixes 'ema\.', 'model\.'"):
        load_teacher(config, 4, 8)
    other = {f"encoder.{k}": v.contiguous() for k, v in make_net("resnet20", 4, 8, seed=1).state_dict().items()}
    save_file(other, tmp_path / "teacher.safetensors")
    with pytest.raises(InputError, match=r"not a convnet3 .* without the prefix 'encoder\.' .*set teachers.N.net"):
        load_teacher(config, 4, 8)


def test_a_file_that_is_no_safetensors_is_told_what_to_do(convnet, tmp_path):
    net, config = convnet
    torch.save(net.state_dict(), tmp_path / "teacher.pth")
    torch.save(net.state_dict(), tmp_path / "renamed.safetensors")
    torch.save(net.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("teacher.pth", "renamed.safetensors", "old.pt"):
        with pytest.raises(
            InputError, match=r"run code and is not opened: .*save_file\(torch.load\(FILE, weights_only="
        ):
            load_teacher(dataclasses.replace(config, path=str(tmp_path / name)), 4, 8)
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(InputError, match=r"pointer of Git LFS .*git lfs pull"):
        load_teacher(dataclasses.replace(config, path=str(tmp_path / "lfs.safetensors")), 4, 8)


def test_a_folder_without_model_safetensors_says_what_it_has(convnet, tmp_path):
    net, config = convnet
    with pytest.raises(InputError, match=r"no model\.safetensors but teacher\.safetensors; set teachers\.N\.path"):
        load_teacher(dataclasses.replace(config, path=str(tmp_path)), 4, 8)
    (tmp_path / "hub").mkdir()
    torch.save(net.state_dict(), tmp_path / "hub" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no model.safetensors but pytorch_model.bin; .*save_file"):
        load_teacher(dataclasses.replace(config, path=str(tmp_path / "hub")), 4, 8)
    with pytest.raises(InputError, match=r"'convnet3' has no path; set teachers\.N\.path"):
        load_teacher(TeacherConfig(net="convnet3"), 4, 8)


def test_the_converted_file_is_taken(convnet, tmp_path):
    """What the message about files of torch.save tells the user to do."""
    net, config = convnet
    torch.save(net.state_dict(), tmp_path / "teacher.pth")
    save_file(torch.load(tmp_path / "teacher.pth", weights_only=True), tmp_path / "model.safetensors")
    torch.testing.assert_close(
        load_teacher(dataclasses.replace(config, path=str(tmp_path)), 4, 8).logits(images()),
        net(normalized(images(), *IMAGENET)).detach(),
    )


@pytest.mark.parametrize("net", ["convnet3", "timm:test_resnet"])
def test_normalization_of_a_folder_that_timm_saved(tmp_path, net):
    """`pretrained_cfg` of its `config.json`, before what the library publishes for the network."""
    if net.startswith("timm:"):
        pytest.importorskip("timm")
    saved(tmp_path, make_net(net, 4, 32, seed=1), "model.safetensors")
    cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic", "crop_pct": 0.95}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": cfg}))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        teacher = load_teacher(TeacherConfig(net=net, path=str(path)), 4, 32)
        assert (teacher.mean, teacher.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    config = load_teacher(TeacherConfig(net=net, path=str(tmp_path), mean=(0.7,)), 4, 32)
    assert (tuple(config.mean), config.std) == ((0.7,), (0.4, 0.5, 0.6))
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {**cfg, "mean": "x"}}))
    with pytest.raises(InputError, match=r"config.json does not say how .*set teachers.N.mean"):
        load_teacher(TeacherConfig(net=net, path=str(tmp_path)), 4, 32)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": cfg}))
    with pytest.raises(InputError, match=r"not a resnet20 for .*; set teachers.N.net to timm:test_resnet, as timm"):
        load_teacher(TeacherConfig(net="resnet20", path=str(tmp_path)), 4, 32)
    # of another library
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    if net == "convnet3":
        assert load_teacher(TeacherConfig(net=net, path=str(tmp_path)), 4, 32).mean == IMAGENET[0]


def test_weights_of_networks_that_changed_load_or_are_refused(tmp_path):
    """ResNets keep the stem that they were trained with; the small MobileNetV2 of earlier versions is another net."""
    old = trained_in_part(make_net("resnet18", 4, 224, seed=1))
    config = TeacherConfig(net="resnet18", path=saved(tmp_path, old))
    x = images(2, 72)
    torch.testing.assert_close(load_teacher(config, 4, 72).logits(x), old(normalized(x, *IMAGENET)).detach())
    path = saved(tmp_path, make_net("mobilenetv2", 4, 224, seed=1), "model.safetensors")
    config = TeacherConfig(net="mobilenetv2", path=path)
    with pytest.raises(InputError, match=r"not a mobilenetv2 for 4 classes and 32 px"):
        load_teacher(config, 4, 32)
    (tmp_path / "teacher.json").write_text(json.dumps({"net": "mobilenetv2", "image_size": 32}))
    with pytest.raises(InputError, match=r"as an earlier version of dq built it"):
        load_teacher(config, 4, 32)


@pytest.mark.parametrize(
    ("net", "path", "message"),
    [
        ("convnet3", "pretrained", "'convnet3' has no published weights; set teachers.N.path"),
        ("transformers", "", "set teachers.N.path to a model folder or a Hub id"),
        ("transformers", "/nowhere", "transformers cannot open the teacher /nowhere .*; set teachers.N.path"),
        ("transformers", "nobody/nothing", "transformers cannot open the teacher nobody/nothing"),
    ],
)
def test_a_teacher_that_nobody_has_is_named(net, path, message):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=message):
        load_teacher(TeacherConfig(net=net, path=path), 4, 8)


def test_teacher_file_is_known_before_anything_is_loaded(convnet, tmp_path):
    _, config = convnet
    assert teacher_file(config) == tmp_path / "teacher.safetensors"
    assert teacher_file(TeacherConfig(net="transformers", path="a/b")) is None
    assert teacher_file(TeacherConfig(net="timm:resnet18", path="pretrained")) is None


def test_settings_of_a_teacher_come_from_flags():
    config = apply_settings(TeacherConfig(), ["classes=[3, 1]", "image_size=224", "mean=[0.5]"])
    assert (config.classes, config.image_size, config.mean, config.std) == ((3, 1), 224, (0.5,), None)
    with pytest.raises(InputError, match="image_size must be a whole number of at least 1"):
        TeacherConfig(image_size=0)


# --- transformers -------------------------------------------------------------------------------------------------


@pytest.fixture
def resnet_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "tiny")
    return model, tmp_path / "tiny"


def test_transformers_classifier_gives_its_logits(resnet_folder):
    model, folder = resnet_folder
    x = images(side=32)
    before = torch.get_rng_state()
    teacher = load_teacher(TeacherConfig(net="transformers", path=str(folder)), 4, 32)
    assert torch.equal(torch.get_rng_state(), before)
    assert (teacher.name, teacher.mean, teacher.std) == ("tiny", *IMAGENET)
    torch.testing.assert_close(teacher.logits(x), model(normalized(x, *IMAGENET)).logits.detach())
    assert teacher.features(x).shape == (5, 16)
    chosen = load_teacher(TeacherConfig(net="transformers", path=str(folder), classes=(2, 0), image_size=64), 2, 32)
    torch.testing.assert_close(
        chosen.logits(x),
        model(normalized(F.interpolate(x, (64, 64), mode="bilinear", antialias=True), *IMAGENET))
        .logits[:, [2, 0]]
        .detach(),
    )
    with pytest.raises(InputError, match=r"tiny has 4 outputs .* 3 classes"):
        load_teacher(TeacherConfig(net="transformers", path=str(folder)), 3, 32)


@pytest.mark.parametrize(
    ("file", "processor", "mean", "std"),
    [
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4]}, (0.1, 0.2, 0.3), (0.4,)),
        ("processor_config.json", {"image_processor": {"image_mean": [0.1], "image_std": [0.4]}}, (0.1,), (0.4,)),
        ("preprocessor_config.json", {"do_normalize": False}, (0.0,), (1.0,)),
        # pixels of 0 to 255 become 0 to 2, then -1 to 1
        (
            "preprocessor_config.json",
            {"rescale_factor": 2 / 255, "image_mean": [1.0], "image_std": [1.0]},
            (0.5,),
            (0.5,),
        ),
    ],
)
def test_transformers_normalization_is_that_of_the_folder(resnet_folder, file, processor, mean, std):
    _, folder = resnet_folder
    (folder / file).write_text(json.dumps(processor))
    teacher = load_teacher(TeacherConfig(net="transformers", path=str(folder)), 4, 32)
    assert teacher.mean == pytest.approx(mean)
    assert teacher.std == pytest.approx(std)
    config = load_teacher(TeacherConfig(net="transformers", path=str(folder), mean=[0.7]), 4, 32)
    assert tuple(config.mean) == (0.7,)
    assert config.std == pytest.approx(std)


def test_transformers_folder_that_is_not_whole_is_named(resnet_folder):
    from safetensors.torch import load_file

    model, folder = resnet_folder
    config = TeacherConfig(net="transformers", path=str(folder))
    for text in ("{", "[" * 100_000, "3", '{"image_mean": 0.5}', '{"image_std": ["a"]}', '{"rescale_factor": 0}'):
        (folder / "preprocessor_config.json").write_text(text)
        with pytest.raises(InputError, match=r"preprocessor_config.json of the teacher .* cannot be read"):
            load_teacher(config, 4, 32)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [NaN], "image_std": [1]}')
    with pytest.raises(InputError, match="do not normalize RGB images"):
        load_teacher(config, 4, 32)
    (folder / "preprocessor_config.json").unlink()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(InputError, match="transformers cannot open the teacher"):
        load_teacher(config, 4, 32)
    (folder / "model.safetensors").write_bytes(whole)
    state = load_file(folder / "model.safetensors")
    headless = {k: v for k, v in state.items() if not k.startswith("classifier")}
    save_file(headless, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks the weights classifier.*trained as a classifier"):
        load_teacher(config, 4, 32)
    wrapped = {f"module.{k}": v for k, v in state.items()}
    save_file(wrapped, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks the weights .*have the prefix 'module' of a wrapped network"):
        load_teacher(config, 4, 32)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="transformers cannot open the teacher"):
        load_teacher(config, 4, 32)


def test_transformers_vit_wants_its_own_side(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    teacher_config = TeacherConfig(net="transformers", path=str(tmp_path))
    with pytest.raises(InputError, match=r"cannot see images of 32 px .*; set teachers.N.image_size"):
        load_teacher(teacher_config, 2, 32)
    teacher = load_teacher(dataclasses.replace(teacher_config, image_size=16), 2, 32)
    assert teacher.logits(images(side=32)).shape == (5, 2)
    assert teacher.features(images(side=32)).shape == (5, 8)


# --- timm and torchvision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side", "width", "norm"),
    [
        ("timm:test_resnet", 32, 96, ((0.5,) * 3, (0.5,) * 3)),
        ("timm:resnet18", 32, 512, IMAGENET),
        ("torchvision:resnet18", 32, 512, IMAGENET),
        ("torchvision:squeezenet1_1", 33, 512 * 2 * 2, IMAGENET),  # no linear layer: a map of 2x2 pixels
    ],
)
def test_local_weights_of_a_library_network(tmp_path, name, side, width, norm):
    pytest.importorskip(name.partition(":")[0])
    net = make_net(name, 7, side, seed=1).eval()
    config = TeacherConfig(net=name, path=saved(tmp_path, net), classes=(6, 0, 2))
    teacher = load_teacher(config, 3, side)
    assert (teacher.name, teacher.mean, teacher.std) == (name, *norm)
    x = images(side=side)
    expected = net(normalized(x, *norm)).detach()[:, [6, 0, 2]]
    torch.testing.assert_close(teacher.logits(x), expected, rtol=1e-4, atol=1e-5)
    assert teacher.features(x).shape == (5, width)


def test_published_weights_of_torchvision(tmp_path, monkeypatch):
    """Up to the download: random weights lie where an earlier download would have left them."""
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    net = make_net("torchvision:resnet18", 1000, 32, seed=1).eval()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = models.get_model_weights("resnet18").DEFAULT.url
    torch.save(net.state_dict(), tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    config = TeacherConfig(net="torchvision:resnet18", path="pretrained", classes=(0, 217, 482))
    teacher = load_teacher(config, 3, 32)
    assert (teacher.mean, teacher.std) == IMAGENET
    expected = net(normalized(images(side=32), *IMAGENET)).detach()[:, [0, 217, 482]]
    torch.testing.assert_close(teacher.logits(images(side=32)), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"1000 outputs .* 3 classes; set teachers\.N\.classes"):
        load_teacher(dataclasses.replace(config, classes=None), 3, 32)


def test_published_weights_of_timm(tmp_path, monkeypatch):
    """Up to the download, as above."""
    timm = pytest.importorskip("timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    net = make_net("timm:test_resnet", 1000, 160, seed=1).eval()
    repo = tmp_path / f"models--{timm.get_pretrained_cfg('test_resnet').hf_hub_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(net.state_dict(), repo / "snapshots" / ("0" * 40) / "model.safetensors")
    teacher = load_teacher(TeacherConfig(net="timm:test_resnet", path="pretrained", classes=(5, 6)), 2, 64)
    assert (teacher.mean, teacher.std) == ((0.5,) * 3, (0.5,) * 3)
    expected = net((images(side=64) - 0.5) / 0.5).detach()[:, [5, 6]]
    torch.testing.assert_close(teacher.logits(images(side=64)), expected, rtol=1e-4, atol=1e-5)


def test_a_network_without_published_weights_is_named():
    pytest.importorskip("timm")
    with pytest.raises(InputError, match=r"'botnet50ts_256'; set teachers\.N\.path"):
        load_teacher(TeacherConfig(net="timm:botnet50ts_256", path="pretrained"), 10, 32)


def test_published_weights_without_a_connection_are_named(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"weights of 'timm:test_vit' cannot be had"):
        load_teacher(TeacherConfig(net="timm:test_vit", path="pretrained"), 10, 32)


# --- check --------------------------------------------------------------------------------------------------------


class Brightest(nn.Module):
    """Output ORDER[c] is the brightness of quarter c of the image: a perfect teacher, were it not for the order."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quarters = F.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)
        return self.scale * torch.zeros_like(quarters).index_copy(1, torch.tensor(ORDER), quarters)


@pytest.fixture
def quarters():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 4
    x = torch.rand(60, 3, 8, 8, generator=g) * 0.3
    for i, c in enumerate(labels.tolist()):
        row, column = 4 * (c // 2), 4 * (c % 2)
        x[i, :, row : row + 4, column : column + 4] += 0.5
    return load_source({"train": (x, labels), "test": (x, labels)}, class_names=["a", "b", "c", "d"])


def test_permuted_teacher_is_stopped_and_the_order_it_is_told_repairs_it(convnet, quarters):
    _, config = convnet
    permuted = dataclasses.replace(load_teacher(config, 4, 8), net=Brightest())
    with pytest.raises(InputError, match=r"gets 0.0% of 60 .* class order \[2, 0, 3, 1\] it would get 100.0%") as e:
        check_teacher(permuted, quarters, config, 8)
    assert "near the chance of 25.0%: its class order or input normalization" in str(e.value)
    changed = apply_settings(config, [str(e.value).rpartition("set teachers.N.")[2]])
    assert changed.classes == ORDER
    repaired = dataclasses.replace(permuted, classes=changed.classes)
    assert check_teacher(repaired, quarters, changed, 8) == 1
    # an order on top of an order
    twice = dataclasses.replace(permuted, classes=(0, 1, 3, 2))
    with pytest.raises(InputError, match=r"set teachers.N.classes=\[2, 0, 3, 1\]$"):
        check_teacher(twice, quarters, config, 8)


def test_a_teacher_is_checked_without_the_test_images(convnet, quarters):
    _, config = convnet
    train = torch.stack([torch.from_numpy(quarters.train.read(i)) for i in range(60)]), torch.arange(60) % 4
    noise = (torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.zeros(60, dtype=torch.int64))
    alone = load_source({"train": train}, class_names=["a", "b", "c", "d"])
    other = load_source({"train": train, "test": noise}, class_names=["a", "b", "c", "d"])
    teacher = dataclasses.replace(load_teacher(config, 4, 8), net=Brightest(), classes=ORDER)
    for source in (alone, other):
        assert check_teacher(teacher, source, config, 8) == 1


def test_several_teachers_are_each_checked(convnet, quarters, tmp_path):
    _, config = convnet
    with pytest.raises(InputError, match=r"other.safetensors gets .* near the chance"):
        other = saved(tmp_path, make_net("convnet3", 4, 8, seed=2), "other.safetensors")
        load_teachers([dataclasses.replace(config, path=other)], quarters, 8, torch.device("cpu"))
    assert load_teachers([], quarters, 8, torch.device("cpu")) == ()


def test_a_teacher_that_knows_nothing_gets_no_order(convnet, quarters):
    _, config = convnet
    teacher = load_teacher(config, 4, 8)
    constant = dataclasses.replace(teacher, net=nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    constant.net[1].weight.data.zero_()
    with pytest.raises(InputError, match=r"gets 25.0% of 60") as e:
        check_teacher(constant, quarters, config, 8)
    assert "permuted" not in str(e.value)


def test_orders_of_guesses_do_not_count_as_knowledge():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(1000, (500,), generator=g)
    guesses = torch.randint(1000, (500,), generator=g)
    order = torch.tensor(class_order(guesses, labels, 1000))
    assert (order[labels] == guesses).double().mean() > 0.5  # on the images it was made from
    assert reordered_accuracy(guesses, labels, 1000) < 0.05
    permutation = torch.randperm(10, generator=g)
    labels = labels % 10
    noisy = torch.where(torch.rand(500, generator=g) < 0.2, guesses % 10, permutation[labels])
    assert class_order(noisy, labels, 10) == permutation.tolist()
    assert reordered_accuracy(noisy, labels, 10) == pytest.approx(
        (noisy == permutation[labels]).double().mean().item()
    )
