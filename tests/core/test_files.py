"""Files that are whole, damaged or replaced by another process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

import dq.core.files
from dq.core.files import Damaged, is_done, read_checksum, read_tensors, write_json, write_tensors
from dq.core.seeds import digest_of, digest_of_tensors


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


# --- checksums ----------------------------------------------------------------------------------------------------


def header(path: Path) -> dict:
    with safe_open(path, framework="pt") as f:
        return json.loads(f.metadata()["dq"])


def write_with(path: Path, record: dict) -> None:
    """A file of tensors under a header of its own."""
    path.write_bytes(save({"a": torch.arange(5.0)}, {"dq": json.dumps(record, sort_keys=True)}))


BLAKE2B = digest_of([digest_of_tensors({"a": torch.arange(5.0)}), {"k": 1}])  # what versions before wrote


def test_files_from_before_the_fast_checksum_open_and_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    write_with(path, {"meta": {"k": 1}, "checksum": BLAKE2B})
    tensors, meta = read_tensors(path)
    assert tensors["a"].tolist() == list(range(5))
    assert meta == {"k": 1}
    assert read_checksum(path) == BLAKE2B
    write_with(path, {"meta": {"k": 2}, "checksum": BLAKE2B})
    assert not is_done(path)


@pytest.mark.parametrize("identity", [True, False])
def test_a_fast_checksum_guards_and_a_cryptographic_one_names(tmp_path: Path, identity: bool) -> None:
    path = tmp_path / "new.safetensors"
    write_tensors(path, {"a": torch.arange(5.0)}, {"k": 1}, identity=identity)
    record = header(path)
    assert record["integrity"].startswith("xxh3_128:")
    assert ("checksum" in record) == identity
    assert read_checksum(path) == BLAKE2B  # digests stay what they were
    flipped = bytearray(path.read_bytes())
    flipped[-3] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(Damaged, match="checksum is that of another content"):
        read_tensors(path)


def test_an_unknown_fast_checksum_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "later.safetensors"
    for record in ({"checksum": BLAKE2B}, {}):
        write_with(path, {"meta": {"k": 1}, "integrity": "xxh9:12", **record})
        assert not is_done(path)


def test_a_file_without_a_fast_checksum_is_compared_by_the_other_one(tmp_path: Path) -> None:
    path = tmp_path / "earlier.safetensors"
    write_with(path, {"meta": {"k": 1}, "checksum": BLAKE2B})
    assert read_tensors(path)[1] == {"k": 1}


def test_changed_metadata_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    write_tensors(path, {"a": torch.arange(5.0)}, {"k": 1})
    write_with(path, {**header(path), "meta": {"k": 2}})
    assert not is_done(path)
