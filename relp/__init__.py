"""Relevance patching: attribution patching with LRP coefficients in place of gradients."""

from typing import TYPE_CHECKING

from relp import lazy, neighbours

if TYPE_CHECKING:
    from relp.attribution import attribute
    from relp.layout import Component
    from relp.operations import register
    from relp.propagation import UnknownOperationError, coverage, propagate
    from relp.rulebook import (
        ATTN_LRP,
        CP_LRP,
        DEEPLIFT,
        GIM,
        GRADIENT,
        PRESETS,
        RELP,
        Rules,
        preset,
    )
    from relp.scores import Effects, Scores

__all__ = [
    "ATTN_LRP",
    "CP_LRP",
    "DEEPLIFT",
    "GIM",
    "GRADIENT",
    "PRESETS",
    "RELP",
    "Component",
    "Effects",
    "Rules",
    "Scores",
    "UnknownOperationError",
    "attribute",
    "coverage",
    "preset",
    "propagate",
    "register",
]

neighbours.check_neighbours()
lazy.lazily(
    __name__,
    {
        "attribution": "attribute",
        "layout": "Component",
        "operations": "register",
        "propagation": "UnknownOperationError coverage propagate",
        "rulebook": "ATTN_LRP CP_LRP DEEPLIFT GIM GRADIENT PRESETS RELP Rules preset",
        "scores": "Effects Scores",
    },
)
