"""What a benchmark found: a heatmap of methods by cases for each of a few measures."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from circuits.draw.paint import plain
from circuits.draw.template import SEQUENTIAL, framed, panels
from circuits.judge.entries import by_case

__all__ = ["grid"]

SHOWN = {
    "auroc": "area under the ROC curve of the true edges",
    "CMD": "CMD of circuits, distance from the model",
    "pearson": "Pearson's r with exact effects of nodes",
    "spearman": "Spearman's ρ with exact effects of nodes",
}
WORST = {"CMD": 0.5, "auroc": 0.5}
BEST = {"CMD": 0.0}
"""What colors tell apart: from 0 to 1 where nothing else is said."""
LINE = 22
"""Pixels of a row."""


def grid(found: pd.DataFrame) -> go.Figure:
    """A panel for each measure that was taken: a row for each method, a column for each case.

    Dark is good, and the number stands in each cell.

    Raises:
        ValueError: the table is not one of a `Bench`, or has none of these measures.
    """
    if lacking := {"case", "method", "measure", "value"} - set(found.columns):
        raise ValueError(
            f"a table to draw must be one of a Bench; it has no column {min(lacking)!r}; give "
            "draw(found.table())"
        )
    tables = {m: by_case(found[found["measure"] == m]) for m in SHOWN}
    tables = {m: table for m, table in tables.items() if not table.empty}
    if not tables:
        raise ValueError(
            f"a table to draw must have one of the measures {', '.join(SHOWN)}; it has none; look "
            "at the table itself"
        )
    ends = {m: (WORST.get(m, 0.0), BEST.get(m, 1.0)) for m in tables}
    most = max(len(table) for table in tables.values())
    cases = max(len(str(case)) for table in tables.values() for case in table.columns)
    labels = 24 + 5 * cases
    figure, plot, above = panels([[SHOWN[m]] for m in tables], 1, plot=LINE * most, between=labels)
    for row, (measure, table) in enumerate(tables.items(), start=1):
        trace = go.Heatmap(
            z=table.to_numpy(),
            x=[plain(str(case)) for case in table.columns],
            y=[plain(str(method)) for method in table.index],
            zmin=min(ends[measure]),
            zmax=max(ends[measure]),
            colorscale=SEQUENTIAL,
            reversescale=ends[measure][1] < ends[measure][0],
            xgap=1,
            ygap=1,
            texttemplate="%{z:.2f}",
            showscale=False,
            hovertemplate="%{y} · %{x}<br>%{z:.3f}<extra></extra>",
        )
        figure.add_trace(trace, row=row, col=1)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    figure.update_xaxes(tickangle=-90, showgrid=False, tickfont_size=10)
    note = "a row for each method, a column for each case; dark is good"
    return framed(figure, "Methods by cases", note, plot=plot, above=above, below=labels)
