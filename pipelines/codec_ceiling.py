"""Upper bound of a codec: PSNR and teacher accuracy of reconstructed images.

No set decoded by it can be better.

    python pipelines/codec_ceiling.py --data DIR --codecs DIR [DIR ...] --teacher FILE --csv results/codec_ceiling.csv

Images go up to `--resolution` px, through the codec (latents stored as float16, as in a run), and back to their size.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from pathlib import Path

import torch
from collect_results import command_line

from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError, RunError
from dq.core.progress import progress
from dq.data.images import read_images
from dq.data.load import load_source
from dq.diffusion.codec import decode_latents, encode_latents, load_codec, to_signed, to_unit
from dq.networks.teacher_loading import load_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--codecs", nargs="+", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--net", default="resnet56")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    source = load_source(args.data)
    rows = range(min(args.images, len(source.test)))
    labels = torch.from_numpy(source.test.labels[list(rows)])
    small, _, _ = read_images(source.test, rows, args.size, "crop")
    large, _, _ = read_images(source.test, rows, args.resolution, "crop")
    teacher = load_teacher(TeacherConfig(net=args.net, path=args.teacher), len(source.class_names), args.size)

    def accuracy(images: torch.Tensor) -> float:
        return float((teacher.logits(images).argmax(1) == labels).double().mean())

    table = [{"codec": "none", "dtype": "", "resolution": args.size, "images": len(rows), "psnr_db": "",
              "teacher_accuracy": round(accuracy(small), 4)}]  # fmt: skip
    for path in args.codecs:
        for dtype in args.dtypes:
            codec = load_codec(path, dtype=dtype)
            parts = []
            with torch.inference_mode():
                for batch in progress(large.split(64), desc=f"{Path(path).name} {dtype}", unit="batch"):
                    z = encode_latents(codec, to_signed(batch)).half().float()
                    parts.append((to_unit(decode_latents(codec, z), args.size) * 255).round().to(torch.uint8))
            back = torch.cat(parts)
            error = ((back.float() - small.float()) / 255).square().mean((1, 2, 3)).clamp(min=1e-10)
            table.append(
                {
                    "codec": Path(path).name,
                    "dtype": dtype,
                    "resolution": args.resolution,
                    "images": len(rows),
                    "psnr_db": round(float((-10 * error.log10()).mean()), 2),
                    "teacher_accuracy": round(accuracy(back), 4),
                }
            )
    for row in table:
        print(row)
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as f:
            f.write(f"{command_line(__file__)}  ({platform.machine()}, torch {torch.__version__})\n")
            writer = csv.DictWriter(f, fieldnames=list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError) as e:
        sys.exit(f"codec_ceiling: {e}")
