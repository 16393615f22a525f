"""How well sets of scores agree with measured effects, and how far apart they are.

A panel for each measure of agreement; or a row for each difference, with its interval.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from circuits.draw.paint import MUTED, NEUTRAL, plain
from circuits.draw.template import BENEATH, CATEGORIES, GRID, SHAPES, framed, panels

__all__ = ["SHOWN", "differences", "measures"]

SHOWN = {
    "pearson": "Pearson's r",
    "spearman": "Spearman's ρ",
    "signs": "right signs",
    "relative_error": "relative error",
}
"""No one of them shows all: r sees the few large effects, ρ and signs the many small ones."""
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
    beside, row = 2, 30 + 13 * len(rules)
    figure, plot, above = panels(
        [[name] for name in SHOWN.values()], beside, plot=row * len(kinds), between=30, gap=0.05
    )
    for number, name in enumerate(rules):
        of = table[table["rules"] == name]
        # the first on top
        rows = [
            kinds.index(kind) + 0.8 * ((number + 0.5) / len(rules) - 0.5) for kind in of["kind"]
        ]
        for i, measure in enumerate(SHOWN):
            trace = _marks(of, measure, rows, name, number)
            figure.add_trace(
                trace.update(showlegend=i == 0), row=i // beside + 1, col=i % beside + 1
            )
    _axes(figure, kinds, beside)
    note = (
        "mean over pairs, 95 % bootstrap intervals; r and the error over all cells, ρ and signs "
        "over those above rounding and the floor"
    )
    legend = 24 + 19 * len(rules)
    framed(
        figure,
        table.attrs.get("title", "agreement with effects"),
        note,
        plot=plot,
        above=above,
        below=26 + legend,
    )
    return figure.update_layout(legend=BENEATH)


def _axes(figure: go.Figure, kinds: list[str], beside: int) -> None:
    """Axes: kinds from above, and across the range of each measure."""
    figure.update_yaxes(
        tickvals=list(range(len(kinds))), ticktext=kinds, range=[len(kinds) - 0.5, -0.5],
        zeroline=False, showgrid=False,
    )  # fmt: skip
    for line in range(1, len(kinds)):
        figure.add_hline(y=line - 0.5, line={"color": GRID, "width": 1}, layer="below")
    for i, measure in enumerate(SHOWN):
        at = {"row": i // beside + 1, "col": i % beside + 1}
        figure.update_yaxes(showticklabels=at["col"] == 1, ticks="", **at)
        if measure != "relative_error":
            least = 0.0 if measure == "signs" else LEAST
            figure.update_xaxes(range=[least, 1.03], tick0=0, dtick=0.25, **at)
        else:
            figure.update_xaxes(rangemode="tozero", nticks=5, **at)


def differences(table: pd.DataFrame) -> go.Figure:
    """A row for each difference of two, with its interval: what does not touch 0 is filled.

    For tables of `agreement_tests`, of `compare` and of `Evaluation.compare`.

    Raises:
        ValueError: the table is none of these, or has no difference.
    """
    if lacking := sorted({"measure", "low", "high", "p_value"} - set(table.columns)):
        raise ValueError(
            "a table of differences to draw must be one of agreement_tests or compare; it has no "
            f"column {lacking[0]!r}; give what they gave"
        )
    table = table[table["difference"].notna()]
    if table.empty:
        raise ValueError(
            "a table to draw must have differences that are numbers; this one has none; look at "
            "the table itself"
        )
    rows, notes = _said(table)
    value, low, high = (table[n].to_numpy(dtype=float) for n in ("difference", "low", "high"))
    sure = (low > 0) | (high < 0)
    hue = CATEGORIES[0]
    figure = go.Figure(
        go.Scatter(
            x=value.tolist(),
            y=list(range(len(rows))),
            error_x={
                "type": "data", "symmetric": False, "thickness": 1.5, "width": 0, "color": hue,
                "array": np.nan_to_num(high - value).tolist(),
                "arrayminus": np.nan_to_num(value - low).tolist(),
            },
            mode="markers",
            marker={"color": np.where(sure, hue, "#ffffff").tolist(), "size": 8,
                    "line": {"width": 1.5, "color": hue}},
            hovertext=notes,
            hoverinfo="text",
        )
    )  # fmt: skip
    figure.add_vline(x=0, line={"color": NEUTRAL, "width": 1})
    figure.update_xaxes(title_text="difference", nticks=6)
    figure.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=rows, range=[len(rows) - 0.5, -0.5],
        zeroline=False, ticks="",
    )  # fmt: skip
    note = "95 % bootstrap intervals over pairs; filled: the interval leaves out 0"
    return framed(
        figure,
        table.attrs.get("title", "differences"),
        note,
        plot=max(90, 22 * len(rows)),
        below=48,
    )


def _said(table: pd.DataFrame) -> tuple[list[str], list[str]]:
    """What each difference is of, and its numbers."""
    rows, notes = [], []
    for row in table.itertuples():
        kind = f"{row.kind} · " if "kind" in table else ""
        both = f" · {row.one} − {row.other}" if "one" in table else ""
        rows.append(plain(f"{kind}{SHOWN.get(row.measure, row.measure)}{both}"))
        p = f", p = {row.p_value:.2g}" if row.p_value == row.p_value else ""
        p += f" (Holm {row.p_holm:.2g})" if "p_holm" in table and row.p_holm == row.p_holm else ""
        notes.append(f"{rows[-1]}: {row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]{p}")
    return rows, notes


def _marks(of: pd.DataFrame, measure: str, rows: list[float], name: str, number: int) -> go.Scatter:
    value = of[measure].to_numpy(dtype=float)
    low, high = (
        of.get(f"{measure}_{end}", of[measure]).to_numpy(dtype=float) for end in ("low", "high")
    )
    least = LEAST if measure in ("pearson", "spearman") else 0.0
    outside = value < least
    hue = CATEGORIES[number % len(CATEGORIES)]
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
        legendgroup=plain(name),
        customdata=list(zip(of["kind"], value, strict=True)),
        hovertemplate=f"{plain(name)} · %{{customdata[0]}}<br>%{{customdata[1]:.3f}}"
        "<extra></extra>",
    )  # fmt: skip
