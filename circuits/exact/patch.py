"""Exact effects: the ground truth that scores are judged by.

A cell is one thing to change in one run: a component, or what one reader hears of one writer, at
one position or at all. Cells are independent of each other: `measure` takes a list of them, runs
those that start in the same block as rows of one batch, and can be interrupted. A cell that
changes nothing (all that comes before the first token that differs) is not run.

A node's cell overwrites the component's value, and everything after it is computed anew. An edge's
cell (path patching, arXiv:2304.05969) leaves the writer's value alone: one reader's input is
rebuilt as the own residual stream plus what the writer would add differently, and everything after
that reader is computed anew. It is what an edge score estimates. Heads that add through a norm
(post-norm) would add their shares of the exact difference of its output: as in `faithfulness`, and
as `DEEPLIFT` attributes it.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import find_executable_batch_size
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.choices import check_ablation
from circuits.exact.sweep import EVERYWHERE, Cell, Sweep, identity
from relp.bridge import (
    POINTWISE,
    REBUILT,
    ROOT,
    Basis,
    Edit,
    Reading,
    Rerun,
    Sites,
    entries,
    must_match,
    observe,
    pairs_kept,
    pairs_of,
    prompts_per_run,
    provenance,
    readings,
    received,
    stream_places,
    stream_sites,
    undisturbed,
    what_is_added,
    writer_changes,
)
from relp.choices import Direction, Level
from relp.layout import Component
from relp.scores import EdgeEffects, NodeEffects

__all__ = ["Cell", "measure", "patch"]

IDLE = 1 / 8
"""Share of a batch that may run for nothing, because some of its cells start later than others."""


@undisturbed
def patch(
    model: Any,
    task: Any,
    *,
    level: str = "node",
    components: Sequence[str] | None = None,
    edges: Sequence[tuple[str, str]] | None = None,
    positions: bool | None = None,
    direction: str = "denoise",
    ablation: str = "patch",
    resume: str | Path | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> NodeEffects | EdgeEffects:
    """Measures what patching each component or edge does to the metric.

    >>> effect = patch(model, task)            # nodes [pair, component, pos], as attribute's
    >>> effect = patch(model, task, components=["attn", "L3.mlp", "L3N17"])
    >>> effect = patch(model, task, level="edge", edges=[("L1H1", "L3H5.q")])

    `denoise`: the clean value is put into the corrupt run and the effect is the metric minus that
    of the corrupt run; `noise`: the other way round.

    Args:
        model: a `TransformerBridge` in eval mode. It is the same afterwards.
        task: a `tasks.Task`.
        level: `"node"` or `"edge"`.
        components: at node level, names (`L3H1`, neurons `L3N17`) or kinds (`resid`, `attn`, `mlp`,
            `head`, `embed`, `neuron`); all but neurons if None.
        edges: at edge level, `(writer, reader)` names; all if None, which are many. Edges that
            were not asked for are NaN in the result.
        positions: one cell per position, or one for all positions at once. If None, nodes are
            patched by position and edges are not, as `attribute` gives them.
        direction: `"denoise"` or `"noise"`.
        ablation: what replaces a value: that of the other run (`"patch"`), zero (`"zero"`), or a
            mean over what the component holds in the other runs of all pairs of the task, at all
            positions (`"mean"`) or at the same one (`"mean_per_position"`).
        resume: a `.safetensors` file that keeps finished cells. If it exists, the sweep goes on
            from there; it must be of the same sweep.
        batch_size: prompts of full length per forward pass at most, or as many tokens of runs that
            start later; by default as many as fit the memory, and fewer if it runs out.
        progress: show a bar.

    Returns:
        Effects in the unit of the metric, in the layout of `attribute`'s scores. With
        `positions=False` the position axis of nodes has length 1.

    Raises:
        ValueError: an argument is wrong, the model is in train mode, or `resume` is the file of
            another sweep.
        RuntimeError: edges were asked for, and what heads and MLPs add is not all that the
            residual stream gets.
    """
    level = Level(level)
    if (components if level == "edge" else edges) is not None:
        raise ValueError(
            "`components` is for nodes and `edges` for edges; got the other one with "
            f"level={level!r}; choose the level that you want"
        )
    sites = Sites.of(model)
    by_position = level == "node" if positions is None else positions
    places = range(int(task.lengths.max())) if by_position else [EVERYWHERE]
    names = sites.chosen(components) if level == "node" else ()
    chosen = _edges(sites, edges) if level == "edge" else ()
    cells = [Cell(n, pos=p) for n in names for p in places]
    cells += [Cell(w, r, p) for w, r in chosen for p in places]
    sweep = measure(model, task, cells, direction=direction, ablation=ablation, resume=resume,
                    batch_size=batch_size, progress=progress)  # fmt: skip
    rules = "exact" if ablation == "patch" else f"exact ({ablation} ablation)"
    source = provenance(sites, task, Direction(direction), rules)
    about = pairs_of(sites, task, {"clean": sweep.clean, "corrupt": sweep.corrupt})
    finest = float(sweep.resolution.mean())
    if level == "node":
        nodes = sweep.effects.unflatten(1, (len(names), len(places)))
        found = NodeEffects(provenance=source, pairs=about, resolution=finest,
                            components=names, nodes=nodes)  # fmt: skip
        return found if by_position else found.together()
    table = _unmeasured(sites, len(places))
    layout = sites.layout
    rows, columns = torch.tensor([(layout.row[w], layout.column[r]) for w, r in chosen]).T
    table[:, rows, columns] = sweep.effects.mean(0).unflatten(0, (len(chosen), len(places))).T
    table = table if by_position else table[0]
    return EdgeEffects(
        provenance=source, pairs=about, resolution=finest, layout=layout, edges=table
    )


@undisturbed
def measure(
    model: Any,
    task: Any,
    cells: Sequence[Cell],
    *,
    direction: str = "denoise",
    ablation: str = "patch",
    resume: str | Path | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Sweep:
    """The effect of each cell on each pair; arguments and errors as for `patch`.

    A cell's effect depends on nothing but the cell: any split of the list over processes or
    machines gives the same numbers.
    """
    check_ablation(ablation)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}; or leave it out")
    resume = None if resume is None else Path(resume)
    if resume is not None and resume.suffix != ".safetensors":
        raise ValueError(
            f"`resume` must be a .safetensors file; got {resume.name!r}; change the suffix"
        )
    sites = Sites.of(model)
    task.must_fit(sites.model.cfg, sites.model_name)
    own, other = Direction(direction).own, Direction(direction).other
    cells = tuple(cells)
    labels = {} if resume is None else identity(sites, task, cells, direction, ablation)
    sweep = Sweep.begun(resume, labels, len(task), len(cells))
    with sweep.kept(resume, labels) as keep, _Progress(len(task), shown=progress) as bar:

        def run(prompts: int) -> None:
            # called again with fewer prompts if memory runs out; what is finished stays finished
            means = _means(sites, task, cells, other, ablation, prompts)
            bar.begin()
            for index, pairs in task.buckets(
                min(prompts, pairs_kept(sites, task, edges=any(c.reader for c in cells)))
            ):
                part = _Part.of(sites, pairs, cells, own, ablation, means)
                eps = torch.finfo(part.rerun.values["final"].dtype).eps
                for side, metric in ((own, part.rerun.metric), (other, part.metric)):
                    sweep.note(side, index, metric, eps=eps, noise=part.rerun.noise)
                if not part.rerun.past:
                    bar.say_slow(sites, task)
                missing = sweep.effects[index].isnan().any(0).nonzero().flatten().tolist()
                idle, todo = part.plan(missing)
                bar.expect(sum(map(part.work, todo)), len(index))
                sweep.effects[index[:, None], torch.tensor(idle, dtype=torch.long)] = 0.0
                for batch, effects in part.run(todo, prompts):
                    numbers = torch.tensor([number for *_, number in batch])
                    sweep.effects[index[:, None], numbers] = effects
                    bar.advance(sum(map(part.work, batch)), effects.numel())
                    keep()

        try:
            find_executable_batch_size(
                run, starting_batch_size=batch_size or prompts_per_run(sites, task)
            )()
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(sweep.interrupted(resume)) from stop
    return sweep


class _Progress:
    """A bar over the work that will be done: what changes nothing is not run, and not counted."""

    def __init__(self, pairs: int, *, shown: bool) -> None:
        self._pairs = self._left = pairs
        self._runs, self._told = 0, False
        # an average rate: cells are of all sizes
        self._bar = tqdm(
            total=0, desc="exact effects", disable=not shown, leave=False, smoothing=0,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )  # fmt: skip

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self) -> None:
        """All pairs are (again) to come."""
        self._left = self._pairs

    def expect(self, work: int, pairs: int) -> None:
        """What the next pairs take; those after them are expected to take as much each."""
        self._bar.total = self._bar.n + work * self._left // pairs
        self._left -= pairs
        self._bar.refresh()

    def advance(self, work: int, runs: int) -> None:
        """Some of it is done."""
        self._runs += runs
        self._bar.set_postfix_str(f"{self._runs:,} runs", refresh=False)
        self._bar.update(work)

    def say_slow(self, sites: Sites, task: Any) -> None:
        """Once: that, and why, a run cannot begin at the position of its change."""
        if self._told or self._bar.disable:
            return
        self._told = True
        why = f"{sites.model_name!r} keeps no keys and values to go on from"
        if not task.metric.reads_answer_only:
            why = f"the metric {task.metric.name!r} may read all positions"
        self._bar.write(
            f"exact effects: each run is of all positions, because {why}; it takes 2 to 3 times as "
            "long as one from the change on",
            file=sys.stderr,
        )


# -- where cells write -----------------------------------------------------------------------------


class Spot(NamedTuple):
    """One of `parts` equal parts of what a site holds, and the first block that must run."""

    layer: int
    site: str
    number: int = 0
    parts: int = 1

    def part(self, width: int) -> slice:
        """Which entries of a site of this width."""
        size = width // self.parts
        return slice(self.number * size, (self.number + 1) * size)


def _written(sites: Sites, component: str) -> Spot:
    """Where a component's value is."""
    return Spot(max(0, Component.parse(component).layer), *sites.part(component))


def _spot(reading: Reading) -> Spot:
    """Where what a reader gets is."""
    return Spot(reading.place.layer, reading.site)


def _part_values(basis: Basis, own: Mapping[str, Tensor]) -> list[_Write]:
    """What the parts of a module that are split off get in the own run."""
    return [
        _Write(m.site, part, own[m.site][..., part])
        for slot in basis.slots
        for m in slot.through
        for part in (m.span(number, own[m.site].shape[-1]) for number in slot.numbers)
    ]


def _edges(sites: Sites, wanted: Sequence[tuple[str, str]] | None) -> tuple[tuple[str, str], ...]:
    """The chosen edges of the model as `(writer, reader)`."""
    writers, readers = sites.layout.writers, sites.layout.readers
    known = tuple((writers[w], readers[r]) for r, w in sites.layout.exists.T.nonzero().tolist())
    if wanted is None:
        return known
    chosen = tuple(dict.fromkeys(tuple(edge) for edge in wanted))
    existing = set(known)
    unknown = [edge for edge in chosen if edge not in existing] if chosen else ["none"]
    if unknown:
        raise ValueError(
            f"`edges` must be pairs (writer, reader) such as {known[-1]}; got {unknown[0]!r}; see "
            "Scores.writers and Scores.readers, and let the writer come before the reader"
        )
    return tuple((writer, reader) for writer, reader in chosen)


def _unmeasured(sites: Sites, places: int) -> Float[Tensor, "pos writer reader"]:
    """NaN for every edge, 0 where there is none."""
    return torch.where(sites.layout.exists, torch.nan, 0.0).repeat(places, 1, 1)


# -- some pairs ------------------------------------------------------------------------------------

_Job = tuple[int, int, int]
"""First block that must run, minus the first position that changes, and number of a cell."""


@dataclass(frozen=True, eq=False)
class _Part:
    """Some pairs of one length: their own run, what replaces its values, and the cells."""

    rerun: Rerun
    metric: Float[Tensor, " pair"]
    """The metric of the other run."""
    instead: Mapping[str, Tensor]
    """What replaces the own values, by site."""
    cells: tuple[Cell, ...]
    spots: tuple[Spot, ...]
    """Where each cell writes."""
    readings: Mapping[str, Reading]
    """Where the cells' readers read."""
    changes: Mapping[str, Tensor]
    """What each writer would add differently `[pair, pos, d_model]`; empty without edges."""
    changed: Mapping[str, tuple[int, ...]]
    """At which positions replacing a component's value is any change."""

    @classmethod
    def of(
        cls, sites: Sites, task: Any, cells: tuple[Cell, ...], own: str, ablation: str,
        means: Mapping[str, Tensor],
    ) -> _Part:  # fmt: skip
        """Runs both sides."""
        written = {c.component: _written(sites, c.component) for c in cells}
        writers = {c.component for c in cells if c.reader}
        where = readings(sites) if writers else {}
        read = {c.reader: where[c.reader] for c in cells if c.reader}
        sources = [spot.site for spot in written.values()]
        names = tuple(dict.fromkeys([*sources, *_sources(sites, writers)]))
        stream = stream_sites(sites) if writers else ()
        rerun = Rerun.of(sites, task, (*names, *stream), side=own)
        other = "corrupt" if own == "clean" else "clean"
        instead, metric = observe(sites, task, names if ablation == "patch" else (), side=other)
        for name in names if ablation != "patch" else ():
            value = rerun.values[name]
            mean = means.get(name, torch.zeros(1, 1, device=value.device))[: value.shape[1]]
            instead[name] = mean.to(value.dtype).expand_as(value)
        changed = {}
        for component, spot in written.items():
            value = rerun.values[spot.site]
            part = spot.part(value.shape[-1])
            differs = (value[..., part] != instead[spot.site][..., part]).any(-1).any(0)
            changed[component] = tuple(differs.nonzero().flatten().tolist())
        changes = {}
        if writers:
            _must_be_known(sites, rerun.values, read.values())
            changes = _writer_changes(sites, rerun.values, instead, writers)
        spots = tuple(_spot(read[c.reader]) if c.reader else written[c.component] for c in cells)
        return cls(rerun, metric, instead, cells, spots, read, changes, changed)

    def plan(self, numbers: Sequence[int]) -> tuple[list[int], list[_Job]]:
        """Of the cells with these numbers, those that change nothing, and the others as jobs."""
        places = {i: self._places(i) for i in numbers}
        idle = [i for i, at in places.items() if not at]
        # late positions first: those that run in one batch then start near each other
        return idle, sorted((self._first_block(i), -at[0], i) for i, at in places.items() if at)

    def work(self, job: _Job) -> int:
        """How much there is to run, in positions times blocks."""
        layer, earliest, _ = job
        pairs, length = len(self.metric), int(self.rerun.task.lengths[0])
        blocks = len(self.rerun.sites.blocks) - layer + 1  # norm and unembedding are as one
        return pairs * (length - self.rerun.start(-earliest)) * blocks

    def run(
        self, todo: Sequence[_Job], prompts: int
    ) -> Iterator[tuple[list[_Job], Float[Tensor, "pair cell"]]]:
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

    def _batches(self, todo: Sequence[_Job], prompts: int) -> Iterator[list[_Job]]:
        """Cells of one block, as many as fit."""
        pairs, length = len(self.metric), int(self.rerun.task.lengths[0])
        batch: list[_Job] = []
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
            for spot in (self.spots[i] for i in numbers):
                value = self.instead[spot.site]
                part = spot.part(value.shape[-1])
                yield [_Write(spot.site, part, value[..., part])]
            return
        readers = [self.readings[c.reader] for c in cells]
        stream = own[readers[0].place.entry]
        heard = torch.stack([self.changes[c.component] for c in cells])
        found = received(readers, stream + heard.to(stream))
        # the rest of a module reads by itself: what its parts get stays as it was
        kept = [] if readers[0].slot else _part_values(readers[0].place.basis, own)
        for i, reader in enumerate(readers):
            yield [
                *(_Write(site, reader.part(site, own[site].shape[-1]), value[i])
                  for site, value in found.items()),
                *kept,
            ]  # fmt: skip


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


# -- edges -----------------------------------------------------------------------------------------


def _writer_changes(
    sites: Sites, own: Mapping[str, Tensor], instead: Mapping[str, Tensor], writers: Container[str]
) -> dict[str, Float[Tensor, "pair pos d_model"]]:
    """What writers would add to the residual stream, less what they add."""
    found = {"embed": instead[ROOT] - own[ROOT]} if "embed" in writers else {}
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


# -- memory ----------------------------------------------------------------------------------------


def _means(
    sites: Sites, task: Any, cells: Sequence[Cell], side: str, ablation: str, prompts: int
) -> dict[str, Float[Tensor, "#pos d"]]:
    """What replaces a value in a mean ablation, by site: means over one side of all pairs."""
    if ablation not in ("mean", "mean_per_position"):
        return {}
    names = tuple(dict.fromkeys(_written(sites, c.component).site for c in cells))
    width = int(task.lengths.max())
    totals: dict[str, Tensor] = {}
    for _, pairs in task.buckets(prompts):
        for name, value in observe(sites, pairs, names, side=side)[0].items():
            dtype = torch.promote_types(value.dtype, torch.float32)
            if name not in totals:
                totals[name] = torch.zeros(width, value.shape[-1], dtype=dtype, device=value.device)
            totals[name][: value.shape[1]] += value.to(dtype).sum(0)
    counts = (task.lengths[:, None] > torch.arange(width)).sum(0)[:, None]
    if ablation == "mean":
        return {n: t.sum(0, keepdim=True) / counts.sum().to(t) for n, t in totals.items()}
    return {n: t / counts.to(t) for n, t in totals.items()}
