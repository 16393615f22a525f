"""Scores of features: how much moving each feature of a dictionary by itself would do.

A feature's score is the change of its value times the coefficient along its direction, Δ_f · (d_f ·
c). With what the features leave over they sum to the score of the site: the dictionary is exact
bookkeeping, whatever it reconstructs. Features whose values do not differ between the runs have a
score of exactly 0 and are not kept, so that memory follows those that do, not the dictionary's
size. Source: arXiv:2403.19647 (features and errors as components), with the coefficients of the
rules in the place of its gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relp.bridge.capture import Capture
from relp.bridge.features import Features
from relp.partway import way

__all__ = ["FeatureSums"]

MORE = 1.5
"""By how much room for features grows when it is used up."""


class _Differences(NamedTuple):
    """What features hold differently in two runs."""

    own: Mapping[str, Tensor]
    """The own one: whose they are."""
    numbers: Int[Tensor, " feature"]
    change: Float[Tensor, "pair pos feature"]


class FeatureSums:
    """Scores of the features of one site, summed up capture by capture.

    Args:
        behind: the site of the residual stream behind it, for rules that are partway; else empty.
    """

    def __init__(self, features: Features, pairs: int, length: int, behind: str = "") -> None:
        self.features, self._behind = features, behind
        self.sites_needed = tuple(dict.fromkeys([features.site, features.reads, *_some(behind)]))
        self.coefficients_needed = tuple(dict.fromkeys([features.site, *_some(behind)]))
        self._column: dict[int, int] = {}
        self._scores = torch.zeros(pairs, 0, length)
        self._whole = torch.zeros(pairs, length)
        self._known: _Differences | None = None
        self._error, self._count, self._square = 0.0, 0, 0.0
        self._sum = torch.zeros(1, dtype=torch.float64)

    def add(self, index: Int[Tensor, " row"], seen: Capture) -> None:
        """Adds the scores of one capture of these pairs, which have one length."""
        if not bool(seen.coefficients[self.features.site].any()):
            return  # of a path that moves another site
        if self._known is None or self._known.own is not seen.own:
            self._known = self._differences(seen)
        numbers = self._known.numbers
        scores, whole = self._of(seen, self._known)
        if self._behind:
            start, whole_start = self._of(seen.at_start(), self._known)
            stream = (seen.delta(self._behind) * seen.coefficients[self._behind]).float().sum(-1)
            parts = torch.cat([scores, whole[:, None]], 1)
            share = way(parts, stream.cpu()[:, None].expand_as(parts))
            scores = torch.lerp(start, scores, share[:, :-1])
            whole = torch.lerp(whole_start, whole, share[:, -1])
        columns, length = self._columns(numbers), whole.shape[-1]
        self._scores[index[:, None], columns, :length] += seen.share * scores
        self._whole[index, :length] += seen.share * whole

    def _differences(self, seen: Capture) -> _Differences:
        """Of two runs, which all steps between them have in common."""
        at = self.features
        numbers, error, held = at.compared(seen.own, seen.other)
        self._error += error
        self._count += len(held)
        self._sum = self._sum + held.sum(0).cpu()
        self._square += float(held.square().sum())
        change = at.values(seen.other, numbers) - at.values(seen.own, numbers)
        return _Differences(seen.own, numbers, change)

    def _of(
        self, seen: Capture, differ: _Differences
    ) -> tuple[Float[Tensor, "pair feature pos"], Float[Tensor, "pair pos"]]:
        """Scores of the features that differ, and of the site."""
        at = self.features
        coefficient = seen.coefficients[at.site].float()
        whole = (seen.delta(at.site).float() * coefficient).sum(-1)
        along = coefficient @ at.directions(differ.numbers).to(coefficient).T
        return (differ.change * along).transpose(1, 2).cpu(), whole.cpu()

    def _columns(self, numbers: Int[Tensor, " feature"]) -> Int[Tensor, " feature"]:
        """The columns of features, of which some may be new."""
        for number in numbers.tolist():
            self._column.setdefault(number, len(self._column))
        pairs, room, length = self._scores.shape
        if len(self._column) > room:
            more = max(len(self._column), int(MORE * room)) - room
            self._scores = torch.cat([self._scores, torch.zeros(pairs, more, length)], 1)
        return torch.tensor([self._column[n] for n in numbers.tolist()], dtype=torch.long)

    @property
    def unexplained(self) -> float:
        """Share of the variance that all features leave over, where the runs differ."""
        total = self._square - float(self._sum.square().sum()) / max(self._count, 1)
        return self._error / total if total > 0 else 0.0

    def kept(self, keep: int | None) -> tuple[tuple[str, ...], Float[Tensor, "pair feature pos"]]:
        """Names and scores of the features, at most `keep` of them, and of the rest.

        Those are kept whose |score|, summed over pairs and positions, is largest.
        """
        numbers = sorted(self._column)
        if keep is not None and keep < len(numbers):
            size = self._scores.abs().sum((0, 2))
            strongest = sorted(numbers, key=lambda n: (-float(size[self._column[n]]), n))
            numbers = sorted(strongest[:keep])
        scores = self._scores[:, [self._column[n] for n in numbers]]
        rest = self._whole - scores.sum(1)
        names = (*map(self.features.name, numbers), self.features.rest)
        return names, torch.cat([scores, rest[:, None]], 1)


def _some(site: str) -> list[str]:
    return [site] if site else []
