"""Options of the denoiser's training: mirrored images, contrastive flow matching, shifted time, Muon."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_prior import (
    NAMES,
    Saying,
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

from dq.config.prior import TrainDenoiserConfig
from dq.config.reader import from_dict
from dq.core.errors import InputError
from dq.core.files import read_json
from dq.core.seeds import generator
from dq.diffusion.codec import encode_latents, to_signed
from dq.diffusion.prior import training
from dq.diffusion.prior.denoiser_loss import DenoiserLoss, contrastive_error, new_scheduler, shift_time, time_shift
from dq.diffusion.prior.denoiser_recipe import denoiser_recipe
from dq.diffusion.prior.train_denoiser import train_denoiser
from dq.networks.optimizers import muon_groups

FLOW = {"objective": "flow", "weighting": "logit_normal"}
ALL = FLOW | {"flip": True, "contrastive": 0.05, "time_shift": "auto", "optimizer": "muon"}
SHORT = {"steps": 4, "save_every": 2, "warmup_steps": 0, "lr": 1e-3, "batch_size": 9}


@pytest.fixture(scope="module")
def flipped(made, toy_source, tmp_path_factory):
    """Latents of the mirrored toy images."""
    return encoded(toy_source, tmp_path_factory.mktemp("flipped"), made.codec, flip=True)


# --- mirrored images ----------------------------------------------------------------------------------------------


def test_the_flipped_cache_holds_latents_of_mirrored_images(made, flipped, toy_source):
    images, labels = every_image(toy_source)
    for label in range(3):
        mirrored = to_signed(images[labels == label].flip(-1))
        torch.testing.assert_close(
            flipped.load(label)[0].float(), encode_latents(made.codec, mirrored), atol=2e-3, rtol=2e-3
        )
    assert flipped.key != made.cache.key
    assert read_json(flipped.folder / "manifest.json")["flip"] is True
    assert "flip" not in read_json(made.cache.folder / "manifest.json")


def test_a_batch_mixes_images_and_mirror_images(made, flipped, accelerator, tmp_path, monkeypatch):
    options = {"class_names": NAMES, "accelerator": accelerator}
    plain = captured(monkeypatch, made.cache, made.codec, prior_in(tmp_path), **options)
    prior = prior_in(tmp_path, denoiser={"flip": True})
    loop = captured(monkeypatch, made.cache, made.codec, prior, **options, flipped=flipped)
    straight, mirrored = (torch.cat([c.load(label)[0].float() for label in range(3)]) for c in (made.cache, flipped))
    count = 0
    for step in range(20):
        batch, other = loop.batch(step), plain.batch(step)
        for name in ("noise", "level", "labels"):
            assert torch.equal(batch[name], other[name])
        rows = (other["latents"][:, None] == straight).flatten(2).all(2).int().argmax(1)
        turned = (batch["latents"] != other["latents"]).flatten(1).any(1)
        assert torch.equal(batch["latents"][turned], mirrored[rows[turned]])
        count += int(turned.sum())
    assert count / 640 == pytest.approx(0.5, abs=4 * (0.25 / 640) ** 0.5)


def test_mirrored_latents_must_be_given_and_be_those_of_the_same_images(made, toy_images, accelerator, tmp_path):
    from dq.data.load import load_source

    prior = prior_in(tmp_path, denoiser={"flip": True})
    with pytest.raises(InputError, match="flip=true needs the latents of the mirrored images"):
        train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    x, y = toy_images["train"] if isinstance(toy_images, dict) else toy_images[0]
    fewer = encoded(load_source((x[1:], y[1:]), class_names=list(NAMES)), tmp_path, made.codec, flip=True)
    with pytest.raises(InputError, match="holds other images than"):
        train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator, flipped=fewer)


# --- contrastive flow matching ------------------------------------------------------------------------------------


def test_contrastive_loss_is_its_formula():
    g = generator("test")
    z, noise, out, other = (torch.randn(4, 2, 4, 4, generator=g) for _ in range(4))
    batch = {"latents": z, "noise": noise, "level": torch.full((4,), 0.5), "labels": torch.zeros(4, dtype=torch.int64)}
    objective = DenoiserLoss(Saying(out), "flow", contrastive=0.05)
    terms = objective(**batch, other=other)
    u = noise - z
    expected = (out - u).square().mean((1, 2, 3)) - 0.05 * (out - other).square().mean((1, 2, 3))
    torch.testing.assert_close(terms["loss"], expected)
    torch.testing.assert_close(terms["error"], (out - u).square().mean((1, 2, 3)))
    # held-out latents come without other targets: the plain error
    assert torch.equal(objective(**batch)["loss"], objective(**batch)["error"])
    # least where the docstring says
    best = (u - 0.05 * other) / 0.95
    v = best.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(contrastive_error(v, u, other, 0.05).sum(), v)
    assert gradient.abs().max() < 1e-6


def test_the_other_target_is_that_of_the_next_item(made, accelerator, tmp_path, monkeypatch):
    prior = prior_in(tmp_path, denoiser=FLOW | {"contrastive": 0.05})
    loop = captured(monkeypatch, made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    batch = loop.batch(3)
    target = batch["noise"] - batch["latents"]
    assert torch.equal(batch["other"][1:], target[:-1])
    assert torch.equal(batch["other"][0], target[-1])
    assert loop.objective.contrastive == 0.05


# --- shifted time -------------------------------------------------------------------------------------------------


def test_a_shift_of_one_is_the_identity_and_others_keep_the_ends():
    t = torch.linspace(0, 1, 11)
    assert torch.equal(shift_time(t, 1.0), t)
    for shift in (0.25, 3.0):
        moved = shift_time(t, shift)
        assert (float(moved[0]), float(moved[-1])) == (0, 1)
        assert (moved.diff() > 0).all()
        torch.testing.assert_close(shift_time(moved, 1 / shift), t)
    assert shift_time(torch.tensor(0.5), 0.25) == pytest.approx(0.2)
    assert time_shift("auto", (16, 8, 8)) == 0.5
    assert time_shift(0.7, (16, 8, 8)) == 0.7


def test_training_and_sampling_shift_alike(made, accelerator, tmp_path, monkeypatch):
    shift = (2 * 4 * 4 / 4096) ** 0.5
    options = {"class_names": NAMES, "accelerator": accelerator}
    plain = captured(monkeypatch, made.cache, made.codec, prior_in(tmp_path, denoiser=FLOW), **options)
    prior = prior_in(tmp_path, denoiser=FLOW | {"time_shift": "auto"})
    loop = captured(monkeypatch, made.cache, made.codec, prior, **options)
    assert torch.equal(loop.batch(0)["level"], shift_time(plain.batch(0)["level"], shift))
    schedulers = new_scheduler("flow"), new_scheduler("flow", shift)
    for scheduler in schedulers:
        scheduler.set_timesteps(10)
    torch.testing.assert_close(schedulers[1].sigmas, shift_time(schedulers[0].sigmas, shift), rtol=1e-5, atol=1e-6)


# --- Muon ---------------------------------------------------------------------------------------------------------


def test_hidden_matrices_are_linear_weights_but_the_last():
    net = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 6), nn.Linear(6, 2))
    hidden, rest = muon_groups(net)
    assert list(hidden) == ["1.weight", "3.weight"]
    assert set(hidden) | set(rest) == set(dict(net.named_parameters()))
    net[1].weight.requires_grad_(False)
    assert list(muon_groups(net, ("3",))[0]) == ["4.weight"]


def test_muon_takes_an_orthogonal_step_on_hidden_matrices_alone(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    recipe = training.Recipe(
        name="net", folder=tmp_path, product=tmp_path / "net", identity={}, steps=1, batch_size=1, lr=0.01,
        emas=(0.9,), save_every=1, dtype="float32", optimizer="muon",
    )  # fmt: skip
    optimizers = training.new_optimizers(recipe, net)
    assert list(optimizers) == ["moment", "muon"]
    before = net[0].weight.detach().clone()
    net[0].weight.grad = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    optimizers["muon"].step()
    moved = (before - net[0].weight) / (0.01 * 0.2 * 4**0.5)
    singular = torch.linalg.svdvals(moved)
    assert singular.min() > 0.4  # five Newton-Schulz steps leave singular values between about 0.5 and 1.5
    assert singular.max() < 1.6
    assert [p.shape for p in optimizers["moment"].param_groups[0]["params"]] == [(4, 4)]
    plain = training.new_optimizers(dataclasses.replace(recipe, optimizer="adamw"), net)
    assert [len(o.param_groups[0]["params"]) for o in plain.values()] == [2]


# --- all of them --------------------------------------------------------------------------------------------------


def test_a_prior_with_every_option_resumes_and_opens_in_the_stock_pipeline(
    made, flipped, accelerator, tmp_path, monkeypatch
):
    from diffusers import DiTPipeline

    options = {"class_names": NAMES, "accelerator": accelerator, "flipped": flipped}
    folders = [tmp_path / "whole", tmp_path / "resumed"]
    train_denoiser(made.cache, made.codec, prior_in(folders[0], denoiser=ALL | SHORT), **options)
    prior = prior_in(folders[1], denoiser=ALL | SHORT)
    with interrupted_at_save(monkeypatch, 2):
        train_denoiser(made.cache, made.codec, prior, **options)
    train_denoiser(made.cache, made.codec, prior, **options)
    assert_same_model(folders[0] / "transformer", folders[1] / "transformer")
    pipe = DiTPipeline.from_pretrained(folders[0])
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.flow_shift == pytest.approx((2 * 4 * 4 / 4096) ** 0.5)
    images = pipe([0, 1, 2], guidance_scale=1.0, num_inference_steps=4, output_type="np").images
    assert images.shape == (3, 8, 8, 3)


def test_options_do_not_depend_on_the_parts_of_a_batch(made, flipped, accelerator, tmp_path):
    options = {"class_names": NAMES, "accelerator": accelerator, "flipped": flipped}
    # Muon turns a gradient of rounding into a whole step
    changes = ALL | SHORT | {"optimizer": "adamw"}
    for name, parts in (("whole", 1), ("split", 4)):
        prior = prior_in(tmp_path / name, denoiser=changes | {"accumulate": parts})
        train_denoiser(made.cache, made.codec, prior, **options)
    whole, split = (metrics(tmp_path / name, "denoiser") for name in ("whole", "split"))
    assert split[-1] == pytest.approx(whole[-1], rel=1e-4)
    assert_nearly_same_model(tmp_path / "split" / "transformer", tmp_path / "whole" / "transformer", 4 * SHORT["lr"])


def test_options_that_are_off_are_no_part_of_a_training(made, accelerator, tmp_path):
    def identity(**changes):
        return denoiser_recipe(
            "key", made.codec, prior_in(tmp_path, denoiser=FLOW | changes), NAMES, accelerator
        ).identity

    assert not {"flip", "contrastive", "time_shift", "optimizer"} & identity().keys()
    for name in ("flip", "contrastive", "time_shift", "optimizer"):
        assert identity(**{name: ALL[name]}) == identity() | {name: ALL[name]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contrastive": 0.05}, "contrastive=0.05 belongs to flow matching; set objective=flow, or contrastive=0"),
        ({"time_shift": 0.5}, "time_shift=0.5 belongs to flow matching"),
        ({"time_shift": "auto"}, "time_shift=auto belongs to flow matching"),
        (FLOW | {"contrastive": 1.0}, r"contrastive is a weight in \[0, 1\), not 1.0"),
        (FLOW | {"contrastive": 0.1, "batch_size": 1}, "contrastive compares items of a batch; set batch_size"),
        (FLOW | {"time_shift": 0}, "time_shift must be auto or a positive number, not 0"),
        (FLOW | {"time_shift": "half"}, "time_shift must be a number, not 'half', or 'auto'"),
        ({"optimizer": "sgd"}, "optimizer must be one of 'adamw', 'muon'"),
    ],
)
def test_wrong_combinations_are_one_sentence(settings, message):
    with pytest.raises(InputError, match=message):
        from_dict(TrainDenoiserConfig, settings)
