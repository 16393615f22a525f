"""What chance may do: pairs drawn again, values of a pair swapped, and many tests at once."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = [
    "CONFIDENCE",
    "RESAMPLES",
    "holm",
    "interval",
    "p_value",
    "random_swaps",
    "redrawn",
    "resamples",
    "swaps",
]

RESAMPLES = 9999
CONFIDENCE = 0.95
DRAWS = 999
"""Samples of cells: each takes the ranks of every pair anew."""


@lru_cache(maxsize=8)
def resamples(pairs: int, seed: int) -> Float[np.ndarray, "resample pair"]:
    """Weight of each pair in each bootstrap sample; each row sums to 1. NaN for a single pair."""
    weights = np.full((RESAMPLES, pairs), np.nan)
    if pairs > 1:
        draw = np.random.default_rng(seed).multinomial
        weights[:] = draw(pairs, [1 / pairs] * pairs, RESAMPLES) / pairs
    weights.flags.writeable = False  # it is kept
    return weights


def redrawn(
    weight: Float[np.ndarray, " cell"], stratum: Int[np.ndarray, " cell"], seed: int
) -> Float[np.ndarray, "draw cell"]:
    """How many cells each of a stratified sample might have stood for, which stands for `weight`.

    Each stratum's n cells of N are drawn again: n - 1 with replacement, scaled so that sums vary as
    those of n without replacement do. Cells that stand for themselves alone stay as they are.
    Source: Rao and Wu 1988, JASA 83(401).
    """
    drawn = np.repeat(weight[None], DRAWS, axis=0)
    generator = np.random.default_rng(seed)
    for number in np.unique(stratum[weight > 1]):
        at = np.flatnonzero(stratum == number)
        n = len(at)
        if n > 1:
            times = generator.multinomial(n - 1, [1 / n] * n, DRAWS)
            part = np.sqrt(1 - 1 / weight[at[0]])
            drawn[:, at] *= 1 - part + part * n / (n - 1) * times
    return drawn


def interval(samples: Float[np.ndarray, "resample ..."]) -> tuple[np.ndarray, np.ndarray]:
    """The percentile interval over the first axis."""
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def swaps(pairs: int, seed: int) -> Bool[np.ndarray, "swap pair"]:
    """Which pairs exchange their two values: all ways if they are few, else none and random ones.

    The first row exchanges none: it is what was seen, and one of the ways that chance has.
    """
    if 2**pairs <= RESAMPLES + 1:
        return np.array(list(product([False, True], repeat=pairs)))
    return random_swaps(pairs, seed)


def random_swaps(pairs: int, seed: int) -> Bool[np.ndarray, "swap pair"]:
    """Random ways, as many whatever the pairs are, so that those of several cases can be joined."""
    drawn = np.random.default_rng(seed).random((RESAMPLES + 1, pairs)) < 0.5
    drawn[0] = False
    return drawn


def p_value(difference: Float[np.ndarray, "swap test"]) -> Float[np.ndarray, " test"]:
    """Share of the swaps that set the two as far apart as none does, in either direction."""
    return (abs(difference) >= abs(difference[0]) * (1 - 1e-9)).mean(0)


def holm(p_values: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """P-values that hold for all tests together; NaN, where there is no test, stays and counts not.

    The smallest is multiplied by the number of tests, the next by one less, and so on; none falls
    below the one before. Source: Holm 1979, Scandinavian Journal of Statistics 6(2).
    """
    adjusted = np.full(len(p_values), np.nan)
    order = [i for i in np.argsort(p_values, kind="stable") if not np.isnan(p_values[i])]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(p_values[order] * factors).clip(max=1)
    return adjusted
