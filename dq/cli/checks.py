"""What a verb would refuse, before it does anything: the verb itself and its dry run go through the same checks."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq.cli.parser import SHIPPED
from dq.config.overrides import apply_settings
from dq.config.schema import RunConfig
from dq.core.errors import InputError
from dq.core.files import is_same_folder

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dq.config.dtypes import Dtypes
    from dq.config.schema import CodecConfig
    from dq.data.source import ImageSource
    from dq.diffusion.generator import LatentGenerator


@dataclass(frozen=True)
class Checked:
    """What the checks of a verb have opened, so that it is not opened twice."""

    pipe: LatentGenerator | None = None
    unknown: list[str] = field(default_factory=list)  # why a plan has no generator
    sets: dict[str, Any] = field(default_factory=dict)  # of --distilled, by name


def scores_sets(args: argparse.Namespace) -> bool:
    """Whether the verb scores sets of any origin, rather than those of a run."""
    return args.verb == "evaluate" and bool(args.distilled or not args.config or args.protocol == "ddr")


def check_verb(args: argparse.Namespace, config: RunConfig, source: ImageSource, accelerator: Accelerator) -> Checked:
    """Check all that can be known before the first unit of work.

    Raises:
        InputError, RunError: what the verb itself would end in.
    """
    from dq.run.checks import check_plan, check_run

    if args.like:  # counts without images: a plan for another machine
        training = args.verb.startswith("train-") or args.verb == "prior-report" or scores_sets(args)
        return Checked() if training else Checked(*check_plan(config, source, accelerator))
    if args.verb in ("train-codec", "train-denoiser"):
        check_prior_training(args.verb, config, source, accelerator, fetch=not args.dry_run)
        return Checked()
    if args.verb == "train-teachers":
        from dq.networks.train_teachers import check_teacher_training

        check_teacher_training(config, source, accelerator)
        return Checked()
    if args.verb == "train-pool":
        from dq.networks.train_pool import check_pool

        check_pool(config, source, accelerator)
        return Checked()
    if args.verb == "train-experts":
        from dq.networks.train_experts import check_expert_training

        check_expert_training(config, source, accelerator)
        return Checked()
    if args.verb == "prior-report":
        return Checked(pipe=_check_report(config, source, accelerator, fetch=not args.dry_run))
    if scores_sets(args):
        return Checked(sets=_check_sets(args, config, source))
    if args.verb == "demo":  # it trains its own prior
        check_prior_training("train-codec", config, source, accelerator)
    untrained = []
    if args.verb in SHIPPED:
        from dq.run.recipe import untrained_selector

        teacher = untrained_selector(config, source, accelerator)
        untrained = [teacher] if teacher else []
    if args.verb == "demo" and not (Path(config.prior.output_dir) / "model_index.json").is_file():
        from dq.run.checks import check_counts
        from dq.run.folder import check_folder, check_methods, settle_dtypes
        from dq.run.stages.evaluate import check_evaluation
        from dq.run.stages.prune import check_pruning

        check_methods(config)
        check_folder(settle_dtypes(config, source, accelerator)[0], source)
        check_counts(config, source)
        check_pruning(config, source)
        check_evaluation(config, source)
        return Checked(unknown=["the prior is not trained yet"])
    verb = "run" if args.verb in SHIPPED else args.verb
    pipe, unknown = check_run(
        config, source, verb, accelerator=accelerator, fetch=not args.dry_run, untrained=untrained
    )
    if pipe is None and not unknown and args.dry_run:  # a stage that needs no generator; the plan is of the whole run
        pipe, unknown = check_plan(config, source, accelerator)
    return Checked(pipe, unknown)


def check_prior_training(
    verb: str, config: RunConfig, source: ImageSource, accelerator: Accelerator, *, fetch: bool = True
) -> None:
    """Whether `train-codec` or `train-denoiser` can train on these images.

    Args:
        fetch: whether models of the Hub that are not in its cache may be downloaded; if not they are only looked up.
    """
    from dq.core.files import check_place
    from dq.core.model_files import open_model
    from dq.diffusion.prior.training import finished

    check_place(config.prior.output_dir, "prior.output_dir")
    check_place(config.cache_dir, "cache_dir", reads=True)
    init = config.prior.codec.init if verb == "train-codec" else config.codec.path
    files = open_model(init) if init else None
    if files is not None and not fetch and not (files.local or files.cached):
        return
    if verb == "train-codec":
        from dq.diffusion.prior.train_codec import prepare_codec

        finished(prepare_codec(source, config.codec, config.prior)[0])
        return
    from dq.diffusion.codec import latent_shape, load_codec
    from dq.diffusion.latents import latents_key
    from dq.diffusion.prior.denoiser_recipe import denoiser_recipe
    from dq.diffusion.prior.train_denoiser import check_denoiser

    if files is None:
        raise InputError("no codec is named; set codec.path to an autoencoder, e.g. one made by `dq train-codec`")
    c = prior_codec(config, source, accelerator)[0]
    codec = load_codec(c.path, subfolder=c.subfolder, revision=c.revision, dtype=c.dtype, files=files)
    check_denoiser(config.prior, latent_shape(codec, c.resolution), len(source.class_names), codec)
    key = latents_key(source, codec, c, config.seed)
    finished(denoiser_recipe(key, codec, config.prior, source.class_names, accelerator))


def prior_codec(config: RunConfig, source: ImageSource, accelerator: Accelerator) -> tuple[CodecConfig, Dtypes]:
    """The codec whose latents a denoiser is trained on, without `dtype: auto`, which is kept in the prior's folder, or
    else that of latents in the cache; and what auto stands for. Nothing is written."""
    from dq.config.dtypes import RECORD, folder_dtypes, resolve_dtypes
    from dq.diffusion.latents import cached_dtype

    c, folder = config.codec, Path(config.prior.output_dir)
    begun = any((folder / name).exists() for name in (RECORD, "transformer", ".training-denoiser"))
    dtypes = folder_dtypes(folder, accelerator, begun="float32" if begun else None)
    if c.dtype == "auto" and not begun:
        dtypes["inference"] = cached_dtype(config.cache_dir, source, c, config.seed, dtypes["inference"])
    return resolve_dtypes(c, dtypes), dtypes


def with_codec_of_model(config: RunConfig) -> RunConfig:
    """Without `codec.path`, the codec is the one that lies in the folder of `generate.model`."""
    return config if config.codec.path else apply_settings(config, {"codec.path": config.generate.model})


def _check_report(
    config: RunConfig, source: ImageSource, accelerator: Accelerator, *, fetch: bool
) -> LatentGenerator | None:
    from dq.diffusion.prior.metrics import checked_counts
    from dq.run.checks import check_teachers, open_generator
    from dq.run.folder import check_folder, check_methods, settle_dtypes
    from dq.run.prior_report import check_prior_report

    check_prior_report(config)
    config = settle_dtypes(with_codec_of_model(config), source, accelerator)[0]
    check_methods(config)
    check_folder(config, source)
    checked_counts(source, config.prior_report)
    check_teachers(config.teachers, len(source.class_names), config.image_size)
    pipe, _ = open_generator(config, fetch=fetch)
    if pipe is not None:
        generate = dataclasses.replace(config.generate, mode="dit")
        pipe.check_inputs(generate, config.codec.resolution, source.class_names)
    return pipe


def _check_sets(args: argparse.Namespace, config: RunConfig, source: ImageSource) -> dict[str, Any]:
    """The sets named with --distilled, by name."""
    from dq.core.files import check_place
    from dq.evaluation.dd_ranking import check_ddr
    from dq.evaluation.evaluate import check_sets
    from dq.run.checks import check_teachers
    from dq.run.folder import holds_work

    if args.protocol == "ddr" and (args.ipc or not args.distilled):
        raise InputError("ddr scores sets named with --distilled PATH, against as many random images; leave --ipc out")
    if (Path(config.output_dir) / "config.yaml").is_file() and holds_work(Path(config.output_dir)):
        raise InputError(f"{config.output_dir} is a run, whose results would be replaced; choose another --output_dir")
    check_place(config.output_dir, "output_dir")
    check_place(config.cache_dir, "cache_dir", reads=True)
    if not args.distilled and not args.ipc:
        raise InputError(
            "name the sets to score with --distilled PATH, or a run with --config FILE, or say by --ipc for how many "
            "images per class baselines are to be measured"
        )
    sets = _read_sets(args, config, source)
    options: Any = {"config": config.evaluate, "teachers": config.teachers, "image_size": config.source.image_size}
    if args.protocol == "ddr":
        side = check_ddr(sets, source, **options)
    else:
        ipcs = config.ipc if args.ipc else ()
        side = check_sets(sets, source, **options, ipcs=ipcs, difficulty=config.prune)[0]
    check_teachers(config.teachers, len(source.class_names), side)
    return sets


def _read_sets(args: argparse.Namespace, config: RunConfig, source: ImageSource) -> dict[str, Any]:
    from dq.distilled.external import load_set

    sets = {}
    for text in args.distilled:
        name, sep, path = text.partition("=")
        path = path if sep else text
        name = name if sep else (Path(path).stem if Path(path).suffix else Path(path).name)
        if name in sets:
            raise InputError(f"two sets are called {name!r}; name them with --distilled NAME=PATH")
        if is_same_folder(path, config.output_dir):
            raise InputError(f"{config.output_dir} is the set {name!r} itself; choose another --output_dir")
        sets[name] = load_set(
            path,
            source.class_names,
            image_size=config.source.image_size,
            label_kind=args.label_kind,
            on_bad_image=source.on_bad_image,
        )
    return sets
