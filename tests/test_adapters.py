"""Adapters as PEFT, TRL and the Trainer write them: a folder without a config.json, on a base model elsewhere."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets_for_tests import token_rows
from models import make_model
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.sources.checkpoints import load_model, load_processing_class

peft = pytest.importorskip("peft")

WEIGHTS = "adapter_model.safetensors"
N_LABELS = 4
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),  # of peft; refused by name
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]


@pytest.fixture
def base(tmp_path):
    """A base model without a head."""
    make_model("bert", seed=0).bert.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save_adapter(folder, kind, base, task, *, targets=("query",), config=None, **options):
    """Save an adapter with nonzero weights alone, as peft does, and return its model."""
    torch.manual_seed(1)
    model = kind.from_pretrained(base, **options)
    model = peft.get_peft_model(model, config or peft.LoraConfig(r=2, target_modules=list(targets), task_type=task))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    assert not (folder / "config.json").exists()
    return model.eval()


@pytest.fixture
def adapter(tmp_path, base):
    model = save_adapter(tmp_path / "adapter", AutoModelForSequenceClassification, base, "SEQ_CLS", num_labels=N_LABELS)
    return tmp_path / "adapter", model


def changed(folder, target, change=None, **values):
    """Copy an adapter, with other weights or settings."""
    shutil.copytree(folder, target)
    if change is not None:
        save_file(change(load_file(target / WEIGHTS)), target / WEIGHTS)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | values))
    return str(target)


IDS = torch.arange(3, 9)[None]


def test_a_classifier_has_the_labels_of_its_saved_head(adapter):
    folder, expected = adapter
    found = load_model(str(folder))
    assert found.config.num_labels == N_LABELS
    assert torch.equal(found.eval()(IDS).logits, expected(IDS).logits)
    trainable = {name for name, parameter in found.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in expected.named_parameters() if parameter.requires_grad}


def test_an_index_is_made_of_an_adapter_and_asked_again(adapter, tmp_path):
    folder, _ = adapter
    config = TrakConfig(proj_dim=16)
    AttributionIndex.build(tmp_path / "index", models=folder, dataset=token_rows(12), config=config, progress=False)
    scores = AttributionIndex.from_pretrained(tmp_path / "index").score(token_rows(3, seed=1), progress=False)
    assert np.isfinite(scores).all()
    assert scores.any()


def gpt2(folder):
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=60, n_positions=20)).save_pretrained(folder)
    return folder


def t5(folder):
    T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("task", "kind", "targets", "make_base"),
    [
        ("CAUSAL_LM", AutoModelForCausalLM, ("c_attn",), gpt2),
        ("SEQ_2_SEQ_LM", AutoModelForSeq2SeqLM, ("q", "v"), t5),
        ("TOKEN_CLS", AutoModelForTokenClassification, ("query",), None),
        ("QUESTION_ANS", AutoModelForQuestionAnswering, ("query",), None),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_class_follows_from_the_task_type(tmp_path, base, task, kind, targets, make_base):
    place = make_base(tmp_path / "other") if make_base else base
    expected = save_adapter(tmp_path / "adapter", kind, place, task, targets=targets)
    found = load_model(str(tmp_path / "adapter"))
    assert type(found) is type(expected)
    assert type(found.get_base_model()) is type(expected.get_base_model())
    state = expected.state_dict()
    used = [name for name in state if ".original_module." not in name]
    assert len(used) > 20
    assert all(torch.equal(found.state_dict()[name], state[name]) for name in used)


def test_without_a_task_type_the_class_is_the_recorded_one(tmp_path):
    make_model("bert", seed=0).save_pretrained(tmp_path / "trained")
    save_adapter(tmp_path / "adapter", AutoModelForSequenceClassification, tmp_path / "trained", None)
    assert type(load_model(str(tmp_path / "adapter")).get_base_model()).__name__ == "BertForSequenceClassification"
    other = changed(tmp_path / "adapter", tmp_path / "b", auto_mapping=None)
    assert type(load_model(other).get_base_model()).__name__ == "BertForSequenceClassification"


def test_a_head_that_was_not_saved_is_refused(adapter, tmp_path):
    folder, _ = adapter
    source = changed(folder, tmp_path / "b", lambda s: {key: v for key, v in s.items() if "classifier" not in key})
    with pytest.raises(ValueError, match=r"without a trained head .* the number of labels cannot be known.*modules_to_save"):
        load_model(source)


def test_an_adapter_that_peft_cannot_load_is_refused_in_one_line(tmp_path):
    make_model("bert", seed=0).save_pretrained(tmp_path / "trained")
    config = peft.LoraConfig(r=2, target_modules=["query"])
    save_adapter(tmp_path / "a", AutoModelForSequenceClassification, tmp_path / "trained", None, config=config)
    source = changed(tmp_path / "a", tmp_path / "b", task_type="SEQ_CLS")  # for which peft expects a head of the adapter's own
    with pytest.raises(
        ValueError, match=r"cannot be loaded onto BertForSequenceClassification of .*trained: .*classifier\.weight"
    ):
        load_model(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {key: v for key, v in s.items() if "layer.1" not in key}, r"lacks 2 weights .*layer\.1.*lora_A"),
        (
            lambda s: s | {"base_model.model.bert.encoder.layer.9.attention.self.query.lora_A.weight": torch.ones(2, 16)},
            r"holds 1 weights that have no place in BertForSequenceClassification: bert\.encoder\.layer\.9",
        ),
    ],
)
def test_weights_of_an_adapter_that_do_not_fit_are_named(adapter, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_model(changed(adapter[0], tmp_path / "b", change))


def test_weights_of_the_base_model_that_do_not_fit_are_named(adapter, base):
    state = load_file(base / "model.safetensors")
    save_file({f"module.{key}": value for key, value in state.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"of .*base .*contain `module\.`|.*base.*module\."):
        load_model(str(adapter[0]))
    save_file({key: v for key, v in state.items() if "layer.0" not in key}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"base lacks 16 weights"):
        load_model(str(adapter[0]))


def test_the_base_model_is_found_as_seen_from_the_adapter_or_missed_by_name(adapter, tmp_path):
    folder, expected = adapter
    found = load_model(changed(folder, tmp_path / "b", base_model_name_or_path="../base"))
    assert torch.equal(found.eval()(IDS).logits, expected(IDS).logits)
    for gone, said in (("/nowhere/base", "There is no folder '/nowhere/base'"), ("me/none", "'me/none' is neither a folder")):
        source = changed(folder, tmp_path / gone.replace("/", "-"), base_model_name_or_path=gone)
        with pytest.raises(
            FileNotFoundError, match=f"The base model of the adapter .* does not exist: {said}.*Correct base_model_name"
        ):
            load_model(source)
    with pytest.raises(ValueError, match="an adapter of a model in memory"):
        load_model(changed(folder, tmp_path / "c", base_model_name_or_path=None))


def test_what_cannot_be_known_is_refused_with_the_way_out(adapter, tmp_path):
    with pytest.raises(ValueError, match="does not say what model class it was added to: its task_type is 'X'.*CAUSAL_LM"):
        load_model(changed(adapter[0], tmp_path / "b", task_type="X"))


@pytest.mark.parametrize("text", ["null", "[", "{}", "[" * 100_000, '{"peft_type": 3}'], ids=range(5))
def test_damaged_settings_are_named(adapter, text):
    (adapter[0] / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json of .*adapter is damaged"):
        load_model(str(adapter[0]))


def test_a_kind_of_adapter_that_peft_does_not_have_is_named(adapter, tmp_path):
    with pytest.raises(ValueError, match=r"of peft_type 'NOPE', cannot be loaded onto .*this version of peft"):
        load_model(changed(adapter[0], tmp_path / "b", peft_type="NOPE"))


def test_damaged_weights_are_named(adapter):
    (adapter[0] / WEIGHTS).write_bytes(b"x" * 30)
    with pytest.raises(ValueError, match=rf"adapter/{WEIGHTS} is damaged"):
        load_model(str(adapter[0]))


def test_a_prompt_that_would_not_be_used_is_refused_by_name(tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    save_adapter(tmp_path / "a", AutoModelForCausalLM, gpt2(tmp_path / "base"), None, config=config)
    assert load_model(str(tmp_path / "a")).prompt_encoder["default"].embedding.weight.requires_grad
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps(json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {"task_type": None})
    )
    with pytest.raises(ValueError, match=r"prompt or prefix \(PROMPT_TUNING\) without a task_type.*Set task_type"):
        load_model(str(tmp_path / "a"))


def test_several_adapters_in_one_folder_are_named(tmp_path, base):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=N_LABELS)
    options = {"task_type": "SEQ_CLS", "init_lora_weights": False}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], **options), adapter_name="first")
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["value"], **options))
    model.save_pretrained(tmp_path / "two")
    with pytest.raises(FileNotFoundError, match=r"it contains 2 adapters in subfolders, first, second\. Name one.*two/first"):
        load_model(str(tmp_path / "two"))
    for name in ("first", "second"):
        model.set_adapter(name)
        assert torch.equal(load_model(str(tmp_path / "two" / name)).eval()(IDS).logits, model.eval()(IDS).logits)


def write_repository(cache, name, folder):
    """Lay a folder out as a repository of the Hub in a cache, as a download does."""
    commit = "0123456789" * 4
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)


@pytest.mark.slow
def test_the_base_model_is_found_in_the_cache_without_a_network(tmp_path, base):
    import os
    import subprocess
    import sys

    folder = tmp_path / "adapter"
    expected = save_adapter(folder, AutoModelForSequenceClassification, base, "SEQ_CLS", num_labels=N_LABELS)
    write_repository(tmp_path / "home" / "hub", "me/base", base)
    source = changed(folder, tmp_path / "b", base_model_name_or_path="me/base")
    code = (
        "import sys, torch; from hf_trak.sources.checkpoints import load_model; "
        "print(load_model(sys.argv[1]).eval()(torch.arange(3, 9)[None]).logits.tolist())"
    )
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
    }
    run = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(torch.tensor(json.loads(run.stdout)), expected(IDS).logits, rtol=1e-6, atol=1e-6)


def train_with(kind, folder, model, config, dataset, **options):
    """Train a few steps, and return the model and the folder of the last checkpoint."""
    from transformers import Trainer, TrainingArguments

    args = {"max_steps": 2, "save_steps": 2, "learning_rate": 0.1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    if kind == "SFTTrainer":
        trl = pytest.importorskip("trl")
        arguments = trl.SFTConfig(str(folder), bf16=False, max_length=16, **args)
        trainer = trl.SFTTrainer(model, args=arguments, train_dataset=dataset, peft_config=config, **options)
    else:
        trainer = Trainer(peft.get_peft_model(model, config), TrainingArguments(str(folder), **args), train_dataset=dataset)
    trainer.train()
    return trainer.model.eval(), folder / "checkpoint-2"


ROUND_TRIPS = {
    "SFTTrainer, LoRA": ("SFTTrainer", peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")),
    "SFTTrainer, saved head": (
        "SFTTrainer",
        peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["wte", "lm_head"], task_type="CAUSAL_LM"),
    ),
    "SFTTrainer, prompt": ("SFTTrainer", peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "Trainer, LoRA": ("Trainer", peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")),
    "Trainer, IA3": (
        "Trainer",
        peft.IA3Config(target_modules=["query", "value"], feedforward_modules=[], task_type="SEQ_CLS"),
    ),
    "Trainer, modules_to_save": (
        "Trainer",
        peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]),
    ),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_checkpoint_of_a_trainer_loads_as_what_was_trained(tmp_path, base, name):
    kind, config = ROUND_TRIPS[name]
    if kind == "SFTTrainer":
        gpt2(tmp_path / "gpt2")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
        dataset = Dataset.from_list([{"text": text} for text in ("a b c", "d e f g", "b a", "e")])
        options = {"processing_class": word_tokenizer()}
    else:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=N_LABELS)
        dataset, options = token_rows(6, longest=3), {}
    trained, folder = train_with(kind, tmp_path / "run", model, config, dataset, **options)
    assert not (folder / "config.json").exists()
    found = load_model(str(folder)).eval()
    torch.testing.assert_close(found(IDS).logits, trained(IDS).logits, rtol=0, atol=1e-6)
    trainable = {one for one, parameter in found.named_parameters() if parameter.requires_grad}
    assert trainable == {one for one, parameter in trained.named_parameters() if parameter.requires_grad}


def test_an_adapter_without_a_tokenizer_has_its_base_models_and_says_so(adapter, base, tmp_path, caplog):
    folder, _ = adapter
    rows = Dataset.from_dict({"text": ["a b c", "d e", "f g"] * 3, "label": [0, 1, 2] * 3})
    config = TrakConfig(proj_dim=16, text_columns="text", max_length=8)
    options = {"models": folder, "dataset": rows, "config": config, "progress": False}
    with pytest.raises(ValueError, match="adapter holds no tokenizer"):
        AttributionIndex.build(tmp_path / "index", **options)
    word_tokenizer().save_pretrained(base)
    assert load_processing_class(str(folder)) is not None
    said = [record.getMessage() for record in caplog.records if "base model's is used" in record.getMessage()]
    assert said == [f"{folder} is an adapter without a tokenizer or processor: its base model's is used, {base}."]
    scores = AttributionIndex.build(tmp_path / "index", **options).score(rows, progress=False)
    assert np.isfinite(scores).all()
