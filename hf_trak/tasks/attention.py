"""Attention that `vmap` can trace.

transformers 5 looks at the values of a 2-D attention mask to skip masking where it can; a value inside `vmap` cannot be looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_TRACEABLE = ("sdpa", "eager")
_ALWAYS = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


@contextmanager
def vmappable_attention(model: nn.Module) -> Iterator[None]:
    """Build masks whole and never inspect them, in plain or scaled-dot-product attention; restore what was there.

    The implementation keeps its name, by which some models decide what they compute. Of scaled-dot-product attention, the plain form is
    used, for which `vmap` has rules; the fused ones would run example by example. Other models of this process build their masks
    whole meanwhile, which changes no result.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import AttentionMaskInterface, PreTrainedModel

    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    if not isinstance(model, PreTrainedModel):
        yield
        return
    implementation = model.config._attn_implementation
    is_other = implementation is not None and implementation not in _TRACEABLE
    masks = AttentionMaskInterface()
    before = {name: masks[name] for name in _TRACEABLE}
    if is_other:
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    for name, make in before.items():
        AttentionMaskInterface.register(name, _whole(make))
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for name, make in before.items():
            AttentionMaskInterface.register(name, make)
        if is_other:
            model.set_attn_implementation(implementation)


def _whole(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a maker of masks that skips none."""

    def mask(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **{**kwargs, **_ALWAYS})

    return mask
