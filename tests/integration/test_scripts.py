"""Scripts beside the package say what they do."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "pipelines").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
MODULES = {"frepo_sets", "membership_attacks", "refinement_tables", "result_tables", "gpu_summary", "site_pages"}
MODULES |= {f"gpu_items_{name}" for name in ("ceilings", "draw", "label", "train", "whole")}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_script_prints_its_help_and_a_module_whose_it_is(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    if path.stem in MODULES:
        assert f"{path.stem} is a module of " in str(stop.value)
        return
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: ")
    assert "--help" in out
