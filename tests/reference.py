"""Slow float64 implementations of the equations, as a reference for tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def to_double(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in batch.items()
    }


def gradient_loop(
    model: nn.Module, batch: Mapping[str, Any], output_function: Callable[..., tuple[Tensor, Tensor]], names: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, out-to-loss and flattened gradients, from one float64 forward and backward pass per example."""
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    chosen = [parameters[name].requires_grad_(True) for name in names]
    batch = to_double(batch)
    batch_size = next(len(value) for value in batch.values() if isinstance(value, Tensor))
    outputs, out_to_losses, rows = [], [], []
    for i in range(batch_size):
        one = {key: value[i : i + 1] if isinstance(value, Tensor) else value for key, value in batch.items()}
        output, out_to_loss = output_function(model, one)
        grads = torch.autograd.grad(output.sum(), chosen, allow_unused=True)
        rows.append(
            torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(chosen, grads, strict=True)])
        )
        outputs.append(output.detach())
        out_to_losses.append(out_to_loss.detach())
    return torch.cat(outputs), torch.cat(out_to_losses), torch.stack(rows)


def trak_scores(
    features_per_member: Sequence[np.ndarray],
    query_features_per_member: Sequence[np.ndarray],
    out_to_loss_per_member: Sequence[np.ndarray],
    damping: float,
) -> np.ndarray:
    r"""Return $\left[\frac1M\sum_m \Phi_m (\Phi_m^\top\Phi_m + \lambda\bar\mu_m I)^{-1}\phi_m(z)\right]\left[\frac1M\sum_m Q_m\right]$."""
    n_members = len(features_per_member)
    product = 0.0
    for features, queries in zip(features_per_member, query_features_per_member, strict=True):
        features, queries = features.astype(np.float64), queries.astype(np.float64)
        n, proj_dim = features.shape
        gram = features.T @ features
        mean_eigenvalue = np.trace(gram) / min(n, proj_dim)
        product = product + features @ np.linalg.inv(gram + damping * mean_eigenvalue * np.eye(proj_dim)) @ queries.T
    mean_out_to_loss = sum(values.astype(np.float64) for values in out_to_loss_per_member) / n_members
    return product / n_members * mean_out_to_loss[:, None]


def scaled_scores(
    features_per_member: Sequence[np.ndarray],
    query_features_per_member: Sequence[np.ndarray],
    out_to_loss_per_member: Sequence[np.ndarray],
    damping: float,
    power: float,
) -> np.ndarray:
    r"""Return $\frac1M\sum_m Q_m^p\,\bar r / r_m\,\Phi_m (\Phi_m^\top\Phi_m + \lambda\bar\mu_m I)^{-1}\phi_m(z)$, where $r_m$ is the root
    mean square of the influences of a query over the training set, and $\bar r$ is its mean over members."""
    influences = []
    for features, queries in zip(features_per_member, query_features_per_member, strict=True):
        ones = [np.ones(len(features))]
        influences.append(trak_scores([features], [queries], ones, damping))
    sizes = np.stack([np.sqrt((influence**2).mean(0)) for influence in influences])
    weights = [values.astype(np.float64) ** power for values in out_to_loss_per_member]
    scaled = [i * sizes.mean(0) / size * w[:, None] for i, size, w in zip(influences, sizes, weights, strict=True)]
    return sum(scaled) / len(scaled)


def madrylab_scores(
    grads_per_member: Sequence[np.ndarray],
    query_grads_per_member: Sequence[np.ndarray],
    signs_per_member: Sequence[np.ndarray],
    out_to_loss_per_member: Sequence[np.ndarray],
) -> np.ndarray:
    """Return the scores of MadryLab/trak 0.3.2 with lambda_reg = 0, in float64.

    Features are divided by the square root of the number of parameters, and each inverse Gram matrix by its mean absolute entry.

    Args:
        grads_per_member: (n, grad_dim) each.
        signs_per_member: (grad_dim, proj_dim) each, of entries ±1.
    """
    n_members = len(grads_per_member)
    product = 0.0
    for grads, queries, signs in zip(grads_per_member, query_grads_per_member, signs_per_member, strict=True):
        scale = np.sqrt(grads.shape[1])
        features = grads.astype(np.float64) @ signs / scale
        query_features = queries.astype(np.float64) @ signs / scale
        inverse = np.linalg.inv(features.T @ features)
        inverse /= np.abs(inverse).mean()
        product = product + features @ inverse @ query_features.T
    mean_out_to_loss = sum(values.astype(np.float64) for values in out_to_loss_per_member) / n_members
    return product / n_members * mean_out_to_loss[:, None]


def corrected_scores(
    features_per_member: Sequence[np.ndarray],
    query_features_per_member: Sequence[np.ndarray],
    out_to_loss_per_member: Sequence[np.ndarray],
    damping: float,
    *,
    residual_weighting: bool,
    leverage: bool,
) -> np.ndarray:
    r"""Return scores with the weights of a one-step Newton approximation of logistic regression (Pregibon, 1981).

    $\frac1M\sum_m \phi_i^\top (\Phi^\top R\Phi + \lambda\bar\mu I)^{-1}\phi(z) / (1 - h_i)$, times the mean of Q, with
    $h_i = R_{ii}\,\phi_i^\top(\cdot)^{-1}\phi_i$ and $R_{ii} = p_i(1 - p_i)$, or 1 without residual weighting.
    """
    product = 0.0
    for features, queries, q in zip(features_per_member, query_features_per_member, out_to_loss_per_member, strict=True):
        features, queries, q = features.astype(np.float64), queries.astype(np.float64), q.astype(np.float64)
        residuals = q * (1 - q) if residual_weighting else np.ones(len(q))
        gram = features.T @ np.diag(residuals) @ features
        mean_eigenvalue = np.trace(gram) / min(features.shape)
        inverse = np.linalg.inv(gram + damping * mean_eigenvalue * np.eye(len(gram)))
        influence = features @ inverse @ queries.T
        if leverage:
            influence /= (1 - residuals * np.einsum("ij,jk,ik->i", features, inverse, features))[:, None]
        product = product + influence
    mean_out_to_loss = sum(values.astype(np.float64) for values in out_to_loss_per_member) / len(out_to_loss_per_member)
    return product / len(features_per_member) * mean_out_to_loss[:, None]


def label_suspicion(
    features_per_member: Sequence[np.ndarray],
    outputs_per_member: Sequence[np.ndarray],
    damping: float,
    held_out_features_per_member: Sequence[np.ndarray] | None = None,
    n_iterations: int = 4,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return score, evidence and doubt of each row as defined in hf_trak/scoring/label_errors.py, leaving out rows one by one."""
    n = len(features_per_member[0])
    support, from_held_out, leverage = np.zeros((n, n)), np.zeros(n), np.zeros(n)
    for number, member in enumerate(features_per_member):
        phi = member.astype(np.float64)
        damped = phi.T @ phi
        damped += damping * np.trace(damped) / min(phi.shape) * np.eye(phi.shape[1])
        for i, row in enumerate(phi):
            without = np.linalg.inv(damped - np.outer(row, row))
            support[i] += [0.0 if i == j else other @ without @ row for j, other in enumerate(phi)]
            leverage[i] += row @ np.linalg.inv(damped) @ row
            if held_out_features_per_member is not None:
                held_out = held_out_features_per_member[number].astype(np.float64)
                from_held_out[i] += sum(query @ np.linalg.inv(damped) @ row for query in held_out)
    n_members = len(features_per_member)
    root = np.sqrt(leverage / n_members)
    trust = np.ones(n)
    for _ in range(n_iterations + 1):
        mine = support @ trust / n_members / root
        evidence = mine / mine.std()
        trust = np.tanh(evidence)
    doubt = 1 / (1 + np.exp(np.mean(np.float64(outputs_per_member), axis=0)))
    doubted, opposed = ranks_of(doubt), ranks_of(-evidence)
    if held_out_features_per_member is None:
        return (doubted + opposed) / 2, evidence, doubt
    held_out = from_held_out / root / np.std(from_held_out / root)
    against = ranks_of(-held_out)
    correlations = np.corrcoef([doubted, opposed, against])
    of_doubt, of_support = np.clip(correlations[:2, 2] / correlations[0, 1], 0, 1) ** 4
    if correlations[0, 1] <= 0:
        of_doubt, of_support = (correlations[:2, 2] > 0).astype(float)
    score = (2 * of_doubt * doubted + of_support * opposed + against) / (2 * of_doubt + of_support + 1)
    return score, evidence + held_out, doubt


def ranks_of(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value divided by their number. Equal values have their mean rank."""
    return np.array([(np.sum(values < v) + np.sum(values <= v) + 1) / 2 / len(values) for v in values])
