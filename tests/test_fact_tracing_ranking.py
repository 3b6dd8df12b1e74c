"""Measures of a ranking: the worked example, ties against all orders, and the `evaluate` module."""

import doctest
import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import yaml

from hf_trak.evaluation.fact_tracing import rank_measures, to_sentences

EXAMPLE_SCORES = np.array([0.9, 0.2, 0.7, 0.7, 0.5, 0.1, 0.5, 0.3])
EXAMPLE_SENTENCES = np.array(list("ABBCDEEF"))
EXAMPLE_GOLD = np.isin(np.arange(8), [1, 2, 4, 5, 6])
KS = (1, 2, 3, 4, 5, 10)


@pytest.fixture
def example(shared_data):
    return json.loads((shared_data / "ftrace_lama" / "metric_example.json").read_text())


@pytest.mark.parametrize("level", ["masking_level", "sentence_level_max_over_maskings"])
def test_the_worked_example_comes_out_exactly(example, level):
    scores, sentences = np.array(example["scores"]), np.array(example["sentence"])
    gold = np.isin(np.arange(len(scores)), example["gold_ids"])
    if level != "masking_level":
        scores, gold = to_sentences(scores, gold, sentences)
        assert scores.tolist() == example[level]["scores"]
        assert [name for name, is_gold in zip("ABCDEF", gold, strict=True) if is_gold] == example[level]["gold"]
    expected = example[level]
    stable = rank_measures(scores, gold, ks=KS)
    shuffled = rank_measures(scores, gold, ks=KS, ties="expected")
    assert stable["mrr"] == expected["rr"]["stable"]
    assert shuffled["mrr"] == pytest.approx(expected["rr"]["expected_random_ties"], abs=1e-15)
    for k in KS:
        assert stable[f"recall_at_{k}"] == pytest.approx(expected["recall"][str(k)], abs=1e-15)
        assert shuffled[f"recall_at_{k}"] == pytest.approx(expected["recall_expected_random_ties"][str(k)], abs=1e-15)
        assert stable[f"precision_at_{k}"] == pytest.approx(expected["precision"][str(k)], abs=1e-15)
        assert stable[f"hit_at_{k}"] == expected["hit"][str(k)]


@pytest.mark.parametrize("seed", range(4))
def test_expected_values_are_means_over_all_orders_of_tied_items(seed):
    generator = np.random.default_rng(seed)
    scores, gold = generator.integers(0, 3, 7).astype(float), generator.random(7) < 0.4
    gold[0] = True
    orders = [list(order) for order in permutations(range(7))]
    means = {
        name: np.mean([rank_measures(scores[order], gold[order], ks=KS)[name] for order in orders])
        for name in rank_measures(scores, gold, ks=KS)
    }
    assert rank_measures(scores, gold, ks=KS, ties="expected") == pytest.approx(means, abs=1e-12)


def test_a_constant_score_is_worth_chance():
    gold = np.arange(100) < 5  # proponents come first, as where candidates are concatenated
    assert rank_measures(np.zeros(100), gold)["mrr"] == 1.0
    expected = rank_measures(np.zeros(100), gold, ties="expected")
    assert expected["recall_at_10"] == pytest.approx(0.1)
    assert expected["mrr"] < 0.2


def test_sentences_keep_the_order_of_their_first_masking():
    scores, gold = to_sentences(np.array([1.0, 5.0, 1.0, 2.0]), np.array([True, False, False, False]), np.array([7, 3, 3, 7]))
    assert (scores.tolist(), gold.tolist()) == ([2.0, 5.0], [True, False])


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        rank_measures(np.array([np.nan, 1.0]), np.array([True, False]))
    with pytest.raises(ValueError, match=r"shapes are \(2,\) and \(3,\)"):
        rank_measures(np.zeros(2), np.zeros(3, dtype=bool))
    with pytest.raises(ValueError, match="'stable' or 'expected', but is 'lucky'"):
        rank_measures(np.zeros(2), np.zeros(2, dtype=bool), ties="lucky")
    with pytest.raises(ValueError, match="at least 1, but are \\[0\\]"):
        rank_measures(np.zeros(2), np.zeros(2, dtype=bool), ks=[0])


class TestMetric:
    @pytest.fixture(scope="class")
    def metric(self):
        pytest.importorskip("evaluate", reason="the metric needs the library evaluate")
        from hf_trak.metrics import load_metric

        return load_metric("fact_tracing")

    @pytest.mark.parametrize("level", ["masking", "sentence"])
    def test_it_gives_the_same_numbers_as_the_function(self, metric, level):
        generator = np.random.default_rng(1)
        scores = [EXAMPLE_SCORES, generator.integers(0, 4, 12).astype(float)]
        gold = [EXAMPLE_GOLD, generator.random(12) < 0.4]
        sentences = [[ord(letter) for letter in EXAMPLE_SENTENCES], generator.integers(0, 6, 12).tolist()]
        items = list(zip(scores, gold, strict=True))
        if level == "sentence":
            items = [to_sentences(s, g, np.array(n)) for s, g, n in zip(scores, gold, sentences, strict=True)]
        result = metric.compute(
            predictions=[s.tolist() for s in scores],
            references=[g.astype(int).tolist() for g in gold],
            sentences=sentences if level == "sentence" else None,
            ks=list(KS),
        )
        assert (result.pop("n_queries"), result.pop("n_skipped")) == (2, 0)
        for ties, suffix in (("stable", ""), ("expected", "_expected")):
            each = [rank_measures(*item, ks=KS, ties=ties) for item in items]
            for name in each[0]:
                assert result.pop(name + suffix) == pytest.approx(np.mean([one[name] for one in each]), abs=1e-12)
        assert not result

    def test_queries_without_proponents_are_left_out_and_counted(self, metric):
        result = metric.compute(predictions=[[1.0, 0.0], [1.0, 0.0]], references=[[0, 0], [0, 1]])
        assert (result["n_queries"], result["n_skipped"], result["mrr"]) == (1, 1, 0.5)

    def test_what_does_not_fit_is_refused(self, metric):
        with pytest.raises(ValueError, match="Query 0 has 2 scores, but 1 references"):
            metric.compute(predictions=[[1.0, 0.0]], references=[[1]])
        with pytest.raises(ValueError, match="1 of 2 scores of query 0 are NaN"):
            metric.compute(predictions=[[1.0, float("nan")]], references=[[1, 0]])

    def test_the_example_of_its_description_is_right(self, metric):
        examples = doctest.DocTestParser().get_examples(metric.inputs_description)
        names = {"evaluate": type("Evaluate", (), {"load": staticmethod(lambda name: metric)})}
        test = doctest.DocTest(examples, names, "fact_tracing", None, None, None)
        assert doctest.DocTestRunner().run(test) == doctest.TestResults(failed=0, attempted=3)

    def test_its_folder_is_a_space(self):
        folder = Path(__file__).parents[1] / "hf_trak" / "metrics" / "fact_tracing"
        front_matter = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
        assert front_matter["sdk"] == "gradio"
        assert (folder / front_matter["app_file"]).is_file()
        assert "hf_trak" not in {
            line.split()[1].split(".")[0]
            for line in (folder / "fact_tracing.py").read_text().splitlines()
            if line[:5] == "impor"
        }
