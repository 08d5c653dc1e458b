from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sets import files_of, make, same

from dq.core.errors import InputError, RunError
from dq.distilled import parquet
from dq.distilled.card import write_dataset_card
from dq.distilled.external import load_set
from dq.distilled.parquet import write_set
from dq.distilled.set import DistilledSet


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_save_and_load_round_trip(tmp_path: Path, floats: bool, soft: bool) -> None:
    s = make(floats=floats, soft=soft)
    s.save(tmp_path, "ipc2-ddoq")
    t = DistilledSet.load(tmp_path)
    for field in dataclasses.fields(DistilledSet):
        a, b = getattr(s, field.name), getattr(t, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), field.name
    assert t.class_names == s.class_names
    assert t.provenance["method"]["name"] == "ddoq"


def test_load_dataset_opens_the_folder_with_the_right_features(tmp_path: Path) -> None:
    from datasets import ClassLabel, Image, List, Value, load_dataset

    make(soft=True).save(tmp_path, "ipc2-ddoq")
    make().save(tmp_path, "ipc2-d4m")
    for name, extra in (("ipc2-ddoq", True), ("ipc2-d4m", False)):
        rows = load_dataset(str(tmp_path), name, split="train")
        assert isinstance(rows.features["image"], Image)
        assert rows.features["label"] == ClassLabel(names=["zebra", "ant", "bee"])
        assert rows.features["weight"] == Value("float32")
        assert ("soft_label" in rows.features) == extra
        assert rows[3]["label"] == 1
        assert rows[3]["image"].size == (5, 5)
    assert load_dataset(str(tmp_path), "ipc2-ddoq", split="train").features["soft_label"] == List(
        Value("float16"), length=3
    )


def test_load_dataset_sees_that_a_folder_was_written_anew(tmp_path: Path) -> None:
    """Its cache is keyed by the card, so the card must follow the content."""
    from datasets import load_dataset

    first = make()
    first.save(tmp_path, "x")
    assert load_dataset(str(tmp_path), "x", split="train")["count"][:] == first.counts.tolist()
    dataclasses.replace(first, counts=first.counts + 5).save(tmp_path, "x")
    assert load_dataset(str(tmp_path), "x", split="train")["count"][:] == (first.counts + 5).tolist()
    assert DistilledSet.load(tmp_path).counts.tolist() == (first.counts + 5).tolist()


def test_same_set_same_bytes(tmp_path: Path) -> None:
    a = make(soft=True).save(tmp_path / "a")
    b = make(soft=True).save(tmp_path / "b")
    assert a.read_bytes() == b.read_bytes()


def test_card_lists_every_set(tmp_path: Path) -> None:
    make().save(tmp_path, "ipc2-ddoq")
    make().save(tmp_path, "ipc2-d4m")
    card = (tmp_path / "README.md").read_text()
    assert "- config_name: ipc2-ddoq\n" in card
    assert "path: ipc2-d4m/train-*.parquet" in card
    assert "zebra, ant, bee" in card
    assert card.count("default: true") == 1


def test_faults(tmp_path: Path) -> None:
    make().save(tmp_path, "a")
    make().save(tmp_path, "b")
    with pytest.raises(InputError, match=r"has no set 'c'; it has a, b"):
        DistilledSet.load(tmp_path, "c")
    with pytest.raises(InputError, match=r"several sets.* a, b: .*/a$"):
        DistilledSet.load(tmp_path)
    with pytest.raises(InputError, match="a distilled set of 6 images has 5 weights"):
        dataclasses.replace(make(), weights=torch.ones(5))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run folder has beside its sets."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "provenance.json").write_text("{}")
    return folder


def test_any_path_to_a_set_opens_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = make()
    s.save(run / "dataset", "ipc2-ddoq")
    own = run / "dataset" / "ipc2-ddoq"
    for path in (own, run / "dataset", run, f"{own}/", own / ".." / "ipc2-ddoq"):
        assert same(DistilledSet.load(path), s)
        assert same(DistilledSet.load(path, "ipc2-ddoq"), s)
        assert same(load_set(path), s)
    monkeypatch.chdir(own)
    assert same(DistilledSet.load("."), s)


def test_paths_without_one_set_name_those_that_are_there(run: Path) -> None:
    for load in (DistilledSet.load, load_set):
        for path in (run, run / "dataset"):
            with pytest.raises(InputError, match=r"no distilled set.*`dq label`"):
                load(path)
            (run / "dataset").mkdir(exist_ok=True)
    for name in ("ipc2-ddoq", "ipc2-d4m"):
        make().save(run / "dataset", name)
    for load in (DistilledSet.load, load_set):
        for path in (run, run / "dataset"):
            with pytest.raises(
                InputError, match=r"dataset has several sets.*has ipc2-d4m, ipc2-ddoq: .*/dataset/ipc2-d4m"
            ):
                load(path)
    with pytest.raises(InputError, match=r"no set .*/ipc3; .*dataset has ipc2-d4m, ipc2-ddoq$"):
        DistilledSet.load(run / "dataset" / "ipc3")
    with pytest.raises(InputError, match=r"no set 'ipc3'.* ipc2-d4m, ipc2-ddoq$"):
        DistilledSet.load(run, "ipc3")
    # a folder of runs is none of sets
    with pytest.raises(InputError, match=r"has no distilled set"):
        DistilledSet.load(run.parent)


def test_texts_in_a_provenance_stand_for_their_names(tmp_path: Path) -> None:
    texts = {"source": "CIFAR-10", "method": "mine", "generate": "decode", "labels": "resnet18"}
    dataclasses.replace(make(soft=True), provenance=texts).save(tmp_path, "x")
    record = DistilledSet.load(tmp_path).provenance
    assert {k: record[k] for k in texts} == {
        "source": {"origin": "CIFAR-10"},
        "method": {"name": "mine"},
        "generate": {"mode": "decode"},
        "labels": {"by": "resnet18"},
    }
    card = (tmp_path / "README.md").read_text()
    assert "distilled from CIFAR-10 by `dq`" in card
    assert "logits of resnet18" in card


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        (
            {"source": ["CIFAR-10"]},
            "source in the provenance .* is a mapping, not \\['CIFAR-10'\\]",
        ),
        ({"method": 3}, "method in the provenance"),
        ({"licenses": "MIT"}, "licenses in the provenance .*; give a dict, or leave it out"),
        ({"ipc": "ten"}, "ipc in the provenance of a set is a whole number above 0, not 'ten'"),
        ({"notes": {(1, 2): 3}}, "cannot be written as JSON"),
        ("mine", "is a mapping, not str"),
    ],
)
def test_a_provenance_is_refused_before_anything_is_written(tmp_path: Path, provenance: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(make(), provenance=provenance).save(tmp_path, "x")
    assert not list(tmp_path.iterdir())


# --- files --------------------------------------------------------------------------------------------------------


def classes_of(s: DistilledSet) -> Iterator[DistilledSet]:
    """One part per class, held by nobody else."""
    fields = [f.name for f in dataclasses.fields(s) if isinstance(getattr(s, f.name), torch.Tensor)]
    for c in range(len(s.class_names)):
        yield dataclasses.replace(s, **{n: getattr(s, n)[s.labels == c] for n in fields}, provenance={})


@pytest.mark.parametrize("floats", [False, True])
def test_parts_give_the_bytes_of_the_whole(tmp_path: Path, floats: bool) -> None:
    s = make(soft=True, floats=floats)
    s.save(tmp_path / "whole", "x")
    write_set(tmp_path / "parts", "x", classes_of(s), s.provenance)
    write_dataset_card(tmp_path / "parts")
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "parts")
    assert sorted(files_of(tmp_path / "whole")) == [
        "README.md", "x/grid.png", "x/provenance.json", "x/train-00000-of-00001.parquet"
    ]  # fmt: skip


@pytest.mark.parametrize("floats", [False, True])
def test_one_part_is_in_memory_at_a_time(tmp_path: Path, floats: bool) -> None:
    references: list[weakref.ref] = []

    def parts() -> Iterator[DistilledSet]:
        for s in classes_of(make(floats=floats, soft=True)):
            references.append(weakref.ref(s.images))
            yield s
            del s
            assert references[-1]() is None, "the part before is still held when the next is asked for"

    write_set(tmp_path, "x", parts(), {})
    assert len(references) == 3


def test_files_and_row_groups_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq
    from datasets import load_dataset

    monkeypatch.setattr(parquet, "GROUP_ROWS", 2)
    monkeypatch.setattr(parquet, "SHARD_BYTES", 800)  # two row groups of this set
    s = make(soft=True)
    assert s.save(tmp_path, "x").name == "train-00000-of-00002.parquet"
    record = json.loads((tmp_path / "x" / "provenance.json").read_text())
    assert [f["rows"] for f in record["files"].values()] == [4, 2]
    assert list(record["files"]) == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    for name, facts in record["files"].items():
        path = tmp_path / "x" / name
        assert facts["bytes"] == path.stat().st_size
        about = pq.ParquetFile(path).metadata
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        assert [g.num_rows for g in groups] == [2] * (facts["rows"] // 2)
        for column in (g.column(i) for g in groups for i in range(g.num_columns)):
            assert column.has_offset_index
            assert column.compression == ("UNCOMPRESSED" if column.path_in_schema.startswith("image") else "SNAPPY")
        assert b"content_defined_chunking" in about.metadata
        assert json.loads(about.metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}
    assert same(DistilledSet.load(tmp_path), s)
    rows = load_dataset(str(tmp_path), split="train")
    assert rows["count"][:] == s.counts.tolist()
    monkeypatch.setattr(parquet, "GROUP_BYTES", 1)
    s.save(tmp_path, "bytes")
    first = next((tmp_path / "bytes").glob("*.parquet"))
    assert pq.ParquetFile(first).metadata.row_group(0).num_rows == 1


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("rows", [4, 1000])
def test_declared_bytes_are_those_that_the_library_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, floats: bool, soft: bool, rows: int
) -> None:
    from datasets import load_dataset_builder

    monkeypatch.setattr(parquet, "GROUP_ROWS", rows)
    make(floats=floats, soft=soft).save(tmp_path / "sets", "x")
    builder = load_dataset_builder(str(tmp_path / "sets"), "x", cache_dir=str(tmp_path / "cache"))
    declared = builder.info.splits["train"].num_bytes
    files = {"train": str(tmp_path / "sets" / "x" / "*.parquet")}
    counted = load_dataset_builder("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    counted.download_and_prepare()
    assert declared == counted.info.splits["train"].num_bytes
    assert builder.info.dataset_size == declared


def test_a_schema_is_what_the_library_writes(tmp_path: Path) -> None:
    import pyarrow.parquet as pq
    from datasets import Dataset

    for floats in (False, True):
        path = make(soft=True, floats=floats).save(tmp_path / str(floats), "x")
        table = Dataset(pq.read_table(path))
        table.to_parquet(str(tmp_path / "theirs.parquet"))
        assert pq.read_schema(path).equals(pq.read_schema(tmp_path / "theirs.parquet"), check_metadata=True)


def test_fewer_files_replace_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = make()
    with monkeypatch.context() as small:
        small.setattr(parquet, "GROUP_ROWS", 1)
        small.setattr(parquet, "SHARD_BYTES", 1)
        s.save(tmp_path, "x")
    assert len(list(tmp_path.glob("x/*.parquet"))) == 6
    other = dataclasses.replace(s, counts=s.counts + 1)
    other.save(tmp_path, "x")
    assert [p.name for p in tmp_path.glob("x/*.parquet")] == ["train-00000-of-00001.parquet"]
    assert same(DistilledSet.load(tmp_path), other)


def test_a_set_that_is_broken_off_leaves_the_old_one(tmp_path: Path) -> None:
    s = make()
    s.save(tmp_path, "x")
    before = files_of(tmp_path)

    def parts() -> Iterator[DistilledSet]:
        yield from list(classes_of(dataclasses.replace(s, counts=s.counts + 1)))[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_set(tmp_path, "x", parts(), s.provenance)
    assert files_of(tmp_path) == before
    left = tmp_path / "x" / ".00000.part"  # of a process that was killed
    left.write_bytes(b"half")
    s.save(tmp_path, "x")
    assert not left.exists()
    assert files_of(tmp_path) == before


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = make().save(tmp_path, "x")
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT") + 20
    data[at] ^= 1  # a bit that Parquet does not miss
    path.write_bytes(bytes(data))
    with pytest.raises(
        RunError, match=r"train-00000-of-00001.parquet cannot be read .*make the set again with `dq label`"
    ):
        DistilledSet.load(tmp_path)
    path.unlink()
    with pytest.raises(RunError, match=r"train-00000-of-00001.parquet cannot be read"):
        DistilledSet.load(tmp_path)


def test_parts_must_fit(tmp_path: Path) -> None:
    a, b, c = classes_of(make())
    with pytest.raises(InputError, match="other classes"):
        write_set(tmp_path, "x", [a, dataclasses.replace(b, class_names=("ant", "bee", "zebra"))], {})
    with pytest.raises(InputError, match="a part of the set has other soft_labels"):
        write_set(tmp_path, "x", [a, dataclasses.replace(c, soft_labels=torch.zeros(2, 3).half())], {})
    with pytest.raises(InputError, match="has no parts"):
        write_set(tmp_path, "x", [], {})
    assert not list(tmp_path.rglob("*.parquet"))


def test_the_grid_has_classes_for_rows_and_the_heaviest_first(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    s = make()
    s.save(tmp_path, "x")
    picture = np.asarray(Image.open(tmp_path / "x" / "grid.png"))
    assert picture.shape == (3 * 5 + 2 * 2, 2 * 5 + 2, 3)
    for c in range(3):
        own = sorted((s.labels == c).nonzero()[:, 0].tolist(), key=lambda i: -float(s.weights[i]))
        for j, i in enumerate(own):
            cell = picture[7 * c : 7 * c + 5, 7 * j : 7 * j + 5]
            assert (cell == s.images[i].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("files", ["x", [1], {"train-00000-of-00001.parquet": 3}])
def test_a_record_that_names_no_files_is_one_sentence(tmp_path: Path, files: object) -> None:
    from dq.core.errors import RunError
    from dq.core.files import read_json, write_json

    make().save(tmp_path, "a")
    path = tmp_path / "a" / "provenance.json"
    write_json(path, {**read_json(path), "files": files})
    with pytest.raises(RunError, match="does not say which files are its own"):
        DistilledSet.load(tmp_path)
