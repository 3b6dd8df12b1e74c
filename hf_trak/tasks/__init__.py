"""What a model's output is, per task: finding its fields in a dataset, f(z; θ) per example, and its out-to-loss."""

from hf_trak.tasks.attention import vmappable_attention
from hf_trak.tasks.auto import TASKS, AutoTask
from hf_trak.tasks.base import Task
from hf_trak.tasks.inputs import CustomInputs, ImageInputs, Inputs, TextInputs
from hf_trak.tasks.outputs import classification_margin, margin, regression_prediction

__all__ = [
    "TASKS",
    "AutoTask",
    "CustomInputs",
    "ImageInputs",
    "Inputs",
    "Task",
    "TextInputs",
    "classification_margin",
    "margin",
    "regression_prediction",
    "vmappable_attention",
]
