"""Peak memory of encode and cluster over Parquet shards, at 10,000 and 1,000,000 rows.

    python benchmarks/streaming.py [--rows 10000 1000000] [--csv results/streaming.csv]

Rows are 8 px PNG images of classes of 500, in random order, in files of 50,000. Every image is encoded; of the classes
up to 100 are clustered, evenly spaced. Each size has a process of its own. The ratio should be at most 1.2.
"""

from __future__ import annotations

import argparse
import csv
import io
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLASS, FILE = 500, 50_000


def write_shards(folder: Path, rows: int) -> None:
    """Parquet files as `datasets` writes them, with a few hundred different images."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features
    from datasets import Image as ImageFeature
    from PIL import Image

    rng = np.random.default_rng(0)
    images = []
    for _ in range(300):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    classes = rows // CLASS
    schema = Features(
        {"image": ImageFeature(), "label": ClassLabel(names=[f"class {i}" for i in range(classes)])}
    ).arrow_schema
    labels = rng.permutation(np.repeat(np.arange(classes), CLASS))
    folder.mkdir()
    files = -(-rows // FILE)
    for i in range(files):
        own = labels[i * FILE : (i + 1) * FILE]
        cells = [{"bytes": images[j], "path": None} for j in rng.integers(0, len(images), len(own))]
        table = pa.Table.from_arrays([pa.array(cells, schema.field(0).type), pa.array(own)], schema=schema)
        pq.write_table(table, folder / f"train-{i:05d}-of-{files:05d}.parquet", row_group_size=1000)


def walk(folder: Path) -> None:
    """Encode and cluster the set in `folder`, and print peak memory in MB and seconds."""
    import torch
    from diffusers import AutoencoderTiny

    from dq.cluster.kmeans import kmeans
    from dq.config.schema import ClusterConfig, CodecConfig
    from dq.data.load import load_source
    from dq.diffusion.latents import encode_source, open_cache

    torch.manual_seed(0)
    torch.set_num_threads(1)
    codec = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    ).eval()
    config = CodecConfig(resolution=8, batch_size=256)
    source = load_source(folder, streaming=True)
    cache = open_cache(folder / "cache", source, codec, config, 0)
    encoding = encode_source(source, codec, cache, config, seed=0, main=False)
    cache.check()
    began = time.perf_counter()
    classes = len(source.class_names)
    for c in range(0, classes, max(1, classes // 100)):
        kmeans(cache.load(c)[0].flatten(1).float(), 10, config=ClusterConfig(), seed=c)
    clustering = time.perf_counter() - began
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, encoding, clustering)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=(10_000, 1_000_000))
    parser.add_argument("--walk", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if args.walk:
        walk(args.walk)
        return
    rows = []
    for n in args.rows:
        with tempfile.TemporaryDirectory() as scratch:
            write_shards(Path(scratch) / "set", n)
            command = [sys.executable, __file__, "--walk", str(Path(scratch) / "set")]
            arguments = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peak, encoding, clustering = map(float, arguments.split())
        rows.append({"rows": n, "peak_mb": round(peak, 1), "images_per_s": round(n / encoding)})
        rows[-1] |= {"clustering_s": round(clustering, 1), "ratio": round(peak / rows[0]["peak_mb"], 3)}
        print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as f:
            f.write(f"# python {' '.join(sys.argv)}\n")
            writer = csv.DictWriter(f, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
