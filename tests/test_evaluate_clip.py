"""scripts/evaluate_clip.py from end to end on tiny pictures: projections on frozen towers, and a whole CLIP."""

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_evaluation import GroundTruth, Removals, Workspace, all_scores, ensembles
from clip_training import ContrastiveArguments
from models import VOCAB_SIZE
from pairs_for_tests import make_processor, pair_rows, save_dual_encoder
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from hf_trak import AttributionIndex

SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate_clip.py"
SIZES = {
    "epochs": 2, "batch_size": 12, "n_members": 2, "n_checkpoints": 2, "proj_dim": 32, "bank_size": 8, "n_subsets": 3,
    "n_targets": 2, "top_k": 6, "n_seeds": 2, "featurize_batch_size": 8,
}  # fmt: skip
ENSEMBLES = ["TRAK, 2 half-subset members", "TRAK, 2 half-subset members, ensemble 2"]
MEAN = "TRAK, 2 half-subset members, mean of 2 ensembles"
OTHERS = ["TracIn, 2 checkpoints", "similarity of images", "similarity of captions", "similarity, mean of both", "random"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate_clip", SCRIPT)
    module = sys.modules["evaluate_clip"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 pairs and 6 held-out ones, once as files of their own and once as the splits of a folder; and tiny models."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "splits").mkdir()
    for name, rows in (("train", pair_rows(24, captions=2)), ("validation", pair_rows(6, start=40, captions=2))):
        rows = rows.rename_columns({"image": "photo", "caption": "sentences"})
        rows.to_parquet(str(folder / "splits" / f"{name}.parquet"))
    save_dual_encoder(folder / "clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=8, patch_size=4)).save_pretrained(folder / "vision")
    BertModel(BertConfig(**sizes, vocab_size=VOCAB_SIZE, intermediate_size=8)).save_pretrained(folder / "text")
    make_processor().tokenizer.save_pretrained(folder / "text")
    return folder


def parse(script, folder, output, scale, **more):
    flags = {**SIZES, "data": folder / "splits", "image_column": "photo", "caption_column": "sentences", "output": output}
    if scale == "small":
        flags |= {"vision": folder / "vision", "text": folder / "text", "image_size": 8, "dim": 8}
        flags |= {"train_files": "train.parquet", "query_files": "validation.parquet"}
    else:
        flags |= {"model": folder / "clip", "n_workers": 0}
    arguments = [part for key, value in (flags | more).items() for part in (f"--{key}", str(value))]
    return script.parse_arguments(["--scale", scale, *arguments])


@pytest.fixture(scope="module", params=["small", pytest.param("paper", marks=pytest.mark.slow)])
def run(request, script, folder, tmp_path_factory):
    """Both scales, run to the end: one by two shards, the other by one process."""
    output = tmp_path_factory.mktemp(request.param)
    shards = [(1, 2), (0, 2), (1, 2)] if request.param == "small" else [(0, 1)]
    for number, n_shards in shards:
        assert not (output / "results.json").exists()
        script.main(*parse(script, folder, output, request.param, shard_index=number, num_shards=n_shards, threads=1))
    return parse(script, folder, output, request.param)[0], json.loads((output / "results.json").read_text())["rows"]


def test_every_method_is_measured_and_the_ensembles_on_average(run):
    args, rows = run
    found = {(row["metric"], row["method"]): row for row in rows}
    methods = {*ENSEMBLES, MEAN, *OTHERS}
    assert {method for metric, method in found if metric == "lds"} == {*methods, "TRAK, 1 checkpoint"}
    assert {method for metric, method in found if metric == "counterfactual_delta"} == methods
    assert all(np.isfinite(row["value"]) and row["case"] for row in rows)
    assert {row["metric"] for row in rows} == {"lds", "lds_ceiling", "counterfactual_delta", "recall_at_1"}
    for metric in ("lds", "counterfactual_delta"):
        both = [found[metric, name]["value"] for name in ENSEMBLES]
        assert found[metric, MEAN]["value"] == pytest.approx(np.mean(both))
        assert both[0] != both[1]
        low, high = found[metric, MEAN]["interval"]
        assert low <= found[metric, MEAN]["value"] <= high
    assert (Path(args.output) / "plots" / "counterfactual_delta.png").stat().st_size > 0


def test_the_same_call_again_trains_nothing_and_other_settings_are_refused(run, script, folder, monkeypatch, capsys):
    args, rows = run
    scale = "small" if args.model is None else "paper"
    for kind in ("Projections", "WholeEncoder"):
        monkeypatch.setattr(f"clip_training.{kind}.train", lambda *_, **__: pytest.fail("trained again"))
    script.main(*parse(script, folder, args.output, scale))
    assert json.loads((Path(args.output) / "results.json").read_text())["rows"] == rows
    with pytest.raises(ValueError, match=r"epochs: 2 here, 3 there|was begun with other settings"):
        script.main(*parse(script, folder, args.output, scale, epochs=3))


def test_what_is_reported_is_what_a_training_run_gives(run):
    """A run of the ground truth, and a removal, done again by hand."""
    args, _ = run
    space = Workspace(args)
    truth = GroundTruth(space)
    model = space.trained.train(truth.masks[2], 102)[-1]
    np.testing.assert_allclose(truth.outputs()[1, 2], space.outputs(model), rtol=1e-5)
    removals = Removals(space, all_scores(space))
    removal = next(r for r in removals.plan.removals if r.method == ENSEMBLES[1] and r.seed == 1)
    mask = space.everything.copy()
    mask[np.argsort(-all_scores(space)[ENSEMBLES[1]][:, removal.target], kind="stable")[:6]] = False
    stored = json.loads((removals.folder / removal.file_name).read_text())["outputs"]
    np.testing.assert_allclose(stored, space.cosines(space.trained.train(mask, 1)[-1]), rtol=1e-5, atol=1e-6)
    assert space.trained.train(mask, 1, keep=2)[-1].state_dict().keys() == model.state_dict().keys()


def test_what_is_kept_on_the_way_does_not_change_the_end(run):
    space = Workspace(run[0])
    alone = space.trained.train(space.everything, 5)[-1].state_dict()
    first, last = (model.state_dict() for model in space.trained.train(space.everything, 5, keep=2))
    assert all(torch.equal(alone[name], last[name]) for name in alone)
    assert any(not torch.equal(first[name], last[name]) for name in alone)
    other = space.trained.train(space.everything, 6)[-1].state_dict()
    trained = [name for name in alone if not torch.equal(first[name], last[name])]
    assert all(not torch.equal(alone[name], other[name]) for name in trained)


def test_features_cover_exactly_what_is_trained_and_ensembles_share_no_sketch(run):
    space = Workspace(run[0])
    first, last = (model.state_dict() for model in space.trained.train(space.everything, 5, keep=2))
    trained = {name for name in first if not torch.equal(first[name], last[name])}
    assert len(trained) > (30 if run[0].model else 2)
    for ensemble in ensembles(space):
        index = AttributionIndex.from_pretrained(space.folder / f"ensemble_{ensemble.number + 1}")
        seeds = [member.identity["seed"] for member in index.members]
        assert seeds == [1000 * ensemble.number, 1000 * ensemble.number + 1]
        assert set(index.members[0].identity["parameters"]) == trained


def test_ensembles_share_no_half_run_or_sketch(run):
    space = Workspace(run[0])
    first, second = ensembles(space)
    truth = GroundTruth(space).masks
    halves = [mask.tobytes() for mask in (*first.masks, *second.masks, *truth)]
    assert len(set(halves)) == len(halves)
    seeds = [ensemble.seed(member) for ensemble in (first, second) for member in range(2)]
    assert len(set(seeds)) == 4


# Arguments and data.


def test_the_paper_scale_is_the_papers_and_the_default(script):
    published = {"epochs": 100, "batch_size": 600, "learning_rate": 1e-3, "weight_decay": 0.1, "momentum": 0.9}
    flags = ["--output", "o", "--data", "coco", "--model", "clip"]
    by_default, by_name = (script.parse_arguments([*scale, *flags])[0] for scale in ([], ["--scale", "paper"]))
    assert by_default == by_name
    assert published.items() <= asdict(by_name).items()
    assert by_name.from_scratch
    small = script.parse_arguments(["--scale", "small", "--output", "o", "--vision", "v", "--text", "t"])[0]
    assert (small.epochs, small.batch_size, small.n_members, small.proj_dim, small.top_k) == (30, 250, 20, 2048, [20, 80, 200])
    with pytest.raises(SystemExit, match="--scale must be one of small, paper, but is 'large'"):
        script.parse_arguments(["--scale", "large", *flags])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give --model, a dual encoder to train as a whole, or both --vision and --text"),
        ({"vision": "v"}, "or both --vision and --text"),
        ({"model": "m", "vision": "v", "text": "t"}, "Give --model"),
        ({"model": "m", "train_files": ["a"]}, "or neither"),
        ({"model": "m", "shard_index": 2, "num_shards": 2}, "must lie in 0 to 1, but is 2"),
        ({"model": "m", "epochs": 3}, "`n_checkpoints` must lie in 1 to 3"),
        ({"model": "m", "n_members": 1001}, "1 to 1000 members"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveArguments("out", "data", **options)


def test_data_that_cannot_serve_is_named(script, folder, tmp_path):
    def begin(scale, **more):
        Workspace(parse(script, folder, tmp_path / "-".join(map(str, more.values())).replace("/", "-"), scale, **more)[0])

    with pytest.raises(ValueError, match="has no column picture; it has photo, sentences, license"):
        begin("paper", image_column="picture")
    with pytest.raises(ValueError, match=r"30 pairs are wanted of train, but there are 24"):
        begin("paper", n_train=30)
    with pytest.raises(FileNotFoundError, match=r"There is no file .*gone.parquet"):
        begin("small", query_files="gone.parquet")
    with pytest.raises(ValueError, match=r"--model must be a dual encoder such as CLIP, but .*text is BertModel"):
        begin("paper", model=folder / "text")
