"""`member.json`: read, and checked to be what a member's writer writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hf_trak.storage.files import field_of, read_json
from hf_trak.storage.layout import MEMBER_NAME


def read_member_info(folder: Path) -> dict[str, Any]:
    """Return what a finished member says of itself.

    Raises:
        ValueError: If `member.json` is damaged, or lists what no member of an index has; the message names the field.
    """
    path = folder / MEMBER_NAME
    info = read_json(path)
    identity = field_of(path, info, "identity", dict)
    n_rows = field_of(path, identity, "n_rows", int)
    for name in ("n_rows", "shard_rows"):
        if field_of(path, identity, name, int) < 1:
            raise _damaged(path, f"{name!r} is {identity[name]}, where a positive number is expected")
    if "point" in identity:
        _check_point(path, info, field_of(path, identity, "point", dict))
    rows = 0
    for number, entry in enumerate(field_of(path, info, "files", list)):
        if not isinstance(entry, dict):
            raise _damaged(path, f"entry {number} of 'files' is no object")
        name = field_of(path, entry, "file", str)
        if Path(name).name != name:
            raise ValueError(f"{path} lists {name!r}, which does not lie in its folder: it is no member of hf_trak's.")
        if field_of(path, entry, "bytes", int) < 0 or not re.fullmatch("[0-9a-f]{64}", field_of(path, entry, "sha256", str)):
            raise _damaged(path, f"the size or SHA-256 of {name!r} is none")
        rows += field_of(path, entry, "rows", int) if "rows" in entry else 0
    if rows != n_rows:
        raise _damaged(path, f"its files have {rows:,} rows, where 'n_rows' is {n_rows:,}")
    return info


def _check_point(path: Path, info: dict[str, Any], point: dict[str, Any]) -> None:
    """Check that a member which is a point of a path says which, and where its base is."""
    alpha = point.get("alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < 1:
        raise _damaged(path, f"'alpha' is {alpha!r}, where a number of at least 0 and below 1 is expected")
    for name in ("from_zero", "kept"):
        field_of(path, point, name, list)
    base = field_of(path, info, "base", dict)
    if wrong := [name for name in ("path", "repository", "revision") if not isinstance(base.get(name), (str, type(None)))]:
        raise _damaged(path, f"{wrong[0]!r} of 'base' is {base[wrong[0]]!r}, where text or nothing is expected")
    base = {"path": None, "repository": None, **base}
    if point.get("base") is None and base["path"] is None and base["repository"] is None:
        raise _damaged(path, "it does not say where the base of the path is")


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged: {reason}. Restore it from a copy, or delete {path.parent} and featurize again.")
