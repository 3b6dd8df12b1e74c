"""The task of a class: by the auto mappings of transformers, its configuration and its labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from models import _CAPTIONS, _PICTURES
from torch import nn

from hf_trak import AutoTask
from hf_trak.tasks import TASKS, is_language_model
from hf_trak.tasks.auto import _kinds, kind_of

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 30, "pad_token_id": 0, "max_position_embeddings": 20, **SIZES}
BART = {"vocab_size": 30, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0,
        "max_position_embeddings": 20, "forced_eos_token_id": None}  # fmt: skip
WAVES = {**SIZES, "conv_dim": (8,), "conv_kernel": (3,), "conv_stride": (2,), "num_feat_extract_layers": 1, "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2, "vocab_size": 12, "classifier_proj_size": 8}  # fmt: skip
XLM = {"vocab_size": 30, "emb_dim": 16, "n_layers": 1, "n_heads": 2, "pad_index": 0, "max_position_embeddings": 20}
XLNET = {"vocab_size": 30, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
DEIT = {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 3}


def make(name: str, config: Any) -> Any:
    return getattr(transformers, name)(config)


def encoder_decoder() -> Any:
    encoder, decoder = (
        transformers.BertConfig(**TEXT),
        transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True),
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config=config)


EXPECTED = {
    "MarianMTModel": (lambda: make("MarianMTModel", transformers.MarianConfig(**BART)), "seq2seq"),
    "EncoderDecoderModel": (encoder_decoder, "seq2seq"),
    "BartForConditionalGeneration": (lambda: make("BartForConditionalGeneration", transformers.BartConfig(**BART)), "seq2seq"),
    "XLMWithLMHeadModel": (lambda: make("XLMWithLMHeadModel", transformers.XLMConfig(**XLM)), "masked-lm"),
    "FlaubertWithLMHeadModel": (lambda: make("FlaubertWithLMHeadModel", transformers.FlaubertConfig(**XLM)), "masked-lm"),
    "XLNetLMHeadModel": (lambda: make("XLNetLMHeadModel", transformers.XLNetConfig(**XLNET)), "masked-lm"),
    "XLMForQuestionAnsweringSimple": (
        lambda: make("XLMForQuestionAnsweringSimple", transformers.XLMConfig(**XLM)), "question-answering",
    ),
    "XLNetForQuestionAnsweringSimple": (
        lambda: make("XLNetForQuestionAnsweringSimple", transformers.XLNetConfig(**XLNET)), "question-answering",
    ),
    "BertGenerationDecoder": (
        lambda: make("BertGenerationDecoder", transformers.BertGenerationConfig(**TEXT, is_decoder=True)), "causal-lm",
    ),
    "DeiTForImageClassificationWithTeacher": (
        lambda: make("DeiTForImageClassificationWithTeacher", transformers.DeiTConfig(**DEIT)), "image-classification",
    ),
    "Wav2Vec2ForSequenceClassification": (
        lambda: make("Wav2Vec2ForSequenceClassification", transformers.Wav2Vec2Config(**WAVES, num_labels=3)), "audio-classification",
    ),
    "Wav2Vec2ForCTC": (lambda: make("Wav2Vec2ForCTC", transformers.Wav2Vec2Config(**WAVES)), "ctc"),
    "BertForNextSentencePrediction": (
        lambda: make("BertForNextSentencePrediction", transformers.BertConfig(**TEXT)), "next-sentence-prediction",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_task_of_a_class(name):
    build, expected = EXPECTED[name]
    model = build()
    assert AutoTask.from_model(model).name == expected
    assert is_language_model(model) == (expected in ("seq2seq", "masked-lm", "question-answering", "causal-lm"))


def test_a_subclass_has_the_task_of_its_class():
    class Mine(transformers.BertForTokenClassification):
        pass

    assert AutoTask.from_model(Mine(transformers.BertConfig(**TEXT, num_labels=3))).name == "token-classification"


@pytest.mark.parametrize(
    ("name", "arguments", "encodes", "expected"),
    [
        ("MineForSequenceClassification", "input_ids, attention_mask", False, "text-classification"),
        ("MineForSequenceClassification", "input_values", False, "audio-classification"),
        ("MineForImageClassification", "pixel_values", False, "image-classification"),
        ("MineForImageClassification", "grid", False, None),
        ("MineForQuestionAnswering", "input_ids, start_positions", False, "question-answering"),
        ("MineForQuestionAnswering", "input_ids, pixel_values", False, None),
        ("MineForQuestionAnswering", "input_ids, start_positions, p_mask", False, None),
        ("MineForCausalLM", "input_ids", False, "causal-lm"),
        ("MineForCausalLM", "input_ids, pixel_values", False, None),
        ("MineForCausalLM", "input_ids", True, None),
        ("MineForConditionalGeneration", "input_ids", True, "seq2seq"),
        ("MineForConditionalGeneration", "input_ids", False, None),
    ],
)
def test_other_classes_need_a_name_and_a_forward_that_agree(name, arguments, encodes, expected):
    scope: dict[str, Any] = {}
    exec(f"def forward(self, {arguments}): pass", scope)
    model = type(name, (nn.Module,), {"forward": scope["forward"]})()
    model.config = type("Config", (), {"is_encoder_decoder": encodes, "model_type": "mine"})()
    assert kind_of(model) == expected


def test_every_class_of_the_mappings_has_a_task_by_a_known_name():
    classification = {f"{kind}-classification" for kind in ("text", "image", "audio", "video")}
    assert set(_kinds().values()) <= set(TASKS) | classification
    assert len(_kinds()) > 600


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ViltForQuestionAnswering", "classes or texts about an image"),
        ("TapasForQuestionAnswering", "cells and aggregations of a table"),
        ("BlipForQuestionAnswering", "classes or texts about an image"),
        ("DetrForObjectDetection", "matches predictions with objects"),
        ("MaskFormerForInstanceSegmentation", "matches predictions with objects"),
        ("ViTForMaskedImageModeling", "reconstructed pixels"),
    ],
)
def test_what_is_not_served_is_refused_by_name_with_the_reason(name, reason):
    model = object.__new__(getattr(transformers, name))
    nn.Module.__init__(model)
    model.config = transformers.BertConfig()
    with pytest.raises(ValueError, match=rf"No task serves {name}: .*{reason}.*Task\.custom"):
        AutoTask.name_for(model)


def test_the_simple_question_answerer_of_xlnet_is_span_qa_and_its_beam_search_is_refused():
    model = make("XLNetForQuestionAnswering", transformers.XLNetConfig(**XLNET))
    with pytest.raises(ValueError, match="No task serves XLNetForQuestionAnswering"):
        AutoTask.name_for(model)


def test_a_distilled_classifier_is_the_mean_of_its_heads():
    model = make("DeiTForImageClassificationWithTeacher", transformers.DeiTConfig(**DEIT)).eval()
    task = AutoTask.from_model(model)
    batch = task.collate({"pixel_values": torch.randn(2, 3, 8, 8).tolist(), "label": [0, 2]}, None)
    result = model(pixel_values=batch["pixel_values"])
    p = ((result.cls_logits + result.distillation_logits) / 2).softmax(-1)
    wanted = torch.stack([p[0, 0], p[1, 2]]).logit()
    torch.testing.assert_close(task.output_function(model, batch)[0], wanted)


def test_pp_lcnets_logits_are_found_under_their_name():
    config = transformers.PPLCNetConfig(num_labels=3)
    model = make("PPLCNetForImageClassification", config).eval()
    task = AutoTask.from_model(model)
    batch = task.collate({"pixel_values": torch.randn(2, 3, 32, 32).tolist(), "label": [0, 2]}, None)
    p = model(pixel_values=batch["pixel_values"]).last_hidden_state.softmax(-1)
    torch.testing.assert_close(
        task.output_function(model, batch)[0], torch.stack([p[0, 0], p[1, 2]]).logit(), rtol=1e-3, atol=1e-3
    )


def test_imagegpt_reads_its_clusters():
    config = transformers.ImageGPTConfig(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2, num_labels=3)
    model = make("ImageGPTForImageClassification", config).eval()
    task = AutoTask.from_model(model)
    batch = task.collate({"input_ids": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": [0, 2]}, None)
    p = model(input_ids=torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])).logits.softmax(-1)
    torch.testing.assert_close(task.output_function(model, batch)[0], torch.stack([p[0, 0], p[1, 2]]).logit())


def test_siglip2s_classifier_gets_the_mask_and_shapes_of_its_patches():
    vision = {**SIZES, "num_patches": 4, "patch_size": 2}
    model = make("Siglip2ForImageClassification", transformers.Siglip2Config(vision_config=vision, num_labels=3)).eval()
    pixels = torch.randn(2, 4, 12)
    extra = {"pixel_attention_mask": [[1] * 4, [1, 1, 0, 0]], "spatial_shapes": [[2, 2], [1, 2]]}
    task = AutoTask.from_model(model)
    batch = task.collate({"pixel_values": pixels.tolist(), **extra, "label": [0, 2]}, None)
    result = model(pixel_values=pixels, **{name: torch.tensor(value) for name, value in extra.items()})
    wanted = torch.stack([result.logits.softmax(-1)[0, 0], result.logits.softmax(-1)[1, 2]]).logit()
    torch.testing.assert_close(task.output_function(model, batch)[0], wanted)


@pytest.mark.parametrize("kind", ["Llama", "DiffLlama", "Doge"])
def test_classifiers_that_decode_run_without_a_cache(kind):
    config = getattr(transformers, f"{kind}Config")(**TEXT, num_key_value_heads=2, num_labels=3)
    model = make(f"{kind}ForSequenceClassification", config).eval()
    task = AutoTask.from_model(model)
    seen = {}
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    task.output_function(model, task.collate({"input_ids": [[3, 4, 5]], "label": [1]}, None))
    assert seen["use_cache"] is False


# Dual encoders: the class's own logits of a pair are the scale times the product of what the task embeds.

_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}


def align() -> Any:
    vision = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "in_channels": [32, 8], "out_channels": [8, 16], "kernel_sizes": [3, 3],
              "strides": [1, 2], "num_block_repeats": [1, 1], "expand_ratios": [1, 2], "hidden_dim": 12, "image_size": 16,
              "depthwise_padding": []}  # fmt: skip
    config = transformers.AlignConfig(text_config=_CAPTIONS, vision_config=vision, projection_dim=16)
    return transformers.AlignModel(config)


ENCODERS = {
    "MetaClip2Model": lambda: make("MetaClip2Model", transformers.MetaClip2Config(
        text_config={**_CAPTIONS, "bos_token_id": 1, "eos_token_id": 3}, vision_config=_PICTURES, projection_dim=12)),
    "AltCLIPModel": lambda: make("AltCLIPModel", transformers.AltCLIPConfig(
        text_config={**_CAPTIONS, "project_dim": 12}, vision_config=_PICTURES, projection_dim=12)),
    "CLIPSegModel": lambda: make("CLIPSegModel", transformers.CLIPSegConfig(
        text_config={**_CAPTIONS, "bos_token_id": 1, "eos_token_id": 3}, vision_config=_PICTURES, projection_dim=12)),
    "AlignModel": align,
    "BlipModel": lambda: make("BlipModel", transformers.BlipConfig(
        text_config={**_CAPTIONS, "bos_token_id": 1, "eos_token_id": 3, "encoder_hidden_size": 16}, vision_config=_VISION, projection_dim=12)),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_the_embeddings_and_the_scale_are_those_of_the_models_own_logits(name):
    torch.manual_seed(0)
    model = ENCODERS[name]().eval()
    task = AutoTask.from_model(model)
    assert task.name == "contrastive"
    size = 16 if name == "AlignModel" else 8
    rows = {"input_ids": [[5, 6, 7, 3], [8, 9, 3]], "pixel_values": torch.randn(2, 3, size, size).tolist()}
    if name == "CLIPSegModel":
        rows["attention_mask"] = [[1] * 4, [1] * 3]
    batch = task.collate(rows, None)
    output = task.output_function
    with torch.no_grad():
        images, captions = output.embed(model, batch)
        inputs = {key: batch[key][:, 0] for key in output.text_names if key in batch}
        result = model(pixel_values=batch["pixel_values"], **inputs)
        scale = model.get_parameter(output.scale)
        scale = 1 / scale if output.divides else scale.exp()
    torch.testing.assert_close(scale * images @ captions[0].T, result.logits_per_image, rtol=1e-4, atol=1e-4)
