"""The command line: verbs over one configuration. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dq.cli.options import PRINTS
from dq.cli.parser import SHIPPED, build_parser, check_flags, resolve, sets_key
from dq.core.errors import InputError, RunError
from dq.core.redaction import Redaction, redact

log = logging.getLogger("dq")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0 when done, 1 when the run failed, 2 for bad input, 130 after Ctrl-C."""
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
        return _do(args, parser)
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


def _do(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Do what a verb says; imports are here, so that help and settings are printed without torch."""
    if args.verb == "completion":
        from dq.cli.completion import completion_script

        print(completion_script(parser, args.shell))
    elif args.verb in PRINTS:
        from dq.cli.settings_verbs import VERB_FUNCTIONS

        try:
            VERB_FUNCTIONS[args.verb](args)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has gone, such as `head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        _set_up_logging(quiet=args.quiet, verbose=args.verbose, token=args.token)
        if args.verb == "doctor":
            from dq.cli.doctor import doctor

            return doctor(resolve(args), named=args.config is not None, cpu=args.cpu, as_json=args.json)
        execute(args)
    return 0


def _warn_of_slow_dtypes(verb: str, config: Any, accelerator: Any) -> None:
    """One note on dtypes that the user named and this device is slow in, of the sections that the verb reads."""
    from dq.config.dtypes import slow_dtypes

    trained = ("train_teachers", "prior") if verb.startswith("train-") or verb in SHIPPED else ()
    others = tuple(name for name in ("train_teachers", "prior") if name not in trained)
    if note := slow_dtypes(config, accelerator.device, without=others):
        log.warning("note: %s", note)


def _set_up_logging(*, quiet: bool, verbose: bool, token: str | None) -> None:
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(Redaction(token))
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
    """Run a verb on a configuration."""
    from dq.cli.checks import check_verb
    from dq.cli.verbs import check_push, output_folder, plan_verb, pull_verb, push_verb, work
    from dq.core.files import is_same_folder

    config = resolve(args)
    check_flags(args)
    if args.verb in ("push", "pull"):
        if int(os.environ.get("RANK", "0")) == 0:
            pull_verb(args) if args.verb == "pull" else push_verb(args, config)
        return
    check_push(args, config)
    if args.verb == "report" and not args.config:
        from dq.run.report import write_results_report

        print(write_results_report(Path(config.output_dir)))
        return
    folder = output_folder(args.verb, config)
    if is_same_folder(config.source.path, folder):
        raise InputError(f"{folder} holds the images themselves; choose another folder to write to, as --output_dir")
    from dq.core.locks import locked
    from dq.core.processes import check_launch, hardware_line, make_accelerator
    from dq.core.trackers import check_trackers, end_trackers
    from dq.data.load import load_source
    from dq.run.planning.plan import like_source

    check_trackers(config.report_to)
    if args.verb == "prior-report":  # before the images are looked up
        from dq.run.prior_report import check_prior_report

        check_prior_report(config)
    accelerator = make_accelerator(cpu=args.cpu)
    if not accelerator.is_main_process:
        log.setLevel(logging.WARNING)
    log.info("%s", hardware_line(accelerator))
    if note := check_launch(accelerator):
        log.warning("note: %s", note)
    with accelerator.main_process_first():  # one process fills the data set library's own cache
        source = like_source(args.like) if args.like else load_source(config.source)
    if args.verb in SHIPPED:
        from dq.run.recipe import fill_recipe

        distill = args.verb == "distill"
        config = fill_recipe(
            config,
            source,
            resolution=distill and not sets_key(args, "codec.resolution"),
            image_size=distill and not args.like,
        )
    _warn_of_slow_dtypes(args.verb, config, accelerator)
    checked = check_verb(args, config, source, accelerator)
    if args.dry_run:
        if accelerator.is_main_process:
            print(plan_verb(args, config, source, accelerator, checked))
        return
    with locked(folder, accelerator, config.cache_dir):
        try:
            work(args, config, source, accelerator, checked)
        finally:
            end_trackers(accelerator)
