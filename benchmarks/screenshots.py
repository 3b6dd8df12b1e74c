"""The pictures of the README and of the guide to the explorer, in a headless Chromium.

    hf-trak demo && hf-trak demo text
    hf-trak attribute hf_trak_demo_text/run/index --queries hf_trak_demo_text/validation.parquet --top_k 3 --output hits.jsonl --report report
    python benchmarks/screenshots.py --text report/report.html --images hf_trak_demo/report.html
    python benchmarks/screenshots.py --explorer hf_trak_demo_text/run/index --validation hf_trak_demo_text/validation.parquet

Writes docs/assets/report_{text,images}_{light,dark}.png, or docs/assets/explorer{,_rows}.png. Needs Chromium, pillow to shrink the files, and
for the explorer gradio and playwright.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
WIDTH, TALLEST = 1160, 1400
SCHEMES = {"dark": 0, "light": 1}  # Chromium's numbers
VIEWS = {  # of the explorer: what is opened, in which scheme, and the heading of what it shows
    "explorer": ("?view=ask&source=validation&row=4&target=prediction&top_k=3", "light", "Answer"),
    "explorer_rows": ("?view=rows&source=validation&first=100&target=label&top_k=3", "dark", "Training rows"),
}


def one_section(page: str, number: int) -> str:
    """Return a report with its title and one of its sections."""
    before, *sections = re.split(r"(?=<section[ >])", page)
    return before + sections[number].split("</section>")[0] + "</section>\n</body>\n</html>\n"


def shoot(page: str, target: Path, scheme: str, chromium: str) -> None:
    """Save a picture of a page, cut below its last line."""
    with tempfile.TemporaryDirectory() as folder:
        html, png = Path(folder) / "page.html", Path(folder) / "page.png"
        html.write_text(page, encoding="utf-8")
        subprocess.run(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1.5",
                f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--window-size={WIDTH},{TALLEST}", f"--screenshot={png}",
                html.as_uri(),
            ],
            check=True,
            capture_output=True,
        )  # fmt: skip
        picture = Image.open(png).convert("RGB")
    save_cut(picture, target)


def save_cut(picture: Image.Image, target: Path) -> None:
    """Save a picture without what is empty below its last line, in few colours."""
    empty = Image.new("RGB", picture.size, picture.getpixel((2, picture.height - 2)))
    found = ImageChops.difference(picture, empty).getbbox()
    if found is None:
        raise ValueError(f"{target.name}: the page is empty.")
    picture.crop((0, 0, picture.width, min(picture.height, found[3] + 24))).quantize(48).save(target, optimize=True)


def shoot_explorer(index: str, validation: str, chromium: str) -> None:
    """Save the explorer's pictures."""
    from playwright.sync_api import sync_playwright

    from hf_trak import AttributionIndex
    from hf_trak.cli.data import load_rows
    from hf_trak.explorer.app import serve
    from hf_trak.explorer.views import Explorer

    explorer = Explorer(AttributionIndex.from_pretrained(index), validation=load_rows(validation, split="validation"))
    with tempfile.TemporaryDirectory() as folder, serve(explorer, folder) as address, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which(chromium), args=["--no-sandbox", "--disable-gpu"])
        for name, (link, scheme, there) in VIEWS.items():
            page = browser.new_page(viewport={"width": WIDTH, "height": TALLEST}, color_scheme=scheme, reduced_motion="reduce")
            page.goto(f"{address}{link}")
            page.get_by_role("heading", name=there, exact=True).wait_for()
            page.wait_for_timeout(1500)  # what is new fades in
            page.screenshot(path=f"{folder}/page.png", full_page=True)
            save_cut(Image.open(f"{folder}/page.png").convert("RGB"), ASSETS / f"{name}.png")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--explorer", help="an index that kept its columns")
    parser.add_argument("--validation")
    parser.add_argument("--text_section", type=int, default=0)
    parser.add_argument("--images_section", type=int, default=0)
    parser.add_argument("--chromium", default="chromium")
    args = parser.parse_args()
    if args.explorer is not None:
        shoot_explorer(args.explorer, args.validation, args.chromium)
    if args.text is None or args.images is None:
        return
    for name, report, number in (("text", args.text, args.text_section), ("images", args.images, args.images_section)):
        page = one_section(report.read_text(encoding="utf-8"), number)
        for scheme in SCHEMES:
            shoot(page, ASSETS / f"report_{name}_{scheme}.png", scheme, args.chromium)


if __name__ == "__main__":
    main()
