"""How well sets of scores agree with measured effects: a panel for each measure, side by side."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuits.draw.paint import MUTED, plain

__all__ = ["SHOWN", "measures"]

SHOWN = {
    "pearson": "Pearson's r",
    "spearman": "Spearman's ρ",
    "signs": "right signs",
    "relative_error": "relative error",
}
"""No one of them shows all: r sees the few large effects, ρ and signs the many small ones."""
HUES = ("#999999", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
"""Okabe and Ito's: told apart with any colour vision. Shapes tell them apart without."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "star", "x", "pentagon")
LEAST = -0.25
"""Where the axes of correlations begin: what is further down is drawn at the edge, with its
number."""


def measures(table: pd.DataFrame) -> go.Figure:
    """A row for each kind, a mark for each set of scores, with its bootstrap interval.

    Raises:
        ValueError: the table is not one of `agreement`, or no row has a correlation.
    """
    needed = {"rules", "kind", *SHOWN}
    if lacking := sorted(needed - set(table.columns)):
        raise ValueError(
            f"a table to draw must be one of circuits.agreement; it has no column {lacking[0]!r}; "
            "give draw(agreement(scores, effect))"
        )
    table = table[table["pearson"].notna()]
    if table.empty:
        raise ValueError(
            "a table to draw must have rows with a correlation; this one has none, as no kind has "
            "three effects that are not 0; look at the table itself"
        )
    kinds, rules = (list(dict.fromkeys(table[name])) for name in ("kind", "rules"))
    figure = make_subplots(
        rows=1, cols=len(SHOWN), shared_yaxes=True, horizontal_spacing=0.03,
        subplot_titles=list(SHOWN.values()),
    )  # fmt: skip
    for number, name in enumerate(rules):
        of = table[table["rules"] == name]
        # the first on top
        rows = [
            kinds.index(kind) + 0.8 * ((number + 0.5) / len(rules) - 0.5) for kind in of["kind"]
        ]
        for column, measure in enumerate(SHOWN, start=1):
            trace = _marks(of, measure, rows, name, number)
            figure.add_trace(trace.update(showlegend=column == 1), row=1, col=column)
    figure.update_yaxes(
        tickvals=list(range(len(kinds))), ticktext=kinds, range=[len(kinds) - 0.5, -0.5],
        zeroline=False, showgrid=False,
    )  # fmt: skip
    for line in range(1, len(kinds)):
        figure.add_hline(y=line - 0.5, line={"color": "#d0d7de", "width": 1})
    for column, measure in enumerate(SHOWN, start=1):
        if measure != "relative_error":
            least = 0.0 if measure == "signs" else LEAST
            figure.update_xaxes(range=[least, 1.03], row=1, col=column)
        else:
            figure.update_xaxes(rangemode="tozero", row=1, col=column)
    figure.update_layout(
        template="plotly_white",
        height=150 + (16 * len(rules) + 14) * len(kinds),
        legend={"traceorder": "normal"},
        title_text="Agreement with exact effects, with 95 % intervals<br><sup>mean over pairs; "
        "r and the error over all cells, ρ and signs over those above rounding and the floor</sup>",
        margin={"t": 110},
    )
    return figure


def _marks(of: pd.DataFrame, measure: str, rows: list[float], name: str, number: int) -> go.Scatter:
    value = of[measure].to_numpy(dtype=float)
    low, high = (
        of.get(f"{measure}_{end}", of[measure]).to_numpy(dtype=float) for end in ("low", "high")
    )
    least = LEAST if measure in ("pearson", "spearman") else 0.0
    outside = value < least
    hue = HUES[number % len(HUES)]
    return go.Scatter(
        x=np.maximum(value, least).tolist(),
        y=rows,
        error_x={
            "type": "data", "symmetric": False, "thickness": 1, "width": 0, "color": hue,
            "array": np.where(outside, 0, np.nan_to_num(high - value)).tolist(),
            "arrayminus": np.where(outside, 0, np.nan_to_num(value - low)).tolist(),
        },
        mode="markers+text",
        text=[f"{v:.2f}" if out else "" for v, out in zip(value, outside, strict=True)],
        textposition="middle right",
        textfont={"size": 10, "color": MUTED},
        marker={"color": hue, "size": 8, "symbol": SHAPES[number % len(SHAPES)],
                "line": {"width": 0.5, "color": MUTED}},
        name=plain(name),
        legendgroup=name,
        customdata=list(zip(of["kind"], value, strict=True)),
        hovertemplate=f"{plain(name)} · %{{customdata[0]}}<br>%{{customdata[1]:.3f}}"
        "<extra></extra>",
    )  # fmt: skip
