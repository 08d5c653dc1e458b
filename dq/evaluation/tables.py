"""Results as text: tables of accuracies, and which sets are best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dq.core.text import markdown_table
from dq.evaluation.results import Comparison, Row, compare, recipe_names
from dq.evaluation.statistics import format_mean_std, mean_std
from dq.evaluation.verdicts import verdict_text

if TYPE_CHECKING:
    import pandas as pd


def accuracy_table(rows: list[Row], *, which: str = "last") -> str:
    """Accuracy in percent, mean ± std over seeds.

    One line per set, one column per recipe and ipc. `which` is the "last" epoch, the "best" epoch, or "redundancy" of
    the rows that have one.
    """
    rows = [r for r in rows if getattr(r, which)]
    columns = list(dict.fromkeys((r.recipe, r.student, r.labels, r.ipc) for r in rows))
    columns.sort(key=lambda c: (c[0], _order(c[3])))
    names = list(dict.fromkeys(r.set for r in rows))
    cells = {(r.set, r.recipe, r.student, r.labels, r.ipc): r for r in rows}
    recipes = recipe_names([r.record() for r in rows])
    head = [f"{recipes[n]}, {'full' if i == 'full' else f'IPC {i}'}" for n, _, _, i in columns]
    by_set = {name: [cells.get((name, *c)) for c in columns] for name in names}
    body = [[name, *(_cell(r, which) if r else "" for r in of_set)] for name, of_set in by_set.items()]
    seeds = "/".join(str(n) for n in sorted({len(getattr(r, which)) for r in rows}))
    chosen = sorted({r.selected_on for r in rows} - {"none"})
    what = "last epoch" if which != "best" else f"best epoch, chosen on {' or '.join(chosen) or 'nothing'}"
    used = "; ".join(dict.fromkeys(f"{r.protocol}, {r.student}: {r.settings}" for r in rows))
    tested = "Redundancy: accuracy on the next slice of a set" if which == "redundancy" else "Top-1 test accuracy"
    note = f"{tested} in %, {what}, mean ± std over {seeds} seed{'' if seeds == '1' else 's'}."
    if which == "last" and any(r.krr for r in rows):
        note += " In parentheses: kernel ridge regression on the students' features."
    return "\n".join([markdown_table(["set", *head], body), "", note, f"Protocols: {used}."])


def _cell(row: Row, which: str) -> str:
    text = format_mean_std([100 * a for a in getattr(row, which)])
    return f"{text} ({100 * mean_std(row.krr)[0]:.1f})" if row.krr and which == "last" else text


def _order(ipc: str) -> tuple[int, int]:
    return (1, 0) if ipc == "full" else (0, int(ipc))


def tables_text(rows: list[Row]) -> str:
    """Text of an evaluation: accuracies, and which sets are best.

    Best epochs are shown where some were chosen.
    """
    best = any(r.selected_on != "none" for r in rows)
    parts = [accuracy_table(rows), *([accuracy_table(rows, which="best")] if best else [])]
    parts += [accuracy_table(rows, which="redundancy")] if any(r.redundancy for r in rows) else []
    parts.append(verdict_text(rows))
    return "\n\n".join(p for p in parts if p)


@dataclass(frozen=True)
class Results:
    """Rows of a results table and their comparisons; prints as both."""

    rows: tuple[Row, ...]

    @property
    def comparisons(self) -> list[Comparison]:
        return compare(list(self.rows))

    def to_pandas(self) -> pd.DataFrame:
        """Rows as a data frame, one line per set and student."""
        import pandas as pd

        return pd.DataFrame([r.record() for r in self.rows])

    def __str__(self) -> str:
        return tables_text(list(self.rows))
