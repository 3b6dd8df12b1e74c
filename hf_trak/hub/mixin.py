"""`from_pretrained`, `save_pretrained` and `push_to_hub`: what an index shares with the models and datasets of the Hub."""

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

        Of a repository or a store, only what says what the index is comes at once. Gram matrices and shards are fetched when a call reads them,
        from the same commit whatever happens to the repository meanwhile, and are used only if their hashes are those recorded.

        Args:
            revision (`str`, *optional*): Of the repository: a branch, tag or commit.
            models (*optional*): Checkpoints in place of the recorded ones. A recorded repository is loaded at the recorded commit.
            base (`str` or `Path`, *optional*): Of an index of points of a path: the base, in place of the recorded one.
            trust_remote_code (`bool`): Run code that recorded checkpoints bring along. Weights are loaded from safetensors in any case.
            token (`str` or `bool`, *optional*): Of the Hub, for the index; by default, the one that is logged in. Recorded checkpoints are
                loaded with the one that is logged in.
            cache_dir (`str` or `Path`, *optional*): Where the files of the index are cached; by default, in the Hub's cache.
            local_files_only (`bool`): Use what the cache holds, and do not connect for the index.
            force_download (`bool`): Fetch files again that the cache holds.

        Raises:
            FileNotFoundError: If there is no index there, or it cannot be fetched.
            ValueError: If a file is missing, truncated, other than what was written, or of another format version; the message names it.
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
        """Copy the index to another folder, or to an object store. The copy appears there when it is whole; killed before, the call
        leaves what was there. Under a launcher, the first process copies.

        Args:
            overwrite (`bool`): Replace an index that is in `folder`. Files there that no index wrote stay.
            push_to_hub (`bool`): Push the index to the Hub after it is copied.
            repo_id (`str`, *optional*): Where to; by default, the name of `folder` under the account that is logged in.
            pushing: Of [`~AttributionIndex.push_to_hub`].

        Raises:
            ValueError: If `folder` is this index, lies in it or holds it; is not empty and `overwrite` is not set; or is not empty and
                holds no index.
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

        Only what the repository does not have is sent: after members were added, those; after a broken connection, what had not
        arrived. Under a launcher, the first process pushes, and the others return None.

        Args:
            private (`bool`, *optional*): For a repository that is new.
            revision (`str`, *optional*): The branch, made if need be.
            create_pr (`bool`): Propose the commit as a pull request to main.
            license (`str`, *optional*): As the Hub spells it, such as "cc-by-4.0"; "other" and "unknown" are known too. By default, the
                one stated in the card here, in the repository's, or by the training set's own on the Hub.
            commit_message (`str`, *optional*): By default, how many members and rows it is.
            token (`str` or `bool`, *optional*): Of the Hub; by default, the one that is logged in.

        Raises:
            ConnectionError: If the connection breaks; nothing has changed then.
            PermissionError: If the Hub does not let us write there.
            ValueError: If no licence is known, the repository is public against `private`, a file is not what was written, or somebody
                else has changed the same files meanwhile.
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
