"""The configuration that options stand for, and checks of their combinations."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dq.core.errors import InputError
from dq.core.plain import PlainDict

if TYPE_CHECKING:
    from dq.config.schema import RunConfig


NO_PRIOR = "none"  # value of --prior


def resolve(args: argparse.Namespace) -> RunConfig:
    """Defaults < file < flags."""
    from dq.config.overrides import apply_settings
    from dq.config.schema import RunConfig, load_config

    config = load_config(args.config) if args.config else RunConfig()
    if args.verb == "evaluate":
        config = apply_settings(config, _early_flags(args))  # so that --set can say more of them
    config = apply_settings(config, [s for group in args.set for s in group])
    flags: PlainDict = {
        "source.path": args.data,
        "cache_dir": args.cache_dir,
        "source.image_size": args.image_size,
    }
    flags["generate.model"] = None if args.prior == NO_PRIOR else args.prior
    flags |= {args.folder_setting: args.output_dir, args.seed_setting: args.seed}
    if args.report_to:
        flags["report_to"] = [name for text in args.report_to for name in text.split(",") if name]
    if args.ipc:
        try:
            flags["ipc"] = [int(k) for k in args.ipc.split(",")]
        except ValueError:
            raise InputError(f"--ipc takes whole numbers such as 1,10,50, not {args.ipc!r}") from None
    if args.verb == "evaluate":
        flags |= _evaluate_flags(args, config)
    for key in ("repo_id", "private", "revision", "license", "create_pr", "commit_message"):
        flags[f"hub.{key}"] = getattr(args, key, None)
    flags = {k: v for k, v in flags.items() if v is not None}
    _refuse_set_too(args, flags)
    return apply_settings(config, flags)


def _refuse_set_too(args: argparse.Namespace, flags: PlainDict) -> None:
    """Refuse a setting that an option gives and `--set` too; students are joined from both."""
    pairs = [s.partition("=") for group in args.set for s in group]
    for key, _, text in pairs:
        if key.strip() in flags and key.strip() != "evaluate.students":
            raise InputError(
                f"{key.strip()} is given twice, by --set {key.strip()}={text} and by its option; leave one out"
            )


def _early_flags(args: argparse.Namespace) -> PlainDict:
    flags: PlainDict = {}
    if not args.config:
        # the full data costs more than all the rest; who wants it says so
        flags["evaluate.baselines"] = ["random"]
    if args.teacher:
        pairs = [t.partition("=") for t in args.teacher]
        if not all(path for _, _, path in pairs):
            raise InputError(f"--teacher takes NET=PATH such as resnet56=teachers/resnet56, not {args.teacher[0]!r}")
        flags["teachers"] = [{"net": net, "path": path} for net, _, path in pairs]
    return flags


def _evaluate_flags(args: argparse.Namespace, config: RunConfig) -> PlainDict:
    """Settings that the options of `evaluate` stand for."""
    from dq.config.students import default_baselines

    flags: PlainDict = {"evaluate.seeds": args.seeds}
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


def sets_key(args: argparse.Namespace, key: str) -> bool:
    """Whether `--set` gives a value to this setting, alone or in its section."""
    section, _, name = key.rpartition(".")
    pairs = [s.partition("=") for group in args.set for s in group]
    return any(k.strip() == key or (k.strip() == section and name in text) for k, _, text in pairs)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that this call would not read."""
    for name in ("like", "processes", "save_speeds"):
        if getattr(args, name) is not None and not args.dry_run:
            raise InputError(f"--{name} is for a plan; add --dry-run")
    if args.speeds and args.save_speeds:
        raise InputError("--speeds takes speeds from a file and --save_speeds measures them; give one of them")
    if args.processes is not None and args.processes < 1:
        raise InputError(f"--processes must be at least 1, not {args.processes}")
