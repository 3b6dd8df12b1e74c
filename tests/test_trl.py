"""What is scored is what TRL trains on, token for token: against `SFTTrainer`'s own dataset, and the chat templates shipped with TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers_for_tests import byte_tokenizer

from hf_trak import AttributionArguments, attribution
from hf_trak.config import TrakConfig
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.tasks import AutoTask
from hf_trak.tasks.chat import ChatTemplate
from hf_trak.tasks.chunks import Chunker

trl = pytest.importorskip("trl", reason="TRL is the reference: pip install trl")

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]

MARKED = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}{% generation %}{{ m.content }}<EOS>{% endgeneration %}"
    "{% else %}{{ m.content }}<EOS>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
TURNS = [
    [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a bird"}],
    [
        {"role": "user", "content": "and this"},
        {"role": "assistant", "content": "a tree"},
        {"role": "user", "content": "sure"},
        {"role": "assistant", "content": "quite"},
    ],
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "a bird in the tree"}, {"text": "it ends by itself<EOS>"}, {"text": "a"}],
    "completion": [{"prompt": "what is it", "completion": " a bird"}, {"prompt": "and this", "completion": "<EOS>"}],
    "messages": [{"messages": turns} for turns in TURNS],
    "chat completion": [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in TURNS],
}


def language_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(vocab_size=400, **sizes, initializer_range=0.15, pad_token_id=258, bos_token_id=256, eos_token_id=257)
    return LlamaForCausalLM(config)


def trained_on(rows: list[dict[str, Any]], tokenizer: Any, folder: Path, **options: Any) -> datasets.Dataset:
    """Return the dataset that SFTTrainer trains on."""
    args = trl.SFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", shuffle_dataset=False, **{"max_length": None, **options}
    )
    trainer = trl.SFTTrainer(
        language_model(), args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    return trainer.train_dataset


def scored(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[tuple[list[int], list[int]]]:
    """Return the ids and labels of every row that has a scored token."""
    task = AutoTask.from_model(language_model(), TrakConfig(skip_unscored=True, **options))
    dataset = datasets.Dataset.from_list(rows)
    task.check(dataset, tokenizer)
    found = []
    for i in range(len(rows)):
        batch = task.collate(dataset[i : i + 1], tokenizer)
        if (batch["labels"][:, 1:] != -100).any():
            found.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return found


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    ("kind", "loss_on", "options"),
    [
        ("text", "auto", {}),
        ("completion", "auto", {}),
        ("completion", "completion", {"completion_only_loss": True}),
        ("completion", "all", {"completion_only_loss": False}),
        ("messages", "auto", {}),
        ("messages", "all", {}),
        ("messages", "assistant", {"assistant_only_loss": True}),
        ("chat completion", "auto", {}),
        ("chat completion", "all", {"completion_only_loss": False}),
        ("chat completion", "assistant", {"assistant_only_loss": True}),
    ],
)
def test_what_is_scored_is_what_sfttrainer_trains_on(
    kind: str, loss_on: str, options: dict[str, Any], cut: bool, tmp_path: Path
):
    tokenizer = byte_tokenizer(MARKED)
    max_length = {"text": 12, "completion": 13}.get(kind, 34) if cut else None  # of completions, some are cut away
    rows = trained_on(ROWS[kind], tokenizer, tmp_path, max_length=max_length, **options)
    expected = [(row["input_ids"], row["labels"]) for row in rows if any(label != -100 for label in row["labels"][1:])]
    assert len(expected) > 0
    assert scored(ROWS[kind], tokenizer, loss_on=loss_on, max_length=max_length) == expected
    assert scored(list(rows), None) == expected  # and its own dataset


TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "description": "Look it up", "parameters": {"type": "object", "properties": {"of": {"type": "string"}}}},
    }
]  # fmt: skip


def template(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("as_json", [True, False])
def test_tools_and_template_options_reach_the_chat_template(as_json: bool, tmp_path: Path):
    import json

    tokenizer = byte_tokenizer(template("qwen3_training"))
    tools = json.dumps(TOOLS) if as_json else TOOLS
    plain = [{"messages": turns} for turns in TURNS]
    rows = [{**row, "tools": tools, "chat_template_kwargs": {"enable_thinking": False}} for row in plain]
    for options, loss_on in (({}, "auto"), ({"assistant_only_loss": True}, "assistant")):
        expected = [(row["input_ids"], row["labels"]) for row in trained_on(rows, tokenizer, tmp_path, **options)]
        assert scored(rows, tokenizer, loss_on=loss_on) == expected
        assert len(expected[0][0]) > len(scored(plain, tokenizer, loss_on=loss_on)[0][0]) + 100
        everywhere = {"tools": TOOLS, "enable_thinking": False}
        assert scored(plain, tokenizer, loss_on=loss_on, chat_template_kwargs=everywhere) == expected
    prompts = [{"prompt": turns[:-1], "completion": turns[-1:], **rows[0], "messages": None} for turns in TURNS]
    for row in prompts:
        del row["messages"]
    expected = [(row["input_ids"], row["labels"]) for row in trained_on(prompts, tokenizer, tmp_path)]
    assert scored(prompts, tokenizer) == expected


def test_options_of_a_row_that_are_no_options_are_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="its column 'tools' is no JSON"):
        scored([{"messages": TURNS[0], "tools": "look"}], tokenizer)


# Templates without marks.

# Where TRL's training template also scores what prompts for the answer, or leaves out white space after the end of a turn.
_HEADERS = {
    "deepseek_r1_distill": "<｜Assistant｜>",
    "deepseekv3": "<｜Assistant｜>",
    "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant",
    "qwen2_5": "\n",
}


def names_of_templates() -> list[str]:
    folder = Path(trl.__file__).parent / "chat_templates"
    return sorted(path.stem for path in folder.glob("*.jinja") if not path.stem.endswith("_training"))


def spans(tokenizer: Any, ids: list[int], mask: list[Any]) -> list[str]:
    found: list[list[int]] = []
    for i, value in enumerate(mask):
        if value and i > 0 and mask[i - 1]:
            found[-1].append(ids[i])
        elif value:
            found.append([ids[i]])
    return [tokenizer.decode(part) for part in found]


@pytest.mark.parametrize("name", names_of_templates())
def test_the_assistants_turns_are_found_in_every_template_shipped_with_trl(name: str):
    text = template(name)
    tokenizer = byte_tokenizer(text)
    for turns in TURNS:
        messages: list[dict[str, Any]] = turns
        if "content'][0]" in text:  # of vision-language models, whose messages have parts
            messages = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        chat = ChatTemplate(tokenizer, {})
        ids, mask = chat.assistant_mask(messages)
        assert ids == chat.ids(messages)
        found = spans(tokenizer, ids, mask)
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert len(found) == len(answers)
        assert all(answer in part for answer, part in zip(answers, found, strict=True))
        assert not any(turn["content"] in part for turn in turns if turn["role"] == "user" for part in found)
        path = Path(trl.__file__).parent / "chat_templates" / f"{name}_training.jinja"
        if not path.exists():
            continue
        marked = ChatTemplate(tokenizer, {"chat_template": path.read_text(encoding="utf-8")})
        expected_ids, expected_mask = marked.assistant_mask(messages)
        if expected_ids == ids:  # the training template writes the same text
            expected = [part.removeprefix(_HEADERS.get(name, "")).rstrip() for part in spans(tokenizer, ids, expected_mask)]
            assert [part.rstrip() for part in found] == expected


def test_the_reasoning_of_a_last_turn_is_found_although_the_template_drops_that_of_earlier_ones():
    tokenizer = byte_tokenizer(template("qwen3"))
    thoughts = [
        {**turn, "content": f"<think>\nI see {turn['content']}\n</think>\n\n{turn['content']}"}
        if turn["role"] == "assistant"
        else turn
        for turn in TURNS[1]
    ]
    ids, mask = ChatTemplate(tokenizer, {}).assistant_mask(thoughts)
    assert spans(tokenizer, ids, mask) == ["a tree<|im_end|>\n", "<think>\nI see quite\n</think>\n\nquite<|im_end|>\n"]


@pytest.mark.parametrize("name", ["qwen3_instruct_2507", "qwen3_vl"])
def test_calls_of_tools_belong_to_the_assistants_turns(name: str):
    tokenizer = byte_tokenizer(template(name))
    call = {"type": "function", "function": {"name": "look", "arguments": {"of": "bird"}}}
    messages = [
        TURNS[0][0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "look", "content": "it flies"},
        TURNS[0][1],
    ]
    chat = ChatTemplate(tokenizer, {"tools": TOOLS})
    marked = ChatTemplate(tokenizer, {"tools": TOOLS, "chat_template": template(f"{name}_training")})
    found = spans(tokenizer, *chat.assistant_mask(messages))
    assert found == spans(tokenizer, *marked.assistant_mask(messages))
    assert "<tool_call>" in found[0]
    assert "it flies" not in "".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages[-1].content }} {% for m in messages %}{{ m.role }} {% endfor %}",  # the question is missing
        "{% for m in messages | reverse %}{{ m.role }} : {{ m.content }} {% endfor %}",  # the answer comes first
        "{% for m in messages %}{{ m.role }} {% endfor %}",  # no text at all
    ],
)
def test_a_template_that_hides_the_assistants_turns_is_refused(text: str):
    with pytest.raises(ValueError, match="does not show which tokens are the assistant's"):
        ChatTemplate(byte_tokenizer(text), {}).assistant_mask(TURNS[0])


# Packed rows.


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_have_the_gradient_that_sfttrainer_trains_with(strategy: str, tmp_path: Path):
    """In float64; the loss of TRL's own collator and plain transformers, document by document."""
    tokenizer = byte_tokenizer()
    texts = ["a bird in the tree", "it flies", "who", "and sings all day", "no", "so be it"]
    rows = trained_on(
        [{"text": text} for text in texts], tokenizer, tmp_path, max_length=32, packing=True, packing_strategy=strategy
    )
    assert ("seq_lengths" in rows.column_names) == (strategy == "bfd")
    model = language_model().double().eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    config = TrakConfig(projector="identity", proj_dim=size, token_reduction="sum", token_out_to_loss="exact")
    featurizer = Featurizer(model, config, tokenizer)
    featurizer.task.check(rows, tokenizer)
    features = featurizer.compute(featurizer.collate(rows[:])).features
    for number, row in enumerate(rows):
        lengths = row.get("seq_lengths") or [len(row["input_ids"])]
        total, at = 0.0, 0
        for length in lengths:
            ids = torch.tensor([row["input_ids"][at : at + length]])
            if length > 1:
                total = total + model(input_ids=ids, labels=ids).loss * (length - 1)
            at += length
        grads = torch.autograd.grad(total, list(model.parameters()))
        expected = -torch.cat([grad.flatten() for grad in grads])
        assert (features[number] - expected).norm() <= 1e-6 * expected.norm()  # norms and softmax are in float32


PREFERENCES: dict[str, list[dict[str, Any]]] = {
    "texts": [
        {"prompt": "what is it", "chosen": " a bird", "rejected": " a bear<EOS>"},
        {"prompt": "and this", "chosen": " it is quite a tree", "rejected": " no"},
    ],
    "texts in common": [{"chosen": "what is it a bird", "rejected": "what is it a bear"}, {"chosen": "it is", "rejected": "it was so"}],
    "conversations": [{"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [{"role": "assistant", "content": "no"}]} for turns in TURNS],
    "conversations in common": [
        {"chosen": turns, "rejected": [*turns[:-1], {"role": "assistant", "content": "never that"}]} for turns in TURNS
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", list(PREFERENCES))
def test_preferences_are_what_dpotrainer_trains_on(kind: str, tmp_path: Path):
    """Its tokens, and its loss: out-to-loss times the gradient of the output is minus the loss's gradient over beta."""
    tokenizer, beta = byte_tokenizer(MARKED), 0.4
    tokenizer.pad_token = "<EOS>"
    rows, model = datasets.Dataset.from_list(PREFERENCES[kind]), language_model().eval()
    args = trl.DPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=beta, precompute_ref_log_probs=True, max_length=None, disable_dropout=True
    )  # fmt: skip
    trainer = trl.DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    theirs = trainer.train_dataset
    for parameter in model.parameters():  # so that it is another model than its reference
        parameter.data.mul_(1.1)
    task = AutoTask.from_model(model, TrakConfig(task="preference", preference_beta=beta))
    task.check(rows, tokenizer)
    for place, row in enumerate(theirs):
        ours = task.collate(rows[place : place + 1], tokenizer)
        assert ours["input_ids"][0].tolist() == row["prompt_ids"] + row["chosen_ids"]
        assert ours["rejected_input_ids"][0].tolist() == row["prompt_ids"] + row["rejected_ids"]
        own = task.collate(theirs[place : place + 1], None)
        assert all(torch.equal(own[name], values) for name, values in ours.items())
        output, out_to_loss = task.output_function(model, own)
        parameters = list(model.parameters())
        expected = torch.autograd.grad(trainer.compute_loss(model, trainer.data_collator([row])), parameters)
        found = torch.autograd.grad((output * out_to_loss).sum(), parameters)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, -other / beta, rtol=1e-3, atol=1e-5)


def test_a_dpotrainer_attributes_to_its_own_rows(tmp_path: Path):
    tokenizer = byte_tokenizer(MARKED)
    tokenizer.pad_token = "<EOS>"
    rows = datasets.Dataset.from_list(PREFERENCES["texts"] * 3)
    args = AttributionArguments.from_training_arguments(
        trl.DPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=0.3, precompute_ref_log_probs=True, max_steps=2, save_strategy="no"
        ),
        proj_dim=32,
    )  # fmt: skip
    trainer = attribution(trl.DPOTrainer)(language_model(), args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    index = trainer.featurize()
    assert (index.config.task, index.config.preference_beta) == ("preference", 0.3)
    assert index.config.columns_read["reference"] == ["ref_chosen_logps", "ref_rejected_logps"]
    scores = index.score(trainer.train_dataset.select(range(2)), progress=False)
    assert scores[0, 0] > 0
    assert scores[1, 1] > 0
    assert scores.shape == (6, 2)


def test_chunks_of_documents_stay_what_they_are_in_an_sft_trainer(tmp_path):
    tokenizer, texts = byte_tokenizer(), ["a bird in the tree", "it ends", "by itself in the tree"]
    rows = datasets.Dataset.from_list(
        [
            {"input_ids": chunk.ids, "labels": chunk.labels, "document_id": number, "chunk_id": place}
            for number, text in enumerate(texts)
            for place, chunk in enumerate(Chunker(tokenizer, 8, 3).cut(text))
        ]
    )
    args = trl.SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, max_length=8, disable_tqdm=True
    )
    trainer = attribution(trl.SFTTrainer)(
        language_model(),
        AttributionArguments.from_training_arguments(args, proj_dim=16),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    assert int((batch["labels"] != -100).sum()) == sum(len(tokenizer(text + "<EOS>")["input_ids"]) for text in texts)
    trainer.train()
    hits = trainer.attribute(rows.select([0]), top_k=3, documents="max")
    assert sorted(hits[0]["proponents"]) == [0, 1, 2]
    assert hits[0]["proponent_document_id"] == hits[0]["proponents"]
