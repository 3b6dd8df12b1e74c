"""`from_pretrained`, `save_pretrained` and `push_to_hub` of an index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_trak.config import TrakConfig
from hf_trak.hub.copies import copy_index, push_index
from hf_trak.hub.download import HubIndex
from hf_trak.hub.upload import is_main_process
from hf_trak.storage.object_store import ObjectPath, place
from hf_trak.storage.reader import MemberReader
from hf_trak.tasks import Task, TaskMaker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Index = TypeVar("_Index", bound="HubMixin")


class HubMixin:
    """An index in a folder, which may be the cache of a repository."""

    folder: Path
    config: TrakConfig
    members: list[MemberReader]

    @classmethod
    def from_pretrained(
        cls: type[_Index],
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        models: PreTrainedModel | str | Path | Sequence[PreTrainedModel | str | Path] | None = None,
        processing_class: Any = None,
        task: Task | TaskMaker | None = None,
        base: str | Path | None = None,
        trust_remote_code: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> _Index:
        """Load an index from a folder, a dataset repository of the Hub, or an object store such as `s3://bucket/my-index`.

        From a repository or a store, only the configuration and the descriptions of members are downloaded at once. Gram matrices and shards
        are downloaded when a call reads them, always from the same commit. They are used only if their hashes match the recorded ones.

        ```python
        >>> index = AttributionIndex.from_pretrained("my-index")
        ```

        Args:
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            models (*optional*): Checkpoints to use instead of the recorded ones. A recorded repository is loaded at the recorded commit.
            base (`str` or `Path`, *optional*): For an index of points of a path, the base to use instead of the recorded one.
            trust_remote_code (`bool`): Run code from the repositories of recorded checkpoints. Weights are always loaded from safetensors.
            token (`str` or `bool`, *optional*): Hub token for the index; by default, the token of the login. Recorded checkpoints are
                loaded with the token of the login.
            cache_dir (`str` or `Path`, *optional*): Folder in which the files of the index are cached; by default, the Hub's cache.
            local_files_only (`bool`): Use only files in the cache, and send no requests for the index.
            force_download (`bool`): Download files again that are in the cache.

        Raises:
            FileNotFoundError: If there is no index, or if it cannot be downloaded.
            ValueError: If a file is missing, damaged or of another format version. The message names the file.
        """
        folder, repository = place(name_or_path), None
        if not isinstance(folder, ObjectPath) and not folder.exists():
            access = {
                "token": token,
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
                "force_download": force_download,
            }
            repository = HubIndex.open(str(name_or_path), revision, **access)
            folder = repository.folder
        elif revision is not None:
            raise ValueError(f"`revision` is for repositories, but {folder} is none.")
        given = list(models) if isinstance(models, (list, tuple)) else models if models is None else [models]
        return cls(  # type: ignore[call-arg]
            folder,
            models=given,
            processing_class=processing_class,
            task=task,
            base=base,
            trust_remote_code=trust_remote_code,
            repository=repository,
        )

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **pushing: Any,
    ) -> None:
        """Copy the index to another folder, or to an object store. The copy appears there when it is complete. If the call is killed
        before, the old content stays. Under a launcher, the first process copies.

        ```python
        >>> index.save_pretrained("copy-of-my-index")
        ```

        Args:
            overwrite (`bool`): Replace an index in `folder`. Files that hf_trak did not write stay.
            push_to_hub (`bool`): Push the index to the Hub after it is copied.
            repo_id (`str`, *optional*): The repository; by default, the name of `folder` under the account that is logged in.
            pushing: Arguments of [`~AttributionIndex.push_to_hub`].

        Raises:
            ValueError: If `folder` is this index, is inside it or contains it; if it is not empty and `overwrite` is not set; or if it is
                not empty and has no index.
        """
        if is_main_process():
            copy_index(
                self.folder, place(folder), self.config, self.members, overwrite=overwrite, home=getattr(self, "home", None)
            )
        if push_to_hub:
            self.push_to_hub(repo_id or Path(str(folder)).name, **pushing)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        license: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> str | None:
        """Upload the index to a dataset repository in one commit, and return the URL of the repository or of the pull request.

        Only files that the repository does not have are uploaded: for example new members, or the rest after a broken connection. Under a
        launcher, the first process pushes, and the others return None.

        Args:
            private (`bool`, *optional*): Whether a new repository is private.
            revision (`str`, *optional*): The branch; it is created if necessary.
            create_pr (`bool`): Propose the commit as a pull request to main.
            license (`str`, *optional*): The Hub's identifier of the licence, such as "cc-by-4.0", "other" or "unknown". By default, the
                licence in the local card, in the repository's card, or in the training set's card on the Hub.
            commit_message (`str`, *optional*): By default, the numbers of members and rows.
            token (`str` or `bool`, *optional*): Hub token; by default, the token of the login.

        Raises:
            ConnectionError: If the connection breaks. Nothing has changed then.
            PermissionError: If you may not write to the repository.
            ValueError: If no licence is known, if the repository is public although `private` is set, if a file has changed since it was
                written, or if another commit changed the same files in the meantime.
        """
        if not is_main_process():
            return None
        message = commit_message or f"TRAK features: {len(self.members)} members of {self.members[0].n_rows:,} rows"
        return push_index(
            self.folder,
            self.config,
            self.members,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            license=license,
            message=message,
            token=token,
        )
