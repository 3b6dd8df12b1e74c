"""`hf-trak merge`: what an array of jobs has made, to an index."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from hf_trak.cli.main import OneLineErrors
from hf_trak.messages import say

_DESCRIPTION = """\
Put an index together that jobs with --shard-index and --num-shards have made: check every file against its hash, sum the Gram matrices,
and write what an index has besides. If files are missing, say which, and how to make them. Run it once, when the jobs are done.

example:
  hf-trak merge my-index
"""


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse and run."""
    parser = OneLineErrors(
        prog="hf-trak merge",
        usage="hf-trak merge INDEX",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("index", metavar="INDEX", help="The folder or URL that the jobs had as --output.")
    return run(parser.parse_args(list(arguments)).index)


def run(folder: str) -> dict[str, Any]:
    """Merge, say where the index lies, and return it."""
    from hf_trak.cli.featurize import describe_index, facts_of
    from hf_trak.cli.main import quiet_libraries
    from hf_trak.index import AttributionIndex

    quiet_libraries()
    begin = time.perf_counter()
    index = AttributionIndex.merge(folder)
    say(describe_index(index, folder, seconds=time.perf_counter() - begin))
    return facts_of(index)
