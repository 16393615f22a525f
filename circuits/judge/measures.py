"""The measures of agreement: each a formula over the cells of a pair, and what pairs make of it.

A cell that was drawn at random stands for others like it: it counts `weight` times, and might have
counted other times. Results have a row for the draw that was made, and one for each that might.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from circuits.judge.resampling import interval, resamples

__all__ = ["MEASURES", "Cells", "Measures"]

SIDES = ("score", "effect")
MINIMUM = 3
"""Effects that a correlation needs."""
Draws = Float[np.ndarray, " draw"]


@dataclass(frozen=True, eq=False)
class Cells:
    """What is compared of one pair; of edges, the means over all pairs."""

    score: Float[np.ndarray, " cell"]
    effect: Float[np.ndarray, " cell"]
    weight: Float[np.ndarray, " cell"]
    """How many cells each stands for."""
    draws: Float[np.ndarray, "draw lot"]
    """The same of those that stand for more than themselves, in draws that might have been made."""
    floor: float
    """Effects up to this have no rank and no sign."""

    def at(self, chosen: Bool[np.ndarray, " cell"]) -> Cells:
        """Some of them."""
        return replace(
            self,
            score=self.score[chosen],
            effect=self.effect[chosen],
            weight=self.weight[chosen],
            draws=self.draws[:, chosen[self.lot]] if len(self.draws) else self.draws,
        )

    @property
    def lot(self) -> Bool[np.ndarray, " cell"]:
        """Which stand for more than themselves."""
        return self.weight > 1

    @property
    def above(self) -> Cells:
        """Those whose effect is more than the floor."""
        return self.at(abs(self.effect) > self.floor)

    @property
    def rest(self) -> Cells:
        """All but the one with the largest |effect|, and what it stands for."""
        return self.at(np.arange(len(self.effect)) != np.argmax(abs(self.effect)))

    @property
    def nonzero(self) -> int:
        """How many effects are not 0."""
        return int(np.count_nonzero(self.effect))

    @property
    def undefined(self) -> Draws:
        """What a measure is where there is nothing to measure."""
        return self.same(np.nan)

    def same(self, value: float) -> Draws:
        """A number that no draw changes."""
        return np.full(1 + len(self.draws), value)

    @property
    def weights(self) -> Float[np.ndarray, "draw cell"]:
        """How many cells each stands for, in each draw."""
        every = np.repeat(self.weight[None], 1 + len(self.draws), axis=0)
        if len(self.draws):
            every[1:, self.lot] = self.draws
        return every

    def total(self, values: Float[np.ndarray, "*draw cell"]) -> Draws:
        """The sum over all cells that these stand for."""
        if values.ndim == 2:
            return np.einsum("dc,dc->d", self.weights, values)
        found = self.same(self.weight @ values)
        if len(self.draws):  # most cells are the same in all of them
            lot = self.lot
            found[1:] = self.weight[~lot] @ values[~lot] + self.draws @ values[lot]
        return found


# -- within a pair ---------------------------------------------------------------------------------


def pearson(cells: Cells) -> Draws:
    """Pearson's r."""
    if not _correlate(cells.score, cells.effect):
        return cells.undefined
    x, y = (v - v.mean() for v in (cells.score, cells.effect))
    return _correlation(_moments(cells, x, y))


def pearson_rest(cells: Cells) -> Draws:
    """Pearson's r without the cell of the largest |effect|."""
    return pearson(cells.rest) if cells.nonzero else cells.undefined


def spearman(cells: Cells) -> Draws:
    """Spearman's ρ over the effects above the floor."""
    some = cells.above
    if not _correlate(some.score, some.effect):
        return cells.undefined
    ranks = (_ranks(v, some.weights) for v in (some.score, some.effect))
    return _correlation(_moments(some, *ranks))


def signs(cells: Cells) -> Draws:
    """Share of the effects above the floor whose sign the score has; 0 has the sign of none."""
    some = cells.above
    if not len(some.effect):
        return cells.undefined
    right = np.sign(some.score) == np.sign(some.effect)
    return _ratio(some.total(right.astype(float)), some.total(np.ones(len(right))))


def relative_error(cells: Cells) -> Draws:
    """Norm of the difference over the norm of the effects."""
    if not cells.nonzero:
        return cells.undefined
    wrong, size = cells.total((cells.score - cells.effect) ** 2), cells.total(cells.effect**2)
    return np.sqrt(_ratio(wrong, size))


def overlap(cells: Cells, k: int) -> Draws:
    """Share of the k largest |effects|, or of all that are not 0, among as many |scores|.

    There is none where cells stand for others: those could be larger.
    """
    k = min(k, cells.nonzero)
    if not k or cells.lot.any():
        return cells.undefined
    best = [
        set(np.argsort(-abs(v), kind="stable")[:k].tolist()) for v in (cells.score, cells.effect)
    ]
    return cells.same(len(best[0] & best[1]) / k)


def peak(cells: Cells) -> Draws:
    """Share of the squared effects that is in one cell."""
    if not cells.nonzero:
        return cells.undefined
    return _ratio(np.max(cells.effect**2), cells.total(cells.effect**2))


WITHIN = {f.__name__: f for f in (pearson, pearson_rest, spearman, signs, relative_error)}


# -- all pairs together ----------------------------------------------------------------------------


def pearson_pooled(pairs: Sequence[Cells]) -> Float[np.ndarray, "draw pair moment"]:
    """What Pearson's r over the cells of all pairs is made of."""
    return _pooled(pairs, [_together([getattr(c, side) for c in pairs]) for side in SIDES])


def spearman_pooled(pairs: Sequence[Cells]) -> Float[np.ndarray, "draw pair moment"]:
    """The same of Spearman's ρ above the floor. Ranks stay those among all pairs, as drawn."""
    pairs = [c.above for c in pairs]
    weight = _together([c.weight for c in pairs])[None]
    values = [_together([getattr(c, side) for c in pairs]) for side in SIDES]
    return _pooled(pairs, [_ranks(v, weight)[0] if len(v) else v for v in values], of=values)


POOLED = {f.__name__: f for f in (pearson_pooled, spearman_pooled)}
MEASURES = (*WITHIN, "overlap", *POOLED)


@dataclass(frozen=True, eq=False)
class Measures:
    """What each measure is, in each draw and each pair."""

    within: Mapping[str, Float[np.ndarray, "draw pair"]]
    pooled: Mapping[str, Float[np.ndarray, "draw pair moment"]]

    @classmethod
    def of(cls, pairs: Sequence[Cells], k: int) -> Measures:
        """All measures of some cells."""
        formulas = {**WITHIN, "overlap": lambda c: overlap(c, k), "peak": peak}
        within = {name: np.stack([f(c) for c in pairs], -1) for name, f in formulas.items()}
        return cls(within, {name: f(pairs) for name, f in POOLED.items()})

    def __getitem__(self, name: str) -> float:
        """The measure: its mean over the pairs that have it, or that of all of them together."""
        if name in self.pooled:
            return float(_correlation(self.pooled[name][:1].sum(1))[0])
        return float(_mean(self.within[name][:1], np.ones(1))[0])

    def has(self, name: str) -> Bool[np.ndarray, " pair"]:
        """Which pairs have the measure."""
        return ~np.isnan(self.within[name][0])

    def samples(
        self, name: str, seed: int, chosen: Bool[np.ndarray, " pair"] | None = None
    ) -> Draws:
        """The measure in bootstrap samples of pairs, and of cells if those were drawn.

        Pairs are drawn from those that are `chosen`, by default from all that have the measure.
        """
        if name in self.pooled:
            table = self.pooled[name]
            table = table[:, table[0, :, 0] > 0]  # the number of cells
        else:
            table = self.within[name][:, self.has(name) if chosen is None else chosen]
        drawn = table[1:] if len(table) > 1 else table
        weights = resamples(table.shape[1], seed)
        weights = weights[: len(drawn)] if len(drawn) > 1 else weights
        if name in self.pooled:
            return _correlation((weights[..., None] * drawn).sum(1))
        return _mean(drawn, weights)

    def interval(self, name: str, seed: int) -> tuple[float, float]:
        """The 95 % interval; NaN where fewer than two pairs have the measure."""
        return percentiles(self.samples(name, seed))


def percentiles(samples: Draws) -> tuple[float, float]:
    """The interval that samples span; NaN if half of them are."""
    known = samples[~np.isnan(samples)]
    if len(known) <= len(samples) / 2:
        return np.nan, np.nan
    low, high = interval(known[:, None])
    return float(low[0]), float(high[0])


def _mean(values: Float[np.ndarray, "*draw pair"], weights: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    return _ratio((weights * np.nan_to_num(values)).sum(-1), (weights * known).sum(-1))


def _pooled(
    pairs: Sequence[Cells], values: Sequence[np.ndarray], of: Sequence[np.ndarray] | None = None
) -> Float[np.ndarray, "draw pair moment"]:
    """Moments of each pair, about means over all; NaN if `of` (else `values`) do not correlate."""
    ends = np.cumsum([len(c.effect) for c in pairs])[:-1]
    x, y = (np.split(v - v.mean() if len(v) else v, ends) for v in values)
    found = np.stack([_moments(c, *xy) for c, *xy in zip(pairs, x, y, strict=True)], 1)
    return found if _correlate(*(of or values)) else np.full_like(found, np.nan)


def _together(values: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(values, -1)


# -- correlation -----------------------------------------------------------------------------------


def _correlate(score: Float[np.ndarray, " cell"], effect: Float[np.ndarray, " cell"]) -> bool:
    """Whether a correlation is worth its name: there are three effects, and both sides vary."""
    enough = bool(np.count_nonzero(effect) >= MINIMUM)
    return enough and _varies(score) and _varies(effect)


def _varies(values: Float[np.ndarray, " cell"]) -> bool:
    """By more than rounding: restoring any whole layer of the residual stream has one effect."""
    return bool(np.ptp(values) > 1e-5 * abs(values).max())


def _moments(cells: Cells, x: np.ndarray, y: np.ndarray) -> Float[np.ndarray, "draw moment"]:
    """Sums of 1, x, y, x², y² and xy: all that a correlation needs, and they add up over pairs."""
    return np.stack([cells.total(v) for v in (np.ones_like(x), x, y, x * x, y * y, x * y)], -1)


def _correlation(moments: Float[np.ndarray, "*draw moment"]) -> np.ndarray:
    n, x, y, xx, yy, xy = np.moveaxis(moments, -1, 0)
    spread = [n * vv - v * v for v, vv in ((x, xx), (y, yy))]
    # what a draw leaves may be all equal: the difference of two sums is then rounding
    varies = (spread[0] > 1e-10 * n * xx) & (spread[1] > 1e-10 * n * yy)
    product = np.where(varies, spread[0] * spread[1], np.nan)
    return ((n * xy - x * y) / np.sqrt(product)).clip(-1, 1)


def _ranks(
    values: Float[np.ndarray, " cell"], weight: Float[np.ndarray, "draw cell"]
) -> Float[np.ndarray, "draw cell"]:
    """How many cells are below each, with half of those that equal it."""
    order = np.argsort(values, kind="stable")
    _, starts, at = np.unique(values[order], return_index=True, return_inverse=True)
    tied = np.add.reduceat(weight[:, order], starts, axis=-1)
    ranks = np.empty_like(weight)
    ranks[:, order] = (np.cumsum(tied, -1) - tied / 2)[:, at]
    # about the middle, where sums of squares lose nothing
    return ranks - weight.sum(-1, keepdims=True) / 2


def _ratio(over: Any, under: np.ndarray) -> np.ndarray:
    """NaN where there is nothing below."""
    return over / np.where(under > 0, under, np.nan)
