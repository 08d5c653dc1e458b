"""Cards: the README of a folder or repository of distilled sets, and of teachers and pipelines.

What is generated stands between two marks. What a user writes outside them, and keys of the YAML head that are not
ours, stay when the card is written anew. Nothing in a card names a place on this machine.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args

from dq.config.students import Baseline
from dq.core.cards import public
from dq.core.files import read_json, read_jsonl, write_json
from dq.distilled.card import EVALUATION, write_dataset_card
from dq.distilled.format import PROVENANCE

log = logging.getLogger("dq")


# --- evaluation ---------------------------------------------------------------------------------------------------


def describe_evaluation(run_folder: str | Path) -> list[Path]:
    """Write `evaluation.json` beside the provenance of every set of a run that students were trained on: its rows of
    the table and those of the baselines at equal ipc. What was measured on other content is left aside.

    Returns:
        The files that were written; the README of the sets follows them.
    """
    from dq.evaluation.results import summarize

    run_folder = Path(run_folder)
    log, base = run_folder / "eval" / "trainings.jsonl", run_folder / "dataset"
    trainings = read_jsonl(log)
    written = []
    for path in sorted(base.glob(f"*/{PROVENANCE}")):
        record = read_json(path)
        # two methods may make the same set: at one image per class all weights are 1
        name = (record.get("method") or {}).get("name")
        own = [t for t in trainings if t["data"].get("set_digest") == record["content"] and t["set"] == name]
        ipcs = {t["ipc"] for t in own} | {"full"}
        beside = [t for t in trainings if t["set"] in get_args(Baseline) and t["ipc"] in ipcs]
        if own:
            rows = [{**row.record(), "seed_list": list(row.seeds)} for row in summarize([*own, *beside])]
            write_json(path.parent / EVALUATION, {"content": record["content"], "rows": public(rows)})
            written.append(path.parent / EVALUATION)
    if written:
        write_dataset_card(base)
    return written
