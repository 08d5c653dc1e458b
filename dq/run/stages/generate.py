"""The generate stage: prototypes of every method as images, one file per class.

A unit of work is a stretch of the images of a class, so that few classes with many images are divided as evenly as
many with few.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq.cluster.prototypes import Prototypes
from dq.config.reader import to_dict
from dq.config.schema import GenerateConfig, MethodConfig
from dq.core.errors import InputError
from dq.core.files import is_done, open_tensors, read_json, read_tensors, write_json, write_tensors
from dq.core.memory import in_pieces
from dq.core.processes import cut
from dq.core.progress import progress, unit_done
from dq.core.seeds import digest_of, generator
from dq.data.images import read_images
from dq.diffusion.codec import Codec, codec_digest
from dq.diffusion.generator import LatentGenerator
from dq.diffusion.latents import LatentCache
from dq.run.folder import SPEED, Run, class_file, copies_of
from dq.run.stages.cluster import load_prototypes, prototype_folder

LONGEST = 32  # images of a unit
ADDED = ("internal_guidance", "autoguidance")  # settings that came later


def image_folder(run: Run, cache: LatentCache, ipc: int, method: str, pipe_digest: str | None) -> Path:
    """Where the images of a method are. Methods that differ in weights alone share them."""
    resolved = run.resolved(method)
    m, generate_config = resolved.method, resolved.generate
    identity = image_identity(run, cache, ipc, method)
    if m.representative == "real":  # needs no generator
        identity.append(["real", run.source.preprocess])
    else:
        identity.append([_deciding(generate_config), pipe_digest])
    return run.folder / "images" / f"ipc{ipc:05d}-{m.representative}-{digest_of(identity)}"


def image_identity(run: Run, cache: LatentCache, ipc: int, method: str) -> list[Any]:
    """What decides the images of a method beside the generator."""
    resolved = run.resolved(method)
    points = prototype_folder(run, cache, ipc, resolved).name
    return [points, resolved.method.representative, run.config.image_size]


def _deciding(config: GenerateConfig) -> dict[str, Any]:
    """The settings that decide images. Those of `ADDED` are left out at their defaults, so that folders from before
    they were there keep their digests."""
    defaults = to_dict(GenerateConfig())
    settings = {k: v for k, v in to_dict(config).items() if k not in (*SPEED, "revision")}
    return {k: v for k, v in settings.items() if k not in ADDED or v != defaults[k]}


def _asked(run: Run, cache: LatentCache, ipc: int, method: str) -> str:
    """Digest of what a user asked for, which needs no generator to be loaded."""
    return digest_of([image_identity(run, cache, ipc, method), _deciding(run.resolved(method).generate)])


def drawn_folders(run: Run, cache: LatentCache) -> dict[str, Path]:
    """Folders of the images of every method at every ipc of the run, by "ipc/method".

    Raises:
        InputError: if one has not been drawn with its present settings.
    """
    index = run.folder / "images" / "index.json"
    if not index.is_file():
        raise InputError(f"{run.folder} has no images yet; run `dq generate` first")
    known = read_json(index)
    found = {}
    for ipc in run.config.ipc:
        for method in run.config.methods:
            key = f"{ipc}/{method}"
            if known.get(key, {}).get("asked") != _asked(run, cache, ipc, method):
                why = "for the present settings" if key in known else "yet"
                raise InputError(
                    f"{run.folder} has no images of method {method!r} at ipc {ipc} {why}; run `dq generate` first"
                )
            found[key] = run.folder / "images" / known[key]["folder"]
    return found


def generate(run: Run, pipe: LatentGenerator, cache: LatentCache) -> None:
    """Draw every prototype of every method as images, one file per class; see `Draw`."""
    began = time.perf_counter()
    pipe.to(run.device)
    pipe.set_progress_bar_config(disable=True)
    index: dict[str, dict[str, str]] = {}
    digests: dict[str, str] = {}
    draws: dict[Path, Draw] = {}
    for method in run.config.methods:
        resolved = run.resolved(method)
        m, cfg = resolved.method, resolved.generate
        digest = None
        ids: list[int] = []
        if m.representative != "real":
            check_codec(pipe.vae, cache)
            ids = pipe.check_inputs(cfg, run.config.codec.resolution, run.source.class_names)
            digest = digests.setdefault(cfg.mode, "") or pipe.digest(cfg.mode)
            digests[cfg.mode] = digest
        for ipc in run.config.ipc:
            folder = image_folder(run, cache, ipc, method, digest)
            load_prototypes(run, cache, ipc, resolved)  # complains if there are none
            draws.setdefault(folder, Draw(run, folder, prototype_folder(run, cache, ipc, resolved), m, cfg, ids))
            index[f"{ipc}/{method}"] = {"folder": folder.name, "asked": _asked(run, cache, ipc, method)}
    drawn = _draw_all(run, pipe, list(draws.values()))
    run.accelerator.wait_for_everyone()
    for draw in draws.values():
        _gather_parts(draw)
    run.finish("generate", began, images=drawn)
    if run.main:
        path = run.folder / "images" / "index.json"
        write_json(path, {**(read_json(path) if is_done(path) else {}), **index})
    run.accelerator.wait_for_everyone()


def check_codec(codec: Codec, cache: LatentCache) -> None:
    """Whether a codec is the one that made the latents of a run.

    Raises:
        InputError: if it is another.
    """
    made_by = read_json(cache.folder / "manifest.json")["codec"]
    if codec_digest(codec) != made_by:
        raise InputError(
            f"the latents in {cache.folder} were made by another codec (digest {made_by}) than the one given; "
            "set codec.path and codec.dtype back, or start again with `dq encode` in another --output_dir"
        )


@dataclass(frozen=True)
class Draw:
    """The images of one method at one ipc. Its units of work are stretches of the images of a class."""

    run: Run
    folder: Path
    prototypes: Path  # folder
    method: MethodConfig
    config: GenerateConfig
    condition_ids: list[int]  # the generator's class index of every class

    @property
    def real(self) -> bool:
        return self.method.representative == "real"

    @property
    def copies(self) -> int:
        return copies_of(self.method, self.config)

    @functools.cached_property
    def units(self) -> list[tuple[int, range, bool]]:
        """Class, which of its images, and whether they are all of the class."""
        counts = []
        for label in range(len(self.run.source.class_names)):
            with open_tensors(class_file(self.prototypes, label)) as f:
                counts.append(int(f.get_slice("counts").get_shape()[0]) * self.copies)
        longest = max(map(len, cut(sum(counts), least=1, most=LONGEST)))
        found = []
        for label, n in enumerate(counts):
            number = -(-n // longest)
            pieces = [range(i * n // number, (i + 1) * n // number) for i in range(number)]
            found += [(label, piece, number == 1) for piece in pieces]
        return found

    def file(self, unit: tuple[int, range, bool]) -> Path:
        """Where the images of a unit go: to the file of their class at once if they are all of it."""
        label, piece, whole = unit
        if whole:
            return class_file(self.folder, label)
        return self.folder / f"part-{label:05d}-{piece.start:05d}.safetensors"


def _draw_all(run: Run, pipe: LatentGenerator, draws: list[Draw]) -> int:
    """Draw what is missing of this process's share; returns how many images that were."""
    units = [(draw, unit) for draw in draws for unit in draw.units]
    mine = [units[i] for i in run.mine([float(len(piece)) for _, (_, piece, _) in units])]
    classes = {class_file(draw.folder, label) for draw, (label, _, _) in mine}
    whole = {path for path in classes if is_done(path)}
    todo = [(d, u) for d, u in mine if class_file(d.folder, u[0]) not in whole and not is_done(d.file(u))]
    total = sum(len(piece) for _, (_, piece, _) in todo)
    with progress([], desc="generate", total=total, unit="img", main=run.main and bool(todo)) as bar:
        began = time.perf_counter()
        for draw in draws:
            own = [unit for d, unit in todo if d is draw]
            meta = _meta(draw, pipe)
            for unit, images in _copied(draw, own) if draw.real else _generated(draw, pipe, own):
                write_tensors(draw.file(unit), {"images": images}, meta)
                unit_done("generate", run.source.class_names[unit[0]], time.perf_counter() - began, images=len(images))
                began = time.perf_counter()
                bar.update(len(images))
    return total


def _meta(draw: Draw, pipe: LatentGenerator) -> dict[str, Any]:
    start = None if draw.real else pipe.start(draw.config)
    return {"start": dataclasses.asdict(start) if start else None, "copies": draw.copies}


def _generated(
    draw: Draw, pipe: LatentGenerator, todo: list[tuple[int, range, bool]]
) -> Iterator[tuple[tuple[int, range, bool], Tensor]]:
    """Units with their images, drawn in batches that run across units and classes."""
    run, cfg = draw.run, draw.config
    queue = [(unit, *divmod(i, draw.copies)) for unit in todo for i in unit[1]]
    points: dict[int, Tensor] = {}
    done: list[Tensor] = []
    for first in range(0, len(queue), cfg.batch_size):
        batch = queue[first : first + cfg.batch_size]
        labels = [unit[0] for unit, _, _ in batch]
        points = {c: points[c] if c in points else _points(draw, c) for c in dict.fromkeys(labels)}
        z = torch.stack([points[unit[0]][k] for unit, k, _ in batch])

        def synthesize(s: slice, batch=batch, labels=labels, z=z) -> Tensor:
            return pipe.synthesize(
                z[s],
                labels[s],
                [generator(run.config.seed, "generate", unit[0], k, i) for unit, k, i in batch[s]],
                cfg,
                class_names=run.source.class_names,
                condition_ids=draw.condition_ids,
                image_size=run.config.image_size,
            )

        images = in_pieces("generate", len(batch), synthesize, like=(cfg.mode, *z.shape[1:]))
        if cfg.image_dtype == "uint8":
            images = (images * 255).round().to(torch.uint8)
        for (unit, k, i), image in zip(batch, images):
            done.append(image)
            if k * draw.copies + i + 1 == unit[1].stop:
                yield unit, torch.stack(done)
                done = []


def _points(draw: Draw, label: int) -> Tensor:
    p = Prototypes.load(class_file(draw.prototypes, label))
    return p.points(draw.method.representative, rescale=draw.config.rescale)


def _copied(draw: Draw, todo: list[tuple[int, range, bool]]) -> Iterator[tuple[tuple[int, range, bool], Tensor]]:
    for unit in todo:
        label, piece, _ = unit
        yield unit, nearest_images(draw.run, Prototypes.load(class_file(draw.prototypes, label)), piece)


def _gather_parts(draw: Draw) -> None:
    """One file per class from those of its stretches, which go when it is there."""
    classes: dict[int, list[Path]] = {}
    for unit in draw.units:
        if not unit[2]:
            classes.setdefault(unit[0], []).append(draw.file(unit))
    labels = list(classes)
    for i in draw.run.mine([float(len(classes[c])) for c in labels]):
        path = class_file(draw.folder, labels[i])
        parts = classes[labels[i]]
        if not is_done(path):
            found = [read_tensors(p) for p in parts]
            write_tensors(path, {"images": torch.cat([t["images"] for t, _ in found])}, found[0][1])
        for part in parts:
            part.unlink(missing_ok=True)


def nearest_images(run: Run, p: Prototypes, which: range | None = None) -> Tensor:
    """The real image nearest to each prototype, or to those named, (K, 3, H, W) uint8, at the size of the distilled
    images."""
    rows = p.medoid_rows.tolist()
    rows = rows if which is None else rows[which.start : which.stop]
    return read_images(run.source.train, rows, run.config.image_size, run.source.preprocess)[0]
