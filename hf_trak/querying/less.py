r"""LESS: training rows by the cosine of Adam's step on them with the gradient of a target's loss.

$$s_i = \max_g \sum_t \frac{\eta_t}{\sum_u \eta_u} \frac1{|D_g|} \sum_{z \in D_g} \cos\big(P^\top\Gamma(z_i; \theta_t), P^\top\nabla L(z; \theta_t)\big),
\qquad \Gamma = \frac{\hat m}{\sqrt{\hat v + \epsilon}}$$

with $\hat m = (\beta_1 m + (1 - \beta_1)\nabla L) / (1 - \beta_1^{t+1})$, $\hat v = (\beta_2 v + (1 - \beta_2)(\nabla L)^2) / (1 - \beta_2^{t+1})$, m and v
the optimizer's moments at checkpoint t, $\eta_t$ the mean learning rate up to it, and g the groups (tasks) of the target.

The step is not linear in the gradient, so that it cannot be had from the features of an index: the gradients of the training rows are
computed again. Cosines are averaged over a group's rows, as in the published code; the paper's equation has the cosine with the mean.

Source: Xia, Malladi, Gururangan, Arora and Chen (2024), [LESS](https://huggingface.co/papers/2402.04333).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from hf_trak.featurizing.batching import Budget, check_finite, fetch, not_finite
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.featurizing.loop import featurize_rows
from hf_trak.gradients import BatchFeatures
from hf_trak.projectors import Identity, Projector, make_projector
from hf_trak.runtime import Bar
from hf_trak.scoring.selection import group_means
from hf_trak.storage.files import read_json
from hf_trak.tasks import minus_loss
from hf_trak.tasks.rows import as_stored

if TYPE_CHECKING:
    from datasets import Dataset

OPTIMIZER_NAME, STATE_NAME = "optimizer.pt", "trainer_state.json"
_EPSILON = 1e-8  # under the root, as in the paper
_ENTRIES = 1 << 26  # entries of gradients that exist at once: 256 MB, and as much again while they are turned into steps
_ROWS = 1024  # at a time


@dataclass(frozen=True)
class AdamMoments:
    """The moments of Adam, or AdamW, of each parameter by its name; a parameter that was never updated has none."""

    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    step: int
    betas: tuple[float, float] = (0.9, 0.999)

    @classmethod
    def load(cls, path: Path, model: Any, selected: Collection[str] = ()) -> AdamMoments:
        """Read the `optimizer.pt` that `Trainer` writes with a checkpoint.

        It numbers parameters and names none: those that decay come first, then the others, each in the model's order.

        Args:
            selected (`Collection[str]`): The parameters that features are of: those that were trained, if others were frozen, which a
                checkpoint does not tell.

        Raises:
            ValueError: If the file cannot be read, is of another optimizer than Adam, or is not of this model's trainable parameters.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            groups, found = state["param_groups"], state["state"]
            sizes, betas = [len(group["params"]) for group in groups], groups[0].get("betas")
            numbers = [number for group in groups for number in group["params"]]
        except Exception as error:  # whatever torch raises of a damaged file
            raise ValueError(f"{path} is no state of an optimizer: {type(error).__name__}: {error}. {_WITHOUT}") from error
        if betas is None or any(not {"exp_avg", "exp_avg_sq", "step"} <= set(values) for values in found.values()):
            raise ValueError(f"{path} is not of Adam or AdamW, whose moments LESS takes. {_WITHOUT}")
        parts = parameter_groups(model)
        if sizes != [len(part) for part in parts] and selected:
            parts = parameter_groups(model, selected)
        names = [name for part in parts for name in part]
        if sizes != [len(part) for part in parts] or not found:
            raise ValueError(
                f"{path} has moments of {' + '.join(map(str, sizes))} parameters, with weight decay and without, but the model has "
                f"{' + '.join(str(len(part)) for part in parts)} trainable ones: it is of another model, or some were frozen. {_WITHOUT}"
            )
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for name, number in zip(names, numbers, strict=True):
            if number not in found:
                continue
            first, second = found[number]["exp_avg"], found[number]["exp_avg_sq"]
            if first.shape != shapes[name] or second.shape != shapes[name]:
                raise ValueError(
                    f"{path} has moments of shape {tuple(first.shape)} where {name} has {tuple(shapes[name])}: it is of another model. {_WITHOUT}"
                )
            moments[name] = (first, second)
        step = max(int(values["step"]) for values in found.values())
        return cls(
            {name: pair[0] for name, pair in moments.items()},
            {name: pair[1] for name, pair in moments.items()},
            step,
            (float(betas[0]), float(betas[1])),
        )


_WITHOUT = (
    "Give the right file (`optimizer`, --optimizer), or compare gradients as they are: optimizer='none' (--optimizer none)."
)


def parameter_groups(model: Any, selected: Collection[str] | None = None) -> tuple[list[str], list[str]]:
    """Return the names of trainable parameters as `Trainer` hands them to its optimizer: with weight decay, and without."""
    from transformers import Trainer

    decaying = set(Trainer.get_decay_parameter_names(None, model))
    trainable = [
        name
        for name, parameter in model.named_parameters()
        if (parameter.requires_grad if selected is None else name in selected)
    ]
    return [name for name in trainable if name in decaying], [name for name in trainable if name not in decaying]


class AdamSteps(Projector):
    """Sketches Adam's step on each example in place of its gradient. The gradients of a batch exist whole meanwhile.

    Args:
        inner ([`Projector`]): What sketches the steps.
        shapes (`Mapping`): Of the selected parameters.
        sign (`float`): What turns the gradients that arrive into those of the loss: −1 where they are of minus the loss.
    """

    def __init__(
        self, inner: Projector, shapes: Mapping[str, Sequence[int]], moments: AdamMoments, *, sign: float = -1.0
    ) -> None:
        super().__init__(proj_dim=inner.proj_dim, seed=inner.seed)
        self.inner, self.shapes, self.moments, self.sign = inner, shapes, moments, sign
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self._whole = Identity(proj_dim=sum(sizes.values()), sizes=sizes)

    @property
    def width(self) -> int:
        """Entries of a gradient."""
        return self._whole.proj_dim

    def start(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "batch width"]:
        return self._whole.start(batch_size, dtype=dtype, device=device)

    def add(self, accumulator: Float[Tensor, "batch width"], name: str, grads: Float[Tensor, "batch *shape"]) -> None:
        self._whole.add(accumulator, name, grads)

    def finish(self, accumulator: Float[Tensor, "batch width"]) -> Float[Tensor, "batch proj_dim"]:
        """Turn the gradients into steps, one parameter after another, and sketch those."""
        batch_size = len(accumulator)
        sketch = self.inner.start(batch_size, dtype=accumulator.dtype, device=accumulator.device)
        for name, shape in self.shapes.items():
            offset, size = self._whole.offsets[name], math.prod(shape)
            step = self._step(name, accumulator[:, offset : offset + size] * self.sign)
            self.inner.add(sketch, name, step.reshape(batch_size, *shape))
        return self.inner.finish(sketch)

    def _step(self, name: str, grads: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch entries"]:
        (beta_1, beta_2), power = self.moments.betas, self.moments.step + 1
        first, second = grads * (1 - beta_1), grads.square() * (1 - beta_2)
        if name in self.moments.first:
            first += beta_1 * self.moments.first[name].flatten().to(grads)
            second += beta_2 * self.moments.second[name].flatten().to(grads)
        return first.div_(1 - beta_1**power).div_(second.div_(1 - beta_2**power).add_(_EPSILON).sqrt_())


class _LossGradients:
    """A featurizer of the gradients of minus the loss, under a projector of its own, for the loop over rows."""

    def __init__(self, featurizer: Featurizer, projector: Projector) -> None:
        self.lengths, self.collate = featurizer.lengths, featurizer.collate
        self._featurizer, self._projector = featurizer, projector

    @property
    def budget(self) -> Budget:
        found = self._featurizer.budget
        if isinstance(self._projector, AdamSteps):
            found = found._replace(rows=max(1, min(found.rows, _ENTRIES // self._projector.width)))
        return found

    def compute(self, batch: Any, ids: Sequence[int] | None = None) -> BatchFeatures:
        features = fetch(self._featurizer.features(batch, projector=self._projector))
        if not_finite(features):
            check_finite(features, ids)
        return features

    def encode(self, features: BatchFeatures) -> dict[str, np.ndarray]:
        return self._featurizer.encode(features)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that rows are compared under.

    Args:
        featurizer (`Callable`): Makes its featurizer, when its turn comes.
        optimizer (`Path`, *optional*): Its `optimizer.pt`; None to compare gradients as they are.
    """

    featurizer: Callable[[], Featurizer]
    optimizer: Path | None


def less_scores(
    checkpoints: Sequence[Checkpoint],
    weights: Sequence[float],
    target: Dataset,
    codes: Int64[np.ndarray, " n_target"],
    n_groups: int,
    parts: Callable[[], Iterator[Dataset]],
    n_rows: int,
    *,
    batch_size: int | str,
    progress: bool,
) -> Float64[np.ndarray, "n_train n_groups"]:
    """Return the score of each training row for each group of the target, weighed over checkpoints.

    Args:
        weights (`Sequence[float]`): Of the checkpoints, in sum 1.
        codes (`np.ndarray`): The group of each row of the target.
        parts (`Callable`): Yields the training rows in order, some at a time: no more of them, nor of their gradients, are held.
    """
    scores = np.zeros((n_rows, n_groups))
    for number, (checkpoint, weight) in enumerate(zip(checkpoints, weights, strict=True)):
        featurizer = checkpoint.featurizer()
        featurizer.use_task(minus_loss(featurizer.task))
        config = featurizer.config
        sketch = make_projector(config.projector, proj_dim=config.proj_dim, seed=featurizer.seed, fold=config.fold)
        if isinstance(sketch, Identity):
            sketch.lay_out({name: parameter.numel() for name, parameter in featurizer.selection.parameters.items()})
        steps: Projector = sketch
        if checkpoint.optimizer is not None:
            moments = AdamMoments.load(checkpoint.optimizer, featurizer.model, featurizer.selection.parameters)
            steps = AdamSteps(sketch, featurizer.selection.shapes, moments)
        of_target = unit_rows(
            _gradients(featurizer, sketch, target, batch_size, progress, f"Target {number + 1}/{len(weights)}")
        )
        sign = -1.0 if checkpoint.optimizer is not None else 1.0  # the target's are of minus the loss, Adam's steps of the loss
        groups = group_means(of_target, codes, n_groups) * sign * weight
        row = 0
        with Bar(total=n_rows, unit="rows", desc=f"Training rows {number + 1}/{len(weights)}", disable=not progress) as bar:
            for part in parts():
                found = unit_rows(_gradients(featurizer, steps, part, batch_size, False, ""))
                scores[row : row + len(found)] += (found.double() @ groups.T).numpy()
                row += len(found)
                bar.update(len(found))
    return scores


def _gradients(
    featurizer: Featurizer, projector: Projector, rows: Dataset, batch_size: int | str, progress: bool, description: str
) -> Float32[Tensor, "n proj_dim"]:
    rows = as_stored(rows)
    featurizer.check(rows)
    with Bar(total=len(rows), unit="rows", desc=description, disable=not progress) as bar:
        source = _LossGradients(featurizer, projector)
        return featurize_rows(source, rows, range(len(rows)), batch_size=batch_size, on_batch=bar.update).features.float()


def unit_rows(rows: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    """Return rows of length 1; a row of zeros, which has no direction, stays one."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norms.where(norms > 0, 1.0)


def parts_of(read: Callable[[range], Dataset], n_rows: int) -> Iterator[Dataset]:
    """Yield the training rows, some at a time."""
    for start in range(0, n_rows, _ROWS):
        yield read(range(start, min(start + _ROWS, n_rows)))


def checkpoint_weights(folders: Sequence[Path | None], given: Sequence[float] | None) -> tuple[list[float], str]:
    """Return the weight of each checkpoint, in sum 1, and where they come from.

    Without any given, they are the mean learning rates that `Trainer` logged since the checkpoint before, as its `trainer_state.json` says;
    where these are not known, all are equal, with a warning.

    Raises:
        ValueError: If there are more or fewer than checkpoints, or they are no numbers of at least 0, one of them above.
    """
    if given is not None:
        rates, source = [float(rate) for rate in given], "given"
        if len(rates) != len(folders):
            raise ValueError(f"There are {len(folders)} checkpoints, but {len(rates)} learning rates. Give one for each.")
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates) or not any(rates):
            raise ValueError(f"Learning rates must be numbers of at least 0, and not all 0, but are {rates}.")
    elif len(folders) == 1:
        rates, source = [1.0], "one checkpoint"
    elif (logged := _logged_rates(folders)) is not None and any(logged):
        rates, source = logged, f"mean learning rates logged in {STATE_NAME}"
    else:
        warnings.warn(
            f"The learning rates of {len(folders)} checkpoints are not known, since not all have a {STATE_NAME} that logged them: all count "
            "alike. Give them as `learning_rates` (--learning_rates).",
            UserWarning,
            stacklevel=3,
        )
        rates, source = [1.0] * len(folders), "equal, since no learning rates are known"
    return [rate / sum(rates) for rate in rates], source


def _logged_rates(folders: Sequence[Path | None]) -> list[float] | None:
    states = [folder / STATE_NAME if folder is not None else None for folder in folders]
    if any(state is None or not state.is_file() for state in states):
        return None
    found = [read_json(state) for state in states if state is not None]
    steps = [int(state["global_step"]) for state in found]
    rates = []
    for state, step in zip(found, steps, strict=True):
        begin = max([other for other in steps if other < step], default=0)
        mine = [
            float(entry["learning_rate"])
            for entry in state.get("log_history", [])
            if "learning_rate" in entry and begin < entry["step"] <= step
        ]
        if not mine:
            return None
        rates.append(sum(mine) / len(mine))
    return rates


def find_optimizers(
    folders: Sequence[Path | None], optimizer: str | Path | Sequence[str | Path]
) -> tuple[list[Path | None], str]:
    """Return the `optimizer.pt` of each checkpoint, and what to say of them.

    Args:
        optimizer: "auto", those beside the checkpoints, or none of them with a warning; "none", none; or one file for each.

    Raises:
        ValueError: If there are not as many files as checkpoints, or only some checkpoints have one.
        FileNotFoundError: If a file that was given is not there.
    """
    if optimizer == "none":
        return [None] * len(folders), "none: gradients as they are, by choice"
    if optimizer != "auto":
        given = [optimizer] if isinstance(optimizer, (str, Path)) else list(optimizer)
        paths = [Path(one) / OPTIMIZER_NAME if Path(one).is_dir() else Path(one) for one in given]
        if len(paths) != len(folders):
            raise ValueError(
                f"There are {len(folders)} checkpoints, but {len(paths)} states of optimizers. Give one for each, in order."
            )
        if missing := [path for path in paths if not path.is_file()]:
            raise FileNotFoundError(f"There is no state of an optimizer at {missing[0]}.")
        return list(paths), "Adam's moments at each checkpoint"
    found = [
        folder / OPTIMIZER_NAME if folder is not None and (folder / OPTIMIZER_NAME).is_file() else None for folder in folders
    ]
    if all(path is not None for path in found):
        return found, "Adam's moments at each checkpoint"
    if any(path is not None for path in found):
        raise ValueError(
            f"{sum(path is not None for path in found)} of {len(found)} checkpoints have an {OPTIMIZER_NAME}, and the others have none. {_WITHOUT}"
        )
    warnings.warn(
        f"No {OPTIMIZER_NAME} lies beside the checkpoints, so that gradients are compared as they are, and not Adam's steps as LESS has it. "
        "Train with `save_strategy` and without `save_only_model`, and make the index of the `checkpoint-...` folders; or give the files "
        "as `optimizer` (--optimizer), or optimizer='none' to have it so.",
        UserWarning,
        stacklevel=3,
    )
    return found, "none: no state of an optimizer was found, so gradients as they are"
