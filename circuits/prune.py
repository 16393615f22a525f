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
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

import networkx as nx

from circuits.graph import check_circuit, real_edges

__all__ = ["between", "connect", "greedy", "random", "threshold", "top", "top_nodes"]

Edge = tuple[str, str, str]
_ENDS = ("embed", "logits")


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
    check_circuit(graph)
    worth = _worth(graph, signed=signed)
    ranked = sorted(real_edges(graph), key=lambda edge: (-worth(edge[3]), edge[:3]))
    return _first(graph, [edge[:3] for edge in ranked], edges, connected=connected)


def greedy(
    graph: nx.MultiDiGraph, *, edges: int, signed: bool = False, connected: bool = True
) -> nx.MultiDiGraph:
    """The circuit that grows from `logits` backwards, always by its strongest incoming edge.

    At each step the best edge into a node that is already reached is taken, and its writer counts
    as reached. So no edge is taken that leads nowhere, unlike in `top`; a strong edge behind a weak
    one has to wait. Source: Hanna et al. 2024, arXiv:2403.17806 (`apply_greedy` of EAP-IG, which
    takes `edges` edges and then drops those that do not lead back to the embedding:
    `connect(greedy(graph, edges=n, connected=False))`). Ties are broken by name.

    Args:
        edges, signed: as in `top`.
        connected: keep only what lies on a path from `embed` to `logits`, and go on until that
            would be more than `edges`, as in `top`.

    Raises:
        TypeError: `graph` is no circuit, or `edges` is no whole number.
        ValueError: `edges` is negative.
    """
    check_circuit(graph)
    worth = _worth(graph, signed=signed)
    taken: list[Edge] = []
    reached: set[str] = set()
    queue: list[tuple[float, Edge]] = []

    def reach(node: str) -> None:
        if node in reached or node not in graph:
            return
        reached.add(node)
        for u, _, key, data in graph.in_edges(node, keys=True, data=True):
            if data["structural"]:
                reach(u)  # a query head reads through its key/value head
            else:
                heapq.heappush(queue, (-worth(data), (u, node, key)))

    reach("logits")
    while queue:
        _, edge = heapq.heappop(queue)
        taken.append(edge)
        reach(edge[0])
    return _first(graph, taken, edges, connected=connected)


def random(
    graph: nx.MultiDiGraph, *, edges: int, seed: int = 0, connected: bool = True
) -> nx.MultiDiGraph:
    """`edges` edges in an order drawn at random: what a circuit of that size must beat.

    They are chosen as `top` chooses them, by chance instead of by score; the same seed gives the
    same circuit. Arguments and errors are those of `top`.
    """
    order = sorted((u, v, key) for u, v, key, _ in real_edges(check_circuit(graph)))
    Random(seed).shuffle(order)
    return _first(graph, order, edges, connected=connected)


def top_nodes(graph: nx.MultiDiGraph, *, nodes: int, signed: bool = False) -> nx.MultiDiGraph:
    """The `nodes` heads, neurons, MLPs and mixers of largest |score|, and every edge between them.

    `embed` and `logits` come with them and are not counted, nor are key/value heads, which come
    with their query heads. A node's score is that of patching it, the sum of its outgoing edges.

    Args:
        nodes: how many to keep; ties are broken by name.
        signed: rank by how much a node helps the clean behaviour instead of |score|.

    Raises:
        TypeError: `graph` is no circuit, or `nodes` is no whole number.
        ValueError: `nodes` is negative.
    """
    check_circuit(graph)
    nodes = operator.index(nodes)
    if nodes < 0:
        raise ValueError(f"`nodes` must be 0 or more; got {nodes}; the graph has {len(graph)}")
    worth = _worth(graph, signed=signed)
    countable = [n for n, d in graph.nodes(data=True) if d["kind"] not in (*_ENDS, "kv")]
    countable.sort(key=lambda node: (-worth(graph.nodes[node]), node))
    return between(graph, countable[:nodes])


def between(graph: nx.MultiDiGraph, nodes: Iterable[str]) -> nx.MultiDiGraph:
    """The circuit of these nodes: every edge between them, `embed` and `logits`.

    A key/value head (`L9KV1`) belongs to it if one of the query heads that it serves does. For a
    circuit that a paper gives as a list of heads: `between(graph, ["L9H9", "L9H6", "L0.mlp"])`.

    Raises:
        TypeError: `graph` is no circuit.
        ValueError: `graph` has no such node.
    """
    check_circuit(graph)
    chosen = {*_ENDS, *nodes}
    for node in chosen - set(_ENDS):
        if node not in graph:
            raise ValueError(
                f"`nodes` must be nodes of the graph; {node!r} is none of its {len(graph)}; write "
                "for instance L9H6 or L9.mlp, and give neurons to attribute first"
            )
    chosen |= {u for u, v, d in graph.edges(data=True) if d["structural"] and v in chosen}
    return keep(graph, (e[:3] for e in real_edges(graph) if e[0] in chosen and e[1] in chosen))


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
    kept = keep(
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
    return keep(graph, _appearance(graph, {}))


def _worth(graph: nx.MultiDiGraph, *, signed: bool) -> Callable[[dict[str, Any]], float]:
    """From the attributes of an edge or a node to what it is ranked by."""
    # in the noise direction what helps the task has a negative score
    sign = -1 if graph.graph["direction"] == "noise" else 1
    return lambda data: float(sign * data["score"] if signed else abs(data["score"]))


def _first(
    graph: nx.MultiDiGraph, ranking: Sequence[Edge], edges: int, *, connected: bool
) -> nx.MultiDiGraph:
    """The first edges of a ranking, or with `connected` the longest start of which `edges` count.

    Raises:
        TypeError: `edges` is no whole number.
        ValueError: `edges` is negative.
    """
    edges = operator.index(edges)
    if edges < 0:
        raise ValueError(
            f"`edges` must be 0 or more; got {edges}; the full graph has "
            f"{graph.graph['total_edges']}"
        )
    if not connected:
        return keep(graph, ranking[:edges])
    # The edges that are connected among the best n grow with n. So each edge has one n at which
    # it appears, and the circuit is what appears before the first edge that is too many.
    rank = {edge: i for i, edge in enumerate(ranking, start=1)}
    appears = _appearance(graph, rank)
    counted = sorted(n for edge, n in appears.items() if edge in rank)
    limit = counted[edges] if edges < len(counted) else math.inf
    return keep(graph, (edge for edge, n in appears.items() if n < limit))


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


def keep(graph: nx.MultiDiGraph, edges: Iterable[Edge]) -> nx.MultiDiGraph:
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
