"""Members that are points of the line from a base checkpoint to the final one."""

import copy
import json
import logging
import pickle
import shutil
import subprocess
import sys

import models
import numpy as np
import pytest
import torch
from datasets_for_tests import image_rows, token_rows
from models import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertForPreTraining, GPT2Config, GPT2LMHeadModel, TrainerCallback

from hf_trak import AttributionArguments, AttributionIndex, AttributionTrainer, Featurizer, TrakConfig
from hf_trak.cli.main import main
from hf_trak.members import PathPoint
from hf_trak.scoring.ensemble import default_power_of
from hf_trak.sources.path_bases import find_base, load_base, make_point
from hf_trak.sources.path_points import scale_adapter, statistics_rows
from hf_trak.storage.writer import MemberWriter

# Trainer's loader asks for pinned memory where there is none.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
CONFIG = TrakConfig(proj_dim=32)
TRAIN, QUERIES = token_rows(20), token_rows(3, seed=1)


def build(folder, models, **options):
    options = {"dataset": TRAIN, "config": CONFIG, "shard_rows": 8, "progress": False, **options}
    return AttributionIndex.build(folder, models=models, **options)


def moved(model, seed=1, size=0.05):
    """A model trained on from `model`, as far as weights tell."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


def halfway(base, final, alpha, new=("classifier",)):
    """The point, made by hand: in float64, a new head from 0."""
    point = copy.deepcopy(final)
    with torch.no_grad():
        for (name, value), start in zip(point.named_parameters(), base.parameters(), strict=True):
            first = torch.zeros_like(value).double() if name.startswith(new) else start.double()
            value.copy_(first + alpha * (value.double() - first))
    return point


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base without a head, and the final model, in folders and in memory."""
    folder = tmp_path_factory.mktemp("models")
    base = make_model("bert", seed=0)
    final = moved(base)
    base.bert.save_pretrained(folder / "base")
    final.save_pretrained(folder / "final")
    return folder, base, final


@pytest.fixture(scope="module")
def built(pair, tmp_path_factory):
    folder = pair[0]
    return build(tmp_path_factory.mktemp("built") / "index", folder / "final", base=folder / "base", alpha=(0.3, 0.5))


def columns(index, member):
    rows = index.features(member)
    return {name: np.array(rows[name][:], dtype=np.float64) for name in ("trak_features", "trak_output", "trak_out_to_loss")}


@pytest.mark.parametrize(("member", "alpha"), [(0, 0.3), (1, 0.5)])
def test_features_are_those_of_a_model_at_the_point(pair, built, tmp_path, member, alpha):
    _, base, final = pair
    point = halfway(base, final, alpha)
    config = TrakConfig(proj_dim=32, sketch_seed=member)
    expected = columns(build(tmp_path / "index", point, config=config), 0)
    for name, values in columns(built, member).items():
        assert np.isfinite(values).all()
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-6 * np.abs(expected[name]).max(), err_msg=name)


def test_a_member_records_the_whole_recipe(pair, built):
    folder = pair[0]
    info = built.members[0].info
    point = info["identity"]["point"]
    assert point["alpha"] == 0.3
    assert point["from_zero"] == ["classifier.weight", "classifier.bias"]
    assert point["kept"] == []
    assert len(point["base_sha256"]) == 64
    assert (built.folder / info["base"]["path"]).resolve() == (folder / "base").resolve()
    assert (built.folder / info["checkpoint"]["path"]).resolve() == (folder / "final").resolve()
    assert info["base"]["distance"] > 0
    other = built.members[1].info["identity"]
    assert other["point"] == {**point, "alpha": 0.5}
    assert other["model_sha256"] == info["identity"]["model_sha256"]
    assert "2 points of a path" in repr(built)


def test_the_final_models_hash_is_what_it_is_without_a_base(pair, built):
    assert Featurizer(pair[0] / "final", CONFIG).checkpoint.hash() == built.members[0].identity["model_sha256"]


@pytest.mark.parametrize("gradients", ["auto", "loop"])
def test_hits_show_what_the_final_model_says(pair, built, gradients, tmp_path):
    folder, _, final = pair
    if gradients == "loop":
        config = TrakConfig(proj_dim=32, gradients="loop")
        built = build(tmp_path / "index", folder / "final", base=folder / "base", alpha=0.5, config=config)
    expected = Featurizer(final, CONFIG)(QUERIES[:])["trak_output"]
    hits = built.attribute(QUERIES, 2, progress=False)
    np.testing.assert_allclose(hits["query_output"], expected, rtol=1e-5)
    assert np.abs(built.featurize_queries(QUERIES, progress=False)["trak_output"] - expected).min() > 1e-3


def test_a_fresh_process_asks_a_copy_by_its_recipe_alone(built, tmp_path):
    built.save_pretrained(tmp_path / "deep" / "copy")
    QUERIES.to_parquet(tmp_path / "queries.parquet")
    code = (
        "import sys, numpy as np, datasets; from hf_trak import AttributionIndex\n"
        "queries = datasets.Dataset.from_parquet(sys.argv[2])\n"
        "np.save(sys.argv[3], AttributionIndex.from_pretrained(sys.argv[1]).score(queries, progress=False))"
    )
    files = [str(tmp_path / name) for name in ("deep/copy", "queries.parquet", "scores.npy")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, capture_output=True)
    scores = np.load(tmp_path / "scores.npy")
    assert scores.shape == (20, 3)
    assert np.array_equal(scores, built.score(QUERIES, progress=False))


@pytest.fixture
def command_line():
    """Run a command, and undo what it changes of logging."""
    yield main
    logger = logging.getLogger("hf_trak.building.build")
    logger.setLevel(logging.NOTSET)
    for handler in [one for one in logger.handlers if one.name == "columns"]:
        logger.removeHandler(handler)


@pytest.mark.slow
def test_the_command_line_makes_and_asks_the_same_index(pair, built, tmp_path, capsys, command_line):
    folder = pair[0]
    TRAIN.to_parquet(tmp_path / "train.parquet")
    QUERIES.to_parquet(tmp_path / "queries.parquet")
    flags = ["--dataset", str(tmp_path / "train.parquet"), "--output", str(tmp_path / "index"), "--proj_dim", "32"]
    model = ["--model", str(folder / "final"), "--base", str(folder / "base"), "--alpha", "0.3", "0.5"]
    assert command_line(["featurize", *model, *flags, "--shard_rows", "8"]) == 0
    said = capsys.readouterr().out
    assert "All of 2 members are points base + alpha (final - base) of a path, alpha = 0.3, 0.5" in said
    assert "start from 0: classifier.bias, classifier.weight." in said
    assert "to the power 1; for final" in said
    index = AttributionIndex.from_pretrained(tmp_path / "index")
    for member in range(2):
        for name, values in columns(index, member).items():
            np.testing.assert_array_equal(values, columns(built, member)[name])
    output = tmp_path / "hits.jsonl"
    asked = ["--index", str(tmp_path / "index"), "--queries", str(tmp_path / "queries.parquet"), "--output", str(output)]
    assert command_line(["attribute", *asked, "--top_k", "3"]) == 0
    hits = [json.loads(line) for line in output.read_text().splitlines()]
    assert [hit["proponents"] for hit in hits] == built.attribute(QUERIES, 3, progress=False)["proponents"][:]


def test_alpha_without_a_base_is_refused_on_the_command_line(pair, tmp_path, capsys, command_line):
    arguments = ["--model", str(pair[0] / "final"), "--dataset", "none.parquet", "--output", str(tmp_path / "index")]
    assert command_line(["featurize", *arguments, "--alpha", "0.5"]) == 1
    assert "there is no `base`" in capsys.readouterr().err


def test_by_default_an_index_has_three_points_and_a_featurizer_the_middle(pair, tmp_path):
    folder = pair[0]
    index = build(tmp_path / "index", folder / "final", base=folder / "base", dataset=TRAIN.select(range(4)))
    assert [member.identity["point"]["alpha"] for member in index.members] == [0.2, 0.5, 0.8]
    assert Featurizer(folder / "final", CONFIG, base=folder / "base").point == PathPoint(str(folder / "base"), 0.5)


def test_points_weigh_by_one_minus_p_itself_and_final_checkpoints_by_its_root(pair, built, tmp_path):
    def scores(index, **options):
        """Of queries whose features are made up."""
        features = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
        return index.attribute_features([features] * len(index.members), 8, progress=False, **options)["proponent_scores"][:]

    folder = pair[0]
    assert default_power_of(built.members) == 1
    assert scores(built) == scores(built, out_to_loss_power=1) != scores(built, out_to_loss_power=0.5)
    final = folder / "final"
    mixed = build(
        tmp_path / "mixed", [final, final], base=[folder / "base", None], alpha=(0.2, 0.4), dataset=TRAIN.select(range(8))
    )
    assert ["point" in member.identity for member in mixed.members] == [True, True, False]
    assert scores(mixed) == scores(mixed, out_to_loss_power=0.5) != scores(mixed, out_to_loss_power=1)
    again = AttributionIndex.from_pretrained(tmp_path / "mixed", models=[final, final])
    points = [again.featurizer(member).point for member in range(3)]
    assert [point and point.alpha for point in points] == [0.2, 0.4, None]


def test_a_killed_build_goes_on_and_another_alpha_or_base_is_refused(pair, built, tmp_path, monkeypatch):
    folder = pair[0]
    write, calls = MemberWriter.write, []

    def stop_at_the_second(self, shard, values):
        calls.append(shard)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, shard, values)

    monkeypatch.setattr(MemberWriter, "write", stop_at_the_second)
    options = {"base": folder / "base", "alpha": (0.3, 0.5)}
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "index", folder / "final", **options)
    monkeypatch.setattr(MemberWriter, "write", write)
    with pytest.raises(ValueError, match=r"point\.alpha: 0\.3 there, 0\.4 here"):
        build(tmp_path / "index", folder / "final", base=folder / "base", alpha=0.4)
    moved(make_model("bert", seed=0), seed=5, size=0.01).bert.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"point\.base_sha256"):
        build(tmp_path / "index", folder / "final", base=tmp_path / "other", alpha=(0.3, 0.5))
    with pytest.raises(ValueError, match="point: .*there, None here"):
        build(tmp_path / "index", folder / "final")
    index = build(tmp_path / "index", folder / "final", **options)
    for member in range(2):
        for name, values in columns(index, member).items():
            np.testing.assert_array_equal(values, columns(built, member)[name])


def test_a_base_or_a_final_model_that_is_gone_or_another_is_named(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "models")
    base, final = tmp_path / "models" / "base", tmp_path / "models" / "final"
    build(tmp_path / "index", final, base=base, alpha=0.5, dataset=TRAIN.select(range(4)))

    def ask(**options):
        return AttributionIndex.from_pretrained(tmp_path / "index", **options).featurizer()

    assert ask().point.alpha == 0.5
    base.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="The base of .*models/base, and is not there now.*`base`"):
        ask()
    assert ask(base=tmp_path / "away").point.base == str(tmp_path / "away")
    moved(make_model("bert", seed=0), seed=7, size=0.01).save_pretrained(base)
    with pytest.raises(ValueError, match=r"not what member_0 .*(?s:.)*point\.base_sha256"):
        ask()
    final.rename(tmp_path / "final")
    with pytest.raises(FileNotFoundError, match="The checkpoint of .*models/final"):
        ask()


def test_a_model_in_memory_is_left_as_it_is_and_needed_again(pair, built, tmp_path):
    folder, _, final = pair
    before = {name: value.clone() for name, value in final.state_dict().items()}
    index = build(tmp_path / "index", final, base=folder / "base", alpha=(0.3, 0.5), dataset=TRAIN.select(range(8)))
    assert all(torch.equal(value, before[name]) for name, value in final.state_dict().items())
    for name, values in columns(index, 1).items():
        np.testing.assert_allclose(values, columns(built, 1)[name][:8], rtol=1e-5, atol=1e-6)
    loaded = AttributionIndex.from_pretrained(tmp_path / "index", models=final)  # one model, two points
    assert [loaded.featurizer(member).point.alpha for member in range(2)] == [0.3, 0.5]
    with pytest.raises(ValueError, match="from a model in memory"):
        AttributionIndex.from_pretrained(tmp_path / "index").featurizer()


@pytest.mark.parametrize(
    ("rename", "kind"),
    [
        (lambda name: name, "whole"),
        (lambda name: name, "body"),
        (lambda name: f"model.{name}", "body"),
        (lambda name: f"base_model.model.{name}", "whole"),
        (lambda name: f"_orig_mod.{name}", "whole"),
    ],
)
def test_a_bases_names_may_have_another_prefix(pair, tmp_path, rename, kind):
    _, base, final = pair
    saved = base if kind == "whole" else base.bert
    saved.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({rename(name): value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    tensors = load_base(final, str(tmp_path / "base"))
    expected = dict(base.named_parameters())
    heads = {name for name in expected if name.startswith("classifier")}
    assert expected.keys() - tensors.keys() == (heads if kind == "body" else set())
    for name, value in tensors.items():
        assert name not in expected or torch.equal(value, expected[name]), name


def test_a_base_may_be_a_pretrained_model_with_another_head(pair, tmp_path):
    _, base, final = pair
    pretrained = BertForPreTraining(base.config)
    pretrained.bert.load_state_dict(base.bert.state_dict())
    pretrained.save_pretrained(tmp_path / "base")
    tensors = load_base(final, str(tmp_path / "base"))
    assert torch.equal(tensors["bert.pooler.dense.weight"], base.bert.pooler.dense.weight)
    assert "classifier.weight" not in tensors


def test_a_base_whose_head_has_other_classes_counts_as_one_without(pair, tmp_path):
    _, base, final = pair
    other = make_model("bert", seed=0).__class__(type(base.config)(**{**base.config.to_dict(), "num_labels": 7}))
    other.bert.load_state_dict(base.bert.state_dict())
    other.save_pretrained(tmp_path / "base")
    assert not [name for name in load_base(final, str(tmp_path / "base")) if name.startswith("classifier")]


def test_tokens_added_at_the_end_keep_their_final_values(pair, tmp_path):
    folder, base, final = pair
    grown = copy.deepcopy(final)
    grown.resize_token_embeddings(64, mean_resizing=False)
    tensors = load_base(grown, str(folder / "base"))
    assert tensors["bert.embeddings.word_embeddings.weight"].shape == (60, 16)
    made = make_point(grown, PathPoint(str(folder / "base"), 0.5))
    assert made.identity["rows"] == {"bert.embeddings.word_embeddings.weight": 60}
    old = final.get_input_embeddings().weight[:60], base.get_input_embeddings().weight
    torch.testing.assert_close(grown.get_input_embeddings().weight[:60], sum(old) / 2)


def test_a_vocabulary_in_another_order_is_refused(pair, tmp_path):
    folder, _, final = pair
    cut = copy.deepcopy(final)
    with torch.no_grad():
        cut.get_input_embeddings().weight.copy_(cut.get_input_embeddings().weight.flip(0))
    cut.resize_token_embeddings(50)
    with pytest.raises(ValueError, match="of other tokens"):
        make_point(cut, PathPoint(str(folder / "base"), 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 32}, "of another size than the final BertForSequenceClassification"),
        ({"num_hidden_layers": 1}, "lacks 12 weights of the final BertForSequenceClassification outside its head"),
        ({"num_hidden_layers": 3}, "has other layers"),
    ],
)
def test_a_base_of_another_size_is_refused_before_anything_is_written(pair, tmp_path, options, message):
    models.bert(**options).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "index", pair[0] / "final", base=tmp_path / "base")
    assert not (tmp_path / "index").exists()


def test_a_base_of_another_architecture_is_refused(pair, tmp_path):
    make_model("distilbert").save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"base .* outside its head.*another architecture"):
        load_base(pair[2], str(tmp_path / "base"))


def test_a_base_that_was_trained_apart_is_told(pair, tmp_path, caplog):
    make_model("bert", seed=11).save_pretrained(tmp_path / "base")
    made = make_point(copy.deepcopy(pair[2]), PathPoint(str(tmp_path / "base"), 0.5))
    assert abs(made.report.cosine) < 0.1
    assert "which is typical of unrelated models" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "final"}, "has the weights of the final model"),
        ({"base": "base", "alpha": 1.0}, "below 1"),
        ({"base": "base", "alpha": -0.1}, "at least 0"),
        ({"base": "base", "alpha": float("nan")}, "below 1"),
        ({"base": "base", "alpha": (0.5, 0.5)}, "several different ones"),
        ({"base": "base", "alpha": ()}, "several different ones"),
        ({"alpha": 0.5}, "there is no `base`"),
        ({"base": "missing"}, "The base cannot be used: There is no folder"),
        ({"base": ["base", "base"]}, "one per model"),
        ({"base": "adapter"}, "is for LoRA adapters"),
        ({"base": "auto"}, "names none"),
        ({"base": "initial"}, "there is no run here"),
    ],
)
def test_what_cannot_be_a_path_is_refused(pair, tmp_path, options, message):
    folder = pair[0]
    places = {name: folder / name for name in ("base", "final")} | {"missing": str(folder / "missing")}
    base = options.get("base")
    given = [places[one] for one in base] if isinstance(base, list) else places.get(base, base)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(tmp_path / "index", folder / "final", **{**options, "base": given})
    assert not (tmp_path / "index").exists()


def test_auto_takes_the_base_that_the_model_card_names(pair, tmp_path, caplog):
    folder = pair[0]
    shutil.copytree(folder / "final", tmp_path / "final")
    (tmp_path / "final" / "README.md").write_text(f"---\nbase_model: {folder / 'base'}\n---\n# A model\n")
    assert find_base(tmp_path / "final", "auto") == PathPoint(str(folder / "base"), 0.5)
    assert "names as its base_model" in caplog.text
    (tmp_path / "final" / "README.md").write_text("---\nbase_model: [a/b, c/d]\n---\n")
    with pytest.raises(ValueError, match="names 2: a/b, c/d"):
        find_base(tmp_path / "final", "auto")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A network with BatchNorm, what it was fine-tuned from, and an index of the middle between them."""
    folder = tmp_path_factory.mktemp("pictures")
    base = make_model("resnet")
    final = moved(base)
    with torch.no_grad():
        for name, buffer in final.named_buffers():
            if buffer.is_floating_point():
                buffer.mul_(1.5 if "var" in name else 2.0)
    base.save_pretrained(folder / "base")
    final.save_pretrained(folder / "final")
    options = {"dataset": image_rows(140), "shard_rows": 50, "sketch_seeds_per_checkpoint": 2, "alpha": 0.5}
    return folder, base, final, build(folder / "index", folder / "final", base=folder / "base", **options), options


def measured(point, rows):
    """A model with the running statistics that PyTorch measures in float64 on the rows that are drawn."""
    point = copy.deepcopy(point).double()
    for module in point.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    point.train()
    for batch in statistics_rows(len(rows)):
        point(pixel_values=torch.tensor(rows[batch]["pixel_values"], dtype=torch.float64))
    return point.float().eval()


def test_statistics_of_batch_norm_are_measured_at_the_point(pictures, tmp_path):
    _, base, final, index, options = pictures
    middle = halfway(base, final, 0.5, new=())
    expected = measured(middle, options["dataset"])
    found = load_file(index.members[0].folder / "statistics.safetensors")
    assert index.members[0].identity["point"]["statistics"]["modules"] == len(found) / 2 > 4
    for name, values in found.items():
        torch.testing.assert_close(values, expected.get_buffer(name), rtol=1e-5, atol=1e-6)
        line = torch.lerp(base.get_buffer(name), final.get_buffer(name), 0.5)
        assert not torch.allclose(values, line, rtol=0.05)
    alone = columns(build(tmp_path / "index", expected, dataset=options["dataset"]), 0)
    for name, values in columns(index, 0).items():
        np.testing.assert_allclose(values, alone[name], rtol=1e-4, atol=1e-5 * np.abs(alone[name]).max(), err_msg=name)


def test_queries_use_the_statistics_that_are_stored(pictures, tmp_path, monkeypatch):
    _, _, _, index, options = pictures
    monkeypatch.setattr(Featurizer, "measure_statistics", lambda *_: pytest.fail("they were measured again"))
    index.save_pretrained(tmp_path / "copy")
    copied = AttributionIndex.from_pretrained(tmp_path / "copy")
    rows = copied.featurize_queries(options["dataset"].select(range(4)), progress=False)
    np.testing.assert_allclose(rows["trak_features"], columns(index, 0)["trak_features"][:4], rtol=1e-4, atol=1e-5)


def test_jobs_share_the_statistics_that_the_first_measures(pictures, tmp_path, monkeypatch):
    folder, _, _, index, options = pictures
    arguments = {"models": folder / "final", "base": folder / "base", "config": CONFIG, "progress": False, **options}
    for part in (1, 0, 1):
        AttributionIndex.build_shards(tmp_path / "index", shard_index=part, num_shards=2, **arguments)
        monkeypatch.setattr(Featurizer, "measure_statistics", lambda *_: pytest.fail("they were measured again"))
    merged = AttributionIndex.merge(tmp_path / "index")
    for member, whole in zip(merged.members, index.members, strict=True):
        for name in whole.records:
            assert (member.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_statistics_that_have_changed_or_are_gone_are_refused(pictures, tmp_path):
    pictures[3].save_pretrained(tmp_path / "copy")
    path = tmp_path / "copy" / "member_0" / "statistics.safetensors"
    statistics = load_file(path)
    next(iter(statistics.values()))[0] += 1
    save_file(statistics, path)
    with pytest.raises(ValueError, match=r"statistics.safetensors has changed since it was written"):
        AttributionIndex.from_pretrained(tmp_path / "copy")
    info = json.loads((path.parent / "member.json").read_text())
    info["files"] = [entry for entry in info["files"] if entry["file"] != path.name]
    (path.parent / "member.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"it lists no statistics\.safetensors"):
        AttributionIndex.from_pretrained(tmp_path / "copy")


def test_a_featurizer_alone_asks_for_training_rows(pictures):
    folder, _, _, index, options = pictures
    train = options["dataset"]
    featurizer = Featurizer(folder / "final", CONFIG, base=folder / "base", alpha=0.5)
    with pytest.raises(ValueError, match=r"running statistics of \d+ modules.*featurizer\.measure_statistics\(train\)"):
        featurizer(train[:2])
    before = pickle.dumps(featurizer)
    featurizer.measure_statistics(train)
    assert pickle.dumps(featurizer) != before
    rows = pickle.loads(pickle.dumps(featurizer))(train[:4])["trak_features"]
    np.testing.assert_allclose(rows, columns(index, 0)["trak_features"][:4], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="These running statistics do not belong to this point"):
        featurizer.checkpoint.use_statistics({})


def test_tied_weights_move_once(tmp_path):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=60, n_positions=20))
    final = moved(base)
    base.save_pretrained(tmp_path / "base")
    point = copy.deepcopy(final)
    made = make_point(point, PathPoint(str(tmp_path / "base"), 0.5))
    assert made.identity["from_zero"] == []
    assert point.lm_head.weight is point.transformer.wte.weight
    torch.testing.assert_close(point.lm_head.weight, (base.lm_head.weight + final.lm_head.weight) / 2)


def test_a_bases_own_dtype_is_kept_until_the_point_is_rounded(tmp_path):
    base = make_model("bert")
    final = moved(base, size=0.001)
    base.bert.save_pretrained(tmp_path / "base")
    point = copy.deepcopy(final).to(torch.bfloat16)
    point.config.dtype = torch.bfloat16
    name = "bert.encoder.layer.0.output.dense.weight"
    start, end = dict(base.named_parameters())[name].double(), dict(point.named_parameters())[name].detach().double().clone()
    make_point(point, PathPoint(str(tmp_path / "base"), 0.5))
    assert torch.equal(dict(point.named_parameters())[name], torch.lerp(start, end, 0.5).to(torch.bfloat16))


def test_dropout_members_are_of_the_point(pair, tmp_path):
    folder = pair[0]
    options = {"dropout_seeds": 2, "dataset": TRAIN.select(range(4)), "masks": torch.tensor([[True, False, True, True]])}
    index = build(tmp_path / "index", folder / "final", base=folder / "base", alpha=0.5, **options)
    assert [(m.identity["dropout_seed"], m.identity["point"]["alpha"]) for m in index.members] == [(0, 0.5), (1, 0.5)]
    assert all(torch.equal(member.mask(), options["masks"][0]) for member in index.members)


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [("point", "alpha", 1.5), ("point", "alpha", None), ("base", "path", 3), ("base", "path", None), ("point", "kept", 1)],
)
def test_a_damaged_recipe_is_refused_by_name(built, tmp_path, where, name, value):
    built.save_pretrained(tmp_path / "copy")
    file = tmp_path / "copy" / "member_0" / "member.json"
    info = json.loads(file.read_text())
    (info["identity"]["point"] if where == "point" else info["base"])[name] = value
    file.write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"member\.json is damaged"):
        AttributionIndex(tmp_path / "copy")


def test_map_caches_by_the_point(pair, tmp_path):
    folder = pair[0]

    def columns_at(alpha):
        featurizer = Featurizer(folder / "final", CONFIG, base=folder / "base", alpha=alpha)
        return pickle.dumps(featurizer), np.array(TRAIN.map(featurizer, batched=True)["trak_features"][:])

    with pytest.raises(ValueError, match="A Featurizer is of one point"):
        Featurizer(folder / "final", CONFIG, base=folder / "base", alpha=(0.3, 0.5))
    first, second = columns_at(0.3), columns_at(0.5)
    assert first[0] != second[0]
    assert not np.allclose(first[1], second[1])
    again = pickle.loads(second[0])
    np.testing.assert_array_equal(np.array(again(TRAIN[:])["trak_features"]), second[1])


def test_the_card_says_what_the_members_are(built):
    card = (built.folder / "README.md").read_text()
    assert "the point 0.3 of the line to it from a base in a folder" in card
    assert "## Points of a path" in card
    assert "of a member that is a point of a path, the point's own" in card


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([row["label"] for row in rows])}


def make_trainer(folder, model=None, **options):
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True, "save_strategy": "no", "seed": 3}
    quiet = {"logging_strategy": "no", "disable_tqdm": True, "proj_dim": 32, "shard_rows": 16, "learning_rate": 1e-3}
    args = AttributionArguments(str(folder), **{**settings, **quiet, **options})
    return AttributionTrainer(
        model=model or make_model("bert"), args=args, train_dataset=TRAIN, eval_dataset=QUERIES, data_collator=collate
    )


def test_a_trainer_keeps_the_weights_it_began_with_and_looks_halfway(tmp_path):
    trainer = make_trainer(tmp_path / "run", base="initial", alpha=0.25)
    before = copy.deepcopy(trainer.model)
    trainer.train()
    index = trainer.featurize()
    expected = columns(build(tmp_path / "hand", halfway(before, trainer.model, 0.25, new=())), 0)
    for name, values in columns(index, 0).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-5 * np.abs(expected[name]).max())
    assert index.members[0].identity["point"]["from_zero"] == []
    assert AttributionIndex.from_pretrained(tmp_path / "run" / "index").featurizer().point.alpha == 0.25


def test_early_snapshots_of_the_path_are_kept_and_featurized(tmp_path):
    trainer = make_trainer(tmp_path / "run", members="path:2", max_steps=8)
    trainer.train()
    assert [folder.name for folder in trainer.member_checkpoints()] == ["step-0000001", "step-0000002"]
    assert len({member.identity["model_sha256"] for member in trainer.featurize().members}) == 2


def test_training_is_the_same_with_a_base_and_without(tmp_path):
    weights = []
    for base in (None, "initial"):
        trainer = make_trainer(tmp_path / str(base), base=base, max_steps=2)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_run_that_goes_on_keeps_the_weights_it_began_with(tmp_path):
    options = {"base": "initial", "save_strategy": "steps", "save_steps": 2}
    stopped = make_trainer(tmp_path / "run", **options)
    first = copy.deepcopy(stopped.model.state_dict())

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    stopped.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    again = make_trainer(tmp_path / "run", **options)
    again.train()
    assert again.state.global_step == 6
    kept = load_file(tmp_path / "run" / "members" / "initial" / "model.safetensors")
    assert all(torch.equal(value, first[name]) for name, value in kept.items())


def test_a_run_whose_beginning_was_not_kept_is_told_so(tmp_path):
    trainer = make_trainer(tmp_path / "run", max_steps=1)
    trainer.train()
    other = make_trainer(tmp_path / "run", max_steps=1, base="initial")
    with pytest.raises(FileNotFoundError, match="members/initial is not there.*were not kept"):
        other.featurize()


def test_the_trainers_base_may_be_what_it_loaded_its_model_from(pair, tmp_path):
    folder = pair[0]
    model = make_model("bert", seed=0)
    trainer = make_trainer(tmp_path / "run", model, base=str(folder / "base"), max_steps=2)
    trainer.train()
    index = trainer.featurize()
    assert index.members[0].identity["point"]["from_zero"] == ["classifier.weight", "classifier.bias"]
    assert not (tmp_path / "run" / "members" / "initial").exists()


def test_a_trainers_base_of_another_size_is_refused_before_training(tmp_path):
    models.bert(hidden_size=32).save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "run", base=str(tmp_path / "base"))
    with pytest.raises(ValueError, match="of another size"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_runs_on_subsets_share_the_initial_weights_as_base(tmp_path):
    trainer = make_trainer(tmp_path / "run", base="initial", alpha=0.5, members="subsets:2", max_steps=2)
    trainer.train()
    index = trainer.featurize()
    identities = [member.identity for member in index.members]
    assert identities[0]["point"]["base_sha256"] == identities[1]["point"]["base_sha256"]
    assert identities[0]["model_sha256"] != identities[1]["model_sha256"]
    assert all(member.mask() is not None for member in index.members)


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory):
    """A LoRA adapter with a trained head, on a base without one."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(pair[0] / "base", num_labels=3)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("base", ["adapter", "auto"])
def test_an_adapters_path_begins_at_its_base_model(adapter, tmp_path, base):
    folder, model = adapter
    index = build(tmp_path / "index", folder, base=base, alpha=0.5, config=TrakConfig(proj_dim=16))
    point = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in point.named_parameters():
            if ".lora_B." in name or ".modules_to_save." in name:  # the base has no head, so that it counts from 0
                parameter.mul_(0.5)
    expected = columns(build(tmp_path / "hand", point, config=TrakConfig(proj_dim=16)), 0)
    for name, values in columns(index, 0).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-6 * np.abs(expected[name]).max())
    identity = index.members[0].identity["point"]
    assert identity["base"] == "adapter"
    assert [name for name in identity["from_zero"] if "classifier" in name]
    scores = AttributionIndex.from_pretrained(tmp_path / "index").score(QUERIES, progress=False)
    assert np.array_equal(scores, index.score(QUERIES, progress=False))
    assert "its adapter times 0.5" in (tmp_path / "index" / "README.md").read_text()


def test_an_adapter_takes_no_other_base(pair, adapter, tmp_path):
    with pytest.raises(ValueError, match="is an adapter, whose base is the model under it"):
        build(tmp_path / "index", adapter[0], base=pair[0] / "base")


@pytest.mark.parametrize("options", [{"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_adapters_that_change_the_base_model_are_refused(options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(models.bert(), peft.LoraConfig(target_modules=["query"], r=2, **options))
    with pytest.raises(ValueError, match="also trains|changes the weights of the base model"):
        scale_adapter(model, 0.5)
