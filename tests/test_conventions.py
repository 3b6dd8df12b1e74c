"""The house's own rules: imports point downwards, importing is cheap, and files say what they are."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_trak"

# Longest prefix wins. Files of one floor do not import each other, unless they share a folder.
FLOORS = {
    "cli": 8,
    "trainer": 7,
    "more_runs": 6.75,
    "callback": 6.5,
    "runs": 6.5,
    "training_args": 6,
    "evaluation": 6,
    "metrics": 6,
    "feature_args": 5,
    "index": 5,
    "questions": 4.9,
    "query_side": 4.75,
    "search_index": 4.25,
    "scores": 4,
    "query_features": 4,
    "building": 4.7,
    "one_pass": 4.65,
    "parts": 4.6,
    "build": 4.5,
    "hub_mixin": 4.75,
    "copies": 4,
    "hub": 4,
    "upload": 3.9,
    "cards": 3.75,
    "damping": 3.5,
    "ensemble": 3.5,
    "score_matrix": 3.5,
    "featurizer": 3,
    "featurize": 3,
    "scoring": 3,
    "kernel_sums": 2.75,
    "passes": 2.5,
    "member_writer": 2.25,
    "autocast": 2.5,
    "gradients": 2,
    "shard_blocks": 2.5,
    "store": 2,
    "batching": 2,
    "ahead": 2,
    "adapters": 2,
    "revisions": 2,
    "processing": 2,
    "sources": 2,
    "tasks": 1,
    "models": 1,
    "projectors": 1,
    "launchers": 0.75,
    "processes": 0.5,
    "placement": 0,
    "stopping": 0,
    "members": 0,
    "memory": 0,
    "garbage": 0,
    "gathering": 0,
    "config": 0,
    "linalg": 0,
    "hashing": 0,
}
TENSORS_ONLY = ["linalg", "hashing", "scoring", "projectors", "gradients"]


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    room = room_of(path)
    for name in imported_modules(path):
        if name.startswith("hf_trak."):
            other = name.split(".")[1]
            assert other == room or FLOORS[other] < FLOORS[room], f"{room} (floor {FLOORS[room]}) imports {name}"


@pytest.mark.parametrize("room", TENSORS_ONLY)
def test_numerical_floors_never_import_hugging_face(room):
    files = [path for path in modules() if room_of(path) == room]
    assert files
    for path in files:
        heavy = {name.split(".")[0] for name in imported_modules(path)} & {
            "transformers",
            "datasets",
            "accelerate",
            "huggingface_hub",
        }
        assert not heavy, f"{path} imports {heavy}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_says_in_its_first_line_what_is_inside(path):
    assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    for node in public:
        assert ast.get_docstring(node) or room_of(path) == "gradients", f"{path.name}: {node.name}"


def test_importing_hf_trak_loads_nothing_heavy():
    code = (
        "import sys, hf_trak; print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_importing_hf_trak_takes_under_a_third_of_a_second():
    def seconds(code):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    assert min(seconds("import hf_trak") for _ in range(3)) - min(seconds("pass") for _ in range(3)) < 0.3


def test_every_public_name_is_there():
    import hf_trak

    for name in hf_trak.__all__:
        assert getattr(hf_trak, name).__doc__, name
    assert set(hf_trak.__all__) <= set(dir(hf_trak))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        hf_trak.nonsense  # noqa: B018
