"""BERT with a linear pooler: the paper fine-tunes it without the tanh before the classifier."""

from __future__ import annotations

from torch import nn
from transformers import BertConfig, BertForSequenceClassification


class BertWithoutTanhForSequenceClassification(BertForSequenceClassification):
    """`BertForSequenceClassification` whose pooler has no tanh; it loads the same checkpoints.

    Source: Park et al. (2023), [TRAK](https://huggingface.co/papers/2303.14186), appendix on the models' architectures.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert.pooler.activation = nn.Identity()
