"""`index.explain`: one prompt and its answer, or one text or image and its class, to the training rows behind it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.querying.examples import Attribution, LanguageRows, read_attributions, row_reader, train_reader
from hf_trak.querying.questions import Question, Side
from hf_trak.querying.report import table
from hf_trak.querying.report_facts import find_controls
from hf_trak.querying.report_page import html_page
from hf_trak.querying.scoring_methods import ScoringMethods
from hf_trak.querying.training_rows import KeptRows, align_rows
from hf_trak.scoring.ensemble import ScoreOptions, ScoreShortcuts, solve_all
from hf_trak.scoring.scorer import check_top_k
from hf_trak.sources.processors import tokenizer_of
from hf_trak.tasks import TARGET_COLUMN
from hf_trak.tasks.answers import ANSWER_TASKS, Answer, Answering, Prompt, Span
from hf_trak.tasks.formats import alpaca_prompt
from hf_trak.tasks.pictures import pictures_of, side_by_side

if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Unpack

_MOST_GROUPS = 64  # of tokens in a heat map: each is a row to featurize
_TITLE = "Which training rows made the model say this"


@dataclass(repr=False)
class Explanation:
    """What a model answered, and the training rows that raised and lowered that answer most.

    ```python
    >>> explanation = index.explain("a fine story", top_k=2, progress=False)
    >>> len(explanation.hits[0]["proponent_text"])
    2
    ```

    Args:
        prompt: As it was given.
        answer (`str`): The generated or given answer, or the class.
        hits (`Dataset`): One row, as [`AttributionIndex.attribute`] returns it.
        pieces (`list[str]`): The answer of a language model, token by token.
        tokens (`list[int]`): Which of these are attributed.
        heat (`dict`): By training row, what each of `tokens` adds to its score; empty unless it was asked for.
    """

    prompt: Any
    answer: str
    hits: Dataset
    attribution: Attribution
    pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    heat: dict[int, list[float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return table([self.attribution])

    def to_html(self, title: str = _TITLE) -> str:
        """Return a page of the answer and the training rows.

        ```python
        >>> page = index.explain("a fine story", top_k=2, progress=False).to_html()
        ```
        """
        return html_page([self.attribution], title=title)

    def _repr_html_(self) -> str:
        return html_page([self.attribution], title=_TITLE, interactive=False)


class ExplainingMethods(ScoringMethods):
    """What one asks about one answer, which the model gives itself."""

    def explain(
        self,
        prompt: Prompt | Mapping[str, Any] | Dataset | None = None,
        *,
        answer: str | None = None,
        image: Any = None,
        chat: bool | None = None,
        span: Span | None = None,
        target: str | int | None = None,
        contrast: str | Sequence[str | int] | None = None,
        heat: bool = False,
        controls: bool = False,
        documents: str | None = None,
        max_new_tokens: int = 64,
        generation: Mapping[str, Any] | None = None,
        top_k: int = 5,
        train: Dataset | None = None,
        options: ScoreOptions | None = None,
        batch_size: int | str = "auto",
        max_memory: int | str | None = None,
        exact: bool = True,
        progress: bool = True,
        **shortcuts: Unpack[ScoreShortcuts],
    ) -> Explanation:
        """Return the training rows that raised and lowered an answer to one prompt most; or, of a classifier, its prediction.

        ```python
        >>> explanation = index.explain("a fine film", progress=False)  # a classifier: the class that it predicts
        >>> contrast = index.explain("a fine film", contrast=(0, 1), progress=False)
        ```

        A language model answers, and the answer is attributed: `index.explain("The capital of France is")`.

        Args:
            prompt: A text; the messages of a conversation; of classifiers of pairs, two texts; or a row, as a dictionary or a
                dataset of one row.
            answer (`str`, *optional*): What a language model is taken to answer, a row of the training set's kind; by default, the last
                checkpoint (of points of a path, the final model) generates it.
            image (*optional*): A file, or a PIL image, that a classifier classifies, or that belongs to the prompt; of models that read several,
                a list of them.
            chat (`bool`, *optional*): Make a conversation of a text, by the tokenizer's chat template; by default where the training rows are
                conversations.
            span (*optional*): Attribute a part of the answer alone: a substring, its first character and the one behind its last, or a
                `range` of tokens (`Explanation.pieces` lists them).
            target (`str` or `int`, *optional*): Of classifiers, as in [`AttributionIndex.score`]; by default "prediction".
            contrast (*optional*): Of classifiers, as in [`AttributionIndex.score`]. Of language models, another answer: what made the model
                say the first and not this; or two answers.
            heat (`bool`): Find what each token of the answer adds to the scores of the rows that are returned; one more row to featurize per
                token, or per group of tokens of answers above 64. The parts add up to the score, before any `soft_threshold`.
            controls (`bool`): Also find the rows that simpler rankings choose (1 − p, similarity, random rows), for
                `Explanation.to_html`. The features are then read twice.
            documents (`str`, *optional*): Of an index of chunks, rank documents ("max" or "sum"), as in [`AttributionIndex.attribute`].
            max_new_tokens (`int`): Of a generated answer.
            generation (`Mapping`, *optional*): Arguments of `model.generate`; decoding is greedy unless they say otherwise.
            train (`Dataset`, *optional*): The training set, to show its rows; see [`AttributionIndex.align`]. An index with kept columns
                needs none.
            top_k, options, batch_size, max_memory, exact, shortcuts: As in [`AttributionIndex.attribute`].

        Raises:
            ValueError: If the index cannot be asked this, or the span is not in the answer.
        """
        options = self.score_options(options, **shortcuts)
        shown = align_rows(train, self.members[0], index=self.folder) if train is not None else None
        if documents is not None and heat:
            raise ValueError("`heat` is of the scores of chunks: leave out `documents`.")
        scorer = self._scorer(1, Question(), options, check_top_k(top_k), max_memory, progress)
        rank = self._ranker(scorer, exact, documents)
        self._queries.check_task()
        self._check_gram(options)
        language = None
        asked: Answer | None = None
        tokens: list[int] = []
        if self.members[0].identity["task"] in ANSWER_TASKS:
            reads_pictures = self.members[0].identity["task"] == "image-text-to-text"
            _refuse({"image": image is not None and not reads_pictures, "target": target is not None}, "a language model")
            images = pictures_of(image)
            final = self._queries.final_featurizer()
            answering = Answering(final.task, final.processing_class, images)
            prompt = self._prompt(prompt, chat, answering)
            asked, other = self._answers(final, answering, prompt, answer, contrast, max_new_tokens, generation)
            tokenizer = answering.tokenizer
            del final  # its model, of which featurizing loads one again
            tokens = list(range(len(asked))) if span is None else asked.tokens_of(span)
            if other is not None and (span is not None or heat):
                raise ValueError("`span` and `heat` are of one answer: leave out `contrast`.")
            sides = [_side([asked.row(tokens)])] + ([_side([other.row()], -1.0)] if other is not None else [])
            said = asked.text if other is None else f"{asked.text} (against: {other.text})"
            language = LanguageRows(
                self.config.task,
                tokenizer,
                text_columns=self.config.text_columns,
                label_column=self.config.label_column,
            )
            said = said if span is None else f"{said} (of it: {''.join(asked.pieces[t] for t in tokens)})"
            query = replace(language.query(prompt, said), image=side_by_side(images))
        else:
            given = {"answer": answer, "chat": chat, "span": span, "heat": heat or None, "generation": generation}
            _refuse({name: value is not None for name, value in given.items()}, "a classifier")
            rows = self._row(prompt, image)
            if target is None:
                target = "prediction" if contrast is None and self._queries.has_classes else "label"
            question = Question(target, contrast)
            sides = self._sides(rows, question, options, batch_size, progress)
            said = " against ".join(self._class_of(side) for side in sides)
            if self.config.task == "preference":
                language = LanguageRows(self.config.task)
            query = replace(row_reader(self.config, sides[0].queries, language)[0], label=said)
        features, output = self._featurize(sides, batch_size, progress, shown=True)
        solved = self._solve([*features], Question(), options)
        hits = self._hits(rank(solved), output, Question())
        reader = train_reader(self.config, KeptRows(self.members[0]), shown, language)
        attribution = read_attributions(hits, [query], reader)[0]
        if controls:
            attribution = replace(attribution, controls=find_controls(self, features, solved, options, reader, top_k)[0])
        if asked is None:
            answer_text = said or f"{output[0]:.4g}"
            return Explanation(image if image is not None else prompt, answer_text, hits, attribution)
        found = Explanation(prompt, asked.text, hits, attribution, asked.pieces, tokens)
        return self._heated(found, asked, features, options, batch_size, progress) if heat else found

    # Language models.

    def _prompt(self, prompt: Any, chat: bool | None, answering: Answering) -> Prompt:
        """Return a prompt as the training rows have it: a text, or a conversation."""
        if not isinstance(prompt, str):
            if not isinstance(prompt, Sequence) or not all(isinstance(turn, Mapping) and "role" in turn for turn in prompt):
                raise ValueError(
                    f"`prompt` must be a text, or a list of messages with 'role' and 'content', but is {str(prompt)[:60]!r}. For rows with "
                    "their answers, ask `index.attribute(queries)`."
                )
            if chat is False:
                raise ValueError("chat=False asks for a text, but `prompt` is a conversation.")
            return list(prompt)
        if self.config.row_format == "alpaca" and not chat:
            return alpaca_prompt(prompt)
        if chat is None:
            kind = KeptRows(self.members[0]).features.get("prompt")
            chat = "messages" in self._columns or (kind is not None and not hasattr(kind, "dtype"))
            if answering.images and kind is None:  # a text without a place for its picture
                chat = answering.needs_template(prompt)
        return [{"role": "user", "content": prompt}] if chat else prompt

    def _answers(
        self,
        final: Featurizer,
        answering: Answering,
        prompt: Prompt,
        answer: str | None,
        contrast: Any,
        max_new_tokens: int,
        generation: Mapping[str, Any] | None,
    ) -> tuple[Answer, Answer | None]:
        """Return the answer that is attributed, and the one that it is held against."""
        other = contrast
        if contrast is not None and not isinstance(contrast, str):
            if len(contrast) != 2 or not all(isinstance(one, str) for one in contrast) or answer is not None:
                raise ValueError(f"`contrast` must be another answer, or two answers and no `answer`, but is {contrast!r}.")
            answer, other = contrast
        if answer is not None and answer == other:
            raise ValueError(f"`contrast` must be another answer than {answer!r}: all scores would be 0.")
        if answer is not None:
            if generation:
                raise ValueError(
                    "`generation` says how an answer is generated, but the answer is given: leave one of them out."
                )
            asked = answering.given(prompt, answer)
        else:
            row = answering.prompt(prompt)
            ids = _generate(final, row, min(max_new_tokens, answering.room(row["input_ids"])), dict(generation or {}))
            asked = answering.generated(row, ids)
        return asked, None if other is None else answering.given(prompt, other)

    def _heated(
        self,
        found: Explanation,
        answer: Answer,
        whole: Sequence[Any],
        options: ScoreOptions,
        batch_size: int | str,
        progress: bool,
    ) -> Explanation:
        """Return an explanation with what each token of the answer adds to the scores of its rows."""
        size = -(-len(found.tokens) // _MOST_GROUPS)
        groups = [found.tokens[first : first + size] for first in range(0, len(found.tokens), size)]
        parts, _ = self._featurize([_side([answer.row(group) for group in groups])], batch_size, progress)
        shares = torch.ones(len(groups))
        if self.config.token_reduction == "mean":  # of the group's tokens, as of the answer's
            shares = torch.tensor([len(group) / len(found.tokens) for group in groups])
        features = [torch.cat([one, part * shares.unsqueeze(1)]) for one, part in zip(whole, parts, strict=True)]
        solved = solve_all(self.members, features, options, like=0)
        rows = [row for kind in ("proponents", "opponents") for row in found.hits[0][kind] if row >= 0]
        rows = list(dict.fromkeys(rows))
        added = self.scores_of_rows(rows, solved, options)[:, 1:]
        spread = {
            row: [float(value) / len(group) for value, group in zip(values, groups, strict=True) for _ in group]
            for row, values in zip(rows, added, strict=True)
        }
        places = {token: place for place, token in enumerate(found.tokens)}

        def heat(row: int) -> tuple[tuple[str, float], ...]:
            return tuple(
                (piece, spread[row][places[token]] if token in places and row in spread else 0.0)
                for token, piece in enumerate(found.pieces)
            )

        shown = found.attribution
        sides = [[replace(hit, heat=heat(hit.example.row)) for hit in side] for side in (shown.proponents, shown.opponents)]
        return replace(found, heat=spread, attribution=replace(shown, proponents=sides[0], opponents=sides[1]))

    # Classifiers.

    @property
    def _columns(self) -> dict[str, Any]:
        """What was read of the training set."""
        return self.members[0].identity["dataset"].get("columns") or {}

    def _row(self, given: Any, image: Any) -> Dataset:
        """Return a dataset of one row of what was given, under the names of the training set's columns."""
        from datasets import Dataset, Features, Image

        if isinstance(given, Dataset) and image is None and len(given) == 1:
            return given
        if isinstance(given, Mapping):
            if image is not None:
                raise ValueError("Give `image` in the row, or no row.")
            return Dataset.from_list([dict(given)])
        if image is not None:
            column = self._columns.get("image")
            if given is not None or column is None or column in ("pixel_values", "pixel_values_videos", "input_ids"):
                raise ValueError(
                    f"`image` is for classifiers whose training rows have images alone, but {self.folder} reads {self._columns}. Give a row as "
                    "a dictionary of these."
                )
            if isinstance(image, (str, Path)) and not Path(image).is_file():
                raise FileNotFoundError(f"There is no image file {image}.")
            cell = str(image) if isinstance(image, Path) else image
            return Dataset.from_dict({column: [cell]}, features=Features({column: Image()}))
        texts = [given] if isinstance(given, str) else given
        columns = self._columns.get("text")
        if columns is None or not isinstance(texts, (list, tuple)) or len(texts) != len(columns):
            raise ValueError(
                f"{self.folder} reads {self._columns} of a row, but {str(given)[:60]!r} was given. Give its text (or its two texts), `image=`, "
                "or the row as a dictionary of these."
            )
        return Dataset.from_dict({column: [text] for column, text in zip(columns, texts, strict=True)})

    def _class_of(self, side: Side) -> str:
        """Return the name of the class that is attributed."""
        if side.reads != "target":
            label = self._columns.get("label")
            if not isinstance(label, str):
                return ""
            value, names = side.queries[0].get(label), getattr(side.queries.features[label], "names", None)
            return names[value] if names and isinstance(value, int) and value >= 0 else str(value)
        value = side.queries[0][TARGET_COLUMN]
        if isinstance(value, list):
            return ", ".join(name for name, applies in zip(side.names, value, strict=True) if applies) or "none"
        return side.names[value] if side.names else ""


def _side(rows: Sequence[Mapping[str, Any]], sign: float = 1.0) -> Side:
    from datasets import Dataset

    # Arrays of pictures are stored as they are.
    plain = [{name: a if (a := np.asarray(values)).ndim > 1 else a.tolist() for name, values in row.items()} for row in rows]
    return Side(Dataset.from_list(plain), sign, "answer")


def _refuse(given: Mapping[str, bool], what: str) -> None:
    if wrong := [name for name, is_given in given.items() if is_given]:
        raise ValueError(f"The index is of {what}, which has no use for {', '.join(map(repr, wrong))}: leave it out.")


def _as_batch(values: Any, dtype: torch.dtype) -> Tensor:
    """Return what is along the tokens of a prompt with the axis of a batch; of pictures, which have it, numbers of the model's dtype."""
    found = torch.as_tensor(np.asarray(values))
    found = found[None] if found.ndim == 1 else found
    return found.to(dtype) if found.is_floating_point() else found


def _generate(featurizer: Featurizer, prompt: Mapping[str, Any], max_new_tokens: int, generation: dict[str, Any]) -> list[int]:
    """Return the tokens that a model answers a prompt with, the last of them EOS if it came to an end."""
    from transformers import GenerationConfig

    model: Any = featurizer.model
    config = copy.deepcopy(getattr(model, "generation_config", None)) or GenerationConfig()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    tokenizer: Any = tokenizer_of(featurizer.processing_class)
    ends = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})
    if generation.get("num_return_sequences", 1) != 1:
        raise ValueError("One answer is attributed: leave out num_return_sequences.")
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    if generation.get("do_sample"):
        greedy = {}
    pad = config.pad_token_id
    usual = {
        **greedy,
        "eos_token_id": ends or None,
        "pad_token_id": pad if pad is not None else (ends or [0])[0],
        "max_length": None,
        "max_new_tokens": max_new_tokens,
        "return_dict_in_generate": False,
    }
    further = config.update(**{**usual, **generation})
    inputs = {name: _as_batch(values, model.dtype).to(featurizer.device) for name, values in prompt.items()}
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    with featurizer.inference(), warnings.catch_warnings():
        # PEFT counts positions behind a learned prompt itself, and warns that it does.
        warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")
        found = model.generate(**inputs, generation_config=config, **further)[0].tolist()
    n_before = 1 if getattr(model.config, "is_encoder_decoder", False) else len(prompt["input_ids"])
    answer = found[n_before:]
    end = next((place for place, token in enumerate(answer) if token in ends), None)
    return answer if end is None else answer[: end + 1]
