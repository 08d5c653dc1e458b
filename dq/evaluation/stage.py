"""Proof: fresh students trained on every set and on its baselines, tested on real images, n seeds each."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from dq.config import Baseline, EvaluateConfig, RunConfig, SourceConfig, StudentConfig, TeacherConfig, to_dict
from dq.data import ImageSource, load_source
from dq.dist import (
    check_name,
    derive_seed,
    digest_of,
    digest_of_tensors,
    make_accelerator,
    progress,
    read_json,
    shard,
    write_json,
    write_text,
)
from dq.distilled import DistilledSet
from dq.errors import InputError, RunError
from dq.evaluation.bench import Bench, Data, make_bench
from dq.evaluation.foreign import check_classes
from dq.evaluation.selection import BY_FEATURES, select
from dq.evaluation.tables import Comparison, Row, compare, markdown_table, settings_line, summarize, to_csv
from dq.evaluation.train import train_student
from dq.labels import (
    MANIFEST,
    LabelPlan,
    make_plan,
    online_labels,
    plan_bytes,
    plan_labels,
    read_labels,
    shard_file,
    write_manifest,
    write_shard,
)
from dq.nets import make_net
from dq.protocols import student_config
from dq.run import load_set
from dq.runfolder import Run
from dq.teachers import teacher_file

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("dq")


@dataclass(frozen=True)
class Entry:
    """One line of a table: a set as it is for a seed. Loaded when its turn comes, since sets may be large."""

    name: str  # method, baseline or foreign set
    ipc: str  # "10", or "full"
    images: int
    identity: str  # of what `load` gives
    load: Callable[[], DistilledSet]
    seeds: tuple[int, ...]  # that train on it; a random subset serves one seed


@dataclass(frozen=True)
class Training:
    """One student on one entry with one seed."""

    entry: Entry
    recipe: int  # which student of the configuration, from 0
    config: StudentConfig
    seed: int
    file: Path  # where its record is kept

    @property
    def cost(self) -> float:
        return float(self.entry.images * self.config.epochs)


@dataclass(frozen=True)
class Work:
    """Where an evaluation keeps its files, and who does what."""

    folder: Path
    accelerator: Accelerator

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def mine(self, costs: Sequence[float]) -> list[int]:
        return shard(costs, self.accelerator.process_index, self.accelerator.num_processes)


# --- what is to be done -------------------------------------------------------------------------------------------


def students_of(
    evaluate: EvaluateConfig, ipcs: Sequence[str], classes: int, image_size: int
) -> dict[tuple[int, str], StudentConfig]:
    """Settings of every student for every ipc.

    Raises:
        InputError: for an unknown network, protocol or setting.
    """
    found = {}
    for j, spec in enumerate(evaluate.students):
        for ipc in ipcs:
            where = f"evaluate.students.{j}"
            found[(j, ipc)] = student_config(spec, ipc=ipc, classes=classes, image_size=image_size, where=where)
            make_net(found[(j, ipc)].net, classes, image_size, norm=found[(j, ipc)].norm, seed=0)
    return found


def check_evaluation(config: RunConfig, source: ImageSource) -> None:
    """What can be known before the first image is encoded: split, teachers, networks, epochs.

    Raises:
        InputError: for whatever would stop the label or the evaluate stage.
    """
    for t in config.teachers:
        teacher_file(t)
    e = config.evaluate
    ipcs = [str(i) for i in config.ipc] + ["full"] * ("full" in e.baselines)
    size = config.image_size
    students = students_of(e, ipcs, len(source.class_names), size)
    if any(s.labels != "hard" for s in students.values()) and not config.teachers:
        raise InputError("students with labels=soft or fixed need a teacher; set teachers, or use labels=hard")
    if "patches" in e.baselines and e.students and not config.teachers:
        raise InputError("the baseline 'patches' is scored by a teacher; set teachers, or leave it out of baselines")
    if e.students or config.teachers:
        _ = source.test


def baseline_entries(bench: Bench, evaluate: EvaluateConfig, work: Work, ipcs: Sequence[int]) -> list[Entry]:
    """Selection baselines at these numbers of images per class, and the full data. Each selected set is saved once."""
    counts = bench.source.class_counts()
    seeds = tuple(range(evaluate.seeds))
    entries = []
    for ipc in ipcs:
        images = int(counts.clip(max=ipc).sum())
        for name in evaluate.baselines:
            if name == "full":
                continue
            # only a random subset is another one for another seed
            for group in [(s,) for s in seeds] if name == "random" else [seeds]:
                settings: list[Any] = [bench.world, name, ipc, group[0], evaluate.patch_factor]
                if name in (*BY_FEATURES, "patches"):
                    settings.append(bench.teachers[0].digest if bench.teachers else "pooled")
                identity = digest_of(settings)
                load = functools.partial(_selected, bench, evaluate, work, name, ipc, group[0], identity)
                entries.append(Entry(name, str(ipc), images, identity, load, group))
    if "full" in evaluate.baselines:
        identity = digest_of([bench.world, "full"])
        load = functools.partial(_full, bench)
        entries.append(Entry("full", "full", len(bench.candidates), identity, load, seeds[: evaluate.full_seeds]))
    return entries


def _selected(
    bench: Bench, evaluate: EvaluateConfig, work: Work, name: str, ipc: int, seed: int, identity: str
) -> DistilledSet:
    folder = _baseline_folder(work, name, ipc, seed, identity)
    if not (folder / "set" / "provenance.json").is_file():
        made = select(
            name,
            bench.source,
            ipc,
            image_size=bench.image_size,
            source_config=bench.source_config,
            seed=seed,
            features=bench.features,
            teacher=bench.teachers[0] if bench.teachers else None,
            candidates=bench.candidates,
            factor=evaluate.patch_factor,
        )
        made.save(folder, "set")
    return DistilledSet.load(folder, "set")


def _baseline_folder(work: Work, name: str, ipc: int, seed: int, identity: str) -> Path:
    return work.folder / "baselines" / f"ipc{ipc}-{name}-seed{seed}-{identity}"


def _full(bench: Bench) -> DistilledSet:
    from dq.evaluation.foreign import bare_set

    images, labels = bench.read(bench.source.train, bench.candidates)
    return bare_set(images, labels, bench.source.class_names, origin="all of train")


def trainings_of(
    entries: Sequence[Entry],
    students: dict[tuple[int, str], StudentConfig],
    bench: Bench,
    evaluate: EvaluateConfig,
    work: Work,
) -> list[Training]:
    """All trainings, recipe by recipe, each with the file of its record."""
    found = []
    for j in range(len(evaluate.students)):
        for entry in entries:
            config = students[(j, entry.ipc)]
            # the one costly baseline is shared by all evaluations on this data
            base = bench.cache_dir / "full" if entry.ipc == "full" else work.folder / "eval" / "units"
            settings = to_dict(config)
            settings["relabel"].pop("storage")
            identity: list[Any] = [settings, bench.world, entry.identity]
            if config.labels != "hard":
                identity.append([t.digest for t in bench.teachers])
            for seed in entry.seeds:
                name = f"{entry.name}-ipc{entry.ipc}-{config.net}-{config.labels}-seed{seed}"
                name = name.replace(":", "_")
                found.append(Training(entry, j, config, seed, base / f"{name}-{digest_of(identity)}.json"))
    return found


# --- labels of views ----------------------------------------------------------------------------------------------


def label_folder(work: Work, t: Training, bench: Bench) -> Path:
    """Where the epoch labels of a training are; trainings that differ in nothing that labels depend on share them."""
    name = f"ipc{t.entry.ipc}-{t.entry.name}" + (f"-seed{t.entry.seeds[0]}" if len(t.entry.seeds) == 1 else "")
    return work.folder / "labels" / f"{name}-{_blind_plan(t, bench).digest}"


def write_labels(trainings: Sequence[Training], bench: Bench, work: Work) -> None:
    """Label every view of every entry that some student learns from with stored labels; files that are there stay.

    The files of all sets are divided over processes together. Before anything is written the space is compared with
    what the disk has left.
    """
    wanted: dict[Path, Training] = {}
    for t in trainings:
        # the full data would be stored once per epoch: its labels are always computed when needed
        if t.config.labels == "soft" and t.config.relabel.storage == "shards" and t.entry.ipc != "full":
            wanted.setdefault(label_folder(work, t, bench), t)
    units = []
    total = 0
    for folder, t in wanted.items():
        plan = _blind_plan(t, bench)
        known = (folder / MANIFEST).is_file()  # else nobody can say what the files are labels of
        shards = [r for r in plan.shards() if not (known and shard_file(folder, r.start).is_file())]
        total += plan_bytes(plan).total * sum(map(len, shards)) // plan.epochs
        units += [(folder, t, r) for r in shards]
    # every process must have seen the same files before the first is written, or they divide different lists
    work.accelerator.wait_for_everyone()
    if not units:
        return
    _check_space(work, total, len(wanted))
    costs = [float(t.entry.images * len(r)) for _, t, r in units]
    mine = [units[i] for i in work.mine(costs)]
    views = round(sum(t.entry.images * len(r) for _, t, r in mine))
    open_folder: Path | None = None
    images, plan = torch.empty(0), _blind_plan(units[0][1], bench)
    with progress([], desc="label", total=views, unit="view", main=work.main) as bar:
        for folder, t, epochs in mine:
            if folder != open_folder:
                data = bench.data_of(t.entry.load())
                images, open_folder = data.images.to(bench.device), folder
                plan = make_plan(data.images, bench.teachers, bench.classes, t.config)
                # a selected set may be smaller than asked for, but its files are those that were divided
                plan = dataclasses.replace(plan, shard_epochs=_blind_plan(t, bench).shard_epochs)
                write_manifest(folder, data.images, plan, bench.teachers, set=t.entry.name, ipc=t.entry.ipc)

            write_shard(folder, images, bench.teachers, plan, epochs)
            bar.update(t.entry.images * len(epochs))


def _blind_plan(t: Training, bench: Bench) -> LabelPlan:
    """The plan of a training's labels before its images are loaded."""
    return plan_labels(
        t.entry.images, bench.image_size, bench.teachers, bench.classes, t.config, image_digest=t.entry.identity
    )


def _check_space(work: Work, total: int, sets: int) -> None:
    import shutil

    work.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work.folder).free
    if work.main:
        log.info("soft labels of %d sets: %s to write, %s free", sets, _size(total), _size(free))
    if total > free:
        raise RunError(
            f"the soft labels need {_size(total)} but {work.folder} has {_size(free)} left; "
            "set relabel.bits=8, relabel.top_k, relabel.epochs or relabel.storage=online"
        )


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


# --- training -----------------------------------------------------------------------------------------------------


def train_one(
    t: Training, bench: Bench, work: Work, on_epoch: Callable[[int, float], None] | None = None
) -> dict[str, Any]:
    """Train and test one student; returns a plain record with all that is needed to do it again."""
    s = t.entry.load()
    check_classes(s, f"the set {t.entry.name!r}")
    data = bench.data_of(s)
    size = 0
    if t.config.labels == "fixed":
        soft = data.soft_labels if data.soft_labels is not None else bench.soften(data.images)
        data = dataclasses.replace(data, soft_labels=soft)
        size = len(data.images) * bench.classes * 2
    elif t.config.labels == "soft":
        source, size = _label_source(t, data, bench, work)
        data = dataclasses.replace(data, soft_labels=source)
    result = train_student(
        data.images,
        data.labels,
        num_classes=bench.classes,
        config=t.config,
        test=bench.test(t.config.test_scale),
        validation=bench.validation(t.config.test_scale),
        weights=data.weights,
        soft_labels=data.soft_labels,
        pixels=bench.pixels(t.config),
        seed=derive_seed("student", t.seed),  # not the run's: evaluation seeds are the same for all sets ever
        device=bench.device,
        on_epoch=on_epoch,
        checkpoint=_checkpoint(t),
    )
    gpu = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else None
    return {
        "set": t.entry.name,
        "ipc": t.entry.ipc,
        "images": len(data.images),
        "student": t.config.net,
        "labels": t.config.labels,
        "seed": t.seed,
        "recipe": t.recipe,
        "protocol": t.config.protocol,
        "settings": settings_line(t.config),
        "image_bytes": data.images.nbytes,
        "label_bytes": size,
        **dataclasses.asdict(result),
        "config": to_dict(t.config),
        "teachers": [{"name": x.name, "digest": x.digest} for x in bench.teachers],
        "data": {"origin": bench.source.origin, "world": bench.world, "set": t.entry.identity},
        "software": {"python": platform.python_version(), "torch": torch.__version__},
        "hardware": {"device": gpu or bench.device.type, "threads": torch.get_num_threads()},
    }


def _checkpoint(t: Training) -> Path:
    return t.file.with_suffix(".checkpoint.safetensors")


def _label_source(t: Training, data: Data, bench: Bench, work: Work) -> tuple[Any, int]:
    if t.config.relabel.storage == "online" or t.entry.ipc == "full":
        plan = make_plan(data.images, bench.teachers, bench.classes, t.config)
        return online_labels(data.images.to(bench.device), bench.teachers, plan), 0
    folder = label_folder(work, t, bench)
    return read_labels(folder, data.images), sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def train_all(trainings: Sequence[Training], bench: Bench, work: Work) -> list[dict[str, Any]]:
    """Do all trainings, one file each, divided over processes; returns their records in order."""
    needed = {(t.entry.name, t.entry.ipc, t.entry.seeds): t.entry for t in trainings if not t.file.is_file()}
    selections = [e for e in needed.values() if e.ipc != "full"]
    if work.main and any(e.name in BY_FEATURES for e in selections):
        bench.features()  # once, before the processes share the selections
    work.accelerator.wait_for_everyone()
    for i in work.mine([float(e.images) for e in selections]):
        selections[i].load()  # selected sets are saved by one process and read by the others
    work.accelerator.wait_for_everyone()
    write_labels([t for t in trainings if not t.file.is_file()], bench, work)
    work.accelerator.wait_for_everyone()
    todo = [i for i in work.mine([t.cost for t in trainings]) if not trainings[i].file.is_file()]
    # cheap trainings first: an early look at the table, and nothing lost if the dear ones are interrupted
    todo.sort(key=lambda i: trainings[i].cost)
    total = round(sum(trainings[i].cost for i in todo))
    with progress([], desc="evaluate", total=total, unit="img", main=work.main) as bar:
        done = 0.0
        for i in todo:
            t = trainings[i]
            bar.set_postfix_str(f"{t.entry.name} ipc {t.entry.ipc} {t.config.net} seed {t.seed}")

            def advance(epoch: int, loss: float, t: Training = t, done: float = done) -> None:
                bar.update(round(done + epoch * t.entry.images) - bar.n)

            write_json(t.file, train_one(t, bench, work, advance))
            _checkpoint(t).unlink(missing_ok=True)
            done += t.cost
    work.accelerator.wait_for_everyone()
    # the record may come from another evaluation's full data, under another number of recipe
    return [{**read_json(t.file), "recipe": t.recipe} for t in trainings]


def write_tables(records: list[dict[str, Any]], work: Work) -> list[Row]:
    """Summarise trainings; the main process writes `eval/summary.csv`, `comparisons.csv` and `trainings.jsonl`."""
    rows = summarize(records)
    if work.main:
        write_text(work.folder / "eval" / "summary.csv", to_csv([r.record() for r in rows]))
        write_text(work.folder / "eval" / "comparisons.csv", to_csv([c.record() for c in compare(rows)]))
        write_text(work.folder / "eval" / "trainings.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    work.accelerator.wait_for_everyone()
    return rows


# --- the doors ----------------------------------------------------------------------------------------------------


def prepare_run(run: Run, *, baselines: bool = True) -> tuple[list[Training], Bench, Work]:
    """The trainings of a run: all its sets and, with `baselines`, what they are compared with."""
    c = run.config
    ipcs = [str(i) for i in c.ipc] + ["full"] * ("full" in c.evaluate.baselines)
    students = students_of(c.evaluate, ipcs, len(run.source.class_names), c.image_size)
    bench = make_bench(
        run.source,
        c.source,
        c.evaluate,
        list(students.values()),
        image_size=c.image_size,
        cache_dir=Path(c.cache_dir),
        teachers=c.teachers,
        device=run.device,
    )
    work = Work(run.folder, run.accelerator)
    entries = []
    largest: dict[int, int] = {}
    for ipc in c.ipc:
        for method in c.methods:
            s = load_set(run, ipc, method)
            # several images of a prototype: baselines in equal number
            largest[ipc] = max(largest.get(ipc, 0), s.ipc)
            load = functools.partial(load_set, run, ipc, method)
            seeds = tuple(range(c.evaluate.seeds))
            entries.append(Entry(method, str(ipc), len(s), s.provenance["content"], load, seeds))
    if baselines:
        sizes = {s: str(i) for i, s in largest.items()}
        found = baseline_entries(bench, c.evaluate, work, list(sizes))
        entries += [dataclasses.replace(e, ipc=sizes[int(e.ipc)]) if e.ipc != "full" else e for e in found]
    return trainings_of(entries, students, bench, c.evaluate, work), bench, work


def evaluate_run(run: Run) -> list[Row]:
    """The evaluate stage: all methods and baselines of a run, all students, all seeds; one file per training."""
    began = time.perf_counter()
    trainings, bench, work = prepare_run(run)
    rows = write_tables(train_all(trainings, bench, work), work)
    run.finish("evaluate", began, trainings=len(trainings))
    return rows


def label_run(run: Run) -> None:
    """Store the labels of every view that the students of a run learn from, for the sets of the run."""
    if any(spec for spec in run.config.evaluate.students) and run.config.teachers:
        began = time.perf_counter()
        trainings, bench, work = prepare_run(run, baselines=False)
        write_labels(trainings, bench, work)
        run.finish("label views", began)


def evaluate_records(
    sets: dict[str, DistilledSet],
    source: ImageSource,
    *,
    config: EvaluateConfig,
    source_config: SourceConfig,
    teachers: Sequence[TeacherConfig] = (),
    image_size: int | None = None,
    folder: Path,
    cache_dir: Path,
    accelerator: Accelerator,
    ipcs: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Train on sets of any origin and on baselines of equal size (and of `ipcs`); files and resume as in a run.

    Raises:
        InputError: if a set has other classes than the source, or an empty one.
    """
    for name, s in sets.items():
        check_name(name, "the set's name")
        if name in get_args(Baseline):
            raise InputError(f"the set's name {name!r} is that of a baseline; choose another")
        if s.class_names != source.class_names:
            raise InputError(f"the set {name!r} has other classes than {source.origin}, or another order of them")
        check_classes(s, f"the set {name!r}")
    sizes = {s.images.shape[-1] for s in sets.values()}
    if image_size is None and len(sizes) > 1:
        raise InputError(f"the sets have images of {sorted(sizes)} px; say at which size to train: --image_size")
    if image_size is None and not sizes:
        raise InputError("baselines alone need the side in px at which to train: --image_size")
    side = image_size or sizes.pop()
    per_class = sorted({*ipcs, *(s.ipc for s in sets.values())})
    keys = [str(i) for i in per_class] + ["full"] * ("full" in config.baselines)
    students = students_of(config, keys, len(source.class_names), side)
    bench = make_bench(
        source,
        source_config,
        config,
        list(students.values()),
        image_size=side,
        cache_dir=cache_dir,
        teachers=teachers,
        device=accelerator.device,
    )
    if any(s.labels == "fixed" for s in students.values()) and not teachers:
        bare = [name for name, s in sets.items() if s.soft_labels is None] + list(config.baselines)
        if bare:
            raise InputError(f"{bare[0]!r} has no labels for labels=fixed; set teachers, or use labels=hard")
    _ = source.test  # there must be one
    work = Work(folder, accelerator)
    seeds = tuple(range(config.seeds))
    entries = [
        Entry(name, str(s.ipc), len(s), _identity(s), functools.partial(_itself, s), seeds) for name, s in sets.items()
    ]
    entries += baseline_entries(bench, config, work, per_class)
    return train_all(trainings_of(entries, students, bench, config, work), bench, work)


def evaluate_sets(
    sets: dict[str, DistilledSet], source: ImageSource, *, folder: Path, accelerator: Accelerator, **options: Any
) -> list[Row]:
    """`evaluate_records` with its tables written to `folder`/eval."""
    records = evaluate_records(sets, source, folder=folder, accelerator=accelerator, **options)
    return write_tables(records, Work(folder, accelerator))


def _itself(s: DistilledSet) -> DistilledSet:
    return s


def _identity(s: DistilledSet) -> str:
    tensors = {"images": s.images, "labels": s.labels, "weights": s.weights}
    if s.soft_labels is not None:
        tensors["soft_labels"] = s.soft_labels
    return digest_of_tensors(tensors)


def evaluate(
    small: DistilledSet,
    source: Any,
    *,
    protocol: str = "classic",
    student: str | dict[str, Any] | Sequence[str | dict[str, Any]] | None = None,
    seeds: int = 3,
    baselines: tuple[str, ...] = ("random",),
    teachers: TeacherConfig | Sequence[TeacherConfig] = (),
    image_size: int | None = None,
    source_config: SourceConfig | None = None,
    output_dir: str | Path | None = None,
    cache_dir: str | Path = "runs/cache",
    accelerator: Accelerator | None = None,
    **settings: Any,
) -> Results:
    """Train fresh students on a set and on baselines of equal size, and test them on `source.test`.

    Args:
        source: anything that `load_source` takes.
        protocol: a preset: classic, hard, sre2l, rded, edc, fadrm; or custom.
        student: a network by name, or a mapping of `StudentConfig` settings; several for a cross-architecture table;
            None: the network of the protocol.
        baselines: any of random, herding, k-center, nearest, patches, full.
        teachers: who labels views, where the protocol needs labels.
        image_size: side in px at which students train; None: the set's.
        source_config: how images become squares, and what happens to unreadable ones.
        output_dir: where records and labels are kept, so that the same call continues; None: nowhere.
        accelerator: where to train; default: the accelerator of this machine if there is one.
        **settings: fields of `StudentConfig` for all students; `epochs` may be a mapping by ipc.

    Example:
        print(evaluate(small, source, protocol="classic", student=["convnet3", "vgg11"], seeds=5))
    """
    from dq.config import from_dict

    source = load_source(source)
    asked = student if isinstance(student, (list, tuple)) else [student]
    specs = [dict(s) if isinstance(s, dict) else {"net": s} if s else {} for s in asked]
    specs = [{"protocol": protocol, **settings, **s} for s in specs]
    config = from_dict(EvaluateConfig, {"seeds": seeds, "baselines": list(baselines), "students": specs}, "evaluate")
    with tempfile.TemporaryDirectory() as scratch:
        rows = evaluate_sets(
            {"set": small},
            source,
            config=config,
            source_config=source_config or SourceConfig(),
            teachers=(teachers,) if isinstance(teachers, TeacherConfig) else tuple(teachers),
            image_size=image_size,
            folder=Path(output_dir or scratch),
            cache_dir=Path(cache_dir if output_dir else scratch),
            accelerator=accelerator or make_accelerator(),
        )
    return Results(tuple(rows), tuple(compare(rows)))


@dataclass(frozen=True)
class Results:
    """Rows of a table and what may be said of their differences; prints as both."""

    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...] = ()

    def __str__(self) -> str:
        return "\n".join([markdown_table(list(self.rows)), *map(str, self.comparisons)])
