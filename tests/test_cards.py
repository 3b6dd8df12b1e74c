"""Cards are rendered whole: of an index, as its folder and the Hub have it, and of what was measured."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from card_rules import errors_in_card
from datasets_for_tests import save_model, token_rows
from huggingface_hub import DatasetCard, ModelCard

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.cli.main import main
from hf_trak.hub.cards import BEGIN, END, index_metadata, merge_card, render_index_card, show_bytes
from hf_trak.scoring.damping import DampingChoice

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"


def member(seed, **changes):
    """A member.json with nothing in it that depends on the machine."""
    info = {
        "identity": {
            "task": "text-classification",
            "seed": seed,
            "model_class": "BertForSequenceClassification",
            "model_sha256": "0123456789abcdef" * 4,
            "dataset": {
                "sha256": "feedfacecafebeef" * 4,
                "columns": {"text": ["sentence"], "label": "label"},
                "label_names": ["negative", "positive"],
            },
            "n_rows": 67349,
            **changes.pop("identity", {}),
        },
        "checkpoint": {"path": "../bert", "repository": None, "revision": None},
        "training_set": {"name": "sst2", "config": "default", "split": "train", "columns": ["sentence", "label"]},
        "coverage": 1.0,
        "grad_dim": 109483778,
        "versions": {"hf_trak": "0.1.0", "torch": "2.13.0"},
        "hardware": "x86_64",
        "files": [{"file": "train-00000-of-00001.parquet", "bytes": 1 << 30}],
    }
    return {**info, **changes}


def everything():
    """The arguments of a card that has all that a card can have."""
    place = {"path": None, "repository": "me/bert-sst2", "revision": "c" * 40}
    source = {"repository": "stanfordnlp/sst2", "revision": "d" * 40}
    members = [
        member(
            seed,
            identity={"dropout_seed": seed, "kept": {"columns": ["sentence", "label"]}},
            checkpoint=place,
            source=source,
            checkpoint_number=seed // 2,
        )
        for seed in range(4)
    ]
    results = [
        {"case": "sst2", "method": "index", "metric": "lds", "value": 0.4321, "unit": "Spearman", "interval": [0.4, 0.46]},
        {"case": "sst2", "method": "ceiling", "metric": "lds_ceiling", "value": 0.76, "unit": "Spearman", "interval": None},
        {"case": "sst2", "method": "index", "metric": "featurize_cpu_ratio", "value": 0.9, "unit": "x", "interval": None},
    ]
    return {
        "config": TrakConfig(proj_dim=4096, features_dtype="float16"),
        "members": members,
        "name": "me/sst2-trak",
        "choice": DampingChoice(3.0, (0.3, 3.0), (0.1, 0.25), 4, 2048, "0" * 64),
        "has_curve": True,
        "license": {"license": "other", "license_name": "glue", "license_link": "https://gluebenchmark.com"},
        "results": results,
    }


CARDS = {
    "index_plain": {"config": TrakConfig(proj_dim=2048), "members": [member(0)], "name": "my-index"},
    "index_everything": everything(),
}


@pytest.mark.parametrize("name", CARDS)
def test_an_index_card_is_rendered_whole(name):
    card = render_index_card(**CARDS[name])
    assert card == (GOLDEN / f"{name}.md").read_text(encoding="utf-8")
    assert errors_in_card(card, "dataset") == []


def test_the_yaml_says_what_the_hub_searches_by():
    arguments = everything()
    values = index_metadata(arguments["members"], arguments["license"]).to_dict()
    assert values["tags"] == ["trak", "data-attribution"]
    assert values["base_model"] == ["me/bert-sst2"]
    assert values["source_datasets"] == ["stanfordnlp/sst2"]
    assert values["size_categories"] == "10K<n<100K"
    assert values["license_name"] == "glue"
    assert [one["config_name"] for one in values["configs"]] == [f"member_{i}" for i in range(4)]
    assert [bool(one.get("default")) for one in values["configs"]] == [True, False, False, False]


@pytest.mark.parametrize(
    ("n_rows", "size"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (9999, "1K<n<10K"), (10**6, "1M<n<10M"), (10**10, "10B<n<100B")],
)
def test_size_categories(n_rows, size):
    assert index_metadata([member(0, identity={"n_rows": n_rows})], {}).to_dict()["size_categories"] == size


def test_sizes_have_units():
    assert [show_bytes(n) for n in (10, 2048, 5 << 20, 3 << 29)] == ["10 bytes", "2.0 KiB", "5.0 MiB", "1.5 GiB"]


def test_hundreds_of_members_are_counted_and_not_listed():
    card = render_index_card(TrakConfig(proj_dim=16), [member(seed) for seed in range(120)], name="many")
    assert "| 19 | BertFor" in card
    assert "| 20 | BertFor" not in card
    assert "and 100 more, each of which its `member.json` describes." in card


# What is its owner's


def test_merging_a_card_into_itself_changes_nothing():
    card = render_index_card(**everything())
    assert merge_card(card, card) == card


def test_merging_keeps_what_is_not_ours():
    old, new = render_index_card(**CARDS["index_plain"]), render_index_card(**everything())
    mine = {"config_name": "mine", "data_files": "mine.csv", "default": True}
    edited = DatasetCard(old)
    edited.data.license, edited.data.pretty_name = "mit", "Mine"
    edited.data.tags = ["my-tag", "trak"]
    edited.data.configs = [mine, *edited.data.configs]
    edited.text = f"# Before\n{edited.text}\n# After\n"
    merged = merge_card(new, str(edited))
    assert errors_in_card(merged, "dataset") == []
    values = DatasetCard(merged).data.to_dict()
    assert values["pretty_name"] == "Mine"
    assert values["license"] == "other"
    assert values["tags"] == ["my-tag", "trak", "data-attribution"]
    assert values["configs"][0] == mine
    assert [one["config_name"] for one in values["configs"]] == ["mine", *(f"member_{i}" for i in range(4))]
    body = merged.split("---\n", 2)[2]
    assert body.startswith("# Before\n")
    assert body.endswith("# After\n")
    assert body.count(BEGIN) == body.count(END) == 1
    assert 'load_dataset("me/sst2-trak"' in body
    assert "my-index" not in body


def test_what_was_measured_stays_with_the_features_that_it_was_measured_of():
    arguments = everything()
    measured, silent = render_index_card(**arguments), render_index_card(**{**arguments, "results": []})
    assert merge_card(silent, measured) == measured
    assert merge_card(measured, silent) == measured
    newer = render_index_card(**{**arguments, "results": [{**arguments["results"][0], "value": 0.5}]})
    assert merge_card(newer, measured) == newer
    others = [{**one, "files": [{"file": "train-00000-of-00001.parquet", "bytes": 7}]} for one in arguments["members"]]
    other = render_index_card(**{**arguments, "members": others, "results": []})
    assert merge_card(other, measured) == other


def test_building_again_keeps_its_owners_words(index):
    readme = index.folder / "README.md"
    before = readme.read_text()
    readme.write_text(before + "My words.\n")
    options = {"dataset": token_rows(12), "config": TrakConfig(proj_dim=16), "progress": False}
    AttributionIndex.build(index.folder, models=index.folder.parent / "bert", **options)
    assert readme.read_text() == before + "My words.\n"
    readme.write_text(before)


def test_a_licence_that_is_given_replaces_all_of_the_old_one():
    old = render_index_card(**everything())
    new = render_index_card(**{**CARDS["index_plain"], "license": {"license": "mit"}})
    values = DatasetCard(merge_card(new, old)).data.to_dict()
    assert values["license"] == "mit"
    assert not {"license_name", "license_link"} & set(values)


# hf-trak card


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    model = save_model(folder / "bert")
    return AttributionIndex.build(
        folder / "index", models=model, dataset=token_rows(12), config=TrakConfig(proj_dim=16), progress=False
    )


def test_the_command_prints_the_card_of_the_folder(index, capsys):
    assert main(["card", str(index.folder)]) == 0
    assert capsys.readouterr().out == (index.folder / "README.md").read_text()


def test_the_command_shows_results_and_keeps_its_owners_words(index, tmp_path, capsys):
    results = {"rows": everything()["results"]}
    (tmp_path / "lds.json").write_text(json.dumps(results))
    card = tmp_path / "card.md"
    arguments = ["card", str(index.folder), "--results", str(tmp_path / "lds.json"), "--license", "mit", "--name", "me/index"]
    assert main([*arguments, "--output", str(card)]) == 0
    text = card.read_text()
    assert errors_in_card(text, "dataset") == []
    assert "license: mit\n" in text
    assert "| sst2 | index | lds | 0.432 | 0.4 to 0.46 |\n| sst2 | ceiling | lds_ceiling | 0.76 |  |" in text
    assert "featurize_cpu_ratio" not in text
    assert 'from_pretrained("me/index")' in text
    assert main([*arguments, "--output", str(card)]) == 1
    assert "card.md exists" in capsys.readouterr().err
    card.write_text(text + "\nMy words.\n")
    assert main(["card", str(index.folder), "--output", str(card), "--overwrite"]) == 0
    assert card.read_text().endswith("\nMy words.\n")
    assert "license: mit\n" in card.read_text()


def test_the_command_refuses_what_are_no_results(index, tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"rows": [{"value": 1}]}')
    assert main(["card", str(index.folder), "--results", str(tmp_path / "other.json")]) == 1
    assert "other.json is no results file of `hf-trak evaluate`" in capsys.readouterr().err
    assert main(["card", str(index.folder), "--results", str(tmp_path / "gone.json")]) == 1
    assert "there is no file" in capsys.readouterr().err


# What was measured


@pytest.fixture(scope="module")
def renderer():
    spec = importlib.util.spec_from_file_location("model_cards_render", ROOT / "model_cards" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed():
    return sorted((ROOT / "model_cards").glob("*/*.md"))


def test_the_committed_cards_are_what_the_results_say(renderer, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["render.py", "--check"])
    renderer.main()
    cards = {path for path in committed() if path.parent.name != "templates"}
    assert cards == set(renderer.cards())


def test_a_card_that_is_not_what_the_results_say_is_named(renderer, monkeypatch):
    path, text = next(iter(renderer.cards().items()))
    monkeypatch.setattr(renderer, "cards", lambda: {path: text.replace("0.196", "0.916")})
    monkeypatch.setattr(sys, "argv", ["render.py", "--check"])
    with pytest.raises(SystemExit, match=r"Not what the results say: model_cards/sst2-bert/model\.md"):
        renderer.main()


def test_a_row_that_is_gone_from_the_results_is_an_error(renderer):
    with pytest.raises(ValueError, match=r"results/lds_text\.json has no row with metric 'lds', method 'astrology'"):
        renderer.choose(file="lds_text", metric="lds", method="astrology")


@pytest.mark.parametrize(
    "path", [path for path in committed() if path.parent.name != "templates"], ids=lambda p: "/".join(p.parts[-2:])
)
def test_committed_cards_are_valid_and_complete(path):
    text = path.read_text(encoding="utf-8")
    is_model = path.name == "model.md"
    assert errors_in_card(text, "model" if is_model else "dataset") == []
    card = (ModelCard if is_model else DatasetCard)(text)
    assert card.data.license
    for heading in ("Intended use", "Limits", "Training data", "How good", "Compute", "How to load", "Licence"):
        assert re.search(f"^## {heading}", text, re.MULTILINE), heading
    if is_model:
        for result in card.data.eval_results:
            assert f"{result.metric_value:.3g}"[:4] in text
        lds = [result for result in card.data.eval_results if result.metric_type == "lds"]
        assert all(result.metric_args["ceiling"] and len(result.metric_args["interval"]) == 2 for result in lds)
        assert lds or path.parent.name in ("digits-resnet", "ftrace-mt5")


def test_templates_are_installed_with_the_package():
    project = (ROOT / "pyproject.toml").read_text()
    assert '"hub/templates/*"' in project
    assert yaml.safe_load((ROOT / "model_cards" / "experiments.yaml").read_text())
