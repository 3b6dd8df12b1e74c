"""What commands print for machines: one JSON document each; how quiet they are; and what a shell completes."""

import importlib.util
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from explorer_for_tests import save_text_index, text_rows

from hf_trak import AttributionIndex
from hf_trak.cli.completion import SHELLS
from hf_trak.cli.main import COMMANDS, main
from hf_trak.evaluation import make_masks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machines")
    save_text_index(folder)
    text_rows(24).to_parquet(folder / "train.parquet")
    text_rows(6, seed=1).to_parquet(folder / "validation.parquet")
    generator = np.random.default_rng(0)
    masks = make_masks(24, 8)
    runs = [(subset, seed) for subset in range(8) for seed in (0, 1)]
    outputs = [(masks[subset] @ generator.normal(size=(24, 6))).astype(np.float32) for subset, _ in runs]
    columns = {
        "subset": [subset for subset, _ in runs],
        "seed": [seed for _, seed in runs],
        "mask": [masks[subset] for subset, _ in runs],
    }
    Dataset.from_dict({**columns, "outputs": outputs}).to_parquet(folder / "truth.parquet")
    return folder


def document(capsys, *arguments):
    """What a command prints for machines, which must be one JSON document and nothing else; and its exit status."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as ended:
        status = ended.code
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"command", "exit_status", "seconds", "error", "result"}
    assert (found["exit_status"], found["command"]) == (status, arguments[0] if arguments[0] in COMMANDS else arguments[1])
    return found


def featurize(folder, output):
    data = folder / "train.parquet"
    return ["featurize", "--model", folder / "bert-0", "--dataset", data, "--output", output, "--proj_dim", 32]


def test_every_command_prints_one_document_for_machines(folder, tmp_path, capsys):
    """But for `push`, which is tested where there is a Hub."""
    index, validation, told = folder / "index", folder / "validation.parquet", {}

    def result(*arguments):
        found = document(capsys, *arguments, "--json")
        assert found["error"] is None
        told[found["command"]] = found["result"]
        return found["result"]

    made = result(*featurize(folder, tmp_path / "made"))
    assert (made["n_rows"], made["n_members"], made["index"]) == (24, 1, str(tmp_path / "made"))
    assert result(*featurize(folder, tmp_path / "none"), "--dry_run")["estimate"]["n_rows"] == 24
    for part in (0, 1):
        result(*featurize(folder, tmp_path / "parts"), "--shard_rows", 12, "--shard-index", part, "--num-shards", 2)
    assert result("merge", tmp_path / "parts")["n_rows"] == 24
    hits = result(
        "attribute", index, "--queries", validation, "--output", tmp_path / "hits.jsonl", "--report", tmp_path / "report"
    )
    assert hits == {
        "hits": str(tmp_path / "hits.jsonl"),
        "n_queries": 6,
        "report": [str(tmp_path / "report" / f"report.{kind}") for kind in ("png", "html")],
    }
    said = result("explain", index, "--text", "a b c", "--top_k", 2)
    wanted = AttributionIndex(index).explain("a b c", top_k=2, progress=False)
    assert (said["answer"], said["output"]) == (wanted.answer, wanted.attribution.output)
    assert [hit["row"] for hit in said["proponents"]] == [row for row in wanted.hits[0]["proponents"] if row >= 0]
    suspects = result("label-errors", index, "--output", tmp_path / "suspects.parquet", "--budget", 5)
    assert (suspects["n_rows"], len(suspects["first"]), suspects["of"]) == (5, 5, 24)
    chosen = result("select", index, "--target", validation, "--budget", 4, "--output", tmp_path / "chosen")
    assert len(chosen["first"]) == chosen["n_rows"] == 4
    assert result("verify", index)["whole"] is True
    assert "hf_trak" in result("card", index)["text"]
    truth = result(
        "evaluate",
        "lds",
        "--index",
        index,
        "--queries",
        validation,
        "--ground_truth",
        folder / "truth.parquet",
        "--n_bootstrap",
        0,
    )
    assert [row["metric"] for row in truth["rows"]] == ["lds", "ground_truth_reliability", "lds_ceiling"]
    assert truth["rows"][0]["interval"] == [None, None]
    data = ["--dataset", folder / "train.parquet", "--queries", validation, "--proj_dim", 32]
    assert result("demo", "--model", folder / "bert-0", *data, "--output", tmp_path / "demo")["name"] == "demo"
    if importlib.util.find_spec("gradio") is not None:
        assert result("explore", index, "--export", tmp_path / "space")["exported"] == str(tmp_path / "space")
    if importlib.util.find_spec("shtab") is not None:
        assert "_shtab_hf_trak" in result("completion", "bash")["script"]
    assert {*told, "push", "explore", "completion"} == set(COMMANDS)


def test_a_machine_is_told_why_a_command_failed(folder, tmp_path, capsys):
    found = document(
        capsys, "attribute", tmp_path / "gone", "--queries", "q.csv", "--output", tmp_path / "hits.jsonl", "--json"
    )
    assert (found["exit_status"], found["result"]) == (1, None)
    assert "neither a folder here nor" in found["error"]
    found = document(capsys, "--json", "select", "--budgte", "5")
    assert found["exit_status"] == 2
    assert "--index" in found["error"]
    shard = folder / "index" / "member_0" / "train-00001-of-00003.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    try:
        found = document(capsys, "verify", folder / "index", "--json")
    finally:
        shard.write_bytes(whole)
    assert (found["exit_status"], found["result"]["whole"]) == (1, False)
    assert found["error"].endswith("are damaged or missing: member_0/train-00001-of-00003.parquet")


def test_quiet_prints_errors_and_nothing_else(folder, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "hf_trak.cli.main", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(*featurize(folder, tmp_path / "made"), "--quiet")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == ""
    failed = run("verify", tmp_path / "gone", "--quiet")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("hf-trak: error: ")


def test_verbosity_is_a_level_of_our_logger(folder, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hf_trak.cli.verify.main", lambda arguments: seen.append(logging.getLogger("hf_trak").getEffectiveLevel())
    )
    before = logging.getLogger("hf_trak").level
    for name in ("debug", "ERROR"):
        monkeypatch.setenv("HF_TRAK_VERBOSITY", name)
        assert main(["verify"]) == 0
    assert seen == [logging.DEBUG, logging.ERROR]
    assert logging.getLogger("hf_trak").level == before
    monkeypatch.setenv("HF_TRAK_VERBOSITY", "loud")
    assert main(["verify"]) == 2
    assert "must be one of debug, info, warning, error, critical, but is 'loud'" in capsys.readouterr().err


def test_a_shell_completes_commands_flags_and_choices(tmp_path, capsys):
    pytest.importorskip("shtab", reason="shtab is not installed: pip install 'hf-trak[completion]'")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)

    def completed(*words):
        code = f'source {script}; COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _shtab_hf_trak; echo "${{COMPREPLY[@]}}"'
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert completed("hf-trak", "label") == ["label-errors"]
    assert "--queries" in completed("hf-trak", "attribute", "--quer")
    assert completed("hf-trak", "evaluate", "lds", "--resample", "q") == ["queries"]
    assert "--json" in completed("hf-trak", "verify", "--js")


@pytest.mark.parametrize("shell", SHELLS)
def test_without_shtab_completion_says_how_to_get_it(shell, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", shell]) == 1
    assert capsys.readouterr().err == "hf-trak: error: Completion needs shtab: pip install 'hf-trak[completion]'.\n"
