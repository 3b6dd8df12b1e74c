"""Folding the longer side of a weight: what it keeps, and what it costs in precision."""

import math

import pytest
import torch
from test_projectors import CPU, assert_unbiased, dense_variance, inner_products, sketch

from hf_trak.projectors import BlockCountSketch
from hf_trak.projectors import count_sketch as module
from hf_trak.projectors.count_sketch import Fold, folded_shape


@pytest.fixture
def _small_weights_fold(monkeypatch):
    monkeypatch.setattr(module, "_SMALL", 1)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((384, 384), (384, 384)),  # square: never
        ((1536, 384), (384, 384)),  # feed-forward, both ways
        ((384, 1536), (384, 384)),
        ((3072, 1000), (1000, 1000)),
        ((30522, 384), (7631, 384)),  # a vocabulary keeps a quarter of its rows
        ((512, 4608), (512, 1152)),  # a convolution, 3 x 3
        ((2, 384), (2, 384)),  # a head costs nothing
        ((1, 70000), (1, 65536)),
        ((300, 256), (256, 256)),
        ((1024, 100), (656, 100)),  # no smaller than 65,536 entries
    ],
)
def test_the_longer_side_is_folded_to_the_shorter_at_most_fourfold_and_never_small(shape, expected):
    assert folded_shape(*shape, fold=4) == expected
    assert folded_shape(*shape, fold=1) == shape


@pytest.mark.parametrize(("length", "n_buckets"), [(12, 12), (12, 5), (12, 4), (13, 12), (1, 1), (30, 7)])
def test_a_fold_puts_every_entry_with_a_sign_into_its_bucket(length, n_buckets):
    fold = Fold.draw(0, "w", "rows", length=length, n_buckets=n_buckets, device=CPU)
    matrix = fold(torch.eye(length))
    assert matrix.shape == (length, n_buckets)
    assert fold.is_folded == (n_buckets < length)
    expected = torch.zeros(length, n_buckets)
    expected[torch.arange(length), fold.buckets] = fold.signs
    assert torch.equal(matrix, expected)


def test_entries_of_one_block_never_share_a_bucket():
    fold = Fold.draw(3, "w", "rows", length=40, n_buckets=11, device=CPU)
    for block in fold.buckets.split(11):
        assert len(block.unique()) == len(block)
    assert len({*fold.rotations}) > 1


def test_two_entries_share_a_bucket_as_often_as_chance_has_it():
    shared = [
        (buckets[3] == buckets[25]).item()
        for seed in range(2000)
        for buckets in [Fold.draw(seed, "w", "rows", length=30, n_buckets=10, device=CPU).buckets]
    ]
    assert sum(shared) / 2000 == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 2000))


@pytest.mark.usefixtures("_small_weights_fold")
@pytest.mark.parametrize("fold", [2, 4, 100])
@pytest.mark.parametrize(("rows", "columns", "proj_dim"), [(60, 13, 32), (13, 60, 32), (100, 7, 64), (7, 100, 16), (48, 40, 9)])
def test_however_a_folded_gradient_arrives_its_sketch_is_one(rows, columns, proj_dim, fold):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(3, 5, rows, dtype=torch.float64, generator=generator)
    right = torch.randn(3, 5, columns, dtype=torch.float64, generator=generator)
    tokens = torch.randint(0, rows, (3, 5), generator=generator)
    one_hot = torch.nn.functional.one_hot(tokens, rows).double()
    projector = BlockCountSketch(proj_dim=proj_dim, seed=0, fold=fold)
    assert folded_shape(rows, columns, fold=fold) != (rows, columns)

    def whole(factor):
        return sketch(projector, {"w": torch.einsum("bto,bti->boi", factor, right)})

    outer = projector.start(3, dtype=torch.float64, device=CPU)
    projector.add_outer(outer, "w", left, right)
    torch.testing.assert_close(projector.finish(outer), whole(left), rtol=0, atol=1e-11)
    few = projector.start(3, dtype=torch.float64, device=CPU)
    projector.add_rows(few, "w", (rows, columns), tokens, right)
    torch.testing.assert_close(projector.finish(few), whole(one_hot), rtol=0, atol=1e-11)
    assert whole(left).norm() > 0


@pytest.mark.usefixtures("_small_weights_fold")
@pytest.mark.parametrize("shape", [(96, 16), (16, 96)], ids=["rows fold", "columns fold"])
def test_a_fold_is_unbiased_and_adds_no_more_than_its_own_variance(shape):
    """Of a gradient of one rank, the worst case: 2 / (entries kept) more, relative to the squared norms."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(8):
        x = torch.outer(torch.randn(shape[0], generator=generator), torch.randn(shape[1], generator=generator))
        pairs += [(x, x), (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))]
    kept = min(folded_shape(*shape, fold=4), key=lambda n: n == 16)
    estimates = inner_products(
        lambda proj_dim, seed: BlockCountSketch(proj_dim=proj_dim, seed=seed, fold=4), pairs, proj_dim=64, n_seeds=300
    )
    exact = torch.stack([(x.double() * y.double()).sum() for x, y in pairs])
    assert_unbiased(estimates, exact)
    bounds = torch.tensor(
        [dense_variance(x, y, 64) + 2 / kept * x.square().sum().item() * y.square().sum().item() for x, y in pairs]
    )
    assert ((estimates - exact).square().mean(0) / bounds).max() < 1.25


def test_a_fold_below_one_is_refused():
    with pytest.raises(ValueError, match="`fold` must be at least 1, but is 0"):
        BlockCountSketch(proj_dim=8, seed=0, fold=0)


def test_a_folded_sketch_is_pinned():
    grads = torch.zeros(1, 300, 256)
    grads[0, 7, 3], grads[0, 270, 100], grads[0, 299, 255] = 1, 2, 3
    features = sketch(BlockCountSketch(proj_dim=1000, seed=0, fold=4), {"w": grads})[0]
    assert {place: features[place].item() for place in features.nonzero().flatten().tolist()} == {21: -1, 221: -3, 679: 2}
