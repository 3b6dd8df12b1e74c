"""Repositories: whether they can be reached, at which commit, which files they hold, and where a training set comes from."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def pinned_revision(source: str | None, revision: str | None = None) -> str | None:
    """Return the commit of a model repository that `revision` stands for now; `revision` itself for a folder.

    Everything of a checkpoint is then loaded at this one commit, which an index records.

    Args:
        source (`str`, *optional*): A folder or model repository; None for a model in memory.

    Raises:
        FileNotFoundError: If the repository does not exist, or is out of reach and not in the local cache.
    """
    if source is None or Path(source).is_dir():
        return revision
    return look_up(source, revision).commit or revision


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


_LICENCE_KEYS = ("license", "license_name", "license_link")


def describe_source(dataset: Dataset) -> dict[str, Any]:
    """Return what is known of where a dataset comes from, as `{"source": {...}}`; nothing where nothing is."""
    place = _repository(Path(file["filename"]) for file in dataset.cache_files)
    known = {**place, **({"license": dataset.info.license} if dataset.info.license else {})}
    return {"source": known} if known else {}


def _repository(files: Iterable[Path]) -> dict[str, str]:
    """Return the repository and commit that the cached files of a dataset were made from.

    A Dataset does not say, but `load_dataset` keeps its files under .../<namespace>___<name>/<config>/<version>/<commit>/, with a name
    of its own spelling, and what it downloaded under datasets--<namespace>--<name>/snapshots/<commit>.
    """
    from huggingface_hub import constants

    for file in files:
        commit = file.parent.name
        if not (re.fullmatch("[0-9a-f]{40}", commit) and "___" in str(file)):
            continue
        for snapshot in Path(constants.HF_HUB_CACHE).glob(f"datasets--*/snapshots/{commit}"):
            return {"repository": "/".join(snapshot.parts[-3].split("--")[1:]), "revision": commit}
    return {}


def licence_of_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the licence that a dataset's own card names, as keys for another card; nothing where there is none.

    Args:
        source (`Mapping`): From [`describe_source`], without its outer key.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if source.get("license"):
        return {"license": source["license"]}
    if "repository" not in source:
        return {}
    try:
        card = hf_hub_download(source["repository"], "README.md", repo_type="dataset", revision=source["revision"])
    except (HfHubHTTPError, LocalEntryNotFoundError):  # no card, gone, or out of reach: the caller asks for one
        return {}
    return licence_in(Path(card).read_text(encoding="utf-8"))


def licence_in(card: str) -> dict[str, Any]:
    """Return the licence that a card's YAML names, with its name and link if it is one of its own; nothing where there is none."""
    from huggingface_hub import DatasetCard

    if not card.startswith("---"):
        return {}
    values = DatasetCard(card, ignore_metadata_errors=True).data.to_dict()
    return {key: values[key] for key in _LICENCE_KEYS if values.get(key)}
