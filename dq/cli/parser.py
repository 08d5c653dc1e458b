"""The options of the command line, and the configuration that they stand for."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from dq.cli.completion import SHELLS
from dq.config.overrides import apply_settings
from dq.config.schema import RunConfig, load_config
from dq.config.students import Baseline, LabelKind, default_baselines
from dq.core.errors import InputError
from dq.run.planning.plan import LIKE

NO_CONFIG = (
    "evaluate",
    "report",
    "push",
    "pull",
    "train-teachers",
    "train-pool",
    "train-experts",
    "doctor",
)  # need no --config

VERBS = {
    "run": "all stages: encode, prune, cluster, generate, refine, label, evaluate, report",
    "encode": "encode the images of every class into the latent cache",
    "prune": "score the difficulty of the train images, and say how many of a class each policy keeps",
    "cluster": "quantize every class: prototypes and their masses",
    "generate": "draw the prototypes as images",
    "refine": "put the drawn images through the stages of refinement: FADRM, Teddy, FRePo, trajectories",
    "label": "label images and views with the teachers and assemble the sets",
    "evaluate": "train fresh students on the sets of a run, or on any set (--distilled), and on baselines",
    "report": "write report.html from what the run folder holds",
    "push": "push the sets of a run, or a folder of sets, a pipeline or a teacher, to the Hugging Face Hub",
    "pull": "copy sets, a pipeline or a teacher from the Hugging Face Hub to a folder",
    "demo": "digits from scikit-learn: train a small prior, distil, evaluate; no download",
    "train-codec": "train a small autoencoder on the source",
    "train-denoiser": "train a small class-conditional DiT on the source's latents",
    "prior-report": "measure a trained prior: samples against real images, copies, a page and a card",
    "train-teachers": "train classifiers on the source, which label or score images later",
    "train-pool": "make a pool of weak teachers for Teddy: early checkpoints, or pruned copies of a trained network",
    "train-experts": "train networks on the source and keep their parameters after every epoch, to be matched",
    "doctor": "look at packages, devices, disks and Hub, say what a run would use and what is wrong",
}


EXAMPLES = {"prune": "dq prune --config configs/cifar10_prune.yaml --ipc 1,10 --set prune.score=forgetting"}


def build_parser() -> argparse.ArgumentParser:
    """The argument parser; every verb takes the same options."""
    parser = argparse.ArgumentParser(prog="dq", description="Dataset distillation by optimal quantization.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for verb, text in VERBS.items():
        example = f"example: {EXAMPLES[verb]}" if verb in EXAMPLES else None
        p = verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".", epilog=example)
        if verb == "demo":
            p.set_defaults(config="demo")
        else:
            p.add_argument(
                "--config",
                required=verb not in NO_CONFIG,
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
        if verb in ("run", "demo", "push", "pull"):
            _hub_options(p, verb)
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
        help="a set of any origin: a set's or run's folder, images by class, Parquet, .safetensors, .npz; repeatable",
    )
    p.add_argument("--protocol", help="preset: classic, frepo, hard, sre2l, rded, edc, fadrm, rd3; or ddr: DD-Ranking")
    p.add_argument("--student", action="append", metavar="NET", help="a network by name; may be repeated")
    p.add_argument("--labels", metavar="KIND[,KIND]", help="hard, fixed, soft: a column of the table for each")
    p.add_argument("--dataset", help="whose published settings of the protocol to take, e.g. cifar100")
    p.add_argument("--teacher", action="append", metavar="NET=PATH", help="who labels views; may be repeated")
    p.add_argument("--baselines", metavar="NAME[,NAME]", help=f"any of {', '.join(get_args(Baseline))}")
    p.add_argument("--seeds", type=int, help="students per set")
    _option(p, "--image_size", type=int, help="side in px at which students train")
    _option(
        p,
        "--label_kind",
        choices=get_args(LabelKind),
        help="what the label vectors of the sets are, where they do not say it themselves",
    )


def _hub_options(p: argparse.ArgumentParser, verb: str) -> None:
    p.add_argument("--token", help="of the Hub; better HF_TOKEN or `hf auth login`, which no list of processes shows")
    p.add_argument("--revision", help="branch, tag or commit; a push makes a branch that is not there")
    if verb == "pull":
        p.add_argument("repo", metavar="REPO", help="repository: owner/name")
        p.add_argument("--name", metavar="SET", help="one set of it; default: all")
        return
    if verb == "push":
        p.add_argument("folder", nargs="?", metavar="FOLDER", help="what to push, in place of the run of --config")
        p.add_argument("--only", metavar="NAME[,NAME]", help="sets by name, e.g. ipc10-ddoq; default: all")
    else:
        _option(p, "--push_to_hub", action="store_true", help="push the sets at the end")
    for name in ("--repo_id", "--hub_model_id"):
        _option(p, name, dest="repo_id", metavar="REPO", help="repository: name, or owner/name")
    p.add_argument("--private", action="store_true", default=None, help="make the repository private")
    p.add_argument("--license", metavar="ID", help="of what is pushed, e.g. cc-by-4.0")
    _option(p, "--create_pr", action="store_true", default=None, help="open a pull request")
    _option(p, "--commit_message", metavar="TEXT", help="the first line of the commit")


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
    for key in ("repo_id", "private", "revision", "license", "create_pr", "commit_message"):
        flags[f"hub.{key}"] = getattr(args, key, None)
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
    settings = {s.partition("=")[0].strip() for group in args.set for s in group}
    if args.baselines is not None:
        flags["evaluate.baselines"] = [b for b in args.baselines.split(",") if b]
    elif not (args.config or args.protocol == "ddr" or settings & {"evaluate", "evaluate.baselines"}):
        flags["evaluate.baselines"] = list(default_baselines(config.teachers))
    if args.protocol or args.student or args.dataset or args.labels:
        students = [dict(s) for s in config.evaluate.students]
        if args.student:
            if len(students) > 1:
                raise InputError("name students either with --student or in evaluate.students, not in both")
            students = [{**(students[0] if students else {}), "net": net} for net in args.student]
        if args.protocol and args.protocol != "ddr":
            students = [{**s, "protocol": args.protocol} for s in students]
        if args.dataset:
            students = [{**s, "dataset": args.dataset} for s in students]
        if args.labels:
            students = [{**s, "labels": args.labels.split(",")} for s in students]
        flags["evaluate.students"] = students
    return flags


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that this call would not read."""
    if args.dry_run and args.verb in ("push", "pull"):
        raise InputError(f"dq {args.verb} has no plan to print; leave out --dry_run")
    for name in ("like", "processes", "save_speeds"):
        if getattr(args, name) is not None and not args.dry_run:
            raise InputError(f"--{name} is for a plan; add --dry-run")
    if args.speeds and args.save_speeds:
        raise InputError("--speeds takes speeds from a file and --save_speeds measures them; give one of them")
    if args.processes is not None and args.processes < 1:
        raise InputError(f"--processes must be at least 1, not {args.processes}")
    silent = ("report", "prior-report", "train-teachers", "train-pool", "train-experts", "push", "pull")
    if args.report_to and args.verb in silent:
        raise InputError(f"dq {args.verb} has nothing to tell trackers; leave out --report_to")
