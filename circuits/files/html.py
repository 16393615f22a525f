"""Circuits and figures as .html: plotly's figure, works offline; the graph as JSON inside."""

from __future__ import annotations

from html import escape

import networkx as nx
import plotly.graph_objects as go

from circuits.draw import draw
from circuits.draw.paint import heading
from circuits.files.node_link import FORMAT, from_json, to_json

__all__ = ["from_html", "to_html", "to_page"]

_SCRIPT = f'<script type="application/json" id="{FORMAT}">'


def to_html(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """`draw`'s figure as a page, with the graph inside."""
    # Without <, no name can end the script element or start another one.
    data = to_json(graph).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    page = to_page(draw(graph, title=title), title or heading(graph))
    before, tag, after = page.rpartition("</body>")
    return f"{before}{_SCRIPT}{data}</script>\n{tag}{after}"


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
