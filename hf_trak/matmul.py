"""Products of float32 matrices by oneDNN, on CPUs where it is faster than MKL.

torch multiplies float32 matrices with MKL, which does not use AVX-512 on CPUs that are not from Intel. torch also contains oneDNN, which
does, and is twice as fast on a Zen 5 core (docs/evidence/performance.md). The choice depends only on the operands and the machine, not on
the number of threads or on a measurement. So a run gives the same bits for any number of processes.
`torch.backends.mkldnn.enabled = False`, a setting of torch, turns it off.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# Number of multiplications from which on a call is worth its overhead. For batches it is larger, because MKL needs one call per batch.
_WORTH_A_CALL, _WORTH_A_CALL_EACH = 1 << 18, 1 << 22
# Products are summed in pieces of the inner axis of this length, as in MKL. The error is then at most twice MKL's (1.7 times, measured up to
# 20,000). oneDNN also does not divide these sums among threads, which would change bits (seen at 30,522, not at 16,384).
_INNER = 1 << 10


@cache
def onednn_is_faster() -> bool:
    """Return whether this machine uses oneDNN for float32 products: an AMD CPU with AVX-512, and a torch with the operator."""
    # The operator belongs to torch's compiler, so a release may lack it.
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return "AMD" in _cpu_name() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _cpu_name() -> str:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # in recent releases
    return str(capabilities.get("cpu_name", platform.processor()))


def serves(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, *, worth: int | None = None) -> bool:
    """Return whether [`linear`] can compute a product faster than `torch.nn.functional.linear`.

    Args:
        worth (`int`, *optional*): Minimum number of multiplications; by default, enough to hide the overhead of a call.
    """
    operands = [inputs, weight] if bias is None else [inputs, weight, bias]
    return (
        inputs.numel() * weight.shape[0] >= (_WORTH_A_CALL if worth is None else worth)
        and all(_is_plain(operand) for operand in operands)
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster()
    )


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def linear(
    inputs: Float[Tensor, "rows inner"], weight: Float[Tensor, "columns inner"], bias: Float[Tensor, " columns"] | None = None
) -> Float[Tensor, "rows columns"]:
    """Return `inputs @ weight.T + bias` by oneDNN, for any strides, without gradients. Call it only if [`serves`] returns true."""
    result = _multiply(inputs[:, :_INNER], weight[:, :_INNER], bias)
    for first in range(_INNER, inputs.shape[1], _INNER):
        result += _multiply(inputs[:, first : first + _INNER], weight[:, first : first + _INNER], None)
    return result


def _multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, _without_gaps(weight), bias, "none", [], "")


def _without_gaps(weight: Float[Tensor, "columns inner"]) -> Float[Tensor, "columns inner"]:
    """Copy a slice of a larger matrix, because oneDNN is a thousand times slower on matrices with gaps."""
    return weight if weight.is_contiguous() or weight.T.is_contiguous() else weight.contiguous()


def inner_products(rows: Float[Tensor, "n inner"], others: Float[Tensor, "m inner"]) -> Float[Tensor, "n m"]:
    """Return `rows @ others.T`. The library does not depend on the number of rows, so the last block of a file is treated like the others."""
    return linear(rows, others) if serves(rows, others, worth=1) else rows @ others.T


class _FrozenLinear(torch.autograd.Function):
    """[`linear`] with a gradient for `inputs`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, None, None]:
        return _FrozenLinear.apply(grads, ctx.saved_tensors[0].t(), None), None, None


def frozen_linear(
    inputs: Float[Tensor, "*batch inner"], weight: Float[Tensor, "columns inner"], bias: Float[Tensor, " columns"] | None
) -> Float[Tensor, "*batch columns"]:
    """`torch.nn.functional.linear` with the faster library, for a weight and bias that need no gradient."""
    if not serves(inputs, weight, bias):
        return F.linear(inputs, weight, bias)
    flat = _FrozenLinear.apply(inputs.reshape(-1, inputs.shape[-1]), weight, bias)
    return flat.view(*inputs.shape[:-1], weight.shape[0])


def one_by_one(left: Float[Tensor, "batch rows inner"], right: Float[Tensor, "batch inner columns"]) -> bool:
    """Return whether [`bmm`] is faster if it gets the pairs of a batch one by one."""
    each = left.shape[1] * left.shape[2] * right.shape[2]
    return len(left) > 0 and each >= _WORTH_A_CALL_EACH and serves(left[0], right[0].t())


def bmm(
    left: Float[Tensor, "batch rows inner"], right: Float[Tensor, "batch inner columns"]
) -> Float[Tensor, "batch rows columns"]:
    """`torch.bmm`; a single pair uses the faster library."""
    if len(left) == 1 and serves(left[0], right[0].t()):
        return linear(left[0], right[0].t()).unsqueeze(0)
    return torch.bmm(left, right)
