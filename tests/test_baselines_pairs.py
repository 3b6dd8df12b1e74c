"""Baselines of dual encoders: gradients of the contrastive loss against each checkpoint's own bank, and similarities."""

import numpy as np
import pytest
import torch
from models import make_dual_encoder, make_model
from pairs_for_tests import make_processor, pair_rows
from torch.nn.functional import cross_entropy, softplus

from hf_trak import TrakConfig
from hf_trak.evaluation.baselines import Checkpoints, PairSimilarity, TracInCP, make_baseline
from hf_trak.gradients import select_parameters
from hf_trak.tasks import AutoTask, draw_rows

TRAIN, QUERIES = pair_rows(9, captions=2), pair_rows(3, start=20, captions=2)
HEADS = {"clip": ("projection", "logit_scale"), "siglip": ("vision_model.head", "logit_scale", "logit_bias")}
RATES = (0.5, 0.25)


def exact_checkpoints(name, n_models=2):
    """Checkpoints whose features are the gradients of the projections and the temperature themselves."""
    models = [make_dual_encoder(name, seed=seed).eval() for seed in range(n_models)]
    size = sum(parameter.numel() for parameter in select_parameters(models[0], HEADS[name]).parameters.values())
    config = TrakConfig(projector="identity", proj_dim=size, parameters=HEADS[name], bank_size=6)
    return Checkpoints(models, config, make_processor())


def embed(model, rows):
    """The unit vectors of images, and those of each row's captions, in float64."""
    task = AutoTask.from_model(model)
    batch = task.collate(rows[:], make_processor())
    images, captions = task.output_function.embed(model, {**batch, "pixel_values": batch["pixel_values"].double()})
    counts = (batch["caption_weights"] > 0).sum(1).tolist()
    return images, [[captions[slot][row] for slot in range(count)] for row, count in enumerate(counts)]


def loss_gradients(model, rows):
    """Gradients of each pair's training loss against the bank, as plain cross-entropies, in float64."""
    model = model.double()
    with torch.no_grad():
        bank_images, bank_captions = embed(model, TRAIN)
    bank = draw_rows(len(TRAIN), 6, 0).tolist()
    same = rows is TRAIN
    parameters = list(select_parameters(model, HEADS["siglip" if hasattr(model, "logit_bias") else "clip"]).parameters)
    found = []
    for row in range(len(rows)):
        images, captions = embed(model, rows)
        others = [number for number in bank if not (same and number == row)]
        against = torch.stack([bank_images[number] for number in others]), torch.stack([bank_captions[n][0] for n in others])
        losses = []
        for text in captions[row]:
            own = images[row] @ text
            sides = [torch.cat([own[None], against[1] @ images[row]]), torch.cat([own[None], against[0] @ text])]
            logits = [model.logit_scale.exp() * side for side in sides]
            if hasattr(model, "logit_bias"):
                logits = [side + model.logit_bias for side in logits]
                losses.append(softplus(-logits[0][0]) + sum(softplus(side[1:]).sum() for side in logits))
            else:
                losses.append(sum(cross_entropy(side[None], torch.zeros(1, dtype=torch.long)) for side in logits) / 2)
        loss = torch.stack(losses).mean()
        grads = torch.autograd.grad(loss, [model.get_parameter(name) for name in parameters])
        found.append(torch.cat([grad.flatten() for grad in grads]).numpy())
    return np.stack(found)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_tracin_is_the_dot_product_of_gradients_of_the_contrastive_loss(name):
    checkpoints = exact_checkpoints(name)
    scores = TracInCP(checkpoints, learning_rates=RATES)(TRAIN, QUERIES)
    expected = sum(
        rate * loss_gradients(model, TRAIN) @ loss_gradients(model, QUERIES).T
        for rate, model in zip(RATES, checkpoints.models, strict=True)
    )
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_gradients_are_computed_once_for_each_of_loss_and_output_and_bank(monkeypatch):
    checkpoints, asked = exact_checkpoints("clip", 1), []
    features = Checkpoints.featurizer
    monkeypatch.setattr(
        Checkpoints, "featurizer", lambda self, number, **o: asked.append(number) or features(self, number, **o)
    )
    dot = make_baseline("gradient_dot", checkpoints)(TRAIN, QUERIES)
    again = make_baseline("gradient_cosine", checkpoints)(TRAIN, QUERIES)
    assert len(asked) == 2
    outputs = make_baseline("output_gradient_dot", checkpoints)(TRAIN, QUERIES)
    assert len(asked) == 4
    assert np.abs(dot - outputs).max() > 1e-3 * np.abs(outputs).max()
    other_bank = make_baseline("gradient_dot", checkpoints)(TRAIN.select(range(8, -1, -1)), QUERIES)
    assert len(asked) == 6
    assert again.shape == dot.shape
    assert np.abs(other_bank[::-1] - dot).max() > 1e-3 * np.abs(dot).max()


def test_without_a_training_set_there_is_no_bank_and_the_way_out_is_named():
    with pytest.raises(
        ValueError, match=r"CLIPModel holds each pair against a bank.*`columns\(number, dataset, train=train\)`"
    ):
        exact_checkpoints("clip", 1).columns(0, QUERIES)


def test_similarities_are_cosines_of_embeddings():
    checkpoints = exact_checkpoints("clip")
    found = {of: make_baseline(f"similarity_{of}", checkpoints)(TRAIN, QUERIES) for of in ("images", "captions", "mean")}
    expected = {"images": 0.0, "captions": 0.0}
    for model in checkpoints.models:
        sides = [embed(model.double(), rows) for rows in (TRAIN, QUERIES)]
        images, captions = [side[0] for side in sides], [[torch.stack(texts).mean(0) for texts in side[1]] for side in sides]
        texts = [torch.nn.functional.normalize(torch.stack(side), dim=1) for side in captions]
        expected["images"] += (images[0] @ images[1].T).detach().numpy() / 2
        expected["captions"] += (texts[0] @ texts[1].T).detach().numpy() / 2
        model.float()
    for of, values in expected.items():
        np.testing.assert_allclose(found[of], values, atol=1e-5)
    np.testing.assert_allclose(found["mean"], (found["images"] + found["captions"]) / 2, atol=1e-12)
    assert found["images"].std() > 1e-3


def test_what_does_not_suit_is_refused_by_name():
    checkpoints = exact_checkpoints("clip", 1)
    with pytest.raises(ValueError, match=r"CLIPModel has two towers.*PairSimilarity"):
        make_baseline("representation_cosine", checkpoints)(TRAIN, QUERIES)
    with pytest.raises(ValueError, match="The loss of contrastive is not known"):
        make_baseline("influence_arnoldi", checkpoints)(TRAIN, QUERIES)
    with pytest.raises(ValueError, match="BertForSequenceClassification is no dual encoder"):
        PairSimilarity(Checkpoints(make_model("bert")))(TRAIN, QUERIES)
    with pytest.raises(ValueError, match="images, captions, mean, but `of` is 'both'"):
        PairSimilarity(checkpoints, of="both")(TRAIN, QUERIES)
