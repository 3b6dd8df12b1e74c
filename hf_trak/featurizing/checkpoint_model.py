"""`CheckpointModel`: the model that features are of, a checkpoint or a point of the path to it, loaded when it is first needed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_trak.featurizing.devices import unwrapped
from hf_trak.hashing import hash_tensors
from hf_trak.members import MIDDLE, PathPoint, read_alphas
from hf_trak.sources.checkpoints import load_model_and_base_rows
from hf_trak.sources.path_bases import MadePoint, find_base, make_point
from hf_trak.sources.path_points import set_statistics
from hf_trak.sources.repositories import pinned_revision

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CheckpointModel:
    """The model of a [`Featurizer`], whose arguments these are.

    Attributes:
        source (`str`, *optional*): The folder or repository; None of a model in memory.
        statistics (`dict`, *optional*): The running statistics of BatchNorm at a point of a path, by name; None until they are measured or
            given, and for other models.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        revision: str | None,
        base: str | Path | None,
        alpha: float | None,
        base_revision: str | None,
        trust_remote_code: bool,
    ) -> None:
        self.source = str(model) if isinstance(model, (str, Path)) else None
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.statistics: dict[str, Tensor] | None = None
        self._commit: str | None = None
        self._final = None if isinstance(model, (str, Path)) else unwrapped(model)  # in memory
        alphas = read_alphas(base, MIDDLE if alpha is None and base is not None else alpha)
        if len(alphas) > 1:
            raise ValueError(f"A Featurizer is of one point, but `alpha` is {alpha!r}. Make one for each.")
        self._path = (base, alphas[0], base_revision) if base is not None else None
        self._point: PathPoint | None = None  # until the base is found
        self._made: MadePoint | None = None
        self._model = self._final if base is None else None
        self._hash: str | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model, loaded at its first use."""
        if self._model is None:
            if self.source is None and self._final is None:
                raise ValueError(
                    "This Featurizer was made from a model in memory and has been sent to another process, where the model is "
                    "not. Save the model and make the Featurizer from the folder, or use num_proc=None."
                )
            self._model = self._load()
        return self._model

    def _load(self) -> PreTrainedModel:
        """Load the checkpoint; where a point of its path is asked for, make that of it, once the final weights are hashed."""
        base_rows: Mapping[str, int] = {}
        if self._final is not None:
            model = copy.deepcopy(self._final)  # the caller's own stays what it is
        else:
            assert self.source is not None
            model, base_rows = load_model_and_base_rows(self.source, self.commit, trust_remote_code=self.trust_remote_code)
        if self.point is not None:
            self._hash = _hash_weights(model)
            self._made = make_point(model, self.point, base_rows=base_rows)
            if self.statistics is not None:
                set_statistics(model, self._made.report.measured, self.statistics)
        return model

    @property
    def commit(self) -> str | None:
        """The commit that everything of a repository is loaded at; None for a folder."""
        if self._commit is None:
            self._commit = pinned_revision(self.source, self.revision)
        return self._commit

    @property
    def point(self) -> PathPoint | None:
        """Which point of the path to the checkpoint this is; None for the checkpoint itself."""
        if self._path is not None and self._point is None:
            base, alpha, revision = self._path
            final: Any = self._final if self.source is None else self.source
            found = find_base(final, base, revision=self.commit, base_revision=revision)
            self._point = replace(found, alpha=alpha)
        return self._point

    @property
    def made(self) -> MadePoint | None:
        """What tells the point from others, and how it was made; None for the checkpoint itself."""
        _ = self.model
        return self._made

    def hash(self) -> str:
        """Return the SHA-256 of the checkpoint's weights and buffers, but for modules that an adapter replaces: they are not used, and may
        be random. That of a point of a path is the final checkpoint's."""
        if self._hash is None:
            model = self.model  # of a point, this sets the hash
            self._hash = self._hash or _hash_weights(model)
        return self._hash

    @property
    def measured(self) -> tuple[str, ...]:
        """The modules whose running statistics are to be measured at this point of a path."""
        return self.made.report.measured if self.made is not None else ()

    def use_statistics(self, statistics: Mapping[str, Tensor]) -> None:
        """Use running statistics that were measured.

        Raises:
            ValueError: If they are not of this point's modules.
        """
        set_statistics(self.model, self.measured, statistics)
        self.statistics = dict(statistics)

    def check_statistics(self) -> None:
        """Check that the running statistics are known where the point needs some.

        Raises:
            ValueError: If they are not.
        """
        if self.statistics is None and self.measured:
            raise ValueError(
                f"At a point of the path, the running statistics of {len(self.measured)} modules, such as {self.measured[0]}, are measured "
                "on training rows, and this Featurizer has not seen any. Call `featurizer.measure_statistics(train)` first; "
                "AttributionIndex.build does so, and `index.featurizer()` has those of the index."
            )

    def point_state(self) -> dict[str, Any]:
        """Return which point this is of, and its base by content, to be pickled; nothing of a checkpoint itself."""
        if (point := self.point) is None:
            return {}
        path = {"base": point.base, "alpha": point.alpha, "base_revision": point.revision}
        given = {} if self.statistics is None else {"statistics": as_arrays(self.statistics)}
        return {"path": path, "made": self.made.identity if self.made is not None else None, **given}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what was pickled of a model: its hash and its statistics."""
        self._hash = state["model_hash"]
        if "statistics" in state:
            self.statistics = as_tensors(state["statistics"])


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return tensors as NumPy arrays; bfloat16 becomes float32."""
    return {
        name: (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy() for name, values in tensors.items()
    }


def as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return NumPy arrays as tensors."""
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def _hash_weights(model: Any) -> str:
    return hash_tensors({name: value for name, value in model.state_dict().items() if ".original_module." not in name})
