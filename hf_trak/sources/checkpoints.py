"""Checkpoints: the model that a folder or repository holds, and the tokenizer or image processor saved beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_trak.processes.garbage import uncollected
from hf_trak.sources.adapters import is_adapter, load_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@uncollected()
def load_model(source: str, revision: str | None = None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the class a checkpoint names in its `architectures`, from safetensors; an adapter on its base model.

    Args:
        trust_remote_code (`bool`): Run code that the checkpoint brings along, if the class is defined there.

    Raises:
        FileNotFoundError: If there is no checkpoint at `source`.
        ValueError: If it names no class of transformers or `hf_trak.models`.
    """
    import transformers

    import hf_trak.models

    if is_adapter(source, revision):
        return load_adapter(source, revision)

    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{source!r} is neither a folder here nor a model repository within reach: {reason}") from error
    names = config.architectures or []
    for name in names:
        for library in (transformers, hf_trak.models):
            if hasattr(library, name):
                return getattr(library, name).from_pretrained(source, revision=revision, use_safetensors=True)
    own = next(
        (where for where in (getattr(config, "auto_map", None) or {}).values() if str(where).split(".")[-1] in names), None
    )
    if own is not None and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        found = get_class_from_dynamic_module(own, source, revision=revision)
        return found.from_pretrained(source, revision=revision, use_safetensors=True)
    brought = (
        ""
        if own is None
        else " It brings code of its own: if you trust that, pass trust_remote_code=True (--trust_remote_code)."
    )
    raise ValueError(
        f"{source} names {', '.join(names) or 'no class'} as its architecture, which transformers does not have.{brought} Load the "
        "model yourself and pass it as `model`."
    )


def load_processing_class(source: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer, image processor or both that are saved beside a checkpoint; None if there is none.

    Raises:
        ValueError: If it is code of its own that is not trusted.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                f"The tokenizer or image processor of {source} is code of its own: if you trust that, pass trust_remote_code=True "
                "(--trust_remote_code). Or give your own as `processing_class`."
            ) from error
        return None
