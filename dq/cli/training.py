"""Verbs that train networks on the images, and the report of a prior."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from dq.cli.jobs import Call, Checked, Job
from dq.core.errors import InputError

if TYPE_CHECKING:
    from dq.config.dtypes import Dtypes
    from dq.config.schema import CodecConfig, RunConfig
    from dq.core.model_files import ModelFiles
    from dq.diffusion.latents import LatentCache


def plan(call: Call, checked: Checked) -> str:
    from dq.run.planning.plan import plan_training

    return plan_training(call.verb, call.config, call.source)


# --- priors -------------------------------------------------------------------------------------------------------


def check_codec(call: Call) -> Checked:
    """Check whether `train-codec` can train on these images."""
    from dq.diffusion.prior.recipe import finished
    from dq.diffusion.prior.train_codec import prepare_codec

    config = call.config
    if not _is_remote(call, _check_prior(call, config.prior.codec.init)):
        finished(prepare_codec(call.source, config.codec, config.prior)[0])
    return Checked()


def check_denoiser(call: Call) -> Checked:
    """Check whether `train-denoiser` can train on these images."""
    from dq.diffusion.codec import latent_shape, load_codec
    from dq.diffusion.latents import latents_key
    from dq.diffusion.prior import train_denoiser
    from dq.diffusion.prior.denoiser_recipe import denoiser_recipe
    from dq.diffusion.prior.recipe import finished

    config, source = call.config, call.source
    files = _check_prior(call, config.codec.path)
    if _is_remote(call, files):
        return Checked()
    if files is None:
        raise InputError("no codec is named; set codec.path to an autoencoder, e.g. one made by `dq train-codec`")
    c = prior_codec(call)[0]
    codec = load_codec(c.path, subfolder=c.subfolder, revision=c.revision, dtype=c.dtype, files=files)
    shape = latent_shape(codec, c.resolution)
    train_denoiser.check_denoiser(config.prior, shape, len(source.class_names), codec)
    key = latents_key(source, codec, c, config.seed)
    finished(denoiser_recipe(key, codec, config.prior, source.class_names, call.accelerator))
    return Checked()


def _check_prior(call: Call, model: str | None) -> ModelFiles | None:
    """Check the folders of a prior, and open the model that it is trained from."""
    from dq.core.files import check_place
    from dq.core.model_files import open_model

    check_place(call.config.prior.output_dir, "prior.output_dir")
    check_place(call.config.cache_dir, "cache_dir", reads=True)
    return open_model(model) if model else None


def _is_remote(call: Call, files: ModelFiles | None) -> bool:
    """Whether a dry run, which downloads nothing, would have to fetch a model."""
    return bool(call.args.dry_run) and files is not None and not (files.local or files.cached)


def prior_codec(call: Call) -> tuple[CodecConfig, Dtypes]:
    """The codec whose latents a denoiser is trained on, and its dtypes.

    `dtype: auto` is that of the prior's folder, else that of latents in the cache. Nothing is written.
    """
    from dq.config.dtypes import RECORD, folder_dtypes, resolve_dtypes
    from dq.diffusion.latents import cached_dtype

    config, source = call.config, call.source
    c, folder = config.codec, Path(config.prior.output_dir)
    begun = any((folder / name).exists() for name in (RECORD, "transformer", ".training-denoiser"))
    dtypes = folder_dtypes(folder, call.accelerator, begun="float32" if begun else None)
    if c.dtype == "auto" and not begun:
        dtypes["inference"] = cached_dtype(config.cache_dir, source, c, config.seed, dtypes["inference"])
    return resolve_dtypes(c, dtypes), dtypes


def train_codec(call: Call, checked: Checked | None = None) -> Path:
    """Train the autoencoder of a prior, and return its folder."""
    from dq.diffusion.prior.train_codec import train_codec

    _start_trackers(call, call.config.prior.output_dir)
    return train_codec(call.source, call.config.codec, call.config.prior, accelerator=call.accelerator)


def train_denoiser(call: Call, checked: Checked | None = None) -> Path:
    """Train the denoiser of a prior, and return its folder.

    Images whose latents the cache lacks are encoded first.
    """
    from dq.config.dtypes import record_dtypes
    from dq.core.processes import assign_units
    from dq.diffusion.codec import load_codec
    from dq.diffusion.latents import encode_source, open_cache
    from dq.diffusion.prior.train_denoiser import train_denoiser

    config, source, accelerator = call.config, call.source, call.accelerator
    _start_trackers(call, config.prior.output_dir)
    check_denoiser(call)
    c, dtypes = prior_codec(call)
    accelerator.wait_for_everyone()
    if config.codec.dtype == "auto":
        record_dtypes(Path(config.prior.output_dir), dtypes, main=accelerator.is_main_process)
    codec = load_codec(c.path, subfolder=c.subfolder, revision=c.revision, dtype=c.dtype, device=accelerator.device)
    local_units = functools.partial(assign_units, rank=accelerator.process_index, world_size=accelerator.num_processes)

    def encoded(flip: bool) -> LatentCache:
        cache = open_cache(config.cache_dir, source, codec, c, config.seed, flip=flip)
        main = accelerator.is_main_process
        encode_source(source, codec, cache, c, seed=config.seed, local_units=local_units, main=main)
        return cache

    cache = encoded(flip=False)
    flipped = encoded(flip=True) if config.prior.denoiser.flip else None
    accelerator.wait_for_everyone()
    return train_denoiser(
        cache, codec, config.prior, flipped=flipped, class_names=source.class_names, accelerator=accelerator
    )


def _start_trackers(call: Call, folder: str) -> None:
    from dq.config.reader import to_dict
    from dq.core.trackers import start_trackers

    start_trackers(call.accelerator, call.config.report_to, to_dict(call.config), Path(folder))


def _train_codec_verb(call: Call, checked: Checked) -> None:
    print(train_codec(call))


def _train_denoiser_verb(call: Call, checked: Checked) -> None:
    print(train_denoiser(call))


# --- report of a prior --------------------------------------------------------------------------------------------


def _check_report_settings(config: RunConfig) -> None:
    from dq.run.prior_report import check_prior_report

    check_prior_report(config)


def check_report(call: Call) -> Checked:
    """Check whether a prior can be measured on these images, and open it."""
    from dq.config.methods import check_methods
    from dq.diffusion.prior.quality import checked_counts
    from dq.run.checks import check_teachers, open_generator
    from dq.run.folder import check_folder, settle_dtypes

    source = call.source
    _check_report_settings(call.config)
    config = settle_dtypes(with_codec_of_model(call.config), source, call.accelerator)[0]
    check_methods(config)
    check_folder(config, source)
    checked_counts(source, config.prior_report)
    check_teachers(config.teachers, len(source.class_names), config.image_size)
    pipe, _ = open_generator(config, fetch=not call.args.dry_run)
    if pipe is not None:
        generate = dataclasses.replace(config.generate, mode="dit")
        pipe.check_inputs(generate, config.codec.resolution, source.class_names)
    return Checked(pipe)


def with_codec_of_model(config: RunConfig) -> RunConfig:
    """Settings with the codec in the folder of `generate.model`, unless `codec.path` is set."""
    from dq.config.overrides import apply_settings

    return config if config.codec.path else apply_settings(config, {"codec.path": config.generate.model})


def plan_report(call: Call, checked: Checked) -> str:
    from dq.run.planning.plan import plan_prior_report

    return plan_prior_report(call.config, call.source)


def report_prior(call: Call, checked: Checked) -> None:
    """Measure a prior, and print the table and the paths of the report."""
    from dq.core.text import markdown_table
    from dq.diffusion.card import quality_table
    from dq.run.prior_report import report_prior

    assert checked.pipe is not None, "opened by check_report"
    config = with_codec_of_model(call.config)
    records = report_prior(config, call.source, checked.pipe, accelerator=call.accelerator)
    if records:
        print(markdown_table(*quality_table(records)))
        for name in ("prior_quality.csv", "prior_report.html"):
            print(Path(config.output_dir) / name)


# --- teachers, pools, experts -------------------------------------------------------------------------------------


def check_teachers(call: Call) -> Checked:
    from dq.networks.train_teachers import check_teacher_training

    check_teacher_training(call.config, call.source, call.accelerator)
    return Checked()


def train_teachers(call: Call, checked: Checked) -> None:
    from dq.networks.train_teachers import train_teachers

    for folder in train_teachers(call.config, call.source, accelerator=call.accelerator):
        print(folder)


def check_pool(call: Call) -> Checked:
    from dq.networks.train_pool import check_pool

    check_pool(call.config, call.source, call.accelerator)
    return Checked()


def train_pool(call: Call, checked: Checked) -> None:
    from dq.networks.train_pool import train_pool

    print(train_pool(call.config, call.source, accelerator=call.accelerator))


def check_experts(call: Call) -> Checked:
    from dq.networks.train_experts import check_expert_training

    check_expert_training(call.config, call.source, call.accelerator)
    return Checked()


def train_experts(call: Call, checked: Checked) -> None:
    from dq.networks.train_experts import train_experts

    print(train_experts(call.config, call.source, accelerator=call.accelerator))


TRAIN_CODEC = Job(check_codec, plan, _train_codec_verb)
TRAIN_DENOISER = Job(check_denoiser, plan, _train_denoiser_verb)
PRIOR_REPORT = Job(check_report, plan_report, report_prior, check_settings=_check_report_settings)
TRAIN_TEACHERS = Job(check_teachers, plan, train_teachers)
TRAIN_POOL = Job(check_pool, plan, train_pool)
TRAIN_EXPERTS = Job(check_experts, plan, train_experts)
