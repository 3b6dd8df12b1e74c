"""Bases: the checkpoint at which the line to a final checkpoint begins, and the points between the two."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_trak.hashing import hash_tensors
from hf_trak.members import ADAPTER, AUTO, INITIAL, PathPoint
from hf_trak.runtime import uncollected
from hf_trak.sources.checkpoints import check_is_checkpoint
from hf_trak.sources.path_points import LEAST_COSINE, PointReport, check_unquantized, move_to_point, scale_adapter
from hf_trak.sources.repositories import Listing, look_up, reached
from hf_trak.sources.weights import as_pattern, check_files, common_change, load_with_report, read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_SHOWN = 5


def find_base(
    model: nn.Module | str | Path, base: str | Path, *, revision: str | None = None, base_revision: str | None = None
) -> PathPoint:
    """Return the base of a final checkpoint, as a point with the default `alpha`. No weights are loaded.

    Args:
        model (`nn.Module`, `str` or `Path`): The final checkpoint.
        base (`str` or `Path`): A folder or repository; "adapter"; or "auto": the base model under an adapter, else the `base_model` that
            the checkpoint's model card names.
        revision, base_revision (`str`, *optional*): Revisions of the repositories of the final checkpoint and of the base.

    Raises:
        FileNotFoundError: If the base does not exist.
        ValueError: If it cannot be the base of this checkpoint, or if "auto" finds none.
    """
    if not isinstance(base, (str, Path)):
        raise ValueError(f"`base` must be a folder, a repository, 'adapter' or 'auto', but is a {type(base).__name__}.")
    called = str(model) if isinstance(model, (str, Path)) else f"this {type(model).__name__}"
    listing = look_up(str(model), revision) if isinstance(model, (str, Path)) else None
    is_adapter = hasattr(model, "peft_config") if listing is None else "adapter_config.json" in listing.files
    if base == INITIAL:
        raise ValueError(
            "base='initial' are the weights that an AttributionTrainer's run began with, and there is no run here. Give their folder."
        )
    if is_adapter and base in (ADAPTER, AUTO):
        if base_revision is not None:
            raise ValueError(
                "`base_revision` is for a base repository, but the base is the one that the adapter names in its configuration."
            )
        return PathPoint(ADAPTER)
    if is_adapter:
        raise ValueError(
            f"{called} is an adapter, whose base is the model under it. Give base='adapter' (--base adapter) in place of {str(base)!r}."
        )
    if base == ADAPTER:
        raise ValueError(
            f"base='adapter' is for LoRA adapters, but {called} is not one. Give the checkpoint it was trained from."
        )
    if base == AUTO:
        if listing is None:
            raise ValueError(
                "base='auto' reads the card of a checkpoint, but the model is in memory. Give the checkpoint it was trained from."
            )
        base = _named_by_card(str(model), listing, revision)
        logger.warning("base=%r, which the model card of %s names as its base_model.", base, model)
    base = str(base)
    try:
        there = look_up(base, base_revision)
        if hasattr(model, "save_pretrained") or listing is not None:  # plain modules have no configuration
            check_is_checkpoint(base, base_revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The base cannot be used: {error}") from error
    if "adapter_config.json" in there.files:
        raise ValueError(f"The base {base} is an adapter. A base is a whole checkpoint: merge the adapter, and save the model.")
    return PathPoint(base, revision=there.commit or base_revision)


def _named_by_card(source: str, listing: Listing, revision: str | None) -> str:
    """Return the `base_model` that the card of a checkpoint names.

    Raises:
        ValueError: If it names none, or several.
    """
    from huggingface_hub import ModelCard
    from transformers.utils import cached_file

    named: Any = None
    if "README.md" in listing.files:
        with reached(listing):
            path = cached_file(source, "README.md", revision=listing.commit or revision)
        card = Path(path).read_text(encoding="utf-8")
        if card.startswith("---"):
            named = ModelCard(card, ignore_metadata_errors=True).data.to_dict().get("base_model")
    found = [named] if isinstance(named, str) else list(named or [])
    if len(found) != 1:
        said = f"names {len(found)}: {', '.join(map(str, found))}" if found else "names none"
        raise ValueError(
            f"base='auto' takes the base_model of the model card, and that of {source} {said}. Give the checkpoint that training began "
            "from as `base` (--base)."
        )
    return str(found[0])


@dataclass(frozen=True)
class MadePoint:
    """The identity of a point, and a report on it.

    Args:
        identity (`dict`): JSON-able: `alpha`, the hash of the base's weights, and the parameters that did not start from the base.
        report (`PointReport`): How the point was computed.
    """

    identity: dict[str, Any]
    report: PointReport


def make_point(
    model: PreTrainedModel | nn.Module, point: PathPoint, *, base_rows: Mapping[str, int] | None = None
) -> MadePoint:
    """Move a final model to a point of its path, in place.

    Args:
        base_rows (`Mapping[str, int]`, *optional*): From [`load_model_and_base_rows`].

    Raises:
        FileNotFoundError: If the base does not exist.
        ValueError: If the base does not fit this model.
    """
    if point.base == ADAPTER:
        originals = {
            name: value
            for name, value in model.state_dict().items()
            if ".original_module." in name and (base_rows or {}).get(_own_name(name)) is None
        }
        found = (
            {"base_sha256": hash_tensors(originals)} if originals else {}
        )  # the rest of the base model is part of the final hash
        report = scale_adapter(model, point.alpha, base_rows=base_rows)
        return MadePoint({"alpha": point.alpha, "base": ADAPTER, **found, **report.identity()}, report)
    check_unquantized(model)  # before a base is loaded
    tensors = load_base(model, point.base, point.revision)
    report = move_to_point(model, tensors, point.alpha)
    if report.cosine < LEAST_COSINE:
        logger.warning(
            "The weights of %s have a cosine of %.2f with those of the base %s, which is typical of unrelated models. Is it the checkpoint that "
            "training began from? Points between unrelated models mean nothing.",
            type(model).__name__,
            report.cosine,
            point.base,
        )
    return MadePoint({"alpha": point.alpha, "base_sha256": hash_tensors(tensors), **report.identity()}, report)


def _own_name(name: str) -> str:
    return name.replace(".original_module.", ".").removeprefix("base_model.model.")


@uncollected()
def load_base(model: PreTrainedModel | nn.Module, base: str, revision: str | None = None) -> dict[str, Tensor]:
    """Return the weights of a base by the final model's names, without weights that the base lacks.

    The base is loaded with the class and configuration of the final model. It may lack the head, norms and embeddings, and may have another
    vocabulary.

    Raises:
        FileNotFoundError: If the base does not exist.
        ValueError: If it has another architecture or size.
    """
    try:
        listing = look_up(base, revision)
        check_files(base, listing, revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The base of the path is not there: {error}") from error
    with reached(listing):
        if not hasattr(model, "base_model_prefix"):
            return _load_plain(model, base, listing, listing.commit or revision)
        loaded, info = _load_as(model, base, listing, listing.commit or revision)
    lacking = _check_fit(model, info, base, listing.commit or revision)
    return {name: value for name, value in loaded.state_dict().items() if name not in lacking}


def _load_as(model: Any, base: str, listing: Listing, revision: str | None) -> tuple[Any, dict[str, Any]]:
    """Load a base into the final model's class, with its own number of tokens, and adapt prefixes of its names."""
    config = copy.deepcopy(model.config)
    config.dtype = None  # the base's own
    options: dict[str, Any] = {"config": config}
    loaded, info = load_with_report(type(model), base, listing, revision, **options)
    missing = {name for name in info["missing_keys"] if not _may_lack(model, name)}
    if missing and (change := common_change(missing, set(info["unexpected_keys"]))) is not None:
        options["key_mapping"] = as_pattern(*change[:2], info["unexpected_keys"])
        loaded, info = load_with_report(type(model), base, listing, revision, **options)
    tokens = _tokens_there(model, info)
    if tokens is not None:
        text = config.get_text_config()
        text.vocab_size = tokens
        if (text.pad_token_id or 0) >= tokens:
            text.pad_token_id = None
        loaded, info = load_with_report(type(model), base, listing, revision, **options)
    return loaded, info


def _tokens_there(model: Any, info: dict[str, Any]) -> int | None:
    """Return the number of tokens of a base if it differs from the final model's; None if it is equal or unknown."""
    try:
        weight = model.get_input_embeddings().weight
    except (NotImplementedError, AttributeError):  # models of images, and others without tokens
        return None
    name = next((name for name, parameter in model.named_parameters() if parameter is weight), None)
    there = next((there for key, there, _ in info["mismatched_keys"] if key == name), None)
    if there is None or len(there) != 2 or there[1] != weight.shape[1]:
        return None
    return int(there[0]) if getattr(model.config.get_text_config(), "vocab_size", None) == len(weight) else None


def _check_fit(model: Any, info: dict[str, Any], base: str, revision: str | None) -> set[str]:
    """Check that a base differs from the final model only in allowed parts, and return the names that it lacks.

    Raises:
        ValueError: Naming the other differences.
    """
    kind = type(model).__name__
    mismatched = {name: (tuple(there), tuple(here)) for name, there, here in info["mismatched_keys"]}
    if others := sorted(name for name in mismatched if not _is_of_head(model, name)):
        shapes = "; ".join(f"{name} is {mismatched[name][0]} there and {mismatched[name][1]} here" for name in others[:_SHOWN])
        raise ValueError(f"The base {base} is of another size than the final {kind} ({len(others)} weights): {shapes}. {_GIVE}")
    missing = set(info["missing_keys"])
    if others := sorted(name for name in missing if not _may_lack(model, name)):
        held = sorted(info["unexpected_keys"])
        raise ValueError(
            f"The base {base} lacks {len(others)} weights of the final {kind} outside its head, such as {', '.join(others[:_SHOWN])}"
            f"{f', and holds {len(held)} others, such as {held[0]}' if held else ''}: it is of another architecture. {_GIVE}"
        )
    if others := sorted(name for name in info["unexpected_keys"] if _is_one_more(model, name)):
        raise ValueError(
            f"The base {base} has {len(others)} weights more than the final {kind} where both have the same modules, such as "
            f"{', '.join(others[:_SHOWN])}: it has other layers. {_GIVE}"
        )
    output = _output_name(model)
    if output in missing and _is_tied(base, revision):
        raise ValueError(
            f"The base {base} shares its embedding with its output layer, and the final {kind} has a separate output layer ({output}), so "
            f"there is no line between the two. {_GIVE}"
        )
    return missing | set(mismatched)


_GIVE = "Give the checkpoint that the final model was trained from."


def _is_of_head(model: Any, name: str) -> bool:
    """Return whether a weight is outside the body that classes of one architecture share. Without such a body, the head is the last module."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix):
        return not name.startswith(f"{prefix}.")
    children = [child for child, module in model.named_children() if any(True for _ in module.parameters())]
    return len(children) > 1 and name.startswith(f"{children[-1]}.")


def _may_lack(model: Any, name: str) -> bool:
    """Return whether a base may lack a weight: that of a head, a pooler, a norm or an embedding."""
    if _is_of_head(model, name) or ".pooler." in f".{name}":
        return True
    try:
        owner = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return False
    return isinstance(owner, nn.Embedding) or "norm" in type(owner).__name__.lower()


def _is_one_more(model: Any, name: str) -> bool:
    """Return whether a weight that only the base has belongs to an additional layer, or to a module that both have."""
    for root in (model, getattr(model, "base_model", model)):
        parts = name.split(".")
        depth = next((i for i in range(len(parts)) if not _has(root, parts[: i + 1])), None)
        if depth is None or depth == 0:
            continue
        return parts[depth].isdigit() or (depth == len(parts) - 1 and parts[depth] in ("weight", "bias"))
    return False


def _has(model: Any, parts: list[str]) -> bool:
    for part in parts:
        if not hasattr(model, part):
            return False
        model = getattr(model, part)
    return True


def _output_name(model: Any) -> str | None:
    get = getattr(model, "get_output_embeddings", None)
    weight = getattr(get() if callable(get) else None, "weight", None)
    return None if weight is None else next((name for name, value in model.named_parameters() if value is weight), None)


def _is_tied(base: str, revision: str | None) -> bool:
    from transformers import AutoConfig

    return bool(getattr(AutoConfig.from_pretrained(base, revision=revision), "tie_word_embeddings", False))


def _load_plain(model: nn.Module, base: str, listing: Listing, revision: str | None) -> dict[str, Tensor]:
    """Return the weights in a folder by the names of a plain module. Tied weights appear under each of their names."""
    weights = read_weights(base, listing, revision)
    other = copy.deepcopy(model).cpu()
    state = other.state_dict()
    fitting = {name: value for name, value in weights.items() if name in state and state[name].shape == value.shape}
    other.load_state_dict(fitting, strict=False)
    places = {state[name].data_ptr() for name in fitting}
    return {name: value for name, value in other.state_dict().items() if value.data_ptr() in places}
