"""Labels as people have them: names in another order, strings, floats, missing ones."""

from __future__ import annotations

import logging

import datasets
import numpy as np
import pytest
import torch
from models import LANGUAGE_MODELS, bert
from tokenizers_for_tests import word_tokenizer

from hf_trak.config import TrakConfig
from hf_trak.tasks import AutoTask
from hf_trak.tasks.labels import is_informative, match_names


def model(*names: str, **options: object):
    """A classifier whose ids are in the order of `names`; of LABEL_0 and LABEL_1 without any."""
    if not names:
        return bert(num_labels=2, **options)
    ids = {name: i for i, name in enumerate(names)}
    return bert(num_labels=len(names), id2label=dict(enumerate(names)), label2id=ids, **options)


def rows(values: list, names: list[str] | None = None) -> datasets.Dataset:
    dataset = datasets.Dataset.from_dict({"input_ids": [[5, 6]] * len(values), "label": values})
    return dataset if names is None else dataset.cast_column("label", datasets.ClassLabel(names=names))


def labels(net, dataset: datasets.Dataset, **config: object) -> list[int]:
    task = AutoTask.from_model(net, TrakConfig(**config)).reading(dataset)
    task.check(dataset, None)
    return task.collate(dataset[:], None)["labels"].tolist()


# Names.


def test_class_names_in_another_order_are_refused_with_both_lists_and_the_mapping():
    dataset = rows([0, 1, 1], ["negative", "positive"])
    with pytest.raises(ValueError, match=r"another order.*0: 'negative', 1: 'positive'.*0: 'POSITIVE', 1: 'NEGATIVE'") as error:
        labels(model("POSITIVE", "NEGATIVE"), dataset)
    assert "0 ('negative') -> 1, 1 ('positive') -> 0" in str(error.value)
    assert 'label_mapping="by_name" (--label_mapping by_name)' in str(error.value)


def test_class_names_in_another_order_are_translated_where_that_is_asked_for():
    dataset = rows([0, 1, 1, 0], ["negative", "positive"])
    assert labels(model("POSITIVE", "NEGATIVE"), dataset, label_mapping="by_name") == [1, 0, 0, 1]
    assert labels(model("POSITIVE", "NEGATIVE"), dataset, label_mapping="by_id") == [0, 1, 1, 0]
    three = rows([0, 1, 2], ["entailment", "neutral", "contradiction"])
    assert labels(model("CONTRADICTION", "ENTAILMENT", "NEUTRAL"), three, label_mapping="by_name") == [1, 2, 0]


def test_queries_are_translated_by_their_own_names():
    task = AutoTask.from_model(model("a_class", "b_class"), TrakConfig(label_mapping="by_name"))
    train, queries = rows([0, 1], ["b class", "a class"]), rows([0, 1], ["a_class", "b_class"])
    assert task.reading(train).collate(train[:], None)["labels"].tolist() == [1, 0]
    assert task.reading(train).reading(queries).collate(queries[:], None)["labels"].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"has not seen the dataset"):
        task.collate(train[:], None)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (("NEGATIVE", "POSITIVE"), ["neg", "pos"]),
        (("not_equivalent", "equivalent"), ["not equivalent", "Equivalent"]),
        ((), ["neg", "pos"]),
        (("NEGATIVE", "POSITIVE"), ["0", "1"]),
        (("LABEL_0", "LABEL_1"), ["whatever", "else"]),
    ],
)
def test_names_that_agree_or_say_nothing_are_taken_as_they_are(mine: tuple, theirs: list[str]):
    assert labels(model(*mine), rows([0, 1, 1], theirs)) == [0, 1, 1]


def test_names_of_other_classes_are_refused():
    with pytest.raises(ValueError, match=r"names of dataset and model differ.*'ham'.*'cats'.*label_mapping=\"by_id\""):
        labels(model("cats", "dogs"), rows([0, 1], ["ham", "spam"]))
    with pytest.raises(ValueError, match=r"cannot match the names"):
        labels(model("cats", "dogs"), rows([0, 1], ["ham", "spam"]), label_mapping="by_name")


def test_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match=r"has 3 classes \('a', 'b', 'c'\), but the model has 2"):
        labels(model(), rows([0, 1], ["a", "b", "c"]))
    assert labels(model(), rows([0, 1], ["a", "b", "c"]), label_mapping="by_id") == [0, 1]


def test_a_configuration_that_contradicts_itself_is_refused():
    net = bert(num_labels=2, id2label={0: "a", 1: "b"}, label2id={"a": 1, "b": 0})
    with pytest.raises(ValueError, match="contradicts itself"):
        AutoTask.from_model(net)


def test_beginnings_match_only_where_one_name_begins_so():
    assert match_names(["neg", "pos"], {"POSITIVE": 0, "NEGATIVE": 1}) == (1, 0)
    assert match_names(["pos"], {"positive": 0, "possible": 1}) is None
    assert match_names(["entailment", "not_entailment"], {"NOT-ENTAILMENT": 0, "ENTAILMENT": 1}) == (1, 0)
    assert not is_informative(["LABEL_0", "label 1", "2"])
    assert is_informative(["LABEL_0", "good"])


def test_names_in_a_column_beside_the_numbers_are_compared():
    texts = ["negative", "positive", "positive", "negative"]
    dataset = rows([0, 1, 1, 0]).add_column("label_text", texts)
    with pytest.raises(ValueError, match=r"another order.*0: 'negative', 1: 'positive'.*0: 'POSITIVE', 1: 'NEGATIVE'"):
        labels(model("POSITIVE", "NEGATIVE"), dataset)
    assert labels(model("POSITIVE", "NEGATIVE"), dataset, label_mapping="by_name") == [1, 0, 0, 1]
    assert labels(model("POSITIVE", "NEGATIVE"), dataset, label_mapping="by_id") == [0, 1, 1, 0]
    for net in (model("NEGATIVE", "POSITIVE"), model(), model("1 star", "5 stars")):
        assert labels(net, dataset) == [0, 1, 1, 0]
    noisy = rows([0, 1, 1, 0]).add_column("label_text", ["positive", *texts[1:]])  # says something else
    assert labels(model("POSITIVE", "NEGATIVE"), noisy) == [0, 1, 1, 0]


NUMBERED = [
    str(number) for number in sorted(range(12), key=str)
]  # as `class_encode_column` sorts numbers: 0, 1, 10, 11, 2, ...


def test_names_that_are_numbers_in_another_order_are_refused():
    dataset = rows([0, 1, 2, 3], NUMBERED)
    for net in (bert(num_labels=12), model(*map(str, range(12)))):
        with pytest.raises(ValueError, match=r"another order.*2 \('10'\) -> 10"):
            labels(net, dataset)
        assert labels(net, dataset, label_mapping="by_name") == [0, 1, 10, 11]
        assert labels(net, dataset, label_mapping="by_id") == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"another order.*0 \('0'\) -> 1"):
        labels(model("LABEL_1", "LABEL_0"), rows([0, 1], ["0", "1"]))
    assert labels(model(*NUMBERED), dataset) == [0, 1, 2, 3]


@pytest.mark.parametrize(("mine", "theirs"), [(("1", "2"), ["0", "1"]), ((), ["1", "2"]), (("0", "1"), ["bad", "good"])])
def test_numbers_that_name_other_things_say_nothing(mine: tuple, theirs: list[str]):
    assert labels(model(*mine), rows([0, 1, 1], theirs)) == [0, 1, 1]


# Strings.


def test_strings_that_are_numbers_are_looked_up_as_names():
    assert labels(model("1", "2"), rows(["2", "1", "2"])) == [1, 0, 1]
    assert labels(model("1", "0"), rows(["1", "0"])) == [0, 1]
    assert labels(model(), rows(["LABEL_1", "LABEL_0"])) == [1, 0]
    with pytest.raises(ValueError, match=r"no names of its classes"):
        labels(model(), rows(["1", "0"]))


def test_strings_are_looked_up_in_label2id_and_never_sorted():
    assert labels(model("POSITIVE", "NEGATIVE"), rows(["NEGATIVE", "POSITIVE", "NEGATIVE"])) == [1, 0, 1]


def test_a_difference_in_case_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        assert labels(model("POSITIVE", "NEGATIVE"), rows(["negative", "POSITIVE"])) == [1, 0]
    assert "differ in case; taken as the same: 'negative' as 'NEGATIVE'" in caplog.text


def test_strings_that_the_model_does_not_know_are_refused_without_a_guess():
    with pytest.raises(
        ValueError, match=r"2 of 3 labels are no class of the model: 'neutral' in rows 1, 2.*'POSITIVE', 'NEGATIVE'"
    ):
        labels(model("POSITIVE", "NEGATIVE"), rows(["NEGATIVE", "neutral", "neutral"]))
    with pytest.raises(ValueError, match=r"Set `model.config.label2id`") as error:
        labels(model(), rows(["NEGATIVE", "POSITIVE"]))
    assert "class_encode_column" not in str(error.value)


# Numbers.


@pytest.mark.parametrize("values", [[0.0, 1.0, 1.0], [False, True, True], np.array([0, 1, 1], dtype=np.uint8)])
def test_whole_floats_booleans_and_small_integers_are_classes(values):
    assert labels(model(), rows(values)) == [0, 1, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1, None, 1] + [0] * 20 + [None], r"2 of 25 rows have no label \(None or NaN\): rows 2, 24\. Filter"),
        ([0.0, float("nan"), 1.0], r"1 of 3 rows have no label \(None or NaN\): row 1\."),
        ([0.0, 0.5, 1.0], r"1 of 3 labels are not whole: 0\.5 in row 1"),
        (["NEGATIVE", None], r"1 of 2 rows have no label .*row 1"),
    ],
)
def test_one_wrong_label_among_many_is_named_by_its_row(values: list, message: str):
    with pytest.raises(ValueError, match=message) as error:
        labels(model("POSITIVE", "NEGATIVE"), rows(values))
    assert "class_encode_column" not in str(error.value)


def test_two_label_columns_that_differ_are_refused():
    dataset = datasets.Dataset.from_dict({"input_ids": [[5], [6]], "label": [0, 1], "labels": [1, 1]})
    with pytest.raises(ValueError, match="'labels' and 'label', which differ"):
        labels(model(), dataset)
    assert labels(model(), dataset, label_column="label") == [0, 1]


# Several labels per example.


def test_the_output_of_several_labels_is_the_sum_of_their_log_odds():
    net = bert(num_labels=3, problem_type="multi_label_classification").double().eval()
    task = AutoTask.from_model(net)
    assert task.name == "text-multi-label"
    dataset = datasets.Dataset.from_dict({"input_ids": [[5, 6], [7, 8, 9]], "labels": [[1, 0, 1], [0, 0, 0]]})
    task.check(dataset, None)
    batch = task.collate(dataset[:], None)
    output, out_to_loss = task.output_function(net, batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    p = torch.sigmoid(net(**inputs).logits).detach().numpy()
    y = np.array([[1, 0, 1], [0, 0, 0]])
    right = np.where(y == 1, p, 1 - p)
    np.testing.assert_allclose(output.detach().numpy(), np.log(right / (1 - right)).sum(1), rtol=1e-10)
    np.testing.assert_allclose(out_to_loss.numpy(), (1 - right).mean(1), rtol=1e-10)
    # The model trains on the mean of the labels' losses; the weights of the labels' gradients are their 1 - p.
    loss = net(**inputs, labels=torch.tensor(y, dtype=torch.float64)).loss
    np.testing.assert_allclose(loss.item(), -np.log(right).mean(), rtol=1e-10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 0, 1], [2]], r"1 of 2 are not: \[2\] in row 1.*MultiLabelBinarizer"),
        ([[1, 0, 1], [1, 0, 0.5]], r"1 of 2 are not: \[1\.0, 0\.0, 0\.5\] in row 1"),
        ([[1, 0, 1], None], r"1 of 2 rows have no label.*row 1"),
    ],
)
def test_rows_that_are_no_zeros_and_ones_are_refused(values: list, message: str):
    net = bert(num_labels=3, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=message):
        labels(net, rows(values))


# Labels of tokens.

TAGS = ["O", "B-PER", "I-PER", "B-MISC"]
OTHER_TAGS = ["O", "B-MISC", "B-PER", "I-PER"]  # as a model may number them


def tagger(*names: str):
    ids = {name: i for i, name in enumerate(names)}
    return LANGUAGE_MODELS["bert tokens"](num_labels=len(names), id2label=dict(enumerate(names)), label2id=ids)


def tagged(names: list[str] | None = TAGS, **more: object) -> datasets.Dataset:
    dataset = datasets.Dataset.from_dict({"tokens": [["a", "b"], ["c"]], "ner_tags": [[1, 2], [3]], **more})
    kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    return dataset.cast_column("ner_tags", datasets.List(kind))


def token_labels(net, dataset: datasets.Dataset, **config: object) -> list[list[int]]:
    task = AutoTask.from_model(net, TrakConfig(**config)).reading(dataset)
    task.check(dataset, word_tokenizer())
    return task.collate(dataset[:], word_tokenizer())["labels"].tolist()


def test_names_of_the_classes_of_tokens_are_compared():
    assert token_labels(tagger(*TAGS), tagged()) == [[1, 2], [3, -100]]
    with pytest.raises(ValueError, match=r"another order.*1 \('B-PER'\) -> 2, 2 \('I-PER'\) -> 3, 3 \('B-MISC'\) -> 1"):
        token_labels(tagger(*OTHER_TAGS), tagged())
    assert token_labels(tagger(*OTHER_TAGS), tagged(), label_mapping="by_name") == [[2, 3], [1, -100]]
    assert token_labels(tagger(*OTHER_TAGS), tagged(), label_mapping="by_id") == [[1, 2], [3, -100]]
    assert token_labels(tagger(*OTHER_TAGS), tagged(None)) == [[1, 2], [3, -100]]
    tokenized = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[1, -100, 2]]})
    tokenized = tokenized.cast_column("labels", datasets.List(datasets.Value("int64")))
    assert token_labels(tagger(*OTHER_TAGS), tokenized) == [[1, -100, 2]]


def test_tags_that_are_strings_are_looked_up():
    strings = datasets.Dataset.from_dict({"tokens": [["a", "b"], ["c"]], "ner_tags": [["B-PER", "O"], ["B-MISC"]]})
    assert token_labels(tagger(*OTHER_TAGS), strings) == [[2, 0], [1, -100]]
    with pytest.raises(ValueError, match=r"Row 1 cannot serve: its label 'B-MISC' is no class of the model.*'B-PER'"):
        token_labels(tagger(*TAGS[:3]), strings)


def test_of_several_columns_of_tags_the_one_of_the_models_names_is_read():
    pos = [[0, 1], [1]]
    both = tagged(pos_tags=pos).cast_column("pos_tags", datasets.List(datasets.ClassLabel(names=["NN", "VB"])))
    assert token_labels(tagger(*TAGS), both) == [[1, 2], [3, -100]]
    assert token_labels(tagger("NN", "VB"), both) == [[0, 1], [1, -100]]
    with pytest.raises(ValueError, match=r"ambiguous: 'ner_tags', 'pos_tags' may. Set `label_column`"):
        token_labels(tagger(*TAGS), tagged(None, pos_tags=pos))
    assert token_labels(tagger(*TAGS), tagged(None, pos_tags=pos), label_column="pos_tags") == [[0, 1], [1, -100]]
