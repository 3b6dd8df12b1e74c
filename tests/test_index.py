"""`AttributionIndex`: what is stored is what is scored, and nothing else is accepted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from datasets_for_tests import image_rows, save_model, token_rows
from models import make_model
from reference import trak_scores

from hf_trak import AttributionIndex, Task, TrakConfig
from hf_trak.linalg import DEFAULT_DAMPING
from hf_trak.scoring.ensemble import default_power
from hf_trak.storage.writer import MemberWriter

CONFIG = TrakConfig(proj_dim=32)
TRAIN, QUERIES = token_rows(50), token_rows(6, seed=1)


def build(folder, models, **options):
    options = {"dataset": TRAIN, "config": CONFIG, "shard_rows": 16, "progress": False, **options}
    return AttributionIndex.build(folder, models=models, **options)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return [save_model(tmp_path_factory.mktemp("models") / f"bert-{seed}", seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def built(tmp_path_factory, checkpoints):
    return build(tmp_path_factory.mktemp("built") / "index", checkpoints)


@pytest.fixture
def index(built, tmp_path, checkpoints):
    """A copy that a test may damage."""
    built.save_pretrained(tmp_path / "index")
    return AttributionIndex(tmp_path / "index", models=checkpoints)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_scores_are_those_of_the_equation(built):
    features, queries, out_to_loss = [], [], []
    for number, member in enumerate(built.members):
        shards = list(member.shards())
        features.append(torch.cat([shard.features for shard in shards]).numpy())
        out_to_loss.append(torch.cat([shard.out_to_loss for shard in shards]).numpy())
        queries.append(built.featurize_queries(QUERIES, number, progress=False)["trak_features"])
    for damping in (None, 0.5):
        expected = trak_scores(features, queries, out_to_loss, DEFAULT_DAMPING if damping is None else damping)
        scores = built.score(QUERIES, damping=damping, out_to_loss_power=1, combination="means", progress=False)
        assert scores.shape == (50, 6)
        assert np.isfinite(scores).all()
        np.testing.assert_allclose(scores, expected, rtol=2e-6, atol=1e-7 * np.abs(expected).max())


def test_members_have_sketches_of_their_own(built):
    assert [member.identity["seed"] for member in built.members] == [0, 1]


def test_attribute_ranks_by_the_same_scores(built):
    scores = built.score(QUERIES, progress=False)
    hits = built.attribute(QUERIES, top_k=4, progress=False)
    for query, hit in enumerate(hits):
        order = np.argsort(-scores[:, query], kind="stable")
        assert hit["proponents"] == order[:4].tolist()
        assert hit["opponents"] == order[::-1][:4].tolist()
        np.testing.assert_array_equal(np.float32(hit["proponent_scores"]), scores[order[:4], query])


def test_top_k_above_the_training_set_returns_all_of_it(built):
    hits = built.attribute(QUERIES.select([0]), top_k=1000, progress=False)
    assert sorted(hits[0]["proponents"]) == list(range(50))
    with pytest.raises(ValueError, match="`top_k` must be at least 1"):
        built.attribute(QUERIES, top_k=0)


def test_self_influence_is_an_examples_score_for_itself(built):
    expected = np.diag(built.score(TRAIN, out_to_loss_power=1, combination="means", progress=False))
    np.testing.assert_allclose(built.self_influence(), expected, rtol=1e-4)


def test_scores_weigh_by_the_root_of_out_to_loss_unless_told(built):
    whole = built.score(QUERIES, out_to_loss_power=1, combination="means", progress=False).astype(np.float64)
    out_to_loss = np.mean([torch.cat([shard.out_to_loss for shard in m.shards()]).numpy() for m in built.members], axis=0)
    root = built.score(QUERIES, combination="means", progress=False)
    np.testing.assert_allclose(root, whole / out_to_loss[:, None] ** 0.5, rtol=1e-5)
    influence = built.score(QUERIES, out_to_loss_power=0, combination="means", progress=False)
    np.testing.assert_allclose(influence, whole / out_to_loss[:, None], rtol=1e-5)
    for power in (-0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="`out_to_loss_power` must lie in 0 to 1"):
            built.score(QUERIES, out_to_loss_power=power, progress=False)


def test_out_to_loss_that_is_no_probability_keeps_its_power():
    assert default_power("one_minus_p") == default_power("mean_one_minus_p") == 0.5
    assert default_power("residual") == default_power("one") == default_power("other") == 1.0


def test_several_processes_are_refused_rather_than_left_to_race(tmp_path, checkpoints, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched .WORLD_SIZE.*each would do the work of all"):
        build(tmp_path / "index", checkpoints)
    assert not (tmp_path / "index").exists()


def test_a_query_that_is_a_training_example_counts_that_example_among_its_first_proponents(built):
    hits = built.attribute(TRAIN, top_k=5, progress=False)
    found = np.mean([row in hit["proponents"] for row, hit in enumerate(hits)])
    assert found > 0.9


def test_saved_and_loaded_scores_are_the_same_bits(built, tmp_path, checkpoints):
    expected = built.score(QUERIES, progress=False)
    built.save_pretrained(tmp_path / "copy")
    loaded = AttributionIndex.from_pretrained(tmp_path / "copy")
    assert np.array_equal(loaded.score(QUERIES, progress=False), expected)
    copied, original = files_of(tmp_path / "copy"), files_of(built.folder)
    assert copied.keys() == original.keys()
    assert all(copied[name] == original[name] for name in original if not name.endswith(("member.json", "README.md")))
    assert 'load_dataset("copy", ' in copied["README.md"].decode()


def test_the_recorded_checkpoints_are_found_again(built):
    loaded = AttributionIndex.from_pretrained(built.folder)
    assert np.array_equal(loaded.score(QUERIES, progress=False), built.score(QUERIES, progress=False))


def test_plain_datasets_reads_the_columns(built, tmp_path):
    rows = load_dataset(str(built.folder), "member_1", split="train", cache_dir=str(tmp_path))
    assert rows["example_id"][:] == list(range(50))
    stored = torch.cat([shard.features for shard in built.members[1].shards()]).numpy()
    assert np.array_equal(rows.with_format("numpy")["trak_features"][:], stored)
    assert built.features(1).column_names == rows.column_names


def test_float16_features_score_nearly_as_float32(checkpoints, built, tmp_path):
    half = build(tmp_path / "half", checkpoints, config=TrakConfig(proj_dim=32, features_dtype="float16"))
    scores, expected = half.score(QUERIES, progress=False), built.score(QUERIES, progress=False)
    assert np.corrcoef(scores.ravel(), expected.ravel())[0, 1] > 0.9999
    assert "trak_scale" in half.features().column_names


def test_large_scores_are_memory_mapped(built, tmp_path, monkeypatch):
    expected = built.score(QUERIES, progress=False)
    mapped = built.score(QUERIES, output_file=tmp_path / "scores.npy", progress=False)
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(np.load(tmp_path / "scores.npy"), expected)
    monkeypatch.setattr("hf_trak.scoring.scorer._IN_MEMORY_BYTES", 100)
    temporary = built.score(QUERIES, progress=False)
    assert isinstance(temporary, np.memmap)
    assert np.array_equal(temporary, expected)


def test_building_again_computes_nothing_and_changes_nothing(built, checkpoints, monkeypatch):
    before = files_of(built.folder)
    monkeypatch.setattr("hf_trak.featurizing.featurizer.Featurizer.compute", lambda *_: pytest.fail("computed again"))
    build(built.folder, checkpoints)
    assert files_of(built.folder) == before


def test_another_batch_size_agrees_to_round_off(built, checkpoints, tmp_path):
    other = build(tmp_path / "other", checkpoints, batch_size=3, shard_rows=50)
    expected = built.score(QUERIES, progress=False)
    np.testing.assert_allclose(other.score(QUERIES, progress=False), expected, atol=1e-5 * np.abs(expected).max())


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from datasets_for_tests import token_rows
from hf_trak.storage.writer import MemberWriter
from hf_trak import AttributionIndex, TrakConfig
write = MemberWriter.write
def slow_write(self, shard, columns):
    write(self, shard, columns)
    print("finished", self.folder.name, shard, flush=True)
    time.sleep({pause})
MemberWriter.write = slow_write
AttributionIndex.build({folder!r}, models={models!r}, dataset=token_rows(50), config=TrakConfig(proj_dim=32), shard_rows=16, progress=False)
"""


@pytest.mark.parametrize("killed_after", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_kill_9_loses_no_finished_shard_and_ends_in_the_same_bytes(built, checkpoints, tmp_path, monkeypatch, killed_after):
    folder = tmp_path / "index"
    values = {
        "tests": str(Path(__file__).parent),
        "pause": 60 if killed_after == 1 else 0.3,
        "folder": str(folder),
        "models": [str(c) for c in checkpoints],
    }
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(**values)], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    finished = [process.stdout.readline() for _ in range(killed_after)]
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    finished += process.stdout.read().splitlines(keepends=True)
    process.wait()
    rest, write = [], MemberWriter.write

    def telling(self, shard, columns):
        write(self, shard, columns)
        rest.append(f"finished {self.folder.name} {shard}\n")

    monkeypatch.setattr(MemberWriter, "write", telling)
    options = {"config": TrakConfig(proj_dim=32), "shard_rows": 16, "progress": False}
    AttributionIndex.build(folder, models=values["models"], dataset=token_rows(50), **options)
    assert sorted(finished + rest) == sorted(f"finished member_{m} {s}\n" for m in range(2) for s in range(4))
    expected = files_of(built.folder)
    found = files_of(folder)
    assert found.keys() == expected.keys()
    for name in expected:
        if name.endswith((".parquet", ".safetensors")):
            assert found[name] == expected[name], name


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("weights", "model_sha256"),
        ("architecture", "model_class: 'BertForSequenceClassification' there, 'DistilBertForSequenceClassification' here"),
    ],
)
def test_another_model_is_refused_with_the_differences(index, checkpoints, change, difference):
    model = make_model("bert" if change == "weights" else "distilbert", seed=5)
    other = AttributionIndex.from_pretrained(index.folder, models=[model, checkpoints[1]])
    with pytest.raises(ValueError, match="(?s)not what member_0 .* was featurized with.*" + difference):
        other.score(QUERIES, progress=False)


def test_another_task_is_refused(index, checkpoints):
    task = Task.custom(lambda model, batch: model(**batch).logits[:, 0], collator=lambda rows: {}, name="first-logit")
    other = AttributionIndex.from_pretrained(index.folder, models=checkpoints, task=task)
    with pytest.raises(ValueError, match="task: 'text-classification' there, 'first-logit' here"):
        other.score(QUERIES, progress=False)


@pytest.mark.parametrize("field", ["proj_dim", "projector", "parameters", "sketch_seed", "gradients"])
def test_another_configuration_in_the_same_folder_is_refused_and_nothing_is_touched(index, checkpoints, field):
    other = {
        "proj_dim": 16,
        "projector": "dense_rademacher",
        "parameters": ("classifier", "pooler"),
        "sketch_seed": 7,
        "gradients": "functional",
    }
    before = files_of(index.folder)
    with pytest.raises(ValueError, match=f"(?s)holds another index.*{field}"):
        build(index.folder, checkpoints, config=TrakConfig(**{"proj_dim": 32, field: other[field]}))
    assert files_of(index.folder) == before


def test_another_training_set_in_the_same_folder_is_refused(index, checkpoints):
    before = files_of(index.folder)
    with pytest.raises(ValueError, match=r"(?s)holds other features.*dataset\.sha256"):
        build(index.folder, checkpoints, dataset=token_rows(50, seed=9))
    assert files_of(index.folder) == before


def test_overwrite_replaces_an_index(index, checkpoints):
    again = build(index.folder, checkpoints[0], config=TrakConfig(proj_dim=16), overwrite=True)
    assert len(again.members) == 1
    assert again.score(QUERIES, progress=False).shape == (50, 6)


def test_a_folder_of_other_things_is_refused(tmp_path, checkpoints):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no trak_config.json"):
        build(tmp_path, checkpoints, overwrite=True)
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, checkpoints):
    (tmp_path / "index").write_text("mine")
    with pytest.raises(ValueError, match="is a file, where an index needs a folder"):
        build(tmp_path / "index", checkpoints)
    assert (tmp_path / "index").read_text() == "mine"


def test_a_run_killed_before_its_configuration_was_written_goes_on(tmp_path, checkpoints):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / ".trak_config.json.elsewhere.1.tmp").write_text('{"task":')
    assert build(tmp_path / "index", checkpoints[0]).n_rows == 50


def test_a_member_of_another_index_is_refused(index, checkpoints, tmp_path):
    build(tmp_path / "other", checkpoints[0], config=TrakConfig(proj_dim=16))
    shutil.rmtree(index.folder / "member_1")
    shutil.copytree(tmp_path / "other" / "member_0", index.folder / "member_1")
    with pytest.raises(
        ValueError, match=r"member_1 of .* does not belong to this index:\n  config\.proj_dim: 16 there, 32 here"
    ):
        AttributionIndex(index.folder)


def test_a_truncated_shard_is_refused_by_name(index):
    path = index.folder / "member_1" / "train-00002-of-00004.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="train-00002-of-00004.parquet has .* bytes, where .* were written"):
        AttributionIndex.from_pretrained(index.folder)


def test_a_future_format_is_refused(index):
    path = index.folder / "trak_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99, "holograms": True}))
    with pytest.raises(ValueError, match="format version 99.*Upgrade hf_trak"):
        AttributionIndex.from_pretrained(index.folder)


def test_what_is_no_index_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="holds no trak_config.json"):
        AttributionIndex.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder here nor the name of a dataset repository"):
        AttributionIndex.from_pretrained(str(tmp_path / "nowhere"))
    CONFIG.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no finished member"):
        AttributionIndex.from_pretrained(tmp_path)


def test_a_checkpoint_that_moved_is_named(index):
    for member in index.members:
        info = json.loads((member.folder / "member.json").read_text())
        info["checkpoint"]["path"] = "../gone"
        (member.folder / "member.json").write_text(json.dumps(info))
    with pytest.raises(FileNotFoundError, match="The checkpoint of .* is not there now. Say where it is with `models`"):
        AttributionIndex.from_pretrained(index.folder).score(QUERIES, progress=False)


def test_an_index_of_a_model_in_memory_asks_for_it(tmp_path):
    model = make_model("bert")
    index = build(tmp_path / "index", model)
    expected = index.score(QUERIES, progress=False)
    with pytest.raises(ValueError, match="made from a model in memory; give that model"):
        AttributionIndex.from_pretrained(index.folder).score(QUERIES, progress=False)
    again = AttributionIndex.from_pretrained(index.folder, models=model)
    assert np.array_equal(again.score(QUERIES, progress=False), expected)


@pytest.mark.parametrize("n_rows", [1, 2])
def test_tiny_datasets_are_scored_or_refused_clearly(tmp_path, checkpoints, n_rows):
    index = build(tmp_path / "index", checkpoints[0], dataset=TRAIN.select(range(n_rows)))
    assert np.isfinite(index.score(QUERIES, progress=False)).all()
    with pytest.raises(
        ValueError, match=f"With damping=0 the Gram matrix of {n_rows} training examples is singular at proj_dim=32"
    ):
        index.score(QUERIES, damping=0.0, progress=False)


def test_an_empty_dataset_is_refused_and_leaves_nothing(tmp_path, checkpoints, built):
    with pytest.raises(ValueError, match="dataset is empty"):
        build(tmp_path / "index", checkpoints, dataset=TRAIN.select([]))
    assert not (tmp_path / "index").exists()
    with pytest.raises(ValueError, match="no queries"):
        built.score(TRAIN.select([]), progress=False)


def test_labels_the_model_does_not_have_are_refused_before_anything_is_written(tmp_path, checkpoints):
    wrong = TRAIN.map(lambda row, i: {"label": 7 if i in (3, 4) else row["label"]}, with_indices=True)
    with pytest.raises(ValueError, match="0 to 2, the model's 3 classes, but 2 of 50 do not: 7 in rows 3, 4"):
        build(tmp_path / "index", checkpoints, dataset=wrong)
    assert not (tmp_path / "index").exists()


def test_nan_inputs_are_named_and_their_shard_is_not_written(tmp_path):
    dataset = image_rows(20)
    rows = dataset.to_dict()
    rows["pixel_values"][17][0][0][0] = float("nan")
    from datasets import Dataset

    with pytest.raises(ValueError, match="1 examples are not finite: rows 17"):
        build(tmp_path / "index", make_model("vit"), dataset=Dataset.from_dict(rows), shard_rows=10)
    assert (tmp_path / "index" / "member_0" / "train-00000-of-00002.parquet").exists()
    assert not (tmp_path / "index" / "member_0" / "train-00001-of-00002.parquet").exists()


def test_models_that_never_changed_their_output_are_refused(tmp_path):
    """All gradients of the selected parameters are zero."""
    model = make_model("bert")
    with torch.no_grad():
        model.classifier.weight.zero_()
    index = build(tmp_path / "index", model, config=TrakConfig(proj_dim=32, parameters=("pooler",)))
    with pytest.raises(ValueError, match="every training gradient is zero"):
        index.score(QUERIES, progress=False)
