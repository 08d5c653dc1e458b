"""Card of a teacher."""

from __future__ import annotations

import math
import re

from dq.core.cards import (
    ANY_REPO,
    UNKNOWN,
    is_hub_id,
    joined_lists,
    license_head,
    merge_card,
    public,
    split_card,
    template,
)
from dq.core.plain import PlainDict


def teacher_card(facts: PlainDict, *, repo_id: str = ANY_REPO, old: str = "", license: str | None = None) -> str:
    """Render the README of a teacher from the facts that `dq train-teachers` wrote."""
    from huggingface_hub import EvalResult, ModelCardData

    old_head, _ = split_card(old)
    name = repo_id.rpartition("/")[2]
    facts = public(facts)
    origin = str((facts.get("source") or {}).get("origin", UNKNOWN))
    accuracy, images = facts.get("validation_accuracy"), int(facts.get("validation_images") or 0)
    datasets = [origin] if is_hub_id(origin) else []
    head = ModelCardData(
        **license_head(license, old_head),
        library_name="dq",
        pipeline_tag="image-classification",
        tags=joined_lists(old_head.get("tags"), ["image-classification", "dataset-distillation", "teacher"]),
        datasets=joined_lists(old_head.get("datasets"), datasets) if datasets or "datasets" in old_head else None,
    )
    if datasets and accuracy is not None:
        head.model_name = name
        head.eval_results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=origin,
                dataset_name=origin,
                dataset_split="train",
                metric_type="accuracy",
                metric_name="accuracy on images of the train split that were set aside",
                metric_value=accuracy,
            )
        ]
    error = math.sqrt(accuracy * (1 - accuracy) / images) if accuracy is not None and images else None
    body = template("dq.networks", "teacher_card.md").render(
        facts=facts,
        origin=origin,
        repo_id=repo_id,
        name=name,
        accuracy=None if accuracy is None else f"{100 * accuracy:.1f}",
        error=None if error is None else f"{100 * error:.1f}",
        wordnet=all(re.fullmatch(r"n\d{8}", str(n)) for n in facts.get("classes", [""])),
    )
    return merge_card(old, head.to_dict(), body)
