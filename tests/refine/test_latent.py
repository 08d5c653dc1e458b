"""FRePo on latents: images of a codec, their gradient, starts, resuming, bad input; alone and as a stage of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from frepo_toy import SMALL, distill, drawn, settings_of, short_student, toy
from models import tiny_kl
from refined import refined
from torch import Tensor, nn

from dq.core.errors import InputError
from dq.data.zca import fit_whitening
from dq.diffusion.codec import decode_latents
from dq.diffusion.image_codec import ImageCodec
from dq.refine import frepo, held_out, record
from dq.refine.frepo import FrepoMethod, refine
from dq.refine.method import Batch, Context, RealImages, Refined, Resources, Session, State
from dq.refine.rendering import Rendering
from dq.refine.starts import first_values

LATENT = dataclasses.replace(SMALL, mode="latent")


def codec(resolution: int = 16) -> ImageCodec:
    """A codec at `resolution` px behind images of 8 px. Its last layer is made larger, so that some pixels clip."""
    vae = tiny_kl()
    vae.decoder.conv_out.weight.data *= 4
    return ImageCodec.of(vae, resolution, 8)


def learn(config: Any = LATENT, **more: Any) -> Refined:
    images, labels = drawn()
    return refined(refine, images, labels, config, toy(), classes=2, codec=codec(), **more)


def test_images_are_decoded_clipped_and_averaged_over_areas() -> None:
    c, z = codec(), 3 * torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = decode_latents(c.codec, z) / 2 + 0.5
    torch.testing.assert_close(c.decode(z), x.unflatten(-1, (8, 2)).unflatten(-3, (8, 2)).mean((-1, -3)))
    assert float(x.max()) == 1  # some are clipped
    torch.testing.assert_close(codec(8).decode(z[..., :4, :4]), decode_latents(c.codec, z[..., :4, :4]) / 2 + 0.5)
    assert ImageCodec.of(tiny_kl(), 8, 16).decode(z[..., :4, :4]).shape == (5, 3, 16, 16)


def test_a_codec_is_copied_to_float32_and_left_as_it_was() -> None:
    vae = tiny_kl().bfloat16()
    c = ImageCodec.of(vae, 8, 8)
    assert next(vae.parameters()).dtype == torch.bfloat16
    assert next(vae.parameters()).requires_grad
    assert {p.dtype for p in c.codec.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in c.codec.parameters())
    bytes_ = toy(4).images
    torch.testing.assert_close(c.encode(bytes_), c.encode(bytes_.float() / 255))
    with pytest.raises(InputError, match="downscaling factor 2"):
        ImageCodec.of(vae, 7, 8)


def test_rendering_in_parts_is_rendering_and_has_the_gradient_of_the_composition() -> None:
    c, whitening = codec(), fit_whitening(toy().images)
    z = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    rendering = Rendering(whitening, c, chunk=2)
    with torch.no_grad():
        torch.testing.assert_close(rendering.images(z), rendering(z), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whitening(rendering.pixels(z)), rendering(z), atol=1e-5, rtol=1e-4)
    assert not rendering.images(z).requires_grad
    plain = c.codec.decode(z / c.codec.config.scaling_factor).sample / 2 + 0.5
    plain = torch.nn.functional.avg_pool2d(plain.clamp(0, 1), 2)
    plain = (plain - whitening.mean.view(-1, 1, 1)) / whitening.std.view(-1, 1, 1)
    plain = ((plain.flatten(1) - whitening.center) @ whitening.matrix).view_as(plain)
    direction = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    expected, gradient = (torch.autograd.grad((v * direction).sum(), z)[0] for v in (plain, rendering(z)))
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)


def test_latents_are_learned_and_images_stay_those_of_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "SAVE_SECONDS", 0.0)
    states: list[State] = []
    config = dataclasses.replace(LATENT, steps=40, lr=0.03, start="noise")
    r = learn(config, save=states.append)
    losses = r.trace[:, 0]
    assert float(losses[-10:].mean()) < 0.8 * float(losses[:5].mean())
    assert r.facts["latents"] == [4, 8, 8]
    assert r.bounded
    assert r.images.shape == (2, 3, 8, 8)
    assert 0 <= float(r.images.min()) <= float(r.images.max()) <= 1
    # the last state is one step before the end, and a step is at most lr of the norm
    before = codec().decode(states[-1].tensors["x.value"])
    torch.testing.assert_close(r.images, before, atol=0.05, rtol=0)
    assert not torch.allclose(r.images, codec().decode(states[0].tensors["x.value"]), atol=0.05)
    assert r.soft_labels.argmax(1).tolist() == [0, 1]
    assert r.label_kind == "regression"


def test_a_step_moves_all_latents_as_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "SAVE_SECONDS", 0.0)
    states: list[State] = []
    learn(dataclasses.replace(LATENT, steps=2, lr=0.02), save=states.append)
    images, _ = drawn()
    start = codec().encode(images)
    moved = (states[0].tensors["x.value"] - start).norm() / start.norm()
    assert float(moved) == pytest.approx(0.02, rel=1e-3)


def test_networks_are_trained_on_the_decoded_whitened_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "SAVE_SECONDS", 0.0)
    states: list[State] = []
    trained: list[Tensor] = []
    advance = frepo.OnlinePool.advance

    def watched(pool: Any, i: int, x: Tensor, *more: Any) -> Any:
        trained.append(x.clone())
        return advance(pool, i, x, *more)

    monkeypatch.setattr(frepo.OnlinePool, "advance", watched)
    learn(dataclasses.replace(LATENT, steps=3), save=states.append)
    with torch.no_grad():
        for x, state in zip(trained[: len(states)], states, strict=True):  # on the updated latents
            expected = fit_whitening(toy().images)(codec().decode(state.tensors["x.value"]))
            torch.testing.assert_close(x, expected)
    assert len(states) == 2


def test_it_goes_on_bit_for_bit_from_a_saved_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(held_out, "student_config", short_student)
    config = dataclasses.replace(LATENT, steps=6, checks=2, check_nets=1, held_out=0.2, chunk=1)
    states: list[State] = []
    whole = learn(config, seed=3, save=states.append)
    again = learn(config, seed=3, resume=states[3])
    for name in ("images", "soft_labels", "trace", "blocks"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    assert again.facts == whole.facts
    assert len(whole.facts["checks"]) == 2


def test_chunks_change_nothing_but_memory() -> None:
    images, labels = drawn(ipc=3)
    results = [
        refined(refine, images, labels, dataclasses.replace(LATENT, chunk=k, steps=3), toy(), classes=2, codec=codec())
        for k in (None, 2)
    ]
    torch.testing.assert_close(results[1].images, results[0].images, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[1].soft_labels, results[0].soft_labels, atol=1e-4, rtol=1e-4)


def test_latents_start_from_what_is_asked_for() -> None:
    real, c = toy(), codec()
    images, labels = drawn(ipc=2)

    def make(start: str, n: int = 4) -> Tensor:
        rendering = Rendering(fit_whitening(real.images), c)
        return first_values(start, images[:1].expand(n, -1, -1, -1), labels[:1].expand(n), real, rendering, 0)

    large = torch.nn.functional.interpolate(images[:1], scale_factor=2, mode="bicubic", antialias=True).clamp(0, 1)
    mean = c.codec.encode(2 * large - 1).latent_dist.mean * c.codec.config.scaling_factor
    torch.testing.assert_close(make("drawn", 1), mean, atol=1e-5, rtol=1e-4)
    encoded = c.encode(real.images)
    chosen = [int((encoded - z).abs().amax((1, 2, 3)).argmin()) for z in make("real")]
    torch.testing.assert_close(make("real"), encoded[chosen], atol=1e-5, rtol=1e-4)
    assert real.labels[chosen].tolist() == [0] * 4
    assert len(set(chosen)) == 4
    noise = make("noise", 200)
    for statistic in (torch.mean, torch.std):
        expected = statistic(encoded, (0, 2, 3))
        torch.testing.assert_close(statistic(noise, (0, 2, 3)), expected, atol=0.03 * float(encoded.std()), rtol=0.03)


def test_latents_of_a_gray_data_set_move_along_all_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = drawn()
    color = toy()
    gray = RealImages(color.images[:, :1].expand(-1, 3, -1, -1).contiguous(), color.labels)
    config = dataclasses.replace(LATENT, flip=False, steps=2)
    learned = refined(refine, images, labels, config, gray, classes=2, codec=codec()).images
    monkeypatch.setattr(frepo, "is_gray", lambda _: False)
    assert torch.equal(refined(refine, images, labels, config, gray, classes=2, codec=codec()).images, learned)


def test_copies_are_moved_apart() -> None:
    images, labels = drawn(ipc=2)
    images[1] = images[0]
    r = refined(refine, images, labels, LATENT, toy(), classes=2, codec=codec())
    assert r.facts["copies"] == 1
    assert not torch.equal(r.images[0], r.images[1])


def test_what_cannot_be_decoded_is_refused(toy_source: Any, accelerator: Any, tmp_path: Path) -> None:
    images, labels = drawn()
    with pytest.raises(InputError, match=r"mode=latent .*codec.*, or mode"):
        refined(refine, images, labels, LATENT, toy(), classes=2)
    with pytest.raises(InputError, match="and there is none"):
        FrepoMethod().run(Batch(images, labels), LATENT, Resources(8, 2, real=toy()), Session())

    class Encoder(nn.Module):
        def encode(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(InputError, match="Encoder cannot decode"):
        ImageCodec.of(Encoder(), 8, 8)
    # before anything of a run is done
    from dq.run.checks import check_generation, check_run
    from dq.run.distill import DistillPipeline

    config = settings_of(tmp_path, mode="latent")
    with pytest.raises(InputError, match="no codec is named"):
        check_run(config, toy_source, "refine", accelerator=accelerator)
    pipe = DistillPipeline(vae=tiny_kl())
    pipe.vae.decode = None
    with pytest.raises(InputError, match="the codec AutoencoderKL cannot decode"):
        check_generation(config, toy_source, pipe)


def test_it_is_a_stage_of_a_run(
    toy_source: Any, accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dq.config.overrides import apply_settings
    from dq.distilled.external import load_set
    from dq.run.checks import check_run
    from dq.run.folder import open_run
    from dq.run.planning.plan import plan
    from dq.run.planning.refining import refining_speed
    from dq.run.stages.assemble import assemble, load_set_of_run
    from dq.run.stages.refine import refine as refine_images

    config = settings_of(tmp_path, mode="latent")
    assert "frepo, 6 images in 1 batch, 4 steps, 24 image steps" in plan(config, toy_source)
    c = ImageCodec.of(tiny_kl(), 8, 8)
    assert refining_speed(config.refine[0], (), 3, 8, torch.device("cpu"), images=6, codec=c).seconds > 0
    s = distill(config, toy_source, accelerator)
    assert s.images.dtype == torch.uint8  # within [0, 1], as decoded images are
    assert s.label_kind == "regression"
    assert torch.equal(load_set(tmp_path / "run" / "dataset").images, s.images)
    summary = s.provenance["refine"][0]["summary"]
    assert summary["latents"] == [4, 4, 4]
    assert summary["end_std"] > 0
    # the refine stage alone loads the codec that made the latents, to the same set, and takes no other
    tiny_kl().save_pretrained(tmp_path / "vae")
    tiny_kl(seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "run" / "images" / "refined.json").unlink()
    for folder in (tmp_path / "run" / "images").glob("*frepo*"):
        (folder / "summary.json").unlink()
        (folder / "batch-00000.safetensors").unlink()
    for name in ("other", "vae"):
        named = apply_settings(config, {"codec.path": str(tmp_path / name)})
        check_run(named, toy_source, "refine", accelerator=accelerator)
        run = open_run(named, toy_source, accelerator)
        if name == "other":
            with pytest.raises(InputError, match="were made by another codec"):
                refine_images(run)
    refine_images(run)
    assemble(run)
    assert torch.equal(load_set_of_run(run, 2, "ddoq").images, s.images)


def test_settings_say_what_is_needed() -> None:
    method = FrepoMethod()
    assert method.needs(LATENT).codec
    assert not method.needs(SMALL).codec
    assert method.cost(LATENT, Context(8, 0)).steps == 8
