"""A tokenizer of a few words, with a chat template."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["[PAD]", "</s>", "[UNK]", "<extra_id_0>", "user", "assistant", ":", *"abcdefghij"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the words between spaces."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    result = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>")
    result.chat_template = CHAT_TEMPLATE
    return result
