"""Metrics for the `evaluate` library; each folder is one, and can be a Space of its own."""

from __future__ import annotations

from importlib.resources import files
from typing import Any


def load_metric(name: str = "lds") -> Any:
    """Load a metric of this package with `evaluate`, without the network.

    Raises:
        ModuleNotFoundError: If `evaluate` is not installed; `pip install "hf-trak[evaluate]"`.
        FileNotFoundError: If there is no such metric.
    """
    folder = files("hf_trak") / "metrics" / name
    if not (folder / f"{name}.py").is_file():
        raise FileNotFoundError(f"hf_trak has no metric {name!r}; it has fact_tracing and lds.")
    try:
        import evaluate
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('This needs the library evaluate: pip install "hf-trak[evaluate]".') from error
    return evaluate.load(str(folder))
