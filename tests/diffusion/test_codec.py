from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from models import tiny_dc, tiny_kl

from dq.core.errors import InputError, RunError
from dq.core.seeds import generator
from dq.diffusion.codec import (
    codec_digest,
    decode_latents,
    downscale,
    encode_latents,
    latent_shape,
    load_codec,
    normalized,
    to_signed,
    to_unit,
)


def tiny_taesd() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    ).eval()


IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [lambda: tiny_kl(scaling_factor=0.3, shift_factor=0.1), tiny_taesd, tiny_dc], ids=["kl", "tiny", "dc"]
)
def test_encode_and_decode_are_the_models_own_in_the_denoisers_space(make) -> None:
    codec = make()
    z = encode_latents(codec, IMAGES)
    assert tuple(z.shape[1:]) == latent_shape(codec, 8) == (4, 4, 4)
    assert downscale(codec) == 2
    encoded = codec.encode(IMAGES)
    if hasattr(encoded, "latent_dist"):
        own = (encoded.latent_dist.mode() - 0.1) * 0.3
    elif hasattr(encoded, "latents"):
        own = encoded.latents
    else:
        own = encoded.latent * 0.5
    assert torch.allclose(z, own, atol=1e-5)
    raw = z / 0.3 + 0.1 if hasattr(encoded, "latent_dist") else z if hasattr(encoded, "latents") else z / 0.5
    assert torch.allclose(decode_latents(codec, z), codec.decode(raw).sample.clamp(-1, 1), atol=1e-5)


@torch.no_grad()
def test_channel_statistics_of_the_config_are_used() -> None:
    codec = tiny_kl(scaling_factor=1.0, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    plain = tiny_kl(scaling_factor=1.0)
    m, s = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1), torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    z = encode_latents(codec, IMAGES)
    assert torch.allclose(z, (encode_latents(plain, IMAGES) - m) / s, atol=1e-5)
    assert torch.allclose(decode_latents(codec, z), decode_latents(plain, z * s + m), atol=1e-5)


NORMALIZABLE = {
    "kl": lambda: tiny_kl(scaling_factor=0.3, shift_factor=0.1),
    "kl with statistics": lambda: tiny_kl(
        scaling_factor=0.5, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0]
    ),
    "kl without 1x1": lambda: tiny_kl(
        scaling_factor=0.3, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False
    ),
    "tiny": tiny_taesd,
    "dc": tiny_dc,
}
MEAN, STD = torch.tensor([0.3, -0.2, 0.0, 2.0]), torch.tensor([0.5, 2.0, 1.0, 0.1])


@torch.no_grad()
@pytest.mark.parametrize("kind", NORMALIZABLE)
def test_a_normalized_codec_is_the_old_one_in_other_units(kind: str, tmp_path: Path) -> None:
    old = NORMALIZABLE[kind]()
    before = codec_digest(old)
    new = normalized(old, MEAN, STD)
    assert codec_digest(old) == before
    m, s = MEAN.view(1, 4, 1, 1), STD.view(1, 4, 1, 1)
    z = encode_latents(old, IMAGES)
    z_new = encode_latents(new, IMAGES)
    torch.testing.assert_close(z_new, (z - m) / s, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(decode_latents(new, z_new), decode_latents(old, z), atol=2e-5, rtol=0)
    other = torch.randn(2, 4, 4, 4, generator=generator(3))
    torch.testing.assert_close(decode_latents(new, other), decode_latents(old, other * s + m), atol=2e-5, rtol=0)
    if kind.startswith("kl"):  # the posterior goes along
        draws = [
            encode_latents(c, IMAGES, posterior="sample", generators=[generator(r) for r in range(3)])
            for c in (old, new)
        ]
        assert (draws[0] - z).abs().min() > 0
        torch.testing.assert_close(draws[1], (draws[0] - m) / s, atol=5e-5, rtol=1e-4)
    # twice is once with both
    again = normalized(new, torch.tensor([1.0, 2, 3, 4]), torch.tensor([2.0, 2, 4, 1]))
    expected = (z_new - torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1)) / torch.tensor([2.0, 2, 4, 1]).view(1, 4, 1, 1)
    torch.testing.assert_close(encode_latents(again, IMAGES), expected, atol=2e-5, rtol=1e-5)
    # a folder keeps it
    new.save_pretrained(tmp_path)
    back = load_codec(tmp_path)
    assert codec_digest(back) == codec_digest(new) != before
    torch.testing.assert_close(encode_latents(back, IMAGES), z_new, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kl", "kl with statistics"])
def test_stock_pipelines_decode_with_a_normalized_codec(kind: str) -> None:
    """They know nothing but the scaling factor."""
    old = NORMALIZABLE[kind]()
    new = normalized(old, MEAN, STD)
    z = encode_latents(new, IMAGES)
    stock = new.decode(z / new.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(stock, decode_latents(old, encode_latents(old, IMAGES)), atol=2e-5, rtol=0)
    posterior, theirs = new.encode(IMAGES).latent_dist, old.encode(IMAGES).latent_dist
    ratio = posterior.std / theirs.std  # one number for each channel
    torch.testing.assert_close(ratio, ratio[:1, :, :1, :1].expand_as(ratio), rtol=1e-4, atol=0)
    own_std = torch.tensor(old.config.latents_std or [1.0] * 4)
    expected = old.config.scaling_factor / own_std / STD
    torch.testing.assert_close(ratio[0, :, 0, 0], expected, rtol=1e-4, atol=0)
    assert new.config.latents_mean is new.config.latents_std is new.config.shift_factor is None


def test_latents_that_do_not_vary_cannot_be_normalized() -> None:
    with pytest.raises(RunError, match=r"do not vary in channel\(s\) \[1, 3\]"):
        normalized(tiny_kl(), torch.zeros(4), torch.tensor([1.0, 0.0, 2.0, float("nan")]))


@torch.no_grad()
@pytest.mark.parametrize(("make", "factor"), [(tiny_kl, 0.18215), (tiny_taesd, 1.0), (tiny_dc, 0.5)])
def test_channel_statistics_hold_for_every_class(make, factor: float, tmp_path: Path) -> None:
    """A prior trained on latents normalized per channel saves the statistics in the codec's config, whatever it is."""
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    plain = make()
    before = codec_digest(plain)
    raw = encode_latents(plain, IMAGES) / factor
    plain.register_to_config(latents_mean=mean, latents_std=std)
    plain.save_pretrained(tmp_path / "codec")
    codec = load_codec(tmp_path / "codec")
    view = (1, 4, 1, 1)
    z = encode_latents(codec, IMAGES)
    assert torch.allclose(z, (raw - torch.tensor(mean).view(view)) / torch.tensor(std).view(view) * factor, atol=1e-5)
    assert torch.allclose(decode_latents(codec, z), decode_latents(make(), raw * factor), atol=1e-5)
    assert codec_digest(codec) == codec_digest(plain) != before


@torch.no_grad()
def test_posterior_sample_belongs_to_the_image_not_to_the_batch() -> None:
    codec = tiny_kl()

    def draw(rows: list[int]) -> torch.Tensor:
        return encode_latents(codec, IMAGES[rows], posterior="sample", generators=[generator(0, r) for r in rows])

    together = draw([0, 1, 2])
    assert torch.allclose(together[2], draw([2])[0], atol=1e-6)
    assert not torch.allclose(together, encode_latents(codec, IMAGES))
    posterior = codec.encode(IMAGES).latent_dist
    expected = posterior.mean[1] + posterior.std[1] * torch.randn(4, 4, 4, generator=generator(0, 1))
    assert torch.allclose(together[1], expected * codec.config.scaling_factor, atol=1e-5)
    with pytest.raises(InputError, match="one generator per image, 3 in this batch"):
        encode_latents(codec, IMAGES, posterior="sample")


@torch.no_grad()
def test_non_finite_latents_stop() -> None:
    codec = tiny_kl()
    codec.encoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(RunError, match=r"NaN .*float32; .*codec\.dtype=bfloat16"):
        encode_latents(codec, IMAGES)


def test_load_from_model_and_from_pipeline_folder(tmp_path: Path) -> None:
    codec = tiny_kl()
    codec.save_pretrained(tmp_path / "alone")
    codec.save_pretrained(tmp_path / "pipe" / "vae")
    a = load_codec(tmp_path / "alone")
    b = load_codec(tmp_path / "pipe")
    assert codec_digest(a) == codec_digest(b) == codec_digest(codec)
    half = load_codec(tmp_path / "alone", dtype="bfloat16")
    assert next(half.parameters()).dtype == torch.bfloat16
    assert codec_digest(tiny_kl(seed=1)) != codec_digest(codec)
    assert codec_digest(tiny_kl(scaling_factor=0.5)) != codec_digest(codec)


def test_wrong_codecs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no model folder"):
        load_codec(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty has no config.json"):
        load_codec(tmp_path / "empty")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(InputError, match="is a UNet2DModel, not one of the autoencoders"):
        load_codec(tmp_path / "unet")
    with pytest.raises(InputError, match=r"resolution=9 .*factor 2"):
        latent_shape(tiny_kl(), 9)


def test_pixel_ranges() -> None:
    x = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert to_signed(x).flatten().tolist() == [-1, 1]
    assert to_unit(to_signed(x)).flatten().tolist() == [0, 1]
    board = (torch.arange(64).view(8, 8) + torch.arange(8)[:, None]) % 2 * 2.0 - 1
    small = to_unit(board.expand(1, 3, 8, 8), 2)
    assert small.shape == (1, 3, 2, 2)
    assert torch.allclose(small, torch.full_like(small, 0.5), atol=0.05)
