"""Running a model with some edges only: every other one carries the corrupt run's value.

The run is the clean one. What a reader gets is the corrupt residual stream plus, for each writer
whose edge to it is kept, what that writer adds differently now. All edges give the clean run, none
the corrupt run. Many circuits are rows of one batch, and an edge that lies on no path from the
embedding to the logits changes nothing: what it would carry is the corrupt run's anyway. Where
heads or neurons add to the stream through a norm (post-norm), the exact difference of the norm's
output is split over them, as `DEEPLIFT` does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from relp import TaskLike
from relp.bridge import (
    ROOT,
    ROW_BYTES,
    Basis,
    Edit,
    Matrix,
    Place,
    Sites,
    answers_only,
    as_fits,
    circuit_runs,
    editing,
    exact_changes,
    normed,
    observe,
    output_shapes,
    precise_logits,
    skipping,
    span_index,
    stream_places,
    stream_sites,
    warn_caller,
)

__all__ = ["UNABLE", "Corrupt", "Kept", "circuit_metrics", "doubt", "endpoints"]

ABLE = 0.75
"""Share of the clean prompts that a model which can do a task answers rightly, at least."""
UNABLE = "the model must be able to do the task"
"""How the warning begins that shares of the gap would be shares of noise."""


READ_BYTES = 256 << 20
"""What readers of a place hear is made for as many positions at a time as fit in this."""


Kept = Callable[[Place], Tensor]
"""A circuit: which of the writers that are heard at a place each of its readers hears, `[pos,
heard, column]`, made when it is needed. The position axis has length 1 where all are alike, and
that of the spans for circuits by span."""


@dataclass(frozen=True, eq=False)
class Corrupt:
    """The corrupt run of some pairs of one length."""

    task: TaskLike
    values: Mapping[str, Tensor]
    """The stream, and what is written to it."""
    metric: Float[Tensor, " pair"]
    outputs: Mapping[int, int]
    """How each block returns (see `output_shapes`)."""

    @classmethod
    def of(cls, sites: Sites, task: TaskLike) -> Corrupt:
        """Runs the corrupt prompts."""
        with output_shapes(sites) as outputs:
            values, metric = observe(sites, task, stream_sites(sites), side="corrupt")
        return cls(task, values, metric, outputs)

    def select(self, pairs: Int[Tensor, " chosen"]) -> Corrupt:
        """Some of the pairs, in their order."""
        if len(pairs) == len(self.task):
            return self
        values = {site: value[pairs.to(value.device)] for site, value in self.values.items()}
        metric = self.metric[pairs.to(self.metric.device)]
        return replace(self, task=self.task.select(pairs.tolist()), values=values, metric=metric)


Runs = dict[tuple[int, ...], Corrupt]
"""Corrupt runs that are kept for later, by the numbers of their pairs."""


def endpoints(
    sites: Sites, task: TaskLike, *, runs: Runs | None = None
) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """The metric on the clean and on the corrupt prompts, between which circuits are placed.

    The first corrupt run is left in `runs`: `circuit_metrics` need not repeat it.

    Warns:
        UserWarning: the model cannot do the task, as for `faithfulness`.

    Raises:
        ValueError: the two do not differ, so that there is nothing to recover.
        RuntimeError: all edges together do not give the clean run, on the first pair that is run.
            What breaks it (a hook, a part of the model without edges) breaks it on every pair, and
            trying all would take a single circuit half as long again.
    """
    task.must_fit(sites.model.cfg, sites.model_name)
    clean, corrupt = torch.zeros(2, len(task))
    done = torch.zeros(len(task), dtype=torch.bool)
    runs = {} if runs is None else runs

    def run(rows: int) -> None:
        for index, pairs in task.buckets(rows):
            if bool(done[index].all()):
                continue
            clean[index] = observe(sites, pairs, (), side="clean")[1].float().cpu()
            if bool(done.any()):
                corrupt[index] = observe(sites, pairs, (), side="corrupt")[1].float().cpu()
            else:
                first = runs[tuple(index.tolist())] = Corrupt.of(sites, pairs)
                corrupt[index] = first.metric.float().cpu()
            done[index] = True

    as_fits(run, circuit_runs(sites, task), emptied=runs.clear)
    for index, first in runs.items():
        _must_rebuild(sites, first.select(torch.tensor([0])), clean[[index[0]]])
    if abs(float(clean.mean() - corrupt.mean())) < 1e-6:
        raise ValueError(
            "faithfulness needs a metric that differs between clean and corrupt prompts; both "
            f"average {float(clean.mean()):.4g}; use prompts whose answers differ"
        )
    if said := doubt(task, clean, corrupt):
        warn_caller(said)
    return clean, corrupt


def doubt(
    task: TaskLike,
    clean: Float[Tensor, " pair"],
    corrupt: Float[Tensor, " pair"],
    *,
    ablated: bool = False,
) -> str:
    """Why shares of the gap would be shares of noise, or nothing.

    `ablated`: `corrupt` is of runs in which all is ablated, not of the corrupt prompts.
    """
    gap, pairs = (clean - corrupt).double(), len(clean)
    mean = float(gap.mean())
    # A single pair has no spread, and pairs that all agree leave no doubt about the sign.
    error = float(gap.std()) / pairs**0.5 if pairs > 1 else 0.0
    doubted = abs(mean) < 2 * error and bool((gap > 0).any()) and bool((gap < 0).any())
    right = int((clean > 0).sum())
    if task.metric.compares_answers:
        doubted |= mean < 0 or right < ABLE * pairs or float(clean.mean()) <= 0
    if not doubted:
        return ""
    able = f"it is right on {right} of {pairs} clean prompts, and " * task.metric.compares_answers
    spread = f" ± {error:.2g} (standard error over pairs)" if pairs > 1 else ""
    base = "ablated runs" if ablated else "corrupt prompts"
    return (
        f"{UNABLE}, or circuits explain noise; {able}the gap in "
        f"{task.metric.name!r} between clean and {base} is {mean:.3g}{spread}; use "
        f"{'other or more pairs' if right == pairs else 'task.filter_correct(model)'}, or a model "
        "that can do the task"
    )


# -- running them ----------------------------------------------------------------------------------


def circuit_metrics(
    sites: Sites,
    task: TaskLike,
    circuits: Sequence[Kept] | Bool[Tensor, "circuit pos writer reader"],
    *,
    by_span: bool = False,
    progress: bool = False,
    runs: Runs | None = None,
) -> Float[Tensor, "circuit pair"]:
    """The task's metric of each circuit alone; `by_span`: positions of the circuits are its spans.

    Each batch of pairs takes one corrupt run, however many circuits there are, and blocks before
    the first one in which circuits differ are run for one of them. Where memory runs out, batches
    become smaller, and what is finished is not run again.

    Args:
        sites: of the model.
        task: the pairs.
        circuits: each as a function of places, or as a mask of its edges.
        by_span: see above.
        progress: show a bar.
        runs: corrupt runs that are known, and are used up.
    """
    if isinstance(circuits, Tensor):
        circuits = [partial(_part_of, mask) for mask in circuits]
    known = {} if runs is None else runs
    found = torch.zeros(len(circuits), len(task))
    done = torch.zeros_like(found, dtype=torch.bool)
    with tqdm(total=found.numel(), desc="circuits", unit="run", disable=not progress,
              leave=False) as bar:  # fmt: skip

        def run(rows: int) -> None:
            for index, pairs in task.buckets(rows):
                left = (~done[:, index]).any(1).nonzero().flatten()
                if not len(left):
                    continue
                base = known.pop(tuple(index.tolist()), None) or Corrupt.of(sites, pairs)
                for chosen, places in _alike(pairs, by_span=by_span):
                    some = base.select(chosen)
                    for numbers in left.split(max(1, rows // len(chosen))):
                        cells = numbers[:, None], index[chosen]
                        listed = [circuits[i] for i in numbers.tolist()]
                        found[cells] = _metrics(sites, some, listed, places).float().cpu()
                        done[cells] = True
                        bar.update(int(done.sum()) - bar.n)

        as_fits(run, circuit_runs(sites, task), emptied=known.clear)
    return found


def _part_of(
    mask: Bool[Tensor, "pos writer reader"], place: Place
) -> Bool[Tensor, "pos heard column"]:
    """What a mask of all edges says of one place: with the first argument given, a `Kept`."""
    return mask[:, place.heard, place.columns]


def _alike(
    pairs: TaskLike, *, by_span: bool
) -> Iterator[tuple[Int[Tensor, " pair"], Int[Tensor, " pos"] | None]]:
    """The numbers of pairs that share a run; `by_span`: those whose spans are at the same
    positions, with the number of the span at each."""
    if not by_span:
        yield torch.arange(len(pairs)), None
        return
    index = span_index(pairs.spans, len(pairs), pairs.clean.shape[1])
    for places in index.unique(dim=0):
        yield (index == places).all(1).nonzero().flatten(), places


def _metrics(
    sites: Sites,
    corrupt: Corrupt,
    circuits: Sequence[Kept],
    places: Int[Tensor, " pos"] | None = None,
) -> Float[Tensor, "circuit pair"]:
    """The metric of circuits that share a batch."""
    first = _first_difference(sites, circuits)
    if first:
        once = _Run.of(sites, corrupt, circuits[:1], places)
        once.run(range(first))
        run = once.followed_by(circuits, 0)
    else:
        run = _Run.of(sites, corrupt, circuits, places)
    return run.metric(range(first, len(sites.blocks)))


def _first_difference(sites: Sites, circuits: Sequence[Kept]) -> int:
    """The first block in which readers of two circuits hear different writers; 0 for one alone."""
    if len(circuits) == 1:
        return 0
    for place in stream_places(sites):
        one, *others = (circuit(place) for circuit in circuits)
        if any(bool((one != other).any()) for other in others):
            return place.layer
    return len(sites.blocks)


def _must_rebuild(sites: Sites, corrupt: Corrupt, clean: Float[Tensor, " pair"]) -> None:
    """Tries on a pair that all edges together give the clean run.

    Raises:
        RuntimeError: they do not.
    """
    layout, every = sites.layout, sites.layout.exists[None]
    late = {*sites.blocks[-1].readers, "logits.in"}
    beside = every & torch.tensor([reader not in late for reader in layout.readers])
    none, whole, most = (partial(_part_of, m) for m in (torch.zeros_like(every), every, beside))
    found: list[Tensor] = []

    def run(rows: int) -> None:
        # Behind a circuit that differs everywhere: a hook that acts on the first row of a batch
        # misses it. And beside one that differs at the end only, the blocks before being skipped.
        blocks = range(len(sites.blocks))
        run = _Run.of(sites, corrupt, [none, whole][-rows:])
        found[:] = [run.metric(blocks)[-1]]
        found.append(run.followed_by([whole, most][:rows], rows - 1).metric(blocks[-1:])[0])

    as_fits(run, 2, emptied=found.clear)
    error = max(float((metric.float().cpu() - clean).abs().max()) for metric in found)
    if error > 1e-2 * max(1.0, float(clean.abs().max())):
        raise RuntimeError(
            "all edges together must give the clean run; the rebuilt run's metric misses it by "
            f"{error:.2g}; remove hooks that change activations, or run the model in float32"
        )


@dataclass(frozen=True, eq=False)
class _Run:
    """A few circuits on the clean prompts of a few pairs of one length: the rows of one batch."""

    sites: Sites
    corrupt: Corrupt
    """The corrupt run of the pairs."""
    circuits: Sequence[Kept]
    places: Int[Tensor, " pos"] | None
    """The span at each position, for circuits by span."""
    written: _Written
    projected: dict[str, Tensor] = field(default_factory=dict)
    """What a place's readers hold behind their matrices, until the model comes to these."""

    @classmethod
    def of(
        cls,
        sites: Sites,
        corrupt: Corrupt,
        circuits: Sequence[Kept],
        places: Int[Tensor, " pos"] | None = None,
    ) -> _Run:
        """Before any block has run."""
        written = _Written.of(sites, corrupt.values, len(circuits))
        return cls(sites, corrupt, circuits, places, written)

    def followed_by(self, circuits: Sequence[Kept], number: int) -> _Run:
        """Others that are as one of these in all blocks that have run."""
        pairs = len(self.corrupt.task)
        written = self.written.repeated(slice(number * pairs, (number + 1) * pairs), len(circuits))
        return replace(self, circuits=circuits, written=written, projected={})

    def metric(self, layers: range) -> Float[Tensor, "circuit pair"]:
        """The metric of each circuit."""
        pairs = self.corrupt.task
        return torch.stack([pairs.metric(part) for part in self.run(layers).split(len(pairs))])

    def run(self, layers: range) -> Float[Tensor, "row read d_vocab"]:
        """The logits at the end of a run in which only some blocks take part."""
        pairs, copies = self.corrupt.task, len(self.circuits)
        edits: dict[str, Edit] = answers_only(self.sites, pairs, copies)
        if 0 in layers:
            edits[ROOT] = partial(self.written.note, EMBEDDING, ROOT)
        for place in stream_places(self.sites):
            if place.layer in layers or place.entry == "final":
                edits |= self.edits(place)
        tokens = pairs.clean.to(self.sites.device).repeat(copies, 1)
        others = [b.layer for b in self.sites.blocks if b.layer not in layers]
        with (
            torch.no_grad(),
            precise_logits(self.sites),
            skipping(self.sites, others, self.corrupt.outputs),
            editing(self.sites, edits),
        ):
            logits: Tensor = self.sites.model(tokens)
        return logits

    def edits(self, place: Place) -> dict[str, Edit]:
        """What readers of a place get is put in, and what its writers hold is noted."""
        basis = place.basis
        found: dict[str, Edit] = {}
        for slot in basis.slots:
            if slot.readers:
                found |= {m.site: partial(self.project, place, m) for m in slot.through}
        if basis.entry:
            found[basis.entry] = partial(self.read, place)
        if place.rows.start < place.rows.stop:  # the logits write nothing
            found |= {site: partial(self.written.note, place, site) for site in basis.holding}
        return found

    # what readers get

    def read(self, place: Place, _: Tensor) -> Tensor:
        """What a module as a whole, or the rest of it, gets in every circuit."""
        found = []
        for circuit in range(len(self.circuits)):
            parts = self.inputs(circuit, place, slice(-1, None))
            found.append(torch.cat([x[0] for x, _ in parts], 1))
        return torch.cat(found)

    def project(self, place: Place, matrix: Matrix, value: Tensor) -> Tensor:
        """A site at which each part holds what follows from its own input; all sites of a place
        are made at the first."""
        slots = [slot for slot in place.basis.slots if slot.readers]
        if not self.projected:
            sizes = [len(slot.readers) for slot in slots]
            found: dict[str, list[Tensor]] = defaultdict(list)
            for circuit in range(len(self.circuits)):
                held: dict[str, list[Tensor]] = defaultdict(list)
                for x, row in self.inputs(circuit, place, slice(sum(sizes))):
                    for slot, rows in zip(slots, row.split(sizes), strict=True):
                        for site, part in slot.project(x[rows], range(len(rows))).items():
                            held[site].append(part)
                for site, parts in held.items():
                    found[site].append(torch.cat(parts, 2))
            self.projected.update({site: torch.cat(parts, 1) for site, parts in found.items()})
        (numbers,) = (slot.numbers for slot in slots if matrix in slot.through)
        return matrix.replaced(value, numbers, self.projected.pop(matrix.site))

    def inputs(
        self, circuit: int, place: Place, columns: slice
    ) -> Iterator[tuple[Float[Tensor, "row pair pos d_model"], Int[Tensor, " reader"]]]:
        """What some readers of one place get in one circuit, behind their norm, and each reader's
        row: those who hear the same share it. A few positions at a time."""
        residual = self.corrupt.values[place.entry]
        keep = self.circuits[circuit](place)[:, :, columns].to(self.sites.device)
        keep = keep if self.places is None else keep[self.places.to(keep.device)]
        keep, row = torch.unique(keep, dim=2, return_inverse=True)
        pairs, length, d_model = residual.shape
        rows = slice(circuit * pairs, (circuit + 1) * pairs)
        values = max(keep.shape[2], self.written.together) * pairs * d_model
        for some in torch.arange(length).split(max(1, READ_BYTES // (4 * values))):
            at = slice(int(some[0]), int(some[-1]) + 1)
            heard = self.written.heard(keep if len(keep) == 1 else keep[at], rows, at)
            x = heard.to(residual.device).add_(residual[:, at]).to(residual.dtype)
            yield normed(place.basis, x), row


EMBEDDING = Place(Basis(ROOT, None, entry=ROOT), -1, ROOT, slice(0), slice(0, 1), slice(0))
"""Where the embedding is written, as a place at which nothing is read."""


@dataclass(eq=False)
class _Written:
    """What each writer adds now, minus what it added in the corrupt run.

    Of long prompts that is many times the activations of a run. Then only what the modules hold
    differently is kept (heads their `d_head` values), and multiplied out whenever it is heard.
    """

    places: tuple[Place, ...]
    """All at which something is written."""
    base: Mapping[str, Tensor]
    """The corrupt run."""
    wide: Float[Tensor, "writer row pos d_model"] | None
    """What the writers so far add; None where that is too much."""
    steps: dict[str, Float[Tensor, "row pos d"]] = field(default_factory=dict)
    """What modules hold differently at each site, if what they add is not kept."""
    filled: int = 0
    """How many writers have written."""
    aside: bool = False
    """A norm is asked what it would give: what passes its site then is not the run's."""

    @classmethod
    def of(cls, sites: Sites, base: Mapping[str, Tensor], circuits: int) -> _Written:
        """Before anything is written."""
        places = (EMBEDDING, *(p for p in stream_places(sites) if p.rows.start < p.rows.stop))
        pairs, *shape = base["final"].shape
        wide = (len(sites.layout.writers), circuits * pairs, *shape)
        if 4 * math.prod(wide) > ROW_BYTES * circuits * pairs:
            return cls(places, base, None)
        return cls(places, base, torch.empty(wide, device=sites.device))

    @property
    def together(self) -> int:
        """How many writers are multiplied out at a time."""
        return 0 if self.wide is not None else max(p.rows.stop - p.rows.start for p in self.places)

    def repeated(self, rows: slice, times: int) -> _Written:
        """What some of the rows hold, several times."""
        steps = {site: step[rows].repeat(times, 1, 1) for site, step in self.steps.items()}
        if self.wide is None:
            return replace(self, steps=steps)
        known = self.wide[: self.filled, rows]
        wide = known.new_empty(len(self.wide), times * known.shape[1], *known.shape[2:])
        wide[: self.filled] = known.repeat(1, times, 1, 1)
        return replace(self, wide=wide, steps=steps)

    def note(self, place: Place, site: str, value: Tensor) -> Tensor:
        """Notes what a site holds; the model goes on with it."""
        if self.aside:
            return value
        base = self.base[site].float()
        self.steps[site] = (value.float().unflatten(0, (-1, len(base))) - base).flatten(0, 1)
        if site == place.basis.holding[-1]:
            if self.wide is not None:
                self.wide[place.rows] = self.added(place, slice(None), slice(None))
                self.steps.clear()
            self.filled = place.rows.stop
        return value

    def added(
        self, place: Place, rows: slice, at: slice
    ) -> Float[Tensor, "writer row pos d_model"]:
        """What the writers of a place add: the last, what its other parts do not."""
        basis, behind = place.basis, None
        steps = [self.steps[site][rows, at] for site in basis.holding]
        if not basis.parts:
            return steps[0][None]
        if basis.post is not None:
            behind = self.base[basis.behind][:, at]
            behind = behind.repeat(len(steps[0]) // len(behind), 1, 1)
        self.aside = True
        parts = exact_changes(basis, steps[0], behind)
        self.aside = False
        return torch.cat([parts, *(whole[None] - parts.sum(0) for whole in steps[1:])])

    def changes(
        self, wanted: Bool[Tensor, " heard"], rows: slice, at: slice
    ) -> Iterator[tuple[slice, Float[Tensor, "writer row pos d_model"]]]:
        """What the first writers add: all of them, or place by place, where some are wanted."""
        if self.wide is not None:
            yield slice(len(wanted)), self.wide[: len(wanted), rows, at]
            return
        for place in self.places:
            if place is EMBEDDING or bool(wanted[place.rows].any()):
                yield place.rows, self.added(place, rows, at)

    def heard(
        self, keep: Bool[Tensor, "place heard reader"], rows: slice, at: slice
    ) -> Float[Tensor, "reader row pos d_model"]:
        """The sum over the writers whom each reader hears."""
        wanted = keep.any(2).any(0)
        found: Tensor | None = None
        for writers, change in self.changes(wanted, rows, at):
            some, which = keep[:, writers], wanted[writers].nonzero().flatten()
            if 4 * len(which) < len(change):  # reading all takes longer than copying these
                some, change = some[:, which], change[which]
            if len(some) == 1:
                more = (some[0].T.float() @ change.flatten(1)).unflatten(1, change.shape[1:])
            else:
                more = einsum(some.float(), change, "t w r, w p t d -> r p t d")
            found = more if found is None else found.add_(more)
        assert found is not None
        return found
