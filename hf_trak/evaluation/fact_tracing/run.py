"""The whole evaluation, stage by stage: learn facts, rank candidates by every method, remove what was credited, and ask again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_trak.evaluation.fact_tracing.answers import beams, fine_tune_learned, is_right
from hf_trak.evaluation.fact_tracing.counterfactual import Answers, Forgetting, run_forgetting
from hf_trak.evaluation.fact_tracing.data import load_ftrace
from hf_trak.evaluation.fact_tracing.encoding import EncodedRows, Encoder
from hf_trak.evaluation.fact_tracing.fine_tuning import FineTuning, fine_tune, save_with_moments
from hf_trak.evaluation.fact_tracing.output import fact_task
from hf_trak.evaluation.fact_tracing.rankings import Rankings
from hf_trak.evaluation.fact_tracing.report import write_report
from hf_trak.evaluation.fact_tracing.settings import STAGES, FTraceArguments
from hf_trak.evaluation.fact_tracing.small import draw_corpus, small_mt5, texts_of, train_tokenizer
from hf_trak.evaluation.fact_tracing.stages import timed
from hf_trak.evaluation.fact_tracing.workspace import Workspace
from hf_trak.evaluation.training import save_checkpoint
from hf_trak.sources.checkpoints import load_model
from hf_trak.storage.files import write_atomically, write_json

_LEFT_BY = {"data": "queries.parquet", "learn": "learned.json"}
"""What these stages write last, for all later ones to read."""


def run_ftrace(args: FTraceArguments, recipe: FineTuning) -> dict[str, Any]:
    """Do the stages that `args` names, and return the result rows if `report` is one.

    Raises:
        FileNotFoundError: If an earlier stage has not been done.
    """
    space = Workspace(args, recipe)
    rankings = Rankings(space)
    stages = {
        "data": lambda: draw_data(space),
        "learn": lambda: learn(space),
        "members": lambda: train_members(space),
        "rank": rankings.compute,
        "forget": lambda: forget(space, plan_removals(rankings)),
    }
    for stage in args.stages:
        for earlier, file in _LEFT_BY.items():
            if STAGES.index(earlier) < STAGES.index(stage) and not (space.folder / file).exists():
                raise FileNotFoundError(f"{space.folder} lacks {file}. Do the stage `{earlier}` before `{stage}`.")
        if stage == "report":
            return write_report(space, rankings, plan_removals(rankings))
        with timed(space.folder, stage):
            stages[stage]()
    return {}


def draw_data(space: Workspace) -> None:
    """Draw the corpus, or take all of it."""
    if (space.folder / "queries.parquet").exists():
        return
    args = space.args
    ftrace = load_ftrace(args.data)
    parts = {"abstracts": ftrace.abstracts, "queries": ftrace.queries}
    if args.n_corpus_queries is not None:
        corpus = draw_corpus(
            ftrace,
            n_queries=args.n_corpus_queries,
            n_background=args.n_background,
            n_taught=args.n_taught,
            fewest_proponents=args.fewest_proponents,
            most_proponents=args.most_proponents,
            most_words=args.most_words,
            not_among=args.not_among,
            seed=args.seed,
        )
        parts = corpus._asdict()
    for name in sorted(parts):  # queries last
        write_atomically(space.folder / f"{name}.parquet", partial(_write_rows, parts[name]))


def _write_rows(rows: Dataset, path: Path) -> None:
    rows.to_parquet(str(path))


def learn(space: Workspace) -> None:
    """Fine-tune on all abstracts, and see which queries that taught."""
    _make_model(space)
    kept = {step: space.checkpoint(step) for step in [*space.args.checkpoint_steps, space.recipe.steps]}
    _fine_tune(space, "full", range(len(space.abstracts)), space.recipe, kept)
    path = space.folder / "learned.json"
    if path.exists():
        return
    before, after = (
        beams(load_model(str(folder)).to(space.device), space.encoder, space.queries)
        for folder in (space.start, space.checkpoint())
    )
    learned = fine_tune_learned(before, after, space.queries)
    known = [float(is_right(answers, space.queries, among=k).mean()) for answers in (before, after) for k in (1, 3)]
    names = ("top_1_before", "top_3_before", "top_1_after", "top_3_after")
    write_json(path, {"learned": np.flatnonzero(learned).tolist(), **dict(zip(names, known, strict=True))})


def _make_model(space: Workspace) -> None:
    """Train the small model on what it is to have read before, where one is wanted."""
    args = space.args
    if args.model != "scratch" or (space.folder / "model").exists():
        return
    background = space.read("background")
    tokenizer = train_tokenizer(texts_of(space.abstracts, background), vocab_size=args.vocab_size)
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        model = small_mt5(len(tokenizer), width=args.width, n_layers=args.n_layers, dropout=args.dropout).to(space.device)
    rows = EncodedRows(background, Encoder(tokenizer, 0))
    recipe = replace(
        space.recipe,
        steps=args.pretrain_steps,
        batch_size=args.pretrain_batch_size,
        learning_rate=args.pretrain_learning_rate,
        decay=True,
    )
    with timed(space.folder, "learn: pretraining"):
        fine_tune(model, rows, range(len(rows)), recipe, seed=args.seed, description="Pretraining")
    save_checkpoint(space.folder / "model", model, tokenizer)


def _fine_tune(space: Workspace, run: str, subset: Sequence[int], recipe: FineTuning, checkpoints: Mapping[int, Path]) -> None:
    """Fine-tune on some abstracts, and save the weights of some steps, the last among them."""
    if checkpoints[recipe.steps].exists():  # it is saved after all others, and says that the run is done
        return
    model = space.fresh_model()

    def on_step(step: int, optimizer: torch.optim.Optimizer) -> None:
        if step in checkpoints:
            save_with_moments(checkpoints[step], model, optimizer, space.encoder.tokenizer)

    seed = space.seed_of(run)
    fine_tune(model, space.rows, subset, recipe, seed=seed, on_step=on_step, description=f"Fine-tuning {run}")


def train_members(space: Workspace) -> None:
    """Fine-tune this shard's members on their halves."""
    number, n_shards = space.shard
    recipe = space.member_recipe
    for member in range(number, space.args.n_members, n_shards):
        checkpoints = {recipe.steps: space.member_checkpoint(member)}
        _fine_tune(space, space.member(member), np.flatnonzero(space.masks[member]).tolist(), recipe, checkpoints)


def plan_removals(rankings: Rankings) -> Forgetting:
    """Return what is removed for which facts."""
    space = rankings.workspace
    _, candidates = space.asked
    if unknown := [name for name in space.args.removed_by if name not in rankings.chosen]:
        raise ValueError(f"There is no method {', '.join(unknown)} to remove by; there are {', '.join(rankings.chosen)}.")
    return Forgetting(
        {name: rankings.chosen[name].scores[:, space.targets] for name in space.args.removed_by},
        [np.array(candidates[target].proponents) for target in space.targets],
        top_k=space.args.top_k,
        seeds=range(space.args.n_seeds),
        batch_size=space.args.batch_facts,
        case=space.case,
    )


def forget(space: Workspace, plan: Forgetting) -> None:
    """Fine-tune again without what was credited: this shard's runs."""
    targets = space.asked[0].select(space.targets)
    encoded = EncodedRows(targets, space.encoder)
    task = fact_task(space.encoder)

    def retrain(mask: np.ndarray, seed: int) -> Answers:
        model = space.fresh_model()
        fine_tune(model, space.rows, np.flatnonzero(mask).tolist(), space.recipe, seed=space.seed_of(f"again-{seed}"))
        right = is_right(beams(model, space.encoder, targets), targets)
        with torch.no_grad():
            batch = next(encoded.batches([range(len(encoded))], space.device))
            output = task.output_function(model, batch)[0]
        return Answers(right, output.double().cpu().numpy())

    run_forgetting(plan, retrain, space.folder / "forgetting", shard=space.shard)
