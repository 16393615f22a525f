"""Which cells to measure when not all can be: the strongest-scored, and some of the rest by lot."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = ["CERTAIN", "LEAST", "Sample", "drawn"]

CERTAIN = 0
"""The number of the stratum of what is measured for certain."""
STRATA = 8
"""Of each kind, by strength, at most."""
LEAST = 4
"""Cells of a kind that are measured at least: two strong ones, and two by lot."""


class Sample(NamedTuple):
    """What is measured, and what each cell that was drawn stands for."""

    measured: Bool[np.ndarray, " cell"]
    stratum: Int[np.ndarray, " cell"]
    """`CERTAIN`, or the number of the stratum that a cell may be drawn from."""
    idle: Bool[np.ndarray, " cell"]
    """What changes nothing."""

    @property
    def title(self) -> str:
        """How many are measured, of those that change something."""
        if self.measured.all():
            return "exact"
        busy = ~self.idle
        return f"exact ({self.measured[busy].sum():,} of {busy.sum():,} cells)"


def drawn(
    strength: Float[np.ndarray, "scores cell"],
    kind: Int[np.ndarray, " cell"],
    idle: Bool[np.ndarray, " cell"],
    budget: int,
    seed: int,
) -> Sample:
    """A sample of cells, of which each kind gets an equal share, or all that it has.

    Half of a share goes to the strongest, the other half to the rest by lot, as many of each
    stratum as it is large: all cells of a kind that may be drawn have the same chance, up to
    rounding. Strata are of like strength, and two cells or more of each are drawn.

    Args:
        strength: |score| of each cell; of several sets, each cell has the best of its ranks.
        kind: the number of its kind.
        idle: changes nothing, so that its effect is known, and costs nothing.
        budget: how many others are measured.
        seed: of the lot.
    """
    measured, stratum = idle.copy(), np.full(len(kind), CERTAIN)
    groups = [np.flatnonzero((kind == k) & ~idle) for k in np.unique(kind)]
    last = CERTAIN
    for number, (cells, share) in enumerate(zip(groups, _shares(groups, budget), strict=True)):
        cells = cells[_order(strength[:, cells])]
        lot = share - share // 2 if share < len(cells) else 0
        measured[cells[: share - lot]] = True
        rest, generator = cells[share - lot :], np.random.default_rng([seed, number])
        for size, part in _divided(rest, lot):
            last += 1
            stratum[part] = last
            measured[generator.choice(part, size, replace=False)] = True
    return Sample(measured, stratum, idle)


def _shares(groups: list[np.ndarray], budget: int) -> list[int]:
    """Equal shares; what a small group does not need goes to the larger ones."""
    shares = [0] * len(groups)
    order = sorted(range(len(groups)), key=lambda i: len(groups[i]))
    for done, i in enumerate(order):
        shares[i] = min(len(groups[i]), budget // (len(groups) - done))
        budget -= shares[i]
    return shares


def _order(strength: Float[np.ndarray, "scores cell"]) -> Int[np.ndarray, " cell"]:
    """Cells from the strongest on, those that some scores rank high before those that none does."""
    ranks = np.argsort(np.argsort(-strength, axis=1, kind="stable"), axis=1, kind="stable")
    return np.lexsort((ranks.sum(0), ranks.min(0)))


def _divided(cells: np.ndarray, lot: int) -> list[tuple[int, np.ndarray]]:
    """Strata of cells that follow each other, with how many are drawn of each."""
    if not lot:
        return []
    count = min(STRATA, lot // 2)
    sizes = [lot // count + (i < lot % count) for i in range(count)]
    ends = len(cells) * np.cumsum(sizes) // lot
    return list(zip(sizes, np.split(cells, ends[:-1]), strict=True))
