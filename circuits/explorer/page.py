"""The explorer's page: one HTML file with its styles, scripts and data inside, and nothing else."""

from __future__ import annotations

import json
import re
from functools import cache
from html import escape
from importlib import resources

import networkx as nx

from circuits.draw import paint
from circuits.explorer.view import view
from circuits.graph import size

__all__ = ["json_text", "page_of"]

_SCRIPTS = ("d3.js", "circuit.js", "scene.js", "controls.js")


def page_of(graph: nx.MultiDiGraph, title: str | None = None, *, total: int | None = None) -> str:
    """The page of a circuit, which works offline; call it with `strongest(circuit, MOST)`.

    Args:
        graph: a circuit, or what is shown of one.
        title: plain text in place of the task and the model.
        total: how many edges the circuit has that `graph` was taken of; the page says so.

    Raises:
        TypeError, ValueError: `graph` is no circuit, or empty.
    """
    data = view(graph, title, left_out=0 if total is None else total - size(graph))
    pieces = {
        "title": escape(title or paint.heading(graph)),
        "style": _asset("page.css"),
        "data": json_text(json.dumps(data, allow_nan=False, separators=(",", ":"))),
        "scripts": "".join(f"<script>\n{_asset(name)}</script>\n" for name in _SCRIPTS),
    }
    # in one pass, so that nothing in the data is taken for a gap of the template
    return re.sub(r"\{\{(\w+)\}\}", lambda gap: pieces[gap[1]], _asset("page.html"))


def json_text(text: str) -> str:
    """JSON as it can stand in a script element: no name in it can end that, or start a comment."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _asset(name: str) -> str:
    return resources.files("circuits.explorer").joinpath(name).read_text(encoding="utf-8")
