"""Scores against measured effects: a panel for each kind, a point for each that is compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from circuits.draw.heatmaps import called, same, sources, unit
from circuits.draw.paint import NEUTRAL, plain
from circuits.draw.template import CATEGORIES, framed, packed, panels
from circuits.judge.agreement import agreement, points
from relp import Scores

__all__ = ["scatter"]

_MOST_POINTS = 5000
_PLOT = 230
"""Pixels of a panel."""


def scatter(many: Sequence[Scores], effects: Scores, kind: str | None) -> go.Figure:
    """The measured effect across, the estimate up: points on the line are right.

    Kinds fill the rows one after another; several sets of scores stand side by side, a row for each
    kind, on the same axes.

    Raises:
        ValueError: there is no such kind, or the results are not about the same.
    """
    same(many)
    each = [_kinds(scores, effects) for scores in many]
    measures = [agreement(scores, effects).set_index("kind") for scores in many]
    kinds = [k for k in each[0] if kind in (None, k)]
    if not kinds:
        raise ValueError(
            f"`kind` must be one of {tuple(each[0])}; got {kind!r}; leave it out to see them all"
        )
    several = len(many) > 1
    columns = min(3, len(many)) if several else min(2, len(kinds))
    # a kind begins a row if several sets of scores are compared; what is then empty is None
    blank = [None] * (-len(many) % columns if several else 0)
    names = [called(scores) if several else "" for scores in many]
    order = [(k, n) for k in kinds for n in (*range(len(many)), *blank)]
    titles = [
        [] if n is None else _title(k, names[n], measures[n].loc[k], columns)
        for k, n in order
    ]  # fmt: skip
    figure, plot, above = panels(titles, columns, plot=_PLOT, between=46, gap=0.09)
    for i, (k, n) in enumerate(order):
        at = {"row": i // columns + 1, "col": i % columns + 1}
        if n is None:
            figure.update_xaxes(visible=False, **at)
            figure.update_yaxes(visible=False, **at)
            continue
        hue, hover = CATEGORIES[n % len(CATEGORIES)], _hover(many[n], effects)
        x, y = each[n][k]
        figure.add_trace(_line(x, y), **at)
        figure.add_trace(_dots(x, y, hover, hue), **at)
        # what is across is the same everywhere, and three titles do not fit beside each other
        said = i + columns >= len(order) and (columns < 3 or at["col"] == 2)
        figure.update_xaxes(title_text=plain(unit(effects)) if said else "", **at)
        figure.update_yaxes(title_text=plain(_up(many, effects)) if at["col"] == 1 else "", **at)
        if several and at["col"] > 1:
            _match(figure, **at)
    figure.update_xaxes(nticks=5)
    figure.update_yaxes(nticks=6)
    figure.update_layout(showlegend=False)
    hangs = any(m.loc[kinds, "hangs"].any() for m in measures)
    note = _note(effects, hangs=hangs)
    return framed(figure, sources(many), note, plot=plot, above=above, below=52)


def _match(figure: go.Figure, row: int, col: int) -> None:
    """The same axes as in the first panel of the row."""
    if col == 1:
        return
    first = next(figure.select_xaxes(row=row, col=1)).plotly_name.removeprefix("xaxis")
    figure.update_xaxes(matches=f"x{first}", row=row, col=col)
    figure.update_yaxes(matches=f"y{first}", row=row, col=col)


def _note(effects: Scores, *, hangs: bool) -> str:
    notes = [f"against {effects.rules} {effects.noun}s, {len(effects.clean)} pairs; dotted: equal"]
    if effects.level == "node":
        notes.append("measures are means over pairs, [95 % bootstrap interval]")
    if hangs:
        notes.append("*: one point decides r")
    return "; ".join(notes)


def _up(many: Sequence[Scores], effects: Scores) -> str:
    """What is up: if it has the same noun as what is across, its rules tell them apart."""
    if len(many) == 1 and many[0].noun == effects.noun:
        return f"{many[0].noun}, {many[0].rules} ({many[0].metric})"
    return unit(*many)


def _hover(scores: Scores, effects: Scores) -> str:
    across, up = plain(called(effects)), plain(called(scores))
    return f"{across} %{{x:.4g}}<br>{up} %{{y:.4g}}<extra></extra>"


def _kinds(scores: Scores, effects: Scores) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Effects and scores of each kind."""
    found = {}
    for name, samples in points(scores, effects):
        if name != "edge":  # all of the slots together
            y, x = (np.concatenate(values) for values in zip(*samples, strict=True))
            found[name] = x, y
    return found


def _title(kind: str, name: str, row: pd.Series, columns: int) -> list[str]:
    """What a panel shows, and how well the two agree."""
    r = _measured("r", row["pearson"], ".3f") + "*" * int(row["hangs"])
    if not math.isnan(row["pearson_low"]):
        r += f" [{row['pearson_low']:.3f},\N{NO-BREAK SPACE}{row['pearson_high']:.3f}]"
    rest = [
        _measured("ρ", row["spearman"], ".2f"),
        _measured("signs", row["signs"], ".0%"),
        _measured("error", row["relative_error"], ".2f"),
    ]
    return [*packed([kind, name] if name else [kind], columns), *packed([r, *rest], columns)]


def _measured(name: str, value: float, form: str) -> str:
    known = "undefined" if math.isnan(value) else format(value, form)
    return f"{name}\N{NO-BREAK SPACE}{known}"


def _line(x: np.ndarray, y: np.ndarray) -> go.Scatter:
    """On which both are equal."""
    ends = [float(min(x.min(), y.min())), float(max(x.max(), y.max()))] if len(x) else [0, 1]
    style = {"color": NEUTRAL, "width": 1, "dash": "dot"}
    return go.Scatter(x=ends, y=ends, mode="lines", line=style, hoverinfo="skip")


def _dots(x: np.ndarray, y: np.ndarray, hover: str, hue: str) -> go.Scatter:
    """The points, or a sample of them."""
    if len(x) > _MOST_POINTS:
        chosen = np.random.default_rng(0).permutation(len(x))[:_MOST_POINTS]
        x, y = x[chosen], y[chosen]
    return go.Scatter(
        # half as many digits: a notebook keeps all of these points
        x=x.astype(np.float32),
        y=y.astype(np.float32),
        mode="markers",
        marker={"color": hue, "size": 4, "opacity": 0.45},
        hovertemplate=hover,
    )
