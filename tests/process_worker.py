"""What `test_processes.py` runs in several processes at once."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from datasets_for_tests import token_rows

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.storage.writer import MemberWriter

_write = MemberWriter.write


def tell_of_shards() -> None:
    """Print each shard that is written; be slow where the test wants time to kill this process."""

    def write(self, shard, columns):
        _write(self, shard, columns)
        print("wrote", f"{self.folder.name}/{self.path(shard).name}", flush=True)
        if os.environ.get("SLOW_RANK", "") == os.environ.get("RANK") and self.folder.name == "member_0":
            time.sleep(300)

    MemberWriter.write = write


def options(*models: Any) -> dict[str, Any]:
    return {
        "models": list(models),
        "dataset": token_rows(50),
        "config": TrakConfig(proj_dim=16),
        "sketch_seeds_per_checkpoint": 2,
        "shard_rows": int(os.environ.get("SHARD_ROWS", "12")),
        "progress": False,
    }


def build(folder: str, *models: Any) -> AttributionIndex:
    tell_of_shards()
    return AttributionIndex.build(folder, **options(*models))


def part(folder: str, index: str, count: str, *models: Any) -> None:
    """One job of several, all of which begin when they are told to, so that it is at the same moment."""
    tell_of_shards()
    print("ready", flush=True)
    sys.stdin.readline()
    AttributionIndex.build_shards(folder, shard_index=int(index), num_shards=int(count), **options(*models))


def accelerator(folder: str, *models: str) -> AttributionIndex:
    from accelerate import Accelerator

    Accelerator()  # of a script that asks for nothing: on a machine without GPUs it takes each process for the only one
    return build(folder, *models)


def train(folder: str) -> AttributionIndex:
    from test_trainer import collate, make_model

    from hf_trak import AttributionArguments, AttributionTrainer

    args = AttributionArguments(
        folder, proj_dim=16, shard_rows=12, num_train_epochs=1, use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    trainer = AttributionTrainer(model=make_model("bert"), args=args, train_dataset=token_rows(50), data_collator=collate)
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    index = trainer.featurize()
    refuse_sharded(folder)
    return index


def refuse_sharded(folder: str) -> None:
    """A model under FSDP2 is refused in every process, before anything is written."""
    from models import make_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model("bert")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    try:
        build(f"{folder}/sharded", model)
    except ValueError as error:
        print("refused:", error, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        index = {"build": build, "part": part, "accelerator": accelerator, "train": train}[sys.argv[1]](*sys.argv[2:])
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    if index is None:
        sys.exit(0)
    sums = [member.gram().sum().item() for member in index.members]
    print(json.dumps({"n_rows": index.n_rows, "grams": sums}))
