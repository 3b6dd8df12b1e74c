"""What is loaded is what was meant: no random weight, no made-up tokenizer, and the reason in one message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, Image
from datasets_for_tests import save_model, token_rows
from models import bert, make_model
from PIL import Image as Pictures
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import WORDS, word_tokenizer
from transformers import AutoTokenizer, ViTImageProcessor

from hf_trak import AttributionIndex, Featurizer, TrakConfig
from hf_trak.sources.checkpoints import load_model, load_processing_class

TEXTS = Dataset.from_dict({"text": ["a b c", "d e", "f g h i", "j a"] * 3, "label": [0, 1, 2, 0] * 3})
TEXT_CONFIG = TrakConfig(proj_dim=16, text_columns="text", max_length=8)


def rewritten(folder, change, name="bert"):
    """Save a model, and change its weights' names or values."""
    save_model(folder, name)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def build(folder, model, dataset=TEXTS, config=TEXT_CONFIG, **options):
    return AttributionIndex.build(folder, models=model, dataset=dataset, config=config, progress=False, **options)


# Weights


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "base_model.model.", "module._orig_mod.", "student.net."]
)
@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet9"])
def test_a_prefix_of_all_names_is_told_with_the_rename(tmp_path, prefix, name):
    source = rewritten(tmp_path / "m", lambda state: {prefix + key: value for key, value in state.items()}, name)
    with pytest.raises(ValueError, match=rf"contain `{prefix}`.*name\.removeprefix\('{prefix}'\)") as error:
        load_model(source)
    assert prefix + min(load_file(tmp_path / "m" / "model.safetensors")).removeprefix(prefix) in str(error.value)


def test_the_rename_that_is_told_mends_the_checkpoint(tmp_path):
    source = rewritten(tmp_path / "m", lambda state: {f"module.{key}": value for key, value in state.items()})
    with pytest.raises(ValueError, match="Rename them") as error:
        load_model(source)
    call = str(error.value).split("Rename them: ")[1].rstrip(".")
    import safetensors.torch

    exec(call, {"safetensors": safetensors, "file": tmp_path / "m" / "model.safetensors"})
    expected = make_model("bert", seed=0).state_dict()
    for key, value in load_model(source).state_dict().items():
        assert torch.equal(value, expected[key])


def test_a_part_inside_names_and_a_prefix_of_the_body_alone_are_told(tmp_path):
    inside = rewritten(tmp_path / "a", lambda s: {key.replace("bert.", "bert._orig_mod."): value for key, value in s.items()})
    with pytest.raises(ValueError, match=r"contain `_orig_mod\.`, as torch\.compile writes them"):
        load_model(inside)
    body = rewritten(tmp_path / "b", lambda s: {("module." if "bert" in key else "") + key: value for key, value in s.items()})
    with pytest.raises(ValueError, match=r"contain `module\.`"):
        load_model(body)


def test_a_new_head_is_refused_and_named(tmp_path):
    no_head = rewritten(tmp_path / "a", lambda s: {key: v for key, v in s.items() if not key.startswith("classifier")})
    with pytest.raises(ValueError, match=r"classifier\.bias, classifier\.weight are newly initialised: .* is a base model"):
        load_model(no_head)
    base = rewritten(
        tmp_path / "b", lambda s: {key.removeprefix("bert."): v for key, v in s.items() if not key.startswith("classifier")}
    )
    with pytest.raises(ValueError, match=r"classifier\.weight are newly initialised"):
        load_model(base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {key: v for key, v in s.items() if key != "classifier.bias"}, r"lacks 1 weights .*classifier\.bias"),
        (lambda s: {key: v for key, v in s.items() if "layer.1" not in key}, r"lacks 16 weights .*layer\.1.* and 11 more"),
        (
            lambda s: s | {key.replace("layer.1", "layer.2"): v.clone() for key, v in s.items() if "layer.1" in key},
            r"does not have \(16\): bert\.encoder\.layer\.2\.",
        ),
        (lambda s: s | {"extra.weight": torch.ones(3)}, r"does not have \(1\): extra\.weight"),
        (lambda s: s | {"bert.encoder.layer.0.extra": torch.ones(3)}, r"does not have \(1\): bert\.encoder\.layer\.0\.extra"),
        (
            lambda s: s | {"classifier.weight": torch.ones(5, 16)},
            r"classifier\.weight is \(5, 16\) in the file and \(3, 16\) in the",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    source = rewritten(tmp_path / "m", change)
    with pytest.raises(ValueError, match=message):
        load_model(source)
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "index", source, token_rows(6), TrakConfig(proj_dim=16))
    assert not (tmp_path / "index").exists()


def test_old_buffers_and_another_pretraining_head_are_no_false_alarms(tmp_path, caplog):
    buffers = rewritten(tmp_path / "a", lambda s: s | {"bert.embeddings.position_ids": torch.arange(20)[None]})
    load_model(buffers)
    assert not caplog.records
    heads = rewritten(
        tmp_path / "b", lambda s: s | {"cls.predictions.bias": torch.ones(60), "cls.seq_relationship.weight": torch.ones(2, 16)}
    )
    load_model(heads)
    assert "weights of another head are left out, which BertForSequenceClassification does not have: cls." in caplog.text


@pytest.mark.parametrize(
    "name", ["bert", "albert", "gpt2", "llama", "roberta", "modernbert", "vit", "resnet", "resnet9", "dinov2"]
)
def test_what_was_saved_loads_without_a_word(tmp_path, name, caplog):
    expected = make_model(name, seed=0).state_dict()
    found = load_model(str(save_model(tmp_path / name, name))).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert not [record for record in caplog.records if record.name.startswith("hf_trak")]


def test_tied_and_untied_t5_load(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))
    model.save_pretrained(tmp_path / "tied")
    state = load_file(tmp_path / "tied" / "model.safetensors")
    assert load_model(str(tmp_path / "tied")).lm_head.weight.shape == (60, 16)
    shutil.copytree(tmp_path / "tied", tmp_path / "untied")
    save_file(state | {"lm_head.weight": torch.ones(60, 16)}, tmp_path / "untied" / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_model(str(tmp_path / "untied")).lm_head.weight, torch.ones(60, 16))


def test_a_sentence_encoder_without_its_pooler_has_no_random_one(tmp_path):
    model = make_model("bert", seed=0).bert
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({key: v for key, v in state.items() if "pooler" not in key}, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_model(str(tmp_path)).pooler is None


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, None], ids=["empty", "no header", "cut short"])
def test_damaged_weights_are_named(tmp_path, content):
    path = save_model(tmp_path / "bert") / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"bert/model\.safetensors is damaged: .*Copy or download"):
        load_model(str(tmp_path / "bert"))


@pytest.fixture
def sharded(tmp_path):
    make_model("bert", seed=0).save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    return tmp_path / "sharded"


def test_a_missing_or_damaged_shard_is_named(sharded):
    load_model(str(sharded))
    second = sorted(sharded.glob("model-*.safetensors"))[1]
    content = second.read_bytes()
    second.write_bytes(content[:9])
    with pytest.raises(ValueError, match=f"{second.name} is damaged"):
        load_model(str(sharded))
    second.unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {second.name}, 1 of the \d files"):
        load_model(str(sharded))


@pytest.mark.parametrize("target", ["pytorch_model.bin", "../model.safetensors", "/tmp/model.safetensors", "model.pt"])
def test_a_map_of_weights_that_leads_elsewhere_is_refused(sharded, target):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], target)
    path.write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=rf"leads to {target}: weights are loaded from safetensors files in the same folder only"
    ):
        load_model(str(sharded))


@pytest.mark.parametrize(
    "text", ["null", "[", "{}", "[" * 100_000, '{"weight_map": 3}', '{"weight_map": {"a": 3}}'], ids=range(6)
)
def test_a_damaged_map_of_weights_is_named(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json of .* is damaged"):
        load_model(str(sharded))


@pytest.mark.parametrize(
    "text",
    ["null", "[", "{}", "[" * 100_000, '{"model_type": 3}', '{"model_type": "bert", "architectures": 3}'],
    ids=range(6),
)
def test_a_damaged_configuration_is_named(tmp_path, text):
    (save_model(tmp_path / "bert") / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json of .*bert"):
        load_model(str(tmp_path / "bert"))


def test_pickles_and_folders_of_something_else_are_refused(tmp_path):
    folder = save_model(tmp_path / "bert")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"its weights are in pytorch_model\.bin, which may run code"):
        load_model(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json.*holds nothing"):
        load_model(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="is a file, where the folder of a checkpoint is expected"):
        load_model(str(folder / "config.json"))


def test_half_precision_and_autocast_to_another_are_refused_before_work(tmp_path):
    make_model("bert", seed=0).half().save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match=r"this model's are float16.*--compute_dtype float32"):
        build(tmp_path / "index", tmp_path / "half", token_rows(6), TrakConfig(proj_dim=16, compute_dtype="bfloat16"))
    assert not (tmp_path / "index").exists()


# Tokenizers and processors

KINDS = ["bert", "distilbert", "albert", "gpt2", "roberta", "llama", "modernbert"]


@pytest.mark.parametrize("name", KINDS)
def test_no_tokenizer_is_made_up(tmp_path, name):
    model = save_model(tmp_path / name, name)
    with pytest.raises(ValueError, match=rf"{name} holds no tokenizer.*--processor FOLDER_OR_REPO.*`processing_class=`"):
        build(tmp_path / "index", model)
    assert not (tmp_path / "index").exists()
    with pytest.raises(ValueError, match=f"{name} holds no tokenizer"):
        Featurizer(model, TEXT_CONFIG)(TEXTS[:2])
    assert load_processing_class(str(model)) is None


@pytest.mark.parametrize("name", ["bert", "gpt2", "roberta"])
def test_a_made_up_tokenizer_is_refused_as_an_object_and_as_files(tmp_path, name):
    model = save_model(tmp_path / name, name)
    made_up = AutoTokenizer.from_pretrained(model)
    with pytest.raises(ValueError, match=r"The tokenizer in `processing_class` is empty: its \d tokens are special ones"):
        build(tmp_path / "index", model, processing_class=made_up)
    made_up.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"The tokenizer of .*saved is empty"):
        build(tmp_path / "index", model, processing_class=str(tmp_path / "saved"))


def test_prepared_rows_need_no_tokenizer_and_ignore_a_damaged_one(tmp_path):
    model = save_model(tmp_path / "bert")
    first = build(tmp_path / "a", model, token_rows(12), TrakConfig(proj_dim=16))
    (model / "tokenizer.json").write_text("{")
    second = build(tmp_path / "b", model, token_rows(12), TrakConfig(proj_dim=16))
    queries = token_rows(3, seed=1)
    scores = first.score(queries, progress=False)
    assert np.isfinite(scores).all()
    assert np.array_equal(scores, second.score(queries, progress=False))


@pytest.mark.slow
def test_a_processor_is_an_object_a_folder_or_beside_the_weights_and_is_found_again(tmp_path):
    model = save_model(tmp_path / "bert")
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    shutil.copytree(model, tmp_path / "whole")
    word_tokenizer().save_pretrained(tmp_path / "whole")
    expected = build(tmp_path / "a", tmp_path / "whole").score(TEXTS, progress=False)
    assert np.isfinite(expected).all()
    for number, given in enumerate([word_tokenizer(), str(tmp_path / "tokenizer"), tmp_path / "tokenizer"]):
        index = build(tmp_path / f"b{number}", model, processing_class=given)
        assert np.array_equal(index.score(TEXTS, progress=False), expected)
    again = AttributionIndex.from_pretrained(tmp_path / "b1")
    assert np.array_equal(again.score(TEXTS, progress=False), expected)
    again.save_pretrained(tmp_path / "deep" / "er" / "copy")
    copied = AttributionIndex.from_pretrained(tmp_path / "deep" / "er" / "copy")
    assert np.array_equal(copied.score(TEXTS, progress=False), expected)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        AttributionIndex.from_pretrained(tmp_path / "b0").score(TEXTS, progress=False)


def test_a_processor_by_name_reaches_the_processes_of_map(tmp_path):
    model = save_model(tmp_path / "bert")
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    alone = TEXTS.map(Featurizer(model, TEXT_CONFIG, tmp_path / "tokenizer"), batched=True)
    shared = TEXTS.map(Featurizer(model, TEXT_CONFIG, str(tmp_path / "tokenizer")), batched=True, num_proc=2)
    np.testing.assert_allclose(alone["trak_output"][:], shared["trak_output"][:], rtol=1e-5)


def test_a_finished_index_of_prepared_rows_refuses_raw_queries(tmp_path):
    model = save_model(tmp_path / "bert")
    index = build(tmp_path / "index", model, token_rows(12), TrakConfig(proj_dim=16))
    raw = TEXTS.select_columns(["text", "label"])
    with pytest.raises(ValueError, match="queries lack 'input_ids'"):
        index.score(raw, progress=False)


@pytest.mark.parametrize("text", ["", "{", "null", '{"a": 1}', "[" * 100_000], ids=range(5))
def test_a_damaged_tokenizer_is_named(tmp_path, text):
    model = save_model(tmp_path / "bert")
    word_tokenizer().save_pretrained(model)
    (model / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"of .*bert cannot be loaded from .*tokenizer\.json"):
        build(tmp_path / "index", model)


def test_a_tokenizer_without_its_vocabulary_is_named(tmp_path):
    model = save_model(tmp_path / "bert")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(
        ValueError, match=r"lacks vocab\.txt of its tokenizer, a BertTokenizer.*it holds tokenizer_config\.json"
    ):
        build(tmp_path / "index", model)
    (model / "vocab.txt").write_text("")
    with pytest.raises(ValueError, match="is empty: its 5 tokens are special ones"):
        build(tmp_path / "index", model)
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    build(tmp_path / "index", model)


def test_a_vocabulary_of_another_model_is_refused_before_work(tmp_path):
    model = save_model(tmp_path / "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(200))]
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (model / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(ValueError, match="makes ids up to 204, but the embedding of BertForSequenceClassification has 60 rows"):
        build(tmp_path / "index", model)
    large = bert(vocab_size=1000)
    large.save_pretrained(tmp_path / "large")
    word_tokenizer().save_pretrained(tmp_path / "large")
    with pytest.raises(
        ValueError, match="knows 17 tokens, where the embedding of BertForSequenceClassification has 1,000 rows"
    ):
        build(tmp_path / "index", tmp_path / "large")
    assert not (tmp_path / "index").exists()


def test_an_image_processor_is_not_made_up_either(tmp_path):
    model = save_model(tmp_path / "vit", "vit")
    pictures = [Pictures.fromarray(np.full((9, 9, 3), 9 * number, np.uint8)) for number in range(12)]
    rows = Dataset.from_dict({"image": pictures, "label": [0, 1, 2] * 4}).cast_column("image", Image())
    config = TrakConfig(proj_dim=16)
    with pytest.raises(
        ValueError, match=r"vit holds no .*image processor.*An image column needs an image processor.*--processor"
    ):
        build(tmp_path / "index", model, rows, config)
    for text in ("", "null", "{}", "[1]", '{"processor_class": "CLIPProcessor"}'):
        (model / "preprocessor_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"preprocessor_config\.json of .*vit (is damaged|holds no settings)"):
            build(tmp_path / "index", model, rows, config)
    (model / "preprocessor_config.json").unlink()
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "processor")
    scores = build(tmp_path / "index", model, rows, config, processing_class=tmp_path / "processor").score(rows, progress=False)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("extractor", "config"), [("Wav2Vec2FeatureExtractor", "HubertConfig"), ("WhisperFeatureExtractor", "WhisperConfig")]
)
def test_the_feature_extractor_of_a_classifier_of_sound_is_found_by_name(tmp_path, extractor, config):
    getattr(transformers, config)().save_pretrained(tmp_path)
    getattr(transformers, extractor)().save_pretrained(tmp_path)
    assert type(load_processing_class(str(tmp_path))).__name__ == extractor


def test_a_name_without_a_processor_is_refused(tmp_path):
    model = save_model(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"given as `processing_class` \(--processor\), holds no tokenizer"):
        build(tmp_path / "index", model, processing_class=str(model))
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        build(tmp_path / "index", model, processing_class=str(tmp_path / "gone"))


def test_a_repository_out_of_reach_is_named_at_once():
    with pytest.raises(
        FileNotFoundError, match="'me/none' is neither a folder here nor a model repository within reach: HF_HUB_OFFLINE"
    ):
        load_model("me/none")
    with pytest.raises(FileNotFoundError, match="nor the name of a model repository"):
        load_model("no such name!")


def test_real_checkpoints_load_without_a_false_alarm(shared_data: Path):
    clip = shared_data.parent / "models" / "clip-mini-cifar10"
    if not clip.is_dir():
        pytest.skip(f"no model at {clip}")
    assert type(load_model(str(clip))).__name__ == "CLIPModel"
    assert type(load_processing_class(str(clip))).__name__ == "CLIPProcessor"
