"""The benchmark on CIFAR-2, at sizes for a CPU: its steps are what they should be, and what it leaves is whole, to the end or stopped."""

import argparse
import importlib
import io
import json
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
N_TRAIN, N_QUERY = 48, 12  # of the scale "tiny"
LINE = "line from the initial weights, α = 0.5"
POINTS = ["epoch 2, final weights", "epoch 1", LINE, f"{LINE}, statistics measured there"]


def import_benchmark(name):
    """Benchmarks are scripts, and import each other by their names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def write_images(path, count, seed):
    """Write squares of random colours whose brightness tells their label, as PNG in Parquet, the way the Hub has CIFAR-10."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(2, size=count)
    encoded = []
    for label in labels:
        file = io.BytesIO()
        pixels = np.kron(generator.integers(0, 196, size=(4, 4, 3)), np.ones((8, 8, 1), dtype=int)) + 60 * label
        Image.fromarray(pixels.astype(np.uint8)).save(file, format="PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"image": encoded, "label": labels}), path)


def options_in(folder):
    write_images(folder / "train.parquet", N_TRAIN, seed=0)
    write_images(folder / "test.parquet", N_QUERY, seed=1)
    output = folder / "out" / "gpu_cifar2.json"
    return argparse.Namespace(data=folder, output=output, device="cpu", scale="tiny", seconds=600.0, begun=time.time())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run everything once; return the JSON and both files of arrays."""
    options = options_in(tmp_path_factory.mktemp("cifar2"))
    import_benchmark("gpu_cifar2").main(options)
    arrays = [dict(np.load(options.output.with_name(name))) for name in ("gpu_cifar2.npz", "gpu_cifar2_predictions.npz")]
    return SimpleNamespace(json=json.loads(options.output.read_text()), runs=arrays[0], predictions=arrays[1])


def rows_of(finished, metric):
    return [row for row in finished.json["rows"] if row["metric"] == metric]


@pytest.mark.parametrize("point", POINTS)
def test_every_point_is_judged_by_every_damping_of_one_run_and_of_three(finished, point):
    found = {(row["method"], row["n_checkpoints"]): row for row in rows_of(finished, "lds")}
    for n in (1, 3):
        for damping, value in {"auto": 3.0, "0.3": 0.3, "1": 1.0, "10": 10.0}.items():
            row = found[f"{point}, damping {damping}", n]
            assert row["damping"] == value
            assert row["out_to_loss_power"] == 0.5
            assert -1.001 <= row["interval"][0] <= row["interval"][1] <= 1.001  # round-off
    one = found[f"{point}, damping auto", 1]
    assert one["value"] == pytest.approx(np.mean(one["each_run"]))
    assert len(one["each_run"]) == 3


def test_what_is_published_is_judged_at_the_final_weights_alone(finished):
    published = [row for row in rows_of(finished, "lds") if "as published" in row["method"]]
    assert [row["n_checkpoints"] for row in published] == [1, 3]
    assert all((row["damping"], row["out_to_loss_power"]) == (0, 1) for row in published)
    assert all(row["method"].startswith("epoch 2, final weights") for row in published)
    found = {(row["method"], row["n_checkpoints"]): row["value"] for row in finished.json["rows"] if "n_checkpoints" in row}
    for point in POINTS:
        for n, row in zip((1, 3), published, strict=True):
            more = found[f"{point}, damping auto, less the published", n]
            assert more == pytest.approx(found[f"{point}, damping auto", n] - row["value"])


def test_a_gram_that_is_singular_is_damped_as_little_as_can_be(tmp_path):
    benchmark = import_benchmark("gpu_cifar2")
    masks, outputs = np.eye(6, N_TRAIN, dtype=bool), np.random.default_rng(0).standard_normal((6, N_QUERY))
    features = torch.randn(N_TRAIN, 4, generator=torch.Generator().manual_seed(0)).repeat(1, 2)  # of rank 4 in 8 dimensions
    member = benchmark.Member(features, torch.rand(N_TRAIN), features.double().T @ features.double(), features[:N_QUERY])
    results = benchmark.Results(argparse.Namespace(**{**vars(options_in(tmp_path)), "begun": time.time()}))
    compare = benchmark.Comparison(benchmark.Judge(masks, outputs, 5, torch.device("cpu")), results)
    compare.point("here", [member], final=True)
    published = [row for row in results.rows if "TRAK as published" in row["method"]]
    assert [row["damping"] for row in published] == [1e-6, 1e-6]
    assert all("(1e-06, since the Gram matrix is singular)" in row["method"] for row in published)
    assert any("is singular with damping=0" in note for note in results.notes)


def test_masks_are_halves_and_outputs_are_those_of_their_runs(finished):
    masks = np.unpackbits(finished.runs["masks"], axis=1, count=int(finished.runs["n_train"]))
    assert masks.shape == (8, N_TRAIN)
    assert (masks.sum(1) == N_TRAIN // 2).all()
    assert finished.runs["outputs"].shape == (8, N_QUERY)
    assert finished.runs["outputs"].dtype == np.float32
    assert finished.runs["subset"].tolist() == [*range(4), *range(4)]
    assert finished.runs["seed"].tolist() == [0] * 4 + [1] * 4
    assert (masks[:4] == masks[4:]).all()
    assert (finished.runs["outputs"][:4] != finished.runs["outputs"][4:]).any()  # another seed is another run


def test_an_lds_is_found_again_from_what_is_kept(finished):
    from hf_trak.evaluation import spearman

    outputs = finished.runs["outputs"][finished.runs["seed"] == 0]
    for row in rows_of(finished, "lds"):
        name = f"{row['method']}, of {row['n_checkpoints']}"
        kept = [values for key, values in finished.predictions.items() if key == name or key.startswith(f"{name}, run ")]
        assert len(kept) == (3 if row["n_checkpoints"] == 1 else 1)
        again = np.mean([np.nanmean(spearman(values.astype(float), outputs)) for values in kept])
        assert again == pytest.approx(row["value"], abs=1e-9)


def test_times_sizes_and_departures_are_recorded(finished):
    stages = {row["method"] for row in rows_of(finished, "stage_s")}
    assert stages >= {"loading", "training on everything", "training on halves", "attributing", "everything"}
    assert {row["method"]: row["n_runs"] for row in rows_of(finished, "train_run_s")} == {
        "run on the whole training set": 3,
        "run on a half": 8,
    }
    assert {row["method"] for row in rows_of(finished, "accuracy")} == {
        "runs on the whole training set, training rows",
        "runs on the whole training set, test rows",
        "runs on halves, test rows",
    }
    assert rows_of(finished, "featurize_rows_per_s")[0]["value"] > 0
    assert rows_of(finished, "relative_error")[0]["value"] < 1e-4
    assert finished.json["name"] == "gpu_cifar2"
    assert any("as published, 512" in note for note in finished.json["notes"])


def test_a_run_that_diverges_is_noted_and_another_seed_takes_its_place(tmp_path, runs):
    _, images, ours = runs
    benchmark = import_benchmark("gpu_cifar2")
    results = benchmark.Results(options_in(tmp_path))
    seeds, train = [], ours.run

    def run(seed, subset, **arguments):
        seeds.append(seed)
        train(seed, subset, **arguments)
        if len(seeds) == 1:
            with torch.no_grad():
                ours.parameters[-1].fill_(torch.nan)

    ours.run = run
    (found,) = benchmark.train_one(ours, 7, torch.arange(24), [images], results)
    assert seeds == [7, 10_000_007]
    assert np.isfinite(found).all()
    assert results.notes == [f"The run of seed 7 diverged: {N_TRAIN} of {N_TRAIN} margins are not finite."]


class NoCompiler:
    """Gram matrices that cannot be compiled."""

    def __getattr__(self, name):
        raise RuntimeError("there is no compiler")


@pytest.mark.parametrize("works", [True, False])
def test_kernels_of_the_sketch_are_off_where_they_fail(tmp_path, monkeypatch, runs, works):
    from hf_trak.projectors import count_sketch as ring

    benchmark, results = import_benchmark("gpu_cifar2"), []
    asked = []

    def kernels_for(device):
        asked.append(device)
        if works:  # the script finds kernels, but the sketch gets none and uses plain tensors
            return None if len(asked) > 1 else object()
        return NoCompiler()

    monkeypatch.setattr(ring, "kernels_for", kernels_for)
    note = SimpleNamespace(note=results.append)
    benchmark.Gradients(benchmark.SCALES["tiny"], runs[1], runs[1], note)
    assert (ring.kernels_for is kernels_for) == works
    assert f"kernels are {'on' if works else 'off'}" in results[-1]
    assert works or "there is no compiler" in results[0]


def test_a_run_that_is_stopped_leaves_what_it_found(tmp_path, monkeypatch):
    options, benchmark = options_in(tmp_path), import_benchmark("gpu_cifar2")
    before = signal.signal(signal.SIGTERM, benchmark.stop)
    outputs_of, calls = benchmark.Runs.outputs, []

    def outputs(runs, images):
        calls.append(len(images))
        if len(calls) == 10:  # after two of each run on everything: the fourth run on a half
            os.kill(os.getpid(), signal.SIGTERM)
        return outputs_of(runs, images)

    monkeypatch.setattr(benchmark.Runs, "outputs", outputs)
    try:
        with pytest.raises(SystemExit, match="what was found until now is written"):
            benchmark.main(options)
    finally:
        signal.signal(signal.SIGTERM, before)
    metrics = [row["metric"] for row in json.loads(options.output.read_text())["rows"]]
    assert metrics.count("train_run_s") == 1
    assert dict(np.load(options.output.with_suffix(".npz")))["outputs"].shape == (3, N_QUERY)
    assert sorted(path.name for path in options.output.parent.iterdir()) == ["gpu_cifar2.json", "gpu_cifar2.npz"]


@pytest.fixture
def runs(tmp_path):
    """Return the module, images, and runs over them in steps of 8."""
    module = import_benchmark("resnet9_runs")
    write_images(tmp_path / "train.parquet", N_TRAIN, seed=0)
    images = module.Images.load(tmp_path / "train.parquet", torch.device("cpu"))
    recipe = replace(import_benchmark("gpu_cifar2").SCALES["tiny"].recipe, batch_size=8)
    return module, images, module.Runs(images, recipe, width=4, note=pytest.fail)


def test_images_are_decoded_in_order_and_normalized(tmp_path, runs):
    module, images, _ = runs
    table = pq.read_table(tmp_path / "train.parquet")
    assert images.labels.tolist() == table["label"].to_pylist()
    pixels = np.asarray(Image.open(io.BytesIO(table["image"][7].as_py()["bytes"]))).transpose(2, 0, 1)
    expected = (pixels - np.reshape(module.MEAN, (3, 1, 1))) / np.reshape(module.STD, (3, 1, 1))
    np.testing.assert_allclose(images.pixels[7].numpy(), expected, atol=1e-5)


def test_images_of_another_size_are_refused(tmp_path, runs):
    file = io.BytesIO()
    Image.fromarray(np.zeros((28, 28, 3), dtype=np.uint8)).save(file, format="PNG")
    pq.write_table(pa.table({"image": [{"bytes": file.getvalue(), "path": None}], "label": [0]}), tmp_path / "small.parquet")
    with pytest.raises(ValueError, match=re.escape("Expected images of 32 × 32 pixels, but one is of shape (28, 28, 3).")):
        runs[0].Images.load(tmp_path / "small.parquet", torch.device("cpu"))


def test_a_steps_images_are_mirrored_moved_and_cut_as_planned(runs):
    module, images, ours = runs
    ours.begin(3, torch.arange(N_TRAIN))
    ours.step.fill_(5)
    pixels, labels = ours._batch()
    plan = module.Plan(*(drawn[5] for drawn in ours.plan))
    assert len(set(plan.mirrored.tolist())) == 2
    for number, row in enumerate(plan.rows.tolist()):
        (down, right), (top, left) = plan.moved[number].tolist(), plan.cut[number].tolist()
        image = images.pixels[row].flip(2) if plan.mirrored[number] else images.pixels[row]
        expected = torch.zeros(3, 36, 36)
        expected[:, 2:34, 2:34] = image
        if plan.mirrored[number]:  # what is moved is the window over the plain image
            right = 4 - right
        expected = expected[:, down : down + 32, right : right + 32].clone()
        expected[:, top : top + 4, left : left + 4] = 0
        torch.testing.assert_close(pixels[number], expected, rtol=0, atol=0)
        assert labels[number] == images.labels[row]


def test_an_epoch_takes_every_row_of_the_subset_once(runs):
    module, _, ours = runs
    subset = torch.arange(0, N_TRAIN, 2)
    plan = module.Plan.draw(subset, ours.recipe, seed=0)
    for epoch in plan.rows.view(ours.recipe.epochs, -1):
        assert epoch.sort().values.tolist() == subset.tolist()
    assert plan.rows[0].tolist() != plan.rows[3].tolist()
    assert set(plan.moved.flatten().tolist()) == {0, 1, 2, 3, 4}


def test_steps_are_those_of_torchs_sgd(runs, monkeypatch):
    module, _, ours = runs
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # whose round-off hides a weight decay
    ours.begin(3, torch.arange(N_TRAIN))
    torch.manual_seed(3)
    model = module.ResNet9ForImageClassification(ours.config).to(memory_format=torch.channels_last).train()
    recipe = ours.recipe
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    for step in range(4):
        pixels, labels = ours._batch()
        optimizer.param_groups[0]["lr"] = recipe.learning_rate_at((step + 0.5) / 6)  # 48 rows are six steps
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels).backward()
        optimizer.step()
        ours._take_step()
    for (name, values), found in zip(model.state_dict().items(), ours.model.state_dict().values(), strict=True):
        torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_a_run_does_not_depend_on_the_one_before(runs):
    _, images, ours = runs
    subset = torch.arange(0, N_TRAIN, 2)
    ours.run(1, subset)
    first = ours.outputs(images)
    ours.run(2, torch.arange(N_TRAIN))
    assert (ours.outputs(images) != first).any()
    ours.run(1, subset)
    np.testing.assert_array_equal(ours.outputs(images), first)


@pytest.mark.parametrize(("n_rows", "expected"), [(5000, 500), (10_000, 500), (1024, 512), (48, 24), (2050, 341)])
def test_batches_divide_a_half_into_equal_steps(runs, n_rows, expected):
    size = runs[0].batch_size_for(n_rows)
    assert size == expected
    assert n_rows // 2 % size < -(-(n_rows // 2) // 512)  # what is left out, at most
