"""`--task module:name`: a task of the user's own on the command line, imported only where it is named."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from datasets_for_tests import save_model, token_rows

from hf_trak import AttributionIndex, Task, TrakConfig
from hf_trak.cli.main import main
from hf_trak.tasks import import_task

CODE = """
from pathlib import Path
import torch
from hf_trak import Task

Path(__file__).with_name("imported").touch()

def collator(rows):
    width = max(len(row["input_ids"]) for row in rows)
    pad = lambda values: values + [0] * (width - len(values))
    return {
        "input_ids": torch.tensor([pad(row["input_ids"]) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"])) for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }

def chosen(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.gather(1, batch["labels"].unsqueeze(1)).squeeze(1)

def doubled(model, batch):
    return 2 * chosen(model, batch)

logit = Task.custom(chosen, collator=collator)
twice = Task.custom(doubled, collator=collator, name="chosen")
moved = Task.custom(chosen, collator=collator)

def of_model(model, config):
    scale = float(model.config.num_labels)
    return Task.custom(lambda model, batch: scale * chosen(model, batch), collator=collator, name="scaled")

def of_nothing(model, config):
    return None

def fails(model, config):
    return model.config.n_words

number = 3

class Nested:
    logit = logit
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a module of tasks, a model, a training set and queries."""
    (tmp_path / "my_tasks.py").write_text(CODE)
    (tmp_path / "broken_tasks.py").write_text("import does_not_exist\n")
    (tmp_path / "wrong_tasks.py").write_text("1 / 0\n")
    save_model(tmp_path / "bert", seed=0)
    token_rows(12).to_parquet(tmp_path / "train.parquet")
    token_rows(4, seed=1).to_parquet(tmp_path / "validation.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_tasks", "broken_tasks", "wrong_tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("my_tasks", "broken_tasks", "wrong_tasks"):
        sys.modules.pop(name, None)


def featurize(*more, output="index"):
    return main(["featurize", "--model", "bert", "--dataset", "train.parquet", "--output", output, "--proj_dim", "16", *more])


def attribute(*more, index="index", output="hits.jsonl"):
    return main(["attribute", "--index", index, "--queries", "validation.parquet", "--output", output, "--top_k", "3", *more])


def features(index):
    return np.asarray(index.features(0)["trak_features"])


def error_of(capsys):
    """Return the last error, which must be one line."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines, "nothing was said"
    assert lines[-1].startswith("hf-trak: "), lines
    assert len([line for line in lines if "Traceback" in line]) == 0
    return lines[-1]


def test_a_task_is_named_recorded_and_given_again(place, capsys):
    assert featurize("--task", "my_tasks:logit") == 0
    from my_tasks import logit  # the module that the command imported

    info = json.loads((place / "index" / "member_0" / "member.json").read_text())
    assert "my_tasks:logit" in json.dumps(info)
    api = AttributionIndex.build(
        place / "api",
        models=place / "bert",
        dataset=token_rows(12),
        config=TrakConfig(proj_dim=16),
        task=logit,
        progress=False,
    )
    index = AttributionIndex.from_pretrained(place / "index", task=logit)
    assert np.array_equal(features(index), features(api))
    assert attribute("--task", "my_tasks:logit") == 0
    hits = [json.loads(line) for line in (place / "hits.jsonl").read_text().splitlines()]
    expected = api.attribute(token_rows(4, seed=1), 3, progress=False)
    assert [hit["proponents"] for hit in hits] == list(expected["proponents"])


def test_an_index_never_imports_the_code_that_it_names(place, capsys):
    assert featurize("--task", "my_tasks:logit") == 0
    (place / "imported").unlink()
    del sys.modules["my_tasks"]
    assert attribute() == 1
    said = error_of(capsys)
    assert "was made with a task of your own, 'custom:chosen', whose code an index does not hold" in said
    assert "--task my_tasks:logit" in said
    assert main(["verify", "index"]) == 0
    assert not (place / "imported").exists(), "nothing was imported"
    assert "my_tasks" not in sys.modules
    # A hostile name in the index is only shown.
    path = place / "index" / "member_0" / "member.json"
    path.write_text(path.read_text().replace("my_tasks:logit", "wrong_tasks:logit"))
    assert attribute() == 1
    assert "--task wrong_tasks:logit" in error_of(capsys)
    assert "wrong_tasks" not in sys.modules


def test_another_task_than_the_recorded_one_is_refused(place, capsys):
    assert featurize("--task", "my_tasks:logit") == 0
    assert attribute("--task", "my_tasks:moved") == 1
    assert "made with the task 'my_tasks:logit', but 'my_tasks:moved' is given" in error_of(capsys)
    shutil.rmtree(place / "index")
    assert featurize() == 0
    assert attribute("--task", "my_tasks:logit") == 1
    assert "custom:chosen" in capsys.readouterr().err


def test_a_task_whose_code_has_changed_is_refused(place, capsys):
    assert featurize("--task", "my_tasks:logit") == 0
    del sys.modules["my_tasks"]
    (place / "my_tasks.py").write_text(f"# A comment is no change.\n{CODE}")
    assert attribute("--task", "my_tasks:logit") == 0
    del sys.modules["my_tasks"]
    (place / "my_tasks.py").write_text(CODE.replace("return logits.gather", "return -logits.gather"))
    assert attribute("--task", "my_tasks:logit", output="more.jsonl") == 1
    said = capsys.readouterr().err
    assert "This is not what member_0" in said
    assert "task_code" in said
    assert not (place / "more.jsonl").exists()


def test_another_output_of_the_same_training_set_is_another_index(place, capsys):
    assert featurize("--task", "my_tasks:logit") == 0
    assert featurize("--task", "my_tasks:twice") == 1
    assert featurize("--task", "my_tasks:twice", output="other") == 0
    first, second = (features(AttributionIndex.from_pretrained(place / name)) for name in ("index", "other"))
    assert np.abs(first).max() > 0
    np.testing.assert_allclose(second, 2 * first, rtol=1e-4, atol=1e-5)


def test_a_function_of_the_model_makes_the_task(place):
    assert featurize("--task", "my_tasks:of_model") == 0
    assert featurize("--task", "my_tasks:Nested.logit", output="plain") == 0
    scaled, plain = (features(AttributionIndex.from_pretrained(place / name)) for name in ("index", "plain"))
    n_labels = json.loads((place / "bert" / "config.json").read_text())["id2label"]
    np.testing.assert_allclose(scaled, len(n_labels) * plain, rtol=1e-4, atol=1e-5)
    assert attribute("--task", "my_tasks:of_model") == 0
    from my_tasks import of_model

    scores = AttributionIndex.from_pretrained(place / "index", task=of_model).score(token_rows(4, seed=1), progress=False)
    assert np.isfinite(scores).all()


BAD = {
    "no module": ("none_such:x", r"there is no module 'none_such', neither installed nor in .*PYTHONPATH"),
    "no parent": ("none_such.tasks:x", r"there is no module 'none_such.tasks'"),
    "no submodule": ("my_tasks.more:x", r"importing my_tasks.more failed|there is no module 'my_tasks.more'"),
    "import fails": ("broken_tasks:x", r"importing broken_tasks failed: No module named 'does_not_exist'"),
    "code fails": ("wrong_tasks:x", r"importing wrong_tasks failed: ZeroDivisionError: division by zero"),
    "no name": ("my_tasks:logits", r"my_tasks \(.*my_tasks\.py\) has no 'logits'\. Did you mean .*logit"),
    "a number": ("my_tasks:number", r"must be a Task, or a function .* but 'number' of my_tasks .* is a int"),
    "an output": ("my_tasks:chosen", r"the function takes \(model, batch\), as an output function does.*Task\.custom"),
    "one argument": ("my_tasks:collator", r"the function takes \(rows\), which does not fit two arguments"),
    "nothing made": ("my_tasks:of_nothing", r"called as \(model, config\) it returned a NoneType"),
    "function fails": ("my_tasks:fails", r"could not be made: AttributeError: .*n_words"),
    "no colon": ("my_tasks", r"must be module:name, such as my_tasks:salary, but is 'my_tasks'"),
    "a path": ("./my_tasks.py:logit", r"must be module:name"),
    "no attribute": ("my_tasks:", r"must be module:name"),
    "built in": ("causal-lm", r"must be module:name.*A task of this library .* follows from the model"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_is_no_task_is_refused_in_one_line_before_work(place, capsys, name):
    given, message = BAD[name]
    assert featurize("--task", given) == 1
    assert re.search(message, said := error_of(capsys)), said
    assert not (place / "index").exists()


def test_lds_takes_the_task(place, capsys):
    assert featurize("--task", "my_tasks:logit") == 0
    generator = np.random.default_rng(0)
    truth = {
        "subset": list(range(6)),
        "seed": [0] * 6,
        "mask": (generator.random((6, 12)) < 0.5).tolist(),
        "outputs": generator.normal(size=(6, 4)).tolist(),
    }
    Dataset.from_dict(truth).to_parquet(place / "truth.parquet")
    common = ["evaluate", "lds", "--ground_truth", "truth.parquet", "--index", "index", "--queries", "validation.parquet"]
    common += ["--n_bootstrap", "0", "--train", "train.parquet", "--baselines", "gradient_cosine"]
    assert main(common) == 1
    assert "--task my_tasks:logit" in error_of(capsys)
    assert main([*common, "--task", "my_tasks:logit"]) == 0
    assert "gradient_cosine" in capsys.readouterr().out
    assert main(["evaluate", "lds", "--ground_truth", "truth.parquet", "--scores", "x.npy", "--task", "my_tasks:logit"]) == 1
    assert "--task: how an index scores, but there is no --index" in error_of(capsys)


def test_label_errors_imports_the_task_and_refuses_what_has_no_labels(place, capsys):
    assert featurize("--task", "my_tasks:logit") == 0
    common = ["label-errors", "index", "--train", "train.parquet", "--output", "suspects.jsonl"]
    assert main([*common, "--task", "none_such:x"]) == 1
    assert "there is no module 'none_such'" in error_of(capsys)
    assert main([*common, "--task", "my_tasks:logit"]) == 1
    assert "label" in error_of(capsys)


def test_import_task_keeps_the_name(place):
    sys.path.append(str(place))
    found = import_task("my_tasks:logit")
    assert isinstance(found, Task)
    assert found.import_path == "my_tasks:logit"
    assert Path(sys.modules["my_tasks"].__file__) == place / "my_tasks.py"
