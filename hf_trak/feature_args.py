"""`FeatureArguments`: what features are made of, as flags; light enough for a command line's `--help`.

The fields of [`TrakConfig`] become flags with the same names, defaults and help.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hf_trak.config import TrakConfig
from hf_trak.members import Ensemble

# Set by `--task` or the model, recorded by `build`, or fixed.
_NOT_FLAGS = ("task", "columns_read", "label_names", "format_version")


def _flag_type(hint: Any) -> Any:
    """Return the type of the flag for a field's type: a list for a tuple, and text for a choice, which [`TrakConfig`] checks."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if get_origin(hint) is Literal or any(get_origin(kind) is Literal for kind in kinds):
        return str
    kind = list[str] if get_origin(kinds[0]) is tuple else kinds[0]
    return kind | None if type(None) in get_args(hint) else kind


def _config_flags() -> Any:
    hints = get_type_hints(TrakConfig)
    options = [option for option in fields(TrakConfig) if option.name not in _NOT_FLAGS]
    return make_dataclass(
        "ConfigFlags",
        [
            (option.name, _flag_type(hints[option.name]), field(default=option.default, metadata=option.metadata))
            for option in options
        ],
    )


ConfigFlags: Any = _config_flags()


@dataclass
class FeatureArguments(ConfigFlags):
    """What features are made of and how, as flags: shared by [`AttributionArguments`] and the command line."""

    base: str | None = field(
        default=None,
        metadata={
            "help": "The checkpoint that training began from, a folder or repository: features are then of points of the line from it to "
            "the model, which can make better scores than the model itself (docs/concepts/halfway.md). 'adapter': the model under a LoRA adapter. "
            "'auto': that, or the base_model of the model's card. 'initial' (AttributionTrainer): the weights that training began with, "
            "which are kept."
        },
    )
    alpha: list[float] | None = field(
        default=None,
        metadata={
            "help": "Which points base + alpha (model - base), at least 0 and below 1; each is a checkpoint and costs a pass. By default 0.2 0.5 0.8 if there is a base."
        },
    )
    base_revision: str | None = field(default=None, metadata={"help": "Revision of the repository in base."})
    preset: str | None = field(
        default=None,
        metadata={
            "help": "published: TRAK as its paper has it, by --projector dense_rademacher, --damping 0, --out_to_loss_power 1 and --combination means. "
            "A flag that is not at its default wins.",
            "choices": ["published"],
        },
    )
    sketch_seeds_per_checkpoint: int = field(
        default=1,
        metadata={
            "help": "Members per checkpoint that share its gradients, each with a sketch of its own. A further one costs disk, and about a third of a pass."
        },
    )
    dropout_seeds: int = field(
        default=0,
        metadata={
            "help": "Networks per checkpoint with some units dropped, in place of the whole one; each costs a pass. 0 drops none."
        },
    )
    batch_size: str = field(
        default="auto",
        metadata={"help": "Rows featurized at a time; 'auto' takes more of short rows, and fewer where memory runs out."},
    )
    shard_rows: int = field(default=1024, metadata={"help": "Rows per file of features."})
    keep_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of the training set to store with the features, such as text,label,url: hits then show their rows without "
            "the training set. Check that its licence allows it before you share them."
        },
    )

    def kept_columns(self) -> tuple[str, ...]:
        """Return the columns of the training set to be stored, which may be given with commas between them."""
        return tuple(name for given in self.keep_columns or () for name in given.split(",") if name)

    def trak_config(self) -> TrakConfig:
        """Return what features mean.

        Raises:
            ValueError: If a flag has an impossible value, or `preset` names no preset or meets a `base`.
        """
        if self.preset not in (None, "published"):
            raise ValueError(f"`preset` must be 'published' or left out, but is {self.preset!r}.")
        if self.preset is not None and self.base is not None:
            raise ValueError(
                "preset='published' (--preset) is of final checkpoints, and `base` (--base) of points before them. Leave one of them out."
            )
        start = TrakConfig() if self.preset is None else TrakConfig.published()
        values = {option.name: getattr(self, option.name) for option in fields(ConfigFlags)}
        if values["text_columns"]:
            values["text_columns"] = tuple(name for given in values["text_columns"] for name in given.split(","))
        given = {
            option.name: values[option.name]
            for option in fields(ConfigFlags)
            if values[option.name] not in (option.default, [])
        }
        return replace(start, **given)

    def ensemble(self, models: Any = (), **given: Any) -> Ensemble:
        """Return what members are made of.

        Args:
            given: Other fields of [`Ensemble`].

        Raises:
            ValueError: If a count or `alpha` is out of range, or there is no base.
        """
        return Ensemble(
            models,
            base=self.base,
            alpha=self.alpha,
            base_revision=self.base_revision,
            sketch_seeds_per_checkpoint=self.sketch_seeds_per_checkpoint,
            dropout_seeds=self.dropout_seeds,
            **given,
        )

    def rows_at_a_time(self) -> int | str:
        """Return `batch_size` as a number, or "auto"."""
        return int(self.batch_size) if self.batch_size.isdigit() else self.batch_size
