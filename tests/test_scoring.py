"""Scores against float64 transcriptions of the equations, and the streaming that must not change them."""

import math

import numpy as np
import pytest
import torch
from reference import madrylab_scores, trak_scores

from hf_trak.linalg import accumulate_gram
from hf_trak.projectors import DenseRademacher
from hf_trak.scoring.score import MemberBlock, precondition, score_blocks
from hf_trak.scoring.top_k import merge_top_k, top_k

N, GRAD_DIM, PROJ_DIM, N_QUERY = 90, 400, 24, 7


def make_members(n_members):
    """Gradients on very different scales: members of an ensemble are not weighted by them."""
    generator = np.random.default_rng(0)
    grads = [10.0**m * generator.normal(size=(N, GRAD_DIM)) for m in range(n_members)]
    queries = [10.0**m * generator.normal(size=(N_QUERY, GRAD_DIM)) for m in range(n_members)]
    out_to_loss = [generator.uniform(size=N) for _ in range(n_members)]
    signs = [DenseRademacher(proj_dim=PROJ_DIM, seed=m).signs("w", torch.arange(GRAD_DIM)).numpy() for m in range(n_members)]
    return grads, queries, out_to_loss, signs


def gram_of(features):
    return accumulate_gram(torch.zeros(PROJ_DIM, PROJ_DIM, dtype=torch.float64), features)


def scores_of(features, queries, out_to_loss, *, damping, block=N, **options):
    preconditioned = [
        precondition(query, gram_of(phi), n_rows=N, damping=damping, **options)
        for phi, query in zip(features, queries, strict=True)
    ]
    blocks = (
        [
            MemberBlock(phi[start : start + block], q[start : start + block])
            for phi, q in zip(features, out_to_loss, strict=True)
        ]
        for start in range(0, N, block)
    )
    return torch.cat(list(score_blocks(blocks, preconditioned)))


def features_of(grads, signs):
    return [torch.from_numpy(g @ p / math.sqrt(PROJ_DIM)) for g, p in zip(grads, signs, strict=True)]


@pytest.mark.parametrize("damping", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("n_members", [1, 3])
def test_scores_are_the_product_of_two_means(n_members, damping):
    grads, queries, out_to_loss, signs = make_members(n_members)
    features, query_features = features_of(grads, signs), features_of(queries, signs)
    scores = scores_of(features, query_features, [torch.from_numpy(q) for q in out_to_loss], damping=damping)
    expected = trak_scores([f.numpy() for f in features], [f.numpy() for f in query_features], out_to_loss, damping)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("n_members", [1, 3])
def test_the_reference_rescale_reproduces_madrylab_trak(n_members):
    """With damping 0 and one dense projector, from gradients sketched by our projector in float32."""
    grads, queries, out_to_loss, signs = make_members(n_members)

    def sketch(values, seed):
        projector = DenseRademacher(proj_dim=PROJ_DIM, seed=seed)
        grads = torch.from_numpy(values).float()
        accumulator = projector.start(len(grads), dtype=torch.float32, device=grads.device)
        projector.add(accumulator, "w", grads)
        return projector.finish(accumulator)

    features = [sketch(g, m) for m, g in enumerate(grads)]
    query_features = [sketch(g, m) for m, g in enumerate(queries)]
    scores = scores_of(
        features, query_features, [torch.from_numpy(q) for q in out_to_loss], damping=0.0, reference_rescale=True
    )
    # It stores φ · √(proj_dim / grad_dim) where ours is unbiased; with its rescale, that leaves one constant factor.
    expected = madrylab_scores(grads, queries, signs, out_to_loss) * GRAD_DIM / PROJ_DIM
    assert np.isfinite(expected).all()
    assert np.abs(scores.numpy() - expected).max() / np.abs(expected).max() < 1e-5


def test_without_the_rescale_an_ensemble_ignores_the_scale_of_a_members_gradients():
    grads, queries, out_to_loss, signs = make_members(2)
    features, query_features = features_of(grads, signs), features_of(queries, signs)
    out_to_loss = [torch.from_numpy(q) for q in out_to_loss]
    scaled = [features[0], 7 * features[1]], [query_features[0], 7 * query_features[1]]
    torch.testing.assert_close(
        scores_of(*scaled, out_to_loss, damping=1.0), scores_of(features, query_features, out_to_loss, damping=1.0)
    )


def test_equal_members_average_to_one_member():
    grads, queries, out_to_loss, signs = make_members(1)
    features, query_features = features_of(grads, signs), features_of(queries, signs)
    weights = [torch.from_numpy(out_to_loss[0])]
    torch.testing.assert_close(
        scores_of(features * 3, query_features * 3, weights * 3, damping=0.5),
        scores_of(features, query_features, weights, damping=0.5),
    )


@pytest.mark.parametrize("block", [1, 7, 64])
def test_block_size_does_not_change_the_scores(block):
    grads, queries, out_to_loss, signs = make_members(2)
    arguments = features_of(grads, signs), features_of(queries, signs), [torch.from_numpy(q) for q in out_to_loss]
    torch.testing.assert_close(
        scores_of(*arguments, damping=0.3, block=block), scores_of(*arguments, damping=0.3), rtol=1e-12, atol=0
    )


def test_permuting_the_training_set_permutes_the_scores():
    grads, queries, out_to_loss, signs = make_members(1)
    features, query_features = features_of(grads, signs), features_of(queries, signs)
    weights = torch.from_numpy(out_to_loss[0])
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = scores_of([features[0][order]], query_features, [weights[order]], damping=1.0)
    torch.testing.assert_close(shuffled, scores_of(features, query_features, [weights], damping=1.0)[order])


@pytest.mark.parametrize("block", [1, 13, N])
@pytest.mark.parametrize("k", [1, 5, N + 10])
def test_top_k_streams_to_what_a_full_sort_gives_and_ties_keep_the_training_order(block, k):
    scores = torch.randint(-3, 4, (N, N_QUERY), generator=torch.Generator().manual_seed(0)).double()
    proponents, opponents = top_k(iter(scores.split(block)), k)
    rows = np.arange(N)
    for query in range(N_QUERY):
        values = scores[:, query].numpy()
        descending, ascending = np.lexsort((rows, -values))[:k], np.lexsort((rows, values))[:k]
        assert proponents.rows[query].tolist() == descending.tolist()
        assert opponents.rows[query].tolist() == ascending.tolist()
        assert proponents.scores[query].tolist() == values[descending].tolist()


@pytest.mark.parametrize("order", ["rising", "falling", "any"])
def test_top_k_is_that_of_a_full_sort_however_rarely_candidates_are_sorted_in(order):
    """More queries than are ranked together, and hundreds of blocks, of which most have few candidates, or all."""
    scores = torch.randn(1200, 300, generator=torch.Generator().manual_seed(0)).mul(8).round().div(8)
    if order != "any":
        scores = scores + torch.arange(1200).unsqueeze(1) * (1 if order == "rising" else -1)
    proponents, opponents = top_k(iter(scores.split(7)), 5)
    for found, largest in ((proponents, True), (opponents, False)):
        expected = scores.sort(dim=0, descending=largest, stable=True)
        assert torch.equal(found.rows, expected.indices[:5].T)
        assert torch.equal(found.scores, expected.values[:5].T)


@pytest.mark.parametrize("cuts", [[30, 60], [2, 2, 86], [89, 1]])
def test_parts_of_the_training_set_ranked_apart_merge_to_the_whole(cuts):
    scores = torch.randint(-3, 4, (N, N_QUERY), generator=torch.Generator().manual_seed(1)).float()
    whole = top_k(iter([scores]), 6)
    first, parts = 0, []
    for rows in cuts:
        parts.append(top_k(iter([scores[first : first + rows]]), 6, first_row=first))
        first += rows
    for side, largest in ((0, True), (1, False)):
        merged = merge_top_k([part[side] for part in parts], 6, largest=largest)
        assert torch.equal(merged.rows, whole[side].rows)
        assert torch.equal(merged.scores, whole[side].scores)


def test_float32_products_of_a_float64_solve_keep_the_scores_to_round_off():
    """Of features that are nearly linear combinations of each other, with no damping: a solve in float32 would lose all digits."""
    grads, queries, out_to_loss, signs = make_members(1)
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(PROJ_DIM, PROJ_DIM, dtype=torch.float64, generator=generator)).Q
    mix = torch.logspace(0, -3, PROJ_DIM, dtype=torch.float64).unsqueeze(1) * rotation
    phi, query = (features_of([values], signs)[0] @ mix for values in (grads[0], queries[0]))
    expected = trak_scores([phi.numpy()], [query.numpy()], out_to_loss, 0.0)
    single = precondition(query.float(), gram_of(phi), n_rows=N, damping=0.0, dtype=torch.float32)
    block = MemberBlock(phi.float(), torch.from_numpy(out_to_loss[0]).float())
    scores = next(score_blocks(iter([[block]]), [single]))
    assert scores.dtype == torch.float32
    assert np.isfinite(expected).all()
    assert np.abs(scores.numpy() - expected).max() < 2e-4 * expected.std()
    in_float32 = phi.float() @ torch.linalg.solve(gram_of(phi).float(), query.float().T) * block.out_to_loss.unsqueeze(1)
    assert np.abs(in_float32.numpy() - expected).max() > 2e-3 * expected.std()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused_by_row(bad):
    scores = torch.zeros(N, N_QUERY)
    scores[41, 3] = bad
    with pytest.raises(ValueError, match="Scores of training rows 40 to 49 are not finite"):
        top_k(iter(scores.split(10)), 3)


def test_top_k_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no training rows"):
        top_k(iter([]), 3)
