"""Verbs of the command line: help, options, settings and functions of each.

Modules of these functions import torch and settings within them, so that help is printed at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dq.cli import hub, runs, scoring, settings_verbs, training
from dq.cli.jobs import Job

if TYPE_CHECKING:
    from dq.config.schema import RunConfig

RUN_SETTINGS = "seed ipc source codec prune cluster generate refine methods teachers evaluate"
STAGE_OPTIONS = "config data output_dir cache_dir seed ipc set cpu share report_to plan timings"
TRAIN_OPTIONS = "config data output_dir cache_dir seed set cpu plan"


@dataclass(frozen=True)
class Verb:
    """What a verb does and reads."""

    about: str
    example: str  # without "dq VERB"
    options: str = STAGE_OPTIONS  # groups of options
    settings: str = RUN_SETTINGS  # settings and sections that it reads
    needs_config: bool = False
    action: Job | Callable[[argparse.Namespace], int | None] = runs.STAGE  # on images, or a function that opens none
    prints: bool = False  # whether it prints a result at once, and logs nothing
    plans: bool = False  # whether it ends with its plan, as --dry-run does
    preset: str | None = None  # configuration of the package that it begins with
    folder: str = "output_dir"  # setting of the folder that it writes to
    seed: str = "seed"  # setting of its seed
    sets_action: Job | None = None  # in place of `action` where the options name sets of any origin
    without_config: Callable[[RunConfig], None] | None = None  # in place of `action` where no --config is given

    @property
    def trains(self) -> bool:
        """Whether networks are trained before or without a run."""
        return self.preset is not None or self.folder != "output_dir"


VERBS = {
    "run": Verb(
        "all stages: encode, prune, cluster, generate, refine, label, evaluate, report",
        "--config cifar10_ddoq --data DIR --ipc 1,10 --set codec.path=DIR teachers.0.path=FILE",
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
        sets_action=scoring.SCORING,
    ),
    "report": Verb(
        "write report.html from what the run folder holds",
        "--output_dir runs/dq",
        STAGE_OPTIONS.replace("report_to ", ""),
        "output_dir; with --config all that `dq run` reads",
        without_config=runs.report_results,
    ),
    "push": Verb(
        "push the sets of a run, or a folder of sets, a pipeline or a teacher, to the Hugging Face Hub",
        "runs/dq/dataset --repo_id my-set --license cc-by-4.0",
        "push config output_dir set hub",
        "hub output_dir",
        action=hub.push_verb,
    ),
    "pull": Verb(
        "copy sets, a pipeline or a teacher from the Hugging Face Hub to a folder",
        "owner/my-set --output_dir sets",
        "pull output_dir",
        "",
        action=hub.pull_verb,
    ),
    "export": Verb(
        "write the images of a set as PNG files by class, and their weights as CSV",
        "runs/mine/dataset/ipc10-recommended --output_dir images",
        "export output_dir",
        "",
        action=hub.export_verb,
    ),
    "distill": Verb(
        "the recommended recipe: a small set of the images in DATA, drawn by a prior of them if there is one, scored",
        "photos --ipc 10 --output_dir runs/mine",
        f"folder prior image_size epochs {STAGE_OPTIONS.removeprefix('config data ')} hub push_to_hub",
        f"{RUN_SETTINGS} train_teachers hub report_to",
        action=runs.DISTILL,
        preset="recommended",
    ),
    "init": Verb(
        "write the settings with which `dq distill DATA` runs, as a YAML file to change and run",
        "photos mine.yaml --ipc 10 --output_dir runs/mine",
        "folder settings_file prior image_size epochs output_dir cache_dir seed ipc set cpu",
        f"{RUN_SETTINGS} train_teachers",
        action=runs.INIT,
        plans=True,
        preset="recommended",
    ),
    "demo": Verb(
        "digits from scikit-learn: train a small prior, distill, evaluate; no download",
        "--output_dir runs/demo",
        f"{STAGE_OPTIONS.removeprefix('config ')} hub push_to_hub",
        f"{RUN_SETTINGS} prior train_teachers hub report_to",
        action=runs.DEMO,
        preset="demo",
    ),
    "train-codec": Verb(
        "train a small autoencoder on the source",
        "--config configs/cifar10_prior.yaml --data DIR --set prior.codec.steps=500",
        f"{TRAIN_OPTIONS} report_to",
        "source codec prior",
        needs_config=True,
        action=training.TRAIN_CODEC,
        folder="prior.output_dir",
        seed="prior.seed",
    ),
    "train-denoiser": Verb(
        "train a small class-conditional DiT on the source's latents",
        "--config configs/cifar10_prior.yaml --data DIR --set prior.denoiser.size=8M",
        f"{TRAIN_OPTIONS} report_to",
        "source codec prior",
        needs_config=True,
        action=training.TRAIN_DENOISER,
        folder="prior.output_dir",
        seed="prior.seed",
    ),
    "prior-report": Verb(
        "measure a trained prior: samples against real images, copies, a page and a card",
        "--config configs/cifar10_prior.yaml --data DIR --set prior_report.per_class=50",
        TRAIN_OPTIONS,
        "seed source codec generate teachers prior prior_report",
        needs_config=True,
        action=training.PRIOR_REPORT,
    ),
    "train-teachers": Verb(
        "train classifiers on the source, which label or score images later",
        "--data DIR --set train_teachers.nets=resnet18 source.image_size=32",
        f"{TRAIN_OPTIONS} share",
        "source train_teachers evaluate.validation_images",
        action=training.TRAIN_TEACHERS,
        folder="train_teachers.output_dir",
        seed="train_teachers.seed",
    ),
    "train-pool": Verb(
        "make a pool of weak teachers for Teddy: early checkpoints, or pruned copies of a trained network",
        "--data DIR --set train_pool.net=resnet18 source.image_size=32",
        f"{TRAIN_OPTIONS} share",
        "source train_teachers train_pool evaluate.validation_images",
        action=training.TRAIN_POOL,
        folder="train_pool.output_dir",
        seed="train_teachers.seed",
    ),
    "train-experts": Verb(
        "train networks on the source and keep their parameters after every epoch, to be matched",
        "--config configs/cifar10_trajectory.yaml --data DIR --dry-run",
        f"{TRAIN_OPTIONS} share",
        "source train_experts evaluate.validation_images",
        action=training.TRAIN_EXPERTS,
        folder="train_experts.output_dir",
        seed="train_experts.seed",
    ),
    "doctor": Verb(
        "look at packages, devices, disks and Hub, say what a run would use and what is wrong",
        "--config run.yaml --json",
        "doctor config data output_dir cache_dir set cpu report_to",
        f"{RUN_SETTINGS} report_to",
        action=settings_verbs.doctor_verb,
    ),
    "config": Verb(
        "print the reference of all settings, or explain one: key, type, bound, default, help",
        "cluster.n_iter",
        "key",
        "",
        action=settings_verbs.config_verb,
        prints=True,
    ),
    "validate": Verb(
        "check a configuration file: keys, types, bounds, rules between settings, students, overrides",
        "run.yaml --set ipc=5",
        "file set",
        "",
        action=settings_verbs.validate_verb,
        prints=True,
    ),
    "ls": Verb(
        "list configurations, protocols and presets that come with the package",
        "",
        "",
        "",
        action=settings_verbs.ls_verb,
        prints=True,
    ),
    "cp": Verb(
        "copy a configuration or protocol that comes with the package",
        "cifar10_ddoq run.yaml",
        "copy",
        "",
        action=settings_verbs.cp_verb,
        prints=True,
    ),
    "completion": Verb(
        "print a script that lets a shell complete this command",
        "bash",
        "shell",
        "",
        action=settings_verbs.completion_verb,
        prints=True,
    ),
}
