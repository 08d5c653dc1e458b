"""Distribution, gradient and spectral matching: formulas, chosen layers, augmentation, resuming, what they learn."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import tiny_kl
from refined import refined
from sklearn.datasets import load_digits

from dq.config.condensation import Condensation, DistributionMatching, GradientMatching, SpectralMatching
from dq.config.overrides import apply_settings
from dq.config.reader import to_dict
from dq.config.schema import RunConfig
from dq.core.errors import InputError
from dq.core.seeds import derive_seed
from dq.data.augment import OPERATIONS, dsa
from dq.data.zca import fit_whitening
from dq.diffusion.image_codec import ImageCodec
from dq.networks.flat_parameters import FlatNet
from dq.networks.zoo import make_net
from dq.refine import distribution_matching, gradient_matching, spectral_matching
from dq.refine.class_matching import ClassBatches, class_gradients, image_shares
from dq.refine.method import Batch, Context, RealImages
from dq.refine.starts import rows_by_class

SMALL = {"net": "convnet2w16", "real_batch": 16, "augment": "none"}


@pytest.fixture(scope="module")
def digits() -> RealImages:
    data = load_digits()
    images = torch.from_numpy(data.images * 255 / 16).round().to(torch.uint8)
    color = torch.stack([images, images.flip(1), 255 - images], 1)  # not gray
    return RealImages(color, torch.from_numpy(data.target).long())


def first_of_each(real: RealImages, ipc: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.cat([(real.labels == c).nonzero()[:ipc, 0] for c in range(10)])
    return real.images[rows].float() / 255, real.labels[rows]


def with_steps(config: Condensation, steps: int) -> Condensation:
    if not isinstance(config, GradientMatching):
        return dataclasses.replace(config, steps=steps)
    return dataclasses.replace(config, networks=-(-steps // 3), passes=min(3, steps))


METHODS = [
    (distribution_matching.refine, DistributionMatching(steps=6, **SMALL)),
    (gradient_matching.refine, GradientMatching(networks=2, passes=3, net_epochs=2, **SMALL)),
    (spectral_matching.refine, SpectralMatching(steps=6, lr=0.1, frequencies=32, sampler="network", **SMALL)),
]
every = pytest.mark.parametrize(("refine", "config"), METHODS, ids=["dm", "dc", "ncfm"])


def test_the_distance_of_distributions_is_that_of_weighted_means():
    g = torch.Generator().manual_seed(0)
    real, learned = torch.randn(5, 3, 2, generator=g), torch.randn(2, 3, 2, generator=g)
    shares = torch.tensor([0.75, 0.25])
    expected = 0.0
    for i in range(3):
        for j in range(2):
            mean = sum(float(r[i, j]) for r in real) / 5
            expected += (mean - 0.75 * float(learned[0, i, j]) - 0.25 * float(learned[1, i, j])) ** 2
    assert float(distribution_matching.distance(real, learned, shares)) == pytest.approx(expected, rel=1e-5)


def test_the_distance_of_gradients_sums_one_minus_cosine_over_the_outputs_of_each_layer():
    net = FlatNet("convnet2w16", 10, 8)
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(net.size, generator=g), torch.randn(net.size, generator=g)
    expected, begin = 0.0, 0
    for shape, size in zip(net.shapes, net.sizes, strict=True):
        if len(shape) > 1:  # biases and norms are left out
            rows = zip(
                a[begin : begin + size].view(shape[0], -1), b[begin : begin + size].view(shape[0], -1), strict=True
            )
            expected += sum(1 - float(F.cosine_similarity(x, y, dim=0)) for x, y in rows)
        begin += size
    assert float(gradient_matching.distance(a, b, net)) == pytest.approx(expected, rel=1e-4)
    assert float(gradient_matching.distance(a, a, net)) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
def test_left_out_gradients_change_nothing(alpha):
    net = FlatNet("convnet2w16", 10, 8)
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(net.size, generator=g), torch.randn(net.size, generator=g).requires_grad_(True)
    d = gradient_matching.distance(a, b, net, alpha)
    (slope,) = torch.autograd.grad(d, b)
    k = int(alpha * net.size)
    assert (slope[:k] == 0).all()
    assert (slope[k:] != 0).any()
    other = a.clone()
    other[:k] = 7.0
    assert torch.equal(d, gradient_matching.distance(other, b, net, alpha))


def test_alpha_chooses_the_blocks_whose_features_are_matched():
    net, x = make_net("convnet3w32", 10, 16, seed=0), torch.randn(2, 3, 16, 16)
    sides = {}
    for alpha in (None, 0.0, 0.4, 0.7):
        with distribution_matching.block_outputs(net, alpha) as outputs:
            net(x)
        sides[alpha] = [o.shape[-1] for o in outputs]
    assert sides == {None: [2], 0.0: [8, 4, 2], 0.4: [4, 2], 0.7: [2]}
    with (
        pytest.raises(InputError, match="pooled blocks"),
        distribution_matching.block_outputs(torch.nn.Flatten(), 0.0),
    ):
        pass


@pytest.mark.parametrize("operation", OPERATIONS)
def test_siamese_augmentation_treats_all_images_and_batches_alike(operation):
    x = torch.randn(3, 3, 16, 16)
    seed = torch.Generator

    def of(images: torch.Tensor) -> torch.Tensor:
        return dsa(images, seed().manual_seed(5), operation=operation, shared=True)

    assert torch.allclose(of(x)[1:2], of(x[1:2]), atol=1e-6)
    same = of(x[:1].expand(4, -1, -1, -1))
    assert torch.allclose(same, same[:1].expand_as(same))


def test_gradients_of_classes_are_those_of_their_sum():
    x, labels = torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.tensor([2, 0, 2, 1, 0])
    rows = {c: (labels == c).nonzero()[:, 0] for c in range(3)}
    t = torch.randn(2, 2, dtype=torch.float64)

    def loss_of(c, images):
        return ((c + 1) * (images @ t_leaf).sin()).square().mean()

    t_leaf = t.clone().requires_grad_(True)
    loss, g, (g_t,) = class_gradients(loss_of, x, rows, [t_leaf])
    leaf = x.clone().requires_grad_(True)
    total = sum(loss_of(c, leaf[labels == c]) for c in range(3))
    expected = torch.autograd.grad(total, [leaf, t_leaf])
    torch.testing.assert_close([loss.double(), g, g_t], [total.detach(), *expected], rtol=1e-6, atol=1e-6)
    assert class_gradients(loss_of, x, rows)[2] == []


def test_real_and_learned_images_are_augmented_alike(digits):
    plain = ClassBatches(digits, rows_by_class(digits.labels, digits), lambda x: x.float() / 255, 8, False, 0)
    augmented = dataclasses.replace(plain, augmented=True)
    real = plain.images(3, 7, torch.device("cpu"))
    assert real.shape == (8, 3, 8, 8)
    assert torch.equal(augmented.augment(real, 3, 7), augmented.images(3, 7, torch.device("cpu")))
    rows = {tuple(x.flatten().tolist()) for x in digits.images[digits.labels == 3].float() / 255}
    assert all(tuple(x.flatten().tolist()) in rows for x in real)


@every
def test_a_loop_over_classes_in_plain_words_gives_the_same_first_step(refine, config, digits):
    images, labels = first_of_each(digits, 2)
    config = with_steps(config, 1)
    result = refined(refine, images, labels, config, digits, classes=10, seed=3)
    whitening = fit_whitening(digits.images, zca=False)
    batches = ClassBatches(digits, rows_by_class(digits.labels, digits), whitening, 16, False, 3)
    x = whitening(images).requires_grad_(True)
    total = torch.zeros(())
    if isinstance(config, DistributionMatching):
        net = make_net(config.net, 10, 8, seed=derive_seed(3, "network", 0))
        for c in range(10):
            a = net.features(batches.images(c, 0, torch.device("cpu"))).mean(0)
            total = total + (a - net.features(x[labels == c]).mean(0)).square().sum()
    elif isinstance(config, SpectralMatching):
        net = make_net(config.net, 10, 8, seed=derive_seed(3, "network", 0))
        t = spectral_matching.Frequencies(config, 64, 3, torch.device("cpu")).draw(0, {}).detach()
        for c in range(10):
            pair = batches.images(c, 0, torch.device("cpu")), x[labels == c]
            a, b = (F.normalize(net.features(v).flatten(1)).double() for v in pair)
            a, b = ((1j * (v @ t.T.double())).exp().mean(0) for v in (a, b))
            squared = 0.5 * (a.abs() - b.abs()) ** 2 + (a.abs() * b.abs() - (a * b.conj()).real)
            total = total + 300 * squared.sqrt().mean()
    else:
        net = make_net(config.net, 10, 8, seed=derive_seed(3, "network", 0))
        for c in range(10):
            seen = batches.images(c, 0, torch.device("cpu"))
            one = torch.autograd.grad(F.cross_entropy(net(seen), torch.full((16,), c)), list(net.parameters()))
            two = torch.autograd.grad(
                F.cross_entropy(net(x[labels == c]), labels[labels == c]), list(net.parameters()), create_graph=True
            )
            for a, b in zip(one, two, strict=True):
                if a.ndim > 1:
                    total = total + (1 - F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)).sum()
    (g,) = torch.autograd.grad(total, x)
    assert float(result.trace[0, 0]) == pytest.approx(total.item(), rel=1e-3)
    expected = whitening.invert(x.detach() - config.lr * g)
    assert torch.allclose(result.images, expected, atol=2e-4)


@every
def test_resumed_equals_uninterrupted(refine, config, digits, monkeypatch):
    monkeypatch.setattr("dq.refine.record.SAVE_SECONDS", 0.0)
    images, labels = first_of_each(digits, 1)
    states = []
    whole = refined(refine, images, labels, config, digits, classes=10, save=states.append)
    for state in (states[0], states[3]):
        rest = refined(refine, images, labels, config, digits, classes=10, resume=state)
        assert torch.equal(rest.images, whole.images)
        assert torch.equal(rest.trace, whole.trace)


@every
def test_an_image_of_weight_two_is_the_image_twice(refine, config, digits):
    images, labels = first_of_each(digits, 2)
    weights = torch.ones(20)
    weights[0] = 2
    config = dataclasses.replace(with_steps(config, 1), weighted=True)
    once = refined(refine, images, labels, config, digits, classes=10, weights=weights)
    twice = refined(
        refine,
        torch.cat([images, images[:1]]),
        torch.cat([labels, labels[:1]]),
        dataclasses.replace(config, weighted=False),
        digits,
        classes=10,
    )
    assert float(once.trace[0, 0]) == pytest.approx(float(twice.trace[0, 0]), rel=1e-4)
    assert torch.allclose(once.images[1:], twice.images[1:20], atol=1e-5)


@pytest.mark.parametrize("ipc", [1, 3])
def test_the_automatic_rate_of_distribution_matching_is_the_number_of_images_of_a_class(digits, ipc):
    images, labels = first_of_each(digits, ipc)
    config = DistributionMatching(steps=2, lr=None, **SMALL)
    rate = distribution_matching.resolve(config, Context(8, 0, ipc=ipc, classes=10)).lr
    assert rate == ipc
    moved = [
        refined(
            distribution_matching.refine, images, labels, dataclasses.replace(config, lr=lr), digits, classes=10
        ).images
        for lr in (None, float(ipc))
    ]
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], images)


def test_shares_of_a_class_sum_to_one():
    labels, weights = torch.tensor([0, 0, 1]), torch.tensor([1.0, 3.0, 5.0])
    batch = Batch(torch.rand(3, 3, 8, 8), labels, weights)
    counted, shares = image_shares(DistributionMatching(weighted=True), batch)
    assert (counted.tolist(), shares.tolist()) == ([1, 3, 5], [0.25, 0.75, 1.0])
    assert image_shares(DistributionMatching(), batch)[1].tolist() == [0.5, 0.5, 1.0]


@every
def test_images_of_a_gray_data_set_stay_gray(refine, config, digits):
    gray = RealImages(digits.images[:, :1].expand(-1, 3, -1, -1), digits.labels)
    images, labels = first_of_each(gray, 1)
    for start in ("drawn", "noise"):
        out = refined(refine, images, labels, dataclasses.replace(config, start=start), gray, classes=10).images
        assert torch.allclose(out[:, :1], out[:, 1:], atol=1e-5)
        assert not torch.allclose(out, images, atol=1e-3)


@every
def test_latents_move_along_the_gradient_of_the_images_they_are_decoded_to(refine, config, digits, monkeypatch):
    monkeypatch.setattr("dq.refine.record.SAVE_SECONDS", 0.0)
    images, labels = first_of_each(digits, 2)
    config = dataclasses.replace(with_steps(config, 2), lr=0.01)
    latent = dataclasses.replace(config, mode="latent", chunk=7)
    codec, states = ImageCodec.of(tiny_kl(), 16, 8), []
    learned = refined(refine, images, labels, latent, digits, classes=10, codec=codec, save=states.append)
    z = codec.encode(images).requires_grad_(True)
    decoded = codec.decode(z)
    # what one step does to the decoded images, if these are learned themselves
    pixels = refined(refine, decoded.detach(), labels, with_steps(config, 1), digits, classes=10)
    whitening = fit_whitening(digits.images, zca=False)
    gradient = (whitening(decoded.detach()) - whitening(pixels.images)) / 0.01
    assert float(learned.trace[0, 0]) == pytest.approx(float(pixels.trace[0, 0]), rel=1e-3)
    (expected,) = torch.autograd.grad(whitening(decoded), z, gradient)
    moved = (z.detach() - states[0].tensors["x.value"]) / 0.01
    assert torch.allclose(moved, expected, atol=5e-3 * float(expected.abs().max()))
    assert learned.bounded
    assert torch.all((learned.images >= 0) & (learned.images <= 1))
    again = refined(refine, images, labels, latent, digits, classes=10, codec=codec, resume=states[0])
    assert torch.equal(again.images, learned.images)
    with pytest.raises(InputError, match="latents of a codec"):
        refined(refine, images, labels, latent, digits, classes=10)


@every
def test_latents_of_a_gray_data_set_move_along_all_channels(refine, config, digits, monkeypatch):
    gray = RealImages(digits.images[:, :1].expand(-1, 3, -1, -1), digits.labels)
    images, labels = first_of_each(gray, 1)
    latent = dataclasses.replace(with_steps(config, 2), mode="latent", lr=0.01)
    options = {"classes": 10, "codec": ImageCodec.of(tiny_kl(), 16, 8)}
    learned = refined(refine, images, labels, latent, gray, **options).images
    assert not torch.allclose(learned[:, :1], learned[:, 1:], atol=1e-3)  # a decoder's images need not be gray
    monkeypatch.setattr("dq.refine.class_matching.is_gray", lambda _: False)
    assert torch.equal(refined(refine, images, labels, latent, gray, **options).images, learned)


@every
def test_networks_are_drawn_again(refine, config, digits, monkeypatch):
    seeds, module = [], inspect.getmodule(refine)
    drawn = {spectral_matching: "draw_network", distribution_matching: "make_net"}.get(module)
    owner, name = (FlatNet, "initial") if drawn is None else (module, drawn)
    draw = getattr(owner, name)

    def recorded(*args, **named):
        seeds.append(named.get("seed", args[-1]))
        return draw(*args, **named)

    monkeypatch.setattr(owner, name, recorded)
    images, labels = first_of_each(digits, 1)
    refined(refine, images, labels, config, digits, classes=10, seed=3)
    times = 2 if drawn is None else 6  # gradient matching trains a network for some steps
    assert seeds[-times:] == [derive_seed(3, "network", i) for i in range(times)]
    assert len(set(seeds[-times:])) == times


@pytest.mark.slow
@every
def test_learned_images_teach_more_than_those_they_start_from(refine, config, digits):
    train = RealImages(digits.images[:1200], digits.labels[:1200])
    config = dataclasses.replace(config, real_batch=64, checks=1, check_nets=3, check_epochs=60)
    images, labels = first_of_each(train, 1)
    still = dataclasses.replace(with_steps(config, 1), lr=1e-9)
    config = with_steps(config, 60 if isinstance(config, GradientMatching) else 150)
    before = refined(refine, images, labels, still, train, classes=10).facts["checks"]
    after = refined(refine, images, labels, config, train, classes=10).facts["checks"]
    assert max(a for _, a in after) > max(a for _, a in before) + 0.05


def toy(n: int = 40, classes: int = 2) -> RealImages:
    """Images of 8 px: class c is a bright bar in column c, in noise."""
    labels = torch.arange(n) % classes
    x = 0.4 + 0.1 * torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for c in range(classes):
        x[labels == c, :, :, 2 * c : 2 * c + 2] += 0.3
    return RealImages((x.clamp(0, 1) * 255).to(torch.uint8), labels)


DM = DistributionMatching(net="convnet2w4", steps=6, real_batch=16)
DC = GradientMatching(net="convnet2w4", networks=3, passes=2, net_epochs=1, real_batch=16)
SM = SpectralMatching(net="convnet2w4", steps=6, real_batch=16, frequencies=16)
BOTH = pytest.mark.parametrize(
    ("module", "config"), [(distribution_matching, DM), (gradient_matching, DC)], ids=["dm", "dc"]
)
LABELS = torch.tensor([0, 0, 1, 1])


@BOTH
def test_what_does_not_fit_is_refused(module: Any, config: Condensation) -> None:
    for wrong, message in (
        ({"compose": "index"}, "compose must be 'whole', not 'index'"),
        ({"dtype": "bfloat16"}, "dtype must be 'float32', not 'bfloat16'"),
        ({"alpha": 1.0}, r"alpha must be a number in \[0, 1\)"),
        ({"real_batch": 0}, "real_batch must be a whole number of at least 1, not 0"),
        ({"chunk": 0}, "chunk must be a whole number of at least 1 or 'off', not 0"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(config, **wrong)
    lonely = RealImages(toy().images[:20:2], toy().labels[:20:2])
    with pytest.raises(InputError, match="class 1 has no train image"):
        refined(module.refine, torch.rand(4, 3, 8, 8), LABELS, config, lonely, classes=2)


def test_loops_follow_the_images_per_class() -> None:
    config = GradientMatching()
    loops = {}
    for ipc in (1, 5, 10, 12, 50, 200):
        c = gradient_matching.resolve(config, Context(32, 0, ipc, 10, 5000))
        loops[ipc] = (c.passes, c.net_epochs)
    assert loops == {1: (1, 1), 5: (1, 1), 10: (10, 50), 12: (10, 50), 50: (50, 10), 200: (50, 10)}
    own = dataclasses.replace(config, passes=3, net_epochs=0)
    assert gradient_matching.resolve(own, Context(32, 0, 10, 10)) == own
    with pytest.raises(InputError, match="gathers statistics over batches"):
        gradient_matching.resolve(GradientMatching(net="convnet3-bn"), Context(32, 0, 10, 10))


@pytest.mark.parametrize(
    "config", [DM, DC, SM, dataclasses.replace(DM, mode="latent")], ids=["dm", "dc", "ncfm", "dm latents"]
)
def test_it_is_a_stage_of_a_run(config: Condensation, toy_source: Any, accelerator: Any, tmp_path: Path) -> None:
    from dq.run.distill import DistillPipeline
    from dq.run.planning.plan import plan
    from dq.run.planning.refining import refining_speed

    changes: dict[str, Any] = {"codec.resolution": 8, "ipc": [2], "refine": [to_dict(config)]}
    run = apply_settings(RunConfig(output_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "c")), changes)
    assert f"{config.stage}, 6 images in 1 batch, 6 steps, 36 image steps" in plan(run, toy_source)
    checked = apply_settings(run, {"refine": [to_dict(dataclasses.replace(config, checks=3, check_nets=2))]})
    assert "6 trainings for checks" in plan(checked, toy_source)
    assert "trainings for checks" not in plan(run, toy_source)
    pipe, latent = DistillPipeline(vae=tiny_kl()), config.mode == "latent"
    codec = ImageCodec.of(pipe.vae, 8, 8) if latent else None
    assert refining_speed(run.refine[0], (), 3, 8, torch.device("cpu"), images=6, codec=codec).seconds > 0
    s = pipe.distill(toy_source, ipc=2, config=run, output_dir=run.output_dir, accelerator=accelerator)
    assert s.images.dtype == (torch.uint8 if latent else torch.float32)  # decoded images are within [0, 1]
    assert s.soft_labels is None
    stage = s.provenance["refine"][0]
    assert stage["summary"]["whitening"]["recipe"] == "standardize"
    assert stage["summary"]["after"]["anchor_distance"] > 0
