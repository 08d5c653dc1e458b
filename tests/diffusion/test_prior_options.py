"""Options of the denoiser's training: mirrored images, contrastive flow matching, shifted time, Muon."""

from __future__ import annotations

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from models import tiny_dit
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
from dq.config.schema import GenerateConfig
from dq.core.errors import InputError, RunError
from dq.core.files import read_json
from dq.core.seeds import generator
from dq.diffusion.codec import encode_latents, to_signed
from dq.diffusion.generator import LatentGenerator
from dq.diffusion.prior import training
from dq.diffusion.prior.denoiser_loss import DenoiserLoss, contrastive_error, new_scheduler, shift_time, time_shift
from dq.diffusion.prior.denoiser_recipe import denoiser_recipe
from dq.diffusion.prior.samples import Draw, sample_images
from dq.diffusion.prior.train_denoiser import train_denoiser
from dq.diffusion.sampling import dit_prediction
from dq.diffusion.weaker_models import HiddenStates, head_output, new_head
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
    with pytest.raises(InputError, match=r"flip=true .*mirrored"):
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
    optimizer = training.new_optimizer(recipe, net)
    before = net[0].weight.detach().clone()
    net[0].weight.grad = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    net[1].weight.grad = torch.zeros(4, 4)
    last = net[1].weight.detach().clone()
    optimizer.step()
    assert torch.equal(net[1].weight, last)  # the output layer is AdamW's, which makes no step of zeros
    moved = (before - net[0].weight) / (0.01 * 0.2 * 4**0.5)
    singular = torch.linalg.svdvals(moved)
    assert singular.min() > 0.4  # five Newton-Schulz steps leave singular values between about 0.5 and 1.5
    assert singular.max() < 1.6
    assert [[p.shape for p in g["params"]] for g in optimizer.param_groups] == [[(4, 4)], [(4, 4)]]
    plain = training.new_optimizer(dataclasses.replace(recipe, optimizer="adamw"), net)
    assert [len(g["params"]) for g in plain.param_groups] == [2]


# --- all of them --------------------------------------------------------------------------------------------------


def test_options_do_not_depend_on_the_parts_of_a_batch(made, flipped, accelerator, tmp_path):
    options = {"class_names": NAMES, "accelerator": accelerator, "flipped": flipped}
    # Muon turns a gradient of rounding into a whole step
    changes = ALL | SHORT | {"optimizer": "adamw", "steps": 2}
    for name, parts in (("whole", 1), ("split", 4)):
        prior = prior_in(tmp_path / name, denoiser=changes | {"accumulate": parts})
        train_denoiser(made.cache, made.codec, prior, **options)
    whole, split = (metrics(tmp_path / name, "denoiser") for name in ("whole", "split"))
    assert split[-1] == pytest.approx(whole[-1], rel=1e-4)
    assert_nearly_same_model(tmp_path / "split" / "transformer", tmp_path / "whole" / "transformer", 2 * SHORT["lr"])


def test_options_that_are_off_are_no_part_of_a_training(made, accelerator, tmp_path):
    def identity(**changes):
        return denoiser_recipe(
            "key", made.codec, prior_in(tmp_path, denoiser=FLOW | {"num_layers": 2} | changes), NAMES, accelerator
        ).identity

    on = ALL | {"intermediate_head": 0.5, "early": 0.125}
    for name in ("flip", "contrastive", "time_shift", "optimizer", "intermediate_head", "early"):
        assert name not in identity()
        assert identity(**{name: on[name]}) == identity() | {name: on[name]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contrastive": 0.05}, "contrastive=0.05 belongs to flow matching; set objective=flow, or contrastive=0"),
        ({"time_shift": 0.5}, "time_shift=0.5 belongs to flow matching"),
        ({"time_shift": "auto"}, "time_shift=auto belongs to flow matching"),
        (FLOW | {"contrastive": 1.0}, r"contrastive must be a number in \[0, 1\), not 1.0"),
        (FLOW | {"contrastive": 0.1, "batch_size": 1}, "contrastive compares items of a batch; set batch_size"),
        (FLOW | {"time_shift": 0}, "time_shift must be a number of more than 0 or 'auto', not 0"),
        (FLOW | {"time_shift": "half"}, "time_shift must be a number of more than 0 or 'auto', not 'half'"),
        ({"early": 1.0}, r"early must be a number in \[0, 1\), not 1.0"),
        ({"optimizer": "sgd"}, "optimizer must be one of 'adamw', 'muon'"),
    ],
)
def test_wrong_combinations_are_one_sentence(settings, message):
    with pytest.raises(InputError, match=message):
        from_dict(TrainDenoiserConfig, settings)


# --- weaker versions ----------------------------------------------------------------------------------------------

WEAKER = ALL | SHORT | {"intermediate_head": 0.5, "early": 0.5, "num_layers": 2, "lr": 0.02}


@pytest.fixture(scope="module")
def weakened(made, flipped, accelerator, tmp_path_factory):
    """A prior with every option, whose head and early average predict differently."""
    folder = tmp_path_factory.mktemp("weaker")
    options = {"class_names": NAMES, "accelerator": accelerator, "flipped": flipped}
    return train_denoiser(made.cache, made.codec, prior_in(folder, denoiser=WEAKER), **options)


def noisy_points() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(3, 2, 4, 4, generator=generator("points")), torch.tensor(400.0), torch.arange(3)


def test_the_head_loss_is_that_of_the_hidden_states_behind_a_third_of_the_blocks(made):
    model = tiny_dit(in_channels=2)
    for p in (head := new_head(model)).parameters():
        nn.init.normal_(p, std=0.2)
    assert [new_head(SimpleNamespace(config=SimpleNamespace(**dict(model.config, num_layers=n)))).config["depth"]
            for n in (1, 4, 7, 12)] == [1, 1, 2, 4]  # fmt: skip
    z, noise = (torch.randn(4, 2, 4, 4, generator=generator("head", i)) for i in range(2))
    batch = {"latents": z, "noise": noise, "level": torch.full((4,), 0.4), "labels": torch.tensor([0, 1, 2, 3])}
    plain = DenoiserLoss(model, "flow")(**batch)
    terms = DenoiserLoss(model, "flow", head=head, head_weight=0.5)(**batch)
    # a DiT of that one block alone, with the head as its output layer, predicts what the head does
    short = tiny_dit(in_channels=2)
    short.load_state_dict(model.state_dict())
    short.transformer_blocks = short.transformer_blocks[:1]
    short.proj_out_1.load_state_dict(head.proj_out_1.state_dict())
    short.proj_out_2.load_state_dict(head.proj_out_2.state_dict())
    weak = DenoiserLoss(short, "flow")(**batch)
    torch.testing.assert_close(terms["head_error"], weak["error"])
    assert torch.equal(terms["error"], plain["error"])
    torch.testing.assert_close(terms["loss"], plain["error"] + 0.5 * weak["error"])
    assert (weak["error"] - plain["error"]).abs().min() > 1e-3


def test_internal_guidance_of_one_is_the_last_layer_and_grows_linearly(weakened):
    pipe = LatentGenerator.from_pretrained(weakened)
    x, t, y = noisy_points()
    with torch.no_grad():
        final, once, twice, thrice = (pipe.prediction(w)(x, t, y) for w in (1.0, 1.0 + 1e-9, 2.0, 3.0))
        assert torch.equal(final, dit_prediction(pipe.transformer)(x, t, y))
        torch.testing.assert_close(once, final)
        torch.testing.assert_close(thrice - twice, twice - final)
        head = pipe.weaker._open_head(pipe.transformer)
        weak = final - (twice - final)  # D_i = D_f - (D_2 - D_f)
        states = HiddenStates(pipe.transformer, head.config["depth"])
        pipe.transformer(x, timestep=t.expand(3), class_labels=y)
        torch.testing.assert_close(weak, head_output(pipe.transformer, head, states.take(), t.expand(3), y))
    assert (twice - final).abs().max() > 1e-3


def test_autoguidance_leads_away_from_the_early_average(weakened):
    pipe = LatentGenerator.from_pretrained(weakened)
    early = DiTTransformer2DModel.from_pretrained(weakened, subfolder="transformer_early")
    x, t, y = noisy_points()
    with torch.no_grad():
        d0, d1 = (dit_prediction(m)(x, t, y) for m in (early, pipe.transformer))
        torch.testing.assert_close(pipe.prediction(autoguidance=2.5)(x, t, y), d0 + 2.5 * (d1 - d0))
    assert (d1 - d0).abs().max() > 1e-3


def test_the_folder_stays_one_of_the_stock_pipeline(weakened):
    pipe = DiTPipeline.from_pretrained(weakened)
    pipe.set_progress_bar_config(disable=True)
    assert {p.name for p in weakened.iterdir() if p.is_dir()} == {
        "vae", "transformer", "transformer_head", "transformer_early", "scheduler", "samples",
    }  # fmt: skip
    assert not any("head" in name for name in pipe.transformer.state_dict())
    assert pipe.scheduler.config.flow_shift == pytest.approx((2 * 4 * 4 / 4096) ** 0.5)
    stock = pipe([0, 2], guidance_scale=1.0, num_inference_steps=3, generator=generator("stock"), output_type="np")
    ours = LatentGenerator.from_pretrained(weakened)(
        [0, 2], guidance_scale=1.0, num_inference_steps=3, generator=generator("stock"), output_type="np"
    )
    # the stock pipeline gives the model times cut to whole numbers
    assert abs(stock.images - ours.images).max() < 0.01


def test_every_option_resumes_bit_for_bit(made, flipped, weakened, accelerator, tmp_path, monkeypatch):
    prior = prior_in(tmp_path, denoiser=WEAKER)
    options = {"class_names": NAMES, "accelerator": accelerator, "flipped": flipped}
    with interrupted_at_save(monkeypatch, 2):
        train_denoiser(made.cache, made.codec, prior, **options)
    assert (tmp_path / "transformer_early").is_dir()  # of step 2
    train_denoiser(made.cache, made.codec, prior, **options)
    for folder in ("transformer", "transformer_early"):
        assert_same_model(tmp_path / folder, weakened / folder)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "transformer_head" / file).read_bytes() == (
            weakened / "transformer_head" / file
        ).read_bytes()


def test_a_finished_training_that_lost_a_part_is_not_done(made, flipped, weakened, accelerator, tmp_path):
    prior = prior_in(tmp_path / "prior", denoiser=WEAKER)
    options = {"class_names": NAMES, "accelerator": accelerator, "flipped": flipped}
    for part in ("transformer_early", "transformer_head", "scheduler"):
        shutil.copytree(weakened, tmp_path / "prior")
        assert train_denoiser(made.cache, made.codec, prior, **options) == tmp_path / "prior"
        shutil.rmtree(tmp_path / "prior" / part)
        with pytest.raises(RunError, match=rf"lacks {part}/.* of a finished denoiser.* another prior.output_dir"):
            train_denoiser(made.cache, made.codec, prior, **options)
        shutil.rmtree(tmp_path / "prior")


def test_the_stock_pipeline_of_few_classes_guides_only_at_a_scale_of_one(weakened):
    pipe = DiTPipeline.from_pretrained(weakened)  # `docs/how-to/train-a-prior.md` says so
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(IndexError):
        pipe([0, 2], num_inference_steps=2, output_type="np")


def test_weaker_versions_of_another_training_are_refused(weakened, tmp_path):
    shutil.copytree(weakened, tmp_path / "prior")
    record = tmp_path / "prior" / "transformer" / "training.json"
    record.write_text(record.read_text().replace(read_json(record)["digest"], "other").replace("checksum", "old"))
    pipe = LatentGenerator.from_pretrained(tmp_path / "prior")
    for name in ("internal_guidance", "autoguidance"):
        with pytest.raises(InputError, match=r"transformer_\w+/ of .* is of another training than transformer/"):
            pipe.prediction(**{name: 2.0})


def test_guided_images_differ_and_a_missing_version_is_named(made, weakened):
    config = GenerateConfig(mode="dit", strength=0.7, snr=None, num_inference_steps=4, guidance_scale=1.5)
    pipe, points = LatentGenerator.from_pretrained(weakened), torch.randn(3, 2, 4, 4, generator=generator("points"))

    def images(**changes):
        chosen = dataclasses.replace(config, **changes)
        pipe.check_inputs(chosen, 8, NAMES)
        return pipe.synthesize(points, [0, 1, 2], [generator(i) for i in range(3)], chosen, class_names=NAMES)

    plain = images()
    for name in ("internal_guidance", "autoguidance"):
        assert not torch.equal(images(**{name: 2.0}), plain)
        with pytest.raises(
            InputError,
            match=rf"generate\.{name} needs transformer_\w+/, which .* lacks; only a whole training makes it: ",
        ):
            LatentGenerator.from_pretrained(made.folder).check_inputs(
                dataclasses.replace(config, **{name: 2.0}), 8, NAMES
            )
        with pytest.raises(InputError, match=f"{name} is of a DiT's own weaker versions; set mode=dit"):
            GenerateConfig(mode="img2img", **{name: 2.0})


def test_samples_are_kept_apart_by_their_guidance(weakened):
    def draw(**scales):
        pipe = LatentGenerator.from_pretrained(weakened)
        return Draw(pipe, pipe.scheduler, [0, 1, 2], [1, 1, 1], 3, 8, 0, 8, **scales)

    plain, guided = draw(), draw(internal_guidance=2.0)
    assert plain.weaker_guidance == {}
    assert guided.weaker_guidance == {"internal_guidance": 2.0}
    assert guided.identity(1.0) == [*plain.identity(1.0), {"internal_guidance": 2.0}]
    assert not torch.equal(sample_images(plain, 1.0), sample_images(guided, 1.0))


# --- compilation --------------------------------------------------------------------------------------------------


def test_without_a_compiler_training_is_eager_in_one_line(made, accelerator, tmp_path, monkeypatch, caplog):
    models = {}
    for compiled in (False, True):
        prior = prior_in(tmp_path / str(compiled), denoiser={**SHORT, "compile": compiled})
        if compiled:
            monkeypatch.delenv("CXX", raising=False)
            monkeypatch.setenv("PATH", "")
        models[compiled] = train_denoiser(made.cache, made.codec, prior, class_names=NAMES, accelerator=accelerator)
    lines = [r.getMessage() for r in caplog.records if r.name == "dq" and "compile" in r.getMessage()]
    assert lines == ["prior.denoiser.compile: the model is not compiled, as there is no compiler (c++, g++, clang++)"]
    assert_same_model(models[False] / "transformer", models[True] / "transformer")
