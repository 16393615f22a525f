"""Scores against measured effects: a panel for each kind, a point for each that is compared."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuits.draw.heatmaps import unit
from circuits.draw.paint import NEUTRAL, POSITIVE, plain
from circuits.judge.agreement import agreement, points
from relp import Scores

__all__ = ["scatter"]

_MOST_POINTS = 5000


def scatter(scores: Scores, effects: Scores, kind: str | None) -> go.Figure:
    """The measured effect across, the estimate up: points on the line are right."""
    panels = _panels(scores, effects, kind)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    titles = _titles(scores, effects, list(panels))
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=titles,
        horizontal_spacing=0.08,
        vertical_spacing=0.3 / rows,
    )
    hover = f"{plain(effects.noun)} %{{x:.4g}}<br>{plain(scores.noun)} %{{y:.4g}}<extra></extra>"
    for i, (x, y) in enumerate(panels.values()):
        for trace in _traces(x, y, hover):
            figure.add_trace(trace, row=i // columns + 1, col=i % columns + 1)
    noun = scores.noun if scores.noun != effects.noun else f"{scores.noun}, {scores.rules}"
    figure.update_xaxes(title_text=plain(unit(effects)), zerolinecolor="#d0d7de")
    figure.update_yaxes(title_text=plain(f"{noun} ({scores.metric})"), zerolinecolor="#d0d7de")
    notes = ["measures are means over pairs"] if scores.level == "node" else []
    notes += ["*: one point decides r"] if any("*" in title for title in titles) else []
    figure.update_layout(
        title_text=f"{plain(scores.title)}<br><sup>"
        + "; ".join([f"against {plain(effects.rules)} {plain(effects.noun)}s", *notes])
        + "</sup>",
        template="plotly_white",
        showlegend=False,
        height=120 + 340 * rows,
        margin={"t": 110},
    )
    return figure


def _panels(
    scores: Scores, effects: Scores, kind: str | None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Effects and scores of each kind that is shown."""
    panels = {
        name: tuple(np.concatenate(values) for values in zip(*samples, strict=True))
        for name, samples in points(scores, effects)
        if name != "edge"  # all of the slots together
    }
    if kind is not None and kind not in panels:
        raise ValueError(
            f"`kind` must be one of {tuple(panels)}; got {kind!r}; leave it out to see them all"
        )
    return {name: (x, y) for name, (y, x) in panels.items() if kind in (None, name)}


def _titles(scores: Scores, effects: Scores, kinds: list[str]) -> list[str]:
    """What each panel shows, and how well the two agree."""
    measures = agreement(scores, effects).set_index("kind")
    return [
        f"{name}<br><sup>r {_measured(row['pearson'], '.3f')}{'*' * int(row['hangs'])} · "
        f"ρ {_measured(row['spearman'], '.2f')} · signs {_measured(row['signs'], '.0%')} · "
        f"error {_measured(row['relative_error'], '.2f')}</sup>"
        for name in kinds
        for row in [measures.loc[name]]
    ]


def _measured(value: float, form: str) -> str:
    return "undefined" if math.isnan(value) else format(value, form)


def _traces(x: np.ndarray, y: np.ndarray, hover: str) -> tuple[Any, Any]:
    """The line on which both are equal, and the points, or a sample of them."""
    if len(x) > _MOST_POINTS:
        chosen = np.random.default_rng(0).permutation(len(x))[:_MOST_POINTS]
        x, y = x[chosen], y[chosen]
    ends = [float(min(x.min(), y.min())), float(max(x.max(), y.max()))] if len(x) else [0, 1]
    line = go.Scatter(
        x=ends,
        y=ends,
        mode="lines",
        line={"color": NEUTRAL, "width": 1, "dash": "dot"},
        hoverinfo="skip",
    )
    dots = go.Scatter(
        x=x.tolist(),
        y=y.tolist(),
        mode="markers",
        marker={"color": POSITIVE, "size": 4, "opacity": 0.45},
        hovertemplate=hover,
    )
    return line, dots
