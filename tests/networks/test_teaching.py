"""Teachers trained on a toy source: what is written, how it is loaded, and what a second call does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dq.config.schema import RunConfig, SourceConfig
from dq.config.teachers import TeacherConfig, TrainTeachersConfig
from dq.core.errors import InputError, RunError
from dq.core.files import read_json, read_tensors
from dq.data.splits import validation_rows
from dq.networks import teacher_check
from dq.networks import training as train
from dq.networks.teacher_check import check_teacher
from dq.networks.teacher_loading import load_teacher, load_teachers
from dq.networks.train_teachers import train_teachers


def config(folder: Path, **changes) -> RunConfig:
    teachers = TrainTeachersConfig(output_dir=str(folder / "teachers"), nets=("convnet3",), epochs=12, batch_size=8)
    teachers = dataclasses.replace(teachers, **{"lr": 0.02, "checkpoint_s": 1e-9, **changes})
    source = SourceConfig(image_size=8)
    return RunConfig(cache_dir=str(folder / "cache"), source=source, train_teachers=teachers)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, toy_source, accelerator) -> Path:
    root = tmp_path_factory.mktemp("taught")
    (folder,) = train_teachers(config(root), toy_source, accelerator=accelerator)
    assert folder == root / "teachers" / "convnet3"
    return root


def test_a_teacher_is_written_with_what_it_needs(taught, toy_source, toy_images) -> None:
    folder = taught / "teachers" / "convnet3"
    assert sorted(f.name for f in folder.iterdir()) == ["model.safetensors", "teacher.json"]
    facts = read_json(folder / "teacher.json")
    assert (facts["net"], facts["classes"], facts["image_size"]) == ("convnet3", ["red", "green", "blue"], 8)
    assert facts["recipe"]["epochs"] == 12
    assert facts["source"]["fingerprint"] == toy_source.fingerprint
    x = (toy_images["train"][0] * 255).round() / 255
    assert facts["mean"] == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-3)
    assert facts["std"] == pytest.approx(x.std((0, 2, 3)).tolist(), abs=1e-3)
    # a fifth of each class at most: one of 9, 8 and 7
    assert facts["validation_images"] == len(validation_rows(toy_source.train.labels, 1000)) == 3
    assert facts["validation_accuracy"] == 1  # the classes differ in color


def test_it_loads_with_its_own_normalization(taught, toy_source, toy_images) -> None:
    folder = taught / "teachers" / "convnet3"
    facts = read_json(folder / "teacher.json")
    for path in (folder, folder / "model.safetensors"):
        teacher_config = TeacherConfig(net="convnet3", path=str(path))
        teacher = load_teacher(teacher_config, 3, 8)
        assert (list(teacher.mean), list(teacher.std)) == (facts["mean"], facts["std"])
        assert check_teacher(teacher, toy_source, teacher_config, 8) == 1
        images, labels = toy_images["test"]
        assert (teacher.logits(images).argmax(1) == labels).all()
    other = load_teacher(dataclasses.replace(teacher_config, mean=(0.1,) * 3), 3, 8)
    assert (other.mean, list(other.std)) == ((0.1,) * 3, facts["std"])
    with pytest.raises(InputError, match=r"convnet3; set teachers\.N\.net"):
        load_teacher(TeacherConfig(net="resnet20", path=str(folder)), 3, 8)


def test_a_teacher_is_checked_and_logged_once_per_process_and_read_from_the_cache_later(
    taught, toy_source, tmp_path, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(teacher_check, "_ACCURACIES", {})
    path, cpu, cache = str(taught / "teachers" / "convnet3"), torch.device("cpu"), tmp_path / "cache"
    configs = [TeacherConfig(net="convnet3", path=path)]
    caplog.set_level("INFO", logger="dq")
    for _ in range(3):
        load_teachers(configs, toy_source, 8, cpu, cache_dir=cache)
    assert [r.getMessage() for r in caplog.records] == ["teacher convnet3: 100.0 % of 500 real images"]

    def unreadable(row: int) -> bytes:
        raise OSError("gone")

    gone = {name: dataclasses.replace(split, read=unreadable) for name, split in toy_source.splits.items()}
    source = dataclasses.replace(toy_source, splits=gone)
    monkeypatch.setattr(teacher_check, "_ACCURACIES", {})  # as in another process
    load_teachers(configs, source, 8, cpu, cache_dir=cache)
    for other in ({"check_images": 9}, {"mean": (0.1,) * 3}):  # which was not checked
        with pytest.raises((InputError, OSError), match=r"gone|can be read"):
            load_teachers([dataclasses.replace(configs[0], **other)], source, 8, cpu, cache_dir=cache)


def test_a_second_call_does_nothing(taught, toy_source, accelerator, monkeypatch) -> None:
    files = sorted((taught / "teachers").rglob("*.*"))
    before = [(f, f.stat().st_mtime_ns) for f in files]
    monkeypatch.setattr("dq.networks.train_teachers.fit", lambda *args, **options: pytest.fail("trained again"))
    assert train_teachers(config(taught), toy_source, accelerator=accelerator) == [taught / "teachers" / "convnet3"]
    assert [(f, f.stat().st_mtime_ns) for f in sorted((taught / "teachers").rglob("*.*"))] == before


@pytest.mark.parametrize("changes", [{"epochs": 13}, {"lr": 0.03}, {"seed": 1}, {"batch_size": 9}])
def test_other_settings_need_another_folder(taught, toy_source, accelerator, changes) -> None:
    with pytest.raises(RunError, match=r"convnet3 .*other settings or data"):
        train_teachers(config(taught, **changes), toy_source, accelerator=accelerator)


def test_how_often_it_is_saved_is_no_such_setting(taught, toy_source, accelerator) -> None:
    assert train_teachers(config(taught, checkpoint_s=60.0), toy_source, accelerator=accelerator)


def test_other_data_need_another_folder(taught, toy_images, accelerator) -> None:
    from dq.data.load import load_source

    images, labels = toy_images["train"]
    data = {**toy_images, "train": (images, labels.roll(1))}
    source = load_source(data, class_names=["red", "green", "blue"])
    with pytest.raises(RunError, match="other settings or data"):
        train_teachers(config(taught), source, accelerator=accelerator)


def test_the_test_split_is_not_touched(taught, toy_images, toy_source, accelerator, tmp_path) -> None:
    from dq.data.load import load_source

    images, labels = toy_images["test"]
    data = {**toy_images, "test": (1 - images, labels.roll(1))}
    source = load_source(data, class_names=["red", "green", "blue"])
    (folder,) = train_teachers(config(tmp_path), source, accelerator=accelerator)
    same = taught / "teachers" / "convnet3"
    assert (folder / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()


def test_a_killed_training_goes_on_and_gives_the_same_bytes(
    taught, toy_source, accelerator, tmp_path, monkeypatch
) -> None:
    apply_steps = train.apply_steps
    calls = 0

    def killed(*args) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:  # 21 images in batches of 8: in the seventh epoch
            raise KeyboardInterrupt
        return apply_steps(*args)

    monkeypatch.setattr(train, "apply_steps", killed)
    with pytest.raises(KeyboardInterrupt):
        train_teachers(config(tmp_path), toy_source, accelerator=accelerator)
    folder = tmp_path / "teachers" / "convnet3"
    assert sorted(f.name for f in folder.iterdir()) == [".dtypes.json", "checkpoint.safetensors"]
    assert read_tensors(folder / "checkpoint.safetensors")[1]["epoch"] == 6
    train_teachers(config(tmp_path), toy_source, accelerator=accelerator)
    assert calls == 20 + 6 * 3
    same = taught / "teachers" / "convnet3"
    assert (folder / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    assert not (folder / "checkpoint.safetensors").exists()


def test_a_network_that_cannot_see_the_images_is_named_before_training(toy_source, accelerator, tmp_path) -> None:
    with pytest.raises(InputError, match="resnet18"):
        train_teachers(config(tmp_path, nets=("convnet3", "resnet18")), toy_source, accelerator=accelerator)
    assert not (tmp_path / "teachers").exists()
