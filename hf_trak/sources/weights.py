"""Loading the weights of a checkpoint, and comparing their names and shapes with those of the model class."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_trak.sources.repositories import Listing

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


_ENOUGH = 0.9  # share of the missing names
_SAMPLE = 200  # number of names that are tried


def common_change(missing: Set[str], unexpected: Set[str]) -> tuple[str, str, int] | None:
    """Find one change of names that turns names in the file into missing names. Return the part to remove, its replacement and the count.

    Args:
        missing (`set[str]`): Names of the model that the file lacks.
        unexpected (`set[str]`): Names in the file that the model lacks.

    Returns:
        None if no single change explains nine tenths of the missing names.
    """
    ends: dict[str, list[str]] = {}
    for name in missing:  # by their last parts, which a wrapper does not change
        ends.setdefault(_end(name), []).append(name)
    changes: Counter[tuple[str, str]] = Counter()
    for there in sorted(unexpected)[:_SAMPLE]:
        found = {_change(there, here) for here in ends.get(_end(there), ())}
        changes.update(change for change in found if change != ("", ""))
    if not changes:
        return None
    # The most frequent change; if several are equal, the one that removes least.
    (removed, put), _ = min(changes.items(), key=lambda item: (-item[1], len(item[0][0]) + len(item[0][1]), item[0]))
    made = {_apply(name, removed, put) for name in unexpected} & missing
    return (removed, put, len(made)) if len(made) >= max(1, _ENOUGH * len(missing)) else None


def as_pattern(removed: str, put: str, names: Iterable[str]) -> dict[str, str]:
    """Return a change of names from [`common_change`] as a regular expression and replacement, for transformers' `key_mapping`."""
    begins = any(name.startswith(removed) for name in names)
    return {f"{'^' if begins else '(?<=[.])'}{re.escape(removed)}": put}


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _change(there: str, here: str) -> tuple[str, str]:
    """Return the parts of two names between their common prefix and their common suffix."""
    a, b = there.split("."), here.split(".")
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    removed, put = a[start : len(a) - end], b[start : len(b) - end]
    return ".".join([*removed, ""]) if removed else "", ".".join([*put, ""]) if put else ""


def _apply(name: str, removed: str, put: str) -> str:
    if not removed:
        return put + name
    if name.startswith(removed):
        return put + name[len(removed) :]
    return name.replace(f".{removed}", f".{put}", 1)


logger = logging.getLogger(__name__)

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHOWN = 5
_WRAPPERS = {
    "module": "torch.nn.DataParallel or DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "base_model.model": "PEFT",
}


def load_weights(kind: type, source: str, listing: Listing, revision: str | None, **options: Any) -> PreTrainedModel:
    """Load a class of models from safetensors, and refuse weights that do not fit.

    Args:
        kind (`type`): A class with `from_pretrained`.
        options: Arguments for `from_pretrained`.

    Raises:
        FileNotFoundError: If a file of weights is missing, or if the weights are pickled.
        ValueError: If a file is damaged, or if weights are missing, unexpected or of another shape.
    """
    model, info = load_with_report(kind, source, listing, revision, **options)
    if (
        info["missing_keys"]
        and all(name.startswith("pooler.") for name in info["missing_keys"])
        and _can_do_without_pooler(kind)
    ):
        # Sentence encoders are saved without the pooler, which they do not use. Load them without it, so that no random weights are used.
        model, info = load_with_report(kind, source, listing, revision, add_pooling_layer=False, **options)
    check_weights(model, info, source)
    return model


def _can_do_without_pooler(kind: type) -> bool:
    return "add_pooling_layer" in inspect.signature(kind.__init__).parameters  # type: ignore[misc]


def load_with_report(
    kind: type, source: str, listing: Listing, revision: str | None, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model from safetensors, and return it with transformers' report on its weights."""
    from safetensors import SafetensorError

    check_files(source, listing, revision)
    try:
        with _without_table():
            # Weights with another shape are refused later, with a message that has both shapes.
            return kind.from_pretrained(  # type: ignore[attr-defined]
                source,
                revision=revision,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except SafetensorError as error:
        raise ValueError(
            f"{_damaged(source, listing)} is damaged: {_first_line(error)}. Copy or download the checkpoint again."
        ) from error
    except RuntimeError as error:
        raise ValueError(f"The weights of {source} cannot be loaded into {kind.__name__}: {_first_line(error)}.") from error


@contextmanager
def _without_table() -> Iterator[None]:
    """Suppress transformers' table of weights that do not fit. hf_trak raises an error or logs one line instead."""

    def keeps(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)


def check_files(source: str, listing: Listing, revision: str | None = None) -> None:
    """Check that all files of weights exist and are safetensors files.

    Raises:
        FileNotFoundError: Naming the missing file.
        ValueError: If the map of weights is damaged, or names another kind of file.
    """
    if _WEIGHTS in listing.files:
        return
    if _INDEX not in listing.files:
        pickled = sorted(name for name in listing.files if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")))
        found = f"its weights are in {', '.join(pickled)}, which may run code when loaded" if pickled else "it holds no weights"
        raise FileNotFoundError(
            f"{source} holds no {_WEIGHTS}: {found}. Weights are loaded from safetensors only: load the model with transformers and save "
            "it again with `save_pretrained`."
        )
    files = _mapped_files(source, revision)
    if other := sorted(name for name in files if not name.endswith(".safetensors") or "/" in name or "\\" in name):
        raise ValueError(
            f"{_INDEX} of {source} leads to {', '.join(other[:_SHOWN])}: weights are loaded from safetensors files in the same folder only. "
            "Load the model with transformers and save it again with `save_pretrained`."
        )
    if missing := sorted(files - listing.files):
        raise FileNotFoundError(
            f"{source} lacks {', '.join(missing[:_SHOWN])}, {len(missing)} of the {len(files)} files that {_INDEX} lists. Copy or download "
            "the checkpoint again."
        )


def _mapped_files(source: str, revision: str | None) -> set[str]:
    from transformers.utils import cached_file

    path = cached_file(source, _INDEX, revision=revision)
    try:
        files = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values()
        if not files or not all(isinstance(name, str) for name in files):
            raise TypeError("the weight map must hold names of files")
        return set(files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{_INDEX} of {source} is damaged: {_first_line(error)}. Copy or download the checkpoint again."
        ) from error


def read_weights(source: str, listing: Listing, revision: str | None = None) -> dict[str, Tensor]:
    """Return all tensors in a checkpoint's files, by their names in the files.

    Raises:
        ValueError: If a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    names = [_WEIGHTS] if _WEIGHTS in listing.files else sorted(_mapped_files(source, revision))
    try:
        return {key: value for name in names for key, value in load_file(cached_file(source, name, revision=revision)).items()}
    except SafetensorError as error:
        raise ValueError(
            f"{_damaged(source, listing)} is damaged: {_first_line(error)}. Copy or download the checkpoint again."
        ) from error


def _damaged(source: str, listing: Listing) -> str:
    """Return the name of the file of weights that cannot be opened."""
    from safetensors import SafetensorError, safe_open

    folder = Path(source)
    for name in sorted(name for name in listing.files if name.endswith(".safetensors")):
        try:
            with safe_open(folder / name, "pt") as file:
                file.keys()
        except SafetensorError:
            return str(folder / name)
        except OSError:
            break  # of a repository
    return f"A file of weights of {source}"


def check_weights(model: PreTrainedModel, info: dict[str, Any], source: str, *, elsewhere: Collection[str] = ()) -> None:
    """Check that the weights of a checkpoint fit the model.

    Args:
        info (`dict`): From `from_pretrained(output_loading_info=True)`. It omits tied weights, and weights that the class declares as
            ignorable.
        elsewhere (`Collection[str]`): Weights that come from another file, such as an adapter's.

    Raises:
        ValueError: Naming weights that are missing, unexpected or of another shape.
    """
    missing = sorted(set(info["missing_keys"]) - set(elsewhere))
    mismatched = sorted(
        (name, tuple(there), tuple(here)) for name, there, here in info["mismatched_keys"] if name not in elsewhere
    )
    unexpected = sorted(info["unexpected_keys"])
    kind = type(model).__name__
    if mismatched:
        shapes = "; ".join(
            f"{name} is {there} in the file and {here} in the model" for name, there, here in mismatched[:_SHOWN]
        )
        raise ValueError(
            f"Weights of {source} ({len(mismatched)}) have other shapes than {kind} with this config.json: {shapes}{_more(mismatched)}. "
            "They were not loaded. Use the configuration that the model was trained with."
        )
    if missing and unexpected and (why := _renamed(missing, unexpected)):
        raise ValueError(f"The weights of {source} were not loaded into {kind}, whose parameters would be random: {why}")
    if missing:
        raise ValueError(_describe_missing(model, missing, unexpected, source))
    if lost := [name for name in unexpected if not _belongs_to_another_head(model, name)]:
        raise ValueError(
            f"{source} holds weights that {kind} with this config.json does not have ({len(lost)}): {_list(lost)}. The model that was "
            "trained uses them, and this one would not. Use the class and the configuration it was trained with."
        )
    if unexpected:
        logger.warning(
            "%s: the weights of another head are left out, which %s does not have: %s.", source, kind, _list(unexpected)
        )


def check_dtype(model: PreTrainedModel, compute_dtype: str) -> None:
    """Check that a model can compute in a dtype. Autocast to bfloat16 does not work with float16 weights.

    Raises:
        ValueError: If the model's weights are float16.
    """
    import torch

    if compute_dtype == "bfloat16" and any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise ValueError(
            "compute_dtype='bfloat16' computes in bfloat16 from weights in float32 or bfloat16, but this model's are float16, which it "
            "cannot be mixed with. Convert the checkpoint (`model.float().save_pretrained(...)`), or leave compute_dtype at float32 "
            "(--compute_dtype float32)."
        )


def _describe_missing(model: PreTrainedModel, missing: list[str], unexpected: list[str], source: str) -> str:
    kind = type(model).__name__
    base = getattr(model, "base_model_prefix", "")
    own = model.named_parameters() if base and hasattr(model, base) else ()
    heads = {name for name, _ in own if not name.startswith(f"{base}.")}
    others = f" It holds {len(unexpected)} weights that {kind} does not have: {_list(unexpected)}." if unexpected else ""
    rest = [name for name in missing if name not in heads and ".pooler." not in name]
    if heads and heads <= set(missing) and not rest:
        return (
            f"{_list(sorted(missing, key=lambda name: name not in heads))} {'is' if len(missing) == 1 else 'are'} newly initialised: {source} is a base model, without the head of "
            f"{kind}, and the outputs of a random head mean nothing.{others} Fine-tune the model first, and give the fine-tuned checkpoint."
        )
    return (
        f"{source} lacks {len(missing)} weights of {kind}, which would be random: {_list(missing)}.{others} Give a complete checkpoint, or "
        "load the model yourself and pass it as `model` if that is meant."
    )


def _renamed(missing: Iterable[str], unexpected: Collection[str]) -> str | None:
    """Return how the names in a file differ from the model's and how to fix them; None if there is no common change."""

    if (change := common_change(set(missing), set(unexpected))) is None:
        return None
    removed, put, count = change
    wrapper = next((text for part, text in _WRAPPERS.items() if re.search(rf"(^|\.){re.escape(part)}\.", f".{removed}")), None)
    if removed:
        said = f"the names of {count} weights contain `{removed}`" + (f", as {wrapper} writes them" if wrapper else "")
        first = next(name for name in sorted(unexpected) if removed in name)
        mend = (
            f"name.replace({removed!r}, {put!r}, 1)"
            if put or not first.startswith(removed)
            else f"name.removeprefix({removed!r})"
        )
    else:
        said, mend = f"the names of {count} weights lack the prefix `{put}`", f"{put!r} + name"
        first = min(unexpected)
    return (
        f"{said} ({first}). Rename them: "
        f"safetensors.torch.save_file({{{mend}: value for name, value in safetensors.torch.load_file(file).items()}}, file, "
        'metadata={"format": "pt"}).'
    )


def _belongs_to_another_head(model: PreTrainedModel, name: str) -> bool:
    """Return whether a weight belongs to a head of another class of the same model type.

    A model that was pretrained with several heads is often loaded with one of them.
    """
    parts = name.split(".")
    depth = next(i for i in range(len(parts)) if not _has(model, parts[: i + 1]))
    if depth == len(parts) - 1 or parts[depth].isdigit():  # a parameter of an existing module, or an additional layer
        return False
    return name in _weights_of_relatives(model)


def _has(model: Any, parts: list[str]) -> bool:
    for part in parts:
        if not hasattr(model, part):
            return False
        model = getattr(model, part)
    return True


def _weights_of_relatives(model: PreTrainedModel) -> set[str]:
    """Return the weight names of transformers' other classes for this configuration."""
    import importlib

    import torch
    from transformers import PreTrainedModel

    module = importlib.import_module(type(model).__module__)
    names: set[str] = set()
    for kind in vars(module).values():
        if (
            isinstance(kind, type)
            and issubclass(kind, PreTrainedModel)
            and getattr(kind, "config_class", None) is type(model.config)
        ):
            try:
                with torch.device("meta"):
                    names |= set(kind(model.config).state_dict())
            except (
                ValueError,
                TypeError,
                AttributeError,
                NotImplementedError,
            ):  # this class does not accept the configuration
                continue
    return names


def _list(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + _more(names)


def _more(names: Collection[Any]) -> str:
    return f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
