"""A circuit as a layered diagram of plotly: `embed` at the bottom, `logits` on top.

It has all that the picture of `circuits.draw.svg` has, and says what is under the pointer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import groupby
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import plotly.graph_objects as go

from circuits.draw import paint
from circuits.draw.lanes import drawn
from circuits.draw.layout import BOX, PORTS, Point, bands, bezier, lanes, layout, routes
from circuits.draw.template import TEMPLATE

__all__ = ["diagram"]

_STEPS = 8
"""Of width and opacity: a plotly line has one width, so edges of nearly one width share a trace."""
_TINTS = 12
"""Of the colours of boxes, on either side of white, for the same reason."""
_NEAR = 4.0
"""Pixels around an edge in which no weaker one answers, at least."""
_SIGNS = {paint.POSITIVE: "positive", paint.NEGATIVE: "negative", paint.NEUTRAL: "keys and values"}


class _Line(NamedTuple):
    """An edge as it is drawn; those of one step and hue are one trace."""

    step: int
    hue: str
    share: float
    path: np.ndarray
    note: str


def diagram(graph: nx.MultiDiGraph) -> go.Figure:
    """Boxes and curves that say what they are when the pointer is over them.

    >>> from circuits.draw.diagram import diagram
    >>> diagram(circuit).layout.title.text
    'RELP · ioi-gpt2 · ioi · denoise'

    Where edges run side by side, the strongest one answers. The legend hides and shows edges by
    their sign.

    Raises:
        TypeError, ValueError: `graph` is no circuit, or empty.
    """
    whole, graph = graph, drawn(graph)
    positions, unit = layout(graph), paint.pixels(graph)
    lines = _lines(graph, positions)
    figure = go.Figure(
        [
            *_strokes(lines),
            *_edge_notes(lines, positions, unit),
            *_boxes(graph, positions, unit),
            *_texts(graph, positions, unit),
            _node_notes(graph, positions),
            *_samples(graph, {line.hue for line in lines}),
        ]
    )
    curved = np.concatenate([line.path for line in lines] or [np.zeros((0, 2))])
    reach = np.concatenate([np.array(list(positions.values())), curved])
    (left, low), (right, high) = reach.min(0) - [0.7, 0.6], reach.max(0) + [0.7, 0.6]
    layers, columns = bands(graph, positions), lanes(graph, positions)
    foot = 34.0 if columns else 8.0  # names of lanes
    margin = {"l": 64, "r": 110, "t": 68, "b": foot + 60}
    height = round(margin["t"] + margin["b"] + unit[1] * (high - low))
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": paint.plain(paint.heading(graph)),
            "y": 1 - 8 / height,
            "subtitle": {"text": paint.plain(paint.measured(whole, graph))},
        },
        legend={
            "orientation": "h",
            "x": 0,
            "y": -foot / (unit[1] * (high - low)),
            "yanchor": "top",
        },
        width=max(560, round(margin["l"] + margin["r"] + unit[0] * (right - left))),
        height=height,
        hoverdistance=12,
        shapes=_backdrop(layers, columns, (left, right), (low, high)),
        annotations=[_below(paint.legend(graph), foot + 34)],
        margin=margin,
    )
    figure.update_xaxes(
        tickvals=[sum(sides) / 2 for sides in columns.values()],
        ticktext=[paint.plain(place) for place in columns],
        range=[left, right],
    )
    figure.update_yaxes(
        tickvals=[sum(ends) / 2 for ends in layers.values()],
        ticktext=[f"layer {layer}" for layer in layers],
        range=[low, high],
    )
    axis = {"showgrid": False, "zeroline": False, "showline": False, "ticks": ""}
    return figure.update_xaxes(**axis).update_yaxes(**axis)


def _backdrop(
    layers: dict[int, Point], columns: dict[str, Point], across: Point, upwards: Point
) -> list[dict[str, Any]]:
    """A pale band behind each layer, and a pale column behind each lane."""
    band = {"type": "rect", "layer": "below", "line_width": 0}
    found = [
        {**band, "x0": across[0], "x1": across[1], "y0": low, "y1": high}
        | {"fillcolor": paint.BAND}
        for low, high in layers.values()
    ]
    return found + [
        {**band, "x0": left + 0.04, "x1": right - 0.04, "y0": upwards[0], "y1": upwards[1]}
        | {"fillcolor": paint.MUTED, "opacity": paint.LANE}
        for left, right in columns.values()
    ]


def _below(text: str, pixels: float) -> dict[str, Any]:
    """An annotation so far under the plot."""
    at = {"xref": "paper", "yref": "paper", "x": 0, "y": 0, "xanchor": "left", "yanchor": "top"}
    font = {"size": 11, "color": paint.MUTED}
    return {**at, "yshift": -pixels, "text": paint.plain(text), "showarrow": False, "font": font}


# -- edges -----------------------------------------------------------------------------------------


def _lines(graph: nx.MultiDiGraph, positions: dict[str, Point]) -> list[_Line]:
    """The strongest last, so on top."""
    curves, strongest = routes(graph, positions), paint.edge_limit(graph)
    points = np.array([curves[edge] for edge in graph.edges(keys=True)]).reshape(-1, 4, 2)
    paths = bezier(points.swapaxes(0, 1), np.linspace(0, 1, 40))
    noted = zip(graph.edges(data=True), paths, paint.edge_notes(graph), strict=True)
    lines = []
    for (_, _, data), path, note in noted:
        share = paint.edge_share(data, strongest)
        # even in the square root, as most scores are small
        step = math.ceil(_STEPS * math.sqrt(share))
        lines.append(_Line(step, paint.edge_hue(data), share, path, paint.plain(note)))
    return sorted(lines, key=lambda line: line[:3])


def _strokes(lines: list[_Line]) -> list[go.Scatter]:
    """A trace for each step and hue."""
    traces = []
    for (step, hue), members in groupby(lines, lambda line: line[:2]):
        gap = np.full((1, 2), np.nan)
        xy = np.concatenate([piece for line in members for piece in (line.path, gap)])
        share, structural = (step / _STEPS) ** 2, hue == paint.NEUTRAL
        traces.append(
            go.Scatter(
                x=xy[:, 0].astype(np.float32),
                y=xy[:, 1].astype(np.float32),
                mode="lines",
                line={
                    "color": hue,
                    "width": paint.line_width(share, 0.7),
                    "dash": "dot" if structural else "solid",
                    "simplify": False,
                },
                opacity=paint.edge_opacity(share, structural=structural, edges=len(lines)),
                hoverinfo="skip",
                legendgroup=_SIGNS[hue],
                showlegend=False,
                name=f"edges {step}/{_STEPS}",
            )
        )
    return traces


def _edge_notes(lines: list[_Line], positions: dict[str, Point], unit: Point) -> list[go.Scatter]:
    """Unseen points along each edge that say what it is.

    Plotly answers with the nearest point. So points of an edge are left out where a stronger one
    runs beside it, and where a box covers it; one is left of an edge that would have none.
    """
    points: dict[str, list[np.ndarray]] = defaultdict(list)
    notes: dict[str, list[str]] = defaultdict(list)
    taken = _Taken.of(lines, positions, unit)
    for line in sorted(lines, key=lambda line: -line.share):
        steps = np.linalg.norm(np.diff(line.path, axis=0) * unit, axis=1)
        way = np.concatenate([[0.0], steps.cumsum()])
        at = np.arange(_NEAR / 2, way[-1], _NEAR)
        path = np.stack([np.interp(at, way, line.path[:, i]) for i in (0, 1)], axis=-1)
        free = path[taken.by(path)][::2]
        free = free if len(free) else path[len(path) // 2 :][:1]
        points[line.hue].append(free)
        notes[line.hue] += [line.note] * len(free)
    return [
        go.Scatter(
            x=(xy := np.concatenate(points[hue]))[:, 0].astype(np.float32),
            y=xy[:, 1].astype(np.float32),
            mode="lines",
            line={"width": 0, "color": hue},
            opacity=0,
            hovertext=np.array(notes[hue], dtype=object),
            hoverinfo="text",
            hoverlabel={"bgcolor": hue},
            legendgroup=_SIGNS[hue],
            showlegend=False,
            name=_SIGNS[hue],
        )
        for hue in points
    ]


class _Taken(NamedTuple):
    """Squares of the picture in which an edge answers already."""

    squares: np.ndarray  # [across, up], with a square more on each side
    corner: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, lines: list[_Line], positions: dict[str, Point], unit: Point) -> _Taken:
        """At first those that boxes cover."""
        scale = np.array(unit) / _NEAR
        spots = np.concatenate([line.path for line in lines] + [np.array(list(positions.values()))])
        corner = spots.min(0) - 1
        shape = np.ceil((spots.max(0) + 1 - corner) * scale).astype(int) + 3
        taken = cls(np.zeros(shape, dtype=bool), corner, scale)
        inner = np.array(BOX) / 2 - 1 / scale  # edges end at the border of a box
        for at in positions.values():
            (x0, y0), (x1, y1) = taken.square(at - inner), taken.square(at + inner)
            taken.squares[x0:x1, y0:y1] = True
        return taken

    def square(self, at: np.ndarray) -> np.ndarray:
        """Where points `[..., xy]` are in `squares`."""
        found: np.ndarray = ((at - self.corner) * self.scale).astype(int) + 1
        return found

    def by(self, path: np.ndarray) -> np.ndarray:
        """Which points of a path are free; from now on they and what is around them is taken."""
        x, y = self.square(path).T
        free: np.ndarray = ~self.squares[x, y]
        for right in (-1, 0, 1):
            for up in (-1, 0, 1):
                self.squares[x + right, y + up] = True
        return free


# -- nodes -----------------------------------------------------------------------------------------


def _boxes(graph: nx.MultiDiGraph, positions: dict[str, Point], unit: Point) -> list[go.Scatter]:
    """Heads have rounded corners, MLPs and ends are pills; a trace for each tint."""
    alike: dict[tuple[int, bool], list[np.ndarray]] = defaultdict(list)
    limit, gap = paint.node_limit(graph), np.full((1, 2), np.nan)
    for node, at in positions.items():
        data = graph.nodes[node]
        radius = 6.0 if data["kind"] in ("head", "kv") else BOX[1] * unit[1] / 2
        step = round(_TINTS * max(-1.0, min(1.0, data["score"] / limit)))
        alike[step, data["kind"] == "kv"] += [at + _rounded(radius, unit), gap]
    traces = []
    for (step, dashed), members in alike.items():
        xy = np.concatenate(members)
        traces.append(
            go.Scatter(
                x=xy[:, 0].astype(np.float32),
                y=xy[:, 1].astype(np.float32),
                mode="lines",
                fill="toself",
                fillcolor=paint.tint(float(step), float(_TINTS)),
                line={"color": paint.MUTED, "width": 1.1, "simplify": False}
                | ({"dash": "3px,2px"} if dashed else {}),
                hoverinfo="skip",
                showlegend=False,
                name="boxes",
            )
        )
    return traces


def _rounded(radius: float, unit: Point) -> np.ndarray:
    """The outline of a box around 0, with corners of so many pixels: [point, xy]."""
    half, scale = np.array(BOX) / 2, radius / np.array(unit)
    turns = np.linspace(0, np.pi / 2, 6)
    corners = []
    for i, sides in enumerate(((1, 1), (-1, 1), (-1, -1), (1, -1))):
        turn = turns + i * np.pi / 2
        arc = np.stack([np.cos(turn), np.sin(turn)], axis=-1) * scale
        corners.append((half - scale) * sides + arc)
    return np.concatenate([*corners, corners[0][:1]])


def _texts(graph: nx.MultiDiGraph, positions: dict[str, Point], unit: Point) -> list[go.Scatter]:
    """Names of boxes, and the slots of heads where edges enter."""
    limit = paint.node_limit(graph)
    words: list[tuple[float, float, str, float, str]] = []
    for node, (x, y) in positions.items():
        label, slots = paint.node_label(graph, node), paint.node_slots(graph, node)
        colour = paint.ink(graph.nodes[node]["score"], limit)
        px = min(12.5, 1.5 * BOX[0] * unit[0] / max(7, len(label)))
        words.append((x, y + 4.0 / unit[1] * bool(slots), label, px, colour))
        words += [
            (x + PORTS[s] * BOX[0], y - BOX[1] / 2 + 6.5 / unit[1], s, 8.5, colour) for s in slots
        ]
    return [
        go.Scatter(
            x=[word[0] for word in words],
            y=[word[1] for word in words],
            mode="text",
            text=[paint.plain(word[2]) for word in words],
            textfont={
                "size": np.array([word[3] for word in words]),
                "color": [word[4] for word in words],
            },
            hoverinfo="skip",
            showlegend=False,
            name="texts",
        )
    ]


def _node_notes(graph: nx.MultiDiGraph, positions: dict[str, Point]) -> go.Scatter:
    """Three unseen points on each box that say what it is, and the scale of their colours."""
    limit = paint.node_limit(graph)
    name = paint.plain(f"node score ({graph.graph['metric']})")
    title = {"text": name, "side": "right", "font": {"size": 11}}
    aside = np.array([-0.3, 0.0, 0.3]) * BOX[0]
    xy = np.array(list(positions.values())).repeat(3, axis=0)
    return go.Scatter(
        x=xy[:, 0] + np.tile(aside, len(positions)),
        y=xy[:, 1],
        mode="markers",
        marker={
            "size": BOX[1] * paint.pixels(graph)[1],
            "opacity": 0,
            "color": np.array([graph.nodes[node]["score"] for node in positions]).repeat(3),
            "colorscale": [[0, paint.tint(-1.0, 1.0)], [0.5, "#ffffff"], [1, paint.tint(1.0, 1.0)]],
            "cmin": -limit,
            "cmid": 0,
            "cmax": limit,
            "colorbar": {"title": title, "thickness": 12, "lenmode": "pixels", "len": 220},
        },
        hovertext=[paint.plain(paint.node_note(graph, node)) for node in positions for _ in aside],
        hoverinfo="text",
        showlegend=False,
        name="nodes",
    )


def _samples(graph: nx.MultiDiGraph, hues: set[str]) -> list[go.Scatter]:
    """What the legend shows: the signs that there are, and three widths."""
    lines = [
        (name, hue, 0.9 if hue == paint.NEUTRAL else 4.0, name)
        for hue, name in _SIGNS.items()
        if hue in hues
    ]
    samples = paint.samples(paint.edge_limit(graph))
    lines += [(word, hue, width, "") for hue, width, word in samples if hue == paint.NEUTRAL]
    return [
        go.Scatter(
            x=[None],
            y=[None],
            mode="lines",
            line={
                "color": hue,
                "width": width,
                "dash": "dot" if group == "keys and values" else "solid",
            },
            legendgroup=group or f"width {name}",
            name=name,
        )
        for name, hue, width, group in lines
    ]
