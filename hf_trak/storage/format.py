"""The format of an index on disk: names of files and folders, `member.json`, and the metadata of shards.

member_0/train-00000-of-00004.parquet     example_id and the trak_* columns
member_0/gram.safetensors
member_0/bank.safetensors                 only for contrastive tasks: the pairs used as negatives; written first
member_0/statistics.safetensors           only for points of a path with BatchNorm: its running statistics there; written first
member_0/mask.safetensors                 only if the checkpoint was trained on a subset: which rows
member_0/member.json                      describes the member; written last, so a folder without it is unfinished
member_0/.progress/                       only while unfinished: the member's identity, and which shards are complete
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hf_trak.config import CONFIG_NAME, TrakConfig
from hf_trak.hashing import hash_json
from hf_trak.messages import DamagedFile, list_differences
from hf_trak.storage.files import field_of, file_sizes, read_json

MEMBER_NAME = "member.json"
GRAM_NAME = "gram.safetensors"
MASK_NAME = "mask.safetensors"
BANK_NAME = "bank.safetensors"
STATISTICS_NAME = "statistics.safetensors"
WRITTEN_FIRST = (STATISTICS_NAME, BANK_NAME)  # every row of the member depends on them
PROGRESS = ".progress"
ENGINE_NAME = "engine.json"  # in `.progress`: the gradient engine, the same for all processes and calls
IDENTITY_NAME = "identity.json"  # in `.progress`: the identity of the member
DESCRIPTION_NAME = "description.json"  # in `.progress`: a job's description of the member
PARTS_NAME = ".parts.json"  # in the index, while an array of jobs builds it
DAMPING_NAME = "damping.json"
CURVE_NAME = "damping.png"

_SHARD = re.compile(r"train-\d{5,}-of-\d{5,}\.parquet")
_PROGRESS_FILE = re.compile(r"identity\.json|engine\.json|description\.json|\d{5,}\.json|gram-\d{5,}\.safetensors")
_MEMBER = re.compile(r"member_(0|[1-9]\d*)")


def member_folders(folder: Path) -> list[Path]:
    """Return the folders member_0, member_1, ... up to the first missing number."""
    numbers = member_numbers(folder)
    return [folder / f"member_{number}" for number, found in enumerate(numbers) if number == found]


def member_numbers(folder: Path) -> list[int]:
    """Return the sorted numbers of the folders that contain files of a member."""
    numbers = sorted(number for name in file_sizes(folder) if (number := member_number(folder / name)) is not None)
    return [number for number in numbers if _holds_member(folder / f"member_{number}")]


def _holds_member(folder: Path) -> bool:
    return any(name == PROGRESS or is_member_name(name) for name in file_sizes(folder))


def member_number(folder: Path) -> int | None:
    """Return the number in the name of a member's folder; None for another name."""
    found = _MEMBER.fullmatch(folder.name)
    return None if found is None else int(found[1])


def is_shard_name(name: str) -> bool:
    """Return whether a name is that of a shard."""
    return _SHARD.fullmatch(name) is not None


def is_member_name(name: str) -> bool:
    """Return whether a member's folder may contain a file of this name. Files in `.progress` are given as `.progress/NAME`."""
    inside = name.removeprefix(f"{PROGRESS}/")
    if inside != name:
        return _PROGRESS_FILE.fullmatch(inside) is not None
    return name in (MEMBER_NAME, GRAM_NAME, MASK_NAME, *WRITTEN_FIRST) or is_shard_name(name)


def is_index_name(name: str) -> bool:
    """Return whether an index may have written a file of this name, relative to the index's folder. The card does not count, because its
    owner can edit it."""
    folder, separator, inside = name.partition("/")
    if separator:
        return _MEMBER.fullmatch(folder) is not None and is_member_name(inside)
    return name in (CONFIG_NAME, DAMPING_NAME, CURVE_NAME, PARTS_NAME)


_KEY = b"hf_trak"


class Origin(NamedTuple):
    """Where a shard belongs, stored in the key-value metadata of its Parquet footer.

    Args:
        identity_sha256 (`str`): Hash of everything that determines the member's rows. It differs between members and indexes.
        member (`int`, *optional*): The member's number, if its folder's name has one.
        shard (`int`): The shard's number.
        n_shards (`int`): The member's number of shards.
        first_row (`int`): The number of the shard's first row in the training set.
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
    """Return the origin in a file's metadata; None if there is none."""
    try:
        return Origin(**json.loads((metadata or {})[_KEY]))
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def refuse_other_origin(path: Path, found: Origin | None, expected: Origin) -> None:
    """Refuse a shard with another origin than expected.

    Raises:
        ValueError: Naming the origin that was found and the one that was expected.
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
    what += f", where shard {expected.shard} of {expected.n_shards}"
    what += f"{'' if expected.member is None else f' of member_{expected.member}'} of this index is expected"
    raise DamagedFile(
        f"{path} {what}. Restore it from a copy, or run the command that made the index again: only damaged files are made again.",
        reason=f"it {what}",
    )


def read_member_info(folder: Path) -> dict[str, Any]:
    """Return the content of a finished member's `member.json`.

    Raises:
        ValueError: If `member.json` is damaged, or lists files that no member has. The message names the field.
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
    if "checkpoint" in info:
        _check_source(path, "checkpoint", field_of(path, info, "checkpoint", dict))
    rows = 0
    for number, entry in enumerate(field_of(path, info, "files", list)):
        if not isinstance(entry, dict):
            raise _damaged(path, f"entry {number} of 'files' is no object")
        name = field_of(path, entry, "file", str)
        if Path(name).name != name:
            raise ValueError(f"{path} lists {name!r}, which is not in its folder, so this is not a member of an index.")
        if field_of(path, entry, "bytes", int) < 0 or not re.fullmatch("[0-9a-f]{64}", field_of(path, entry, "sha256", str)):
            raise _damaged(path, f"the size or SHA-256 of {name!r} is none")
        rows += field_of(path, entry, "rows", int) if "rows" in entry else 0
    if "statistics" in identity.get("point", {}) and STATISTICS_NAME not in {entry["file"] for entry in info["files"]}:
        raise _damaged(path, f"it lists no {STATISTICS_NAME}, which its point needs")
    if rows != n_rows:
        raise _damaged(path, f"its files have {rows:,} rows, where 'n_rows' is {n_rows:,}")
    return info


def differences_from(identity: Mapping[str, Any], config: TrakConfig) -> list[str]:
    """Compare the values that a member records with the configuration of its index. Return one line per difference.

    Damping, `out_to_loss_power` and `combination` are not compared. They can change after featurizing, so a member does not record them.
    """
    dataset = identity.get("dataset") or {}
    pairs: list[tuple[str, Any, Any]] = [("config", identity.get("config"), config.identity())]
    if "task" in identity:
        pairs.append(("task", identity["task"], config.task))
    if "columns" in dataset:
        pairs.append(("columns_read", dataset["columns"] or None, config.columns_read or None))
    if "label_names" in dataset:
        pairs.append(("label_names", dataset["label_names"] or None, list(config.label_names or ()) or None))
    return [line for name, found, wanted in pairs for line in list_differences(found, wanted, name)]


def _check_point(path: Path, info: dict[str, Any], point: dict[str, Any]) -> None:
    """Check that a member that is a point of a path records its alpha and the location of its base."""
    alpha = point.get("alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < 1:
        raise _damaged(path, f"'alpha' is {alpha!r}, where a number of at least 0 and below 1 is expected")
    for name in ("from_zero", "kept"):
        field_of(path, point, name, list)
    base = field_of(path, info, "base", dict)
    _check_source(path, "base", base)
    base = {"path": None, "repository": None, **base}
    if point.get("base") is None and base["path"] is None and base["repository"] is None:
        raise _damaged(path, "it does not record the location of the path's base")


def _check_source(path: Path, name: str, source: dict[str, Any]) -> None:
    """Check that the fields for the location of weights are strings or None."""
    if wrong := [part for part in ("path", "repository", "revision") if not isinstance(source.get(part), (str, type(None)))]:
        raise _damaged(path, f"{wrong[0]!r} of {name!r} is {source[wrong[0]]!r}, where text or nothing is expected")


def _damaged(path: Path, reason: str) -> ValueError:
    said = f"{path} is damaged: {reason}. Restore it from a copy, or delete {path.parent} and featurize again."
    return DamagedFile(said, reason=reason)
