"""Circuits as .json: networkx' node-link data, with a format and a version."""

from __future__ import annotations

import json

import networkx as nx

from circuits.graph import Circuit

__all__ = ["FORMAT", "from_json", "to_json"]

FORMAT = "relp-circuit"
"""Also the id of the element that holds this text in pictures and pages."""
_VERSION = 2
_EDGES_OF = {1: "links", 2: "edges"}
"""What each version calls its edges: networkx changed its default in 3.6."""


def to_json(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """Node-link data, with the format and its version."""
    data = nx.node_link_data(graph, edges=_EDGES_OF[_VERSION])
    extra = {} if title is None else {"title": title}
    return json.dumps({"format": FORMAT, "version": _VERSION, **extra, **data}, allow_nan=False)


def from_json(text: str) -> nx.MultiDiGraph:
    """Undoes `to_json`."""
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'the field "format" must be "{FORMAT}"')
    version = data.get("version")
    if version not in _EDGES_OF:
        raise ValueError(
            f"the version must be one of {tuple(_EDGES_OF)}; got {version!r}; install the newer "
            "release that wrote it"
        )
    return Circuit(nx.node_link_graph(data, edges=_EDGES_OF[version]))
