"""`damping="auto"`: chosen by the members' own masks, and right where the truth is known."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from hf_trak.linalg import accumulate_gram
from hf_trak.scoring.damping import GRID, DampingChoice, choose_damping, spearman, split_in_halves, take
from hf_trak.storage.columns import encode_columns
from hf_trak.storage.reader import MemberReader
from hf_trak.storage.writer import MemberWriter
from hf_trak.training.runs import draw_masks

N, PROJ_DIM, N_CHECKPOINTS = 120, 16, 8


def features_of(seed, spread=3.0):
    """Rows whose Gram matrix has eigenvalues of many sizes, so that λ matters."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, PROJ_DIM, generator=generator) * torch.logspace(0, -spread / 2, PROJ_DIM)


def scores_of(features, q, damping):
    """Return τ for the training rows as queries, (n, n), from the equation."""
    phi = features.double().numpy()
    gram = phi.T @ phi
    mean_eigenvalue = np.trace(gram) / min(phi.shape)
    return phi @ np.linalg.inv(gram + damping * mean_eigenvalue * np.eye(len(gram))) @ phi.T * q.double().numpy()[:, None]


def write_members(folder, outputs, masks, *, features, out_to_loss, sketches=1):
    """Write members, `sketches` to a checkpoint, whose outputs are given."""
    readers = []
    for number in range(len(outputs) * sketches):
        checkpoint = number // sketches
        writer = MemberWriter(folder / f"member_{number}", identity={}, n_rows=N, shard_rows=50)
        for shard in range(writer.n_shards):
            rows = writer.rows(shard)
            part = slice(rows.start, rows.stop)
            output = torch.as_tensor(outputs[checkpoint][part]).float()
            writer.write(shard, encode_columns(features[part], output, out_to_loss[part], dtype="float32"))
        gram = accumulate_gram(torch.zeros(PROJ_DIM, PROJ_DIM, dtype=torch.float64), features.double())
        writer.finish(gram, {}, None if masks is None else masks[checkpoint])
        readers.append(MemberReader(writer.folder))
    return readers


def linear_ensemble(folder, truth, *, noise=0.0, **options):
    """Write checkpoints whose outputs are sums of the scores at λ = `truth` over the rows they were trained on."""
    features, q = features_of(0), torch.rand(N, generator=torch.Generator().manual_seed(1))
    masks = draw_masks(N, N_CHECKPOINTS, alpha=0.5, seed=2)
    outputs = masks.double().numpy() @ scores_of(features, q, truth)
    outputs += noise * outputs.std() * np.random.default_rng(3).normal(size=outputs.shape)
    return write_members(folder, outputs, masks, features=features, out_to_loss=q, **options)


@pytest.mark.parametrize("truth", [0.01, 0.3, 3.0, 30.0])
def test_the_damping_that_made_the_outputs_ranks_best_and_one_as_good_is_chosen(tmp_path, truth):
    choice = choose_damping(linear_ensemble(tmp_path, truth), range(N_CHECKPOINTS))
    assert choice.curve[GRID.index(choice.damping)] > max(choice.curve) - 0.1
    assert min(truth, 3**0.5) <= choice.damping <= max(truth, 3**0.5), "nearer to the usual, if anything"
    assert choice.curve[GRID.index(truth)] == pytest.approx(1.0, abs=2e-3), "its scores rank the outputs perfectly"
    assert max(choice.curve) == choice.curve[GRID.index(truth)]
    assert (choice.n_checkpoints, choice.n_targets) == (N_CHECKPOINTS, N)


def test_a_few_checkpoints_do_not_overrule_what_is_usual_and_many_do():
    curve = [0.1, 0.1, 0.1, 0.15, 0.15, 0.15, 0.15, 0.2, 0.1]
    assert take(curve, GRID, n_checkpoints=4) in (1.0, 3.0)
    assert take(curve, GRID, n_checkpoints=50) == 30.0


def test_noisy_outputs_lower_the_curve_and_leave_the_choice_near(tmp_path):
    choice = choose_damping(linear_ensemble(tmp_path, 1.0, noise=0.5), range(N_CHECKPOINTS))
    assert choice.damping in (0.3, 1.0, 3.0)
    assert max(choice.curve) < 0.95


def test_the_curve_is_that_of_a_slow_transcription(tmp_path):
    members = linear_ensemble(tmp_path, 1.0, noise=0.5)
    choice = choose_damping(members, range(N_CHECKPOINTS), grid=[0.1, 3.0])
    features = torch.cat([shard.features for shard in members[0].shards()])
    q = torch.cat([shard.out_to_loss for shard in members[0].shards()])
    outputs = np.stack([torch.cat([shard.output for shard in member.shards()]).numpy() for member in members])
    masks = np.stack([member.mask().numpy() for member in members])
    for damping, found in zip([0.1, 3.0], choice.curve, strict=True):
        tau, total, weight = scores_of(features, q, damping), 0.0, 0
        for _, ranked in split_in_halves(N_CHECKPOINTS):
            for row in range(N):
                out = [c for c in ranked if not masks[c, row]]
                if len(out) < 2:
                    continue
                predicted = [tau[masks[c], row].sum() for c in out]
                total += (len(out) - 1) * spearmanr(predicted, outputs[out, row]).statistic
                weight += len(out) - 1
        assert found == pytest.approx(total / weight, abs=1e-6)


def test_several_sketches_of_a_checkpoint_are_one_voter(tmp_path):
    once = choose_damping(linear_ensemble(tmp_path / "1", 1.0, noise=0.3), range(N_CHECKPOINTS))
    checkpoints = [number // 2 for number in range(2 * N_CHECKPOINTS)]
    twice = choose_damping(linear_ensemble(tmp_path / "2", 1.0, noise=0.3, sketches=2), checkpoints)
    np.testing.assert_allclose(twice.curve, once.curve, atol=1e-9)
    assert twice.n_checkpoints == N_CHECKPOINTS


@pytest.mark.parametrize("n_checkpoints", [1, 3, 4, 7])
def test_no_checkpoint_is_on_both_sides(n_checkpoints):
    for scoring, ranked in split_in_halves(n_checkpoints):
        assert sorted(scoring + ranked) == list(range(n_checkpoints))
        assert abs(len(scoring) - len(ranked)) <= 1


def test_too_few_checkpoints_or_no_masks_choose_nothing(tmp_path):
    features, q = features_of(0), torch.rand(N)
    outputs, masks = np.zeros((4, N)), draw_masks(N, 4, alpha=0.5, seed=0)
    options = {"features": features, "out_to_loss": q}
    assert choose_damping(write_members(tmp_path / "few", outputs[:3], masks, **options), range(3)) is None
    assert choose_damping(write_members(tmp_path / "none", outputs, None, **options), range(4)) is None
    everything = torch.ones(4, N, dtype=torch.bool)
    assert choose_damping(write_members(tmp_path / "all", outputs, everything, **options), range(4)) is None


def test_outputs_that_no_score_can_rank_choose_nothing(tmp_path):
    features, q = features_of(0), torch.rand(N)
    masks = draw_masks(N, N_CHECKPOINTS, alpha=0.5, seed=0)
    equal = write_members(tmp_path, np.zeros((N_CHECKPOINTS, N)), masks, features=features, out_to_loss=q)
    assert choose_damping(equal, range(N_CHECKPOINTS)) is None


def test_ranks_agree_with_scipy_where_entries_are_missing_or_tied():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 4, (12, 30)), generator.normal(size=(12, 30)).round(1)
    valid = generator.random((12, 30)) < 0.7
    first[:, 0] = 1  # constant
    found = spearman(torch.from_numpy(first).double(), torch.from_numpy(second), torch.from_numpy(valid))
    assert found[0] == 0
    for column in range(1, 30):
        rows = valid[:, column]
        assert found[column].item() == pytest.approx(spearmanr(first[rows, column], second[rows, column]).statistic, abs=1e-12)


def test_a_choice_is_kept_and_not_taken_for_another_ensembles(tmp_path):
    members = linear_ensemble(tmp_path / "one", 1.0)
    choice = choose_damping(members, range(N_CHECKPOINTS))
    choice.save(tmp_path)
    assert DampingChoice.load(tmp_path, members) == choice
    assert DampingChoice.load(tmp_path, members[:-1]) is None
    assert DampingChoice.load(tmp_path / "nowhere", members) is None
    (tmp_path / "damping.json").write_text(json.dumps({"grid": [1.0], "curve": [0.5], "lambda": 3}))
    with pytest.raises(ValueError, match=r"damping.json is damaged: .*Delete it"):
        DampingChoice.load(tmp_path, members)
