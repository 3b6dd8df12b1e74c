"""How many of transformers' architectures are right, refused by name, or wrong, against a plain loop over examples.

python -m tests.zoo --output results/zoo.json                        # every case; a second run goes on where the first ended
python -m tests.zoo --output out.json --tasks causal-lm --only llama,mamba
python -m tests.zoo --one text-classification bert                   # one case in this process, its record printed
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import disable_progress_bars
from transformers.utils.logging import set_verbosity_error

from tests.zoo.cases import TASKS, all_cases, run_case
from tests.zoo.summary import summarize
from tests.zoo.sweep import read_lines, run_all


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="the summary; the lines of single cases go beside it, in NAME.jsonl")
    parser.add_argument("--lines", type=Path, help="another file for the lines")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--only", default="", help="model types, separated by commas")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th case, from the I-th, so that N processes share the work")
    parser.add_argument("--limit", type=int, default=60, help="seconds of CPU time for one case")
    parser.add_argument("--again", default="", help="outcomes whose cases run once more, such as 'not built,crash'")
    parser.add_argument("--summarize", action="store_true", help="run nothing, and write the summary of the lines there are")
    parser.add_argument("--one", nargs=2, metavar=("TASK", "TYPE"), help="run one case here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    set_verbosity_error()
    logging.getLogger("hf_trak").setLevel(logging.ERROR)
    if options.one:
        for case in all_cases([options.one[0]], [options.one[1]]):
            print(json.dumps(run_case(case), indent=1))
        return
    if options.output is None:
        parser.error("--output says where the summary goes")
    tasks, only = options.tasks.split(","), [name for name in options.only.split(",") if name]
    lines = options.lines or options.output.with_suffix(".jsonl")
    part, n_parts = map(int, options.part.split("/"))
    cases = list(all_cases(tasks, only))
    if not options.summarize:
        run_all(cases[part::n_parts], lines, limit=options.limit, again=options.again.split(","))
    records = read_lines(lines)
    found = [records[case] for case in cases if case in records]
    options.output.write_text(json.dumps(summarize(found, n_cases=len(cases)), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
