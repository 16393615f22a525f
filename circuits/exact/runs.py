"""Both runs of a task's pairs, and the lists of cells that are measured on them.

`Runs` has both runs of every pair, and measures lists of cells on them: those that start in the
same block are rows of one batch, and it can be interrupted. A cell that changes nothing (all that
comes before the first token that differs) is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.choices import check_ablation
from circuits.engines.local import Engine, cut
from circuits.exact.bucket import Bucket, Job, Spot, needed_sites, written_spot
from circuits.exact.cells import Cell
from circuits.exact.progress import Progress
from circuits.exact.sweep import Sweep, identity, safetensors_path
from relp import Component, Direction, ModelLike, TaskLike
from relp.bridge import (
    PAIR_BYTES,
    Features,
    Sites,
    as_fits,
    divisions,
    observe,
    pairs_kept,
    prompts_per_run,
    undisturbed,
)

__all__ = ["Runs", "ablation_means", "measure"]

RUNS = 64
"""How many runs of all pairs a piece of a sweep is worth that an engine gets: what it takes to get
ready for it, some runs, is little beside them."""
PIECES = 4
"""How many of them a worker gets at least: they do not end at the same time."""


def measure(
    model: ModelLike,
    task: TaskLike,
    cells: Sequence[Cell],
    *,
    direction: str = "denoise",
    ablation: str = "patch",
    resume: str | Path | None = None,
    batch_size: int | None = None,
    engine: Engine | None = None,
    progress: bool = True,
) -> Sweep:
    """The effect of each cell on each pair; arguments and errors as for `patch` and `Runs`."""
    runs = Runs(model, task, direction, ablation, kept_bytes=0)
    return runs.measure(
        cells, resume=resume, batch_size=batch_size, engine=engine, progress=progress
    )


@dataclass(frozen=True, eq=False, repr=False)
class Runs:
    """Both runs of every pair of a task, kept: what lists of cells are measured on.

    >>> from circuits.exact import Cell, Runs
    >>> runs = Runs(model, task)
    >>> first = runs.measure([Cell("L3H5", pos=15)])
    >>> second = runs.measure([Cell("L3H5", pos=p) for p in range(16)])    # both runs are there

    If the model has changed in between (weights, hooks), its runs are made anew. The arguments are
    those of `patch`.

    Args:
        neurons: that write and read by themselves, for cells of edges.
        features: dictionaries by site, for cells of their features.
        kept: components of which those that are features are kept: what a rest is without them.
        kept_bytes: of activations, kept for later lists, those of the first pairs that fit; runs of
            the others are made anew.

    Raises:
        TypeError: the model is no `TransformerBridge`.
        ValueError: an argument is wrong, the model is in train mode, or cannot take the prompts.
    """

    model: ModelLike
    task: TaskLike
    direction: str = "denoise"
    ablation: str = "patch"
    _: KW_ONLY
    neurons: tuple[str, ...] = ()
    features: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    kept_bytes: int = PAIR_BYTES
    _made: list[_Made] = field(default_factory=list, init=False)
    """One at most: of the model as it was."""

    def __post_init__(self) -> None:
        Direction(self.direction)
        check_ablation(self.ablation)
        sites = Sites.of(self.model).splitting(self.neurons)
        self.task.must_fit(sites.model.cfg, sites.model_name)

    def measure(
        self,
        cells: Sequence[Cell],
        *,
        resume: str | Path | None = None,
        batch_size: int | None = None,
        engine: Engine | None = None,
        progress: bool = True,
    ) -> Sweep:
        """The effect of each cell on each pair; arguments as for `patch`.

        A cell's effect depends on nothing but the cell: any split of the list over processes or
        machines gives the same numbers, see `merge`. A `resume` file may be of other cells: those
        that it holds are not run, and stay in it.

        Raises:
            ValueError: an argument is wrong, the model has no such cell, or `resume` is the file of
                another sweep.
            RuntimeError: as for `patch`.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1; got {batch_size}; or leave it out")
        path = None if resume is None else safetensors_path(resume, "`resume`")
        cells = tuple(dict.fromkeys(cells))

        @undisturbed
        def swept(model: ModelLike) -> Sweep:
            made = self._renewed(Sites.of(model).splitting(self.neurons))
            _must_exist(made, cells)
            sweep = Sweep.begun(path, made.identity, cells, len(self.task))
            with sweep.kept(path) as keep, Progress(len(self.task), shown=progress) as bar:
                todo: dict[Cell, _Work] = {}

                def run(prompts: int) -> None:
                    bar.begin()
                    todo.clear()
                    for index, part in made.divided(cells, prompts):
                        jobs = _begun(sweep, index, part, bar)
                        if engine is None:
                            _fill(sweep, index, part, jobs, prompts, bar, keep)
                        else:
                            _note(todo, part, jobs)

                size = batch_size or prompts_per_run(made.sites, self.task)
                try:
                    as_fits(run, size, emptied=made.parts.clear)
                    if engine is not None and todo:
                        self._spread(engine, todo, sweep, batch_size, bar, keep)
                except KeyboardInterrupt as stop:
                    raise KeyboardInterrupt(sweep.interrupted(path)) from stop
            return sweep.of(cells)

        return swept(self.model)

    def _spread(
        self,
        engine: Engine,
        todo: Mapping[Cell, _Work],
        sweep: Sweep,
        batch_size: int | None,
        bar: Progress,
        keep: Callable[[], None],
    ) -> None:
        """Has an engine measure cells, in pieces of those that start near each other."""
        order = sorted(todo, key=lambda cell: todo[cell].start)
        amounts = [todo[cell].amount for cell in order]
        whole = sum(amounts)
        parts = max(whole // (RUNS * _run_work(self.model, self.task)), PIECES * engine.workers)
        begin = partial(
            _measuring, self.direction, self.ablation, self.neurons, self.features, self.kept,
            batch_size,
        )  # fmt: skip
        with engine.working(begin, self.model, self.task) as answers:
            for piece, found in answers(cut(order, amounts, parts)):
                sweep.take(found)
                bar.advance(sum(todo[cell].amount for cell in piece), found.effects.numel())
                keep()

    def idle(self, cells: Sequence[Cell]) -> list[bool]:
        """Which cells change nothing, in any pair: their effect is 0, and to measure them is free.

        >>> from circuits.exact import Cell, Runs
        >>> runs = Runs(model, task)
        >>> runs.idle([Cell("L3H5", pos=0), Cell("L3H5", pos=15)])
        [True, False]

        Raises:
            ValueError: the model has no such cell.
        """
        cells = tuple(cells)

        @undisturbed
        def looked_at(model: ModelLike) -> list[bool]:
            made = self._renewed(Sites.of(model).splitting(self.neurons))
            _must_exist(made, cells)
            found = [True] * len(cells)
            for _, part in made.divided(cells, prompts_per_run(made.sites, self.task)):
                for *_, number in part.plan(range(len(cells)))[1]:
                    found[number] = False
            return found

        return looked_at(self.model)

    def _renewed(self, sites: Sites) -> _Made:
        """What was made of the model, or what will be, if it is another by now."""
        way = Direction(self.direction)
        state = _state(sites, self.task, way.own) if self.kept_bytes else ()
        if not self._made or not self.kept_bytes or state != self._made[0].state:
            features = divisions(sites, self.features, self.kept)
            labels = identity(sites, self.task, self.direction, self.ablation, features)
            made = _Made(
                sites, self.task, way, self.ablation, self.kept_bytes, labels, state, features
            )
            self._made[:] = [made]
        return self._made[0]


def _state(sites: Sites, task: TaskLike, side: str) -> tuple[Any, ...]:
    """What is another if a model has changed: its modules, hooks and weights.

    And the metric of one run, which tells of what these do not show: `.data`, and values that a
    hook looks up.
    """
    _, metric = observe(sites, task.select([0]), (), side=side)  # a bridge's first sets hooks
    modules = [
        (id(m), vars(m).get("forward"), *m._forward_hooks, *m._forward_pre_hooks)
        for m in sites.model.modules()
    ]
    tensors = chain(sites.model.parameters(), sites.model.buffers())
    weights = [(t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]
    return metric.tolist(), modules, weights


@dataclass(frozen=True, eq=False)
class _Made:
    """What was made of a model as it is, for cells so far."""

    sites: Sites
    task: TaskLike
    direction: Direction
    ablation: str
    kept_bytes: int
    identity: Mapping[str, str]
    state: tuple[Any, ...]
    features: tuple[Features, ...] = ()
    means: dict[str, Tensor] = field(default_factory=dict)
    """What replaces a value in a mean ablation, by site."""
    parts: dict[tuple[int, ...], Bucket] = field(default_factory=dict)
    """By the numbers of their pairs."""

    def divided(
        self, cells: tuple[Cell, ...], prompts: int
    ) -> Iterator[tuple[Int[Tensor, " pair"], Bucket]]:
        """All pairs, as many of one length at a time as run at once or can be kept."""
        sites, task, means = self.sites, self.task, None
        if self.ablation != "patch":
            needed = needed_sites(sites, cells, self.features)[0]
            new = tuple(n for n in needed if n not in self.means)
            self.means.update(
                ablation_means(sites, task, new, self.direction.other, self.ablation, prompts,
                       self.features)
            )  # fmt: skip
            means = self.means
        pairs = min(prompts, pairs_kept(sites, task, edges=any(c.reader for c in cells)))
        division = {tuple(i.tolist()): (i, bucket) for i, bucket in task.buckets(pairs)}
        for key in self.parts.keys() - division.keys():
            del self.parts[key]
        for key, (index, bucket) in division.items():
            known = self.parts.pop(key, None)
            if known is None:
                known = Bucket.of(
                    sites, bucket, cells, self.direction, patched=means is None,
                    features=self.features,
                )  # fmt: skip
            part = known.at(cells, means)
            if part.held + sum(p.held for p in self.parts.values()) <= self.kept_bytes:
                self.parts[key] = part
            yield index, part


class _Work(NamedTuple):
    """What a cell takes, in all pairs."""

    start: tuple[int, int]
    """The first block that must run, and minus the first position that changes."""
    amount: int
    """In positions times blocks."""


def _note(todo: dict[Cell, _Work], part: Bucket, jobs: Sequence[Job]) -> None:
    """Adds up what cells take in some more pairs."""
    for job in jobs:
        *start, number = job
        cell, known = part.cells[number], todo.get(part.cells[number])
        now = _Work((start[0], start[1]), part.work(job))
        todo[cell] = now if known is None else _Work(min(known.start, now.start),
                                                     known.amount + now.amount)  # fmt: skip


def _run_work(model: ModelLike, task: TaskLike) -> int:
    """What a whole run of all pairs takes."""
    return int(task.lengths.sum()) * (len(model.blocks) + 1)


def _measuring(
    direction: str,
    ablation: str,
    neurons: tuple[str, ...],
    features: Mapping[str, Any],
    kept: tuple[str, ...],
    batch_size: int | None,
    model: ModelLike,
    task: TaskLike,
) -> Callable[[list[Cell]], Sweep]:
    """What measures lists of cells in a worker, on runs that it keeps."""
    runs = Runs(model, task, direction, ablation, neurons=neurons, features=features, kept=kept)
    return lambda cells: runs.measure(cells, batch_size=batch_size, progress=False)


def _begun(sweep: Sweep, index: Int[Tensor, " pair"], part: Bucket, bar: Progress) -> list[Job]:
    """What is to run of the cells of a part, which are a sweep's first ones.

    Not what is known, and not what changes nothing.
    """
    if not part.rerun.past:
        bar.say_slow(part.rerun.sites, part.rerun.task)
    eps = torch.finfo(part.rerun.values["final"].dtype).eps
    both = ((part.direction.own, part.rerun.metric), (part.direction.other, part.metric))
    for side, metric in both:
        sweep.note(side, index, metric, eps=eps, noise=part.rerun.noise)
    unknown = sweep.effects[index, : len(part.cells)].isnan().any(0)
    idle, todo = part.plan(unknown.nonzero().flatten().tolist())
    work, runs = sum(map(part.work, todo)), len(todo) * len(index)
    bar.expect(work, len(index), runs=runs, held=part.held)
    sweep.effects[index[:, None], torch.tensor(idle, dtype=torch.long)] = 0.0
    return todo


def _fill(
    sweep: Sweep,
    index: Int[Tensor, " pair"],
    part: Bucket,
    jobs: Sequence[Job],
    prompts: int,
    bar: Progress,
    keep: Callable[[], None],
) -> None:
    """Runs some of the cells of a part."""
    for batch, effects in part.run(jobs, prompts):
        numbers = torch.tensor([number for *_, number in batch])
        sweep.effects[index[:, None], numbers] = effects
        bar.advance(sum(map(part.work, batch)), effects.numel())
        keep()


def _must_exist(made: _Made, cells: Iterable[Cell]) -> None:
    """Refuses cells that the model, or the longest prompt, does not have."""
    sites, length = made.sites, int(made.task.lengths.max())
    layout = sites.layout
    features = {f.site: f for f in made.features}
    some = {(c.component, c.reader): c for c in cells}  # one of each name
    for (name, reader), cell in some.items():
        layer = Component.parse(name).layer
        spot = written_spot(sites, name) if layer < len(sites.blocks) else Spot(0, name)
        found = spot.site in sites.points and spot.number < spot.parts
        if "/" in name:
            of = features.get(spot.site)
            found = of is not None and name in (of.rest, *map(of.name, of.kept))
        if reader and found:
            row, column = layout.row.get(name), layout.column.get(reader)
            found = None not in (row, column) and bool(layout.exists[row, column])
        if not found:
            raise ValueError(
                f"a cell must be a component or an edge of {sites.model_name!r}; got "
                f"{str(cell)!r}; see the components, writers and readers of its scores"
            )
    if late := next((c for c in cells if c.pos >= length), None):
        raise ValueError(
            f"a cell's `pos` must be below the length of the longest prompt, {length}; got "
            f"{str(late)!r}; count from 0"
        )


def ablation_means(
    sites: Sites,
    task: TaskLike,
    names: tuple[str, ...],
    side: str,
    ablation: str,
    prompts: int,
    features: Sequence[Features],
) -> dict[str, Float[Tensor, "#pos d"]]:
    """What replaces a value in a mean ablation, by site: means over one side of all pairs.

    Also of the features that are kept of a site, and of what they leave over.
    """
    if not names or ablation == "zero":
        return {}
    width = int(task.lengths.max())
    totals: dict[str, Tensor] = {}
    for _, pairs in task.buckets(prompts):
        held = observe(sites, pairs, names, side=side)[0]
        for of in features:
            if of.site in held:
                held[of.all], held[of.rest] = of.divided(held)
        for name, value in held.items():
            dtype = torch.promote_types(value.dtype, torch.float32)
            if name not in totals:
                totals[name] = torch.zeros(width, value.shape[-1], dtype=dtype, device=value.device)
            totals[name][: value.shape[1]] += value.to(dtype).sum(0)
    counts = (task.lengths[:, None] > torch.arange(width)).sum(0)[:, None]
    if ablation == "mean":
        return {n: t.sum(0, keepdim=True) / counts.sum().to(t) for n, t in totals.items()}
    return {n: t / counts.to(t) for n, t in totals.items()}
