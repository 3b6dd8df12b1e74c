"""`hf-trak evaluate`: the numbers of the Python API, beside what the ground truth can say at all, and errors before work."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from datasets_for_tests import save_model, token_rows

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.cli.evaluate import MEASURES
from hf_trak.cli.evaluate_lds import LDSArguments, checkpoints_of
from hf_trak.cli.main import main
from hf_trak.cli.parsing import make_parser
from hf_trak.evaluation import ground_truth_from, ground_truth_reliability, lds, make_masks
from hf_trak.evaluation.baselines import Checkpoints, make_baseline

N_TRAIN, N_QUERIES, N_SUBSETS = 24, 5, 16


def ground_truth(n_seeds: int = 2, *, n_train: int = N_TRAIN, n_queries: int = N_QUERIES) -> Dataset:
    """Rows as `collect` makes them, out of order: outputs are sums over the subset and noise."""
    generator = np.random.default_rng(0)
    masks = make_masks(n_train, N_SUBSETS)
    signal = masks @ generator.normal(size=(n_train, n_queries))
    runs = [(subset, seed) for seed in reversed(range(n_seeds)) for subset in reversed(range(N_SUBSETS))]
    columns = {
        "subset": [subset for subset, _ in runs],
        "seed": [seed for _, seed in runs],
        "mask": [masks[subset] for subset, _ in runs],
        "outputs": [(signal[subset] + generator.normal(size=n_queries)).astype(np.float32) for subset, _ in runs],
    }
    return Dataset.from_dict(columns)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A ground truth, the rows it is of, an index of two checkpoints with two sketches each, and scores in a file."""
    folder = tmp_path_factory.mktemp("evaluate")
    rows = ground_truth()
    rows.to_parquet(folder / "truth.parquet")
    train, queries = token_rows(N_TRAIN), token_rows(N_QUERIES, seed=1)
    train.to_parquet(folder / "train.parquet")
    queries.to_parquet(folder / "queries.parquet")
    models = [save_model(folder / f"bert{seed}", seed=seed) for seed in (0, 1)]
    config = TrakConfig(proj_dim=32)
    options = {"config": config, "sketch_seeds_per_checkpoint": 2, "progress": False}
    index = AttributionIndex.build(folder / "index", models=models, dataset=train, **options)
    scores = np.random.default_rng(1).normal(size=(N_TRAIN, N_QUERIES)).astype(np.float32)
    np.save(folder / "scores.npy", scores)
    return SimpleNamespace(
        folder=folder, models=models, train=train, queries=queries, index=index, scores=scores, truth=ground_truth_from(rows)
    )


def arguments(files: SimpleNamespace, *more: str) -> list[str]:
    return ["evaluate", "lds", "--ground_truth", str(files.folder / "truth.parquet"), *more]


def of_index(files: SimpleNamespace, *more: str) -> list[str]:
    return arguments(files, "--index", str(files.index.folder), "--queries", str(files.folder / "queries.parquet"), *more)


def of_scores(files: SimpleNamespace, *more: str) -> list[str]:
    return arguments(files, "--scores", str(files.folder / "scores.npy"), *more)


def results_of(command: list[str], output: Path) -> dict:
    assert main([*command, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def test_the_command_says_what_the_api_says(files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dampings = ["--damping", "auto", "0.1"]
    results = results_of(of_index(files, *dampings), tmp_path / "lds.json")
    rows = {row["method"].split(", ")[-1]: row for row in results["rows"]}
    printed = capsys.readouterr().out
    for name, damping in (("damping 3 (auto)", "auto"), ("damping 0.1", 0.1)):
        expected = lds(files.index.score(files.queries, damping=damping, progress=False), *files.truth)
        assert rows[name]["metric"] == "lds"
        assert (rows[name]["value"], rows[name]["interval"]) == (expected.value, list(expected.interval))
        assert f"{expected.value:+.3f}  [{expected.interval[0]:+.3f}, {expected.interval[1]:+.3f}]" in printed
    assert rows["damping 0.1"]["value"] != rows["damping 3 (auto)"]["value"]


def test_the_ceiling_of_the_ground_truth_stands_beside_it(
    files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = results_of(of_scores(files), tmp_path / "lds.json")["rows"]
    printed = capsys.readouterr().out
    expected = ground_truth_reliability(files.truth.outputs)
    assert [(row["metric"], row["value"]) for row in rows[1:]] == [
        ("ground_truth_reliability", expected.reliability),
        ("lds_ceiling", expected.ceiling),
    ]
    assert rows[2]["interval"] == list(expected.interval)
    assert 0 < expected.reliability < 1
    assert "16 subsets of 12 of 24 training rows, 2 seeds each, 5 queries" in printed
    assert f"reliability {expected.reliability:.3f}, ceiling of the LDS {expected.ceiling:.3f}" in printed


def test_results_are_in_the_form_of_every_results_file(files: SimpleNamespace, tmp_path: Path) -> None:
    results = results_of(of_index(files), tmp_path / "new" / "lds.json")
    assert {"name", "command", "commit", "versions", "hardware", "rows"} == set(results)
    assert results["command"].startswith("hf-trak evaluate lds --ground_truth ")
    assert "torch" in results["versions"]
    assert f"BertForSequenceClassification, {N_TRAIN} training rows, {N_QUERIES} queries" in results["rows"][0]["case"]
    for row in results["rows"]:
        assert {"case", "method", "metric", "value", "unit", "interval"} <= set(row)
        assert row["n_subsets"] == N_SUBSETS


def test_scores_in_a_file_need_neither_index_nor_queries(files: SimpleNamespace, tmp_path: Path) -> None:
    (row, *_) = results_of(of_scores(files), tmp_path / "lds.json")["rows"]
    assert row["method"] == str(files.folder / "scores.npy")
    assert row["value"] == lds(files.scores, *files.truth).value


def test_the_interval_is_as_asked_for(files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--resample", "queries", "--n_bootstrap", "50", "--confidence", "0.8", "--seed", "7"]
    (row, *_) = results_of(of_scores(files, *flags), tmp_path / "lds.json")["rows"]
    expected = lds(files.scores, *files.truth, resample="queries", n_bootstrap=50, confidence=0.8, seed=7)
    assert row["interval"] == list(expected.interval)
    assert "[80% bootstrap interval over queries]" in capsys.readouterr().out
    (row, *_) = results_of(of_scores(files, "--n_bootstrap", "0"), tmp_path / "none.json")["rows"]
    assert row["interval"] is None
    assert "bootstrap" not in capsys.readouterr().out


@pytest.mark.slow
def test_baselines_are_those_of_the_api_on_the_index_s_checkpoints(files: SimpleNamespace, tmp_path: Path) -> None:
    flags = ["--train", str(files.folder / "train.parquet"), "--baselines", "random", "gradient_cosine"]
    rows = results_of(of_index(files, *flags), tmp_path / "lds.json")["rows"]
    checkpoints = Checkpoints(files.models, files.index.config)
    for name in ("random", "gradient_cosine"):
        scores = make_baseline(name, checkpoints)(files.train, files.queries)
        assert [row["value"] for row in rows if row["method"] == name] == [lds(scores, *files.truth).value]


def test_every_checkpoint_is_looked_at_once(files: SimpleNamespace) -> None:
    assert len(files.index.members) == 4
    assert [Path(source).resolve() for source in checkpoints_of(files.index)] == [path.resolve() for path in files.models]


def test_random_scores_need_no_rows(files: SimpleNamespace, tmp_path: Path) -> None:
    rows = results_of(of_scores(files, "--baselines", "random"), tmp_path / "lds.json")["rows"]
    scores = make_baseline("random")(files.train, files.queries)
    assert rows[1]["value"] == lds(scores, *files.truth).value


def test_one_seed_leaves_the_ceiling_unknown(files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ground_truth(1).to_parquet(tmp_path / "one.parquet")
    command = [*of_scores(files), "--ground_truth", str(tmp_path / "one.parquet")]
    rows = results_of(command, tmp_path / "lds.json")["rows"]
    assert [row["metric"] for row in rows] == ["lds"]
    assert "reliability and ceiling unknown: there is one seed per subset" in capsys.readouterr().out


def test_queries_without_a_correlation_are_counted(
    files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    scores = files.scores.copy()
    scores[:, 2] = 0
    np.save(tmp_path / "flat.npy", scores)
    np.save(tmp_path / "flatter.npy", np.zeros_like(scores))
    command = arguments(files, "--scores", str(tmp_path / "flat.npy"), str(tmp_path / "flatter.npy"))
    flat, flatter, *_ = results_of(command, tmp_path / "lds.json")["rows"]
    assert (flat["value"], flat["n_undefined"]) == (lds(scores, *files.truth).value, 1)
    assert (flatter["value"], flatter["interval"], flatter["n_undefined"]) == (None, None, N_QUERIES)
    printed = capsys.readouterr().out
    assert "1 of 5 queries left out: all predictions, or all outputs, are the same" in printed
    assert "undefined" in printed


def test_a_saved_dataset_and_a_job_of_train_subsets_are_ground_truths_too(files: SimpleNamespace, tmp_path: Path) -> None:
    rows = ground_truth()
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").write_text("{}")
    command = ["evaluate", "lds", "--scores", str(files.folder / "scores.npy"), "--ground_truth"]
    assert main([*command, str(tmp_path / "job")]) == 1  # not finished yet
    rows.to_parquet(tmp_path / "job" / "job.parquet")
    for name in ("saved", "job"):
        (row, *_) = results_of([*command, str(tmp_path / name)], tmp_path / f"{name}.json")["rows"]
        assert row["value"] == lds(files.scores, *files.truth).value


# Errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Whose score? Give --index and --queries, or --scores."),
        (["--index", "{folder}/index"], "--index needs --queries"),
        (["--scores", "{folder}/scores.npy", "--damping", "1"], "there is no --index"),
        (["--scores", "{folder}/scores.npy", "--confidence", "95"], "--confidence between 0 and 1"),
        (["--scores", "{folder}/scores.npy", "--output", "lds.csv"], "must end in .json"),
        (["--scores", "{folder}/scores.npy", "--baselines", "tracin"], "tracin is none of random, representation_dot"),
        (["--scores", "{folder}/scores.npy", "--baselines", "datamodel_l2"], "hf_trak.evaluation.baselines.cross_fit"),
        (["--scores", "{folder}/scores.npy", "--baselines", "gas"], "need --index, --queries, --train, too"),
        (["--scores", "{folder}/gone.npy"], "there is no file"),
        (["--scores", "{folder}/train.parquet"], "not an array of numbers that numpy.save wrote"),
        (
            ["--index", "{folder}/index", "--queries", "{folder}/train.parquet"],
            "--queries has 24 rows, but the ground truth is of 5 q",
        ),
        (
            ["--scores", "{folder}/scores.npy", "--train", "{folder}/queries.parquet"],
            "--train has 5 rows, but the ground truth is of 24 training rows",
        ),
        (["--index", "{folder}/index", "--queries", "{folder}/queries.parquet", "--damping", "much"], "much"),
    ],
)
def test_what_does_not_fit_is_one_clean_line(
    files: SimpleNamespace, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    assert main(arguments(files, *(flag.format(folder=files.folder) for flag in flags))) == 1
    error = capsys.readouterr().err
    assert error.startswith("hf-trak: error: ")
    assert message in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.remove_columns("seed"), "has the columns subset, seed, mask and outputs; seed is missing"),
        (
            lambda rows: rows.select(range(len(rows) - 1)),
            "Expected each of 2 seeds once for each of 16 subsets, but there are 31",
        ),
        (lambda rows: rows.filter(lambda row: row["subset"] == 3), "holds one subset; a correlation needs at least two"),
        (lambda rows: ground_truth(n_queries=6), "must hold (n_train, n_query) = (24, 6) numbers"),
        (lambda rows: ground_truth(n_train=5, n_queries=24), "They look transposed."),
        (
            lambda rows: rows.map(lambda row: {"outputs": [*row["outputs"][1:], float("inf")]}),
            "outputs are not finite",
        ),
        (
            lambda rows: rows.map(lambda row, number: {"mask": row["mask"][number == 0 :]}, with_indices=True),
            "in every row of the column mask, but its rows differ in length",
        ),
        (
            lambda rows: rows.map(lambda row: {"mask": row["mask"][::-1] if row["seed"] else row["mask"]}),
            "seeds of a subset must share its mask",
        ),
    ],
    ids=["column", "row", "one subset", "queries", "transposed", "infinite", "ragged", "masks differ"],
)
def test_a_ground_truth_that_is_none_is_refused(
    files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture, change: object, message: str
) -> None:
    change(ground_truth()).to_parquet(tmp_path / "truth.parquet")  # type: ignore[operator]
    assert main([*of_scores(files), "--ground_truth", str(tmp_path / "truth.parquet")]) == 1
    assert message in capsys.readouterr().err


def test_an_index_of_other_rows_is_refused_before_queries_cost_anything(
    files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ground_truth(n_train=30).to_parquet(tmp_path / "truth.parquet")
    command = of_index(files, "--ground_truth", str(tmp_path / "truth.parquet"))
    assert main(command) == 1
    assert "--index has 24 rows, but the ground truth is of 30 training rows" in capsys.readouterr().err


def test_results_are_not_overwritten_unless_asked(
    files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    results_of(of_scores(files), tmp_path / "lds.json")
    before = (tmp_path / "lds.json").read_bytes()
    again = of_scores(files, "--output", str(tmp_path / "lds.json"), "--seed", "3")
    assert main(again) == 1
    assert "lds.json exists" in capsys.readouterr().err
    assert (tmp_path / "lds.json").read_bytes() == before
    assert main([*again, "--overwrite"]) == 0
    assert (tmp_path / "lds.json").read_bytes() != before


# Help


def test_help_lists_the_measures_and_explains_each(capsys: pytest.CaptureFixture) -> None:
    for command in (["evaluate"], ["evaluate", "nonsense"]):
        with pytest.raises(SystemExit) as status:
            main(command)
        assert status.value.code == 2
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    listed = capsys.readouterr().out
    for measure in MEASURES:
        assert measure in listed
        with pytest.raises(SystemExit) as status:
            main(["evaluate", measure, "--help"])
        assert status.value.code == 0
        assert f"examples:\n  hf-trak evaluate {measure}" in capsys.readouterr().out


def test_every_flag_has_help() -> None:
    parser = make_parser([LDSArguments], command="x", usage="", description="")
    assert [action.dest for action in parser._actions if not action.help] == []
