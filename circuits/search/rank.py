"""The ranking of edges that every choice of a circuit shares, on tables instead of graphs.

An entry of a table is an edge: a row is a writer, a column what one reader reads, at one position
where edges are kept by position. Rows and columns stand in the order of their names, so that ties,
which go to the earlier entry, are broken by the name of the edge: (u, v, key).
"""

from __future__ import annotations

import heapq
import operator
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import networkx as nx
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from circuits.graph import (
    assemble,
    check_circuit,
    check_edges,
    edge_key,
    edge_table,
    keep,
    real_edges,
)
from relp import Direction, EdgeScores, Scores

__all__ = ["Table", "edge_ranks", "placed", "ranked", "worth"]

NEVER = 2**62
"""The rank of what is not there."""

Mask = Bool[Tensor, "row column"]
Rank = Int[Tensor, "row column"]


def worth(scores: Tensor, direction: str, *, signed: bool) -> Tensor:
    """What scores are ranked by: |score|, or how much it helps the clean behaviour."""
    return scores * Direction(direction).sign if signed else scores.abs()


def ranked(worth: Float[Tensor, "*table"], exists: Bool[Tensor, "*table"]) -> Int[Tensor, "*table"]:
    """The rank of each edge, 1 for the one of largest worth; ties go to the earlier entry."""
    return placed(worth[exists].argsort(descending=True, stable=True), exists)


def placed(order: Int[Tensor, " edge"], exists: Bool[Tensor, "*table"]) -> Int[Tensor, "*table"]:
    """The rank of each edge; `order`: the numbers of the existing ones, the best first."""
    rank = torch.full_like(exists, NEVER, dtype=torch.long)
    place = rank[exists]
    place[order] = torch.arange(1, len(order) + 1, device=place.device)
    rank[exists] = place
    return rank


def edge_ranks(scores: EdgeScores, *, signed: bool) -> Int[Tensor, "pos writer reader"]:
    """The rank of each edge of scores, with ties as in every choice of a circuit."""
    table, order = edge_table(scores), _ByName.of(scores)
    exists = order.turned(scores.layout.exists.expand(table.shape))
    worths = worth(order.turned(table), scores.direction, signed=signed)
    return order.back(ranked(worths, exists))


@dataclass(frozen=True)
class _ByName:
    """The order of the names of edges: of writers, and of what each reader reads where."""

    keys: list[tuple[str, str]]
    """The node that each column leads to, and the edge's key."""
    rows: list[int]
    columns: list[int]
    places: int

    @classmethod
    def of(cls, scores: EdgeScores) -> _ByName:
        """The order for a table of scores."""
        layout, places = scores.layout, scores.places or scores.positions
        keys = [(owner.name, edge_key(slot, p)) for owner, slot in layout.targets for p in places]
        rows = sorted(range(len(layout.writers)), key=layout.writers.__getitem__)
        return cls(keys, rows, sorted(range(len(keys)), key=keys.__getitem__), len(places))

    def turned(self, table: Shaped[Tensor, "pos writer reader"]) -> Shaped[Tensor, "row column"]:
        """A table in that order."""
        return table.permute(1, 2, 0).flatten(1)[self.rows][:, self.columns]

    def back(self, table: Shaped[Tensor, "row column"]) -> Shaped[Tensor, "pos writer reader"]:
        """What `turned` was given."""
        old = table[np.argsort(self.rows).tolist()][:, np.argsort(self.columns).tolist()]
        return old.unflatten(1, (-1, self.places)).permute(2, 0, 1)


@dataclass(frozen=True, eq=False)
class Table:
    """The edges that are chosen from."""

    writers: list[str]
    """The node of each row."""
    targets: list[str]
    """The node that each column leads to."""
    structural: list[tuple[str, str]]
    """The structural edges, which are always there."""
    scores: Float[Tensor, "row column"]
    exists: Mask
    direction: str
    total: int
    """Edges of the full graph."""
    circuit: Callable[[Mask], nx.MultiDiGraph]
    """The graph of some of these edges."""

    @classmethod
    def of(cls, source: object) -> Table:
        """The edges of a graph, or all that edge scores are of.

        Raises:
            TypeError, ValueError: as `check_circuit` or `assemble`.
        """
        if isinstance(source, Scores):
            return cls._of_scores(check_edges(source))
        return cls._of_graph(check_circuit(source))

    @classmethod
    def _of_scores(cls, scores: EdgeScores) -> Table:
        table, layout = edge_table(scores), scores.layout
        exists, order = layout.exists.expand(table.shape), _ByName.of(scores)
        return cls(
            [layout.writers[row] for row in order.rows],
            [order.keys[column][0] for column in order.columns],
            [(u, v) for u, heads in layout.serves.items() for v in heads],
            order.turned(table),
            order.turned(exists),
            scores.direction,
            int(exists.sum()),
            lambda kept: assemble(scores, order.back(kept)),
        )

    @classmethod
    def _of_graph(cls, graph: nx.MultiDiGraph) -> Table:
        edges = [(u, (v, key), d["score"]) for u, v, key, d in real_edges(graph)]
        writers, columns = sorted({u for u, _, _ in edges}), sorted({key for _, key, _ in edges})
        row, column = ({name: i for i, name in enumerate(names)} for names in (writers, columns))
        at = [row[u] for u, _, _ in edges], [column[key] for _, key, _ in edges]
        exists = torch.zeros(len(writers), len(columns), dtype=torch.bool, device="cpu")
        scores = exists.double()
        exists[at] = True
        scores[at] = scores.new_tensor([score for *_, score in edges])

        def circuit(kept: Mask) -> nx.MultiDiGraph:
            return keep(graph, ((writers[r], *columns[c]) for r, c in kept.nonzero().tolist()))

        return cls(
            writers,
            [v for v, _ in columns],
            [(u, v) for u, v, data in graph.edges(data=True) if data["structural"]],
            scores,
            exists,
            graph.graph["direction"],
            graph.graph["total_edges"],
            circuit,
        )

    def ranks(self, *, signed: bool) -> Rank:
        """The edges by |score|, or if `signed` by how much they help the clean behaviour."""
        return ranked(worth(self.scores, self.direction, signed=signed), self.exists)

    def greedy(self, rank: Rank) -> Rank:
        """The order in which edges are reached from `logits`, always the best one next."""
        order = rank[self.exists].argsort()
        sources = [self.writers[row] for row in self.exists.nonzero()[order, 0].tolist()]
        into, through = defaultdict(list), defaultdict(list)
        for column, node in enumerate(self.targets):
            into[node].append(column)
        for source, head in self.structural:
            through[head].append(source)
        taken: list[int] = []
        reached: set[str] = set()
        queue: list[int] = []

        def reach(node: str) -> None:
            if node in reached:
                return
            reached.add(node)
            for place in rank[:, into[node]][self.exists[:, into[node]]].tolist():
                heapq.heappush(queue, place)
            for source in through[node]:
                reach(source)  # a query head reads through its key/value head

        reach("logits")
        while queue:
            place = heapq.heappop(queue)
            taken.append(place - 1)
            reach(sources[place - 1])
        return placed(order[taken], self.exists)

    def first(self, rank: Rank, edges: int, *, connected: bool) -> nx.MultiDiGraph:
        """The first edges of a ranking, or with `connected` the longest start whose `edges` count.

        Raises:
            TypeError: `edges` is no whole number.
            ValueError: `edges` is negative.
        """
        edges = operator.index(edges)
        if edges < 0:
            raise ValueError(
                f"`edges` must be 0 or more; got {edges}; the full graph has {self.total}"
            )
        if not connected:
            return self.circuit(rank <= min(edges, NEVER - 1))
        # The edges that are connected among the best n grow with n. So each edge has one n at which
        # it appears, and the circuit is what appears before the first edge that is too many.
        appears = self.appearance(rank)
        counted = appears[appears < NEVER].sort().values
        limit = int(counted[edges]) if edges < len(counted) else NEVER
        return self.circuit(appears < limit)

    def connected(self, kept: Mask) -> Mask:
        """Those that lie on a path from `embed` to `logits` within `kept`."""
        return self.appearance(torch.where(kept, 0, NEVER)) < NEVER

    def appearance(self, rank: Rank) -> Rank:
        """The least n for which an edge is on a path embed -> logits made of edges ranked <= n."""
        ends = [end for edge in self.structural for end in edge]
        nodes = dict.fromkeys(["embed", "logits", *self.writers, *self.targets, *ends])
        number = {name: i for i, name in enumerate(nodes)}
        rows, columns = (
            rank.new_tensor([number[name] for name in names])
            for names in (self.writers, self.targets)
        )
        into = rank.new_full((len(rows), len(number)), NEVER)
        least = rank.new_full((len(number), len(number)), NEVER)
        least[rows] = into.scatter_reduce(1, columns.expand(rank.shape), rank, "amin")
        for source, head in self.structural:
            least[number[source], number[head]] = 0
        reached = _least_worst(least, number["embed"])[rows]
        leads = _least_worst(least.T, number["logits"])[columns]
        return torch.maximum(rank, torch.maximum(reached[:, None], leads))


def _least_worst(least: Int[Tensor, "node other"], start: int) -> Int[Tensor, " node"]:
    """For each node: the worst rank on the best way to it from `start` (Dijkstra)."""
    best, steps = np.full(len(least), NEVER), np.ascontiguousarray(least.numpy())
    best[start] = 0
    left = np.ones(len(best), dtype=bool)
    while len(at := (left & (best < NEVER)).nonzero()[0]):
        node = at[best[at].argmin()]
        left[node] = False
        np.minimum(best, np.maximum(steps[node], best[node]), out=best)
    return torch.from_numpy(best)
