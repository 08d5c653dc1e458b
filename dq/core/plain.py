"""Plain data: what JSON and YAML hold, such as records, facts and settings as mappings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

PlainDict: TypeAlias = dict[str, Any]  # values are of any plain type, nested
PlainMapping: TypeAlias = Mapping[str, Any]  # the same, only read
