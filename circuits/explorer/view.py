"""What the explorer's page draws: the circuit's places, curves, widths and texts, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import networkx as nx

from circuits.draw import paint
from circuits.draw.lanes import by_lane
from circuits.draw.layout import BOX, PORTS, Point, bands, frame, lanes, layout, routes
from circuits.graph import has_lanes, has_place, place_label

__all__ = ["OPEN", "view"]

OPEN = 300
"""Edges that a large circuit opens with: more are hard to read, and slow to paint."""
_NAMES = {paint.POSITIVE: "positive", paint.NEGATIVE: "negative", paint.NEUTRAL: "neutral"}
"""What the page calls hues, which differ in the dark."""


def view(graph: nx.MultiDiGraph, title: str | None, *, left_out: int) -> dict[str, Any]:
    """The data of the page, in pixels at scale 1; x grows to the right and y downwards.

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
    across, up = paint.pixels(drawn)

    def at(point: Point) -> Point:
        return _round(point[0] * across), _round(-point[1] * up)

    ways = routes(drawn, positions)
    curves = {edge: tuple(at(point) for point in curve) for edge, curve in ways.items()}
    (left, bottom), (right, top) = (at(corner) for corner in frame(positions, ways))
    first, second = paint.titles(graph, title)
    layers = {f"layer {layer}": sides for layer, sides in bands(drawn, positions).items()}
    places, g = {node: at(point) for node, point in positions.items()}, graph.graph
    return {
        "title": first,
        "source": second,
        "legend": paint.legend(drawn),
        "left_out": left_out,
        "prompt": json.loads(g["prompt"]),
        # a place's score is the sum of its edges here: what it does in the whole model is not known
        "scored": "score of its edges here" if has_lanes(drawn) else "score",
        "by_token": g["positions"] and not g["by_span"],  # a lane is a token of the prompt
        "open": OPEN,
        "box": [BOX[0] * across, BOX[1] * up],
        "ports": {slot: _round(share * BOX[0] * across) for slot, share in PORTS.items()},
        "samples": [
            (_NAMES[hue], width, word)
            for hue, width, word in paint.samples(paint.edge_limit(drawn))
        ],
        "limit": paint.node_limit(drawn),
        "nodes": _nodes(drawn, places),
        "edges": _edges(drawn, curves, {node: i for i, node in enumerate(places)}),
        "bands": _spans(layers, -up),
        "lanes": _spans(lanes(drawn, positions), across),
        "frame": [left, top, right, bottom],
    }


def _nodes(graph: nx.MultiDiGraph, places: Mapping[str, Point]) -> list[dict[str, Any]]:
    limit, laned = paint.node_limit(graph), has_lanes(graph)
    return [
        {
            "id": node,
            "label": paint.node_label(graph, node),
            "text": str(data.get("text", "")),
            "place": place_label(graph, data["pos"]) if laned else "",
            "pos": data["pos"] if laned else -1,
            "kind": data["kind"],
            "score": data["score"] if _writes(graph, node) else None,
            "share": _round(max(-1.0, min(1.0, data["score"] / limit))),
            "slots": paint.node_slots(graph, node),
            "x": places[node][0],
            "y": places[node][1],
        }
        for node, data in ((node, graph.nodes[node]) for node in places)
    ]


def _writes(graph: nx.MultiDiGraph, node: str) -> bool:
    """Whether a node has a score to show: what only reads has none."""
    if graph.nodes[node]["kind"] in ("kv", "logits"):
        return False
    return not has_place(graph, node) or any(
        not data["structural"] for *_, data in graph.out_edges(node, data=True)
    )


def _edges(
    graph: nx.MultiDiGraph,
    curves: Mapping[tuple[str, str, str], tuple[Point, ...]],
    number: Mapping[str, int],
) -> list[dict[str, Any]]:
    """The weakest first; what is weaker than many others is pale, as it is seen among them."""
    peak = paint.edge_limit(graph)
    noted = zip(graph.edges(keys=True, data=True), paint.edge_notes(graph), strict=True)
    ranked = sorted(noted, key=lambda edge: -abs(edge[0][3]["score"]))
    edges = [
        {
            "from": number[u],
            "to": number[v],
            "slot": data["slot"],
            "score": data["score"],
            "kin": data["structural"],
            "note": note,
            "width": _round(paint.edge_width(data, peak)),
            "opacity": _round(
                paint.edge_opacity(
                    paint.edge_share(data, peak), structural=data["structural"], edges=rank
                )
            ),
            "curve": [c for point in curves[u, v, key] for c in point],
        }
        for rank, ((u, v, key, data), note) in enumerate(ranked)
    ]
    return edges[::-1]


def _spans(found: Mapping[str, Point], unit: float) -> list[dict[str, Any]]:
    """From where to where layers and lanes go, in pixels."""
    return [
        {"label": label, "low": _round(min(ends)), "high": _round(max(ends))}
        for label, ends in (
            (label, [end * unit for end in sides]) for label, sides in found.items()
        )
    ]


def _round(number: float) -> float:
    return round(number, 2) + 0.0  # no -0.0
