"""Circuits: scores become graphs, graphs are pruned, judged, drawn and exported."""

from circuits.acdc import acdc
from circuits.agreement import agreement
from circuits.draw import draw
from circuits.export import load, save
from circuits.faithfulness import faithfulness
from circuits.graph import assemble
from circuits.mib import from_mib, to_mib
from circuits.patching import patch
from circuits.prune import between, connect, greedy, threshold, top, top_nodes

__all__ = [
    "acdc",
    "agreement",
    "assemble",
    "between",
    "connect",
    "draw",
    "faithfulness",
    "from_mib",
    "greedy",
    "load",
    "patch",
    "save",
    "threshold",
    "to_mib",
    "top",
    "top_nodes",
]
