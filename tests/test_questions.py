"""What is asked of queries: another output than their labels', two of them against each other, many queries as one."""

import json

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Value
from datasets_for_tests import image_rows, save_model, token_rows
from models import N_CLASSES, make_model
from reference import gradient_loop, trak_scores
from transformers import AutoModelForSequenceClassification

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.cli.main import main
from hf_trak.scoring.ensemble import ScoreOptions
from hf_trak.tasks import classification_margin

NAMES = ["Apple", "Pear", "Plum"]
CONFIG = TrakConfig(proj_dim=51, projector="identity", parameters=("^classifier",))
TRAIN, QUERIES = token_rows(40), token_rows(5, seed=1)
UNLABELLED = QUERIES.remove_columns("label")
PAPER = {"damping": 0.5, "out_to_loss_power": 1, "combination": "means", "progress": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [save_model(tmp_path_factory.mktemp("models") / f"bert-{seed}", seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def index(tmp_path_factory, models):
    train = TRAIN.cast_column("label", ClassLabel(names=NAMES))
    return AttributionIndex.build(
        tmp_path_factory.mktemp("index"), models=models, dataset=train, config=CONFIG, shard_rows=16, progress=False
    )


def batch_of(rows, labels):
    width = max(map(len, rows["input_ids"]))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows["input_ids"]])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows["input_ids"]])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.as_tensor(labels)}


def predicted(model, rows):
    batch = batch_of(rows, [0] * len(rows))
    del batch["labels"]
    with torch.no_grad():
        return model.eval()(**batch).logits.argmax(-1).tolist()


@pytest.fixture(scope="module")
def reference(models):
    """The scores of some labels of the queries, minus those of others, in float64 by the equation."""
    loaded = [AutoModelForSequenceClassification.from_pretrained(model) for model in models]
    names = [name for name, _ in loaded[0].named_parameters() if name.startswith("classifier")]

    def gradients(model, rows, labels):
        output, weights, grads = gradient_loop(model, batch_of(rows, labels), classification_margin, names)
        return output.numpy(), weights.numpy(), grads.numpy()

    train = [gradients(model, TRAIN, TRAIN["label"]) for model in loaded]

    def scores(labels, others=None):
        queries = [gradients(model, QUERIES, labels) for model in loaded]
        features, output = [query[2] for query in queries], np.mean([query[0] for query in queries], 0)
        if others is not None:
            against = [gradients(model, QUERIES, others) for model in loaded]
            features = [mine - theirs[2] for mine, theirs in zip(features, against, strict=True)]
            output = output - np.mean([query[0] for query in against], 0)
        return trak_scores([one[2] for one in train], features, [one[1] for one in train], PAPER["damping"]), output

    return scores, predicted(loaded[-1], QUERIES)


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_target_and_a_contrast_have_the_scores_of_the_equation(index, reference, caplog):
    scores, answers = reference
    n, labels = len(QUERIES), QUERIES["label"]
    assert answers != list(labels)
    asked = [
        ({"target": "prediction"}, (answers, None)),
        ({"target": 1}, ([1] * n, None)),
        ({"target": "plum"}, ([2] * n, None)),
        ({"contrast": ("Apple", 2)}, ([0] * n, [2] * n)),
    ]
    for question, (first, second) in asked:
        hits = index.attribute(UNLABELLED, len(TRAIN), **question, **PAPER)
        found = np.zeros((len(TRAIN), n))
        for query, hit in enumerate(hits):
            found[hit["proponents"], query] = hit["proponent_scores"]
        expected, output = scores(first, second)
        close(found, expected)
        close(hits["query_output"][:], output)
    close(index.score(QUERIES, contrast=("prediction", "label"), **PAPER), scores(answers, labels)[0])
    same = sum(np.equal(answers, labels))
    assert same
    assert f"the same output for {same} of 5 queries, whose scores are 0: row" in caplog.text


def test_many_queries_are_asked_as_one(index):
    whole = index.score(QUERIES, **PAPER)
    features = [np.array(index.featurize_queries(QUERIES, member, progress=False)["trak_features"]) for member in (0, 1)]
    for aggregate, expected in (("mean", whole.mean(1)), ("sum", whole.sum(1)), ("nearest", whole.max(1))):
        hits = index.attribute_features(features, len(TRAIN), aggregate=aggregate, **PAPER)
        assert len(hits) == 1
        found = np.zeros(len(TRAIN))
        found[hits[0]["proponents"]] = hits[0]["proponent_scores"]
        close(found, expected)
        assert hits[0]["opponents"] == hits[0]["proponents"][::-1]
    close(index.score(QUERIES, aggregate="nearest", **PAPER), whole.max(1)[:, None])
    alone, together = (index.attribute(QUERIES, 1, aggregate=aggregate, **PAPER) for aggregate in (None, "sum"))
    assert together[0]["proponents"] == [int(whole.sum(1).argmax())]
    close(together["query_output"][:], [sum(alone["query_output"][:])])


def test_options_are_one_object_of_which_keywords_change_fields(index):
    options = index.score_options(damping=2.0, leverage=True)
    assert options == ScoreOptions(2.0, leverage=True, out_to_loss_power=0.5)
    expected = index.score(QUERIES, damping=2.0, leverage=True, out_to_loss_power=1.0, progress=False)
    np.testing.assert_array_equal(index.score(QUERIES, options=options, out_to_loss_power=1.0, progress=False), expected)
    with pytest.raises(TypeError, match="no option 'dampening'. Known are damping"):
        index.score(QUERIES, dampening=2.0)


def audio():
    config = transformers.Wav2Vec2Config(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, num_labels=N_CLASSES, mask_time_prob=0.0,
    )  # fmt: skip
    return transformers.Wav2Vec2ForSequenceClassification(config)


def sounds(n_rows, seed=0):
    rng = np.random.default_rng(seed)
    waves = [rng.standard_normal(400).astype(np.float32).tolist() for _ in range(n_rows)]
    return Dataset.from_dict({"input_values": waves, "label": rng.integers(0, N_CLASSES, n_rows).tolist()})


def lora():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(make_model("bert"), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))


@pytest.mark.parametrize(
    ("make", "rows"),
    [(lora, token_rows), (lambda: make_model("vit"), image_rows), (audio, sounds)],
    ids=["adapter", "image", "sound"],
)
def test_predictions_are_labels_that_the_model_gives_itself(make, rows, tmp_path):
    torch.manual_seed(0)
    model, queries = make(), rows(4, seed=1)
    index = AttributionIndex.build(
        tmp_path / "index", models=model, dataset=rows(12), config=TrakConfig(proj_dim=16), progress=False
    )
    bare = queries.remove_columns("label")
    with pytest.raises(ValueError, match="lack 'label', which .* need no label: target='prediction'"):
        index.score(bare, progress=False)
    model.eval()
    answers = [model(**{name: torch.tensor([value]) for name, value in row.items()}).logits.argmax().item() for row in bare]
    labelled = bare.add_column("label", answers)
    np.testing.assert_array_equal(index.score(bare, target="prediction", progress=False), index.score(labelled, progress=False))
    shown = bare.with_transform(lambda columns: columns)
    np.testing.assert_array_equal(
        index.score(shown, target="prediction", progress=False), index.score(labelled, progress=False)
    )


def test_a_number_is_that_of_the_training_set_where_labels_go_by_name(tmp_path):
    model = make_model("bert")
    model.config.id2label, model.config.label2id = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}
    train = TRAIN.cast_column("label", ClassLabel(names=NAMES[::-1]))
    config = TrakConfig(proj_dim=16, label_mapping="by_name")
    index = AttributionIndex.build(tmp_path / "index", models=model, dataset=train, config=config, progress=False)
    plum = index.score(UNLABELLED, target="Plum", progress=False)
    np.testing.assert_array_equal(index.score(UNLABELLED, target=0, progress=False), plum)
    labelled = UNLABELLED.add_column("label", [0] * len(QUERIES)).cast_column("label", train.features["label"])
    np.testing.assert_array_equal(index.score(labelled, progress=False), plum)


def test_the_output_of_a_regression_needs_no_label(tmp_path):
    model = make_model("bert")
    model.classifier, model.num_labels = torch.nn.Linear(16, 1), 1
    model.config.num_labels, model.config.problem_type = 1, "regression"
    train = TRAIN.cast_column("label", Value("float32"))
    index = AttributionIndex.build(tmp_path / "i", models=model, dataset=train, config=TrakConfig(proj_dim=16), progress=False)
    labelled = UNLABELLED.add_column("label", [0.5] * len(QUERIES))
    expected = index.score(labelled, progress=False)
    np.testing.assert_array_equal(index.score(UNLABELLED, target="prediction", progress=False), expected)
    with pytest.raises(ValueError, match="has no class to choose, but `target` or `contrast` names 1"):
        index.score(UNLABELLED, target=1, progress=False)


def test_one_label_of_several_is_asked_by_name_and_two_against_each_other(tmp_path):
    model = make_model("bert")
    model.config.problem_type = "multi_label_classification"
    model.config.id2label, model.config.label2id = dict(enumerate(NAMES)), {name: id for id, name in enumerate(NAMES)}
    rows = np.random.default_rng(0).integers(0, 2, (len(TRAIN), N_CLASSES)).tolist()
    train = TRAIN.remove_columns("label").add_column("label", rows)
    built = AttributionIndex.build(tmp_path / "index", models=model, dataset=train, config=CONFIG, progress=False)
    parameters = [name for name, _ in model.named_parameters() if name.startswith("classifier")]

    def gradients(rows, output):
        def output_function(net, batch):
            return output(
                net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
            ), torch.ones(1)

        labels = rows["label"] if "label" in rows.column_names else [0] * len(rows)
        return gradient_loop(model, batch_of(rows, labels), output_function, parameters)[2].numpy()

    taught = gradients(train, lambda logits, labels: ((2 * labels - 1) * logits).sum(1))
    plum = gradients(UNLABELLED, lambda logits, _: logits[:, 2])
    apple = gradients(UNLABELLED, lambda logits, _: logits[:, 0])
    weights = np.ones(len(train))
    options = {"damping": 0.5, "out_to_loss_power": 0, "progress": False}
    close(built.score(UNLABELLED, target="Plum", **options), trak_scores([taught], [plum], [weights], 0.5))
    close(built.score(UNLABELLED, contrast=("Plum", 0), **options), trak_scores([taught], [plum - apple], [weights], 0.5))
    with pytest.raises(ValueError, match="'Fig' is neither .* nor a class"):
        built.score(UNLABELLED, target="Fig", progress=False)


@pytest.mark.parametrize(
    ("question", "says"),
    [
        (
            {"target": "cherry"},
            "'cherry' is neither 'label' nor 'prediction' nor a class of this index, which has 3: {0: 'Apple'",
        ),
        ({"target": 3}, "3 is neither"),
        ({"contrast": (1, 1)}, "two different outputs"),
        ({"contrast": "Apple"}, "`contrast` must be two classes"),
        ({"contrast": (0, 1), "target": 1}, "leave out target=1"),
        ({"aggregate": "max"}, "`aggregate` must be 'mean', 'sum', 'nearest' or None"),
    ],
)
def test_what_cannot_be_asked_is_refused(index, question, says):
    with pytest.raises(ValueError, match=says):
        index.score(UNLABELLED, progress=False, **question)


def test_the_command_line_asks_what_the_api_does(index, tmp_path, capsys):
    UNLABELLED.to_parquet(tmp_path / "queries.parquet")
    asking = ["attribute", str(index.folder), "--queries", str(tmp_path / "queries.parquet"), "--top_k", "3"]
    flags = [
        (["--target", "prediction"], {"target": "prediction"}, "(asked: prediction)"),
        (["--contrast", "plum", "0", "--aggregate", "nearest"], {"contrast": ("plum", 0), "aggregate": "nearest"},
         "[nearest of 5 queries, plum against 0]"),
    ]  # fmt: skip
    for number, (given, question, shown) in enumerate(flags):
        output = tmp_path / f"{number}.jsonl"
        assert main([*asking, "--output", str(output), *given]) == 0
        hits = list(map(json.loads, output.read_text().splitlines()))
        assert hits == list(index.attribute(UNLABELLED, 3, progress=False, **question))
        assert shown in capsys.readouterr().out
