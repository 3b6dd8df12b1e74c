"""The demo's arguments."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DemoArguments:
    """What to try, and where it goes."""

    output: str = field(default="hf_trak_demo", metadata={"help": "Folder for the model, the index and the report."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier demo in the output folder."})
    seed: int = field(default=0, metadata={"help": "Seed of the split, the flips, the training and the sketch."})
    flip_fraction: float | None = field(
        default=None, metadata={"help": "Share of training labels to flip: 0.1 for the digits; none with --model."}
    )
    proj_dim: int = field(default=2048, metadata={"help": "Numbers kept per example."})
    members: str = field(
        default="final", metadata={"help": "Checkpoints of the training run: final, or epoch:K for the last K."}
    )
    damping: str = field(default="auto", metadata={"help": "A multiple of the kernel's mean eigenvalue; 0 is the paper's."})
    epochs: int | None = field(default=None, metadata={"help": "Epochs of training: 6 for the digits, 3 with --model --train."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Of the training: 3e-3 for the digits, 5e-5 with --model --train."}
    )
    model: str | None = field(default=None, metadata={"help": "Your own classification model: a folder or repository."})
    processor: str | None = field(
        default=None,
        metadata={"help": "Folder or repository of its tokenizer or image processor; by default those saved with --model."},
    )
    train: bool = field(default=False, metadata={"help": "Fine-tune --model on --dataset first."})
    dataset: str | None = field(default=None, metadata={"help": "Its training set: a file, a folder, or a dataset of the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    split: str = field(default="train", metadata={"help": "Split to learn from."})
    queries: str | None = field(default=None, metadata={"help": "Held-out rows, if they are not in --dataset."})
    query_split: str = field(default="validation", metadata={"help": "Split of the held-out rows."})
    max_rows: int | None = field(default=None, metadata={"help": "Use only the first training rows."})
    max_queries: int | None = field(default=200, metadata={"help": "Use only the first held-out rows of --dataset."})
    text_columns: list[str] | None = field(default=None, metadata={"help": "One or two text columns; found by default."})
    image_column: str | None = field(default=None, metadata={"help": "The image column; found by default."})
    label_column: str | None = field(default=None, metadata={"help": "The label column; 'labels' or 'label' by default."})
