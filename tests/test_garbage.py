"""The collector rests while modules and models are loaded, and is as it was afterwards."""

import gc

import pytest

from hf_trak.runtime import uncollected


@pytest.fixture(autouse=True)
def collector():
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_rests_within_the_block_and_is_as_it_was_after_it(was_on):
    (gc.enable if was_on else gc.disable)()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled() == was_on


def test_an_error_leaves_the_collector_as_it_was():
    with pytest.raises(OSError, match="no such model"), uncollected():
        raise OSError("no such model")
    assert gc.isenabled()


def test_a_library_call_sets_nothing_aside_for_good_and_a_command_does():
    before = gc.get_freeze_count()
    with uncollected():
        kept = [[] for _ in range(1000)]
    assert gc.get_freeze_count() == before
    with uncollected(for_good=True):
        kept += [[] for _ in range(1000)]
    assert gc.get_freeze_count() >= before + len(kept)
