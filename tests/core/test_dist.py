from __future__ import annotations

import ast
import errno
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
from forking import Forked

from dq.core.errors import RunError
from dq.core.files import (
    Damaged,
    append_jsonl,
    atomic_path,
    is_done,
    open_tensors,
    read_json,
    read_jsonl,
    read_metadata,
    read_tensors,
    sweep,
    temporary_beside,
    write_bytes,
    write_json,
    write_tensors,
)
from dq.core.processes import assign_units, cut
from dq.core.seeds import derive_seed, digest_of, generator


def test_import_loads_neither_torch_nor_another_heavy_library() -> None:
    code = (
        "import sys, dq; heavy = [m for m in ('torch', 'numpy', 'transformers', 'datasets', 'faiss', 'torchvision', "
        "'timm', 'diffusers', 'accelerate', 'sklearn', 'matplotlib') if m in sys.modules]; assert not heavy, heavy; "
        "dq.kmeans; assert 'torch' in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names_are_callables_on_every_access() -> None:
    """A submodule that is imported for a function may take the function's place on the second access."""

    def check() -> None:
        for module in [m for m in sys.modules if m.partition(".")[0] == "dq"]:
            del sys.modules[module]
        import dq

        assert {"kmeans", "evaluate", "DistilledSet"} <= set(dq.__all__)
        first = {name: getattr(dq, name) for name in dq.__all__}
        for name, value in first.items():
            assert callable(value), name
            assert not isinstance(value, types.ModuleType), name
            names: dict[str, object] = {}
            exec(f"from dq import {name}", names)
            assert getattr(dq, name) is value is names[name], name
            assert getattr(sys.modules[value.__module__], name) is value, name
        assert set(dir(dq)) >= set(dq.__all__)

    done = Forked(check)  # from nothing of dq, and with its libraries
    _, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    import dq

    with pytest.raises(AttributeError, match="No dq attribute nothing"):
        _ = dq.nothing  # type: ignore[attr-defined]


def test_every_unit_goes_to_one_rank_and_the_load_is_even() -> None:
    costs = [5.0, 1, 1, 8, 3, 3, 2, 1]
    for world in (1, 2, 3, 20):
        parts = [assign_units(costs, r, world) for r in range(world)]
        assert sorted(i for p in parts for i in p) == list(range(8))
    loads = [sum(costs[i] for i in assign_units(costs, r, 3)) for r in range(3)]
    assert loads == [8, 8, 8]


def test_seeds_depend_on_every_part() -> None:
    seeds = {
        derive_seed(*p) for p in [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0, "a", "1", ""), (0, "a1")]
    }
    assert len(seeds) == 6
    assert derive_seed(3, "generate", 4) == derive_seed(3, "generate", 4)
    assert all(0 <= s < 2**63 for s in seeds)
    assert torch.equal(torch.rand(3, generator=generator(1, 2)), torch.rand(3, generator=generator(1, 2)))
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 2, "b": 1})


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.bin"
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as t:
        t.write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    write_bytes(path, b"first")
    with pytest.raises(ValueError, match="no"), atomic_path(path) as t:
        t.write_bytes(b"second")
        raise ValueError("no")
    assert path.read_bytes() == b"first"


def test_bytes_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, int]] = []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (steps.append(("flush", os.fstat(f).st_ino)), flush(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append(("rename", os.stat(a).st_ino)), rename(a, b)))
    write_bytes(tmp_path / "x.bin", b"all")
    file = (tmp_path / "x.bin").stat().st_ino
    assert steps == [("flush", file), ("rename", file)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with (
        pytest.raises(RunError, match=r"the disk is full while writing .*x.bin; free some space"),
        atomic_path(path) as t,
    ):
        t.write_bytes(b"part")
        with open("/dev/full", "wb") as full:
            full.write(b"1" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such device") as e, atomic_path(tmp_path / "x"):
        raise OSError(errno.ENODEV, "no such device")
    assert not isinstance(e.value, RunError)


def test_tensor_files_are_deterministic_and_checked(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2).half()}
    meta = {"z": 1, "y": [1, 2], "x": None, "w": "v", "u": 2.5}
    for name in ("one", "two"):
        write_tensors(tmp_path / name, tensors, meta)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    back, m = read_tensors(tmp_path / "one")
    assert m == meta
    assert torch.equal(back["a"], tensors["a"])
    (tmp_path / "one").write_bytes(b"garbage")
    with pytest.raises(RunError, match="one cannot be read"):
        read_tensors(tmp_path / "one")


@pytest.mark.parametrize("read", [read_tensors, read_metadata, lambda path: open_tensors(path).__enter__()])
def test_no_changed_byte_of_a_tensor_file_is_believed(tmp_path: Path, read) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(5.0), "b": torch.arange(3)}, {"note": "seven"})
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(Damaged, match=r"x\.safetensors cannot be read"):
            read(path)
    for length in (0, 1, 8, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            read(path)
    path.write_bytes(whole)
    read(path)


def test_no_changed_letter_of_a_record_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"accuracy": 0.5, "path": Path("here"), "inner": {"list": [1, None, "é"]}})
    assert read_json(path) == {"accuracy": 0.5, "path": "here", "inner": {"list": [1, None, "é"]}}
    whole = path.read_text()
    for i, letter in enumerate(whole[: whole.index("checksum") - 1]):
        if not letter.isspace():
            path.write_text(whole[:i] + ("1" if letter != "1" else "2") + whole[i + 1 :])
            with pytest.raises(Damaged):
                read_json(path)
    path.write_text('{"by hand": true}')  # without a checksum there is nothing to compare
    assert read_json(path) == {"by hand": True}


def test_a_damaged_unit_is_reported_removed_and_not_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, record = tmp_path / "x.safetensors", tmp_path / "y.json"
    assert not is_done(tensors)
    write_tensors(tensors, {"a": torch.arange(5.0)})
    write_json(record, {"a": 1})
    assert is_done(tensors)
    assert is_done(record)
    assert not caplog.records
    tensors.write_bytes(tensors.read_bytes()[:-1])
    record.write_text(record.read_text().replace("1", "2", 1))
    for path in (tensors, record):
        assert not is_done(path)
        assert not path.exists()
        assert f"{path} is damaged" in caplog.text


def test_a_file_is_compared_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dq.core.files

    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(5.0)})
    compared = []
    real = dq.core.files._compared
    monkeypatch.setattr(dq.core.files, "_compared", lambda f: compared.append(1) or real(f))
    for _ in range(3):
        with open_tensors(path) as f:
            assert f.get_slice("a")[1:2].tolist() == [1.0]
    assert len(compared) == 1
    write_tensors(path, {"a": torch.arange(6.0)})
    with open_tensors(path):
        pass
    assert len(compared) == 2


def test_only_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    temporary = temporary_beside(tmp_path / "a" / "x.bin")
    temporary.parent.mkdir()
    host = temporary.name.removeprefix(".x.bin.").rpartition("-")[0]
    for name in (
        temporary.name,
        f".y.bin.{host}-{dead.pid}.tmp",
        f".z.bin.elsewhere-{dead.pid}.tmp",
        "y.bin",
        ".odd.tmp",
    ):
        (temporary.parent / name).write_text("")
    sweep(tmp_path)
    assert {f.name for f in temporary.parent.iterdir()} == {
        temporary.name,
        f".z.bin.elsewhere-{dead.pid}.tmp",
        "y.bin",
        ".odd.tmp",
    }


def test_stretches_are_even_and_cover_all() -> None:
    for n, least, most in ((0, 8, 512), (1, 8, 512), (24, 8, 512), (1347, 8, 512), (50_000, 8, 512), (100, 1, 32)):
        parts = cut(n, smallest=least, largest=most)
        assert [i for p in parts for i in p] == list(range(n))
        sizes = {len(p) for p in parts}
        assert not sizes or (max(sizes) <= most and max(sizes) - min(sizes) <= 1)
    assert len(cut(50_000, smallest=8, largest=512)) == 98
    assert len(cut(1347, smallest=8, largest=512)) == 62
    assert len(cut(24, smallest=8, largest=512)) == 3


def test_half_a_line_of_a_log_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    assert read_jsonl(path) == []
    append_jsonl(path, {"stage": "encode"})
    whole = path.read_bytes()
    for cut_at in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut_at])
        append_jsonl(path, {"stage": "cluster"})
        events = read_jsonl(path)
        assert events[0] == {"stage": "encode"}
        assert events[-1] == {"stage": "cluster"}
        assert len(events) == (3 if cut_at == len(whole) - 1 else 2)


def test_every_file_that_is_no_module_is_in_the_wheel() -> None:
    """Templates, presets, cards and stubs are found through the patterns of setuptools."""
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = {f for f in (root / "dq").rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")}
    assert {f.name for f in files} >= {"py.typed", "__init__.pyi", "report.html", "dataset_card.md", "demo.yaml"}
    assert files == {f for pattern in settings["dq"] for f in (root / "dq").glob(pattern)}


def test_every_library_that_is_imported_at_run_time_is_declared() -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    optional = [r for group in project["optional-dependencies"].values() for r in group]
    declared = {re.split(r"[<>=\[]", r)[0].replace("-", "_").lower() for r in [*project["dependencies"], *optional]}
    names = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit_learn", "ot": "pot", "faiss": "faiss_cpu"}
    imported = set()
    for file in (root / "dq").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).split(".")[0])
    imported -= {*sys.stdlib_module_names, "dq"}
    assert {"torch", "httpx2", "filelock", "lazy_loader", "PIL"} <= imported
    assert {names.get(m, m) for m in imported} <= declared
