"""To the Hub and back: what was pushed is what is loaded, by hf_trak and by plain datasets.

Tests run against a server in memory, or, where `HF_ENDPOINT` and `HF_TOKEN` are set, against that one. The libraries read such
variables when they are imported, so all that speaks to the server runs in one process of its own, started with the right ones.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from unittest import mock
from uuid import uuid4

import numpy as np
import pytest
import torch
from datasets_for_tests import save_model, token_rows
from hub_server import TOKEN, CuttingProxy, HubServer

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.damping import DampingChoice, hash_members
from hf_trak.runs import draw_masks

QUERIES = token_rows(3, seed=1)
ENDPOINT = os.environ.get("HF_ENDPOINT")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The variables of a client process."""
    with ExitStack() as stack:
        endpoint = ENDPOINT or stack.enter_context(HubServer()).endpoint
        yield {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": endpoint,
            "HF_TOKEN": os.environ.get("HF_TOKEN", "") if ENDPOINT else TOKEN,
            "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


@pytest.fixture(scope="module")
def client(environment):
    """Calls a function of this file in the client process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, environment, clear=True):
            pool.submit(os.getpid).result()  # started here, before its first import
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result()


@pytest.fixture
def repo(client):
    name = f"{client(user_name)}/trak-{uuid4().hex[:12]}"
    yield name
    client(delete, name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def large(tmp_path_factory, checkpoint):
    """Two members of three shards."""
    return build(tmp_path_factory.mktemp("large") / "index", [checkpoint] * 2, shard_rows=8)


@pytest.fixture(scope="module")
def small(tmp_path_factory, checkpoint):
    """One member of one shard, of another sketch."""
    return build(tmp_path_factory.mktemp("small") / "index", checkpoint, config=TrakConfig(proj_dim=16, seed=7))


def build(folder, models, **options):
    options = {"dataset": token_rows(20), "config": TrakConfig(proj_dim=16), "progress": False, **options}
    return AttributionIndex.build(folder, models=models, **options)


def scores_of(index):
    scores = index.score(QUERIES, progress=False)
    assert np.isfinite(scores).all()
    assert scores.any()
    return scores


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def pushed(folder, repo):
    """What a repository holds of an index: its files, with a card whose snippets name the repository."""
    files = bytes_of(folder)
    card = files["README.md"].decode()
    assert f'load_dataset("{folder.name}"' in card
    return {**files, "README.md": card.replace(f'"{folder.name}"', f'"{repo}"').encode()}


# What runs in the client process


def user_name():
    from huggingface_hub import HfApi

    return HfApi().whoami()["name"]


def delete(repo):
    from huggingface_hub import HfApi

    HfApi().delete_repo(repo, repo_type="dataset", missing_ok=True)


def push(folder, repo, **options):
    """Return the commit that the push left at the head of its branch."""
    AttributionIndex(folder).push_to_hub(repo, **options)
    return head(repo, options.get("revision"))


def head(repo, revision=None):
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repo, revision=revision).sha


def is_private(repo):
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repo).private


def n_commits(repo):
    from huggingface_hub import HfApi

    return len(HfApi().list_repo_commits(repo, repo_type="dataset"))


def upload(repo, files):
    from huggingface_hub import CommitOperationAdd, HfApi

    HfApi().create_repo(repo, repo_type="dataset", exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    HfApi().create_commit(repo, operations, commit_message="by hand", repo_type="dataset")


def contents(repo):
    """All of a repository's files, but for the one that the Hub itself adds."""
    from huggingface_hub import snapshot_download

    files = bytes_of(snapshot_download(repo, repo_type="dataset"))
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def lfs_digests(repo):
    from huggingface_hub import HfApi

    entries = HfApi().list_repo_tree(repo, repo_type="dataset", recursive=True)
    return {entry.path: entry.lfs.sha256 for entry in entries if getattr(entry, "lfs", None) is not None}


def load_and_score(repo, models, **options):
    return scores_of(AttributionIndex.from_pretrained(repo, models=models, **options))


def read_features(repo, member, *, streaming):
    from datasets import load_dataset

    rows = load_dataset(repo, member, split="train", streaming=streaming)
    return np.array([row["trak_features"] for row in rows], dtype=np.float32), [row["example_id"] for row in rows]


def without_token(function, *args, **options):
    with mock.patch.dict(os.environ):
        del os.environ["HF_TOKEN"]
        return function(*args, **options)


def load_choice(repo, models):
    index = AttributionIndex.from_pretrained(repo, models=models)
    return index.damping_choice(), [member.mask() for member in index.members]


def train_and_push(folder, repo):
    """Return the names of a model repository's files, and its card, after a trainer's push."""
    from huggingface_hub import HfApi
    from test_runs import make_trainer

    trainer = make_trainer(folder, members="runs:2", num_train_epochs=1, hub_model_id=repo)
    trainer.train()
    trainer.push_to_hub()
    try:
        return HfApi().list_repo_files(repo), Path(HfApi().hf_hub_download(repo, "README.md")).read_text()
    finally:
        HfApi().delete_repo(repo)


def push_while_another_commits(folder, repo):
    from huggingface_hub import HfApi

    create_commit = HfApi.create_commit

    def late(api, *args, **options):
        with mock.patch.object(HfApi, "create_commit", create_commit):
            upload(repo, {"member_1/note.txt": b"another's"})
        return create_commit(api, *args, **options)

    with mock.patch.object(HfApi, "create_commit", late):
        try:
            push(folder, repo)
        except OSError as error:  # pickled as what it is not
            return str(error)


# The claims


def test_a_pushed_and_loaded_index_scores_the_same_bits(client, repo, large, checkpoint):
    client(push, large.folder, repo)
    assert np.array_equal(client(load_and_score, repo, [checkpoint] * 2), scores_of(large))


def test_the_repository_holds_the_index_whole_and_nothing_else(client, repo, large, tmp_path):
    large.save_pretrained(tmp_path / "index")
    expected = pushed(tmp_path / "index", repo)
    beside = ["notes.txt", ".README.md.1.tmp", "member_0/.progress/00000.json", "member_0/.kernel.safetensors.1.tmp"]
    for name in [*beside, "member_0/train-copy.parquet", "member_9/train-00000-of-00001.parquet", "runs/model.bin"]:
        (tmp_path / "index" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "index" / name).write_bytes(b"not of the index")
    client(push, tmp_path / "index", repo)
    assert client(contents, repo) == expected


def test_lfs_files_have_the_digests_that_members_record(client, repo, large):
    client(push, large.folder, repo)
    found = client(lfs_digests, repo)
    for number, member in enumerate(large.members):
        recorded = {f"member_{number}/{entry['file']}": entry["sha256"] for entry in member.info["files"]}
        assert {name: digest for name, digest in found.items() if name.startswith(f"member_{number}/")} == recorded


def test_a_push_is_one_commit_and_the_same_again_none(client, repo, large):
    client(upload, repo, {"LICENSE": b"mine"})
    before = client(n_commits, repo)
    client(push, large.folder, repo)
    assert client(n_commits, repo) == before + 1
    client(push, large.folder, repo)
    assert client(n_commits, repo) == before + 1


def test_an_earlier_push_is_loaded_by_its_revision(client, repo, large, small, checkpoint):
    first = client(push, large.folder, repo)
    second = client(push, small.folder, repo)
    assert first != second
    assert np.array_equal(client(load_and_score, repo, [checkpoint] * 2, revision=first), scores_of(large))
    for revision in (None, second):
        assert np.array_equal(client(load_and_score, repo, checkpoint, revision=revision), scores_of(small))


def test_a_push_to_a_new_branch_makes_it_and_leaves_main_alone(client, repo, large, small, checkpoint):
    first = client(push, large.folder, repo)
    client(push, small.folder, repo, revision="other")
    assert client(head, repo) == first
    assert np.array_equal(client(load_and_score, repo, checkpoint, revision="other"), scores_of(small))


def test_a_smaller_index_leaves_no_shard_of_a_larger_one(client, repo, large, small):
    client(push, large.folder, repo)
    client(upload, repo, {"LICENSE": b"mine"})
    client(push, small.folder, repo)
    assert client(contents, repo) == {**pushed(small.folder, repo), "LICENSE": b"mine"}
    assert client(read_features, repo, "member_0", streaming=False)[1] == list(range(20))


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_datasets_reads_the_stored_features(client, repo, large, streaming):
    client(push, large.folder, repo)
    for number, member in enumerate(large.members):
        stored = np.concatenate([shard.features.numpy() for shard in member.shards()])
        features, example_id = client(read_features, repo, f"member_{number}", streaming=streaming)
        assert np.array_equal(features, stored)
        assert example_id == list(range(20))


def test_a_private_index_needs_a_token(client, repo, small, checkpoint):
    client(push, small.folder, repo, private=True)
    assert client(is_private, repo)
    with pytest.raises(FileNotFoundError, match=f"{repo}.*is private and no token is set.*hf auth login.*HF_TOKEN"):
        client(without_token, load_and_score, repo, checkpoint)
    assert np.array_equal(client(load_and_score, repo, checkpoint), scores_of(small))


def test_a_public_index_needs_no_token(client, repo, small, checkpoint):
    client(push, small.folder, repo, private=False)
    assert np.array_equal(client(without_token, load_and_score, repo, checkpoint), scores_of(small))


def test_nothing_meant_to_be_private_goes_to_a_public_repository(client, repo, small):
    client(upload, repo, {"LICENSE": b"mine"})
    with pytest.raises(ValueError, match=f"{repo} exists and is public, but private=True was asked for"):
        client(push, small.folder, repo, private=True)
    assert client(contents, repo) == {"LICENSE": b"mine"}


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


def test_an_incomplete_repository_is_refused_by_the_missing_file(client, repo, small, checkpoint):
    client(upload, repo, {name: content for name, content in bytes_of(small.folder).items() if ".parquet" not in name})
    with pytest.raises(ValueError, match="train-00000-of-00001.parquet is missing, where .* bytes were written"):
        client(load_and_score, repo, checkpoint)


def test_a_push_that_another_overtook_changes_nothing(client, repo, large, small):
    client(push, large.folder, repo)
    assert "412" in client(push_while_another_commits, small.folder, repo)
    assert client(contents, repo) == {**pushed(large.folder, repo), "member_1/note.txt": b"another's"}


PUSH = """
import sys, time
time.sleep = lambda seconds: None  # retries need not wait
from pathlib import Path
from hf_trak.hub import upload_index
upload_index(Path(sys.argv[1]), sys.argv[2], card="", private=None, revision=None, message="interrupted")
"""


@pytest.mark.skipif((ENDPOINT or "http:").startswith("https"), reason="only a plain connection can be cut at a chosen request")
@pytest.mark.parametrize("during", [b"PUT ", b"/commit/"], ids=["file", "commit"])
def test_an_interrupted_push_leaves_the_old_commit_and_the_next_succeeds(
    client, repo, environment, checkpoint, large, tmp_path, during
):
    before = client(push, large.folder, repo)
    # What a Hub has seen before, in whatever repository, is not sent again; nobody has used this seed.
    new = build(tmp_path / "index", checkpoint, config=TrakConfig(proj_dim=16, seed=uuid4().int % 2**31))
    with CuttingProxy(during) as proxy:
        proxied = {name: value for name, value in environment.items() if name.lower() not in ("no_proxy", "all_proxy")}
        proxied |= {"HTTP_PROXY": proxy.endpoint, "http_proxy": proxy.endpoint}
        broken = subprocess.run(
            [sys.executable, "-c", PUSH, tmp_path / "index", repo], env=proxied, capture_output=True, text=True
        )
        assert proxy.has_cut, broken.stderr
    assert broken.returncode == 1
    assert client(head, repo) == before
    assert client(contents, repo) == pushed(large.folder, repo)
    client(push, new.folder, repo)
    assert np.array_equal(client(load_and_score, repo, checkpoint), scores_of(new))


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
    assert "- data-attribution" in card
    assert "## Training data attribution" in card
