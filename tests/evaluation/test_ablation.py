"""The arms of the ablation: each differs from the default in what it names, and in nothing else."""

import csv
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from dq.config.overrides import apply_settings
from dq.config.reader import to_dict
from dq.config.schema import MethodConfig, RunConfig, load_config
from dq.core.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ablation():
    sys.path.insert(0, str(ROOT / "pipelines"))
    spec = importlib.util.spec_from_file_location("ablation", ROOT / "pipelines" / "ablation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "pipelines"))


@pytest.fixture
def config() -> RunConfig:
    return load_config(ROOT / "configs" / "cifar10_ablation.yaml")


def flat(data: dict, prefix: str = "") -> dict:
    settings = {}
    for k, v in data.items():
        settings |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return settings


def test_an_arm_changes_what_it_names(ablation, config):
    methods = ablation.arms(config)
    assert len(methods) == 1 + sum(map(len, ablation.ARMS.values()))
    for factor, levels in ablation.ARMS.items():
        for level, change in levels.items():
            method = methods[ablation.slug(factor, level)]
            whole = apply_settings(config, dict(method.override))
            now = flat({"cluster": to_dict(whole.cluster), "generate": to_dict(whole.generate)})
            before = flat({"cluster": to_dict(config.cluster), "generate": to_dict(config.generate)})
            plain = {k: v for k, v in to_dict(method).items() if k != "override"}
            now |= plain
            before |= {k: v for k, v in to_dict(config.methods["default"]).items() if k != "override"}
            assert {k for k in now if now[k] != before[k]} == set(change), (factor, level)


def test_only_some_factors(ablation, config):
    assert set(ablation.arms(config, ["weights"])) == {"default", "weights_uniform", "weights_mass"}
    assert set(ablation.arms(config, ["rivals_nearest-real"])) == {"default", "rivals_nearest-real"}


def test_without_a_default_there_is_a_sentence(ablation, config):
    with pytest.raises(InputError, match=r"no methods\.default"):
        ablation.arms(dataclasses.replace(config, methods={"other": MethodConfig()}))


def test_collected_rows_have_paired_differences(ablation, config, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    one = apply_settings(config, {"output_dir": str(tmp_path), "codec.path": str(tmp_path / "vae")})
    with pytest.raises(InputError, match="to collect"):
        ablation.collect(one, tmp_path / "out", ["weights"], 1000)
    folder = tmp_path / "main" / "eval"
    folder.mkdir(parents=True)
    (tmp_path / "main" / "provenance.json").write_text(json.dumps({"processes": 2, "seed": 0}))
    accuracy = {"default": (0.30, 0.32, 0.34), "weights_mass": (0.31, 0.34, 0.37), "random": (0.1, 0.2, 0.3)}
    lines = [
        {"set": name, "ipc": "10", "student": "s", "labels": "hard", "seed": seed, "last": value}
        for name, values in accuracy.items()
        for seed, value in enumerate(values)
    ]
    (folder / "trainings.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    ablation.collect(one, tmp_path / "out", ["weights"], 1000)
    with open(tmp_path / "out" / "ablation.csv", newline="") as f:
        rows = {(r["factor"], r["level"]): r for r in csv.DictReader(f)}
    assert set(rows) == {("default", ""), ("weights", "mass"), ("rivals", "random real")}
    assert float(rows["weights", "mass"]["mean"]) == pytest.approx(0.34)
    assert float(rows["weights", "mass"]["std"]) == pytest.approx(0.03)
    assert float(rows["weights", "mass"]["difference"]) == pytest.approx(0.02)
    assert rows["default", ""]["difference"] == ""
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 2
    assert load_config(tmp_path / "out" / "config.yaml").ipc == (10,)
