"""Node scores of one capture: how much moving each component by itself would do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from relp.bridge.capture import ROOT, Capture
from relp.bridge.sites import Sites
from relp.partway import way
from relp.protocols import TaskLike
from relp.rulebook import Rules
from relp.scores import NodeScores, Pairs, Provenance

__all__ = ["NodeSums", "component_places", "node_scores", "node_sites"]


def node_sites(sites: Sites, components: Sequence[str] | None = None) -> tuple[str, ...]:
    """The sites that node scores of these components need; of all but neurons if None."""
    names = sites.components if components is None else components
    return tuple(dict.fromkeys(sites.part(c)[0] for c in names))


Places = Mapping[tuple[str, int], tuple[list[int], list[int]]]
"""(site, how many equal parts it has) -> the columns of the components there, and their parts."""


def component_places(sites: Sites, components: Sequence[str]) -> Places:
    """Where node-level components are."""
    found: Places = defaultdict(lambda: ([], []))
    for column, component in enumerate(components):
        site, number, parts = sites.part(component)
        columns, numbers = found[site, parts]
        columns.append(column)
        numbers.append(number)
    return found


def node_scores(seen: Capture, places: Places) -> Float[Tensor, "pair component pos"]:
    """First-order effect of moving each component from the own to the other run.

    Unit: that of the metric. Source: arXiv:2508.21258; with gradients, attribution patching.
    """
    pairs, length, _ = seen.own[ROOT].shape
    scores = torch.empty(pairs, sum(len(c) for c, _ in places.values()), length)
    # a layer's heads or neurons, of which there are many, in one go
    for (site, parts), (columns, numbers) in places.items():
        product = seen.delta(site).float() * seen.coefficients[site].float()
        whole = reduce(product, "p t (part d) -> p part t", "sum", part=parts)
        scores[:, columns] = whole[:, numbers].cpu()
    return scores


def partway_scores(
    seen: Capture, places: Places, behind: Sequence[str]
) -> Float[Tensor, "pair component pos"]:
    """Node scores between the own run's derivatives and the rules, see `relp.partway`.

    `behind`: the site of the residual stream behind each component.
    """
    scores = node_scores(seen, places)
    row = {site: i for i, site in enumerate(dict.fromkeys(behind))}
    streams = node_scores(seen, {(site, 1): ([i], [0]) for site, i in row.items()})
    share = way(scores, streams[:, [row[site] for site in behind]])
    return torch.lerp(node_scores(seen.at_start(), places), scores, share)


class NodeSums:
    """Node scores of a task, summed up capture by capture."""

    work = 0
    """Bytes that scoring takes beside what is captured: next to nothing."""

    def __init__(
        self, sites: Sites, task: TaskLike, rules: Rules, components: Sequence[str] | None
    ) -> None:
        self.components = sites.chosen(components)
        self.sites_needed = node_sites(sites, self.components)
        self._behind: tuple[str, ...] = ()
        if rules.partway:
            self._behind = tuple(sites.behind(c) for c in self.components)
            self.sites_needed = tuple(dict.fromkeys((*self.sites_needed, *self._behind)))
        self.coefficients_needed = self.sites_needed
        self._places = component_places(sites, self.components)
        self.table = torch.zeros(len(task), len(self.components), int(task.lengths.max()))

    def add(self, index: Int[Tensor, " row"], batch: TaskLike, seen: Capture) -> None:
        """Adds the scores of one capture of these pairs, which have one length."""
        length = int(batch.lengths[0])
        if self._behind:
            scores = partway_scores(seen, self._places, self._behind)
        else:
            scores = node_scores(seen, self._places)
        self.table[index, :, :length] += seen.share * scores

    def scores(
        self, provenance: Provenance, pairs: Pairs, remainder: Mapping[str, float]
    ) -> NodeScores:
        """The result."""
        return NodeScores(provenance=provenance, pairs=pairs, remainder=remainder,
                          components=self.components, nodes=self.table)  # fmt: skip
