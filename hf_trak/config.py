"""`TrakConfig`: everything that decides what a feature means, and nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from hf_trak.messages import DamagedFile

CONFIG_NAME = "trak_config.json"
CARD_NAME = "README.md"
FORMAT_VERSION = 4

# Fields that decide scores after the fact; two indices that differ in them still speak the same language.
CHOSEN_FOR_SCORES = ("damping", "out_to_loss_power", "combination")
_CHOSEN_AFTER = (*CHOSEN_FOR_SCORES, "features_dtype", "skip_unscored")
# The task may be "auto", and columns and labels are those of a training set.
_NOT_OF_ROWS = ("task", *CHOSEN_FOR_SCORES, "columns_read", "label_names")
_CHOICES = {
    "combination": ("scaled", "means"),
    "features_dtype": ("float32", "float16"),
    "gradients": ("auto", "layerwise", "functional", "loop"),
    "compute_dtype": ("float32", "bfloat16"),
    "label_mapping": ("auto", "by_id", "by_name"),
    "token_reduction": ("mean", "sum"),
    "score_tokens": ("all", "content"),
    "token_out_to_loss": ("mean", "exact"),
    "loss_on": ("auto", "assistant", "completion", "all"),
    "row_format": ("auto", "alpaca", "sharegpt"),
    "preference_reduction": ("sum", "mean"),
}
# Fields that came after the first indexes of this format version: written only where they say something, so that an index of before
# and one of now that mean the same have the same files.
_LATER = (
    "out_to_loss_power",
    "combination",
    "label_mapping",
    "token_reduction",
    "score_tokens",
    "token_out_to_loss",
    "loss_on",
    "row_format",
    "skip_unscored",
    "chat_template_kwargs",
    "chunk_overlap",
    "bank_size",
    "bank_seed",
    "preference_reduction",
    "preference_beta",
    "columns_read",
    "label_names",
)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _as_json(name: str, value: Any) -> str:
    """Return a dict as JSON text, the same for every spacing. The order of keys stays, since templates write tools in it.

    Raises:
        ValueError: If the value is neither a dict nor the JSON text of one.
    """
    try:
        value = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be a dict or its JSON text, but is not: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a dict or its JSON text, but is {value!r}.")
    return text


def _fetch(repo_id: str, **access: Any) -> Path:
    """Return the configuration of an index on the Hub, in the cache.

    Raises:
        FileNotFoundError: If it cannot be fetched; the message says why.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, CONFIG_NAME, repo_type="dataset", **access))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{repo_id!r} is neither a folder here nor a dataset repository with a {CONFIG_NAME} within reach: {reason}"
        ) from error


def _damaged(path: Path, reason: str) -> DamagedFile:
    return DamagedFile(f"{path} is damaged: {reason}. Restore it, or featurize again.", reason=reason)


@dataclass(frozen=True)
class TrakConfig:
    """What features mean. Two sets of features may be compared only if their configurations agree.

    Round-trips through JSON with [`~TrakConfig.save_pretrained`] and [`~TrakConfig.from_pretrained`].

    ```python
    >>> TrakConfig(proj_dim=512, damping=1.0).projector
    'block_count_sketch'
    ```
    """

    task: str = _option(
        "auto",
        "Model output to attribute: text-classification, image-classification, text-multi-label, image-multi-label, text-regression, "
        "image-regression, causal-lm, masked-lm, seq2seq, question-answering, token-classification, contrastive, preference, or auto (from the "
        "model).",
    )
    proj_dim: int = _option(
        4096, "Numbers kept per example. More is better and costs disk, not compute; 1,024 to 16,384 is usual."
    )
    sketch_seed: int = _option(0, "Sketch seed of the first member; member i uses this plus i.")
    projector: str = _option(
        "block_count_sketch",
        "Sketch: block_count_sketch, dense_rademacher (the paper's; slow), identity (none), fast_jl (CUDA; tied to the GPU's model).",
    )
    fold: int = _option(
        4,
        "Rows or columns of a weight's longer side that may share a bucket before its gradient is formed; 1 folds nothing. "
        "For block_count_sketch.",
    )
    gradients: Literal["auto", "layerwise", "functional", "loop"] = _option(
        "auto",
        "How per-example gradients are made: layerwise (a batch at a time; fast), functional (torch.func), loop (one example at a time; any "
        "model), or auto (layerwise where its check at the start passes, else loop).",
    )
    compute_dtype: Literal["float32", "bfloat16"] = _option(
        "float32",
        "What the model computes in: float32 (or whatever dtype it is loaded in), or bfloat16 by autocast. Sketches are float32.",
    )
    damping: float | Literal["auto"] = _option(
        "auto", "Regularisation as a multiple of the Gram matrix's mean nonzero eigenvalue; 0 is the paper's TRAK."
    )
    out_to_loss_power: float | None = _option(
        None, "What 1 - p is raised to in scores; by default 1/2, and 1 for points of a path. 1 is the paper's TRAK."
    )
    combination: Literal["scaled", "means"] = _option(
        "scaled",
        "How the scores of several members become one: scaled (the mean of each one's, brought to one scale), or means (the paper's product "
        "of two means).",
    )
    features_dtype: Literal["float32", "float16"] = _option(
        "float32", "How features are stored. float16 keeps a scale per row and halves the disk."
    )
    parameters: tuple[str, ...] | None = _option(
        None, "Regular expressions that select parameters by name; all trainable ones by default."
    )
    text_columns: tuple[str, ...] | None = _option(None, "One or two text columns, in the model's order; found by default.")
    image_column: str | None = _option(None, "The image column; found by default.")
    label_column: str | None = _option(
        None, "The label column, or a sequence-to-sequence model's target text; found by default."
    )
    label_mapping: Literal["auto", "by_id", "by_name"] = _option(
        "auto",
        "How a dataset's class numbers become the model's: auto (as they are; refused if the dataset's and the model's label names "
        "contradict each other), by_id (as they are, whatever the names), by_name (translated by the names).",
    )
    max_length: int | None = _option(None, "Tokens kept of a text; the model's own limit by default.")
    chunk_overlap: int | None = _option(
        None,
        "Causal language models: cut every text into chunks of max_length tokens, each a training row of its own, which begins with this many "
        "tokens of the one before as context. By default, texts are cut off at max_length.",
    )
    token_reduction: Literal["mean", "sum"] = _option(
        "mean", "How the outputs of an example's scored tokens become one: mean, or sum. For language models."
    )
    score_tokens: Literal["all", "content"] = _option(
        "all",
        "Target tokens that count: all, or content, which leaves out special tokens such as EOS and sentinels such as "
        "<extra_id_0>. For language models.",
    )
    token_out_to_loss: Literal["mean", "exact"] = _option(
        "mean",
        "How 1 - p of an example's tokens enters its scores: by its mean, or exactly, each token's gradient times its own 1 - p, "
        "which needs token_reduction sum. For language models.",
    )
    loss_on: Literal["auto", "assistant", "completion", "all"] = _option(
        "auto",
        "Tokens of a causal language model's row that are scored: assistant (TRL's assistant_only_loss), completion (its "
        "completion_only_loss), all, or auto: the completion of a prompt, all of a conversation or a text, as TRL trains by default.",
    )
    row_format: Literal["auto", "alpaca", "sharegpt"] = _option(
        "auto",
        "Rows of causal language models that need a stated reading: alpaca ('instruction', 'input' and 'output' in Stanford Alpaca's template, which ends in "
        "'### Response:' and a new line), sharegpt ('conversations' of 'from' and 'value'; human is the user, gpt the assistant), or auto: neither.",
    )
    skip_unscored: bool = _option(
        False,
        "Keep rows without any scored token in place, with features, output and out_to_loss of zero, instead of refusing them. For "
        "language models.",
    )
    chat_template_kwargs: str | None = _option(
        None,
        "Arguments of the chat template for every row, such as tools or enable_thinking, as a JSON text; a dict becomes one.",
    )
    bank_size: int | None = _option(
        None, "Contrastive: pairs of the training set that each example is held against; 512, or all if fewer, by default."
    )
    bank_seed: int = _option(0, "Contrastive: decides which pairs those are, for all members alike.")
    preference_reduction: Literal["sum", "mean"] = _option(
        "sum", "Preferences: whether log-probabilities are summed over an answer's tokens, as in DPO, or their mean is taken."
    )
    preference_beta: float = _option(0.1, "Preferences: DPO's beta, with which the model was trained.")
    columns_read: dict[str, Any] | None = field(
        default=None,
        hash=False,
        metadata={"help": "Columns that the task read of the training set, and as what; recorded by `build`."},
    )
    label_names: tuple[str, ...] | None = _option(None, "Names of the training set's classes; recorded by `build`.")
    format_version: int = _option(FORMAT_VERSION, "Version of the files an index is made of.")

    def __post_init__(self) -> None:
        for name in ("parameters", "text_columns", "label_names"):  # lists after JSON, YAML or a command line
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.chat_template_kwargs is not None:
            object.__setattr__(self, "chat_template_kwargs", _as_json("chat_template_kwargs", self.chat_template_kwargs))
        if isinstance(self.damping, str) and self.damping != "auto":
            try:
                object.__setattr__(self, "damping", float(self.damping))
            except ValueError:
                raise ValueError(f"`damping` must be 'auto' or a number, but is {self.damping!r}.") from None
        if isinstance(self.damping, bool) or (self.damping != "auto" and not 0 <= self.damping < float("inf")):
            raise ValueError(f"`damping` must be 'auto' or a finite number of at least 0, but is {self.damping}.")
        power = self.out_to_loss_power
        if power is not None and (isinstance(power, bool) or not isinstance(power, (int, float)) or not 0 <= power <= 1):
            raise ValueError(f"`out_to_loss_power` must lie in 0 to 1, but is {power!r}.")
        beta = self.preference_beta
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta < float("inf"):
            raise ValueError(f"`preference_beta` must be a number above 0, but is {beta!r}.")
        for name in ("proj_dim", "fold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, but is {value!r}.")
        length = self.max_length
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise ValueError(f"`max_length` must be a whole number of at least 1, but is {length!r}.")
        overlap = self.chunk_overlap
        if overlap is not None and (isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 0):
            raise ValueError(f"`chunk_overlap` must be a whole number of at least 0, but is {overlap!r}.")
        if overlap is not None and length is not None and overlap >= length:
            raise ValueError(
                f"`chunk_overlap` must be smaller than `max_length`, the tokens of a chunk, but is {overlap} of {length}."
            )
        size = self.bank_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 2):
            raise ValueError(f"`bank_size` must be a whole number of at least 2, but is {size!r}.")
        self._check_kinds()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {getattr(self, name)!r}.")
        if self.token_out_to_loss == "exact" and self.token_reduction != "sum":
            raise ValueError(
                "`token_out_to_loss='exact'` needs token_reduction='sum', since the loss it makes exact is a sum over tokens, but `token_reduction` "
                f"is {self.token_reduction!r}. Set both, or leave `token_out_to_loss` at 'mean'."
            )
        if self.parameters == ():
            raise ValueError(
                "`parameters` is an empty list, which selects nothing; leave it out to select all trainable parameters."
            )
        if self.text_columns is not None and not 1 <= len(self.text_columns) <= 2:
            raise ValueError(f"`text_columns` takes one column or two, but has {len(self.text_columns)}.")
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"These files have format version {self.format_version}, and this hf_trak reads version {FORMAT_VERSION}. "
                "Upgrade hf_trak, or featurize again."
            )

    def _check_kinds(self) -> None:
        """Check the fields that are names, lists of names and whole numbers: JSON and YAML hold anything.

        Raises:
            ValueError: Naming the first field of another kind.
        """
        for name in ("sketch_seed", "bank_seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"`{name}` must be a whole number, but is {value!r}.")
        for name in ("task", "projector", "image_column", "label_column"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name in ("task", "projector")):
                raise ValueError(f"`{name}` must be a name, but is {value!r}.")
        for name in ("parameters", "text_columns", "label_names"):
            wrong = [value for value in getattr(self, name) or () if not isinstance(value, str)]
            if wrong:
                raise ValueError(f"`{name}` must be names, but has {wrong[0]!r}.")
        if not isinstance(self.skip_unscored, bool):
            raise ValueError(f"`skip_unscored` must be true or false, but is {self.skip_unscored!r}.")
        if not isinstance(self.columns_read, (dict, type(None))):
            raise ValueError(f"`columns_read` must be a dict, but is {self.columns_read!r}.")

    @classmethod
    def published(cls, **changes: Any) -> TrakConfig:
        """Return the configuration of TRAK as Park et al. (2023) published it: a dense sketch of random signs, no damping, the mean influence
        over members times their mean 1 − p.

        The rest of the recipe is not the configuration's: its members are the final checkpoints of runs on random halves of the training
        set (`members="subsets:M"`), and no `base` is given. A larger `proj_dim` is not better without damping.

        ```python
        >>> TrakConfig.published(proj_dim=512).projector
        'dense_rademacher'
        ```

        Args:
            changes: Other fields, such as `proj_dim`; or `projector="block_count_sketch"`, which is faster and serves as well.
        """
        values: dict[str, Any] = {
            "projector": "dense_rademacher",
            "damping": 0.0,
            "out_to_loss_power": 1.0,
            "combination": "means",
        }
        return cls(**(values | changes))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary.

        ```python
        >>> TrakConfig(proj_dim=512).to_dict()["proj_dim"]
        512
        ```
        """
        defaults = {f.name: f.default for f in fields(self) if f.name in _LATER}
        values = {key: value for key, value in asdict(self).items() if key not in defaults or value != defaults[key]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def identity(self) -> dict[str, Any]:
        """Return what decides the rows of an index, but for what `build` finds out and records elsewhere, and the damping.

        ```python
        >>> TrakConfig(damping=1.0).identity() == TrakConfig(damping=3.0).identity()
        True
        ```
        """
        return {key: value for key, value in self.to_dict().items() if key not in _NOT_OF_ROWS}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrakConfig:
        """Build a configuration from [`~TrakConfig.to_dict`]'s result.

        ```python
        >>> TrakConfig.from_dict({"proj_dim": 512}) == TrakConfig(proj_dim=512)
        True
        ```

        Raises:
            ValueError: If a field is unknown or has an impossible value.
        """
        version = values.get("format_version", FORMAT_VERSION)
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown and version == FORMAT_VERSION:
            raise ValueError(f"Unknown fields in a TrakConfig: {', '.join(unknown)}.")
        # Fields of another version are left to the version check, which has the better message.
        return cls(**{key: value for key, value in values.items() if key not in unknown})

    def save_pretrained(
        self, folder: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **pushing: Any
    ) -> None:
        """Write `trak_config.json` into `folder`.

        ```python
        >>> TrakConfig(proj_dim=512).save_pretrained("my-config")
        ```

        Args:
            push_to_hub (`bool`): Push it to the Hub, too.
            repo_id (`str`, *optional*): Where to; by default, the name of `folder` under the account that is logged in.
            pushing: Of [`~TrakConfig.push_to_hub`].
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CONFIG_NAME).write_text(self._text())
        if push_to_hub:
            self.push_to_hub(repo_id or Path(folder).name, **pushing)

    def _text(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload TrakConfig",
    ) -> str:
        """Upload `trak_config.json` to a dataset repository, which is made if need be, and return the URL of the commit or pull request."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        name = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        commit = api.upload_file(
            path_or_fileobj=self._text().encode(),
            path_in_repo=CONFIG_NAME,
            repo_id=name,
            repo_type="dataset",
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
        return str(commit.pr_url or commit.commit_url)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> TrakConfig:
        """Read `trak_config.json` from a folder or a dataset repository of the Hub.

        ```python
        >>> TrakConfig.from_pretrained("my-index").proj_dim
        64
        ```

        Args:
            revision, token, cache_dir, local_files_only, force_download (*optional*): Of a repository, as huggingface_hub takes them.

        Raises:
            FileNotFoundError: If there is none, or it cannot be fetched.
            ValueError: If the file is damaged, or of another format version.
        """
        folder = Path(name_or_path) if isinstance(name_or_path, str) else name_or_path
        path = folder / CONFIG_NAME
        if isinstance(name_or_path, str) and not folder.exists() and name_or_path.count("/") <= 1:
            access = {"cache_dir": cache_dir, "local_files_only": local_files_only, "force_download": force_download}
            path = _fetch(name_or_path, revision=revision, token=token, **access)
        elif not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}, so it is not an attribution index.")
        try:
            values = json.loads(path.read_bytes())
            if not isinstance(values, dict):
                raise ValueError(f"it holds {str(values)[:60]}")
            if "format_version" not in values:
                raise ValueError("it has no format_version")
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise _damaged(path, str(reason)) from error
        try:
            return cls.from_dict(values)
        except TypeError as error:
            raise _damaged(path, f"a field has the wrong type ({error})") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def differences(self, other: TrakConfig) -> list[str]:
        """Return one line per field that makes features of `other` incomparable with features of this configuration.

        ```python
        >>> TrakConfig(proj_dim=512).differences(TrakConfig(proj_dim=256))
        ['proj_dim: 512 here, 256 there']
        ```
        """
        mine, theirs = ({**asdict(config), **config.to_dict()} for config in (self, other))
        return [
            f"{name}: {mine[name]!r} here, {theirs[name]!r} there"
            for name in mine
            if name not in _CHOSEN_AFTER and mine[name] != theirs[name]
        ]
