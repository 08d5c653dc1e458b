"""Every setting has its bound and help, is read strictly, and survives being written to YAML and read again."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st

import dq.labels.plan  # noqa: F401  (has a settings class of its own)
from dq.config.condensation import DistributionMatching
from dq.config.overrides import apply_settings
from dq.config.reader import dump_config, from_dict, to_dict
from dq.config.refinement import FADRM, STAGES, FRePo, RefineConfig
from dq.config.schema import ClusterConfig, GenerateConfig, RunConfig, SourceConfig, load_config
from dq.config.students import RelabelConfig, StudentConfig, ViewConfig
from dq.config.trajectories import Trajectory
from dq.config.validation import Checked, bounds, expected, field_hint, is_settings, none_word, optional, unwrap
from dq.core.bounded_yaml import read_yaml, write_yaml
from dq.core.errors import InputError


def settings_classes(cls: type = Checked) -> list[type]:
    below = {c for c in cls.__subclasses__() if c.__module__.startswith("dq.")}
    return sorted(below.union(*(settings_classes(c) for c in below)), key=lambda c: c.__name__)


CLASSES = settings_classes()
# those that a user can make; the others are what several have in common
MADE = [c for c in CLASSES if c.__name__ != "LabelPlan" and getattr(c, "stage", "any")]
FIELDS = [(cls, name) for cls in CLASSES for name in cls.__pydantic_fields__]
NAMES_OF_OTHERS = ("name", "revision", "repo_id", "commit_message", "pretty_name", "license")


def leaf_types(hint: Any, notes: tuple[Any, ...] = ()) -> list[tuple[Any, list[Any]]]:
    """Scalar types inside a type, each with its annotations."""
    inner, more = unwrap(hint)
    inner, _ = optional(inner)
    core, deeper = unwrap(inner)
    if get_origin(core) is tuple:
        return leaf_types(get_args(core)[0])
    if get_origin(core) is typing.Union:
        return [leaf for a in get_args(core) for leaf in leaf_types(a)]
    return [(core, [*notes, *more, *deeper])]


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_every_setting_has_one_line_of_help_and_its_bound(cls: type, name: str) -> None:
    field = cls.__pydantic_fields__[name]
    assert field.description
    assert 4 <= len(field.description) <= 119
    assert "\n" not in field.description
    for core, notes in leaf_types(field_hint(field)):
        if core in (int, float) and not name.endswith("seed"):  # any whole number is a seed
            assert bounds(notes) or name == "mean", (cls, name)  # of a color channel, as the network has it


def test_help_is_not_copied_between_settings_of_a_class() -> None:
    for cls in CLASSES:
        texts = [f.description for f in cls.__pydantic_fields__.values()]
        assert len(set(texts)) == len(texts), cls


def test_every_setting_that_may_be_none_has_a_word_for_it() -> None:
    for cls, name in FIELDS:
        if none_word(field_hint(cls.__pydantic_fields__[name])) == "null":
            assert name.endswith(NAMES_OF_OTHERS), (cls, name)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a type allows, without rules between settings."""
    inner, notes = unwrap(hint)
    inner, is_optional = optional(inner)
    core, more = unwrap(inner)
    low = high = None
    is_open = [False, False]
    for note in [*notes, *more]:
        for attribute, side in (("ge", 0), ("gt", 0), ("le", 1), ("lt", 1)):
            if (bound := getattr(note, attribute, None)) is not None:
                low, high = (bound, high) if side == 0 else (low, bound)
                is_open[side] = attribute in ("gt", "lt")
    if get_origin(core) is Literal:
        strategy: st.SearchStrategy[Any] = st.sampled_from(get_args(core))
    elif core is int:
        strategy = st.integers(low, high)
    elif core is float:
        limits: dict[str, Any] = {"allow_nan": False, "allow_infinity": False}
        if is_open[0] and low is not None:
            limits["exclude_min"] = True
        if is_open[1] and high is not None:
            limits["exclude_max"] = True
        strategy = st.floats(low, high, **limits)
    elif core is bool:
        strategy = st.booleans()
    elif core is str:
        strategy = st.text(st.characters(codec="utf-8"), max_size=8)
    elif get_origin(core) is tuple:
        strategy = st.lists(values(get_args(core)[0]), max_size=3).map(tuple)
    elif get_origin(core) is dict:
        strategy = st.dictionaries(st.text("abc1", min_size=1, max_size=3), values(get_args(core)[1]), max_size=2)
    elif is_settings(core):
        strategy = objects(core)
    elif core is Any:
        strategy = st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=8)
    else:
        strategy = st.one_of([values(a) for a in get_args(core)])
    word = none_word(hint)
    if core is str and word:
        strategy = strategy.filter(lambda v: v != word)
    return st.none() | strategy if is_optional else strategy


def objects(cls: type) -> st.SearchStrategy[Any]:
    """Objects of a settings class in which some settings differ from their defaults."""
    if cls is RefineConfig:
        return st.sampled_from(sorted(STAGES)).flatmap(lambda stage: objects(STAGES[stage]))

    @st.composite
    def draw(pick: Any) -> Any:
        fields = cls.__pydantic_fields__
        made = cls(experts="x") if cls is Trajectory else cls(order="x") if "order" in fields else cls()
        for name in pick(st.lists(st.sampled_from(sorted(fields)), max_size=6, unique=True)):
            try:
                made = dataclasses.replace(made, **{name: pick(values(field_hint(fields[name])))})
            except InputError:  # rules between settings
                continue
        return made

    return draw()


@profile(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("cls", MADE, ids=lambda c: c.__name__)
def test_settings_written_to_yaml_are_read_back_equal(cls: type, data: Any) -> None:
    config = data.draw(objects(cls))
    text = dump_config(config)
    assert from_dict(type(config), read_yaml(text)) == config
    assert from_dict(type(config), to_dict(config)) == config
    assert to_dict(from_dict(type(config), read_yaml(text))) == to_dict(config)  # what digests are made of


@profile(max_examples=100, deadline=None)
@given(
    st.recursive(st.floats(allow_nan=False) | st.text(max_size=6) | st.integers(), lambda x: st.lists(x, max_size=3))
)
def test_yaml_keeps_numbers_and_texts_apart(value: Any) -> None:
    assert read_yaml(write_yaml({"a": value})) == {"a": value}


def test_numbers_without_a_point_are_numbers() -> None:
    assert read_yaml("[1e-3, -2E5, 1.e3, 3]") == [0.001, -200000.0, 1000.0, 3]
    assert read_yaml("[e5, 1e, '1e-3']") == ["e5", "1e", "1e-3"]
    assert yaml.safe_load(write_yaml(0.001)) == 0.001


def wrong_values(hint: Any) -> list[Any]:
    """Values of another type than a setting has, or out of its bound."""
    inner, notes = unwrap(hint)
    inner, _ = optional(inner)
    core, more = unwrap(inner)
    if get_origin(core) is tuple:
        return [[[[]]]] if is_settings(unwrap(get_args(core)[0])[0]) else [{"a": 1}, [[[]]]]
    wrong: list[Any] = [[], {"a": 1}, "no such word"] if core is not str else [[], 5, True]
    for note in [*notes, *more]:
        if getattr(note, "ge", None) is not None:
            wrong.append(note.ge - 1)
        if getattr(note, "gt", None) is not None:
            wrong.append(note.gt)
        if getattr(note, "le", None) is not None:
            wrong.append(note.le + 1)
        if getattr(note, "lt", None) is not None:
            wrong.append(note.lt)
    if core in (int, float):
        wrong += [True, float("nan"), float("inf"), "1"]
    if core is bool:
        wrong = ["true", 1, 0.0, []]
    return wrong


@pytest.mark.parametrize("cls", MADE, ids=lambda c: c.__name__)
def test_a_wrong_value_is_refused_with_path_bound_and_value(cls: type) -> None:
    required = {"experts": "x"} if cls is Trajectory else {"order": "x"} if cls.__name__ == "CurriculumConfig" else {}
    if cls.__dict__.get("stage"):
        required["stage"] = cls.stage
    for name, field in cls.__pydantic_fields__.items():
        hint = field_hint(field)
        core = unwrap(optional(unwrap(hint)[0])[0])[0]
        if is_settings(core) or get_origin(core) in (dict, typing.Union) or name in ("students", "stage"):
            continue
        for value in wrong_values(hint):
            with pytest.raises(InputError) as e:
                from_dict(STAGES.get(getattr(cls, "stage", ""), cls), {**required, name: value}, "here")
            text = str(e.value)
            assert text.startswith(f"here.{name}"), text
            assert "\n" not in text
            if get_origin(core) is not tuple:
                kind = expected(hint)
                assert f"{kind}, not " in text.replace("a finite number", "a number"), text
                with pytest.raises(InputError, match=f"^{name} must be "):
                    cls(**{**required, name: value})


def paths(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of the settings of nested classes, with a list's first entry."""
    names = []
    for name, field in cls.__pydantic_fields__.items():
        core = unwrap(optional(unwrap(field_hint(field))[0])[0])[0]
        names += paths(core, f"{prefix}{name}.") if is_settings(core) else [f"{prefix}{name}"]
    return names


DEEP = {
    "methods.fadrm.refine.0": {"methods": {"fadrm": {"refine": [{"stage": "fadrm"}]}}},
    "refine.1": {"refine": [{"stage": "teddy"}, {"stage": "frepo"}]},
    "teachers.0": {"teachers": [{"net": "resnet20"}]},
    "refine.0.teachers.0": {"refine": [{"stage": "fadrm", "teachers": [{}]}]},
}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "methods.fadrm.refine.0.lr=-1",
            "methods.fadrm.refine.0.lr must be a number of at least 0 or 'preset', not",
        ),
        ("methods.fadrm.refine.0.sizes=[8, 0]", "methods.fadrm.refine.0.sizes.1 must be a whole number of at least 1"),
        (
            "methods.fadrm.refine.0.depth.drop=1",
            "methods.fadrm.refine.0.depth.drop must be a number in [0, 1) or 'auto'",
        ),
        ("refine.1.ridge=2", "refine.1.ridge must be a number in (0, 1], not 2"),
        ("refine.1.pool_size=3.5", "refine.1.pool_size must be a whole number of at least 1, not 3.5"),
        ("refine.1.dtype=float16", "refine.1.dtype must be 'float32', not 'float16'"),
        ("refine.0.teachers.0.weight=0", "refine.0.teachers.0.weight must be a number of more than 0, not 0"),
        ("teachers.0.path=5", "teachers.0.path must be text, not 5"),
        ("teachers.0.batchsize=5", "unknown setting 'teachers.0.batchsize'; did you mean 'teachers.0.batch_size'?"),
        ("refine.1.pol_size=5", "unknown setting 'refine.1.pol_size'; did you mean 'refine.1.pool_size'?"),
        ("refine.1.stage=frep", "; did you mean 'frepo'?"),
        ("methods.fadrm.refine.0.depth.dropp=0", "did you mean 'methods.fadrm.refine.0.depth.drop'?"),
        (
            "methods.fadrm.wieghts=mass",
            "'methods.fadrm.wieghts'; did you mean 'methods.fadrm.weights'?",
        ),
        ("evaluate.baselines=[randm]", "'randm'; did you mean 'random'?"),
        ("ipc=0", "ipc must be a whole number of at least 1, not 0"),
        ("ipc=[1, x]", "ipc.1 must be a whole number of at least 1, not 'x'"),
        ("cluster=5", "cluster must be a mapping of settings, not 5"),
        ("teachers=5", "teachers must be a mapping of settings, not 5"),
        ("prior.denoiser.time_shift=0", "prior.denoiser.time_shift must be a number of more than 0 or 'auto', not 0"),
        ("evaluate={seeds: '3'}", "evaluate.seeds must be a whole number of at least 1, not '3'"),
    ],
)
def test_messages_have_the_whole_path(setting: str, message: str) -> None:
    base: dict[str, Any] = {"methods": DEEP["methods.fadrm.refine.0"]["methods"], "teachers": [{}]}
    base["refine"] = [{"stage": "teddy", "teachers": [{}]}, {"stage": "frepo"}]
    with pytest.raises(InputError) as e:
        apply_settings(from_dict(RunConfig, base), [setting])
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("where", DEEP)
def test_a_misspelt_setting_is_named_with_the_nearest_one(where: str) -> None:
    config = from_dict(RunConfig, DEEP[where])
    node: Any = config
    for part in where.split("."):
        node = node[int(part)] if part.isdigit() else node[part] if isinstance(node, dict) else getattr(node, part)
    for name in paths(type(node)):
        if len(name.rpartition(".")[2]) > 3:
            with pytest.raises(InputError) as e:
                apply_settings(config, {f"{where}.{name}x": 1})
            assert f"unknown setting '{where}.{name}x'; did you mean '{where}.{name}'?" in str(e.value)


def test_a_setting_given_twice_is_refused(tmp_path: Path) -> None:
    for same in (["seed=1", "seed=1"], ["seed=1", "ipc=3", " seed=2"]):
        with pytest.raises(InputError, match="seed is given twice, as "):
            apply_settings(RunConfig(), same)
    path = tmp_path / "c.yaml"
    path.write_text("methods:\n  a:\n    refine:\n    - stage: fadrm\n      lr: 1\n      lr: 2\n")
    with pytest.raises(InputError, match=r"key 'methods.a.refine.0.lr' is given twice, again in line 6"):
        load_config(path)


def test_a_setting_in_a_file_and_by_set_of_another_type_is_refused() -> None:
    config = from_dict(RunConfig, {"cluster": {"n_iter": 5}, "ipc": [1, 2]})
    with pytest.raises(InputError, match=r"'cluster\.n_iter\.x' cannot be set: its parent is the value 5"):
        apply_settings(config, ["cluster.n_iter.x=1"])
    with pytest.raises(InputError, match=r"cluster must be a mapping of settings, not \[1\]"):
        apply_settings(config, ["cluster=[1]"])
    with pytest.raises(InputError, match=r"'ipc\.2' does not exist: the list has 2 entries"):
        apply_settings(config, ["ipc.2=1"])


def test_a_scalar_is_taken_for_a_list_of_one() -> None:
    assert from_dict(RunConfig, {"ipc": 5}) == from_dict(RunConfig, {"ipc": [5]})
    stage = {"stage": "fadrm", "steps": 50, "sizes": 8}
    assert from_dict(RunConfig, {"refine": [stage]}).refine[0].steps == (50,)
    assert FADRM(steps=50, sizes=8) == FADRM(steps=(50,), sizes=(8,))
    assert from_dict(RunConfig, {"report_to": "trackio"}).report_to == ("trackio",)


def test_words_stand_for_none_and_null_is_read_too() -> None:
    assert from_dict(ClusterConfig, {"dims": "auto"}) == from_dict(ClusterConfig, {"dims": None}) == ClusterConfig()
    for off in (False, "off", None):  # YAML reads a bare off as false
        assert from_dict(GenerateConfig, {"snr": off}).snr is None
    assert read_yaml("snr: off") == {"snr": False}
    assert "snr: 'off'" in dump_config(GenerateConfig(snr=None))
    assert "dims: auto" in dump_config(ClusterConfig())
    assert "steps: preset" in dump_config(FADRM())
    assert "revision: null" in dump_config(SourceConfig())
    assert FRePo(norm="auto").norm is None
    with pytest.raises(InputError, match="dims must be a whole number of at least 1 or 'auto', not 'preset'"):
        ClusterConfig(dims="preset")
    with pytest.raises(InputError, match="n_iter must be a whole number of at least 1, not 'auto'"):
        ClusterConfig(n_iter="auto")
    assert to_dict(ClusterConfig(dims="auto"))["dims"] is None  # digests stay


def test_constructors_take_what_python_code_gives() -> None:
    assert GenerateConfig(mode="dit", snr=0.1).mode == "dit"
    assert SourceConfig(path=Path("a/b")).path == "a/b"
    assert ViewConfig(crop_scale=[0.5, 1]).crop_scale == (0.5, 1.0)
    assert StudentConfig(views={"flip": 1}).views.flip == 1.0
    assert GenerateConfig(class_map={"a": 3}).class_map == {"a": "3"}
    with pytest.raises(InputError, match=r"unknown setting 'snrr'; did you mean 'snr'\?"):
        GenerateConfig(snrr=1)
    with pytest.raises(InputError, match=r"views\.flip must be a number in \[0, 1\], not 2"):
        StudentConfig(views={"flip": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        RelabelConfig().seed = 1  # type: ignore[misc]
    with pytest.raises(InputError, match="dtype must be 'float32', not 'bfloat16'"):
        DistributionMatching(dtype="bfloat16")
