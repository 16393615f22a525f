"""Circuits as .mmd: Mermaid, for Markdown files; written only."""

from __future__ import annotations

import json

import networkx as nx

from circuits.draw import paint

__all__ = ["to_mermaid"]

_MOST_EDGES, _MOST_TEXT = 500, 50_000
"""Mermaid's maxEdges and maxTextSize, which a diagram cannot raise, only the page around it."""


def to_mermaid(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """A flowchart from bottom to top.

    Raises:
        ValueError: Mermaid would refuse to draw it for its size.
    """
    limit, strongest = paint.node_limit(graph), paint.edge_limit(graph)
    # The title is YAML, in which a JSON string is a valid one.
    lines = [
        "---",
        f"title: {json.dumps(title or paint.heading(graph), ensure_ascii=False)}",
        "---",
        "flowchart BT",
    ]
    ids = {node: f"n{i}" for i, node in enumerate(graph)}
    for node, name in ids.items():
        score = graph.nodes[node]["score"]
        lines.append(f'    {name}("{_text(node)}")')
        fill, color = paint.tint(score, limit), paint.ink(score, limit)
        lines.append(f"    style {name} fill:{fill},color:{color},stroke:{paint.MUTED}")
    styles = []
    for i, (u, v, key, data) in enumerate(graph.edges(keys=True, data=True)):
        arrow = "-.->" if data["structural"] else "-->"
        label = "" if key in ("in", "kv") else f'|"{_text(key)}"|'
        lines.append(f"    {ids[u]} {arrow}{label} {ids[v]}")
        width = f"{paint.edge_width(data, strongest):.2f}px"
        styles.append(f"    linkStyle {i} stroke:{paint.edge_hue(data)},stroke-width:{width}")
    text = "\n".join([*lines, *styles]) + "\n"
    arrows = graph.number_of_edges()
    if arrows > _MOST_EDGES or len(text) > _MOST_TEXT:
        raise ValueError(
            f"Mermaid draws at most {_MOST_EDGES} edges and {_MOST_TEXT} letters; this "
            f"circuit has {arrows} and {len(text)}; keep fewer with circuits.top(circuit, "
            "edges=...) or save as .svg or .html"
        )
    return text


def _text(text: str) -> str:
    """Mermaid's entities are HTML's with # in place of &."""
    special = {"&": "#amp;", "<": "#lt;", ">": "#gt;", '"': "#quot;", "#": "#35;", "\n": " "}
    return "".join(special.get(letter, letter) for letter in text)
