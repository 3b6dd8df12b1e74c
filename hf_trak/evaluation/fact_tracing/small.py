"""What lets the whole protocol run on two cores: a part of the corpus, a tokenizer of its texts, and an mT5 of a few million parameters.

The part is drawn as FTRACE was: queries first, then every abstract that states a fact of theirs. Other abstracts, and other questions
with their answers, none of which is about a query's subject, stand for what a pretrained model has read before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

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
