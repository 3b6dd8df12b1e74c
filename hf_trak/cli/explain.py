"""`hf-trak explain`: one prompt and its answer, or one text or image and its class, to the training rows behind it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_trak.cli.attribute import (
    AskingArguments,
    check_targets,
    load_index,
    load_train,
    most_bytes,
    score_options,
    write_hits,
)
from hf_trak.cli.parsing import make_parser, name_positions, parse, rows_at_a_time

_USAGE = "INDEX (--prompt TEXT | --messages FILE | --text TEXT | --image FILE) [options]"
_DESCRIPTION = """\
Let the model answer a prompt, or classify a text or an image, and show the training rows that raised and lowered that answer
most. The last checkpoint of the index answers, token by token the likeliest one.

examples:
  hf-trak explain my-index --prompt "The capital of France is" --train train.jsonl --report report
  hf-trak explain my-index --prompt "The capital of France is" --answer " Lyon" --contrast " Paris"
  hf-trak explain my-index --prompt "What is in the picture?" --image photo.png --report report
  hf-trak explain my-index --text "a gripping film" --contrast negative positive
"""


@dataclass(kw_only=True)
class ExplainArguments(AskingArguments):
    """What to ask which index."""

    top_k: int = field(default=5, metadata={"help": "Proponents and opponents."})
    prompt: str | None = field(default=None, metadata={"help": "Of a language model: the text to answer."})
    messages: str | None = field(
        default=None, metadata={"help": "Of a language model: a JSON file with the messages of a conversation."}
    )
    text: list[str] | None = field(default=None, metadata={"help": "Of a classifier of texts: the text, or the two texts."})
    image: list[str] | None = field(
        default=None,
        metadata={"help": "Of a classifier of images: the file. With --prompt or --messages: the files that belong to it."},
    )
    answer: str | None = field(default=None, metadata={"help": "What the model is taken to answer, in place of generating it."})
    chat: bool = field(
        default=False,
        metadata={"help": "Make a conversation of --prompt; without it, where the training rows are conversations."},
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Of a generated answer."})
    span: str | None = field(default=None, metadata={"help": "Attribute this part of the answer alone."})
    span_tokens: list[int] | None = field(
        default=None, metadata={"help": "Attribute these tokens of the answer alone: the first, and the one behind the last."}
    )
    target: str | None = field(
        default=None,
        metadata={
            "help": "Of a classifier: a class, by its name or its number in the training set; by default what it predicts."
        },
    )
    contrast: list[str] | None = field(
        default=None,
        metadata={
            "help": "Of a classifier, two classes: what made it say the first and not the second. Of a language model, another answer to "
            "hold the first against."
        },
    )
    heat: bool = field(
        default=False,
        metadata={"help": "Show in the report what each token of the answer adds to the scores; a row to featurize each."},
    )
    output: str | None = field(default=None, metadata={"help": "File for the hits, .jsonl or .parquet."})


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse and run."""
    parser = make_parser([ExplainArguments], command="explain", usage=_USAGE, description=_DESCRIPTION)
    return run(*parse(parser, name_positions(arguments, ["index"])))


def run(args: ExplainArguments) -> dict[str, Any]:
    """Ask, show the answer and the rows, and return them."""
    output = None if args.output is None else Path(args.output)
    check_targets(args, output)
    batch_size = rows_at_a_time(args.batch_size, "--batch_size")
    question = _question(args)

    from hf_trak.cli.main import quiet_libraries
    from hf_trak.querying.report import save_report
    from hf_trak.querying.report_facts import row_links, trust_notes, with_links
    from hf_trak.storage.outputs import naming, output_file
    from hf_trak.tasks.chunks import CHUNK_COLUMNS

    quiet_libraries()
    index = load_index(args)
    train = load_train(args, index)
    found = index.explain(
        **question, **score_options(args, index), top_k=args.top_k, train=train, batch_size=batch_size, progress=False,
        controls=args.report is not None,
    )  # fmt: skip
    if "max_new_tokens" in question:
        print(f"Answer: {found.answer}\n")
    print(found)
    if train is None and not set(index.kept_rows.column_names) - set(CHUNK_COLUMNS):
        print("\nTo see the rows, give the training set (--train), or make the index with --keep_columns.")
    if output is not None:
        n_bytes = most_bytes(1, min(args.top_k, index.n_rows), index.n_rows, kept=index.kept_rows.mean_bytes_as_text)
        with output_file(output, n_bytes=n_bytes) as unfinished, naming(output):
            write_hits(found.hits, unfinished, is_parquet=output.suffix == ".parquet")
        print(f"\nHits: {output}")
    paths: list[Path] = []
    if args.report is not None:
        title = "Which training rows made the model say this"
        reported = with_links([found.attribution], row_links(index, train))
        paths = save_report(reported, args.report, title=title, trust=trust_notes(index, train))
        print("\n".join(f"Report: {path}" for path in paths))
    shown = {
        name: [
            {"row": hit.example.row, "score": hit.score, "label": hit.example.label, "text": hit.example.text} for hit in hits
        ]
        for name, hits in (("proponents", found.attribution.proponents), ("opponents", found.attribution.opponents))
    }
    return {"answer": found.answer, "output": found.attribution.output, **shown, "hits": output, "report": paths}


def _question(args: ExplainArguments) -> dict[str, Any]:
    """Return what is asked, as [`AttributionIndex.explain`] takes it.

    Raises:
        ValueError: If nothing is asked, or several things are.
    """
    given = [name for name in ("prompt", "messages", "text", "image") if getattr(args, name) is not None]
    with_pictures = len(given) == 2 and given[0] in ("prompt", "messages") and given[1] == "image"
    if len(given) != 1 and not with_pictures:
        raise ValueError(
            f"Give one of --prompt, --messages, --text and --image, or --image with --prompt or --messages; given are "
            f"{', '.join(f'--{name}' for name in given) or 'none'}."
        )
    if args.span is not None and args.span_tokens is not None:
        raise ValueError("Give --span or --span_tokens, and not both.")
    if args.span_tokens is not None and len(args.span_tokens) != 2:
        raise ValueError(f"--span_tokens takes two numbers, but {len(args.span_tokens)} were given.")
    contrast: Any = args.contrast
    if contrast is not None and given[0] in ("prompt", "messages"):
        contrast = contrast[0] if len(contrast) == 1 else contrast
    question = {"target": args.target, "contrast": contrast, "answer": args.answer, "chat": True if args.chat else None}
    question["heat"] = args.heat
    question["span"] = args.span if args.span_tokens is None else range(*args.span_tokens)
    if given[0] in ("prompt", "messages"):
        question["max_new_tokens"] = args.max_new_tokens
        question["prompt"] = args.prompt if given[0] == "prompt" else _read_messages(Path(str(args.messages)))
        question["image"] = args.image
    elif given[0] == "text":
        question["prompt"] = args.text
    elif args.image is not None:
        if len(args.image) != 1:
            raise ValueError(f"A classifier classifies one image, but --image names {len(args.image)}.")
        question["image"] = args.image[0]
    return question


def _read_messages(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. It must be a list of messages with 'role' and 'content'.") from error
