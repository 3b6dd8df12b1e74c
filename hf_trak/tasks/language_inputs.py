"""Rows of causal, masked and sequence-to-sequence language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_trak.tasks.chat import ChatTemplate
from hf_trak.tasks.columns import find_whole_text, is_set_aside, refuse_pairs, refuse_unserved
from hf_trak.tasks.formats import as_known_row, read_format
from hf_trak.tasks.inputs import need_tokenizer
from hf_trak.tasks.padding import is_packed, refuse_packed
from hf_trak.tasks.pictures import find_image_columns
from hf_trak.tasks.token_inputs import Example, TokenInputs, labels_like, need_columns, text_of
from hf_trak.tasks.token_outputs import IGNORED, DecoderInputs

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedModel

    from hf_trak.config import TrakConfig

_SOURCES = ("inputs", "input", "inputs_pretokenized", "source", "prompt", "question", "document", "text")
_TARGETS = ("targets", "target", "targets_pretokenized", "labels", "label", "completion", "output", "answer", "summary")
# Of a text in parts, which training joins in a way of its own.
_FURTHER_PARTS = (
    "context",
    "contexts",
    "passage",
    "paragraph",
    "instruction",
    "system",
    "system_prompt",
    "choices",
    "options",
    "history",
)
_TEXT = "text"  # the column that SFTTrainer reads by default
_MASKS = {
    "assistant": ("assistant_masks",),
    "completion": ("completion_mask",),
    "auto": ("assistant_masks", "completion_mask"),
    "all": (),
}


def find_texts(
    strings: Sequence[str], *, text_columns: Sequence[str] | None = None, label_column: str | None = None
) -> tuple[str | None, str | None]:
    """Return which of some columns of strings holds a text, and which its target; None for what is not found."""
    target = label_column or next((name for name in _TARGETS if name in strings), None)
    rest = [name for name in strings if name != target]
    source = text_columns[0] if text_columns else None
    return source or next((name for name in _SOURCES if name in rest), rest[0] if len(rest) == 1 else None), target


class CausalInputs(TokenInputs):
    """Rows of a causal language model.

    They hold, as TRL's and transformers' users have them, the first of these that is found:

    - `input_ids`, with `labels` (or TRL's `assistant_masks` and `completion_mask`); without, every token is scored;
    - `prompt` and `completion`, both texts or both conversations;
    - `messages`: a conversation;
    - `text`, or the one text column.

    What is scored is what TRL's `SFTTrainer` trains on with the same settings: by default the completion, all of a conversation, all of
    a text; the EOS token, which is appended to texts and completions, is scored too. `loss_on="assistant"` is its
    `assistant_only_loss=True`, `"completion"` its `completion_only_loss=True`, `"all"` its `completion_only_loss=False`. Rows longer
    than `max_length` are cut at their end. The first token of a row is never scored, since nothing predicts it. Columns `tools` and
    `chat_template_kwargs` are options of the chat template. Packed rows (`seq_lengths`, or `position_ids` that begin again) keep their
    documents apart.
    """

    task_name = "causal-lm"

    @classmethod
    def _format(cls, config: TrakConfig) -> str:
        if config.row_format != "auto" and config.text_columns is not None:
            raise ValueError(
                f"row_format={config.row_format!r} says which columns are read, but `text_columns` names others. Leave one of them out."
            )
        return config.row_format if cls is CausalInputs else super()._format(config)

    def _refuse_formats(self, features: Features) -> None:
        if self.row_format != "auto":
            read_format(features, self.row_format)
        elif self.text_columns is None and _TEXT not in features:
            refuse_unserved(features, self.task_name)

    def _check_columns(self, features: Features, processing_class: Any) -> None:
        kind = self._kind(features)
        if (
            self.loss_on == "assistant"
            and kind in ("text", "tokens")
            and "assistant_masks" not in features
            and "labels" not in features
        ):
            raise ValueError(
                f"loss_on='assistant' needs conversations ('messages', or 'prompt' and 'completion') or tokens with 'assistant_masks', but the "
                f"dataset has {', '.join(features)}. Leave out `loss_on`, or set it to 'all' (--loss_on all)."
            )
        if (
            self.loss_on == "completion"
            and kind != "completion"
            and not (kind == "tokens" and {"completion_mask", "labels"} & set(features))
        ):
            raise ValueError(
                "loss_on='completion' needs the columns 'prompt' and 'completion', or tokens with a 'completion_mask', but the dataset has "
                f"{', '.join(features)}. For conversations, set loss_on='assistant' or 'all' (--loss_on)."
            )
        if kind != "tokens":
            if kind == "text":
                self._text_column(features, self._string_columns(features))
            need_tokenizer(processing_class)

    def _is_tokenized(self, columns: Any) -> bool:
        return super()._is_tokenized(columns) or ("input_ids" in columns and {"document_id", "chunk_id"} <= set(columns))

    def _kind(self, columns: Any) -> str:
        """Return what rows with some columns hold: tokens, completion, messages or text."""
        if self._is_tokenized(columns):
            return "tokens"
        if self.row_format != "auto":
            return "completion" if self.row_format == "alpaca" else "messages"
        if self.text_columns is None:
            if "prompt" in columns and "completion" in columns:
                return "completion"
            if "messages" in columns:
                return "messages"
        return "text"

    def _text_column(self, columns: Any, strings: Sequence[str]) -> str:
        return self.text_column_of(columns, strings, self.text_columns)

    @staticmethod
    def text_column_of(columns: Any, strings: Sequence[str], text_columns: Sequence[str] | None) -> str:
        """Return the one column of texts.

        Raises:
            ValueError: If there is none, or several may be meant.
        """
        if text_columns is not None:
            need_columns(columns, text_columns, "The text")
            if len(text_columns) != 1:
                raise ValueError(f"causal-lm reads one text column, but `text_columns` names {', '.join(text_columns)}.")
            return text_columns[0]
        if _TEXT in strings:
            return _TEXT
        refuse_pairs(columns, strings)
        strings = [name for name in strings if not is_set_aside(name)]
        if len(strings) > 1 and (whole := find_whole_text(strings)) is not None:
            return whole
        if len(strings) != 1:
            raise ValueError(
                "Expected tokenized rows ('input_ids'), 'messages', 'prompt' and 'completion', or one text column, but the dataset has "
                f"{', '.join(columns)}. Set `text_columns` to the column that holds the whole training text."
            )
        return strings[0]

    def _texts_read(self, features: Features) -> dict[str, Any]:
        kind = self._kind(features)
        if self.row_format != "auto":
            return read_format(features, self.row_format)
        if kind == "text":
            return {"text": [self._text_column(features, self._string_columns(features))]}
        options = {name: name for name in ("tools", "chat_template_kwargs") if name in features}
        return (
            {"prompt": "prompt", "completion": "completion", **options}
            if kind == "completion"
            else {"messages": "messages", **options}
        )

    def _label_of_tokens(self, features: Features) -> Any:
        label = super()._label_of_tokens(features)
        masks = [name for name in _MASKS[self.loss_on] if name in features]
        return label or ((masks if len(masks) > 1 else masks[0]) if masks else None)

    def _check_packed(self) -> None:
        if "position_ids" not in self.accepted:
            raise refuse_packed("this model, which takes no position_ids, cannot keep apart")
        if self.vmapped:
            raise refuse_packed("gradients='functional' cannot keep apart; use gradients='layerwise'")

    def _encode(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        kind = self._kind(row)
        if kind == "tokens":
            return self._encode_tokens(row)
        if self.row_format != "auto":
            row = as_known_row(row, self.row_format)
        if kind == "messages":
            return self._cut(*self._conversation(row, processing_class), processing_class)
        if kind == "completion":
            return self._cut(*self._completion(row, processing_class), processing_class)
        strings = [name for name, value in row.items() if isinstance(value, str) or name == _TEXT] or [
            name for name, value in row.items() if value is None
        ]
        text = with_eos(text_of(row, self._text_column(row, strings)), processing_class)
        found = list(processing_class(text)["input_ids"])
        if self.in_chunks and len(found) > self._limit(processing_class):
            raise ValueError(
                f"it is {len(found)} tokens, more than the {self._limit(processing_class)} of a chunk; ask `index.attribute(queries)` or "
                "`index.featurize_queries(queries)`, which cut it"
            )
        return self._cut(found, [True] * len(found), processing_class)

    def _encode_tokens(self, row: Mapping[str, Any]) -> Example:
        example, kept = self._tokens_of(row)
        labels = self._labels(row, example.ids, kept)
        if example.positions is not None:  # nothing in a document predicts its first token
            labels = np.where(example.positions == 0, IGNORED, labels)
        if is_packed(example.positions) or len(labels) == 0 or (labels[1:] != IGNORED).any() or labels[0] == IGNORED:
            return example._replace(labels=labels)
        return example._replace(
            labels=labels, unscored="no token of it is scored: only its first could be, which nothing predicts"
        )

    def _labels(self, row: Mapping[str, Any], ids: np.ndarray, kept: np.ndarray) -> np.ndarray:
        column = self.label_column or "labels"
        if column in row:
            return labels_like(row, column, kept)
        if self.label_column is not None:
            raise ValueError(f"it has no column {column!r}")
        scored = np.ones(len(ids), dtype=bool)
        for mask in _MASKS[self.loss_on]:
            if mask in row:
                scored &= labels_like(row, mask, kept).astype(bool)
        return np.where(scored, ids, IGNORED)

    def _conversation(self, row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
        messages = conversation_of(row, "messages")
        template = ChatTemplate.for_row(row, tokenizer, self.chat_template_kwargs)
        if self.loss_on == "assistant":
            return template.assistant_mask(messages)
        ids = template.ids(messages)
        return ids, [True] * len(ids)

    def _completion(self, row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
        conversation = not isinstance(row["prompt"], str) and row["prompt"] is not None
        if conversation:
            prompt, completion = conversation_of(row, "prompt"), conversation_of(row, "completion")
            template = ChatTemplate.for_row(row, tokenizer, self.chat_template_kwargs)
            before = template.ids(prompt, add_generation_prompt=True)
            if self.loss_on == "assistant":
                ids, mask = template.assistant_mask([*prompt, *completion])
            else:
                ids = template.ids([*prompt, *completion])
                mask = [True] * len(ids)
        elif self.loss_on == "assistant":
            raise ValueError("loss_on='assistant' needs conversations, but its 'prompt' is a text; use 'completion' or 'all'")
        else:
            text = text_of(row, "prompt")
            before = list(tokenizer(text)["input_ids"])
            ids = list(tokenizer(text + with_eos(text_of(row, "completion"), tokenizer))["input_ids"])
            mask = [True] * len(ids)
        if self.loss_on == "all":
            return ids, mask
        # A token across the border, and what the template writes otherwise behind a prompt alone, belong to the completion.
        shared = next(
            (i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), min(len(before), len(ids))
        )
        return ids, [scored and i >= shared for i, scored in enumerate(mask)]

    def _cut(self, ids: Sequence[int], mask: Sequence[bool], tokenizer: Any) -> Example:
        limit = self._limit(tokenizer)
        whole = np.asarray(ids, dtype=np.int64)
        labels = np.where(np.asarray(mask, dtype=bool), whole, IGNORED)
        tokens, n_cut, unscored = whole[:limit], max(0, len(whole) - limit), None
        if len(whole) and not (labels[1:limit] != IGNORED).any():
            if (labels[1:] != IGNORED).any():
                unscored = f"all its scored tokens are cut away by {self._describe_limit(tokenizer)}"
            elif not any(mask):
                unscored = (
                    "no token of it is scored: it has no turn of the assistant"
                    if self.loss_on == "assistant"
                    else "its completion is empty"
                )
            else:
                unscored = "no token of it is scored: only its first could be, which nothing predicts"
        return Example(tokens, labels[:limit], n_cut=n_cut, unscored=unscored)

    def _scores(self, example: Example) -> bool:
        return bool((example.labels[1:] != IGNORED).any())


def with_eos(text: str, tokenizer: Any) -> str:
    """Return a text that ends with the EOS token, as TRL makes it."""
    eos = getattr(tokenizer, "eos_token", None)
    return text if eos is None or text.endswith(eos) else text + eos


def conversation_of(row: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    """Return a conversation; raise a ValueError if it is none."""
    messages = row[column]
    if not isinstance(messages, (list, tuple)) or not all(isinstance(turn, Mapping) and "role" in turn for turn in messages):
        raise ValueError(
            f"its {column!r} must be a list of messages with 'role' and 'content', but is {str(messages)[:60]}; mend it, or filter it out"
        )
    for number, turn in enumerate(messages):
        if turn.get("content") is None and all(value is None for name, value in turn.items() if name not in ("role", "name")):
            raise ValueError(
                f"message {number} of its {column!r} ({turn['role']}) has no content (None); fill it in, or filter the row out"
            )
    return list(messages)


class MaskedInputs(TokenInputs):
    """Rows of a masked language model: `input_ids` with some tokens masked, and `labels`, -100 for the others.

    Texts are refused, since which tokens are masked is part of what an example is: mask once, with
    `DataCollatorForLanguageModeling(..., seed=0)`, and keep the result as the dataset.
    """

    task_name = "masked-lm"

    def _check_columns(self, features: Features, processing_class: Any) -> None:
        column = self.label_column or "labels"
        if not (self._is_tokenized(features) and column in features):
            raise ValueError(
                f"masked-lm needs the columns 'input_ids', with tokens masked, and {column!r}, -100 where they are not, but the "
                f"dataset has {', '.join(features)}. Mask it once, with transformers' DataCollatorForLanguageModeling(tokenizer, seed=0), "
                "and keep what it returns: which tokens are masked must be the same whenever a row is featurized."
            )

    def _texts_read(self, features: Features) -> dict[str, Any]:
        raise ValueError("masked-lm reads tokenized rows alone.")

    def _encode(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        example, kept = self._tokens_of(row)
        return example._replace(labels=labels_like(row, self.label_column or "labels", kept))


class Seq2SeqInputs(TokenInputs):
    """Rows of an encoder and a decoder: `input_ids` and `labels`, or a text and a target text.

    Labels of -100 at the end are padding and are taken off, and so are those at the beginning of a row that is padded on the left. The
    decoder reads what the model makes of the labels, as in training (`prepare_decoder_input_ids_from_labels`); or `decoder_input_ids`,
    where a tokenized row has them.
    """

    task_name = "seq2seq"

    @staticmethod
    def _decoder(model: PreTrainedModel) -> DecoderInputs | None:
        return DecoderInputs.for_model(model)

    def _check_columns(self, features: Features, processing_class: Any) -> None:
        images = find_image_columns(features) if "pixel_values" in self.accepted and "pixel_values" not in features else []
        if images:
            raise ValueError(
                f"The model reads a text beside the image, and the images in {images[0]!r} would not be read. Prepare the rows with its processor "
                f"('input_ids', 'pixel_values' and 'labels'), or remove {images[0]!r} if the model was trained without."
            )
        if self._is_tokenized(features):
            self._need(features, ["input_ids", self.label_column or "labels"], "Tokenized rows of seq2seq")
            return
        self._texts(features, self._string_columns(features))
        need_tokenizer(processing_class)

    def _texts_read(self, features: Features) -> dict[str, Any]:
        source, target = self._texts(features, self._string_columns(features))
        return {"text": [source], "label": target}

    def _texts(self, columns: Any, strings: Sequence[str]) -> tuple[str, str]:
        """Return the names of the text and of its target."""
        source, target = find_texts(strings, text_columns=self.text_columns, label_column=self.label_column)
        if source not in strings or target not in strings or len(self.text_columns or "1") != 1:
            raise ValueError(
                "seq2seq needs tokenized rows ('input_ids' and 'labels'), or a text and a target text, but the dataset has "
                f"{', '.join(columns)}. Set `text_columns` to the text's column and `label_column` to the target's."
            )
        others = [name for name in (*_FURTHER_PARTS, *_SOURCES) if name in strings and name not in (source, target)]
        if self.text_columns is None and others:
            raise ValueError(
                f"The dataset ({', '.join(columns)}) has texts in several columns ({source!r}, {', '.join(map(repr, others))}), and seq2seq "
                'needs to know how training joined them. Make one of them, such as `dataset.map(lambda row: {"input": '
                f"f\"{source}: {{row['{source}']}} {others[0]}: {{row['{others[0]}']}}\"}}, remove_columns=[{source!r}, {others[0]!r}])`, or set "
                f"`text_columns` (--text_columns {source}) if the model was trained on {source!r} alone."
            )
        return source, target  # type: ignore[return-value]

    def _encode(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        if self._is_tokenized(row):
            example, kept = self._tokens_of(row)
            column = self.label_column or "labels"
            if row[column] is None:
                raise ValueError(f"its {column!r} are None; filter it out")
            labels = np.asarray(row[column], dtype=np.int64)
            if row.get("decoder_input_ids") is not None:
                return self._with_decoder(row, example, labels)
            padded_left = len(kept) > 0 and not kept[0]
        else:
            # None counts as a text in columns that would hold one, so that the error names the column.
            texts = {*_SOURCES, *_TARGETS, *(self.text_columns or ()), self.label_column}
            strings = [key for key, value in row.items() if isinstance(value, str) or (value is None and key in texts)]
            source, target = self._texts(row, strings)
            found, cut = self._tokenize(processing_class, text_of(row, source))
            answer, cut_off = self._tokenize(processing_class, text_target=text_of(row, target))
            example = Example(
                np.asarray(found["input_ids"], dtype=np.int64), np.zeros(0), self._further_of(found), n_cut=max(cut, cut_off)
            )
            labels = np.asarray(answer["input_ids"], dtype=np.int64)
            padded_left = False
        ends = (labels != IGNORED).nonzero()[0]
        labels = labels[ends[0] if padded_left else 0 : ends[-1] + 1] if len(ends) else labels[:0]
        assert self.decoder is not None
        return example._replace(labels=labels, decoder_ids=self.decoder(labels))

    @staticmethod
    def _with_decoder(row: Mapping[str, Any], example: Example, labels: np.ndarray) -> Example:
        mask = row.get("decoder_attention_mask")
        kept = np.ones(len(labels), dtype=bool) if mask is None else np.asarray(mask).astype(bool)
        decoder_ids = np.asarray(row["decoder_input_ids"], dtype=np.int64)
        if not len(decoder_ids) == len(kept) == len(labels):
            raise ValueError(
                f"it has {len(decoder_ids)} tokens in 'decoder_input_ids' and {len(labels)} labels; there must be one each"
            )
        return example._replace(labels=labels[kept], decoder_ids=decoder_ids[kept])
