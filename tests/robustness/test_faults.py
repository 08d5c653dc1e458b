"""Runs that are hurt at random, in processes of their own; `make faults` does it a hundred times."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from faults import KINDS, units
from toy_world import every_stage, make_world

from dq.cli.main import main

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.mark.multi_process
def test_hurt_runs_end_like_one_that_nobody_hurt(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "tests" / "robustness" / "faults.py"),
        "--faults",
        str(2 * len(KINDS)),
        "--seed",
        "3",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    summary = json.loads(done.stdout)
    assert summary["faults"] == 2 * len(KINDS)
    assert summary["units_finished_before"] > 0


@pytest.mark.long
@pytest.mark.multi_process
@pytest.mark.parametrize(
    ("bug", "seen", "seed"),
    [
        # every start does all files of latents again
        (
            "import dq.data.image_cache; dq.data.image_cache.is_done = lambda path: False",
            "recomputed: cache/latents-",
            1,
        ),
        # nothing is compared with its checksum
        ("import dq.core.files; dq.core.files._compared = lambda f: dq.core.files._record(f)['meta']", "silent: ", 2),
    ],
)
def test_the_harness_sees_a_planted_bug(tmp_path: Path, bug: str, seen: str, seed: int) -> None:
    code = (
        f"import faults\n{bug}\nfaults.KINDS = ('flipped byte',)\n"
        f"print(*faults.bad(faults.campaign(5, {seed})), sep='\\n')"
    )
    env = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}:{ROOT / 'tests' / 'robustness'}",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, env=env)
    assert seen in done.stdout, done.stdout + done.stderr[-3000:]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk_stops_a_run_and_a_larger_one_lets_it_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, disk = make_world(tmp_path / "world"), tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        monkeypatch.chdir(disk)
        file = every_stage(world, disk)
        assert main(["run", "--config", str(file), "--cpu"]) == 1
        message = capsys.readouterr().err
        assert re.search(r"the disk is full while writing (cache|run)/\S+; free some space", message), message
        before = units(disk)
        assert before
        assert not list(disk.rglob("*.tmp"))
        subprocess.run([*mount, "remount,size=64m", "tmpfs", str(disk)], check=True)
        assert main(["run", "--config", str(file), "--cpu"]) == 0
        now = units(disk)
        removed = {n for n in before if n not in now}
        # parts of a class go once the file of the class is complete, as in `live`
        assert all("/part-" in n and n.startswith("run/images/") for n in removed), removed
        assert {n: now[n] for n in before.keys() - removed} == {n: before[n] for n in before.keys() - removed}
    finally:
        monkeypatch.undo()
        subprocess.run(["umount", "-l", str(disk)], check=False)
