"""Names of weights: how those in a file differ from those of a model, if one change explains it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Set

_ENOUGH = 0.9  # of the names that are missing
_SAMPLE = 200  # names that the change is looked for in


def common_change(missing: Set[str], unexpected: Set[str]) -> tuple[str, str, int] | None:
    """Return the part of names to take out, what to put in its place, and of how many names it makes those that are missing.

    Args:
        missing (`set[str]`): Names of the model that the file lacks.
        unexpected (`set[str]`): Names in the file that the model lacks.

    Returns:
        None if no change of one part turns nine tenths of the names that are missing into names that are there.
    """
    ends: dict[str, list[str]] = {}
    for name in missing:  # by their last parts, which a wrapper leaves alone
        ends.setdefault(_end(name), []).append(name)
    changes: Counter[tuple[str, str]] = Counter()
    for there in sorted(unexpected)[:_SAMPLE]:
        found = {_change(there, here) for here in ends.get(_end(there), ())}
        changes.update(change for change in found if change != ("", ""))
    if not changes:
        return None
    # The commonest; of several, the one that takes out least.
    (removed, put), _ = min(changes.items(), key=lambda item: (-item[1], len(item[0][0]) + len(item[0][1]), item[0]))
    made = {_apply(name, removed, put) for name in unexpected} & missing
    return (removed, put, len(made)) if len(made) >= max(1, _ENOUGH * len(missing)) else None


def as_pattern(removed: str, put: str, names: Iterable[str]) -> dict[str, str]:
    """Return a change of names that [`common_change`] found as the regular expression and its replacement of transformers' `key_mapping`."""
    begins = any(name.startswith(removed) for name in names)
    return {f"{'^' if begins else '(?<=[.])'}{re.escape(removed)}": put}


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _change(there: str, here: str) -> tuple[str, str]:
    """Return what stands between the common beginning and the common end of two names, in whole parts."""
    a, b = there.split("."), here.split(".")
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    removed, put = a[start : len(a) - end], b[start : len(b) - end]
    return ".".join([*removed, ""]) if removed else "", ".".join([*put, ""]) if put else ""


def _apply(name: str, removed: str, put: str) -> str:
    if not removed:
        return put + name
    if name.startswith(removed):
        return put + name[len(removed) :]
    return name.replace(f".{removed}", f".{put}", 1)
