"""Words and numbers that a verb can be asked for, and the sentence about any other.

Nothing is imported here: the command refuses an option before torch is there.
"""

from __future__ import annotations

__all__ = [
    "ABLATIONS",
    "LEVELS",
    "MIB",
    "OWN",
    "SUFFIXES",
    "check_ablation",
    "check_direction",
    "check_level",
    "check_tau",
]

LEVELS = ("node", "edge")
OWN = {"denoise": "corrupt", "noise": "clean"}
"""The run in which each direction changes something."""
ABLATIONS = ("patch", "zero", "mean", "mean_per_position")
MIB = ".mib.json"
"""How files of EAP-IG and MIB are told from circuits, which are .json as well."""
SUFFIXES = (".json", ".graphml", ".gexf", ".dot", ".svg", ".html", ".mmd", MIB)
"""The formats that circuits are saved in."""


def check_level(level: str) -> None:
    """Raises ValueError if `level` is none of `LEVELS`."""
    if level not in LEVELS:
        raise ValueError(f"`level` must be 'node' or 'edge'; got {level!r}; choose one of them")


def check_direction(direction: str) -> None:
    """Raises ValueError if `direction` is none of `OWN`."""
    if direction not in OWN:
        raise ValueError(
            f"`direction` must be 'denoise' or 'noise'; got {direction!r}; 'denoise' patches clean "
            "values into the corrupt run"
        )


def check_ablation(ablation: str) -> None:
    """Raises ValueError if `ablation` is none of `ABLATIONS`."""
    if ablation not in ABLATIONS:
        raise ValueError(
            f"`ablation` must be one of {ABLATIONS}; got {ablation!r}; 'patch' takes the value of "
            "the other run"
        )


def check_tau(tau: float) -> None:
    """Raises ValueError if `tau`, the least cost of a cut, is not above 0 or infinite."""
    if not 0 < tau < float("inf"):
        raise ValueError(
            f"`tau` must be above 0, in units of the metric; got {tau}; try a hundredth of the gap "
            "between the clean and the corrupt metric"
        )
