"""Gradient matching and distribution matching: formulas, layers, augmentation, resuming; as stages of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_kl

from dq.config.condensation import Condensation, DistributionMatching, GradientMatching
from dq.config.overrides import apply_settings
from dq.config.reader import to_dict
from dq.config.schema import RunConfig
from dq.core.errors import InputError
from dq.core.seeds import generator
from dq.data.augment import OPERATIONS, dsa
from dq.networks.zoo import make_net
from dq.refine import distribution_matching as distribution
from dq.refine import gradient_matching as gradient
from dq.refine.method import Callback, Context, RealImages, Refined, State

DM = DistributionMatching(net="convnet2w4", steps=6, real_batch=16)
DC = GradientMatching(net="convnet2w4", networks=3, passes=2, net_epochs=1, real_batch=16)
BOTH = pytest.mark.parametrize(("module", "config"), [(distribution, DM), (gradient, DC)], ids=["dm", "dc"])


def toy(n: int = 40, classes: int = 2) -> RealImages:
    """Images of 8 px: class c is a bright bar in column c, in noise."""
    labels = torch.arange(n) % classes
    x = 0.4 + 0.1 * torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for c in range(classes):
        x[labels == c, :, :, 2 * c : 2 * c + 2] += 0.3
    return RealImages((x.clamp(0, 1) * 255).to(torch.uint8), labels)


LABELS = torch.tensor([0, 0, 1, 1])


def learn(module: Any, config: Condensation, **more: Any) -> Refined:
    images = 0.5 + 0.1 * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return module.refine(images, LABELS, config, toy(), classes=2, **more)


# --- formulas -----------------------------------------------------------------------------------------------------


def test_the_distance_of_distributions_is_between_mean_features() -> None:
    a, b = [torch.tensor([[1.0, 2.0], [3.0, 4.0]])], [torch.tensor([[0.0, 1.0]])]
    assert float(distribution.distance(a, b)) == pytest.approx((2 - 0) ** 2 + (3 - 1) ** 2)
    assert float(distribution.distance(a * 2, b * 2)) == pytest.approx(16)


def test_the_distance_of_gradients_is_one_minus_the_cosine_of_each_output() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    b = torch.tensor([[3.0, 0.0], [0.0, -1.0], [1.0, -1.0]])
    assert float(gradient.distance([a], [b])) == pytest.approx(0 + 2 + 1, abs=1e-5)
    assert float(gradient.distance([a], [5 * a])) == pytest.approx(0, abs=1e-5)


def test_a_step_is_the_gradient_of_the_loss_summed_over_classes() -> None:
    config = dataclasses.replace(DM, steps=1, augment="none", real_batch=100, lr=0.5)
    first, r = learn(distribution, dataclasses.replace(config, steps=0)), learn(distribution, config)
    from dq.core.seeds import derive_seed
    from dq.data.zca import fit_whitening

    real = toy()
    w = fit_whitening(real.images, zca=False)
    net = make_net(DM.net, 2, 8, seed=derive_seed(0, "network", 0))
    x = w(first.images).requires_grad_(True)
    loss = torch.zeros(())
    for c in range(2):
        means = [net.features(v).flatten(1).mean(0) for v in (w(real.images[real.labels == c]), x[c == LABELS])]
        loss = loss + (means[0] - means[1]).square().sum()
    loss.backward()
    assert float(r.trace[0, 0]) == pytest.approx(float(loss.detach()), rel=1e-4)
    torch.testing.assert_close(w(r.images), x.detach() - 0.5 * x.grad, rtol=1e-3, atol=1e-4)


def test_shallow_layers_are_left_out() -> None:
    net = make_net("convnet3w4", 10, 8, seed=0)
    weights = [p for p in net.parameters() if p.ndim > 1]
    for share, left in ((0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3)):
        assert [id(p) for p in gradient.compared_weights(net, share)] == [id(p) for p in weights[left:]]
    x = torch.randn(2, 3, 8, 8)
    sides = {}
    for alpha in (None, 0.0, 0.5, 0.75):
        with distribution.compared_features(net, alpha) as features:
            sides[alpha] = [f.flatten(1).shape[1] for f in features(x)]
    assert sides == {None: [4], 0.0: [64, 16, 4], 0.5: [16, 4], 0.75: [4]}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_shared_augmentation_is_the_same_for_every_image_of_every_batch() -> None:
    x = torch.randn(1, 3, 8, 8).expand(5, -1, -1, -1)
    for operation in OPERATIONS:
        many = dsa(x, generator(1), operation=operation, shared=True)
        assert torch.equal(many, many[:1].expand_as(many))
        torch.testing.assert_close(dsa(x[:2], generator(1), operation=operation, shared=True), many[:2])
    alone = dsa(x, generator(1), operation="color")
    assert not torch.equal(alone, alone[:1].expand_as(alone))


# --- both ---------------------------------------------------------------------------------------------------------


@BOTH
def test_the_loss_falls_and_labels_stay(module: Any, config: Condensation) -> None:
    longer = {"steps": 60, "lr": 0.5} if module is distribution else {"networks": 30, "lr": 0.1}
    r = learn(module, dataclasses.replace(config, start="noise", augment="none", **longer))
    losses = r.trace[:, 0]
    assert float(losses[-10:].mean()) < 0.8 * float(losses[:10].mean())
    assert r.soft_labels is None
    assert not r.bounded
    assert r.terms == module.TERMS
    # what was learned looks like its class: the brighter columns
    bright = [[float(r.images[c == LABELS][..., 2 * k : 2 * k + 2].mean()) for k in range(2)] for c in range(2)]
    assert bright[0][0] > bright[0][1]
    assert bright[1][1] > bright[1][0]


@BOTH
def test_it_goes_on_bit_for_bit_from_any_saved_state(
    module: Any, config: Condensation, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn(module, config, seed=3)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    states: list[State] = []
    steps: list[int] = []
    learn(module, config, seed=3, callback=Callback(step=steps.append, save=states.append))
    assert steps == list(range(6))
    assert [s.steps for s in states] == ([1, 2, 3, 4, 5] if module is distribution else [2, 4])
    for state in states:
        again = learn(module, config, seed=3, resume=state)
        assert torch.equal(again.images, whole.images)
        assert torch.equal(again.trace, whole.trace)
    assert not torch.equal(learn(module, config, seed=4).images, whole.images)


@BOTH
def test_what_does_not_fit_is_refused(module: Any, config: Condensation) -> None:
    for wrong, message in (
        ({"compose": "index"}, "set compose=whole"),
        ({"dtype": "bfloat16"}, "works in float32"),
        ({"alpha": 1.0}, r"alpha is a share of the layers in \[0, 1\)"),
        ({"real_batch": 0}, "real_batch of at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(config, **wrong)
    lonely = RealImages(toy().images[:20:2], toy().labels[:20:2])
    with pytest.raises(InputError, match="class 1 has no train image to be compared with"):
        module.refine(torch.rand(4, 3, 8, 8), LABELS, config, lonely, classes=2)


def test_loops_follow_the_images_per_class() -> None:
    config = GradientMatching()
    loops = {}
    for ipc in (1, 5, 10, 12, 50, 200):
        c = gradient.resolve(config, Context(32, 0, ipc, 10, 5000))
        loops[ipc] = (c.passes, c.net_epochs)
    assert loops == {1: (1, 1), 5: (1, 1), 10: (10, 50), 12: (10, 50), 50: (50, 10), 200: (50, 10)}
    own = dataclasses.replace(config, passes=3, net_epochs=0)
    assert gradient.resolve(own, Context(32, 0, 10, 10)) == own
    with pytest.raises(InputError, match="gathers statistics over batches"):
        gradient.resolve(GradientMatching(net="convnet3-bn"), Context(32, 0, 10, 10))
    with pytest.raises(InputError, match="alpha counts the blocks of a ConvNet"):
        DistributionMatching(net="resnet18", alpha=0.5)


@BOTH
def test_it_is_a_stage_of_a_run(
    module: Any, config: Condensation, toy_source: Any, accelerator: Any, tmp_path: Path
) -> None:
    from dq.run.distill import DistillPipeline
    from dq.run.planning.plan import plan
    from dq.run.planning.refining import refining_speed

    changes: dict[str, Any] = {"codec.resolution": 8, "ipc": [2], "refine": [to_dict(config)]}
    run = apply_settings(RunConfig(output_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "c")), changes)
    assert f"{config.stage}, 6 images in 1 batches, 6 steps, 36 image steps" in plan(run, toy_source)
    assert refining_speed(run.refine[0], (), 3, 8, torch.device("cpu"), images=6).seconds > 0
    pipe = DistillPipeline(vae=tiny_kl())
    s = pipe.distill(toy_source, ipc=2, config=run, output_dir=run.output_dir, accelerator=accelerator)
    assert s.images.dtype == torch.float32
    assert s.soft_labels is None
    stage = s.provenance["refine"][0]
    assert stage["summary"]["whitening"]["recipe"] == "standardize"
    assert stage["summary"]["after"]["anchor_distance"] > 0
