"""Images of a set by class, beside real ones, with their weights."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from dq.core.plain import PlainDict
from dq.core.seeds import generator
from dq.core.text import plural
from dq.data.grid import image_grid
from dq.data.images import read_images
from dq.diffusion.latents import LatentCache
from dq.distilled.set import DistilledSet
from dq.run.folder import Run
from dq.run.sections.pictures import PictureClass, PictureRow, picture_row
from dq.run.stages.assemble import load_set_of_run
from dq.run.stages.cluster import load_prototypes
from dq.run.stages.generate import nearest_images

MAX_CLASSES, MAX_COLUMNS = 20, 10
OPEN_CLASSES = 10  # that are shown without a click


def gallery(run: Run, cache: LatentCache, ipc: int, method: str, *, beside_real: bool) -> PlainDict:
    """Images of a set by class.

    At most 20 classes and 10 images of each, heaviest first. The key `grid` is a picture of the set and its nearest
    real images for a file.

    Args:
        run: the run.
        cache: its latents.
        ipc: images per class.
        method: name of the method.
        beside_real: show the real image nearest to each prototype, and random real images.
    """
    small = load_set_of_run(run, ipc, method)
    few = itertools.islice(load_prototypes(run, cache, ipc, run.resolved(method)), MAX_CLASSES)
    nearest = [nearest_images(run, p) for p in few]
    classes = []
    for label, real in enumerate(nearest):
        index = shown_rows(small, label)
        rows = [distilled_row(small, label, index)]
        if len(index) and beside_real:
            name = small.class_names[label]
            prototypes = small.prototype[index].tolist()
            alts = [f"real image nearest to image {i + 1} of class {name}" for i in range(len(index))]
            rows.append(picture_row("nearest real", [real[k] for k in prototypes], alts))
        rows += [random_real_row(run, label)] if beside_real else []
        classes.append(PictureClass(small.class_names[label], tuple(rows)))
    weights = small.weights
    return {
        "title": f"{method}, IPC {ipc}",
        "classes": classes,
        "open": OPEN_CLASSES,
        "total_classes": len(small.class_names),
        "more_images": int(torch.bincount(small.labels).max()) > MAX_COLUMNS,
        "equal_weight": f"{float(weights[0]):.3g}" if bool((weights == weights[0]).all()) else "",
        "size": f"{small.images.shape[-1]} px",
        "grid": set_grid(small, nearest),
    }


def shown_rows(small: DistilledSet, label: int) -> list[int]:
    """Rows of the first images of a class."""
    return (small.labels == label).nonzero()[:, 0][:MAX_COLUMNS].tolist()


def distilled_row(small: DistilledSet, label: int, index: list[int]) -> PictureRow:
    """The images of a class at `index` with their weights below."""
    images, name = small.images_uint8(), small.class_names[label]
    equal = bool((small.weights == small.weights[0]).all())
    alts, captions = [], []
    for number, i in enumerate(index):
        stands = f"stands for {plural(int(small.counts[i]), 'real image')}"
        alts.append(f"class {name}, image {number + 1}, weight {float(small.weights[i]):.2f}, {stands}")
        captions.append("" if equal else f"{float(small.weights[i]):.2f}")
    return picture_row("distilled", [images[i] for i in index], alts, captions)


def random_real_row(run: Run, label: int) -> PictureRow:
    """Random train images of a class, the same in every report."""
    members = torch.from_numpy(run.source.train.labels == label).nonzero()[:, 0]
    order = torch.randperm(len(members), generator=generator("report", "random", label))[:MAX_COLUMNS]
    rows = members[order].tolist()
    images, read, _ = read_images(
        run.source.train, rows, run.config.image_size, run.source.preprocess, on_bad=run.source.on_bad_image
    )
    name = run.source.class_names[label]
    return picture_row("random real", list(images), [f"random real image of class {name}, row {r}" for r in read])


def set_grid(small: DistilledSet, nearest: list[Tensor] | None = None) -> Any:
    """A grid with classes as rows and prototypes by weight as columns.

    With `nearest`, each image has its nearest real image at its right.
    """
    images = small.images_uint8()
    rows = []
    for c in range(min(MAX_CLASSES, len(small.class_names))):
        row: list[Tensor] = []
        for i in shown_rows(small, c):
            row.append(images[i])
            if nearest is not None:
                row.append(nearest[c][int(small.prototype[i])])
        rows.append(row)
    return image_grid(rows, scale=max(1, round(64 / images.shape[-1])))
