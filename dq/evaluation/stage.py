"""Proof: fresh students trained on every set and on its baselines, tested on real images, n seeds each."""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dq.config import (
    ClusterConfig,
    RunConfig,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
    from_dict,
    to_dict,
)
from dq.data import ImageSource, load_source, read_images
from dq.dist import derive_seed, digest_of, digest_of_tensors, generator, progress, read_json, write_json, write_text
from dq.distilled import DistilledSet
from dq.errors import InputError
from dq.evaluation.baselines import random_rows
from dq.evaluation.statistics import format_mean_std, mean_std
from dq.evaluation.train import epochs_for, train_student
from dq.nets import make_net
from dq.run import cache_of, clusterings, load_prototypes, load_set, nearest_images, prototype_folder
from dq.runfolder import Run
from dq.teachers import Teacher, check_teacher, load_teacher

if TYPE_CHECKING:
    from accelerate import Accelerator


log = logging.getLogger("dq")


@dataclass(frozen=True)
class Data:
    """What a student is trained on."""

    images: Tensor  # (N, 3, H, W) uint8 or float32 in [0, 1]
    labels: Tensor  # (N,) int64
    weights: Tensor | None = None  # (N,)
    soft_labels: Tensor | None = None  # (N, C) logits


@dataclass(frozen=True)
class Row:
    """One line of a results table: a set, a student, all its seeds. Accuracies are fractions."""

    set: str  # method or baseline
    ipc: str  # "10", or "full"
    images: int
    student: str
    labels: str  # hard or soft
    last: tuple[float, ...]  # accuracy after the last epoch, per seed
    best: tuple[float, ...]  # best of the looks at the test split, per seed: model selection on test data
    recipe: int  # which student of the configuration, from 0
    seconds: float  # of training without tests, mean over seeds
    protocol: str

    def record(self) -> dict[str, Any]:
        last, best = mean_std(self.last), mean_std(self.best)
        return {
            "set": self.set,
            "ipc": self.ipc,
            "images": self.images,
            "student": self.student,
            "labels": self.labels,
            "seeds": len(self.last),
            "last_mean": round(last[0], 5),
            "last_std": None if last[1] is None else round(last[1], 5),
            "best_mean": round(best[0], 5),
            "best_std": None if best[1] is None else round(best[1], 5),
            "seconds": round(self.seconds, 1),
            "protocol": self.protocol,
        }


def protocol_name(config: StudentConfig, ipc: str) -> str:
    """All settings of a training in one line."""
    parts = [
        f"{epochs_for(config, ipc)} epochs",
        f"batch {config.batch_size}",
        f"{config.optimizer} lr {config.lr:g} wd {config.weight_decay:g}"
        + (f" momentum {config.momentum:g}" if config.optimizer == "sgd" else ""),
        config.schedule,
        f"augment {config.augment}",
        f"soft T={config.temperature:g}" if config.labels == "soft" else "hard",
        config.dtype,
    ]
    return ", ".join(parts)


@dataclass(frozen=True)
class Bench:
    """What trainings share: the real data at the students' size, its statistics, a teacher if one labels."""

    source: ImageSource
    source_config: SourceConfig
    image_size: int
    test: tuple[Tensor, Tensor]  # (M, 3, H, W) uint8, (M,)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    teacher: Teacher | None
    device: torch.device

    def real(self, rows: Iterable[int], soft: bool) -> Data:
        """Real train images as training data."""
        wanted = list(rows)
        c = self.source_config
        images, kept, _ = read_images(self.source.train, wanted, self.image_size, c.preprocess, on_bad=c.on_bad_image)
        labels = torch.from_numpy(self.source.train.labels[kept])
        return Data(images, labels, None, self.soften(images) if soft else None)

    def soften(self, images: Tensor) -> Tensor:
        if self.teacher is None:
            raise InputError("students with labels=soft need a teacher; set teacher.path, or use labels=hard")
        return self.teacher.logits(images)


def make_bench(
    source: ImageSource,
    source_config: SourceConfig,
    image_size: int,
    *,
    teacher: TeacherConfig | None,
    soft: bool,
    device: torch.device,
) -> Bench:
    """Read the test split once and measure channel statistics on train images."""
    if soft and teacher is None:
        raise InputError("students with labels=soft need a teacher; set teacher.path, or use labels=hard")
    test_rows = range(len(source.test))
    preprocess, on_bad = source_config.preprocess, source_config.on_bad_image
    test, kept, bad = read_images(source.test, test_rows, image_size, preprocess, on_bad=on_bad)
    if bad:
        log.warning(
            "%d of %d test images cannot be read and are left out, first: %s", len(bad), len(test_rows), bad[0]
        )
    if not kept:
        raise InputError(f"no test image of {source.origin} can be read; replace the split")
    sample = torch.randperm(len(source.train), generator=generator("statistics"))[:5000].tolist()
    pixels = read_images(source.train, sample, image_size, preprocess, on_bad=on_bad)[0].float() / 255
    loaded = None
    if soft and teacher is not None:
        loaded = load_teacher(teacher, len(source.class_names), image_size, device)
        check_teacher(loaded, source, teacher, source_config, image_size)
    return Bench(
        source=source,
        image_size=image_size,
        source_config=source_config,
        test=(test, torch.from_numpy(source.test.labels[kept])),
        mean=tuple(pixels.mean((0, 2, 3)).tolist()),
        # a constant channel (white paper) would divide by zero
        std=tuple(pixels.std((0, 2, 3)).clamp(min=1e-2).tolist()),
        teacher=loaded,
        device=device,
    )


@dataclass(frozen=True)
class Unit:
    """One training: which data, which student, which seed. `load` gives the data when its turn comes."""

    set: str
    ipc: str
    student: int
    seed: int
    images: int
    load: Any  # () -> Data
    folder: Path  # where its result is kept


def train_unit(unit: Unit, bench: Bench, config: StudentConfig) -> dict[str, Any]:
    """Train and test one student; returns a plain record."""
    data: Data = unit.load()
    result = train_student(
        data.images,
        data.labels,
        num_classes=len(bench.source.class_names),
        config=config,
        ipc_key=unit.ipc,
        test=bench.test,
        weights=data.weights,
        soft_labels=data.soft_labels if config.labels == "soft" else None,
        mean=bench.mean,
        std=bench.std,
        seed=derive_seed("student", unit.seed),  # not the run's: evaluation seeds are the same for all sets ever
        device=bench.device,
    )
    return {
        "set": unit.set,
        "ipc": unit.ipc,
        "images": len(data.images),
        "student": config.net,
        "labels": config.labels,
        "seed": unit.seed,
        "recipe": unit.student,
        "protocol": protocol_name(config, unit.ipc),
        **dataclasses.asdict(result),
    }


def _unit_file(unit: Unit, config: StudentConfig, identity: str) -> Path:
    settings = to_dict(config)
    settings["epochs"] = epochs_for(config, unit.ipc)
    name = f"{unit.set}-ipc{unit.ipc}-{config.net}-{config.labels}-seed{unit.seed}"
    return unit.folder / f"{name}-{digest_of([settings, identity])}.json"


def _data_identity(s: DistilledSet) -> str:
    tensors = {"images": s.images, "labels": s.labels, "weights": s.weights}
    if s.soft_labels is not None:
        tensors["soft_labels"] = s.soft_labels
    return digest_of_tensors(tensors)


def check_evaluation(config: RunConfig, source: ImageSource) -> None:
    """What can be known before the first image is encoded: split, teacher, networks, epochs.

    Raises:
        InputError: for whatever would stop the label or the evaluate stage.
    """
    if config.teacher is not None and not Path(config.teacher.path).exists():
        raise InputError(f"there is no teacher at {config.teacher.path}; set teacher.path to a safetensors file")
    keys = [str(i) for i in config.ipc] + ["full"] * ("full" in config.evaluate.baselines)
    for s in config.evaluate.students:
        if s.labels == "soft" and config.teacher is None:
            raise InputError("students with labels=soft need a teacher; set teacher.path, or use labels=hard")
        make_net(s.net, len(source.class_names), config.image_size, seed=0)
        for key in keys:
            epochs_for(s, key)
    if config.evaluate.students or config.teacher is not None:
        _ = source.test


def evaluate_run(run: Run) -> list[Row]:
    """The evaluate stage: all methods and baselines of a run, all students, all seeds; one file per training."""
    began = time.perf_counter()
    c = run.config
    sets = {(ipc, m): load_set(run, ipc, m) for ipc in c.ipc for m in c.methods}
    soft = any(s.labels == "soft" for s in c.evaluate.students)
    bench = make_bench(run.source, c.source, c.image_size, teacher=c.teacher, soft=soft, device=run.device)
    units = list(_units(run, bench, sets))
    files = [_unit_file(u, c.evaluate.students[u.student], identity) for u, identity in units]
    costs = [float(u.images * epochs_for(c.evaluate.students[u.student], u.ipc)) for u, _ in units]
    todo = [i for i in run.mine(costs) if not files[i].is_file()]
    # cheap trainings first: an early look at the table, and nothing lost if the dear ones are interrupted
    todo.sort(key=lambda i: costs[i])
    with progress([], desc="evaluate", total=round(sum(costs[i] for i in todo)), unit="img", main=run.main) as bar:
        for i in todo:
            unit = units[i][0]
            bar.set_postfix_str(f"{unit.set} ipc {unit.ipc} {c.evaluate.students[unit.student].net}")
            write_json(files[i], train_unit(unit, bench, c.evaluate.students[unit.student]))
            bar.update(round(costs[i]))
    run.finish("evaluate", began, trainings=len(units))
    rows = summarize([read_json(f) for f in files])
    if run.main:
        write_text(run.folder / "eval" / "summary.csv", to_csv(rows))
    run.accelerator.wait_for_everyone()
    return rows


def _units(run: Run, bench: Bench, sets: dict[tuple[int, str], DistilledSet]) -> Iterator[tuple[Unit, str]]:
    """All trainings of a run with a digest of the data that each sees."""
    c = run.config
    folder = run.folder / "eval" / "units"
    counts = run.source.class_counts()
    cache = cache_of(run)
    world = [run.source.fingerprint, c.image_size, c.source.preprocess, c.source.on_bad_image]
    for j, student in enumerate(c.evaluate.students):
        soft = student.labels == "soft"
        taught = bench.teacher.digest if soft and bench.teacher else None
        for seed in range(c.evaluate.seeds):
            for (ipc, method), s in sets.items():
                if soft and s.soft_labels is None:
                    raise InputError(
                        f"the set ipc{ipc}-{method} has no soft labels; run `dq label` and evaluate again"
                    )

                def of_set(s: DistilledSet = s) -> Data:
                    return Data(s.images, s.labels, s.weights, s.soft_labels)

                yield Unit(method, str(ipc), j, seed, len(s), of_set, folder), digest_of([world, _data_identity(s)])
            for ipc in c.ipc:
                # several images of a prototype: random real images in equal number
                size = max(s.ipc for (i, _), s in sets.items() if i == ipc)
                small = int(counts.clip(max=size).sum())
                if "random" in c.evaluate.baselines:

                    def of_random(size: int = size, seed: int = seed, soft: bool = soft) -> Data:
                        return bench.real(random_rows(run.source.train.labels, size, seed), soft)

                    yield Unit("random", str(ipc), j, seed, small, of_random, folder), digest_of([world, taught, size])
                if "nearest" in c.evaluate.baselines:

                    def of_nearest(ipc: int = ipc, soft: bool = soft) -> Data:
                        return _nearest(run, bench, ipc, soft)

                    # prototypes of other settings have other nearest images
                    points = prototype_folder(run, cache, ipc, _first_clustering(run, ipc)).name
                    identity = digest_of([world, taught, points])
                    yield Unit("nearest", str(ipc), j, seed, small, of_nearest, folder), identity
            if "full" in c.evaluate.baselines and seed < c.evaluate.full_seeds:

                def of_full(soft: bool = soft) -> Data:
                    return bench.real(range(len(run.source.train)), soft)

                # the one costly baseline is shared by all runs on this data
                shared = Path(c.cache_dir) / "full"
                yield Unit("full", "full", j, seed, int(counts.sum()), of_full, shared), digest_of([world, taught])


def _nearest(run: Run, bench: Bench, ipc: int, soft: bool) -> Data:
    """The real images nearest to the centroids of the run's first method, equal weights."""
    prototypes = load_prototypes(run, cache_of(run), ipc, _first_clustering(run, ipc))
    images = torch.cat([nearest_images(run, p) for p in prototypes])
    labels = torch.cat([torch.full_like(p.counts, p.label) for p in prototypes])
    return Data(images, labels, None, bench.soften(images) if soft else None)


def _first_clustering(run: Run, ipc: int) -> ClusterConfig:
    return next(cfg for i, cfg in clusterings(run) if i == ipc)


def evaluate(
    small: DistilledSet,
    source: Any,
    *,
    student: str | StudentConfig = "convnet3",
    seeds: int = 3,
    baselines: tuple[str, ...] = ("random",),
    teacher: TeacherConfig | None = None,
    source_config: SourceConfig | None = None,
    accelerator: Accelerator | None = None,
    **settings: Any,
) -> Results:
    """Train `seeds` fresh students on a set and on baselines of equal size, and test them on `source.test`.

    Args:
        source: anything that `load_source` takes.
        student: network name or full settings.
        baselines: "random" (another subset per seed) and "full".
        source_config: how images become squares, and what happens to unreadable ones.
        accelerator: where to train; default: the accelerator of this machine if there is one.
        **settings: fields of `StudentConfig`; `epochs` may be one number.

    Example:
        print(evaluate(small, source, student="convnet3", seeds=3, epochs={"default": 300}))
    """
    source = load_source(source)
    if isinstance(settings.get("epochs"), int):
        settings["epochs"] = {"default": settings["epochs"]}
    base = to_dict(student) if isinstance(student, StudentConfig) else {"net": student}
    config = from_dict(StudentConfig, {**base, **settings})
    if seeds < 1:
        raise InputError(f"an evaluation needs at least 1 seed, not {seeds}")
    unknown = set(baselines) - {"random", "full"}
    if unknown:
        raise InputError(f"baselines of a bare set are 'random' and 'full', not {sorted(unknown)}")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator.device if accelerator is not None else found or torch.device("cpu")
    soft = config.labels == "soft"
    side = small.images.shape[-1]
    bench = make_bench(source, source_config or SourceConfig(), side, teacher=teacher, soft=soft, device=device)
    ipc = str(small.ipc)
    own = small.soft_labels if small.soft_labels is not None or not soft else bench.soften(small.images)
    loads: dict[str, Any] = {"set": lambda seed: Data(small.images, small.labels, small.weights, own)}
    if "random" in baselines:
        loads["random"] = lambda seed: bench.real(random_rows(source.train.labels, small.ipc, seed), soft)
    if "full" in baselines:
        loads["full"] = lambda seed: bench.real(range(len(source.train)), soft)
    records = []
    for name, load in loads.items():
        for seed in progress(range(seeds), desc=f"evaluate {name}", unit="seed"):
            key = "full" if name == "full" else ipc
            unit = Unit(name, key, 0, seed, 0, lambda load=load, seed=seed: load(seed), Path())
            records.append(train_unit(unit, bench, config))
    return Results(tuple(summarize(records)))


@dataclass(frozen=True)
class Results:
    """Rows of a table; prints as one."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return markdown_table(list(self.rows))


def summarize(records: list[dict[str, Any]]) -> list[Row]:
    """Group trainings that differ in their seed alone, in the order of first appearance."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in records:
        groups.setdefault((r["set"], r["ipc"], r["student"], r["labels"], r["protocol"], r["recipe"]), []).append(r)
    rows = []
    for (name, ipc, student, labels, protocol, recipe), group in groups.items():
        group.sort(key=lambda r: r["seed"])
        rows.append(
            Row(
                set=name,
                ipc=ipc,
                images=group[0]["images"],
                student=student,
                labels=labels,
                last=tuple(r["last"] for r in group),
                best=tuple(r["best"] for r in group),
                seconds=sum(r["train_seconds"] for r in group) / len(group),
                protocol=protocol,
                recipe=recipe,
            )
        )
    return rows


def to_csv(rows: list[Row]) -> str:
    """The rows as CSV text with a header."""
    out = io.StringIO()
    records = [r.record() for r in rows]
    writer = csv.DictWriter(out, fieldnames=list(records[0]) if records else ["set"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def markdown_table(rows: list[Row], *, which: str = "last") -> str:
    """Accuracy in percent, mean ± std over seeds: one line per set, one column per student and ipc."""
    columns = list(dict.fromkeys((r.recipe, r.student, r.labels, r.ipc) for r in rows))
    columns.sort(key=lambda c: (c[0], _order(c[3])))
    names = list(dict.fromkeys(r.set for r in rows))
    cells = {(r.set, r.recipe, r.student, r.labels, r.ipc): r for r in rows}
    # two recipes of one network are told apart by their number
    twins = {(s, k) for _, s, k, i in columns if sum((s, k, i) == c[1:] for c in columns) > 1}
    head = [
        f"{net}{f' #{n + 1}' if (net, kind) in twins else ''}, {kind}, {'full' if i == 'full' else f'IPC {i}'}"
        for n, net, kind, i in columns
    ]
    lines = ["| set | " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(head)]
    for name in names:
        found = [cells.get((name, *c)) for c in columns]
        text = [format_mean_std([100 * a for a in getattr(r, which)]) if r else "" for r in found]
        lines.append(f"| {name} | " + " | ".join(text) + " |")
    seeds = sorted({len(r.last) for r in rows})
    note = f"Top-1 test accuracy in %, {which} epoch, mean ± std over {'/'.join(map(str, seeds))} seeds."
    return "\n".join([*lines, "", note])


def _order(ipc: str) -> tuple[int, int]:
    return (1, 0) if ipc == "full" else (0, int(ipc))
