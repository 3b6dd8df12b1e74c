from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from hf_trak.config import CONFIG_NAME, FORMAT_VERSION, TrakConfig

FULL: dict[str, Any] = {
    "task": "text-classification",
    "proj_dim": 512,
    "sketch_seed": 3,
    "projector": "dense_rademacher",
    "fold": 1,
    "gradients": "functional",
    "compute_dtype": "bfloat16",
    "damping": 0.5,
    "out_to_loss_power": 1.0,
    "combination": "means",
    "features_dtype": "float16",
    "parameters": ("classifier", r"layer\.1\."),
    "text_columns": ("question", "sentence"),
    "image_column": "image",
    "label_column": "label",
    "label_mapping": "by_name",
    "max_length": 64,
    "chunk_overlap": 8,
    "row_format": "alpaca",
    "token_reduction": "sum",
    "score_tokens": "content",
    "token_out_to_loss": "exact",
    "loss_on": "assistant",
    "skip_unscored": True,
    "chat_template_kwargs": '{"enable_thinking": false}',
    "bank_size": 300,
    "bank_seed": 4,
    "preference_reduction": "mean",
    "preference_beta": 0.3,
    "columns_read": {"text": ["sentence"], "label": "label"},
    "label_names": ("negative", "positive"),
    "format_version": FORMAT_VERSION,
}


def test_the_full_example_sets_every_field():
    assert set(FULL) == {field.name for field in dataclasses.fields(TrakConfig)}


@pytest.mark.parametrize("values", [{}, FULL], ids=["defaults", "full"])
def test_a_configuration_round_trips_through_json(values: dict[str, Any], tmp_path):
    config = TrakConfig(**values)
    assert TrakConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path / "new" / "folder")
    assert TrakConfig.from_pretrained(tmp_path / "new" / "folder") == config
    assert hash(TrakConfig.from_pretrained(str(tmp_path / "new" / "folder"))) == hash(config)


def test_arguments_of_the_chat_template_are_one_text_however_they_are_given():
    given = ({"b": 1, "a": [None]}, '{"b":1,  "a": [null]}', '{"b": 1, "a": [null]}')
    found = [TrakConfig(chat_template_kwargs=value).chat_template_kwargs for value in given]
    assert found == ['{"b": 1, "a": [null]}'] * 3  # in their order, in which a template writes tools
    for wrong in ("{", "[1]", 3, {"a": {1, 2}}):
        with pytest.raises(ValueError, match="`chat_template_kwargs` must be a dict or its JSON text"):
            TrakConfig(chat_template_kwargs=wrong)


def test_the_file_is_golden(tmp_path):
    TrakConfig(task="image-classification", parameters=["classifier"]).save_pretrained(tmp_path)
    assert (tmp_path / CONFIG_NAME).read_text() == (
        '{\n  "task": "image-classification",\n  "proj_dim": 4096,\n  "sketch_seed": 0,\n  "projector": "block_count_sketch",\n'
        '  "fold": 4,\n  "gradients": "auto",\n  "compute_dtype": "float32",\n  "damping": "auto",\n  "features_dtype": "float32",\n  "parameters": [\n    "classifier"\n  ],\n'
        '  "text_columns": null,\n  "image_column": null,\n  "label_column": null,\n  "max_length": null,\n'
        '  "format_version": 4\n}\n'
    )


def test_every_field_has_a_help_string():
    for field in dataclasses.fields(TrakConfig):
        assert field.metadata["help"].endswith("."), field.name


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrakConfig().proj_dim = 8  # type: ignore[misc]


def test_what_a_command_line_or_yaml_hands_over_becomes_the_declared_type():
    config = TrakConfig(damping="0.5", parameters="classifier", text_columns=["question"])  # type: ignore[arg-type]
    assert config.damping == 0.5
    assert config.parameters == ("classifier",)
    assert config.text_columns == ("question",)
    assert config == TrakConfig(damping=0.5, parameters=("classifier",), text_columns=("question",))


def test_a_damping_of_zero_is_the_papers_and_allowed():
    assert TrakConfig(damping=0).damping == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compute_dtype": "float16"}, "`compute_dtype` must be one of float32, bfloat16, but is 'float16'"),
        ({"out_to_loss_power": 2}, "`out_to_loss_power` must lie in 0 to 1, but is 2"),
        ({"combination": "sum"}, "`combination` must be one of scaled, means, but is 'sum'"),
        ({"damping": "much"}, "`damping` must be 'auto' or a number, but is 'much'"),
        ({"damping": -0.1}, "`damping` must be 'auto' or a finite number of at least 0, but is -0.1"),
        ({"damping": float("nan")}, "finite number of at least 0, but is nan"),
        ({"damping": "inf"}, "finite number of at least 0, but is inf"),
        ({"proj_dim": 0}, "`proj_dim` must be a whole number of at least 1, but is 0"),
        ({"proj_dim": 8.0}, "`proj_dim` must be a whole number of at least 1, but is 8.0"),
        ({"proj_dim": "8"}, "`proj_dim` must be a whole number of at least 1, but is '8'"),
        ({"proj_dim": True}, "`proj_dim` must be a whole number of at least 1, but is True"),
        ({"fold": 0}, "`fold` must be a whole number of at least 1, but is 0"),
        ({"token_reduction": "max"}, "`token_reduction` must be one of mean, sum, but is 'max'"),
        (
            {"token_out_to_loss": "exact"},
            "`token_out_to_loss='exact'` needs token_reduction='sum', .* but `token_reduction` is 'mean'. Set both",
        ),
        ({"score_tokens": "some"}, "`score_tokens` must be one of all, content, but is 'some'"),
        ({"features_dtype": "int8"}, "`features_dtype` must be one of float32, float16, but is 'int8'"),
        ({"gradients": "magic"}, "`gradients` must be one of auto, layerwise, functional, loop, but is 'magic'"),
        ({"text_columns": ()}, "one column or two, but has 0"),
        ({"text_columns": ("a", "b", "c")}, "one column or two, but has 3"),
        ({"format_version": 5}, "format version 5, and this hf_trak reads version 4. Upgrade hf_trak"),
        ({"format_version": 3}, "format version 3, and this hf_trak reads version 4. .*or featurize again"),
    ],
)
def test_an_impossible_value_is_refused(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TrakConfig(**values)


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match="Unknown fields in a TrakConfig: proj_dims, sede"):
        TrakConfig.from_dict({"sede": 0, "proj_dims": 8})


def test_a_future_version_is_refused_for_its_version_and_not_for_its_new_fields():
    with pytest.raises(ValueError, match="format version 5.*Upgrade hf_trak"):
        TrakConfig.from_dict({"format_version": 5, "something_new": True})


def test_a_folder_without_the_file_is_not_an_index(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"holds no {CONFIG_NAME}, so it is not an attribution index"):
        TrakConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ['{"proj_dim": 51', "", "[]", "null", "\x00\x01", b"\xff\xfe\x00"])
def test_a_damaged_file_is_named(text: str | bytes, tmp_path):
    (tmp_path / CONFIG_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{CONFIG_NAME} is damaged.*featurize again"):
        TrakConfig.from_pretrained(tmp_path)


def test_equal_configurations_do_not_differ():
    assert TrakConfig(**FULL).differences(TrakConfig(**FULL)) == []


def test_differences_name_each_field_and_both_values():
    assert TrakConfig(sketch_seed=1).differences(TrakConfig(proj_dim=512, parameters=("head",))) == [
        "proj_dim: 4096 here, 512 there",
        "sketch_seed: 1 here, 0 there",
        "parameters: None here, ['head'] there",
    ]


def test_what_is_chosen_after_featurizing_is_no_difference():
    assert TrakConfig(damping=0.0, features_dtype="float16", skip_unscored=True).differences(TrakConfig()) == []


@pytest.mark.parametrize(
    "field",
    sorted(
        set(FULL)
        - {"damping", "out_to_loss_power", "combination", "features_dtype", "skip_unscored", "format_version", "gradients"}
    ),
)
def test_every_field_that_gives_features_their_meaning_is_a_difference(field: str):
    needed = {"token_reduction": "sum"} if field == "token_out_to_loss" else {}
    assert len(TrakConfig(**needed, **{field: FULL[field]}).differences(TrakConfig(**needed))) == 1


def test_fields_that_came_later_are_no_part_of_an_older_members_identity():
    assert not {"bank_size", "bank_seed", "task", "damping", "combination"} & set(TrakConfig().identity())
    assert TrakConfig(bank_size=300).identity()["bank_size"] == 300
