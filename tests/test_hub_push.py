"""To the Hub: one commit, of what is not there yet, under a card that says what it is."""

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

import pytest
from hub_for_tests import (
    ENDPOINT,
    QUERIES,
    build,
    bytes_of,
    card_of,
    contents,
    head,
    large_files_of,
    load_and_score,
    n_commits,
    new_config,
    push,
    scores_of,
    upload,
    user_name,
    watch,
    watched,
    with_token,
)
from hub_server import OTHER_TOKEN, CuttingProxy
from huggingface_hub.errors import RepositoryNotFoundError

from hf_trak import AttributionIndex
from hf_trak.cli.main import main

pytest_plugins = ["hub_fixtures"]


def pushed(folder, repo, license="mit"):
    """What a repository holds of an index: its files, with a card that names the repository and a licence."""
    files = bytes_of(folder)
    card = files["README.md"].decode()
    assert f'load_dataset("{folder.name}"' in card
    card = card.replace(f'"{folder.name}"', f'"{repo}"').replace("---\n", f"---\nlicense: {license}\n", 1)
    before, after = card.split("## Licence")
    after = (
        f"\n\n`{license}`. The features derive from the training data, and this is its licence.\n\n## Source"
        + after.split("## Source")[1]
    )
    return {**files, "README.md": f"{before}## Licence{after}".encode()}


# What runs in the client process


def is_private(repo):
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repo).private


def lfs_digests(repo):
    from huggingface_hub import HfApi

    entries = HfApi().list_repo_tree(repo, repo_type="dataset", recursive=True)
    return {entry.path: entry.lfs.sha256 for entry in entries if getattr(entry, "lfs", None) is not None}


def push_as_machine(folder, repo):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["push", str(folder), repo, "--license", "mit", "--json"]) == 0
    return json.loads(said.getvalue())


def push_explorer(folder, queries, name):
    """Push an explorer twice; return what the Space holds, and what becomes of a Space that is another app."""
    from huggingface_hub import HfApi

    api = HfApi()
    codes = [
        main(["explore", str(folder), "--validation", str(queries), "--validation_split", "train", "--push_space", name])
        for _ in range(2)
    ]
    files = api.list_repo_files(name, repo_type="space")
    api.create_repo(f"{name}-other", repo_type="space", space_sdk="gradio")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="app.py", repo_id=f"{name}-other", repo_type="space")
    codes.append(main(["explore", str(folder), "--validation", str(queries), "--push_space", f"{name}-other"]))
    left = api.list_repo_files(f"{name}-other", repo_type="space")
    for repo in (name, f"{name}-other"):
        api.delete_repo(repo, repo_type="space")
    return codes, files, left


def push_while_another_commits(folder, repo, files):
    from huggingface_hub import HfApi

    create_commit = HfApi.create_commit

    def late(api, *args, **options):
        with mock.patch.object(HfApi, "create_commit", create_commit):
            upload(repo, files)
        patch.stop()
        return create_commit(api, *args, **options)

    patch = mock.patch.object(HfApi, "create_commit", late)
    with watched() as traffic:
        patch.start()
        try:
            push(folder, repo)
        finally:
            mock.patch.stopall()
        return traffic


def push_through(proxy, folder, repo):
    """Push through a proxy that breaks off; return the message, and what was sent."""
    with watched(proxy) as traffic, mock.patch("time.sleep"):  # retries need not wait
        try:
            AttributionIndex(folder).push_to_hub(repo, license="mit")
        except ConnectionError as error:
            return str(error), traffic


def push_for_url(folder, repo, **options):
    return AttributionIndex(folder).push_to_hub(repo, **options)


def validate(card):
    from huggingface_hub import DatasetCard, ModelCard

    (ModelCard if "model-index:" in card else DatasetCard)(card).validate()


def run_command(*arguments):
    return main([str(argument) for argument in arguments])


def push_as_second_process(folder, repo):
    with mock.patch.dict("os.environ", RANK="1", WORLD_SIZE="2"):
        return AttributionIndex(folder).push_to_hub(repo, license="mit")


# One commit


def test_the_repository_holds_the_index_whole_and_nothing_else(client, repo, large, tmp_path):
    large.save_pretrained(tmp_path / "index")
    expected = pushed(tmp_path / "index", repo)
    beside = ["notes.txt", ".README.md.1.tmp", "member_0/.progress/00000.json", "member_0/.gram.safetensors.1.tmp"]
    for name in [*beside, "member_0/train-copy.parquet", "runs/model.bin"]:
        (tmp_path / "index" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "index" / name).write_bytes(b"not of the index")
    client(push, tmp_path / "index", repo)
    assert client(contents, repo) == expected


def test_lfs_files_have_the_digests_that_members_record(client, repo, large):
    client(push, large.folder, repo)
    found = client(lfs_digests, repo)
    assert {name: digest for name, digest in found.items() if name.startswith("member_")} == large_files_of(large)


def test_large_files_go_in_parts(client, hub, repo, checkpoint, tmp_path):
    new = build(tmp_path / "index", checkpoint, config=new_config(proj_dim=64))
    client(push, new.folder, repo)
    assert client(contents, repo) == pushed(new.folder, repo)
    if hub is None:
        pytest.skip("only the server in memory is known to have parts this small")
    assert hub.n_multipart >= 2


def test_a_push_is_one_commit_and_the_same_again_none(client, repo, large):
    client(upload, repo, {"LICENSE": b"mine"})
    before = client(n_commits, repo)
    client(push, large.folder, repo)
    assert client(n_commits, repo) == before + 1
    _, again = client(watch, push, large.folder, repo)
    assert client(n_commits, repo) == before + 1
    assert again.asked_for == []


def test_one_more_member_is_all_that_is_sent(client, repo, checkpoint, tmp_path):
    config = new_config()
    index = build(tmp_path / "index", checkpoint, config=config, shard_rows=8)
    _, first = client(watch, push, index.folder, repo)
    assert set(first.wanted) == set(large_files_of(index).values())
    grown = build(tmp_path / "index", [checkpoint] * 2, config=config, shard_rows=8)
    _, second = client(watch, push, grown.folder, repo)
    new = {name: digest for name, digest in large_files_of(grown).items() if name.startswith("member_1/")}
    # What is announced is all that the client reads.
    assert set(second.asked_for) == {*new, "member_1/member.json", "README.md"}
    assert second.wanted == dict.fromkeys(new.values(), True)
    assert second.sent_bytes == sum(record["bytes"] for record in grown.members[1].records.values())
    assert client(contents, repo) == pushed(grown.folder, repo)


def test_a_smaller_index_leaves_no_shard_of_a_larger_one(client, repo, large, small):
    client(push, large.folder, repo)
    client(upload, repo, {"LICENSE": b"mine"})
    client(push, small.folder, repo)
    assert client(contents, repo) == {**pushed(small.folder, repo), "LICENSE": b"mine"}


def test_a_push_to_a_new_branch_makes_it_and_leaves_main_alone(client, repo, large, small, checkpoint):
    first = client(push, large.folder, repo)
    client(push, small.folder, repo, revision="other")
    assert client(head, repo) == first
    assert (client(load_and_score, repo, checkpoint, revision="other") == scores_of(small)).all()


def test_a_pull_request_leaves_main_alone_and_can_be_loaded(client, repo, large, small, checkpoint):
    first = client(push, large.folder, repo)
    url = client(push_for_url, small.folder, repo, create_pr=True)
    assert url.startswith("http")
    assert f"{repo}/discussions/" in url
    assert client(head, repo) == first
    number = url.rsplit("/", 1)[1]
    assert (client(load_and_score, repo, checkpoint, revision=f"refs/pr/{number}") == scores_of(small)).all()


def test_who_may_not_write_may_propose(client, hub, repo, large, small, checkpoint):
    if hub is None:
        pytest.skip("the server is known by one token only")
    client(push, large.folder, repo)
    with pytest.raises(PermissionError, match="denies write access to .*your token does not allow it"):
        client(with_token, OTHER_TOKEN, push, small.folder, repo)
    assert client(contents, repo) == pushed(large.folder, repo)
    client(with_token, OTHER_TOKEN, push_for_url, small.folder, repo, create_pr=True)
    assert (client(load_and_score, repo, checkpoint, revision="refs/pr/1") == scores_of(small)).all()


def test_a_pull_request_to_another_branch_is_refused(client, repo, small):
    with pytest.raises(ValueError, match="goes to main, so revision='v2' and create_pr=True exclude each other"):
        client(push, small.folder, repo, revision="v2", create_pr=True)


def test_one_process_of_several_pushes(client, repo, small):
    assert client(push_as_second_process, small.folder, repo) is None
    with pytest.raises(FileNotFoundError, match="does not exist"):
        client(load_and_score, repo)


def test_a_file_that_has_changed_since_it_was_written_is_not_pushed(client, repo, small, tmp_path):
    small.save_pretrained(tmp_path / "index")
    path = tmp_path / "index" / "member_0" / "gram.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"member_0/gram\.safetensors has changed since it was written"):
        client(push, tmp_path / "index", repo)
    with pytest.raises(RepositoryNotFoundError, match="404"):  # it is refused before a repository is made
        client(contents, repo)


# Who may


def test_a_private_index_is_private(client, repo, small):
    client(push, small.folder, repo, private=True)
    assert client(is_private, repo)


def test_nothing_meant_to_be_private_goes_to_a_public_repository(client, repo, small):
    client(upload, repo, {"LICENSE": b"mine"})
    with pytest.raises(ValueError, match=f"{repo} exists and is public, but private=True was asked for"):
        client(push, small.folder, repo, private=True)
    assert client(contents, repo) == {"LICENSE": b"mine"}


@pytest.mark.parametrize(("token", "why"), [("hf_not_one", "your token does not allow it"), (None, "no token is set")])
def test_a_push_needs_a_token_that_allows_it(client, repo, small, token, why):
    with pytest.raises(PermissionError, match=f"denies write access to .*{repo}.*{why}.*hf auth login.*HF_TOKEN"):
        client(with_token, token, push, small.folder, repo)


# What goes wrong meanwhile


def test_another_commit_meanwhile_is_kept_and_ours_follows(client, repo, large, small):
    client(push, large.folder, repo)
    traffic = client(push_while_another_commits, small.folder, repo, {"LICENSE": b"another's"})
    assert client(contents, repo) == {**pushed(small.folder, repo), "LICENSE": b"another's"}
    assert len([one for one in traffic.requests if one.startswith("POST") and "/commit/" in one]) == 3  # theirs, ours twice


def test_a_push_does_not_undo_what_another_changed_meanwhile(client, repo, large, small):
    client(push, large.folder, repo)
    with pytest.raises(ValueError, match=r"somebody else changed member_1/note\.txt in .* their commit was kept"):
        client(push_while_another_commits, small.folder, repo, {"member_1/note.txt": b"another's"})
    assert client(contents, repo) == {**pushed(large.folder, repo), "member_1/note.txt": b"another's"}


@pytest.mark.skipif((ENDPOINT or "http:").startswith("https"), reason="only a plain connection can be cut at a chosen request")
@pytest.mark.parametrize(("during", "passes"), [(b"PUT ", 6), (b"/commit/", 0)], ids=["file", "commit"])
def test_a_broken_push_changes_nothing_and_the_next_goes_on(client, repo, checkpoint, large, tmp_path, during, passes):
    before = client(push, large.folder, repo)
    new = build(tmp_path / "index", [checkpoint] * 2, config=new_config(), shard_rows=8)
    # Files go up five at a time, so that the seventh follows one that has arrived.
    with CuttingProxy(during, passes=passes) as proxy:
        message, first = client(push_through, proxy.endpoint, new.folder, repo)
        assert proxy.has_cut
    assert "broke off" in message
    assert "Push again" in message
    assert client(head, repo) == before
    _, second = client(watch, push, new.folder, repo)
    assert all(first.wanted.values())
    there = [digest for digest, wanted in second.wanted.items() if not wanted]
    assert set(second.wanted) == set(first.wanted)
    assert (1 <= len(there) < len(second.wanted)) if during == b"PUT " else (len(there) == len(second.wanted))
    sizes = {record["sha256"]: record["bytes"] for member in new.members for record in member.records.values()}
    assert second.sent_bytes == sum(size for digest, size in sizes.items() if digest not in there)
    assert client(contents, repo) == pushed(new.folder, repo)


# The card


def test_the_card_is_valid_and_says_what_the_index_is(client, repo, small):
    client(push, small.folder, repo, license="cc-by-sa-4.0")
    card = client(card_of, repo)
    client(validate, card)
    for line in ("license: cc-by-sa-4.0", "- trak", "- data-attribution", "- config_name: member_0", "size_categories: n<1K"):
        assert f"{line}\n" in card


def test_cards_of_what_was_measured_are_valid_by_the_hubs_own_validation(client):
    cards = sorted((Path(__file__).parents[1] / "model_cards").glob("*-*/*.md"))
    assert len(cards) >= 8
    for card in cards:
        client(validate, card.read_text())
    with pytest.raises(ValueError, match="license"):
        client(validate, "---\nlicense: free-as-in-beer\n---\n")


def test_the_command_pushes_what_the_method_does(client, new_name, small):
    repo, other = new_name(), new_name()
    client(push, small.folder, repo)
    assert client(run_command, "push", small.folder, other, "--license", "mit", "--private") == 0
    assert client(contents, other) == pushed(small.folder, other)
    assert client(is_private, other)
    assert client(run_command, "push", small.folder, new_name()) == 1  # no licence
    assert client(with_token, "hf_not_one", run_command, "push", small.folder, repo) == 1


def test_a_licence_is_asked_for_once(client, repo, small, large):
    with pytest.raises(ValueError, match=r"licence of these features is not known.*license='cc-by-4.0'"):
        client(push_for_url, small.folder, repo)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        client(load_and_score, repo)
    client(push, small.folder, repo, license="cc-by-nc-4.0")
    client(push_for_url, large.folder, repo)
    assert "license: cc-by-nc-4.0\n" in client(card_of, repo)


def test_a_licence_that_the_hub_does_not_know_is_refused(client, repo, small):
    with pytest.raises(ValueError, match='"license" must be one of'):
        client(push, small.folder, repo, license="free-as-in-beer")


def test_what_its_owner_wrote_into_a_card_stays(client, repo, small, large):
    client(push, small.folder, repo)
    card = client(card_of, repo).replace("tags:", "pretty_name: Mine\ntags:\n- my-tag") + "\n## My own words\n"
    client(upload, repo, {"README.md": card.encode()})
    client(push, large.folder, repo)
    card = client(card_of, repo)
    client(validate, card)
    assert "pretty_name: Mine\n" in card
    assert "- my-tag\n- trak\n" in card
    assert card.count("config_name: member_1") == 1
    assert card.count("# TRAK features\n") == 1
    assert "## My own words" in card


def test_a_card_written_for_the_folder_goes_with_it(client, repo, small, tmp_path):
    small.save_pretrained(tmp_path / "index")
    (tmp_path / "index" / "README.md").write_text("---\nlicense: mit\n---\n# What I found\n")
    client(push_for_url, tmp_path / "index", repo)
    card = client(card_of, repo)
    assert card.endswith("# What I found\n")
    assert "- config_name: member_0\n" in card


def test_a_card_survives_json(small):
    """Every key of a card's YAML is plain."""
    import yaml

    block = (small.folder / "README.md").read_text().split("---\n")[1]
    assert json.loads(json.dumps(yaml.safe_load(block)))["configs"][0]["config_name"] == "member_0"


def test_an_explorer_is_pushed_to_a_space_and_no_other_app_is_replaced(client, new_name, checkpoint, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'hf-trak[explore]'")
    index = build(tmp_path / "index", [checkpoint])
    QUERIES.to_parquet(tmp_path / "queries.parquet")
    codes, files, left = client(push_explorer, index.folder, tmp_path / "queries.parquet", f"{client(user_name)}/explorer")
    assert codes == [0, 0, 1]
    assert {
        "README.md",
        "app.py",
        "requirements.txt",
        "space.json",
        "index/trak_config.json",
        "models/0/model.safetensors",
    } <= set(files)
    assert "app.py" in left
    assert "space.json" not in left


def test_a_machine_is_told_where_an_index_was_pushed(client, repo, small):
    found = client(push_as_machine, small.folder, repo)
    assert (found["command"], found["exit_status"], found["error"]) == ("push", 0, None)
    assert found["result"]["url"].endswith(f"/datasets/{repo}")
