"""Models of our own: saved and loaded as transformers' are; their gradients are tested with all others, in test_gradients.py."""

import pytest
import torch
from models import bert, image_batch, resnet9, text_batch
from paper_models import BertWithoutTanhForSequenceClassification, ResNet9Config, ResNet9ForImageClassification
from transformers import AutoConfig, AutoModelForImageClassification

from hf_trak import AutoTask
from hf_trak.sources.checkpoints import find_model_class, load_model, register_model_class


def test_resnet9_at_the_papers_width_has_the_papers_size():
    """The published CIFAR-10 model: convolutions of 3, 64, 128 (5 × 5), 128, 128, 256, 256, 256 and 128 channels, 10 classes."""
    channels = [
        (3, 64, 3),
        (64, 128, 5),
        (128, 128, 3),
        (128, 128, 3),
        (128, 256, 3),
        (256, 256, 3),
        (256, 256, 3),
        (256, 128, 3),
    ]
    expected = sum(d_in * d_out * size**2 + 2 * d_out for d_in, d_out, size in channels) + 128 * 10
    model = ResNet9ForImageClassification(ResNet9Config(num_labels=10))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 2_274_880


@pytest.mark.parametrize("size", [12, 32])
def test_resnet9_gives_logits_and_the_mean_cross_entropy(size):
    model, batch = resnet9().eval(), image_batch(size=size)
    result = model(**batch)
    assert result.logits.shape == (5, 3)
    torch.testing.assert_close(result.loss, torch.nn.functional.cross_entropy(result.logits, batch["labels"]))
    loss, logits = model(**batch, return_dict=False)
    torch.testing.assert_close(loss, result.loss)
    torch.testing.assert_close(logits, result.logits)


def test_a_saved_resnet9_loads_by_name_and_through_the_auto_classes(tmp_path):
    model, batch = resnet9(logit_scale=0.5).eval(), image_batch(size=16)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).width == 3
    for loaded in (load_model(str(tmp_path)), AutoModelForImageClassification.from_pretrained(tmp_path)):
        assert type(loaded) is ResNet9ForImageClassification
        torch.testing.assert_close(loaded.eval()(**batch).logits, model(**batch).logits, rtol=0, atol=0)


def test_a_fresh_resnet9_follows_torchs_generator():
    def first_weight(seed):
        torch.manual_seed(seed)
        return ResNet9ForImageClassification(ResNet9Config(width=2)).stem.convolution.weight

    assert torch.equal(first_weight(0), first_weight(0))
    assert not torch.equal(first_weight(0), first_weight(1))


def test_resnet9_is_served_as_image_classification():
    assert AutoTask.from_model(resnet9()).name == "image-classification"


def test_bert_without_tanh_is_bert_but_for_the_tanh(tmp_path):
    ordinary, batch = bert().eval(), text_batch()
    del batch["labels"]
    ordinary.save_pretrained(tmp_path / "ordinary")
    model = BertWithoutTanhForSequenceClassification.from_pretrained(tmp_path / "ordinary").eval()
    assert not torch.allclose(model(**batch).logits, ordinary(**batch).logits)
    first = ordinary.bert(**batch).last_hidden_state[:, 0]
    expected = ordinary.classifier(ordinary.bert.pooler.dense(first))
    torch.testing.assert_close(model(**batch).logits, expected)
    model.save_pretrained(tmp_path / "linear")
    loaded = load_model(str(tmp_path / "linear")).eval()
    assert type(loaded) is BertWithoutTanhForSequenceClassification
    torch.testing.assert_close(loaded(**batch).logits, expected)


def test_a_registered_class_never_takes_the_name_of_another():
    other = type("BertForSequenceClassification", (BertWithoutTanhForSequenceClassification,), {})
    with pytest.raises(ValueError, match=r"are those of transformers.models.bert.modeling_bert. Give the class another name"):
        register_model_class(other)
    assert find_model_class("BertForSequenceClassification").__module__ == "transformers.models.bert.modeling_bert"
    register_model_class(ResNet9ForImageClassification)  # once more
    assert find_model_class("ResNet9ForImageClassification") is ResNet9ForImageClassification
