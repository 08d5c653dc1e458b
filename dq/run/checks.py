"""Checks of a run before its first unit of work.

A dry run goes through the same checks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq.config.dtypes import device_dtypes, resolve_dtypes
from dq.config.methods import check_guidance, check_methods, check_model, resolved_method
from dq.config.schema import RunConfig
from dq.config.teachers import TeacherConfig
from dq.core.model_files import open_model
from dq.core.text import plural
from dq.data.source import ImageSource
from dq.networks.teacher_check import TEACHERS, naming
from dq.networks.teacher_loading import POOL, PRETRAINED, check_fetched, load_teacher, teacher_file
from dq.refine.registry import method_of
from dq.run.folder import check_folder, settle_dtypes
from dq.run.refinement import check_codec_path, experts_of, needs_codec, planned, setting_of, stages_of
from dq.run.stages.evaluate import check_evaluation
from dq.run.stages.prune import check_pruning
from dq.run.stages.select import select_setting, selecting_teacher

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dq.diffusion.generator import LatentGenerator

log = logging.getLogger("dq")

ENCODES = ("run", "encode", "generate")  # verbs that load the generator
CLUSTERS = ("run", "encode", "prune", "cluster", "generate")  # verbs that cluster, or whose images are clustered
LABELS = ("run", "label", "evaluate")
REFINES = ("run", "generate", "refine")
DRAWS = ("run", "generate")


def check_run(
    config: RunConfig,
    source: ImageSource,
    verb: str = "run",
    *,
    accelerator: Accelerator,
    fetch: bool = True,
    untrained: Sequence[TeacherConfig] = (),
) -> tuple[LatentGenerator | None, list[str]]:
    """Check a run, or one of its stages, before its first image is encoded.

    Args:
        config: of the run, as resolved from file and options.
        source: the images.
        verb: the stage, or "run" for all.
        accelerator: processes and device.
        fetch: whether models of the Hub that are not in its cache may be downloaded; if not they are only looked up,
            and what their files would say is not checked.
        untrained: teachers that the verb trains first, whose files are not there yet.

    Returns:
        The generator, if the verb needs one and it is here; and why it is not.

    Raises:
        InputError: for whatever would stop the run at one of its stages.
        RunError: see `dq.core.errors`.
    """
    check_methods(config)
    config = settle_dtypes(config, source, accelerator)[0]
    check_settings(config, source, verb, untrained)
    if verb in LABELS:
        check_evaluation(config, source)
    if verb == "refine":
        check_codec_path(config)
    if verb not in ENCODES:
        return None, []
    check_model(config)
    pipe, reasons = open_generator(config, fetch=fetch)
    if pipe is not None:
        check_generation(config, source, pipe)
    return pipe, reasons


def check_settings(config: RunConfig, source: ImageSource, verb: str, untrained: Sequence[TeacherConfig] = ()) -> None:
    """Check methods, run folder, stages of refinement and teachers.

    Raises:
        InputError: see `check_run`.
    """
    check_methods(config)
    check_guidance(config)
    check_folder(config, source)
    if verb in CLUSTERS:
        check_counts(config, source)
        check_pruning(config, source, always=verb == "prune")
    if verb in REFINES:
        for method in config.methods:
            planned(config, method, source.class_counts().tolist())
            for stage in stages_of(config, method):
                experts_of(source, config.image_size, method_of(stage).needs(stage))
    for teacher, setting in _teachers_of(config, verb).items():
        if teacher in untrained:
            continue
        check_teachers([teacher], len(source.class_names), config.image_size, setting)
    if verb in DRAWS and not untrained:
        warn_of_selectors(config, len(source.class_names))


def warn_of_selectors(config: RunConfig, classes: int) -> None:
    """Warn where a teacher that selects among candidates also labels.

    Students learn its labels, and gain by its mistakes (see `docs/how-to/draw-and-select.md`).
    """
    local = [t for t in config.teachers if t.net not in (POOL, "transformers") and t.path != PRETRAINED]
    labeling: set[str] = set()
    for method in config.methods:
        selecting = _selects(config, method)
        if selecting is None or not local:
            continue
        labeling = labeling or {load_teacher(t, classes, config.image_size).digest for t in local}
        if selecting.path != PRETRAINED and load_teacher(selecting, classes, config.image_size).digest in labeling:
            log.warning(
                "generate.select_teacher of method %r is one of the teachers that label, so that its own mistakes "
                "decide which images are kept; name a teacher of another training",
                method,
            )


def _selects(config: RunConfig, method: str) -> TeacherConfig | None:
    resolved = resolved_method(config, method)
    return selecting_teacher(resolved.method, resolved.generate)


def check_counts(config: RunConfig, source: ImageSource) -> None:
    """Whether classes have as many images as prototypes are asked for, where fewer are refused (`on_small=raise`).

    That images come twice or cannot be read is only known when they are.

    Raises:
        InputError: for the first class that is too small.
    """
    from dq.cluster.inputs import too_small

    for method in config.methods:
        cluster = resolved_method(config, method).cluster
        ipc = cluster.prototypes(max(config.ipc))
        small = (source.class_counts() < ipc).nonzero()[0].tolist() if cluster.on_small == "raise" else []
        if small:
            name, images = source.class_names[small[0]], int(source.class_counts()[small[0]])
            is_overridden = cluster.on_small != config.cluster.on_small
            setting = f"methods.{method}.override.cluster.on_small" if is_overridden else "cluster.on_small"
            raise too_small(f"class {small[0]} {name!r} has {plural(images, 'image')} but ipc={ipc}", setting)


def check_generation(config: RunConfig, source: ImageSource, pipe: LatentGenerator) -> None:
    """Whether this generator can encode and draw the classes of the source for every method.

    Raises:
        InputError: for a codec, a scheduler, a start, a size of latents or a class that does not fit.
    """
    from dq.diffusion.codec import latent_shape
    from dq.diffusion.image_codec import check_image_codec

    if needs_codec(config):
        check_image_codec(pipe.vae)
    latent_shape(pipe.vae, config.codec.resolution)
    for method in config.methods:
        resolved = resolved_method(config, method)
        if resolved.method.representative != "real":  # these need no generator
            pipe.check_inputs(resolved.generate, config.codec.resolution, source.class_names)


def open_generator(config: RunConfig, *, fetch: bool) -> tuple[LatentGenerator | None, list[str]]:
    """Open the generator; None with the reasons if it may not be downloaded.

    Raises:
        InputError: if no codec is named, or there is no such model.
    """
    from dq.diffusion.generator import LatentGenerator

    if not fetch and config.codec.path:
        named = [(config.codec.path, config.codec.revision), (config.generate.model, config.generate.revision)]
        opened = [open_model(path, revision=revision) for path, revision in named if path is not None]
        absent = [f.path for f in opened if not (f.local or f.cached)]
        if absent:
            return None, [f"{path} is not a folder here, and nothing is fetched for a plan" for path in absent]
    return LatentGenerator.from_settings(config.codec, config.generate), []


def check_teachers(teachers: Iterable[TeacherConfig], classes: int, image_size: int, setting: str = TEACHERS) -> None:
    """Check that teachers load and have as many outputs as the data has classes.

    Published ones are not downloaded for that.

    Args:
        teachers: the teachers.
        classes: number of classes.
        image_size: side of the images in px.
        setting: where they stand, for messages.

    Raises:
        InputError: for a file that is not there, weights of another network, or other classes.
    """
    for t in dict.fromkeys(teachers):
        with naming(setting):
            _check_teacher(t, classes, image_size)


def _check_teacher(t: TeacherConfig, classes: int, image_size: int) -> None:
    teacher_file(t)
    fetched = t.path == PRETRAINED
    if t.net == "transformers":
        model = open_model(t.path)
        fetched = not (model.local or model.cached)
    if fetched:
        check_fetched(t, classes)
    elif t.net != POOL:
        load_teacher(t, classes, image_size)


def _teachers_of(config: RunConfig, verb: str) -> dict[TeacherConfig, str]:
    """Teachers that a stage loads, each with the first setting that names it."""
    used = dict.fromkeys(config.teachers, TEACHERS)
    for method in config.methods:
        selecting = _selects(config, method) if verb in DRAWS else None
        if selecting is not None:
            used.setdefault(selecting, select_setting(config, method))
        for level, stage in enumerate(stages_of(config, method) if verb in REFINES else ()):
            for group in ("teachers", "validation_teachers"):
                for t in getattr(stage, group):
                    used.setdefault(t, f"{setting_of(config, method, level)}.{group}.N")
    return used


def check_plan(
    config: RunConfig, source: ImageSource, accelerator: Accelerator
) -> tuple[LatentGenerator | None, list[str]]:
    """The generator for the plan of a run on counts without images (`--like`).

    Settings are checked; models that are not on this machine are left out of the plan.
    """
    check_methods(config)
    check_guidance(config)
    check_counts(config, source)
    check_pruning(config, source)
    wanted: Sequence[Any] = [p for p in (config.codec.path, config.generate.model) if p is not None]
    missing = next((p for p in wanted if not Path(p).is_dir()), None)
    if missing is not None:
        return None, [f"{missing or 'codec.path'} is not a folder here"]
    return open_generator(resolve_dtypes(config, device_dtypes(accelerator.device)), fetch=False)
