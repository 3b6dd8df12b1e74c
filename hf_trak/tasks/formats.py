"""Formats of language rows that are not served, recognised by their columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_PAIRS = (
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
            "For the loss of a preference trainer, make a task with `Task.custom`. For the likelihood of the chosen answers, "
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
        raise ValueError(f"The dataset ({', '.join(features)}) has {found[0]}, which {task} does not serve. {found[1]}")


def refuse_pairs(features: Mapping[str, Any], strings: Collection[str]) -> None:
    """Refuse rows of a question and its answer, of which a causal language model would read one as the whole text."""
    for first, second in _PAIRS:
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
