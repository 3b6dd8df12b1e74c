"""The metric of the `evaluate` library, loaded from the package's own folder."""

import doctest
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from hf_trak.evaluation import lds

evaluate = pytest.importorskip("evaluate", reason="the metric needs the library evaluate")

from hf_trak.metrics import load_metric  # noqa: E402

FOLDER = Path(__file__).parents[1] / "hf_trak" / "metrics" / "lds"


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return load_metric("lds")


@pytest.fixture
def problem():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(40, 6)).round(1)
    masks = generator.random((25, 40)) < 0.5
    return scores, masks, (masks @ scores + generator.normal(scale=3, size=(25, 6))).round()  # with ties


@pytest.mark.parametrize("resample", ["subsets", "queries"])
def test_the_metric_and_the_function_give_the_same_numbers(metric, problem, resample):
    scores, masks, outputs = problem
    expected = lds(scores, masks, outputs, n_bootstrap=50, resample=resample, seed=3)
    options = {"n_bootstrap": 50, "resample": resample, "seed": 3}
    result = metric.compute(predictions=masks @ scores, references=outputs, **options)
    assert result["lds"] == pytest.approx(expected.value, abs=1e-12)
    np.testing.assert_allclose(result["per_query"], expected.per_query, rtol=0, atol=1e-12)
    assert (result["interval_low"], result["interval_high"]) == pytest.approx(expected.interval, abs=1e-12)
    assert result["n_undefined"] == 0


def test_subsets_may_come_in_batches(metric, problem):
    scores, masks, outputs = problem
    for begin in range(0, 25, 10):
        metric.add_batch(predictions=(masks @ scores)[begin : begin + 10], references=outputs[begin : begin + 10])
    whole = metric.compute(predictions=None, references=None, n_bootstrap=0)
    assert whole["lds"] == pytest.approx(lds(*problem, n_bootstrap=0).value, abs=1e-12)


def test_a_constant_query_is_left_out_and_counted(metric, problem):
    scores, masks, outputs = problem
    outputs[:, 2] = 0.1
    result = metric.compute(predictions=masks @ scores, references=outputs, n_bootstrap=0)
    assert result["n_undefined"] == 1
    assert result["lds"] == pytest.approx(lds(scores, masks, outputs, n_bootstrap=0).value, abs=1e-12)


def test_what_does_not_fit_is_refused(metric):
    with pytest.raises(ValueError, match="two subsets at least"):
        metric.compute(predictions=[[1.0]], references=[[1.0]])
    with pytest.raises(ValueError, match="1 of 4 references are not finite"):
        metric.compute(predictions=[[1.0, 2.0], [3.0, 4.0]], references=[[1.0, float("nan")], [3.0, 4.0]])
    with pytest.raises(ValueError, match="'subsets' or 'queries', but is 'seeds'"):
        metric.compute(predictions=[[1.0], [2.0]], references=[[1.0], [2.0]], resample="seeds")


def test_an_unknown_metric_is_refused():
    with pytest.raises(FileNotFoundError, match="no metric 'nonsense'"):
        load_metric("nonsense")


def test_the_example_of_its_description_is_right(metric):
    examples = doctest.DocTestParser().get_examples(metric.inputs_description)
    names = {"evaluate": type("Evaluate", (), {"load": staticmethod(lambda name: metric)}), "np": np}
    test = doctest.DocTest(examples, names, "lds", None, None, None)
    assert doctest.DocTestRunner().run(test) == doctest.TestResults(failed=0, attempted=len(examples))
    assert len(examples) == 5


def test_its_folder_is_a_space():
    front_matter = yaml.safe_load((FOLDER / "README.md").read_text().split("---")[1])
    assert front_matter["sdk"] == "gradio"
    assert {"evaluate", "metric"} <= set(front_matter["tags"])
    assert (FOLDER / front_matter["app_file"]).is_file()
    needed = {line.split(">=")[0] for line in (FOLDER / "requirements.txt").read_text().split()}
    assert {"evaluate", "datasets", "numpy", "scipy"} <= needed


@pytest.mark.slow
def test_its_file_stands_alone(tmp_path):
    (tmp_path / "lds.py").write_text((FOLDER / "lds.py").read_text())
    code = "import sys, lds; print(any(name.split('.')[0] == 'hf_trak' for name in sys.modules))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip() == "False"
