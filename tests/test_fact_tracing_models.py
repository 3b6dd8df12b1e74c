"""Fact tracing with a model: tokens, outputs, TracIn, EMBED, TRAK, learned facts, forgetting, and the whole run."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from ftrace_for_tests import synthetic_ftrace

from hf_trak.config import TrakConfig
from hf_trak.evaluation.fact_tracing import (
    Answers,
    Embed,
    EncodedRows,
    Encoder,
    FineTuning,
    Forgetting,
    TracIn,
    Trak,
    Variant,
    beams,
    fact_task,
    fine_tune,
    fine_tune_learned,
    is_right,
    run_forgetting,
    summarize_forgetting,
)
from hf_trak.evaluation.fact_tracing.data import restored
from hf_trak.evaluation.fact_tracing.fine_tuning import (
    load_moments,
    make_optimizer,
    normalize,
    row_order,
    save_with_moments,
    second_moments,
)
from hf_trak.evaluation.fact_tracing.settings import draw_corpus, small_mt5, texts_of, train_tokenizer
from hf_trak.evaluation.fact_tracing.task import answer_output, token_loss
from hf_trak.index import AttributionIndex

BRIEF = FineTuning(optimizer="adamw", learning_rate=3e-3, steps=12, batch_size=8, warmup=0.0)


@pytest.fixture(scope="module")
def data():
    return synthetic_ftrace(6)


@pytest.fixture(scope="module")
def tokenizer(data):
    return train_tokenizer(texts_of(data[0]), vocab_size=90)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, 0)


def make_model(tokenizer, seed=0, width=32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return small_mt5(len(tokenizer), width=width, n_layers=1).eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


class TestEncoder:
    def test_a_batch_is_what_the_model_is_taught_with(self, data, encoder, model):
        rows = EncodedRows(data[0], encoder)
        batch = rows.batch([0, 1, 2])
        labels = batch.pop("labels")
        own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
        logits = model(**batch).logits
        torch.testing.assert_close(logits, own.logits)
        torch.testing.assert_close(token_loss(logits, labels), own.loss)

    def test_what_is_scored_can_be_said(self, data, tokenizer):
        def scored(**options):
            labels = EncodedRows(data[0].select([0]), Encoder(tokenizer, 0, **options)).batch([0])["labels"][0]
            return tokenizer.decode(labels[labels != -100])

        assert scored() == "<extra_id_0> " + data[0][0]["targets_pretokenized"].split()[1] + "</s>"
        assert scored(score_sentinel=False, score_eos=False) == data[0][0]["targets_pretokenized"].split()[1]

    def test_a_tokenizer_that_splits_the_mask_is_refused(self, tokenizer):
        class Splitting:
            eos_token_id = tokenizer.eos_token_id

            def __call__(self, texts):
                return {"input_ids": [[5, 6, 1]]}

        with pytest.raises(ValueError, match="to be one token, followed by the end of the sequence"):
            Encoder(Splitting(), 0)

    def test_texts_come_back(self, data, tokenizer):
        text = data[0][0]["inputs_pretokenized"]
        assert tokenizer.decode(tokenizer(text)["input_ids"][:-1]).replace(" .", ".") == text.replace(" .", ".")


class TestOutput:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_log_odds_are_those_of_each_token(self, reduction):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)
        labels = torch.tensor([[1, 2, -100, -100], [3, 4, 5, 6], [0, -100, -100, 2]])
        output, out_to_loss = answer_output(logits, labels, output="log_odds", reduction=reduction)
        loss, one = answer_output(logits, labels, output="log_probability", reduction=reduction)
        for row in range(3):
            p = [logits[row, t].softmax(0)[y] for t, y in enumerate(labels[row].tolist()) if y >= 0]
            take = sum if reduction == "sum" else lambda values: sum(values) / len(values)
            torch.testing.assert_close(output[row], take([torch.log(q / (1 - q)) for q in p]))
            torch.testing.assert_close(loss[row], take([torch.log(q) for q in p]))
            torch.testing.assert_close(out_to_loss[row], sum(1 - q for q in p) / len(p))
        assert one.tolist() == [1.0, 1.0, 1.0]

    def test_an_option_that_is_none_is_refused(self, encoder):
        with pytest.raises(ValueError, match="one of log_odds, log_probability, but is 'odds'"):
            fact_task(encoder, output="odds")
        with pytest.raises(ValueError, match="'mean' or 'sum', but is 'max'"):
            fact_task(encoder, reduction="max")


def loss_gradients(model, encoder, rows):
    """Per row, the gradient of minus the loss in every parameter, by plain autograd."""
    result = []
    for row in range(len(rows)):
        batch = EncodedRows(rows.select([row]), encoder).batch([0])
        labels = batch.pop("labels")
        loss = -token_loss(model(**batch).logits, labels)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        result.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
    return result


class TestTracIn:
    @pytest.fixture(scope="class")
    def some(self, data):
        return data[0].select([0, 1, 6, 9]), data[1].select([0, 3, 5])

    @pytest.fixture(scope="class")
    def gradients(self, model, encoder, some):
        return [loss_gradients(model, encoder, rows) for rows in some]

    @pytest.mark.parametrize("layers", ["", "^shared", r"decoder\.block\.0.*wo"])
    def test_every_similarity_is_its_definition(self, model, encoder, some, gradients, layers):
        import re

        names = [name for name in gradients[0][0] if re.search(layers, name)]

        def dot(left, right, name):
            return float((left[name].double() * right[name].double()).sum())

        def cosine(left, right, chosen):
            parts = [sum(dot(a, b, name) for name in chosen) for a, b in ((left, right), (left, left), (right, right))]
            return parts[0] / (parts[1] * parts[2]) ** 0.5 if parts[1] * parts[2] > 0 else 0.0

        definitions = {
            "dot": lambda left, right: sum(dot(left, right, name) for name in names),
            "cosine": lambda left, right: cosine(left, right, names),
            "layer_cosine": lambda left, right: sum(cosine(left, right, [name]) for name in names),
        }
        variants = [Variant(similarity, layers) for similarity in definitions]
        found = TracIn([model], encoder, dim=10**6, batch_size=3).sweep(*some, variants)
        for variant in variants:
            expected = [[definitions[variant.similarity](left, right) for right in gradients[1]] for left in gradients[0]]
            np.testing.assert_allclose(found[variant], expected, rtol=2e-4, atol=1e-5)

    def test_checkpoints_are_averaged_and_sketches_are_close(self, model, tokenizer, encoder, some):
        other = make_model(tokenizer, seed=1)
        alone = [TracIn([one], encoder, Variant("dot"))(*some) for one in (model, other)]
        np.testing.assert_allclose(TracIn([model, other], encoder, Variant("dot"))(*some), sum(alone) / 2, rtol=1e-4, atol=1e-6)
        exact, sketched = (TracIn([model], encoder, Variant("cosine"), dim=dim)(*some) for dim in (10**6, 512))
        assert np.abs(exact - sketched).max() < 0.15
        assert not np.array_equal(exact, sketched)

    def test_second_moments_divide_every_entry(self, tmp_path, data, tokenizer, encoder, some):
        model = make_model(tokenizer, seed=2)
        rows = EncodedRows(data[0], encoder)
        kept = []
        fine_tune(model, rows, range(8), BRIEF, seed=0, on_step=lambda step, optimizer: kept.append(optimizer))
        save_with_moments(tmp_path / "checkpoint", model, kept[-1], tokenizer)
        moments = load_moments(tmp_path / "checkpoint")
        assert set(moments) == {name for name, p in model.named_parameters()}
        gradients = [loss_gradients(model.eval(), encoder, part) for part in some]
        scale = {name: 1 / (moments[name].double().sqrt() + 1e-7) for name in gradients[0][0]}
        expected = [
            [sum(float((a[n].double() * scale[n] ** 2 * b[n].double()).sum()) for n in scale) for b in gradients[1]]
            for a in gradients[0]
        ]
        tracin = TracIn([tmp_path / "checkpoint"], encoder, Variant("dot"), use_second_moments=True, dim=10**6)
        np.testing.assert_allclose(tracin(*some), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())

    def test_what_is_missing_is_named(self, model, encoder, some):
        with pytest.raises(ValueError, match="No parameter matches 'nonsense'"):
            TracIn([model], encoder, Variant("dot", "nonsense"))(*some)
        with pytest.raises(ValueError, match="has no second moments"):
            TracIn([model], encoder, use_second_moments=True)(*some)
        with pytest.raises(ValueError, match="dot, cosine, layer_cosine, but is 'angle'"):
            Variant("angle")


class TestEmbed:
    def test_layer_0_is_the_mean_embedding(self, model, encoder, data):
        train, queries = data[0].select([3, 0, 8]), data[1].select([0, 1])
        with torch.no_grad():
            means = [
                torch.stack([model.shared(torch.tensor(row)).mean(0) for row in encoder.tokens(rows)[0]]).double()
                for rows in (train, queries)
            ]
        left, right = (torch.nn.functional.normalize(rows, dim=1) for rows in means)
        np.testing.assert_allclose(Embed([model], encoder)(train, queries), (left @ right.T).numpy(), atol=1e-5)
        assert set(Embed([model], encoder).sweep(train, queries)) == {"encoder.0", "encoder.1", "decoder.0", "decoder.1"}

    def test_a_layer_that_is_not_there_is_refused(self, model, encoder, data):
        with pytest.raises(ValueError, match=r"no layer 'encoder.7'; it has encoder.0"):
            Embed([model], encoder, "encoder.7")(data[0].select([0]), data[1].select([0]))


def test_trak_wants_the_whole_training_set(tmp_path, data, model, encoder):
    index = AttributionIndex.build(
        tmp_path / "index",
        models=model,
        dataset=data[0],
        config=TrakConfig(proj_dim=64),
        processing_class=encoder.tokenizer,
        task=fact_task(encoder),
        progress=False,
    )
    method = Trak(index, {"damping": 1.0})
    scores = method(data[0], data[1])
    assert scores.shape == (len(data[0]), len(data[1]))
    np.testing.assert_array_equal(scores, index.score(data[1], damping=1.0, progress=False))
    with pytest.raises(ValueError, match="Gram matrix is of the whole training set"):
        method(data[0].select(range(3)), data[1])


class TestLearning:
    def test_answers_are_compared_as_the_paper_compares_them(self):
        assert normalize("<extra_id_0> South Asia. <extra_id_1> x") == "south asia"
        assert normalize("<extra_id_0> U.S.") == "u.s"

    def test_learned_is_wrong_in_three_before_and_right_first_after(self, data):
        queries = data[1].select([0, 1, 2, 3])
        gold = [normalize(target) for target in queries["targets_pretokenized"][:]]
        before = [["x", "y", "z"], ["x", "y", gold[1]], ["x"] * 3, ["x"] * 3]
        after = [[gold[0], "x", "y"], [gold[1]] * 3, ["x", gold[2], "y"], [gold[3], "x", "y"]]
        assert fine_tune_learned(before, after, queries).tolist() == [True, False, False, True]
        assert is_right(after, queries, among=3).all()

    def test_facts_are_learned_and_beams_find_them(self, data, tokenizer, encoder):
        model = make_model(tokenizer, width=64)
        rows = EncodedRows(data[0], encoder)
        recipe = FineTuning(optimizer="adamw", learning_rate=3e-3, steps=150, batch_size=16, warmup=0.1, decay=True)
        objects = [row for row, kind in enumerate(data[0]["masked_type"]) if kind == "object"]
        loss = fine_tune(model, rows, objects, recipe, seed=0)
        assert loss < 0.1
        found = beams(model, encoder, data[0].select(objects))
        assert all(len(answers) == 3 for answers in found)
        assert is_right(found, data[0].select(objects)).mean() > 0.9

    def test_a_run_is_decided_by_its_seed(self, data, tokenizer, encoder):
        rows = EncodedRows(data[0], encoder)

        def weights(seed):
            model = make_model(tokenizer)
            fine_tune(model, rows, range(20), BRIEF, seed=seed)
            return torch.cat([p.detach().flatten() for p in model.parameters()])

        assert torch.equal(weights(1), weights(1))
        assert not torch.equal(weights(1), weights(2))

    def test_every_pass_reads_every_row_once(self, data, encoder):
        rows = EncodedRows(data[0], encoder)
        subset = [1, 4, 5, 9, 20, 21, 23, 30, 31, 40]
        order = row_order(rows, subset, FineTuning(steps=5, batch_size=4), seed=0)
        assert len(order) == 5
        assert sorted(row for batch in order[:3] for row in batch) == subset
        assert order != row_order(rows, subset, FineTuning(steps=5, batch_size=4), seed=1)

    def test_adafactors_second_moments_are_whole(self, data, tokenizer, encoder):
        model = make_model(tokenizer)
        recipe = FineTuning(optimizer="adafactor", steps=2, batch_size=4)
        optimizer = make_optimizer(model, recipe)
        loss = sum(p.square().sum() for p in model.parameters())
        loss.backward()
        optimizer.step()
        moments = second_moments(model, optimizer)
        assert {name: m.shape for name, m in moments.items()} == {name: p.shape for name, p in model.named_parameters()}
        assert all((m >= 0).all() and m.isfinite().all() for m in moments.values())

    def test_nothing_to_train_on_is_refused(self, data, tokenizer, encoder):
        with pytest.raises(ValueError, match="subset is empty"):
            fine_tune(make_model(tokenizer), EncodedRows(data[0], encoder), [], BRIEF, seed=0)


class TestForgetting:
    """Four facts, each taught by two of twelve abstracts; a `retrain` that knows which are left."""

    PROPONENTS = tuple(np.array([2 * target, 2 * target + 1]) for target in range(4))

    def retrain(self, mask, seed):
        left = np.array([mask[rows].sum() for rows in self.PROPONENTS], dtype=float)
        right = left > 0
        right[3] &= seed != 1  # one fact that one seed does not learn
        return Answers(right, left)

    def plan(self, **options):
        perfect = np.zeros((12, 4))
        for target, rows in enumerate(self.PROPONENTS):
            perfect[rows, target] = 1
        scores = {"perfect": perfect, "useless": np.flip(np.arange(12.0))[:, None] * np.ones(4) * -1}
        return Forgetting(
            scores, self.PROPONENTS, **{"top_k": (1, 2), "seeds": (0, 1), "batch_size": 2, "case": "c", **options}
        )

    def test_the_union_over_a_batch_is_removed(self):
        removed = {(run.method, run.batch, run.k): run.removed.tolist() for run in self.plan().removals}
        assert removed["nothing removed", None, 0] == []
        assert removed["perfect", 0, 2] == [0, 1, 2, 3]
        assert removed["perfect", 1, 1] == [4, 6]
        assert removed["ground truth", 1, 0] == [4, 5, 6, 7]
        assert removed["useless", 0, 2] == [10, 11]
        assert len(removed["random", 0, 2]) <= 4

    def test_what_is_credited_rightly_is_forgotten(self, tmp_path):
        plan = self.plan()
        run_forgetting(plan, self.retrain, tmp_path, progress=False)
        rows = {(row["method"], row["top_k"], row["metric"]): row for row in summarize_forgetting(plan, tmp_path)}
        assert rows["perfect", 2, "forgotten_share"]["value"] == 1.0
        assert rows["ground truth", None, "forgotten_share"]["value"] == 1.0
        assert rows["perfect", 1, "forgotten_share"]["value"] == 0.0
        assert rows["perfect", 1, "counterfactual_delta"]["value"] == -1.0
        assert rows["useless", 2, "counterfactual_delta"]["value"] == 0.0
        assert rows["perfect", 2, "forgotten_share"]["n_targets"] == 4
        assert rows["perfect", 2, "counterfactual_delta"]["n_removed"] == 4
        ahead = rows["perfect over useless", 2, "counterfactual_delta_ahead"]
        assert ahead["value"] == rows["perfect", 2, "counterfactual_delta"]["value"]

    def test_shards_share_the_runs_and_nothing_is_done_twice(self, tmp_path):
        plan, done = self.plan(), []

        def counting(mask, seed):
            done.append(seed)
            return self.retrain(mask, seed)

        run_forgetting(plan, counting, tmp_path, shard=(1, 2), progress=False)
        assert len(done) == len(plan.removals) // 2
        with pytest.raises(
            FileNotFoundError, match=f"{len(plan.removals) - len(done)} of {len(plan.removals)} runs are missing"
        ):
            summarize_forgetting(plan, tmp_path)
        run_forgetting(plan, counting, tmp_path, progress=False)
        assert len(done) == len(plan.removals)

    def test_results_of_other_scores_are_refused(self, tmp_path):
        run_forgetting(self.plan(), self.retrain, tmp_path, progress=False)
        with pytest.raises(ValueError, match=r"another run:\n.*case"):
            run_forgetting(self.plan(case="other"), self.retrain, tmp_path, progress=False)

    def test_what_cannot_be_run_is_refused(self):
        with pytest.raises(ValueError, match="would remove all 12 abstracts"):
            self.plan(top_k=(12,))
        with pytest.raises(ValueError, match="1 scores of one are NaN"):
            Forgetting({"one": np.array([[np.nan], [1.0]])}, [np.array([0])], top_k=(1,))
        with pytest.raises(ValueError, match=r"one shape \(n_train, 1\)"):
            Forgetting({"one": np.zeros((3, 2))}, [np.array([0])], top_k=(1,))


def test_background_tells_nothing_of_who_is_asked_about(data):
    from hf_trak.evaluation.fact_tracing import FTrace, parse_facts

    corpus = draw_corpus(FTrace(*data), n_queries=3, n_background=10, n_taught=4, most_proponents=9)
    subjects = set(corpus.queries["sub_uri"][:])
    about = {
        text
        for text, facts in zip(restored(data[0]), data[0]["facts"][:], strict=True)
        if subjects & {name for fact in parse_facts(facts) for name in (fact.subject, fact.object)}
    }
    assert about
    assert not about & set(restored(corpus.background))
    taught = corpus.background["inputs_pretokenized"][-4:]
    assert set(taught) <= set(data[1]["inputs_pretokenized"][:]) - set(corpus.queries["inputs_pretokenized"][:])
    assert len(corpus.abstracts) == 12
    with pytest.raises(ValueError, match="99 queries are to be drawn, but only 12 fit"):
        draw_corpus(FTrace(*data), n_queries=99, n_background=1, most_proponents=9)


def test_a_drawn_corpus_has_neither_long_abstracts_nor_answers_to_guess(data):
    from hf_trak.evaluation.fact_tracing import FTrace

    words = [len(text.split()) for text in data[0]["inputs_pretokenized"][:]]
    corpus = draw_corpus(FTrace(*data), n_queries=2, n_background=2, most_proponents=9, most_words=max(words) - 1)
    texts = [*corpus.abstracts["inputs_pretokenized"][:], *corpus.background["inputs_pretokenized"][:]]
    assert max(len(text.split()) for text in texts) < max(words)
    asked = [(row["predicate_id"], row["obj_uri"]) for row in data[1]]
    relation, commonest = Counter(asked).most_common(1)[0][0]
    n_left = sum(pair != (relation, commonest) for pair in asked if pair[0] == relation)
    every = sum(pair not in _commonest(asked) for pair in asked)
    corpus = draw_corpus(FTrace(*data), n_queries=every, n_background=0, most_proponents=9, not_among=1)
    found = [(row["predicate_id"], row["obj_uri"]) for row in corpus.queries]
    assert (relation, commonest) not in found
    assert sum(pair[0] == relation for pair in found) == n_left


def _commonest(asked):
    relations = {pair[0] for pair in asked}
    return {Counter(pair for pair in asked if pair[0] == relation).most_common(1)[0][0] for relation in relations}


FLAGS = [
    "--model",
    "scratch",
    "--n_corpus_queries",
    "8",
    "--n_background",
    "8",
    "--most_proponents",
    "9",
    "--pretrain_steps",
    "5",
    "--vocab_size",
    "90",
    "--width",
    "32",
    "--n_layers",
    "1",
    "--dropout",
    "0",
    "--optimizer",
    "adamw",
    "--learning_rate",
    "0.004",
    "--steps",
    "120",
    "--batch_size",
    "16",
    "--decay",
    "true",
    "--checkpoint_steps",
    "60",
    "120",
    "--n_members",
    "2",
    "--proj_dim",
    "32",
    "--n_queries",
    "6",
    "--n_targets",
    "3",
    "--batch_facts",
    "2",
    "--n_seeds",
    "1",
    "--top_k",
    "2",
    "--n_random",
    "5",
    "--n_nearest",
    "5",
    "--tracin_dim",
    "64",
    "--trak_features",
    "answer's tokens",
    "--trak_members",
    "halves",
    "checkpoints",
    "both",
]


@pytest.mark.slow
def test_the_command_does_all_of_it_and_goes_on_where_it_was_stopped(tmp_path, capsys):
    from hf_trak.cli.evaluate_ftrace import main

    for name, rows in zip(("abstracts", "queries"), synthetic_ftrace(8), strict=True):
        rows.to_parquet(str(tmp_path / f"{name}.parquet"))
    flags = [*FLAGS, "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    with pytest.raises(FileNotFoundError, match=r"lacks queries\.parquet\. Do the stage `data` before `rank`"):
        main([*flags, "--stages", "rank"])
    main([*flags, "--stages", "data"])
    with pytest.raises(FileNotFoundError, match=r"lacks learned\.json\. Do the stage `learn` before `members`"):
        main([*flags, "--stages", "members"])
    main([*flags, "--stages", "learn", "members"])
    main([*flags, "--stages", "rank", "--shard_index", "0", "--num_shards", "2"])
    with pytest.raises(FileNotFoundError, match="scores lacks Random-Target; EMBED;"):
        main([*flags, "--stages", "report"])
    main([*flags, "--stages", "rank", "forget", "--shard_index", "1", "--num_shards", "2"])
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.suffix in (".npz", ".safetensors")}
    main(flags)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    ours = [row for row in rows if not row.get("published")]
    methods = {row["method"] for row in ours if row["metric"] == "mrr"}
    assert methods == {"BM25+", "Random-Target", "Random", "EMBED", "TracIn", "TracIn + EMBED", "TRAK"}
    assert {row["level"] for row in ours if row["metric"] == "mrr"} == {"sentence", "masking"}
    assert {row["method"] for row in ours if row["metric"] == "forgotten_share"} >= {"TRAK", "BM25+", "ground truth", "random"}
    assert all(np.isfinite(row["value"]) for row in ours)
    assert {row["method"] for row in ours if row["metric"] == "stage_cpu_s"} >= {"data", "learn", "members", "rank", "forget"}
    (ahead,) = (
        row for row in ours if (row["metric"], row["method"], row.get("level")) == ("mrr_ahead", "TRAK over TracIn", "sentence")
    )
    trak, tracin = (
        next(r for r in ours if (r["metric"], r["method"], r.get("level")) == ("mrr", method, "sentence"))
        for method in ("TRAK", "TracIn")
    )
    assert ahead["value"] == pytest.approx(trak["value"] - tracin["value"])
    variants = {row["variant"] for row in ours if row["metric"] == "variant_mrr" and row["method"] == "TRAK"}
    assert {"damping auto, halves, answer's tokens", "damping auto, no out_to_loss, both, answer's tokens"} <= variants
    assert "another model and corpus" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"other settings:\n.*proj_dim"):
        main([*flags, "--proj_dim", "16"])


@pytest.mark.slow
def test_traks_variants_are_the_scores_of_its_indexes_and_both_is_the_mean_over_all_members(tmp_path):
    from hf_trak.cli.evaluate_ftrace import main, parse_arguments
    from hf_trak.evaluation.fact_tracing.rankings import trak_index, trak_scores
    from hf_trak.evaluation.fact_tracing.workspace import Workspace

    for name, rows in zip(("abstracts", "queries"), synthetic_ftrace(8), strict=True):
        rows.to_parquet(str(tmp_path / f"{name}.parquet"))
    flags = [*FLAGS, "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--checkpoint_steps", "120"]
    main([*flags, "--stages", "data", "learn", "members"])
    space = Workspace(*parse_arguments(flags))
    scores = trak_scores(space, "answer's tokens")
    influence, norms = {}, {}
    for members, n_members in (("halves", 2), ("checkpoints", 1)):
        index = trak_index(space, "answer's tokens", members)
        assert len(index.members) == n_members
        close = {"rtol": 1e-4, "atol": 1e-5 * np.abs(scores[f"damping 0.3, {members}"]).max()}
        weighed = index.score(space.asked[0], damping=0.3, combination="means", progress=False)
        np.testing.assert_allclose(scores[f"damping 0.3, {members}"], weighed, **close)
        influence[members] = index.score(space.asked[0], damping=0.3, out_to_loss_power=0, combination="means", progress=False)
        norms[members] = np.mean([index.features(m)["trak_grad_norm"][:] for m in range(n_members)], axis=0)
        expected = influence[members] / norms[members][:, None]
        np.testing.assert_allclose(
            scores[f"damping 0.3, unit rows, {members}"], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max()
        )
    expected = (2 * influence["halves"] + influence["checkpoints"]) / 3
    np.testing.assert_allclose(scores["damping 0.3, no out_to_loss, both"], expected, rtol=1e-6)


def test_members_see_their_half_as_often_as_the_full_run_sees_all(tmp_path):
    from hf_trak.cli.evaluate_ftrace import parse_arguments
    from hf_trak.evaluation.fact_tracing.workspace import Workspace

    flags = [*FLAGS, "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    space = Workspace(*parse_arguments([*flags, "--alpha", "0.25"]))
    assert (space.recipe.steps, space.member_recipe.steps) == (120, 30)
    with pytest.raises(ValueError, match=r"must lie in 1 to 120, .* there is \[121\]"):
        Workspace(*parse_arguments([*flags, "--checkpoint_steps", "60", "121"]))


def test_all_queries_may_be_asked(tmp_path):
    from hf_trak.cli.evaluate_ftrace import parse_arguments
    from hf_trak.evaluation.fact_tracing.run import draw_data, learn
    from hf_trak.evaluation.fact_tracing.workspace import Workspace

    for name, rows in zip(("abstracts", "queries"), synthetic_ftrace(8), strict=True):
        rows.to_parquet(str(tmp_path / f"{name}.parquet"))
    flags = [*FLAGS, "--data", str(tmp_path), "--steps", "2", "--checkpoint_steps", "2"]
    space = Workspace(
        *parse_arguments([*flags, "--output", str(tmp_path / "out"), "--query_slice", "all", "--n_queries", "99"])
    )
    draw_data(space)
    learn(space)
    assert space.asked[0]["uuid"][:] == space.queries["uuid"][:]
    space = Workspace(*parse_arguments([*flags, "--output", str(tmp_path / "learned")]))
    draw_data(space)
    learn(space)
    with pytest.raises(ValueError, match="taught none of the queries"):
        _ = space.asked


def test_the_scales_are_those_of_the_config_files():
    from pathlib import Path

    from hf_trak.cli.evaluate_ftrace import parse_arguments

    folder = Path(__file__).parents[1] / "scripts" / "configs"
    for scale in ("paper", "small"):
        by_file = parse_arguments(["--output", "o", "--config", str(folder / f"ftrace_{scale}.yaml")])
        assert by_file == parse_arguments(["--output", "o", "--scale", scale])
