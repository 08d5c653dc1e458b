"""What the applications of FRePo share: real images, distilled sets, networks trained on sets, result files."""

from __future__ import annotations

import argparse
import csv
import io
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dq.config.protocols import student_config
from dq.config.reader import to_dict
from dq.config.refinement import FRePo
from dq.core.errors import InputError
from dq.core.files import is_done, read_tensors, write_bytes, write_tensors
from dq.core.progress import progress
from dq.core.seeds import derive_seed, digest_of, digest_of_tensors
from dq.data.coresets import random_rows
from dq.data.images import read_images
from dq.data.regression_labels import centered_targets, first_labels
from dq.data.source import ImageSource, Split
from dq.data.zca import Whitening, is_gray
from dq.networks.training import TrainingSet, fit
from dq.refine.frepo import refine
from dq.refine.method import Batch, RealImages, Resources, Session, State

Set = tuple[Tensor, Tensor]  # images (n, 3, S, S), uint8 or float, and regression labels (n, C)


def count(text: str) -> int:
    """A positive whole number of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number of at least 1, not {text!r}")
    return int(text)


def options(description: str | None) -> argparse.ArgumentParser:
    """Options of both applications; their defaults are near the paper's, with FRePo's budget `standard`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder, Hub id or sklearn:digits")
    parser.add_argument("--image_size", type=count, default=32)
    parser.add_argument("--net", default="frepoconv3")
    parser.add_argument("--steps", type=count, default=20_000, help="of the distillation of a set")
    parser.add_argument("--lr", type=float, default=1e-3, help="of LAMB")
    parser.add_argument("--real_batch", type=count, default=1024)
    parser.add_argument("--student_batch", type=count, default=500)
    parser.add_argument("--student_lr", type=float, default=3e-4)
    parser.add_argument("--augment", choices=["frepo", "frepo_noflip", "none"], help="default: FRePo's for the images")
    parser.add_argument("--seeds", type=count, default=3, help="trainings of each set")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=Path, required=True, help="where distilled sets are kept")
    parser.add_argument("--csv", type=Path, required=True)
    return parser


def read_split(source: ImageSource, split: Split, size: int) -> RealImages:
    """All images of a split at `size` px."""
    images, rows, _ = read_images(split, range(len(split)), size, source.preprocess)
    return RealImages(images, torch.from_numpy(split.labels[rows]))


def take(real: RealImages, rows: Any) -> RealImages:
    """The images at some rows."""
    return RealImages(real.images[rows], real.labels[rows])


def random_images(real: RealImages, ipc: int, seed: int) -> RealImages:
    """`ipc` random images of every class, in class order."""
    return take(real, random_rows(real.labels.numpy(), ipc, seed))


def with_targets(real: RealImages, classes: int) -> Set:
    """Real images with the regression labels of their classes."""
    return real.images, first_labels(centered_targets(real.labels, classes))


def distill(start: RealImages, real: RealImages, whitening: Whitening, classes: int, args: argparse.Namespace) -> Set:
    """The set that FRePo learns from `start`, predicting `real`; kept in `args.output_dir` and not learned twice.

    A killed distillation goes on from its last saved step, bit for bit.
    """
    config = FRePo(steps=args.steps, lr=args.lr, nets=(args.net,), real_batch=args.real_batch)
    tensors = {"start": start.images, "start labels": start.labels, "real": real.images, "labels": real.labels}
    identity = digest_of([digest_of_tensors(tensors | whitening.tensors()), to_dict(config), classes])
    path = args.output_dir / f"frepo-{identity}.safetensors"
    partial = args.output_dir / f"partial-{identity}.safetensors"
    if not is_done(path):
        resume = None
        if is_done(partial):
            state, meta = read_tensors(partial)
            resume = State(state, meta["facts"], meta["steps"])
        left = range(resume.steps if resume else 0, args.steps)
        with progress(left, desc="distill", unit="step") as bar:
            session = Session(
                resume=resume,
                step=lambda _: bar.update(),
                save=lambda s: write_tensors(partial, s.tensors, {"facts": s.facts, "steps": s.steps}),
            )
            batch = Batch(start.images.float() / 255, start.labels)
            resources = Resources(start.images.shape[-1], classes, real=real, device=torch.device(args.device))
            resources.once("whitening", lambda: whitening)
            learned = refine(batch, config, resources, session)
        write_tensors(path, {"images": learned.images, "labels": learned.soft_labels})
        partial.unlink(missing_ok=True)
    stored, _ = read_tensors(path)
    return stored["images"], stored["labels"]


def train(data: Set, whitening: Whitening, steps: int, seed: int, args: argparse.Namespace) -> nn.Module:
    """Train a fresh network on a set by the protocol `frepo`, for about `steps` steps."""
    images, targets = (t.to(args.device) for t in data)
    epochs = max(1, round(steps / -(-len(images) // args.student_batch)))
    spec = {"protocol": "frepo", "net": args.net, "epochs": epochs, "warmup": epochs // 4, "dtype": "float32"}
    spec |= {"lr": args.student_lr, "batch_size": args.student_batch}
    spec["augment"] = args.augment or ("frepo_noflip" if is_gray(images) else "frepo")
    pixels, classes = whitening.to(args.device), targets.shape[1]
    config = student_config(spec, ipc="1", classes=classes, image_size=images.shape[-1])
    trained_on = TrainingSet(images, targets.argmax(1), classes, pixels, soft_labels=targets)
    return fit(trained_on, config, seed=derive_seed(seed, "student")).net


def read_rows(path: Path, command: str) -> list[dict[str, Any]]:
    """Rows that the same command has written before; none without a file.

    Raises:
        InputError: if another command wrote the file.
    """
    if not path.is_file():
        return []
    head, *lines = path.read_text().splitlines()
    if not head.startswith(f"{command}  ("):
        raise InputError(f"{path} holds results of another command, {head}; name another file with --csv")
    return list(csv.DictReader(lines))


def write_rows(path: Path, command: str, rows: Sequence[dict[str, Any]]) -> None:
    """Replace a result file as a whole, with its command in the first line."""
    text = io.StringIO()
    text.write(f"{command}  ({platform.machine()}, torch {torch.__version__})\n")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


if __name__ == "__main__":
    raise SystemExit("frepo_sets is a module of continual_learning.py and membership_inference.py; run one of these")
