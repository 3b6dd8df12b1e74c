"""Write the tables of README.md and docs/ from results/*.json, between `<!-- results: NAME METRIC ... -->` and `<!-- end -->`.

After the metrics, `case=PATTERN`, `method=PATTERN` or any other field of a row keep the rows that have the regular expression there, which
can hold no space (`\\s` is one).

python benchmarks/render.py            # rewrite the files
python benchmarks/render.py --check    # exit 1 if a table is not what its results say
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
BLOCK = re.compile(r"(<!-- results: (\S+)((?: \S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)


def number(value: float) -> str:
    if abs(value) < 1e-9:
        return "0"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def table(name: str, wanted: list[str]) -> str:
    """Return the rows of one result file that have one of the metrics and fit the patterns, as Markdown.

    A case that all rows share stands above them.
    """
    patterns = dict(word.split("=", 1) for word in wanted if "=" in word)
    metrics = [word for word in wanted if "=" not in word]
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    rows = [
        row
        for row in result["rows"]
        if all(re.search(pattern, str(row.get(key, ""))) for key, pattern in patterns.items())
        and (not metrics or row["metric"] in metrics)
    ]
    cases = {row["case"] for row in rows}
    columns = ["method", "metric", "value", "interval"]
    head = [f"{cases.pop()}:", ""] if len(cases) == 1 else []
    lines = [cells(row) if head else [row["case"], *cells(row)] for row in rows]
    columns = columns if head else ["case", *columns]
    hardware = result["hardware"]
    if isinstance(hardware, dict):
        hardware = ", ".join(f"{key} {value}" for key, value in hardware.items())
    text = [*head, line(columns), "|" + "---|" * len(columns), *map(line, lines)]
    return "\n".join(text) + f"\n\n`{result['command']}`, {hardware}, torch {result['versions']['torch']}.\n"


def cells(row: dict[str, Any]) -> list[str]:
    """Return what a row says but for its case."""
    interval = " to ".join(map(number, row["interval"])) if row["interval"] else ""
    unit = {"x": "×", "share": ""}.get(row["unit"], f" {row['unit']}".rstrip())
    parts = [row["method"]]
    if row.get("variant"):
        parts.append(row["variant"])
    if row.get("level"):
        parts.append(f"{row['level']}s")
    if row.get("top_k"):
        parts.append(f"top {row['top_k']}")
    return [", ".join(parts), f"`{row['metric']}`", number(row["value"]) + unit, interval]


def line(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |"


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
