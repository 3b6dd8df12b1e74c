"""An index is used only if every file is what was written; `hf-trak verify` says what is not, and a rebuild makes that again alone."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets_for_tests import save_model, token_rows
from stored_for_tests import draw, store_index

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.cli.main import main
from hf_trak.hashing import hash_file
from hf_trak.scoring.damping import DampingChoice
from hf_trak.storage import verify as verified
from hf_trak.storage.files import read_json
from hf_trak.storage.format import read_origin
from hf_trak.storage.writer import MemberWriter

N_ROWS, PROJ_DIM, SHARD_ROWS = 22, 6, 4


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    members = [draw(N_ROWS, PROJ_DIM, seed=seed) for seed in range(2)]
    index = store_index(folder / "index", members, shard_rows=SHARD_ROWS)
    store_index(folder / "other", [draw(N_ROWS, PROJ_DIM, seed=seed + 5) for seed in range(2)], shard_rows=SHARD_ROWS)
    return index


@pytest.fixture
def folder(stored, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(stored.folder, tmp_path / "index")
    return tmp_path / "index"


def features_of(folder):
    index = AttributionIndex.from_pretrained(folder)
    return [np.concatenate([shard.features.numpy() for shard in member.shards()]) for member in index.members]


def shard(number, member=0):
    return f"member_{member}/train-{number:05d}-of-00006.parquet"


def swap(one, two):
    content = one.read_bytes(), two.read_bytes()
    one.write_bytes(content[1])
    two.write_bytes(content[0])


def record_again(folder, name):
    """Make `member.json` say that a file is what was written, as somebody would who wants it to be taken."""
    path = folder / name
    info_path = path.parent / "member.json"
    info = json.loads(info_path.read_text())
    for entry in info["files"]:
        if entry["file"] == path.name:
            entry.update(bytes=path.stat().st_size, sha256=hash_file(path))
    info_path.write_text(json.dumps(info))


def with_ids(path, ids):
    """Give rows other places, and leave the file's metadata as they are."""
    table = pq.read_table(path)
    table = table.set_column(0, "example_id", pa.array(ids, pa.int64())).replace_schema_metadata(table.schema.metadata)
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)


# What a shard says of itself


def test_a_shard_names_its_member_its_number_and_its_index(stored):
    found = read_origin(pq.read_schema(stored.folder / shard(2, member=1)).metadata)
    assert found == stored.members[1].origin(2)
    assert found.identity_sha256 != stored.members[0].origin(2).identity_sha256
    assert (found.member, found.shard, found.n_shards, found.first_row) == (1, 2, 6, 8)


def test_two_shards_swapped_are_refused_by_name_and_number(folder):
    swap(folder / shard(1), folder / shard(3))
    with pytest.raises(ValueError, match=r"train-00001-of-00006.parquet is shard 3 of 6, where shard 1 of 6 of member_0"):
        features_of(folder)
    for name in (shard(1), shard(3)):
        record_again(folder, name)
    with pytest.raises(ValueError, match=r"train-00001-of-00006.parquet is shard 3 of 6, where shard 1 of 6 of member_0"):
        features_of(folder)


@pytest.mark.parametrize(
    ("source", "told"),
    [(("index", shard(1, 1)), "of another member or another index, whose number is 1"), (("other", shard(1)), "another index")],
)
def test_a_shard_of_another_member_or_index_is_refused(stored, folder, source, told):
    shutil.copyfile(stored.folder.parent / source[0] / source[1], folder / shard(1))
    for again in (False, True):
        if again:
            record_again(folder, shard(1))
        with pytest.raises(ValueError, match=f"train-00001-of-00006.parquet is shard 1 .*{told}"):
            features_of(folder)


def test_a_stale_row_is_refused_with_its_place(folder):
    with_ids(folder / shard(2), [8, 9, 9, 11])
    record_again(folder, shard(2))
    for read in (features_of, lambda folder: AttributionIndex.from_pretrained(folder).self_influence()):
        with pytest.raises(
            ValueError, match=r"train-00002-of-00006.parquet is damaged: its example_id is 9 where row 10 belongs"
        ):
            read(folder)


@pytest.mark.parametrize("name", ["gram.safetensors"])
def test_a_gram_of_another_index_is_refused_when_the_index_is_opened(stored, folder, name):
    shutil.copyfile(stored.folder.parent / "other" / "member_0" / name, folder / "member_0" / name)
    with pytest.raises(ValueError, match=f"{name} has changed since it was written: its SHA-256 differs.*run the command"):
        AttributionIndex.from_pretrained(folder)


def test_members_that_changed_places_are_refused(folder):
    (folder / "member_0").rename(folder / "x")
    (folder / "member_1").rename(folder / "member_0")
    (folder / "x").rename(folder / "member_1")
    with pytest.raises(ValueError, match="is of another member|another member or another index|is of member_"):
        features_of(folder)


def test_a_member_that_is_gone_from_the_middle_is_refused(stored, folder):
    shutil.copytree(folder / "member_1", folder / "member_2")
    shutil.rmtree(folder / "member_1")
    with pytest.raises(ValueError, match="holds member_2 but not all members below it"):
        AttributionIndex.from_pretrained(folder)


NESTED = "[" * 100_000


@pytest.mark.parametrize(
    "content", ["null", NESTED, '{"a":' * 100_000, "[1, 2]", "7", '"x"', '{"identity": 3}', "{}", "\xff", ""]
)
@pytest.mark.parametrize("name", ["member_0/member.json", "trak_config.json", "damping.json"])
def test_json_of_another_kind_is_refused_in_one_line_by_name(folder, name, content, capsys):
    (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{Path(name).name}"):
        AttributionIndex.from_pretrained(folder).damping_choice()
    if name != "damping.json":
        assert main(["card", str(folder)]) == 1
        error = capsys.readouterr().err
        assert Path(name).name in error
        assert error.count("\n") == 1
        assert len(error) < 1000


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"identity": None}, "'identity' holds null"),
        ({"files": {}}, "'files' holds an object"),
        ({"files": []}, "its files have 0 rows, where 'n_rows' is 22"),
        ({"files": [3]}, "entry 0 of 'files' is no object"),
        ({"files": [{"file": "../x", "bytes": 1, "sha256": "0" * 64}]}, "is not in its folder"),
        ({"files": [{"file": "x", "bytes": "1", "sha256": "0" * 64}]}, "'bytes' holds a string"),
        ({"files": [{"file": "x", "bytes": 1, "sha256": "0"}]}, "SHA-256 of 'x' is none"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(folder, change, told):
    path = folder / "member_0" / "member.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"member.json .*{told}"):
        AttributionIndex.from_pretrained(folder)


def read_progress(folder):
    writer = MemberWriter.begun(folder)
    writer.missing()
    writer.described()


@pytest.mark.parametrize("name", ["identity.json", "00000.json", "description.json"])
@pytest.mark.parametrize("content", ["null", NESTED])
def test_damaged_progress_is_refused_by_name(tmp_path, name, content):
    writer = MemberWriter(tmp_path / "member_0", identity={}, n_rows=4, shard_rows=4)
    (writer.progress / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is damaged: it (holds null|is nested too deeply)"):
        read_progress(tmp_path / "member_0")


# Hashed once


def test_a_file_is_hashed_once_and_again_when_it_changed(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TRAK_CACHE", str(tmp_path / "cache"))
    hashed = []
    monkeypatch.setattr(verified, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))

    def read():
        verified._known.clear()  # as another process would
        hashed.clear()
        features_of(folder)
        return len(hashed)

    monkeypatch.setattr(verified, "_SETTLED_NS", 0)
    assert read() == 14
    assert read() == 0
    path = folder / shard(1)
    state = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert read() == 1, "a change that kept size and time of modification is seen"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ValueError, match="train-00001"):
        read()
    assert not list(folder.rglob(".*")), "nothing is remembered in the index"


def test_files_that_have_just_been_written_are_hashed_again(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TRAK_CACHE", str(tmp_path / "cache"))
    path = folder / shard(1)
    path.write_bytes(path.read_bytes())
    record = next(entry for entry in read_json(folder / "member_0" / "member.json")["files"] if entry["file"] == path.name)
    assert time.time_ns() - path.stat().st_ctime_ns < 2_000_000_000
    assert verified.is_as_written(path, record)
    assert not (tmp_path / "cache").exists()


def test_a_process_does_not_hash_what_it_has_just_written_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TRAK_CACHE", str(tmp_path / "cache"))
    hashed = []
    monkeypatch.setattr(verified, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    folder = store_index(tmp_path / "again", [draw(N_ROWS, PROJ_DIM)], shard_rows=SHARD_ROWS).folder
    hashed.clear()
    features_of(folder)
    assert hashed == []
    gram = folder / "member_0" / "gram.safetensors"
    gram.write_bytes(gram.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="gram.safetensors has changed"):
        features_of(folder)
    assert hashed == [gram.name]


def test_a_cache_that_cannot_be_written_does_no_harm(folder, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("HF_TRAK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "_SETTLED_NS", 0)
    assert len(features_of(folder)) == 2


# hf-trak verify


def verify(folder, capsys):
    status = main(["verify", str(folder), "--json"])
    found = json.loads(capsys.readouterr().out)["result"]
    return status, {one["file"]: one["state"] for one in found["files"] if one["state"] != "whole"}


def test_a_whole_index_is_said_to_be_whole(folder, capsys):
    assert verify(folder, capsys) == (0, {})
    assert main(["verify", str(folder)]) == 0
    assert "17 files" in capsys.readouterr().out


def test_every_damage_is_listed_with_how_to_mend_it(stored, folder, capsys):
    swap(folder / shard(1), folder / shard(3))
    (folder / shard(4)).unlink()
    (folder / shard(0, 1)).write_bytes((folder / shard(0, 1)).read_bytes()[:-3])
    shutil.copyfile(stored.folder.parent / "other" / "member_1" / "gram.safetensors", folder / "member_1" / "gram.safetensors")
    with_ids(folder / shard(2), [8, 9, 9, 11])
    record_again(folder, shard(2))
    (folder / "member_0" / ".gram.safetensors.elsewhere.7.tmp").write_bytes(b"half")
    (folder / "thesis.tex").write_text("years of work")
    status, found = verify(folder, capsys)
    assert status == 1
    assert found == {
        shard(1): "damaged",
        shard(2): "damaged",
        shard(3): "damaged",
        shard(4): "missing",
        shard(0, 1): "damaged",
        "member_1/gram.safetensors": "damaged",
        "member_0/.gram.safetensors.elsewhere.7.tmp": "left",
    }
    assert main(["verify", str(folder)]) == 1
    printed = capsys.readouterr()
    assert "is shard 3 of 6, where shard 1 of 6" in printed.out
    assert "its example_id is 9 where row 10 belongs" in printed.out
    assert "only files that are missing or damaged are made again" in printed.out
    assert "6 of 18 files of" in printed.err


@pytest.mark.parametrize("name", ["member_1/member.json", "trak_config.json"])
def test_damaged_descriptions_are_listed(folder, capsys, name):
    (folder / name).write_text("null")
    status, found = verify(folder, capsys)
    assert (status, found[name]) == (1, "damaged")


def test_an_edited_configuration_is_blamed_and_not_the_members(folder, capsys):
    config = folder / "trak_config.json"
    values = json.loads(config.read_bytes())
    config.write_text(json.dumps({**values, "proj_dim": 2 * values["proj_dim"]}))
    status, found = verify(folder, capsys)
    assert (status, found) == (1, {"trak_config.json": "damaged"})
    main(["verify", str(folder)])
    printed = capsys.readouterr().out
    assert f"config.proj_dim: {values['proj_dim']} there, {2 * values['proj_dim']} here" in printed
    assert "Set these back" in printed
    assert "delete" not in printed


def test_the_way_out_of_a_damaged_configuration_is_told_once(folder, capsys):
    (folder / "trak_config.json").write_text("{")
    main(["verify", str(folder)])
    assert capsys.readouterr().out.lower().count("restore it") == 1


def test_a_folder_that_is_no_index_is_said_to_be_none(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    assert "not an attribution index" in capsys.readouterr().err


# Made again


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "bert", seed=0)


def build(folder, model):
    return AttributionIndex.build(
        folder, models=model, dataset=token_rows(22), config=TrakConfig(proj_dim=8), shard_rows=4, progress=False
    )


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An index that no test changes."""
    folder = tmp_path_factory.mktemp("whole") / "index"
    build(folder, model)
    return folder


@pytest.fixture
def built(whole, tmp_path):
    """A copy of it that a test may damage, as deep in the tree: the checkpoint's path is that seen from the index."""
    shutil.copytree(whole, tmp_path / "index")
    return tmp_path / "index"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_damaged_files_are_made_again_and_with_the_same_bytes(model, built, monkeypatch, capsys):
    before = contents(built)
    swap(built / shard(1), built / shard(3))
    (built / shard(4)).unlink()
    with_ids(built / shard(0), [0, 1, 1, 3])
    record_again(built, shard(0))
    (built / "member_0" / "gram.safetensors").write_bytes(b"?" * 100)
    (built / "member_0" / "thesis.tex").write_text("years of work")
    (built / ".trak_config.json.elsewhere.7.tmp").write_text("half")
    written = []
    real = MemberWriter.write
    monkeypatch.setattr(MemberWriter, "write", lambda *args: written.append(args[1]) or real(*args))
    build(built, model)
    assert written == [0, 1, 3, 4]
    assert contents(built) == {**before, "member_0/thesis.tex": b"years of work"}
    assert verify(built, capsys) == (0, {})


def test_a_finished_index_on_a_read_only_disk_is_returned_and_nothing_is_written(model, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user may not mount: {done.stderr.strip()}")
    try:
        build(disk / "index", model)
        before = contents(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        index = build(disk / "index", model)
        assert index.self_influence().shape == (22,)
        assert AttributionIndex.from_pretrained(disk / "index").n_rows == 22
        assert main(["verify", str(disk / "index")]) == 0
        assert contents(disk) == before
    finally:
        subprocess.run(["umount", "-l", str(disk)], capture_output=True)


LIST, CONFIG = "member_0/member.json", "trak_config.json"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (LIST, lambda text: text[:300]),
        (LIST, lambda text: b""),
        (LIST, lambda text: text.replace(b'"sha256": "', b'"sha256": "x', 3)),
        (LIST, None),
        (CONFIG, lambda text: text[:-40]),
        (CONFIG, lambda text: text.replace(b'"sketch_seed": 0', b'"sketch_seed": 4')),
        (CONFIG, lambda text: text.replace(b'"damping": "auto"', b'"damping": "outo"')),
        (CONFIG, lambda text: text.replace(b'"label": "label"', b'"label": "other"')),
        (CONFIG, lambda text: text.replace(b'"text-classification"', b'"text-regression"')),
        (CONFIG, None),
        ("damping.json", lambda text: b'{"damping": 1e9, "grid": [1e9], "curve": [1.0]}'),
    ],
)
def test_a_damaged_description_is_mended_by_the_same_command_without_featurizing(model, built, monkeypatch, name, damage):
    expected = contents(built)
    if damage is None:
        (built / name).unlink()
    else:
        (built / name).write_bytes(damage((built / name).read_bytes() if (built / name).exists() else b""))
        with pytest.raises(ValueError, match=Path(name).name if name != CONFIG else CONFIG + "|does not belong"):
            AttributionIndex.from_pretrained(built).damping_choice()
    written = []
    write = MemberWriter.write
    monkeypatch.setattr(
        MemberWriter, "write", lambda self, shard, columns: written.append(shard) or write(self, shard, columns)
    )
    build(built, model)
    assert written == []
    assert contents(built) == expected


def test_a_damaged_shard_is_refused_before_queries_are_featurized(model, built, monkeypatch):
    content = bytearray((built / shard(4)).read_bytes())
    content[len(content) // 2] ^= 1
    (built / shard(4)).write_bytes(content)
    index = AttributionIndex.from_pretrained(built)
    monkeypatch.setattr(index._queries, "featurizer", lambda *args, **options: pytest.fail("queries were featurized"))
    with pytest.raises(ValueError, match="train-00004-of-00006.parquet has changed since it was written"):
        index.attribute(token_rows(2), 1)


def test_what_scores_go_by_may_be_edited_and_verify_prints_it(model, built, capsys):
    expected = AttributionIndex.from_pretrained(built).self_influence(damping=30.0)
    (built / CONFIG).write_bytes((built / CONFIG).read_bytes().replace(b'"damping": "auto"', b'"damping": 30.0'))
    assert (AttributionIndex.from_pretrained(built).self_influence() == expected).all()
    assert main(["verify", str(built)]) == 0
    assert "Scores go by trak_config.json: damping 30.0, combination scaled." in capsys.readouterr().out


def test_of_a_member_without_its_list_damaged_rows_are_made_again(model, built, monkeypatch):
    expected = contents(built)
    (built / LIST).write_bytes(b"{")
    path = built / sorted(name for name in expected if name.endswith(".parquet"))[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    written = []
    write = MemberWriter.write
    monkeypatch.setattr(
        MemberWriter, "write", lambda self, shard, columns: written.append(shard) or write(self, shard, columns)
    )
    build(built, model)
    assert written == [1]
    assert contents(built) == expected


def test_a_damaged_list_of_another_index_is_not_taken_over(model, built):
    (built / LIST).write_bytes(b"{")
    before = contents(built)
    rows = token_rows(22, seed=9)
    with pytest.raises(ValueError, match="member.json is damaged"):
        AttributionIndex.build(
            built, models=model, dataset=rows, config=TrakConfig(proj_dim=8), shard_rows=SHARD_ROWS, progress=False
        )
    assert contents(built) == before


def test_a_changed_choice_of_damping_is_refused(tmp_path):
    choice = DampingChoice(3.0, (1.0, 3.0), (0.1, 0.2), 4, 10, "none")
    choice.save(tmp_path)
    path = tmp_path / "damping.json"
    path.write_text(path.read_text().replace("3.0", "8.0", 1))
    with pytest.raises(
        ValueError, match=r"damping.json is damaged: it has been changed since it was written\. Delete it: .*again\.$"
    ):
        DampingChoice.load(tmp_path, [])
