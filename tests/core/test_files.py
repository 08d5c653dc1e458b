"""Files that are whole, damaged or replaced by another process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dq.core.files
from dq.core.files import is_done, write_json, write_tensors


@pytest.mark.parametrize("name", ["unit.safetensors", "unit.json"])
def test_a_damaged_file_is_removed_unless_another_process_has_replaced_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name

    def write() -> None:
        write_json(path, {"a": 1}) if name.endswith("json") else write_tensors(path, {"a": torch.ones(3)})

    write()
    assert is_done(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert not is_done(path)
    assert not path.exists()
    assert not is_done(path)
    path.write_bytes(whole[:-5])
    real = dq.core.files.readable

    def readable_while_another_writes(file: Path):
        # the other process looks at the damaged file at the same time, and is quicker
        path.write_bytes(whole[:-5])
        context = real(file)
        exit_of = context.__exit__

        class Context:
            def __enter__(self) -> None:
                context.__enter__()

            def __exit__(self, *error):
                path.unlink()
                write()
                return exit_of(*error)

        return Context()

    monkeypatch.setattr(dq.core.files, "readable", readable_while_another_writes)
    assert not is_done(path)
    assert path.read_bytes() == whole


def test_a_folder_is_no_finished_file(tmp_path: Path) -> None:
    (tmp_path / "unit.json").mkdir()
    assert not is_done(tmp_path / "unit.json")
    assert (tmp_path / "unit.json").is_dir()
