"""Ensembles of training runs: the main one is an ordinary one, the others are recorded, resumed and never repeated."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets_for_tests import token_rows
from models import make_model
from transformers import EarlyStoppingCallback, HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from hf_trak import AttributionArguments, AttributionCallback, AttributionIndex, AttributionTrainer
from hf_trak.sources.checkpoints import load_model
from hf_trak.training.runs import draw_masks, load_masks
from hf_trak.training.snapshots import save_snapshot

TRAIN, VALIDATION = token_rows(40), token_rows(8, seed=1)
OPTIONS = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-3,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
}
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([row["label"] for row in rows])}


def make_trainer(folder, *, stock=False, trainer_options=None, **options):
    options = {**OPTIONS, **options}
    given = {"model": make_model("bert"), "train_dataset": TRAIN, "eval_dataset": VALIDATION, "data_collator": collate}
    given.update(trainer_options or {})
    if stock:
        options.pop("members", None)
        return Trainer(args=TrainingArguments(str(folder), **options), **given)
    return AttributionTrainer(args=AttributionArguments(str(folder), proj_dim=16, shard_rows=16, **options), **given)


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def snapshots(trainer):
    return {path.name: weights(path) for path in trainer.member_checkpoints()}


def assert_equal_models(ours, stock):
    for name, values in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], values), name


class Stop(TrainerCallback):
    """Dies, as a process would, in one of the runs of a trainer."""

    def __init__(self, *, run, step):
        self.run, self.step = run, step

    def on_train_begin(self, args, state, control, **kwargs):
        self.run -= 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.run == 0 and state.global_step == self.step:
            raise KeyboardInterrupt


class Steps(TrainerCallback):
    """Counts the steps of each run."""

    def __init__(self):
        self.runs = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.runs.append(0)

    def on_step_end(self, args, state, control, **kwargs):
        self.runs[-1] += 1


@pytest.fixture(scope="module")
def subsets(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("subsets"), members="subsets:4")
    trainer.train()
    return trainer


@pytest.mark.parametrize("members", ["runs:2", "subsets:2"])
def test_the_main_run_is_bit_identical_to_a_stock_trainer_and_leaves_what_it_leaves(tmp_path, members):
    ours = make_trainer(tmp_path / "ours", members=members)
    output = ours.train()
    after = torch.rand(3)
    stock = make_trainer(tmp_path / "stock", stock=True)
    expected = stock.train()
    assert torch.equal(torch.rand(3), after), "random numbers go on as after the main run"
    assert_equal_models(ours.model, stock.model)
    assert (output.global_step, output.training_loss) == (expected.global_step, expected.training_loss)
    assert ours.state.global_step == stock.state.global_step
    assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]
    optimizer, wanted = ours.optimizer.state_dict()["state"], stock.optimizer.state_dict()["state"]
    assert torch.equal(optimizer[0]["exp_avg"], wanted[0]["exp_avg"])


def test_metrics_best_model_early_stopping_accumulation_and_mixed_precision_are_the_trainers(tmp_path):
    def options():
        return {
            "callbacks": [EarlyStoppingCallback(1)],
            "compute_metrics": lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        }

    shared = {
        "num_train_epochs": 6,
        "bf16": True,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "learning_rate": 3e-2,
        "save_total_limit": 1,
    }
    ours = make_trainer(tmp_path / "ours", members="runs:2", trainer_options=options(), **shared)
    ours.train()
    stock = make_trainer(tmp_path / "stock", stock=True, trainer_options=options(), **shared)
    stock.train()
    assert stock.state.global_step < 6 * 3, "it stopped early"
    assert_equal_models(ours.model, stock.model)
    assert [log.get("eval_accuracy") for log in ours.state.log_history] == [
        log.get("eval_accuracy") for log in stock.state.log_history
    ]
    kept = [load_model(str(folder)) for folder in ours.member_checkpoints()]
    assert_equal_models(kept[0], stock.model)
    assert not torch.equal(kept[1].classifier.weight, kept[0].classifier.weight)


def test_runs_differ_in_their_seed_and_start_from_the_same_weights(tmp_path):
    trainer = make_trainer(tmp_path, members="runs:3", learning_rate=1e-9)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert [folder.name for folder in trainer.member_checkpoints()] == ["run-0000", "run-0001", "run-0002"]
    for folder in trainer.member_checkpoints():
        for name, value in load_model(str(folder)).state_dict().items():
            torch.testing.assert_close(value, start[name], rtol=0, atol=1e-6)
    assert len(set(snapshots(trainer).values())) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["members"], "nothing else is left behind"


def test_runs_take_their_initial_weights_from_model_init(tmp_path):
    def model_init():
        seed = torch.initial_seed()  # that of the run: the Trainer has just set it
        model = make_model("bert")
        torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        return model

    init = {"model": None, "model_init": model_init}
    ours = make_trainer(tmp_path / "ours", members="runs:2", learning_rate=1e-9, trainer_options=init)
    ours.train()
    stock = make_trainer(tmp_path / "stock", stock=True, learning_rate=1e-9, trainer_options=init)
    stock.train()
    assert_equal_models(ours.model, stock.model)
    first, second = (load_model(str(folder)).classifier.weight for folder in ours.member_checkpoints())
    assert (first - second).abs().max() > 0.1


def test_subset_runs_see_their_own_rows_and_the_masks_are_recorded(tmp_path):
    seen = []

    def recording(rows):
        seen[-1].update(tuple(row["input_ids"]) for row in rows)
        return collate(rows)

    class Begin(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            seen.append(set())

    options = {"data_collator": recording, "callbacks": [Begin()]}
    trainer = make_trainer(tmp_path, members="subsets:2", subset_alpha=0.3, trainer_options=options)
    trainer.train()
    masks = load_masks(tmp_path / "members")
    assert masks.sum(1).tolist() == [12, 12]
    wanted = [range(40), *(mask.nonzero().flatten().tolist() for mask in masks)]
    assert seen == [{tuple(TRAIN[row]["input_ids"]) for row in rows} for rows in wanted]
    assert trainer.train_dataset is TRAIN
    assert [folder.name for folder in trainer.member_checkpoints()] == ["subset-0000", "subset-0001"]


class Watched(AttributionTrainer):
    """Has a constructor of its own, and keeps whose optimizer was made."""

    def __init__(self, seen, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = seen

    def create_optimizer(self, *args, **kwargs):
        self.seen.append(self)
        return super().create_optimizer(*args, **kwargs)


def test_further_runs_are_trainers_of_the_same_class_and_leave_the_main_one_as_it_is(tmp_path):
    args = AttributionArguments(str(tmp_path), members="runs:3", proj_dim=16, **{**OPTIONS, "max_steps": 1})
    seen = []
    trainer = Watched(seen, make_model("bert"), args, collate, TRAIN)
    before = vars(trainer).copy()
    trainer.train()
    assert len(set(seen)) == 3
    assert seen[0] is trainer
    for name in ("args", "model", "train_dataset", "accelerator", "callback_handler", "_train_batch_size"):
        assert vars(trainer)[name] is before[name], name


def test_a_trainer_that_its_arguments_do_not_make_again_is_refused_before_training(tmp_path):
    trainer = make_trainer(tmp_path / "changed", members="runs:2")
    trainer.data_collator = lambda rows: collate(rows)
    with pytest.raises(ValueError, match=r"differ from it:\n  data_collator(.|\n)*Give what was changed since"):
        trainer.train()

    class Fixed(AttributionTrainer):
        def __init__(self, folder):
            args = AttributionArguments(str(folder), members="runs:2", proj_dim=16, **OPTIONS)
            super().__init__(make_model("bert"), args, collate, TRAIN)

    with pytest.raises(ValueError, match="the constructor of Fixed takes no `model`, `args` and `processing_class`"):
        Fixed(tmp_path / "fixed")


def test_subsets_are_uniform_and_independent():
    masks = draw_masks(400, 50, alpha=0.5, seed=0)
    assert (masks.sum(1) == 200).all()
    assert (masks.float().mean(0) - 0.5).abs().max() < 5 * 0.5 / 50**0.5
    together = masks.float() @ masks.float().T / 200
    assert (together - torch.eye(50) - 0.5 * (1 - torch.eye(50))).abs().max() < 0.2
    assert torch.equal(draw_masks(400, 3, alpha=0.5, seed=0), masks[:3]), "an ensemble may grow"
    assert not torch.equal(draw_masks(400, 3, alpha=0.5, seed=1), masks[:3])
    with pytest.raises(ValueError, match=r"Subsets of 0.01 of 10 rows would have 0 rows; choose another `subset_alpha`"):
        draw_masks(10, 2, alpha=0.01, seed=0)


def test_the_same_command_again_repeats_no_run(subsets):
    steps = Steps()
    again = make_trainer(subsets.args.output_dir, members="subsets:4", trainer_options={"callbacks": [steps]})
    output = again.train()
    assert steps.runs == []
    assert_equal_models(again.model, subsets.model)
    assert output.global_step == again.state.global_step == 10


@pytest.mark.parametrize(("run", "save_strategy"), [(1, "no"), (1, "steps"), (3, "no"), (3, "steps")])
def test_a_run_that_was_killed_goes_on_and_ends_in_the_same_weights(subsets, tmp_path, run, save_strategy):
    options = {"members": "subsets:4", "save_strategy": save_strategy, "save_steps": 2}
    dying = make_trainer(tmp_path, trainer_options={"callbacks": [Stop(run=run, step=5)]}, **options)
    with pytest.raises(KeyboardInterrupt):
        dying.train()
    assert not isinstance(dying.train_dataset, torch.utils.data.Subset)
    steps = Steps()
    again = make_trainer(tmp_path, trainer_options={"callbacks": [steps]}, **options)
    again.train()
    assert snapshots(again) == snapshots(subsets)
    assert_equal_models(again.model, subsets.model)
    whole, rest = ([10, 6, 6, 6, 6], 4)
    done = {"no": 0, "steps": rest}[save_strategy]
    assert steps.runs == [whole[run - 1] - done, *whole[run:]]


def test_a_single_run_that_was_killed_goes_on_too(tmp_path):
    options = {"members": "epoch:2", "save_strategy": "steps", "save_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "ours", trainer_options={"callbacks": [Stop(run=1, step=7)]}, **options).train()
    steps = Steps()
    again = make_trainer(tmp_path / "ours", trainer_options={"callbacks": [steps]}, **options)
    again.train()
    assert steps.runs == [4]
    stock = make_trainer(tmp_path / "stock", stock=True)
    stock.train()
    assert_equal_models(again.model, stock.model)
    assert [folder.name for folder in again.member_checkpoints()] == ["epoch-0001", "epoch-0002"]
    steps.runs.clear()
    fresh = make_trainer(tmp_path / "ours", trainer_options={"callbacks": [steps]}, **options)
    fresh.train()
    assert steps.runs == [10], "a finished single run is trained again, as by a Trainer"


def test_a_killed_run_of_other_settings_is_not_gone_on_with(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, trainer_options={"callbacks": [Stop(run=1, step=7)]}, **options).train()
    steps = Steps()
    make_trainer(tmp_path, trainer_options={"callbacks": [steps]}, **{**options, "learning_rate": 1e-4}).train()
    assert steps.runs == [10]


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_runs import make_trainer
from transformers import TrainerCallback
class Say(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print(args.output_dir, state.global_step, flush=True)
make_trainer({folder!r}, members="subsets:4", trainer_options={{"callbacks": [Say()]}}).train()
"""


def test_kill_9_between_and_within_runs_ends_in_the_same_weights(subsets, tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ})
    lines = [process.stdout.readline() for _ in range(10 + 6 + 3)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "subset-0001" in lines[-1]
    finished = sorted(path.name for path in (tmp_path / "members").glob("subset-*"))
    assert "subset-0000" in finished
    steps = Steps()
    again = make_trainer(tmp_path, members="subsets:4", trainer_options={"callbacks": [steps]})
    again.train()
    assert steps.runs == [6] * (4 - len(finished))
    assert snapshots(again) == snapshots(subsets)


def test_an_ensemble_grows(tmp_path):
    make_trainer(tmp_path, members="runs:1").train()
    steps = Steps()
    grown = make_trainer(tmp_path, members="runs:2", trainer_options={"callbacks": [steps]})
    grown.train()
    assert steps.runs == [10]
    assert len(grown.member_checkpoints()) == 2
    assert len(make_trainer(tmp_path, members="runs:1").member_checkpoints()) == 1


def test_runs_of_other_settings_are_refused_with_the_differences(subsets):
    with pytest.raises(ValueError, match=r"(?s)holds runs of other settings:.*learning_rate: 0.005 there, 0.1 here"):
        make_trainer(subsets.args.output_dir, members="subsets:4", learning_rate=0.1).train()


def test_missing_runs_are_counted(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no snapshots for members='runs:3'; call `train\(\)` first"):
        make_trainer(tmp_path, members="runs:3").featurize()


def test_what_belongs_to_one_run_is_refused(tmp_path):
    model = make_model("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`optimizers` belong to one run"):
        make_trainer(tmp_path, members="runs:2", trainer_options={"model": model, "optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match="members='runs:2' takes several; use an AttributionTrainer"):
        AttributionCallback("runs:2")
    with pytest.raises(ValueError, match="`subset_alpha` must lie between 0 and 1, but is 1.5"):
        AttributionArguments(str(tmp_path), subset_alpha=1.5)


def test_steps_are_kept_and_those_beyond_the_end_are_refused(tmp_path):
    trainer = make_trainer(tmp_path / "steps", members="steps:[3,10]", save_strategy="steps", save_steps=3)
    trainer.train()
    assert [folder.name for folder in trainer.member_checkpoints()] == ["step-0000003", "step-0000010"]
    assert weights(trainer.member_checkpoints()[0]) == weights(tmp_path / "steps" / "checkpoint-3")
    with pytest.raises(ValueError, match="asks for the weights after step 11, but the run ends at step 10"):
        make_trainer(tmp_path / "late", members="steps:[3,11]").train()


def test_snapshots_of_an_earlier_longer_run_are_not_taken_for_this_ones(tmp_path):
    make_trainer(tmp_path, members="epoch:2", num_train_epochs=3).train()
    again = make_trainer(tmp_path, members="epoch:2", num_train_epochs=1)
    again.train()
    assert [folder.name for folder in again.member_checkpoints()] == ["epoch-0001"]


def test_an_index_of_subsets_chooses_its_damping_by_them(subsets, tmp_path):
    index = subsets.featurize()
    masks = load_masks(Path(subsets.args.output_dir) / "members")
    assert all(torch.equal(member.mask(), mask) for member, mask in zip(index.members, masks, strict=True))
    choice = index.damping_choice()
    assert index.resolve_damping() == choice.damping == choice.grid[int(np.argmax(choice.curve))]
    card = (index.folder / "README.md").read_text()
    assert f'`damping="auto"` is {choice.damping:g} here' in card
    assert "![Rank correlation against damping](damping.png)" in card
    index.save_pretrained(tmp_path / "copy")
    loaded = AttributionIndex.from_pretrained(tmp_path / "copy")
    assert loaded.damping_choice() == choice
    assert (tmp_path / "copy" / "damping.png").read_bytes() == (index.folder / "damping.png").read_bytes()
    explicit = loaded.score(VALIDATION, damping=choice.damping, progress=False)
    assert np.array_equal(loaded.score(VALIDATION, progress=False), explicit)


def test_arguments_come_from_yaml(tmp_path):
    lines = [
        "output_dir: out",
        "members: subsets:6",
        "subset_alpha: 0.25",
        "learning_rate: 1e-4",
        "dropout_seeds: 2",
        "use_cpu: true",
    ]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    (args,) = HfArgumentParser((AttributionArguments,)).parse_yaml_file(str(tmp_path / "config.yaml"))
    assert (args.members, args.subset_alpha, args.learning_rate, args.dropout_seeds) == ("subsets:6", 0.25, 1e-4, 2)


def test_the_model_card_says_how_to_ask(tmp_path):
    trainer = make_trainer(tmp_path, members="runs:1")
    trainer.train()
    trainer.create_model_card(model_name="mine", tags="own")
    card = (tmp_path / "README.md").read_text()
    for tag in ("own", "trak", "data-attribution"):
        assert f"- {tag}\n" in card
    assert card.count("## Training data attribution") == 1
    assert '`members="runs:1"`' in card


@pytest.fixture
def adapter(tmp_path):
    peft = pytest.importorskip("peft")
    save_snapshot(tmp_path / "base", make_model("bert"))
    base = load_model(str(tmp_path / "base"))
    return lambda model=base: peft.get_peft_model(
        model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
    )


def test_adapters_are_kept_loaded_and_attributed(tmp_path, adapter):
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path / "run", members="subsets:2", trainer_options={"model": adapter()})
    trainer.train()
    folders = [Path(trainer.args.output_dir) / "members" / "full", *trainer.member_checkpoints()]
    assert all((folder / "adapter_model.safetensors").exists() for folder in folders)
    loaded = load_model(str(folders[0]))
    assert_equal_models(loaded, trainer.model)
    index = trainer.featurize()
    names = list(index.members[0].identity["parameters"])
    assert names == [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert np.isfinite(AttributionIndex.from_pretrained(index.folder).score(VALIDATION, progress=False)).all()


def test_an_adapter_on_a_model_in_memory_is_refused_before_training(tmp_path, adapter):
    trainer = make_trainer(tmp_path, trainer_options={"model": adapter(make_model("bert"))})
    with pytest.raises(
        ValueError, match="base model was made in memory, so snapshots of the adapter could not be loaded again"
    ):
        trainer.train()
    assert not (tmp_path / "members" / "final").exists()


LAUNCHED = """
import sys
sys.path.insert(0, {tests!r})
from test_runs import make_trainer
trainer = make_trainer({folder!r}, members="subsets:2")
assert trainer.accelerator.num_processes == 2
trainer.train()
print("trained", trainer.state.global_step, flush=True)
"""


@pytest.mark.slow
def test_accelerate_launch_trains_every_run_once(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(LAUNCHED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run")))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", str(script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("trained 6") == 2
    assert sorted(path.name for path in (tmp_path / "run" / "members").glob("subset-*")) == ["subset-0000", "subset-0001"]
