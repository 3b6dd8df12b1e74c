"""The paper's settings: their configurations, their rows, and the script that trains them, on tiny data."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from models import bert, llama_lm
from paper_settings import Setting, center_crop, prepare, random_crop
from PIL import Image as PILImage

from hf_trak.evaluation import Recipe, ground_truth_from, make_masks, training
from hf_trak.evaluation.training import outputs_on, train
from hf_trak.sources.checkpoints import load_model

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_subsets.py"
CONFIGS = sorted(path for path in (SCRIPT.parent / "configs").glob("*.yaml") if not path.stem.startswith(("ftrace", "clip")))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_subsets", SCRIPT)
    module = sys.modules["train_subsets"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Fifty images of five classes each for training and queries, as files of Parquet."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee", "cat", "dog", "eel"])})
    for name in ("train", "test"):
        images = [PILImage.fromarray(pixels) for pixels in generator.integers(256, size=(50, 12, 12, 3), dtype=np.uint8)]
        rows = Dataset.from_dict({"image": images, "label": [number % 5 for number in range(50)]}, features=features)
        rows.to_parquet(str(folder / f"{name}.parquet"))
    return folder


IMAGES = Setting(
    model="resnet9",
    num_labels=2,
    width=2,
    train_file="train.parquet",
    query_file="test.parquet",
    classes=[3, 1],
    n_train=12,
    n_query=5,
)
SHORT = Recipe(epochs=2, batch_size=6, peak_epoch=1, learning_rate=0.05)


# Configurations


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_understood(script, path):
    name, scale = path.stem.rsplit("_", 1)
    args, setting, _ = script.parse_arguments(["--setting", name, "--scale", scale, "--output", "out"])
    assert args.output == "out"
    assert setting.hub_dataset
    if scale == "small":
        assert setting.train_file
        assert setting.n_train <= 5000


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar2", {"learning_rate": 0.4, "momentum": 0.9, "weight_decay": 5e-4, "epochs": 100, "peak_epoch": 5}),
        ("cifar10", {"learning_rate": 0.5, "momentum": 0.9, "weight_decay": 5e-4, "epochs": 24, "peak_epoch": 5}),
        (
            "imagenet",
            {
                "learning_rate": 5.2,
                "momentum": 0.8,
                "weight_decay": 4e-5,
                "epochs": 15,
                "peak_epoch": 2,
                "label_smoothing": 0.05,
            },
        ),
        ("qnli", {"learning_rate": 1e-3, "epochs": 20, "label_smoothing": 0}),
    ],
)
def test_the_papers_recipes_are_the_papers(script, name, expected):
    _, setting, recipe = script.parse_arguments(["--setting", name, "--output", "out"])
    assert recipe.optimizer == "sgd"
    assert {key: getattr(recipe, key) for key in expected} == expected
    if name == "qnli":
        assert not setting.tanh


PAPER_ROWS = {"cifar2": 2 * 3, "cifar10": 10 * 3, "imagenet": 10 * 3, "qnli": 30}


@pytest.mark.parametrize("name", PAPER_ROWS)
def test_a_paper_configuration_prepares_and_trains_on_few_rows(script, tmp_path, name):
    """All of the published recipe but its size: fewer rows, narrower networks, one epoch."""
    if name == "qnli":
        save_text_model(tmp_path / "model")
        columns = {"question": ["word word"] * 30, "sentence": ["word"] * 30, "label": [0, 1] * 15}
        rows = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["yes", "no"]))
        small = ["--model", str(tmp_path / "model")]
    else:
        pixels = np.random.default_rng(0).integers(256, size=(30, 16, 16, 3), dtype=np.uint8)
        columns = {"image": [PILImage.fromarray(one) for one in pixels], "label": [number % 10 for number in range(30)]}
        features = Features({"image": Image(), "label": ClassLabel(names=[str(number) for number in range(10)])})
        rows = Dataset.from_dict(columns, features=features)
        small = ["--width", "2", "--n_workers", "0"]
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    flags = [
        "--train_file",
        "rows.parquet",
        "--query_file",
        "rows.parquet",
        "--n_train",
        str(PAPER_ROWS[name]),
        "--n_query",
        "4",
    ]
    args = ["--setting", name, "--output", "out", *flags, *small, "--epochs", "2", "--peak_epoch", "1", "--batch_size", "4"]
    _, setting, recipe = script.parse_arguments(args)
    prepared = prepare(setting, data_folder=tmp_path)
    model = prepared.make_model()
    assert model.config.num_labels == setting.num_labels
    before = {key: value.clone() for key, value in model.named_parameters()}
    train(model, prepared.train_rows, range(min(8, len(prepared.train_rows))), recipe, seed=0)
    outputs = outputs_on(model, prepared.query_rows, prepared.task)
    assert outputs.shape == (4,)
    assert np.isfinite(outputs).all()
    assert any(not torch.equal(value, before[key]) for key, value in model.named_parameters())
    if name == "qnli":
        assert isinstance(model.bert.pooler.activation, torch.nn.Identity)


def test_flags_win_over_the_configuration(script):
    args, setting, recipe = script.parse_arguments(
        ["--setting", "cifar2", "--scale", "small", "--output", "out", "--epochs", "7", "--n_train", "9", "--num_shards", "4"]
    )
    assert (recipe.epochs, setting.n_train, args.num_shards) == (7, 9, 4)


# Rows


def test_classes_are_kept_and_renumbered(image_folder):
    prepared = prepare(IMAGES, data_folder=image_folder)
    assert len(prepared.train_rows) == 12
    original = load_dataset("parquet", data_files=str(image_folder / "train.parquet"), split="train")
    pixels = {np.asarray(row["image"]).tobytes(): row["label"] for row in original}
    for row, label in zip(prepared.train_rows.tensors["pixel_values"], prepared.train_rows.tensors["labels"], strict=True):
        image = ((row * 0.25 + 0.47) * 255).round().byte().permute(1, 2, 0).numpy()
        assert pixels[image.tobytes()] == [3, 1][label]


def test_draws_are_repeatable_and_of_their_seed(image_folder):
    first, again, other = (
        prepare(replace(IMAGES, sample_seed=seed), data_folder=image_folder).identity()["train_rows"] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_more_rows_than_there_are_are_refused(image_folder):
    with pytest.raises(ValueError, match="draws 21 rows, but there are only 20"):
        prepare(replace(IMAGES, n_train=21), data_folder=image_folder)


def test_data_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file 'train.parquet'.*names no dataset of the Hub"):
        prepare(IMAGES, data_folder=tmp_path)


def test_an_on_demand_setting_crops_to_224(image_folder):
    setting = replace(IMAGES, model="resnet18", on_demand=True, width=2)
    prepared = prepare(setting, data_folder=image_folder)
    batch = next(prepared.train_rows.batches([[0, 1]]))
    assert batch["pixel_values"].shape == (2, 3, 224, 224)
    assert prepared.make_model()(**batch).logits.shape == (2, 2)


def test_crops_are_parts_of_the_image():
    ramp = np.tile(np.arange(80, dtype=np.uint8)[:, None, None], (1, 100, 3))
    columns = {"image": [PILImage.fromarray(ramp)] * 30, "label": [0] * 30}
    to_values = np.array([0.229, 0.224, 0.225])[:, None, None], np.array([0.485, 0.456, 0.406])[:, None, None]
    middle = center_crop(columns)["pixel_values"][0] * to_values[0] + to_values[1]
    assert middle[0, 0, 0] * 255 == pytest.approx(5, abs=1)
    assert middle[0, -1, 0] * 255 == pytest.approx(74, abs=1)
    torch.manual_seed(0)
    spans = [np.ptp(one[0, :, 0] * 0.229) * 255 for one in random_crop(columns)["pixel_values"]]
    assert min(spans) >= 15  # 8 % of the area, 4:3, is 22 rows high
    assert max(spans) <= 79.5
    assert len(set(spans)) > 20


def test_texts_out_of_length_are_left_out(tmp_path):
    texts = [" ".join(["word"] * count) for count in range(1, 13)]
    rows = Dataset.from_dict(
        {"sentence": texts, "label": [0, 1] * 6},
        features=Features({"sentence": Value("string"), "label": ClassLabel(num_classes=2)}),
    )
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    save_text_model(tmp_path / "model")
    setting = Setting(
        model=str(tmp_path / "model"),
        num_labels=2,
        n_layers=1,
        train_file="rows.parquet",
        query_file="rows.parquet",
        text_columns=["sentence"],
        min_words=3,
        max_words=8,
        max_query_words=5,
        max_length=6,
    )
    prepared = prepare(setting, data_folder=tmp_path)
    assert [len(text.split()) for text in prepared.train_dataset["sentence"]] == [3, 4, 5, 6, 7, 8]
    assert [len(text.split()) for text in prepared.query_dataset["sentence"]] == [3, 4, 5]
    assert prepared.train_rows.tensors["input_ids"].shape == (6, 6)
    assert prepared.make_model().config.num_hidden_layers == 1


def test_a_causal_language_model_is_a_setting_too(script, tmp_path):
    texts = [" ".join(["word"] * count) for count in range(3, 15)]
    features = Features({"sentence": Value("string"), "label": ClassLabel(num_classes=2)})
    rows = Dataset.from_dict({"sentence": texts, "label": [0, 1] * 6}, features=features)
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    save_tokenizer(tmp_path / "model")
    llama_lm().save_pretrained(tmp_path / "model")
    setting = Setting(
        model=str(tmp_path / "model"),
        num_labels=0,
        train_file="rows.parquet",
        query_file="rows.parquet",
        text_columns=["sentence"],
        max_length=6,
    )
    prepared = prepare(setting, data_folder=tmp_path)
    assert prepared.task.name == "causal-lm"
    assert prepared.train_rows.tensors["input_ids"].shape == (12, 6), "cut before the end token, which stays"
    assert prepared.train_rows.tensors["labels"][0].tolist() == [2, 2, 2, 0, -100, -100]
    model = prepared.make_model()
    batch = next(prepared.train_rows.batches([[0, 5]]))
    expected = model(**batch).loss  # transformers' own
    torch.testing.assert_close(training._loss(model, dict(batch), SHORT), expected)
    before = outputs_on(model, prepared.query_rows, prepared.task)
    train(model, prepared.train_rows, range(12), SHORT, seed=0)
    assert outputs_on(model, prepared.query_rows, prepared.task).mean() > before.mean()


def save_text_model(folder):
    save_tokenizer(folder)
    bert(num_labels=2).save_pretrained(folder)


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "word": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


# The script


def arguments(image_folder, output, *more):
    flags = {
        "model": "resnet9", "width": 2, "num_labels": 2, "train_file": "train.parquet", "query_file": "test.parquet",
        "n_train": 12, "n_query": 5, "epochs": 2, "batch_size": 6, "peak_epoch": 1, "learning_rate": 0.05, "n_subsets": 3,
        "n_members": 2, "n_full": 1, "keep_epochs": 2, "data": image_folder, "output": output,
    }  # fmt: skip
    return [*(part for key, value in flags.items() for part in (f"--{key}", str(value))), "--classes", "3", "1", *more]


def test_the_script_trains_collects_and_reports(script, image_folder, tmp_path, capsys):
    script.main(*script.parse_arguments(arguments(image_folder, tmp_path)))
    assert "Reliability(split_half=" in capsys.readouterr().out
    masks, outputs = ground_truth_from(Dataset.from_parquet(str(tmp_path / "ground_truth" / "ground_truth.parquet")))
    assert outputs.shape == (2, 3, 5)
    assert (masks == make_masks(12, 3)).all()
    members, _ = ground_truth_from(Dataset.from_parquet(str(tmp_path / "members" / "members.parquet")))
    assert not {mask.tobytes() for mask in members} & {mask.tobytes() for mask in masks}
    assert len(Dataset.from_parquet(str(tmp_path / "data" / "train.parquet"))) == 12
    kept = sorted(path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("model.safetensors"))
    assert kept == [
        "full/checkpoints/subset-00000-seed-000/epoch-0001",
        "full/checkpoints/subset-00000-seed-000/epoch-0002",
        "members/checkpoints/subset-00000-seed-000/epoch-0002",
        "members/checkpoints/subset-00001-seed-000/epoch-0002",
    ]
    runs = [json.loads(line)["run"] for line in (tmp_path / "ground_truth" / "log.jsonl").read_text().splitlines()]
    assert runs == [f"subset-{subset:05d}-seed-{seed:03d}" for subset in range(3) for seed in range(2)]


def test_two_shards_of_the_script_are_one(script, image_folder, tmp_path):
    for shard in (1, 0):
        flags = ("--shard_index", str(shard), "--num_shards", "2", "--jobs", "ground_truth")
        script.main(*script.parse_arguments(arguments(image_folder, tmp_path / "shared", *flags)))
        assert (tmp_path / "shared" / "ground_truth" / "ground_truth.parquet").exists() == (shard == 0)
    script.main(*script.parse_arguments(arguments(image_folder, tmp_path / "alone", "--jobs", "ground_truth")))
    one, other = ((tmp_path / name / "ground_truth" / "ground_truth.parquet").read_bytes() for name in ("shared", "alone"))
    assert one == other


def test_every_run_starts_from_what_was_pretrained_on_the_other_classes(script, image_folder, tmp_path):
    flags = ("--pretrain_classes", "0", "2", "4", "--pretrain_epochs", "2", "--jobs", "full")
    for _ in range(2):  # the second time, nothing is left to do
        script.main(*script.parse_arguments(arguments(image_folder, tmp_path, *flags)))
    pretrained = load_model(str(tmp_path / "pretrained"))
    _, setting, _ = script.parse_arguments(arguments(image_folder, tmp_path))
    fresh = prepare(replace(setting, model=str(tmp_path / "pretrained")), data_folder=image_folder).make_model()
    same = {name: torch.equal(value, fresh.state_dict()[name]) for name, value in pretrained.state_dict().items()}
    assert [name for name, equal in same.items() if not equal] == ["classifier.weight"]


@pytest.mark.slow
def test_two_processes_of_accelerate_are_one(script, image_folder, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", str(SCRIPT)]
    flags = arguments(image_folder, tmp_path / "two", "--jobs", "ground_truth")
    done = subprocess.run([*launch, *flags], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Reliability") == 1
    script.main(*script.parse_arguments(arguments(image_folder, tmp_path / "one", "--jobs", "ground_truth")))
    two, one = ((tmp_path / name / "ground_truth" / "ground_truth.parquet").read_bytes() for name in ("two", "one"))
    assert two == one
    assert len((tmp_path / "two" / "ground_truth" / "log.jsonl").read_text().splitlines()) == 6  # no run was done twice


def test_processes_that_do_not_know_each_other_are_refused(script, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2 processes were launched, but accelerate sees 1.*--multi_gpu --num_processes N"):
        script.check_processes(SimpleNamespace(num_processes=1))


def test_data_of_another_setting_is_set_aside_only_when_asked_and_never_deleted(image_folder, tmp_path):
    first, other = (prepare(setting, data_folder=image_folder) for setting in (IMAGES, replace(IMAGES, n_train=7)))
    first.save_data(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    first.save_data(tmp_path, overwrite=True)  # the same rows: nothing is set aside
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"train.parquet holds other rows than these.*--overwrite"):
        other.save_data(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    other.save_data(tmp_path, overwrite=True)
    assert len(Dataset.from_parquet(str(tmp_path / "train.parquet"))) == 7
    assert (tmp_path / "replaced-1" / "train.parquet").read_bytes() == before["train.parquet"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    (tmp_path / "queries.parquet").write_text("a thesis under that name")
    other.save_data(tmp_path, overwrite=True)
    assert (tmp_path / "replaced-2" / "queries.parquet").read_text() == "a thesis under that name"
