"""Choosing data: scores beside those of the index, LESS beside a loop in float64, rows by loops, folders, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from datasets_for_tests import save_model, token_rows
from models import bert, make_model
from reference import gradient_loop, scaled_scores
from transformers import Trainer, TrainingArguments

from hf_trak import AttributionArguments, AttributionIndex, AttributionTrainer, Task, TrakConfig
from hf_trak.cli.main import main
from hf_trak.cli.select import read_budget
from hf_trak.querying.less import AdamMoments, checkpoint_weights, parameter_groups
from hf_trak.scoring.selection import shares, spread_out
from hf_trak.tasks import AutoTask, TaskCollator, minus_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*chosen rows have")

N = 40
TRAIN = token_rows(N).add_column("kind", [("a", "b", "c")[min(i // 5, 2)] for i in range(N)])
TARGET = token_rows(9, seed=1).add_column("task", ["x", "y", "y"] * 3)
TASKS = np.array([0, 1, 1] * 3)
SELECTED = "layer.1.output"  # few enough parameters for whole gradients


def build(folder, models, **options):
    options = {"dataset": TRAIN, "config": TrakConfig(proj_dim=32), "shard_rows": 16, "progress": False, **options}
    return AttributionIndex.build(folder, models=models, **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("select")
    return build(folder / "index", [save_model(folder / f"bert-{seed}", seed=seed) for seed in range(2)])


def by_row(found):
    scores = np.full(N, np.nan)
    scores[found["trak_row"][:]] = found["trak_score"][:]
    return scores


@pytest.mark.parametrize(("options", "combine"), [
    ({}, lambda scores: scores.mean(1)),
    ({"aggregate": "max"}, lambda scores: scores.max(1)),
    ({"group_by": "task"}, lambda scores: np.maximum(scores[:, TASKS == 0].mean(1), scores[:, TASKS == 1].mean(1))),
    ({"lower_output": True, "aggregate": "max"}, lambda scores: (-scores).max(1)),
])  # fmt: skip
def test_scores_are_those_of_the_index_over_the_target(built, options, combine):
    columns = [built.featurize_queries(TARGET, member, progress=False) for member in range(2)]
    members = [[torch.cat([getattr(shard, name) for shard in member.shards()]).numpy() for member in built.members]
               for name in ("features", "out_to_loss")]  # fmt: skip
    exact = scaled_scores(members[0], [found["trak_features"] for found in columns], members[1], 3.0, 0.5)
    found = built.select(TARGET, N, progress=False, **options)
    size = np.abs(exact).max()
    np.testing.assert_allclose(by_row(found), combine(exact), rtol=1e-4, atol=1e-5 * size)
    scores = built.score(TARGET.remove_columns("task"), progress=False).astype(np.float64)
    np.testing.assert_allclose(by_row(found), combine(scores), rtol=1e-4, atol=1e-5 * size)
    assert np.all(np.diff(found["trak_score"]) <= 0)


def test_equal_scores_keep_the_order_of_rows(tmp_path):
    twice = Dataset.from_dict({name: TRAIN[name][:8] * 2 for name in ("input_ids", "label")})
    index = build(tmp_path / "index", save_model(tmp_path / "model"), dataset=twice, shard_rows=8)
    with pytest.warns(UserWarning, match="have a score below 0"):
        rows = index.select(TARGET, 16, progress=False)["trak_row"][:]
    assert all(rows[i + 1] == rows[i] + 8 for i in range(0, 16, 2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a checkpoint after each of two epochs, and its index with whole gradients."""
    folder = tmp_path_factory.mktemp("less")
    model = make_model("bert", seed=0)
    args = TrainingArguments(
        str(folder / "run"), num_train_epochs=2, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=1,
        save_strategy="epoch", report_to="none", remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    collator = TaskCollator(AutoTask.from_model(model, TrakConfig()))
    Trainer(model, args, train_dataset=TRAIN, data_collator=collator).train()
    n_parameters = sum(parameter.numel() for name, parameter in model.named_parameters() if SELECTED in name)
    models = [folder / "run" / f"checkpoint-{step}" for step in (5, 10)]
    config = TrakConfig(proj_dim=n_parameters, projector="identity", parameters=(SELECTED,))
    return build(folder / "index", models, config=config, keep_columns=["input_ids", "label"]), models


def less_reference(models, *, adam):
    """The sum over checkpoints of cosines, one float64 gradient at a time; (n_train, n_target)."""
    total, rates = 0, []
    for number, folder in enumerate(models):
        model = type(make_model("bert")).from_pretrained(folder)
        task = AutoTask.from_model(model, TrakConfig())

        def minus_log_p(model, batch):
            losses = torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"], reduction="none")
            return losses, losses.detach()

        numbers = {name: i for i, name in enumerate(name for part in parameter_groups(model) for name in part)}
        names = [name for name in numbers if SELECTED in name]
        grads = []
        for rows in (TRAIN, TARGET):
            batch = dict(task.reading(rows).collate(rows[:], None))
            grads.append(gradient_loop(model, batch, minus_log_p, names)[2].double().numpy())
        steps = grads[0]
        if adam:
            state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
            m, v = (
                np.concatenate([state[numbers[name]][key].double().flatten() for name in names])
                for key in ("exp_avg", "exp_avg_sq")
            )
            power = int(state[0]["step"]) + 1
            m = (0.9 * m + 0.1 * steps) / (1 - 0.9**power)
            v = (0.999 * v + 0.001 * steps**2) / (1 - 0.999**power)
            steps = m / np.sqrt(v + 1e-8)
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        rates.append(np.mean([row["learning_rate"] for row in history if 5 * number < row["step"] and "learning_rate" in row]))
        unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (steps, grads[1])]
        total = total + rates[-1] * unit[0] @ unit[1].T
    return total / sum(rates)


@pytest.mark.parametrize("adam", [True, False])
def test_less_is_a_loop_over_examples(trained, adam):
    index, models = trained
    expected = less_reference(models, adam=adam)
    options = {} if adam else {"optimizer": "none"}
    found = index.select(TARGET, N, method="less", group_by="task", progress=False, **options)
    groups = np.stack([expected[:, task == TASKS].mean(1) for task in (0, 1)], 1)
    np.testing.assert_allclose(by_row(found), groups.max(1), rtol=2e-3, atol=2e-5)
    mean = index.select(TARGET.remove_columns("task"), N, method="less", train=TRAIN, progress=False, **options)
    np.testing.assert_allclose(by_row(mean), expected.mean(1), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(("name", "options", "label"), [
    ("bert", {}, 2),
    ("bert", {"num_labels": 1, "problem_type": "regression"}, 0.7),
    ("bert", {"problem_type": "multi_label_classification"}, [1.0, 0.0, 1.0]),
    ("gpt2 lm", {}, None),
])  # fmt: skip
def test_the_gradient_compared_is_that_of_the_models_own_loss(name, options, label):
    torch.manual_seed(0)
    model = (bert(**options) if options else make_model(name)).double().eval()
    task = minus_loss(AutoTask.from_model(model, TrakConfig()))
    rows = Dataset.from_dict({"input_ids": [[5, 9, 17, 30, 8], [7, 3, 12]]})
    if label is not None:
        rows = rows.add_column("label", [label] * 2)
    for row in range(2):
        batch = task.reading(rows).collate(rows[[row]], None)
        parameters = list(model.parameters())
        ours = torch.autograd.grad(task.output_function(model, batch)[0].sum(), parameters, allow_unused=True)
        labels = batch["labels"].double() if isinstance(label, (float, list)) else batch["labels"]
        own = torch.autograd.grad(model(**{**batch, "labels": labels}).loss, parameters, allow_unused=True)
        ours, own = (torch.cat([grad.flatten() for grad in grads if grad is not None]) for grads in (ours, own))
        torch.testing.assert_close(ours / ours.norm(), -own / own.norm(), rtol=1e-4, atol=1e-7)


def test_moments_have_the_names_and_order_of_the_trainer(trained):
    _, models = trained
    model = type(make_model("bert")).from_pretrained(models[0])
    moments = AdamMoments.load(models[0] / "optimizer.pt", model)
    trained_ones = dict(model.named_parameters())
    assert moments.first.keys() == trained_ones.keys()
    assert all(moments.second[name].shape == parameter.shape for name, parameter in trained_ones.items())
    assert moments.step == 5
    model.bert.embeddings.requires_grad_(False)
    assert AdamMoments.load(models[0] / "optimizer.pt", model, trained_ones).first.keys() == trained_ones.keys()
    with pytest.raises(ValueError, match=r"some were frozen.*optimizer='none'"):
        AdamMoments.load(models[0] / "optimizer.pt", model)


def test_snapshots_keep_what_less_takes(tmp_path):
    args = AttributionArguments(
        str(tmp_path), members="epoch:2", keep_optimizer=True, proj_dim=32, shard_rows=16, num_train_epochs=2, save_strategy="epoch",
        per_device_train_batch_size=8, logging_steps=1, report_to="none", dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    model = make_model("bert", seed=0)
    collator = TaskCollator(AutoTask.from_model(model, TrakConfig()))
    trainer = AttributionTrainer(model, args, train_dataset=TRAIN.remove_columns("kind"), data_collator=collator)
    trainer.train()
    index = trainer.featurize()
    states = [sorted((tmp_path / name).glob(pattern)) for name, pattern in (("members", "epoch-*"), (".", "checkpoint-*"))]
    ours, theirs = ([torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in some] for some in states)
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, sorted(theirs, key=lambda state: state[0]["step"]), strict=True):
        assert all(torch.equal(mine[number]["exp_avg_sq"], other[number]["exp_avg_sq"]) for number in other)
    found = index.select(TARGET, 4, method="less", group_by="task", train=TRAIN, progress=False)
    how = json.loads(found.info.description)
    assert how["optimizer"] == "Adam's moments at each checkpoint"
    assert "mean learning rates logged" in how["weights of checkpoints"]
    with pytest.raises(ValueError, match="of a single run"):
        AttributionArguments(str(tmp_path), members="runs:2", keep_optimizer=True)


def test_without_moments_or_learning_rates_it_is_told(built):
    with pytest.warns(UserWarning, match="optimizer|learning rates") as told:
        found = built.select(TARGET.remove_columns("task"), 3, method="less", train=TRAIN, progress=False)
    said = " ".join(str(warning.message) for warning in told)
    assert "No optimizer.pt lies beside the checkpoints" in said
    assert "learning rates of 2 checkpoints are not known" in said
    assert "gradients as they are" in json.loads(found.info.description)["optimizer"]
    assert checkpoint_weights([None, None], [1, 3]) == ([0.25, 0.75], "given")


def test_a_budget_is_shared_evenly():
    assert shares([5, 2, 9], 9) == [4, 2, 3]
    assert shares([5, 5, 5], 8) == [3, 3, 2]
    assert shares([1, 1, 30], 20) == [1, 1, 18]


def test_groups_of_training_rows_are_balanced(built):
    scores = by_row(built.select(TARGET, N, group_by="task", progress=False))
    found = built.select(TARGET, 15, group_by="task", train=TRAIN, balance="kind", progress=False)
    for kind, rows in (("a", range(5)), ("b", range(5, 10)), ("c", range(10, N))):
        expected = sorted(rows, key=lambda row: -scores[row])[:5]
        assert [row for row, name in zip(found["trak_row"], found["kind"], strict=True) if name == kind] == expected


def test_diversity_chooses_as_a_loop_does(built):
    scores = by_row(built.select(TARGET, N, group_by="task", progress=False))
    features = [torch.cat([shard.features for shard in member.shards()]).double().numpy() for member in built.members]
    cosines = sum((unit := rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ unit.T for rows in features) / 2
    chosen: list[int] = []
    for _ in range(6):
        value = 0.6 * scores / np.abs(scores).max() - 0.4 * (cosines[:, chosen].max(1) if chosen else -1)
        value[chosen] = -np.inf
        chosen.append(int(value.argmax()))
    assert built.select(TARGET, 6, group_by="task", diversity=0.4, progress=False)["trak_row"][:] == chosen
    assert chosen != np.argsort(-scores)[:6].tolist()


def test_rows_alike_are_not_chosen_twice():
    directions = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    choose = lambda diversity: spread_out(np.array([1.0, 0.9, 0.5]), directions, np.zeros(3, int), [2], diversity=diversity)  # noqa: E731
    assert choose(0.0).tolist() == [0, 1]
    assert choose(0.5).tolist() == [0, 2]


def test_a_subset_is_a_folder_that_load_dataset_reads(built, tmp_path, capsys):
    TRAIN.to_parquet(tmp_path / "train.parquet")
    TARGET.to_parquet(tmp_path / "target.parquet")
    command = [
        "select",
        str(built.folder),
        "--target",
        str(tmp_path / "target.parquet"),
        "--group_by",
        "task",
        "--budget",
        "10%",
    ]
    command += ["--train", str(tmp_path / "train.parquet"), "--output", str(tmp_path / "subset")]
    assert main(command) == 0
    expected = built.select(TARGET, 0.1, group_by="task", train=TRAIN, progress=False)
    found = load_dataset(str(tmp_path / "subset"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.column_names == ["trak_row", "trak_score", *TRAIN.column_names]
    assert found[:] == expected[:]
    assert [found["input_ids"][i] for i in range(4)] == [TRAIN["input_ids"][row] for row in found["trak_row"]]
    card = (tmp_path / "subset" / "README.md").read_text()
    for said in ("4 of 40", "| method | trak |", "| groups by | task |", "damping | 3", "weights `"):
        assert said in card, said
    assert main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--drop"]) == 0
    worst = load_dataset(str(tmp_path / "subset"), split="train", cache_dir=str(tmp_path / "cache2"))
    assert worst["trak_score"][:] == sorted(by_row(built.select(TARGET, 0.999, group_by="task", progress=False)))[:4]
    (tmp_path / "subset" / "notes.txt").write_text("mine")
    assert main([*command, "--overwrite"]) == 1
    assert "notes.txt" in capsys.readouterr().err
    assert (tmp_path / "subset" / "notes.txt").exists()


def test_kept_columns_stand_for_the_training_set(trained):
    index, _ = trained
    found = index.select(TARGET, 3, group_by="task", progress=False)
    assert found["input_ids"][:] == [TRAIN["input_ids"][row] for row in found["trak_row"]]


@pytest.mark.parametrize(("options", "message"), [
    ({"budget": 0}, r"from 1 to the index's 40"),
    ({"budget": 41}, r"from 1 to the index's 40.*is 41"),
    ({"budget": 1.0}, r"above 0 and below 1"),
    ({"target": TARGET.select([])}, "no rows"),
    ({"target": TARGET.remove_columns("label")}, "lack 'label'"),
    ({"target": TARGET[:]}, "Dataset"),
    ({"group_by": "subject"}, r"no column 'subject' to group by.*task"),
    ({"balance": "kind"}, r"kept no column 'kind'.*--train"),
    ({"train": TRAIN.remove_columns("kind"), "balance": "kind"}, "no column 'kind'"),
    ({"train": TRAIN.rename_column("kind", "trak_row")}, "rename_column"),
    ({"train": TRAIN.select(range(30))}, "10 of the index's 40 rows"),
    ({"method": "loss"}, "'trak' or 'less'"),
    ({"method": "less", "damping": 1.0}, r"`damping` is of method='trak'"),
    ({"learning_rates": [1, 1]}, "is of method='less'"),
    ({"method": "less"}, r"keep_columns=\['input_ids', 'label'\]"),
    ({"method": "less", "train": TRAIN, "aggregate": "max"}, "group_by"),
    ({"method": "less", "train": TRAIN, "lower_output": True}, "method='trak'"),
    ({"method": "less", "train": TRAIN, "optimizer": ["a", "b", "c"]}, "2 checkpoints, but 3"),
    ({"aggregate": "sum"}, "'mean' or 'max'"),
    ({"diversity": 1.0}, "below 1"),
    ({"diversity": 0.5, "drop": True}, "need not differ"),
])  # fmt: skip
def test_bad_inputs_are_refused_with_the_way_out(built, options, message):
    given = {"target": TARGET, "budget": 5, **options}
    with pytest.raises(ValueError, match=message):
        built.select(given.pop("target"), given.pop("budget"), progress=False, **given)


def test_missing_groups_are_refused(built):
    target = TARGET.remove_columns("task").add_column("task", [None, "x"] + ["y"] * 7)
    with pytest.raises(ValueError, match=r"1 values of column 'task' of `target` are missing, row 0"):
        built.select(target, 5, group_by="task", progress=False)


def test_of_a_task_whose_output_may_be_a_loss_the_direction_is_asked_for(tmp_path):
    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch["input_ids"]).logits, batch["labels"], reduction="none")

    def collate(rows):
        return {
            "input_ids": torch.tensor([row["input_ids"][:2] for row in rows]),
            "labels": torch.tensor([row["label"] for row in rows]),
        }

    task = Task.custom(loss, collator=collate)
    index = build(tmp_path / "index", save_model(tmp_path / "model"), task=task)
    target = TARGET.remove_columns("task")
    with pytest.raises(ValueError, match="lower_output=True"):
        index.select(target, 5, progress=False)
    with pytest.raises(ValueError, match="method='trak'"):
        index.select(target, 5, method="less", train=TRAIN, lower_output=True, progress=False)
    rows = index.select(target, 5, lower_output=True, progress=False)["trak_row"][:]
    assert rows == np.argsort(index.score(target, progress=False).mean(1))[:5].tolist()


def test_budgets_are_read_as_they_are_written():
    assert [read_budget(text) for text in ("500", "5%", "0.05")] == [500, 0.05, 0.05]
    with pytest.raises(ValueError, match="500, or a share"):
        read_budget("many")
