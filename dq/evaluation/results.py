"""Results of trainings as rows, CSV and comparisons."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from dq.config.reader import to_dict
from dq.config.students import Baseline, RelabelConfig, StudentConfig, ViewConfig
from dq.core.files import read_jsonl
from dq.core.plain import PlainDict, PlainMapping
from dq.core.text import plural
from dq.evaluation.statistics import Difference, holm, mean_std, paired_difference

log = logging.getLogger("dq")


@dataclass(frozen=True)
class Row:
    """A line of a results table: a set, a student, all seeds.

    Accuracies are fractions.
    """

    set: str  # method, baseline or external set
    ipc: str  # "10", or "full"
    images: int
    student: str
    labels: str  # hard, soft or fixed
    seeds: tuple[int, ...]
    last: tuple[float, ...]  # accuracy after the last epoch, per seed
    best: tuple[float, ...]  # of the epoch chosen on `selected_on`, per seed
    selected_on: str  # validation, test or none
    recipe: int  # which student of the configuration, from 0
    test_images: int
    seconds: float  # of training without evaluation, mean over seeds
    image_bytes: int
    label_bytes: int  # of the soft labels on disk
    protocol: str  # name of the preset
    settings: str  # all settings of the training
    krr: tuple[float, ...] = ()  # by kernel ridge regression on the students' features, per seed, with loss=mse
    redundancy: tuple[float, ...] = ()  # accuracy of students of one slice on the next, per seed, where measured

    def record(self) -> PlainDict:
        last, best = mean_std(self.last), mean_std(self.best)
        optional: dict[str, float | None] = {}
        for name, values in (("krr", self.krr), ("redundancy", self.redundancy)):
            if values:
                optional[f"{name}_mean"], optional[f"{name}_std"] = mean_std(values)
        return {
            "set": self.set,
            "ipc": self.ipc,
            "images": self.images,
            "student": self.student,
            "labels": self.labels,
            "recipe": self.recipe,
            "seeds": len(self.last),
            "last_mean": round(last[0], 5),
            "last_std": None if last[1] is None else round(last[1], 5),
            "best_mean": round(best[0], 5),
            "best_std": None if best[1] is None else round(best[1], 5),
            "selected_on": self.selected_on,
            "seconds": round(self.seconds, 1),
            "image_bytes": self.image_bytes,
            "label_bytes": self.label_bytes,
            "protocol": self.protocol,
            "settings": self.settings,
            **{k: None if v is None else round(v, 5) for k, v in optional.items()},
        }


def settings_line(c: StudentConfig) -> str:
    """All settings of a training in one line."""
    parts = [
        plural(c.epochs, "epoch"),
        f"batch {c.batch_size}" + (f" in {c.accumulate} parts" if c.accumulate > 1 else ""),
        f"{c.optimizer} lr {c.lr:g}{' or learned' if c.learned_lr else ''} wd {c.weight_decay:g}"
        + (f" momentum {c.momentum:g}" if c.optimizer == "sgd" else ""),
        c.schedule + (f" zeta {c.zeta:g}" if c.zeta != 1 else "") + (f" to {c.lr_floor:g} lr" if c.lr_floor else ""),
        *_changed_schedule(c),
        f"augment {c.augment}",
    ]
    if c.decay_vectors is not None:
        parts.append(f"weight decay {'' if c.decay_vectors else 'not '}of biases and norms")
    view, plain = to_dict(c.views), to_dict(ViewConfig())
    parts += [f"{k} {_short(v)}" for k, v in view.items() if v != plain[k]]
    if c.labels == "hard":
        parts.append("hard labels")
    else:
        kinds = {"kl": f"KL T={c.temperature:g}", "mse_gt": f"MSE + {c.gt_weight:g} CE", "mse": "squared error"}
        kind = kinds[c.loss]
        parts.append(f"{c.labels} labels, {kind}")
    if c.labels == "soft":
        relabel, usual = to_dict(c.relabel), to_dict(RelabelConfig())
        parts += [f"label {k} {_short(v)}" for k, v in relabel.items() if v != usual[k] or k == "statistics"]
    parts += [f"{c.norm} norm"] if c.norm else []
    parts += [f"{c.init} init"] if c.init else []
    parts += ["ZCA" if c.zca == "mtt" else "ZCA of FRePo"] if c.whiten else []
    parts += [f"EMA {c.ema:g}"] if c.ema else []
    parts += [f"test images resized to {c.test_scale:.4g} sides and cut"] if c.test_scale != 1 else []
    parts += [f"best of {min(c.tests, c.epochs)} looks at {c.select}"] if c.tests > 1 else []
    return ", ".join([*parts, c.dtype])


def _changed_schedule(c: StudentConfig) -> list[str]:
    changed = c.milestones != StudentConfig.milestones or c.step_factor != StudentConfig.step_factor
    steps = "-".join(f"{m:.4g}" for m in c.milestones)
    parts = [f"times {c.step_factor:g} at {steps}"] if changed else []
    return [*parts, f"{plural(c.warmup, 'epoch')} of warm-up"] if c.warmup > 0 else parts


def _short(value: object) -> str:
    if isinstance(value, list):
        return "-".join(_short(v) for v in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def summarize(records: list[PlainDict]) -> list[Row]:
    """Group trainings that differ only in their seed.

    Rows are in the order of first appearance.
    """
    groups: dict[tuple[Any, ...], list[PlainDict]] = {}
    for r in records:
        key = tuple(r[k] for k in ("set", "ipc", "student", "labels", "settings", "recipe"))
        groups.setdefault(key, []).append(r)
    rows = []
    for group in groups.values():
        group.sort(key=lambda r: r["seed"])
        first = group[0]
        same = ["set", "ipc", "images", "student", "labels", "selected_on", "recipe", "protocol", "settings"]
        same.append("test_images")
        rows.append(
            Row(
                **{k: first[k] for k in same},
                image_bytes=first["image_bytes"],
                label_bytes=round(sum(r["label_bytes"] for r in group) / len(group)),
                seeds=tuple(r["seed"] for r in group),
                last=tuple(r["last"] for r in group),
                best=tuple(r["best"] for r in group),
                seconds=sum(r["train_seconds"] for r in group) / len(group),
                krr=tuple(r["krr"] for r in group if r.get("krr") is not None),
                redundancy=tuple(r["redundancy"] for r in group if r.get("redundancy") is not None),
            )
        )
    return rows


def to_csv(records: list[PlainDict]) -> str:
    """Plain records as CSV text with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(
        out, fieldnames=list(dict.fromkeys(k for r in records for k in r)) or ["set"], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def read_records(summary: Path) -> list[dict[str, str]]:
    """The rows of a `summary.csv`."""
    with open(summary, newline="") as f:
        return list(csv.DictReader(f))


ROW = ("set", "ipc", "student", "labels", "protocol", "settings")  # what names a row to a reader


def warn_of_lost_rows(folder: Path, records: list[PlainDict]) -> None:
    """Warn of results in existing tables that new tables will lack.

    These are rows that leave because settings have changed, rows measured on something else, and rows of which seeds
    leave. `folder` has `summary.csv` and `trainings.jsonl`; `records` are of the trainings of the new tables.
    """
    summary = folder / "summary.csv"
    new = {tuple(str(r[k]) for k in ROW) for r in records}
    old = [r for r in read_records(summary) if r.get("set")] if summary.is_file() else []
    lost = [r for r in old if tuple(r.get(k, "") for k in ROW) not in new]
    if lost:
        log.warning(
            "%d of %d rows leave %s, since these settings do not ask for them; the first is %s. Their trainings are "
            "kept: the earlier settings bring them back at once",
            *(len(lost), len(old), summary, _row_name([lost[0].get(k, "") for k in ROW])),
        )
    before, after = (_grounds_by_row(rs) for rs in (read_jsonl(folder / "trainings.jsonl"), records))
    changed, fewer = [], []
    for row in [r for r in before if r in after]:
        was, now = before[row], after[row]
        both = [seed for seed in was if seed in now]
        others = [k for k in GROUNDS if any(None not in (x := (was[s][k], now[s][k])) and x[0] != x[1] for s in both)]
        removed = sorted(set(was) - set(now))
        if others:
            changed.append(f"{_row_name(row)} (other {' and '.join(others)})")
        if removed:
            seeds = f"seed{'s' if len(removed) > 1 else ''} {', '.join(map(str, removed))}"
            fewer.append(f"{_row_name(row)} (without {seeds})")
    for rows, what in ((changed, "are measured again on something else"), (fewer, "lose seeds")):
        if rows:
            log.warning(
                "%d of %d rows of %s %s; the first is %s. The earlier trainings are kept: what was asked for before "
                "brings them back at once",
                *(len(rows), len(before), summary, what, rows[0]),
            )


def _row_name(row: Sequence[str]) -> str:
    name, ipc, student, labels, _, settings = row
    return f"{name}, IPC {ipc}, {student}, {labels} labels, {settings}"


GROUNDS = ("images of the set", "real images", "teachers", "version of dq")


def _grounds_by_row(records: list[PlainDict]) -> dict[tuple[str, ...], dict[int, PlainDict]]:
    """What a result depends on beside its row, by row and seed.

    None where a record lacks it.
    """
    rows: dict[tuple[str, ...], dict[int, PlainDict]] = {}
    for r in records:
        data, software = (x if isinstance(x := r.get(k), dict) else {} for k in ("data", "software"))
        real = [data.get(k) for k in ("fingerprint", "image_size", "validation_images")]
        teachers = t if isinstance(t := r.get("teachers"), list) and r.get("labels") != "hard" else None
        grounds = [
            data.get("set_digest"),
            None if real[0] is None else real,
            teachers and [t.get("digest") for t in teachers if isinstance(t, dict)],
            software.get("dq"),
        ]
        if type(r.get("seed")) is int:  # else it is no record of a training
            row = tuple(str(r.get(k, "")) for k in ROW)
            rows.setdefault(row, {})[r["seed"]] = dict(zip(GROUNDS, grounds, strict=True))
    return rows


def recipe_names(records: Sequence[PlainMapping]) -> dict[int, str]:
    """A distinct name for every recipe (student of the configuration).

    It has network and labels, and what else tells it from others of the same: the protocol, settings, else its number.
    `records` are `Row.record()`s, or the rows of a `summary.csv`.
    """
    pieces: dict[int, set[str]] = {}
    base: dict[int, str] = {}
    for r in records:
        n, parts = int(r["recipe"]), {f"protocol {r['protocol']}", *str(r["settings"]).split(", ")}
        base[n] = f"{r['student']}, {r['labels']}"
        pieces[n] = pieces[n] & parts if n in pieces else parts  # epochs differ between numbers of images
    names = {}
    for n in sorted(base):
        twins = [m for m in base if base[m] == base[n]]
        shared = set.intersection(*(pieces[m] for m in twins))
        differ = sorted(pieces[n] - shared, key=lambda piece: (not piece.startswith("protocol "), piece))
        distinct = {tuple(sorted(pieces[m] - shared)) for m in twins}
        if len(twins) == 1:
            names[n] = base[n]
        elif differ and len(differ) <= 2 and len(distinct) == len(twins):
            names[n] = ", ".join([base[n], *(piece.removeprefix("protocol ") for piece in differ)])
        else:
            names[n] = f"{base[n]} #{n + 1}"
    return names


@dataclass(frozen=True)
class Comparison:
    """Two sets of equal size under one recipe."""

    a: Row
    b: Row
    difference: Difference  # of last-epoch accuracies, a - b
    name: str  # of the recipe among those of the table
    p_holm: float | None  # p value corrected for the number of comparisons; None with a single pair

    @property
    def verdict_holm(self) -> str:
        """The verdict after Holm's correction for the number of comparisons."""
        decided = self.p_holm is not None and self.p_holm < 1 - self.difference.confidence
        return self.difference.verdict if decided else "undecided"

    def record(self) -> PlainDict:
        d = self.difference
        single = d.pairs == 1
        return {
            "set": self.a.set,
            "against": self.b.set,
            "ipc": self.a.ipc,
            "student": self.a.student,
            "labels": self.a.labels,
            "recipe": self.a.recipe,
            "protocol": self.a.protocol,
            "settings": self.a.settings,
            "pairs": d.pairs,
            "difference": round(d.mean, 5),
            "low": None if single else round(d.low, 5),
            "high": None if single else round(d.high, 5),
            "confidence": d.confidence,
            "verdict": d.verdict,
            "p_value": None if d.p_value is None else float(f"{d.p_value:.4g}"),
            "p_holm": None if self.p_holm is None else float(f"{self.p_holm:.4g}"),
            "verdict_holm": self.verdict_holm,
        }

    def __str__(self) -> str:
        d, where = self.difference, f"{self.name}, IPC {self.a.ipc}"
        if d.pairs == 1:
            return f"{where}: {self.a.set} and {self.b.set} cannot be compared with one seed"
        gap = f"{100 * d.mean:+.1f} points, {d.confidence:.0%} interval {100 * d.low:+.1f} to {100 * d.high:+.1f}"
        verdict = {
            "better": f"{self.a.set} beats {self.b.set}",
            "worse": f"{self.b.set} beats {self.a.set}",
            "undecided": f"{d.pairs} seeds do not tell {self.a.set} from {self.b.set}",
        }[d.verdict]
        corrected = "" if self.verdict_holm == d.verdict else "; undecided after Holm's correction"
        return f"{where}: {verdict} ({gap}{corrected})"


def compare(rows: list[Row]) -> list[Comparison]:
    """Compare pairs of rows at equal ipc and recipe.

    Over the seeds that both have: every set and baseline against random images, and sets against one another. Rows of
    unequal numbers of images are not compared.
    """
    pairs = []
    names = recipe_names([r.record() for r in rows])
    for i, a in enumerate(rows):
        for b in [*rows[:i], *rows[i + 1 :]]:
            same = (a.recipe, a.ipc, a.images) == (b.recipe, b.ipc, b.images)
            sets = {a.set, b.set}.isdisjoint(get_args(Baseline)) and i < rows.index(b)
            both = sorted(set(a.seeds) & set(b.seeds))
            if same and both and (sets or b.set == "random"):
                x, y = ([dict(zip(r.seeds, r.last, strict=True))[s] for s in both] for r in (a, b))
                pairs.append((a, b, paired_difference(x, y, test_images=a.test_images)))
    corrected = iter(holm([d.p_value for _, _, d in pairs if d.p_value is not None]))
    return [Comparison(a, b, d, names[a.recipe], None if d.p_value is None else next(corrected)) for a, b, d in pairs]
