"""Reward models: every engine's gradients beside a loop in float64, TRL's RewardTrainer, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import llama
from reference import gradient_loop
from tokenizers_for_tests import byte_tokenizer

from hf_trak import AttributionArguments, AttributionIndex, Featurizer, TrakConfig, attribution
from hf_trak.tasks import AutoTask

ROWS = Dataset.from_dict(
    {
        "chosen_ids": [[5, 9, 17, 30, 8], [7, 3], [4, 4, 8, 20]],
        "rejected_ids": [[5, 9], [7, 12, 6, 9], [4, 40, 7, 7, 3, 3]],
        "margin": [0.5, 0.0, -1.25],
    }
)
TURNS = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "a bird"}]
PREFERENCES = {
    "texts": [{"prompt": "what is it", "chosen": " a bird", "rejected": " a bear<EOS>"}, {"prompt": "and", "chosen": " a", "rejected": " no"}],
    "whole texts": [{"chosen": "what is it a bird", "rejected": "what is it a bear"}, {"chosen": "it", "rejected": "was"}],
    "conversations": [{"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "no"}]}] * 2,
    "margins": [{"chosen": TURNS, "rejected": TURNS[:1], "margin": 0.7}, {"chosen": TURNS[:1], "rejected": TURNS, "margin": 0.1}],
}  # fmt: skip


def reward_model(**options):
    torch.manual_seed(0)
    return llama(num_labels=1, **options)


@pytest.mark.parametrize("engine", ["layerwise", "functional", "loop"])
def test_every_engine_has_the_gradient_of_the_difference(engine):
    model = reward_model()
    names = [name for name, _ in model.named_parameters()]
    size = sum(parameter.numel() for parameter in model.parameters())
    config = TrakConfig(task="preference", gradients=engine, projector="identity", proj_dim=size)
    found = Featurizer(model, config)(ROWS[:])

    def difference(model, batch):
        rewards = [model(input_ids=batch[side][:, : int(batch[f"n_{side}"])]).logits[:, 0] for side in ("chosen", "rejected")]
        output = rewards[0] - rewards[1]
        return output, torch.sigmoid(batch["margin"] - output.detach())

    batch = {"margin": torch.tensor(ROWS["margin"][:])}
    for side in ("chosen", "rejected"):
        ids = ROWS[f"{side}_ids"][:]
        batch[side] = torch.tensor([row + [0] * (6 - len(row)) for row in ids])
        batch[f"n_{side}"] = torch.tensor([len(row) for row in ids])
    output, out_to_loss, grads = gradient_loop(model, batch, difference, names)
    np.testing.assert_allclose(found["trak_output"], output, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["trak_out_to_loss"], out_to_loss, rtol=1e-4)
    np.testing.assert_allclose(found["trak_features"], grads, rtol=1e-3, atol=1e-5 * float(grads.abs().max()))


def test_an_index_of_a_reward_model_prefers_its_own_rows(tmp_path):
    reward_model().save_pretrained(tmp_path / "model")
    train = Dataset.from_dict({name: ROWS[name][:] * 4 for name in ROWS.column_names})
    config = TrakConfig(task="preference", proj_dim=32)
    index = AttributionIndex.build(tmp_path / "index", models=tmp_path / "model", dataset=train, config=config, progress=False)
    assert index.config.columns_read == {"tokens": ["chosen_ids", "rejected_ids"], "margin": "margin"}
    scores = index.score(ROWS, progress=False)
    assert all(scores[row, row] > 0 for row in range(3))


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("kind", list(PREFERENCES))
def test_rows_are_what_rewardtrainer_trains_on(kind, tmp_path):
    """Its tokens, and its loss: out-to-loss times the gradient of the output is minus the loss's gradient."""
    trl = pytest.importorskip("trl")
    tokenizer = byte_tokenizer()
    rows, model = Dataset.from_list(PREFERENCES[kind]), reward_model(vocab_size=300, max_position_embeddings=80).eval()
    args = trl.RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = trl.RewardTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    task = AutoTask.from_model(model, TrakConfig(task="preference"))
    task.check(rows, tokenizer)
    theirs = trainer.train_dataset
    for place, row in enumerate(theirs):
        ours, own = task.collate(rows[place : place + 1], tokenizer), task.collate(theirs[place : place + 1], None)
        assert ours["input_ids"][0].tolist() == row["chosen_ids"]
        assert ours["rejected_input_ids"][0].tolist() == row["rejected_ids"]
        assert all(torch.equal(own[name], values) for name, values in ours.items())
        output, out_to_loss = task.output_function(model, own)
        parameters = list(model.parameters())
        expected = torch.autograd.grad(trainer.compute_loss(model, trainer.data_collator([row])), parameters, allow_unused=True)
        found = torch.autograd.grad((output * out_to_loss).sum(), parameters, allow_unused=True)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, -other, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_a_rewardtrainer_attributes_to_its_own_rows(tmp_path):
    trl = pytest.importorskip("trl")
    config = trl.RewardConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_steps=2,
        save_strategy="no",
        center_rewards_coefficient=0.01,
    )
    args = AttributionArguments.from_training_arguments(config, proj_dim=32)
    model = reward_model(vocab_size=300, max_position_embeddings=80)
    rows = Dataset.from_list(PREFERENCES["texts"] * 3)
    trainer = attribution(trl.RewardTrainer)(model, args=args, train_dataset=rows, processing_class=byte_tokenizer())
    with pytest.warns(UserWarning, match="center_rewards_coefficient=0.01"):
        trainer.train()
    index = trainer.featurize()
    assert index.config.task == "preference"
    scores = index.score(trainer.train_dataset.select(range(2)), progress=False)
    assert scores.shape == (6, 2)
    assert scores[0, 0] > 0
    assert scores[1, 1] > 0


@pytest.mark.parametrize(("rows", "message"), [
    ({"prompt": ["what"], "chosen": ["a bird"]}, "needs the columns 'chosen' and 'rejected'"),
    ({"prompt_ids": [[1]], "chosen_ids": [[2]], "rejected_ids": [[3]]}, "which are DPOTrainer's"),
    ({"chosen_ids": [[2], []], "rejected_ids": [[3], [3]]}, "chosen sequence has no token"),
    ({"chosen_ids": [[2, 900]], "rejected_ids": [[3]]}, "one is 900"),
    ({"chosen_ids": [[2] * 30], "rejected_ids": [[3]]}, "more than 20; RewardTrainer leaves such rows out"),
    ({"chosen": ["a"], "rejected": [None]}, "'rejected' is None"),
    ({"chosen": ["a"], "rejected": ["b"], "margin": [None]}, "'margin' is None"),
    ({"prompt": ["what"], "chosen": [TURNS], "rejected": [TURNS]}, "must be a text where its answers are"),
])  # fmt: skip
def test_rows_that_cannot_serve_are_refused(rows, message):
    task = AutoTask.from_model(reward_model(vocab_size=300), TrakConfig(task="preference"))
    with pytest.raises(ValueError, match=message):
        task.check(Dataset.from_dict(rows), byte_tokenizer())
