"""How well a circuit does the task alone, and the rest without it, and what each edge adds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import networkx as nx
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from circuits.graph import real_edges
from circuits.kept import circuit_edges, circuit_sites, cut, kept_by_span
from circuits.masked import Kept, Runs, circuit_metrics, endpoints
from relp import ModelLike, TaskLike
from relp.bridge import Sites, undisturbed

__all__ = ["completeness", "faithfulness", "minimality"]


@overload
def faithfulness(
    model: ModelLike, task: TaskLike, circuit: nx.MultiDiGraph, *, progress: bool = ...
) -> float: ...


@overload
def faithfulness(  # type: ignore[overload-cannot-match]  # networkx has no types
    model: ModelLike, task: TaskLike, circuit: Sequence[nx.MultiDiGraph], *, progress: bool = ...
) -> list[float]: ...


@undisturbed
def faithfulness(
    model: ModelLike,
    task: TaskLike,
    circuit: nx.MultiDiGraph | Sequence[nx.MultiDiGraph],
    *,
    progress: bool = True,
) -> float | list[float]:
    """Share of the clean-corrupt gap that the circuit recovers: (m(C) - m(∅)) / (m(full) - m(∅)).

    >>> faithfulness(model, task, circuit)
    0.98...
    >>> faithfulness(model, task, [top(edges, edges=n) for n in (50, 100)])
    [0.93..., 0.97...]

    1 for all edges, 0 for none; may exceed 1 or be negative. `m` is the task's metric averaged
    over pairs. Edges by span are cut in each pair where it has its spans. Source: Hanna et al.
    2024, arXiv:2403.17806; MIB, arXiv:2504.13151.

    Args:
        model: the `TransformerBridge` that the circuit is about. It is the same afterwards.
        task: a `tasks.Task`.
        circuit: one graph, or a sequence of graphs that are evaluated together.
        progress: show a bar if there are several circuits.

    Returns:
        A float, or a list of floats for a sequence.

    Warns:
        UserWarning: the model cannot do the task, so that the share is one of noise: the mean gap
            is below two standard errors over pairs, whose gaps have both signs; or, with a metric
            that compares answer and foil, the gap is negative, or the clean prompts favour the
            foil on average or on more than a quarter of the pairs.

    Raises:
        ValueError: an edge of the circuit is not one of the model, the metric has no gap between
            clean and corrupt prompts, a circuit by position is asked of prompts of several lengths,
            or one by span of a task with other spans, or beside one by position.
        RuntimeError: all edges together do not give the clean run.
    """
    sites = circuit_sites(model, circuit)
    listed = circuit_edges(sites, task, circuit)
    shares = _shares(sites, task, listed, kept_by_span(circuit), progress).tolist()
    return shares[0] if isinstance(circuit, nx.Graph) else shares


@overload
def completeness(
    model: ModelLike, task: TaskLike, circuit: nx.MultiDiGraph, *, progress: bool = ...
) -> float: ...


@overload
def completeness(  # type: ignore[overload-cannot-match]  # networkx has no types
    model: ModelLike, task: TaskLike, circuit: Sequence[nx.MultiDiGraph], *, progress: bool = ...
) -> list[float]: ...


@undisturbed
def completeness(
    model: ModelLike,
    task: TaskLike,
    circuit: nx.MultiDiGraph | Sequence[nx.MultiDiGraph],
    *,
    progress: bool = True,
) -> float | list[float]:
    """What the rest of the model recovers without the circuit: the complement's faithfulness.

    >>> completeness(model, task, circuit)
    0.000...

    (m(M \\ C) - m(∅)) / (m(full) - m(∅)): near 0 if the circuit holds all that does the task, 1 if
    the rest does it as well. This is the completeness of Marks et al. 2024, arXiv:2403.19647, and
    the incompleteness score of Wang et al. 2022, arXiv:2211.00593, for the whole circuit knocked
    out (K = C). Arguments, return value, warnings and errors are those of `faithfulness`.
    """
    sites = circuit_sites(model, circuit)
    listed = [replace(edges, rest=True) for edges in circuit_edges(sites, task, circuit)]
    shares = _shares(sites, task, listed, kept_by_span(circuit), progress).tolist()
    return shares[0] if isinstance(circuit, nx.Graph) else shares


@undisturbed
def minimality(
    model: ModelLike, task: TaskLike, circuit: nx.MultiDiGraph, *, progress: bool = True
) -> pd.DataFrame:
    """What each edge contributes to its circuit: faithfulness lost when that edge alone is cut.

    >>> minimality(model, task, top(edges, edges=20))

    One row per edge, the largest contribution first: `writer`, `reader`, `pos` (-1 for all; the
    name as `span` where edges are kept by span), `score` and `contribution` = f(C) - f(C without
    the edge), a share of the clean-corrupt gap.
    An edge near 0 could go; a negative one works against the rest. This is the minimality score of
    Wang et al. 2022, arXiv:2211.00593, of single edges with nothing else knocked out (K = ∅).
    Costs one circuit evaluation per edge. Errors and warnings are those of `faithfulness`.
    """
    sites = circuit_sites(model, circuit)
    row, column = sites.layout.row, sites.layout.column
    (found,) = circuit_edges(sites, task, circuit)
    edges = [(u, d["reader"], d["pos"], d["score"]) for u, _, _, d in real_edges(circuit)]
    cuts = [(max(pos, 0), row[u], column[v]) for u, v, pos, _ in edges]
    listed: list[Kept] = [found, *(cut(found, edge) for edge in cuts)]
    whole, *without = _shares(sites, task, listed, kept_by_span(circuit), progress).tolist()
    table = pd.DataFrame(edges, columns=["writer", "reader", "pos", "score"])
    if kept_by_span(circuit):
        places = json.loads(circuit.graph["places"])
        table.insert(2, "span", [places[pos] for pos in table.pop("pos")])
    table["contribution"] = [whole - share for share in without]
    return table.sort_values("contribution", ascending=False, kind="stable", ignore_index=True)


def _shares(
    sites: Sites, task: TaskLike, circuits: Sequence[Kept], by_span: bool, progress: bool
) -> Float[Tensor, " circuit"]:
    runs: Runs = {}
    clean, corrupt = endpoints(sites, task, runs=runs)
    shown = progress and len(circuits) > 1
    found = circuit_metrics(sites, task, circuits, by_span=by_span, progress=shown, runs=runs)
    return (found.mean(1) - corrupt.mean()) / (clean.mean() - corrupt.mean())
