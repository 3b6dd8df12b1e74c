"""Fixtures of tests against a Hub: the server, and a client process that speaks to it.

The server is one in memory, or, where `HF_ENDPOINT` and `HF_TOKEN` are set, that one. The libraries read such variables when they are
imported, so all that speaks to the server runs in one process of its own, started with the right ones.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from unittest import mock
from uuid import uuid4

import pytest
from datasets_for_tests import save_model
from hub_for_tests import ENDPOINT, build, delete, user_name
from hub_server import TOKEN, HubServer

from hf_trak import TrakConfig


@pytest.fixture(scope="module")
def hub():
    """The server in memory; None where another one is used."""
    with ExitStack() as stack:
        yield None if ENDPOINT else stack.enter_context(HubServer())


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    """The variables of a client process."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.endpoint if hub else ENDPOINT,
        "HF_TOKEN": TOKEN if hub else os.environ.get("HF_TOKEN", ""),
        "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.fixture(scope="module")
def client(environment):
    """Calls a function of a test module in the client process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, environment, clear=True):
            pool.submit(os.getpid).result()  # started here, before its first import
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result()


@pytest.fixture
def new_name(client):
    """Makes up names of repositories, which are deleted after the test."""
    user, names = client(user_name), []

    def make():
        names.append(f"{user}/trak-{uuid4().hex[:12]}")
        return names[-1]

    yield make
    for name in names:
        client(delete, name)


@pytest.fixture
def repo(new_name):
    return new_name()


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
    return build(tmp_path_factory.mktemp("small") / "index", checkpoint, config=TrakConfig(proj_dim=16, sketch_seed=7))
