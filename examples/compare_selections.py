"""Which real images make the best small set? Sets of several rules of selection, saved and scored side by side.

    python examples/compare_selections.py DATA --ipc 10 --rules random herding k-center facility

Images are compared by their pixels at 8 px here; features of a trained network, (n, d), are better for photos.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch.nn.functional as F

from dq import evaluate, load_source, select
from dq.data.images import read_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="sklearn:digits")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--rules", nargs="+", default=["random", "herding", "k-center", "facility"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--image_size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/example-selections"))
    args = parser.parse_args()

    source = load_source(args.data, test_share=0.2)
    pixels, _, _ = read_images(source.train, range(len(source.train)), args.image_size, source.preprocess)
    features = F.interpolate(pixels.float() / 255, size=8, mode="area").flatten(1)
    for rule in args.rules:
        chosen = select(rule, source, args.ipc, image_size=args.image_size, features=features)
        chosen.save(args.out / "sets", f"ipc{args.ipc}-{rule}")
        result = evaluate(
            chosen,
            source,
            students=["convnet3w32"],
            n_seeds=args.seeds,
            epochs=args.epochs,
            baselines=[],
            image_size=args.image_size,
            output_dir=args.out / rule,
        )
        print(rule, result.to_pandas()["last_mean"].round(3).tolist())


if __name__ == "__main__":
    main()
