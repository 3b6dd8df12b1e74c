"""Architectures of transformers, each against a plain loop over its examples alone and unpadded; all of them with `-m slow`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.zoo import cases, configs, sweep
from tests.zoo.cases import TASKS, Case, all_cases, run_case
from tests.zoo.kits import mean_margins
from tests.zoo.reference import Reference, distance
from tests.zoo.summary import summarize
from tests.zoo.sweep import in_child, read_lines, run_all

ROOT = Path(__file__).parents[1]
BERT = Case("text-classification", "bert", "BertForSequenceClassification")

# Families and tasks, popular ones and those that engines or padding get wrong.
SAMPLE = {
    "text-classification": ["bert", "deberta-v2", "mpnet", "t5", "fnet"],
    "token-classification": ["layoutlm", "canine", "funnel"],
    "question-answering": ["longformer", "layoutlmv3"],
    "masked-lm": ["modernbert", "xlm", "convbert"],
    "causal-lm": ["gpt2", "mamba", "deepseek_v32", "gpt_oss"],
    "seq2seq": ["bart", "marian"],
    "image-classification": ["vit", "swin", "convnext", "levit"],
    "contrastive": ["clip", "siglip2"],
    "multiple-choice": ["roberta"],
    "audio-classification": ["wav2vec2"],
    "ctc": ["hubert"],
    "speech-to-text": ["whisper"],
    "semantic-segmentation": ["segformer"],
}


SLOW = {
    "fnet",
    "mpnet",
    "funnel",
    "layoutlmv3",
    "xlm",
    "convbert",
    "marian",
    "convnext",
}  # of which the sample has others alike


def sample():
    for task, types in SAMPLE.items():
        for model_type in types:
            yield next(all_cases([task], [model_type]))


@pytest.mark.filterwarnings("ignore")  # of the architectures' own code
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{case.task}-{case.model_type}", marks=pytest.mark.slow if case.model_type in SLOW else ())
        for case in sample()
    ],
)
def test_gradients_are_those_of_a_loop_over_unpadded_rows(case):
    record = run_case(case)
    assert record["outcome"] == "right", record


def test_the_sample_has_thirty_cases_of_every_common_task():
    assert len(list(sample())) == 30
    assert set(SAMPLE) == set(TASKS) - {"document-question-answering", "image-text-to-text"}


@pytest.mark.slow
def test_nothing_of_the_zoo_is_silently_wrong_and_nearly_everything_is_right(tmp_path):
    output = tmp_path / "zoo.json"
    subprocess.run([sys.executable, "-m", "tests.zoo", "--output", output], cwd=ROOT, check=True)
    result = json.loads(output.read_text())
    assert result["n_run"] == result["n_cases"]
    shares = {}
    for row in result["rows"]:
        if row["case"] == "all tasks":
            shares[row["outcome"]] = shares.get(row["outcome"], 0) + row["value"]
    assert shares["silently wrong"] == shares["crash"] == 0, [m for m in result["models"] if m["outcome"] != "right"]
    assert shares["right"] >= 0.97


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_gradient_of_one_parameter_is_silently_wrong(monkeypatch):
    from hf_trak import Featurizer

    right = Featurizer.compute

    def wrong(self, batch, ids=None):
        found = right(self, batch, ids)
        features = found.features.clone()
        features[:, -3:] *= 1.01  # the bias of the classifier
        return found._replace(features=features)

    monkeypatch.setattr(Featurizer, "compute", wrong)
    record = run_case(BERT)
    assert record["outcome"] == "silently wrong"
    assert record["wrong_parameters"] == ["classifier.bias"]


@pytest.mark.parametrize(
    ("error", "outcome"), [(ValueError("from the package"), "refused"), (RuntimeError("from the package"), "crash")]
)
def test_an_error_of_the_package_is_a_refusal_only_if_it_is_a_value_error(monkeypatch, error, outcome):
    for path, expected in (("/x/hf_trak/tasks/base.py", outcome), ("/x/torch/nn/functional.py", "crash")):
        namespace = {"error": error}
        exec(compile("def fail(*args, **options):\n    raise error\n", path, "exec"), namespace)
        monkeypatch.setattr(cases, "_run", namespace["fail"])
        assert run_case(BERT)["outcome"] == expected
        error.__traceback__ = None


def test_distance_tells_whose_gradient_is_wrong():
    torch.manual_seed(0)
    reference = Reference(
        torch.randn(2, 30).double(), torch.zeros(2), torch.zeros(2), None, ["a", "b", "c"], [10, 5, 15], torch.float64
    )
    features = reference.grads.clone()
    assert distance(features, reference) == (0, [])
    features[1, 12] *= 1.1
    error, wrong = distance(features, reference)
    assert 1e-3 < error < 0.1
    assert wrong == ["b"]


def test_margins_leave_labels_out():
    logits = torch.tensor([[2.0, 0.0, 1.0], [9.0, 9.0, 9.0]])
    outputs = mean_margins(logits, [0, -100])
    p = torch.softmax(logits[0], 0)[0]
    torch.testing.assert_close(outputs.output, torch.logit(p))
    torch.testing.assert_close(outputs.one_minus_p, 1 - p)
    torch.testing.assert_close(outputs.nll, -p.log())


def test_every_override_is_of_a_model_type():
    for name in configs._OVERRIDES:
        model_type = name.split("/")[0]
        assert model_type in CONFIG_MAPPING, name


def spin():
    while True:
        pass


def test_a_child_that_dies_or_takes_too_long_is_a_crash(monkeypatch):
    known = BERT._asdict()
    died = in_child(lambda: os.kill(os.getpid(), signal.SIGKILL), known, limit=20)
    slow = in_child(lambda: spin(), known, limit=1)
    monkeypatch.setattr(sweep, "_WAITING", 0.01)
    waiting = in_child(lambda: time.sleep(30), known, limit=100)
    assert in_child(lambda: {"outcome": "right"}, known, limit=20) == {"outcome": "right"}
    assert died["outcome"] == slow["outcome"] == waiting["outcome"] == "crash"
    assert "status 9" in died["message"]
    assert "did not end within 1 s" in slow["message"]


def test_a_sweep_goes_on_where_it_ended(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sweep, "_import_ahead", lambda: None)

    def record(run, known, *, limit):
        asked.append(known["model_type"])
        return {**known, "outcome": "right", "engine": "loop"}

    monkeypatch.setattr(sweep, "in_child", record)
    todo = list(all_cases(["contrastive"]))
    run_all(todo[:2], tmp_path / "lines.jsonl", limit=5)
    run_all(todo, tmp_path / "lines.jsonl", limit=5)
    assert asked == [case.model_type for case in todo]
    assert list(read_lines(tmp_path / "lines.jsonl")) == todo


def test_shares_of_outcomes_sum_to_one_and_unbuilt_models_count_nowhere():
    found = [("right", "layerwise"), ("right", "loop"), ("refused", None), ("crash", None), ("not built", None)]
    records = [{**BERT._asdict(), "outcome": outcome, "engine": engine} for outcome, engine in found]
    result = summarize(records, n_cases=7)
    rows = [row for row in result["rows"] if row["case"] == "text-classification"]
    assert sum(row["value"] for row in rows) == pytest.approx(1)
    assert {row["n_built"] for row in rows} == {4}
    assert (result["n_cases"], result["n_run"], result["n_built"]) == (7, 5, 4)
