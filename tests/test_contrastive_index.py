"""Pairs of images and captions from rows to scores, reports and training; and what is refused."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import make_dual_encoder
from pairs_for_tests import caption, image_feature, make_processor, pair_rows, picture, save_dual_encoder
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_trak import AttributionArguments, AttributionIndex, AttributionTrainer, Featurizer, TrakConfig
from hf_trak.cli.main import main
from hf_trak.tasks import AutoTask, PairCollator, draw_rows
from hf_trak.tasks.pictures import to_rgb

CONFIG = TrakConfig(proj_dim=64, bank_size=7, bank_seed=1)
N_ROWS = 12


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return [save_dual_encoder(folder / str(seed), seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def index(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> AttributionIndex:
    return build(tmp_path_factory.mktemp("index") / "index", checkpoints)


def build(folder: Path, checkpoints: list[Path], dataset: Dataset | None = None, **options: Any) -> AttributionIndex:
    settings = {
        "config": CONFIG,
        "shard_rows": 5,
        "batch_size": 4,
        "progress": False,
        "sketch_seeds_per_checkpoint": 2,
        **options,
    }
    rows = pair_rows(N_ROWS) if dataset is None else dataset
    return AttributionIndex.build(folder, models=list(checkpoints), dataset=rows, **settings)


# The index and its bank.


def test_the_bank_is_part_of_the_index_and_of_the_checkpoint_alone(index: AttributionIndex):
    banks = [load_file(member.folder / "bank.safetensors") for member in index.members]
    assert len(banks) == 4
    for bank, member in zip(banks, index.members, strict=True):
        assert bank["rows"].tolist() == draw_rows(N_ROWS, 7, 1).tolist()
        assert torch.equal(bank["keys"], banks[0]["keys"])
        assert torch.allclose(bank["images"].norm(dim=1), torch.ones(7))
        recorded = member.info["bank"]
        assert (recorded["seed"], recorded["size"]) == (1, 7)
        assert recorded["sha256"] == index.featurizer(int(member.folder.name[-1])).bank.sha256
        assert any(entry["file"] == "bank.safetensors" for entry in member.info["files"])
        member.verify()
    assert torch.equal(banks[0]["images"], banks[1]["images"])  # two sketches of one checkpoint
    assert not torch.allclose(banks[0]["images"], banks[2]["images"], atol=1e-2)


def test_training_rows_and_queries_have_the_same_features(index: AttributionIndex):
    rows = pair_rows(N_ROWS)
    for member in (0, 3):
        stored = np.array(index.features(member)["trak_features"])
        found = index.featurize_queries(rows.select([9, 2]), member, progress=False)
        assert np.allclose(found["trak_features"], stored[[9, 2]], rtol=1e-4, atol=1e-5 * np.abs(stored).max())
        mapped = rows.map(index.featurizer(member), batched=True, batch_size=3, load_from_cache_file=False)
        assert np.allclose(np.array(mapped["trak_features"]), stored, rtol=1e-4, atol=1e-5 * np.abs(stored).max())


def test_a_featurizer_with_its_own_bank_says_what_the_index_says(index: AttributionIndex, checkpoints: list[Path]):
    rows = pair_rows(N_ROWS)
    featurizer = Featurizer(checkpoints[0], CONFIG)
    with pytest.raises(ValueError, match="has none"):
        featurizer(rows[:2])
    without = featurizer.__getstate__()
    bank = featurizer.make_bank(rows)
    assert torch.equal(bank.images, load_file(index.members[0].folder / "bank.safetensors")["images"])
    stored = np.array(index.features(0)["trak_features"])[:4]
    assert np.allclose(featurizer(rows[:4])["trak_features"], stored, rtol=1e-4, atol=1e-5 * np.abs(stored).max())
    state = featurizer.__getstate__()
    assert state["bank"] is not None
    assert without["bank"] is None  # so that `Dataset.map` tells the two apart
    sent = Featurizer.__new__(Featurizer)
    sent.__setstate__(state)
    assert np.array_equal(sent(rows[:4])["trak_features"], featurizer(rows[:4])["trak_features"])


def test_a_training_pair_is_known_however_its_picture_is_stored_but_not_when_it_was_changed(
    checkpoints: list[Path], tmp_path: Path
):
    """As a query, a row finds its own pair in the bank by the decoded picture and the tokens of its captions."""
    files = [tmp_path / f"{row}.jpg" for row in range(6)]
    for row, path in enumerate(files):
        picture(row).resize((20 + row, 15)).save(path, quality=90)
    rows = Dataset.from_dict({"image": list(map(str, files)), "caption": [caption(row) for row in range(6)]})
    rows = rows.cast_column("image", image_feature())
    featurizer = Featurizer(checkpoints[0], TrakConfig(proj_dim=8, bank_size=6))
    bank = featurizer.make_bank(rows)

    def own(queries: Dataset) -> list[list[int]]:
        keys = featurizer.collate(queries[:])["pair_keys"]
        return [found.nonzero().flatten().tolist() for found in bank.owned_by(keys)]

    everything = [[row] for row in range(6)]
    rows.to_parquet(str(tmp_path / "rows.parquet"))  # the files' bytes are in it
    for stored in (rows, Dataset.from_parquet(str(tmp_path / "rows.parquet")), rows.map(lambda row: row)):
        assert own(stored) == everything
        assert [own(stored.select([row]))[0] for row in range(6)] == everything
    as_png = Dataset.from_dict({"image": [Image.open(path).convert("RGB") for path in files], "caption": rows["caption"][:]})
    assert own(as_png.cast_column("image", image_feature())) == everything
    for row, path in enumerate(files):  # the limit: what a picture looks like is not compared
        Image.open(path).save(tmp_path / f"again_{row}.jpg", quality=60)
    again = Dataset.from_dict(
        {"image": [str(tmp_path / f"again_{row}.jpg") for row in range(6)], "caption": rows["caption"][:]}
    )
    assert own(again.cast_column("image", image_feature())) == [[]] * 6


def test_going_on_uses_the_bank_that_was_written(index: AttributionIndex, checkpoints: list[Path], tmp_path: Path, monkeypatch):
    from hf_trak.storage.writer import MemberWriter

    write, written = MemberWriter.write, []

    def stop(self: MemberWriter, shard: int, columns: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, columns)

    monkeypatch.setattr(MemberWriter, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "index", checkpoints)
    monkeypatch.undo()
    bank = (tmp_path / "index" / "member_0" / "bank.safetensors").read_bytes()
    calls = []
    make = Featurizer.make_bank
    monkeypatch.setattr(Featurizer, "make_bank", lambda self, dataset: calls.append(self.source) or make(self, dataset))
    again = build(tmp_path / "index", checkpoints)
    assert calls == [str(checkpoints[1])]
    assert (again.members[0].folder / "bank.safetensors").read_bytes() == bank
    for member, whole in zip(again.members, index.members, strict=True):
        for path in whole.shard_paths:
            assert (member.folder / path.name).read_bytes() == path.read_bytes()


def test_another_bank_is_another_index(index: AttributionIndex, checkpoints: list[Path]):
    with pytest.raises(ValueError, match="bank_size: 8 here, 7 there"):
        build(index.folder, checkpoints, config=TrakConfig(proj_dim=64, bank_size=8, bank_seed=1))


def test_a_bank_that_has_changed_is_refused(index: AttributionIndex, tmp_path: Path):
    index.save_pretrained(tmp_path / "copy")
    path = tmp_path / "copy" / "member_0" / "bank.safetensors"
    bank = load_file(path)
    bank["images"][0, 0] += 1
    save_file(bank, path)
    with pytest.raises(ValueError, match=r"bank.safetensors has changed since it was written"):
        AttributionIndex.from_pretrained(tmp_path / "copy")


def test_scores_of_pairs_images_and_captions(index: AttributionIndex):
    queries = pair_rows(3, start=20)
    scores = {
        way: index.score(queries, direction=way, combination="means", progress=False) for way in ("pair", "image", "caption")
    }
    assert scores["pair"].shape == (N_ROWS, 3)
    # Features are linear in the gradient, and the pair's output is the sum of the other two. So are scores of one member, and their means.
    assert np.allclose(scores["image"] + scores["caption"], scores["pair"], rtol=1e-3, atol=1e-4 * np.abs(scores["pair"]).max())
    assert np.abs(scores["image"] - scores["caption"]).max() > 1e-3 * np.abs(scores["pair"]).max()
    hits = index.attribute(queries, 2, direction="image", combination="means", progress=False)
    assert hits["proponents"][0] == scores["image"][:, 0].argsort()[::-1][:2].tolist()
    with pytest.raises(ValueError, match="`direction` must be one of pair, image, caption"):
        index.score(queries, direction="text", progress=False)
    others = queries.add_column("other", [caption(200 + row) for row in range(len(queries))])
    means: dict[str, Any] = {"combination": "means", "progress": False}
    each = [index.score(others, target=name, **means) for name in ("caption", "other")]
    np.testing.assert_array_equal(each[0], scores["pair"])
    found = index.score(others, contrast=("caption", "other"), **means)
    np.testing.assert_allclose(found, each[0] - each[1], atol=1e-5 * np.abs(found).max())


def test_a_row_may_have_a_list_of_captions(checkpoints: list[Path]):
    lists = pair_rows(N_ROWS, captions=3)
    featurizer = Featurizer(checkpoints[0], CONFIG)
    featurizer.make_bank(lists)
    row = 2  # has three
    assert len(lists[row]["caption"]) == 3
    whole = featurizer(lists[0:5])
    singles = Dataset.from_dict({"image": [lists[row]["image"]] * 3, "caption": lists[row]["caption"]}).cast_column(
        "image", image_feature()
    )
    batch = featurizer.collate(singles[:])
    batch["pair_keys"] = featurizer.collate(lists[row : row + 1])["pair_keys"].repeat(
        3
    )  # the row's own pair, not each caption's
    expected = featurizer.compute(batch)
    for name, mean in (("trak_features", expected.features.mean(0)), ("trak_output", expected.output.mean(0))):
        assert np.allclose(whole[name][row], mean.numpy(), rtol=1e-4, atol=1e-4)
    alone = featurizer(lists[row : row + 1])
    assert np.allclose(alone["trak_features"][0], whole["trak_features"][row], rtol=1e-4, atol=1e-4)


# Training.


def test_a_trainer_trains_a_dual_encoder_and_attributes(tmp_path: Path):
    model, processor = make_dual_encoder("clip"), make_processor()
    args = AttributionArguments(
        str(tmp_path / "out"), proj_dim=32, bank_size=6, num_train_epochs=8, per_device_train_batch_size=4, learning_rate=3e-3,
        report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, members="final", logging_steps=3, batch_size="4",
    )  # fmt: skip
    trainer = AttributionTrainer(
        model,
        args,
        train_dataset=pair_rows(N_ROWS, captions=2),
        eval_dataset=pair_rows(2, start=30),
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.2
    index = trainer.featurize()
    assert index.config.bank_size == 6
    assert index.members[0].info["coverage"] == 1.0
    hits = trainer.attribute(top_k=3)
    assert len(hits) == 2
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_the_training_loss_is_the_contrastive_loss_of_the_batch():
    model = make_dual_encoder("clip").eval()
    rows = pair_rows(4)
    batch = PairCollator(model, TrakConfig(), make_processor())([rows[row] for row in range(4)])
    assert batch.pop("return_loss") is True
    assert batch["input_ids"].ndim == 2
    with torch.no_grad():
        found = model(**batch, return_loss=True)
        logits = found.logits_per_text
    target = torch.arange(4)
    expected = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    assert torch.allclose(found.loss, expected, rtol=1e-5)


def test_the_collator_draws_among_a_rows_captions():
    model = make_dual_encoder("clip")
    collator = PairCollator(model, TrakConfig(), make_processor())
    row = pair_rows(3, captions=3)[2]
    torch.manual_seed(0)
    drawn = {tuple(collator([row])["input_ids"][0].tolist()) for _ in range(30)}
    assert len(drawn) == 3


# The command line.


def test_a_report_shows_images_with_their_captions(checkpoints: list[Path], tmp_path: Path, capsys):
    train, queries = tmp_path / "train.parquet", tmp_path / "queries.parquet"
    pair_rows(N_ROWS).to_parquet(train)
    pair_rows(2, start=20).to_parquet(queries)
    index = ["--dataset", str(train), "--output", str(tmp_path / "index"), "--proj_dim", "32", "--bank_size", "6"]
    main(["featurize", "--model", str(checkpoints[0]), *index])
    report = ["--train", str(train), "--report", str(tmp_path / "report"), "--top_k", "3", "--direction", "image"]
    main(
        [
            "attribute",
            "--index",
            str(tmp_path / "index"),
            "--queries",
            str(queries),
            "--output",
            str(tmp_path / "hits.jsonl"),
            *report,
        ]
    )
    page = (tmp_path / "report" / "report.html").read_text()
    hits = [json.loads(line) for line in (tmp_path / "hits.jsonl").read_text().splitlines()]
    assert caption(20) in page
    for row in hits[0]["proponents"] + hits[0]["opponents"]:
        assert caption(row) in page
    shown = page.split("</style>")[1].split("<script>")[0]
    assert "none" not in shown  # the licence is no caption
    assert re.sub(r"<details>.*?</details>", "", shown, flags=re.DOTALL).count("<img") == 2 * 7
    assert caption(20) in capsys.readouterr().out
    with Image.open(tmp_path / "report" / "report.png") as drawn:
        assert drawn.size[1] > 600  # two rows, each with room for captions


# Bad input.


def corrupt(row: int, content: bytes) -> Dataset:
    cells = []
    for number in range(4):
        buffer = io.BytesIO()
        picture(number).save(buffer, format="PNG")
        cells.append({"bytes": content if number == row else buffer.getvalue(), "path": None})
    return Dataset.from_dict({"image": cells, "caption": [caption(row) for row in range(4)]}).cast_column(
        "image", image_feature()
    )


@pytest.mark.parametrize("content", [b"no picture", b"\x89PNG\r\n\x1a\n"], ids=["text", "header alone"])
def test_an_unreadable_image_names_its_row(checkpoints: list[Path], tmp_path: Path, content: bytes):
    with pytest.raises(ValueError, match="Row 3 of the dataset cannot be read"):
        build(tmp_path / "index", checkpoints[:1], corrupt(3, content), config=TrakConfig(proj_dim=8, bank_size=2))


def test_a_missing_image_names_its_rows(checkpoints: list[Path], tmp_path: Path):
    rows = pair_rows(5).to_dict()
    rows["image"] = [None if row in (1, 4) else image for row, image in enumerate(rows["image"])]
    dataset = Dataset.from_dict(rows, features=pair_rows(5).features)
    with pytest.raises(ValueError, match="2 rows have no image in 'image': rows 1, 4"):
        build(tmp_path / "index", checkpoints[:1], dataset)
    picture(0).save(tmp_path / "there.png")
    paths = [str(tmp_path / "there.png"), str(tmp_path / "gone.png")]
    dataset = Dataset.from_dict({"image": paths, "caption": ["w5", "w6"]}).cast_column("image", image_feature())
    with pytest.raises(ValueError, match=r"image files of 1 rows are not there: row 1; the first is .*gone.png"):
        build(tmp_path / "index", checkpoints[:1], dataset)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("bad", [[], ["w5", ""], None], ids=["no caption", "an empty one", "missing"])
def test_a_row_without_captions_is_named(checkpoints: list[Path], tmp_path: Path, bad: Any):
    rows = pair_rows(5, captions=2).to_dict()
    rows["caption"][3] = bad
    dataset = Dataset.from_dict(rows, features=pair_rows(5, captions=2).features)
    with pytest.raises(ValueError, match=r"1 rows have no caption in 'caption', or an empty one: row 3\. Filter"):
        build(tmp_path / "index", checkpoints[:1], dataset)


def test_a_bank_larger_than_the_dataset_is_refused_before_anything_is_written(checkpoints: list[Path], tmp_path: Path):
    with pytest.raises(ValueError, match="`bank_size` is 40, but the training set has 12 rows"):
        build(tmp_path / "index", checkpoints[:1], config=TrakConfig(proj_dim=64, bank_size=40))
    assert not (tmp_path / "index").exists()


def test_columns_that_cannot_serve_are_named():
    inputs = AutoTask.from_model(make_dual_encoder("clip")).inputs
    rows, processor = pair_rows(2), make_processor()
    with pytest.raises(ValueError, match="An image column needs an image processor"):
        inputs.check(rows.features, None)
    with pytest.raises(ValueError, match="A caption column needs a tokenizer"):
        inputs.check(rows.features, processor.image_processor)
    with pytest.raises(ValueError, match="Expected 'pixel_values' or one image column"):
        inputs.check(rows.remove_columns("image").features, processor)
    with pytest.raises(ValueError, match=r"Expected a caption column \(caption, captions, text, texts\)"):
        inputs.check(rows.rename_column("caption", "words").features, processor)
    inputs.check(rows.features, processor)
    chosen = AutoTask.from_model(make_dual_encoder("clip"), TrakConfig(text_columns=("license",))).inputs
    assert chosen.caption_column(rows.features) == "license"
    with pytest.raises(ValueError, match="one caption column"):
        AutoTask.from_model(make_dual_encoder("clip"), TrakConfig(text_columns=("caption", "license")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "RGB"])
def test_a_picture_of_any_mode_is_what_pillow_makes_of_it(mode: str):
    image = picture(0, "L" if mode == "LA" else "RGB").convert(mode)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


def test_a_palette_with_transparency_is_converted_without_a_warning():
    image = picture(0).convert("P")
    image.info["transparency"] = bytes([255] * 255 + [0])
    assert to_rgb(image).mode == "RGB"


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deeper_pictures_are_scaled_and_not_clipped(mode: str):
    values = np.linspace(0, 65535, 64).reshape(8, 8)
    image = Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    assert image.mode == mode
    found = np.asarray(to_rgb(image))[..., 0]
    assert np.abs(found - values / 257).max() <= 1
    assert len(np.unique(found)) == 64


def test_pictures_of_mixed_modes_make_a_batch(checkpoints: list[Path]):
    modes = ["L", "RGBA", "P", "RGB"]
    rows = Dataset.from_dict(
        {"image": [picture(i, mode) for i, mode in enumerate(modes)], "caption": [caption(i) for i in range(4)]}
    )
    rows = rows.cast_column("image", image_feature())
    featurizer = Featurizer(checkpoints[0], TrakConfig(proj_dim=8, bank_size=4))
    featurizer.make_bank(rows)
    assert featurizer.collate(rows[:])["pixel_values"].shape == (4, 3, 8, 8)
    assert np.isfinite(featurizer(rows[:])["trak_features"]).all()
