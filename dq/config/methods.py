"""The settings that hold for a method of a run: those of the run, with the method's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from dq.config.overrides import apply_settings
from dq.config.pruning import PruneConfig
from dq.config.schema import ClusterConfig, GenerateConfig, MethodConfig, RunConfig
from dq.core.errors import InputError

OVERRIDABLE = ("prune", "cluster", "generate")  # sections of which a method may have settings of its own


class ResolvedMethod(NamedTuple):
    """A method with the settings of pruning, clustering and generation that hold for it."""

    method: MethodConfig
    cluster: ClusterConfig
    generate: GenerateConfig
    prune: PruneConfig


def resolved_method(config: RunConfig, method: str) -> ResolvedMethod:
    """A method with the settings that hold for it.

    Raises:
        InputError: for an override of something else.
    """
    m = config.methods[method]
    override = dict(_flat(m.override))
    for key in override:
        if key.split(".")[0] not in OVERRIDABLE:
            sections = f"{', '.join(f'{s}.*' for s in OVERRIDABLE[:-1])} and {OVERRIDABLE[-1]}.*"
            raise InputError(f"methods.{method}.override may set {sections}, not {key!r}")
        if key in ("generate.model", "generate.revision", "generate.dtype"):
            raise InputError(f"methods.{method}.override cannot change {key}: one model draws all methods of a run")
    try:
        changed = apply_settings(config, override) if override else config
    except InputError as e:
        raise InputError(f"methods.{method}.override: {e}") from None
    return ResolvedMethod(m, changed.cluster, changed.generate, changed.prune)


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested settings, so that {cluster: {engine: torch}} changes one value and not the section."""
    for key, value in settings.items():
        if isinstance(value, dict) and f"{prefix}{key}" in OVERRIDABLE:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
