"""Circuits: scores become graphs, graphs are pruned, judged, drawn and exported."""

from typing import TYPE_CHECKING

from relp import lazy

if TYPE_CHECKING:
    from circuits.acdc import acdc
    from circuits.agreement import agreement, auroc
    from circuits.draw import draw
    from circuits.evaluation import compare, evaluate
    from circuits.export import load, save
    from circuits.faithfulness import completeness, faithfulness, minimality
    from circuits.graph import assemble
    from circuits.mib import from_mib, to_mib
    from circuits.patching import patch
    from circuits.prune import between, connect, greedy, random, threshold, top, top_nodes

__all__ = [
    "acdc",
    "agreement",
    "assemble",
    "auroc",
    "between",
    "compare",
    "completeness",
    "connect",
    "draw",
    "evaluate",
    "faithfulness",
    "from_mib",
    "greedy",
    "load",
    "minimality",
    "patch",
    "random",
    "save",
    "threshold",
    "to_mib",
    "top",
    "top_nodes",
]

lazy.lazily(
    __name__,
    {
        "acdc": "acdc",
        "agreement": "agreement auroc",
        "draw": "draw",
        "evaluation": "compare evaluate",
        "export": "load save",
        "faithfulness": "completeness faithfulness minimality",
        "graph": "assemble",
        "mib": "from_mib to_mib",
        "patching": "patch",
        "prune": "between connect greedy random threshold top top_nodes",
    },
)
