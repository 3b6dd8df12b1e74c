"""Prompts that PEFT learned: virtual tokens in front of a row's own, of which the model gives logits too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_trak.tasks.base import Task
from hf_trak.tasks.token_outputs import TokenOutput

_AS_KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")  # these have no logits


def with_virtual_tokens(task: Task, model: Any) -> Task:
    """Return the task of a model with its learned prompt: rows are cut so that both fit, and the prompt's own logits are not scored.

    Raises:
        ValueError: If the task is question answering: PEFT does not move the answer's position behind the prompt.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or not getattr(config, "is_prompt_learning", False):
        return task
    n_tokens = int(config.num_virtual_tokens)
    inputs: Any = task.inputs
    limit = getattr(inputs, "positions", None)
    if limit is not None:
        if limit <= n_tokens:
            raise ValueError(
                f"The model has {limit} positions, which its {n_tokens} virtual tokens ({_name(config)}) fill: no row fits behind them."
            )
        inputs = replace(inputs, positions=limit - n_tokens)
    if _name(config) in _AS_KEYS_AND_VALUES:
        return replace(task, inputs=inputs)
    if task.name == "question-answering":
        raise ValueError(
            f"Question answering with a learned prompt ({_name(config)}) is not served: PEFT puts {n_tokens} virtual tokens in front of a row "
            "and leaves the answer's position where it was. State the positions that you trained on with `Task.custom`."
        )
    function = task.output_function
    # An encoder's prompt has no logits: those are of the decoder.
    if isinstance(function, TokenOutput) and task.name != "seq2seq":
        function = replace(function, n_virtual_tokens=n_tokens)
    return replace(task, inputs=inputs, output_function=function)


def _name(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))
