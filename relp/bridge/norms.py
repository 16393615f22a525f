"""A norm under a rule is a linear map at each position: for coefficients, and for changes.

y = w·c·r + b with c the (centred) input and r one over its root mean square. Every rule of
`relp.rulebook` makes of it Δy = w·(r̄·Δc + c̄·Δr), with Δr linear in Δx, so that many readers and
writers can share what does not depend on them. The same numbers follow from `propagate` around
the norm, one backward for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relp.bridge.basis import at_hand, device_of, inner
from relp.rulebook import Rules
from relp.rules import STATISTIC_SLOPES

__all__ = ["NormMap", "norm_parameters"]


@dataclass(frozen=True, eq=False)
class NormMap:
    """What a norm does to changes of its input, and to coefficients of its output."""

    weight: Float[Tensor, " d_model"]
    centres: bool
    scale: Float[Tensor, "*pair_pos 1"]
    """r̄: mean of r over the two runs, or that of the own run."""
    middle: Float[Tensor, "*pair_pos d_model"]
    """c̄: mean of c over the two runs, or that of the own run."""
    slope: Float[Tensor, "*pair_pos d_model"] | None
    """Δr = ⟨slope, Δx⟩; None where r is a constant."""

    @classmethod
    def of(cls, norm: nn.Module | None, own: Tensor, other: Tensor, rules: Rules) -> NormMap:
        """The map at the values `own`, or between those and `other` if the rules ask for it.

        Raises:
            RuntimeError: `norm` is neither a layer norm nor an RMS norm.
        """
        x = own.float()
        if norm is None:
            ones = torch.ones_like(x)
            return cls(ones[0, 0], False, ones[..., :1], ones, None)
        parameters = norm_parameters(norm).on(x.device)
        weight = torch.ones_like(x[0, 0]) if parameters.weight is None else parameters.weight
        c, r = _centred(x, parameters.eps, parameters.centres)
        with torch.no_grad():
            y = norm(own.to(device_of(norm))).to(x)
        expected = c * r * weight + (0 if parameters.bias is None else parameters.bias)
        error, size = float((y - expected).abs().max()), float(y.abs().max())
        if error > max(1e-4, 4 * torch.finfo(own.dtype).eps) * max(size, 1e-6):
            raise RuntimeError(
                "edge scores need norms that are layer or RMS norms; a "
                f"{type(norm).__name__} differs from that by {error:.2g} of {size:.2g}; remove "
                "hooks that change it, or use level='node' for this model"
            )
        if rules.norm == "constant":
            return cls(weight, parameters.centres, r, c, None)
        c_, r_ = c, r
        if rules.norm == "secant":
            c_, r_ = _centred(other.float(), parameters.eps, parameters.centres)
        middle = (c + c_) / 2
        slope = STATISTIC_SLOPES["rsqrt"](r, r_) * 2 / x.shape[-1] * middle
        return cls(weight, parameters.centres, (r + r_) / 2, middle, slope)

    def centred(self, x: Tensor) -> Tensor:
        """Without the mean, if the norm takes it off."""
        return x - x.mean(-1, keepdim=True) if self.centres else x

    def pull(
        self, coefficients: Float[Tensor, "*pair_pos d_model"]
    ) -> Float[Tensor, "*pair_pos d_model"]:
        """Coefficients at the input from those at the output."""
        pulled = self.centred(self.weight * coefficients) * self.scale
        self._add_slope(pulled)
        return pulled

    def _add_slope(self, pulled: Float[Tensor, "*head pair pos d_model"]) -> None:
        """Adds the part of r to what c pulled back: c̄ is centred, so ⟨w·c̄, g⟩ is ⟨c̄, pulled⟩/r̄."""
        if self.slope is not None:
            along = (pulled * self.middle).sum(-1, keepdim=True) / self.scale
            pulled.addcmul_(self.slope, along)

    def push(self, changes: Float[Tensor, "*pair_pos d_model"]) -> Tensor:
        """Changes at the output from those at the input: the transposed map."""
        pushed = self.weight * self.centred(changes) * self.scale
        if self.slope is None:
            return pushed
        return pushed + self.weight * self.middle * (self.slope * changes).sum(-1, keepdim=True)

    def pull_through(
        self, projection: Float[Tensor, "d_out d_model"], coefficients: Tensor, out: Tensor
    ) -> None:
        """Fills `out` `[head, pair, pos, d_model]` from coefficients `[pair, pos, d_out]` behind
        a projection of that many heads: the norm is folded into the projection."""
        projection = projection.to(self.weight.device)
        folded = self.centred(self.weight * projection).unflatten(0, (len(out), -1))
        scaled = (coefficients * self.scale).flatten(0, 1).unflatten(-1, (len(out), -1))
        torch.bmm(scaled.transpose(0, 1), folded, out=out.flatten(1, 2))
        self._add_slope(out)


def _centred(x: Tensor, eps: float, centres: bool) -> tuple[Tensor, Tensor]:
    """The (centred) input and one over its root mean square."""
    c = x - x.mean(-1, keepdim=True) if centres else x
    return c, torch.rsqrt(c.square().mean(-1, keepdim=True) + eps)


@dataclass(frozen=True, eq=False)
class Norm:
    """What a layer or RMS norm computes with."""

    weight: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None
    eps: float
    centres: bool
    """True for a layer norm: the mean is taken off first."""

    def on(self, device: torch.device) -> Norm:
        """The same on a device."""
        weight, bias = (None if p is None else p.to(device) for p in (self.weight, self.bias))
        return Norm(weight, bias, self.eps, self.centres)


def norm_parameters(norm: Any) -> Norm:
    """The parameters of a block's norm, whatever its class calls them."""
    module = inner(norm)
    scale, offset = at_hand(module, "weight"), at_hand(module, "bias")
    centres = not norm.uses_rms_norm
    if scale is not None:  # Gemma keeps the weight's distance from 1
        scale = scale.detach().float() + (1.0 if norm.uses_weight_offset else 0.0)
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    return Norm(
        weight=scale,
        bias=offset.detach().float() if centres and offset is not None else None,
        eps=float(norm.config.eps if eps is None else eps),
        centres=centres,
    )
