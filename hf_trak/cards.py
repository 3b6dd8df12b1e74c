"""The dataset card of an index: its YAML makes `load_dataset(folder, "member_0")` work with no hf_trak installed."""

from __future__ import annotations

from typing import Any

from hf_trak.config import TrakConfig

_BODY = """
# TRAK features

Every row is one training example; `trak_features` is its gradient's sketch. With them, any query can be scored against the
training set without touching the training examples again.

| | |
|---|---|
| task | {task} |
| rows | {rows:,} |
| proj_dim | {proj_dim:,} ({projector}, {dtype}) |
| members | {members} |
| parameters covered | {coverage:.1%} of the trainable ones |

```python
from datasets import load_dataset
from hf_trak import AttributionIndex

rows = load_dataset("{name}", "member_0", split="train")   # plain columns; needs no hf_trak
index = AttributionIndex.from_pretrained("{name}")
hits = index.attribute(queries, top_k=10)                  # per query: the examples that raised and lowered its output most
```

| column | meaning |
|---|---|
| `example_id` | row of the source dataset |
| `trak_features` | sketched gradient of the model output{scaled} |
| `trak_out_to_loss` | 1 − p for a classifier, y − ŷ for a regression |
| `trak_output` | the model output: log p/(1 − p) of the label, or the prediction |
| `trak_grad_norm` | norm of the sketched gradient, an estimate of the gradient's with relative error about 1/√(2·proj_dim) |

Gradient features can reveal what they were made from: share them as you would share the training data.
"""


def render_index_card(config: TrakConfig, members: list[dict[str, Any]], *, name: str) -> str:
    """Return the README.md of an index.

    Args:
        members (`list[dict]`): The members' `member.json`, in order.
        name (`str`): What the load snippet names: the repository, or the folder's name.
    """
    from huggingface_hub import DatasetCardData

    configs = [
        {
            "config_name": f"member_{i}",
            "data_files": [{"split": "train", "path": f"member_{i}/train-*.parquet"}],
            **({"default": True} if i == 0 else {}),
        }
        for i in range(len(members))
    ]
    data = DatasetCardData(tags=["trak", "data-attribution"], configs=configs)
    body = _BODY.format(
        task=members[0]["identity"]["task"],
        rows=members[0]["identity"]["n_rows"],
        proj_dim=config.proj_dim,
        projector=config.projector,
        dtype=config.dtype,
        members=len(members),
        coverage=members[0]["coverage"],
        name=name,
        scaled=", to be multiplied by `trak_scale`" if config.dtype == "float16" else "",
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"
