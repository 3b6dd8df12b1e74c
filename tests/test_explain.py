"""`index.explain`: what the model answers is attributed as the same row is, in whole or in part, and shown."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import make_model
from reference import gradient_loop, trak_scores
from tokenizers_for_tests import byte_tokenizer, word_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.cli.main import main
from hf_trak.tasks import AutoTask, TokenOutput
from hf_trak.tasks.answers import Answering

PAPER = {"damping": 0.5, "out_to_loss_power": 1, "combination": "means", "progress": False}


def words(rng):
    return " ".join(rng.choice(list("abcdefghij"), size=rng.integers(2, 5)))


def rows(kind, n_rows, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "messages":
        turns = [[{"role": "user", "content": words(rng)}, {"role": "assistant", "content": words(rng)}] for _ in range(n_rows)]
        return Dataset.from_dict({"messages": turns})
    first, second = ("prompt", "completion") if kind == "completion" else ("text", "target")
    return Dataset.from_list([{first: words(rng) + " ", second: words(rng)} for _ in range(n_rows)])


def build(folder, name, kind, *, models=1, parameters=("norm|ln_f",), proj_dim=32, **settings):
    saved = []
    for seed in range(models):
        model = make_model(name, seed=seed)
        model.generation_config.eos_token_id = None  # the tokenizer's is the one that training appends
        model.save_pretrained(folder / f"model-{seed}")
        word_tokenizer().save_pretrained(folder / f"model-{seed}")
        saved.append(folder / f"model-{seed}")
    config = TrakConfig(proj_dim=proj_dim, parameters=parameters, **settings)
    train = rows(kind, 24)
    return AttributionIndex.build(
        folder / "index", models=saved, dataset=train, config=config, shard_rows=10, keep_columns=train.column_names,
        progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """Two checkpoints of a causal language model, and all gradients of its last norm."""
    return build(
        tmp_path_factory.mktemp("causal"), "gpt2 lm", "completion", models=2, parameters=("ln_f",), projector="identity"
    )


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory):
    return build(tmp_path_factory.mktemp("seq2seq"), "t5", "target", parameters=None)


def same_hits(found, expected):
    assert len(found.hits) == 1
    for column in found.hits.column_names:
        one, other = found.hits[0][column], expected[0][column]
        if "score" in column or "output" in column:
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-9)
        elif column != "query_id":
            assert one == other


def greedy(model, ids, n_tokens, end):
    """Return what a model goes on with, without a cache."""
    new = []
    while len(new) < n_tokens and (not new or new[-1] != end):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
    return new


def test_a_given_answer_is_attributed_as_a_row_of_the_training_set(causal, seq2seq):
    for index, row in ((causal, {"prompt": "a b ", "completion": "c d"}), (seq2seq, {"text": "a b ", "target": "c d"})):
        found = index.explain("a b ", answer="c d", top_k=4, progress=False)
        assert found.answer == "c d"
        same_hits(found, index.attribute(Dataset.from_list([row]), 4, progress=False))


def test_the_last_checkpoint_answers_greedily_and_its_tokens_are_attributed(causal):
    folder = causal.folder.parent
    models = [AutoModelForCausalLM.from_pretrained(folder / f"model-{seed}").eval() for seed in (0, 1)]
    before, end = word_tokenizer()("a b ")["input_ids"], word_tokenizer().eos_token_id
    answers = [greedy(model, before, 4, end) for model in models]
    assert answers[0] != answers[1]
    found = causal.explain("a b ", max_new_tokens=4, top_k=24, **PAPER)
    assert found.answer.split() == word_tokenizer().decode(answers[1], skip_special_tokens=True).split()
    other = causal.explain("a b ", max_new_tokens=4, generation={"do_sample": True, "top_k": 50}, top_k=1, **PAPER)
    assert other.hits["proponents"]

    # A part of the answer, by the equation in float64.
    span = range(1, 3)
    found = causal.explain("a b ", max_new_tokens=4, span=span, top_k=24, **PAPER)
    names = [name for name, _ in models[0].named_parameters() if "ln_f" in name]
    ids = torch.tensor([[*before, *answers[1]]])
    labels = torch.full_like(ids, -100)
    labels[0, [len(before) + token for token in span]] = ids[0, [len(before) + token for token in span]]

    def log_odds(model, batch):
        result = torch.log_softmax(model(input_ids=batch["input_ids"]).logits[:, :-1], -1)
        targets = batch["labels"][:, 1:]
        logp = result.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)[targets != -100]
        return (logp - torch.log1p(-logp.exp())).mean()[None], torch.ones(1)

    queries = [gradient_loop(model, {"input_ids": ids, "labels": labels}, log_odds, names)[2].numpy() for model in models]
    stored = [causal.features(member).with_format("numpy") for member in (0, 1)]
    expected = trak_scores(
        [one["trak_features"][:] for one in stored], queries, [one["trak_out_to_loss"][:] for one in stored], PAPER["damping"]
    )[:, 0]
    scores = np.zeros(24)
    scores[found.hits[0]["proponents"]] = found.hits[0]["proponent_scores"]
    np.testing.assert_allclose(scores, expected, atol=1e-5 * np.abs(expected).max())


def test_a_decoder_reads_the_whole_answer_of_which_a_part_is_scored(seq2seq):
    found = seq2seq.explain("a b ", answer="c d e", span="d", progress=False)
    assert found.tokens == [1]
    assert found.pieces == ["c", " d", " e"]
    model = AutoModelForSeq2SeqLM.from_pretrained(seq2seq.folder.parent / "model-0").eval()
    tokenizer = word_tokenizer()
    labels = torch.tensor([tokenizer(text_target="c d e")["input_ids"]])
    with torch.no_grad():
        logp = torch.log_softmax(model(input_ids=torch.tensor([tokenizer("a b ")["input_ids"]]), labels=labels).logits, -1)
    p = logp[0, 1, labels[0, 1]].exp().item()
    assert found.hits[0]["query_output"] == pytest.approx(np.log(p / (1 - p)), rel=1e-4)


def test_what_tokens_add_to_a_score_is_the_score(causal, seq2seq):
    for index in (causal, seq2seq):
        found = index.explain("a b ", answer="c d e f", heat=True, progress=False)
        for kind in ("proponent", "opponent"):
            sums = [sum(found.heat[row]) for row in found.hits[0][f"{kind}s"]]
            scores = found.hits[0][f"{kind}_scores"]
            np.testing.assert_allclose(sums, scores, atol=1e-4 * max(map(abs, scores)))
        assert len(found.tokens) == len(found.heat[found.hits[0]["proponents"][0]])
        assert found.to_html().count('<p class="heat">') == 10


def test_an_answer_is_held_against_another(causal):
    first, second = (causal.explain("a b ", answer=one, top_k=24, **PAPER).hits[0] for one in ("c d", "e f g"))
    found = causal.explain("a b ", answer="c d", contrast="e f g", top_k=24, **PAPER)
    scores = [dict(zip(hit["proponents"], hit["proponent_scores"], strict=True)) for hit in (first, second, found.hits[0])]
    most = max(map(abs, scores[2].values()))
    assert all(scores[2][row] == pytest.approx(scores[0][row] - scores[1][row], abs=1e-4 * most) for row in range(24))
    again = causal.explain("a b ", contrast=("c d", "e f g"), top_k=24, **PAPER)
    assert again.hits[0]["proponents"] == found.hits[0]["proponents"]
    assert "c d (against: e f g)" in repr(found)
    queries = Dataset.from_dict({"prompt": ["a b "], "chosen": ["c d"], "rejected": ["e f g"]})
    hits = causal.attribute(queries, 24, contrast=("chosen", "rejected"), **PAPER)
    same_hits(found, hits)
    same_hits(causal.explain("a b ", answer="c d", top_k=3, **PAPER), causal.attribute(queries, 3, target="chosen", **PAPER))
    for target in ("prediction", 3):
        with pytest.raises(
            ValueError,
            match="no output of this index of causal-lm.*in place of 'completion'; these queries have prompt, chosen",
        ):
            causal.score(queries, target=target)


def test_conversations_are_answered_by_the_chat_template(tmp_path):
    index = build(tmp_path, "llama lm", "messages", proj_dim=16)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "model-0").eval(), word_tokenizer()
    turns = [{"role": "user", "content": "a b"}]
    before = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)["input_ids"]
    found = index.explain("a b", max_new_tokens=5, progress=False)
    assert found.prompt == turns
    expected = greedy(model, before, 5, tokenizer.eos_token_id)
    assert found.answer == tokenizer.decode(expected, skip_special_tokens=True).rstrip()
    same_hits(index.explain(turns, max_new_tokens=5, progress=False), found.hits)
    assert index.explain("a b ", chat=False, answer="c", progress=False).prompt == "a b "
    given = index.explain(turns, answer="c d", progress=False)
    assert given.pieces == ["c", " d", ""]
    assert "user: a b → c d" in repr(given)
    assert "assistant: " in repr(given)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["lora", "prompt tuning"])
def test_an_adapter_answers(tmp_path, kind):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], init_lora_weights=False)
    if kind != "lora":
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    make_model("gpt2 lm").save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    index = AttributionIndex.build(
        tmp_path / "index", models=tmp_path / "adapter", dataset=rows("completion", 12), config=TrakConfig(proj_dim=16),
        processing_class=word_tokenizer(), progress=False,
    )  # fmt: skip
    found = index.explain("a b ", max_new_tokens=3, progress=False)
    ids = greedy(model.eval(), word_tokenizer()("a b ")["input_ids"], 3, word_tokenizer().eos_token_id)
    assert found.answer.split() == word_tokenizer().decode(ids, skip_special_tokens=True).split()


def test_spans_are_characters_substrings_or_tokens():
    model, tokenizer = make_model("gpt2 lm"), byte_tokenizer()
    task = AutoTask.from_model(model, TrakConfig())
    inputs = task.inputs
    object.__setattr__(inputs, "vocabulary", len(tokenizer))
    object.__setattr__(inputs, "n_labels", len(tokenizer))
    object.__setattr__(inputs, "positions", None)
    assert isinstance(task.output_function, TokenOutput)
    answer = Answering(task, tokenizer).given("x", "né été")
    assert answer.text == "né été"
    assert answer.pieces == ["n", "", "é", " ", "", "é", "t", "", "é", ""]
    assert answer.tokens_of("été") == [4, 5, 6, 7, 8]
    assert answer.tokens_of((1, 2)) == [1, 2]
    assert answer.tokens_of(range(8, 10)) == [8, 9]
    assert [place for place, label in enumerate(answer.row([1, 2])["labels"]) if label != -100] == [2, 3]
    for span, says in (
        ("é", "more than once in the answer .* at characters 1 and 3"),
        ("e", "is not in the answer 'né été'"),
        ((2, 9), "characters 0 to 6"),
        (range(9, 11), "tokens 0 to 9"),
    ):
        with pytest.raises(ValueError, match=says):
            answer.tokens_of(span)


def test_a_classifier_explains_its_prediction(tmp_path):
    model = make_model("bert")
    model.config.id2label, model.config.label2id = {0: "bad", 1: "fair", 2: "good"}, {"bad": 0, "fair": 1, "good": 2}
    rng = np.random.default_rng(0)
    train = Dataset.from_list([{"text": words(rng), "label": int(rng.integers(3))} for _ in range(12)])
    index = AttributionIndex.build(
        tmp_path / "index", models=model, dataset=train, config=TrakConfig(proj_dim=16), processing_class=word_tokenizer(),
        keep_columns=["text", "label"], progress=False,
    )  # fmt: skip
    found = index.explain("a b c", progress=False)
    query = Dataset.from_list([{"text": "a b c"}])
    same_hits(found, index.attribute(query, 5, target="prediction", progress=False))
    assert found.answer in ("bad", "fair", "good")
    assert f"Query row      0  [{found.answer}]  a b c" in repr(found)
    assert index.explain("a b c", target=0, progress=False).answer == "bad"
    against = index.explain({"text": "a b c"}, contrast=("good", 0), progress=False)
    assert against.answer == "good against bad"
    same_hits(against, index.attribute(query, 5, contrast=("good", "bad"), progress=False))
    with pytest.raises(ValueError, match="a classifier, which has no use for 'answer', 'span'"):
        index.explain("a", answer="b", span="b")
    with pytest.raises(ValueError, match="reads .* of a row, but .* was given"):
        index.explain(("a", "b"))


def test_a_classifier_of_images_explains_a_file(tmp_path):
    from datasets import Features, Image, Value
    from PIL import Image as Pictures
    from transformers import ViTImageProcessor

    rng = np.random.default_rng(0)
    pictures = [Pictures.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(9)]
    train = Dataset.from_dict(
        {"picture": pictures, "label": [0, 1, 2] * 3}, features=Features({"picture": Image(), "label": Value("int64")})
    )
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    index = AttributionIndex.build(
        tmp_path / "index", models=make_model("vit"), dataset=train, config=TrakConfig(proj_dim=16), processing_class=processor,
        keep_columns=["picture", "label"], progress=False,
    )  # fmt: skip
    pictures[0].save(tmp_path / "one.png")
    found = index.explain(image=tmp_path / "one.png", progress=False)
    same_hits(found, index.attribute(train.select([0]), 5, target="prediction", progress=False))
    assert found.answer in "012"
    assert found.to_html().count("<img") == 11


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"prompt": ""}, "prompt has no token"),
        ({"prompt": "a " * 40}, "leaves no room for an answer"),
        ({"prompt": "a ", "answer": "b " * 40}, "are cut off by"),
        ({"prompt": "a ", "image": "x.png"}, "a language model, which has no use for 'image'"),
        ({"prompt": ["a"]}, "must be a text, or a list of messages"),
        ({"prompt": "a ", "answer": "b", "contrast": "b"}, "another answer than 'b'"),
        ({"prompt": "a ", "answer": "b", "generation": {"top_k": 3}}, "the answer is given"),
        ({"prompt": "a ", "answer": "b", "contrast": "c", "heat": True}, "are of one answer"),
    ],
)
def test_what_cannot_be_explained_is_refused(causal, asked, says):
    with pytest.raises(ValueError, match=says):
        causal.explain(**asked, progress=False)


def test_the_command_line_explains_what_the_api_does(causal, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    asking = ["explain", str(causal.folder), "--prompt", "a b ", "--max_new_tokens", "4", "--top_k", "3"]
    found = causal.explain("a b ", max_new_tokens=4, top_k=3, heat=True, progress=False)
    output = ["--output", str(tmp_path / "hits.jsonl"), "--report", str(tmp_path / "report"), "--heat"]
    assert main([*asking, *output]) == 0
    printed = capsys.readouterr().out
    assert f"Answer: {found.answer}\n\n{found!r}\n" in printed
    assert json.loads((tmp_path / "hits.jsonl").read_text()) == found.hits[0]
    assert (tmp_path / "report" / "report.html").read_text().count('<p class="heat">') == 6
    assert main([*asking, "--answer", "c d e", "--span_tokens", "1", "2", "--contrast", "f"]) == 1
    assert "`span` and `heat` are of one answer" in capsys.readouterr().err
    assert main([*asking, "--text", "a"]) == 1
    assert "or --image with --prompt or --messages; given are --prompt, --text." in capsys.readouterr().err
