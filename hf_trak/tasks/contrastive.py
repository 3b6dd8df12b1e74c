r"""The contrastive task: how well a dual encoder tells an image and its caption from a frozen bank of others.

With $S_{ij} = s\,x_i^\top y_j$ between image $i$ and caption $j$ of the bank, its own pair left out, CLIP's output is

$$f = -\operatorname{logsumexp}_j(S_{ij} - S_{ii}) - \operatorname{logsumexp}_j(S_{ji} - S_{ii})$$

and out-to-loss is $1 - \frac12(\sigma(f_1) + \sigma(f_2))$ of its two terms, which is one minus the mean of the two softmaxes of the
training loss. Both are of the bank, at the model's own temperature.

SigLIP's loss asks of every pairing by itself whether it is right, with logits $z_{ij} = S_{ij} + b$. All of an example's pairings are
right with probability $p = \sigma(z_{ii}) \prod_j \sigma(-z_{ij}) \sigma(-z_{ji})$; the output is its log-odds $\log(p / (1 - p))$,
so that the loss is $\log(1 + e^{-f})$ as a classifier's is, and out-to-loss $1 - p$.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from hf_trak.tasks.base import Task
from hf_trak.tasks.outputs import sum_of_log_odds, sum_of_log_p
from hf_trak.tasks.pairs import Bank, PairInputs
from hf_trak.tasks.token_outputs import Reduced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_trak.config import TrakConfig


DUAL_ENCODERS = {
    "CLIPModel": "softmax",
    "MetaClip2Model": "softmax",
    "AltCLIPModel": "softmax",
    "CLIPSegModel": "softmax",
    "AlignModel": "softmax",
    "BlipModel": "softmax",
    "Tipsv2Model": "softmax",
    "ChineseCLIPModel": "softmax",
    "VisionTextDualEncoderModel": "softmax",
    "SiglipModel": "sigmoid",
    "Siglip2Model": "sigmoid",
}
"""Class -> the kind of its loss."""

REFUSED_ENCODERS = {
    "Blip2ForImageTextRetrieval": "an image has several embeddings, of which the best counts for each text",
    "VideoPrismClipModel": "it embeds videos, and the contrastive task reads images",
    "OwlViTModel": "it is trained to detect objects",
    "Owlv2Model": "it is trained to detect objects",
}
"""Class -> why no task serves it."""

DIRECTIONS = ("pair", "image", "caption")


def softmax_contrast(
    positive: Float[Tensor, "batch 1"],
    negatives: Sequence[Float[Tensor, "batch bank"]],
    own: Bool[Tensor, "batch bank"],
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return output and out-to-loss of CLIP's loss.

    Args:
        positive (`torch.Tensor`): Logits of the examples' own pairings.
        negatives (`Sequence[torch.Tensor]`): Logits of each image against the bank's captions, of each caption against its images, or
            both.
        own (`torch.Tensor`): Which of the bank are left out.
    """
    # Differs from the reference: logits are at the model's temperature, MadryLab/trak's f is without it.
    terms = [-(logits - positive).masked_fill(own, -torch.inf).logsumexp(1) for logits in negatives]
    return torch.stack(terms).sum(0), 1 - torch.stack(terms).detach().sigmoid().mean(0)


def sigmoid_contrast(
    positive: Float[Tensor, "batch 1"],
    negatives: Sequence[Float[Tensor, "batch bank"]],
    own: Bool[Tensor, "batch bank"],
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return output and out-to-loss of SigLIP's loss; arguments as in [`softmax_contrast`]."""
    loss = softplus(-positive).squeeze(1)
    for logits in negatives:
        loss = loss + softplus(logits).masked_fill(own, 0.0).sum(1)
    wrong = -torch.expm1(-loss)  # 1 - p, which underflows where the model is certain
    output = -loss - wrong.clamp_min(torch.finfo(wrong.dtype).tiny).log()
    return output, wrong.detach()


_CONTRASTS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"softmax": softmax_contrast, "sigmoid": sigmoid_contrast}


def _minus_loss(
    loss: str,
    positive: Float[Tensor, "batch 1"],
    negatives: Sequence[Float[Tensor, "batch bank"]],
    own: Bool[Tensor, "batch bank"],
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return minus the training loss and ones: CLIP's is the mean of two cross-entropies, SigLIP's one sum over all pairings."""
    parts = [[logits] for logits in negatives] if loss == "softmax" else [negatives]
    losses = [softplus(-_CONTRASTS[loss](positive, part, own)[0]) for part in parts]
    return -torch.stack(losses).mean(0), torch.ones(len(own), dtype=positive.dtype, device=positive.device)


@dataclass(frozen=True)
class ContrastiveOutput:
    """The model output function: `(model, batch) -> (output, out_to_loss)`. Of a row with several captions, the mean over them.

    Args:
        loss (`str`): softmax or sigmoid.
        scale, bias (`str`): The parameters' names; the bias is None for softmax.
        bank (`Bank`, *optional*): What examples are held against; a [`Featurizer`] makes it, or an index has it.
        direction (`str`): pair; or, for queries, image (against captions alone) or caption (against images alone).
        minus_loss (`bool`): Whether the output is minus the training loss against the bank, in place of f; out-to-loss is then 1.
        divides (`bool`): Whether the scale is a temperature that similarities are divided by (ALIGN), and not the logarithm of a factor.
    """

    loss: str
    scale: str
    bias: str | None
    image_names: tuple[str, ...]
    text_names: tuple[str, ...]
    bank: Bank | None = None
    direction: str = "pair"
    minus_loss: bool = False
    divides: bool = False

    def __call__(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self.bank is None:
            raise ValueError(
                "A contrastive task holds examples against a bank, and this Featurizer has none. Call `make_bank(train_dataset)` on "
                "it first, or take the Featurizer of an index: `index.featurizer()`."
            )
        images, captions = self.embed(model, batch)
        with torch.autocast(images.device.type, enabled=False):  # a temperature of 100 magnifies round-off
            scale = _as_column(model, self.scale, images)
            scale = 1 / scale if self.divides else scale.exp()
            bias = _as_column(model, self.bias, images) if self.bias is not None else None
            own = self.bank.owned_by(batch["pair_keys"])
            parts = [self._contrast(images, texts, own, scale, bias) for texts in captions]
            weights = batch["caption_weights"].to(images.dtype)
            output = sum(weights[:, slot] * part[0] for slot, part in enumerate(parts))
            out_to_loss = sum(weights[:, slot] * part[1] for slot, part in enumerate(parts))
        return output, out_to_loss  # type: ignore[return-value]

    def _contrast(
        self, images: Tensor, texts: Tensor, own: Tensor, scale: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert self.bank is not None
        against_captions = scale * (images @ self.bank.texts.to(images.dtype).T)
        against_images = scale * (texts @ self.bank.images.to(images.dtype).T)
        positive = scale * (images * texts).sum(1, keepdim=True)
        negatives = {"image": [against_captions], "caption": [against_images]}.get(
            self.direction, [against_captions, against_images]
        )
        if bias is not None:
            positive, negatives = positive + bias, [logits + bias for logits in negatives]
        if self.minus_loss:
            return _minus_loss(self.loss, positive, negatives, own)
        return _CONTRASTS[self.loss](positive, negatives, own)

    def embed(
        self, model: Any, batch: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "batch dim"], list[Float[Tensor, "batch dim"]]]:
        """Return the images' embeddings, and those of each slot of captions, of unit length."""
        images = model.get_image_features(**{name: batch[name] for name in self.image_names if name in batch})
        texts = {name: batch[name] for name in self.text_names if name in batch}
        n_slots = batch["caption_weights"].shape[1]
        # One caption at a time, so that a row of a tower's input is an example.
        slots = [
            model.get_text_features(**{name: values[:, slot] for name, values in texts.items()}) for slot in range(n_slots)
        ]
        return _unit(images), [_unit(embeddings) for embeddings in slots]


def _unit(embeddings: Any) -> Tensor:
    # transformers 5 returns an output whose `pooler_output` has been through the projection; earlier versions, a tensor.
    values: Tensor = embeddings if isinstance(embeddings, Tensor) else embeddings.pooler_output
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    return values / values.norm(dim=-1, keepdim=True)


def _as_column(model: Any, name: str, like: Tensor) -> Tensor:
    """Return a scalar parameter as (batch, 1), or (1, 1) where all examples share it."""
    return model.get_parameter(name).to(like.dtype).reshape(-1, 1)


def base_of(model: Any) -> Any:
    """Return the model under an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def is_dual_encoder(model: Any) -> bool:
    """Return whether the contrastive task serves a model."""
    return type(base_of(model)).__name__ in DUAL_ENCODERS


def contrastive_task(model: PreTrainedModel, config: TrakConfig) -> Task:
    """Return the contrastive task of a dual encoder, still without a bank."""
    base = base_of(model)
    architecture = type(base).__name__
    if architecture == "Siglip2Model" and config.gradients == "functional":
        raise ValueError(
            "Siglip2Model stretches its position embeddings to each image's own shape, which gradients='functional' cannot trace. Use "
            "gradients='layerwise'."
        )
    loss = DUAL_ENCODERS[architecture]
    inputs = PairInputs.for_model(base, config, fixed_length=loss == "sigmoid")
    names = {name.rpartition(".")[2]: name for name, _ in model.named_parameters()}  # an adapter's model puts more before it
    divides = "logit_scale" not in names
    scale = names["temperature" if divides else "logit_scale"]
    output = ContrastiveOutput(loss, scale, names.get("logit_bias"), inputs.image_names, inputs.text_names, divides=divides)
    return Task("contrastive", inputs, output, needs_labels=False, out_to_loss_kind="mean_one_minus_p")


def needs_bank(task: Task) -> bool:
    """Return whether a task holds examples against a bank."""
    return isinstance(task.output_function, ContrastiveOutput)


def bank_of(task: Task) -> Bank | None:
    """Return the bank of a task, if it has one."""
    return task.output_function.bank if isinstance(task.output_function, ContrastiveOutput) else None


def with_bank(task: Task, bank: Bank) -> Task:
    """Return the same task, held against a bank."""
    assert isinstance(task.output_function, ContrastiveOutput)
    return replace(task, output_function=replace(task.output_function, bank=bank))


def in_direction(task: Task, direction: str) -> Task:
    """Return the task for queries of one direction: pair, image or caption.

    Raises:
        ValueError: If there is no such direction, or the task has none.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"`direction` must be one of {', '.join(DIRECTIONS)}, but is {direction!r}.")
    if direction == "pair":
        return task
    if not isinstance(task.output_function, ContrastiveOutput):
        raise ValueError(f"`direction` is for the contrastive task, but this index was made for {task.name}.")
    return replace(task, output_function=replace(task.output_function, direction=direction))


def minus_loss(task: Task) -> Task:
    """Return the task whose output has the gradient of minus the training loss, for methods that compare gradients of losses.

    CLIP's loss is the mean of two, a language model's has its tokens' own 1 − p, and that of several labels has one 1 − p for each, so that
    these are not f times a number. Elsewhere it is f times out-to-loss.

    Raises:
        ValueError: If the loss cannot be had from the output.
    """
    function: Any = task.output_function
    if isinstance(function, ContrastiveOutput):
        return replace(task, output_function=replace(function, minus_loss=True))
    if isinstance(function, Reduced):
        exact: Any = replace(function, exact=True)
        return replace(task, output_function=exact)
    if function is sum_of_log_odds:
        return replace(task, output_function=sum_of_log_p)
    if task.out_to_loss_kind not in ("one_minus_p", "residual", "other"):
        raise ValueError(
            f"The gradient of the loss cannot be had from the output of {task.name}. Use the gradient of the output."
        )
    return replace(task, output_function=TimesOutToLoss(function))


@dataclass(frozen=True)
class TimesOutToLoss:
    """An output whose gradient is that of another, times its out-to-loss: minus that of the loss."""

    function: Callable[..., tuple[Tensor, Tensor]]

    def __call__(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        output, out_to_loss = self.function(model, batch)
        return output * out_to_loss.detach(), torch.ones_like(out_to_loss)


@torch.no_grad()
def embed_bank(task: Task, model: Any, batch: Mapping[str, Tensor], rows: Tensor) -> Bank:
    """Return a batch of pairs as a bank, embedded by `model` as it is.

    Args:
        rows (`torch.Tensor`): Where in the training set they are.
    """
    output = task.output_function
    assert isinstance(output, ContrastiveOutput)
    images, captions = output.embed(model, batch)
    return Bank(images.detach(), captions[0].detach(), batch["pair_keys"], rows.to(images.device))


@dataclass
class PairCollator:
    """Batches of pairs for training a dual encoder: the model's inputs, and the word that its own loss is wanted.

    The loss is the model's, over the pairs of the batch: for CLIP the mean of the cross-entropies of its rows and columns, for SigLIP
    the sigmoid loss of all its pairings. Of a row with several captions one is drawn, by torch's generator.

    Args:
        model (`PreTrainedModel`): A dual encoder.
        processing_class: Its processor.
    """

    model: PreTrainedModel
    config: TrakConfig
    processing_class: Any = None

    def __post_init__(self) -> None:
        self.inputs = contrastive_task(self.model, self.config).inputs

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.inputs.collate({key: [row[key] for row in rows] for key in rows[0]}, self.processing_class)
        drawn = torch.multinomial(batch.pop("caption_weights"), 1).squeeze(1)
        del batch["pair_keys"]
        assert isinstance(self.inputs, PairInputs)
        for name in self.inputs.text_names:
            if name in batch:
                batch[name] = batch[name][torch.arange(len(rows)), drawn]
        return {**batch, "return_loss": True}
