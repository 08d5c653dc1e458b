from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dq.config.schema import SourceConfig
from dq.core.errors import InputError
from dq.data.images import read_image, read_images, to_rgb, to_square
from dq.data.load import load_source


def picture(color: tuple[int, int, int] = (200, 30, 60), size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, color)


def image_folder(root: Path, layout: dict[str, int], size: tuple[int, int] = (6, 4)) -> Path:
    """`layout` maps split/class to a number of images."""
    for i, (folder, n) in enumerate(layout.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for j in range(n):
            picture((20 * i, 10 * j, 5), size).save(root / folder / f"{j}.png")
    return root


# --- image modes --------------------------------------------------------------------------------------------------


def test_gray_palette_and_cmyk_become_rgb() -> None:
    gray = to_rgb(Image.new("L", (2, 2), 77))
    assert gray.mode == "RGB"
    assert gray.getpixel((0, 0)) == (77, 77, 77)
    assert to_rgb(picture().convert("P", palette=Image.Palette.ADAPTIVE)).getpixel((0, 0)) == (200, 30, 60)
    red, green, blue = to_rgb(picture().convert("CMYK")).getpixel((0, 0))
    assert (red, green, blue) == pytest.approx((200, 30, 60), abs=2)
    assert to_rgb(Image.new("1", (2, 2), 1)).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bit_keeps_its_range(mode: str, tmp_path: Path) -> None:
    array = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(array).save(tmp_path / "deep.png")
    image = Image.open(tmp_path / "deep.png")
    if mode == "I":
        image = Image.fromarray(array.astype(np.int32))
    assert [p[0] for p in to_rgb(image).get_flattened_data()] == [0, 100, 255]


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (1, 1), (200, 0, 0, 0))
    half = Image.new("RGBA", (1, 1), (200, 0, 0, 128))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(half).getpixel((0, 0))[1] == pytest.approx(127, abs=1)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([200, 0, 0])
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("LA", (1, 1), (10, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied() -> None:
    image = picture(size=(4, 2))
    image.putpixel((0, 0), (0, 255, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 270 degrees to show upright
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    upright = to_rgb(Image.open(buffer))
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (0, 255, 0)


# --- squares ------------------------------------------------------------------------------------------------------


def test_squash_crop_and_pad() -> None:
    image = Image.new("RGB", (8, 4), (0, 0, 0))
    image.paste((255, 255, 255), (2, 0, 6, 4))  # the central square is white
    assert np.asarray(to_square(image, 4, "crop")).min() == 255
    squashed = np.asarray(to_square(image, 4, "squash"))
    assert squashed[:, 0].max() < 60
    assert squashed[:, 1:3].min() > 200
    white = Image.new("RGB", (8, 4), (255, 255, 255))
    padded = np.asarray(to_square(white, 8, "pad"))
    assert padded.shape == (8, 8, 3)
    assert padded[:2].max() == 0
    assert padded[2:6].min() == 255


def test_shrinking_does_not_alias() -> None:
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    small = np.asarray(to_square(Image.fromarray(checks.astype(np.uint8)).convert("RGB"), 8, "squash"))
    assert small.min() > 100
    assert small.max() < 155


# --- sources ------------------------------------------------------------------------------------------------------


def test_tensors_round_trip_exactly() -> None:
    images = torch.randint(0, 256, (6, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = load_source((images, torch.tensor([0, 0, 1, 1, 2, 2])), class_names=["a", "b", "c"])
    assert np.array_equal(read_image(source.train, 4, 5, "crop"), images[4].numpy())
    assert source.class_counts().tolist() == [2, 2, 2]
    assert source.rows_of_class(1).tolist() == [2, 3]
    gray = load_source((images[:, :1].float() / 255, torch.tensor([0, 0, 1, 1, 2, 2])))
    assert np.array_equal(read_image(gray.train, 2, 5, "crop"), images[2, :1].expand(3, 5, 5).numpy())
    assert gray.class_names == ("0", "1", "2")


def test_fingerprint_follows_content() -> None:
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    labels = torch.tensor([0, 0, 1, 1])
    base = load_source((images, labels)).fingerprint
    assert load_source((images.clone(), labels.clone())).fingerprint == base
    changed = images.clone()
    changed[3, 0, 0, 0] = 1
    assert load_source((changed, labels)).fingerprint != base
    assert load_source((images, torch.tensor([0, 1, 1, 1]))).fingerprint != base
    assert load_source((images, labels), class_names=["x", "y"]).fingerprint != base


def test_image_folder_orders_digits_as_numbers(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {f"train/{c}": 1 for c in (0, 1, 2, 10, 11)} | {"test/10": 2})
    source = load_source(root)
    assert source.class_names == ("0", "1", "2", "10", "11")
    assert source.test.labels.tolist() == [3, 3]


def test_image_folder_without_splits_and_its_fingerprint(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "a", {"cat": 2, "ant": 1})
    source = load_source(root)
    assert source.class_names == ("ant", "cat")
    assert source.class_counts().tolist() == [1, 2]
    again = load_source(image_folder(tmp_path / "b", {"cat": 2, "ant": 1}))
    assert again.fingerprint == source.fingerprint
    (root / "cat" / "1.png").write_bytes((root / "cat" / "0.png").read_bytes() + b"\0")
    assert load_source(root).fingerprint != source.fingerprint
    with pytest.raises(InputError, match=r"no test split \(it has train\)"):
        _ = source.test


def write_parquet(folder: Path, *, names: list[str] | None = None) -> Path:
    from datasets import ClassLabel, Dataset, Features, Image, Value

    label = ClassLabel(names=names) if names else Value("string")
    for split, n in (("train", 6), ("test", 3)):
        labels = [i % 3 for i in range(n)] if names else [["b", "a", "c"][i % 3] for i in range(n)]
        images = [picture((40 * (i % 3), i, 0)) for i in range(n)]
        table = Dataset.from_dict(
            {"img": images, "label": labels}, features=Features({"img": Image(), "label": label})
        )
        folder.mkdir(exist_ok=True)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def test_parquet_folder_with_class_labels(tmp_path: Path) -> None:
    source = load_source(write_parquet(tmp_path / "set", names=["zebra", "ant", "bee"]))
    assert source.class_names == ("zebra", "ant", "bee")
    assert source.test_name == "test"
    assert source.class_counts().tolist() == [2, 2, 2]
    assert read_image(source.train, 4, 4, "crop")[:, 0, 0].tolist() == [40, 4, 0]


def test_a_parquet_folder_that_changed_is_read_anew(tmp_path: Path) -> None:
    before = load_source(write_parquet(tmp_path / "set", names=["x", "y", "z"]))
    (tmp_path / "other").mkdir()
    after = load_source(write_parquet(tmp_path / "set"))  # the same files, other labels
    assert after.fingerprint != before.fingerprint
    assert after.class_names == ("a", "b", "c")


def test_parquet_folder_with_text_labels_sorts_them(tmp_path: Path) -> None:
    source = load_source(write_parquet(tmp_path / "set"))
    assert source.class_names == ("a", "b", "c")
    assert source.train.labels.tolist() == [1, 0, 2, 1, 0, 2]


def test_digits_are_in_the_package() -> None:
    source = load_source("sklearn:digits")
    assert len(source.train) + len(source.test) == 1797
    assert source.class_counts().min() > 120
    assert load_source("sklearn:digits").fingerprint == source.fingerprint


# --- bad input ----------------------------------------------------------------------------------------------------


def test_unreadable_image_is_named_or_set_aside(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"train/a": 2, "train/b": 2})
    (root / "train" / "b" / "0.png").write_bytes(b"not an image")
    source = load_source(root)
    with pytest.raises(InputError, match=r"b/0\.png cannot be read .*on_bad_image=skip"):
        read_images(source.train, range(4), 4, "crop")
    images, rows, problems = read_images(source.train, range(4), 4, "crop", on_bad="skip")
    assert rows == [0, 1, 3]
    assert len(images) == 3
    assert len(problems) == 1
    assert "0.png" in problems[0]


def test_truncated_image_is_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"train/a": 1}, size=(64, 64))
    file = root / "train" / "a" / "0.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"a/0\.png cannot be read"):
        read_images(load_source(root).train, [0], 4, "crop")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"path": ""}, "no data set is named"),
        ({"path": "/nowhere/at/all"}, "/nowhere/at/all is not a folder"),
        ({"path": "no/such-set"}, "no/such-set cannot be opened as a Hub data set"),
    ],
)
def test_missing_sources(config: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_source(SourceConfig(**config))


def test_missing_split_and_column(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set", names=["x", "y", "z"])
    with pytest.raises(InputError, match=r"no split 'training'.* train, test"):
        load_source(folder, train_split="training")
    with pytest.raises(InputError, match=r"no split 'dev'.* train, test"):
        load_source(folder, test_split="dev")
    with pytest.raises(InputError, match=r"no column 'picture'.* img, label"):
        load_source(folder, image_column="picture")


def test_folder_faults(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no images in class folders"):
        load_source(tmp_path)
    root = image_folder(tmp_path / "x", {"train/a": 1, "test/b": 1})
    with pytest.raises(InputError, match="class folder 'b' of split 'test'"):
        load_source(root)


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (torch.zeros(2, 4, 3, 3), torch.tensor([0, 1]), None, "needs images"),
        (torch.full((2, 3, 3, 3), 2.0), torch.tensor([0, 1]), None, "must be finite and lie in"),
        (torch.zeros(2, 3, 3, 3), torch.tensor([0, 5]), ["a", "b"], "has label 5 but there are 2 classes"),
        (torch.zeros(2, 3, 3, 3), torch.tensor([0, 0]), ["a", "b"], "class 'b' of tensors has no image"),
        (
            torch.zeros(2, 3, 3, 3),
            torch.tensor([0, 1]),
            ["a", "a"],
            "class name 'a' of tensors stands for two classes",
        ),
        (torch.zeros(2, 3, 3, 3), torch.tensor([0, -1]), ["a", "b"], "has label -1"),
    ],
)
def test_tensor_faults(images: torch.Tensor, labels: torch.Tensor, names: list[str] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_source((images, labels), class_names=names)


def test_images_that_unpack_to_absurd_sizes_are_refused_before_they_do(tmp_path: Path) -> None:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = 30_000
    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bomb.png").write_bytes(bomb + chunk(b"IEND", b""))
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "fine.png")
    source = load_source(tmp_path)
    with pytest.raises(InputError, match=r"a/bomb.png cannot be read .*(pixels|decompression bomb)"):
        read_images(source.train, [0, 1], 8, "crop")
    _, good, _ = read_images(source.train, [0, 1], 8, "crop", on_bad="skip")
    assert good == [1]


def test_formats_that_run_programs_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.eps")
    (tmp_path / "a" / "x.eps").rename(tmp_path / "a" / "x.png")
    with pytest.raises(InputError, match=r"a/x.png cannot be read"):
        read_images(load_source(tmp_path).train, [0], 8, "crop")
