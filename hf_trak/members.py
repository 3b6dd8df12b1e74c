"""What a member is: a checkpoint, a sketch seed, and a dropout seed or none; and how `members=` says which checkpoints to keep.

A checkpoint is a stored one, or a point of the line from a base to a stored one.

Members of an ensemble are numbered checkpoint by checkpoint, dropout seed by dropout seed, sketch by sketch, and no two share a
sketch: the average over members then averages sketch noise too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ADAPTER, AUTO, INITIAL = "adapter", "auto", "initial"  # bases that are found
DEFAULT_ALPHAS = (0.2, 0.5, 0.8)
MIDDLE = 0.5  # where one point alone is
SINGLE_RUN = ("final", "epoch", "steps", "path")
_EXPECTED = "'final', 'epoch:K', 'steps:[S, ...]', 'path:K', 'runs:M' or 'subsets:M', with whole numbers of at least 1"


@dataclass(frozen=True)
class Members:
    """A parsed `members=` string.

    Args:
        kind (`str`): final, epoch, steps, path, runs or subsets.
        count (`int`): Checkpoints to keep; for epochs, the most.
        steps (`tuple[int, ...]`): For steps, which ones, in order.
    """

    kind: str
    count: int = 1
    steps: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Members:
        """Parse `text`.

        Raises:
            ValueError: If it is none of the forms there are.
        """
        if text == "final":
            return cls("final")
        if match := re.fullmatch(r"(epoch|path|runs|subsets):([1-9]\d*)", text):
            return cls(match[1], int(match[2]))
        if match := re.fullmatch(r"steps:\[\s*([1-9]\d*(?:\s*,\s*[1-9]\d*)*)\s*,?\s*\]", text):
            steps = sorted({int(step) for step in match[1].split(",")})
            return cls("steps", len(steps), tuple(steps))
        raise ValueError(f"`members` must be {_EXPECTED}, but is {text!r}.")

    def steps_of(self, n_steps: int) -> tuple[int, ...]:
        """Return the steps of a run after which weights are kept: those that were named, or of a path those after 1/4, 1/8, ... of it.

        Raises:
            ValueError: If the run is too short.
        """
        if self.kind != "path":
            if late := [step for step in self.steps if step > n_steps]:
                raise ValueError(f"`members` asks for the weights after step {late[0]}, but the run ends at step {n_steps}.")
            return self.steps
        steps = sorted({round(n_steps / 2 ** (number + 2)) for number in range(self.count)} - {0})
        if len(steps) < self.count:
            raise ValueError(
                f"members='path:{self.count}' keeps the weights after 1/4, 1/8, ... of the steps, but {n_steps} steps have {len(steps)} such "
                "moments. Keep fewer, or name steps: 'steps:[...]'."
            )
        return tuple(steps)

    @property
    def is_single_run(self) -> bool:
        """Whether one training run makes all of them."""
        return self.kind in SINGLE_RUN


@dataclass(frozen=True)
class PathPoint:
    r"""The point $\theta_0 + \alpha(\theta_1 - \theta_0)$ of the line from a base checkpoint $\theta_0$ to a final one $\theta_1$.

    Args:
        base (`str`): Folder or repository of the base; or "adapter": the base model under a LoRA adapter.
        alpha (`float`): At least 0, where the base is, and below 1, where the final checkpoint is.
        revision (`str`, *optional*): Of the base's repository: a commit.

    Raises:
        ValueError: If `alpha` is out of range.
    """

    base: str
    alpha: float = MIDDLE
    revision: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.alpha, (int, float)) and 0 <= self.alpha < 1):
            raise ValueError(
                f"`alpha` must be at least 0 (the base) and below 1 (the final weights, which need no `base`), but is {self.alpha!r}."
            )


def read_alphas(base: Any, alpha: float | Sequence[float] | None) -> tuple[float, ...]:
    """Return the points that are asked for on each line; none without a base.

    Raises:
        ValueError: If there are points but no base, a number is out of range, or comes twice.
    """
    given = (alpha,) if isinstance(alpha, (int, float)) else None if alpha is None else tuple(alpha)
    if base is None:
        if given is not None:
            raise ValueError(
                f"`alpha` ({', '.join(map(str, given))}) says where on the line from a base to the final weights to look, but there is no "
                "`base`. Give the checkpoint that training began from (--base), or leave `alpha` out."
            )
        return ()
    given = DEFAULT_ALPHAS if given is None else given
    if not given or len(set(given)) < len(given):
        raise ValueError(f"`alpha` must be one number or several different ones, but is {alpha!r}.")
    return tuple(float(PathPoint(ADAPTER, one).alpha) for one in given)


@dataclass(frozen=True)
class Pass:
    """One pass of gradients over a dataset: a checkpoint, with a dropout mask or without, sketched for several members at once.

    Args:
        checkpoint (`int`): Its number.
        dropout_seed (`int`, *optional*): Of the units removed; None removes none.
        members (`tuple[int, ...]`): Numbers of the members this pass makes.
        seeds (`tuple[int, ...]`): Their sketch seeds.
        model (`int`, *optional*): For a point of a path, the number of the final model among those that were given.
    """

    checkpoint: int
    dropout_seed: int | None
    members: tuple[int, ...]
    seeds: tuple[int, ...]
    model: int | None = None


def lay_out_passes(
    n_checkpoints: int, *, seed: int, sketch_seeds_per_checkpoint: int = 1, dropout_seeds: int = 0
) -> list[Pass]:
    """Return the passes that make an ensemble; member i has sketch seed `seed + i`.

    Args:
        sketch_seeds_per_checkpoint (`int`): Sketches of each pass; they share its gradients.
        dropout_seeds (`int`): Thinned networks per checkpoint, in place of the whole one; each costs a pass. 0 keeps it whole.

    Raises:
        ValueError: If a count is out of range.
    """
    if sketch_seeds_per_checkpoint < 1:
        raise ValueError(f"`sketch_seeds_per_checkpoint` must be at least 1, but is {sketch_seeds_per_checkpoint}.")
    if dropout_seeds < 0:
        raise ValueError(f"`dropout_seeds` must be at least 0, but is {dropout_seeds}.")
    passes: list[Pass] = []
    for checkpoint in range(n_checkpoints):
        for dropout in range(dropout_seeds) if dropout_seeds else [None]:
            first = len(passes) * sketch_seeds_per_checkpoint
            members = tuple(range(first, first + sketch_seeds_per_checkpoint))
            dropout_seed = None if dropout is None else seed + checkpoint * dropout_seeds + dropout
            passes.append(Pass(checkpoint, dropout_seed, members, tuple(seed + number for number in members)))
    return passes
