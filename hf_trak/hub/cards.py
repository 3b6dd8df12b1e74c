"""The dataset card of an index. With its YAML, `load_dataset(folder, "member_0")` works without hf_trak."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hf_trak.config import TrakConfig
from hf_trak.hashing import hash_json
from hf_trak.members import ADAPTER
from hf_trak.messages import markdown, markdown_code, visible
from hf_trak.scoring.damping import DampingChoice
from hf_trak.scoring.ensemble import default_power
from hf_trak.storage.files import write_atomically
from hf_trak.storage.format import CURVE_NAME

if TYPE_CHECKING:
    from huggingface_hub import DatasetCardData

TEMPLATES = Path(__file__).parent / "templates"

# The part between these markers is replaced whenever the card is written. The rest belongs to the card's owner.
BEGIN = "<!-- Written by hf_trak. What stands above or below this part is kept when it is written anew. -->"
END = "<!-- End of what hf_trak writes. -->"

# Measurements stay in the card as long as the features are the same.
_MEASURED = re.compile(r"(<!-- Measured of the features \w+\. -->\n)(.*?)(?=\n\n## )", re.DOTALL)
_NOT_MEASURED = "Not measured"

_TAGS = ["trak", "data-attribution"]
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "10B<n<100B")
_LISTED_MEMBERS = 20
_LISTED_NAMES = 30
_NAMED = 4
_SHOWN_UNITS = ("s", "CPU s", "GB", "cosine", "output")
_QUALITY = ("lds", "lds_ceiling", "mrr", "recall_at_10", "hit_at_10", "flipped_found_share", "counterfactual_delta")


def render_index_card(
    config: TrakConfig,
    members: Sequence[Mapping[str, Any]],
    *,
    name: str,
    choice: DampingChoice | None = None,
    has_curve: bool = False,
    license: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the README.md of an index.

    Args:
        members (`Sequence[Mapping]`): The members' `member.json`, in order.
        name (`str`): The repository, or the folder's name, for the code that loads the index.
        choice (`DampingChoice`, *optional*): The choice of damping by the members' masks.
        has_curve (`bool`): Whether the picture of its curve is beside the card.
        license (`Mapping`, *optional*): The YAML keys of the licence: `license`, and if necessary `license_name` and `license_link`.
        results (`Sequence[Mapping]`): Rows of results files. Those on the quality of scores are shown.
    """
    from huggingface_hub import DatasetCard

    first = members[0]
    license = license or {}
    card = DatasetCard.from_template(
        index_metadata(members, license),
        template_path=str(TEMPLATES / "index_card.md"),
        begin=BEGIN,
        end=END,
        config=config,
        name=json.dumps(visible(name).replace("`", "'"), ensure_ascii=False)[1:-1],
        task=markdown(str(first["identity"]["task"])),
        n_rows=first["identity"]["n_rows"],
        n_members=_count_members(members),
        coverage=first["coverage"],
        grad_dim=first.get("grad_dim"),
        size=show_bytes(sum(entry["bytes"] for member in members for entry in member["files"])),
        source=_describe_training_set(first),
        members=[member_row(number, member) for number, member in enumerate(members[:_LISTED_MEMBERS])],
        more_members=max(0, len(members) - _LISTED_MEMBERS),
        paths=describe_paths(members, config.out_to_loss_power),
        points=any("point" in member["identity"] for member in members),
        has_dropout=any("dropout_seed" in member["identity"] for member in members),
        kept=[markdown_code(str(column)) for column in first["identity"].get("kept", {}).get("columns", [])],
        versions=markdown(", ".join(f"{library} {version}" for library, version in first["versions"].items())),
        hardware=markdown(str(first["hardware"])),
        choice=choice,
        curve=list(zip(choice.grid, choice.curve, strict=True)) if choice else [],
        curve_name=CURVE_NAME,
        has_curve=has_curve,
        license=license.get("license"),
        license_shown=markdown_code(" ".join(str(value) for value in license.values())),
        features_sha256=hash_json([member["files"] for member in members])[:16],
        results=[show_result(row) for row in results if row["metric"] in _QUALITY],
        not_measured=_NOT_MEASURED,
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)) + "\n"


def index_metadata(members: Sequence[Mapping[str, Any]], license: Mapping[str, Any]) -> DatasetCardData:
    """Return the YAML of an index's card: its members as configurations, the model and dataset, and the licence."""
    from huggingface_hub import DatasetCardData

    n_rows = members[0]["identity"]["n_rows"]
    source = members[0].get("source", {})
    models = [member["checkpoint"]["repository"] for member in members]
    models += [member["base"]["repository"] for member in members if "base" in member]
    values: dict[str, Any] = {**license, "base_model": list(dict.fromkeys(model for model in models if model is not None))}
    return DatasetCardData(
        **{key: value for key, value in values.items() if value},
        tags=_TAGS,
        source_datasets=[source["repository"]] if "repository" in source else None,
        size_categories=_SIZES[min(max(0, len(str(n_rows)) - 3), len(_SIZES) - 1)],
        configs=[
            {
                "config_name": f"member_{number}",
                "data_files": [{"split": "train", "path": f"member_{number}/train-*.parquet"}],
                **({"default": True} if number == 0 else {}),
            }
            for number in range(len(members))
        ],
    )


def merge_card(card: str, existing: str) -> str:
    """Return `card` with the owner's parts of `existing`: their YAML keys, tags, configurations and text.

    If the existing text has no part by hf_trak, the text does not change.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    ours, theirs = DatasetCard(card), DatasetCard(existing, ignore_metadata_errors=True)
    our_values, values = ours.data.to_dict(), theirs.data.to_dict()
    kept = [one for one in values.get("configs", []) if not re.fullmatch(r"member_\d+", str(one.get("config_name")))]
    configs = [dict(one) for one in our_values["configs"]]
    if any(one.get("default") for one in kept):
        configs[0].pop("default")
    stated = "license" in our_values
    theirs_alone = {k: v for k, v in values.items() if k not in our_values and not (stated and k.startswith("license"))}
    merged = {
        **our_values,
        **theirs_alone,
        "tags": list(dict.fromkeys([*_listed(values.get("tags")), *our_values["tags"]])),
        "configs": [*kept, *configs],
    }
    text = theirs.text
    if not text.strip():
        text = ours.text
    elif BEGIN in text and END in text.split(BEGIN, 1)[1]:
        before, rest = text.split(BEGIN, 1)
        part, after = rest.split(END, 1)
        text = before + _with_results_of(ours.text.strip(), part) + after
    return f"---\n{DatasetCardData(**merged).to_yaml()}\n---\n{text}"


def _with_results_of(text: str, old: str) -> str:
    """Return a card's text with the measurements of an older card for the same features, if the new text has none."""
    found, before = _MEASURED.search(text), _MEASURED.search(old)
    if found is None or before is None or found[1] != before[1] or not found[2].startswith(_NOT_MEASURED):
        return text
    return text.replace(found[0], before[0])


def show_result(row: Mapping[str, Any]) -> dict[str, str]:
    """Format a row of a results file as text."""
    interval = row.get("interval")
    return {
        **{key: markdown(str(row[key])) for key in ("case", "method", "metric")},
        "value": f"{show_number(row['value'])} {row.get('unit', '') if row.get('unit') in _SHOWN_UNITS else ''}".strip(),
        "interval": " to ".join(map(show_number, interval)) if interval else "",
    }


def show_number(value: float | None) -> str:
    """Format a number with three digits, as in all tables."""
    if value is None:
        return "not finite"
    if abs(value) < 1e-9:
        return "0"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def show_bytes(n_bytes: int) -> str:
    """Format a size with its unit."""
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes} bytes"


def render_model_section(members: str) -> str:
    """Return the section on attribution for a model card."""
    return (TEMPLATES / "model_section.md").read_text(encoding="utf-8").replace("{members}", members)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _describe_training_set(member: Mapping[str, Any]) -> str:
    """Describe the training set and its rows, as far as they are known."""
    source, called, dataset = member.get("source", {}), member["training_set"], member["identity"]["dataset"]
    if "repository" in source:
        what = f"{_link(source['repository'], 'datasets/')} at commit {markdown_code(str(source['revision']))}"
    else:
        what = f"a dataset that was not loaded from the Hub{', ' + markdown(str(called['name'])) if called['name'] else ''}"
    parts = [f"{key} {markdown_code(str(called[key]))}" for key in ("config", "split") if called[key] is not None]
    read = [f"{key} {_quote(value)}" for key, value in dataset["columns"].items()]
    return (
        f"The training set is {what}{', ' if parts else ''}{', '.join(parts)}, with the columns {_quote(called['columns'])}. "
        + (f"Columns read: {'; '.join(read)}. " if read else "A custom task read them. ")
        + (f"Labels: {_quote(dataset['label_names'])}. " if dataset["label_names"] else "")
        + f"Row order is the training set's. SHA-256 of the rows' content: {markdown_code(str(dataset['sha256']))}."
    )


def _link(repository: str, kind: str = "") -> str:
    """Return a link to a repository of the Hub."""
    return f"[{markdown(str(repository))}](https://huggingface.co/{kind}{quote(str(repository))})"


def _quote(names: str | Sequence[str]) -> str:
    """Return names as code; for a long list, only the first ones."""
    listed = [names] if isinstance(names, str) else list(names)
    return ", ".join(markdown_code(str(name)) for name in listed[:_LISTED_NAMES]) + (
        ", ..." if len(listed) > _LISTED_NAMES else ""
    )


def member_row(number: int, member: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the table of members."""
    identity, place = member["identity"], member["checkpoint"]
    what = f"{markdown(str(identity['model_class']))}, weights {markdown_code(str(identity['model_sha256'])[:12])}"
    if place["repository"] is not None:
        what += f", {_link(place['repository'])}"
        what += f" at commit {markdown_code(str(place['revision']))}" if place["revision"] else ""
    if (point := identity.get("point")) is not None:
        what += f"; {_describe_point(point, member['base'])}"
    return {
        "number": number,
        "checkpoint": what,
        "seed": identity["seed"],
        "dropout_seed": identity.get("dropout_seed", ""),
    }


def _describe_point(point: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Describe the point of a path at which a member was computed."""
    if point.get("base") == ADAPTER:
        return f"its adapter times {point['alpha']:g}"
    where = "a base in a folder" if base["repository"] is None else _link(base["repository"])
    where += f" at commit {markdown_code(str(base['revision']))}" if base["revision"] else ""
    return (
        f"the point {point['alpha']:g} of the line to it from {where}, weights {markdown_code(str(point['base_sha256'])[:12])}"
    )


def describe_paths(members: Sequence[Mapping[str, Any]], out_to_loss_power: float | None = None) -> list[str]:
    """Describe the points of a path in an index, and their effect on scores; empty for other indexes.

    Args:
        out_to_loss_power (`float`, *optional*): The configuration's.
    """
    points = [member for member in members if "point" in member["identity"]]
    if not points:
        return []
    alphas = sorted({member["identity"]["point"]["alpha"] for member in points})
    many = len(points) < len(members)
    kind = members[0]["identity"]["out_to_loss_kind"]
    which = (
        "The member is a point"
        if len(members) == 1
        else f"{len(points) if many else 'All'} of {len(members)} members are points"
    )
    lines = [
        f"{which} base + alpha (final - base) of a path, alpha = {', '.join(f'{alpha:g}' for alpha in alphas)}: outputs and out_to_loss are "
        "the point's, not the final model's; query_output of hits is the final model's."
    ]
    new = sorted({name for member in points for name in member["identity"]["point"]["from_zero"] if ".lora_" not in name})
    kept = sorted({name for member in points for name in member["identity"]["point"]["kept"]})
    if new:
        lines.append(f"New in the final model, so they start from 0: {_shorten(new)}.")
    if kept:
        lines.append(f"Not in the base, so they keep their final values: {_shorten(kept)}.")
    measured = max(member["identity"]["point"].get("statistics", {}).get("modules", 0) for member in points)
    if measured:
        lines.append(f"The running statistics of {measured} modules were measured at the point, on training rows.")
    if default_power(kind) < 1 and out_to_loss_power is None:
        said = "1/2, as for final checkpoints" if many else "1; for final checkpoints it is 1/2"
        lines.append(f"By default scores use 1 - p to the power {said} (out_to_loss_power).")
    return lines


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _count_members(members: Sequence[Mapping[str, Any]]) -> str:
    """Return the number of members, and the numbers of checkpoints and dropout masks if they are smaller."""
    checkpoints = {member.get("checkpoint_number", i) for i, member in enumerate(members)}
    dropouts = {member["identity"].get("dropout_seed") for member in members} - {None}
    text = str(len(members))
    if len(checkpoints) < len(members):
        text += f", of {len(checkpoints)} checkpoint{'s' * (len(checkpoints) > 1)}"
    return text + (f", with {len(dropouts)} dropout mask{'s' * (len(dropouts) > 1)}" if dropouts else "")


def draw_damping_curve(choice: DampingChoice, folder: Path) -> bool:
    """Draw the curve of a damping choice into `folder`. Without matplotlib nothing is drawn, and the card has only a table."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from hf_trak.plots import PLOTS, damping_rows, save_png

    rows = damping_rows(choice)
    write_atomically(
        folder / CURVE_NAME, lambda temporary: save_png(rows, temporary, PLOTS["damping_curve"], mark=choice.damping)
    )
    return True
