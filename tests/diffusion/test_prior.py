import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forking import Forked
from models import tiny_kl
from safetensors.torch import load_file
from small_prior import (
    CODEC,
    NAMES,
    assert_nearly_same_model,
    assert_same_model,
    captured,
    encoded,
    every_image,
    interrupted_at_save,
    metrics,
    prior_in,
)
from torch import nn

from dq.config.prior import TrainCodecConfig, TrainDenoiserConfig
from dq.config.reader import from_dict
from dq.config.schema import CodecConfig
from dq.core.errors import InputError, RunError
from dq.core.files import read_json, read_metadata, read_tensors
from dq.core.processes import make_accelerator
from dq.core.seeds import generator
from dq.data.load import load_source
from dq.diffusion.codec import decode_latents, encode_latents, load_codec, to_signed
from dq.diffusion.prior import denoiser_data, training
from dq.diffusion.prior import train_codec as codec_module
from dq.diffusion.prior.denoiser_data import split_rows
from dq.diffusion.prior.denoiser_loss import DenoiserLoss
from dq.diffusion.prior.train_codec import CodecLoss, new_codec, psnr, train_codec
from dq.diffusion.prior.train_denoiser import new_denoiser, train_denoiser

ROOT = Path(__file__).resolve().parents[2]


def mean_loss(objective, **batch) -> float:
    with torch.no_grad():
        return float(objective.eval()(**batch)["loss"].mean())


# --- learning -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_codec_learns(made, toy_source):
    images, _ = every_image(toy_source, "test")
    batch = {"images": images, "noise": torch.randn(len(images), 2, 4, 4, generator=generator("test"))}
    untrained = mean_loss(CodecLoss(new_codec(made.prior, 8), 0.0), **batch)
    assert mean_loss(CodecLoss(made.codec, 0.0), **batch) < 0.3 * untrained
    log = metrics(made.folder, "codec")
    assert [line["step"] for line in log] == [45, 90, 120]
    # the logged PSNR is that of the averaged weights that were saved
    back = made.codec.decode(made.codec.encode(to_signed(images)).latent_dist.mode()).sample.clamp(-1, 1)
    assert log[-1]["psnr"] == pytest.approx(psnr(back, to_signed(images)), abs=1e-3)
    record = read_json(made.vae / "training.json")
    assert (record["psnr"], record["ssim"]) == (log[-1]["psnr"], log[-1]["ssim"])
    assert record["held_out_images"] == len(images) == 12


def test_denoiser_learns(made, toy_source):
    from diffusers import DiTTransformer2DModel

    images, labels = every_image(toy_source, "test")
    z = encode_latents(made.codec, to_signed(images)).repeat(20, 1, 1, 1)
    g = generator("test")
    batch = {"latents": z, "noise": torch.randn(z.shape, generator=g), "level": torch.rand(len(z), generator=g)}
    trained = DiTTransformer2DModel.from_pretrained(made.folder / "transformer")
    loss = mean_loss(DenoiserLoss(trained), labels=labels.repeat(20), **batch)
    untrained = new_denoiser(made.prior, made.cache.shape, 3)
    assert loss < 0.7 * mean_loss(DenoiserLoss(untrained), labels=labels.repeat(20), **batch)
    # it uses the class: a wrong one makes the noise harder to tell
    assert loss < mean_loss(DenoiserLoss(trained), labels=(labels.repeat(20) + 1) % 3, **batch)


def test_latents_have_unit_variance_in_every_channel(made):
    z = torch.cat([made.cache.load(c)[0].float() for c in range(3)])
    assert len(z) == 24
    assert z.mean((0, 2, 3)).tolist() == pytest.approx([0, 0], abs=1e-3)  # cached in float16
    assert z.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1], abs=1e-3)
    assert made.codec.config.scaling_factor == 1.0


# --- what is written ----------------------------------------------------------------------------------------------


def test_folder_opens_in_stock_diffusers(made, toy_source):
    from diffusers import AutoencoderKL, DiTPipeline

    vae = AutoencoderKL.from_pretrained(made.vae)
    assert vae.config.sample_size == 8
    pipe = DiTPipeline.from_pretrained(made.folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {"red": 0, "green": 1, "blue": 2}
    assert pipe.transformer.config.out_channels == pipe.transformer.config.in_channels == 2
    assert pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings == 4
    assert not pipe.scheduler.config.clip_sample
    for name, p in vae.state_dict().items():
        assert torch.equal(p, pipe.vae.state_dict()[name])
    # Without guidance: the stock pipeline takes class 1000 for the null class, which only ImageNet has there.
    labels = [c for c in range(3) for _ in range(6)]
    images = pipe(
        labels, guidance_scale=1.0, num_inference_steps=20, generator=generator("test"), output_type="pt"
    ).images
    assert images.shape == (18, 3, 8, 8)
    assert (images.mean((2, 3)).argmax(1) == torch.tensor(labels)).float().mean() > 0.9


def test_flow_prior_draws_class_colors_in_the_stock_pipeline(made, accelerator, tmp_path):
    from diffusers import DiTPipeline, DPMSolverMultistepScheduler

    prior = prior_in(tmp_path, denoiser={"objective": "flow", "weighting": "logit_normal", "steps": 120})
    train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    pipe = DiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is DPMSolverMultistepScheduler
    assert pipe.scheduler.config.use_flow_sigmas
    assert pipe.scheduler.config.prediction_type == "flow_prediction"
    labels = [c for c in range(3) for _ in range(6)]
    images = pipe(
        labels, guidance_scale=1.0, num_inference_steps=20, generator=generator("test"), output_type="pt"
    ).images
    assert (images.mean((2, 3)).argmax(1) == torch.tensor(labels)).float().mean() > 0.9
    # and they are like the data: 0.85 in the channel of the class and 0.15 in the others
    means = images.view(3, 6, 3, 8, 8).mean((1, 3, 4))
    torch.testing.assert_close(means, 0.15 + 0.7 * torch.eye(3), atol=0.1, rtol=0)


def test_grids_are_drawn_at_every_save(made):
    from PIL import Image

    names = sorted(p.name for p in (made.folder / "samples").iterdir() if p.name != "losses.png")
    assert (made.folder / "samples" / "losses.png").is_file()
    steps = [f"codec-{s:06d}.png" for s in (45, 90, 120)] + [f"denoiser-{s:06d}.png" for s in (100, 200, 240)]
    assert names == steps
    # gap 2 px: 12 originals over 12 reconstructions, 3 classes of 8 samples
    assert Image.open(made.folder / "samples" / "codec-000120.png").size == (8 * (12 * 10 - 2), 8 * (2 * 10 - 2))
    assert Image.open(made.folder / "samples" / "denoiser-000240.png").size == (6 * (8 * 10 - 2), 6 * (3 * 10 - 2))


def test_nothing_unfinished_is_left(made):
    assert sorted(p.name for p in made.folder.iterdir()) == [
        ".dtypes.json", "metrics.jsonl", "model_index.json", "samples", "scheduler", "transformer", "vae",
    ]  # fmt: skip


# --- normalized latents -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(toy_source, tmp_path_factory):
    """A codec whose latents are not normalized, and latents of it."""
    codec = tiny_kl(scaling_factor=0.3, shift_factor=0.1)
    return SimpleNamespace(codec=codec, cache=encoded(toy_source, tmp_path_factory.mktemp("plain"), codec))


@torch.no_grad()
def test_denoiser_comes_with_a_codec_of_normal_latents(plain, toy_source, accelerator, tmp_path, monkeypatch):
    from diffusers import DiTPipeline

    images, _ = every_image(toy_source)
    old = encode_latents(plain.codec, to_signed(images))
    assert (old.std((0, 2, 3)) - 1).abs().min() > 0.1
    prior = prior_in(tmp_path, denoiser={"steps": 2})
    loop = captured(monkeypatch, plain.cache, plain.codec, prior, class_names=NAMES, accelerator=accelerator)
    seen = torch.cat([loop.batch(step)["latents"] for step in range(20)])
    assert seen.mean((0, 2, 3)).abs().max() < 0.1
    assert (seen.std((0, 2, 3)) - 1).abs().max() < 0.1
    with torch.enable_grad():
        train_denoiser(plain.cache, plain.codec, prior, class_names=NAMES, accelerator=accelerator)
    codec = load_codec(tmp_path)
    z = encode_latents(codec, to_signed(images))
    assert z.mean((0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=2e-3)  # statistics are of float16 latents
    assert z.std((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 4, abs=2e-3)
    # trained on what this codec gives
    rows = (seen.flatten(1)[:, None] - z.flatten(1)).abs().amax(2).min(1)
    assert rows.values.max() < 0.02
    record = read_json(tmp_path / "transformer" / "training.json")
    assert record["channel_mean"] == pytest.approx(old.mean((0, 2, 3)).tolist(), abs=2e-3)
    assert record["channel_std"] == pytest.approx(old.std((0, 2, 3), correction=0).tolist(), abs=2e-3)
    # and the stock pipeline decodes as we do
    pipe = DiTPipeline.from_pretrained(tmp_path)
    stock = pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(stock, decode_latents(plain.codec, old), atol=1e-4, rtol=0)


def test_codec_of_the_folder_must_be_normal(plain, accelerator, tmp_path):
    plain.codec.save_pretrained(tmp_path / "vae")
    prior = prior_in(tmp_path, denoiser={"steps": 2})
    with pytest.raises(RunError, match=r"vae .*channel.*normalize=none"):
        train_denoiser(plain.cache, plain.codec, prior, class_names=NAMES, accelerator=accelerator)
    before = {p: p.read_bytes() for p in (tmp_path / "vae").iterdir()}
    prior = prior_in(tmp_path, denoiser={"steps": 2, "normalize": "none"})
    train_denoiser(plain.cache, plain.codec, prior, class_names=NAMES, accelerator=accelerator)
    assert {p: p.read_bytes() for p in (tmp_path / "vae").iterdir()} == before
    assert read_json(tmp_path / "transformer" / "training.json")["channel_std"] == [1.0] * 4


# --- averages, parts of a batch, processes ------------------------------------------------------------------------


def test_held_out_latents_are_never_in_a_batch(made, accelerator, tmp_path, monkeypatch):
    prior = prior_in(tmp_path, denoiser={"weighting": "logit_normal", "objective": "flow", "held_out": 2})
    loop = captured(monkeypatch, made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    z = torch.cat([made.cache.load(c)[0].float() for c in range(3)]).flatten(1)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([9, 8, 7]))
    drawn, levels, nulls = set(), [], 0
    for step in range(100):
        b = loop.batch(step)
        rows = (b["latents"].flatten(1)[:, None] == z).all(2).int().argmax(1)
        assert torch.equal(z[rows], b["latents"].flatten(1))  # this codec's latents are normal as they are
        null = b["labels"] == 3
        assert torch.equal(b["labels"][~null], labels[rows][~null])
        drawn |= set(rows.tolist())
        nulls += int(null.sum())
        levels.append(b["level"])
    assert len(drawn) == 24 - 2
    again = loop.batch(7)
    assert all(torch.equal(again[k], v) for k, v in loop.batch(7).items())
    # logit-normal: 3200 draws, four standard errors
    logits = torch.cat(levels).logit()
    assert float(logits.mean()) == pytest.approx(0, abs=4 / 3200**0.5)
    assert float(logits.std()) == pytest.approx(1, abs=4 / 6400**0.5)
    assert nulls / 3200 == pytest.approx(0.1, abs=4 * (0.09 / 3200) ** 0.5)
    assert [len(part) for part in split_rows(9, 512, 0)] == [0, 9]
    assert [len(part) for part in split_rows(9000, 512, 0)] == [512, 8488]


def test_the_average_with_the_least_held_out_loss_is_published(made, accelerator, tmp_path):
    from diffusers import DiTTransformer2DModel

    def trained(name: str, *decays: float) -> Path:
        prior = prior_in(tmp_path / name, denoiser={"steps": 60, "save_every": 60, "ema": decays})
        return train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)

    decays = (0.3, 0.6, 0.85)
    folder = trained("all", *decays)
    record, log = read_json(folder / "transformer" / "training.json"), metrics(folder, "denoiser")
    scores = {decay: log[-1][f"held_out_{decay:g}"] for decay in decays}
    assert len(set(scores.values())) == 3
    assert record["held_out_loss"] == min(scores.values()) == scores[record["ema"]]
    assert (record["train_images"], record["held_out_images"]) == (22, 2)
    # the very model that a training with this decay alone gives
    assert_same_model(trained("alone", record["ema"]) / "transformer", folder / "transformer")
    other = next(decay for decay in scores if decay != record["ema"])
    worse = read_json(trained("other", other) / "transformer" / "training.json")
    assert (worse["ema"], worse["held_out_loss"]) == (other, scores[other])
    # the loss is that of the published model on the rows held out, levels evenly spread
    z = torch.cat([made.cache.load(c)[0].float() for c in range(3)])
    held, _ = split_rows(24, 512, 0)
    g = generator(0, "denoiser held out")
    loss = mean_loss(
        DenoiserLoss(DiTTransformer2DModel.from_pretrained(folder / "transformer")),
        latents=z[held],
        noise=torch.randn(2, *made.cache.shape, generator=g),
        level=torch.tensor([0.25, 0.75]),
        labels=torch.tensor([0] * 9 + [1] * 8 + [2] * 7)[held],
    )
    assert loss == pytest.approx(record["held_out_loss"], rel=1e-5)


def test_without_held_out_latents_the_first_average_is_published(made, accelerator, tmp_path):
    prior = prior_in(tmp_path, denoiser={"steps": 4, "held_out": 0, "ema": (0.9, 0.5)})
    train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    record = read_json(tmp_path / "transformer" / "training.json")
    assert (record["ema"], record["held_out_loss"]) == (0.9, None)
    assert (record["train_images"], record["held_out_images"]) == (24, 0)
    assert not any(key.startswith("held_out") for key in metrics(tmp_path, "denoiser")[-1])


class Line(nn.Module):
    """Least squares: its gradients are of order one, so that rounding stays rounding through Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (x @ self.weights - y).square()}


def fitted_line(folder: Path, accelerator, **changes) -> tuple[torch.Tensor, dict]:
    recipe = training.Recipe(
        name="line", folder=folder, product=folder / "line", identity={}, steps=20, batch_size=7, lr=0.05,
        emas=(0.9,), save_every=20, dtype="float32", **changes,
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(20, 7, 3, generator=g), torch.randn(20, 7, generator=g)
    line = Line()
    training.fit(
        recipe,
        line,
        lambda step: {"x": x[step], "y": x[step].sum(1) + noise[step]},
        accelerator=accelerator,
        on_save=lambda step: {},
        save=lambda path: None,
    )
    return line.weights.detach(), metrics(folder, "line")[-1]


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_of_a_batch_add_up_to_the_whole(accelerator, tmp_path, parts):
    """Also when they differ in size."""
    whole, log = fitted_line(tmp_path / "whole", accelerator)
    split, split_log = fitted_line(tmp_path / "split", accelerator, accumulate=parts)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)
    assert split_log == pytest.approx(log, rel=1e-5)
    assert (whole - torch.tensor([1.0, -2.0, 0.5])).abs().max() > 0.1


SHORT = {"steps": 4, "save_every": 4, "warmup_steps": 0, "lr": 1e-3, "batch_size": 9}


def test_accumulated_denoiser_is_that_of_whole_batches(made, accelerator, tmp_path):
    for name, parts in (("whole", 1), ("split", 4)):
        prior = prior_in(tmp_path / name, denoiser=SHORT | {"accumulate": parts})
        train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    whole, split = (metrics(tmp_path / name, "denoiser") for name in ("whole", "split"))
    assert split[0] == pytest.approx(whole[0], rel=1e-4)
    assert_nearly_same_model(tmp_path / "split" / "transformer", tmp_path / "whole" / "transformer", 4 * SHORT["lr"])


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_give_what_one_gives(made, toy_source, accelerator, tmp_path):
    """A codec with shares of 2 and 3 rows, and a denoiser with four of 2, 2, 2 and 3, whose options must not depend
    on them."""
    codec, denoiser = SHORT | {"batch_size": 5}, SHORT | {"accumulate": 2, "objective": "flow", "contrastive": 0.05}
    denoiser |= {"time_shift": "auto", "intermediate_head": 0.5, "early": 0.5, "num_layers": 2}
    prior = prior_in(tmp_path / "one", codec=codec, denoiser=denoiser)
    train_codec(toy_source, CODEC, prior, accelerator=accelerator)
    vae = load_codec(tmp_path / "one" / "vae")
    train_denoiser(
        encoded(toy_source, tmp_path / "cache", vae), vae, prior, class_names=NAMES, accelerator=accelerator
    )

    def train() -> None:
        """The codec, and the denoiser on the latents of the codec that is there."""
        pair = make_accelerator(cpu=True)
        assert pair.num_processes == 2
        train_codec(toy_source, CODEC, dataclasses.replace(prior, output_dir=str(tmp_path / "two")), accelerator=pair)
        codec = load_codec(tmp_path / "one" / "vae")
        cache = encoded(toy_source, tmp_path / "cache", codec)
        own = dataclasses.replace(prior, output_dir=str(tmp_path / "two-denoiser"))
        train_denoiser(cache, codec, own, class_names=NAMES, accelerator=pair)

    done = Forked(train, processes=2)
    _, errors = done.communicate(timeout=240)
    assert done.returncode == 0, errors[-3000:]
    for name, product, stage in (("two", "vae", "codec"), ("two-denoiser", "transformer", "denoiser")):
        assert "2 process" in read_json(tmp_path / name / product / "training.json")["hardware"]
        one, both = metrics(tmp_path / "one", stage)[-1], metrics(tmp_path / name, stage)[-1]
        assert both == pytest.approx(one, rel=1e-4), stage
        assert_nearly_same_model(tmp_path / name / product, tmp_path / "one" / product, 4 * SHORT["lr"])


# --- resume -------------------------------------------------------------------------------------------------------


def counted(monkeypatch, module) -> list:
    """Steps whose batch is drawn from now on."""
    steps = []

    def count(*parts):
        if isinstance(parts[-1], int):
            steps.append(parts[-1])
        return generator(*parts)

    monkeypatch.setattr(module, "generator", count)
    return steps


def test_resumed_codec_is_the_uninterrupted_one(made, toy_source, accelerator, tmp_path, monkeypatch):
    prior = prior_in(tmp_path)
    with interrupted_at_save(monkeypatch, 2):
        train_codec(toy_source, CODEC, prior, accelerator=accelerator)
    assert not (tmp_path / "vae").exists()
    assert read_metadata(tmp_path / ".training-codec" / "checkpoint.safetensors")["step"] == 45
    steps = counted(monkeypatch, codec_module)
    train_codec(toy_source, CODEC, prior, accelerator=accelerator)
    assert steps == list(range(45, 120))
    assert_same_model(tmp_path / "vae", made.vae)
    assert metrics(tmp_path, "codec") == metrics(made.folder, "codec")[1:]
    assert not (tmp_path / ".training-codec").exists()


def test_resumed_denoiser_is_the_uninterrupted_one(made, accelerator, tmp_path, monkeypatch):
    prior = prior_in(tmp_path)
    assert len(prior.denoiser.ema) == 3
    assert prior.denoiser.schedule == "cosine"
    with interrupted_at_save(monkeypatch, 3):
        train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    assert not (tmp_path / "model_index.json").exists()
    steps = counted(monkeypatch, denoiser_data)
    train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    assert steps == list(range(200, 240))
    assert_same_model(tmp_path / "transformer", made.folder / "transformer")
    assert metrics(tmp_path, "denoiser") == metrics(made.folder, "denoiser")[2:]
    # the codec came along
    assert_same_model_weights(tmp_path / "vae", made.vae)


@pytest.mark.parametrize("steps", [5, 9])
def test_an_unfinished_training_takes_another_number_of_steps(made, accelerator, tmp_path, monkeypatch, steps):
    """With a constant rate it is the training that had this number from the start."""

    def train(folder: str, number: int):
        options = {"steps": number, "save_every": 2, "schedule": "constant", "early": 0.25}
        prior = prior_in(tmp_path / folder, denoiser=options)
        train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)

    with interrupted_at_save(monkeypatch, 2):
        train("changed", 7)
    train("changed", steps)
    train("whole", steps)
    assert_same_model_weights(tmp_path / "changed" / "transformer", tmp_path / "whole" / "transformer")
    record, whole = (read_json(tmp_path / name / "transformer" / "training.json") for name in ("changed", "whole"))
    assert record.pop("earlier_steps") == [[7, 2]]
    assert record["digest"] == whole["digest"]
    assert record.keys() == whole.keys()
    assert read_json(tmp_path / "changed" / "transformer_early" / "training.json")["digest"] == whole["digest"]


def test_fewer_steps_than_were_made_are_refused(made, accelerator, tmp_path, monkeypatch):
    def train(number: int, **options):
        options = {"steps": number, "save_every": 3, **options}
        prior = prior_in(tmp_path, denoiser=options)
        train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)

    with interrupted_at_save(monkeypatch, 3):
        train(20, early=0.5)
    with pytest.raises(RunError, match=r"has made 6 steps; set prior\.denoiser\.steps to more"):
        train(6, early=0.5)
    with pytest.raises(RunError, match=r"past step 4, where its early average .*steps=8; set more steps"):
        train(8, early=0.5)
    with pytest.raises(RunError, match="other settings"):
        train(30, early=0.5, lr=1.0)
    train(14, early=0.5)


def assert_same_model_weights(a: Path, b: Path) -> None:
    first, theirs = (load_file(p / "diffusion_pytorch_model.safetensors") for p in (a, b))
    assert first.keys() == theirs.keys()
    assert all(torch.equal(first[k], theirs[k]) for k in first)


def test_finished_training_is_not_repeated(made, toy_source, accelerator, monkeypatch):
    files = {p: p.stat().st_mtime_ns for p in made.folder.rglob("*") if p.is_file()}
    steps, denoiser_steps = counted(monkeypatch, codec_module), counted(monkeypatch, denoiser_data)
    # how often to save does not change the result, nor does compilation
    often = prior_in(made.folder, codec={"save_every": 7}, denoiser={"save_every": 7, "compile": True})
    assert train_codec(toy_source, CODEC, often, accelerator=accelerator) == made.vae
    assert train_denoiser(made.cache, made.codec, often, class_names=NAMES, accelerator=accelerator) == made.folder
    assert steps == denoiser_steps == []
    assert {p: p.stat().st_mtime_ns for p in made.folder.rglob("*") if p.is_file()} == files


def test_changed_settings_are_refused(made, toy_source, accelerator):
    def codec(prior, resolution=8):
        train_codec(toy_source, CodecConfig(resolution=resolution), prior, accelerator=accelerator)

    def denoiser(prior, names=NAMES):
        train_denoiser(made.cache, made.codec, prior, class_names=names, accelerator=accelerator)

    refused = pytest.raises(RunError, match=r"prior/vae holds a codec of other settings.*prior\.output_dir")
    with refused:
        codec(prior_in(made.folder, codec={"lr": 1e-3}))
    with refused:
        codec(prior_in(made.folder, seed=1))
    with refused:
        codec(made.prior, resolution=16)
    refused = pytest.raises(RunError, match=r"prior/transformer holds a denoiser of other settings.*prior\.output_dir")
    changes = {
        "dropout": 0.2, "ema": (0.5, 0.95), "schedule": "constant", "weighting": "min_snr", "objective": "flow",
        "accumulate": 2, "held_out": 1, "weight_decay": 0.1, "normalize": "none",
    }  # fmt: skip
    for key, value in changes.items():
        with refused:
            denoiser(prior_in(made.folder, denoiser={key: value}))
    with refused:
        denoiser(made.prior, names=("red", "blue", "green"))


def test_checkpoint_of_other_settings_is_refused(toy_source, accelerator, tmp_path, monkeypatch):
    with interrupted_at_save(monkeypatch, 2):
        train_codec(toy_source, CODEC, prior_in(tmp_path), accelerator=accelerator)
    with pytest.raises(RunError, match=r"\.training-codec .*other settings.*prior\.output_dir"):
        train_codec(toy_source, CODEC, prior_in(tmp_path, codec={"lr": 1e-3}), accelerator=accelerator)


def test_denoiser_checkpoint_of_other_settings_is_refused(made, accelerator, tmp_path, monkeypatch):
    short = {"steps": 6, "save_every": 2}
    with interrupted_at_save(monkeypatch, 2):
        train_denoiser(
            made.cache, made.codec, prior_in(tmp_path, denoiser=short), class_names=NAMES, accelerator=accelerator
        )
    changed = prior_in(tmp_path, denoiser=short | {"ema": (0.5,)})
    with pytest.raises(RunError, match=r"\.training-denoiser .*other settings"):
        train_denoiser(made.cache, made.codec, changed, class_names=NAMES, accelerator=accelerator)


def test_models_of_others_are_kept(made, toy_source, accelerator, tmp_path):
    other = new_codec(prior_in(tmp_path, seed=5), 8)
    other.save_pretrained(tmp_path / "vae")
    with pytest.raises(RunError, match=r"vae .*not trained here"):
        train_codec(toy_source, CODEC, prior_in(tmp_path), accelerator=accelerator)
    with pytest.raises(RunError, match="vae is not the codec"):
        train_denoiser(made.cache, made.codec, prior_in(tmp_path), class_names=NAMES, accelerator=accelerator)


# --- single rules -------------------------------------------------------------------------------------------------


def label_tables(model) -> list[torch.Tensor]:
    return [block.norm1.emb.class_embedder.embedding_table.weight for block in model.transformer_blocks]


@pytest.mark.parametrize(("dropout", "learning"), [(1.0, [3]), (0.0, [0, 1, 2])])
def test_guidance_dropout_decides_which_label_rows_learn(made, accelerator, tmp_path, dropout, learning):
    """Row 3 is the null class. Diffusers' own dropout, 0.1 in every block, would move it at dropout 0 as well."""
    from diffusers import DiTTransformer2DModel

    prior = prior_in(tmp_path, denoiser={"dropout": dropout, "steps": 8, "num_layers": 2})
    before = new_denoiser(prior, made.cache.shape, 3)
    train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    after = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
    for old, new in zip(label_tables(before), label_tables(after), strict=True):
        assert old.shape[0] == 4
        assert (old != new).any(1).nonzero()[:, 0].tolist() == learning


def test_learning_rate_warms_up_and_falls():
    assert [training.rate(s, 100, "constant", 4) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert training.rate(0, 100, "constant", 0) == 1.0
    cosine = [training.rate(s, 12, "cosine", 4) for s in range(12)]
    assert cosine[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert cosine[8] == pytest.approx(0.5)
    assert cosine[6] + cosine[10] == pytest.approx(1)  # half a cosine is odd around its middle
    assert all(a > b for a, b in itertools.pairwise(cosine[4:]))
    assert 0 < cosine[-1] < 0.05


def test_without_a_test_split_some_of_train_is_held_out(toy_images, accelerator):
    images = torch.arange(50, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    source = load_source((images, torch.arange(50) % 3), class_names=NAMES)
    train, held = codec_module._images(source, 8, 0)
    assert (len(train), len(held)) == (45, 5)
    assert sorted(train[:, 0, 0, 0].tolist() + held[:, 0, 0, 0].tolist()) == list(range(50))
    with_test = load_source(toy_images, class_names=NAMES)
    train, held = codec_module._images(with_test, 8, 0)
    assert (len(train), len(held)) == (24, 12)


def test_nan_is_an_error_and_no_checkpoint(made, accelerator, tmp_path):
    prior = prior_in(tmp_path, denoiser={"lr": 1e30, "warmup_steps": 0, "save_every": 5})
    with pytest.raises(
        RunError,
        match=r"loss of the denoiser .*NaN.*step 5; .*denoiser\.lr",
    ):
        train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    assert not (tmp_path / ".training-denoiser" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(("bad_update", "what", "good"), [(7, "loss", 6), (5, "held-out loss", 3)])
def test_divergence_keeps_the_last_good_average(made, accelerator, tmp_path, monkeypatch, bad_update, what, good):
    """Steps are saved in threes. The sixth update has a good loss before it and a broken network behind it."""
    from diffusers import DiTTransformer2DModel

    monkeypatch.setattr(training, "rate", lambda step, *rest: 1.0 if step < bad_update else 1e30)
    prior = prior_in(tmp_path, denoiser={"save_every": 3})
    with pytest.raises(
        RunError,
        match=rf"the {what} of the denoiser became NaN.*averaged model of step {good} is in .*last-good; lower",
    ):
        train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    tensors, metadata = read_tensors(tmp_path / ".training-denoiser" / "checkpoint.safetensors")
    assert metadata["step"] == good
    kept = DiTTransformer2DModel.from_pretrained(tmp_path / ".training-denoiser" / "last-good").state_dict()
    for name, p in kept.items():
        assert torch.isfinite(p).all(), name
        assert p.abs().max() < 100, name
        if f"average.0.model.{name}" in tensors:
            assert torch.equal(p, tensors[f"average.0.model.{name}"])
    assert not (tmp_path / "transformer").exists()


def test_too_little_disk_stops_before_the_first_step(made, toy_source, accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * 2**10))
    steps = [*counted(monkeypatch, codec_module), *counted(monkeypatch, denoiser_data)]
    prior = prior_in(tmp_path)
    message = (
        r"checkpoints of the {} need \d+ MiB but .* has 0 MiB free; free some, or choose another prior\.output_dir"
    )
    with pytest.raises(RunError, match=message.format("codec")):
        train_codec(toy_source, CODEC, prior, accelerator=accelerator)
    with pytest.raises(RunError, match=message.format("denoiser")):
        train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    assert steps == []
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_impossible_settings_are_named(made, toy_source, accelerator, tmp_path, monkeypatch):
    def codec(resolution=8, **changes):
        config = CodecConfig(resolution=resolution)
        train_codec(toy_source, config, prior_in(tmp_path, codec=changes), accelerator=accelerator)

    def denoiser(names=NAMES, **changes):
        prior = prior_in(tmp_path, denoiser=changes)
        train_denoiser(made.cache, made.codec, prior, class_names=names, accelerator=accelerator)

    with pytest.raises(InputError, match=r"codec\.resolution=9 is not a multiple of 2"):
        codec(resolution=9)
    with pytest.raises(InputError, match="batch_size=3 is less than its 4 part"):
        denoiser(batch_size=3, accumulate=4)
    with pytest.raises(InputError, match="patch_size=3 does not divide the latents' side 4"):
        denoiser(patch_size=3)
    with pytest.raises(InputError, match="2 class names but latents of 3"):
        denoiser(names=NAMES[:2])
    monkeypatch.setattr(codec_module, "MAX_BYTES", 1000)
    monkeypatch.setattr(denoiser_data, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="24 train images of 8 px"):
        codec()
    with pytest.raises(InputError, match="exceed"):
        denoiser()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TrainCodecConfig(dtype="float16"),
            "must be one of 'auto', 'float32', 'bfloat16', not 'float16'",
        ),
        (
            lambda: TrainDenoiserConfig(dtype="float16"),
            "must be one of 'auto', 'float32', 'bfloat16', not 'float16'",
        ),
        (lambda: TrainCodecConfig(ema=1.0), r"ema must be a number in \[0, 1\), not 1.0"),
        (lambda: TrainCodecConfig(ema=-0.1), r"ema must be a number in \[0, 1\), not -0.1"),
        (lambda: TrainDenoiserConfig(ema=(0.9, 1.0)), r"ema.1 must be a number in \[0, 1\), not 1.0"),
        (lambda: TrainDenoiserConfig(ema=(-0.1,)), r"ema.0 must be a number in \[0, 1\), not -0.1"),
        (lambda: TrainDenoiserConfig(ema=()), r"ema must list decays in \[0, 1\), not \[\]"),
        (lambda: TrainDenoiserConfig(dropout=1.5), r"dropout must be a number in \[0, 1\], not 1.5"),
        (
            lambda: TrainDenoiserConfig(objective="flow", weighting="min_snr"),
            "weighting=min_snr does not belong to objective=flow",
        ),
        (
            lambda: TrainDenoiserConfig(weighting="logit_normal"),
            "weighting=logit_normal does not belong to objective=noise",
        ),
        (lambda: TrainDenoiserConfig(accumulate=0), "accumulate must be a whole number of at least 1"),
        (lambda: from_dict(TrainDenoiserConfig, {"size": "4M"}), "size must be one of '3M', '8M'"),
    ],
)
def test_impossible_values_are_refused_by_name(make, message):
    with pytest.raises(InputError, match=message):
        make()
