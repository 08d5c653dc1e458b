"""The parser of the command line, and the configuration that its options stand for."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from dq.cli.options import VERBS, add_options
from dq.core.errors import InputError

if TYPE_CHECKING:
    from dq.config.schema import RunConfig

FOLDERS_OF_SECTIONS = {  # verbs whose folder and seed are those of a section
    "train-codec": ("prior.output_dir", "prior.seed"),
    "train-denoiser": ("prior.output_dir", "prior.seed"),
    "train-teachers": ("train_teachers.output_dir", "train_teachers.seed"),
    "train-pool": ("train_pool.output_dir", "train_teachers.seed"),
    "train-experts": ("train_experts.output_dir", "train_experts.seed"),
}
SHIPPED = {"demo": "demo", "distill": "recommended"}  # verbs whose configuration comes with the package


class Parser(argparse.ArgumentParser):
    """Names the nearest verb or option for a typing error."""

    def parse_args(self, argv: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        args, unknown = self.parse_known_args(argv, namespace)
        verb = getattr(args, "verb", None)
        chosen = self._verb_parser(verb)
        if unknown:
            chosen.error(chosen._unread(unknown[0], self))
        if verb and VERBS[verb].needs_config and args.config is None:
            chosen.error("the following arguments are required: --config")
        return args

    def _verb_parser(self, verb: str | None) -> Parser:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and verb in action.choices:
                return action.choices[verb]
        return self

    def _unread(self, argument: str, top: Parser) -> str:
        """The sentence on an argument that a verb does not read."""
        if not argument.startswith("-"):
            return f"there is no place for the argument {argument!r}; see `{self.prog} --help`"
        name = argument.partition("=")[0]
        verbs = sorted(v for v in VERBS if name in top._verb_parser(v)._option_string_actions)
        if verbs:
            some = ", ".join(verbs[:3]) + (", ..." if len(verbs) > 3 else "")
            return f"{name} is not read, but by {some}; leave it out"
        near = difflib.get_close_matches(name, list(self._option_string_actions), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"see `{self.prog} --help`"
        return f"there is no option {name}; {hint}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            near = difflib.get_close_matches(value, list(action.choices), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(action.choices)}"
            self.error(f"there is no verb {value!r}; {hint}")
        super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def build_parser() -> Parser:
    """The argument parser, in which every verb has the options that it reads."""
    parser = Parser(prog="dq", description="Dataset distillation by optimal quantization.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for name, verb in VERBS.items():
        p = verbs.add_parser(
            name,
            help=verb.about,
            description=verb.about[0].upper() + verb.about[1:] + ".",
            epilog=_epilog(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(p, name)
        if name in SHIPPED:
            p.set_defaults(config=SHIPPED[name])
    return parser


def _epilog(name: str) -> str:
    verb = VERBS[name]
    settings = f"settings: {verb.settings} (explained by `dq config KEY`)\n" if verb.settings else ""
    return f"{settings}example: dq {name} {verb.example}".rstrip()


def resolve(args: argparse.Namespace) -> RunConfig:
    """Defaults < file < flags."""
    from dq.config.overrides import apply_settings
    from dq.config.schema import RunConfig, load_config

    config = load_config(args.config) if args.config else RunConfig()
    if args.verb == "evaluate":
        config = apply_settings(config, _early_flags(args))  # so that --set can say more of them
    config = apply_settings(config, [s for group in args.set for s in group])
    flags: dict[str, Any] = {"source.path": args.data, "output_dir": args.output_dir, "cache_dir": args.cache_dir}
    flags["generate.model"] = args.prior
    flags["seed"] = args.seed
    if args.report_to:
        flags["report_to"] = [name for text in args.report_to for name in text.split(",") if name]
    if args.verb in FOLDERS_OF_SECTIONS:
        folder, seed = FOLDERS_OF_SECTIONS[args.verb]
        flags[folder], flags[seed] = flags.pop("output_dir"), flags.pop("seed")
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
    from dq.config.students import default_baselines

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
