"""Subset retraining: masks, runs that depend on their subset and seed alone, stopping, sharing, collecting."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from models import N_CLASSES
from paper_models import ResNet9Config, ResNet9ForImageClassification

from hf_trak import AutoTask
from hf_trak.evaluation import Recipe, SubsetJob, collect, ground_truth_from, make_masks
from hf_trak.evaluation.training import RowsInMemory, RowsOnDemand, augment, outputs_on, train
from hf_trak.sources.checkpoints import load_model

RECIPE = Recipe(learning_rate=0.05, epochs=2, batch_size=4, peak_epoch=0.5, flip=True, translate=1)
MASKS = make_masks(12, 3, 0.5, seed=4)


def make_model():
    return ResNet9ForImageClassification(ResNet9Config(width=2, num_labels=N_CLASSES))


def rows(n_rows=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n_rows, 3, 12, 12, generator=generator)
    return RowsInMemory({"pixel_values": pixels, "labels": torch.arange(n_rows) % N_CLASSES})


TASK = AutoTask.from_model(make_model())


def make_job(folder, **options):
    arguments = {"masks": MASKS, "n_seeds": 2, "recipe": RECIPE, "identity": {"data": "random"}, **options}
    return SubsetJob(Path(folder), **arguments)


def work(job, train_rows=None, make=make_model, **options):
    train_rows = train_rows if train_rows is not None else rows()
    job.work(make, train_rows, rows(5, seed=1), TASK, progress=False, **options)
    return job


def contents(job):
    return {path.name: path.read_bytes() for path in sorted((job.folder / "runs").iterdir())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return work(make_job(tmp_path_factory.mktemp("subsets") / "job", keep_epochs=1))


# Masks


@pytest.mark.parametrize(("n_train", "alpha", "size"), [(10, 0.5, 5), (11, 0.3, 3), (7, 1.0, 7)])
def test_every_mask_has_as_many_examples(n_train, alpha, size):
    masks = make_masks(n_train, 20, alpha)
    assert masks.shape == (20, n_train)
    assert (masks.sum(1) == size).all()


def test_masks_are_uniform():
    """Each of 30 examples is in half of 2,000 masks, and each pair in (n/2 − 1) / (n − 1) of those, within five standard errors."""
    masks = make_masks(30, 2000).astype(float)
    together = masks.T @ masks / len(masks)
    expected = np.where(np.eye(30), 0.5, 0.5 * 14 / 29)
    assert np.abs(together - expected).max() < 5 * np.sqrt(0.25 / 2000)


def test_a_mask_depends_on_its_seed_and_number_alone():
    assert (make_masks(50, 8, seed=3)[:5] == make_masks(50, 5, seed=3)).all()
    assert len({mask.tobytes() for seed in (0, 1) for mask in make_masks(50, 20, seed=seed)}) == 40


def test_masks_are_the_same_on_every_machine():
    expected = ["010001111001", "010111000110", "110100010011"]
    assert ["".join(map(str, mask.astype(int))) for mask in MASKS] == expected


@pytest.mark.parametrize(
    ("n_subsets", "alpha", "message"), [(0, 0.5, "at least 1, but is 0"), (3, 0.0, "0.0 of 10"), (3, 1.5, "1.5 of")]
)
def test_masks_of_nothing_are_refused(n_subsets, alpha, message):
    with pytest.raises(ValueError, match=message):
        make_masks(10, n_subsets, alpha)


# Runs


def test_runs_differ_in_subset_and_seed(finished):
    outputs = finished.outputs()
    assert outputs.shape == (2, 3, 5)
    assert np.isfinite(outputs).all()
    assert len({row.tobytes() for row in outputs.reshape(6, 5)}) == 6


def test_a_runs_outputs_are_those_of_its_kept_weights(finished):
    for run in finished.runs:
        model = load_model(str(finished.checkpoint(run)))
        np.testing.assert_array_equal(outputs_on(model, rows(5, seed=1), TASK), finished.outputs()[run.seed, run.subset])


def test_only_the_examples_of_a_mask_influence_a_run(finished, tmp_path):
    outputs = finished.outputs()
    for example, changed in ((0, MASKS[:, 0]), (4, MASKS[:, 4])):
        others = rows()
        others.tensors["pixel_values"][example] *= -3
        again = work(make_job(tmp_path / str(example)), others).outputs()
        assert 0 < changed.sum() < len(MASKS)
        np.testing.assert_array_equal((again != outputs).any((0, 2)), changed)


def test_training_fits_its_subset():
    torch.manual_seed(0)
    model = ResNet9ForImageClassification(ResNet9Config(width=6, num_labels=N_CLASSES))
    subset = [0, 1, 2, 6, 7]
    train(model, rows(), subset, Recipe(learning_rate=0.1, epochs=60, batch_size=5, peak_epoch=5), seed=0)
    assert (outputs_on(model, rows(), TASK)[subset] > 1).all()


def test_torchs_own_generator_is_left_as_it_was(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    work(make_job(tmp_path, masks=MASKS[:1], n_seeds=1))
    assert torch.equal(torch.rand(3), expected)


def test_what_a_killed_process_left_beside_a_checkpoint_is_removed(tmp_path):
    job = make_job(tmp_path / "job", masks=MASKS[:1], n_seeds=1, keep_epochs=1)
    leftover = job.checkpoint(job.runs[0]).parent / f".epoch-0002.here.{2**22 + 1}.tmp"
    leftover.mkdir(parents=True)
    work(job)
    assert [path.name for path in leftover.parent.iterdir()] == ["epoch-0002"]


def test_what_was_drawn_before_does_not_change_a_run(finished, tmp_path):
    torch.manual_seed(77)
    again = work(make_job(tmp_path / "job", masks=MASKS[:1], n_seeds=1))
    np.testing.assert_array_equal(again.outputs()[0, 0], finished.outputs()[0, 0])


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_nothing(tmp_path):
    job = make_job(tmp_path, recipe=Recipe(learning_rate=1e30, epochs=2, batch_size=4, peak_epoch=0))
    with pytest.raises(FloatingPointError, match="try a lower learning rate than 1e"):
        work(job)
    assert contents(job) == {}


# Stopping and sharing


def test_a_stopped_job_goes_on_and_ends_in_the_same_bytes(finished, tmp_path):
    made = 0

    def stopping():
        nonlocal made
        made += 1
        if made == 4:
            raise KeyboardInterrupt
        return make_model()

    job = make_job(tmp_path / "job")
    with pytest.raises(KeyboardInterrupt):
        work(job, make=stopping)
    assert [run.name for run in job.missing()] == [run.name for run in job.runs[3:]]
    before = {path: path.stat().st_mtime_ns for path in (job.folder / "runs").iterdir()}
    job = work(make_job(tmp_path / "job"))
    assert contents(job) == contents(finished)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())  # nothing is done twice


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
import test_subsets
from hf_trak.evaluation import training
steps = 0
original = training._loss
def loss(*arguments):
    global steps
    steps += 1
    if steps == 10:  # in the middle of the third run
        os.kill(os.getpid(), 9)
    return original(*arguments)
training._loss = loss
test_subsets.work(test_subsets.make_job({folder!r}, keep_epochs=1))
"""


@pytest.mark.slow
def test_a_job_killed_in_the_middle_of_a_run_goes_on_and_ends_in_the_same_bytes(finished, tmp_path):
    folder = tmp_path / "job"
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -9
    assert len(make_job(folder, keep_epochs=1).missing()) == 4
    job = work(make_job(folder, keep_epochs=1))
    assert contents(job) == contents(finished)
    for run in job.runs:
        weights = [(one.checkpoint(run) / "model.safetensors").read_bytes() for one in (job, finished)]
        assert weights[0] == weights[1]


@pytest.mark.parametrize("n_shards", [2, 4])
def test_shards_are_one_job(finished, tmp_path, n_shards):
    job = make_job(tmp_path / "job")
    shares = [{run.name for run in job.missing(shard=shard, n_shards=n_shards)} for shard in range(n_shards)]
    assert sum(map(len, shares)) == len(set.union(*shares)) == 6
    for shard in reversed(range(n_shards)):
        assert {run.name for run in job.missing(shard=shard, n_shards=n_shards)} == shares[shard]
        work(make_job(tmp_path / "job"), shard=shard, n_shards=n_shards)
    assert contents(job) == contents(finished)


def test_a_shard_that_does_not_exist_is_refused(finished):
    with pytest.raises(ValueError, match="must lie in 0 to 1, but is 2"):
        finished.missing(shard=2, n_shards=2)


def test_another_job_in_the_folder_is_refused_with_what_differs(tmp_path):
    work(make_job(tmp_path / "job", masks=MASKS[:1], n_seeds=1))
    with pytest.raises(ValueError, match=r"(?s)recipe.epochs: 2 there, 3 here.*overwrite=True"):
        make_job(tmp_path / "job", masks=MASKS[:1], n_seeds=1, recipe=Recipe(**{**vars(RECIPE), "epochs": 3}))
    with pytest.raises(ValueError, match="data: 'random' there, 'other' here"):
        make_job(tmp_path / "job", masks=MASKS[:1], n_seeds=1, identity={"data": "other"})
    before = {path.name: path.read_bytes() for path in (tmp_path / "job" / "runs").iterdir()}
    (tmp_path / "job" / "thesis.tex").write_text("years of work")
    assert make_job(tmp_path / "job", overwrite=True).missing() == make_job(tmp_path / "job").runs
    aside = tmp_path / "job" / "replaced-1"
    assert {path.name: path.read_bytes() for path in (aside / "runs").iterdir()} == before
    assert (tmp_path / "job" / "thesis.tex").read_text() == "years of work"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear to someone")
    with pytest.raises(ValueError, match="is not empty and holds no job"):
        make_job(tmp_path, overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n_seeds": 0}, "`n_seeds` must be at least 1"), ({"keep_epochs": 3}, "must lie in 0 to 2, the epochs, but is 3")],
)
def test_jobs_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_job(tmp_path, **options)


def test_masks_for_other_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="masks are for 12 training rows, but there are 11"):
        work(make_job(tmp_path), rows(11))


def test_outputs_of_an_unfinished_job_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="6 of 6 runs .* are missing, the first subset-00000-seed-000; run the same"):
        make_job(tmp_path).outputs()


# Collecting


def test_a_collected_job_survives_parquet_and_any_order_of_rows(finished, tmp_path):
    dataset = collect(finished)
    assert dataset.features["mask"].length == 12
    dataset.shuffle(seed=0).to_parquet(str(tmp_path / "ground_truth.parquet"))
    loaded = load_dataset("parquet", data_files=str(tmp_path / "ground_truth.parquet"), split="train", cache_dir=str(tmp_path))
    masks, outputs = ground_truth_from(loaded)
    np.testing.assert_array_equal(masks, MASKS)
    np.testing.assert_array_equal(outputs, finished.outputs())


def test_a_saved_job_is_a_file_that_datasets_reads(finished):
    path = finished.save()
    assert path.name == "job.parquet"
    masks, outputs = ground_truth_from(Dataset.from_parquet(str(path)))
    np.testing.assert_array_equal(masks, MASKS)
    np.testing.assert_array_equal(outputs, finished.outputs())


def test_a_ground_truth_with_a_run_missing_or_twice_is_refused(finished):
    dataset = collect(finished)
    with pytest.raises(ValueError, match="each of 2 seeds once for each of 3 subsets, but there are 5 rows"):
        ground_truth_from(dataset.select(range(5)))
    with pytest.raises(ValueError, match="each of 2 seeds once"):
        ground_truth_from(dataset.select([0, 0, 2, 3, 4, 5]))
    with pytest.raises(ValueError, match="mask is missing"):
        ground_truth_from(dataset.remove_columns("mask"))


# Rows, recipes, augmentation


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    recipe = Recipe(learning_rate=0.4, epochs=24, peak_epoch=5)
    assert [recipe.learning_rate_at(epoch) for epoch in (0, 2.5, 5, 14.5, 24)] == pytest.approx([0, 0.2, 0.4, 0.2, 0])
    falling = Recipe(learning_rate=0.4, epochs=4, peak_epoch=0)
    assert [falling.learning_rate_at(epoch) for epoch in (0, 1, 4)] == pytest.approx([0.4, 0.3, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "must be 'sgd' or 'adamw', but is 'lion'"),
        ({"epochs": 0}, "must be at least 1"),
        ({"epochs": 4, "peak_epoch": 5}, "must lie in 0 to 4, the epochs, but is 5"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_an_image_is_moved_and_mirrored_and_nothing_else():
    image = torch.arange(1.0, 49).reshape(1, 3, 4, 4)
    generator = torch.Generator().manual_seed(0)
    batch = {"pixel_values": image.expand(200, -1, -1, -1), "labels": torch.zeros(200)}
    moved = augment(batch, Recipe(flip=True, translate=1), generator)["pixel_values"]
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    possible = {
        candidate[:, :, down : down + 4, right : right + 4].numpy().tobytes()
        for candidate, mirrored in ((padded, False), (padded.flip(3), True))
        for down in range(3)
        for right in range(3)
    }
    assert {one.numpy().tobytes() for one in moved.split(1)} == possible  # all 18 occur among 200 draws


def test_texts_are_cut_to_the_batchs_longest():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    held = RowsInMemory(
        {"input_ids": torch.arange(12).reshape(3, 4), "attention_mask": mask, "labels": torch.tensor([0, 1, 0])}
    )
    batches = list(held.batches([[1, 0], [2]]))
    assert batches[0]["input_ids"].tolist() == [[4, 5, 6], [0, 1, 2]]
    assert batches[0]["labels"].tolist() == [1, 0]
    assert batches[1]["input_ids"].shape == (1, 4)


def test_rows_on_demand_are_the_rows_in_memory():
    held = rows(6)
    dataset = Dataset.from_dict(
        {"pixel_values": held.tensors["pixel_values"].numpy(), "labels": held.tensors["labels"].numpy()}
    )
    order = [[4, 1], [0, 2, 3]]
    for lazy, ready in zip(RowsOnDemand(dataset, TASK).batches(order), held.batches(order), strict=True):
        assert all(torch.equal(lazy[key], ready[key]) for key in ready)
