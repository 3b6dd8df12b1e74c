"""Several sketches in one pass of gradients are the sketches that each makes alone."""

import copy

import pytest
import torch
from models import bert, text_batch

from hf_trak.gradients import GRADIENTS, select_parameters
from hf_trak.projectors import BlockCountSketch, DenseRademacher, Identity, StackedProjector, make_projectors
from hf_trak.tasks import classification_margin, vmappable_attention


def features_of(projector, engine="layerwise"):
    torch.manual_seed(0)
    model = bert()
    with vmappable_attention(model):
        return GRADIENTS[engine](
            model,
            text_batch(),
            output_function=classification_margin,
            parameters=select_parameters(model).parameters,
            projector=projector,
        ).features


@pytest.mark.parametrize("engine", ["layerwise", "functional"])
def test_a_stack_of_block_count_sketches_is_each_of_them_bit_for_bit(engine):
    def make(seed):
        return BlockCountSketch(proj_dim=48, seed=seed, fold=4)

    together = features_of(StackedProjector([make(seed) for seed in (5, 6, 9)]), engine)
    assert together.shape == (5, 3 * 48)
    for part, seed in zip(together.chunk(3, dim=1), (5, 6, 9), strict=True):
        assert torch.equal(part, features_of(make(seed), engine))


def test_projectors_of_different_kinds_and_sizes_stack():
    kinds = [DenseRademacher(proj_dim=10, seed=1), BlockCountSketch(proj_dim=33, seed=2)]
    together = features_of(StackedProjector(kinds))
    for part, projector in zip(together.split([10, 33], dim=1), kinds, strict=True):
        alone = features_of(projector)
        torch.testing.assert_close(part, alone, rtol=1e-5, atol=1e-5 * alone.abs().max().item())


def test_a_stack_survives_being_copied():
    stack = make_projectors("block_count_sketch", proj_dim=16, seeds=[0, 1], fold=4)
    assert torch.equal(features_of(copy.deepcopy(stack)), features_of(stack))


def test_one_seed_needs_no_stack():
    assert isinstance(make_projectors("block_count_sketch", proj_dim=16, seeds=[3]), BlockCountSketch)
    assert isinstance(make_projectors("identity", proj_dim=16, seeds=[3]), Identity)


def test_sketches_that_would_be_equal_are_refused():
    with pytest.raises(ValueError, match=r"Sketch seeds must differ, but are 1, 2, 1"):
        make_projectors("block_count_sketch", proj_dim=16, seeds=[1, 2, 1])
    with pytest.raises(ValueError, match="identity projector has no randomness, so its 2 sketches would be the same"):
        make_projectors("identity", proj_dim=16, seeds=[0, 1])
    with pytest.raises(ValueError, match="at least one projector"):
        StackedProjector([])
