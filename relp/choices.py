"""Words and numbers that a verb can be asked for, and the sentence about any other.

Nothing is imported here: the command refuses an option before torch is there.
"""

from __future__ import annotations

__all__ = ["LEVELS", "OWN", "check_direction", "check_level"]

LEVELS = ("node", "edge")
OWN = {"denoise": "corrupt", "noise": "clean"}
"""The run in which each direction changes something."""


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
