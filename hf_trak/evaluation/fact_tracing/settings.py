"""What `evaluate ftrace` does, as flags: as published, and small enough for two cores.

The part is drawn as FTRACE was: queries first, then every abstract that states a fact of theirs. Other abstracts, and other questions
with their answers, none of which is about a query's subject, stand for what a pretrained model has read before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from hf_trak.evaluation.fact_tracing.data import HUB_DATASET, MASK, FTrace, find_proponents, parse_facts, restored
from hf_trak.evaluation.fact_tracing.fine_tuning import FineTuning

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import MT5ForConditionalGeneration


_SPECIAL = ("<pad>", "</s>", "<unk>", MASK, "<extra_id_1>")


class Corpus(NamedTuple):
    """What is trained on, what is asked, and what was read before."""

    abstracts: Dataset
    queries: Dataset
    background: Dataset


def draw_corpus(
    ftrace: FTrace,
    *,
    n_queries: int,
    n_background: int,
    n_taught: int = 0,
    most_proponents: int,
    fewest_proponents: int = 2,
    most_words: int | None = None,
    not_among: int = 0,
    seed: int = 0,
) -> Corpus:
    """Draw queries with neither too few nor too many proponents, all their proponents, and background.

    Args:
        n_taught (`int`): Other queries, of other subjects, that the background holds with their answers, beside their proponents:
            from them a model learns what the questions ask for.
        most_words (`int`, *optional*): The corpus has no longer abstract than this.
        not_among (`int`): Leave out queries whose answer is among so many commonest of their relation: a guess would do.

    Raises:
        ValueError: If there are not enough queries or background to draw from.
    """
    generator = np.random.default_rng(seed)
    abstracts = ftrace.abstracts.select(_short(ftrace.abstracts, most_words))
    proponents = find_proponents(abstracts, ftrace.queries)
    counts = np.array(list(map(len, proponents)))
    possible = (counts >= fewest_proponents) & (counts <= most_proponents) & ~_common(ftrace.queries, not_among)
    chosen = np.sort(_draw(generator, np.flatnonzero(possible), n_queries, "queries"))
    queries = ftrace.queries.select(chosen)
    subjects = set(queries["sub_uri"][:])
    apart = _apart(abstracts, subjects)
    others = np.array([uri not in subjects for uri in ftrace.queries["sub_uri"][:]])
    others &= np.array([bool(apart[rows].any()) for rows in proponents]) & (counts <= most_proponents)
    taught = np.sort(_draw(generator, np.flatnonzero(others), n_taught, "taught queries"))
    told = [proponents[query][apart[proponents[query]]] for query in taught]
    drawn = _draw(generator, np.flatnonzero(apart), n_background, "background abstracts")
    read = abstracts.select(np.unique(np.concatenate([drawn, *told])))
    return Corpus(
        abstracts.select(np.unique(np.concatenate([proponents[query] for query in chosen]))),
        queries,
        _texts_of_both(read, ftrace.queries.select(taught)),
    )


def _short(abstracts: Dataset, most_words: int | None) -> np.ndarray:
    if most_words is None:
        return np.arange(len(abstracts))
    return np.flatnonzero([len(text.split()) <= most_words for text in abstracts["inputs_pretokenized"][:]])


def _common(queries: Dataset, n_commonest: int) -> np.ndarray:
    """Return which queries have one of the commonest answers of their relation."""
    asked = list(zip(queries["predicate_id"][:], queries["obj_uri"][:], strict=True))
    answers: dict[str, Counter[str]] = {}
    for relation, answer in asked:
        answers.setdefault(relation, Counter())[answer] += 1
    common = {(relation, answer) for relation, found in answers.items() for answer, _ in found.most_common(n_commonest)}
    return np.array([pair in common for pair in asked])


def _apart(abstracts: Dataset, subjects: set[str]) -> np.ndarray:
    """Return which abstracts state nothing of some subjects."""
    return np.array(
        [
            not any(fact.subject in subjects or fact.object in subjects for fact in parse_facts(facts))
            for facts in abstracts["facts"][:]
        ]
    )


def _texts_of_both(abstracts: Dataset, queries: Dataset) -> Dataset:
    from datasets import concatenate_datasets

    columns = ["inputs_pretokenized", "targets_pretokenized"]
    return concatenate_datasets([part.select_columns(columns) for part in (abstracts, queries)])


def _draw(generator: np.random.Generator, rows: np.ndarray, count: int, what: str) -> np.ndarray:
    if count > len(rows):
        raise ValueError(f"{count} {what} are to be drawn, but only {len(rows)} fit.")
    return generator.choice(rows, size=count, replace=False)


def train_tokenizer(texts: Sequence[str] | Iterator[str], *, vocab_size: int) -> Any:
    """Return a tokenizer in the form of T5's: subwords with their leading space, `</s>` at the end, and `<extra_id_0>` one token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(_SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(_SPECIAL[3:]), **special)


def texts_of(*parts: Dataset) -> list[str]:
    """Return each restored sentence once."""
    return list(dict.fromkeys(sentence for part in parts for sentence in restored(part)))


def small_mt5(vocab_size: int, *, width: int, n_layers: int, dropout: float = 0.0) -> MT5ForConditionalGeneration:
    """Return an untrained mT5 with as many encoder as decoder layers; what it draws at random is torch's business."""
    from transformers import MT5Config, MT5ForConditionalGeneration

    config = MT5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=32,
        d_ff=2 * width,
        num_layers=n_layers,
        num_decoder_layers=n_layers,
        num_heads=width // 32,
        dropout_rate=dropout,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = MT5ForConditionalGeneration(config)
    # transformers draws the embedding with deviation 1, but ties it to the output, where that makes logits of deviation width^.5.
    torch.nn.init.normal_(model.shared.weight, std=width**-0.5)
    return model


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
