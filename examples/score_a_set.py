"""Score a set of any origin beside real images, by fresh students of a named protocol.

    python examples/score_a_set.py SET DATA --protocol classic --student convnet3 --seeds 3

SET may be a set of dq, a folder CLASS/*.png, Parquet, .safetensors or .npz. Interrupted, it continues where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dq import evaluate, load_set, load_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set")
    parser.add_argument("data", nargs="?", default="sklearn:digits")
    parser.add_argument("--protocol", default="classic", help="a name that `dq ls` prints")
    parser.add_argument("--student", default="convnet3w32", help="a network by name")
    parser.add_argument("--seeds", type=int, default=3, help="students per set")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/example-scores"))
    args = parser.parse_args()

    source = load_source(args.data, test_share=0.2)
    distilled = load_set(args.set, source.class_names)
    result = evaluate(
        distilled,
        source,
        protocol=args.protocol,
        students=[args.student],
        n_seeds=args.seeds,
        epochs=args.epochs,
        baselines=["random", "nearest"],
        image_size=distilled.images.shape[-1],
        output_dir=args.out,
    )
    print(result)
    result.to_pandas().to_csv(args.out / "scores.csv", index=False)


if __name__ == "__main__":
    main()
