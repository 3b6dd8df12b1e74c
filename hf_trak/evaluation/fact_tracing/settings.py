"""What `evaluate ftrace` does, as flags: by default as published, and small enough for two cores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_trak.evaluation.fact_tracing.data import HUB_DATASET
from hf_trak.evaluation.fact_tracing.fine_tuning import FineTuning

TRAK_FEATURES = (
    "all parameters",
    "embedding",
    "all but the embedding",
    "answer's tokens",
    "answer's tokens in the embedding",
    "answer's tokens in the encoder",
    "answer's tokens in the decoder",
    "sum over tokens",
)
TRAK_MEMBERS = ("halves", "checkpoints", "both")
STAGES = ("data", "learn", "members", "rank", "forget", "report")


@dataclass(frozen=True)
class FTraceArguments:
    """Data, model, methods and counterfactual of one evaluation."""

    output: str = field(metadata={"help": "Folder for everything; the same command goes on where it was stopped."})
    data: str = field(
        default=HUB_DATASET, metadata={"help": "Folder with abstracts*.parquet and queries*.parquet, or a dataset of the Hub."}
    )
    candidates: str | None = field(
        default=None, metadata={"help": "File of candidates (JSON, .gz or not), in place of drawn ones; its queries are asked."}
    )
    results: str | None = field(default=None, metadata={"help": "Write the results to this JSON file too."})
    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": "Which stages to do, of all."})
    seed: int = field(default=0, metadata={"help": "Of every draw: corpus, queries, candidates, runs."})
    # model
    model: str = field(
        default="google/mt5-small",
        metadata={
            "help": "Seq2seq checkpoint to fine-tune; 'scratch' trains a small mT5 and its tokenizer on other abstracts."
        },
    )
    vocab_size: int = field(default=8000, metadata={"help": "Tokens of the small model."})
    width: int = field(default=128, metadata={"help": "Width of the small model."})
    n_layers: int = field(default=2, metadata={"help": "Encoder layers, and decoder layers, of the small model."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout of training."})
    pretrain_steps: int = field(default=0, metadata={"help": "Steps of the small model on other abstracts."})
    pretrain_batch_size: int = field(default=32, metadata={"help": "Rows per step of that."})
    pretrain_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of that."})
    # corpus
    n_corpus_queries: int | None = field(
        default=None, metadata={"help": "Draw so many queries, and only their proponents; by default all abstracts."}
    )
    n_background: int = field(default=0, metadata={"help": "Other abstracts for the small model to read before."})
    n_taught: int = field(default=0, metadata={"help": "Other questions, with their answers, for it to read too."})
    fewest_proponents: int = field(default=2, metadata={"help": "Abstracts that state a drawn query's fact, at least."})
    most_proponents: int = field(default=20, metadata={"help": "Abstracts that do, at most."})
    most_words: int | None = field(default=None, metadata={"help": "Longest abstract that is drawn."})
    not_among: int = field(
        default=0, metadata={"help": "Draw no query whose answer is among so many commonest of its relation."}
    )
    # queries and candidates
    query_slice: str = field(
        default="learned",
        metadata={
            "help": "Queries to rank candidates for: those that fine-tuning taught, or all.",
            "choices": ["learned", "all"],
        },
    )
    n_queries: int = field(default=200, metadata={"help": "How many of them, at most."})
    n_nearest: int = field(default=100, metadata={"help": "Candidates from BM25+."})
    n_same_target: int = field(default=100, metadata={"help": "Candidates with the query's very target, at most."})
    n_random: int = field(default=100, metadata={"help": "Random candidates."})
    # methods
    checkpoint_steps: list[int] = field(
        default_factory=lambda: [5_000, 10_000, 30_000], metadata={"help": "Steps of fine-tuning whose weights TracIn uses."}
    )
    tracin_dim: int = field(default=4096, metadata={"help": "Numbers TracIn keeps per parameter."})
    n_members: int = field(default=10, metadata={"help": "Runs on random halves of the abstracts that TRAK averages over."})
    alpha: float = field(default=0.5, metadata={"help": "Share of the abstracts in such a run."})
    proj_dim: int = field(default=4096, metadata={"help": "TRAK's features per member."})
    sketch_seeds: int = field(default=1, metadata={"help": "Sketches per run."})
    trak_features: list[str] = field(
        default_factory=lambda: ["all parameters"],
        metadata={"help": "What TRAK is tried on; each makes an index: " + ", ".join(TRAK_FEATURES) + "."},
    )
    trak_members: list[str] = field(
        default_factory=lambda: ["both"],
        metadata={
            "help": "Whose gradients TRAK takes: halves, of runs on random halves; checkpoints, those that TracIn takes too; or both."
        },
    )
    # counterfactual
    n_targets: int = field(default=50, metadata={"help": "Learned facts to make the model forget."})
    batch_facts: int = field(default=50, metadata={"help": "Facts that share a run."})
    top_k: list[int] = field(default_factory=lambda: [5, 20, 100], metadata={"help": "Abstracts removed per fact."})
    removed_by: list[str] = field(
        default_factory=lambda: ["TRAK", "TracIn", "EMBED", "TracIn + EMBED", "BM25+"],
        metadata={"help": "Methods whose highest ranked abstracts are removed."},
    )
    n_seeds: int = field(default=3, metadata={"help": "Runs per removal."})
    # sharing the work
    shard_index: int = field(
        default=0, metadata={"help": "Which part of the members, of the rankings and of the retraining runs to do."}
    )
    num_shards: int = field(default=1, metadata={"help": "Number of parts."})
    device: str | None = field(default=None, metadata={"help": "By default CUDA where there is one."})

    def __post_init__(self) -> None:
        if unknown := [stage for stage in self.stages if stage not in STAGES]:
            raise ValueError(f"There is no stage {', '.join(unknown)}; the stages are {', '.join(STAGES)}.")
        if unknown := [name for name in self.trak_features if name not in TRAK_FEATURES]:
            raise ValueError(f"TRAK has no features {', '.join(unknown)}; there are {', '.join(TRAK_FEATURES)}.")
        if unknown := [name for name in self.trak_members if name not in TRAK_MEMBERS]:
            raise ValueError(f"TRAK has no members {', '.join(unknown)}; there are {', '.join(TRAK_MEMBERS)}.")
        if not 0 <= self.shard_index < self.num_shards:
            raise ValueError(f"`shard_index` must lie in 0 to {self.num_shards - 1}, but is {self.shard_index}.")
        if self.model == "scratch" and (self.n_corpus_queries is None or self.n_background < 1 or self.pretrain_steps < 1):
            raise ValueError("A model from scratch needs `n_corpus_queries`, `n_background` and `pretrain_steps`.")


SCALES: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {
        "model": "scratch",
        "n_corpus_queries": 1000,
        "fewest_proponents": 5,
        "most_proponents": 20,
        "most_words": 20,
        "not_among": 3,
        "n_background": 20_000,
        "n_taught": 9000,
        "pretrain_steps": 5000,
        "pretrain_learning_rate": 6e-4,
        "dropout": 0.0,
        "n_queries": 150,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "batch_size": 32,
        "steps": 1100,
        "decay": True,
        "warmup": 0.1,
        "checkpoint_steps": [300, 700, 1100],
        "tracin_dim": 1024,
        "trak_features": ["all parameters", "answer's tokens"],
        "trak_members": list(TRAK_MEMBERS),
        "n_members": 10,
        "n_targets": 32,
        "batch_facts": 32,
        "removed_by": ["TRAK", "TracIn", "BM25+"],
        "n_seeds": 1,
    },
}
"""Flags by scale, of [`FTraceArguments`] and [`FineTuning`]; `scripts/configs/ftrace_*.yaml` hold the same."""

__all__ = ["SCALES", "STAGES", "FTraceArguments", "FineTuning"]
