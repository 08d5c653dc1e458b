"""Properties of views, for settings, numbers of images and sizes of batches that Hypothesis draws."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from dq.config.students import ViewConfig
from dq.data.views import Views, apply_views, batches, draw_views, padding, parts


@dataclass(frozen=True)
class Epoch:
    config: ViewConfig
    n: int
    side: int
    batch_size: int
    accumulate: int
    seed: int
    epoch: int

    def views(self) -> Views:
        sizes = {"batch_size": self.batch_size, "accumulate": self.accumulate}
        return draw_views(self.config, self.n, self.side, **sizes, seed=self.seed, epoch=self.epoch)

    @property
    def spans(self) -> list[slice]:
        return batches(self.n, self.batch_size, self.accumulate)

    def images(self) -> torch.Tensor:
        g = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 256, (self.n, 3, self.side, self.side), generator=g, dtype=torch.uint8)


@st.composite
def crops(draw: st.DrawFn) -> dict[str, object]:
    kind = draw(st.sampled_from(["none", "pad", "scale"]))
    if kind == "pad":
        return {"crop_pad": draw(st.floats(0.01, 1.0))}
    if kind == "none":
        return {}
    scale = sorted(draw(st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0))))
    ratio = sorted(draw(st.tuples(st.floats(0.1, 10.0), st.floats(0.1, 10.0))))
    return {"crop_scale": tuple(scale), "crop_ratio": tuple(ratio)}


@st.composite
def view_configs(draw: st.DrawFn) -> ViewConfig:
    return ViewConfig(
        rand_augment=draw(st.integers(0, 3)),
        rand_magnitude=draw(st.integers(0, 30)),
        shuffle=draw(st.integers(1, 4)),
        flip=draw(st.sampled_from([0.0, 0.5, 1.0])),
        jitter=draw(st.sampled_from([0.0, 0.4])),
        lighting=draw(st.sampled_from([0.0, 0.1])),
        mix=draw(st.sampled_from(["none", "cutmix", "mixup"])),
        mix_alpha=draw(st.floats(0.1, 5.0)),
        **draw(crops()),  # type: ignore[arg-type]
    )


@st.composite
def epochs(draw: st.DrawFn) -> Epoch:
    sizes = (st.integers(1, 12), st.integers(4, 9), st.integers(1, 8), st.integers(1, 3))
    n, side, batch_size, accumulate = (draw(s) for s in sizes)
    seed, epoch = draw(st.integers(0, 2**31)), draw(st.integers(0, 1000))
    return Epoch(draw(view_configs()), n, side, batch_size, accumulate, seed, epoch)


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 8))
def test_batches_and_their_parts_cover_every_position_once(n: int, batch_size: int, accumulate: int) -> None:
    spans = batches(n, batch_size, accumulate)
    assert [i for s in spans for i in range(s.start, s.stop)] == list(range(n))
    assert all(s.stop - s.start == batch_size for s in spans[:-1])
    if len(spans) > 1:
        assert spans[-1].stop - spans[-1].start >= min(batch_size, 2 * accumulate)
    for s in spans:
        size = s.stop - s.start
        pieces = parts(size, accumulate)
        assert [i for p in pieces for i in range(p.start, p.stop)] == list(range(size))
        assert {p.stop - p.start for p in pieces} <= {size // len(pieces), -(-size // len(pieces))}


@given(epochs())
def test_draws_lie_within_images_and_batches(e: Epoch) -> None:
    v, spans = e.views(), e.spans
    assert v.order.sort().values.tolist() == list(range(e.n))
    for s in spans:
        assert v.partner[s].sort().values.tolist() == list(range(s.stop - s.start))
    assert ((v.kept >= 0) & (v.kept <= 1)).all()
    corner, size = v.box[:, :2], v.box[:, 2:]
    pad = padding(e.config.crop_pad, e.side) if e.config.crop_pad else 0
    assert ((size >= 1) & (size <= e.side)).all()
    assert ((corner >= -pad) & (corner + size <= e.side + pad)).all()
    assert (v.cut >= 0).all()
    assert (v.cut[:, :2] + v.cut[:, 2:] <= e.side).all()
    for name in ("shuffle", "color_order"):
        order = getattr(v, name)
        assert (order.sort(1).values == torch.arange(order.shape[1], dtype=torch.uint8)).all()


@given(epochs())
def test_views_are_a_function_of_their_draws_and_change_no_image(e: Epoch) -> None:
    views, images = e.views(), e.images()
    assert views.digest() == e.views().digest()
    kept = images.clone()
    for i, s in enumerate(e.spans):
        x = apply_views(e.config, images, views, i, s)
        assert x.dtype == torch.float32
        assert x.shape == (s.stop - s.start, 3, e.side, e.side)
        assert torch.equal(apply_views(e.config, images, e.views(), i, s), x)
        if not (e.config.jitter or e.config.lighting):
            assert -1e-6 <= float(x.min()) <= float(x.max()) <= 1 + 1e-6
    assert torch.equal(images, kept)


@given(epochs())
def test_images_in_another_order_give_the_same_views(e: Epoch) -> None:
    views, images = e.views(), e.images()
    place = torch.randperm(e.n, generator=torch.Generator().manual_seed(e.epoch))
    moved = torch.empty_like(images)
    moved[place] = images
    other = dataclasses.replace(views, order=place[views.order.long()].to(torch.int32))
    for i, s in enumerate(e.spans):
        assert torch.equal(apply_views(e.config, moved, other, i, s), apply_views(e.config, images, views, i, s))


@given(epochs())
def test_a_view_without_mixing_does_not_depend_on_the_others_of_its_batch(e: Epoch) -> None:
    config = dataclasses.replace(e.config, mix="none")
    views, images = dataclasses.replace(e, config=config).views(), e.images()
    for i, s in enumerate(e.spans):
        together = apply_views(config, images, views, i, s)
        last = s.stop - 1
        alone = apply_views(config, images, views, i, slice(last, last + 1))
        torch.testing.assert_close(together[-1:], alone, atol=1e-6, rtol=1e-6)
