"""Documents in chunks: every token is scored once, documents are scored by their chunks, and both are shown."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import make_model
from tokenizers_for_tests import byte_tokenizer, word_tokenizer
from transformers import AutoModelForCausalLM

from hf_trak import AttributionArguments, AttributionIndex, AttributionTrainer, TrakConfig
from hf_trak.cli.main import main
from hf_trak.tasks.chunks import Chunker

TEXTS = [
    "a b c d e f g h i j a c e g i b d f h j",
    "",
    "j i h",
    "c c a b d e f",
    "a b c d e f g h a",
    "h g f e d c b a j i h g f",
]
DOCUMENTS = Dataset.from_dict({"url": [f"page {i}" for i in range(6)], "text": TEXTS})
CONFIG = TrakConfig(
    proj_dim=64, max_length=6, chunk_overlap=2, skip_unscored=True, token_reduction="sum", parameters=("ln_f|h.1.mlp",)
)
LENGTHS = [[6, 4, 4, 4, 3], [1], [4], [6, 2], [6, 4], [6, 4, 4]]  # own tokens, the EOS token among them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("documents")
    make_model("gpt2 lm", seed=0).save_pretrained(found / "model")
    word_tokenizer().save_pretrained(found / "model")
    DOCUMENTS.to_parquet(found / "train.parquet")
    return found


@pytest.fixture(scope="module")
def index(folder):
    return AttributionIndex.build(
        folder / "index", models=folder / "model", dataset=DOCUMENTS, config=CONFIG, shard_rows=4, progress=False,
        keep_columns=["text", "url"],
    )  # fmt: skip


@pytest.mark.parametrize("overlap", [0, 1, 3, 7])
def test_chunks_hold_every_token_and_character_once(overlap):
    tokenizer = byte_tokenizer()
    chunker = Chunker(tokenizer, 8, overlap)
    for text in ("", "x", "eight by", "a naïve 東京 text of some length, ☃ and all", "nine byte"):
        whole = tokenizer(text + "<EOS>")["input_ids"]
        chunks = chunker.cut(text)
        assert "".join(text[chunk.start : chunk.stop] for chunk in chunks) == text
        scored = [int(label) for chunk in chunks for label in chunk.labels if label != -100]
        assert scored == whole[: len(scored)]
        assert len(scored) == len(whole) or (overlap == 0 and len(scored) == len(whole) - 1)
        for one, other in itertools.pairwise(chunks):
            assert len(one.ids) == 8
            assert other.ids[:overlap].tolist() == one.ids[len(one.ids) - overlap :].tolist()
            assert (other.labels[:overlap] == -100).all()


def test_rows_are_chunks_with_the_ids_of_their_documents(index):
    kept = index.kept_rows.take(range(index.n_rows)).to_dict()
    assert kept["document_id"] == [number for number, chunks in enumerate(LENGTHS) for _ in chunks]
    assert kept["chunk_id"] == [place for chunks in LENGTHS for place, _ in enumerate(chunks)]
    assert kept["url"] == [f"page {number}" for number in kept["document_id"]]
    for number, text in enumerate(TEXTS):
        parts = [part for part, owner in zip(kept["text"], kept["document_id"], strict=True) if owner == number]
        assert "".join(parts) == text
        # A chunk ends where the first token of the next one begins: at a space.
        assert [len(part.split()) for part in parts] == [*LENGTHS[number][:-1], LENGTHS[number][-1] - 1]


def test_a_long_query_is_the_sum_of_its_chunks(index):
    """Of a document of the training set, these are rows of the index."""
    rows = index.features().with_format("numpy")
    owners = np.asarray(index.kept_rows.take(range(index.n_rows))["document_id"][:])
    found = index.featurize_queries(DOCUMENTS.select([0, 5]), progress=False)
    for place, number in enumerate((0, 5)):
        for name in ("trak_features", "trak_output"):
            expected = rows[name][:][owners == number].astype(np.float64).sum(0)
            np.testing.assert_allclose(found[name][place], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_output_of_a_document_is_that_of_its_tokens_each_with_its_context(index, folder):
    """Window by window, by the model alone in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").double().eval()
    ids = word_tokenizer()(TEXTS[0] + "</s>")["input_ids"]
    total = 0.0
    for place in range(1, len(ids)):
        first = next(start for start in range(0, len(ids), 4) if start + 6 > place)  # of the first window that holds the token
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids[first:place]])).logits[0, -1].log_softmax(-1)[ids[place]]
        total += float(logp - torch.log1p(-logp.exp()))
    found = index.featurize_queries(DOCUMENTS.select([0]), progress=False)["trak_output"]
    np.testing.assert_allclose(found, [total], rtol=1e-5)


def test_the_mean_over_a_long_query_weighs_chunks_by_their_tokens(folder):
    config = TrakConfig(proj_dim=64, max_length=6, chunk_overlap=2, parameters=CONFIG.parameters)
    index = AttributionIndex.build(
        folder / "mean", models=folder / "model", dataset=DOCUMENTS.select([0, 3, 4, 5]), config=config, progress=False
    )
    rows = index.features().with_format("numpy")["trak_features"][:5].astype(np.float64)
    shares = np.array([5, 4, 4, 4, 3]) / 20  # nothing predicts the first token
    found = index.featurize_queries(DOCUMENTS.select([0]), progress=False)["trak_features"][0]
    np.testing.assert_allclose(found, shares @ rows, rtol=1e-4, atol=1e-5 * np.abs(found).max())


def test_documents_are_scored_by_their_chunks(index):
    queries = Dataset.from_dict({"text": ["a b c", "h g f e d c b a j", "c a b"]})
    rows = index.score(queries, progress=False)
    owners = np.asarray(index.kept_rows.take(range(index.n_rows))["document_id"][:])
    parts = [rows[owners == number].astype(np.float64) for number in range(6)]
    sums, highest, lowest = (np.stack([how(part, 0) for part in parts]) for how in (np.sum, np.max, np.min))
    np.testing.assert_allclose(index.score(queries, documents="sum", progress=False), sums, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(index.score(queries, documents="max", progress=False), highest.astype(np.float32))
    assert (sums[1] == 0).all()  # the empty document
    for way, up, down in (("sum", sums, sums), ("max", highest, lowest)):
        hits = index.attribute(queries, 3, documents=way, progress=False)
        for query in range(3):
            hit = hits[query]
            for kind, scores, chosen, sign in (("proponent", up, np.argmax, -1), ("opponent", down, np.argmin, 1)):
                best = np.argsort(sign * scores[:, query], kind="stable")[:3]
                assert hit[f"{kind}s"] == best.tolist()
                np.testing.assert_allclose(hit[f"{kind}_scores"], scores[best, query], rtol=1e-5, atol=1e-9)
                strongest = [np.flatnonzero(owners == number)[chosen(parts[number][:, query])] for number in best]
                assert hit[f"{kind}_rows"] == strongest
                assert hit[f"{kind}_document_id"] == best.tolist()


def test_jobs_and_a_second_call_make_the_same_chunks(index, folder):
    arguments = {
        "models": folder / "model", "dataset": DOCUMENTS, "config": CONFIG, "shard_rows": 4, "progress": False,
        "keep_columns": ["text", "url"],
    }  # fmt: skip
    for part in range(2):
        AttributionIndex.build_shards(folder / "jobs", shard_index=part, num_shards=2, **arguments)
    merged = AttributionIndex.merge(folder / "jobs")
    assert merged.members[0].info["files"] == index.members[0].info["files"]
    written = {path: path.stat().st_mtime_ns for path in index.members[0].shard_paths}
    AttributionIndex.build(folder / "index", **arguments)
    assert written == {path: path.stat().st_mtime_ns for path in index.members[0].shard_paths}
    other = TrakConfig.from_dict({**CONFIG.to_dict(), "chunk_overlap": 3})
    with pytest.raises(ValueError, match="chunk_overlap: 3 here, 2 there"):
        AttributionIndex.build(folder / "index", **{**arguments, "config": other})


def test_the_report_shows_a_chunk_inside_its_document(index, folder, capsys):
    shuffled = DOCUMENTS.select([5, 3, 1, 0, 2, 4])
    aligned = index.align(shuffled)
    assert aligned["text"][:] == index.kept_rows.take(range(index.n_rows))["text"][:]
    with pytest.raises(ValueError, match="of its 6 documents, 5 are among the 5"):
        index.align(DOCUMENTS.select(range(5)))
    found = index.explain("a b c ", answer="e f", documents="max", top_k=6, train=shuffled, progress=False)
    hits = {hit.example.row: hit.example for hit in (*found.attribution.proponents, *found.attribution.opponents)}
    middle = next(one for one in hits.values() if one.before and one.after)
    assert middle.before + middle.text + middle.after in TEXTS[int(middle.note.split()[1].strip(","))]
    assert (
        f'{middle.before}</span>{middle.text}<span class="around" style="opacity: .6">{middle.after}</span>' in found.to_html()
    )

    main(["featurize", "--model", str(folder / "model"), "--dataset", str(folder / "train.parquet"), "--output", str(folder / "cli"),
          "--chunk_overlap", "2", "--max_length", "6", "--skip_unscored", "--proj_dim", "16"])  # fmt: skip
    main(["explain", str(folder / "cli"), "--prompt", "a b c ", "--answer", "d", "--documents", "sum", "--train", str(folder / "train.parquet"),
          "--report", str(folder / "report")])  # fmt: skip
    assert "(document 0, chunk " in capsys.readouterr().out
    assert 'class="around"' in (folder / "report" / "report.html").read_text()


@pytest.mark.parametrize(("dataset", "options", "message"), [
    ({"text": ["a b", None]}, {}, r"1 of 2 documents have no text in 'text' \(None\), row 1"),
    ({"text": ["a b", ""]}, {"skip_unscored": False}, "1 of 2 documents have no scored token, row 1"),
    ({"messages": [[{"role": "user", "content": "a"}]]}, {}, "Leave it out for rows of 'messages'"),
    ({"text": ["a"], "labels": [1]}, {"keep": ["labels"]}, "the name of a column of the chunks"),
    ({"text": ["a b c"]}, {"max_length": None, "chunk_overlap": 20}, "must be smaller than the 20 tokens of a chunk"),
    ({"text": ["a b c"]}, {"loss_on": "completion"}, "of which all tokens are scored"),
])  # fmt: skip
def test_what_cannot_be_cut_is_refused(dataset, options, message, folder, tmp_path):
    keep = options.pop("keep", []) if "keep" in options else []
    config = TrakConfig.from_dict({**CONFIG.to_dict(), **options})
    with pytest.raises(ValueError, match=message):
        AttributionIndex.build(
            tmp_path / "index", models=folder / "model", dataset=Dataset.from_dict(dataset), config=config, keep_columns=keep
        )


def test_questions_that_chunks_do_not_answer_are_refused(index):
    queries = Dataset.from_dict({"text": ["a b c"]})
    with pytest.raises(ValueError, match="`documents` must be 'max', 'sum' or left out, but is 'mean'"):
        index.score(queries, documents="mean")
    with pytest.raises(ValueError, match="leave it out with `documents`"):
        index.attribute(queries, documents="max", soft_threshold=2)
    with pytest.raises(ValueError, match="Give texts in 'text'"):
        index.attribute(queries.rename_column("text", "words"))
    with pytest.raises(ValueError, match="it is 21 tokens, more than the 6 of a chunk; ask `index.attribute"):
        index.featurizer()(DOCUMENTS[:1])
    with pytest.raises(ValueError, match="Query 1 has no scored token"):
        index.score(Dataset.from_dict({"text": ["a b", ""]}))
    with pytest.raises(ValueError, match="`chunk_overlap` must be smaller than `max_length`"):
        TrakConfig(chunk_overlap=6, max_length=6)


def train_on_chunks(folder, train, **given):
    args = AttributionArguments(
        folder / "run", num_train_epochs=1, learning_rate=1e-2, per_device_train_batch_size=4, proj_dim=64, max_length=6, chunk_overlap=2,
        skip_unscored=True, keep_columns=["url"], report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = AttributionTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        args,
        train_dataset=train,
        processing_class=word_tokenizer(),
        **given,
    )
    trainer.train()
    return trainer


def test_a_trainer_trains_on_the_chunks_that_it_attributes_to(folder, tmp_path):
    """An index that is built of its model has the same rows, and its loss is that of each token once."""
    shutil.copytree(folder / "model", tmp_path / "model")
    trainer = train_on_chunks(tmp_path, DOCUMENTS, eval_dataset=DOCUMENTS.select([0, 3]))
    assert len(trainer.train_dataset) == sum(map(len, LENGTHS))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    assert int((batch["labels"] != -100).sum()) == sum(LENGTHS[0])
    index = trainer.featurize()
    config = TrakConfig(proj_dim=64, max_length=6, chunk_overlap=2, skip_unscored=True)
    built = AttributionIndex.build(
        tmp_path / "built",
        models=trainer.member_checkpoints(),
        dataset=DOCUMENTS,
        config=config,
        keep_columns=["url"],
        progress=False,
    )
    assert index.members[0].info["files"] == built.members[0].info["files"]
    assert trainer.evaluate()["eval_loss"] > 0
    hits = trainer.attribute(top_k=2, documents="sum")  # of the documents of the evaluation set
    np.testing.assert_array_equal(
        hits["proponents"][:], built.attribute(DOCUMENTS.select([0, 3]), 2, documents="sum")["proponents"][:]
    )
    assert hits[0]["proponent_url"] == [f"page {number}" for number in hits[0]["proponents"]]


def test_rows_that_are_chunks_already_keep_their_documents(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    chunker = Chunker(word_tokenizer(), 6, 2)
    chunks = Dataset.from_list(
        [
            {"input_ids": chunk.ids, "labels": chunk.labels, "document_id": number, "chunk_id": place, "url": f"page {number}"}
            for number, text in enumerate(TEXTS)
            for place, chunk in enumerate(chunker.cut(text))
        ]
    )
    hits = train_on_chunks(tmp_path, chunks).attribute(chunks.select([0]), top_k=3, documents="max")
    assert hits[0]["proponent_document_id"] == hits[0]["proponents"]
    assert hits[0]["proponent_url"] == [f"page {number}" for number in hits[0]["proponents"]]


def test_what_cannot_be_trained_on_in_chunks_is_refused(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    with pytest.raises(ValueError, match="leave out `model_init`, `data_collator` and `task`"):
        train_on_chunks(tmp_path, DOCUMENTS, data_collator=list)
    with pytest.raises(ValueError, match="not those of a stream"):
        train_on_chunks(tmp_path, DOCUMENTS.to_iterable_dataset())
