"""One self-contained HTML page from what a run folder holds, finished or not."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dq.config.reader import dump_config
from dq.core.errors import InputError, RunError
from dq.core.figures import save_image
from dq.core.files import read_json
from dq.core.plain import PlainDict
from dq.distilled.format import PROVENANCE, shown_ipc
from dq.distilled.snippet import training_snippet
from dq.evaluation.results import read_records
from dq.run.folder import Run
from dq.run.pages import write_page
from dq.run.sections.accuracy import accuracy_content
from dq.run.sections.gallery import gallery
from dq.run.sections.quantization import quantization_content
from dq.run.sections.refinement import refinement_content
from dq.run.sections.selection import selection_content
from dq.run.sections.settings import changed_settings, stage_times
from dq.run.stages.encode import cache_of
from dq.run.stages.evaluate import describe_evaluation, outdated_rows

log = logging.getLogger("dq")
T = TypeVar("T")
MAX_GALLERIES = 8


@dataclass
class _Notes:
    """What a report lacks, in sentences."""

    sentences: list[str] = field(default_factory=list)

    def attempt(self, what: str, content: Callable[[], T]) -> T | None:
        """Content of a section; None with a note if its files are missing or damaged."""
        try:
            return content()
        except (InputError, RunError, FileNotFoundError) as e:
            log.warning("the report lacks %s: %s", what, e)
            self.sentences.append(f"{what[0].upper()}{what[1:]} cannot be shown: {e}.")
            return None


def write_report(run: Run) -> Path:
    """Write `report.html` and `figures/*.png`; returns the path of the page.

    What the folder lacks, since the run is not finished or a set was removed, is named on the page.
    """
    c, notes, shown = run.config, _Notes(), shown_ipc(run.config.ipc)
    base = run.folder / "dataset"
    wanted = [(i, m) for i in c.ipc for m in c.methods]
    present = [(i, m) for i, m in wanted if (base / f"ipc{i}-{m}" / PROVENANCE).is_file()]
    _note_missing_sets(wanted, present, notes)
    accuracy = notes.attempt("the accuracy", lambda: _accuracy(run, shown)) or {}
    best = next((p.best for p in accuracy.get("panels", ()) if p.ipc == str(shown)), "")
    ordered = sorted(present, key=lambda p: (p[0] != shown, p[1] != best))
    counts, provenance = run.source.class_counts(), run.folder / "provenance.json"
    times, total = stage_times(run.folder / "metrics.jsonl")
    return write_page(
        run.folder / "report.html",
        "report.html",
        title=str(run.source.origin),
        verdict=_verdict(accuracy) or _not_evaluated(run),
        facts={"images": int(counts.sum()), "classes": len(counts), "fingerprint": run.source.fingerprint},
        sets=_sets_line(present),
        accuracy=accuracy,
        **_of_latents(run, ordered, shown, notes),
        snippet=_snippet(run, *ordered[0]) if ordered else None,
        refinement=notes.attempt("the refinement", lambda: refinement_content(run, shown)),
        times=times,
        total_time=total,
        changed=changed_settings(c),
        settings=dump_config(c),
        provenance=read_json(provenance),
        provenance_text=provenance.read_text(),
        notes=notes.sentences,
    )


def _of_latents(run: Run, ordered: list[tuple[int, str]], shown: int, notes: _Notes) -> PlainDict:
    """Sections that need the latents of the run: images, selection, quantization."""
    cache = notes.attempt("the quantization", lambda: cache_of(run))
    if cache is None:
        return {"galleries": [], "selection": None, "quantization": None}
    galleries: list[PlainDict] = []
    for ipc, method in ordered[:MAX_GALLERIES]:
        first = not galleries  # the others have the same real images
        make = functools.partial(gallery, run, cache, ipc, method, beside_real=first)
        content = notes.attempt(f"the set {method} at IPC {ipc}", make)
        if content:
            save_image(content["grid"], run.folder / "figures" / f"grid-ipc{ipc}-{method}.png")
            galleries.append(content)
    return {
        "galleries": galleries,
        "selection": notes.attempt("the selection", lambda: selection_content(run, cache, ordered)),
        "quantization": notes.attempt("the quantization", lambda: quantization_content(run, cache, shown)),
    }


def _note_missing_sets(wanted: list[tuple[int, str]], present: list[tuple[int, str]], notes: _Notes) -> None:
    """Name the sets of the settings that are not in the folder."""
    missing = [f"{method} at IPC {ipc}" for ipc, method in wanted if (ipc, method) not in present]
    if missing and not present:
        notes.sentences.append("No set is made yet: give the same command again, and it continues.")
    elif missing:
        names = ", ".join(missing)
        notes.sentences.append(f"Not made yet, or removed: {names}. `dq run` with the same settings makes them.")


def _sets_line(present: list[tuple[int, str]]) -> str:
    """Methods and sizes of the sets, such as "ddoq, d4m at IPC 1, 10"."""
    methods, ipcs = dict.fromkeys(m for _, m in present), sorted({i for i, _ in present})
    return f"{', '.join(methods)} at IPC {', '.join(map(str, ipcs))}" if present else ""


def _accuracy(run: Run, shown: int) -> PlainDict:
    describe_evaluation(run.folder)
    return accuracy_content(run.folder, outdated_rows(run.folder), shown_ipc=shown)


def _verdict(accuracy: PlainDict) -> str:
    """The headline of the first panel."""
    panels = accuracy.get("panels")
    return panels[0].headline if panels else ""


def _not_evaluated(run: Run) -> str:
    if not run.config.evaluate.students:
        return "Not evaluated: the settings name no students."
    return "Not evaluated yet: `dq evaluate` with the same settings trains students on the sets."


def _snippet(run: Run, ipc: int, method: str) -> str:
    folder = (run.folder / "dataset").absolute()
    return training_snippet(str(folder), f"ipc{ipc}-{method}", len(run.source.class_names))


def write_results_report(folder: Path) -> Path:
    """Write `report.html` and figures of a folder that holds an evaluation and no run.

    Raises:
        InputError: if it holds no results.
    """
    ddr = folder / "eval" / "ddr.csv"
    accuracy = accuracy_content(folder)
    rows = read_records(ddr) if ddr.is_file() else []
    if not accuracy and not rows:
        raise InputError(
            f"{folder} holds no results (no eval/summary.csv); run `dq evaluate` first, or name a --config"
        )
    return write_page(
        folder / "report.html",
        "results.html",
        title=folder.name,
        verdict=_verdict(accuracy),
        notes=[],
        accuracy=accuracy,
        dd_ranking=(list(rows[0]), [list(r.values()) for r in rows]) if rows else None,
    )
