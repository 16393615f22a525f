"""Cells: one thing to change in one run, the unit of exact work.

Cells are independent of each other and are told apart by what they are, not by where they stand in
a list: any split of a list, over calls, processes or machines, gives the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from relp import Component

__all__ = ["EVERYWHERE", "Cell"]

EVERYWHERE = -1
"""In the place of a position: all of them."""
WRITTEN = ("embed", "resid", "attn", "mixer", "mlp", "head", "neuron", "feature", "rest")
"""Kinds of components that hold a value which can be replaced."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to change in one run.

    >>> from circuits.exact import Cell
    >>> str(Cell("L9H6", pos=14)), str(Cell("L5H5", "L9H6.q"))
    ('L9H6@14', 'L5H5>L9H6.q')

    Raises:
        ValueError: a name is none, or the position is negative and not `EVERYWHERE`.
    """

    component: str
    """A component's name; a writer's if there is a reader."""
    reader: str = ""
    """Who hears the change; everything after the component if empty."""
    pos: int = EVERYWHERE
    """At which position; all of them if -1."""

    def __post_init__(self) -> None:
        _check_names(self.component, self.reader)
        if self.pos < EVERYWHERE:
            raise ValueError(
                f"a cell's `pos` must be a position from 0 on, or {EVERYWHERE} for all of them; "
                f"got {self.pos}; count from the first token"
            )

    def __str__(self) -> str:
        return (
            self.component
            + (self.reader and f">{self.reader}")
            + (f"@{self.pos}" if self.pos != EVERYWHERE else "")
        )

    @classmethod
    def parse(cls, text: str) -> Cell:
        """The cell that `str` gives this name of.

        Raises:
            ValueError: it is none.
        """
        edge, at, pos = text.partition("@")
        component, _, reader = edge.partition(">")
        return cls(component, reader, int(pos) if at else EVERYWHERE)


@lru_cache(maxsize=1 << 16)  # a list has many cells of few names
def _check_names(component: str, reader: str) -> None:
    kind = Component.parse(component).kind
    if kind not in WRITTEN:
        raise ValueError(
            f"a cell's `component` must be one of the kinds {WRITTEN}; got {component!r}; name the "
            "query heads in place of a key/value head"
        )
    if reader:
        Component.of_reader(reader)
