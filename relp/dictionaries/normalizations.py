"""What a dictionary does to a vector before it encodes, and undoes behind the decoder.

Each is a frozen value that gives a `Frame` for the vectors at hand: x is read as
`(x - centre) * factor`, and what is decoded is written as `decoded * out + centre`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Frame", "LayerNorm", "Normalization", "Scaled", "UnitNorm"]

Vectors = Float[Tensor, "*axes d_in"]
"""What a place of a model holds."""


class Frame(NamedTuple):
    """How some vectors are read and written: numbers of each vector, `[..., 1]`."""

    centre: Tensor
    factor: Tensor
    out: Tensor


@dataclass(frozen=True)
class Scaled:
    """Times one number, divided by it again behind the decoder; 1 is no normalisation at all.

    Dictionaries that were trained on vectors scaled to a mean length of √d_in
    (`expected_average_only_in`) have the number √d_in / mean length.
    """

    factor: float = 1.0

    def frame(self, x: Vectors) -> Frame:
        """The same number for all vectors."""
        one = x.new_ones(*x.shape[:-1], 1)
        return Frame(one * 0, one * self.factor, one / self.factor)


@dataclass(frozen=True)
class UnitNorm:
    """Each vector brought to the length √d_in (`constant_norm_rescale`)."""

    def frame(self, x: Vectors) -> Frame:
        """By the length of each vector; one of length 0 stays 0."""
        length = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        length = torch.where(length == 0, torch.ones_like(length), length)
        return Frame(torch.zeros_like(length), 1 / length, length)


@dataclass(frozen=True)
class LayerNorm:
    """Minus the mean and over (standard deviation + eps), as SAELens has it (`layer_norm`).

    The deviation divides by d_in - 1; behind the decoder it multiplies without eps.
    """

    eps: float = 1e-5

    def frame(self, x: Vectors) -> Frame:
        """By mean and deviation of each vector."""
        std = x.std(dim=-1, keepdim=True)
        return Frame(x.mean(dim=-1, keepdim=True), 1 / (std + self.eps), std)


Normalization = Scaled | UnitNorm | LayerNorm
