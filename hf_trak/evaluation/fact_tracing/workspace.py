"""The folder of one evaluation: what is asked and what was trained, each made once and then read.

```
data      abstracts.parquet, background.parquet, queries.parquet
learn     model/ (what is fine-tuned), runs/full/, learned.json: what fine-tuning taught
members   runs/member-000/, ...: fine-tuned on random halves
rank      candidates.json.gz, index/, scores/*.npz
forget    forgetting/*.json, one per run
report    results.json
```
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from jaxtyping import Bool, Int64

from hf_trak.evaluation.fact_tracing.data import Candidates, draw_candidates, find_proponents, load_candidates, save_candidates
from hf_trak.evaluation.fact_tracing.fine_tuning import FineTuning
from hf_trak.evaluation.fact_tracing.methods import BM25PlusSentences
from hf_trak.evaluation.fact_tracing.settings import FTraceArguments
from hf_trak.evaluation.fact_tracing.task import EncodedRows, Encoder
from hf_trak.evaluation.subsets import make_masks
from hf_trak.hashing import stream_key
from hf_trak.messages import list_differences
from hf_trak.sources.checkpoints import load_model, load_processing_class
from hf_trak.storage.files import read_json, write_json

_LOG = "stages.jsonl"
_SETTINGS = "ftrace.json"


def begin(folder: Path, identity: dict[str, object]) -> None:
    """Take a folder for an evaluation, or go on with it.

    Raises:
        ValueError: If it was begun with other settings; the message lists what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SETTINGS
    wanted = json.loads(json.dumps(identity))
    if path.exists() and (found := read_json(path)) != wanted:
        differences = "\n".join(f"  {line}" for line in list_differences(found, wanted))
        raise ValueError(f"{folder} was begun with other settings:\n{differences}\nChoose another folder.")
    if not path.exists():
        write_json(path, wanted)


@contextmanager
def timed(folder: Path, stage: str) -> Iterator[None]:
    """Write down the CPU and wall seconds of what is done inside, if it took any."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        seconds = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        with open(folder / _LOG, "a") as log:
            log.write(json.dumps({"stage": stage, **{key: round(value, 3) for key, value in seconds.items()}}) + "\n")


def seconds_by_stage(folder: Path) -> dict[str, dict[str, float]]:
    """Return the sums over all calls, by stage, in the order of their first call."""
    totals: dict[str, dict[str, float]] = {}
    path = folder / _LOG
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        total = totals.setdefault(entry.pop("stage"), {"cpu_s": 0.0, "wall_s": 0.0})
        for key, value in entry.items():
            total[key] += value
    return totals


NOT_SHARED = ("output", "results", "stages", "shard_index", "num_shards", "device")
"""Flags that may differ from call to call in one folder."""


class Workspace:
    """One evaluation in one folder.

    Raises:
        ValueError: If the folder was begun with other settings, or a checkpoint is wanted after the last step.
    """

    def __init__(self, args: FTraceArguments, recipe: FineTuning) -> None:
        if late := [step for step in args.checkpoint_steps if not 0 < step <= recipe.steps]:
            raise ValueError(
                f"`checkpoint_steps` must lie in 1 to {recipe.steps}, the steps of fine-tuning, but there is {late}."
            )
        self.args, self.recipe = args, recipe
        self.folder = Path(args.output)
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        shared = {name: value for name, value in asdict(args).items() if name not in NOT_SHARED}
        begin(self.folder, {**shared, **{f"fine_tuning.{name}": value for name, value in asdict(recipe).items()}})

    @property
    def shard(self) -> tuple[int, int]:
        """Which part of the members, of the rankings and of the retraining runs this call does, and of how many."""
        return self.args.shard_index, self.args.num_shards

    # --- texts

    def read(self, name: str) -> Dataset:
        """Return one of the Parquet files."""
        return load_dataset("parquet", data_files={"train": str(self.folder / f"{name}.parquet")}, split="train")

    @cached_property
    def abstracts(self) -> Dataset:
        """What is fine-tuned on, and credited."""
        return self.read("abstracts")

    @cached_property
    def queries(self) -> Dataset:
        """All that may be asked."""
        return self.read("queries")

    @cached_property
    def rows(self) -> EncodedRows:
        """The abstracts' tokens."""
        return EncodedRows(self.abstracts, self.encoder)

    # --- models

    @property
    def start(self) -> Path | str:
        """What fine-tuning begins with."""
        return self.folder / "model" if self.args.model == "scratch" else self.args.model

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer, scoring all of a target, as in training."""
        start = load_model(str(self.start)).config.decoder_start_token_id
        return Encoder(load_processing_class(str(self.start)), start)

    def fresh_model(self) -> Any:
        """Return a model to fine-tune."""
        model = load_model(str(self.start))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = self.args.dropout
        return model.to(self.device)

    def checkpoint(self, step: int | None = None) -> Path:
        """Return where the full run's weights lie after a step, by default the last."""
        return self._checkpoint("full", step or self.recipe.steps)

    @property
    def checkpoints(self) -> list[Path]:
        """The full run's weights that TracIn takes."""
        return [self.checkpoint(step) for step in self.args.checkpoint_steps]

    def member_checkpoint(self, number: int) -> Path:
        """Return where a member's weights lie."""
        return self._checkpoint(self.member(number), self.member_recipe.steps)

    def _checkpoint(self, run: str, step: int) -> Path:
        return self.folder / "runs" / run / f"step-{step:06d}"

    @property
    def member_recipe(self) -> FineTuning:
        """How a member is fine-tuned: on a share of the abstracts in that share of the steps, which is as many passes."""
        return replace(self.recipe, steps=max(1, round(self.args.alpha * self.recipe.steps)))

    def seed_of(self, run: str) -> int:
        """Return the seed of a run, which differs from any other's."""
        return stream_key("ftrace run", self.args.seed, run) % 2**63

    def member(self, number: int) -> str:
        """Return the name of a member's run."""
        return f"member-{number:03d}"

    @cached_property
    def masks(self) -> Bool[np.ndarray, "n_members n_train"]:
        """Which abstracts each member is fine-tuned on."""
        return make_masks(len(self.abstracts), self.args.n_members, self.args.alpha, seed=self.args.seed)

    # --- what is asked

    @cached_property
    def asked(self) -> tuple[Dataset, list[Candidates]]:
        """The queries that are ranked for, and their candidates; drawn once, and the same for all methods."""
        path = self.folder / "candidates.json.gz"
        if self.args.candidates is not None:
            path = Path(self.args.candidates)
        elif not path.exists():
            self._draw_candidates(path)
        return load_candidates(path, self.abstracts, self.queries)

    def _draw_candidates(self, path: Path) -> None:
        order = np.random.default_rng(self.args.seed).permutation(self._query_slice())
        queries = self.queries.select(np.sort(order[: self.args.n_queries]))
        candidates = draw_candidates(
            self.abstracts,
            queries,
            find_proponents(self.abstracts, queries),
            BM25PlusSentences().nearest_to(self.abstracts, queries, self.args.n_nearest),
            n_same_target=self.args.n_same_target,
            n_random=self.args.n_random,
            seed=self.args.seed,
        )
        save_candidates(path, candidates, self.abstracts, queries)

    def _query_slice(self) -> Int64[np.ndarray, " n"]:
        if self.args.query_slice == "all":
            return np.arange(len(self.queries))
        learned = np.array(read_json(self.folder / "learned.json")["learned"], dtype=np.int64)
        if len(learned) < 2:  # variants are chosen on one half for the other
            raise ValueError(
                f"Fine-tuning taught {len(learned) or 'none'} of the queries, and two are needed; train longer, or with another "
                "learning rate."
            )
        return learned

    @cached_property
    def targets(self) -> Int64[np.ndarray, " n_targets"]:
        """Which of the asked queries the model is to forget."""
        n_asked = len(self.asked[0])
        return np.random.default_rng(self.args.seed + 1).permutation(n_asked)[: self.args.n_targets]

    @property
    def case(self) -> str:
        """Say what model and data the results are of."""
        model = "mT5 from scratch" if self.args.model == "scratch" else self.args.model
        return f"{Path(self.args.data).name}, {len(self.abstracts):,} abstracts, {model}, {self.args.n_members} members"
