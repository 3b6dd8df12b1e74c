"""Tiny configurations of transformers' model types, found by the names of their fields.

`overrides.json` holds, by model type or by `type/task`, what these rules do not find, and what checkpoints on the Hub have where the
class's default differs, such as the relative attention of DeBERTa.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

N_LABELS = 3
VOCABULARY = 99
_HIDDEN, _FEED_FORWARD, _LAYERS, _HEADS, _KEY_VALUE_HEADS, _HEAD_DIM = 32, 48, 2, 4, 2, 8
_OVERRIDES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "overrides.json").read_text())

_WIDTHS = [
    "hidden_size",
    "d_model",
    "n_embd",
    "dim",
    "embed_dim",
    "hidden_dim",
    "emb_dim",
    "embedding_size",
    "encoder_hidden_dim",
    "encoder_hidden_size",
    "decoder_hidden_size",
    "word_embed_proj_dim",
    "projection_dim",
    "text_hidden_size",
    "output_hidden_size",
    "out_hidden_size",
    "lru_width",
    "projector_hidden_size",
    "projection_size",
    "pooler_output_size",
    "pooler_hidden_size",
    "image_text_hidden_size",
    "fusion_hidden_size",
    "prediction_head_size",
    "entity_emb_size",
    "output_dim",
    "project_dim",
    "mask_feature_size",
    "conv_dim_int",
    "reassemble_hidden_size",
    "neck_hidden_size",
    "text_projection_in_dim",
    "text_projection_out_dim",
    "class_embed_dim",
    "task_encoder_hidden_dim",
    "fpn_feature_size",
    "codebook_dim",
    "classifier_proj_size",
    "xvector_output_dim",
    "decoder_hidden_dim",
    "backbone_hidden_size",
]
_INNER_WIDTHS = [
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
    "n_inner",
    "ffn_hidden_size",
    "mlp_dim",
    "feed_forward_size",
    "d_inner",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "intermediate_size_mlp",
    "dense_intermediate_size",
    "dim_feedforward",
    "encoder_dim_feedforward",
    "decoder_dim_feedforward",
    "encoder_feedforward_dim",
    "dim_ff",
    "dff",
    "expert_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "decoder_intermediate_size",
    "shared_experts_intermediate_size",
    "share_expert_dim",
    "projection_intermediate_size",
]
_DEPTHS = [
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "decoder_num_hidden_layers",
    "encoder_num_hidden_layers",
    "decoder_num_layers",
    "layers",
    "l_layers",
    "x_layers",
    "r_layers",
    "num_self_attends_per_block",
    "speech_encoder_layers",
    "t2u_encoder_layers",
    "t2u_decoder_layers",
    "text_encoder_num_layers",
    "conf_num_hidden_layers",
    "num_pooler_layers",
    "num_spatial_layers",
    "num_temporal_layers",
    "num_auxiliary_layers",
    "pred_num_hidden_layers",
    "decoder_encoder_layers",
]
_HEAD_COUNTS = [
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "decoder_num_attention_heads",
    "num_self_attention_heads",
    "num_cross_attention_heads",
    "encoder_num_attention_heads",
    "decoder_self_attention_heads",
    "decoder_cross_attention_heads",
    "num_encoder_attention_heads",
    "num_decoder_attention_heads",
    "decoder_num_heads",
    "attention_heads",
    "speech_encoder_attention_heads",
    "t2u_encoder_attention_heads",
    "t2u_decoder_attention_heads",
    "conf_num_attention_heads",
    "swa_num_attention_heads",
    "pred_num_attention_heads",
    "num_sliding_attention_heads",
    "cross_num_attention_heads",
]
_KEY_VALUE_COUNTS = [
    "num_key_value_heads",
    "num_kv_heads",
    "kv_n_heads",
    "swa_num_key_value_heads",
    "num_key_value_attention_heads",
    "encoder_num_key_value_heads",
    "decoder_num_key_value_heads",
    "cross_num_key_value_heads",
    "num_query_groups",
]
_EXPERTS = ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"]
_CHOSEN_EXPERTS = ["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "num_selected_experts"]
_POSITIONS = [
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "n_ctx",
    "seq_len",
    "max_source_positions",
    "max_target_positions",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
    "left_max_position_embeddings",
]
_VALUES = {
    _HEAD_DIM: """head_dim d_kv d_head kv_channels v_head_dim swa_head_dim global_head_dim cross_head_dim dim_head swa_v_head_dim
        attention_head_dim qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state
        mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim mamba_chunk_size ssm_state_size chunk_size state_size
        attention_chunk_size num_buckets relative_attention_num_buckets num_conv_pos_embeddings num_codevectors_per_group num_latents
        attention_window laurel_rank hidden_size_per_layer_input o_lora_rank auxiliary_channels num_clusters stem_hidden_channels
        dim_model_base attention_head_size""",
    2: """linear_num_key_heads n_group num_expert_group index_n_heads num_conv_pos_embedding_groups altup_num_inputs
        num_landmarks""",
    4: """linear_num_value_heads linear_num_heads index_topk rotary_dim time_step_rank mamba_dt_rank block_size window_size
        num_frames segment_means_seq_len position_buckets shape_size""",
    16: """qk_head_dim kv_lora_rank q_lora_rank index_head_dim relative_attention_max_distance num_mel_bins n_mel_bins codevector_dim
        proj_codevector_dim aspp_out_channels head_hidden_size""",
    1: "topk_group first_k_dense_replace n_shared_experts num_random_blocks moe_layer_end_index max_window_layers",
    5: "sliding_window sliding_window_size",
    6: "local_attention attention_window_size num_queries coordinate_size",
    3: "num_feat_extract_layers",
    0: "num_kv_shared_layers mem_len num_denoising num_nextn_predict_layers",
    20: "entity_vocab_size",
    32: "d_latents",
    64: "image_size",
    VOCABULARY: "vocab_size_per_layer_input",
    1024: "max_2d_position_embeddings",
}
_VALUE_OF = {name: value for value, names in _VALUES.items() for name in names.split()}
_LISTS = {
    "depths": lambda values: [2 if i < 2 else 1 for i in range(len(values))],
    "hidden_sizes": lambda values: [8 * 2**i for i in range(len(values))],
    "num_heads": lambda values: [2 ** min(i, 2) for i in range(len(values))],
    "num_attention_heads": lambda values: [2 ** min(i, 2) for i in range(len(values))],
    "conv_dim": lambda values: [16, 16, 16],
    "conv_kernel": lambda values: [10, 3, 3],
    "conv_stride": lambda values: [5, 2, 2],
    "tdnn_dim": lambda values: [16, 16, 16, 16, 16],
    "neck_hidden_sizes": lambda values: [8 * 2 ** min(i, 3) for i in range(len(values))],
    "embed_dims": lambda values: [8 * (i + 1) for i in range(len(values))],
}
_LAYER_KINDS = ("layer_types", "mlp_layer_types", "indexer_types", "layers_block_type")
_LABELLED = ("text-classification", "token-classification", "image-classification", "audio-classification")


def tiny_config(model_type: str, task: str) -> PreTrainedConfig:
    """Return a configuration of a few thousand parameters, with a layer of every kind that the class's default has."""
    cls = CONFIG_MAPPING[model_type]
    fields = _merge(_tiny_fields(cls), _OVERRIDES.get(model_type, {}))
    fields = _merge(fields, _OVERRIDES.get(f"{model_type}/{task}", {}))
    if task in _LABELLED:
        fields["num_labels"] = N_LABELS
    config = cls(**fields)
    if task == "text-classification":
        text = config.get_text_config()
        for part in {id(config): config, id(text): text}.values():
            if getattr(part, "pad_token_id", None) is None:
                part.pad_token_id = 0
    return config


def _tiny_fields(cls: type[PreTrainedConfig], given: dict[str, Any] | None = None) -> dict[str, Any]:
    default = cls(**(given or {}))
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    declared = getattr(cls, "__dataclass_fields__", {})
    fields = _layers_of_every_kind(values, declared)
    for name, value in values.items():
        if name in fields:
            continue
        if value is None and name in declared and name in ("head_dim", "num_key_value_heads"):
            fields[name] = _HEAD_DIM if name == "head_dim" else _KEY_VALUE_HEADS
        elif isinstance(value, list | tuple) and (name in _LISTS or name == "image_size"):
            fields[name] = _LISTS[name](value) if name in _LISTS else [64, 64]
        elif isinstance(value, int) and not isinstance(value, bool):
            small = _small(name, value, values)
            if small is not None:
                fields[name] = small
    if values.get("n_group") == 1:
        fields["n_group"] = 1
    return {**fields, **_parts(cls, values)}


def _layers_of_every_kind(values: dict[str, Any], declared: dict[str, Any]) -> dict[str, Any]:
    kinds = {
        name: list(dict.fromkeys(values[name]))
        for name in _LAYER_KINDS
        if name in declared and isinstance(values.get(name), list | tuple)
    }
    if not kinds:
        return {}
    n_layers = max(_LAYERS, *map(len, kinds.values()))
    return {**{name: (found * n_layers)[:n_layers] for name, found in kinds.items()}, "num_hidden_layers": n_layers}


def _small(name: str, value: int, values: dict[str, Any]) -> int | None:
    """Return a small value of an integer field; None to leave the default."""
    if name.endswith("vocab_size") and "type_vocab" not in name and name not in _VALUE_OF and value > 8:
        return VOCABULARY
    if name in _WIDTHS:
        return _HIDDEN
    if name in _INNER_WIDTHS:
        return _FEED_FORWARD if value else value
    if name in _DEPTHS:
        return min(value, _LAYERS)
    if name in _HEAD_COUNTS:
        return _HEADS if value > 1 else value
    if name in _KEY_VALUE_COUNTS:
        heads = values.get("num_attention_heads") or values.get("n_heads") or values.get("num_heads")
        return 1 if value == 1 else (_HEADS if value == heads else _KEY_VALUE_HEADS)
    if name in _EXPERTS:
        return min(value, 8 if "n_group" in values else 4)
    if name in _CHOSEN_EXPERTS:
        return min(value, 2)
    if name in _POSITIONS:
        return min(value, 64) if value > 0 else value
    if name == "patch_size":
        return 16 if value > 8 else value
    if name in _VALUE_OF:
        return _VALUE_OF[name] if value > 1 or name == "linear_num_key_heads" else value
    if re.search(r"token_(id|index)$|_id$|_index$|_token$", name) and value >= VOCABULARY:
        return 85 + sum(map(ord, name)) % 13
    return None


def _parts(cls: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    """Return small configurations of the parts of a composite model, such as its text and its vision tower."""
    parts = {}
    for name, spec in (getattr(cls, "sub_configs_defaults", None) or {}).items():
        if values.get(name) is None and getattr(spec, "optional", False):
            continue
        part, given = (spec, {}) if isinstance(spec, type) else (type(spec.default_config), dict(spec.init_kwargs))
        kind = getattr(part, "model_type", "")
        try:
            fields = {**given, **_tiny_fields(part, given), **_OVERRIDES.get(kind, {})}
        except Exception:  # a class with no default: the composite's own default serves
            continue
        if kind and not isinstance(spec, type):
            fields["model_type"] = kind
        parts[name] = fields
    return parts


def _merge(fields: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for name, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged
