"""A run's identity is everything that decides a row, and nothing else: content, not places."""

import json
import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from datasets_for_tests import save_model
from models import N_CLASSES
from test_row_digests import png
from tokenizers_for_tests import WORDS, word_tokenizer
from transformers import AutoConfig, AutoTokenizer

from hf_trak import AttributionIndex, Task, TrakConfig
from hf_trak.storage.writer import MemberWriter

CONFIG = TrakConfig(proj_dim=16)
NAMES = [f"class {i}" for i in range(N_CLASSES)]


def text_rows(n_rows=40, *, seed=0, names=None):
    generator = np.random.default_rng(seed)
    words = [word for word in WORDS if word.isalpha()]
    rows = {
        "text": [" ".join(generator.choice(words, size=generator.integers(3, 9))) for _ in range(n_rows)],
        "label": generator.integers(0, N_CLASSES, n_rows).tolist(),
        "url": [f"https://example.org/{i}" for i in range(n_rows)],
    }
    label = ClassLabel(names=names) if names else Value("int64")
    return Dataset.from_dict(rows, features=Features({"text": Value("string"), "label": label, "url": Value("string")}))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("identity") / "bert")
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def own(model, tmp_path):
    """A copy of the checkpoint that a test may change."""
    shutil.copytree(model, tmp_path / "bert")
    return tmp_path / "bert"


def build(folder, models, dataset, **options):
    options = {"config": CONFIG, "shard_rows": 8, "progress": False, **options}
    return AttributionIndex.build(folder, models=models, dataset=dataset, **options)


class Killed(Exception):
    """Ends a build as a kill would: after a shard is whole."""


def kill_after(monkeypatch, n_shards):
    """Let a build write some shards, and no more."""
    write, written = MemberWriter.write, []

    def write_some(self, shard, columns):
        if len(written) == n_shards:
            raise Killed
        written.append(shard)
        write(self, shard, columns)

    monkeypatch.setattr(MemberWriter, "write", write_some)
    return lambda: monkeypatch.setattr(MemberWriter, "write", write)


def begin(folder, models, dataset, monkeypatch, **options):
    """Begin an index and end it after two of its shards."""
    revive = kill_after(monkeypatch, 2)
    with pytest.raises(Killed):
        build(folder, models, dataset, **options)
    revive()


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def features_of(index):
    return {path.name: path.read_bytes() for path in index.members[0].folder.glob("*.parquet")}


# The dataset


def test_a_moved_touched_copied_or_reordered_back_dataset_is_the_same(model, tmp_path, monkeypatch):
    rows = text_rows()
    rows.to_parquet(tmp_path / "a.parquet")
    expected = features_of(build(tmp_path / "expected", model, rows))

    def read(name, cache):
        return load_dataset("parquet", data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / cache))

    begin(tmp_path / "index", model, read("a.parquet", "one"), monkeypatch)
    os.utime(tmp_path / "a.parquet", (1, 1))
    shutil.move(tmp_path / "a.parquet", tmp_path / "b.parquet")
    order = np.random.default_rng(1).permutation(len(rows))
    assert features_of(build(tmp_path / "index", model, read("b.parquet", "two"))) == expected
    for same in (rows.select(order).select(np.argsort(order)), rows.filter(lambda row: True), rows.with_format("torch")):
        assert features_of(build(tmp_path / "index", model, same)) == expected
    other_column = rows.map(lambda row: {"url": row["url"] + "#"})  # not read
    assert features_of(build(tmp_path / "index", model, other_column)) == expected


@pytest.mark.parametrize("change", ["a text", "a label", "the order", "a row more"])
def test_changed_content_is_refused(model, tmp_path, monkeypatch, change):
    rows = text_rows()
    begin(tmp_path / "index", model, rows, monkeypatch)
    changed = {
        "a text": lambda: rows.map(lambda row, i: {"text": row["text"] + (" a" if i == 33 else "")}, with_indices=True),
        "a label": lambda: rows.map(lambda row, i: {"label": (row["label"] + (i == 33)) % N_CLASSES}, with_indices=True),
        "the order": lambda: rows.select([1, 0, *range(2, len(rows))]),
        "a row more": lambda: rows.select([*range(len(rows)), 0]),
    }[change]()
    with pytest.raises(ValueError, match=r"(?s)holds other features.*dataset\.sha256: .* there, .* here"):
        build(tmp_path / "index", model, changed)


def test_a_changed_transform_is_refused_by_its_rows_or_its_code(model, tmp_path, monkeypatch):
    tokenizer = word_tokenizer()

    def make(suffix, limit=None):
        def tokenize(rows):
            texts = [text + (suffix if limit is None or len(text) > limit else "") for text in rows["text"]]
            return {"input_ids": tokenizer(texts)["input_ids"], "label": rows["label"]}

        return text_rows().with_transform(tokenize)

    begin(tmp_path / "index", model, make(" a"), monkeypatch)
    with pytest.raises(ValueError, match=r"dataset\.transform\.rows: .* there, .* here"):
        build(tmp_path / "index", model, make(" b"))
    with pytest.raises(ValueError, match=r"dataset\.transform\.code: .* there, .* here"):
        build(tmp_path / "index", model, make(" a", limit=1))  # the same rows, by other code
    assert build(tmp_path / "index", model, make(" a")).n_rows == 40


# What reads it


def test_a_changed_vocabulary_is_refused_even_in_one_word_that_no_probe_has(own, tmp_path, monkeypatch):
    rows = text_rows()
    begin(tmp_path / "index", own, rows, monkeypatch)
    content = json.loads((own / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [word for word in vocabulary if word.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    finished = build(tmp_path / "finished", own, rows)
    (own / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"processing\.tokenizer\.sha256: .* there, .* here"):
        build(tmp_path / "index", own, rows)
    with pytest.raises(ValueError, match=r"processing\.tokenizer\.sha256: .* there, .* here"):
        build(tmp_path / "finished", own, rows)
    with pytest.raises(ValueError, match=r"(?s)not what member_0.*processing\.tokenizer\.sha256: .* there, .* here"):
        AttributionIndex.from_pretrained(finished.folder).score(rows, progress=False)


def test_the_length_in_force_is_part_of_it_wherever_it_is_set(own, tmp_path, monkeypatch):
    rows = text_rows()
    change_json(own / "tokenizer_config.json", model_max_length=8)
    begin(tmp_path / "index", own, rows, monkeypatch)
    finished = build(tmp_path / "finished", own, rows)
    change_json(own / "tokenizer_config.json", model_max_length=4)
    for again in (lambda: build(tmp_path / "index", own, rows), lambda: build(tmp_path / "finished", own, rows)):
        with pytest.raises(ValueError, match="max_length: 8 there, 4 here"):
            again()
    with pytest.raises(ValueError, match="max_length: 8 there, 4 here"):
        AttributionIndex.from_pretrained(finished.folder).attribute(rows, progress=False)
    change_json(own / "tokenizer_config.json", model_max_length=8)
    assert build(tmp_path / "index", own, rows).n_rows == 40
    limited = TrakConfig(proj_dim=16, max_length=3)
    build(tmp_path / "limited", own, rows, config=limited)
    change_json(own / "tokenizer_config.json", model_max_length=5)  # not the least, so that nothing changes
    assert build(tmp_path / "limited", own, rows, config=limited).n_rows == 40


def test_what_does_not_reach_the_rows_is_not_part_of_it(own, tmp_path, monkeypatch):
    rows = text_rows()
    begin(tmp_path / "index", own, rows, monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer(["a b"], padding="max_length", truncation=True, max_length=3)  # leaves traces in the tokenizer
    tokenizer.padding_side = "left"
    moved = shutil.move(own, tmp_path / "elsewhere")
    change_json(tmp_path / "elsewhere" / "config.json", transformers_version="5.0.0", use_cache=False)
    index = build(tmp_path / "index", moved, rows, processing_class=tokenizer)
    expected = build(tmp_path / "expected", moved, rows)
    assert features_of(index) == features_of(expected)
    assert index.members[0].identity == expected.members[0].identity


@pytest.mark.parametrize(
    ("name", "value"), [("layer_norm_eps", 1e-3), ("hidden_act", "relu"), ("id2label", {str(i): f"x{i}" for i in range(N_CLASSES)})]
)  # fmt: skip
def test_a_changed_model_configuration_is_refused(own, tmp_path, monkeypatch, name, value):
    rows = text_rows()
    begin(tmp_path / "index", own, rows, monkeypatch)
    finished = build(tmp_path / "finished", own, rows)
    config = AutoConfig.from_pretrained(own)
    setattr(config, name, value)
    config.architectures = json.loads((own / "config.json").read_text())["architectures"]
    config.save_pretrained(own)
    for again in (
        lambda: build(tmp_path / "index", own, rows),
        lambda: AttributionIndex.from_pretrained(finished.folder).score(rows, progress=False),
    ):
        with pytest.raises(ValueError, match=rf"model_config\.{name}.* there, .* here"):
            again()


def test_a_changed_custom_task_of_the_same_name_is_refused(model, tmp_path, monkeypatch):
    tokenizer = word_tokenizer()

    def make(which):
        def output(model, batch):
            return model(**batch).logits[:, which]

        def collate(rows):
            return dict(tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt"))

        return Task.custom(output, collator=collate, name="one-logit")

    rows = text_rows()
    begin(tmp_path / "index", model, rows, monkeypatch, task=make(0))
    with pytest.raises(ValueError, match=r"dataset\.task_code: .* there, .* here"):
        build(tmp_path / "index", model, rows, task=make(1))
    assert build(tmp_path / "index", model, rows, task=make(0)).n_rows == 40


def test_other_libraries_are_refused_while_unfinished_and_told_of_after(model, tmp_path, monkeypatch, caplog):
    rows = text_rows()
    begin(tmp_path / "index", model, rows, monkeypatch)
    finished = build(tmp_path / "finished", model, rows)
    before, scores = features_of(finished), finished.score(rows, progress=False)
    monkeypatch.setattr("tokenizers.__version__", "1.99.0")
    with pytest.raises(ValueError, match=r"libraries\.tokenizers: '.*' there, '1\.99' here"):
        build(tmp_path / "index", model, rows)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    again = build(tmp_path / "finished", model, rows)
    assert "made with other versions of libraries (tokenizers: " in caplog.text
    assert features_of(again) == before
    assert np.array_equal(again.score(rows, progress=False), scores)


# Queries


def test_queries_that_lack_a_column_are_refused_before_a_model_is_loaded(model, tmp_path, monkeypatch):
    index = build(tmp_path / "index", model, text_rows())
    assert index.config.columns_read == {"text": ["text"], "label": "label"}
    monkeypatch.setattr("hf_trak.featurizing.checkpoint_model.load_model_and_base_rows", lambda *_, **__: pytest.fail("loaded"))
    queries = text_rows(4, seed=1)
    fresh = AttributionIndex.from_pretrained(index.folder)
    with pytest.raises(
        ValueError, match=r"queries lack 'text', which .* reads \(text text; label label\); they have sentence, label"
    ):
        fresh.attribute(queries.rename_column("text", "sentence").remove_columns("url"), progress=False)
    with pytest.raises(ValueError, match="queries lack 'label'"):
        fresh.score(queries.remove_columns("label"), progress=False)


def test_queries_are_read_by_the_recorded_columns_and_not_by_a_guess(model, tmp_path):
    rows = text_rows()
    index = build(tmp_path / "index", model, rows.select_columns(["text", "label"]))
    queries = text_rows(5, seed=1)
    expected = index.score(queries.select_columns(["text", "label"]), progress=False)
    more = queries.add_column("title", [text.upper() for text in queries["text"]]).add_column("label_text", ["x"] * 5)
    assert np.array_equal(index.score(more.select_columns(["title", "label_text", "label", "text"]), progress=False), expected)
    with_tokens = queries.add_column("input_ids", word_tokenizer()(queries["text"][:])["input_ids"])
    assert np.array_equal(index.score(with_tokens, progress=False), expected)


def test_label_names_of_queries_are_those_of_the_training_set(model, tmp_path):
    index = build(tmp_path / "index", model, text_rows(names=NAMES))
    assert index.config.label_names == tuple(NAMES)
    assert np.isfinite(index.score(text_rows(3, seed=1, names=NAMES), progress=False)).all()
    assert np.isfinite(index.score(text_rows(3, seed=1), progress=False)).all()  # numbers alone contradict nothing
    with pytest.raises(ValueError, match="(?s)training set: class 0, class 1.*queries: class 2, class 1"):
        index.score(text_rows(3, seed=1, names=NAMES[::-1]), progress=False)


def test_label_names_are_part_of_the_identity(model, tmp_path, monkeypatch):
    begin(tmp_path / "index", model, text_rows(names=NAMES), monkeypatch)
    with pytest.raises(ValueError, match="label names of dataset and model are in another order"):
        build(tmp_path / "index", model, text_rows(names=NAMES[::-1]))


# Rows that an index knows


def test_training_rows_are_found_by_content_in_any_order_and_among_others(model, tmp_path):
    rows = text_rows()
    index = build(tmp_path / "index", model, rows)
    assert index.align(rows) is rows
    order = np.random.default_rng(0).permutation(len(rows))
    larger = Dataset.from_dict(
        {
            name: [*text_rows(15, seed=5)[name], *rows.select(order)[name], *text_rows(5, seed=6)[name]]
            for name in rows.column_names
        }
    )
    found = index.align(larger)
    assert found["url"][:] == rows["url"][:]
    assert index.align(rows.select_columns(["label", "text"])).column_names == ["label", "text"]


def test_rows_of_the_same_content_stand_for_one_another(model, tmp_path):
    rows = text_rows(10)
    twice = rows.select([*range(10), *range(10)])
    index = build(tmp_path / "index", model, twice)
    assert index.align(rows)["url"][:] == [*rows["url"], *rows["url"]]
    numbered = twice.remove_columns("url").add_column("place", list(range(20)))
    assert index.align(numbered)["place"][:] == list(range(20))


def test_what_is_not_the_training_set_is_refused_with_counts_and_rows(model, tmp_path):
    rows = text_rows()
    index = build(tmp_path / "index", model, rows)
    changed = rows.map(lambda row, i: {"text": row["text"] + (" a" if i in (7, 30) else "")}, with_indices=True)
    with pytest.raises(
        ValueError, match=r"2 of the index's 40 rows are not among the 40 of this dataset, the first of them rows 7, 30\."
    ):
        index.align(changed)
    with pytest.raises(ValueError, match="30 of the index's 40 rows are not among the 10 .* rows 10, 11, 12, 13, 14, ..."):
        index.align(rows.select(range(10)))
    with pytest.raises(ValueError, match="content of 'label', 'text', but this dataset lacks 'text'; it has 'label', 'url'"):
        index.align(rows.remove_columns("text"))


def test_the_stored_digests_are_a_plain_column(model, tmp_path):
    index = build(tmp_path / "index", model, text_rows())
    for number in range(len(index.members)):
        digests = index.features(number)["trak_row_digest"][:]
        assert len(set(digests)) == 40
        assert all(len(digest) == 32 and int(digest, 16) >= 0 for digest in digests)


# Columns that are kept


def picture_rows(n_rows=12):
    features = Features({"text": Value("large_string"), "label": ClassLabel(names=NAMES), "picture": Image()})
    texts = text_rows(n_rows)
    pictures = [{"bytes": png(i), "path": f"/home/me/{i}.png"} for i in range(n_rows)]
    return Dataset.from_dict({"text": texts["text"], "label": texts["label"], "picture": pictures}, features=features)


def test_hits_show_themselves_without_the_training_set(model, tmp_path):
    rows = picture_rows()
    index = build(tmp_path / "index", [model, model], rows, keep_columns=["text", "label", "picture"], shard_rows=5)
    index.save_pretrained(tmp_path / "copy")
    plain = build(tmp_path / "plain", [model, model], rows, shard_rows=5)
    for one in (index, AttributionIndex.from_pretrained(tmp_path / "copy")):
        hits = one.attribute(text_rows(3, seed=1), top_k=4, progress=False)
        assert (
            hits.select_columns(plain.attribute(text_rows(3, seed=1), top_k=4, progress=False).column_names)[:]
            == (plain.attribute(text_rows(3, seed=1), top_k=4, progress=False)[:])
        )
        assert hits.features["proponent_label"].feature.names == NAMES
        for hit in hits:
            for kind in ("proponent", "opponent"):
                shown = rows.select(hit[f"{kind}s"])
                assert hit[f"{kind}_text"] == shown["text"][:]
                assert hit[f"{kind}_label"] == shown["label"][:]
                for found, picture in zip(hit[f"{kind}_picture"], shown["picture"], strict=True):
                    assert found.tobytes() == picture.tobytes()
    stored = load_dataset(str(index.folder), "member_0", split="train", cache_dir=str(tmp_path / "cache"))
    assert stored.features["label"] == rows.features["label"]
    assert stored.features["picture"] == Image()
    assert stored["text"][:] == rows["text"][:]
    assert b"/home/me" not in (index.folder / "member_0" / "train-00000-of-00003.parquet").read_bytes()
    assert "text" not in index.features(1).column_names
    assert index.kept_rows[7]["text"] == rows[7]["text"]
    assert "contains training data (`text`, `label`, `picture`)" in (index.folder / "README.md").read_text()


def test_a_hit_that_a_search_index_did_not_find_shows_nothing(model, tmp_path):
    rows = picture_rows()
    index = build(tmp_path / "index", model, rows, keep_columns=["text", "label", "picture"], shard_rows=5)
    hits = Dataset.from_dict({"proponents": [[7, -1], [11, 0]], "opponents": [[-1, -1], [3, 3]]})
    shown = index.kept_rows.beside(hits)
    assert shown["proponent_text"][:] == [[rows[7]["text"], None], [rows[11]["text"], rows[0]["text"]]]
    assert shown["opponent_label"][:] == [[None, None], [rows[3]["label"]] * 2]
    assert shown[0]["opponent_picture"] == [None, None]
    with pytest.raises(IndexError, match="rows 0 to 11, but row 12 was asked for"):
        index.kept_rows[12]


def test_an_index_with_kept_columns_continues_to_the_same_bytes(model, tmp_path, monkeypatch):
    rows = picture_rows()
    options = {"keep_columns": ["picture", "text"], "shard_rows": 4}
    expected = features_of(build(tmp_path / "expected", model, rows, **options))
    begin(tmp_path / "index", model, rows, monkeypatch, **options)
    with pytest.raises(ValueError, match=r"kept\.columns: \['picture', 'text'\] there, \['picture'\] here"):
        build(tmp_path / "index", model, rows, keep_columns=["picture"], shard_rows=4)
    assert features_of(build(tmp_path / "index", model, rows, **options)) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["title"], "names 'title', but the dataset has text, label, url"),
        (["text", "text"], "names 'text' twice"),
        (["trak_output"], "names 'trak_output', a name that the index uses"),
    ],
)
def test_columns_that_cannot_be_kept_are_refused_before_anything_is_written(model, tmp_path, columns, message):
    rows = text_rows().add_column("trak_output", [0.0] * 40) if columns == ["trak_output"] else text_rows()
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "index", model, rows, keep_columns=columns, config=TrakConfig(proj_dim=16, text_columns="text"))
    assert not (tmp_path / "index").exists()


def test_kept_columns_of_nulls_come_back_and_those_that_cannot_be_read_again_are_refused(model, tmp_path):
    config = TrakConfig(proj_dim=16, text_columns="text")
    rows = text_rows().select(range(6)).add_column("nothing", [None] * 6)
    index = build(tmp_path / "index", model, rows, keep_columns=["nothing"], config=config)
    assert index.attribute(rows.select([0]), top_k=2, progress=False)[0]["proponent_nothing"] == [None, None]
    views = rows.cast_column("url", Value("string_view"))
    with pytest.raises(
        ValueError, match="'url', of the type string_view, of which some rows cannot be read again. Cast it first"
    ):
        build(tmp_path / "views", model, views, keep_columns=["url"], config=config)
    assert not (tmp_path / "views").exists()


@pytest.mark.parametrize("ask", ["score", "attribute", "label_errors", "featurize_queries"])
def test_what_is_no_dataset_is_refused_with_how_to_make_one(model, tmp_path, ask):
    config = TrakConfig(proj_dim=16, text_columns="text")
    rows = text_rows().select(range(6))
    for given, way in (
        (rows.to_pandas(), "Dataset.from_pandas"),
        (rows.to_list(), "Dataset.from_list"),
        ({"train": rows}, "Give one of its splits"),
    ):
        with pytest.raises(ValueError, match=way):
            AttributionIndex.build(tmp_path / "no", models=model, dataset=given, config=config)
        with pytest.raises(ValueError, match=way):
            getattr(build(tmp_path / "index", model, rows, config=config), ask)(given)


def custom_task(weights, skipped="a"):
    def output(model, batch):
        words = {"a", "b", "c", "d", "e", "f", "g"}
        logits = model(input_ids=batch["input_ids"]).logits
        return (logits * weights).sum(1) + (1 if skipped in words else 0)

    def collate(rows):
        import torch

        return {"input_ids": torch.tensor([[1 + len(row["text"]) % 7, 2] for row in rows])}

    return Task.custom(output, collator=collate, name="weighted")


def test_custom_tasks_of_one_name_are_told_apart_by_the_tensors_and_the_code_of_queries(model, tmp_path):
    import torch

    weights = torch.ones(N_CLASSES)
    rows = text_rows(8)
    index = build(tmp_path / "index", model, rows, task=custom_task(weights))
    assert index.n_rows == build(tmp_path / "index", model, rows, task=custom_task(torch.ones(N_CLASSES))).n_rows
    other = custom_task(2 * weights)
    with pytest.raises(ValueError, match=r"dataset\.task_code: .* there, .* here"):
        build(tmp_path / "index", model, rows, task=other)
    asked = AttributionIndex.from_pretrained(tmp_path / "index", task=other)
    with pytest.raises(ValueError, match="task_code: "):
        asked.attribute(rows, progress=False)
    assert (
        len(AttributionIndex.from_pretrained(tmp_path / "index", task=custom_task(weights)).attribute(rows, progress=False))
        == 8
    )


def test_the_code_of_a_task_is_the_same_in_every_process():
    script = (
        "from hf_trak.sources.transforms import hash_callable\n"
        "def f(x): return x in {'a', 'b', 'c', 'd', 'e', 'f'} and x not in {1.5, ('u', 'v'), b'w'}\n"
        "print(hash_callable(f))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(found) == 1
