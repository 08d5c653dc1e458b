"""Real test, validation and train images, teachers and preprocessing that trainings share."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dq.config.pruning import DifficultyConfig
from dq.config.students import TAUGHT, EvaluateConfig, StudentConfig
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError
from dq.core.files import is_done, read_json, read_tensors, write_json, write_tensors
from dq.core.plain import PlainDict
from dq.core.progress import progress
from dq.core.seeds import digest_of, generator
from dq.core.text import plural
from dq.data.images import read_images
from dq.data.source import ImageSource, Split
from dq.data.splits import validation_rows
from dq.data.zca import WHOLE_SIDE, Whitening, Zca, fit_whitening, fit_zca, stride_of
from dq.networks.features import extract_features, open_features
from dq.networks.teacher import Teacher, pooled_logits
from dq.networks.teacher_loading import load_teachers
from dq.networks.training import Pixels, normalizer

log = logging.getLogger("dq")
T = TypeVar("T")

CHUNK = 2000  # images
STATISTICS_IMAGES = 5000
POOLED_SIDE = 8  # px, of images that stand in for features where there is no teacher


@dataclass(frozen=True)
class RealData:
    """Real data at the students' size, and what is derived from it, cached."""

    source: ImageSource
    image_size: int
    cache_dir: Path
    device: torch.device
    teachers: tuple[Teacher, ...]
    validation_rows: np.ndarray  # of train; empty if no student chooses its epoch on them
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # how the difficulty of train images is measured, for baselines that use it
    difficulty: DifficultyConfig = dataclasses.field(default_factory=DifficultyConfig)
    _cache: PlainDict = dataclasses.field(default_factory=dict)

    @property
    def classes(self) -> int:
        return len(self.source.class_names)

    @property
    def identity(self) -> list[object]:
        """Return what decides real images, for digests."""
        return identity_of(self.source, self.image_size, self.validation_rows)

    @property
    def candidates(self) -> np.ndarray:
        """Rows of train that baselines may use."""
        return np.setdiff1d(np.arange(len(self.source.train)), self.validation_rows)

    def read(self, split: Split, rows: Sequence[int] | np.ndarray, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Read images (n, 3, S, S) uint8 and labels (n,).

        With `scale`, images are resized to scale * S and cropped to the center.
        """
        side = round(self.image_size * scale)
        s = self.source
        images, read, bad = read_images(split, rows, side, s.preprocess, on_bad=s.on_bad_image)
        if bad:
            log.warning("%d of %d images of split %r are left out, first: %s", len(bad), len(rows), split.name, bad[0])
        edge = (side - self.image_size) // 2
        center = slice(edge, edge + self.image_size)
        return images[:, :, center, center].contiguous(), torch.from_numpy(split.labels[read])

    def test(self, scale: float) -> tuple[Tensor, Tensor]:
        """Return images and labels of the test split."""
        return self._once(f"test {scale}", lambda: self._read_test(scale))

    def _read_test(self, scale: float) -> tuple[Tensor, Tensor]:
        images, labels = self.read(self.source.test, range(len(self.source.test)), scale)
        if not len(labels):
            raise InputError(f"no test image of {self.source.origin} can be read; replace the split")
        absent = (torch.bincount(labels, minlength=self.classes) == 0).nonzero()[:, 0].tolist()
        if absent:
            names = ", ".join(self.source.class_names[c] for c in absent[:5])
            log.warning("%s without a test image, not counted: %s", plural(len(absent), "class"), names)
        return images, labels

    def validation(self, scale: float) -> tuple[Tensor, Tensor] | None:
        """Return images and labels of the validation part, if any."""
        if not len(self.validation_rows):
            return None
        return self._once(f"val {scale}", lambda: self.read(self.source.train, self.validation_rows, scale))

    def pixels(self, config: StudentConfig) -> Pixels:
        """Return the preprocessing of a student's images."""
        if config.whiten and config.zca == "frepo":
            return self.frepo_whitening()
        return self._once("zca", self._zca) if config.whiten else normalizer(self.mean, self.std)

    def frepo_whitening(self) -> Whitening:
        """Return FRePo's preprocessing, fitted on the train images that baselines may use."""
        return self._once("whitening", self._whitening)

    def _whitening(self) -> Whitening:
        check_whitened(self.image_size, "frepo")
        path = self.cache_dir / f"whitening-{digest_of(self.identity)}.safetensors"
        if not is_done(path):
            log.info("fitting whitening on %s", plural(len(self.candidates), "train image"))
            write_tensors(path, fit_whitening(self.read(self.source.train, self.candidates)[0]).tensors())
        return Whitening(**read_tensors(path)[0]).to(self.device)

    def mtt_whitening(self) -> Whitening:
        """Return MTT's ZCA with its inverse, fitted on the same images."""
        return self._once("mtt whitening", lambda: self._once("zca", self._zca).whitening())

    def _once(self, key: str, make: Callable[[], T]) -> T:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def _zca(self) -> Zca:
        check_whitened(self.image_size)
        path = self.cache_dir / f"zca-{digest_of(self.identity)}.safetensors"
        if not is_done(path):
            log.info("fitting ZCA on %s", plural(len(self.candidates), "train image"))
            zca = fit_zca(self.read(self.source.train, self.candidates)[0])
            write_tensors(path, {"mean": zca.mean, "matrix": zca.matrix})
        tensors, _ = read_tensors(path)
        return Zca(tensors["mean"], tensors["matrix"])

    def soften(self, images: Tensor) -> Tensor:
        """Return mean logits (N, C) of the teachers for stored images."""
        if not self.teachers:
            raise InputError("labels=fixed need a teacher or labels in the set; set teachers, or use labels=hard")
        return pooled_logits(self.teachers, images)

    def features(self) -> Tensor:
        """Return features (n, D) float32 of all train images, for selection baselines.

        They are the input of the first teacher's last layer, or without teachers the image shrunk to 8 x 8 px, and are
        cached; those of a teacher are the same files that a run clusters by. Rows of images that cannot be read are
        NaN.

        Raises:
            InputError: if an image cannot be read and `source.on_bad_image` is not skip, or none of a class can be.
        """
        if not self.teachers:
            return self._pooled_features()
        t = self.teachers[0]
        cache = open_features(self.cache_dir, self.source, self.image_size, t.digest)
        extract_features(self.source, t, cache, self.image_size)
        cache = dataclasses.replace(cache, order=tuple(range(self.classes)))
        shards = [cache.load(label) for label in range(self.classes)]
        return self._by_row(torch.cat([f for f, _ in shards]), torch.cat([rows for _, rows in shards]))

    def _pooled_features(self) -> Tensor:
        path = self.cache_dir / f"features-{digest_of([self.identity[:4], 'pooled'])}.safetensors"
        if not is_done(path):
            write_tensors(path, {"features": self._of_train(lambda images, _: _pooled(images), "features")})
        return read_tensors(path)[0]["features"]

    def predictions(self) -> dict[str, Tensor]:
        """Return the first teacher's predictions of all train images, for selection baselines.

        `probability` (n,) float32 is that of the image's class, `entropy` (n,) of the prediction; NaN for images that
        cannot be read. They are cached.

        Raises:
            InputError: if an image cannot be read and `source.on_bad_image` is not skip.
        """
        teacher = self.teachers[0]
        path = self.cache_dir / f"predictions-{digest_of([self.identity[:4], teacher.digest])}.safetensors"
        if not is_done(path):

            def predict(images: Tensor, labels: Tensor) -> Tensor:
                p = teacher.logits(images).softmax(1)
                return torch.stack([p.gather(1, labels[:, None])[:, 0], torch.special.entr(p).sum(1)], 1)

            probability, entropy = self._of_train(predict, "predictions").T.contiguous()
            write_tensors(path, {"probability": probability.clone(), "entropy": entropy.clone()})
        return read_tensors(path)[0]

    def _of_train(self, compute: Callable[[Tensor, Tensor], Tensor], desc: str) -> Tensor:
        """Rows (n, ...) that `compute` gives for images and labels of train; NaN for those that cannot be read."""
        s, parts, rows = self.source, [], []
        chunks = np.array_split(np.arange(len(s.train)), max(1, len(s.train) // CHUNK))
        for chunk in progress(chunks, desc=desc, unit="chunk"):
            images, read, _ = read_images(s.train, chunk, self.image_size, s.preprocess, on_bad=s.on_bad_image)
            if len(read):
                parts.append(compute(images, torch.from_numpy(s.train.labels[read])))
                rows += read
        if not rows:
            raise InputError(f"no train image of {s.origin} can be read; replace the split")
        return self._by_row(torch.cat(parts), torch.tensor(rows))

    def _by_row(self, values: Tensor, rows: Tensor) -> Tensor:
        """Values (m, ...) of m rows of train as (n, ...) by row, NaN in the others."""
        by_row = torch.full((len(self.source.train), *values.shape[1:]), torch.nan)
        by_row[rows] = values.float()
        return by_row


def _pooled(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images.float() / 255, min(POOLED_SIDE, images.shape[-1])).flatten(1)


def check_whitened(image_size: int, zca: Literal["mtt", "frepo"] = "mtt") -> None:
    """Check that images of this side (px) can be whitened.

    Raises:
        InputError: above 64 px, or 128 px for FRePo, which splits larger images in four.
    """
    largest = WHOLE_SIDE if zca == "mtt" else 2 * WHOLE_SIDE
    if image_size <= largest:
        stride_of(image_size)
    else:
        raise InputError(f"whiten needs a matrix of all pixel pairs, too large at {image_size} px; leave it out")


def identity_of(source: ImageSource, image_size: int, validation: np.ndarray) -> list[object]:
    """Return what decides real images, for digests."""
    return [source.fingerprint, image_size, source.preprocess, "raise", len(validation)]


def rows_set_aside(source: ImageSource, evaluate: EvaluateConfig, students: Iterable[StudentConfig]) -> np.ndarray:
    """Return the rows of train set aside for validation.

    None are, if no student chooses its epoch on them.
    """
    if any(s.tests > 1 and s.select == "validation" for s in students):
        return validation_rows(source.train.labels, evaluate.validation_images)
    return np.array([], np.int64)


def load_real_data(
    source: ImageSource,
    image_size: int,
    *,
    cache_dir: Path,
    device: torch.device,
    validation_rows: np.ndarray | None = None,
    teachers: Sequence[TeacherConfig] = (),
    difficulty: DifficultyConfig | None = None,
) -> RealData:
    """Load and check the teachers and measure channel statistics.

    `validation_rows` are set aside, see `rows_set_aside`; None: none.
    """
    real_data = RealData(
        source=source,
        image_size=image_size,
        cache_dir=cache_dir,
        device=device,
        teachers=load_teachers(teachers, source, image_size, device, cache_dir=cache_dir),
        validation_rows=np.array([], np.int64) if validation_rows is None else validation_rows,
        mean=(),
        std=(),
        difficulty=DifficultyConfig() if difficulty is None else difficulty,
    )
    mean, std = channel_statistics(real_data)
    return dataclasses.replace(real_data, mean=mean, std=std)


def channel_statistics(real_data: RealData) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels over some train images, in [0, 1], cached."""
    source = real_data.source
    identity = [source.fingerprint, real_data.image_size, source.preprocess, source.on_bad_image, STATISTICS_IMAGES]
    path = real_data.cache_dir / f"statistics-{digest_of(identity)}.json"
    if not is_done(path):
        sample = torch.randperm(len(source.train), generator=generator("statistics"))[:STATISTICS_IMAGES]
        values = real_data.read(source.train, sample.numpy())[0].float() / 255
        # a constant channel (white paper) would divide by zero
        std = values.std((0, 2, 3)).clamp(min=1e-2).tolist()
        write_json(path, {"mean": values.mean((0, 2, 3)).tolist(), "std": std})
    record = read_json(path)
    return tuple(record["mean"]), tuple(record["std"])


def check_taught(
    evaluate: EvaluateConfig, students: Iterable[StudentConfig], teachers: Sequence[TeacherConfig]
) -> None:
    """Check that there is a teacher where labels or baselines need one.

    Raises:
        InputError: if students or baselines need a teacher and none is named.
    """
    if teachers:
        return
    if any(s.labels == "soft" for s in students):
        raise InputError("students with labels=soft need a teacher; set teachers, or use labels=hard")
    taught = [b for b in evaluate.baselines if b in TAUGHT]
    if taught and evaluate.students:
        raise InputError(f"the baseline {taught[0]!r} needs a teacher; set teachers, or leave it out of baselines")
