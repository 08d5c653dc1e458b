"""Soft labels: what teachers say of every view of every image in every epoch (FKD, Shen & Xing 2022), made, kept
small, read back.

A label epoch is a pure function of images, teachers and a plan. It is computed when needed (`online_labels`) or
written once, file by file, and read through a memory map (`write_shard`, `read_labels`); students see the same bits
either way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dq.config.reader import from_dict, to_dict
from dq.config.students import RelabelConfig, StudentConfig, ViewConfig
from dq.core.errors import InputError
from dq.core.files import is_done, open_tensors, read_json, write_json, write_tensors
from dq.core.memory import in_pieces
from dq.core.seeds import derive_seed, digest_of, digest_of_tensors, seeded
from dq.data.views import Views, apply_views, batches, draw_views, parts
from dq.networks.teacher import Teacher, average_logits

MANIFEST = "manifest.json"
SHARD_BYTES = 4 << 20  # several epochs of a small set share a file of about this size ...
MIN_SHARDS = 4  # ... if that leaves enough files to divide over processes and to resume by
VIEW_BYTES = {"order": 4, "box": 8, "flip": 1, "partner": 2}  # per image and epoch
BATCH_BYTES = 12  # per batch and epoch: kept and cut
TEACHER_BATCH = 256  # images at once where batches do not matter


@dataclass(frozen=True)
class EpochLabels:
    """One epoch as a student sees it."""

    plan: LabelPlan
    views: Views
    logits: Tensor  # (N, C) float32, by position in `views.order`

    def check(self, images: int, student: StudentConfig) -> None:
        """Partners, mixes and batch statistics live inside batches: a student must have those of its labels.

        Raises:
            InputError: that names the first setting in which they differ.
        """
        p = self.plan
        wanted = {"images": images, **{k: getattr(student, k) for k in ("batch_size", "accumulate", "views")}}
        for name, value in wanted.items():
            if getattr(p, name) != value:
                raise InputError(
                    f"the labels were made with {name}={getattr(p, name)} but the student has {value}; "
                    "label the set for this student"
                )


LabelSource = Callable[[int], EpochLabels]  # epoch from 1 -> its labels


@dataclass(frozen=True)
class LabelPlan:
    """Everything that decides the labels of a set."""

    images: int  # N
    image_digest: str
    side: int
    classes: int
    teachers: tuple[str, ...]  # digests
    epochs: int  # label epochs; a longer training uses them again
    batch_size: int
    accumulate: int  # parts of a batch, which batch statistics are taken over
    views: ViewConfig
    relabel: RelabelConfig
    shard_epochs: int  # label epochs per file

    @property
    def digest(self) -> str:
        """Names the folder of the labels; where and in which files they are kept does not change them."""
        settings = to_dict(self)
        settings.pop("shard_epochs")
        settings["relabel"].pop("storage")
        settings["relabel"].pop("epochs")  # see `epochs`
        if self.relabel.statistics == "running":
            settings["relabel"].pop("dropout")
        if self.relabel.average == "logits":
            settings["relabel"].pop("average")  # as before there was a choice
        return digest_of(settings)

    def shards(self) -> list[range]:
        """The label epochs of each file, counted from 0."""
        step = self.shard_epochs
        return [range(a, min(a + step, self.epochs)) for a in range(0, self.epochs, step)]

    def draw(self, epoch: int) -> Views:
        """The views of label epoch `epoch`, counted from 0."""
        return draw_views(
            self.views,
            self.images,
            self.side,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            seed=self.relabel.seed,
            epoch=epoch,
        )


def make_plan(images: Tensor, teachers: Sequence[Teacher], classes: int, student: StudentConfig) -> LabelPlan:
    """The plan of the labels that `student` needs for images (N, 3, S, S).

    Raises:
        InputError: if there is no teacher, or the settings do not fit the number of classes.
    """
    digest = digest_of_tensors({"images": images})
    return plan_labels(len(images), images.shape[-1], teachers, classes, student, image_digest=digest)


def plan_labels(
    n: int, side: int, teachers: Sequence[Teacher], classes: int, student: StudentConfig, *, image_digest: str
) -> LabelPlan:
    """`make_plan` for `n` images of `side` px that need not be at hand."""
    if not teachers:
        raise InputError("labels=soft need a teacher; set teachers, or use labels=hard")
    r = student.relabel
    if r.top_k is not None and r.top_k >= classes:
        raise InputError(f"relabel.top_k={r.top_k} keeps all of {classes} classes; take fewer, or null for all")
    if student.batch_size < 2 * student.accumulate and r.statistics == "batch":
        raise InputError(
            f"batch_size={student.batch_size} in {student.accumulate} parts leaves batch statistics of single images; "
            "raise batch_size or lower accumulate"
        )
    epochs = min(r.epochs or student.epochs, student.epochs)
    per_epoch = label_bytes(n, 1, classes, r, student.batch_size, student.views).total
    return LabelPlan(
        images=n,
        image_digest=image_digest,
        side=side,
        classes=classes,
        teachers=tuple(t.digest for t in teachers),
        epochs=epochs,
        batch_size=student.batch_size,
        accumulate=student.accumulate,
        views=student.views,
        relabel=r,
        shard_epochs=max(1, min(SHARD_BYTES // per_epoch, -(-epochs // MIN_SHARDS))),
    )


# --- teachers -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def label_epoch(images: Tensor, teachers: Sequence[Teacher], plan: LabelPlan, epoch: int) -> tuple[Views, Tensor]:
    """Views of one epoch and the teachers' mean logits (N, C) float32 of them, by position.

    With `relabel.statistics: batch` the teachers' batch norm uses the statistics of each part of a batch (BSSL, the
    FADRM code): teacher and student, which takes the same parts, then normalise over the same images.

    Args:
        images: (N, 3, S, S), uint8 or float in [0, 1], on the teachers' device.
    """
    views = plan.draw(epoch)
    spans = batches(plan.images, plan.batch_size, plan.accumulate)
    grouped = plan.relabel.statistics == "batch"
    found: list[Tensor] = []
    waiting: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for t in teachers:
            stack.enter_context(_modes(t.net, plan.relabel))
        for i, span in enumerate(spans):
            x = apply_views(plan.views, images, views, i, span)
            if not grouped:
                # in evaluation mode it does not matter who shares a batch, and large ones are faster
                waiting.append(x)
                if sum(map(len, waiting)) >= TEACHER_BATCH or i + 1 == len(spans):
                    found.append(_mean_in_pieces(teachers, torch.cat(waiting), plan.relabel.average))
                    waiting = []
                continue
            with seeded(derive_seed(plan.relabel.seed, "dropout", epoch, i), images.device):  # global generators only
                for part in parts(len(x), plan.accumulate):
                    found.append(mean_logits(teachers, x[part], plan.relabel.average).cpu())
    return views, torch.cat(found)


def _mean_in_pieces(teachers: Sequence[Teacher], x: Tensor, average: str) -> Tensor:
    return in_pieces("label", len(x), lambda s: mean_logits(teachers, x[s], average).cpu())


def mean_logits(teachers: Sequence[Teacher], x: Tensor, average: str = "logits") -> Tensor:
    """`average_logits` of the teachers for pixels (B, 3, S, S)."""
    return average_logits(
        [t(x) for t in teachers], [t.weight for t in teachers], probabilities=average == "probabilities"
    )


@contextlib.contextmanager
def _modes(net: nn.Module, relabel: RelabelConfig) -> Iterator[None]:
    """`net` in evaluation mode for the time of a block; with `statistics: batch` its batch norm in training mode, but
    without touching the running statistics. The released code puts all of the network in training mode, dropout too,
    and lets the running statistics drift."""
    grouped = relabel.statistics == "batch"
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    modes = [(m, m.training) for m in net.modules()]
    momenta = [m.momentum for m in norms]
    counters = [None if m.num_batches_tracked is None else m.num_batches_tracked.clone() for m in norms]
    net.train(grouped and relabel.dropout)
    for m in norms:
        m.train(grouped)
        m.momentum = 0.0
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for m, momentum, counter in zip(norms, momenta, counters):
            m.momentum = momentum
            if m.num_batches_tracked is not None and counter is not None:
                m.num_batches_tracked.copy_(counter)


# --- keeping logits -----------------------------------------------------------------------------------------------


def pack(logits: Tensor, relabel: RelabelConfig) -> dict[str, Tensor]:
    """Logits (N, C) of one epoch in the form in which they are kept.

    16 bits: float16. 8 bits: 256 even steps from the least to the largest of the epoch. top_k: the k largest of each
    row as distances above the mean of the others; softmax does not see the constant that is lost.
    """
    if relabel.top_k is None:
        if relabel.bits == 16:
            return {"logits": logits.half()}
        low, high = logits.min(), logits.max()
        steps = (logits - low) / (high - low).clamp(min=1e-12) * 255
        return {"logits": steps.round().to(torch.uint8), "range": torch.stack([low, high])}
    values, index = logits.topk(relabel.top_k, dim=1)
    rest = (logits.sum(1) - values.sum(1)) / (logits.shape[1] - relabel.top_k)
    above = values - rest[:, None]
    packed = {"index": index.to(torch.uint8 if logits.shape[1] <= 256 else torch.int16)}
    if relabel.bits == 16:
        return {**packed, "above": above.half()}
    high = above.max()
    steps = (above / high.clamp(min=1e-12) * 255).round().to(torch.uint8)
    return {**packed, "above": steps, "range": torch.stack([torch.zeros_like(high), high])}


def unpack(packed: dict[str, Tensor], classes: int) -> Tensor:
    """Logits (N, C) float32 of what `pack` made; with top_k up to a constant in each row."""
    values = packed["logits"] if "logits" in packed else packed["above"]
    if "range" in packed:
        low, high = packed["range"].float()
        values = values.float() / 255 * (high - low) + low
    values = values.float()
    if "index" not in packed:
        return values
    return torch.zeros(len(values), classes).scatter_(1, packed["index"].long(), values)


@dataclass(frozen=True)
class LabelBytes:
    """Size of the labels of a set."""

    logits: int
    views: int

    @property
    def total(self) -> int:
        return self.logits + self.views


def label_bytes(
    images: int,
    epochs: int,
    classes: int,
    relabel: RelabelConfig | None = None,
    batch_size: int = 16,
    views: ViewConfig | None = None,
) -> LabelBytes:
    """What the labels of `images` images over `epochs` label epochs will weigh, before anything is written.

    With the defaults the logits weigh images * epochs * classes * 2 bytes. Not counted: a header of some hundred bytes
    per file, and the manifest.
    """
    r, v = relabel or RelabelConfig(), views or ViewConfig()
    value = r.bits // 8
    row = classes * value if r.top_k is None else r.top_k * (value + (1 if classes <= 256 else 2))
    logits = epochs * (images * row + (8 if r.bits == 8 else 0))
    if r.views == "seed":
        drawn = 8 * epochs
    else:
        patches = v.shuffle**2 if v.shuffle > 1 else 0
        drawn = epochs * (images * (sum(VIEW_BYTES.values()) + patches) + -(-images // batch_size) * BATCH_BYTES)
    return LabelBytes(logits, drawn)


def plan_bytes(plan: LabelPlan) -> LabelBytes:
    """`label_bytes` of a plan."""
    return label_bytes(plan.images, plan.epochs, plan.classes, plan.relabel, plan.batch_size, plan.views)


# --- sources of labels --------------------------------------------------------------------------------------------


def online_labels(images: Tensor, teachers: Sequence[Teacher], plan: LabelPlan) -> LabelSource:
    """Labels computed epoch by epoch when they are asked for; they go through the same rounding as stored ones."""

    def epoch_labels(epoch: int) -> EpochLabels:
        views, logits = label_epoch(images, teachers, plan, (epoch - 1) % plan.epochs)
        return EpochLabels(plan, views, unpack(pack(logits, plan.relabel), plan.classes))

    return epoch_labels


def shard_file(folder: Path, first: int) -> Path:
    """The file that begins with label epoch `first`."""
    return folder / f"epoch-{first + 1:05d}.safetensors"


def write_manifest(folder: Path, images: Tensor, plan: LabelPlan, teachers: Sequence[Teacher], **facts: Any) -> None:
    """Say what the labels in `folder` are labels of, unless that has been said."""
    if is_done(folder / MANIFEST):
        return
    import numpy
    import safetensors

    record = {
        "plan": to_dict(plan),
        "teachers": [{"name": t.name, "digest": t.digest} for t in teachers],
        "checksums": checksums(images),
        "versions": {"torch": torch.__version__, "numpy": numpy.__version__, "safetensors": safetensors.__version__},
        **facts,
    }
    write_json(folder / MANIFEST, record)


def checksums(images: Tensor) -> list[int]:
    """CRC-32 of each image."""
    return [zlib.crc32(x.contiguous().cpu().numpy().tobytes()) for x in images]


def write_shard(folder: Path, images: Tensor, teachers: Sequence[Teacher], plan: LabelPlan, epochs: range) -> None:
    """Label the epochs of one file, and write it whole or not at all."""
    columns: dict[str, list[Tensor]] = {}
    for epoch in epochs:
        views, logits = label_epoch(images, teachers, plan, epoch)
        row = pack(logits, plan.relabel)
        if plan.relabel.views == "stored":
            stored = (
                "order",
                "box",
                "flip",
                "partner",
                "kept",
                "cut",
                *(["shuffle"] if views.shuffle.numel() else []),
            )
            row |= {name: getattr(views, name) for name in stored}
        else:
            row["views_digest"] = torch.tensor(views.digest())
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    tensors = {name: torch.stack(values) for name, values in columns.items()}  # (epochs, ...)
    write_tensors(shard_file(folder, epochs.start), tensors, {"epochs": [epochs.start, epochs.stop]})


def read_labels(folder: str | Path, images: Tensor) -> LabelSource:
    """Labels from the files that `write_shard` made; an epoch is read when it is asked for, through a memory map.

    Args:
        images: (N, 3, S, S), the images that will be replayed.

    Raises:
        InputError: if the labels were made for other images, or files are missing.
        RunError: when a damaged file is met.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} holds no soft labels (no {MANIFEST}); make them with `dq label`")
    record = read_json(folder / MANIFEST)
    plan = from_dict(LabelPlan, record["plan"])
    _check_images(folder, record["checksums"], images, plan)
    spans = plan.shards()
    missing = [shard_file(folder, s.start).name for s in spans if not shard_file(folder, s.start).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(spans)} label files, first {missing[0]}; run `dq label`"
        )

    def epoch_labels(epoch: int) -> EpochLabels:
        at = (epoch - 1) % plan.epochs
        number = at // plan.shard_epochs
        path = shard_file(folder, spans[number].start)
        with open_tensors(path) as f:
            row = {name: f.get_slice(name)[at - spans[number].start] for name in f.keys()}  # noqa: SIM118
        return EpochLabels(plan, _views(path, plan, row, at), unpack(row, plan.classes))

    return epoch_labels


def _views(path: Path, plan: LabelPlan, row: dict[str, Tensor], epoch: int) -> Views:
    if plan.relabel.views == "seed":
        views = plan.draw(epoch)
        if views.digest() != int(row["views_digest"]):
            raise InputError(
                f"the views of {path} cannot be drawn again: this version of numpy or torch draws others than the one "
                "that made the labels; make them again, or with relabel.views=stored"
            )
        return views
    n = plan.images
    names = [f.name for f in dataclasses.fields(Views)]
    empty = {
        "shuffle": torch.zeros(n, 0, dtype=torch.uint8),
        "colour": torch.zeros(n, 0),
        "colour_order": torch.zeros(n, 0, dtype=torch.uint8),
        "light": torch.zeros(n, 0),
    }
    return Views(**{name: row.get(name, empty.get(name)) for name in names})  # type: ignore[arg-type]


def _check_images(folder: Path, made_for: list[int], images: Tensor, plan: LabelPlan) -> None:
    if len(images) != len(made_for):
        raise InputError(
            f"the labels in {folder} are for {len(made_for)} images, not {len(images)}; run `dq label` for this set"
        )
    if plan.image_digest == digest_of_tensors({"images": images}):
        return
    now = checksums(images)
    other = [i for i, (a, b) in enumerate(zip(made_for, now)) if a != b]
    raise InputError(
        f"the labels in {folder} were made for other images: {len(other)} of {len(now)} differ"
        + (f", first image {other[0]}" if other else " in size or type")
        + "; run `dq label` for this set"
    )
