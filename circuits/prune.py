"""Choosing a circuit: the edges that matter, and among them those that can carry a signal.

    circuit = top(assemble(edges), edges=200)

Every function returns a new graph with copies of the attributes and leaves its input alone.
Structural edges (key/value head -> query head) carry paths, cost nothing, and stay as long as both
of their ends are used.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from random import Random

import networkx as nx

from circuits.graph import check_circuit, real_edges

__all__ = ["connect", "random", "threshold", "top"]

Edge = tuple[str, str, str]


def top(
    graph: nx.MultiDiGraph, *, edges: int, signed: bool = False, connected: bool = True
) -> nx.MultiDiGraph:
    """The `edges` edges of largest |score|; ties are broken by name.

    With `connected=True` edges are taken in that order until those that lie on a path from `embed`
    to `logits` would be more than `edges`. One more edge can close a long path, so that the
    circuit can hold a few edges less than asked for; it never holds more.

    Args:
        edges: how many to keep; structural edges are not counted.
        signed: rank by how much an edge helps the clean behaviour instead of |score|, so that
            edges that work against it come last, in either direction.
        connected: keep only what lies on a path from `embed` to `logits`.

    Raises:
        TypeError: `graph` is no circuit, or `edges` is no whole number.
        ValueError: `edges` is negative.
    """
    # in the noise direction an edge that helps the task has a negative score
    sign = -1 if check_circuit(graph).graph["direction"] == "noise" else 1
    worth = (lambda score: sign * score) if signed else abs
    best_first = sorted((-worth(d["score"]), (u, v, key)) for u, v, key, d in real_edges(graph))
    return _first(graph, [edge for _, edge in best_first], edges, connected)


def random(
    graph: nx.MultiDiGraph, *, edges: int, seed: int = 0, connected: bool = True
) -> nx.MultiDiGraph:
    """`edges` edges in an order drawn at random: what a circuit of that size must beat.

    They are chosen as `top` chooses them, by chance instead of by score; the same seed gives the
    same circuit. Arguments and errors are those of `top`.
    """
    order = sorted((u, v, key) for u, v, key, _ in real_edges(check_circuit(graph)))
    Random(seed).shuffle(order)
    return _first(graph, order, edges, connected)


def _first(
    graph: nx.MultiDiGraph, order: Sequence[Edge], edges: int, connected: bool
) -> nx.MultiDiGraph:
    """The circuit of the first `edges` edges, or of those that are connected among the first."""
    edges = operator.index(edges)
    if edges < 0:
        raise ValueError(
            f"`edges` must be 0 or more; got {edges}; the full graph has "
            f"{graph.graph['total_edges']}"
        )
    if not connected:
        return _keep(graph, order[:edges])
    # The edges that are connected among the best n grow with n. So each edge has one n at which
    # it appears, and the circuit is what appears before the first edge that is too many.
    rank = {edge: i for i, edge in enumerate(order, start=1)}
    appears = _appearance(graph, rank)
    counted = sorted(n for edge, n in appears.items() if edge in rank)
    limit = counted[edges] if edges < len(counted) else math.inf
    return _keep(graph, (edge for edge, n in appears.items() if n < limit))


def threshold(
    graph: nx.MultiDiGraph, minimum: float, *, signed: bool = False, connected: bool = True
) -> nx.MultiDiGraph:
    """The edges with |score| >= `minimum`, in units of the metric.

    Args:
        minimum: the least |score| (least score if `signed`) that stays.
        signed: compare the score itself, so that negative edges go first.
        connected: keep only what lies on a path from `embed` to `logits`.

    Raises:
        TypeError: `graph` is no circuit.
        ValueError: `minimum` is NaN, or negative without `signed`.
    """
    check_circuit(graph)
    if math.isnan(minimum) or (minimum < 0 and not signed):
        raise ValueError(
            f"`minimum` must be 0 or more, as it is compared with |score|; got {minimum}; pass "
            "signed=True to compare it with the score itself"
        )
    kept = _keep(
        graph,
        (
            (u, v, key)
            for u, v, key, d in real_edges(graph)
            if (d["score"] if signed else abs(d["score"])) >= minimum
        ),
    )
    return connect(kept) if connected else kept


def connect(graph: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """The nodes and edges that lie on a path from `embed` to `logits`; maybe none.

    Raises:
        TypeError: `graph` is no circuit.
    """
    check_circuit(graph)
    return _keep(graph, _appearance(graph, {}))


def _appearance(graph: nx.MultiDiGraph, rank: dict[Edge, int]) -> dict[Edge, int]:
    """The least n for which an edge is on a path embed -> logits made of edges ranked <= n.

    Edges without a rank count as 0, always there. Edges that are on no path are left out.
    """
    forth: dict[str, list[tuple[str, int]]] = defaultdict(list)
    back: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for u, targets in graph.adjacency():
        for v, keys in targets.items():
            least = min(rank.get((u, v, key), 0) for key in keys)
            forth[u].append((v, least))
            back[v].append((u, least))
    reached = _least_worst("embed", forth) if "embed" in graph else {}
    leads = _least_worst("logits", back) if "logits" in graph else {}
    return {
        (u, v, key): max(reached[u], leads[v], rank.get((u, v, key), 0))
        for u, v, key in graph.edges(keys=True)
        if u in reached and v in leads
    }


def _least_worst(start: str, neighbours: dict[str, list[tuple[str, int]]]) -> dict[str, int]:
    """For each node that can be reached: the worst rank on the best way to it (Dijkstra)."""
    best: dict[str, int] = {}
    queue = [(0, start)]
    while queue:
        worst, node = heapq.heappop(queue)
        if node in best:
            continue
        best[node] = worst
        for other, rank in neighbours[node]:
            if other not in best:
                heapq.heappush(queue, (max(worst, rank), other))
    return best


def _keep(graph: nx.MultiDiGraph, edges: Iterable[Edge]) -> nx.MultiDiGraph:
    """A copy with these edges, their ends, and the structural edges between those."""
    edges = {(u, v, key) for u, v, key in edges if not graph.edges[u, v, key]["structural"]}
    read = {v for _, v, _ in edges}
    used = read | {u for u, _, _ in edges}
    edges |= {
        (u, v, key)
        for u, v, key, data in graph.edges(keys=True, data=True)
        if data["structural"] and u in read and v in used
    }
    result = nx.MultiDiGraph()
    result.graph.update(graph.graph)
    result.add_nodes_from(
        (node, data.copy()) for node, data in graph.nodes(data=True) if node in used
    )
    result.add_edges_from(
        (u, v, key, data.copy())
        for u, v, key, data in graph.edges(keys=True, data=True)
        if (u, v, key) in edges
    )
    return result
