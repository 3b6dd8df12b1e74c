"""Small tokenizers with chat templates: of a few words, and of bytes."""

from __future__ import annotations

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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


_SPECIAL = re.compile(r"<[|｜][^<>\s]*?[|｜]>|</?[A-Za-z_]+>|\[/?[A-Z_]+\]")


def byte_tokenizer(template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, and of the special tokens that a chat template writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    result = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<BOS>", eos_token="<EOS>", pad_token="<PAD>")
    result.add_tokens(sorted(set(_SPECIAL.findall(template))), special_tokens=True)
    result.chat_template = template
    return result
