"""Adapters on a base model in 8 or 4 bits, through bitsandbytes, which runs on CPUs too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.gradients import select_parameters
from hf_trak.tasks import AutoTask

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # 4 bits: multiples of 32
IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]


TOLERANCE = {8: 1e-2, 4: 1e-5}  # products of 8 bits round activations, and set columns apart where any example's are large


@pytest.fixture(scope="module", params=[8, 4])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'hf-trak[quantized]'")
    peft = pytest.importorskip("peft")
    from transformers import BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=40, **SIZES)).save_pretrained(folder)
    options: dict[str, Any] = {"load_in_8bit": True}
    if request.param == 4:
        options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_quant_type": "nf4"}
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(base, lora)


def backward_one_by_one(model: Any) -> torch.Tensor:
    """Return each example's gradient by an ordinary backward pass, in the model's own precision."""
    task = AutoTask.from_model(model)
    parameters = list(select_parameters(model).parameters.values())
    rows = []
    for ids in IDS:
        output, _ = task.output_function(model.eval(), task.collate({"input_ids": [ids], "labels": [ids]}, None))
        rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(output.sum(), parameters)]))
    return torch.stack(rows)


def index_of(model: Any, folder: Path, **options: Any) -> AttributionIndex:
    n_parameters = select_parameters(model).grad_dim
    config = TrakConfig(projector="identity", proj_dim=n_parameters, **options)
    rows = Dataset.from_dict({"input_ids": IDS, "labels": IDS})
    return AttributionIndex.build(folder, models=model, dataset=rows, config=config, progress=False)


def test_an_adapters_features_are_the_gradients_through_the_quantized_base(adapted, tmp_path):
    dtypes = {parameter.dtype for parameter in adapted.parameters() if not parameter.is_floating_point()}
    (bits,) = [{torch.int8: 8, torch.uint8: 4}[dtype] for dtype in dtypes]
    index = index_of(adapted, tmp_path / "index")
    features = torch.tensor(index.features().with_format("numpy")["trak_features"][:])
    expected = backward_one_by_one(adapted)
    assert expected.norm(dim=1).min() > 0
    assert ((features - expected).norm(dim=1) <= TOLERANCE[bits] * expected.norm(dim=1)).all()
    assert all("lora_" in name for name in select_parameters(adapted).parameters)


def test_torch_func_is_refused_on_a_quantized_base(adapted, tmp_path):
    with pytest.raises(ValueError, match=r"base_layer\.weight is of torch\.u?int8.*gradients='layerwise'"):
        index_of(adapted, tmp_path / "index", gradients="functional")


def test_the_base_models_quantized_weights_are_refused(adapted, tmp_path):
    with pytest.raises(ValueError, match=r"base_layer\.weight is of torch\.u?int8, and quantized weights have no gradients"):
        select_parameters(adapted, ["base_layer"])
