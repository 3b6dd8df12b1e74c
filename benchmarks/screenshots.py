"""The README's pictures: sections of two reports, in a headless Chromium.

    hf-trak demo && hf-trak demo text
    hf-trak attribute hf_trak_demo_text/run/index --queries hf_trak_demo_text/validation.parquet --top_k 3 --output hits.jsonl --report report
    python benchmarks/screenshots.py --text report/report.html --images hf_trak_demo/report.html

Writes docs/assets/report_{text,images}_{light,dark}.png. Needs Chromium, and pillow to shrink the files.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
WIDTH, TALLEST = 1160, 1400
SCHEMES = {"dark": 0, "light": 1}  # Chromium's numbers


def one_section(page: str, number: int) -> str:
    """Return a report with its title and one of its sections."""
    before, *sections = re.split(r"(?=<section>)", page)
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
    empty = Image.new("RGB", picture.size, picture.getpixel((2, picture.height - 2)))
    found = ImageChops.difference(picture, empty).getbbox()
    if found is None:
        raise ValueError(f"{target.name}: the page is empty.")
    picture.crop((0, 0, picture.width, min(picture.height, found[3] + 24))).quantize(48).save(target, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--text_section", type=int, default=0)
    parser.add_argument("--images_section", type=int, default=0)
    parser.add_argument("--chromium", default="chromium")
    args = parser.parse_args()
    for name, report, number in (("text", args.text, args.text_section), ("images", args.images, args.images_section)):
        page = one_section(report.read_text(encoding="utf-8"), number)
        for scheme in SCHEMES:
            shoot(page, ASSETS / f"report_{name}_{scheme}.png", scheme, args.chromium)


if __name__ == "__main__":
    main()
