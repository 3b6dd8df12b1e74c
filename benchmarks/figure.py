"""The README's figure: LDS against the number of training runs, from results/lds_*.json and results/path_*.json.

    python benchmarks/figure.py            # docs/assets/quality_light.png and quality_dark.png

A run on half of the training set counts as half a run. Featurizing is not counted: a pass costs less than an epoch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).parents[1]
PANELS = {"Text: SST-2, small BERT": "text", "Images: CIFAR-2, ResNet-9": "image"}
SKINS = {
    "light": {"page": "#ffffff", "ink": "#1f2328", "soft": "#d1d9e0"},
    "dark": {"page": "#0d1117", "ink": "#e6edf3", "soft": "#3d444d"},
}


class Line(NamedTuple):
    """A method: its rows, as (file, method, case of one run or halves), and how it is drawn."""

    label: str
    file: str
    method: str
    color: str
    marker: str


LINES = [
    Line("hf_trak with the base model", "path", r"^points of the line.*default with a base\)$", "#D55E00", "*"),
    Line("hf_trak", "lds", r"^hf_trak, proj_dim 2048(, subsets:M)?$", "#0072B2", "o"),
    Line("EK-FAC (kronfluence)", "lds", r"^influence_ekfac$", "#009E73", "s"),
    Line("TRAK as published", "lds", r"^TRAK as published: damping 0, proj_dim 512(, halves)?$", "#CC79A7", "^"),
    Line("TracIn", "lds", r"^tracin_cp$", "#E69F00", "v"),
]


def runs_of(case: str) -> float:
    """Return how many runs on the whole training set the training of a case costs."""
    found = re.search(r"(\d+) runs?( on (a half|halves))?$", case)
    if found is None:
        return 1.0  # of results/path_*.json, which are of one run
    return int(found[1]) * (0.5 if found[2] else 1)


def rows_of(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())["rows"]


def draw(skin: str, path: Path) -> None:
    """Draw both settings into one picture."""
    colors = SKINS[skin]
    figure = Figure(figsize=(8.6, 3.3), dpi=110, facecolor=colors["page"])
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for cell, (title, setting) in zip(axes, PANELS.items(), strict=True):
        for line in LINES:
            rows = [
                row
                for row in rows_of(f"{line.file}_{setting}")
                if row["metric"] == "lds" and re.search(line.method, row["method"])
            ]
            for halves in (False, True):
                mine = sorted(
                    (row for row in rows if ("hal" in row["case"].split("queries")[-1]) == halves),
                    key=lambda row: runs_of(row["case"]),
                )
                if not mine:
                    continue
                x, y = [runs_of(row["case"]) for row in mine], [row["value"] for row in mine]
                low, high = ([abs(row["interval"][side] - row["value"]) for row in mine] for side in (0, 1))
                size = 13 if line.marker == "*" else 6
                cell.errorbar(
                    x, y, [low, high], color=line.color, marker=line.marker, markersize=size, linewidth=1.2, elinewidth=0.8,
                    linestyle="--" if halves else "-", label=f"{line.label}, runs on halves" if halves else line.label,
                )  # fmt: skip
        (ceiling,) = [row["value"] for row in rows_of(f"lds_{setting}") if row["metric"] == "lds_ceiling"]
        cell.axhline(ceiling, color=colors["ink"], linewidth=0.8, linestyle=":")
        cell.text(10, ceiling - 0.015, "ceiling", color=colors["ink"], fontsize=8, ha="right", va="top")
        cell.set_title(title, color=colors["ink"], fontsize=10)
        cell.set_xscale("log")
        cell.set_xticks([0.5, 1, 2, 5, 10], ["½", "1", "2", "5", "10"], color=colors["ink"])
        cell.set_xlabel("training runs", color=colors["ink"], fontsize=9)
        cell.set_ylim(0, 0.82)
        cell.set_facecolor(colors["page"])
        cell.tick_params(colors=colors["ink"], which="both", labelsize=8)
        cell.minorticks_off()
        cell.grid(color=colors["soft"], linewidth=0.5)
        for side in cell.spines.values():
            side.set_color(colors["soft"])
    axes[0].set_ylabel("linear datamodeling score", color=colors["ink"], fontsize=9)
    figure.subplots_adjust(left=0.065, right=0.71, top=0.9, bottom=0.15, wspace=0.06)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="center left", bbox_to_anchor=(0.715, 0.53), fontsize=8, frameon=False, labelcolor=colors["ink"]
    )
    figure.savefig(path, format="png", facecolor=colors["page"])
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def main() -> None:
    for skin in SKINS:
        draw(skin, ROOT / "docs" / "assets" / f"quality_{skin}.png")


if __name__ == "__main__":
    main()
