"""Five per cent of a mixture, chosen for a target by each method, and what a model trained on them does: loss and accuracy.

    python benchmarks/selection.py --data ../shared/data --model minilm-l3 --work /scratch/selection

The mixture of a seed is 2,000 rows of a two-class text classification: 20 % of SST-2 and 10 % of it with flipped labels, 20 % of a relation of
facts in Wikipedia abstracts (is the place a headquarters or an administrative territory?) and 10 % of it with flipped labels, 20 % of QNLI, and 20 %
of captions with labels drawn at random. A target is 100 other rows of SST-2, or of the relation, with right labels; the test rows are 400 more. Texts are short, or cut at 32 tokens.

The recipe is LESS's: a model with LoRA adapters (in its last layer here, beside a new pooler and head) is warmed up on a random 5 % for four
epochs, its checkpoints after two and four are what gradients are taken at, and a fresh model is trained on what was chosen. All methods choose 100 rows, and all are trained alike. Nothing was
tuned for a method: the learning rate and the epochs were fixed on random rows of another seed. Each seed draws its own rows, adapters and order of training. No method sees which
rows are flipped. With `balance=label`, both labels have the same share of the rows chosen.

Then the other way round: the 200 rows that a method finds to hurt the target most are removed, and a fresh model is trained on the other 1,800 for two
epochs. It is compared with one trained on all rows, without 200 random ones, and without the 400 flipped rows, which no method knows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from featurize import write
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.evaluation.baselines.bm25 import BM25PlusIndex
from hf_trak.querying.less import Checkpoint, checkpoint_weights, less_scores, parts_of
from hf_trak.scoring.selection import first_rows, shares

N_POOL, BUDGET, N_TARGET, N_TEST = 2000, 0.05, 100, 400
N_DROPPED, EPOCHS_OF_ALL = 200, 2
RELATION = {"P131": 0, "P159": 1}
TARGETS = {"sst2": "SST-2", "relation": "relation"}
EPOCHS, BATCH, RATE = 6, 16, 3e-4
MAX_TOKENS = 32
T_95 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def sources(data: Path) -> dict[str, Dataset]:
    """Return the rows of each source: text and label."""
    sst2 = pd.concat(pd.read_parquet(data / "sst2" / f"{split}.parquet") for split in ("train", "validation"))
    qnli = pd.read_parquet(data / "qnli" / "train.parquet")
    facts = pd.read_parquet(
        data / "ftrace_lama" / "abstracts.parquet", columns=["inputs_pretokenized", "targets_pretokenized", "facts"]
    )
    facts["relation"] = facts["facts"].str.split(",").str[0]
    facts = facts[facts["relation"].isin(RELATION) & (facts["inputs_pretokenized"].str.len() < 120)]
    answers = facts["targets_pretokenized"].str.replace("<extra_id_0> ", "", regex=False)
    texts = [text.replace("<extra_id_0>", answer) for text, answer in zip(facts["inputs_pretokenized"], answers, strict=True)]
    captions = [
        text
        for name in ("flickr8k_train", "emoji_noto_train")
        for text in pd.read_parquet(data / "captions" / f"{name}.parquet", columns=["caption"])["caption"]
    ]
    sst2 = sst2[sst2["sentence"].str.split().str.len() > 6]
    return {
        "sst2": Dataset.from_dict({"text": sst2["sentence"].str.strip().tolist(), "label": sst2["label"].tolist()}),
        "relation": Dataset.from_dict({"text": texts, "label": [RELATION[name] for name in facts["relation"]]}),
        "qnli": Dataset.from_dict(
            {"text": (qnli["question"] + " " + qnli["sentence"]).tolist(), "label": qnli["label"].tolist()}
        ),
        "captions": Dataset.from_dict({"text": captions, "label": [0] * len(captions)}),
    }


def draw(found: dict[str, Dataset], seed: int) -> tuple[Dataset, dict[str, tuple[Dataset, Dataset]]]:
    """Return a seed's mixture, with where each row is from, and each target's rows: to choose by, and to test on."""
    rng = np.random.default_rng(seed)
    parts, targets = [], {}
    for name, rows in found.items():
        order = rng.permutation(len(rows))
        n_right, n_flipped = (N_POOL // 5, N_POOL // 10) if name in TARGETS else (N_POOL // 5, 0)
        part = rows.select(order[: n_right + n_flipped])
        label, origin = np.array(part["label"]), np.array([name] * len(part), dtype=object)
        if name == "captions":
            label = rng.integers(0, 2, len(part))
        label[n_right:] = 1 - label[n_right:]
        origin[n_right:] = f"{name}, flipped"
        parts.append(Dataset.from_dict({"text": part["text"], "label": label.tolist(), "origin": origin.tolist()}))
        if name in TARGETS:
            rest = order[n_right + n_flipped :]
            targets[name] = rows.select(rest[:N_TARGET]), rows.select(rest[N_TARGET : N_TARGET + N_TEST])
    pool = concatenate_datasets(parts)
    return pool.select(rng.permutation(len(pool))).flatten_indices(), targets


def make_base(options: argparse.Namespace, seed: int) -> str:
    """Save the pretrained model with a new pooler and head, which it has not, and return where."""
    folder = options.work / f"seed-{seed}" / "base"
    if not folder.exists():
        set_seed(seed)
        AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2).save_pretrained(folder)
    return str(folder)


def make_model(path: str, seed: int) -> Any:
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(path)
    adapters = LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=r".*layer\.2\..*\.(query|key|value|dense)",
        modules_to_save=["pooler", "classifier"],
    )
    return get_peft_model(model, adapters)


def collate(tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    texts = [row["text"] for row in rows]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return {**batch, "labels": torch.tensor([row["label"] for row in rows])}


def train(path: str, tokenizer: Any, rows: Dataset, seed: int, folder: Path, *, epochs: int, keep: bool) -> Any:
    """Train a model with new adapters; with `keep`, a checkpoint after every second epoch, the optimizer's state with it."""
    model = make_model(path, seed)
    n_steps = math.ceil(len(rows) / BATCH)
    args = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        warmup_steps=0.1,
        logging_steps=1,
        save_strategy="steps" if keep else "no",
        save_steps=2 * n_steps,
        seed=seed,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        log_level="error",
    )
    trainer = Trainer(model, args, train_dataset=rows, data_collator=lambda some: collate(tokenizer, some))
    trainer.log = lambda logs, *_: trainer.state.log_history.append({**logs, "step": trainer.state.global_step})  # type: ignore[method-assign]
    trainer.train()
    return model.eval()


def by_length(rows: Dataset) -> list[np.ndarray]:
    """Return batches of rows of like length."""
    order = np.argsort([len(text) for text in rows["text"]], kind="stable")
    return [order[start : start + 32] for start in range(0, len(order), 32)]


@torch.no_grad()
def losses(model: Any, tokenizer: Any, rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss of each row, and whether its label is the one predicted."""
    loss, right = np.zeros(len(rows)), np.zeros(len(rows))
    for some in by_length(rows):
        batch = collate(tokenizer, list(rows.select(some)))
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss[some] = torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy()
        right[some] = (logits.argmax(1) == labels).numpy()
    return loss, right


@torch.no_grad()
def embed(path: str, tokenizer: Any, rows: Dataset) -> np.ndarray:
    """Return unit vectors: the mean of the base model's last hidden states, as the model was trained to be used."""
    model = AutoModel.from_pretrained(path).eval()
    found = np.zeros((len(rows), model.config.hidden_size), dtype=np.float32)
    for some in by_length(rows):
        texts = rows.select(some)["text"][:]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(2)
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        found[some] = torch.nn.functional.normalize(mean, dim=1).numpy()
    return found


def choose(options: argparse.Namespace, pool: Dataset, targets: dict[str, Any], seed: int) -> dict[tuple[str, str], np.ndarray]:
    """Return the rows that each method chooses for each target, and those that remain where it drops some; say what it took.

    They are kept in a file, since methods take longer than the models that are trained on the rows.
    """
    stored = options.work / f"seed-{seed}" / "chosen.npz"
    if stored.exists():
        with np.load(stored) as arrays:
            return {tuple(name.split("|")): arrays[name] for name in arrays.files}  # type: ignore[misc]
    folder, tokenizer = options.work / f"seed-{seed}", AutoTokenizer.from_pretrained(options.model)
    n_chosen, rng = round(BUDGET * N_POOL), np.random.default_rng([seed, 1])
    labels = np.array(pool["label"])
    everything = np.zeros(N_POOL, dtype=np.int64)
    by_label = shares(np.bincount(labels).tolist(), n_chosen)
    warm_up = rng.permutation(N_POOL)[:n_chosen]
    model = train(make_base(options, seed), tokenizer, pool.select(warm_up), seed, folder / "warm_up", epochs=4, keep=True)
    pool_loss = losses(model, tokenizer, pool)[0]
    of_pool = embed(options.model, tokenizer, pool)
    bm25 = BM25PlusIndex([text.lower() for text in pool["text"]])
    started = time.process_time()
    checkpoints = sorted((folder / "warm_up").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    index = AttributionIndex.build(
        folder / "index",
        models=checkpoints,
        dataset=pool.select_columns(["text", "label"]),
        config=TrakConfig(proj_dim=1024, text_columns=("text",), label_column="label", max_length=MAX_TOKENS),
        processing_class=tokenizer,
        progress=False,
    )
    print(f"seed {seed}: index {time.process_time() - started:.0f} CPU s", flush=True)
    found: dict[tuple[str, str], np.ndarray] = {}
    origins = np.array(pool["origin"])
    less = less_of_each(index, {target: rows for target, (rows, _) in targets.items()}, pool)
    print(f"seed {seed}: less {time.process_time() - started:.0f} CPU s, with the index", flush=True)
    for target, (rows, _) in targets.items():
        trak = np.zeros(N_POOL)
        ranked = index.select(rows, N_POOL, progress=False)
        trak[ranked["trak_row"][:]] = ranked["trak_score"][:]
        scores = {
            "TRAK": trak,
            "LESS": less[target],
            "embedding similarity": of_pool @ embed(options.model, tokenizer, rows).mean(0),
            "BM25": bm25.score([text.lower() for text in rows["text"]]).mean(1),
            "lowest loss": -pool_loss,
        }
        for method, values in scores.items():
            found[target, method] = first_rows(values, everything, [n_chosen])
            found[target, f"{method}, balance=label"] = first_rows(values, labels, by_label)
        found[target, "random"] = rng.permutation(N_POOL)[:n_chosen]
        found[target, "random rows of the target's task, labels right"] = rng.permutation(np.flatnonzero(origins == target))[
            :n_chosen
        ]
        found.update({(target, method): rows for method, rows in remaining(scores, labels, origins, rng).items()})
    np.savez(stored, **{"|".join(name): rows for name, rows in found.items()})
    return found


def remaining(
    scores: dict[str, np.ndarray], labels: np.ndarray, origins: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Return the rows that remain where a method drops 200, as many of each label."""
    everything, by_label = np.arange(N_POOL), shares(np.bincount(labels).tolist(), N_DROPPED)
    dropped = {
        **{f"without the 200 rows worst by {name}": first_rows(-scores[name], labels, by_label) for name in ("TRAK", "LESS")},
        "without 200 random rows": rng.permutation(N_POOL)[:N_DROPPED],
        "without the 400 flipped rows": np.flatnonzero([origin.endswith("flipped") for origin in origins]),
    }
    return {"all rows": everything, **{name: np.setdiff1d(everything, rows) for name, rows in dropped.items()}}


def less_of_each(index: AttributionIndex, targets: dict[str, Dataset], pool: Dataset) -> dict[str, np.ndarray]:
    """Return the scores of `index.select(target, method="less")` for several targets, by one pass over the training rows."""
    folders = [index._checkpoint_folder(plan) for plan in index.passes]
    weights, _ = checkpoint_weights(folders, None)
    checkpoints = [
        Checkpoint(partial(index._featurizer_of, plan), folder / "optimizer.pt")
        for plan, folder in zip(index.passes, folders, strict=True)
    ]
    codes = np.repeat(np.arange(len(targets)), [len(rows) for rows in targets.values()])
    rows = pool.select_columns(["text", "label"])
    scores = less_scores(
        checkpoints,
        weights,
        concatenate_datasets(list(targets.values())),
        codes,
        len(targets),
        lambda: parts_of(rows.select, N_POOL),
        N_POOL,
        batch_size="auto",
        progress=False,
    )
    return dict(zip(targets, scores.T, strict=True))


def measure(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Return a seed's figures, made before or now: of each target and method, test loss, accuracy and what was chosen."""
    stored = options.work / f"seed-{seed}.json"
    known = json.loads(stored.read_text()) if stored.exists() else {"done": False, "results": []}
    if known["done"]:
        return known["results"]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    pool, targets = draw(sources(options.data), seed)
    origins, results = np.array(pool["origin"]), known["results"]
    chosen = choose(options, pool, targets, seed)
    trained: dict[bytes, Any] = {}  # all rows, and all but the flipped, are the same for every target
    for (target, method), rows in sorted(chosen.items(), key=lambda one: len(one[1])):
        if len(rows) > N_POOL // 2 and not options.drop:
            break
        if any((one["target"], one["method"]) == (target, method) for one in results):
            continue
        base, scratch, order = make_base(options, seed), options.work / f"scratch-{seed}", np.sort(rows)
        epochs = EPOCHS if len(rows) < N_POOL // 2 else EPOCHS_OF_ALL
        model = trained.get(order.tobytes()) or train(
            base, tokenizer, pool.select(order), seed, scratch, epochs=epochs, keep=False
        )
        if len(rows) > N_POOL // 2:
            trained[order.tobytes()] = model
        loss, right = losses(model, tokenizer, targets[target][1])
        figures = {
            "selection_loss": float(loss.mean()),
            "accuracy": float(right.mean()),
            "task_share": float(np.mean([origin == target for origin in origins[rows]])),
            "flipped_share": float(np.mean([origin.endswith("flipped") for origin in origins[rows]])),
        }
        results.append({"target": target, "method": method, **figures})
        print(seed, target, method, {name: round(value, 3) for name, value in figures.items()}, flush=True)
        stored.write_text(json.dumps({"done": False, "results": results}))
    stored.write_text(json.dumps({"done": options.drop, "results": results}))
    return results


def summarize(found: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the mean over seeds of every figure, with its 95 % interval by Student's t; of two seeds, both values."""
    rows = []
    for one in next(iter(found.values())):
        for metric, unit in (
            ("selection_loss", "nats"),
            ("accuracy", "share"),
            ("task_share", "share"),
            ("flipped_share", "share"),
        ):
            values = [
                other[metric]
                for results in found.values()
                for other in results
                if (other["target"], other["method"]) == (one["target"], one["method"])
            ]
            mean, interval = statistics.mean(values), None
            if len(values) > 2:
                half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
                interval = [mean - half, mean + half]
            elif len(values) == 2:  # of which Student's interval says nothing
                interval = [min(values), max(values)]
            rows.append(
                {
                    "case": f"target {TARGETS[one['target']]}, 100 of 2,000 rows, MiniLM-L3 with LoRA",
                    "method": one["method"],
                    "metric": metric,
                    "value": mean,
                    "unit": unit,
                    "interval": interval,
                    "target": TARGETS[one["target"]],
                    "seeds": list(found),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", required=True, help="folder of paraphrase-MiniLM-L3-v2 as a `BertModel`")
    parser.add_argument("--work", type=Path, required=True, help="folder for the models and results of each case")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--drop", action="store_true", help="also train on what remains where a method drops rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/select_cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*chosen rows have")
    options.work.mkdir(parents=True, exist_ok=True)
    found = {}
    for seed in options.seeds:
        found[seed] = measure(options, seed)
        write(
            options,
            summarize(found),
            command="python benchmarks/selection.py --drop" if options.drop else "python benchmarks/selection.py",
        )
    print(f"{time.process_time() / 60:.1f} CPU minutes")


if __name__ == "__main__":
    main()
