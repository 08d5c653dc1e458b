"""What `--dry-run` prints: classes, units, disk and model calls, known before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dq.config import RunConfig


def plan(config: RunConfig, source: Any) -> str:
    """What a run would do: classes, units, disk, model calls."""
    counts = source.class_counts()
    n, classes = int(counts.sum()), len(counts)
    copies = config.generate.images_per_prototype if config.generate.mode != "decode" else 1
    lines = [
        f"source      {source.origin}: {n} train images, {classes} classes of {counts.min()} to {counts.max()}, "
        f"test split {source.test_name or 'missing'}",
        f"encode      {n} images at {config.codec.resolution} px, one shard per class ({classes} units)",
    ]
    walked = 0
    if config.generate.mode != "decode":
        g = config.generate
        share = f"strength {g.strength}" if g.strength is not None else f"SNR {g.snr}"
        lines.append(f"generate    {g.mode}, {g.num_inference_steps} nominal steps from {share}")
        walked = g.num_inference_steps
    pixels = config.image_size**2 * 3
    for ipc in config.ipc:
        prototypes = int(counts.clip(max=ipc).sum())
        short = [source.class_names[c] for c in range(classes) if counts[c] < ipc]
        images = prototypes * copies
        lines.append(
            f"ipc {ipc:<7d} {prototypes} prototypes, {len(config.methods)} methods "
            f"({', '.join(config.methods)}), {images * len(config.methods)} images, "
            f"{images * pixels * len(config.methods) / 1e6:.1f} MB of pixels, "
            f"up to {images * walked * len(config.methods)} denoiser calls"
            + (f"; fewer than {ipc} images in {', '.join(map(str, short[:5]))}" if short else "")
        )
    sizes = {(m, str(ipc)): int(counts.clip(max=ipc).sum()) * copies for ipc in config.ipc for m in config.methods}
    lines += _plan_refinement(config, sizes, counts.tolist())
    lines += plan_evaluation(config, counts, sizes)
    lines.append(f"writes to   {config.output_dir}, latents in {config.cache_dir}")
    return "\n".join(lines)


def _plan_refinement(config: RunConfig, sizes: dict[tuple[str, str], int], counts: list[int]) -> list[str]:
    """Batches and image steps of the stages behind the generator; equal ones of several methods count once."""
    from dq.refine.chain import asked_settings, planned

    found: dict[str, str] = {}
    for (method, ipc), images in sizes.items():
        chain = asked_settings(config, method)
        for level, stage in enumerate(planned(config, method, counts)):
            key = repr((ipc, config.methods[method].representative, chain[: level + 1]))
            steps, batches = sum(stage.steps), -(-images // stage.batch_size)
            found.setdefault(
                key,
                f"refine      {method} ipc {ipc}: {stage.name}, {images} images in {batches} batches, {steps} steps, "
                f"{images * steps} image steps forward and backward",
            )
    return list(found.values())


def plan_evaluation(
    config: RunConfig, counts: Any, sets: dict[tuple[str, str], int], more: Sequence[int] = ()
) -> list[str]:
    """Trainings of sets and of their baselines, and the bytes of the labels that they would store.

    Args:
        sets: number of images by name and ipc.
        more: ipc of baselines beside those of the sets.
    """
    from dq.evaluation.trainings import format_bytes, students_of
    from dq.labels import label_bytes

    e = config.evaluate
    ipcs = sorted({*more, *(int(i) for _, i in sets)})
    students = students_of(e, [str(i) for i in ipcs], len(counts), config.image_size)
    entries = [(ipc, n, 1) for (_, ipc), n in sets.items()]
    for largest in ipcs:
        for name in e.baselines:
            if name != "full":
                # a random subset of its own for every seed
                entries.append((str(largest), int(counts.clip(max=largest).sum()), e.seeds if name == "random" else 1))
    stored = set()
    for number, (ipc, n, copies) in enumerate(entries):
        for (_, key), s in students.items():
            if key == ipc and s.labels == "soft" and s.relabel.storage == "shards":
                epochs = min(s.relabel.epochs or s.epochs, s.epochs)
                size = copies * label_bytes(n, epochs, len(counts), s.relabel, s.batch_size, s.views).total
                # students that see the same views share their labels
                stored.add((number, size, s.batch_size, s.accumulate, s.views, s.relabel, epochs))
    full = len(e.students) * e.full_seeds if "full" in e.baselines else 0
    lines = [f"evaluate    {len(entries) * len(e.students) * e.seeds} trainings, and {full} on the full data"]
    total = sum(entry[1] for entry in stored)
    return lines + [f"labels      {format_bytes(total)} of soft labels of views"] * (total > 0)


def plan_prior_report(config: RunConfig, source: Any) -> str:
    """What `prior-report` would do."""
    from dq.prior.quality import sample_counts

    r = config.prior_report
    images = int(sample_counts(source, r.per_class).sum())
    calls = images * r.num_inference_steps * len(r.guidance)
    return (
        f"samples     {images} from pure noise at each of {len(r.guidance)} guidance scales, {r.num_inference_steps} "
        f"steps, {calls} denoiser calls\nwrites to   {config.output_dir}, features in {config.cache_dir}"
    )
