"""The linear datamodeling score, against SciPy; the reliability of a ground truth."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from hf_trak.evaluation import ground_truth_reliability, lds, predicted_outputs, spearman

N_TRAIN, N_SUBSETS, N_QUERY = 40, 30, 7


@pytest.fixture
def problem():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(N_TRAIN, N_QUERY))
    masks = generator.random((N_SUBSETS, N_TRAIN)) < 0.5
    outputs = masks @ scores + generator.normal(scale=3.0, size=(2, N_SUBSETS, N_QUERY))
    return scores, masks, outputs


def scipy_per_query(left, right):
    return np.array([spearmanr(left[:, query], right[:, query]).statistic for query in range(left.shape[1])])


def test_lds_is_the_mean_of_scipys_spearman_of_summed_scores_and_mean_outputs(problem):
    scores, masks, outputs = problem
    expected = scipy_per_query(masks.astype(float) @ scores, outputs.mean(0))
    result = lds(scores, masks, outputs)
    np.testing.assert_allclose(result.per_query, expected, rtol=0, atol=1e-12)
    assert result.value == pytest.approx(expected.mean(), abs=1e-12)
    assert 0.3 < result.value < 1  # neither nothing nor everything is predicted
    assert result.n_undefined == 0


@pytest.mark.parametrize("levels", [2, 3, 10])
def test_tied_values_share_their_mean_rank_as_in_scipy(levels):
    left, right = np.random.default_rng(levels).integers(levels, size=(2, 50, 20)).astype(float)
    np.testing.assert_allclose(spearman(left, right), scipy_per_query(left, right), rtol=0, atol=1e-12)


def test_scores_that_are_the_outputs_linear_weights_have_an_lds_of_one(problem):
    scores, masks, _ = problem
    result = lds(scores, masks, masks @ scores)
    np.testing.assert_allclose(result.per_query, 1, rtol=0, atol=1e-12)
    assert result.interval == pytest.approx((1, 1), abs=1e-12)
    assert lds(-scores, masks, masks @ scores).value == pytest.approx(-1, abs=1e-12)


def test_an_increasing_function_of_the_outputs_changes_nothing(problem):
    scores, masks, outputs = problem
    assert lds(scores, masks, np.exp(outputs[0])).value == pytest.approx(lds(scores, masks, outputs[0]).value, abs=1e-12)


def test_queries_without_a_correlation_are_left_out_and_counted(problem):
    scores, masks, outputs = problem
    scores, outputs = scores.copy(), outputs.copy()
    scores[:, 1] = 0
    outputs[:, :, 4] = 0.1
    result = lds(scores, masks, outputs)
    assert np.isnan(result.per_query).tolist() == [query in (1, 4) for query in range(N_QUERY)]
    assert result.n_undefined == 2
    rest = [0, 2, 3, 5, 6]
    assert result.value == pytest.approx(lds(scores[:, rest], masks, outputs[:, :, rest]).value, abs=1e-12)
    assert np.isfinite(result.interval).all()


def test_scores_that_say_nothing_have_no_lds_and_raise_no_warning(problem):
    scores, masks, outputs = problem
    result = lds(np.zeros_like(scores), masks, outputs)
    assert np.isnan(result.value)
    assert np.isnan(result.interval).all()
    assert result.n_undefined == N_QUERY


@pytest.mark.parametrize("resample", ["subsets", "queries"])
def test_the_interval_depends_on_its_seed_alone_and_holds_the_value(problem, resample):
    first, again, other = (lds(*problem, resample=resample, n_bootstrap=200, seed=seed) for seed in (0, 0, 1))
    assert first.interval == again.interval
    assert first.interval != other.interval
    assert first.interval[0] < first.value < first.interval[1]


def test_the_interval_over_subsets_covers_what_many_subsets_would_give():
    """Of 60 ground truths of 40 subsets each, the 90 % interval holds the LDS of 20,000 subsets about as often as it says."""
    generator = np.random.default_rng(1)
    scores, truth = generator.normal(size=(2, 20, 4))

    def draw(n_subsets):
        masks = generator.random((n_subsets, 20)) < 0.5
        return scores + truth, masks, masks @ scores + generator.normal(size=(n_subsets, 4))

    expected = lds(*draw(20_000), n_bootstrap=0).value
    held = 0
    for _ in range(60):
        low, high = lds(*draw(40), n_bootstrap=100, confidence=0.9).interval
        held += low <= expected <= high
    # Binomial(60, .9) has mean 54 and standard deviation 2.3; a percentile interval of 40 subsets is a little short.
    assert 44 <= held <= 60


def test_no_bootstrap_means_no_interval(problem):
    assert np.isnan(lds(*problem, n_bootstrap=0).interval).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, m, o: (s[0], m, o), "Expected scores .n_train, n_query.*but their shapes are"),
        (
            lambda s, m, o: (s.T, m, o),
            "The masks are for 40 training examples, but there are scores for 7. The scores look transp",
        ),
        (lambda s, m, o: (s[1:], m, o), "The masks are for 40 training examples, but there are scores for 39.$"),
        (lambda s, m, o: (s, m[1:], o), "Expected outputs of 29 subsets on 7 queries"),
        (lambda s, m, o: (s, m, o[..., 1:]), r"outputs' shape is \(2, 30, 6\)"),
        (lambda s, m, o: (s, m[:1], o[:, :1]), "at least two subsets"),
        (lambda s, m, o: (s, m * 2.0, o), "masks must be boolean"),
        (lambda s, m, o: (np.where(s == s.max(), np.nan, s), m, o), "1 of 280 scores are not finite"),
        (lambda s, m, o: (s, m, np.where(o > 0, np.inf, o)), "of 420 outputs are not finite"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(problem, change, message):
    with pytest.raises(ValueError, match=message):
        lds(*change(*problem))


def test_an_unknown_resampling_is_refused(problem):
    with pytest.raises(ValueError, match="must be 'subsets' or 'queries', but is 'seeds'"):
        lds(*problem, resample="seeds")


def test_the_prediction_of_a_subset_is_the_sum_of_its_scores(problem):
    scores, masks, _ = problem
    np.testing.assert_allclose(predicted_outputs(scores, masks)[3], scores[masks[3]].sum(0), rtol=0, atol=1e-12)


def test_the_ceiling_is_the_lds_of_the_noiseless_outputs():
    generator = np.random.default_rng(2)
    scores = generator.normal(size=(50, 30))
    masks = generator.random((2000, 50)) < 0.5
    truth = masks @ scores
    for n_seeds in (2, 3, 8):
        outputs = truth + generator.normal(scale=truth.std(), size=(n_seeds, *truth.shape))
        reliability = ground_truth_reliability(outputs, n_bootstrap=0)
        assert reliability.ceiling == pytest.approx(lds(scores, masks, outputs, n_bootstrap=0).value, abs=0.02)


def test_seeds_that_agree_are_reliable_and_seeds_that_have_nothing_in_common_are_not():
    noise = np.random.default_rng(3).normal(size=(4, 60, 40))
    same = ground_truth_reliability(np.stack([noise[0]] * 4), n_bootstrap=20)
    assert same[:3] == pytest.approx((1, 1, 1), abs=1e-12)
    assert same.interval == pytest.approx((1, 1), abs=1e-12)
    nothing = ground_truth_reliability(noise, n_bootstrap=20)
    assert abs(nothing.split_half) < 0.05
    assert nothing.interval[0] <= nothing.ceiling <= nothing.interval[1]


def test_reliability_needs_two_seeds():
    with pytest.raises(ValueError, match="at least two seeds"):
        ground_truth_reliability(np.zeros((1, 5, 3)))
