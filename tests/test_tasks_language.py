"""Language models: outputs against a float64 loop, and rows of every kind that users have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from models import LANGUAGE_MODELS, PAD, VOCAB_SIZE, make_model, plan_for
from reference import gradient_loop
from tokenizers_for_tests import word_tokenizer
from torch import Tensor, nn

from hf_trak.config import TrakConfig
from hf_trak.gradients import GRADIENTS, check_gradients, select_parameters
from hf_trak.projectors import Identity
from hf_trak.tasks import AutoTask, Task, token_margins, token_outputs, vmappable_attention

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented the batching rule"
)

IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]
N_CLASSES = 3
VARIANTS = ("mt5", "qwen2 lm", "qwen3 lm", "roberta mlm")  # of models that are there
EACH_MODEL = [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in LANGUAGE_MODELS]


def rows_for(task: Task) -> dict[str, list[Any]]:
    """Return rows with some tokens unscored, and targets of other lengths than inputs."""
    if task.name == "question-answering":
        return {"input_ids": IDS, "start_positions": [1, 0, 2], "end_positions": [4, 0, 3]}
    below = N_CLASSES if task.name == "token-classification" else VOCAB_SIZE
    labels = [[-100 if j % 3 == 0 else (7 * i) % below for j, i in enumerate(ids)] for ids in IDS]
    if task.name == "seq2seq":
        labels = [[20, -100, 21], [22, 23, 24, 25, 1], [26]]
    return {"input_ids": IDS, "labels": labels}


def padded(rows: Mapping[str, list[Any]], side: str, width: int) -> dict[str, list[Any]]:
    """Pad as transformers' collators do: labels with -100, positions of answers moved along."""

    def pad(values: list[int], fill: int) -> list[int]:
        more = [fill] * (width - len(values))
        return more + values if side == "left" else values + more

    result: dict[str, list[Any]] = {"attention_mask": [pad([1] * len(ids), 0) for ids in rows["input_ids"]]}
    for key, values in rows.items():
        if key.endswith("positions"):
            shifts = [width - len(ids) if side == "left" else 0 for ids in rows["input_ids"]]
            result[key] = [value + shift for value, shift in zip(values, shifts, strict=True)]
        else:
            result[key] = [pad(row, PAD if key == "input_ids" else -100) for row in values]
    return result


def features_of(
    model: nn.Module,
    task: Task,
    batch: Mapping[str, Tensor],
    engine: str = "layerwise",
    patterns: tuple[str, ...] | None = None,
) -> Any:
    parameters = select_parameters(model, patterns).parameters
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    projector = Identity(proj_dim=sum(sizes.values()), sizes=sizes)
    arguments: dict[str, Any] = {"output_function": task.output_function, "parameters": parameters}
    plan = {"plan": plan_for(model, batch, **arguments)} if engine == "layerwise" else {}
    with vmappable_attention(model):
        return GRADIENTS[engine](model, batch, **arguments, **plan, projector=projector)


def assert_close(actual: Tensor, expected: Tensor, relative: float) -> None:
    assert torch.isfinite(actual).all()
    assert ((actual.double() - expected.double()).norm(dim=1) <= relative * expected.double().norm(dim=1)).all()


# Outputs.


def test_token_margins_are_log_odds_and_stay_finite_where_a_probability_rounds_to_one():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 5, 7, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 7, (4, 5), generator=generator)
    p = torch.softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(token_margins(logits, labels), (p / (1 - p)).log(), rtol=1e-12, atol=1e-12)
    certain = torch.tensor([[[1e4, 0.0, -1e4]]], requires_grad=True)
    margins = token_margins(certain, torch.tensor([[0]]))
    assert margins.item() == 1e4
    assert torch.autograd.grad(margins.sum(), certain)[0].tolist() == [[[1.0, -1.0, 0.0]]]
    assert token_margins(certain.bfloat16(), torch.tensor([[0]])).dtype == torch.float32


@pytest.mark.parametrize("piece", [1, 30, 1 << 18])
def test_token_margins_do_not_depend_on_how_many_logits_are_copied_at_a_time(piece: int, monkeypatch):
    monkeypatch.setattr(token_outputs, "_PIECE", piece)
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 11, dtype=torch.float64), torch.randint(11, (2, 5))
    p = logits.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(token_margins(logits, labels), (p / (1 - p)).log())
    assert token_margins(logits[:, :0], labels[:, :0]).shape == (2, 0)


def test_the_gradient_of_token_margins_is_that_of_plain_operations():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[0, 1, 2], [4, 4, 3]])
    assert torch.autograd.gradcheck(lambda values: token_margins(values, labels), logits)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["gpt2 lm", "t5"])
def test_outputs_are_reduced_over_an_examples_own_scored_tokens(name: str, reduction: str):
    model = make_model(name).double().eval()
    task = AutoTask.from_model(model, TrakConfig(token_reduction=reduction))
    batch = task.collate(rows_for(task), None)
    output, out_to_loss = task.output_function(model, batch)
    for i in range(len(IDS)):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        labels = one.pop("labels")[0]
        logits = model(**one).logits[0]
        if name == "gpt2 lm":
            logits, labels = logits[:-1], labels[1:]
        scored = labels != -100
        p = logits.softmax(-1)[scored].gather(1, labels[scored].unsqueeze(1)).squeeze(1)
        odds = (p / (1 - p)).log()
        torch.testing.assert_close(output[i], odds.mean() if reduction == "mean" else odds.sum(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out_to_loss[i], (1 - p).mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt2 lm", "t5", "bert qa"])
def test_the_exact_gradient_weighs_each_token_by_its_own_one_minus_p(name: str):
    """In float64, against a loop over examples and tokens; it is that of minus the summed loss. Queries keep the plain sum."""
    model = make_model(name).double().eval()
    task = AutoTask.from_model(model, TrakConfig(token_reduction="sum", token_out_to_loss="exact"))
    plain = AutoTask.from_model(model, TrakConfig(token_reduction="sum"))
    batch = task.collate(rows_for(task), None)
    parameters = select_parameters(model).parameters
    expected, outputs = [], []
    for i in range(len(IDS)):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        grads = [torch.zeros_like(p) for p in parameters.values()]
        outputs.append(0.0)
        for logits, label in scored_tokens(name, model, one):
            p = logits.softmax(-1)[label]
            odds = (p / (1 - p)).log()
            outputs[-1] += odds.item()
            found = torch.autograd.grad(odds, list(parameters.values()), retain_graph=True, allow_unused=True)
            for total, grad in zip(grads, found, strict=True):
                total += 0.0 if grad is None else (1 - p.item()) * grad
        expected.append(torch.cat([grad.flatten() for grad in grads]))
    tolerance = 1e-7 if name == "t5" else 1e-9  # T5's softmax of attention is in float32 whatever the weights are
    for engine in GRADIENTS:
        result = features_of(model, task, batch, engine)
        assert_close(result.features, torch.stack(expected), tolerance)
        assert_close(result.output[:, None], torch.tensor(outputs, dtype=torch.float64)[:, None], tolerance)
        assert result.out_to_loss.tolist() == [1.0] * len(IDS)
        query = features_of(model, task.for_queries(), batch, engine)
        assert torch.equal(query.features, features_of(model, plain, batch, engine).features)
        assert not torch.allclose(query.features, result.features, rtol=1e-2)


def scored_tokens(name: str, model: nn.Module, one: Mapping[str, Tensor]) -> list[tuple[Tensor, int]]:
    """Return the logits and label of every scored token of one example."""
    inputs = {key: value for key, value in one.items() if key not in ("labels", "start_positions", "end_positions")}
    result = model(**inputs)
    if name == "bert qa":
        width = int(one["attention_mask"].sum())
        both = ((result.start_logits, one["start_positions"]), (result.end_logits, one["end_positions"]))
        return [(logits[0, :width], label.item()) for logits, label in both]
    logits, labels = result.logits[0], one["labels"][0]
    if name == "gpt2 lm":
        logits, labels = logits[:-1], labels[1:]
    return [(logits[t], label) for t, label in enumerate(labels.tolist()) if label != -100]


# Laws.


@pytest.mark.parametrize("name", EACH_MODEL)
def test_both_engines_equal_a_float64_loop(name: str):
    model = make_model(name)
    task = AutoTask.from_model(model)
    batch = task.collate(rows_for(task), None)
    output, out_to_loss, grads = gradient_loop(model, batch, task.output_function, list(select_parameters(model).parameters))
    for engine in GRADIENTS:
        result = features_of(model, task, batch, engine)
        assert_close(result.features, grads, 5e-6)
        assert_close(result.output[:, None], output[:, None], 5e-5)
        assert_close(result.out_to_loss[:, None], out_to_loss[:, None], 5e-5)
    parameters = select_parameters(model).parameters
    options = {"output_function": task.output_function, "parameters": parameters}
    check_gradients(model, lambda rows: {key: value[list(rows)] for key, value in batch.items()}, 3, **options)


@pytest.mark.parametrize("name", EACH_MODEL)
def test_a_row_depends_on_neither_padding_nor_batch_mates(name: str):
    model = make_model(name)
    task = AutoTask.from_model(model)
    rows = rows_for(task)
    expected = features_of(model, task, task.collate(rows, None)).features
    for side in ("left", "right"):
        assert torch.equal(features_of(model, task, task.collate(padded(rows, side, 9), None)).features, expected)
    for i in range(len(IDS)):
        alone = task.collate({key: values[i : i + 1] for key, values in rows.items()}, None)
        # A row alone goes by the loop, as in a run.
        assert_close(features_of(model, task, alone, "loop").features, expected[i : i + 1], 5e-6)


@pytest.mark.parametrize("patterns", [None, ("base_layer",), ("lora_A", "lm_head|shared")])
@pytest.mark.parametrize("name", ["llama lm", "t5"])
def test_an_adapters_parameters_are_featurized_and_the_base_models_by_selection(name: str, patterns: tuple[str, ...] | None):
    from peft import LoraConfig, get_peft_model

    targets = ["q", "v"] if name == "t5" else ["q_proj", "v_proj"]
    task_type = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    model = get_peft_model(
        make_model(name), LoraConfig(r=2, target_modules=targets, task_type=task_type, init_lora_weights=False)
    )
    task = AutoTask.from_model(model)
    batch = task.collate(rows_for(task), None)
    chosen = select_parameters(model, patterns).parameters
    kinds = {"lora": any("lora_" in name for name in chosen), "base": any("lora_" not in name for name in chosen)}
    assert kinds == {"lora": patterns != ("base_layer",), "base": patterns is not None}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    _, _, grads = gradient_loop(model, batch, task.output_function, list(chosen))
    for engine in GRADIENTS:
        assert_close(features_of(model, task, batch, engine, patterns).features, grads, 5e-6)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == frozen


# Rows.


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


def labels_of(name: str, row: Mapping[str, Any], tokenizer: Any, **options: Any) -> tuple[list[int], list[int]]:
    rows = {key: [value] for key, value in row.items()}
    task = AutoTask.from_model(LANGUAGE_MODELS[name](), TrakConfig(**options))
    task.check(datasets.Dataset.from_dict(rows), tokenizer)
    batch = task.collate(rows, tokenizer)
    return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()


CHAT = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]


def test_the_assistants_messages_are_scored_with_and_without_marks_in_the_template(tokenizer):
    expected = ([4, 6, 7, 8, 1, 5, 6, 9, 1], [-100] * 7 + [9, 1])
    assert labels_of("gpt2 lm", {"messages": CHAT}, tokenizer, loss_on="assistant") == expected
    assert labels_of("gpt2 lm", {"prompt": CHAT[:1], "completion": CHAT[1:]}, tokenizer) == expected
    assert labels_of("gpt2 lm", {"messages": CHAT}, tokenizer) == (expected[0], expected[0])
    before = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s> {% endgeneration %}"
        "{% else %}{{ m.content }} </s> {% endif %}{% endfor %}"
    )
    try:
        assert labels_of("gpt2 lm", {"messages": CHAT}, tokenizer, loss_on="assistant") == expected
        tokenizer.chat_template = "{{ messages[-1].content }} {% for m in messages %}{{ m.role }} {% endfor %}"
        with pytest.raises(ValueError, match=r"Row 0 cannot serve: the chat template does not show which tokens"):
            labels_of("gpt2 lm", {"messages": CHAT}, tokenizer, loss_on="assistant")
    finally:
        tokenizer.chat_template = before


def test_a_completion_is_scored_with_its_end_and_a_text_whole(tokenizer):
    assert labels_of("gpt2 lm", {"prompt": "a b", "completion": " c d"}, tokenizer) == (
        [7, 8, 9, 10, 1],
        [-100, -100, 9, 10, 1],
    )
    assert labels_of("gpt2 lm", {"text": "a b c"}, tokenizer) == ([7, 8, 9, 1], [7, 8, 9, 1])
    assert labels_of("gpt2 lm", {"input_ids": [7, 8, 9]}, None) == ([7, 8, 9], [7, 8, 9])
    assert labels_of("gpt2 lm", {"input_ids": [7, 8, 9], "completion_mask": [0, 0, 1]}, None)[1] == [-100, -100, 9]


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (("inputs_pretokenized", "targets_pretokenized"), {}),
        (("text", "target"), {}),
        (("first", "second"), {"text_columns": ("first",), "label_column": "second"}),
    ],
)
def test_a_target_text_is_found_and_the_decoder_reads_it_shifted(columns, options, tokenizer):
    rows = {columns[0]: ["a b"], columns[1]: ["<extra_id_0> c d </s>"]}
    task = AutoTask.from_model(LANGUAGE_MODELS["t5"](), TrakConfig(**options))
    batch = task.collate(rows, tokenizer)
    assert batch["input_ids"].tolist() == [[7, 8]]
    assert batch["labels"].tolist() == [[3, 9, 10, 1]]
    assert batch["decoder_input_ids"].tolist() == [[PAD, 3, 9, 10]]


def test_content_leaves_out_sentinels_and_eos_which_the_decoder_still_reads(tokenizer):
    task = AutoTask.from_model(LANGUAGE_MODELS["t5"](), TrakConfig(score_tokens="content"))
    batch = task.collate({"input_ids": [[7]], "labels": [[3, 9, 10, 1]]}, tokenizer)
    assert batch["labels"].tolist() == [[-100, 9, 10, -100]]
    assert batch["decoder_input_ids"].tolist() == [[PAD, 3, 9, 10]]


def test_words_are_labelled_at_their_first_token():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    row = {"tokens": ["ab", "a", "abb"], "ner_tags": [1, 0, 2]}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert labels_of("bert tokens", row, fast) == ([1, 2, 1, 1, 2, 2], [1, -100, 0, 2, -100, -100])


def test_squads_columns_become_the_answers_tokens(tokenizer):
    task = AutoTask.from_model(LANGUAGE_MODELS["bert qa"]())
    answers = [{"text": ["d e"], "answer_start": [4]}, {"text": [], "answer_start": []}]
    batch = task.collate({"question": ["a", "a"], "context": ["b c d e f"] * 2, "answers": answers}, tokenizer)
    assert batch["start_positions"].tolist() == [3, 0]
    assert batch["end_positions"].tolist() == [4, 0]


# Refusals.


@pytest.mark.parametrize(
    ("name", "rows", "options", "message"),
    [
        ("t5", {"input_ids": [[5], [6]], "labels": [[7], [-100]]}, {}, "1 of 2 rows has no scored token. Row 1 cannot serve: no token of it is scored: .*filter it out"),
        ("gpt2 lm", {"input_ids": [[5, 6], [7]]}, {}, "Row 1 cannot serve: no token of it is scored"),
        ("t5", {"input_ids": [[5]], "labels": [[3, 1]]}, {"score_tokens": "content"}, 'left out by score_tokens="content"'),
        ("t5", {"input_ids": [[5]], "labels": [[60]]}, {}, "lie in 0 to 59, what the model can predict, but one is 60"),
        ("t5", {"input_ids": [[5]], "labels": [[7] * 9]}, {"max_length": 8}, "its labels are 9 tokens, more than max_length=8"),
        ("bart", {"input_ids": [[5]], "labels": [[7] * 21]}, {}, "its labels are 21 tokens, more than the model's 20 positions"),
        ("gpt2 lm", {"input_ids": [[5, 6]], "labels": [[5]]}, {}, "2 tokens in 'input_ids' and 1 labels in 'labels'"),
        ("gpt2 lm", {"a": ["x"], "b": ["x"]}, {}, "or one text column, but the dataset has a, b. Set `text_columns`"),
        ("t5", {"input_ids": [[5]]}, {}, "the columns 'input_ids', 'labels', but the dataset has input_ids"),
        ("t5", {"a": ["x"], "b": ["x"]}, {}, "Set `text_columns` to the text's column and `label_column` to the target's"),
        ("bert mlm", {"text": ["a"]}, {}, "masked-lm needs the columns 'input_ids'.*DataCollatorForLanguageModeling"),
        ("bert qa", {"input_ids": [[5]], "start_positions": [0], "end_positions": [1]}, {}, r"answer, tokens \[0, 1\], does not lie"),
        ("bert qa", {"input_ids": [[5] * 3], "start_positions": [2], "end_positions": [1]}, {}, "begins at token 2 and ends before"),
        ("bert qa", {"question": ["a"], "context": ["b"], "answers": [{"text": ["c"], "answer_start": [0]}]}, {}, "is not in the context"),
        (
            "bert qa",
            {"question": ["a"], "context": ["b c d"], "answers": [{"text": ["d"], "answer_start": [4]}]},
            {"max_length": 3},
            "answer 'd' is cut off at 3 tokens",
        ),
        ("bert tokens", {"tokens": [["a"]], "ner_tags": [[1, 2]]}, {}, "1 words and 2 labels"),
    ],
)  # fmt: skip
def test_rows_that_cannot_serve_are_named(name: str, rows: dict[str, Any], options: dict[str, Any], message: str, tokenizer):
    task = AutoTask.from_model(LANGUAGE_MODELS[name](), TrakConfig(**options))
    with pytest.raises(ValueError, match=message):
        task.check(datasets.Dataset.from_dict(rows), tokenizer)


def test_a_configuration_that_says_nothing_of_tokens_is_written_as_before():
    assert not {
        "token_reduction",
        "score_tokens",
        "token_out_to_loss",
        "loss_on",
        "skip_unscored",
        "chat_template_kwargs",
    } & set(TrakConfig().to_dict())
    assert TrakConfig(token_reduction="sum").differences(TrakConfig()) == ["token_reduction: 'sum' here, 'mean' there"]


def test_tokens_of_a_large_vocabulary_count_for_several():
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[8, 9]]})
    assert AutoTask.from_model(LANGUAGE_MODELS["t5"]()).inputs.lengths(rows) == [5]
    large = AutoTask.from_model(LANGUAGE_MODELS["t5"](vocab_size=1 << 17)).inputs
    assert np.array_equal(large.lengths(rows), [3 + 2 * 4])
