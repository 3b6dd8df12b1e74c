"""Baselines of two datasets against slow float64 transcriptions, and which way is up."""

import importlib.util

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from datasets_for_tests import image_rows, save_model, token_rows
from models import make_batch, make_model
from reference import gradient_loop
from torch.nn import functional as F

from hf_trak import Task, TrakConfig
from hf_trak.evaluation.baselines import (
    BASELINES,
    BM25,
    GAS,
    Checkpoints,
    GradientSimilarity,
    RandomScores,
    RepresentationSimilarity,
    TracInCP,
    make_baseline,
)
from hf_trak.evaluation.baselines.arnoldi import loss_of
from hf_trak.evaluation.baselines.base import similarity
from hf_trak.evaluation.baselines.representation import represent
from hf_trak.tasks import AutoTask

HEAD = (r"classifier", r"pooler")
needs_bm25s = pytest.mark.skipif(importlib.util.find_spec("bm25s") is None, reason="bm25s is not installed")


def grad_dim(model, patterns=HEAD):
    return sum(p.numel() for name, p in model.named_parameters() if any(pattern in name for pattern in patterns))


def exact_checkpoints(*models, **options):
    """Checkpoints whose features are the gradients of the head themselves."""
    config = TrakConfig(projector="identity", proj_dim=grad_dim(models[0]), parameters=HEAD)
    return Checkpoints(list(models), config, **options)


def head_gradients(model, dataset):
    """Outputs, out-to-loss and gradients of the head, one float64 pass per example."""
    task = AutoTask.from_model(model)
    names = [name for name, _ in model.named_parameters() if any(pattern in name for pattern in HEAD)]
    return [x.numpy() for x in gradient_loop(model, task.collate(dataset[:], None), task.output_function, names)]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_loss_gradient_is_minus_out_to_loss_times_the_output_gradient(name):
    model = make_model(name).double().eval()
    task = AutoTask.from_model(model)
    batch = make_batch(name)
    if name == "vit":
        batch["pixel_values"] = batch["pixel_values"].double()
    names = [name for name, _ in model.named_parameters()]
    _, out_to_loss, grads = gradient_loop(model, batch, task.output_function, names)

    def cross_entropy(model, batch):
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return F.cross_entropy(logits, batch["labels"], reduction="none"), logits[:, 0]

    loss_grads = gradient_loop(model, batch, cross_entropy, names)[2]
    torch.testing.assert_close(-out_to_loss[:, None] * grads, loss_grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n_labels", [3, 1])
def test_the_derivative_of_every_loss_is_minus_out_to_loss(n_labels):
    task = AutoTask.from_model(make_model("bert") if n_labels == 3 else __import__("models").bert(num_labels=1))
    logits = torch.randn(4, n_labels, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0]) if n_labels == 3 else torch.randn(4)
    output, out_to_loss = task.output_function(
        lambda **_: __import__("types").SimpleNamespace(logits=logits), {"labels": labels}
    )
    loss = loss_of(task)(output, out_to_loss)
    derivative = torch.autograd.grad(loss.sum(), output)[0]
    torch.testing.assert_close(derivative, -out_to_loss)
    expected = F.cross_entropy(logits, labels, reduction="none") if n_labels == 3 else (logits.squeeze(1) - labels) ** 2 / 2
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=1e-6, atol=1e-9)


def test_a_task_whose_loss_is_unknown_is_refused():
    task = Task.custom(lambda model, batch: model(**batch).logits[:, 0], collator=lambda rows: {})
    with pytest.raises(ValueError, match=r"loss of custom:.*gradient, TracIn, GAS and representation baselines serve any task"):
        loss_of(task)


@pytest.mark.parametrize("of", ["loss", "output"])
@pytest.mark.parametrize("kind", ["dot", "cosine"])
def test_gradient_similarity_is_the_mean_over_checkpoints(kind, of):
    models = [make_model("bert", seed=seed) for seed in (0, 1)]
    train, queries = token_rows(7, seed=1), token_rows(4, seed=2)
    found = GradientSimilarity(exact_checkpoints(*models), kind, of, of)(train, queries)
    expected = np.zeros((7, 4))
    for model in models:
        sides = []
        for dataset in (train, queries):
            _, out_to_loss, grads = head_gradients(model, dataset)
            grads = -out_to_loss[:, None] * grads if of == "loss" else grads
            sides.append(unit(grads) if kind == "cosine" else grads)
        expected += sides[0] @ sides[1].T / 2
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_tracin_and_gas_weigh_checkpoints_by_their_learning_rates():
    models = [make_model("bert", seed=seed) for seed in (0, 1)]
    train, queries = token_rows(6, seed=1), token_rows(3, seed=2)
    checkpoints = exact_checkpoints(*models)
    tracin = TracInCP(checkpoints, [0.3, 0.1])(train, queries)
    gas = GAS(checkpoints, [0.3, 0.1])(train, queries)
    expected_tracin, expected_gas = np.zeros((6, 3)), np.zeros((6, 3))
    for model, rate in zip(models, (0.3, 0.1), strict=True):
        grads = [-q[:, None] * g for _, q, g in (head_gradients(model, dataset) for dataset in (train, queries))]
        expected_tracin += rate * grads[0] @ grads[1].T
        expected_gas += rate * unit(grads[0]) @ unit(grads[1]).T
    np.testing.assert_allclose(tracin, expected_tracin, rtol=1e-4, atol=1e-5 * np.abs(expected_tracin).max())
    np.testing.assert_allclose(gas, expected_gas, rtol=1e-4, atol=1e-6)
    doubled = TracInCP(checkpoints)(train, queries)
    np.testing.assert_allclose(doubled, 2 * GradientSimilarity(checkpoints)(train, queries), rtol=1e-9)


@pytest.mark.parametrize("rates", [[0.1], [0.1, -1.0], [0.1, float("nan")], [0.0, 0.0]])
def test_impossible_learning_rates_are_refused(rates):
    checkpoints = exact_checkpoints(make_model("bert"), make_model("bert", seed=1))
    with pytest.raises(ValueError, match="[Ll]earning rates"):
        TracInCP(checkpoints, rates)(token_rows(3), token_rows(2))


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "gpt2", "llama", "vit", "resnet", "convnext", "dinov2"])
def test_the_representation_is_what_the_head_reads(name):
    model = make_model(name).eval()
    batch = make_batch(name)
    featurizer = Checkpoints(model).featurizer(0, sketched=False)
    hidden = represent(featurizer, batch)
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    head = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == model.config.num_labels][-1]
    assert hidden.shape == (len(logits), head.in_features)
    torch.testing.assert_close(torch.nn.functional.linear(hidden, head.weight, head.bias), logits, rtol=1e-4, atol=1e-5)


def test_a_temperature_after_the_head_does_not_hide_it():
    from paper_models import ResNet9Config, ResNet9ForImageClassification

    torch.manual_seed(0)
    model = ResNet9ForImageClassification(ResNet9Config(width=2, num_labels=3, logit_scale=0.2)).eval()
    pixels = torch.randn(4, 3, 16, 16)
    hidden = represent(
        Checkpoints(model).featurizer(0, sketched=False), {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 0])}
    )
    with torch.no_grad():
        torch.testing.assert_close(0.2 * hidden @ model.classifier.weight.T, model(pixels).logits)


def test_representation_similarity_is_that_of_the_last_hidden_states():
    models = [make_model("vit", seed=seed).eval() for seed in (0, 1)]
    train, queries = image_rows(6, seed=1), image_rows(3, seed=2)
    expected = {"dot": np.zeros((6, 3)), "cosine": np.zeros((6, 3))}
    for model in models:
        with torch.no_grad():
            states = [
                model(pixel_values=torch.tensor(d["pixel_values"][:]), output_hidden_states=True).hidden_states[-1]
                for d in (train, queries)
            ]
            hidden = [model.vit.layernorm(state)[:, 0].double().numpy() for state in states]
        expected["dot"] += hidden[0] @ hidden[1].T / 2
        expected["cosine"] += unit(hidden[0]) @ unit(hidden[1]).T / 2
    for kind, values in expected.items():
        found = RepresentationSimilarity(Checkpoints(models), kind)(train, queries)
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-5)


def test_a_module_can_be_named_for_its_representation():
    model = make_model("bert").eval()
    batch = make_batch("bert")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden = represent(Checkpoints(model).featurizer(0, sketched=False), batch, module="bert.pooler.dense")
    with torch.no_grad():
        torch.testing.assert_close(hidden, model.bert(**inputs).last_hidden_state[:, 0])
    with pytest.raises(ValueError, match=r"no module 'nonsense'"):
        represent(Checkpoints(model).featurizer(0, sketched=False), batch, module="nonsense")
    del batch["attention_mask"]
    with pytest.raises(ValueError, match=r"'bert.embeddings.LayerNorm' .* reads a tensor of shape"):
        represent(Checkpoints(model).featurizer(0, sketched=False), batch, module="bert.embeddings.LayerNorm")


def test_a_model_without_a_linear_head_asks_for_one():
    model = make_model("vit")
    model.classifier = torch.nn.Bilinear(16, 16, 3)
    with pytest.raises(ValueError, match=r"no linear layer with 3 outputs. Name its head with `module`"):
        represent(Checkpoints(model).featurizer(0, sketched=False), make_batch("vit"))


COSINES = ["representation_cosine", "gradient_cosine", "output_gradient_cosine", "gas"]


@pytest.mark.parametrize("name", COSINES)
def test_a_duplicate_of_the_query_ranks_first(name):
    queries = token_rows(4, seed=5)
    train = concatenate_datasets([token_rows(10, seed=1), queries, token_rows(10, seed=2)])
    scores = make_baseline(name, Checkpoints(make_model("bert"), TrakConfig(proj_dim=256)))(train, queries)
    assert scores.argmax(0).tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("name", ["representation_dot", "gradient_dot", "output_gradient_dot", "tracin_cp"])
def test_a_duplicate_of_the_query_is_its_proponent(name):
    queries = token_rows(4, seed=5)
    scores = make_baseline(name, Checkpoints(make_model("bert"), TrakConfig(proj_dim=256)))(queries, queries)
    assert (scores.diagonal() > 0).all()
    np.testing.assert_allclose(scores, scores.T, rtol=1e-6)


def test_a_step_on_the_best_example_raises_the_querys_output_most():
    train, query = token_rows(12, seed=3), token_rows(1, seed=4)
    model = make_model("bert")
    config = TrakConfig(projector="identity", proj_dim=sum(p.numel() for p in model.parameters()))
    scores = GradientSimilarity(Checkpoints(model, config), query_gradient="output")(train, query)[:, 0]
    task = AutoTask.from_model(model)

    def output_after_a_step_on(row):
        copy = make_model("bert").double().eval()
        if row is not None:
            batch = task.collate(train[[row]], None)
            loss = F.cross_entropy(copy(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
            loss.backward()
            with torch.no_grad():
                for parameter in copy.parameters():
                    if parameter.grad is not None:
                        parameter -= 1e-5 * parameter.grad
        with torch.no_grad():
            return task.output_function(copy, task.collate(query[:], None))[0].item()

    before = output_after_a_step_on(None)
    changes = np.array([output_after_a_step_on(row) - before for row in range(len(train))])
    np.testing.assert_allclose(changes / 1e-5, scores, rtol=1e-2, atol=1e-3 * np.abs(scores).max())


def test_gradients_of_a_dataset_are_computed_once(monkeypatch):
    checkpoints = Checkpoints(make_model("bert"), TrakConfig(proj_dim=64))
    train, queries = token_rows(5, seed=1), token_rows(3, seed=2)
    first = make_baseline("gradient_dot", checkpoints)(train, queries)
    monkeypatch.setattr(Checkpoints, "run", lambda *args: pytest.fail("computed again"))
    assert make_baseline("gas", checkpoints)(train, queries).shape == first.shape


def test_checkpoints_can_be_folders(tmp_path):
    folder = save_model(tmp_path / "model")
    train, queries = token_rows(5, seed=1), token_rows(3, seed=2)
    config = TrakConfig(proj_dim=64)
    found = make_baseline("gradient_dot", Checkpoints(str(folder), config))(train, queries)
    np.testing.assert_array_equal(found, make_baseline("gradient_dot", Checkpoints(make_model("bert"), config))(train, queries))


def test_a_vanished_gradient_is_similar_to_nothing():
    found = similarity(np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[1.0, 0.0]]), "cosine")
    np.testing.assert_allclose(found, [[0.0], [0.6]])
    with pytest.raises(ValueError, match=r"'dot' or 'cosine', but is 'euclid'"):
        similarity(np.ones((1, 1)), np.ones((1, 1)), "euclid")


def test_random_scores_depend_on_the_seed_alone():
    train, queries = token_rows(200), token_rows(50)
    first, again, other = (RandomScores(seed=seed)(train, queries) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (200, 50)
    assert abs(first.mean()) < 4 / 100  # standard error 1/100
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 4 / 100


def test_bad_input_is_refused_by_name():
    train, queries = token_rows(3), token_rows(2)
    checkpoints = Checkpoints(make_model("bert"), TrakConfig(proj_dim=32))
    with pytest.raises(ValueError, match=r"Unknown baseline 'nonsense'; choose one of random, representation_dot"):
        make_baseline("nonsense", checkpoints)
    with pytest.raises(ValueError, match="`models` is empty"):
        Checkpoints([])
    with pytest.raises(ValueError, match="a dataset is empty"):
        make_baseline("gradient_dot", checkpoints)(train.select([]), queries)
    with pytest.raises(ValueError, match=r"'loss' or of the 'output', not of 'nonsense'"):
        GradientSimilarity(checkpoints, train_gradient="nonsense")(train, queries)
    broken = make_model("bert")
    with torch.no_grad():
        broken.classifier.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        make_baseline("gradient_dot", Checkpoints(broken, TrakConfig(proj_dim=32)))(train, queries)
    with torch.no_grad():
        broken.bert.pooler.dense.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"scores are not finite|does not decide the logits"):
        make_baseline("representation_cosine", Checkpoints(broken))(train, queries)


def test_every_baseline_says_where_it_comes_from():
    for name, constructor in BASELINES.items():
        kind = getattr(constructor, "func", constructor)
        module = importlib.import_module(kind.__module__)
        assert kind.__doc__, name
        assert name == "random" or "huggingface.co/papers/" in module.__doc__, name


TEXTS = ["the cat sat on the mat", "a dog sat", "cats and dogs and birds", "the bird on the wire sat still", ""]


def bm25_transcription(train, query, k1=1.5, b=0.75):
    """Lucene's BM25, one word at a time."""
    documents = [[word for word in text.split() if len(word) > 1] for text in train]
    mean_length = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(documents))
    for word in [word for word in query.split() if len(word) > 1]:
        n_with = sum(word in document for document in documents)
        idf = np.log(1 + (len(documents) - n_with + 0.5) / (n_with + 0.5))
        for i, document in enumerate(documents):
            count = document.count(word)
            scores[i] += idf * count / (count + k1 * (1 - b + b * len(document) / mean_length)) if count else 0.0
    return scores


@needs_bm25s
def test_bm25_is_lucenes_formula():
    train = Dataset.from_dict({"text": TEXTS})
    queries = ["cat on the mat mat", "nothing known here", "sat", ""]
    found = BM25()(train, Dataset.from_dict({"text": queries}))
    np.testing.assert_allclose(found, np.stack([bm25_transcription(TEXTS, query) for query in queries], 1), rtol=1e-6)
    assert found[:, 0].argmax() == 0
    assert not found[:, [1, 3]].any()


@needs_bm25s
def test_bm25_reads_the_columns_that_the_model_reads():
    texts = Dataset.from_dict({"text": TEXTS})
    others = {"id": ["cat"] * 5, "label_text": ["dog bird"] * 5, "url": ["https://cats"] * 5, "label": [0, 1, 0, 1, 0]}
    table = Dataset.from_dict({"text": TEXTS, **others})
    np.testing.assert_array_equal(BM25()(table, table), BM25()(texts, texts))
    tokens = Dataset.from_dict({"id": ["x y", "x y"], "input_ids": [[5, 6, 7], [8, 9, 9]], "labels": [0, 1]})
    expected = BM25()(tokens.select_columns(["input_ids"]), tokens.select_columns(["input_ids"]))
    np.testing.assert_array_equal(BM25(Checkpoints(make_model("bert")))(tokens, tokens), expected)
    titled = Dataset.from_dict({"text": TEXTS, "target": ["dog", "cat", "sat", "bird", "the wire"], "id": ["cat"] * 5})
    both = Dataset.from_dict({"text": [f"{text} {more}" for text, more in zip(TEXTS, titled["target"], strict=True)]})
    np.testing.assert_array_equal(BM25(Checkpoints(make_model("t5")))(titled, titled), BM25()(both, both))


@needs_bm25s
def test_bm25_joins_the_configured_columns_and_counts_tokens_where_there_is_no_text():
    pairs = Dataset.from_dict(
        {"question": ["who sat", "who ran"], "sentence": ["the cat sat", "the dog ran"], "note": ["ran", "sat"]}
    )
    config = TrakConfig(text_columns=("question", "sentence"))
    scores = BM25(Checkpoints("unused", config))(pairs, pairs)
    assert scores.argmax(0).tolist() == [0, 1]
    assert scores[0, 1] > 0  # "who" and "the"
    tokens = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]})
    assert BM25()(tokens, tokens).argmax(0).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"no column 'sentence'; it has question"):
        BM25(Checkpoints("unused", config))(pairs, pairs.select_columns(["question"]))
    with pytest.raises(ValueError, match="BM25 compares texts"):
        BM25()(image_rows(2), image_rows(1))
    with pytest.raises(ValueError, match="No training text has a word"):
        BM25()(Dataset.from_dict({"text": ["", "a"]}), Dataset.from_dict({"text": ["cat"]}))


@pytest.mark.parametrize(
    ("name", "library", "advice"),
    [("bm25", "bm25s", r"hf-trak\[baselines\]"), ("influence_ekfac", "kronfluence", r"hf-trak\[ekfac\]")],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(name, library, advice, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ImportError, match=f"pip install '{advice}'"):
        make_baseline(name, Checkpoints(make_model("bert")))(token_rows(2), token_rows(1))
