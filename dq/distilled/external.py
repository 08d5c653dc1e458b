"""Sets of other origin: folders of images, Parquet files, and tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dq.config.schema import SourceConfig
from dq.config.students import LabelKind
from dq.core.errors import InputError
from dq.core.files import as_path, suggest_folder
from dq.core.text import plural, printable
from dq.data.images import UNDECODABLE, open_image, read_images
from dq.data.left_out import warn_of_keys
from dq.data.load import load_source
from dq.data.source import NUMBER, Split, as_names
from dq.distilled.format import PROVENANCE, RUN_CONFIG, is_set, parquet_kind, set_names
from dq.distilled.set import DistilledSet
from dq.distilled.tensor_files import read_tensor_file, to_pixels

log = logging.getLogger("dq")

TENSORS = (".safetensors", ".npz")
TENSOR_KEYS = ("images", "labels", "weights", "soft_labels", "mean", "std")


def load_set(
    path: str | Path,
    class_names: Sequence[str] | None = None,
    *,
    name: str | None = None,
    image_size: int | None = None,
    label_kind: LabelKind | None = None,
    on_bad_image: Literal["raise", "skip"] = "raise",
    revision: str | None = None,
    token: str | None = None,
) -> DistilledSet:
    """Open a distilled set of any origin.

    Args:
        path: what `DistilledSet.save` wrote (a set's own folder, the folder of several, or a run folder); a repository
            "owner/name" of the Hub with sets of dq; a Parquet folder with an image and a label column, and optionally
            `weight` and `soft_label` (or `weights` and `soft_labels`); a folder `class/*.png`; or a `.safetensors` or
            `.npz` file with `images` (N, 3, S, S) uint8 or float in [0, 1], `labels` (N,), and optionally `weights`
            (N,) and `soft_labels` (N, C). With `mean` and `std` (3,) beside them the images are normalized by these,
            and may leave [0, 1] as pixels, as images of matching methods do. Files of torch.save are not opened, since
            they can run code; save them as safetensors.
        class_names: of the data set that it is a distillate of; None: those of the set itself. Class folders are
            either these names, or numbers that sort to these classes (00000, 00001, ...).
        name: of one set among several.
        image_size: side in px at which a folder of images is read; None: that of the first image.
        label_kind: what the label vectors are; None: what the set records.
        on_bad_image: raise an error at an image of a folder that cannot be read, or skip it with a warning.
        revision: of a repository.
        token: of the Hub.

    Raises:
        InputError: if it cannot be read, a name is given to what has no named sets, its classes are not `class_names`,
            uint8 images hold 0 and 1 alone, mean and std are not of images in [0, 1], or its label vectors could be
            probabilities and nothing states what they are.
    """
    names = None if class_names is None else as_names(class_names)
    text = str(path)
    path = as_path(path, "the path of a set")
    has_sets = is_set(path) or bool(set_names(path) or set_names(path / "dataset")) or _is_run(path)
    if name is not None and not has_sets and (path.suffix in TENSORS or path.is_dir()):
        raise InputError(f"{path} is one set without a name, so there is no {name!r} in it; leave the name out")
    if path.suffix in TENSORS:
        s = _from_tensor_file(path, names, label_kind)
    elif has_sets:
        s = DistilledSet.load(path, name)
    elif path.is_dir():
        s = _from_folder(path, names, image_size, label_kind, on_bad_image)
    else:
        _check_hub_id(path, text)
        s = DistilledSet.from_hub(text, name, revision=revision, token=token)
    s = _with_classes(s, names or s.class_names, path)
    check_classes(s, text)
    if label_kind is not None:
        s = dataclasses.replace(s, label_kind=label_kind)
    return dataclasses.replace(s, provenance={**s.provenance, "origin": text})


def _check_hub_id(path: Path, text: str) -> None:
    """Check that a path which is no set could be a repository."""
    if path.suffix in (".pt", ".pth"):
        raise InputError(
            f"{path} is not a distilled set that can be read; files of torch.save can run code; save the tensors as "
            "safetensors"
        )
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise InputError(
            f"{path} is not a distilled set that can be read{suggest_folder(path)}; give a folder of images "
            "by class, a Parquet folder, a .safetensors or .npz file, or a Hub id"
        )


def _with_classes(s: DistilledSet, names: tuple[str, ...], path: Path) -> DistilledSet:
    """The set with its classes in the order of `names`.

    Raises:
        InputError: if it has other classes, or lacks one.
    """
    missing = [n for n in names if n not in s.class_names]
    if missing and set(s.class_names) < set(names):
        raise InputError(
            f"class {names.index(missing[0])} {missing[0]!r} has no image in {path}; every class needs one at least"
        )
    if set(s.class_names) != set(names):
        raise InputError(
            f"{path} has the classes {', '.join(s.class_names[:5])}..., the data has {', '.join(names[:5])}...; "
            "they must be the same"
        )
    if s.class_names == names:
        return s
    return _reordered(s, torch.tensor([names.index(n) for n in s.class_names]), names)


def _is_run(path: Path) -> bool:
    """Whether a folder is that of a run, or of its sets."""
    run = path.parent if path.name == "dataset" else path
    return (run / RUN_CONFIG).is_file() and (run / PROVENANCE).is_file()


def _label_kind(vectors: LabelVectors, origin: str) -> LabelKind:
    """The kind of label vectors: as stated, else logits.

    Raises:
        InputError: if they look like probabilities and no kind is stated.
    """
    if vectors.kind is not None:
        return vectors.kind
    x = vectors.values.float()
    total = x.sum(1) if x.ndim == 2 else x.new_zeros(1)
    if (x >= 0).all() and (total > 0).all() and bool((total - total[0]).abs().max() < 0.01 * total[0]):
        raise InputError(
            f"the soft labels of {origin} could be probabilities, since every row is positive and sums to "
            f"{float(total[0]):.3g}, and nothing says so; state label_kind (--label_kind): probabilities (rows sum to "
            "1), logits or regression"
        )
    log.info("note: the soft labels of %s are taken for logits; state label_kind if they are not", origin)
    return "logits"


def check_classes(s: DistilledSet, what: str) -> None:
    """Check that every class has an image.

    Raises:
        InputError: that names the first empty class.
    """
    counts = torch.bincount(s.labels, minlength=len(s.class_names))
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if empty:
        raise InputError(
            f"class {empty[0]} {s.class_names[empty[0]]!r} has no image in {what}"
            + (f" (nor have {len(empty) - 1} others)" if len(empty) > 1 else "")
            + "; every class needs one at least"
        )


@dataclass(frozen=True)
class LabelVectors:
    """Label vectors of images, and what they are."""

    values: Tensor  # (N, C) float
    kind: LabelKind | None = None  # None: not stated


def set_from_tensors(
    images: Tensor,
    labels: Tensor,
    class_names: tuple[str, ...],
    *,
    weights: Tensor | None = None,
    label_vectors: LabelVectors | None = None,
    origin: str = "tensors",
    bounded: bool = True,
) -> DistilledSet:
    """A `DistilledSet` of images and labels without other records."""
    soft_labels = None if label_vectors is None else label_vectors.values
    _check_rows(images, labels, origin)
    n, labels = len(labels), labels.long()
    for name, value, shape in (("weights", weights, (n,)), ("soft_labels", soft_labels, (n, len(class_names)))):
        if value is not None and tuple(value.shape) != shape:
            raise InputError(f"{name} of {origin} must be {shape}, not {tuple(value.shape)}")
    _check_label_range(labels, class_names, origin)
    order = torch.argsort(labels, stable=True)
    rank = torch.cat([torch.arange(int(k)) for k in torch.bincount(labels) if k])
    return DistilledSet(
        images=images[order].contiguous(),
        labels=labels[order],
        weights=torch.ones(n) if weights is None else weights[order].float(),
        class_names=class_names,
        prototype=rank,
        counts=torch.ones(n, dtype=torch.int64),
        source_row=torch.full((n,), -1),
        soft_labels=None if soft_labels is None else soft_labels[order].half(),
        bounded=bounded,
        label_kind="logits" if label_vectors is None else _label_kind(label_vectors, origin),
        # what the columns of the dataset card ask for
        provenance={
            "source": {"origin": origin},
            "ipc": int(torch.bincount(labels).max()),
            "method": {"name": "foreign", "representative": "unknown", "weights": "unknown"},
            "cluster": {"engine": "unknown"},
            "generate": {"mode": "unknown"},
            "labels": None,
        },
    )


def _check_rows(images: Tensor, labels: Tensor, origin: str) -> None:
    """Check that images and labels fit together."""
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or not len(labels):
        raise InputError(
            f"labels of {origin} must be whole numbers (N,), N > 0, not {tuple(labels.shape)} {labels.dtype}"
        )
    if not images.numel():
        raise InputError(f"images of {origin} have no pixels: they are {tuple(images.shape)}; give (N, 3, H, W)")
    if images.ndim == 0 or len(images) != len(labels):
        count = len(images) if images.ndim else "no"
        raise InputError(f"{origin} has {count} images but {plural(len(labels), 'label')}")


def _check_label_range(labels: Tensor, class_names: tuple[str, ...], origin: str) -> None:
    if not (labels.min() >= 0 and labels.max() < len(class_names)):
        raise InputError(
            f"labels of {origin} go from {int(labels.min())} to {int(labels.max())}, but there are "
            f"{len(class_names)} classes; number them from 0"
        )


def _from_tensor_file(path: Path, class_names: tuple[str, ...] | None, label_kind: LabelKind | None) -> DistilledSet:
    tensors = read_tensor_file(path)
    if not {"images", "labels"} <= set(tensors):
        raise InputError(f"{path} needs the tensors images and labels; it has {', '.join(sorted(tensors)) or 'none'}")
    warn_of_keys(sorted(tensors), TENSOR_KEYS, str(path), "tensor")
    soft_labels = tensors.get("soft_labels")
    if soft_labels is not None and not soft_labels.is_floating_point():
        raise InputError(
            f"soft_labels of {path} are {soft_labels.dtype}; give them as floats, such as probabilities or logits"
        )
    images = tensors["images"] if tensors["images"].dtype == torch.uint8 else tensors["images"].float()
    normalized = {"mean", "std"} <= set(tensors)
    if normalized != bool({"mean", "std"} & set(tensors)):
        raise InputError(f"{path} has one of mean and std; images that are normalized need both")
    if normalized:
        images = to_pixels(images, tensors["mean"], tensors["std"], path)
    _check_range(images, path)
    labels = tensors["labels"]
    if labels.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch hardly computes with
        labels = labels.to(torch.int64)
    if class_names is None and (labels.is_floating_point() or not labels.numel() or labels.min() < 0):
        raise InputError(f"labels of {path} must be whole numbers from 0, which name its classes; give class_names")
    if class_names is None and int(labels.max()) >= len(labels):
        raise InputError(f"labels of {path} go up to {int(labels.max())}, more classes than images; give class_names")
    names = class_names or tuple(str(i) for i in range(int(labels.max()) + 1))
    return set_from_tensors(
        images,
        labels,
        names,
        weights=tensors.get("weights"),
        label_vectors=None if soft_labels is None else LabelVectors(soft_labels, label_kind),
        origin=str(path),
        bounded=not normalized,
    )


def _check_range(images: Tensor, path: Path) -> None:
    """Check that uint8 images go up to 255.

    Raises:
        InputError: if they hold 0 and 1 alone, which are all but black.
    """
    if images.dtype == torch.uint8 and images.numel() and images.max() == 1:
        raise InputError(
            f"images of {path} are 8-bit and hold 0 and 1 alone, which are all but black; multiply them by 255"
        )


COLUMNS = ("weight", "weights"), ("soft_label", "soft_labels")
BOOKKEEPING = ("prototype", "count", "source_row")  # columns of sets of dq that no student learns from


def _from_folder(
    path: Path,
    class_names: tuple[str, ...] | None,
    image_size: int | None,
    label_kind: LabelKind | None,
    on_bad_image: Literal["raise", "skip"],
) -> DistilledSet:
    source = load_source(SourceConfig(path=str(path), on_bad_image=on_bad_image))
    names = source.class_names if class_names is None else _by_number(source.class_names, class_names, path)
    train = source.train
    warn_of_keys(train.columns, [*itertools.chain(*COLUMNS), *BOOKKEEPING], str(path), "column")
    sizes: dict[int, tuple[int, int]] = {}
    size = image_size or _first_side(train, on_bad_image)
    measured = dataclasses.replace(train, read=functools.partial(_read_measured, train, sizes))
    images, rows, bad = read_images(measured, range(len(train)), size, "crop", on_bad=on_bad_image)
    if bad:
        log.warning("%s: left out %d of %d images that cannot be read: %s", path, len(bad), len(train), bad[0])
    if not rows:
        raise InputError(f"no image of {path} can be read: {bad[0]}")
    _warn_of_sizes({i: sizes[i] for i in rows}, size, path, train, requested=image_size is not None)
    _check_range(images, path)
    weights, soft_labels = (_column(train, names, rows, path) for names in COLUMNS)
    labels = torch.from_numpy(train.labels[rows])
    vectors = None if soft_labels is None else LabelVectors(soft_labels, label_kind or parquet_kind(path))
    return set_from_tensors(images, labels, names, weights=weights, label_vectors=vectors, origin=str(path))


def _read_measured(split: Split, sizes: dict[int, tuple[int, int]], row: int) -> Any:
    """Read a row of a split, and record its width and height."""
    raw = split.read(row)
    with contextlib.suppress(*UNDECODABLE):
        sizes[row] = open_image(raw).size
    return raw


def _warn_of_sizes(sizes: dict[int, tuple[int, int]], side: int, path: Path, split: Split, *, requested: bool) -> None:
    """Warn of images that are cut or resampled to `side`.

    `sizes` holds width and height in px by row. Images of one size are resampled to a requested side without a
    warning.
    """
    cut = [i for i, (w, h) in sizes.items() if w != h]
    other = [i for i, (w, h) in sizes.items() if w == h != side]
    if requested and len(set(sizes.values())) == 1:
        other = []
    for rows, what in ((cut, "not square, and cut to their central square of"), (other, "resampled to")):
        if rows:
            raw, (w, h) = split.read(rows[0]), sizes[rows[0]]
            log.warning(
                "%s: %d of %d images are %s %d px; the first, %s, has %d x %d px; resize them yourself if that is not "
                "what their makers trained on",
                *(path, len(rows), len(sizes), what, side),
                *(printable(raw) if isinstance(raw, Path) else split.where(rows[0]), w, h),
            )


def _by_number(names: tuple[str, ...], class_names: tuple[str, ...], path: Path) -> tuple[str, ...]:
    """Names from `class_names` for classes that are called by numbers.

    Numbers of numbered classes are these classes; others count the classes in their order.
    """
    if set(names) == set(class_names) or len(names) != len(class_names) or not _are_numbers(names):
        return names
    if _are_numbers(class_names):
        by_number = {int(n): n for n in class_names}
        if len(by_number) < len(class_names) or {int(n) for n in names} != set(by_number):
            return names
        return tuple(by_number[int(n)] for n in names)
    order = sorted(int(n) for n in names)
    if len(set(order)) < len(order):
        raise InputError(f"{path} has two classes of one number; write the numbers in one way")
    return tuple(class_names[order.index(int(n))] for n in names)


def _are_numbers(names: Sequence[str]) -> bool:
    return all(NUMBER.fullmatch(n) for n in names)


def _column(split: Split, names: tuple[str, ...], rows: list[int], path: Path) -> Tensor | None:
    """The column with one of these names, for the given rows."""
    present = [name for name in names if name in split.columns]
    if not present:
        return None
    if len(present) > 1:
        raise InputError(f"{path} has the columns {' and '.join(present)}, which mean the same; drop one")
    values = split.column(present[0]) or []
    try:
        return torch.tensor([values[i] for i in rows], dtype=torch.float32)
    except (IndexError, TypeError, ValueError) as e:
        raise InputError(
            f"column {present[0]!r} of {path} is not numbers for every image ({e}); mend it or drop it"
        ) from e


def _first_side(split: Split, on_bad_image: Literal["raise", "skip"]) -> int:
    """The shorter side in px of the first image.

    Under `skip` it is that of the first image that can be read.
    """
    for row in range(len(split)):
        try:
            return min(open_image(split.read(row)).size)
        except UNDECODABLE as e:
            if on_bad_image == "raise":
                raise InputError(f"the first image, in {split.where(0)}, cannot be read ({e}); replace it") from e
    raise InputError(f"no image of split {split.name!r} can be read; replace them")


def _reordered(s: DistilledSet, order: Tensor, class_names: tuple[str, ...]) -> DistilledSet:
    """The set with label i as `order`[i], an index into `class_names`."""
    labels = order[s.labels]
    rows = torch.argsort(labels, stable=True)
    soft = s.soft_labels
    if soft is not None:
        moved = torch.empty_like(soft)
        moved[:, order] = soft
        soft = moved[rows]
    return dataclasses.replace(
        s,
        images=s.images[rows],
        labels=labels[rows],
        weights=s.weights[rows],
        class_names=class_names,
        prototype=s.prototype[rows],
        counts=s.counts[rows],
        source_row=s.source_row[rows],
        soft_labels=soft,
    )
