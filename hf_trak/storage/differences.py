"""How two JSON values differ, a line per leaf, for whoever has to choose between them."""

from __future__ import annotations

from typing import Any


def list_differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Return one line per leaf in which two JSON values differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [*found, *(key for key in wanted if key not in found)]
        return [
            line
            for key in keys
            for line in list_differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if found == wanted else [f"{name}: {_short(found)} there, {_short(wanted)} here"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
