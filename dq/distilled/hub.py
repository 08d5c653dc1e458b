"""Exchange with the Hugging Face Hub: distilled sets, pipelines and teachers.

A push is one commit on top of the state that was read, so that it replaces nothing else; a pull checks every name and
type before anything is written. Tokens appear in no message.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, get_args

from dq.config.reader import from_dict
from dq.config.schema import HubConfig
from dq.config.students import LabelKind
from dq.core.bounded_yaml import MAX_DEPTH
from dq.core.cards import UNKNOWN, own_text, public, split_card
from dq.core.errors import InputError, RunError
from dq.core.files import atomic_path, read_json
from dq.core.hub_client import Changes, Repo, Target, client, commit_to, open_repo, sentences
from dq.core.plain import PlainDict
from dq.core.text import check_name
from dq.distilled.card import EVALUATION, dataset_card, default_config, write_dataset_card
from dq.distilled.format import (
    GRID,
    PROVENANCE,
    SECTIONS,
    all_files,
    depth,
    file_facts,
    find_set,
    set_names,
    shard_files,
)
from dq.distilled.view_labels import FOLDER, Files, announce, labels_bytes, view_labels

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

EXTRAS = (EVALUATION, GRID)  # files of a set that may be missing
SHARD = re.compile(r"train-\d{5}-of-\d{5}\.parquet")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    only: list[str] | tuple[str, ...] | None = None,
    token: str | None = None,
    **settings: object,
) -> CommitInfo:
    """Push the sets of a folder in one commit.

    Each becomes one configuration of a data set repository, which is created if it does not exist. The files of a set
    that is pushed again are replaced; other sets of the repository stay, and the card is written from the records
    of all of them. Several processes may push to one repository at a time.

    Args:
        folder: `dataset/` of a run, or what `DistilledSet.save` wrote.
        repo_id: "name" in one's own namespace, or "owner/name".
        only: names of the sets; None: all.
        token: None takes HF_TOKEN or the login.
        **settings: fields of `HubConfig`.

    Returns:
        The commit, which is also its URL as text.

    Raises:
        InputError: for a wrong name, a missing permission, or an existing public repository where a private one was
            requested.
        RunError: if a set is damaged, or the upload broke off.
    """
    folder, options = Path(folder), from_dict(HubConfig, settings, "hub")
    names = _checked_names(folder, only)
    labels = view_labels(folder, names)
    announce(labels, pushed=options.view_labels)

    def changes(repo: Repo) -> Changes:
        return _changes(folder, names, options, repo, labels if options.view_labels else {})

    target = Target("dataset", repo_id, options.private, options.revision, options.create_pr)
    return commit_to(target, changes, message=options.commit_message or f"Add {', '.join(names)}", token=token)


def _checked_names(folder: Path, only: Sequence[str] | None) -> list[str]:
    """Names of the sets to push, whose records and files are intact."""
    available = set_names(folder)
    if not available:
        raise InputError(f"{folder} holds no distilled set; give the dataset/ folder of a run, or that of `save`")
    names = available if only is None else [find_set(folder, n)[1] for n in only]
    for name in names:
        record = read_json(folder / name / PROVENANCE)
        if "files" not in record:
            raise InputError(f"{folder / name} was written by an older version; write it again with `dq label`")
        check_record(public(record), name, str(folder))
        _check_shards(folder / name, record)
    return names


def _changes(folder: Path, names: list[str], options: HubConfig, repo: Repo, labels: Mapping[str, Files]) -> Changes:
    """Files to add to and delete from a repository."""
    records, evaluations = _remote_records(repo, replaced=names)
    files: dict[str, Path | bytes | None] = {}
    for name in names:
        old = records.get(name) or {}
        old_licenses = old.get("licenses") or {}
        licenses = {"source": options.source_license, "generator": options.generator_license}
        record = public(read_json(folder / name / PROVENANCE))
        record["licenses"] = {k: v or old_licenses.get(k) or UNKNOWN for k, v in licenses.items()}
        if name in labels:
            files |= labels[name]
            record[FOLDER] = {"bytes": labels_bytes(labels[name])}
        elif FOLDER in old and old.get("content") == record["content"]:
            record[FOLDER] = old[FOLDER]
        if FOLDER not in record or name in labels:  # those of other images, or replaced
            outdated = [f for f in repo.files if f.startswith(f"{name}/{FOLDER}/") and f not in files]
            files |= dict.fromkeys(outdated)
        records[name] = record
        files |= {f"{name}/{path.name}": path for path, _ in shard_files(folder / name, record)}
        for extra in EXTRAS:
            if (folder / name / extra).is_file():
                files[f"{name}/{extra}"] = folder / name / extra
        if f"{name}/{EVALUATION}" in files:
            evaluations[name] = read_json(folder / name / EVALUATION)
        elif (evaluations.get(name) or {}).get("content") != record["content"]:
            files[f"{name}/{EVALUATION}"] = None
        files[f"{name}/{PROVENANCE}"] = _json_bytes(record)
        files |= {old: None for old in _remote_shards(repo, name) if old not in files}
    text = repo.text("README.md") or own_text(folder / "README.md")
    split_card(text, f"README.md of {repo.name}")
    card = dataset_card(
        list(records.values()),
        evaluations,
        repo_id=repo.name,
        old=text,
        license=options.license,
        pretty_name=options.pretty_name,
    )
    return {**files, "README.md": card.encode()}


def _remote_records(repo: Repo, replaced: list[str]) -> tuple[dict[str, PlainDict], dict[str, PlainDict]]:
    """Records and evaluations of a repository's sets.

    A set that is replaced may be broken there.
    """
    records: dict[str, PlainDict] = {}
    evaluations: dict[str, PlainDict] = {}
    for name in repo.sets():
        with contextlib.suppress(*([InputError] if name in replaced else [])):
            records[name] = check_record(repo.json(f"{name}/{PROVENANCE}"), name, repo.name)
            if f"{name}/{EVALUATION}" in repo.files:
                evaluations[name] = repo.json(f"{name}/{EVALUATION}")
    return records, evaluations


def _remote_shards(repo: Repo, name: str) -> list[str]:
    """Paths of the Parquet files of a set in a repository."""
    paths = (PurePosixPath(file) for file in repo.files)
    return [str(p) for p in paths if p.parts[0] == name and len(p.parts) == 2 and SHARD.fullmatch(p.name)]


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode()


def download_set(
    repo_id: str,
    config_name: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Path, str]:
    """Fetch one set into the Hub's cache.

    Returns:
        The folder for `DistilledSet.load` and the name of the set.

    Raises:
        InputError: if the repository is not one of dq, or has no such set.
    """
    api = client(token)
    with sentences(repo_id, token, revision=revision):
        repo = open_repo(api, repo_id, "dataset", revision)
        names = _sets(repo)
        if config_name is None:
            config_name = default_config(split_card(repo.text("README.md"))[0], names)
        folder = _fetch_set(repo, config_name, cache_dir)
    return folder.parent, config_name


def _sets(repo: Repo) -> list[str]:
    names = repo.sets()
    if not names:
        raise InputError(
            f"{repo.name} holds no distilled set of dq; read it as any data set with `load_source({repo.name!r})` or "
            f"--data {repo.name}"
        )
    return names


def _fetch_set(repo: Repo, name: str, cache_dir: str | Path | None = None) -> Path:
    """Check the record of a set and fetch its files."""
    if name not in _sets(repo):
        raise InputError(f"{repo.name} has no set {name!r}; it has {', '.join(_sets(repo))}")
    record = check_record(repo.json(f"{name}/{PROVENANCE}"), name, repo.name)
    missing = [n for n in record["files"] if f"{name}/{n}" not in repo.files]
    if missing:
        raise InputError(f"{repo.name} lacks {name}/{missing[0]}, which its record names; push the set again")
    for extra in EXTRAS:
        if f"{name}/{extra}" in repo.files:
            repo.fetch(f"{name}/{extra}", cache_dir)
    for file in record["files"]:
        repo.fetch(f"{name}/{file}", cache_dir)
    return repo.fetch(f"{name}/{PROVENANCE}", cache_dir).parent


def _pull_set(repo: Repo, name: str, folder: Path) -> None:
    target = folder / name
    source = _fetch_set(repo, name)
    record = read_json(source / PROVENANCE)
    if (target / PROVENANCE).is_file():
        if read_json(target / PROVENANCE).get("content") != record["content"]:
            raise InputError(f"{target} holds another set of that name; choose another --output_dir")
        return
    _check_shards(source, record)
    # the record makes the set whole, so it comes last
    for file in [*record["files"], *EXTRAS, PROVENANCE]:
        if (source / file).is_file():
            _copy(source / file, target / file)


def _pull_card(repo: Repo, folder: Path) -> None:
    """Write the card of local sets, with its owner's text."""
    card = folder / "README.md"
    write_dataset_card(folder, old=None if card.is_file() else repo.text("README.md"))


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def check_record(record: PlainDict, name: str, where: str) -> PlainDict:
    """Return the record of a set if it is valid.

    Raises:
        InputError: if a name or type in it is not what `write_set` writes.
    """
    check_name(name, f"the name of a set of {where},")
    get, classes, files, grid = record.get, record.get("classes"), record.get("files"), record.get("grid") or {}
    is_valid = (
        get("config_name") == name
        and isinstance(get("content"), str)
        and all(_is_count(get(k)) for k in ("rows", "ipc", "num_bytes"))
        and isinstance(classes, list)
        and all(isinstance(c, str) for c in classes)
        and len(set(classes)) == len(classes)
        and all(isinstance(get(k, {}), (dict, type(None))) for k in SECTIONS)
        and depth(record) <= MAX_DEPTH
        and (get("pixels") is None or _whole_numbers(get("pixels")))
        and _whole_numbers(get("image_size"))
        and isinstance(files, dict)
        and bool(files)
        and all(SHARD.fullmatch(f) and isinstance(facts, dict) and facts for f, facts in files.items())
        and all(_is_count(facts.get(n)) for facts in files.values() for n in ("bytes", "rows"))
        and (get("label_kind") is None or get("label_kind") in get_args(LabelKind))
        and (get("step_size") is None or isinstance(get("step_size"), float))
        and isinstance(grid, dict)
        and all(_is_digest(facts.get("blake2b")) for facts in (*files.values(), grid) if facts)
    )
    if not is_valid:
        raise InputError(
            f"the record {name}/{PROVENANCE} of {where} is damaged or not of dq; make or push the set again"
        )
    return record


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[0-9a-f]{32}", value))


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_count(v) and v for v in value)


def _check_shards(folder: Path, record: PlainDict) -> None:
    """Check that the files of a set are intact.

    Raises:
        RunError: if one is missing or damaged.
    """
    for path, facts in all_files(folder, record):
        if not path.is_file() or (facts and file_facts(path)["blake2b"] != facts["blake2b"]):
            raise RunError(f"{path} is missing or damaged; make the set again with `dq label`, or pull it again")
