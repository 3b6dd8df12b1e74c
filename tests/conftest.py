"""Check shapes and dtypes of every numeric function in every test, and turn off downloads."""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="hf_trak-tests-")  # only for this test session
os.environ.setdefault("HF_TRAK_CACHE", _CACHE.name)
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from pathlib import Path

import pytest
from shape_checks import begin_test, check_shapes

# This must come before the first import of these modules, because modules that are already imported are not checked.
check_shapes(
    [
        "hf_trak.linalg",
        "hf_trak.hashing",
        "hf_trak.projectors",
        "hf_trak.gradients",
        "hf_trak.scoring.score",
        "hf_trak.scoring.damping",
        "hf_trak.scoring.ensemble",
        "hf_trak.scoring.label_errors",
        "hf_trak.scoring.scorer",
        "hf_trak.scoring.scorer",
        "hf_trak.scoring.search_index",
        "hf_trak.scoring.top_k",
        "hf_trak.scoring.top_k",
        "hf_trak.querying.queries",
        "hf_trak.querying.label_errors",
        "hf_trak.evaluation.baselines.arnoldi",
        "hf_trak.evaluation.baselines.arnoldi",
        "hf_trak.evaluation.baselines.arnoldi",
        "hf_trak.evaluation.counterfactual",
    ]
)

import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _check_shapes_again() -> None:
    begin_test()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder with the datasets that some tests read."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}")
    return folder
