"""source.test_share: part of train as the test split of a set that has none."""

import numpy as np
import pytest
from PIL import Image

from dq.core.errors import InputError
from dq.data.load import load_source


def folder(path, counts, split=""):
    for label, n in counts.items():
        where = path / split / label
        where.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.new("RGB", (8, 8), (i, len(label), 0)).save(where / f"{i:03d}.png")
    return str(path)


def test_a_share_of_every_class_becomes_the_test_split(tmp_path):
    path = folder(tmp_path, {"a": 10, "bb": 5, "ccc": 2, "dddd": 1})
    source = load_source(path, test_share=0.2)
    assert source.class_counts().tolist() == [8, 4, 1, 1]
    assert source.class_counts(source.test_name).tolist() == [2, 1, 1, 0]
    whole = load_source(path)
    assert whole.test_name is None
    paths = {split.read(row) for split in (source.train, source.test) for row in range(len(split))}
    assert paths == {whole.train.read(row) for row in range(len(whole.train))}
    for split in (source.train, source.test):
        assert all(split.read(row).parent.name == source.class_names[label] for row, label in enumerate(split.labels))


def test_the_share_is_part_of_the_identity_and_always_the_same(tmp_path):
    path = folder(tmp_path, {"a": 10, "bb": 10})
    one, same, other, whole = (load_source(path, test_share=share) for share in (0.2, 0.2, 0.5, 0))
    assert one.fingerprint == same.fingerprint
    assert len({s.fingerprint for s in (one, other, whole)}) == 3
    assert [one.test.read(i) for i in range(4)] == [same.test.read(i) for i in range(4)]


def test_a_set_with_a_test_split_keeps_it(tmp_path):
    folder(tmp_path, {"a": 4, "b": 4}, "train")
    path = folder(tmp_path, {"a": 2, "b": 2}, "test")
    source, plain = load_source(path, test_share=0.5), load_source(path)
    assert (source.test_name, source.fingerprint) == ("test", plain.fingerprint)
    assert source.class_counts().tolist() == [4, 4]


def test_messages_name_the_row_of_the_stored_split(tmp_path):
    source = load_source(folder(tmp_path, {"a": 10}), test_share=0.2)
    rows = np.asarray([int(source.test.read(i).stem) for i in range(2)])
    assert [source.test.where(i) for i in range(2)] == [f"row {row} of split 'train'" for row in rows]


def test_single_images_cannot_be_held_out(tmp_path):
    with pytest.raises(InputError, match="test_share=0"):
        load_source(folder(tmp_path, {"a": 1, "b": 1}), test_share=0.2)
