"""ACDC: the circuit by exact search, one edge at a time, that estimates are compared with.

Conmy et al. 2023, arXiv:2304.14997, algorithm 1. From `logits` back to `embed`, each reader's edges
are cut in turn, those of the latest writers first, and a cut stays if it costs less than `tau`.
Each verdict depends on all before it. But most cuts stay: so the next few are measured together,
each on top of the ones before it, and the verdicts up to the first edge that must be put back are
those of the published order, exactly (up to rounding); what was measured behind it is measured
again. Edges into a component that nothing hears any more cost nothing and are not measured. The
paper's edges within a component (a head's output and its q) do not exist here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import networkx as nx
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.choices import check_tau
from circuits.engines.local import Engine
from circuits.engines.masks import metrics_by
from circuits.graph import assemble, check_circuit, real_edges
from circuits.kept import circuit_masks, circuit_sites
from circuits.masked import circuit_metrics, endpoints
from relp import Direction, EdgeScores, ModelLike, TaskLike
from relp.bridge import Sites, pairs_of, provenance, undisturbed, warn_caller

__all__ = ["acdc"]

Edge = tuple[int, int]
"""A writer's row and a reader's column."""

NEXT = "acdc_next"
"""Graph attribute of an interrupted search: the first edge that it did not decide."""


@undisturbed
def acdc(
    model: ModelLike,
    task: TaskLike,
    *,
    tau: float,
    graph: nx.MultiDiGraph | None = None,
    engine: Engine | None = None,
    progress: bool = True,
) -> nx.MultiDiGraph:
    """The edges whose cut costs at least `tau` of the task's metric, after the cuts before it.

    >>> acdc(model, task, tau=0.2, graph=top(edges, edges=20))

    The run is the clean one, and a cut edge carries the corrupt run's value, as in `faithfulness`.
    The cost is the fall of the metric, averaged over pairs: edges that work against the task cost
    less than nothing and go. The paper's metric, the divergence from the model's own predictions,
    is `task.with_metric(KLDivergence.of(model, task))`.

    As published, the result is not pruned further: small cuts can take an edge's way back to
    `embed` after the edge was kept (`connect` drops it then). A search that is interrupted (Ctrl-C,
    Jupyter's stop button) warns and returns the circuit so far, which still has the edges that it
    did not come to; given that as `graph`, it goes on where it stopped.

    Args:
        model: the `TransformerBridge`. It is the same afterwards.
        task: a `tasks.Task`.
        tau: the least cost of an edge that stays, in units of the metric.
        graph: the circuit to search in, such as `top(assemble(edges), edges=2000)`, with neurons if
            it has some; all edges of the model if None.
        engine: who runs the circuits, such as a `circuits.engines.RayEngine`: each worker has some
            of the pairs, so that no more of them help than there are pairs. This process if None.
        progress: show a bar over edges.

    Returns:
        The circuit. An edge's score is what its cut did to the metric, -`tau` or less, in the
        direction `noise`; a node's is the sum over its outgoing edges in the circuit.

    Warns:
        UserWarning: the search was interrupted; or the model cannot do the task, as for
            `faithfulness`.

    Raises:
        TypeError: `graph` is no circuit, or `model` no TransformerBridge.
        ValueError: `tau` is not above 0, `graph` is by position or not of this model, or the
            metric has no gap between clean and corrupt prompts. With an engine also what that
            refuses.
    """
    check_tau(tau)
    if graph is not None and check_circuit(graph).graph["positions"]:
        raise ValueError(
            "`graph` must have edges that are summed over positions; these are by position; use "
            "attribute(level='edge') without positions=True"
        )
    sites = Sites.of(model) if graph is None else circuit_sites(model, graph)
    clean, corrupt = endpoints(sites, task)
    mask = sites.layout.exists if graph is None else circuit_masks(sites, task, graph)[0, 0]
    order = _order(sites, mask)
    state = _State(0, mask, torch.zeros(mask.shape))
    if graph is not None and NEXT in graph.graph:
        state = _resumed(sites, mask, graph)
    with (
        metrics_by(engine, circuit_metrics, sites, task) as metrics,
        tqdm(total=len(order), desc="ACDC", unit="edge", disable=not progress, leave=False) as bar,
    ):
        try:
            search = _search(metrics, _heard(sites), tau, order, state)
            for state in search:
                bar.update(state.at - bar.n)
        except KeyboardInterrupt:
            warn_caller(
                f"interrupted: the search decided {state.at} of {len(order)} edges, and the "
                "circuit returned has all others; give it as `graph` to go on"
            )
    writers, readers = sites.layout.writers, sites.layout.readers
    found = EdgeScores(
        provenance=provenance(sites, task, Direction.NOISE, f"ACDC tau={tau:g}"),
        pairs=pairs_of(sites, task, {"clean": clean, "corrupt": corrupt}),
        layout=sites.layout,
        edges=state.changes * state.mask,
    )
    circuit = assemble(found, state.mask)
    if state.at < len(order):
        writer, reader = order[state.at]
        circuit.graph[NEXT] = f"{writers[writer]} {readers[reader]}"
    return circuit


@dataclass(frozen=True, eq=False)
class _State:
    """How far a search is."""

    at: int
    """The place in its order of the first edge that is not decided."""
    mask: Bool[Tensor, "writer reader"]
    """The circuit so far."""
    changes: Float[Tensor, "writer reader"]
    """What each cut did to the metric."""


def _resumed(sites: Sites, mask: Bool[Tensor, "writer reader"], graph: nx.MultiDiGraph) -> _State:
    """Where the search was interrupted that gave `graph`."""
    layout = sites.layout
    changes = torch.zeros(mask.shape)
    for u, _, _, data in real_edges(graph):
        changes[layout.row[u], layout.column[data["reader"]]] = data["score"]
    writer, reader = graph.graph[NEXT].split()
    whole = _order(sites, layout.exists)
    decided = whole[: whole.index((layout.row[writer], layout.column[reader]))]
    return _State(sum(bool(mask[edge]) for edge in decided), mask, changes)


def _order(sites: Sites, mask: Bool[Tensor, "writer reader"]) -> list[Edge]:
    """The edges from `logits` back to `embed`: last reader first, and for each last writer first.

    Of a layer the MLP comes before the heads, and those are taken from the last to the first, each
    by q, k, v, as the authors' code does; key/value heads come after the query heads.
    """
    targets = sites.layout.targets

    def place(reader: int) -> tuple[float, bool, bool, int, int]:
        owner, slot = targets[reader]
        layer = math.inf if owner.kind == "logits" else float(owner.layer)
        first = owner.kind in ("mlp", "neuron")
        return -layer, not first, owner.kind == "kv", -owner.head, "qkv".find(slot)

    return [
        (writer, reader)
        for reader in sorted(range(len(targets)), key=place)
        for writer in reversed(mask[:, reader].nonzero().flatten().tolist())
    ]


def _search(
    metrics: Callable[[Tensor], Tensor],
    heard: dict[int, list[int]],
    tau: float,
    order: list[Edge],
    state: _State,
) -> Iterator[_State]:
    """Decides the edges of `order` from `state` on, a few at a time."""

    def means(masks: list[Tensor]) -> list[float]:
        found: list[float] = metrics(torch.stack(masks)[:, None]).double().mean(1).tolist()
        return found

    (now,) = means([state.mask])
    verdicts, refused = 1, 0
    while state.at < len(order):
        # Cuts behind a refused one are measured in vain, and a call costs about two cuts by itself:
        # with a share p refused, 2 / sqrt(p) cuts together cost least.
        together = max(2, math.isqrt(4 * verdicts // (1 + refused)))
        # the next cuts, each on top of the ones before it
        cuts: list[int] = []
        masks: list[Tensor] = []
        at, mask = state.at, state.mask.clone()
        while at < len(order) and len(cuts) < together:
            writer, reader = order[at]
            mask[writer, reader] = False
            if reader not in heard or mask[heard[reader]].any():
                cuts.append(at)
                masks.append(mask.clone())
            at += 1
        changes = state.changes.clone()
        for cut, after, value in zip(cuts, masks, means(masks) if masks else [], strict=True):
            changes[order[cut]] = value - now
            verdicts += 1
            if now - value >= tau:  # put it back; what was measured behind it does not hold
                at, mask = cut + 1, after
                mask[order[cut]] = True
                refused += 1
                break
            now = value
        state = _State(at, mask, changes)
        yield state


def _heard(sites: Sites) -> dict[int, list[int]]:
    """For each reader the writers through which it is heard; `logits.in` always is."""
    layout = sites.layout
    return {
        column: [layout.row[name] for name in layout.serves.get(owner.name, (owner.name,))]
        for column, (owner, _) in enumerate(layout.targets)
        if owner.kind != "logits"
    }
