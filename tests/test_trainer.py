"""`AttributionTrainer`: an ordinary run, and then attribution."""

import inspect
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets_for_tests import token_rows
from models import make_model
from test_runs import assert_equal_models
from tokenizers_for_tests import WORDS, word_tokenizer
from transformers import DataCollatorWithPadding, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_trak import AttributionArguments, AttributionCallback, AttributionIndex, AttributionTrainer, Featurizer, TrakConfig

TRAIN, VALIDATION = token_rows(40), token_rows(5, seed=1)
OPTIONS = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
}
# Trainer's loader asks for pinned memory where there is none.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([row["label"] for row in rows])}


def make_trainer(folder, **options):
    args = AttributionArguments(str(folder), proj_dim=32, shard_rows=16, **{**OPTIONS, **options})
    return AttributionTrainer(
        model=make_model("bert"), args=args, train_dataset=TRAIN, eval_dataset=VALIDATION, data_collator=collate
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("run"), members="epoch:2")
    trainer.train()
    trainer.featurize()
    return trainer


def test_columns_that_the_arguments_name_are_kept_with_the_features(tmp_path):
    trainer = make_trainer(tmp_path / "run", max_steps=1, keep_columns=["text,label"])
    texts = [f"text {i}" for i in range(len(TRAIN))]
    trainer.train_dataset = TRAIN.add_column("text", texts)
    trainer.train()
    hits = trainer.attribute(top_k=2)
    assert hits[0]["proponent_text"] == [texts[row] for row in hits[0]["proponents"]]
    assert hits[0]["opponent_label"] == [TRAIN[row]["label"] for row in hits[0]["opponents"]]


@pytest.mark.parametrize("members", ["final", "epoch:2", "steps:[4,7]"])
def test_training_is_bit_identical_to_a_stock_trainer(tmp_path, members):
    ours = make_trainer(tmp_path / "ours", members=members)
    ours.train()
    stock = Trainer(
        model=make_model("bert"),
        args=TrainingArguments(str(tmp_path / "stock"), **OPTIONS),
        train_dataset=TRAIN,
        data_collator=collate,
    )
    stock.train()
    for name, weights in stock.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], weights), name


def test_the_last_epochs_are_kept_and_are_what_the_weights_were(trained):
    folders = trained.member_checkpoints()
    assert [folder.name for folder in folders] == ["epoch-0002", "epoch-0003"]
    last = type(trained.model).from_pretrained(folders[-1])
    for name, weights in trained.model.state_dict().items():
        assert torch.equal(last.state_dict()[name], weights), name


def test_final_keeps_one_snapshot(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert [folder.name for folder in trainer.member_checkpoints()] == ["final"]
    assert len(trainer.featurize().members) == 1


def test_the_trainer_the_index_and_map_give_the_same_numbers(trained):
    """Law 5, but for the command line, which `test_cli.py` adds."""
    hits = trained.attribute(top_k=3)
    loaded = AttributionIndex.from_pretrained(f"{trained.args.output_dir}/index")
    assert loaded.attribute(VALIDATION, top_k=3, progress=False).to_dict() == hits.to_dict()
    mapped = TRAIN.map(Featurizer(str(trained.member_checkpoints()[0]), TrakConfig(proj_dim=32)), batched=True, batch_size=40)
    stored = torch.cat([shard.features for shard in loaded.members[0].shards()]).numpy()
    np.testing.assert_allclose(np.array(mapped["trak_features"][:]), stored, atol=2e-6 * np.abs(stored).max())


def test_attribute_takes_the_evaluation_set_or_what_it_is_given(trained):
    assert len(trained.attribute(top_k=2)) == 5
    assert len(trained.attribute(VALIDATION.select([0, 1]), top_k=2)) == 2


def test_a_stock_trainer_keeps_the_same_snapshots_with_the_callback(tmp_path, trained):
    stock = Trainer(
        model=make_model("bert"),
        args=TrainingArguments(str(tmp_path), **OPTIONS),
        train_dataset=TRAIN,
        data_collator=collate,
        callbacks=[AttributionCallback("epoch:2")],
    )
    stock.train()
    for folder in trained.member_checkpoints():
        ours = (folder / "model.safetensors").read_bytes()
        assert (tmp_path / "members" / folder.name / "model.safetensors").read_bytes() == ours


def test_parameters_frozen_in_training_have_no_features(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    trainer.model.bert.embeddings.requires_grad_(False)
    trainer.train()
    index = trainer.featurize()
    names = list(index.members[0].identity["parameters"])
    assert names == [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert 0 < index.members[0].info["coverage"] < 1
    assert len(AttributionIndex.from_pretrained(index.folder).attribute(VALIDATION, progress=False)) == 5


def test_a_run_that_ends_within_an_epoch_keeps_the_epochs_before_it(tmp_path):
    trainer = make_trainer(tmp_path, members="epoch:9", max_steps=7)  # 5 steps an epoch
    trainer.train()
    assert [folder.name for folder in trainer.member_checkpoints()] == ["epoch-0001", "epoch-0002"]


def test_the_model_is_left_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    trainer.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.featurize()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_featurizing_before_training_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="call `train\\(\\)` first"):
        make_trainer(tmp_path).featurize()


def test_unknown_members_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="`members` must be 'final', 'epoch:K'"):
        AttributionArguments(str(tmp_path), members="last")


def test_stock_arguments_are_taken_over_and_stay_as_they_are(tmp_path):
    args = TrainingArguments(str(tmp_path), learning_rate=3e-4, use_cpu=True)
    before = dict(vars(args))
    trainer = AttributionTrainer(make_model("bert"), args)
    assert isinstance(trainer.args, AttributionArguments)
    assert (trainer.args.learning_rate, trainer.args.members, trainer.args.proj_dim) == (3e-4, "final", 4096)
    assert vars(args) == before
    with pytest.raises(ValueError, match="`args` must be AttributionArguments or other TrainingArguments, but is dict"):
        AttributionTrainer(model=make_model("bert"), args={})


def test_arguments_of_another_trainer_keep_their_class_through_pickle(tmp_path):
    given = Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, use_cpu=True)
    args = AttributionArguments.from_training_arguments(given, members="epoch:2", proj_dim=16)
    again = pickle.loads(pickle.dumps(args))
    for found in (args, again):
        assert isinstance(found, Seq2SeqTrainingArguments)
        assert (found.predict_with_generate, found.members, found.trak_config().proj_dim) == (True, "epoch:2", 16)
    assert again.to_dict() == args.to_dict()
    with pytest.raises(ValueError, match="no fields of an attribution: learning_rate"):
        AttributionArguments.from_training_arguments(given, learning_rate=1.0)


def test_the_signature_is_that_of_trainer():
    theirs = list(inspect.signature(Trainer.__init__).parameters)
    assert list(inspect.signature(AttributionTrainer.__init__).parameters)[: len(theirs)] == theirs


def test_a_folder_and_raw_texts_are_enough(tmp_path):
    """The model and its tokenizer are loaded, texts and labels are read, and the scores are those of rows tokenized beforehand."""
    tokenizer = word_tokenizer()
    make_model("bert").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = Dataset.from_dict({"text": [f"{WORDS[i]} {WORDS[2 * i]}" for i in range(8)], "label": [0, 1, 2, 0] * 2})
    tokens = texts.map(lambda row: tokenizer(row["text"])).rename_column("label", "labels").remove_columns("text")
    options = {**OPTIONS, "num_train_epochs": 1, "proj_dim": 32}
    raw = AttributionTrainer(str(tmp_path / "model"), AttributionArguments(str(tmp_path / "raw"), **options), None, texts)
    raw.train()
    given = AttributionTrainer(
        make_model("bert"),
        AttributionArguments(str(tmp_path / "tokens"), **options),
        DataCollatorWithPadding(tokenizer),
        tokens,
        processing_class=tokenizer,
    )
    given.train()
    assert_equal_models(raw.model, given.model)
    np.testing.assert_array_equal(raw.featurize().score(texts, progress=False), given.featurize().score(tokens, progress=False))


def test_bad_feature_arguments_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="`proj_dim` must be a whole number of at least 1"):
        AttributionArguments(str(tmp_path), proj_dim=0)
    with pytest.raises(ValueError, match="`damping` must be 'auto' or a number"):
        AttributionArguments(str(tmp_path), damping="lots")
