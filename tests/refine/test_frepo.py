"""FRePo: what it learns, resuming, start and labels, bad input; alone and as a stage of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from frepo_toy import SMALL, distill, drawn, settings_of, short_student, toy
from refined import refined
from torch import Tensor

from dq.config.refinement import BUDGETS, FRePo
from dq.core.errors import InputError, RunError
from dq.core.files import read_json, read_tensors
from dq.data import zca
from dq.data.regression_labels import centered_targets
from dq.data.zca import fit_whitening
from dq.refine import frepo, held_out, record
from dq.refine.frepo import FrepoMethod, RealBatches, refine, resolve
from dq.refine.held_out import HeldOut
from dq.refine.method import Context, RealImages, Refined, State
from dq.refine.rendering import Rendering
from dq.refine.starts import first_values


def learn(config: FRePo = SMALL, **more: Any) -> Refined:
    images, labels = drawn()
    return refined(refine, images, labels, config, toy(), classes=2, **more)


def test_the_loss_falls_on_a_toy() -> None:
    r = learn(dataclasses.replace(SMALL, steps=60, start="noise"))
    assert r.terms == ("krr_loss", "label_margin", "condition", "ridge")
    losses = r.trace[:, 0]
    assert float(losses[-10:].mean()) < 0.5 * float(losses[:5].mean())
    assert r.label_kind == "regression"
    assert r.soft_labels.argmax(1).tolist() == [0, 1]
    assert not r.bounded
    assert r.blocks.shape == (5, 2, 3, 8, 8)
    assert r.facts["networks_replaced"] > 5


def test_labels_alone_leave_the_images_as_they_came() -> None:
    images, _ = drawn()
    r = learn(dataclasses.replace(SMALL, mode="labels_only"))
    assert torch.equal(r.images, images)
    assert r.bounded
    fixed = learn(dataclasses.replace(SMALL, learn_labels=False))
    start = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]) / (2 / 10) ** 0.5
    torch.testing.assert_close(fixed.soft_labels, start)
    assert not torch.equal(r.soft_labels, start)
    assert not torch.allclose(fixed.images, images, atol=0.01)


@pytest.mark.parametrize("mode", ["pixel", "labels_only"])
def test_it_goes_on_bit_for_bit_from_any_saved_state(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SMALL, mode=mode, steps=12)
    whole = learn(config, seed=3)
    monkeypatch.setattr(record, "SAVE_SECONDS", 0.0)
    states: list[State] = []
    learn(config, seed=3, save=states.append)
    assert [s.steps for s in states] == list(range(1, 12))
    steps: list[int] = []
    again = learn(config, seed=3, resume=states[5], step=steps.append)
    assert steps == list(range(6, 12))
    for name in ("images", "soft_labels", "trace", "blocks"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    assert again.facts == whole.facts


def test_the_best_set_on_held_out_train_images_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SMALL, steps=6, checks=3, check_nets=1, held_out=0.2)
    scores = {2: 0.5, 4: 0.75, 6: 0.75}  # the first of the best counts
    seen: list[Tensor] = []

    def score(x: Tensor, y: Tensor, held_out: HeldOut, **more: Any) -> float:
        seen.append(x.clone())
        assert len(held_out.real.labels) == 8
        return scores[2 * len(seen)]

    with monkeypatch.context() as patch:
        patch.setattr(frepo, "held_out_accuracy", score)
        r = learn(config, whitening=fit_whitening(toy().images))
    torch.testing.assert_close(fit_whitening(toy().images)(r.images), seen[1], atol=1e-4, rtol=1e-4)
    assert r.facts["checks"] == [[2, 0.5], [4, 0.75], [6, 0.75]]
    # with networks that are trained, and across a kill
    monkeypatch.setattr(record, "SAVE_SECONDS", 0.0)
    states: list[State] = []
    monkeypatch.setattr(held_out, "student_config", short_student)
    whole = learn(config, save=states.append)
    again = learn(config, resume=states[4])
    assert torch.equal(again.images, whole.images)
    assert again.facts == whole.facts
    assert all(0 <= s <= 1 for _, s in whole.facts["checks"])


def test_held_out_images_are_stratified_and_not_seen() -> None:
    real = toy(40)
    rest, held = held_out.split_off(real, 0.2)
    assert (len(rest.labels), len(held.labels)) == (32, 8)
    assert held.labels.bincount().tolist() == [4, 4]
    rows = {tuple(x.flatten().tolist()) for x in rest.images}
    assert all(tuple(x.flatten().tolist()) not in rows for x in held.images)


def test_chunks_change_nothing_but_memory() -> None:
    images, labels = drawn(ipc=3)
    results = [
        refined(refine, images, labels, dataclasses.replace(SMALL, chunk=chunk, steps=3), toy(), classes=2)
        for chunk in (None, 2)
    ]
    torch.testing.assert_close(results[1].images, results[0].images, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[1].soft_labels, results[0].soft_labels, atol=1e-4, rtol=1e-4)


def test_cross_entropy_takes_the_place_of_squared_error_with_its_temperature() -> None:
    config = dataclasses.replace(SMALL, steps=60, outer_loss="ce_temp", outer_temperature=0.5, start="noise")
    mild = learn(config)
    losses = mild.trace[:, 0]
    assert float(losses[-10:].mean()) < 0.8 * float(losses[:5].mean())
    hot = learn(dataclasses.replace(config, steps=1, outer_temperature=1e6))
    assert float(hot.trace[0, 0]) == pytest.approx(0.6931, abs=1e-3)  # ln 2: predictions count for nothing
    assert "outer_temperature" in SMALL.unread()
    assert "outer_temperature" not in config.unread()


def test_a_temperature_of_the_labels_is_fitted_on_held_out_images(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SMALL, steps=30, fit_temperature=True, held_out=0.2, label_margin=0.0)
    r = learn(config)
    assert "label_temperature" not in learn(dataclasses.replace(SMALL, steps=1)).facts
    assert r.facts["label_temperature"] > 0
    # labels twice as large have twice the temperature; where a tenth of the images contradicts them, it is no bound
    pool = frepo.OnlinePool(("frepoconv3w32",), 2, 8, frepo.PoolSettings(size=2), seed=0)
    whitening, held = fit_whitening(toy().images), toy(200, seed=1)
    held.labels[:20] = 1 - held.labels[:20]
    x, y = whitening(toy().images), centered_targets(toy().labels, 2)
    one, two = (held_out.label_temperature(pool, x, k * y, HeldOut(held, whitening, ""), ridge=1e-3) for k in (1, 2))
    assert two == pytest.approx(2 * one, rel=1e-4)
    assert 0.1 < one < 10
    # the held-out images are those that the regression did not see
    with monkeypatch.context() as patch:
        patch.setattr(frepo, "label_temperature", lambda pool, x, y, h, **_: float(len(h.real.labels)))
        assert learn(dataclasses.replace(config, steps=1)).facts["label_temperature"] == 8
    assert "held_out" in SMALL.unread()
    assert "held_out" not in config.unread()


def test_another_seed_is_another_result_and_the_same_seed_the_same() -> None:
    one, same, other = learn(seed=1), learn(seed=1), learn(seed=2)
    assert torch.equal(one.images, same.images)
    assert not torch.equal(one.images, other.images)


def test_budgets_fill_in_steps_and_lr_and_settings_win() -> None:
    context = Context(32, 0, classes=10)
    for name, (steps, lr) in BUDGETS.items():
        r = resolve(FRePo(budget=name), context)
        assert (r.steps, r.lr, r.nets) == (steps, lr, ("frepoconv3",))
    assert BUDGETS["paper"] == (500_000, 3e-4)
    assert resolve(FRePo(steps=7), context).steps == 7
    for side, net in ((63, "frepoconv3"), (64, "frepoconv4"), (126, "frepoconv4"), (128, "frepoconv5")):
        assert resolve(FRePo(), Context(side, 0)).nets == (net,)


def test_images_start_from_what_is_asked_for() -> None:
    real = toy()
    images, labels = drawn(ipc=2)
    whitening = fit_whitening(real.images)

    def make(start: str) -> Tensor:
        return first_values(start, images, labels, real, Rendering(whitening), 0)

    torch.testing.assert_close(make("drawn"), whitening(images))
    whitened = whitening(real.images)
    for x, c in zip(make("real"), labels.tolist(), strict=True):
        rows = (whitened - x).abs().amax((1, 2, 3)).lt(1e-6).nonzero()[:, 0]
        assert real.labels[rows].tolist() == [c]
    assert float(make("noise").std()) == pytest.approx(float(whitened.std()), rel=0.1)
    with pytest.raises(InputError, match=r"class 4, .*start=drawn"):
        first_values("real", images, labels + 4, real, Rendering(whitening), 0)


def test_real_batches_pass_through_all_images_before_any_comes_again() -> None:
    real = toy(20)
    batches = RealBatches.of(real, fit_whitening(real.images), 2, 8, 0)
    first, second, third = (batches(i)[0] for i in range(3))
    two = torch.cat([first, second]).flatten(1)
    assert len(two.unique(dim=0)) == 16
    assert third.shape == (8, 3, 8, 8)  # of the next epoch: four images fill no batch
    assert torch.equal(batches(1)[0], second)
    streamed = dataclasses.replace(batches, whitened=None)
    torch.testing.assert_close(streamed(1)[0], second)
    assert batches(0)[1].abs().eq(0.5).all()


def test_copies_are_moved_apart() -> None:
    images, labels = drawn(ipc=2)
    images[1] = images[0]
    images[3] = images[2]
    r = refined(refine, images, labels, SMALL, toy(), classes=2)
    assert r.facts["copies"] == 2
    assert torch.isfinite(r.images).all()
    assert not torch.equal(r.images[0], r.images[1])


def test_more_images_than_features_are_fitted() -> None:
    images, labels = drawn(ipc=80)  # 160, doubled by mirror images, for 128 features
    r = refined(refine, images, labels, dataclasses.replace(SMALL, steps=2), toy(), classes=2)
    assert torch.isfinite(r.images).all()
    assert float(r.trace[:, 3].max()) == pytest.approx(1e-6)


def test_mirror_images_are_for_small_sets_of_color_images() -> None:
    assert learn().facts["flip"]
    gray = toy()
    gray = RealImages(gray.images[:, :1].expand(-1, 3, -1, -1).contiguous(), gray.labels)
    images, labels = drawn()
    assert not refined(refine, images, labels, SMALL, gray, classes=2).facts["flip"]
    assert not learn(dataclasses.replace(SMALL, flip=False)).facts["flip"]


def test_architectures_are_mixed() -> None:
    r = learn(dataclasses.replace(SMALL, nets=("frepoconv3w32", "convnet3w32")))
    assert torch.isfinite(r.images).all()


def test_weights_count_where_they_are_asked_for() -> None:
    w = torch.tensor([1.9, 0.1])
    plain, weighted = learn(weights=w), learn(dataclasses.replace(SMALL, weighted=True), weights=w)
    assert plain.uniform_weights
    assert torch.equal(plain.images, learn().images)
    assert not weighted.uniform_weights
    assert not torch.equal(weighted.images, plain.images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compose": "index"}, "compose must be 'whole', not 'index'"),
        ({"mode": "labels_only", "learn_labels": False}, "leaves nothing to learn"),
        ({"dtype": "bfloat16"}, "dtype must be 'float32', not 'bfloat16'"),
        ({"held_out": 0.5}, r"held_out must be a number in \(0, 0.2\], not 0.5"),
        ({"steps": 0}, "steps must be a whole number of at least 1 or 'preset', not 0"),
        ({"outer_temperature": 0.0}, "outer_temperature must be a number of more than 0, not 0"),
        ({"ridge": 0.0}, r"ridge must be a number in \(0, 1\], not 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FRePo(**settings)


def test_large_images_and_one_class_are_refused_with_the_reason() -> None:
    for side in (130, 224):
        with pytest.raises(InputError, match=rf"at most 128 px, not {side}\b"):
            resolve(FRePo(), Context(side, 0))
    with pytest.raises(InputError, match="must be divisible by 2; set source"):
        resolve(FRePo(), Context(127, 0))
    assert resolve(FRePo(whiten=False), Context(127, 0)).nets == ("frepoconv4",)
    with pytest.raises(InputError, match="at least two classes"):
        resolve(FRePo(), Context(32, 0, classes=1))


def test_large_images_are_learned_as_interleaved_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zca, "WHOLE_SIDE", 4)
    r = learn(dataclasses.replace(SMALL, steps=40, start="noise"))
    assert r.preprocessing["matrix"].shape == (48, 48)
    assert r.facts["whitening"]["interleaved"] == 4
    losses = r.trace[:, 0]
    assert float(losses[-5:].mean()) < 0.7 * float(losses[:5].mean())


def test_devices_without_float64_are_refused() -> None:
    with pytest.raises(InputError, match=r"float64, .*mps"):
        learn(device="mps")


def test_numbers_that_are_not_finite_stop_it() -> None:
    images, labels = drawn()
    with pytest.raises(RunError, match="not finite numbers"):
        refined(refine, images, labels, dataclasses.replace(SMALL, lr=1e30), toy(), classes=2)
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="no finite numbers"):
        refined(refine, images, labels, SMALL, toy(), classes=2)


def test_it_is_a_stage_of_a_run(
    toy_source: Any, accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dq.distilled.external import load_set
    from dq.run.planning.plan import plan
    from dq.run.planning.refining import refining_speed

    config = settings_of(tmp_path, weighted=False)
    assert "frepo, 6 images in 1 batch, 4 steps, 24 image steps" in plan(config, toy_source)
    assert refining_speed(config.refine[0], (), 3, 8, torch.device("cpu"), images=6).seconds > 0
    # killed behind its second step, it goes on there to the same set
    monkeypatch.setattr(record, "SAVE_SECONDS", 0.0)
    whole = distill(settings_of(tmp_path / "whole"), toy_source, accelerator)
    advance = frepo.OnlinePool.advance

    def killed(pool: Any, i: int, x: Tensor, y: Tensor, step: int, w: Tensor | None = None) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return advance(pool, i, x, y, step, w)

    with monkeypatch.context() as patch:
        patch.setattr(frepo.OnlinePool, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            distill(config, toy_source, accelerator)
    s = distill(config, toy_source, accelerator)
    assert torch.equal(s.images, whole.images)
    assert torch.equal(s.soft_labels, whole.soft_labels)
    # float pixels that may leave [0, 1], regression labels and uniform weights survive the Parquet file
    assert s.images.dtype == torch.float32
    assert s.label_kind == "regression"
    assert torch.equal(s.weights, torch.ones(6))
    again = load_set(tmp_path / "run" / "dataset")
    assert torch.equal(again.images, s.images)
    assert again.label_kind == "regression"
    # provenance: what was fitted on which images, and the matrices beside
    stage = s.provenance["refine"][0]
    assert stage["resolved"]["steps"] == 4
    assert stage["summary"]["whitening"]["recipe"] == "frepo"
    assert stage["summary"]["copies"] == 0
    tensors, _ = read_tensors(tmp_path / "run" / "images" / stage["folder"] / "preprocessing.safetensors")
    assert set(tensors) == {"mean", "std", "center", "matrix", "inverse"}
    assert read_json(tmp_path / "run" / "dataset" / "ipc2-ddoq" / "provenance.json")["label_kind"] == "regression"


def test_labels_may_start_from_teachers(toy_images: Any) -> None:
    from tiny_teachers import trained

    images, labels = drawn()
    teacher = trained(classes=2, side=8)
    config = dataclasses.replace(SMALL, first_labels="teachers", learn_labels=False)
    r = refined(refine, images, labels, config, toy(), classes=2, teachers=[teacher])
    p = teacher.logits(images).softmax(1)
    torch.testing.assert_close(r.soft_labels, (p - 1 / p.shape[1]) / (p.shape[1] / 10) ** 0.5)
    assert FrepoMethod().needs(config).teachers
    assert not FrepoMethod().needs(SMALL).teachers
