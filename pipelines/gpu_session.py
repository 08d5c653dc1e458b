"""Measure this package on a GPU in three calls of less than ten minutes.

    make gpu PART=1 OUT=runs/gpu                                      # then PART=2 and PART=3
    python pipelines/gpu_session.py --part 1 --budget 560 --output runs/gpu
    python pipelines/gpu_session.py --only kmeans --output runs/gpu   # one item, with the ceilings of the card
    python pipelines/gpu_session.py --summary --output runs/gpu       # the tables again, of what has been measured

Items run in order of worth, each in a process of its own with a limit of its own. A row goes to OUT/records.jsonl and
to the disk as soon as it is measured: a crash or a hang costs one item and is recorded, and so is what the budget did
not reach. The same command again goes on with what is not measured on this card (`--retry` for what failed).
OUT/summary.md has ratios and shares of the roofline. An item that needs a package which is not installed is recorded
as not run. `--tiny --device cpu` rehearses everything in a minute or two; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_summary import append, read_records, summary

HERE = Path(__file__).parent
NOT_HERE = 77  # exit code of an item that this machine cannot run
RESERVE_S = 8.0  # of the budget, for the summary
SLOW_HOST = 4  # times an item's limit, in a rehearsal on a busy CPU
GRACE_S = 5.0  # between the signals that end a process
TAIL = 2000  # characters of an item's output that are recorded if it fails
DRAWING = ("diffusers",)
VERBS = ("diffusers", "datasets", "ot", "shtab")


@dataclass(frozen=True)
class Item:
    """One thing to measure."""

    part: int
    name: str  # of the function that measures it
    module: str
    seconds: int  # expected on an H100; it is not begun with less
    limit: int  # seconds after which it is ended
    needs: tuple[str, ...] = ()  # packages beside those of every item
    each_call: bool = False  # measured in every call, since others are compared with it

    @property
    def function(self) -> str:
        return f"{self.module}:{self.name}"


CEILINGS = Item(0, "ceilings", "gpu_items_ceilings", 25, 90, each_call=True)
ITEMS = (
    Item(1, "students", "gpu_items_train", 110, 200),
    Item(1, "fadrm", "gpu_items_train", 100, 180),
    Item(1, "gpu_tests", "gpu_items_whole", 90, 240),
    Item(1, "students_side_by_side", "gpu_items_train", 50, 120),
    Item(1, "profile_train", "gpu_items_train", 25, 60),
    Item(2, "denoiser", "gpu_items_draw", 90, 200, DRAWING),
    Item(2, "sampling", "gpu_items_draw", 80, 160, DRAWING),
    Item(2, "kmeans", "gpu_items_label", 60, 120),
    Item(2, "codec", "gpu_items_draw", 70, 160, DRAWING),
    Item(2, "encode_stage", "gpu_items_draw", 50, 120, DRAWING),
    Item(2, "labels", "gpu_items_label", 40, 90),
    Item(2, "patches", "gpu_items_label", 20, 60),
    Item(2, "profile_draw", "gpu_items_draw", 25, 60, DRAWING),
    Item(3, "verbs", "gpu_items_whole", 120, 240, VERBS),
    Item(3, "prior", "gpu_items_whole", 90, 180, DRAWING),
    Item(3, "memory", "gpu_items_label", 50, 120),
    Item(3, "estimates", "gpu_items_whole", 60, 150, VERBS),
)


@dataclass(frozen=True)
class Options:
    """How the items of a call are run."""

    output: Path
    device: str = "cuda"
    tiny: bool = False
    seed: int = 0
    budget: float = 560.0
    retry: bool = False
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.budget - RESERVE_S - (time.monotonic() - self.began)

    def command(self, name: str) -> str:
        """The command that measures an item alone."""
        words = ["python", "pipelines/gpu_session.py", "--only", name, "--output", "runs/gpu"]
        words += [] if self.device == "cuda" else ["--device", self.device]
        return shlex.join([*words, *(["--tiny"] if self.tiny else [])])


def run_items(items: Sequence[Item], options: Options) -> None:
    """Run items in their order and record what became of each."""
    records = options.output / "records.jsonl"
    stopped = ""
    for item in items:
        ended = _ended(read_records(records), item, options)
        if ended and not item.each_call:
            print(f"{item.name}: {ended} before, not run again", flush=True)
            continue
        missing = [name for name in item.needs if not _installed(name)]
        began, tail = time.monotonic(), ""
        if stopped:
            status, tail = "not run", stopped
        elif missing:
            status, tail = "not run", f"lacks {', '.join(missing)}"
        elif options.left < (0 if options.tiny else item.seconds):
            status, tail = "not run", f"{max(0, options.left):.0f} s of the budget were left"
        else:
            limit = item.limit if not options.tiny else SLOW_HOST * item.limit
            status, tail = _run_item(item, options, min(limit, options.left))
        if item.each_call and status != "done":
            stopped = f"{item.name}: {tail.splitlines()[-1] if tail else status}"
        facts = {"part": item.part, "item": item.name, "status": status, "seconds": round(time.monotonic() - began, 1)}
        facts |= {"reason": tail, "command": options.command(item.name), "tiny": options.tiny}
        append(records, {**facts, **({} if stopped else _machine(records))})
        print(f"{item.name}: {status} ({facts['seconds']:.0f} s){': ' + tail[-300:] if tail else ''}", flush=True)


def _run_item(item: Item, options: Options, limit: float) -> tuple[str, str]:
    """Run an item in a process group of its own; returns its status, and why it has none better."""
    command = [sys.executable, str(HERE / "gpu_measure.py"), item.function, "--device", options.device]
    command += ["--output", str(options.output), "--seed", str(options.seed), *(["--tiny"] if options.tiny else [])]
    command += ["--command", options.command(item.name)]
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        streams: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
        log.seek(0)
        tail = log.read().strip()[-TAIL:]
    if code is None:
        return "timed out", f"ended after {limit:.0f} s; its last output: {tail[-300:]}"
    if code == NOT_HERE:
        return "not run", tail.splitlines()[-1] if tail else "not on this machine"
    return ("done", "") if code == 0 else ("failed", f"exit code {code}: {tail}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process group of an item."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _ended(records: Iterable[dict[str, Any]], item: Item, options: Options) -> str | None:
    """How an item ended on this card in an earlier call, if it need not run again."""
    records = list(records)
    here = _machine_of(records)
    ended = [r for r in records if r.get("item") == item.name and "part" in r and r["tiny"] == options.tiny]
    ended = [r for r in ended if {k: r.get(k) for k in here} == here and r["status"] != "not run"]
    status = ended[-1]["status"] if ended else None
    return status if status == "done" or (status and not options.retry) else None


def _machine(path: Path) -> dict[str, Any]:
    return _machine_of(read_records(path))


def _machine_of(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Card and version of torch of the last ceilings: those of this call, since ceilings come first in every call."""
    last = [r for r in records if "ceilings" in r][-1:]
    return {"card": last[0]["card"], "torch": last[0]["versions"]["torch"]} if last else {}


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def chosen_items(part: int | None, only: Sequence[str], items: Sequence[Item] = ITEMS) -> list[Item]:
    """The ceilings, and the items of a part or of some names.

    Raises:
        SystemExit: for a name that no item has.
    """
    names = [i.name for i in items]
    wrong = [n for n in only if n not in names]
    if wrong:
        sys.exit(f"there is no item {wrong[0]!r}; items are {', '.join(names)}")
    return [CEILINGS, *(i for i in items if (i.name in only if only else part in (None, i.part)))]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=(1, 2, 3), help="default: all parts")
    parser.add_argument("--only", nargs="+", default=[], metavar="ITEM", help="these items alone")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds of the whole call")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal in sizes of millimeters")
    parser.add_argument("--retry", action="store_true", help="run items again that failed or timed out")
    parser.add_argument("--summary", action="store_true", help="write the summary of what is recorded, and stop")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    output = args.output.resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        sys.exit(f"{output} cannot be made a folder ({e.strerror}); choose another --output")
    options = Options(output, args.device, args.tiny, args.seed, args.budget, args.retry)
    if not args.summary:
        run_items(chosen_items(args.part, args.only), options)
    text = summary(read_records(output / "records.jsonl"), [(i.part, i.name, options.command(i.name)) for i in ITEMS])
    (output / "summary.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
