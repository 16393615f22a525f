"""How well scores find a known circuit: published heads, or the edges of a planted one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from circuits.graph import check_circuit, real_edges
from circuits.judge.agreement import several
from circuits.judge.areas import areas
from relp import Component, EdgeScores, Scores

__all__ = ["auroc"]

ARROW = "->"
"""Between writer and reader in the name of an edge."""


def auroc(
    scores: Scores | Sequence[Scores], known: nx.MultiDiGraph | Collection[str]
) -> pd.DataFrame:
    """How well |score| tells a known circuit from the rest: areas under two curves, by kind.

    >>> auroc(scores, ["L1H1", "L1H3", "L1H7"])
    >>> auroc(edges, ["embed->L1H3.v", "L1H3->logits.in"])

    `auroc` is the area under the ROC curve: 1 if all that is in the circuit has larger scores than
    all that is not, 0.5 by chance. `average_precision` is the area under precision by recall: the
    mean over the circuit of how much of what scores as high is in it, by chance about the circuit's
    share of all; where circuits are small it sees what the first does not. Ties count half in the
    first and all in the second, and effects within their `resolution` are ties at 0. Columns:
    `rules`, `kind`, `auroc`, `average_precision`, `known` (how many are in the circuit), `others`.
    Kinds of which the circuit holds nothing or everything are left out: there is nothing to tell.

    Names of components are looked for among node scores summed over positions, or among writers
    with their edge scores summed; kinds are those of components. A graph, or names of edges as
    `writer->reader`, are compared edge by edge with edge scores (kind `edge`); a graph is compared
    as the names of its nodes with node scores. Source of the measure: Conmy et al. 2023,
    arXiv:2304.14997.

    Raises:
        ValueError: a component or edge of the circuit is not one of the scores, or scores are NaN,
            as effects are that were not measured.
        TypeError: the graph is no circuit.
    """
    rows = []
    for s in (s.resolved() for s in several(scores)):
        found = _labels(s, known)
        if unknown := int(np.isnan(found.score).sum()):
            raise ValueError(
                f"all scores must be numbers to be ranked; {unknown} of {s.rules!r} are NaN, or "
                "not measured; compute them again, or measure all with patch"
            )
        for kind in dict.fromkeys(found.kinds):
            at = np.array([k == kind for k in found.kinds])
            size, inside = abs(found.score[at]), found.inside[at]
            if inside.any() and not inside.all():
                many = int(inside.sum()), int((~inside).sum())
                rows.append((s.rules, kind, *areas(size, inside), *many))
    columns = ["rules", "kind", "auroc", "average_precision", "known", "others"]
    return pd.DataFrame(rows, columns=columns)


class Labels(NamedTuple):
    """What is ranked: components or edges."""

    score: Float[np.ndarray, " item"]
    inside: Bool[np.ndarray, " item"]
    """Whether it is in the known circuit."""
    kinds: list[str]


def _labels(scores: Scores, known: nx.MultiDiGraph | Collection[str]) -> Labels:
    named_edges = not isinstance(known, nx.Graph) and any(ARROW in name for name in known)
    if isinstance(scores, EdgeScores) and (named_edges or isinstance(known, nx.Graph)):
        return edge_labels(scores, known)
    return _component_labels(scores, known)


def _component_labels(scores: Scores, known: nx.MultiDiGraph | Collection[str]) -> Labels:
    components, total = scores.by_component()
    kinds = [Component.parse(c).kind for c in components]
    if isinstance(known, nx.Graph):
        names = {n for n, d in check_circuit(known).nodes(data=True) if d["kind"] in kinds}
    else:
        names = set(known)
    _must_know(names, components, scores)
    inside = np.array([c in names for c in components])
    return Labels(total.flatten().double().cpu().numpy(), inside, kinds)


def edge_labels(scores: EdgeScores, known: nx.MultiDiGraph | Collection[str]) -> Labels:
    """The edges of one set beside the known ones: a graph, or names `writer->reader`.

    Raises:
        ValueError: one of the known edges is not one of the scores.
        TypeError: the graph is no circuit.
    """
    table = scores.by_position
    # circuits know positions, but no spans: those have names that match none
    places = scores.places or scores.positions
    if isinstance(known, nx.Graph):
        edges = {(d["pos"], u, d["reader"]) for u, _, _, d in real_edges(check_circuit(known))}
    else:
        edges = {(place, *name.split(ARROW, 1)) for name in known for place in places}
    exists = scores.layout.exists.expand(table.shape)
    names = [
        (places[p], scores.writers[w], scores.readers[r]) for p, w, r in exists.nonzero().tolist()
    ]
    _must_know(edges, names, scores)
    inside = np.array([name in edges for name in names])
    score = table[exists].double().cpu().numpy()
    return Labels(score, inside, ["edge"] * len(names))


def _must_know(wanted: Collection[object], names: Sequence[object], scores: Scores) -> None:
    unknown = sorted(map(str, set(wanted) - set(names)))
    if unknown:
        raise ValueError(
            f"all of the known circuit must be among the scores; {unknown[0]} is not one of "
            f"{scores.model!r} at {scores.level} level ({len(unknown)} in all); check the names, "
            "or `positions` of the scores"
        )
