"""`AttributionIndex.estimate` and `--dry-run`: what a build would take."""

import pytest
from datasets_for_tests import save_model, token_rows

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.building.estimate import spell_bytes, spell_seconds
from hf_trak.cli.main import main

CONFIG = TrakConfig(proj_dim=64)


def test_disk_members_and_engine_are_those_of_the_build(tmp_path):
    options = {
        "models": save_model(tmp_path / "model"),
        "dataset": token_rows(50),
        "config": CONFIG,
        "sketch_seeds_per_checkpoint": 2,
    }
    found = AttributionIndex.estimate(**options)
    assert not (tmp_path / "index").exists()
    index = AttributionIndex.build(tmp_path / "index", progress=False, **options)
    assert (
        (found.n_rows, found.n_members, found.n_passes) == (index.n_rows, len(index.members), len(index.passes)) == (50, 2, 1)
    )
    assert found.engine == index.members[0].info["engine"]["name"]
    written = sum(
        path.stat().st_size for path in index.folder.glob("member_*/*") if path.suffix in (".parquet", ".safetensors")
    )
    assert 0.7 * written < found.disk_bytes < 1.1 * written
    assert found.seconds > 0
    assert found.memory_bytes > 1e7
    assert "labels" in str(found) or "label" in str(found)


def test_what_a_build_refuses_is_refused(tmp_path):
    model = save_model(tmp_path / "model")
    with pytest.raises(ValueError, match="The dataset is empty: there is nothing to featurize"):
        AttributionIndex.estimate(models=model, dataset=token_rows(4).select([]))
    with pytest.raises(ValueError, match="proj_dim=1,000,000 is more than"):
        AttributionIndex.estimate(models=model, dataset=token_rows(4), config=TrakConfig(proj_dim=1_000_000))


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    token_rows(20).to_parquet(tmp_path / "train.parquet")
    save_model(tmp_path / "model")
    words = ["--model", tmp_path / "model", "--dataset", tmp_path / "train.parquet", "--output", tmp_path / "index"]
    main(["featurize", *map(str, words), "--proj_dim", "64", "--dry-run"])
    said = capsys.readouterr().out
    assert "rows       20" in said
    assert "engine     layerwise" in said
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (1500, "1.5 KB"), (2.34e9, "2.34 GB"), (5e15, "5e+03 TB")])
def test_bytes_are_spelled(count, text):
    assert spell_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(12.3, "12.3 seconds"), (150, "2.5 minutes"), (7200, "2 hours")])
def test_times_are_spelled(seconds, text):
    assert spell_seconds(seconds) == text
