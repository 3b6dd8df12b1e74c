"""Chosen rows as a folder that `load_dataset` reads, with a card that says how they were chosen."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_trak import __version__
from hf_trak.hashing import fingerprint_of
from hf_trak.hub.cards import member_row
from hf_trak.messages import markdown, markdown_code
from hf_trak.storage.files import temporary_name, write_folder
from hf_trak.storage.outputs import naming
from hf_trak.storage.reader import MemberReader

if TYPE_CHECKING:
    from datasets import Dataset

_CARD, _DATA = "README.md", "data"
_MARK = "<!-- Written by hf_trak: a subset of a training set. -->"
_FILE_BYTES = 500 << 20
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")


def check_output(folder: Path, *, overwrite: bool) -> Path:
    """Return a folder that a subset may be written to: a new or empty one, or with `overwrite` that of an earlier subset.

    Raises:
        ValueError: If it holds anything else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    card = folder / _CARD
    is_ours = card.is_file() and not card.is_symlink() and _MARK in card.read_text(encoding="utf-8", errors="replace")
    if not is_ours:
        raise ValueError(f"{folder} is there and is no subset that was written before. Choose a new folder.")
    if not overwrite:
        raise ValueError(
            f"{folder} holds an earlier subset. Choose another folder, or replace it with `overwrite` (--overwrite)."
        )
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    others = [path for path in files if path != card and not (path.parent == folder / _DATA and path.suffix == ".parquet")]
    if others:
        raise ValueError(f"{folder} holds {others[0].name}, which is not of a subset. Move it away, or choose a new folder.")
    return folder


def describe_subset(
    index: Path, members: Sequence[MemberReader], target: Dataset, group_by: str | None, n_chosen: int, how: Mapping[str, Any]
) -> dict[str, Any]:
    """Return how rows were chosen, for the card: of which index, for which target, by what."""
    first = members[0]
    source = first.info.get("source", {})
    return {
        "rows": f"{n_chosen:,} of {first.n_rows:,}",
        "index": index.name,
        "training set": source.get("repository") or f"rows with SHA-256 {first.identity['dataset']['sha256'][:12]}",
        "training set's commit": source.get("revision"),
        "members": [member_row(number, member.info)["checkpoint"] for number, member in enumerate(members)],
        "target": f"{len(target):,} rows, fingerprint {fingerprint_of(target)}",
        "groups by": group_by,
        **{name: value for name, value in how.items()},
        "hf_trak": __version__,
    }


def write_subset(found: Dataset, folder: Path, *, progress: bool = True) -> None:
    """Write chosen rows and their card; the folder appears when it is whole, in place of an earlier subset.

    Raises:
        OSError: With advice, if it cannot be written.
    """
    from datasets.table import embed_table_storage

    from hf_trak.runtime import Bar

    temporary = temporary_name(folder)
    write_folder(folder.parent)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with naming(folder):
            (temporary / _DATA).mkdir(parents=True)
            n_files = max(1, math.ceil(found.data.nbytes / _FILE_BYTES))
            for number in Bar(range(n_files), unit="files", desc="Writing", disable=not progress or n_files == 1):
                part = found.shard(n_files, number, contiguous=True).with_format("arrow")
                part = part.map(embed_table_storage, batched=True, batch_size=100, keep_in_memory=True, desc="Reading files")
                _write_parquet(part, temporary / _DATA / f"train-{number:05d}-of-{n_files:05d}.parquet")
            (temporary / _CARD).write_text(render_subset_card(found, folder.name), encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)  # checked to be empty, or an earlier subset
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_parquet(part: Dataset, path: Path) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, part.features.arrow_schema) as writer:
        for table in part.with_format("arrow").iter(1000):
            writer.write_table(table.cast(part.features.arrow_schema))


def render_subset_card(found: Dataset, name: str) -> str:
    """Return the card of a subset, from the description that it carries."""
    how = json.loads(found.info.description)
    members = how.pop("members")
    rows = "\n".join(f"| {key} | {_show(value)} |" for key, value in how.items() if value is not None)
    models = "\n".join(f"| member {number} | {text} |" for number, text in enumerate(members))
    size = _SIZES[min(max(0, len(str(len(found))) - 3), len(_SIZES) - 1)]
    columns = ", ".join(markdown_code(column) for column in found.column_names)
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
size_categories:
- {size}
tags:
- trak
- data-selection
---
{_MARK}
# Chosen training rows

Rows of a training set, chosen by their influence on a target set. `trak_row` is the row's place in the training set, `trak_score` is above 0
where training on the row is good for the target. Columns: {columns}.

```python
from datasets import load_dataset

rows = load_dataset({json.dumps(name, ensure_ascii=False)}, split="train")
```

## How they were chosen

| | |
|---|---|
{rows}
{models}

Scores are estimates of what training on a row does to the target: they rank rows, and are no amounts of anything. A subset that was chosen for
one target may be worse for another. The licence is that of the training set.
"""


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(markdown_code(str(one)) for one in value[:30]) + (
            f" and {len(value) - 30} more" if len(value) > 30 else ""
        )
    return f"{value:g}" if isinstance(value, float) else markdown(str(value))
