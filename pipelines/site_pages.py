"""Pages of the site that are made from the code: hooks of `mkdocs build`, which `make docs` calls.

The home page is the README; command line, settings, protocols and Python names are those of the package.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from dq.cli.parser import build_parser
from dq.config.protocols import list_protocols
from dq.config.reference import reference
from dq.config.schema import PRESETS_FOLDER
from dq.core.text import markdown_table

ROOT = Path(__file__).parents[1]
REPOSITORY_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CITATION.cff": "CITATION.cff",
}
# links of Markdown to files of the repository, from the root or from docs/
LINK = re.compile(
    r"\]\((?:\.\./)*((?:results|examples|configs)/[^)#]*|examples|CHANGELOG\.md|CITATION\.cff|CONTRIBUTING\.md)\)"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the pictures of results."""
    pages = {
        "index.md": (ROOT / "README.md").read_text(),
        **{page: (ROOT / name).read_text() for name, page in REPOSITORY_PAGES.items() if name.endswith(".md")},
        "examples.md": "\n".join(_examples()),
        "reference/cli.md": "\n".join(_command_line()),
        "reference/settings.md": "\n".join(_settings()),
        "reference/protocols.md": "\n".join(_protocols()),
        "reference/python.md": "\n".join(_python()),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text.replace("](docs/", "](")))
    files.append(File.generated(config, "CITATION.cff", abs_src_path=str(ROOT / "CITATION.cff")))
    for picture in sorted((ROOT / "results").rglob("*")):
        if picture.suffix in (".png", ".jpg", ".webp"):
            path = picture.relative_to(ROOT).as_posix()
            files.append(File.generated(config, path, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to pages and pictures of the site."""
    folder = str(Path(page.file.src_uri).parent)

    def link(match: re.Match[str]) -> str:
        target = match[1].rstrip("/")
        if target.startswith("examples"):
            name = Path(target).stem.replace("_", "-") if "/" in target else ""
            return f"]({relpath('examples.md', folder)}{f'#{name}' if name else ''})"
        if target in REPOSITORY_PAGES:
            return f"]({relpath(REPOSITORY_PAGES[target], folder)})"
        return f"]({relpath(target, folder)})"

    return LINK.sub(link, markdown)


def _examples() -> Iterator[str]:
    yield "# Examples"
    yield "\nScripts of `examples/`; tests run them.\n"
    for path in sorted((ROOT / "examples").glob("*.py")):
        yield f"## {path.stem.replace('_', ' ').capitalize()}\n"
        yield f"`{path.relative_to(ROOT)}`\n\n```python\n{path.read_text().rstrip()}\n```\n"


def _command_line() -> Iterator[str]:
    yield "# Command line\n\nWhat `dq VERB --help` prints."
    parser = build_parser()
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, verb in verbs.choices.items():
        yield f"\n## dq {name}\n\n```text\n{verb.format_help().rstrip()}\n```"


def _settings() -> Iterator[str]:
    yield "# All settings\n\nWhat `dq config` prints; `dq config KEY` explains one. N stands for a number from 0.\n"
    sections: dict[str, list[list[str]]] = {}
    for row in reference():
        key = f"`{row.key}`" + (f" ({row.stage})" if row.stage else "")
        kind = ", ".join(filter(None, (row.type, row.bound)))
        cells = [key, _cell(kind), f"`{_cell(row.default)}`", _cell(row.help)]
        sections.setdefault(row.key.partition(".")[0] if "." in row.key else "run", []).append(cells)
    for section, rows in sections.items():
        yield f"## {section}\n\n{markdown_table(['setting', 'type', 'default', 'meaning'], rows, left=4)}\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _protocols() -> Iterator[str]:
    yield "# Protocols\n\nRecipes of students by name (`--protocol NAME`), as files that `dq cp NAME FILE` copies.\n"
    for name, about in list_protocols().items():
        yield f"## {name}\n\n{about}\n"
        path = PRESETS_FOLDER / "protocols" / f"{name}.yaml"
        if path.is_file():
            yield f"```yaml\n{path.read_text().rstrip()}\n```\n"


def _python() -> Iterator[str]:
    yield "# Python\n\nThe public names, `from dq import NAME`.\n"
    stub = (ROOT / "dq" / "__init__.pyi").read_text()
    for module, name in sorted(re.findall(r"from \.([\w.]+) import (\w+) as", stub), key=lambda pair: pair[1].lower()):
        yield f"::: dq.{module}.{name}\n"


if __name__ == "__main__":
    raise SystemExit("site_pages is a module of `make docs`; run that")
