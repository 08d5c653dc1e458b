"""The command line: verbs over one configuration.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from dq.cli.flags import check_flags, resolve
from dq.cli.jobs import Call, Checked, Job
from dq.cli.logs import LogHandler
from dq.cli.parser import build_parser
from dq.cli.scoring import scores_sets
from dq.cli.verbs import VERBS, Verb
from dq.core.errors import InputError, RunError
from dq.core.redaction import Redaction, redact

if TYPE_CHECKING:
    from dq.config.schema import RunConfig

log = logging.getLogger("dq")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns 0 when done, 1 when the run failed, 2 for bad input, 130 after Ctrl-C.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from dq.core.version import __version__

        print(f"dq {__version__}")
        return 0
    if args.verb is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return _do(args)
    except InputError as e:
        print(redact(f"dq {args.verb}: {e}", args.token), file=sys.stderr)
        return 2
    except RunError as e:
        print(redact(f"dq {args.verb}: {e}", args.token), file=sys.stderr)
        return 1
    except OSError as e:
        what = f"{e.filename}: {e.strerror}" if e.filename else str(e)
        message = f"dq {args.verb}: {what}; check that the path is right and can be written"
        print(redact(message, args.token), file=sys.stderr)
        return 1
    except RuntimeError as e:
        from dq.core.memory import is_out_of_memory

        if not is_out_of_memory(e):
            raise
        way_out = "set a smaller batch_size of the stage that was at work, or use a device with more"
        print(f"dq {args.verb}: out of memory ({str(e).splitlines()[0]}); {way_out}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"dq {args.verb}: interrupted; give the same command again to continue", file=sys.stderr)
        return 130


def _do(args: argparse.Namespace) -> int:
    """Run a verb.

    Imports are within functions, so that help and settings are printed without torch.
    """
    verb = VERBS[args.verb]
    if verb.prints:
        return _print(verb, args)
    _set_up_logging(quiet=args.quiet, verbose=args.verbose, token=args.token)
    from dq.core.progress import without_loading_bars  # tqdm reads settings at its import

    with without_loading_bars():
        if isinstance(verb.action, Job):
            execute(args)
            return 0
        check_flags(args)
        return verb.action(args) or 0


def _print(verb: Verb, args: argparse.Namespace) -> int:
    assert not isinstance(verb.action, Job)
    try:
        verb.action(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _set_up_logging(*, quiet: bool, verbose: bool, token: str | None) -> None:
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(handlers=[LogHandler(sys.stderr)], level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(Redaction(token))
    # read by libraries at their import
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    if quiet or verbose:
        os.environ["TQDM_DISABLE"] = "1"
    elif not sys.stderr.isatty():  # a log file gets lines, unless the user wants bars
        os.environ.setdefault("TQDM_DISABLE", "1")
    log.setLevel(logging.WARNING if quiet or rank else logging.DEBUG if verbose else logging.INFO)

    def show(message: Warning | str, *_: object) -> None:
        log.warning("note: %s", message)

    warnings.showwarning = show  # type: ignore[assignment]  # one line, without the source line that raised it
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def execute(args: argparse.Namespace) -> None:
    """Run a verb that works on images."""
    from dq.cli.hub import check_push
    from dq.core.files import is_same_folder
    from dq.core.locks import locked
    from dq.core.trackers import end_trackers

    began = time.perf_counter()
    verb = VERBS[args.verb]
    config = resolve(args)
    check_flags(args)
    check_push(args, config)
    if verb.without_config and not args.config:
        verb.without_config(config)
        return
    folder = Path(attrgetter(verb.folder)(config))
    if is_same_folder(config.source.path, folder):
        raise InputError(f"{folder} holds the images themselves; choose another folder to write to, as --output_dir")
    job = verb.sets_action if verb.sets_action and scores_sets(args) else verb.action
    assert isinstance(job, Job)
    call = _open_call(args, job, config, began)
    _warn_of_slow_dtypes(verb, call)
    checked = job.check(call) if job.checks_counts or not args.like else Checked()
    if args.dry_run:
        text = job.plan(call, checked)  # in every process, as they agree on dtypes
        if call.accelerator.is_main_process:
            print(text)
        return
    with locked(folder, call.accelerator, call.config.cache_dir):
        try:
            job.work(call, checked)
        finally:
            end_trackers(call.accelerator)


def _open_call(args: argparse.Namespace, job: Job, config: RunConfig, began: float) -> Call:
    """Start the processes, open the images, and fill in settings that depend on them."""
    from dq.core.processes import check_launch, hardware_line, make_accelerator
    from dq.core.trackers import check_trackers
    from dq.data.load import load_source
    from dq.run.planning.plan import like_source

    check_trackers(config.report_to)
    if job.check_settings:
        job.check_settings(config)
    accelerator = make_accelerator(cpu=args.cpu, share_gpus=args.share_gpus)
    if not accelerator.is_main_process:
        log.setLevel(logging.WARNING)
    log.info("%s", hardware_line(accelerator))
    if note := check_launch(accelerator):
        log.warning("note: %s", note)
    with accelerator.main_process_first():  # one process fills the data set library's own cache
        source = like_source(args.like) if args.like else load_source(config.source)
    call = Call(args, config, source, accelerator, began)
    return dataclasses.replace(call, config=job.fill(call)) if job.fill else call


def _warn_of_slow_dtypes(verb: Verb, call: Call) -> None:
    """Log one note on slow dtypes that the user named in sections that the verb reads."""
    from dq.config.dtypes import slow_dtypes

    unread = () if verb.trains else ("train_teachers", "prior")
    if note := slow_dtypes(call.config, call.accelerator.device, without=unread):
        log.warning("note: %s", note)
