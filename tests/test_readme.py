"""The README says what is true: its example runs, and its tables are what `results/` holds."""

import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_trak.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "results").glob("*.json"))


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_readmes_example_runs_as_printed(tmp_path, monkeypatch):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert 15 <= len([line for line in example.splitlines() if line.strip()]) <= 25
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["scores"].shape == (1697, 100)
    assert len(names["hits"][0]["proponents"]) == 5
    assert len(set(names["suspicious"].tolist())) == 10


def test_tables_are_what_the_results_say():
    check = subprocess.run([sys.executable, ROOT / "benchmarks" / "render.py", "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_have_the_common_schema(path):
    result = json.loads(path.read_text())
    assert result["name"] == path.stem
    assert {"command", "commit", "versions", "hardware", "rows"} <= set(result)
    for row in result["rows"]:
        assert {"case", "method", "metric", "value", "unit", "interval"} <= set(row)
        assert isinstance(row["value"], float | int)


def test_commands_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for flag in re.findall(r"hf-trak (\w+)", text):
        assert flag in COMMANDS, flag


def test_every_name_of_ours_in_the_paper_index_exists():
    text = (ROOT / "docs" / "paper_index.md").read_text()
    names = sorted(set(re.findall(r"`(hf_trak(?:\.\w+)+)", text)))
    assert len(names) > 5
    for name in names:
        assert pkgutil.resolve_name(name), name
    from hf_trak.evaluation.baselines import BASELINES, SUBSET_FITS

    table = text.split("Baselines of the paper's figures")[1].split("##")[0]
    ours = {name for row in table.splitlines() if row.startswith("|") for name in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert ours <= {*BASELINES, *SUBSET_FITS, "datamodel", "cross_fit"}
