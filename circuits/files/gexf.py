"""Circuits as .gexf, for Gephi."""

from __future__ import annotations

import html
import io
import json
import xml.etree.ElementTree as ET

import networkx as nx

from circuits.files.xml import with_edge_ids, without_edge_ids

__all__ = ["from_gexf", "to_gexf"]

_WORDS = {"end", "parents", "pid", "slices", "spells", "start", "type", "viz", "weight"}


def to_gexf(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """GEXF has no attributes of graphs: they are JSON in its description."""
    for owners in (graph.nodes(data=True), graph.edges(data=True)):
        kinds: dict[str, type] = {}
        for *_, data in owners:
            if taken := _WORDS & set(data):
                raise ValueError(
                    f"attributes must not be named {sorted(_WORDS)} in .gexf; got "
                    f"{sorted(taken)}; rename them or save as .graphml"
                )
            for name, value in data.items():
                kind = kinds.setdefault(name, type(value))
                if type(value) is not kind:
                    raise ValueError(
                        f"an attribute must be of one type in .gexf; {name!r} is {kind.__name__} "
                        f"and {type(value).__name__}; convert it or save as .graphml"
                    )
    bare = with_edge_ids(graph)
    bare.graph.clear()
    buffer = io.BytesIO()
    nx.write_gexf(bare, buffer)
    before, meta, after = buffer.getvalue().decode("utf-8").partition("</meta>")
    labels = html.escape(json.dumps(graph.graph), quote=False)
    return f"{before}<description>{labels}</description>{meta}{after}"


def from_gexf(text: str) -> nx.MultiDiGraph:
    """Undoes `to_gexf`."""
    elements = (element for _, element in ET.iterparse(io.StringIO(text)))
    description = next((e.text for e in elements if e.tag.endswith("}description")), None)
    graph = nx.read_gexf(io.BytesIO(text.encode("utf-8")))
    result = without_edge_ids(graph)
    result.graph.update(json.loads(description or "{}"))
    return result
