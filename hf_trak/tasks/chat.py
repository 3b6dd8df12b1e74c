"""Conversations as token ids, and which of them the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(messages: Messages, tokenizer: Any, *, prompt: int | None = None) -> tuple[list[int], list[bool]]:
    """Return a conversation's token ids, and a mask of those the assistant wrote.

    A template that marks them with `{% generation %}` is believed. With any other, an assistant's message is what the template adds
    to the conversation before it, prompt for an answer included; that needs a template whose longer conversations begin with its
    shorter ones.

    Args:
        prompt (`int`, *optional*): If given, the messages after this many count, instead of the assistant's.

    Raises:
        ValueError: If the tokenizer has no chat template, or the template rewrites earlier messages.
    """
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        raise ValueError("conversations need a tokenizer with a chat template, and this one has none: set `chat_template`")
    if prompt is None and isinstance(template, str) and _GENERATION.search(template):
        found = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), [bool(value) for value in found["assistant_masks"]]
    ids = _ids(messages, tokenizer)
    mask = [False] * len(ids)
    counted = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in counted if prompt is None else range(prompt, len(messages)):
        before = _ids(messages[:i], tokenizer, add_generation_prompt=messages[i]["role"] == "assistant") if i else []
        through = _ids(messages[: i + 1], tokenizer)
        if ids[: len(through)] != through or through[: len(before)] != before:
            raise ValueError(
                "the chat template writes earlier messages otherwise once later ones follow, so that it does not show which tokens "
                "are the assistant's: mark them in the template with {% generation %}, or tokenize the dataset with `labels`"
            )
        mask[len(before) : len(through)] = [True] * (len(through) - len(before))
    return ids, mask


def _ids(messages: Messages, tokenizer: Any, *, add_generation_prompt: bool = False) -> list[int]:
    found = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
    )
    return list(found["input_ids"])
