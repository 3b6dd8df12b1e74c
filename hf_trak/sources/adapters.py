"""PEFT adapters as checkpoints: the adapter on its base model, with only the adapter's parameters trainable."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from hf_trak.sources.repositories import Listing, look_up, reached
from hf_trak.sources.weights import check_weights, load_with_report

logger = logging.getLogger(__name__)

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_LABELLED = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}
_YOURSELF = "Load the model yourself and pass it as `model`"


def read_adapter_config(source: str, revision: str | None = None) -> dict[str, Any]:
    """Return the configuration of an adapter.

    Raises:
        ValueError: If the file is damaged.
    """
    from transformers.utils import cached_file

    path = cached_file(source, _CONFIG, revision=revision)
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_CONFIG} of {source} is damaged: {error}. Save the adapter again.") from error
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str) or not isinstance(base, (str, type(None))):
        raise ValueError(
            f"{_CONFIG} of {source} is damaged: it has no text in peft_type and base_model_name_or_path. Save the adapter again."
        )
    return values


def base_of(source: str, revision: str | None = None) -> tuple[str | None, str | None]:
    """Return the base model of an adapter and its revision; None for an adapter of a model in memory.

    A relative path is relative to the working directory, or else to the adapter's folder.
    """
    values = read_adapter_config(source, revision)
    base = values.get("base_model_name_or_path") or None
    if base is not None and not Path(base).exists() and (Path(source) / base).is_dir():
        base = str(Path(source) / base)
    return base, values.get("revision")


def load_adapter(
    source: str, listing: Listing, revision: str | None = None, *, trust_remote_code: bool = False
) -> tuple[Any, dict[str, int]]:
    """Load an adapter onto the base model that it names. Return the model, and for each replaced parameter the number of rows that come
    from the base model.

    The class and the number of labels come from the `config.json` in the adapter's folder, which snapshots of an `AttributionTrainer`
    have. PEFT, TRL and the Trainer write no such file. Then they come from the adapter's task type and its saved head, or from the base
    model's configuration.

    Raises:
        ImportError: If peft is not installed.
        FileNotFoundError: If the base model does not exist.
        ValueError: If the class or the number of labels is unknown, or weights do not fit.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(f"{source} is a PEFT adapter; install peft to load it.") from error
    # peft would load a pickle instead.
    if _WEIGHTS not in listing.files:
        raise ValueError(f"{source} holds no {_WEIGHTS}: weights are loaded from safetensors only. Save the adapter again.")
    values = read_adapter_config(source, revision)
    shapes = _shapes(source, revision)
    base, base_revision = base_of(source, revision)
    if base is None:
        raise ValueError(
            f"{source} is an adapter of a model in memory: it names no base model. Set base_model_name_or_path in its {_CONFIG}, or: {_YOURSELF[0].lower()}{_YOURSELF[1:]}."
        )
    try:
        base_listing = look_up(base, base_revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The base model of the adapter {source} does not exist: {error} Correct base_model_name_or_path in its {_CONFIG}."
        ) from error
    base_revision = base_listing.commit or base_revision
    kind, options = _class_of(
        source, listing, revision, values, shapes, base, base_revision, trust_remote_code=trust_remote_code
    )
    with reached(base_listing):
        model, info = load_with_report(kind, base, base_listing, base_revision, **options)
    own = set(shapes)
    check_weights(model, info, base, elsewhere=[name for name in info["missing_keys"] if name in own] + _replaced(info, own))
    base_rows = {**_resize(model, shapes), **dict.fromkeys([*info["missing_keys"], *_replaced(info, own)], 0)}
    try:
        config = PeftConfig.from_pretrained(source, revision=revision)
        # PEFT does not make loaded prompts trainable; `_train_prompt` does.
        trainable = not config.is_prompt_learning
        loaded = PeftModel.from_pretrained(model, source, revision=revision, is_trainable=trainable, config=config)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ValueError(
            f"The adapter {source}, of peft_type {values['peft_type']!r}, cannot be loaded onto {type(model).__name__} of {base}: {reason} "
            f"({type(error).__name__}). Check that {_WEIGHTS} and {_CONFIG} are complete, the base model in base_model_name_or_path, and that "
            "this version of peft has that type."
        ) from error
    _check_adapter(loaded, source, own)
    if config.is_prompt_learning:
        _train_prompt(loaded, source, values)
    return loaded, base_rows


def _train_prompt(model: Any, source: str, values: dict[str, Any]) -> None:
    """Make a loaded prompt and the heads that were trained with it trainable.

    PEFT saves the virtual tokens of a prompt, and not the network that computed them during training.

    Raises:
        ValueError: If the model would not use the prompt.
    """
    kind = str(values["peft_type"])
    if type(model).__name__ in ("PeftModel", "PeftMixedModel"):
        raise ValueError(
            f"{source} is a prompt or prefix ({kind}) without a task_type, which PEFT loads but does not use. Set task_type in its {_CONFIG} (one "
            f"of {', '.join(_HEADS)})."
        )
    prompt = model.prompt_encoder[model.active_adapter]
    trainable = {id(prompt.embedding.weight)} if hasattr(prompt, "embedding") else {id(one) for one in prompt.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in trainable or f".modules_to_save.{model.active_adapter}." in name)
    if values.get("prefix_projection") or kind == "P_TUNING":
        logger.warning(
            "%s holds the virtual tokens that %s learned, and not the network that made them in training: gradients are of the virtual tokens.",
            source,
            kind,
        )


def _shapes(source: str, revision: str | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's weights, by their names in the base model if they have one.

    Raises:
        ValueError: If the file is damaged.
    """
    from safetensors import SafetensorError, safe_open
    from transformers.utils import cached_file

    path = cached_file(source, _WEIGHTS, revision=revision)
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {_own_name(name): tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Save or download the adapter again.") from error


def _own_name(name: str) -> str:
    """Return the base model's name of a weight. Prompts are not part of the base model and keep their names."""
    return re.sub(r"^base_model\.(model\.)?", "", name)


def _replaced(info: dict[str, Any], own: set[str]) -> list[str]:
    return [name for name, *_ in info["mismatched_keys"] if name in own]


def _class_of(
    source: str,
    listing: Listing,
    revision: str | None,
    values: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    base: str,
    base_revision: str | None,
    *,
    trust_remote_code: bool,
) -> tuple[type, dict[str, Any]]:
    """Return the class of the base model, and arguments for its `from_pretrained`."""
    import transformers

    def configuration(place: str, commit: str | None) -> Any:
        try:
            return transformers.AutoConfig.from_pretrained(place, revision=commit, trust_remote_code=trust_remote_code)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"config.json of {place}, needed for the adapter {source}, cannot be read: {reason}.") from error

    if "config.json" in listing.files:
        config = configuration(source, revision)
        name = (config.architectures or ["no class"])[0]
        if not hasattr(transformers, name):
            raise ValueError(f"{source} is an adapter of {name} on {base}, which transformers does not have. {_YOURSELF}.")
        return getattr(transformers, name), {"config": config}
    config = configuration(base, base_revision)
    task, mapped = values.get("task_type"), (values.get("auto_mapping") or {}).get("base_model_class")
    if task is None and (name := mapped or (config.architectures or [None])[0]):
        if not hasattr(transformers, name):
            raise ValueError(f"{source} is an adapter of {name} on {base}, which transformers does not have. {_YOURSELF}.")
        kind = getattr(transformers, name)
        labelled = next((part for part in _LABELLED.values() if name.endswith(f"For{part}")), None)
    elif task in _HEADS:
        kind, labelled = getattr(transformers, _HEADS[task]), _LABELLED.get(task)
    else:
        raise ValueError(
            f"{source} is an adapter that does not say what model class it was added to: its task_type is {task!r}, its base {base} names no "
            f"class, and it holds no config.json. Set task_type in its {_CONFIG} (one of {', '.join(_HEADS)}), or save the trained "
            f"model's config.json there. Or: {_YOURSELF[0].lower()}{_YOURSELF[1:]}."
        )
    if labelled is not None:
        config.num_labels = _n_labels(source, shapes, base, config, labelled)
    return kind, {"config": config}


def _n_labels(source: str, shapes: dict[str, tuple[int, ...]], base: str, config: Any, labelled: str) -> int:
    """Return the number of labels of the adapter's own head, else of the base model's head.

    Raises:
        ValueError: If neither has a head.
    """
    heads = {
        name: shape[0]
        for name, shape in shapes.items()
        if name.endswith("weight")
        and "lora_" not in name
        and name.split(".")[0] in ("score", "classifier", "classification_head")
    }
    # If a head has several layers, the last one has the labels.
    outermost = [size for name, size in heads.items() if not name.endswith("dense.weight")]
    if outermost:
        return outermost[-1]
    if any(str(name).endswith(f"For{labelled}") for name in config.architectures or []):
        return int(config.num_labels)
    raise ValueError(
        f"{source} is an adapter without a trained head (no score, classifier or classification_head among its weights), and its base model "
        f"{base} has none: the number of labels cannot be known, and a new head would be random. Train the head as well "
        '(modules_to_save=["classifier"], or task_type in the PEFT configuration), and save the adapter again.'
    )


def _resize(model: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Resize the base model to the number of tokens of the adapter's own embedding. Return the original number of rows of each resized
    parameter."""
    rows = [
        shape[0]
        for name, shape in shapes.items()
        if name.endswith(("embed_tokens.weight", "word_embeddings.weight", "wte.weight"))
    ]
    before = model.get_input_embeddings().num_embeddings if rows else 0
    if not rows or rows[0] == before:
        return {}
    model.resize_token_embeddings(rows[0])
    return {name: min(before, rows[0]) for name, value in model.named_parameters() if value.ndim and len(value) == rows[0]}


def _check_adapter(model: Any, source: str, own: set[str]) -> None:
    """Check that every weight of the adapter was in its file.

    Raises:
        ValueError: Naming missing weights, or weights that do not belong to the model.
    """
    from peft import get_peft_model_state_dict

    needed = {_own_name(name) for name in get_peft_model_state_dict(model, save_embedding_layers=False)}
    if missing := sorted(needed - own):
        raise ValueError(
            f"{_WEIGHTS} of {source} lacks {len(missing)} weights that its {_CONFIG} asks for, which would be random: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Save the adapter again."
        )
    left = sorted(name for name in own - needed if "embed" not in name and "wte" not in name and "lm_head" not in name)
    if left:
        raise ValueError(
            f"{_WEIGHTS} of {source} holds {len(left)} weights that have no place in {type(model.get_base_model()).__name__}: "
            f"{', '.join(left[:5])}{', ...' if len(left) > 5 else ''}. Check its base model, {_CONFIG} and the version of peft."
        )
