"""Properties of packed logits, for logits, numbers of classes and of kept logits that Hypothesis draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from dq.config.students import RelabelConfig
from dq.labels.packing import pack, unpack

BITS = st.sampled_from([16, 8])


@st.composite
def logits_of(draw: st.DrawFn, least_classes: int = 1) -> Tensor:
    shape = draw(st.tuples(st.integers(1, 6), st.integers(least_classes, 12)))
    scale = draw(st.sampled_from([0.0625, 1.0, 64.0]))
    return scale * torch.from_numpy(draw(arrays(np.float32, shape, elements=st.floats(-1, 1, width=32))))


def rounding(logits: Tensor) -> float:
    """A bound of the rounding errors in float32 of a mean of twelve logits, and of what float16 cannot hold."""
    return 12 * float(logits.abs().max()) * 2**-22 + 2**-24


@given(logits_of())
def test_16_bits_round_to_half_precision(logits: Tensor) -> None:
    assert torch.equal(unpack(pack(logits, RelabelConfig()), logits.shape[1]), logits.half().float())


@given(logits_of())
def test_8_bits_err_by_half_a_step_and_keep_the_order(logits: Tensor) -> None:
    decoded = unpack(pack(logits, RelabelConfig(bits=8)), logits.shape[1])
    assert decoded.shape == logits.shape
    assert float((decoded - logits).abs().max()) <= float(logits.max() - logits.min()) / 510 + rounding(logits)
    assert (decoded.flatten()[logits.flatten().argsort()].diff() >= 0).all()


@given(logits_of(least_classes=2), BITS, st.data())
def test_top_k_keeps_distances_above_the_mean_of_the_others(logits: Tensor, bits: int, data: st.DataObject) -> None:
    n, classes = logits.shape
    k = data.draw(st.integers(1, classes - 1), label="top_k")
    packed = pack(logits, RelabelConfig(top_k=k, bits=bits))  # type: ignore[arg-type]
    assert packed["index"].shape == packed["above"].shape == (n, k)
    decoded = unpack(packed, classes)
    ranked = logits.sort(1, descending=True).values.double()
    above = ranked[:, :k] - ranked[:, k:].mean(1, keepdim=True)
    error = float(above.max()) * (2**-11 if bits == 16 else 1 / 510) + rounding(logits)
    index = packed["index"].long()
    assert (index.sort(1).values.diff() > 0).all()  # each class once
    assert (logits.gather(1, index) == ranked[:, :k].float()).all()
    assert float((decoded.gather(1, index) - above).abs().max()) <= error
    assert not decoded.scatter(1, index, 0.0).any()  # all others are zero


@given(logits_of(least_classes=2), st.integers(-50, 50))
def test_top_k_does_not_see_a_constant(logits: Tensor, constant: int) -> None:
    config = RelabelConfig(top_k=1)
    one, other = (unpack(pack(x, config), logits.shape[1]) for x in (logits.round(), logits.round() + constant))
    assert torch.allclose(one, other, rtol=2**-10, atol=rounding(logits.abs() + abs(constant)))


@given(logits_of(least_classes=2))
def test_packing_what_was_unpacked_changes_nothing(logits: Tensor) -> None:
    classes = logits.shape[1]
    for config, atol in ((RelabelConfig(), 0.0), (RelabelConfig(top_k=1), 2 * rounding(logits))):
        once = unpack(pack(logits, config), classes)
        assert torch.allclose(unpack(pack(once, config), classes), once, rtol=0.0, atol=atol)


@pytest.mark.parametrize("classes", [256, 257])
def test_top_k_names_the_last_class(classes: int) -> None:
    logits = torch.zeros(1, classes)
    logits[0, -1] = 3.0
    assert unpack(pack(logits, RelabelConfig(top_k=1)), classes).argmax() == classes - 1
