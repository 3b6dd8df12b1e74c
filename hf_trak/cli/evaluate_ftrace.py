"""`hf-trak evaluate ftrace`: how well attributions find, and remove, what taught a model its facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_trak.cli.main import OneLineErrors
from hf_trak.cli.parsing import make_parser, parse

_USAGE = "[--scale small] --output FOLDER [options]"
_DESCRIPTION = """\
Fine-tune a seq2seq model on FTRACE-TREx, see which facts that taught it, rank the abstracts by TRAK, TracIn, EMBED and BM25+, remove
the highest ranked, and fine-tune again. Stopped at any moment, the same command goes on where it stopped; the members and the
retraining runs may be shared by several processes with --shard_index and --num_shards.

examples:
  hf-trak evaluate ftrace --output out                                        # as published: mT5-small, 60,000 steps
  hf-trak evaluate ftrace --scale small --data ftrace_lama --output out       # a part of the data, a small model, two cores
  hf-trak evaluate ftrace --output out --stages forget --shard_index 3 --num_shards 100
"""


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse and run."""
    from hf_trak.cli.main import quiet_libraries
    from hf_trak.evaluation.fact_tracing import run_ftrace

    args, recipe = parse_arguments(arguments)
    quiet_libraries()
    found = run_ftrace(args, recipe)
    print(table(found.get("rows", [])))
    return found


def parse_arguments(arguments: Sequence[str]) -> tuple[Any, Any]:
    """Return the flags; `--scale` sets the defaults of all others."""
    from hf_trak.evaluation.fact_tracing import SCALES, FineTuning, FTraceArguments

    first = OneLineErrors(prog="hf-trak evaluate ftrace", add_help=False, allow_abbrev=False)
    first.add_argument("--scale", choices=sorted(SCALES), default="paper")
    chosen, rest = first.parse_known_args(arguments)
    parser = make_parser([FTraceArguments, FineTuning], command="evaluate ftrace", usage=_USAGE, description=_DESCRIPTION)
    parser.add_argument("--scale", choices=sorted(SCALES), default="paper", help="paper, or small enough for two cores")
    parser.set_defaults(**SCALES[chosen.scale])
    args, recipe, *_ = parse(parser, rest)
    return args, recipe


_COLUMNS = ("mrr", "recall_at_10", "hit_at_10", "precision_at_10", "forgotten_share", "counterfactual_delta")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the result rows that matter, one line each; published figures come last, marked as such."""
    lines = []
    for row in rows:
        if row["metric"] in _COLUMNS:
            interval = "" if row["interval"] is None else " [{:.3f}, {:.3f}]".format(*row["interval"])
            where = row.get("level") or (f"top {row['top_k']}" if row.get("top_k") else "all")
            mark = " (published, another model and corpus)" if row.get("published") else ""
            lines.append(f"{row['method'] + mark:<60} {where:<9} {row['metric']:<22} {row['value']:.3f}{interval}")
    return "\n".join(lines)
