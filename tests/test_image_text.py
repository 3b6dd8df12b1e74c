"""Models that read pictures among their tokens: rows, queries, prompts, and reports with the pictures."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, Features, Image, List, Value
from reference import gradient_loop
from test_zoo_rows import SIZES, TEXT, llava_processor, picture

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.cli.main import main

WORDS = ["a b", "c d", "e f", "g h", "i j", "a d"]


def rows(n_rows, *, prompt="user : <image> {} </s> assistant : "):
    cells = {
        "prompt": [prompt.format(WORDS[i % 6]) for i in range(n_rows)],
        "completion": [WORDS[(i + 2) % 6] for i in range(n_rows)],
        "images": [[picture(i)] for i in range(n_rows)],
    }
    features = Features({"prompt": Value("string"), "completion": Value("string"), "images": List(Image())})
    return Dataset.from_dict(cells, features=features)


def save_llava(folder):
    torch.manual_seed(0)
    processor = llava_processor()
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=16),
        text_config=transformers.LlamaConfig(**TEXT), image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("pictures")
    save_llava(found / "model")
    rows(8).to_parquet(found / "train.parquet")
    for seed in range(2):
        picture(seed).save(found / f"{seed}.png")
    return found


@pytest.fixture(scope="module")
def index(folder):
    config = TrakConfig(
        projector="identity", proj_dim=10_000, parameters=("language_model.norm", "multi_modal_projector.linear_2")
    )
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "model")
    size = sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in config.parameters))
    config = TrakConfig(**{**config.to_dict(), "proj_dim": size})
    return AttributionIndex.build(
        folder / "index", models=folder / "model", dataset=rows(8), config=config, progress=False,
        keep_columns=["prompt", "completion", "images"],
    )  # fmt: skip


def test_a_prompt_with_its_picture_and_an_answer_is_a_row(index, folder):
    row = rows(3).select([2])
    expected = index.attribute(row, 8, progress=False)[0]
    found = index.explain(row[0]["prompt"], image=picture(2), answer=row[0]["completion"], top_k=8, progress=False)
    assert found.answer == row[0]["completion"]
    assert found.hits[0]["proponents"] == expected["proponents"]
    np.testing.assert_allclose(found.hits[0]["proponent_scores"], expected["proponent_scores"], rtol=1e-4)
    assert found.hits[0]["query_output"] == pytest.approx(expected["query_output"], rel=1e-4)
    another = index.explain(row[0]["prompt"], image=picture(3), answer=row[0]["completion"], top_k=8, progress=False)
    assert another.hits[0]["query_output"] != pytest.approx(expected["query_output"], rel=1e-4)

    # The gradient is that of a plain loop in float64.
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "model").double().eval()
    processor = llava_processor()
    encoded = processor(text=[row[0]["prompt"] + row[0]["completion"] + "</s>"], images=[[picture(2)]], return_tensors="pt")
    names = [
        name
        for name, _ in model.named_parameters()
        if "language_model.norm" in name or "multi_modal_projector.linear_2" in name
    ]

    def log_odds(model, batch):
        inputs = {name: values.double() if values.is_floating_point() else values for name, values in batch.items()}
        logits = model(**inputs).logits[:, -4:-1].log_softmax(-1)
        logp = logits.gather(-1, batch["input_ids"][:, -3:, None])[..., 0]
        return (logp - torch.log1p(-logp.exp())).mean()[None], torch.ones(1)

    gradient = gradient_loop(model, dict(encoded), log_odds, names)[2][0]
    features = index.featurize_queries(row, progress=False)["trak_features"][0]
    # Tensors are laid one after another in an order of their own; the parts are compared by their norms and products.
    np.testing.assert_allclose(np.sort(features), np.sort(gradient.numpy()), rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_the_model_answers_about_a_picture(index, folder):
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "model").eval()
    processor = llava_processor()
    prompt = "user : <image> a b </s> assistant : "
    encoded = processor(text=[prompt], images=[[picture(1)]], return_tensors="pt")
    ids = encoded["input_ids"]
    for _ in range(3):
        with torch.no_grad():
            new = model(input_ids=ids, pixel_values=encoded["pixel_values"]).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
    answer = processor.decode(ids[0, -3:], skip_special_tokens=True)
    found = index.explain(prompt, image=folder / "1.png", max_new_tokens=3, heat=True, top_k=2, progress=False)
    assert found.answer.split() == answer.split()[: len(found.tokens)]
    sums = [sum(found.heat[row]) for row in found.hits[0]["proponents"]]
    np.testing.assert_allclose(sums, found.hits[0]["proponent_scores"], rtol=1e-3)
    chat = index.explain("a b", image=picture(1), answer="c", chat=True, top_k=2, progress=False)
    assert chat.prompt == [{"role": "user", "content": "a b"}]


def test_reports_show_the_pictures(index, folder, capsys):
    found = index.explain("user : <image> a b </s> assistant : ", image=picture(1), answer="c d", top_k=3, progress=False)
    assert found.to_html().count("<img") == 7  # of the query, and three rows on either side
    assert found.attribution.proponents[0].example.text.endswith("→  " + found.hits[0]["proponent_completion"][0])
    two = index.explain(
        "user : <image> <image> a </s> assistant : ", image=[picture(0), picture(1)], answer="c", top_k=1, progress=False
    )
    assert two.attribution.query.image.size == (16 + 4 + 16, 16)
    main(["explain", str(folder / "index"), "--prompt", "a b", "--image", str(folder / "1.png"), "--max_new_tokens", "2", "--chat", "--top_k", "1",
          "--report", str(folder / "explained")])  # fmt: skip
    main(["attribute", str(folder / "index"), "--queries", str(folder / "train.parquet"), "--output", str(folder / "hits.jsonl"),
          "--report", str(folder / "report"), "--max_queries", "2", "--top_k", "1"])  # fmt: skip
    assert "Answer: " in capsys.readouterr().out
    assert (folder / "explained" / "report.html").read_text().count("<img") == 3 + 3  # a row of each of three controls
    reported = re.sub(r"<details>.*?</details>", "", (folder / "report" / "report.html").read_text(), flags=re.DOTALL)
    assert reported.count("<img") == 6


def test_pictures_that_do_not_belong_are_refused(index, folder):
    for options, message in (
        ({"prompt": "a b", "image": folder / "no.png"}, "There is no image file"),
        ({"prompt": "a b", "image": picture(), "chat": False}, "The prompt has no place for its picture. Put '<image>'"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], "image": picture()}, "places for 2 images, but it has 1"),
        ({"prompt": "a", "image": picture(), "target": 1}, "has no use for 'target'"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            index.explain(**options, answer="c", progress=False)
