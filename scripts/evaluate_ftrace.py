"""Trace facts back to what taught them: FTRACE-TREx, by TRAK and its rivals.

python scripts/evaluate_ftrace.py --scale small --data ../shared/data/ftrace_lama --output out    # a part of the data, a small model: hours on two cores
python scripts/evaluate_ftrace.py --output out                                                    # as published, on a GPU

The same command again goes on where it was stopped. `--scale SCALE` is short for `--config scripts/configs/ftrace_SCALE.yaml`.
"""

import sys
from pathlib import Path

from hf_trak.cli.evaluate_ftrace import main

CONFIGS = Path(__file__).parent / "configs"


def with_config(arguments: list[str]) -> list[str]:
    """Return the arguments with `--scale` replaced by its file of flags."""
    if "--scale" not in arguments:
        return ["--config", str(CONFIGS / "ftrace_paper.yaml"), *arguments]
    place = arguments.index("--scale")
    scale = arguments[place + 1]
    return ["--config", str(CONFIGS / f"ftrace_{scale}.yaml"), *arguments[:place], *arguments[place + 2 :]]


if __name__ == "__main__":
    main(with_config(sys.argv[1:]))
