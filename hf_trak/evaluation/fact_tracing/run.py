"""The whole evaluation, stage by stage, and its results as rows.

Fine-tuned model, fine-tune-learned queries, sentence level; mean over three seeds and its deviation. Their layers and normalization
are chosen on the queries they report. Source: [Towards tracing factual knowledge in language models back to the training
data](https://huggingface.co/papers/2205.11482), tables 2 to 6. TRAK's own figures on FTRACE are not known to us.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_trak.evaluation.fact_tracing.counterfactual import Answers, Forgetting, run_forgetting, summarize_forgetting
from hf_trak.evaluation.fact_tracing.data import load_ftrace
from hf_trak.evaluation.fact_tracing.fine_tuning import (
    FineTuning,
    beams,
    fine_tune,
    fine_tune_learned,
    is_right,
    save_with_moments,
)
from hf_trak.evaluation.fact_tracing.ranking import LEVELS, result_rows
from hf_trak.evaluation.fact_tracing.rankings import Rankings
from hf_trak.evaluation.fact_tracing.settings import STAGES, FTraceArguments, draw_corpus, small_mt5, texts_of, train_tokenizer
from hf_trak.evaluation.fact_tracing.task import EncodedRows, Encoder, fact_task
from hf_trak.evaluation.fact_tracing.workspace import NOT_SHARED, Workspace, seconds_by_stage, timed
from hf_trak.evaluation.training import save_checkpoint
from hf_trak.featurizing.identity import hardware_name, library_versions
from hf_trak.sources.checkpoints import load_model
from hf_trak.storage.files import read_json, write_atomically, write_json

CASE = "PUBLISHED, another model and corpus: Akyürek et al. 2022, mT5-base, FTRACE-TREx, fine-tune-learned queries"

_PERCENT = {
    # method: (MRR, its deviation, recall at 10, its deviation)
    "Random-Target": (14.50, 0.95, 10.32, 1.54),
    "BM25+": (77.55, 1.50, 60.89, 2.31),
    "TracIn": (48.56, 4.40, 56.02, 0.67),
    "EMBED": (64.29, 1.32, 57.89, 1.38),
    "TracIn + EMBED": (58.52, 3.83, 61.72, 0.08),
}


def published_rows() -> list[dict[str, Any]]:
    """Return the published figures as result rows, in shares; `deviation` is over seeds, and no interval is known."""
    rows = []
    for method, (mrr, mrr_deviation, recall, recall_deviation) in _PERCENT.items():
        for metric, value, deviation in (("mrr", mrr, mrr_deviation), ("recall_at_10", recall, recall_deviation)):
            rows.append(
                {
                    "case": CASE,
                    "method": method,
                    "metric": metric,
                    "value": round(value / 100, 6),
                    "unit": "share",
                    "interval": None,
                    "deviation": round(deviation / 100, 6),
                    "level": "sentence",
                    "published": True,
                }
            )
    return rows


_COMPARED = ("mrr", "recall_at_10")


def write_report(space: Workspace, rankings: Rankings, plan: Forgetting) -> dict[str, Any]:
    """Return all results, and write them to the workspace, and to where its arguments say."""
    rows = [*_ranking_rows(rankings), *_variant_rows(rankings)]
    rows += summarize_forgetting(plan, space.folder / "forgetting")
    rows += _facts_rows(space) + _stage_rows(space) + published_rows()
    result = {
        "name": "results",
        "command": command_of(space),
        "commit": _commit(),
        "versions": library_versions(),
        "hardware": hardware_name(torch.device(space.device)),
        "rows": rows,
    }
    write_json(space.folder / "results.json", result)
    if space.args.results is not None:
        write_json(Path(space.args.results), {**result, "name": Path(space.args.results).stem})
    return result


def _ranking_rows(rankings: Rankings) -> list[dict[str, Any]]:
    """Each method, every query ranked by the variant that the other half of the queries chose, and what TRAK is ahead by."""
    rows = []
    for level in LEVELS:
        measured = {method: rankings.measures(chosen.scores, level) for method, chosen in rankings.chosen.items()}
        for method, measures in measured.items():
            more = {"variant": rankings.chosen[method].variant, "level": level}
            rows += result_rows(measures, case=rankings.workspace.case, method=method, **more)
        for method in [name for name in measured if name != "TRAK"]:
            ahead = {f"{metric}_ahead": measured["TRAK"][metric] - measured[method][metric] for metric in _COMPARED}
            rows += result_rows(ahead, case=rankings.workspace.case, method=f"TRAK over {method}", level=level)
    return rows


def _variant_rows(rankings: Rankings) -> list[dict[str, Any]]:
    """MRR of every variant, so that a reader sees what the choice was among."""
    return [
        {**row, "metric": "variant_mrr"}
        for method, variants in rankings.variant_measures.items()
        for variant, measures in variants.items()
        if len(variants) > 1
        for row in result_rows(
            {"mrr": measures["mrr_expected"]},
            case=rankings.workspace.case,
            method=method,
            variant=variant,
            level="sentence",
        )
    ]


def _facts_rows(space: Workspace) -> list[dict[str, Any]]:
    learned = read_json(space.folder / "learned.json")
    shares = [
        _plain_row(space.case, "fine-tuning", name, value, "share") for name, value in learned.items() if name != "learned"
    ]
    asked = _plain_row(space.case, "fine-tuning", "facts_asked", len(space.queries), "facts")
    return [asked, _plain_row(space.case, "fine-tuning", "facts_learned", len(learned["learned"]), "facts"), *shares]


def _stage_rows(space: Workspace) -> list[dict[str, Any]]:
    return [
        _plain_row(space.case, stage, f"stage_{metric}", value, "s")
        for stage, seconds in seconds_by_stage(space.folder).items()
        for metric, value in seconds.items()
    ]


def _plain_row(case: str, method: str, metric: str, value: float, unit: str) -> dict[str, Any]:
    return {"case": case, "method": method, "metric": metric, "value": value, "unit": unit, "interval": None}


def command_of(space: Workspace) -> str:
    """Return the command that does this, with the flags that are not the defaults."""
    given = []
    for options in (space.args, space.recipe):
        for option in fields(options):
            default = option.default_factory() if option.default_factory is not MISSING else option.default
            value = getattr(options, option.name)
            if option.name not in NOT_SHARED and value != default:
                given.append(f"--{option.name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(["hf-trak evaluate ftrace", *given])


def _commit() -> str | None:
    """Return the commit this package runs from, if it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


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
