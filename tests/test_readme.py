"""The README and the docs say what is true: tables and figures are what `results/` holds, and what they name exists."""

import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_trak.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "results").glob("*.json"))


def test_tables_are_what_the_results_say():
    check = subprocess.run([sys.executable, ROOT / "benchmarks" / "render.py", "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Return the renderer, which reads the results of three rows of two cases."""
    spec = importlib.util.spec_from_file_location("benchmarks_render", ROOT / "benchmarks" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    row = {"case": "data, 1 run", "method": "ours", "metric": "lds", "value": 0.5, "unit": "Spearman", "interval": [0.4, 0.6]}
    slow = {**row, "metric": "stage_s", "value": 1234.5, "unit": "s", "interval": None}
    rows = [row, slow, {**row, "case": "data, 5 runs", "value": 0.7, "interval": None, "damping": 0.1}]
    (tmp_path / "results").mkdir()

    def write(*more):
        content = {"command": "c", "hardware": "cpu", "versions": {"torch": "2"}, "rows": [*rows, *more]}
        (tmp_path / "results" / "some.json").write_text(json.dumps(content))

    write()
    return module, write, row


@pytest.mark.parametrize(
    ("wanted", "above", "head", "body"),
    [
        (
            ["lds", "stage_s"],
            "data:",
            "| case | method | `lds`, Spearman | `stage_s` |",
            ["| 1 run | ours | 0.5 (0.4 to 0.6) | 1,234 |", "| 5 runs | ours | 0.7 |  |"],
        ),
        (
            ["lds", "columns=case"],
            "data; `lds`, Spearman:",
            "| method | 1 run | 5 runs |",
            ["| ours | 0.5 (0.4 to 0.6) | 0.7 |"],
        ),
        (["lds", "columns=damping"], "data, 5 runs; `lds`, Spearman:", "| method | damping 0.1 |", ["| ours | 0.7 |"]),
    ],
)
def test_a_table_has_a_column_per_metric_or_case_or_value_and_says_once_what_cases_share(tables, wanted, above, head, body):
    lines = tables[0].table("some", wanted).splitlines()
    assert [lines[0], lines[2], *lines[4 : 4 + len(body)]] == [above, head, *body]


def test_no_row_is_hidden_by_another(tables):
    render, write, row = tables
    write({**row, "value": 0.1, "damping": 3})
    with pytest.raises(SystemExit, match="some: ours, 1 run, has `lds`, Spearman twice"):
        render.table("some", ["lds"])


def test_a_figure_in_a_sentence_is_that_of_one_row(tables):
    render, _, _ = tables
    text = "of <!-- value: some lds case=1\\srun$ -->0<!-- end --> and <!-- value: some stage_s -->0<!-- end -->"
    assert re.sub("<!--.*?-->", "", render.with_values(text)) == "of 0.5 and 1,234"
    with pytest.raises(SystemExit, match="one row must fit, but 2 do"):
        render.with_values("<!-- value: some lds -->0<!-- end -->")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_have_the_common_schema(path):
    result = json.loads(path.read_text())
    assert result["name"] == path.stem
    assert {"command", "commit", "versions", "hardware", "rows"} <= set(result)
    for row in result["rows"]:
        assert {"case", "method", "metric", "value", "unit", "interval"} <= set(row)
        assert isinstance(row["value"], float | int)


def test_commands_of_the_readme_exist():
    text = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    for flag in re.findall(r"hf-trak ([a-z-]+)", text):
        assert flag in COMMANDS, flag


def test_every_name_of_ours_in_the_paper_index_exists():
    text = (ROOT / "docs" / "evidence" / "paper_index.md").read_text()
    names = sorted(set(re.findall(r"`(hf_trak(?:\.\w+)+)", text)))
    assert len(names) > 5
    for name in names:
        assert pkgutil.resolve_name(name), name
    from hf_trak.evaluation.baselines import BASELINES, SUBSET_FITS

    table = text.split("Baselines of the paper's figures")[1].split("##")[0]
    ours = {name for row in table.splitlines() if row.startswith("|") for name in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert ours <= {*BASELINES, *SUBSET_FITS, "datamodel", "cross_fit"}


USER = """
from transformers import Trainer
from hf_trak import AttributionArguments, AttributionTrainer, Ensemble, ScoreOptions, TrakConfig

trainer = AttributionTrainer("my-bert", AttributionArguments("out", members="epoch:3"), train_dataset=data["train"])
stock: Trainer = trainer
steps: int = trainer.train().global_step
shape: tuple[int, ...] = trainer.featurize().score(data["validation"], options=ScoreOptions(1.0), damping="auto").shape
ensemble = Ensemble("my-bert", sketch_seeds_per_checkpoint=2)
AttributionIndex.build("another-index", models=ensemble, dataset=data["train"], config=TrakConfig(proj_dim=512))
"""


@pytest.mark.slow
def test_the_readmes_example_and_a_trainer_pass_mypy_strict(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "example.py").write_text(code + USER)
    (tmp_path / "wrong.py").write_text("from hf_trak import AttributionIndex\nAttributionIndex.build('x', modells='y')\n")
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nfollow_imports = silent\n[mypy-datasets.*]\nignore_missing_imports = True\n"
    )
    options = [f"--config-file={tmp_path / 'mypy.ini'}", f"--cache-dir={tmp_path / 'cache'}"]
    check = subprocess.run(
        [sys.executable, "-m", "mypy", *options, tmp_path / "example.py", tmp_path / "wrong.py"],
        capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    errors = [line for line in check.stdout.splitlines() if ": error:" in line]
    assert errors
    assert all("wrong.py" in line for line in errors), check.stdout
