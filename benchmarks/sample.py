"""Images per second of `DistillPipeline.synthesize` against stock `DiTPipeline`.

Checkpoint, scheduler, steps and images are the same, without guidance and with it.

    python benchmarks/sample.py [--model DIR] [--images 100] [--steps 4] [--csv results/sample.csv]

Stock runs in two ways: class by class, as its users do, in batches no larger than ours, and in our very batches. Both
start from noise (ours: strength 1 from points at zero, so that the images are the same up to the signal that the first
step has; the largest difference is printed). Stock has null class 1000 written into it: with guidance it gets a copy
of the model whose label tables are padded to 1001 rows, the last of which is the null class.

Without --model: a random DiT of 10 M parameters on 8x8 latents. On a GPU also bfloat16, and that with torch.compile
for ours. On the CPU the time is the processor's, which other programs on the machine do not lengthen. The ratio is
that of throughputs, ours over stock's: above 1 class by class, and within the noise of 1 in the same batches, because
nearly all of the time is the model's.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding

from dq.config.schema import GenerateConfig
from dq.core.devices import default_device
from dq.core.seeds import generator
from dq.diffusion.codec import DTYPES
from dq.run.distill import DistillPipeline

STOCK_NULL = 1000
GUIDANCE = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    diffusers.utils.logging.disable_progress_bar()
    device = args.device
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or random_model(Path(folder))
        plans = [("float32", False)]
        if device.type == "cuda":
            plans += [("bfloat16", False), ("bfloat16", True)]
        for dtype, compiled in plans:
            for scale in (1.0, GUIDANCE):
                rows += measure(model, args, device, dtype, compiled, scale)
    for row in rows:
        print(", ".join(f"{k} {v}" for k, v in row.items()))
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as f:
            arguments = [a if "/" not in a else Path(a).name for a in sys.argv[1:]]
            print("# python benchmarks/sample.py", *arguments, file=f)
            where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
            print(f"# {where}, {torch.get_num_threads()} threads, torch {torch.__version__}", file=f)
            writer = csv.DictWriter(f, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def measure(
    model: Path, args: argparse.Namespace, device: torch.device, dtype: str, compiled: bool, scale: float
) -> list[dict[str, object]]:
    ours = DistillPipeline.from_pretrained(model, dtype=DTYPES[dtype]).to(device)
    stock = DiTPipeline.from_pretrained(model, dtype=DTYPES[dtype]).to(device)
    if scale > 1:
        pad_labels(stock.transformer)
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    classes = int(ours.transformer.config.num_embeds_ada_norm)
    names = [str(c) for c in range(classes)]
    shape = (ours.transformer.config.in_channels, *[ours.transformer.config.sample_size] * 2)
    labels = [i * classes // args.images for i in range(args.images)]  # class after class
    if compiled:
        ours.transformer.compile()
    config = GenerateConfig(
        mode="dit", num_inference_steps=args.steps, snr=None, strength=1.0, guidance_scale=scale, dtype=dtype
    )

    def seeds(rows: list[int]) -> list[torch.Generator]:
        return [generator(0, "benchmark", r) for r in rows]

    def run_ours(rows: list[int]) -> torch.Tensor:
        points = torch.zeros(len(rows), *shape)
        chosen = [labels[r] for r in rows]
        return ours.synthesize(points, chosen, seeds(rows), config, class_names=names)

    def run_stock(rows: list[int]) -> torch.Tensor:
        output = stock(
            [labels[r] for r in rows],
            guidance_scale=scale,
            num_inference_steps=args.steps,
            generator=seeds(rows),
            output_type="np",
        )
        return torch.from_numpy(output.images).permute(0, 3, 1, 2)

    everything = list(range(args.images))
    batches = split(everything, args.batch_size)
    by_class = [b for c in range(classes) for b in split([r for r in everything if labels[r] == c], args.batch_size)]
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "dq": lambda: torch.cat([run_ours(b) for b in batches]),
        "stock, class by class": lambda: torch.cat([run_stock(b) for b in by_class]),
        "stock, same batches": lambda: torch.cat([run_stock(b) for b in batches]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    images: dict[str, torch.Tensor] = {}
    for _ in range(args.rounds + 1):  # in turn; the first round warms up
        for name, generate_all in ways.items():
            began = clock()
            images[name] = generate_all()
            seconds[name].append(clock() - began)
    median = {name: statistics.median(s[1:]) for name, s in seconds.items()}
    facts = {"guidance": scale, "dtype": dtype, "compiled": compiled}
    return ratios(args, facts, median, images)


def ratios(
    args: argparse.Namespace, facts: dict[str, object], median: dict[str, float], images: dict[str, torch.Tensor]
) -> list[dict[str, object]]:
    """Rows that compare `dq` with stock, of median seconds and images (N, 3, D, D) by name."""
    return [
        {
            "model": args.model.name if args.model else "random DiT",
            **facts,
            "images": args.images,
            "steps": args.steps,
            "batch": args.batch_size,
            "against": name,
            "dq_images_per_s": round(args.images / median["dq"], 2),
            "stock_images_per_s": round(args.images / median[name], 2),
            "ratio": round(median[name] / median["dq"], 3),
            "largest_difference": round(float((images[name] - images["dq"]).abs().max()), 4),
        }
        for name in median
        if name != "dq"
    ]


def split(rows: list[int], size: int) -> list[list[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def pad_labels(transformer: DiTTransformer2DModel) -> None:
    """Extend every label table to 1001 rows in place, with the null class last."""
    classes = int(transformer.config.num_embeds_ada_norm)
    if classes >= STOCK_NULL:
        return
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            old = module.embedding_table
            new = torch.nn.Embedding(STOCK_NULL + 1, old.embedding_dim).to(old.weight)
            with torch.no_grad():
                new.weight[:classes] = old.weight[:classes]
                new.weight[STOCK_NULL] = old.weight[classes]
            module.embedding_table = new


def random_model(folder: Path) -> Path:
    """Save a random pipeline of a DiT of 10 M parameters for ten classes.

    It has 8x8 latents of 16 px images.
    """
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler).save_pretrained(folder / "random")
    return folder / "random"


if __name__ == "__main__":
    main()
