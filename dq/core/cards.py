"""Text of cards: head and marks, what may leave the machine, Markdown."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from dq.core.bounded_yaml import read_yaml
from dq.core.errors import InputError
from dq.core.plain import PlainDict, PlainMapping
from dq.core.text import first_line
from dq.core.version import __version__

log = logging.getLogger("dq")
BEGIN = "<!-- dq: generated from here to the end mark, and replaced by the next push -->"
END = "<!-- dq: end -->"
LICENSE = ("license", "license_name", "license_link")
UNKNOWN = "unknown"  # a license that nobody stated, by the Hub's own name
# Names of classes and texts of prompts are no paths, whatever they look like
NO_PATHS = ("classes", "id2label", "class_map", "prompt", "negative_prompt", "train_counts")
# Under these keys a relative path is one too
PATHS = (
    "path",
    "model",
    "origin",
    "output_dir",
    "cache_dir",
    "anchor_path",
    "init",
    "_name_or_path",
    "name",
    "revision",
)
ABSOLUTE = re.compile(r"(?<![\w:/.<])(?:~|[A-Za-z]:)?[/\\][^\s\"'`,;:()|<>]*[/\\][^\s\"'`,;:()|<>]*")


def public(value: object, key: str = "") -> Any:
    """Copy plain data with every path on this machine reduced to its last part.

    Hub ids stay.
    """
    if isinstance(value, dict):
        return {k: v if k in NO_PATHS else public(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(v, key) for v in value]
    if not isinstance(value, str):
        return value
    if re.match(r"[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]", value):
        return _last(value)
    if key in PATHS and "/" in value and "://" not in value and (value.count("/") > 1 or Path(value).exists()):
        return _last(value)
    return ABSOLUTE.sub(lambda match: _last(match[0]), value)


def _last(path: str) -> str:
    return PureWindowsPath(path).name or "folder"  # knows either slash


def is_hub_id(text: str) -> bool:
    """Whether text that came from `public` could be the id of a repository."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text))


def md(text: object) -> str:
    """Text as it is, in Markdown, tables and HTML."""
    one_line = " ".join(str(text).split())
    escaped = re.sub(r"[\\`*\[\]<>|&~$#@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", lambda c: f"&#{ord(c[0])};", one_line)
    return re.sub(r"://|www\.", lambda m: m[0].replace(":", "&#58;").replace(".", "&#46;"), escaped)


def plain_json(value: object) -> str:
    """Indented JSON that holds no HTML."""
    return json.dumps(value, indent=1, default=str, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e")


def own_text(card: Path) -> str:
    """The text of a card on this machine, "" if there is none."""
    try:
        return card.read_text() if card.is_file() else ""
    except UnicodeDecodeError as e:
        raise InputError(f"{card} is no text in UTF-8; save it as such, or move it away") from e


def split_card(text: str, must: str = "") -> tuple[PlainDict, str]:
    """Split a card into its YAML head and its body.

    A head that cannot be read counts as none.

    Raises:
        InputError: if it cannot be read and `must` says what card it is.
    """
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)(.*)", text, re.DOTALL)
    if not match:
        return {}, text
    try:
        head = read_yaml(match[1])
    except (RecursionError, ValueError, yaml.YAMLError) as e:
        if must:
            raise InputError(f"the head of {must} cannot be read ({first_line(e)}); mend it there") from e
        log.warning("the head of a card cannot be read (%s) and counts as none", first_line(e))
        return {}, match[2]
    return (head if isinstance(head, dict) else {}), match[2]


def merge_card(old: str, head: PlainMapping, body: str) -> str:
    """Join a head and a generated body with what an old card has besides.

    A license in the head replaces all license keys of the old one.
    """
    from huggingface_hub import CardData

    old_head, text = split_card(old)
    if "license" in head:
        old_head = {k: v for k, v in old_head.items() if k not in LICENSE or k in head}
    merged = CardData()  # no RepoCard, which reads any head of others without limits of size and depth
    for key, value in {**old_head, **head}.items():
        merged[key] = value
    begin = text.rfind(BEGIN)
    end = text.find(END, max(begin, 0))
    before, after = (text[:begin], text[end + len(END) :]) if 0 <= begin < end else (text.rstrip() + "\n\n", "\n")
    return f"---\n{merged.to_yaml()}\n---\n\n{before.lstrip()}{BEGIN}\n\n{body.strip()}\n\n{END}{after.rstrip()}\n"


def license_head(license: str | None, old: PlainMapping) -> PlainDict:
    """The keys of a license: the one given, else that of the old head, else unknown."""
    if license is None:
        return {k: old[k] for k in LICENSE if k in old} or {"license": UNKNOWN}
    if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        return {"license": license}
    return {"license": "other", "license_name": license}


@functools.cache
def template(package: str, name: str) -> Any:
    """A template of Markdown that lies in a package of dq."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader(package, ""), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"md": md, "json": plain_json, "zip": zip}
    environment.globals["dq"] = __version__
    return environment.get_template(name)


ANY_REPO = "THIS_FOLDER_OR_REPO"


def joined_lists(old: object, new: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*(x for x in old if isinstance(x, str)), *new] if isinstance(old, list) else new))
