"""Distill a folder of images with any diffusers model, in Python.

    python pipelines/distill_images.py DATA MODEL --ipc 10 --output_dir runs/mine
    accelerate launch --multi_gpu --num_processes 8 pipelines/distill_images.py DATA MODEL --ipc 10

DATA is a Hub id, a Parquet folder, or a folder of images by class; MODEL a DiT, a Stable Diffusion or an autoencoder.
Prints the set, its folder and, with a test split, its accuracy beside random real images.
"""

from __future__ import annotations

import argparse
import sys

from dq import DistillPipeline, evaluate, load_source
from dq.core.errors import InputError, RunError
from dq.core.processes import make_accelerator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("model")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--output_dir", default="runs/mine")
    parser.add_argument("--epochs", type=int, default=300)
    args = parser.parse_args()

    accelerator = make_accelerator()
    source = load_source(args.data)
    pipe = DistillPipeline.from_pretrained(args.model)
    distilled = pipe.distill(
        source, ipc=args.ipc, resolution=args.resolution, output_dir=args.output_dir, accelerator=accelerator
    )
    accelerator.print(distilled, f"in {args.output_dir}/dataset")
    if accelerator.is_main_process and source.test_name is not None:
        print(evaluate(distilled, source, n_seeds=3, epochs={"default": args.epochs}))


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError) as e:
        sys.exit(f"distill_images: {e}")
