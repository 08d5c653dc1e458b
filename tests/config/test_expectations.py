"""Configurations that come with the package and parts of them in the documentation say what is so."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import get_args

import pytest

from dq.config.methods import resolved_method
from dq.config.schema import PRESETS_FOLDER, load_config
from dq.config.students import Baseline

ROOT = Path(__file__).parents[2]
FILES = sorted(PRESETS_FOLDER.glob("*.yaml"))
EXPECT = re.compile(r"# expect: (?P<file>results/\S+\.csv): (?P<row>.+): (?P<number>[\d.]+( ± [\d.]+)? %)")
NAMES = {"demo": "digits_demo"}  # of folders that are called otherwise than their configuration


def head(file: Path) -> list[str]:
    """Lines of the comment at the head of a file."""
    lines = file.read_text().splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def cells_of(text: str, columns: list[str]) -> tuple[dict[str, str], str]:
    """Values by column of a row such as "SET / STUDENT, LABELS, IPC N" or "NAME / COLUMN", and its number's column."""
    name, _, rest = text.partition(" / ")
    if rest in columns:
        return {columns[0]: name}, rest
    values = dict(zip(("student", "labels", "ipc"), rest.replace("IPC ", "").split(", "), strict=True))
    return {columns[0]: name, **values}, "last_mean" if "last_mean" in columns else "mean"


def number(row: dict[str, str], column: str) -> str:
    std = row.get(column.replace("mean", "std")) if "mean" in column else ""
    return f"{100 * float(row[column]):.1f}{f' ± {100 * float(std):.1f}' if std else ''} %"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_number_to_expect_stands_in_the_file_that_is_named(file: Path) -> None:
    lines = [line for line in head(file) if line.startswith("# expect:")]
    results = ROOT / "results" / NAMES.get(file.stem, file.stem) / "accuracy.csv"
    if lines == ["# expect: not measured"]:
        assert not results.is_file(), f"{results} has been measured"
        return
    assert lines, "the comment says nothing of what to expect"
    for line in lines:
        matched = EXPECT.fullmatch(line)
        assert matched, line
        with open(ROOT / matched["file"], newline="") as f:
            rows = list(csv.DictReader(text for text in f if not text.startswith("#")))
        cells, column = cells_of(matched["row"], list(rows[0]))
        wanted = [r for r in rows if cells.items() <= r.items()]
        assert [number(r, column) for r in wanted] == [matched["number"]], line


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_head_says_what_the_file_does_before_what_to_expect(file: Path) -> None:
    lines = head(file)
    assert len(lines[0]) > 20
    assert lines[-1].startswith("# expect:")
    config = load_config(file)
    sets = {*config.methods, *get_args(Baseline)}
    for line in lines:
        if matched := re.match(r"# expect: results/\S+/accuracy\.csv: (\S+) / ", line):
            assert matched[1] in sets or file.stem == "cifar10_refine", line  # whose sets its pipeline makes


def blocks_of_settings() -> list[tuple[str, str]]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    by_page = [(page, re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)) for page in pages]
    return [(f"{page.stem}-{i}", block) for page, blocks in by_page for i, block in enumerate(blocks)]


@pytest.mark.parametrize(("name", "block"), blocks_of_settings(), ids=[name for name, _ in blocks_of_settings()])
def test_settings_in_pages_are_settings(name: str, block: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.yaml"
    file.write_text(block)
    config = load_config(file)
    for method in config.methods:
        resolved_method(config, method)
