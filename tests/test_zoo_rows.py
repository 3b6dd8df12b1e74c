"""Rows as users have them, for choices, sounds, images in text and segmentation: what becomes of them, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as pillow
from tokenizers_for_tests import word_tokenizer
from transformers import CLIPImageProcessorPil, LlavaProcessor, Wav2Vec2FeatureExtractor

from hf_trak import AttributionIndex, AutoTask, TrakConfig
from hf_trak.tasks import TaskCollator

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 60, "pad_token_id": 0, "max_position_embeddings": 40, **SIZES}
WAVES = {**SIZES, "conv_dim": (8,), "conv_kernel": (4,), "conv_stride": (2,), "num_feat_extract_layers": 1, "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2, "vocab_size": 20, "classifier_proj_size": 8, "feat_extract_norm": "layer", "pad_token_id": 0}  # fmt: skip


def task_of(name: str, config: Any, **options: Any) -> Any:
    return AutoTask.from_model(getattr(transformers, name)(config), TrakConfig(**options))


def choices(**options: Any) -> Any:
    return task_of("BertForMultipleChoice", transformers.BertConfig(**TEXT), **options)


# Choices.

FORMATS = {
    "swag": {"sent1": "a b", "sent2": "c", "ending0": "d", "ending1": "e f", "ending2": "g", "ending3": "h", "label": 1},
    "hellaswag": {"ctx": "a b", "endings": ["c d", "c e f", "c g", "c h"], "label": "1"},
    "arc": {"question": "a b", "choices": {"text": ["c d", "c e f", "c g", "c h"], "label": ["A", "B", "C", "D"]}, "answerKey": "B"},
    "arc with numbers": {"question": "a b", "choices": {"text": ["c d", "c e f", "c g", "c h"], "label": ["1", "2", "3", "4"]}, "answerKey": "2"},
    "race": {"article": "a b", "question": "c", "options": ["d", "e f", "g", "h"], "answer": "B"},
    "mmlu": {"question": "a b", "choices": ["c d", "c e f", "c g", "c h"], "answer": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_known_formats_of_multiple_choice_become_the_same_batch(name):
    dataset, tokenizer = Dataset.from_list([FORMATS[name]]), word_tokenizer()
    task = choices()
    task.check(dataset, tokenizer)
    batch = task.collate(dataset[:], tokenizer)
    wanted = tokenizer(["a b"] * 4, ["c d", "c e f", "c g", "c h"])["input_ids"]
    for row, ids in zip(batch["input_ids"][0].tolist(), wanted, strict=True):
        assert row[: len(ids)] == ids
        assert row[len(ids) :] == [0] * (len(row) - len(ids))
    assert batch["labels"].tolist() == [1]
    assert task.columns_read(dataset.features)["label"] in FORMATS[name]


@pytest.mark.parametrize(
    ("name", "config", "rows", "limit"),
    [
        ("BertForMultipleChoice", transformers.BertConfig(**TEXT), [FORMATS["swag"]] * 3, 40),  # as many as there are positions
        ("Wav2Vec2ForCTC", transformers.Wav2Vec2Config(**WAVES), None, None),  # a transcript is never cut
    ],
)
def test_an_index_of_raw_rows_records_where_texts_are_cut(tmp_path, name, config, rows, limit):
    processor: Any = word_tokenizer()
    if rows is None:
        processor = transformers.Wav2Vec2Processor(Recogniser.feature_extractor, processor)
        rows = [{"audio": wave, "text": text} for wave, text in zip(waves(), ("a b", "c"), strict=True)]
    torch.manual_seed(0)
    model, dataset = getattr(transformers, name)(config), Dataset.from_list(rows)
    options = {"models": model, "processing_class": processor, "config": TrakConfig(proj_dim=8), "progress": False}
    index = AttributionIndex.build(tmp_path, dataset=dataset, **options)
    assert index.members[0].identity.get("max_length") == limit
    assert np.isfinite(index.score(dataset, progress=False)).all()


def test_columns_of_choices_can_be_named():
    row = {"stem": "a b", "possibilities": ["c d", "e"], "right": 1, "question": "f"}
    dataset, tokenizer = Dataset.from_list([row]), word_tokenizer()
    task = choices(text_columns=("stem", "possibilities"), label_column="right")
    task.check(dataset, tokenizer)
    assert task.collate(dataset[:], tokenizer)["labels"].tolist() == [1]
    with pytest.raises(ValueError, match="Expected tokenized rows .* Set `text_columns`"):
        choices().check(dataset, tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": -1}, "'label' is -1, but must be 0 to 3"),
        ({"label": 4}, "'label' is 4, but must be 0 to 3"),
        ({"ending2": None}, "at least two choices, which are texts"),
        ({"sent2": None}, "'sent1' or 'sent2' is no text"),
    ],
)
def test_rows_of_choices_that_cannot_serve_are_named(change, message):
    rows = [FORMATS["swag"], {**FORMATS["swag"], **change}]
    with pytest.raises(ValueError, match=rf"1 of 2 rows cannot serve: row 1: .*{message}"):
        choices().check(Dataset.from_list(rows), word_tokenizer())


def test_padding_of_tokenized_choices_is_taken_off():
    plain = {"input_ids": [[5, 6], [7, 8, 9]], "label": 0}
    padded = {"input_ids": [[0, 0, 5, 6], [0, 7, 8, 9]], "attention_mask": [[0, 0, 1, 1], [0, 1, 1, 1]], "label": 0}
    batches = [choices().collate({name: [value] for name, value in row.items()}, None) for row in (plain, padded)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in ("input_ids", "attention_mask", "labels"))
    assert batches[0]["input_ids"].tolist() == [[[5, 6, 0], [7, 8, 9]]]


# Sounds.


def sounds(head: str = "SequenceClassification", **options: Any) -> Any:
    return task_of(f"Wav2Vec2For{head}", transformers.Wav2Vec2Config(**WAVES, num_labels=3), **options)


def waves(lengths: tuple[int, ...] = (30, 50), rate: int = 8000) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"array": rng.standard_normal(length).astype(np.float32).tolist(), "sampling_rate": rate} for length in lengths]


def test_a_sound_is_extracted_alone_whatever_is_in_its_batch():
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=True)
    dataset = Dataset.from_list([{"audio": wave, "label": place} for place, wave in enumerate(waves())])
    task = sounds().reading(dataset)
    task.check(dataset, extractor)
    both, first = task.collate(dataset[:], extractor), task.collate(dataset[:1], extractor)
    values = np.asarray(dataset[0]["audio"]["array"], dtype=np.float32)
    wanted = torch.from_numpy((values - values.mean()) / np.sqrt(values.var() + 1e-7))
    torch.testing.assert_close(first["input_values"][0], wanted)
    assert torch.equal(both["input_values"][0, :30], first["input_values"][0])
    assert both["attention_mask"].sum(1).tolist() == [30, 50]
    assert "attention_mask" not in first
    assert task.columns_read(dataset.features) == {"sound": "audio", "label": "label"}


def test_padding_of_a_prepared_sound_is_taken_off():
    row = {"input_values": [[0.5, 1.0, 2.0, 0.0, 0.0]], "attention_mask": [[1, 1, 1, 0, 0]], "label": [0]}
    assert sounds().collate(row, None)["input_values"].tolist() == [[0.5, 1.0, 2.0]]


def test_another_sampling_rate_is_refused_with_the_rows():
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000)
    rows = [{"audio": waves()[0], "label": 0}, {"audio": waves(rate=16000)[0], "label": 1}]
    with pytest.raises(ValueError, match=r"16000 samples per second, .* trained on 8000.*row 1"):
        sounds().check(Dataset.from_list(rows), extractor)


def test_sounds_without_a_sampling_rate_are_refused():
    rows = [{"audio": waves()[0]["array"], "label": 0}]
    with pytest.raises(ValueError, match="do not say their sampling rate"):
        sounds().check(Dataset.from_list(rows), Wav2Vec2FeatureExtractor(sampling_rate=8000))


def test_audio_columns_are_held_against_the_extractor():
    from datasets import Audio

    dataset = Dataset.from_dict(
        {"audio": [None], "label": [0]}, features=Features({"audio": Audio(sampling_rate=44100), "label": Value("int64")})
    )
    with pytest.raises(ValueError, match="44100 samples per second"):
        sounds().check(dataset, Wav2Vec2FeatureExtractor(sampling_rate=8000))


class Recogniser:
    """A processor: a feature extractor and a tokenizer."""

    feature_extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000)
    tokenizer = word_tokenizer()


def test_transcripts_become_labels_by_the_tokenizer():
    dataset = Dataset.from_list([{"audio": wave, "text": text} for wave, text in zip(waves(), ("a b", "c"), strict=True)])
    task = sounds("CTC").reading(dataset)
    task.check(dataset, Recogniser)
    labels = task.collate(dataset[:], Recogniser)["labels"].tolist()
    assert labels == [Recogniser.tokenizer("a b")["input_ids"], [*Recogniser.tokenizer("c")["input_ids"], -100]]


def test_labels_that_ctc_ignores_are_taken_off():
    rows = {"input_values": [waves()[0]["array"]], "labels": [[3, 4, 0, -100]]}  # 0 is the blank
    assert sounds("CTC").collate(rows, None)["labels"].tolist() == [[3, 4]]


def test_a_label_outside_the_vocabulary_is_named_before_work_begins():
    rows = [{"input_values": waves()[0]["array"], "labels": labels} for labels in ([3], [20], [-100])]
    with pytest.raises(ValueError, match="2 of 3 rows cannot serve"):
        sounds("CTC").check(Dataset.from_list(rows), None)


# Images in text.

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {% for p in m.content %}{% if p.type == 'image' %}<image> {% else %}{{ p.text }} {% endif %}"
    "{% endfor %}</s> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def llava_processor() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def llava(**options: Any) -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=16),
        text_config=transformers.LlamaConfig(**TEXT), image_token_index=llava_processor().tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    return task_of("LlavaForConditionalGeneration", config, **options)


def picture(seed: int = 0) -> Any:
    return pillow.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8))


def with_images(rows: list[dict[str, Any]], images: list[list[Any]]) -> Dataset:
    return (
        Dataset.from_list(rows)
        .add_column("images", [[] for _ in rows])
        .map(
            lambda row, place: {"images": images[place]},
            with_indices=True,
            features=Features({**Dataset.from_list(rows).features, "images": List(Image())}),
        )
    )


def tokens_of(text: str) -> list[int]:
    return word_tokenizer_with_image()(text)["input_ids"]


def word_tokenizer_with_image() -> Any:
    return llava_processor().tokenizer


CONVERSATION = [
    {"prompt": [{"role": "user", "content": "a b"}], "completion": [{"role": "assistant", "content": "c d"}]},
    {"prompt": "user : <image> a b </s> assistant : ", "completion": "c d </s>"},
]


@pytest.mark.parametrize("row", CONVERSATION, ids=["conversation", "text"])
def test_the_completion_is_scored_and_the_image_stands_before_the_users_text(row):
    processor, task = llava_processor(), llava()
    dataset = with_images([row], [[picture()]])
    task.check(dataset, processor)
    batch = task.collate(dataset[:], processor)
    wanted = tokens_of("user : " + "<image>" * 4 + " a b </s> assistant : c d </s>")
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert [token for token in ids if token in wanted] == ids == [token for token in wanted if token is not None][: len(ids)]
    assert [token for token in labels if token != -100] == tokens_of("c d </s>")
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    torch.testing.assert_close(batch["pixel_values"], processor.image_processor(picture(), return_tensors="pt")["pixel_values"])


def test_messages_are_scored_whole_but_for_the_images():
    processor, task = llava_processor(), llava()
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "text": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]
    dataset = with_images([{"messages": messages}], [[picture()]])
    task.check(dataset, processor)
    batch = task.collate(dataset[:], processor)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    ids = batch["input_ids"][0].tolist()
    assert ids.count(image) == 4
    assert batch["labels"][0].tolist() == [-100 if token == image else token for token in ids]
    assert ids.index(tokens_of("a")[0]) < ids.index(image)


def test_a_row_whose_messages_have_places_for_other_images_is_named():
    messages = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]
    dataset = with_images([{"messages": messages}], [[picture(), picture(1)]])
    with pytest.raises(ValueError, match="places for 1 images, but it has 2"):
        llava().check(dataset, llava_processor())


def test_images_need_the_processor_and_words_around_them():
    with pytest.raises(ValueError, match="need the model's processor"):
        llava().check(with_images([CONVERSATION[1]], [[picture()]]), None)
    with pytest.raises(ValueError, match="Rows with images need 'messages'"):
        llava().check(with_images([{"question": "a", "answer": "b"}], [[picture()]]), llava_processor())


def test_rows_that_cannot_share_a_batch_are_not_trained_on_without_their_images():
    processor = llava_processor()
    dataset = with_images(
        [CONVERSATION[1], {"prompt": "a <image> <image>", "completion": "b"}], [[picture()], [picture(1), picture(2)]]
    )
    with pytest.raises(ValueError, match="cannot share a batch: their images differ in number"):
        TaskCollator(llava(), processor)([dataset[0], dataset[1]])


# Segmentation.


def test_maps_are_read_as_numbers_of_classes_beside_their_images():
    sizes = {
        "hidden_sizes": [4, 8, 8, 8],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 8,
    }
    task = task_of("SegformerForSemanticSegmentation", transformers.SegformerConfig(**sizes, num_labels=3))
    classes = np.random.default_rng(0).integers(0, 3, (16, 16), dtype=np.uint8)
    classes[0] = 255
    features = Features({"image": Image(), "annotation": Image()})
    dataset = Dataset.from_dict({"image": [picture()], "annotation": [pillow.fromarray(classes)]}, features=features)
    processor = transformers.SegformerImageProcessorPil(do_resize=False)
    task = task.reading(dataset)
    task.check(dataset, processor)
    batch = task.collate(dataset[:], processor)
    assert batch["labels"][0].tolist() == np.where(classes == 255, -100, classes.astype(int)).tolist()
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert task.columns_read(dataset.features) == {"image": "image", "label": "annotation"}


def test_a_class_that_the_model_does_not_have_is_named():
    sizes = {
        "hidden_sizes": [4, 8, 8, 8],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 8,
    }
    task = task_of("SegformerForSemanticSegmentation", transformers.SegformerConfig(**sizes, num_labels=3))
    rows = [{"pixel_values": np.zeros((3, 4, 4)).tolist(), "labels": np.full((4, 4), value).tolist()} for value in (1, 3)]
    with pytest.raises(ValueError, match="row 1 has the class 3, but the model has 0 to 2, and 255"):
        task.check(Dataset.from_list(rows), None)


# What would be left out.


def test_a_column_of_sound_rows_that_the_model_takes_and_the_task_does_not_read_is_refused():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20,
             "vocab_size": 60, "pad_token_id": 0, "decoder_start_token_id": 5, "bos_token_id": 5, "eos_token_id": 2,
             "suppress_tokens": None, "begin_suppress_tokens": None}  # fmt: skip
    task = task_of("WhisperForConditionalGeneration", transformers.WhisperConfig(**sizes))
    row = {"input_features": np.zeros((8, 20)).tolist(), "labels": [6, 2]}
    task.check(Dataset.from_list([row]), None)
    with pytest.raises(ValueError, match="takes 'decoder_input_ids', which .* does not read"):
        task.check(Dataset.from_list([{**row, "decoder_input_ids": [5, 6]}]), None)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_texts_without_boxes_are_refused_for_a_model_of_documents(head):
    config = transformers.LayoutLMConfig(**TEXT, max_2d_position_embeddings=50, num_labels=3)
    task = task_of(f"LayoutLMFor{head}", config)
    rows = {"SequenceClassification": {"text": "a b", "label": 1},
            "TokenClassification": {"tokens": ["a", "b"], "bboxes": [[1, 2, 3, 4]] * 2, "ner_tags": [0, 1]},
            "QuestionAnswering": {"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": [0]}}}[head]  # fmt: skip
    with pytest.raises(ValueError, match="reads a box for each token"):
        task.check(Dataset.from_list([rows]), word_tokenizer())
