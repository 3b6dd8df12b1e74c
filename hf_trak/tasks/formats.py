"""Rows in formats that need a stated reading: Alpaca's instructions in their template, and ShareGPT's conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ALPACA = ("instruction", "input", "output")
_NO_PLACE = ("history", "system")  # in Alpaca's template
_TASK = "Below is an instruction that describes a task"
_WITH_INPUT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request.\n\n"
_CONVERSATIONS = ("conversations", "conversation")
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Return an instruction, and the input that belongs to it, in Alpaca's template; an instruction that is in it already as it is."""
    if instruction.startswith(_TASK):
        return instruction
    parts = [_TASK, _WITH_INPUT if context else "", _REQUEST, f"### Instruction:\n{instruction}\n\n"]
    parts += [f"### Input:\n{context}\n\n"] if context else []
    return "".join([*parts, "### Response:\n"])


def read_format(columns: Any, row_format: str) -> dict[str, Any]:
    """Return which columns of rows in a format are read, as [`Task.columns_read`] has it.

    Raises:
        ValueError: If the rows are not in that format.
    """
    if row_format == "alpaca":
        if not {"instruction", "output"} <= set(columns):
            raise ValueError(
                f"row_format='alpaca' reads 'instruction', 'output' and, where there is one, 'input', but the dataset has {', '.join(columns)}. "
                "Rename its columns with `dataset.rename_column`, or leave out `row_format` (--row_format)."
            )
        if extra := [name for name in _NO_PLACE if name in columns]:
            raise ValueError(
                f"The dataset has {extra[0]!r}, for which Alpaca's template has no place. Make 'messages' of the rows as training had them, or remove "
                f"the column: `dataset.remove_columns({extra[0]!r})`."
            )
        return {"prompt": [name for name in _ALPACA[:2] if name in columns], "completion": "output"}
    found = next((name for name in _CONVERSATIONS if name in columns), None)
    if found is None:
        raise ValueError(
            f"row_format='sharegpt' reads 'conversations', but the dataset has {', '.join(columns)}. Rename the column with "
            "`dataset.rename_column`, or leave out `row_format` (--row_format)."
        )
    return {"messages": found, **{name: name for name in ("system", "tools", "chat_template_kwargs") if name in columns}}


def as_known_row(row: Mapping[str, Any], row_format: str) -> dict[str, Any]:
    """Return a row as `prompt` and `completion`, or as `messages`.

    Raises:
        ValueError: Of what is missing or unknown in it; the message begins with "its".
    """
    if row_format == "alpaca":
        for name in ("instruction", "output"):
            if not isinstance(row[name], str):
                raise ValueError(f"its {name!r} is {str(row[name])[:40]}, not a text; filter it out, or fill it in")
        given = row.get("input")
        if not isinstance(given, (str, type(None))):
            raise ValueError(f"its 'input' is {str(given)[:40]}, not a text; filter it out, or fill it in")
        return {"prompt": alpaca_prompt(row["instruction"], given or ""), "completion": row["output"]}
    column = next(name for name in _CONVERSATIONS if name in row)
    turns = row[column]
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError(f"its {column!r} is {str(turns)[:40]}, not a list of turns; filter it out")
    messages = [_message(turn, number, column) for number, turn in enumerate(turns)]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return {"messages": messages, **{name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}}


def _message(turn: Any, number: int, column: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise ValueError(f"turn {number} of its {column!r} is {str(turn)[:60]}; expected 'from' and 'value'")
    role = _ROLES.get(turn["from"])
    if role is None:
        raise ValueError(
            f"turn {number} of its {column!r} is from {turn['from']!r}, and known are {', '.join(_ROLES)}; make 'messages' of the rows with the roles "
            "that training had"
        )
    if not isinstance(turn["value"], str):
        raise ValueError(
            f"turn {number} of its {column!r} has the value {str(turn['value'])[:40]}, not a text; filter the row out"
        )
    return {"role": role, "content": turn["value"]}
