"""Every command against a table of bad inputs: a status, one line that says what and what to do, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from datasets_for_tests import save_model, token_rows
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import word_tokenizer

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.cli.main import COMMANDS, main
from hf_trak.hub.download import HubIndex

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A checkpoint, rows, and an index of them, which no test changes."""
    folder = tmp_path_factory.mktemp("bad")
    model = save_model(folder / "bert")
    token_rows(12).to_parquet(folder / "rows.parquet")
    (folder / "text.csv").write_text("text,label\na b,0\nc d,1\n")
    AttributionIndex.build(
        folder / "index", models=model, dataset=token_rows(12), config=TrakConfig(proj_dim=16), progress=False
    )
    return SimpleNamespace(folder=folder, model=model, index=folder / "index", rows=folder / "rows.parquet")


@pytest.fixture
def refuse(files, tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder, and returns its one line of error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, status: int = 1) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        try:
            found = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            found = exit.code
        error = capsys.readouterr().err
        assert found == status, error
        assert error.startswith("hf-trak: error: "), error
        assert error.count("\n") == 1, error
        assert error.endswith("\n")
        assert error[:-1].isprintable()
        assert "Traceback" not in error
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return run


def commands_on_index(index, files):
    rows = files.rows
    return {
        "attribute": ["attribute", "--index", index, "--queries", rows, "--output", "hits.jsonl"],
        "card": ["card", index],
        "push": ["push", index, "me/index", "--license", "mit"],
        "merge": ["merge", index],
        "evaluate lds": ["evaluate", "lds", "--index", index, "--queries", rows, "--ground_truth", rows],
        "label-errors": ["label-errors", index, "--train", rows, "--output", "suspicious.jsonl"],
        "verify": ["verify", index],
    }


ON_INDEX = ["attribute", "card", "push", "merge", "evaluate lds", "label-errors", "verify"]


# Indexes


@pytest.mark.parametrize("command", ON_INDEX)
@pytest.mark.parametrize("place", ["nowhere", "rows.parquet", "bert", "../no/such/index", "s3://", "a b/c", "me/none"])
def test_what_is_no_index_is_refused(refuse, files, command, place):
    path = files.folder / place if (files.folder / place).exists() else place
    assert "not expected" not in refuse(*commands_on_index(path, files)[command])


def _changed(**values):
    return lambda content: json.dumps(json.loads(content) | values)


EDITED: dict[str, Any] = {
    "damping": True,
    "sketch_seed": "x",
    "task": "text-regression",
    "columns_read": {"tokens": ["input_ids"], "label": "other"},
    "label_names": ["a", "b", "c"],
}


@pytest.mark.parametrize("command", ON_INDEX)
@pytest.mark.parametrize(
    "text",
    [
        *("null", DEEP, "[]", "3", "{}", "{", b"\xff\xfe"),
        *('{"proj_dim": "x"}', '{"damping": [1]}', '{"text_columns": 3}'),
        *(_changed(**{name: value}) for name, value in EDITED.items()),
    ],
    ids=range(10 + len(EDITED)),
)
def test_a_damaged_configuration_is_refused(refuse, files, tmp_path_factory, command, text):
    index = damaged(files, tmp_path_factory, "trak_config.json", text)
    refuse(*commands_on_index(index, files)[command])


@pytest.mark.parametrize("command", ["attribute", "card", "push", "label-errors", "verify"])
@pytest.mark.parametrize(
    "text",
    [
        "null",
        DEEP,
        "[]",
        "3",
        "{}",
        "{",
        b"\xff\xfe",
        _changed(identity=3),
        _changed(files=3),
        _changed(files=[3]),
        _changed(checkpoint=None),
        _changed(files=[{"file": "../../secret", "bytes": 1, "sha256": "x"}]),
    ],
    ids=range(12),
)
def test_a_damaged_member_is_refused(refuse, files, tmp_path_factory, command, text):
    index = damaged(files, tmp_path_factory, "member_0/member.json", text)
    refuse(*commands_on_index(index, files)[command])


def damaged(files, tmp_path_factory, name, text):
    index = tmp_path_factory.mktemp("damaged") / "index"
    shutil.copytree(files.index, index)
    content = text((index / name).read_bytes()) if callable(text) else text
    (index / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return index


# Checkpoints

CHECKPOINTS = {
    "nowhere": ("./nowhere", "There is no folder './nowhere'"),
    "empty name": ("", "name of a checkpoint is empty"),
    "no repository": ("me/none", "'me/none' is neither a folder here nor a model repository within reach"),
    "no name": ("no name!", "nor the name of a model repository"),
    "a file": ("rows.parquet", "is a file, where the folder of a checkpoint is expected"),
    "an index": ("index", "holds no config.json"),
}


@pytest.mark.parametrize("command", ["featurize", "featurize several", "attribute"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused(refuse, files, command, kind):
    name, said = CHECKPOINTS[kind]
    name = files.folder / name if name and (files.folder / name).exists() else name
    made = ["--dataset", files.rows, "--output", "index", "--proj_dim", "16"]
    arguments = {
        "featurize": ["featurize", "--model", name, *made],
        "featurize several": ["featurize", "--model", files.model, name, *made],
        "attribute": [*commands_on_index(files.index, files)["attribute"], "--model", name],
    }
    assert said in refuse(*arguments[command])


def _change_weights(change):
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return damage


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


DAMAGES = {
    "weights cut short": (_write("model.safetensors", b"\x10\0\0\0\0\0\0\0{"), "model.safetensors is damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    "prefix": (_change_weights(lambda s: {f"module.{key}": value for key, value in s.items()}), "contain `module.`"),
    "no head": (_change_weights(lambda s: {k: v for k, v in s.items() if "classifier" not in k}), "newly initialised"),
    "config null": (_write("config.json", b"null"), "config.json of"),
    "config deep": (_write("config.json", DEEP.encode()), "config.json of"),
    "config of no model": (_write("config.json", b'{"architectures": ["Nope"], "model_type": "bert"}'), "names Nope"),
    "adapter null": (_write("adapter_config.json", b"null"), "adapter_model.safetensors"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused(refuse, files, tmp_path_factory, kind):
    folder = tmp_path_factory.mktemp("damaged") / "bert"
    shutil.copytree(files.model, folder)
    damage, said = DAMAGES[kind]
    damage(folder)
    rows = ["--dataset", files.rows, "--output", "index", "--proj_dim", "16"]
    assert said in refuse("featurize", "--model", folder, *rows)
    assert said in refuse(*commands_on_index(files.index, files)["attribute"], "--model", folder)


# Datasets

DATASETS = {
    "gone.csv": None,
    "empty.csv": b"",
    "no_rows.csv": b"text,label\n",
    "binary.csv": b"\xff\x00\xfe" * 50,
    "empty.parquet": b"",
    "cut.parquet": b"PAR1xx",
    "deep.json": DEEP.encode(),
    "null.json": b"null",
    "nulls.jsonl": b"null\nnull\n",
    "text.json": b'"x"',
    "cut.jsonl": b"{\n",
    "rows.xlsx": b"x",
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_file_that_holds_no_rows_is_refused_by_every_command_that_reads_rows(refuse, files, tmp_path_factory, name):
    path = tmp_path_factory.mktemp("rows") / name
    if DATASETS[name] is not None:
        path.write_bytes(DATASETS[name])
    on_index = commands_on_index(files.index, files)
    for arguments in (
        ["featurize", "--model", files.model, "--dataset", path, "--output", "index"],
        ["attribute", "--index", files.index, "--queries", path, "--output", "hits.jsonl"],
        [*on_index["attribute"], "--train", path],
        ["evaluate", "lds", "--ground_truth", path, "--scores", "scores.npy"],
    ):
        assert name in refuse(*arguments)


@pytest.mark.parametrize("marker", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize("text", ["null", "{", "{}"])
def test_a_damaged_saved_dataset_is_refused(refuse, files, tmp_path_factory, marker, text):
    folder = tmp_path_factory.mktemp("saved")
    (folder / marker).write_text(text)
    assert str(folder) in refuse("featurize", "--model", files.model, "--dataset", folder, "--output", "index")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (
            "token_type_ids",
            7,
            "BertForSequenceClassification cannot compute a batch of input_ids (3, 2), token_type_ids (3, 2)",
        ),
        ("input_ids", 3.5, "'input_ids' must hold whole numbers"),
    ],
)
def test_rows_that_the_model_cannot_compute_are_refused(files, tmp_path, capsys, name, value, told):
    rows = tmp_path / "rows.parquet"
    Dataset.from_dict({"input_ids": [[3, 4]] * 4, "label": [0, 1, 2, 0], name: [[value] * 2] * 4}).to_parquet(rows)
    made = ["--dataset", rows, "--output", tmp_path / "index", "--proj_dim", "16"]
    assert main([str(argument) for argument in ["featurize", "--model", files.model, *made]]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"hf-trak: error: {told}")
    assert "not expected" not in error


def test_texts_without_a_tokenizer_are_refused_and_the_flag_is_a_way_out(refuse, files, tmp_path_factory, capsys):
    texts = files.folder / "text.csv"
    made = [
        "featurize",
        "--model",
        files.model,
        "--dataset",
        texts,
        "--proj_dim",
        "16",
        "--text_columns",
        "text",
        "--max_length",
        "8",
    ]
    assert "holds no tokenizer" in refuse(*made, "--output", "index")
    folder = tmp_path_factory.mktemp("processed")
    word_tokenizer().save_pretrained(folder / "tokenizer")
    asked = ["--queries", texts, "--output", folder / "hits.jsonl"]
    assert main([str(a) for a in [*made, "--output", folder / "index", "--processor", folder / "tokenizer"]]) == 0
    assert main([str(a) for a in ["attribute", "--index", folder / "index", *asked]]) == 0
    shutil.move(folder / "tokenizer", folder / "moved")
    assert "tokenizer" in refuse("attribute", "--index", folder / "index", *asked, "--overwrite")
    asked += ["--processor", folder / "moved", "--overwrite"]
    assert main([str(a) for a in ["attribute", "--index", folder / "index", *asked]]) == 0


# Flags

FLAGS = [
    ("--proj_dim", "0", 1),
    ("--proj_dim", "-1", 1),
    ("--proj_dim", "1e3", 2),
    ("--proj_dim", "999999999", 1),
    ("--batch_size", "0", 1),
    ("--batch_size", "many", 1),
    ("--shard_rows", "0", 1),
    ("--max_rows", "0", 1),
    ("--max_length", "0", 1),
    ("--damping", "x", 1),
    ("--damping", "nan", 1),
    ("--fold", "0", 1),
    ("--projector", "nope", 1),
    ("--compute_dtype", "float8", 1),
    ("--label_column", "zzz", 1),
    ("--text_columns", "zzz", 1),
    ("--split", "train[x]", 1),
    ("--revision", "main", 1),
    ("--dataset_config", "zzz", 1),
    ("--dataset_revision", "zzz", 1),
    ("--processor", "./nowhere", 1),
    ("--processor", "me/none", 1),
    ("--shard-index", "0", 1),
    ("--sketch_seeds_per_checkpoint", "0", 1),
    ("--dropout_seeds", "-1", 1),
    ("--overwrite", "maybe", 2),
    ("--nope", "1", 2),
    ("--config", "gone.yaml", 1),
]


@pytest.mark.parametrize(("flag", "value", "status"), FLAGS)
def test_a_flag_out_of_range_is_refused_before_work(refuse, files, flag, value, status):
    made = ["featurize", "--model", files.model, "--dataset", files.rows, "--output", "index", "--proj_dim", "16"]
    assert "not expected" not in refuse(*made, flag, value, status=status)


@pytest.mark.parametrize(
    ("flag", "value", "status"),
    [
        ("--top_k", "0", 1),
        ("--top_k", "x", 2),
        ("--direction", "up", 1),
        ("--damping", "-1", 1),
        ("--max_memory", "lots", 1),
        ("--max_queries", "0", 1),
        ("--batch_size", "0", 1),
        ("--batch_size", "no", 1),
        ("--revision", "main", 1),
        ("--queries_config", "zzz", 1),
        ("--output", "hits.txt", 1),
        ("--output", "s3://bucket/hits.jsonl", 1),
        ("--report", "https://host/report", 1),
        ("--processor", "./nowhere", 1),
        ("--train", "gone.csv", 1),
    ],
)
def test_a_flag_of_attribute_out_of_range_is_refused_before_work(refuse, files, flag, value, status):
    error = refuse(*commands_on_index(files.index, files)["attribute"], flag, value, status=status)
    assert "not expected" not in error


@pytest.mark.parametrize("command", ["attribute", "label-errors"])
def test_what_is_read_is_never_replaced_by_results(refuse, files, tmp_path, tmp_path_factory, command):
    index = tmp_path_factory.mktemp("index") / "index"
    shutil.copytree(files.index, index)
    rows, shard = shutil.copy(files.rows, index.parent), next(index.glob("member_0/*.parquet"))
    before = {path: path.read_bytes() for path in index.parent.rglob("*") if path.is_file()}
    asked = ["--queries", files.rows] if command == "attribute" else []
    for output, told in ((rows, "is --train or a file in it"), (shard, "is a file of the index")):
        assert told in refuse(command, index, *asked, "--train", rows, "--output", output, "--overwrite")
    assert before == {path: path.read_bytes() for path in index.parent.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--epochs", "0"],
        ["demo", "--output", "s3://bucket/demo"],
        ["label-errors", "x", "--output", "s3://bucket/rows.jsonl"],
        ["demo", "--epochs", "-1"],
        ["demo", "--seed", "-1"],
        ["demo", "--learning_rate", "0"],
        ["demo", "--flip_fraction", "3"],
        ["demo", "--model", "x"],
        ["demo", "--processor", "x"],
        ["evaluate", "lds", "--ground_truth", "x"],
        ["evaluate", "lds", "--ground_truth", "gone.parquet", "--scores", "x.npy"],
        ["evaluate", "lds", "--ground_truth", "x", "--scores", "x", "--confidence", "2"],
        ["evaluate", "lds", "--ground_truth", "x", "--scores", "x", "--batch_size", "0"],
        ["evaluate", "lds", "--ground_truth", "x", "--scores", "x", "--processor", "y"],
        ["card", "x", "--results", "gone.json"],
        ["card", "x", "--output", "rows.parquet"],
        ["push", "x", "me/y"],
    ],
    ids=" ".join,
)
def test_other_commands_refuse_in_one_line(refuse, arguments):
    assert "not expected" not in refuse(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["featurise"],
        ["--nope"],
        ["evaluate"],
        ["evaluate", "nope"],
        ["evaluate", "ftrace", "--scale", "nope"],
        *([command] for command in COMMANDS if command not in ("demo", "evaluate")),
        *([command, "--nope"] for command in COMMANDS),
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line_that_names_the_help(refuse, arguments):
    assert "--help`" in refuse(*arguments, status=2)


BOMB = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 8)}]\n" for i in range(9)
)

MERGED = re.sub(r"\[(\*.*)\]", r"{<<: [\1]}", BOMB.replace("[x,x,x,x,x,x,x,x]", "{x: y}"))


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        f"a: {DEEP}".encode(),
        b"- a",
        b"",
        b"!!python/object/apply:os.system ['touch pwned']",
        b"proj_dim: {a: 1}",
        b"proj_dim: 2026-13-45",
        b"model: [[a]]",
        BOMB.encode(),
        f"{BOMB}model: *j".encode(),
        b"model: a\noutput: index\nmodel: b",  # of which YAML would take the last
        b"proj_dim: 8\nproj-dim: 16",
        f"{MERGED}model: *j".encode(),
    ],
    ids=range(13),
)
def test_bad_yaml_is_refused_at_once(refuse, tmp_path_factory, content):
    path = tmp_path_factory.mktemp("yaml") / "flags.yaml"
    path.write_bytes(content)
    begin = time.perf_counter()
    assert "flags.yaml" in refuse("featurize", "--config", path)
    assert time.perf_counter() - begin < 30  # written out, the aliases are a billion values
    assert not Path("pwned").exists()


# What a message shows


def test_secrets_never_reach_a_message(refuse, files):
    for command in set(commands_on_index("x", files)) - {"evaluate lds"}:  # which reads the ground truth first
        error = refuse(*commands_on_index("ftp://user:hunter2@host/index?sig=s3cr3t", files)[command])
        assert "hunter2" not in error
        assert "s3cr3t" not in error
        assert "ftp://***@host/index?***" in error
    error = refuse("featurize", "--model", "m", "--dataset", "https://u:hunter2@h/rows.csv?token=s3cr3t", "--output", "o")
    assert "hunter2" not in error
    assert "s3cr3t" not in error
    assert "hunter2" not in refuse("featurize", "--s3://u:hunter2@b/x", status=2)


def test_names_with_control_characters_are_shown(refuse):
    error = refuse("featurize", "--model", "m\x1b[2J", "--dataset", "rows\x1b]0;t\x07.csv", "--output", "o")
    assert r"rows\x1b]0;t\x07.csv" in error


def test_names_with_control_characters_are_shown_where_all_is_well(files, tmp_path, capsys):
    index = tmp_path / "in\x1b[2Jdex"
    shutil.copytree(files.index, index)
    asked = ["--queries", files.rows, "--output", tmp_path / "hits\x1b[2J.jsonl", "--model", files.model]
    for arguments in (["verify", index], ["attribute", index, *asked]):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        printed = capsys.readouterr().out
        assert r"\x1b[2J" in printed
        assert all(line.isprintable() for line in printed.splitlines())


def test_data_with_control_characters_is_shown_and_not_obeyed(files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model = tmp_path / "bert"
    shutil.copytree(files.model, model)
    word_tokenizer().save_pretrained(model)
    text = "a\x1b[2J\x1b]0;owned\x07 b\u202e c\n<script>alert(1)</script>"
    Dataset.from_dict({"text": [text, "d e", "f g"], "label": [0, 1, 2]}).to_parquet(tmp_path / "rows.parquet")
    rows, index = str(tmp_path / "rows.parquet"), str(tmp_path / "index")
    made = ["--dataset", rows, "--output", index, "--proj_dim", "16", "--text_columns", "text", "--max_length", "8"]
    assert main(["featurize", "--model", str(model), *made]) == 0
    capsys.readouterr()
    asked = ["--queries", rows, "--train", rows, "--output", str(tmp_path / "hits.jsonl"), "--report", str(tmp_path / "report")]
    assert main(["attribute", "--index", index, *asked]) == 0
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.splitlines())
    assert r"a\x1b[2J\x1b]0;owned\x07 b\u202e c\n<script>" in printed
    page = (tmp_path / "report" / "report.html").read_text()
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "<script>alert" not in page


def test_an_error_that_nobody_foresaw_is_one_line_and_debug_shows_it(refuse, monkeypatch):
    def fail(arguments: list[str]) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("hf_trak.cli.featurize.main", fail)
    assert refuse("featurize").startswith(
        "hf-trak: error: ZeroDivisionError: division; by zero. This is not expected; run again with --debug"
    )
    with pytest.raises(ZeroDivisionError):
        main(["featurize", "--debug"])
    with pytest.raises(ZeroDivisionError):
        main(["--debug", "featurize"])


def test_exit_statuses_are_documented(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert "Exit status: 0 done; 1 refused or failed" in shown
    assert "--debug" in shown


# Without a network


class DeadEnd(socketserver.ThreadingTCPServer):
    """A place where every connection ends at once. Counts them."""

    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.count = 0

    def process_request(self, request: Any, client_address: Any) -> None:
        self.count += 1
        self.shutdown_request(request)


@pytest.fixture
def dead_end():
    with DeadEnd() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class NoHub(BaseHTTPRequestHandler):
    """What a network's login page and a proxy that forbids answer, whatever is asked."""

    def do_GET(self) -> None:
        page = b"<html>Please log in</html>"
        self.send_response(403 if self.path.startswith("/forbidden") else 200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(("place", "told"), [("", "not JSON, perhaps"), ("/forbidden", "token")])
def test_an_answer_that_is_not_the_hubs_is_told(files, tmp_path, monkeypatch, place, told):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), NoHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}{place}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        with pytest.raises(FileNotFoundError, match=f"'me/none' is neither .*{told}"):
            HubIndex.open("me/none", endpoint=endpoint, cache_dir=tmp_path)
        with pytest.raises(OSError, match=told):
            AttributionIndex(files.index).push_to_hub("me/none", license="mit")
        server.shutdown()


CHILD = """
import contextlib, io, json, sys
from hf_trak.cli.main import main
for line in sys.stdin:
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        status = main(json.loads(line))
    print(json.dumps([status, error.getvalue()]), flush=True)
"""


def test_without_a_network_every_command_says_so_at_once(files, tmp_path, dead_end):
    """In a process of their own, for which the Hub is where every connection ends."""
    commands = [
        ["featurize", "--model", "me/none", "--dataset", files.rows, "--output", tmp_path / "index"],
        ["featurize", "--model", files.model, "--dataset", "me/none", "--output", tmp_path / "index"],
        ["attribute", "--index", "me/none", "--queries", files.rows, "--output", tmp_path / "hits.jsonl"],
        ["push", files.index, "me/none", "--license", "mit"],
        ["card", "me/none"],
        ["evaluate", "lds", "--ground_truth", "me/none", "--scores", "x.npy"],
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{dead_end.server_address[1]}", "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_SeCrEtSeCrEtSeCrEt"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CHILD], env=environment, **pipes) as child:
        for command in commands:
            dead_end.count = 0
            child.stdin.write(f"{json.dumps(list(map(str, command)))}\n")
            child.stdin.flush()
            status, error = json.loads(child.stdout.readline())
            assert status == 1, command
            assert error.startswith("hf-trak: error: "), error
            assert error.count("\n") == 1, error
            assert "cannot be reached" in error
            assert "SeCrEt" not in error
            # Retries of each file would take minutes. Time itself is not measured: it depends on what else the machine does.
            assert 1 <= dead_end.count <= 3, command
        child.stdin.close()
