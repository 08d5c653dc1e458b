"""A dry run refuses what the run refuses, with the same sentence, and both before the first unit of work."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file
from toy_world import NAMES

from dq.cli.main import main
from dq.core.errors import InputError
from dq.core.files import check_place
from dq.networks.zoo import make_net

DIT = ("generate.mode=dit", "generate.model=WORLD/dit", "generate.num_inference_steps=4")
TEACHER = {"net": "convnet3", "path": "WORLD/teacher.safetensors", "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def other(world: Path) -> Path:
    """The world with a prior of other classes, a teacher of other classes, and a set made elsewhere."""
    from diffusers import DDIMScheduler
    from models import tiny_dit, tiny_kl

    from dq.run.distill import DistillPipeline

    parts = {"vae": tiny_kl(), "transformer": tiny_dit(), "scheduler": DDIMScheduler(clip_sample=False)}
    fruits = {str(i): name for i, name in enumerate(("fig", "kiwi", "melon"))}
    DistillPipeline(**parts, id2label=fruits).save_pretrained(world / "fruits")
    save_file(make_net("convnet3", 5, 8, seed=0).state_dict(), world / "five.safetensors")
    for name in NAMES:
        folder = world / "foreign" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), name).save(folder / "0.png")
    return world


def call(world: Path, out: Path, verb: str, *changes: str, flags: tuple[str, ...] = ()) -> list[str]:
    settings = {
        "output_dir": str(out / "run"),
        "cache_dir": str(out / "cache"),
        "source": {"path": str(world / "images")},
        "codec": {"path": str(world / "vae"), "resolution": 8},
        "ipc": [1],
        "evaluate": {"students": [{"net": "convnet3", "epochs": 1, "tests": 1}], "seeds": 1, "baselines": []},
        "prior": {"output_dir": str(out / "prior")},
        "train_teachers": {"output_dir": str(out / "teachers")},
        "train_pool": {"output_dir": str(out / "pool")},
        "train_experts": {"output_dir": str(out / "experts"), "net": "convnet2w4", "whiten": False},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "c.yaml").write_text(yaml.safe_dump(settings))
    last = {c.partition("=")[0]: c.replace("WORLD", str(world)) for c in changes}  # a key may be given once
    sets = ["--set", *last.values()] if changes else []
    named = [f.replace("WORLD", str(world)) for f in flags]
    return [verb, "--config", str(out / "c.yaml"), "--cpu", "--quiet", *sets, *named]


def wrong(setting: str) -> tuple[str, ...]:
    return (*DIT, setting)


SOFT = ("evaluate.students=[{net: convnet3, labels: soft, epochs: 1, augment: none}]",)


CASES = {
    # generator
    "no model": ("run", ("generate.mode=dit",), "generate.model is missing"),
    "no model, encode": ("encode", ("generate.mode=dit",), "generate.model is missing"),
    "no model, generate": ("generate", ("generate.mode=dit",), "generate.model is missing"),
    "other mode": ("run", (*DIT, "generate.mode=img2img"), "generate.mode=img2img needs a unet"),
    "no codec": ("run", ("codec.path=''",), "no codec is named"),
    "absent codec": ("run", ("codec.path=runs/nothing",), "there is no model folder runs/nothing"),
    "absent folder": ("encode", ("codec.path=/nowhere/vae",), "there is no model folder /nowhere/vae"),
    "absent model": ("run", ("generate.mode=dit", "generate.model=runs/x"), "there is no model folder runs/x"),
    "codec that is none": ("run", ("codec.path=WORLD/images",), "has no config.json"),
    "scheduler": ("run", wrong("generate.scheduler=DDMIScheduler"), "scheduler=DDMIScheduler is none"),
    "flow": (
        "run",
        wrong("generate.scheduler=FlowMatchEulerDiscreteScheduler"),
        "samples from models that predict a flow",
    ),
    "latent size": ("run", wrong("codec.resolution=16"), "gives 8x8 latents but the DiT takes 4x4"),
    "resolution": ("run", ("codec.resolution=9",), "is not a multiple of the codec's downscaling factor"),
    "two starts": ("run", wrong("generate.strength=0.5"), "give exactly one of generate.snr and generate.strength"),
    "no start": ("run", wrong("generate.snr=null"), "give exactly one of generate.snr and generate.strength"),
    "no step": ("run", (*DIT, "generate.snr=null", "generate.strength=0.1"), "is no step at all"),
    "more steps than trained": ("run", wrong("generate.num_inference_steps=2000"), "more than the 1000 steps that"),
    "more steps, Euler": (
        "run",
        (*DIT[:2], "generate.scheduler=EulerDiscreteScheduler", "generate.num_inference_steps=1001"),
        "more than the 1000 steps that",
    ),
    "steps in a report": (
        "prior-report",
        ("generate.model=WORLD/dit", "teachers=[TEACHER]", "generate.num_inference_steps=2000"),
        "more than the 1000 steps that",
    ),
    "inversion": (
        "run",
        (*DIT, "generate.noise=inversion", "generate.scheduler=DDPMScheduler"),
        "noise=inversion is deterministic",
    ),
    "class map": (
        "run",
        (*DIT, "generate.model=WORLD/fruits", "generate.class_map={blue: fig, green: kiwi, red: grape}"),
        "lacks class 'red' (class_map: 'grape')",
    ),
    "class map of others": ("run", wrong("generate.class_map={rad: '0'}"), "class_map names 'rad'"),
    "other classes": ("run", (*DIT, "generate.model=WORLD/fruits"), "lacks class"),
    "in an override": (
        "run",
        (*DIT, "methods={a: {override: {generate.scheduler: Foo}}}"),
        "generate.scheduler=Foo is none",
    ),
    # methods and folder
    "override": ("run", ("methods={a: {override: {codec.resolution: 4}}}",), "may set prune.*, cluster.*"),
    "ipc twice": ("run", ("ipc=[1,1]",), "names a number twice"),
    "space": ("encode", ("cluster.space=features",), "needs a teacher"),
    "baseline's name": ("run", ("methods={random: {}}",), "is that of a baseline"),
    "small class": (
        "run",
        ("ipc=[1,100]", "cluster.on_small=raise"),
        "class 0 'blue' has 7 images but ipc=100; lower ipc, drop the class, or set cluster.on_small=clamp",
    ),
    "small class, encode": ("encode", ("ipc=[100]", "cluster.on_small=raise"), "has 7 images but ipc=100"),
    "small class of a method": (
        "run",
        ("ipc=[100]", "methods={a: {override: {cluster.on_small: raise}}}"),
        "has 7 images but ipc=100; lower ipc, drop the class, or set methods.a.override.cluster.on_small=clamp",
    ),
    # stages
    "soft without teacher": ("run", SOFT, "students with labels=soft need a teacher"),
    "soft without teacher, evaluate": ("evaluate", SOFT, "students with labels=soft need a teacher"),
    "absent teacher": ("run", ("teachers=[{net: convnet3, path: WORLD/none}]",), "there is no teacher at"),
    "teacher of other classes": ("label", ("teachers=[{net: convnet3, path: WORLD/five.safetensors}]",), "5"),
    "teacher of another network": (
        "run",
        ("teachers=[{net: resnet20, path: WORLD/teacher.safetensors}]",),
        "resnet20",
    ),
    "stage without teacher": ("refine", ("refine=[{stage: fadrm}]",), "needs a teacher"),
    "unknown student": ("run", ("evaluate.students=[{net: convnet9x}]",), "convnet9x"),
    "test images of half the side": (
        "run",
        ("evaluate.students=[{test_scale: 0.5}]",),
        "must be a number of at least 1",
    ),
    "whitening of large images": (
        "run",
        ("source.image_size=72", "evaluate.students=[{whiten: true}]"),
        "too large at 72 px",
    ),
    "cache in a file": (
        "run",
        ("cache_dir=WORLD/teacher.safetensors",),
        "is not a folder; choose another",
    ),
    "output under a file": (
        "encode",
        ("output_dir=WORLD/teacher.safetensors/a/b",),
        "teacher.safetensors, which is not",
    ),
    # other verbs
    "codec under a file": ("train-codec", ("prior.output_dir=WORLD/teacher.safetensors/a",), "prior.output_dir="),
    "teachers under a file": (
        "train-teachers",
        ("train_teachers.output_dir=WORLD/teacher.safetensors",),
        "train_teachers.output_dir=",
    ),
    "pool's cache in a file": ("train-pool", ("cache_dir=WORLD/teacher.safetensors",), "cache_dir="),
    "codec's resolution": ("train-codec", ("codec.resolution=9",), "codec.resolution=9 is not a multiple of 2"),
    "tiny channels": (
        "train-codec",
        ("prior.codec.architecture=tiny", "prior.codec.block_out_channels=[8,16]"),
        "differ by level",
    ),
    "codec's start": ("train-codec", ("prior.codec.init=runs/x",), "there is no model folder runs/x"),
    "untrained codec": ("train-codec", ("prior.codec.steps=0",), "would save untrained weights"),
    "patch": ("train-denoiser", ("prior.denoiser.patch_size=3",), "does not divide the latents' side 4"),
    "denoiser's start": (
        "train-denoiser",
        ("codec.path=WORLD/dit/vae", "prior.denoiser.init=WORLD/dit", "prior.denoiser.objective=flow"),
        "was trained for noise prediction",
    ),
    "denoiser's codec": ("train-denoiser", ("codec.path=runs/x",), "there is no model folder runs/x"),
    "teacher's network": ("train-teachers", ("train_teachers.nets=[resnet7]",), "resnet7"),
    "experts' network": ("train-experts", ("train_experts.net=resnet20",), "gathers statistics over batches"),
    "experts' order": ("train-experts", ("train_experts.curriculum={order: WORLD/none}",), "there is no file"),
    "no network": ("train-teachers", ("train_teachers.nets=[]",), "must name networks, each once"),
    "pool's epochs": ("train-pool", ("train_pool.epochs=[2,40]",), "must end before the training does"),
    "pool's base": (
        "train-pool",
        ("train_pool.generation=post", "train_pool.base={net: convnet3, path: WORLD/none}"),
        "there is no teacher at",
    ),
    "no prior": ("prior-report", (), "no prior is named"),
    "report of other classes": (
        "prior-report",
        ("generate.model=WORLD/fruits", "teachers=[TEACHER]"),
        "lacks class",
    ),
}
SETS = {
    "soft set without teacher": (("--protocol", "fadrm", "--student", "convnet3"), "need a teacher"),
    "absent set": (("--protocol", "hard", "--distilled", "WORLD/nothing"), "nothing"),
    "ddr and ipc": (("--protocol", "ddr", "--ipc", "1"), "leave --ipc out"),
}


def both(command: list[str], capsys: pytest.CaptureFixture) -> list[tuple[int, str]]:
    outcomes = []
    for extra in ([], ["--dry-run"]):
        code = main([*command, *extra])
        outcomes.append((code, capsys.readouterr().err))
    return outcomes


def made(out: Path) -> list[str]:
    return sorted(f.name for f in out.rglob("*") if f.suffix in (".safetensors", ".json", ".png"))


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_refuses_what_the_run_refuses(
    name: str, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    verb, changes, message = CASES[name]
    teacher = yaml.safe_dump(TEACHER, default_flow_style=True).strip()
    changes = tuple(c.replace("TEACHER", teacher) for c in changes)
    (code, messages), (dry_code, dry_said) = both(call(other, tmp_path, verb, *changes), capsys)
    assert (code, dry_code) == (2, 2)
    assert message in messages
    assert messages == dry_said
    assert made(tmp_path) == []


@pytest.mark.parametrize("name", SETS)
def test_sets_made_elsewhere_are_checked_alike(
    name: str, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags, message = SETS[name]
    if "--distilled" not in flags:
        flags = (*flags, "--distilled", "WORLD/foreign")
    command = ["evaluate", "--data", str(other / "images"), "--output_dir", str(tmp_path / "out"), "--cpu", "--quiet"]
    command += [f.replace("WORLD", str(other)) for f in flags]
    (code, messages), (dry_code, dry_said) = both(command, capsys)
    assert (code, dry_code) == (2, 2)
    assert message in messages
    assert messages == dry_said
    assert made(tmp_path) == []


@pytest.mark.parametrize("verb", ["run", "encode", "cluster", "generate", "refine", "label", "evaluate", "report"])
def test_right_settings_pass(verb: str, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*call(other, tmp_path, verb, *DIT, "evaluate.students=[]"), "--dry-run"]) == 0
    assert "encode      24 images at 8 px" in capsys.readouterr().out
    assert made(tmp_path) == []


@pytest.mark.parametrize(
    ("verb", "changes", "line"),
    [
        ("train-codec", (), "an autoencoder at 8 px, 2000 steps of 64 images"),
        ("train-codec", ("prior.codec.steps=0", "prior.codec.init=WORLD/vae"), "by channel, over 24 images at 8 px"),
        ("train-denoiser", (), "a DiT, 3000 steps of 128 latents, from scratch"),
        ("train-teachers", (), "resnet20, 30 epochs each, at 8 px"),
        ("train-experts", (), "100 x convnet2w4 at 8 px, 100 epochs each by gsam, 480000 images forward and backward"),
        (
            "train-pool",
            ("train_pool.epochs=[2,4,6]",),
            "resnet20 is trained for train_teachers.epochs=30 epochs: its state after 2, 4, 6",
        ),
    ],
)
def test_a_plan_of_training_says_what_it_trains(
    verb: str, changes: tuple[str, ...], line: str, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*call(other, tmp_path, verb, *changes), "--dry-run"]) == 0
    assert line in capsys.readouterr().out
    assert made(tmp_path) == []


def test_a_folder_of_another_run_is_refused_in_a_dry_run(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(call(other, tmp_path, "encode")) == 0
    assert main(call(other, tmp_path, "cluster")) == 0
    capsys.readouterr()
    changed = call(other, tmp_path, "encode", "seed=3")
    (code, message), (dry_code, dry_said) = both(changed, capsys)
    assert (code, dry_code) == (2, 2)
    assert message == dry_said
    assert "belongs to a run with other settings (seed: 0 -> 3)" in message


def test_the_way_out_of_a_small_class_works_in_the_same_folder(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("a", "b"):
        folder = tmp_path / "twice" / name
        folder.mkdir(parents=True)
        for i in range(3):  # b has one image three times, which the cluster stage finds out
            Image.new("RGB", (8, 8), (90 * i if name == "a" else 0, 60, 9)).save(folder / f"{i}.png")
    settings = ("ipc=[3]", f"source.path={tmp_path / 'twice'}", "source.test_split=none", "evaluate.students=[]")
    strict = (*settings, "cluster.on_small=raise")
    assert main(call(other, tmp_path, "encode", *strict)) == 0
    assert main(call(other, tmp_path, "cluster", *strict)) == 2
    assert "set cluster.on_small=clamp" in capsys.readouterr().err
    assert main(call(other, tmp_path, "cluster", *settings)) == 0


@pytest.mark.parametrize(
    ("done", "change", "code"),
    [
        (("encode",), "cluster.init=random", 0),
        (("encode",), "generate.class_map={red: red}", 0),
        (("encode", "cluster"), "cluster.init=random", 2),
        (("encode", "cluster"), "generate.num_inference_steps=9", 0),
        (("encode", "cluster", "generate"), "generate.num_inference_steps=9", 2),
        (("encode",), "codec.posterior=sample", 2),
    ],
)
def test_settings_that_nothing_was_made_by_may_change(
    done: tuple[str, ...], change: str, code: int, other: Path, tmp_path: Path
) -> None:
    for verb in done:
        assert main(call(other, tmp_path, verb)) == 0
    assert main(call(other, tmp_path, "cluster", change)) == code


@pytest.mark.parametrize("verb", ["train-teachers", "train-pool"])
def test_a_folder_of_other_networks_is_refused_in_a_dry_run(
    verb: str, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    nets = ("train_teachers.nets=[convnet3w32]", "train_pool.net=convnet3w32", "train_pool.epochs=[1]")
    nets = (*nets, "train_teachers.batch_size=64", "train_pool.window=[0.0,100.0]")
    assert main(call(other, tmp_path, verb, *nets, "train_teachers.epochs=2")) == 0
    capsys.readouterr()
    assert main([*call(other, tmp_path, verb, *nets, "train_teachers.epochs=2"), "--dry-run"]) == 0
    (code, message), (dry_code, dry_said) = both(call(other, tmp_path, verb, *nets, "train_teachers.epochs=3"), capsys)
    assert (code, dry_code) == (1, 1)
    assert message == dry_said
    assert "of other settings or data; choose another train_" in message


def test_a_folder_of_another_denoiser_is_refused_before_images_are_encoded(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    small = ("prior.denoiser.size=3M", "prior.denoiser.batch_size=4", "prior.denoiser.save_every=100")
    steps = "prior.denoiser.steps={}".format
    assert main(call(other, tmp_path, "train-denoiser", *small, steps(1))) == 0
    capsys.readouterr()
    assert main([*call(other, tmp_path, "train-denoiser", *small, steps(1)), "--dry-run"]) == 0
    capsys.readouterr()
    changed = call(other, tmp_path, "train-denoiser", *small, steps(2), f"cache_dir={tmp_path / 'new'}")
    (code, message), (dry_code, dry_said) = both(changed, capsys)
    assert (code, dry_code) == (1, 1)
    assert message == dry_said
    assert "holds a denoiser of other settings, data or classes; choose another prior.output_dir" in message
    assert not (tmp_path / "new").exists()


def test_python_refuses_before_it_encodes(toy_source, tmp_path: Path) -> None:
    from models import tiny_dit, tiny_kl

    from dq import GenerateConfig, InputError
    from dq.run.distill import DistillPipeline

    pipe = DistillPipeline(vae=tiny_kl(), transformer=tiny_dit())
    with pytest.raises(InputError, match="needs a scheduler"):
        pipe.distill(
            toy_source,
            ipc=1,
            output_dir=tmp_path / "run",
            cache_dir=tmp_path / "cache",
            generate=GenerateConfig(mode="dit"),
        )
    with pytest.raises(InputError, match="output_dir is the path of a folder such as 'runs/mine', not None"):
        pipe.distill(toy_source, output_dir=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("net", ["timm:resnet18", "torchvision:resnet18"])
def test_a_published_teacher_needs_its_library_before_anything_is_made(
    net: str, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    teacher = f"teachers=[{{net: '{net}', path: pretrained}}]"
    (code, message), (dry_code, dry_said) = both(call(other, tmp_path, "run", teacher), capsys)
    assert (code, dry_code) == (2, 2)
    assert "which is not installed; pip install" in message
    assert message == dry_said
    assert made(tmp_path) == []


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write everywhere
    with pytest.raises(InputError, match=r"output_dir=.*/new cannot be written, as .* may not be"):
        check_place(tmp_path / "new", "output_dir")
    with pytest.raises(InputError, match="cache_dir"):
        check_place(tmp_path / "new", "cache_dir", reads=True)
    check_place(tmp_path, "cache_dir", reads=True)
