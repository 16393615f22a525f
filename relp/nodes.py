"""Node scores of one capture: how much moving each component by itself would do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from relp.bridge.capture import ROOT, Capture
from relp.bridge.features import Features
from relp.bridge.run import warn_caller
from relp.bridge.sites import Sites
from relp.features import FeatureSums
from relp.partway import way
from relp.protocols import TaskLike
from relp.rulebook import Rules
from relp.scores import NodeScores, Pairs, Provenance

POOR = 0.5
"""Dictionaries that leave more than this share of the variance over are said to be poor."""

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
    """Node scores of a task, summed up capture by capture.

    Args:
        components: names or kinds, all but neurons if None; `feature` alone for those of `features`
            and nothing else.
        features: of dictionaries; each site's own stand behind all other components.
        keep: at most so many features of a site.
    """

    work = 0
    """Bytes that scoring takes beside what is captured: next to nothing."""

    def __init__(
        self,
        sites: Sites,
        task: TaskLike,
        rules: Rules,
        components: Sequence[str] | None,
        features: Sequence[Features] = (),
        keep: int | None = None,
    ) -> None:
        alone = features and components is not None and [*components] in (["feature"], [*"feature"])
        self._components = () if alone else sites.chosen(components)
        self._behind: tuple[str, ...] = ()
        if rules.partway:
            self._behind = tuple(sites.behind(c) for c in self._components)
        size, length = len(task), int(task.lengths.max())
        self._features = [
            FeatureSums(f, size, length, sites.behind(f.rest) if rules.partway else "")
            for f in features
        ]
        self._keep = keep
        own = (*node_sites(sites, self._components), *self._behind)
        read = (n for f in self._features for n in f.sites_needed)
        at = (n for f in self._features for n in f.coefficients_needed)
        self.sites_needed = tuple(dict.fromkeys((*own, *read)))
        self.coefficients_needed = tuple(dict.fromkeys((*own, *at)))
        self._places = component_places(sites, self._components)
        self._nodes = torch.zeros(size, len(self._components), length)

    def add(self, index: Int[Tensor, " row"], batch: TaskLike, seen: Capture) -> None:
        """Adds the scores of one capture of these pairs, which have one length."""
        length = int(batch.lengths[0])
        if self._behind:
            scores = partway_scores(seen, self._places, self._behind)
        else:
            scores = node_scores(seen, self._places)
        self._nodes[index, :, :length] += seen.share * scores
        for features in self._features:
            features.add(index, seen)

    @cached_property
    def _whole(self) -> tuple[tuple[str, ...], Float[Tensor, "pair component pos"]]:
        """All components and their scores; nothing is added then."""
        if not self._features:
            return self._components, self._nodes
        names, tables = zip(*(f.kept(self._keep) for f in self._features), strict=True)
        components = (*self._components, *(name for some in names for name in some))
        return components, torch.cat([self._nodes, *tables], 1)

    @property
    def table(self) -> Float[Tensor, "pair component pos"]:
        """The scores."""
        return self._whole[1]

    def scores(
        self, provenance: Provenance, pairs: Pairs, remainder: Mapping[str, float]
    ) -> NodeScores:
        """The result.

        Warns:
            UserWarning: a dictionary leaves most of what a site holds unexplained.
        """
        for f in self._features:
            if f.unexplained > POOR:
                warn_caller(
                    f"{f.features.dictionary.called} leaves {f.unexplained:.0%} of the variance of "
                    f"{f.features.site!r} on these prompts unexplained: most of what it does "
                    f"will be in {f.features.rest!r}; it may be of another model, site or layer, "
                    "or of weights that were folded and centred, as TransformerLens did by default"
                )
        components, table = self._whole
        return NodeScores(provenance=provenance, pairs=pairs, remainder=remainder,
                          components=components, nodes=table)  # fmt: skip
