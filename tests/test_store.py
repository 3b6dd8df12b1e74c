"""The stored format: golden bytes, atomic writes, and refusals of what is damaged or foreign."""

import errno
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hf_trak.messages import list_differences
from hf_trak.storage import files
from hf_trak.storage.columns import encode_columns, read_shard
from hf_trak.storage.files import write_atomically
from hf_trak.storage.reader import MemberReader
from hf_trak.storage.writer import MemberWriter

PROJ_DIM = 8


def make_columns(n_rows, *, dtype="float32", scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(n_rows, PROJ_DIM, generator=generator)
    return encode_columns(features, torch.arange(n_rows).float(), torch.full((n_rows,), 0.5), dtype=dtype), features


def write_member(folder, *, n_rows=10, shard_rows=4, identity=None):
    writer = MemberWriter(folder, identity=identity or {"seed": 0}, n_rows=n_rows, shard_rows=shard_rows)
    for shard in writer.missing():
        writer.write(shard, make_columns(len(writer.rows(shard)), seed=shard)[0])
    writer.finish(torch.eye(PROJ_DIM, dtype=torch.float64), {"coverage": 1.0})
    return writer


def test_a_member_reads_back_what_was_written(tmp_path):
    writer = write_member(tmp_path / "member_0")
    reader = MemberReader(tmp_path / "member_0")
    shards = list(reader.shards())
    assert [len(shard.features) for shard in shards] == [4, 4, 2]
    assert torch.cat([shard.example_id for shard in shards]).tolist() == list(range(10))
    for number, shard in enumerate(shards):
        assert torch.equal(shard.features, make_columns(len(writer.rows(number)), seed=number)[1])
    assert torch.equal(reader.gram(), torch.eye(PROJ_DIM, dtype=torch.float64))
    reader.verify()
    assert not (tmp_path / "member_0" / ".progress").exists()


def test_the_schema_is_the_published_one(tmp_path):
    write_member(tmp_path / "member_0")
    schema = pq.read_schema(tmp_path / "member_0" / "train-00000-of-00003.parquet")
    assert [f"{field.name}: {field.type}" for field in schema] == [
        "example_id: int64",
        f"trak_features: fixed_size_list<element: float>[{PROJ_DIM}]",
        "trak_out_to_loss: float",
        "trak_output: float",
        "trak_grad_norm: float",
    ]


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_member(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6, 1e30])
def test_float16_keeps_rows_of_any_size_to_eleven_bits(tmp_path, scale):
    columns, features = make_columns(6, dtype="float16", scale=scale)
    assert columns["trak_features"].dtype == np.float16
    writer = MemberWriter(tmp_path / "member_0", identity={}, n_rows=6, shard_rows=6)
    writer.write(0, columns)
    read = writer.read(0).features
    assert read.dtype == torch.float32
    assert torch.isfinite(read).all()
    largest = features.abs().amax(1, keepdim=True)
    assert ((read - features).abs() <= largest * 2.0**-11).all()


def test_a_zero_row_survives_float16():
    columns = encode_columns(torch.zeros(1, PROJ_DIM), torch.zeros(1), torch.zeros(1), dtype="float16")
    assert (columns["trak_features"] == 0).all()
    assert np.isfinite(columns["trak_scale"]).all()


def test_opening_again_finds_the_finished_shards(tmp_path):
    writer = MemberWriter(tmp_path / "m", identity={"seed": 0}, n_rows=10, shard_rows=4)
    writer.write(1, make_columns(4)[0])
    assert MemberWriter(tmp_path / "m", identity={"seed": 0}, n_rows=10, shard_rows=4).missing() == [0, 2]


def test_a_shard_that_was_cut_off_is_computed_again(tmp_path):
    writer = MemberWriter(tmp_path / "m", identity={}, n_rows=4, shard_rows=4)
    writer.write(0, make_columns(4)[0])
    writer.path(0).write_bytes(writer.path(0).read_bytes()[:-7])
    assert MemberWriter(tmp_path / "m", identity={}, n_rows=4, shard_rows=4).missing() == [0]


def test_leftovers_of_a_killed_process_are_removed_and_never_mistaken_for_a_shard(tmp_path):
    MemberWriter(tmp_path / "m", identity={}, n_rows=4, shard_rows=4)
    leftover = tmp_path / "m" / ".train-00000-of-00001.parquet.elsewhere.123.tmp"
    leftover.write_bytes(b"half")
    assert MemberWriter(tmp_path / "m", identity={}, n_rows=4, shard_rows=4).missing() == [0]
    assert not leftover.exists()


@pytest.mark.parametrize("finished", [True, False])
def test_another_members_folder_is_refused_with_the_differences_and_left_alone(tmp_path, finished):
    folder = tmp_path / "m"
    if finished:
        write_member(folder, identity={"seed": 0, "config": {"proj_dim": 8}})
    else:
        MemberWriter(folder, identity={"seed": 0, "config": {"proj_dim": 8}}, n_rows=10, shard_rows=4)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"config\.proj_dim: 8 there, 16 here\n.*overwrite"):
        MemberWriter(folder, identity={"seed": 0, "config": {"proj_dim": 16}}, n_rows=10, shard_rows=4)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and holds no features"):
        MemberWriter(tmp_path, identity={}, n_rows=4, shard_rows=4)
    assert (tmp_path / "thesis.tex").exists()


def test_a_member_killed_before_its_identity_was_written_goes_on(tmp_path):
    (tmp_path / "m" / ".progress").mkdir(parents=True)
    (tmp_path / "m" / ".progress" / ".identity.json.elsewhere.1.tmp").write_text("{")
    assert MemberWriter(tmp_path / "m", identity={}, n_rows=10, shard_rows=4).missing() == [0, 1, 2]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_member_killed_just_after_it_was_finished_is_finished(tmp_path):
    write_member(tmp_path / "m")
    (tmp_path / "m" / ".progress").mkdir()
    assert MemberWriter(tmp_path / "m", identity={"seed": 0}, n_rows=10, shard_rows=4).missing() == []
    assert not (tmp_path / "m" / ".progress").exists()


def test_an_empty_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset is empty"):
        MemberWriter(tmp_path / "m", identity={}, n_rows=0, shard_rows=4)
    assert not (tmp_path / "m").exists()


def test_an_unfinished_member_is_not_read(tmp_path):
    MemberWriter(tmp_path / "m", identity={}, n_rows=4, shard_rows=4)
    with pytest.raises(FileNotFoundError, match="unfinished; run the command that began it again"):
        MemberReader(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="not a member"):
        MemberReader(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "delete"])
@pytest.mark.parametrize("name", ["train-00001-of-00003.parquet", "gram.safetensors"])
def test_a_truncated_or_missing_file_is_refused_by_name(tmp_path, damage, name):
    write_member(tmp_path / "m")
    path = tmp_path / "m" / name
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(ValueError, match=name):
        MemberReader(tmp_path / "m")


def test_a_flipped_bit_is_found_on_reading(tmp_path):
    write_member(tmp_path / "m")
    path = tmp_path / "m" / "train-00000-of-00003.parquet"
    content = bytearray(path.read_bytes())
    features = make_columns(4, seed=0)[0]["trak_features"].tobytes()
    content[bytes(content).index(features) + 5] ^= 1
    path.write_bytes(content)
    reader = MemberReader(tmp_path / "m")
    with pytest.raises(ValueError, match="train-00000-of-00003.parquet has changed since it was written"):
        list(reader.shards())
    with pytest.raises(ValueError, match="train-00000-of-00003.parquet has changed"):
        reader.verify()


def test_a_foreign_parquet_file_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"x\.parquet is damaged"):
        read_shard(tmp_path / "x.parquet")


def test_a_damaged_member_json_is_refused_by_name(tmp_path):
    write_member(tmp_path / "m")
    (tmp_path / "m" / "member.json").write_text('{"identity": ')
    with pytest.raises(ValueError, match=r"member\.json is damaged"):
        MemberReader(tmp_path / "m")


def test_a_full_disk_leaves_what_was_there_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_text("old")

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match="The disk is full.*What was finished is kept"):
        write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_differences_are_listed_leaf_by_leaf():
    assert list_differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}) == [
        "a.c: 2 there, 5 here",
        "d: 3 there, None here",
        "e: None there, 4 here",
    ]


def test_records_say_what_was_written(tmp_path):
    writer = write_member(tmp_path / "m")
    files = json.loads((tmp_path / "m" / "member.json").read_text())["files"]
    assert [entry.get("rows") for entry in files] == [4, 4, 2, None]
    assert all(entry["bytes"] == (tmp_path / "m" / entry["file"]).stat().st_size for entry in files)
    assert writer.is_finished
