"""The explorer and a report in a real browser: what a person does with them, by mouse and by keyboard, wide and narrow, light and dark.

Screenshots are kept in the folder that HF_TRAK_SCREENSHOTS names, if it is set.
"""

import dataclasses
import importlib.util
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk
from explorer_for_tests import (
    HOSTILE,
    NAMES,
    save_language_index,
    save_pairs_index,
    save_picture_index,
    save_text_index,
    text_rows,
)
from PIL import Image as Pictures
from test_report import NASTY, text_attribution

from hf_trak import AttributionIndex
from hf_trak.explorer.app import serve
from hf_trak.explorer.labels import LabelDesk
from hf_trak.explorer.views import Explorer
from hf_trak.querying.examples import Control, Example, Hit
from hf_trak.querying.report_page import html_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright", "axe_playwright_python") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; pip install -c constraints.txt -e '.[dev]'"
    ),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
SCREENSHOTS = os.environ.get("HF_TRAK_SCREENSHOTS")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    index = AttributionIndex(save_text_index(tmp_path_factory.mktemp("explorer")))
    return Explorer(index, validation=text_rows(6, seed=1))


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def address(explorer, export):
    with serve(explorer, export) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context_of(browser):
    """Windows of the browser by their kind, kept so that the page's scripts are loaded once."""
    made = {}

    def context_of(width, dark):
        if (width, dark) not in made:
            scheme = "dark" if dark else "light"
            view = {"width": width, "height": 900}
            made[width, dark] = browser.new_context(viewport=view, color_scheme=scheme, reduced_motion="reduce")
        return made[width, dark]

    return context_of


@pytest.fixture
def visit(context_of, request):
    """Opens views of an explorer, by default the texts'; at the end, there must have been no error, and no request to another server."""
    said, pages = [], []

    def visit(link="", *, width=1200, dark=False, at=None):
        address = request.getfixturevalue("address") if at is None else at
        page = context_of(width, dark).new_page()
        pages.append(page)
        page.set_default_timeout(60_000)
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
        page.on("request", lambda asked: None if is_here(asked.url, address) else said.append(f"request to {asked.url}"))
        page.goto(f"{address}{link}")
        page.get_by_role("heading", name="hf_trak explorer").wait_for()
        return page

    yield visit
    for number, page in enumerate(pages):
        if SCREENSHOTS is not None:
            Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
            name = re.sub(r"\W+", "_", request.node.name).strip("_")
            page.screenshot(path=f"{SCREENSHOTS}/{name}_{number}.png", full_page=True)
        page.close()
    assert not said


def is_here(url, address):
    return url.startswith((address, address.replace("http", "ws", 1), "data:", "blob:"))


def text_of(page, heading="Answer"):
    """Return what a view shows, when it is there."""
    found = page.locator(".hf-trak").filter(has=page.get_by_role("heading", name=heading, exact=True))
    found.wait_for()
    return found.inner_text()


def test_a_row_and_a_typed_text_are_answered_and_classes_toggled(visit, explorer):
    page = visit()
    page.get_by_label("validation").check()
    page.get_by_label("Row", exact=True).fill("2")
    page.get_by_role("button", name="Ask", exact=True).click()
    said = text_of(page)
    hits = explorer.ask_row("validation", 2).attribution
    assert f"{hits.proponents[0].score:+.3g} · row {hits.proponents[0].example.row}" in said
    assert NAMES[1] in said or NAMES[0] in said or NAMES[2] in said
    page.get_by_label("What made the model say").click()
    page.get_by_role("option", name=NAMES[1]).click()
    hits = explorer.ask_row("validation", 2, target=NAMES[1]).attribution
    page.get_by_text(f"output {hits.output:+.2f}").wait_for()
    page.get_by_label("text", exact=True).check()
    page.get_by_label("Text", exact=True).fill("a b c")
    page.get_by_role("button", name="Ask", exact=True).click()
    hits = explorer.ask_texts(["a b c"], target=NAMES[1]).attribution
    page.get_by_text(f"output {hits.output:+.2f}").wait_for()


def test_a_hostile_text_is_shown_and_not_run(visit):
    page = visit()
    text = f"{HOSTILE}<script>alert(3)</script>\"'&amp;"
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Ask", exact=True).click()
    assert "<script>alert(3)</script>\"'&amp;" in text_of(page)
    assert page.locator(".hf-trak img, .hf-trak script").count() == 0


def test_labels_are_mended_and_exported(visit, explorer, export):
    page = visit()
    page.get_by_role("tab", name="Label errors").click()
    page.get_by_role("button", name="Find labels that look wrong").click()
    page.get_by_text("1 of 24").wait_for()
    first = LabelDesk(explorer).suspects()[0]
    other = next(name for name in NAMES if name != first.given)
    page.get_by_label("Right label").click()
    page.get_by_role("option", name=other).click()
    page.get_by_role("button", name="Fix: set").click()
    page.get_by_text("2 of 24").wait_for()
    page.get_by_role("button", name="Drop the row").click()
    page.get_by_text("3 of 24").wait_for()
    page.get_by_role("button", name="Export").click()
    page.get_by_text("2 decisions, applied").wait_for()
    (folder,) = export.glob("fixed_*")
    assert len(load_from_disk(str(folder))) == 23
    page.get_by_role("button", name="Previous").click()
    page.get_by_text("decided: drop the row").wait_for()


def test_each_view_has_a_link_that_opens_it_again(visit, explorer):
    page = visit()
    page.get_by_role("tab", name="Helpful and harmful").click()
    page.get_by_role("button", name="Find the training rows").click()
    said = text_of(page, "Training rows")
    found = explorer.influence("validation", 100, top_k=6)
    assert f"{found.best[0].score:+.3g} · row {found.best[0].example.row}" in said
    rows = page.get_by_role("link", name="link to this view").get_attribute("href")
    asked = explorer.ask_texts(["a <b> & c"], target=NAMES[0], top_k=3)
    labels = "?view=labels&place=3"
    for link, heading, wanted in (
        (rows, "Training rows", said),
        (f"?{asked.link}", "Answer", f"output {asked.attribution.output:+.2f}"),
    ):
        assert wanted in text_of(visit(link), heading)
    page = visit(labels)
    page.get_by_text("3 of 24").wait_for()
    page = visit("?view=about")
    page.get_by_role("button", name="Show the spectrum").click()
    page.get_by_role("img", name="Spectrum").wait_for()


def test_the_keyboard_is_enough(visit):
    page = visit()

    def tab_to(name):
        for _ in range(40):
            page.keyboard.press("Tab")
            label = page.evaluate(
                "() => { const e = document.activeElement; return (e.getAttribute('aria-label') || e.innerText || (e.labels && e.labels[0]"
                " && e.labels[0].innerText) || '').trim() }"
            )
            if label.startswith(name):
                return
        raise AssertionError(f"{name} is not reached by the tab key")

    tab_to("Text")
    page.keyboard.type("a b")
    tab_to("Ask")
    page.keyboard.press("Enter")
    assert "Proponents" in text_of(page)
    page.keyboard.press("Shift+Tab")
    page.get_by_role("tab", name="Ask").focus()
    tab_to("Label errors")
    page.keyboard.press("Enter")
    tab_to("Find labels")
    page.keyboard.press("Enter")
    page.get_by_text("1 of 24").wait_for()
    tab_to("Accept")
    page.keyboard.press("Enter")
    page.get_by_text("2 of 24").wait_for()


@pytest.mark.parametrize(("width", "dark"), [(400, True), (1200, False)])
def test_views_fit_and_are_readable(visit, width, dark):
    """Nothing is wider than the window, colours follow the system, and an audit of accessibility finds nothing serious."""
    page = visit("?view=ask&source=validation&row=1", width=width, dark=dark)
    text_of(page)
    audit(page)
    red, green, blue = map(int, re.findall(r"\d+", page.evaluate("() => getComputedStyle(document.body).backgroundColor"))[:3])
    assert (red + green + blue < 3 * 128) == dark
    for tab, button, there in (
        ("Helpful and harmful", "Find the training rows", "Useless"),
        ("Label errors", "Find labels", "1 of 24"),
        ("About the index", "Show the spectrum", "eigenvalues are above"),
    ):
        if not page.get_by_role("tab", name=tab).is_visible():
            page.locator("button.overflow-menu, .overflow-menu button").first.click()
            page.get_by_role("button", name=tab).click()
        else:
            page.get_by_role("tab", name=tab).click()
        page.get_by_role("button", name=button).click()
        page.get_by_text(there).first.wait_for()
        audit(page)


def test_a_picture_is_uploaded(visit, tmp_path):
    index, train = save_picture_index(tmp_path)
    explorer = Explorer(AttributionIndex(index), train=train)
    picture = Pictures.fromarray(np.random.default_rng(5).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    with serve(explorer, tmp_path / "export") as address:
        page = visit(at=address)
        page.locator("input[type=file]").set_input_files(tmp_path / "picture.png")
        page.get_by_label("Remove Image").wait_for()
        page.get_by_role("button", name="Ask", exact=True).click()
        said = text_of(page)
        assert page.locator(".hf-trak img").count() == 11
        audit(page)
    for hit in explorer.ask_image(picture).attribution.proponents:
        assert f"{hit.score:+.3g} · row {hit.example.row}" in said


@pytest.mark.slow
def test_a_picture_with_its_caption_is_asked_about_from_a_side(visit, tmp_path):
    index, rows = save_pairs_index(tmp_path)
    explorer = Explorer(AttributionIndex(index))
    rows[3]["image"].save(tmp_path / "picture.png")
    with serve(explorer, tmp_path / "export") as address:
        page = visit(at=address)
        page.locator("input[type=file]").set_input_files(tmp_path / "picture.png")
        page.get_by_label("Remove Image").wait_for()
        page.get_by_role("textbox", name="Caption").fill(rows[3]["caption"])
        page.get_by_label("image", exact=True).check()
        page.get_by_role("button", name="Ask", exact=True).click()
        said = text_of(page)
        audit(page)
    hit = explorer.ask_pair(rows[3]["image"], rows[3]["caption"], direction="image").attribution.proponents[0]
    assert f"{hit.score:+.3g} · row {hit.example.row}" in said
    assert hit.example.text in said


@pytest.mark.slow
def test_a_prompt_is_answered_a_span_is_highlighted_and_an_answer_held_against_another(visit, tmp_path):
    explorer = Explorer(AttributionIndex(save_language_index(tmp_path)))
    with serve(explorer, tmp_path / "export") as address:
        page = visit(at=address)
        page.get_by_label("Prompt", exact=True).fill("a b c ")
        page.get_by_label("Answer (empty").fill("a b")
        page.get_by_label("Attribute only this part").fill("b")
        page.get_by_label("Highlight what each token").check()
        page.get_by_role("button", name="Ask", exact=True).click()
        found = explorer.ask_prompt("a b c ", answer="a b", span="b", heat=True).attribution
        assert f"{found.proponents[0].score:+.3g} · row {found.proponents[0].example.row}" in text_of(page)
        assert page.locator(".heat").count() == len(found.proponents) + len(found.opponents)
        audit(page)
        page.get_by_label("Highlight what each token").uncheck()
        page.get_by_label("Attribute only this part").fill("")
        page.get_by_label("Against this answer").fill("c d")
        page.get_by_role("button", name="Ask", exact=True).click()
        found = explorer.ask_prompt("a b c ", answer="a b", against="c d").attribution
        page.get_by_text("against: c d").wait_for()
        assert f"{found.proponents[0].score:+.3g} · row {found.proponents[0].example.row}" in text_of(page)


@pytest.mark.parametrize(("scripts", "dark"), [(True, False), (False, True)])
def test_a_report_is_read_without_network_or_scripts_and_sorted_and_filtered_with_them(browser, tmp_path, scripts, dark):
    control = Control("Random rows", [Hit(Example(2, label="positive", text="of the control"), 0.01)])
    first = dataclasses.replace(text_attribution(), controls=[control])
    hits = [Hit(Example(row, label=label, text=f"text {row}"), score) for row, label, score in ((5, "b", 3.0), (4, "a", 2.0))]
    pages = [first, dataclasses.replace(first, query=Example(9, text="another"), output=-7.0, proponents=hits)]
    report = tmp_path / "report.html"
    report.write_text(html_page(pages, title="Report"), encoding="utf-8")
    said = []
    scheme = "dark" if dark else "light"
    context = browser.new_context(
        java_script_enabled=scripts, color_scheme=scheme, offline=True, viewport={"width": 400, "height": 900}
    )
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: None if asked.url == report.as_uri() else said.append(asked.url))
    page.goto(report.as_uri())
    assert NASTY in page.inner_text("body")
    assert page.get_by_text("How far to trust this").is_visible()
    assert not page.get_by_text("of the control").first.is_visible()
    page.get_by_text("Controls: rows that").first.click()
    page.get_by_text("of the control").first.wait_for()
    assert page.locator(".tools").count() == scripts
    if scripts:
        audit(page)
        page.get_by_label("Order of rows").select_option("row")
        said_rows = page.locator("section").nth(1).locator(".row").first.locator(".meta").all_inner_texts()
        assert said_rows == ["+2 · row 4", "+3 · row 5"]
        page.get_by_label("Order of queries").select_option("output, lowest first")
        assert page.locator("section").first.locator(".query").inner_text().startswith("another")
        page.get_by_label("Rows with the words").fill("TEXT 4")
        assert page.locator(".card:visible").count() == 1
        assert page.get_by_role("status").inner_text() == "1 of 7 rows are shown."
        page.get_by_label("Rows with the words").fill("")
        page.get_by_label("Label", exact=True).select_option("b")
        assert page.locator(".card:visible").all_inner_texts()[0].startswith("b")
    page.emulate_media(media="print")
    assert not page.locator(".tools").is_visible()
    context.close()
    assert not said


SETTLED = """() => [...document.querySelectorAll(".hf-trak")].every(element => {
  for (let node = element; node; node = node.parentElement) if (getComputedStyle(node).opacity !== "1") return false;
  return true;
})"""


def audit(page):
    page.wait_for_function(SETTLED)  # what is replaced fades for a moment
    assert page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    if not page.evaluate("() => 'axe' in window"):
        axe = Path(importlib.util.find_spec("axe_playwright_python").origin).parent / "axe.min.js"
        page.evaluate(axe.read_text(encoding="utf-8"))
    found = page.evaluate("async () => (await axe.run(document)).violations")
    serious = [
        f"{rule['id']}: {node['html'][:200]}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]
    assert not serious, "\n".join(serious[:10])
