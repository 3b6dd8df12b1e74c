"""Write the tables of README.md and docs/ from results/*.json, between `<!-- results: NAME METRIC ... -->` and `<!-- end -->`.

After the metrics, `case=PATTERN`, `method=PATTERN` or any other field of a row keep the rows that have the regular expression there, which
can hold no space (`\\s` is one). Each metric is a column; with `columns=case`, each case is, and with
`columns=damping`, or another field, each value that rows have there. One number in a sentence stands between
`<!-- value: NAME METRIC ... -->` and `<!-- end -->`; exactly one row must fit. Tables of models, `<!-- zoo: NAME -->`, are those of render_zoo.py.

In docs/evidence, five rows of a table are in view, and all of a longer one behind a fold, unless the table stands in a fold already.

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
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
BLOCK = re.compile(r"(<!-- results: (\S+)((?: \S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)

IN_VIEW = 5  # rows

VALUE = re.compile(r"(<!-- value: (\S+)((?: \S+)*?) -->).*?(<!-- end -->)")


def table(name: str, wanted: list[str], *, fold: bool = False) -> str:
    """Return the rows of one result file that have one of the metrics and fit the patterns, as Markdown.

    What all cases begin with stands above them.

    Args:
        fold (`bool`): Show the first rows of a long table, and all behind a fold.
    """
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    across = next((word.removeprefix("columns=") for word in wanted if word.startswith("columns=")), "metric")
    rows = [row for row in chosen(result["rows"], wanted) if across in row]
    headers = {metric: header(metric, {row["unit"] for row in rows if row["metric"] == metric}) for metric in metrics_of(rows)}
    shared = shared_beginning([row["case"] for row in rows])
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        case = row["case"].removeprefix(shared).removeprefix(", ")
        value = "" if row[across] is None else f"{across} {row[across]}"
        column = {"metric": headers[row["metric"]], "case": case}.get(across, value)
        found = lines.setdefault((case if across != "case" else "", label(row, without=across)), {})
        if column in found:
            raise SystemExit(
                f"{name}: {label(row, without=across)}, {case}, has {column} twice; choose among its rows, or other columns."
            )
        found[column] = cell(row, headers[row["metric"]])
    columns = headers.values() if across == "metric" else dict.fromkeys(column for found in lines.values() for column in found)
    has_case = any(case for case, _ in lines)
    head = ["case"] * has_case + ["method", *columns]
    body = [
        [case] * has_case + [method, *(found.get(column, "") for column in columns)] for (case, method), found in lines.items()
    ]
    above = [shared] * bool(shared) + list(headers.values()) * (across != "metric")
    whole = [line(head), "|" + "---|" * len(head), *map(line, body)]
    if fold and len(body) > IN_VIEW:
        begin, end = f'<details markdown="1"><summary>All {len(body)} rows</summary>', "</details>"
        whole = [*whole[: 2 + IN_VIEW], "", begin, "", *whole, "", end]
    text = [*([f"{'; '.join(above)}:", ""] if above else []), *whole]
    return "\n".join(text) + f"\n\n{origin(result)}\n"


def value(name: str, wanted: list[str]) -> str:
    """Return the one value of a result file that fits the patterns."""
    rows = chosen(json.loads((ROOT / "results" / f"{name}.json").read_text())["rows"], wanted)
    if len(rows) != 1:
        raise SystemExit(f"{name} {' '.join(wanted)}: one row must fit, but {len(rows)} do: {[row['method'] for row in rows]}")
    return f"{number(rows[0]['value'])}{SIGNS.get(rows[0]['unit'], '')}"


def chosen(rows: list[dict[str, Any]], wanted: list[str]) -> list[dict[str, Any]]:
    """Return the rows that have one of the metrics and fit the patterns, in the metrics' order."""
    patterns = dict(word.split("=", 1) for word in wanted if "=" in word and not word.startswith("columns="))
    metrics = [word for word in wanted if "=" not in word]
    fitting = [row for row in rows if all(re.search(pattern, str(row.get(key, ""))) for key, pattern in patterns.items())]
    if not metrics:
        return fitting
    return sorted((row for row in fitting if row["metric"] in metrics), key=lambda row: metrics.index(row["metric"]))


def origin(result: dict[str, Any]) -> str:
    """Say by which command, where and with which torch the results were made."""
    hardware = result["hardware"]
    if isinstance(hardware, dict):
        hardware = ", ".join(f"{key} {value}" for key, value in hardware.items())
    return f"`{result['command']}`, {hardware}, torch {result['versions']['torch']}."


def metrics_of(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["metric"] for row in rows))


def shared_beginning(cases: list[str]) -> str:
    """Return the words between commas that all cases begin with."""
    parts = [case.split(", ") for case in cases]
    n_shared = next((i for i, words in enumerate(zip(*parts, strict=False)) if len(set(words)) > 1), min(map(len, parts)))
    return ", ".join(parts[0][:n_shared])


def label(row: dict[str, Any], *, without: str) -> str:
    """Return a row's method, and what tells it from others of that method; not what the columns say."""
    parts = [row["method"]]
    if row.get("variant"):
        parts.append(row["variant"])
    if row.get("level") and without != "level":
        parts.append(f"{row['level']}s")
    if row.get("top_k") and without != "top_k":
        parts.append(f"top {row['top_k']}")
    return ", ".join(parts)


SIGNS = {"x": "×", "share": "", "": ""}  # of units that are shown beside every number, or not at all


def header(metric: str, units: set[str]) -> str:
    """Return a metric's name, with the unit of all its values where the name does not say it."""
    (unit,) = units if len(units) == 1 else ("",)
    return f"`{metric}`" if unit in SIGNS or metric.endswith(f"_{unit.lower()}") else f"`{metric}`, {unit}"


def cell(row: dict[str, Any], header: str) -> str:
    """Return a value, with its unit where its column does not say it, and its interval in brackets."""
    said = header.endswith((f", {row['unit']}", f"_{row['unit'].lower()}`"))
    unit = SIGNS.get(row["unit"], "" if said else f" {row['unit']}")
    interval = f" ({' to '.join(map(number, row['interval']))})" if row["interval"] else ""
    return f"{number(row['value'])}{unit}{interval}"


def number(value: float) -> str:
    if abs(value) < 1e-9:
        return "0"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def line(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |"


def with_values(text: str) -> str:
    """Return a text with the numbers in its sentences made anew."""
    return VALUE.sub(lambda match: match[1] + value(match[2], match[3].split()) + match[4], text)


def render(text: str, *, fold: bool = False) -> str:
    import render_zoo

    def block(match: re.Match[str]) -> str:
        before = text[: match.start()]
        in_view = before.count("<details") == before.count("</details>")
        return match[1] + table(match[2], match[3].split(), fold=fold and in_view) + match[4]

    text = with_values(text)
    return render_zoo.render(BLOCK.sub(block, text))


def main() -> None:
    rendered = {path: render(path.read_text(), fold=path.parent.name == "evidence") for path in FILES if path.exists()}
    stale = [path for path, text in rendered.items() if text != path.read_text()]
    if "--check" in sys.argv and stale:
        raise SystemExit(f"Not what results/ says: {', '.join(path.name for path in stale)}. Run python benchmarks/render.py.")
    for path in stale:
        path.write_text(rendered[path])


if __name__ == "__main__":
    main()
