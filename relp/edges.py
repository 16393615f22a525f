"""Edge scores of one capture: how much moving what one reader hears of one writer would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from relp.bridge.basis import weight
from relp.bridge.capture import ROOT, Capture
from relp.bridge.norms import NormMap
from relp.bridge.sites import Sites
from relp.bridge.stream import NO_STREAM, Place, changes, must_match, stream_places, stream_sites
from relp.partway import weight_of_both
from relp.propagation import module_names
from relp.protocols import TaskLike
from relp.rulebook import Rules
from relp.scores import EdgeScores, Pairs, Provenance, span_index, span_places

__all__ = ["EdgeSums", "edge_scores", "position_groups"]

WRITERS = "what embedding, heads and MLPs write must sum to the residual stream"
HEADS = "what the heads write must sum to the input of the norm behind them"
NEURONS_READ = "what the neurons read must sum to the coefficient at the MLP's input"
NEURONS_WRITE = "what the neurons write must sum to the MLP's output"
READERS = "what the block's and all later readers get must sum to the stream's own coefficient"
NO_NEURONS = (
    "if this MLP is more than two or three matrices, or has a rule for linear layers, leave its "
    "neurons out"
)


def position_groups(task: TaskLike, positions: bool | str) -> list[Any]:
    """What edge scores are summed over: indices into the flattened pairs and positions."""
    pairs, length = task.clean.shape
    if not positions:
        return [slice(None)]
    if positions != "spans":
        return [slice(t, None, length) for t in range(length)]
    index = span_index(task.spans, pairs, length).flatten()
    return [(index == s).nonzero().flatten() for s in range(len(task.spans) + 1)]


def edge_scores(
    sites: Sites, seen: Capture, rules: Rules, groups: Sequence[Any]
) -> Float[Tensor, "group writer reader"]:
    """Sum over each group of pairs and positions of Δ_writer · c_reader.

    c_reader is the coefficient at that reader's own input in the residual stream: the coefficient
    at its projection's output times the projection, pulled back through the block's norm under the
    same rules. Δ_writer is what the writer adds to the stream; heads and neurons behind a post-norm
    are pushed through it under the same rules. Nothing is copied per reader in the model, so
    grouped-query attention and any norm work as they are. Where neurons are split off, the MLP is
    the whole of it less those, as a writer and as a reader.
    Source: EAP, arXiv:2310.10348, with the coefficients of arXiv:2508.21258.

    Args:
        groups: as `position_groups` gives them.

    Raises:
        RuntimeError: what the writers add does not sum to the residual stream, or what the readers
            get not to its coefficient.
    """
    walk = list(stream_places(sites))
    pairs, length, d_model = seen.own[ROOT].shape
    device = seen.own[ROOT].device
    # one row per writer, so that a layer's product needs no copy
    deltas = torch.empty(len(sites.writers), pairs, length, d_model, device=device)
    most = max(p.columns.stop - p.columns.start for p in walk)
    into = torch.empty(most, *deltas.shape[1:], device=device)
    table = torch.zeros(len(groups), len(sites.writers), len(sites.readers), device=device)
    deltas[0] = seen.delta(ROOT)
    stream = deltas[0].clone()  # what all writers so far have added
    got = torch.zeros_like(stream)  # what this block's readers so far have got

    def fill(place: Place) -> Float[Tensor, "pair pos d_model"]:
        """Scores of all whom the readers of a place hear; gives what these get together."""
        if place.follows:
            must_match(stream, seen.delta(place.entry), f"{WRITERS}; at {place} it")
        coefficients = into[: place.columns.stop - place.columns.start]
        _read(sites, place, seen, rules, coefficients)
        ours, theirs = deltas[place.heard].flatten(1, 2), coefficients.flatten(1, 2)
        for scores, group in zip(table, groups, strict=True):
            products = ours[:, group].flatten(1) @ theirs[:, group].flatten(1).T
            scores[place.heard, place.columns] = products
        return coefficients.sum(0)

    for place, following in pairwise(walk):
        got += fill(place)
        stream += _write(sites, place, seen, rules, deltas[place.rows])
        if following.layer != place.layer:
            later = seen.coefficients[following.entry].float()
            whole = seen.coefficients[sites.blocks[place.layer].name("resid")]
            must_match(got + later, whole, f"{READERS}; at block {place.layer} it")
            got.zero_()
    fill(walk[-1])
    return table.cpu()


def _norm_map(
    sites: Sites, norm: nn.Module | None, seen: Capture, site: str, rules: Rules
) -> NormMap:
    if norm is not None and rules.places:
        rules = rules.within(module_names(sites.model)[id(norm)])
    return NormMap.of(norm, seen.values[site], seen.reference[site], rules)


def _read(
    sites: Sites,
    place: Place,
    seen: Capture,
    rules: Rules,
    into: Float[Tensor, "reader pair pos d_model"],
) -> None:
    """Fills `into` with the coefficient at the stream of each reader of a place."""
    basis, at = place.basis, 0
    norm = _norm_map(sites, basis.norm, seen, place.entry, rules)
    for slot in basis.slots:
        if slot.readers:
            part = into[at : (at := at + len(slot.readers))]
            behind = slot.values(seen.coefficients)
            norm.pull_through(slot.read_in().flatten(0, 1).to(behind), behind, part)
    if not basis.entry:
        return
    behind = seen.coefficients[basis.entry]
    into[at] = norm.pull(behind.float())
    if at:
        matrices = [m for slot in basis.slots for m in slot.through]
        found = [seen.coefficients[m.site].float() @ weight(m.module).to(behind.device).float()
                 for m in matrices]  # fmt: skip
        where = f"{NEURONS_READ}; at block {place.layer} it"
        must_match(torch.stack(found).sum(0), behind, where, NO_NEURONS)
        into[at] -= into[:at].sum(0)


def _write(
    sites: Sites,
    place: Place,
    seen: Capture,
    rules: Rules,
    into: Float[Tensor, "writer pair pos d_model"],
) -> Float[Tensor, "pair pos d_model"]:
    """Fills `into` with what each writer of a place adds to the stream; gives the whole."""
    basis, parts = place.basis, into[: len(place.basis.parts)]

    def check(found: Float[Tensor, "pair pos d_model"]) -> None:
        what, otherwise = (NEURONS_WRITE, NO_NEURONS) if basis.entry else (HEADS, NO_STREAM)
        where = f"{what}; at block {place.layer} it"
        must_match(found, seen.delta(basis.behind), where, otherwise)

    def norm(moved: Float[Tensor, "pair pos d_model"]) -> NormMap:
        check(moved)
        return _norm_map(sites, basis.post, seen, basis.behind, rules)

    if basis.out and basis.parts:
        step = seen.delta(basis.out.site)
        changes(basis, step, norm, parts)
        if not basis.entry and basis.post is None:
            return parts.sum(0)
        if basis.post is None:
            check(basis.together(step, parts))
    whole = seen.delta(basis.component).float()
    if basis.entry:
        into[-1] = whole
        if basis.parts:
            into[-1] -= parts.sum(0)
    return whole


class EdgeSums:
    """Edge scores of a task, summed up capture by capture."""

    def __init__(self, sites: Sites, task: TaskLike, rules: Rules, positions: bool | str) -> None:
        self.sites_needed = stream_sites(sites)
        self._sites, self._rules, self._positions, self._pairs = sites, rules, positions, len(task)
        self.places = span_places(task.spans) if positions == "spans" else ()
        groups = len(self.places) or (int(task.lengths.max()) if positions else 1)
        self._sums = torch.zeros(groups, len(sites.writers), len(sites.readers))
        self._starts = torch.zeros_like(self._sums) if rules.partway else None

    def add(self, _: Int[Tensor, " row"], batch: TaskLike, seen: Capture) -> None:
        """Adds the scores of one capture of some pairs, which have one length."""
        groups = position_groups(batch, self._positions)
        for sums, of in ((self._sums, seen), (self._starts, seen.at_start())):
            if sums is not None:
                scores = edge_scores(self._sites, of, self._rules, groups)
                sums[: len(scores)] += seen.share * scores / self._pairs

    @property
    def table(self) -> Float[Tensor, "*pos writer reader"]:
        """The scores so far; without an axis for positions unless they are kept."""
        scores = self._sums if self._starts is None else weight_of_both(self._starts, self._sums)
        return scores if self._positions else scores[0]

    def scores(
        self, provenance: Provenance, pairs: Pairs, remainder: Mapping[str, float]
    ) -> EdgeScores:
        """The result."""
        pairs = replace(pairs, tokens=self.places or pairs.tokens)
        return EdgeScores(provenance=provenance, pairs=pairs, places=self.places,
                          remainder=remainder, layout=self._sites.layout,
                          edges=self.table)  # fmt: skip
