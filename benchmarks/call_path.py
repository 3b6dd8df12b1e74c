"""How much of the package a reader meets on one path: files, functions and the deepest stack of `hf-trak featurize` and `index.attribute`.

    python benchmarks/call_path.py                        # this tree
    python benchmarks/call_path.py --before ../older      # another tree of hf_trak, too
    python benchmarks/call_path.py --list featurize       # the files and functions of one path, and no results

A BERT of two layers, 24 tokenized rows and one member, in a fresh process for each path. A function counts if it is called after its file
was imported, in any thread, once however often it is called; comprehensions and lambdas belong to the function around them. The
depth counts frames of hf_trak alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PATHS = {"featurize": "hf-trak featurize", "attribute": "index.attribute"}
METRICS = ("call_path_files", "call_path_folders", "call_path_functions", "call_path_depth")


class Recorder:
    """Notes the functions of a package that run; give it to `sys.setprofile`."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self.found: set[CodeType] = set()
        self.depth = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not self._is_ours(code):
            return
        stack = []
        around: FrameType | None = frame
        while around is not None:
            if self._is_ours(around.f_code):
                stack.append(around.f_code.co_name)
            around = around.f_back
        if "<module>" in stack:  # a file is being imported
            return
        self.depth = max(self.depth, len(stack))
        if not code.co_name.startswith("<"):
            self.found.add(code)

    def _is_ours(self, code: CodeType) -> bool:
        return code.co_filename.startswith(str(self.package))

    def names(self) -> list[str]:
        """Return the functions as `folder/file.py name`."""
        return sorted(f"{Path(code.co_filename).relative_to(self.package)} {code.co_qualname}" for code in self.found)


def make_model_and_rows(folder: Path) -> None:
    import torch
    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(folder / "model")
    rows = [{"input_ids": [2 + (3 * row + place) % 40 for place in range(4 + row % 5)], "label": row % 2} for row in range(24)]
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")


def run(path: str, folder: Path) -> tuple[list[str], int]:
    """Run one path of the package that this process imports, and return its functions and the deepest stack."""
    import hf_trak

    recorder = Recorder(Path(hf_trak.__file__).parent)
    if path == "featurize":
        from hf_trak.cli.main import main as start

        arguments = ["--model", folder / "model", "--dataset", folder / "rows.parquet", "--output", folder / "index"]
        command = ["featurize", *map(str, arguments), "--proj_dim", "16"]
        work: Any = lambda: start(command)  # noqa: E731
    else:
        from datasets import Dataset

        index = hf_trak.AttributionIndex(folder / "index")
        queries = Dataset.from_parquet(str(folder / "rows.parquet")).select(range(4))
        work = lambda: index.attribute(queries, top_k=3, progress=False)  # noqa: E731
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return recorder.names(), recorder.depth


def measure(tree: Path, folder: Path) -> dict[str, tuple[list[str], int]]:
    """Run all paths of a tree, each in a process of its own."""
    make_model_and_rows(folder)
    found = {}
    for path in PATHS:
        answer = folder / f"{path}.json"
        command = [sys.executable, __file__, "--child", path, str(folder), str(answer)]
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        names, depth = json.loads(answer.read_text())
        found[path] = names, depth
    return found


def commit_of(tree: Path) -> str:
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another tree of hf_trak, measured too")
    parser.add_argument("--list", choices=PATHS, help="print the files and functions of one path")
    parser.add_argument("--output", type=Path, default=Path("results/call_path.json"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        path, folder, answer = options.child
        Path(answer).write_text(json.dumps(run(path, Path(folder))))
        return
    from featurize import write

    rows = []
    for label, tree in (("before", options.before), ("now", ROOT)):
        if tree is None:
            continue
        with tempfile.TemporaryDirectory() as name:
            found = measure(tree.resolve(), Path(name))
        if options.list and tree == ROOT:
            print("\n".join(found[options.list][0]))
            return
        method = f"{label}, commit {commit_of(tree)}" if options.before else "hf_trak"
        print(f"{method:<32}{'files':>8}{'folders':>9}{'functions':>11}{'depth':>7}")
        for path, (names, depth) in found.items():
            files = {name.split()[0] for name in names}
            values = (len(files), len({str(Path(file).parent) for file in files}), len(names), depth)
            print(f"  {PATHS[path]:<30}{values[0]:>8}{values[1]:>9}{values[2]:>11}{values[3]:>7}")
            for metric, value in zip(METRICS, values, strict=True):
                case = f"BERT of two layers, 24 rows, one member, {PATHS[path]}"
                rows.append({"case": case, "method": method, "metric": metric, "value": value, "unit": "", "interval": None})
    if options.list:
        return
    options.threads = 1
    write(
        options,
        rows,
        command="python benchmarks/call_path.py --before BEFORE" if options.before else "python benchmarks/call_path.py",
    )


if __name__ == "__main__":
    main()
