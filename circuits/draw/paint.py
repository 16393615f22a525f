"""How pictures are painted: hues, widths, opacity and texts, of plotly, SVG, DOT and Mermaid.

Blue is positive and red negative everywhere, on a scale that is symmetric about 0.
"""

from __future__ import annotations

import html
import math
import re
from typing import Any

import networkx as nx

from circuits.graph import real_edges, size
from relp import Provenance

__all__ = [
    "DARK",
    "ILLEGAL",
    "MUTED",
    "NEGATIVE",
    "NEUTRAL",
    "POSITIVE",
    "edge_hue",
    "edge_limit",
    "edge_note",
    "edge_opacity",
    "edge_share",
    "edge_width",
    "extent",
    "heading",
    "ink",
    "line_width",
    "node_limit",
    "node_note",
    "node_positions",
    "plain",
    "tint",
]

POSITIVE, NEGATIVE, NEUTRAL = "#2166ac", "#b2182b", "#8c959f"
"""The hues of plotly's RdBu, and that of edges without a score."""
DARK, MUTED = "#1f2328", "#57606a"
"""Text, and what stands back behind it: borders and captions."""
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
    scores = {node: abs(data["score"]) for node, data in graph.nodes(data=True)}
    inner = [score for node, score in scores.items() if node != "embed"]
    return max(inner, default=0.0) or max(scores.values(), default=0.0) or 1.0


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


def edge_opacity(share: float, *, structural: bool) -> float:
    """Stronger edges cover more; even in the square root, as most scores are small."""
    return 0.8 if structural else 0.35 + 0.5 * math.sqrt(share)


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


def node_positions(graph: nx.MultiDiGraph, node: str) -> str:
    """The positions that a node writes at (`logits`, key/value heads: reads): `@2 @14`, `@2…14`.

    Empty if edges are summed over positions.
    """
    written, read = (
        sorted({d["pos"] for *_, d in edges if d["pos"] >= 0})
        for edges in (graph.out_edges(node, data=True), graph.in_edges(node, data=True))
    )
    at = written or read
    return f"@{at[0]}…{at[-1]}" if len(at) > 2 else " ".join(f"@{pos}" for pos in at)


def node_note(graph: nx.MultiDiGraph, node: str) -> str:
    """What hovering over a node says."""
    edges_in = sum(1 for *_, d in graph.in_edges(node, data=True) if not d["structural"])
    edges_out = sum(1 for *_, d in graph.out_edges(node, data=True) if not d["structural"])
    data = graph.nodes[node]
    score = "" if data["kind"] in ("kv", "logits") else f" · score {data['score']:+.4g}"
    where = f" {node_positions(graph, node)}" if graph.graph["positions"] else ""
    return f"{node}{where}{score} · {edges_in} in, {edges_out} out"


def edge_note(u: str, v: str, data: dict[str, Any]) -> str:
    """What hovering over an edge says."""
    if data["structural"]:
        return f"{u} → {v} (its keys and values)"
    where = f" @ position {data['pos']}" if data["pos"] >= 0 else ""
    return f"{u} → {data['reader']}{where}: {data['score']:+.4g}"
