"""What lets the whole protocol run on two cores: a part of the corpus, a tokenizer of its texts, and an mT5 of a few million parameters.

The part is drawn as FTRACE was: queries first, then every abstract that states a fact of theirs. Other abstracts, none of which is about
a query's subject, stand for what a pretrained model has read before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_trak.evaluation.fact_tracing.data import MASK, FTrace, restored
from hf_trak.evaluation.fact_tracing.proponents import find_proponents, parse_facts

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
    ftrace: FTrace, *, n_queries: int, n_background: int, most_proponents: int, fewest_proponents: int = 2, seed: int = 0
) -> Corpus:
    """Draw queries with neither too few nor too many proponents, all their proponents, and background.

    Raises:
        ValueError: If there are not enough queries or background to draw from.
    """
    generator = np.random.default_rng(seed)
    proponents = find_proponents(ftrace.abstracts, ftrace.queries)
    counts = np.array(list(map(len, proponents)))
    possible = np.flatnonzero((counts >= fewest_proponents) & (counts <= most_proponents))
    chosen = np.sort(_draw(generator, possible, n_queries, "queries"))
    rows = np.unique(np.concatenate([proponents[query] for query in chosen]))
    subjects = set(ftrace.queries.select(chosen)["sub_uri"][:])
    apart = [
        row
        for row, facts in enumerate(ftrace.abstracts["facts"][:])
        if not any(fact.subject in subjects or fact.object in subjects for fact in parse_facts(facts))
    ]
    background = np.sort(_draw(generator, np.array(apart), n_background, "background abstracts"))
    return Corpus(ftrace.abstracts.select(rows), ftrace.queries.select(chosen), ftrace.abstracts.select(background))


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
    return MT5ForConditionalGeneration(config)
