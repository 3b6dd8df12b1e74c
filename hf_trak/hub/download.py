"""Indexes on the Hub: the configuration and descriptions of members are downloaded first, shards when a call reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from hf_trak.config import CARD_NAME, CONFIG_NAME
from hf_trak.hub.cards import CURVE_NAME
from hf_trak.scoring.damping import DAMPING_NAME
from hf_trak.storage.format import MEMBER_NAME

# Gram matrices, banks, masks and shards are downloaded later. From a repository without an index, almost nothing is downloaded.
_FIRST = [CARD_NAME, CONFIG_NAME, DAMPING_NAME, CURVE_NAME, f"member_*/{MEMBER_NAME}"]


@dataclass(frozen=True)
class HubIndex:
    """One commit of a dataset repository with an index, and the folder in the cache for its files.

    Args:
        sha (`str`): The commit. Later pushes have no effect.
        access (`dict`): `token`, `cache_dir`, `local_files_only` and `force_download`, as in huggingface_hub.
    """

    repo_id: str
    sha: str
    folder: Path
    access: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, repo_id: str, revision: str | None = None, **access: Any) -> HubIndex:
        """Download the configuration of the index and the description of each member. Cached files are not downloaded again.

        Raises:
            FileNotFoundError: If the dataset repository does not exist, cannot be reached or has no index.
            ValueError: If a member is missing.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            folder = Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=_FIRST, **access))
        except RevisionNotFoundError as error:
            raise FileNotFoundError(f"The dataset repository {repo_id!r} has no revision {revision or 'main'!r}.") from error
        except HFValidationError as error:
            raise FileNotFoundError(
                f"{repo_id!r} is neither a folder here nor the name of a dataset repository: there is no such folder. Check the path."
            ) from error
        except (LocalEntryNotFoundError, HfHubHTTPError, JSONDecodeError) as error:
            raise _out_of_reach(repo_id, error) from error
        except (ValueError, OSError):
            raise
        except Exception as error:  # the types of a connection's errors depend on the version of huggingface_hub
            raise _out_of_reach(repo_id, error) from error
        if not (folder / CONFIG_NAME).is_file():
            raise FileNotFoundError(
                f"The dataset repository {repo_id!r} holds no {CONFIG_NAME}, so it is not an attribution index."
            )
        found = sorted(int(path.parent.name.split("_")[1]) for path in folder.glob(f"member_*/{MEMBER_NAME}"))
        if found != list(range(len(found))):
            missing = min(set(range(max(found))) - set(found))
            raise ValueError(
                f"{repo_id!r} lacks member_{missing}/{MEMBER_NAME}: it is incomplete. Ask for it to be pushed again."
            )
        return cls(repo_id, folder.name, folder, access)

    def fetcher(self, member: str) -> Callable[[str], None]:
        """Return a function that downloads a file of a member, given the file's name."""
        return lambda name: self.fetch(f"{member}/{name}")

    def fetch(self, name: str) -> None:
        """Download a file into the folder, unless it exists.

        Raises:
            FileNotFoundError: If it cannot be downloaded now.
            ValueError: If the repository lacks it.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError

        try:
            hf_hub_download(self.repo_id, name, repo_type="dataset", revision=self.sha, **self.access)
        except RemoteEntryNotFoundError as error:
            raise ValueError(
                f"{self.repo_id!r} at {self.sha} lacks {name}, which its {MEMBER_NAME} lists: it is incomplete. Ask for it to be pushed "
                "again."
            ) from error
        except (LocalEntryNotFoundError, HfHubHTTPError, JSONDecodeError) as error:
            raise self._not_fetched(name, error) from error
        except (ValueError, OSError):
            raise
        except Exception as error:  # the types of a connection's errors depend on the version of huggingface_hub
            raise self._not_fetched(name, error) from error

    def _not_fetched(self, name: str, error: Exception) -> FileNotFoundError:
        return FileNotFoundError(f"{name} of {self.repo_id!r} is not in the cache and cannot be fetched: {_reason(error)}")


def _out_of_reach(repo_id: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(f"{repo_id!r} is neither a folder here nor a dataset repository within reach: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Return the reason of a failed download, and advice."""
    from huggingface_hub import constants, get_token

    answers = [getattr(one, "response", None) for one in (error, error.__cause__)]
    if any(getattr(answer, "status_code", None) in (401, 403, 404) for answer in answers):
        key = "your token does not open it" if get_token() else "no token is set"
        return f"it does not exist, or it is private and {key}. Check the name; log in with `hf auth login`, or set HF_TOKEN."
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set. Unset it to fetch what is missing."
    if isinstance(error, JSONDecodeError):
        return f"{constants.ENDPOINT} returned something that is not JSON, perhaps a network's login page. Open it in a browser, then run again."
    said = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
    return f"{constants.ENDPOINT} cannot be reached ({said.rstrip('.')}). Check the network."
