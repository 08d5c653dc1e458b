"""Sets that were made elsewhere: what is read, what is refused, and their evaluation through the command line."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from forking import Forked
from PIL import Image
from safetensors.torch import save_file

import dq
from dq.cli.flags import resolve
from dq.cli.main import main
from dq.cli.parser import build_parser
from dq.config.protocols import student_config
from dq.config.schema import RunConfig
from dq.config.students import EvaluateConfig, StudentConfig, ViewConfig
from dq.core.errors import InputError
from dq.core.processes import make_accelerator
from dq.data.load import load_source
from dq.data.splits import resized
from dq.distilled.external import LabelVectors, load_set, set_from_tensors
from dq.distilled.set import DistilledSet
from dq.evaluation.dd_ranking import LEARNING_RATES, _best_rates, _last, ddr_groups, evaluate_ddr
from dq.evaluation.results import read_records
from dq.evaluation.student import RealImages, train_student
from dq.networks.training import TrainingSet, normalizer
from dq.networks.zoo import make_net

NAMES = ("blue", "green", "red")  # in folder order
COLORS = {"blue": 2, "green": 1, "red": 0}  # name -> channel that is bright


def colored(name: str, n: int, seed: int, side: int = 8) -> torch.Tensor:
    """(n, 3, side, side) uint8 images of a class, no two alike."""
    x = 80 * torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))
    x[:, COLORS[name]] += 150
    return x.round().to(torch.uint8)


def save_images(folder: Path, images: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    for i, x in enumerate(images):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")


def small(ipc: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of the three classes in the order of `NAMES`, with labels."""
    return torch.cat([colored(n, ipc, seed=40 + i) for i, n in enumerate(NAMES)]), torch.arange(3).repeat_interleave(
        ipc
    )


def folder_set(folder: Path, names: tuple[str, ...] = NAMES, ipc: int = 2) -> Path:
    images, labels = small(ipc)
    for i, name in enumerate(names):
        save_images(folder / name, images[labels == i])
    return folder


def assert_is_small(s: DistilledSet, ipc: int = 2) -> None:
    images, labels = small(ipc)
    assert s.class_names == NAMES
    assert torch.equal(s.labels, labels)
    assert torch.equal(s.images_uint8(), images)
    assert (s.weights == 1).all()


# --- folders ------------------------------------------------------------------------------------------------------


def test_folder_by_class_names(tmp_path):
    s = load_set(folder_set(tmp_path / "set"), NAMES)
    assert_is_small(s)
    assert s.ipc == 2
    assert s.soft_labels is None


def test_folder_of_a_train_split(tmp_path):
    folder_set(tmp_path / "set" / "train")
    assert_is_small(load_set(tmp_path / "set", NAMES))


@pytest.mark.parametrize("numbers", [("00000", "00001", "00002"), ("0", "1", "2"), ("9", "10", "11")])
def test_numbered_folders_stand_in_class_order(tmp_path, numbers):
    assert_is_small(load_set(folder_set(tmp_path, numbers), NAMES))


def test_names_decide_where_the_data_has_another_order(tmp_path):
    folder_set(tmp_path)
    names = ("red", "blue", "green")
    s = load_set(tmp_path, names)
    assert s.class_names == names
    for label, name in enumerate(names):
        channel = s.images[s.labels == label].float().mean((0, 2, 3)).argmax()
        assert channel == COLORS[name]
    assert s.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_images_are_read_at_the_side_asked_for(tmp_path):
    folder_set(tmp_path)
    assert load_set(tmp_path, NAMES, image_size=4).images.shape == (6, 3, 4, 4)
    assert load_set(tmp_path, NAMES).images.shape == (6, 3, 8, 8)


def test_missing_other_and_empty_classes_are_named(tmp_path):
    folder_set(tmp_path / "two", NAMES[:2])
    with pytest.raises(InputError, match=r"class 2 'red' has no image in .*two; every class needs one"):
        load_set(tmp_path / "two", NAMES)
    folder_set(tmp_path / "other", ("blue", "green", "pink"))
    with pytest.raises(InputError, match=r"blue, green, pink\.\.\., the data has blue, green, red"):
        load_set(tmp_path / "other", NAMES)
    save_images(folder_set(tmp_path / "more") / "white", small()[0])
    with pytest.raises(InputError, match="white"):
        load_set(tmp_path / "more", NAMES)
    folder_set(tmp_path / "empty")
    for f in (tmp_path / "empty" / "green").iterdir():
        f.unlink()
    with pytest.raises(InputError, match=r"class folder .*green holds no images: it is empty"):
        load_set(tmp_path / "empty", NAMES)
    folder_set(tmp_path / "numbered", ("00000", "00002"))
    with pytest.raises(InputError, match="has the classes 00000, 00002"):
        load_set(tmp_path / "numbered", NAMES)


# --- tensors ------------------------------------------------------------------------------------------------------


def tensor_file(path: Path, **tensors: torch.Tensor) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **{k: v.numpy() for k, v in tensors.items()})
    else:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_tensors_in_any_order(tmp_path, suffix):
    images, labels = small()
    shuffled = torch.tensor([3, 0, 5, 1, 4, 2])
    extras = {
        "weights": torch.arange(1.0, 7),
        "soft_labels": torch.randn(6, 3, generator=torch.Generator().manual_seed(0)),
    }
    rows = {"images": images, "labels": labels, **extras}
    s = load_set(tensor_file(tmp_path / f"set{suffix}", **{k: v[shuffled] for k, v in rows.items()}), NAMES)
    assert s.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert s.prototype.tolist() == [0, 1, 0, 1, 0, 1]
    # a class keeps the order of the file, and everything of an image stays with it
    order = torch.tensor([0, 1, 3, 2, 5, 4])
    assert torch.equal(s.images, images[order])
    assert torch.equal(s.weights, extras["weights"][order])
    assert torch.equal(s.soft_labels, extras["soft_labels"][order].half())


def test_float_tensors_stay_floats(tmp_path):
    images, labels = small()
    s = load_set(tensor_file(tmp_path / "s.safetensors", images=images.double() / 255, labels=labels), NAMES)
    assert s.images.dtype == torch.float32
    assert_is_small(s)


MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.2, 0.3])


def normalized(x: torch.Tensor) -> torch.Tensor:
    return (x - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_normalized_tensors_are_pixels_again(tmp_path, suffix):
    images, labels = small()
    pixels = images.float() / 255
    pixels[0, 0, 0, 0], pixels[5, 2, 7, 7] = 1.4, -0.3  # matching methods do not keep pixels where a screen has them
    path = tensor_file(tmp_path / f"s{suffix}", images=normalized(pixels), labels=labels, mean=MEAN, std=STD)
    s = load_set(path, NAMES)
    assert not s.bounded
    # values of about 1 after a multiplication and an addition in float32, and the same the other way
    torch.testing.assert_close(s.images, pixels, rtol=0, atol=1e-6)
    assert s.images_uint8()[0, 0, 0, 0] == 255
    assert s.images_uint8()[5, 2, 7, 7] == 0
    # through a folder of our own, and in another order of the classes
    s.save(tmp_path, "mine")
    again = load_set(tmp_path / "mine", NAMES)
    assert torch.equal(again.images, s.images)
    assert not again.bounded
    assert load_set(tmp_path / "mine", ("red", "blue", "green")).images.max() == s.images.max()
    # without mean and std nobody knows what they are
    with pytest.raises(InputError, match=r"\[0, 1\].*mean and std"):
        load_set(tensor_file(tmp_path / f"t{suffix}", images=normalized(pixels), labels=labels), NAMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 0, 1, 1, 2, 3])}, r"labels of .* go from 0 to 3, but there are 3 classes"),
        ({"labels": torch.tensor([1, 1, 2, 2, 3, 3])}, r"go from 1 to 3, .* number them from 0"),
        ({"labels": torch.tensor([-1, 0, 1, 1, 2, 2])}, "go from -1 to 2"),
        ({"labels": torch.tensor([0, 0, 0, 2, 2, 2])}, r"class 1 'green' has no image in"),
        ({"labels": torch.tensor([0, 1, 2])}, "has 6 images but 3 labels"),
        ({"labels": torch.eye(3).repeat(2, 1)}, r"must be whole numbers \(N,\), N > 0, not \(6, 3\)"),
        ({"labels": torch.zeros(6)}, "must be whole numbers"),
        ({"images": torch.rand(0, 3, 8, 8), "labels": torch.zeros(0, dtype=torch.int64)}, "N > 0"),
        ({"images": 255 * torch.rand(6, 3, 8, 8)}, r"must lie in \[0, 1\]"),
        ({"images": torch.full((6, 3, 8, 8), torch.nan)}, "must be finite"),
        ({"images": torch.full((6, 3, 8, 8), torch.inf), "mean": torch.zeros(3), "std": torch.ones(3)}, "finite"),
        ({"images": torch.rand(6, 8, 8, 3)}, r"images must be \(N, 3, H, W\)"),
        ({"weights": torch.ones(5)}, r"weights of .* must be \(6,\), not \(5,\)"),
        ({"soft_labels": torch.ones(6, 4)}, r"soft_labels of .* must be \(6, 3\), not \(6, 4\)"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_tensors_that_do_not_fit_are_refused(tmp_path, changes, message, suffix):
    images, labels = small()
    path = tensor_file(tmp_path / f"set{suffix}", **{"images": images, "labels": labels, **changes})
    with pytest.raises(InputError, match=message):
        load_set(path, NAMES)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_that_cannot_be_read_are_named(tmp_path, suffix):
    images, labels = small()
    with pytest.raises(InputError, match=r"images and labels; .*data, labels"):
        load_set(tensor_file(tmp_path / f"keys{suffix}", data=images, labels=labels), NAMES)
    whole = tensor_file(tmp_path / f"torn{suffix}", images=images, labels=labels).read_bytes()
    for left in (len(whole) - 20, 40, 0):
        (tmp_path / f"torn{suffix}").write_bytes(whole[:left])
        with pytest.raises(InputError, match=f"torn{suffix} cannot be read"):
            load_set(tmp_path / f"torn{suffix}", NAMES)
    with pytest.raises(InputError, match=f"there is no file .*none{suffix}"):
        load_set(tmp_path / f"none{suffix}", NAMES)


def test_objects_in_npz_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "s.npz", images=np.array([print], dtype=object), labels=np.zeros(1, np.int64))
    with pytest.raises(InputError, match=r"s.npz cannot be read \(Object arrays cannot be loaded"):
        load_set(tmp_path / "s.npz", NAMES)


@pytest.mark.parametrize("name", ["set.pt", "set.pth"])
def test_files_of_torch_save_are_not_opened(tmp_path, name):
    torch.save({"images": small()[0], "labels": small()[1]}, tmp_path / name)
    with pytest.raises(InputError, match=r"can run code; .*safetensors"):
        load_set(tmp_path / name, NAMES)


def test_anything_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for path in (tmp_path / "notes.txt", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"is not a distilled set"):
            load_set(path, NAMES)


# --- our own ------------------------------------------------------------------------------------------------------


def own_set(names: tuple[str, ...] = NAMES) -> DistilledSet:
    images, labels = small()
    soft = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    s = set_from_tensors(images, labels, names, weights=torch.arange(1.0, 7), label_vectors=LabelVectors(soft))
    return dataclasses.replace(s, counts=torch.arange(6) + 10, source_row=torch.arange(6) + 100)


@pytest.mark.parametrize("where", ["folder", "set"])
def test_a_set_that_we_wrote_is_read_whole(tmp_path, where):
    s = own_set()
    s.save(tmp_path, "mine")
    result = load_set(tmp_path if where == "folder" else tmp_path / "mine", NAMES)
    for name in ("images", "labels", "weights", "prototype", "counts", "source_row", "soft_labels"):
        assert torch.equal(getattr(result, name), getattr(s, name)), name


def test_a_folder_of_several_sets_needs_the_name_of_one(tmp_path):
    own_set().save(tmp_path, "a")
    own_set().save(tmp_path, "b")
    with pytest.raises(InputError, match="it has a, b"):
        load_set(tmp_path, NAMES)
    assert_is_small(dataclasses.replace(load_set(tmp_path / "b", NAMES), weights=torch.ones(6)))


def test_reordered_classes_take_labels_and_soft_labels_with_them(tmp_path):
    s = own_set()
    s.save(tmp_path, "mine")
    names = ("red", "blue", "green")
    result = load_set(tmp_path, names)
    assert result.labels.tolist() == [0, 0, 1, 1, 2, 2]
    rows = torch.tensor([4, 5, 0, 1, 2, 3])  # red was last
    for name in ("images", "weights", "prototype", "counts", "source_row"):
        assert torch.equal(getattr(result, name), getattr(s, name)[rows]), name
    # the logit of a class is that of its name
    for name in names:
        old, new = s.soft_labels[rows][:, NAMES.index(name)], result.soft_labels[:, names.index(name)]
        assert torch.equal(old, new)


def losses(images: torch.Tensor, labels: torch.Tensor, bounded: bool = True) -> list[float]:
    """Of a student after every epoch."""
    results: list[float] = []
    train_student(
        TrainingSet(images, labels, 3, normalizer((0.5,) * 3, (0.25,) * 3)),
        StudentConfig(epochs=8, batch_size=3, tests=1, views=ViewConfig(crop_scale=(0.5, 1.0))),
        RealImages((images, labels) if bounded else small()),
        bounded=bounded,
        seed=0,
        on_epoch=lambda epoch, loss: results.append(loss),
    )
    return results


def test_normalized_tensors_train_as_the_pixels_they_came_from(tmp_path):
    images, labels = small()
    pixels = images.float() / 255
    file = tensor_file(tmp_path / "s.safetensors", images=normalized(pixels), labels=labels, mean=MEAN, std=STD)
    s = load_set(file, NAMES)
    # pixels differ by an ulp or two, which a few steps do not amplify a thousand times
    assert losses(s.images, s.labels, s.bounded) == pytest.approx(losses(images, labels), rel=1e-4)
    # what lies outside of [0, 1] is trained on as it is
    wide = 3 * pixels - 1
    file = tensor_file(tmp_path / "w.safetensors", images=normalized(wide), labels=labels, mean=MEAN, std=STD)
    s = load_set(file, NAMES)
    assert losses(s.images, s.labels, s.bounded) == pytest.approx(losses(wide, labels, bounded=False), rel=1e-4)
    clipped = losses(wide.clamp(0, 1), labels)
    assert losses(s.images, s.labels, s.bounded) != pytest.approx(clipped, rel=1e-2)
    # at another size, too
    assert resized(s.images, 4, bounded=False).max() > 1.1
    assert resized(s.images, 4).max() == 1


def parquet(path: Path, **more: list) -> Path:
    """Our classes in another order, under a column `label`, with columns of other people's."""
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    images, labels = small()
    features = {"image": ImageFeature(), "label": ClassLabel(names=["green", "red", "blue"])}
    features |= {k: List(Value("float32")) if k.startswith("soft_label") else Value("float64") for k in more}
    own = torch.tensor([2, 0, 1])[labels].tolist()
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
    table = Dataset.from_dict({"image": pictures, "label": own, **more}, features=Features(features))
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(path))
    return path


def test_parquet_of_others_is_mapped_by_name(tmp_path):
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert_is_small(load_set(tmp_path, NAMES))


def test_parquet_weights_and_soft_labels_are_honoured(tmp_path):
    weights = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
    # the logit of class c of its names for image i is 10 i + c
    soft = [[10.0 * i + c for c in range(3)] for i in range(6)]
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", weight=weights, soft_label=soft)
    s = load_set(tmp_path, NAMES)
    assert torch.equal(s.images_uint8(), small()[0])
    assert s.weights.tolist() == weights
    expected = [[10.0 * i + ("green", "red", "blue").index(n) for n in NAMES] for i in range(6)]
    assert s.soft_labels.tolist() == expected
    (tmp_path / "broken").mkdir()
    parquet(tmp_path / "broken" / "train-00000-of-00001.parquet", weight=[1.0, None, *weights[2:]])
    with pytest.raises(InputError, match=r"column 'weight' of .*broken is not numbers for every image"):
        load_set(tmp_path / "broken", NAMES)
    shutil.rmtree(tmp_path / "broken")
    # a test split beside it is not of the set
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", weight=[9.0] * 6, soft_label=soft)
    assert load_set(tmp_path, NAMES).weights.tolist() == weights


def test_parquet_columns_have_the_names_of_tensor_files_too_and_others_are_named(tmp_path, caplog):
    weights, soft = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0], [[10.0 * i + c for c in range(3)] for i in range(6)]
    parquet(tmp_path / "a" / "train-00000-of-00001.parquet", weights=weights, soft_labels=soft)
    s = load_set(tmp_path / "a", NAMES)
    assert s.weights.tolist() == weights
    assert s.soft_labels[0].tolist() == [2.0, 0.0, 1.0]
    assert "left out" not in caplog.text
    parquet(tmp_path / "b" / "train-00000-of-00001.parquet", logits=weights, count=weights, probabilities=weights)
    assert load_set(tmp_path / "b", NAMES).soft_labels is None
    assert "left out 2 columns without a meaning here (first: logits)" in caplog.text
    parquet(tmp_path / "c" / "train-00000-of-00001.parquet", weight=weights, weights=weights)
    with pytest.raises(InputError, match=r"columns weight and weights"):
        load_set(tmp_path / "c", NAMES)


# --- what is odd about images -------------------------------------------------------------------------------------


def test_images_that_cannot_be_read_are_skipped_if_asked(tmp_path, caplog):
    folder = folder_set(tmp_path / "set")
    (folder / "blue" / "000.png").write_bytes(b"x")
    with pytest.raises(InputError, match="cannot be read"):
        load_set(folder, NAMES)
    s = load_set(folder, NAMES, on_bad_image="skip")
    assert len(s) == 5
    assert s.images.shape[-1] == 8
    assert torch.equal(s.images_uint8(), small()[0][1:])
    assert re.search(r"left out 1 of 6 images that cannot be read: .*000\.png", caplog.text)
    (folder / "blue" / "001.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"class 0 'blue' has no image"):
        load_set(folder, NAMES, on_bad_image="skip")
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"x")
    for side in (None, 8):
        with pytest.raises(InputError, match=r"no image of .* can be read"):
            load_set(folder, NAMES, image_size=side, on_bad_image="skip")


def test_images_of_other_sizes_are_counted_and_the_first_is_named(tmp_path, caplog):
    folder = folder_set(tmp_path / "set")
    load_set(folder, NAMES, image_size=4)  # asked for, and alike for all
    assert not caplog.records
    Image.new("RGB", (16, 16)).save(folder / "green" / "001.png")
    Image.new("RGB", (12, 8)).save(folder / "red" / "000.png")
    load_set(folder, NAMES)
    cut, resampled = (r.getMessage() for r in caplog.records)
    assert re.search(r"1 of 6 images are not square, and cut .* of 8 px; the first, .*red/000.png, has 12 x 8 px", cut)
    assert re.search(r"1 of 6 images are resampled to 8 px; the first, .*green/001.png, has 16 x 16 px", resampled)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_tensors_in_other_units_are_refused(tmp_path, suffix):
    x, labels = small()
    bits = tensor_file(tmp_path / f"bits{suffix}", images=(x > 128).byte(), labels=labels)
    with pytest.raises(InputError, match=r"8-bit and hold 0 and 1 alone, .* multiply them by 255"):
        load_set(bits, NAMES)
    units = {"mean": torch.full((3,), 127.5), "std": torch.full((3,), 64.0)}
    path = tensor_file(tmp_path / f"units{suffix}", images=normalized(x), labels=labels, **units)
    with pytest.raises(InputError, match=r"must be those of images in \[0, 1\], not \[127\.5.* divide both by 255"):
        load_set(path, NAMES)


def test_a_name_is_refused_where_sets_have_none(tmp_path):
    x, labels = small()
    for path in (folder_set(tmp_path / "set"), tensor_file(tmp_path / "t.npz", images=x, labels=labels)):
        with pytest.raises(InputError, match=r"no 'ours' in it; leave the name out"):
            load_set(path, NAMES, name="ours")


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images by class, a distilled set of them, and a teacher."""
    root = tmp_path_factory.mktemp("world")
    pairs = []
    for i, name in enumerate(NAMES):
        for split, n in (("train", 10), ("test", 4)):
            x = colored(name, n, seed=10 * i + n)
            save_images(root / "images" / split / name, x)
            pairs += [(x, torch.full((n,), i))] * (split == "train")
    folder_set(root / "set")
    net = make_net("convnet3-bn", 3, 8, seed=0)
    x, y = (torch.cat(t) for t in zip(*pairs, strict=True))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net((x / 255 - 0.5) / 0.5), y).backward()
        optimizer.step()
    (root / "teacher").mkdir()
    save_file(net.state_dict(), root / "teacher" / "model.safetensors")
    facts = {"net": "convnet3-bn", "mean": [0.5] * 3, "std": [0.5] * 3}
    (root / "teacher" / "teacher.json").write_text(json.dumps(facts))
    return root


HARD = ["--set", "evaluate.students=[{net: convnet3, epochs: 1, augment: none}]"]
SOFT = [
    "--set",
    "evaluate.students=[{net: convnet3-bn, labels: soft, augment: none, epochs: 4, batch_size: 4, accumulate: 2, "
    "optimizer: adamw, lr: 1e-3, views: {crop_scale: [0.5, 1.0], flip: 0.5, mix: cutmix}, "
    "relabel: {statistics: batch}}]",
]


def arguments(world: Path, out: Path, *more: str) -> list[str]:
    """A command, whose options `more` replace the usual ones."""
    usual = {"--data": world / "images", "--output_dir": out / "run", "--cache_dir": out / "cache"}
    usual |= {"--seeds": 2, "--baselines": "random"}
    options = [str(x) for name, value in usual.items() if name not in more for x in (name, value)]
    return ["evaluate", "--distilled", f"mine={world / 'set'}", "--cpu", *options, *more]


def soft(world: Path) -> list[str]:
    return [*SOFT, "--teacher", f"convnet3-bn={world / 'teacher'}"]


def records(out: Path, name: str = "trainings") -> list[dict]:
    """What trainings found, without how long they took."""
    lines = (out / "run" / "eval" / f"{name}.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "train_seconds"} for line in lines]


def label_files(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in out.glob("run/labels/*/*")}


@pytest.fixture(scope="module")
def evaluated(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated")
    assert main(arguments(world, out, *soft(world))) == 0
    return out


def test_evaluating_a_folder_leaves_its_tables(world, tmp_path, capsys):
    assert main(arguments(world, tmp_path, *HARD)) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[0] == "| set | convnet3, hard, IPC 2 |"
    assert output.splitlines()[-1] == str(tmp_path / "run" / "eval" / "summary.csv")
    with open(tmp_path / "run" / "eval" / "summary.csv", newline="") as f:
        rows = {r["set"]: r for r in csv.DictReader(f)}
    assert set(rows) == {"mine", "random"}
    assert all((r["ipc"], r["images"], r["seeds"], r["label_bytes"]) == ("2", "6", "2", "0") for r in rows.values())
    with open(tmp_path / "run" / "eval" / "comparisons.csv", newline="") as f:
        (row,) = csv.DictReader(f)
    assert (row["set"], row["against"], row["pairs"]) == ("mine", "random", "2")
    difference = float(rows["mine"]["last_mean"]) - float(rows["random"]["last_mean"])
    assert float(row["difference"]) == pytest.approx(difference, abs=2e-5)
    result = records(tmp_path)
    assert [(r["set"], r["seed"]) for r in result] == [("mine", 0), ("mine", 1), ("random", 0), ("random", 1)]
    assert all(r["images"] == 6 and r["config"]["epochs"] == 1 for r in result)


def test_a_second_call_trains_and_labels_nothing(evaluated, world, capsys):
    files = [f for f in evaluated.rglob("*") if f.is_file() and f.parent.name != "eval"]
    stamps = {f: f.stat().st_mtime_ns for f in files}
    before = records(evaluated)
    assert len(list(evaluated.glob("run/eval/units/*.json"))) == 4
    assert main(arguments(world, evaluated, *soft(world))) == 0
    assert {f: f.stat().st_mtime_ns for f in files} == stamps
    assert records(evaluated) == before


def test_soft_labels_are_stored_and_counted(evaluated):
    folders = {f.name.rpartition("-")[0]: f for f in evaluated.glob("run/labels/*")}
    # each seed has a random subset of its own
    assert set(folders) == {"ipc2-mine", "ipc2-random-seed0", "ipc2-random-seed1"}
    for r in records(evaluated):
        name = "ipc2-mine" if r["set"] == "mine" else f"ipc2-random-seed{r['seed']}"
        files = list(folders[name].glob("*.safetensors"))
        assert len(files) == 4
        assert r["label_bytes"] == sum(f.stat().st_size for f in files)
        assert r["teachers"][0]["name"] == "convnet3-bn"


def test_an_online_teacher_gives_the_same_students(evaluated, world, tmp_path):
    online = [SOFT[0], SOFT[1].replace("statistics: batch", "statistics: batch, storage: online"), *soft(world)[2:]]
    assert main(arguments(world, tmp_path, *online)) == 0
    assert not (tmp_path / "run" / "labels").exists()
    numbers = [(r["set"], r["seed"], r["last"], r["looks"]) for r in records(evaluated)]
    assert [(r["set"], r["seed"], r["last"], r["looks"]) for r in records(tmp_path)] == numbers
    assert {r["label_bytes"] for r in records(tmp_path)} == {0}


@pytest.mark.multi_process
def test_two_processes_find_what_one_finds(evaluated, world, tmp_path):
    done = Forked(lambda: main(arguments(world, tmp_path, *soft(world))), processes=2)
    output, errors = done.communicate(timeout=240)
    assert done.returncode == 0, errors
    assert output.count("| set |") == 1  # the main process alone prints
    assert records(tmp_path) == records(evaluated)
    assert label_files(tmp_path) == label_files(evaluated)


def test_classes_of_another_order_or_kind(world, tmp_path, capsys):
    folder_set(tmp_path / "two", NAMES[:2])
    call = arguments(world, tmp_path, *HARD)
    call[call.index(f"mine={world / 'set'}")] = str(tmp_path / "two")
    assert main(call) == 2
    assert "class 2 'red' has no image" in capsys.readouterr().err


def test_names_of_sets(world, tmp_path, capsys):
    for name, message in (
        ("random", "is that of a baseline"),
        ("mine", "two sets are called 'mine'"),
        ("a b", "letters"),
    ):
        assert main(arguments(world, tmp_path, *HARD, "--distilled", f"{name}={world / 'set'}")) == 2
        assert message in capsys.readouterr().err


def test_a_folder_of_sets_is_opened_or_lists_them(world, tmp_path, capsys):
    own_set().save(tmp_path / "run" / "dataset", "ipc2-a")
    call = arguments(world, tmp_path / "out", *HARD, "--distilled", f"ours={tmp_path / 'run' / 'dataset'}")
    fast = {"protocol": "custom", "students": "convnet3", "n_seeds": 1, "epochs": 1, "augment": "none"}
    rows = dq.evaluate(tmp_path / "run", str(world / "images"), baselines=(), **fast)
    assert [row.images for row in rows.rows] == [6]
    own_set().save(tmp_path / "run" / "dataset", "ipc2-b")
    assert main(call) == 2
    assert "it has ipc2-a, ipc2-b: give the path of one, such as" in capsys.readouterr().err


def test_a_record_names_its_set_and_its_software(evaluated, world):
    for r in records(evaluated):
        assert r["data"]["set"] == (str(world / "set") if r["set"] == "mine" else "selected from train")
        assert (r["data"]["source"], r["data"]["image_size"]) == (str(world / "images"), 8)
        assert r["software"]["dq"] == dq.__version__
        assert r["test_images"] == 12
        assert r["teachers"][0]["mean"] == [0.5] * 3


def test_another_seed_labels_no_named_set_again(world, tmp_path):
    call = [*soft(world), "--baselines", "random,nearest"]
    once, call = arguments(world, tmp_path, *call, "--seeds", "1"), arguments(world, tmp_path, *call)
    assert main(once) == 0
    stamps = {f: f.stat().st_mtime_ns for f in tmp_path.glob("run/labels/*/*")}
    assert {f.parent.name.rpartition("-")[0] for f in stamps} == {"ipc2-mine", "ipc2-nearest", "ipc2-random-seed0"}
    assert main(call) == 0
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps
    new = {f.parent.name.rpartition("-")[0] for f in tmp_path.glob("run/labels/*/*") if f not in stamps}
    assert new == {"ipc2-random-seed1"}


def test_two_students_of_one_network_are_told_apart(world, tmp_path, capsys):
    plain = "{net: convnet3, epochs: 1, augment: none"
    assert main(arguments(world, tmp_path, "--set", f"evaluate.students=[{plain}}}, {plain}, lr: 0.1}}]")) == 0
    assert "convnet3, hard, sgd lr 0.1" in capsys.readouterr().out
    with open(tmp_path / "run" / "eval" / "comparisons.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["recipe"], r["student"], "lr 0.1 " in r["settings"]) for r in rows] == [
        ("0", "convnet3", False),
        ("1", "convnet3", True),
    ]


def test_images_out_of_range_are_labeled_trained_on_and_resized(world, tmp_path):
    images, labels = small()
    file = tmp_path / "wide.safetensors"
    tensor_file(file, images=normalized(images.float() / 255 * 3 - 1), labels=labels, mean=MEAN, std=STD)
    call = arguments(world, tmp_path, *soft(world), "--distilled", str(file), "--seeds", "1")
    assert main([*call, "--image_size", "16", "--set", "teachers.0.image_size=8"]) == 0
    assert {r["set"] for r in records(tmp_path)} == {"mine", "wide", "random"}


# --- its flags ----------------------------------------------------------------------------------------------------


def resolved(*flags: str) -> RunConfig:
    return resolve(build_parser().parse_args(["evaluate", *flags]))


TWO = "evaluate.students=[{net: convnet3, epochs: 5}, {net: resnet20, lr: 0.3}]"


def test_protocol_and_dataset_apply_to_all_configured_students():
    result = resolved("--set", TWO, "--protocol", "rded", "--dataset", "cifar100").evaluate.students
    common = {"protocol": "rded", "dataset": "cifar100"}
    assert list(result) == [{"net": "convnet3", "epochs": 5, **common}, {"net": "resnet20", "lr": 0.3, **common}]
    assert list(resolved("--set", TWO, "--protocol", "ddr").evaluate.students) == [
        {"net": "convnet3", "epochs": 5},
        {"net": "resnet20", "lr": 0.3},
    ]
    # what is said of one student holds for all that are named
    one = ("--set", "evaluate.students=[{epochs: 5}]", "--student", "vgg11", "--student", "convnet3")
    assert list(resolved(*one).evaluate.students) == [{"epochs": 5, "net": "vgg11"}, {"epochs": 5, "net": "convnet3"}]
    with pytest.raises(InputError, match=r"--student .*evaluate\.students"):
        resolved("--set", TWO, "--student", "vgg11")


def test_set_says_more_of_a_teacher_that_a_flag_names():
    flags = ("--teacher", "resnet56=a/b", "--teacher", "convnet3=c")
    (first, second) = resolved(
        *flags, "--set", "teachers.0.batch_size=7", "--set", "teachers.1.classes=[1, 0]"
    ).teachers
    assert (first.net, first.path, first.batch_size) == ("resnet56", "a/b", 7)
    assert (second.net, second.path, second.batch_size, second.classes) == ("convnet3", "c", 256, (1, 0))
    with pytest.raises(InputError, match="--teacher takes NET=PATH such as"):
        resolved("--teacher", "resnet56")


def test_only_a_configuration_or_a_flag_brings_the_full_data(tmp_path):
    assert resolved().evaluate.baselines == ("random",)
    assert "full" in RunConfig().evaluate.baselines
    (tmp_path / "c.yaml").write_text("{}")
    assert resolved("--config", str(tmp_path / "c.yaml")).evaluate.baselines == RunConfig().evaluate.baselines
    assert resolved("--set", "evaluate.baselines=[full]").evaluate.baselines == ("full",)
    assert resolved("--baselines", "random,full").evaluate.baselines == ("random", "full")
    teacher = ("--teacher", "resnet18=teachers/resnet18")
    assert resolved(*teacher).evaluate.baselines == ("random", "facility")
    assert resolved(*teacher, "--set", "evaluate.baselines=[random]").evaluate.baselines == ("random",)
    assert resolved(*teacher, "--baselines", "random").evaluate.baselines == ("random",)
    assert (
        resolved(*teacher, "--config", str(tmp_path / "c.yaml")).evaluate.baselines == RunConfig().evaluate.baselines
    )


def planned(call: list[str], capsys: pytest.CaptureFixture) -> tuple[int, float]:
    """Trainings and bytes of labels that a dry run announces."""
    capsys.readouterr()
    assert main([*call, "--dry-run"]) == 0
    output = capsys.readouterr().out
    number, unit = re.search(r"labels +([\d.]+) (B|kB|MB) of soft labels", output).groups()
    return int(re.search(r"evaluate +(\d+) trainings", output)[1]), float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[
        unit
    ]


def test_a_dry_run_knows_the_bytes_of_labels(world, tmp_path, capsys):
    # so many images that the header of a file, which is not counted, is small
    folder = tensor_file(tmp_path / "big.safetensors", images=small(300)[0], labels=small(300)[1])
    shorter = ("epochs: 4, batch_size: 4", "epochs: 2, batch_size: 60")
    call = [word.replace(*shorter) for word in arguments(world, tmp_path, *soft(world))]
    call[call.index(f"mine={world / 'set'}")] = str(folder)
    call[call.index("--baselines") + 1] = ""
    trainings, expected = planned(call, capsys)
    assert trainings == 2
    # two random subsets of all that train has, 10 images a class
    random = list(call)
    random[call.index("--baselines") + 1] = "random"
    more = planned(random, capsys)
    assert more[0] == 4
    assert more[1] - expected == pytest.approx(2 * 30 / 900 * expected, rel=0.2)  # printed with three digits
    # and at another number that is asked for
    assert planned([*random, "--ipc", "2"], capsys)[0] == 6
    # a second student that differs in nothing that labels depend on shares them
    student = SOFT[1].partition("=")[2].strip("[]")
    student = student.replace(*shorter)
    twice = [student, student.replace("lr: 1e-3", "lr: 1e-2")]
    both = [f"evaluate.students=[{', '.join(twice)}]" if w.startswith("evaluate.students=") else w for w in call]
    assert planned(both, capsys) == (4, expected)
    assert not (tmp_path / "run").exists()
    assert main(call) == 0
    files = list(tmp_path.glob("run/labels/*/*.safetensors"))
    assert expected == pytest.approx(sum(f.stat().st_size for f in files), rel=0.05)


def test_kinds_of_labels_stand_side_by_side(world, tmp_path, capsys):
    student = (
        "{net: convnet3-bn, epochs: 2, batch_size: 6, optimizer: adamw, lr: 1e-3, augment: none, views: {mix: cutmix}}"
    )
    teacher = f"convnet3-bn={world / 'teacher'}"
    call = arguments(world, tmp_path, "--teacher", teacher, "--labels", "hard,fixed,soft", "--seeds", "1")
    assert main([*call, "--set", f"evaluate.students=[{student}]"]) == 0
    table = capsys.readouterr().out
    for kind in ("hard", "fixed", "soft"):
        assert f"convnet3-bn, {kind}, IPC 2" in table
    assert [r["labels"] for r in records(tmp_path)] == ["hard"] * 2 + ["fixed"] * 2 + ["soft"] * 2
    rows = read_records(tmp_path / "run" / "eval" / "summary.csv")
    assert [(r["set"], r["labels"]) for r in rows] == [
        (s, k) for k in ("hard", "fixed", "soft") for s in ("mine", "random")
    ]


def test_quiet_shows_no_bars(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")  # so that it is put back
    assert main(arguments(world, tmp_path, *HARD, "--seeds", "1")) == 0
    assert "evaluate:" in capsys.readouterr().err
    assert main(arguments(world, tmp_path, *HARD, "--quiet")) == 0
    assert capsys.readouterr().err == ""


# --- refused before anything is trained ---------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_that_are_not_positive_are_refused_at_once(world, tmp_path, capsys, weight):
    images, labels = small()
    weights = torch.tensor([1.0, 1, 1, 1, 1, weight])
    file = tensor_file(tmp_path / "theirs.safetensors", images=images, labels=labels, weights=weights)
    assert main(arguments(world, tmp_path, *HARD, "--distilled", str(file))) == 2
    assert "the set 'theirs' has weights that are not more than 0" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_what_cannot_be_trained_is_refused_at_once(world, tmp_path, capsys):
    images, labels = small()
    flat = tensor_file(tmp_path / "flat.safetensors", images=images[:, :, :4], labels=labels)
    net = "{net: convnet3, epochs: 1}"
    for more, message in (
        (["--distilled", str(flat)], "images of the set 'flat' are (4, 8) px; they must be square"),
        (["--set", f"evaluate.students=[{net}, {net}]"], "is named twice; name every student once"),
        (["--set", "evaluate.students=[]"], "there is no student to train; name one with --student"),
        (["--ipc", "0"], "ipc"),
        (["--set", "evaluate.students=[{labels: fixed, epochs: 1}]"], "'mine' has no labels for labels=fixed"),
        (["--baselines", "patches"], "'patches' needs a teacher"),
        (["--baselines", "random,facility"], "the baseline 'facility' needs a teacher; set teachers, or leave it out"),
    ):
        student = [] if "--set" in more else HARD  # a key may be given once
        assert main(arguments(world, tmp_path, *student, *more)) == 2, more
        assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_the_folder_of_a_run_is_left_alone(world, tmp_path, capsys):
    (tmp_path / "run" / "eval").mkdir(parents=True)
    for name in ("config.yaml", "eval/summary.csv"):
        (tmp_path / "run" / name).write_text("precious")
    assert main(arguments(world, tmp_path, *HARD)) == 2
    assert "is a run, whose results would be replaced; choose another --output_dir" in capsys.readouterr().err
    assert (tmp_path / "run" / "eval" / "summary.csv").read_text() == "precious"
    assert not list(tmp_path.rglob("*.json"))


def test_the_advice_on_a_broken_image_works(world, tmp_path, capsys):
    folder = folder_set(tmp_path / "set")
    (folder / "red" / "001.png").write_bytes(b"x")
    call = ["--distilled", f"broken={folder}", *HARD]
    assert main(arguments(world, tmp_path, *call, "--dry-run")) == 2
    assert "set it aside with --set source.on_bad_image=skip" in capsys.readouterr().err
    assert main(arguments(world, tmp_path, *call, "source.on_bad_image=skip", "--dry-run")) == 0


def test_results_are_not_written_among_images(world, tmp_path, capsys):
    before = sorted(world.rglob("*"))
    (tmp_path / "link").symlink_to(world / "images")
    for place, why in (("images", "holds the images themselves"), ("set", "is the set 'mine' itself")):
        assert main(arguments(world, tmp_path, *HARD, "--output_dir", str(world / place))) == 2
        assert why in capsys.readouterr().err
        with pytest.raises(InputError, match="holds the images themselves; choose another"):
            dq.evaluate(world / "set", world / "images", output_dir=world / place)
    assert main(arguments(world, tmp_path, *HARD, "--output_dir", str(tmp_path / "link"))) == 2
    assert sorted(world.rglob("*")) == before


def test_a_class_without_test_images_is_said(world, tmp_path, caplog):
    shutil.copytree(world / "images", tmp_path / "images")
    call = arguments(world, tmp_path, *HARD, "--seeds", "1", "--data", str(tmp_path / "images"))
    assert main(call) == 0
    assert "no test image" not in caplog.text
    for f in (tmp_path / "images" / "test" / "green").iterdir():
        f.unlink()
    assert main(call) == 0
    assert "1 class without a test image, not counted: green" in caplog.text


# --- ddr ----------------------------------------------------------------------------------------------------------


def test_ddr_scores_a_set(world, tmp_path, capsys):
    students = ["--set", "evaluate.students=[{net: convnet3, epochs: 1, augment: crop_flip, batch_size: 8}]"]
    call = arguments(world, tmp_path, "--protocol", "ddr", *students)
    assert main([*call, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))
    assert main(call) == 0
    output = capsys.readouterr().out
    assert output.startswith("| set | student | HLR (low is good) | IOR | LRS | ARS |")
    assert "Recipes: convnet3: custom, 1 epoch, batch 8" in output
    assert output.splitlines()[-1] == str(tmp_path / "run" / "eval" / "ddr.csv")
    with open(tmp_path / "run" / "eval" / "ddr.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    facts = [{k: r.pop(k) for k in ("set", "student", "protocol", "settings", "seed")} for r in rows]
    assert [(f["set"], f["student"], f["seed"]) for f in facts] == [
        ("mine", "convnet3", "0"),
        ("mine", "convnet3", "1"),
    ]
    assert all(f["protocol"] == "custom" and "augment crop_flip" in f["settings"] for f in facts)
    trained = records(tmp_path, "ddr-trainings")
    assert planned == f"evaluate    up to {len(trained)} trainings of ddr\n"
    assert {r["part"] for r in trained} == {"own", "augmented", "hard", "full", "plain"}
    for r, fact in zip(rows, facts, strict=True):
        value = {k: float(v) for k, v in r.items()}
        assert -1 <= value["hlr"] <= 1
        assert -1 <= value["ior"] <= 1
        assert 0 <= value["lrs"] <= 1
        assert 0 <= value["ars"] <= 1
        assert value["hlr"] == pytest.approx(value["accuracy_full"] - value["accuracy_hard"])
        assert value["ior"] == pytest.approx(value["accuracy_own"] - value["accuracy_random"])
        # the lr that is named is that of the training whose accuracy stands beside it, and best on validation images
        for column, part, name in (("hard", "hard", "mine"), ("own", "own", "mine"), ("random", "own", "random")):
            own = [t for t in trained if (t["part"], t["set"], str(t["seed"])) == (part, name, fact["seed"])]
            assert sorted(t["config"]["lr"] for t in own) == sorted(LEARNING_RATES)
            (chosen,) = [t for t in own if t["config"]["lr"] == value[f"lr_{column}"]]
            assert chosen["last"] == value[f"accuracy_{column}"]
            assert chosen["looks"][-1][1] == max(t["looks"][-1][1] for t in own)
    # for two seeds: random and the set by its recipe over all rates, of which the recipe's own lr is one; the set
    # without augmentation over all rates, since this recipe has hard labels; random without augmentation
    own = 0.01
    assert own in LEARNING_RATES
    assert len(list((tmp_path / "run").rglob("units/*.json"))) == 2 * (3 * len(LEARNING_RATES) + 1)
    assert {r["config"]["augment"] for r in trained if r["part"] in ("hard", "full", "plain")} == {"none"}
    assert {r["config"]["augment"] for r in trained if r["part"] in ("own", "augmented")} == {"crop_flip"}
    assert len(list(tmp_path.glob("cache/full/*.json"))) == 1
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("units/*.json")}
    before |= {f: f.stat().st_mtime_ns for f in tmp_path.glob("cache/full/*.json")}
    assert main(call) == 0
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert main(["report", "--output_dir", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "DD-Ranking" in page
    assert "lr_random" in page


def test_ddr_trains_on_hard_labels_without_mixes_and_augmentation():
    """DD-Ranking's hard-label trainings take neither its CutMix nor its DSA; image transforms stay."""

    def students(part: str, **options: bool) -> list[StudentConfig]:
        recipes = [{"protocol": "fadrm", "views": {"flip": 0.25}}, {"protocol": "classic"}]
        specs = ddr_groups(recipes, **options)[part][0]
        return [student_config(s, ipc="10", classes=10, image_size=32) for s in specs]

    for part, count in (("hard", len(LEARNING_RATES)), ("full", 1)):
        soft, dsa = students(part)[0], students(part)[count]
        assert (soft.labels, soft.augment, soft.views.mix) == ("hard", "none", "none")
        assert (soft.views.crop_scale, soft.views.flip) == ((0.08, 1.0), 0.25)
        assert (dsa.labels, dsa.augment, dsa.views.mix) == ("hard", "none", "none")
        soft, dsa = (students(part, hard_augmented=True)[i] for i in (0, count))
        assert (soft.labels, soft.views.mix, dsa.augment) == ("hard", "cutmix", "dsa")
    soft, dsa = students("augmented")
    assert (soft.labels, soft.views.mix, dsa.augment) == ("soft", "cutmix", "dsa")
    plain = students("plain")[0]
    assert plain.views == dataclasses.replace(ViewConfig(), mix_alpha=plain.views.mix_alpha)


def test_ddr_takes_the_rate_that_is_best_on_validation_images():
    rates = len(LEARNING_RATES)
    # recipe 1 of two; the look at half time and the accuracy on test images would choose other rates
    looks = {0: (0.9, 0.5), 1: (0.1, 0.7), 2: (0.1, 0.6), 3: (0.0, 0.1), 4: (0.0, 0.0)}
    last = {0: 0.3, 1: 0.4, 2: 0.8, 3: 0.1, 4: 0.1}
    records = [
        {"set": name, "recipe": rates + i, "seed": seed, "looks": [[1, looks[i][0]], [2, looks[i][1]]], "last": value}
        for name, more in (("mine", 0.0), ("random", 0.1))
        for seed in (1, 0)
        for i, value in ((i, last[i] + more + seed / 100) for i in range(rates))
    ]
    assert _last(_best_rates(records, "mine", 1)) == pytest.approx((0.4, 0.41))
    assert _last(_best_rates(records, "random", 1)) == pytest.approx((0.5, 0.51))
    assert [r["recipe"] for r in _best_rates(records, "mine", 1)] == [rates + 1, rates + 1]
    assert _best_rates(records, "mine", 0) == []


def test_ddr_says_what_it_cannot_do(world, tmp_path, capsys):
    for more in (["--ipc", "1"], []):
        call = arguments(world, tmp_path, "--protocol", "ddr", *HARD, *more)
        if not more:
            at = call.index("--distilled")
            del call[at : at + 2]
        assert main(call) == 2
        assert "ddr scores sets named with --distilled PATH" in capsys.readouterr().err
    assert main(arguments(world, tmp_path, "--protocol", "ddr", "--set", "evaluate.students=[{epochs: {2: 1}}]")) == 2
    assert "epochs has entries for 2 but not for 'full'" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_ddr_compares_sets_of_one_size(world, tmp_path):
    def score(*sets: DistilledSet, image_size: int | None = None) -> None:
        evaluate_ddr(
            {f"s{i}": s for i, s in enumerate(sets)},
            load_source(world / "images"),
            config=EvaluateConfig(),
            image_size=image_size,
            folder=tmp_path,
            cache_dir=tmp_path,
            accelerator=make_accelerator(cpu=True),
        )

    a = set_from_tensors(*small(2), NAMES)
    with pytest.raises(InputError, match="sets of equal size"):
        score(a, set_from_tensors(*small(3), NAMES))
    with pytest.raises(InputError, match="sets of equal size"):
        score()
    wide = dataclasses.replace(a, images=torch.zeros(6, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"images of \[8, 16\] px"):
        score(a, wide)


def test_label_kind_is_stated_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that sum to 1 are refused until somebody says what they are."""
    images = np.zeros((10, 3, 8, 8), np.uint8)
    soft = np.full((10, 10), 0.1, np.float32)
    np.savez(tmp_path / "s.npz", images=images, labels=np.arange(10), soft_labels=soft)
    command = ["evaluate", "--distilled", str(tmp_path / "s.npz"), "--data", "sklearn:digits", "--image_size", "8"]
    command += ["--seeds", "1", "--student", "convnet3w32", "--output_dir", str(tmp_path / "out"), "--cpu"]
    command += ["--baselines", "random", "--protocol", "classic", "--dry-run"]
    assert main(command) == 2
    way_out = "state label_kind (--label_kind): probabilities (rows sum to 1), logits or regression"
    assert way_out in capsys.readouterr().err
    assert main([*command, "--label_kind", "probabilities"]) == 0
