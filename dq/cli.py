"""The command line: verbs over one configuration. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dq.completion import SHELLS, completion_script
from dq.config import RunConfig, load_config
from dq.errors import InputError, RunError
from dq.plan import LIKE
from dq.settings import apply_settings

log = logging.getLogger("dq")

VERBS = {
    "run": "all stages: encode, cluster, generate, refine, label, evaluate, report",
    "encode": "encode the images of every class into the latent cache",
    "cluster": "quantize every class: prototypes and their masses",
    "generate": "draw the prototypes as images",
    "refine": "put the drawn images through the stages of refinement: FADRM, Teddy",
    "label": "label images and views with the teachers and assemble the sets",
    "evaluate": "train fresh students on the sets of a run, or on any set (--distilled), and on baselines",
    "report": "write report.html from what the run folder holds",
    "demo": "digits from scikit-learn: train a small prior, distil, evaluate; no download",
    "train-codec": "train a small autoencoder on the source",
    "train-denoiser": "train a small class-conditional DiT on the source's latents",
    "prior-report": "measure a trained prior: samples against real images, copies, a page and a card",
    "train-teachers": "train classifiers on the source, which label or score images later",
    "train-pool": "make a pool of weak teachers for Teddy: early checkpoints, or pruned copies of a trained network",
    "doctor": "look at packages, devices, disks and Hub, say what a run would use and what is wrong",
}


def build_parser() -> argparse.ArgumentParser:
    """The argument parser; every verb takes the same options."""
    parser = argparse.ArgumentParser(prog="dq", description="Dataset distillation by optimal quantization.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for verb, text in VERBS.items():
        p = verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".")
        if verb == "demo":
            p.set_defaults(config="demo")
        else:
            p.add_argument(
                "--config",
                required=verb not in ("evaluate", "report", "train-teachers", "train-pool", "doctor"),
                metavar="FILE",
                help="YAML file; see configs/",
            )
        p.add_argument("--data", metavar="DIR", help="the image set: folder, Hub id or sklearn:digits (source.path)")
        _option(p, "--output_dir", metavar="DIR", help="the run folder")
        _option(p, "--cache_dir", metavar="DIR", help="where latents and full-data baselines are kept for all runs")
        p.add_argument("--seed", type=int, help="the run's seed")
        p.add_argument("--ipc", metavar="N[,N]", help="images per class, e.g. 1,10,50")
        p.add_argument(
            "--set",
            action="append",
            nargs="+",
            default=[],
            metavar="KEY=VALUE",
            help="any setting by its dotted name, e.g. cluster.engine=torch generate.mode=dit",
        )
        if verb == "evaluate":
            _evaluate_options(p)
        if verb == "doctor":
            p.add_argument("--json", action="store_true", help="print the report as JSON")
        p.add_argument("--cpu", action="store_true", help="stay on the CPU even if an accelerator is there")
        trackers = "send settings and numbers to trackio, tensorboard or wandb (report_to)"
        _option(p, "--report_to", action="append", metavar="NAME[,NAME]", help=trackers)
        _plan_options(p)
        said = p.add_mutually_exclusive_group()
        said.add_argument("--quiet", action="store_true", help="warnings and results only")
        said.add_argument("--verbose", action="store_true", help="lines for finished units, not bars")
    p = verbs.add_parser("completion", help="print a script that lets a shell complete this command")
    p.add_argument("shell", choices=SHELLS)
    return parser


def _plan_options(p: argparse.ArgumentParser) -> None:
    _option(p, "--dry_run", action="store_true", help="print the plan with time and disk, and stop")
    p.add_argument("--speeds", metavar="FILE", help="speeds measured before, instead of now; a run tells what is left")
    _option(p, "--save_speeds", metavar="FILE", help="with --dry-run: keep the measured speeds in a JSON file")
    p.add_argument("--processes", type=int, metavar="N", help="with --dry-run: plan for N processes")
    p.add_argument("--like", metavar="SET", help=f"with --dry-run: plan for {', '.join(LIKE)} or CLASSESxIMAGES")


def _evaluate_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--distilled",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="a set of any origin: folder of images by class, Parquet folder, .safetensors or .npz; may be repeated",
    )
    p.add_argument("--protocol", help="preset: classic, hard, sre2l, rded, edc, fadrm; or ddr for DD-Ranking's scores")
    p.add_argument("--student", action="append", metavar="NET", help="a network by name; may be repeated")
    p.add_argument("--dataset", help="whose published settings of the protocol to take, e.g. cifar100")
    p.add_argument("--teacher", action="append", metavar="NET=PATH", help="who labels views; may be repeated")
    p.add_argument("--baselines", metavar="NAME[,NAME]", help="random, herding, k-center, nearest, patches, full")
    p.add_argument("--seeds", type=int, help="students per set")
    _option(p, "--image_size", type=int, help="side in px at which students train")


def _option(parser: argparse.ArgumentParser, name: str, **kwargs: Any) -> None:
    """An option that may be written with underscores or hyphens."""
    parser.add_argument(name, *({name.replace("_", "-").replace("---", "--")} - {name}), **kwargs)


def resolve(args: argparse.Namespace) -> RunConfig:
    """Defaults < file < flags."""
    config = load_config(args.config) if args.config else RunConfig()
    if args.verb == "evaluate":
        config = apply_settings(config, _early_flags(args))  # so that --set can say more of them
    config = apply_settings(config, [s for group in args.set for s in group])
    flags: dict[str, Any] = {"source.path": args.data, "output_dir": args.output_dir, "cache_dir": args.cache_dir}
    flags["seed"] = args.seed
    if args.report_to:
        flags["report_to"] = [name for text in args.report_to for name in text.split(",") if name]
    if args.verb in ("train-codec", "train-denoiser"):
        flags["prior.seed"] = flags.pop("seed")
        flags["prior.output_dir"] = flags.pop("output_dir")
    if args.ipc:
        try:
            flags["ipc"] = [int(k) for k in args.ipc.split(",")]
        except ValueError:
            raise InputError(f"--ipc takes whole numbers such as 1,10,50, not {args.ipc!r}") from None
    if args.verb == "evaluate":
        flags |= _evaluate_flags(args, config)
    return apply_settings(config, {k: v for k, v in flags.items() if v is not None})


def _early_flags(args: argparse.Namespace) -> dict[str, Any]:
    flags: dict[str, Any] = {}
    if not args.config:
        # the full data costs more than all the rest; who wants it says so
        flags["evaluate.baselines"] = ["random"]
    if args.teacher:
        pairs = [t.partition("=") for t in args.teacher]
        if not all(path for _, _, path in pairs):
            raise InputError(f"--teacher takes NET=PATH such as resnet56=teachers/resnet56, not {args.teacher[0]!r}")
        flags["teachers"] = [{"net": net, "path": path} for net, _, path in pairs]
    return flags


def _evaluate_flags(args: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    """Settings that the options of `evaluate` stand for."""
    flags: dict[str, Any] = {"evaluate.seeds": args.seeds, "source.image_size": args.image_size}
    if args.baselines is not None:
        flags["evaluate.baselines"] = [b for b in args.baselines.split(",") if b]
    if args.protocol or args.student or args.dataset:
        students = [dict(s) for s in config.evaluate.students]
        if args.student:
            if len(students) > 1:
                raise InputError("name students either with --student or in evaluate.students, not in both")
            students = [{**(students[0] if students else {}), "net": net} for net in args.student]
        if args.protocol and args.protocol != "ddr":
            students = [{**s, "protocol": args.protocol} for s in students]
        if args.dataset:
            students = [{**s, "dataset": args.dataset} for s in students]
        flags["evaluate.students"] = students
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0 when done, 1 when the run failed, 2 for bad input, 130 after Ctrl-C."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        import dq

        print(f"dq {dq.__version__}")
        return 0
    if args.verb is None:
        parser.print_help(sys.stderr)
        return 2
    if args.verb == "completion":
        print(completion_script(parser, args.shell))
        return 0
    _set_up_logging(quiet=args.quiet, verbose=args.verbose)
    try:
        if args.verb == "doctor":
            from dq.doctor import doctor

            return doctor(resolve(args), named=args.config is not None, cpu=args.cpu, as_json=args.json)
        execute(args)
        return 0
    except InputError as e:
        print(f"dq {args.verb}: {e}", file=sys.stderr)
        return 2
    except RunError as e:
        print(f"dq {args.verb}: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        what = f"{e.filename}: {e.strerror}" if e.filename else str(e)
        print(f"dq {args.verb}: {what}; check that the path is right and can be written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"dq {args.verb}: interrupted; give the same command again to continue", file=sys.stderr)
        return 130


def _set_up_logging(*, quiet: bool, verbose: bool = False) -> None:
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    # read by libraries at their import
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    if quiet or verbose:
        os.environ["TQDM_DISABLE"] = "1"
    log.setLevel(logging.WARNING if quiet or rank else logging.DEBUG if verbose else logging.INFO)

    def show(message: Warning | str, *_: Any) -> None:
        log.warning("note: %s", message)

    warnings.showwarning = show  # type: ignore[assignment]  # one line, without the source line that raised it
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def execute(args: argparse.Namespace) -> None:
    """Do what a verb says."""
    config = resolve(args)
    if args.verb == "report" and not args.config:
        from dq.report import write_results_report

        print(write_results_report(Path(config.output_dir)))
        return
    from dq.data import load_source
    from dq.dist import make_accelerator
    from dq.evaluation.stage import check_evaluation
    from dq.plan import like_source
    from dq.tracking import check_trackers, end_trackers

    _check_flags(args)
    check_trackers(config.report_to)
    if args.verb == "prior-report":
        from dq.prior.quality_report import check_prior_report

        check_prior_report(config)
    accelerator = make_accelerator(cpu=args.cpu)
    if not accelerator.is_main_process:
        log.setLevel(logging.WARNING)
    with accelerator.main_process_first():  # one process fills the data set library's own cache
        source = like_source(args.like) if args.like else load_source(config.source)
    if args.verb in ("run", "demo") and not args.like:
        check_evaluation(config, source)
    if args.dry_run:
        if accelerator.is_main_process:
            print(_plan(args, config, source, accelerator))
        return
    try:
        _work(args, config, source, accelerator)
    finally:
        end_trackers(accelerator)


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that this call would not read."""
    for name in ("like", "processes", "save_speeds"):
        if getattr(args, name) is not None and not args.dry_run:
            raise InputError(f"--{name} is for a plan; add --dry-run")
    if args.speeds and args.save_speeds:
        raise InputError("--speeds takes speeds from a file and --save_speeds measures them; give one of them")
    if args.processes is not None and args.processes < 1:
        raise InputError(f"--processes must be at least 1, not {args.processes}")
    if args.report_to and args.verb in ("report", "prior-report", "train-teachers", "train-pool"):
        raise InputError(f"dq {args.verb} has nothing to tell trackers; leave out --report_to")


def _plan(args: argparse.Namespace, config: RunConfig, source: Any, accelerator: Any) -> str:
    """What a dry run prints."""
    from dq.plan import plan, plan_evaluation, plan_prior_report
    from dq.speeds import plan_with_speeds

    if args.verb == "evaluate" and not args.config:
        sets = {(name, str(s.ipc)): len(s) for name, s in _read_sets(args, config, source).items()}
        if args.protocol == "ddr":
            from dq.evaluation.ddr import count_trainings

            e = config.evaluate
            return f"evaluate    up to {count_trainings(len(sets), len(e.students), e.seeds)} trainings of ddr"
        return "\n".join(plan_evaluation(config, source.class_counts(), sets, config.ipc if args.ipc else ()))
    if args.verb == "prior-report":
        return plan_prior_report(config, source)
    if args.verb.startswith("train-"):
        return plan(config, source)
    return plan_with_speeds(
        config,
        source,
        accelerator,
        processes=args.processes or accelerator.num_processes,
        speeds_file=args.speeds,
        save_to=args.save_speeds,
    )


def _work(args: argparse.Namespace, config: RunConfig, source: Any, accelerator: Any) -> None:
    if args.verb == "demo":
        _demo(config, source, accelerator, args.speeds)
        return
    if args.verb in ("train-codec", "train-denoiser"):
        print(_train(args.verb, config, source, accelerator))
        return
    if args.verb == "prior-report":
        _report_prior(config, source, accelerator)
        return
    if args.verb == "train-teachers":
        from dq.evaluation.teaching import train_teachers

        for folder in train_teachers(config, source, accelerator=accelerator):
            print(folder)
        return
    if args.verb == "train-pool":
        from dq.evaluation.pooling import train_pool

        print(train_pool(config, source, accelerator=accelerator))
        return
    if args.verb == "evaluate" and (args.distilled or not args.config or args.protocol == "ddr"):
        _evaluate_sets(args, config, source, accelerator)
        return
    run_verb(args.verb, config, source, accelerator, args.speeds)


def run_verb(verb: str, config: RunConfig, source: Any, accelerator: Any, speeds: str | None = None) -> None:
    """One stage of a run, or all of them.

    Args:
        speeds: file of `--save_speeds`, from which it is said how much is left.
    """
    from dq import run as stages
    from dq.evaluation.stage import evaluate_run, label_run
    from dq.evaluation.tables import tables_text
    from dq.headway import Headway
    from dq.refine.chain import stages_of
    from dq.report import write_report
    from dq.runfolder import open_run
    from dq.speeds import Speeds, expected_seconds
    from dq.tracking import report_distortion, start_trackers

    run = open_run(config, source, accelerator)
    start_trackers(accelerator, config, run.folder)
    do = lambda *names: verb in (*names, "run")  # noqa: E731
    whole = ("encode", "cluster", "generate", "refine", "label", "evaluate", "report")
    needed = {"generate": ("generate", "refine", "label"), "refine": ("refine", "label")}.get(verb, (verb,))
    idle = {"evaluate": not config.evaluate.students, "refine": not any(stages_of(config, m) for m in config.methods)}
    names = [n for n in (whole if verb == "run" else needed) if not idle.get(n)]
    known = expected_seconds(config, source, accelerator.num_processes, Speeds.load(speeds)) if speeds else {}
    way = Headway(names, known)
    rows: list[Any] = []
    if do("encode", "generate"):
        pipe = load_pipeline(config)
    if do("encode"):
        with way.stage("encode"):
            stages.encode(run, pipe.vae)
    if do("cluster"):
        with way.stage("cluster"):
            stages.cluster(run, stages.cache_of(run))
        report_distortion(accelerator, run.folder / "metrics.jsonl")
    if do("generate"):
        with way.stage("generate"):
            stages.generate(run, pipe, stages.cache_of(run))
    if do("generate", "refine"):
        with way.stage("refine") if "refine" in names else nullcontext():
            stages.refine(run)
    if do("generate", "refine", "label"):
        with way.stage("label"):
            stages.label(run)
            stages.assemble(run)
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


def _evaluate_sets(args: argparse.Namespace, config: RunConfig, source: Any, accelerator: Any) -> None:
    """Evaluate sets of any origin."""
    from dq.dist import write_text
    from dq.evaluation.ddr import evaluate_ddr
    from dq.evaluation.stage import evaluate_sets
    from dq.evaluation.tables import tables_text
    from dq.settings import dump_config
    from dq.tracking import start_trackers

    if args.protocol == "ddr" and (args.ipc or not args.distilled):
        raise InputError("ddr scores sets named with --distilled PATH, against as many random images; leave --ipc out")
    if (Path(config.output_dir) / "config.yaml").is_file():
        raise InputError(f"{config.output_dir} is a run, whose results would be replaced; choose another --output_dir")
    if not args.distilled and not args.ipc:
        raise InputError(
            "name the sets to score with --distilled PATH, or a run with --config FILE, or say by --ipc for how many "
            "images per class baselines are to be measured"
        )
    sets = _read_sets(args, config, source)
    start_trackers(accelerator, config, Path(config.output_dir))
    options: dict[str, Any] = {
        "config": config.evaluate,
        "source_config": config.source,
        "teachers": config.teachers,
        "image_size": config.source.image_size,
        "folder": Path(config.output_dir),
        "cache_dir": Path(config.cache_dir),
        "accelerator": accelerator,
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


def _read_sets(args: argparse.Namespace, config: RunConfig, source: Any) -> dict[str, Any]:
    """The sets named with --distilled, by name."""
    from dq.foreign import read_set

    sets = {}
    for text in args.distilled:
        name, sep, path = text.partition("=")
        path = path if sep else text
        name = name if sep else (Path(path).stem if Path(path).suffix else Path(path).name)
        if name in sets:
            raise InputError(f"two sets are called {name!r}; name them with --distilled NAME=PATH")
        sets[name] = read_set(path, source.class_names, image_size=config.source.image_size)
    return sets


def _print_paths(verb: str, folder: Path) -> None:
    wanted = {"run": ("dataset", "eval/summary.csv", "report.html"), "evaluate": ("eval/summary.csv",)}
    wanted |= {
        "label": ("dataset", "labels"),
        "generate": ("dataset",),
        "refine": ("dataset",),
        "report": ("report.html",),
        "cluster": ("prototypes",),
    }
    for name in wanted.get(verb, ("config.yaml",)):
        print(folder / name)


def load_pipeline(config: RunConfig) -> Any:
    """The generator of a run with its codec; for `decode`, the codec alone."""
    from dq.codec import DTYPES, load_codec
    from dq.pipeline import DistillPipeline

    c, g = config.codec, config.generate
    if not c.path:
        raise InputError("no codec is named; set codec.path to an autoencoder, e.g. one made by `dq train-codec`")
    vae = load_codec(c.path, subfolder=c.subfolder, revision=c.revision, dtype=c.dtype)
    if g.model is None:
        return DistillPipeline(vae=vae)
    return DistillPipeline.from_pretrained(g.model, vae=vae, revision=g.revision, dtype=DTYPES[g.dtype])


def _train(verb: str, config: RunConfig, source: Any, accelerator: Any) -> Path:
    """Train a part of the prior, and give the folder it is in."""
    from dq.codec import load_codec
    from dq.dist import shard
    from dq.latents import encode_source, open_cache
    from dq.prior import train_codec, train_denoiser
    from dq.tracking import start_trackers

    start_trackers(accelerator, config, Path(config.prior.output_dir))
    if verb == "train-codec":
        return train_codec(source, config.source, config.codec, config.prior, accelerator=accelerator)
    c = config.codec
    codec = load_codec(c.path, subfolder=c.subfolder, revision=c.revision, dtype=c.dtype, device=accelerator.device)
    cache = open_cache(config.cache_dir, source, codec, config.source, c, config.seed)
    mine = shard([float(n) for n in source.class_counts()], accelerator.process_index, accelerator.num_processes)
    main = accelerator.is_main_process
    encode_source(source, codec, cache, config.source, c, labels=mine, seed=config.seed, main=main)
    accelerator.wait_for_everyone()
    return train_denoiser(cache, codec, config.prior, class_names=source.class_names, accelerator=accelerator)


def _report_prior(config: RunConfig, source: Any, accelerator: Any) -> None:
    """Measure a prior; without `codec.path`, with the codec that lies in its folder."""
    from dq.prior.card import markdown_text, quality_table
    from dq.prior.quality_report import report_prior

    if not config.codec.path:
        config = apply_settings(config, {"codec.path": config.generate.model})
    records = report_prior(config, source, load_pipeline(config), accelerator=accelerator)
    if records:
        print(markdown_text(*quality_table(records)))
        for name in ("prior_quality.csv", "prior_report.html"):
            print(Path(config.output_dir) / name)


def _demo(config: RunConfig, source: Any, accelerator: Any, speeds: str | None) -> None:
    """Train the small prior, then run; everything that is there from an earlier call is used."""
    began = time.perf_counter()
    _train("train-codec", config, source, accelerator)
    _train("train-denoiser", config, source, accelerator)
    run_verb("run", config, source, accelerator, speeds)
    if accelerator.is_main_process:
        print(f"{Path(config.output_dir) / 'dataset'} opens with datasets.load_dataset")
        log.info("demo: %.0f s in all", time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
