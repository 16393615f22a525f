"""Relevance patching: attribution patching with LRP coefficients in place of gradients."""

from typing import TYPE_CHECKING

from relp import bars, lazy, neighbours  # noqa: F401  # the bars before anybody else's

if TYPE_CHECKING:
    from relp.attribution import attribute, plan
    from relp.choices import Direction, Level, Preset
    from relp.dictionaries import Dictionary, load_dictionary
    from relp.files import check_texts, written_whole
    from relp.layout import Component, Layout
    from relp.operations import register
    from relp.propagation import UnknownOperationError, coverage, propagate
    from relp.protocols import ModelLike, TaskLike
    from relp.rulebook import (
        ATTN_LRP,
        CP_LRP,
        DEEPLIFT,
        GIM,
        GRADIENT,
        PARTWAY,
        PRESETS,
        RELP,
        Rules,
        preset,
    )
    from relp.scores import (
        EdgeEffects,
        EdgeScores,
        Effects,
        NodeEffects,
        NodeScores,
        Pairs,
        Provenance,
        Scores,
    )

__all__ = [
    "ATTN_LRP",
    "CP_LRP",
    "DEEPLIFT",
    "GIM",
    "GRADIENT",
    "PARTWAY",
    "PRESETS",
    "RELP",
    "Component",
    "Dictionary",
    "Direction",
    "EdgeEffects",
    "EdgeScores",
    "Effects",
    "Layout",
    "Level",
    "ModelLike",
    "NodeEffects",
    "NodeScores",
    "Pairs",
    "Preset",
    "Provenance",
    "Rules",
    "Scores",
    "TaskLike",
    "UnknownOperationError",
    "attribute",
    "check_texts",
    "coverage",
    "load_dictionary",
    "plan",
    "preset",
    "propagate",
    "register",
    "written_whole",
]

neighbours.check_neighbours()
lazy.lazily(
    __name__,
    {
        "attribution": "attribute plan",
        "choices": "Direction Level Preset",
        "dictionaries": "Dictionary load_dictionary",
        "files": "check_texts written_whole",
        "layout": "Component Layout",
        "operations": "register",
        "propagation": "UnknownOperationError coverage propagate",
        "protocols": "ModelLike TaskLike",
        "rulebook": "ATTN_LRP CP_LRP DEEPLIFT GIM GRADIENT PARTWAY PRESETS RELP Rules preset",
        "scores": "EdgeEffects EdgeScores Effects NodeEffects NodeScores Pairs Provenance Scores",
    },
)
