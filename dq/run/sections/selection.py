"""Selection among candidates: what the rule kept and what it dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dq.core.files import is_done, read_json, read_tensors
from dq.core.plain import PlainDict
from dq.diffusion.latents import LatentCache
from dq.run.folder import Run, class_file
from dq.run.sections.accuracy import varying
from dq.run.stages.generate import drawn_folders
from dq.run.stages.select import selection_sentences

MAX_CLASSES = 10  # whose candidates are drawn


@dataclass(frozen=True)
class Candidates:
    """Candidates of a class: probabilities of the class by the selecting teacher."""

    name: str
    kept: tuple[float, ...]
    dropped: tuple[float, ...]


def selection_content(run: Run, cache: LatentCache, present: Sequence[tuple[int, str]]) -> PlainDict:
    """Table, warnings and candidates of the sets that were selected.

    Empty without any.
    """
    rows, sentences, pools = [], [], []
    drawn = drawn_folders(run, cache) if present else {}
    for ipc, method in present:
        provenance = read_json(run.folder / "dataset" / f"ipc{ipc}-{method}" / "provenance.json")
        s = provenance["generate"].get("selection")
        if s:
            p_drawn, p_kept = (f"{100 * s[name]:.1f} %" for name in ("probability_drawn", "probability_kept"))
            measures = ((n, s[f"{n}_first"], s[n]) for n in ("w2", "coverage") if n in s)
            change = ", ".join(f"{name} {first:.3f} to {last:.3f}" for name, first, last in measures)
            candidates, images = s["candidates"], s["images"]
            if "real_kept" in s:
                candidates = f"{candidates} and {s['real_candidates']} real"
                images = f"{images}, {s['real_kept']} of them real"
            rows.append([method, ipc, s["rule"], candidates, s["teacher"], images, p_drawn, p_kept, change])
            sentences += [f"{method} at IPC {ipc}: {sentence}." for sentence in selection_sentences(s)]
            classes = _candidates(run, drawn[f"{ipc}/{method}"])
            if classes:
                pools.append({"title": f"{method}, IPC {ipc}", "classes": classes})
    if not rows:
        return {}
    head = ["method", "IPC", "rule", "candidates", "teacher", "images", "p(y) of all", "p(y) of the kept"]
    table, same = varying(([*head, "from the first draws to the kept"], rows))
    return {"table": table, "same": same, "sentences": sentences, "pools": pools}


def _candidates(run: Run, folder: Path) -> list[Candidates]:
    """Candidates of the first classes, from the records beside their images."""
    classes = []
    for label, name in enumerate(run.source.class_names[:MAX_CLASSES]):
        path = class_file(folder, label)
        tensors = read_tensors(path)[0] if is_done(path) else {}
        if "pool_kept" in tensors:
            p, kept = tensors["pool_probability"], tensors["pool_kept"]
            classes.append(Candidates(name, tuple(p[kept].tolist()), tuple(p[~kept].tolist())))
    return classes
