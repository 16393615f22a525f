"""Nonlinearities of sparse dictionaries: from a feature's pre-activation to its value.

Each is a frozen value of two formulas: `values`, and `slopes`, the derivative of a value with
respect to its own pre-activation, others held. `TopK` chooses among all features and so wants all
pre-activations; the others work one feature at a time, and `moved` cuts their tensors down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Activation", "Gated", "JumpRelu", "Relu", "TopK", "moved", "parameters"]

Values = Float[Tensor, "*axes feature"]
"""A number for each feature at each place."""


@dataclass(frozen=True, eq=False)
class Relu:
    """max(0, pre)."""

    def values(self, pre: Values) -> Values:
        """What the features hold."""
        return pre.relu()

    def slopes(self, pre: Values) -> Values:
        """1 where a feature is on."""
        return (pre > 0).to(pre)


@dataclass(frozen=True, eq=False)
class JumpRelu:
    """max(0, pre) where pre is above a threshold of the feature, else 0 (arXiv:2407.14435).

    What was trained with a batch-wide TopK is saved as this too (arXiv:2412.06410).
    """

    threshold: Float[Tensor, " feature"]
    rectified: bool = True
    """False: pre itself above the threshold, also where that is below 0 (circuit-tracer)."""

    def _on(self, pre: Values) -> Tensor:
        on = pre > self.threshold.to(pre.device)
        return on & (pre > 0) if self.rectified else on

    def values(self, pre: Values) -> Values:
        """What the features hold."""
        return torch.where(self._on(pre), pre, torch.zeros_like(pre))

    def slopes(self, pre: Values) -> Values:
        """1 where a feature is on; the jump has no derivative."""
        return self._on(pre).to(pre)


@dataclass(frozen=True, eq=False)
class TopK:
    """The k largest pre-activations of each place, all others 0 (arXiv:2406.04093)."""

    k: int
    rectified: bool = True
    """The chosen pass a ReLU as well; False in circuit-tracer."""

    def values(self, pre: Values) -> Values:
        """What the features hold; `pre` must be of all features."""
        top, where = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, where, top.relu() if self.rectified else top)

    def slopes(self, pre: Values) -> Values:
        """1 where a feature is among the chosen: who is chosen is held fixed."""
        return (self.values(pre) != 0).to(pre)


@dataclass(frozen=True, eq=False)
class Gated:
    """A gate and a magnitude that share the encoder's directions (arXiv:2404.16014).

    The pre-activation is the one number p = W_enc·x (+ b_enc, 0 in files) that both depend on:
    value = 1[p + b_gate > 0] · max(0, exp(r_mag)·p + b_mag).
    """

    b_gate: Float[Tensor, " feature"]
    b_mag: Float[Tensor, " feature"]
    r_mag: Float[Tensor, " feature"]

    def values(self, pre: Values) -> Values:
        """What the features hold."""
        b_gate, b_mag, r_mag = (b.to(pre) for b in (self.b_gate, self.b_mag, self.r_mag))
        return (pre * r_mag.exp() + b_mag).relu() * (pre + b_gate > 0)

    def slopes(self, pre: Values) -> Values:
        """exp(r_mag) where a feature is on: what its magnitude grows by; the gate only jumps."""
        return (self.values(pre) > 0) * self.r_mag.to(pre).exp()

    def shifted(self, by: Float[Tensor, " feature"]) -> Gated:
        """The same with `by` added to p."""
        b_mag = self.b_mag + self.r_mag.exp() * by
        return replace(self, b_gate=self.b_gate + by, b_mag=b_mag)


Activation = Relu | JumpRelu | TopK | Gated


def parameters(activation: Activation) -> dict[str, Tensor]:
    """The tensors of an activation, one entry for each feature."""
    found = {field.name: getattr(activation, field.name) for field in fields(activation)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def moved(activation: Activation, change: Callable[[Tensor], Tensor]) -> Activation:
    """The activation with each of its tensors changed: put on a device, cut down to features."""
    found = {name: change(value) for name, value in parameters(activation).items()}
    return replace(activation, **found) if found else activation  # type: ignore[arg-type]
