"""Circuits as .html, the explorer's page with the graph as JSON inside; figures as plotly's."""

from __future__ import annotations

from html import escape

import networkx as nx
import plotly.graph_objects as go

from circuits.draw.lanes import MOST, strongest
from circuits.explorer.page import json_text, page_of
from circuits.files.node_link import FORMAT, from_json, to_json
from circuits.graph import size

__all__ = ["from_html", "to_html", "to_page"]

_SCRIPT = f'<script type="application/json" id="{FORMAT}">'


def to_html(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """The explorer's page, with the graph inside."""
    page = page_of(strongest(graph, MOST), title, total=size(graph))
    before, tag, after = page.rpartition("</body>")
    return f"{before}{_SCRIPT}{json_text(to_json(graph))}</script>\n{tag}{after}"


def from_html(text: str) -> nx.MultiDiGraph:
    """The graph in the page."""
    _, found, rest = text.rpartition(_SCRIPT)
    if not found:
        raise ValueError("the page holds no circuit")
    return from_json(rest.partition("</script>")[0])


def to_page(figure: go.Figure, title: str) -> str:
    """A page that works offline: plotly's code is inside, about 5 MB."""
    page: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return page.replace("<head>", f"<head><title>{escape(title)}</title>", 1)
