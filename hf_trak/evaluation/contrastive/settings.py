"""What an evaluation on image-caption pairs does, as flags: by default as published."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ContrastiveArguments:
    """Data, what is trained and how, and what is compared."""

    output: str = field(metadata={"help": "Folder for what is computed; the same command goes on where it was stopped."})
    data: str = field(metadata={"help": "Folder of files, or a dataset of the Hub, of images with captions."})
    # data
    image_column: str = field(default="image", metadata={"help": "Column of images."})
    caption_column: str = field(default="caption", metadata={"help": "Column of captions: one per row, or a list of them."})
    train_split: str = field(default="train", metadata={"help": "Split that is trained on, and credited."})
    query_split: str = field(default="validation", metadata={"help": "Split of the held-out pairs."})
    train_files: list[str] = field(
        default_factory=list, metadata={"help": "Parquet files in --data that are trained on, in place of the split."}
    )
    query_files: list[str] = field(default_factory=list, metadata={"help": "Parquet files in --data of the held-out pairs."})
    n_train: int | None = field(default=None, metadata={"help": "Train on so many pairs, the first; by default on all."})
    n_query: int | None = field(default=None, metadata={"help": "Score so many held-out pairs, the first; by default all."})
    model_name: str | None = field(
        default=None, metadata={"help": "What results call what is trained; by default its folders."}
    )
    data_name: str | None = field(default=None, metadata={"help": "What results call the data; by default --data."})
    # what is trained
    model: str | None = field(
        default=None, metadata={"help": "Dual encoder, with its processor, of which everything is trained."}
    )
    from_scratch: bool = field(default=False, metadata={"help": "Draw the weights of --model anew for each run, by its seed."})
    vision: str | None = field(default=None, metadata={"help": "Frozen vision tower; only projections are trained on it."})
    text: str | None = field(default=None, metadata={"help": "Frozen text tower; its tokens' states are averaged."})
    image_size: int = field(default=112, metadata={"help": "Side of the images that a frozen vision tower sees."})
    dim: int = field(default=256, metadata={"help": "Dimension of the space that projections share."})
    # how
    epochs: int = field(default=100, metadata={"help": "Passes over the training set."})
    batch_size: int = field(default=600, metadata={"help": "Pairs per step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak of the cosine schedule."})
    weight_decay: float = field(default=0.1, metadata={"help": "Of Adam, apart from the gradient (AdamW)."})
    momentum: float = field(default=0.9, metadata={"help": "Adam's first beta."})
    bf16: bool = field(default=False, metadata={"help": "Train a whole dual encoder under autocast to bfloat16."})
    n_workers: int = field(default=0, metadata={"help": "Processes that read the images of a whole dual encoder's batches."})
    # what is compared
    n_ensembles: int = field(default=2, metadata={"help": "Ensembles of TRAK, with halves, runs and sketches of their own."})
    n_members: int = field(default=20, metadata={"help": "Members of an ensemble, trained on random halves."})
    n_checkpoints: int = field(default=5, metadata={"help": "Evenly spaced checkpoints of one run that TracIn looks at."})
    proj_dim: int = field(default=4096, metadata={"help": "Numbers kept per pair and member."})
    bank_size: int = field(default=512, metadata={"help": "Pairs that each is held against."})
    n_subsets: int = field(default=64, metadata={"help": "Random halves of the ground truth of LDS."})
    n_targets: int = field(default=16, metadata={"help": "Held-out pairs that training pairs are removed for."})
    top_k: list[int] = field(default_factory=lambda: [50, 200, 400], metadata={"help": "How many pairs are removed."})
    n_seeds: int = field(default=2, metadata={"help": "Training seeds of every retraining."})
    featurize_batch_size: str = field(default="auto", metadata={"help": "Rows of a batch of gradients, or auto."})
    # sharing the work
    shard_index: int = field(default=0, metadata={"help": "Which part of the training runs to do."})
    num_shards: int = field(default=1, metadata={"help": "Number of parts."})
    device: str | None = field(default=None, metadata={"help": "By default CUDA where there is one."})

    def __post_init__(self) -> None:
        towers = self.vision is not None, self.text is not None
        if (self.model is not None) == any(towers) or (any(towers) and not all(towers)):
            raise ValueError(
                "Give --model, a dual encoder to train as a whole, or both --vision and --text, frozen towers to train projections on."
            )
        if bool(self.train_files) != bool(self.query_files):
            raise ValueError("Give both --train_files and --query_files, or neither: their pairs must not be the same.")
        if not 0 <= self.shard_index < self.num_shards:
            raise ValueError(f"`shard_index` must lie in 0 to {self.num_shards - 1}, but is {self.shard_index}.")
        if not 1 <= self.n_members <= 1000 or self.n_ensembles < 1:
            raise ValueError(
                f"There must be 1 to 1000 members and at least one ensemble, but `n_members` is {self.n_members} and `n_ensembles` "
                f"{self.n_ensembles}."
            )
        if not 1 <= self.n_checkpoints <= self.epochs:
            raise ValueError(f"`n_checkpoints` must lie in 1 to {self.epochs}, the epochs, but is {self.n_checkpoints}.")

    @property
    def shard(self) -> tuple[int, int]:
        """Which part of the training runs this call does, and of how many."""
        return self.shard_index, self.num_shards


NOT_SHARED = ("output", "shard_index", "num_shards", "device", "featurize_batch_size")
"""Flags that may differ from call to call in one folder."""
