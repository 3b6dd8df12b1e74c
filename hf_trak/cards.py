"""The dataset card of an index: its YAML makes `load_dataset(folder, "member_0")` work with no hf_trak installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hf_trak.config import TrakConfig
from hf_trak.damping import DampingChoice

CURVE_NAME = "damping.png"

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

{damping}Gradient features can reveal what they were made from: share them as you would share the training data.
"""

_DAMPING = """## Damping

`damping="auto"` is {damping:g} here, in multiples of the kernel's mean nonzero eigenvalue. It was chosen by the members themselves: {n_checkpoints}
checkpoints were trained on recorded random subsets, and scores from half of them rank the outputs of the other half on {n_targets:,}
training rows that these were not trained on. The mean Spearman correlation, over several splits:

| damping | rank correlation |
|---|---|
{rows}
{picture}
"""


def render_index_card(
    config: TrakConfig,
    members: list[dict[str, Any]],
    *,
    name: str,
    choice: DampingChoice | None = None,
    has_curve: bool = False,
) -> str:
    """Return the README.md of an index.

    Args:
        members (`list[dict]`): The members' `member.json`, in order.
        name (`str`): What the load snippet names: the repository, or the folder's name.
        choice (`DampingChoice`, *optional*): Of the damping, where the members' masks made it.
        has_curve (`bool`): Whether its picture lies beside the card.
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
        members=_count_members(members),
        damping="" if choice is None else _describe_choice(choice, has_curve=has_curve),
        coverage=members[0]["coverage"],
        name=name,
        scaled=", to be multiplied by `trak_scale`" if config.dtype == "float16" else "",
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


_MODEL_SECTION = """
## Training data attribution

This model was trained with an `AttributionTrainer` of hf_trak (`members="{members}"`), so it can be asked which training examples
raised or lowered its output on any example. The weights that its features are made of lie under `members/`.

```python
from hf_trak import AttributionIndex

index = AttributionIndex.from_pretrained("index")   # a folder, or the dataset repository that it was pushed to
hits = index.attribute(queries, top_k=10)
```
"""


def render_model_section(members: str) -> str:
    """Return what a model card says of attribution."""
    return _MODEL_SECTION.format(members=members)


def _count_members(members: list[dict[str, Any]]) -> str:
    """Say how many members there are, and of how many checkpoints and dropout masks where those are fewer."""
    checkpoints = {member.get("checkpoint_number", i) for i, member in enumerate(members)}
    dropouts = {member["identity"].get("dropout_seed") for member in members} - {None}
    text = str(len(members))
    if len(checkpoints) < len(members):
        text += f", of {len(checkpoints)} checkpoint{'s' * (len(checkpoints) > 1)}"
    return text + (f", with {len(dropouts)} dropout mask{'s' * (len(dropouts) > 1)}" if dropouts else "")


def _describe_choice(choice: DampingChoice, *, has_curve: bool) -> str:
    rows = "\n".join(
        f"| {f'**{value:g}**' if value == choice.damping else f'{value:g}'} | {correlation:.3f} |"
        for value, correlation in zip(choice.grid, choice.curve, strict=True)
    )
    return _DAMPING.format(
        damping=choice.damping,
        n_checkpoints=choice.n_checkpoints,
        n_targets=choice.n_targets,
        rows=rows,
        picture=f"\n![Rank correlation against damping]({CURVE_NAME})\n" if has_curve else "",
    )


def draw_damping_curve(choice: DampingChoice, folder: Path) -> bool:
    """Draw the curve of a choice into `folder`; without matplotlib nothing is drawn, and the card's table has to do."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.semilogx(choice.grid, choice.curve, marker="o")
    axes.axvline(choice.damping, color="gray", linestyle=":")
    axes.set_xlabel("damping (multiples of the mean eigenvalue)")
    axes.set_ylabel("rank correlation with held-out outputs")
    # Without dates or versions, so that the same choice is the same file.
    figure.savefig(folder / CURVE_NAME, dpi=120, metadata={"Software": None})
    return True
