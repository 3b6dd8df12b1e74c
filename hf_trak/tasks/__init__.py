"""What a model's output is, per task: finding its fields in a dataset, f(z; θ) per example, and its out-to-loss."""

from hf_trak.tasks.annotation_inputs import SpanInputs, TokenLabelInputs
from hf_trak.tasks.auto import TASKS, AutoTask, is_language_model
from hf_trak.tasks.base import TARGET_COLUMN, Task, TaskCollator
from hf_trak.tasks.contrastive import (
    PairCollator,
    bank_of,
    contrastive_task,
    embed_bank,
    in_direction,
    is_dual_encoder,
    minus_loss,
    needs_bank,
    with_bank,
)
from hf_trak.tasks.image_inputs import ImageInputs
from hf_trak.tasks.inputs import CustomInputs, Inputs, TextInputs
from hf_trak.tasks.language_inputs import CausalInputs, MaskedInputs, Seq2SeqInputs
from hf_trak.tasks.named import NamedTaskMaker, TaskMaker, import_task, make_task
from hf_trak.tasks.outputs import classification_margin, margin, regression_prediction, vmappable_attention
from hf_trak.tasks.pairs import Bank, PairInputs, draw_rows
from hf_trak.tasks.token_inputs import TokenInputs
from hf_trak.tasks.token_outputs import SpanOutput, TokenOutput, token_margins

__all__ = [
    "TARGET_COLUMN",
    "TASKS",
    "AutoTask",
    "Bank",
    "CausalInputs",
    "CustomInputs",
    "ImageInputs",
    "Inputs",
    "MaskedInputs",
    "NamedTaskMaker",
    "PairCollator",
    "PairInputs",
    "Seq2SeqInputs",
    "SpanInputs",
    "SpanOutput",
    "Task",
    "TaskCollator",
    "TaskMaker",
    "TextInputs",
    "TokenInputs",
    "TokenLabelInputs",
    "TokenOutput",
    "bank_of",
    "classification_margin",
    "contrastive_task",
    "draw_rows",
    "embed_bank",
    "import_task",
    "in_direction",
    "is_dual_encoder",
    "is_language_model",
    "make_task",
    "margin",
    "minus_loss",
    "needs_bank",
    "regression_prediction",
    "token_margins",
    "vmappable_attention",
    "with_bank",
]
