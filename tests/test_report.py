"""Reports show what they were given: escaped, inlined, and in three forms."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf_trak.querying.examples import Attribution, Control, Example, ExampleReader, Hit, read_attributions
from hf_trak.querying.report import save_png, save_report, suspects_table, table
from hf_trak.querying.report_page import html_page

NASTY = '<script>alert(1)</script> & "quoted" $x^2$ {braces} é 好'


def text_attribution() -> Attribution:
    return Attribution(
        Example(3, label="positive", text=NASTY),
        -1.5,
        [Hit(Example(7, label="<b>negative</b> $x", text="a film\nof two lines", note="flipped, truly positive"), 0.25)],
        [Hit(Example(11, text="word " * 1000), -0.0000125)],
    )


def image_attribution(mode: str = "L", side: int = 8) -> Attribution:
    image = Image.new(mode, (side, side), 1)
    hits = [Hit(Example(row, label=str(row), image=image), 0.1) for row in range(3)]
    return Attribution(Example(0, label="2", image=image), 2.0, hits, hits[:1])


class Checker(HTMLParser):
    """Fails on tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.scripts = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts += data


def test_table_has_a_line_per_hit() -> None:
    lines = table([text_attribution(), image_attribution()]).splitlines()
    assert lines[0].startswith("Query row      3  [positive]  <script>alert(1)</script>")
    assert lines[0].endswith("output -1.50")
    assert lines[1] == "  +      +0.25   row      7  [<b>negative</b> $x]  (flipped, truly positive)  a film\\nof two lines"
    assert lines[2].startswith("  -  -1.25e-05   row     11  word word")
    assert max(map(len, lines)) <= 110
    assert len(lines) == 3 + 1 + 5


def test_table_shows_the_output_of_a_long_query() -> None:
    attribution = Attribution(Example(0, text="word " * 100), 3.0)
    assert table([attribution]).endswith("...   output +3.00")


def test_suspects_are_listed_with_scores() -> None:
    lines = suspects_table([Hit(Example(5, label="cat"), 0.5)]).splitlines()
    assert lines[1].split() == ["0.5", "row", "5", "[cat]"]


def test_html_is_escaped_well_formed_and_self_contained() -> None:
    page = html_page([text_attribution(), image_attribution()], title="<T>", intro="1 < 2", suspects=[Hit(Example(9), 0.5)])
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.seen.count("script") == 1
    digest = base64.b64encode(hashlib.sha256(checker.scripts.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert "alert" not in checker.scripts
    assert "<script" not in html_page([text_attribution()], title="t", interactive=False)
    assert "b" not in checker.seen
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quoted&quot; $x^2$ {braces} é 好" in page
    assert "<h1>&lt;T&gt;</h1>" in page
    assert "1 &lt; 2" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "color-scheme: light dark" in page
    assert "+0.25" in page
    assert "row 9" in page
    assert page.count('class="card pro"') == 4
    assert page.count('class="card con"') == 2


def test_bars_have_one_scale_and_controls_links_and_trust_are_shown() -> None:
    first = text_attribution()
    control = Control("1 - p: <hard>", [Hit(Example(5, label="other"), -0.5), Hit(Example(6), 0.125)])
    linked = Hit(Example(7, link='https://huggingface.co/datasets/a/b?row=7&"'), 0.25)
    page = html_page(
        [replace(first, controls=[control]), replace(first, proponents=[linked])], title="t", trust=["of <one> run"]
    )
    assert re.findall(r"width: ([\d.]+)%", page.split("<main>")[1]) == ["50.0", "0.0", "100.0", "25.0", "50.0", "0.0"]
    assert "A full bar is a score of 0.5," in page
    assert "<h3>1 - p: &lt;hard&gt;</h3>" in page
    assert '<a href="https://huggingface.co/datasets/a/b?row=7&amp;&quot;" rel="noreferrer">row 7</a>' in page
    foot = page[page.index("How far to trust this") :]
    assert "of &lt;one&gt; run" in foot
    assert "hf-trak evaluate lds" in foot


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_images_of_every_mode_are_inlined(mode: str) -> None:
    page = html_page([image_attribution(mode, side=300)], title="t")
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(found) == 5
    assert max(Image.open(io.BytesIO(base64.b64decode(found[0]))).size) == 256


@pytest.mark.parametrize("attributions", [[text_attribution()], [image_attribution(), image_attribution("RGB", 100)], []])
def test_report_is_a_page_and_a_picture(tmp_path: Path, attributions: list[Attribution]) -> None:
    pytest.importorskip("matplotlib")
    picture, page = save_report(attributions, tmp_path / "new" / "folder", title="Title")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    image = Image.open(picture)
    assert image.format == "PNG"
    assert image.convert("L").getextrema() != (255, 255)


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf-trak\[demo\]"):
        save_png([image_attribution()], tmp_path / "a.png")


# From rows to examples


def test_examples_are_found_by_type_and_name() -> None:
    features = Features({"a": Value("string"), "b": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"a": ["one"], "b": ["two"], "label": [1]}, features=features)
    reader = ExampleReader(rows, notes={0: "odd"})
    assert reader[0] == Example(0, label="yes", text="one  |  two", note="odd")
    assert ExampleReader(rows, text_columns=("b",))[0].text == "two"


def test_images_are_read() -> None:
    features = Features({"picture": ImageFeature(), "labels": Value("int64")})
    rows = Dataset.from_dict({"picture": [Image.new("L", (4, 4))], "labels": [3]}, features=features)
    example = ExampleReader(rows)[0]
    assert example.label == "3"
    assert example.image is not None
    assert example.image.size == (4, 4)


def test_rows_without_data_are_numbers() -> None:
    assert ExampleReader(None)[4] == Example(4)
    assert ExampleReader(Dataset.from_dict({"input_ids": [[5, 6]]}))[0].text == "tokens 5 6"


def test_hits_are_joined_with_their_rows() -> None:
    rows = Dataset.from_dict({"text": ["a", "b", "c"]})
    hits = Dataset.from_dict(
        {
            "query_id": [0, 1],
            "query_output": [0.5, -0.5],
            "proponents": [[2, 0], [1, 2]],
            "proponent_scores": [[0.9, 0.8], [0.7, 0.6]],
            "opponents": [[1, 0], [0, 2]],
            "opponent_scores": [[-0.9, -0.8], [-0.7, -0.6]],
        }
    )
    (attribution,) = read_attributions(hits, ExampleReader(rows), ExampleReader(rows), rows=[1], top_k=1)
    assert attribution == Attribution(
        Example(1, text="b"), -0.5, [Hit(Example(1, text="b"), 0.7)], [Hit(Example(0, text="a"), -0.7)]
    )
