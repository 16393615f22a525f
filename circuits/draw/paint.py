"""How pictures are painted: hues, widths, opacity and texts, of plotly, SVG, DOT and Mermaid.

Blue is positive and red negative everywhere, on a scale that is symmetric about 0.
"""

from __future__ import annotations

import html
import math
import re
from typing import Any

import networkx as nx

from circuits.graph import has_lanes, has_place, place_label, real_edges, size
from relp import Provenance

__all__ = [
    "BAND",
    "DARK",
    "ILLEGAL",
    "LANE",
    "MUTED",
    "NEGATIVE",
    "NEUTRAL",
    "POSITIVE",
    "edge_hue",
    "edge_limit",
    "edge_notes",
    "edge_opacity",
    "edge_share",
    "edge_width",
    "extent",
    "heading",
    "ink",
    "legend",
    "line_width",
    "measured",
    "node_label",
    "node_limit",
    "node_note",
    "node_positions",
    "node_slots",
    "pixels",
    "plain",
    "samples",
    "tint",
    "titles",
]

POSITIVE, NEGATIVE, NEUTRAL = "#2166ac", "#b2182b", "#8c959f"
"""The hues of plotly's RdBu, and that of edges without a score."""
DARK, MUTED = "#1f2328", "#57606a"
"""Text, and what stands back behind it: borders and captions."""
BAND, LANE = "#f6f8fa", 0.045
"""Behind a layer, and how much a lane darkens it."""
ILLEGAL = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""A character that no XML file can hold."""

# -- hues ------------------------------------------------------------------------------------------


def tint(score: float, limit: float) -> str:
    """A node's fill: white at 0, towards blue or red at `limit` and beyond."""
    share = 0.85 * min(1.0, abs(score) / limit) if limit > 0 else 0.0
    hue = POSITIVE if score >= 0 else NEGATIVE
    mixed = (round(255 + (int(hue[i : i + 2], 16) - 255) * share) for i in (1, 3, 5))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def ink(score: float, limit: float) -> str:
    """A text colour that can be read on `tint`."""
    return "#ffffff" if limit > 0 and abs(score) / limit > 0.62 else DARK


def edge_hue(data: dict[str, Any]) -> str:
    """The colour of an edge's sign; what only holds the circuit together has none."""
    if data["structural"]:
        return NEUTRAL
    return POSITIVE if data["score"] >= 0 else NEGATIVE


# -- scales ----------------------------------------------------------------------------------------


def node_limit(graph: nx.MultiDiGraph) -> float:
    """The score at which node colours saturate: `embed` is left out, it carries nearly all."""
    scores = [(abs(data["score"]), data["kind"]) for _, data in graph.nodes(data=True)]
    inner = [score for score, kind in scores if kind != "embed"]
    return max(inner, default=0.0) or max(scores, default=(0.0, ""))[0] or 1.0


def edge_limit(graph: nx.MultiDiGraph) -> float:
    """The largest |score| of an edge: the width of every other is in proportion to it."""
    return max((abs(d["score"]) for *_, d in real_edges(graph)), default=0.0) or 1.0


def edge_share(data: dict[str, Any], limit: float) -> float:
    """How strong an edge is, between 0 and 1 at `edge_limit`."""
    return 0.0 if data["structural"] else abs(data["score"]) / limit


def line_width(share: float, least: float = 0.5) -> float:
    """Pixels: in proportion to the share, but never too thin to be seen."""
    return max(least, 7.0 * share)


def edge_width(data: dict[str, Any], limit: float) -> float:
    """Pixels of an edge's line; what only holds the circuit together is thin."""
    return 0.9 if data["structural"] else line_width(edge_share(data, limit))


def edge_opacity(share: float, *, structural: bool, edges: int = 0) -> float:
    """Stronger edges cover more; even in the square root, as most scores are small.

    The weak ones fade where there are many: `edges` is how many are drawn.
    """
    weakest = 0.35 * math.sqrt(min(1.0, 150 / max(1, edges)))
    if structural:
        return 0.8 if edges <= 150 else 0.5
    return weakest + (0.85 - weakest) * math.sqrt(share)


def pixels(graph: nx.MultiDiGraph) -> tuple[float, float]:
    """Across and up, per unit of layout: boxes of circuits with lanes are smaller."""
    return (80.0, 68.0) if has_lanes(graph) else (94.0, 74.0)


# -- texts -----------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """`text` so that plotly, which renders some HTML, shows it as it is."""
    return html.escape(text, quote=False)


def heading(graph: nx.MultiDiGraph) -> str:
    """Where a circuit's numbers come from: the same line as `Scores.title`."""
    return Provenance.of(graph.graph).title


def extent(graph: nx.MultiDiGraph) -> str:
    """How much of the model a circuit is: `200 of 32,491 edges`."""
    return f"{size(graph):,} of {graph.graph['total_edges']:,} edges"


def measured(graph: nx.MultiDiGraph, drawn: nx.MultiDiGraph | None = None) -> str:
    """How large a circuit is, how much of it is drawn, and what its scores are shares of."""
    g, most = graph.graph, size(graph if drawn is None else drawn)
    metric = f"{g['metric']} {g['metric_clean']:.3g} clean, {g['metric_corrupt']:.3g} corrupt"
    part = f", the {most:,} strongest drawn" if most < size(graph) else ""
    return f"{extent(graph)}{part} · {metric}"


def titles(
    graph: nx.MultiDiGraph, title: str | None = None, drawn: nx.MultiDiGraph | None = None
) -> tuple[str, str]:
    """The two lines over a picture: what it shows, and where its numbers come from."""
    g = graph.graph
    source = f"{g['task']} · {g['model']}"
    numbers = f"{g['rules']} · {g['direction']} · {measured(graph, drawn)}"
    return (title, f"{source} · {numbers}") if title else (source, numbers)


def samples(limit: float) -> list[tuple[str, float, str]]:
    """Hue, width and word of each line that a legend shows; `limit` is `edge_limit`."""
    signs = [(POSITIVE, 4.0, "positive"), (NEGATIVE, 4.0, "negative")]
    widths = [(NEUTRAL, line_width(share), f"{share * limit:.2g}") for share in (1.0, 0.5, 0.1)]
    return signs + widths


def legend(graph: nx.MultiDiGraph) -> str:
    """What the numbers and the grey lines of a diagram mean."""
    laned = has_lanes(graph)
    boxes = "their sum at that place" if laned else "score of the node, all its edges"
    note = f"edges: score ({graph.graph['metric']}) · boxes: {boxes}"
    if any(data["structural"] for *_, data in graph.edges(data=True)):
        note += " · grey lines: keys and values" + laned * ", read for another place"
    return note


def node_label(graph: nx.MultiDiGraph, node: str) -> str:
    """What a node's box says: its component, as its lane says where."""
    return str(graph.nodes[node]["name"]) if has_place(graph, node) else node


def node_slots(graph: nx.MultiDiGraph, node: str) -> list[str]:
    """Which of q, k and v the edges into a head have, from left to right."""
    entered = {d["slot"] for *_, d in graph.in_edges(node, data=True)}
    return [slot for slot in ("q", "k", "v") if slot in entered]


def node_positions(graph: nx.MultiDiGraph, node: str) -> str:
    """Where a node writes (`logits`, key/value heads: reads): `" Mary"@4`, `@2 @14`, `5 places`.

    Empty if edges are summed over positions.
    """
    written, read = (
        sorted({d["pos"] for *_, d in edges if d["pos"] >= 0})
        for edges in (graph.out_edges(node, data=True), graph.in_edges(node, data=True))
    )
    at = written or read
    return f"{len(at)} places" if len(at) > 2 else " ".join(place_label(graph, p) for p in at)


def node_note(graph: nx.MultiDiGraph, node: str) -> str:
    """What hovering over a node says; of a place, the score is that of the edges that are drawn."""
    edges_in = sum(1 for *_, d in graph.in_edges(node, data=True) if not d["structural"])
    edges_out = sum(1 for *_, d in graph.out_edges(node, data=True) if not d["structural"])
    data, laned = graph.nodes[node], has_place(graph, node)
    kind = "score of these edges" if laned else "score"
    score = "" if data["kind"] in ("kv", "logits") else f" · {kind} {data['score']:+.4g}"
    if laned:
        score *= edges_out > 0  # what only reads has none
        where = f" at {place_label(graph, data['pos'])}"
    else:
        where = f" {node_positions(graph, node)}" if graph.graph["positions"] else ""
    text = f" · {label}" if (label := data.get("text")) else ""
    return f"{node_label(graph, node)}{where}{text}{score} · {edges_in} in, {edges_out} out"


def edge_notes(graph: nx.MultiDiGraph) -> list[str]:
    """What hovering over each edge says, in the order of the graph."""
    places = {pos: place_label(graph, pos) for *_, pos in graph.edges(data="pos") if pos >= 0}

    def note(u: str, v: str, data: dict[str, Any]) -> str:
        if data["structural"]:
            return f"{u} → {v} (its keys and values)"
        where = f" at {places[data['pos']]}" if data["pos"] >= 0 else ""
        return f"{node_label(graph, u)} → {data['reader']}{where}: {data['score']:+.4g}"

    return [note(u, v, data) for u, v, data in graph.edges(data=True)]
