"""The README's figure: LDS against the number of training runs, from results/lds_*.json and results/path_*.json; and pictures of an index.

    python benchmarks/figure.py            # docs/assets/quality_light.png and quality_dark.png
    hf-trak demo text && python benchmarks/figure.py --demo hf_trak_demo_text     # docs/evidence/plots/demo_*.png

A run on half of the training set counts as half a run. Featurizing is not counted: a pass costs less than an epoch.
"""

from __future__ import annotations

import argparse
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


_WITH_BASE = r"^points of the line.*default with a base\)$|^\d+ runs on halves, points of the line"
LINES = [
    Line("hf_trak with the base model", "path", _WITH_BASE, "#D55E00", "*"),
    Line("hf_trak", "lds", r"^hf_trak, proj_dim 2048(, subsets:M)?$", "#0072B2", "o"),
    Line("EK-FAC (kronfluence)", "lds", r"^influence_ekfac$", "#009E73", "s"),
    Line("TRAK as published", "lds", r"^TRAK as published: damping 0, proj_dim 512(, halves)?$", "#CC79A7", "^"),
    Line("TracIn", "lds", r"^tracin_cp$", "#E69F00", "v"),
]


def training_of(row: dict[str, Any]) -> tuple[float, bool]:
    """Return how many runs on the whole training set the training of a row's case costs, and whether its runs are on halves."""
    said = row["method"] if re.match(r"\d+ runs on halves", row["method"]) else row["case"].split("queries")[-1]
    found = re.search(r"(\d+) runs?( on (a half|halves))?(,|$)", said)
    if found is None:
        return 1.0, False  # of results/path_*.json, which are of one run
    return int(found[1]) * (0.5 if found[2] else 1), bool(found[2])


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
                    (row for row in rows if training_of(row)[1] == halves),
                    key=lambda row: training_of(row)[0],
                )
                if not mine:
                    continue
                x, y = [training_of(row)[0] for row in mine], [row["value"] for row in mine]
                low, high = ([abs(row["interval"][side] - row["value"]) for row in mine] for side in (0, 1))
                size = 13 if line.marker == "*" else 6
                cell.errorbar(
                    x, y, [low, high], color=line.color, marker=line.marker, markersize=size, linewidth=1.2, elinewidth=0.8,
                    linestyle="--" if halves else "-", label=f"{line.label}, halves" if halves else line.label,
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


def draw_demo(folder: Path) -> None:
    """Draw the spectrum, the scores and the label errors of the index that `hf-trak demo text` left."""
    import numpy as np
    from datasets import load_dataset

    from hf_trak import AttributionIndex
    from hf_trak.plots import PLOTS, label_error_rows, save_png, score_rows, spectrum_rows

    index = AttributionIndex.from_pretrained(folder / "run" / "index")
    validation = load_dataset("parquet", data_files=str(folder / "validation.parquet"), split="train")
    flipped = np.zeros(index.n_rows, dtype=bool)
    flipped[json.loads((folder / "results.json").read_text())["flipped_rows"]] = True
    suspects = index.label_errors(validation, progress=False).with_format("numpy")
    suspicion, doubt = np.zeros(index.n_rows), np.zeros(index.n_rows)
    suspicion[suspects["row"][:]], doubt[suspects["row"][:]] = suspects["score"][:], suspects["doubt"][:]
    chance = np.random.default_rng(0).random(index.n_rows)
    rankings = {"hf_trak, label_errors(validation)": suspicion, "1 - p alone": doubt, "random": chance}
    rows = {
        "spectrum": spectrum_rows(index.members[0].gram()),
        "score_distribution": score_rows(index.score(validation, progress=False)),
        "label_errors": [row for name, found in rankings.items() for row in label_error_rows(found, flipped, method=name)],
    }
    for name, found in rows.items():
        path = ROOT / "docs" / "evidence" / "plots" / f"demo_{name}.png"
        save_png(found, path, PLOTS[name])
        Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="the folder of `hf-trak demo text`")
    if (folder := parser.parse_args().demo) is not None:
        draw_demo(folder)
        return
    for skin in SKINS:
        draw(skin, ROOT / "docs" / "assets" / f"quality_{skin}.png")


if __name__ == "__main__":
    main()
