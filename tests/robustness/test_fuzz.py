"""A part of the long run of `make fuzz`, and that the harness would see what it looks for."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import fuzz
import pytest
from fuzz import Target

from dq.core.errors import InputError

pytestmark = pytest.mark.slow


@pytest.mark.multi_process
def test_damaged_and_hostile_inputs_end_in_a_sentence(tmp_path: Path) -> None:
    total = 0
    for target in fuzz.targets(tmp_path):
        count, findings = fuzz.fuzz(target, 7, 5 * target.share)
        assert not findings, "\n".join(findings[:5])
        assert count["refused"] > 0 or not target.refuses
        assert count["accepted"] + count["refused"] == 5 * target.share
        total += 5 * target.share
    assert total > 1750


@pytest.mark.multi_process
def test_the_harness_sees_errors_crashes_and_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "LIMIT_S", 1.0)
    deeds = {
        b"0": lambda: None,
        b"1": lambda: (_ for _ in ()).throw(InputError("no")),
        b"2": lambda: {}["missing"],
        b"3": lambda: os.kill(os.getpid(), 11),
        b"4": lambda: time.sleep(60),
        b"5": lambda: os._exit(0),
        b"6": lambda: sys.exit(3),
    }
    monkeypatch.setattr(fuzz, "make_input", lambda target, seed, number: b"%d" % (number % 7))
    count, findings = fuzz.fuzz(Target("deeds", 1, [b""], lambda data, _: deeds[data]()), 0, 14)
    assert count == {"accepted": 2, "refused": 2, "undocumented": 2, "crashes": 6, "hangs": 2}
    assert "--number 2: KeyError: 'missing'" in findings[0]
    assert len(findings) == 10


def test_mutations_repeat_and_differ() -> None:
    target = Target("x", 1, [bytes(range(200)), b"key: value\n" * 9], lambda data, _: None, text=True)
    inputs = [fuzz.make_input(target, 0, i) for i in range(300)]
    assert inputs == [fuzz.make_input(target, 0, i) for i in range(300)]
    assert len(set(inputs)) > 250
    assert len({len(i) for i in inputs}) > 30
