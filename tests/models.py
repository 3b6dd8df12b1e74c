"""Tiny random models of each kind, and batches for them. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

VOCAB_SIZE = 60
PAD = 0
N_CLASSES = 3

_TEXT = {"vocab_size": VOCAB_SIZE, "num_labels": N_CLASSES, "pad_token_id": PAD, "initializer_range": 0.15}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert(**options: object) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**{**_TEXT, **_TRANSFORMER, "max_position_embeddings": 20, **options}))


def distilbert(**options: object) -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 20}
    return DistilBertForSequenceClassification(DistilBertConfig(**{**_TEXT, **sizes, **options}))


def albert(**options: object) -> nn.Module:
    """Both layers are one module, called twice."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    sizes = {**_TRANSFORMER, "embedding_size": 8, "max_position_embeddings": 20}
    return AlbertForSequenceClassification(AlbertConfig(**{**_TEXT, **_IDS, **sizes, **options}))


def gpt2(**options: object) -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20}
    return GPT2ForSequenceClassification(GPT2Config(**{**_TEXT, **_IDS, **sizes, **options}))


def llama(**options: object) -> nn.Module:
    """With an RMSNorm class of its own."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {**_TRANSFORMER, "max_position_embeddings": 20}
    return LlamaForSequenceClassification(LlamaConfig(**{**_TEXT, **_IDS, **sizes, **options}))


def roberta(**options: object) -> nn.Module:
    """Its position ids are counted from the padding."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {**_TRANSFORMER, "max_position_embeddings": 20}
    return RobertaForSequenceClassification(RobertaConfig(**{**_TEXT, **_IDS, **sizes, **options}))


def modernbert(**options: object) -> nn.Module:
    """Rotary positions, alternating attention, no biases."""
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    ids = {**_IDS, "cls_token_id": 1, "sep_token_id": 2}
    return ModernBertForSequenceClassification(ModernBertConfig(**{**_TEXT, **ids, **_TRANSFORMER, **options}))


def convnext(**options: object) -> nn.Module:
    """Depthwise convolutions, and bare layer scales."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    sizes = {"hidden_sizes": [6, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "num_labels": N_CLASSES}
    return ConvNextForImageClassification(ConvNextConfig(**{**sizes, **options}))


def dinov2(**options: object) -> nn.Module:
    """Class and mask tokens, layer scales."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    sizes = {**_TRANSFORMER, "image_size": 8, "patch_size": 4, "num_labels": N_CLASSES}
    return Dinov2ForImageClassification(Dinov2Config(**{**sizes, **options}))


def vit(**options: object) -> nn.Module:
    """Its class token and position embeddings are bare parameters."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {**_TRANSFORMER, "image_size": 8, "patch_size": 4, "num_labels": N_CLASSES, "initializer_range": 0.15}
    return ViTForImageClassification(ViTConfig(**{**sizes, **options}))


def resnet(**options: object) -> nn.Module:
    """With BatchNorm statistics that are not those of an untrained model."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 6, "hidden_sizes": [6, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": N_CLASSES}
    return as_if_trained(ResNetForImageClassification(ResNetConfig(**{**sizes, **options})))


def resnet9(**options: object) -> nn.Module:
    from paper_models import ResNet9Config, ResNet9ForImageClassification

    return as_if_trained(ResNet9ForImageClassification(ResNet9Config(**{"width": 3, "num_labels": N_CLASSES, **options})))


def as_if_trained(model: nn.Module) -> nn.Module:
    """Give BatchNorm statistics, scales and shifts that are not those of an untrained model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    return model


def swin() -> nn.Module:
    """Its relative position bias is computed once for the whole batch."""
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 2}
    return SwinForImageClassification(SwinConfig(**sizes, num_labels=N_CLASSES))


class Tied(nn.Module):
    """One matrix embeds tokens and, transposed, reads the classes; one Linear is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCAB_SIZE, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = self.embedding(input_ids)
        hidden = self.mix(self.mix(hidden).tanh()).tanh() * attention_mask.unsqueeze(-1)
        return SimpleNamespace(logits=self.head(hidden.sum(1)))


_T5 = {
    "vocab_size": VOCAB_SIZE, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "pad_token_id": PAD,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6, "decoder_start_token_id": PAD, "eos_token_id": 1,
}  # fmt: skip


def t5(**options: object) -> nn.Module:
    """A relative attention bias computed once for the batch; one matrix for both embeddings and the head."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(**{**_T5, **options}))


def mt5(**options: object) -> nn.Module:
    """With a head of its own, as the published weights have, and a gated feed-forward layer."""
    from transformers import MT5Config, MT5ForConditionalGeneration

    model = MT5ForConditionalGeneration(MT5Config(**{**_T5, "feed_forward_proj": "gated-gelu", **options}))
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def bart(**options: object) -> nn.Module:
    """Embeddings that are scaled, and positions that the module counts."""
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 20, "scale_embedding": True,
        "decoder_start_token_id": 2, "vocab_size": VOCAB_SIZE, "pad_token_id": PAD,
    }  # fmt: skip
    return BartForConditionalGeneration(BartConfig(**{**_IDS, **sizes, **options}))


def gpt2_lm(**options: object) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCAB_SIZE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20, "pad_token_id": PAD}
    return GPT2LMHeadModel(GPT2Config(**{**_IDS, **sizes, **options}))


def llama_lm(**options: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**_TRANSFORMER, "max_position_embeddings": 20, "vocab_size": VOCAB_SIZE, "pad_token_id": PAD}
    return LlamaForCausalLM(LlamaConfig(**{**_IDS, **sizes, **options}))


def qwen3_lm(**options: object) -> nn.Module:
    """Keys shared by heads, norms of queries and keys, and a tied head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {**_TRANSFORMER, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": VOCAB_SIZE, "pad_token_id": PAD}
    return Qwen3ForCausalLM(Qwen3Config(**{**_IDS, **sizes, "tie_word_embeddings": True, **options}))


def qwen2_lm(**options: object) -> nn.Module:
    """Queries, keys and values with a bias, and keys shared by heads."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {**_TRANSFORMER, "num_key_value_heads": 1, "vocab_size": VOCAB_SIZE, "pad_token_id": PAD}
    return Qwen2ForCausalLM(Qwen2Config(**{**_IDS, **sizes, **options}))


def _bert_as(kind: str) -> Callable[..., nn.Module]:
    def make(**options: object) -> nn.Module:
        import transformers

        options = {"num_labels": 2, **options} if kind.endswith("QuestionAnswering") else options
        config = transformers.BertConfig if kind.startswith("Bert") else transformers.RobertaConfig
        return getattr(transformers, kind)(config(**{**_TEXT, **_TRANSFORMER, "max_position_embeddings": 20, **options}))

    return make


LANGUAGE_MODELS: dict[str, Callable[..., nn.Module]] = {
    "t5": t5,
    "mt5": mt5,
    "bart": bart,
    "gpt2 lm": gpt2_lm,
    "llama lm": llama_lm,
    "qwen2 lm": qwen2_lm,
    "qwen3 lm": qwen3_lm,
    "bert mlm": _bert_as("BertForMaskedLM"),
    "roberta mlm": _bert_as("RobertaForMaskedLM"),
    "bert qa": _bert_as("BertForQuestionAnswering"),
    "bert tokens": _bert_as("BertForTokenClassification"),
}
TEXT_MODELS: dict[str, Callable[..., nn.Module]] = {
    "bert": bert,
    "distilbert": distilbert,
    "albert": albert,
    "gpt2": gpt2,
    "llama": llama,
    "roberta": roberta,
    "modernbert": modernbert,
    "tied": Tied,
}
IMAGE_MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": vit,
    "resnet": resnet,
    "resnet9": resnet9,
    "convnext": convnext,
    "dinov2": dinov2,
}
MODELS = TEXT_MODELS | IMAGE_MODELS


def make_model(name: str, *, seed: int = 0) -> nn.Module:
    """Return a model in training mode, every parameter trainable and none of them zero."""
    torch.manual_seed(seed)
    model = (MODELS | LANGUAGE_MODELS)[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def text_batch(*, padding: str = "right", n_rows: int = 5, width: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Return rows of lengths width, width − 1, ..., padded on the side named."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (n_rows, width), generator=generator)
    lengths = width - torch.arange(n_rows) % (width - 1)
    mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
    if padding == "left":
        mask = mask.flip(1)
    labels = torch.randint(0, N_CLASSES, (n_rows,), generator=generator)
    return {"input_ids": ids.where(mask.bool(), PAD), "attention_mask": mask, "labels": labels}


def image_batch(*, n_rows: int = 5, size: int = 8, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n_rows, 3, size, size, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, N_CLASSES, (n_rows,), generator=generator)}


def make_batch(name: str, **options: object) -> dict[str, Tensor]:
    return text_batch(**options) if name in TEXT_MODELS else image_batch(size=16 if "resnet" in name else 8, **options)


# Dual encoders.

_TOWER = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}
_CAPTIONS = {**_TOWER, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 10, "pad_token_id": PAD}
_PICTURES = {**_TOWER, "image_size": 8, "patch_size": 4}


def clip(**options: object) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    ids = {"bos_token_id": 1, "eos_token_id": 3}
    return CLIPModel(CLIPConfig(text_config={**_CAPTIONS, **ids}, vision_config=_PICTURES, projection_dim=12, **options))


def chinese_clip(**options: object) -> nn.Module:
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    return ChineseCLIPModel(ChineseCLIPConfig(text_config=_CAPTIONS, vision_config=_PICTURES, projection_dim=12, **options))


def siglip(**options: object) -> nn.Module:
    """A sigmoid loss with a bias; its images are pooled by an attention whose weights are bare parameters."""
    from transformers import SiglipConfig, SiglipModel

    captions = {**_CAPTIONS, "projection_size": 16, "bos_token_id": 1, "eos_token_id": 3}
    return SiglipModel(SiglipConfig(text_config=captions, vision_config=_PICTURES, **options))


def siglip2(**options: object) -> nn.Module:
    """Images are patches, of shapes of their own; position embeddings are stretched to each."""
    from transformers import Siglip2Config, Siglip2Model

    captions = {**_CAPTIONS, "projection_size": 16, "bos_token_id": 1, "eos_token_id": 3}
    pictures = {**_TOWER, "num_patches": 9, "patch_size": 2}
    return Siglip2Model(Siglip2Config(text_config=captions, vision_config=pictures, **options))


def vision_text(**options: object) -> nn.Module:
    from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, VisionTextDualEncoderModel

    captions = BertModel(BertConfig(**{**_CAPTIONS, "initializer_range": 0.15}))
    return VisionTextDualEncoderModel(vision_model=Dinov2Model(Dinov2Config(**_PICTURES)), text_model=captions)


DUAL_ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "clip": clip,
    "chinese_clip": chinese_clip,
    "siglip": siglip,
    "siglip2": siglip2,
    "vision_text": vision_text,
}


def make_dual_encoder(name: str, *, seed: int = 0) -> nn.Module:
    """Return a model in training mode, every parameter trainable and none of them zero."""
    torch.manual_seed(seed)
    model = DUAL_ENCODERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.logit_scale.fill_(1.3)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-2.0)
    return model


def pair_columns(name: str, n_rows: int = 6, *, seed: int = 0) -> dict[str, list]:
    """Return rows for a dual encoder: pixels, and captions of different lengths that end as CLIP's do."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + row % 5 for row in range(n_rows)]
    ids = [[*torch.randint(4, VOCAB_SIZE, (length,), generator=generator).tolist(), 3] for length in lengths]
    if name != "siglip2":
        return {"pixel_values": torch.randn(n_rows, 3, 8, 8, generator=generator).tolist(), "input_ids": ids}
    shapes = torch.tensor([[2, 3], [3, 2], [2, 2]])[torch.arange(n_rows) % 3]
    mask = (torch.arange(6) < shapes.prod(1, keepdim=True)).long()
    pixels = torch.randn(n_rows, 6, 12, generator=generator)
    extra = {"pixel_attention_mask": mask.tolist(), "spatial_shapes": shapes.tolist()}
    return {"pixel_values": pixels.tolist(), **extra, "input_ids": ids}


def plan_for(model: nn.Module, batch, output_function, parameters):
    """How a model calls its modules, learned from a batch as the start of a run learns it; what fails the check is raised."""
    from hf_trak.gradients import check_gradients

    n_rows = next(len(value) for value in batch.values() if isinstance(value, Tensor))

    def collate(numbers):
        rows = [number % n_rows for number in numbers]
        return {key: value[rows] if isinstance(value, Tensor) else value for key, value in batch.items()}

    return check_gradients(model, collate, max(2, n_rows), output_function=output_function, parameters=parameters)
