"""The demo runs from data to report, keeps true labels to itself, and finds what it flipped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from models import bert

from hf_trak import AttributionIndex
from hf_trak.cli.demo import DemoArguments, _begin_folder, pick_queries
from hf_trak.cli.demo_data import _TOPICS, DemoData, _first_paragraphs, digits, flip_labels
from hf_trak.cli.main import main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

WORDS = ["good", "great", "fine", "bad", "poor", "dull", "film", "story", "plot", "scene"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The demo on the digits, one epoch and few dimensions, and what it printed."""
    output = tmp_path_factory.mktemp("demo") / "out"
    capture = pytest.MonkeyPatch()
    printed: list[str] = []
    capture.setattr("builtins.print", lambda *values, **_: printed.append(" ".join(map(str, values))))
    threads = torch.get_num_threads()
    status = main(["demo", "--output", str(output), "--epochs", "1", "--proj_dim", "128", "--seed", "1"])
    capture.undo()
    assert torch.get_num_threads() == threads
    assert status == 0
    return SimpleNamespace(output=output, printed="\n".join(printed))


def test_demo_writes_a_report_and_results(quick: SimpleNamespace) -> None:
    assert (quick.output / "report.png").stat().st_size > 10_000
    page = (quick.output / "report.html").read_text(encoding="utf-8")
    assert page.count("<section") == 4
    assert page.count("<details>") == 3
    results = json.loads((quick.output / "results.json").read_text())
    assert {"name", "command", "commit", "versions", "hardware", "rows"} <= set(results)
    assert results["command"].endswith(f"hf-trak demo --output {quick.output} --seed 1 --proj_dim 128 --epochs 1")
    assert [row["metric"] for row in results["rows"]] == ["flipped_found_share"] * 3
    assert all({"case", "method", "metric", "value", "unit", "interval"} <= set(row) for row in results["rows"])
    assert {row["n_flipped"] for row in results["rows"]} == {144}


def test_demo_prints_what_it_found_and_what_to_try_next(quick: SimpleNamespace) -> None:
    assert "Try next:" in quick.printed
    assert "hf-trak demo text" in quick.printed
    assert len(load_dataset("parquet", data_files=str(quick.output / "train.parquet"), split="train")) == 1437
    assert "1,437 training rows, 360 held-out rows" in quick.printed
    assert quick.printed.count("Query row") == 3
    for row in json.loads((quick.output / "results.json").read_text())["rows"]:
        assert f"by {row['method']:<28}{row['value']:>7.1%}" in quick.printed


def test_printed_snippet_runs_as_printed(quick: SimpleNamespace) -> None:
    snippet = [line.strip() for line in quick.printed.splitlines() if "load_dataset" in line]
    namespace: dict = {}
    exec("\n".join(snippet), namespace)
    assert len(namespace["rows"]) == 1437


def test_index_of_the_demo_answers_queries(quick: SimpleNamespace) -> None:
    index = AttributionIndex.from_pretrained(quick.output / "run" / "index")
    data, _ = flip_labels(digits(1), fraction=0.1, seed=1)
    scores = index.score(data.train, progress=False)
    itself = index.score(data.train, out_to_loss_power=1, progress=False).diagonal()
    np.testing.assert_allclose(index.self_influence(), itself, rtol=1e-3, atol=1e-6)
    assert np.isfinite(scores).all()


def test_another_demo_or_another_folder_is_not_overwritten(
    quick: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (quick.output / "results.json").read_bytes()
    assert main(["demo", "--output", str(quick.output)]) == 1
    assert "holds an earlier demo" in capsys.readouterr().err
    assert (quick.output / "results.json").read_bytes() == before
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["demo", "--output", str(tmp_path), "--overwrite"]) == 1
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m"], "go together"),
        (["--train"], "for your own"),
        (["--model", "m", "--dataset", "d", "--flip_fraction", "0.1"], "add --train"),
        (["--model", "m", "--dataset", "d", "--members", "epoch:2"], "last epochs of a training run"),
        (["--flip_fraction", "1.5"], "below 1"),
        (["--data", "text", "--model", "m", "--dataset", "d"], "leave out `text`"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert main(["demo", "--output", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_of_demos_are_told_apart(tmp_path: Path) -> None:
    digits_args = DemoArguments(output=str(tmp_path / "digits"))
    folder = _begin_folder(digits_args)
    (folder / "report.html").write_text("of the demo")
    (folder / "thesis.tex").write_text("years of work")
    assert {path.name for path in _begin_folder(digits_args).iterdir()} == {".hf_trak_demo.json", "thesis.tex"}  # begun again
    own_args = DemoArguments(output=str(tmp_path / "own"), model="m", dataset="d")
    folder = _begin_folder(own_args)
    (folder / "report.html").write_text("of the demo")
    (folder / "thesis.tex").write_text("years of work")
    assert (_begin_folder(own_args) / "report.html").exists()  # unfinished: gone on with
    with pytest.raises(ValueError, match="holds an earlier demo"):
        _begin_folder(replace(own_args, proj_dim=7))
    again = _begin_folder(replace(own_args, proj_dim=7, overwrite=True))
    assert {path.name for path in again.iterdir()} == {".hf_trak_demo.json", "thesis.tex"}


# Texts


def write_modules(folder: Path, *, without: str = "") -> None:
    for topic, (name, *_) in _TOPICS.items():
        if topic == without:
            continue
        file = folder / name if name.endswith(".py") else folder / name / "some.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            f'"""What {topic} is all about,\n   in short.\n\nAt length."""\ndef f():\n    "Said by every one of them."\n    "Too short"\n'
        )


def test_texts_are_first_paragraphs_each_of_one_topic(tmp_path: Path) -> None:
    write_modules(tmp_path)
    (tmp_path / "unittest" / "test").mkdir(parents=True)
    (tmp_path / "unittest" / "test" / "some.py").write_text('"""Of a test, and no text of the demo."""')
    found = _first_paragraphs(tmp_path)
    first = next(iter(_TOPICS))
    assert sorted(found) == sorted(
        [(f"What {topic} is all about, in short.", topic) for topic in _TOPICS] + [("Said by every one of them.", first)]
    )


def test_a_python_without_sources_is_refused(tmp_path: Path) -> None:
    write_modules(tmp_path, without="xml")
    with pytest.raises(FileNotFoundError, match="lacks the sources of xml"):
        _first_paragraphs(tmp_path)


@pytest.mark.slow
def test_the_text_demo_finds_flipped_labels_and_ends_with_commands_that_work(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "text"]) == 0
    printed = capsys.readouterr().out
    results = json.loads(Path("hf_trak_demo_text/results.json").read_text())
    assert {row["method"]: row["value"] for row in results["rows"]}["self-influence"] >= 0.3
    assert results["seconds"] < 180
    commands = [line.split()[1:] for line in printed.split("Try next:")[1].splitlines() if line.strip() and "MODEL" not in line]
    assert [command[0] for command in commands] == ["label-errors", "attribute"]
    for command in commands:
        assert main(command) == 0, command


# Flipping


def numbers(n_rows: int, n_classes: int = 4) -> DemoData:
    rows = Dataset.from_dict({"x": list(range(n_rows)), "label": [row % n_classes for row in range(n_rows)]})
    model = SimpleNamespace(config=SimpleNamespace(num_labels=n_classes))
    return DemoData("numbers", model, None, rows, rows.select([0]))  # type: ignore[arg-type]


def test_flipped_labels_differ_and_nothing_else_does() -> None:
    data = numbers(200)
    flipped_data, flipped = flip_labels(data, fraction=0.1, seed=0)
    before, after = np.array(data.train["label"][:]), np.array(flipped_data.train["label"][:])
    np.testing.assert_array_equal(before != after, flipped)
    assert flipped.sum() == 20
    assert set(after) <= {0, 1, 2, 3}
    assert flipped_data.train["x"][:] == data.train["x"][:]
    assert flipped_data.queries["label"][:] == data.queries["label"][:]
    np.testing.assert_array_equal(flip_labels(data, fraction=0.1, seed=0)[1], flipped)
    assert (flip_labels(data, fraction=0.1, seed=1)[1] != flipped).any()


def test_true_labels_are_not_in_what_is_trained_on() -> None:
    data, _ = flip_labels(digits(0), fraction=0.1, seed=0)
    assert data.train.column_names == ["image", "label"]
    assert data.train.features["label"].names == [str(digit) for digit in range(10)]


@pytest.mark.parametrize(
    ("data", "fraction", "message"),
    [(numbers(10), 0.01, "flips none"), (numbers(10), 0.0, "above 0"), (numbers(10, n_classes=1), 0.5, "Only class labels")],
)
def test_flips_that_cannot_be_are_refused(data: DemoData, fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flip_labels(data, fraction=fraction, seed=0)


def test_picked_queries_are_different() -> None:
    assert pick_queries(np.array([3.0, -1.0, 2.0])) == [1, 2]
    assert pick_queries(np.arange(40.0)[::-1]) == [39, 37, 19]


# A model and data of one's own


@pytest.fixture
def own(tmp_path: Path) -> SimpleNamespace:
    """A tiny BERT with a tokenizer, and reviews that are good or bad."""
    from transformers import BertTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    torch.manual_seed(0)
    bert(num_labels=2).save_pretrained(tmp_path / "model")
    BertTokenizerFast(vocab=vocabulary).save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    for name, n_rows in (("train", 40), ("validation", 12)):
        labels = generator.integers(0, 2, n_rows)
        texts = [f"{WORDS[3 * (1 - label) + generator.integers(3)]} {WORDS[6 + generator.integers(4)]}" for label in labels]
        Dataset.from_dict({"text": texts, "label": labels}).to_csv(tmp_path / f"{name}.csv")
    return SimpleNamespace(folder=tmp_path, model=str(tmp_path / "model"), data=str(tmp_path / "train.csv"))


def own_arguments(own: SimpleNamespace, output: str) -> list[str]:
    queries = str(own.folder / "validation.csv")
    base = ["demo", "--model", own.model, "--dataset", own.data, "--queries", queries, "--proj_dim", "64"]
    return [*base, "--output", str(own.folder / output)]


def test_own_model_is_taken_as_trained(own: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    assert main(own_arguments(own, "out")) == 0
    printed = capsys.readouterr().out
    suspects = printed.split("Most suspicious labels")[1].splitlines()[1:11]
    assert all("row" in line and any(word in line for word in WORDS) for line in suspects)
    assert "flipped" not in printed
    results = json.loads((own.folder / "out" / "results.json").read_text())
    assert results["rows"] == []
    page = (own.folder / "out" / "report.html").read_text(encoding="utf-8")
    assert "Most suspicious labels" in page
    assert "film" in page
    index = AttributionIndex.from_pretrained(own.folder / "out" / "run" / "index")
    rows = load_dataset("csv", data_files=own.data, split="train")
    expected = AttributionIndex.build(own.folder / "api", models=own.model, dataset=rows, config=index.config, progress=False)
    np.testing.assert_array_equal(
        np.array(index.features()["trak_features"][:]), np.array(expected.features()["trak_features"][:])
    )
    assert main(own_arguments(own, "out")) == 0  # goes on with what is there


def test_own_model_is_fine_tuned_on_request(own: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    flags = ["--train", "--flip_fraction", "0.1", "--members", "epoch:2", "--learning_rate", "1e-3"]
    assert main([*own_arguments(own, "tuned"), *flags]) == 0
    assert "Flipped labels found in the 10% of training rows" in capsys.readouterr().out
    results = json.loads((own.folder / "tuned" / "results.json").read_text())
    assert "2 members (epoch:2)" in results["rows"][0]["case"]
    assert results["rows"][0]["n_flipped"] == 4


def test_a_file_without_queries_is_refused(own: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    assert main(["demo", "--model", own.model, "--dataset", own.data, "--output", str(own.folder / "out")]) == 1
    assert "name held-out rows with --queries" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_demo_finds_most_flipped_labels(tmp_path: Path, seed: int) -> None:
    assert main(["demo", "--output", str(tmp_path / "out"), "--seed", str(seed)]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = {row["method"]: row["value"] for row in results["rows"]}
    assert found["self-influence"] >= 0.6
    assert found["opponents of held-out rows"] >= 0.6
    assert results["seconds"] < 180
