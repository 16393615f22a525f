"""Circuits: scores become graphs, graphs are pruned, judged, drawn and exported."""

from circuits.agreement import agreement
from circuits.draw import draw
from circuits.export import load, save
from circuits.faithfulness import faithfulness
from circuits.graph import assemble
from circuits.patching import patch
from circuits.prune import connect, threshold, top

__all__ = [
    "agreement",
    "assemble",
    "connect",
    "draw",
    "faithfulness",
    "load",
    "patch",
    "save",
    "threshold",
    "top",
]
