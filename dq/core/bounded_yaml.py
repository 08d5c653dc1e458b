"""YAML text read as plain data, within bounds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

MAX_VALUES = 100_000  # of a short text: a few lines of aliases can stand for billions
MAX_DEPTH = 100  # Python's own limit is met where they are written again
MAX_DIGITS = 256  # of a whole number; Python neither prints very long ones nor makes a float of them


def read_yaml(text: str) -> Any:
    """Plain data of YAML text.

    Raises:
        yaml.YAMLError, RecursionError: if it is not readable.
        ValueError: if a key stands twice in a mapping, if a value does not fit its tag or a date is impossible, if a
            whole number is absurdly long, if values nest absurdly deep, or if its aliases stand for more than
            `MAX_VALUES` values and for more than the text has letters.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # before anything is made of it: merging (<<) copies what an alias stands for
        values, depth = _measure(node, {})
        if values > max(MAX_VALUES, len(text)):
            raise ValueError(f"it stands for more than {max(MAX_VALUES, len(text)):,} values")
        if depth > MAX_DEPTH:
            raise ValueError(f"it nests more than {MAX_DEPTH} values in each other")
        return loader.construct_document(node)
    except (AttributeError, LookupError, OverflowError) as e:  # PyYAML's own, e.g. for "!!bool x", or 1:1:1:...:1.0
        raise ValueError(f"a value does not fit its tag ({e})") from e
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[yaml.Node, tuple[float, float]]) -> tuple[float, float]:
    """Values of a node, each counted wherever an alias repeats it, and how deep they nest; both without end if it
    contains itself."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
            raise ValueError(f"a whole number has {len(node.value):,} digits")
        return 1, 0
    if node not in known:
        known[node] = float("inf"), float("inf")
        if isinstance(node, yaml.MappingNode):
            keys = [k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode) and k.value != "<<"]
            if len(set(keys)) < len(keys):
                raise ValueError(f"a mapping has the key {Counter(keys).most_common(1)[0][0][:40]!r} twice")
        inner = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        found = [_measure(n, known) for n in inner]
        known[node] = 1 + sum(values for values, _ in found), 1 + max((depth for _, depth in found), default=0)
    return known[node]
