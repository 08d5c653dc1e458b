"""The parser of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from dq.cli.options import add_options
from dq.cli.verbs import VERBS
from dq.core.text import nearest_name


class _Once(argparse._StoreAction):
    """Stores the value of an option that may be given once."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest, None)
        if option and before is not None and before != self.default:
            parser.error(f"{option} is given twice, as {before} and {values}; leave one out")
        super().__call__(parser, namespace, values, option)


class Parser(argparse.ArgumentParser):
    """Names the nearest verb or option for a typing error, and refuses an option that is given twice."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for kind in (None, "store"):
            self.register("action", kind, _Once)

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
        close = nearest_name(name, self._option_string_actions, cutoff=0.6)
        hint = f"did you mean {close}?" if close else f"see `{self.prog} --help`"
        return f"there is no option {name}; {hint}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            close = nearest_name(value, action.choices)
            hint = f"did you mean {close!r}?" if close else f"known: {', '.join(action.choices)}"
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
        add_options(p, verb.options, loudness=not verb.prints)
        p.set_defaults(parser=parser, folder_setting=verb.folder, seed_setting=verb.seed)
        if verb.plans:
            p.set_defaults(dry_run=True)
        if verb.preset:
            p.set_defaults(config=verb.preset)
    return parser


def _epilog(name: str) -> str:
    verb = VERBS[name]
    settings = f"settings: {verb.settings} (explained by `dq config KEY`)\n" if verb.settings else ""
    return f"{settings}example: dq {name} {verb.example}".rstrip()
