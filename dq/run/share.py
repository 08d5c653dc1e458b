"""Exchange of distilled sets, pipelines and teachers with the Hugging Face Hub.

A push is one commit on top of the state that was read, so that it replaces what it means to and nothing else; a pull
checks every name and type before anything is written. Tokens appear in no message.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq.config.reader import from_dict
from dq.config.schema import HubConfig
from dq.core.cards import public
from dq.core.errors import InputError
from dq.core.files import read_json, suggest_folder
from dq.core.hub_client import Changes, Repo, Target, client, commit_to, open_repo, sentences
from dq.diffusion.card import pipeline_card
from dq.diffusion.generator import LatentGenerator
from dq.distilled.hub import _copy, _json_bytes, _pull_card, _pull_set, _sets, push_folder
from dq.networks.card import teacher_card
from dq.run.stages.evaluate import describe_evaluation

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

# What a model is made of. Pickles and code are neither sent nor fetched.
MODEL_FILES = (".safetensors", ".json", ".txt", ".model", ".md")
DESCRIBED = (
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    "training.json",
    "quality.json",
    "teacher.json",
)


# --- pushing ------------------------------------------------------------------------------------------------------


def push(
    folder: str | Path,
    repo_id: str,
    *,
    only: list[str] | tuple[str, ...] | None = None,
    token: str | None = None,
    **settings: Any,
) -> CommitInfo:
    """Push the content of a folder: sets of a run, sets alone, or a model.

    Args, Returns, Raises: see `push_folder`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}{suggest_folder(folder)}; give that of a run, of its dataset/, or of a model"
        )
    if model_kind(folder):
        if only:
            raise InputError(f"{folder} holds a model and no sets; name no sets")
        return push_model(folder, repo_id, token=token, **settings)
    if (folder / "dataset").is_dir():
        describe_evaluation(folder)
        folder = folder / "dataset"
    return push_folder(folder, repo_id, only=only, token=token, **settings)


def push_model(
    model: str | Path | LatentGenerator,
    repo_id: str,
    *,
    token: str | None = None,
    variant: str | None = None,
    **settings: object,
) -> CommitInfo:
    """Push a pipeline, a codec or a teacher with its card, in one commit.

    `model` may be the folder of any of them. Files other than weights and settings are left out.

    Args:
        model: a pipeline, or the folder of a model.
        repo_id: "name" or "owner/name" of the repository.
        token: None takes HF_TOKEN or the login.
        variant: of the weights, such as "fp16": those of other variants stay in the repository.
        **settings: fields of `HubConfig`.

    Other arguments, returns, raises: see `push_folder`.
    """
    options = from_dict(HubConfig, settings, "hub")
    if not isinstance(model, (str, Path)):
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch, variant=variant)
            return push_model(scratch, repo_id, token=token, variant=variant, **settings)
    folder = Path(model)
    kind = model_kind(folder)
    if kind is None:
        raise InputError(
            f"{folder} holds no pipeline, codec or teacher that could be pushed; give a folder with "
            "model_index.json, config.json or teacher.json beside its weights"
        )
    files = _model_files(folder, kind)

    def changes(repo: Repo) -> Changes:
        card = _model_card(folder, kind, repo, options.license)
        return {**files, **dict.fromkeys(_stale_weights(repo, files, variant)), "README.md": card.encode()}

    target = Target("model", repo_id, options.private, options.revision, options.create_pr)
    return commit_to(target, changes, message=options.commit_message or f"Add {kind}", token=token)


def _model_files(folder: Path, kind: str) -> dict[str, Path | bytes | None]:
    """Weights and settings of a model by path; records lose what is not public."""
    files: dict[str, Path | bytes | None] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix not in MODEL_FILES or name == "README.md" or "/." in f"/{name}" or "checkpoint" in path.name:
            continue
        if kind == "teacher" and name not in ("model.safetensors", "teacher.json"):
            continue
        files[name] = path
        if path.name in DESCRIBED and public(record := read_json(path)) != record:
            files[name] = _json_bytes(public(record))
    return files


def _model_card(folder: Path, kind: str, repo: Repo, license: str | None) -> str:
    old = repo.text("README.md")
    if kind == "teacher":
        return teacher_card(read_json(folder / "teacher.json"), repo_id=repo.name, old=old, license=license)
    return pipeline_card(folder, repo_id=repo.name, old=old, license=license)


def _stale_weights(repo: Repo, files: Changes, variant: str | None) -> list[str]:
    """Weights in the repository under other names, or in another number of files, than those pushed."""
    stale = [f for f in repo.files if f.endswith((".safetensors", ".safetensors.index.json")) and f not in files]
    if variant is not None:  # model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
        stale = [f for f in stale if re.search(rf"\.{re.escape(variant)}[.-]", Path(f).name)]
    return stale


def model_kind(folder: Path) -> str | None:
    """Name the kind of a model by what its folder holds: "teacher", "pipeline" or "codec"."""
    if (folder / "teacher.json").is_file():
        return "teacher"
    if (folder / "model_index.json").is_file():
        return "pipeline"
    return "codec" if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def check_token(token: str | None = None) -> None:
    """Make sure that there is a token which the Hub knows, before hours of work.

    Raises:
        InputError: if there is none.
    """
    from huggingface_hub import get_token

    if not (token or get_token()):
        raise InputError("pushing needs a token; log in with `hf auth login`, or give --token")
    with sentences("the Hub", token, push=True):
        client(token).whoami()


def pull(
    repo_id: str,
    folder: str | Path,
    config_name: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Copy the sets of a repository, or a model, to a folder.

    Files that exist already are left alone.

    Returns:
        The folder: for sets `load_dataset(folder, name)` and `DistilledSet.load(folder, name)` open it, for a pipeline
        `DistillPipeline.from_pretrained`, for a teacher `TeacherConfig(path=...)`.

    Raises:
        InputError: if the repository is neither, a name in it leaves the folder, or the folder holds something else.
        RunError: if a file arrives damaged.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    api, folder = client(token), Path(folder)
    with sentences(repo_id, token, revision=revision):
        try:
            repo = open_repo(api, repo_id, "dataset", revision)
        except RepositoryNotFoundError:
            repo = open_repo(api, repo_id, "model", revision)
        if repo.kind == "model":
            if config_name is not None:
                raise InputError(f"{repo_id} is a model, which has no configuration {config_name!r}; leave --name out")
            return _pull_model(repo, folder)
        names = _sets(repo) if config_name is None else [config_name]
        for name in names:
            _pull_set(repo, name, folder)
        _pull_card(repo, folder)
    return folder


def _pull_model(repo: Repo, folder: Path) -> Path:
    markers = ("teacher.json", "model_index.json", "config.json")
    files = [f for f in repo.files if f.endswith(MODEL_FILES) and not f.startswith(".")]
    if not any(m in files for m in markers) or not any(f.endswith(".safetensors") for f in files):
        raise InputError(f"{repo.name} holds no pipeline, codec or teacher in safetensors that dq could read")
    for file in sorted(files, key=lambda f: (f in markers, f)):
        source, target = repo.fetch(file), folder / file
        if target.is_file() and target.read_bytes() != source.read_bytes():
            raise InputError(f"{target} is another file than that of {repo.name}; choose another --output_dir")
        if not target.is_file():
            _copy(source, target)
    return folder
