"""What the explorer's page draws: the circuit's places, curves, widths and texts, as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import networkx as nx

from circuits.draw import paint
from circuits.draw.lanes import by_lane
from circuits.draw.layout import BOX, PORTS, Curve, Point, layout, routes
from circuits.graph import place_label

__all__ = ["OPEN", "view"]

OPEN = 300
"""Edges that a large circuit opens with: more are hard to read, and slow to paint."""
_X, _Y = 94.0, 74.0
"""Pixels per unit of layout, as in the picture."""


def view(graph: nx.MultiDiGraph, title: str | None, *, left_out: int) -> dict[str, Any]:
    """The data of the page; x grows to the right and y downwards.

    Edges come in the order in which they are painted: the strongest last, so on top.

    Args:
        graph: the circuit, or what is shown of it; by position it gets a node for each place.
        title: plain text in place of the task and the model.
        left_out: edges that the circuit has and `graph` has not.

    Raises:
        TypeError, ValueError: `graph` is no circuit, or empty.
    """
    drawn = by_lane(graph)
    positions = layout(drawn)
    curves = routes(drawn, positions)
    at = {node: _pixels(point) for node, point in positions.items()}
    number = {node: i for i, node in enumerate(at)}
    g, limit, peak = graph.graph, paint.node_limit(drawn), paint.edge_limit(drawn)
    ranked = sorted(drawn.edges(keys=True, data=True), key=lambda edge: abs(edge[3]["score"]))
    clean, corrupt = g["metric_clean"], g["metric_corrupt"]
    return {
        "title": title or f"{g['task']} · {g['model']}",
        "source": f"{g['rules']} · {g['direction']} · {g['metric']} {clean:.3g} clean, "
        f"{corrupt:.3g} corrupt",
        "metric": g["metric"],
        "extent": paint.extent(graph),
        "left_out": left_out,
        "prompt": json.loads(g["prompt"]),
        "open": OPEN,
        "box": [BOX[0] * _X, BOX[1] * _Y],
        "ports": {slot: _round(share * BOX[0] * _X) for slot, share in PORTS.items()},
        "peak": peak,
        "limit": limit,
        "nodes": [_node(drawn, node, at[node], limit) for node in at],
        "edges": [
            {
                "from": number[u],
                "to": number[v],
                "slot": data["slot"],
                "score": data["score"],
                "kin": data["structural"],
                "note": paint.edge_note(u, v, data),
                "width": _round(paint.edge_width(data, peak)),
                "opacity": _round(
                    paint.edge_opacity(paint.edge_share(data, peak), structural=data["structural"])
                ),
                "curve": [_round(c) for point in curves[u, v, key] for c in _pixels(point)],
            }
            for u, v, key, data in ranked
        ],
        "bands": _bands(drawn, at),
        "lanes": _lanes(drawn, at),
        "frame": _frame(at.values(), curves.values()),
    }


def _bands(graph: nx.MultiDiGraph, at: dict[str, Point]) -> list[dict[str, Any]]:
    """From where to where each layer goes, upwards."""
    layers: dict[int, list[float]] = {}
    for node, (_, y) in at.items():
        if graph.nodes[node]["layer"] >= 0:
            layers.setdefault(graph.nodes[node]["layer"], []).append(y)
    return [_span(f"layer {layer}", layers[layer], 0.46 * _Y) for layer in sorted(layers)]


def _lanes(graph: nx.MultiDiGraph, at: dict[str, Point]) -> list[dict[str, Any]]:
    """From where to where each position goes, across; none if edges are summed over positions."""
    lanes: dict[int, list[float]] = {}
    for node, (x, _) in at.items():
        if (pos := graph.nodes[node].get("pos", -1)) >= 0:
            lanes.setdefault(pos, []).append(x)
    return [_span(place_label(graph, pos), lanes[pos], 0.46 * _X) for pos in sorted(lanes)]


def _span(label: str, middles: list[float], half: float) -> dict[str, Any]:
    return {"label": label, "low": _round(min(middles) - half), "high": _round(max(middles) + half)}


def _node(graph: nx.MultiDiGraph, node: str, at: Point, limit: float) -> dict[str, Any]:
    data = graph.nodes[node]
    entered = {d["slot"] for *_, d in graph.in_edges(node, data=True)}
    return {
        "id": node,
        "label": data.get("name", node),
        "place": place_label(graph, data["pos"]) if data.get("pos", -1) >= 0 else "",
        "kind": data["kind"],
        "layer": data["layer"],
        "pos": data.get("pos", -1),
        # key/value heads and logits write nothing, so that there is no score to show
        "score": None if data["kind"] in ("kv", "logits") else data["score"],
        "share": _round(max(-1.0, min(1.0, data["score"] / limit))),
        "slots": [slot for slot in PORTS if slot in entered],
        "note": paint.node_note(graph, node),
        "x": at[0],
        "y": at[1],
    }


def _frame(points: Iterable[Point], curves: Iterable[Curve]) -> list[float]:
    """Left, top, right and bottom of all there is to see."""
    # A Bezier curve stays within its control points, and uses about 3/4 of a sideways bow.
    bows = [(0.75 * x + 0.25 * x0) * _X for (x0, _), *inner, _ in curves for x, _ in inner]
    xs, ys = zip(*points, strict=True)
    sides = [x + side for x in xs for side in (-0.6 * _X, 0.6 * _X)] + bows
    return [_round(c) for c in (min(sides), min(ys) - 0.5 * _Y, max(sides), max(ys) + 0.5 * _Y)]


def _pixels(point: Point) -> Point:
    return _round(point[0] * _X), _round(-point[1] * _Y)


def _round(number: float) -> float:
    return round(number, 2) + 0.0  # no -0.0
