"""Tables of the results of refinement: FADRM and Teddy, FRePo, matching of trajectories."""

from __future__ import annotations

from collections.abc import Iterable

from result_tables import ROOT, interval, read, read_numbered

from dq.core.text import markdown_table, plural
from dq.evaluation.statistics import format_mean_std

LABELERS = {"one": "soft, one teacher", "plus": "soft, three architectures", "pool": "soft, pool", "hard": "hard"}


def refinement(folder: str) -> str:
    """Sets against students and labelers; last epoch, mean ± std in percent."""
    rows = read(f"{folder}/accuracy.csv")
    columns = list(dict.fromkeys((r["labels"], r["student"], r["ipc"]) for r in rows))
    cells = {(r["set"], r["labels"], r["student"], r["ipc"]): r for r in rows}

    def cell(r: dict[str, str] | None) -> str:
        return "" if r is None else f"{100 * float(r['mean']):.1f} ± {100 * float(r['std']):.1f}"

    body = [[name, *[cell(cells.get((name, *c))) for c in columns]] for name in dict.fromkeys(r["set"] for r in rows)]
    return markdown_table(
        ["set", *[f"{LABELERS[kind]}: {student}, IPC {ipc}" for kind, student, ipc in columns]], body
    )


def questions(folder: str) -> str:
    """Paired differences of the questions that the refinement was measured for."""
    rows = read(f"{folder}/differences.csv")
    students = list(dict.fromkeys((r["student"], r["ipc"]) for r in rows))
    cells = {(r["question"], r["student"], r["ipc"]): r for r in rows}

    def cell(r: dict[str, str] | None) -> str:
        if r is None:
            return ""
        return interval(float(r["mean"]), float(r["low"]), float(r["high"]), bold=r["verdict"] != "undecided")

    body = [[q, *[cell(cells.get((q, *s))) for s in students]] for q in dict.fromkeys(r["question"] for r in rows)]
    return markdown_table(["difference, points", *[f"{student}, IPC {ipc}" for student, ipc in students]], body)


def refined_images(folder: str) -> str:
    """What the stages did to their images."""
    body = [
        [
            r["set"],
            r["stage"],
            *(
                f"{100 * float(r[f'{g}_before']):.0f} → {100 * float(r[f'{g}_after']):.0f} %"
                for g in ("teachers", "validation_teachers")
            ),
            f"{float(r['variation_before']):.1f} → {float(r['variation_after']):.1f}",
            f"{float(r['anchor_distance_after']):.1f}",
        ]
        for r in read(f"{folder}/refinement.csv")
    ]
    head = ["set", "stage", "teachers", "validation teacher (ResNet-56)", "total variation", "distance to the anchor"]
    return markdown_table(head, body)


def refinement_speed() -> str:
    """Time per step against a plain loop."""
    body = [
        [
            f"{r['net']}, {r['side']} px, batch {r['batch_size']}, {r['dtype']}",
            f"{r['device']}, {plural(int(r['threads']), 'thread')}",
            f"{float(r['plain_s_per_step']):.3f} s",
            f"{float(r['dq_s_per_step']):.3f} s",
            r["times_faster"],
            r["largest_loss_difference"],
        ]
        for r in read("refine.csv")
    ]
    head = ["teacher", "device", "plain loop", "dq", "times faster", "largest difference of a loss"]
    return markdown_table(head, body)


def over_seeds(values: Iterable[tuple[str, str, float]]) -> str:
    """Mean ± std in percent of fractions, with the names of row and column."""
    rows: dict[str, dict[str, list[float]]] = {}
    for row, column, value in values:
        rows.setdefault(row, {}).setdefault(column, []).append(100 * value)
    columns = list(dict.fromkeys(c for cells in rows.values() for c in cells))
    body = [[name, *[format_mean_std(c[k]) if k in c else "" for k in columns]] for name, c in rows.items()]
    return markdown_table(["%", *columns], body)


def with_ridge(*folders: str) -> str:
    """Sets against students and ipc: last epoch, mean ± std in percent.

    In parentheses stands ridge regression on the students' features.
    """
    rows = [r for folder in folders for r in read_numbered(f"{folder}/accuracy.csv")]
    columns = list(dict.fromkeys((r["student"], r["protocol"], r["ipc"]) for r in rows))
    cells = {(r["set"], r["student"], r["protocol"], r["ipc"]): r for r in rows}

    def cell(r: dict[str, str] | None) -> str:
        if r is None:
            return ""
        ridge = f" ({100 * float(r['krr_mean']):.1f})" if r.get("krr_mean") else ""
        return f"{100 * float(r['last_mean']):.1f} ± {100 * float(r['last_std']):.1f}{ridge}"

    head = ["set", *(f"`{protocol}`, {net}, IPC {ipc}" for net, protocol, ipc in columns)]
    return markdown_table(
        head,
        [[name, *(cell(cells.get((name, *c))) for c in columns)] for name in dict.fromkeys(r["set"] for r in rows)],
    )


def checks(folder: str, by: str = "start") -> str:
    """Accuracy on held-out train images by steps, for each start or set."""
    rows = read(f"{folder}/checks.csv")
    steps = list(dict.fromkeys(r["steps"] for r in rows))
    cells = {(r[by], r["steps"]): f"{100 * float(r['accuracy']):.1f}" for r in rows}
    names = dict.fromkeys(r[by] for r in rows)
    return markdown_table(
        [by, *(f"{int(s):,} steps" for s in steps)], [[s, *(cells[s, t] for t in steps)] for s in names]
    )


def unroll() -> str:
    """TESLA beside exact unrolling."""
    keys = ("steps", "exact_mb", "tesla_mb", "time", "cosine", "norms")
    head = ["steps of the student", "exact, MB", "TESLA, MB", "time, TESLA / exact", "cosine of gradients", "norms"]
    return markdown_table(head, [[r[k] for k in keys] for r in read("unroll.csv")])


def frepo_continual(name: str) -> str:
    """Sets against classes seen so far."""
    return over_seeds((r["set"], f"{r['classes']} classes", float(r["accuracy"])) for r in read(name))


def frepo_membership() -> str:
    """Accuracies of networks, and AUC and accuracy of attacks, against sets and training steps."""
    rows = read("frepo_membership.csv")
    values: list[tuple[str, dict[str, str], str]] = []
    once = [r for r in rows if r["attack"] == rows[0]["attack"]]  # a training has a row for each attack
    for population in ("member", "other"):
        values += [(f"network's accuracy on {population}s", r, f"{population}_accuracy") for r in once]
    values += [(f"AUC, {r['attack']}", r, "auc") for r in rows]
    values += [(f"accuracy, {r['attack']}", r, "attack_accuracy") for r in rows if r["attack_accuracy"] != "nan"]
    return over_seeds((name, f"{r['set']}, {r['steps']} steps", float(r[key])) for name, r, key in values)


def frepo_anchors() -> str:
    """Linear features, and random features without and with mirror images beside each other."""
    rows = read("frepo_anchors.csv")
    body = []
    for r in rows:
        if r["mirrors"] == "yes":
            continue
        other = next(
            (o for o in rows if o["mirrors"] == "yes" and (o["anchor"], o["n"]) == (r["anchor"], r["n"])), None
        )
        cells = [f"{o['accuracy']} ± {o['std']}".removesuffix(" ± ") if o else "" for o in (r, other)]
        expected = [o["expected"] if o else "" for o in (r, other)]
        body.append([f"{r['anchor']}, {r['data']}", r["n"], cells[0], expected[0], cells[1], expected[1]])
    return markdown_table(["features", "images", "accuracy %", "expected", "with mirror images", "expected"], body)


def frepo_step() -> str:
    head = ["images", "in a chunk", "chunks / one pass", "the same of a step", "activations of the network"]
    head += ["all that autograd saves", "step / plain loop", "largest difference"]
    keys = ("n", "chunk", "chunked_over_one_pass", "chunked_step_over_one_pass_step", "network_activation_ratio")
    keys += ("saved_bytes_ratio", "step_over_plain_step", "largest_relative_difference")
    return markdown_table(head, [[r[k] for k in keys] for r in read("frepo_step.csv")])


MATCHED = {
    "Fashion-MNIST, IPC 1": "fashion_{}_ipc1",
    "Fashion-MNIST, IPC 10": "fashion_{}",
    "CIFAR-10, IPC 1": "cifar10_{}_ipc1",
    "CIFAR-10, IPC 10": "cifar10_{}",
}
# further runs with the same start, students and controls, of which the column shows what its own run lacks
BESIDE = {"fashion_matching": "fashion_gradient"}


def matched_rows(kind: str, table: str) -> dict[str, list[dict[str, str]]]:
    """Rows of a CSV file of the existing results of a kind of matching, by the name of their column."""
    folders = {name: folder.format(kind) for name, folder in MATCHED.items()}
    folders = {name: f for name, f in folders.items() if (ROOT / "results" / f / table).exists()}
    return {name: [*_beside(f, table), *read(f"{f}/{table}")] for name, f in folders.items()}


def _beside(folder: str, table: str) -> list[dict[str, str]]:
    return read(f"{BESIDE[folder]}/{table}") if folder in BESIDE else []


def matched(kind: str, labels: str) -> str:
    """Sets against data sets and ipc for one kind of labels: mean ± std in percent."""
    folders = matched_rows(kind, "accuracy.csv")
    cells = {
        (r["set"], name): f"{100 * float(r['last_mean']):.1f} ± {100 * float(r['last_std']):.1f}"
        for name, rows in folders.items()
        for r in rows
        if r["labels"] == labels
    }
    sets = dict.fromkeys(name for name, _ in cells)
    return markdown_table(["set", *folders], [[s, *[cells.get((s, name), "") for name in folders]] for s in sets])


def matched_differences(kind: str, labels: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Paired differences with 95 % intervals, in points; in bold where the interval leaves zero out."""
    cells, folders = {}, matched_rows(kind, "comparisons.csv")
    for name, rows in folders.items():
        for r in rows:
            if r["labels"] == labels:
                d, low, high = (float(r[k]) for k in ("difference", "low", "high"))
                bold = r["verdict"] != "undecided"
                cells[r["set"], r["against"], name] = interval(d, low, high, bold=bold)
                cells[r["against"], r["set"], name] = interval(-d, -high, -low, bold=bold)
    body = [[f"{a} - {b}", *[cells.get((a, b, name), "") for name in folders]] for a, b in pairs]
    return markdown_table(["difference, points", *folders], body)


if __name__ == "__main__":
    raise SystemExit("refinement_tables is a module of readme_tables.py; run that")
