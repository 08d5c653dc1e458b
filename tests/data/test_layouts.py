"""Folders, tables and tensors as users have them: read in full, or what is left out is counted or refused by name."""

from __future__ import annotations

import io
import os
import tarfile
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dq.core.errors import InputError
from dq.data.images import read_images
from dq.data.load import load_source
from dq.distilled.external import load_set
from dq.distilled.set import DistilledSet


def picture(path: Path, gray: int = 0, side: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (gray, gray, gray)).save(path, "PNG")
    return path


def tree(root: Path, *folders: str, images: int = 2) -> Path:
    for i, folder in enumerate(folders):
        for j in range(images):
            picture(root / folder / f"{j}.png", 10 * i + j)
    return root


def cell(gray: int = 0) -> dict[str, object]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (gray, gray, gray)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def table(path: Path, labels: list, feature: object = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    feature = feature or datasets.ClassLabel(names=["in", "out"])
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    columns = {"image": [cell(10 * i) for i in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return path


def warning(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    return record.getMessage()


# --- names of splits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [("Training", "Test"), ("training", "testing"), ("Train", "Val"), ("TRAIN", "dev"), ("train", "Eval")],
)
def test_splits_are_known_in_any_case_and_by_their_usual_names(tmp_path: Path, train: str, test: str) -> None:
    tree(tmp_path, f"{train}/kiwi", f"{train}/fig", f"{test}/kiwi", f"{test}/fig")
    source = load_source(tmp_path)
    assert source.class_names == ("fig", "kiwi")
    assert (source.train_name, source.test_name) == (train, test)
    assert len(source.train) == len(source.test) == 4


@pytest.mark.parametrize(
    ("folders", "advice"),
    [
        (("inner/train/kiwi", "inner/test/kiwi"), r"give .*inner, or put the splits above"),
        (("red/train", "red/test", "green/train", "green/test"), "put the splits above the classes"),
        (("inner/kiwi", "inner/fig"), "if these are the classes, give .*inner"),
        (
            ("photo/cat", "photo/dog", "sketch/cat", "sketch/dog"),
            "photo, sketch .* all hold the same folders cat, dog",
        ),
        (("train", "test"), "train.* holds no class folders; sort images"),
        (("test/kiwi", "val/kiwi"), "name it with --set source.train_split=NAME"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path: Path, folders: tuple[str, ...], advice: str) -> None:
    tree(tmp_path, *folders)
    with pytest.raises(InputError, match=advice):
        load_source(tmp_path)


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    names = ("bus", "train", "tram")
    tree(tmp_path / "plain", *names)
    assert load_source(tmp_path / "plain").class_names == names
    assert len(load_set(tmp_path / "plain", names)) == 6
    tree(tmp_path / "deep", *(f"{n}/images" for n in names))
    assert load_source(tmp_path / "deep").class_names == names
    tree(tmp_path / "others", "dev", "prod", "test")
    assert load_source(tmp_path / "others").class_names == ("dev", "prod", "test")
    tree(tmp_path / "split", *(f"{s}/{n}" for s in ("train", "test") for n in names))
    assert load_source(tmp_path / "split").class_names == names


def test_a_test_split_of_no_use_is_passed_over_or_can_be_switched_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree(tmp_path, "train/oak", "train/elm", "val/oak", "val/elm", "test/images")
    assert load_source(tmp_path).test_name == "val"
    assert "1 split without class folders" in warning(caplog)
    with pytest.raises(InputError, match=r"class folder 'images' of split 'test'.*source.test_split=none"):
        load_source(tmp_path, test_split="test")
    source = load_source(tmp_path, test_split="none")
    assert source.test_name is None
    with pytest.raises(InputError, match="has no test split"):
        _ = source.test
    tree(tmp_path / "flat", "train/oak", "train/elm", "val")
    with pytest.raises(InputError, match=r"split 'val' .*has no class folders with images.*source.test_split=none"):
        load_source(tmp_path / "flat")
    tree(tmp_path / "empty", "train/oak", "train/elm", "val/oak", "val/elm")
    (tmp_path / "empty" / "test").mkdir()
    assert load_source(tmp_path / "empty").test_name == "val"


def test_an_unlabeled_test_split_gives_way_to_a_labeled_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table(tmp_path / "train.parquet", [0, 1, 0, 1])
    table(tmp_path / "test.parquet", [-1, -1])
    for streaming in (False, True):
        with pytest.raises(InputError, match=r"split 'test' .* has no labels.*source.test_split=none"):
            load_source(tmp_path, streaming=streaming)
        assert load_source(tmp_path, streaming=streaming, test_split="none").test_name is None
    table(tmp_path / "validation.parquet", [0, 1])
    for streaming in (False, True):
        assert load_source(tmp_path, streaming=streaming).test_name == "validation"
        assert "split 'test' has no labels and is left out" in caplog.messages[-1]
    with pytest.raises(InputError, match="has no labels"):
        load_source(tmp_path, test_split="test")


@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAIN/a", "TEST/a"), ("Training-0", "test-0")])
@pytest.mark.parametrize("streaming", [False, True])
def test_tables_of_splits_in_capitals(tmp_path: Path, names: tuple[str, str], streaming: bool) -> None:
    table(tmp_path / f"{names[0]}.parquet", [0, 1, 0, 1])
    table(tmp_path / f"{names[1]}.parquet", [0, 1])
    source = load_source(tmp_path, streaming=streaming)
    assert (len(source.train), len(source.test)) == (4, 2)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_linked_folder_of_tables_is_like_the_folder(
    tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    table(tmp_path / "data" / "Train.parquet", [0, 1, 0, 1])
    table(tmp_path / "data" / "Test.parquet", [0, 1])
    table(tmp_path / "data" / ".hidden" / "train.parquet", [0, 1])
    (tmp_path / "link").symlink_to(tmp_path / "data")
    prints = set()
    for name in ("data", "link"):
        source = load_source(tmp_path / name, streaming=streaming)
        assert (len(source.train), len(source.test)) == (4, 2)
        prints.add(source.fingerprint)
    assert len(prints) == 1
    assert "no split" not in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_class_names_of_another_order_are_refused(tmp_path: Path, streaming: bool) -> None:
    turned = datasets.ClassLabel(names=["out", "in"])
    for other in ("test", "train-00001-of-00002"):
        root = tmp_path / other
        table(root / ("train.parquet" if other == "test" else "train-00000-of-00002.parquet"), [0, 1])
        table(root / f"{other}.parquet", [0, 1], turned)
        with pytest.raises(InputError, match="name their classes differently"):
            load_source(root, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_shard_is_named(tmp_path: Path, streaming: bool) -> None:
    for i in (0, 2):
        table(tmp_path / f"train-{i:05d}-of-00003.parquet", [0, 1])
    with pytest.raises(InputError, match=r"train-00001-of-00003\.parquet is missing"):
        load_source(tmp_path, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_test_split_without_labels_or_rows_is_passed_over(tmp_path: Path, streaming: bool) -> None:
    table(tmp_path / "train.parquet", [0, 1, 0, 1])
    table(tmp_path / "validation.parquet", [0, 1])
    table(tmp_path / "test.parquet", [None, None])
    assert load_source(tmp_path, streaming=streaming).test_name == "validation"
    bare = datasets.Dataset.from_dict({"image": [cell()]}, features=datasets.Features({"image": datasets.Image()}))
    if streaming:
        bare.to_parquet(str(tmp_path / "test.parquet"))
        assert load_source(tmp_path, streaming=True).test_name == "validation"
    else:
        table(tmp_path / "test.parquet", [])
        assert load_source(tmp_path).test_name == "validation"


def test_split_names_of_tensors(tmp_path: Path) -> None:
    x, y = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
    source = load_source({"Training": (x, y), "TEST": (x, y - 9), "val": (x, y)})
    assert (source.train_name, source.test_name) == ("Training", "val")
    with pytest.raises(InputError, match=r"split 'test' .*no labels"):
        load_source({"train": (x, y), "test": (x, y - 9)})


def test_domains_and_parts_of_classes(tmp_path: Path) -> None:
    office = tree(tmp_path / "office", *(f"{d}/images/{c}" for d in ("amazon", "dslr") for c in ("mug", "pen")))
    with pytest.raises(InputError, match="all hold the same folders mug, pen"):
        load_source(office)
    assert load_source(office / "dslr" / "images").class_names == ("mug", "pen")
    nested = tree(
        tmp_path / "k",
        "a_train/a_train/mug",
        "a_train/a_train/pen",
        "a_test/a_test/mug",
        "a_test/a_test/pen",
        "a_pred/a_pred",
    )
    with pytest.raises(InputError, match=r"a_test, a_train .* name the splits with"):
        load_source(nested)
    source = load_source(nested, train_split="a_train", test_split="a_test")
    assert (source.class_names, len(source.test)) == (("mug", "pen"), 4)
    parts = tree(tmp_path / "xray", *(f"{c}/{d}" for c in ("covid", "normal") for d in ("images", "masks")))
    with pytest.raises(InputError, match=r"source\.nested=join"):
        load_source(parts)
    assert load_source(parts, nested="join").class_counts().tolist() == [4, 4]


def test_a_flat_split_folder_is_refused_with_what_its_table_has(tmp_path: Path) -> None:
    flat = tree(tmp_path, "train")
    with pytest.raises(InputError, match=r"train of .* holds no class folders"):
        load_source(flat)
    (flat / "train.csv").write_text("id,breed\n")
    with pytest.raises(InputError, match=r"train\.csv .*metadata\.csv"):
        load_source(flat)
    (flat / "train" / "metadata.csv").write_text("file_name,category\n0.png,a\n1.png,b\n")
    with pytest.raises(InputError, match=r"columns file_name, category: name .* source.label_column=NAME"):
        load_source(flat)
    assert load_source(flat, label_column="category").class_names == ("a", "b")


# --- what is left out ---------------------------------------------------------------------------------------------


def test_suffixes_of_jpeg_are_read(tmp_path: Path) -> None:
    tree(tmp_path, "train/oak", "train/elm")
    for suffix in ("jfif", "jpe", "JFIF"):
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / "oak" / f"more.{suffix}", "JPEG")
    source = load_source(tmp_path)
    assert source.class_counts().tolist() == [2, 5]
    assert read_images(source.train, range(7), 8, "crop")[0].shape == (7, 3, 8, 8)


def test_what_is_left_out_is_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree(tmp_path, "train/oak", "train/elm", "extra/oak", "test/oak")
    oak = tmp_path / "train" / "oak"
    for name in ("a.heic", "b.avif", "nosuffix"):
        (oak / name).write_bytes(b"x")
    picture(oak / ".ipynb_checkpoints" / "0-checkpoint.png")
    picture(oak / ".0.png.swp.png")
    (oak / "Thumbs.db").write_bytes(b"x")
    picture(tmp_path / "train" / "loose.png")
    (tmp_path / "train" / "labels.csv").write_text("file,label\n")
    (tmp_path / "README.md").write_text("pets\n")
    source = load_source(tmp_path)
    assert source.class_counts().tolist() == [2, 2]
    message = warning(caplog)
    for part in (
        "3 files without the suffix of an image that is read (first: ",
        "a.heic",
        "2 hidden items (first: ",
        "1 image outside class folders",
        "1 table beside class folders",
        "1 folder beside the splits",
        "1 class without a folder in the test split (first: elm)",
    ):
        assert part in message
    caplog.clear()
    load_source(tree(tmp_path / "clean", "train/oak", "train/elm"))
    assert not caplog.records


def test_a_class_that_loses_all_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, "train/oak", "train/elm")
    (tmp_path / "train" / "birch").mkdir()
    with pytest.raises(InputError, match="birch holds no images: it is empty"):
        load_source(tmp_path)
    (tmp_path / "train" / "birch" / "0.heic").write_bytes(b"x")
    with pytest.raises(InputError, match=r"birch holds no images: only 1 file without the suffix .*0\.heic"):
        load_source(tmp_path)
    picture(tmp_path / "train" / "birch" / "0.png")
    tree(tmp_path, "test/oak", "test/elm")
    (tmp_path / "test" / "birch").mkdir()
    (tmp_path / "test" / "birch" / "1.heic").write_bytes(b"x")
    with pytest.raises(InputError, match="test/birch holds no images"):
        load_source(tmp_path)


@pytest.mark.skipif(os.getuid() != 0, reason="gives up the rights of root for a moment")
def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    tree(tmp_path, "oak", "elm", "fir")
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    (tmp_path / "elm" / "1.png").chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(InputError, match=r"elm/1\.png cannot be read .*source.on_bad_image=skip"):
            load_source(tmp_path)
        source = load_source(tmp_path, on_bad_image="skip")
        _, rows, bad = read_images(source.train, range(6), 8, "crop", on_bad="skip")
        assert (len(rows), len(bad)) == (5, 1)
        os.seteuid(0)
        (tmp_path / "fir").chmod(0)
        os.seteuid(65534)
        with pytest.raises(InputError, match=r"folder .*fir cannot be read"):
            load_source(tmp_path)
    finally:
        os.seteuid(0)


def test_links_are_followed_and_broken_ones_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree(tmp_path / "data", "oak", "elm/deep")
    tree(tmp_path / "elsewhere", "more", images=3)
    (tmp_path / "data" / "oak" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "data" / "elm" / "up").symlink_to(tmp_path / "data" / "elm")
    assert load_source(tmp_path / "data").class_counts().tolist() == [2, 5]
    assert "1 link to a folder above" in warning(caplog)
    (tmp_path / "data" / "oak" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"gone\.png .*on_bad_image=skip"):
        load_source(tmp_path / "data")
    caplog.clear()
    assert len(load_source(tmp_path / "data", on_bad_image="skip").train) == 7
    assert "1 link to nothing" in warning(caplog)


def test_own_results_inside_the_data_are_left_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path, "cat", "dog")
    before = load_source(root)
    n = torch.zeros(2).long()
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    small = DistilledSet(images, torch.tensor([0, 1]), torch.ones(2), before.class_names, n, n + 1, n)
    small.save(root / "runs" / "dq" / "dataset", "ipc1-ddoq")
    after = load_source(root)
    assert (after.class_counts().tolist(), after.fingerprint) == ([2, 2], before.fingerprint)
    assert "1 folder of a run, set or model" in warning(caplog)
    assert str(root / "runs") in warning(caplog)
    # the set itself is data, if it is asked for
    assert len(load_source(root / "runs" / "dq" / "dataset" / "ipc1-ddoq").train) == 2
    # beside tables as well
    tables = tmp_path / "tables"
    table(tables / "train.parquet", [0, 1, 0, 1])
    before = load_source(tables)
    small.save(tables / "out" / "dataset", "ipc1-ddoq")
    for streaming in (False, True):
        assert load_source(tables, streaming=streaming).class_counts().tolist() == [2, 2]
    assert load_source(tables).fingerprint == before.fingerprint


def test_tables_without_a_split_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table(tmp_path / "part0.parquet", [0, 1])
    table(tmp_path / "test_bench.parquet", [0, 1])
    with pytest.raises(InputError, match=r"no split 'train': 1 table .*part0\.parquet.*call the files train-"):
        load_source(tmp_path)
    table(tmp_path / "train.parquet", [0, 1, 1])
    for streaming in (False, True):
        caplog.clear()
        assert len(load_source(tmp_path, streaming=streaming).train) == 3
        assert "1 table in no split by name (first: part0.parquet)" in warning(caplog)


def test_labels_of_a_tar_without_their_image_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for key, suffix in (("a", "png"), ("b", "heic"), ("c", "png"), ("d", "avif")):
            for name, data in ((f"{key}.{suffix}", cell()["bytes"]), (f"{key}.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert len(load_source(tmp_path, streaming=True).train) == 2
    assert "2 labels without an image of a suffix that is read (first: b in train-0.tar)" in warning(caplog)


def test_keys_that_mean_nothing_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x, y = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
    load_source({"train": (x, y), "tset": (x, y)})
    assert "1 split beside train and test (first: tset)" in warning(caplog)
    caplog.clear()
    save_file({"images": x, "labels": y, "soft_label": torch.randn(4, 2)}, tmp_path / "set.safetensors")
    load_set(tmp_path / "set.safetensors")
    assert "soft_label" in warning(caplog)


def test_dotted_names_of_a_tar_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def write(*names: str) -> None:
        with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
            for name in names:
                for full, data in ((f"{name}.png", cell()["bytes"]), (f"{name}.json", b'{"label": 1.0}')):
                    info = tarfile.TarInfo(full)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))

    write("a", "p.f")
    source = load_source(tmp_path, streaming=True)
    assert (len(source.train), source.class_names) == (1, ("1",))
    assert "1 image with several dots in the name (first: p.f.png in train-0.tar)" in warning(caplog)
    write("p.f")
    with pytest.raises(InputError, match=r"no row .*: 1 image .*several dots"):
        load_source(tmp_path, streaming=True)


def test_rows_of_a_table_and_images_beside_it_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(4):
        picture(tmp_path / "train" / f"{i}.png", i)
    lines = ["file_name,label", "0.png,a", "1.png,b"]
    (tmp_path / "train" / "metadata.csv").write_text("\n".join(lines) + "\n")
    assert len(load_source(tmp_path).train) == 2
    assert "2 images without a row in the table" in warning(caplog)
    (tmp_path / "train" / "metadata.csv").write_text("\n".join([*lines, "9.png,b"]) + "\n")
    with pytest.raises(InputError, match=r"9\.png is named in the table .*source.on_bad_image=skip"):
        load_source(tmp_path)


@pytest.mark.parametrize("labels", [["a", "", "b"], [0, -1, 1]])
def test_rows_without_a_label_are_no_class(tmp_path: Path, labels: list) -> None:
    kind = datasets.Value("string" if isinstance(labels[0], str) else "int64")
    table(tmp_path / "train.parquet", labels, kind)
    for streaming in (False, True):
        with pytest.raises(InputError, match=r"1 rows of split 'train' .* have no label, the first is row 1"):
            load_source(tmp_path, streaming=streaming)


# --- tables of labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", "train"])
def test_a_metadata_table_gives_the_labels(tmp_path: Path, where: str) -> None:
    for i in range(6):
        picture(tmp_path / where / "images" / f"{i}.png", i)
    lines = ["file_name,label"] + [f"images/{i}.png,{('wren', 'swan')[i % 2]}" for i in range(6)]
    (tmp_path / where / "metadata.csv").write_text("\n".join(lines) + "\n")
    source = load_source(tmp_path)
    assert source.class_names == ("swan", "wren")
    images, rows, _ = read_images(source.train, range(6), 8, "crop")
    assert {(int(x[0, 0, 0]) % 2, int(source.train.labels[r])) for x, r in zip(images, rows, strict=True)} == {
        (0, 1),
        (1, 0),
    }


def test_a_table_without_labels_leaves_the_class_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree(tmp_path, "oak", "elm")
    (tmp_path / "metadata.csv").write_text("file_name,caption\noak/0.png,a tree\n")
    assert load_source(tmp_path).class_names == ("elm", "oak")
    assert "1 table beside class folders" in warning(caplog)
    flat = tree(tmp_path / "flat", ".")
    (flat / "labels.csv").write_text("name,label\n")
    with pytest.raises(InputError, match=r"labels\.csv .*metadata\.csv"):
        load_source(flat)


# --- numbers and names --------------------------------------------------------------------------------------------

WORDS = ("alpha", "bravo", "carol", "delta", "eagle", "frost", "grape", "honey", "ivory", "joker", "knife", "lemon")


@pytest.mark.parametrize("kind", ["text", "padded", "ClassLabel", "floats", "whole"])
def test_a_number_is_a_number_whatever_keeps_it(tmp_path: Path, kind: str) -> None:
    numbers = [f"{i:03d}" if kind == "padded" else str(i) for i in range(12)]
    labels: list = {"floats": [float(n) for n in numbers], "whole": [int(n) for n in numbers]}.get(kind, numbers)
    feature = {
        "ClassLabel": datasets.ClassLabel(names=sorted(numbers)),
        "floats": datasets.Value("float64"),
        "whole": datasets.Value("int32"),
    }.get(kind, datasets.Value("string"))
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    columns = {"image": [cell(20 * i) for i in range(12)], "label": labels}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "train.parquet"))
    s = load_set(tmp_path, WORDS)
    assert {int(x[0, 0, 0]) // 20: int(y) for x, y in zip(s.images, s.labels, strict=True)} == {
        i: i for i in range(12)
    }
    if kind != "ClassLabel":
        source = load_source(tmp_path)
        assert source.train.labels.tolist() == list(range(12))


def test_numbers_of_one_value_and_splits_of_other_types(tmp_path: Path) -> None:
    table(tmp_path / "one" / "train.parquet", ["1", "01", "2"], datasets.Value("string"))
    with pytest.raises(InputError, match="two classes whose names are the number 1"):
        load_source(tmp_path / "one")
    tree(tmp_path / "set", "000", "007", "012")
    s = load_set(tmp_path / "set", ("12", "0", "7"))  # numbers of numbered classes are these classes
    assert {int(x[0, 0, 0]) // 10: int(y) for x, y in zip(s.images, s.labels, strict=True)} == {0: 1, 1: 2, 2: 0}
    with pytest.raises(InputError, match="must be the same"):
        load_set(tmp_path / "set", ("1", "2", "3"))


def test_names_match_in_any_unicode_form(tmp_path: Path) -> None:
    for split, form in (("train", "NFC"), ("test", "NFD")):
        tree(tmp_path, *(f"{split}/{unicodedata.normalize(form, n)}" for n in ("caf\u00e9", "bar")))
    source = load_source(tmp_path)
    assert source.class_names == ("bar", "caf\u00e9")
    assert source.test.labels.tolist() == [0, 0, 1, 1]
    assert load_set(tmp_path / "test", source.class_names).class_names == source.class_names
    tree(tmp_path, "train/" + unicodedata.normalize("NFD", "caf\u00e9"))
    with pytest.raises(InputError, match="differ only in Unicode form"):
        load_source(tmp_path)
    text = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    table(tmp_path / "text" / "train.parquet", [*text, "bar"], datasets.Value("string"))
    assert load_source(tmp_path / "text").class_counts().tolist() == [1, 2]


def test_a_name_that_differs_in_case_is_hinted_at(tmp_path: Path) -> None:
    tree(tmp_path, "train/Oak", "train/elm", "test/oak")
    with pytest.raises(InputError, match=r"there is 'Oak': make their names alike"):
        load_source(tmp_path, test_split="test")


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tree(tmp_path / name, "train/oak", "train/elm")
    os.rename(tmp_path / "a/train/oak/0.png", os.fsencode(tmp_path / "a/train/oak") + b"/caf\xe9.png")
    (tmp_path / "a/train/oak/1.png").write_bytes(b"no image")
    source = load_source(tmp_path / "a")
    assert read_images(source.train, [0, 1], 8, "crop")[0].shape[0] == 2
    os.truncate(os.fsencode(tmp_path / "a/train/oak") + b"/caf\xe9.png", 3)
    for problem in read_images(source.train, range(4), 8, "crop", on_bad="skip")[2]:
        problem.encode()
    os.rename(tmp_path / "b/train/oak", os.fsencode(tmp_path / "b/train") + b"/caf\xe9")
    with pytest.raises(InputError, match=r"class folder .*caf\\xe9 is not UTF-8"):
        load_source(tmp_path / "b")


# --- paths --------------------------------------------------------------------------------------------------------


def test_paths_do_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    table(data / "train.parquet", [0, 1, 0, 1])
    prints = {load_source(data).fingerprint}
    monkeypatch.chdir(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (".", "./", "../data", "~/data"):
        for streaming in (False, True):
            assert len(load_source(path, streaming=streaming).train) == 4
        prints.add(load_source(path).fingerprint)
    assert len(prints) == 1
    # cells that only name their image name it from their own folder
    named = tmp_path / "named"
    picture(named / "pictures" / "0.png", 200)
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
                                  "label": datasets.Value("int64")})  # fmt: skip
    columns = {"image": [{"bytes": None, "path": "pictures/0.png"}], "label": [0]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(named / "train.parquet"))
    source = load_source(named, image_column="image")
    assert int(read_images(source.train, [0], 8, "crop")[0].max()) == 200


def test_no_possible_path_is_refused(tmp_path: Path) -> None:
    for path in ("a" * 5000, "a\0b"):
        with pytest.raises(InputError, match="no possible path"):
            load_source(path)
        with pytest.raises(InputError, match="no possible path"):
            load_set(path)


# --- units of values ----------------------------------------------------------------------------------------------


def test_label_vectors_tell_themselves_by_their_sums_and_types(tmp_path: Path) -> None:
    x, y = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.5, 0.5]])
    path = tmp_path / "set.safetensors"
    for soft in (p, p.half(), 100 * p, torch.eye(2)[y]):
        save_file({"images": x, "labels": y, "soft_labels": soft.contiguous()}, path)
        with pytest.raises(InputError, match=r"could be probabilities.*label_kind"):
            load_set(path)
    save_file({"images": x, "labels": y, "soft_labels": (255 * p).to(torch.uint8)}, path)
    with pytest.raises(InputError, match=r"soft_labels of .* are torch.uint8"):
        load_set(path)
    save_file({"images": x, "labels": y, "soft_labels": p.log()}, path)
    assert load_set(path).label_kind == "logits"


def test_normalized_images_are_floats_with_both_statistics(tmp_path: Path) -> None:
    x, y, one = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), torch.ones(3)
    path = tmp_path / "set.safetensors"
    for tensors, message in (
        ({"images": x.byte(), "mean": one, "std": one.clone()}, "images of .* are uint8"),
        ({"images": x, "mean": one, "std": 0 * one}, "std of .* must be positive"),
        ({"images": x, "mean": one}, "has one of mean and std"),
    ):
        save_file({**tensors, "labels": y}, path)
        with pytest.raises(InputError, match=message):
            load_set(path)


def test_transparent_colors_are_laid_on_white_in_every_mode(tmp_path: Path) -> None:
    grays = set()
    for mode, key in (("L", 128), ("RGB", (128, 128, 128))):
        (tmp_path / mode / "a").mkdir(parents=True)
        Image.new(mode, (4, 4), key).save(tmp_path / mode / "a" / "0.png", transparency=key)
        source = load_source(tmp_path / mode)
        grays.add(int(read_images(source.train, [0], 4, "crop")[0].min()))
    assert grays == {255}


def test_readme_and_code_agree_on_the_largest_image() -> None:
    from dq.data.images import MAX_PIXELS

    page = (Path(__file__).parents[2] / "docs" / "how-to" / "many-machines.md").read_text()
    assert f"more than {MAX_PIXELS // 10**6} million pixels" in page
    assert np.isclose(MAX_PIXELS % 10**6, 0)
