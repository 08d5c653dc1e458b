"""Rules of the codec's training: its losses, its measures, its architectures, and what it may start from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from models import tiny_dc, tiny_kl
from safetensors.torch import save_file
from small_prior import CODEC, every_image, metrics, prior_in
from torch import nn

from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError, RunError
from dq.core.files import read_json
from dq.core.seeds import generator
from dq.diffusion.codec import codec_digest, encode_latents, load_codec, to_signed
from dq.diffusion.prior.train_codec import (
    CodecLoss,
    latent_statistics,
    new_codec,
    perceptual_distance,
    psnr,
    reconstruct,
    ssim,
    stage_features,
    train_codec,
)
from dq.networks.teacher import Teacher
from dq.networks.teacher_loading import load_teacher
from dq.networks.zoo import make_net

X = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# --- features of a classifier -------------------------------------------------------------------------------------


class TwoStages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(5, 4, 3, stride=2), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x)).mean((2, 3)))


def judge_of(net: nn.Module) -> Teacher:
    net = net.eval().requires_grad_(False)
    return Teacher(net, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), batch_size=8, digest="", name="judge")


@pytest.fixture
def judge() -> Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return judge_of(TwoStages())


def unit(v: torch.Tensor) -> torch.Tensor:
    return v / v.norm() if v.any() else v


def test_perceptual_distance_is_that_of_normalized_features(judge):
    x = (X - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    y = (Y - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    expected = torch.zeros(3)
    for i in range(3):
        a, b = judge.net.first(x[i : i + 1]), judge.net.first(y[i : i + 1])
        for p, q in ((a, b), (judge.net.second(a), judge.net.second(b))):
            places = [
                (unit(p[0, :, r, c]) - unit(q[0, :, r, c])).square().sum()
                for r in range(p.shape[2])
                for c in range(p.shape[3])
            ]
            expected[i] += sum(places) / len(places) / 2
    distance = perceptual_distance(judge, X, Y)
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-5)
    assert (distance > 0.01).all()
    assert perceptual_distance(judge, X, X.clone()).tolist() == [0, 0, 0]
    # a wrapper around the network is looked through
    torch.testing.assert_close(perceptual_distance(judge_of(nn.Sequential(judge.net)), X, Y), distance)


def test_perceptual_gradient_reaches_the_decoder_and_not_the_judge(judge):
    model = tiny_kl()
    objective = CodecLoss(model, 0.0, judge, perceptual_weight=2.0)
    assert {name.split(".")[0] for name, _ in objective.named_parameters()} == {"model"}
    batch = {"images": (X * 255).to(torch.uint8), "noise": torch.zeros(3, 4, 4, 4)}
    terms = objective.train()(**batch)
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 2 * terms["perceptual"])
    terms["perceptual"].sum().backward()
    for part in (model.decoder, model.encoder):
        assert sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in judge.net.parameters())
    assert not judge.net.training
    state = {k: v.clone() for k, v in judge.net.state_dict().items()}
    objective(**batch)
    assert all(torch.equal(v, state[k]) for k, v in judge.net.state_dict().items())


def test_classifiers_without_maps_cannot_judge():
    with pytest.raises(InputError, match="judge has no part"):
        stage_features(judge_of(nn.Sequential(nn.Flatten(), nn.Linear(192, 3))), X)


def test_the_perceptual_term_brings_features_together(made, toy_source, accelerator, tmp_path):
    """From one start, with and without it; at weight 0 it is as if there were none."""
    save_file(make_net("convnet3", 3, 8, seed=0).state_dict(), tmp_path / "judge.safetensors")
    config = TeacherConfig(net="convnet3", path=str(tmp_path / "judge.safetensors"))
    judge, (images, _) = load_teacher(config, 3, 8), every_image(toy_source, "test")
    start = {"init": str(made.vae), "steps": 30, "save_every": 30, "schedule": "cosine", "ema": 0.5}

    def trained(name: str, **changes) -> float:
        prior = prior_in(tmp_path / name, codec=start | changes)
        vae = train_codec(toy_source, CODEC, prior, accelerator=accelerator)
        back = reconstruct(load_codec(vae), images)
        return float(perceptual_distance(judge, back * 0.5 + 0.5, images / 255).mean())

    without = trained("without")
    assert trained("nothing", perceptual=config, perceptual_weight=0.0) == without
    assert trained("much", perceptual=config, perceptual_weight=40.0) < 0.9 * without
    assert metrics(tmp_path / "much", "codec")[-1]["perceptual"] > 0
    # the classifier is known by what it computes
    save_file(make_net("convnet3", 3, 8, seed=1).state_dict(), tmp_path / "judge.safetensors")
    with pytest.raises(RunError, match="holds a codec of other settings"):
        trained("much", perceptual=config, perceptual_weight=40.0)


# --- measures -----------------------------------------------------------------------------------------------------


def slow_ssim(x: np.ndarray, y: np.ndarray, side: int) -> float:
    """Wang et al. 2004, equation 13, for one image (C, H, W) in [-1, 1]."""
    offsets = np.arange(side) - side // 2
    w = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    w /= w.sum()
    values = []
    for c in range(x.shape[0]):
        for i in range(x.shape[1] - side + 1):
            for j in range(x.shape[2] - side + 1):
                a, b = x[c, i : i + side, j : j + side], y[c, i : i + side, j : j + side]
                ma, mb = (w * a).sum(), (w * b).sum()
                va, vb, vab = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
                c1, c2 = 0.02**2, 0.06**2
                values.append((2 * ma * mb + c1) * (2 * vab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize(("height", "width", "side"), [(14, 12, 11), (8, 9, 7), (11, 11, 11), (2, 5, 1), (1, 1, 1)])
def test_ssim_is_that_of_a_plain_loop(height, width, side):
    g = generator("test")
    x = torch.rand(2, 3, height, width, generator=g) * 2 - 1
    y = (x + 0.5 * torch.randn(x.shape, generator=g)).clamp(-1, 1)
    expected = np.mean([slow_ssim(a.double().numpy(), b.double().numpy(), side) for a, b in zip(x, y, strict=True)])
    assert ssim(x, y) == pytest.approx(expected, abs=1e-4)
    assert ssim(x, y) == pytest.approx(ssim(y, x), abs=1e-6)
    assert ssim(x, x) == pytest.approx(1, abs=1e-6)
    assert ssim(x, y) < 0.99


def test_similarity_falls_with_noise():
    g = generator("test")
    x = torch.nn.functional.interpolate(torch.rand(4, 3, 4, 4, generator=g) * 2 - 1, 16, mode="bilinear")
    noise = torch.randn(x.shape, generator=g)
    for measure in (ssim, psnr):
        values = [measure(x, x + s * noise) for s in (0.0, 0.05, 0.1, 0.3, 1.0)]
        assert sorted(values, reverse=True) == values
        assert len(set(values)) == 5


def test_psnr_is_the_mean_over_images():
    x = torch.zeros(2, 3, 4, 4)
    y = x.clone()
    y[0] += 0.2  # 0.1 of the range: 20 dB
    y[1] += 0.02  # 40 dB
    assert psnr(x, y) == pytest.approx(30, abs=1e-4)


@torch.no_grad()
def test_statistics_are_those_of_all_latents_at_once():
    images = torch.randint(256, (150, 3, 8, 8), dtype=torch.uint8, generator=generator("test"))
    codec = tiny_kl()
    z = encode_latents(codec, to_signed(images))
    mean, std = latent_statistics(codec, images)
    torch.testing.assert_close(mean, z.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(std, z.std((0, 2, 3), correction=0), atol=1e-5, rtol=1e-4)
    _, still = latent_statistics(codec, images[:1].expand(150, -1, -1, -1) * 0)
    assert torch.isfinite(still).all()


# --- architectures and starting points ----------------------------------------------------------------------------


TINY = {"architecture": "tiny", "block_out_channels": (8, 8)}


def test_autoencoder_tiny_trains(toy_source, accelerator, tmp_path):
    from diffusers import AutoencoderTiny

    changes = TINY | {"steps": 100, "save_every": 50}
    vae = train_codec(toy_source, CODEC, prior_in(tmp_path, codec=changes), accelerator=accelerator)
    assert isinstance(AutoencoderTiny.from_pretrained(vae), AutoencoderTiny)
    first, last = metrics(tmp_path, "codec")
    assert "kl" not in last  # there is no posterior
    assert last["reconstruction"] < 0.5 * first["reconstruction"]
    assert last["psnr"] > first["psnr"]
    codec, (images, _) = load_codec(vae), every_image(toy_source)
    with torch.no_grad():
        z = encode_latents(codec, to_signed(images))
    assert z.mean((0, 2, 3)).tolist() == pytest.approx([0, 0], abs=1e-4)
    assert z.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1], abs=1e-4)
    test, _ = every_image(toy_source, "test")
    assert psnr(reconstruct(codec, test), to_signed(test)) == pytest.approx(last["psnr"], abs=1e-3)


def test_levels_of_autoencoder_tiny_are_alike(tmp_path):
    prior = prior_in(tmp_path, codec=TINY | {"block_out_channels": (8, 16)})
    with pytest.raises(InputError, match=r"block_out_channels=\[8, 16\] differ by level.*or take architecture=kl"):
        new_codec(prior, 8)


@pytest.mark.parametrize(("kind", "steps"), [("made", 1), ("kl", 1), ("kl", 0), ("dc", 1)])
def test_fine_tuning_starts_at_the_given_codec(made, toy_source, accelerator, tmp_path, kind, steps):
    start = tmp_path / "start"
    if kind == "made":
        start = made.vae
    else:
        (tiny_kl(scaling_factor=0.3, shift_factor=0.1) if kind == "kl" else tiny_dc()).save_pretrained(start)
    given = load_codec(start)
    images, _ = every_image(toy_source, "test")
    changes = {"init": str(start), "steps": steps, "lr": 1e-9}
    prior = prior_in(tmp_path / "prior", codec=changes)
    model = new_codec(prior, 8)
    assert codec_digest(model) == codec_digest(given)
    assert all(p.requires_grad for p in model.parameters())
    vae = train_codec(toy_source, CODEC, prior, accelerator=accelerator)
    new = load_codec(vae)
    assert type(new) is type(given)
    torch.testing.assert_close(reconstruct(new, images), reconstruct(given, images), atol=1e-4, rtol=0)
    # the latents are normal now
    train, _ = every_image(toy_source)
    mean, std = latent_statistics(new, train)
    assert mean.abs().max() < 1e-4
    assert (std - 1).abs().max() < 1e-4
    # the same command is needed, and costs nothing
    before = (vae / "training.json").stat().st_mtime_ns
    train_codec(toy_source, CODEC, prior, accelerator=accelerator)
    assert (vae / "training.json").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="holds a codec of other settings"):
        train_codec(toy_source, CODEC, prior_in(tmp_path / "prior", codec={"steps": 1}), accelerator=accelerator)
    if kind == "kl":  # nor may the start change under its name
        tiny_kl(scaling_factor=0.3, shift_factor=0.1, seed=1).save_pretrained(start)
        with pytest.raises(RunError, match="holds a codec of other settings"):
            train_codec(toy_source, CODEC, prior, accelerator=accelerator)


def test_a_missing_start_is_refused(toy_source, accelerator, tmp_path):
    prior = prior_in(tmp_path / "prior", codec={"init": str(tmp_path / "nothing")})
    with pytest.raises(InputError, match=r"there is no model folder .*nothing"):
        train_codec(toy_source, CODEC, prior, accelerator=accelerator)


def test_fine_tuning_improves_the_codec(made, toy_source, accelerator, tmp_path):
    changes = {"init": str(made.vae), "steps": 60, "save_every": 60, "schedule": "cosine", "lr": 2e-3}
    vae = train_codec(toy_source, CODEC, prior_in(tmp_path, codec=changes), accelerator=accelerator)
    better, before = (read_json(v / "training.json")["psnr"] for v in (vae, made.vae))
    assert math.isfinite(better)
    assert better > before


def test_only_normalizing_says_what_it_did(toy_source, accelerator, tmp_path, capsys, monkeypatch):
    """steps=0 from an AutoencoderTiny: no bar of steps, one of the statistics; the time is measured, and the record
    has the architecture of the model and not that of settings which were not used."""
    from diffusers import AutoencoderTiny

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr("dq.diffusion.prior.train_codec.STATISTICS", 10)
    read = []
    monkeypatch.setattr("dq.diffusion.prior.train_codec.read_images", counted(read))
    ticks = iter(range(0, 10_000, 7))
    monkeypatch.setattr("dq.diffusion.prior.train_codec.time.perf_counter", lambda: float(next(ticks)))
    prior = prior_in(tmp_path / "prior", codec={"init": str(tmp_path / "tiny"), "steps": 0})
    vae = train_codec(toy_source, CODEC, prior, accelerator=accelerator)
    shown = capsys.readouterr().err
    assert "train codec" not in shown
    assert "statistics of latents" in shown
    assert read == [10, 12]  # not all 24 train images
    record = read_json(vae / "training.json")
    assert record["seconds"] >= 7
    assert record["settings"]["architecture"] == "AutoencoderTiny"
    assert record["settings"]["latent_channels"] == 4
    assert not {"block_out_channels", "layers_per_block", "attention"} & set(record["settings"])
    with pytest.raises(InputError, match="steps=0 without init would save untrained weights"):
        prior_in(tmp_path, codec={"steps": 0, "init": None})


def counted(seen: list[int]):
    """`read_images` that notes how many rows it was asked for."""
    from dq.data.images import read_images

    def read(split, rows, *args, **kwargs):
        seen.append(len(rows))
        return read_images(split, rows, *args, **kwargs)

    return read
