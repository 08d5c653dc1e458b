"""Write the tables of texts from the files in `results/`.

    python pipelines/readme_tables.py [--check] [FILE ...]

Everything between `<!-- table NAME -->` and `<!-- end -->` is replaced; without files, in README.md and in the pages
of `docs/` that have such marks. `--check` changes nothing and fails if the texts do not say what the files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

from refinement_tables import (
    checks,
    frepo_anchors,
    frepo_continual,
    frepo_membership,
    frepo_step,
    matched,
    matched_differences,
    questions,
    refined_images,
    refinement,
    refinement_speed,
    unroll,
    with_ridge,
)
from result_tables import ROOT, accuracy, advantages, differences, read, records, several_sets

from dq.core.progress import duration
from dq.core.text import format_bytes, markdown_table


def ablation(*names: str) -> str:
    """Arms against students and ipc: mean ± std, and the paired difference to the default where it is beyond doubt."""
    rows = [r for name in names for r in read(f"{name}/ablation.csv")]
    columns = list(dict.fromkeys((r["student"], r["labels"], r["ipc"]) for r in rows))
    cells = {(r["factor"], r["level"], r["student"], r["labels"], r["ipc"]): r for r in rows}

    def cell(r: dict[str, str] | None) -> str:
        if r is None:
            return ""
        text = f"{100 * float(r['mean']):.1f} ± {100 * float(r['std']):.1f}"
        if r["low"] and (float(r["low"]) > 0 or float(r["high"]) < 0):
            text += f" ({100 * float(r['difference']):+.1f})"
        return text

    order = list(dict.fromkeys((r["factor"], r["level"]) for r in rows))
    factors = ["default", *(f for f in dict.fromkeys(f for f, _ in order) if f not in ("default", "rivals")), "rivals"]
    body = [
        [f"{factor}: {level}" if level else f"**{factor}**", *[cell(cells.get((factor, level, *c))) for c in columns]]
        for wanted in factors
        for factor, level in order
        if factor == wanted
    ]
    return markdown_table(["arm", *[f"{s}, {kind}, IPC {ipc}" for s, kind, ipc in columns]], body)


def prior_quality(folder: str) -> str:
    from dq.diffusion.card import quality_table

    records = [
        json.loads(line) for line in (ROOT / "results" / folder / "prior_quality.jsonl").read_text().splitlines()
    ]
    head, body = quality_table(records)
    return markdown_table(head, body)


def label_storage(folder: str) -> str:
    """Bytes of soft labels against accuracy, one line per way of keeping them."""
    rows = read(f"{folder}/accuracy.csv")
    whole = int(rows[0]["label_bytes"])
    payload = int(rows[0]["views"]) * int(rows[0]["classes"]) * 2
    body = [
        [
            r["kept"],
            f"{int(r['label_bytes']) / 1000:.0f} kB",
            f"{whole / int(r['label_bytes']):.1f}",
            f"{payload / int(r['label_bytes']):.1f}",
            f"{100 * float(r['last_mean']):.1f} ± {100 * float(r['last_std']):.1f}",
        ]
        for r in rows
    ]
    head = [
        "labels kept as",
        "on disk",
        "times smaller than the first",
        "times smaller than N·E·C·2 bytes",
        "accuracy",
    ]
    return markdown_table(head, body)


def quantization(folder: str) -> str:
    head = [
        "points",
        "IPC",
        "variance explained",
        "W2, masses",
        "W2, uniform",
        "masses lower W2 by",
        "effective points",
    ]
    body = [
        [
            {"minibatch": "D4M one-pass mini-batch"}.get(r["engine"], f"converged k-means ({r['engine']})"),
            r["ipc"],
            f"{100 * float(r['explained']):.1f} %",
            f"{float(r['w2_mass']):.2f}",
            f"{float(r['w2_uniform']):.2f}",
            f"{100 * float(r['w2_reduction']):.1f} %",
            f"{float(r['ess_mass']):.1f}",
        ]
        for r in read(f"{folder}/quantization.csv")
        if r["ipc"] != "1"
    ]
    return markdown_table(head, body)


def codecs() -> str:
    head = ["codec", "at", "precision", "PSNR", "ResNet-56 accuracy"]
    body = [
        [
            r["codec"],
            f"{r['resolution']} px",
            r["dtype"],
            f"{r['psnr_db']} dB" if r["psnr_db"] else "",
            f"{100 * float(r['teacher_accuracy']):.1f} %",
        ]
        for r in [*read("codec_ceiling.csv"), *read("codec_own.csv")[1:]]
    ]
    return markdown_table(head, body)


def clustering() -> str:
    rows = read("cluster.csv")
    head = ["data, k", "method", "time", "against scikit-learn", "distortion against scikit-learn"]
    wanted = ("scikit-learn", "D4M", "dq default", "dq faiss")
    body = [
        [
            f"{r['data']}, {r['k']}",
            r["method"],
            f"{float(r['seconds']):.2f} s",
            f"{float(r['time_ratio']):.2f}",
            f"{100 * (float(r['distortion_ratio']) - 1):+.2f} %",
        ]
        for r in rows
        if r["method"].startswith(wanted) and "random" not in r["method"]
    ]
    return markdown_table(head, body)


def student_speed() -> str:
    """Seconds per epoch of the training loops."""
    head = ["network", "loop", "seconds per epoch", "ratio", "of"]
    body = [
        [r["net"], r["loop"], f"{float(r['seconds_per_epoch']):.2f}", f"{float(r['ratio']):.2f}", r["against"]]
        for r in read("student.csv")
    ]
    return markdown_table(head, body)


def prior_tricks() -> str:
    """Options of training at equal CPU time: accuracy, Fréchet distance and coverage of samples at two guidances."""
    measures = [f"{m}_{g}" for g in (1, 2) for m in ("accuracy", "frechet", "coverage")]
    names = [f"{m.partition('_')[0].replace('frechet', 'Fréchet')}, guidance {m[-1]}" for m in measures]
    body = [
        [r["variant"], r["s_per_step"], r["steps"], f"{float(r['held_out_loss']):.3f}"]
        + [f"{float(r[m]):.1f}" if m.startswith("frechet") else f"{float(r[m]):.2f}" for m in measures]
        for r in read("prior_tricks.csv")
    ]
    return markdown_table(["options", "seconds per step", "steps", "held-out loss", *names], body)


def faults() -> str:
    rows = read("scale/faults.csv")
    stages = ["opening", "encode", "cluster", "generate", "refine", "label", "assemble", "evaluate", "report"]
    head = ["fault", "number", *stages, "finished units redone", "lost", "results that differ"]
    body = [
        [r["fault"], r["faults"], *(r[s] for s in stages), r["recomputed"], r["lost"], r["differing"] or ""]
        for r in rows
    ]
    return markdown_table(head, body)


def scale() -> str:
    """Stages in columns; sets and processes in rows."""
    rows = read("scale/estimates.csv")
    stages = list(dict.fromkeys(r["stage"] for r in rows))
    cells = {(r["set"], r["ipc"], r["processes"], r["stage"]): r for r in rows}
    body = []
    for name, ipc, processes in dict.fromkeys((r["set"], r["ipc"], r["processes"]) for r in rows):
        own = [cells.get((name, ipc, processes, s)) for s in stages]
        times = [duration(float(r["seconds"])) if r and r["seconds"] else "" for r in own]
        size = format_bytes(sum(float(r["bytes"]) for r in own if r))
        body.append([name, ipc, processes, *times, size])
    return markdown_table(["set", "ipc", "processes", *stages, "on disk"], body)


def estimate_check() -> str:
    rows = read("scale/estimate_check.csv")
    head = ["stage", "estimated (s)", "took (s)", "took / estimated"]
    return markdown_table(head, [[r["stage"], r["estimated_s"], r["took_s"], r["took_by_estimated"]] for r in rows])


def streaming() -> str:
    rows = read("streaming.csv")
    head = ["rows", "peak memory (MB)", "against the first", "images / s"]
    body = [[f"{int(r['rows']):,}", r["peak_mb"], r["ratio"], r["images_per_s"]] for r in rows]
    return markdown_table(head, body)


def sampling_steps() -> str:
    """Quality of a prior's samples by the number of steps."""
    measures = ("accuracy", "frechet", "kernel", "density", "coverage")
    head = ["images", "steps", "model calls", *measures]
    body = [
        [r["row"], r["steps"], r["model_calls"], *(f"{float(r[m]):.3g}" for m in measures)]
        for r in read("sampling_steps.csv")
    ]
    return markdown_table(head, body)


def file_speeds() -> str:
    rows = read("files.csv")
    names = {
        "checksum": "checksum of 64 MB: BLAKE2, against XXH3",
        "PNG coded": "PNG files coded: one thread, against all cores",
        "PNG decoded": "PNG files decoded: one thread, against all cores",
        "exact transport": "exact transport: one thread, against all cores",
    }
    head = ["work", "ratio of times", "least", "largest", "rounds"]
    return markdown_table(head, [[names[r["work"]], r["ratio"], r["least"], r["largest"], r["rounds"]] for r in rows])


def allocator() -> str:
    rows = read("allocator.csv")
    head = ["work", "time of the defaults, against kept", "peak memory, kept against defaults", "pages asked for"]
    pages = [f"{float(r['faults_kept']):,.0f} of {float(r['faults_default']):,.0f}" for r in rows]
    names = {"convnet3w32": "steps of ConvNet-3, width 32", "encode": "encoding with the codec of the CIFAR-10 prior"}
    body = [[names[r["work"]], r["time_ratio"], r["memory_ratio"], p] for r, p in zip(rows, pages, strict=True)]
    return markdown_table(head, body)


def processes() -> str:
    rows = read("processes.csv")
    head = ["stage", "images", "processes", "times the throughput of one", "least", "largest", "repeats"]
    head.append("as many unrelated runs")
    keys = ("stage", "images", "processes", "ratio", "least", "largest", "repeats", "unrelated_runs")
    return markdown_table(head, [[r[k] for k in keys] for r in rows])


def difficulty() -> str:
    """How difficulty scores of other seeds agree."""
    rows = read("difficulty.csv")
    half = int(rows[0]["runs"]) // 2
    head = ["score", "two runs", f"two means of {half} runs", "with EL2N"]
    return markdown_table(head, [[r["score"], r["two_runs"], r["two_halves"], r["with_el2n"]] for r in rows])


def fuzz() -> str:
    """By kind of input; damaged bytes and well-made absurdities beside each other."""
    sums: dict[str, Counter[str]] = {}
    for r in read("fuzz.csv"):
        name = r["target"].removeprefix("odd ")
        if name != "all":
            n = Counter({k: int(r[k]) for k in ("accepted", "refused")})
            n["odd" if r["target"].startswith("odd ") else "damaged"] = int(r["inputs"])
            n["else"] = sum(int(r[k]) for k in ("undocumented", "crashes", "hangs"))
            sums.setdefault("images of seven formats" if name.startswith("image ") else name, Counter()).update(n)
    sums["all"] = sum(sums.values(), Counter())
    head = ["input", "damaged", "odd", "taken", "refused in one sentence", "anything else"]
    keys = ("damaged", "odd", "accepted", "refused", "else")
    return markdown_table(head, [[kind, *(str(n[k]) for k in keys)] for kind, n in sums.items()])


TRAJECTORY_PAIRS = [("datm", "start"), ("pad", "start"), ("datm", "random-real"), ("pad", "datm")]
MATCHING_PAIRS = [(a, b) for a in ("distribution", "gradient") for b in ("nearest-real", "random")]

TABLES = {
    "records": records,
    "faults": faults,
    "scale": scale,
    "estimate_check": estimate_check,
    "streaming": streaming,
    "allocator": allocator,
    "sampling_steps": sampling_steps,
    "prior_tricks": prior_tricks,
    "file_speeds": file_speeds,
    "processes": processes,
    "difficulty": difficulty,
    "fuzz": fuzz,
    "frepo_anchors": frepo_anchors,
    "frepo_step": frepo_step,
    "unroll": unroll,
    "trajectory": lambda: matched("trajectory", "fixed"),
    "trajectory_checks": lambda: checks("fashion_trajectory", by="set"),
    "trajectory_differences": lambda: matched_differences("trajectory", "fixed", TRAJECTORY_PAIRS),
    "matching": lambda: matched("matching", "hard"),
    "matching_differences": lambda: matched_differences("matching", "hard", MATCHING_PAIRS),
    "pruning": lambda: accuracy("cifar10_prune"),
    "pruning_refinement": lambda: accuracy("cifar10_prune_refine"),
    "frepo_digits": lambda: with_ridge("digits_frepo"),
    "frepo_fashion": lambda: with_ridge("fashion_frepo", "fashion_frepo_ipc10"),
    "frepo_fashion_checks": lambda: checks("fashion_frepo"),
    "frepo_cifar10": lambda: with_ridge("cifar10_frepo"),
    "frepo_cifar10_checks": lambda: checks("cifar10_frepo"),
    "frepo_cifar10_differences": lambda: differences("cifar10_frepo"),
    "frepo_fashion_differences": lambda: differences("fashion_frepo"),
    "refinement": lambda: refinement("cifar10_refine"),
    "questions": lambda: questions("cifar10_refine"),
    "refined_images": lambda: refined_images("cifar10_refine"),
    "refine_speed": refinement_speed,
    "frepo_continual": lambda: frepo_continual("frepo_continual.csv"),
    "frepo_continual_ipc1": lambda: frepo_continual("frepo_continual_ipc1.csv"),
    "frepo_membership": frepo_membership,
    "cifar10": lambda: accuracy("cifar10_ddoq"),
    "quantization": lambda: quantization("cifar10_ddoq"),
    "codecs": codecs,
    "clustering": clustering,
    "digits": lambda: accuracy("digits_demo"),
    "digits_trajectory": lambda: accuracy("digits_trajectory"),
    "classic": lambda: accuracy("cifar10_classic"),
    "labels": lambda: accuracy("cifar10_labels"),
    "differences": lambda: differences("cifar10_labels"),
    "storage": lambda: label_storage("cifar10_label_storage"),
    "student": student_speed,
    "prior": lambda: prior_quality("cifar10_prior"),
    "recommended_fashion": lambda: accuracy("fashion_recommended"),
    "recommended_fashion_differences": lambda: advantages("fashion_recommended", "selected"),
    "recommended_fashion_ipc50": lambda: accuracy("fashion_recommended_ipc50"),
    "recommended_fashion_ipc50_differences": lambda: advantages("fashion_recommended_ipc50", "selected"),
    "cifar10_held_out": lambda: accuracy("cifar10_held_out"),
    "cifar10_held_out_guided": lambda: accuracy("cifar10_held_out_guided"),
    "recommended_fashion_sets": lambda: several_sets(
        ["fashion_recommended", "fashion_recommended_seed1", "fashion_recommended_seed2"],
        "selected",
        ("convnet3w32", "hard", "10"),
    ),
    "fashion_options": lambda: accuracy("fashion_options"),
    "fashion_real_candidates": lambda: accuracy("fashion_real_candidates"),
    "cifar10_low_snr": lambda: accuracy("cifar10_low_snr"),
    "cifar10_low_snr_ipc50": lambda: accuracy("cifar10_low_snr_ipc50"),
    "cifar10_low_snr_ipc50_differences": lambda: advantages("cifar10_low_snr_ipc50", "selected"),
    "cifar10_low_snr_differences": lambda: advantages("cifar10_low_snr", "ddoq"),
    "recommended_cifar10": lambda: accuracy("cifar10_recommended"),
    "recommended_cifar10_differences": lambda: advantages("cifar10_recommended", "selected"),
    "digits_differences": lambda: advantages("digits_demo", "recommended-frepo"),
    "prior_continued": lambda: prior_quality("cifar10_prior_continued"),
    "fashion_prior": lambda: prior_quality("fashion_prior"),
    "ablation": lambda: ablation("cifar10_ablation"),
}


MARKED = re.compile(r"<!-- table (\w+) -->.*?<!-- end -->", re.DOTALL)


def marked_files() -> list[Path]:
    """README.md and every page of `docs/` that has marks."""
    return [f for f in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if MARKED.search(f.read_text())]


def names_in(text: str) -> list[str]:
    """Names of the tables of a text."""
    return MARKED.findall(text)


def render(text: str) -> str:
    """The text with its tables as the result files have them."""
    return MARKED.sub(lambda m: f"<!-- table {m[1]} -->\n{TABLES[m[1]]()}\n<!-- end -->", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: README and docs")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    differ = []
    for path in args.files or marked_files():
        if not path.is_file():
            parser.error(f"there is no file {path}; give Markdown files with marked tables")
        text = path.read_text()
        strange = next((n for n in names_in(text) if n not in TABLES), None)
        if strange:
            parser.error(f"{path} asks for a table '{strange}', which is none of {', '.join(TABLES)}")
        new = render(text)
        if new != text:
            differ.append(str(path))
            if not args.check:
                path.write_text(new)
    if args.check and differ:
        message = f"{' and '.join(differ)} differ from results/; run python pipelines/readme_tables.py"
        print(message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
