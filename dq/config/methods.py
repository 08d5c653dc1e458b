"""Settings of the methods of a run, and their checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from dq.config.overrides import apply_settings
from dq.config.pruning import PruneConfig
from dq.config.schema import GUIDANCE, ClusterConfig, GenerateConfig, MethodConfig, RunConfig
from dq.config.students import Baseline
from dq.core.errors import InputError
from dq.core.plain import PlainDict
from dq.core.text import check_name

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
    override: PlainDict = {}
    for key, value in _flat(m.override):
        if key in override:
            raise InputError(f"methods.{method}.override gives {key} twice, as {override[key]!r} and {value!r}")
        override[key] = value
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


def _flat(settings: PlainDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested settings.

    {cluster: {engine: torch}} changes one setting and not the section.
    """
    for key, value in settings.items():
        if isinstance(value, dict) and f"{prefix}{key}" in OVERRIDABLE:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- checks ------------------------------------------------------------------------------------------------------


def check_methods(config: RunConfig, *, selector: bool = True) -> None:
    """Check the methods and the numbers of images of a run.

    Args:
        config: methods, their overrides, and `ipc` are checked.
        selector: whether rules of selection must have a teacher already, which `dq distill` trains where it lacks.

    Raises:
        InputError: for an invalid or repeated name or number, or an override or a space that does not fit.
    """
    if not config.methods or not config.ipc or min(config.ipc) < 1:
        raise InputError("a run needs at least one method and ipc values of at least 1")
    if len(set(config.ipc)) < len(config.ipc):
        raise InputError(f"ipc={list(config.ipc)} names a number twice; give every number once")
    for name in config.methods:
        check_name(name, "the method name")
        if name in (*get_args(Baseline), "set"):
            raise InputError(f"the method name {name!r} is that of a baseline; call it methods.my-{name}, for example")
    for method in config.methods:
        space = resolved_method(config, method).cluster
        if space.uses_features and not config.teachers:
            raise InputError(
                f"method {method!r} has cluster.space={space.space}, which needs a teacher; "
                "set teachers.0.net and teachers.0.path, or cluster.space=latents"
            )
        check_prototypes(config, method)
        check_selection(config, method, selector=selector)


def check_prototypes(config: RunConfig, method: str) -> None:
    """Whether a method with fewer prototypes than images can draw several images of a prototype.

    Raises:
        InputError: if there are more prototypes than images, or a prototype has one image and no other.
    """
    m, cluster, g, _ = resolved_method(config, method)
    number = cluster.prototypes_per_class
    if number is None:
        return
    if number > min(config.ipc):
        raise InputError(
            f"method {method!r} has cluster.prototypes_per_class={number}, more than ipc={min(config.ipc)}, and every "
            f"prototype has an image; set it to at most {min(config.ipc)}, or null for ipc"
        )
    single = (
        "representative=real" if m.representative == "real"
        else "generate.mode=decode" if g.mode == "decode"
        else "generate.noise=inversion" if g.noise == "inversion"
        else None
    )  # fmt: skip
    if single and number < max(config.ipc):
        raise InputError(
            f"method {method!r} has cluster.prototypes_per_class={number} below ipc={max(config.ipc)}, but {single} "
            "gives one image of a prototype; set prototypes_per_class=null for this method"
        )


def selects(method: MethodConfig, generate: GenerateConfig) -> bool:
    """Whether a method selects among candidates: draws, or real images of its cells."""
    return generate.select != "none" and (method.representative != "real" or generate.real_candidates > 0)


def check_selection(config: RunConfig, method: str, *, selector: bool = True) -> None:
    """Check candidates of a method, their rule of selection and its teacher.

    Args:
        config: of the run, to which the override of the method is applied.
        method: name of the method.
        selector: whether the teacher must be named already.

    Raises:
        InputError: for candidates without a rule, a rule without candidates or teacher, or a pool as teacher.
    """
    m, _, g, _ = resolved_method(config, method)
    one = g.candidates == 1 and not g.real_candidates
    if (m.representative == "real" and not g.real_candidates) or (one and g.select == "none"):
        return
    if g.select == "none":
        name = "candidates" if g.candidates > 1 else "real_candidates"
        raise InputError(
            f"method {method!r} has generate.{name}={getattr(g, name)} and generate.select=none, which would keep the "
            "first alone; set generate.select to correct, confident, facility or transport, or "
            f"{name}={0 if name == 'real_candidates' else 1}"
        )
    if one:
        raise InputError(
            f"method {method!r} has generate.select={g.select} and one candidate; set generate.candidates to 2 or more"
        )
    if g.select_teacher is None and not selector:
        return
    if g.select_teacher is None or not (g.select_teacher.path or g.select_teacher.net == "transformers"):
        raise InputError(
            f"method {method!r} has generate.select={g.select}, which needs a teacher; set "
            "generate.select_teacher.net and generate.select_teacher.path"
        )
    if g.select_teacher.net == "pool":
        raise InputError(
            f"method {method!r} has a pool as generate.select_teacher, which is one network; name one of its members"
        )


def check_model(config: RunConfig) -> None:
    """Whether a model is named if a method draws with one.

    `dq distill` and `dq prior-report` name it otherwise, and `DistillPipeline.distill` has it already.

    Raises:
        InputError: for a method that draws with a DiT or Stable Diffusion while `generate.model` is off.
    """
    for method in config.methods:
        m, _, g, _ = resolved_method(config, method)
        if m.representative != "real" and g.mode != "decode" and config.generate.model is None:
            raise InputError(
                f"generate.model is missing, but method {method!r} has generate.mode={g.mode}; set generate.model to "
                "a pipeline (as `dq distill` does by --prior), or generate.mode=decode"
            )


def check_guidance(config: RunConfig) -> None:
    """Whether every method that is guided uses a denoiser. `dq prior-report` uses one whatever the mode.

    Raises:
        InputError: for guidance of images that the codec alone decodes.
    """
    for method in config.methods:
        m, _, g, _ = resolved_method(config, method)
        if m.representative != "real" and g.mode == "decode" and g.guidance:
            on = ", ".join(f"generate.{name}={scale:g}" for name, scale in g.guidance.items())
            off = ", ".join(f"generate.{name}={GUIDANCE[name]:g}" for name in g.guidance)
            raise InputError(
                f"method {method!r} has {on}, but generate.mode=decode has no denoiser to guide; set "
                f"generate.mode=dit or img2img, or {off}"
            )
