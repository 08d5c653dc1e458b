"""Classes of a generator by name or index."""

from __future__ import annotations

import pytest

from dq.core.errors import InputError
from dq.diffusion.class_names import class_indices

# as in the usual list of ImageNet's names: an animal and a machine share a name, and one name is a synonym elsewhere
NAMES = {
    "0": "crane",
    "1": "missile",
    "2": "projectile, missile",
    "3": "crane",
    "4": "maillot",
    "5": "maillot, tank suit",
    "6": "sunglass, shades",
    "7": "sunglasses, shades",
}


@pytest.mark.parametrize("order", [1, -1])
def test_an_exact_name_wins_over_a_synonym(order: int) -> None:
    names = dict(list(NAMES.items())[::order])
    assert class_indices(["missile", "maillot"], names, 8) == [1, 4]
    assert class_indices(["projectile", "tank suit", "maillot, tank suit"], names, 8) == [2, 5, 5]
    assert class_indices(["a"], names, 8, {"a": "missile"}) == [1]


@pytest.mark.parametrize(("name", "indices"), [("crane", "0, 3"), ("shades", "6, 7")])
def test_two_equals_are_refused_and_the_index_tells_them_apart(name: str, indices: str) -> None:
    with pytest.raises(InputError, match=rf"2 classes of the generator are called '{name}' \({indices}\).*class_map"):
        class_indices([name], NAMES, 8)
    with pytest.raises(InputError, match=f"called '{name}'"):
        class_indices(["a"], NAMES, 8, {"a": name})
    assert class_indices([name], NAMES, 8, {name: indices[0]}) == [int(indices[0])]


def test_a_mapping_names_classes_of_the_data() -> None:
    with pytest.raises(InputError, match=r"class_map .*'crame'.*did you mean"):
        class_indices(["crane", "missile"], NAMES, 8, {"crame": "0"})
    with pytest.raises(InputError, match=r"lacks class 'crane' \(class_map: 'melon'\)"):
        class_indices(["crane"], NAMES, 8, {"crane": "melon"})
    with pytest.raises(InputError, match="lacks class 'crane'"):
        class_indices(["crane"], NAMES, 8, {"crane": "8"})


def test_numbers_as_names() -> None:
    """Digits in alphabetical order: the name wins, whatever its index is."""
    names = {str(i): str(9 - i) for i in range(10)}
    assert class_indices(["0", "9"], names, 10) == [9, 0]
    assert class_indices(["a"], names, 10, {"a": "9"}) == [0]
    assert class_indices(["a", "b"], {}, 2) == [0, 1]
    with pytest.raises(InputError, match="lacks class 'a'"):
        class_indices(["a", "b"], {}, 3)
