"""Circuits as .mmd: Mermaid, for Markdown files; written only."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise

import networkx as nx

from circuits.draw import paint
from circuits.files.layers import frames, rows

__all__ = ["to_mermaid"]

_MOST_EDGES, _MOST_TEXT = 500, 50_000
"""Mermaid's maxEdges and maxTextSize, which a diagram cannot raise, only the page around it."""


def to_mermaid(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """A flowchart from bottom to top: a frame for each layer, or position if it has lanes.

    Invisible links (`~~~`) keep the layers in order, as far as Mermaid's limit leaves room.

    Raises:
        ValueError: Mermaid would refuse to draw it for its size.
    """
    ids = {node: f"n{i}" for i, node in enumerate(graph)}
    boxes = {node: f'{name}("{_text(node)}")' for node, name in ids.items()}
    # The title is YAML, in which a JSON string is a valid one.
    lines = [
        "---",
        f"title: {json.dumps(title or paint.heading(graph), ensure_ascii=False)}",
        "---",
        "flowchart BT",
    ]
    for number, (name, nodes) in enumerate(frames(graph).items()):
        inner = [f"        {boxes.pop(node)}" for node in nodes]
        lines += [f'    subgraph f{number}["{_text(name)}"]', *inner, "    end"]
        lines.append(f"    style f{number} fill:#f6f8fa,stroke:#d0d7de")
    lines += [f"    {box}" for box in boxes.values()]
    limit = paint.node_limit(graph)
    for node, name in ids.items():
        score = graph.nodes[node]["score"]
        fill, color = paint.tint(score, limit), paint.ink(score, limit)
        lines.append(f"    style {name} fill:{fill},color:{color},stroke:{paint.MUTED}")
    strongest, alike = paint.edge_limit(graph), defaultdict(list)
    for i, (u, v, key, data) in enumerate(graph.edges(keys=True, data=True)):
        arrow = "-.->" if data["structural"] else "-->"
        label = "" if key in ("in", "kv") else f'|"{_text(key)}"|'
        lines.append(f"    {ids[u]} {arrow}{label} {ids[v]}")
        width = f"{paint.edge_width(data, strongest):.2f}px"
        alike[f"stroke:{paint.edge_hue(data)},stroke-width:{width}"].append(str(i))
    lines += [f"    linkStyle {','.join(links)} {style}" for style, links in alike.items()]
    arrows = graph.number_of_edges()
    steps = [f"    {ids[u]} ~~~ {ids[v]}" for (u, *_), (v, *_) in pairwise(rows(graph))]
    text = "\n".join([*lines, *steps[: max(0, _MOST_EDGES - arrows)]]) + "\n"
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
