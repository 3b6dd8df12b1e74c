"""Label errors: the formula against a loop that leaves rows out, planted errors, suggested labels, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, load_dataset
from datasets_for_tests import image_rows, save_model, token_rows
from models import make_model
from reference import label_suspicion

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.cli.main import main
from hf_trak.evaluation import mislabel_auc
from hf_trak.querying.label_errors import GivenLabels
from hf_trak.scoring.label_errors import rank_share, standardized

CONFIG = TrakConfig(proj_dim=32)
TRAIN, HELD_OUT = token_rows(50), token_rows(6, seed=1)


def build(folder, models, **options):
    options = {"dataset": TRAIN, "config": CONFIG, "shard_rows": 16, "progress": False, **options}
    return AttributionIndex.build(folder, models=models, **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("label_errors")
    return build(folder / "index", [save_model(folder / f"bert-{seed}", seed=seed) for seed in range(2)])


def columns_of(index, name):
    return [torch.cat([getattr(shard, name) for shard in member.shards()]).numpy() for member in index.members]


def by_row(found):
    return {name: np.array(found[name])[np.argsort(found["row"])] for name in ("score", "evidence", "doubt")}


@pytest.mark.parametrize("damping", [3.0, 0.3])
@pytest.mark.parametrize("with_held_out", [False, True])
def test_suspicion_is_that_of_a_loop_that_leaves_rows_out(built, with_held_out, damping):
    queries = [built.featurize_queries(HELD_OUT, member, progress=False) for member in range(2)]
    held_out = [columns["trak_features"] for columns in queries] if with_held_out else None
    expected = label_suspicion(columns_of(built, "features"), columns_of(built, "output"), damping, held_out)
    found = built.label_errors(HELD_OUT if with_held_out else None, damping=damping, progress=False)
    for name, values in zip(("score", "evidence", "doubt"), expected, strict=True):
        assert np.isfinite(by_row(found)[name]).all()
        np.testing.assert_allclose(by_row(found)[name], values, rtol=2e-4, atol=2e-5, err_msg=name)
    assert found["rank"][:] == list(range(1, 51))
    assert np.all(np.diff(found["score"]) <= 0)


def test_the_suggested_label_is_of_the_class_whose_rows_oppose_most(built):
    labels = np.array(TRAIN["label"])
    total = np.zeros((50, labels.max() + 1))
    for member in columns_of(built, "features"):
        phi = member.astype(np.float64)
        damped = phi.T @ phi
        damped += 3.0 * np.trace(damped) / min(phi.shape) * np.eye(phi.shape[1])
        for i, row in enumerate(phi):
            influence = phi @ np.linalg.inv(damped - np.outer(row, row)) @ row
            influence[i] = 0
            total[i] += np.bincount(labels, influence)
    total[np.arange(50), labels] = np.inf
    found = built.label_errors(train=TRAIN, progress=False)
    rows = np.array(found["row"])
    assert found["given_label"][:] == labels[rows].tolist()
    assert found["suggested_label"][:] == total.argmin(1)[rows].tolist()
    assert found["input_ids"][:] == [TRAIN["input_ids"][row] for row in rows]


def test_names_of_classes_and_other_columns_are_kept(tmp_path):
    rows = token_rows(20)
    names = ClassLabel(names=["low", "high", "other"])
    rows = rows.cast(Features({**rows.features, "label": names})).add_column("url", [f"u{i}" for i in range(20)])
    index = build(tmp_path / "index", save_model(tmp_path / "model"), dataset=rows)
    found = index.label_errors(train=rows.with_format("torch"), budget=0.25, progress=False)
    assert found.features["suggested_label"] == found.features["given_label"] == names
    assert found["url"][:] == [f"u{row}" for row in found["row"]]
    assert "label" not in found.column_names


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Three clusters of images, a third of whose labels are flipped, under a model that was trained on them."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 360)
    centers = rng.normal(size=(3, 3, 8, 8))
    pixels = (0.45 * centers[true] + rng.normal(size=(360, 3, 8, 8))).astype(np.float32)
    flipped = np.zeros(360, dtype=bool)
    flipped[rng.permutation(300)[:100]] = True
    labels = np.where(flipped, (true + rng.integers(1, 3, 360)) % 3, true)
    model = make_model("vit", seed=0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    inputs, targets = torch.from_numpy(pixels[:300]), torch.from_numpy(labels[:300])
    torch.manual_seed(0)
    for _ in range(12):
        for batch in torch.randperm(300).split(30):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(pixel_values=inputs[batch]).logits, targets[batch]).backward()
            optimizer.step()
    rows = Dataset.from_dict({"pixel_values": pixels, "label": labels.tolist()})
    train, held_out = rows.select(range(300)), rows.select(range(300, 360))
    folder = tmp_path_factory.mktemp("planted")
    model.eval().save_pretrained(folder / "model")
    index = build(folder / "index", folder / "model", dataset=train, config=TrakConfig(proj_dim=256))
    return SimpleNamespace(index=index, train=train, held_out=held_out, true=true[:300], flipped=flipped[:300])


@pytest.mark.parametrize(("with_held_out", "gain"), [(False, 0.02), (True, 0.05)])
def test_planted_errors_are_found_better_than_by_self_influence(planted, with_held_out, gain):
    found = planted.index.label_errors(planted.held_out if with_held_out else None, train=planted.train, progress=False)
    area = mislabel_auc(by_row(found)["score"], planted.flipped)
    assert area > mislabel_auc(planted.index.self_influence(), planted.flipped) + gain
    assert area > 0.8
    top = found.select(range(50))
    right = [planted.true[row] == label for row, label in zip(top["row"], top["suggested_label"], strict=True)]
    if with_held_out:  # nearly all of the first rows are wrong, and two other classes are left
        assert np.mean(right) > 0.6


def test_members_of_one_sketch_and_checkpoint_change_nothing(tmp_path):
    model = save_model(tmp_path / "model")
    one = build(tmp_path / "one", model, config=TrakConfig(proj_dim=3, projector="identity", parameters=("classifier.bias",)))
    two = build(tmp_path / "two", [model] * 2, config=one.config)
    for name, values in by_row(one.label_errors(HELD_OUT, progress=False)).items():
        np.testing.assert_allclose(by_row(two.label_errors(HELD_OUT, progress=False))[name], values, rtol=1e-12)


def test_ranks_and_spreads_of_values_that_tie():
    values = torch.tensor([2.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    assert rank_share(values).tolist() == [2.5 / 4, 1 / 4, 2.5 / 4, 1.0]
    assert standardized(torch.full((3,), 2.0, dtype=torch.float64)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (TRAIN.select(range(49)), "not the training set of .*1 of the index's 50 rows"),
        (TRAIN.rename_column("label", "target"), "lacks 'label'"),
        (TRAIN.remove_columns("label").add_column("label", [1] * 50), "not the training set"),
    ],
)
def test_a_training_set_that_cannot_serve_is_refused(built, train, message):
    with pytest.raises(ValueError, match=message):
        built.label_errors(train=train, progress=False)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1] * 50, "All 50 labels in column 'label' of `train` are 1"),
        ([0, None] * 25, "25 of 50 labels .* the first at row 1: None"),
        ([0.5, 1.0] * 25, "25 of 50 labels .* the first at row 0: 0.5"),
        ([0, 1], "`train` has 2 rows, but the index was made of 50"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        GivenLabels(Dataset.from_dict({"label": labels}), n_rows=50, label_column=None)


def test_labels_may_be_names():
    given = GivenLabels(Dataset.from_dict({"label": ["low", "high", "low"]}), n_rows=3, label_column=None)
    assert given.classes.tolist() == ["high", "low"]
    assert given.codes.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (HELD_OUT.remove_columns("label"), "The queries lack 'label'"),
        (image_rows(4), "The queries lack 'input_ids'"),
        (HELD_OUT.select([]), "`validation` has no rows"),
    ],
)
def test_held_out_rows_that_cannot_serve_are_refused(built, validation, message):
    with pytest.raises(ValueError, match=message):
        built.label_errors(validation, progress=False)


@pytest.mark.parametrize("budget", [0, -3, 0.0, 1.0, 1.5, True])
def test_a_budget_is_rows_or_a_share(built, budget):
    with pytest.raises(ValueError, match="`budget` must be a number of rows"):
        built.label_errors(budget=budget, progress=False)


def test_other_tasks_are_refused_by_name(tmp_path):
    rows = image_rows(6)
    rows = rows.remove_columns("label").add_column("label", [float(i) for i in range(6)])
    model = make_model("vit", seed=0)
    model = type(model)(type(model.config).from_dict({**model.config.to_dict(), "num_labels": 1}))
    model.save_pretrained(tmp_path / "model")
    index = build(tmp_path / "index", tmp_path / "model", dataset=rows)
    with pytest.raises(ValueError, match="'image-regression'.*self_influence"):
        index.label_errors(progress=False)


def test_the_command_writes_what_the_index_says_and_shows_the_first(built, tmp_path, capsys):
    TRAIN.to_parquet(str(tmp_path / "train.parquet"))
    HELD_OUT.to_parquet(str(tmp_path / "held_out.parquet"))
    output = tmp_path / "out" / "suspicious.parquet"
    flags = ["--train", str(tmp_path / "train.parquet"), "--output", str(output)]
    held_out = ["--validation", str(tmp_path / "held_out.parquet")]
    assert main(["label-errors", str(built.folder), *flags, *held_out, "--budget", "12"]) == 0
    printed = capsys.readouterr().out
    expected = built.label_errors(HELD_OUT, train=TRAIN, budget=12, progress=False)
    found = load_dataset("parquet", data_files=str(output), split="train")
    assert found.column_names == expected.column_names
    assert found["row"][:] == expected["row"][:]
    np.testing.assert_array_equal(found["score"], expected["score"])
    first = expected[0]
    assert f"row {first['row']:>6}  [{first['given_label']} -> {first['suggested_label']}]" in printed
    assert printed.count("   row  ") == 10
    assert f"12 of 50 training rows, by suspicion: {output}" in printed
    assert main(["label-errors", str(built.folder), *flags]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["label-errors", str(built.folder), *flags[:2], "--output", str(tmp_path / "rows.txt")]) == 1
    assert "must end in .jsonl or .parquet" in capsys.readouterr().err
    assert main(["label-errors", str(built.folder), *flags, "--overwrite", "--budget", "few"]) == 1
    assert "--budget must be a number of rows" in capsys.readouterr().err


def test_kept_columns_stand_for_the_training_set(tmp_path, capsys):
    names = ClassLabel(names=["low", "high", "other"])
    rows = token_rows(30).add_column("url", [f"u{i}" for i in range(30)])
    rows = rows.cast(Features({**rows.features, "label": names}))
    index = build(tmp_path / "index", save_model(tmp_path / "model"), dataset=rows, keep_columns=["url", "label"])
    expected = index.label_errors(train=rows, progress=False)
    found = index.label_errors(budget=7, progress=False)
    for name in ("row", "score", "given_label", "suggested_label", "url"):
        assert found[name][:] == expected[name][:7]
    assert found.features["given_label"] == names
    assert main(["label-errors", str(index.folder), "--output", str(tmp_path / "found.jsonl"), "--budget", "7"]) == 0
    printed = capsys.readouterr().out
    written = load_dataset("json", data_files=str(tmp_path / "found.jsonl"), split="train")
    assert written["row"][:] == found["row"][:]
    assert written["url"][:] == found["url"][:]
    first = found[0]
    label, other = (names.int2str(first[name]) for name in ("given_label", "suggested_label"))
    assert f"row {first['row']:>6}  [{label} -> {other}]  {first['url']}" in printed


def test_without_kept_labels_or_a_training_set_rows_are_ranked_without_labels(built, tmp_path, capsys):
    assert main(["label-errors", str(built.folder), "--output", str(tmp_path / "found.parquet"), "--budget", "3"]) == 0
    found = load_dataset("parquet", data_files=str(tmp_path / "found.parquet"), split="train")
    assert found.column_names == ["rank", "row", "score", "evidence", "doubt"]
    assert "->" not in capsys.readouterr().out.replace("given label -> suggested label", "")


def test_the_command_finds_the_training_rows_in_any_order_and_names_the_flag(built, tmp_path, capsys):
    order = np.random.default_rng(0).permutation(50).tolist()
    TRAIN.select([*order, *order[:9]]).to_parquet(str(tmp_path / "more.parquet"))
    TRAIN.select(range(20)).to_parquet(str(tmp_path / "fewer.parquet"))
    flags = ["--output", str(tmp_path / "found.parquet"), "--budget", "12"]
    assert main(["label-errors", str(built.folder), "--train", str(tmp_path / "more.parquet"), *flags]) == 0
    found = load_dataset("parquet", data_files=str(tmp_path / "found.parquet"), split="train")
    expected = built.label_errors(train=TRAIN, budget=12, progress=False)
    assert found["input_ids"][:] == expected["input_ids"][:]
    assert found["given_label"][:] == expected["given_label"][:]
    capsys.readouterr()
    assert main(["label-errors", str(built.folder), "--train", str(tmp_path / "fewer.parquet"), *flags, "--overwrite"]) == 1
    assert f"--train {tmp_path / 'fewer.parquet'}: This is not the training set" in capsys.readouterr().err
