"""`AutoTask`: the task of a model, from its architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hf_trak.config import TrakConfig
from hf_trak.tasks.annotation_inputs import SpanInputs, TokenLabelInputs
from hf_trak.tasks.base import Task
from hf_trak.tasks.contrastive import DUAL_ENCODERS, contrastive_task, is_dual_encoder
from hf_trak.tasks.inputs import ImageInputs, TextInputs
from hf_trak.tasks.labels import labels_of_model
from hf_trak.tasks.language_inputs import CausalInputs, MaskedInputs, Seq2SeqInputs
from hf_trak.tasks.outputs import classification_margin, regression_prediction, sum_of_log_odds
from hf_trak.tasks.token_inputs import TokenInputs
from hf_trak.tasks.token_outputs import SpanOutput, TokenOutput
from hf_trak.tasks.virtual_tokens import with_virtual_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _text(model: PreTrainedModel, config: TrakConfig) -> TextInputs:
    return TextInputs.for_model(model, config.text_columns, config.max_length)


def _image(model: PreTrainedModel, config: TrakConfig) -> ImageInputs:
    return ImageInputs.for_model(model, config.image_column)


def _classification(name: str, inputs: Callable[..., TextInputs | ImageInputs]) -> Callable[..., Task]:
    def make(model: PreTrainedModel, config: TrakConfig) -> Task:
        return Task(
            name,
            inputs(model, config),
            classification_margin,
            model.config.num_labels,
            config.label_column,
            out_to_loss_kind="one_minus_p",
            label2id=labels_of_model(model),
            label_mapping=config.label_mapping,
        )

    return make


def _multi_label(name: str, inputs: Callable[..., TextInputs | ImageInputs]) -> Callable[..., Task]:
    def make(model: PreTrainedModel, config: TrakConfig) -> Task:
        return Task(
            name,
            inputs(model, config),
            sum_of_log_odds,
            model.config.num_labels,
            config.label_column,
            out_to_loss_kind="mean_one_minus_p",
            several_labels=True,
        )

    return make


def _regression(name: str, inputs: Callable[..., TextInputs | ImageInputs]) -> Callable[..., Task]:
    def make(model: PreTrainedModel, config: TrakConfig) -> Task:
        return Task(name, inputs(model, config), regression_prediction, None, config.label_column, out_to_loss_kind="residual")

    return make


def _tokens(
    name: str, inputs: type[TokenInputs], output: type[TokenOutput | SpanOutput], **options: bool
) -> Callable[..., Task]:
    def make(model: PreTrainedModel, config: TrakConfig) -> Task:
        function = output(config.reduction, exact=config.token_out_to_loss == "exact", **options)
        kind = "one" if config.token_out_to_loss == "exact" else "mean_one_minus_p"
        return Task(name, inputs.for_model(model, config), function, needs_labels=False, out_to_loss_kind=kind)

    return make


TASKS: dict[str, Callable[[PreTrainedModel, TrakConfig], Task]] = {
    "text-classification": _classification("text-classification", _text),
    "text-multi-label": _multi_label("text-multi-label", _text),
    "text-regression": _regression("text-regression", _text),
    "image-classification": _classification("image-classification", _image),
    "image-multi-label": _multi_label("image-multi-label", _image),
    "image-regression": _regression("image-regression", _image),
    "causal-lm": _tokens("causal-lm", CausalInputs, TokenOutput, shifted=True, decodes=True),
    "masked-lm": _tokens("masked-lm", MaskedInputs, TokenOutput),
    "seq2seq": _tokens("seq2seq", Seq2SeqInputs, TokenOutput, decodes=True),
    "question-answering": _tokens("question-answering", SpanInputs, SpanOutput),
    "token-classification": _tokens("token-classification", TokenLabelInputs, TokenOutput),
    "contrastive": contrastive_task,
}


# By the end of a class's name, the first that fits. The language models of XLM, Flaubert and XLNet do not shift their labels.
_LANGUAGE_MODELS = {
    "WithLMHeadModel": "masked-lm",
    "XLNetLMHeadModel": "masked-lm",
    "MarianMTModel": "seq2seq",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForConditionalGeneration": "seq2seq",
    "ForQuestionAnswering": "question-answering",
    "ForTokenClassification": "token-classification",
}


class AutoTask:
    """Picks a task as `AutoModel` picks a class."""

    @staticmethod
    def from_model(model: PreTrainedModel, config: TrakConfig | None = None) -> Task:
        """Return the task named in `config`, or the one the model's architecture and labels imply.

        Raises:
            ValueError: If the task is unknown, the architecture is not served, or the two do not fit.
        """
        config = config or TrakConfig()
        adapted, model = model, _without_adapter(model)
        name = config.task
        if name == "auto":
            name = AutoTask.name_for(model)
        elif name not in TASKS:
            raise ValueError(
                f"Unknown task {name!r}; choose one of {', '.join(TASKS)}, or auto. For another model output, make one with "
                "`Task.custom` and pass it as `task`."
            )
        elif name != (expected := AutoTask.name_for(model)):
            raise ValueError(f"{type(model).__name__} with {model.config.num_labels} labels serves {expected}, not {name}.")
        return with_virtual_tokens(TASKS[name](model, config), adapted)

    @staticmethod
    def name_for(model: PreTrainedModel) -> str:
        """Return the name of the task that a model's class and number of labels imply."""
        model = _without_adapter(model)
        architecture = type(model).__name__
        if is_dual_encoder(model):
            return "contrastive"
        modality = {"ForSequenceClassification": "text", "ForImageClassification": "image"}
        for suffix, kind in modality.items():
            if architecture.endswith(suffix):
                problem = getattr(model.config, "problem_type", None)
                if problem == "multi_label_classification":
                    return f"{kind}-multi-label"
                if problem == "regression" and model.config.num_labels > 1:
                    raise ValueError(
                        f"{architecture} is configured for a regression on {model.config.num_labels} numbers per example, which no "
                        "task serves; make a task that picks one with `Task.custom`."
                    )
                return f"{kind}-regression" if model.config.num_labels == 1 else f"{kind}-classification"
        if (language := _language_task(model)) is not None:
            return language
        served = ", ".join("*" + suffix for suffix in (*modality, *_LANGUAGE_MODELS))
        raise ValueError(
            f"No task serves {architecture} yet. Served are transformers' {served} classes and the dual encoders {', '.join(DUAL_ENCODERS)}; "
            "for any other model output, make a task with `Task.custom` and pass it as `task`."
        )


def is_language_model(model: PreTrainedModel) -> bool:
    """Whether a model's labels are tokens, or lie on tokens."""
    return _language_task(_without_adapter(model)) is not None


def _language_task(model: PreTrainedModel) -> str | None:
    for suffix, name in _LANGUAGE_MODELS.items():
        if type(model).__name__.endswith(suffix) and _reads_text(model, generates=name == "seq2seq"):
            return name
    return None


def _without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model that a PEFT adapter was added to; any other as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _reads_text(model: PreTrainedModel, *, generates: bool) -> bool:
    """Whether a model's input is text alone; one that generates from it must also have an encoder and a decoder."""
    return model.main_input_name == "input_ids" and (not generates or bool(model.config.is_encoder_decoder))
