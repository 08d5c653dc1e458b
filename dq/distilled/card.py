"""Cards: the README of a folder or repository of distilled sets.

What is generated stands between two marks. What a user writes outside them, and other keys of the YAML head, stay when
the card is written again. A card contains no path of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dq.core.cards import (
    ANY_REPO,
    UNKNOWN,
    is_hub_id,
    joined_lists,
    license_head,
    merge_card,
    own_text,
    public,
    split_card,
    template,
)
from dq.core.files import is_done, read_json, write_text
from dq.core.plain import PlainDict, PlainMapping
from dq.distilled.format import GRID, GRID_COLUMNS, PROVENANCE, checked_provenance, set_features, set_names, shown_ipc

EVALUATION = "evaluation.json"  # beside the provenance of a set: accuracies of students
SIZES = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]


def write_dataset_card(folder: Path, *, old: str | None = None) -> None:
    """Write the README of a folder of sets from their records.

    `old` is the card of a repository that they were pulled from; None: the one in the folder.
    """
    card = folder / "README.md"
    records = [read_json(folder / name / PROVENANCE) for name in set_names(folder)]
    evaluations = {p.parent.name: read_json(p) for p in folder.glob(f"*/{EVALUATION}") if is_done(p)}
    # other configurations of a repository are not in the folder, and would not open
    alone = old is not None
    write_text(card, dataset_card(records, evaluations, old=own_text(card) if old is None else old, alone=alone))


def dataset_card(
    records: list[PlainDict],
    evaluations: Mapping[str, PlainDict],
    *,
    repo_id: str = ANY_REPO,
    old: str = "",
    alone: bool = False,
    license: str | None = None,
    pretty_name: str | None = None,
) -> str:
    """The README of a list of sets.

    Args:
        records: their provenance.
        evaluations: of `describe_evaluation`, by the name of the set; those of other content are left out.
        repo_id: for the snippets.
        old: the card that is replaced; see the module.
        alone: leave out configurations of others that `old` names.
        license: None keeps that of `old`.
        pretty_name: None keeps that of `old`.
    """
    from huggingface_hub import DatasetCardData

    old_head, _ = split_card(old)
    records = sorted((public(checked_provenance(r)) for r in records), key=lambda r: _natural(r["config_name"]))
    default = default_config(old_head, [r["config_name"] for r in records])
    first = next(r for r in records if r["config_name"] == default)
    sources = list(dict.fromkeys(str((r.get("source") or {}).get("origin", UNKNOWN)) for r in records))
    quantized = any("selection" not in r and "cluster" in r for r in records)
    hub_sources = [s for s in sources if is_hub_id(s)]
    stated = hub_sources or "source_datasets" in old_head
    head = DatasetCardData(
        pretty_name=pretty_name or old_head.get("pretty_name") or f"{', '.join(sources)}, distilled",
        **license_head(license, old_head),
        task_categories=["image-classification"],
        annotations_creators=["machine-generated"],
        size_categories=[_size(max(r["rows"] for r in records))],
        source_datasets=joined_lists(old_head.get("source_datasets"), hub_sources) if stated else None,
        tags=joined_lists(
            old_head.get("tags"), ["dataset-distillation", *(["optimal-quantization"] if quantized else []), "dq"]
        ),
        **_configs({} if alone else old_head, records, default),
    )
    rows = {
        r["config_name"]: texts
        for r in records
        if isinstance(e := evaluations.get(r["config_name"]), dict) and e.get("content") == r["content"]
        if (texts := [_evaluated(x) for x in _dicts(e.get("rows")) if _is_row(x)])
    }
    verdicts = {
        r["ipc"]: " ".join(verdict.split())[:300]
        for r in records
        if r["config_name"] in rows and isinstance(verdict := evaluations[r["config_name"]].get("verdict"), str)
    }
    body = template("dq.distilled", "dataset_card.md").render(
        records=records,
        first=first,
        pictured=min(records, key=lambda r: (*_grid_fit(r), r.get("method") != first.get("method"))),
        sources=sources,
        repo_id=repo_id,
        evaluated=rows,
        verdict=verdicts[shown_ipc(list(verdicts))] if verdicts else "",
        grid=GRID,
        class_lists=_class_lists(records),
        statements=[_statement(r) for r in records],
    )
    return merge_card(old, head.to_dict(), body)


def default_config(head: PlainMapping, names: list[str]) -> str:
    """The configuration that `load_dataset` takes by default.

    The one marked in an old head, else "default", else the first.
    """
    for c in _named(head.get("configs")):
        if c.get("default") is True and c.get("config_name") in names:
            return str(c["config_name"])
    return "default" if "default" in names else sorted(names, key=_natural)[0]


def _configs(old_head: PlainMapping, records: list[PlainDict], default: str) -> PlainDict:
    """`configs` and `dataset_info` of the head, with others of the old one."""
    from datasets import DatasetInfo
    from datasets.info import DatasetInfosDict
    from datasets.splits import SplitDict, SplitInfo
    from huggingface_hub import DatasetCardData

    replaced = {r["config_name"] for r in records}
    others = [c for c in _named(old_head.get("configs")) if c["config_name"] not in replaced and not _is_ours(c)]
    configs = [
        {
            "config_name": r["config_name"],
            # load_dataset keys its cache by the card, which must therefore follow the content
            "description": f"content {r['content']}",
            "data_files": [{"split": "train", "path": f"{r['config_name']}/train-*.parquet"}],
            **({"default": True} if r["config_name"] == default else {}),
        }
        for r in records
    ]
    infos = DatasetInfosDict()
    for r in records:
        split = SplitInfo("train", num_bytes=r.get("num_bytes", 0), num_examples=r["rows"])
        infos[r["config_name"]] = DatasetInfo(
            features=set_features(r),
            splits=SplitDict({"train": split}),
            download_size=sum(f["bytes"] for f in r.get("files", {}).values()),
            dataset_size=r.get("num_bytes", 0),
        )
    data = DatasetCardData()
    infos.to_dataset_card_data(data)
    described = data.to_dict()["dataset_info"]
    described = described if isinstance(described, list) else [described]
    old = old_head.get("dataset_info")
    names = {c["config_name"] for c in others}
    other_infos = [d for d in _named(old if isinstance(old, list) else [old]) if d["config_name"] in names]
    return {"configs": [*others, *configs], "dataset_info": [*other_infos, *described]}


def _dicts(value: object) -> list[PlainDict]:
    return [x for x in value if isinstance(x, dict)] if isinstance(value, list) else []


def _named(value: object) -> list[PlainDict]:
    """Configurations with a name, without which none can be loaded."""
    return [x for x in _dicts(value) if isinstance(x.get("config_name"), str)]


def _is_ours(config: PlainDict) -> bool:
    files = config.get("data_files")
    name = config.get("config_name")
    return isinstance(files, list) and files == [{"split": "train", "path": f"{name}/train-*.parquet"}]


def _grid_fit(r: PlainDict) -> tuple[bool, int]:
    """Sort key by how much of a set its grid shows."""
    return r["ipc"] > GRID_COLUMNS, abs(GRID_COLUMNS - r["ipc"])


def _natural(name: str) -> list[object]:
    """Sort key in which ipc2 comes before ipc10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _size(rows: int) -> str:
    return next((name for limit, name in SIZES if rows < limit), "n>1M")


def _class_lists(records: list[PlainDict]) -> list[tuple[list[str], list[str], bool]]:
    """Distinct lists of classes, their sets, and whether all are WordNet ids."""
    sets_by_classes: dict[tuple[str, ...], list[str]] = {}
    for r in records:
        sets_by_classes.setdefault(tuple(r["classes"]), []).append(r["config_name"])
    return [(list(k), v, all(re.fullmatch(r"n\d{8}", n) for n in k)) for k, v in sets_by_classes.items()]


def _statement(r: PlainDict) -> dict[str, str]:
    """Weights, labels and origin of a set in words."""
    method, labels, generate = (r.get(k) or {} for k in ("method", "labels", "generate"))
    kind = {
        "uniform": "all 1",
        "mass": "K n / N, whose mean over the prototypes of a class is 1",
        "sqrt": "sqrt(K n / N), at most 1 in the mean of a class",
    }.get(str(method.get("weights")), "as they came")
    scaled = {"class": ", scaled to mean 1 in the class", "sqrt_k": ", scaled to sum sqrt(K) in the class"}
    teachers = labels.get("teachers") or ([labels["by"]] if labels.get("by") else [])
    names = [str(t) for t in teachers] if isinstance(teachers, list) else []
    licenses = r.get("licenses") or {}
    return {
        "weights": kind + scaled.get(str(method.get("normalize")), ""),
        "teachers": ", ".join(names),
        "generator": str(generate.get("model") or (r.get("codec") or {}).get("path") or ""),
        **{f"{k}_license": str(licenses.get(k) or UNKNOWN).replace(UNKNOWN, "") for k in ("source", "generator")},
    }


def _is_row(row: PlainDict) -> bool:
    """Whether a row, which may come from the Hub, is valid."""
    texts, numbers = ("set", "ipc", "student", "labels", "protocol", "settings", "selected_on"), ("images", "seeds")
    shares = [row.get(f"{which}_{what}") for which in ("last", "best") for what in ("mean", "std")]
    return (
        all(isinstance(row.get(k), str) for k in texts)
        and all(type(row.get(k)) is int for k in numbers)
        and all((isinstance(x, int | float) and 0 <= x <= 1) or (x is None and i % 2) for i, x in enumerate(shares))
    )


def _evaluated(row: PlainDict) -> dict[str, str]:
    """A row of results as text."""

    def percent(which: str) -> str:
        mean, std = row[f"{which}_mean"], row.get(f"{which}_std")
        return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")

    chosen = row["selected_on"] != "none"
    return {
        **{k: str(row[k]) for k in ("set", "ipc", "images", "student", "labels", "protocol", "settings", "seeds")},
        "last": percent("last"),
        "best": f"{percent('best')} ({row['selected_on']})" if chosen else "",
    }
