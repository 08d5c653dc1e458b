"""The recommended recipe: what it takes from the prior and the data, and the command that runs it."""

import json
import shutil

import pytest
from PIL import Image

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


def test_a_plan_for_a_set_that_is_not_here_reads_no_image(world, tmp_path, capsys):
    assert main([*call(world, tmp_path), "--dry-run", "--like", "3x500"]) == 0
    assert "1500" in capsys.readouterr().out


def test_one_command_gives_a_scored_set_and_repeats_nothing(world, tmp_path, capsys):
    assert main([*call(world, tmp_path), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "convnet3w32" in plan.splitlines()[0]  # trained first
    assert "not timed: selection, as its teacher convnet3w32 is trained first" in plan
    assert "there is no teacher" not in plan
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


def test_a_weak_teacher_of_its_own_needs_more_epochs(world, tmp_path, capsys):
    arguments = swap(call(world, tmp_path), "train_teachers.epochs=1")
    assert main([*arguments, "train_teachers.lr=0.0"]) == 2
    message = capsys.readouterr().err
    assert "near the chance of 33.3%: raise train_teachers.epochs (now 1)" in message
    assert "class order" not in message


def test_selection_by_a_method_alone_has_its_teacher_too(world):
    config = apply_settings(load_config("demo"), {"generate.model": str(world / "dit")})
    filled = fill_recipe(config, load_source(str(world / "images")), resolution=False, image_size=False)
    assert filled.generate.select == "none"
    assert filled.generate.select_teacher.path.startswith(f"{config.output_dir}-teacher")
    assert (filled.codec, filled.source) == (config.codec, config.source)


def test_a_trailing_slash_names_the_same_folders(world):
    assert settled(world, output_dir="out/").train_teachers.output_dir == "out-teacher"
    assert settled(world, **{"train_teachers.output_dir": "mine"}).train_teachers.output_dir == "mine"


def test_the_side_of_large_images_is_that_of_the_prior(world, tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (300, 200), (i, 0, 0)).save(folder / f"{i}.png")
    config = apply_settings(load_config("recommended"), {"generate.model": str(world / "dit")})
    side = native_resolution(str(world / "dit"))
    assert side == 8  # latents of 4 x 4 at half the side
    assert fill_recipe(config, load_source(str(tmp_path / "images"))).source.image_size == side


@pytest.mark.parametrize(
    "setting",
    [
        "generate.candidates=1",
        "methods.recommended.override={generate.candidates: 1}",
        "methods.recommended.override={generate: {snr: -1}}",
        "train_teachers.nets=[]",
        "train_teachers.nets=convnet33",
    ],
)
def test_what_a_run_would_refuse_is_refused_before_the_teacher_is_trained(world, tmp_path, capsys, setting):
    assert main(call(world, tmp_path, setting) if "nets" not in setting else swap(call(world, tmp_path), setting)) == 2
    assert capsys.readouterr().err.count("dq distill:") == 1
    assert not (tmp_path / "run-teacher").exists()


def swap(arguments, setting):
    """The arguments with another value of a setting."""
    key = setting.partition("=")[0]
    return [setting if a.startswith(f"{key}=") else a for a in arguments]


def test_dotted_overrides_of_a_method_are_checked_as_they_will_hold(world, tmp_path):
    override = "methods.recommended.override={generate.candidates: 3}"
    assert main([*call(world, tmp_path, override), "--dry-run"]) == 0


def test_a_teacher_of_other_settings_is_not_taken_for_the_one_that_is_meant(world, tmp_path, capsys):
    assert main(call(world, tmp_path)) == 0
    changed = swap(call(world, tmp_path), "train_teachers.epochs=41")
    capsys.readouterr()
    assert main(changed) == 1
    assert "teacher of other settings" in capsys.readouterr().err


def test_a_finished_run_continues_without_its_teacher(world, tmp_path):
    assert main(call(world, tmp_path)) == 0
    shutil.rmtree(tmp_path / "run-teacher")
    assert main(call(world, tmp_path)) == 0


def test_a_prior_whose_sizes_are_missing_is_named(world, tmp_path):
    shutil.copytree(world / "dit", tmp_path / "dit")
    file = tmp_path / "dit" / "transformer" / "config.json"
    config = json.loads(file.read_text())
    for size in ([8, 8], None, 0):
        file.write_text(json.dumps({**config, "sample_size": size}))
        with pytest.raises(InputError, match="sample_size"):
            native_resolution(str(tmp_path / "dit"))
