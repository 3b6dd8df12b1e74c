"""Dropout masks: one mask for all rows, whatever batch they arrive in."""

import numpy as np
import pytest
import torch
from datasets_for_tests import token_rows
from models import bert, make_model, resnet
from torch import nn

from hf_trak import Featurizer, TrakConfig
from hf_trak.gradients import dropout_mask
from hf_trak.gradients.layer_patches import draw_mask

CPU = torch.device("cpu")
CONFIG = TrakConfig(proj_dim=64)


def featurize_all(featurizer, dataset, batch_size):
    batches = [featurizer(dataset[start : start + batch_size]) for start in range(0, len(dataset), batch_size)]
    return np.concatenate([batch["trak_features"] for batch in batches])


def test_units_are_dropped_with_their_probability_and_the_rest_scaled():
    mask = draw_mask(7, (40_000,), drop=0.3, device=CPU)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs((mask == 0).double().mean().item() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 40_000)


def test_a_units_fate_does_not_depend_on_how_many_there_are():
    small, large = draw_mask(7, (2, 3, 4), drop=0.5, device=CPU), draw_mask(7, (3, 8, 9), drop=0.5, device=CPU)
    assert torch.equal(large[:2, :3, :4], small)


def test_a_thinned_network_is_the_network_without_those_units():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).eval()
    inputs = torch.randn(5, 3)
    with dropout_mask(model, 4):
        hidden = model[1](torch.ones(1, 8))[0]
        outputs = model(inputs)
    assert set(hidden.tolist()) == {0.0, 2.0}
    torch.testing.assert_close(outputs, (model[0](inputs) * hidden) @ model[2].weight.T + model[2].bias)
    assert torch.equal(model[1](inputs), inputs), "nothing stays behind"


def test_every_token_of_every_row_lacks_the_same_units():
    model = nn.Sequential(nn.Dropout(0.5)).eval()
    with dropout_mask(model, 0):
        dropped = model(torch.ones(3, 7, 16))
        assert torch.equal(dropped, dropped[:1, :1].expand(3, 7, 16))
        attention = model(torch.ones(3, 2, 7, 7))
        assert torch.equal(attention, attention[:1].expand(3, 2, 7, 7))
    assert attention[0].std() > 0
    channels = nn.Sequential(nn.Dropout2d(0.5)).eval()
    with dropout_mask(channels, 0):
        picture = channels(torch.ones(2, 16, 4, 4))
    assert torch.equal(picture, picture[:1, :, :1, :1].expand(2, 16, 4, 4))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_features_of_a_dropout_member_do_not_depend_on_the_batch(batch_size):
    featurizer = Featurizer(make_model("bert"), CONFIG, dropout_seed=3)
    whole = featurize_all(featurizer, token_rows(11), 11)
    np.testing.assert_allclose(featurize_all(featurizer, token_rows(11), batch_size), whole, atol=2e-6 * np.abs(whole).max())


def test_dropout_seeds_make_other_members_and_none_makes_the_whole_network():
    model = make_model("bert")
    one, two, whole = (featurize_all(Featurizer(model, CONFIG, dropout_seed=seed), token_rows(4), 4) for seed in (0, 1, None))
    for first, second in ((one, two), (one, whole), (two, whole)):
        assert np.abs(first - second).max() > 0.05 * np.abs(whole).max()
    assert np.array_equal(featurize_all(Featurizer(model, CONFIG), token_rows(4), 4), whole)


def test_layerwise_and_functional_gradients_see_the_same_network():
    model = make_model("bert")
    layerwise = featurize_all(Featurizer(model, CONFIG, dropout_seed=1), token_rows(4), 4)
    config = TrakConfig(proj_dim=64, gradients="functional")
    functional = featurize_all(Featurizer(model, config, dropout_seed=1), token_rows(4), 4)
    np.testing.assert_allclose(functional, layerwise, atol=3e-6 * np.abs(layerwise).max())


def test_a_network_without_dropout_is_refused():
    for model in (resnet(), bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)):
        with pytest.raises(ValueError, match="has no dropout module with a probability above 0"), dropout_mask(model, 0):
            pass
