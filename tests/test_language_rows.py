"""Language rows are what a plain training run of transformers saw, or are refused by name."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from models import LANGUAGE_MODELS, bert, make_model
from tokenizers_for_tests import byte_tokenizer, word_tokenizer
from torch import Tensor, nn

from hf_trak import AttributionIndex
from hf_trak.config import TrakConfig
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.tasks import AutoTask, TaskCollator

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented the batching rule"
)

PAD = 0
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 60, "pad_token_id": PAD, "initializer_range": 0.15}
# As the configurations of BART and its kin have them.
BART = {
    "vocab_size": 100, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "init_std": 0.15,
}  # fmt: skip


def t5gemma() -> nn.Module:
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

    side = {
        **SIZES,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 100,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    return T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=side, decoder=side, vocab_size=100, initializer_range=0.15))


def bart_like(name: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**BART, **options})
    return getattr(transformers, "MarianMTModel" if name == "Marian" else f"{name}ForConditionalGeneration")(config)


SEQ2SEQ: dict[str, Callable[[], nn.Module]] = {
    "mbart": lambda: bart_like("MBart"),
    "plbart": lambda: bart_like("PLBart"),
    "bart": lambda: bart_like("Bart", decoder_start_token_id=2),
    "m2m100": lambda: bart_like("M2M100", decoder_start_token_id=2),
    "marian": lambda: bart_like("Marian", decoder_start_token_id=1),
    "blenderbot": lambda: bart_like("Blenderbot", decoder_start_token_id=2),
    "t5": lambda: LANGUAGE_MODELS["t5"](vocab_size=100),
    "t5gemma": t5gemma,
}


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_decoder_reads_what_the_models_own_loss_makes_it_read(name: str):
    """In float64; whatever labels of -100 stand at the end. With those in between the decoder reads padding, as in training."""
    torch.manual_seed(0)
    model = SEQ2SEQ[name]().double().eval()
    task = AutoTask.from_model(model, TrakConfig(token_reduction="sum", token_out_to_loss="exact"))
    inputs, labels = [[5, 6, 7, 2], [8, 9, 2], [6, 2]], [[21, 22, 23, 24, 2, 91], [31, -100, 32, 2], [-100, -100, 33, 2]]
    batch = task.collate({"input_ids": inputs, "labels": labels}, None)
    longer = task.collate({"input_ids": inputs, "labels": [[*row, -100, -100] for row in labels]}, None)
    assert all(torch.equal(batch[key], longer[key]) for key in batch)
    assert pickle.loads(pickle.dumps(task)).collate({"input_ids": inputs, "labels": labels}, None).keys() == batch.keys()
    assert len(pickle.dumps(task)) < 50_000
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # Marian's positions are not
    for i, (ids, targets) in enumerate(zip(inputs, labels, strict=True)):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        output, out_to_loss = task.output_function(model, one)
        found = torch.autograd.grad(output.sum(), trained, allow_unused=True)
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([targets])).loss * sum(
            label != -100 for label in targets
        )
        expected = torch.autograd.grad(loss, trained, allow_unused=True)
        assert out_to_loss.tolist() == [1.0]
        assert_opposite(found, expected, 1e-6)


def assert_opposite(found: Any, expected: Any, relative: float) -> None:
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    difference = sum(float((a + b).square().sum()) for a, b in pairs) ** 0.5
    assert 0 <= difference <= relative * sum(float(b.square().sum()) for _, b in pairs) ** 0.5
    assert any(float(b.abs().sum()) > 0 for _, b in pairs)


def test_labels_padded_on_the_left_with_their_row_are_padding():
    task = AutoTask.from_model(LANGUAGE_MODELS["t5"]())
    padded = {"input_ids": [[PAD, PAD, 5, 6]], "attention_mask": [[0, 0, 1, 1]], "labels": [[-100, -100, 20, 21]]}
    batch = task.collate(padded, None)
    assert (batch["labels"].tolist(), batch["decoder_input_ids"].tolist()) == ([[20, 21]], [[PAD, 20]])


# Columns that the model takes.


def layoutlm(kind: str) -> nn.Module:
    import transformers

    config = transformers.LayoutLMConfig(
        **TEXT, **SIZES, max_position_embeddings=20, max_2d_position_embeddings=50, num_labels=3
    )
    return getattr(transformers, f"LayoutLMFor{kind}")(config)


def longformer() -> nn.Module:
    from transformers import LongformerConfig, LongformerForTokenClassification

    config = LongformerConfig(
        **TEXT,
        **SIZES,
        max_position_embeddings=40,
        attention_window=[4, 4],
        num_labels=3,
        bos_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
    )
    return LongformerForTokenClassification(config)


def xlm(kind: str = "ForTokenClassification") -> nn.Module:
    import transformers

    config = transformers.XLMConfig(
        vocab_size=60, emb_dim=16, n_layers=2, n_heads=2, n_langs=3, pad_index=PAD, num_labels=3, max_position_embeddings=20
    )
    return getattr(transformers, f"XLM{kind}")(config)


def roberta_lm() -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(RobertaConfig(**TEXT, **SIZES, max_position_embeddings=20, bos_token_id=1, eos_token_id=2))


IDS = [[5, 6, 7, 8, 9], [11, 12, 13]]
FURTHER: dict[str, tuple[Callable[[], nn.Module], list[list[Any]]]] = {
    "bbox tokens": (lambda: layoutlm("TokenClassification"), [[[i, i, i + 3, i + 4] for i in range(len(ids))] for ids in IDS]),
    "bbox mlm": (lambda: layoutlm("MaskedLM"), [[[i, 2, i + 3, i + 4] for i in range(len(ids))] for ids in IDS]),
    "global_attention_mask": (longformer, [[1, 0, 0, 1, 0], [1, 0, 0]]),
    "langs": (xlm, [[2, 2, 1, 1, 1], [1, 1, 2]]),
    "langs of a language model": (lambda: xlm("WithLMHeadModel"), [[2, 2, 1, 1, 1], [1, 1, 2]]),
    "position_ids": (roberta_lm, [[3, 4, 5, 6, 7], [4, 5, 6]]),
    "token_type_ids": (LANGUAGE_MODELS["bert mlm"], [[0, 0, 1, 1, 1], [0, 1, 1]]),
}


@pytest.mark.parametrize("name", FURTHER)
def test_every_column_that_forward_takes_reaches_the_model(name: str):
    make, values = FURTHER[name]
    torch.manual_seed(0)
    model, column = make().double().eval(), name.split()[0]
    rows = {"input_ids": IDS, column: values, "labels": [[1, -100, 2, 0, 1], [0, 1, 2]]}
    task = AutoTask.from_model(model, TrakConfig(token_reduction="sum", token_out_to_loss="exact"))
    task.check(datasets.Dataset.from_dict(rows), None)
    batch = task.collate(rows, None)
    padded = {  # padding of a row itself, which the batch takes off
        "input_ids": [[PAD, *ids] for ids in IDS],
        "attention_mask": [[0] + [1] * len(ids) for ids in IDS],
        column: [[row[0], *row] for row in values],
        "labels": [[-100, *labels] for labels in rows["labels"]],
    }
    assert all(torch.equal(value, task.collate(padded, None)[key]) for key, value in batch.items())
    for i in range(2):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        output, _ = task.output_function(model, one)
        found = torch.autograd.grad(output.sum(), list(model.parameters()), allow_unused=True)
        alone = {key: torch.tensor([column_values[i]]) for key, column_values in rows.items()}
        loss = model(**alone).loss * sum(label != -100 for label in rows["labels"][i])
        assert_opposite(found, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True), 1e-6)
        del alone[column]
        assert (model(**alone).loss - loss).abs() > 1e-6  # the column matters


@pytest.mark.parametrize(
    ("name", "column", "values", "message"),
    [
        ("llama lm", "inputs_embeds", [[0.5] * 5, [0.5] * 3], "'inputs_embeds' is an argument of the model's `forward`"),
        (
            "bert mlm",
            "token_type_ids",
            [[0, 1], [1]],
            r"'token_type_ids'.* neither one entry per token in every row nor one shape",
        ),
        ("bert mlm", "token_type_ids", [["a"], ["b"]], "'token_type_ids' must hold numbers"),
        (
            "bert tokens",
            "token_type_ids",
            [[0, 1], [1, 0]],
            "takes 'token_type_ids', which the dataset has, but its rows are texts",
        ),
    ],
)
def test_a_column_that_cannot_reach_the_model_is_refused_by_name(name: str, column: str, values: list[Any], message: str):
    rows = {"input_ids": IDS, "labels": IDS, column: values}
    if name == "bert tokens":
        rows = {"tokens": [["a"], ["b"]], "ner_tags": [[1], [2]], column: values}
    task = AutoTask.from_model(LANGUAGE_MODELS[name]())
    with pytest.raises(ValueError, match=message):
        task.check(datasets.Dataset.from_dict(rows), word_tokenizer())


def test_a_column_of_one_shape_is_stacked():
    from transformers import LayoutLMv3Config, LayoutLMv3ForTokenClassification

    sizes = {**SIZES, "max_position_embeddings": 20, "max_2d_position_embeddings": 50, "coordinate_size": 3, "shape_size": 2}
    config = LayoutLMv3Config(**TEXT, **sizes, input_size=8, patch_size=4, num_labels=3, bos_token_id=1, eos_token_id=2)
    model = LayoutLMv3ForTokenClassification(config).eval()
    pixels = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    rows = {"input_ids": IDS, "bbox": FURTHER["bbox tokens"][1], "pixel_values": pixels.tolist(), "labels": [[1] * 5, [2] * 3]}
    task = AutoTask.from_model(model)
    task.check(datasets.Dataset.from_dict(rows), None)
    batch = task.collate(rows, None)
    assert torch.equal(batch["pixel_values"], torch.from_numpy(pixels))
    assert batch["bbox"].shape == (2, 5, 4)
    assert task.columns_read(datasets.Dataset.from_dict(rows).features) == {
        "tokens": ["input_ids", "bbox", "pixel_values"],
        "label": "labels",
    }


# Packed rows.

PACKED_IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]
LENGTHS = [[2, 4], [1, 3]]
POSITIONS = [[0, 1, 0, 1, 2, 3], [0, 0, 1, 2]]
PACKED: dict[str, dict[str, list[Any]]] = {
    "seq_lengths": {"seq_lengths": LENGTHS},
    "position_ids": {"position_ids": POSITIONS},
    "position_ids and a mask": {"position_ids": POSITIONS, "attention_mask": [[1] * 6, [1] * 4]},
    "a flattening collator's": {
        "position_ids": POSITIONS,
        "cu_seq_lens_q": [[0, 2, 6], [0, 1, 4]],
        "cu_seq_lens_k": [[0, 2, 6], [0, 1, 4]],
        "max_length_q": [4, 3],
        "max_length_k": [4, 3],
        "seq_idx": [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1]],
    },
    "seq_idx": {"seq_idx": [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1]]},
}


def decoder(name: str) -> nn.Module:
    import transformers

    if name in LANGUAGE_MODELS:
        return make_model(name)
    options = {"sliding_window": 3} if name in ("Mistral", "Gemma2") else {}
    sizes = {**TEXT, **SIZES, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, **options}
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))


# The columns are read alike for every model.
@pytest.mark.parametrize(
    ("name", "columns"),
    [
        *[("llama lm", columns) for columns in PACKED],
        *[(name, columns) for name in ("gpt2 lm", "Mistral", "Gemma2") for columns in ("seq_lengths", "position_ids")],
    ],
)
def test_packed_documents_have_the_gradient_of_the_documents_alone(name: str, columns: str):
    model = decoder(name).double().eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    featurizer = Featurizer(model, TrakConfig(projector="identity", proj_dim=size, token_reduction="sum"))
    rows = datasets.Dataset.from_dict({"input_ids": PACKED_IDS, **PACKED[columns]})
    featurizer.task.check(rows, None)
    found = featurizer.compute(featurizer.collate(rows[:]))
    for i, (ids, lengths) in enumerate(zip(PACKED_IDS, LENGTHS, strict=True)):
        ends = np.cumsum(lengths)
        documents = [ids[end - length : end] for end, length in zip(ends, lengths, strict=True) if length > 1]
        alone = featurizer.compute(featurizer.collate({"input_ids": documents}))
        expected = alone.features.sum(0)
        assert (found.features[i] - expected).norm() <= 1e-6 * expected.norm()
        together = featurizer.compute(featurizer.collate({"input_ids": [ids]})).features[0]
        assert (together - expected).norm() > 1e-2 * expected.norm()  # what it would be if documents saw one another


@pytest.mark.parametrize("name", ["OPT", "BertLM"])
def test_a_model_that_lets_documents_see_one_another_is_refused(name: str):
    import transformers

    torch.manual_seed(0)
    if name == "OPT":
        sizes = {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 30, "init_std": 0.15}
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**{**TEXT, **SIZES, **sizes}))
    else:
        model = transformers.BertLMHeadModel(transformers.BertConfig(**TEXT, **SIZES, is_decoder=True))
    featurizer = Featurizer(model, TrakConfig(proj_dim=16))
    batch = featurizer.collate({"input_ids": PACKED_IDS, "seq_lengths": LENGTHS})
    with pytest.raises(ValueError, match=f"{type(model).__name__} does not keep them apart.* packing=False"):
        featurizer.compute(batch)
    single = {"input_ids": PACKED_IDS, "seq_lengths": [[6], [4]]}
    assert featurizer.compute(featurizer.collate(single)).features.abs().sum() > 0  # rows of one document each
    with pytest.raises(ValueError, match="does not keep them apart"):  # and packed ones that come later
        featurizer.compute(batch)


def test_packed_rows_share_a_batch_with_rows_of_one_document():
    task = AutoTask.from_model(LANGUAGE_MODELS["llama lm"]())
    rows = {"input_ids": PACKED_IDS, "position_ids": [[0, 1, 2, 3, 4, 5], POSITIONS[1]]}
    task.check(datasets.Dataset.from_dict(rows), None)
    batch = task.collate(rows, None)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [*POSITIONS[1], 0, 1]]
    assert "attention_mask" not in batch
    assert "attention_mask" in task.collate({key: values[:1] for key, values in rows.items()}, None)


@pytest.mark.parametrize(
    ("name", "columns", "options", "message"),
    [
        ("llama lm", {"seq_lengths": [[2, 3], [1, 3]]}, {}, "Row 0 cannot serve: its documents have 5 tokens by 'seq_lengths', but it has 6"),
        ("llama lm", {"seq_lengths": LENGTHS, "position_ids": [[0, 1, 2, 0, 1, 2], POSITIONS[1]]}, {}, "different documents are packed"),
        ("llama lm", {"position_ids": [[0, 1, 5, 6, 7, 8], POSITIONS[1]]}, {}, "go from 1 to 5 at token 2"),
        ("llama lm", {"position_ids": [[*row, 0] for row in POSITIONS]}, {}, r"'position_ids' of shape \(7,\)"),
        ("llama lm", {"seq_lengths": LENGTHS}, {"gradients": "functional"}, "use gradients='layerwise'"),
        ("bert mlm", {"position_ids": POSITIONS, "labels": PACKED_IDS}, {}, "2 of 2 rows cannot serve.*several packed documents"),
        ("t5", {"seq_lengths": LENGTHS, "labels": PACKED_IDS}, {}, "several packed documents"),
    ],
)  # fmt: skip
def test_packed_rows_that_cannot_be_served_are_refused(
    name: str, columns: dict[str, Any], options: dict[str, Any], message: str
):
    task = AutoTask.from_model(LANGUAGE_MODELS[name](), TrakConfig(**options))
    with pytest.raises(ValueError, match=message):
        task.check(datasets.Dataset.from_dict({"input_ids": PACKED_IDS, **columns}), None)


def test_the_batch_of_a_flattening_collator_is_no_row():
    from transformers import DataCollatorWithFlattening

    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)([{"input_ids": ids} for ids in IDS])
    rows = {key: [value.tolist()] for key, value in flat.items() if isinstance(value, Tensor) and value.ndim == 2}
    task = AutoTask.from_model(LANGUAGE_MODELS["llama lm"]())
    with pytest.raises(ValueError, match=r"its 'input_ids' have the shape \(1, 8\)"):
        task.check(datasets.Dataset.from_dict(rows), None)
    rows = {key: value[0] for key, value in rows.items()}
    task.check(datasets.Dataset.from_dict(rows), None)
    assert task.collate(rows, None)["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]


def test_a_recurrent_model_that_takes_no_positions_refuses_packed_rows():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="takes no position_ids"):
        AutoTask.from_model(model).check(datasets.Dataset.from_dict({"input_ids": PACKED_IDS, "seq_lengths": LENGTHS}), None)


# Rows without a scored token.

CHATS = [
    [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}],
    [{"role": "user", "content": "a b"}],
    [{"role": "user", "content": "a b a b a b a b"}, {"role": "assistant", "content": "c"}],
]


def test_all_rows_without_a_scored_token_are_told_at_once_with_the_reasons():
    task = AutoTask.from_model(LANGUAGE_MODELS["gpt2 lm"](), TrakConfig(loss_on="assistant", max_length=10))
    rows = datasets.Dataset.from_dict({"messages": [CHATS[0], CHATS[1], CHATS[2], CHATS[1], CHATS[0]]})
    with pytest.raises(ValueError, match="3 of 5 rows have no scored token") as caught:
        task.check(rows, word_tokenizer())
    message = str(caught.value)
    assert "Rows 1, 3 cannot serve: no token of it is scored: it has no turn of the assistant" in message
    assert "Row 2 cannot serve: all its scored tokens are cut away by max_length=10" in message
    assert "--skip_unscored" in message


@pytest.mark.parametrize(
    ("gradients", "reduction"),
    [
        ("layerwise", "mean"),
        ("functional", "sum"),
        ("layerwise", "exact"),
        pytest.param("layerwise", "sum", marks=pytest.mark.slow),
        pytest.param("functional", "mean", marks=pytest.mark.slow),
        pytest.param("functional", "exact", marks=pytest.mark.slow),
    ],
)
def test_skipped_rows_stay_in_place_with_zeros_and_leave_the_others_as_they_are(
    reduction: str, gradients: str, tmp_path: Path, caplog
):
    model = make_model("gpt2 lm")
    exact = {"token_reduction": "sum", "token_out_to_loss": "exact"} if reduction == "exact" else {"token_reduction": reduction}
    config = TrakConfig(proj_dim=16, damping=1.0, gradients=gradients, **exact)
    rows = [[5, 6, 7], [8], [9, 10, 11], [12, 13], []]
    labels = [[5, 6, 7], [8], [-100] * 3, [12, 13], []]
    features = datasets.Features({name: datasets.List(datasets.Value("int64")) for name in ("input_ids", "labels")})
    train = datasets.Dataset.from_dict({"input_ids": rows, "labels": labels}, features=features)
    with pytest.raises(ValueError, match="3 of 5 rows have no scored token"):
        AttributionIndex.build(tmp_path / "refused", models=model, dataset=train, config=config, progress=False)
    common = {"models": model, "config": TrakConfig(**{**config.to_dict(), "skip_unscored": True}), "progress": False}
    with caplog.at_level(logging.WARNING):
        index = AttributionIndex.build(tmp_path / "all", dataset=train, **common)
    assert "3 of 5 rows have no scored token and so features and scores of zero." in caplog.text
    columns = index.features()
    zero = [1, 2, 4]
    for name in ("trak_features", "trak_output", "trak_out_to_loss"):
        values = np.array(columns[name][:])
        assert np.isfinite(values).all()
        assert not values[zero].any()
    scores = index.score(train.select([0, 3]), progress=False)
    assert scores.shape == (5, 2)
    assert not scores[zero].any()
    alone = AttributionIndex.build(tmp_path / "kept", dataset=train.select([0, 3]), **common)
    np.testing.assert_allclose(
        np.array(alone.features()["trak_features"][:]), np.array(columns["trak_features"][:])[[0, 3]], rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="nothing to attribute"):
        index.score(train.select([1]), progress=False)


@pytest.mark.parametrize(
    "name", ["t5", "bert tokens", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert mlm", "bert qa"))]
)
def test_skipped_rows_of_other_tasks_have_gradients_of_zero(name: str):
    rows: dict[str, Any] = {"input_ids": [[5, 6, 7], [8, 9]], "labels": [[1, 2, 1], [-100, -100]]}
    if name == "bert qa":
        rows = {"input_ids": rows["input_ids"], "start_positions": [0, 5], "end_positions": [1, 6]}
    model = make_model(name)
    featurizer = Featurizer(model, TrakConfig(proj_dim=16, skip_unscored=True))
    featurizer.task.check(datasets.Dataset.from_dict(rows), None)
    found = featurizer.compute(featurizer.collate(rows))
    assert found.features[0].abs().sum() > 0
    assert found.features[1].abs().sum() == found.output[1] == found.out_to_loss[1] == 0


def test_rows_that_are_cut_are_counted_in_one_line(caplog):
    task = AutoTask.from_model(LANGUAGE_MODELS["gpt2 lm"](), TrakConfig(max_length=3))
    with caplog.at_level(logging.WARNING):
        task.check(datasets.Dataset.from_dict({"text": ["a b c d", "a", "a b c d e"]}), word_tokenizer())
    assert [record.message for record in caplog.records] == ["2 of 3 rows are cut at max_length=3, the first of them row 0."]
    for name, rows in {
        "t5": {"text": ["a b c d", "a"], "target": ["a", "b"]},
        "bert tokens": {"tokens": [["a"] * 4, ["a"]], "ner_tags": [[0] * 4, [1]]},
        "bert qa": {
            "question": ["a"] * 2,
            "context": ["b c d", "b"],
            "answers": [{"text": ["b"], "answer_start": [2 * 0]}] * 2,
        },
    }.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            task = AutoTask.from_model(LANGUAGE_MODELS[name](), TrakConfig(max_length=3))
            task.check(datasets.Dataset.from_dict(rows), word_tokenizer())
        assert [record.message for record in caplog.records] == [
            "1 of 2 rows are cut at max_length=3, the first of them row 0."
        ]


# Formats.

TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
UNSERVED: dict[str, tuple[dict[str, list[Any]], str]] = {
    "preference": ({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}, "preference format.*task=.preference.*completion"),
    "implicit preference": ({"chosen": ["b"], "rejected": ["c"]}, "preference format"),
    "conversational preference": ({"chosen": [CHATS[0]], "rejected": [CHATS[1]], "score": ["x"]}, "preference format"),
    "unpaired preference": ({"prompt": ["a"], "completion": ["b"], "label": [True]}, "unpaired preference format"),
    "stepwise": ({"prompt": ["a"], "completions": [["b"]], "labels": [[True]]}, "stepwise format"),
    "alpaca": ({"instruction": ["a"], "input": ["b"], "output": ["c"]}, "alpaca format.*'prompt' and 'completion'"),
    "alpaca without input": ({"instruction": ["a"], "output": ["c"]}, "alpaca format"),
    "sharegpt": ({"id": ["7"], "conversations": [TURNS]}, "ShareGPT format.*'messages'"),
}


@pytest.mark.parametrize("model", ["gpt2 lm", "t5", "bert mlm", "bert tokens", "bert qa"])
@pytest.mark.parametrize("name", UNSERVED)
def test_formats_that_are_not_served_are_named_with_a_way_out(name: str, model: str):
    rows, message = UNSERVED[name]
    task = AutoTask.from_model(LANGUAGE_MODELS[model]())
    with pytest.raises(ValueError, match=message) as caught:
        task.check(datasets.Dataset.from_dict(rows), word_tokenizer())
    assert "text_columns" not in str(caught.value)


@pytest.mark.parametrize("columns", [("question", "answer"), ("instruction", "response"), ("prompt", "response")])
def test_questions_with_answers_are_to_become_prompts_and_completions(columns: tuple[str, str]):
    task = AutoTask.from_model(LANGUAGE_MODELS["gpt2 lm"]())
    rows = datasets.Dataset.from_dict({columns[0]: ["a"], columns[1]: ["b"]})
    with pytest.raises(ValueError, match=f"Make 'prompt' and 'completion' of them.*{columns[1]}") as caught:
        task.check(rows, word_tokenizer())
    assert "text_columns" not in str(caught.value)


def test_the_way_out_of_sharegpt_leads_to_served_rows():
    task = AutoTask.from_model(LANGUAGE_MODELS["gpt2 lm"](), TrakConfig(loss_on="assistant"))
    dataset = datasets.Dataset.from_dict({"conversations": [TURNS]})
    with pytest.raises(ValueError, match="ShareGPT") as caught:
        task.check(dataset, word_tokenizer())
    scope = {"dataset": dataset}
    *before, last = str(caught.value).split("`")[1].split("; ")
    exec("; ".join(before), scope)
    task.check(eval(last, scope), word_tokenizer())


def test_alpaca_and_sharegpt_rows_are_read_as_stated():
    """As the completion of the template, and as messages with the roles of the chat template."""
    model, tokenizer = LANGUAGE_MODELS["gpt2 lm"](vocab_size=400, n_positions=400), byte_tokenizer()
    alpaca = datasets.Dataset.from_list([
        {"instruction": "Name it", "input": "a", "output": "b"}, {"instruction": "Go on", "input": "", "output": "c d"},
    ])  # fmt: skip
    begin = "Below is an instruction that describes a task"
    prompts = [
        f"{begin}, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName it\n\n### Input:\na\n\n### Response:\n",
        f"{begin}. Write a response that appropriately completes the request.\n\n### Instruction:\nGo on\n\n### Response:\n",
    ]
    plain = datasets.Dataset.from_dict({"prompt": prompts, "completion": alpaca["output"][:]})
    turns = [[*TURNS, {"from": "user", "value": "c"}, {"from": "chatgpt", "value": "d"}], TURNS]
    sharegpt = datasets.Dataset.from_dict({"conversations": turns, "system": ["e", ""]})
    roles = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant"}
    messages = [[{"role": roles[turn["from"]], "content": turn["value"]} for turn in row] for row in turns]
    messages[0].insert(0, {"role": "system", "content": "e"})
    for name, rows, same, loss_on in (
        ("alpaca", alpaca, plain, "auto"),
        ("alpaca", alpaca.remove_columns("input").select([1]), plain.select([1]), "completion"),
        ("sharegpt", sharegpt, datasets.Dataset.from_dict({"messages": messages}), "assistant"),
    ):
        task = AutoTask.from_model(model, TrakConfig(row_format=name, loss_on=loss_on))
        other = AutoTask.from_model(model, TrakConfig(loss_on=loss_on))
        task.check(rows, tokenizer)
        found, expected = task.collate(rows[:], tokenizer), other.collate(same[:], tokenizer)
        assert all(torch.equal(found[key], values) for key, values in expected.items())
    assert AutoTask.from_model(model, TrakConfig(row_format="alpaca")).columns_read(alpaca.features) == {
        "prompt": ["instruction", "input"], "completion": "output",
    }  # fmt: skip


@pytest.mark.parametrize(("row_format", "rows", "message"), [
    ("alpaca", {"instruction": ["a"], "response": ["b"]}, "reads 'instruction', 'output' and"),
    ("alpaca", {"instruction": ["a"], "output": ["b"], "history": ["c"]}, "'history', for which Alpaca's template has no place"),
    ("alpaca", {"instruction": ["a", "b"], "output": ["b", None]}, "its 'output' is None"),
    ("sharegpt", {"messages": [[{"role": "user", "content": "a"}]]}, "row_format='sharegpt' reads 'conversations'"),
    ("sharegpt", {"conversations": [[{"from": "observation", "value": "a"}]]}, "is from 'observation', and known are human"),
    ("sharegpt", {"conversations": [[{"from": "human", "value": None}]]}, "has the value None, not a text"),
    ("sharegpt", {"conversations": [[]]}, "not a list of turns"),
])  # fmt: skip
def test_rows_that_are_not_in_the_stated_format_are_refused(row_format: str, rows: dict[str, Any], message: str):
    task = AutoTask.from_model(LANGUAGE_MODELS["gpt2 lm"](), TrakConfig(row_format=row_format))
    with pytest.raises(ValueError, match=message):
        task.check(datasets.Dataset.from_dict(rows), word_tokenizer())


def test_a_stated_format_is_of_causal_language_models():
    with pytest.raises(ValueError, match="is for causal language models of texts: leave it out"):
        AutoTask.from_model(LANGUAGE_MODELS["t5"](), TrakConfig(row_format="alpaca"))
    with pytest.raises(ValueError, match="has no preferences"):
        AutoTask.from_model(LANGUAGE_MODELS["gpt2 lm"](), TrakConfig(task="preference", row_format="alpaca"))


def test_a_text_column_is_taken_before_others():
    task = AutoTask.from_model(LANGUAGE_MODELS["gpt2 lm"]())
    rows = datasets.Dataset.from_dict({"instruction": ["a"], "output": ["b"], "text": ["c d"]})
    task.check(rows, word_tokenizer())
    assert task.collate(rows[:], word_tokenizer())["input_ids"].tolist() == [[9, 10, 1]]
    assert task.columns_read(rows.features) == {"text": ["text"]}


def test_identifiers_are_no_texts():
    task = AutoTask.from_model(LANGUAGE_MODELS["gpt2 lm"]())
    rows = datasets.Dataset.from_dict({"id": ["b"], "body": ["c d"], "url": ["e"]})
    task.check(rows, word_tokenizer())
    assert task.columns_read(rows.features) == {"text": ["body"]}
    assert task.collate(rows[:], word_tokenizer())["input_ids"].tolist() == [[9, 10, 1]]
    with pytest.raises(ValueError, match="or one text column, but the dataset has id"):
        task.check(rows.select_columns("id"), word_tokenizer())


@pytest.mark.parametrize(
    ("model", "rows", "column"),
    [
        ("gpt2 lm", {"body": ["a b", None, "c d", None]}, "body"),
        ("gpt2 lm", {"text": ["a b", None, "c d", None]}, "text"),
        ("gpt2 lm", {"prompt": ["a b", None, "c d", None], "completion": [" a"] * 4}, "prompt"),
        ("gpt2 lm", {"messages": [CHATS[0], None, CHATS[0], None]}, "messages"),
        ("t5", {"text": ["a", "b", "c", "d"], "target": ["a", None, "b", None]}, "target"),
        ("bert tokens", {"tokens": [["a"], None, ["b"], None], "ner_tags": [[1]] * 4}, "tokens"),
        ("bert qa", {"question": ["a", None, "b", None], "context": ["c"] * 4, "answers": [{"text": ["c"], "answer_start": [0]}] * 4}, "question"),
    ],
)  # fmt: skip
def test_missing_texts_are_named_by_all_their_rows(model: str, rows: dict[str, list[Any]], column: str):
    task = AutoTask.from_model(LANGUAGE_MODELS[model]())
    with pytest.raises(ValueError, match=f"2 of 4 rows cannot serve. Rows 1, 3 cannot serve: its '{column}' .*None"):
        task.check(datasets.Dataset.from_dict(rows), word_tokenizer())


@pytest.mark.parametrize(
    ("loss_on", "rows", "message"),
    [
        ("assistant", {"text": ["a"]}, "loss_on='assistant' needs conversations"),
        ("assistant", {"prompt": ["a"], "completion": ["b"]}, "needs conversations, but its 'prompt' is a text"),
        ("completion", {"messages": [CHATS[0]]}, "loss_on='completion' needs the columns 'prompt' and 'completion'"),
        ("completion", {"input_ids": [[5, 6]]}, "or tokens with a 'completion_mask'"),
    ],
)
def test_what_cannot_be_scored_is_refused(loss_on: str, rows: dict[str, list[Any]], message: str):
    task = AutoTask.from_model(LANGUAGE_MODELS["gpt2 lm"](), TrakConfig(loss_on=loss_on))
    with pytest.raises(ValueError, match=message):
        task.check(datasets.Dataset.from_dict(rows), word_tokenizer())


# Positions.


def test_a_text_is_cut_at_the_positions_that_a_model_can_use():
    """RoBERTa's table of 20 positions begins behind the padding token's, so that it serves 18 tokens (19 where that is 0)."""
    import transformers

    for pad, limit in ((1, 18), (0, 19)):
        sizes = {**TEXT, **SIZES, "pad_token_id": pad, "max_position_embeddings": 20, "num_labels": 3}
        model = transformers.RobertaForTokenClassification(transformers.RobertaConfig(**sizes)).eval()
        task = AutoTask.from_model(model)
        batch = task.collate({"tokens": [["a"] * 30], "ner_tags": [[1] * 30]}, word_tokenizer())
        assert batch["input_ids"].shape == (1, limit)
        task.output_function(model, batch)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))
        rows = datasets.Dataset.from_dict({"input_ids": [[5] * (limit + 1)], "labels": [[1] * (limit + 1)]})
        with pytest.raises(ValueError, match=f"{limit + 1} tokens, more than the model's {limit} positions"):
            task.check(rows, None)


def test_language_models_that_do_not_shift_labels_are_masked_ones():
    from transformers import XLNetConfig, XLNetLMHeadModel

    model = XLNetLMHeadModel(XLNetConfig(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=24)).double().eval()
    task = AutoTask.from_model(model, TrakConfig(token_reduction="sum", token_out_to_loss="exact"))
    rows = {"input_ids": IDS[:1], "labels": [[1, -100, 2, 0, 1]]}
    output, _ = task.output_function(model, task.collate(rows, None))
    loss = model(**{key: torch.tensor(values) for key, values in rows.items()}).loss * 4
    trained = list(model.parameters())
    found, expected = (torch.autograd.grad(value.sum(), trained, allow_unused=True) for value in (output, loss))
    assert task.name == "masked-lm"
    assert_opposite(found, expected, 1e-6)


def test_a_model_without_a_limit_has_none():
    from transformers import XLNetConfig, XLNetForTokenClassification

    model = XLNetForTokenClassification(XLNetConfig(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=24, num_labels=3))
    assert model.config.max_position_embeddings == -1
    task = AutoTask.from_model(model)
    task.check(datasets.Dataset.from_dict({"input_ids": [[5] * 70], "labels": [[1] * 70]}), None)


# What is read.


@pytest.mark.parametrize(
    ("model", "columns", "options", "expected"),
    [
        ("gpt2 lm", ("id", "input_ids", "attention_mask", "labels"), {}, {"tokens": ["input_ids", "attention_mask"], "label": "labels"}),
        ("gpt2 lm", ("input_ids", "completion_mask"), {}, {"tokens": ["input_ids"], "label": "completion_mask"}),
        ("gpt2 lm", ("input_ids", "labels", "seq_lengths"), {}, {"tokens": ["input_ids", "seq_lengths"], "label": "labels"}),
        ("gpt2 lm", ("messages", "tools"), {}, {"messages": "messages", "tools": "tools"}),
        ("gpt2 lm", ("prompt", "completion", "id"), {}, {"prompt": "prompt", "completion": "completion"}),
        ("gpt2 lm", ("body", "id"), {"text_columns": ("body",)}, {"text": ["body"]}),
        ("t5", ("text", "target"), {}, {"text": ["text"], "label": "target"}),
        ("bert tokens", ("tokens", "ner_tags"), {}, {"text": ["tokens"], "label": "ner_tags"}),
        ("bert qa", ("question", "context", "answers"), {}, {"text": ["question", "context"], "label": "answers"}),
        ("bert qa", ("input_ids", "start_positions", "end_positions"), {}, {"tokens": ["input_ids"], "label": ["start_positions", "end_positions"]}),
    ],
)  # fmt: skip
def test_the_columns_that_are_read_are_told(
    model: str, columns: tuple[str, ...], options: dict[str, Any], expected: dict[str, Any]
):
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    assert AutoTask.from_model(LANGUAGE_MODELS[model](), TrakConfig(**options)).columns_read(features) == expected


def test_a_trainers_batch_has_the_same_inputs(tmp_path: Path):
    task = AutoTask.from_model(LANGUAGE_MODELS["llama lm"]())
    rows = [{"input_ids": ids, "seq_lengths": lengths} for ids, lengths in zip(PACKED_IDS, LENGTHS, strict=True)]
    batch: dict[str, Tensor] = TaskCollator(task)(rows)
    assert batch.keys() == {"input_ids", "position_ids", "labels"}
    assert batch["position_ids"].tolist() == [POSITIONS[0], [*POSITIONS[1], 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8, 9, 10], [-100, -100, 13, 14, -100, -100]]


QUESTION = {"context": ["the cat sat on the mat"] * 2, "question": ["who ?"] * 2}


def read_rows(model: str, columns: dict[str, list[Any]], tokenizer: Any = None, **config: Any) -> dict[str, Any]:
    dataset = datasets.Dataset.from_dict(columns)
    options = {"vocab_size": 300} if tokenizer is not None else {}
    task = AutoTask.from_model(LANGUAGE_MODELS[model](**options), TrakConfig(**config)).reading(dataset)
    task.check(dataset, tokenizer)
    batch = task.collate(dataset[:], tokenizer)
    return {**{name: values.tolist() for name, values in batch.items()}, "read": task.columns_read(dataset.features)}


def test_answers_in_a_list_are_those_in_two_lists():
    one = {**QUESTION, "answers": [[{"text": "cat", "answer_start": 4}, {"text": "the cat", "answer_start": 0}], []]}
    two = {**QUESTION, "answers": [{"text": ["cat"], "answer_start": [4]}, {"text": [], "answer_start": []}]}
    config = {"tokenizer": byte_tokenizer(), "max_length": 20}
    with pytest.raises(ValueError, match=r"answer 'cat' is cut off|leaves no room"):
        read_rows("bert qa", one, tokenizer=byte_tokenizer(), max_length=8)
    short = {name: [row[:9] if isinstance(row, str) else row for row in values] for name, values in one.items()}
    other = {name: [row[:9] if isinstance(row, str) else row for row in values] for name, values in two.items()}
    found, expected = read_rows("bert qa", short, **config), read_rows("bert qa", other, **config)
    assert found == expected
    assert found["start_positions"] == [9, 0]


@pytest.mark.parametrize("answers", [["cat", "cat"], [{"text": "cat", "answer_start": 4}] * 2, [[{"text": "cat"}]] * 2])
def test_answers_of_another_form_are_refused_by_row(answers: list[Any]):
    with pytest.raises(ValueError, match=r"Rows 0, 1 cannot serve: its answers must be lists 'text' and 'answer_start'"):
        read_rows("bert qa", {**QUESTION, "answers": answers}, tokenizer=byte_tokenizer())


def test_a_question_that_leaves_no_room_is_refused_by_row():
    rows = {"context": ["the cat"], "question": ["who " * 20], "answers": [{"text": ["cat"], "answer_start": [4]}]}
    with pytest.raises(
        ValueError, match=r"Row 0 cannot serve: its first text leaves no room for the second within .*20 positions"
    ):
        read_rows("bert qa", rows, tokenizer=byte_tokenizer())


def test_a_text_in_several_columns_is_not_read_in_part():
    rows = {"title": ["a"] * 2, **QUESTION, "answer": ["cat"] * 2}
    with pytest.raises(ValueError, match=r"texts in several columns \('question', 'context'\).*--text_columns question"):
        read_rows("t5", rows, tokenizer=byte_tokenizer())
    assert read_rows("t5", rows, tokenizer=byte_tokenizer(), text_columns=("question",))["read"]["text"] == ["question"]


def test_usual_names_win_where_a_text_has_others_beside_it():
    rows = {"hexsha": ["ab12"], "content": ["abc"], "repo_name": ["a/b"], "path": ["x.py"]}
    assert read_rows("llama lm", rows, tokenizer=byte_tokenizer())["read"] == {"text": ["content"]}
    with pytest.raises(ValueError, match="one text column"):
        read_rows("llama lm", {**rows, "title": ["abc"]}, tokenizer=byte_tokenizer())


def test_a_message_without_content_is_refused_by_row():
    turn = {"role": "user", "content": "a"}
    rows = {"messages": [[turn, {"role": "assistant", "content": "b"}], [turn, {"role": "assistant", "content": None}]]}
    with pytest.raises(ValueError, match=r"Row 1 cannot serve: message 1 of its 'messages' \(assistant\) has no content"):
        read_rows("llama lm", rows, tokenizer=byte_tokenizer())


@pytest.mark.parametrize("wrong", [-1, 60])
def test_ids_that_the_model_has_no_embedding_for_are_refused_by_row(wrong: int):
    rows = {"input_ids": [[3, 4, 5], [3, wrong, 5]], "labels": [[3, 4, 5], [3, 4, 5]]}
    for model in ("llama lm", "t5", "bert tokens"):
        labels = [[0, 1, 2]] * 2 if model == "bert tokens" else rows["labels"]
        with pytest.raises(ValueError, match=rf"Row 1 cannot serve: its input_ids must lie in 0 to 59.* one is {wrong}"):
            read_rows(model, {**rows, "labels": labels})


@pytest.mark.parametrize("wrong", [-1, 60])
def test_a_classifier_refuses_ids_that_it_has_no_embedding_for(wrong: int):
    rows = {"input_ids": [[3, 4, 5], [3, wrong], [4]], "label": [0, 1, 2]}
    task = AutoTask.from_model(bert())
    with pytest.raises(ValueError, match=rf"1 of 3 rows have token ids outside 0 to 59.* such as {wrong}: row 1"):
        task.check(datasets.Dataset.from_dict(rows), None)
    masked = datasets.Dataset.from_dict({**rows, "attention_mask": [[1, 1, 1], [1, 0], [1]]})
    task.check(masked, None)  # of padding, which is replaced


# Before work begins.


def opt() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 30, "init_std": 0.15}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**{**TEXT, **SIZES, **sizes}))


def test_packed_rows_behind_others_are_refused_before_anything_is_featurized_or_trained(tmp_path: Path, monkeypatch):
    from hf_trak import AttributionArguments, AttributionTrainer

    monkeypatch.setattr(Featurizer, "compute", lambda *_: pytest.fail("work has begun"))
    single = [[7, 8, 9, 10]] * 6
    rows = datasets.Dataset.from_dict(
        {"input_ids": [*single, *PACKED_IDS], "seq_lengths": [*[[len(ids)] for ids in single], *LENGTHS]}
    )
    message = "OPTForCausalLM does not keep them apart"
    with pytest.raises(ValueError, match=message):
        AttributionIndex.build(tmp_path / "index", models=opt(), dataset=rows, config=TrakConfig(proj_dim=16), progress=False)
    assert not (tmp_path / "index").exists()
    args = AttributionArguments(str(tmp_path / "out"), proj_dim=16, max_steps=1, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=message):
        AttributionTrainer(opt(), args, train_dataset=rows).train()


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_loss_of_transformers_classes_is_the_one_assumed(name: str, caplog):
    rows: dict[str, Any] = {"input_ids": [[5, 6, 7, 8], [8, 9]], "labels": [[1, -100, 1, 2], [2, 1]]}
    if name == "bert qa":
        rows = {"input_ids": rows["input_ids"], "start_positions": [1, 0], "end_positions": [2, 1]}
    featurizer = Featurizer(make_model(name), TrakConfig(proj_dim=16))
    with caplog.at_level(logging.WARNING):
        featurizer.check_first_rows(datasets.Dataset.from_dict(rows))
    assert caplog.text == ""


def test_a_model_that_fails_to_compute_its_own_loss_is_featurized():
    model = make_model("llama lm")
    model.loss_function = lambda **_: 1 / 0
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8]]})
    featurizer = Featurizer(model, TrakConfig(proj_dim=16))
    featurizer.check_first_rows(rows)
    assert featurizer.compute(featurizer.collate(rows[:])).features.abs().sum() > 0


def test_a_loss_with_an_addition_is_told_once(tmp_path: Path, caplog):
    from transformers import MixtralConfig, MixtralForCausalLM

    from hf_trak import AttributionArguments, AttributionTrainer

    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 60}
    model = MixtralForCausalLM(MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=0.5))
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 10, 11]], "labels": [[-100] * 3, [8, 9, 10, 11]]})
    config = TrakConfig(proj_dim=16, damping=1.0, skip_unscored=True)
    with caplog.at_level(logging.WARNING):
        AttributionIndex.build(tmp_path / "index", models=[model, model], dataset=rows, config=config, progress=False)
    assert caplog.text.count("The loss that MixtralForCausalLM itself computes for row 1") == 1
    assert "Task.custom" in caplog.text
    caplog.clear()
    options = {"proj_dim": 16, "skip_unscored": True, "max_steps": 1, "use_cpu": True, "report_to": "none"}
    with pytest.warns(UserWarning, match="output_router_logits"):
        AttributionTrainer(model, AttributionArguments(str(tmp_path / "out"), **options), train_dataset=rows).train()
    assert "The loss that MixtralForCausalLM itself computes for row 1" in caplog.text


@pytest.mark.parametrize(
    "name", ["t5", "bert qa", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2 lm", "bert tokens"))]
)
def test_a_batch_without_a_scored_token_has_a_loss_of_zero(name: str, tmp_path: Path):
    from hf_trak import AttributionArguments, AttributionTrainer

    rows: dict[str, Any] = {
        "input_ids": [[5, 6], [7, 8, 9]],
        "labels": [[3, -100] if name == "gpt2 lm" else [-100] * 2, [1, 2, 1]],
    }
    if name == "bert qa":
        rows = {"input_ids": rows["input_ids"], "start_positions": [9, 1], "end_positions": [9, 2]}
    options: dict[str, Any] = {"proj_dim": 16, "skip_unscored": True, "use_cpu": True, "report_to": "none"}
    args = AttributionArguments(str(tmp_path), per_device_train_batch_size=1, num_train_epochs=1, logging_steps=1, **options)
    model = make_model(name)
    trainer = AttributionTrainer(model, args, train_dataset=datasets.Dataset.from_dict(rows))
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset.select([0]))))
    model.eval()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    assert loss == 0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sorted(loss > 0 for loss in losses) == [False, True]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
