"""`Ensemble`, what members are made of; a member is a checkpoint, a sketch seed, and a dropout seed or none.

A checkpoint is a stored one, or a point of the line from a base to a stored one.

Members of an ensemble are numbered checkpoint by checkpoint, dropout seed by dropout seed, sketch by sketch, and no two share a
sketch: the average over members then averages sketch noise too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
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


@dataclass(frozen=True)
class Ensemble:
    """What the members of an index are made of: models, points of the path to each, and sketches of each.

    ```python
    >>> ensemble = Ensemble("my-bert", sketch_seeds_per_checkpoint=2)
    >>> index = AttributionIndex.build("two-sketches", models=ensemble, dataset=train, config=TrakConfig(proj_dim=64), progress=False)
    >>> len(index.members)
    2
    >>> Ensemble(kept="epoch:3").members.count
    3
    ```

    Args:
        models (`PreTrainedModel`, `str` or a sequence): One or more models, folders or repositories.
        kept (`str` or [`Members`]): Which weights of its training runs an [`AttributionTrainer`] keeps as `models`; the string is parsed.
        revision, base, alpha, base_revision, sketch_seeds_per_checkpoint, dropout_seeds, masks: As in [`AttributionIndex.build`].

    Raises:
        ValueError: If a count or `alpha` is out of range, there are not as many bases as models, or `alpha` or `base_revision` has no base.
    """

    models: Any = ()
    kept: Members | str = "final"
    revision: str | None = None
    base: Any = None
    alpha: float | Sequence[float] | None = None
    base_revision: str | None = None
    sketch_seeds_per_checkpoint: int = 1
    dropout_seeds: int = 0
    masks: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        models = tuple(self.models) if isinstance(self.models, (list, tuple)) else (self.models,)
        object.__setattr__(self, "models", models)
        if isinstance(self.kept, str):
            object.__setattr__(self, "kept", Members.parse(self.kept))
        if self.sketch_seeds_per_checkpoint < 1:
            raise ValueError(f"`sketch_seeds_per_checkpoint` must be at least 1, but is {self.sketch_seeds_per_checkpoint}.")
        if self.dropout_seeds < 0:
            raise ValueError(f"`dropout_seeds` must be at least 0, but is {self.dropout_seeds}.")
        if isinstance(self.base, (list, tuple)) and len(self.base) != len(models):
            raise ValueError(
                f"`base` must be one base, or one per model, None for none: {len(models)}, but there are {len(self.base)}."
            )
        _ = self.alphas
        if self.base_revision is not None and not self._has_base:
            raise ValueError("`base_revision` is given, but there is no `base`.")

    @classmethod
    def of(cls, models: Any, **given: Any) -> Ensemble:
        """Return `models` if it is an ensemble, else that of these models.

        Raises:
            ValueError: If an ensemble comes with fields beside it.
        """
        if not isinstance(models, cls):
            return cls(models, **given)
        defaults = {one.name: one.default for one in fields(cls)}
        beside = [
            name
            for name, value in given.items()
            if value is not defaults[name] and not (type(value) is type(defaults[name]) and value == defaults[name])
        ]
        if beside:
            raise ValueError(
                f"`models` is an Ensemble, which says itself what members are made of, but {', '.join(beside)} "
                f"{'is' if len(beside) == 1 else 'are'} given beside it. Make them its fields: "
                f"Ensemble(..., {', '.join(f'{name}=...' for name in beside)})."
            )
        return models

    @property
    def members(self) -> Members:
        """Which weights of its training runs a trainer keeps."""
        assert isinstance(self.kept, Members)
        return self.kept

    @property
    def bases(self) -> tuple[Any, ...]:
        """The base of each model; None where a model has none."""
        return tuple(self.base) if isinstance(self.base, (list, tuple)) else (self.base,) * len(self.models)

    @property
    def _has_base(self) -> bool:
        return self.base is not None if not isinstance(self.base, (list, tuple)) else any(one is not None for one in self.base)

    @property
    def alphas(self) -> tuple[float, ...]:
        """The points on the line from a base to its model; none without a base."""
        return read_alphas(self.base if self._has_base else None, self.alpha)

    def passes(self, n_checkpoints: int, *, seed: int) -> list[Pass]:
        """Return the passes that make the members of some checkpoints; member i has sketch seed `seed + i`."""
        passes: list[Pass] = []
        for checkpoint in range(n_checkpoints):
            for dropout in range(self.dropout_seeds) if self.dropout_seeds else [None]:
                first = len(passes) * self.sketch_seeds_per_checkpoint
                members = tuple(range(first, first + self.sketch_seeds_per_checkpoint))
                dropout_seed = None if dropout is None else seed + checkpoint * self.dropout_seeds + dropout
                passes.append(Pass(checkpoint, dropout_seed, members, tuple(seed + number for number in members)))
        return passes
