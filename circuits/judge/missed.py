"""How much may be among the cells that were not measured."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats

from relp import Component, EdgeScores, NodeScores, Scores

__all__ = ["missed"]

CONFIDENCE = 0.95


def missed(effect: Scores, *, smallest: float | None = None, k: int = 10) -> pd.DataFrame:
    """An upper bound on the unmeasured cells whose effect may be as large as one that counts.

    >>> missed(verify(model, task, scores, budget=100, progress=False))
    >>> missed(verify(model, task, scores, budget=100, progress=False), smallest=0.1)

    One row per kind of component, or slot of a reader: `cells`, how many of them are `measured`
    (by lot, `drawn`), how large an effect counts (`smallest`), how many of those drawn are as large
    (`found`), and of the others, which are not measured, `at_most` how many are, as a number and as
    a `share`, with a confidence of 95 % for each row.

    An effect is the |mean over pairs|, and the statement is about these pairs. It rests on nothing
    but the lot of `verify`: the number found is a sum of independent draws whose mean chance
    Clopper and Pearson bound, whatever the strata hold (Hoeffding 1956, Annals of Mathematical
    Statistics 27(3)); times the largest weight it bounds the number in all strata. `smallest` must
    not be chosen by looking at what was drawn; the default does not. The idea is that of the
    diagnostics of AtP*, arXiv:2403.00745.

    Args:
        effect: what `verify` gave.
        smallest: the least |effect| that counts, in the unit of the metric; by default the `k`th
            largest of each kind among the cells that were measured for the strength of their
            scores, so that `at_most` says how many of the k largest may be others. If fewer than
            `k` of those have an effect, the smallest that they have; 0, any effect, if none has.
        k: see `smallest`.

    Raises:
        ValueError: cells are not measured and were not left to lot, `smallest` is not above 0, or
            `k` is below 1.
    """
    if k < 1 or (smallest is not None and not smallest > 0):
        raise ValueError(
            "`smallest` must be an |effect| above 0, and `k` at least 1; got "
            f"{smallest} and {k}; leave both out for the tenth largest"
        )
    kinds, values, weights = _cells(effect.resolved())
    rows = []
    for kind in dict.fromkeys(kinds):
        inside = kinds == kind
        size, weight = values[inside], weights[inside]
        left = int(np.isnan(size).sum())
        certain, lot = (size[(weight > 0) & ((weight > 1) == drawn)] for drawn in (False, True))
        least = _least(certain, k) if smallest is None else smallest
        found = int(((lot >= least) & (lot > 0)).sum())
        at_most = min(left, _bound(found, len(lot), weight.max(initial=0)) - found)
        rows.append((kind, len(size), len(size) - left, len(lot), least, found, at_most,
                     at_most / left if left else 0.0))  # fmt: skip
    columns = ["kind", "cells", "measured", "drawn", "smallest", "found", "at_most", "share"]
    return pd.DataFrame(rows, columns=columns)


def _least(certain: Float[np.ndarray, " cell"], k: int) -> float:
    """The kth largest; the smallest of fewer. What is 0 counts not: most of it changes nothing."""
    some = np.sort(certain[certain > 0])[-k:]
    return float(some[0]) if len(some) else 0.0


def _bound(found: int, drawn: int, weight: float) -> int:
    """How many there are at most in all strata, if so many of those drawn are."""
    if found >= drawn - 1:  # so close to all, the binomial bound holds for equal chances alone
        return int(drawn * weight)
    test = stats.binomtest(found, drawn, alternative="less")
    chance = test.proportion_ci(CONFIDENCE, method="exact").high
    return int(np.floor(chance * drawn * weight))


def _cells(
    effect: Scores,
) -> tuple[np.ndarray, Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Kind, |mean effect| and weight of each cell."""
    if isinstance(effect, EdgeScores):
        table, there = effect.edges, effect.layout.exists.expand(effect.edges.shape)
        kinds = np.array([slot for _, slot in effect.layout.targets])[there.nonzero()[:, -1]]
    else:
        assert isinstance(effect, NodeScores)
        table, there = effect.mean, torch.ones(effect.nodes.shape[1:], dtype=torch.bool)
        names = [Component.parse(name).kind for name in effect.components]
        kinds = np.array(names)[there.nonzero()[:, 0]]
    weights = effect.sampling_weights
    if weights is None:
        if unknown := int(table[there].isnan().sum()):
            raise ValueError(
                "cells that are not measured must have been left to lot; these effects have "
                f"{unknown:,} that were not; call verify(model, task, scores)"
            )
        weights = torch.ones_like(table)
    return kinds, *(v[there].abs().double().cpu().numpy() for v in (table, weights))
