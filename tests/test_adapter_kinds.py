"""Every kind of adapter by `gradients="auto"`, loaded from what PEFT saves: against a float64 loop over rows alone and unpadded."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_trak import TrakConfig
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.sources.checkpoints import load_model
from hf_trak.tasks import AutoTask

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
VOCABULARY, LENGTHS = 60, (9, 14, 6, 11, 5, 8, 12, 7)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCABULARY}
BERT = BertConfig(**SIZES, intermediate_size=24, num_labels=3)
LLAMA = LlamaConfig(**SIZES, intermediate_size=24, pad_token_id=0, num_labels=3)
GPT_OSS = GptOssConfig(
    **SIZES, intermediate_size=16, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2
)
T5 = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16)
MAMBA = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
Q_AND_V = ["q_proj", "v_proj"]


def llama(kind, **options):
    return LlamaForCausalLM, LLAMA, lambda: kind(task_type="CAUSAL_LM", **options)


def lora(**options):
    return llama(peft.LoraConfig, **{"r": 2, "target_modules": Q_AND_V, **options})


def prompt(kind, model, config, task, **options):
    return model, config, lambda: kind(num_virtual_tokens=2, task_type=task, **options)


KINDS = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "dora on embeddings": lora(use_dora=True, target_modules=[*Q_AND_V, "embed_tokens"]),
    "lora on embeddings": lora(target_modules=[*Q_AND_V, "embed_tokens"]),
    "lora on the head": lora(target_modules=[*Q_AND_V, "lm_head"]),
    "lora with biases": lora(target_modules="all-linear", bias="lora_only"),
    "trainable tokens": lora(trainable_token_indices=[3, 4]),
    "saved embeddings": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "adalora": llama(peft.AdaLoraConfig, init_r=4, target_r=2, target_modules=Q_AND_V, total_step=10),
    "vera": llama(peft.VeraConfig, r=4, target_modules=Q_AND_V),
    "loha": llama(peft.LoHaConfig, r=2, target_modules=Q_AND_V),
    "lokr": llama(peft.LoKrConfig, r=2, target_modules=Q_AND_V),
    "ia3": llama(peft.IA3Config, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt tuning": prompt(peft.PromptTuningConfig, LlamaForCausalLM, LLAMA, "CAUSAL_LM"),
    "prompt tuning, few positions": prompt(peft.PromptTuningConfig, GPT2LMHeadModel, GPT2, "CAUSAL_LM"),
    "p-tuning": prompt(peft.PromptEncoderConfig, LlamaForCausalLM, LLAMA, "CAUSAL_LM", encoder_hidden_size=8),
    "prefix tuning": prompt(peft.PrefixTuningConfig, LlamaForCausalLM, LLAMA, "CAUSAL_LM"),
    "prefix tuning, projected": prompt(
        peft.PrefixTuningConfig, LlamaForCausalLM, LLAMA, "CAUSAL_LM", prefix_projection=True, encoder_hidden_size=8
    ),
    "classifier, dora": (
        BertForSequenceClassification,
        BERT,
        lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["query", "dense"], task_type="SEQ_CLS"),
    ),
    "classifier, prompt tuning": prompt(peft.PromptTuningConfig, BertForSequenceClassification, BERT, "SEQ_CLS"),
    "classifier, prefix tuning": prompt(peft.PrefixTuningConfig, BertForSequenceClassification, BERT, "SEQ_CLS"),
    "decoder's classifier, prompt tuning": prompt(peft.PromptTuningConfig, LlamaForSequenceClassification, LLAMA, "SEQ_CLS"),
    "tagger, prompt tuning": prompt(peft.PromptTuningConfig, BertForTokenClassification, BERT, "TOKEN_CLS"),
    "seq2seq, prompt tuning": prompt(peft.PromptTuningConfig, T5ForConditionalGeneration, T5, "SEQ_2_SEQ_LM"),
    "seq2seq, prefix tuning": prompt(peft.PrefixTuningConfig, T5ForConditionalGeneration, T5, "SEQ_2_SEQ_LM"),
    "gpt-oss, lora": (
        GptOssForCausalLM,
        GPT_OSS,
        lambda: peft.LoraConfig(r=2, target_modules=Q_AND_V, task_type="CAUSAL_LM"),
    ),
    "mamba, lora on dt_proj": (
        MambaForCausalLM,
        MAMBA,
        lambda: peft.LoraConfig(r=2, target_modules=["x_proj", "dt_proj", "in_proj"], task_type="CAUSAL_LM"),
    ),
}
LEARNED_BY_A_NETWORK = ("p-tuning", "prefix tuning, projected")  # which PEFT does not save


def adapted(name, folder):
    """Return an adapter with weights that are not zero, and save it and its base as PEFT does."""
    kind, config, make = KINDS[name]
    torch.manual_seed(0)
    base = kind(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    base.save_pretrained(folder / "base")
    model = peft.get_peft_model(kind.from_pretrained(folder / "base"), make())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder / "adapter")
    assert not (folder / "adapter" / "config.json").exists()
    return model


def rows(model):
    generator = torch.Generator().manual_seed(1)

    def draw(low, high, n):
        return torch.randint(low, high, (n,), generator=generator).tolist()

    columns = {"input_ids": [draw(3, VOCABULARY, n) for n in LENGTHS]}
    name = type(model.get_base_model()).__name__
    if name.endswith("ForSequenceClassification"):
        columns["label"] = draw(0, 3, len(LENGTHS))
    elif name.endswith("ForTokenClassification"):
        columns["labels"] = [draw(0, 3, n) for n in LENGTHS]
    elif name.startswith("T5"):
        columns["labels"] = [draw(3, VOCABULARY, n // 2 + 1) for n in LENGTHS]
    return Dataset.from_dict(columns)


def log_odds(logits, labels):
    """Return the log-odds of labels, one for each row of logits."""
    index = labels.unsqueeze(1)
    return logits.gather(1, index).squeeze(1) - logits.scatter(1, index, -torch.inf).logsumexp(1)


def expected(model, row):
    """Return output and gradient of a row alone: that of the row's own tokens, which are the last ones."""
    name = type(model.get_base_model()).__name__
    ids = torch.tensor([row["input_ids"]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.endswith("ForSequenceClassification"):
        output = log_odds(model(**inputs).logits, torch.tensor([row["label"]])).sum()
    elif "labels" in row:
        labels = torch.tensor(row["labels"])
        if name.startswith("T5"):
            inputs["labels"] = labels.unsqueeze(0)
        output = log_odds(model(**inputs).logits[0, -len(labels) :], labels).mean()
    else:
        output = log_odds(model(**inputs, use_cache=False).logits[0, -ids.shape[1] : -1], ids[0, 1:]).mean()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(output, trained, allow_unused=True)
    return output.detach(), torch.cat(
        [(torch.zeros_like(one) if grad is None else grad).flatten() for one, grad in zip(trained, grads, strict=True)]
    )


FURTHER = {
    "rslora", "dora on embeddings", "lora with biases", "vera", "loha", "lokr", "prompt tuning, few positions",
    "classifier, prefix tuning", "tagger, prompt tuning", "seq2seq, prefix tuning",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in FURTHER else ()) for name in KINDS])
def test_an_adapter_that_peft_saved_is_right_at_every_batch_size(name, tmp_path, caplog):
    trained = adapted(name, tmp_path)
    with caplog.at_level(logging.WARNING, logger="hf_trak"):
        model = load_model(str(tmp_path / "adapter")).eval()
    trainable = {one for one, parameter in model.named_parameters() if parameter.requires_grad}
    if name in LEARNED_BY_A_NETWORK:
        assert trainable == {"prompt_encoder.default.embedding.weight"}
        assert "not the network that made them" in caplog.text
    else:
        assert trainable == {one for one, parameter in trained.named_parameters() if parameter.requires_grad}
        assert "not the network" not in caplog.text
    dataset = rows(model)
    ids = torch.tensor([dataset[0]["input_ids"]])
    labels = {"labels": ids} if name.startswith("seq2seq") else {}
    with torch.no_grad():
        torch.testing.assert_close(model(ids, **labels).logits, trained(ids, **labels).logits, rtol=1e-5, atol=1e-6)

    reference = copy.deepcopy(model)
    if not name.startswith("gpt-oss"):  # whose experts do not multiply in float64
        reference = reference.double()
    wanted = [expected(reference, row) for row in dataset]
    config = TrakConfig(projector="identity", proj_dim=len(wanted[0][1]))
    for size in (1, 2, 3, 5, 8):
        featurizer = Featurizer(copy.deepcopy(model), config)
        featurizer.check(dataset)
        featurizer.choose_engine(dataset)
        for first in range(0, len(dataset), size):
            found = featurizer.compute(featurizer.collate(dataset[first : first + size]))
            for place, (output, gradient) in enumerate(wanted[first : first + size]):
                error = (found.features[place].double() - gradient).norm() / gradient.norm()
                assert error < 3e-5, (size, first + place, error)
                assert abs(found.output[place] - output) < 1e-4
        assert gradient.norm() > 0


def test_rows_behind_a_prompt_are_cut_to_the_positions_that_are_left(tmp_path):
    adapted("prompt tuning, few positions", tmp_path)
    task = AutoTask.from_model(load_model(str(tmp_path / "adapter")), TrakConfig())
    assert task.inputs.positions == 14
    with pytest.raises(ValueError, match="15 tokens, more than the model's 14 positions"):
        task.check(Dataset.from_dict({"input_ids": [list(range(3, 18))]}), None)
    config = peft.PromptTuningConfig(num_virtual_tokens=16, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="16 positions, which its 16 virtual tokens .PROMPT_TUNING. fill"):
        AutoTask.from_model(peft.get_peft_model(GPT2LMHeadModel(GPT2), config), TrakConfig())


def test_spans_behind_a_prompt_are_refused_by_name():
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="QUESTION_ANS")
    with pytest.raises(ValueError, match=r"Question answering with a learned prompt \(PROMPT_TUNING\) is not served"):
        AutoTask.from_model(peft.get_peft_model(BertForQuestionAnswering(BERT), config), TrakConfig())


def test_two_adapters_at_once_are_featurized_as_they_are_active(tmp_path):
    torch.manual_seed(0)
    options = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = peft.get_peft_model(LlamaForCausalLM(LLAMA), peft.LoraConfig(r=2, target_modules=["q_proj"], **options))
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], **options))
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    dataset = rows(model)
    wanted = [expected(copy.deepcopy(model).double(), row) for row in dataset]
    featurizer = Featurizer(model, TrakConfig(projector="identity", proj_dim=len(wanted[0][1])))
    featurizer.choose_engine(dataset)
    found = featurizer.compute(featurizer.collate(dataset[:]))
    for place, (_, gradient) in enumerate(wanted):
        assert (found.features[place].double() - gradient).norm() / gradient.norm() < 3e-5
