"""Pages of templates: escaped values, contents of tables and figures, files in the package."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

import jinja2
import pytest
from page_check import Page, checked_page
from PIL import Image

from dq.run.pages import write_page

HOSTILE = "<script>alert('x')</script> & \"quoted\""


def results(folder: Path, **content: Any) -> str:
    content = {"title": "t", "verdict": "", "accuracy": {}, "dd_ranking": None, **content}
    return write_page(folder / "page.html", "results.html", **content).read_text()


def accuracy(**content: Any) -> dict[str, Any]:
    parts = {"outdated": "", "panels": [], "table": None, "same": "", "figures": [], "differences": None}
    return {**parts, "protocols": [], **content}


def test_every_value_is_escaped(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a<b>.png")
    table = ([HOSTILE, "b"], [[HOSTILE, 1], [None, 0.5]])
    content = accuracy(outdated=HOSTILE, table=table, same=HOSTILE, figures=[tmp_path / "a<b>.png"])
    page = results(tmp_path, title=HOSTILE, verdict=HOSTILE, accuracy=content, dd_ranking=([HOSTILE], [[HOSTILE]]))
    read = checked_page(page)
    assert read.tags.count("script") == 1  # that of the page
    assert read.tags.count("table") == 2
    assert [text for tag, text in read.cells if tag == "td"] == ["1", "0.5"]
    assert [text for tag, text in read.cells if tag == "th"] == [HOSTILE, "b", HOSTILE, "None", HOSTILE, HOSTILE]
    assert f"dq: {HOSTILE}" in html.unescape(page)
    png = base64.b64encode((tmp_path / "a<b>.png").read_bytes()).decode()
    assert f'<img alt="a&lt;b&gt;" src="data:image/png;base64,{png}">' in page


def test_a_part_without_content_has_no_heading(tmp_path: Path) -> None:
    assert checked_page(results(tmp_path)).headings == [(1, "Results of t")]
    page = checked_page(results(tmp_path, dd_ranking=(["a"], [["b"]])))
    assert page.headings == [(1, "Results of t"), (2, "DD-Ranking")]


def test_a_value_that_a_template_misses_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(jinja2.UndefinedError, match="'verdict' is undefined"):
        write_page(tmp_path / "page.html", "results.html", title="t")
    assert not list(tmp_path.iterdir())


WRONG = {
    "<p>a<div>b</div></p>": "<div> within <p>",
    '<p id="a">x</p><p id="a">y</p>': "id 'a' twice",
    '<img src="data:,">': "an image without alt",
    '<img alt="" src="https://example.org/x.png">': "<img> loads 'https://example.org/x.png'",
    '<a href="#b">c</a>': "link to #b, which is nowhere",
    "<h3>deep</h3>": "h3 after h1",
    "<p>open": "</main> closes p",
    "<table><tr><td>1</td></tr></table>": "<tr> within <table>",
    "<table><tbody><tr><th>1</th></tr></tbody></table>": "a table header without scope",
    '<input type="checkbox">': "an input without a label",
    "<style>a{background:url(x.png)}</style>": "a style that loads something",
}


@pytest.mark.parametrize(("part", "error"), WRONG.items())
def test_the_check_of_pages_finds_what_is_wrong(part: str, error: str) -> None:
    shell = '<!doctype html><html lang="en"><head><title>t</title></head><body><main><h1>t</h1>{}</main></body></html>'
    checked_page(shell.format("<p>a</p>"))
    assert error in Page(shell.format(part)).errors
