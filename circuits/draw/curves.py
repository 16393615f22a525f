"""How faithful the best edges are, by how many there are: the standard figure of the field."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from circuits.draw.paint import NEUTRAL, plain
from circuits.draw.template import BENEATH, CATEGORIES, GRID, SHAPES, framed, panels
from circuits.judge.evaluation import Evaluation

__all__ = ["curves"]

_PLOT, _ENTRY = 300, 19
"""Pixels of a panel, and of a line of the legend."""
_MOST_OUTSIDE = 0.5
"""How far the axis follows a band beyond the curves and 0 to 1: a band may be wide without end."""


def curves(found: Sequence[Evaluation]) -> go.Figure:
    """Faithfulness by share of edges, with its bootstrap band; a panel for each evaluation.

    CPR and CMD with their intervals stand in the legend; of several evaluations above each panel.
    """
    several, first = len(found) > 1, found[0]
    entries = [_entries(evaluation) for evaluation in found]
    titles = [
        [f"{e.model} · {e.task} · {len(e.clean)} pairs", _ranked(e), *said.values()]
        if several
        else []
        for e, said in zip(found, entries, strict=True)
    ]
    figure, plot, above = panels(titles, 1, plot=_PLOT, between=50)
    rules = list(dict.fromkeys(name for said in entries for name in said))
    chosen = [name for name in rules if not _drawn_by_lot(name)]
    for row, (evaluation, said) in enumerate(zip(found, entries, strict=True), start=1):
        at, table = {"row": row, "col": 1}, evaluation.to_dataframe()
        for name in said:
            number = None if _drawn_by_lot(name) else chosen.index(name)
            new = not any(name in before for before in entries[: row - 1])
            label = name if several else said[name]
            for trace in _curve(table[table["rules"] == name], label, number, shown=new):
                figure.add_trace(trace.update(legendgroup=plain(name)), **at)
        wide = min(evaluation.sizes) < max(evaluation.sizes) / 20
        figure.update_xaxes(
            type="log" if wide else "linear", dtick="D2" if wide else None, tickformat="~%",
            title_text="share of the model's edges", **at,
        )  # fmt: skip
        figure.update_yaxes(range=_range(table), title_text="faithfulness", **at)
        for level in (0, 1):  # none of the gap, and what the whole model has
            figure.add_hline(y=level, line={"color": GRID, "width": 1}, layer="below", **at)
    whose = f" · {first.model} · {first.task}"
    best = "the best edges" if several else f"the {_ranked(first)}"
    pairs = "" if several else f", {len(first.clean)} pairs"
    figure.update_layout(legend=BENEATH)
    return framed(
        figure,
        f"Faithfulness by circuit size{'' if several else whose}",
        f"{best}, all others corrupt{pairs}; bands and brackets: 95 % bootstrap over pairs; CPR: "
        "area below the curve; CMD: area between it and 1, best is 0; both over a linear axis",
        plot=plot,
        above=above,
        below=56 + _ENTRY * len(rules),
    )


def _ranked(evaluation: Evaluation) -> str:
    """How the edges of its circuits were chosen."""
    return f"best edges by {'score' if evaluation.signed else '|score|'}"


def _entries(evaluation: Evaluation) -> dict[str, str]:
    """What is said of each curve: `RELP · CPR 0.83 [0.79, 0.87] · CMD 0.17 [0.13, 0.21]`."""
    areas = evaluation.areas().set_index("rules")
    return {
        name: f"{name} · {_area(areas.loc[name], 'CPR')} · {_area(areas.loc[name], 'CMD')}"
        for name in evaluation.rules
    }


def _drawn_by_lot(name: str) -> bool:
    """`evaluate` names its baselines so."""
    return name.partition(" ")[0] == "random"


def _area(row: pd.Series, name: str) -> str:
    text = f"{name} {row[name]:.2f}"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return text if np.isnan(low) else f"{text} [{low:.2f}, {high:.2f}]"


def _curve(table: pd.DataFrame, entry: str, number: int | None, *, shown: bool) -> list[go.Scatter]:
    """Its band, and the curve with a mark at each size; `shown` in the legend or not."""
    hue = NEUTRAL if number is None else CATEGORIES[number % len(CATEGORIES)]
    x = table["size"].tolist()
    traces = []
    if table["low"].notna().all():
        band = {"fill": "toself", "fillcolor": hue, "opacity": 0.15, "line": {"width": 0}}
        around = {"x": [*x, *x[::-1]], "y": [*table["high"], *table["low"][::-1]]}
        unseen = {"mode": "lines", "hoverinfo": "skip", "showlegend": False}
        traces.append(go.Scatter(**around, **band, **unseen))
    notes = [
        f"{plain(row.rules)} · {row.edges:,} edges: {row.faithfulness:.3f}"
        + ("" if np.isnan(row.low) else f" [{row.low:.3f}, {row.high:.3f}]")
        for row in table.itertuples()
    ]
    return [
        *traces,
        go.Scatter(
            x=x, y=table["faithfulness"].tolist(), mode="lines+markers", name=plain(entry),
            showlegend=shown,
            line={"color": hue, "width": 2, "dash": "dot" if number is None else "solid"},
            marker={"size": 6, "symbol": SHAPES[(number or 0) % len(SHAPES)]},
            hovertext=notes, hoverinfo="text",
        ),
    ]  # fmt: skip


def _range(table: pd.DataFrame) -> tuple[float, float]:
    low, high = min(0.0, table["faithfulness"].min()), max(1.0, table["faithfulness"].max())
    least = max(low - _MOST_OUTSIDE, np.nanmin([low, *table["low"]]))
    most = min(high + _MOST_OUTSIDE, np.nanmax([high, *table["high"]]))
    return least - 0.04 * (most - least), most + 0.04 * (most - least)
