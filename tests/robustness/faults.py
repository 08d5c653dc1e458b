"""Hurt runs at random, start them again, and compare what they leave with a run that nobody hurt.

    python tests/robustness/faults.py --faults 100 --out results/faults.csv

A life is one run folder. Its command is started again and again, each time with another fault drawn at random, until
it comes through; then every file is compared with that of the unhurt run. No file that was whole before a start may
have been written again by it or have gone. The command runs in forked processes that have everything imported, so that
a hundred faults take minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from toy_world import every_stage, make_world  # noqa: E402

KINDS = ("kill", "terminate", "exception in one rank", "disk full", "truncated file", "flipped byte", "clock back")
DAMAGE = ("truncated file", "flipped byte")
EXIT = {"kill": -signal.SIGKILL, "terminate": -signal.SIGTERM, "exception in one rank": 1, "disk full": 1}
BLOWS = tuple(EXIT)
UNITS = (
    "cache/*/part-*.safetensors",
    "cache/full/*.json",
    "run/prototypes/*/class-*.safetensors",
    "run/images/*/class-*.safetensors",
    "run/images/*/part-*.safetensors",
    "run/images/*/batch-?????.safetensors",
    "run/labels/*/*.safetensors",
    "run/baselines/*/set/*.parquet",
    "run/dataset/*/*.parquet",
    "run/eval/units/*.json",
)
STAGES = {
    "latents-": "encode",
    "features-": "cluster",
    "prototypes/": "cluster",
    "-fadrm-": "refine",
    "images/": "generate",
    "labels/": "label",
    "dataset/": "assemble",
    "baselines/": "evaluate",
    "eval/": "evaluate",
    "cache/full": "evaluate",
    "figures/": "report",
    "report.html": "report",
}
STRUCK = "struck while writing "
PHASES = ("before", "half written", "written", "after")


# --- in the process that is hurt ----------------------------------------------------------------------------------


def strike(kind: str, at: int, phase: str, delay: float) -> None:
    """Arrange for a fault at the `at`-th file that this process writes."""
    import dq.core.files

    number = 0
    real = dq.core.files.atomic_path

    def hurt(path: Path, temporary: Path) -> None:
        os.write(2, f"{STRUCK}{path}\n".encode())
        if kind == "exception in one rank":
            raise RuntimeError("a fault for the test")
        if kind == "disk full":
            raise OSError(errno.ENOSPC, "No space left on device", str(temporary))
        number = signal.SIGTERM if kind == "terminate" else signal.SIGKILL
        if phase == "after":  # somewhere in the computation of the next unit
            threading.Timer(delay, os.kill, (os.getpid(), number)).start()
        else:
            os.kill(os.getpid(), number)
            time.sleep(60)

    @contextlib.contextmanager
    def faulty(path: Path) -> Iterator[Path]:
        nonlocal number
        number += 1
        due = number == at
        if due and phase == "before":
            hurt(path, path)
        with real(path) as temporary:
            yield temporary
            if due and phase == "half written":
                os.truncate(temporary, temporary.stat().st_size // 2)
            if due and phase in ("half written", "written"):
                hurt(path, temporary)
        if due and phase == "after":
            hurt(path, path)

    dq.core.files.atomic_path = faulty
    for name in list(sys.modules):
        if name.startswith("dq.") and getattr(sys.modules[name], "atomic_path", None) is real:
            sys.modules[name].atomic_path = faulty


def set_clock_back() -> None:
    real = time.time
    time.time = lambda: real() - 400 * 86400.0


def start(file: Path, log: Path, ready: Callable[[int], None], world_size: int = 1) -> list[int]:
    """Fork the processes of a run; `ready` is called in each with its rank. Returns their numbers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            os.setsid()
            os.chdir(file.parent)  # records name the run's folder as it was given
            with open(log, "a") as f:
                os.dup2(f.fileno(), 1)
                os.dup2(f.fileno(), 2)
            if world_size > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            from dq.cli.main import main

            ready(rank)
            code = main(["run", "--config", str(file), "--cpu"])
        except BaseException as e:
            os.write(2, f"{type(e).__name__}: {e}\n".encode())
        finally:
            os._exit(code)
    return children


def wait(children: list[int]) -> list[int]:
    """Exit codes, negative for signals. As a launcher does, the first failure ends the others."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        pid, status = os.waitpid(-1, 0)
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] != 0:
            for other in set(children) - codes.keys():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
    return [codes[c] for c in children]


# --- outside of it ------------------------------------------------------------------------------------------------


def units(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every finished unit of work."""
    files = sorted({f for pattern in UNITS for f in out.glob(pattern) if f.name[0] != "."})
    files = [f for f in files if not f.name.endswith((".partial.safetensors", ".checkpoint.safetensors"))]
    # a set is finished once its record is there
    files = [f for f in files if f.suffix != ".parquet" or (f.parent / "provenance.json").is_file()]
    return {str(f.relative_to(out)): (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}


def contents(out: Path) -> dict[str, bytes]:
    """What every unit holds; of a training, all but how long it took and the digests that hold this."""
    digests = {}
    for name in units(out):
        data = (out / name).read_bytes()
        if name.endswith(".json"):
            record = json.loads(data)
            data = json.dumps({k: v for k, v in record.items() if k not in ("train_seconds", "checksum")}).encode()
        digests[name] = data
    return digests


def stage_of(path: str) -> str:
    """The stage that writes a file."""
    return next((stage for part, stage in STAGES.items() if part in path), "opening")


def damage(kind: str, out: Path, name: str, rng: random.Random) -> None:
    data = bytearray((out / name).read_bytes())
    if kind == "truncated file":
        del data[rng.randrange(len(data)) :]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (out / name).write_bytes(data)


def live(world: Path, out: Path, rng: random.Random, faults: list[str], most: int) -> list[dict]:
    """One life: a fault for every start, until one comes through all the same or `faults` is used up. Returns a record
    of every start."""
    file = every_stage(world, out)
    records: list[dict] = []
    hidden: set[str] = set()  # damaged, and not yet reported
    hurt: dict[str, tuple[int, int]] = {}  # files as they were damaged
    while not records or not records[-1]["through"]:
        kind = faults.pop() if faults else None
        names = [n for n, v in sorted(units(out).items()) if hurt.get(n) != v]
        target = rng.choice(names) if kind in DAMAGE and names else None
        if target:
            damage(str(kind), out, target, rng)
            hidden.add(target)
            hurt[target] = units(out)[target]
        if kind == "clock back":
            for name in names:
                os.utime(out / name, (2e9, 2e9))
        # a report may come before its start is killed, and the removal not
        before = {n: v for n, v in units(out).items() if hurt.get(n) != v}
        # damage and a clock come with a kill, or there would be no further start
        blow = kind if kind in BLOWS else "kill"
        at, phase, delay = rng.randint(1, most), rng.choice(PHASES), rng.random() * 0.2
        processes = 2 if kind == "exception in one rank" or rng.random() < 0.25 else 1
        rank = rng.randrange(processes)

        def ready(own_rank: int, kind=kind, blow=blow, at=at, phase=phase, delay=delay, rank=rank) -> None:
            if kind == "clock back":
                set_clock_back()
            if kind and own_rank == rank:
                strike(blow, at, phase, delay)

        log = out / f"log-{len(records):03d}.txt"
        codes = wait(start(file, log, ready, processes))
        output = log.read_text()
        now = units(out)
        hidden = {n for n in hidden if n not in output}
        removed = [n for n in before if n not in now]
        struck = target or output.partition(STRUCK)[2].partition("\n")[0]
        record = {
            "fault": kind,
            "stage": stage_of(struck),
            "processes": processes,
            "through": set(codes) == {0},
            "finished": len(before),
            "recomputed": [n for n in before if n in now and now[n] != before[n]],
            # stretches of the images of a class go when the file of the class is there
            "lost": [n for n in removed if not (n.startswith("run/images") and "/part-" in n)],
        }
        expected = kind is not None and codes[rank] == EXIT[blow]
        if (not record["through"] and not expected) or "cannot be read" in output:
            raise AssertionError(f"{record} ended with {codes}:\n{output[-3000:]}")
        records.append(record)
    records[-1]["silent"] = sorted(hidden)  # damage that nobody reported
    return records


def campaign(number: int, seed: int) -> dict:
    """Hurt runs `number` times; returns the records of the faults and what differed in the end."""

    rng = random.Random(seed)
    began = time.perf_counter()
    summary: dict = {"faults": [], "lives": 0, "differing": [], "leftovers": [], "silent": []}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        world = make_world(root / "world")
        log = root / "reference.txt"
        if wait(start(every_stage(world, root / "reference"), log, lambda rank: None)) != [0]:
            raise AssertionError(log.read_text()[-3000:])
        expected = contents(root / "reference")
        while (missing := number - len(summary["faults"])) > 0:
            order = [KINDS[i % len(KINDS)] for i in range(missing)]
            rng.shuffle(order)
            out = root / f"life-{summary['lives']:03d}"
            records = live(world, out, rng, order, most=len(expected) // 3)
            summary["lives"] += 1
            # a fault that was due behind the last file of a start has hurt nobody
            summary["faults"] += [{"life": summary["lives"], **r} for r in records if not r["through"]]
            summary["silent"] += records[-1]["silent"]
            now = contents(out)
            summary["differing"] += [n for n in expected.keys() | now.keys() if expected.get(n) != now.get(n)]
            summary["leftovers"] += [str(f) for pattern in ("*.tmp", ".lock*") for f in out.rglob(pattern)]
            shutil.rmtree(out)
            done = f"{len(summary['faults'])} of {number} faults in {summary['lives']} lives"
            print(f"{done}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return {**summary, "units": len(expected), "seconds": round(time.perf_counter() - began, 1)}


def bad(summary: dict) -> list[str]:
    """What should not have happened, empty if all is well."""
    per_start = [f"{key}: {n}" for r in summary["faults"] for key in ("recomputed", "lost") for n in r[key]]
    return per_start + [f"{key}: {n}" for key in ("differing", "leftovers", "silent") for n in summary[key]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a CSV file of faults by kind and stage")
    args = parser.parse_args()
    summary = campaign(args.faults, args.seed)
    stages = [*dict.fromkeys(["opening", *STAGES.values()])]
    rows = []
    for kind in (*KINDS, "all"):
        of_kind = [r for r in summary["faults"] if kind in (r["fault"], "all")]
        row = {"fault": kind, "faults": len(of_kind), **{s: sum(r["stage"] == s for r in of_kind) for s in stages}}
        row |= {"units_finished_before": sum(r["finished"] for r in of_kind)}
        rows.append(row | {key: sum(len(r[key]) for r in of_kind) for key in ("recomputed", "lost")})
    for key in ("differing", "leftovers", "silent"):
        rows[-1][key] = len(summary[key])
    rows[-1] |= {"lives": summary["lives"], "units_of_a_run": summary["units"], "seed": args.seed}
    if args.out:
        with open(args.out, "w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[-1]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(json.dumps(rows[-1]))
    if wrong := bad(summary):
        sys.exit("\n".join(wrong[:20]))


if __name__ == "__main__":
    main()
