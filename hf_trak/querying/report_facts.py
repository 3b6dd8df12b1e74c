"""Parts of a report besides the attributed rows: controls, links to rows on the Hub, and notes on how far to trust the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn.functional import normalize

from hf_trak.querying.examples import Attribution, ChunkReader, Control, ExampleReader, Hit
from hf_trak.querying.questions import Question
from hf_trak.querying.scoring_methods import ScoringMethods
from hf_trak.scoring.ensemble import ScoreOptions, SolvedQueries
from hf_trak.sources.repositories import chosen_rows, describe_source, has_whole_split
from hf_trak.storage.reader import MemberReader, aligned_blocks

if TYPE_CHECKING:
    from datasets import Dataset

_DOUBTS = ("one_minus_p", "mean_one_minus_p")
_HEADINGS = {
    "doubt": "1 - p: rows whose labels the model doubts most, the same rows for every query",
    "similarity": "Similarity: rows whose gradients have the direction of the query's gradient",
    "random": "Random rows, the same for every query",
}


def control_rows(
    members: Sequence[MemberReader], features: Sequence[Float32[Tensor, "n_query proj_dim"]], top_k: int
) -> dict[str, Int64[np.ndarray, "n_query k"]]:
    """Return the first rows of simpler rankings: "doubt", by 1 − p, if the index has it; "similarity", by the cosine of gradients; and
    "random". Each file of features is read once.

    Args:
        features: Of the queries, under every member.
    """
    n_rows, n_query = members[0].n_rows, len(features[0])
    k = min(top_k, n_rows)
    directions = [normalize(one.float(), dim=1).T for one in features]
    similar, doubted = _Best(n_query, k), _Best(1, k)
    for blocks in aligned_blocks(members):
        rows = blocks[0].example_id
        alike = [normalize(block.features.float(), dim=1) @ ways for block, ways in zip(blocks, directions, strict=True)]
        similar.take(rows, torch.stack(alike).mean(0).T)
        doubted.take(rows, torch.stack([block.out_to_loss.float() for block in blocks]).mean(0)[None])
    found = {"similarity": similar.rows.numpy()}
    if members[0].identity["out_to_loss_kind"] in _DOUBTS:
        found["doubt"] = doubted.rows.expand(n_query, k).numpy()
    drawn = np.sort(np.random.default_rng(0).choice(n_rows, k, replace=False))
    return {**found, "random": np.broadcast_to(drawn, (n_query, k))}


class _Best:
    """The first `k` of a ranking that comes in blocks."""

    def __init__(self, n_query: int, k: int) -> None:
        self.k = k
        self.values = torch.empty(n_query, 0)
        self.rows = torch.empty(n_query, 0, dtype=torch.int64)

    def take(self, rows: Tensor, values: Tensor) -> None:
        values = torch.cat([self.values, values], 1)
        rows = torch.cat([self.rows, rows.expand(len(values), -1)], 1)
        order = values.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        self.values, self.rows = values.gather(1, order), rows.gather(1, order)


def find_controls(
    index: ScoringMethods,
    features: Sequence[Float32[Tensor, "n_query proj_dim"]],
    solved: Sequence[SolvedQueries],
    options: ScoreOptions,
    train: ExampleReader | ChunkReader,
    top_k: int,
) -> list[list[Control]]:
    """Return the controls of each query: the rows that simpler rankings choose, with their scores."""
    chosen = control_rows(index.members, features, top_k)
    rows = np.unique(np.concatenate([found.ravel() for found in chosen.values()])).tolist()
    scores = dict(zip(rows, index.scores_of_rows(rows, solved, options), strict=True))

    def control(name: str, query: int) -> Control:
        return Control(_HEADINGS[name], [Hit(train[row], float(scores[row][query])) for row in chosen[name][query].tolist()])

    return [[control(name, query) for name in _HEADINGS if name in chosen] for query in range(len(features[0]))]


def controls_of(
    index: ScoringMethods,
    queries: Dataset,
    train: ExampleReader | ChunkReader,
    *,
    top_k: int,
    question: Question,
    options: ScoreOptions,
    batch_size: int | str = "auto",
) -> list[list[Control]]:
    """Return the controls of queries as [`find_controls`]; none where each training row is compared with the nearest of many queries."""
    if question.aggregate == "nearest":
        return [[]]
    sides = index._sides(queries, question, options, batch_size, progress=False)
    features, _ = index._featurize(sides, batch_size, progress=False, direction=question.direction)
    features = [question.join(one) for one in features]
    return find_controls(index, features, index._solve([*features], Question(), options), options, train, top_k)


def with_controls(attributions: Sequence[Attribution], controls: Sequence[list[Control]]) -> list[Attribution]:
    """Return attributions with their controls."""
    return [replace(one, controls=found) for one, found in zip(attributions, controls, strict=True)]


def row_links(index: ScoringMethods, train: Dataset | None) -> Callable[[int], str] | None:
    """Return what gives the page of a training row in the Hub's viewer; None where rows are not known to be of a split of a dataset there.

    Args:
        train (`Dataset`, *optional*): In the index's order. It may hold some rows of a split, in any order, but its table must be the whole of
            the split, as it was downloaded. Without it, the index's record of its training set decides.
    """
    if train is None:
        info = index.members[0].info
        source, config, split = info.get("source", {}), info["training_set"]["config"], info["training_set"]["split"]
        known, chosen = bool(source.get("in_order")), None
    else:
        source, config, split = describe_source(train).get("source", {}), train.info.config_name, train.split
        known, chosen = has_whole_split(train), chosen_rows(train)
    if "repository" not in source or not known or config is None or split is None:
        return None
    place = f"https://huggingface.co/datasets/{quote(source['repository'])}/viewer/{quote(config)}/{quote(str(split))}"
    return lambda row: f"{place}?row={row if chosen is None else chosen[row].as_py()}"


def with_links(attributions: Sequence[Attribution], link: Callable[[int], str] | None) -> list[Attribution]:
    """Return attributions whose training rows link to their pages."""
    if link is None:
        return list(attributions)

    def linked(hits: Sequence[Hit]) -> list[Hit]:
        return [replace(hit, example=replace(hit.example, link=link(hit.example.row))) for hit in hits]

    return [
        replace(
            one,
            proponents=linked(one.proponents),
            opponents=linked(one.opponents),
            controls=[replace(control, hits=linked(control.hits)) for control in one.controls],
        )
        for one in attributions
    ]


def trust_notes(index: ScoringMethods, rows: Dataset | None = None) -> list[str]:
    """Return what is known of how far to trust an index's scores.

    Args:
        rows (`Dataset`, *optional*): The training set, if it is at hand; as of [`row_links`].
    """
    members: Sequence[Any] = index.members
    points = len({member.identity["point"]["alpha"] for member in members if "point" in member.identity})
    runs = f"{index.n_checkpoints} checkpoint{'s' * (index.n_checkpoints != 1)}"
    if points:
        runs += f" at {points} point{'s' * (points != 1)} of the line from its base"
    notes = [
        f"These scores are of {index.n_rows:,} training rows, by {runs}, through {members[0].info['coverage']:.0%} of the trainable "
        f"parameters."
    ]
    if index.n_checkpoints == 1:
        notes.append(
            "One training run is behind them: another run of the same training can rank rows differently. More runs help most."
        )
    if row_links(index, rows) is not None:
        source = members[0].info["source"] if rows is None else describe_source(rows)["source"]
        notes.append(
            f"Rows link to {source['repository']} as it is on the Hub now. What is shown was read at commit {source['revision'][:12]}."
        )
    return notes
