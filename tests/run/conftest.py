"""Teachers that stages of refinement match."""

from __future__ import annotations

import pytest
import torch
from refining import bn_teacher


@pytest.fixture(scope="module")
def teachers(toy_images, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("teachers")
    x, y = toy_images["train"]
    y = torch.tensor([2, 1, 0])[y]  # folders by name: blue, green, red
    return [bn_teacher(x, y, folder, name, seed) for seed, name in enumerate(("one", "two"))]
