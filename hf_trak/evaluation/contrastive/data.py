"""Pairs of images and captions, to train on and held out."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset

from hf_trak.evaluation.contrastive.settings import ContrastiveArguments


def load_pairs(args: ContrastiveArguments) -> tuple[Dataset, Dataset]:
    """Return training and held-out pairs, with the columns `image` and `caption` alone.

    Raises:
        ValueError: If a column is missing, or there are fewer pairs than are wanted.
    """
    parts = (args.train_files, args.train_split, args.n_train), (args.query_files, args.query_split, args.n_query)
    train, queries = (_rows(args, files, split, limit) for files, split, limit in parts)
    if len(train) < 2 or len(queries) == 0:
        raise ValueError(f"There must be training and held-out pairs, but there are {len(train)} and {len(queries)}.")
    return train, queries


def _rows(args: ContrastiveArguments, files: list[str], split: str, limit: int | None) -> Dataset:
    found = [_parquet(Path(args.data) / name) for name in files] or [load_dataset(args.data, split=split)]
    pairs = concatenate_datasets([_pairs(rows, args) for rows in found])
    if limit is not None and limit > len(pairs):
        raise ValueError(f"{limit} pairs are wanted of {', '.join(files) or split}, but there are {len(pairs)}.")
    return pairs if limit is None else pairs.select(range(limit))


def _parquet(path: Path) -> Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; --train_files and --query_files are names in the folder --data.")
    return load_dataset("parquet", data_files={"train": str(path)}, split="train")


def _pairs(rows: Dataset, args: ContrastiveArguments) -> Dataset:
    wanted = {args.image_column: "image", args.caption_column: "caption"}
    if missing := [column for column in wanted if column not in rows.column_names]:
        raise ValueError(
            f"{args.data} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}. Set --image_column and "
            "--caption_column."
        )
    rows = rows.select_columns(list(wanted))
    return rows.rename_columns({old: new for old, new in wanted.items() if old != new})
