from __future__ import annotations

from pathlib import Path

import pytest

from dq.core.text import markdown_table, nearest_name, plural, similar_names

ROOT = Path(__file__).parents[2]


def cells(line: str) -> list[str]:
    return line.removeprefix("| ").removesuffix(" |").split(" | ")


@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_table_has_its_cells_and_alignments(left: int) -> None:
    head, rows = ["set", "a", "b"], [["x", 1, 2.5], ["y", None, "3 %"]]
    lines = markdown_table(head, rows, left=left).splitlines()
    assert [cells(line) for line in (lines[0], *lines[2:])] == [[str(c) for c in row] for row in (head, *rows)]
    assert lines[1].split() == ["|", *[x for i in range(3) for x in ("---" if i < left else "---:", "|")]]


@pytest.mark.parametrize(
    ("n", "noun", "text"),
    [
        (1, "epoch", "1 epoch"),
        (2, "epoch", "2 epochs"),
        (0, "set", "0 sets"),
        (2, "batch", "2 batches"),
        (3, "class", "3 classes"),
    ],
)
def test_a_noun_agrees_with_its_number(n: int, noun: str, text: str) -> None:
    assert plural(n, noun) == text


def test_a_cell_with_a_bar_is_one_cell() -> None:
    line = markdown_table(["a", "b"], [["x|y", "z"]]).splitlines()[2]
    assert line == "| x\\|y | z |"


def test_tables_are_written_by_one_function() -> None:
    places = [f for folder in ("dq", "pipelines") for f in (ROOT / folder).rglob("*.py") if '"---:"' in f.read_text()]
    assert places == [ROOT / "dq" / "core" / "text.py"]


def test_similar_names_come_with_the_nearest_first() -> None:
    names = ["cifar10_ddoq", "cifar10_labels", "demo"]
    assert nearest_name("cifar10_ddog", names) == "cifar10_ddoq"
    assert nearest_name("cifar10_ddog", names, cutoff=0.99) is None
    assert similar_names("cifar10_ddog", names, count=3) == ["cifar10_ddoq", "cifar10_labels"]


def test_similar_names_are_looked_up_by_one_function() -> None:
    places = [f for f in (ROOT / "dq").rglob("*.py") if "get_close_matches" in f.read_text()]
    assert [f.name for f in places] == ["text.py"]
