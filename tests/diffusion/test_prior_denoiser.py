"""Rules of the denoiser's training: its losses, its sizes, and what it may start from."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from models import tiny_dit, tiny_kl
from small_prior import NAMES, Saying, encoded, every_image, prior_in

from dq.config.prior import PriorConfig, TrainDenoiserConfig
from dq.core.errors import InputError, RunError
from dq.core.files import read_json
from dq.core.seeds import generator
from dq.data.load import load_source
from dq.diffusion.codec import codec_digest, encode_latents, load_codec, to_signed
from dq.diffusion.prior.denoiser_loss import DenoiserLoss, new_scheduler
from dq.diffusion.prior.train_denoiser import SIZES, new_denoiser, train_denoiser

# --- losses -------------------------------------------------------------------------------------------------------


LEVELS = torch.tensor([0.0, 0.009, 0.5, 0.9999])


def latents_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    g = generator("test")
    return torch.randn(4, 2, 4, 4, generator=g).half(), torch.randn(4, 2, 4, 4, generator=g)


def alpha_bar(level: torch.Tensor) -> torch.Tensor:
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[(level * 1000).long()]


def test_noise_is_predicted_on_dit_betas():
    """alpha_bar_t = prod (1 - beta), linear from 1e-4 to 0.02; a model that says nothing is wrong by noise^2."""
    z, noise = latents_and_noise()
    model, labels = Saying(torch.zeros_like(noise)), torch.tensor([0, 1, 2, 1])
    terms = DenoiserLoss(model)(latents=z, noise=noise, level=LEVELS, labels=labels)
    a = alpha_bar(LEVELS).float().view(-1, 1, 1, 1)
    torch.testing.assert_close(model.x, a.sqrt() * z.float() + (1 - a).sqrt() * noise)
    assert model.timestep.tolist() == [0, 9, 500, 999]
    assert torch.equal(model.class_labels, labels)
    torch.testing.assert_close(terms["loss"], noise.square().mean((1, 2, 3)))
    assert torch.equal(terms["loss"], terms["error"])
    right = DenoiserLoss(Saying(noise))(latents=z, noise=noise, level=LEVELS, labels=labels)
    assert right["loss"].tolist() == [0] * 4


def test_noise_levels_are_those_of_the_scheduler():
    scheduler, (z, noise) = new_scheduler("noise"), latents_and_noise()
    model = Saying(torch.zeros_like(noise))
    DenoiserLoss(model)(latents=z, noise=noise, level=LEVELS, labels=torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(model.x, scheduler.add_noise(z.float(), noise, model.timestep), atol=1e-5, rtol=1e-4)


def test_flow_loss_is_the_squared_error_of_the_velocity():
    z, noise = latents_and_noise()
    s = LEVELS.view(-1, 1, 1, 1)
    for weighting in ("uniform", "logit_normal"):  # the latter changes what is drawn, not the loss
        model = Saying(torch.full_like(noise, 0.3))
        terms = DenoiserLoss(model, "flow", weighting)(
            latents=z, noise=noise, level=LEVELS, labels=torch.zeros(4, dtype=torch.int64)
        )
        torch.testing.assert_close(model.x, (1 - s) * z.float() + s * noise)
        torch.testing.assert_close(model.timestep, 1000 * LEVELS)
        torch.testing.assert_close(terms["loss"], (0.3 - (noise - z.float())).square().mean((1, 2, 3)))
        assert torch.equal(terms["loss"], terms["error"])


def test_min_snr_weights():
    z, noise = latents_and_noise()
    level = (torch.arange(1000) + 0.5) / 1000
    rows = torch.zeros(1000, dtype=torch.int64)
    terms = DenoiserLoss(Saying(torch.zeros(1000, 2, 4, 4)), "noise", "min_snr")(
        latents=z[rows], noise=noise[rows], level=level, labels=rows
    )
    a = alpha_bar(level)
    snr = a / (1 - a)
    assert (snr > 5).any()
    assert (snr < 5).any()
    torch.testing.assert_close((terms["loss"] / terms["error"]).double(), snr.clamp(max=5) / snr, rtol=1e-5, atol=0)


@pytest.mark.parametrize("objective", ["noise", "flow"])
def test_a_learned_variance_is_left_alone(objective):
    z, noise = latents_and_noise()
    batch = {"latents": z, "noise": noise, "level": LEVELS, "labels": torch.zeros(4, dtype=torch.int64)}
    plain = DenoiserLoss(Saying(noise * 0.5), objective)(**batch)
    learned = DenoiserLoss(Saying(torch.cat([noise * 0.5, noise * 9], 1)), objective)(**batch)
    assert torch.equal(plain["loss"], learned["loss"])


# --- sizes --------------------------------------------------------------------------------------------------------


def parameters_of(size: str) -> int:
    with torch.device("meta"):
        model = new_denoiser(PriorConfig(denoiser=TrainDenoiserConfig(size=size)), (4, 8, 8), 10)
    return sum(p.numel() for p in model.parameters())


def test_sizes_have_the_parameters_of_their_names():
    counts = {size: parameters_of(size) for size in SIZES}
    for size in ("3M", "8M", "18M"):
        assert counts[size] == pytest.approx(int(size[:-1]) * 1e6, rel=0.2), counts
    assert list(counts) == ["3M", "8M", "18M", "S", "B", "L", "XL"]
    assert sorted(counts.values()) == list(counts.values())
    assert len(set(counts.values())) == len(counts)


def test_a_fresh_denoiser_predicts_zero_for_every_class_and_time():
    """adaLN-zero; the first loss is that of saying nothing."""
    model = new_denoiser(prior_in(Path()), (2, 4, 4), 3)
    x = torch.randn(4, 2, 4, 4, generator=generator("test"))
    with torch.no_grad():
        out = model(x, timestep=torch.tensor([0, 9, 500, 999]), class_labels=torch.tensor([0, 1, 2, 3])).sample
    assert out.abs().max() == 0


# --- what it may start from ---------------------------------------------------------------------------------------


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel.from_pretrained(folder / "transformer").state_dict()


def from_made(made, folder=Path(), **changes) -> PriorConfig:
    return prior_in(folder, denoiser={"init": str(made.folder), **changes})


def test_fine_tuning_continues_from_the_given_weights(made, accelerator, tmp_path):
    given = weights_of(made.folder)
    model = new_denoiser(from_made(made), made.cache.shape, 3, codec=made.codec)
    assert all(torch.equal(p, given[name]) for name, p in model.state_dict().items())
    assert all(p.requires_grad for name, p in model.named_parameters())
    prior = from_made(made, tmp_path, steps=1, lr=1e-9, warmup_steps=0)
    train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    for name, p in weights_of(tmp_path).items():
        torch.testing.assert_close(p, given[name], atol=1e-7, rtol=1e-6)
    assert codec_digest(load_codec(tmp_path)) == codec_digest(made.codec)
    # the checkpoint it started from belongs to the training
    with pytest.raises(RunError, match="holds a denoiser of other settings"):
        train_denoiser(
            made.cache,
            made.codec,
            prior_in(tmp_path, denoiser={"steps": 1, "lr": 1e-9, "warmup_steps": 0}),
            class_names=NAMES,
            accelerator=accelerator,
        )


def test_new_classes_start_as_the_null_class(made, accelerator, tmp_path):
    given = weights_of(made.folder)
    with pytest.raises(InputError, match=r"3 classes .* 5; set prior\.denoiser\.new_classes=true"):
        new_denoiser(from_made(made), made.cache.shape, 5, codec=made.codec)
    model = new_denoiser(from_made(made, new_classes=True), made.cache.shape, 5, codec=made.codec)
    tables = 0
    for name, p in model.state_dict().items():
        if name.endswith("embedding_table.weight"):
            tables += 1
            assert torch.equal(p, given[name][3].expand(6, -1))  # row 3 was the null class
        else:
            assert torch.equal(p, given[name]), name
    assert tables == len(model.transformer_blocks) == 1
    assert model.config.num_embeds_ada_norm == 5
    # trained and opened again
    two = dataclasses.replace(made.cache, class_names=NAMES[:2])
    prior = from_made(made, tmp_path, new_classes=True, steps=20, lr=1e-3)
    train_denoiser(two, made.codec, prior, class_names=NAMES[:2], accelerator=accelerator)
    [table] = [p for name, p in weights_of(tmp_path).items() if name.endswith("embedding_table.weight")]
    assert table.shape[0] == 3
    assert (table[0] != table[1]).any()
    assert read_json(tmp_path / "transformer" / "config.json")["num_embeds_ada_norm"] == 2


def test_checkpoints_of_something_else_are_refused_by_name(made, tmp_path):
    where = str(made.folder)
    with pytest.raises(InputError, match=rf"{where} was trained with another codec.*set codec\.path={where}"):
        new_denoiser(from_made(made), (2, 4, 4), 3, codec=tiny_kl(latent_channels=2))
    with pytest.raises(InputError, match=rf"{where} takes latents of 2x4x4 but the data's are 2x8x8"):
        new_denoiser(from_made(made), (2, 8, 8), 3, codec=made.codec)
    with pytest.raises(
        InputError, match=rf"{where} was trained for noise prediction; set prior\.denoiser\.objective=noise"
    ):
        new_denoiser(from_made(made, objective="flow"), (2, 4, 4), 3, codec=made.codec)
    flow = tmp_path / "flow"
    shutil.copytree(made.folder, flow)
    shutil.rmtree(flow / "scheduler")
    new_scheduler("flow").save_pretrained(flow / "scheduler")
    index = (flow / "model_index.json").read_text().replace("DDIMScheduler", "DPMSolverMultistepScheduler")
    (flow / "model_index.json").write_text(index)
    with pytest.raises(InputError, match=r"was trained for flow matching; set prior\.denoiser\.objective=flow"):
        new_denoiser(prior_in(tmp_path, denoiser={"init": str(flow)}), (2, 4, 4), 3, codec=made.codec)
    missing = str(tmp_path / "nothing")
    with pytest.raises(InputError, match=rf"prior\.denoiser\.init={missing} is not a DiT pipeline with vae/"):
        new_denoiser(prior_in(tmp_path, denoiser={"init": missing}), (2, 4, 4), 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty is not a DiT pipeline with vae/"):
        new_denoiser(prior_in(tmp_path, denoiser={"init": str(tmp_path / "empty")}), (2, 4, 4), 3)


@torch.no_grad()
def test_fine_tuning_on_other_data_keeps_the_codec(made, toy_images, accelerator, tmp_path):
    """Darker images have other latents; the checkpoint knows those of its codec as they are."""
    images, labels = toy_images["train"]
    dark = load_source({"train": (images * 0.3, labels)}, class_names=list(NAMES))
    z = encode_latents(made.codec, to_signed(every_image(dark)[0]))
    assert (z.std((0, 2, 3)) - 1).abs().max() > 0.1
    cache = encoded(dark, tmp_path / "cache", made.codec)
    with torch.enable_grad():
        prior = from_made(made, tmp_path / "prior", steps=2)
        train_denoiser(cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    assert codec_digest(load_codec(tmp_path / "prior")) == codec_digest(made.codec)
    assert read_json(tmp_path / "prior" / "transformer" / "training.json")["channel_std"] == [1.0, 1.0]


def test_checkpoints_with_a_learned_variance_are_fine_tuned(made, accelerator, tmp_path):
    """As DiT-XL/2 of ImageNet is: twice as many channels come out as go in."""
    from diffusers import DiTPipeline

    stock = tmp_path / "stock"
    shutil.copytree(made.folder, stock)
    tiny_dit(in_channels=2, out_channels=4).save_pretrained(stock / "transformer")
    prior = prior_in(tmp_path / "new", denoiser={"init": str(stock), "steps": 3})
    train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    pipe = DiTPipeline.from_pretrained(tmp_path / "new")
    assert pipe.transformer.config.out_channels == 4
    pipe.set_progress_bar_config(disable=True)
    assert pipe([0, 1], guidance_scale=1.0, num_inference_steps=2, output_type="pt").images.shape == (2, 3, 8, 8)
