"""Where a shard belongs, written into the file itself: which rows, of which member, of which index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hf_trak.hashing import hash_json
from hf_trak.storage.layout import member_number

_KEY = b"hf_trak"


class Origin(NamedTuple):
    """What a shard says of itself in the key-value metadata of its Parquet footer.

    Args:
        identity_sha256 (`str`): Of everything that decides the member's rows. It differs between members, and between indexes.
        member (`int`, *optional*): The member's number, where its folder's name has one.
        shard (`int`): The shard's number.
        n_shards (`int`): Of how many.
        first_row (`int`): The row of the training set that the shard begins with.
    """

    identity_sha256: str
    member: int | None
    shard: int
    n_shards: int
    first_row: int


def origin_of(folder: Path, identity: Mapping[str, Any], shard: int, *, n_shards: int) -> Origin:
    """Return the origin of a shard of the member in `folder`."""
    first_row = shard * int(identity["shard_rows"])
    return Origin(hash_json(identity), member_number(folder), shard, n_shards, first_row)


def write_origin(origin: Origin) -> dict[bytes, bytes]:
    """Return the metadata of a shard's schema."""
    return {_KEY: json.dumps(origin._asdict()).encode()}


def read_origin(metadata: Mapping[bytes, bytes] | None) -> Origin | None:
    """Return what a file says of itself; None if it says nothing."""
    try:
        return Origin(**json.loads((metadata or {})[_KEY]))
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def refuse_other_origin(path: Path, found: Origin | None, expected: Origin) -> None:
    """Refuse a shard that belongs elsewhere.

    Raises:
        ValueError: Saying what it is, and where it belongs.
    """
    if found == expected:
        return
    if found is None:
        what = "is a Parquet file that no member of an index wrote"
    elif found.identity_sha256 != expected.identity_sha256:
        what = f"is shard {found.shard} of another member or another index" + (
            f", whose number is {found.member}" if found.member not in (None, expected.member) else ""
        )
    elif found.member != expected.member:
        what = f"is of member_{found.member}"
    else:
        what = f"is shard {found.shard} of {found.n_shards}"
    raise ValueError(
        f"{path} {what}, where shard {expected.shard} of {expected.n_shards}"
        f"{'' if expected.member is None else f' of member_{expected.member}'} of this index is expected. Restore it from a copy, or run "
        "the command that made the index again: only damaged files are made again."
    )
