"""Preferences: every engine's gradients beside a loop in float64, an index of them, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import llama_lm, make_model
from reference import gradient_loop
from tokenizers_for_tests import byte_tokenizer

from hf_trak import AttributionIndex, Featurizer, TrakConfig
from hf_trak.cli.main import main
from hf_trak.querying.examples import LanguageRows, row_reader
from hf_trak.tasks import AutoTask

ROWS = Dataset.from_dict(
    {
        "prompt_ids": [[5, 9, 17], [7, 3], [4, 4, 8, 20], [30]],
        "chosen_ids": [[30, 8], [12, 6, 9], [2], [11, 2]],
        "rejected_ids": [[31], [9, 2], [40, 7, 7], [3, 3, 3, 2]],
    }
)
REFERENCE = ROWS.add_column("ref_chosen_logps", [-9.0, -11.0, -4.0, -8.0]).add_column(
    "ref_rejected_logps", [-5.0, -7.0, -12.0, -16.0]
)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # `vmap` of a scatter
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("engine", ["layerwise", "functional", "loop"])
def test_every_engine_has_the_gradient_of_the_difference(engine, reduction):
    model = make_model("gpt2 lm", seed=0)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    config = TrakConfig(
        task="preference", gradients=engine, projector="identity", proj_dim=n_parameters, preference_reduction=reduction
    )
    featurizer = Featurizer(model, config)
    found = featurizer(REFERENCE[:])
    names = [name for name, _ in model.named_parameters()]

    def difference(model, batch):
        def log_p(ids, labels):
            ids = ids[:, : int((batch["lengths"] if labels is None else labels)[0])]
            return model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[0, :, 0]

        n_prompt = int(batch["n_prompt"][0])
        sides = [log_p(batch[side], batch[f"n_{side}"])[n_prompt - 1 :] for side in ("chosen", "rejected")]
        each = [side.sum() if reduction == "sum" else side.mean() for side in sides]
        output = (each[0] - each[1])[None]
        reference = batch["reference"] if reduction == "sum" else 0.0
        return output, torch.sigmoid(-0.1 * (output.detach() - reference))

    whole = [[row["prompt_ids"] + row[f"{side}_ids"] for row in ROWS] for side in ("chosen", "rejected")]
    padded = [torch.tensor([ids + [0] * (8 - len(ids)) for ids in side]) for side in whole]
    batch = {"chosen": padded[0], "rejected": padded[1], "n_prompt": torch.tensor([len(ids) for ids in ROWS["prompt_ids"]])}
    batch |= {
        f"n_{name}": torch.tensor([len(ids) for ids in side]) for name, side in zip(("chosen", "rejected"), whole, strict=True)
    }
    batch["reference"] = torch.tensor(REFERENCE["ref_chosen_logps"][:]) - torch.tensor(REFERENCE["ref_rejected_logps"][:])
    output, out_to_loss, grads = gradient_loop(model, batch, difference, names)
    np.testing.assert_allclose(found["trak_output"], output, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["trak_out_to_loss"], out_to_loss, rtol=1e-4)
    np.testing.assert_allclose(found["trak_features"], grads, rtol=1e-3, atol=1e-5 * float(grads.abs().max()))


def test_an_index_of_preferences_scores_and_selects(tmp_path):
    make_model("gpt2 lm", seed=0).save_pretrained(tmp_path / "model")
    config = TrakConfig(task="preference", proj_dim=32)
    train = Dataset.from_dict({name: ROWS[name][:] * 4 for name in ROWS.column_names})
    index = AttributionIndex.build(tmp_path / "index", models=tmp_path / "model", dataset=train, config=config, progress=False)
    scores = index.score(ROWS, progress=False)
    assert scores.shape == (16, 4)
    np.testing.assert_allclose(scores[:4], scores[4:8], rtol=1e-4, atol=1e-6 * np.abs(scores).max())
    assert all(scores[row, row] > 0 for row in range(4))
    best = index.select(ROWS.select([2]), 4, progress=False)["trak_row"][:]
    assert best == np.argsort(-scores[:, 2], kind="stable")[:4].tolist()


def test_reports_show_both_answers_of_texts_conversations_and_tokens(tmp_path):
    torch.manual_seed(0)
    llama_lm(vocab_size=300, max_position_embeddings=64).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    texts = Dataset.from_list([{"prompt": f"ask {i}", "chosen": f" yes {i}", "rejected": " no"} for i in range(4)])
    user, said = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "yes"}
    chats = Dataset.from_list(
        [{"prompt": [user], "chosen": [said], "rejected": [{**said, "content": f"no {i}"}]} for i in range(4)]
    )
    ids = {
        name: [byte_tokenizer()(text)["input_ids"] for text in texts[name.removesuffix("_ids")]] for name in ROWS.column_names
    }
    shown = {
        "texts": (texts, "ask 2  →  chosen: yes 2  |  rejected: no"),
        "chats": (chats, "user: ask  →  chosen: assistant: yes  |  rejected: assistant: no 2"),
        "tokens": (Dataset.from_dict(ids), "ask 2  →  chosen: yes 2  |  rejected: no"),
    }
    for rows, expected in shown.values():
        reader = row_reader(TrakConfig(task="preference"), rows, LanguageRows("preference", byte_tokenizer()))
        assert reader[2].text == expected
    texts.to_parquet(tmp_path / "train.parquet")
    index, data = str(tmp_path / "index"), str(tmp_path / "train.parquet")
    main(["featurize", "--model", str(tmp_path / "model"), "--dataset", data, "--output", index, "--task", "preference", "--proj_dim", "16",
          "--keep_columns", "prompt,chosen,rejected"])  # fmt: skip
    main(["attribute", index, "--queries", data, "--output", str(tmp_path / "hits.jsonl"), "--report", str(tmp_path / "report"),
          "--top_k", "1", "--max_queries", "3"])  # fmt: skip
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count(" ".join(shown["texts"][1].split())) >= 2  # as a query, and as a training row
    found = AttributionIndex.from_pretrained(index).explain(texts[2], top_k=1, progress=False)
    assert found.attribution.query.text == shown["texts"][1]
    assert found.hits[0]["proponents"] == json.loads((tmp_path / "hits.jsonl").read_text().splitlines()[2])["proponents"]


@pytest.mark.parametrize(("rows", "message"), [
    ({"prompt": ["what"], "chosen": ["a bird"]}, "needs the columns 'chosen' and 'rejected'"),
    ({"prompt": ["what"], "chosen": ["a bird"], "rejected": [None]}, r"'rejected' is None"),
    ({"chosen": ["a bird"], "rejected": ["the bird"]}, "no beginning in common"),
    ({"prompt": ["what"], "chosen": [[{"role": "user", "content": "a"}]], "rejected": [[{"role": "user", "content": "b"}]]}, "must be a text where"),
    ({"prompt": ["what is it"], "chosen": [" a bird"], "rejected": [" a bear"], "long": [True]}, "of its chosen answer nothing is scored"),
    ({"prompt": ["w"], "chosen": ["a"], "rejected": ["b"], "ref_chosen_logps": [None], "ref_rejected_logps": [1.0]}, "'ref_chosen_logps' is None"),
])  # fmt: skip
def test_rows_that_cannot_serve_are_refused(rows, message):
    config = TrakConfig(task="preference", max_length=5 if "long" in rows else None)
    model = make_model("llama lm", seed=0)
    model.resize_token_embeddings(400)
    task = AutoTask.from_model(model, config)
    with pytest.raises(ValueError, match=message):
        task.check(Dataset.from_dict(rows), byte_tokenizer())


def test_preferences_are_of_decoders_and_beta_is_positive():
    with pytest.raises(ValueError, match="serves text-classification, not preference"):
        AutoTask.from_model(make_model("bert"), TrakConfig(task="preference"))
    with pytest.raises(ValueError, match="`preference_beta` must be a number above 0"):
        TrakConfig(preference_beta=0)
