"""What a benchmark found: a heatmap of methods by cases for each of a few measures."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuits.draw.paint import plain
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
    heights = [len(table) + 6 for table in tables.values()]
    figure = make_subplots(
        rows=len(tables), cols=1, subplot_titles=[SHOWN[m] for m in tables],
        row_heights=heights, vertical_spacing=5 / sum(heights),
    )  # fmt: skip
    for row, (measure, table) in enumerate(tables.items(), start=1):
        trace = go.Heatmap(
            z=table.to_numpy(),
            x=[plain(str(case)) for case in table.columns],
            y=[plain(str(method)) for method in table.index],
            zmin=min(ends[measure]),
            zmax=max(ends[measure]),
            colorscale="Blues_r" if ends[measure][1] < ends[measure][0] else "Blues",
            texttemplate="%{z:.2f}",
            showscale=False,
            hovertemplate="%{y} · %{x}<br>%{z:.3f}<extra></extra>",
        )
        figure.add_trace(trace, row=row, col=1)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(tickangle=-30, showgrid=False)
    figure.update_layout(
        template="plotly_white",
        height=100 + LINE * sum(heights),
        title_text="Methods by cases; dark is good",
        margin={"l": 140, "t": 90},
    )
    return figure
