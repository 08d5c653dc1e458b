"""The measurements of `pipelines/gpu_session.py`, rehearsed on the CPU, and items that crash or hang."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PIPELINES = ROOT / "pipelines"
# packages that a machine with a GPU may lack
LACKING = (
    "datasets",
    "diffusers",
    "faiss",
    "ot",
    "torch_pruning",
    "shtab",
    "dill",
    "multiprocess",
    "importlib_metadata",
)
ELSEWHERE = ("gpu_tests", "verbs", "estimates", "students_side_by_side", "memory")  # start processes, or need CUDA
QUICK = ("kmeans", "patches", "ceilings")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PIPELINES))


def items() -> list[Any]:
    sys.path.insert(0, str(PIPELINES))
    try:
        session = importlib.import_module("gpu_session")
    finally:
        sys.path.remove(str(PIPELINES))
    return [session.CEILINGS, *session.ITEMS]


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def outcomes(folder: Path) -> dict[str, str]:
    return {r["item"]: r["status"] for r in records_of(folder) if "part" in r}


# --- items --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(i, id=i.name, marks=[] if i.name in QUICK else [pytest.mark.slow])
        for i in items()
        if i.name not in ELSEWHERE
    ],
)
def test_an_item_measures_something_on_the_cpu(item: Any, tmp_path: Path) -> None:
    from gpu_measure import Session

    ceilings = dict.fromkeys(("copy", "gemm_float32", "gemm_bf16", "conv_tf32", "conv_bf16"), 1e9)
    session = Session(torch.device("cpu"), True, tmp_path, item.name, ceilings=ceilings, command="a command")
    getattr(importlib.import_module(item.module), item.name)(session)
    rows = records_of(tmp_path)
    assert rows
    for row in rows:
        assert {"item", "name", "card", "versions", "seed", "command", "tiny"} <= row.keys()
        assert row["item"] == item.name
    timed = [r for r in rows if r.get("status") == "measured"]
    for row in timed:
        assert 0 < row["least_s"] <= row["median_s"] <= row["most_s"]
        assert row["per_second"] == pytest.approx(row["units"] / row["median_s"])
        assert row.get("share", 1) > 0
        for what, gap in row["parity"].items():  # the device is the CPU itself
            assert gap < (0.05 if "bfloat16" in what else 1e-5), what
    assert timed or any("numbers" in r for r in rows)


def test_every_item_has_a_function_and_fits_the_budget_of_its_part() -> None:
    for item in items():
        text = (PIPELINES / f"{item.module}.py").read_text()
        assert f"\ndef {item.name}(s: Session) -> None:" in text
        assert item.seconds <= item.limit
    for part in (1, 2, 3):
        assert sum(i.seconds for i in items() if i.part in (0, part)) <= 560 - 8


def test_the_roofline_of_a_product_is_known() -> None:
    from gpu_measure import roofline

    a, b = torch.ones(8, 16), torch.ones(16, 4)
    work = roofline({"gemm_float32": 512.0, "copy": 1e9}, lambda: a @ b)
    assert work == {"flops": 2 * 8 * 16 * 4, "bytes": 4 * (128 + 64 + 32), "roofline_s": 2.0}
    assert roofline({"gemm_float32": 1e9, "copy": 448.0}, lambda: a @ b)["roofline_s"] == 2.0
    x = torch.ones(10, requires_grad=True)
    assert roofline({"copy": 1.0}, lambda: (x * x).sum().backward())["bytes"] > 120  # backward counts too


# --- the session --------------------------------------------------------------------------------------------------


def session(out: Path, *arguments: str, blocked: tuple[str, ...] = ()) -> str:
    """Run the script in a process; packages of `blocked` cannot be imported in it and its children."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    paths = [str(ROOT)]
    if blocked:
        block = out.parent / "block"
        block.mkdir(exist_ok=True)
        (block / "sitecustomize.py").write_text(BLOCK.replace("NAMES", repr(blocked)))
        paths.insert(0, str(block))
    env["PYTHONPATH"] = os.pathsep.join(paths)
    command = [
        sys.executable,
        str(PIPELINES / "gpu_session.py"),
        "--tiny",
        "--budget",
        "3000",
        "--output",
        str(out),
        *arguments,
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_needs_no_absent_package_runs_without_it(tmp_path: Path) -> None:
    out = tmp_path / "gpu"
    names = [
        i.name for i in items() if i.part and not i.needs and i.name not in ("gpu_tests", "students_side_by_side")
    ]
    session(out, "--device", "cpu", "--only", *names, "denoiser", blocked=LACKING)
    ended = outcomes(out)
    assert ended.pop("denoiser") == "not run"
    assert ended.pop("memory") == "not run"  # CUDA alone
    assert set(ended.values()) == {"done"}, {r["item"]: r.get("reason") for r in records_of(out) if "part" in r}
    reasons = {r["item"]: r["reason"] for r in records_of(out) if "part" in r}
    assert reasons["denoiser"] == "lacks diffusers"
    assert reasons["memory"] == "the end of memory needs a CUDA device"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.timeout(1800)
def test_items_that_start_processes(tmp_path: Path) -> None:
    out = tmp_path / "gpu"
    session(out, "--device", "cpu", "--only", "gpu_tests", "students_side_by_side", "verbs", "estimates")
    ended = outcomes(out)
    assert set(ended.values()) == {"done"}, {r["item"]: r.get("reason") for r in records_of(out) if "part" in r}
    numbers = {r["name"]: r["numbers"] for r in records_of(out) if "numbers" in r}
    assert numbers["tests marked gpu"]["failures"] == numbers["tests marked gpu"]["errors"] == 0
    assert set(numbers["toy run on the card against: killed"].values()) == {0}  # equal bit for bit on a CPU
    text = (out / "summary.md").read_text()
    assert "| denoiser | 2 | not run |" in text
    assert "--only denoiser" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_measured_and_everything_recorded(tmp_path: Path) -> None:
    text = session(tmp_path / "gpu", "--only", "kmeans")
    assert outcomes(tmp_path / "gpu") == {"ceilings": "not run", "kmeans": "not run"}
    assert "kmeans: not run (0 s): ceilings: there is no CUDA device" in text


ITEMS = """
import os, signal, time

def ceilings(s):
    s.write("ceilings", ceilings={"copy": 1.0})

def good(s):
    s.write("a", status="measured", **TIMES, peak_bytes=4, per_second=1.0, unit="image", against=None, parity={})
    s.write("b", status="measured", **{**TIMES, "median_s": 1.0}, peak_bytes=2, per_second=2.0, unit="image",
            against="a", parity={"gap": 0.5})

def crash(s):
    s.write("before the crash", numbers={"n": 1})
    os.kill(os.getpid(), signal.SIGSEGV)

def hang(s):
    s.write("before the hang", numbers={"n": 2})
    time.sleep(600)

def wrong(s):
    raise ValueError("no such size")

TIMES = {"median_s": 2.0, "least_s": 1.0, "most_s": 3.0, "repeats": 10, "round_medians_s": [2.0, 2.0]}
"""


@pytest.mark.slow  # starts a process with torch for every item
@pytest.mark.timeout(300)
def test_a_crash_or_a_hang_costs_one_item_and_the_next_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_session as script
    from gpu_summary import read_records, summary

    (tmp_path / "made_up.py").write_text(ITEMS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ("crash", "hang", "wrong", "good", "far")
    ceilings = script.Item(0, "ceilings", "made_up", 0, 60, each_call=True)
    made = [ceilings, *(script.Item(1, n, "made_up", 10**6 if n == "far" else 0, 15) for n in names)]
    out = tmp_path / "out"
    out.mkdir()
    script.run_items(made, script.Options(out, device="cpu"))
    assert outcomes(out) == {
        "ceilings": "done", "crash": "failed", "hang": "timed out", "wrong": "failed", "good": "done", "far": "not run"
    }  # fmt: skip
    rows = {r["name"]: r for r in records_of(out) if "name" in r}
    assert {"before the crash", "before the hang", "a", "b"} <= rows.keys()
    reasons = {r["item"]: r["reason"] for r in records_of(out) if "part" in r}
    assert "ValueError: no such size" in reasons["wrong"]
    assert reasons["far"].endswith("s of the budget were left")
    with open(out / "records.jsonl", "a") as f:
        f.write('{"item": "cut by a kill')

    before = len(read_records(out / "records.jsonl"))
    with open(out / "records.jsonl", "a") as f:
        f.write("\n")
    script.run_items(made[:5], script.Options(out, device="cpu"))
    after = read_records(out / "records.jsonl")[before:]
    assert [r["item"] for r in after] == ["ceilings", "ceilings"]  # its row and its end; nothing else again

    text = summary(read_records(out / "records.jsonl"), [(1, n, f"measure {n}") for n in names])
    assert "| b | 1 (1 to 3, 10) | 2 image/s | 2.00 | 0.50 | 0.00 |  | gap 5.0e-01 |" in text
    assert "| far | 1 | not run |" in text
    assert "`measure hang`" in text
    assert "`measure good`" not in text


def test_another_card_measures_again(tmp_path: Path) -> None:
    import gpu_session as script

    item = script.Item(1, "kmeans", "gpu_items_label", 0, 1)
    first = {"part": 1, "item": "kmeans", "status": "done", "tiny": False, "card": "A", "torch": "2"}

    def ended(card: str, torch_version: str = "2", tiny: bool = False) -> str | None:
        here = {"ceilings": {"copy": 1.0}, "card": card, "versions": {"torch": torch_version}}
        return script._ended([first, here], item, script.Options(tmp_path, tiny=tiny))

    assert ended("A") == "done"
    assert ended("B") is None
    assert ended("A", "3") is None
    assert ended("A", tiny=True) is None
