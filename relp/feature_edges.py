"""Edges between features: how much what one feature tells another does to the metric.

The coefficient of a downstream feature is pulled back: to what its encoder reads, by the slope of
its nonlinearity, and from there under the rules through the model to the features upstream. Sites
with dictionaries cut the run, so that an edge is a direct effect: between dictionaries on the
residual stream edges run from each to the next; a transcoder is reached through what its MLP reads.
What features leave over (`rest`) has edges too: the edges into a component sum to its score (those
from the embedding with them) for rules that are exact between two runs, or on a linear model.

One backward for each downstream feature, for all positions and pairs at once.
Source: Marks et al. 2024, arXiv:2403.19647, with the coefficients of the rules for its gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from relp.bridge.capture import ROOT, Cuts
from relp.bridge.features import Features
from relp.bridge.sites import Sites
from relp.dictionaries.dictionary import Rule
from relp.layout import Layout
from relp.protocols import TaskLike
from relp.rulebook import Rules

__all__ = ["FeatureEdges"]

EMBEDDING = "embed"
LOGITS = "logits.in"


class FeatureEdges:
    """Edges between the features that are kept of some dictionaries, summed up batch by batch.

    Args:
        features: in the order of a run, with those kept that have edges.
    """

    def __init__(
        self, sites: Sites, task: TaskLike, rules: Rules, features: Sequence[Features]
    ) -> None:
        self._rules, self._features = rules, tuple(features)
        self._pairs = len(task)
        parts = [name for f in self._features for name in (*map(f.name, f.kept), f.rest)]
        writers, readers = (EMBEDDING, *parts), (*(f"{name}.in" for name in parts), LOGITS)
        self.layout = Layout.of(writers, readers, sites.parallel)
        self.table = torch.zeros(len(writers), len(readers))
        self.cuts = tuple(f.site for f in self._features)
        self.reads = tuple(f.reads for f in self._features)

    def add(self, seen: Cuts) -> None:
        """Adds the edges of some pairs of one length; their run is cut at the features' sites."""
        table = torch.zeros_like(self.table)  # all of the pairs, or none
        steps = {f.site: _steps(f, seen) for f in self._features}
        embedding = _difference(seen, ROOT)
        total = seen.pulled([seen.metric.sum()], [None])
        self._note(table, LOGITS, total, steps, embedding)
        for features in reversed(self._features):
            if features.site not in total:
                continue  # nothing that matters hangs on it
            above = total.pop(features.site)
            for name, outputs, worth in self._readers(features, seen, above):
                pulled = seen.pulled(outputs, worth)
                self._note(table, f"{name}.in", pulled, steps, embedding)
                for site, value in pulled.items():
                    total[site] = total[site] + value if site in total else value
        self.table += table / self._pairs

    def _readers(
        self, features: Features, seen: Cuts, above: Float[Tensor, "pair pos d"]
    ) -> Iterator[tuple[str, list[Tensor], list[Tensor | None]]]:
        """Each feature that is kept, and the rest: what it reads, and what that is worth."""
        dictionary = features.dictionary
        numbers = torch.tensor(features.kept, dtype=torch.long)
        own, other = (run[features.reads] for run in (seen.own, seen.other))
        rule: Rule = "derivative" if self._rules.only_derivatives else "secant"
        slopes = dictionary.slope(own, other, rule, numbers).to(above)
        worth = (above.float() @ features.directions(numbers).to(above.device).T) * slopes
        factor, matrix = dictionary.reading(own, numbers)
        read = seen.before[features.reads]
        left = torch.zeros_like(own, dtype=torch.float32)
        for i, number in enumerate(features.kept):
            cotangent = (worth[..., i, None] * factor) * matrix[:, i]
            left -= cotangent
            if bool(cotangent.any()):
                yield features.name(number), [read], [cotangent.to(read)]
        if features.reads == features.site:
            yield features.rest, [read], [(above.float() + left).to(read)]
        else:
            whole = seen.before[features.site]
            yield features.rest, [whole, read], [above.to(whole), left.to(read)]

    def _note(
        self,
        table: Float[Tensor, "writer reader"],
        reader: str,
        pulled: Mapping[str, Float[Tensor, "pair pos d"]],
        steps: Mapping[str, tuple[Tensor, Tensor]],
        embedding: Float[Tensor, "pair pos d"],
    ) -> None:
        """Adds the edges into one reader."""
        column = self.layout.column[reader]
        if ROOT in pulled and ROOT not in steps:
            worth = float((embedding * pulled[ROOT].float()).sum())
            table[self.layout.row[EMBEDDING], column] += worth
        for features in self._features:
            if features.site not in pulled:
                continue
            coefficient = pulled[features.site].float()
            values, rest = steps[features.site]
            numbers = torch.tensor(features.kept, dtype=torch.long)
            along = coefficient @ features.directions(numbers).to(coefficient).T
            found = torch.cat([(values * along).sum((0, 1)), (rest * coefficient).sum()[None]])
            row = self.layout.row[features.rest]
            rows = slice(row - len(features.kept), row + 1)
            table[rows, column] += found.cpu()


def _difference(seen: Cuts, site: str) -> Float[Tensor, "pair pos d"]:
    return seen.other[site].float() - seen.own[site].float()


def _steps(features: Features, seen: Cuts) -> tuple[Tensor, Tensor]:
    """By how much the features that are kept, and the rest, differ between the runs."""
    own, other = features.divided(seen.own), features.divided(seen.other)
    return other[0] - own[0], other[1] - own[1]
