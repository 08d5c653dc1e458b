"""Verbs of the command line: what each does, the options and settings that it reads, and an example."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")
LABEL_KINDS = ("logits", "probabilities", "regression")
RUN_SETTINGS = "seed ipc source codec prune cluster generate refine methods teachers evaluate"
STAGE_OPTIONS = "config data output_dir cache_dir seed ipc set cpu report_to plan timings"
TRAIN_OPTIONS = "config data output_dir cache_dir seed set cpu plan"


@dataclass(frozen=True)
class Verb:
    """What a verb does and reads."""

    about: str
    example: str  # without "dq VERB"
    options: str = STAGE_OPTIONS  # groups of options
    settings: str = RUN_SETTINGS  # settings and sections that it reads
    needs_config: bool = False


VERBS = {
    "run": Verb(
        "all stages: encode, prune, cluster, generate, refine, label, evaluate, report",
        "--config cifar10_ddoq --data DIR --ipc 1,10 --set codec.path=DIR",
        f"{STAGE_OPTIONS} hub push_to_hub",
        f"{RUN_SETTINGS} hub report_to",
        needs_config=True,
    ),
    "encode": Verb(
        "encode the images of every class into the latent cache",
        "--config run.yaml --data DIR",
        settings="seed ipc source codec",
        needs_config=True,
    ),
    "prune": Verb(
        "score the difficulty of the train images, and say how many of a class each policy keeps",
        "--config configs/cifar10_prune.yaml --ipc 1,10 --set prune.score=forgetting",
        settings="seed ipc source prune methods",
        needs_config=True,
    ),
    "cluster": Verb(
        "quantize every class: prototypes and their masses",
        "--config run.yaml --set cluster.engine=torch cluster.n_iter=50",
        settings="seed ipc source codec prune cluster methods teachers",
        needs_config=True,
    ),
    "generate": Verb(
        "draw the prototypes as images, refine them and assemble the sets",
        "--config run.yaml --set generate.mode=dit generate.model=runs/prior",
        settings="seed ipc source codec prune cluster generate refine methods teachers",
        needs_config=True,
    ),
    "refine": Verb(
        "put the drawn images through the stages of refinement: FADRM, Teddy, FRePo, trajectories",
        "--config configs/cifar10_frepo.yaml --data DIR",
        settings="seed ipc source codec prune cluster generate refine methods teachers",
        needs_config=True,
    ),
    "label": Verb(
        "label images and views with the teachers and assemble the sets",
        "--config run.yaml --set teachers.0.path=runs/teachers/resnet20",
        needs_config=True,
    ),
    "evaluate": Verb(
        "train fresh students on the sets of a run, or on any set (--distilled), and on baselines",
        "--data DIR --distilled set/ --protocol classic --student convnet3 --seeds 3",
        f"evaluate {STAGE_OPTIONS}",
        "seed ipc source teachers prune evaluate; with --config all that `dq run` reads",
    ),
    "report": Verb(
        "write report.html from what the run folder holds",
        "--output_dir runs/dq",
        STAGE_OPTIONS.replace("report_to ", ""),
        "output_dir; with --config all that `dq run` reads",
    ),
    "push": Verb(
        "push the sets of a run, or a folder of sets, a pipeline or a teacher, to the Hugging Face Hub",
        "runs/dq/dataset --repo_id my-set --license cc-by-4.0",
        "push config output_dir set hub",
        "hub output_dir",
    ),
    "pull": Verb(
        "copy sets, a pipeline or a teacher from the Hugging Face Hub to a folder",
        "owner/my-set --output_dir sets",
        "pull output_dir",
        "",
    ),
    "distill": Verb(
        "the recommended recipe: a small set of the images in DATA, drawn by a diffusion prior, selected and scored",
        "cifar10 --prior checkpoints/cifar10 --ipc 10 --output_dir runs/mine",
        "folder prior output_dir cache_dir seed ipc set cpu report_to plan timings hub push_to_hub",
        f"{RUN_SETTINGS} train_teachers hub report_to",
    ),
    "demo": Verb(
        "digits from scikit-learn: train a small prior, distil, evaluate; no download",
        "--output_dir runs/demo",
        f"{STAGE_OPTIONS.removeprefix('config ')} hub push_to_hub",
        f"{RUN_SETTINGS} prior train_teachers hub report_to",
    ),
    "train-codec": Verb(
        "train a small autoencoder on the source",
        "--config configs/cifar10_prior.yaml --data DIR --set prior.codec.steps=500",
        f"{TRAIN_OPTIONS} report_to",
        "source codec prior",
        needs_config=True,
    ),
    "train-denoiser": Verb(
        "train a small class-conditional DiT on the source's latents",
        "--config configs/cifar10_prior.yaml --data DIR --set prior.denoiser.size=8M",
        f"{TRAIN_OPTIONS} report_to",
        "source codec prior",
        needs_config=True,
    ),
    "prior-report": Verb(
        "measure a trained prior: samples against real images, copies, a page and a card",
        "--config configs/cifar10_prior.yaml --data DIR --set prior_report.per_class=50",
        TRAIN_OPTIONS,
        "seed source codec generate teachers prior prior_report",
        needs_config=True,
    ),
    "train-teachers": Verb(
        "train classifiers on the source, which label or score images later",
        "--data DIR --set train_teachers.nets=resnet18 source.image_size=32",
        TRAIN_OPTIONS,
        "source train_teachers evaluate.validation_images",
    ),
    "train-pool": Verb(
        "make a pool of weak teachers for Teddy: early checkpoints, or pruned copies of a trained network",
        "--data DIR --set train_pool.net=resnet18 source.image_size=32",
        TRAIN_OPTIONS,
        "source train_teachers train_pool evaluate.validation_images",
    ),
    "train-experts": Verb(
        "train networks on the source and keep their parameters after every epoch, to be matched",
        "--config configs/cifar10_trajectory.yaml --data DIR --dry-run",
        TRAIN_OPTIONS,
        "source train_experts evaluate.validation_images",
    ),
    "doctor": Verb(
        "look at packages, devices, disks and Hub, say what a run would use and what is wrong",
        "--config run.yaml --json",
        "doctor config data output_dir cache_dir set cpu report_to",
        f"{RUN_SETTINGS} report_to",
    ),
    "config": Verb(
        "print the reference of all settings, or explain one: key, type, bound, default, help",
        "cluster.n_iter",
        "key",
        "",
    ),
    "validate": Verb(
        "check a configuration file: keys, types, bounds, rules between settings, students, overrides",
        "run.yaml --set ipc=5",
        "file set",
        "",
    ),
    "ls": Verb("list configurations, protocols and presets that come with the package", "", "", ""),
    "cp": Verb("copy a configuration or protocol that comes with the package", "cifar10_ddoq run.yaml", "copy", ""),
    "completion": Verb("print a script that lets a shell complete this command", "bash", "shell", ""),
}
# verbs that start no run, and print a result at once
PRINTS = ("config", "validate", "ls", "cp", "completion")
# values of options that a verb does not offer
ABSENT: dict[str, Any] = dict.fromkeys(
    (
        *("config", "data", "output_dir", "cache_dir", "seed", "ipc", "report_to", "speeds", "save_speeds"),
        *("processes", "like", "token", "protocol", "prior"),
    )
)
ABSENT |= {"set": [], "cpu": False, "dry_run": False, "quiet": False, "verbose": False}


def add_options(p: argparse.ArgumentParser, verb: str) -> None:
    """The options that a verb reads."""
    p.set_defaults(**ABSENT)
    for group in VERBS[verb].options.split():
        GROUPS[group](p)
    if verb not in PRINTS:
        loudness = p.add_mutually_exclusive_group()
        loudness.add_argument("--quiet", action="store_true", help="warnings and results only")
        loudness.add_argument("--verbose", action="store_true", help="lines for finished units, not bars")


def _option(parser: argparse.ArgumentParser, name: str, **kwargs: Any) -> None:
    """An option that may be written with underscores or hyphens."""
    parser.add_argument(name, *({name.replace("_", "-").replace("---", "--")} - {name}), **kwargs)


def _config(p: argparse.ArgumentParser) -> None:
    p.add_argument("--config", metavar="FILE", help="YAML file, or the name of a configuration of `dq ls`")


def _data(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", metavar="DIR", help="the image set: folder, Hub id or sklearn:digits (source.path)")


def _folder(p: argparse.ArgumentParser) -> None:
    p.add_argument("data", metavar="DATA", help="the image set: folder, Hub id or sklearn:digits (source.path)")


def _prior(p: argparse.ArgumentParser) -> None:
    text = "pipeline folder or Hub id of a class-conditional DiT, e.g. of `dq train-denoiser` (generate.model)"
    p.add_argument("--prior", metavar="FOLDER", help=text)


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
    _option(p, "--image_size", type=int, help="side in px at which students train")
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
    **{"ipc": _ipc, "set": _set, "cpu": _cpu, "report_to": _report_to, "plan": _plan, "timings": _timings},
    **{"evaluate": _evaluate, "hub": _hub, "push_to_hub": _push_to_hub, "push": _push, "pull": _pull},
    **{"folder": _folder, "prior": _prior},
    **{"doctor": _doctor, "key": _key, "file": _file, "copy": _copy, "shell": _shell},
}
