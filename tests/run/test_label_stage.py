"""The label stage of a run: what it does again when a command is repeated."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runs import config
from safetensors.torch import load_file, save_file

from dq.cli.main import main
from dq.core.files import write_json
from dq.networks.teacher import TEACHER_FACTS
from dq.run.stages import label as label_stage


@pytest.fixture
def labeled(world: Path, tmp_path: Path) -> Path:
    """Configuration of a finished run whose set a copied teacher has labeled."""
    shutil.copy(world / "teacher.safetensors", tmp_path / "teacher.safetensors")
    write_json(tmp_path / TEACHER_FACTS, {"net": "convnet3", "mean": [0.5] * 3, "std": [0.5] * 3})
    teacher = {"net": "convnet3", "path": str(tmp_path / "teacher.safetensors")}
    methods = {"ddoq": {"representative": "centroid", "weights": "sqrt"}}
    more = {"generate__mode": "decode", "evaluate__students": []}
    file = config(world, tmp_path, ipc=[3], methods=methods, teachers=[teacher], **more)
    assert run(file) == 0
    return file


def run(file: Path) -> int:
    return main(["run", "--config", str(file), "--cpu"])


def labels(file: Path) -> dict[Path, tuple[bytes, int]]:
    """Bytes and time of change of every file of labels."""
    files = sorted(file.parent.glob("run/labels/*/*.safetensors"))
    return {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in files}


def test_finished_labels_load_no_teacher(labeled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = labels(labeled)
    assert len(before) == 3
    monkeypatch.setattr(label_stage, "load_teachers", lambda *args, **options: pytest.fail("loaded again"))
    assert run(labeled) == 0
    assert labels(labeled) == before


def test_a_missing_class_alone_is_labeled_again(labeled: Path) -> None:
    before = labels(labeled)
    missing, *others = before
    missing.unlink()
    assert run(labeled) == 0
    after = labels(labeled)
    assert after[missing][0] == before[missing][0]
    assert [after[f] for f in others] == [before[f] for f in others]


@pytest.mark.parametrize("change", ["weights", "facts"])
def test_a_teacher_whose_files_have_changed_labels_anew(labeled: Path, change: str) -> None:
    before, weights = labels(labeled), labeled.parent / "teacher.safetensors"
    if change == "weights":
        save_file({name: 0.9 * x for name, x in load_file(weights).items()}, weights)
    else:
        write_json(labeled.parent / TEACHER_FACTS, {"net": "convnet3", "mean": [0.4] * 3, "std": [0.5] * 3})
    assert run(labeled) == 0
    after = labels(labeled)
    assert len(after) == 6
    assert {f: after[f] for f in before} == before
    assert len({content for content, _ in after.values()}) == 6
