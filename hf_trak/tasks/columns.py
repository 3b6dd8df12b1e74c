"""Which columns of a dataset are texts, and which formats of language rows are not served."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset


_ROWS_LOOKED_AT = 1000

# Names are compared in lower case and without what separates words: `Sentence_1` is `sentence1`.
_PAIRS = (
    ("premise", "hypothesis"), ("question", "sentence"), ("question", "context"), ("question", "passage"), ("question", "paragraph"),
    ("question", "document"), ("question", "answer"), ("query", "passage"), ("query", "document"), ("query", "text"),
    ("claim", "evidence"), ("prompt", "response"), ("prompt", "completion"), ("context", "response"), ("title", "content"),
    ("title", "text"), ("title", "body"), ("title", "abstract"), ("title", "description"), ("title", "review"), ("headline", "body"),
    ("reviewtitle", "reviewbody"), ("reviewtitle", "reviewtext"),
)  # fmt: skip
# One of these is a whole example. Other columns of unusual names say something about it.
_WHOLE = (
    "text", "texts", "sentence", "sentences", "review", "reviewtext", "reviewbody", "content", "tweet", "tweettext", "comment",
    "commenttext", "commentbody", "document", "caption", "utterance", "utt", "message", "post", "sms", "article", "body", "abstract",
    "sequence", "smiles",
)  # fmt: skip
# One of these may be a half of an example.
_PART = (
    "question", "query", "premise", "hypothesis", "context", "passage", "paragraph", "claim", "evidence", "prompt", "response",
    "completion", "answer", "title", "headline", "reviewtitle", "description", "summary", "input", "source", "statement",
)  # fmt: skip
_STEMS = (
    *_WHOLE, *_PART, "sent", "s", "string", "str", "textstring", "q", "phrase", "doc", "argument", "input", "clause", "span", "passage",
)  # fmt: skip
_ENDS = (("1", "2"), ("a", "b"), ("0", "1"), ("one", "two"), ("first", "second"), ("left", "right"))
_SET_ASIDE = frozenset(
    [
        "author",
        "category",
        "categories",
        "class",
        "classname",
        "cls",
        "country",
        "date",
        "domain",
        "email",
        "file",
        "filename",
        "filepath",
        "fold",
        "gold",
        "hash",
        "href",
        "image",
        "img",
        "lang",
        "language",
        "license",
        "link",
        "locale",
        "md5",
        "partition",
        "path",
        "sha",
        "sha1",
        "sha256",
        "split",
        "subset",
        "target",
        "time",
        "timestamp",
        "tag",
        "tags",
        "topic",
        "type",
        "url",
        "uri",
        "user",
        "username",
        "y",
    ]
)
_IDENTIFIERS = frozenset(
    [
        "id",
        "ids",
        "idx",
        "index",
        "guid",
        "uuid",
        "uid",
        "pid",
        "qid",
        "rowid",
        "docid",
        "url",
        "uri",
        "link",
        "href",
        "key",
        "hash",
    ]
)
_STRINGS = ("string", "large_string")


def is_string(kind: Any) -> bool:
    """Return whether a column's type is a plain string."""
    return getattr(kind, "dtype", None) in _STRINGS


def is_set_aside(name: str) -> bool:
    """Return whether a name is that of an identifier, a label or a note about an example, such as `idx`, `label_text` or `url`."""
    words = [word for word in re.split(r"[\W_]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()) if word]
    if not words:
        return True
    return (
        "".join(words) in _SET_ASIDE
        or words[-1] in _IDENTIFIERS
        or words[0] in ("id", "ids", "idx", "unnamed")
        or any(word.startswith("label") for word in words)
        or name.startswith("__index_level_")
    )


def find_text_columns(
    features: Mapping[str, Any], *, label_column: str | None = None, dataset: Dataset | None = None
) -> tuple[str, ...]:
    """Return the one column of texts that a classifier reads, or the two.

    Args:
        features (`Mapping`): The type of each column.
        label_column (`str`, *optional*): Never taken for a text.
        dataset (`Dataset`, *optional*): Some of its rows tell texts from codes and categories where names do not. Without it, names decide.

    Raises:
        ValueError: If there is none, or several may be meant; the message lists the candidates.
    """
    strings = [name for name, kind in features.items() if is_string(kind)]
    candidates = [name for name in strings if name != label_column and not is_set_aside(name)]
    if not candidates:
        found = (
            f"; {_listed(strings)} {'look' if len(strings) > 1 else 'looks'} like an identifier or a label" if strings else ""
        )
        raise ValueError(
            "Expected tokenized rows ('input_ids') or one or two text columns, but the dataset has "
            f"{', '.join(features)}{found}. Set `text_columns` (--text_columns)."
        )
    texts = candidates
    if dataset is not None and len(candidates) > 1:
        rows, labels = _some_rows(dataset, candidates, label_column)
        candidates = [name for name in candidates if not says_the_label(rows[name], labels)] or candidates
        texts = [name for name in candidates if reads_like_text(rows[name])] or candidates
    chosen = _by_name(candidates)
    if chosen == ():  # names contradict one another: what holds no texts has no say
        chosen = _by_name(texts)
    if chosen is None:
        chosen = (texts[0],) if len(texts) == 1 else ()
    if not chosen:
        raise _ambiguous(texts, features)
    return chosen


def find_whole_text(names: Iterable[str]) -> str | None:
    """Return the one name of a whole text among the names of columns of strings; None if there is none, or another text beside it."""
    names = list(names)
    whole = [name for name in names if _plain(name) in _WHOLE]
    return whole[0] if len(whole) == 1 and not any(_plain(name) in _PART for name in names) else None


def _by_name(candidates: Sequence[str]) -> tuple[str, ...] | None:
    """Return the columns of usual names; an empty tuple where they contradict one another, None where names do not decide."""
    plain = {_plain(name): name for name in candidates}
    if len(plain) < len(candidates):  # two spellings of one name
        return ()
    pairs = list(dict.fromkeys(_pairs_among(plain)))
    usual = {name for name in plain if name in _WHOLE or name in _PART}
    if pairs:
        beside = (usual | _numbered(plain)) - set(pairs[0])
        return () if len(pairs) > 1 or beside else (plain[pairs[0][0]], plain[pairs[0][1]])
    if len(usual) == 1 and (whole := usual & set(_WHOLE)):
        return (plain[whole.pop()],)
    return () if len(usual) > 1 else None


def _pairs_among(plain: Iterable[str]) -> Iterable[tuple[str, str]]:
    names = set(plain)
    yield from (pair for pair in _PAIRS if set(pair) <= names)
    for stem in _STEMS:
        for ends in _ENDS:
            for pair in ((stem + ends[0], stem + ends[1]), (ends[0] + stem, ends[1] + stem)):
                if set(pair) <= names:
                    yield pair


def _numbered(plain: Iterable[str]) -> set[str]:
    """Return the names of a usual stem and a number: a third of a series contradicts a pair."""
    return {name for name in plain if name.rstrip("0123456789") in _STEMS and name[-1].isdigit()}


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _some_rows(
    dataset: Dataset, candidates: Sequence[str], label_column: str | None
) -> tuple[Mapping[str, Sequence[Any]], Sequence[Any] | None]:
    """Return the candidates' values of some rows, and their labels, if there are any. Rows are often sorted: these are spread."""
    has_labels = label_column is not None and label_column in dataset.column_names
    names = [*candidates, *([label_column] if has_labels and label_column is not None else [])]
    spread = np.linspace(0, max(len(dataset) - 1, 0), min(_ROWS_LOOKED_AT, len(dataset))).astype(int)
    rows = dataset.with_format(None).select_columns(names)[np.unique(spread).tolist()]
    return rows, rows[label_column] if has_labels else None


def says_the_label(values: Sequence[str | None], labels: Sequence[Any] | None) -> bool:
    """Return whether a column has one value for each label, and so says the same."""
    distinct = len(set(values))
    if labels is None or distinct == len(values):
        return False
    keys = [str(label) for label in labels]
    return distinct <= len(set(keys)) == len(set(zip(values, keys, strict=True)))


def reads_like_text(values: Sequence[str | None]) -> bool:
    """Return whether a column of strings holds texts, and not categories, codes or addresses."""
    given = [value for value in values if value]
    if not given:
        return False
    words = np.array([len(value.split()) for value in given])
    if len(given) >= 20 and len(set(given)) <= max(2, len(given) // 20) and words.mean() < 5:
        return False  # categories
    if np.mean([bool(re.match(r"(https?://|www\.|/|[A-Za-z]:\\)\S+$", value)) for value in given]) > 0.5:
        return False  # addresses and paths
    is_code = [len(value) <= 64 and value.isascii() and not re.search(r"\s", value) for value in given]
    return not np.mean(is_code) > 0.9


def _ambiguous(candidates: Sequence[str], features: Mapping[str, Any]) -> ValueError:
    first, second = candidates[0], candidates[1] if len(candidates) > 1 else candidates[0]
    return ValueError(
        f"Which columns hold the text is ambiguous: {_listed(candidates)} may, and a text classifier reads one column or a pair. The "
        f"dataset has {', '.join(features)}. State what the model was trained on, in its order: text_columns=({first!r},) "
        f"(--text_columns {first}), or text_columns=({first!r}, {second!r}) (--text_columns {first} {second})."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


_FORMAT_PAIRS = (
    ("question", "answer"),
    ("query", "answer"),
    ("instruction", "response"),
    ("query", "response"),
    ("prompt", "response"),
    ("problem", "solution"),
    ("question", "response"),
)
_TO_MESSAGES = (
    'roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}; '
    'dataset.map(lambda row: {"messages": [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row[COLUMN]]}, '
    "remove_columns=dataset.column_names)"
)


_STATED = {
    "ShareGPT": "If human is the user and gpt the assistant, set row_format='sharegpt' (--row_format sharegpt). Otherwise: ",
    "alpaca": "If training had Stanford Alpaca's template, set row_format='alpaca' (--row_format alpaca). Otherwise: ",
}


def _name(features: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the name of a format that is not served, and how its rows become rows that are."""
    columns = set(features)
    if "messages" in columns or ({"prompt", "completion"} <= columns and not _is_flag(features.get("label"))):
        return None
    if {"chosen", "rejected"} <= columns:
        answer = '"completion": row["chosen"]' if "prompt" in columns else '"text": row["chosen"]'
        prompt = '"prompt": row["prompt"], ' if "prompt" in columns else ""
        return (
            "a preference format ('chosen' and 'rejected'), whose loss compares two answers",
            "For the loss of a preference trainer, set task='preference' (--task preference). For the likelihood of the chosen answers, "
            f"`dataset.map(lambda row: {{{prompt}{answer}}}, remove_columns=dataset.column_names)`.",
        )
    if {"prompt", "completion", "label"} <= columns:
        return (
            "an unpaired preference format ('prompt', 'completion' and a 'label' that says whether the completion is wanted)",
            "For the loss of a preference trainer, make a task with `Task.custom`. For the likelihood of the wanted completions, "
            '`dataset.filter(lambda row: row["label"]).remove_columns("label")`.',
        )
    if {"prompt", "completions"} <= columns:
        return (
            "a stepwise format ('prompt' and a list of 'completions')",
            "Make a task with `Task.custom`, or join the steps: "
            '`dataset.map(lambda row: {"prompt": row["prompt"], "completion": "".join(row["completions"])}, '
            "remove_columns=dataset.column_names)`.",
        )
    for column in ("conversations", "conversation"):
        if column in columns:
            return (
                f"the ShareGPT format ({column!r})",
                "Turn it into 'messages' with the roles that training had, for example `"
                + _TO_MESSAGES.replace("COLUMN", repr(column))
                + "`.",
            )
    if {"instruction", "output"} <= columns:
        return (
            "the alpaca format ('instruction', 'input' and 'output')",
            "Make 'prompt' and 'completion' of it with the template that training had, for example "
            '`dataset.map(lambda row: {"prompt": f"{row[\'instruction\']}\\n{row.get(\'input\') or \'\'}\\n", "completion": row["output"]}, '
            "remove_columns=dataset.column_names)`.",
        )
    return None


def refuse_unserved(features: Mapping[str, Any], task: str) -> None:
    """Refuse rows of a known format that a task would misread.

    Raises:
        ValueError: Naming the format and how its rows become rows that are served.
    """
    if (found := _name(features)) is not None:
        stated = next((hint for name, hint in _STATED.items() if name in found[0] and task == "causal-lm"), "")
        raise ValueError(
            f"The dataset ({', '.join(features)}) has {found[0]}, which {task} does not serve as it is. {stated}{found[1]}"
        )


def refuse_pairs(features: Mapping[str, Any], strings: Collection[str]) -> None:
    """Refuse rows of a question and its answer, of which a causal language model would read one as the whole text."""
    for first, second in _FORMAT_PAIRS:
        if first in strings and second in strings:
            raise ValueError(
                f"The dataset ({', '.join(features)}) has texts ({first!r}) with answers ({second!r}), and causal-lm needs to know how "
                "training joined them. Make 'prompt' and 'completion' of them: "
                f'`dataset.map(lambda row: {{"prompt": row["{first}"] + "\\n", "completion": row["{second}"]}}, '
                "remove_columns=dataset.column_names)`, or one 'text'."
            )
    if "prompt" in features and "completion" not in features:
        raise ValueError(
            f"The dataset ({', '.join(features)}) has prompts ('prompt') without completions, so nothing of it was trained on. Add a "
            "'completion', or, if the prompts are whole training texts, set `text_columns` to 'prompt'."
        )


def _is_flag(kind: Any) -> bool:
    return getattr(kind, "dtype", None) == "bool"
