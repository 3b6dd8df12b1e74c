"""What tests against a Hub share: small indexes, and what runs in the process that speaks to the server."""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock
from uuid import uuid4

import numpy as np
from datasets_for_tests import token_rows

from hf_trak import AttributionIndex, TrakConfig

QUERIES = token_rows(3, seed=1)
ENDPOINT = os.environ.get("HF_ENDPOINT")


def build(folder, models, **options):
    options = {"dataset": token_rows(20), "config": TrakConfig(proj_dim=16), "progress": False, **options}
    return AttributionIndex.build(folder, models=models, **options)


def new_config(**options):
    """A configuration that nobody has used: what a Hub has seen before, in whatever repository, is not sent again."""
    return TrakConfig(**{"proj_dim": 16, "sketch_seed": uuid4().int % 2**31, **options})


def scores_of(index):
    scores = index.score(QUERIES, progress=False)
    assert np.isfinite(scores).all()
    assert scores.any()
    return scores


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def large_files_of(index):
    """The SHA-256 of each file that goes through LFS, with its name in the repository."""
    return {
        f"{member.folder.name}/{name}": record["sha256"] for member in index.members for name, record in member.records.items()
    }


# What runs in the client process


def user_name():
    from huggingface_hub import HfApi

    return HfApi().whoami()["name"]


def delete(repo):
    from huggingface_hub import HfApi

    for kind in ("dataset", "model"):
        HfApi().delete_repo(repo, repo_type=kind, missing_ok=True)


def push(folder, repo, **options):
    """Return the commit that the push left at the head of its branch."""
    AttributionIndex(folder).push_to_hub(repo, **{"license": "mit", **options})
    return head(repo, options.get("revision"))


def head(repo, revision=None):
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repo, revision=revision).sha


def n_commits(repo):
    from huggingface_hub import HfApi

    return len(HfApi().list_repo_commits(repo, repo_type="dataset"))


def upload(repo, files, kind="dataset"):
    """Commit files by hand, to a repository that is made if need be."""
    from huggingface_hub import CommitOperationAdd, HfApi

    HfApi().create_repo(repo, repo_type=kind, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    return HfApi().create_commit(repo, operations, commit_message="by hand", repo_type=kind).oid


def contents(repo, revision=None):
    """All of a repository's files, but for the one that the Hub itself adds."""
    from huggingface_hub import snapshot_download

    files = bytes_of(snapshot_download(repo, repo_type="dataset", revision=revision))
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def card_of(repo):
    return contents(repo)["README.md"].decode()


def load_and_score(repo, models=None, **options):
    return scores_of(AttributionIndex.from_pretrained(repo, models=models, **options))


def with_token(token, function, *args, **options):
    """Call a function as somebody else: with another token, or with none."""
    with mock.patch.dict(os.environ):
        del os.environ["HF_TOKEN"]
        if token is not None:
            os.environ["HF_TOKEN"] = token
        return function(*args, **options)


@dataclass
class Traffic:
    """What huggingface_hub has asked and sent, whatever the server."""

    asked_for: list[str] = field(default_factory=list)  # names of files whose upload was announced
    wanted: dict[str, bool] = field(default_factory=dict)  # by SHA-256 of large files, whether the server wanted their content
    sent_bytes: int = 0
    requests: list[str] = field(default_factory=list)
    downloads: list[str] = field(default_factory=list)

    def see_request(self, request):
        self.requests.append(f"{request.method} {request.url.path}")
        if "/preupload/" in request.url.path:
            self.asked_for += [file["path"] for file in json.loads(request.content)["files"]]
        if request.method == "PUT":
            self.sent_bytes += int(request.headers.get("content-length", 0))
        if "/resolve/" in request.url.path:
            self.downloads.append(request.url.path.split("/resolve/")[1].split("/", 1)[1])

    def see_response(self, response):
        if response.request.url.path.endswith("/info/lfs/objects/batch"):
            response.read()
            self.wanted |= {one["oid"]: "actions" in one for one in response.json()["objects"]}


@contextmanager
def watched(proxy=None):
    """Record what huggingface_hub does meanwhile, through a proxy if one is given."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    traffic = Traffic()

    def make_client():
        made = default_client_factory()
        hooks = made.event_hooks
        made.event_hooks = {
            "request": [*hooks["request"], traffic.see_request],
            "response": [*hooks["response"], traffic.see_response],
        }
        return made

    variables = {"HTTP_PROXY": proxy, "http_proxy": proxy, "NO_PROXY": "", "no_proxy": ""} if proxy else {}
    with mock.patch.dict(os.environ, variables):
        set_client_factory(make_client)
        try:
            yield traffic
        finally:
            set_client_factory(default_client_factory)


def watch(function, *args, **options):
    """Return a function's result, and the traffic that it caused."""
    with watched() as traffic:
        return function(*args, **options), traffic
