"""What was seen of one batch of pairs: both runs, and the coefficients of one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["ROOT", "Capture", "Cuts", "wide"]

ROOT = "L0.resid"
"""Where relevance ends: token plus position embedding, as block 0 gets it."""


@dataclass(frozen=True, eq=False)
class Capture:
    """One batch of pairs: what both runs did, and the coefficients of a run between the two."""

    own: Mapping[str, Tensor]
    """Activations of the run that patching would change."""
    other: Mapping[str, Tensor]
    """Activations of the other run."""
    values: Mapping[str, Tensor]
    """Activations of the run that was differentiated: the own run, or one on the way to the
    other."""
    reference: Mapping[str, Tensor]
    """Activations of the run that it is compared with, by rules that compare two."""
    coefficients: Mapping[str, Tensor]
    """d metric / d activation under the rules at each site, where the values are."""
    own_metric: Float[Tensor, " pair"]
    other_metric: Float[Tensor, " pair"]
    share: float = 1.0
    """Its part of a mean along a path."""
    remainder: Mapping[str, float] = field(default_factory=dict)
    """Module and operation -> what no coefficient explains, because the two runs take different
    branches there (`Propagation.remainder`); sum over pairs."""
    rules: str = ""
    """The name of the rules that the run used (`Propagation.name`)."""
    slopes: Mapping[str, Tensor] = field(default_factory=dict)
    """The coefficients if the run is compared with itself, not with the other (`Rules.partway`)."""

    def delta(self, site: str) -> Tensor:
        """What patching changes at a site: other run minus own run, in single precision at least.

        Of two close numbers of half precision the difference would be a few bits.
        """
        return wide(self.other[site]) - wide(self.own[site])

    def at_start(self) -> Capture:
        """The same, compared with itself: what compares two runs has become the derivative."""
        return replace(self, reference=self.values, coefficients=self.slopes, slopes={})


@dataclass(frozen=True, eq=False)
class Cuts:
    """Both runs, the own one cut; to be differentiated while it is there."""

    own: Mapping[str, Tensor]
    """What sites hold, without a graph."""
    other: Mapping[str, Tensor]
    before: Mapping[str, Tensor]
    """What arrives at each site, with the graph from the cuts before it on."""
    leaves: Mapping[str, Tensor]
    """What the run goes on with behind each cut, the embedding's first."""
    metric: Float[Tensor, " pair"]
    other_metric: Float[Tensor, " pair"]
    rules: str
    remainder: Mapping[str, float]

    def pulled(
        self, outputs: Sequence[Tensor], above: Sequence[Tensor | None]
    ) -> dict[str, Float[Tensor, "pair pos d"]]:
        """The coefficient behind each cut of what `outputs` are worth: `above` times themselves.

        Sites that they do not hang on directly are left out.
        """
        behind = [(out, worth) for out, worth in zip(outputs, above, strict=True)
                  if out.requires_grad]  # fmt: skip
        if not behind:
            return {}  # the embedding: nothing is before it
        grads = torch.autograd.grad(
            [out for out, _ in behind], list(self.leaves.values()), [worth for _, worth in behind],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        found = {site: g for site, g in zip(self.leaves, grads, strict=True) if g is not None}
        return {site: grad.detach().to(self.own[site].device) for site, grad in found.items()}


def wide(value: Tensor) -> Tensor:
    """Half precision as single precision; else the same tensor."""
    return value.float() if value.element_size() < 4 else value
