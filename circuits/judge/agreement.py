"""How well scores agree with exact effects, with other scores, and with a known circuit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import networkx as nx
import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from circuits.graph import check_circuit, real_edges
from relp import Component, EdgeScores, NodeScores, Scores

__all__ = ["agreement", "auroc"]

MINIMUM = 3
Points = tuple[np.ndarray, np.ndarray]


def agreement(scores: Scores | Sequence[Scores], effect: Scores, *, k: int = 10) -> pd.DataFrame:
    """How well scores agree with exact effects, or with any other scores: one row per kind.

    >>> agreement(scores, effect)
    >>> agreement([attribute(model, task, rules=r) for r in (GRADIENT, RELP)], effect)

    Node scores are compared within each pair, by kind of component; summed over positions if the
    effects are of all positions at once (`patch(positions=False)`). Edge scores, which are means
    over pairs already, are compared over all edges (kind `edge`) and by the slot that reads (`q`,
    `k`, `v`, `in`). The effects may be of fewer components, and NaN where edges were not measured.

    Columns: `rules`, `kind`, `pearson` and `spearman` (correlation over a pair's components and
    positions, mean over pairs), `relative_error` (norm of the difference over the norm of the
    effects, mean over pairs), `overlap` (share of the `k` largest |effects|, or of all that are
    not 0 if they are fewer, that are among as many largest |scores|, mean over pairs), `pairs` (how
    many the correlations are over), `unresolved` (share of the effects that are at most their
    `resolution`, which is rounding, leaving out those that are 0 as their score is, where nothing
    changes; 0 for effects that state none). Where fewer than three effects
    are not 0 there is no correlation worth the name: if one token differs, the embedding has a
    single effect, and any estimate of the right sign would get 1. Nor is there if all are equal.
    All of this is NaN where no pair has any. What is at most the resolution of its own side counts
    as 0 throughout.

    Raises:
        ValueError: the two are not about the same components, pairs, task or direction, or `k` is
            below 1.
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1; got {k}; ask for the overlap of one or more")
    many = [scores] if isinstance(scores, Scores) else list(scores)
    rows = []
    for s in many:
        for kind, samples in points(s, effect):
            correlations, errors = [], []
            unresolved = _unresolved(samples) if effect.resolution else 0.0
            for x, y in samples:
                nonzero = int(np.count_nonzero(y))
                if nonzero:
                    error = np.linalg.norm(x - y) / np.linalg.norm(y)
                    errors.append((float(error), _overlap(x, y, min(k, nonzero))))
                if _varies(x) and _varies(y) and nonzero >= MINIMUM:
                    correlations.append((stats.pearsonr(x, y)[0], stats.spearmanr(x, y)[0]))
            # the one sample of edges is a mean over all pairs
            pairs = len(correlations) if s.level == "node" else len(s.clean) * len(correlations)
            rows.append((s.rules, kind, *_mean(correlations), *_mean(errors), pairs, unresolved))
    columns = ["rules", "kind", "pearson", "spearman", "relative_error", "overlap", "pairs"]
    return pd.DataFrame(rows, columns=[*columns, "unresolved"])


def auroc(
    scores: Scores | Sequence[Scores], known: nx.MultiDiGraph | Collection[str]
) -> pd.DataFrame:
    """How well |score| tells a known circuit from the rest: area under the ROC curve, by kind.

    >>> auroc(scores, ["L1H1", "L1H3", "L1H7"])

    1 if all that is in the circuit has larger scores than all that is not, 0.5 by chance; ties
    count half, and effects within their `resolution` are ties at 0. Columns: `rules`, `kind`,
    `auroc`, `known` (how many are in the circuit), `others`. Kinds of which the circuit holds
    nothing or everything are left out: there is nothing to tell.

    Names of components are looked for among node scores summed over positions, or among writers
    with their edge scores summed; kinds are those of components. A graph is compared edge by edge
    with edge scores (kind `edge`), and as the names of its nodes with node scores. Source of the
    measure: Conmy et al. 2023, arXiv:2304.14997.

    Raises:
        ValueError: a component or edge of the circuit is not one of the scores.
        TypeError: the graph is no circuit.
    """
    many = [scores] if isinstance(scores, Scores) else list(scores)
    rows = []
    for s in (s.resolved() for s in many):
        if isinstance(s, EdgeScores) and isinstance(known, nx.Graph):
            values, inside, kinds = _edge_labels(s, known)
        else:
            values, inside, kinds = _component_labels(s, known)
        for kind in dict.fromkeys(kinds):
            at = np.array([k == kind for k in kinds])
            ranks, found = stats.rankdata(values[at]), inside[at]
            n, m = int(found.sum()), int((~found).sum())
            if n and m:
                # Mann and Whitney: how often one inside outranks one outside
                area = (ranks[found].sum() - n * (n + 1) / 2) / (n * m)
                rows.append((s.rules, kind, float(area), n, m))
    return pd.DataFrame(rows, columns=["rules", "kind", "auroc", "known", "others"])


def points(scores: Scores, effect: Scores) -> Iterator[tuple[str, list[Points]]]:
    """What `agreement` compares: for each kind, scores and effects of each pair (edges: of all).

    Values within the resolution of their side are 0.

    Raises:
        ValueError: as `agreement`.
    """
    scores, effect = scores.resolved(), effect.resolved()
    if isinstance(scores, NodeScores) and isinstance(effect, NodeScores):
        scores = scores.together() if effect.is_together else scores
    _must_correspond(scores, effect)
    if isinstance(scores, NodeScores) and isinstance(effect, NodeScores):
        yield from _node_points(scores, effect)
    if isinstance(scores, EdgeScores) and isinstance(effect, EdgeScores):
        yield from _edge_points(scores, effect)


def _node_points(scores: NodeScores, effect: NodeScores) -> Iterator[tuple[str, list[Points]]]:
    at = {name: i for i, name in enumerate(scores.components)}
    for kind in [k for k in scores.kinds() if k in effect.kinds()]:
        names, measured = effect.of_kind(kind)
        estimated = scores.nodes[:, [at[n] for n in names]]
        pairs = zip(estimated, measured, effect.lengths.tolist(), strict=True)
        yield kind, [(_flat(x[:, :length]), _flat(y[:, :length])) for x, y, length in pairs]


def _edge_points(scores: EdgeScores, effect: EdgeScores) -> Iterator[tuple[str, list[Points]]]:
    measured = effect.layout.exists & ~effect.edges.isnan()
    slots = [slot for _, slot in effect.layout.targets]
    for kind in ("edge", *dict.fromkeys(slots)):
        chosen = measured & torch.tensor([kind in ("edge", slot) for slot in slots])
        if chosen.any():
            yield kind, [(_flat(scores.edges[chosen]), _flat(effect.edges[chosen]))]


def _unresolved(samples: list[Points]) -> float:
    """Share of the effects that are 0, where the score says that something changes."""
    x, y = (np.concatenate(values) for values in zip(*samples, strict=True))
    compared = (x != 0) | (y != 0)
    return float((y[compared] == 0).mean()) if compared.any() else 0.0


def _varies(values: np.ndarray) -> bool:
    """By more than rounding: restoring any whole layer of the residual stream has one effect."""
    return bool(np.ptp(values) > 1e-5 * abs(values).max())


def _mean(values: list[tuple[float, float]]) -> tuple[float, float]:
    first, second = np.mean(values, axis=0) if values else (np.nan, np.nan)
    return float(first), float(second)


def _flat(values: Tensor) -> np.ndarray:
    return values.flatten().double().cpu().numpy()


def _overlap(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """Share of the k largest |y| that are among the k largest |x|."""
    best = [set(np.argsort(-abs(v), kind="stable")[:k].tolist()) for v in (x, y)]
    return len(best[0] & best[1]) / k


Labels = tuple[np.ndarray, np.ndarray, list[str]]
"""|score|, whether it is in the known circuit, and kind, of each component or edge."""


def _component_labels(scores: Scores, known: nx.MultiDiGraph | Collection[str]) -> Labels:
    components, total = scores.by_component()
    kinds = [Component.parse(c).kind for c in components]
    if isinstance(known, nx.Graph):
        names = {n for n, d in check_circuit(known).nodes(data=True) if d["kind"] in kinds}
    else:
        names = set(known)
    _must_know(names, components, scores)
    inside = np.array([c in names for c in components])
    return abs(_flat(total)), inside, kinds


def _edge_labels(scores: EdgeScores, known: nx.MultiDiGraph) -> Labels:
    table = scores.by_position
    edges = {(d["pos"], u, d["reader"]) for u, _, _, d in real_edges(check_circuit(known))}
    exists = scores.layout.exists.expand(table.shape)
    # circuits know positions, but no spans: those have names that match none
    places = scores.places or scores.positions
    names = [
        (places[p], scores.writers[w], scores.readers[r]) for p, w, r in exists.nonzero().tolist()
    ]
    _must_know(edges, names, scores)
    inside = np.array([name in edges for name in names])
    return abs(_flat(table[exists])), inside, ["edge"] * len(names)


def _must_know(wanted: Collection[object], names: Sequence[object], scores: Scores) -> None:
    unknown = sorted(map(str, set(wanted) - set(names)))
    if unknown:
        raise ValueError(
            f"all of the known circuit must be among the scores; {unknown[0]} is not one of "
            f"{scores.model!r} at {scores.level} level ({len(unknown)} in all); check the names, "
            "or `positions` of the scores"
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
