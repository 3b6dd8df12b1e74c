"""Which cases there are, and what becomes of one."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers.models.auto import modeling_auto

from tests.zoo import kits, sense_kits
from tests.zoo.models import build_model
from tests.zoo.reference import (
    ONE_MINUS_P_TOLERANCE,
    OUTPUT_TOLERANCE,
    ROW_TOLERANCE,
    Reference,
    distance,
    make_reference,
    take,
)

TASKS: dict[str, tuple[str, type[kits.Kit]]] = {
    "text-classification": ("SEQUENCE_CLASSIFICATION", kits.TextClassification),
    "token-classification": ("TOKEN_CLASSIFICATION", kits.TokenClassification),
    "question-answering": ("QUESTION_ANSWERING", kits.QuestionAnswering),
    "masked-lm": ("MASKED_LM", kits.MaskedLM),
    "causal-lm": ("CAUSAL_LM", kits.CausalLM),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM", kits.Seq2Seq),
    "image-classification": ("IMAGE_CLASSIFICATION", sense_kits.ImageClassification),
    "contrastive": ("ZERO_SHOT_IMAGE_CLASSIFICATION", sense_kits.Contrastive),
    "document-question-answering": ("DOCUMENT_QUESTION_ANSWERING", kits.QuestionAnswering),
    "multiple-choice": ("MULTIPLE_CHOICE", kits.MultipleChoice),
    "audio-classification": ("AUDIO_CLASSIFICATION", sense_kits.AudioClassification),
    "ctc": ("CTC", sense_kits.CTC),
    "speech-to-text": ("SPEECH_SEQ_2_SEQ", sense_kits.SpeechToText),
    "semantic-segmentation": ("SEMANTIC_SEGMENTATION", sense_kits.SemanticSegmentation),
    "image-text-to-text": ("IMAGE_TEXT_TO_TEXT", kits.Seq2Seq),  # of texts alone
}
"""By task: the automatic mapping of transformers whose classes are asked, and their kit."""

OUTCOMES = ("right", "refused", "no task", "crash", "silently wrong")
"""What becomes of a case whose model can be built. The others, "not built", count nowhere."""

_OTHER_BATCH = (0, 1, 2, 3, 0, 1, 2)  # the same rows in a batch of seven, which no size in a tiny model divides


class Case(NamedTuple):
    task: str
    model_type: str
    class_name: str


def all_cases(tasks: Sequence[str] = tuple(TASKS), only: Sequence[str] = ()) -> Iterator[Case]:
    """Yield the cases of some tasks; with `only`, those of some model types."""
    for task in tasks:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{TASKS[task][0]}_MAPPING_NAMES")
        for model_type, names in mapping.items():
            for class_name in names if isinstance(names, list | tuple) else [names]:
                if not only or model_type in only:
                    yield Case(task, model_type, class_name)


def run_case(case: Case) -> dict[str, Any]:
    """Return a record of one case: its outcome, the engine that made the gradients and why, and how far it is from the reference."""
    record: dict[str, Any] = {**case._asdict(), "outcome": "not built"}
    start = time.perf_counter()
    try:
        model = build_model(*case)
        kit = TASKS[case.task][1](model, case.model_type)
        rows = kit.rows()
        reference = make_reference(model, kit, rows)
    except Exception as error:
        return {**record, **_described(error)}
    record["reference"] = str(reference.dtype).removeprefix("torch.")
    record["loss_gap"] = reference.loss_gap
    try:
        record.update(_run(model, rows, reference, has_bank=case.task == "contrastive"))
    except Exception as error:
        record.update(_described(error), outcome=_outcome_of(error))
    return {**record, "seconds": round(time.perf_counter() - start, 1)}


def _run(model: Any, rows: Sequence[kits.Row], reference: Reference, *, has_bank: bool) -> dict[str, Any]:
    """Compute the features as an index does, once the columns and the engine are checked."""
    from hf_trak import Featurizer, TrakConfig

    dataset = Dataset.from_list(list(rows))
    config = TrakConfig(projector="identity", proj_dim=reference.grads.shape[1], bank_size=len(rows) if has_bank else None)
    featurizer = Featurizer(model, config, device="cpu")
    featurizer.check(dataset)
    if has_bank:
        featurizer.make_bank(dataset)
    engine = featurizer.choose_engine(dataset)
    features = featurizer.compute(featurizer.collate(dataset[:]))
    error, wrong = distance(features.features, reference)
    more = featurizer.compute(featurizer.collate(dataset[list(_OTHER_BATCH)]))
    other_error, other_wrong = distance(more.features, take(reference, _OTHER_BATCH))
    output_error = ((features.output.double() - reference.output).abs() / reference.output.abs().clamp_min(1e-3)).max()
    p_error = (features.out_to_loss.double() - reference.one_minus_p).abs().max()
    right = (
        max(error, other_error) < ROW_TOLERANCE
        and not wrong
        and not other_wrong
        and output_error < OUTPUT_TOLERANCE
        and p_error < ONE_MINUS_P_TOLERANCE
    )
    return {
        "outcome": "right" if right else "silently wrong",
        "served_as": featurizer.task.name,
        "engine": engine.name,
        "reason": engine.reason,
        "error": error,
        "error_in_another_batch": other_error,
        "wrong_parameters": list(dict.fromkeys([*wrong, *other_wrong]))[:10],
        "output_error": float(output_error),
        "one_minus_p_error": float(p_error),
    }


def _outcome_of(error: Exception) -> str:
    """Tell a refusal, which the package itself raises, from an error of whatever it calls."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if not isinstance(error, ValueError) or "/hf_trak/" not in frames[-1]:
        return "crash"
    return "no task" if frames[-1].endswith(("tasks/auto.py", "tasks/auto.py")) else "refused"


def _described(error: Exception) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/hf_trak/" in frame.filename and "site-packages" not in frame.filename]
    return {
        "message": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600],
        "at": [f"{frame.filename.rsplit('/hf_trak/', 1)[-1]}:{frame.lineno}" for frame in own[-1:]]
        + [f"{frames[-1].filename.rsplit('site-packages/', 1)[-1].rsplit('/hf_trak/', 1)[-1]}:{frames[-1].lineno}"],
    }


torch.set_num_threads(1)
