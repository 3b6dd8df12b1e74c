"""Folders and model repositories: whether they can be reached, at which commit, and which files they hold."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger(__name__)

_TIMEOUT = 10.0  # seconds that one request to the Hub may take
_CONFIGS = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Listing:
    """What a folder or a commit of a repository holds.

    Args:
        commit (`str`, *optional*): Of a repository; None for a folder.
        files (`frozenset[str]`): Names relative to the root.
        cached (`bool`): The Hub cannot be reached, and these are the files in the local cache.
    """

    commit: str | None
    files: frozenset[str]
    cached: bool = False


def look_up(source: str, revision: str | None = None) -> Listing:
    """Return the files of a local folder or a model repository, with one request to the Hub at most.

    Without a connection, the local cache of the Hub answers. A request is not repeated, so that the absence of a network is
    reported within seconds.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or it is out of reach; the message says which, and what to do.
    """
    if not source:
        raise FileNotFoundError("The name of a checkpoint is empty: give a folder or a repository.")
    folder = Path(source)
    try:
        if folder.is_dir():
            return Listing(None, frozenset(path.name for path in folder.iterdir()))
        exists = folder.exists()
    except OSError as error:
        raise FileNotFoundError(f"{source} cannot be read: {error.strerror}. Check its name and its permissions.") from error
    if exists:
        raise FileNotFoundError(f"{source} is a file, where the folder of a checkpoint is expected.")
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return _look_up_commit(source, revision)
    return _look_up(source, revision)


def _look_up(source: str, revision: str | None) -> Listing:
    import huggingface_hub
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    looks_like_a_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
    if looks_like_a_path:
        raise FileNotFoundError(f"There is no folder {source!r}. Check the path.")
    try:
        huggingface_hub.utils.validate_repo_id(source)
    except HFValidationError as error:
        raise FileNotFoundError(f"{source!r} is neither a folder here nor the name of a model repository.") from error
    if constants.HF_HUB_OFFLINE:
        return _cached(source, revision, "HF_HUB_OFFLINE is set. Unset it to fetch the model", None)
    try:
        info = HfApi().model_info(source, revision=revision, timeout=_TIMEOUT)
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"The model repository {source!r} has no revision {revision or 'main'!r}.") from error
    except Exception as error:  # the types of a connection's errors depend on the version of huggingface_hub
        return _cached(source, revision, _reason(error), error)
    return Listing(info.sha, frozenset(one.rfilename for one in info.siblings or []))


_look_up_commit = lru_cache(maxsize=64)(_look_up)  # what a commit holds does not change


def _reason(error: Exception) -> str:
    """Return why the Hub did not answer, and what to do, without a full stop."""
    from huggingface_hub import constants, get_token

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        key = "the token that is set does not open it" if get_token() else "no token is set"
        return f"it does not exist, or it is private or gated and {key}. Check the name; log in with `hf auth login`, or set HF_TOKEN"
    lines = str(error).strip().splitlines()
    said = lines[0].rstrip(".") if lines else type(error).__name__
    return f"{constants.ENDPOINT} cannot be reached ({said}). Check the network, or give a local folder"


def _cached(source: str, revision: str | None, reason: str, error: Exception | None) -> Listing:
    """Return what the local cache holds of a repository."""
    from huggingface_hub import try_to_load_from_cache

    for name in _CONFIGS:
        path = try_to_load_from_cache(source, name, revision=revision)
        if isinstance(path, str):
            snapshot = Path(path).parent
            if error is not None:
                logger.warning("%s: %s; the copy in the cache is used.", source, reason.split(". ")[0])
            files = frozenset(found.relative_to(snapshot).as_posix() for found in snapshot.rglob("*") if not found.is_dir())
            return Listing(snapshot.name, files, cached=True)
    raise FileNotFoundError(f"{source!r} is neither a folder here nor a model repository within reach: {reason}.") from error


def look_up_dataset(name: str, revision: str | None = None) -> Listing | None:
    """Return what a dataset repository holds, with one request; None without a connection, when only a cache can have it.

    Raises:
        FileNotFoundError: If there is no such repository or revision, or it is private or gated.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        info = HfApi().dataset_info(name, revision=revision, timeout=_TIMEOUT)
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a file or folder here nor the name of a dataset repository.") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"The dataset repository {name!r} has no revision {revision!r}.") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            raise FileNotFoundError(
                f"{name!r} is neither a file or folder here nor a dataset of the Hub: {_reason(error)}."
            ) from error
        return None
    except Exception:  # the types of a connection's errors depend on the version of huggingface_hub
        return None
    return Listing(info.sha, frozenset(one.rfilename for one in info.siblings or []))


@contextmanager
def reached(listing: Listing) -> Iterator[None]:
    """Load files of a repository meanwhile; of one that is only in the cache, without a request per file that would time out."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or listing.cached
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
