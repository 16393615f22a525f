"""A circuit by position as one with a node for each component at each place: lanes of a diagram.

Edges by position say what a component hears at a position, and what another one wrote there: the
residual stream stays at its position. Only attention (heads, and mixers) carries between places. So
a head that reads keys and values at 2, and queries at 14, is two nodes, `L9H6@2` and `L9H6@14`,
with a structural edge between them.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from heapq import nlargest
from typing import Any

import networkx as nx

from circuits.graph import check_circuit, has_lanes, keep, real_edges, size

__all__ = ["MOST", "by_lane", "drawn", "strongest"]

MOST = 3000
"""Edges that pictures and pages show of larger circuits: more can neither be read nor opened."""
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
    writes (by span to all, as spans come in another order in each prompt); from key/value heads to
    the query heads they serve. A component without edges is left out, as it has no place.

    What is read for other places must not be joined with what is asked or written here: no query at
    2 reaches 14. A component that does both at one place has a node of its own there that only
    reads, `L9H6.kv@2` of the kind `kv`. So one edge leads to another one here if it does in the
    model, and every path is one of the model.

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
        carries = graph.nodes[v]["kind"] in _CARRIES and data["slot"] != "q"
        (carried if carries else read)[v].add(data["pos"])
    suffix = _suffixes(graph)
    result = graph.__class__()
    result.graph.update(graph.graph)
    structural: dict[str, Any] = {"score": 0.0, "slot": "kv", "pos": -1, "structural": True}
    links, readers = [], {}
    for node, data in graph.nodes(data=True):
        served = [v for _, v, d in graph.out_edges(node, data=True) if d["structural"]] or [node]
        for pos in sorted({*written[node], *read[node], *carried[node]}):
            at = node + suffix(pos)
            own = {"score": written[node].get(pos, 0.0), "pos": pos, "name": node}
            result.add_node(at, **data | own)
            if pos in carried[node]:
                onward = [
                    head + suffix(to)
                    for head in served
                    for to in sorted(written[head])
                    if to >= pos or graph.graph["by_span"]
                ]
                busy = pos in written[node] or pos in read[node]
                if busy and set(onward) - {at}:
                    readers[node, pos] = at = f"{node}.kv{suffix(pos)}"
                    result.add_node(at, **data | own | {"score": 0.0, "kind": "kv"})
                links += [(at, to, "kv", structural | {"reader": ""}) for to in onward if to != at]
    for u, v, key, data in real_edges(graph):
        pos = data["pos"]
        at = readers.get((v, pos)) if data["slot"] != "q" else None
        result.add_edge(u + suffix(pos), at or v + suffix(pos), key, **data)
    result.add_edges_from(links)
    return result


def _suffixes(graph: nx.MultiDiGraph) -> Callable[[int], str]:
    """What is put behind a component's name at a position: `@14`, or `@IO` by span."""
    spans = json.loads(graph.graph["places"]) if graph.graph["by_span"] else []
    return lambda pos: "" if pos < 0 else f"@{spans[pos] if pos < len(spans) else pos}"


def drawn(graph: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """What pictures show of a circuit: its strongest edges, with a node for each place.

    Raises:
        TypeError, ValueError: `graph` is no circuit.
    """
    return by_lane(strongest(graph, MOST))


def strongest(graph: nx.MultiDiGraph, edges: int) -> nx.MultiDiGraph:
    """`graph`, or what is strongest of it: at most `edges` edges, on paths if there are any.

    Fewer, if those by position would need more structural edges than that between their places.

    Raises:
        TypeError, ValueError: `graph` is no circuit, or a score is not finite.
    """
    for u, v, key, data in real_edges(check_circuit(graph)):
        if not math.isfinite(data["score"]):
            raise ValueError(
                f"scores must be finite to be drawn; that of {u!r} -> {v!r} ({key!r}) is "
                f"{data['score']}; replace it or take the edge away"
            )
    shown = _cut(graph, edges)
    while (links := by_lane(shown).number_of_edges() - size(shown)) > edges:
        # their number grows up to the square of that of edges
        shown = _cut(shown, int(size(shown) * math.sqrt(edges / links)))
    return shown


def _cut(graph: nx.MultiDiGraph, edges: int) -> nx.MultiDiGraph:
    if size(graph) <= edges:
        return graph
    from circuits.search.prune import connect, top  # only what is too large needs the search

    # of a whole model: all that can be chosen is among the first few, if enough of these are linked
    few = keep(graph, (e[:3] for e in nlargest(4 * edges, real_edges(graph), key=_strength)))
    connected = top(few if size(connect(few)) > edges else graph, edges=edges)
    return connected if size(connected) else top(graph, edges=edges, connected=False)


def _strength(edge: tuple[str, str, str, dict[str, Any]]) -> float:
    return abs(edge[3]["score"])
