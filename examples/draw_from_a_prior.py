"""Draw images of classes from a diffusion prior, as with any pipeline of diffusers.

    python examples/draw_from_a_prior.py images.png --prior checkpoints/fashion-mnist --classes 0 1 8

A row is a class, a column a draw. `dq train-codec` and `dq train-denoiser` make a prior of your own images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from dq import DistillPipeline

PRIOR = Path(__file__).parents[1] / "checkpoints" / "fashion-mnist"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=Path("images.png"))
    parser.add_argument("--prior", default=str(PRIOR), help="folder or Hub id of a DiT pipeline")
    parser.add_argument("--classes", type=int, nargs="+", default=[0, 1, 8])
    parser.add_argument("--per_class", type=int, default=6)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    pipe = DistillPipeline.from_pretrained(args.prior)
    images = pipe(
        class_labels=[label for label in args.classes for _ in range(args.per_class)],
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.steps,
        generator=torch.manual_seed(0),
    ).images
    width, height = images[0].size
    sheet = Image.new("RGB", (width * args.per_class, height * len(args.classes)))
    for i, image in enumerate(images):
        sheet.paste(image, (i % args.per_class * width, i // args.per_class * height))
    sheet.save(args.file)
    print(args.file)


if __name__ == "__main__":
    main()
