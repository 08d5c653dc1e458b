"""Tables of result files in Markdown: reading, accuracies of sets, differences between them."""

from __future__ import annotations

import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path

from dq.core.text import markdown_table, plural
from dq.evaluation.results import recipe_names
from dq.evaluation.statistics import holm, paired_difference

ROOT = Path(__file__).parents[1]
ABOVE = "as above"


def read(name: str) -> list[dict[str, str]]:
    with open(ROOT / "results" / name, newline="") as f:
        return list(csv.DictReader(line for line in f if not line.startswith("#")))


def read_numbered(path: str) -> list[dict[str, str]]:
    """Rows with number, protocol and settings of their recipe, which early files lack."""
    rows = read(path)
    students = list(dict.fromkeys((r["student"], r["labels"]) for r in rows))
    early = {"protocol": "", "settings": ""}
    return [{"recipe": str(students.index((r["student"], r["labels"]))), **early, **r} for r in rows]


def accuracy(folder: str) -> str:
    """Sets against students and ipc; last epoch, mean ± std in percent."""
    rows = read_numbered(f"{folder}/accuracy.csv")
    names = recipe_names(rows)
    ipcs = list(dict.fromkeys(r["ipc"] for r in rows if r["ipc"] != "full"))
    cells = {(r["set"], int(r["recipe"]), r["ipc"]): r for r in rows}

    head = ["set", *[f"{name}, IPC {i}" for name in names.values() for i in ipcs]]
    body = []
    for name in dict.fromkeys(r["set"] for r in rows):
        if name == "full":
            full = [cells.get(("full", n, "full")) for n in names for _ in ipcs]
            body.append(["full data", *[percent(r) if n % len(ipcs) == 0 else "" for n, r in enumerate(full)]])
        else:
            body.append([name, *[percent(cells.get((name, n, i))) for n in names for i in ipcs]])
    lines = [markdown_table(head, body), ""]
    for n, name in names.items():
        protocols = {r["ipc"]: r for r in rows if int(r["recipe"]) == n}
        for ipc, r in protocols.items():
            where = "full data" if ipc == "full" else f"IPC {ipc}"
            lines.append(
                f"- {name} labels, {where}: {plural(int(r['seeds']), 'seed')}, {r['protocol']}: {r['settings']}."
            )
    return "\n".join(lines)


def records() -> str:
    """The best set of every run of `results/` for each of its students, beside random images, with the command."""
    body = []
    for path in sorted((ROOT / "results").glob("*/accuracy.csv")):
        rows = read_numbered(f"{path.parent.name}/accuracy.csv")
        if "last_mean" not in rows[0]:
            continue  # a table of its own, shown in docs/results/ingredients.md
        names = recipe_names(rows)
        run = path.with_name("run.json")
        command = json.loads(run.read_text())["command"] if run.is_file() else ""
        for recipe, ipc in dict.fromkeys((int(r["recipe"]), r["ipc"]) for r in rows if r["ipc"] != "full"):
            column = {r["set"]: r for r in rows if (int(r["recipe"]), r["ipc"]) == (recipe, ipc)}
            best = max(column.values(), key=lambda r: float(r["last_mean"]))
            random = column.get("random", column.get("random-real"))
            student = f"{names[recipe]}, IPC {ipc}"
            cells = [f"`{path.parent.name}`", student, f"`{best['set']}`", percent(best), percent(random)]
            body.append([*cells, command if command == ABOVE else f"`{command}`"])
            command = ABOVE
    return markdown_table(["results", "student", "best set", "accuracy, %", "random, %", "command"], body, left=3)


def percent(row: dict[str, str] | None) -> str:
    """Mean ± std of the last epoch in percent; nothing without a row."""
    if row is None:
        return ""
    std = f" ± {100 * float(row['last_std']):.1f}" if row["last_std"] else ""
    return f"{100 * float(row['last_mean']):.1f}{std}"


def interval(mean: float, low: float, high: float, *, bold: bool) -> str:
    """A difference of accuracies and its interval, in points."""
    text = f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"**{text}**" if bold else text


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
        holm = [verdicts[r["verdict_holm"]].format(r["set"], r["against"]) for r in rows]
        body = [[*line, verdict] for line, verdict in zip(body, holm, strict=True)]
    return markdown_table(head, body)


def advantages(folder: str, name: str) -> str:
    """Paired differences of one set to every other of its size, over seeds.

    They are in points with 95 % intervals, in bold where decided after Holm's correction for all differences of the
    table.
    """
    rows = [json.loads(line) for line in (ROOT / "results" / folder / "trainings.jsonl").read_text().splitlines()]
    names = recipe_names(rows)
    last: dict[tuple[str, int, str], dict[int, float]] = defaultdict(dict)
    images = {}
    for r in rows:
        last[r["set"], int(r["recipe"]), r["ipc"]][r["seed"]] = r["last"]
        images[r["set"], r["ipc"]] = r["images"]
    columns = sorted({(recipe, ipc) for other, recipe, ipc in last if other == name}, key=lambda c: (c[0], int(c[1])))
    others = [o for o in dict.fromkeys(r["set"] for r in rows) if o not in (name, "full")]
    differences = {}
    for other in others:
        for recipe, ipc in columns:
            a, b = last[name, recipe, ipc], last.get((other, recipe, ipc), {})
            both = sorted(a.keys() & b.keys())
            if len(both) > 1 and images[name, ipc] == images[other, ipc]:
                pairs = [a[k] for k in both], [b[k] for k in both]
                differences[other, recipe, ipc] = paired_difference(*pairs, test_images=rows[0]["test_images"])
    corrected = dict(zip(differences, holm([d.p_value for d in differences.values()]), strict=True))

    def cell(key: tuple[str, int, str]) -> str:
        if key not in differences:
            return ""
        d = differences[key]
        return interval(d.mean, d.low, d.high, bold=corrected[key] < 0.05)

    body = [[f"{name} - {o}", *[cell((o, *c)) for c in columns]] for o in others]
    return markdown_table(["difference, points", *[f"{names[r]}, IPC {ipc}" for r, ipc in columns]], body)


def several_sets(folders: list[str], name: str, column: tuple[str, str, str]) -> str:
    """Sets of runs with other seeds: each one's mean over students, and differences of `name` with sets as pairs.

    `column` is the student, its labels and the images per class. Means and std are over sets, in percent.
    """
    columns = ("student", "labels", "ipc")
    runs = [
        {r["set"]: r for r in read(f"{f}/accuracy.csv") if tuple(r[c] for c in columns) == column} for f in folders
    ]
    tests = json.loads((ROOT / "results" / folders[0] / "trainings.jsonl").read_text().partition("\n")[0])[
        "test_images"
    ]
    means = {s: [float(run[s]["last_mean"]) for run in runs] for s in runs[0] if all(s in run for run in runs)}
    body = []
    for other, values in means.items():
        cells = [f"{100 * v:.1f}" for v in values]
        summary = f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
        d = paired_difference(means[name], values, test_images=tests) if other != name else None
        text = interval(d.mean, d.low, d.high, bold=d.verdict != "undecided") if d else ""
        body.append([other, *cells, summary, text])
    head = ["set", *[f"seed {i} of the run" for i in range(len(runs))], "mean over sets", f"{name} - it, points"]
    return markdown_table(head, body)


if __name__ == "__main__":
    raise SystemExit("result_tables is a module of readme_tables.py; run that")
