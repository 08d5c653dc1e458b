"""Which set is best under each student, and which sets beat random real images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from dq.config.students import Baseline
from dq.core.plain import PlainMapping
from dq.core.text import plural
from dq.evaluation.results import Row, compare, recipe_names

VERDICTS = ("better", "undecided", "worse")


@dataclass(frozen=True)
class Gap:
    """Difference of two sets of equal images, in percentage points."""

    points: float
    low: float | None  # of the 95 % interval; None with one pair of seeds
    high: float | None
    pairs: int
    verdict: str  # better, undecided or worse
    verdict_holm: str  # after Holm's correction for the number of comparisons

    def reversed(self) -> Gap:
        """The difference of the second set from the first."""
        turned = {"better": "worse", "worse": "better"}
        low, high = (None if x is None else -x for x in (self.high, self.low))
        verdicts = (turned.get(v, v) for v in (self.verdict, self.verdict_holm))
        return Gap(-self.points, low, high, self.pairs, *verdicts)

    @property
    def words(self) -> str:
        """The verdict, and what Holm's correction leaves of it."""
        if self.verdict_holm == self.verdict:
            return self.verdict
        return f"{self.verdict}, {self.verdict_holm} after Holm's correction"

    @property
    def interval(self) -> str:
        return "" if self.low is None or self.high is None else f"{self.low:+.1f} to {self.high:+.1f}"


@dataclass(frozen=True)
class Score:
    """Accuracy of students that are trained on a set, in percent."""

    set: str
    images: int
    mean: float  # of the last epoch, over seeds
    std: float | None  # None with one seed
    seeds: int
    gap: Gap | None  # None: not compared with random images

    @property
    def is_real(self) -> bool:
        """Whether the set is a baseline, made of real images."""
        return self.set in get_args(Baseline)

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"


@dataclass(frozen=True)
class Ranking:
    """Sets of equal images per class under one student."""

    student: str  # distinct name of network and labels
    recipe: int
    ipc: str
    protocol: str  # name and settings of the trainings
    scores: tuple[Score, ...]  # in the order of the table
    full: Score | None  # of all train images
    others: dict[str, Gap]  # of the best set over each other set that is no baseline

    @property
    def random(self) -> Score | None:
        return next((s for s in self.scores if s.set == "random"), None)

    @property
    def best(self) -> Score | None:
        """The set of highest mean accuracy that is no baseline; None if all are baselines."""
        return best_of([s for s in self.scores if not s.is_real])

    @property
    def best_real(self) -> Score | None:
        """The baseline of highest mean accuracy."""
        return best_of([s for s in self.scores if s.is_real])

    @property
    def headline(self) -> str:
        """Text such as "ddoq +12.5 over random, undecided, 2 seeds"."""
        best = self.best or self.best_real
        if best is None:
            return "no set was evaluated"
        if best.gap is None:
            return f"{best.set} {best.mean:.1f} %, not compared with random images, {plural(best.seeds, 'seed')}"
        words, seeds = best.gap.words, plural(best.gap.pairs, "seed")
        return f"{best.set} {best.gap.points:+.1f} over random, {words}, {seeds}"


def rankings(records: Sequence[PlainMapping], comparisons: Sequence[PlainMapping]) -> list[Ranking]:
    """Group results by student and images per class.

    Args:
        records: `Row.record()`s, or rows of a `summary.csv`.
        comparisons: `Comparison.record()`s, or rows of a `comparisons.csv`.
    """
    names = recipe_names(records)
    gaps = {}
    for c in comparisons:
        gaps[str(c["recipe"]), c["ipc"], c["set"], c["against"]] = gap = _gap(c)
        gaps[str(c["recipe"]), c["ipc"], c["against"], c["set"]] = gap.reversed()
    groups: dict[tuple[str, str], list[PlainMapping]] = {}
    for r in records:
        groups.setdefault((str(r["recipe"]), r["ipc"]), []).append(r)
    ranked = []
    for (recipe, ipc), rows in groups.items():
        if ipc == "full" and any(r == recipe and i != "full" for r, i in groups):
            continue
        protocols = dict.fromkeys(f"{r['protocol']}: {r['settings']}" for r in rows)
        full = groups.get((recipe, "full"), [])
        scores = tuple(_score(r, gaps.get((recipe, ipc, r["set"], "random"))) for r in rows)
        best = best_of([s for s in scores if not s.is_real])
        pairs = {s.set: gaps.get((recipe, ipc, best.set, s.set)) for s in scores if best and not s.is_real}
        ranked.append(
            Ranking(
                student=names[int(recipe)],
                recipe=int(recipe),
                ipc=ipc,
                protocol="; ".join(protocols),
                scores=scores,
                full=_score(full[0], None) if full and ipc != "full" else None,
                others={name: gap for name, gap in pairs.items() if gap is not None},
            )
        )
    return ranked


def best_of(scores: Sequence[Score]) -> Score | None:
    """The score of highest mean; None without any."""
    return max(scores, key=lambda s: s.mean, default=None)


def _score(r: PlainMapping, gap: Gap | None) -> Score:
    std = None if r["last_std"] in (None, "") else 100 * float(r["last_std"])
    return Score(r["set"], int(r["images"]), 100 * float(r["last_mean"]), std, int(r["seeds"]), gap)


def _gap(c: PlainMapping) -> Gap:
    low, high = (None if c[k] in (None, "") else 100 * float(c[k]) for k in ("low", "high"))
    verdict = c["verdict"]  # files of earlier versions have no corrected one
    return Gap(100 * float(c["difference"]), low, high, int(c["pairs"]), verdict, c.get("verdict_holm") or verdict)


def verdict_text(rows: Sequence[Row]) -> str:
    """Say by student and images per class which set is best, and which beat random images."""
    comparisons = compare(list(rows))
    lines: list[str] = []
    for ranking in rankings([r.record() for r in rows], [c.record() for c in comparisons]):
        if ranking.ipc != "full":
            lines += _lines(ranking)
    if len(comparisons) > 1:
        decided = [c for c in comparisons if c.difference.verdict != "undecided"]
        hold = sum(c.verdict_holm != "undecided" for c in decided)
        also = f"; {hold} of them after Holm's correction for their number" if decided else ""
        lines.append(f"{len(decided)} of {len(comparisons)} comparisons of pairs are decided at 95 % each{also}.")
    return "\n".join(lines)


def _lines(ranking: Ranking) -> list[str]:
    """A headline and its details."""
    best, random, real = ranking.best, ranking.random, ranking.best_real
    lines = [f"{ranking.student}, IPC {ranking.ipc}: {ranking.headline}"]
    if best is not None and random is not None and best.gap is not None:
        interval = f"; 95 % interval {best.gap.interval}" if best.gap.interval else ""
        lines.append(f"  {best.set} {best} %, random images {random} %{interval}")
    if best is not None and real is not None and real.mean > best.mean:
        lines.append(f"  higher: {real.set} real images, {real} %")
    beside = {s.set: s.gap for s in ranking.scores if s.gap is not None}
    lines += [f"  beside random images {_by_verdict(beside)}"] if len(beside) > 1 else []
    lines += [f"  {best.set} beside other sets {_by_verdict(ranking.others)}"] if best and ranking.others else []
    others = [s.set for s in ranking.scores if s.gap is None and s.set != "random"]
    unequal = [s.set for s in ranking.scores if random is not None and s.images != random.images]
    if random is not None and others:
        why = "which are not of equal number" if set(others) <= set(unequal) else "which have no seed in common"
        lines.append(f"  not compared with random images, {why}: {', '.join(others)}")
    return lines


def _by_verdict(gaps: Mapping[str, Gap]) -> str:
    """Names by verdict, such as "better: a, b; undecided: c"."""
    names = {v: [f"{name} ({g.points:+.1f})" for name, g in gaps.items() if g.verdict == v] for v in VERDICTS}
    return "; ".join(f"{v}: {', '.join(group)}" for v, group in names.items() if group)
