"""The verbs push and pull, and `--push_to_hub` of a run."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from dq.core.errors import InputError

if TYPE_CHECKING:
    from dq.cli.jobs import Call
    from dq.config.schema import RunConfig


def is_first_process() -> bool:
    """Whether this process is the first of those that a launcher started, by its environment."""
    return int(os.environ.get("RANK", "0")) == 0


def check_push(args: argparse.Namespace, config: RunConfig) -> None:
    """Check what would stop `--push_to_hub` at the end of a run."""
    if getattr(args, "push_to_hub", False):
        if config.hub.repo_id is None:
            raise InputError("--push_to_hub needs to know where to: give --repo_id NAME, or set hub.repo_id")
        if is_first_process() and not args.dry_run:
            from dq.run.share import check_token

            check_token(args.token)


def push_run(call: Call) -> None:
    """Push the run at its end, if `--push_to_hub` asks for it."""
    if getattr(call.args, "push_to_hub", False) and call.accelerator.is_main_process:
        _push(call.args, call.config)


def push_verb(args: argparse.Namespace) -> None:
    """Push what a folder holds, or the run of the configuration."""
    from dq.cli.flags import resolve

    config = resolve(args)
    if is_first_process():
        _push(args, config)


def _push(args: argparse.Namespace, config: RunConfig) -> None:
    from dq.config.reader import to_dict
    from dq.run.share import push

    folder, only = getattr(args, "folder", None), getattr(args, "only", None)
    if bool(folder) == bool(args.config):
        raise InputError("say what to push: a FOLDER, or a run by its --config FILE")
    if config.hub.repo_id is None:
        raise InputError("say where to push: give --repo_id NAME (or OWNER/NAME), or set hub.repo_id")
    names = only.split(",") if only else None
    commit = push(folder or config.output_dir, only=names, token=args.token, **to_dict(config.hub))
    print(commit.pr_url or commit)


def export_verb(args: argparse.Namespace) -> None:
    """Write the images of a set as PNG files."""
    from dq.distilled.external import load_set

    if is_first_process():
        if not args.output_dir:
            raise InputError("say where to put the images: --output_dir DIR")
        print(
            load_set(args.set_path, name=args.name, token=args.token, revision=args.revision).save_images(
                args.output_dir
            )
        )


def pull_verb(args: argparse.Namespace) -> None:
    """Copy sets or a model from the Hub to a folder."""
    from dq.run.share import pull

    if is_first_process():
        if not args.output_dir:
            raise InputError("say where to put it: --output_dir DIR")
        print(pull(args.repo, args.output_dir, args.name, revision=args.revision, token=args.token))
