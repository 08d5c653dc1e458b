"""Shell completion of verbs, options, paths and settings, written by shtab."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from dq.config.protocols import list_protocols
from dq.config.reference import setting_names
from dq.config.schema import Tracker
from dq.config.students import Baseline

FILES = ("config", "speeds", "save_speeds")
FOLDERS = ("data", "output_dir", "cache_dir")
# bash: `=` breaks a word, so that a value is not completed and no space must follow a key
BASH = """
_dq_words() {{ COMPREPLY=(); local word="$1"; shift; compgen -W "$*" -- "$word"; }}
_dq_settings() {{ compopt -o nospace 2>/dev/null; _dq_words "$1" {settings}; }}
_dq_protocols() {{ _dq_words "$1" {protocols}; }}
_dq_baselines() {{ _dq_words "$1" {baselines}; }}
_dq_trackers() {{ _dq_words "$1" {trackers}; }}
"""
COMPLETERS = {
    "set": "_dq_settings",
    "protocol": "_dq_protocols",
    "baselines": "_dq_baselines",
    "report_to": "_dq_trackers",
}


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script to be evaluated by a shell."""
    import shtab

    for verb in _verbs(parser):
        for action in verb._actions:
            if action.dest in FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.dest in FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.dest in COMPLETERS:
                action.complete = {"bash": COMPLETERS[action.dest]}  # type: ignore[attr-defined]
    bash = BASH.format(
        settings=" ".join(f"{name}=" for name in setting_names()),
        protocols=" ".join([*list_protocols(), "ddr"]),
        baselines=" ".join(get_args(Baseline)),
        trackers=" ".join(get_args(Tracker)),
    )
    texts: Any = {"bash": bash, "zsh": "", "tcsh": ""}
    return shtab.complete(parser, shell=shell, preamble=texts)


def _verbs(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    return [
        verb
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for verb in action.choices.values()
    ]
