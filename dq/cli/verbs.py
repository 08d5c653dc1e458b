"""What each verb does."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq.cli.checks import Checked, check_prior_training, prior_codec, scores_sets, with_codec_of_model
from dq.cli.parser import SHIPPED
from dq.config.reader import to_dict
from dq.config.schema import RunConfig
from dq.core.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dq.data.source import ImageSource
    from dq.diffusion.generator import LatentGenerator

log = logging.getLogger("dq")


def output_folder(verb: str, config: RunConfig) -> Path:
    """The folder that a verb writes to."""
    folders = {"train-teachers": config.train_teachers.output_dir, "train-pool": config.train_pool.output_dir}
    folders["train-experts"] = config.train_experts.output_dir
    folders |= dict.fromkeys(("train-codec", "train-denoiser"), config.prior.output_dir)
    return Path(folders.get(verb, config.output_dir))


def plan_verb(
    args: argparse.Namespace, config: RunConfig, source: ImageSource, accelerator: Accelerator, checked: Checked
) -> str:
    """What a dry run prints."""
    from dq.run.planning.plan import plan_evaluation, plan_prior_report, plan_training
    from dq.run.planning.timings import plan_with_speeds

    if scores_sets(args):
        sets = {(name, str(s.ipc)): len(s) for name, s in checked.sets.items()}
        if args.protocol == "ddr":
            from dq.evaluation.dd_ranking import count_trainings

            e = config.evaluate
            return f"evaluate    up to {count_trainings(len(sets), len(e.students), e.seeds)} trainings of ddr"
        return "\n".join(plan_evaluation(config, source.class_counts(), sets, config.ipc if args.ipc else ()))
    if args.verb == "prior-report":
        return plan_prior_report(config, source)
    if args.verb.startswith("train-"):
        return plan_training(args.verb, config, source)
    first: list[str] = []
    if args.verb in SHIPPED:
        from dq.run.recipe import untrained_selector

        if untrained_selector(config, source, accelerator):
            first = plan_training("train-teachers", config, source).splitlines()[1:]
    plan = plan_with_speeds(
        config,
        source,
        accelerator,
        processes=args.processes or accelerator.num_processes,
        speeds_file=args.speeds,
        save_to=args.save_speeds,
        pipe=checked.pipe,
        unknown=checked.unknown,
    )
    return "\n".join([*first, plan])


def work(
    args: argparse.Namespace, config: RunConfig, source: ImageSource, accelerator: Accelerator, checked: Checked
) -> None:
    """What a verb writes."""
    if args.verb in SHIPPED:
        _distill(args, config, source, accelerator)
        _push_run(args, config, accelerator)
        return
    if args.verb in ("train-codec", "train-denoiser"):
        print(_train(args.verb, config, source, accelerator))
        return
    if args.verb == "prior-report":
        _report_prior(config, source, accelerator, checked.pipe)
        return
    if args.verb == "train-teachers":
        from dq.networks.train_teachers import train_teachers

        for folder in train_teachers(config, source, accelerator=accelerator):
            print(folder)
        return
    if args.verb == "train-pool":
        from dq.networks.train_pool import train_pool

        print(train_pool(config, source, accelerator=accelerator))
        return
    if args.verb == "train-experts":
        from dq.networks.train_experts import train_experts

        print(train_experts(config, source, accelerator=accelerator))
        return
    if scores_sets(args):
        _evaluate_sets(args, config, source, accelerator, checked.sets)
        return
    run_verb(args.verb, config, source, accelerator, args.speeds, pipe=checked.pipe)
    _push_run(args, config, accelerator)


def check_push(args: argparse.Namespace, config: RunConfig) -> None:
    """What would stop `--push_to_hub` at the end of a run."""
    if getattr(args, "push_to_hub", False):
        if config.hub.repo_id is None:
            raise InputError("--push_to_hub needs to know where to: give --repo_id NAME, or set hub.repo_id")
        if int(os.environ.get("RANK", "0")) == 0 and not args.dry_run:
            from dq.run.share import check_token

            check_token(args.token)


def _push_run(args: argparse.Namespace, config: RunConfig, accelerator: Accelerator) -> None:
    if getattr(args, "push_to_hub", False) and accelerator.is_main_process:
        push_verb(args, config)


def push_verb(args: argparse.Namespace, config: RunConfig) -> None:
    """Push what a folder holds, or the run of the configuration."""
    from dq.run.share import push

    folder, only = getattr(args, "folder", None), getattr(args, "only", None)
    if bool(folder) == bool(args.config):
        raise InputError("say what to push: a FOLDER, or a run by its --config FILE")
    if config.hub.repo_id is None:
        raise InputError("say where to push: give --repo_id NAME (or OWNER/NAME), or set hub.repo_id")
    commit = push(
        folder or config.output_dir,
        only=only.split(",") if only else None,
        token=args.token,
        **to_dict(config.hub),
    )
    print(commit.pr_url or commit)


def pull_verb(args: argparse.Namespace) -> None:
    from dq.run.share import pull

    if not args.output_dir:
        raise InputError("say where to put it: --output_dir DIR")
    print(pull(args.repo, args.output_dir, args.name, revision=args.revision, token=args.token))


def run_verb(
    verb: str,
    config: RunConfig,
    source: ImageSource,
    accelerator: Accelerator,
    speeds: str | None = None,
    *,
    pipe: LatentGenerator | None = None,
) -> None:
    """One stage of a run, or all of them.

    Args:
        speeds: file of `--save_speeds`, from which it is said how much is left.
        pipe: the generator of `check_run`; None: the settings are checked here.
    """
    from dq.core.progress import StageTimer
    from dq.core.trackers import start_trackers
    from dq.evaluation.results import tables_text
    from dq.run.checks import ENCODES, check_run
    from dq.run.folder import open_run
    from dq.run.planning.timings import Speeds, expected_seconds
    from dq.run.refinement import stages_of
    from dq.run.report import write_report
    from dq.run.stages.assemble import assemble
    from dq.run.stages.cluster import cluster, report_distortion
    from dq.run.stages.encode import cache_of, encode
    from dq.run.stages.evaluate import evaluate_run, label_run
    from dq.run.stages.generate import generate
    from dq.run.stages.label import label
    from dq.run.stages.prune import kept_text, prune, scored_settings
    from dq.run.stages.refine import refine

    if pipe is None and verb in ENCODES:
        pipe, _ = check_run(config, source, verb, accelerator=accelerator)
    run = open_run(config, source, accelerator)
    config = run.config
    start_trackers(accelerator, config.report_to, to_dict(config), run.folder)
    do = lambda *names: verb in (*names, "run")  # noqa: E731
    whole = ("encode", "prune", "cluster", "generate", "refine", "label", "evaluate", "report")
    needed = {"generate": ("generate", "refine", "label"), "refine": ("refine", "label")}.get(verb, (verb,))
    idle = {"evaluate": not config.evaluate.students, "refine": not any(stages_of(config, m) for m in config.methods)}
    pruned = any(run.resolved(m).prune.active for m in config.methods)
    idle["prune"] = verb == "run" and not (pruned or scored_settings(config))
    names = [n for n in (whole if verb == "run" else needed) if not idle.get(n)]
    known = expected_seconds(config, source, accelerator.num_processes, Speeds.load(speeds)) if speeds else {}
    way = StageTimer(names, known)
    rows: list[Any] = []
    if do("encode") and pipe is not None:
        with way.stage("encode"):
            encode(run, pipe.vae)
    if do("prune") and not idle["prune"]:
        with way.stage("prune"):
            orders = prune(run, always=verb == "prune")
        if run.main and verb == "prune":
            print(kept_text(config, run.source), *orders, sep="\n")
    if do("cluster"):
        with way.stage("cluster"):
            cluster(run, cache_of(run))
        report_distortion(accelerator, run.folder / "metrics.jsonl")
    if do("generate") and pipe is not None:
        with way.stage("generate"):
            generate(run, pipe, cache_of(run))
    if do("generate", "refine"):
        with way.stage("refine") if "refine" in names else nullcontext():
            refine(run, None if pipe is None else pipe.vae)
    if do("generate", "refine", "label"):
        with way.stage("label"):
            label(run)
            assemble(run)
            if verb == "label":
                label_run(run)
    if do("evaluate") and config.evaluate.students:
        with way.stage("evaluate"):
            rows = evaluate_run(run)
    if do("report"):
        with way.stage("report"):
            if run.main:
                write_report(run)
    if run.main:
        if rows:
            print(tables_text(rows))
        _print_paths(verb, run.folder)


def _evaluate_sets(
    args: argparse.Namespace, config: RunConfig, source: ImageSource, accelerator: Accelerator, sets: dict[str, Any]
) -> None:
    """Evaluate sets of any origin."""
    from dq.config.reader import dump_config
    from dq.core.files import write_text
    from dq.core.trackers import start_trackers
    from dq.evaluation.dd_ranking import evaluate_ddr
    from dq.evaluation.evaluate import evaluate_sets
    from dq.evaluation.results import tables_text

    start_trackers(accelerator, config.report_to, to_dict(config), Path(config.output_dir))
    options: dict[str, Any] = {
        "config": config.evaluate,
        "teachers": config.teachers,
        "image_size": config.source.image_size,
        "folder": Path(config.output_dir),
        "cache_dir": Path(config.cache_dir),
        "accelerator": accelerator,
        "difficulty": config.prune,
    }
    if args.ipc:
        options["ipcs"] = config.ipc
    if args.protocol == "ddr":
        scores = evaluate_ddr(sets, source, **options)
        said, file = str(scores), "ddr.csv"
    else:
        rows = evaluate_sets(sets, source, **options)
        said, file = tables_text(rows), "summary.csv"
    if accelerator.is_main_process:
        write_text(Path(config.output_dir) / "eval" / "config.yaml", dump_config(config))
        print(said)
        print(Path(config.output_dir) / "eval" / file)


def _print_paths(verb: str, folder: Path) -> None:
    wanted = {"run": ("dataset", "eval/summary.csv", "report.html"), "evaluate": ("eval/summary.csv",)}
    wanted |= {
        "label": ("dataset", "labels"),
        "generate": ("dataset",),
        "refine": ("dataset",),
        "report": ("report.html",),
        "cluster": ("prototypes",),
        "prune": ("pruning.csv",),
    }
    for name in wanted.get(verb, ("config.yaml",)):
        print(folder / name)


def _train(verb: str, config: RunConfig, source: ImageSource, accelerator: Accelerator) -> Path:
    """Train a part of the prior, and give the folder it is in."""
    from dq.config.dtypes import record_dtypes
    from dq.core.processes import assign_units
    from dq.core.trackers import start_trackers
    from dq.diffusion.codec import load_codec
    from dq.diffusion.latents import encode_source, open_cache
    from dq.diffusion.prior.train_codec import train_codec
    from dq.diffusion.prior.train_denoiser import train_denoiser

    start_trackers(accelerator, config.report_to, to_dict(config), Path(config.prior.output_dir))
    if verb == "train-codec":
        return train_codec(source, config.codec, config.prior, accelerator=accelerator)
    check_prior_training(verb, config, source, accelerator)
    c, dtypes = prior_codec(config, source, accelerator)
    accelerator.wait_for_everyone()
    if config.codec.dtype == "auto":
        record_dtypes(Path(config.prior.output_dir), dtypes, main=accelerator.is_main_process)
    codec = load_codec(c.path, subfolder=c.subfolder, revision=c.revision, dtype=c.dtype, device=accelerator.device)
    cache = open_cache(config.cache_dir, source, codec, c, config.seed)
    local_units = functools.partial(assign_units, rank=accelerator.process_index, world_size=accelerator.num_processes)
    main = accelerator.is_main_process
    encode_source(source, codec, cache, c, seed=config.seed, local_units=local_units, main=main)
    flipped = None
    if config.prior.denoiser.flip:
        flipped = open_cache(config.cache_dir, source, codec, c, config.seed, flip=True)
        encode_source(source, codec, flipped, c, seed=config.seed, local_units=local_units, main=main)
    accelerator.wait_for_everyone()
    options: dict[str, Any] = {"class_names": source.class_names, "accelerator": accelerator}
    return train_denoiser(cache, codec, config.prior, flipped=flipped, **options)


def _report_prior(
    config: RunConfig, source: ImageSource, accelerator: Accelerator, pipe: LatentGenerator | None
) -> None:
    """Measure a prior; without `codec.path`, with the codec that lies in its folder."""
    from dq.core.text import markdown_table
    from dq.diffusion.card import quality_table
    from dq.run.prior_report import report_prior

    assert pipe is not None, "opened by check_verb"
    records = report_prior(with_codec_of_model(config), source, pipe, accelerator=accelerator)
    if records:
        print(markdown_table(*quality_table(records)))
        for name in ("prior_quality.csv", "prior_report.html"):
            print(Path(config.output_dir) / name)


def _distill(args: argparse.Namespace, config: RunConfig, source: ImageSource, accelerator: Accelerator) -> None:
    """Train what the recipe needs and is not there, then run; all that an earlier call made is used."""
    from dq.core.locks import locked
    from dq.run.recipe import train_selector

    began = time.perf_counter()
    if args.verb == "demo":
        with locked(config.prior.output_dir, accelerator):
            _train("train-codec", config, source, accelerator)
            _train("train-denoiser", config, source, accelerator)
    train_selector(config, source, accelerator)
    run_verb("run", config, source, accelerator, args.speeds)
    if accelerator.is_main_process:
        print(f"{Path(config.output_dir) / 'dataset'} opens with datasets.load_dataset")
        log.info("%s: %.0f s in all", args.verb, time.perf_counter() - began)
