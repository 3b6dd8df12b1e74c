"""How good attributions of a dual encoder are: counterfactuals and LDS on real photographs with captions.

python scripts/evaluate_clip.py --vision dinov2-small --text all-MiniLM-L6-v2 --output out          # two cores, under two hours
python scripts/evaluate_clip.py ... --shard_index 1 --num_shards 2                                  # half of the training runs

Both towers are pretrained and frozen, and what they make of every image and caption is kept in the output folder; trained, and so
what gradients are of, are the two projections and the temperature, as a `VisionTextDualEncoderModel` has them. One training run then
takes seconds. The optimizer, its schedule and its decay are those of Park et al. (2023), section 5.1.

Counterfactuals: the top k training pairs by each method are removed for each of some held-out pairs, and the change of the cosine
between its image and its caption is reported. LDS: outputs of models trained on random halves against the sums of scores. The same
command again goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset, Features, concatenate_datasets, load_dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_trak import AttributionIndex, Task, TrakConfig
from hf_trak.cli.parsing import make_parser, parse
from hf_trak.cli.quiet import hush
from hf_trak.evaluation import ground_truth_reliability, lds, make_masks
from hf_trak.evaluation.baselines import Checkpoints, TracInCP
from hf_trak.evaluation.counterfactual import Counterfactuals, run_counterfactuals, summarize_counterfactuals
from hf_trak.evaluation.plots import save_plots
from hf_trak.store import write_atomically, write_json
from hf_trak.tasks import Bank, draw_rows, embed_bank, in_direction, with_bank
from hf_trak.tasks.bank import pair_keys
from hf_trak.tasks.contrastive import ContrastiveOutput
from hf_trak.tasks.pictures import to_rgb

_AT_ONCE = 32


@dataclass
class EvaluateClipArguments:
    """Data, training and what is compared."""

    vision: str = field(metadata={"help": "Folder of the frozen vision tower."})
    text: str = field(metadata={"help": "Folder of the frozen text tower; its tokens' states are averaged."})
    output: str = field(metadata={"help": "Folder for what is computed."})
    data: str = field(default="../shared/data/captions", metadata={"help": "Folder of the Parquet files of captions."})
    image_size: int = field(default=112, metadata={"help": "Side of the images that the vision tower sees."})
    dim: int = field(default=256, metadata={"help": "Dimension of the shared space."})
    epochs: int = field(default=30, metadata={"help": "Passes over the training set."})
    batch_size: int = field(default=250, metadata={"help": "Pairs per step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak of the cosine schedule."})
    weight_decay: float = field(default=0.1, metadata={"help": "Of Adam."})
    n_targets: int = field(default=16, metadata={"help": "Held-out pairs that training pairs are removed for."})
    top_k: list[int] = field(default_factory=lambda: [20, 80, 200], metadata={"help": "How many pairs are removed."})
    n_seeds: int = field(default=2, metadata={"help": "Training seeds of every retraining."})
    n_subsets: int = field(default=64, metadata={"help": "Random halves of the ground truth of LDS."})
    n_members: int = field(default=20, metadata={"help": "Members of the ensemble, trained on other random halves."})
    proj_dim: int = field(default=2048, metadata={"help": "Numbers kept per pair and member."})
    bank_size: int = field(default=512, metadata={"help": "Pairs that each is held against."})
    shard_index: int = field(default=0, metadata={"help": "Which part of the training runs to do."})
    num_shards: int = field(default=1, metadata={"help": "Number of parts."})
    result: str = field(default="results/clip_small.json", metadata={"help": "Where the results go."})


class PairHeads(nn.Module):
    """Two projections into a shared space, and a temperature: what is trained of the dual encoder."""

    def __init__(self, image_dim: int, text_dim: int, dim: int) -> None:
        super().__init__()
        self.visual_projection = nn.Linear(image_dim, dim, bias=False)
        self.text_projection = nn.Linear(text_dim, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def get_image_features(self, image: Tensor) -> Tensor:
        """(batch, image_dim) -> (batch, dim)"""
        return self.visual_projection(image)

    def get_text_features(self, text: Tensor) -> Tensor:
        """(batch, text_dim) -> (batch, dim)"""
        return self.text_projection(text)


@dataclass(frozen=True)
class StateInputs:
    """Rows that hold what the frozen towers made of an image and its caption."""

    def check(self, features: Features, processing_class: Any) -> None:
        """The rows are made here."""

    def collate(self, rows: Mapping[str, Any], processing_class: Any) -> dict[str, Tensor]:
        """Return a batch as the contrastive task has it."""
        batch = {"image": torch.tensor(rows["image"]), "text": torch.tensor(rows["text"]).unsqueeze(1)}
        return {
            **batch,
            "caption_weights": torch.ones(len(batch["image"]), 1),
            "pair_keys": pair_keys(batch, ["image", "text"]),
        }

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        """All rows are alike."""
        return None


TASK = Task(
    "contrastive", StateInputs(), ContrastiveOutput("softmax", "logit_scale", None, ("image",), ("text",)), needs_labels=False
)


def load_pairs(args: EvaluateClipArguments) -> tuple[Dataset, Dataset]:
    """Return training and held-out pairs: an image and its first caption."""
    parts = [
        load_dataset("parquet", data_files={"train": f"{args.data}/{name}.parquet"}, split="train").select_columns(
            ["image", "caption"]
        )
        for name in ("flickr8k_train", "coco2017_ccby", "flickr8k_validation")
    ]
    return concatenate_datasets(parts[:2]), parts[2]


@torch.no_grad()
def tower_states(args: EvaluateClipArguments, pairs: Dataset, path: Path) -> dict[str, Tensor]:
    """Return what the frozen towers make of all pairs, computing it once."""
    if path.exists():
        return load_file(path)
    vision = transformers.AutoModel.from_pretrained(args.vision).eval()
    text = transformers.AutoModel.from_pretrained(args.text).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.text)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images, texts = [], []
    for start in tqdm(range(0, len(pairs), _AT_ONCE), desc=f"Frozen towers, {path.stem}"):
        rows = pairs[start : start + _AT_ONCE]
        squares = [np.asarray(to_rgb(image).resize((args.image_size, args.image_size))) for image in rows["image"]]
        pixels = (torch.from_numpy(np.stack(squares)).float() / 255 - mean) / std
        images.append(vision(pixel_values=pixels.permute(0, 3, 1, 2)).pooler_output)
        tokens = tokenizer(rows["caption"], padding=True, truncation=True, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(2)
        texts.append((text(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1))
    states = {"image": F.normalize(torch.cat(images), dim=1), "text": F.normalize(torch.cat(texts), dim=1)}
    write_atomically(path, lambda temporary: save_file(states, temporary))
    return states


def train(
    args: EvaluateClipArguments, states: Mapping[str, Tensor], mask: np.ndarray, seed: int, keep: int = 1
) -> list[PairHeads]:
    """Train on the pairs where `mask` is True; return the weights at `keep` evenly spaced epochs, the last among them."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = PairHeads(states["image"].shape[1], states["text"].shape[1], args.dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    subset = torch.from_numpy(np.flatnonzero(mask))
    n_steps = args.epochs * -(-len(subset) // args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    kept = []
    for epoch in range(1, args.epochs + 1):
        for rows in subset[torch.randperm(len(subset), generator=generator)].split(args.batch_size):
            images = F.normalize(model.get_image_features(states["image"][rows]), dim=1)
            texts = F.normalize(model.get_text_features(states["text"][rows]), dim=1)
            logits = model.logit_scale.exp() * images @ texts.T
            target = torch.arange(len(rows))
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch * keep % args.epochs < keep:
            kept.append(PairHeads(states["image"].shape[1], states["text"].shape[1], args.dim))
            kept[-1].load_state_dict(model.state_dict())
    return kept


@torch.no_grad()
def cosines(model: PairHeads, states: Mapping[str, Tensor]) -> np.ndarray:
    """Return the cosine between each image and its caption."""
    images, texts = model.get_image_features(states["image"]), model.get_text_features(states["text"])
    return F.cosine_similarity(images, texts).numpy()


def as_rows(states: Mapping[str, Tensor]) -> Dataset:
    """Return the states as a dataset."""
    return Dataset.from_dict({name: values.tolist() for name, values in states.items()}).with_format("numpy")


class Evaluation:
    """The pairs, and the runs that are made of them."""

    def __init__(self, args: EvaluateClipArguments) -> None:
        self.args = args
        self.folder = Path(args.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        pairs = load_pairs(args)
        self.train_states, self.query_states = (
            tower_states(args, rows, self.folder / f"{name}.safetensors")
            for rows, name in zip(pairs, ("train", "queries"), strict=True)
        )
        self.n_train, self.n_query = len(pairs[0]), len(pairs[1])
        self.train_rows, self.query_rows = as_rows(self.train_states), as_rows(self.query_states)
        self.case = f"projections on frozen DINOv2-S and MiniLM-L6, {self.n_train} pairs of Flickr8k and COCO, {self.n_query} held-out pairs"

    def bank(self, model: PairHeads) -> Bank:
        """Return the bank of a model: the same pairs for all."""
        rows = draw_rows(self.n_train, self.args.bank_size, 0)
        return embed_bank(TASK, model, TASK.collate(self.train_rows[rows.tolist()], None), rows)

    @torch.no_grad()
    def outputs(self, model: PairHeads) -> np.ndarray:
        """Return the output f of every held-out pair."""
        task = with_bank(TASK, self.bank(model))
        return task.output_function(model, task.collate(self.query_rows[:], None))[0].numpy()

    def run(self, name: str, mask: np.ndarray, seed: int) -> list[float]:
        """Return the outputs of a training run, doing it once."""
        path = self.folder / "lds" / f"{name}-seed_{seed}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"outputs": self.outputs(train(self.args, self.train_states, mask, seed)[-1]).tolist()})
        return json.loads(path.read_text())["outputs"]

    def index(self, name: str, models: list[PairHeads], masks: np.ndarray | None = None) -> AttributionIndex:
        """Return the index of some models."""
        config = TrakConfig(proj_dim=self.args.proj_dim, bank_size=self.args.bank_size, fold=1)
        options: dict[str, Any] = {} if masks is None else {"masks": torch.from_numpy(masks)}
        return AttributionIndex.build(
            self.folder / name, models=models, dataset=self.train_rows, config=config, task=TASK, batch_size=100, **options
        )


def all_scores(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """Return the scores of every method, (n_train, n_query) each."""
    path = evaluation.folder / "scores.safetensors"
    if not path.exists():
        scores = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in compute_scores(evaluation).items()}
        write_atomically(path, lambda temporary: save_file(scores, temporary))
    return {name: values.numpy().astype(np.float64) for name, values in load_file(path).items()}


def compute_scores(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """Score the held-out pairs with TRAK, TracIn, similarities and at random."""
    args, states, queries = evaluation.args, evaluation.train_states, evaluation.query_rows
    everything = np.ones(evaluation.n_train, dtype=bool)
    steps = train(args, states, everything, 1000, keep=5)
    masks = make_masks(evaluation.n_train, args.n_members, seed=1)
    members = [train(args, states, mask, 2000 + number)[-1] for number, mask in enumerate(masks)]
    ensemble, single = evaluation.index("members", members, masks), evaluation.index("single", steps[-1:])
    return {
        f"TRAK, {args.n_members} half-subset members": ensemble.score(queries),
        "TRAK, 1 checkpoint": single.score(queries),
        "TracIn, 5 checkpoints": tracin(evaluation, steps),
        **similarities(steps[-1], states, evaluation.query_states),
        "random": np.random.default_rng(0).normal(size=(evaluation.n_train, evaluation.n_query)),
    }


def tracin(evaluation: Evaluation, steps: list[PairHeads]) -> np.ndarray:
    """Return dot products of the gradients of the contrastive loss, each checkpoint held against its own bank."""
    config = TrakConfig(proj_dim=evaluation.args.proj_dim, fold=1)
    total = np.zeros((evaluation.n_train, evaluation.n_query))
    for number, model in enumerate(steps):
        task = minus_loss(with_bank(TASK, evaluation.bank(model)))
        epoch = (number + 1) / len(steps)
        rate = 0.5 * (1 + math.cos(math.pi * (epoch - 0.5 / len(steps))))  # of the schedule, midway to this checkpoint
        baseline = TracInCP(Checkpoints(model, config, task=task, batch_size=100), learning_rates=[rate])
        total += baseline(evaluation.train_rows, evaluation.query_rows)
    return total


def minus_loss(task: Task) -> Task:
    """Return the task whose output is minus the contrastive loss."""
    image, caption = (in_direction(task, way).output_function for way in ("image", "caption"))

    def output(model: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
        return -(F.softplus(-image(model, batch)[0]) + F.softplus(-caption(model, batch)[0])) / 2

    return Task.custom(output, collator=lambda rows: task.inputs.collate({k: [row[k] for row in rows] for k in rows[0]}, None))


@torch.no_grad()
def similarities(model: PairHeads, states: Mapping[str, Tensor], queries: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return cosines in the shared space."""

    def embed(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return F.normalize(model.get_image_features(rows["image"]), dim=1), F.normalize(
            model.get_text_features(rows["text"]), dim=1
        )

    (images, texts), (query_images, query_texts) = embed(states), embed(queries)
    of_images, of_captions = (images @ query_images.T).numpy(), (texts @ query_texts.T).numpy()
    return {
        "similarity of images": of_images,
        "similarity of captions": of_captions,
        "similarity, mean of both": (of_images + of_captions) / 2,
    }


def counterfactuals(evaluation: Evaluation, scores: Mapping[str, np.ndarray]) -> list[dict[str, Any]] | None:
    """Remove, retrain and report the change of the targets' cosines; None while another process still has runs to do."""
    args = evaluation.args
    left_out = ("random", "TRAK, 1 checkpoint")  # the plan has a random control of its own
    targets = sorted(np.random.default_rng(0).permutation(evaluation.n_query)[: args.n_targets].tolist())
    plan = Counterfactuals(
        {name: values for name, values in scores.items() if name not in left_out},
        targets=targets,
        top_k=args.top_k,
        seeds=range(args.n_seeds),
        case=evaluation.case,
    )

    def retrain(mask: np.ndarray, seed: int) -> np.ndarray:
        return cosines(train(args, evaluation.train_states, mask, seed)[-1], evaluation.query_states)

    folder = evaluation.folder / "counterfactuals"
    run_counterfactuals(plan, retrain, folder, shard=(args.shard_index, args.num_shards))
    if len(list(folder.glob("*.json"))) < len(plan.removals):
        return None
    return [{**row, "unit": "cosine"} for row in summarize_counterfactuals(plan, folder, flips=False)]


def datamodeling(evaluation: Evaluation, scores: Mapping[str, np.ndarray]) -> list[dict[str, Any]] | None:
    """Return the LDS of every method, and its ceiling; None while another process still has runs to do."""
    args = evaluation.args
    masks = make_masks(evaluation.n_train, args.n_subsets, seed=2)
    runs = [(seed, number) for seed in range(args.n_seeds) for number in range(args.n_subsets)]
    for seed, number in tqdm(runs[args.shard_index :: args.num_shards], desc="Ground truth"):
        evaluation.run(f"subset_{number}", masks[number], 100 * seed + number)
    if len(list((evaluation.folder / "lds").glob("*.json"))) < len(runs):
        return None
    outputs = np.array(
        [
            [evaluation.run(f"subset_{number}", masks[number], 100 * seed + number) for number in range(args.n_subsets)]
            for seed in range(args.n_seeds)
        ]
    )
    case = f"{evaluation.case}, {args.n_subsets} half-subsets x {args.n_seeds} seeds"
    ceiling = ground_truth_reliability(outputs)
    rows = [(name, "lds", (found := lds(values, masks, outputs)).value, found.interval) for name, values in scores.items()]
    rows.append(("noiseless outputs", "lds_ceiling", ceiling.ceiling, ceiling.interval))
    return [
        {"case": case, "method": method, "metric": metric, "value": value, "unit": "", "interval": list(interval)}
        for method, metric, value, interval in rows
    ]


def recall(evaluation: Evaluation) -> dict[str, Any]:
    """Return how often a model of all pairs finds a held-out image's caption first, so that one knows what is attributed."""
    model = train(evaluation.args, evaluation.train_states, np.ones(evaluation.n_train, dtype=bool), 0)[-1]
    with torch.no_grad():
        images = F.normalize(model.get_image_features(evaluation.query_states["image"]), dim=1)
        texts = F.normalize(model.get_text_features(evaluation.query_states["text"]), dim=1)
    value = (images @ texts.T).argmax(1).eq(torch.arange(evaluation.n_query)).double().mean().item()
    return {
        "case": evaluation.case,
        "method": "the model itself",
        "metric": "recall_at_1",
        "value": value,
        "unit": "share",
        "interval": None,
    }


def main(args: EvaluateClipArguments) -> None:
    """Score, retrain, report."""
    hush()
    torch.set_num_threads(1)  # so small a model is slower on two
    evaluation = Evaluation(args)
    scores = all_scores(evaluation)
    parts = [datamodeling(evaluation, scores), counterfactuals(evaluation, scores)]
    if any(part is None for part in parts):
        print("This part is done; the process that finishes last writes the results.")
        return
    rows = [row for part in parts if part for row in part] + [recall(evaluation)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "name": Path(args.result).stem,
        "command": "python scripts/evaluate_clip.py",
        "commit": commit,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "threads": 1},
        "rows": rows,
    }
    Path(args.result).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(args.result), result)
    for row in rows:
        print(json.dumps({key: row[key] for key in ("method", "metric", "value", "interval")} | {"top_k": row.get("top_k")}))
    print(*save_plots([args.result], evaluation.folder / "plots", title="CLIP, small"), sep="\n")


if __name__ == "__main__":
    usage = "--vision FOLDER --text FOLDER --output FOLDER [options]"
    main(*parse(make_parser([EvaluateClipArguments], command="evaluate_clip", usage=usage, description=__doc__), sys.argv[1:]))
