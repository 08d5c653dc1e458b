"""Constants on a device."""

import pytest
import torch

from dq.core.constants import constant

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("values", [(0.5, 0.25), [1, 2, 3], 7, ((1.0, 0.0), (0.5, 2.0))])
def test_values_are_those_of_torch(values, dtype):
    torch.testing.assert_close(constant(values, CPU, dtype), torch.tensor(values, dtype=dtype), rtol=0, atol=0)


def test_it_is_made_once():
    assert constant([0.1, 0.2], CPU, torch.float32) is constant((0.1, 0.2), CPU, torch.float32)


def test_made_in_inference_mode_it_serves_autograd():
    with torch.inference_mode():
        scale = constant((3.25,), CPU, torch.float32)
    x = torch.ones(1, requires_grad=True)
    (x * scale).backward()
    assert x.grad == 3.25
