"""Options of the command line, in groups of which a verb has several."""

from __future__ import annotations

import argparse
from typing import Any

from dq.core.plain import PlainDict

SHELLS = ("bash", "zsh", "tcsh")
LABEL_KINDS = ("logits", "probabilities", "regression")
# values of options that a verb does not offer
ABSENT: PlainDict = dict.fromkeys(
    (
        *("config", "data", "output_dir", "cache_dir", "seed", "ipc", "report_to", "speeds", "save_speeds"),
        *("processes", "like", "token", "protocol", "prior", "epochs", "image_size"),
    )
)
ABSENT |= {"set": [], "cpu": False, "share_gpus": False, "dry_run": False, "quiet": False, "verbose": False}


def add_options(p: argparse.ArgumentParser, groups: str, *, loudness: bool = True) -> None:
    """Add groups of options by their names, and --quiet and --verbose where there is a log."""
    p.set_defaults(**ABSENT)
    for group in groups.split():
        GROUPS[group](p)
    if loudness:
        choice = p.add_mutually_exclusive_group()
        choice.add_argument("--quiet", action="store_true", help="warnings and results only")
        choice.add_argument("--verbose", action="store_true", help="lines for finished units, not bars")


def _option(parser: argparse.ArgumentParser, name: str, **kwargs: Any) -> None:
    """An option that may be written with underscores or hyphens."""
    parser.add_argument(name, *({name.replace("_", "-").replace("---", "--")} - {name}), **kwargs)


def _config(p: argparse.ArgumentParser) -> None:
    p.add_argument("--config", metavar="FILE", help="YAML file, or the name of a configuration of `dq ls`")


def _data(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", metavar="DIR", help="the image set: folder, Hub id or sklearn:digits (source.path)")


def _folder(p: argparse.ArgumentParser) -> None:
    p.add_argument("data", metavar="DATA", help="the image set: folder, Hub id or sklearn:digits (source.path)")


def _settings_file(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", metavar="FILE", help="where to write the settings; must not exist")


def _prior(p: argparse.ArgumentParser) -> None:
    text = (
        "pipeline folder or Hub id of a class-conditional DiT, e.g. of `dq train-denoiser` (generate.model); none: "
        "real images; default: a prior of these classes that comes with dq, else none"
    )
    p.add_argument("--prior", metavar="FOLDER", help=text)


def _epochs(p: argparse.ArgumentParser) -> None:
    p.add_argument("--epochs", type=int, metavar="N", help="passes of every student over its set (evaluate.students)")


def _image_size(p: argparse.ArgumentParser) -> None:
    _option(p, "--image_size", type=int, metavar="N", help="side in px of distilled images, at which students train")


def _output_dir(p: argparse.ArgumentParser) -> None:
    _option(p, "--output_dir", metavar="DIR", help="the folder to write to")


def _cache_dir(p: argparse.ArgumentParser) -> None:
    _option(p, "--cache_dir", metavar="DIR", help="where latents and full-data baselines are kept for all runs")


def _seed(p: argparse.ArgumentParser) -> None:
    p.add_argument("--seed", type=int, help="the seed")


def _ipc(p: argparse.ArgumentParser) -> None:
    p.add_argument("--ipc", metavar="N[,N]", help="images per class, e.g. 1,10,50")


def _set(p: argparse.ArgumentParser) -> None:
    text = "any setting by its dotted name, e.g. source.image_size=32; see `dq config`"
    p.add_argument("--set", action="append", nargs="+", default=[], metavar="KEY=VALUE", help=text)


def _cpu(p: argparse.ArgumentParser) -> None:
    p.add_argument("--cpu", action="store_true", help="stay on the CPU even if an accelerator is there")


def _share(p: argparse.ArgumentParser) -> None:
    text = "let more processes than GPUs share them, for stages of small networks"
    _option(p, "--share_gpus", action="store_true", help=text)


def _report_to(p: argparse.ArgumentParser) -> None:
    trackers = "send settings and numbers to trackio, tensorboard or wandb (report_to)"
    _option(p, "--report_to", action="append", metavar="NAME[,NAME]", help=trackers)


def _plan(p: argparse.ArgumentParser) -> None:
    _option(p, "--dry_run", action="store_true", help="print the plan, and stop")
    text = "with --dry-run: plan for cifar10, imagenet-1k, imagenet-21k or CLASSESxIMAGES"
    p.add_argument("--like", metavar="SET", help=text)


def _timings(p: argparse.ArgumentParser) -> None:
    p.add_argument("--speeds", metavar="FILE", help="speeds measured before, instead of now; a run tells what is left")
    _option(p, "--save_speeds", metavar="FILE", help="with --dry-run: keep the measured speeds in a JSON file")
    p.add_argument("--processes", type=int, metavar="N", help="with --dry-run: plan for N processes")


def _evaluate(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--distilled",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="a set of any origin: a set's or run's folder, images by class, Parquet, .safetensors, .npz; repeatable",
    )
    p.add_argument("--protocol", help="preset of `dq ls`: classic, frepo, hard, sre2l, ...; or ddr: DD-Ranking")
    p.add_argument("--student", action="append", metavar="NET", help="a network by name; may be repeated")
    p.add_argument("--labels", metavar="KIND[,KIND]", help="hard, fixed, soft: a column of the table for each")
    p.add_argument("--dataset", help="whose published settings of the protocol to take, e.g. cifar100")
    p.add_argument("--teacher", action="append", metavar="NET=PATH", help="who labels views; may be repeated")
    p.add_argument(
        "--baselines", metavar="NAME[,NAME]", help="random, herding, ...; see `dq config evaluate.baselines`"
    )
    p.add_argument("--seeds", type=int, help="students per set")
    _image_size(p)
    text = "what the label vectors of the sets are, where they do not say it themselves"
    _option(p, "--label_kind", choices=LABEL_KINDS, help=text)


def _hub(p: argparse.ArgumentParser) -> None:
    _token(p)
    for name in ("--repo_id", "--hub_model_id"):
        _option(p, name, dest="repo_id", metavar="REPO", help="repository: name, or owner/name")
    p.add_argument("--private", action="store_true", default=None, help="make the repository private")
    p.add_argument("--license", metavar="ID", help="of what is pushed, e.g. cc-by-4.0")
    _option(p, "--create_pr", action="store_true", default=None, help="open a pull request")
    _option(p, "--commit_message", metavar="TEXT", help="the first line of the commit")


def _token(p: argparse.ArgumentParser) -> None:
    p.add_argument("--token", help="of the Hub; better HF_TOKEN or `hf auth login`, which no list of processes shows")
    p.add_argument("--revision", help="branch, tag or commit; a push makes a branch that is not there")


def _push_to_hub(p: argparse.ArgumentParser) -> None:
    _option(p, "--push_to_hub", action="store_true", help="push the sets at the end")


def _push(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", nargs="?", metavar="FOLDER", help="what to push, in place of the run of --config")
    p.add_argument("--only", metavar="NAME[,NAME]", help="sets by name, e.g. ipc10-ddoq; default: all")


def _export(p: argparse.ArgumentParser) -> None:
    p.add_argument("set_path", metavar="SET", help="a set's or run's folder, or a repository of sets")
    p.add_argument("--name", metavar="SET", help="one set of several")
    _token(p)


def _pull(p: argparse.ArgumentParser) -> None:
    p.add_argument("repo", metavar="REPO", help="repository: owner/name")
    p.add_argument("--name", metavar="SET", help="one set of it; default: all")
    _token(p)


def _doctor(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print the report as JSON")


def _key(p: argparse.ArgumentParser) -> None:
    p.add_argument("key", nargs="?", metavar="KEY", help="a setting or a section by its dotted name; default: all")


def _file(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", metavar="FILE", help="YAML file, or the name of a configuration of `dq ls`")


def _copy(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", metavar="NAME", help="a name of `dq ls`")
    p.add_argument("file", metavar="FILE", help="where to copy it; must not exist")


def _shell(p: argparse.ArgumentParser) -> None:
    p.add_argument("shell", choices=SHELLS)


GROUPS = {
    **{"config": _config, "data": _data, "output_dir": _output_dir, "cache_dir": _cache_dir, "seed": _seed},
    **{"ipc": _ipc, "set": _set, "cpu": _cpu, "share": _share, "report_to": _report_to},
    **{"plan": _plan, "timings": _timings},
    **{"evaluate": _evaluate, "hub": _hub, "push_to_hub": _push_to_hub, "push": _push, "pull": _pull},
    **{"export": _export},
    **{
        "folder": _folder,
        "settings_file": _settings_file,
        "prior": _prior,
        "epochs": _epochs,
        "image_size": _image_size,
    },
    **{"doctor": _doctor, "key": _key, "file": _file, "copy": _copy, "shell": _shell},
}
