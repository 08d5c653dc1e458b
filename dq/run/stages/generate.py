"""The generate stage: images of the prototypes of every method, by class.

A unit of work is a slice of the images of a class, so that few classes with many images are divided as evenly as
many with few.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dq.cluster.prototypes import Prototypes, images_by_mass
from dq.config.reader import to_dict
from dq.config.schema import GenerateConfig, MethodConfig
from dq.core.errors import InputError
from dq.core.files import is_done, open_tensors, read_json, read_metadata, read_tensors, write_json, write_tensors
from dq.core.memory import run_with_batch_backoff
from dq.core.plain import PlainDict
from dq.core.processes import cut
from dq.core.progress import progress, unit_done
from dq.core.seeds import digest_of, generator
from dq.data.images import read_images
from dq.diffusion.codec import Codec, codec_digest
from dq.diffusion.compiled import compile_generator
from dq.diffusion.generator import LatentGenerator
from dq.diffusion.latents import LatentCache
from dq.run.folder import Run, class_file, copies_of, deciding
from dq.run.stages.cluster import load_prototypes, prototype_folder
from dq.run.stages.select import Selector, make_selector, selecting_teachers, selection_sentences, selection_summary

log = logging.getLogger("dq")

LONGEST = 32  # images of a unit
SPOOL = 2 << 30  # bytes of candidates that wait on disk at a time, or those of one class
# settings that say which points are drawn how often and which images are kept, not how a batch is drawn
BEFORE_OR_BEHIND = (
    *("class_map", "rescale", "images_per_prototype"),
    *("candidates", "real_candidates", "select", "select_teacher", "one_per_prototype"),
)
# settings that came later
ADDED = (
    *("internal_guidance", "autoguidance", "candidates", "select", "select_teacher", "one_per_prototype"),
    *("measure_guidance", "measure_interval", "measure_entropy", "measure_iterations", "measure_weights"),
    *("repulsion", "repulsion_interval", "repulsion_ridge", "real_candidates"),
)


def image_folder(
    run: Run, cache: LatentCache, ipc: int, method: str, pipe_digest: str | None, teacher_digest: str | None = None
) -> Path:
    """Folder of the images of a method.

    Methods that differ in weights alone share it. `teacher_digest` is that of the teacher that selects among
    candidates, if there are any.
    """
    resolved = run.resolved(method)
    m, generate_config = resolved.method, resolved.generate
    identity = image_identity(run, cache, ipc, method)
    if m.representative == "real":  # needs no generator
        identity.append(["real", run.source.preprocess])
        rule = [generate_config.real_candidates, generate_config.select, generate_config.one_per_prototype]
        identity += [[*rule, teacher_digest]] if teacher_digest else []
    else:
        identity.append([_deciding(generate_config), pipe_digest, *([teacher_digest] if teacher_digest else [])])
    return run.folder / "images" / f"ipc{ipc:05d}-{m.representative}-{digest_of(identity)}"


def image_identity(run: Run, cache: LatentCache, ipc: int, method: str) -> list[object]:
    """What determines the images of a method beside the generator."""
    resolved = run.resolved(method)
    points = prototype_folder(run, cache, ipc, resolved).name
    return [points, resolved.method.representative, run.config.image_size]


def _deciding(config: GenerateConfig) -> PlainDict:
    """The settings that determine images.

    Those of `ADDED` are left out at their defaults, so that folders from before they were added keep their digests.
    """
    defaults = to_dict(GenerateConfig())
    settings = {k: v for k, v in deciding(to_dict(config)).items() if k != "revision"}
    return {k: v for k, v in settings.items() if k not in ADDED or v != defaults[k]}


def _requested_digest(run: Run, cache: LatentCache, ipc: int, method: str) -> str:
    """Digest of the requested settings, without loading a generator."""
    return digest_of([image_identity(run, cache, ipc, method), _deciding(run.resolved(method).generate)])


def drawn_folders(run: Run, cache: LatentCache) -> dict[str, Path]:
    """Folders of generated images by "ipc/method".

    Raises:
        InputError: if one has not been drawn with its present settings.
    """
    index = run.folder / "images" / "index.json"
    if not index.is_file():
        raise InputError(f"{run.folder} has no images yet; run `dq generate` first")
    records = read_json(index)
    folders = {}
    for ipc in run.config.ipc:
        for method in run.config.methods:
            key = f"{ipc}/{method}"
            if records.get(key, {}).get("asked") != _requested_digest(run, cache, ipc, method):
                why = "for the present settings" if key in records else "yet"
                raise InputError(
                    f"{run.folder} has no images of method {method!r} at ipc {ipc} {why}; run `dq generate` first"
                )
            folders[key] = run.folder / "images" / records[key]["folder"]
    return folders


def generate(run: Run, pipe: LatentGenerator, cache: LatentCache) -> None:
    """Generate the images of every method, one file per class; see `Draw`."""
    began = time.perf_counter()
    pipe.to(run.device)
    pipe.set_progress_bar_config(disable=True)
    index: dict[str, dict[str, str]] = {}
    digests: dict[str, str] = {}
    draws: dict[Path, Draw] = {}
    teachers = selecting_teachers(run)
    for method in run.config.methods:
        resolved = run.resolved(method)
        m, cfg, teacher = resolved.method, resolved.generate, teachers.get(method)
        digest = None
        ids: list[int] = []
        if m.representative != "real":
            check_codec(pipe.vae, cache)
            ids = pipe.check_inputs(cfg, run.config.codec.resolution, run.source.class_names)
            digest = digests.setdefault(cfg.mode, "") or pipe.digest(cfg.mode)
            digests[cfg.mode] = digest
        for ipc in run.config.ipc:
            folder = image_folder(run, cache, ipc, method, digest, teacher.digest if teacher else None)
            load_prototypes(run, cache, ipc, resolved)  # complains if there are none
            if folder not in draws:
                selector = make_selector(run, cache, ipc, resolved, teacher) if teacher else None
                points = prototype_folder(run, cache, ipc, resolved)
                budget = None if resolved.cluster.prototypes_per_class is None else ipc * copies_of(m, cfg)
                draws[folder] = Draw(run, folder, points, m, cfg, ids, selector, budget)
            index[f"{ipc}/{method}"] = {"folder": folder.name, "asked": _requested_digest(run, cache, ipc, method)}
    compile_generator(pipe, [d.config for d in draws.values() if not d.real], run.config.codec)
    drawn = _draw_all(run, pipe, list(draws.values()))
    run.finish("generate", began, images=drawn)
    if run.main:
        path = run.folder / "images" / "index.json"
        write_json(path, {**(read_json(path) if is_done(path) else {}), **index})
        for draw in draws.values():
            if draw.selector is not None:
                summary = folder_selection(draw.folder, len(run.source.class_names))
                for sentence in selection_sentences(summary):
                    log.warning("generate: %s", sentence)
    run.accelerator.wait_for_everyone()


def folder_selection(folder: Path, classes: int) -> PlainDict:
    """Summary of the selection among candidates in a folder, or empty."""
    metas = (read_metadata(class_file(folder, label)) for label in range(classes))
    facts = [m["selection"] for m in metas if "selection" in m]
    return selection_summary(facts) if facts else {}


def check_codec(codec: Codec, cache: LatentCache) -> None:
    """Check that a codec made the latents of a run.

    Raises:
        InputError: if it is another.
    """
    made_by = read_json(cache.folder / "manifest.json")["codec"]
    if codec_digest(codec) != made_by:
        raise InputError(
            f"the latents in {cache.folder} were made by another codec (digest {made_by}) than the one given; "
            "set codec.path and codec.dtype back, or start again with `dq encode` in another --output_dir"
        )


Unit = tuple[int, range, bool]  # see `Draw.units`


@dataclass(frozen=True, eq=False)
class Draw:
    """The images of one method at one ipc, drawn in slices of classes."""

    run: Run
    folder: Path
    prototypes: Path  # folder
    method: MethodConfig
    config: GenerateConfig
    condition_ids: list[int]  # the generator's class index of every class
    selector: Selector | None = None  # None: every draw is kept
    budget: int | None = None  # images of a class, given to its prototypes by mass; None: as many to each

    @property
    def real(self) -> bool:
        return self.method.representative == "real"

    @property
    def together(self) -> bool:
        """Whether images of a class guide one another and form a unit."""
        return self.config.together and not self.real

    @property
    def candidates(self) -> int:
        return self.config.candidates if self.selector is not None and not self.real else 1

    @functools.cached_property
    def numbers(self) -> list[list[int]]:
        """Images of every prototype, by class."""
        copies = copies_of(self.method, self.config)
        result = []
        for label in range(len(self.run.source.class_names)):
            with open_tensors(class_file(self.prototypes, label)) as f:
                masses = f.get_tensor("masses" if "masses" in f.keys() else "counts")  # noqa: SIM118  (not a dict)
            result.append([copies] * len(masses) if self.budget is None else images_by_mass(masses, self.budget))
        return result

    def pool(self, label: int) -> list[tuple[int, int]]:
        """Prototype and number of every draw of a class.

        As many draws as the set has images are those of a set without candidates; each further candidate adds as many.
        """
        numbers = self.numbers[label]
        return [(k, j * n + i) for j in range(self.candidates) for k, n in enumerate(numbers) for i in range(n)]

    @functools.cached_property
    def units(self) -> list[Unit]:
        """Class, range of draws, and whether these are the complete class."""
        counts = [sum(numbers) * self.candidates for numbers in self.numbers]
        longest = max(map(len, cut(sum(counts), smallest=1, largest=LONGEST)))
        result = []
        for label, n in enumerate(counts):
            number = self.candidates if self.together else -(-n // longest)
            pieces = [range(i * n // number, (i + 1) * n // number) for i in range(number)]
            result += [(label, piece, number == 1 and self.selector is None) for piece in pieces]
        return result

    def file(self, unit: Unit) -> Path:
        """File of the images of a unit, or of its complete class."""
        label, piece, complete = unit
        if complete:
            return class_file(self.folder, label)
        return self.folder / f"part-{label:05d}-{piece.start:05d}.safetensors"


def _draw_all(run: Run, pipe: LatentGenerator, draws: list[Draw]) -> int:
    """Draw the missing units of this process; returns the number of images."""
    spools = list(_spools(run, draws))
    todo = [_missing(run, units) for units in spools]  # before any process puts the first class together
    run.accelerator.wait_for_everyone()
    total = sum(len(piece) for units in todo for _, (_, piece, _) in units)
    with progress([], desc="generate", total=total, unit="img", main=run.main and bool(total)) as bar:
        for every, missing in zip(spools, todo, strict=True):
            _draw_units(run, pipe, missing, bar)
            run.accelerator.wait_for_everyone()
            _gather(run, every)
    return total


def _spools(run: Run, draws: list[Draw]) -> Iterator[list[tuple[Draw, Unit]]]:
    """Units that are drawn before the files of their classes are written.

    All without candidates; of those with candidates as many classes as `SPOOL` bytes of images allow, since most of
    these are dropped.
    """
    yield [(draw, unit) for draw in draws for unit in draw.units if draw.selector is None]
    spool: list[tuple[Draw, Unit]] = []
    free = SPOOL
    for draw in draws:
        image = 3 * run.config.image_size**2 * (1 if draw.config.image_dtype == "uint8" else 4)
        for label, units in itertools.groupby(draw.units if draw.selector else (), key=lambda unit: unit[0]):
            needed = len(draw.pool(label)) * image
            if spool and needed > free:
                yield spool
                spool, free = [], SPOOL
            spool += [(draw, unit) for unit in units]
            free -= needed
    if spool:
        yield spool


def _missing(run: Run, units: list[tuple[Draw, Unit]]) -> list[tuple[Draw, Unit]]:
    """Units of this process without a file."""
    assigned = [units[i] for i in run.local_units([float(len(piece)) for _, (_, piece, _) in units])]
    classes = {class_file(draw.folder, label) for draw, (label, _, _) in assigned}
    complete = {path for path in classes if is_done(path)}
    return [(d, u) for d, u in assigned if class_file(d.folder, u[0]) not in complete and not is_done(d.file(u))]


def _draw_units(run: Run, pipe: LatentGenerator, todo: list[tuple[Draw, Unit]], bar: Any) -> None:
    began = time.perf_counter()
    starts = {draw: _start(draw, pipe) for draw, _ in todo}
    shared: dict[str, list[tuple[Draw, Unit]]] = {}
    for draw, unit in todo:
        shared.setdefault(_batch_key(draw), []).append((draw, unit))
    for units in shared.values():
        for draw, unit, images in _copied(units) if units[0][0].real else _generated(pipe, units):
            meta = {"start": starts[draw], "copies": _copies(draw.numbers[unit[0]])}
            write_tensors(draw.file(unit), {"images": images}, meta)
            unit_done("generate", run.source.class_names[unit[0]], time.perf_counter() - began, images=len(images))
            began = time.perf_counter()
            bar.update(len(images))


def _batch_key(draw: Draw) -> str:
    """Equal for draws whose images go through the generator in the same batches: those of equal settings."""
    if draw.real:
        return "real"
    settings = {k: v for k, v in to_dict(draw.config).items() if k not in BEFORE_OR_BEHIND}
    return digest_of([settings, draw.condition_ids])


def _start(draw: Draw, pipe: LatentGenerator) -> PlainDict | None:
    start = None if draw.real else pipe.start(draw.config)
    return dataclasses.asdict(start) if start else None


def _copies(numbers: list[int]) -> int | list[int]:
    """Images of every prototype of a class; one number where all are equal."""
    return numbers[0] if len(set(numbers)) == 1 else numbers


class _Image(NamedTuple):
    """A draw of a unit."""

    draw: Draw
    unit: Unit
    prototype: int
    number: int

    @property
    def label(self) -> int:
        return self.unit[0]


def _batches(todo: list[tuple[Draw, Unit]]) -> Iterator[list[_Image]]:
    """The images of each batch.

    Batches go across units, classes, methods and sizes; a unit is a batch where the images of a class guide one
    another.
    """
    units = [
        [_Image(draw, unit, k, i) for k, i in draw.pool(unit[0])[unit[1].start : unit[1].stop]] for draw, unit in todo
    ]
    if todo[0][0].together:
        yield from units
        return
    queue, size = list(itertools.chain(*units)), todo[0][0].config.batch_size
    for first in range(0, len(queue), size):
        yield queue[first : first + size]


def _generated(pipe: LatentGenerator, todo: list[tuple[Draw, Unit]]) -> Iterator[tuple[Draw, Unit, Tensor]]:
    """Units of equal settings with their images, drawn in batches."""
    first = todo[0][0]
    run, cfg = first.run, first.config
    points: dict[tuple[Draw, int], tuple[Tensor, Tensor]] = {}
    done: list[Tensor] = []
    for batch in _batches(todo):
        labels = [image.label for image in batch]
        cells = dict.fromkeys((image.draw, image.label) for image in batch)
        points = {cell: points[cell] if cell in points else _points(*cell) for cell in cells}
        z = torch.stack([points[image.draw, image.label][0][image.prototype] for image in batch])
        masses = torch.stack([points[image.draw, image.label][1][image.prototype] for image in batch])

        def synthesize(s: slice, batch=batch, labels=labels, z=z, masses=masses) -> Tensor:
            return pipe.synthesize(
                z[s],
                labels[s],
                [generator(run.config.seed, "generate", x.label, x.prototype, x.number) for x in batch[s]],
                cfg,
                class_names=run.source.class_names,
                condition_ids=first.condition_ids,
                image_size=run.config.image_size,
                masses=masses[s],
                image_dtype=torch.uint8 if cfg.image_dtype == "uint8" else torch.float32,
            )

        if first.together:  # in chunks of its own
            images = synthesize(slice(None))
        else:
            images = run_with_batch_backoff("generate", len(batch), synthesize, like=(cfg.mode, *z.shape[1:]))
        for (draw, unit, _, _), image in zip(batch, images, strict=True):
            done.append(image)
            if len(done) == len(unit[1]):
                yield draw, unit, torch.stack(done)
                done = []


def _points(draw: Draw, label: int) -> tuple[Tensor, Tensor]:
    """Latents (K, C, h, w) of the cells of a class, and mass (K,) per image of each."""
    p = Prototypes.load(class_file(draw.prototypes, label))
    masses = (p.counts if p.masses is None else p.masses).float() / torch.tensor(draw.numbers[label])
    return p.points(draw.method.representative, rescale=draw.config.rescale), masses


def _copied(todo: list[tuple[Draw, Unit]]) -> Iterator[tuple[Draw, Unit, Tensor]]:
    for draw, unit in todo:
        label, piece, _ = unit
        yield draw, unit, nearest_images(draw.run, Prototypes.load(class_file(draw.prototypes, label)), piece)


def _gather(run: Run, units: list[tuple[Draw, Unit]]) -> None:
    """Merge the files of units into one per class."""
    classes: dict[tuple[Draw, int], list[Path]] = {}
    for draw, unit in units:
        if not unit[2]:
            classes.setdefault((draw, unit[0]), []).append(draw.file(unit))
    keys = list(classes)
    assigned = [keys[i] for i in run.local_units([float(len(classes[key])) for key in keys])]
    selects = any(draw.selector is not None for draw, _ in assigned)
    for draw, label in progress(assigned, desc="select", unit="class", main=run.main and selects):
        if not is_done(class_file(draw.folder, label)):
            _gather_class(draw, label, classes[draw, label])
        for part in classes[draw, label]:
            part.unlink(missing_ok=True)


def _gather_class(draw: Draw, label: int, parts: list[Path]) -> None:
    """Write all draws of a class, or selected ones with a record."""
    path, meta = class_file(draw.folder, label), read_metadata(parts[0])
    if draw.selector is None:
        write_tensors(path, {"images": torch.cat([read_tensors(p)[0]["images"] for p in parts])}, meta)
        return
    began = time.perf_counter()
    p = Prototypes.load(class_file(draw.prototypes, label))
    selected = draw.selector.select(p, draw.numbers[label], draw.pool(label), parts)
    meta |= {"copies": _copies(selected.numbers), "selection": selected.facts}
    meta |= {"source_rows": selected.source_rows} if selected.source_rows else {}
    write_tensors(path, {"images": selected.images, **selected.record}, meta)
    unit_done("select", p.name, time.perf_counter() - began, candidates=len(draw.pool(label)))


def nearest_images(run: Run, p: Prototypes, which: range | None = None) -> Tensor:
    """The real images (K, 3, H, W) uint8 nearest to prototypes, at the size of the set.

    Of all prototypes, or of the range `which`.
    """
    rows = p.medoid_rows.tolist()
    rows = rows if which is None else rows[which.start : which.stop]
    return read_images(run.source.train, rows, run.config.image_size, run.source.preprocess)[0]
