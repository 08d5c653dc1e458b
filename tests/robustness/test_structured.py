"""Well-formed inputs with absurd contents, drawn and made smaller by Hypothesis: taken, or refused in a sentence.

The makers and the readers are those of the fuzzer. It runs them in processes of their own, many times as often.
"""

from __future__ import annotations

import random
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fuzz
import malformed
import pytest
from fuzz import Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# readers that open a data set with `datasets` take a quarter of a second for each
EXAMPLES = {"odd Parquet as external set": 4, "odd Parquet source": 4, "odd Parquet stream": 8, "odd tar stream": 15}
NAMES = (
    "configuration", "--set", "image PNG", "set of tensors", "set of arrays", "record of a set", "record from the Hub",
    "evaluation from the Hub", "card from the Hub", "Parquet of a set", "Parquet as external set", "Parquet source",
    "Parquet stream", "tar stream",
)  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {t.name: t for t in fuzz.targets(tmp_path_factory.mktemp("targets")) if t.make}


@pytest.fixture(scope="module", autouse=True)
def limited_memory() -> Iterator[None]:
    """An input that asks for terabytes fails at once, as in the fuzzer."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + fuzz.MORE_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def outcomes(target: Target, examples: int) -> Counter[str]:
    counts: Counter[str] = Counter()

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def check(rng: random.Random) -> None:
        assert target.make
        outcome = fuzz.once(target, target.make(rng))
        assert outcome in ("accepted", "refused"), outcome
        counts[outcome] += 1

    check()
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_structured_inputs_are_taken_or_refused(name: str, targets: dict[str, Target]) -> None:
    target = targets[f"odd {name}"]
    counts = outcomes(target, EXAMPLES.get(target.name, 40))
    assert counts["accepted"] + counts["refused"] > 0
    assert counts["refused"] > 0 or not target.refuses


def test_every_structured_target_is_tested(targets: dict[str, Target]) -> None:
    assert {f"odd {name}" for name in NAMES} == targets.keys()


def test_another_exception_is_seen_and_its_input_made_small() -> None:
    def read(data: bytes, folder: Path) -> None:
        if b"null" in data:
            raise KeyError("null")

    tree = {"a": 1, "b": [1, 2], "c": {"d": "x"}}
    target = Target("odd", 1, [], read, make=lambda rng: malformed.record(tree, rng))
    with pytest.raises(AssertionError, match="KeyError: 'null'"):
        outcomes(target, 200)
