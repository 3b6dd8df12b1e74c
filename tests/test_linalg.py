from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from hf_trak.linalg import DEFAULT_DAMPING, accumulate_gram, damped, factor, leverage, mean_eigenvalue, solve


def make_features(n_rows: int, proj_dim: int, *, seed: int = 0, spread: float = 3.0) -> Tensor:
    """Rows whose Gram matrix has eigenvalues over `spread` powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -spread / 2, proj_dim, dtype=torch.float64)
    return torch.randn(n_rows, proj_dim, generator=generator, dtype=torch.float64) * scale


def gram_of(features: Tensor) -> Tensor:
    return accumulate_gram(torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64), features)


def assert_close(actual: Tensor, expected: np.ndarray, *, relative: float) -> None:
    assert torch.isfinite(actual).all()
    error = np.linalg.norm(actual.numpy() - expected) / np.linalg.norm(expected)
    assert error < relative, f"relative error {error:.1e}"


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-6)])
def test_the_gram_is_a_sum_of_outer_products(dtype: torch.dtype, relative: float):
    features = make_features(50, 8).to(dtype)
    exact = features.double().numpy()
    assert_close(gram_of(features), exact.T @ exact, relative=relative)


def test_the_gram_is_summed_in_place_and_over_any_split_into_blocks():
    features = make_features(60, 8)
    gram = torch.zeros(8, 8, dtype=torch.float64)
    for block in features.split([1, 20, 39]):
        assert accumulate_gram(gram, block) is gram
    assert_close(gram, gram_of(features).numpy(), relative=1e-14)


def test_blocks_are_summed_in_float64():
    # In float32, 1 + 1e-8 is 1.
    gram = torch.zeros(1, 1, dtype=torch.float64)
    accumulate_gram(gram, torch.ones(1, 1))
    for _ in range(100):
        accumulate_gram(gram, torch.full((1, 1), 1e-4))
    assert gram.item() == pytest.approx(1 + 1e-6, abs=1e-12)


def test_half_precision_rows_do_not_overflow_the_gram():
    assert gram_of(torch.full((4, 2), 60_000.0, dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize(("n_rows", "proj_dim"), [(30, 8), (5, 8)])
def test_the_mean_eigenvalue_is_that_of_the_nonzero_ones(n_rows: int, proj_dim: int):
    gram = gram_of(make_features(n_rows, proj_dim))
    eigenvalues = np.linalg.eigvalsh(gram.numpy())[-min(n_rows, proj_dim) :]
    assert mean_eigenvalue(gram, n_rows=n_rows) == pytest.approx(eigenvalues.mean(), rel=1e-12)


@pytest.mark.parametrize(("n_rows", "damping"), [(40, 0.0), (40, 0.5), (40, DEFAULT_DAMPING), (5, 0.01), (5, 3.0)])
def test_solve_multiplies_by_the_inverse_of_the_damped_gram(n_rows: int, damping: float):
    features = make_features(n_rows, 8)
    phi = features.numpy()
    gram = phi.T @ phi
    inverse = np.linalg.inv(gram + damping * np.trace(gram) / min(n_rows, 8) * np.eye(8))
    cholesky = factor(gram_of(features), n_rows=n_rows, damping=damping)
    assert_close(solve(cholesky, features), phi @ inverse, relative=1e-10)
    assert_close(leverage(cholesky, features), np.diag(phi @ inverse @ phi.T), relative=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_solve_is_in_float64_whatever_the_storage(dtype: torch.dtype):
    features = make_features(200, 16, spread=5.0).to(dtype)
    exact = features.double()
    gram = exact.T @ exact
    solved = solve(factor(gram, n_rows=200, damping=0.0), features)
    assert solved.dtype == torch.float64
    assert_close(solved, exact.numpy() @ np.linalg.inv(gram.numpy()), relative=1e-9)


def test_undamped_leverages_sum_to_the_rank_and_lie_in_0_to_1():
    features = make_features(30, 8)
    values = leverage(factor(gram_of(features), n_rows=30, damping=0.0), features)
    assert values.sum().item() == pytest.approx(8, rel=1e-10)
    assert ((values >= 0) & (values <= 1)).all()


def test_scores_do_not_depend_on_the_scale_of_the_features():
    features = make_features(30, 8)
    scores = [
        solve(factor(gram_of(scaled), n_rows=30, damping=2.0), scaled) @ scaled.T for scaled in (features, features * 1e-6)
    ]
    assert_close(scores[1], scores[0].numpy(), relative=1e-10)


def test_damped_leaves_the_gram_as_it_was():
    gram = gram_of(make_features(30, 8))
    before = gram.clone()
    factor(gram, n_rows=30, damping=1.0)
    assert torch.equal(gram, before)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_an_impossible_damping_is_refused(damping: float):
    with pytest.raises(ValueError, match="finite number of at least 0"):
        damped(torch.eye(2, dtype=torch.float64), n_rows=2, damping=damping)


def test_a_gram_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="at least one training example"):
        damped(torch.zeros(2, 2, dtype=torch.float64), n_rows=0, damping=1.0)


def test_fewer_rows_than_proj_dim_without_damping_names_both_ways_out():
    gram = gram_of(make_features(5, 8))
    with pytest.raises(ValueError, match=r"5 training examples is singular at proj_dim=8.*positive damping.*proj_dim below 5"):
        factor(gram, n_rows=5, damping=0.0)


@pytest.mark.parametrize("entry", [0.0, float("nan"), float("inf")])
def test_a_gram_that_is_zero_or_not_finite_is_refused(entry: float):
    with pytest.raises(ValueError, match="zero or not finite"):
        damped(torch.full((2, 2), entry, dtype=torch.float64), n_rows=2, damping=1.0)


def test_linearly_dependent_gradients_without_damping_are_refused():
    features = make_features(40, 8)
    features[:, 7] = features[:, 0] + features[:, 1]
    gram = gram_of(features)
    with pytest.raises(ValueError, match="is singular with damping=0.0.*larger damping"):
        factor(gram, n_rows=40, damping=0.0)
    assert solve(factor(gram, n_rows=40, damping=0.1), features).isfinite().all()


def test_shapes_and_dtypes_of_numeric_functions_are_checked_by_every_test():
    with pytest.raises(TypeCheckError, match="gram"):
        mean_eigenvalue(torch.zeros(2, 3, dtype=torch.float64), n_rows=1)
    with pytest.raises(TypeCheckError, match="features"):
        solve(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(3, 3))
