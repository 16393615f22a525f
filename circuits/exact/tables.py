"""Effects of cells in the tables of scores: NaN where a cell was not measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from circuits.exact.cells import Cell
from circuits.exact.sweep import Sweep
from relp import EdgeEffects, NodeEffects, Provenance, TaskLike
from relp.bridge import Sites, pairs_of

__all__ = ["edge_effects", "node_effects"]


def node_effects(
    sites: Sites,
    task: TaskLike,
    source: Provenance,
    sweep: Sweep,
    components: Sequence[str],
    *,
    by_position: bool,
) -> NodeEffects:
    """Effects `[pair, component, pos]`; of all positions at once, the last axis has length 1."""
    width = int(task.lengths.max()) if by_position else 1
    row = {name: i for i, name in enumerate(components)}
    table = sweep.effects.new_full((len(task), len(row) * width), torch.nan)
    table[:, [row[c.component] * width + _place(c) for c in sweep.cells]] = sweep.effects
    found = NodeEffects(
        provenance=source,
        pairs=pairs_of(sites, task, {"clean": sweep.clean, "corrupt": sweep.corrupt}),
        resolution=float(sweep.resolution.mean()),
        components=tuple(components),
        nodes=table.unflatten(1, (len(row), width)),
    )
    return found if by_position else found.together()


def edge_effects(
    sites: Sites, task: TaskLike, source: Provenance, sweep: Sweep, *, by_position: bool
) -> EdgeEffects:
    """Effects `[pos, writer, reader]`, mean over pairs; of all positions at once, without `pos`.

    0 where there is no edge.
    """
    layout = sites.layout
    width = int(task.lengths.max()) if by_position else 1
    table = torch.where(layout.exists, torch.nan, 0.0).repeat(width, 1, 1)
    places = [(_place(c), layout.row[c.component], layout.column[c.reader]) for c in sweep.cells]
    table[tuple(torch.tensor(places).T)] = sweep.effects.mean(0)
    return EdgeEffects(
        provenance=source,
        pairs=pairs_of(sites, task, {"clean": sweep.clean, "corrupt": sweep.corrupt}),
        resolution=float(sweep.resolution.mean()),
        layout=layout,
        edges=table if by_position else table[0],
    )


def _place(cell: Cell) -> int:
    """Where a cell's position is; all of them are in the first place."""
    return max(cell.pos, 0)
