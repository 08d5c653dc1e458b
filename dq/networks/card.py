"""The card of a teacher."""

from __future__ import annotations

import math
import re
from typing import Any

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


def teacher_card(facts: dict[str, Any], *, repo_id: str = ANY_REPO, old: str = "", license: str | None = None) -> str:
    """The README of a teacher, from the facts that `dq train-teachers` wrote beside its weights."""
    kept, _ = split_card(old)
    facts = public(facts)
    origin = str((facts.get("source") or {}).get("origin", UNKNOWN))
    head: dict[str, Any] = {
        **license_head(license, kept),
        "library_name": "dq",
        "pipeline_tag": "image-classification",
        "tags": joined_lists(kept.get("tags"), ["image-classification", "dataset-distillation", "teacher"]),
    }
    if is_hub_id(origin) or "datasets" in kept:
        head["datasets"] = joined_lists(kept.get("datasets"), [origin] if is_hub_id(origin) else [])
    accuracy, images = facts.get("validation_accuracy"), int(facts.get("validation_images") or 0)
    error = math.sqrt(accuracy * (1 - accuracy) / images) if accuracy is not None and images else None
    body = template("dq.networks", "teacher_card.md").render(
        facts=facts,
        origin=origin,
        repo_id=repo_id,
        name=repo_id.rpartition("/")[2],
        accuracy=None if accuracy is None else f"{100 * accuracy:.1f}",
        error=None if error is None else f"{100 * error:.1f}",
        wordnet=all(re.fullmatch(r"n\d{8}", str(n)) for n in facts.get("classes", [""])),
    )
    return merge_card(old, head, body)
