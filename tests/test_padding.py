"""How many tokens a model has positions for, and columns with a value per token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from hf_trak.tasks.padding import extra_columns, has_learned_positions, pad_tokens, position_limit

SMALL = {
    "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "limit", "learned"),
    [
        ("Roberta", {"max_position_embeddings": 34}, 32, True),
        ("Roberta", {"max_position_embeddings": 34, "pad_token_id": 3}, 30, True),
        ("XLMRoberta", {"max_position_embeddings": 34}, 32, True),
        ("MPNet", {"max_position_embeddings": 34}, 32, True),
        ("IBert", {"max_position_embeddings": 34}, 32, True),
        ("Longformer", {"max_position_embeddings": 34, "attention_window": 4}, 32, True),
        ("Bert", {"max_position_embeddings": 34}, 34, True),
        ("Llama", {"max_position_embeddings": 34}, 34, False),
        ("Llama", {"max_position_embeddings": 10**12}, None, False),
        ("XLNet", {"d_model": 8, "n_layer": 1, "n_head": 1, "d_inner": 8}, None, False),
    ],
)
def test_the_limit_is_what_the_model_itself_survives(name: str, options: dict, limit: int | None, learned: bool):
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **options})
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    assert position_limit(model) == limit
    assert has_learned_positions(model) is learned
    if limit is None or not learned:
        return
    ids = torch.full((1, limit), 7)
    assert model(input_ids=ids).logits.isfinite().all()
    if name != "Longformer":  # pads to its window, which hides the error
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 7))


def test_tables_that_skip_rows_by_an_offset_serve_what_the_configuration_states():
    config = transformers.BartConfig(
        vocab_size=50, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1,
        encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
    )  # fmt: skip
    assert position_limit(transformers.BartForConditionalGeneration(config)) == 16


def test_values_per_token_are_padded_on_the_token_axis_whatever_their_shape():
    boxes = [np.arange(12).reshape(3, 4), np.arange(4).reshape(1, 4)]
    padded = pad_tokens(boxes)
    assert padded.dtype == torch.int64
    assert padded.tolist() == [boxes[0].tolist(), [[0, 1, 2, 3], [0] * 4, [0] * 4]]
    assert pad_tokens([np.array([1.5]), np.array([2.0, 3.0])], fill=-1).tolist() == [[1.5, -1.0], [2.0, 3.0]]
    with pytest.raises(ValueError, match=r"one shape, but have \(2,\), \(3,\)"):
        pad_tokens([np.zeros((1, 2)), np.zeros((1, 3))])


def test_columns_named_like_an_option_of_the_model_are_refused():
    accepted = frozenset({"input_ids", "bbox", "use_cache"})
    assert extra_columns(["text", "input_ids", "bbox"], accepted, ["input_ids"]) == ["bbox"]
    with pytest.raises(ValueError, match="'use_cache' has the name of an argument"):
        extra_columns(["input_ids", "use_cache"], accepted, ["input_ids"])
