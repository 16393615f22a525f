"""Exact effects: the ground truth that scores are judged by.

A cell is one thing to change in one run: a component, or what one reader hears of one writer, at
one position or at all. `Runs` has both runs of every pair, and measures lists of cells on them:
those that start in the same block are rows of one batch, and it can be interrupted. A cell that
changes nothing (all that comes before the first token that differs) is not run.

A node's cell overwrites the component's value, and everything after it is computed anew. An edge's
cell (path patching, arXiv:2304.05969) leaves the writer's value alone: one reader's input is
rebuilt as the own residual stream plus what the writer would add differently, and everything after
that reader is computed anew. It is what an edge score estimates. Heads that add through a norm
(post-norm) would add their shares of the exact difference of its output: as in `faithfulness`, and
as `DEEPLIFT` attributes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import find_executable_batch_size, should_reduce_batch_size
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from circuits.exact.cells import EVERYWHERE, Cell
from circuits.exact.progress import Progress
from circuits.exact.sweep import Sweep, identity, safetensors_path
from relp.attribution import edge_sites, head_changes, head_outputs, provenance
from relp.bridge.rerun import POINTWISE, Rerun, entries
from relp.bridge.run import observe, undisturbed
from relp.bridge.sites import Edit, Sites, bias, weight
from relp.choices import OWN, check_ablation, check_direction, check_level
from relp.layout import Component
from relp.scores import ALL_POSITIONS, Effects

__all__ = ["Runs", "measure", "patch"]

BATCH_BYTES = 24 << 20
"""Activations of one batch on a CPU, where larger ones were not faster; elsewhere memory is what
the device has, and a batch that does not fit is made smaller."""
DEVICE_BYTES = 4 << 30
PAIR_BYTES = 512 << 20
"""Activations of both runs that are kept: for the pairs at work, and for later lists of cells."""
OTHER = {"clean": "corrupt", "corrupt": "clean"}
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
) -> Effects:
    """Measures what patching each component or edge does to the metric.

    >>> effect = patch(model, task)            # nodes [pair, component, pos], as attribute's
    >>> effect = patch(model, task, components=["head", "L3.mlp", "L3N17"])
    >>> effect = patch(model, task, level="edge", edges=[("L5H5", "L9H6.q")])

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
    check_level(level)
    if (components if level == "edge" else edges) is not None:
        raise ValueError(
            "`components` is for nodes and `edges` for edges; got the other one with "
            f"level={level!r}; choose the level that you want"
        )
    sites = Sites.of(model)
    by_position = level == "node" if positions is None else positions
    places = range(int(task.lengths.max())) if by_position else [EVERYWHERE]
    named = _edges(sites, edges) if level == "edge" else [(n, "") for n in sites.chosen(components)]
    cells = [Cell(name, reader, pos) for name, reader in named for pos in places]
    sweep = measure(model, task, cells, direction=direction, ablation=ablation, resume=resume,
                    batch_size=batch_size, progress=progress)  # fmt: skip
    labels = provenance(sites, task, direction, {"clean": sweep.clean, "corrupt": sweep.corrupt})
    labels["rules"] = "exact" if ablation == "patch" else f"exact ({ablation} ablation)"
    labels["resolution"] = float(sweep.resolution.mean())
    effects = sweep.effects.unflatten(1, (len(named), len(places)))
    if level == "edge":
        table = _tabled(sites, named, effects.mean(0).T)
        table = table if by_position else table[0]
        return Effects(writers=sites.writers, readers=sites.readers, edges=table, **labels)
    labels["tokens"] = labels["tokens"] if by_position else ALL_POSITIONS
    return Effects(components=tuple(name for name, _ in named), nodes=effects, **labels)


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
    """The effect of each cell on each pair; arguments and errors as for `patch` and `Runs`."""
    runs = Runs(model, task, direction, ablation, kept_bytes=0)
    return runs.measure(cells, resume=resume, batch_size=batch_size, progress=progress)


# -- both runs -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Runs:
    """Both runs of every pair of a task, kept: what lists of cells are measured on.

    >>> runs = Runs(model, task)
    >>> first = runs.measure([Cell("L9H6", pos=14)])
    >>> second = runs.measure([Cell("L9H6", pos=p) for p in range(15)])    # both runs are there

    If the model has changed in between (weights, hooks), its runs are made anew. The arguments are
    those of `patch`.

    Args:
        kept_bytes: of activations, kept for later lists, those of the first pairs that fit; runs of
            the others are made anew.

    Raises:
        TypeError: the model is no `TransformerBridge`.
        ValueError: an argument is wrong, the model is in train mode, or cannot take the prompts.
    """

    model: Any
    task: Any
    direction: str = "denoise"
    ablation: str = "patch"
    _: KW_ONLY
    kept_bytes: int = PAIR_BYTES
    _made: list[_Made] = field(default_factory=list, init=False)
    """One at most: of the model as it was."""

    def __post_init__(self) -> None:
        check_direction(self.direction)
        check_ablation(self.ablation)
        sites = Sites.of(self.model)
        self.task.must_fit(sites.model.cfg, sites.model_name)

    def measure(
        self,
        cells: Sequence[Cell],
        *,
        resume: str | Path | None = None,
        batch_size: int | None = None,
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
        def swept(model: Any) -> Sweep:
            made = self._renewed(Sites.of(model))
            _must_exist(made.sites, self.task, cells)
            sweep = Sweep.begun(path, made.identity, cells, len(self.task))
            with sweep.kept(path) as keep, Progress(len(self.task), shown=progress) as bar:

                def run(prompts: int) -> None:
                    bar.begin()
                    for index, part in made.divided(cells, prompts):
                        _fill(sweep, index, part, prompts, bar, keep)

                size = batch_size or _prompts(made.sites, self.task)
                try:
                    _as_fits(run, size, made.parts)
                except KeyboardInterrupt as stop:
                    raise KeyboardInterrupt(sweep.interrupted(path)) from stop
            return sweep.of(cells)

        return swept(self.model)

    def _renewed(self, sites: Sites) -> _Made:
        """What was made of the model, or what will be, if it is another by now."""
        own = OWN[self.direction]
        state = _state(sites, self.task, own) if self.kept_bytes else ()
        if not self._made or not self.kept_bytes or state != self._made[0].state:
            labels = identity(sites, self.task, self.direction, self.ablation)
            made = _Made(sites, self.task, own, self.ablation, self.kept_bytes, labels, state)
            self._made[:] = [made]
        return self._made[0]


def _as_fits(run: Callable[[int], None], prompts: int, kept: dict[Any, Any]) -> None:
    """Runs again with fewer prompts if memory runs out; what is finished stays finished."""
    try:
        return run(prompts)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
    # not from the start: it collects garbage first, which takes longer than a short list of cells
    kept.clear()
    find_executable_batch_size(run, starting_batch_size=int(prompts * 0.9))()


def _state(sites: Sites, task: Any, side: str) -> tuple[Any, ...]:
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
    task: Any
    own: str
    """`clean` or `corrupt`: in which run cells change something."""
    ablation: str
    kept_bytes: int
    identity: Mapping[str, str]
    state: tuple[Any, ...]
    means: dict[str, Tensor] = field(default_factory=dict)
    """What replaces a value in a mean ablation, by site."""
    parts: dict[tuple[int, ...], _Part] = field(default_factory=dict)
    """By the numbers of their pairs."""

    def divided(
        self, cells: tuple[Cell, ...], prompts: int
    ) -> Iterator[tuple[Int[Tensor, " pair"], _Part]]:
        """All pairs, as many of one length at a time as run at once or can be kept."""
        sites, task, means = self.sites, self.task, None
        if self.ablation != "patch":
            new = tuple(n for n in _needed(sites, cells)[0] if n not in self.means)
            self.means.update(_means(sites, task, new, OTHER[self.own], self.ablation, prompts))
            means = self.means
        pairs = min(prompts, _pairs_kept(sites, task, cells))
        division = {tuple(i.tolist()): (i, bucket) for i, bucket in task.buckets(pairs)}
        for key in self.parts.keys() - division.keys():
            del self.parts[key]
        for key, (index, bucket) in division.items():
            known = self.parts.pop(key, None)
            if known is None:
                known = _Part.of(sites, bucket, cells, self.own, patched=means is None)
            part = known.at(cells, means)
            if part.held + sum(p.held for p in self.parts.values()) <= self.kept_bytes:
                self.parts[key] = part
            yield index, part


def _fill(
    sweep: Sweep,
    index: Int[Tensor, " pair"],
    part: _Part,
    prompts: int,
    bar: Progress,
    keep: Callable[[], None],
) -> None:
    """Runs what a sweep does not know of the cells of a part, which are its first ones."""
    if not part.rerun.past:
        bar.say_slow(part.rerun.sites, part.rerun.task)
    eps = torch.finfo(part.rerun.values["final"].dtype).eps
    own = part.rerun.side
    for side, metric in ((own, part.rerun.metric), (OTHER[own], part.metric)):
        sweep.note(side, index, metric, eps=eps, noise=part.rerun.noise)
    unknown = sweep.effects[index, : len(part.cells)].isnan().any(0)
    idle, todo = part.plan(unknown.nonzero().flatten().tolist())
    bar.expect(sum(map(part.work, todo)), len(index))
    sweep.effects[index[:, None], torch.tensor(idle, dtype=torch.long)] = 0.0
    for batch, effects in part.run(todo, prompts):
        numbers = torch.tensor([number for *_, number in batch])
        sweep.effects[index[:, None], numbers] = effects
        bar.advance(sum(map(part.work, batch)), effects.numel())
        keep()


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


def _read(sites: Sites, reader: str) -> Spot:
    """Where what a reader gets is, as far as it is its own."""
    (_, kind, layer, number), slot = Component.of_reader(reader)
    if kind == "logits":
        return Spot(len(sites.blocks), "final")
    block = sites.blocks[layer]
    if kind in ("mlp", "mixer"):
        return Spot(layer, block.name(f"{kind}_in"))
    return Spot(layer, block.name(slot), number, block.heads if slot == "q" else block.kv_heads)


def _edges(sites: Sites, wanted: Sequence[tuple[str, str]] | None) -> tuple[tuple[str, str], ...]:
    """The chosen edges of the model as `(writer, reader)`."""
    writers, readers = sites.layout.writers, sites.layout.readers
    known = tuple((writers[w], readers[r]) for r, w in sites.layout.exists.T.nonzero().tolist())
    if wanted is None:
        return known
    chosen = tuple(dict.fromkeys(tuple(edge) for edge in wanted))
    neurons = {name for b in sites.blocks for name in b.neuron_names}
    for name in (name.removesuffix(".in") for edge in chosen for name in edge):
        if name in neurons:
            raise ValueError(
                "`edges` must be between heads, whole MLPs, the embedding and the logits; got the "
                f"neuron {name!r}, whose edges are not measured; use those of its MLP, "
                f"level='node' with components=[{name!r}], or the scores of "
                f"attribute(level='edge', neurons=[{name!r}])"
            )
    existing = set(known)
    unknown = [edge for edge in chosen if edge not in existing] if chosen else ["none"]
    if unknown:
        raise ValueError(
            f"`edges` must be pairs (writer, reader) such as {known[-1]}; got {unknown[0]!r}; see "
            "Scores.writers and Scores.readers, and let the writer come before the reader"
        )
    return tuple((writer, reader) for writer, reader in chosen)


def _tabled(
    sites: Sites, edges: Sequence[tuple[str, str]], effects: Float[Tensor, "pos edge"]
) -> Float[Tensor, "pos writer reader"]:
    """Effects in the table of all edges: NaN where one is not measured, 0 where there is none."""
    layout = sites.layout
    table = torch.where(layout.exists, torch.nan, 0.0).repeat(len(effects), 1, 1)
    rows, columns = torch.tensor([(layout.row[w], layout.column[r]) for w, r in edges]).T
    table[:, rows, columns] = effects
    return table


def _needed(sites: Sites, cells: Sequence[Cell]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites of what cells replace, and those that the input of readers is rebuilt from."""
    written = {_written(sites, name).site: None for name in {c.component: None for c in cells}}
    return tuple(written), edge_sites(sites) if any(c.reader for c in cells) else ()


def _must_exist(sites: Sites, task: Any, cells: Iterable[Cell]) -> None:
    """Refuses cells that the model, or the longest prompt, does not have."""
    layout, length = sites.layout, int(task.lengths.max())
    some = {(c.component, c.reader): c for c in cells}  # one of each name
    for (name, reader), cell in some.items():
        layer = Component.parse(name).layer
        spot = _written(sites, name) if layer < len(sites.blocks) else Spot(0, name)
        found = spot.site in sites.points and spot.number < spot.parts
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


# -- some pairs ------------------------------------------------------------------------------------


def _replacements(
    rerun: Rerun, names: tuple[str, ...], means: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """What replaces own values: means, 0 without one, or the other run's if `means` is None."""
    if means is None:
        other = OTHER[rerun.side]
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
    changed: Mapping[str, tuple[int, ...]]
    """At which positions replacing a component's value is any change."""
    changes: Mapping[str, Tensor]
    """What each writer would add differently `[pair, pos, d_model]`; empty without edges."""
    rebuilt: frozenset[str]
    """Readers whose input, made of the parts of the own run, is what they get."""

    @classmethod
    def of(
        cls, sites: Sites, task: Any, cells: tuple[Cell, ...], own: str, *, patched: bool
    ) -> _Part:
        """Runs both sides; `patched`: the values of the other one are those that replace."""
        written, read = _needed(sites, cells)
        rerun = Rerun.of(sites, task, (*written, *read), side=own)
        instead, metric = observe(sites, task, written if patched else (), side=OTHER[own])
        return cls(rerun, metric, instead, (), (), {}, {}, frozenset())

    def at(self, cells: tuple[Cell, ...], means: Mapping[str, Tensor] | None) -> _Part:
        """The same pairs with these cells; a site that they need and that is not held is run.

        `means`: what replaces values, 0 where there is none; the other run's values if None.
        """
        sites, task, rerun = self.rerun.sites, self.rerun.task, self.rerun
        written, read = _needed(sites, cells)
        if new := tuple(n for n in dict.fromkeys((*written, *read)) if n not in rerun.values):
            found, _ = observe(sites, task, new, side=rerun.side)
            rerun = replace(rerun, values={**rerun.values, **found})
        absent = tuple(n for n in written if n not in self.instead)
        instead = {**self.instead, **_replacements(rerun, absent, means)}
        spots = {c.component: _written(sites, c.component) for c in cells}
        new_spots = {n: spot for n, spot in spots.items() if n not in self.changed}
        changed = {n: _changed(rerun.values, instead, spot) for n, spot in new_spots.items()}
        readers = {c.reader: _read(sites, c.reader) for c in cells if c.reader}
        if unchecked := readers.keys() - self.rebuilt:
            _must_be_known(sites, rerun.values, unchecked)
        writers = {c.component: None for c in cells if c.reader and c.component not in self.changes}
        changes = _writer_changes(sites, rerun.values, instead, writers)
        return replace(
            self,
            rerun=rerun,
            instead=instead,
            cells=cells,
            spots=tuple(readers[c.reader] if c.reader else spots[c.component] for c in cells),
            changed={**self.changed, **changed},
            changes={**self.changes, **changes},
            rebuilt=self.rebuilt.union(readers),
        )

    @property
    def held(self) -> int:
        """Bytes of activations."""
        rerun = self.rerun
        tensors = chain(rerun.values.values(), self.instead.values(), self.changes.values(),
                        chain.from_iterable(rerun.past))  # fmt: skip
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        return sum(storages.values())

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
                (writes[i], [row] * len(places[i]), [pos - start for pos in places[i]])
                for row, i in enumerate(numbers)
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

    def _writes(self, batch: Mapping[int, Sequence[int]]) -> dict[int, _Write]:
        """What each cell writes at its positions."""
        by_site: dict[str, list[int]] = {}
        for number in batch:
            by_site.setdefault(self.spots[number].site, []).append(number)
        writes = {}
        for site, numbers in by_site.items():
            width = self.rerun.values[site].shape[-1]
            for number, value in zip(numbers, self._values(numbers), strict=True):
                new = value.transpose(0, 1)[list(batch[number])]
                writes[number] = _Write(site, self.spots[number].part(width), new)
        return writes

    def _handed_on(self, batch: Mapping[int, Sequence[int]]) -> dict[int, _Write]:
        """The same, seen behind the cells' block: what it hands on at these positions."""
        if not batch:
            return {}
        writes, places = self._writes(batch), [p for at in batch.values() for p in at]
        free = iter(range(len(places)))
        rows = [(writes[i], [next(free) for _ in at], [0] * len(at)) for i, at in batch.items()]
        layer = self.spots[next(iter(batch))].layer
        streams = self.rerun.behind(_edits(rows, len(places)), layer=layer, places=places)
        site = entries(self.rerun.sites)[layer + 1]
        each = streams.split([len(at) for at in batch.values()])
        return {i: _Write(site, slice(None), new) for i, new in zip(batch, each, strict=True)}

    def _values(self, numbers: Sequence[int]) -> Iterable[Float[Tensor, "pair pos part"]]:
        """What cells that write at one site write there, at all positions."""
        cells, spots = [self.cells[i] for i in numbers], [self.spots[i] for i in numbers]
        if not cells[0].reader:
            value = self.instead[spots[0].site]
            return [value[..., spot.part(value.shape[-1])] for spot in spots]
        sites, own = self.rerun.sites, self.rerun.values
        heard = torch.stack([self.changes[c.component] for c in cells])
        stream = own[_entry(sites, spots[0])]
        return _received(sites, spots, stream + heard.to(stream))


class _Write(NamedTuple):
    """What a cell puts where."""

    site: str
    part: slice
    value: Float[Tensor, "place pair part"]


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


def _entry(sites: Sites, spot: Spot) -> str:
    """The residual stream that a reader reads."""
    if spot.layer == len(sites.blocks):
        return "final"
    block = sites.blocks[spot.layer]
    middle = spot.site == block.name("mlp_in") and not block.parallel
    return block.name("mid" if middle else "resid")


def _received(
    sites: Sites, spots: Sequence[Spot], streams: Float[Tensor, "reader pair pos d_model"]
) -> Float[Tensor, "reader pair pos part"]:
    """What readers at one site get when each reads a stream of its own."""
    layer, site, _, heads = spots[0]
    if layer == len(sites.blocks):
        return streams
    block = sites.blocks[layer]
    norm = block.mlp_norm if site == block.name("mlp_in") else block.norm
    with torch.no_grad():
        x = streams if norm is None else norm(streams.flatten(0, 1)).view_as(streams)
    projection = {name: module for name, module, _ in block.attention_readers}.get(site)
    if projection is None:
        return x
    at = [spot.number for spot in spots]
    w = rearrange(weight(projection), "(h d) m -> h d m", h=heads)[at]
    x = torch.einsum("rptm,rdm->rptd", x, w.to(x.dtype))
    offset = bias(projection)
    return x if offset is None else x + rearrange(offset, "(h d) -> h 1 1 d", h=heads)[at]


def _writer_changes(
    sites: Sites, own: Mapping[str, Tensor], instead: Mapping[str, Tensor], writers: Iterable[str]
) -> dict[str, Float[Tensor, "pair pos d_model"]]:
    """What writers would add to the residual stream, less what they add."""
    changes: dict[str, Tensor] = {}
    by_site: dict[str, list[str]] = {}
    for writer in writers:
        by_site.setdefault(_written(sites, writer).site, []).append(writer)
    for site, names in by_site.items():
        step = instead[site] - own[site]
        if Component.parse(names[0]).kind != "head":
            changes[names[0]] = step
            continue
        block = sites.blocks[Component.parse(names[0]).layer]
        added = head_changes(block, step, own.get(block.name("heads")))
        changes |= {name: added[_written(sites, name).number] for name in names}
    return changes


def _must_be_known(sites: Sites, own: Mapping[str, Tensor], readers: Iterable[str]) -> None:
    """Edges are rebuilt outside the model, so its own run must come out of the same parts."""
    for block, after in zip(sites.blocks, entries(sites)[1:], strict=True):
        mixed = own[block.name("z" if block.heads else "mixer")]
        if block.heads:
            mixed, offset = head_outputs(block, mixed).sum(0), bias(block.o)
            mixed = mixed if offset is None else mixed + offset
        if block.attn_post is not None:
            _must_equal(mixed, own[block.name("heads")], f"what heads of block {block.layer} add")
            mixed = own[block.name("attn")]
        added = mixed + own[block.name("mlp")] if block.mlp else mixed
        _must_equal(own[block.name("resid")] + added, own[after], f"what block {block.layer} adds")
    for reader in readers:
        spot = _read(sites, reader)
        found = _received(sites, [spot], own[_entry(sites, spot)][None])[0]
        value = own[spot.site]
        _must_equal(found, value[..., spot.part(value.shape[-1])], f"what {reader} reads")


def _must_equal(found: Tensor, expected: Tensor, what: str) -> None:
    error = float((found - expected).abs().max())
    scale = float(expected.abs().max())
    if error > max(1e-3, 8 * torch.finfo(expected.dtype).eps) * max(scale, 1e-6):
        raise RuntimeError(
            f"{what} must be what the model computes; rebuilt it misses by {error:.2g} of "
            f"{scale:.2g}; remove hooks that change activations, or use level='node' for this model"
        )


# -- memory ----------------------------------------------------------------------------------------


def _prompts(sites: Sites, task: Any) -> int:
    """Prompts in one forward pass."""
    values = 12 * int(sites.model.cfg.d_model)
    if not task.metric.reads_answer_only:
        values += int(sites.model.cfg.d_vocab)
    memory = BATCH_BYTES if sites.device.type == "cpu" else DEVICE_BYTES
    return max(1, memory // (4 * int(task.lengths.max()) * values))


def _pairs_kept(sites: Sites, task: Any, cells: Sequence[Cell]) -> int:
    """Pairs whose activations are kept at a time."""
    edges = any(c.reader for c in cells)
    values = (20 * len(sites.blocks) + len(sites.writers) * edges) * int(sites.model.cfg.d_model)
    return max(1, PAIR_BYTES // (4 * int(task.lengths.max()) * values))


def _means(
    sites: Sites, task: Any, names: tuple[str, ...], side: str, ablation: str, prompts: int
) -> dict[str, Float[Tensor, "#pos d"]]:
    """What replaces a value in a mean ablation, by site: means over one side of all pairs."""
    if not names or ablation == "zero":
        return {}
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
