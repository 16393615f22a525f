"""Circuits as .svg: a picture that stands alone; the graph as JSON in its metadata."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import networkx as nx

from circuits.draw.svg import METADATA, picture
from circuits.files.node_link import from_json, to_json

__all__ = ["from_svg", "to_svg"]


def to_svg(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """The picture, with the graph inside."""
    return picture(graph, title, to_json(graph))


def from_svg(text: str) -> nx.MultiDiGraph:
    """The graph in the metadata."""
    for element in ET.fromstring(text).iter():
        if element.get("id") == METADATA:
            return from_json(element.text or "")
    raise ValueError("the picture holds no circuit in its metadata")
