"""`FeatureArguments`: what features are made of, as flags; light enough for a command line's `--help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_trak.config import TrakConfig
from hf_trak.members import lay_out_passes, read_alphas


@dataclass
class FeatureArguments:
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
    proj_dim: int = field(default=4096, metadata={"help": "Numbers kept per example. More is better and costs disk."})
    sketch_seed: int = field(default=0, metadata={"help": "Sketch seed of the first member; member i uses this plus i."})
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
    projector: str = field(
        default="block_count_sketch",
        metadata={"help": "block_count_sketch, dense_rademacher (the paper's; slow), identity or fast_jl (CUDA)."},
    )
    fold: int = field(
        default=4,
        metadata={
            "help": "Rows or columns of a weight's longer side that may share a bucket before its gradient is formed; 1 folds "
            "nothing and is slower."
        },
    )
    gradients: str = field(
        default="auto",
        metadata={
            "help": "auto (layerwise where its check at the start passes, else loop), layerwise (fast), functional (torch.func) or loop (one "
            "example at a time; any model)."
        },
    )
    compute_dtype: str = field(
        default="float32",
        metadata={"help": "float32 (or whatever dtype the model is saved in), or bfloat16: autocast, with float32 sketches."},
    )
    damping: str = field(
        default="auto",
        metadata={"help": "Regularisation as a multiple of the kernel's mean nonzero eigenvalue; 0 is the paper's TRAK."},
    )
    features_dtype: str = field(default="float32", metadata={"help": "How features are stored: float32 or float16."})
    attribution_parameters: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions that select parameters by name; all trainable ones by default."}
    )
    text_columns: list[str] | None = field(default=None, metadata={"help": "One or two text columns; found by default."})
    image_column: str | None = field(default=None, metadata={"help": "The image column; found by default."})
    label_column: str | None = field(
        default=None, metadata={"help": "The label column, or a sequence-to-sequence model's target text; found by default."}
    )
    label_mapping: str = field(
        default="auto",
        metadata={
            "help": "How a dataset's class numbers become the model's: auto (as they are; refused where label names contradict each "
            "other), by_id (as they are), or by_name (translated by the names)."
        },
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens kept of a text; the model's own limit by default."})
    token_reduction: str = field(
        default="mean", metadata={"help": "How a language model's outputs of a row's tokens become one: mean or sum."}
    )
    score_tokens: str = field(
        default="all",
        metadata={"help": "Target tokens that count: all, or content (no special tokens such as EOS, no <extra_id_0>)."},
    )
    token_out_to_loss: str = field(
        default="mean",
        metadata={
            "help": "How 1 - p of a row's tokens enters its scores: mean, or exact (each token by its own; needs --token_reduction sum)."
        },
    )
    loss_on: str = field(
        default="auto",
        metadata={
            "help": "Tokens of a causal language model's row that are scored: assistant, completion, all, or auto: the completion of a "
            "prompt, all of a conversation or a text, as TRL's SFTTrainer trains by default."
        },
    )
    skip_unscored: bool = field(
        default=False,
        metadata={
            "help": "Keep rows without any scored token in place, with features and scores of zero, instead of refusing them."
        },
    )
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={"help": "Arguments of the chat template for every row, such as tools or enable_thinking, as JSON."},
    )
    bank_size: int | None = field(
        default=None,
        metadata={"help": "For image-caption pairs: how many of them each is held against; 512, or all if fewer, by default."},
    )
    bank_seed: int = field(default=0, metadata={"help": "For image-caption pairs: decides which pairs those are."})
    featurize_batch_size: str = field(
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
        """Return what features mean."""
        return TrakConfig(
            proj_dim=self.proj_dim,
            seed=self.sketch_seed,
            projector=self.projector,
            fold=self.fold,
            gradients=self.gradients,  # type: ignore[arg-type]
            compute_dtype=self.compute_dtype,  # type: ignore[arg-type]
            damping=self.damping,  # type: ignore[arg-type]
            dtype=self.features_dtype,  # type: ignore[arg-type]
            parameters=tuple(self.attribution_parameters) if self.attribution_parameters else None,
            text_columns=tuple(name for value in self.text_columns for name in value.split(",")) if self.text_columns else None,
            image_column=self.image_column,
            label_column=self.label_column,
            label_mapping=self.label_mapping,  # type: ignore[arg-type]
            max_length=self.max_length,
            reduction=self.token_reduction,  # type: ignore[arg-type]
            score_tokens=self.score_tokens,  # type: ignore[arg-type]
            token_out_to_loss=self.token_out_to_loss,  # type: ignore[arg-type]
            loss_on=self.loss_on,  # type: ignore[arg-type]
            skip_unscored=self.skip_unscored,
            chat_template_kwargs=self.chat_template_kwargs,
            bank_size=self.bank_size,
            bank_seed=self.bank_seed,
        )

    def path(self) -> dict[str, Any]:
        """Return which points of which path features are of, as [`AttributionIndex.build`] takes it.

        Raises:
            ValueError: If `alpha` is out of range, or there is no base.
        """
        read_alphas(self.base, self.alpha)
        return {"base": self.base, "alpha": self.alpha, "base_revision": self.base_revision}

    def member_counts(self) -> dict[str, Any]:
        """Return how many members a checkpoint makes, as [`AttributionIndex.build`] takes it."""
        counts = {"sketch_seeds_per_checkpoint": self.sketch_seeds_per_checkpoint, "dropout_seeds": self.dropout_seeds}
        lay_out_passes(1, seed=0, **counts)  # checks them
        return counts

    def rows_at_a_time(self) -> int | str:
        """Return `featurize_batch_size` as a number, or "auto"."""
        return int(self.featurize_batch_size) if self.featurize_batch_size.isdigit() else self.featurize_batch_size
