"""Circuits: scores become graphs, graphs are pruned, judged, drawn and exported."""

from circuits.agreement import agreement, auroc
from circuits.draw import draw
from circuits.evaluation import compare, evaluate
from circuits.export import load, save
from circuits.faithfulness import completeness, faithfulness, minimality
from circuits.graph import assemble
from circuits.patching import patch
from circuits.prune import connect, random, threshold, top

__all__ = [
    "agreement",
    "assemble",
    "auroc",
    "compare",
    "completeness",
    "connect",
    "draw",
    "evaluate",
    "faithfulness",
    "load",
    "minimality",
    "patch",
    "random",
    "save",
    "threshold",
    "top",
]
