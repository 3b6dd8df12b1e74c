"""`hf-trak card`: the card of an index, with what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_trak.cli.parsing import Collect, make_parser, name_positions, parse
from hf_trak.messages import say

_USAGE = "INDEX [options]"
_DESCRIPTION = """\
Write the card of an index: what it is of, how to load it, its checkpoints, and how good its scores are where that was measured.

examples:
  hf-trak card my-index
  hf-trak card my-index --results lds.json --license cc-by-4.0 --output my-index/README.md --overwrite
"""


@dataclass
class CardArguments:
    """What the card says, and where it goes."""

    index: str = field(metadata={"help": "Folder, dataset repository or object store URL of an index."})
    results: list[str] | None = field(
        default=None,
        metadata={"help": "Results of `hf-trak evaluate`, to be shown.", "action": Collect},
    )
    name: str | None = field(default=None, metadata={"help": "What the load snippet names; the index by default."})
    license: str | None = field(
        default=None, metadata={"help": "Licence of the training data, as the Hub spells it; where stated, that by default."}
    )
    output: str | None = field(default=None, metadata={"help": "File for the card; printed by default."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the output; what its owner wrote into it stays."})


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse and run."""
    parser = make_parser([CardArguments], command="card", usage=_USAGE, description=_DESCRIPTION)
    return run(*parse(parser, name_positions(arguments, ["index"])))


def run(args: CardArguments) -> dict[str, Any]:
    """Render the card, print or write it, and return it or where it is."""
    output = None if args.output is None else Path(args.output)
    if output is not None and output.suffix != ".md":
        raise ValueError(f"--output must end in .md, but is {output}.")
    existing = _text_of(output) if output is not None and output.exists() else None
    if existing is not None and not args.overwrite:
        raise ValueError(f"{output} exists. Choose another place, or pass --overwrite: what its owner wrote into it stays.")
    rows = [row for path in args.results or [] for row in _rows_of(Path(path))]

    from hf_trak.hub.cards import merge_card
    from hf_trak.hub.copies import find_licence, render_card
    from hf_trak.index import AttributionIndex
    from hf_trak.storage.files import write_atomically, write_folder

    index = AttributionIndex.from_pretrained(args.index)
    licence: Mapping[str, Any] = {"license": args.license}
    if args.license is None:
        licence = find_licence(index.folder, index.members, existing)
    name = args.name or (index.home.name if "://" in args.index or Path(args.index).exists() else args.index)
    card = render_card(index.folder, index.config, index.members, name=name, license=licence, results=rows)
    card = card if existing is None else merge_card(card, existing)
    if output is None:
        print(card, end="")
        return {"text": card}
    write_folder(output.parent)
    write_atomically(output, lambda temporary: temporary.write_text(card, encoding="utf-8"))
    say(f"Card: {output}")
    return {"card": output}


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--output: {path} is no card, which is text in UTF-8. Choose another file.") from error


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a results file.

    Raises:
        ValueError: If it is none.
    """
    from hf_trak.storage.files import read_json

    if not path.is_file():
        raise FileNotFoundError(f"--results: there is no file {path}.")
    rows = read_json(path).get("rows")
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise ValueError(f"{path} is no results file of `hf-trak evaluate`: it has no rows of case, method, metric and value.")
    return rows


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and {"case", "method", "metric", "value"} <= row.keys()
