"""Words that a verb can be asked for, and the sentence about any other.

Nothing is imported here: the command refuses an option before torch is there.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Direction", "Level", "Preset"]


class _Word(StrEnum):
    """A word of a few, which messages and files show as plain text."""

    __repr__ = str.__repr__


class Level(_Word):
    """What is scored: components, or what each reader hears of each writer.

    >>> Level("node") == "node"
    True
    """

    NODE = "node"
    EDGE = "edge"

    @classmethod
    def _missing_(cls, value: object) -> Level:
        raise ValueError(
            f"`level` must be 'node' or 'edge'; got {value!r}; choose one of them"
        ) from None


class Direction(_Word):
    """In which run something is changed, and so what the sign of a score says.

    `denoise`: the own run is the corrupt one, and a positive score means that putting the clean
    value in raises the metric (as TransformerLens' `attribution_patch` and the RelP demo). `noise`:
    the own run is the clean one, and a positive score means that putting the corrupt value in
    raises the metric (as EAP-IG and MIB).

    >>> Direction("noise").own, Direction("noise").other
    ('clean', 'corrupt')
    """

    DENOISE = "denoise"
    NOISE = "noise"

    @classmethod
    def _missing_(cls, value: object) -> Direction:
        raise ValueError(
            f"`direction` must be 'denoise' or 'noise'; got {value!r}; 'denoise' patches clean "
            "values into the corrupt run"
        ) from None

    @property
    def own(self) -> str:
        """The run in which something is changed: `clean` or `corrupt`."""
        return "corrupt" if self is Direction.DENOISE else "clean"

    @property
    def other(self) -> str:
        """The run whose values are put in."""
        return "clean" if self is Direction.DENOISE else "corrupt"

    @property
    def sign(self) -> int:
        """1 where positive helps the clean behaviour, -1 where it works against it."""
        return 1 if self is Direction.DENOISE else -1


class Preset(_Word):
    """The names of the published rules, upper or lower case, `-` or `_`.

    >>> Preset("attn-lrp")
    'ATTN_LRP'
    """

    GRADIENT = "GRADIENT"
    RELP = "RELP"
    CP_LRP = "CP_LRP"
    ATTN_LRP = "ATTN_LRP"
    GIM = "GIM"
    DEEPLIFT = "DEEPLIFT"
    PARTWAY = "PARTWAY"

    @classmethod
    def _missing_(cls, value: object) -> Preset:
        key = str(value).upper().replace("-", "_")
        if key in cls.__members__:
            return cls[key]
        raise ValueError(
            f"rules must be one of {', '.join(cls)}; got {value!r}; "
            "build your own with Rules(...) or RELP.with_(...)"
        ) from None
