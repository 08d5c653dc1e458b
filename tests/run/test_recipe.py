"""The recommended recipe: what it takes from the prior and the data, and the command that runs it."""

import json

import pytest

from dq.cli.main import main
from dq.config.overrides import apply_settings
from dq.config.schema import load_config
from dq.core.errors import InputError
from dq.data.load import load_source
from dq.distilled.external import load_set
from dq.run.recipe import fill_recipe, native_resolution

SMALL = ["generate.num_inference_steps=2", "generate.candidates=2", "train_teachers.nets=convnet3w32"]
SMALL += [
    "train_teachers.epochs=40",
    "evaluate.validation_images=3",
    "evaluate.seeds=1",
    "evaluate.baselines=[random]",
]
SMALL += ["evaluate.students=[{net: convnet3w32, epochs: 1, batch_size: 8}]", "codec.batch_size=4"]


def call(world, tmp_path, *more, prior="dit"):
    folders = ["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")]
    prior = ["--prior", str(world / prior)] if prior else []
    return ["distill", str(world / "images"), *prior, "--ipc", "2", *folders, "--set", *SMALL, *more]


def settled(world, **changes):
    changes = {"generate.model": str(world / "dit"), "output_dir": "out", **changes}
    return fill_recipe(apply_settings(load_config("recommended"), changes), load_source(str(world / "images")))


def test_codec_and_sizes_are_those_of_the_prior_and_the_images(world):
    config = settled(world)
    side = native_resolution(str(world / "dit"))
    assert config.codec.path == str(world / "dit")
    assert config.codec.resolution == side
    assert config.source.image_size == min(side, 8)  # the images have 8 px
    assert settled(world, **{"source.image_size": 4}).source.image_size == 4


def test_selecting_teacher_is_trained_unless_one_is_named(world):
    own = settled(world).generate.select_teacher
    assert (own.net, own.path) == ("convnet3w64-bn", "out-teacher/convnet3w64-bn")
    named = {"net": "convnet3-bn", "path": str(world / "bn.safetensors")}
    assert settled(world, **{"generate.select_teacher": named}).generate.select_teacher.path == named["path"]
    plain = settled(world, **{"generate.select": "none", "generate.candidates": 1})
    assert plain.generate.select_teacher is None


@pytest.mark.parametrize("folder", ["vae", "images"])
def test_what_is_no_prior_is_named(world, folder):
    with pytest.raises(InputError, match=f"{folder}.*transformer"):
        settled(world, **{"generate.model": str(world / folder)})


def test_without_prior_the_option_is_named(world, tmp_path, capsys):
    assert main(call(world, tmp_path, prior=None)) == 2
    assert "--prior" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_plan_for_a_set_that_is_not_here_reads_no_image(world, tmp_path, capsys):
    assert main([*call(world, tmp_path), "--dry-run", "--like", "3x500"]) == 0
    assert "1500" in capsys.readouterr().out


def test_one_command_gives_a_scored_set_and_repeats_nothing(world, tmp_path, capsys):
    assert main([*call(world, tmp_path), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "convnet3w32" in plan.splitlines()[0]  # trained first
    assert not (tmp_path / "run-teacher").exists()
    assert main(call(world, tmp_path)) == 0
    record = json.loads((tmp_path / "run-teacher" / "convnet3w32" / "teacher.json").read_text())
    assert record["net"] == "convnet3w32"
    made = load_set(tmp_path / "run" / "dataset" / "ipc2-recommended", ("blue", "green", "red"))
    assert sorted(made.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "images").rglob("*.safetensors")}
    assert before
    capsys.readouterr()
    assert main(call(world, tmp_path)) == 0
    assert "recommended" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_selection_by_a_method_alone_has_its_teacher_too(world):
    config = apply_settings(load_config("demo"), {"generate.model": str(world / "dit")})
    filled = fill_recipe(config, load_source(str(world / "images")), sizes=False)
    assert filled.generate.select == "none"
    assert filled.generate.select_teacher.path.startswith(f"{config.output_dir}-teacher")
    assert (filled.codec, filled.source) == (config.codec, config.source)
