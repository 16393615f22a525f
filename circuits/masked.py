"""Running a model with some edges only: every other one carries the corrupt run's value.

The run is the clean one. What a reader gets is the corrupt residual stream plus, for each writer
whose edge to it is kept, what that writer adds differently now. All edges give the clean run, none
the corrupt run. Many circuits are rows of one batch, and an edge that lies on no path from the
embedding to the logits changes nothing: what it would carry is the corrupt run's anyway. Where
heads or neurons add to the stream through a norm (post-norm), the exact difference of the norm's
output is split over them, as `DEEPLIFT` does.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import networkx as nx
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.graph import check_circuit, real_edges
from relp import ModelLike, TaskLike
from relp.bridge import (
    ROOT,
    Edit,
    Matrix,
    Place,
    Sites,
    answers_only,
    circuit_runs,
    editing,
    exact_changes,
    normed,
    observe,
    output_shapes,
    precise_logits,
    skipping,
    span_index,
    span_places,
    stream_places,
    stream_sites,
    warn_caller,
)

__all__ = [
    "UNABLE",
    "circuit_masks",
    "circuit_metrics",
    "circuit_sites",
    "doubt",
    "endpoints",
    "kept_by_span",
]

ABLE = 0.75
"""Share of the clean prompts that a model which can do a task answers rightly, at least."""
UNABLE = "the model must be able to do the task"
"""How the warning begins that shares of the gap would be shares of noise."""


def endpoints(
    sites: Sites, task: TaskLike
) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """The metric on the clean and on the corrupt prompts, between which circuits are placed.

    Warns:
        UserWarning: the model cannot do the task, as for `faithfulness`.

    Raises:
        ValueError: the two do not differ, so that there is nothing to recover.
        RuntimeError: all edges together do not give the clean run, on the first pair. What breaks
            it (a hook, a part of the model without edges) breaks it on every pair, and trying all
            would take a single circuit half as long again.
    """
    task.must_fit(sites.model.cfg, sites.model_name)
    metrics = {side: torch.zeros(len(task)) for side in ("clean", "corrupt")}
    for side, values in metrics.items():
        for index, batch in task.buckets(circuit_runs(sites, task)):
            values[index] = observe(sites, batch, (), side=side)[1].float().cpu()
    clean, corrupt = metrics["clean"], metrics["corrupt"]
    every = sites.layout.exists
    late = {*sites.blocks[-1].readers, "logits.in"}
    # Beside a circuit that differs at the end only, so that the blocks before are skipped; and
    # behind one that differs everywhere: a hook that acts on the first row of a batch misses it.
    beside = every & torch.tensor([reader not in late for reader in sites.layout.readers])
    error = 0.0
    for masks, at in (([every, beside], 0), ([torch.zeros_like(every), every], 1)):
        found = circuit_metrics(sites, task.select([0]), torch.stack(masks)[:, None])
        error = max(error, float((found[at] - clean[:1]).abs()))
    if error > 1e-2 * max(1.0, float(clean.abs().max())):
        raise RuntimeError(
            "all edges together must give the clean run; the rebuilt run's metric misses it by "
            f"{error:.2g}; remove hooks that change activations, or run the model in float32"
        )
    if abs(float(clean.mean() - corrupt.mean())) < 1e-6:
        raise ValueError(
            "faithfulness needs a metric that differs between clean and corrupt prompts; both "
            f"average {float(clean.mean()):.4g}; use prompts whose answers differ"
        )
    if said := doubt(task, clean, corrupt):
        warn_caller(said)
    return clean, corrupt


def doubt(task: TaskLike, clean: Float[Tensor, " pair"], corrupt: Float[Tensor, " pair"]) -> str:
    """Why shares of the gap would be shares of noise, or nothing."""
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
    return (
        f"{UNABLE}, or circuits explain noise; {able}the gap in "
        f"{task.metric.name!r} between clean and corrupt prompts is {mean:.3g}{spread}; use "
        f"{'other or more pairs' if right == pairs else 'task.filter_correct(model)'}, or a model "
        "that can do the task"
    )


# -- circuits as masks -----------------------------------------------------------------------------


def circuit_sites(model: ModelLike, circuits: nx.MultiDiGraph | Sequence[nx.MultiDiGraph]) -> Sites:
    """The sites of a model with the neurons split off that are so in the (first of the) circuits.

    Raises:
        TypeError, ValueError: it is no circuit, or one of another model.
    """
    sites = Sites.of(model)
    graphs = _listed(circuits)
    return sites.splitting(check_circuit(graphs[0]).graph["neurons"].split()) if graphs else sites


def circuit_masks(
    sites: Sites, task: TaskLike, circuits: nx.MultiDiGraph | Sequence[nx.MultiDiGraph]
) -> Bool[Tensor, "circuit pos writer reader"]:
    """Which writers each reader hears; the position axis has length 1 where all are alike.

    Of circuits by span (`kept_by_span`) it holds the task's spans, and what is outside of them.

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
    masks = torch.zeros(len(graphs), length, *layout.exists.shape, dtype=torch.bool)
    for mask, graph in zip(masks, graphs, strict=True):
        found = []
        for u, _, _, data in real_edges(graph):
            pos, reader = data["pos"], layout.column.get(data["reader"])
            writer = layout.row.get(u)
            if writer is None or reader is None or pos >= length or not exists[writer][reader]:
                raise ValueError(
                    f"every edge of the circuit must be one of the model's; {u!r} -> "
                    f"{data['reader']!r} is not one of {sites.model_name!r}; evaluate the circuit "
                    "on the model and the prompts it was found with"
                )
            found.append((pos, writer, reader))
        if found:
            pos, writer, reader = torch.tensor(found).T
            mask[pos if graph.graph["positions"] else slice(None), writer, reader] = True
    return masks


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


# -- running them ----------------------------------------------------------------------------------


def circuit_metrics(
    sites: Sites,
    task: TaskLike,
    masks: Bool[Tensor, "circuit pos writer reader"],
    *,
    by_span: bool = False,
    progress: bool = False,
) -> Float[Tensor, "circuit pair"]:
    """The task's metric of each circuit alone; `by_span`: positions of the masks are its spans.

    Each batch of pairs takes one corrupt run, however many circuits there are, and blocks before
    the first one in which circuits differ are run for one of them.
    """
    rows = circuit_runs(sites, task)
    found = torch.zeros(len(masks), len(task))
    with tqdm(total=found.numel(), desc="circuits", unit="run", disable=not progress,
              leave=False) as bar:  # fmt: skip
        for index, batch, places in _batches(task, rows, by_span):
            with output_shapes(sites) as outputs:
                base, _ = observe(sites, batch, stream_sites(sites), side="corrupt")
            together = max(1, rows // len(batch))
            for at in range(0, len(masks), together):
                some = masks[at : at + together]
                run = _Run.of(sites, base, some if places is None else some[:, places])
                found[at : at + together, index] = run.metric(batch, outputs).float().cpu()
                bar.update(len(run.masks) * len(batch))
    return found


def _batches(
    task: TaskLike, rows: int, by_span: bool
) -> Iterator[tuple[Tensor, TaskLike, Int[Tensor, " pos"] | None]]:
    """Which pairs, and the task of these, which have one length; `by_span`: and their spans at the
    same positions, with the number of the span at each."""
    for index, batch in task.buckets(rows):
        if not by_span:
            yield index, batch, None
            continue
        places = span_index(batch.spans, len(batch), batch.clean.shape[1])
        for found in places.unique(dim=0):
            chosen = (places == found).all(1).nonzero().flatten()
            yield index[chosen], batch.select(chosen.tolist()), found


@dataclass(frozen=True, eq=False)
class _Run:
    """A few circuits on the clean prompts of a few pairs of one length: the rows of one batch."""

    sites: Sites
    base: Mapping[str, Tensor]
    """The corrupt run of the pairs."""
    masks: Bool[Tensor, "circuit pos writer reader"]
    change: Float[Tensor, "writer row length d_model"]
    """What each writer adds now, minus what it added in the corrupt run."""
    projected: dict[str, Tensor] = field(default_factory=dict)
    """What a place's readers hold behind their matrices, until the model comes to these."""

    @classmethod
    def of(
        cls,
        sites: Sites,
        base: Mapping[str, Tensor],
        masks: Bool[Tensor, "circuit pos writer reader"],
    ) -> _Run:
        pairs, *shape = base["final"].shape
        return cls(
            sites,
            base,
            masks.to(sites.device),
            torch.zeros(len(sites.layout.writers), len(masks) * pairs, *shape, device=sites.device),
        )

    def metric(self, task: TaskLike, outputs: Mapping[int, int]) -> Float[Tensor, "circuit pair"]:
        """The metric of each circuit; `outputs`: how each block returns (see `output_shapes`)."""
        first = self.first_difference() if len(self.masks) > 1 else 0
        if first:
            once = replace(self, masks=self.masks[:1], change=self.change[:, : len(task)].clone())
            once.run(task, range(first), outputs)
            written = next(p.rows.start for p in stream_places(self.sites) if p.layer == first)
            known = once.change[:written]
            self.change[: len(known)] = known.repeat(1, len(self.masks), 1, 1)
        logits = self.run(task, range(first, len(self.sites.blocks)), outputs)
        return torch.stack([task.metric(part) for part in logits.split(len(task))])

    def first_difference(self) -> int:
        """The first block in which readers of two circuits hear different writers."""
        differ = (self.masks[1:] != self.masks[0]).flatten(0, 2).any(0)
        found = zip(self.sites.layout.targets, differ.tolist(), strict=True)
        layers = [owner.layer for (owner, _), at in found if at and owner.kind != "logits"]
        return min(layers, default=len(self.sites.blocks))

    def run(self, task: TaskLike, layers: range, outputs: Mapping[int, int]) -> Tensor:
        """The logits at the end of a run in which only some blocks take part."""
        edits: dict[str, Edit] = answers_only(self.sites, task, len(self.masks))
        if 0 in layers:
            edits[ROOT] = self.note_embedding
        for place in stream_places(self.sites):
            if place.layer in layers or place.entry == "final":
                edits |= self.edits(place)
        tokens = task.clean.to(self.sites.device).repeat(len(self.masks), 1)
        others = [b.layer for b in self.sites.blocks if b.layer not in layers]
        with (
            torch.no_grad(),
            precise_logits(self.sites),
            skipping(self.sites, others, outputs),
            editing(self.sites, edits),
        ):
            logits: Tensor = self.sites.model(tokens)
        return logits

    def edits(self, place: Place) -> dict[str, Edit]:
        """What readers of a place get is put in, and what its writers add is noted."""
        basis = place.basis
        found: dict[str, Edit] = {}
        for slot in basis.slots:
            if slot.readers:
                found |= {m.site: partial(self.project, place, m) for m in slot.through}
        if basis.entry:
            found[basis.entry] = partial(self.read, place)
        if basis.out and basis.parts:
            found[basis.out.site] = partial(self.note_parts, place)
        if basis.entry and basis.entry != place.entry:  # the logits write nothing
            found[basis.component] = partial(self.note_whole, place)
        return found

    # what writers add

    def note_embedding(self, value: Tensor) -> Tensor:
        """Notes what the embedding adds differently; the model goes on with it."""
        self.change[0] = self.step(ROOT, value)
        return value

    def note_parts(self, place: Place, value: Tensor) -> Tensor:
        """Notes what each head, or neuron that is split off, adds differently."""
        basis, behind = place.basis, None
        assert basis.out is not None
        if basis.post is not None:
            behind = self.base[basis.behind].repeat(len(self.masks), 1, 1)
        parts = self.change[place.rows][: len(basis.parts)]
        parts[:] = exact_changes(basis, self.step(basis.out.site, value), behind)
        return value

    def note_whole(self, place: Place, value: Tensor) -> Tensor:
        """Notes what a module, less the parts that are split off, adds differently."""
        change = self.change[place.rows]
        change[-1] = self.step(place.basis.component, value)
        if place.basis.parts:
            change[-1] -= change[:-1].sum(0)
        return value

    def step(self, site: str, value: Tensor) -> Tensor:
        """A site's value minus that of the corrupt run."""
        return value.float() - self.base[site].float().repeat(len(self.masks), 1, 1)

    # what readers get

    def read(self, place: Place, _: Tensor) -> Tensor:
        """What a module as a whole, or the rest of it, gets in every circuit."""
        last = slice(place.columns.stop - 1, place.columns.stop)
        return torch.cat([self.inputs(c, place, last)[0][0] for c in range(len(self.masks))])

    def project(self, place: Place, matrix: Matrix, value: Tensor) -> Tensor:
        """A site at which each part holds what follows from its own input; all sites of a place
        are made at the first."""
        slots = [slot for slot in place.basis.slots if slot.readers]
        if not self.projected:
            sizes = [len(slot.readers) for slot in slots]
            columns = slice(place.columns.start, place.columns.start + sum(sizes))
            found: dict[str, list[Tensor]] = defaultdict(list)
            for circuit in range(len(self.masks)):
                x, row = self.inputs(circuit, place, columns)
                for slot, rows in zip(slots, row.split(sizes), strict=True):
                    for site, part in slot.project(x[rows], range(len(rows))).items():
                        found[site].append(part)
            self.projected.update({site: torch.cat(parts, 1) for site, parts in found.items()})
        (numbers,) = (slot.numbers for slot in slots if matrix in slot.through)
        return matrix.replaced(value, numbers, self.projected.pop(matrix.site))

    def inputs(
        self, circuit: int, place: Place, columns: slice
    ) -> tuple[Float[Tensor, "row pair pos d_model"], Int[Tensor, " reader"]]:
        """What readers of one place get in one circuit, behind their norm, and each reader's row:
        those who hear the same share it."""
        keep = self.masks[circuit, :, place.heard, columns]
        keep, row = torch.unique(keep, dim=2, return_inverse=True)
        residual = self.base[place.entry]
        mine = slice(circuit * len(residual), (circuit + 1) * len(residual))
        change = self.change[place.heard, mine]
        if len(keep) == 1:
            heard = einsum(keep[0].float(), change, "w r, w p t d -> r p t d")
        else:
            heard = einsum(keep.float(), change, "t w r, w p t d -> r p t d")
        x = (residual.float() + heard.to(residual.device)).to(residual.dtype)
        return normed(place.basis, x), row
