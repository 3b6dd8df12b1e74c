"""What a build would take, from some of its rows: time, disk and memory, before work begins."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from hf_trak.building.build import Order, describe_columns, lay_out_checkpoints
from hf_trak.featurizing.loop import featurize_rows
from hf_trak.runtime import peak_memory
from hf_trak.tasks.contrastive import needs_bank

_TRIED = 32
_UNITS = ("B", "KB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Estimate:
    """What a build would take on this machine, in one process.

    Args:
        n_rows (`int`): Of the training set.
        n_members (`int`): Of the index.
        n_passes (`int`): Passes of gradients over the training set.
        engine (`str`): What makes the gradients: layerwise, functional or loop.
        columns (`str`): Which columns are read, and as what.
        seconds (`float`): Wall time of featurizing, from `n_tried` rows of the first pass.
        disk_bytes (`int`): Of the features and Gram matrices, without columns that are kept.
        memory_bytes (`int`): The largest that this process has been so far, model and gradients included.
        gpu_bytes (`int`): The most of the GPU's memory that was in use; 0 on a CPU.
        n_tried (`int`): Rows that were featurized to know it.
    """

    n_rows: int
    n_members: int
    n_passes: int
    engine: str
    columns: str
    seconds: float
    disk_bytes: int
    memory_bytes: int
    gpu_bytes: int
    n_tried: int

    def __str__(self) -> str:
        lines = {
            "rows": f"{self.n_rows:,}",
            "members": f"{self.n_members}, from {self.n_passes} pass{'es' * (self.n_passes > 1)} of gradients",
            "columns": self.columns,
            "engine": self.engine,
            "time": f"about {spell_seconds(self.seconds)}, as measured on {self.n_tried} rows",
            "disk": f"{spell_bytes(self.disk_bytes)}, and the columns that are kept",
            "memory": f"about {spell_bytes(self.memory_bytes)}",
        }
        if self.gpu_bytes:
            lines["GPU memory"] = f"about {spell_bytes(self.gpu_bytes)}"
        return "\n".join(f"{name:<11}{value}" for name, value in lines.items())


def estimate_build(order: Order) -> Estimate:
    """Featurize some rows under the first checkpoint, and return what all would take; nothing is written.

    Raises:
        ValueError: Whatever the build would raise for the model, its columns and the rows that are tried.
    """
    order = order.checked()
    checkpoints = lay_out_checkpoints(order.ensemble)
    passes = order.ensemble.passes(len(checkpoints), seed=order.config.sketch_seed)
    featurizer = order.featurizer(checkpoints[passes[0].checkpoint], passes[0])
    dataset, batch_size = order.in_chunks(featurizer).source.dataset, order.writing.batch_size
    featurizer.check(dataset)
    featurizer.check_first_rows(dataset)
    if needs_bank(featurizer.task):
        featurizer.make_bank(dataset)
    featurizer.measure_statistics(dataset)
    engine = featurizer.choose_engine(dataset).name
    if featurizer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(featurizer.device)
    n_tried = min(_TRIED, len(dataset))
    some = dataset.select([place * len(dataset) // n_tried for place in range(n_tried)])
    featurize_rows(featurizer, some, range(min(4, n_tried)), batch_size=batch_size)  # warms up
    begin = time.perf_counter()
    features = featurize_rows(featurizer, some, range(n_tried), batch_size=batch_size)
    seconds = (time.perf_counter() - begin) / n_tried * len(dataset) * len(passes)
    row_bytes = sum(column.nbytes for column in featurizer.encode(features).values()) / n_tried
    n_members = passes[-1].members[-1] + 1
    on_gpu = torch.cuda.max_memory_allocated(featurizer.device) if featurizer.device.type == "cuda" else 0
    return Estimate(
        n_rows=len(dataset),
        n_members=n_members,
        n_passes=len(passes),
        engine=engine,
        columns=describe_columns(featurizer.task, dataset),
        seconds=seconds,
        disk_bytes=round(row_bytes * len(dataset) * len(passes) + 8 * order.config.proj_dim**2 * n_members),
        memory_bytes=peak_memory(),
        gpu_bytes=on_gpu,
        n_tried=n_tried,
    )


def spell_bytes(count: float) -> str:
    """Return a number of bytes in the unit that suits it, such as 1.5 GB."""
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {_UNITS[-1]}"


def spell_seconds(seconds: float) -> str:
    """Return a time in the unit that suits it, such as 2.5 minutes."""
    if seconds < 90:
        return f"{seconds:.3g} seconds"
    return f"{seconds / 60:.3g} minutes" if seconds < 5400 else f"{seconds / 3600:.3g} hours"
