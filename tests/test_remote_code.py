"""Checkpoints from elsewhere: their code is not run unless asked, and their weights are no pickles."""

import json

import pytest
import torch
from datasets_for_tests import save_model, token_rows

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.cli.main import main
from hf_trak.sources.checkpoints import load_model

MODELING = """
from pathlib import Path

from transformers import BertForSequenceClassification

Path(__file__).with_suffix(".ran").touch()


class LouderBertForSequenceClassification(BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        result = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        result.logits = 2 * result.logits
        return result
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A checkpoint whose class is defined in a file beside it, and the folder that transformers runs such files from."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = save_model(tmp_path / "louder")
    (folder / "modeling_louder.py").write_text(MODELING)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["LouderBertForSequenceClassification"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_louder.LouderBertForSequenceClassification"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_checkpoint_runs_only_if_it_is_trusted(own_code, tmp_path):
    options = {"dataset": token_rows(12), "config": TrakConfig(proj_dim=16), "progress": False}
    with pytest.raises(ValueError, match="LouderBertFor.*It has its own code: if you trust it, pass trust_remote_code=True"):
        AttributionIndex.build(tmp_path / "index", models=own_code, **options)
    assert not list(tmp_path.rglob("*.ran"))
    AttributionIndex.build(tmp_path / "index", models=own_code, trust_remote_code=True, **options)
    assert len(list(tmp_path.rglob("*.ran"))) == 1
    queries = token_rows(3, seed=1)
    with pytest.raises(ValueError, match="pass trust_remote_code=True"):
        AttributionIndex.from_pretrained(tmp_path / "index").score(queries, progress=False)
    trusting = AttributionIndex.from_pretrained(tmp_path / "index", trust_remote_code=True)
    scores = trusting.score(queries, progress=False)
    plain = AttributionIndex.build(tmp_path / "plain", models=save_model(tmp_path / "bert"), **options)
    assert torch.isfinite(torch.from_numpy(scores)).all()
    assert abs(scores - plain.score(queries, progress=False)).max() > 1e-3  # it is the code that computes


def test_commands_trust_code_only_when_told_to_and_an_index_does_not_remember_it(own_code, tmp_path, capsys):
    token_rows(12).to_parquet(tmp_path / "rows.parquet")
    rows, index = str(tmp_path / "rows.parquet"), tmp_path / "index"
    made = ["featurize", "--model", str(own_code), "--dataset", rows, "--output", str(index), "--proj_dim", "16"]
    asked = [
        "attribute",
        "--index",
        str(index),
        "--queries",
        rows,
        "--split",
        "train",
        "--output",
        str(tmp_path / "hits.jsonl"),
    ]
    assert main(made) == 1
    assert "It has its own code: if you trust it, pass trust_remote_code=True (--trust_remote_code)" in capsys.readouterr().err
    assert main([*made, "--trust_remote_code"]) == 0
    assert not [path for path in index.rglob("*") if path.is_file() and b"trust_remote_code" in path.read_bytes()]
    assert main(asked) == 1
    assert "(--trust_remote_code)" in capsys.readouterr().err
    assert main([*asked, "--trust_remote_code"]) == 0


def test_a_configuration_with_code_of_its_own_is_refused_without_a_question(own_code):
    config = json.loads((own_code / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "modeling_louder.LouderConfig"
    config["model_type"] = "louder"
    (own_code / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_model(str(own_code))


def test_a_pickled_adapter_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    base = load_model(str(save_model(tmp_path / "bert")))
    lora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query"]))
    lora.save_pretrained(tmp_path / "adapter")
    base.config.save_pretrained(tmp_path / "adapter")
    assert type(load_model(str(tmp_path / "adapter"))).__name__ == "PeftModel"
    state = peft.get_peft_model_state_dict(lora)
    torch.save(state, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors: weights are loaded from safetensors only"):
        load_model(str(tmp_path / "adapter"))


def test_pickled_weights_are_refused(tmp_path):
    folder = save_model(tmp_path / "bert")
    state = load_model(str(folder)).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_model(str(folder))
