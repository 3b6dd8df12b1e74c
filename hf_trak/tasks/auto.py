"""`AutoTask`: the task of a model, from its architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_trak.config import TrakConfig
from hf_trak.tasks.annotation_inputs import SpanInputs, TokenLabelInputs
from hf_trak.tasks.architectures import kind_of
from hf_trak.tasks.base import Task
from hf_trak.tasks.choices import ChoiceInputs
from hf_trak.tasks.contrastive import DUAL_ENCODERS, REFUSED_ENCODERS, contrastive_task, is_dual_encoder
from hf_trak.tasks.inputs import ImageInputs, Inputs, TextInputs
from hf_trak.tasks.labels import labels_of_model
from hf_trak.tasks.language_inputs import CausalInputs, MaskedInputs, Seq2SeqInputs
from hf_trak.tasks.media_inputs import AudioTextInputs, MediaInputs
from hf_trak.tasks.outputs import classification_margin, regression_prediction, sum_of_log_odds
from hf_trak.tasks.segmentation import SegmentationInputs, SegmentationOutput
from hf_trak.tasks.sound import SoundInputs
from hf_trak.tasks.token_inputs import TokenInputs
from hf_trak.tasks.token_outputs import SpanOutput, TokenOutput
from hf_trak.tasks.transcripts import CtcOutput, TranscriptInputs
from hf_trak.tasks.video import VideoInputs
from hf_trak.tasks.virtual_tokens import with_virtual_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _text(model: PreTrainedModel, config: TrakConfig) -> TextInputs:
    return TextInputs.for_model(model, config.text_columns, config.max_length)


def _image(model: PreTrainedModel, config: TrakConfig) -> ImageInputs:
    return ImageInputs.for_model(model, config.image_column)


def _sound(model: PreTrainedModel, config: TrakConfig) -> SoundInputs:
    return SoundInputs.for_model(model, config)


def _video(model: PreTrainedModel, config: TrakConfig) -> ImageInputs:
    return VideoInputs.for_model(model, config.image_column)


def _classification(name: str, inputs: Callable[..., Inputs]) -> Callable[..., Task]:
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


def _multi_label(name: str, inputs: Callable[..., Inputs]) -> Callable[..., Task]:
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


def _regression(name: str, inputs: Callable[..., Inputs]) -> Callable[..., Task]:
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


def _labelled(name: str, inputs: Callable[..., Inputs], output: Callable[..., Any], kind: str) -> Callable[..., Task]:
    """Return the maker of a task whose inputs read the labels themselves."""

    def make(model: PreTrainedModel, config: TrakConfig) -> Task:
        return Task(name, inputs(model, config), output, needs_labels=False, out_to_loss_kind=kind)

    return make


def _ctc(model: PreTrainedModel, config: TrakConfig) -> Task:
    output = CtcOutput(model.config.pad_token_id)
    return Task("ctc", TranscriptInputs.for_ctc(model, config), output, needs_labels=False, out_to_loss_kind="one_minus_p")


def _image_text(model: PreTrainedModel, config: TrakConfig) -> Task:
    """Return the task of a decoder that reads images among its tokens, or of a decoder with an encoder of images."""
    if not model.config.is_encoder_decoder and not type(model).__name__.endswith("EncoderDecoderModel"):
        return _tokens("image-text-to-text", MediaInputs, TokenOutput, shifted=True, decodes=True)(model, config)
    return _media_to_text("image-text-to-text", config, TranscriptInputs.for_decoder(model, config))


def _speech(model: PreTrainedModel, config: TrakConfig) -> Task:
    return _media_to_text("speech-to-text", config, TranscriptInputs.for_decoder(model, config))


def _media_to_text(name: str, config: TrakConfig, inputs: Inputs) -> Task:
    exact = config.token_out_to_loss == "exact"
    function = TokenOutput(config.reduction, exact=exact, decodes=True)
    return Task(name, inputs, function, needs_labels=False, out_to_loss_kind="one" if exact else "mean_one_minus_p")


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
    "audio-classification": _classification("audio-classification", _sound),
    "audio-multi-label": _multi_label("audio-multi-label", _sound),
    "audio-regression": _regression("audio-regression", _sound),
    "video-classification": _classification("video-classification", _video),
    "video-multi-label": _multi_label("video-multi-label", _video),
    "video-regression": _regression("video-regression", _video),
    "multiple-choice": _labelled("multiple-choice", ChoiceInputs.for_model, classification_margin, "one_minus_p"),
    "next-sentence-prediction": _classification("next-sentence-prediction", _text),
    "ctc": _ctc,
    "speech-to-text": _speech,
    "image-text-to-text": _image_text,
    "audio-text-to-text": _tokens("audio-text-to-text", AudioTextInputs, TokenOutput, shifted=True, decodes=True),
    "semantic-segmentation": _labelled(
        "semantic-segmentation", SegmentationInputs.for_model, SegmentationOutput(), "mean_one_minus_p"
    ),
    "contrastive": contrastive_task,
}


_CLASSIFIES = ("text", "image", "audio", "video")
_LANGUAGE_MODELS = (
    "causal-lm", "masked-lm", "seq2seq", "question-answering", "token-classification", "image-text-to-text", "audio-text-to-text",
)  # fmt: skip


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
        if architecture in REFUSED_ENCODERS:
            raise ValueError(
                f"No task serves {architecture}: {REFUSED_ENCODERS[architecture]}. Make a task with `Task.custom` and pass it as `task`."
            )
        kind = kind_of(model)
        if kind is None:
            raise ValueError(
                f"No task serves {architecture} yet. Served are transformers' classes for {', '.join(TASKS)} (of the last, "
                f"{', '.join(DUAL_ENCODERS)}), and classes whose name ends as theirs and whose `forward` takes the same; for any other model "
                "output, make a task with `Task.custom` and pass it as `task`."
            )
        modality = kind.removesuffix("-classification")
        if modality not in _CLASSIFIES:
            return kind
        problem = getattr(model.config, "problem_type", None)
        if problem == "multi_label_classification":
            return f"{modality}-multi-label"
        if problem == "regression" and model.config.num_labels > 1:
            raise ValueError(
                f"{architecture} is configured for a regression on {model.config.num_labels} numbers per example, which no "
                "task serves; make a task that picks one with `Task.custom`."
            )
        return f"{modality}-regression" if model.config.num_labels == 1 else f"{modality}-classification"


def is_language_model(model: PreTrainedModel) -> bool:
    """Whether a model's labels are tokens, or lie on tokens."""
    model = _without_adapter(model)
    try:
        return not is_dual_encoder(model) and kind_of(model) in _LANGUAGE_MODELS
    except ValueError:
        return False


def _without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model that a PEFT adapter was added to; any other as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
