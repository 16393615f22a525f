"""How well sizes tell what is inside from what is not: areas under two curves."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

__all__ = ["areas"]


def areas(
    size: Float[np.ndarray, "*row item"], inside: Bool[np.ndarray, " item"]
) -> Float[np.ndarray, "*row 2"]:
    """Areas under the ROC curve and under precision by recall, of sizes and what is inside."""
    known, others = size[..., inside], size[..., ~inside]
    roc, precision = np.zeros(size.shape[:-1]), np.zeros(size.shape[:-1])
    for i in range(known.shape[-1]):
        least = known[..., i : i + 1]
        below, as_large = (others < least).sum(-1), (others >= least).sum(-1)
        # Mann and Whitney: how often one inside outranks one outside, of ties half
        roc += (below + others.shape[-1] - (others > least).sum(-1)) / 2
        # how many there are of at least its size, and how many of these are inside
        right = (known >= least).sum(-1)
        precision += right / (right + as_large)
    many = known.shape[-1]
    return np.stack([roc / (many * others.shape[-1]), precision / many], -1)
