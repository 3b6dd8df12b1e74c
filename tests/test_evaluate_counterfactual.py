"""scripts/evaluate_counterfactual.py on tiny images."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of which class 1 is brighter, and scores of two methods."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name, count in (("train", 24), ("test", 5)):
        pixels = [generator.integers(60, size=(12, 12, 3)) + 190 * (number % 2) for number in range(count)]
        images = [PILImage.fromarray(values.astype(np.uint8)) for values in pixels]
        features = Features({"image": Image(), "label": ClassLabel(names=["dark", "bright"])})
        rows = Dataset.from_dict({"image": images, "label": [number % 2 for number in range(count)]}, features=features)
        rows.to_parquet(str(folder / f"{name}.parquet"))
    same = np.equal.outer(np.arange(24) % 2, np.arange(5) % 2)
    np.save(folder / "same.npy", same.astype(np.float32))
    np.save(folder / "other.npy", -same.astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))  # it shares a function with its neighbour
    try:
        return importlib.import_module("evaluate_counterfactual")
    finally:
        sys.path.remove(str(SCRIPTS))


def run(script, folder, output, *more):
    flags = {
        "model": "resnet9", "width": 4, "num_labels": 2, "train_file": "train.parquet", "query_file": "test.parquet",
        "epochs": 6, "batch_size": 6, "peak_epoch": 2, "learning_rate": 0.1, "data": folder, "output": output, "n_targets": 3,
        "n_seeds": 1, "top_k": 12,
    }  # fmt: skip
    arguments = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    scores = ["--scores", f"same={folder / 'same.npy'}", f"other={folder / 'other.npy'}"]
    script.main(*script.parse_arguments([*arguments, *scores, *more]))


def test_removing_a_querys_own_class_lowers_its_output_more_than_removing_the_other(script, folder, tmp_path):
    run(script, folder, tmp_path, "--result", str(tmp_path / "result.json"))
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    delta = {row["method"]: row["value"] for row in rows if row["metric"] == "counterfactual_delta"}
    assert set(delta) == {"same", "other", "random"}
    assert delta["same"] < min(delta["other"], delta["random"])
    # nothing removed, at random, and two methods for three targets
    assert len(list((tmp_path / "runs").glob("*.json"))) == 2 + 2 * 3


def test_scores_without_a_name_are_refused(script, folder, tmp_path):
    with pytest.raises(ValueError, match="METHOD=FILE.npy"):
        run(script, folder, tmp_path, "--scores", str(folder / "same.npy"))
