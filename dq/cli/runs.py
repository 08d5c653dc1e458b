"""Verbs of a run: all stages or one, the recommended recipe, the demo."""

from __future__ import annotations

import functools
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dq.cli.hub import push_run
from dq.cli.jobs import Call, Checked, Job
from dq.cli.training import check_codec, train_codec, train_denoiser
from dq.core.errors import InputError

if TYPE_CHECKING:
    from dq.config.schema import RunConfig
    from dq.config.teachers import TeacherConfig
    from dq.diffusion.generator import LatentGenerator
    from dq.run.folder import Run

log = logging.getLogger("dq")

# stages of a verb that has not just the one of its name
STAGES_OF = {
    "run": ("encode", "prune", "cluster", "generate", "refine", "label", "evaluate", "report"),
    "generate": ("generate", "refine", "label"),
    "refine": ("refine", "label"),
}
# what a verb prints at its end, relative to the run folder
PRINTED = {
    "run": ("dataset", "eval/summary.csv", "report.html"),
    "prune": ("pruning.csv",),
    "cluster": ("prototypes",),
    "generate": ("dataset",),
    "refine": ("dataset",),
    "label": ("dataset", "labels"),
    "evaluate": ("eval/summary.csv",),
    "report": ("report.html",),
}


# --- checks and plan ----------------------------------------------------------------------------------------------


def check(call: Call) -> Checked:
    """Check a run, or one of its stages, and open its generator."""
    from dq.run.checks import check_plan, check_run

    config, source, accelerator = call.config, call.source, call.accelerator
    if call.args.like:  # counts without images: a plan for another machine
        return Checked(*check_plan(config, source, accelerator))
    fetch = not call.args.dry_run
    pipe, unknown = check_run(config, source, call.verb, accelerator=accelerator, fetch=fetch)
    if pipe is None and not unknown and call.args.dry_run:  # the plan is of the whole run
        pipe, unknown = check_plan(config, source, accelerator)
    return Checked(pipe, unknown)


def check_recipe(call: Call) -> Checked:
    """Check a run whose selecting teacher may be trained first."""
    from dq.run.checks import check_plan, check_run

    config, source, accelerator = call.config, call.source, call.accelerator
    if call.args.like:
        return Checked(*check_plan(config, source, accelerator))
    fetch = not call.args.dry_run
    return Checked(*check_run(config, source, accelerator=accelerator, fetch=fetch, untrained=_untrained(call)))


def check_demo(call: Call) -> Checked:
    """Check the demo, which may train its prior first."""
    from dq.config.methods import check_methods
    from dq.run.checks import check_counts
    from dq.run.folder import check_folder, settle_dtypes
    from dq.run.stages.evaluate import check_evaluation
    from dq.run.stages.prune import check_pruning

    config, source = call.config, call.source
    if not call.args.like:
        check_codec(call)
    if call.args.like or (Path(config.prior.output_dir) / "model_index.json").is_file():
        return check_recipe(call)
    _untrained(call)
    check_methods(config)
    check_folder(settle_dtypes(config, source, call.accelerator)[0], source)
    check_counts(config, source)
    check_pruning(config, source)
    check_evaluation(config, source)
    return Checked(unknown=["the prior is not trained yet"])


def _untrained(call: Call) -> list[TeacherConfig]:
    """The teacher that the recipe trains before the run, if its files do not exist."""
    from dq.run.recipe import untrained_selector

    teacher = untrained_selector(call.config, call.source, call.accelerator)
    return [teacher] if teacher else []


def plan(call: Call, checked: Checked, untrained: Sequence[TeacherConfig] = ()) -> str:
    """The plan of a run, with speeds read from a file or measured here."""
    from dq.run.folder import settle_dtypes
    from dq.run.planning.timings import Speeds, measure_speeds, plan_with_speeds

    args, source, accelerator = call.args, call.source, call.accelerator
    config = settle_dtypes(call.config, source, accelerator)[0]
    if args.speeds:
        speeds = Speeds.load(args.speeds)
    else:
        pipe, unknown = checked.pipe, checked.unknown
        start_s = time.perf_counter() - call.began
        speeds = measure_speeds(
            config, source, pipe, accelerator.device, unknown, untrained=untrained, start_s=start_s
        )
    if args.save_speeds and accelerator.is_main_process:
        speeds.save(Path(args.save_speeds))
    return plan_with_speeds(config, source, speeds, processes=args.processes or accelerator.num_processes)


def plan_recipe(call: Call, checked: Checked) -> str:
    """The plan of a run, below that of the teacher that is trained first."""
    from dq.run.planning.plan import plan_training

    untrained = _untrained(call)
    training = plan_training("train-teachers", call.config, call.source) if untrained else ""
    return "\n".join([*training.splitlines()[1:], plan(call, checked, untrained)])


# --- work ---------------------------------------------------------------------------------------------------------


def run_stages(call: Call, verb: str, *, pipe: LatentGenerator | None = None) -> None:
    """Do all stages of a verb, and print results and paths.

    Args:
        call: options, settings and images.
        verb: "run" or the name of a stage.
        pipe: the generator of `check_run`; None: the settings are checked here.
    """
    from dq.config.reader import to_dict
    from dq.core.progress import StageTimer
    from dq.core.trackers import start_trackers
    from dq.run.checks import ENCODES, check_run
    from dq.run.folder import open_run
    from dq.run.planning.remaining import expected_seconds, measured_seconds
    from dq.run.planning.timings import Speeds

    source, accelerator, speeds = call.source, call.accelerator, call.args.speeds
    if pipe is None and verb in ENCODES:
        pipe, _ = check_run(call.config, source, verb, accelerator=accelerator)
    run = open_run(call.config, source, accelerator)
    config = run.config
    start_trackers(accelerator, config.report_to, to_dict(config), run.folder)
    stages, idle = STAGES_OF.get(verb, (verb,)), _idle_stages(run, verb)
    seconds = expected_seconds(config, source, accelerator.num_processes, Speeds.load(speeds)) if speeds else {}
    measure = functools.partial(measured_seconds, run, pipe) if run.main else None
    timer = StageTimer([s for s in stages if s not in idle], seconds, measure=measure)
    for stage in stages:
        if stage not in idle:
            with timer.stage(stage):
                STEPS[stage](run, verb, pipe)
        elif stage == verb == "refine":  # logs that there is nothing to refine
            STEPS[stage](run, verb, pipe)
    if len(stages) > 1:
        log.info("%s took %s", verb, timer.summary())
    if run.main:
        print(*(run.folder / name for name in PRINTED.get(verb, ("config.yaml",))), sep="\n")


def _idle_stages(run: Run, verb: str) -> set[str]:
    """Stages in which nothing is to be done by the settings of the run."""
    from dq.run.refinement import stages_of
    from dq.run.stages.prune import scored_settings

    config, idle = run.config, set()
    if not config.evaluate.students:
        idle.add("evaluate")
    if not any(stages_of(config, m) for m in config.methods):
        idle.add("refine")
    prunes = any(run.resolved(m).prune.active for m in config.methods) or scored_settings(config)
    if verb == "run" and not prunes:
        idle.add("prune")
    return idle


def _encode(run: Run, verb: str, pipe: LatentGenerator | None) -> None:
    from dq.run.stages.encode import encode

    assert pipe is not None, "opened by check_run"
    encode(run, pipe.vae)


def _prune(run: Run, verb: str, pipe: LatentGenerator | None) -> None:
    from dq.run.stages.prune import prune, pruned_text

    orders = prune(run, always=verb == "prune")
    if run.main and verb == "prune":
        print(pruned_text(run.config, run.source), *orders, sep="\n")


def _cluster(run: Run, verb: str, pipe: LatentGenerator | None) -> None:
    from dq.run.stages.cluster import cluster, report_distortion
    from dq.run.stages.encode import cache_of

    cluster(run, cache_of(run))
    report_distortion(run.accelerator, run.folder / "metrics.jsonl")


def _generate(run: Run, verb: str, pipe: LatentGenerator | None) -> None:
    from dq.run.stages.encode import cache_of
    from dq.run.stages.generate import generate

    assert pipe is not None, "opened by check_run"
    generate(run, pipe, cache_of(run))


def _refine(run: Run, verb: str, pipe: LatentGenerator | None) -> None:
    from dq.run.stages.refine import refine

    refine(run, None if pipe is None else pipe.vae)


def _label(run: Run, verb: str, pipe: LatentGenerator | None) -> None:
    from dq.run.stages.assemble import assemble
    from dq.run.stages.evaluate import label_run
    from dq.run.stages.label import label

    label(run)
    assemble(run)
    if verb == "label":
        label_run(run)


def _evaluate(run: Run, verb: str, pipe: LatentGenerator | None) -> None:
    from dq.evaluation.tables import tables_text
    from dq.run.stages.evaluate import evaluate_run

    rows = evaluate_run(run)
    if run.main and rows:
        print(tables_text(rows))


def _report(run: Run, verb: str, pipe: LatentGenerator | None) -> None:
    from dq.run.page_inputs import is_current, note_inputs
    from dq.run.report import write_report

    if run.main and (verb == "report" or not is_current(run)):
        write_report(run)
        note_inputs(run)


STEPS: dict[str, Callable[[Run, str, LatentGenerator | None], None]] = {
    **{"encode": _encode, "prune": _prune, "cluster": _cluster, "generate": _generate, "refine": _refine},
    **{"label": _label, "evaluate": _evaluate, "report": _report},
}


def work(call: Call, checked: Checked) -> None:
    """Do a stage of a run or all, and push the sets if requested."""
    run_stages(call, call.verb, pipe=checked.pipe)
    push_run(call)


def work_recipe(call: Call, checked: Checked) -> None:
    """Train the teacher that selects unless it exists, then run; finished work is used again."""
    _follow_recipe(call, began=time.perf_counter())


def work_demo(call: Call, checked: Checked) -> None:
    """Train the prior, then follow the recipe."""
    from dq.core.locks import locked

    began = time.perf_counter()
    with locked(call.config.prior.output_dir, call.accelerator):
        train_codec(call)
        train_denoiser(call)
    _follow_recipe(call, began)


def _follow_recipe(call: Call, began: float) -> None:
    from dq.run.recipe import train_selector

    train_selector(call.config, call.source, call.accelerator)
    run_stages(call, "run")
    if call.accelerator.is_main_process:
        print(f"{Path(call.config.output_dir) / 'dataset'} opens with datasets.load_dataset")
        log.info("%s: %.0f s in all", call.verb, time.perf_counter() - began)
    push_run(call)


# --- recipe -------------------------------------------------------------------------------------------------------


def fill_distill(call: Call) -> RunConfig:
    """Settings of the recipe by images and prior, with sizes unless set; without a prior, by real images."""
    from functools import partial

    from dq.cli.flags import sets_key
    from dq.config.overrides import apply_settings
    from dq.run.recipe import fill_recipe, fill_representatives, fit_students, prior_of_classes

    args, config, source = call.args, call.config, call.source
    given = partial(sets_key, args)
    if len(source.class_names) < 2:
        raise InputError(
            f"{source.origin} holds one class, {source.class_names[0]!r}, which leaves nothing to learn; give the "
            "folder above, with a folder for each of several classes"
        )
    if not config.generate.model and args.prior is None and (prior := prior_of_classes(source.class_names)):
        log.info("the prior of these classes in %s draws the images (--prior none for real images)", prior)
        config = apply_settings(config, {"generate.model": str(prior)})
    if config.generate.model:
        config = fill_recipe(config, source, resolution=not given("codec.resolution"), image_size=not args.like)
    else:
        log.info(
            "no prior is named and none of these classes comes with dq: the set is made of the real images nearest to "
            "the points of k-means (dq train-denoiser trains a prior, --prior FOLDER uses it)"
        )
        if args.like and config.source.image_size is None:
            config = apply_settings(config, {"source.image_size": config.codec.resolution})
        config = fill_representatives(config, source, call.accelerator.device.type, given)
    if not given("evaluate.students"):
        config = fit_students(config, call.accelerator.device.type)
    return config if args.epochs is None else with_epochs(config, args.epochs)


def with_epochs(config: RunConfig, epochs: int) -> RunConfig:
    """Settings whose students all train for this number of epochs."""
    from dq.config.overrides import apply_settings

    return apply_settings(
        config, {f"evaluate.students.{i}.epochs": epochs for i in range(len(config.evaluate.students))}
    )


def fill_stage(call: Call) -> RunConfig:
    """Settings of a run whose codec follows from its prior where none is named."""
    from dq.run.recipe import fill_codec

    return fill_codec(call.config)


def fill_demo(call: Call) -> RunConfig:
    """Settings of the recipe that depend on the images and the prior, without sizes."""
    from dq.run.recipe import fill_recipe

    return fill_recipe(call.config, call.source, resolution=False, image_size=False)


def report_results(config: RunConfig) -> None:
    """Write the report of a folder that holds results of `evaluate`."""
    from dq.run.report import write_results_report

    print(write_results_report(Path(config.output_dir)))


def write_settings(call: Call, checked: Checked) -> str:
    """Write the settings that are not the defaults, as `dq run` reads them from any folder; returns the path."""
    from dq.config.reader import dump_changes
    from dq.core.files import write_text

    path, config = Path(call.args.file), with_absolute_paths(call.config)
    if path.exists():
        raise InputError(f"{path} exists; choose a name that does not")
    lines = ["# Written by dq init. `dq config KEY` explains a setting."]
    if untrained := _untrained(call):
        net = untrained[0].net
        lines.append(f"# {net} selects among the draws and is trained first: dq train-teachers --config {path}")
    if call.accelerator.is_main_process:
        lines.append(f"#   dq run --config {shlex.quote(str(path))}")
        write_text(path, "\n".join([*lines, dump_changes(config)]))
    return str(path)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Settings that read the same images and models from any working folder; results go to the folder of the day.

    What is not on this machine, such as a name of the Hub or a teacher that is trained later, stays as it is.
    """
    from dq.config.overrides import apply_settings

    paths = {"source.path": config.source.path, "codec.path": config.codec.path}
    paths |= {"generate.model": config.generate.model or ""}
    if config.generate.select_teacher:
        paths["generate.select_teacher.path"] = config.generate.select_teacher.path
    paths |= {f"teachers.{i}.path": teacher.path for i, teacher in enumerate(config.teachers)}
    existing = {key: Path(path).expanduser() for key, path in paths.items() if path}
    return apply_settings(config, {key: str(path.absolute()) for key, path in existing.items() if path.exists()})


STAGE = Job(check, plan, work, fill=fill_stage, checks_counts=True)
DISTILL = Job(check_recipe, plan_recipe, work_recipe, fill=fill_distill, checks_counts=True)
INIT = Job(check_recipe, write_settings, work_recipe, fill=fill_distill)
DEMO = Job(check_demo, plan_recipe, work_demo, fill=fill_demo, checks_counts=True)
