"""PNG files of a set by class: what is written is what the set holds."""

import csv
import logging

import pytest
import torch

from dq import DistilledSet, load_set
from dq.cli.main import main
from dq.core.errors import InputError


def a_set(names=("cat", "dog"), ipc=3, floats=False):
    generator = torch.Generator().manual_seed(0)
    n = ipc * len(names)
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(len(names)).repeat_interleave(ipc)
    ranks = torch.arange(ipc).repeat(len(names))
    return DistilledSet(
        images=images.float() / 255 if floats else images,
        labels=labels,
        weights=torch.linspace(0.5, 1.5, n),
        class_names=tuple(names),
        prototype=ranks,
        counts=torch.ones(n, dtype=torch.long),
        source_row=torch.arange(n),
    )


@pytest.mark.parametrize("floats", [False, True])
def test_exported_images_are_those_of_the_set(tmp_path, floats):
    distilled = a_set(floats=floats)
    again = load_set(distilled.save_images(tmp_path / "png"))
    assert again.class_names == ("cat", "dog")
    assert torch.equal(again.images, distilled.images_uint8())
    assert torch.equal(again.labels, distilled.labels)
    rows = list(csv.DictReader((tmp_path / "png" / "weights.csv").open()))
    assert [float(r["weight"]) for r in rows] == pytest.approx(distilled.weights.tolist(), rel=1e-5)
    assert [r["file"] for r in rows[:4]] == ["cat/0000.png", "cat/0001.png", "cat/0002.png", "dog/0000.png"]


@pytest.mark.parametrize("names", [("T-shirt/top", "Bag"), ("Bag", "bag"), ("..", "a"), ("a", "b\n")])
def test_names_that_are_no_folders_become_numbers(tmp_path, names, caplog):
    distilled = a_set(names)
    with caplog.at_level(logging.INFO, "dq"):
        folder = distilled.save_images(tmp_path / "png")
    assert sorted(p.name for p in folder.iterdir()) == ["0", "1", "weights.csv"]
    assert "numbers" in caplog.text
    assert torch.equal(load_set(folder, names).images, distilled.images)


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="holds something"):
        a_set().save_images(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_exports_one_set_of_several(tmp_path, capsys):
    for name, ipc in (("ipc2-a", 2), ("ipc3-b", 3)):
        a_set(ipc=ipc).save(tmp_path / "sets", name)
    assert main(["export", str(tmp_path / "sets"), "--output_dir", str(tmp_path / "png"), "--name", "ipc3-b"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "png")
    assert len(list((tmp_path / "png").glob("*/*.png"))) == 6
    assert main(["export", str(tmp_path / "sets"), "--output_dir", str(tmp_path / "other")]) == 2
    assert "ipc2-a" in capsys.readouterr().err
