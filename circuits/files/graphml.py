"""Circuits as .graphml, for yEd, Gephi, igraph and Cytoscape."""

from __future__ import annotations

import io

import networkx as nx

from circuits.files.xml import with_edge_ids, without_edge_ids

__all__ = ["from_graphml", "to_graphml"]


def to_graphml(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """GraphML; attributes keep their types."""
    buffer = io.BytesIO()
    nx.write_graphml_xml(with_edge_ids(graph), buffer, prettyprint=True)
    return buffer.getvalue().decode("utf-8")


def from_graphml(text: str) -> nx.MultiDiGraph:
    """Undoes `to_graphml`."""
    graph = nx.parse_graphml(text, force_multigraph=True)
    result = without_edge_ids(graph)
    defaults = ("node_default", "edge_default")
    result.graph.update((k, v) for k, v in graph.graph.items() if k not in defaults)
    return result
