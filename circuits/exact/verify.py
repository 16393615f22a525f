"""`verify`: exact effects within a budget, of the strongest-scored and a sample of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.engines.local import Engine
from circuits.exact.cells import EVERYWHERE, Cell
from circuits.exact.runs import Runs
from circuits.exact.sample import CERTAIN, LEAST, Sample, drawn
from circuits.exact.shards import shard_title, sharded
from circuits.exact.tables import edge_effects, node_effects
from relp import (
    Component,
    EdgeEffects,
    EdgeScores,
    ModelLike,
    NodeEffects,
    NodeScores,
    Provenance,
    Scores,
    TaskLike,
)
from relp.bridge import Sites, provenance, undisturbed

__all__ = ["BUDGET", "verify"]

BUDGET = 600


@undisturbed
def verify(
    model: ModelLike,
    task: TaskLike,
    scores: Scores | Sequence[Scores],
    *,
    budget: int = BUDGET,
    seed: int = 0,
    resume: str | Path | None = None,
    batch_size: int | None = None,
    engine: Engine | None = None,
    shard: str | None = None,
    progress: bool = True,
) -> NodeEffects | EdgeEffects:
    """Measures what `patch` would, but only of `budget` cells: enough to judge scores by.

    >>> effect = verify(model, task, scores, budget=100, progress=False)
    >>> agreement(scores, effect)           # cells that were drawn stand for others like them
    >>> missed(effect)                      # how many large ones may be among the others

    Each kind of component, or slot of a reader, gets an equal share of the budget (what a small
    kind leaves goes to the others). Half of it is spent on the cells with the largest |score|, mean
    over pairs; of several sets of scores, on those that any of them ranks highest, so that all are
    judged by the same effects and none chose them alone. The other half is drawn at random from the
    rest, in up to eight strata of like rank, all with about the same chance. What changes nothing
    (before the first token that differs) has no effect; that is known for nothing.

    Args:
        model: the `TransformerBridge` that the scores are of. It is the same afterwards.
        task: the task that the scores are of.
        scores: of nodes or edges, by position or not, or several of one form. They say also the
            direction, the components and the neurons.
        budget: cells to measure, each on every pair; at least four of each kind.
        seed: what the rest is drawn with.
        resume: as for `patch`; also `batch_size`, `engine`, `shard` and `progress`. Shards are of
            what was drawn.

    Returns:
        Effects as `patch` gives them, NaN where a cell was not measured, with `strata` and
        `sampling_weights` (how many cells of its stratum each stands for). All of them, without
        strata, if the budget is enough: then they are the numbers that `patch` gives.

    Raises:
        ValueError: scores are of another model, task, metric or direction than the rest, by span,
            or NaN; `budget` is too small; or as for `patch`.
        RuntimeError: as for `patch`.
    """
    many = [scores] if isinstance(scores, Scores) else list(scores)
    _must_be_alike(many)
    sites = Sites.of(model).splitting(_neurons(many[0]))
    runs = Runs(model, task, str(many[0].direction), neurons=sites.neurons)
    _must_belong(many, provenance(sites, task, many[0].direction, "exact"), runs)
    table = _Table.of(many)
    sample = table.sample(runs, budget, seed)
    cells = [table.cell(i) for i in np.flatnonzero(sample.measured).tolist()]
    sweep = runs.measure(sharded(cells, shard, len(sites.blocks)), resume=resume,
                         batch_size=batch_size, engine=engine, progress=progress)  # fmt: skip
    source = provenance(sites, task, many[0].direction, shard_title(sample.title, shard))
    found: NodeEffects | EdgeEffects
    if isinstance(many[0], NodeScores):
        found = node_effects(sites, task, source, sweep, many[0].components,
                             by_position=table.by_position)  # fmt: skip
    else:
        found = edge_effects(sites, task, source, sweep, by_position=table.by_position)
    if sample.measured.all():
        return found
    return replace(found, strata=table.spread(sample.stratum))


@dataclass(frozen=True, eq=False)
class _Table:
    """The cells of a table of scores, and how strong the scores of each are."""

    writers: tuple[str, ...]
    """Whose values are replaced."""
    readers: tuple[str, ...]
    """Who hears of it; empty for nodes."""
    kinds: tuple[str, ...]
    """Of the components, or the slots of the readers."""
    by_position: bool
    shape: torch.Size
    """Of the table, without pairs."""
    index: Int[np.ndarray, "cell axis"]
    """Where each cell is: component and position, or (position,) writer and reader."""
    strength: Float[np.ndarray, "scores cell"]

    @classmethod
    def of(cls, many: Sequence[Scores]) -> _Table:
        """What can be measured of several scores of one form."""
        one = many[0]
        if isinstance(one, EdgeScores):
            layout, shape, readers = one.layout, one.edges.shape, one.readers
            by_position, there = one.edges.dim() == 3, layout.exists.expand(shape)
            names, kinds = layout.writers, tuple(slot for _, slot in layout.targets)
        else:
            assert isinstance(one, NodeScores)
            shape, by_position, readers = one.nodes.shape[1:], not one.is_together, ()
            there, names = torch.ones(shape, dtype=torch.bool), one.components
            kinds = tuple(Component.parse(name).kind for name in names)
        strength = np.stack([_strength(s)[there].double().cpu().numpy() for s in many])
        index = there.nonzero().numpy()
        return cls(names, readers, kinds, by_position, shape, index, strength)

    def cell(self, number: int) -> Cell:
        """What to change."""
        at = self.index[number].tolist()
        if not self.readers:
            return Cell(self.writers[at[0]], pos=at[1] if self.by_position else EVERYWHERE)
        *pos, writer, reader = at
        return Cell(self.writers[writer], self.readers[reader], *(pos or [EVERYWHERE]))

    def sample(self, runs: Runs, budget: int, seed: int) -> Sample:
        """What is measured within a budget.

        Raises:
            ValueError: the budget is too small for these kinds.
        """
        size = len(self.index)
        if budget >= size:
            every = np.ones(size, dtype=bool)
            return Sample(every, np.full(size, CERTAIN), ~every)
        kinds = list(dict.fromkeys(self.kinds))
        if budget < LEAST * len(kinds):
            raise ValueError(
                f"`budget` must be {LEAST} cells or more for each of the {len(kinds)} kinds, "
                f"{LEAST * len(kinds)}; got {budget}; give more, or scores of fewer components"
            )
        owner = self.index[:, -1 if self.readers else 0]
        numbers = np.array([kinds.index(kind) for kind in self.kinds])[owner]
        return drawn(self.strength, numbers, self._idle(runs), budget, seed)

    def _idle(self, runs: Runs) -> Bool[np.ndarray, " cell"]:
        """Which change nothing, as the value that they replace is the same in both runs."""
        if not self.by_position:
            return np.zeros(len(self.index), dtype=bool)
        writer, pos = self.index[:, 1::-1].T if self.readers else self.index.T
        values = [Cell(name, pos=p) for name in self.writers for p in range(int(pos.max()) + 1)]
        idle = np.array(runs.idle(values)).reshape(len(self.writers), -1)
        return idle[writer, pos]

    def spread(self, numbers: Int[np.ndarray, " cell"]) -> Int[Tensor, "*cell"]:
        """A number for each cell, in the table; -1 where there is none."""
        table = torch.full(self.shape, -1)
        table[tuple(torch.from_numpy(self.index).T)] = torch.from_numpy(numbers)
        return table


def _strength(scores: Scores) -> Float[Tensor, "*cell"]:
    """Mean |score| over the pairs that have the position."""
    if not isinstance(scores, NodeScores):
        return scores.table.abs()
    return replace(scores, nodes=scores.nodes.abs()).mean


def _neurons(scores: Scores) -> tuple[str, ...]:
    """Those that write and read by themselves."""
    if not isinstance(scores, EdgeScores):
        return ()
    return tuple(writer.name for writer in scores.layout.sources if writer.kind == "neuron")


def _form(scores: Scores) -> tuple[object, ...]:
    """What must be the same for scores to be of the same cells."""
    names = ("writers", "readers") if scores.level == "edge" else ("components",)
    parts = [getattr(scores, name) for name in names]
    return scores.level, str(scores.direction), list(scores.table.shape), parts


def _must_be_alike(many: Sequence[Scores]) -> None:
    if not many:
        raise ValueError("`scores` must be one set or more; got none; call attribute(model, task)")
    if strange := next((s for s in many if not isinstance(s, Scores)), None):
        raise TypeError(
            f"`scores` must be Scores, one set or more; got a {type(strange).__name__}; call "
            "attribute(model, task, rules=...)"
        )
    one = many[0]
    for s in many:
        if _form(s) != _form(one):
            raise ValueError(
                "`scores` must be of the same level, direction and parts; those of "
                f"{s.rules!r} ({s.level}s {list(s.table.shape)}, {s.direction}) and {one.rules!r} "
                f"({one.level}s {list(one.table.shape)}, {one.direction}) are not; compute all "
                "with the same options"
            )
        if s.places:
            raise ValueError(
                f"cells have a position or are of all; those of {s.rules!r} are by span "
                f"{s.places}; leave `positions` out"
            )
        if not bool(s.table.isfinite().all()):
            raise ValueError(
                f"`scores` must be finite to choose by; those of {s.rules!r} hold NaN or infinity; "
                "compute them again"
            )


def _must_belong(many: Sequence[Scores], here: Provenance, runs: Runs) -> None:
    """Refuses scores of another model or task than the cells would be measured on."""
    metrics = runs.measure([], progress=False)
    for s in many:
        for what in ("model", "weights", "task", "metric"):
            theirs, ours = getattr(s.provenance, what), getattr(here, what)
            if theirs not in (ours, "unknown"):
                raise ValueError(
                    f"`scores` must be of this model and task; those of {s.rules!r} have another "
                    f"{what}, {theirs!r}, here {ours!r}; compute them again"
                )
        for side in ("clean", "corrupt"):
            a, b = getattr(s, side), getattr(metrics, side)
            if a.shape != b.shape or bool((a - b).abs().max() > 1e-3 * (1 + b.abs().max())):
                raise ValueError(
                    f"`scores` must be of the pairs of this task; the {side} metric of "
                    f"{s.rules!r} is another; compute both with the same task object"
                )
