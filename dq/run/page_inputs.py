"""What a run's page was made from, so that it is not made twice."""

from __future__ import annotations

from pathlib import Path

from dq.config.reader import dump_config
from dq.core.files import is_done, read_json, write_json
from dq.core.seeds import digest_of, digest_of_file
from dq.core.version import __version__
from dq.run.folder import Run

RECORD = ".report.json"
TEXT = (".json", ".jsonl", ".csv")  # files that a command writes again with the same content
OUTPUTS = ("report.html", "config.yaml", "metrics.jsonl", "figures", "logs", "bad_images.txt")


def is_current(run: Run) -> bool:
    """Whether `report.html` and its figures are there, made from what the folder holds now."""
    record = run.folder / RECORD
    if not is_done(record):
        return False
    made = read_json(record)
    return made["files"] == _outputs(run.folder) and made["inputs"] == _inputs(run)


def note_inputs(run: Run) -> None:
    """Record what the page has just been made from."""
    write_json(run.folder / RECORD, {"inputs": _inputs(run), "files": _outputs(run.folder)})


def _inputs(run: Run) -> str:
    """Digest of settings, data and files of the folder: text by content, others by size and time of change."""
    facts: list[object] = [__version__, dump_config(run.config), run.source.fingerprint, str(run.source.origin)]
    for file in sorted(run.folder.rglob("*")):
        parts = file.relative_to(run.folder).parts
        if file.is_file() and parts[0] not in OUTPUTS and not any(part.startswith(".") for part in parts):
            if file.suffix in TEXT:
                facts.append([parts, digest_of_file(file)])
            elif file.name != "README.md":
                facts.append([parts, file.stat().st_size, file.stat().st_mtime_ns])
    return digest_of(facts)


def _outputs(folder: Path) -> list[list[object]]:
    files = [folder / "report.html", *sorted((folder / "figures").glob("*"))]
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
