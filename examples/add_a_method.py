"""A method of refinement of your own: one settings class, one class with the formula, one registry entry.

    python examples/add_a_method.py --ipc 2

Unsharp masking, x <- clip(x + amount (x - blur(x))), as a stage. It is planned, saved after every step, continued
after a kill, recorded with the set and shown in the report, as the stages of the package are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from dq import DistillPipeline, MethodConfig, load_source
from dq.config import validation
from dq.config.kinds import Positive, Whole
from dq.config.refinement import RefineConfig
from dq.refine.method import Batch, Context, Cost, Method, Needs, Refined, Resources, Session, State
from dq.refine.registry import METHODS

CODEC = Path(__file__).parents[1] / "checkpoints" / "cifar10" / "vae"


@validation.settings
class Sharpen(RefineConfig):
    """Settings of unsharp masking; in YAML `refine: [{stage: sharpen, amount: 0.2}]`."""

    stage: Annotated[Literal["sharpen"], Field(description="method of refinement")] = "sharpen"
    steps: Annotated[Whole, Field(description="steps")] = 3
    amount: Annotated[Positive, Field(description="share of the difference to the blurred image that is added")] = 0.2


class SharpenMethod(Method):
    """Unsharp masking of each image."""

    config = Sharpen

    def needs(self, stage: Sharpen) -> Needs:
        return Needs(teachers=False)

    def cost(self, stage: Sharpen, context: Context) -> Cost:
        return Cost(stage.steps, 1)

    def run(self, batch: Batch, stage: Sharpen, resources: Resources, session: Session) -> Refined:
        x, trace, first = batch.images, torch.zeros(stage.steps, 1), 0
        if session.resume:  # killed before: go on behind the last saved step
            x, trace, first = session.resume.tensors["x"], session.resume.tensors["trace"], session.resume.steps
        for step in range(first, stage.steps):
            blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
            sharper = (x + stage.amount * (x - blurred)).clamp(0, 1)
            trace[step] = (sharper - x).abs().mean()
            x = sharper
            session.step(step)
            session.save(State({"x": x, "trace": trace}, {}, step + 1))
        return Refined(x, trace, ("mean change of pixels",))


METHODS["sharpen"] = SharpenMethod()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="sklearn:digits")
    parser.add_argument("--ipc", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/example-method"))
    args = parser.parse_args()

    pipe = DistillPipeline.from_pretrained(CODEC)
    distilled = pipe.distill(
        load_source(args.data),
        ipc=args.ipc,
        resolution=32,
        image_size=16,
        output_dir=args.out / "run",
        cache_dir=args.out / "cache",
        method=MethodConfig(representative="real", weights="sqrt"),
        refine=[Sharpen(steps=3, amount=0.3)],
    )
    contrast = float(torch.std(distilled.images_uint8().float()))
    print(distilled, f"standard deviation of pixels {contrast:.1f}")


if __name__ == "__main__":
    main()
