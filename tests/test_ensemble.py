"""An index of many members: built in one pass each, resumed, and scored as one."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets_for_tests import save_model, token_rows
from models import make_model
from reference import corrected_scores, gradient_loop, scaled_scores, trak_scores
from transformers import AutoModelForSequenceClassification

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.linalg import DEFAULT_DAMPING, LARGE_ENSEMBLE, default_damping
from hf_trak.projectors import make_projector
from hf_trak.storage.reader import MemberReader
from hf_trak.storage.writer import MemberWriter

CONFIG = TrakConfig(proj_dim=32)
TRAIN, QUERIES = token_rows(50), token_rows(6, seed=1)


def build(folder, models, **options):
    options = {"dataset": TRAIN, "config": CONFIG, "shard_rows": 16, "progress": False, **options}
    return AttributionIndex.build(folder, models=models, **options)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return [save_model(tmp_path_factory.mktemp("models") / f"bert-{seed}", seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def built(tmp_path_factory, checkpoints):
    return build(tmp_path_factory.mktemp("many") / "index", checkpoints, sketch_seeds_per_checkpoint=2)


def columns_of(index):
    """Return each member's features and out-to-loss, and those of the queries."""
    rows = []
    for number, member in enumerate(index.members):
        shards = list(member.shards())
        queries = index.featurize_queries(QUERIES, number, progress=False)["trak_features"]
        values = (torch.cat([getattr(shard, name) for shard in shards]).numpy() for name in ("features", "out_to_loss"))
        rows.append((*values, queries))
    features, out_to_loss, queries = zip(*rows, strict=True)
    return features, queries, out_to_loss


def files_of(member):
    return {path.name: path.read_bytes() for path in member.folder.iterdir()}


def test_one_pass_for_several_sketches_makes_the_bytes_of_separate_passes(built, checkpoints, tmp_path):
    """But for the checkpoint's path, which is as seen from each index, and for whose rows a file says that it holds."""
    for number, (checkpoint, seed) in enumerate([(0, 0), (0, 1), (1, 2), (1, 3)]):
        alone = build(tmp_path / str(seed), checkpoints[checkpoint], config=TrakConfig(proj_dim=32, sketch_seed=seed))
        found, expected = files_of(built.members[number]), files_of(alone.members[0])
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"member.json"}:
            if name.endswith(".parquet"):
                found[name], expected[name] = (
                    pq.read_table(io.BytesIO(content)).replace_schema_metadata() for content in (found[name], expected[name])
                )
            assert found[name] == expected[name], (number, name)


def test_gradients_are_computed_once_per_checkpoint(checkpoints, tmp_path, monkeypatch):
    rows, compute = [], Featurizer.compute
    monkeypatch.setattr(Featurizer, "compute", lambda self, batch, ids: rows.append(len(ids)) or compute(self, batch, ids))
    index = build(tmp_path / "index", checkpoints, sketch_seeds_per_checkpoint=3)
    assert len(index.members) == 6
    assert sum(rows) == 2 * len(TRAIN)
    rows.clear()
    index.score(QUERIES, progress=False)
    assert sum(rows) == 2 * len(QUERIES)


def test_scores_of_many_members_are_the_product_of_two_means(built):
    expected = trak_scores(*columns_of(built), DEFAULT_DAMPING)
    scores = built.score(QUERIES, out_to_loss_power=1, combination="means", progress=False)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores, expected, rtol=2e-6, atol=1e-7 * np.abs(expected).max())


def test_the_published_preset_is_the_papers_formula(checkpoints, tmp_path):
    """From gradients to scores in float64: signs, Gram matrices without damping, the product of two means."""
    train, config = TRAIN.select(range(14)), TrakConfig.published(proj_dim=6)
    built = build(tmp_path / "index", checkpoints, dataset=train, config=config)
    influence, out_to_loss = 0.0, 0.0
    for seed, model in enumerate(map(AutoModelForSequenceClassification.from_pretrained, checkpoints)):
        featurizer = Featurizer(model, config)
        names, projector = list(dict(model.named_parameters())), make_projector("dense_rademacher", proj_dim=6, seed=seed)

        def sketch(row, model=model, task=featurizer.task, names=names, projector=projector):
            batch = {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["label"]])}
            _, out_to_loss, grads = gradient_loop(model, batch, task.output_function, names)
            total = projector.start(1, dtype=torch.float64, device=torch.device("cpu"))
            for name, part in zip(names, grads.split([p.numel() for p in model.parameters()], dim=1), strict=True):
                projector.add(total, name, part.reshape(1, *model.get_parameter(name).shape))
            return projector.finish(total)[0].numpy(), out_to_loss.item()

        features, weights = (np.array(values) for values in zip(*map(sketch, train), strict=True))
        asked = np.array([sketch(row)[0] for row in QUERIES])
        influence = influence + features @ np.linalg.inv(features.T @ features) @ asked.T / 2
        out_to_loss = out_to_loss + weights / 2
    expected = influence * out_to_loss[:, None]
    for index in (built, AttributionIndex.from_pretrained(built.folder)):
        scores = index.score(QUERIES, progress=False)
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert not np.allclose(expected, built.score(QUERIES, out_to_loss_power=0.5, progress=False), rtol=0.05)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_members_are_of_one_size_and_weighed_by_their_own_out_to_loss(built, power):
    expected = scaled_scores(*columns_of(built), DEFAULT_DAMPING, power)
    scores = built.score(QUERIES, out_to_loss_power=power, progress=False)
    np.testing.assert_allclose(scores, expected, rtol=2e-6, atol=1e-6 * np.abs(expected).max())
    hits = built.attribute(QUERIES, top_k=3, out_to_loss_power=power, progress=False)
    np.testing.assert_allclose(np.array(hits["proponent_scores"]), np.sort(expected, axis=0)[::-1][:3].T, rtol=1e-5)
    assert not np.allclose(
        scores, built.score(QUERIES, out_to_loss_power=power, combination="means", progress=False), rtol=1e-2
    )


def test_one_member_is_the_same_by_either_combination(checkpoints, tmp_path):
    index = build(tmp_path / "index", checkpoints[0])
    scaled, means = (index.score(QUERIES, combination=kind, progress=False) for kind in ("scaled", "means"))
    np.testing.assert_allclose(scaled, means, rtol=1e-6)


def test_an_unknown_combination_is_refused(built):
    with pytest.raises(ValueError, match="`combination` must be 'scaled' or 'means', but is 'sum'"):
        built.score(QUERIES, combination="sum", progress=False)


@pytest.mark.parametrize(("residual_weighting", "leverage"), [(True, False), (False, True), (True, True)])
def test_corrections_are_those_of_the_equation(built, residual_weighting, leverage):
    options = {"residual_weighting": residual_weighting, "leverage": leverage, "combination": "means"}
    expected = corrected_scores(*columns_of(built), 0.5, residual_weighting=residual_weighting, leverage=leverage)
    scores = built.score(QUERIES, damping=0.5, out_to_loss_power=1, progress=False, **options)
    np.testing.assert_allclose(scores, expected, rtol=5e-6, atol=1e-6 * np.abs(expected).max())
    plain = built.score(QUERIES, damping=0.5, out_to_loss_power=1, combination="means", progress=False)
    assert not np.allclose(scores, plain, rtol=1e-3)


def test_residual_weighting_is_refused_where_there_is_no_class_probability(tmp_path):
    model = make_model("bert")
    model.config.num_labels = 1
    model.classifier = torch.nn.Linear(16, 1)
    rows = token_rows(20)
    index = build(tmp_path / "index", model, dataset=rows, config=TrakConfig(proj_dim=8, task="text-regression"))
    with pytest.raises(ValueError, match="needs the probability of one label, but these are features of text-regression"):
        index.score(rows, residual_weighting=True, progress=False)


@pytest.mark.parametrize("keep", [1, 7, 50, 60])
def test_a_soft_threshold_leaves_so_many_scores_and_attribute_agrees(built, keep):
    plain = built.score(QUERIES, progress=False).astype(np.float64)
    sparse = built.score(QUERIES, soft_threshold=keep, progress=False)
    assert ((sparse != 0).sum(0) == min(keep, 50)).all()
    for query in range(len(QUERIES)):
        sizes = np.sort(np.abs(plain[:, query]))[::-1]
        threshold = sizes[keep] if keep < 50 else 0
        expected = np.sign(plain[:, query]) * np.maximum(np.abs(plain[:, query]) - threshold, 0)
        np.testing.assert_allclose(sparse[:, query], expected, atol=1e-6 * sizes[0])
    hits = built.attribute(QUERIES, top_k=5, soft_threshold=keep, progress=False)
    for query, hit in enumerate(hits):
        for rows, scores in ((hit["proponents"], hit["proponent_scores"]), (hit["opponents"], hit["opponent_scores"])):
            assert len(rows) == 5
            np.testing.assert_allclose(scores, sparse[rows, query], atol=1e-6 * np.abs(plain).max())


def test_a_soft_threshold_in_pieces_is_the_same(built, monkeypatch):
    expected = built.score(QUERIES, soft_threshold=5, progress=False)
    monkeypatch.setattr("hf_trak.scoring.scorer._IN_MEMORY_BYTES", 4 * 50 * 2)
    assert np.array_equal(built.score(QUERIES, soft_threshold=5, progress=False), expected)
    with pytest.raises(ValueError, match="`soft_threshold` is the number of scores per query to keep, at least 1, but is 0"):
        built.score(QUERIES, soft_threshold=0, progress=False)


def test_identical_members_average_to_one(checkpoints, tmp_path):
    """Two equal checkpoints under the identity, which has no sketch of its own."""
    config = TrakConfig(proj_dim=51, projector="identity", parameters=("^classifier",))
    one = build(tmp_path / "one", checkpoints[0], config=config)
    two = build(tmp_path / "two", [checkpoints[0]] * 2, config=config)
    assert two.n_checkpoints == 2
    np.testing.assert_allclose(two.score(QUERIES, progress=False), one.score(QUERIES, progress=False), rtol=1e-6)


def test_a_dropout_member_featurizes_queries_with_its_own_units_dropped(checkpoints, tmp_path):
    index = build(tmp_path / "index", checkpoints, dropout_seeds=2)
    assert [member.identity["dropout_seed"] for member in index.members] == [0, 1, 2, 3]
    assert [plan.checkpoint for plan in index.passes] == [0, 0, 1, 1]
    for number, member in enumerate(index.members):
        queries = index.featurize_queries(TRAIN, number, progress=False)["trak_features"]
        stored = torch.cat([shard.features for shard in member.shards()]).numpy()
        np.testing.assert_allclose(queries, stored, atol=2e-6 * np.abs(stored).max())
    assert "4, of 2 checkpoints, with 4 dropout masks" in (index.folder / "README.md").read_text()
    expected = index.score(QUERIES, progress=False)
    loaded = AttributionIndex.from_pretrained(index.folder, models=[str(c) for c in checkpoints])
    assert np.array_equal(loaded.score(QUERIES, progress=False), expected)


def test_models_are_given_per_checkpoint_or_per_member(built, checkpoints):
    expected = built.score(QUERIES, progress=False)
    for models in (checkpoints, [checkpoints[0], checkpoints[0], checkpoints[1], checkpoints[1]]):
        again = AttributionIndex.from_pretrained(built.folder, models=models)
        assert np.array_equal(again.score(QUERIES, progress=False), expected)
    with pytest.raises(ValueError, match="2 checkpoints and 4 members, but 3 models were given. Give one per checkpoint"):
        AttributionIndex.from_pretrained(built.folder, models=[checkpoints[0]] * 3)


def test_a_killed_pass_computes_only_what_a_member_lacks_and_ends_in_the_same_bytes(built, checkpoints, tmp_path, monkeypatch):
    """Stopped between the two members' files of one shard, and after a member was finished before the other."""

    class KilledError(Exception):
        pass

    folder, writes = tmp_path / "index", []
    write, finish = MemberWriter.write, MemberWriter.finish

    def dying_write(self, shard, columns):
        if len(writes) == 3:
            raise KilledError
        writes.append((self.folder.name, shard))
        write(self, shard, columns)

    monkeypatch.setattr(MemberWriter, "write", dying_write)
    with pytest.raises(KilledError):
        build(folder, checkpoints[0], sketch_seeds_per_checkpoint=2)
    assert writes == [("member_0", 0), ("member_1", 0), ("member_0", 1)]

    def dying_finish(self, *args):
        finish(self, *args)
        raise KilledError

    monkeypatch.setattr(
        MemberWriter, "write", lambda self, *args: writes.append((self.folder.name, args[0])) or write(self, *args)
    )
    monkeypatch.setattr(MemberWriter, "finish", dying_finish)
    with pytest.raises(KilledError):
        build(folder, checkpoints[0], sketch_seeds_per_checkpoint=2)
    assert sorted(writes) == [(f"member_{m}", s) for m in range(2) for s in range(4)], "each was written once"
    monkeypatch.setattr(MemberWriter, "finish", finish)
    monkeypatch.setattr(Featurizer, "compute", lambda *_: pytest.fail("computed again"))
    index = build(folder, checkpoints[0], sketch_seeds_per_checkpoint=2)
    for number in range(2):
        found, expected = files_of(index.members[number]), files_of(built.members[number])
        assert all(found[name] == expected[name] for name in expected if name != "member.json")


def test_masks_are_recorded_and_read_again(checkpoints, tmp_path):
    masks = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    index = build(tmp_path / "index", checkpoints, masks=masks, sketch_seeds_per_checkpoint=2)
    index.save_pretrained(tmp_path / "copy")
    for number, member in enumerate(AttributionIndex(tmp_path / "copy", models=checkpoints).members):
        assert torch.equal(member.mask(), masks[number // 2])
        member.verify()
    with pytest.raises(
        ValueError, match=r"`masks` must be boolean of shape .*here \(2, 50\), but are torch.float32 of shape \(2, 50\)"
    ):
        build(tmp_path / "other", checkpoints, masks=masks.float())


def test_an_index_from_before_there_were_several_members_to_a_checkpoint_is_read(checkpoints, tmp_path):
    index = build(tmp_path / "index", checkpoints)
    expected = index.score(QUERIES, progress=False)
    for member in index.members:
        info = json.loads((member.folder / "member.json").read_text())
        del info["checkpoint_number"]
        (member.folder / "member.json").write_text(json.dumps(info))
    old = AttributionIndex.from_pretrained(index.folder)
    assert np.array_equal(old.score(QUERIES, progress=False), expected)
    assert MemberReader(index.folder / "member_0").mask() is None


def test_the_default_damping_falls_from_ten_checkpoints_on():
    assert [default_damping(n) for n in (1, LARGE_ENSEMBLE - 1, LARGE_ENSEMBLE)] == [3.0, 3.0, 1.0]
