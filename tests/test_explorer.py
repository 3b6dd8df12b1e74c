"""The explorer: it shows what the index answers, escapes all of it, and exports labels as they were decided."""

import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset, load_from_disk
from datasets_for_tests import save_model, token_rows
from explorer_for_tests import (
    CONFIG,
    HOSTILE,
    NAMES,
    language_rows,
    save_language_index,
    save_pairs_index,
    save_picture_index,
    save_text_index,
    text_rows,
)
from models import make_model
from PIL import Image as Pictures
from tokenizers_for_tests import word_tokenizer

from hf_trak import AttributionIndex
from hf_trak.cli.main import main
from hf_trak.explorer.about import about_html
from hf_trak.explorer.app import serve
from hf_trak.explorer.labels import LabelDesk
from hf_trak.explorer.space import export_space, push_space
from hf_trak.explorer.views import DIRECTIONS, Explorer, error_html

LDS = {"metric": "lds", "method": HOSTILE, "value": 0.25, "interval": [0.2, 0.3]}


@pytest.fixture(scope="module")
def text_index(tmp_path_factory):
    return AttributionIndex(save_text_index(tmp_path_factory.mktemp("explorer")))


@pytest.fixture(scope="module")
def explorer(text_index):
    index = AttributionIndex(text_index.folder)
    return Explorer(index, validation=text_rows(6, seed=1))


@pytest.fixture(scope="module")
def labels(explorer):
    return LabelDesk(explorer)


def found(answer):
    sides = (answer.attribution.proponents, answer.attribution.opponents)
    return [[(hit.example.row, hit.score) for hit in side] for side in sides]


def expected(hits):
    kinds = ("proponent", "opponent")
    return [list(zip(hits[0][f"{kind}s"], hits[0][f"{kind}_scores"], strict=True)) for kind in kinds]


@pytest.mark.parametrize("question", [{"target": "prediction"}, {"target": "label"}, {"contrast": (NAMES[0], NAMES[2])}])
@pytest.mark.parametrize("source", ["training", "validation"])
def test_the_hits_of_a_row_are_those_of_attribute(text_index, explorer, source, question):
    rows = text_rows(24) if source == "training" else text_rows(6, seed=1)
    asked = dict(zip(("target", "against"), question.get("contrast", [question.get("target")]), strict=False))
    answer = explorer.ask_row(source, 4, **asked, top_k=3)
    hits = text_index.attribute(rows.select([4]), 3, **question, progress=False)
    assert found(answer) == expected(hits)
    assert answer.attribution.output == hits[0]["query_output"]
    assert answer.attribution.query.text == rows[4]["text"]
    for hit in answer.attribution.proponents:
        assert hit.example.text == text_rows(24)[hit.example.row]["text"]
        assert (hit.example.note == "the row itself") == (source == "training" and hit.example.row == 4)


def test_what_is_kept_in_memory_is_read_once_and_answers_the_same(text_index, monkeypatch):
    queries = text_rows(5, seed=2)
    index = AttributionIndex(text_index.folder)
    options = {"leverage": True, "residual_weighting": True, "progress": False}
    before = [index.score(queries, progress=False), index.score(queries, **options)]
    assert not AttributionIndex(text_index.folder).keep_in_memory("1KB")
    assert index.keep_in_memory()

    def never(*args, **kwargs):
        raise AssertionError("a file of features or a model was read again")

    monkeypatch.setattr("hf_trak.storage.reader.read_blocks", never)
    monkeypatch.setattr("hf_trak.querying.queries.Featurizer", never)
    index.attribute(queries, target="prediction", progress=False)  # which leaves another task behind
    for _ in range(2):
        after = [index.score(queries, progress=False), index.score(queries, **options)]
        np.testing.assert_array_equal(before, after)


def test_hostile_texts_and_names_are_escaped(explorer, labels):
    pages = [
        explorer.ask_row("training", 0).html(),
        explorer.ask_texts([HOSTILE], target=NAMES[0]).html(),
        *(labels.suspect_html(place, {}) for place in range(24)),
        labels.suspect_html(0, {labels.suspects()[0].example.row: NAMES[0]}),
        about_html(explorer, [LDS]),
        error_html(ValueError(HOSTILE)),
    ]
    assert sum("&lt;img src=x" in page for page in pages) > 5
    for page in pages:
        assert "<img" not in page
        assert "<b>" not in page
        assert "\u202e" not in page


def test_labels_are_exported_as_they_were_decided(labels, tmp_path):
    train = text_rows(24)
    kept, fixed, dropped = (suspect.example.row for suspect in labels.suspects()[:3])
    new = next(name for name in NAMES if name != NAMES[train[fixed]["label"]])
    decisions = labels.decide({}, kept, NAMES[train[kept]["label"]])
    decisions = labels.decide(labels.decide(decisions, fixed, new), dropped, None)
    folder = labels.export(decisions, tmp_path / "out")
    wanted = train.to_list()
    wanted[fixed]["label"] = NAMES.index(new)
    del wanted[dropped]
    saved = load_from_disk(str(folder))
    assert saved.to_list() == wanted
    assert saved.features == train.features
    assert {row["row"]: row["decision"] for row in labels.decisions_rows(decisions)} == {
        kept: "keep", fixed: "fix", dropped: "drop",
    }  # fmt: skip
    assert labels.export(decisions, tmp_path / "out").name == "fixed_2"
    assert sorted(os.listdir(tmp_path / "out")) == ["fixed_1", "fixed_2"]
    with pytest.raises(ValueError, match="none of the labels"):
        labels.decide({}, kept, "made up")
    with pytest.raises(ValueError, match="Nothing was decided"):
        labels.export({}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_asked_is_refused(explorer, text_index):
    with pytest.raises(ValueError, match="rows are 0 to 5, but row 6"):
        explorer.ask_row("validation", 6)
    with pytest.raises(ValueError, match="has no label: choose the prediction"):
        explorer.ask_texts(["a"], target="label")
    with pytest.raises(ValueError, match="reads no single picture"):
        explorer.ask_image(Pictures.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="Start the explorer with --validation FILE"):
        Explorer(AttributionIndex(text_index.folder)).ask_row("validation", 0)


def test_pictures_are_shown_from_the_training_set_and_asked_about(tmp_path):
    folder, train = save_picture_index(tmp_path)
    pictures = train["image"]
    explorer = Explorer(AttributionIndex(folder), train=train.select(range(11, -1, -1)))
    assert explorer.typed == "image"
    asked = explorer.ask_image(pictures[3], top_k=2)
    assert found(asked) == found(explorer.ask_row("training", 3, top_k=2))
    assert asked.html().count('src="data:image/png;base64,') == 5
    labels = LabelDesk(explorer)
    row = labels.suspects()[0].example.row
    label = str((train[row]["label"] + 1) % 3)
    fixed = labels.fixed(labels.decide({}, row, label))
    assert fixed["label"][row] == int(label)
    assert np.array_equal(np.asarray(fixed[row]["image"]), np.asarray(pictures[row]))


def test_a_language_model_answers_a_prompt(tmp_path):
    index, texts = AttributionIndex(save_language_index(tmp_path)), language_rows().to_list()
    explorer = Explorer(index)
    assert (explorer.typed, explorer.classes) == ("prompt", [])
    assert "rows with one class label each" in LabelDesk(explorer).why_no_suspects
    row = explorer.ask_row("training", 2, top_k=4)
    assert found(row) == expected(index.attribute(Dataset.from_list(texts[2:3]), 4, progress=False))
    assert texts[2]["prompt"].strip() in row.html()
    asked = {"answer": "a b", "span": "b", "heat": True}
    answer = explorer.ask_prompt("a b c ", **asked, top_k=3)
    wanted = index.explain("a b c ", **asked, top_k=3, progress=False)
    assert found(answer) == expected(wanted.hits)
    assert answer.html().count('<p class="heat">') == len(wanted.attribution.proponents) + len(wanted.attribution.opponents)
    assert "span=b" in answer.link
    against = explorer.ask_prompt("a b c ", answer="a b", against="c d", top_k=3)
    assert found(against) == expected(index.explain("a b c ", answer="a b", contrast="c d", top_k=3, progress=False).hits)
    with pytest.raises(ValueError, match="Type a prompt first"):
        explorer.ask_prompt("")
    best = explorer.influence("training", 12, top_k=1).best
    scores = index.score(Dataset.from_list(texts), progress=False)
    np.fill_diagonal(scores, 0)
    assert [hit.example.row for hit in best] == [int(scores.mean(1).argmax())]


def test_a_sequence_to_sequence_model_answers_a_prompt(tmp_path):
    make_model("t5").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = Dataset.from_list([{"inputs": f"a b {word}", "targets": f"d {word}"} for word in "abcdefgh"])
    index = AttributionIndex.build(
        tmp_path / "index", models=tmp_path / "model", dataset=rows, config=CONFIG, keep_columns=["inputs", "targets"], progress=False,
    )  # fmt: skip
    explorer = Explorer(index)
    assert explorer.typed == "prompt"
    assert found(explorer.ask_row("training", 2, top_k=3)) == expected(index.attribute(rows.select([2]), 3, progress=False))
    answer = explorer.ask_prompt("a b c", answer="d e", heat=True, top_k=3)
    assert found(answer) == expected(index.explain("a b c", answer="d e", top_k=3, progress=False).hits)
    assert answer.attribution.query.text.split("→")[1].strip() == "d e"


def test_a_picture_and_its_caption_are_asked_about_from_either_side(tmp_path):
    folder, rows = save_pairs_index(tmp_path)
    index = AttributionIndex(folder)
    explorer = Explorer(index)
    assert (explorer.typed, explorer.text_columns) == ("pair", ["caption"])
    pictures, one = rows["image"], rows.select([3])
    for direction in DIRECTIONS:
        hits = expected(index.attribute(one, 2, direction=direction, progress=False))
        assert found(explorer.ask_pair(pictures[3], one[0]["caption"], direction=direction, top_k=2)) == hits
        assert found(explorer.ask_row("training", 3, direction=direction, top_k=2)) == hits
    with pytest.raises(ValueError, match="Upload a picture and type its caption"):
        explorer.ask_pair(None, "w4")


def test_the_rows_that_help_and_harm_a_set_are_those_of_its_mean_scores(text_index, explorer):
    queries = text_rows(6, seed=1)
    shown = explorer.influence("validation", 100, target="label", top_k=3)
    scores = text_index.score(queries, progress=False)
    mean, size = scores.mean(1), np.abs(scores).mean(1)
    np.testing.assert_allclose([hit.score for hit in shown.best], np.sort(mean)[::-1][:3], rtol=1e-4)
    np.testing.assert_allclose([hit.score for hit in shown.worst], np.sort(mean)[:3], rtol=1e-4)
    assert [size[hit.example.row] for hit in shown.useless] == pytest.approx(sorted(size)[:3])
    assert shown.n_queries == 6
    assert shown.link == "view=rows&source=validation&first=6&target=label&top_k=3"
    with pytest.raises(ValueError, match="Ask about 1 to"):
        explorer.influence("validation", 0)


@pytest.mark.parametrize("kept", [["input_ids", "label"], []])
def test_rows_of_tokens_are_asked_about_where_they_are_at_hand(tmp_path, kept):
    train = token_rows(12)
    index = AttributionIndex.build(
        tmp_path / "index",
        models=save_model(tmp_path / "model"),
        dataset=train,
        config=CONFIG,
        keep_columns=kept,
        progress=False,
    )
    explorer = Explorer(index)
    assert explorer.typed == ""
    if kept:
        hits = index.attribute(train.select([5]), 2, target="prediction", progress=False)
        assert found(explorer.ask_row("training", 5, top_k=2)) == expected(hits)
        return
    with pytest.raises(ValueError, match="--train FILE, or make the index with --keep_columns"):
        explorer.ask_row("training", 5)
    assert "Start the explorer with --train FILE" in LabelDesk(explorer).why_no_suspects


# The command and the page


def test_without_gradio_the_command_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["explore", str(tmp_path / "no-index")]) == 1
    assert capsys.readouterr().err == "hf-trak: error: The explorer needs gradio: pip install 'hf-trak[explore]'.\n"


def test_the_page_answers_on_loopback_and_exports_where_it_was_told(explorer, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'hf-trak[explore]'")
    from gradio_client import Client

    export = tmp_path / "export"
    with serve(explorer, export) as address:
        assert address.startswith("http://127.0.0.1:")
        uploads = Path(os.environ["GRADIO_TEMP_DIR"])
        assert uploads.parent == export
        assert urllib.request.urlopen(address, timeout=30).status == 200
        client = Client(address, verbose=False, analytics_enabled=False, download_files=tmp_path / "client")
        ask = ("prediction", "(nothing)", "pair", 3, None, "", "", "", False, "")
        assert client.predict("validation", 2, *ask, api_name="/ask") == explorer.ask_row("validation", 2, top_k=3).html()
        assert "rows are 0 to 5, but row 99" in client.predict("validation", 99, *ask, api_name="/ask")
        client.predict(api_name="/find_label_errors")
        client.predict(NAMES[0], api_name="/drop")
        assert "1 decision, applied" in client.predict(api_name="/export")
    assert len(load_from_disk(str(export / "fixed_1"))) == 23
    assert os.listdir(export) == ["fixed_1"]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address, timeout=5)


# A folder that runs by itself


def asked(address, *question):
    from gradio_client import Client

    return Client(address, verbose=False, analytics_enabled=False).predict(*question, api_name="/ask")


def test_an_exported_folder_answers_by_itself_and_writes_nothing(text_index, explorer, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'hf-trak[explore]'")
    text_rows(6, seed=1).to_parquet(tmp_path / "validation.parquet")
    place, moved = tmp_path / "space", tmp_path / "elsewhere"
    command = ["explore", str(text_index.folder), "--validation", str(tmp_path / "validation.parquet"), "--export", str(place)]
    assert main([*command, "--validation_split", "train"]) == 0
    assert main(command) == 1  # nothing is replaced
    card = (place / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert (header["sdk"], header["app_file"]) == ("gradio", "app.py")
    assert "hf-trak[explore]==" in (place / "requirements.txt").read_text()
    place.rename(moved)
    before = sorted(moved.rglob("*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": port,
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with subprocess.Popen(
        [sys.executable, moved / "app.py"], stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as app:
        try:
            address = next(line for line in app.stdout if "http://" in line).split()[-1]
            answer = asked(address, "validation", 2, "prediction", "(nothing)", "pair", 3, None, "", "", "", False, "")
        finally:
            app.terminate()
    assert answer == explorer.ask_row("validation", 2, top_k=3).html()
    assert sorted(moved.rglob("*")) == before


def test_a_folder_is_exported_only_of_what_it_can_hold(text_index, explorer, tmp_path):
    with pytest.raises(ValueError, match="Save the model as safetensors"):
        export_space(explorer, tmp_path / "space", models=[str(tmp_path)])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ValueError, match="nothing is replaced"):
        export_space(explorer, tmp_path / "taken")
    with pytest.raises(ValueError, match="it is no exported explorer"):
        push_space(tmp_path, "me/space")
