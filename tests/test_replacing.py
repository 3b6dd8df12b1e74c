"""What replaces files: nothing that no index wrote is touched, and a kill at any moment leaves the old index or the new one."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from datasets_for_tests import save_model, token_rows
from stored_for_tests import draw, store_index

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.cli.main import main
from hf_trak.hub.copies import is_in_hub_cache
from hf_trak.storage.files import write_json
from hf_trak.storage.object_store import ObjectPath
from hf_trak.storage.replacing import STAGING, commit_replacement, finish_replacement, refuse_overlap
from hf_trak.storage.snapshots import remove_snapshot, remove_trained, write_snapshot
from hf_trak.storage.writer import MemberWriter

THESIS = [
    "thesis.tex",
    ".hidden",
    "chapters/one.txt",
    ".git/config",
    "train.parquet",
    "model.safetensors",
    ".notes.tmp",
    "member_x/a",
]


def plant(folder):
    """Put a user's files into a folder, and into each folder of an index below it; return all with their content."""
    placed = {}
    for place in [folder, *(path for path in Path(folder).rglob("*") if path.is_dir())]:
        for name in THESIS:
            path = place / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(f"years of work: {path}".encode())
                placed[path] = path.read_bytes()
    return placed


def untouched(placed):
    return {path: path.read_bytes() if path.exists() else None for path in placed} == placed


def names_in(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """An index of two members, and one of three that differs from it in everything."""
    folder = tmp_path_factory.mktemp("stored")
    new = store_index(folder / "new", [draw(10, 6, seed=seed) for seed in range(2)], shard_rows=4)
    old = store_index(folder / "old", [draw(20, 5, seed=seed) for seed in range(3)], shard_rows=3)
    return old, new


def rows_of(folder):
    index = AttributionIndex.from_pretrained(folder)
    for member in index.members:
        member.verify()
    return [np.concatenate([shard.features.numpy() for shard in member.shards()]) for member in index.members]


def is_index(folder, index):
    found, expected = rows_of(folder), rows_of(index.folder)
    return len(found) == len(expected) and all(
        a.shape == b.shape and (a == b).all() for a, b in zip(found, expected, strict=True)
    )


# save_pretrained


def test_a_copy_replaces_an_index_and_leaves_a_thesis_in_and_around_it(stored, tmp_path):
    old, new = stored
    old.save_pretrained(tmp_path / "index")
    with pytest.raises(ValueError, match="is not empty"):
        new.save_pretrained(tmp_path / "index")
    placed = plant(tmp_path)
    new.save_pretrained(tmp_path / "index", overwrite=True)
    assert untouched(placed)
    assert is_index(tmp_path / "index", new)
    ours = {str(Path("index") / name) for name in names_in(new.folder) | {"README.md"}}
    assert names_in(tmp_path) == ours | {str(path.relative_to(tmp_path)) for path in placed}, "no file of the old index is left"


@pytest.mark.parametrize("link", ["member_1", ".replacement"])
def test_a_folder_that_is_a_link_to_another_index_is_not_replaced_through(stored, tmp_path, link):
    old, new = stored
    for name in ("mine", "precious"):
        old.save_pretrained(tmp_path / name)
    target = tmp_path / "precious" / "member_1" if link == "member_1" else tmp_path / "precious"
    if link == "member_1":
        shutil.rmtree(tmp_path / "mine" / link)
    (tmp_path / "mine" / link).symlink_to(target)
    before = {path: path.read_bytes() for path in (tmp_path / "precious").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"{link} is a symbolic link to .*Nothing was changed"):
        new.save_pretrained(tmp_path / "mine", overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "precious").rglob("*") if path.is_file()} == before
    AttributionIndex.from_pretrained(tmp_path / "mine")
    assert {path: path.read_bytes() for path in (tmp_path / "precious").rglob("*") if path.is_file()} == before


def test_a_folder_with_no_index_is_refused_even_with_overwrite(stored, tmp_path):
    placed = plant(tmp_path)
    with pytest.raises(ValueError, match="holds .*and no index.* Nothing was changed"):
        stored[1].save_pretrained(tmp_path, overwrite=True)
    (tmp_path / "trak_config.json").write_text('{"mine": true}')
    with pytest.raises(ValueError, match="and no index"):
        stored[1].save_pretrained(tmp_path, overwrite=True)
    assert untouched(placed)
    assert names_in(tmp_path) == {str(path.relative_to(tmp_path)) for path in placed} | {"trak_config.json"}


def test_a_file_of_a_users_under_a_name_that_the_index_needs_is_refused(stored, tmp_path):
    old, new = stored
    old.save_pretrained(tmp_path / "index")
    mine = tmp_path / "index" / "member_0" / "train-00000-of-00003.parquet"
    mine.write_bytes(b"my own rows")
    with pytest.raises(ValueError, match="train-00000-of-00003.parquet was not written by an index"):
        new.save_pretrained(tmp_path / "index", overwrite=True)
    assert mine.read_bytes() == b"my own rows"
    mine.unlink()
    assert is_index(tmp_path / "index", old)


def test_what_the_owner_wrote_into_the_card_stays(stored, tmp_path):
    old, new = stored
    old.save_pretrained(tmp_path / "index")
    card = tmp_path / "index" / "README.md"
    card.write_text(card.read_text() + "\n## My notes\n\nyears of work\n")
    new.save_pretrained(tmp_path / "index", overwrite=True)
    assert "years of work" in card.read_text()


@pytest.mark.parametrize("where", ["same", "above", "below", "link", "link to above", "dots", "member"])
def test_a_target_above_below_or_equal_to_the_index_is_refused(stored, tmp_path, where):
    stored[0].save_pretrained(tmp_path / "par" / "index")
    index = AttributionIndex.from_pretrained(tmp_path / "par" / "index")
    placed = plant(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "par")
    target = {
        "same": tmp_path / "par" / "index",
        "above": tmp_path / "par",
        "below": tmp_path / "par" / "index" / "copy" / "deep",
        "link": tmp_path / "link" / "index",
        "link to above": tmp_path / "link",
        "dots": tmp_path / "par" / "index" / "member_0" / "..",
        "member": tmp_path / "par" / "index" / "member_0",
    }[where]
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="that is to be copied.*nothing was changed"):
            index.save_pretrained(target, overwrite=overwrite)
    assert untouched(placed)
    assert is_index(index.folder, stored[0])


@pytest.mark.parametrize(
    ("source", "target", "refused"),
    [
        ("s3://bucket/a", "s3://bucket/a", True),
        ("s3://Bucket/a", "s3a://bucket//A/", True),
        ("s3://bucket/a", "s3://bucket", True),
        ("s3://bucket/a", "s3://bucket/a/./b", True),
        ("s3://bucket/a", "s3://bucket/ab", False),
        ("s3://bucket/a", "gs://bucket/a", False),
        ("s3://bucket/a", "s3://other/a", False),
    ],
)
def test_urls_that_are_one_place_are_refused(source, target, refused):
    if not refused:
        refuse_overlap(ObjectPath(source), ObjectPath(target))
        return
    with pytest.raises(ValueError, match="that is to be copied"):
        refuse_overlap(ObjectPath(source), ObjectPath(target))


def test_a_list_of_files_that_no_index_writes_removes_nothing(stored, tmp_path):
    stored[0].save_pretrained(tmp_path / "index")
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "index" / STAGING).mkdir(exist_ok=True)
    for names in (["../thesis.tex"], [str(tmp_path / "thesis.tex")], ["member_0/../../thesis.tex"], ["README.md"], 7):
        write_json(tmp_path / "index" / STAGING / "replaces.json", {"removes": names})
        with pytest.raises(ValueError, match="lists files that no index writes, and none was removed"):
            finish_replacement(tmp_path / "index")
    assert (tmp_path / "thesis.tex").exists()


# kill -9


def killed_at(step, run):
    """Run in a process of its own that is killed with SIGKILL just before its `step`-th change of a name; return whether it was."""
    child = os.fork()
    if child == 0:
        count = [0]

        def counted(change):
            def changing(*args, **options):
                if count[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1
                return change(*args, **options)

            return changing

        for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "link"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            run()
            os._exit(0)
        except BaseException as error:  # the parent has to hear of it
            print(repr(error), flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_copy_killed_at_any_moment_leaves_the_old_index_or_the_new_one(stored, tmp_path):
    old, new = stored
    target, seen = tmp_path / "index", set()
    old.save_pretrained(target)
    placed = plant(target)
    assert not (target / STAGING).exists()
    step = 0
    while killed_at(step, lambda: new.save_pretrained(target, overwrite=True)):
        shown = tmp_path / "shown"
        shutil.copytree(target, shown)
        seen.add(is_index(shown, new))
        assert is_index(shown, new) or is_index(shown, old)
        shutil.rmtree(shown)
        new.save_pretrained(target, overwrite=True)
        assert is_index(target, new)
        assert not [name for name in names_in(target) if STAGING in name or (name.endswith(".tmp") and ".notes" not in name)]
        assert not (target / STAGING).exists()
        assert untouched(placed)
        old.save_pretrained(target, overwrite=True)
        step += 5
    assert step > 50
    assert seen == {True, False}, "kills before and after the exchange were tried"


@pytest.mark.slow
def test_a_fresh_copy_killed_at_any_moment_is_made_by_the_next_call(stored, tmp_path):
    new, step = stored[1], 0
    target = tmp_path / "index"
    while killed_at(step, lambda: new.save_pretrained(target)):
        if not {"trak_config.json", ".replacement/replaces.json"} & names_in(target):
            new.save_pretrained(target)  # it was not whole
        assert is_index(target, new)
        assert not [name for name in names_in(target) if name.startswith(STAGING)]
        new.save_pretrained(target, overwrite=True)
        assert not (target / STAGING).exists()
        shutil.rmtree(target)
        step += 3
    assert step > 6


# build(overwrite=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "bert", seed=0)


def build(folder, model, *, proj_dim=16, overwrite=False):
    return AttributionIndex.build(
        folder,
        models=model,
        dataset=token_rows(10),
        config=TrakConfig(proj_dim=proj_dim),
        shard_rows=4,
        progress=False,
        overwrite=overwrite,
    )


@pytest.mark.slow
def test_a_build_in_the_place_of_another_index_leaves_a_thesis_and_the_old_one_until_the_end(model, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    build(folder, model, proj_dim=8)
    expected = rows_of(build(tmp_path / "fresh", model).folder)
    placed = plant(folder)
    before = {name: (folder / name).read_bytes() for name in names_in(folder)}
    real = MemberWriter.write

    def stop(writer, shard, columns):
        if shard == 2:
            raise KeyboardInterrupt
        real(writer, shard, columns)

    with monkeypatch.context() as patch:
        patch.setattr(MemberWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            build(folder, model, overwrite=True)
    assert {name: (folder / name).read_bytes() for name in before} == before, "the old index is whole"
    assert rows_of(folder)[0].shape == (10, 8)

    written = []
    monkeypatch.setattr(MemberWriter, "write", lambda *args: written.append(args[1]) or real(*args))
    for step in (4, 9):
        assert killed_at(step, lambda: build(folder, model, overwrite=True))
        assert rows_of(folder)[0].shape in ((10, 8), (10, 16))
        assert untouched(placed)
    build(folder, model, overwrite=True)
    assert set(written) <= {2}, "it goes on where it was stopped"
    assert all((a == b).all() for a, b in zip(rows_of(folder), expected, strict=True))
    assert untouched(placed)
    fresh = names_in(tmp_path / "fresh")
    assert names_in(folder) == fresh | {str(path.relative_to(folder)) for path in placed}
    assert (folder / "member_0" / "member.json").read_bytes() == (tmp_path / "fresh" / "member_0" / "member.json").read_bytes()


def test_another_stored_dtype_without_overwrite_leaves_the_index_as_it_was(model, tmp_path):
    build(tmp_path / "index", model)
    before = {name: (tmp_path / "index" / name).read_bytes() for name in names_in(tmp_path / "index")}
    with pytest.raises(ValueError, match="(?s)holds another index.*dtype: 'float32' there, 'float16' here"):
        AttributionIndex.build(
            tmp_path / "index",
            models=model,
            dataset=token_rows(10),
            config=TrakConfig(proj_dim=16, features_dtype="float16"),
            shard_rows=4,
            progress=False,
        )
    assert {name: (tmp_path / "index" / name).read_bytes() for name in before} == before


# Snapshots


def test_a_snapshot_is_replaced_and_removed_but_for_a_thesis(tmp_path):
    folder = tmp_path / "final"
    for content in ("one", "two"):
        write_snapshot(folder, lambda place, content=content: (place.mkdir(), (place / "config.json").write_text(content)))
        if content == "one":
            (folder / "deep").mkdir()
            (folder / "deep" / "thesis.tex").write_text("years of work")
            (folder / ".hidden").write_text("years of work")
    assert (folder / "config.json").read_text() == "two"
    assert names_in(tmp_path) == {"final/config.json", "final/.snapshot.json", "final/deep/thesis.tex", "final/.hidden"}
    remove_snapshot(folder)
    assert names_in(tmp_path) == {"final/deep/thesis.tex", "final/.hidden"}
    with pytest.raises(ValueError, match="final was not written by hf_trak.*Nothing was changed"):
        write_snapshot(folder, lambda place: (place.mkdir(), (place / "config.json").write_text("three")))


def test_a_snapshot_killed_while_it_is_replaced_comes_back(tmp_path):
    folder, step = tmp_path / "final", 0
    save = lambda place: (place.mkdir(), (place / "config.json").write_text("old"))  # noqa: E731
    write_snapshot(folder, save)
    while killed_at(step, lambda: write_snapshot(folder, save)):
        write_snapshot(folder, save)
        assert names_in(tmp_path) == {"final/config.json", "final/.snapshot.json"}
        step += 1
    assert step > 4


def test_a_list_of_a_snapshot_that_leads_elsewhere_removes_nothing_there(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / ".snapshot.json").write_text(
        json.dumps({"files": ["../thesis.tex", str(tmp_path / "thesis.tex"), 7]})
    )
    remove_snapshot(tmp_path / "final")
    assert names_in(tmp_path) == {"thesis.tex"}


def test_the_work_of_a_trainer_is_removed_but_for_a_thesis(tmp_path):
    work = tmp_path / "_runs"
    for name in ("run-0001/run.json", "run-0001/checkpoint-10/model.safetensors", "run-0001/checkpoint-10/optimizer.pt"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("")
    placed = [work / "thesis.tex", work / "run-0001" / ".hidden", work / "mine" / "config.json"]
    for path in placed:
        path.parent.mkdir(exist_ok=True)
        path.write_text("years of work")
    remove_trained(work)
    assert names_in(work) == {str(path.relative_to(work)) for path in placed}


def test_an_exchange_that_was_stopped_is_ended_by_who_opens_the_index(stored, tmp_path, monkeypatch):
    old, new = stored
    old.save_pretrained(tmp_path / "index")
    with monkeypatch.context() as patch:
        patch.setattr("hf_trak.storage.replacing.finish_replacement", lambda folder: None)
        patch.setattr("hf_trak.hub.copies.commit_replacement", commit_replacement)
        new.save_pretrained(tmp_path / "index", overwrite=True)
    assert (tmp_path / "index" / STAGING / "replaces.json").exists()
    assert is_index(tmp_path / "index", new)
    assert not (tmp_path / "index" / STAGING).exists()


# Links


@pytest.mark.parametrize(
    "name", ["README.md", "trak_config.json", "member_0/gram.safetensors", "member_0/member.json", "member_1"]
)
def test_a_link_in_an_index_is_not_sent(stored, tmp_path, name):
    stored[1].save_pretrained(tmp_path / "index")
    path, private = tmp_path / "index" / name, tmp_path / "private"
    shutil.move(path, private)
    path.symlink_to(private)
    index = AttributionIndex.from_pretrained(tmp_path / "index")
    with pytest.raises(ValueError, match=f"{name} is a link to .*private.* Nothing was sent"):
        index.push_to_hub("me/index", license="mit")


def test_a_card_that_is_a_link_is_neither_read_nor_replaced_nor_copied(stored, tmp_path):
    stored[1].save_pretrained(tmp_path / "index")
    card, private = tmp_path / "index" / "README.md", tmp_path / "private.md"
    private.write_text("---\nlicense: mit\n---\nmy private notes")
    card.unlink()
    card.symlink_to(private)
    index = AttributionIndex.from_pretrained(tmp_path / "index")
    index._complete()
    index.save_pretrained(tmp_path / "copy")
    assert "private notes" not in (tmp_path / "copy" / "README.md").read_text()
    assert card.is_symlink()
    with pytest.raises(ValueError, match=r"README.md was not written by an index"):
        stored[0].save_pretrained(tmp_path / "index", overwrite=True)
    assert private.read_text().endswith("my private notes")


def test_links_of_the_hubs_cache_are_files_of_its_repository(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    (snapshot / "member_0").mkdir(parents=True)
    blobs.mkdir()
    for place in (blobs / "1", tmp_path / "private"):
        place.write_text("")
    (snapshot / "member_0" / "gram.safetensors").symlink_to("../../../blobs/1")
    (snapshot / "README.md").symlink_to(tmp_path / "private")
    assert is_in_hub_cache(snapshot / "member_0" / "gram.safetensors")
    assert not is_in_hub_cache(snapshot / "README.md")


# Commands


def test_commands_that_overwrite_leave_a_thesis_in_and_around_what_they_replace(model, tmp_path, capsys):
    token_rows(10).to_parquet(tmp_path / "train.parquet")
    token_rows(3, seed=1).to_parquet(tmp_path / "queries.parquet")
    index, report = tmp_path / "index", tmp_path / "report"
    featurize = ["featurize", "--model", model, "--dataset", tmp_path / "train.parquet", "--output", index]
    attribute = ["attribute", "--index", index, "--queries", tmp_path / "queries.parquet", "--output", tmp_path / "hits.jsonl"]
    commands = [
        ([*featurize, "--proj_dim", 16], index),
        ([*attribute, "--report", report], report),
        (["card", index, "--output", tmp_path / "cards" / "README.md"], tmp_path / "cards"),
    ]
    for command, _ in commands:
        assert main([str(word) for word in [*command[:1], *command[1:]]]) == 0, capsys.readouterr().err
    placed = plant(tmp_path)
    private = tmp_path / "queries.parquet", tmp_path / "train.parquet"
    placed.update({path: path.read_bytes() for path in private})
    for command, _ in commands:
        changed = [8 if word == 16 else word for word in command]
        assert main([str(word) for word in [*changed, "--overwrite"]]) == 0, capsys.readouterr().err
        assert untouched(placed), command[0]
    assert AttributionIndex.from_pretrained(index).config.proj_dim == 8
    for command in (["verify", index], ["card", index]):
        assert main([str(word) for word in command]) == 0
        assert untouched(placed)
    for command, folder in commands[:1]:
        shutil.rmtree(folder)
        (folder / "mine").mkdir(parents=True)
        mine = plant(folder)
        assert main([str(word) for word in [*command, "--overwrite"]]) == 1
        assert "What is there is never replaced" in capsys.readouterr().err
        assert untouched(mine)
