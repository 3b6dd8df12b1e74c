"""Rules of the package: imports point downwards, importing is cheap, and files say what they are."""

import ast
import graphlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_trak"

# A file imports from lower layers, and within its own folder; a file at the top is a folder of its own here.
LAYERS = {
    "cli": 7,
    "explorer": 6.5,
    "trainer": 6,
    "trainer_mixin": 5.5,
    "evaluation": 6,
    "metrics": 6,
    "index": 5,
    "building": 4,
    "querying": 4,
    "featurizing": 3,
    "hub": 3,
    "training": 3,
    "gradients": 2,
    "plots": 2,
    "scoring": 2,
    "training_args": 2,
    "feature_args": 1,
    "projectors": 1,
    "sources": 1,
    "storage": 1,
    "tasks": 1,
    "config": 0.5,
    "hashing": 0,
    "linalg": 0,
    "members": 0,
    "matmul": 0,
    "messages": 0,
    "distributed": 0,
    "runtime": 0,
}
TENSORS_ONLY = [
    "gradients",
    "hashing.py",
    "linalg.py",
    "matmul.py",
    "projectors",
    "scoring/score.py",
    "scoring/damping.py",
    "scoring/ensemble.py",
    "scoring/label_errors.py",
    "scoring/selection.py",
    "scoring/top_k.py",
]
HUGGING_FACE = {"transformers", "datasets", "accelerate", "huggingface_hub"}


def folder_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
TREES = {path: ast.parse(path.read_text()) for path in MODULES}
FILES = {name_of(path): path for path in MODULES}


def imported_modules(path, *, types=True):
    """Yield the modules that a file imports, anywhere in it; those for types alone on request."""
    statements = [TREES[path]]
    while statements:
        node = statements.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [name for name in inside if name in FILES] or [node.module]
        elif types or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            statements.extend(ast.iter_child_nodes(node))


def test_every_folder_has_a_layer():
    assert {folder_of(path) for path in MODULES} == set(LAYERS)


def test_imports_point_downwards():
    upwards = []
    for path in MODULES:
        folder = folder_of(path)
        for name in imported_modules(path):
            other = name.split(".")[1] if name.startswith("hf_trak.") else folder
            if other != folder and LAYERS[other] >= LAYERS[folder]:
                upwards.append(f"{name_of(path)} (layer {LAYERS[folder]}) imports {name} (layer {LAYERS[other]})")
    assert not upwards, "\n".join(upwards)


def test_no_file_imports_itself_by_way_of_others():
    imports = {name: FILES.keys() & set(imported_modules(path, types=False)) for name, path in FILES.items()}
    tuple(graphlib.TopologicalSorter(imports).static_order())  # raises with the circle


def test_numerical_files_never_import_hugging_face():
    offenders = []
    for place in TENSORS_ONLY:
        files = [path for path in MODULES if path.is_relative_to(PACKAGE / place)]
        assert files, place
        imported = {path: {name.split(".")[0] for name in imported_modules(path)} for path in files}
        offenders += [
            f"{name_of(path)} imports {names & HUGGING_FACE}" for path, names in imported.items() if names & HUGGING_FACE
        ]
    assert not offenders, "\n".join(offenders)


def test_every_file_says_in_its_first_line_what_is_inside():
    assert not [name_of(path) for path, tree in TREES.items() if not ast.get_docstring(tree)]


def test_every_public_name_has_a_docstring():
    silent = [
        f"{name_of(path)}.{node.name}"
        for path, tree in TREES.items()
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if not ast.get_docstring(node) and folder_of(path) != "gradients"
    ]
    assert not silent, "\n".join(silent)


# Functions that hand on more than eight of their parameters one by one, and why.
FORWARDING = {
    "hf_trak.trainer.AttributionTrainer.__init__": "the signature of Trainer, spelled out",
}


def forwarded(function):
    """Return how many of its own parameters a function hands on by name in one call or dictionary, at most."""
    arguments = function.args
    own = {one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    found = [0]
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
        elif isinstance(node, ast.Dict):
            values = node.values
        else:
            continue
        found.append(len(own & {value.id for value in values if isinstance(value, ast.Name)}))
    return max(found)


def functions_in(node, place):
    """Yield every function of a file or class with its dotted name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{place}.{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield name, child
            yield from functions_in(child, name)
        else:
            yield from functions_in(child, place)


def test_no_function_hands_on_more_than_eight_parameters_one_by_one():
    long = {name: forwarded(function) for path, tree in TREES.items() for name, function in functions_in(tree, name_of(path))}
    assert {name for name, count in long.items() if count > 8} == set(FORWARDING)


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
