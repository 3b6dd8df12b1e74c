"""PEFT adapters as checkpoints: the adapter's weights on its base model, with the adapter's parameters alone trainable."""

from __future__ import annotations

from typing import Any

_WEIGHTS = "adapter_model.safetensors"


def is_adapter(source: str, revision: str | None = None) -> bool:
    """Return whether a folder or repository holds an adapter."""
    from transformers.utils import find_adapter_config_file

    try:
        return find_adapter_config_file(source, revision=revision) is not None
    except OSError:  # no folder and no repository: loading the configuration has the better message
        return False


def load_adapter(source: str, revision: str | None = None) -> Any:
    """Load an adapter onto the base model that it names.

    The folder must also hold the `config.json` of the base model as it was trained, as a snapshot of an `AttributionTrainer` does: an
    adapter alone does not say what class it was added to, nor how many labels that had.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If the adapter does not say what it was added to, or its weights are not in safetensors.
    """
    import transformers
    from transformers.utils import cached_file

    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(f"{source} is a PEFT adapter; install peft to load it.") from error
    # peft would go on to a pickle.
    if cached_file(source, _WEIGHTS, revision=revision, _raise_exceptions_for_missing_entries=False) is None:
        raise ValueError(f"{source} holds no {_WEIGHTS}: weights are loaded from safetensors only. Save the adapter again.")
    adapter = PeftConfig.from_pretrained(source, revision=revision)
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} is an adapter that does not say what model class it was added to: it holds no config.json. Load the model "
            "yourself and pass it as `model`, or save the base model's configuration there."
        ) from error
    name = (config.architectures or ["no class"])[0]
    if not adapter.base_model_name_or_path or not hasattr(transformers, name):
        raise ValueError(
            f"{source} is an adapter of {name} on {adapter.base_model_name_or_path or 'a model in memory'}, which cannot be loaded. "
            "Load the model yourself and pass it as `model`."
        )
    base = getattr(transformers, name).from_pretrained(
        adapter.base_model_name_or_path, config=config, revision=adapter.revision, use_safetensors=True
    )
    return PeftModel.from_pretrained(base, source, revision=revision, is_trainable=True)
