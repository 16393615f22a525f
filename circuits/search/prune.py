"""Choosing a circuit: the edges that matter, and among them those that can carry a signal.

    circuit = top(scores, edges=200)

What ranks edges takes a graph, or the edge scores that it would be assembled from: the circuit is
the same, and the full graph, which takes seconds for a large model, is not built. Every function
returns a new graph with copies of the attributes and leaves its input alone. Structural edges
(key/value head -> query head) carry paths, cost nothing, and stay as long as both of their ends are
used.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from random import Random

import networkx as nx
import torch

from circuits.graph import check_circuit, keep, real_edges
from circuits.search.rank import Table, placed, worth
from relp import Scores

__all__ = ["between", "connect", "greedy", "random", "threshold", "top", "top_nodes"]

_ENDS = ("embed", "logits")


def top(
    graph: nx.MultiDiGraph | Scores, *, edges: int, signed: bool = False, connected: bool = True
) -> nx.MultiDiGraph:
    """The `edges` edges of largest |score|; ties are broken by name.

    >>> circuit = top(edges, edges=200)
    >>> circuit.has_edge("L0H3", "L0.mlp", "in")
    True

    With `connected=True` edges are taken in that order until those that lie on a path from `embed`
    to `logits` would be more than `edges`. One more edge can close a long path, so that the
    circuit can hold a few edges less than asked for; it never holds more.

    Args:
        graph: a circuit, or edge scores, which stand for `assemble(scores)`.
        edges: how many to keep; structural edges are not counted.
        signed: rank by how much an edge helps the clean behaviour instead of |score|, so that
            edges that work against it come last, in either direction.
        connected: keep only what lies on a path from `embed` to `logits`.

    Raises:
        TypeError: `graph` is no circuit, or `edges` is no whole number.
        ValueError: `edges` is negative; or the scores are none of edges, as for `assemble`.
    """
    table = Table.of(graph)
    return table.first(table.ranks(signed=signed), edges, connected=connected)


def greedy(
    graph: nx.MultiDiGraph | Scores, *, edges: int, signed: bool = False, connected: bool = True
) -> nx.MultiDiGraph:
    """The circuit that grows from `logits` backwards, always by its strongest incoming edge.

    >>> greedy(edges, edges=200)

    At each step the best edge into a node that is already reached is taken, and its writer counts
    as reached. So no edge is taken that leads nowhere, unlike in `top`; a strong edge behind a weak
    one has to wait. Source: Hanna et al. 2024, arXiv:2403.17806 (`apply_greedy` of EAP-IG, which
    takes `edges` edges and then drops those that do not lead back to the embedding:
    `connect(greedy(graph, edges=n, connected=False))`). Ties are broken by name.

    Args:
        graph, edges, signed: as in `top`.
        connected: keep only what lies on a path from `embed` to `logits`, and go on until that
            would be more than `edges`, as in `top`.

    Raises:
        TypeError, ValueError: as `top`.
    """
    table = Table.of(graph)
    return table.first(table.greedy(table.ranks(signed=signed)), edges, connected=connected)


def random(
    graph: nx.MultiDiGraph | Scores, *, edges: int, seed: int = 0, connected: bool = True
) -> nx.MultiDiGraph:
    """`edges` edges in an order drawn at random: what a circuit of that size must beat.

    >>> faithfulness(model, task, [random(edges, edges=200, seed=s) for s in range(3)])

    They are chosen as `top` chooses them, by chance instead of by score; the same seed gives the
    same circuit. Arguments and errors are those of `top`.
    """
    table = Table.of(graph)
    order = list(range(int(table.exists.sum())))  # by name
    Random(seed).shuffle(order)
    rank = placed(torch.tensor(order, dtype=torch.long, device="cpu"), table.exists)
    return table.first(rank, edges, connected=connected)


def top_nodes(graph: nx.MultiDiGraph, *, nodes: int, signed: bool = False) -> nx.MultiDiGraph:
    """The `nodes` heads, neurons, MLPs and mixers of largest |score|, and every edge between them.

    >>> sorted(top_nodes(assemble(edges), nodes=3))

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
    countable = sorted(n for n, d in graph.nodes(data=True) if d["kind"] not in (*_ENDS, "kv"))
    scores = torch.tensor([graph.nodes[n]["score"] for n in countable], dtype=torch.float64)
    best = worth(scores, graph.graph["direction"], signed=signed)
    order = best.argsort(descending=True, stable=True)[:nodes]
    return between(graph, [countable[i] for i in order.tolist()])


def between(graph: nx.MultiDiGraph, nodes: Iterable[str]) -> nx.MultiDiGraph:
    """The circuit of these nodes: every edge between them, `embed` and `logits`.

    >>> between(assemble(edges), ["L1H1", "L1H3", "L0.mlp"])

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
    graph: nx.MultiDiGraph | Scores, minimum: float, *, signed: bool = False, connected: bool = True
) -> nx.MultiDiGraph:
    """The edges with |score| >= `minimum`, in units of the metric.

    >>> threshold(edges, 0.5)

    Args:
        graph: as in `top`.
        minimum: the least |score| (least score if `signed`) that stays.
        signed: compare the score itself, so that negative edges go first.
        connected: keep only what lies on a path from `embed` to `logits`.

    Raises:
        TypeError: `graph` is no circuit.
        ValueError: `minimum` is NaN, or negative without `signed`; or as for `assemble`.
    """
    table = Table.of(graph)
    if math.isnan(minimum) or (minimum < 0 and not signed):
        raise ValueError(
            f"`minimum` must be 0 or more, as it is compared with |score|; got {minimum}; pass "
            "signed=True to compare it with the score itself"
        )
    kept = table.exists & ((table.scores if signed else table.scores.abs()) >= minimum)
    return table.circuit(table.connected(kept) if connected else kept)


def connect(graph: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """The nodes and edges that lie on a path from `embed` to `logits`; maybe none.

    >>> connect(greedy(edges, edges=50, connected=False))

    Raises:
        TypeError: `graph` is no circuit.
    """
    table = Table.of(check_circuit(graph))
    return table.circuit(table.connected(table.exists))
