"""What a benchmark found: a heatmap of methods by cases for each of a few measures."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuits.draw.paint import plain
from circuits.judge.bench import LOWER, Bench

__all__ = ["grid"]

SHOWN = {
    "auroc": "area under the ROC curve of the true edges",
    "CMD": "CMD of circuits, distance from the model",
    "pearson": "Pearson's r with exact effects of nodes",
    "spearman": "Spearman's ρ with exact effects of nodes",
}
LEAST = {"auroc": 0.5, "CMD": 0.0, "pearson": 0.0, "spearman": 0.0}
MOST = {"auroc": 1.0, "CMD": 0.5, "pearson": 1.0, "spearman": 1.0}
LINE = 22
"""Pixels of a row."""


def grid(found: Bench) -> go.Figure:
    """A panel for each measure that was taken: a row for each method, a column for each case.

    Dark is good, and the number stands in each cell.
    """
    tables = {measure: found.by_case(measure) for measure in SHOWN}
    tables = {measure: table for measure, table in tables.items() if not table.empty}
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
            zmin=LEAST[measure],
            zmax=MOST[measure],
            colorscale="Blues_r" if measure in LOWER else "Blues",
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
