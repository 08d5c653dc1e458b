"""`dq distill FOLDER` for images without a prior, and often without a test split."""

import html
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dq.cli.main import main
from dq.config.methods import check_methods
from dq.config.overrides import apply_settings
from dq.config.schema import RunConfig, load_config
from dq.core.errors import InputError
from dq.data import images as images_module
from dq.data.images import image_side, read_images
from dq.data.load import load_source
from dq.distilled.external import load_set
from dq.evaluation.results import read_records
from dq.evaluation.verdicts import rankings
from dq.run import recipe
from dq.run.recipe import fill_codec, fill_representatives, fit_students, prior_of_classes

QUICK = ["evaluate.seeds=1", "evaluate.students=[{net: convnet3w32, labels: hard, epochs: 1, batch_size: 8}]"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders of noise at two sizes, without splits."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, n in (("cat", 10), ("été & co", 7)):
        (folder / name).mkdir()
        for i in range(n):
            pixels = rng.integers(0, 256, (12, 16 if i % 2 else 12, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"IMG {i}.png")
    return folder


def distill(photos, tmp_path, *more, verb="distill"):
    folders = ["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")]
    return [verb, str(photos), *folders, "--ipc", "2", "--cpu", *more]


def test_a_folder_alone_gives_a_scored_set_of_its_own_images(photos, tmp_path, caplog):
    assert main(distill(photos, tmp_path, "--set", *QUICK)) == 0
    assert "3 of its 17 images" in caplog.text
    assert "no prior is named" in caplog.text
    made = load_set(tmp_path / "run")
    assert made.class_names == ("cat", "été & co")
    assert made.images.shape == (4, 3, 12, 12)
    source = load_source(str(photos), test_share=0.2)
    real = read_images(source.train, made.source_row.tolist(), 12, "crop")[0]
    assert torch.equal(made.images, real)
    assert (source.train.labels[made.source_row] == made.labels.numpy()).all()
    summary = (tmp_path / "run" / "eval" / "summary.csv").read_text()
    assert {"recommended", "random", "nearest"} <= set(summary.replace("\n", ",").split(","))


def test_init_writes_what_distill_runs(photos, tmp_path, capsys):
    assert main(distill(photos, tmp_path / "a", "--set", *QUICK)) == 0
    file = tmp_path / "mine.yaml"
    assert main(distill(photos, tmp_path / "b", str(file), "--set", *QUICK, verb="init")) == 0
    assert not (tmp_path / "b").exists()
    assert main(["run", "--config", str(file), "--cpu"]) == 0
    one, other = (load_set(tmp_path / run / "run") for run in ("a", "b"))
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.weights, other.weights)
    assert main(distill(photos, tmp_path / "b", str(file), verb="init")) == 2
    assert "exists" in capsys.readouterr().err


def test_the_file_of_init_runs_from_any_folder(photos, tmp_path, monkeypatch):
    folder = tmp_path / "here" / "my photos"
    for name, directory in (("cat", "-a cat"), ("été & co", "Été: #1's")):
        shutil.copytree(photos / name, folder / directory)
    shutil.copytree(recipe.shipped(recipe.CODEC), tmp_path / "here" / "codec")
    monkeypatch.chdir(tmp_path / "here")
    settings = ["--ipc", "2", "--set", *QUICK, "codec.path=codec"]
    assert main(["init", "my photos", "my file.yaml", "--cpu", *settings]) == 0
    assert f"dq run --config '{'my file.yaml'}'" in (tmp_path / "here" / "my file.yaml").read_text()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    assert main(["run", "--config", "../here/my file.yaml", "--output_dir", "run", "--cpu"]) == 0
    assert load_set("run").class_names == ("-a cat", "Été: #1's")


def filled(photos, given=(), device="cpu", **changes):
    config = apply_settings(load_config("recommended"), {"source.path": str(photos), **changes})
    return fill_representatives(config, load_source(config.source), device, lambda key: key in given)


def test_sizes_follow_from_the_images(photos):
    config = filled(photos)
    assert (config.source.image_size, config.codec.resolution) == (12, 32)
    config = filled(photos, **{"source.image_size": 33})
    assert (config.source.image_size, config.codec.resolution) == (33, 40)
    config = filled(photos, given=("codec.resolution",), **{"codec.resolution": 64})
    assert (config.source.image_size, config.codec.resolution) == (12, 64)


@pytest.mark.parametrize(("device", "side"), [("cpu", 64), ("cuda", 128)])
def test_large_images_are_shrunk_to_what_students_of_the_device_take(tmp_path, device, side):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (500, 375 + i), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    config = filled(tmp_path, device=device)
    assert (config.source.image_size, config.codec.resolution) == (side, side)


def test_the_side_is_the_median_of_images_that_can_be_read(tmp_path):
    (tmp_path / "a").mkdir()
    for i, side in enumerate((8, 20, 20, 90)):
        Image.new("RGB", (side, side + 1), (i, 0, 0)).save(tmp_path / "a" / f"{i}.png")
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    assert image_side(load_source(str(tmp_path)).train) == 20


def test_what_the_user_sets_stays(photos):
    config = filled(photos, given=("generate.batch_size",), **{"generate.batch_size": 7})
    assert config.generate.batch_size == 7
    assert config.generate.select == "none"
    methods = {"mine": {"weights": "mass"}}
    assert list(filled(photos, given=("methods",), **{"methods": methods}).methods) == ["mine"]


def test_real_candidates_are_selected_by_a_teacher_that_the_recipe_trains(photos):
    config = filled(photos, **{"generate.real_candidates": 3})
    recipe = load_config("recommended")
    assert (config.generate.select, config.generate.candidates) == ("transport", 1)
    assert config.train_teachers.nets == recipe.train_teachers.nets
    assert config.generate.select_teacher.net == recipe.train_teachers.nets[0]
    assert config.generate.select_teacher.path.startswith(f"{config.train_teachers.output_dir}/")
    check_methods(config)
    plain = filled(photos)
    assert (plain.generate.select, plain.generate.select_teacher) == ("none", None)
    unused = filled(photos, given=("generate.select",), **{"generate.select": "transport"})
    assert unused.generate.select_teacher is None  # one real image each leaves nothing to select, and nobody to train
    with pytest.raises(InputError, match=r"train_teachers\.nets must name the network that selects"):
        filled(photos, **{"generate.real_candidates": 3, "train_teachers.nets": []})


def test_without_the_codec_of_the_repository_the_way_out_is_named(photos, monkeypatch):
    monkeypatch.setattr(recipe, "shipped", lambda name: None)
    with pytest.raises(InputError, match=r"codec\.path"):
        filled(photos)
    assert filled(photos, **{"codec.path": "mine"}).codec.path == "mine"


def test_a_shipped_prior_draws_the_classes_that_it_knows():
    index = json.loads((recipe.shipped("cifar10") / "model_index.json").read_text())
    names = list(index["id2label"].values())
    assert prior_of_classes([n.upper() for n in names]).name == "cifar10"
    assert prior_of_classes(names[:9]) is None
    assert prior_of_classes(names[::-1]) is None


@pytest.mark.parametrize(
    ("side", "net", "epochs"), [(28, "convnet3w64", 300), (64, "convnet4w32", 150), (65, "convnet5w32", 150)]
)
def test_students_fit_the_side_of_the_images(side, net, epochs):
    config = fit_students(apply_settings(load_config("recommended"), {"source.image_size": side}), "cpu")
    assert (config.evaluate.students[0]["net"], config.evaluate.students[0]["epochs"]) == (net, epochs)
    wide = fit_students(apply_settings(load_config("recommended"), {"source.image_size": side}), "cuda")
    assert (wide.evaluate.students[0]["net"][8:], wide.evaluate.students[0]["epochs"]) == ("w64", 300)


def test_one_class_is_refused(tmp_path, capsys):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "photos" / "cat" / f"{i}.png")
    assert main(distill(tmp_path / "photos", tmp_path)) == 2
    assert "one class, 'cat'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_epochs_of_students_are_an_option(photos, tmp_path):
    file = tmp_path / "mine.yaml"
    assert main(distill(photos, tmp_path, str(file), "--epochs", "3", verb="init")) == 0
    assert load_config(str(file)).evaluate.students[0]["epochs"] == 3


def test_a_run_takes_the_codec_of_its_prior(world, tmp_path):
    plain = apply_settings(RunConfig(), {"generate.mode": "dit", "generate.model": str(world / "dit")})
    filled = fill_codec(plain)
    assert (filled.codec.path, filled.codec.resolution) == (str(world / "dit"), 8)
    named = apply_settings(plain, {"codec.path": "other"})
    assert fill_codec(named) == named
    assert fill_codec(RunConfig()) == RunConfig()
    file = tmp_path / "run.yaml"
    shutil.copytree(world / "images", tmp_path / "images")
    file.write_text(
        f"source: {{path: {tmp_path / 'images'}}}\nipc: 1\noutput_dir: {tmp_path / 'run'}\n"
        f"cache_dir: {tmp_path / 'cache'}\ncodec: {{batch_size: 4}}\nevaluate: {{students: []}}\n"
        f"generate: {{mode: dit, model: {world / 'dit'}, num_inference_steps: 2}}\n"
    )
    assert main(["run", "--config", str(file), "--cpu"]) == 0
    assert load_set(tmp_path / "run").images.shape[-1] == 8


def test_the_same_command_again_reads_no_image_and_writes_no_report(photos, tmp_path, monkeypatch):
    command = distill(photos, tmp_path, "--image_size", "12", "--set", *QUICK)
    assert main(command) == 0
    page, reads = tmp_path / "run" / "report.html", []
    made = page.stat().st_mtime_ns

    def count(image, *args, **kwargs):
        reads.append(image)
        return open_image(image, *args, **kwargs)

    open_image = images_module.open_image
    monkeypatch.setattr(images_module, "open_image", count)
    assert main(command) == 0
    assert (reads, page.stat().st_mtime_ns) == ([], made)


@pytest.mark.parametrize("change", ["page", "figure", "evaluation", "verb"])
def test_a_report_is_made_again_when_it_or_what_it_shows_has_changed(photos, tmp_path, change):
    command = distill(photos, tmp_path, "--set", *QUICK)
    assert main(command) == 0
    page = tmp_path / "run" / "report.html"
    made = page.stat().st_mtime_ns
    if change == "page":
        page.unlink()
    elif change == "figure":
        next((tmp_path / "run" / "figures").iterdir()).unlink()
    elif change == "evaluation":
        command[command.index("evaluate.seeds=1")] = "evaluate.seeds=2"
    if change == "verb":
        config, cache = tmp_path / "run" / "config.yaml", tmp_path / "cache"
        command = ["report", "--config", str(config), "--cache_dir", str(cache), "--cpu"]
    assert main(command) == 0
    assert page.stat().st_mtime_ns != made


def test_the_card_of_the_sets_opens_with_the_verdict_of_the_report(photos, tmp_path):
    settings = [s.replace("seeds=1", "seeds=2") for s in QUICK]
    assert main(distill(photos, tmp_path, "--set", *settings)) == 0
    ranking, *_ = rankings(*(read_records(tmp_path / "run" / "eval" / f) for f in ("summary.csv", "comparisons.csv")))
    assert ranking.headline in (tmp_path / "run" / "report.html").read_text()
    card = html.unescape((tmp_path / "run" / "dataset" / "README.md").read_text())
    opening = card.partition("# A distilled image set")[2].partition("## Use")[0]
    assert f"**convnet3w32, hard, IPC 2: {ranking.headline}**" in opening
