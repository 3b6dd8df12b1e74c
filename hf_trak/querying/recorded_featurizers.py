"""The query side of an index: featurizers of the recorded checkpoints, checked to be those the training rows were featurized with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from hf_trak.config import TrakConfig
from hf_trak.featurizing.descriptions import describe_featurizer, recorded_checkpoint
from hf_trak.featurizing.featurize import featurize_rows
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.members import Pass
from hf_trak.sources.processing import describe_processing
from hf_trak.storage.differences import list_differences
from hf_trak.storage.member_reader import MemberReader
from hf_trak.storage.passes import encode_pass
from hf_trak.tasks import Bank, Task, in_direction
from hf_trak.tasks.rows import as_stored

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


class QuerySide:
    """Makes the featurizers that queries need.

    Args:
        folder (`Path`): Of the index.
        models (`Sequence`, *optional*): One per checkpoint, or one per member, in place of the recorded ones.

    Raises:
        ValueError: If there are not as many models as checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        config: TrakConfig,
        members: Sequence[MemberReader],
        passes: Sequence[Pass],
        models: Sequence[PreTrainedModel | str | Path] | None,
        processing_class: Any,
        task: Task | None,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = folder
        self.config = config
        self.members = members
        self.n_checkpoints = len({plan.checkpoint for plan in passes})
        if models is not None and len(models) not in (self.n_checkpoints, len(members)):
            raise ValueError(
                f"{folder} has {self.n_checkpoints} checkpoints and {len(members)} members, but {len(models)} models were given. "
                "Give one per checkpoint."
            )
        self.models = models
        self.processing_class = processing_class
        self.task = task
        self.trust_remote_code = trust_remote_code

    def featurizer(self, plan: Pass, *, direction: str = "pair") -> Featurizer:
        """Return the featurizer of a pass.

        Args:
            direction (`str`): For image-caption pairs: pair, image or caption; see [`AttributionIndex.score`].

        Raises:
            ValueError: If the model, task or parameters are not those recorded; the message lists what differs.
        """
        first = plan.members[0]
        place, given = self.members[first].info["checkpoint"], self._model(plan)
        featurizer = Featurizer(
            recorded_checkpoint(self.folder, place) if given is None else given,
            self.config,
            self.processing_class,
            task=self.task,
            seed=plan.seeds,
            dropout_seed=plan.dropout_seed,
            revision=place["revision"] if given is None else None,
            trust_remote_code=self.trust_remote_code,
        )
        recorded, found = self.members[first].identity, describe_featurizer(featurizer)
        lines = list_differences({key: recorded.get(key) for key in found}, found)
        lines += self._processing_differences(first, featurizer)
        if lines:
            raise ValueError(
                f"This is not what member_{first} of {self.folder} was featurized with:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\nGive the recorded checkpoint as `models`, with its tokenizer or image processor as `processing_class` if it is not saved "
                "beside it, or featurize the training set again."
            )
        if (bank := self.members[first].bank()) is not None:
            featurizer.use_bank(Bank.from_tensors(bank))
        featurizer.use_task(in_direction(featurizer.task.for_queries(), direction))
        return featurizer

    def _processing_differences(self, member: int, featurizer: Featurizer) -> list[str]:
        """Return what sets the tokenizer or image processor apart from the recorded one, where there are both."""
        recorded, found = self.members[member].info.get("processing"), describe_processing(featurizer.processing_class)
        return list_differences({"processing": recorded}, found) if recorded and found else []

    def _model(self, plan: Pass) -> PreTrainedModel | str | Path | None:
        """Return the model given for a pass, if any."""
        if self.models is None:
            return None
        return self.models[plan.checkpoint if len(self.models) == self.n_checkpoints else plan.members[0]]


def featurize_queries(
    featurizer: Featurizer, queries: Dataset, batch_size: int | str, progress: bool, description: str
) -> dict[str, np.ndarray]:
    """Return the trak_* columns of queries, in float32; those of several sketches as [`encode_pass`] names them."""
    if len(queries) == 0:
        raise ValueError("There are no queries: the dataset is empty.")
    queries = as_stored(queries)
    featurizer.read_from(queries)
    featurizer.task.check(queries, featurizer.processing_class)
    with tqdm(total=len(queries), unit="rows", desc=description, disable=not progress) as bar:
        found = featurize_rows(featurizer, queries, range(len(queries)), batch_size=batch_size, on_batch=bar.update)
    return encode_pass(found.features, found.output, found.out_to_loss, seeds=featurizer.seeds, dtype="float32")
