"""Circuits as .gexf, for Gephi, which shows the hues, widths and places of our own figures.

An edge's `weight` is its width in pixels, as Gephi draws that; its score is `score`.
"""

from __future__ import annotations

import html
import io
import json
import xml.etree.ElementTree as ET

import networkx as nx

from circuits.draw import paint
from circuits.draw.layout import layout
from circuits.files.xml import with_edge_ids, without_edge_ids

__all__ = ["from_gexf", "to_gexf"]

_UNIT, _SIZE = 60.0, 16.0
"""How far apart nodes are in a row, and how large: what Gephi's windows are made for."""
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
    _paint(bare)
    bare.graph.clear()
    buffer = io.BytesIO()
    nx.write_gexf(bare, buffer)
    # networkx names the graph, which the format's schema does not allow
    text = buffer.getvalue().decode("utf-8").replace(' name=""', "", 1)
    before, meta, after = text.partition("</meta>")
    labels = html.escape(json.dumps(graph.graph), quote=False)
    return f"{before}<description>{labels}</description>{meta}{after}"


def _paint(graph: nx.MultiDiGraph) -> None:
    """Adds what `viz` of the format is for: positions, sizes, hues and widths."""
    limit, strongest = paint.node_limit(graph), paint.edge_limit(graph)
    for node, (x, y) in (layout(graph) if graph else {}).items():
        graph.nodes[node]["viz"] = {
            "color": _rgb(paint.tint(graph.nodes[node]["score"], limit)),
            "size": _SIZE,
            "position": {"x": round(x * _UNIT, 2), "y": round(y * _UNIT, 2), "z": 0.0},
        }
    for *_, data in graph.edges(data=True):
        data["weight"] = round(paint.edge_width(data, strongest), 2)  # Gephi knows no other width
        data["viz"] = {
            "color": _rgb(paint.edge_hue(data)),
            "thickness": data["weight"],
            "shape": "dashed" if data["structural"] else "solid",
        }


def _rgb(hue: str) -> dict[str, int | float]:
    red, green, blue = bytes.fromhex(hue[1:])
    return {"r": red, "g": green, "b": blue, "a": 1.0}


def from_gexf(text: str) -> nx.MultiDiGraph:
    """Undoes `to_gexf`."""
    elements = (element for _, element in ET.iterparse(io.StringIO(text)))
    description = next((e.text for e in elements if e.tag.endswith("}description")), None)
    graph = nx.read_gexf(io.BytesIO(text.encode("utf-8")))
    for *_, data in [*graph.nodes(data=True), *graph.edges(data=True)]:
        for name in _WORDS & set(data):
            del data[name]
    result = without_edge_ids(graph)
    result.graph.update(json.loads(description or "{}"))
    return result
