"""Pretrain a small causal language model on text at hand, for the setting `sst2lm` of scripts/train_subsets.py.

    python benchmarks/language_model.py --output W/small-llama
    python scripts/train_subsets.py --setting sst2lm --scale small --model W/small-llama --output W/lm --n_full 1 --n_members 5
    python benchmarks/path.py --setting sst2lm --model W/small-llama --job W/lm/full --halves W/lm/members \\
        --ground_truth W/lm/ground_truth/ground_truth.parquet --output results/path_lm.json

A byte-level BPE tokenizer and a Llama of two layers are trained on the questions and sentences of QNLI (Wikipedia). Each text is a row; one
seed decides everything.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_trak import TrakConfig
from hf_trak.evaluation import Recipe
from hf_trak.evaluation.training import RowsInMemory, outputs_on, train
from hf_trak.tasks import AutoTask

END = "<|endoftext|>"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with qnli/train.parquet")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def texts_of(data: Path, split: str) -> list[str]:
    """Return the distinct questions and sentences of a split, in order."""
    rows = load_dataset("parquet", data_files={split: str(data / "qnli" / f"{split}.parquet")}, split=split)
    return list(dict.fromkeys([*rows["question"], *rows["sentence"]]))


def make_tokenizer(texts: list[str], vocabulary: int, folder: Path) -> Any:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocabulary, min_frequency=2, special_tokens=[END])
    special = {"eos_token": END, "bos_token": END, "pad_token": END, "unk_token": END}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def make_rows(texts: list[str], tokenizer: Any, max_length: int) -> Dataset:
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(texts, truncation=True, max_length=max_length - 1)["input_ids"]]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": ids})


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    texts, held_out = texts_of(options.data, "train"), texts_of(options.data, "validation")[:500]
    tokenizer = make_tokenizer(texts, options.vocabulary, options.output)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    task = AutoTask.from_model(model, TrakConfig())
    rows, others = (
        RowsInMemory.of(make_rows(some, tokenizer, options.max_length), task, tokenizer) for some in (texts, held_out)
    )
    recipe = Recipe(
        optimizer="adamw", learning_rate=3e-3, weight_decay=0.1, epochs=options.epochs, batch_size=64, peak_epoch=0.2
    )
    begin = time.process_time()

    def report(epoch: int) -> None:
        log_odds = outputs_on(model, others, task).mean()
        print(
            f"epoch {epoch}: mean log-odds of held-out tokens {log_odds:.3f}, {time.process_time() - begin:.0f} CPU-s",
            flush=True,
        )
        model.train()

    report(0)
    train(model, rows, range(len(rows)), recipe, seed=0, on_epoch_end=report)
    model.save_pretrained(options.output)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M parameters, {len(rows):,} texts")


if __name__ == "__main__":
    main()
