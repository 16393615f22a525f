"""Ways to score edges and nodes that a benchmark compares: estimates, searches, the truth, chance.

A method of one's own is a function `(model, task, level, direction) -> Scores`, for instance

    def mine(model, task, level, direction):
        return attribute(model, task, rules=MINE, level=level, direction=direction, progress=False)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from circuits.graph import real_edges
from relp import (
    GRADIENT,
    PRESETS,
    Direction,
    EdgeScores,
    ModelLike,
    Rules,
    Scores,
    TaskLike,
    attribute,
)

__all__ = ["METHODS", "Method", "from_name"]

Function = Callable[[ModelLike, TaskLike, str, str], Scores]
STEPS = 5
"""Of integrated gradients, as the authors of EAP-IG take."""
SHARE = 0.02
"""ACDC's tau: the share of the gap that the cut of an edge must cost."""


@dataclass(frozen=True)
class Method:
    """A way to score, and what it can score."""

    name: str
    scores: Function
    nodes: bool = True
    """Whether it scores nodes, too."""
    measures: bool = False
    """Whether it runs the model once for each edge, which only small models allow."""
    averages: bool = True
    """Whether its scores of many pairs are the mean of those of each."""
    version: str = ""
    """Of a function of one's own: it changes when the file does that it stands in."""


def _rules(rules: Rules, steps: int = 1) -> Function:
    return partial(_attributed, rules, steps)  # not a function within, which no process is sent


def _attributed(
    rules: Rules, steps: int, model: ModelLike, task: TaskLike, level: str, direction: str
) -> Scores:
    return attribute(
        model, task, rules=rules, level=level, direction=direction, steps=steps, progress=False
    )


def _exact(model: ModelLike, task: TaskLike, level: str, direction: str) -> Scores:
    from circuits.exact.patch import patch

    return patch(model, task, level=level, direction=direction, progress=False)


def _acdc(model: ModelLike, task: TaskLike, level: str, direction: str) -> Scores:
    """What the cut of each edge cost that ACDC left; 0 for the others. It knows one direction."""
    from circuits.search.acdc import acdc

    like = _edges(model, task, direction)
    gap = float(like.gap.mean().abs())
    circuit = acdc(model, task, tau=SHARE * gap, progress=False)
    edges = torch.zeros_like(like.edges)
    for writer, _, _, data in real_edges(circuit):
        edges[like.layout.row[writer], like.layout.column[data["reader"]]] = data["score"]
    sign = -Direction(direction).sign  # a cut moves the metric the other way than putting back
    return replace(like, edges=sign * edges).renamed("ACDC")


def _random(model: ModelLike, task: TaskLike, level: str, direction: str) -> Scores:
    """Other numbers for every task, the same each time."""
    tokens = str((task.clean.tolist(), task.corrupt.tolist())).encode()
    generator = torch.Generator().manual_seed(int(hashlib.sha256(tokens).hexdigest()[:8], 16))
    like = attribute(model, task, rules=GRADIENT, level=level, direction=direction, progress=False)
    drawn = torch.randn(like.table.shape, generator=generator)
    if isinstance(like, EdgeScores):
        return replace(like, edges=drawn * like.layout.exists).renamed("random")
    return replace(like, nodes=drawn).renamed("random")


def _edges(model: ModelLike, task: TaskLike, direction: str) -> EdgeScores:
    like = attribute(model, task, rules=GRADIENT, level="edge", direction=direction, progress=False)
    assert isinstance(like, EdgeScores)
    return like


METHODS = {
    method.name: method
    for method in (
        *(Method(name, _rules(rules)) for name, rules in PRESETS.items()),
        Method(f"EAP-IG ({STEPS} steps)", _rules(GRADIENT, STEPS)),
        Method("ACDC", _acdc, nodes=False, measures=True, averages=False),
        Method("exact", _exact, nodes=False, measures=True),
        Method("random", _random),
    )
}
"""The methods by name. `GRADIENT` is attribution patching, and for edges EAP."""


def from_name(name: str) -> Method:
    """A method of this table, or a function `module:function` of anybody's.

    >>> from circuits.judge.methods import from_name
    >>> from_name("RELP").name
    'RELP'

    Raises:
        ValueError: there is no such method, module or function.
    """
    if name in METHODS:
        return METHODS[name]
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(
            f"a method must be one of {', '.join(METHODS)}, or a function as module:function; got "
            f"{name!r}; `mine:scores` is the function `scores` of mine.py in this folder"
        )
    try:
        found: Any = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"a method of your own must be a function that can be imported, as module:function; "
            f"{name!r} cannot ({error}); run the command in the folder of {module}.py"
        ) from error
    if not callable(found):
        raise ValueError(
            f"a method of your own must be a function (model, task, level, direction) -> Scores; "
            f"{name!r} is a {type(found).__name__}; give the name of a function"
        )
    source = Path(str(import_module(module).__file__)).read_bytes()
    return Method(function, found, version=hashlib.sha256(source).hexdigest()[:8])
