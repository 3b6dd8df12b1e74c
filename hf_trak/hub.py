"""Folders to and from the Hub."""

from __future__ import annotations

from pathlib import Path


def download_index(repo_id: str, revision: str | None = None) -> Path:
    """Download an index and return its folder in the cache; files already there are not fetched again.

    Raises:
        FileNotFoundError: If `repo_id` is neither a folder nor a dataset repository within reach.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision))
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{repo_id!r} is neither a folder here nor a dataset repository within reach: {str(error).splitlines()[0]}"
        ) from error


def upload_index(folder: Path, repo_id: str, *, private: bool | None, revision: str | None, message: str) -> str:
    """Upload a finished index to a dataset repository in one commit, creating the repository if need be; return its URL."""
    from huggingface_hub import HfApi

    api = HfApi()
    repository = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repository.repo_id,
        repo_type="dataset",
        folder_path=folder,
        revision=revision,
        commit_message=message,
        ignore_patterns=["*/.progress/*", "*.tmp"],
    )
    return str(repository)
