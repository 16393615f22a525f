"""Circuits: scores become graphs, graphs are pruned, judged, drawn and exported."""

from typing import TYPE_CHECKING

from relp import lazy

if TYPE_CHECKING:
    from circuits.draw import attention, draw
    from circuits.exact.patch import patch
    from circuits.exact.verify import verify
    from circuits.explorer import explore
    from circuits.files.formats import load, save
    from circuits.files.mib import from_mib, to_mib
    from circuits.graph import Circuit, assemble, labelled
    from circuits.judge.agreement import agreement, agreement_tests
    from circuits.judge.evaluation import compare, evaluate
    from circuits.judge.faithfulness import completeness, faithfulness, minimality
    from circuits.judge.features import evaluate_features
    from circuits.judge.known import auroc
    from circuits.judge.missed import missed
    from circuits.judge.tables import to_latex, to_markdown
    from circuits.search.acdc import acdc
    from circuits.search.prune import between, connect, greedy, random, threshold, top, top_nodes
    from circuits.steering import steered

__all__ = [
    "Circuit",
    "acdc",
    "agreement",
    "agreement_tests",
    "assemble",
    "attention",
    "auroc",
    "between",
    "compare",
    "completeness",
    "connect",
    "draw",
    "evaluate",
    "evaluate_features",
    "explore",
    "faithfulness",
    "from_mib",
    "greedy",
    "labelled",
    "load",
    "minimality",
    "missed",
    "patch",
    "random",
    "save",
    "steered",
    "threshold",
    "to_latex",
    "to_markdown",
    "to_mib",
    "top",
    "top_nodes",
    "verify",
]

lazy.lazily(
    __name__,
    {
        "search.acdc": "acdc",
        "judge.agreement": "agreement agreement_tests",
        "draw": "attention draw",
        "explorer": "explore",
        "judge.evaluation": "compare evaluate",
        "files.formats": "load save",
        "judge.features": "evaluate_features",
        "judge.faithfulness": "completeness faithfulness minimality",
        "graph": "Circuit assemble labelled",
        "files.mib": "from_mib to_mib",
        "exact.patch": "patch",
        "exact.verify": "verify",
        "judge.known": "auroc",
        "judge.missed": "missed",
        "judge.tables": "to_latex to_markdown",
        "search.prune": "between connect greedy random threshold top top_nodes",
        "steering": "steered",
    },
)
