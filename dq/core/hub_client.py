"""Repositories of the Hugging Face Hub: state, commits, and errors as sentences."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from dq.core.errors import InputError, RunError
from dq.core.files import parse_json
from dq.core.plain import PlainDict
from dq.core.redaction import Redaction, redact

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

log = logging.getLogger("dq")

ATTEMPTS = 5  # at a commit while others commit too
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0  # upper bounds of the waits between them
Changes = Mapping[str, Path | bytes | None]  # content by path in the repository; None deletes


# --- tokens and errors --------------------------------------------------------------------------------------------


def client(token: str | None) -> HfApi:
    """A client whose library logs no token."""
    import huggingface_hub
    from huggingface_hub.utils import logging as hub_logging

    for handler in hub_logging.get_logger("huggingface_hub").handlers:
        handler.filters[:] = [f for f in handler.filters if not isinstance(f, Redaction)]
        handler.addFilter(Redaction(token or huggingface_hub.get_token()))
    return huggingface_hub.HfApi(token=token or None, library_name="dq")


@contextlib.contextmanager
def sentences(repo_id: str, token: str | None, *, revision: str | None = None, push: bool = False) -> Iterator[None]:
    """Turn errors of the Hub's client into one sentence without the token."""
    import httpx2
    from huggingface_hub import errors, get_token

    to = f"push to {repo_id}" if push else f"read {repo_id}"
    retry = (
        "; the repository is as it was: give the same command again, and what has arrived is not sent again"
        if push
        else "; give the same command again, what has arrived is kept"
    )
    error: Exception
    try:
        yield
        return
    except errors.HFValidationError:
        error = InputError(
            f"{repo_id!r} cannot name a repository; give NAME or OWNER/NAME of letters, digits and _ . -"
        )
    except errors.GatedRepoError:
        error = InputError(f"{repo_id} is gated; ask for access on its page, and log in with `hf auth login`")
    except errors.RepositoryNotFoundError:
        error = InputError(
            f"the Hub has no repository {repo_id}, or this token may not see it; check the name, and log in with "
            "`hf auth login` or give --token"
        )
    except errors.RevisionNotFoundError:
        error = InputError(f"{repo_id} has no revision {revision!r}; give a branch, tag or commit that it has")
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        error = RunError(f"cannot {to}: the Hub is not reached (is HF_HUB_OFFLINE set?)")
    except (InputError, RunError):
        raise
    # the client raises a RuntimeError from an upload, and connection errors of two kinds
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as e:
        cause: BaseException = e
        while not isinstance(cause, httpx2.HTTPError) and cause.__cause__ is not None:
            cause = cause.__cause__
        status = getattr(getattr(cause, "response", None), "status_code", None)
        detail = " ".join(str(cause).split()) or type(cause).__name__
        detail = re.sub(r"\?[^\s'\"]+", "", detail)  # signatures of upload links
        detail = redact(redact(detail, token), get_token())[:300].rstrip(".:")
        if status in (401, 403):
            what = "write to" if push else "read"
            error = InputError(
                f"the token may not {what} {repo_id} ({status}); log in with `hf auth login` as someone who may, or "
                "give --token"
            )
        elif status is None and isinstance(cause, (httpx2.TransportError, ConnectionError)):
            error = RunError(
                f"cannot {to}: the connection to the Hub failed ({type(cause).__name__}: {detail}){retry}"
            )
        else:
            error = RunError(f"cannot {to}: {detail}{retry}")
    # not "from e": a traceback would show what the server said, and it may have said the token
    raise error from None


# --- repositories -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Repo:
    """One state of a repository, whose small files can be read."""

    api: HfApi
    name: str
    kind: str  # "dataset" or "model"
    sha: str
    files: tuple[str, ...]

    def sets(self) -> list[str]:
        """Names of the distilled sets in it."""
        paths = [PurePosixPath(f) for f in self.files]
        return sorted(f.parts[0] for f in paths if len(f.parts) == 2 and f.name == "provenance.json")

    def fetch(self, file: str, cache_dir: str | Path | None = None) -> Path:
        return Path(
            self.api.hf_hub_download(self.name, file, repo_type=self.kind, revision=self.sha, cache_dir=cache_dir)
        )

    def text(self, file: str) -> str:
        return self.fetch(file).read_text(errors="replace") if file in self.files else ""

    def json(self, file: str) -> PlainDict:
        try:
            record = parse_json(self.text(file))
        except (RecursionError, ValueError):
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{file} of {self.name} is not a record of dq; delete it on the Hub, or push elsewhere")
        return record


def open_repo(api: HfApi, repo_id: str, kind: str, revision: str | None) -> Repo:
    """The present state of a repository; its file names are looked at before they are used.

    Raises:
        InputError: if a name would leave the folder that it is written to.
    """
    info = api.repo_info(repo_id, repo_type=kind, revision=revision)
    files = tuple(s.rfilename for s in getattr(info, "siblings", None) or ())
    for name in files:
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or ":" in parts[0] or {"", ".", ".."} & set(parts):
            raise InputError(
                f"{repo_id} lists a file {name!r}, which would leave its folder; nothing was read from it"
            )
    return Repo(api, info.id, kind, str(info.sha), files)


def backoff_seconds(attempt: int) -> float:
    """Exponential backoff with full jitter: uniform in [0, min(longest, first 2^attempt)], of the system's entropy.

    `http_backoff` of huggingface_hub repeats the same request without jitter; here every attempt is a commit on top of
    another state, and those who collided must not meet again.
    """
    return random.SystemRandom().uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt))


@dataclasses.dataclass(frozen=True)
class Target:
    """The repository that a commit goes to."""

    kind: str  # "dataset" or "model"
    repo_id: str  # name, or owner/name
    private: bool | None = None  # of a new repository; None: the owner's default
    revision: str | None = None  # branch; None: main
    create_pr: bool = False


def commit_to(
    target: Target, changes: Callable[[Repo], Changes], *, message: str, token: str | None = None
) -> CommitInfo:
    """Create the repository unless it exists, and commit to it.

    Args:
        target: where to.
        changes: content by path for a state of the repository; called again when another commit came first.
        message: first line of the commit.
        token: None takes HF_TOKEN or the login.
    """
    from huggingface_hub import errors

    if target.create_pr and target.revision not in (None, "main"):
        raise InputError("a pull request is opened against main; leave --revision out, or --create_pr")
    api = client(token)
    with sentences(target.repo_id, token, revision=target.revision, push=True):
        target = _create_repo(api, target)
        for attempt in range(ATTEMPTS - 1):
            try:
                return _commit(api, target, changes, message)
            except errors.HfHubHTTPError as e:
                if e.response is None or e.response.status_code not in (409, 412):
                    raise
                wait = backoff_seconds(attempt)
                log.info("%s has changed meanwhile; trying again in %.1f s", target.repo_id, wait)
                time.sleep(wait)
        return _commit(api, target, changes, message)
    raise AssertionError("unreachable")


def _create_repo(api: HfApi, target: Target) -> Target:
    """Create the repository and the branch unless they exist.

    Returns the target with the full name of the repository.
    """
    kind, private = target.kind, target.private
    repo_id = api.create_repo(target.repo_id, repo_type=kind, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id, repo_type=kind).private:
        raise InputError(
            f"{repo_id} exists already and is public; make it private in its settings, or choose another repo_id"
        )
    if target.revision:
        api.create_branch(repo_id, branch=target.revision, repo_type=kind, exist_ok=True)
    return dataclasses.replace(target, repo_id=repo_id)


def _commit(api: HfApi, target: Target, changes: Callable[[Repo], Changes], message: str) -> CommitInfo:
    """Commit on top of the present state of a repository."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo = open_repo(api, target.repo_id, target.kind, target.revision)
    content = changes(repo)
    added = [
        CommitOperationAdd(path, source if isinstance(source, bytes) else str(source))
        for path, source in content.items()
        if source is not None
    ]
    deleted = [CommitOperationDelete(p) for p, source in content.items() if source is None and p in repo.files]
    return api.create_commit(
        target.repo_id,
        [*added, *deleted],
        commit_message=message,
        repo_type=target.kind,
        revision=target.revision,
        create_pr=target.create_pr,
        parent_commit=repo.sha,
    )
