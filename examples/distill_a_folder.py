"""From a folder of class folders to a small set of its images, as PNG files.

    python examples/distill_a_folder.py DATA OUT --ipc 10

DATA is a folder CLASS/*.png (or train/CLASS/*.png), a Parquet folder, a Hub id, or sklearn:digits (default). The set
is made of the real images nearest to the points of k-means in the latents of an autoencoder, weighted by their cells.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dq import DistillPipeline, MethodConfig, load_source

CODEC = Path(__file__).parents[1] / "checkpoints" / "cifar10" / "vae"  # TAESD, for images of any kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="sklearn:digits")
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/example-set"))
    parser.add_argument("--ipc", type=int, default=10, help="images per class")
    parser.add_argument("--image_size", type=int, default=32, help="side in px")
    args = parser.parse_args()

    source = load_source(args.data, test_share=0.2)  # a fifth of every class, where there is no test split
    print(source)
    pipe = DistillPipeline.from_pretrained(CODEC)
    distilled = pipe.distill(
        source,
        ipc=args.ipc,
        resolution=max(32, -(-args.image_size // 8) * 8),
        image_size=args.image_size,
        output_dir=args.out / "run",
        cache_dir=args.out / "cache",
        method=MethodConfig(representative="real", weights="sqrt"),
    )
    print(distilled)
    print(distilled.save_images(args.out / "png"))


if __name__ == "__main__":
    main()
