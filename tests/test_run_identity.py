"""The same run or another: arguments, what the trainer was given, its model, weights and data; and checkpoints that are not whole."""

import copy
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import torch
from datasets_for_tests import token_rows
from models import make_model
from test_runs import Steps, Stop, assert_equal_models, collate, make_trainer
from tokenizers_for_tests import word_tokenizer
from transformers import EarlyStoppingCallback

from hf_trak import AttributionArguments
from hf_trak.feature_args import FeatureArguments
from hf_trak.hashing import hash_json
from hf_trak.training.run_identity import (
    _INDIFFERENT,
    _ONLY_FOR_THE_BEST,
    compare_weights,
    describe,
    describe_run,
    list_run_differences,
)

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

KILLED = {"save_strategy": "steps", "save_steps": 3}
SCALE = torch.tensor([1.0, 2.0, 3.0])


def collate_to_the_left(rows):
    return {name: values.flip(1) if name != "labels" else values for name, values in collate(rows).items()}


def scaled_loss(outputs, labels, num_items_in_batch=None):
    return (SCALE[labels] * torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")).mean()


def describe_with(folder, *, change=lambda trainer: None, **options):
    trainer = make_trainer(folder, **options)
    change(trainer)
    return describe_run(trainer)


@dataclass
class NewerArguments(AttributionArguments):
    """As a later transformers may have them."""

    sharpness: float = field(default=0.5, metadata={"help": "Of nothing."})


def test_every_argument_decides_but_for_a_short_list(tmp_path):
    trainer = make_trainer(tmp_path)
    before = describe_run(trainer)["arguments"]
    of_features = {one.name for one in fields(FeatureArguments)}
    left_out = _INDIFFERENT | _ONLY_FOR_THE_BEST | of_features | {"subset_alpha"}
    names = [one.name for one in fields(AttributionArguments)]
    assert set(names) >= _INDIFFERENT, "arguments that there are no more"
    assert len(_INDIFFERENT) < len(names) / 3
    for name in names:
        trainer.args = copy.copy(trainer.args)
        kept = getattr(trainer.args, name)
        if name == "members":
            continue
        object.__setattr__(trainer.args, name, "steps" if name == "save_strategy" else "another value")
        if name != "load_best_model_at_end":
            changed = (
                describe_run(trainer, {"given": {"": 0}, "model": {"": 0}, "initial_weights": {"": 0}})["arguments"] != before
            )
            assert changed == (name not in left_out), name
        object.__setattr__(trainer.args, name, kept)


def test_an_argument_that_is_new_is_noticed(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args = NewerArguments(str(tmp_path), use_cpu=True)
    before = describe_run(trainer)
    trainer.args = NewerArguments(str(tmp_path), use_cpu=True, sharpness=0.25)
    assert list_run_differences(before, describe_run(trainer)) == ["arguments.sharpness: 0.5 there, 0.25 here"]


def test_which_checkpoints_are_written_decides_where_the_best_is_loaded(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5}
    before = describe_with(tmp_path, save_steps=5, **best)
    assert list_run_differences(before, describe_with(tmp_path, save_steps=10, **best)) == [
        "arguments.save_steps: 5 there, 10 here"
    ]


GIVEN = {
    "collator": {"trainer_options": {"data_collator": collate_to_the_left}},
    "loss": {"trainer_options": {"compute_loss_func": scaled_loss}},
    "processing class": {"trainer_options": {"processing_class": word_tokenizer()}},
    "optimizer": {"trainer_options": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}},
    "early stopping": {
        "trainer_options": {"callbacks": [EarlyStoppingCallback(2)]},
        "eval_strategy": "epoch",
        "metric_for_best_model": "loss",
    },
    "label names": {"label_names": ["labels", "more"]},
    "data": {"trainer_options": {"train_dataset": token_rows(40, seed=5)}},
    "configuration": {"change": lambda trainer: setattr(trainer.model.config, "hidden_dropout_prob", 0.3)},
    "frozen": {"change": lambda trainer: trainer.model.bert.embeddings.requires_grad_(False)},
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_a_trainer_was_given_decides(tmp_path, name):
    before = describe_with(tmp_path)
    assert list_run_differences(before, describe_with(tmp_path)) == []
    assert list_run_differences(before, describe_with(tmp_path, **GIVEN[name]))


def test_a_function_is_told_by_its_code_its_globals_and_what_it_closes_over():
    def make(factor):
        def loss(outputs, labels):
            return factor * outputs

        return loss

    assert describe(make(2.0)) == describe(make(2.0))
    assert describe(make(2.0)) != describe(make(3.0))
    before = describe(scaled_loss)
    SCALE[0] = 5.0
    assert describe(scaled_loss) != before
    SCALE[0] = 1.0
    assert describe(scaled_loss) == before


def test_a_tokenizer_that_has_been_used_is_the_same():
    fresh, used = word_tokenizer(), word_tokenizer()
    used(["a b c", "d"], truncation=True, max_length=2, padding=True)
    assert describe(fresh) == describe(used)
    used.add_tokens(["k"])
    assert describe(fresh) != describe(used)


OTHER_PROCESS = """
import sys, json
sys.path.insert(0, {tests!r})
from test_run_identity import GIVEN, describe_with
from hf_trak.hashing import hash_json
print(hash_json(describe_with({folder!r}, **GIVEN["loss"])))
"""


def test_another_process_describes_a_run_alike(tmp_path):
    code = OTHER_PROCESS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.split()[-1:] == [hash_json(describe_with(tmp_path, **GIVEN["loss"]))], result.stderr[-2000:]


def test_a_head_that_is_drawn_anew_is_told_and_other_weights_are_another_run(tmp_path):
    before = describe_with(tmp_path)
    assert compare_weights(before, describe_with(tmp_path)) == (True, None)

    def new_head(trainer):
        torch.nn.init.normal_(trainer.model.classifier.weight)

    same, line = compare_weights(before, describe_with(tmp_path, change=new_head))
    assert same
    assert "tensors differ, such as classifier.weight: " in line
    same, line = compare_weights(before, describe_with(tmp_path, trainer_options={"model": make_model("bert", seed=1)}))
    assert not same


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(KeyboardInterrupt):
        make_trainer(folder, trainer_options={"callbacks": [Stop(run=1, step=7)]}, **KILLED).train()
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("stock"), stock=True)
    trainer.train()
    return trainer.model


CONTINUED = {
    "average_tokens_across_devices": (
        {"average_tokens_across_devices": False},
        "average_tokens_across_devices: True there, False here",
    ),
    "label_names": ({"label_names": ["labels", "extra"]}, r"label_names: .*there, \['labels', 'extra'\] here"),
    "collator": ({"trainer_options": {"data_collator": collate_to_the_left}}, "'collate' there, 'collate_to_the_left' here"),
    "weights": ({"trainer_options": {"model": make_model("bert", seed=1)}}, "initial weights: .* there, .* here"),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_a_changed_run_starts_again_and_both_values_are_told(killed, tmp_path, caplog, name):
    options, message = copy.deepcopy(CONTINUED[name])
    shutil.copytree(killed, tmp_path / "run")
    steps = Steps()
    given = {**options.pop("trainer_options", {}), "callbacks": [steps]}
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path / "run", trainer_options=given, **KILLED, **options).train()
    assert steps.runs == [10]
    assert "records an unfinished run of other settings, so training starts again" in caplog.text
    assert re.search(message, caplog.text), caplog.text


def test_what_cannot_matter_does_not_keep_a_run_from_going_on(killed, tmp_path, uninterrupted):
    shutil.copytree(killed, tmp_path / "run")
    steps = Steps()
    options = {**KILLED, "logging_strategy": "steps", "run_name": "again", "save_steps": 2, "save_total_limit": 5}
    again = make_trainer(tmp_path / "run", trainer_options={"callbacks": [steps]}, **options)
    again.train()
    assert steps.runs == [4]
    assert_equal_models(again.model, uninterrupted)


def cut(name):
    def damage(checkpoint):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])

    return damage


DAMAGES = {
    "state": (cut("trainer_state.json"), "trainer_state.json is damaged"),
    "random numbers": (cut("rng_state.pth"), "rng_state.pth is damaged"),
    "optimizer": (cut("optimizer.pt"), "optimizer.pt is damaged"),
    "schedule": (lambda checkpoint: (checkpoint / "scheduler.pt").unlink(), "it holds no scheduler.pt"),
    "weights": (cut("model.safetensors"), "model.safetensors is damaged"),
    "no weights": (lambda checkpoint: (checkpoint / "model.safetensors").unlink(), "it holds no weights"),
    "unfinished": (lambda checkpoint: (checkpoint / "trainer_state.json").unlink(), "writing it was not finished"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_set_aside_and_training_goes_on_from_the_one_before(
    killed, tmp_path, caplog, uninterrupted, name
):
    damage, message = DAMAGES[name]
    shutil.copytree(killed, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-6")
    steps = Steps()
    again = make_trainer(tmp_path / "run", trainer_options={"callbacks": [steps]}, **KILLED)
    with caplog.at_level(logging.WARNING):
        again.train()
    assert steps.runs == [7], "steps 4 to 10"
    assert_equal_models(again.model, uninterrupted)
    assert (tmp_path / "run" / "_damaged-0-checkpoint-6").is_dir()
    assert message in caplog.text


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(killed, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    cut("optimizer.pt")(tmp_path / "run" / "checkpoint-6")
    steps = Steps()
    trainer = make_trainer(tmp_path / "run", trainer_options={"callbacks": [steps]}, **KILLED)
    with pytest.raises(ValueError, match="checkpoint-6, from which training cannot go on: optimizer.pt is damaged"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    trainer.train(resume_from_checkpoint=True)
    assert steps.runs == [7]


def test_the_state_of_a_finished_ensemble_may_be_damaged(tmp_path, caplog):
    first = make_trainer(tmp_path, members="runs:1")
    first.train()
    cut("trainer_state.json")(tmp_path / "members")
    again = make_trainer(tmp_path, members="runs:1")
    again.train()
    assert again.state.global_step == 10
    assert_equal_models(again.model, first.model)
    assert "logs are lost" in caplog.text


@pytest.mark.parametrize("content", ["null", "[]", '{"settings": null}', '{"settings": {}'])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "members").mkdir()
    (tmp_path / "members" / "run.json").write_text(content)
    with pytest.raises(ValueError, match="run.json is damaged"):
        make_trainer(tmp_path).train()
