"""A prompt and its answer as one row of a language model, and which tokens of the answer are asked about."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from hf_trak.tasks.base import Task
from hf_trak.tasks.chat import ChatTemplate
from hf_trak.tasks.inputs import need_tokenizer
from hf_trak.tasks.language_inputs import CausalInputs, Seq2SeqInputs
from hf_trak.tasks.media_inputs import MediaInputs, encode_prompt, picture_marks, tokenizer_of_processor
from hf_trak.tasks.token_inputs import Example
from hf_trak.tasks.token_outputs import IGNORED

logger = logging.getLogger(__name__)

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation."""

Span = str | tuple[int, int] | range
"""Of an answer: a substring, its first character and the one behind its last, or a range of tokens."""

ANSWER_TASKS = ("causal-lm", "seq2seq", "image-text-to-text")


def answer_task(task: Task) -> Task:
    """Return the task of rows of tokens that are a prompt and an answer, whatever columns the training set has.

    Raises:
        ValueError: If it is not that of a language model that answers a text.
    """
    inputs = task.inputs
    if task.name not in ANSWER_TASKS or not isinstance(inputs, (CausalInputs, Seq2SeqInputs)):
        raise ValueError(
            f"A prompt is answered by decoders ({', '.join(ANSWER_TASKS)}) that read texts, but this index is of {task.name}. Give rows with their answers to "
            "`index.attribute(queries)` (hf-trak attribute)."
        )
    return replace(
        task,
        inputs=replace(inputs, text_columns=None, label_column=None, loss_on="auto", row_format="auto", skip_unscored=False),
    )


@dataclass(frozen=True)
class Answer:
    """An answer behind its prompt.

    Args:
        example ([`Example`]): The row; its labels are the answer's tokens.
        decoder (`bool`): Whether the answer's tokens are a decoder's, and not behind the prompt's.
    """

    example: Example
    tokenizer: Any
    decoder: bool

    @cached_property
    def places(self) -> np.ndarray:
        """Where the answer's tokens are among the labels."""
        found = self.example.labels != IGNORED
        if not self.decoder:
            found[:1] = False  # nothing predicts the first token of a row
        return np.flatnonzero(found)

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def text(self) -> str:
        """The answer as a reader sees it."""
        return self._read(len(self)).rstrip()

    @cached_property
    def ends(self) -> np.ndarray:
        """The number of characters of the answer up to each of its tokens. Tokens that are a part of a character have none of their own."""
        text = self._read(len(self))
        ends = []
        for count in range(1, len(self) + 1):
            part = self._read(count)
            shared = next(
                (i for i, pair in enumerate(zip(part, text, strict=False)) if pair[0] != pair[1]), min(len(part), len(text))
            )
            ends.append(shared)
        return np.maximum.accumulate(np.asarray(ends, dtype=np.int64)) if ends else np.zeros(0, dtype=np.int64)

    @property
    def pieces(self) -> list[str]:
        """The answer's text, token by token; special tokens are empty."""
        text, starts = self._read(len(self)), [0, *self.ends[:-1].tolist()]
        return [text[start:end] for start, end in zip(starts, self.ends.tolist(), strict=True)]

    def row(self, tokens: Sequence[int] | None = None) -> dict[str, Any]:
        """Return a tokenized row.

        Args:
            tokens (`Sequence[int]`, *optional*): Of the answer, those that are scored; by default all.
        """
        example, labels = self.example, np.full_like(self.example.labels, IGNORED)
        chosen = self.places if tokens is None else self.places[np.asarray(tokens)]
        labels[chosen] = example.labels[chosen]
        row = {"input_ids": example.ids, **(example.further or {}), **(example.media or {}), "labels": labels}
        return row if example.decoder_ids is None else {**row, "decoder_input_ids": example.decoder_ids}

    def tokens_of(self, span: Span) -> list[int]:
        """Return which tokens of the answer lie in a span, in whole or in part.

        Raises:
            ValueError: If the span is not in the answer, or more than once.
        """
        if isinstance(span, range):
            if span.step != 1 or not 0 <= span.start < span.stop <= len(self):
                raise ValueError(
                    f"The answer has tokens 0 to {len(self) - 1}: {self.pieces}, but `span` is {span}. Give a range of these."
                )
            return list(span)
        if isinstance(span, str):
            first = self.text.find(span)
            if not span or first < 0:
                raise ValueError(
                    f"`span` {span!r} is not in the answer {self.text!r}. Give a part of it as it is written there."
                )
            if (second := self.text.find(span, first + 1)) >= 0:
                raise ValueError(
                    f"`span` {span!r} is more than once in the answer {self.text!r}, at characters {first} and {second}. Give a longer part, or "
                    f"its characters: ({first}, {first + len(span)})."
                )
            span = (first, first + len(span))
        start, stop = span
        if not 0 <= start < stop <= len(self.text):
            raise ValueError(f"The answer has characters 0 to {len(self.text)}: {self.text!r}, but `span` is {span}.")
        starts = [0, *self.ends[:-1].tolist()]
        # A token without a character of its own is a part of the one that the next token ends.
        return [
            token
            for token, (first, last) in enumerate(zip(starts, self.ends.tolist(), strict=True))
            if (first < stop and last > start) or (first == last and start <= first < stop)
        ]

    def _read(self, count: int) -> str:
        ids = self.example.labels[self.places[:count]].tolist()
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Answering:
    """Makes rows of prompts and answers.

    Args:
        task ([`Task`]): Of an index.
        processing_class: The tokenizer or processor that the training set was read with.
        images (`Sequence`): Pictures that belong to every prompt, in their order.

    Raises:
        MissingProcessor: If there is no tokenizer.
        ValueError: If the task is not that of a language model that answers a text, or reads no pictures, and there are some.
    """

    def __init__(self, task: Task, processing_class: Any, images: Sequence[Any] = ()) -> None:
        self.inputs: Any = answer_task(task).inputs
        self.processing_class = processing_class
        self.images = list(images)
        self.decoder = isinstance(self.inputs, Seq2SeqInputs)
        is_media = isinstance(self.inputs, MediaInputs)
        self.tokenizer = tokenizer_of_processor(processing_class) if is_media else processing_class
        need_tokenizer(self.tokenizer)
        if self.images and (not is_media or self.tokenizer is processing_class):
            raise ValueError(
                f"An index of {task.name} reads no pictures here: "
                + ("leave out `image`." if not is_media else "give the model's processor as `processing_class` (--processor).")
            )

    def needs_template(self, prompt: str) -> bool:
        """Return whether a text has no place for its picture, which the chat template would give it."""
        mark = picture_marks(self.processing_class)
        return mark is not None and mark not in prompt and getattr(self.processing_class, "chat_template", None) is not None

    def prompt(self, prompt: Prompt) -> dict[str, Any]:
        """Return what the model reads of a prompt before it answers: `input_ids`, and what else an encoder takes.

        Raises:
            ValueError: If it has no token, or leaves no room for an answer.
        """
        if self.images:
            return self._with_images(prompt)
        if self.decoder:
            if not isinstance(prompt, str):
                raise ValueError("A conversation is answered by causal language models alone: give the prompt as a text.")
            found, cut = self.inputs._tokenize(self.tokenizer, prompt)
            if cut:
                logger.warning("%d tokens of the prompt are cut off at %s.", cut, self.inputs._describe_limit(self.tokenizer))
            return {"input_ids": list(found["input_ids"]), **self.inputs._further_of(found)}
        ids: Any = self._text(prompt) if isinstance(prompt, str) else self._template().ids(prompt, add_generation_prompt=True)
        if not ids:
            raise ValueError("The prompt has no token. Begin the text that the model is to continue.")
        self._check_room(ids)
        return {"input_ids": ids}

    def _check_room(self, ids: Sequence[int]) -> None:
        if self.room(ids) < 1:
            raise ValueError(
                f"The prompt is {len(ids)} tokens, which leaves no room for an answer within {self.inputs._describe_limit(self.tokenizer)}. "
                "Shorten it."
            )

    def _check_places(self, prompt: Prompt) -> None:
        mark = picture_marks(self.processing_class)
        if self.images and isinstance(prompt, str) and mark is not None and mark not in prompt:
            raise ValueError(
                f"The prompt has no place for its picture. Put {mark!r} where it belongs, as the training rows have it; or ask in a conversation: "
                "chat=True (--chat)."
            )

    def _with_images(self, prompt: Prompt) -> dict[str, Any]:
        """Return what the model reads of a prompt and its pictures, the latter with the axes of a batch of one."""
        self._check_places(prompt)
        try:
            found = encode_prompt(self.inputs, self.processing_class, prompt, self.images)
        except ValueError as error:
            raise ValueError(f"The prompt cannot serve: {error}.") from error
        self._check_room(found["input_ids"].tolist())
        return found

    def room(self, prompt_ids: Sequence[int]) -> int:
        """Return how many tokens an answer may have."""
        limit = int(self.inputs._limit(self.tokenizer))
        return limit if self.decoder else limit - len(prompt_ids)

    def generated(self, prompt: Mapping[str, Any], ids: Sequence[int]) -> Answer:
        """Return an answer that the model gave, as the tokens that it gave.

        Args:
            prompt (`Mapping`): As [`Answering.prompt`] returns it.
            ids (`Sequence[int]`): Behind the prompt, or of the decoder behind its first.
        """
        before = [] if self.decoder else [*prompt["input_ids"]]
        row = {**prompt, "input_ids": [*prompt["input_ids"], *([] if self.decoder else ids)]}
        if not self.decoder:
            for name, values in prompt.items():  # such as the types of tokens, of which those of an answer are plain
                if name != "input_ids" and np.shape(values) == np.shape(before):
                    row[name] = [*values, *([self.inputs.type_of_answers(name)] * len(ids))]
        return self._answer({**row, "labels": [*([IGNORED] * len(before)), *ids]})

    def given(self, prompt: Prompt, answer: str) -> Answer:
        """Return an answer as a row of the training set would have it.

        Raises:
            ValueError: If it is empty, or too long.
        """
        if self.decoder:
            self.prompt(prompt)
            return self._answer({"inputs": prompt, "targets": answer})
        self._check_places(prompt)
        completion = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
        row = {"prompt": prompt, "completion": completion}
        return self._answer({**row, "images": self.images} if self.images else row)

    def _answer(self, row: Mapping[str, Any]) -> Answer:
        try:
            example = self.inputs._example(row, self.processing_class)
            if (reason := self.inputs._unscored(example)) is not None:
                raise ValueError(reason)
        except ValueError as error:
            raise ValueError(f"The answer cannot serve: {error}.") from error
        if example.n_cut and not self.decoder:
            raise ValueError(
                f"Prompt and answer are {len(example.ids) + example.n_cut} tokens, of which {example.n_cut} are cut off by "
                f"{self.inputs._describe_limit(self.tokenizer)}. Shorten them."
            )
        return Answer(example, self.tokenizer, self.decoder)

    def _template(self) -> ChatTemplate:
        return ChatTemplate.for_row({}, self.tokenizer, self.inputs.chat_template_kwargs)

    def _text(self, prompt: str) -> list[int]:
        """Return a text's tokens without what a tokenizer puts behind a whole text."""
        ids = list(self.tokenizer(prompt)["input_ids"])
        plain = list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        end = next((i + len(plain) for i in range(len(ids) - len(plain), -1, -1) if ids[i : i + len(plain)] == plain), len(ids))
        return ids[:end]
