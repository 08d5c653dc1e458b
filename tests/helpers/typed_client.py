"""A program that uses the public names of `dq` with types; which a test checks by mypy."""

from pathlib import Path

from dq import DistilledSet, evaluate, list_protocols, load_set, load_source


def largest_class(folder: Path) -> int:
    distilled: DistilledSet = load_set(folder)
    return distilled.ipc


def protocols() -> list[str]:
    return [str(name) for name in list_protocols()]


def accuracy(folder: Path, images: str) -> float:
    results = evaluate(load_set(folder), load_source(images), protocol="classic", n_seeds=1)
    return results.rows[0].last[0]


def wrong(folder: Path) -> str:
    return load_set(folder).ipc  # an int
