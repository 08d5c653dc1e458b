from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dq.dist import atomic_path, derive_seed, digest_of, generator, read_tensors, shard, write_bytes, write_tensors
from dq.errors import RunError


def test_import_is_light() -> None:
    code = (
        "import sys, dq; heavy = [m for m in ('transformers', 'datasets', 'faiss', 'torchvision', 'timm', "
        "'diffusers', 'accelerate', 'sklearn', 'matplotlib') if m in sys.modules]; assert not heavy, heavy; dq.kmeans"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names_resolve() -> None:
    import dq

    for name in dq.__all__:
        assert getattr(dq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dq.nothing


def test_every_unit_goes_to_one_rank_and_the_load_is_even() -> None:
    costs = [5.0, 1, 1, 8, 3, 3, 2, 1]
    for world in (1, 2, 3, 20):
        parts = [shard(costs, r, world) for r in range(world)]
        assert sorted(i for p in parts for i in p) == list(range(8))
    loads = [sum(costs[i] for i in shard(costs, r, 3)) for r in range(3)]
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
