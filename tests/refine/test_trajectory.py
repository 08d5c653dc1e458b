"""Matching of trajectories: what it learns, resuming, starts, presets, bad input; alone and as a stage of a run."""

from __future__ import annotations

import dataclasses
import logging
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_kl
from refined import refined
from small_experts import NET, experts_in
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dq.config.overrides import apply_settings
from dq.config.protocols import student_config
from dq.config.reader import to_dict
from dq.config.schema import RunConfig
from dq.config.trajectories import PRESETS, Trajectory
from dq.core.errors import InputError, RunError
from dq.core.files import read_json, read_tensors, write_json
from dq.diffusion.image_codec import ImageCodec
from dq.networks.trajectories import Experts, flat_accuracy, open_experts
from dq.refine import held_out, record, trajectory
from dq.refine.held_out import HeldOut, mean_accuracy
from dq.refine.method import Batch, Context, RealImages, Refined, Resources, Session, State
from dq.refine.trajectory import TrajectoryMethod, correct_rows, expert_labels, refine, resolve
from dq.refine.unroll import MetaGradient, matching_loss


@pytest.fixture(scope="module")
def experts(toy_source: Any, accelerator: Any, tmp_path_factory: pytest.TempPathFactory) -> Experts:
    return open_experts(experts_in(tmp_path_factory.mktemp("experts"), toy_source, accelerator))


@pytest.fixture(scope="module")
def real(toy_source: Any) -> RealImages:
    from dq.data.images import read_images

    split = toy_source.train
    images, kept, _ = read_images(split, range(len(split)), 8, "crop", on_bad="raise")
    return RealImages(images, torch.from_numpy(split.labels[kept]).long())


@pytest.fixture
def small(experts: Experts) -> Trajectory:
    return Trajectory(
        experts=str(experts.folder),
        steps=6,
        student_steps=3,
        expert_epochs=2,
        start_epochs=(0, 2, 4),
        expand_every=2,
        lr_images=5.0,
        lr_labels=1.0,
        lr_step=1e-4,
        first_step=0.1,
        alpha=0.25,
        min_accuracy=0.0,
        threshold=100.0,
    )


LABELS = torch.arange(3).repeat_interleave(2)


def learn(config: Trajectory, experts: Experts, real: RealImages | None = None, **more: Any) -> Refined:
    images = 0.3 + 0.4 * torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return refined(refine, images, LABELS, config, real, classes=3, experts=experts, **more)


# --- what it learns -----------------------------------------------------------------------------------------------


def test_images_labels_and_the_step_size_move(small: Trajectory, experts: Experts) -> None:
    r = learn(small, experts)
    still = learn(dataclasses.replace(small, steps=0), experts)
    assert r.terms == ("matching_loss", "start_epoch", "step_size")
    assert r.trace.shape == (6, 3)
    assert (r.trace[:, 1] < torch.tensor([2, 2, 3, 3, 4, 4])).all()
    assert r.label_kind == "logits"
    assert not r.bounded
    assert r.step_size != still.step_size == pytest.approx(0.1)
    assert not torch.equal(r.images, still.images)
    assert not torch.equal(r.soft_labels, still.soft_labels)
    assert r.facts["cut"]["parameters_left_out"] == experts.net.size // 4
    assert r.facts["whitening"]["recipe"] == "mtt"
    fixed = learn(dataclasses.replace(small, learn_labels=False, learn_step=False), experts)
    assert torch.equal(fixed.soft_labels, still.soft_labels)
    assert fixed.step_size == still.step_size
    # a step without a move leaves the images as they came, up to the rounding of the whitening
    images = 0.3 + 0.4 * torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(still.images, images, atol=1e-4, rtol=0)
    assert not torch.equal(learn(dataclasses.replace(small, unroll="tesla"), experts).images, r.images)


def test_the_seed_decides_the_result(small: Trajectory, experts: Experts) -> None:
    assert torch.equal(learn(small, experts, seed=1).images, learn(small, experts, seed=1).images)
    assert not torch.equal(learn(small, experts, seed=1).images, learn(small, experts, seed=2).images)


def test_it_goes_on_bit_for_bit_from_any_saved_state(
    small: Trajectory, experts: Experts, real: RealImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(small, checks=3, check_nets=1, check_epochs=2)
    whole = learn(config, experts, real, seed=3)
    monkeypatch.setattr(record, "SAVE_SECONDS", 0.0)
    states: list[State] = []
    learn(config, experts, real, seed=3, save=states.append)
    assert [s.steps for s in states] == [3, 6, 9, 12, 15]
    for state in states:
        again = learn(config, experts, real, seed=3, resume=state)
        for name in ("images", "soft_labels", "trace", "blocks"):
            assert torch.equal(getattr(again, name), getattr(whole, name))
        assert again.step_size == whole.step_size
        assert again.facts == whole.facts


def test_steps_that_are_too_large_or_not_finite_are_skipped_and_counted(
    small: Trajectory, experts: Experts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(small, steps=5)
    real_gradient, calls = trajectory.GRADIENTS["exact"], []

    def broken(*args: Any, **options: Any) -> MetaGradient:
        g = real_gradient(*args, **options)
        calls.append(len(calls))
        if len(calls) == 2:
            return g._replace(images=g.images * float("nan"))
        if len(calls) == 3:
            return g._replace(loss=g.loss + 1000)
        return g._replace(loss=g.loss * float("inf")) if len(calls) == 4 else g

    monkeypatch.setitem(trajectory.GRADIENTS, "exact", broken)
    r = learn(config, experts)
    assert (r.facts["skipped_not_finite"], r.facts["skipped_by_threshold"]) == (2, 1)
    assert torch.isfinite(r.images).all()
    assert r.trace[1, 2] == r.trace[2, 2] == r.trace[3, 2] == r.trace[4, 2]  # the step size waited
    with caplog.at_level(logging.WARNING, "dq"):
        calls.clear()
        learn(dataclasses.replace(config, threshold=1e-9), experts)
    assert "skipped 5 of 5 steps" in caplog.text


def test_the_step_size_stays_positive(small: Trajectory, experts: Experts) -> None:
    r = learn(dataclasses.replace(small, lr_step=1e6, least_step=0.01, threshold=1e30), experts)
    assert float(r.trace[:, 2].min()) == pytest.approx(0.01)


def test_the_best_set_on_images_held_out_from_experts_is_returned(
    small: Trajectory, experts: Experts, real: RealImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    scores = iter([0.2, 0.9, 0.4])

    def score(x: Tensor, y: Tensor, held_out: HeldOut, student: Any, **more: Any) -> float:
        seen.append(x.clone())
        assert len(held_out.real.labels) == int(experts.held_out_rows(real.labels).sum()) == 3
        assert student.lr == pytest.approx(float(next(steps)))
        return next(scores)

    plain = learn(small, experts)
    steps = iter([*plain.trace[2::2, 2].tolist(), plain.step_size])
    monkeypatch.setattr(held_out, "mean_accuracy", score)
    r = learn(dataclasses.replace(small, checks=3), experts, real)
    assert r.facts["checks"] == [[2, 0.2], [4, 0.9], [6, 0.4]]
    torch.testing.assert_close(r.images, experts.whitening.invert(seen[1]))
    assert not torch.equal(r.images, plain.images)


# --- starts -------------------------------------------------------------------------------------------------------


def test_images_start_from_what_is_asked_for(small: Trajectory, experts: Experts, real: RealImages) -> None:
    still = dataclasses.replace(small, steps=0)
    held = experts.held_out_rows(real.labels)
    pixels = real.images.float() / 255
    for start in ("real", "correct"):
        r = learn(dataclasses.replace(still, start=start), experts, real)
        for image, label in zip(r.images, LABELS, strict=True):
            distances = (pixels - image).abs().amax((1, 2, 3))
            row = int(distances.argmin())
            assert distances[row] < 1e-3
            assert real.labels[row] == label
            assert not held[row]  # what experts are measured on stays unseen
    noise = dataclasses.replace(still, start="noise", first_labels="classes")
    assert not torch.equal(learn(noise, experts, real).images, learn(noise, experts, real, seed=1).images)
    with pytest.raises(InputError, match="start=real needs the train images"):
        learn(dataclasses.replace(still, start="real"), experts)


def test_correct_images_are_those_that_experts_know(experts: Experts, real: RealImages) -> None:
    device = torch.device("cpu")
    labels = torch.tensor([0, 0, 1, 2, 2])
    rows = correct_rows(experts, labels, real, device, 0)
    assert torch.equal(real.labels[rows], labels)
    assert len(set(rows.tolist())) == 5
    ends = [experts.parameters(i, experts.epochs) for i in range(2)]
    for row in rows:
        x, y = real.images[row : row + 1], real.labels[row : row + 1]
        assert max(flat_accuracy(experts.net, end, x, y, experts.whitening) for end in ends) == 1.0
    wrong = RealImages(real.images, (real.labels + 1) % 3)
    with pytest.raises(InputError, match=r"experts know .* train images of class 0, but start=correct needs 8"):
        correct_rows(experts, torch.zeros(8, dtype=torch.long), wrong, device, 0)


def test_labels_are_the_mean_logits_of_experts_that_are_right(experts: Experts, real: RealImages) -> None:
    x, labels = experts.whitening(real.images[:8]), real.labels[:8].clone()
    labels[0] = (labels[0] + 1) % 3  # so that hardly an expert is right
    logits = torch.stack([experts.net(experts.parameters(i, experts.epochs), x) for i in range(2)])
    result = expert_labels(experts, x, labels)
    assert torch.isfinite(result).all()
    for n in range(8):
        right = [e for e in range(2) if int(logits[e, n].argmax()) == int(labels[n])]
        torch.testing.assert_close(result[n], logits[right or [0, 1], n].mean(0))


def test_labels_of_classes_are_soft_where_they_are_learned(small: Trajectory, experts: Experts) -> None:
    config = dataclasses.replace(small, steps=0, first_labels="classes")
    p = learn(config, experts).soft_labels.softmax(1)
    torch.testing.assert_close(p.gather(1, LABELS[:, None])[:, 0], torch.full((6,), 0.9))
    hard = learn(dataclasses.replace(config, learn_labels=False), experts).soft_labels.softmax(1)
    torch.testing.assert_close(hard, torch.nn.functional.one_hot(LABELS, 3).float(), atol=1e-6, rtol=0)


# --- settings -----------------------------------------------------------------------------------------------------


def facts_of(folder: Path, epochs: int) -> str:
    write_json(folder / "experts.json", {"facts": {"epochs": epochs}})
    return str(folder)


def test_presets_have_the_paper_s_settings_and_own_settings_win(tmp_path: Path) -> None:
    config = Trajectory(experts=facts_of(tmp_path, 100), preset="cifar10")
    c = resolve(config, Context(32, 0, 10, 10, 5000))
    assert (c.student_steps, c.expert_epochs, c.start_epochs, c.expand_every) == (80, 2, (0, 10, 20), 100)
    assert (c.alpha, c.lr_labels, c.lr_images, c.lr_step, c.start) == (0.25, 2, 100, 1e-5, "correct")
    assert c.threshold == 1.0
    assert resolve(config, Context(32, 0, 1, 10, 5000)).threshold == 1.1
    own = dataclasses.replace(config, alpha=0.5, lr_images=7.0)
    c = resolve(own, Context(32, 0, 50, 10, 5000))
    assert (c.alpha, c.lr_images, c.inner_batch) == (0.5, 7.0, 500)
    assert resolve(c, Context(32, 0, 50, 10, 5000)) == c
    for dataset, rows in PRESETS.items():
        for ipc, row in rows.items():
            filled = resolve(dataclasses.replace(config, preset=dataset), Context(32, 0, ipc, 10, 5000))
            assert filled.start_epochs == row.start_epochs
            assert row.pad > row.datm
    with pytest.raises(InputError, match=r"for 1, 10, 50, 500, 1000 .*not for 20\b"):
        resolve(config, Context(32, 0, 20, 10, 5000))
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        resolve(dataclasses.replace(config, preset="cifar1"), Context(32, 0, 10, 10, 5000))


def test_general_settings_fit_the_experts_and_follow_pad_s_rule(tmp_path: Path) -> None:
    config = Trajectory(experts=facts_of(tmp_path, 6))
    c = resolve(config, Context(32, 0, 10, 10, 5000))
    assert c.start_epochs == (0, 5, 5)
    shares = {ipc: resolve(config, Context(32, 0, ipc, 10, 5000)).alpha for ipc in (1, 10, 500, 1000)}
    assert shares == {1: 0.0, 10: 0.25, 500: 0.5, 1000: 0.75}
    assert resolve(config, Context(32, 0, 10)).alpha == 0.25
    with pytest.raises(InputError, match=r"need experts of 7 epochs, but those in .* have 6"):
        resolve(dataclasses.replace(config, start_epochs=(0, 3, 6)), Context(32, 0, 10, 10, 5000))
    assert resolve(dataclasses.replace(config, start_epochs=(0, 3, 5)), Context(32, 0, 10)).start_epochs == (0, 3, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": ""}, "experts must be a folder of experts; make one by `dq train-experts`"),
        ({"compose": "index"}, "compose must be 'whole', not 'index'"),
        ({"dtype": "bfloat16"}, "dtype must be 'float32', not 'bfloat16'"),
        ({"chunk": 0}, "chunk must be a whole number of at least 1 or 'off', not 0"),
        ({"student_steps": 0}, "student_steps must be a whole number of at least 1 or 'preset', not 0"),
        ({"start_epochs": (0, 10)}, r"start_epochs must be \[first, bound, last bound\]"),
        ({"start_epochs": (5, 5, 9)}, "start_epochs must be"),
        ({"alpha": 1.0}, r"alpha must be a number in \[0, 1\) or 'preset', not 1"),
        ({"momentum_labels": 1.0}, r"momentum_labels must be a number in \[0, 1\), not 1"),
        ({"least_step": 0.0}, "least_step must be a number of more than 0, not 0"),
        ({"check_nets": 0}, "check_nets must be a whole number of at least 1, not 0"),
        ({"start": "noise"}, "experts see no class in noise; with start=noise set first_labels=classes"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Trajectory(**{"experts": "runs/experts", **settings})


def test_experts_that_know_too_little_or_stand_still_are_refused(small: Trajectory, experts: Experts) -> None:
    weak = dataclasses.replace(experts, accuracies=(0.9, 0.4))
    with pytest.raises(InputError, match=r"1 know fewer than 66\.7% of held-out images: expert 1 \(40\.0%\)"):
        learn(dataclasses.replace(small, min_accuracy=None), weak)

    class Still(Experts):
        def parameters(self, expert: int, epoch: int) -> Tensor:
            p = super().parameters(expert, 0)
            p[0] += epoch  # the shallowest alone
            return p

    still = Still(**{f.name: getattr(experts, f.name) for f in dataclasses.fields(experts)})
    with pytest.raises(InputError, match=r"parameters of expert \d .*after \d and after \d epochs"):
        learn(small, still)
    learn(dataclasses.replace(small, alpha=0.0, steps=1), still)


def test_images_of_another_size_are_refused(small: Trajectory, experts: Experts) -> None:
    with pytest.raises(InputError, match=r"8 px, .* 16"):
        refined(refine, torch.rand(6, 3, 16, 16), LABELS, small, classes=3, experts=experts)


# --- latents ------------------------------------------------------------------------------------------------------


@pytest.fixture
def latent(small: Trajectory) -> Trajectory:
    return dataclasses.replace(small, mode="latent", chunk=4, lr_images=0.5, momentum_images=0.0, augment="none")


def codec() -> ImageCodec:
    return ImageCodec.of(tiny_kl(), 16, 8)


def with_states(config: Trajectory, experts: Experts, *more: Any, **options: Any) -> tuple[Refined, list[State]]:
    states: list[State] = []
    r = learn(config, experts, *more, codec=codec(), save=states.append, **options)
    return r, states


@pytest.mark.parametrize(("unroll", "student_steps"), [("exact", 3), ("tesla", 1)])
def test_latents_move_along_the_gradient_through_student_and_decoder(
    latent: Trajectory, experts: Experts, monkeypatch: pytest.MonkeyPatch, unroll: str, student_steps: int
) -> None:
    monkeypatch.setattr(record, "SAVE_SECONDS", 0.0)
    calls: list[tuple[Any, ...]] = []
    gradient = trajectory.GRADIENTS[unroll]
    monkeypatch.setitem(trajectory.GRADIENTS, unroll, lambda *a, **o: calls.append(a) or gradient(*a, **o))
    config = dataclasses.replace(latent, steps=2, student_steps=student_steps, inner_batch=4, unroll=unroll)
    r, states = with_states(config, experts)
    images = 0.3 + 0.4 * torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    start = codec().encode(images)
    assert r.facts["latents"] == list(start.shape[1:]) == [4, 8, 8]
    # the same step in one graph from the latents to the loss
    student, _, y, step_size, segment = calls[0]
    theta = segment.start
    z, end = start.clone().requires_grad_(True), theta.clone().requires_grad_(True)
    x = experts.whitening(codec().decode(z))
    for i in range(student_steps):
        (g,) = torch.autograd.grad(student.loss(end, i, x, y), end, create_graph=True)
        end = end - step_size * g
    loss, _ = matching_loss(end, segment)
    (expected,) = torch.autograd.grad(loss, z)
    assert float(r.trace[0, 0]) == pytest.approx(loss.item(), rel=1e-4)
    moved = states[0].tensors["x.value"] - start
    largest = float(expected.abs().max())
    assert largest > 0
    torch.testing.assert_close(moved / -0.5, expected, rtol=1e-3, atol=1e-3 * largest)


class Saved:
    """A tensor that a graph through the decoder keeps; how many numbers are kept at once, now and at most."""

    now = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Saved.now += tensor.numel()
        Saved.most = max(Saved.most, Saved.now)

    def __del__(self) -> None:
        Saved.now -= self.tensor.numel()


class Watched(ImageCodec):
    def decode(self, latents: Tensor) -> Tensor:
        with saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            return super().decode(latents)


@pytest.mark.parametrize("unroll", ["exact", "tesla"])
def test_activations_of_the_decoder_do_not_grow_with_the_steps_of_the_student(
    latent: Trajectory, experts: Experts, monkeypatch: pytest.MonkeyPatch, unroll: str
) -> None:
    gradient = trajectory.GRADIENTS[unroll]

    def without_decoder(*args: Any, **options: Any) -> MetaGradient:
        assert Saved.now == 0
        g = gradient(*args, **options)
        assert Saved.now == 0
        return g

    monkeypatch.setitem(trajectory.GRADIENTS, unroll, without_decoder)
    peaks = {}
    for student_steps, chunk in ((2, 1), (8, 1), (2, 2), (2, None)):
        config = dataclasses.replace(latent, steps=1, student_steps=student_steps, chunk=chunk, unroll=unroll)
        Saved.most = 0
        learn(config, experts, codec=Watched(codec().codec, 16, 8))
        peaks[student_steps, chunk] = Saved.most
    assert peaks[2, 1] == peaks[8, 1] > 0
    one_more = peaks[2, 2] - peaks[2, 1]  # beside the weights, which are kept whatever the chunk
    assert one_more > peaks[2, 1] / 2
    assert peaks[2, None] == peaks[2, 1] + 5 * one_more


def test_learning_latents_goes_on_bit_for_bit(
    latent: Trajectory, experts: Experts, real: RealImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "SAVE_SECONDS", 0.0)
    config = dataclasses.replace(latent, momentum_images=0.5, checks=2, check_nets=1, check_epochs=1, start="correct")
    whole, states = with_states(config, experts, real, seed=3)
    for state in (states[0], states[3]):
        again, _ = with_states(config, experts, real, seed=3, resume=state)
        for name in ("images", "soft_labels", "trace", "blocks"):
            assert torch.equal(getattr(again, name), getattr(whole, name))
        assert again.facts == whole.facts
    assert whole.bounded
    assert 0 <= float(whole.images.min()) <= float(whole.images.max()) <= 1


def test_latents_start_from_what_is_asked_for(latent: Trajectory, experts: Experts, real: RealImages) -> None:
    still, c = dataclasses.replace(latent, steps=0), codec()
    encoded = c.decode(c.encode(real.images))
    for start in ("real", "correct"):
        r = learn(dataclasses.replace(still, start=start), experts, real, codec=c)
        for image, label in zip(r.images, LABELS, strict=True):
            distances = (encoded - image).abs().amax((1, 2, 3))
            assert distances.min() < 1e-5
            assert label in real.labels[distances < 1e-5]
        labels = expert_labels(experts, experts.whitening(r.images), LABELS)  # of what the decoder shows
        torch.testing.assert_close(r.soft_labels, labels, atol=1e-4, rtol=1e-4)


def test_latents_of_a_gray_data_set_move_along_all_channels(
    latent: Trajectory, experts: Experts, real: RealImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    gray = RealImages(real.images[:, :1].expand(-1, 3, -1, -1), real.labels)
    moving = dataclasses.replace(latent, steps=2)

    def both(config: Trajectory, **more: Any) -> list[Tensor]:
        images = []
        for answer in (True, False):
            monkeypatch.setattr(trajectory, "is_gray", lambda _, answer=answer: answer)
            images.append(learn(config, experts, gray, **more).images)
        return images

    as_gray, as_color = both(moving, codec=codec())
    assert torch.equal(as_gray, as_color)  # a decoder's images need not be gray
    as_gray, as_color = both(dataclasses.replace(moving, mode="pixel"))
    assert not torch.equal(as_gray, as_color)


def test_latents_need_a_codec(latent: Trajectory, small: Trajectory, experts: Experts) -> None:
    with pytest.raises(InputError, match=r"mode=latent .*codec"):
        learn(latent, experts)
    method = TrajectoryMethod()
    assert method.needs(latent).codec
    assert not method.needs(small).codec
    resources = Resources(8, 3, experts=experts, codec=codec())
    r = method.run(Batch(torch.rand(6, 3, 8, 8), LABELS), method.brief(latent), resources, Session())
    assert r.images.shape == (6, 3, 8, 8)
    assert "chunk" in small.unread()
    assert "chunk" not in latent.unread()


# --- a stage of a run -----------------------------------------------------------------------------------------------


def settings_of(out: Path, config: Trajectory, **more: Any) -> RunConfig:
    stage = to_dict(config)
    return apply_settings(
        RunConfig(output_dir=str(out / "run"), cache_dir=str(out / "cache")),
        {
            "codec.resolution": 8,
            "ipc": [2],
            "refine": [{**stage, **more}],
            "evaluate.baselines": [],
            "evaluate.validation_images": 6,
            "evaluate.seeds": 1,
            "evaluate.students": [
                {"protocol": "classic", "net": NET, "labels": "fixed", "epochs": 2, "tests": 2, "whiten": True},
                {"protocol": "custom", "net": NET, "labels": "fixed", "epochs": 1, "lr": 0.02, "temperature": 1.0},
            ],
        },
    )


def test_costs_are_in_steps_of_students_of_the_run_s_ipc(tmp_path: Path) -> None:
    from dq.run.refinement import planned

    config = Trajectory(experts=facts_of(tmp_path, 100), preset="cifar100", steps=7)
    method, context = TrajectoryMethod(), Context(32, 0, 10, 100, 500)
    stage = method.resolve(config, context)
    assert method.cost(stage, context).steps == 7 * 80
    short = method.brief(stage)
    assert (short.steps, short.student_steps, short.checks) == (2, 3, 0)
    assert short.threshold > 1000 * stage.threshold  # a measurement of time warns of no skipped steps
    run = apply_settings(RunConfig(), {"ipc": [10], "refine": [to_dict(config)]})
    assert [p.steps for p in planned(run, "ddoq", [500] * 100)] == [7 * 80]
    with pytest.raises(InputError, match=r"for 1, 10, 50, 100 .*not for 7\b"):
        planned(apply_settings(run, {"ipc": [10, 7]}), "ddoq", [500] * 100)


def distill(config: RunConfig, source: Any, accelerator: Any) -> Any:
    from dq.run.distill import DistillPipeline

    pipe = DistillPipeline(vae=tiny_kl())
    return pipe.distill(source, ipc=2, config=config, output_dir=config.output_dir, accelerator=accelerator)


def test_it_is_a_stage_of_a_run(
    small: Trajectory,
    experts: Experts,
    toy_source: Any,
    accelerator: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dq.distilled.external import load_set
    from dq.run.folder import open_run
    from dq.run.planning.plan import plan
    from dq.run.planning.refining import refining_speed
    from dq.run.stages.evaluate import check_evaluation, evaluate_run

    config = settings_of(tmp_path, small)
    assert "trajectory, 6 images in 1 batch, 18 steps, 108 image steps" in plan(config, toy_source)
    assert refining_speed(config.refine[0], (), 3, 8, torch.device("cpu"), images=6).seconds > 0
    check_evaluation(config, toy_source)
    monkeypatch.setattr(record, "SAVE_SECONDS", 0.0)
    gradient, steps = trajectory._gradient, []

    def killed(*args: Any) -> Any:
        if len(steps) == 3:
            steps.append("killed")
            raise KeyboardInterrupt
        steps.append(args[2])
        return gradient(*args)

    monkeypatch.setattr(trajectory, "_gradient", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(config, toy_source, accelerator)
    s = distill(config, toy_source, accelerator)
    assert steps == [0, 1, 2, "killed", 3, 4, 5]
    again = load_set(tmp_path / "run" / "dataset")
    assert (again.label_kind, again.step_size) == ("logits", s.step_size)
    assert torch.equal(again.images, s.images)
    stage = s.provenance["refine"][0]
    assert stage["summary"]["cut"]["parameters_left_out"] == experts.net.size // 4
    tensors, _ = read_tensors(tmp_path / "run" / "images" / stage["folder"] / "preprocessing.safetensors")
    assert torch.equal(tensors["matrix"], experts.whitening.matrix)
    # the protocol trains with the learned step size, other students with their own
    run = open_run(config, toy_source, accelerator)
    evaluate_run(run)
    records = [read_json(f) for f in (tmp_path / "run" / "eval" / "units").glob("*.json")]
    assert {r["protocol"]: r["config"]["lr"] for r in records} == {"classic": s.step_size, "custom": 0.02}


def test_experts_of_other_images_and_cut_off_files_are_refused(
    small: Trajectory, toy_source: Any, toy_images: Any, accelerator: Any, tmp_path: Path
) -> None:
    from dq.data.load import load_source
    from dq.run.checks import check_settings
    from dq.run.refinement import experts_of

    folder = experts_in(tmp_path, toy_source, accelerator, epochs=4, net="convnet2w2")
    needs = TrajectoryMethod().needs(dataclasses.replace(small, experts=str(folder)))
    assert experts_of(toy_source, 8, needs) is not None
    assert needs.real_images
    x, y = toy_images["train"]
    other = load_source({"train": (x[1:], y[1:])}, class_names=["red", "green", "blue"])
    with pytest.raises(InputError, match=r"on other images than those of .* at 8 px \(fingerprint differs\)"):
        experts_of(other, 8, needs)
    with pytest.raises(InputError, match=r"image_size differs"):
        experts_of(toy_source, 16, needs)
    file = folder / "expert-0001.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    config = settings_of(tmp_path, small, experts=str(folder), start_epochs=[0, 1, 2], start="drawn")
    with pytest.raises(RunError, match=r"expert-0001\.safetensors is damaged"):
        check_settings(config, toy_source, "refine")
    with pytest.raises(InputError, match=r"^refine\.0\.experts: .* does not exist; .* `dq train-experts`$"):
        check_settings(settings_of(tmp_path, small, experts=str(tmp_path / "none")), toy_source, "refine")


# --- on the digits ------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.slow
def test_twenty_digits_are_distilled(accelerator: Any, tmp_path: Path) -> None:
    from dq.data.images import read_images
    from dq.data.load import load_source

    source = load_source("sklearn:digits")
    t = {"net": "convnet2w16", "epochs": 8, "batch_size": 64, "lr": 0.05, "whiten": False, "number": 3}
    experts = open_experts(experts_in(tmp_path, source, accelerator, **t))
    assert min(experts.accuracies) > 0.85
    images, kept, _ = read_images(source.train, range(len(source.train)), 8, "crop", on_bad="raise")
    real = RealImages(images, torch.from_numpy(source.train.labels[kept]).long())
    test, rows, _ = read_images(source.test, range(len(source.test)), 8, "crop", on_bad="raise")
    held = RealImages(test, torch.from_numpy(source.test.labels[rows]).long())
    labels = torch.arange(10).repeat_interleave(2)
    config = Trajectory(
        experts=str(experts.folder),
        start="real",
        steps=150,
        student_steps=10,
        expert_epochs=2,
        start_epochs=(0, 2, 5),
        expand_every=25,
        lr_images=20.0,
        lr_labels=1.0,
        lr_step=1e-4,
        first_step=0.05,
        alpha=0.25,
        augment="none",
    )

    def score(r: Refined, seed: int) -> float:
        spec = {"protocol": "classic", "net": "convnet2w16", "labels": "fixed", "epochs": 200, "augment": "none"}
        spec |= {"lr": r.step_size, "dtype": "float32"}
        student = student_config(spec, ipc="2", classes=10, image_size=8)
        x = experts.whitening(r.images)
        return mean_accuracy(x, r.soft_labels, HeldOut(held, experts.whitening, "", 3), student, seed=seed)

    gains = []
    for seed in range(3):
        options: dict[str, Any] = {"classes": 10, "experts": experts, "seed": seed}
        r, first = (
            refined(refine, torch.zeros(20, 3, 8, 8), labels, c, real, **options)
            for c in (config, dataclasses.replace(config, steps=0))
        )
        losses = r.trace[:, 0]
        assert float(losses[-15:].mean()) < 0.5 * float(losses[:15].mean())
        gains.append(score(r, seed) - score(first, seed))
    assert statistics.mean(gains) > 0.02
