"""Which columns are taken for texts, in tables as people have them."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from hf_trak.feature_args import FeatureArguments
from hf_trak.tasks.columns import find_text_columns, is_set_aside, reads_like_text

RNG = np.random.default_rng(0)
WORDS = np.array(
    [
        "the",
        "film",
        "was",
        "neither",
        "good",
        "nor",
        "bad",
        "but",
        "its",
        "actors",
        "and",
        "music",
        "held",
        "my",
        "interest",
        "for",
        "two",
        "hours",
    ]
)


def text(n: int) -> list[str]:
    return [" ".join(RNG.choice(WORDS, RNG.integers(4, 12))) for _ in range(n)]


def table(**columns: object) -> datasets.Dataset:
    """Columns by kind: a list as it is, or "text", "id", "url", "code", "category", "label name"."""
    n, labels = 60, RNG.integers(0, 3, 60).tolist()
    kinds = {
        "text": lambda: text(n),
        "id": lambda: [f"tr-{number:05d}" for number in range(n)],
        "url": lambda: [f"https://example.org/{number}" for number in range(n)],
        "code": lambda: [f"{RNG.integers(1 << 60):x}" for _ in range(n)],
        "category": lambda: [("sports", "world news", "arts")[i] for i in RNG.integers(0, 3, n)],
        "label name": lambda: [("very bad", "so so", "very good")[label] for label in labels],
        "empty": lambda: [None] * n,
        "number": lambda: list(range(n)),
    }
    made = {name: kinds[kind]() if isinstance(kind, str) else kind for name, kind in columns.items()}
    features = datasets.Features(
        {
            **{name: datasets.Value("int64" if columns[name] == "number" else "string") for name in made},
            "label": datasets.Value("int64"),
        }
    )
    return datasets.Dataset.from_dict({**made, "label": labels}, features=features)


def chosen(rows: datasets.Dataset) -> tuple[str, ...]:
    return find_text_columns(rows.features, label_column="label", dataset=rows)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": "text", "label_text": "label name"}, ("text",)),  # SetFit, mteb
        ({"id": "id", "text": "text"}, ("text",)),
        ({"idx": "number", "sentence": "text"}, ("sentence",)),  # SST-2, CoLA
        ({"id": "id", "sentence1": "text", "sentence2": "text"}, ("sentence1", "sentence2")),  # PAWS, MRPC
        ({"sentence2": "text", "sentence1": "text"}, ("sentence1", "sentence2")),
        ({"text1": "text", "text2": "text", "idx": "id", "label_text": "label name"}, ("text1", "text2")),  # SetFit/mrpc
        ({"hypothesis": "text", "premise": "text", "reason": "text", "uid": "id"}, ("premise", "hypothesis")),  # XNLI, ANLI
        ({"sentence_A": "text", "sentence_B": "text", "pair_ID": "id"}, ("sentence_A", "sentence_B")),  # SICK
        ({"question1": "text", "question2": "text"}, ("question1", "question2")),  # QQP
        ({"sentence": "text", "question": "text", "idx": "number"}, ("question", "sentence")),  # QNLI
        ({"passage": "text", "question": "text"}, ("question", "passage")),  # BoolQ
        ({"query": "text", "passage": "text", "query_id": "id"}, ("query", "passage")),
        ({"content": "text", "title": "text"}, ("title", "content")),  # DBpedia
        ({"review_id": "id", "review_body": "text", "language": "category"}, ("review_body",)),
        ({"Unnamed: 0": "id", "tweet": "text"}, ("tweet",)),
        ({"__index_level_0__": "id", "comment_text": "text", "url": "url"}, ("comment_text",)),
        ({"text": "text", "keyword": "category", "location": "category"}, ("text",)),
        ({"Text": "text", "guid": "id"}, ("Text",)),
        ({"utt": "text", "annot_utt": "text", "locale": "category"}, ("utt",)),  # MASSIVE
        # Unusual names: the first rows decide.
        ({"Rezension": "text", "Nummer": "id"}, ("Rezension",)),
        ({"Rezension": "text", "Sparte": "category"}, ("Rezension",)),
        ({"Rezension": "text", "Urteil": "label name"}, ("Rezension",)),
        ({"Rezension": "text", "Quelle": "url", "Probe": "code", "Notiz": "empty"}, ("Rezension",)),
        ({"question": "text", "topic_code": "code"}, ("question",)),
        ({"question": "text", "answer": "label name"}, ("question",)),  # the label in words
        ({"text": "text", "source": "category"}, ("text",)),
        ({"sentence": "text", "title": "code"}, ("sentence",)),
        ({"word": "code"}, ("word",)),  # nothing else can be meant
    ],
)  # fmt: skip
def test_usual_names_win_and_identifiers_and_label_texts_are_never_a_second_sentence(columns: dict, expected: tuple):
    assert chosen(table(**columns)) == expected
    reordered = dict(reversed(list(columns.items())))
    assert chosen(table(**reordered)) == expected


@pytest.mark.parametrize(
    "columns",
    [
        {"Rezension": "text", "Antwort": "text"},
        {"text": "text", "review": "text"},
        {"question": "text", "Antwort": "text"},
        {"sentence1": "text", "sentence2": "text", "sentence3": "text"},
        {"premise": "text", "hypothesis": "text", "text": "text"},
        {"text": "text", "Text ": "text"},
    ],
)
def test_what_stays_ambiguous_is_refused_with_the_candidates_and_the_flag(columns: dict):
    first, second = list(columns)[:2]
    with pytest.raises(ValueError, match=rf"'{first}', '{second}'.*text_columns=\('{first}',\) \(--text_columns {first}\)"):
        chosen(table(**columns))


@pytest.mark.parametrize("columns", [{"id": "id"}, {"label_text": "label name", "guid": "id"}, {"number": "number"}])
def test_a_table_without_a_text_is_refused(columns: dict):
    with pytest.raises(
        ValueError, match=r"one or two text columns, but the dataset has .*Set `text_columns` \(--text_columns\)"
    ):
        chosen(table(**columns))


def test_without_rows_names_decide_alone():
    rows = table(Rezension="text", Nummer="id")
    with pytest.raises(ValueError, match="'Rezension', 'Nummer' may"):
        find_text_columns(rows.features, label_column="label")
    assert find_text_columns(table(sentence="text", Nummer="id").features) == ("sentence",)


def test_a_string_label_is_no_text():
    rows = datasets.Dataset.from_dict({"Rezension": text(30), "Urteil": ["gut", "nicht so gut"] * 15})
    assert find_text_columns(rows.features, label_column="Urteil", dataset=rows) == ("Rezension",)


def test_names_of_identifiers_are_told_in_every_spelling():
    set_aside = [
        "id",
        "ID",
        "doc_id",
        "reviewId",
        "pairID",
        "id_str",
        "Unnamed: 0.1",
        "__index_level_0__",
        "uuid",
        "labelName",
        "gold_label",
    ]
    assert all(map(is_set_aside, set_aside))
    assert not any(map(is_set_aside, ["text", "video", "idea", "hidden text", "sentence"]))


def test_texts_without_spaces_are_texts():
    assert reads_like_text([f"这部电影很好看{number}" for number in range(50)])
    assert not reads_like_text([f"A{number:04d}" for number in range(50)])


@pytest.mark.parametrize("given", [["premise", "hypothesis"], ["premise,hypothesis"]])
def test_the_flag_takes_columns_apart_by_spaces_or_commas(given: list[str]):
    assert FeatureArguments(text_columns=given).trak_config().text_columns == ("premise", "hypothesis")
