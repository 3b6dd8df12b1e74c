"""From the Hub: what was pushed is what is loaded, by hf_trak and by plain datasets; what is not needed is not fetched."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from datasets_for_tests import save_model, token_rows
from hub_for_tests import (
    QUERIES,
    build,
    bytes_of,
    delete,
    head,
    large_files_of,
    load_and_score,
    new_config,
    push,
    scores_of,
    upload,
    watch,
    with_token,
)

from hf_trak import AttributionIndex
from hf_trak.querying.report_facts import row_links
from hf_trak.scoring.damping import DampingChoice, hash_members
from hf_trak.training.runs import draw_masks

pytest_plugins = ["hub_fixtures"]

# What runs in the client process


def build_from_card(folder, model, config):
    """Return scores of a point of the path from the base that a model's card names, and where the base is recorded to be."""
    index = build(folder, model, base="auto", config=config)
    return scores_of(index), index.members[0].info["base"]


def load_without_cache(repo, base):
    """Load and score with nothing of a repository in the cache."""
    import shutil

    from huggingface_hub import constants

    from hf_trak.sources import repositories

    shutil.rmtree(Path(constants.HF_HUB_CACHE) / f"models--{base.replace('/', '--')}")
    repositories._look_up_commit.cache_clear()
    return load_and_score(repo)


def load_choice(repo, models):
    index = AttributionIndex.from_pretrained(repo, models=models)
    return index.damping_choice(), [member.mask() for member in index.members]


def train_and_push(folder, repo):
    """Return the names of a model repository's files, and its card, after a trainer's push."""
    from huggingface_hub import HfApi
    from test_runs import make_trainer

    trainer = make_trainer(folder, members="runs:2", num_train_epochs=1, hub_model_id=repo)
    trainer.train()
    trainer.featurize()
    build(folder / "other" / "by hand [1]", trainer.member_checkpoints()[0])
    trainer.push_to_hub()
    return HfApi().list_repo_files(repo), Path(HfApi().hf_hub_download(repo, "README.md")).read_text()


def train_again_and_push_every_save(folder, repo):
    """Return the names of a model repository's files after a second training pushed each of its checkpoints."""
    from huggingface_hub import HfApi
    from test_runs import make_trainer

    def make():
        options = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True}
        return make_trainer(folder, hub_model_id=repo, save_strategy="epoch", **options)

    trainer = make()
    trainer.train()
    trainer.featurize()
    trainer = make()
    trainer.train()
    trainer._finish_current_push()
    return HfApi().list_repo_files(repo)


def use_step_by_step(repo, models):
    """Return which files each use of an index downloads, by name."""
    steps = {}
    index, steps["open"] = watch(AttributionIndex.from_pretrained, repo, models=models)
    _, steps["gram"] = watch(index.members[1].gram)
    shards = index.members[0].shards()
    _, steps["shard"] = watch(next, shards)
    _, steps["next shard"] = watch(next, shards)
    rows, steps["features"] = watch(index.features, 1)
    _, steps["score"] = watch(scores_of, index)
    _, steps["score again"] = watch(scores_of, AttributionIndex.from_pretrained(repo, models=models))
    index.members[0].verify()
    return {name: traffic.downloads for name, traffic in steps.items()}, len(rows)


def load_while_another_is_pushed(repo, folder, models):
    index = AttributionIndex.from_pretrained(repo, models=models)
    push(folder, repo)
    return scores_of(index)


def save_copy(repo, folder):
    AttributionIndex.from_pretrained(repo).save_pretrained(folder)


def push_again(repo, target):
    AttributionIndex.from_pretrained(repo).push_to_hub(target)


def build_from_repository(folder, model_repo, config):
    """Featurize with a model of the Hub; return the scores, and what is recorded of the checkpoint."""
    index = build(folder, model_repo, config=config)
    return scores_of(index), index.members[0].info["checkpoint"]


def load_rows_of(repo, reviews):
    """Featurize a dataset of the Hub, and return what an index has on record of it."""
    from datasets import Dataset, load_dataset
    from huggingface_hub import DatasetCard

    Dataset.from_dict(token_rows(20)[:]).push_to_hub(repo)
    card = DatasetCard.load(repo)
    card.data.license = "cc-by-sa-4.0"
    card.push_to_hub(repo)
    whole = load_dataset(repo, split="train")
    rows = whole.select(range(12))
    build(reviews["folder"], reviews["model"], dataset=rows).push_to_hub(reviews["index"])
    index = build(reviews["folder"].parent / "whole", reviews["model"], dataset=whole)
    made = whole.map(dict, load_from_cache_file=False)
    links = [row_links(index, one) for one in (whole, whole.select([7, 3, 5]), None, rows, made)]
    links.append(row_links(AttributionIndex.from_pretrained(reviews["index"]), None))
    links = [None if link is None else [link(row) for row in (0, 2)] for link in links]
    return AttributionIndex.from_pretrained(reviews["index"]).members[0].info["source"], links


# The same numbers


def test_a_pushed_and_loaded_index_scores_the_same_bits(client, repo, large, checkpoint):
    client(push, large.folder, repo)
    assert np.array_equal(client(load_and_score, repo, [checkpoint] * 2), scores_of(large))


def test_an_earlier_push_is_loaded_by_its_revision(client, repo, large, small, checkpoint):
    first = client(push, large.folder, repo)
    second = client(push, small.folder, repo)
    assert first != second
    assert np.array_equal(client(load_and_score, repo, [checkpoint] * 2, revision=first), scores_of(large))
    for revision in (None, second):
        assert np.array_equal(client(load_and_score, repo, checkpoint, revision=revision), scores_of(small))


def test_an_index_stays_at_its_commit_whatever_is_pushed_meanwhile(client, repo, checkpoint, small, tmp_path):
    first = build(tmp_path / "index", checkpoint, config=new_config())
    client(push, first.folder, repo)
    assert np.array_equal(client(load_while_another_is_pushed, repo, small.folder, checkpoint), scores_of(first))


def ask_for_kept(repo, models, rows):
    """Return hits with what they show, the types that plain datasets finds, and the rows that a larger dataset aligns to."""
    from datasets import concatenate_datasets, load_dataset

    index = AttributionIndex.from_pretrained(repo, models=models)
    hits = index.attribute(QUERIES, 3, progress=False)[:]
    plain = load_dataset(repo, "member_0", split="train")
    aligned = index.align(concatenate_datasets([token_rows(5, seed=9), rows.shuffle(seed=0)]))
    return hits, plain.features["mood"].names, plain["text"][:], aligned["input_ids"][:]


def test_kept_columns_and_row_digests_travel(client, repo, checkpoint, tmp_path):
    rows = token_rows(20).add_column("text", [f"text {i}" for i in range(20)]).add_column("mood", [i % 2 for i in range(20)])
    rows = rows.cast_column("mood", ClassLabel(names=["glad", "sad"]))
    index = build(
        tmp_path / "index", checkpoint, dataset=rows, config=new_config(), keep_columns=["text", "mood"], shard_rows=6
    )
    client(push, index.folder, repo)
    hits, names, texts, aligned = client(ask_for_kept, repo, [checkpoint], token_rows(20))
    assert hits == index.attribute(QUERIES, 3, progress=False)[:]
    assert hits["opponent_text"][0] == [f"text {row}" for row in hits["opponents"][0]]
    assert names == ["glad", "sad"]
    assert texts == rows["text"][:]
    assert aligned == rows["input_ids"][:]


PLAIN = """
import json, sys
sys.modules["hf_trak"] = None  # importing it fails
from datasets import load_dataset
found = {}
for member in ("member_0", "member_1"):
    for streaming in (False, True):
        rows = load_dataset(sys.argv[1], member, split="train", streaming=streaming)
        found[f"{member} {streaming}"] = [(row["example_id"], row["trak_features"]) for row in rows]
print(json.dumps(found))
"""


def test_plain_datasets_reads_the_stored_features_with_no_hf_trak(client, repo, large, environment):
    client(push, large.folder, repo)
    reader = subprocess.run([sys.executable, "-c", PLAIN, repo], env=environment, capture_output=True, text=True)
    assert reader.returncode == 0, reader.stderr
    found = json.loads(reader.stdout.splitlines()[-1])
    for number, member in enumerate(large.members):
        stored = np.concatenate([shard.features.numpy() for shard in member.shards()])
        for streaming in (False, True):
            ids, features = zip(*found[f"member_{number} {streaming}"], strict=True)
            assert list(ids) == list(range(20))
            assert np.array_equal(np.array(features, dtype=np.float32), stored)


def test_masks_and_the_damping_that_they_chose_travel(client, repo, tmp_path):
    checkpoints = [save_model(tmp_path / f"bert-{seed}", seed=seed) for seed in range(4)]
    masks = draw_masks(20, 4, alpha=0.5, seed=0)
    index = build(tmp_path / "index", checkpoints, masks=masks)
    choice = DampingChoice(0.3, (0.1, 0.3), (0.2, 0.4), 4, 20, hash_members(index.members))
    choice.save(index.folder)
    client(push, index.folder, repo)
    found, loaded = client(load_choice, repo, checkpoints)
    assert found == choice
    assert torch.equal(torch.stack(loaded), masks)


def test_a_trainer_pushes_its_model_its_members_and_a_card(client, repo, tmp_path):
    files, card = client(train_and_push, tmp_path / "run", repo)
    assert {"model.safetensors", "members/run-0000/model.safetensors", "members/run-0001/model.safetensors"} <= set(files)
    assert not any(name.startswith("_runs") for name in files)
    assert not any(name.endswith(("trak_config.json", ".parquet", "gram.safetensors")) for name in files), "features stay here"
    assert "- data-attribution" in card
    assert "## Training data attribution" in card
    assert (tmp_path / "run" / "index" / "trak_config.json").is_file()


def test_checkpoints_that_a_trainer_pushes_while_it_trains_take_no_features_along(client, repo, tmp_path):
    files = client(train_again_and_push_every_save, tmp_path / "run", repo)
    assert {"model.safetensors", "checkpoint-10/model.safetensors"} <= set(files)
    assert not any(name.startswith("index/") for name in files)


# What is fetched, and when


def test_files_are_fetched_when_they_are_used_and_once(client, repo, large, checkpoint, tmp_path):
    new = build(tmp_path / "index", [checkpoint] * 2, config=new_config(), shard_rows=8)
    client(push, new.folder, repo)
    steps, n_rows = client(use_step_by_step, repo, [checkpoint] * 2)
    shards = [[f"member_{member}/train-0000{shard}-of-00003.parquet" for shard in range(3)] for member in range(2)]
    assert sorted(set(steps["open"])) == ["README.md", "member_0/member.json", "member_1/member.json", "trak_config.json"]
    assert set(steps["gram"]) == {"member_1/gram.safetensors"}
    assert set(steps["shard"]) == {shards[0][0]}
    assert set(steps["next shard"]) == {shards[0][1]}
    assert set(steps["features"]) == set(shards[1])
    assert n_rows == 20
    assert set(steps["score"]) == {"member_0/gram.safetensors", shards[0][2]}
    assert steps["score again"] == []


def test_a_loaded_index_can_be_saved_and_pushed_elsewhere(client, new_name, large, tmp_path):
    repo, other = new_name(), new_name()
    client(push, large.folder, repo)
    client(save_copy, repo, tmp_path / "copy")
    copy = AttributionIndex.from_pretrained(tmp_path / "copy")
    for member in copy.members:
        member.verify()
    assert large_files_of(copy) == large_files_of(large)
    client(push_again, repo, other)
    found = client(bytes_of_repository, other)
    assert {name: found[name] for name in large_files_of(large)} == {
        name: (large.folder / name).read_bytes() for name in large_files_of(large)
    }


def bytes_of_repository(repo):
    from huggingface_hub import snapshot_download

    return bytes_of(snapshot_download(repo, repo_type="dataset"))


OFFLINE = """
import sys
import numpy as np
from hub_for_tests import scores_of
from hf_trak import AttributionIndex
index = AttributionIndex.from_pretrained(sys.argv[1], models=sys.argv[3])
np.save(sys.argv[4], scores_of(index))
for use in (lambda: AttributionIndex.from_pretrained(sys.argv[2], models=sys.argv[3]).members[0].gram(),
            lambda: AttributionIndex.from_pretrained(sys.argv[2] + "-other")):
    try:
        use()
    except FileNotFoundError as error:
        print(error)
"""


def test_what_was_used_before_works_offline_and_what_was_not_is_named(
    client, new_name, checkpoint, environment, small, tmp_path
):
    used, opened = new_name(), new_name()
    for repo in (used, opened):
        client(push, build(tmp_path / repo, checkpoint, config=new_config()).folder, repo)
    client(load_and_score, used, checkpoint)
    client(is_open, opened)
    paths = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    offline = {**environment, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": paths}
    command = [sys.executable, "-c", OFFLINE, used, opened, str(checkpoint), str(tmp_path / "scores.npy")]
    result = subprocess.run(command, env=offline, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert np.array_equal(np.load(tmp_path / "scores.npy"), scores_of(AttributionIndex(tmp_path / used)))
    missing, unknown = result.stdout.splitlines()[-2:]
    assert f"member_0/gram.safetensors of '{opened}' is not in the cache" in missing
    assert f"'{opened}-other' is neither a folder here nor a dataset repository within reach" in unknown
    assert all("HF_HUB_OFFLINE is set. Unset it" in message for message in (missing, unknown))


def is_open(repo):
    return AttributionIndex.from_pretrained(repo).n_rows == 20


# Who may


def test_a_private_index_needs_a_token(client, repo, small, checkpoint):
    client(push, small.folder, repo, private=True)
    for token, why in ((None, "no token is set"), ("hf_not_one", "your token does not open it")):
        with pytest.raises(FileNotFoundError, match=f"{repo}.*is private and {why}.*hf auth login.*HF_TOKEN"):
            client(with_token, token, load_and_score, repo, checkpoint)
    assert np.array_equal(client(load_and_score, repo, checkpoint), scores_of(small))


def test_a_public_index_needs_no_token(client, repo, small, checkpoint):
    client(push, small.folder, repo, private=False)
    assert np.array_equal(client(with_token, None, load_and_score, repo, checkpoint), scores_of(small))


# What is no index, or not what was pushed


def test_a_repository_that_does_not_exist_is_said_not_to(client, repo, checkpoint):
    with pytest.raises(FileNotFoundError, match=f"'{repo}' is neither a folder here nor a dataset repository .*does not exist"):
        client(load_and_score, repo, checkpoint)


def test_a_revision_that_does_not_exist_is_named(client, repo, small, checkpoint):
    client(push, small.folder, repo)
    with pytest.raises(FileNotFoundError, match=f"The dataset repository '{repo}' has no revision 'v9'"):
        client(load_and_score, repo, checkpoint, revision="v9")


def test_another_dataset_is_refused_and_not_downloaded(client, repo, checkpoint, environment):
    client(upload, repo, {"README.md": b"# Reviews\n", "reviews.csv": b"text,label\ngood,1\n"})
    with pytest.raises(FileNotFoundError, match=f"'{repo}' holds no trak_config.json, so it is not an attribution index"):
        client(load_and_score, repo, checkpoint)
    assert not list(Path(environment["HF_HOME"]).rglob("reviews.csv"))


def test_a_future_format_on_the_hub_is_refused(client, repo, small, checkpoint):
    client(push, small.folder, repo)
    config = json.loads((small.folder / "trak_config.json").read_text())
    client(upload, repo, {"trak_config.json": json.dumps({**config, "format_version": 99, "holograms": True}).encode()})
    with pytest.raises(ValueError, match="format version 99.*Upgrade hf_trak"):
        client(load_and_score, repo, checkpoint)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("member_1/train-00001-of-00003.parquet", "lacks member_1/train-00001-of-00003.parquet, which its member.json lists"),
        ("member_0/member.json", "lacks member_0/member.json: it is incomplete"),
    ],
)
def test_an_incomplete_repository_is_refused_by_the_missing_file(client, repo, large, checkpoint, lost, message):
    client(upload, repo, {name: content for name, content in bytes_of(large.folder).items() if name != lost})
    with pytest.raises(ValueError, match=message):
        client(load_and_score, repo, [checkpoint] * 2)


@pytest.mark.parametrize("name", ["member_0/train-00000-of-00001.parquet", "member_0/gram.safetensors"])
def test_a_file_that_is_not_what_was_pushed_is_refused_by_name_and_not_kept(client, repo, small, checkpoint, name):
    client(push, small.folder, repo)
    content = bytearray((small.folder / name).read_bytes())
    content[len(content) // 2] ^= 1  # of the same size
    client(upload, repo, {name: bytes(content)})
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name} is not what was written.*It was deleted"):
            client(load_and_score, repo, checkpoint)
    client(upload, repo, {name: (small.folder / name).read_bytes()})
    assert np.array_equal(client(load_and_score, repo, checkpoint), scores_of(small))


def test_a_member_that_lists_files_elsewhere_is_refused(client, repo, small, checkpoint):
    client(push, small.folder, repo)
    info = json.loads((small.folder / "member_0" / "member.json").read_text())
    info["files"][0]["file"] = "../../../../../refs/main"
    client(upload, repo, {"member_0/member.json": json.dumps(info).encode()})
    with pytest.raises(ValueError, match=r"member\.json lists '\.\./.*/refs/main', which is not in its folder"):
        client(load_and_score, repo, checkpoint)


# Where it comes from


def test_a_members_model_is_loaded_at_its_commit_however_the_repository_moves(client, new_name, checkpoint, tmp_path):
    model, repo = new_name(), new_name()
    commit = client(upload, model, bytes_of(checkpoint), kind="model")
    scores, place = client(build_from_repository, tmp_path / "index", model, new_config())
    assert place == {"path": None, "repository": model, "revision": commit}
    client(push, tmp_path / "index", repo)
    client(upload, model, bytes_of(save_model(tmp_path / "moved", seed=1)), kind="model")
    assert np.array_equal(client(load_and_score, repo), scores)
    info = json.loads((tmp_path / "index" / "member_0" / "member.json").read_text())
    info["checkpoint"]["revision"] = None  # as indexes had it that did not pin
    client(upload, repo, {"member_0/member.json": json.dumps(info).encode()})
    with pytest.raises(ValueError, match="This is not what member_0 of .* was featurized with:\n  model_sha256: "):
        client(load_and_score, repo)


def test_points_of_a_path_are_made_again_from_the_commits_of_both_ends(client, new_name, checkpoint, tmp_path):
    base, final, repo = new_name(), new_name(), new_name()
    commit = client(upload, base, bytes_of(checkpoint), kind="model")
    card = f"---\nbase_model: {base}\n---\n".encode()
    files = bytes_of(save_model(tmp_path / "final", seed=2)) | {"README.md": card}
    client(upload, final, files, kind="model")
    scores, place = client(build_from_card, tmp_path / "index", final, new_config())
    assert {key: place[key] for key in ("path", "repository", "revision")} == {
        "path": None,
        "repository": base,
        "revision": commit,
    }
    client(push, tmp_path / "index", repo)
    client(upload, base, bytes_of(save_model(tmp_path / "moved", seed=1)), kind="model")
    assert np.array_equal(client(load_and_score, repo), scores)
    client(delete, base)
    with pytest.raises(FileNotFoundError, match=f"The base cannot be used: '{base}'"):
        client(load_without_cache, repo, base)


def test_the_training_sets_commit_and_licence_are_carried_over(client, new_name, checkpoint, tmp_path):
    data, repo = f"{new_name()}-Reviews", new_name()
    try:
        source, links = client(load_rows_of, data, {"folder": tmp_path / "index", "model": checkpoint, "index": repo})
        assert source == {"repository": data, "revision": client(head, data)}
        page = f"https://huggingface.co/datasets/{data}/viewer/default/train?row="
        first = [f"{page}0", f"{page}2"]
        # Of a part that may lie anywhere, of rows that were made here, and of an index of either, the place on the Hub is unknown.
        assert links == [first, [f"{page}7", f"{page}5"], first, None, None, None]
        card = client(bytes_of_repository, repo)["README.md"].decode()
        assert "license: cc-by-sa-4.0\n" in card
        assert f"source_datasets:\n- {data}\n" in card
        assert f"[{data}](https://huggingface.co/datasets/{data}) at commit `{source['revision']}`" in card
    finally:
        client(delete_dataset, data)


def run_the_guide(names, folder, checkpoint):
    """Run each block of Python of the guide to the Hub with names of repositories of the tests; return what the last one read."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(names["them/qnli-trak"], repo_type="dataset")
    api.create_repo(names["me/qnli-bert"])
    for place in (".", "members/epoch-0002", "members/epoch-0003"):
        api.upload_folder(repo_id=names["me/qnli-bert"], folder_path=checkpoint, path_in_repo=place)
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "hub.md").read_text(encoding="utf-8")
    index = build(folder, [names["me/qnli-bert"]] * 2)
    left = {"index": index, "queries": QUERIES}
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", guide, re.DOTALL)):
        for name, mine in names.items():
            code = code.replace(name, mine)
        exec(compile(code, f"hub.md, block {number}", "exec"), left)
        if number == 0:
            api.create_tag(names["me/qnli-trak"], tag="v1", repo_type="dataset")
    return [len(left["rows"]), left["scores"], scores_of(left["index"]), scores_of(index)]


def test_the_guide_to_the_hub_runs_as_printed(client, new_name, checkpoint, tmp_path):
    names = {name: new_name() for name in ("me/qnli-trak", "me/qnli-private", "them/qnli-trak", "me/qnli-bert")}
    n_rows, scores, again, expected = client(run_the_guide, names, tmp_path / "index", checkpoint)
    assert n_rows == 20
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(again, expected)


def delete_dataset(repo):
    from huggingface_hub import HfApi

    HfApi().delete_repo(repo, repo_type="dataset", missing_ok=True)


def test_queries_are_those_of_the_tests():
    assert len(QUERIES) == 3
