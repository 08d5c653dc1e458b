"""Speeds of the operations of a run, timed with its own models on a few batches.

Speeds measured on one machine can be kept in a file and used to plan for another data set, or for many processes.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dq.config.schema import RunConfig
from dq.config.students import StudentConfig
from dq.core.devices import reader_threads
from dq.core.errors import InputError
from dq.core.files import read_json, write_json
from dq.core.plain import PlainDict
from dq.core.seeds import derive_seed, generator
from dq.core.text import plural
from dq.run.planning.clock import Speed, random_pixels, timed
from dq.run.planning.costs import (
    StagePlan,
    agent_operation,
    cluster_operation,
    estimate_lines,
    refine_operation,
    select_operation,
    stage_plans,
)
from dq.run.planning.page import FIGURE, PICTURE, START, page_speeds, report_plan, start_plan
from dq.run.planning.refining import refining_speed
from dq.run.planning.sets import planned_sets

if TYPE_CHECKING:
    from dq.config.teachers import TeacherConfig
    from dq.data.source import ImageSource
    from dq.diffusion.generator import LatentGenerator
    from dq.networks.teacher import Teacher

log = logging.getLogger("dq")

STEPS = 2  # of the denoiser, in one trajectory
CLUSTER_NUMBERS = 8 << 20  # of a class's latents at most


@dataclass(frozen=True)
class Speeds:
    """Speeds by operation, and what they were measured on."""

    speeds: dict[str, Speed]
    facts: PlainDict
    unknown: tuple[str, ...] = ()  # why some are not there

    @property
    def seconds(self) -> dict[str, float]:
        return {name: s.seconds for name, s in self.speeds.items()}

    def save(self, path: Path) -> None:
        write_json(
            path, {**self.facts, "speeds": {k: dataclasses.asdict(s) for k, s in self.speeds.items()}}, checksum=False
        )

    @staticmethod
    def load(path: str | Path) -> Speeds:
        """Read a file that `--save_speeds` wrote.

        Raises:
            InputError: if it is not there or is none.
        """
        if not Path(path).is_file():
            raise InputError(f"there are no speeds in {path}; write the file with --dry-run --save_speeds {path}")
        facts = read_json(Path(path))
        try:
            speeds = {k: Speed(**v) for k, v in facts.pop("speeds").items()}
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is not a file of speeds; write one with --dry-run --save_speeds") from None
        return Speeds(speeds, facts)


def measure_speeds(
    config: RunConfig,
    source: ImageSource,
    pipe: LatentGenerator | None,
    device: torch.device,
    unknown: Sequence[str] = (),
    *,
    untrained: Sequence[TeacherConfig] = (),
    start_s: float | None = None,
) -> Speeds:
    """Time the operations of a run; those that cannot be timed are listed in `unknown`.

    Args:
        config: settings without `dtype: auto`.
        source: may hold counts alone (`dq.run.planning.plan.like_source`).
        pipe: the run's generator, or None if it is not available.
        device: where to run.
        unknown: reasons why operations cannot be timed.
        untrained: teachers that are trained before the run.
        start_s: seconds that this process spent on imports, images and models; None: not known.
    """
    facts: PlainDict = {
        "machine": f"{platform.machine()}, {platform.system()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "overlap": device.type != "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "classes": len(source.class_names),
        "resolution": config.codec.resolution,
        "image_size": config.image_size,
    }
    speeds = page_speeds(config.image_size, device)
    if start_s is not None:
        speeds[START] = Speed(start_s, start_s, start_s, 1)
    reasons = list(unknown)
    if not source.fingerprint.startswith("like "):
        speeds["read"] = _reading(config, source, device)
    else:
        reasons.append("images are not at hand, so neither reading nor teachers")
    if pipe is not None:
        from dq.diffusion.codec import latent_shape

        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        facts["latent"] = list(latent_shape(pipe.vae, config.codec.resolution))
        speeds |= dict(_codec(config, pipe, device))
        speeds |= dict(_generator(config, source, pipe, device, speeds["decode"], facts))
    if "latent" in facts:
        speeds |= dict(_clustering(config, source, facts["latent"], device))
    reasons += [f"selection, as its teacher {t.net} is trained first" for t in untrained]
    try:
        speeds |= dict(_teachers(config, source, device, pipe, untrained))
    except InputError as e:
        reasons.append(f"teachers: {e}")
    speeds |= dict(_students(config, source, device))
    speeds |= dict(_agents(config, source, device))
    return Speeds(speeds, facts, tuple(reasons))


# --- one operation each -------------------------------------------------------------------------------------------


def _reading(config: RunConfig, source: ImageSource, device: torch.device) -> Speed:
    from dq.data.images import read_images

    rows = torch.randperm(len(source.train), generator=generator("speeds")).tolist()  # far apart, not read lately
    threads = reader_threads(device)  # as while encoding

    def work(size: int) -> None:
        batch_rows = [rows.pop() if len(rows) > size else rows[0] for _ in range(size)]
        read_images(
            source.train, batch_rows, config.codec.resolution, source.preprocess, on_bad="skip", threads=threads
        )

    return timed(work, 256, device=device)


def _points(size: int, shape: Sequence[int]) -> torch.Tensor:
    return torch.randn(size, *shape, generator=generator("speeds", size))


def _codec(config: RunConfig, pipe: LatentGenerator, device: torch.device) -> Iterator[tuple[str, Speed]]:
    from dq.diffusion.codec import decode_latents, encode_latents, latent_shape, to_signed, to_unit

    shape = latent_shape(pipe.vae, config.codec.resolution)

    @torch.inference_mode()
    def encode(images: torch.Tensor) -> None:
        encode_latents(pipe.vae, to_signed(images)).half().cpu()

    @torch.inference_mode()
    def decode(z: torch.Tensor) -> None:
        to_unit(decode_latents(pipe.vae, z), config.image_size).cpu()

    pixels = functools.partial(random_pixels, side=config.codec.resolution)
    yield "encode", timed(encode, config.codec.batch_size, device=device, prepare=pixels)
    points = functools.partial(_points, shape=shape)
    yield "decode", timed(decode, config.generate.batch_size, device=device, prepare=points)


def _generator(
    config: RunConfig,
    source: ImageSource,
    pipe: LatentGenerator,
    device: torch.device,
    decode: Speed,
    facts: PlainDict,
) -> Iterator[tuple[str, Speed]]:
    """Time a step of the denoiser with guidance, without decoding."""
    cfg = config.generate
    start = pipe.start(cfg)
    if start is None:  # decode
        return
    facts["denoiser_steps"] = start.calls
    facts["generate"] = _walk_settings(config)
    short = dataclasses.replace(cfg, snr=None, strength=min(1.0, (STEPS + 0.5) / cfg.num_inference_steps))
    short_start = pipe.start(short)
    assert short_start is not None
    calls = short_start.calls
    ids = None
    if cfg.mode == "dit":
        ids = [0] * len(source.class_names)  # the class does not matter to the clock
    shape = facts["latent"]

    def work(z: torch.Tensor) -> None:
        pipe.synthesize(
            z,
            [0] * len(z),
            [generator("speeds", i) for i in range(len(z))],
            short,
            class_names=source.class_names,
            condition_ids=ids,
            image_size=config.image_size,
        )

    denoising = timed(work, cfg.batch_size, device=device, prepare=functools.partial(_points, shape=shape))
    middle, least, most = (
        max(0.0, s - decode.seconds) / calls for s in (denoising.seconds, denoising.least, denoising.most)
    )
    yield "denoise", Speed(middle, least, most, denoising.batch)


def _walk_settings(config: RunConfig) -> PlainDict:
    """What decides how many steps are denoiser_steps."""
    g = config.generate
    return {k: getattr(g, k) for k in ("mode", "num_inference_steps", "snr", "strength", "scheduler", "noise")}


def _clustering(
    config: RunConfig, source: ImageSource, shape: Sequence[int], device: torch.device
) -> Iterator[tuple[str, Speed]]:
    """Time the clustering of Gaussian points for every ipc and engine.

    They are as many as images in the largest class, or as memory allows, and on an accelerator of as many classes at
    once as a run clusters.
    """
    from dq.cluster.engines import choose_engine
    from dq.cluster.kmeans import kmeans_many, quantization_stats
    from dq.cluster.prototypes import latent_stats, make_prototypes
    from dq.run.stages.cluster import group_budget, groups

    width = shape[0] * shape[1] * shape[2]
    n = int(min(source.class_counts().max(), max(256, CLUSTER_NUMBERS // width)))
    z = torch.randn(n, *shape, generator=generator("speeds")).to(device)
    done = set()
    for s in planned_sets(config, source):
        name, cfg = cluster_operation(s.cluster, s.prototypes), s.cluster
        if name in done or cfg.space != "latents":
            continue
        done.add(name)
        k = min(s.prototypes, n)
        budget = group_budget(device) if choose_engine(cfg.engine) == "torch" else 0
        together = len(next(groups([(c, n) for c in range(len(source.class_names))], width, budget)))

        def work(classes: int, cfg: Any = cfg, k: int = k) -> None:
            seeds, names = [derive_seed("speeds", n, c) for c in range(classes)], ["class"] * classes
            x = z.flatten(1)
            for result in kmeans_many([x] * classes, k, config=cfg, seeds=seeds, names=names):
                quantization_stats(x, result, with_uniform=cfg.uniform_w2)
                p = make_prototypes(0, "class", z, torch.arange(n), result)
                latent_stats(z, result.labels, p.centroids)

        t = timed(work, together, smallest=min(2, together), device=device)
        yield name, Speed(t.seconds / n, t.least / n, t.most / n, n * t.batch)


def _teachers(
    config: RunConfig,
    source: ImageSource,
    device: torch.device,
    pipe: LatentGenerator | None,
    untrained: Sequence[TeacherConfig],
) -> Iterator[tuple[str, Speed]]:
    """The forward pass of all teachers, and a step of every stage of refinement."""
    from dq.diffusion.image_codec import ImageCodec
    from dq.networks.teacher import pooled_logits
    from dq.networks.teacher_check import naming
    from dq.networks.teacher_loading import load_teachers
    from dq.refine.registry import method_of
    from dq.run.refinement import requested_settings, stages_of
    from dq.run.stages.select import select_setting

    checked = functools.partial(load_teachers, image_size=config.image_size, device=device)
    side = config.image_size
    real = not source.fingerprint.startswith("like ")

    def label_speed(teachers: Sequence[Teacher]) -> Speed:
        def label(images: torch.Tensor) -> None:
            pooled_logits(teachers, images)

        batch = max(t.batch_size for t in teachers)
        return timed(label, batch, device=device, prepare=functools.partial(random_pixels, side=side))

    if config.teachers and real:
        yield "teacher", label_speed(checked(config.teachers, source))
    done = set()
    for s in planned_sets(config, source) if real else ():
        settings, name = s.generate.select_teacher, select_operation(s.generate)
        if settings is not None and settings not in untrained and s.draws > s.images and name not in done:
            done.add(name)
            with naming(select_setting(config, s.method)):
                teachers = checked([settings], source)
            yield name, label_speed(teachers)
    for method in config.methods if real else ():
        for stage, requested in zip(stages_of(config, method), requested_settings(config, method), strict=True):
            name = refine_operation(requested)
            if name in done:
                continue
            done.add(name)
            codec = None
            if method_of(stage).needs(stage).codec:
                if pipe is None:
                    continue
                codec = ImageCodec.of(pipe.vae, config.codec.resolution, side, device)
            teachers = checked(stage.teachers or config.teachers, source)
            classes = len(source.class_names)
            images = classes * max(config.ipc)
            yield name, refining_speed(stage, teachers, classes, side, device, images=images, codec=codec)


def _students(config: RunConfig, source: ImageSource, device: torch.device) -> Iterator[tuple[str, Speed]]:
    """An image forward and backward, and an image tested, for every student."""
    from dq.evaluation.trainings import students_of

    side, classes = config.image_size, len(source.class_names)
    students = students_of(config.evaluate, [str(max(config.ipc))], classes, side, config.teachers)
    for (j, _), s in students.items():
        yield from _training(f"student {j}", s, config, source, device, test=f"test {j}")


def _training(
    name: str,
    settings: StudentConfig,
    config: RunConfig,
    source: ImageSource,
    device: torch.device,
    *,
    test: str | None = None,
) -> Iterator[tuple[str, Speed]]:
    """An image forward and backward as `name`, and an image tested as `test` (None: "test NAME")."""
    from dq.networks.training import TrainingSet, accuracy, fit, normalizer
    from dq.networks.zoo import make_net

    side, classes = config.image_size, len(source.class_names)
    pixels = normalizer((0.5,) * 3, (0.25,) * 3)
    # views, augmentation and optimizer as they are; where the labels come from is counted apart
    short: StudentConfig = dataclasses.replace(settings, labels="hard", epochs=1, tests=1, whiten=False)
    net = make_net(settings.net, classes, side, norm=settings.norm, seed=0).to(device)

    def train(x: torch.Tensor) -> float:
        y = (torch.arange(len(x)) % classes).to(device)
        return fit(TrainingSet(x.to(device), y, classes, pixels), short, seed=0).seconds

    def score(x: torch.Tensor) -> None:
        accuracy(net, x, torch.zeros(len(x), dtype=torch.int64), pixels=pixels, dtype=settings.dtype)

    images = functools.partial(random_pixels, side=side)
    yield name, timed(train, settings.batch_size, smallest=2 * settings.accumulate, device=device, prepare=images)
    yield test or f"test {name}", timed(score, 200, device=device, prepare=images)


def _agents(config: RunConfig, source: ImageSource, device: torch.device) -> Iterator[tuple[str, Speed]]:
    """An image forward and backward, and an image scored, for every agent of difficulty scores."""
    from dq.networks.difficulty import difficulty_recipe
    from dq.run.stages.prune import scored_settings

    for p in scored_settings(config):
        yield from _training(agent_operation(p), difficulty_recipe(p), config, source, device)


# --- for the command line -----------------------------------------------------------------------------------------


def plan_with_speeds(config: RunConfig, source: ImageSource, speeds: Speeds, *, processes: int) -> str:
    """The plan of a run, with seconds and bytes for every stage.

    Args:
        config: settings without `dtype: auto`.
        source: the images, or counts alone.
        speeds: of this machine, or read from a file.
        processes: number of processes to plan for.
    """
    from dq.core.text import format_bytes
    from dq.run.planning.plan import plan

    plans = planned_stages(config, source, speeds, processes)
    lines = [plan(config, source)]
    lines += estimate_lines(plans, speeds.seconds, overlap=bool(speeds.facts.get("overlap")), processes=processes)
    lines.append(f"  measured on {speeds.facts.get('device')}, {plural(speeds.facts.get('threads', 0), 'CPU thread')}")
    lines += [f"  not timed: {reason}" for reason in speeds.unknown]
    for folder, need in _needs(config, plans).items():
        free = shutil.disk_usage(folder).free
        if need > free:
            lines.append(f"shortage    {folder} has {format_bytes(free)} free but {format_bytes(need)} are needed")
    return "\n".join(lines)


def planned_stages(config: RunConfig, source: ImageSource, speeds: Speeds, processes: int) -> list[StagePlan]:
    """`stage_plans` with what the speeds know of the shape of latents and of the trajectory."""
    facts = speeds.facts
    latent, denoiser_steps = facts.get("latent"), None
    if latent is not None and facts.get("resolution") != config.codec.resolution:
        side = latent[1] * config.codec.resolution // facts["resolution"]
        latent = [latent[0], side, side]
    if facts.get("generate") == _walk_settings(config):
        denoiser_steps = facts.get("denoiser_steps")
    shape = tuple(latent) if latent else None
    plans = stage_plans(config, source, latent=shape, denoiser_steps=denoiser_steps, processes=processes)
    if START in speeds.speeds:
        plans.insert(0, start_plan())
    if {FIGURE, PICTURE, "read"} <= speeds.speeds.keys():  # files of earlier versions lack some
        plans.append(report_plan(config, planned_sets(config, source), len(source.class_names)))
    return plans


def _needs(config: RunConfig, plans: Sequence[Any]) -> dict[Path, float]:
    """Bytes that the run will put on each disk, by a folder on it."""
    from dq.core.files import existing

    needs: dict[int, tuple[Path, float]] = {}
    for p in plans:
        folder = existing(Path(config.cache_dir if p.stage == "encode" else config.output_dir))
        disk = folder.stat().st_dev
        needs[disk] = (needs.get(disk, (folder, 0.0))[0], needs.get(disk, (folder, 0.0))[1] + (p.bytes or 0))
    return dict(needs.values())
