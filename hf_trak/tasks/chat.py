"""Conversations as token ids, and which of them the assistant wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Messages = Sequence[Mapping[str, Any]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Stands for a message's text while it is looked for; no text begins or ends with these private characters.
_MARK = "\ue000mark\ue001"
_REASONING = "<think>"  # what prompts for an answer end with where the model is made to reason, or not to
_NOT_FOUND = (
    "the chat template does not show which tokens are the assistant's ({}). Mark them in the template with {{% generation %}} and "
    "{{% endgeneration %}}, tokenize the dataset with `labels`, or score all tokens (loss_on='all', --loss_on all)"
)


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with the options of a row.

    Args:
        options (`dict`, *optional*): Arguments of the template, as `apply_chat_template` takes them: `tools`, `enable_thinking`, ….
    """

    tokenizer: Any
    options: Mapping[str, Any]

    @classmethod
    def for_row(cls, row: Mapping[str, Any], tokenizer: Any, options: Mapping[str, Any] | None = None) -> ChatTemplate:
        """Return the template with `options` and with a row's `tools` and `chat_template_kwargs`, which come first.

        Raises:
            ValueError: If the tokenizer has no chat template, or the row's options are no options.
        """
        given = _parse(row.get("chat_template_kwargs"), "chat_template_kwargs", dict) or {}
        tools = _parse(row.get("tools"), "tools", list)
        options = {**(options or {}), **({"tools": tools} if tools is not None else {}), **given}
        if getattr(tokenizer, "chat_template", None) is None and options.get("chat_template") is None:
            raise ValueError("conversations need a tokenizer with a chat template, and this one has none: set `chat_template`")
        return cls(tokenizer, options)

    @property
    def marks_generation(self) -> bool:
        """Whether the template says itself which parts the assistant wrote."""
        template = self.options.get("chat_template")
        if template is None:
            template = self.tokenizer.chat_template
            if not isinstance(template, str):
                template = self.tokenizer.get_chat_template(tools=self.options.get("tools"))
        return _GENERATION.search(template) is not None

    def ids(self, messages: Messages, *, add_generation_prompt: bool = False) -> list[int]:
        """Return a conversation's token ids."""
        return list(self._apply(messages, add_generation_prompt=add_generation_prompt, tokenize=True)["input_ids"])

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Return a conversation's text."""
        return self._apply(messages, add_generation_prompt=add_generation_prompt, tokenize=False)

    def assistant_mask(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Return a conversation's token ids, and which of them the assistant wrote.

        Raises:
            ValueError: If the template does not show it.
        """
        if self.marks_generation:
            found = self._apply(messages, tokenize=True, return_assistant_tokens_mask=True)
            return list(found["input_ids"]), [bool(value) for value in found["assistant_masks"]]
        ids = self.ids(messages)
        mask = [False] * len(ids)
        if not any(message["role"] == "assistant" for message in messages):
            return ids, mask
        text = self.render(messages)
        places = self._places(text, ids)
        added = set(self._added())
        for start, written, stop in find_turns(messages, self.render):
            inside = [i for i, (first, last) in enumerate(places) if last > start and first < last <= stop]
            for i in inside:
                mask[i] = True
            # Where the template closes a turn in no way or, inside a conversation, otherwise than at its end, a special token that
            # follows the message's text ends the turn.
            after = inside[-1] + 1 if inside else len(ids)
            if inside and places[inside[-1]][0] < written and after < len(ids) and ids[after] in added:
                mask[after] = True
        return ids, mask

    def _apply(self, messages: Messages, **options: Any) -> Any:
        tokenizing = {"return_dict": True} if options.get("tokenize") else {}
        return self.tokenizer.apply_chat_template(list(messages), **{**self.options, **options, **tokenizing})

    def _places(self, text: str, ids: list[int]) -> list[tuple[int, int]]:
        """Return each token's first character and the one after its last."""
        if getattr(self.tokenizer, "is_fast", False):
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            if list(found["input_ids"]) == ids:
                return [(int(first), int(last)) for first, last in found["offset_mapping"]]
        raise ValueError(_NOT_FOUND.format("its tokenizer is not a fast one, which knows the characters of a token"))

    def _added(self) -> list[int]:
        return list(self.tokenizer.get_added_vocab().values()) if hasattr(self.tokenizer, "get_added_vocab") else []


def find_turns(messages: Messages, render: Callable[..., str]) -> list[tuple[int, int, int]]:
    """Return where each assistant's turn begins in a rendered conversation, where the text of its message ends, and where the turn ends.

    A turn begins behind the prompt for an answer, an opened block of reasoning belonging to the answer. It ends behind its message's text and all that the template adds to a conversation
    that stops there. The text of a message is found by rendering the conversation with another text in its place, so that the
    template may write earlier messages otherwise once later ones follow.

    Args:
        render (`Callable`): `(messages, add_generation_prompt=False) -> str`.

    Raises:
        ValueError: If a message does not appear, or the messages do not appear in their order.
    """
    text = render(messages)
    turns: list[tuple[int, int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        lower = turns[-1][2] if turns else 0
        if i > 0 and messages[i - 1]["role"] != "assistant" and (found := _find(messages, i - 1, text, render)) is not None:
            lower = found[1]
        elif i > 0 and messages[i - 1]["role"] == "user":
            raise ValueError(_NOT_FOUND.format(f"the text of message {i - 1} is not in the conversation"))
        place = _find(messages, i, text, render)
        if place is None or place[0] < lower:
            raise ValueError(
                _NOT_FOUND.format(f"the text of message {i} is not in the conversation, or not behind that of the one before")
            )
        start = _begin(messages, i, text, lower, place[0], render)
        stop = _end(messages, i, text, place[1], render)
        turns.append((start, place[1], max(start, stop)))
    if any(second[0] < first[2] for first, second in zip(turns, turns[1:], strict=False)):
        raise ValueError(_NOT_FOUND.format("the assistant's messages overlap"))
    return turns


def _find(messages: Messages, number: int, text: str, render: Callable[..., str]) -> tuple[int, int] | None:
    """Return where the text of a message stands in the rendered conversation; None if the template leaves it out."""
    marked = [*messages]
    marked[number] = {**messages[number], "content": _marked(messages[number].get("content"))}
    try:
        other = render(marked)
    except Exception as error:
        raise ValueError(_NOT_FOUND.format(f"it fails with another text in message {number}: {error}")) from error
    if _MARK not in other:
        return None
    start = _common(text, other)
    return start, max(start, len(text) - _common(text[::-1], other[::-1]))


def _marked(content: Any) -> Any:
    if not isinstance(content, (list, tuple)):
        return _MARK
    texts = [i for i, part in enumerate(content) if isinstance(part, Mapping) and part.get("type") == "text"]
    if not texts:
        return [*content, {"type": "text", "text": _MARK}]
    return [{**part, "text": _MARK if i == texts[0] else ""} if i in texts else part for i, part in enumerate(content)]


def _begin(messages: Messages, number: int, text: str, lower: int, content: int, render: Callable[..., str]) -> int:
    """Return where the prompt for an answer ends, which stands between `lower` and the message's text."""
    if number == 0:
        return content
    try:
        before = render(messages[:number])
        prompt = render(messages[:number], add_generation_prompt=True)
    except Exception as error:
        raise ValueError(_NOT_FOUND.format(f"it fails for the messages before message {number}: {error}")) from error
    header = prompt[_common(before, prompt) :]
    reasoning = header[len(header.split(_REASONING)[0]) :]
    header, prompt = header.removesuffix(reasoning), prompt.removesuffix(reasoning)
    if text.startswith(prompt) and lower <= len(prompt) <= content:
        return len(prompt)
    for length in range(len(header), 0, -1):
        if (at := text.rfind(header[:length], lower, content)) >= 0:
            return at + length
    if header:
        raise ValueError(_NOT_FOUND.format(f"the prompt for an answer, {header!r}, does not stand before message {number}"))
    return content


def _end(messages: Messages, number: int, text: str, content: int, render: Callable[..., str]) -> int:
    """Return where a turn ends, given where its message's text does."""
    if number == len(messages) - 1:
        return len(text)
    shorter = messages[: number + 1]
    cut = render(shorter)
    if (place := _find(shorter, number, cut, render)) is None:
        raise ValueError(_NOT_FOUND.format(f"the text of message {number} is not in the conversation that ends there"))
    return content + _common(cut[place[1] :], text[content:])


def _common(first: str, second: str) -> int:
    """Return how many leading characters two texts share."""
    limit = min(len(first), len(second))
    if first[:limit] == second[:limit]:
        return limit
    low, high = 0, limit  # the first difference lies in between
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle)
    return low


def _parse(value: Any, name: str, kind: type) -> Any:
    """Return an option of a row, which may be a JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"its column {name!r} is no JSON: {error}") from error
    if value is None or isinstance(value, kind):
        return value
    raise ValueError(f"its column {name!r} must be a {kind.__name__} or its JSON text, but is {str(value)[:60]!r}")
