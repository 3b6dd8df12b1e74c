"""Fact tracing on texts alone: data, proponents, candidates, BM25+ and the tables made of them."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from ftrace_for_tests import synthetic_ftrace

from hf_trak.evaluation.baselines.bm25 import BM25PlusIndex
from hf_trak.evaluation.fact_tracing import (
    BM25PlusSentences,
    Fact,
    Random,
    RandomTarget,
    best_variant,
    cross_fit,
    draw_candidates,
    find_proponents,
    halves,
    load_candidates,
    load_ftrace,
    measure,
    parse_facts,
    published_rows,
    result_rows,
    save_candidates,
    score_candidates,
    sentence_numbers,
)
from hf_trak.evaluation.fact_tracing.data import answer_of, restored
from hf_trak.evaluation.fact_tracing.ranking import Chosen


@pytest.fixture(scope="module")
def abstracts():
    return synthetic_ftrace()[0]


@pytest.fixture(scope="module")
def queries():
    return synthetic_ftrace()[1]


@pytest.fixture(scope="module")
def candidates(abstracts, queries):
    nearest = BM25PlusSentences().nearest_to(abstracts, queries, 6)
    proponents = find_proponents(abstracts, queries)
    return draw_candidates(abstracts, queries, proponents, nearest, n_same_target=3, n_random=8)


class TestData:
    @pytest.mark.parametrize("layout", ["{}.parquet", "{}-00000-of-00001.parquet", "{}/train/0000.parquet"])
    def test_a_folder_is_read_however_its_files_are_named(self, tmp_path, abstracts, queries, layout):
        for name, rows in {"abstracts": abstracts, "queries": queries}.items():
            path = tmp_path / layout.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(str(path))
        found = load_ftrace(tmp_path)
        assert (found.abstracts[:], found.queries[:]) == (abstracts[:], queries[:])

    def test_the_hubs_parquet_branch_is_asked_for(self, monkeypatch, abstracts, queries):
        asked = []

        def load_dataset(kind, *, data_files, split):
            asked.append((kind, data_files["train"]))
            return abstracts if "abstracts" in data_files["train"] else queries

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        load_ftrace("ekinakyurek/ftrace")
        prefix = "hf://datasets/ekinakyurek/ftrace@refs%2Fconvert%2Fparquet"
        assert asked == [("parquet", f"{prefix}/{part}/**/*.parquet") for part in ("abstracts", "queries")]

    def test_what_is_not_there_is_named(self, tmp_path, abstracts, queries):
        with pytest.raises(FileNotFoundError, match=r"has neither abstracts\*.parquet"):
            load_ftrace(tmp_path)
        for absent in (tmp_path / "absent", "../absent", "absent"):
            with pytest.raises(FileNotFoundError, match="is no folder here, and no repository of the Hub"):
                load_ftrace(absent)
        abstracts.remove_columns("facts").to_parquet(str(tmp_path / "abstracts.parquet"))
        queries.to_parquet(str(tmp_path / "queries.parquet"))
        with pytest.raises(ValueError, match="lack facts"):
            load_ftrace(tmp_path)

    def test_an_id_that_occurs_twice_is_refused(self, tmp_path, abstracts, queries):
        abstracts.to_parquet(str(tmp_path / "abstracts.parquet"))
        queries.select([0, 0, 1]).to_parquet(str(tmp_path / "queries.parquet"))
        with pytest.raises(ValueError, match="1 of 3 queries have a `uuid` that another has too"):
            load_ftrace(tmp_path)

    def test_maskings_of_a_sentence_have_one_number(self, abstracts):
        numbers = sentence_numbers(abstracts)
        assert numbers.tolist() == [row // 2 for row in range(len(abstracts))]
        assert restored(abstracts)[0] == restored(abstracts)[1]
        assert "<extra_id_0>" not in "".join(restored(abstracts))

    def test_an_answer_ends_where_the_next_mask_begins(self):
        assert answer_of("<extra_id_0> South Asia<extra_id_1> and more") == "South Asia"


class TestProponents:
    def test_the_object_comes_second(self):
        assert parse_facts("P361,Q48,Q771405;P30,Q48,Q771405") == [
            Fact("P361", "Q48", "Q771405"),
            Fact("P30", "Q48", "Q771405"),
        ]

    def test_no_fact_is_found_inside_another(self, abstracts, queries):
        one = queries.select([0])
        fact = parse_facts(abstracts[0]["facts"])[0]
        longer = [f"{fact.predicate}1,{fact.object},{fact.subject}", f"{fact.predicate},{fact.object},{fact.subject}2"]
        rows = abstracts.select(range(3)).remove_columns("facts")
        changed = rows.add_column("facts", [*longer, f"{longer[0]};{abstracts[0]['facts']}"])
        assert [rows.tolist() for rows in find_proponents(changed, one)] == [[2]]

    def test_what_is_no_triple_is_refused(self):
        with pytest.raises(ValueError, match="one of 'P1,Q2' is 'P1,Q2'"):
            parse_facts("P1,Q2")

    def test_all_maskings_of_both_sentences_are_found(self, abstracts, queries):
        assert [rows.tolist() for rows in find_proponents(abstracts, queries)] == [
            list(range(4 * n, 4 * n + 4)) for n in range(len(queries))
        ]


class TestBM25Plus:
    def test_it_is_what_rank_bm25_computes(self):
        texts = ["a rose is a rose", "the rose", "is it the end ?", "x y  z", "the the the"]
        queries = ["a rose the the", "unknown word", "z  z"]
        words = [text.split(" ") for text in texts]
        mean_length = np.mean([len(row) for row in words])
        expected = np.zeros((len(texts), len(queries)))
        for column, query in enumerate(queries):
            for word in query.split(" "):
                n_with = sum(word in row for row in words)
                for number, row in enumerate(words) if n_with else []:
                    count = Counter(row)[word]
                    saturated = 2.5 * count / (1.5 * (1 - 0.75 + 0.75 * len(row) / mean_length) + count)
                    expected[number, column] += math.log((len(texts) + 1) / n_with) * (1 + saturated)
        index = BM25PlusIndex(texts)
        np.testing.assert_allclose(index.score(queries), expected, rtol=1e-13, atol=0)
        assert expected[:, 1].tolist() == [0.0] * 5

    def test_the_nearest_come_best_first_and_ties_in_order(self):
        index = BM25PlusIndex(["b b", "a b", "c", "a b", "a a"])
        assert index.nearest("a", 4).tolist() == [4, 1, 3, 0]
        assert index.nearest("a", 2).tolist() == [4, 1]
        assert index.nearest("a", 99).tolist() == [4, 1, 3, 0, 2]

    def test_nothing_to_search_is_refused(self):
        with pytest.raises(ValueError, match="no text was given"):
            BM25PlusIndex([])


class TestCandidates:
    def test_they_hold_what_they_should(self, abstracts, queries, candidates):
        targets = abstracts["targets_pretokenized"][:]
        for of_query, target in zip(candidates, queries["targets_pretokenized"][:], strict=True):
            assert len(of_query.bm25) == 6
            assert len(of_query.random) == 8
            assert {targets[row] for row in of_query.same_target} == {target}
            assert len(of_query.same_target) == min(3, targets.count(target))
            rows = of_query.rows.tolist()
            assert rows == sorted(set(rows))
            assert set(of_query.proponents) <= set(rows)

    def test_a_query_has_the_same_candidates_whoever_else_is_asked(self, abstracts, queries, candidates):
        some = queries.select([5, 2])
        nearest = BM25PlusSentences().nearest_to(abstracts, some, 6)
        proponents = find_proponents(abstracts, some)
        again = draw_candidates(abstracts, some, proponents, nearest, n_same_target=3, n_random=8)
        assert again == [candidates[5], candidates[2]]
        other = draw_candidates(abstracts, some, proponents, nearest, n_same_target=3, n_random=8, seed=1)
        assert other[0].random != again[0].random

    def test_they_are_read_as_they_were_written(self, tmp_path, abstracts, queries, candidates):
        path = tmp_path / "candidates.json.gz"
        save_candidates(path, candidates[:3], abstracts, queries.select(range(3)))
        found, read = load_candidates(path, abstracts, queries)
        assert read == candidates[:3]
        assert found["uuid"][:] == queries["uuid"][:3]
        first = path.read_bytes()
        save_candidates(path, candidates[:3], abstracts, queries.select(range(3)))
        assert path.read_bytes() == first

    def test_those_of_other_data_are_refused(self, tmp_path, abstracts, queries, candidates):
        path = tmp_path / "candidates.json.gz"
        save_candidates(path, candidates, abstracts, queries)
        with pytest.raises(ValueError, match="abstracts that are not there"):
            load_candidates(path, abstracts.select(range(10)), queries)
        with pytest.raises(ValueError, match="candidates for 22 queries that are not there"):
            load_candidates(path, abstracts, queries.select(range(2)))


class TestMeasuring:
    def test_a_method_of_the_whole_corpus_sees_all_of_it_and_others_the_candidates(self, abstracts, queries, candidates):
        seen = []

        class Method:
            def __init__(self, whole_corpus):
                self.whole_corpus = whole_corpus

            def __call__(self, train, queries):
                seen.append(len(train))
                ids = np.array(train["id"][:], dtype=float)
                return ids[:, None] + 1000 * np.arange(len(queries))

        some = [candidates[0], candidates[7]]
        asked = queries.select([0, 7])
        whole, part = (score_candidates(Method(flag), abstracts, asked, some) for flag in (True, False))
        assert seen == [len(abstracts), len(set(some[0].rows) | set(some[1].rows))]
        for number, (left, right) in enumerate(zip(whole, part, strict=True)):
            assert left.tolist() == right.tolist() == (some[number].rows + 1000 * number).tolist()

    def test_ground_truth_scores_are_perfect_and_random_ones_are_not(self, abstracts, queries, candidates):
        sentences = sentence_numbers(abstracts)
        oracle = [np.isin(c.rows, c.proponents).astype(float) for c in candidates]
        for level in ("sentence", "masking"):
            assert measure(oracle, candidates, sentences, level=level)["mrr_expected"].tolist() == [1.0] * len(queries)
        random = score_candidates(Random(), abstracts, queries, candidates)
        assert measure(random, candidates, sentences)["mrr"].mean() < 0.8

    def test_a_sentence_counts_once(self, abstracts, queries, candidates):
        sentences = sentence_numbers(abstracts)
        scores = score_candidates(BM25PlusSentences(), abstracts, queries, candidates)
        by_level = {
            level: measure(scores, candidates, sentences, level=level)["precision_at_3"].mean()
            for level in ("sentence", "masking")
        }
        assert by_level == {"sentence": pytest.approx(2 / 3), "masking": pytest.approx(1.0)}

    def test_random_target_puts_the_same_answer_first(self, abstracts, queries):
        scores = RandomTarget()(abstracts, queries)
        same = np.array(abstracts["targets_pretokenized"][:])[:, None] == np.array(queries["targets_pretokenized"][:])
        assert scores[same].min() > scores[~same].max()
        assert len(np.unique(scores)) == scores.size

    def test_random_scores_are_the_rows_own(self, abstracts, queries):
        part = Random(seed=3)(abstracts.select([7, 2]), queries.select([4]))
        assert part[:, 0].tolist() == Random(seed=3)(abstracts, queries)[[7, 2], 4].tolist()
        whole = Random(seed=3)(abstracts, queries)
        assert abs(whole.mean() - 0.5) < 4 * (1 / 12 / whole.size) ** 0.5
        assert abs(np.corrcoef(whole[:, 0], whole[:, 1])[0, 1]) < 0.4

    def test_halves_are_even_and_the_same_each_time(self, queries):
        first, second = halves(queries)
        assert (first ^ second).all()
        assert abs(int(first.sum()) - int(second.sum())) <= 1
        assert np.array_equal(halves(queries)[0], first)
        assert not np.array_equal(halves(queries, seed=1)[0], first)
        with pytest.raises(ValueError, match="takes two, but there are 1"):
            halves(queries.select([0]))

    def test_no_query_has_a_say_in_the_variant_it_is_ranked_by(self, queries):
        parts = halves(queries)
        scores = {"a": np.zeros((3, len(queries))), "b": np.ones((3, len(queries)))}
        # "a" ranks the first half better, "b" the second: so the first is reported by "b", and the second by "a".
        measures = {
            "a": {"mrr_expected": np.where(parts[0], 0.9, 0.1)},
            "b": {"mrr_expected": np.where(parts[0], 0.5, 1.0)},
        }

        def choose(chosen_on):
            variant = best_variant(measures, chosen_on)
            return Chosen(variant, scores[variant])

        chosen = cross_fit(choose, parts)
        assert chosen.variant == "b / a"
        assert np.array_equal(chosen.scores, np.broadcast_to(parts[0].astype(float), (3, len(queries))))
        assert cross_fit(lambda chosen_on: Chosen("a", scores["a"]), parts).variant == "a"
        with pytest.raises(ValueError, match="no query with a proponent"):
            best_variant({"a": measures["a"]}, np.zeros(len(queries), dtype=bool))

    def test_rows_say_how_many_queries_they_are_of(self):
        values = {"mrr": np.array([0.0, 1.0, np.nan])}
        (row,) = result_rows(values, case="case", method="method", level="sentence")
        assert (row["value"], row["n_queries"], row["n_skipped"], row["level"]) == (0.5, 2, 1, "sentence")
        assert row["interval"] == [0.0, 1.0]

    def test_published_figures_are_marked_and_none_is_of_trak(self):
        rows = published_rows()
        assert all(row["published"] and row["case"].startswith("PUBLISHED, another model and corpus") for row in rows)
        assert {row["method"] for row in rows} == {"Random-Target", "BM25+", "TracIn", "EMBED", "TracIn + EMBED"}
        found = {(row["method"], row["metric"]): row["value"] for row in rows}
        assert (found["BM25+", "mrr"], found["BM25+", "recall_at_10"]) == (0.7755, 0.6089)


def test_a_slice_of_real_data_is_ranked(shared_data):
    folder = shared_data / "ftrace_lama" / "mini"
    ftrace = load_ftrace(folder)
    queries, candidates = load_candidates(folder / "candidates.json", ftrace.abstracts, ftrace.queries)
    proponents = find_proponents(ftrace.abstracts, queries)
    assert all(rows.tolist() == of_query.proponents for rows, of_query in zip(proponents, candidates, strict=True))
    sentences = sentence_numbers(ftrace.abstracts)
    bm25, random = (
        measure(score_candidates(method, ftrace.abstracts, queries, candidates), candidates, sentences)["mrr"].mean()
        for method in (BM25PlusSentences(), Random())
    )
    assert bm25 > 0.6
    assert random < 0.45


@pytest.mark.slow
def test_model_free_baselines_come_out_as_they_were_measured(shared_data):
    folder = shared_data / "ftrace_lama"
    ftrace = load_ftrace(folder)
    queries, candidates = load_candidates(folder / "candidates_200.json.gz", ftrace.abstracts, ftrace.queries)
    sentences = sentence_numbers(ftrace.abstracts)
    targets = np.array(ftrace.abstracts["targets_pretokenized"][:], dtype=object)
    wanted = queries["targets_pretokenized"][:]
    found = {
        "bm25": score_candidates(BM25PlusSentences(), ftrace.abstracts, queries, candidates),
        "random_target": [(targets[c.rows] == wanted[n]).astype(float) for n, c in enumerate(candidates)],
        "oracle": [np.isin(c.rows, c.proponents).astype(float) for c in candidates],
    }
    baselines = json.loads((folder / "baselines.json").read_text())["baselines"]
    for name, scores in found.items():
        measures = measure(scores, candidates, sentences)
        for metric in ("mrr", "recall@10", "precision@10"):
            value = measures[metric.replace("@", "_at_")].mean()
            assert round(float(value), 4) == pytest.approx(baselines[name][metric], abs=1e-9), (name, metric)
