"""A check of HTML pages: balance, ids, headings, texts for screen readers, nothing loaded from elsewhere."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

VOID = {"area", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
SVG_SHAPES = {"rect", "path", "circle", "line"}
PHRASING_ONLY = {"p", "h1", "h2", "h3", "h4", "summary", "button", "span", "figcaption", "code"}
BLOCKS = {"p", "div", "table", "ul", "ol", "pre", "figure", "details", "section", "h1", "h2", "h3", "form", "dialog"}
PARENTS = {
    "tr": {"thead", "tbody", "tfoot"},
    "td": {"tr"},
    "th": {"tr"},
    "thead": {"table"},
    "tbody": {"table"},
    "caption": {"table"},
    "summary": {"details"},
    "figcaption": {"figure"},
    "main": {"body"},
    "li": {"ul", "ol"},
}


class Page(HTMLParser):
    """Elements of a page with their texts, and what is wrong with them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.errors: list[str] = []
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self.cells: list[tuple[str, str]] = []  # th or td, text
        self.text: list[str] = []
        self.codes: list[str] = []  # of <pre>
        self.alts: list[str] = []
        self.links: list[str] = []
        self._fragments: list[list[str]] = []
        if not text.lower().startswith("<!doctype html>"):
            self.errors.append("no doctype")
        self.feed(text)
        self.close()
        self.errors += [f"<{tag}> is never closed" for tag, _ in self.open]
        self.errors += [f"id {i!r} twice" for i in sorted({i for i in self.ids if self.ids.count(i) > 1})]
        self.errors += [f"link to #{x}, which is nowhere" for x in self.links if x not in self.ids]
        self._check_headings()
        for tag in ("html", "head", "title", "body", "main"):
            if self.tags.count(tag) != 1:
                self.errors.append(f"{self.tags.count(tag)} <{tag}>")

    def _check_headings(self) -> None:
        levels = [level for level, _ in self.headings]
        if levels.count(1) != 1 or (levels and levels[0] != 1):
            self.errors.append(f"headings {levels} do not begin with a single h1")
        self.errors += [f"h{b} after h{a}" for a, b in itertools.pairwise(levels) if b > a + 1]
        self.errors += [f"an empty h{level}" for level, text in self.headings if not text.strip()]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        names = [name for name, _ in attrs]
        self.tags.append(tag)
        self.errors += [f"<{tag}> has {n} twice" for n in sorted({n for n in names if names.count(n) > 1})]
        parent = self.open[-1][0] if self.open else None
        if tag in PARENTS and parent not in PARENTS[tag]:
            self.errors.append(f"<{tag}> within <{parent}>")
        if parent in PHRASING_ONLY and tag in BLOCKS:
            self.errors.append(f"<{tag}> within <{parent}>")
        if "id" in given:
            self.ids.append(str(given["id"]))
        if tag == "img":
            if given.get("alt") is None:
                self.errors.append("an image without alt")
            self.alts.append(given.get("alt") or "")
        if tag == "html" and not given.get("lang"):
            self.errors.append("no language")
        if tag == "th" and not given.get("scope"):
            self.errors.append("a table header without scope")
        if tag == "svg" and given.get("aria-hidden") != "true" and not given.get("aria-label"):
            self.errors.append("an svg that is neither hidden nor named")
        if tag == "input" and not any(t == "label" for t, _ in self.open):
            self.errors.append("an input without a label")
        if given.get("role") == "region" and not given.get("aria-label"):
            self.errors.append("a region without a name")
        for name in ("src", "href"):
            value = given.get(name) or ""
            if value.startswith("#"):
                self.links.append(value[1:])
            elif name in given and not value.startswith("data:"):
                self.errors.append(f"<{tag}> loads {value[:60]!r}")
        if tag in ("link", "iframe", "object", "base"):
            self.errors.append(f"<{tag}>")
        if tag not in VOID:
            self.open.append((tag, given))
            self._fragments.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            if tag not in SVG_SHAPES:
                self.errors.append(f"<{tag}/> closes nothing in HTML")
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1][0] != tag:
            self.errors.append(f"</{tag}> closes {self.open[-1][0] if self.open else 'nothing'}")
            return
        _, given = self.open.pop()
        text = "".join(self._fragments.pop())
        if self._fragments:
            self._fragments[-1].append(text)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), text))
        if tag in ("td", "th"):
            self.cells.append((tag, text))
        if tag == "pre":
            self.codes.append(text)
        if tag == "button" and not text.strip() and not given.get("aria-label") and not self.alts:
            self.errors.append("a button without a name")
        if tag == "style" and re.search(r"@import|url\((?!data:)", text):
            self.errors.append("a style that loads something")
        if tag == "script" and re.search(r"fetch\(|XMLHttpRequest|import\(|https?:", text):
            self.errors.append("a script that loads something")

    def handle_data(self, data: str) -> None:
        if self._fragments:
            self._fragments[-1].append(data)
        if self.open and self.open[-1][0] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        """All text of the page with single spaces."""
        return " ".join(" ".join(self.text).split())


def checked_page(text: str) -> Page:
    """Read a page, which has to be valid."""
    page = Page(text)
    assert page.errors == []
    return page
