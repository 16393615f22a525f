"""Relevance patching: attribution patching with LRP coefficients in place of gradients."""

from relp.attribution import attribute
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
from relp.scores import Component, Effects, Scores

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
