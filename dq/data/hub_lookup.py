"""Look up a data set of the Hub before the `datasets` library does, which asks again for half a minute."""

from __future__ import annotations

import logging
from pathlib import Path

from dq.config.schema import SourceConfig
from dq.core.errors import InputError
from dq.core.files import suggest_folder
from dq.core.text import printable

log = logging.getLogger("dq")

TIMEOUT_S = 10.0  # of the one request


def check_hub_set(config: SourceConfig) -> None:
    """Look up the name of a Hub data set by one request that is not repeated.

    `NAME` alone may be a mistyped folder as well as a data set without owner, such as `mnist`; the message names both
    readings and folders of a similar name. A data set in the cache of `datasets` is opened without the Hub.

    Raises:
        InputError: if the Hub has no such data set, or is not reached and the cache lacks the data set.
    """
    reason, refused = _look_up(config)
    if not reason:
        if "/" not in config.path:
            log.info("there is no folder %s here; the Hub data set of that name is opened", printable(config.path))
        return
    if not refused and not config.streaming and _cached(config.path):
        log.info("note: the Hub is not reached (%s); %s is read from the cache of datasets", reason, config.path)
        return
    folder = suggest_folder(config.path)
    if "/" in config.path:
        raise InputError(
            f"{config.path} cannot be opened as a Hub data set ({reason}), and there is no such local folder{folder}; "
            "correct the name"
        )
    hub = f"the Hub has no data set of that name ({reason})" if refused else f"the Hub is not reached ({reason})"
    raise InputError(
        f"there is no folder {printable(config.path)}{folder}, and {hub}; correct the folder, or give a Hub data set "
        "as OWNER/NAME, such as uoft-cs/cifar10"
    )


def _look_up(config: SourceConfig) -> tuple[str, bool]:
    """Why the Hub does not give the data set, and whether it has answered so; empty if it has the data set."""
    import httpx2
    from huggingface_hub import HfApi, errors

    try:
        HfApi(library_name="dq").dataset_info(config.path, revision=config.revision, timeout=TIMEOUT_S)
    except errors.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set", False
    except errors.HFValidationError:
        return "it cannot name one", True
    except errors.GatedRepoError:
        return "it is gated; ask for access on its page, and log in with `hf auth login`", True
    except errors.RepositoryNotFoundError:
        return "not for this login at least", True
    except errors.RevisionNotFoundError:
        return f"it has no revision {config.revision!r}", True
    except (httpx2.TransportError, OSError) as e:  # also an answer of an overloaded server (HfHubHTTPError)
        response = getattr(e, "response", None)
        return (f"answer {response.status_code}" if response is not None else " ".join(str(e).split())[:100]), False
    return "", False


def _cached(path: str) -> bool:
    """Whether the cache of `datasets` has a data set of this name."""
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")).is_dir()
