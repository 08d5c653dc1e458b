"""Throughput of the encode stage against a loop over preloaded tensors.

The stage reads, decodes, resizes, encodes and stores; model and batch are the same.

    python benchmarks/encode.py [--data DIR] [--codec DIR] [--images 1500] [--csv results/encode.csv]

Without arguments: digits and a small random AutoencoderKL. The ratio should be at least 0.9.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from dq.config.schema import CodecConfig, SourceConfig
from dq.core.devices import default_device, resolve_dtype
from dq.data.images import read_images
from dq.data.load import load_source
from dq.data.source import ImageSource, Split
from dq.diffusion.codec import encode_latents, load_codec, to_signed
from dq.diffusion.latents import encode_source, open_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sklearn:digits")
    parser.add_argument("--codec")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    dtype = resolve_dtype(args.dtype, args.device, "inference")
    source_config, config = SourceConfig(path=args.data), CodecConfig(resolution=args.resolution, dtype=dtype)
    full = load_source(source_config)
    # two classes of equal size, so that the stage does what it does on a real set
    rows = [int(r) for c in (0, 1) for r in full.rows_of_class(c)[: args.images // 2]]
    part = Split(full.train.labels[rows], lambda i: full.train.read(rows[i]), "train")
    source = ImageSource({"train": part}, full.class_names[:2], full.fingerprint, args.data)
    with tempfile.TemporaryDirectory() as folder:
        codec = load_codec(args.codec or random_codec(Path(folder)), dtype=dtype, device=args.device)
        images, _, _ = read_images(part, range(len(part)), args.resolution, "crop")
        codec_only, stage = [], []
        for r in range(args.rounds + 1):  # in turn; the first round warms up
            began = time.perf_counter()
            with torch.inference_mode():
                for batch in images.split(config.batch_size):
                    encode_latents(codec, to_signed(batch)).cpu()  # which waits for the device
            codec_only.append(time.perf_counter() - began)
            cache = open_cache(f"{folder}/{r}", source, codec, config, 0)
            stage.append(encode_source(source, codec, cache, config, seed=0))
    a, b = statistics.median(codec_only[1:]), statistics.median(stage[1:])
    row = {
        "data": args.data.rsplit("/", 1)[-1],
        "codec": (args.codec or "random AutoencoderKL").rsplit("/", 1)[-1],
        "resolution": args.resolution,
        "device": next(codec.parameters()).device.type,
        "dtype": dtype,
        "images": len(rows),
        "bare_images_per_s": round(len(rows) / a, 1),
        "stage_images_per_s": round(len(rows) / b, 1),
        "ratio": round(a / b, 3),
    }
    print(", ".join(f"{k} {v}" for k, v in row.items()))
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as f:
            f.write(f"# python {' '.join(sys.argv)}  ({platform.machine()}, {torch.get_num_threads()} threads)\n")
            writer = csv.DictWriter(f, fieldnames=list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerow(row)


def random_codec(folder: Path) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    ).save_pretrained(folder / "codec")
    return folder / "codec"


if __name__ == "__main__":
    main()
