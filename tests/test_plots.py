"""Plots: the right rows in the right place, readable, and safe to open."""

import html
import importlib.util
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from hf_trak.plots import (
    PLOTS,
    damping_rows,
    label_error_rows,
    read_rows,
    render_page,
    render_svg,
    save_plots,
    save_png,
    score_rows,
    spectrum_rows,
)
from hf_trak.plots.curves import COLORS, Axis, ceiling_of, curves_of, label, limits, nice_ticks, places
from hf_trak.scoring.damping import DampingChoice

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
DAMPING, COMPUTE = PLOTS["lds_damping"], PLOTS["lds_compute"]


def row(method, value, *, metric="lds", interval="default", case="a model", **fields):
    spread = [value - 0.02, value + 0.02] if interval == "default" else interval
    return {"case": case, "method": method, "metric": metric, "value": value, "unit": "lds", "interval": spread, **fields}


def sweep():
    return [
        row("hf_trak", 0.3, damping=1.0),
        row("hf_trak", 0.1, damping=0),
        row("hf_trak", 0.2, damping=0.1),
        row("other <b>&", 0.25, damping=1.0, interval=None),
        row("hf_trak", 0.5, damping="auto"),
        row("hf_trak", 0.4, proj_dim=512),
        row("ground truth", 0.9, metric="lds_ceiling"),
        row("hf_trak", 0.9, metric="mrr", damping=1.0),
    ]


def test_a_curve_has_the_rows_of_its_metric_that_have_a_number_for_x():
    curves = curves_of(sweep(), DAMPING)
    assert [curve.method for curve in curves] == ["hf_trak", "other <b>&"]
    assert [(point.x, point.y) for point in curves[0].points] == [(0, 0.1), (0.1, 0.2), (1.0, 0.3)]
    assert curves[0].points[0][2:4] == (pytest.approx(0.08), pytest.approx(0.12))
    assert curves[1].points[0][2:4] == (0.25, 0.25)
    assert ceiling_of(sweep(), DAMPING) == 0.9
    assert ceiling_of([*sweep(), row("x", 0.8, metric="lds_ceiling")], DAMPING) is None
    assert curves_of(sweep(), COMPUTE) == []


def test_two_rows_at_one_x_are_refused_rather_than_joined():
    rows = [*sweep(), row("hf_trak", 0.7, damping=1, case="another model")]
    with pytest.raises(ValueError, match=r"hf_trak has two rows of lds at damping = 1: .*'another model'"):
        curves_of(rows, DAMPING)
    with pytest.raises(ValueError, match="is not finite"):
        curves_of([row("hf_trak", float("nan"), damping=1)], DAMPING)


def test_a_method_looks_the_same_in_every_plot_and_no_two_look_alike():
    rows = [row(f"method {i}", i / 10, damping=1.0, proj_dim=64 + i) for i in range(14)]
    by_damping, by_proj_dim = (
        {curve.method: curve for curve in curves_of(rows, PLOTS[name])} for name in ("lds_damping", "lds_proj_dim")
    )
    looks = {method: (curve.color, curve.round) for method, curve in by_damping.items()}
    assert looks == {method: (curve.color, curve.round) for method, curve in by_proj_dim.items()}
    assert len(set(looks.values())) == 14
    assert len(set(COLORS)) == len(COLORS)
    ours = next(curve for curve in curves_of([*rows, row("hf_trak", 0.1, damping=1.0)], DAMPING) if curve.ours)
    assert (ours.color, ours.round) == (COLORS[0], 0)


def test_a_logarithmic_axis_keeps_order_and_has_a_place_for_zero():
    axis = Axis([0, 0.01, 0.1, 1, 10], log=True)
    at = [axis.place(value) for value in (0, 0.01, 0.1, 1, 10)]
    assert at[0] == pytest.approx(0.05)
    assert at[-1] == pytest.approx(0.95)
    assert at[2] - at[1] == pytest.approx(at[3] - at[2])
    assert 0 < at[1] - at[0] < at[2] - at[1]
    assert [text for _, text in axis.ticks()] == ["0", "0.01", "0.1", "1", "10"]
    assert 0 < Axis([5], log=True).place(5) < 1
    assert 0 < Axis([0], log=True).place(0) < 1
    with pytest.raises(ValueError, match="no place for -1"):
        Axis([-1, 1], log=True)


@pytest.mark.parametrize("values", [range(1, 200), [1, 1.01, 1.02, 50], [0, 1e-3, 1.1e-3, 1e5], [0.1 * i for i in range(40)]])
@pytest.mark.parametrize("log", [True, False])
def test_tick_labels_keep_their_distance(values, log):
    ticks = Axis(list(values), log=log).ticks()
    assert 2 <= len(ticks) <= 13
    assert all(second[0] - first[0] >= 0.075 for first, second in pairwise(ticks))


def test_round_numbers_are_round_and_cover_the_range():
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(-0.03, 0.31) == [0, 0.1, 0.2, 0.3]
    assert nice_ticks(0, 4500, n=9) == [0, 500, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 4500]
    assert nice_ticks(2.0, 2.0)
    assert [label(value) for value in (0.05, 4096, 2e6, 0, 3.0, -0.1, 1e-5)] == [
        "0.05",
        "4,096",
        "2e+06",
        "0",
        "3",
        "-0.1",
        "1e-05",
    ]


def test_points_at_one_x_are_set_side_by_side_in_order():
    rows = [row(name, 0.1, damping=1.0) for name in "abc"] + [row("a", 0.1, damping=2.0)]
    curves = curves_of(rows, DAMPING)
    axis = Axis([1.0, 2.0], log=True)
    where = places(curves, axis)
    assert where["a", 1.0] < where["b", 1.0] < where["c", 1.0]
    assert where["b", 1.0] == pytest.approx(axis.place(1.0))
    assert where["a", 2.0] == pytest.approx(axis.place(2.0))


def test_the_y_axis_holds_every_interval_zero_and_the_ceiling():
    low, high = limits(curves_of([row("a", 0.5, damping=1), row("b", -0.2, damping=1)], DAMPING), 0.9)
    assert low < -0.22
    assert high > 0.9
    assert limits(curves_of([row("a", 0.5, damping=1)], DAMPING), None)[0] < 0


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_in_itself_and_escapes_names():
    rows = [*sweep(), row("hf_trak", 0.4, metric="counterfactual_delta", top_k=5)]
    page = render_page(rows, list(PLOTS.values()), title="Results of <i>")
    parsed = _Page()
    parsed.feed(page)
    assert parsed.links == []
    assert "http:" not in page
    assert "https:" not in page
    assert "other <b>&" in "".join(parsed.text)
    assert "b" not in parsed.tags
    assert "i" not in parsed.tags
    assert parsed.tags.count("section") == 3  # damping, proj_dim, counterfactual delta
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(picture)
    tooltip = html.unescape(re.search(r"<title>(hf_trak\na model\n0\.1.*?)</title>", page, re.DOTALL)[1])
    assert tooltip == "hf_trak\na model\n0.1: 0.2 (0.18, 0.22)"
    assert "<td>0.18 to 0.22</td>" in page
    assert "ceiling, 0.90" in page


def test_marks_stand_where_the_numbers_say():
    rows = [row("a", 0.0, damping=1.0), row("a", 0.5, damping=10.0), row("a", 1.0, damping=100.0)]
    section = render_page(rows, [DAMPING])
    marks = [
        (float(x), float(y))
        for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4" fill="#0072B2"><title>', section)
    ]
    assert len(marks) == 3
    (x0, y0), (x1, y1), (x2, y2) = marks
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y2  # up the page
    zero = float(re.search(r'y1="([\d.]+)" y2="[\d.]+" stroke="currentColor"', section)[1])
    assert zero == pytest.approx(y0, abs=0.1)


@needs_matplotlib
def test_every_plot_that_has_rows_is_drawn(tmp_path):
    file = tmp_path / "results.json"
    rows = [*sweep(), row("hf_trak", 0.4, metric="counterfactual_flipped_share", top_k=5), row("$x^2_$", 0.1, damping=3.0)]
    file.write_text(json.dumps({"name": "results", "rows": rows}))
    paths = save_plots([file], tmp_path / "plots")
    names = ["lds_proj_dim.png", "lds_damping.png", "counterfactual_flipped_share.png", "plots.html"]
    assert [path.name for path in paths] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[:-1])
    assert "<svg" in paths[-1].read_text()


@needs_matplotlib
def test_nothing_in_the_picture_overlaps(tmp_path, monkeypatch):
    """Tick labels keep apart, and the legend stands beside the axes."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs)))
    rows = [row(f"a method with quite a long name, number {i}", i / 20, compute_s=10.0**j) for i in range(13) for j in range(4)]
    save_png(rows, tmp_path / "plot.png", COMPUTE)
    axes = figures[0].axes[0]
    figures[0].draw_without_rendering()
    boxes = [tick.get_window_extent() for tick in axes.get_xticklabels() if tick.get_text()]
    assert len(boxes) == 4
    assert not any(first.overlaps(second) for first, second in pairwise(boxes))
    assert axes.get_legend().get_window_extent().x0 > axes.get_window_extent().x1


def test_results_without_a_plot_are_refused_with_what_they_hold(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": [row("a", 0.3, metric="mrr")]}))
    with pytest.raises(ValueError, match=r"Their metrics are: mrr. A plot needs rows of .*lds with a number damping"):
        save_plots([file], tmp_path / "plots")
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"results.json is not a result file"):
        read_rows([file])
    with pytest.raises(ValueError, match="No row of lds has a number for compute_s"):
        save_png(sweep(), tmp_path / "plot.png", COMPUTE)


def test_without_matplotlib_the_error_names_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-trak\[plots\]'"):
        save_png(sweep(), tmp_path / "plot.png", DAMPING)


def test_what_an_index_holds_is_drawn_as_measured(tmp_path):
    values = np.array([100.0, 10.0, 1.0, 1e-3, 0.0])
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    spectrum = spectrum_rows(torch.tensor(rotation * values @ rotation.T))
    assert [row["value"] for row in spectrum] == pytest.approx(values[:4], rel=1e-6)
    damping = damping_rows(DampingChoice(0.1, (0.0, 0.1, 1.0), (0.2, 0.4, 0.3), 2, 10, ""))
    assert [(row["damping"], row["value"]) for row in damping] == [(0.0, 0.2), (0.1, 0.4), (1.0, 0.3)]
    scores = score_rows(np.random.default_rng(0).standard_t(2, size=(100, 20)), n_bins=10)
    assert sum(row["value"] for row in scores) == pytest.approx(1)
    found = label_error_rows([0.1, 0.9, 0.5, 0.4], [False, True, False, True])
    assert [row["value"] for row in found] == [0, 0.5, 0.5, 1, 1]
    assert curves_of([row("hf_trak", 0.3, path_point=0.5)], PLOTS["lds_path"])[0].points[0].x == 0.5
    for name, rows in (
        ("spectrum", spectrum),
        ("damping_curve", damping),
        ("score_distribution", scores),
        ("label_errors", found),
    ):
        picture = ElementTree.fromstring(render_svg(rows, PLOTS[name]))
        assert len(picture.findall(".//circle")) == len(rows)
        assert all(0 < float(mark.attrib["cy"]) < 400 for mark in picture.iter("circle"))
    with pytest.raises(ValueError, match="no positive eigenvalue"):
        spectrum_rows(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="Expected finite scores"):
        score_rows([1.0, np.nan])
    with pytest.raises(ValueError, match="at least one wrong label"):
        label_error_rows([1.0], [False])


@needs_matplotlib
def test_a_logarithmic_axis_of_values_has_room_for_powers_of_ten(tmp_path):
    save_png(spectrum_rows(np.diag([1e3, 1.0, 1e-4])), tmp_path / "spectrum.png", PLOTS["spectrum"])
    assert (tmp_path / "spectrum.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="has no place for -1"):
        render_svg([{**spectrum_rows(np.eye(2))[0], "value": -1.0}], PLOTS["spectrum"])
