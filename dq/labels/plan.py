"""Plan of the soft labels of every view, and their size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from dq.config.kinds import Count, Many, Whole
from dq.config.reader import to_dict
from dq.config.students import RelabelConfig, StudentConfig, ViewConfig
from dq.config.validation import Checked, settings
from dq.core.errors import InputError
from dq.core.seeds import digest_of, digest_of_tensors
from dq.data.views import Views, draw_views
from dq.networks.teacher import Teacher

SHARD_BYTES = 4 << 20  # several epochs of a small set share a file of about this size ...
MIN_SHARDS = 4  # ... if that leaves enough files to divide over processes and to resume by
VIEW_BYTES = {"order": 4, "box": 8, "flip": 1, "partner": 2}  # per image and epoch
BATCH_BYTES = 12  # per batch and epoch: kept and cut


@dataclass(frozen=True)
class EpochLabels:
    """Views and logits of one epoch."""

    plan: LabelPlan
    views: Views
    logits: Tensor  # (N, C) float32, by position in `views.order`

    def check(self, images: int, student: StudentConfig) -> None:
        """Check that the labels were made for this number of images and these settings.

        Partners, mixes and batch statistics depend on the batches.

        Raises:
            InputError: that names the first setting in which they differ.
        """
        p = self.plan
        required = {"images": images, **{k: getattr(student, k) for k in ("batch_size", "accumulate", "views")}}
        for name, value in required.items():
            if getattr(p, name) != value:
                raise InputError(
                    f"the labels were made with {name}={getattr(p, name)} but the student has {value}; "
                    "label the set for this student"
                )


LabelSource = Callable[[int], EpochLabels]  # epoch from 1 -> its labels


@settings
class LabelPlan(Checked):
    """All settings that decide the labels of a set."""

    images: Annotated[Whole, Field(description="images of the set (N)")]
    image_digest: Annotated[str, Field(description="digest of the images")]
    side: Annotated[Count, Field(description="side of the images in px")]
    classes: Annotated[Count, Field(description="number of classes")]
    teachers: Annotated[Many[str], Field(description="digests of the teachers")]
    epochs: Annotated[Whole, Field(description="label epochs; a longer training uses them again")]
    batch_size: Annotated[Count, Field(description="images of a batch")]
    accumulate: Annotated[Count, Field(description="parts of a batch, which batch statistics are taken over")]
    views: Annotated[ViewConfig, Field(description="views of the images")]
    relabel: Annotated[RelabelConfig, Field(description="how views are labeled and stored")]
    shard_epochs: Annotated[Count, Field(description="label epochs of a file")]

    @property
    def digest(self) -> str:
        """Return the name of the folder of the labels, which does not depend on their storage."""
        settings = to_dict(self)
        settings.pop("shard_epochs")
        settings["relabel"].pop("storage")
        settings["relabel"].pop("epochs")  # see `epochs`
        if self.relabel.statistics == "running":
            settings["relabel"].pop("dropout")
        if self.relabel.average == "logits":
            settings["relabel"].pop("average")  # older digests have no such key
        if self.views.shuffle > 1:
            settings["arrangement"] = "strips"  # older labels have patches in any order
        for name in ("rand_augment", "crop_pad"):  # older digests have no such key
            if not settings["views"][name]:
                settings["views"].pop(name)
        if not self.views.rand_augment:
            settings["views"].pop("rand_magnitude")
        return digest_of(settings)

    def shards(self) -> list[range]:
        """Return the label epochs of each file, counted from 0."""
        step = self.shard_epochs
        return [range(a, min(a + step, self.epochs)) for a in range(0, self.epochs, step)]

    def draw(self, epoch: int) -> Views:
        """Draw the views of label epoch `epoch`, counted from 0."""
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
    """Return the plan of the labels that `student` needs for images (N, 3, S, S).

    Raises:
        InputError: if there is no teacher, or the settings do not fit the number of classes.
    """
    digest = digest_of_tensors({"images": images})
    return plan_labels(len(images), images.shape[-1], teachers, classes, student, image_digest=digest)


def plan_labels(
    n: int, side: int, teachers: Sequence[Teacher], classes: int, student: StudentConfig, *, image_digest: str
) -> LabelPlan:
    """Return `make_plan` for `n` images of `side` px that need not exist yet."""
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
    """Return the size of the labels of `images` images over `epochs` label epochs.

    With the defaults the logits take images * epochs * classes * 2 bytes. Not counted: a header of some hundred bytes
    per file, and the manifest.
    """
    r, v = relabel or RelabelConfig(), views or ViewConfig()
    value = r.bits // 8
    row = classes * value if r.top_k is None else r.top_k * (value + (1 if classes <= 256 else 2))
    logits = epochs * (images * row + (8 if r.bits == 8 else 0))
    if r.views == "seed":
        view_bytes = 8 * epochs
    else:
        codes = (v.shuffle**2 if v.shuffle > 1 else 0) + v.rand_augment
        view_bytes = epochs * (images * (sum(VIEW_BYTES.values()) + codes) + -(-images // batch_size) * BATCH_BYTES)
    return LabelBytes(logits, view_bytes)


def plan_bytes(plan: LabelPlan) -> LabelBytes:
    """Return `label_bytes` of a plan."""
    return label_bytes(plan.images, plan.epochs, plan.classes, plan.relabel, plan.batch_size, plan.views)
