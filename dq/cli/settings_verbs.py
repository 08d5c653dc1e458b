"""Verbs that start no run: config, validate, ls, cp, completion, doctor.

All but doctor load no torch.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dq.core.errors import InputError

if TYPE_CHECKING:
    from dq.config.reference import Setting
    from dq.config.schema import RunConfig


def config_verb(args: argparse.Namespace) -> None:
    """Print all settings, a line each, explain one or a section, or print those whose name contains a word."""
    from dq.config.reference import containing, explain, nearest_settings, reference

    rows = containing(args.key) if args.key else reference()
    if args.key and not rows:
        print(*explain(args.key), sep="\n")
        return
    _print_settings([r for r in rows if not re.match(r"refine\.N\.(teachers|validation_teachers)\.N", r.key)])
    if args.key:
        listed = {r.key for r in rows}
        print(f"no setting is called {args.key}; these names contain it, and `dq config NAME` explains one")
        if near := [name for name in nearest_settings(args.key) if name not in listed]:
            print(f"similar: {', '.join(near)}")


def _print_settings(rows: Sequence[Setting]) -> None:
    """Print settings, a line each."""
    names = [f"{r.key} ({r.stage})" if r.stage else r.key for r in rows]
    kinds = [", ".join(filter(None, (r.type, r.bound))) for r in rows]
    widths = [max(map(len, names)), min(44, max(map(len, kinds)))]
    for name, kind, row in zip(names, kinds, rows, strict=True):
        default = row.default if len(row.default) <= 40 else f"{row.default[:37]}..."
        print(f"{name:<{widths[0]}}  {kind:<{widths[1]}}  default {default:<12}  {row.help}")


def validate_verb(args: argparse.Namespace) -> None:
    """Check a configuration as a run would read it."""
    from dq.config.overrides import apply_settings
    from dq.config.schema import load_config

    config = apply_settings(load_config(args.file), [s for group in args.set for s in group])
    check_config(config)
    print(f"{args.file}: no errors")


def check_config(config: RunConfig) -> None:
    """What is checked only when a run begins, of what can be known without its data.

    Raises:
        InputError: with the path of the setting.
    """
    from dq.config.methods import check_guidance, check_methods, check_model
    from dq.config.protocols import student_config
    from dq.config.teachers import only_teacher

    check_methods(config, selector=False)
    check_guidance(config)
    check_model(config)
    _check_networks(config)
    ipcs = [*map(str, config.ipc), *["full"] * ("full" in config.evaluate.baselines)]
    for i, spec in enumerate(config.evaluate.students):
        for ipc in ipcs:
            where = f"evaluate.students.{i}"
            student = student_config(
                spec,
                ipc=ipc,
                classes=10,  # of the data, which are not read; presets depend on it and settings do not
                image_size=config.image_size,
                teacher=only_teacher(config.teachers),
                where=where,
            )
            _check_network(f"{where}.net", student.net)


def _check_networks(config: RunConfig) -> None:
    from dq.config.methods import resolved_method
    from dq.config.networks import named_networks

    for setting, name in named_networks(config):
        _check_network(setting, name)
    for method in config.methods:
        resolved = resolved_method(config, method)
        for section in ("prune", "generate"):
            for setting, name in named_networks(getattr(resolved, section), f"methods.{method}.override.{section}"):
                _check_network(setting, name)


def _check_network(setting: str, name: str) -> None:
    from dq.config.networks import is_network, unknown_network

    if not is_network(name):
        raise InputError(f"{setting}: {unknown_network(name)}")


def ls_verb(args: argparse.Namespace) -> None:
    """List what comes with the package: configurations, protocols of students, presets of stages."""
    from dq.config.protocols import list_protocols
    from dq.config.schema import PRESETS_FOLDER

    print("configurations (--config NAME, `dq cp NAME FILE`)")
    width = max(len(p.stem) for p in PRESETS_FOLDER.glob("*.yaml"))
    for path in sorted(PRESETS_FOLDER.glob("*.yaml")):
        print(f"  {path.stem:<{width}}  {_first_comment(path)}")
    print("launchers (accelerate launch --config_file, `dq cp NAME FILE`)")
    for path in sorted((PRESETS_FOLDER / "accelerate").iterdir()):
        print(f"  {path.name}")
    print("protocols (evaluate.students: [{protocol: NAME}], --protocol NAME, `dq cp NAME FILE`)")
    for name, about in list_protocols().items():
        print(f"  {name:<{width}}  {about}")
    print("presets of stages (refine: [{stage: STAGE, preset: NAME}])")
    for stage, names in _presets().items():
        print(f"  {stage:<{width}}  {', '.join(names)}")


def _presets() -> dict[str, list[str]]:
    from dq.config.refinement import FADRM_PRESETS
    from dq.config.trajectories import PRESETS

    return {"fadrm": list(FADRM_PRESETS), "trajectory": list(PRESETS)}


def _first_comment(path: Path) -> str:
    """The first sentence of the comment at the head of a file."""
    lines: list[str] = []
    for line in path.read_text().splitlines():
        if not line.startswith("#") or line.startswith("#  "):
            break
        lines.append(line.removeprefix("#").strip())
    text = re.split(r"(?<=[.:])\s", " ".join(lines), maxsplit=1)[0].rstrip(".:")
    return text if len(text) <= 100 else f"{text[:97]}..."


def cp_verb(args: argparse.Namespace) -> None:
    """Copy a file that comes with the package."""
    from dq.config.validation import unknown_key

    files = dict(_files())
    if args.name not in files:
        raise InputError(unknown_key(args.name, args.name, list(files), kind="configuration or protocol"))
    target = Path(args.file)
    if target.is_dir():
        target = target / files[args.name].name
    if target.exists():
        raise InputError(f"{target} exists already; choose another file, or delete it")
    target.write_bytes(files[args.name].read_bytes())
    print(target)


def _files() -> Iterator[tuple[str, Path]]:
    """Files that come with the package by name; configurations win over protocols of the same name."""
    from dq.config.schema import PRESETS_FOLDER

    for path in sorted((PRESETS_FOLDER / "accelerate").iterdir()):
        yield path.name, path
    for folder in (PRESETS_FOLDER / "protocols", PRESETS_FOLDER):
        for path in sorted(folder.glob("*.yaml")):
            yield path.stem, path


def completion_verb(args: argparse.Namespace) -> None:
    """Print a script that lets a shell complete the command."""
    from dq.cli.completion import completion_script

    print(completion_script(args.parser, args.shell))


def doctor_verb(args: argparse.Namespace) -> int:
    """Examine this machine for a run."""
    from dq.cli.doctor import doctor
    from dq.cli.flags import resolve

    return doctor(resolve(args), named=args.config is not None, cpu=args.cpu, as_json=args.json)
