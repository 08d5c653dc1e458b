"""`dtype: auto`: what it stands for on a device, and in folders and caches that were begun elsewhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from runs import config

import dq.config.prior
import dq.config.refinement
import dq.config.students
import dq.config.teachers
from dq.cli.main import main
from dq.config import schema
from dq.config.dtypes import (
    RECORD,
    device_dtypes,
    folder_dtypes,
    named_dtypes,
    record_dtypes,
    resolve_dtypes,
    slow_dtypes,
)
from dq.config.reader import from_dict, to_dict
from dq.config.schema import RunConfig
from dq.config.students import StudentConfig
from dq.config.validation import Checked
from dq.core import devices
from dq.core.devices import resolve_dtype

BF16 = {"inference": "bfloat16", "training": "bfloat16"}


def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that computes in bfloat16."""
    monkeypatch.setattr(devices, "has_native_bfloat16", lambda device: True)


# --- what it stands for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "native", "inference", "training"),
    [
        ("cuda", True, "bfloat16", "bfloat16"),
        ("cuda", False, "float16", "float32"),
        ("cpu", True, "bfloat16", "bfloat16"),
        ("cpu", False, "float32", "float32"),
        ("mps", False, "float32", "float32"),
    ],
)
def test_auto_is_the_fast_dtype_of_the_device(device: str, native: bool, inference: str, training: str, monkeypatch):
    monkeypatch.setattr(devices, "has_native_bfloat16", lambda d: native)
    assert device_dtypes(device) == {"inference": inference, "training": training}
    assert resolve_dtype("float16", device, "training") == "float16"  # what is asked for stays


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx2 avx512f avx512_bf16", True),
        ("flags : fpu avx2 amx_bf16 amx_tile", True),
        ("Features : fp asimd bf16 i8mm", True),
        ("flags : fpu avx2 avx512f", False),
        ("", False),
    ],
)
def test_a_cpu_computes_in_bfloat16_if_it_has_the_instructions(flags: str, expected: bool, monkeypatch) -> None:
    monkeypatch.setattr(devices, "CPU_BFLOAT16", ("avx512_bf16", "amx_bf16", "bf16"))
    monkeypatch.setattr(devices, "read_text", lambda path: flags)
    assert devices.has_native_bfloat16("cpu") == expected
    assert not devices.has_native_bfloat16("mps")


def test_every_dtype_is_auto_by_default() -> None:
    modules = (dq.config.prior, dq.config.refinement, dq.config.students, dq.config.teachers, schema)
    kinds = {v for m in modules for v in vars(m).values() if isinstance(v, type) and issubclass(v, Checked)} - {
        Checked
    }
    fields = {(k.__name__, f.name): f.default for k in kinds for f in dataclasses.fields(k) if f.name == "dtype"}
    assert fields.pop(("FRePo", "dtype")) == "float32"  # the only one for nearly singular kernels
    assert len(fields) >= 8
    assert set(fields.values()) == {"auto"}


def test_no_shipped_configuration_names_a_dtype_that_some_machines_lack() -> None:
    root = Path(__file__).parents[2]
    for path in [*root.glob("configs/*.yaml"), *root.glob("dq/config/presets/*.yaml")]:
        named = named_dtypes(from_dict(RunConfig, yaml.safe_load(path.read_text())))
        assert not [dtype for _, dtype in named if dtype != "float32"], path  # which all have


MIXED = {
    "codec": {"dtype": "float32"},
    "refine": [{"stage": "fadrm"}, {"stage": "teddy", "dtype": "float32"}],
    "methods": {"a": {}, "b": {"refine": [{"stage": "fadrm"}]}},
    "evaluate": {"students": [{"net": "convnet3"}, {"net": "resnet20", "dtype": "float32"}]},
}


def test_every_auto_of_a_configuration_is_resolved_and_nothing_else() -> None:
    settings = from_dict(RunConfig, MIXED)
    resolved = resolve_dtypes(settings, {"inference": "float16", "training": "bfloat16"})
    assert resolved.codec.dtype == "float32"
    assert resolved.generate.dtype == "float16"
    assert [s.dtype for s in resolved.refine] == ["bfloat16", "float32"]
    assert resolved.methods["b"].refine[0].dtype == "bfloat16"
    assert [s["dtype"] for s in resolved.evaluate.students] == ["bfloat16", "float32"]
    assert resolved.prior.codec.dtype == resolved.prior.denoiser.dtype == resolved.train_teachers.dtype == "bfloat16"
    assert '"auto"' not in json.dumps({k: v for k, v in to_dict(resolved).items() if k != "cluster"})
    assert resolve_dtypes(resolved, BF16) is resolved
    assert dict(named_dtypes(settings)) == {
        "codec.dtype": "float32",
        "refine.1.dtype": "float32",
        "evaluate.students.1.dtype": "float32",
    }


def test_a_default_that_resolves_to_float32_has_the_digest_of_float32() -> None:
    """Units of runs that were finished when float32 was the default are found again."""
    explicit = {
        **{k: {"dtype": "float32"} for k in ("prune", "codec", "generate", "train_teachers")},
        "prior": {"codec": {"dtype": "float32"}, "denoiser": {"dtype": "float32"}},
        "evaluate": {"students": [{"net": "convnet3", "dtype": "float32"}]},
        "refine": [{"stage": "fadrm", "dtype": "float32"}],
    }
    default = {"evaluate": {"students": [{"net": "convnet3"}]}, "refine": [{"stage": "fadrm"}]}
    resolved = resolve_dtypes(from_dict(RunConfig, default), device_dtypes("cpu"))
    assert to_dict(resolved) == to_dict(from_dict(RunConfig, explicit))
    assert to_dict(resolve_dtypes(StudentConfig(), device_dtypes("cpu"))) == to_dict(StudentConfig(dtype="float32"))


# --- folders and caches that exist --------------------------------------------------------------------------------


def test_a_folder_keeps_what_it_was_begun_with(tmp_path: Path, accelerator, monkeypatch, caplog) -> None:
    caplog.set_level("INFO", "dq")
    with monkeypatch.context() as elsewhere:
        native(elsewhere)
        resolved = folder_dtypes(tmp_path / "new", accelerator)
        assert resolved == BF16
        assert not (tmp_path / "new").exists()  # nothing is written before the folder is known to be right
        record_dtypes(tmp_path / "new", resolved)
    assert not caplog.messages
    assert folder_dtypes(tmp_path / "new", accelerator) == BF16
    assert caplog.messages == [
        f"dtype=auto stays bfloat16 in {tmp_path / 'new'}, which was begun so, although that is slow here"
    ]
    native(monkeypatch)
    assert folder_dtypes(tmp_path / "old", accelerator, begun="float32") == dict.fromkeys(BF16, "float32")


def units(out: Path) -> dict[str, int]:
    """The files of the units of a run and when they were written."""
    resolved = [
        *out.glob("run/eval/units/*.json"),
        *out.glob("cache/latents-*/part-*"),
        *out.glob("run/images/*/class-*"),
    ]
    return {str(f.relative_to(out)): f.stat().st_mtime_ns for f in resolved}


def auto_config(world: Path, out: Path) -> Path:
    """A run in which every dtype is auto."""
    students = [{"net": "convnet3", "epochs": {"default": 1}, "tests": 1}]
    file = config(
        world, out, ipc=[1], methods={"ddoq": {}}, evaluate__students=students, evaluate__baselines=["random"]
    )
    data = yaml.safe_load(file.read_text())
    data["codec"].pop("dtype")
    file.write_text(yaml.safe_dump(data))
    return file


def test_a_run_begun_in_bfloat16_goes_on_where_that_is_slow(world: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    file = auto_config(world, tmp_path)
    with monkeypatch.context() as elsewhere:
        native(elsewhere)
        assert main(["run", "--config", str(file), "--cpu"]) == 0
    run, before = tmp_path / "run", units(tmp_path)
    records = [json.loads(f.read_text()) for f in run.glob("eval/units/*.json")]
    assert {r["config"]["dtype"] for r in records} == {"bfloat16"}
    assert json.loads((run / "provenance.json").read_text())["settings"]["codec"]["dtype"] == "bfloat16"
    assert yaml.safe_load((run / "config.yaml").read_text())["codec"]["dtype"] == "auto"
    (manifest,) = (tmp_path / "cache").glob("latents-*/manifest.json")
    assert json.loads(manifest.read_text())["dtype"] == "bfloat16"
    caplog.clear()
    assert main(["run", "--config", str(file), "--cpu"]) == 0
    assert units(tmp_path) == before
    notes = [m for m in caplog.messages if "although that is slow here" in m]
    assert len(notes) == 1


def test_a_run_of_before_is_found_again_where_bfloat16_is_fast(world: Path, tmp_path: Path, monkeypatch) -> None:
    """It was in float32, by default, and kept no record of dtypes."""
    file = auto_config(world, tmp_path)
    assert main(["run", "--config", str(file), "--cpu"]) == 0
    before = units(tmp_path)
    (tmp_path / "run" / RECORD).unlink()
    native(monkeypatch)
    assert main(["run", "--config", str(file), "--cpu"]) == 0
    assert units(tmp_path) == before
    dtypes = [json.loads(f.read_text())["config"]["dtype"] for f in (tmp_path / "run").glob("eval/units/*.json")]
    assert set(dtypes) == {"float32"}


def test_a_run_of_before_with_a_dtype_of_its_own_is_found_again(world: Path, tmp_path: Path) -> None:
    file = auto_config(world, tmp_path)
    flags = ["--config", str(file), "--cpu"]
    assert main(["encode", *flags, "--set", "codec.dtype=bfloat16"]) == 0
    before = units(tmp_path)
    (tmp_path / "run" / RECORD).unlink()
    assert main(["encode", *flags]) == 0  # what the user named then has become auto
    assert units(tmp_path) == before


def test_another_run_uses_the_latents_that_are_in_the_cache(world: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    file = auto_config(world, tmp_path)
    with monkeypatch.context() as elsewhere:
        native(elsewhere)
        assert main(["encode", "--config", str(file), "--cpu"]) == 0
    before = units(tmp_path)
    assert main(["encode", "--config", str(file), "--cpu", "--output_dir", str(tmp_path / "other")]) == 0
    assert units(tmp_path) == before
    note = f"codec.dtype=auto stays bfloat16 in {tmp_path / 'other'}, as before, although that is slow here"
    assert caplog.messages.count(note) == 1
    made = json.loads((tmp_path / "other" / "provenance.json").read_text())["settings"]
    assert made["codec"]["dtype"] == "bfloat16"
    assert made["generate"]["dtype"] == "float32"  # nothing is drawn yet


def test_teachers_and_their_checkpoints_keep_their_dtype(world: Path, tmp_path: Path, monkeypatch) -> None:
    file = auto_config(world, tmp_path)
    flags = ["--config", str(file), "--cpu", "--set", f"train_teachers.output_dir={tmp_path / 'teachers'}"]
    flags += ["train_teachers.nets=[convnet3]", "train_teachers.epochs=1"]
    assert main(["train-teachers", *flags]) == 0
    record = tmp_path / "teachers" / "convnet3" / "teacher.json"
    before = record.stat().st_mtime_ns
    native(monkeypatch)
    assert main(["train-teachers", *flags]) == 0
    assert record.stat().st_mtime_ns == before
    assert json.loads(record.read_text())["recipe"]["dtype"] == "float32"


def test_parts_of_a_prior_keep_their_dtype(toy_source, accelerator, tmp_path: Path, monkeypatch) -> None:
    from small_prior import CODEC, prior_in

    from dq.diffusion.prior.train_codec import train_codec

    prior = prior_in(tmp_path / "prior", codec={"steps": 1})
    folder = train_codec(toy_source, CODEC, prior, accelerator=accelerator)
    assert json.loads((folder / "training.json").read_text())["settings"]["dtype"] == "float32"
    (tmp_path / "prior" / RECORD).unlink()
    native(monkeypatch)
    assert train_codec(toy_source, CODEC, prior, accelerator=accelerator) == folder
    other = prior_in(tmp_path / "other", codec={"steps": 1})
    folder = train_codec(toy_source, CODEC, other, accelerator=accelerator)
    assert json.loads((folder / "training.json").read_text())["settings"]["dtype"] == "bfloat16"


# --- dtypes that are slow here ------------------------------------------------------------------------------------


def test_a_named_dtype_that_is_slow_here_is_noted_once(world: Path, tmp_path: Path, caplog) -> None:
    file = auto_config(world, tmp_path)
    flags = ["encode", "--config", str(file), "--cpu"]
    assert main(flags) == 0
    assert not [m for m in caplog.messages if "slower" in m]
    caplog.clear()
    named = ["codec.dtype=bfloat16", "generate.dtype=float16", "train_teachers.dtype=bfloat16"]
    assert main([*flags, "--output_dir", str(tmp_path / "other"), "--set", *named]) == 0
    (note,) = [m for m in caplog.messages if "slower" in m]
    assert note == (
        "note: codec.dtype=bfloat16 (and 1 more) is much slower than float32 on this CPU, which has no such numbers; "
        "set codec.dtype=auto"
    )


def test_what_is_fast_here_is_not_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = from_dict(RunConfig, {"codec": {"dtype": "bfloat16"}})
    assert slow_dtypes(settings, "cpu")
    assert slow_dtypes(settings, "mps") is None
    native(monkeypatch)
    assert slow_dtypes(settings, "cpu") is None


def test_a_student_alone_resolves_its_dtype() -> None:
    """`fit` and `accuracy` may be called without a run."""
    from dq.networks.training import TrainingSet, accuracy, fit, normalizer

    x, y = torch.zeros(4, 3, 8, 8), torch.arange(4) % 2
    pixels = normalizer((0.5,) * 3, (0.5,) * 3)
    data = TrainingSet(x, y, 2, pixels)
    a, b = (
        fit(data, StudentConfig(epochs=1, batch_size=4, dtype=d), seed=0).net.state_dict() for d in ("auto", "float32")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    net = fit(data, StudentConfig(epochs=1, batch_size=4), seed=0).net
    assert accuracy(net, x, y, pixels=pixels, dtype="auto") == accuracy(net, x, y, pixels=pixels, dtype="float32")
