"""Scripts of examples/ and the Python of the README run as they stand, without network."""

import re
import runpy
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dq.config.refinement import STAGES
from dq.distilled.external import load_set
from dq.refine.registry import METHODS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = {p.stem: p for p in sorted((ROOT / "examples").glob("*.py"))}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog", "eel")):
        (folder / name).mkdir()
        for i in range(8):
            pixels = rng.integers(80 * label, 80 * label + 90, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run an example in an empty folder, as `python examples/NAME.py ARGUMENTS` does."""
    monkeypatch.chdir(tmp_path)

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES[name]), *map(str, arguments)])
        runpy.run_path(str(EXAMPLES[name]), run_name="__main__")

    return call


def test_every_example_is_short_and_run_here():
    source = Path(__file__).read_text()
    assert EXAMPLES
    for name, path in EXAMPLES.items():
        assert len(path.read_text().splitlines()) < 90, name
        assert f'run("{name}"' in source, name


def test_a_folder_is_distilled_trained_on_and_scored(run, photos, tmp_path, capsys):
    run("distill_a_folder", photos, "set", "--ipc", 2)
    made = load_set(tmp_path / "set" / "run")
    assert torch.equal(load_set(tmp_path / "set" / "png").images, made.images)
    capsys.readouterr()
    run("train_on_a_set", "set/run", photos, "--epochs", 30)
    accuracy, images = re.search(r"([\d.]+) % of (\d+) test", capsys.readouterr().out).groups()
    assert float(accuracy) > 60  # brightness tells the classes; chance is 33
    assert images == "3"
    run("score_a_set", "set/png", photos, "--epochs", 2, "--seeds", 1, "--out", "scores")
    rows = (tmp_path / "scores" / "scores.csv").read_text()
    assert "random" in rows
    assert "nearest" in rows


def test_a_prior_draws_a_sheet(run, tmp_path):
    run("draw_from_a_prior", "sheet.png", "--steps", 2, "--per_class", 2, "--classes", 0, 8, 9)
    image = Image.open(tmp_path / "sheet.png")
    assert image.size == (64, 96)
    assert np.asarray(image).std() > 10


def test_selections_are_saved_and_scored(run, photos, tmp_path, capsys):
    run("compare_selections", photos, "--ipc", 1, "--rules", "random", "herding", "--seeds", 1, "--epochs", 1)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["random", "herding"]
    assert len(load_set(tmp_path / "runs" / "example-selections" / "sets", name="ipc1-herding")) == 3


def test_a_method_of_its_own_changes_the_images(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("dq.refine.registry.METHODS", METHODS)
    monkeypatch.setitem(METHODS, "sharpen", None)  # removed again after the test
    monkeypatch.setitem(STAGES, "sharpen", None)
    del STAGES["sharpen"]
    run("distill_a_folder", photos, "plain", "--ipc", 2, "--image_size", 16)
    run("add_a_method", photos, "--ipc", 2)
    sharp = load_set(tmp_path / "runs" / "example-method" / "run")
    assert len(sharp) == 6
    before = load_set(tmp_path / "plain" / "run").images.float().std((2, 3)).mean()
    assert sharp.images.float().std((2, 3)).mean() > 1.1 * before


def test_the_code_of_the_page_on_methods_is_that_of_the_example():
    page = (ROOT / "docs" / "how-to" / "add-a-method.md").read_text()
    example = (ROOT / "examples" / "add_a_method.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 4
    for block in blocks:
        assert block in example or textwrap.indent(block, "    ") in example


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    exec(compile(code.replace("epochs=100", "epochs=1"), "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "random" in out
    assert load_set(tmp_path / "runs" / "digits").class_names == tuple("0123456789")
