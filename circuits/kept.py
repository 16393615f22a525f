"""Graphs as circuits that can be run: which writers each reader hears, at each place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph import check_circuit, real_edges
from circuits.masked import Kept
from relp import Layout, ModelLike, TaskLike
from relp.bridge import Place, Sites, span_places

__all__ = [
    "Edges",
    "circuit_edges",
    "circuit_masks",
    "circuit_sites",
    "cut",
    "kept_by_span",
]


def circuit_sites(model: ModelLike, circuits: nx.MultiDiGraph | Sequence[nx.MultiDiGraph]) -> Sites:
    """The sites of a model with the neurons split off that are so in the (first of the) circuits.

    Raises:
        TypeError, ValueError: it is no circuit, or one of another model.
    """
    sites = Sites.of(model)
    graphs = _listed(circuits)
    return sites.splitting(check_circuit(graphs[0]).graph["neurons"].split()) if graphs else sites


@dataclass(frozen=True, eq=False)
class Edges:
    """The edges of a circuit, by the place of each in a table of scores: a `Kept`."""

    layout: Layout
    positions: int
    """How many positions or spans the circuit has; 1 where all are alike."""
    pos: Int[Tensor, " edge"]
    writer: Int[Tensor, " edge"]
    reader: Int[Tensor, " edge"]
    """Ascending."""
    rest: bool = False
    """The circuit is what these leave over of the model."""

    def __call__(self, place: Place) -> Bool[Tensor, "pos heard column"]:
        """Those into the readers of one place."""
        start, stop = place.columns.start, place.columns.stop
        ends = torch.searchsorted(self.reader, torch.tensor([start, stop])).tolist()
        pos, writer, reader = (t[slice(*ends)] for t in (self.pos, self.writer, self.reader))
        found = torch.zeros(self.positions, place.heard.stop, stop - start, dtype=torch.bool)
        found[pos, writer, reader - start] = True
        return ~found if self.rest else found  # all that is heard at a place are edges

    @property
    def mask(self) -> Bool[Tensor, "pos writer reader"]:
        """All edges at once."""
        found = torch.zeros(self.positions, *self.layout.exists.shape, dtype=torch.bool)
        found[self.pos, self.writer, self.reader] = True
        return self.layout.exists & ~found if self.rest else found


def cut(circuit: Kept, edge: tuple[int, int, int]) -> Kept:
    """A circuit without one edge: its position (or span), writer and reader."""
    pos, writer, reader = edge

    def without(place: Place) -> Bool[Tensor, "pos heard column"]:
        found = circuit(place).clone()
        if place.columns.start <= reader < place.columns.stop:
            found[pos, writer, reader - place.columns.start] = False
        return found

    return without


def circuit_edges(
    sites: Sites, task: TaskLike, circuits: nx.MultiDiGraph | Sequence[nx.MultiDiGraph]
) -> list[Edges]:
    """The edges of each circuit, by span (`kept_by_span`) those of the task's spans.

    Raises:
        TypeError, ValueError: there is no circuit, one is not of this model, one has other neurons
            split off, one is by position and the task's prompts have several lengths, or one is by
            span and the task has other spans, or others are by position.
    """
    graphs = _listed(circuits)
    if not graphs:
        raise ValueError("`circuit` must be a graph or several; got none; pass at least one")
    for graph in graphs:
        apart = set(check_circuit(graph).graph["neurons"].split()) ^ set(sites.neurons)
        if apart:
            raise ValueError(
                "circuits that are evaluated together must have the same neurons split off; "
                f"{min(apart)} is so in some only; give `neurons` to attribute, the same for all"
            )
    length = _places(task, graphs)
    layout = sites.layout
    exists = layout.exists.tolist()
    listed = []
    for graph in graphs:
        positions = length if graph.graph["positions"] else 1
        found = []
        for u, _, _, data in real_edges(graph):
            pos, reader = data["pos"], layout.column.get(data["reader"])
            writer = layout.row.get(u)
            if writer is None or reader is None or pos >= length or not exists[writer][reader]:
                raise ValueError(
                    f"every edge of the circuit must be one of the model's; {u!r} -> "
                    f"{data['reader']!r} is not one of {sites.model_name!r}; evaluate the circuit "
                    "on the model and the prompts it was found with, and one of features with "
                    "evaluate_features"
                )
            found.append((reader, max(pos, 0), writer))
        reader, pos, writer = torch.tensor(sorted(found), dtype=torch.long).view(-1, 3).T
        listed.append(Edges(layout, positions, pos, writer, reader.contiguous()))
    return listed


def circuit_masks(
    sites: Sites, task: TaskLike, circuits: nx.MultiDiGraph | Sequence[nx.MultiDiGraph]
) -> Bool[Tensor, "circuit pos writer reader"]:
    """`circuit_edges` as one table each; the position axis has length 1 where all are alike."""
    masks = [edges.mask for edges in circuit_edges(sites, task, circuits)]
    length = max(map(len, masks))
    return torch.stack([mask.expand(length, -1, -1) for mask in masks])


def _listed(circuits: object) -> list[nx.MultiDiGraph]:
    if isinstance(circuits, nx.Graph):
        return [circuits]
    if not isinstance(circuits, Iterable) or isinstance(circuits, str):
        raise TypeError(
            f"`circuit` must be a graph or a sequence of graphs; got {type(circuits).__name__}; "
            "choose one with circuits.top(scores, edges=100)"
        )
    return list(circuits)


def kept_by_span(circuits: nx.MultiDiGraph | Sequence[nx.MultiDiGraph]) -> bool:
    """Whether a circuit, or one of several, has edges by span."""
    return any(graph.graph["by_span"] for graph in _listed(circuits))


def _places(task: TaskLike, graphs: Sequence[nx.MultiDiGraph]) -> int:
    """How many positions or spans the masks of circuits have."""
    apart = [g for g in graphs if g.graph["positions"]]
    if not apart:
        return 1
    if any(g.graph["by_span"] for g in apart):
        spans = [*span_places(task.spans)]
        for graph in apart:
            if not graph.graph["by_span"] or json.loads(graph.graph["places"]) != spans:
                raise ValueError(
                    "circuits by span need a task with the same spans, and others that are so too; "
                    f"the task has {spans}, a circuit {graph.graph['places']}; use the task that "
                    "the scores were computed on, or one of its kind"
                )
        return len(spans)
    length = int(task.lengths.max())
    if int(task.lengths.min()) < length:
        raise ValueError(
            "a circuit by position needs prompts of one length; the task has lengths "
            f"{sorted(set(task.lengths.tolist()))}; use a task of one length, or edges by span "
            "(positions='spans')"
        )
    return length
