"""Export of a distilled set to the format of the package `ddranking`."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from PIL import Image

from dq.core.errors import InputError
from dq.core.files import write_text
from dq.core.plain import PlainDict
from dq.core.text import plural
from dq.distilled.set import DistilledSet

VERSION = "0.2.0"  # of ddranking, whose source the names and the caveats below were read from

CIFAR = ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])  # ddranking uses those of CIFAR-10 for CIFAR-100 too
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
# name -> classes, side in px, mean and std. The ImageNet subsets are not here: the package has neither an accuracy
# nor a training on their full data, and stops.
DATASETS = {
    "CIFAR10": (10, 32, CIFAR),
    "CIFAR100": (100, 32, CIFAR),
    "TinyImageNet": (200, 64, IMAGENET),
    "ImageNet1K": (1000, 224, IMAGENET),
}
# Students whose accuracy on the full data is known to the package, or that it can train on the full data.
CACHED = {("ImageNet1K", "ResNet-18-BN"), ("TinyImageNet", "ResNet-18-BN")}
TRAINABLE = {
    ("TinyImageNet", "ConvNet-4-BN"),
    ("CIFAR10", "ConvNet-3"),
    ("CIFAR10", "ConvNet-3-BN"),
    ("CIFAR100", "ConvNet-3"),
    ("CIFAR100", "ConvNet-3-BN"),
}

# What a recipe must say, and what it may.
REQUIRED = ("num_epochs", "optimizer", "lr_scheduler", "weight_decay", "momentum", "syn_batch_size", "data_aug_func")
DEFAULTS: PlainDict = {
    "aug_params": None,
    "step_size": None,
    "real_batch_size": 256,
    "num_eval": 5,
    "num_workers": 4,
    "device": "cuda",
    "real_data_path": "./dataset",
    "random_data_path": None,  # the package's own: a new folder per repetition
    "save_path": "./results/scores.csv",  # a bare file name makes the package fail
    "custom_val_trans": None,
}
SOFT_REQUIRED = ("soft_label_criterion", "loss_fn_kwargs", "teacher_dir", "teacher_model_names")
SOFT_DEFAULTS = {"use_aug_for_hard": False, "stu_use_torchvision": False, "tea_use_torchvision": False}
HARD_DEFAULTS = {"use_torchvision": False}
AUGMENTATIONS: dict[str | None, set[str]] = {
    None: set(),
    "cutmix": {"beta"},
    "mixup": {"lambda"},
    "dsa": {"flip", "rotate", "saturation", "brightness", "contrast", "scale", "crop", "cutout"},
}

HEADER = """\
For ddranking {version}, class {evaluator}, made by dq. From this folder, in one process:

    from ddranking.config import Config
    from ddranking.metrics import {evaluator}
    {evaluator}(Config.from_file("ddranking.yaml")).compute_metrics(image_path="images")

AugmentationRobustScore of the same module reads the same file.

Keep the standard output. The scores (LRS, ARS) of {version} are wrong: it computes them from percentages, which
saturates them. Take the accuracies that it prints, divide them by 100, and give them to
dq.evaluation.dd_ranking.DDRanking.

Also in {version}:
{caveats}"""
CAVEATS = [
    "Accuracies are the best of several evaluations on the test split, over five learning rates.",
    "Random images of CIFAR are stored as JPEG, the images here as PNG.",
    "The number of epochs here is also that of the training on the full data, where there is one.",
    "Set no dist: with several processes, all but the first end in an error.",
]
SOFT_CAVEATS = [
    "Stored soft labels cannot be used: the teachers label every batch again (mode M).",
    "AugmentationRobustScore prints four accuracies a repetition: the set and random images, both with augmentation "
    "(the second is called 'Without'), then both without.",
    "A teacher is TEACHER_DIR/{dataset}/MODEL/ckpt_best.pt, with its classes in the order of the folders.",
]
HARD_CAVEATS = [
    "After the last training, writing the table of scores fails (it has twice as many LRS as repetitions); by then "
    "all accuracies are printed.",
    "AugmentationRobustScore fails for hard labels, in the first training: it looks for teachers.",
]


def export_ddranking(
    small: DistilledSet, folder: str | Path, *, student: str, dataset: str, recipe: PlainDict
) -> Path:
    """Write images by class and `ddranking.yaml`, the settings of an evaluation.

    Images are `images/00000/00000.png` ..., one folder per class. A set with soft labels is for
    `LabelRobustScoreSoft`, with teachers that label each batch (mode M, the one that works for images); a set without
    is for `LabelRobustScoreHard`. Neither uses training weights. `AugmentationRobustScore` reads the same file.

    Args:
        small: the set.
        folder: must not hold `images` yet.
        student: the package's name of a network, such as "ConvNet-3" or "ResNet-18-BN".
        dataset: the package's name of a data set; the classes of the set must be in its order.
        recipe: settings by the package's names. Required: num_epochs, optimizer, lr_scheduler, weight_decay, momentum,
            syn_batch_size, data_aug_func; for soft labels soft_label_criterion, loss_fn_kwargs, teacher_dir and
            teacher_model_names. `custom_train_trans` defaults to resizing and normalizing.

    Returns:
        The path of `ddranking.yaml`.

    Raises:
        InputError: if the package could not evaluate this set, student and recipe.
    """
    folder = Path(folder)
    config = ddranking_config(small, student=student, dataset=dataset, recipe=recipe)
    root = folder / "images"
    if root.exists():
        raise InputError(f"{root} is there already; choose another folder, or remove it")
    for label in range(len(small.class_names)):
        images = small.images_uint8()[small.labels == label]
        (root / f"{label:05d}").mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / f"{label:05d}" / f"{i:05d}.png")
    soft = small.soft_labels is not None
    caveats = [*CAVEATS, *(SOFT_CAVEATS if soft else HARD_CAVEATS)]
    if not torch.equal(small.weights, torch.ones_like(small.weights)):
        caveats.append("The training weights of the set are not used; it was made with weights that differ from 1.")
    header = HEADER.format(
        version=VERSION,
        evaluator="LabelRobustScoreSoft" if soft else "LabelRobustScoreHard",
        caveats="\n".join(f"- {c.format(dataset=dataset)}" for c in caveats),
    )
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    path = folder / "ddranking.yaml"
    write_text(path, comment + "\n" + yaml.safe_dump(config, sort_keys=False))
    return path


def ddranking_config(small: DistilledSet, *, student: str, dataset: str, recipe: PlainDict) -> PlainDict:
    """The settings that `export_ddranking` writes, with every key the package reads.

    They serve `LabelRobustScoreSoft` or `LabelRobustScoreHard`, and `AugmentationRobustScore`.
    """
    if dataset not in DATASETS:
        raise InputError(f"ddranking {VERSION} cannot evaluate on {dataset!r}; choose {', '.join(DATASETS)}")
    classes, side, (mean, std) = DATASETS[dataset]
    if (dataset, student) not in CACHED | TRAINABLE:
        available = ", ".join(sorted(s for d, s in CACHED | TRAINABLE if d == dataset))
        raise InputError(
            f"ddranking {VERSION} has no full-data accuracy of {student!r} on {dataset}; it has {available}"
        )
    counts = torch.bincount(small.labels, minlength=len(small.class_names))
    if len(counts) != classes:
        raise InputError(
            f"{dataset} has {plural(classes, 'class')} but the set has {len(counts)}; name the right data set"
        )
    if int(counts.min()) != small.ipc:
        c = int(counts.argmin())
        raise InputError(
            f"class {c} {small.class_names[c]!r} has {plural(int(counts[c]), 'image')} but ipc is {small.ipc}; lower "
            "ipc or drop the class, since ddranking takes equally many random images of every class"
        )
    soft = small.soft_labels is not None
    fixed: PlainDict = {
        "dataset": dataset,
        "ipc": small.ipc,
        "model_name": student,
        "im_size": [side, side],
        "eval_full_data": (dataset, student) not in CACHED,
        # the other format fails in the package, for soft labels
        "random_data_format": "image",
        # would whiten the test images but not a folder of images
        "use_zca": False,
        "dist": False,
        "label_type": "soft" if soft else "hard",  # of AugmentationRobustScore, as is `batch_size`
    }
    if soft:
        fixed["soft_label_mode"] = "M"
    transform = [
        {"name": "Resize", "args": {"size": [side, side]}},
        {"name": "ToTensor"},
        {"name": "Normalize", "args": {"mean": mean, "std": std}},
    ]
    required = (*REQUIRED, *(SOFT_REQUIRED if soft else ()))
    defaults = {**DEFAULTS, **(SOFT_DEFAULTS if soft else HARD_DEFAULTS), "custom_train_trans": transform}
    _check_recipe(recipe, required, defaults, fixed, soft)
    return {**fixed, **defaults, **recipe, "batch_size": recipe["syn_batch_size"]}


def _check_recipe(
    recipe: PlainDict, required: tuple[str, ...], defaults: PlainDict, fixed: PlainDict, soft: bool
) -> None:
    missing = [k for k in required if k not in recipe]
    if missing:
        raise InputError(f"the recipe lacks {', '.join(missing)}; add what the method was trained with")
    unknown = [k for k in recipe if k not in required and k not in defaults]
    if unknown:
        reason = (
            "is set by the export"
            if unknown[0] in (*fixed, "batch_size")
            else "is not read by this class of ddranking"
        )
        raise InputError(f"the recipe's {unknown[0]!r} {reason}; leave it out")
    interval = 20 if soft else 10
    if recipe["num_epochs"] < interval:
        raise InputError(
            f"num_epochs={recipe['num_epochs']} is too few, since ddranking tests every {interval} epochs; raise it"
        )
    if recipe["lr_scheduler"] == "step" and recipe.get("step_size") is None:
        raise InputError("lr_scheduler=step needs step_size; add it to the recipe")
    kind, params = recipe["data_aug_func"], set(recipe.get("aug_params") or {})
    if kind not in AUGMENTATIONS:
        kinds = ", ".join(str(k) for k in AUGMENTATIONS)
        raise InputError(f"data_aug_func must be one of {kinds}, not {kind!r}")
    if AUGMENTATIONS[kind] - params:
        raise InputError(f"aug_params of {kind} lack {', '.join(sorted(AUGMENTATIONS[kind] - params))}; add them")
    names = {t["name"] for t in {**defaults, **recipe}["custom_train_trans"]}
    if not {"ToTensor", "Normalize"} <= names:
        raise InputError(f"custom_train_trans needs ToTensor and Normalize, not only {', '.join(sorted(names))}")
