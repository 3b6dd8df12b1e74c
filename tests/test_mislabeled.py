"""Finding mislabeled examples: shares and areas against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hf_trak.evaluation import found_share, mislabel_auc


def test_found_share_counts_flipped_examples_on_top() -> None:
    scores = np.array([0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.0, 0.0, 0.0, 0.0])
    flipped = np.array([True, True, False, False, True, False, False, False, False, True])
    assert found_share(scores, flipped, 0.1) == 0.25
    assert found_share(scores, flipped, 0.3) == 0.5
    assert found_share(scores, flipped, 1.0) == 1.0


def test_ties_keep_their_order() -> None:
    flipped = np.array([False, True, True, False])
    assert found_share(np.zeros(4), flipped, 0.5) == 0.5
    assert found_share(np.zeros(4), flipped[::-1].copy(), 0.5) == 0.5
    assert found_share(np.zeros(4), np.array([True, True, False, False]), 0.5) == 1.0


def test_at_least_one_example_is_looked_at() -> None:
    assert found_share(np.array([1.0, 2.0]), np.array([False, True]), 0.01) == 1.0


def test_random_scores_find_the_fraction() -> None:
    rng = np.random.default_rng(0)
    flipped = rng.permutation(np.arange(20_000) < 2_000)
    share = found_share(rng.normal(size=20_000), flipped, 0.1)
    assert abs(share - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 2_000)
    area = mislabel_auc(rng.normal(size=20_000), flipped)
    assert abs(area - 0.5) < 4 * np.sqrt(20_001 / (12 * 2_000 * 18_000))


def test_auc_is_the_share_of_ordered_pairs() -> None:
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 6, 60).astype(float)
    flipped = rng.random(60) < 0.3
    ahead = scores[flipped][:, None] - scores[~flipped]
    assert mislabel_auc(scores, flipped) == pytest.approx(((ahead > 0) + 0.5 * (ahead == 0)).mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "flipped", "fraction", "message"),
    [
        (np.zeros(3), np.zeros(3, bool), 0.1, "nothing to find"),
        (np.array([0.0, np.nan]), np.array([True, False]), 0.1, "1 of 2 scores are NaN"),
        (np.zeros(3), np.ones(2, bool), 0.1, "one length"),
        (np.zeros(2), np.array([True, False]), 0.0, "above 0"),
    ],
)
def test_bad_input_is_refused(scores: np.ndarray, flipped: np.ndarray, fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found_share(scores, flipped, fraction)


def test_auc_needs_both_kinds() -> None:
    with pytest.raises(ValueError, match="All 2 examples are flipped"):
        mislabel_auc(np.zeros(2), np.ones(2, bool))
