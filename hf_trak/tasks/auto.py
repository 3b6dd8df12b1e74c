"""`AutoTask`: the task of a model, from transformers' auto mappings and the model's class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from hf_trak.config import TrakConfig
from hf_trak.tasks.annotation_inputs import SpanInputs, TokenLabelInputs
from hf_trak.tasks.base import Task
from hf_trak.tasks.choices import ChoiceInputs
from hf_trak.tasks.contrastive import DUAL_ENCODERS, REFUSED_ENCODERS, contrastive_task, is_dual_encoder
from hf_trak.tasks.image_inputs import ImageInputs
from hf_trak.tasks.inputs import Inputs, TextInputs
from hf_trak.tasks.labels import labels_of_model
from hf_trak.tasks.language_inputs import CausalInputs, MaskedInputs, Seq2SeqInputs
from hf_trak.tasks.media_inputs import AudioTextInputs, MediaInputs, VideoInputs
from hf_trak.tasks.outputs import classification_margin, regression_prediction, sum_of_log_odds
from hf_trak.tasks.preferences import preference_task
from hf_trak.tasks.rewards import reward_task
from hf_trak.tasks.segmentation import SegmentationInputs, SegmentationOutput
from hf_trak.tasks.sound import SoundInputs
from hf_trak.tasks.token_inputs import TokenInputs
from hf_trak.tasks.token_outputs import SpanOutput, TokenOutput, with_virtual_tokens
from hf_trak.tasks.transcripts import CtcOutput, TranscriptInputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel


# Mapping of transformers -> kind. Of a class in several, the first counts: XLM's language model is a masked one, BART and MBart generate,
# Gemma 3 reads images.
_KINDS = {
    "AUDIO_CLASSIFICATION": "audio-classification",
    "CTC": "ctc",
    "SPEECH_SEQ_2_SEQ": "speech-to-text",
    "IMAGE_CLASSIFICATION": "image-classification",
    "VIDEO_CLASSIFICATION": "video-classification",
    "SEMANTIC_SEGMENTATION": "semantic-segmentation",
    "MULTIPLE_CHOICE": "multiple-choice",
    "NEXT_SENTENCE_PREDICTION": "next-sentence-prediction",
    "TOKEN_CLASSIFICATION": "token-classification",
    "SEQUENCE_CLASSIFICATION": "text-classification",
    "SEQ_TO_SEQ_CAUSAL_LM": "seq2seq",
    "IMAGE_TEXT_TO_TEXT": "image-text-to-text",
    "MASKED_LM": "masked-lm",
    "CAUSAL_LM": "causal-lm",
    "DOCUMENT_QUESTION_ANSWERING": "question-answering",
    "QUESTION_ANSWERING": "question-answering",
}
# Their labels are the tokens at their own places.
_NOT_SHIFTED = ("XLNetLMHeadModel",)

_MATCHING = "its loss matches predictions with objects over the whole image, and has no output of one example in closed form"
_REFUSED = {
    "VISUAL_QUESTION_ANSWERING": "answers are classes or texts about an image, not spans of a text",
    "TABLE_QUESTION_ANSWERING": "answers are cells and aggregations of a table, not spans of a text",
    "OBJECT_DETECTION": _MATCHING,
    "ZERO_SHOT_OBJECT_DETECTION": _MATCHING,
    "UNIVERSAL_SEGMENTATION": _MATCHING,
    "INSTANCE_SEGMENTATION": _MATCHING,
    "IMAGE_SEGMENTATION": _MATCHING,
    "MASKED_IMAGE_MODELING": "its loss is the error of reconstructed pixels, which are no labels with a probability",
    "AUDIO_XVECTOR": "its loss is a margin between speakers with weights of its own",
    "AUDIO_FRAME_CLASSIFICATION": "its labels are several speakers per frame",
    "TEXT_TO_SPECTROGRAM": "its output is sound",
    "TEXT_TO_WAVEFORM": "its output is sound",
    "DEPTH_ESTIMATION": "its output is a map of numbers",
    "TIME_SERIES_PREDICTION": "its output is a distribution of numbers",
    "MASK_GENERATION": "its output is masks for prompts",
    "PRETRAINING": "it computes several losses at once",
    "RNNT": "its loss is a transducer's",
    "TDT": "its loss is a transducer's",
}
# Classes in mappings of kinds that are served, which are not.
_REFUSED_CLASSES = {
    "PI0ForConditionalGeneration": "its output is actions, not text",
    "DiffusionGemmaForBlockDiffusion": "its loss depends on noise that is drawn anew",
    "Pop2PianoForConditionalGeneration": "its output is music",
    "DiaForConditionalGeneration": "its output is codes of sound on several channels",
    "VibeVoiceForConditionalGeneration": "its output is sound",
    "KyutaiSpeechToTextForConditionalGeneration": "its tokens are codes of sound on several channels",
}
# End of a class's name -> its kind, what `forward` must take one of, and what it must not take.
_SUFFIXES: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("ForAudioClassification", "audio-classification", ("input_values", "input_features"), ("input_ids",)),
    ("ForSequenceClassification", "audio-classification", ("input_values", "input_features"), ("input_ids",)),
    ("ForSequenceClassification", "text-classification", ("input_ids",), ()),
    ("ForImageClassification", "image-classification", ("pixel_values",), ("input_ids",)),
    ("ForTokenClassification", "token-classification", ("input_ids",), ()),
    ("ForMultipleChoice", "multiple-choice", ("input_ids",), ()),
    ("ForQuestionAnswering", "question-answering", ("start_positions",), ("p_mask", "pixel_values", "cls_index")),
    ("ForQuestionAnsweringSimple", "question-answering", ("start_positions",), ("p_mask", "pixel_values", "cls_index")),
    ("ForMaskedLM", "masked-lm", ("input_ids",), ("pixel_values",)),
    ("ForCausalLM", "causal-lm", ("input_ids",), ("pixel_values", "input_features", "input_values")),
    ("LMHeadModel", "causal-lm", ("input_ids",), ("pixel_values", "input_features", "input_values")),
    ("ForConditionalGeneration", "seq2seq", ("input_ids",), ("pixel_values", "input_features", "input_values")),
    ("ForCTC", "ctc", ("input_values", "input_features"), ()),
)


def kind_of(model: PreTrainedModel) -> str | None:
    """Return what a model computes, as the name of a task without regard to its labels; None if nothing says so.

    Raises:
        ValueError: If it is known, and not served, with the reason.
    """
    for base in type(model).__mro__:
        if base.__name__ in _REFUSED_CLASSES:
            raise _refusal(model, _REFUSED_CLASSES[base.__name__])
        if (kind := _kinds().get(base.__name__)) is not None:
            return _by_config(model, kind)
        if (reason := _refusals().get(base.__name__)) is not None:
            raise _refusal(model, reason)
    return _by_name(model)


def _refusal(model: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(
        f"No task serves {type(model).__name__}: {reason}. For an output of its own, make a task with `Task.custom` and pass it as `task`."
    )


def _by_config(model: PreTrainedModel, kind: str) -> str:
    """Return the kind of a class whose mapping holds both encoder-decoders and decoders that read sound among their tokens."""
    if type(model).__name__ in _NOT_SHIFTED:
        return "masked-lm"
    decodes_alone = not getattr(model.config, "is_encoder_decoder", False)
    if kind == "seq2seq" and not decodes_alone and "input_ids" not in inspect.signature(model.forward).parameters:
        return "speech-to-text"
    if kind in ("seq2seq", "speech-to-text") and decodes_alone and not type(model).__name__.endswith("EncoderDecoderModel"):
        # SeamlessM4T and others state it for some of their classes alone.
        takes = inspect.signature(model.forward).parameters
        return kind if "decoder_input_ids" in takes else "audio-text-to-text"
    return kind


def _by_name(model: PreTrainedModel) -> str | None:
    names = [base.__name__ for base in type(model).__mro__]
    takes = inspect.signature(model.forward).parameters
    for name in names:
        for suffix, kind, one_of, none_of in _SUFFIXES:
            if not name.endswith(suffix) or not any(argument in takes for argument in one_of):
                continue
            if any(argument in takes for argument in none_of):
                continue
            encodes = bool(getattr(model.config, "is_encoder_decoder", False))
            if kind in ("causal-lm", "seq2seq") and encodes != (kind == "seq2seq"):
                continue
            return kind
    return None


@cache
def _kinds() -> Mapping[str, str]:
    found: dict[str, str] = {}
    for mapping, kind in _KINDS.items():
        for name in _classes(mapping):
            found.setdefault(name, kind)
    return found


@cache
def _refusals() -> Mapping[str, str]:
    found: dict[str, str] = {}
    for mapping, reason in _REFUSED.items():
        for name in _classes(mapping):
            found.setdefault(name, reason)
    return found


def _classes(mapping: str) -> list[str]:
    from transformers.models.auto import modeling_auto

    values = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).values()
    return [name for value in values for name in ((value,) if isinstance(value, str) else value)]


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
            label2id=labels_of_model(model),
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
        function = output(config.token_reduction, exact=config.token_out_to_loss == "exact", **options)
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
    """Return the task of a decoder that reads images among its tokens, or of a decoder with an encoder of images, or of both (Florence-2)."""
    if not model.config.is_encoder_decoder and not type(model).__name__.endswith("EncoderDecoderModel"):
        return _tokens("image-text-to-text", MediaInputs, TokenOutput, shifted=True, decodes=True)(model, config)
    if model.main_input_name == "input_ids" and "input_ids" in inspect.signature(model.forward).parameters:
        return _tokens("image-text-to-text", Seq2SeqInputs, TokenOutput, decodes=True)(model, config)
    return _media_to_text("image-text-to-text", config, TranscriptInputs.for_decoder(model, config))


def _speech(model: PreTrainedModel, config: TrakConfig) -> Task:
    return _media_to_text("speech-to-text", config, TranscriptInputs.for_decoder(model, config))


def _media_to_text(name: str, config: TrakConfig, inputs: Inputs) -> Task:
    exact = config.token_out_to_loss == "exact"
    function = TokenOutput(config.token_reduction, exact=exact, decodes=True)
    return Task(name, inputs, function, needs_labels=False, out_to_loss_kind="one" if exact else "mean_one_minus_p")


def _preference(model: PreTrainedModel, config: TrakConfig) -> Task:
    """Return the task of a language model's preferences, or of a reward model's."""
    return (reward_task if AutoTask.name_for(model) == "text-regression" else preference_task)(model, config)


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
    "preference": _preference,
}


# Tasks that no model implies: they are asked for by their name, of a model that implies one of the others.
ASKED_FOR = {"preference": ("causal-lm", "text-regression")}
_CLASSIFIES = ("text", "image", "audio", "video")
_LANGUAGE_MODELS = (
    "causal-lm", "masked-lm", "seq2seq", "question-answering", "token-classification", "image-text-to-text", "audio-text-to-text",
)  # fmt: skip


class AutoTask:
    """Picks a task as `AutoModel` picks a class.

    ```python
    >>> AutoTask.from_model(model).name
    'text-classification'
    ```
    """

    @staticmethod
    def from_model(model: PreTrainedModel, config: TrakConfig | None = None) -> Task:
        """Return the task named in `config`, or the one the model's architecture and labels imply.

        ```python
        >>> AutoTask.from_model(model, TrakConfig(max_length=16)).name
        'text-classification'
        ```

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
        elif (expected := AutoTask.name_for(model)) not in ASKED_FOR.get(name, (name,)):
            raise ValueError(f"{type(model).__name__} with {model.config.num_labels} labels serves {expected}, not {name}.")
        return with_virtual_tokens(TASKS[name](model, config), adapted)

    @staticmethod
    def name_for(model: PreTrainedModel) -> str:
        """Return the name of the task that a model's class and number of labels imply.

        ```python
        >>> AutoTask.name_for(model)
        'text-classification'
        ```
        """
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
