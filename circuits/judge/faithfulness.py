"""How well a circuit does the task alone: every edge outside it carries the corrupt run's value.

The run is the clean one. What a reader gets is the corrupt residual stream plus, for each writer
whose edge to it is in the circuit, what that writer adds differently now. All edges give the clean
run, none the corrupt run. Many circuits are rows of one batch, and an edge that lies on no path
from the embedding to the logits changes nothing: what it would carry is the corrupt run's anyway.
Where heads or neurons add to the stream through a norm (post-norm), the exact difference of the
norm's output is split over them, as `DEEPLIFT` does.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import networkx as nx
import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from circuits.graph import check_circuit, real_edges
from relp.attribution import head_changes, neuron_outputs
from relp.bridge.norms import NormMap
from relp.bridge.rerun import output_shapes, skipping
from relp.bridge.run import ROOT, answers_only, observe, precise_logits, undisturbed
from relp.bridge.sites import Block, Edit, Sites, bias, editing, weight
from relp.layout import Component
from relp.rulebook import DEEPLIFT

__all__ = [
    "circuit_masks",
    "circuit_metrics",
    "circuit_sites",
    "completeness",
    "endpoints",
    "faithfulness",
    "minimality",
]

BATCH_BYTES = 256 << 20
"""Memory for the writers' changes of the circuits and pairs that share a run."""


@undisturbed
def faithfulness(
    model: Any,
    task: Any,
    circuit: nx.MultiDiGraph | Sequence[nx.MultiDiGraph],
    *,
    progress: bool = True,
) -> Any:
    """Share of the clean-corrupt gap that the circuit recovers: (m(C) - m(∅)) / (m(full) - m(∅)).

    >>> faithfulness(model, task, circuit)
    0.98...
    >>> faithfulness(model, task, [top(edges, edges=n) for n in (50, 100)])
    [0.93..., 0.97...]

    1 for all edges, 0 for none; may exceed 1 or be negative. `m` is the task's metric averaged
    over pairs. Source: Hanna et al. 2024, arXiv:2403.17806; MIB, arXiv:2504.13151.

    Args:
        model: the `TransformerBridge` that the circuit is about. It is the same afterwards.
        task: a `tasks.Task`.
        circuit: one graph, or a sequence of graphs that are evaluated together.
        progress: show a bar if there are several circuits.

    Returns:
        A float, or a list of floats for a sequence.

    Warns:
        UserWarning: the model cannot do the task, so that the share is one of noise: the mean gap
            is below two standard errors over pairs, whose gaps have both signs; or, with a metric
            that compares answer and foil, the gap is negative, or the clean prompts favour the
            foil on average or on half of the pairs.

    Raises:
        ValueError: an edge of the circuit is not one of the model, or the metric has no gap
            between clean and corrupt prompts.
        RuntimeError: all edges together do not give the clean run.
    """
    sites = circuit_sites(model, circuit)
    masks = circuit_masks(sites, task, circuit)
    shares = _shares(sites, task, masks, progress).tolist()
    return shares[0] if isinstance(circuit, nx.Graph) else shares


@undisturbed
def completeness(
    model: Any,
    task: Any,
    circuit: nx.MultiDiGraph | Sequence[nx.MultiDiGraph],
    *,
    progress: bool = True,
) -> Any:
    """What the rest of the model recovers without the circuit: the complement's faithfulness.

    >>> completeness(model, task, circuit)
    0.000...

    (m(M \\ C) - m(∅)) / (m(full) - m(∅)): near 0 if the circuit holds all that does the task, 1 if
    the rest does it as well. This is the completeness of Marks et al. 2024, arXiv:2403.19647, and
    the incompleteness score of Wang et al. 2022, arXiv:2211.00593, for the whole circuit knocked
    out (K = C). Arguments, return value, warnings and errors are those of `faithfulness`.
    """
    sites = circuit_sites(model, circuit)
    masks = sites.layout.exists & ~circuit_masks(sites, task, circuit)
    shares = _shares(sites, task, masks, progress).tolist()
    return shares[0] if isinstance(circuit, nx.Graph) else shares


@undisturbed
def minimality(
    model: Any, task: Any, circuit: nx.MultiDiGraph, *, progress: bool = True
) -> pd.DataFrame:
    """What each edge contributes to its circuit: faithfulness lost when that edge alone is cut.

    >>> minimality(model, task, top(edges, edges=20))

    One row per edge, the largest contribution first: `writer`, `reader`, `pos` (-1 for all),
    `score` and `contribution` = f(C) - f(C without the edge), a share of the clean-corrupt gap.
    An edge near 0 could go; a negative one works against the rest. This is the minimality score of
    Wang et al. 2022, arXiv:2211.00593, of single edges with nothing else knocked out (K = ∅).
    Costs one circuit evaluation per edge. Errors and warnings are those of `faithfulness`.
    """
    sites = circuit_sites(model, circuit)
    layout = sites.layout
    (mask,) = circuit_masks(sites, task, circuit)
    edges = [(u, d["reader"], d["pos"], d["score"]) for u, _, _, d in real_edges(circuit)]
    masks = mask.repeat(1 + len(edges), 1, 1, 1)
    for cut, (writer, reader, pos, _) in zip(masks[1:], edges, strict=True):
        at = slice(None) if pos < 0 else pos
        cut[at, layout.row[writer], layout.column[reader]] = False
    whole, *without = _shares(sites, task, masks, progress).tolist()
    table = pd.DataFrame(edges, columns=["writer", "reader", "pos", "score"])
    table["contribution"] = [whole - share for share in without]
    return table.sort_values("contribution", ascending=False, kind="stable", ignore_index=True)


def _shares(
    sites: Sites, task: Any, masks: Bool[Tensor, "circuit pos writer reader"], progress: bool
) -> Float[Tensor, " circuit"]:
    clean, corrupt = endpoints(sites, task, stacklevel=5)
    found = circuit_metrics(sites, task, masks, progress=progress and len(masks) > 1)
    return (found.mean(1) - corrupt.mean()) / (clean.mean() - corrupt.mean())


def endpoints(
    sites: Sites, task: Any, *, stacklevel: int = 2
) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """The metric on the clean and on the corrupt prompts, between which circuits are placed.

    `stacklevel`: whose line a warning names, 2 for the caller's.

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
        for index, batch in task.buckets(_rows(sites, task)):
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
    if doubt := _doubt(task, clean, corrupt):
        warnings.warn(doubt, stacklevel=stacklevel)
    return clean, corrupt


def _doubt(task: Any, clean: Float[Tensor, " pair"], corrupt: Float[Tensor, " pair"]) -> str:
    """Why shares of the gap would be shares of noise, or nothing."""
    gap, pairs = (clean - corrupt).double(), len(clean)
    mean = float(gap.mean())
    # A single pair has no spread, and pairs that all agree leave no doubt about the sign.
    error = float(gap.std()) / pairs**0.5 if pairs > 1 else 0.0
    doubted = abs(mean) < 2 * error and bool((gap > 0).any()) and bool((gap < 0).any())
    right = int((clean > 0).sum())
    if task.metric.compares_answers:
        doubted |= mean < 0 or 2 * right <= pairs or float(clean.mean()) <= 0
    if not doubted:
        return ""
    able = f"it is right on {right} of {pairs} clean prompts, and " * task.metric.compares_answers
    spread = f" ± {error:.2g} (standard error over pairs)" if pairs > 1 else ""
    return (
        f"the model must be able to do the task, or circuits explain noise; {able}the gap in "
        f"{task.metric.name!r} between clean and corrupt prompts is {mean:.3g}{spread}; use "
        "task.filter_correct(model), or a model that can do the task"
    )


# -- circuits as masks -----------------------------------------------------------------------------


def circuit_sites(model: Any, circuits: nx.MultiDiGraph | Sequence[nx.MultiDiGraph]) -> Sites:
    """The sites of a model with the neurons split off that are so in the (first of the) circuits.

    Raises:
        TypeError, ValueError: it is no circuit, or one of another model.
    """
    sites = Sites.of(model)
    graphs = [circuits] if isinstance(circuits, nx.Graph) else list(circuits)
    return sites.splitting(check_circuit(graphs[0]).graph["neurons"].split()) if graphs else sites


def circuit_masks(
    sites: Sites, task: Any, circuits: nx.MultiDiGraph | Sequence[nx.MultiDiGraph]
) -> Bool[Tensor, "circuit pos writer reader"]:
    """Which writers each reader hears; the position axis has length 1 where all are alike.

    Raises:
        TypeError, ValueError: there is no circuit, one is not of this model, one has other neurons
            split off, or one is by position and the task's prompts have several lengths.
    """
    graphs = [circuits] if isinstance(circuits, nx.Graph) else list(circuits)
    if not graphs:
        raise ValueError("`circuit` must be a graph or several; got none; pass at least one")
    for graph in graphs:
        apart = set(check_circuit(graph).graph["neurons"].split()) ^ set(sites.neurons)
        if apart:
            raise ValueError(
                "circuits that are evaluated together must have the same neurons split off; "
                f"{min(apart)} is so in some only; give `neurons` to attribute, the same for all"
            )
    length = 1
    if any(g.graph["positions"] for g in graphs):
        length = int(task.lengths.max())
        if int(task.lengths.min()) < length:
            raise ValueError(
                "a circuit by position needs prompts of one length; the task has lengths "
                f"{sorted(set(task.lengths.tolist()))}; use a task of one length"
            )
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


# -- running them ----------------------------------------------------------------------------------


def circuit_metrics(
    sites: Sites,
    task: Any,
    masks: Bool[Tensor, "circuit pos writer reader"],
    *,
    progress: bool = False,
) -> Float[Tensor, "circuit pair"]:
    """The task's metric of each circuit alone.

    Each batch of pairs takes one corrupt run, however many circuits there are, and blocks before
    the first one in which circuits differ are run for one of them.
    """
    rows = _rows(sites, task)
    found = torch.zeros(len(masks), len(task))
    with tqdm(total=found.numel(), desc="circuits", unit="run", disable=not progress,
              leave=False) as bar:  # fmt: skip
        for index, batch in task.buckets(rows):
            with output_shapes(sites) as outputs:
                base, _ = observe(sites, batch, _kept(sites), side="corrupt")
            together = max(1, rows // len(batch))
            for at in range(0, len(masks), together):
                run = _Run.of(sites, base, masks[at : at + together])
                found[at : at + together, index] = run.metric(batch, outputs).float().cpu()
                bar.update(len(run.masks) * len(batch))
    return found


def _rows(sites: Sites, task: Any) -> int:
    """Runs that fit one batch: circuits times pairs."""
    cfg = sites.model.cfg
    values = len(sites.layout.writers) * int(cfg.d_model)
    if not task.metric.reads_answer_only:
        values += int(cfg.d_vocab)
    return max(1, BATCH_BYTES // (4 * int(task.lengths.max()) * values))


def _kept(sites: Sites) -> tuple[str, ...]:
    """The sites of the corrupt run: what writers write, and the stream where readers read it."""
    resid = [b.name("resid") for b in sites.blocks]
    middle = [b.name("mid") for b in sites.blocks if b.mlp and not b.parallel]
    heads = [b.name("heads") for b in sites.blocks if b.attn_post is not None]
    neurons = [b.name("neurons") for b in sites.blocks if b.split]
    normed = [b.name("mlp_out") for b in sites.blocks if b.split and b.mlp_post is not None]
    return (*sites.written, *resid, *middle, *heads, *neurons, *normed, "final")


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
    """A block's q, k and v, or its neurons before the activation, until the model comes to them."""

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

    def metric(self, task: Any, outputs: Mapping[int, int]) -> Float[Tensor, "circuit pair"]:
        """The metric of each circuit; `outputs`: how each block returns (see `output_shapes`)."""
        first = self.first_difference() if len(self.masks) > 1 else 0
        if first:
            once = replace(self, masks=self.masks[:1], change=self.change[:, : len(task)].clone())
            once.run(task, range(first), outputs)
            written = sum(len(b.writers) for b in self.sites.blocks[:first])
            known = once.change[: 1 + written]
            self.change[: len(known)] = known.repeat(1, len(self.masks), 1, 1)
        logits = self.run(task, range(first, len(self.sites.blocks)), outputs)
        return torch.stack([task.metric(part) for part in logits.split(len(task))])

    def first_difference(self) -> int:
        """The first block in which readers of two circuits hear different writers."""
        differ = (self.masks[1:] != self.masks[0]).flatten(0, 2).any(0)
        found = zip(self.sites.layout.targets, differ.tolist(), strict=True)
        layers = [owner.layer for (owner, _), at in found if at and owner.kind != "logits"]
        return min(layers, default=len(self.sites.blocks))

    def run(self, task: Any, layers: range, outputs: Mapping[int, int]) -> Tensor:
        """The logits at the end of a run in which only some blocks take part."""
        edits: dict[str, Edit] = answers_only(self.sites, task, len(self.masks))
        if 0 in layers:
            edits[ROOT] = partial(self.note, "embed", ROOT)
        for b in self.sites.blocks[layers.start : layers.stop]:
            edits |= {site: partial(self.project, b, site) for site, _, _ in b.attention_readers}
            if b.heads:
                edits[b.name("z")] = partial(self.note_heads, b)
            else:
                mixer = b.name("mixer")
                edits[b.name("mixer_in")] = partial(self.read, f"{mixer}.in")
                edits[mixer] = partial(self.note, mixer, mixer)
            if b.mlp:
                mlp = b.name("mlp")
                edits[b.name("mlp_in")] = partial(self.read, f"{mlp}.in")
                edits[mlp] = partial(self.note_mlp, b)
            if b.split:
                edits |= {s: partial(self.project_neurons, b, s) for s, _ in b.neuron_readers}
                edits[b.name("neurons")] = partial(self.note_neurons, b)
        edits["final"] = partial(self.read, "logits.in")
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

    # what writers add

    def note(self, writer: str, site: str, value: Tensor) -> Tensor:
        """Notes what one writer adds differently; the model goes on with it."""
        self.change[self.sites.layout.row[writer]] = self.step(site, value)
        return value

    def note_heads(self, block: Block, z: Tensor) -> Tensor:
        """Notes what each head adds differently; a norm behind them is split exactly."""
        own = self.base.get(block.name("heads"))
        own = None if own is None else own.repeat(len(self.masks), 1, 1)
        first = self.sites.layout.row[block.writers[0]]
        into = self.change[first : first + block.heads]
        into[:] = head_changes(block, self.step(block.name("z"), z), own)
        return z

    def note_neurons(self, block: Block, activations: Tensor) -> Tensor:
        """Notes what each neuron that is split off adds differently, as `note_heads` does."""
        step = self.step(block.name("neurons"), activations)
        added = neuron_outputs(block, step)
        if block.mlp_post is not None:
            own = self.base[block.name("mlp_out")].repeat(len(self.masks), 1, 1)
            other = own + step @ weight(block.down).float().T
            added = NormMap.of(block.mlp_post, own, other, DEEPLIFT).push(added)
        self.change[self.mlp_rows(block)][:-1] = added
        return activations

    def note_mlp(self, block: Block, value: Tensor) -> Tensor:
        """Notes what an MLP, less the neurons that are split off, adds differently."""
        part = self.change[self.mlp_rows(block)]
        part[-1] = self.step(block.name("mlp"), value)
        if block.split:
            part[-1] -= part[:-1].sum(0)
        return value

    def mlp_rows(self, block: Block) -> slice:
        """The places of what an MLP and its neurons write."""
        last = self.sites.layout.row[block.name("mlp")]
        return slice(last - len(block.split), last + 1)

    def step(self, site: str, value: Tensor) -> Tensor:
        """A site's value minus that of the corrupt run."""
        return value.float() - self.base[site].float().repeat(len(self.masks), 1, 1)

    # what readers get

    def read(self, reader: str, _: Tensor) -> Tensor:
        """What one reader gets in every circuit."""
        return torch.cat([self.inputs(c, (reader,))[0][0] for c in range(len(self.masks))])

    def project(self, block: Block, site: str, _: Tensor) -> Tensor:
        """The queries, keys or values of each head's own input; all are made at the first site."""
        if not self.projected:
            circuits = [self.inputs(c, block.mixer_readers) for c in range(len(self.masks))]
            first = 0
            for name, projection, heads in block.attention_readers:
                w = rearrange(weight(projection), "(h d) m -> h d m", h=heads)
                parts = [
                    torch.einsum("hptm,hdm->pthd", x[row[first : first + heads]], w.to(x.dtype))
                    for x, row in circuits
                ]
                offset = bias(projection)
                found = torch.cat(parts).flatten(2)
                self.projected[name] = found if offset is None else found + offset
                first += heads
        return self.projected.pop(site)

    def project_neurons(self, block: Block, site: str, value: Tensor) -> Tensor:
        """The neurons before the activation, those that are split off from their own inputs."""
        at = list(block.split)
        if not self.projected:
            readers = block.mlp_readers[:-1]
            circuits = [self.inputs(c, readers) for c in range(len(self.masks))]
            for name, projection in block.neuron_readers:
                w, offset = weight(projection)[at], bias(projection)
                parts = [torch.einsum("nptm,nm->ptn", x[row], w.to(x.dtype)) for x, row in circuits]
                found = torch.cat(parts)
                self.projected[name] = found if offset is None else found + offset[at]
        value = value.clone()
        value[..., at] = self.projected.pop(site)
        return value

    def inputs(
        self, circuit: int, readers: Sequence[str]
    ) -> tuple[Float[Tensor, "row pair pos d_model"], Int[Tensor, " reader"]]:
        """What readers of one place get in one circuit, behind their norm, and each reader's row:
        those who hear the same share it."""
        entry, known, norm = self.stream(readers[0])
        keep = self.masks[circuit, :, :known, [self.sites.layout.column[r] for r in readers]]
        keep, row = torch.unique(keep, dim=2, return_inverse=True)
        residual = self.base[entry]
        mine = slice(circuit * len(residual), (circuit + 1) * len(residual))
        change = self.change[:known, mine]
        if len(keep) == 1:
            heard = einsum(keep[0].float(), change, "w r, w p t d -> r p t d")
        else:
            heard = einsum(keep.float(), change, "t w r, w p t d -> r p t d")
        x = (residual.float() + heard.to(residual.device)).to(residual.dtype)
        return x if norm is None else norm(x), row

    def stream(self, reader: str) -> tuple[str, int, nn.Module | None]:
        """Where a reader reads the residual stream, how many have written there, and its norm."""
        owner, _ = Component.of_reader(reader)
        if owner.kind == "logits":
            return "final", len(self.sites.layout.writers), None
        block = self.sites.blocks[owner.layer]
        first = self.sites.layout.row[block.writers[0]]
        if owner.kind not in ("mlp", "neuron"):
            return block.name("resid"), first, block.norm
        if block.parallel:
            return block.name("resid"), first, block.mlp_norm
        return block.name("mid"), self.mlp_rows(block).start, block.mlp_norm
