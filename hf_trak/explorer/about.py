"""What the explorer says about an index: facts, members, how its damping was chosen, its spectrum, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_trak.explorer.views import Explorer, shown
from hf_trak.plots import PLOTS, damping_rows, render_svg, spectrum_rows

_SHOWN_MEMBERS = 20
_LARGEST_SPECTRUM = 8192
_MEASURED = {"lds": "linear datamodeling score", "lds_ceiling": "ceiling of the ground truth"}


def facts(explorer: Explorer) -> dict[str, str]:
    """Return what the index is, in words."""
    index, first = explorer.index, explorer.index.members[0]
    with explorer.lock:
        damping = index.resolve_damping()
    how = "set"
    if index.config.damping == "auto":
        how = "the default" if index.damping_choice() is None else "chosen by the members' subsets"
    kept = ", ".join(index.kept_rows.column_names) or "none"
    return {
        "index": str(index.home),
        "task": explorer.task_name,
        "training rows": f"{index.n_rows:,}",
        "model": str(first.identity["model_class"]),
        "parameters covered": f"{first.info['coverage']:.1%} of the trainable ones",
        "members": f"{len(index.members)} of {index.n_checkpoints} checkpoints",
        "features per row": f"{index.config.proj_dim:,}",
        "damping": f"{damping:g} times the mean eigenvalue ({how})",
        "kept columns": kept,
        "features": "in memory" if explorer.in_memory else "read from disk at each question",
    }


def about_html(explorer: Explorer, measured: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the facts, the members, what was measured, and the curve that the damping was chosen by, if it was.

    Args:
        measured (`Sequence[Mapping]`): Rows of results files.
    """
    lines = "".join(
        f'<tr><th scope="row">{shown(name)}</th><td>{shown(value)}</td></tr>' for name, value in facts(explorer).items()
    )
    return f'<div class="hf-trak"><table>{lines}</table>{_members(explorer)}{_quality(measured)}{_damping(explorer)}</div>'


def _members(explorer: Explorer) -> str:
    members = explorer.index.members
    rows = [
        [
            str(number),
            str(member.info["checkpoint"].get("repository") or "a folder or a model in memory"),
            str(member.identity["model_sha256"])[:12],
            str(member.identity.get("point", {}).get("alpha", "")),
            str(member.identity["seed"]),
        ]
        for number, member in enumerate(members[:_SHOWN_MEMBERS])
    ]
    more = len(members) - _SHOWN_MEMBERS
    table = _table(["member", "checkpoint", "weights", "point of the path", "sketch seed"], rows)
    return f"<h3>Members</h3>{table}" + (f"<p>and {more} more</p>" if more > 0 else "")


def _quality(measured: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in measured:
        if (name := _MEASURED.get(row.get("metric", ""))) is not None and row.get("value") is not None:
            interval = row.get("interval")
            spread = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
            rows.append([str(row.get("method", "")), name, f"{row['value']:.3f}", spread])
    if not rows:
        return (
            "<h3>Quality</h3><p>Not measured, or not given. <code>hf-trak evaluate lds</code> measures it; <code>--results FILE</code> shows it "
            "here.</p>"
        )
    return f"<h3>Quality</h3>{_table(['method', 'measure', 'value', 'interval'], rows)}"


def _damping(explorer: Explorer) -> str:
    index = explorer.index
    if index.config.damping != "auto" or (choice := index.damping_choice()) is None:
        return ""
    rows = [
        [f"{damping:g}", f"{value:.3f}", "chosen" if damping == choice.damping else ""]
        for damping, value in zip(choice.grid, choice.curve, strict=True)
    ]
    picture = render_svg(damping_rows(choice), PLOTS["damping_curve"])
    return f"<h3>Damping</h3>{picture}{_table(['damping', 'rank correlation', ''], rows)}"


def spectrum_html(explorer: Explorer) -> str:
    """Return the eigenvalues of the first member's Gram matrix as a picture.

    Raises:
        ValueError: If the matrix is so large that this would take minutes.
    """
    width = explorer.index.config.proj_dim
    if width > _LARGEST_SPECTRUM:
        raise ValueError(f"The Gram matrix is {width:,} wide; its spectrum is computed up to {_LARGEST_SPECTRUM:,}.")
    with explorer.lock:
        rows = spectrum_rows(explorer.index.members[0].gram())
    said = f"{int(rows[-1]['eigenvalue_rank']):,} of {width:,} eigenvalues are above the rounding of features."
    return f'<div class="hf-trak"><h3>Spectrum</h3>{render_svg(rows, PLOTS["spectrum"])}<p>{said}</p></div>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{shown(name)}</th>' if name else "<td></td>" for name in heads)
    lines = "".join("<tr>" + "".join(f"<td>{shown(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide" tabindex="0" role="region" aria-label="table"><table><tr>{head}</tr>{lines}</table></div>'
