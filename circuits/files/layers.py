"""Rows and frames, for formats whose readers lay a circuit out by themselves."""

from __future__ import annotations

import math
from collections import defaultdict

import networkx as nx

from circuits.graph import has_lanes, height, place_label

__all__ = ["frames", "rows"]


def rows(graph: nx.MultiDiGraph) -> list[list[str]]:
    """The nodes that stand at one height, from `embed` up to `logits`.

    >>> from circuits.files.layers import rows
    >>> rows(circuit)
    [['embed'], ['L0H0', 'L0H1', ...], ['L0.mlp'], ...]
    """
    found: dict[tuple[float, int], list[str]] = defaultdict(list)
    for node, data in graph.nodes(data=True):
        layer = math.inf if data["kind"] == "logits" else data["layer"]
        found[layer, height(data.get("name", node), data["kind"])].append(node)
    return [found[height] for height in sorted(found)]


def frames(graph: nx.MultiDiGraph) -> dict[str, list[str]]:
    """The nodes of each layer by its name, `layer 3`, from the lowest up.

    Of a circuit that has lanes (`circuits.draw.lanes.by_lane`) those of each position by its label,
    from left to right.
    """
    found: dict[int, list[str]] = defaultdict(list)
    lanes = has_lanes(graph)
    for node, data in graph.nodes(data=True):
        if lanes or (data["layer"] >= 0 and data["kind"] != "logits"):
            found[data["pos" if lanes else "layer"]].append(node)
    return {place_label(graph, n) if lanes else f"layer {n}": found[n] for n in sorted(found)}
