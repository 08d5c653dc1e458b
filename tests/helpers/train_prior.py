"""Train a codec, and a denoiser on the latents of a codec that is there, in as many processes as `torchrun` starts.

    torchrun --nproc_per_node 2 tests/scripts/train_prior.py FOLDER

FOLDER holds images.safetensors, prior.json, one/vae and cache. The first process prints how many there were.
"""

import dataclasses
import sys
from pathlib import Path

from small_prior import CODEC, NAMES, encoded

from dq.config.prior import PriorConfig
from dq.config.reader import from_dict
from dq.core.files import read_json, read_tensors
from dq.core.processes import make_accelerator
from dq.data.load import load_source
from dq.diffusion.codec import load_codec
from dq.diffusion.prior.train_codec import train_codec
from dq.diffusion.prior.train_denoiser import train_denoiser

folder = Path(sys.argv[1])
accelerator = make_accelerator(cpu=True)
tensors, _ = read_tensors(folder / "images.safetensors")
splits = {split: (tensors[f"{split}.images"], tensors[f"{split}.labels"]) for split in ("train", "test")}
source = load_source(splits, class_names=list(NAMES))
prior = from_dict(PriorConfig, read_json(folder / "prior.json"))

train_codec(source, CODEC, dataclasses.replace(prior, output_dir=str(folder / "two")), accelerator=accelerator)
codec = load_codec(folder / "one" / "vae")
train_denoiser(
    encoded(source, folder / "cache", codec),
    codec,
    dataclasses.replace(prior, output_dir=str(folder / "two-denoiser")),
    class_names=NAMES,
    accelerator=accelerator,
)
if accelerator.is_main_process:
    print(accelerator.num_processes, "processes")
