"""Tasks beyond text and images: features of each beside a float64 loop over rows that are alone and unpadded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn

from hf_trak import AutoTask, Featurizer, TrakConfig

VOCAB = 60
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": VOCAB, "pad_token_id": 0, "max_position_embeddings": 40, **SIZES}
# Convolutions are longer than strides, so that a frame reads its neighbours; group norm reads the whole sound.
WAVES = {**SIZES, "conv_dim": (8, 8), "conv_kernel": (6, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2, "feat_extract_norm": "layer",
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 12, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "classifier_proj_size": 8}  # fmt: skip

Row = Mapping[str, Any]
Reference = Callable[[nn.Module, Row], tuple[Tensor, Tensor]]


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def perturbed(model: nn.Module) -> nn.Module:
    """Give every parameter a part in the gradient."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def build(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    return perturbed(getattr(transformers, name)(config))


def one(row: Row, *names: str) -> dict[str, Tensor]:
    """Return columns of a row as a batch of one, in float64."""
    found = {name: torch.as_tensor(np.asarray(row[name])).unsqueeze(0) for name in names if name in row}
    return {name: value.double() if value.is_floating_point() else value for name, value in found.items()}


def log_odds(logits: Tensor, label: int) -> Tensor:
    others = torch.cat([logits[:label], logits[label + 1 :]])
    return logits[label] - others.logsumexp(0)


def of_class(logits: Tensor, label: int) -> tuple[Tensor, Tensor]:
    f = log_odds(logits, label)
    return f, torch.sigmoid(-f)


def of_tokens(logits: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
    """Return the mean log-odds and the mean 1 − p; positions and labels are matched already."""
    found = torch.stack([log_odds(row, int(label)) for row, label in zip(logits, labels, strict=True) if label != -100])
    return found.mean(), torch.sigmoid(-found).mean()


def assert_right(
    model: Any, rows: list[dict[str, Any]], reference: Reference, *, gradients: str = "auto", tolerance: float = 2e-4
) -> Any:
    """Compare features, outputs and out-to-loss of all rows together, and of the first alone, with the reference."""
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    dataset = Dataset.from_list(rows)
    featurizer = Featurizer(model, TrakConfig(projector="identity", proj_dim=size, gradients=gradients), device="cpu")
    featurizer.check(dataset)
    got = featurizer.compute(featurizer.collate(dataset[:]))
    double = copy.deepcopy(model).double().eval()
    parameters = [parameter for parameter in double.parameters() if parameter.requires_grad]
    for place, row in enumerate(dataset):
        f, q = reference(double, row)
        found = torch.autograd.grad(f, parameters, allow_unused=True)
        grads = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)])
        assert grads.norm() > 0
        assert grads.isfinite().all()
        assert float((got.features[place].double() - grads).norm() / grads.norm()) < tolerance
        torch.testing.assert_close(got.output[place].double(), f.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.out_to_loss[place].double(), q.detach(), rtol=1e-4, atol=1e-4)
    alone = featurizer.compute(featurizer.collate(dataset[:1]))
    torch.testing.assert_close(alone.features[0], got.features[0], rtol=1e-3, atol=1e-4 * float(got.features[0].abs().max()))
    return featurizer


# Multiple choice.


def choice_model(kind: str) -> Any:
    if kind == "bert":
        return build("BertForMultipleChoice", transformers.BertConfig(**TEXT))
    sizes = {
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 24,
        "max_position_embeddings": 40,
    }
    return build("DistilBertForMultipleChoice", transformers.DistilBertConfig(**sizes))


def choice_rows(counts: tuple[int, ...] = (3, 3, 3)) -> list[dict[str, Any]]:
    rng = random()
    rows = []
    for place, count in enumerate(counts):
        choices = [rng.integers(3, VOCAB, 4 + place + number).tolist() for number in range(count)]
        rows.append({"input_ids": choices, "attention_mask": [[1] * len(ids) for ids in choices], "label": place % count})
    return rows


def choice_reference(model: nn.Module, row: Row) -> tuple[Tensor, Tensor]:
    # Each choice by itself, without padding: the logits of a choice do not depend on the others.
    logits = [model(input_ids=torch.tensor([[ids]])).logits[0, 0] for ids in row["input_ids"]]
    return of_class(torch.stack(logits), row["label"])


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@pytest.mark.parametrize("counts", [(3, 3, 3), (3, 2, 4)])
def test_multiple_choice_is_that_of_each_row_alone(kind, counts):
    featurizer = assert_right(choice_model(kind), choice_rows(counts), choice_reference)
    engine = featurizer.choose_engine(Dataset.from_list(choice_rows(counts)))
    assert engine.name == ("layerwise" if len(set(counts)) == 1 else "loop"), engine.reason


# Sound.


def sound_model(kind: str, head: str, **options: Any) -> Any:
    if kind == "wav2vec2":
        return build(f"Wav2Vec2For{head}", transformers.Wav2Vec2Config(**{**WAVES, **options}))
    if kind == "hubert":
        return build(f"HubertFor{head}", transformers.HubertConfig(**{**WAVES, **options}))
    if kind == "ast":
        sizes = {
            **SIZES,
            "max_length": 24,
            "num_mel_bins": 16,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "num_labels": 3,
        }
        return build("ASTForAudioClassification", transformers.ASTConfig(**sizes))
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20,
             "vocab_size": VOCAB, "pad_token_id": 0, "decoder_start_token_id": 5, "bos_token_id": 5, "eos_token_id": 2, "num_labels": 3,
             "suppress_tokens": None, "begin_suppress_tokens": None, "classifier_proj_size": 8}  # fmt: skip
    if kind == "whisper":
        return build(f"WhisperFor{head}", transformers.WhisperConfig(**sizes))
    config = {
        **sizes,
        "input_feat_per_channel": 8,
        "input_channels": 1,
        "conv_channels": 12,
        "num_conv_layers": 1,
        "conv_kernel_sizes": [3],
    }
    config["max_source_positions"] = 60
    return build("Speech2TextForConditionalGeneration", transformers.Speech2TextConfig(**config))


def waves(lengths: tuple[int, ...] = (60, 110, 77)) -> list[dict[str, Any]]:
    rng = random()
    return [{"input_values": rng.standard_normal(length).astype(np.float32).tolist()} for length in lengths]


@pytest.mark.parametrize(("kind", "options"), [("wav2vec2", {}), ("wav2vec2", {"feat_extract_norm": "group"}), ("hubert", {})])
def test_audio_classification_of_waves(kind, options):
    model = sound_model(kind, "SequenceClassification", num_labels=3, **options)
    rows = [{**row, "label": place} for place, row in enumerate(waves())]
    assert AutoTask.from_model(model).name == "audio-classification"
    assert_right(model, rows, lambda m, row: of_class(m(**one(row, "input_values")).logits[0], row["label"]))


@pytest.mark.parametrize("kind", ["ast", "whisper"])
def test_audio_classification_of_spectrograms(kind):
    model = sound_model(kind, "AudioClassification")
    shape, name = ((24, 16), "input_values") if kind == "ast" else ((8, 20), "input_features")
    rows = [{name: random(place).standard_normal(shape).tolist(), "label": place} for place in range(3)]
    assert_right(model, rows, lambda m, row: of_class(m(**one(row, name)).logits[0], row["label"]))


def all_alignments(log_p: Tensor, labels: list[int], blank: int) -> Tensor:
    """Return the log-probability of a transcript, by the recursion over its tokens with blanks between them, in float64."""
    states = [blank]
    for label in labels:
        states += [label, blank]
    alpha = [log_p[0, states[0]], log_p[0, states[1]]] + [log_p.new_tensor(-torch.inf)] * (len(states) - 2)
    for frame in log_p[1:]:
        after = []
        for place, state in enumerate(states):
            paths = [alpha[place]] + ([alpha[place - 1]] if place >= 1 else [])
            if place >= 2 and state != blank and state != states[place - 2]:
                paths.append(alpha[place - 2])
            paths = [path for path in paths if bool(path > -torch.inf)]
            after.append(torch.stack(paths).logsumexp(0) + frame[state] if paths else log_p.new_tensor(-torch.inf))
        alpha = after
    return torch.stack([path for path in alpha[-2:] if bool(path > -torch.inf)]).logsumexp(0)


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
def test_ctc_is_the_log_odds_of_all_alignments(kind):
    model = sound_model(kind, "CTC")
    rows = [{**row, "labels": labels} for row, labels in zip(waves(), ([4, 4, 7], [5, 6, 3, 3], [9]), strict=True)]

    def reference(m: nn.Module, row: Row) -> tuple[Tensor, Tensor]:
        log_p = all_alignments(m(**one(row, "input_values")).logits[0].log_softmax(-1), row["labels"], 0)
        return log_p - torch.log1p(-log_p.exp()), 1 - log_p.exp()

    assert AutoTask.from_model(model).name == "ctc"
    assert_right(model, rows, reference)


def test_the_log_odds_of_a_loss_are_right_where_p_rounds_to_one_or_to_zero():
    from hf_trak.tasks.transcripts import log_odds_of_loss

    losses = torch.tensor([1e-30, 1e-7, 0.5, 0.6931, 0.6932, 3.0, 200.0], requires_grad=True)
    got = log_odds_of_loss(losses)
    grads = torch.autograd.grad(got.sum(), losses)[0]
    exact = losses.detach().double()
    torch.testing.assert_close(got.double(), -exact - torch.log(-torch.expm1(-exact)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads.double(), 1 / torch.expm1(-exact), rtol=1e-5, atol=1e-5)


def test_a_transcript_longer_than_its_sound_is_refused():
    model = sound_model("wav2vec2", "CTC")
    dataset = Dataset.from_list([{**waves((20,))[0], "labels": [3, 4, 5, 6, 7, 8]}])
    featurizer = Featurizer(model, TrakConfig(proj_dim=8), device="cpu")
    with pytest.raises(ValueError, match="A transcript of 6 tokens has no alignment"):
        featurizer.compute(featurizer.collate(dataset[:]))


@pytest.mark.parametrize("kind", ["whisper", "speech2text"])
def test_speech_to_text_reads_what_the_model_makes_of_the_labels(kind):
    model = sound_model(kind, "ConditionalGeneration")
    frames = ((8, 20),) * 3 if kind == "whisper" else ((20, 8), (32, 8), (25, 8))
    labels = ([6, 7, 2], [5, 9, 8, 7, 2], [11, 2])  # the second begins with the decoder's first token
    rows = [
        {"input_features": random(place).standard_normal(shape).tolist(), "labels": tokens}
        for place, (shape, tokens) in enumerate(zip(frames, labels, strict=True))
    ]

    def reference(m: nn.Module, row: Row) -> tuple[Tensor, Tensor]:
        tokens = row["labels"][row["labels"][0] == 5 :]
        result = m(**one(row, "input_features"), labels=torch.tensor([tokens]))
        f, q = of_tokens(result.logits[0], tokens)
        nll = torch.nn.functional.cross_entropy(result.logits[0], torch.tensor(tokens))
        torch.testing.assert_close(result.loss, nll)  # the logits belong to these labels
        return f, q

    assert AutoTask.from_model(model).name == "speech-to-text"
    assert_right(model, rows, reference)


# Segmentation.


def segmentation_model(kind: str) -> Any:
    if kind == "segformer":
        sizes = {
            "hidden_sizes": [4, 8, 8, 8],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 8,
        }
        return build("SegformerForSemanticSegmentation", transformers.SegformerConfig(**sizes, num_labels=3))
    sizes = {
        **SIZES,
        "num_hidden_layers": 4,
        "image_size": 32,
        "patch_size": 16,
        "out_indices": [1, 2, 3, 4],
        "pool_scales": [1, 2],
    }
    return build("BeitForSemanticSegmentation", transformers.BeitConfig(**sizes, num_labels=3, auxiliary_channels=4))


@pytest.mark.parametrize("kind", ["segformer", "beit"])
def test_semantic_segmentation_is_the_mean_over_pixels_at_the_size_of_the_map(kind):
    model, rng = segmentation_model(kind), random()
    rows = []
    for _ in range(3):
        classes = rng.integers(0, 3, (32, 32))
        classes[:3] = 255
        rows.append({"pixel_values": rng.standard_normal((3, 32, 32)).tolist(), "labels": classes.tolist()})

    def reference(m: nn.Module, row: Row) -> tuple[Tensor, Tensor]:
        logits = nn.functional.interpolate(
            m(**one(row, "pixel_values")).logits, (32, 32), mode="bilinear", align_corners=False
        )[0]
        labels = np.asarray(row["labels"])
        pixels = [(y, x) for y, x in np.argwhere(labels != 255)]
        return of_tokens(torch.stack([logits[:, y, x] for y, x in pixels]), [labels[y, x] for y, x in pixels])

    assert_right(model, rows, reference)


# Images in text.


def media_model(kind: str) -> Any:
    text = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
    vision = {**SIZES, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    if kind == "llava":
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision, projection_dim=16), text_config=transformers.LlamaConfig(**text),
            image_token_index=50, image_seq_length=4, vision_feature_layer=-1,
        )  # fmt: skip
        return build("LlavaForConditionalGeneration", config)
    if kind == "paligemma":
        text["num_key_value_heads"] = 2
        config = transformers.PaliGemmaConfig(
            vision_config=transformers.SiglipVisionConfig(**vision).to_dict(),
            text_config=transformers.GemmaConfig(**text).to_dict(), projection_dim=16, image_token_index=50,
        )  # fmt: skip
        return build("PaliGemmaForConditionalGeneration", config)
    if kind == "idefics3":
        config = transformers.Idefics3Config(
            vision_config={**vision, "model_type": "idefics3_vision"}, text_config={**text, "model_type": "llama"}, image_token_id=50, scale_factor=2
        )  # fmt: skip
        return build("Idefics3ForConditionalGeneration", config)
    config = transformers.Qwen2VLConfig(
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2, "spatial_merge_size": 2,
                       "temporal_patch_size": 1},
        text_config={**text, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
        image_token_id=50, vision_start_token_id=51, vision_end_token_id=52, video_token_id=53,
    )  # fmt: skip
    return build("Qwen2VLForConditionalGeneration", config)


def media_row(kind: str, place: int, *, batched: bool, n_images: int = 1) -> dict[str, Any]:
    """Return a row as a processor makes it, with the batch's axis or without."""
    rng = random(place)
    if kind == "qwen2_vl":
        grid = np.asarray([[1, 4, 2 + 2 * place]] * n_images)
        tokens = [n // 4 for n in grid.prod(1)]
        media = {"pixel_values": rng.standard_normal((int(grid.prod(1).sum()), 48)), "image_grid_thw": grid}
    else:
        shape = (n_images, 3, 16, 16) if kind != "idefics3" else (1, n_images, 3, 16, 16)
        tokens = [1 if kind == "idefics3" else 4] * n_images
        pixels = rng.standard_normal(shape)
        media = {"pixel_values": pixels if batched else pixels[0]}
    ids = rng.integers(3, 40, 3).tolist()
    for count in tokens:
        ids += [50] * count
    prompt = len(ids)
    answer = rng.integers(3, 40, 3 + place).tolist()
    row = {"input_ids": ids + answer, "attention_mask": [1] * (prompt + len(answer)), "labels": [-100] * prompt + answer}
    if kind == "qwen2_vl":
        row["mm_token_type_ids"] = [int(token == 50) for token in row["input_ids"]]
    if kind == "paligemma":
        row["token_type_ids"] = [0] * prompt + [1] * len(answer)
    return {
        **row,
        **{name: value.astype(np.float32 if value.dtype.kind == "f" else np.int64).tolist() for name, value in media.items()},
    }


def media_reference(kind: str) -> Reference:
    axes = {"pixel_values": {"qwen2_vl": 2, "idefics3": 5}.get(kind, 4), "image_grid_thw": 2}

    def reference(m: nn.Module, row: Row) -> tuple[Tensor, Tensor]:
        inputs = one(row, "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        for name, count in axes.items():
            if row.get(name) is not None:
                value = torch.as_tensor(np.asarray(row[name]))
                value = value if value.ndim == count else value.unsqueeze(0)
                inputs[name] = value.double() if value.is_floating_point() else value
        logits = m(**inputs, use_cache=False).logits[0]
        return of_tokens(logits[:-1], row["labels"][1:])

    return reference


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", ["llava", "paligemma", "qwen2_vl", "idefics3"])
def test_prepared_rows_with_images(kind, batched):
    model = media_model(kind)
    assert AutoTask.from_model(model).name == "image-text-to-text"
    assert_right(model, [media_row(kind, place, batched=batched) for place in range(3)], media_reference(kind))


def test_rows_with_different_numbers_of_images_are_computed_apart():
    model = media_model("llava")
    rows = [media_row("llava", place, batched=True, n_images=count) for place, count in enumerate((1, 3, 2))]
    featurizer = assert_right(model, rows, media_reference("llava"))
    assert featurizer.engine.name == "loop"
    assert "images differ in number" in featurizer.engine.reason


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_rows_of_text_alone(kind):
    rng = random()
    rows = [{"input_ids": rng.integers(3, 40, length).tolist()} for length in (5, 9, 7)]

    def reference(m: nn.Module, row: Row) -> tuple[Tensor, Tensor]:
        logits = m(**one(row, "input_ids"), use_cache=False).logits[0]
        return of_tokens(logits[:-1], row["input_ids"][1:])

    assert_right(media_model(kind), rows, reference)


def test_placeholders_of_images_are_not_scored_where_no_labels_are_given():
    model, row = media_model("llava"), media_row("llava", 1, batched=True)
    del row["labels"]
    batch = AutoTask.from_model(model).collate({name: [value] for name, value in row.items()}, None)
    assert batch["labels"][0].tolist() == [-100 if token == 50 else token for token in row["input_ids"]]


def test_an_encoder_of_images_with_a_decoder_of_text():
    encoder = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4)
    decoder = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 5, 0
    torch.manual_seed(0)
    model = perturbed(transformers.VisionEncoderDecoderModel(config=config))
    rng = random()
    labels = ([6, 7, 2], [9, 8, 7, 2], [11, 2])
    rows = [{"pixel_values": rng.standard_normal((3, 8, 8)).astype(np.float32).tolist(), "labels": tokens} for tokens in labels]

    def reference(m: nn.Module, row: Row) -> tuple[Tensor, Tensor]:
        result = m(**one(row, "pixel_values"), labels=torch.tensor([row["labels"]]))
        nll = nn.functional.cross_entropy(result.logits[0], torch.tensor(row["labels"]))
        torch.testing.assert_close(result.loss, nll)
        return of_tokens(result.logits[0], row["labels"])

    assert AutoTask.from_model(model).name == "image-text-to-text"
    assert_right(model, rows, reference)


# Documents.


def document_model(kind: str, head: str) -> Any:
    sizes = {**TEXT, "max_2d_position_embeddings": 50, "num_labels": 2 if head == "QuestionAnswering" else 3}
    if kind == "lilt":
        return build(
            f"LiltFor{head}",
            transformers.LiltConfig(**{**sizes, "hidden_size": 48, "num_attention_heads": 4}, channel_shrink_ratio=4),
        )
    if kind == "bros":
        return build(f"BrosFor{head}", transformers.BrosConfig(**{**sizes, "hidden_size": 64}))
    return build(f"LayoutLMFor{head}", transformers.LayoutLMConfig(**sizes))


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("layoutlm", "TokenClassification"),
        ("layoutlm", "QuestionAnswering"),
        ("lilt", "SequenceClassification"),
        ("bros", "TokenClassification"),
    ],
)
def test_documents_are_read_with_their_boxes(kind, head):
    model, rng = document_model(kind, head), random()
    rows = []
    for place, length in enumerate((5, 9, 7)):
        boxes = np.sort(rng.integers(0, 24, (length, 2, 2)), 1).reshape(length, 4)
        row = {"input_ids": rng.integers(3, VOCAB, length).tolist(), "bbox": (boxes / 50 if kind == "bros" else boxes).tolist()}
        answer = {"TokenClassification": {"labels": rng.integers(0, 3, length).tolist()}, "SequenceClassification": {"label": place},
                  "QuestionAnswering": {"start_positions": 1, "end_positions": 3}}  # fmt: skip
        rows.append({**row, **answer[head]})

    def reference(m: nn.Module, row: Row) -> tuple[Tensor, Tensor]:
        result = m(**one(row, "input_ids", "bbox"))
        if head == "TokenClassification":
            return of_tokens(result.logits[0], row["labels"])
        if head == "SequenceClassification":
            return of_class(result.logits[0], row["label"])
        parts = [of_class(result.start_logits[0], 1), of_class(result.end_logits[0], 3)]
        return torch.stack([f for f, _ in parts]).mean(), torch.stack([q for _, q in parts]).mean()

    assert_right(model, rows, reference)
