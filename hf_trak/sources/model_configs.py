"""What of a model's configuration decides its outputs, beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Where a model came from, what wrote it, what training or generation left in it, and what the dtype and names of its weights say.
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
        "problem_type",  # the first loss that a model computes writes it; the task says the same
        "quantization_config",  # an object of many optional fields; the quantized weights are hashed
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
    """Return what a model's configuration, and its adapters', say of its outputs, JSON-able; nothing for one without a configuration."""
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
