"""A circuit as a layered diagram of plotly: `embed` at the bottom, `logits` on top."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import groupby
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import plotly.graph_objects as go

from circuits.draw import paint
from circuits.draw.layout import BOX, Point, bezier, layout, routes

__all__ = ["diagram"]

_PIXELS = (76.0, 66.0)
"""Across and up, per unit of layout: annotations are sized in pixels."""
_STEPS = 8
"""Of width and opacity: a plotly line has one width, so edges of nearly one width share a trace."""


class _Line(NamedTuple):
    """An edge as it is drawn; those of one step and hue are one trace."""

    step: int
    hue: str
    path: np.ndarray
    note: str


def diagram(graph: nx.MultiDiGraph) -> go.Figure:
    """Boxes and curves that say what they are when the mouse is over them."""
    positions = layout(graph)
    lines = _lines(graph, positions)
    figure = go.Figure([*_strokes(lines), _edge_notes(lines), _node_notes(graph, positions)])
    curved = np.concatenate([line.path for line in lines] or [np.zeros((0, 2))])
    reach = np.concatenate([np.array(list(positions.values())), curved])
    (left, low), (right, high) = reach.min(0) - [0.7, 0.6], reach.max(0) + [0.7, 0.6]
    margin = {"l": 50, "r": 110, "t": 80, "b": 20}
    figure.update_layout(
        title_text=f"{paint.plain(paint.heading(graph))}<br><sup>{paint.extent(graph)}; "
        "blue positive, red negative, width by |score|</sup>",
        template="plotly_white",
        showlegend=False,
        width=max(620, margin["l"] + margin["r"] + _PIXELS[0] * (right - left)),
        height=margin["t"] + margin["b"] + _PIXELS[1] * (high - low),
        hovermode="closest",
        annotations=_boxes(graph, positions),
        margin=margin,
    )
    figure.update_xaxes(visible=False, range=[left, right])
    layers: dict[int, set[float]] = defaultdict(set)
    for node, (_, y) in positions.items():
        if graph.nodes[node]["layer"] >= 0:
            layers[graph.nodes[node]["layer"]].add(y)
    figure.update_yaxes(
        tickvals=[sum(at) / len(at) for at in layers.values()],
        ticktext=[f"L{layer}" for layer in layers],
        showgrid=False,
        zeroline=False,
        range=[low, high],
    )
    return figure


def _lines(graph: nx.MultiDiGraph, positions: dict[str, Point]) -> list[_Line]:
    """The strongest last, so on top."""
    curves, strongest = routes(graph, positions), paint.edge_limit(graph)
    points = np.array([curves[edge] for edge in graph.edges(keys=True)]).reshape(-1, 4, 2)
    paths = bezier(points.swapaxes(0, 1), np.linspace(0, 1, 24))
    lines = [
        _Line(
            # even in the square root, as most scores are small
            math.ceil(_STEPS * math.sqrt(paint.edge_share(data, strongest))),
            paint.edge_hue(data),
            path,
            paint.plain(paint.edge_note(u, v, data)),
        )
        for (u, v, data), path in zip(graph.edges(data=True), paths, strict=True)
    ]
    return sorted(lines, key=lambda line: line[:2])


def _strokes(lines: list[_Line]) -> list[go.Scatter]:
    """A trace for each step and hue."""
    traces = []
    for (step, hue), members in groupby(lines, lambda line: line[:2]):
        gap = np.full((1, 2), np.nan)
        xy = np.concatenate([piece for line in members for piece in (line.path, gap)])
        share = (step / _STEPS) ** 2
        traces.append(
            go.Scatter(
                x=xy[:, 0],
                y=xy[:, 1],
                mode="lines",
                line={
                    "color": hue,
                    "width": paint.line_width(share, 0.7),
                    "dash": "dot" if hue == paint.NEUTRAL else "solid",
                },
                opacity=paint.edge_opacity(share, structural=hue == paint.NEUTRAL),
                hoverinfo="skip",
                name=f"edges {step}/{_STEPS}",
            )
        )
    return traces


def _edge_notes(lines: list[_Line]) -> go.Scatter:
    """Four unseen points along each edge that say what it is."""
    # Arrays, and colours as numbers: plotly looks at lists and names of colours one by one.
    places = np.array([line.path[i] for line in lines for i in (5, 9, 13, 17)]).reshape(-1, 2)
    hues = (paint.NEGATIVE, paint.NEUTRAL, paint.POSITIVE)
    return go.Scatter(
        x=places[:, 0],
        y=places[:, 1],
        mode="markers",
        marker={
            "size": 9,
            "opacity": 0,
            "color": np.array([hues.index(line.hue) for line in lines]).repeat(4),
            "colorscale": [[i / 2, hue] for i, hue in enumerate(hues)],
            "cmin": 0,
            "cmax": 2,
        },
        hovertext=np.array([line.note for line in lines]).repeat(4),
        hoverinfo="text",
        name="edges",
    )


def _node_notes(graph: nx.MultiDiGraph, positions: dict[str, Point]) -> go.Scatter:
    """An unseen point on each box that says what it is, and the scale of their colours."""
    limit = paint.node_limit(graph)
    title = {"text": paint.plain(f"node score ({graph.graph['metric']})"), "side": "right"}
    return go.Scatter(
        x=[x for x, _ in positions.values()],
        y=[y for _, y in positions.values()],
        mode="markers",
        marker={
            "size": 30,
            "opacity": 0,
            "color": [graph.nodes[node]["score"] for node in positions],
            "colorscale": [[0, paint.tint(-1.0, 1.0)], [0.5, "#ffffff"], [1, paint.tint(1.0, 1.0)]],
            "cmin": -limit,
            "cmid": 0,
            "cmax": limit,
            "colorbar": {"title": title, "thickness": 12, "len": 0.5},
        },
        hovertext=[paint.plain(paint.node_note(graph, node)) for node in positions],
        hoverinfo="text",
        name="nodes",
    )


def _boxes(graph: nx.MultiDiGraph, positions: dict[str, Point]) -> list[dict[str, Any]]:
    """An annotation for each node."""
    limit = paint.node_limit(graph)
    return [
        {
            "x": x,
            "y": y,
            "text": paint.plain(node) + _second_line(paint.node_positions(graph, node)),
            "showarrow": False,
            "bgcolor": paint.tint(graph.nodes[node]["score"], limit),
            "bordercolor": paint.MUTED,
            "borderpad": 2,
            "width": BOX[0] * _PIXELS[0] - 6,
            "height": BOX[1] * _PIXELS[1] - 6,
            "font": {"size": 11, "color": paint.ink(graph.nodes[node]["score"], limit)},
        }
        for node, (x, y) in positions.items()
    ]


def _second_line(text: str) -> str:
    return f"<br><span style='font-size:8px'>{text}</span>" if text else ""
