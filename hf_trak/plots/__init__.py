"""Plots in one style, as pictures, as vector graphics and as one page, of results files or of what an index holds.

```python
save_plots(["results/lds_cifar2.json"], "plots")  # plots/lds_compute.png, ..., plots/plots.html
save_png(spectrum_rows(index.members[0].gram()), "spectrum.png", PLOTS["spectrum"])
```
"""

from hf_trak.plots.curves import PLOTS, Plot, read_rows
from hf_trak.plots.measured import damping_rows, label_error_rows, score_rows, spectrum_rows
from hf_trak.plots.page import render_page, render_svg
from hf_trak.plots.pictures import save_plots, save_png

__all__ = [
    "PLOTS",
    "Plot",
    "damping_rows",
    "label_error_rows",
    "read_rows",
    "render_page",
    "render_svg",
    "save_plots",
    "save_png",
    "score_rows",
    "spectrum_rows",
]
