"""The command line says what the Python API says: same numbers, clear errors, and help at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image, concatenate_datasets, load_dataset
from datasets_for_tests import save_model, token_rows
from test_row_digests import png

from hf_trak import AttributionIndex, TrakConfig, __version__
from hf_trak.cli.attribute import AttributeArguments
from hf_trak.cli.card import CardArguments
from hf_trak.cli.data import load_rows
from hf_trak.cli.featurize import FeaturizeArguments
from hf_trak.cli.main import main
from hf_trak.cli.parsing import make_parser, parse
from hf_trak.cli.push import PushArguments
from hf_trak.feature_args import FeatureArguments
from hf_trak.querying.examples import ExampleReader
from hf_trak.querying.questions import Question
from hf_trak.querying.report_facts import controls_of

N_TRAIN, N_QUERIES, PROJ_DIM = 24, 5, 32


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two checkpoints, a training set, queries, and the index the Python API makes of them."""
    folder = tmp_path_factory.mktemp("cli")
    train, queries = token_rows(N_TRAIN), token_rows(N_QUERIES, seed=1)
    train.to_parquet(folder / "train.parquet")
    queries.to_parquet(folder / "queries.parquet")
    models = [save_model(folder / f"bert{seed}", seed=seed) for seed in (0, 1)]
    config = TrakConfig(proj_dim=PROJ_DIM)
    index = AttributionIndex.build(folder / "api", models=models, dataset=train, config=config, progress=False)
    return SimpleNamespace(folder=folder, models=models, train=train, queries=queries, index=index)


def featurize_arguments(files: SimpleNamespace, output: Path) -> list[str]:
    models = [argument for model in files.models for argument in ("--model", str(model))]
    dataset = str(files.folder / "train.parquet")
    return ["featurize", *models, "--dataset", dataset, "--output", str(output), "--proj_dim", str(PROJ_DIM)]


def attribute_arguments(files: SimpleNamespace, output: Path) -> list[str]:
    queries = str(files.folder / "queries.parquet")
    return ["attribute", str(files.index.folder), "--queries", queries, "--output", str(output), "--top_k", "4"]


def test_cli_featurizes_what_the_api_does(files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(featurize_arguments(files, tmp_path / "index")) == 0
    index = AttributionIndex.from_pretrained(tmp_path / "index")
    assert len(index.members) == 2
    for member in range(2):
        ours, theirs = index.features(member), files.index.features(member)
        for column in ("trak_features", "trak_out_to_loss", "trak_output"):
            np.testing.assert_array_equal(np.array(ours[column][:]), np.array(theirs[column][:]))
    scores = index.score(files.queries, progress=False)
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(scores, files.index.score(files.queries, progress=False))
    printed = capsys.readouterr()
    assert "24 rows, 2 members, 100.0% of the trainable parameters covered" in printed.out
    assert printed.err.count("hf-trak: Columns read: tokens = input_ids") == 1


def test_printed_snippet_loads_the_features(files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(featurize_arguments(files, tmp_path / "index")) == 0
    snippet = [line.strip() for line in capsys.readouterr().out.splitlines() if "load_dataset" in line]
    namespace: dict = {}
    exec("\n".join(snippet), namespace)
    assert len(namespace["rows"]) == N_TRAIN
    assert len(namespace["rows"][0]["trak_features"]) == PROJ_DIM


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_cli_attributes_what_the_api_does(files: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    output = tmp_path / f"hits.{kind}"
    assert main([*attribute_arguments(files, output), "--damping", "0.5"]) == 0
    hits = load_dataset("json" if kind == "jsonl" else "parquet", data_files=str(output), split="train")
    expected = files.index.attribute(files.queries, 4, damping=0.5, progress=False)
    assert sorted(hits.column_names) == sorted(expected.column_names)
    for column in expected.column_names:
        ours = np.array(hits[column][:])
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours.astype(np.float32), np.array(expected[column][:], dtype=np.float32))


@pytest.mark.parametrize(("flags", "n_lines"), [([], 3 * (1 + 2 * 4)), (["--max_queries", "1", "--top_k", "2"], 1 + 2 * 2)])
def test_attribute_prints_a_table(
    files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], n_lines: int
) -> None:
    train = ["--train", str(files.folder / "train.parquet")]
    assert main([*attribute_arguments(files, tmp_path / "hits.jsonl"), *train, *flags]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("Query", "  +", "  -"))]
    assert len(lines) == n_lines
    row = files.index.attribute(files.queries, 1, progress=False)[0]["proponents"][0]
    assert f"row {row:>6}  [{files.train[row]['label']}]  tokens {files.train[row]['input_ids'][0]}" in lines[1]


def test_report_is_written_and_not_overwritten(files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    arguments = [*attribute_arguments(files, tmp_path / "hits.jsonl"), "--report", str(tmp_path / "report")]
    assert main(arguments) == 0
    assert (tmp_path / "report" / "report.png").stat().st_size > 1000
    page = (tmp_path / "report" / "report.html").read_text()
    assert "query 0" in page
    assert page.count("<details>") == N_QUERIES
    assert "These scores are of 24 training rows, by 2 checkpoints," in page
    before = (tmp_path / "hits.jsonl").read_bytes()
    assert main([*arguments, "--top_k", "1"]) == 1
    assert "hits.jsonl" in capsys.readouterr().err
    assert (tmp_path / "hits.jsonl").read_bytes() == before
    assert main([*arguments, "--top_k", "1", "--overwrite"]) == 0
    assert len(json.loads((tmp_path / "hits.jsonl").read_text().splitlines()[0])["proponents"]) == 1


@pytest.mark.parametrize("aggregate", [None, "mean"])
def test_the_controls_of_a_report_are_what_simpler_rankings_choose(files: SimpleNamespace, aggregate: str | None) -> None:
    index, question = files.index, Question(aggregate=aggregate)
    options = index.score_options()
    found = controls_of(index, files.queries, ExampleReader(None), top_k=3, question=question, options=options)
    cosines, doubt = 0.0, 0.0
    for member in range(2):
        trained = np.array(index.features(member)["trak_features"][:], dtype=np.float64)
        asked = index.featurize_queries(files.queries, member, progress=False)["trak_features"].astype(np.float64)
        asked = asked if aggregate is None else asked.mean(0, keepdims=True)
        lengths = [np.linalg.norm(one, axis=1) for one in (trained, asked)]
        cosines = cosines + trained @ asked.T / np.outer(*lengths)
        doubt = doubt + np.array(index.features(member)["trak_out_to_loss"][:])
    scores = index.score(files.queries, aggregate=aggregate, progress=False)
    for query, controls in enumerate(found):
        hardest, alike, random = ([hit.example.row for hit in control.hits] for control in controls)
        assert hardest == np.argsort(-doubt, kind="stable")[:3].tolist()
        assert alike == np.argsort(-cosines[:, query], kind="stable")[:3].tolist()
        assert len(set(random)) == 3
        for control in controls:
            expected = [scores[hit.example.row, query] for hit in control.hits]
            np.testing.assert_allclose([hit.score for hit in control.hits], expected, rtol=1e-4, atol=1e-7)
    assert len(found) == scores.shape[1]
    nearest = Question(aggregate="nearest")
    assert controls_of(index, files.queries, ExampleReader(None), top_k=3, question=nearest, options=options) == [[]]


def test_a_training_set_that_is_not_the_indexs_is_refused(
    files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*attribute_arguments(files, tmp_path / "h.jsonl"), "--train", str(files.folder / "queries.parquet")]) == 1
    error = capsys.readouterr().err
    assert "queries.parquet: This is not the training set of" in error
    assert "24 of the index's 24 rows are not among the 5 of this dataset, the first of them rows 0, 1, 2, 3, 4, ..." in error
    assert not (tmp_path / "h.jsonl").exists()


def test_a_larger_training_set_in_another_order_shows_the_right_rows(
    files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    larger = concatenate_datasets([token_rows(9, seed=7), files.train.shuffle(seed=3), token_rows(4, seed=8)])
    larger.to_parquet(tmp_path / "all.parquet")
    printed = []
    for train in (files.folder / "train.parquet", tmp_path / "all.parquet"):
        assert main([*attribute_arguments(files, tmp_path / f"{train.stem}.jsonl"), "--train", str(train)]) == 0
        printed.append(capsys.readouterr().out.split("\n\nHits of")[0])
    assert printed[0] == printed[1]
    assert "tokens" in printed[0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_kept_columns_are_shown_and_written_without_the_training_set(
    files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
) -> None:
    pytest.importorskip("matplotlib")
    texts = [f"text number {i}" for i in range(N_TRAIN)]
    pictures = [{"bytes": png(i), "path": None} for i in range(N_TRAIN)]
    rows = files.train.add_column("text", texts).add_column("picture", pictures).cast_column("picture", Image())
    rows.to_parquet(tmp_path / "train.parquet")
    arguments = ["featurize", "--model", str(files.models[0]), "--dataset", str(tmp_path / "train.parquet")]
    arguments += ["--output", str(tmp_path / "index"), "--proj_dim", str(PROJ_DIM), "--keep_columns", "text,label", "picture"]
    assert main(arguments) == 0
    capsys.readouterr()
    output = tmp_path / f"hits.{kind}"
    arguments = attribute_arguments(files, output)
    arguments[1] = str(tmp_path / "index")
    assert main([*arguments, "--report", str(tmp_path / "report")]) == 0
    hits = load_dataset("json" if kind == "jsonl" else "parquet", data_files=str(output), split="train")
    first = hits[0]["proponents"]
    assert hits[0]["proponent_text"] == [texts[row] for row in first]
    assert hits[0]["proponent_label"] == [files.train[row]["label"] for row in first]
    assert ("proponent_picture" in hits.column_names) == (kind == "parquet")
    assert f"row {first[0]:>6}  [{files.train[first[0]]['label']}]  {texts[first[0]]}" in capsys.readouterr().out
    assert texts[first[0]] in (tmp_path / "report" / "report.html").read_text()


# Configuration files


def parse_featurize(arguments: list[str]) -> tuple[FeaturizeArguments, FeatureArguments]:
    parser = make_parser([FeaturizeArguments, FeatureArguments], command="featurize", usage="", description="")
    return parse(parser, arguments)


def write_yaml(folder: Path, text: str) -> str:
    (folder / "config.yaml").write_text(text)
    return str(folder / "config.yaml")


YAML = "model: [a, b]\ndataset: rows.csv\noutput: index\nproj-dim: 64\ndamping: 1e-4\noverwrite: true\ntext_columns: one\n"


def test_yaml_gives_every_kind_of_value(tmp_path: Path) -> None:
    args, features = parse_featurize(["--config", write_yaml(tmp_path, YAML)])
    assert (args.model, args.dataset, args.overwrite) == (["a", "b"], "rows.csv", True)
    assert (features.proj_dim, features.text_columns) == (64, ["one"])
    assert features.trak_config().damping == 1e-4


def test_the_published_preset_leaves_flags_that_are_given() -> None:
    needed = ["--model", "m", "--dataset", "d", "--output", "o", "--proj_dim", "8", "--preset", "published"]
    assert parse_featurize(needed)[1].trak_config() == TrakConfig.published(proj_dim=8)
    _, features = parse_featurize([*needed, "--damping", "1", "--projector", "identity"])
    assert features.trak_config() == TrakConfig.published(proj_dim=8, damping=1.0, projector="identity")
    with pytest.raises(ValueError, match="`base` \\(--base\\) of points before them"):
        parse_featurize([*needed, "--base", "b"])[1].trak_config()


def test_flags_beat_yaml(tmp_path: Path) -> None:
    flags = ["--model", "c", "--proj_dim=8", "--model", "d", "--overwrite=false"]
    args, features = parse_featurize([*flags, "--config", write_yaml(tmp_path, YAML)])
    assert (args.model, args.dataset, args.overwrite, features.proj_dim) == (["c", "d"], "rows.csv", False, 8)


def test_numbers_in_yaml_become_numbers(tmp_path: Path) -> None:
    from hf_trak.cli.demo import DemoArguments

    parser = make_parser([DemoArguments], command="demo", usage="", description="")
    (args,) = parse(parser, ["--config", write_yaml(tmp_path, "learning_rate: 1e-4\nflip_fraction: 0.2\nmax_queries:\n")])
    assert (args.learning_rate, args.flip_fraction, args.max_queries) == (1e-4, 0.2, 200)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("proj_dims: 4\n", "unknown keys: proj_dims. Did you mean proj_dim?"),
        ("help: 4\n", "unknown keys: help"),
        ("proj_dim: many\n", "'many' does not suit --proj_dim"),
        ("proj_dim: [1, 2]\n", "it takes one value"),
        ("- proj_dim\n", "must hold `flag: value` lines, but holds list"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is checked below, without escaping it)
        parse_featurize(["--config", write_yaml(tmp_path, text)])
    assert message in str(error.value)


def test_unknown_flags_list_near_misses(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as status:
        main(["featurize", "--model", "a", "--dataset", "b", "--output", "c", "--projdim", "4"])
    assert status.value.code == 2
    assert "Did you mean proj_dim?" in capsys.readouterr().err


# Errors and exit statuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attribute", "--index", "nowhere/at/all", "--queries", "q.csv", "--output", "o.jsonl"], "nowhere/at/all"),
        (["attribute", "--index", "x", "--queries", "q.csv", "--output", "o.txt"], "must end in .jsonl or .parquet"),
        (["featurize", "--model", "m", "--dataset", "gone.parquet", "--output", "o"], "no file or folder gone.parquet"),
        (["featurize", "--config", "gone.yaml"], "there is no file gone.yaml"),
        (["featurize", "--model", "m", "--dataset", "d", "--output", "o", "--proj_dim", "0"], "at least 1"),
    ],
)
def test_errors_are_one_clean_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("hf-trak: error: ")
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        main(["featurize", "--config", "gone.yaml", "--debug"])
    monkeypatch.setenv("HF_TRAK_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["featurize", "--config", "gone.yaml"])


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_trak.cli.featurize.main", interrupt)
    assert main(["featurize"]) == 130


def test_unknown_commands_and_none(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as status:
        main(["featurise"])
    assert status.value.code == 2
    assert main([]) == 0
    assert "hf-trak COMMAND" in capsys.readouterr().out


def test_top_level_help_is_quick() -> None:
    begin = time.perf_counter()
    shown = subprocess.run([sys.executable, "-m", "hf_trak.cli.main", "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 2
    assert all(name in shown.stdout for name in ("demo", "featurize", "attribute"))


def test_choosing_no_command_imports_nothing_heavy() -> None:
    code = "import sys; from hf_trak.cli.main import main; main([]); print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["featurize", "attribute", "demo", "push", "card", "verify"])
def test_help_of_a_command_has_an_example_and_explains_every_flag(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as status:
        main([command, "--help"])
    assert status.value.code == 0
    shown = capsys.readouterr().out
    assert f"examples:\n  hf-trak {command}" in shown
    assert "--config CONFIG" in shown


@pytest.mark.parametrize("dataclass", [FeaturizeArguments, FeatureArguments, AttributeArguments, PushArguments, CardArguments])
def test_every_flag_has_help(dataclass: type) -> None:
    parser = make_parser([dataclass], command="x", usage="", description="")
    assert [action.dest for action in parser._actions if not action.help] == []


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"hf-trak {__version__}\n"


@pytest.mark.parametrize("script", ["featurize", "attribute"])
def test_scripts_are_the_commands(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(f"hf_trak.cli.{script}.main", lambda arguments: seen.append(arguments))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--some", "flag"])
    path = Path(__file__).parents[1] / "scripts" / f"{script}.py"
    with pytest.raises(SystemExit) as status:
        exec(compile(path.read_text(), str(path), "exec"), {"__name__": "__main__"})
    assert status.value.code == 0
    assert seen == [["--some", "flag"]]


# The loader of datasets

ROWS = Dataset.from_dict({"text": ["good", "bad", "fine"], "label": [1, 0, 1]})


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl"])
def test_files_of_every_kind_load(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    {"parquet": ROWS.to_parquet, "csv": ROWS.to_csv}.get(kind, ROWS.to_json)(path)
    assert load_rows(str(path), split="validation").to_dict() == ROWS.to_dict()
    assert load_rows(str(path), split="train[:2]")["label"][:] == [1, 0]
    assert len(load_rows(str(path), split="train", max_rows=1)) == 1


def test_saved_datasets_and_folders_load(tmp_path: Path) -> None:
    ROWS.save_to_disk(tmp_path / "one")
    DatasetDict({"train": ROWS, "test": ROWS.select([0])}).save_to_disk(tmp_path / "both")
    (tmp_path / "plain").mkdir()
    ROWS.to_csv(tmp_path / "plain" / "train.csv")
    assert len(load_rows(str(tmp_path / "one"), split="train")) == 3
    assert len(load_rows(str(tmp_path / "both"), split="test")) == 1
    assert len(load_rows(str(tmp_path / "plain"), split="train")) == 3
    with pytest.raises(ValueError, match="no split 'validation'; it has train, test"):
        load_rows(str(tmp_path / "both"), split="validation")
    with pytest.raises(ValueError, match="no split 'validation'; it has train"):
        load_rows(str(tmp_path / "plain"), split="validation")


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("rows.xlsx", "?", ValueError, "should end in .parquet, .csv"),
        ("rows.parquet", "not parquet", ValueError, "rows.parquet cannot be read"),
        ("gone.csv", None, FileNotFoundError, "no file or folder"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, name: str, text: str | None, error: type[Exception], message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        load_rows(str(tmp_path / name), split="train")


def test_a_name_that_is_nothing_says_so() -> None:
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is neither a file or folder here nor a dataset of the Hub"):
        load_rows("nobody/nothing", split="train")


def test_empty_folders_and_row_counts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is empty"):
        load_rows(str(tmp_path), split="train")
    with pytest.raises(ValueError, match="at least 1, but is 0"):
        load_rows(str(tmp_path), split="train", max_rows=0)
