"""A circuit by position as one with a node for each component at each place: lanes of a diagram.

Edges by position say what a component hears at a position, and what another one wrote there: the
residual stream stays at its position. Only attention (heads, and mixers) carries between places. So
a head that reads keys and values at 2, and queries at 14, is two nodes, `L9H6@2` and `L9H6@14`,
with a structural edge between them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import networkx as nx

from circuits.graph import check_circuit, has_lanes, keep, real_edges, size

__all__ = ["by_lane", "drawn"]

_DRAWN = 2000
"""Edges that a picture has, the strongest: more can neither be read nor opened."""
_CARRIES = {"head", "kv", "attn", "mixer"}
"""Kinds of components that write at other places than they read at."""


def by_lane(graph: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """The same circuit with a node for each component at each place where it reads or writes.

    >>> from circuits.draw.lanes import by_lane
    >>> by_lane(circuit).number_of_nodes() == len(circuit)  # it is summed over positions
    True

    Nodes are `L9H6@14` (by span `L9H6@IO`) with the attributes of the component, and `name` (the
    component) and `pos`. A node's `score` is the sum of the circuit's own edges that leave it: what
    the component does at one place in the full graph is not known. Every edge is there once, with
    its key and its attributes. Structural edges (key `kv`, score 0) are new: they lead from where a
    head reads keys and values, or a mixer its input, to the same and all later places where it
    writes; from key/value heads to the query heads they serve. A component without edges is left
    out, as it has no place.

    Where edges are kept by span, spans come in another order in each prompt, so that a place that
    only reads leads to all places that write; one that does both leads to those behind it in the
    list of spans, which keeps the graph free of cycles.

    Args:
        graph: a circuit. One that is summed over positions, or has lanes already, is given back.

    Raises:
        TypeError, ValueError: `graph` is no circuit.
    """
    check_circuit(graph)
    if not graph.graph["positions"] or has_lanes(graph):
        return graph
    written: dict[str, dict[int, float]] = {node: defaultdict(float) for node in graph}
    read: dict[str, set[int]] = {node: set() for node in graph}
    carried: dict[str, set[int]] = {node: set() for node in graph}  # what is read for other places
    for u, v, _, data in real_edges(graph):
        written[u][data["pos"]] += data["score"]
        read[v].add(data["pos"])
        if graph.nodes[v]["kind"] in _CARRIES and data["slot"] != "q":
            carried[v].add(data["pos"])
    suffix = _suffixes(graph)
    result = graph.__class__()
    result.graph.update(graph.graph)
    for node, data in graph.nodes(data=True):
        for pos in sorted({*written[node], *read[node]}):
            own = {"score": written[node].get(pos, 0.0), "pos": pos, "name": node}
            result.add_node(node + suffix(pos), **data | own)
    for u, v, key, data in real_edges(graph):
        result.add_edge(u + suffix(data["pos"]), v + suffix(data["pos"]), key, **data)
    structural: dict[str, Any] = {"score": 0.0, "slot": "kv", "pos": -1, "structural": True}
    for node, places in carried.items():
        served = [v for _, v, d in graph.out_edges(node, data=True) if d["structural"]]
        for head in served or [node]:
            for pos in sorted(places):
                for to in sorted(written[head]):
                    if _reaches(graph, pos, to, reader=bool(served) or pos not in written[node]):
                        ends = node + suffix(pos), head + suffix(to)
                        result.add_edge(*ends, "kv", **structural, reader="")
    return result


def _reaches(graph: nx.MultiDiGraph, pos: int, to: int, *, reader: bool) -> bool:
    """Whether what is read at `pos` may be written at `to`; a `reader` does not write itself."""
    if reader:
        return to >= pos or bool(graph.graph["by_span"])
    return to > pos


def _suffixes(graph: nx.MultiDiGraph) -> Callable[[int], str]:
    """What is put behind a component's name at a position: `@14`, or `@IO` by span."""
    spans = json.loads(graph.graph["places"]) if graph.graph["by_span"] else []
    return lambda pos: "" if pos < 0 else f"@{spans[pos] if pos < len(spans) else pos}"


def drawn(graph: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """What pictures show of a circuit: its strongest edges, with a node for each place.

    Raises:
        TypeError, ValueError: `graph` is no circuit.
    """
    result = by_lane(graph)
    if size(result) <= _DRAWN:
        return result
    ranked = sorted(real_edges(result), key=lambda edge: -abs(edge[3]["score"]))
    return keep(result, (edge[:3] for edge in ranked[:_DRAWN]))
