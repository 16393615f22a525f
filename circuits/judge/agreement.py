"""How well scores agree with exact effects, or with other scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.judge.measures import MEASURES, WITHIN, Cells, Measures, percentiles
from circuits.judge.resampling import holm, p_value, redrawn, swaps
from relp import Component, EdgeScores, NodeScores, Scores

__all__ = ["agreement", "agreement_tests", "by_pair"]

PEAK, CHANGE = 0.5, 0.1
"""One cell decides Pearson's r if it has more of the squared effects, or r moves by more."""
Points = tuple[np.ndarray, np.ndarray]


def agreement(
    scores: Scores | Sequence[Scores],
    effect: Scores,
    *,
    k: int = 10,
    floor: float = 0.01,
    by_layer: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """How well scores agree with exact effects, or with any other scores: one row per kind.

    >>> agreement(scores, effect)
    >>> agreement([attribute(model, task, rules=r) for r in (GRADIENT, RELP)], effect)
    >>> agreement(scores, effect, by_layer=True)

    Node scores are compared within each pair, by kind of component; summed over positions if the
    effects are of all positions at once (`patch(positions=False)`). Edge scores, which are means
    over pairs already, are compared over all edges (kind `edge`) and by the slot that reads (`q`,
    `k`, `v`, `in`). The effects may be of fewer components. What was not measured is NaN and left
    out; of what `verify` drew at random, each cell stands for others and counts as many times.

    No measure shows all: Pearson's r sees the few large effects, Spearman's ρ and the signs see the
    many. Columns, each a mean over the pairs that have it unless said otherwise:

    - `rules`, `kind`, and with `by_layer` `layer` (the reader's for edges; -1 if there is none).
    - `pearson`: r over a pair's components and positions. `pearson_pooled`: over those of all
      pairs together. `pearson_rest`: within pairs, without the cell of the largest |effect| of each
      (and what it stands for). `peak`: the share of the squared effects that this cell has.
      `hangs`: one cell decides r, as it has more than half of the squared effects, or r without it
      is more than 0.1 away, or there is none.
    - `spearman`, `spearman_pooled`, `signs` (share of the effects whose sign the score has; a score
      of 0 has none): over effects above `floor`. `cells`: how many effects that is, in all pairs.
    - `relative_error`: norm of the difference over the norm of the effects. `overlap`: share of the
      `k` largest |effects|, or of all that are not 0 if they are fewer, that are among as many
      largest |scores|; NaN where cells stand for others, which could be larger.
    - `pairs`: how many the correlations are over. `unresolved`: share of the effects that are at
      most their `resolution`, which is rounding, leaving out those that are 0 as their score is,
      where nothing changes; 0 for effects that state none.
    - `…_low`, `…_high`: 95 % bootstrap intervals of the measures over pairs, and over the cells of
      each stratum if those were drawn (`spearman_pooled` with the ranks of all pairs, not ranked
      anew). NaN for a single pair, and for edges, which are means over pairs already. A large
      effect that the lot missed is in no interval: `missed` says how many there may be. Few pairs
      know little of others: of heads of `ioi-gpt2`, intervals of 8 pairs held the value of 64 in 87
      to 93 of 100 draws (16 pairs: 90 to 98); where rare pairs decide it they held it less often,
      and signs that are right on all pairs have the interval [1, 1].

    Where fewer than three effects are not 0 there is no correlation worth the name: if one token
    differs, the embedding has a single effect, and any estimate of the right sign would get 1. Nor
    is there if all are equal. What is at most the resolution of its side counts as 0 throughout.

    Args:
        scores: what is judged, or several.
        effect: what it is judged by.
        k: how many of the largest `overlap` is about.
        floor: effects up to this share of the pair's |gap| (edges: of the mean gap), or up to
            their resolution, have no rank and no sign; 0 for all but rounding.
        by_layer: a row for each layer.
        seed: of the bootstrap.

    Raises:
        ValueError: the two are not about the same components, pairs, task or direction, scores are
            NaN, `k` is below 1, or `floor` is negative.
    """
    _check_options(k, floor)
    rows = [
        {"rules": s.rules, **_row(s, effect, group, k, seed, by_layer=by_layer)}
        for s in several(scores)
        for group in _groups(s, effect, floor, seed, by_layer=by_layer)
    ]
    return _titled(pd.DataFrame(rows), "agreement", effect)


def _titled(table: pd.DataFrame, what: str, effect: Scores) -> pd.DataFrame:
    """With the line that says where its numbers come from: figures of it show it."""
    source = replace(effect.provenance, rules=f"{what} with {effect.rules} {effect.noun}s")
    table.attrs["title"] = source.title
    return table


def _row(
    scores: Scores, effect: Scores, group: Group, k: int, seed: int, *, by_layer: bool
) -> dict[str, object]:
    found = Measures.of(group.pairs, k)
    r, rest = found["pearson"], found["pearson_rest"]
    hangs = found["peak"] > PEAK or not abs(r - rest) <= CHANGE
    pairs = int(found.has("pearson").sum())
    row = {
        "kind": group.kind,
        **({"layer": group.layer} if by_layer else {}),
        **{name: found[name] for name in ("pearson", "pearson_pooled", "pearson_rest", "peak")},
        "hangs": bool(hangs and not np.isnan(r)),
        **{name: found[name] for name in ("spearman", "spearman_pooled", "signs")},
        "cells": sum(len(c.above.effect) for c in group.pairs),
        **{name: found[name] for name in ("relative_error", "overlap")},
        # the one sample of edges is a mean over all pairs
        "pairs": pairs if scores.level == "node" else len(scores.clean) * pairs,
        "unresolved": _unresolved(group.pairs) if effect.resolution else 0.0,
    }
    for name in MEASURES:
        row[f"{name}_low"], row[f"{name}_high"] = found.interval(name, seed)
    return row


def agreement_tests(
    scores: Sequence[Scores],
    effect: Scores,
    *,
    measures: Sequence[str] = ("pearson", "spearman", "signs", "relative_error"),
    baseline: str | None = None,
    k: int = 10,
    floor: float = 0.01,
    seed: int = 0,
) -> pd.DataFrame:
    """Whether one set of scores agrees better than another by more than the choice of pairs.

    >>> each = [attribute(model, task, rules=r) for r in (GRADIENT, RELP)]
    >>> agreement_tests(each, effect, baseline="GRADIENT")

    One row per kind, measure and two sets: `difference` (`one` minus `other`, mean over the `pairs`
    that have the measure for both), its 95 % bootstrap interval `low` to `high` as for `agreement`,
    the two-sided `p_value` of the permutation test that swaps the two within random pairs, and
    `p_holm`: the same, corrected by Holm's method for all the tests of this table. All ways to swap
    are taken if there are at most 10,000, else as many. With n pairs no p-value is below 2^(1-n),
    as swapping all or none gives the same difference: with few pairs ask for few measures. NaN for
    a single pair. Where cells were drawn (`verify`), p-values are about those that were.

    Args:
        scores: two sets of node scores or more, each with its own name.
        effect: what they are judged by.
        measures: which, of those of `agreement` that a single pair has.
        baseline: the name of the one that all others are compared with; if None, all with all.
        k: as for `agreement`; so are `floor` and `seed`.

    Raises:
        ValueError: there are fewer than two sets, two of one name, no such measure or baseline, or
            scores are of edges, which are means over pairs already; or as for `agreement`.
    """
    _check_options(k, floor)
    many = several(scores)
    _check_tests(many, measures, baseline)
    found = [
        {g.kind: Measures.of(g.pairs, k) for g in _groups(s, effect, floor, seed)} for s in many
    ]
    names = [s.rules for s in many]
    both = [
        (i, j) if names[j] == baseline or baseline is None else (j, i)
        for i, j in combinations(range(len(many)), 2)
        if baseline in (None, names[i], names[j])
    ]
    rows = [
        (kind, name, names[i], names[j], *_test(found[i][kind], found[j][kind], name, seed))
        for kind in found[0]
        for name in measures
        for i, j in both
    ]
    columns = ["kind", "measure", "one", "other", "difference", "low", "high", "pairs", "p_value"]
    table = pd.DataFrame(rows, columns=columns)
    table["p_holm"] = holm(table["p_value"].to_numpy(dtype=float))
    return _titled(table, "differences in agreement", effect)


def _test(
    one: Measures, other: Measures, name: str, seed: int
) -> tuple[float, float, float, int, float]:
    """Difference of two, its interval, how many pairs have it, and the p-value."""
    both = one.has(name) & other.has(name)
    pairs = int(both.sum())
    if not pairs:
        return np.nan, np.nan, np.nan, 0, np.nan
    apart = (one.within[name] - other.within[name])[0, both]
    samples = one.samples(name, seed, both) - other.samples(name, seed, both)
    chance = (1 - 2 * swaps(pairs, seed)) @ apart[:, None] / pairs
    found = float(p_value(chance)[0]) if pairs > 1 else np.nan
    return float(apart.mean()), *percentiles(samples), pairs, found


def by_pair(
    scores: Scores, effect: Scores, *, floor: float = 0.01
) -> dict[str, Mapping[str, Float[np.ndarray, " pair"]]]:
    """The measures of agreement that a single pair has, of each: by kind and measure.

    NaN where a pair has none.

    Raises:
        ValueError: as `agreement`.
    """
    groups = {g.kind: Measures.of(g.pairs, k=1) for g in _groups(scores, effect, floor, 0)}
    return {
        kind: {name: found.within[name][0] for name in WITHIN} for kind, found in groups.items()
    }


def points(scores: Scores, effect: Scores) -> Iterator[tuple[str, list[Points]]]:
    """What `agreement` compares: for each kind, scores and effects of each pair (edges: of all).

    Values within the resolution of their side are 0; what was not measured is left out.

    Raises:
        ValueError: as `agreement`.
    """
    for group in _groups(scores, effect, 0.0, 0):
        yield group.kind, [(c.score, c.effect) for c in group.pairs]


class Group(NamedTuple):
    """What one row is about."""

    kind: str
    layer: int
    pairs: list[Cells]


def _groups(
    scores: Scores, effect: Scores, floor: float, seed: int, *, by_layer: bool = False
) -> Iterator[Group]:
    """The cells of each kind, and layer, with values within the resolution of their side 0."""
    scores, effect = scores.resolved(), effect.resolved()
    if isinstance(scores, NodeScores) and isinstance(effect, NodeScores):
        scores = scores.together() if effect.is_together else scores
    _must_correspond(scores, effect)
    if isinstance(scores, NodeScores) and isinstance(effect, NodeScores):
        yield from _node_groups(scores, effect, floor, seed, by_layer)
    if isinstance(scores, EdgeScores) and isinstance(effect, EdgeScores):
        yield from _edge_groups(scores, effect, floor, seed, by_layer)


def _node_groups(
    scores: NodeScores, effect: NodeScores, floor: float, seed: int, by_layer: bool
) -> Iterator[Group]:
    at = {name: i for i, name in enumerate(scores.components)}
    estimated = scores.nodes[:, [at[name] for name in effect.components]]
    _must_be_numbers(scores, estimated, ~effect.nodes.isnan())
    compared = _Compared(effect, seed)
    parsed = [Component.parse(name) for name in effect.components]
    layers, positions = [c.layer for c in parsed], torch.arange(effect.nodes.shape[-1])
    measured = (positions < effect.lengths[:, None])[:, None] & ~effect.nodes.isnan()
    floors = (floor * effect.gap.abs()).tolist()
    for kind in [k for k in scores.kinds() if k in effect.kinds()]:
        for layer, rows in _layers(layers, [c.kind == kind for c in parsed], by_layer):
            chosen = measured & rows[:, None]
            each = zip(estimated, effect.nodes, chosen, floors, strict=True)
            pairs = [compared.cells(*one) for one in each]
            yield Group(kind, layer, pairs)


def _edge_groups(
    scores: EdgeScores, effect: EdgeScores, floor: float, seed: int, by_layer: bool
) -> Iterator[Group]:
    measured = effect.layout.exists & ~effect.edges.isnan()
    _must_be_numbers(scores, scores.edges, measured)
    compared = _Compared(effect, seed)
    slots = [slot for _, slot in effect.layout.targets]
    layers = [reader.layer for reader, _ in effect.layout.targets]
    least = floor * float(effect.gap.mean().abs())
    for kind in ("edge", *dict.fromkeys(slots)):
        for layer, columns in _layers(layers, [kind in ("edge", s) for s in slots], by_layer):
            chosen = measured & columns
            if chosen.any():
                cells = compared.cells(scores.edges, effect.edges, chosen, least)
                yield Group(kind, layer, [cells])


def _layers(
    layers: Sequence[int], chosen: Sequence[bool], by_layer: bool
) -> Iterator[tuple[int, Bool[Tensor, " component"]]]:
    """Which of those chosen are in each layer, or all of them."""
    inside = torch.tensor(chosen)
    if not by_layer:
        yield -1, inside
        return
    for layer in sorted({n for n, i in zip(layers, chosen, strict=True) if i}):
        yield layer, inside & (torch.tensor(layers) == layer)


class _Compared:
    """Makes cells of what is chosen in the tables of effects, with what each stands for."""

    def __init__(self, effect: Scores, seed: int) -> None:
        self._weights = effect.sampling_weights
        self._draws = np.empty((0, 0))
        if self._weights is None or effect.strata is None:
            return
        lot = self._weights > 1
        weight, stratum = self._weights[lot].numpy(), effect.strata[lot].cpu().numpy()
        self._draws = redrawn(weight, stratum, seed) if len(weight) else self._draws
        self._column = (lot.flatten().cumsum(0) - 1).reshape(lot.shape)

    def cells(
        self, score: Tensor, effect: Tensor, chosen: Bool[Tensor, "*cell"], floor: float
    ) -> Cells:
        """Those of one pair."""
        x, y = _flat(score[chosen]), _flat(effect[chosen])
        if self._weights is None:
            return Cells(x, y, np.ones(len(x)), self._draws, floor)
        weight, draws = self._weights[chosen], self._draws
        if len(draws):
            draws = draws[:, self._column[chosen][weight > 1].numpy()]
        return Cells(x, y, weight.numpy(), draws, floor)


def _unresolved(pairs: Sequence[Cells]) -> float:
    """Share of the effects that are 0, where the score says that something changes."""
    changed = [c.at((c.score != 0) | (c.effect != 0)) for c in pairs]
    zero, all_ = (
        sum(float(c.weight @ of(c)) for c in changed)
        for of in (lambda c: c.effect == 0, lambda c: np.ones(len(c.effect)))
    )
    return zero / all_ if all_ else 0.0


def _flat(values: Tensor) -> np.ndarray:
    return values.flatten().double().cpu().numpy()


def several(scores: Scores | Sequence[Scores]) -> list[Scores]:
    """One set of scores or more, as a list.

    Raises:
        TypeError: one is something else.
        ValueError: there is none.
    """
    listed = isinstance(scores, Iterable) and not isinstance(scores, Scores | nx.Graph)
    many: list[Any] = list(scores) if listed else [scores]  # type: ignore[arg-type]
    if not many:
        raise ValueError(
            "`scores` must be one set or more; got none; call attribute(model, task, rules=...)"
        )
    for one in many:
        if not isinstance(one, Scores):
            raise TypeError(
                f"`scores` must be Scores, or a list of them; got {type(one).__name__}; call "
                "attribute(model, task, rules=...); circuits are judged by faithfulness"
            )
    return many


def _check_options(k: int, floor: float) -> None:
    if k < 1:
        raise ValueError(f"`k` must be at least 1; got {k}; ask for the overlap of one or more")
    if not floor >= 0:
        raise ValueError(
            f"`floor` must be a share of the gap, 0 or more; got {floor}; 0 leaves out rounding"
        )


def _check_tests(scores: Sequence[Scores], measures: Sequence[str], baseline: str | None) -> None:
    names = [s.rules for s in scores]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"tests need two sets of scores or more, each with its own name; got {names}; rename "
            "one with scores.renamed('...')"
        )
    known = (*WITHIN, "overlap")
    wrong = [name for name in measures if name not in known]
    if wrong or not measures:
        raise ValueError(
            f"`measures` must be some of {known}; got {wrong or 'none'}; what is "
            "pooled has no value for each pair"
        )
    if baseline is not None and baseline not in names:
        raise ValueError(f"`baseline` must be one of {names}; got {baseline!r}; or leave it out")
    if any(s.level == "edge" for s in scores):
        raise ValueError(
            "tests need a value for each pair; edge scores are means over pairs already; call "
            "attribute(model, task, level='node')"
        )


def _must_be_numbers(scores: Scores, table: Tensor, compared: Tensor) -> None:
    """A broken estimate is not left out as if it had not been asked for."""
    if broken := int((table[compared]).isnan().sum()):
        raise ValueError(
            f"scores must be numbers where effects were measured; {broken} of {scores.rules!r} are "
            "NaN; compute them again, or judge by the other of the two"
        )


def _must_correspond(scores: Scores, effect: Scores) -> None:
    for what in ("level", "task", "direction", "metric", "model", "places"):
        a, b = getattr(scores, what), getattr(effect, what)
        if a != b:
            raise ValueError(
                f"scores and effects must be of the same {what}; got {a!r} and {b!r}; "
                "compute both with the same model, task, level, direction and positions"
            )
    for what in ("lengths", "clean", "corrupt"):
        a, b = getattr(scores, what), getattr(effect, what)
        if a.shape != b.shape or not bool((a - b).abs().max() <= 1e-3 * (1 + b.abs().max())):
            raise ValueError(
                f"scores and effects must be of the same pairs; their {what!r} differ; compute "
                "both with the same task object"
            )
    missing: set[str] = set()
    if isinstance(scores, NodeScores) and isinstance(effect, NodeScores):
        missing = set(effect.components) - set(scores.components)
        alike = scores.nodes.shape[-1] == effect.nodes.shape[-1]
    elif isinstance(scores, EdgeScores) and isinstance(effect, EdgeScores):
        names = [(s.writers, s.readers) for s in (scores, effect)]
        alike = names[0] == names[1] and scores.edges.dim() == effect.edges.dim()
    if missing or not alike:
        shapes = " and ".join(str(list(s.table.shape)) for s in (scores, effect))
        raise ValueError(
            f"scores and effects must have the same positions and components; got {shapes}, "
            f"unknown to the scores: {sorted(missing)[:3]}; compute both with the same options"
        )
