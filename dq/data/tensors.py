"""Sources over tensors in memory, and scikit-learn's digits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dq.config.schema import SourceConfig
from dq.core.errors import InputError
from dq.data.left_out import LeftOut
from dq.data.source import (
    TEST_SPLITS,
    ImageSource,
    Split,
    as_names,
    checked_source,
    is_unlabeled,
    match_split,
    test_candidates,
)


def load_digits_source() -> ImageSource:
    """Return scikit-learn's 1,797 handwritten digits, 8x8, in a fixed stratified 75:25 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)
    splits = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
    return from_tensors(splits, class_names=[str(i) for i in range(10)], origin="sklearn:digits")


Arrays = tuple[Tensor | np.ndarray, Tensor | np.ndarray]  # images (n, C, H, W) and labels (n,)


def from_tensors(
    source: Arrays | Mapping[str, Arrays],
    *,
    class_names: Sequence[str] | None = None,
    origin: str = "tensors",
) -> ImageSource:
    """Return a source over tensors in memory; see `load_source`."""
    pairs = {str(name): pair for name, pair in source.items()} if isinstance(source, Mapping) else {"train": source}
    train = match_split("train", list(pairs))
    if train is None:
        raise InputError(f"tensors need a 'train' split, not only {', '.join(pairs)}")
    left_out = LeftOut()
    for name in pairs:
        if name != train and name.casefold() not in TEST_SPLITS:
            left_out.add("split", "beside train and test", name)
    left_out.warn(origin)
    h = hashlib.blake2b(digest_size=8)
    splits = {}
    for name, pair in pairs.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"split {name!r} of tensors is a pair (images, labels), not {type(pair).__name__}")
        images, labels = pair
        try:
            images, labels = torch.as_tensor(images), torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as e:
            raise InputError(
                f"split {name!r} holds no tensors or arrays ({str(e)[:100]}); give (images, labels)"
            ) from e
        if images.ndim != 4 or images.shape[1] not in (1, 3) or labels.shape != images.shape[:1]:
            raise InputError(
                f"split {name!r} needs images (n, 1 or 3, H, W) and labels (n,), "
                f"not {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        if labels.dtype.is_floating_point or not len(images):
            raise InputError(f"split {name!r} needs at least one image and whole-number labels, not {labels.dtype}")
        if images.dtype != torch.uint8:
            if not images.dtype.is_floating_point:
                raise InputError(f"images of split {name!r} must be uint8 or float in [0, 1], not {images.dtype}")
            if not torch.isfinite(images).all() or images.min() < 0 or images.max() > 1:
                raise InputError(f"float images of split {name!r} must be finite and lie in [0, 1]")
            images = (images * 255).round().to(torch.uint8)
        array = images.cpu().numpy()
        splits[name] = Split(labels.cpu().numpy().astype(np.int64), array.__getitem__, name)
        h.update(str(array.shape).encode())
        h.update(np.ascontiguousarray(array).tobytes())
        h.update(splits[name].labels.tobytes())
    highest = max(int(s.labels.max(initial=-1)) for s in splits.values()) + 1
    names = tuple(map(str, range(highest))) if class_names is None else as_names(class_names)
    candidates = test_candidates(list(splits), train, SourceConfig(path=origin))
    test = next((name for name in candidates if not is_unlabeled(splits[name].labels)), None)
    if candidates and test is None:
        raise InputError(f"split {candidates[0]!r} of tensors has no labels; leave it out")
    splits = {name: splits[name] for name in (train, test) if name}
    return checked_source(splits, names, h, origin, train, test)
