"""Models that transformers does not have and the paper's settings need; importing this room makes `AutoConfig` know them."""

from hf_trak.models.bert_without_tanh import BertWithoutTanhForSequenceClassification
from hf_trak.models.resnet9 import ResNet9Config, ResNet9ForImageClassification

__all__ = ["BertWithoutTanhForSequenceClassification", "ResNet9Config", "ResNet9ForImageClassification"]
