"""Export to the package ddranking: the folder it reads, every setting it reads, and what it could not evaluate."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dq.core.errors import InputError
from dq.distilled.ddranking import export_ddranking
from dq.distilled.set import DistilledSet

# what the constructors of ddranking 0.2.0 get from a Config
HARD_KEYS = {
    *("dataset", "real_data_path", "ipc", "model_name", "data_aug_func", "aug_params", "optimizer", "lr_scheduler"),
    *("weight_decay", "momentum", "step_size", "num_eval", "im_size", "num_epochs", "real_batch_size"),
    *("syn_batch_size", "save_path", "use_zca", "use_torchvision", "custom_train_trans", "custom_val_trans"),
    *("num_workers", "device", "dist", "random_data_format", "random_data_path", "eval_full_data"),
}
AUGMENTATION_KEYS = {"batch_size", "label_type"}  # read by AugmentationRobustScore beside those of the other classes
SOFT_KEYS = HARD_KEYS - {"use_torchvision"} | {
    *("soft_label_criterion", "soft_label_mode", "loss_fn_kwargs", "use_aug_for_hard", "stu_use_torchvision"),
    *("tea_use_torchvision", "teacher_dir", "teacher_model_names"),
}
RECIPE = {
    "num_epochs": 300,
    "optimizer": "adamw",
    "lr_scheduler": "cosine",
    "weight_decay": 0.01,
    "momentum": 0.9,
    "syn_batch_size": 100,
    "data_aug_func": "cutmix",
    "aug_params": {"beta": 1.0},
}
SOFT_RECIPE = RECIPE | {
    "soft_label_criterion": "kl",
    "loss_fn_kwargs": {"temperature": 20.0, "scale_loss": False},
    "teacher_dir": "./teachers",
    "teacher_model_names": ["ResNet-18-BN"],
}


def small(classes: int = 10, ipc: int = 2, *, soft: bool = False) -> DistilledSet:
    n = classes * ipc
    g = torch.Generator().manual_seed(0)
    return DistilledSet(
        images=torch.randint(0, 256, (n, 3, 6, 6), generator=g, dtype=torch.uint8),
        labels=torch.arange(classes).repeat_interleave(ipc),
        weights=torch.ones(n),
        class_names=tuple(f"c{i}" for i in range(classes)),
        prototype=torch.arange(ipc).repeat(classes),
        counts=torch.ones(n, dtype=torch.int64),
        source_row=torch.arange(n),
        soft_labels=torch.zeros(n, classes).half() if soft else None,
    )


@pytest.mark.parametrize("soft", [False, True])
def test_layout_pixels_and_settings(tmp_path: Path, soft: bool) -> None:
    s = small(soft=soft)
    recipe = SOFT_RECIPE if soft else RECIPE
    path = export_ddranking(s, tmp_path, student="ConvNet-3", dataset="CIFAR10", recipe=recipe)
    assert path == tmp_path / "ddranking.yaml"
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["ddranking.yaml", *(f"images/{c:05d}/{i:05d}.png" for c in range(10) for i in range(2))]
    for c in range(10):
        for i in range(2):
            pixels = np.asarray(Image.open(tmp_path / f"images/{c:05d}/{i:05d}.png"))
            assert np.array_equal(pixels.transpose(2, 0, 1), s.images[2 * c + i].numpy())

    config = yaml.safe_load(path.read_text())
    assert set(config) == (SOFT_KEYS if soft else HARD_KEYS) | AUGMENTATION_KEYS
    # without these two the package ends in its constructor
    assert (config["batch_size"], config["label_type"]) == (100, "soft" if soft else "hard")
    assert {k: config[k] for k in recipe} == recipe
    assert config["model_name"] == "ConvNet-3"
    assert config["ipc"] == 2
    assert config["random_data_format"] == "image"
    assert config["dist"] is False
    assert config["eval_full_data"] is True
    assert config["im_size"] == [32, 32]
    assert config.get("soft_label_mode") == ("M" if soft else None)
    assert [t["name"] for t in config["custom_train_trans"]] == ["Resize", "ToTensor", "Normalize"]
    assert config["custom_train_trans"][2]["args"]["mean"] == [0.4914, 0.4822, 0.4465]

    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert ("LabelRobustScoreSoft" if soft else "LabelRobustScoreHard") in comment[0]
    assert "0.2.0" in comment[0]
    assert any("percentages" in line for line in comment)
    module, _, name = re.search(r"dq[.]\w+[.]\w+[.]\w+", path.read_text())[0].rpartition(".")
    assert hasattr(importlib.import_module(module), name)
    assert any("weights" in line for line in comment) is False


def test_known_full_accuracy_and_unused_weights(tmp_path: Path) -> None:
    s = small(200, 1)
    s = dataclasses.replace(s, weights=torch.full((200,), 0.5))
    path = export_ddranking(s, tmp_path, student="ResNet-18-BN", dataset="TinyImageNet", recipe=RECIPE)
    config = yaml.safe_load(path.read_text())
    assert config["eval_full_data"] is False
    assert config["im_size"] == [64, 64]
    assert "# - The training weights of the set are not used" in path.read_text()


def test_a_recipe_may_bring_its_own_transform(tmp_path: Path) -> None:
    trans = [
        {"name": "RandomResizedCrop", "args": {"size": 32, "scale": [0.08, 1.0]}},
        {"name": "ToTensor"},
        {"name": "Normalize", "args": {"mean": [0.5] * 3, "std": [0.5] * 3}},
    ]
    recipe = RECIPE | {"custom_train_trans": trans}
    path = export_ddranking(small(), tmp_path, student="ConvNet-3", dataset="CIFAR10", recipe=recipe)
    assert yaml.safe_load(path.read_text())["custom_train_trans"] == trans
    with pytest.raises(InputError, match="needs ToTensor and Normalize, not only RandomResizedCrop"):
        recipe = RECIPE | {"custom_train_trans": trans[:1]}
        export_ddranking(small(), tmp_path / "x", student="ConvNet-3", dataset="CIFAR10", recipe=recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "ImageWoof"}, "cannot evaluate on 'ImageWoof'; choose CIFAR10, CIFAR100"),
        ({"student": "ResNet-18"}, "'ResNet-18' on CIFAR10; it has ConvNet-3, ConvNet-3-BN"),
        ({"dataset": "CIFAR100"}, "CIFAR100 has 100 classes but the set has 10"),
        ({"recipe": {"num_epochs": 300}}, "the recipe lacks optimizer, lr_scheduler"),
        ({"recipe": RECIPE | {"dist": True}}, "the recipe's 'dist' is set by the export"),
        ({"recipe": RECIPE | {"batch_size": 50}}, "the recipe's 'batch_size' is set by the export"),
        ({"recipe": RECIPE | {"teacher_dir": "."}}, "'teacher_dir' is not read by this class"),
        ({"recipe": RECIPE | {"num_epochs": 9}}, "num_epochs=9 is too few, since ddranking tests every 10 epochs"),
        ({"recipe": RECIPE | {"lr_scheduler": "step"}}, "lr_scheduler=step needs step_size"),
        ({"recipe": RECIPE | {"aug_params": {"cutmix_p": 1.0}}}, "aug_params of cutmix lack beta"),
        ({"recipe": RECIPE | {"data_aug_func": "zca"}}, "data_aug_func must be one of None, cutmix, mixup, dsa"),
    ],
)
def test_what_the_package_cannot_evaluate(tmp_path: Path, changes: dict, message: str) -> None:
    options = {"student": "ConvNet-3", "dataset": "CIFAR10", "recipe": RECIPE} | changes
    with pytest.raises(InputError, match=message):
        export_ddranking(small(), tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_uneven_sets_and_used_folders(tmp_path: Path) -> None:
    options = {"student": "ConvNet-3", "dataset": "CIFAR10", "recipe": RECIPE}
    s = small()
    rows = ("images", "labels", "weights", "prototype", "counts", "source_row")
    fields = {name: getattr(s, name)[1:] for name in rows}
    with pytest.raises(InputError, match="class 0 'c0' has 1 image but ipc is 2"):
        export_ddranking(dataclasses.replace(s, **fields), tmp_path, **options)
    export_ddranking(s, tmp_path, **options)
    with pytest.raises(InputError, match="images is there already"):
        export_ddranking(s, tmp_path, **options)
