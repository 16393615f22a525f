"""Some pairs of one length: what each cell writes where, and the batches of runs that follow.

A node's cell overwrites the component's value, and everything after it is computed anew. An edge's
cell (path patching, arXiv:2304.05969) leaves the writer's value alone: one reader's input is
rebuilt as the own residual stream plus what the writer would add differently, and everything after
that reader is computed anew. It is what an edge score estimates. Heads that add through a norm
(post-norm) would add their shares of the exact difference of its output: as in `faithfulness`, and
as `DEEPLIFT` attributes it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.exact.cells import EVERYWHERE, Cell
from relp import Component, Direction, TaskLike
from relp.bridge import (
    POINTWISE,
    REBUILT,
    ROOT,
    Basis,
    Edit,
    Features,
    Reading,
    Rerun,
    Sites,
    difference,
    entries,
    must_match,
    observe,
    reader_sites,
    readings,
    received,
    span,
    stream_places,
    stream_sites,
    what_is_added,
    writer_changes,
)

__all__ = ["Bucket", "Job", "Spot", "needed_sites", "written_spot"]

IDLE = 1 / 8
"""Share of a batch that may run for nothing, because some of its cells start later than others."""


class Spot(NamedTuple):
    """One of `parts` equal parts of what a site holds, and the first block that must run."""

    layer: int
    site: str
    number: int = 0
    parts: int = 1

    def part(self, width: int) -> slice:
        """Which entries of a site of this width."""
        return span(self.number, self.parts, width)


def written_spot(sites: Sites, component: str) -> Spot:
    """Where a component's value is; of a feature, all that its site holds."""
    site, number, parts = sites.part(component)
    first = len(sites.blocks) if site == "final" else max(0, Component.parse(component).layer)
    return Spot(first, site, number, parts)


def _reading_spot(reading: Reading) -> Spot:
    """Where what a reader gets is."""
    return Spot(reading.place.layer, reading.site)


def needed_sites(
    sites: Sites, cells: Sequence[Cell], features: Sequence[Features] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites of what cells replace, and those that the input of readers is rebuilt from."""
    found = dict.fromkeys(written_spot(sites, c.component).site for c in cells)
    found |= dict.fromkeys(f.reads for f in features if f.site in found)
    writers = {c.component for c in cells if c.reader}
    found |= dict.fromkeys(_sources(sites, writers))
    return tuple(found), (*stream_sites(sites), *reader_sites(sites)) if writers else ()


def _replacements(
    rerun: Rerun, other: str, names: tuple[str, ...], means: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """What replaces own values: means, 0 without one, or the other run's if `means` is None."""
    if means is None:
        return observe(rerun.sites, rerun.task, names, side=other)[0] if names else {}
    found = {}
    for name in names:
        value = rerun.values[name]
        mean = means.get(name, torch.zeros(1, 1, device=value.device))[: value.shape[1]]
        found[name] = mean.to(value.dtype).expand_as(value)
    return found


def _changed(
    own: Mapping[str, Tensor], instead: Mapping[str, Tensor], spot: Spot
) -> tuple[int, ...]:
    """At which positions another value at a spot is any change."""
    part = spot.part(own[spot.site].shape[-1])
    differs = (own[spot.site][..., part] != instead[spot.site][..., part]).any(-1).any(0)
    return tuple(differs.nonzero().flatten().tolist())


def _differing(step: Tensor) -> tuple[int, ...]:
    """At which positions a step is any."""
    somewhere = (step != 0).unflatten(-1, (-1, 1)) if step.dim() == 2 else step != 0
    return tuple(somewhere.any(-1).any(0).nonzero().flatten().tolist())


def _steps(
    features: Features,
    own: Mapping[str, Tensor],
    instead: Mapping[str, Tensor],
    means: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """By how much the features of a site, and the rest of it, differ if they are replaced."""
    values, rest = features.divided(own)
    if means is None:
        new_values, new_rest = features.divided(instead)
    else:
        length = values.shape[1]
        new_values, new_rest = (
            mean[:length].expand_as(like).to(like) if (mean := means.get(name)) is not None
            else torch.zeros_like(like)
            for name, like in ((features.all, values), (features.rest, rest))
        )  # fmt: skip
    step = new_values - values
    named = {features.name(n): step[..., i] for i, n in enumerate(features.kept)}
    return named | {features.rest: new_rest - rest}


Job = tuple[int, int, int]
"""First block that must run, minus the first position that changes, and number of a cell."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """Some pairs of one length: their own run, what replaces its values, and the cells."""

    direction: Direction
    rerun: Rerun
    metric: Float[Tensor, " pair"]
    """The metric of the other run."""
    instead: Mapping[str, Tensor]
    """What replaces the own values, by site."""
    cells: tuple[Cell, ...]
    spots: tuple[Spot, ...]
    """Where each cell writes."""
    changed: Mapping[str, tuple[int, ...]]
    """At which positions replacing a component's value is any change."""
    changes: Mapping[str, Tensor]
    """What each writer would add differently `[pair, pos, d_model]`; empty without edges."""
    readings: Mapping[str, Reading]
    """Where readers read whose input, made of the parts of the own run, is what they get."""
    features: tuple[Features, ...] = ()
    """Of dictionaries: their features' values can be replaced."""
    steps: Mapping[str, Tensor] = field(default_factory=dict)
    """By how much the value of each feature differs if it is replaced `[pair, pos]`, and what its
    site holds beside features `[pair, pos, d]`."""

    @classmethod
    def of(
        cls,
        sites: Sites,
        task: TaskLike,
        cells: tuple[Cell, ...],
        direction: Direction,
        *,
        patched: bool,
        features: tuple[Features, ...] = (),
    ) -> Bucket:
        """Runs both sides; `patched`: the values of the other one are those that replace."""
        written, read = needed_sites(sites, cells, features)
        rerun = Rerun.of(sites, task, (*written, *read), side=direction.own)
        instead, metric = observe(sites, task, written if patched else (), side=direction.other)
        return cls(direction, rerun, metric, instead, (), (), {}, {}, {}, features)

    def at(self, cells: tuple[Cell, ...], means: Mapping[str, Tensor] | None) -> Bucket:
        """The same pairs with these cells; a site that they need and that is not held is run.

        `means`: what replaces values, 0 where there is none; the other run's values if None.
        """
        sites, task, rerun = self.rerun.sites, self.rerun.task, self.rerun
        written, read = needed_sites(sites, cells, self.features)
        if new := tuple(n for n in dict.fromkeys((*written, *read)) if n not in rerun.values):
            values, _ = observe(sites, task, new, side=rerun.side)
            rerun = replace(rerun, values={**rerun.values, **values})
        absent = tuple(n for n in written if n not in self.instead)
        instead = {**self.instead, **_replacements(rerun, self.direction.other, absent, means)}
        spots = {c.component: written_spot(sites, c.component) for c in cells}
        new_spots = {n: spot for n, spot in spots.items() if n not in self.changed}
        asked_steps = {name.partition("/")[0] for name in new_spots if "/" in name}
        steps = dict(self.steps)
        for features in self.features:
            if features.site in asked_steps:
                steps |= _steps(features, rerun.values, instead, means)
        changed = {
            n: _differing(steps[n]) if n in steps else _changed(rerun.values, instead, spot)
            for n, spot in new_spots.items()
        }
        asked = {c.reader for c in cells if c.reader} - self.readings.keys()
        found = {n: at for n, at in readings(sites).items() if n in asked} if asked else {}
        if found:
            _must_be_known(sites, rerun.values, found.values())
        readers = {**self.readings, **found}
        writers = {c.component for c in cells if c.reader and c.component not in self.changes}
        changes = _writer_changes(sites, rerun.values, instead, writers)
        return replace(
            self,
            rerun=rerun,
            instead=instead,
            cells=cells,
            spots=tuple(
                _reading_spot(readers[c.reader]) if c.reader else spots[c.component] for c in cells
            ),
            changed={**self.changed, **changed},
            changes={**self.changes, **changes},
            readings=readers,
            steps=steps,
        )

    @property
    def held(self) -> int:
        """Bytes of activations."""
        rerun = self.rerun
        tensors = chain(rerun.values.values(), self.instead.values(), self.changes.values(),
                        self.steps.values(), chain.from_iterable(rerun.past))  # fmt: skip
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        return sum(storages.values())

    def plan(self, numbers: Sequence[int]) -> tuple[list[int], list[Job]]:
        """Of the cells with these numbers, those that change nothing, and the others as jobs."""
        places = {i: self._places(i) for i in numbers}
        idle = [i for i, at in places.items() if not at]
        # late positions first: those that run in one batch then start near each other
        return idle, sorted((self._first_block(i), -at[0], i) for i, at in places.items() if at)

    def work(self, job: Job) -> int:
        """How much there is to run, in positions times blocks."""
        layer, earliest, _ = job
        pairs, length = len(self.metric), int(self.rerun.task.lengths[0])
        blocks = len(self.rerun.sites.blocks) - layer + 1  # norm and unembedding are as one
        return pairs * (length - self.rerun.start(-earliest)) * blocks

    def run(
        self, todo: Sequence[Job], prompts: int
    ) -> Iterator[tuple[list[Job], Float[Tensor, "pair cell"]]]:
        """Effects of the cells, some at a time, in batches of that size."""
        places = {i: self._places(i) for *_, i in todo}
        for batch in self._batches(todo, prompts):
            layer, earliest, _ = batch[-1]
            numbers, start = [number for *_, number in batch], self.rerun.start(-earliest)
            inside = {i: places[i] for i in numbers if self._is_pointwise(i)}
            writes = self._writes({i: places[i] for i in numbers if i not in inside})
            writes |= self._handed_on(inside)
            rows = [
                (write, [row] * len(places[i]), [pos - start for pos in places[i]])
                for row, i in enumerate(numbers)
                for write in writes[i]
            ]
            edits = _edits(rows, len(numbers))
            effects = self.rerun(edits, copies=len(numbers), layer=layer, start=start)
            yield batch, effects.T.float().cpu()

    def _places(self, number: int) -> list[int]:
        """The positions that a cell changes, as far as the metric can hear of it."""
        cell, task = self.cells[number], self.rerun.task
        places = set(self.changed[cell.component])
        if cell.pos != EVERYWHERE:
            places &= {cell.pos}
        last = self._first_block(number) == len(self.rerun.sites.blocks)
        if last and task.metric.reads_answer_only:
            places &= set(task.spans["end"].tolist())
        return sorted(places)

    def _is_pointwise(self, number: int) -> bool:
        """Whether a cell changes what its block hands on at the cell's own positions alone."""
        site = self.spots[number].site
        return self.rerun.pointwise and site.endswith(POINTWISE)

    def _first_block(self, number: int) -> int:
        """The first block that runs at later positions too."""
        return self.spots[number].layer + self._is_pointwise(number)

    def _batches(self, todo: Sequence[Job], prompts: int) -> Iterator[list[Job]]:
        """Cells of one block, as many as fit."""
        pairs, length = len(self.metric), int(self.rerun.task.lengths[0])
        batch: list[Job] = []
        for cell in todo:
            starts = [self.rerun.start(-pos) for _, pos, _ in (*batch, cell)]
            runs = len(starts) * (length - starts[-1]) * pairs
            # positions at which a cell is as it was, but another of its batch is not
            idle = sum(start - starts[-1] for start in starts) * pairs
            room = prompts * length
            if batch and (cell[0] != batch[0][0] or runs > room or idle > IDLE * room):
                yield batch
                batch = []
            batch.append(cell)
        if batch:
            yield batch

    def _writes(self, batch: Mapping[int, Sequence[int]]) -> dict[int, list[_Write]]:
        """What each cell writes at its positions."""
        by_site: dict[str, list[int]] = {}
        for number in batch:
            by_site.setdefault(self.spots[number].site, []).append(number)
        writes = {}
        for numbers in by_site.values():
            for number, values in zip(numbers, self._values(numbers), strict=True):
                at = list(batch[number])
                found = [w._replace(value=w.value.transpose(0, 1)[at]) for w in values]
                writes[number] = found
        return writes

    def _handed_on(self, batch: Mapping[int, Sequence[int]]) -> dict[int, list[_Write]]:
        """The same, seen behind the cells' block: what it hands on at these positions."""
        if not batch:
            return {}
        writes, positions = self._writes(batch), [p for at in batch.values() for p in at]
        free = iter(range(len(positions)))
        rows = []
        for number, at in batch.items():
            row = [next(free) for _ in at]
            rows += [(write, row, [0] * len(at)) for write in writes[number]]
        layer = self.spots[next(iter(batch))].layer
        streams = self.rerun.behind(_edits(rows, len(positions)), layer=layer, places=positions)
        site = entries(self.rerun.sites)[layer + 1]
        each = streams.split([len(at) for at in batch.values()])
        return {i: [_Write(site, slice(None), new)] for i, new in zip(batch, each, strict=True)}

    def _values(self, numbers: Sequence[int]) -> Iterator[list[_Write]]:
        """What cells that write at one site write, at all positions `[pair, pos, part]`."""
        cells, own = [self.cells[i] for i in numbers], self.rerun.values
        if not cells[0].reader:
            for name, spot in ((self.cells[i].component, self.spots[i]) for i in numbers):
                if name in self.steps:
                    yield [_Write(spot.site, slice(None), self._moved(name, spot.site))]
                    continue
                value = self.instead[spot.site]
                part = spot.part(value.shape[-1])
                yield [_Write(spot.site, part, value[..., part])]
            return
        readers = [self.readings[c.reader] for c in cells]
        stream = own[readers[0].place.entry]
        heard = torch.stack([self.changes[c.component] for c in cells])
        found = received(readers, (stream + heard).to(stream.dtype))
        # the rest of a module reads by itself: what its parts get stays as it was
        kept = [] if readers[0].slot else _part_values(readers[0].place.basis, own)
        for i, reader in enumerate(readers):
            yield [
                *(_Write(site, reader.part(site, own[site].shape[-1]), value[i])
                  for site, value in found.items()),
                *kept,
            ]  # fmt: skip

    def _moved(self, component: str, site: str) -> Float[Tensor, "pair pos d"]:
        """What a site holds with another value of one of its features, or another rest."""
        own, step = self.rerun.values[site], self.steps[component]
        if step.dim() == 2:
            (features,) = (f for f in self.features if f.site == site)
            number = torch.tensor([Component.parse(component).head])
            step = step[..., None] * features.directions(number).to(step)
        return (own + step.to(own.device)).to(own.dtype)


class _Write(NamedTuple):
    """What a cell puts where."""

    site: str
    part: slice
    value: Float[Tensor, "place pair part"] | Float[Tensor, "pair pos part"]


def _edits(
    writes: Iterable[tuple[_Write, Sequence[int], Sequence[int]]], copies: int
) -> dict[str, Edit]:
    """Edits of a batch, from what is written in which copies of the pairs at which places."""
    by_site: dict[str, list[Any]] = {}
    for write, rows, places in writes:
        by_site.setdefault(write.site, []).append((rows, places, write.part, write.value))

    def edit(found: Sequence[Any], value: Tensor) -> Tensor:
        value = value.clone()
        runs = value.unflatten(0, (copies, -1)).transpose(1, 2)
        for rows, places, part, new in found:
            runs[rows, places, :, part] = new.to(value.dtype)
        return value

    return {site: partial(edit, found) for site, found in by_site.items()}


def _part_values(basis: Basis, own: Mapping[str, Tensor]) -> list[_Write]:
    """What the parts of a module that are split off get in the own run."""
    return [
        _Write(m.site, part, own[m.site][..., part])
        for slot in basis.slots
        for m in slot.through
        for part in (m.span(number, own[m.site].shape[-1]) for number in slot.numbers)
    ]


def _writer_changes(
    sites: Sites, own: Mapping[str, Tensor], instead: Mapping[str, Tensor], writers: Container[str]
) -> dict[str, Float[Tensor, "pair pos d_model"]]:
    """What writers would add to the residual stream, less what they add."""
    found = {"embed": difference(own, instead, ROOT)} if "embed" in writers else {}
    for place in stream_places(sites):
        if any(writer in writers for writer in place.basis.writers):
            found |= writer_changes(place.basis, own, instead)
    return found


def _sources(sites: Sites, writers: Container[str]) -> tuple[str, ...]:
    """The sites of what `_writer_changes` needs."""
    found = [ROOT] if "embed" in writers else []
    for place in stream_places(sites):
        if any(writer in writers for writer in place.basis.writers):
            found += place.basis.holding
    return tuple(found)


def _must_be_known(sites: Sites, own: Mapping[str, Tensor], readers: Iterable[Reading]) -> None:
    """Edges are rebuilt outside the model, so its own run must come out of the same parts."""
    for block, after in zip(sites.blocks, entries(sites)[1:], strict=True):
        rebuilt = own[block.name("resid")] + sum(what_is_added(m, own) for m in block.modules)
        must_match(rebuilt, own[after], REBUILT.format(f"what block {block.layer} adds"))
    for reader in readers:
        found = received([reader], own[reader.place.entry][None])
        for site, value in found.items():
            expected = own[site][..., reader.part(site, own[site].shape[-1])]
            must_match(value[0], expected, REBUILT.format(f"what {reader.name} reads"))
