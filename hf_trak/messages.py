"""Messages: error classes with details, escaping of control characters, masking of secrets, and differences of JSON values."""

from __future__ import annotations

import re
from typing import Any


class MissingProcessor(ValueError):
    """Raw rows need a tokenizer or an image processor, and there is none. A caller that knows the checkpoint adds its name."""


class DamagedFile(ValueError):
    """A file has changed since it was written. The message names the file and says what to do; `reason` is the problem alone, for callers
    with their own message."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def is_raised_by_us(error: BaseException) -> bool:
    """Return whether an error was raised by hf_trak, and not by a library."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and str(at.tb_frame.f_globals.get("__name__")).partition(".")[0] == __name__.partition(".")[0]


# C0 and C1 controls, direction marks and overrides, line separators, invisible tags, and halves of surrogate pairs.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

_MASK = "***"
_URL = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<rest>[^\s'\"`<>]+)")
_TOKENS = re.compile(
    r"\b(hf_[A-Za-z0-9]{8,}|api_org_[A-Za-z0-9]{8,}|gh[opsu]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,})|(?<=\bBearer )[^\s'\",;]+",
    re.IGNORECASE,
)


def visible(text: str) -> str:
    r"""Escape control and invisible characters: a newline becomes `\n`, an escape `\x1b`."""
    return _HIDDEN.sub(lambda found: _NAMED.get(found[0]) or _code(ord(found[0])), text)


def _code(number: int) -> str:
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def mask_secrets(text: str) -> str:
    """Mask access tokens, and the user, password, query and fragment of URLs."""
    text = _URL.sub(lambda found: found["scheme"] + _mask_rest(found["rest"]), text)
    return _TOKENS.sub(lambda found: found[0][:3] + _MASK if found[0].lower().startswith("hf_") else _MASK, text)


def _mask_rest(rest: str) -> str:
    place, separator, _ = re.split(r"([?#])", rest, maxsplit=1) if re.search("[?#]", rest) else (rest, "", "")
    authority, slash, path = place.partition("/")
    if "@" in authority:
        authority = f"{_MASK}@{authority.rsplit('@', 1)[1]}"
    return f"{authority}{slash}{path}{separator}{_MASK if separator else ''}"


def say(text: str) -> None:
    """Print a text of several lines with escaped control characters."""
    print("\n".join(map(visible, text.split("\n"))), flush=True)


def one_line(text: str) -> str:
    """Return a message as one line that is safe to print: lines are joined, control characters escaped, secrets masked.

    A line without a stop at its end gets one if the next begins a sentence, else a semicolon.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    joined = ""
    for line in lines:
        stop = "" if not joined or joined[-1] in ".:;,!?" else "." if line[0].isupper() else ";"
        joined += f"{stop} {line}" if joined else line
    return visible(mask_secrets(joined))


def markdown(text: str) -> str:
    """Escape a text for Markdown and HTML, also in table cells: emphasis, links and tags are shown literally."""
    escaped = re.sub(r"([\\`*\[\]|])", r"\\\1", visible(text))
    return escaped.replace("<", "&lt;").replace(">", "&gt;")


def markdown_code(text: str) -> str:
    """Return a text as a Markdown code span. Characters that would end the span, a table cell or a comment are replaced."""
    shown = visible(text).replace("`", "'").replace("<!--", "< !--").replace("-->", "-- >")
    return f"`{shown.replace('|', chr(92) + '|')}`"


def list_differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Return one line per differing leaf of two JSON values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [*found, *(key for key in wanted if key not in found)]
        return [
            line
            for key in keys
            for line in list_differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if found == wanted else [f"{name}: {_short(found)} there, {_short(wanted)} here"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
