"""Words and numbers that a verb can be asked for, and the sentence about any other.

Nothing is imported here: the command refuses an option before torch is there.
"""

from __future__ import annotations

__all__ = [
    "ABLATIONS", "FIGURES", "GRAPH", "MIB", "SUFFIXES", "check_ablation", "check_shard",
    "check_tau",
]  # fmt: skip

ABLATIONS = ("patch", "zero", "mean", "mean_per_position")
MIB = ".mib.json"
"""How files of EAP-IG and MIB are told from circuits, which are .json as well."""
GRAPH = ".graph.json"
"""How attribution graphs are told from them, which viewers of circuit-tracer's open."""
SUFFIXES = (
    *(".json", ".graphml", ".gexf", ".dot", ".csv", ".svg", ".html", ".pdf", ".png", ".tex"),
    *(".mmd", MIB, GRAPH),
)
"""The formats that circuits are saved in: the keys of `circuits.files.formats.FORMATS`."""
FIGURES = (".json", ".svg", ".html", ".pdf", ".png")
"""Those of figures."""


def check_ablation(ablation: str) -> None:
    """Raises ValueError if `ablation` is none of `ABLATIONS`."""
    if ablation not in ABLATIONS:
        raise ValueError(
            f"`ablation` must be one of {ABLATIONS}; got {ablation!r}; 'patch' takes the value of "
            "the other run"
        )


def check_shard(shard: str) -> tuple[int, int]:
    """The numbers of `"3/16"`, the third of sixteen parts of a list of cells.

    Raises:
        ValueError: it is no such part.
    """
    number, _, count = str(shard).partition("/")
    known = [int(n) if n.isascii() and n.isdigit() else 0 for n in (number, count)]
    if not 1 <= known[0] <= known[1]:
        raise ValueError(
            "a shard must be one of so many, as '1/16', '2/16' … '16/16'; got "
            f"{str(shard)!r}; count from 1"
        )
    return known[0], known[1]


def check_tau(tau: float) -> None:
    """Raises ValueError if `tau`, the least cost of a cut, is not above 0 or infinite."""
    if not 0 < tau < float("inf"):
        raise ValueError(
            f"`tau` must be above 0, in units of the metric; got {tau}; try a hundredth of the gap "
            "between the clean and the corrupt metric"
        )
