"""The Gram matrix and its damped inverse, in float64."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

DEFAULT_DAMPING = 3.0
"""The value of `damping="auto"` if no subset masks are recorded. The best λ of one checkpoint was 1.8 to 5.9 at every `proj_dim` that was
tried (see docs/evidence/decisions.md)."""

LARGE_ENSEMBLE = 10
LARGE_ENSEMBLE_DAMPING = 1.0
"""The value from ten checkpoints on. Averaging reduces the need for damping (see docs/evidence/decisions.md)."""


def default_damping(n_checkpoints: int) -> float:
    """Return the default λ for an ensemble of `n_checkpoints` checkpoints."""
    return DEFAULT_DAMPING if n_checkpoints < LARGE_ENSEMBLE else LARGE_ENSEMBLE_DAMPING


def accumulate_gram(
    gram: Float64[Tensor, "proj_dim proj_dim"], features: Float[Tensor, "rows proj_dim"]
) -> Float64[Tensor, "proj_dim proj_dim"]:
    r"""Add $\Phi^\top\Phi$ of one block of rows to `gram`, in place: float32 products of the block, float64 sum over blocks.

    Float64 features are multiplied in float64.
    """
    block = features.float() if features.dtype == torch.float16 else features
    return gram.add_(block.T @ block)


def mean_eigenvalue(gram: Float64[Tensor, "proj_dim proj_dim"], *, n_rows: int) -> float:
    r"""Return $\bar\mu$, the Gram matrix's mean nonzero eigenvalue: trace / min(n_rows, proj_dim)."""
    return gram.diagonal().sum().item() / min(n_rows, gram.shape[0])


def damped(gram: Float64[Tensor, "proj_dim proj_dim"], *, n_rows: int, damping: float) -> Float64[Tensor, "proj_dim proj_dim"]:
    r"""Return $\Phi^\top\Phi + \lambda\bar\mu I$.

    Raises:
        ValueError: If `damping` is negative or not finite, the Gram matrix holds no rows, or no gradient is nonzero.
        ValueError: If `damping` is 0 and there are fewer rows than `proj_dim`, so that the Gram matrix is singular.
    """
    proj_dim = gram.shape[0]
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"`damping` must be a finite number of at least 0, or 'auto', but is {damping}.")
    if n_rows < 1:
        raise ValueError("The Gram matrix was built from 0 rows; featurize at least one training example.")
    if damping == 0 and n_rows < proj_dim:
        raise ValueError(
            f"With damping=0 the Gram matrix of {n_rows} training examples is singular at proj_dim={proj_dim}: its rank is at most "
            f"{n_rows}. Use a positive damping (damping='auto' is the default), or featurize with proj_dim below {n_rows}."
        )
    scale = mean_eigenvalue(gram, n_rows=n_rows)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"The Gram matrix's mean eigenvalue is {scale}, so nothing can be attributed: every training gradient is zero or not "
            "finite. Check that the model's outputs depend on the selected parameters."
        )
    result = gram.clone()
    result.diagonal().add_(damping * scale)
    return result


def factor(gram: Float64[Tensor, "proj_dim proj_dim"], *, n_rows: int, damping: float) -> Float64[Tensor, "proj_dim proj_dim"]:
    r"""Return the lower Cholesky factor of $\Phi^\top\Phi + \lambda\bar\mu I$; factor once, solve many.

    Args:
        gram (`torch.Tensor`): $\Phi^\top\Phi$, summed (not averaged) over the training set, float64.
        n_rows (`int`): Number of training examples in the sum.
        damping (`float`): $\lambda$, as a multiple of the Gram matrix's mean nonzero eigenvalue $\bar\mu$. The paper uses 0.

    Raises:
        ValueError: As [`damped`], and if the damped Gram matrix is singular in float64.
    """
    cholesky, info = torch.linalg.cholesky_ex(damped(gram, n_rows=n_rows, damping=damping))
    pivots = cholesky.diagonal()
    # A pivot this small is round-off: the solve would return finite but meaningless numbers.
    singular = info.item() != 0 or (pivots.min() / pivots.max()).item() ** 2 < gram.shape[0] * torch.finfo(gram.dtype).eps
    if singular:
        raise ValueError(
            f"The Gram matrix of {n_rows} training examples at proj_dim={gram.shape[0]} is singular with damping={damping}: some "
            "gradients are linear combinations of others. Use a larger damping (damping='auto' is the default) or a smaller proj_dim."
        )
    return cholesky


def solve(
    cholesky: Float64[Tensor, "proj_dim proj_dim"], features: Float[Tensor, "rows proj_dim"]
) -> Float64[Tensor, "rows proj_dim"]:
    r"""Right-multiply `features` by the inverse of the factored Gram matrix, in float64 whatever the storage dtype.

    The Gram matrix's condition number is the square of that of $\Phi$, so float32 is not enough. Source: Park et al. (2023),
    [TRAK](https://huggingface.co/papers/2303.14186), Algorithm 1.
    """
    return torch.cholesky_solve(features.to(cholesky.dtype).T, cholesky).T


def leverage(
    cholesky: Float64[Tensor, "proj_dim proj_dim"], features: Float[Tensor, "rows proj_dim"]
) -> Float64[Tensor, " rows"]:
    r"""Return $\phi^\top (\Phi^\top\Phi + \lambda\bar\mu I)^{-1} \phi$ of each row: its influence on its own output, before $Q$."""
    half = torch.linalg.solve_triangular(cholesky, features.to(cholesky.dtype).T, upper=False)
    return half.square().sum(0)
