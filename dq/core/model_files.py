"""Files of a model in a local folder, on the Hub, or in the Hub's cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq.core.errors import InputError
from dq.core.files import read_json, suggest_folder
from dq.core.plain import PlainDict

log = logging.getLogger("dq")

TIMEOUT_S = 10.0  # of the one request that tells whether the Hub is reached
CACHED = ("model_index.json", "config.json", "vae/config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model."""

    path: str  # local folder or Hub id
    revision: str | None
    local: bool  # a folder of this machine
    cached: bool = False  # of the Hub's cache alone, because the Hub is not reached
    token: str | bool | None = None
    cache_dir: str | Path | None = None

    def file(self, name: str) -> Path | None:
        """The file `name`, relative to the model; None if the model lacks it."""
        if self.local:
            path = Path(self.path) / name
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(self.path, name, **self.options))
        except EntryNotFoundError:  # LocalEntryNotFoundError too
            return None

    def json(self, name: str) -> PlainDict | None:
        """The record in the file `name`; None if the model lacks it.

        Raises:
            InputError: if it is not a JSON object.
        """
        file = self.file(name)
        if file is None:
            return None
        record = read_json(file)
        if not isinstance(record, dict):
            raise InputError(f"{name} of {self.path} is not a JSON object; get the model again")
        return record

    @property
    def options(self) -> PlainDict:
        """Keyword arguments of `from_pretrained` that read these files and no others."""
        where = {"token": self.token, "cache_dir": self.cache_dir}
        return {"revision": self.revision, "local_files_only": self.local or self.cached, **where}


def open_model(
    path: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> ModelFiles:
    """Look up a model folder or a Hub id with one request that is not repeated.

    A model in the Hub's cache is opened without the Hub.

    Raises:
        InputError: if there is neither a folder nor a repository of that name, or the Hub is not reached and its cache
            lacks the model.
    """
    folder = Path(path)
    if folder.is_dir():
        return ModelFiles(str(path), None, local=True)
    if folder.exists():
        raise InputError(f"{path} is a file, not a model folder; give the folder that has its config.json")
    missing = f"there is no model folder {path}{suggest_folder(folder)}"
    if folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
        raise InputError(f"{missing}; give a folder with config.json and safetensors, or a Hub id")
    reason = "local_files_only=True" if local_files_only else _unreachable(str(path), revision, token, missing)
    files = ModelFiles(str(path), revision, False, bool(reason), token, cache_dir)
    if not reason:
        return files
    from huggingface_hub import try_to_load_from_cache

    # a string; None for a file that is not there, an object for one that the repository is known to lack
    where: Any = {"cache_dir": cache_dir, "revision": revision}
    if any(isinstance(try_to_load_from_cache(str(path), name, **where), str) for name in CACHED):
        log.info("note: the Hub is not reached (%s); %s is read from its cache", reason, path)
        return files
    raise InputError(
        f"{missing}, and the Hub is not reached ({reason}); correct the path, or give a Hub id with a connection"
    )


def _unreachable(repo_id: str, revision: str | None, token: str | bool | None, missing: str) -> str:
    """Why the Hub is not reached; empty if it has the repository.

    Raises:
        InputError: that begins with `missing`, if the Hub answers and does not give the repository.
    """
    import httpx2
    from huggingface_hub import HfApi, errors

    try:
        HfApi(token=token, library_name="dq").model_info(repo_id, revision=revision, timeout=TIMEOUT_S)
    except errors.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except errors.HFValidationError:
        raise InputError(f"{missing}, and that cannot name a repository of the Hub; correct the path") from None
    except errors.GatedRepoError:
        raise InputError(f"{repo_id} is gated; ask for access on its page, and log in with `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{missing}, and the Hub has no model of that name, or not for this login; check the spelling, or log in "
            "with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repo_id} has no revision {revision!r}; give a branch, tag or commit that it has") from None
    except (httpx2.TransportError, OSError) as e:  # also an answer of an overloaded server (HfHubHTTPError)
        response = getattr(e, "response", None)
        return f"answer {response.status_code}" if response is not None else " ".join(str(e).split())[:100]
    return ""
