"""Losses that attribution does not know: told before training, and stated with a task of one's own, as docs/guides/custom_tasks.md shows."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from models import bert
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_trak import AttributionArguments, AttributionCallback, AttributionTrainer

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

DOCS = Path(__file__).parents[1] / "docs" / "guides" / "custom_tasks.md"
OPTIONS = {
    "use_cpu": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "per_device_train_batch_size": 80,
}
N_MINORITY, WEIGHT = 10, 8.0


class Steps(TrainerCallback):
    """Counts steps."""

    count = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.count += 1


def collator(rows):
    batch = {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
    return {
        **batch,
        "attention_mask": torch.ones_like(batch["input_ids"]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


def rows(n_rows, n_minority, *, seed):
    """Rows of two classes, of which the minority's hold another token more often."""
    generator = np.random.default_rng(seed)
    labels = [int(row < n_minority) for row in range(n_rows)]
    ids = [(3 + generator.integers(0, 40, size=6) + 12 * label * generator.integers(0, 2, size=6)).tolist() for label in labels]
    return Dataset.from_dict({"input_ids": ids, "label": labels})


TRAIN, VALIDATION = rows(80, N_MINORITY, seed=0), rows(30, 15, seed=1)


def convex_model():
    """A classifier of which the head alone is trained: its optimum is unique, and leaving out a row can be computed."""
    torch.manual_seed(0)
    model = bert(num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.no_grad():
        for parameter in model.bert.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.bert.requires_grad_(False)
    return model


def arguments(folder, **options):
    return AttributionArguments(
        str(folder), **{**OPTIONS, "projector": "identity", "proj_dim": 34, "damping": "0.001", **options}
    )


def example(**names):
    """Run the example of the docs, and return its names."""
    (code,) = re.findall(r"<!-- example: class weights -->\n```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    names = {**names, "collator": collator, "train": TRAIN, "validation": VALIDATION}
    exec(compile(code, str(DOCS), "exec"), names)
    return names


@pytest.fixture(scope="module")
def weighted(tmp_path_factory):
    args = arguments(tmp_path_factory.mktemp("weighted"), num_train_epochs=300, learning_rate=0.05, weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="'pin_memory'")
        return example(model=convex_model(), args=args)


def head_inputs(model, dataset):
    batch = collator(dataset.to_list())
    with torch.no_grad():
        pooled = model.eval().bert(batch["input_ids"], batch["attention_mask"]).pooler_output.double()
    return torch.cat([pooled, torch.ones(len(pooled), 1, dtype=torch.float64)], 1), batch["labels"]


def leave_one_out(model, start):
    """Return how the log-odds of each query change when a training row is left out of the weighted loss: (n_train, n_query)."""
    x, y = head_inputs(model, TRAIN)
    queries, labels = head_inputs(model, VALIDATION)
    sign, query_sign = 2.0 * y - 1, 2.0 * labels - 1
    weights = torch.where(y == 1, WEIGHT, 1.0).double()

    def fit(keep, beta):
        for _ in range(30):  # Newton's steps on a ridge that only makes the optimum finite
            p = torch.sigmoid(-sign * (x @ beta))
            grad = -(x * (keep * weights * sign * p).unsqueeze(1)).sum(0) + 1e-2 * beta
            hessian = (x * (keep * weights * p * (1 - p)).unsqueeze(1)).T @ x + 1e-2 * torch.eye(
                x.shape[1], dtype=torch.float64
            )
            beta = beta - torch.linalg.solve(hessian, grad)
        return beta

    whole = fit(torch.ones(len(x), dtype=torch.float64), start)
    changes = []
    for row in range(len(x)):
        keep = torch.ones(len(x), dtype=torch.float64)
        keep[row] = 0
        changes.append(query_sign * (queries @ (whole - fit(keep, whole))))
    return torch.stack(changes).numpy()


def share_of_minority(scores):
    """How much more a row of the minority moves queries than another row."""
    minority = np.array(TRAIN["label"]) == 1
    return np.abs(scores[minority]).mean() / np.abs(scores[~minority]).mean()


def test_the_example_of_the_docs_weighs_rows_by_the_derivative_of_their_loss(weighted):
    model, index = weighted["trainer"].model.eval(), weighted["index"]
    batch = collator(TRAIN.to_list())
    with torch.no_grad():
        probabilities = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits.double().softmax(1)
    p = probabilities.gather(1, batch["labels"].unsqueeze(1)).squeeze(1)
    expected = torch.where(batch["labels"] == 1, WEIGHT, 1.0) * (1 - p)
    stored = torch.cat([shard.out_to_loss for shard in index.members[0].shards()]).double()
    torch.testing.assert_close(stored, expected, rtol=1e-4, atol=1e-7)


def test_the_example_gives_the_minority_the_share_that_leaving_rows_out_gives_it(weighted, tmp_path):
    model = weighted["trainer"].model
    head = (model.classifier.weight[1] - model.classifier.weight[0]).double().detach()
    bias = (model.classifier.bias[1] - model.classifier.bias[0]).double().detach()
    truth = share_of_minority(leave_one_out(model, torch.cat([head, bias.unsqueeze(0)])))
    ours = share_of_minority(weighted["scores"])
    assert truth > 2, "the weights matter"
    assert abs(ours / truth - 1) < 0.3, (ours, truth)
    plain = AttributionTrainer(model=model, args=arguments(tmp_path), train_dataset=TRAIN, data_collator=collator)
    plain._members_folder.mkdir(parents=True)
    from hf_trak.training.snapshots import save_snapshot

    save_snapshot(plain._members_folder / "final", model)
    unweighted = share_of_minority(plain.featurize().score(VALIDATION, progress=False))
    assert unweighted < truth / 3, (unweighted, truth)


def weighted_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 8.0]))


class FocalTrainer(AttributionTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss**2
        return (loss, outputs) if return_outputs else loss


class Balanced(AttributionTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.WeightedRandomSampler([1.0] * len(self.train_dataset), len(self.train_dataset))


CASES = {
    "compute_loss_func": (
        AttributionTrainer,
        {},
        {"compute_loss_func": weighted_loss},
        r"`compute_loss_func` \(weighted_loss\)",
    ),
    "label smoothing": (AttributionTrainer, {"label_smoothing_factor": 0.1}, {}, "`label_smoothing_factor=0.1`"),
    "compute_loss": (FocalTrainer, {}, {}, r"the overridden `compute_loss` \(FocalTrainer.compute_loss\)"),
    "sampler": (Balanced, {}, {}, r"the overridden `_get_train_sampler` \(Balanced._get_train_sampler\), which may show"),
    "neftune": (AttributionTrainer, {"neftune_noise_alpha": 5.0}, {}, "`neftune_noise_alpha=5`"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loss_that_attribution_does_not_know_is_told_once_before_training(tmp_path, name):
    kind, options, given, message = CASES[name]
    steps = Steps()
    args = arguments(tmp_path, num_train_epochs=1, **options)
    trainer = kind(model=convex_model(), args=args, train_dataset=TRAIN, data_collator=collator, callbacks=[steps], **given)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="This run trains with")
        with pytest.raises(UserWarning, match=rf"This run trains with {message}.*Attribution does not know it.*Task\.custom"):
            trainer.train()
    assert steps.count == 0, "it is told before the first step"
    with pytest.warns(UserWarning, match="docs/guides/custom_tasks.md") as told:
        trainer.train()
    assert len([one for one in told if "This run trains with" in str(one.message)]) == 1
    assert steps.count == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1`"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha=5`"),
    ],
)
def test_a_callback_tells_of_a_loss_that_it_sees(tmp_path, options, message):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, **options)
    trainer = Trainer(
        model=convex_model(), args=args, train_dataset=TRAIN, data_collator=collator, callbacks=[AttributionCallback()]
    )
    with pytest.warns(UserWarning, match=rf"This run trains with {message}.*Attribution does not know it") as told:
        trainer.train()
    assert len([one for one in told if "This run trains with" in str(one.message)]) == 1


def test_a_loss_set_on_the_trainer_or_its_model_is_told_too(tmp_path):
    trainer = AttributionTrainer(model=convex_model(), args=arguments(tmp_path), train_dataset=TRAIN, data_collator=collator)
    trainer.compute_loss = lambda model, inputs, **_: model(**inputs).loss
    trainer.model.loss_function = lambda logits, labels, *_, **__: F.cross_entropy(logits, labels)
    with pytest.warns(UserWarning, match=r"overridden `compute_loss`.*the model's `loss_function`.*does not know them"):
        trainer.train()


def test_nothing_is_told_of_trainers_own_losses_or_of_a_loss_that_is_stated(tmp_path):
    from trl import SFTConfig, SFTTrainer

    from hf_trak.training.checks import list_unknown_losses

    trainer = AttributionTrainer(model=convex_model(), args=arguments(tmp_path), train_dataset=TRAIN, data_collator=collator)
    assert list_unknown_losses(trainer) == []
    stock = Trainer(model=convex_model(), args=TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=TRAIN)
    assert list_unknown_losses(stock) == []
    from models import gpt2_lm
    from tokenizers_for_tests import word_tokenizer

    sft = {"train_dataset": Dataset.from_dict({"text": ["a b", "c d"]}), "processing_class": word_tokenizer()}
    args = SFTConfig(str(tmp_path / "sft"), use_cpu=True, bf16=False, max_length=8, report_to="none")
    assert list_unknown_losses(SFTTrainer(gpt2_lm(), args, **sft)) == []
    other = SFTConfig(str(tmp_path / "sft"), use_cpu=True, bf16=False, max_length=8, report_to="none", loss_type="dft")
    assert list_unknown_losses(SFTTrainer(gpt2_lm(), other, **sft)) == ["`loss_type='dft'`"]
