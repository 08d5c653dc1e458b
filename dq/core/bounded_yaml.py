"""YAML text read as plain data, within bounds, and written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml

MAX_VALUES = 100_000  # of a short text: a few lines of aliases can stand for billions
MAX_DEPTH = 100  # Python's own limit is met where they are written again
MAX_DIGITS = 256  # of a whole number; Python neither prints very long ones nor makes a float of them

# YAML 1.1, which PyYAML reads, takes 1e-3 for text
EXPONENT = re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with numbers such as 1e-3."""


class Dumper(yaml.SafeDumper):
    """Puts texts in quotes that `Loader` would take for numbers."""


for _resolver in (Loader, Dumper):
    _resolver.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def _text(dumper: Dumper, value: str) -> yaml.ScalarNode:
    # line breaks of Unicode are lost in any style but double quotes, in which they are escaped
    style = '"' if any(c in value for c in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


Dumper.add_representer(str, _text)


def write_yaml(data: object, *, one_line: bool = False) -> str:
    """YAML text of plain data, keys in their order."""
    width = 10**6 if one_line else 100
    return yaml.dump(
        data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=width, default_flow_style=one_line
    )


def read_yaml(text: str) -> Any:
    """Plain data of YAML text.

    Raises:
        yaml.YAMLError, RecursionError: if it is not readable.
        ValueError: if a key stands twice in a mapping, if a value does not fit its tag or a date is impossible, if a
            whole number is absurdly long, if values nest absurdly deep, or if its aliases stand for more than
            `MAX_VALUES` values and for more than the text has letters.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # before anything is made of it: merging (<<) copies what an alias stands for
        values, depth = _measure(node, {}, "")
        if values > max(MAX_VALUES, len(text)):
            raise ValueError(f"it stands for more than {max(MAX_VALUES, len(text)):,} values")
        if depth > MAX_DEPTH:
            raise ValueError(f"it nests more than {MAX_DEPTH} values in each other")
        return loader.construct_document(node)
    except (AttributeError, LookupError, OverflowError) as e:  # PyYAML's own, e.g. for "!!bool x", or 1:1:1:...:1.0
        raise ValueError(f"a value does not fit its tag ({e})") from e
    finally:
        loader.dispose()


def _measure(node: yaml.Node, measured: dict[yaml.Node, tuple[float, float]], path: str) -> tuple[float, float]:
    """Count the values of a node and how deep they nest.

    A value counts wherever an alias repeats it; both are infinite for a node that contains itself.
    """
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
            raise ValueError(f"a whole number has {len(node.value):,} digits")
        return 1, 0
    if node not in measured:
        measured[node] = float("inf"), float("inf")
        if isinstance(node, yaml.MappingNode):
            keys = [k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode) and k.value != "<<"]
            if len(set(keys)) < len(keys):
                key = Counter(keys).most_common(1)[0][0][:40]
                line = [k.start_mark.line + 1 for k, _ in node.value if k.value == key][1]
                raise ValueError(
                    f"the key {f'{path}.{key}'.lstrip('.')[-200:]!r} is given twice, again in line {line}"
                )
        sizes = [_measure(n, measured, inner) for inner, n in _children(node, path)]
        measured[node] = 1 + sum(values for values, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    return measured[node]


def _children(node: yaml.Node, path: str) -> Iterator[tuple[str, yaml.Node]]:
    """Nodes inside a mapping or a list, with their dotted paths."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield path, key
            yield f"{path}.{key.value}" if isinstance(key, yaml.ScalarNode) and len(path) < 200 else path, value
    else:
        for i, value in enumerate(node.value):
            yield f"{path}.{i}", value
