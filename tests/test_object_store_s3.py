"""Indexes on S3, as real processes see it: s3fs against moto's server on this machine. In memory, test_object_store.py has the laws."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from datasets_for_tests import token_rows
from test_object_store import objects, without_places
from test_processes import build_options, expected, free_port, models, outcome, start, start_jobs  # noqa: F401 (fixtures)

from hf_trak import AttributionIndex
from hf_trak.storage.object_store import ObjectPath

LACKING = [name for name in ("moto", "flask", "flask_cors", "s3fs") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(LACKING), reason=f"{', '.join(LACKING)} not installed: pip install -e '.[object-store-tests]'"
)


@pytest.fixture(scope="module")
def server():
    """The server, with an empty bucket called `bucket`."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT"), timeout=5).close()
            break
        except OSError:
            assert process.poll() is None, "moto's server did not start"
            assert time.monotonic() < until, "moto's server does not answer"
            time.sleep(0.2)
    yield endpoint
    process.kill()
    process.wait()


@pytest.fixture
def store(server, tmp_path, monkeypatch):
    """A place in the bucket that is its own; this process and those it starts speak to the server."""
    variables = {"ENDPOINT_URL": server, "ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}
    for name, value in variables.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("HF_TRAK_CACHE", str(tmp_path / "cache"))
    return f"s3://bucket/{tmp_path.name}/index"


def test_two_jobs_on_one_bucket_killed_and_started_again_merge_to_the_bytes_of_a_folder(store, models, expected):  # noqa: F811
    """Two start at the same moment, and are killed with -9 when each has written a shard; their like go on, and compute no
    finished shard again."""
    given = [str(model) for model in models]
    first, second = start_jobs((store, "0", "2", *given), (store, "1", "2", *given), RANK="1", SLOW_RANK="1")
    for job in (first, second):
        for line in job.stdout:
            if line.startswith("wrote"):
                break
    for job in (first, second):
        job.send_signal(signal.SIGKILL)
        assert outcome(job)[0] == -signal.SIGKILL
    kept = {name for name in objects(store) if name.endswith(".parquet")}
    assert kept
    with pytest.raises(ValueError, match=f"{store} is not complete"):
        AttributionIndex.merge(store)
    results = [outcome(job) for job in start_jobs((store, "0", "2", *given), (store, "1", "2", *given))]
    assert [code for code, *_ in results] == [0, 0], [err for *_, err in results]
    again = {line.split()[1] for _, out, _ in results for line in out.splitlines() if line.startswith("wrote")}
    assert len(kept & again) <= 2, "at most one shard of each job that was put and not yet recorded"
    index = AttributionIndex.merge(store)
    assert without_places(objects(store), models[0].parent) == without_places(expected, models[0].parent)
    assert index.attribute(token_rows(3, seed=1), top_k=2, progress=False).num_rows == 3


def test_one_process_makes_and_loads_an_index_on_s3(store, models, tmp_path):  # noqa: F811
    options = {**build_options(models[:1]), "sketch_seeds_per_checkpoint": 1}
    local = AttributionIndex.build(tmp_path / "index", **options)
    AttributionIndex.build(store, **options)
    queries = token_rows(3, seed=1)
    found = AttributionIndex.from_pretrained(store).score(queries, progress=False)
    assert (found == local.score(queries, progress=False)).all()
    with pytest.raises(ValueError, match="holds other features"):
        AttributionIndex.build(store, **{**options, "dataset": token_rows(50, seed=2)})
    path = ObjectPath(f"{store}/member_0/train-00001-of-00005.parquet")
    content = path.read_bytes()
    path.put(lambda file: file.write_bytes(content[:-1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TRAK_CACHE", str(tmp_path / "fresh"))
        with pytest.raises(ValueError, match=f"{path} is not what was written: it has .* bytes"):
            AttributionIndex.from_pretrained(store).score(queries, progress=False)


def test_of_two_that_put_once_s3_believes_the_first(store, monkeypatch):
    path = ObjectPath(f"{store}/a.json")
    monkeypatch.setattr(ObjectPath, "exists", lambda self: False)  # both have looked before either has put
    assert path.put_once(lambda file: file.write_text("1"))
    assert not path.put_once(lambda file: file.write_text("2"))
    assert path.read_text() == "1"


@pytest.mark.slow
def test_processes_of_a_launcher_share_a_bucket(store, models, expected):  # noqa: F811
    results = [outcome(process) for process in start(2, "build", store, *map(str, models))]
    assert [code for code, *_ in results] == [0, 0], [err for *_, err in results]
    assert without_places(objects(store), models[0].parent) == without_places(expected, models[0].parent)


def test_a_bucket_that_is_not_there_is_named(store, models):  # noqa: F811
    with pytest.raises(
        FileNotFoundError, match="s3://nobucket/index/.* was not written: .*bucket does not exist.*Make the bucket first"
    ):
        AttributionIndex.build("s3://nobucket/index", **build_options(models))
    with pytest.raises(FileNotFoundError, match=r"s3://nobucket/index holds no trak_config\.json"):
        AttributionIndex.from_pretrained("s3://nobucket/index")


ASK = "import sys; from hf_trak.cli.main import main; sys.exit(main(['card', 's3://bucket/index']))"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}, "cannot be reached"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "denies access to"),
    ],
)
def test_missing_credentials_and_a_store_out_of_reach_are_one_line_that_says_what_to_do(store, tmp_path, changed, told):
    variables = {**os.environ, "HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true", **changed}
    environment = {name: value for name, value in variables.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1, done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("hf-trak: "), done.stderr
    assert told in last
    assert "run again" in last
