"""Repositories: reachability, commits, lists of files, and the origin of a training set."""

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
    """Return the commit of a model repository to which `revision` points now; `revision` itself for a folder.

    All files of a checkpoint are then loaded from this commit, and an index records it.

    Args:
        source (`str`, *optional*): A folder or model repository; None for a model in memory.

    Raises:
        FileNotFoundError: If the repository does not exist, or if it cannot be reached and is not in the local cache.
    """
    if source is None or Path(source).is_dir():
        return revision
    return look_up(source, revision).commit or revision


logger = logging.getLogger(__name__)

_TIMEOUT = 10.0  # timeout of one request to the Hub, in seconds
_CONFIGS = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Listing:
    """The files of a folder, or of a commit of a repository.

    Args:
        commit (`str`, *optional*): The commit of a repository; None for a folder.
        files (`frozenset[str]`): Names relative to the root.
        cached (`bool`): Whether the Hub cannot be reached, so that these are the files in the local cache.
    """

    commit: str | None
    files: frozenset[str]
    cached: bool = False


def look_up(source: str, revision: str | None = None) -> Listing:
    """Return the files of a local folder or a model repository, with at most one request to the Hub.

    Without a connection, the local cache of the Hub is used. Requests are not repeated, so a missing network is reported within
    seconds.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or if it cannot be reached. The message says which, and what to do.
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


_look_up_commit = lru_cache(maxsize=64)(_look_up)  # the files of a commit do not change


def _reason(error: Exception) -> str:
    """Return the reason of a failed request to the Hub and advice, without a full stop."""
    from huggingface_hub import constants, get_token

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        key = "the token that is set does not open it" if get_token() else "no token is set"
        return f"it does not exist, or it is private or gated and {key}. Check the name; log in with `hf auth login`, or set HF_TOKEN"
    lines = str(error).strip().splitlines()
    said = lines[0].rstrip(".") if lines else type(error).__name__
    return f"{constants.ENDPOINT} cannot be reached ({said}). Check the network, or give a local folder"


def _cached(source: str, revision: str | None, reason: str, error: Exception | None) -> Listing:
    """Return the files of a repository in the local cache."""
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
    """Return the files of a dataset repository, with one request. Return None without a connection; only a cache can have them then.

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
    """Load files of a repository in the block. If it is only in the cache, send no requests, which would time out for each file."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or listing.cached
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


_LICENCE_KEYS = ("license", "license_name", "license_link")


def describe_source(dataset: Dataset) -> dict[str, Any]:
    """Return the known origin of a dataset as `{"source": {...}}`; an empty dict if it is unknown.

    It has `in_order` if row i is row i of the split on the Hub.
    """
    known: dict[str, Any] = {**_repository(Path(file["filename"]) for file in dataset.cache_files)}
    if known and chosen_rows(dataset) is None and has_whole_split(dataset):
        known["in_order"] = True
    if dataset.info.license:
        known["license"] = dataset.info.license
    return {"source": known} if known else {}


def chosen_rows(dataset: Dataset) -> Any:
    """Return the places of a dataset's rows in the table under it, as an Arrow column; None if they are all of the table, in its order.

    datasets has no public name for it.
    """
    return None if dataset._indices is None else dataset._indices.column(0)


def has_whole_split(dataset: Dataset) -> bool:
    """Return whether the table under a dataset's rows is a split of a repository as it was downloaded, and not a part of it, or rows that
    were made from it, perhaps in another order."""
    split = (dataset.info.splits or {}).get(str(dataset.split))
    made_here = any(Path(file["filename"]).name.startswith("cache-") for file in dataset.cache_files)
    return split is not None and not made_here and split.num_examples == dataset.data.num_rows


def _repository(files: Iterable[Path]) -> dict[str, str]:
    """Return the repository and commit from which the cached files of a dataset were created.

    A Dataset does not record them. But `load_dataset` stores its files under .../<namespace>___<name>/<config>/<version>/<commit>/, with a
    changed spelling of the name, and downloads under datasets--<namespace>--<name>/snapshots/<commit>.
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
    """Return the licence in a dataset's own card, as keys for another card; an empty dict if there is none.

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
    except (HfHubHTTPError, LocalEntryNotFoundError):  # no card, deleted or unreachable: the caller asks for a licence
        return {}
    return licence_in(Path(card).read_text(encoding="utf-8"))


def licence_in(card: str) -> dict[str, Any]:
    """Return the licence in a card's YAML, with name and link for a custom licence; an empty dict if there is none."""
    from huggingface_hub import DatasetCard

    if not card.startswith("---"):
        return {}
    values = DatasetCard(card, ignore_metadata_errors=True).data.to_dict()
    return {key: values[key] for key in _LICENCE_KEYS if values.get(key)}
