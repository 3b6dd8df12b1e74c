"""Where a training set comes from: its repository, the commit it was loaded at, and its licence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

_LICENCE_KEYS = ("license", "license_name", "license_link")


def describe_source(dataset: Dataset) -> dict[str, Any]:
    """Return what is known of where a dataset comes from, as `{"source": {...}}`; nothing where nothing is."""
    place = _repository(Path(file["filename"]) for file in dataset.cache_files)
    known = {**place, **({"license": dataset.info.license} if dataset.info.license else {})}
    return {"source": known} if known else {}


def _repository(files: Iterable[Path]) -> dict[str, str]:
    """Return the repository and commit that the cached files of a dataset were made from.

    A Dataset does not say, but `load_dataset` keeps its files under .../<namespace>___<name>/<config>/<version>/<commit>/, with a name
    of its own spelling, and what it downloaded under datasets--<namespace>--<name>/snapshots/<commit>.
    """
    from huggingface_hub import constants

    for file in files:
        commit = file.parent.name
        if not (re.fullmatch("[0-9a-f]{40}", commit) and "___" in str(file)):
            continue
        for snapshot in Path(constants.HF_HUB_CACHE).glob(f"datasets--*/snapshots/{commit}"):
            return {"repository": "/".join(snapshot.parts[-3].split("--")[1:]), "revision": commit}
    return {}


def licence_of_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the licence that a dataset's own card names, as keys for another card; nothing where there is none.

    Args:
        source (`Mapping`): From [`describe_source`], without its outer key.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if source.get("license"):
        return {"license": source["license"]}
    if "repository" not in source:
        return {}
    try:
        card = hf_hub_download(source["repository"], "README.md", repo_type="dataset", revision=source["revision"])
    except (HfHubHTTPError, LocalEntryNotFoundError):  # no card, gone, or out of reach: the caller asks for one
        return {}
    return licence_in(Path(card).read_text(encoding="utf-8"))


def licence_in(card: str) -> dict[str, Any]:
    """Return the licence that a card's YAML names, with its name and link if it is one of its own; nothing where there is none."""
    from huggingface_hub import DatasetCard

    if not card.startswith("---"):
        return {}
    values = DatasetCard(card, ignore_metadata_errors=True).data.to_dict()
    return {key: values[key] for key in _LICENCE_KEYS if values.get(key)}
