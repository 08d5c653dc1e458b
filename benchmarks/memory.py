"""Peak memory of encode and cluster at 10,000 and 50,000 images.

The largest class is of equal size.

    python benchmarks/memory.py [--csv results/memory.csv]

The synthetic source makes every image when it is read. Both runs have classes of 1,000 images; the second has five
times as many of them. The ratio should be at most 1.15.
"""

from __future__ import annotations

import argparse
import csv
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def child(classes: int) -> None:
    """Encode and cluster `classes` x 1,000 images, then print the peak resident memory in MB."""
    import numpy as np
    import torch
    from diffusers import AutoencoderTiny

    from dq.cluster.kmeans import kmeans
    from dq.config.schema import ClusterConfig, CodecConfig
    from dq.data.source import ImageSource, Split
    from dq.diffusion.latents import encode_source, open_cache

    labels = np.repeat(np.arange(classes), 1000)

    def read(row: int) -> np.ndarray:
        return np.random.default_rng(row).integers(0, 256, (3, 32, 32), dtype=np.uint8)

    source = ImageSource(
        {"train": Split(labels, read, "train")}, tuple(map(str, range(classes))), "synthetic", "synthetic"
    )
    torch.manual_seed(0)
    codec = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=16,
    ).eval()
    config = CodecConfig(resolution=32)
    with tempfile.TemporaryDirectory() as folder:
        cache = open_cache(folder, source, codec, config, 0)
        encode_source(source, codec, cache, config, seed=0)
        for c in range(classes):
            kmeans(cache.load(c)[0].flatten(1).float(), 10, config=ClusterConfig(), seed=c)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", type=int)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    peaks = {}
    for classes in (10, 50):
        command = [sys.executable, __file__, "--child", str(classes)]
        peaks[classes * 1000] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    small, large = peaks.values()
    row = {"peak_mb_10000": round(small, 1), "peak_mb_50000": round(large, 1), "ratio": round(large / small, 3)}
    print(", ".join(f"{k} {v}" for k, v in row.items()))
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as f:
            f.write(f"# python {' '.join(sys.argv)}\n")
            writer = csv.DictWriter(f, fieldnames=list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
