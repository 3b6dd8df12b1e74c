"""Uploading an index to a dataset repository in one commit. Files that the repository has are neither read nor uploaded again."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING

from hf_trak.config import CARD_NAME
from hf_trak.hub.cards import CURVE_NAME
from hf_trak.scoring.damping import DAMPING_NAME

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, RepoFile

_ATTEMPTS = 5


@dataclass
class Upload:
    """An upload to one branch of one dataset repository.

    Args:
        revision (`str`, *optional*): The branch; main by default.
        create_pr (`bool`): Propose the commit as a pull request instead of committing to the branch.
        token (`str` or `bool`, *optional*): Hub token; by default, the token of the login.
    """

    repo_id: str
    url: str
    private: bool | None
    revision: str | None
    create_pr: bool
    token: str | bool | None = None

    @classmethod
    def begin(
        cls, repo_id: str, *, private: bool | None, revision: str | None, create_pr: bool, token: str | bool | None = None
    ) -> Upload:
        """Create the repository and the branch, unless they exist.

        Raises:
            PermissionError: If the Hub denies access.
            ValueError: If a pull request is requested for a branch other than main.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RevisionNotFoundError

        if create_pr and revision not in (None, "main"):
            raise ValueError(f"A pull request goes to main, so revision={revision!r} and create_pr=True exclude each other.")
        api = HfApi(token=token)
        with _permission_needed(repo_id):
            repository = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
            if revision is not None:
                try:
                    api.dataset_info(repository.repo_id, revision=revision)
                except RevisionNotFoundError:
                    api.create_branch(repository.repo_id, repo_type="dataset", branch=revision)
        return cls(repository.repo_id, str(repository), private, revision, create_pr, token)

    def run(
        self,
        files: Mapping[str, Callable[[], Path]],
        hashes: Mapping[str, str],
        card: Callable[[str | None], str],
        message: str,
    ) -> str:
        """Commit, and return the URL of the repository or of the pull request.

        Members and shards of an earlier index are deleted in the same commit; other files stay. If somebody else commits in the meantime,
        this commit follows theirs, or fails if both change the same file.

        Args:
            files (`Mapping`): By name in the repository, a function that returns the local path. It is called only for uploaded files.
            hashes (`Mapping`): The SHA-256 of the large files.
            card (`Callable`): Given the repository's README.md or None, return the new one.

        Raises:
            ConnectionError: If the connection breaks. The next call does not upload again what has arrived.
            PermissionError: If the Hub denies access.
            ValueError: If the repository is public but `private` is set, if a file has changed since it was written, or if another
                commit changed the same files in the meantime.
        """
        from huggingface_hub.errors import HfHubHTTPError

        additions: dict[str, CommitOperationAdd] = {}
        before: dict[str, RepoFile] | None = None
        for attempt in range(_ATTEMPTS):
            head, found = self._look()
            changed = _changes(files, hashes, found)
            stale = [name for name in found if _is_of_an_index(name) and name not in files]
            if before is not None:
                self._refuse_to_undo([*changed, *stale], before, found)
            for name in changed:
                if name not in additions:
                    additions[name] = _addition(name, files[name](), hashes.get(name))
            try:
                with _permission_needed(self.repo_id), _connection_needed(self.repo_id):
                    return self._commit(
                        head, [additions[name] for name in changed], stale, self._card(head, found, card), message
                    )
            except HfHubHTTPError as error:
                if error.response.status_code != 412 or attempt == _ATTEMPTS - 1:
                    raise
                before = found
        raise AssertionError("unreachable")

    def _look(self) -> tuple[str, dict[str, RepoFile]]:
        """Return the branch's commit, and its files."""
        from huggingface_hub import HfApi, RepoFile

        api = HfApi(token=self.token)
        info = api.dataset_info(self.repo_id, revision=self.revision)
        if self.private and info.private is False:
            raise ValueError(
                f"{self.repo_id} exists and is public, but private=True was asked for. Make it private, or choose another name."
            )
        entries = api.list_repo_tree(self.repo_id, repo_type="dataset", revision=info.sha, recursive=True)
        return str(info.sha), {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _card(self, head: str, found: Mapping[str, RepoFile], card: Callable[[str | None], str]) -> str | None:
        """Return the card to commit; None if the repository has it already."""
        from huggingface_hub import hf_hub_download

        if CARD_NAME not in found:
            return card(None)
        path = hf_hub_download(self.repo_id, CARD_NAME, repo_type="dataset", revision=head, token=self.token)
        existing = Path(path).read_text(encoding="utf-8")
        new = card(existing)
        return None if new == existing else new

    def _commit(self, head: str, additions: list[CommitOperationAdd], stale: list[str], card: str | None, message: str) -> str:
        from huggingface_hub import CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi

        operations: list[CommitOperation] = [*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale)]
        if card is not None:
            operations.append(CommitOperationAdd(path_in_repo=CARD_NAME, path_or_fileobj=card.encode()))
        if not operations:
            return self.url
        # Not `upload_folder`, which can split a folder into several commits, so that a reader could load half of an index.
        commit = HfApi(token=self.token).create_commit(
            self.repo_id,
            operations,
            commit_message=message,
            repo_type="dataset",
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=head,  # stale files were determined from this commit
        )
        return commit.pr_url or self.url

    def _refuse_to_undo(self, names: list[str], before: Mapping[str, RepoFile], now: Mapping[str, RepoFile]) -> None:
        """Refuse to change or delete files that somebody else has changed since the list of files was read."""
        lost = [name for name in names if _id(before.get(name)) != _id(now.get(name))]
        if lost:
            raise ValueError(
                f"While this was pushed, somebody else changed {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''} in {self.repo_id}; "
                "their commit was kept, and this one was not made. Check theirs, and push again if yours should replace it."
            )


def _id(entry: RepoFile | None) -> str | None:
    return None if entry is None else entry.blob_id


def _is_of_an_index(name: str) -> bool:
    return re.match(r"member_\d+/", name) is not None or name in (DAMPING_NAME, CURVE_NAME)


def _changes(files: Mapping[str, Callable[[], Path]], hashes: Mapping[str, str], found: Mapping[str, RepoFile]) -> list[str]:
    """Return the files that the repository lacks, or has with another content."""
    return [name for name in files if name not in found or not _is_same(found[name], files[name], hashes.get(name))]


def _is_same(entry: RepoFile, file: Callable[[], Path], sha256: str | None) -> bool:
    """Compare a file with the repository by recorded hashes. Only small files, which have no recorded hash, are read."""
    if entry.lfs is not None and sha256 is not None:
        return entry.lfs.sha256 == sha256
    path = file()
    if path.stat().st_size != entry.size:
        return False
    content = path.read_bytes()
    if entry.lfs is not None:
        return hashlib.sha256(content).hexdigest() == entry.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == entry.blob_id


def _addition(name: str, path: Path, sha256: str | None) -> CommitOperationAdd:
    """Return the operation that adds a file.

    Raises:
        ValueError: If the file has changed since it was written.
    """
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
    # The client uses this hash, so no file is read twice.
    if sha256 is not None and addition.upload_info.sha256.hex() != sha256:
        raise ValueError(
            f"{path} has changed since it was written, and was not pushed. Restore it from a copy, or featurize again."
        )
    return addition


@contextmanager
def _permission_needed(repo_id: str) -> Iterator[None]:
    """Add advice to errors of authentication in the block."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        key = "your token does not allow it" if get_token() else "no token is set"
        raise PermissionError(
            f"The Hub denies write access to the dataset repository {repo_id!r}: {key}. Log in with `hf auth login`, or set HF_TOKEN to "
            "a token with write access."
        ) from error
    except JSONDecodeError as error:
        raise ConnectionError(
            f"The Hub's answer is not JSON, perhaps a network's login page, and nothing was pushed to {repo_id!r}. Check the network."
        ) from error
    except (ValueError, OSError):
        raise
    except Exception as error:  # the error without a connection depends on the version of huggingface_hub
        said = str(error.__cause__ or error) or type(error).__name__
        raise ConnectionError(
            f"The Hub cannot be reached ({said}), and nothing was pushed to {repo_id!r}. Check the network, and push again."
        ) from error


@contextmanager
def _connection_needed(repo_id: str) -> Iterator[None]:
    """Add advice to errors of a broken connection in the block. Their types depend on the version of huggingface_hub."""
    try:
        yield
    except (ValueError, OSError):  # these errors already have advice
        raise
    except Exception as error:
        reason = str(error.__cause__ or error) or type(error).__name__
        raise ConnectionError(
            f"The upload to {repo_id!r} broke off ({reason}), and nothing has changed there. Push again: files that have arrived are not "
            "sent again."
        ) from error


def repository_exists(repo_id: str, *, token: str | bool | None = None) -> bool:
    """Return whether a dataset repository exists and can be read."""
    from huggingface_hub import HfApi

    with _permission_needed(repo_id):
        return HfApi(token=token).repo_exists(repo_id, repo_type="dataset")


def is_main_process() -> bool:
    """Return whether this process is the first of those that a launcher started, which is the one that pushes."""
    return os.environ.get("RANK", "0") == "0"
