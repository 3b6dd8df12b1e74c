"""Counterfactuals on a model whose retraining is known exactly, stopped and damaged on the way."""

import numpy as np
import pytest

from hf_trak.evaluation.counterfactual import (
    RANDOM,
    Counterfactuals,
    bootstrap_interval,
    run_counterfactuals,
    summarize_counterfactuals,
)

N_TRAIN, N_QUERY = 40, 6
WEIGHTS = np.random.default_rng(0).normal(size=(N_TRAIN, N_QUERY))


def retrain(mask, seed):
    """A linear world: every training example adds its weight to every output; seeds add noise that cancels over 0 and 1."""
    return mask @ WEIGHTS + 0.5 * (-1) ** seed


def plan(**options):
    settings = {
        "scores": {"truth": WEIGHTS, "its opposite": -WEIGHTS},
        "targets": [0, 2, 5],
        "top_k": [1, 4],
        "seeds": (0, 1),
        "case": "linear world",
    }
    return Counterfactuals(**{**settings, **options})


def value(rows, method, k, metric="counterfactual_delta"):
    return next(row for row in rows if (row["method"], row["top_k"], row["metric"]) == (method, k, metric))["value"]


def test_the_deltas_are_what_was_taken_away(tmp_path):
    counterfactuals = plan()
    run_counterfactuals(counterfactuals, retrain, tmp_path, progress=False)
    rows = summarize_counterfactuals(counterfactuals, tmp_path)
    for k in (1, 4):
        largest = np.sort(WEIGHTS, axis=0)[::-1][:k, [0, 2, 5]].sum(0)
        assert value(rows, "truth", k) == pytest.approx(-largest.mean())
        smallest = np.sort(WEIGHTS, axis=0)[:k, [0, 2, 5]].sum(0)
        assert value(rows, "its opposite", k) == pytest.approx(-smallest.mean())
        removed = [run.removed for run in counterfactuals.removals if run.method == RANDOM and run.k == k]
        assert len(removed) == 2
        assert not np.array_equal(*removed)
        expected = -np.mean([WEIGHTS[rows][:, [0, 2, 5]].sum(0).mean() for rows in removed])
        assert value(rows, RANDOM, k) == pytest.approx(expected)
    assert {row["method"] for row in rows} == {"truth", "its opposite", RANDOM}
    assert all(row["interval"][0] <= row["value"] <= row["interval"][1] for row in rows)
    assert all((row["case"], row["n_targets"], row["n_seeds"]) == ("linear world", 3, 2) for row in rows)


def test_a_prediction_flips_where_the_mean_output_changes_sign(tmp_path):
    counterfactuals = plan(targets=list(range(N_QUERY)), top_k=[10])
    run_counterfactuals(counterfactuals, retrain, tmp_path, progress=False)
    rows = summarize_counterfactuals(counterfactuals, tmp_path)
    before = WEIGHTS.sum(0)
    after = before - np.sort(WEIGHTS, axis=0)[::-1][:10].sum(0)
    expected = np.mean((before > 0) != (after > 0))
    assert 0 < expected < 1
    assert value(rows, "truth", 10, "counterfactual_flipped_share") == pytest.approx(expected)
    metrics = {row["metric"] for row in summarize_counterfactuals(counterfactuals, tmp_path, flips=False)}
    assert metrics == {"counterfactual_delta"}


def test_stopped_and_started_again_nothing_is_trained_twice(tmp_path):
    counterfactuals, calls = plan(), []

    def stops(mask, seed):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append((mask.tobytes(), seed))
        return retrain(mask, seed)

    with pytest.raises(KeyboardInterrupt):
        run_counterfactuals(counterfactuals, stops, tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 7
    with pytest.raises(ValueError, match=r"23 of 30 runs are missing in .*, such as truth-target_0-k_1-seed_1.json"):
        summarize_counterfactuals(counterfactuals, tmp_path)
    again = []
    run_counterfactuals(counterfactuals, lambda *run: again.append(run) or retrain(*run), tmp_path, progress=False)
    assert len(again) == 30 - 7
    run_counterfactuals(counterfactuals, lambda *_: pytest.fail("trained again"), tmp_path, progress=False)
    whole = tmp_path / "whole"
    run_counterfactuals(counterfactuals, retrain, whole, progress=False)
    for path in whole.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_shards_share_the_work(tmp_path):
    counterfactuals, calls = plan(), []
    for number in (1, 0, 2):
        run_counterfactuals(
            counterfactuals, lambda *run: calls.append(run) or retrain(*run), tmp_path, shard=(number, 3), progress=False
        )
    assert len(calls) == len(counterfactuals.removals) == len(list(tmp_path.iterdir()))
    assert summarize_counterfactuals(counterfactuals, tmp_path)
    with pytest.raises(ValueError, match=r"0 <= number < how many, but is \(3, 3\)"):
        run_counterfactuals(counterfactuals, retrain, tmp_path, shard=(3, 3))


def test_results_of_other_scores_are_refused_and_replaced_only_when_asked(tmp_path):
    run_counterfactuals(plan(), retrain, tmp_path, progress=False)
    other = plan(scores={"truth": WEIGHTS[::-1].copy(), "its opposite": -WEIGHTS})
    for call in (lambda: run_counterfactuals(other, retrain, tmp_path), lambda: summarize_counterfactuals(other, tmp_path)):
        with pytest.raises(ValueError, match=r"(?s)truth-target_0-k_1-seed_0.json holds the result of another run:.*removed"):
            call()
    calls = []
    run_counterfactuals(other, lambda *run: calls.append(run) or retrain(*run), tmp_path, overwrite=True, progress=False)
    assert len(calls) == 12  # those of the method that changed
    assert summarize_counterfactuals(other, tmp_path)
    with pytest.raises(ValueError, match=r"(?s)holds the result of another run:.*case"):
        summarize_counterfactuals(plan(scores=other.scores, case="another world"), tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"outputs": [1.0], "n_query": 6}', '{"outputs": [1, "x"]}', '{"method": "truth"}']
)
def test_a_damaged_result_is_refused_by_name(tmp_path, content):
    counterfactuals = plan()
    run_counterfactuals(counterfactuals, retrain, tmp_path, progress=False)
    (tmp_path / "truth-target_2-k_4-seed_1.json").write_text(content)
    with pytest.raises(ValueError, match="truth-target_2-k_4-seed_1.json is damaged .* Delete it and run again"):
        summarize_counterfactuals(counterfactuals, tmp_path)


def test_methods_whose_names_differ_in_punctuation_have_files_of_their_own():
    names = {run.file_name for run in plan(scores={"λ = 0": WEIGHTS, "λ/0": -WEIGHTS, "λ-0": WEIGHTS}).removals}
    assert len(names) == 6 + 3 * 3 * 2 * 2
    assert not any(set(name) & set("/ λ") for name in names)


def test_what_retrain_returns_is_checked_before_it_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"of shape \(6,\), but returned shape \(5,\)"):
        run_counterfactuals(plan(), lambda mask, seed: retrain(mask, seed)[:5], tmp_path, progress=False)
    with pytest.raises(ValueError, match="6 outputs are not finite .* training diverged"):
        run_counterfactuals(plan(), lambda mask, seed: np.full(6, np.nan), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": {}}, "scores of one shape"),
        ({"scores": {"a": WEIGHTS, "b": WEIGHTS[1:]}}, "scores of one shape"),
        ({"scores": {"random": WEIGHTS}}, "'random' is the control's name"),
        ({"scores": {"a": np.where(WEIGHTS > 2, np.nan, WEIGHTS)}}, "scores of a are NaN"),
        ({"targets": [6]}, "`targets` must be different whole numbers from 0 to 5"),
        ({"targets": [1, 1]}, "`targets` must be different"),
        ({"top_k": [40]}, "`top_k` must be different whole numbers from 1 to 39"),
        ({"seeds": ()}, r"`seeds` must be .*, but is \[\]"),
    ],
)
def test_impossible_plans_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    intervals = [bootstrap_interval(generator.normal(size=60), seed=trial) for trial in range(300)]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 300)
    assert bootstrap_interval(np.ones(1)) is None
