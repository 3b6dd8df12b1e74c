"""The whole evaluation, stage by stage: learn facts, rank candidates by every method, remove what was credited, and ask again.

```
data      corpus/, queries.parquet
learn     model/ (what is fine-tuned), runs/full/, learned.json: what fine-tuning taught
members   runs/member-000/, ...: fine-tuned on random halves
rank      candidates.json.gz, index/, scores/*.npz, rankings.json
forget    forgetting/*.json, one per run
report    results.json
```
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset

from hf_trak.config import TrakConfig
from hf_trak.evaluation.fact_tracing.answers import beams, fine_tune_learned, is_right
from hf_trak.evaluation.fact_tracing.candidates import Candidates, draw_candidates, load_candidates, save_candidates
from hf_trak.evaluation.fact_tracing.counterfactual import Answers, Forgetting, run_forgetting, summarize_forgetting
from hf_trak.evaluation.fact_tracing.data import load_ftrace, sentence_numbers
from hf_trak.evaluation.fact_tracing.embed import Embed
from hf_trak.evaluation.fact_tracing.encoding import EncodedRows, Encoder
from hf_trak.evaluation.fact_tracing.fine_tuning import FineTuning, fine_tune, save_with_moments
from hf_trak.evaluation.fact_tracing.measuring import LEVELS, best_variant, halves, measure, pick, result_rows
from hf_trak.evaluation.fact_tracing.methods import BM25PlusSentences, Random, RandomTarget
from hf_trak.evaluation.fact_tracing.output import fact_task
from hf_trak.evaluation.fact_tracing.proponents import find_proponents
from hf_trak.evaluation.fact_tracing.published import published_rows
from hf_trak.evaluation.fact_tracing.settings import FTraceArguments
from hf_trak.evaluation.fact_tracing.small import draw_corpus, small_mt5, texts_of, train_tokenizer
from hf_trak.evaluation.fact_tracing.stages import begin, seconds_by_stage, timed
from hf_trak.evaluation.fact_tracing.tracin import SIMILARITIES, TracIn, Variant
from hf_trak.evaluation.fact_tracing.trak import Trak
from hf_trak.evaluation.subsets import make_masks
from hf_trak.evaluation.training import save_checkpoint
from hf_trak.featurizer import load_model, load_processing_class
from hf_trak.hashing import stream_key
from hf_trak.index import AttributionIndex
from hf_trak.store import read_json, write_atomically, write_json

_NOT_SHARED = ("output", "results", "stages", "shard_index", "num_shards", "device")


def run_ftrace(args: FTraceArguments, recipe: FineTuning) -> dict[str, Any]:
    """Do the stages that `args` names, and return the result rows if `report` is one."""
    run = FTraceRun(args, recipe)
    report: dict[str, Any] = {}
    for stage in args.stages:
        with timed(run.folder, stage):
            report = getattr(run, stage)() or report
    return report


class FTraceRun:
    """One evaluation in one folder."""

    def __init__(self, args: FTraceArguments, recipe: FineTuning) -> None:
        self.args, self.recipe = args, recipe
        self.folder = Path(args.output)
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        shared = {name: value for name, value in asdict(args).items() if name not in _NOT_SHARED}
        begin(self.folder, {**shared, **{f"fine_tuning.{name}": value for name, value in asdict(recipe).items()}})

    # --- data

    def data(self) -> None:
        """Draw the corpus, or take all of it."""
        if (self.folder / "queries.parquet").exists():
            return
        ftrace = load_ftrace(self.args.data)
        parts = {"abstracts": ftrace.abstracts, "queries": ftrace.queries}
        if self.args.n_corpus_queries is not None:
            corpus = draw_corpus(
                ftrace,
                n_queries=self.args.n_corpus_queries,
                n_background=self.args.n_background,
                most_proponents=self.args.most_proponents,
                seed=self.args.seed,
            )
            parts = corpus._asdict()
        for name in sorted(parts):  # queries last
            write_atomically(self.folder / f"{name}.parquet", partial(_write_rows, parts[name]))

    @cached_property
    def abstracts(self) -> Dataset:
        """What is fine-tuned on, and credited."""
        return _read_rows(self.folder / "abstracts.parquet")

    @cached_property
    def queries(self) -> Dataset:
        """All that may be asked."""
        return _read_rows(self.folder / "queries.parquet")

    @cached_property
    def rows(self) -> EncodedRows:
        """The abstracts' tokens."""
        return EncodedRows(self.abstracts, self.encoder)

    # --- learn

    def learn(self) -> None:
        """Fine-tune on all abstracts, and see which queries that taught."""
        self._prepare_model()
        self._fine_tune("full", range(len(self.abstracts)), keep=self.args.checkpoint_steps)
        path = self.folder / "learned.json"
        if path.exists():
            return
        before, after = (
            beams(load_model(str(folder)).to(self.device), self.encoder, self.queries)
            for folder in (self._start, self.checkpoint("full"))
        )
        learned = fine_tune_learned(before, after, self.queries)
        known = [float(is_right(answers, self.queries, among=k).mean()) for answers in (before, after) for k in (1, 3)]
        names = ("top_1_before", "top_3_before", "top_1_after", "top_3_after")
        write_json(path, {"learned": np.flatnonzero(learned).tolist(), **dict(zip(names, known, strict=True))})

    @property
    def _start(self) -> Path | str:
        """What fine-tuning begins with."""
        return self.folder / "model" if self.args.model == "scratch" else self.args.model

    def _prepare_model(self) -> None:
        if self.args.model != "scratch" or (self.folder / "model").exists():
            return
        background = _read_rows(self.folder / "background.parquet")
        tokenizer = train_tokenizer(texts_of(self.abstracts, background), vocab_size=self.args.vocab_size)
        args = self.args
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            model = small_mt5(len(tokenizer), width=args.width, n_layers=args.n_layers, dropout=args.dropout).to(self.device)
        rows = EncodedRows(background, Encoder(tokenizer, 0))
        recipe = replace(self.recipe, steps=args.pretrain_steps, learning_rate=args.pretrain_learning_rate, decay=False)
        fine_tune(model, rows, range(len(rows)), recipe, seed=args.seed)
        save_checkpoint(self.folder / "model", model, tokenizer)

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer, scoring all of a target, as in training."""
        start = load_model(str(self._start)).config.decoder_start_token_id
        return Encoder(load_processing_class(str(self._start)), start)

    def checkpoint(self, run: str, step: int | None = None) -> Path:
        """Return where a run's weights lie after a step, by default the last."""
        return self.folder / "runs" / run / f"step-{step or self.recipe.steps:06d}"

    def _fine_tune(self, run: str, subset: Sequence[int], *, keep: Sequence[int] = ()) -> None:
        if self.checkpoint(run).exists():
            return
        model = self._fresh()

        def on_step(step: int, optimizer: torch.optim.Optimizer) -> None:
            if step in keep and step < self.recipe.steps:
                save_with_moments(self.checkpoint(run, step), model, optimizer, self.encoder.tokenizer)
            if step == self.recipe.steps:  # last of all: it says that the run is done
                save_with_moments(self.checkpoint(run), model, optimizer, self.encoder.tokenizer)

        fine_tune(model, self.rows, subset, self.recipe, seed=self._seed(run), on_step=on_step)

    def _fresh(self) -> Any:
        model = load_model(str(self._start))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = self.args.dropout
        return model.to(self.device)

    def _seed(self, run: str) -> int:
        return stream_key("ftrace run", self.args.seed, run) % 2**63

    # --- members

    @cached_property
    def masks(self) -> np.ndarray:
        """Which abstracts each member is fine-tuned on."""
        return make_masks(len(self.abstracts), self.args.n_members, self.args.alpha, seed=self.args.seed)

    def members(self) -> None:
        """Fine-tune this shard's members on their halves."""
        for number in range(self.args.shard_index, self.args.n_members, self.args.num_shards):
            self._fine_tune(f"member-{number:03d}", np.flatnonzero(self.masks[number]).tolist())

    # --- rank

    @cached_property
    def asked(self) -> tuple[Dataset, list[Candidates]]:
        """The learned queries that are ranked for, and their candidates; drawn once, and the same for all methods."""
        path = self.folder / "candidates.json.gz"
        if self.args.candidates is not None:
            path = Path(self.args.candidates)
        elif not path.exists():
            learned = np.array(read_json(self.folder / "learned.json")["learned"])
            if len(learned) == 0:
                raise ValueError("Fine-tuning taught none of the queries; train longer, or with another learning rate.")
            order = np.random.default_rng(self.args.seed).permutation(learned)
            queries = self.queries.select(np.sort(order[: self.args.n_queries]))
            bm25 = BM25PlusSentences()
            candidates = draw_candidates(
                self.abstracts,
                queries,
                find_proponents(self.abstracts, queries),
                bm25.nearest_to(self.abstracts, queries, self.args.n_nearest),
                n_same_target=self.args.n_same_target,
                n_random=self.args.n_random,
                seed=self.args.seed,
            )
            save_candidates(path, candidates, self.abstracts, queries)
        return load_candidates(path, self.abstracts, self.queries)

    def rank(self) -> None:
        """Score every abstract for every asked query, by every method and variant."""
        for name, make in self._methods().items():
            path = self.folder / "scores" / f"{name}.npz"
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                with timed(self.folder, f"rank: {name}"):
                    scores = {variant: values.astype(np.float32) for variant, values in make().items()}
                write_atomically(path, partial(_write_scores, scores))

    def _methods(self) -> dict[str, Any]:
        queries, _ = self.asked
        checkpoints = [self.checkpoint("full", step) for step in self.args.checkpoint_steps]
        plain = {"BM25+": BM25PlusSentences(), "Random-Target": RandomTarget(), "Random": Random()}
        methods: dict[str, Any] = {name: partial(_alone, method, self.abstracts, queries) for name, method in plain.items()}
        embed = Embed(checkpoints[-1:], self.encoder)
        methods["EMBED"] = lambda: embed.sweep(self.abstracts, queries)
        for moments in (False, True):
            name = "TracIn, second moments" if moments else "TracIn"
            tracin = TracIn(checkpoints, self.encoder, use_second_moments=moments, dim=self.args.tracin_dim)
            methods[name] = partial(_swept, tracin, self.abstracts, queries)
        methods["TRAK"] = self._trak
        return methods

    def _trak(self) -> dict[str, np.ndarray]:
        queries, _ = self.asked
        index = self.index()
        return {"auto damping": Trak(index)(self.abstracts, queries)}

    def index(self) -> AttributionIndex:
        """Return TRAK's index of all abstracts, built once."""
        return AttributionIndex.build(
            self.folder / "index",
            models=[self.checkpoint(f"member-{number:03d}") for number in range(self.args.n_members)],
            dataset=self.abstracts,
            config=TrakConfig(proj_dim=self.args.proj_dim),
            processing_class=self.encoder.tokenizer,
            task=fact_task(self.encoder, reduction=self.args.reduction),
            masks=torch.from_numpy(self.masks),
            sketch_seeds_per_checkpoint=self.args.sketch_seeds,
        )

    def scores(self) -> dict[str, dict[str, np.ndarray]]:
        """Return all scores by method and variant, TracIn + EMBED among them."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for name in self._methods():
            with np.load(self.folder / "scores" / f"{name}.npz") as file:
                found.setdefault(name.split(",")[0], {}).update({_label(name, variant): file[variant] for variant in file})
        found["TracIn + EMBED"] = {}  # of those chosen alone: see `chosen`
        return found

    @cached_property
    def chosen(self) -> dict[str, tuple[str, np.ndarray]]:
        """By method, the variant that ranks one half of the queries best, and its scores."""
        _, candidates = self.asked
        sentences = sentence_numbers(self.abstracts)
        tuning, _ = halves(self.asked[0], seed=self.args.seed)
        best: dict[str, tuple[str, np.ndarray]] = {}
        for name, variants in self.scores().items():
            if name == "TracIn + EMBED":
                # Cosines have one scale, so that they may be added.
                cosines = {v: s for v, s in self.scores()["TracIn"].items() if not v.startswith("dot")}
                variants = {v: s / max(np.abs(s).max(), 1e-12) + best["EMBED"][1] for v, s in cosines.items()}
            measures = {v: measure(pick(s, candidates), candidates, sentences) for v, s in variants.items()}
            variant = best_variant(measures, tuning)
            best[name] = variant, variants[variant]
        return best

    # --- forget

    def plan(self) -> Forgetting:
        """Return what is removed for which facts."""
        queries, candidates = self.asked
        targets = np.random.default_rng(self.args.seed + 1).permutation(len(queries))[: self.args.n_targets]
        removed_by = [name for name in self.chosen if name not in ("Random", "Random-Target")]
        return Forgetting(
            {name: self.chosen[name][1][:, targets] for name in removed_by},
            [np.array(candidates[target].proponents) for target in targets],
            top_k=self.args.top_k,
            seeds=range(self.args.n_seeds),
            batch_size=self.args.batch_facts,
            case=self.case,
        )

    def forget(self) -> None:
        """Fine-tune again without what was credited: this shard's runs."""
        queries, _ = self.asked
        targets = np.random.default_rng(self.args.seed + 1).permutation(len(queries))[: self.args.n_targets]
        target_rows = queries.select(targets)
        encoded = EncodedRows(target_rows, self.encoder)
        task = fact_task(self.encoder)

        def retrain(mask: np.ndarray, seed: int) -> Answers:
            model = self._fresh()
            fine_tune(model, self.rows, np.flatnonzero(mask).tolist(), self.recipe, seed=self._seed(f"again-{seed}"))
            right = is_right(beams(model, self.encoder, target_rows), target_rows)
            with torch.no_grad():
                batch = next(encoded.batches([range(len(encoded))], self.device))
                output = task.output_function(model, batch)[0]
            return Answers(right, output.double().cpu().numpy())

        shard = (self.args.shard_index, self.args.num_shards)
        run_forgetting(self.plan(), retrain, self.folder / "forgetting", shard=shard)

    # --- report

    @property
    def case(self) -> str:
        """Say what model and data the results are of."""
        model = "mT5 from scratch" if self.args.model == "scratch" else self.args.model
        return f"{Path(self.args.data).name}, {len(self.abstracts):,} abstracts, {model}, {self.args.n_members} members"

    def report(self) -> dict[str, Any]:
        """Return all result rows, ours and the published ones, and write them."""
        queries, candidates = self.asked
        sentences = sentence_numbers(self.abstracts)
        _, reported = halves(queries, seed=self.args.seed)
        rows: list[dict[str, Any]] = []
        for name, (variant, scores) in self.chosen.items():
            for level in LEVELS:
                measures = measure(pick(scores, candidates), candidates, sentences, level=level)
                rows += result_rows(measures, reported, case=self.case, method=name, variant=variant, level=level)
        rows += summarize_forgetting(self.plan(), self.folder / "forgetting")
        rows += self._facts_rows()
        for stage, seconds in seconds_by_stage(self.folder).items():
            for metric, value in seconds.items():
                rows.append(_plain_row(self.case, stage, f"stage_{metric}", value, "s"))
        info = self.index().members[0].info
        result = {
            "name": "results",
            "command": self._command(),
            "commit": _commit(),
            "versions": info["versions"],
            "hardware": info["hardware"],
            "rows": rows + published_rows(),
        }
        write_json(self.folder / "results.json", result)
        if self.args.results is not None:
            write_json(Path(self.args.results), {**result, "name": Path(self.args.results).stem})
        return result

    def _command(self) -> str:
        """The command that does this, with the flags that are not the defaults."""
        given = []
        for option in (option for options in (self.args, self.recipe) for option in fields(options)):
            default = option.default_factory() if option.default_factory is not MISSING else option.default
            value = (
                getattr(self.args, option.name, None) if hasattr(self.args, option.name) else getattr(self.recipe, option.name)
            )
            if option.name not in _NOT_SHARED and value != default:
                given.append(f"--{option.name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
        return " ".join(["hf-trak evaluate ftrace", *given])

    def _facts_rows(self) -> list[dict[str, Any]]:
        learned = read_json(self.folder / "learned.json")
        shares = [
            _plain_row(self.case, "fine-tuning", name, value, "share") for name, value in learned.items() if name != "learned"
        ]
        count = _plain_row(self.case, "fine-tuning", "facts_learned", len(learned["learned"]), "facts")
        return [count, *shares]


def _plain_row(case: str, method: str, metric: str, value: float, unit: str) -> dict[str, Any]:
    return {"case": case, "method": method, "metric": metric, "value": value, "unit": unit, "interval": None}


def _label(name: str, variant: str) -> str:
    suffix = name.partition(", ")[2]
    return f"{variant}, {suffix}" if suffix else variant


def _alone(method: Any, abstracts: Dataset, queries: Dataset) -> dict[str, np.ndarray]:
    return {"": method(abstracts, queries)}


LAYERS = ("", r"^shared", r"^encoder\.block", r"^decoder\.block")
"""Which layers TracIn is tried on; the embedding is the best single one in the paper."""


def _swept(tracin: TracIn, abstracts: Dataset, queries: Dataset) -> dict[str, np.ndarray]:
    variants = [Variant(similarity, layers) for similarity in SIMILARITIES for layers in LAYERS]
    return {str(variant): scores for variant, scores in tracin.sweep(abstracts, queries, variants).items()}


def _read_rows(path: Path) -> Dataset:
    return load_dataset("parquet", data_files={"train": str(path)}, split="train")


def _write_rows(rows: Dataset, path: Path) -> None:
    rows.to_parquet(str(path))


def _write_scores(scores: dict[str, np.ndarray], path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, **scores)  # type: ignore[arg-type]


def _commit() -> str | None:
    """Return the commit this package runs from, if it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
