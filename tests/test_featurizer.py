"""`Featurizer` as users call it: through `Dataset.map`, on good rows and bad."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Value
from datasets.fingerprint import Hasher
from datasets_for_tests import image_rows, save_model, token_rows
from models import TEXT_MODELS, make_model

from hf_trak import Featurizer, Task, TrakConfig

CONFIG = TrakConfig(proj_dim=64)


def featurize_all(featurizer, dataset, batch_size):
    batches = [featurizer(dataset[start : start + batch_size]) for start in range(0, len(dataset), batch_size)]
    return np.concatenate([batch["trak_features"] for batch in batches])


def test_map_adds_the_columns(tmp_path):
    dataset = token_rows(12)
    mapped = dataset.map(Featurizer(make_model("bert"), CONFIG), batched=True, batch_size=5)
    assert mapped.column_names == ["input_ids", "label", "trak_features", "trak_out_to_loss", "trak_output", "trak_grad_norm"]
    features = np.asarray(mapped["trak_features"][:])
    assert features.shape == (12, 64)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), mapped["trak_grad_norm"][:], rtol=1e-5)
    np.testing.assert_allclose(1 / (1 + np.exp(mapped["trak_output"][:])), mapped["trak_out_to_loss"][:], rtol=1e-4)


@pytest.mark.parametrize("from_folder", [False, True])
def test_a_second_map_hits_the_cache(tmp_path, from_folder):
    folder = save_model(tmp_path / "model")
    dataset = token_rows(12)
    dataset.save_to_disk(tmp_path / "rows")
    dataset = Dataset.load_from_disk(str(tmp_path / "rows"))
    calls = []

    class Counting(Featurizer):
        def __call__(self, rows, indices=None):
            calls.append(len(rows["label"]))
            return super().__call__(rows, indices)

    def featurizer():
        return Counting(str(folder) if from_folder else make_model("bert"), CONFIG)

    first = dataset.map(featurizer(), batched=True, batch_size=5)
    assert calls == [5, 5, 2]
    used = featurizer()
    used({key: dataset[key][:2] for key in dataset.column_names})  # having run does not change what it means
    calls.clear()
    second = dataset.map(used, batched=True, batch_size=5)
    assert calls == []
    assert first._fingerprint == second._fingerprint


@pytest.mark.parametrize("change", ["weights", "config", "seed"])
def test_a_changed_weight_or_setting_misses_the_cache(tmp_path, change):
    dataset = token_rows(4)
    model = make_model("bert")
    first = dataset.map(Featurizer(model, CONFIG), batched=True)
    if change == "weights":
        with torch.no_grad():
            model.classifier.bias[0] += 1e-3
    config = TrakConfig(proj_dim=32) if change == "config" else CONFIG
    second = dataset.map(Featurizer(model, config, seed=1 if change == "seed" else None), batched=True)
    assert first._fingerprint != second._fingerprint


def test_map_with_several_processes_works_from_a_folder(tmp_path):
    folder = save_model(tmp_path / "model")
    dataset = token_rows(8)
    one = dataset.map(Featurizer(str(folder), CONFIG), batched=True, batch_size=4)
    two = dataset.map(Featurizer(str(folder), CONFIG), batched=True, batch_size=4, num_proc=2)
    np.testing.assert_allclose(two["trak_features"][:], one["trak_features"][:], rtol=1e-4, atol=1e-5)


def test_a_model_in_memory_is_refused_in_another_process(tmp_path):
    import dill

    copy = dill.loads(dill.dumps(Featurizer(make_model("bert"), CONFIG)))
    with pytest.raises(ValueError, match="Save the model and make the Featurizer from the folder"):
        copy(token_rows(2)[:])


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit", "resnet"])
def test_batch_size_and_order_do_not_change_features(name):
    dataset = image_rows(11) if name in ("vit", "resnet") else token_rows(11)
    featurizer = Featurizer(make_model(name), CONFIG)
    whole = featurize_all(featurizer, dataset, 11)
    assert np.isfinite(whole).all()
    scale = np.abs(whole).max()
    for batch_size in (1, 4):
        np.testing.assert_allclose(featurize_all(featurizer, dataset, batch_size), whole, rtol=0, atol=2e-6 * scale)
    order = np.random.default_rng(0).permutation(11)
    np.testing.assert_allclose(featurize_all(featurizer, dataset.select(order), 3), whole[order], rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_padding_side_and_width_do_not_change_features(name):
    dataset = token_rows(9)

    def padded(side, width):
        def pad(row):
            zeros = [0] * (width - len(row["input_ids"]))
            ones = [1] * len(row["input_ids"])
            both = (row["input_ids"] + zeros, ones + zeros) if side == "right" else (zeros + row["input_ids"], zeros + ones)
            return {"input_ids": both[0], "attention_mask": both[1], "label": row["label"]}

        return Dataset.from_list([pad(row) for row in dataset])

    featurizer = Featurizer(make_model(name), CONFIG)
    expected = featurize_all(featurizer, dataset, 4)
    for side, width in (("right", 14), ("left", 14), ("left", 18)):
        assert np.array_equal(featurize_all(featurizer, padded(side, width), 4), expected)


def test_layerwise_and_functional_features_agree():
    dataset = token_rows(6)
    model = make_model("bert")
    layerwise = featurize_all(Featurizer(model, CONFIG), dataset, 6)
    functional = featurize_all(Featurizer(model, TrakConfig(proj_dim=64, gradients="functional")), dataset, 6)
    np.testing.assert_allclose(functional, layerwise, rtol=0, atol=2e-6 * np.abs(layerwise).max())


@pytest.mark.parametrize("gradients", ["layerwise", "functional"])
@pytest.mark.parametrize(
    "name", ["bert", "vit", "resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "llama"))]
)
def test_bfloat16_features_are_close_to_those_of_float32(name, gradients):
    dataset = token_rows(6) if name in TEXT_MODELS else image_rows(6)
    model = make_model(name)
    exact = featurize_all(Featurizer(model, CONFIG), dataset, 6)
    config = TrakConfig(proj_dim=64, gradients=gradients, compute_dtype="bfloat16")
    features = featurize_all(Featurizer(model, config), dataset, 6)
    assert features.dtype == np.float32
    assert not np.array_equal(features, exact), "nothing was computed in bfloat16"
    cosine = (features * exact).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosine.min() > 0.999
    np.testing.assert_array_equal(featurize_all(Featurizer(model, CONFIG), dataset, 6), exact)


def test_in_bfloat16_gradients_are_sketched_in_float32(monkeypatch):
    featurizer = Featurizer(make_model("bert"), TrakConfig(proj_dim=64, compute_dtype="bfloat16"))
    seen = []
    projector = featurizer.prepare()[2]

    def watched(original):
        def watch(accumulator, name, *arguments):
            tensors = [value for value in arguments if isinstance(value, torch.Tensor) and value.is_floating_point()]
            seen.extend([accumulator.dtype, *(value.dtype for value in tensors)])
            assert not torch.is_autocast_enabled("cpu")
            original(accumulator, name, *arguments)

        return watch

    for method in ("add", "add_outer", "add_rows"):
        monkeypatch.setattr(projector, method, watched(getattr(projector, method)))
    featurizer(token_rows(4)[:])
    assert set(seen) == {torch.float32}


def test_a_model_loaded_in_bfloat16_is_featurized_as_it_is():
    model = make_model("bert").to(torch.bfloat16)
    features = featurize_all(Featurizer(model, CONFIG), token_rows(6), 6)
    assert features.dtype == np.float32
    exact = featurize_all(Featurizer(make_model("bert"), CONFIG), token_rows(6), 6)
    cosine = (features * exact).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosine.min() > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_batch_waits_for_the_device_once(compute_dtype):
    import warnings

    featurizer = Featurizer(make_model("bert"), TrakConfig(proj_dim=64, compute_dtype=compute_dtype), device="cuda")
    rows = token_rows(6)[:]
    featurizer(rows)  # tables are drawn, and the gradients checked
    batch = featurizer.collate(rows)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # which warns that it is a prototype
        try:
            featurizer.compute(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if "called a synchronizing" in str(wait.message)]) == 1


def test_lengths_are_counted_in_tokens():
    assert Featurizer(make_model("bert"), CONFIG).lengths(token_rows(5)) == [len(row) for row in token_rows(5)["input_ids"]]
    assert Featurizer(make_model("vit"), CONFIG).lengths(image_rows(2)) is None


def test_a_checkpoint_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere'"):
        Featurizer(tmp_path / "nowhere", CONFIG)(token_rows(2)[:])


def test_a_sketch_longer_than_the_gradient_is_refused():
    with pytest.raises(ValueError, match=r"proj_dim=100,000 is more than the [\d,]+ selected parameters"):
        Featurizer(make_model("bert"), TrakConfig(proj_dim=100_000))(token_rows(2)[:])


def test_the_identity_projector_says_how_long_the_gradient_is():
    with pytest.raises(ValueError, match=r"set proj_dim=51 or"):
        Featurizer(make_model("bert"), TrakConfig(proj_dim=7, projector="identity", parameters=("classifier",)))(
            token_rows(2)[:]
        )


def test_rows_that_are_not_finite_are_named():
    dataset = image_rows(5)
    rows = dataset[:]
    rows["pixel_values"] = np.array(rows["pixel_values"])
    rows["pixel_values"][[1, 3], 0, 2, 2] = np.nan
    with pytest.raises(ValueError, match=r"2 examples are not finite: rows 101, 103\. Look for NaN"):
        Featurizer(make_model("vit"), CONFIG)(rows, indices=[100, 101, 102, 103, 104])


def test_a_model_with_nan_weights_is_refused():
    model = make_model("bert")
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    with pytest.raises(ValueError, match="3 examples are not finite"):
        Featurizer(model, CONFIG)(token_rows(3)[:])


def test_a_custom_task_is_featurized():
    def embedding_norm(model, batch):
        hidden = model.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return (hidden.square().sum(-1) * batch["attention_mask"]).sum(1)

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    task = Task.custom(embedding_norm, collator=collate)
    columns = Featurizer(make_model("bert"), CONFIG, task=task)(token_rows(4)[:])
    assert columns["trak_out_to_loss"].tolist() == [1.0] * 4
    assert np.isfinite(columns["trak_features"]).all()


def test_a_task_of_the_same_name_and_another_output_misses_the_cache():
    def output_times(factor):
        return lambda model, batch: factor * model(input_ids=batch["input_ids"]).logits.sum(1)

    def collate(rows):
        return {"input_ids": torch.tensor([row["input_ids"][:2] for row in rows])}

    model = make_model("bert")
    first, second, again = (
        Hasher.hash(Featurizer(model, CONFIG, task=Task.custom(output_times(factor), collator=collate, name="mine")))
        for factor in (1.0, 2.0, 1.0)
    )
    assert first == again
    assert first != second


def test_string_labels_are_refused_with_advice():
    dataset = token_rows(3).remove_columns("label").add_column("label", ["cat", "dog", "cat"])
    featurizer = Featurizer(make_model("bert"), CONFIG)
    with pytest.raises(ValueError, match=r"Labels are strings, such as 'cat'.*label2id"):
        featurizer.task.check(dataset, None)


def test_class_labels_are_understood():
    dataset = token_rows(3).cast_column("label", ClassLabel(names=["a", "b", "c"]))
    assert dataset.features["label"].num_classes == 3
    assert Featurizer(make_model("bert"), CONFIG)(dataset[:])["trak_features"].shape == (3, 64)
    floats = token_rows(3).cast_column("label", Value("float32"))
    assert Featurizer(make_model("bert"), CONFIG)(floats[:])["trak_features"].shape == (3, 64)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_has_the_features_of_the_model_inside(wrap):
    model, rows = make_model("bert"), token_rows(4)
    plain, wrapped = (Featurizer(one, TrakConfig(proj_dim=16), device="cpu") for one in (model, wrap(model)))
    expected = plain.compute(plain.collate(rows[:])).features
    assert torch.equal(wrapped.compute(wrapped.collate(rows[:])).features, expected)
