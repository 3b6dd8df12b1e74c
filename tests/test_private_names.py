"""Names of dependencies that are not public: each is used in one file, and its test fails when the dependency changes it."""

import argparse
import ast
from collections import defaultdict
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from accelerate import PartialState
from models import bert, llama_lm
from torch import nn

PACKAGE = Path(__file__).parents[1] / "hf_trak"


def trainer(tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), report_to="none")
    return transformers.Trainer(bert(), args)


def keeps_signature(tmp_path):
    found = trainer(tmp_path)
    found._set_signature_columns_if_needed()
    return {"input_ids", "label"} <= set(found._signature_columns)


def counts_writes(_):
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    return tensor._version == before + 1


def keeps_compiled_call(_):
    module = nn.Linear(2, 2)
    plain = module._compiled_call_impl is None
    module.compile()
    return plain and module._compiled_call_impl is not None


def keeps_hooks_of_embeddings(_):
    model = bert()
    model.enable_input_require_grads()
    return bool(model._require_grads_hooks)


def replaces_parameters(_):
    module = nn.Linear(2, 2)
    module._parameters["weight"] = torch.ones(2, 2)
    return module(torch.ones(1, 2)).shape == (1, 2) and bool((module.weight == 1).all())


def loads_adapters(tmp_path):
    return callable(trainer(tmp_path)._load_from_checkpoint)


def strips_protocol(_):
    import fsspec

    return fsspec.filesystem("memory")._strip_protocol("memory://a/b") == "/a/b"


def sorts_flags(_):
    parser = argparse.ArgumentParser()
    action = parser.add_argument("--a")
    return action in parser._actions and action in parser._optionals._group_actions


def says_flags(_):
    formatter = argparse.HelpFormatter("x")
    return formatter._format_args(argparse.ArgumentParser().add_argument("--a"), "A") == "A"


def takes_flags(_):
    source, target = argparse.ArgumentParser(), argparse.ArgumentParser()
    target._add_action(source.add_argument("--a"))
    return target.parse_args(["--a", "1"]).a == "1"


def has_store(_):
    from torch.distributed.distributed_c10d import _get_default_store

    return callable(_get_default_store)


def keeps_indices(_):
    rows = datasets.Dataset.from_dict({"a": [1, 2, 3]})
    return rows._indices is None and rows.select([2, 0])._indices.column(0).to_pylist() == [2, 0]


NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.batchnorm._NormBase)

# Name: its file, and what is relied on.
PRIVATE = {
    "_BatchNorm": ("sources/path_points.py", lambda _: issubclass(nn.BatchNorm2d, NORMS[0])),
    "_NormBase": ("sources/path_points.py", lambda _: issubclass(nn.InstanceNorm2d, NORMS[1])),
    "_get_no_batch_dim": ("sources/path_points.py", lambda _: nn.InstanceNorm2d(2)._get_no_batch_dim() == 3),
    "_C": ("gradients/shared.py", lambda _: hasattr(torch._C, "DisableTorchFunctionSubclass")),
    "_parameters": ("gradients/shared.py", replaces_parameters),
    "_compiled_call_impl": ("gradients/batch.py", keeps_compiled_call),
    "_require_grads_hooks": ("gradients/batch.py", keeps_hooks_of_embeddings),
    "_version": ("gradients/batch.py", counts_writes),
    "_dynamo": ("gradients/loop.py", lambda _: isinstance(torch.compile(nn.Linear(2, 2)), torch._dynamo.OptimizedModule)),
    "_linear_pointwise": ("matmul.py", lambda _: True),  # a torch without it is served: `onednn_is_faster` looks
    "_fingerprint": ("hashing.py", lambda _: isinstance(datasets.Dataset.from_dict({"a": [1]})._fingerprint, str)),
    "_indices": ("sources/repositories.py", keeps_indices),
    "_get_default_store": ("distributed.py", has_store),
    "_shared_state": ("distributed.py", lambda _: isinstance(PartialState._shared_state, dict)),
    "_attn_implementation": ("tasks/outputs.py", lambda _: llama_lm().config._attn_implementation in ("sdpa", "eager")),
    "_supports_sdpa": ("tasks/outputs.py", lambda _: llama_lm()._supports_sdpa is True),
    "_get_feat_extract_output_lengths": (
        "tasks/transcripts.py",
        lambda _: hasattr(transformers.Wav2Vec2ForCTC, "_get_feat_extract_output_lengths"),
    ),
    "_get_output_attention_mask": (
        "tasks/transcripts.py",
        lambda _: hasattr(transformers.ParakeetForCTC, "_get_output_attention_mask"),
    ),
    "_set_signature_columns_if_needed": ("training/checks.py", keeps_signature),
    "_signature_columns": ("training/checks.py", keeps_signature),
    "_loss_function": ("training/checks.py", lambda _: isinstance(transformers.PreTrainedModel.loss_function, property)),
    "_load_from_checkpoint": ("training/runs.py", loads_adapters),
    "_name_or_path": ("training/run_identity.py", lambda _: hasattr(bert().config, "_name_or_path")),
    "_strip_protocol": ("storage/object_store.py", strips_protocol),
    "_actions": ("cli/parsing.py", sorts_flags),
    "_optionals": ("cli/parsing.py", sorts_flags),
    "_group_actions": ("cli/parsing.py", sorts_flags),
    "_format_args": ("cli/parsing.py", says_flags),
    "_add_action": ("cli/completion.py", takes_flags),
}


def is_private(name):
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def defined(tree):
    """Return the private names that the package's own classes have."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    names.add(member.name)
                targets = [member.target] if isinstance(member, ast.AnnAssign) else getattr(member, "targets", [])
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", None) == "self":
            names.add(node.attr)
    return names


def named(node):
    """Return the attributes that a node reads, or looks for by name, and what it imports from elsewhere."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "hasattr"):
        return [getattr(node.args[1], "value", None)]
    if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("hf_trak"):
        return [alias.name for alias in node.names]
    return []


def test_each_private_name_of_a_dependency_is_used_in_one_file():
    trees = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    ours = {"_asdict", "_replace"}.union(*map(defined, trees.values()))  # the first two are named tuples' public ones
    found = defaultdict(set)
    for file, tree in trees.items():
        for node in ast.walk(tree):
            for name in named(node):
                if is_private(name) and name not in ours:
                    found[name].add(file)
    assert dict(found) == {name: {file} for name, (file, _) in PRIVATE.items()}


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_still_is_what_the_package_takes_it_for(name, tmp_path):
    assert PRIVATE[name][1](tmp_path)
