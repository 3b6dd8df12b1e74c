"""Attention that `vmap` can trace.

transformers 5 looks at the values of a 2-D attention mask to skip masking where it can; a value inside `vmap` cannot be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_NAME = "hf_trak_sdpa"


@contextmanager
def vmappable_attention(model: nn.Module) -> Iterator[None]:
    """Use scaled-dot-product attention with a mask that is always built and never inspected; restore what was there.

    Its plain form is used, for which `vmap` has rules; the fused ones would run example by example.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import PreTrainedModel

    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    if not isinstance(model, PreTrainedModel) or not model._supports_sdpa:
        yield
        return
    _register()
    previous = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        model.set_attn_implementation(previous)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, **kwargs: Any) -> Any:
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    AttentionInterface.register(_NAME, sdpa_attention_forward)
    AttentionMaskInterface.register(_NAME, mask)
