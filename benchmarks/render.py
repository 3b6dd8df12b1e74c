"""Write the tables of README.md and docs/ from results/*.json, between `<!-- results: NAME METRIC ... -->` and `<!-- end -->`.

After the metrics, `case=PATTERN` and `method=PATTERN` keep the rows whose case or method has the regular expression, which can hold no space
(`\\s` is one).

python benchmarks/render.py            # rewrite the files
python benchmarks/render.py --check    # exit 1 if a table is not what its results say
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
BLOCK = re.compile(r"(<!-- results: (\S+)((?: \S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)


def number(value: float) -> str:
    if abs(value) < 1e-9:
        return "0"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def table(name: str, wanted: list[str]) -> str:
    """Return the rows of one result file that have one of the metrics and fit the patterns, as Markdown."""
    patterns = dict(word.split("=", 1) for word in wanted if "=" in word)
    metrics = [word for word in wanted if "=" not in word]
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    lines = ["| case | method | metric | value | interval |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        fits = all(re.search(pattern, row[key]) for key, pattern in patterns.items())
        if fits and (not metrics or row["metric"] in metrics):
            interval = " to ".join(map(number, row["interval"])) if row["interval"] else ""
            unit = "" if row["unit"] in ("x", "share") else f" {row['unit']}"
            suffix = "×" if row["unit"] == "x" else unit
            lines.append(
                f"| {row['case']} | {row['method']} | `{row['metric']}` | {number(row['value'])}{suffix} | {interval} |"
            )
    hardware = ", ".join(f"{key} {value}" for key, value in result["hardware"].items())
    return "\n".join(lines) + f"\n\n`{result['command']}`, {hardware}, torch {result['versions']['torch']}.\n"


def render(text: str) -> str:
    return BLOCK.sub(lambda match: match[1] + table(match[2], match[3].split()) + match[4], text)


def main() -> None:
    stale = [path for path in FILES if path.exists() and render(path.read_text()) != path.read_text()]
    if "--check" in sys.argv and stale:
        raise SystemExit(f"Not what results/ says: {', '.join(path.name for path in stale)}. Run python benchmarks/render.py.")
    for path in stale:
        path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
