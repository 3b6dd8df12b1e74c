"""Empirical influence and datamodels: what is planted in the outputs is found, and no subset judges what it was fitted to."""

from functools import partial

import numpy as np
import pytest
from datasets_for_tests import token_rows

from hf_trak.evaluation.baselines import SUBSET_FITS, FromSubsets, cross_fit, datamodel, empirical_influence

N_SUBSETS, N_TRAIN, N_QUERY = 60, 25, 3


def planted(noise=0.1, seed=0, n_subsets=N_SUBSETS):
    """Half-subsets, and outputs that are a sparse linear function of them."""
    generator = np.random.default_rng(seed)
    masks = generator.random((n_subsets, N_TRAIN)).argsort(1) < N_TRAIN // 2
    weights = np.where(generator.random((N_TRAIN, N_QUERY)) < 0.2, generator.normal(0, 2, (N_TRAIN, N_QUERY)), 0)
    return masks, masks @ weights + 100 + noise * generator.normal(size=(n_subsets, N_QUERY)), weights


def test_empirical_influence_is_a_difference_of_means():
    masks, outputs, _ = planted()
    expected = np.array(
        [[outputs[masks[:, i], j].mean() - outputs[~masks[:, i], j].mean() for j in range(N_QUERY)] for i in range(N_TRAIN)]
    )
    np.testing.assert_allclose(empirical_influence(masks, outputs), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(empirical_influence(masks.astype(np.int8), outputs), empirical_influence(masks, outputs))


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_a_datamodel_finds_planted_weights(penalty):
    masks, outputs, weights = planted(noise=0.05)
    found = datamodel(masks, outputs, penalty=penalty)
    # Subsets of one size say nothing of a constant added to every weight.
    found, weights = found - found.mean(0), weights - weights.mean(0)
    assert np.abs(found - weights).max() < 0.3
    for column in range(N_QUERY):
        assert np.corrcoef(found[:, column], weights[:, column])[0, 1] > 0.98


def test_a_ridge_datamodel_with_one_penalty_solves_the_normal_equations():
    masks, outputs, _ = planted(noise=1.0)
    found = datamodel(masks, outputs, penalty="l2", n_penalties=1)
    centered = masks - masks.mean(0)
    gram = centered.T @ centered
    penalty = 1e-3 * np.trace(gram) / min(masks.shape)  # the first of the grid
    expected = np.linalg.solve(gram + penalty * np.eye(N_TRAIN), centered.T @ (outputs - outputs.mean(0)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_a_lasso_datamodel_meets_its_optimality_conditions():
    masks, outputs, _ = planted(noise=0.5)
    weights = datamodel(masks, outputs, n_penalties=5)
    centered = masks - masks.mean(0)
    for column in range(N_QUERY):
        residual = outputs[:, column] - outputs[:, column].mean() - centered @ weights[:, column]
        slopes = centered.T @ residual / N_SUBSETS
        penalty = np.abs(slopes).max()
        used = weights[:, column] != 0
        assert 0 < used.sum() < N_TRAIN
        np.testing.assert_allclose(slopes[used], penalty * np.sign(weights[used, column]), rtol=0.15)


@pytest.mark.parametrize("name", SUBSET_FITS)
def test_fits_do_not_depend_on_the_outputs_level_and_scale_with_them(name):
    masks, outputs, _ = planted()
    scores = SUBSET_FITS[name](masks, outputs)
    np.testing.assert_allclose(SUBSET_FITS[name](masks, 3 * outputs - 700), 3 * scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SUBSET_FITS)
def test_a_query_that_never_changes_has_no_influences(name):
    masks, outputs, _ = planted()
    outputs[:, 1] = 0.1 + 0.2
    scores = SUBSET_FITS[name](masks, outputs)
    assert np.abs(scores[:, 1]).max() < 1e-12
    assert np.abs(scores[:, 0]).max() > 0.1


def test_cross_fitting_holds_every_subset_out_once_and_never_sees_it():
    masks, outputs, _ = planted()
    folds = cross_fit(empirical_influence, masks, outputs, n_folds=4)
    assert sorted(np.concatenate([fold.held_out for fold in folds]).tolist()) == list(range(N_SUBSETS))
    for fold in folds:
        changed = outputs.copy()
        changed[fold.held_out] += np.random.default_rng(1).normal(size=changed[fold.held_out].shape)
        again = [
            other
            for other in cross_fit(empirical_influence, masks, changed, n_folds=4)
            if set(other.held_out) == set(fold.held_out)
        ]
        np.testing.assert_array_equal(again[0].scores, fold.scores)


def test_judging_noise_by_the_subsets_it_was_fitted_to_flatters_it_and_cross_fitting_does_not():
    generator = np.random.default_rng(0)
    masks = generator.random((60, 200)) < 0.5
    outputs = generator.normal(size=(60, 40))  # nothing to be found
    fit = partial(datamodel, penalty="l2")

    def correlation(scores, rows):
        return np.mean(
            [np.corrcoef(masks[rows] @ scores[:, j], outputs[rows, j])[0, 1] for j in range(40) if scores[:, j].any()]
        )

    assert correlation(fit(masks, outputs), np.arange(60)) > 0.5
    held_out = [correlation(fold.scores, fold.held_out) for fold in cross_fit(fit, masks, outputs, n_folds=3)]
    assert abs(np.mean(held_out)) < 0.15  # standard error about 1/√(40 · 60), and predictions of one fold lean together


def test_a_fit_can_be_called_with_two_datasets():
    masks, outputs, _ = planted()
    baseline = FromSubsets(masks, outputs)
    train, queries = token_rows(N_TRAIN), token_rows(N_QUERY)
    np.testing.assert_array_equal(baseline(train, queries), empirical_influence(masks, outputs))
    with pytest.raises(ValueError, match=r"of 25 training examples and 3 queries, but 24 and 3 were given"):
        baseline(train.select(range(24)), queries)


def test_bad_subsets_are_refused_by_name():
    masks, outputs, _ = planted()
    with pytest.raises(ValueError, match=r"they are \(60, 25\) and \(59, 3\)"):
        empirical_influence(masks, outputs[:-1])
    with pytest.raises(ValueError, match="1 and 0, but holds other values"):
        empirical_influence(masks * 2, outputs)
    broken = outputs.copy()
    broken[7, 1] = np.nan
    with pytest.raises(ValueError, match="outputs of 1 subsets, such as subset 7, are not finite"):
        datamodel(masks, broken)
    always = masks.copy()
    always[:, 4] = True
    with pytest.raises(ValueError, match="1 training examples, such as row 4, are in all of the 60 subsets or in none"):
        empirical_influence(always, outputs)
    assert np.isfinite(datamodel(always, outputs)).all()
    with pytest.raises(ValueError, match="'l1' or 'l2', but is 'l3'"):
        datamodel(masks, outputs, penalty="l3")
    with pytest.raises(ValueError, match="4 subsets are too few for 5 folds"):
        datamodel(masks[:4], outputs[:4])
    with pytest.raises(ValueError, match="2 subsets in each to rank"):
        cross_fit(empirical_influence, masks[:5], outputs[:5])
