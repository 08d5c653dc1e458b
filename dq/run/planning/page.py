"""Cost of the report, and of what precedes the first stage."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from dq.config.schema import RunConfig
from dq.core.figures import new_figure, save_figure, save_image
from dq.core.text import plural
from dq.run.planning.clock import Speed, random_pixels, timed
from dq.run.planning.costs import StagePlan
from dq.run.planning.sets import PlannedSet
from dq.run.report import MAX_GALLERIES
from dq.run.sections.gallery import MAX_CLASSES, MAX_COLUMNS
from dq.run.sections.quantization import MAX_POINTS

START, FIGURE, PICTURE = "start", "figure", "picture"  # operations
BEFORE, AFTER = "start-up", "report"  # stages


def page_speeds(side: int, device: torch.device) -> dict[str, Speed]:
    """Speeds of drawing a figure of the report, and of writing an image of this side (px) as PNG."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "figure.png"
        points = torch.linspace(0, 1, MAX_POINTS).numpy()

        def draw(number: int) -> None:
            for _ in range(number):
                figure = new_figure(7, 6)
                figure.subplots().scatter(points, points, s=3)
                save_figure(figure, file)

        def write(pixels: torch.Tensor) -> None:
            for image in pixels:
                save_image(Image.fromarray(image.permute(1, 2, 0).numpy()), file)

        pictures = timed(write, 16, device=device, prepare=lambda n: random_pixels(n, side))
        return {FIGURE: timed(draw, 1, device=device), PICTURE: pictures}


def start_plan() -> StagePlan:
    """Imports, opening of the images and loading of models, in every process."""
    return StagePlan(BEFORE, "imports, images, models", each={START: 1})


def report_plan(config: RunConfig, sets: Sequence[PlannedSet], classes: int) -> StagePlan:
    """Figures and images of `report.html`, which the main process writes."""
    shown = sets[:MAX_GALLERIES]
    rows = min(classes, MAX_CLASSES)
    pictures = sum(rows * min(s.ipc, MAX_COLUMNS) for s in shown)
    most = min(max((s.ipc for s in shown), default=0), MAX_COLUMNS)
    real = 2 * rows * most  # nearest and random ones, beside one set
    panels = len(config.ipc) * len(config.evaluate.students)
    figures = len({s.points for s in sets if s.ipc > 1}) + panels + 1
    units = f"{plural(figures, 'figure')}, {plural(pictures + real, 'image')}"
    each: dict[str, float] = {FIGURE: figures, PICTURE: pictures + real, "read": real}
    pixels = (pictures + real) * 3 * config.image_size**2
    return StagePlan(AFTER, units, each=each, bytes=pixels * 4 / 3)  # as text in the page
