"""HTML pages of templates, with every value escaped."""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dq.core.files import write_text

Table = tuple[list[str], Sequence[Sequence[object]]]  # head and rows


@functools.cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dq.run"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    return environment


def write_page(page: Path, template: str, *, title: str, **content: object) -> Path:
    """Write a self-contained HTML page of a template in `dq/run/templates`; returns its path."""
    write_text(page, _environment().get_template(template).render(title=title, **content))
    return page
