from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import cache

import pytest
import torch
from models import bert, text_batch
from reference import gradient_loop
from torch import Tensor

from hf_trak.gradients import select_parameters
from hf_trak.projectors import PROJECTORS, BlockCountSketch, DenseRademacher, Identity, Projector, make_projector
from hf_trak.projectors.base import as_matrix
from hf_trak.projectors.count_sketch import draw_ring, longest_side
from hf_trak.tasks import classification_margin

CPU = torch.device("cpu")
PINNED_BLOCK = {0: [9.0, -16.0, 1.0, -13.0, -6.0], 1: [15.0, 7.0, 20.0, 5.0, -6.0]}
PINNED_DENSE = [[1, -1, 1, 1, -1, 1], [-1, 1, 1, -1, 1, -1], [1, -1, -1, -1, 1, -1]]
SKETCHES: dict[str, Callable[..., Projector]] = {"block_count_sketch": BlockCountSketch, "dense_rademacher": DenseRademacher}


def sketch(projector: Projector, grads: dict[str, Tensor]) -> Tensor:
    first = next(iter(grads.values()))
    accumulator = projector.start(len(first), dtype=first.dtype, device=first.device)
    for name, values in grads.items():
        projector.add(accumulator, name, values)
    return projector.finish(accumulator)


def dense_variance(x: Tensor, y: Tensor, proj_dim: int) -> float:
    """The variance of the inner product of two sketches with independent signs."""
    x, y = x.double().flatten(), y.double().flatten()
    return ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x.square() @ y.square())).item() / proj_dim


def inner_products(
    make: Callable[..., Projector], pairs: list[tuple[Tensor, Tensor]], *, proj_dim: int, n_seeds: int
) -> Tensor:
    """Return ⟨φ(x), φ(y)⟩ of each pair under each seed, (n_seeds, n_pairs)."""
    x, y = (torch.stack(side) for side in zip(*pairs, strict=True))
    rows = []
    for seed in range(n_seeds):
        features = sketch(make(proj_dim=proj_dim, seed=seed), {"w": torch.cat([x, y])}).double()
        rows.append((features[: len(x)] * features[len(x) :]).sum(1))
    return torch.stack(rows)


def assert_unbiased(estimates: Tensor, exact: Tensor) -> None:
    assert torch.isfinite(estimates).all()
    standard_error = estimates.std(0) / math.sqrt(len(estimates))
    # A pair whose entries never meet has no error but round-off.
    assert ((estimates.mean(0) - exact).abs() <= 4 * standard_error + 1e-5 * exact.abs()).all()


# Quality: unbiased, and as precise as independent signs, on the gradients that are hard for a structured sketch.


def hard_pairs(rows: int, columns: int, *, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def outer() -> Tensor:
        return torch.outer(normal(rows), normal(columns))

    def hot(*where: int, axis: int) -> Tensor:
        grads = torch.zeros(rows, columns)
        for idx in where:
            grads.select(axis, idx).add_(normal(grads.shape[1 - axis]))
        return grads

    first, second = outer(), outer()
    repeated, other = normal(columns).expand(rows, columns), normal(columns).expand(rows, columns)
    column, same_column = hot(2, axis=1), hot(2, axis=1)
    far = (2, 2 + columns // 2)  # half the ring apart where a row fills the ring
    two_columns, two_rows = hot(*far, axis=1), hot(1, rows // 2, axis=0)
    row = hot(3, axis=0)
    return {
        "normal": (normal(rows, columns), normal(rows, columns)),
        "rank 1, cross": (first, second),
        "rank 1, self": (first, first),
        "repeated rows, cross": (repeated, other),
        "repeated rows, self": (repeated, repeated),
        "hot column, cross": (column, same_column),
        "hot column, self": (column, column),
        "hot column and noise": (10 * column + 0.1 * normal(rows, columns), 10 * same_column + 0.1 * normal(rows, columns)),
        "two hot columns": (two_columns, two_columns),
        "two hot columns, cross": (two_columns, hot(*far, axis=1)),
        "hot row": (row, row),
        "hot row, cross": (row, hot(3, axis=0)),
        "two hot rows": (two_rows, two_rows),
        "two ranks": (first + second, first - 0.5 * second),
    }


SHAPES = {
    "row and ring equal": (48, 64, 64),
    "row half the ring": (48, 32, 64),
    "common factor": (40, 48, 72),
    "row longer than the ring": (24, 100, 64),
    "row twice the ring": (20, 128, 64),
    "coprime": (48, 50, 77),
    "one tile": (16, 24, 128),
    "tall": (160, 8, 64),
}
KINDS = ("row and ring equal", "row longer than the ring", "one tile", "tall")  # of which others are variants, and slow


N_SEEDS, N_DRAWS = 200, 6


def variance_ratios(
    make: Callable[..., Projector], draws: list[dict[str, tuple[Tensor, Tensor]]], *, proj_dim: int
) -> dict[str, float]:
    """Return the variance of each kind of pair over that of independent signs, having checked that it is unbiased.

    Pairs of one kind that are drawn independently have nearly uncorrelated errors under one sketch, so that a ratio rests on
    N_SEEDS * N_DRAWS errors: it is known to 4% where errors are normal, and 25% is six standard errors.
    """
    pairs = [pair for draw in draws for pair in draw.values()]
    estimates = inner_products(make, pairs, proj_dim=proj_dim, n_seeds=N_SEEDS)
    exact = torch.stack([(x.double() * y.double()).sum() for x, y in pairs])
    assert_unbiased(estimates, exact)
    expected = torch.tensor([dense_variance(x, y, proj_dim) for x, y in pairs])
    ratios = ((estimates - exact).square().mean(0) / expected).reshape(len(draws), -1).mean(0)
    return dict(zip(draws[0], ratios.tolist(), strict=True))


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in KINDS else pytest.mark.slow) for case in SHAPES])
def test_block_count_sketch_is_unbiased_and_as_precise_as_independent_signs(case: str):
    rows, columns, proj_dim = SHAPES[case]
    draws = [hard_pairs(rows, columns, seed=seed) for seed in range(N_DRAWS)]
    ratios = variance_ratios(BlockCountSketch, draws, proj_dim=proj_dim)
    assert all(ratio < 1.25 for ratio in ratios.values()), ratios


@pytest.mark.parametrize(
    ("shape", "proj_dim"),
    [
        ((300,), 64),
        pytest.param((64,), 64, marks=pytest.mark.slow),
        pytest.param((40,), 64, marks=pytest.mark.slow),
        ((8, 6, 3, 3), 64),
        pytest.param((6, 1, 5), 16, marks=pytest.mark.slow),
    ],
)
def test_vectors_and_convolutions_are_sketched_as_precisely(shape: tuple[int, ...], proj_dim: int):
    draws = []
    for seed in range(N_DRAWS):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(2, *shape, generator=generator)
        sparse = x * (torch.rand(shape, generator=generator) < 0.1)
        draws.append({"cross": (x, y), "self": (x, x), "sparse": (sparse, sparse + 0.1 * y)})
    ratios = variance_ratios(BlockCountSketch, draws, proj_dim=proj_dim)
    assert all(ratio < 1.25 for ratio in ratios.values()), ratios


def test_dense_rademacher_has_the_variance_its_docstring_gives():
    ratios = variance_ratios(DenseRademacher, [hard_pairs(16, 24, seed=seed) for seed in range(N_DRAWS)], proj_dim=32)
    assert all(abs(ratio - 1) < 0.25 for ratio in ratios.values()), ratios


@cache
def trained_gradients() -> tuple[dict[str, tuple[int, ...]], Tensor]:
    """Gradients of a BERT after some steps: heavy-tailed, and zero for tokens that do not occur."""
    torch.manual_seed(0)
    model = bert(num_hidden_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(20):
        batch = text_batch(n_rows=16, seed=step)
        batch["labels"] = batch["input_ids"][:, 0] % 3
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    parameters = select_parameters(model).parameters
    _, _, grads = gradient_loop(model, text_batch(n_rows=6, seed=99), classification_margin, list(parameters))
    return {name: tuple(parameter.shape) for name, parameter in parameters.items()}, grads.float()


@pytest.mark.slow
def test_real_gradients_are_sketched_as_precisely_as_by_independent_signs():
    shapes, grads = trained_gradients()
    assert (grads == 0).float().mean() > 0.1  # words that do not occur
    blocks = grads.split([math.prod(shape) for shape in shapes.values()], dim=1)
    named = {name: block.reshape(-1, *shape) for (name, shape), block in zip(shapes.items(), blocks, strict=True)}
    proj_dim, n_seeds = 64, 150
    features = torch.stack([sketch(BlockCountSketch(proj_dim=proj_dim, seed=seed), named).double() for seed in range(n_seeds)])
    left, right = torch.triu_indices(len(grads), len(grads))
    estimates = (features[:, left] * features[:, right]).sum(2)
    exact = (grads.double()[left] * grads.double()[right]).sum(1)
    assert_unbiased(estimates, exact)
    variances = torch.tensor([dense_variance(grads[i], grads[j], proj_dim) for i, j in zip(left, right, strict=True)])
    ratios = (estimates - exact).square().mean(0) / variances
    assert ratios.mean() < 1.1
    # One pair's is known to 12%.
    assert ratios.max() < 1.3, ratios


# Structure.


@pytest.mark.parametrize("shape", [(3, 4), (12, 16), (12, 17), (70, 5), (200,), (3, 150), (9, 3, 2, 2), ()])
def test_every_entry_lands_with_weight_one_in_one_bucket(shape: tuple[int, ...]):
    size = math.prod(shape)
    entries = {"w": torch.eye(size).reshape(size, *shape)}
    for proj_dim in (1, 2, 3, 7, 16, 1000):
        matrix = sketch(BlockCountSketch(proj_dim=proj_dim, seed=0), entries)
        assert matrix.shape == (size, proj_dim)
        assert (matrix.abs().sum(1) == 1).all(), proj_dim
        assert (matrix.abs().amax(1) == 1).all(), proj_dim


@pytest.mark.parametrize(("rows", "columns", "proj_dim"), [*SHAPES.values(), (512, 3, 1024), (1000, 16, 64), (30, 1000, 16)])
def test_no_two_rows_of_a_tile_start_at_one_place(rows: int, columns: int, proj_dim: int):
    for seed in range(4):
        for column in BlockCountSketch(proj_dim=proj_dim, seed=seed)._layout("w", (rows, columns), CPU):
            for tile in column.tiles:
                starts = torch.arange(tile.rows.stop - tile.rows.start) * column.width % tile.ring.length
                assert len(starts.unique()) == len(starts)
                assert column.width <= tile.ring.length <= proj_dim
                assert tile.ring.length % 2 == 1


@pytest.mark.parametrize("finely", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_proj_dim_has_a_ring_for_every_width(finely: bool):
    for proj_dim in [*range(1, 400 if finely else 70), 512, 1024, 2047, 4096, 16384]:
        longest = longest_side(proj_dim)
        for width in {longest, *range(1, longest + 1, max(1, longest // (40 if finely else 10)))}:
            ring = draw_ring(7, width, proj_dim=proj_dim).length
            assert longest <= ring <= proj_dim, (proj_dim, width, ring)
            assert math.gcd(ring, width) == 1
            assert ring % 2 == 1


@pytest.mark.parametrize("seed_and_name", [(0, "w"), (1, "v")])
def test_the_block_count_sketch_is_pinned(seed_and_name: tuple[int, str]):
    seed, name = seed_and_name
    features = sketch(BlockCountSketch(proj_dim=5, seed=seed), {name: torch.arange(1.0, 15.0).reshape(1, 7, 2)})
    assert features.tolist() == [PINNED_BLOCK[seed]]


def test_the_dense_signs_are_pinned():
    signs = DenseRademacher(proj_dim=6, seed=0).signs("w", torch.tensor([0, 1, 1000]))
    assert signs.tolist() == PINNED_DENSE


def test_dense_entries_are_signs_over_the_square_root_of_proj_dim():
    matrix = sketch(DenseRademacher(proj_dim=16, seed=0), {"w": torch.eye(40)})
    assert torch.equal(matrix.abs(), torch.full((40, 16), 0.25))


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("proj_dim", [1, 33, 64])
def test_a_sketch_is_linear(name: str, proj_dim: int):
    x, y = torch.randn(2, 3, 20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projector = SKETCHES[name](proj_dim=proj_dim, seed=0)
    combined = sketch(projector, {"w": 2 * x - 3 * y})
    assert combined.norm() > 0
    torch.testing.assert_close(combined, 2 * sketch(projector, {"w": x}) - 3 * sketch(projector, {"w": y}), rtol=0, atol=1e-11)


def make(name: str, proj_dim: int, size: int) -> Projector:
    if name == "identity":
        return Identity(proj_dim=size, sizes={"w": size})
    return SKETCHES[name](proj_dim=proj_dim, seed=0)


FACTORED = [(48, 64, 64), (48, 32, 64), (24, 100, 64), (7, 5, 1), (7, 5, 1000), (33, 17, 50), (1, 9, 4), (130, 3, 12)]


@pytest.mark.parametrize("name", PROJECTORS)
@pytest.mark.parametrize(("rows", "columns", "proj_dim"), FACTORED)
def test_factored_gradients_have_the_sketch_of_their_product(name: str, rows: int, columns: int, proj_dim: int):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(3, 5, rows, dtype=torch.float64, generator=generator)
    right = torch.randn(3, 5, columns, dtype=torch.float64, generator=generator)
    projector = make(name, proj_dim, rows * columns)
    accumulator = projector.start(3, dtype=torch.float64, device=CPU)
    projector.add_outer(accumulator, "w", left, right)
    expected = sketch(projector, {"w": torch.einsum("bto,bti->boi", left, right)})
    assert expected.norm() > 0
    torch.testing.assert_close(projector.finish(accumulator), expected, rtol=0, atol=1e-11)


def test_a_factored_gradient_too_large_for_one_chunk_has_the_sketch_of_its_product(monkeypatch):
    import hf_trak.projectors.count_sketch as module

    generator = torch.Generator().manual_seed(0)
    left = torch.randn(2, 3, 70, dtype=torch.float64, generator=generator)
    right = torch.randn(2, 3, 10, dtype=torch.float64, generator=generator)
    projector = BlockCountSketch(proj_dim=64, seed=0)
    for chunk in (1, 150, 1000):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        accumulator = projector.start(2, dtype=torch.float64, device=CPU)
        projector.add_outer(accumulator, "w", left, right)
        expected = sketch(projector, {"w": torch.einsum("bto,bti->boi", left, right)})
        torch.testing.assert_close(projector.finish(accumulator), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", PROJECTORS)
@pytest.mark.parametrize(("rows", "columns", "proj_dim"), FACTORED)
def test_gradients_of_a_few_rows_have_the_sketch_of_the_whole_matrix(name: str, rows: int, columns: int, proj_dim: int):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, rows, (3, 5), generator=generator)
    tokens[1] = tokens[1, 0]  # one row, five times
    values = torch.randn(3, 5, columns, dtype=torch.float64, generator=generator)
    whole = torch.zeros(3, rows, columns, dtype=torch.float64)
    for example in range(3):
        for token in range(5):
            whole[example, tokens[example, token]] += values[example, token]
    projector = make(name, proj_dim, rows * columns)
    accumulator = projector.start(3, dtype=torch.float64, device=CPU)
    projector.add_rows(accumulator, "w", (rows, columns), tokens, values)
    expected = sketch(projector, {"w": whole})
    assert expected.norm() > 0
    torch.testing.assert_close(projector.finish(accumulator), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SKETCHES)
def test_float32_sketches_are_within_round_off_of_float64_ones(name: str):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(3, 5, 40, generator=generator), torch.randn(3, 5, 60, generator=generator)
    features = []
    for dtype in (torch.float32, torch.float64):
        projector = SKETCHES[name](proj_dim=64, seed=0)
        accumulator = projector.start(3, dtype=dtype, device=CPU)
        projector.add_outer(accumulator, "w", left.to(dtype), right.to(dtype))
        features.append(projector.finish(accumulator))
    assert [values.dtype for values in features] == [torch.float32, torch.float64]
    assert ((features[0] - features[1]).norm(dim=1) < 2e-6 * features[1].norm(dim=1)).all()


@pytest.mark.parametrize("name", SKETCHES)
def test_the_split_into_batches_does_not_change_a_sketch(name: str):
    grads = torch.randn(6, 30, 40, generator=torch.Generator().manual_seed(0))
    projector = SKETCHES[name](proj_dim=64, seed=0)
    whole = sketch(projector, {"w": grads})
    for split in ([1] * 6, [2, 4], [5, 1]):
        pieces = torch.cat([sketch(projector, {"w": piece}) for piece in grads.split(split)])
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("block_size", [1, 7, 100, 10**6])
def test_block_size_does_not_change_the_dense_sketch(block_size: int):
    grads = torch.randn(2, 13, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = sketch(DenseRademacher(proj_dim=40, seed=1), {"w": grads})
    actual = sketch(DenseRademacher(proj_dim=40, seed=1, block_size=block_size), {"w": grads})
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_a_dense_column_does_not_depend_on_proj_dim():
    positions = torch.arange(100)
    wide = DenseRademacher(proj_dim=100, seed=0).signs("w", positions)
    for proj_dim in (1, 31, 32, 33, 64):
        assert torch.equal(DenseRademacher(proj_dim=proj_dim, seed=0).signs("w", positions), wide[:, :proj_dim])


@pytest.mark.parametrize("name", SKETCHES)
def test_a_parameters_sketch_does_not_depend_on_the_others_or_their_order(name: str):
    generator = torch.Generator().manual_seed(0)
    grads = {key: torch.randn(2, 9, 8, dtype=torch.float64, generator=generator) for key in ("a", "b", "c")}
    alone = {key: sketch(SKETCHES[name](proj_dim=16, seed=0), {key: values}) for key, values in grads.items()}
    for order in ("abc", "cba", "bca", "ab", "ca"):
        together = sketch(SKETCHES[name](proj_dim=16, seed=0), {key: grads[key] for key in order})
        torch.testing.assert_close(together, sum(alone[key] for key in order), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SKETCHES)
def test_a_sketch_is_the_same_in_another_object_and_does_not_touch_torchs_generator(name: str):
    grads = {"w": torch.randn(2, 9, 8)}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sketch(SKETCHES[name](proj_dim=16, seed=5), grads)
    torch.manual_seed(1)
    assert torch.equal(sketch(SKETCHES[name](proj_dim=16, seed=5), grads), first)
    torch.manual_seed(0)
    sketch(SKETCHES[name](proj_dim=16, seed=6), grads)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("what", ["seeds", "names"])
def test_sketches_of_other_seeds_and_names_are_unrelated(name: str, what: str):
    x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    make = SKETCHES[name]
    products = []
    for seed in range(200):
        first = sketch(make(proj_dim=32, seed=2 * seed), {"w": x})
        other = (2 * seed + 1, "w") if what == "seeds" else (2 * seed, "v")
        second = sketch(make(proj_dim=32, seed=other[0]), {other[1]: x})
        products.append((first * second).sum() / x.square().sum())
    values = torch.stack(products)
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))
    # Of unrelated vectors of length 1 in 32 dimensions.
    assert values.square().mean() == pytest.approx(1 / 32, rel=0.4)


@pytest.mark.parametrize("name", SKETCHES)
def test_neighbouring_entries_of_one_shape_have_signs_of_their_own(name: str):
    """Two parameters of one shape never share their randomness, however alike their names."""
    grads = torch.eye(36).reshape(36, 6, 6)
    matrices = [sketch(SKETCHES[name](proj_dim=64, seed=0), {key: grads}) for key in ("layer.1.w", "layer.11.w", "layer.1.w2")]
    assert not any(torch.equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i])


@pytest.mark.parametrize("name", PROJECTORS)
@pytest.mark.parametrize("duplicate", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_projector_survives_being_copied(name: str, duplicate: Callable[[Projector], Projector]):
    grads = {"w": torch.randn(2, 9, 8)}
    projector = make(name, 16, 72)
    expected = sketch(projector, grads)
    copied = duplicate(projector)
    assert torch.equal(sketch(copied, grads), expected)
    assert (copied.proj_dim, copied.seed) == (projector.proj_dim, projector.seed)


def test_identity_lays_parameters_side_by_side_as_declared():
    projector = Identity(proj_dim=10, sizes={"a": 6, "b": 4})
    a, b = torch.randn(2, 2, 3), torch.randn(2, 4)
    assert torch.equal(sketch(projector, {"b": b, "a": a}), torch.cat([a.flatten(1), b], dim=1))


def test_identity_refuses_another_proj_dim_than_the_gradients():
    with pytest.raises(ValueError, match=r"keeps all 1,200 gradient entries, but proj_dim is 100; set proj_dim=1200"):
        make_projector("identity", proj_dim=100, seed=0).lay_out({"a": 200, "b": 1000})


def test_as_matrix_keeps_the_first_axis():
    assert [as_matrix(shape) for shape in [(), (5,), (3, 4), (8, 6, 3, 3)]] == [(1, 1), (1, 5), (3, 4), (8, 54)]


def test_make_projector_makes_each_by_name():
    for name, kind in PROJECTORS.items():
        projector = make_projector(name, proj_dim=8, seed=3)
        assert type(projector) is kind
        assert (projector.proj_dim, projector.seed) == (8, 3)


def test_an_unknown_projector_is_answered_with_those_there_are():
    with pytest.raises(
        ValueError, match="Unknown projector 'sjlt'; choose one of block_count_sketch, dense_rademacher, identity"
    ):
        make_projector("sjlt", proj_dim=8, seed=0)


@pytest.mark.parametrize("name", PROJECTORS)
@pytest.mark.parametrize("proj_dim", [0, -1])
def test_a_proj_dim_below_one_is_refused(name: str, proj_dim: int):
    with pytest.raises(ValueError, match=f"`proj_dim` must be at least 1, but is {proj_dim}"):
        make_projector(name, proj_dim=proj_dim, seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize(("rows", "columns", "proj_dim"), FACTORED)
def test_a_sketch_is_the_same_on_cuda(name: str, rows: int, columns: int, proj_dim: int):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(3, 5, rows, dtype=torch.float64, generator=generator)
    right = torch.randn(3, 5, columns, dtype=torch.float64, generator=generator)
    tokens = torch.randint(0, rows, (3, 5), generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        projector = SKETCHES[name](proj_dim=proj_dim, seed=0)
        accumulator = projector.start(3, dtype=torch.float64, device=torch.device(device))
        projector.add(accumulator, "a", torch.einsum("bto,bti->boi", left, right).to(device))
        projector.add_outer(accumulator, "b", left.to(device), right.to(device))
        projector.add_rows(accumulator, "c", (rows, columns), tokens.to(device), right.to(device))
        results.append(projector.finish(accumulator).cpu())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)
