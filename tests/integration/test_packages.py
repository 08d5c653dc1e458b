"""What is released: wheel and source archive in an empty environment, types for clients, citation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SMOKE = """
import sys
from pathlib import Path
import dq
assert Path(dq.__file__).is_relative_to(sys.prefix), dq.__file__
from dq.cli.main import main
for call in (["ls"], ["config", "cluster.n_iter"], ["cp", "demo", "demo.yaml"], ["validate", "demo.yaml"]):
    assert main(call) == 0, call
assert main(["validate", "nowhere.yaml"]) == 2
from dq.run.pages import write_page
page = write_page(Path("page.html"), "results.html", title="t", verdict="v", accuracy={}, dd_ranking=None)
assert "<style>" in page.read_text() and "showModal" in page.read_text()
from dq.core.cards import template
assert template("dq.distilled", "dataset_card.md").filename.startswith(sys.prefix)
from dq.core.errors import InputError
try:
    dq.DistillPipeline.from_pretrained("checkpoints/cifar10")
except InputError as e:
    print(f"absent: {e}")
"""


def copied_tree(folder: Path) -> Path:
    """The tracked files of the repository, and those that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if name.startswith(("dq/", "README", "LICENSE", "pyproject", "CITATION")) and (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    return folder


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a "wheel" or an "sdist" with the installed setuptools, without a network."""
    target.mkdir(exist_ok=True)
    code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return target / done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment_and_so_does_that_of_the_archive(tmp_path: Path) -> None:
    tree = copied_tree(tmp_path / "tree")
    archive = build("sdist", tree, tmp_path / "built")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheels = [build("wheel", tree, tmp_path / "built"), build("wheel", unpacked, tmp_path / "again")]
    contents = [sorted(zipfile.ZipFile(w).namelist()) for w in wheels]
    assert contents[0] == contents[1]
    assert {"dq/py.typed", "dq/__init__.pyi", "dq/run/templates/style.css"} <= set(contents[0])
    # an environment that has the dependencies and no dq
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True, timeout=120)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    shared = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "shared.pth").write_text(f"{shared}\n")
    with zipfile.ZipFile(wheels[1]) as wheel:
        wheel.extractall(site)
    empty = tmp_path / "empty"
    empty.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    python = tmp_path / "env" / "bin" / "python"
    done = subprocess.run([python, "-c", SMOKE], cwd=empty, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    (absent,) = [line for line in done.stdout.splitlines() if line.startswith("absent: ")]
    assert "checkpoints/cifar10" in absent


@pytest.mark.slow
@pytest.mark.timeout(900)  # without a cache mypy reads torch first
def test_a_typed_client_is_checked_against_the_types_of_the_package() -> None:
    client = ROOT / "tests" / "helpers" / "typed_client.py"
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(client)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout + done.stderr
    assert 'Incompatible return value type (got "int", expected "str")' in errors[0]


def test_the_citation_names_the_package_and_its_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"]
    assert citation["message"]
    papers = [i["value"].removeprefix("arXiv:") for r in citation["references"] for i in r["identifiers"]]
    assert len(papers) == 2
    assert all(paper in (ROOT / "README.md").read_text() for paper in papers)
