from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from dq.config import (
    ClusterConfig,
    MethodConfig,
    RunConfig,
    StudentConfig,
    apply_settings,
    dump_config,
    from_dict,
    load_config,
)
from dq.errors import InputError

ROOT = Path(__file__).parents[1]


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = dataclasses.replace(
        RunConfig(), ipc=(1, 5), methods={"x": MethodConfig(override={"cluster.engine": "clvq"})}, seed=3
    )
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.yaml")) + sorted((ROOT / "dq/configs").glob("*.yaml"))
)
def test_shipped_configs_load(path: Path) -> None:
    config = load_config(path)
    assert from_dict(RunConfig, yaml.safe_load(dump_config(config))) == config


def test_settings_reach_nested_values_and_lists() -> None:
    c = apply_settings(
        RunConfig(),
        [
            "cluster.engine=torch",
            "ipc=[1, 10]",
            "evaluate.students.0.lr=1e-3",
            "methods.ddoq.weights=mass",
            "teacher.net=resnet20",
        ],
    )
    assert c.cluster.engine == "torch"
    assert c.ipc == (1, 10)
    assert c.evaluate.students[0].lr == 1e-3
    assert c.methods["ddoq"].weights == "mass"
    assert c.teacher is not None
    assert c.teacher.net == "resnet20"
    assert RunConfig().cluster.engine == "auto"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cluster.enginee=torch", r"unknown setting 'cluster.enginee'; did you mean 'engine'\?"),
        ("clutser.engine=torch", r"unknown setting 'clutser'; did you mean 'cluster'\?"),
        ("cluster.engine=gpu", "cluster.engine must be one of 'auto'"),
        ("cluster.n_iter=many", "cluster.n_iter must be a whole number, not 'many'"),
        ("cluster.n_iter=true", "cluster.n_iter must be a whole number"),
        ("evaluate.students.4.lr=1", "the list has 1 entries"),
        ("seed.x=1", "its parent is the value 0"),
        ("seed", "--set needs key=value"),
        ("seed=[", "value of 'seed' is not readable"),
        ("ipc=10", "ipc must be a list"),
        ("source=here", "source must be a mapping"),
        ("codec.batch_size=0", "codec.batch_size must be at least 1 and finite, not 0"),
        ("codec.resolution=-8", "codec.resolution must be at least 1"),
        ("cluster.tol=.nan", "cluster.tol must be at least 0 and finite"),
        ("cluster.entropy=0", "cluster.entropy must be more than 0"),
        ("evaluate.students.0.lr=.inf", "evaluate.students.0.lr must be at least 0 and finite"),
        ("evaluate.students.0.temperature=0", "temperature must be more than 0"),
        ("evaluate.seeds=0", "evaluate.seeds must be at least 1"),
    ],
)
def test_wrong_settings_name_the_key_and_the_way_out(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply_settings(RunConfig(), [setting])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClusterConfig(init="rndom"), "init must be one of 'race', 'k-means\\+\\+', 'random', not 'rndom'"),
        (lambda: ClusterConfig(on_small="rais"), "on_small must be one of"),
        (lambda: StudentConfig(optimizer="adma"), "optimizer must be one of"),
        (lambda: StudentConfig(batch_size=0), "batch_size must be at least 1"),
    ],
)
def test_values_are_checked_in_python_too(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no configuration file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(InputError, match=r"bad.yaml is not valid YAML \(line"):
        load_config(tmp_path / "bad.yaml")
