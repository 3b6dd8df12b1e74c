"""The path that users take, on a CUDA device beside the CPU. `HF_TRAK_TEST_DEVICE=cpu` runs the same code where there is none."""

import os

import numpy as np
import pytest
import torch
from datasets_for_tests import image_rows, save_model, token_rows
from models import LANGUAGE_MODELS, make_model

from hf_trak import AttributionArguments, AttributionIndex, AttributionTrainer, Featurizer, TrakConfig

DEVICE = os.environ.get("HF_TRAK_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = TrakConfig(proj_dim=64)
ROWS = {"resnet9": image_rows, "vit": image_rows, "convnext": image_rows}


def rows_for(name, n_rows, *, seed=0):
    if name in LANGUAGE_MODELS:
        return token_rows(n_rows, seed=seed).remove_columns("label")
    return ROWS.get(name, token_rows)(n_rows, seed=seed)


def features(name, dataset, *, device, batch_size, config=CONFIG, **options):
    featurizer = Featurizer(make_model(name), config, device=device, **options)
    parts = [featurizer(dataset[start : start + batch_size]) for start in range(0, len(dataset), batch_size)]
    return np.concatenate([part["trak_features"] for part in parts])


def assert_rows_close(actual, expected, relative):
    errors = np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert errors.max() < relative, errors


@pytest.fixture
def float32_products():
    """Products of float32 in float32, not TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("engine", ["auto", "functional", "loop"])
@pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "llama", "vit", "convnext"])
def test_features_are_the_cpus(name, engine, float32_products):
    config = TrakConfig(proj_dim=64, gradients=engine)
    dataset = rows_for(name, 9)
    expected = features(name, dataset, device="cpu", batch_size=9, config=config)
    actual = features(name, dataset, device=DEVICE, batch_size=9, config=config)
    assert_rows_close(actual, expected, 1e-4)


@pytest.mark.parametrize("name", ["gpt2 lm", "llama lm", "qwen3 lm"])
def test_features_of_language_models_are_the_cpus(name, float32_products):
    dataset = rows_for(name, 9)
    expected = features(name, dataset, device="cpu", batch_size=9)
    assert_rows_close(features(name, dataset, device=DEVICE, batch_size=9), expected, 1e-4)


@pytest.mark.parametrize("proj_dim", [64, 2048])
@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_features_do_not_depend_on_the_batch(name, proj_dim, float32_products):
    """Law 2, to the round-off of float32."""
    dataset, config = rows_for(name, 12), TrakConfig(proj_dim=proj_dim)
    expected = features(name, dataset, device=DEVICE, batch_size=12, config=config)
    for batch_size in (1, 5):
        assert_rows_close(features(name, dataset, device=DEVICE, batch_size=batch_size, config=config), expected, 1e-4)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bert", "gpt2 lm", "vit"])
def test_the_same_run_twice_gives_the_same_bits(name, compute_dtype):
    dataset, config = rows_for(name, 12), TrakConfig(proj_dim=256, compute_dtype=compute_dtype)
    first = features(name, dataset, device=DEVICE, batch_size=12, config=config)
    assert np.array_equal(first, features(name, dataset, device=DEVICE, batch_size=12, config=config))


@pytest.mark.parametrize("name", ["bert", "gpt2 lm", "llama lm", "vit"])
def test_bfloat16_points_where_float32_does(name):
    dataset = rows_for(name, 12)
    whole = features(name, dataset, device=DEVICE, batch_size=12)
    half = features(name, dataset, device=DEVICE, batch_size=12, config=TrakConfig(proj_dim=64, compute_dtype="bfloat16"))
    cosines = (whole * half).sum(1) / np.linalg.norm(whole, axis=1) / np.linalg.norm(half, axis=1)
    assert cosines.min() > 0.99, cosines


def test_an_index_of_the_device_holds_the_cpus_features_and_its_hits(tmp_path, float32_products):
    folder, dataset, queries = save_model(tmp_path / "model"), token_rows(60), token_rows(5, seed=1)
    index = AttributionIndex.build(tmp_path / "index", models=folder, dataset=dataset, config=CONFIG, progress=False)
    on_cpu = Featurizer(str(folder), index.config, device="cpu", seed=index.passes[0].seeds[0])
    stored = np.concatenate([shard.features for shard in index.members[0].shards()])
    assert_rows_close(stored, on_cpu(dataset[:])["trak_features"], 1e-4)
    hits = index.attribute(queries, top_k=3, progress=False)["proponents"]
    best = index.attribute_features(on_cpu(queries[:])["trak_features"], 3, progress=False)["proponents"]
    assert [list(row) for row in hits] == [list(row) for row in best]


def test_a_run_of_the_trainer_on_the_device_is_attributed(tmp_path):
    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([row["label"] for row in rows])}

    args = AttributionArguments(
        str(tmp_path / "run"),
        proj_dim=32,
        shard_rows=16,
        num_train_epochs=2,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        members="epoch:2",
        use_cpu=DEVICE == "cpu",
        dataloader_pin_memory=DEVICE == "cuda",
        report_to=[],
    )
    trainer = AttributionTrainer(
        model=make_model("bert"),
        args=args,
        train_dataset=token_rows(40),
        eval_dataset=token_rows(4, seed=1),
        data_collator=collate,
    )
    trainer.train()
    assert next(trainer.model.parameters()).device.type == DEVICE
    hits = trainer.attribute(top_k=3)
    assert all(len(set(row)) == 3 for row in hits["proponents"])
    assert np.isfinite(np.asarray(hits["proponent_scores"])).all()
