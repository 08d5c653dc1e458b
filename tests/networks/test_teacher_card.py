"""Heads of cards by the classes of huggingface_hub: what the Hub reads of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from dq.core.cards import license_head, merge_card, split_card
from dq.networks.card import teacher_card

FACTS: dict[str, Any] = {
    "net": "convnet3",
    "classes": ["a", "b"],
    "image_size": 8,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "seed": 0,
    "validation_images": 40,
    "validation_accuracy": 0.75,
    "source": {"origin": "me/pictures"},
}


def test_the_accuracy_of_a_teacher_is_a_result_on_its_data_set() -> None:
    data = ModelCard(teacher_card(FACTS, repo_id="me/teacher", license="mit")).data
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_split, result.metric_type) == ("me/pictures", "train", "accuracy")
    assert result.metric_value == 0.75
    assert data.model_name == "teacher"
    assert data.license == "mit"
    assert data.datasets == ["me/pictures"]


@pytest.mark.parametrize(
    "change", [{"source": {"origin": "/home/me/pictures"}}, {"validation_accuracy": None}, {"source": None}]
)
def test_a_teacher_without_data_on_the_hub_or_without_accuracy_has_no_result(change: dict[str, Any]) -> None:
    head, _ = split_card(teacher_card({**FACTS, **change}, repo_id="me/teacher"))
    assert "model-index" not in head
    assert "model_name" not in head


def test_results_that_others_wrote_into_a_head_stay() -> None:
    old = "---\nmodel-index: [odd, {1: 2}]\nlanguage: en\n7: seven\n---\ntext"
    head, body = split_card(teacher_card({**FACTS, "validation_accuracy": None}, old=old))
    assert (head["model-index"], head["language"], head[7]) == (["odd", {1: 2}], "en", "seven")
    assert body.startswith("\ntext")


def test_another_license_replaces_every_key_of_the_old_one() -> None:
    old = "---\nlicense: other\nlicense_name: ours\nlicense_link: https://e.x\ntitle: t\n---\n"
    kept, _ = split_card(old)
    assert split_card(merge_card(old, license_head("mit", kept), "x"))[0] == {"license": "mit", "title": "t"}
    own = split_card(merge_card(old, license_head("My Own", kept), "x"))[0]
    assert own == {"license": "other", "license_name": "My Own", "title": "t"}
    assert split_card(merge_card(old, license_head(None, kept), "x"))[0] == kept
    assert split_card(merge_card(old, {}, "x"))[0] == kept


def test_an_own_license_of_a_prior_is_quoted(tmp_path: Path) -> None:
    head = license_head('a "quoted": name', {})
    assert split_card(merge_card("", head, "x"))[0] == {"license": "other", "license_name": 'a "quoted": name'}
