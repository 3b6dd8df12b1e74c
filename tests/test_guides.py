"""Every block of code of the tours and guides runs as printed, on tiny models; and the site's links, pages and generated tables are whole."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from models import bert, make_model
from pairs_for_tests import pair_rows, save_dual_encoder
from test_image_text import picture, save_llava
from test_image_text import rows as picture_rows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers_for_tests import word_tokenizer
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from hf_trak import AttributionIndex
from hf_trak.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?:<!-- (example|not run): ([^>]*) -->\n)?```(python|bash)\n(.*?)```", re.DOTALL)
RUN_ELSEWHERE = {"guides/custom_tasks.md", "guides/hub.md"}  # tests/test_custom_task_examples.py, tests/test_hub_load.py
WORDS = ["a", "fine", "story", ",", "well", "told", "dull", "film", "plot", "scene", "good", "bad"]

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pages(*folders):
    return [path.relative_to(DOCS).as_posix() for name in folders for path in sorted((DOCS / name).glob("*.md"))]


def blocks(page):
    """Return (kind, name, language, code) of every block of a page."""
    return [match.groups() for match in BLOCK.finditer((DOCS / page).read_text(encoding="utf-8"))]


def run(page, **names):
    """Run the blocks of a page that are examples, one after another, and return the names that they left."""
    for kind, name, language, code in blocks(page):
        if kind != "example":
            continue
        if language == "python":
            exec(compile(shrink(code), f"{page} ({name})", "exec"), names)
        else:
            run_shell(code)
    return SimpleNamespace(**names)


def run_shell(code):
    """Run the commands of a block, here instead of on a shared disk."""
    for line in os.path.expandvars(code).replace("/shared/", "shared/").replace("\\\n", " ").splitlines():
        if line.startswith("hf-trak featurize"):
            line += " --proj_dim 64"
        if not line.startswith("#"):
            assert main(shlex.split(line)[1:]) == 0, line


def shrink(code):
    """Make projections small enough for tiny models; nothing else of the code is changed."""
    code = re.sub(r"bank_size=\d+", "bank_size=8", re.sub(r"proj_dim=\d+", "proj_dim=64", code))
    return code.replace("dataset=train, keep", "dataset=train, config=TINY, keep").replace(
        "dataset=train)", "dataset=train, config=TINY)"
    )


def tiny():
    from hf_trak import TrakConfig

    return TrakConfig(proj_dim=64)


def save_classifier(folder):
    """Save a tiny BERT with a tokenizer of a few words, and reviews to train and ask it with."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}, "[UNK]"))
    backend.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    bert(num_labels=2).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    generator = np.random.default_rng(0)
    for name, n_rows in (("train", 60), ("validation", 12)):
        texts = [" ".join(generator.choice(WORDS, 5)) for _ in range(n_rows)]
        Dataset.from_dict({"text": texts, "label": generator.integers(0, 2, n_rows).tolist()}).to_parquet(f"{name}.parquet")


@pytest.mark.parametrize("page", ["guides/label_errors.md", "guides/choose_data.md"])
def test_guides_on_classifiers_run_as_printed(page):
    save_classifier(Path("my-bert"))
    names = run(page, TINY=tiny())
    if page == "guides/label_errors.md":
        assert len(names.suspects) == 3
        assert {"score", "evidence", "doubt", "given_label", "suggested_label", "text"} <= set(names.suspects.column_names)
        assert len(names.cleaned) == 57
    else:
        assert names.effect.shape == (60,)
        assert names.effect[names.most_helpful[0]] == names.effect.max()
        assert len(names.pruned) == 50
        assert len(Dataset.from_parquet(str(next(Path("subset").rglob("*.parquet"))))) == 3


def test_the_guide_to_a_prediction_runs_as_printed():
    save_classifier(Path("my-bert"))
    base = BertForSequenceClassification.from_pretrained("my-bert").bert
    torch.nn.init.zeros_(base.pooler.dense.weight)  # the final model has learned something since
    base.save_pretrained("google-bert/bert-base-uncased")
    names = run("guides/explain_prediction.md", TINY=tiny())
    assert len(names.hit["proponents"]) == 5
    assert names.scores.shape == (60, 12)
    assert (Path("report") / "report.html").exists()
    assert names.trainer.args.base == "initial"
    assert len(names.better.members) == 3


def test_the_guide_to_processes_runs_its_jobs_as_printed(monkeypatch):
    save_classifier(Path("my-bert"))
    jobs, merge = (code for kind, _, _, code in blocks("guides/processes.md") if kind == "example")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    for job in ("1", "0"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", job)
        run_shell(jobs)
    run_shell(merge)
    assert AttributionIndex.from_pretrained("shared/my-index").members[0].n_rows == 60


def test_the_guide_to_the_explorer_runs_as_printed():
    pytest.importorskip("gradio")
    save_classifier(Path("my-bert"))
    run("guides/explore.md")
    assert Path("my-explorer/app.py").exists()


def test_the_guide_to_language_models_runs_as_printed():
    torch.manual_seed(0)
    make_model("llama lm").save_pretrained("my-chatbot")
    word_tokenizer().save_pretrained("my-chatbot")
    generator = np.random.default_rng(0)
    chats = [
        [{"role": role, "content": " ".join(generator.choice(list("abcdefghij"), 3))} for role in ("user", "assistant")]
        for _ in range(12)
    ]
    Dataset.from_dict({"messages": chats}).to_json("chat.jsonl")
    names = run("guides/language_models.md", TINY=tiny())
    assert [message["role"] for message in names.hits[0]["proponent_messages"][0]] == ["user", "assistant"]


def test_the_guide_to_questions_runs_as_printed():
    save_classifier(Path("my-bert"))
    make_model("llama lm").save_pretrained("my-chatbot")
    word_tokenizer().save_pretrained("my-chatbot")
    chat = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e"}]
    Dataset.from_dict({"messages": [chat, [*chat, *chat]] * 6}).to_json("chat.jsonl")
    names = run("guides/questions.md", TINY=tiny())
    assert names.behaviour.shape == (60, 1)
    assert len(names.preferred["proponents"][0]) == 3
    assert (Path("heat-report") / "report.html").read_text().count('<p class="heat">') == 10


def test_the_guide_to_documents_runs_as_printed():
    make_model("llama lm", seed=0).save_pretrained("my-decoder")
    word_tokenizer().save_pretrained("my-decoder")
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(list("abcdefghij"), size)) for size in (40, 12, 25, 60, 8)]
    Dataset.from_dict({"title": [f"book {i}" for i in range(5)], "text": texts}).to_parquet("books.parquet")
    names = run("guides/documents.md", TINY=tiny())
    assert names.index.n_rows == 13
    assert names.scores.shape == (5, 1)
    assert sorted(names.by_document.hits[0]["proponents"]) == list(range(5))
    assert (names.first.n_rows, len(names.first.kept_rows.take(range(12)).unique("document_id"))) == (12, 4)
    assert (len(names.matched), names.trainer.index.n_rows) == (1, 4)
    assert 'class="around"' in (Path("book-report") / "report.html").read_text()


def test_the_guide_to_pictures_runs_as_printed():
    save_llava(Path("my-vlm"))
    picture_rows(6).to_parquet("vqa.parquet")
    picture(1).save("photo.png")
    names = run("guides/pictures.md", TINY=tiny())
    assert len(names.hits[0]["proponent_completion"]) == 3
    assert names.given.heat
    assert (Path("vqa-report") / "report.html").read_text().count("<img") == 5 + 3 * 2  # two rows of each of three controls


def test_the_guide_to_pairs_runs_as_printed():
    save_dual_encoder(Path("my-clip"))
    pair_rows(12).to_parquet("pairs.parquet")
    names = run("guides/clip.md", TINY=tiny())
    assert len(names.hits[0]["proponent_caption"]) == 5


def test_the_guide_to_facts_runs_as_printed():
    torch.manual_seed(0)
    make_model("t5").save_pretrained("my-mt5")
    word_tokenizer().save_pretrained("my-mt5")
    generator = np.random.default_rng(0)
    sentences = [f"{' '.join(generator.choice(list('abcdefghij'), 4))} <extra_id_0>" for _ in range(12)]
    answers = [f"<extra_id_0> {generator.choice(list('abcdefghij'))}" for _ in range(12)]
    Dataset.from_dict({"inputs": sentences, "targets": answers}).to_json("facts.jsonl")
    names = run("guides/trace_a_fact.md", TINY=tiny())
    assert len(names.hits[0]["proponent_inputs"]) == 5


@pytest.mark.slow
def test_the_tour_of_images_runs_as_printed():
    pytest.importorskip("sklearn")
    names = run("start/images.md")
    assert names.scores.shape == (1697, 100)
    assert len(names.hits[0]["proponents"]) == 5
    assert len(set(names.suspicious)) == 10


@pytest.mark.slow
def test_the_tour_of_text_and_the_readmes_example_run_as_printed(capsys):
    assert main(["demo", "text"]) == 0
    assert "Try next:" in capsys.readouterr().out
    names = run("start/text.md")
    assert len(names.hits[0]["proponent_text"]) == 3
    assert len(names.suspects) == 20
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    capsys.readouterr()
    exec(compile(code.replace('"my-index"', '"another-index"'), "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 7


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run_from_top_to_bottom(path, monkeypatch):
    plots = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plots, "show", plots.close)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert all(cell["outputs"] for cell in cells if cell["cell_type"] == "code" and "print(" in "".join(cell["source"]))
    names: dict = {}
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("!hf-trak"):
            assert main(shlex.split(source.split("2>")[0])[1:]) == 0
        elif cell["cell_type"] == "code":
            exec(compile(source, f"{path.name}, cell {number}", "exec"), names)


# The site


@pytest.mark.parametrize("page", pages("start", "guides"))
def test_every_block_is_run_or_says_why_not(page):
    if page in RUN_ELSEWHERE:
        return
    unmarked = [code for kind, _, _, code in blocks(page) if kind is None and not re.fullmatch(r"(hf-trak demo.*\n)+", code)]
    assert not unmarked, f"{page}: mark it `<!-- example: NAME -->` or `<!-- not run: WHY -->`: {unmarked[0]}"


@pytest.mark.parametrize("page", pages("evidence", "evidence/plots"))
def test_evidence_has_at_most_five_rows_of_a_table_in_view(page):
    text = re.sub(r"<details.*?</details>", "\n", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    long = [table.splitlines()[0] for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE) if table.count("\n") > 2 + 5]
    assert not long, f"put these tables of {page} behind <details>: {long}"


@pytest.mark.parametrize("module", ["hf_trak", "hf_trak.evaluation", "hf_trak.plots"])
def test_the_reference_has_every_public_name(module):
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    names = set(importlib.import_module(module).__all__) - {"PLOTS"}  # which the page shows in use
    assert names == {name for name in names if re.search(rf"^::: {module}\.{name}$", page, re.MULTILINE)}


def anchors(path):
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).strip().replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere():
    generated = {DOCS / "reference" / name for name in ("commands.md", "configuration.md")}
    broken = []
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]:
        text = re.sub(r"```.*?```|`[^`]*`|<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
        for link in links:
            target, _, anchor = link.partition("#")
            there = (path.parent / target).resolve() if target else path
            if link.startswith("http") or there in generated:
                continue
            if not there.exists() or (anchor and anchor not in anchors(there)):
                broken.append(f"{path.relative_to(ROOT)}: {link}")
    assert not broken, "\n".join(broken)


def test_every_page_is_in_the_navigation():
    def listed(entries):
        for entry in entries:
            value = next(iter(entry.values())) if isinstance(entry, dict) else entry
            yield from listed(value) if isinstance(value, list) else [value]

    named = list(listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(named) == sorted([*there, "reference/commands.md", "reference/configuration.md"])


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_commands_has_every_command_and_its_flags(hooks):
    page = hooks.commands_page()
    assert set(re.findall(r"^## hf-trak ([a-z-]+)", page, re.MULTILINE)) == set(COMMANDS)
    featurize = page.split("## hf-trak featurize\n")[1].split("\n## ")[0]
    assert "| `--model` |" in featurize
    assert "| `--seed` | Seed of the split, the flips, the training and the sketch. | `0` |" in page


def test_the_page_of_fields_has_every_field_of_ours_and_none_of_transformers(hooks):
    from dataclasses import fields

    from hf_trak import TrakConfig
    from hf_trak.feature_args import FeatureArguments

    page = hooks.configuration_page()
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert {field.name for kind in (TrakConfig, FeatureArguments) for field in fields(kind)} <= rows
    assert "learning_rate" not in rows


def test_every_message_on_the_page_of_errors_is_said_somewhere():
    source = " ".join(re.sub(r'"\s*f?"', "", path.read_text(encoding="utf-8")) for path in (ROOT / "hf_trak").rglob("*.py"))
    parts = re.findall(r"^`(.*)`$", (DOCS / "reference" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(parts) >= 20
    assert not [part for part in parts if part not in source]


def test_the_readme_is_short():
    text = re.sub(r"<!--.*?-->|<[^>]+>|\]\([^)]*\)", " ", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(re.findall(r"[^\s|`*]*\w[^\s|`*]*", text)) <= 900
    assert len(re.findall(r"^\|(?:-+\|)+$", text, re.MULTILINE)) <= 3
