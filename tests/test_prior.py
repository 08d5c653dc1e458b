import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dq.codec import encode_latents, load_codec, to_signed
from dq.config import CodecConfig, PriorConfig, SourceConfig, TrainCodecConfig, TrainDenoiserConfig
from dq.data import load_source
from dq.dist import generator, read_json, read_metadata
from dq.errors import InputError, RunError
from dq.latents import encode_source, open_cache
from dq.prior import codec as codec_module
from dq.prior import denoiser as denoiser_module
from dq.prior import train_codec, train_denoiser, training
from dq.prior.codec import CodecLoss, new_codec
from dq.prior.denoiser import DenoiserLoss, new_denoiser

SOURCE = SourceConfig(image_size=8)
CODEC = CodecConfig(resolution=8)
NAMES = ("red", "green", "blue")
SMALL = PriorConfig(
    codec=TrainCodecConfig(
        latent_channels=2, block_out_channels=(8, 16), steps=120, batch_size=16, lr=5e-3, ema=0.9, save_every=45
    ),
    denoiser=TrainDenoiserConfig(
        num_layers=1, num_attention_heads=2, attention_head_dim=16, steps=120, batch_size=32, lr=5e-3,
        warmup_steps=10, ema=(0.95,), save_every=50,
    ),
)  # fmt: skip


def prior_in(folder, codec=None, denoiser=None, **changes) -> PriorConfig:
    return dataclasses.replace(
        SMALL,
        output_dir=str(folder),
        codec=dataclasses.replace(SMALL.codec, **(codec or {})),
        denoiser=dataclasses.replace(SMALL.denoiser, **(denoiser or {})),
        **changes,
    )


def encoded(source, folder, codec):
    cache = open_cache(folder, source, codec, SOURCE, CODEC, 0)
    encode_source(source, codec, cache, SOURCE, CODEC, labels=[0, 1, 2], seed=0, main=False)
    return cache


@pytest.fixture(scope="module")
def made(toy_source, accelerator, tmp_path_factory):
    """A prior trained without interruption, and what it was made from."""
    folder = tmp_path_factory.mktemp("made")
    prior = prior_in(folder / "prior")
    before = torch.get_rng_state()
    vae = train_codec(toy_source, SOURCE, CODEC, prior, accelerator=accelerator)
    codec = load_codec(vae)
    cache = encoded(toy_source, folder / "cache", codec)
    assert train_denoiser(cache, codec, prior, class_names=NAMES, accelerator=accelerator) == folder / "prior"
    assert torch.equal(before, torch.get_rng_state())  # nothing drew from the global generator
    return SimpleNamespace(folder=folder / "prior", prior=prior, vae=vae, codec=codec, cache=cache)


def metrics(folder: Path, stage: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def held_out(source) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.stack([torch.from_numpy(source.test.read(i)) for i in range(len(source.test))])
    return images, torch.from_numpy(source.test.labels)


def mean_loss(objective, **batch) -> float:
    with torch.no_grad():
        return float(objective.eval()(**batch)["loss"].mean())


# --- learning -----------------------------------------------------------------------------------------------------


def test_codec_learns(made, toy_source):
    images, _ = held_out(toy_source)
    batch = {"images": images, "noise": torch.randn(len(images), 2, 4, 4, generator=generator("test"))}
    untrained = mean_loss(CodecLoss(new_codec(made.prior, 8), 0.0), **batch)
    assert mean_loss(CodecLoss(made.codec, 0.0), **batch) < 0.3 * untrained
    log = metrics(made.folder, "codec")
    assert [line["step"] for line in log] == [45, 90, 120]
    # the logged PSNR is that of the averaged weights that were saved
    back = made.codec.decode(made.codec.encode(to_signed(images)).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = (10 * (4 / (back - to_signed(images)).square().mean((1, 2, 3))).log10()).mean()
    assert log[-1]["psnr"] == pytest.approx(float(psnr), abs=1e-3)
    assert read_json(made.vae / "training.json")["psnr"] == log[-1]["psnr"]


def test_denoiser_learns(made, toy_source):
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    images, labels = held_out(toy_source)
    z = encode_latents(made.codec, to_signed(images)).repeat(20, 1, 1, 1)
    g = generator("test")
    batch = {
        "latents": z,
        "noise": torch.randn(z.shape, generator=g),
        "t": torch.randint(1000, (len(z),), generator=g),
    }
    scheduler = DDIMScheduler.from_pretrained(made.folder / "scheduler")
    trained = DiTTransformer2DModel.from_pretrained(made.folder / "transformer")
    loss = mean_loss(DenoiserLoss(trained, scheduler), labels=labels.repeat(20), **batch)
    untrained = new_denoiser(made.prior, made.cache.shape, 3)
    assert loss < 0.7 * mean_loss(DenoiserLoss(untrained, scheduler), labels=labels.repeat(20), **batch)
    # it uses the class: a wrong one makes the noise harder to tell
    assert loss < mean_loss(DenoiserLoss(trained, scheduler), labels=(labels.repeat(20) + 1) % 3, **batch)


def test_loss_is_noise_prediction_on_dit_betas(made):
    """alpha_bar_t = prod (1 - beta), linear from 1e-4 to 0.02; a model that says nothing is wrong by noise^2."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(made.folder / "scheduler")
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    seen = []

    def model(x, timestep, class_labels):
        seen.append(x)
        return SimpleNamespace(sample=torch.zeros_like(x))

    g = generator("test")
    z, noise, t = (
        torch.randn(4, 2, 4, 4, generator=g),
        torch.randn(4, 2, 4, 4, generator=g),
        torch.tensor([0, 9, 500, 999]),
    )
    objective = DenoiserLoss(torch.nn.Identity(), scheduler)
    del objective.model
    objective.__dict__["model"] = model
    loss = objective(latents=z.half(), noise=noise, t=t, labels=torch.zeros(4, dtype=torch.int64))["loss"]
    a = alpha_bar[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(seen[0], a.sqrt() * z.half().float() + (1 - a).sqrt() * noise)
    torch.testing.assert_close(loss, noise.square().mean((1, 2, 3)))


def test_latents_have_unit_variance(made):
    z = torch.cat([made.cache.load(c)[0].float() for c in range(3)])
    assert len(z) == 24
    assert float(z.std(correction=0)) == pytest.approx(1, abs=1e-3)  # cached in float16
    assert made.codec.config.scaling_factor != 0.18215


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


def test_grids_are_drawn_at_every_save(made):
    from PIL import Image

    names = sorted(p.name for p in (made.folder / "samples").iterdir())
    steps = [f"codec-{s:06d}.png" for s in (45, 90, 120)] + [f"denoiser-{s:06d}.png" for s in (50, 100, 120)]
    assert names == steps
    # gap 2 px: 12 originals over 12 reconstructions, 3 classes of 8 samples
    assert Image.open(made.folder / "samples" / "codec-000120.png").size == (8 * (12 * 10 - 2), 8 * (2 * 10 - 2))
    assert Image.open(made.folder / "samples" / "denoiser-000120.png").size == (6 * (8 * 10 - 2), 6 * (3 * 10 - 2))


def test_nothing_unfinished_is_left(made):
    assert sorted(p.name for p in made.folder.iterdir()) == [
        "metrics.jsonl", "model_index.json", "samples", "scheduler", "transformer", "vae",
    ]  # fmt: skip


# --- resume -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted_at_save(monkeypatch, number: int):
    """Ctrl-C while the training is about to log its save of this number: later steps are lost."""
    written = []

    def append(path, record):
        written.append(record)
        if len(written) == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(training, "append_jsonl", append)
        with pytest.raises(KeyboardInterrupt):
            yield


def counted(monkeypatch, module) -> list:
    """Steps whose batch is drawn from now on."""
    steps = []

    def count(*parts):
        if isinstance(parts[-1], int):
            steps.append(parts[-1])
        return generator(*parts)

    monkeypatch.setattr(module, "generator", count)
    return steps


def assert_same_model(a: Path, b: Path) -> None:
    mine, theirs = (load_file(p / "diffusion_pytorch_model.safetensors") for p in (a, b))
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    assert read_json(a / "config.json") == read_json(b / "config.json")


def test_resumed_codec_is_the_uninterrupted_one(made, toy_source, accelerator, tmp_path, monkeypatch):
    prior = prior_in(tmp_path)
    with interrupted_at_save(monkeypatch, 2):
        train_codec(toy_source, SOURCE, CODEC, prior, accelerator=accelerator)
    assert not (tmp_path / "vae").exists()
    assert read_metadata(tmp_path / ".training-codec" / "checkpoint.safetensors")["step"] == 45
    steps = counted(monkeypatch, codec_module)
    train_codec(toy_source, SOURCE, CODEC, prior, accelerator=accelerator)
    assert steps == list(range(45, 120))
    assert_same_model(tmp_path / "vae", made.vae)
    assert metrics(tmp_path, "codec") == metrics(made.folder, "codec")[1:]
    assert not (tmp_path / ".training-codec").exists()


def test_resumed_denoiser_is_the_uninterrupted_one(made, accelerator, tmp_path, monkeypatch):
    prior = prior_in(tmp_path)
    with interrupted_at_save(monkeypatch, 3):
        train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    assert not (tmp_path / "model_index.json").exists()
    steps = counted(monkeypatch, denoiser_module)
    train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    assert steps == list(range(100, 120))
    assert_same_model(tmp_path / "transformer", made.folder / "transformer")
    assert metrics(tmp_path, "denoiser") == metrics(made.folder, "denoiser")[2:]
    # the codec came along
    assert_same_model_weights(tmp_path / "vae", made.vae)


def assert_same_model_weights(a: Path, b: Path) -> None:
    mine, theirs = (load_file(p / "diffusion_pytorch_model.safetensors") for p in (a, b))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_finished_training_is_not_repeated(made, toy_source, accelerator, monkeypatch):
    files = {p: p.stat().st_mtime_ns for p in made.folder.rglob("*") if p.is_file()}
    steps = counted(monkeypatch, codec_module)
    # how often to save does not change the result
    often = prior_in(made.folder, codec={"save_every": 7}, denoiser={"save_every": 7})
    assert train_codec(toy_source, SOURCE, CODEC, often, accelerator=accelerator) == made.vae
    assert train_denoiser(made.cache, made.codec, often, class_names=NAMES, accelerator=accelerator) == made.folder
    assert steps == []
    assert {p: p.stat().st_mtime_ns for p in made.folder.rglob("*") if p.is_file()} == files


def test_changed_settings_are_refused(made, toy_source, accelerator):
    def codec(prior, resolution=8):
        train_codec(toy_source, SOURCE, CodecConfig(resolution=resolution), prior, accelerator=accelerator)

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
    with refused:
        denoiser(prior_in(made.folder, denoiser={"dropout": 0.2}))
    with refused:
        denoiser(made.prior, names=("red", "blue", "green"))


def test_checkpoint_of_other_settings_is_refused(toy_source, accelerator, tmp_path, monkeypatch):
    with interrupted_at_save(monkeypatch, 2):
        train_codec(toy_source, SOURCE, CODEC, prior_in(tmp_path), accelerator=accelerator)
    with pytest.raises(
        RunError, match=r"\.training-codec holds an unfinished codec of other settings.*prior\.output_dir"
    ):
        train_codec(toy_source, SOURCE, CODEC, prior_in(tmp_path, codec={"lr": 1e-3}), accelerator=accelerator)


def test_models_of_others_are_kept(made, toy_source, accelerator, tmp_path):
    other = new_codec(prior_in(tmp_path, seed=5), 8)
    other.save_pretrained(tmp_path / "vae")
    with pytest.raises(RunError, match="vae holds a model that was not trained here"):
        train_codec(toy_source, SOURCE, CODEC, prior_in(tmp_path), accelerator=accelerator)
    with pytest.raises(RunError, match="vae is not the codec that made these latents"):
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


def test_learning_rate_warms_up():
    assert [training.rate(s, 100, "constant", 4) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert training.rate(0, 100, "constant", 0) == 1.0


def test_without_a_test_split_some_of_train_is_held_out(toy_images, accelerator):
    images = torch.arange(50, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    source = load_source((images, torch.arange(50) % 3), class_names=NAMES)
    train, held = codec_module._images(source, SOURCE, 8, 0)
    assert (len(train), len(held)) == (45, 5)
    assert sorted(train[:, 0, 0, 0].tolist() + held[:, 0, 0, 0].tolist()) == list(range(50))
    with_test = load_source(toy_images, class_names=NAMES)
    train, held = codec_module._images(with_test, SOURCE, 8, 0)
    assert (len(train), len(held)) == (24, 12)


def test_nan_is_an_error_and_no_checkpoint(made, accelerator, tmp_path):
    prior = prior_in(tmp_path, denoiser={"lr": 1e30, "warmup_steps": 0, "save_every": 5})
    with pytest.raises(RunError, match=r"of the denoiser became NaN or infinite between steps 0 and 5.*denoiser\.lr"):
        train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    assert not (tmp_path / ".training-denoiser" / "checkpoint.safetensors").exists()


def test_impossible_settings_are_named(made, toy_source, accelerator, tmp_path, monkeypatch):
    def codec(resolution=8, **changes):
        config = CodecConfig(resolution=resolution)
        train_codec(toy_source, SOURCE, config, prior_in(tmp_path, codec=changes), accelerator=accelerator)

    def denoiser(names=NAMES, **changes):
        prior = prior_in(tmp_path, denoiser=changes)
        train_denoiser(made.cache, made.codec, prior, class_names=names, accelerator=accelerator)

    with pytest.raises(InputError, match=r"codec\.resolution=9 is not a multiple of 2"):
        codec(resolution=9)
    with pytest.raises(InputError, match=r"prior\.codec\.dtype=float16"):
        codec(dtype="float16")
    with pytest.raises(InputError, match="patch_size=3 does not divide the latents' side 4"):
        denoiser(patch_size=3)
    with pytest.raises(InputError, match="2 class names but latents of 3"):
        denoiser(names=NAMES[:2])
    monkeypatch.setattr(codec_module, "MAX_BYTES", 1000)
    monkeypatch.setattr(denoiser_module, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="24 train images of 8 px"):
        codec()
    with pytest.raises(InputError, match="exceed"):
        denoiser()
