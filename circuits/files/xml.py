"""What XML asks of a circuit: edges with ids, and no control characters."""

from __future__ import annotations

import networkx as nx

from circuits.draw.paint import ILLEGAL
from circuits.graph import Circuit

__all__ = ["with_edge_ids", "without_edge_ids"]


def with_edge_ids(graph: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """A copy whose edges are numbered: XML ids must be unique, and our keys repeat."""
    texts = [*graph, *graph.graph.values()]
    texts += [value for _, data in graph.nodes(data=True) for value in data.values()]
    for _, _, key, data in graph.edges(keys=True, data=True):
        texts += [key, *data.values()]
    for text in texts:
        if isinstance(text, str) and ILLEGAL.search(text):
            raise ValueError(
                f"XML can hold no control characters; this circuit has {text!r}; replace them or "
                "save as .json"
            )
    result = nx.MultiDiGraph()
    result.graph.update(graph.graph)
    result.add_nodes_from((node, data.copy()) for node, data in graph.nodes(data=True))
    for i, (u, v, key, data) in enumerate(graph.edges(keys=True, data=True)):
        result.add_edge(u, v, key=f"e{i}", edge_key=key, **data)
    return result


def without_edge_ids(graph: nx.Graph) -> nx.MultiDiGraph:
    """Undoes `with_edge_ids`, and what networkx' readers add."""
    result = Circuit()
    result.add_nodes_from(
        (node, {k: v for k, v in data.items() if k != "label"})
        for node, data in graph.nodes(data=True)
    )
    for u, v, data in graph.edges(data=True):
        kept = {k: v for k, v in data.items() if k not in ("id", "edge_key")}
        result.add_edge(u, v, key=data["edge_key"], **kept)
    return result
