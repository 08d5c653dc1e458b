"""Pages of templates: escaped values, contents of tables and figures, files in the package."""

from __future__ import annotations

import base64
import html
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pytest
from PIL import Image

from dq.run.pages import write_page

HOSTILE = "<script>alert('x')</script> & \"quoted\""


class Reader(HTMLParser):
    """Names of elements and the text of cells of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self.tags[-1], data))


def results(folder: Path, **content: Any) -> str:
    content = {"title": "t", "accuracy": {}, "dd_ranking": None, **content}
    return write_page(folder / "page.html", "results.html", **content).read_text()


def test_every_value_is_escaped(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a<b>.png")
    accuracy = {
        "outdated": HOSTILE,
        "table": ([HOSTILE, "b"], [[HOSTILE, 1], [None, 0.5]]),
        "figures": [tmp_path / "a<b>.png"],
        "differences": None,
    }
    page = results(tmp_path, title=HOSTILE, accuracy=accuracy, dd_ranking=([HOSTILE], [[HOSTILE]]))
    read = Reader(page)
    assert "script" not in read.tags
    assert read.tags.count("table") == 2
    assert [text for tag, text in read.text if tag == "td"] == [HOSTILE, "1", "None", "0.5", HOSTILE]
    assert [text for tag, text in read.text if tag == "th"] == [HOSTILE, "b", HOSTILE]
    assert f"dq: {HOSTILE}" in html.unescape(page)
    png = base64.b64encode((tmp_path / "a<b>.png").read_bytes()).decode()
    assert f'<img alt="a&lt;b&gt;" src="data:image/png;base64,{png}">' in page


def test_a_part_without_content_has_no_heading(tmp_path: Path) -> None:
    page = results(tmp_path)
    assert "<h1>Results</h1>" in page
    assert "<h2>" not in page
    page = results(tmp_path, dd_ranking=(["a"], [["b"]]))
    assert "<h2>DD-Ranking</h2>" in page
    assert "<h2>Accuracy</h2>" not in page


def test_a_value_that_a_template_misses_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(jinja2.UndefinedError, match="'accuracy' is undefined"):
        write_page(tmp_path / "page.html", "results.html", title="t")
    assert not list(tmp_path.iterdir())
