"""What `--dry-run` prints: classes, units, disk and model calls, known before anything is done."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dq.config.schema import RunConfig
from dq.config.students import StudentConfig
from dq.core.errors import InputError
from dq.core.text import plural

if TYPE_CHECKING:
    from dq.data.source import ImageSource

STATISTICS = 2048  # images at most over which `train-codec` normalizes latents
# Classes, train and test images of sets that one may plan for without having them. Real classes differ a little in
# size; here all images are spread evenly. ImageNet-21K: the release of autumn 2011, which has no test split.
LIKE = {
    "cifar10": (10, 50_000, 10_000),
    "imagenet-1k": (1000, 1_281_167, 50_000),
    "imagenet-21k": (21_841, 14_197_122, 0),
}


def like_source(text: str) -> Any:
    """A source that has the counts of a known set, or of CLASSESxIMAGES, and no image.

    Raises:
        InputError: if `text` is neither.
    """
    import numpy as np

    from dq.data.source import ImageSource, Split

    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if text in LIKE:
        classes, train, test = LIKE[text]
    elif match and min(map(int, match.groups())) > 0:
        classes, per_class = map(int, match.groups())
        train, test = classes * per_class, 0
    else:
        raise InputError(f"--like takes {', '.join(LIKE)} or CLASSESxIMAGES such as 100x500, not {text!r}")

    def unreadable(row: int) -> Any:
        raise InputError(f"--like {text} stands for images that are not here; leave it out to read any")

    def split(name: str, images: int) -> Split:
        return Split(np.sort(np.arange(images) % classes), unreadable, name)

    splits = {"train": split("train", train)} | ({"test": split("test", test)} if test else {})
    names = tuple(f"class {i}" for i in range(classes))
    return ImageSource(splits, names, f"like {text}", f"like {text}", "train", "test" if test else None)


def plan(config: RunConfig, source: ImageSource) -> str:
    """What a run would do: classes, units, disk, model calls."""
    from dq.core.processes import cut
    from dq.data.image_cache import MAX_IMAGES, MIN_IMAGES
    from dq.run.planning.sets import planned_sets

    counts = source.class_counts()
    n, classes = int(counts.sum()), len(counts)
    n_units = len(cut(n, smallest=MIN_IMAGES, largest=MAX_IMAGES))
    sets = planned_sets(config, source)
    lines = [
        f"source      {source.origin}: {plural(n, 'train image')}, {plural(classes, 'class')} of {counts.min()} to "
        f"{counts.max()}, test split {source.test_name or 'missing'}",
        f"encode      {plural(n, 'image')} at {config.codec.resolution} px, in {plural(n_units, 'unit')}",
    ]
    lines += _plan_pruning(config, counts)
    denoiser_steps = 0
    if config.generate.mode != "decode":
        g = config.generate
        share = f"strength {g.strength}" if g.strength is not None else f"SNR {g.snr}"
        lines.append(f"generate    {g.mode}, {plural(g.num_inference_steps, 'nominal step')} from {share}")
        denoiser_steps = g.num_inference_steps
    pixels = config.image_size**2 * 3
    for ipc in config.ipc:
        prototypes = int(counts.clip(max=config.cluster.prototypes(ipc)).sum())
        fixed = config.cluster.prototypes_per_class is not None  # small classes have ipc images, too
        short = [] if fixed else [source.class_names[c] for c in range(classes) if counts[c] < ipc]
        images = sum(s.images for s in sets if s.ipc == ipc)
        draws = sum(s.draws for s in sets if s.ipc == ipc)
        lines.append(
            f"ipc {ipc:<7d} {plural(prototypes, 'prototype')}, {plural(len(config.methods), 'method')} "
            f"({', '.join(config.methods)}), {plural(images, 'image')}, "
            + (f"chosen from {draws} draws, " if draws > images else "")
            + f"{images * pixels / 1e6:.1f} MB of pixels, up to {plural(draws * denoiser_steps, 'denoiser call')}"
            + (f"; fewer than {ipc} images in {', '.join(map(str, short[:5]))}" if short else "")
        )
    sizes = {(s.method, str(s.ipc)): s.images for s in sets}
    lines += _plan_refinement(config, sizes, counts.tolist())
    lines += plan_evaluation(config, counts, sizes, side=config.image_size)
    lines.append(f"writes to   {config.output_dir}, latents in {config.cache_dir}")
    return "\n".join(lines)


def _plan_pruning(config: RunConfig, counts: Any) -> list[str]:
    """Runs of agents, and how many images each policy keeps."""
    from dq.config.methods import resolved_method
    from dq.run.stages.prune import pruned_counts, scored_settings

    lines = [
        f"prune       {plural(p.runs, 'run')} of {p.net}, {plural(p.trained_epochs, 'epoch')} each, unless the "
        "scores are in the cache"
        for p in scored_settings(config)
    ]
    for ipc, name, sizes in pruned_counts(config, counts):
        if name.startswith("method "):
            p = resolved_method(config, name.removeprefix("method ")).prune
            lines.append(
                f"prune       {name} ipc {ipc}: {p.policy} ({p.where}) keeps {sum(sizes)} of {counts.sum()} images"
            )
    return lines


def _plan_refinement(config: RunConfig, sizes: dict[tuple[str, str], int], counts: list[int]) -> list[str]:
    """Batches and steps of the stages of refinement; equal ones count once."""
    from dq.run.refinement import planned, requested_settings

    lines_of: dict[str, str] = {}
    for (method, ipc), images in sizes.items():
        chain = requested_settings(config, method)
        for level, stage in enumerate(planned(config, method, counts)):
            key = repr((ipc, config.methods[method].representative, chain[: level + 1]))
            steps, batches = stage.steps, stage.batches(images)
            lines_of.setdefault(
                key,
                f"refine      {method} ipc {ipc}: {stage.name}, {plural(images, 'image')} in "
                f"{plural(batches, 'batch')}, {plural(steps, 'step')}, {images * steps} image steps forward and "
                "backward"
                + (f"; {plural(stage.checks, 'training')} for checks, not in the time" * (stage.checks > 0)),
            )
    return list(lines_of.values())


@dataclass(frozen=True)
class Trainings:
    """The trainings of one student on one set or baseline."""

    number: int  # of the set or baseline
    ipc: str  # or "full"
    images: int
    student: int
    config: StudentConfig
    seeds: int
    copies: int  # selections: a random subset has one for every seed

    def stored_labels(self, classes: int) -> StoredLabels | None:
        """Labels of views that these trainings store; None if they are computed when needed."""
        from dq.labels.plan import label_bytes

        s = self.config
        if s.labels != "soft" or s.relabel.storage != "shards" or self.ipc == "full":
            return None
        epochs = min(s.relabel.epochs or s.epochs, s.epochs)
        size = self.copies * label_bytes(self.images, epochs, classes, s.relabel, s.batch_size, s.views).total
        seen = (s.batch_size, s.accumulate, s.views, s.relabel)
        return StoredLabels(self.number, size, self.images * epochs * self.copies, seen)


class StoredLabels(NamedTuple):
    """Equal for students that see the same views of the same set, which share their labels."""

    number: int
    bytes: int
    views: int
    seen: tuple[Any, ...]


def trainings(
    config: RunConfig, counts: Any, sets: dict[tuple[str, str], int], more: Sequence[int] = ()
) -> Iterator[Trainings]:
    """All trainings of an evaluation.

    Those on slices, for redundancy, have negative numbers; those on the full data come last.

    Args:
        config: of the run; its students, seeds and baselines are counted.
        counts: train images of every class.
        sets: number of images by name and ipc.
        more: ipc of baselines beside those of the sets.
    """
    from dq.evaluation.redundancy import slice_size
    from dq.evaluation.trainings import students_of

    e = config.evaluate
    ipcs = sorted({*more, *(int(i) for _, i in sets)})
    keys = [str(i) for i in ipcs] + ["full"] * ("full" in e.baselines)
    students = students_of(e, keys, len(counts), config.image_size, config.teachers)
    entries = [(ipc, n, 1) for (_, ipc), n in sets.items()]
    for largest in ipcs:
        for name in e.baselines:
            if name != "full":
                # a random subset of its own for every seed
                entries.append((str(largest), int(counts.clip(max=largest).sum()), e.seeds if name == "random" else 1))
    for number, (ipc, n, copies) in enumerate(entries):
        for (j, key), s in students.items():
            if key == ipc:
                yield Trainings(number, ipc, n, j, s, e.seeds, copies)
                size = slice_size(int(ipc)) * e.redundancy
                if size:
                    images = int(counts.clip(max=size).sum())
                    once = dataclasses.replace(s, tests=1)
                    yield Trainings(-1 - number, ipc, images, j, once, e.seeds, copies)
    for (j, key), s in students.items():
        if key == "full":
            yield Trainings(len(entries), key, int(counts.sum()), j, s, e.full_seeds, 1)


def plan_evaluation(
    config: RunConfig, counts: Any, sets: dict[tuple[str, str], int], more: Sequence[int] = (), *, side: int
) -> list[str]:
    """Trainings of sets and baselines, and bytes of the labels that they store.

    Args:
        config: of the run; its students, seeds and baselines are counted.
        counts: train images of every class.
        sets: number of images by name and ipc.
        more: ipc of baselines beside those of the sets.
        side: of the images that students see, in px.
    """
    from dq.core.text import format_bytes

    stored = set()
    number = full = 0
    for t in trainings(config, counts, sets, more):
        if t.ipc == "full":
            full += t.seeds
            continue
        number += t.seeds
        stored.add(t.stored_labels(len(counts)))
    lines = [f"evaluate    {plural(number, 'training')} at {side} px, and {full} on the full data"]
    total = sum(entry.bytes for entry in stored if entry is not None)
    return lines + [f"labels      {format_bytes(total)} of soft labels of views"] * (total > 0)


def plan_prior_report(config: RunConfig, source: ImageSource) -> str:
    """What `prior-report` would do."""
    from dq.diffusion.prior.quality import sample_counts

    r = config.prior_report
    images = int(sample_counts(source, r.per_class).sum())
    calls = images * r.num_inference_steps * len(r.guidance)
    return (
        f"samples     {plural(images, 'image')} from pure noise at each of "
        f"{plural(len(r.guidance), 'guidance scale')}, {plural(r.num_inference_steps, 'step')}, "
        f"{plural(calls, 'denoiser call')}\n"
        f"writes to   {config.output_dir}, features in {config.cache_dir}"
    )


def plan_training(verb: str, config: RunConfig, source: ImageSource) -> str:
    """What a verb that trains a prior, teachers, a pool or experts would do."""
    n, classes, prior = len(source.train), len(source.class_names), config.prior
    lines = [f"source      {source.origin}: {plural(n, 'train image')}, {plural(classes, 'class')}"]
    if verb in ("train-codec", "train-denoiser"):
        c, d = prior.codec, prior.denoiser
        side, folder = config.codec.resolution, prior.output_dir
        if verb == "train-denoiser":
            lines.append(f"encode      {n} images at {side} px, into {config.cache_dir}")
            lines.append(
                f"train       a DiT, {plural(d.steps, 'step')} of {d.batch_size} latents, from {d.init or 'scratch'}"
            )
        elif c.steps:
            lines.append(
                f"train       an autoencoder at {side} px, {plural(c.steps, 'step')} of {c.batch_size} images"
            )
        else:
            lines.append(
                f"normalize   the latents of {c.init} by channel, over {min(n, STATISTICS)} images at {side} px"
            )
        return "\n".join([*lines, f"writes to   {folder}"])
    t = config.train_teachers
    if verb == "train-pool":
        from dq.networks.train_pool import pool_text

        return "\n".join([*lines, f"train       {pool_text(config)}", f"writes to   {config.train_pool.output_dir}"])
    if verb == "train-experts":
        from dq.networks.train_experts import experts_text

        folder = config.train_experts.output_dir
        return "\n".join([*lines, f"train       {experts_text(config, source)}", f"writes to   {folder}"])
    lines.append(f"train       {', '.join(t.nets)}, {plural(t.epochs, 'epoch')} each, at {config.image_size} px")
    return "\n".join([*lines, f"writes to   {t.output_dir}"])
