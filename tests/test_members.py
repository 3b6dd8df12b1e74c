"""What `members=` strings mean, and how members are numbered."""

import pytest

from hf_trak.members import Ensemble, Members


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("final", Members("final")),
        ("epoch:3", Members("epoch", 3)),
        ("steps:[200, 100,100]", Members("steps", 2, (100, 200))),
        ("steps:[5]", Members("steps", 1, (5,))),
        ("path:3", Members("path", 3)),
        ("runs:4", Members("runs", 4)),
        ("subsets:10", Members("subsets", 10)),
    ],
)
def test_every_form_is_understood(text, expected):
    assert Members.parse(text) == expected
    assert Members.parse(text).is_single_run == (expected.kind in ("final", "epoch", "steps", "path"))


@pytest.mark.parametrize(
    "text",
    ["epoch:0", "epochs:3", "last", "epoch:", "steps:[]", "steps:100", "steps:[0]", "runs:", "subsets:-1", "final:1", ""],
)
def test_anything_else_is_answered_with_the_forms_there_are(text):
    with pytest.raises(
        ValueError, match=r"`members` must be 'final', 'epoch:K', 'steps:\[S, ...\]', 'path:K', 'runs:M' or 'subsets:M'"
    ):
        Members.parse(text)


def test_a_path_has_early_steps_a_factor_of_two_apart():
    assert Members("path", 3).steps_of(248) == (16, 31, 62)
    assert Members("path", 1).steps_of(3) == (1,)
    assert Members("steps", 2, (5, 9)).steps_of(9) == (5, 9)
    with pytest.raises(ValueError, match="8 steps have 2 such moments"):
        Members("path", 4).steps_of(8)
    with pytest.raises(ValueError, match="after step 9, but the run ends at step 8"):
        Members("steps", 2, (5, 9)).steps_of(8)


def test_members_are_numbered_checkpoint_by_checkpoint_with_sketches_of_their_own():
    passes = Ensemble(sketch_seeds_per_checkpoint=3, dropout_seeds=2).passes(2, seed=5)
    assert [(plan.checkpoint, plan.dropout_seed) for plan in passes] == [(0, 5), (0, 6), (1, 7), (1, 8)]
    assert [member for plan in passes for member in plan.members] == list(range(12))
    assert [seed for plan in passes for seed in plan.seeds] == list(range(5, 17))


def test_one_member_per_checkpoint_is_the_default():
    passes = Ensemble().passes(3, seed=0)
    assert [(plan.dropout_seed, plan.members, plan.seeds) for plan in passes] == [(None, (i,), (i,)) for i in range(3)]


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="`sketch_seeds_per_checkpoint` must be at least 1, but is 0"):
        Ensemble(sketch_seeds_per_checkpoint=0)
    with pytest.raises(ValueError, match="`dropout_seeds` must be at least 0, but is -1"):
        Ensemble(dropout_seeds=-1)


def test_an_ensemble_reads_the_shorthand_and_refuses_what_contradicts_itself():
    ensemble = Ensemble(["a", "b"], kept="epoch:2", base=["c", None], alpha=0.5)
    assert (ensemble.members, ensemble.alphas, ensemble.bases) == (Members("epoch", 2), (0.5,), ("c", None))
    assert Ensemble.of(ensemble, revision=None, dropout_seeds=0) is ensemble
    assert Ensemble("a") == Ensemble.of(["a"]) != Ensemble("a", base="c")
    with pytest.raises(
        ValueError, match=r"but dropout_seeds is given beside it. Make them its fields: Ensemble\(..., dropout_seeds="
    ):
        Ensemble.of(ensemble, dropout_seeds=2)
    with pytest.raises(ValueError, match="one per model, None for none: 2, but there are 1"):
        Ensemble(["a", "b"], base=["c"])
    with pytest.raises(ValueError, match="`base_revision` is given, but there is no `base`"):
        Ensemble("a", base_revision="main")
