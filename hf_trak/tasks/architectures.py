"""What a model's class computes: from the auto mappings of transformers, or, for other classes, from name and `forward` together."""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING

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
_SOUND = ("input_features", "input_values")


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


def reads_sound(model: PreTrainedModel) -> bool:
    """Whether the `forward` of a model takes sound."""
    return any(name in inspect.signature(model.forward).parameters for name in _SOUND)


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
