"""Checkpoints: loading the model of a folder or repository with all its weights, and describing the configuration that determines its outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_trak.runtime import uncollected
from hf_trak.sources.adapters import load_adapter
from hf_trak.sources.processors import load_processing_class
from hf_trak.sources.repositories import Listing, look_up, reached
from hf_trak.sources.weights import load_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


# Fields that do not change a model's outputs: its origin, the software that wrote it, settings of training and generation, the dtype.
_IGNORED = frozenset(
    {
        "architectures",
        "auto_mapping",
        "dtype",
        "finetuning_task",
        "gradient_checkpointing",
        "inference_mode",
        "output_attentions",
        "output_hidden_states",
        "peft_version",
        "problem_type",  # set by the first loss that a model computes; the task records the same
        "quantization_config",  # an object with many optional fields; the quantized weights are hashed
        "return_dict",
        "revision",
        "task_specific_params",
        "task_type",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def describe_model_config(model: Any) -> dict[str, Any]:
    """Return the fields of a model's configuration, and of its adapters', that determine its outputs, JSON-able; empty without one."""
    found = _described(getattr(model, "config", None))
    adapters = getattr(model, "peft_config", None)
    if isinstance(adapters, Mapping):
        found["adapters"] = {str(name): _described(adapter) for name, adapter in adapters.items()}
    return found


def _described(config: Any) -> dict[str, Any]:
    to_dict = getattr(config, "to_dict", None)
    values = to_dict() if callable(to_dict) else config if isinstance(config, dict) else {}
    return _kept(json.loads(json.dumps(values, default=_as_json, sort_keys=False)))


def _kept(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _kept(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _IGNORED and not key.startswith("_") and not key.endswith("name_or_path")
    }


def _as_json(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    to_dict = getattr(value, "to_dict", None)
    return to_dict() if callable(to_dict) else str(value)


__all__ = ["load_model", "load_processing_class", "register_model_class"]

_REGISTERED: dict[str, type] = {}


def register_model_class(kind: type) -> None:
    """Register a custom class, so that its checkpoints can be loaded by name. Call this in every process that loads them.

    The configuration must be one of transformers, or registered with `transformers.AutoConfig`.

    Raises:
        ValueError: If transformers, or another module, has a class of this name.
    """
    found = find_model_class(kind.__name__)
    if found is not None and found.__module__ != kind.__module__:  # the same module may be loaded again
        raise ValueError(f"Checkpoints that name {kind.__name__} are those of {found.__module__}. Give the class another name.")
    _REGISTERED[kind.__name__] = kind


def find_model_class(name: str) -> Any:
    """Return the class of this name in transformers or among the registered ones; None if there is none."""
    import transformers

    return getattr(transformers, name, None) or _REGISTERED.get(name)


def load_model(source: str, revision: str | None = None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the class that a checkpoint names in its `architectures` from safetensors. An adapter is loaded on its base model.

    Args:
        trust_remote_code (`bool`): Run code from the checkpoint's folder or repository, if the class is defined there.

    Raises:
        FileNotFoundError: If there is no checkpoint at `source`.
        ValueError: If it names no class of transformers and none of [`register_model_class`], or if its weights do not fit that class. The
            message names the weights.
    """
    return load_model_and_base_rows(source, revision, trust_remote_code=trust_remote_code)[0]


@uncollected()
def load_model_and_base_rows(
    source: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, dict[str, int]]:
    """Load a checkpoint as [`load_model`] does. For adapters, also return which rows of replaced parameters come from the base model.

    Returns:
        The model, and a dict. For an adapter, it maps names of replaced parameters to the number of leading rows that come from the base
        model; 0 if the base model lacks the parameter. It is empty for other checkpoints.
    """
    listing = look_up(source, revision)
    revision = listing.commit or revision
    with reached(listing):
        if "adapter_config.json" in listing.files:
            return load_adapter(source, listing, revision, trust_remote_code=trust_remote_code)
        return _load(source, listing, revision, trust_remote_code=trust_remote_code), {}


def check_is_checkpoint(source: str, revision: str | None = None) -> None:
    """Check that a folder or repository exists and contains a checkpoint or an adapter, without loading it.

    Raises:
        FileNotFoundError: If it does not.
    """
    listing = look_up(source, revision)
    if "adapter_config.json" not in listing.files:
        _check_holds_config(source, listing)


def _check_holds_config(source: str, listing: Listing) -> None:
    if "config.json" not in listing.files:
        held = ", ".join(sorted(listing.files)[:8]) or "nothing"
        adapters = (
            sorted(path.parent.name for path in Path(source).glob("*/adapter_config.json")) if Path(source).is_dir() else []
        )
        if adapters:  # PEFT saves several adapters of a model in subfolders with their names
            raise FileNotFoundError(
                f"{source} is not a checkpoint: it contains {len(adapters)} adapter{'s' * (len(adapters) > 1)} in subfolders, "
                f"{', '.join(adapters[:8])}. Name one of them: {Path(source) / adapters[0]}."
            )
        raise FileNotFoundError(
            f"{source} holds no config.json, so it is not a checkpoint of transformers; it holds {held}. A folder that "
            "`save_pretrained` or a Trainer wrote (such as checkpoint-500) is expected."
        )


def _load(source: str, listing: Listing, revision: str | None, *, trust_remote_code: bool) -> PreTrainedModel:
    config = _configuration(source, listing, revision, trust_remote_code=trust_remote_code)
    names = config.architectures or []
    if found := next((found for name in names if (found := find_model_class(name)) is not None), None):
        return load_weights(found, source, listing, revision)
    own = next(
        (where for where in (getattr(config, "auto_map", None) or {}).values() if str(where).split(".")[-1] in names), None
    )
    if own is not None and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return load_weights(get_class_from_dynamic_module(own, source, revision=revision), source, listing, revision)
    brought = "" if own is None else " It has its own code: if you trust it, pass trust_remote_code=True (--trust_remote_code)."
    raise ValueError(
        f"{source} names {', '.join(map(str, names)) or 'no class'} as its architecture, which transformers does not have.{brought} Load "
        "the model yourself and pass it as `model`, or import the module that hands its class to `register_model_class`."
    )


def _configuration(source: str, listing: Listing, revision: str | None, *, trust_remote_code: bool) -> PretrainedConfig:
    """Return a checkpoint's configuration.

    Raises:
        FileNotFoundError: If it has none.
        ValueError: If it cannot be read, or if it needs remote code that is not trusted.
    """
    import transformers

    _check_holds_config(source, listing)
    try:
        config: Any = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file can raise any error
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"The configuration of {source} needs code from its repository: if you trust it, pass trust_remote_code=True (--trust_remote_code)."
            ) from error
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ValueError(f"config.json of {source} cannot be read: {reason} ({type(error).__name__}). Restore it.") from error
    if not isinstance(config.architectures, (list, tuple, type(None))):
        raise ValueError(
            f"config.json of {source} is damaged: `architectures` must be a list of names, but is {config.architectures!r}."
        )
    return config
