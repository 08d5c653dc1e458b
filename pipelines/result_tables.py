"""Tables of result files in Markdown: reading, accuracies of sets, differences between them."""

from __future__ import annotations

import csv
from pathlib import Path

from dq.core.text import markdown_table
from dq.evaluation.results import recipe_names

ROOT = Path(__file__).parents[1]


def read(name: str) -> list[dict[str, str]]:
    with open(ROOT / "results" / name, newline="") as f:
        return list(csv.DictReader(line for line in f if not line.startswith("#")))


def read_numbered(path: str) -> list[dict[str, str]]:
    """Rows with the number of their recipe, which early files lack."""
    rows = read(path)
    students = list(dict.fromkeys((r["student"], r["labels"]) for r in rows))
    return [{"recipe": str(students.index((r["student"], r["labels"]))), **r} for r in rows]


def accuracy(folder: str) -> str:
    """Sets against students and ipc; last epoch, mean ± std in percent."""
    rows = read_numbered(f"{folder}/accuracy.csv")
    names = recipe_names(rows)
    ipcs = list(dict.fromkeys(r["ipc"] for r in rows if r["ipc"] != "full"))
    cells = {(r["set"], int(r["recipe"]), r["ipc"]): r for r in rows}

    def cell(r: dict[str, str] | None) -> str:
        if r is None:
            return ""
        std = f" ± {100 * float(r['last_std']):.1f}" if r["last_std"] else ""
        return f"{100 * float(r['last_mean']):.1f}{std}"

    head = ["set", *[f"{name}, IPC {i}" for name in names.values() for i in ipcs]]
    body = []
    for name in dict.fromkeys(r["set"] for r in rows):
        if name == "full":
            full = [cells.get(("full", n, "full")) for n in names for _ in ipcs]
            body.append(["full data", *[cell(r) if n % len(ipcs) == 0 else "" for n, r in enumerate(full)]])
        else:
            body.append([name, *[cell(cells.get((name, n, i))) for n in names for i in ipcs]])
    lines = [markdown_table(head, body), ""]
    for n, name in names.items():
        protocols = {r["ipc"]: r for r in rows if int(r["recipe"]) == n}
        for ipc, r in protocols.items():
            where = "full data" if ipc == "full" else f"IPC {ipc}"
            lines.append(f"- {name} labels, {where}: {r['seeds']} seed(s), {r['protocol']}: {r['settings']}.")
    return "\n".join(lines)


def differences(folder: str) -> str:
    """What the tool says of pairs of sets, and by how much."""
    verdicts = {"better": "{0} beats {1}", "worse": "{1} beats {0}", "undecided": "undecided"}
    rows = read_numbered(f"{folder}/comparisons.csv")
    names = recipe_names(rows)
    body = [
        [
            f"{r['set']} - {r['against']}",
            f"{names[int(r['recipe'])]}, IPC {r['ipc']}",
            f"{100 * float(r['difference']):+.1f}",
            f"{100 * float(r['low']):+.1f} to {100 * float(r['high']):+.1f}" if r["low"] else "",
            verdicts[r["verdict"]].format(r["set"], r["against"]),
        ]
        for r in rows
    ]
    head = ["sets", "student", "difference, points", "95 % interval", "verdict"]
    if "verdict_holm" in rows[0]:  # which earlier files lack
        head.append("after Holm's correction")
        body = [[*line, verdicts[r["verdict_holm"]].format(r["set"], r["against"])] for line, r in zip(body, rows)]
    return markdown_table(head, body)
