"""Folders to and from the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from hf_trak.cards import CURVE_NAME
from hf_trak.config import CARD_NAME, CONFIG_NAME
from hf_trak.damping import DAMPING_NAME
from hf_trak.store import MEMBER_NAME, read_json


def download_index(repo_id: str, revision: str | None = None) -> Path:
    """Download an index and return its folder in the cache; files already there are not fetched again.

    Raises:
        FileNotFoundError: If `repo_id` is neither a folder nor a dataset repository within reach, or holds no index.
    """
    from huggingface_hub import get_token, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

    index_files = [
        CARD_NAME,
        CONFIG_NAME,
        DAMPING_NAME,
        CURVE_NAME,
        "member_*/*",
    ]  # of a repository that is no index, next to nothing is fetched
    try:
        folder = Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=index_files))
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"The dataset repository {repo_id!r} has no revision {revision or 'main'!r}.") from error
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
            key = "your token does not open it" if get_token() else "no token is set"
            reason = (
                f"it does not exist, or it is private and {key}. Check the name; log in with `hf auth login`, or set HF_TOKEN."
            )
        raise FileNotFoundError(
            f"{repo_id!r} is neither a folder here nor a dataset repository within reach: {reason}"
        ) from error
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"The dataset repository {repo_id!r} holds no {CONFIG_NAME}, so it is not an attribution index."
        )
    return folder


def upload_index(folder: Path, repo_id: str, *, card: str, private: bool | None, revision: str | None, message: str) -> str:
    """Upload a finished index to a dataset repository in one commit; return the repository's URL.

    The repository and the branch `revision` are created if need be. Members and shards that an earlier index left in the
    repository are deleted in the same commit; other files of the repository stay.

    Args:
        card (`str`): The repository's README.md, in place of the folder's.

    Raises:
        ValueError: If `private` is set and the repository exists and is public.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    api = HfApi()
    repository = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    repo_id = repository.repo_id
    try:
        info = api.dataset_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        if revision is None:
            raise
        api.create_branch(repo_id, repo_type="dataset", branch=revision)
        info = api.dataset_info(repo_id, revision=revision)
    if private and info.private is False:
        raise ValueError(
            f"{repo_id} exists and is public, but private=True was asked for. Make it private, or choose another name."
        )
    names = _files_of(folder)
    stale = [
        name
        for name in api.list_repo_files(repo_id, repo_type="dataset", revision=info.sha)
        if (re.match(r"member_\d+/", name) or name in (DAMPING_NAME, CURVE_NAME)) and name not in names
    ]
    # Not `upload_folder`, which may spread a folder over several commits: a reader could load half an index.
    api.create_commit(
        repo_id,
        [
            CommitOperationAdd(path_in_repo=CARD_NAME, path_or_fileobj=card.encode()),
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        commit_message=message,
        repo_type="dataset",
        revision=revision,
        parent_commit=info.sha,  # what is stale was decided from this commit
    )
    return str(repository)


def _files_of(folder: Path) -> list[str]:
    """Return the files an index consists of but for its card, and none that merely lie beside them."""
    names = [CONFIG_NAME, *(name for name in (DAMPING_NAME, CURVE_NAME) if (folder / name).is_file())]
    number = 0
    while (record := folder / f"member_{number}" / MEMBER_NAME).is_file():
        names += [f"member_{number}/{name}" for name in (MEMBER_NAME, *(entry["file"] for entry in read_json(record)["files"]))]
        number += 1
    return names
