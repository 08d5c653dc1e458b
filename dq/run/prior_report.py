"""`dq prior-report`: measure a prior; write its table, page and card."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dq.config.prior import PriorReportConfig
from dq.config.reader import dump_config, to_dict
from dq.config.schema import RunConfig
from dq.core.errors import InputError
from dq.core.figures import save_image
from dq.core.files import write_json, write_text
from dq.core.plain import PlainDict
from dq.core.processes import assign_units
from dq.data.grid import image_grid
from dq.data.images import read_images
from dq.data.source import ImageSource
from dq.diffusion.card import QUALITY, check_card, protocol_text, quality_table, write_card
from dq.diffusion.generator import LatentGenerator
from dq.diffusion.prior.curves import draw_curves
from dq.diffusion.prior.quality import PriorQuality, measure_prior, plan_draw
from dq.diffusion.prior.samples import stored_samples
from dq.evaluation.results import to_csv
from dq.networks.real_data import RealData, load_real_data
from dq.run.folder import open_run
from dq.run.pages import write_page
from dq.run.sections.gallery import MAX_CLASSES

if TYPE_CHECKING:
    from accelerate import Accelerator


log = logging.getLogger("dq")

NEAREST_ROWS = 3  # of pairs in the grid of samples and train images


def check_prior_report(config: RunConfig) -> None:
    """Whether a prior can be measured under this configuration.

    Raises:
        InputError: without a prior or a teacher, or if a card is asked for where none can be written.
        RunError: if the card would replace one that was not written by dq.
    """
    if config.generate.model is None:
        raise InputError("no prior is named; set generate.model to its folder, e.g. what `dq train-denoiser` made")
    if not config.teachers:
        raise InputError("a prior is measured in the features of a teacher; set teachers, e.g. by `dq train-teachers`")
    if _wants_card(config.prior_report):
        check_card(config.generate.model)


def report_prior(
    config: RunConfig, source: ImageSource, pipe: LatentGenerator, *, accelerator: Accelerator
) -> list[PlainDict]:
    """Measure a prior, and write its report.

    The run folder `config.output_dir` gets `prior_quality.csv`, `prior_quality.jsonl` and `prior_report.html`; the
    prior's folder gets `quality.json`, and a card where the settings describe its data.

    Guidance scales are divided over processes. Samples are kept under `prior_samples/`: the same call again draws
    only what is missing.

    Returns:
        The records of the table in the main process, nothing in the others.

    Raises:
        InputError: see `check_prior_report`, `plan_draw` and `measure_prior`.
    """
    check_prior_report(config)
    run = open_run(config, source, accelerator)
    began = time.perf_counter()
    settings, resolution = config.prior_report, config.codec.resolution
    pipe.to(run.device)
    pipe.set_progress_bar_config(disable=True)
    real_data = load_real_data(
        source,
        config.image_size,
        cache_dir=Path(config.cache_dir),
        device=run.device,
        teachers=config.teachers,
    )
    generate = dataclasses.replace(config.generate, mode="dit")
    draw = plan_draw(pipe, real_data, settings, generate, resolution=resolution, seed=config.seed)
    samples = run.folder / "prior_samples"
    for i in assign_units([1.0] * len(settings.guidance), accelerator.process_index, accelerator.num_processes):
        stored_samples(draw, settings.guidance[i], samples, main=run.main)
    accelerator.wait_for_everyone()
    quality = None
    if run.main:
        quality = measure_prior(draw, real_data, settings, resolution=resolution, folder=samples)
        _write(config, real_data, quality, pipe.digest("dit"))
    run.finish("prior-report", began, images=sum(draw.counts) * len(settings.guidance))
    return quality.records if quality else []


def _write(config: RunConfig, real_data: RealData, quality: PriorQuality, digest: str) -> None:
    folder, prior, settings = Path(config.output_dir), Path(str(config.generate.model)), config.prior_report
    how = {
        "prior": digest,
        "data": real_data.source.fingerprint,
        "teachers": [t.digest for t in real_data.teachers],
        "settings": {k: v for k, v in to_dict(settings).items() if k not in ("data", "license", "command", "shown")},
    }
    write_text(folder / "prior_quality.csv", to_csv(quality.records))
    write_text(folder / "prior_quality.jsonl", "".join(json.dumps(r | how) + "\n" for r in quality.records))
    if (prior / "transformer").is_dir():
        write_json(prior / QUALITY, {"records": quality.records, **how})
    if _wants_card(settings):
        write_card(prior, data_name=settings.data, license=settings.license, command=settings.command)
    _write_page(config, real_data, quality)


def _wants_card(settings: PriorReportConfig) -> bool:
    return bool(settings.data or settings.license or settings.command)


# --- the page -----------------------------------------------------------------------------------------------------


def _write_page(config: RunConfig, real_data: RealData, quality: PriorQuality) -> None:
    folder, shown = Path(config.output_dir), config.prior_report.shown
    figures = folder / "figures"
    samples, nearest = {}, {}
    for g, images in quality.samples.items():
        samples[f"{g:g}"] = path = figures / f"prior-samples-{g:g}.png"
        save_image(image_grid(_by_class(images, quality.labels, shown), scale=_scale(images)), path)
    for g, images in quality.samples.items():
        nearest[f"{g:g}"] = path = figures / f"prior-nearest-{g:g}.png"
        save_image(image_grid(_pairs(real_data, quality, g, shown), scale=_scale(images)), path)
    losses = figures / "prior-losses.png"
    write_page(
        folder / "prior_report.html",
        "prior_report.html",
        title="quality of a prior",
        quality=quality_table(quality.records),
        protocol=protocol_text(quality.records),
        samples=samples,
        nearest=nearest,
        losses=losses if draw_curves(Path(str(config.generate.model)) / "metrics.jsonl", losses) else None,
        settings=dump_config(config),
    )


def _scale(images: Tensor) -> int:
    return max(1, round(64 / images.shape[-1]))


def _by_class(images: Tensor, labels: Tensor, columns: int) -> list[list[Tensor]]:
    rows = [images[labels == c][:columns] for c in labels.unique().tolist()]
    return [list(row) for row in rows[:MAX_CLASSES]]


def _pairs(real_data: RealData, quality: PriorQuality, g: float, columns: int) -> list[list[Tensor]]:
    """Rows of samples and train images in turn, by distance."""
    order = quality.distances[g].argsort(stable=True)[: NEAREST_ROWS * columns]
    rows = quality.closest[g][order].tolist()
    real, _, _ = read_images(real_data.source.train, rows, real_data.image_size, real_data.source.preprocess)
    flat = torch.stack([quality.samples[g][order], real], 1).flatten(0, 1)
    return [list(row) for row in flat.split(2 * columns)]
