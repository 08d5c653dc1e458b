"""Sets that no method of refinement can work on, and results that have diverged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from frepo_toy import SMALL, toy
from refined import refined

from dq.core.errors import InputError, RunError
from dq.refine import distribution_matching, frepo
from dq.refine.inputs import check_refined, check_set
from dq.refine.method import RealImages, Refined

IMAGES, LABELS = torch.rand(2, 3, 8, 8), torch.arange(2)

SETS: list[tuple[dict[str, Any], str]] = [
    ({"images": IMAGES[:, :1]}, r"must be float \(n, 3, S, S\)"),
    ({"images": (255 * IMAGES).byte()}, "torch.uint8"),
    ({"images": IMAGES[:0], "labels": LABELS[:0]}, r"\(0, 3, 8, 8\)"),
    ({"images": 255 * IMAGES}, r"pixels in \[0, 1\], but one is"),
    ({"images": IMAGES * float("nan")}, "no finite numbers"),
    ({"labels": LABELS[:1]}, r"whole numbers \(2,\) as labels"),
    ({"labels": LABELS.float()}, "torch.float32"),
    ({"labels": LABELS + 1}, "lie in 0 to 1, not 2"),
    ({"labels": LABELS - 1}, "lie in 0 to 1"),
    ({"real": RealImages(torch.zeros(4, 3, 9, 9, dtype=torch.uint8), torch.arange(4) % 2)}, "of one size"),
    ({"weights": torch.tensor([1.0, 0.0])}, "positive, finite"),
    ({"weights": torch.tensor([1.0, float("nan")])}, "positive, finite"),
    ({"weights": torch.ones(3)}, r"must be \(2,\)"),
]


@pytest.mark.parametrize(("changed", "message"), SETS)
def test_what_no_method_can_work_on_is_refused(changed: dict[str, Any], message: str) -> None:
    check_set(IMAGES, LABELS, 2, toy(), torch.ones(2))
    arguments: dict[str, Any] = {"images": IMAGES, "labels": LABELS, "real": toy(), "weights": torch.ones(2)}
    with pytest.raises(InputError, match=message):
        check_set(classes=2, **(arguments | changed))


def test_methods_check_their_set() -> None:
    from dq.config.condensation import DistributionMatching

    with pytest.raises(InputError, match="lie in 0 to 1"):
        refined(frepo.refine, IMAGES, LABELS + 1, SMALL, toy(), classes=2)
    with pytest.raises(InputError, match="lie in 0 to 1"):
        config = DistributionMatching(net="convnet2w4")
        refined(distribution_matching.refine, IMAGES, LABELS + 1, config, toy(), classes=2)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"images": 2e3 * torch.ones(1, 3, 2, 2)}, r"far from \[0, 1\]"),
        ({"images": torch.full((1, 3, 2, 2), float("nan"))}, "nan, far from"),
        ({"soft_labels": torch.full((1, 2), 1e6)}, "labels that frepo learned"),
        ({"soft_labels": torch.full((1, 2), float("nan"))}, "labels that frepo learned"),
        ({"step_size": float("inf")}, "step size that frepo learned is inf"),
    ],
)
def test_a_result_that_has_diverged_names_its_stage(result: dict[str, Any], message: str) -> None:
    check_refined(Refined(torch.full((1, 3, 2, 2), -3.0), soft_labels=torch.ones(1, 2), step_size=0.1), "frepo")
    with pytest.raises(RunError, match=f"{message}.*lower the learning rates of stage frepo"):
        check_refined(Refined(**({"images": torch.zeros(1, 3, 2, 2)} | result)), "frepo")
