"""Disks that fill up, turn read-only or vanish under a run: real ones, where this user may mount any."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from stored_for_tests import draw, store_index
from test_featurize import PROJ_DIM, CountingFeaturizer, values
from test_store import make_columns

from hf_trak.cli.attribute import most_bytes, write_hits
from hf_trak.featurizing.loop import featurize
from hf_trak.querying.examples import Attribution, Example, Hit
from hf_trak.querying.report import save_report
from hf_trak.scoring.ensemble import ScoreOptions, solve_all
from hf_trak.scoring.scorer import Scorer
from hf_trak.storage.files import remove_leftovers, write_atomically, write_json_once
from hf_trak.storage.format import BANK_NAME
from hf_trak.storage.outputs import output_file
from hf_trak.storage.writer import MemberWriter


def mount(*arguments: str | Path) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user may not mount: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    while subprocess.run(["umount", "-l", str(folder)], capture_output=True).returncode == 0:
        pass


def open_member(folder: Path, *, n_rows: int = 4000) -> MemberWriter:
    return MemberWriter(folder / "m", identity={}, n_rows=n_rows, shard_rows=1000)


def whole_shards(writer: MemberWriter) -> list[int]:
    found = [shard for shard in range(writer.n_shards) if not writer.lacks(shard)]
    assert all(len(writer.read(shard).features) == 1000 for shard in found)
    return found


def write_all(writer: MemberWriter) -> None:
    for shard in writer.missing():
        writer.write(shard, make_columns(1000, seed=shard)[0])


def test_a_full_disk_is_said_and_the_finished_shards_stay_valid(disk):
    mount("-t", "tmpfs", "-o", "size=120k", "tmpfs", disk)
    writer = open_member(disk)
    with pytest.raises(OSError, match="The disk is full: .*0000[12].* was not written. What was finished is kept"):
        write_all(writer)
    kept = whole_shards(writer)
    assert 0 < len(kept) < 4
    assert not list(disk.rglob("*.tmp"))
    mount("-o", "remount,size=2m", disk)
    write_all(open_member(disk))
    assert whole_shards(writer) == [0, 1, 2, 3]


def test_a_disk_too_full_for_tensors_is_said_alike(disk):
    mount("-t", "tmpfs", "-o", "size=16k", "tmpfs", disk)
    writer = open_member(disk)
    with pytest.raises(OSError, match="The disk is full: .*bank.safetensors"):
        writer.write_tensors(BANK_NAME, {"images": torch.zeros(100_000)})
    assert not (writer.folder / BANK_NAME).exists()
    assert not list(disk.rglob("*.tmp"))


def test_a_disk_that_turns_read_only_is_said_and_the_finished_shards_stay_valid(disk):
    mount("-t", "tmpfs", "tmpfs", disk)
    writer = open_member(disk)
    writer.write(0, make_columns(1000)[0])
    mount("-o", "remount,ro", disk)
    with pytest.raises(OSError, match="train-00001.* may not be written: Read-only file system.*make .* writable"):
        write_all(writer)
    with pytest.raises(OSError, match="may not be written: Read-only file system"):
        MemberWriter(disk / "other", identity={}, n_rows=4, shard_rows=4)
    assert whole_shards(writer) == [0]
    mount("-o", "remount,rw", disk)
    write_all(open_member(disk))
    assert whole_shards(writer) == [0, 1, 2, 3]


def test_a_mount_that_vanishes_ends_the_run_and_its_shards_are_there_when_it_is_back(tmp_path, disk):
    real = tmp_path / "real"
    real.mkdir()
    mount("--bind", real, disk)

    class Unmounting(CountingFeaturizer):
        def compute(self, batch, ids):
            if ids[0] == 20:
                subprocess.run(["umount", "-l", str(disk)], check=True)
            return super().compute(batch, ids)

    def run(featurizer):
        writer = MemberWriter(disk / "m", identity={}, n_rows=50, shard_rows=10)
        featurize(featurizer, values(50), writer, progress=False, batch_size=5)
        return writer

    with pytest.raises(
        OSError, match="is gone or out of reach .No such file or directory.. Was it deleted, or has its mount vanished"
    ):
        run(Unmounting())
    assert (real / "m").exists()
    assert list(disk.iterdir()) == [], "nothing was written in the mount's place"
    mount("--bind", real, disk)
    again = CountingFeaturizer()
    writer = run(again)
    rows = sorted(row for batch in again.batches for row in batch)
    assert rows in (list(range(10, 50)), list(range(20, 50))), "the shard that was being written may have been in time"
    assert torch.cat([writer.read(shard).output for shard in range(5)]).tolist() == list(range(100, 150))
    assert writer.read(0).features.shape == (10, PROJ_DIM)


def test_a_folder_of_somebody_else_is_said(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    folder.chmod(0o555)
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere; a read-only disk is tested above")
    with pytest.raises(PermissionError, match="may not be written: Permission denied.*make .* writable"):
        MemberWriter(folder, identity={}, n_rows=4, shard_rows=4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_device_that_is_always_full_is_a_full_disk(tmp_path, monkeypatch):
    """For users who may not mount: the temporary file's name leads to a device that takes nothing."""
    monkeypatch.setattr("hf_trak.storage.files._host", lambda: "here")
    (tmp_path / f".x.json.here.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="The disk is full: .*x.json was not written"):
        write_atomically(tmp_path / "x.json", lambda temporary: temporary.write_text("x" * 10_000))
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_something_else_is_left_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere") as raised:
        write_atomically(tmp_path / "copy", lambda temporary: temporary.write_bytes((tmp_path / "nowhere").read_bytes()))
    assert "mount" not in str(raised.value)


# Results


@pytest.mark.parametrize("name", ["hits.jsonl", "hits.parquet"])
def test_room_for_hits_is_reserved_before_work_and_they_never_need_more(tmp_path, name):
    generator = np.random.default_rng(0)
    rows, scores = generator.integers(0, 10**6, (50, 7)), generator.normal(size=(50, 7)) * 1e-300
    columns = {"proponents": rows, "proponent_scores": scores, "opponents": rows, "opponent_scores": -scores}
    hits = Dataset.from_dict({"query_id": range(50), "query_output": scores[:, 0], **columns})
    with output_file(tmp_path / name, n_bytes=most_bytes(50, 7, 10**6)) as unfinished:
        assert unfinished.stat().st_blocks * 512 >= most_bytes(50, 7, 10**6) - 4096
        assert not (tmp_path / name).exists()
        write_hits(hits, unfinished, is_parquet=name.endswith("parquet"))
        assert unfinished.stat().st_size <= most_bytes(50, 7, 10**6)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    kind = "parquet" if name.endswith("parquet") else "json"
    found = load_dataset(kind, data_files=str(tmp_path / name), split="train")
    assert found["proponent_scores"][:] == hits["proponent_scores"][:]


def test_a_disk_too_full_for_scores_is_said_before_work_and_names_the_file(tmp_path, disk):
    index = store_index(tmp_path / "index", [draw(1000, 4)], shard_rows=500)
    queries = torch.randn(300, 4)
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", disk)
    (disk / "thesis.tex").write_text("years of work")
    (disk / ".scores.npy.elsewhere.7.tmp").write_text("of a process that was killed")
    options = ScoreOptions(1.0, False, False, False, 0.5)
    scorer = Scorer(index.members, options, 300, progress=False)
    with pytest.raises(OSError, match=r"The disk is full: .*scores.npy needs up to 1,204,096 bytes, and .* are free"):
        scorer.matrix(lambda: pytest.fail("it computed"), disk / "scores.npy")
    assert [path.name for path in disk.iterdir()] == ["thesis.tex"]
    mount("-o", "remount,size=4m", disk)

    def solve():
        return solve_all(index.members, [queries], options)

    np.testing.assert_array_equal(scorer.matrix(solve, disk / "scores.npy"), scorer.matrix(solve))
    before = (disk / "scores.npy").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        scorer.matrix(lambda: (_ for _ in ()).throw(KeyboardInterrupt), disk / "other.npy")
    assert sorted(path.name for path in disk.iterdir()) == ["scores.npy", "thesis.tex"]
    assert (disk / "scores.npy").read_bytes() == before


def test_a_report_is_whole_or_not_there(tmp_path, disk):
    pytest.importorskip("matplotlib")
    mount("-t", "tmpfs", "-o", "size=16k", "tmpfs", disk)
    shown = Attribution(Example(0, text="text " * 3000), 1.0, [Hit(Example(1, text="text"), 1.0)], [])
    with pytest.raises(OSError, match=r"The disk is full: .*report\.(png|html) was not written"):
        save_report([shown], disk / "report", title="Attributions")
    assert list((disk / "report").iterdir()) == []


def test_a_result_that_is_a_folder_or_in_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "hits.jsonl").mkdir()
    for path, told in ((tmp_path / "hits.jsonl", "is a folder"), (tmp_path / "file" / "hits.jsonl", "file")):
        with pytest.raises((ValueError, OSError), match=told), output_file(path, n_bytes=10):
            pytest.fail("it went on")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "hits.jsonl"]


# Names that several processes write at once


def test_of_two_that_write_a_file_once_the_first_is_believed(tmp_path):
    assert write_json_once(tmp_path / "a.json", {"n": 1})
    assert not write_json_once(tmp_path / "a.json", {"n": 2})
    assert (tmp_path / "a.json").read_text() == '{\n  "n": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("hf_trak.storage.files.os.link", no_links)
    assert write_json_once(tmp_path / "a.json", {"n": 1})
    assert not write_json_once(tmp_path / "a.json", {"n": 2})
    assert (tmp_path / "a.json").read_text() == '{\n  "n": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_temporary_files_of_running_processes_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_trak.storage.files._host", lambda: "here")
    running, gone = os.getppid(), subprocess.Popen(["true"])
    gone.wait()
    names = {
        "running": f".a.parquet.here.{running}.tmp",
        "gone": f".a.parquet.here.{gone.pid}.tmp",
        "own": f".a.parquet.here.{os.getpid()}.tmp",
        "elsewhere": f".a.parquet.there.{gone.pid}.tmp",
        "somebody's": ".notes.here.1.tmp",
        "without a process": ".a.parquet.tmp",
    }
    for name in names.values():
        (tmp_path / name).write_text("half")

    def left():
        return {key for key, name in names.items() if (tmp_path / name).exists()}

    always = {"running", "somebody's", "without a process"}
    remove_leftovers(tmp_path, lambda name: name == "a.parquet", shared=True)
    assert left() == {*always, "elsewhere"}
    remove_leftovers(tmp_path, lambda name: name == "a.parquet", shared=False)
    assert left() == always
