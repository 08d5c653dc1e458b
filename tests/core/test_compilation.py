"""torch.compile in place: kept where it is equal and faster, undone in one line of the log everywhere else."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dq.core.compilation import compile_if_faster, fix_rows, missing_compiler

CPU = torch.device("cpu")


class Block(nn.Module):
    """A layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class Small(nn.Module):
    """Two equal blocks; each row of the result depends on that row alone."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.rows: list[int] = []

    def forward(self, x: Tensor, *, shift: Tensor, scale: Tensor) -> tuple[Tensor]:
        self.rows.append(len(x))
        for block in self.blocks:
            x = block(x)
        return (scale * x + shift[:, None],)


def call_of(model: Small, n: int = 5) -> Callable[[], Tensor]:
    g = torch.Generator().manual_seed(n)
    x, shift = torch.randn(n, 6, generator=g), torch.randn(n, generator=g)
    return lambda: model(x, shift=shift, scale=torch.tensor(2.0))[0]


def compiled(model: Small, backend: Any, min_gain: float = 0.0) -> bool:
    torch._dynamo.reset()
    blocks = list(model.blocks)
    with torch.no_grad():
        return compile_if_faster(
            "the model", blocks, call_of(model), CPU, dtype=torch.float32, min_gain=min_gain, backend=backend
        )


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What dq logged; torch logs its own traces."""
    return [r.getMessage() for r in caplog.records if r.name == "dq"]


def wrong(graph: Any, inputs: Any) -> Any:
    return lambda *args: tuple(1.01 * out for out in graph.forward(*args))


def slow(graph: Any, inputs: Any) -> Any:
    def run(*args: Any) -> Any:
        time.sleep(0.02)
        return graph.forward(*args)

    return run


def broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no such instruction")


@torch.no_grad()
def test_blocks_that_are_equal_and_not_slower_are_compiled(caplog: pytest.LogCaptureFixture) -> None:
    graphs = []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Small()
    expected = call_of(model)()
    with caplog.at_level(logging.INFO, "dq"):
        assert compiled(model, counted)
    assert graphs, "nothing was compiled"
    assert torch.equal(call_of(model)(), expected)
    (line,) = lines_of(caplog)
    assert re.fullmatch(r"compile: the model is compiled, \d+\.\d\d times as fast", line)
    assert list(model.state_dict()) == list(Small().state_dict())  # compiled in place: digests of weights stay


@pytest.mark.parametrize(
    ("backend", "min_gain", "reason"),
    [
        (wrong, 0.0, r"its result then differs by \d\.\de-0\d, more than 3\.9e-03"),
        (slow, 1.05, r"it is then 0\.\d\d times as fast, less than 1\.05"),
        (broken, 0.0, r"that fails \(.*no such instruction"),
    ],
)
@torch.no_grad()
def test_everything_else_stays_eager_in_one_line(
    backend: Any, min_gain: float, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Small()
    expected = call_of(model)()
    with caplog.at_level(logging.INFO, "dq"):
        assert not compiled(model, backend, min_gain)
    (line,) = lines_of(caplog)
    assert line.startswith("compile: the model is not compiled, as ")
    assert "\n" not in line
    assert re.search(reason, line)
    assert torch.equal(call_of(model)(), expected)


@torch.no_grad()
def test_without_a_compiler_the_result_is_the_eager_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    model = Small()
    expected = call_of(model)()
    with caplog.at_level(logging.INFO, "dq"):
        assert not compiled(model, "inductor")
    assert lines_of(caplog) == ["compile: the model is not compiled, as there is no compiler (c++, g++, clang++)"]
    assert torch.equal(call_of(model)(), expected)


def test_a_named_compiler_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert missing_compiler(CPU) == "there is no compiler (no-such-compiler)"


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler(CPU) is not None, reason=missing_compiler(CPU) or "")
@torch.no_grad()
def test_the_real_compiler_gives_an_equal_result() -> None:
    model = Small()
    expected = call_of(model)()
    assert compiled(model, "inductor")
    torch.testing.assert_close(call_of(model)(), expected, rtol=1e-5, atol=1e-6)


# --- rows ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("n", "rows"), [(8, 8), (5, 8), (1, 4), (4, 4), (9, 9)])
def test_batches_are_padded_to_one_of_few_sizes(n: int, rows: int) -> None:
    model = Small()
    expected = call_of(model, n)()
    handles = fix_rows(model, (4, 8))
    result = call_of(model, n)()
    assert (model.rows, len(result)) == ([n, rows], n)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    for h in handles:
        h.remove()
    assert torch.equal(call_of(model, n)(), expected)
    assert model.rows[-1] == n


@torch.no_grad()
def test_the_last_batch_compiles_nothing_again() -> None:
    torch._dynamo.reset()
    graphs = []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Small()
    for block in model.blocks:
        block.compile(backend=counted, dynamic=False)
    fix_rows(model, (8,))
    call_of(model, 8)()
    first = len(graphs)
    for n in (3, 8, 1, 7):
        call_of(model, n)()
    assert first >= 1
    assert len(graphs) == first
