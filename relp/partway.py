"""Between the derivative and the secant: how far a part moves the run to the other run.

What patching a part does is its change Δ times the slopes of the metric that it meets on its way,
averaged. Let G be the slope where the run is (the derivative) and m the mean slope over the whole
way to the other run, which rules that compare two runs give: Σ Δ·m over a cut of the network is the
gap, exactly. If the slope changes steadily along the way, it is G + 2t·(m - G) at the share t of
the way. A part that moves the run up to the share φ meets, on average over that,

    (1 - φ)·G + φ·m

A whole cut has φ = 1, and keeps the exact m; a small part gets G.

How far a part moves the run is measured in the unit of the metric, by its own s = Δ·m beside those
of the rest of the cut behind it, which is the residual stream where the part's block ends, at all
positions p, with S_p = Δ·m of the stream there:

    a = |s| / (|s| + |S_p - s|)                           its share at its own position
    b = |s| / (|s| + |S_p - s| + Σ over others of |S_p|)  its share of the cut

What follows at the same position alone (norms, MLPs) is moved by a; what follows where positions
have come together is moved by b. So φ lies between the two, and is taken as their geometric mean,
√(a·b): no scale of its own. A whole stream at one position has a = 1, and b is what it carries.

**Edges.** A single edge moves the run little, and what patching it alone does is near G. But a
circuit keeps many edges at once, and is chosen by what each is worth among others that are kept:
between the first of them (G, a score g) and the average over the way (m, a score s). The two often
differ in sign, and then their mean would call an edge nothing that is large by both. So an edge's
score has the mean *size* (|g| + |s|) / 2, and the sign of g + s.

Neither the steady slope nor the mean of a and b is more than a model of what happens. On two real
language models, three tasks and both directions (docs/estimates.md, which a script under
tests/benchmarks prints) scores by it are not worse than integrated gradients with ten steps, at a
fifth of the time, in 43 of 48 comparisons by Pearson's r, 47 by Spearman's ρ, 46 by right signs and
44 by the relative error. They are worse where the slopes rise at once: in a run that is changed
away from an answer of which it is certain (`noise`, where much differs), and in small models that
are trained on the task alone.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["way", "weight_of_both"]


def way(
    scores: Float[Tensor, "pair component pos"], stream: Float[Tensor, "pair component pos"]
) -> Float[Tensor, "pair component pos"]:
    """The share φ of the way to the other run that each part moves the run: 0 to 1.

    >>> import torch
    >>> from relp.partway import way
    >>> way(torch.tensor([[[0.5, 0.0]]]), torch.tensor([[[1.0, 3.0]]]))      # √(1/2 · 1/8)
    tensor([[[0.2500, 0.0000]]])

    Args:
        scores: Δ·m of each part, in the unit of the metric; m is what rules that compare two runs
            give.
        stream: the same of the whole residual stream behind each part, where the part is.
    """
    size, rest = scores.abs(), (stream - scores).abs()
    here = size + rest
    elsewhere = stream.abs().sum(-1, keepdim=True) - stream.abs()
    product = here * (here + elsewhere)
    # what changes nothing moves nothing
    return size / product.sqrt().masked_fill(product == 0, 1.0)


def weight_of_both(
    start: Float[Tensor, "*pos writer reader"], whole: Float[Tensor, "*pos writer reader"]
) -> Float[Tensor, "*pos writer reader"]:
    """The mean size of two scores of an edge, with the sign of their sum.

    >>> import torch
    >>> from relp.partway import weight_of_both
    >>> weight_of_both(torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 3.0]]))
    tensor([[2., 2.]])
    """
    return (start.abs() + whole.abs()) / 2 * (start + whole).sign()
