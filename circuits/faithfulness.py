"""How well a circuit does the task alone: every edge outside it carries the corrupt run's value.

The run is the clean one. What a reader gets is the corrupt residual stream plus, for each writer
whose edge to it is in the circuit, what that writer adds differently now. All edges give the clean
run, none the corrupt run. Many circuits are rows of one batch, and an edge that lies on no path
from the embedding to the logits changes nothing: what it would carry is the corrupt run's anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import networkx as nx
import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.graph import all_edges, check_circuit, real_edges
from relp.attribution import head_outputs
from relp.capture import ROOT, answers_only, observe
from relp.sites import Block, Sites, bias, editing, weight

__all__ = [
    "circuit_masks",
    "circuit_metrics",
    "completeness",
    "endpoints",
    "faithfulness",
    "minimality",
]

BATCH_BYTES = 256 << 20
"""Memory for the writers' changes of the circuits and pairs that share a run."""


def faithfulness(
    model: Any,
    task: Any,
    circuit: nx.MultiDiGraph | Sequence[nx.MultiDiGraph],
    *,
    progress: bool = True,
) -> Any:
    """Share of the clean-corrupt gap that the circuit recovers: (m(C) - m(∅)) / (m(full) - m(∅)).

    1 for all edges, 0 for none; may exceed 1 or be negative. `m` is the task's metric averaged
    over pairs. Source: Hanna et al. 2024, arXiv:2403.17806; MIB, arXiv:2504.13151.

    Args:
        model: the `TransformerBridge` that the circuit is about. It is the same afterwards.
        task: a `tasks.Task`.
        circuit: one graph, or a sequence of graphs that are evaluated together.
        progress: show a bar if there are several circuits.

    Returns:
        A float, or a list of floats for a sequence.

    Raises:
        ValueError: an edge of the circuit is not one of the model, the metric has no gap between
            clean and corrupt prompts, or the model normalises what its blocks add (post-norm).
        RuntimeError: all edges together do not give the clean run.
    """
    sites = Sites.of(model)
    masks = circuit_masks(sites, task, circuit)
    shares = _shares(sites, task, masks, progress).tolist()
    return shares[0] if isinstance(circuit, nx.Graph) else shares


def completeness(
    model: Any,
    task: Any,
    circuit: nx.MultiDiGraph | Sequence[nx.MultiDiGraph],
    *,
    progress: bool = True,
) -> Any:
    """What the rest of the model recovers without the circuit: the complement's faithfulness.

    (m(M \\ C) - m(∅)) / (m(full) - m(∅)): near 0 if the circuit holds all that does the task, 1 if
    the rest does it as well. This is the completeness of Marks et al. 2024, arXiv:2403.19647, and
    the incompleteness score of Wang et al. 2022, arXiv:2211.00593, for the whole circuit knocked
    out (K = C). Arguments, return value and errors are those of `faithfulness`.
    """
    sites = Sites.of(model)
    masks = all_edges(sites) & ~circuit_masks(sites, task, circuit)
    shares = _shares(sites, task, masks, progress).tolist()
    return shares[0] if isinstance(circuit, nx.Graph) else shares


def minimality(
    model: Any, task: Any, circuit: nx.MultiDiGraph, *, progress: bool = True
) -> pd.DataFrame:
    """What each edge contributes to its circuit: faithfulness lost when that edge alone is cut.

    One row per edge, the largest contribution first: `writer`, `reader`, `pos` (-1 for all),
    `score` and `contribution` = f(C) - f(C without the edge), a share of the clean-corrupt gap.
    An edge near 0 could go; a negative one works against the rest. This is the minimality score of
    Wang et al. 2022, arXiv:2211.00593, of single edges with nothing else knocked out (K = ∅).
    Costs one circuit evaluation per edge. Errors are those of `faithfulness`.
    """
    sites = Sites.of(model)
    (mask,) = circuit_masks(sites, task, circuit)
    edges = [(u, d["reader"], d["pos"], d["score"]) for u, _, _, d in real_edges(circuit)]
    masks = mask.repeat(1 + len(edges), 1, 1, 1)
    for cut, (writer, reader, pos, _) in zip(masks[1:], edges, strict=True):
        at = slice(None) if pos < 0 else pos
        cut[at, sites.writers.index(writer), sites.readers.index(reader)] = False
    whole, *without = _shares(sites, task, masks, progress).tolist()
    table = pd.DataFrame(edges, columns=["writer", "reader", "pos", "score"])
    table["contribution"] = [whole - share for share in without]
    return table.sort_values("contribution", ascending=False, kind="stable", ignore_index=True)


def _shares(
    sites: Sites, task: Any, masks: Bool[Tensor, "circuit pos writer reader"], progress: bool
) -> Float[Tensor, " circuit"]:
    clean, corrupt = endpoints(sites, task)
    found = circuit_metrics(sites, task, masks, progress=progress and len(masks) > 1)
    return (found.mean(1) - corrupt.mean()) / (clean.mean() - corrupt.mean())


def endpoints(sites: Sites, task: Any) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """The metric on the clean and on the corrupt prompts, between which circuits are placed.

    Raises:
        ValueError: the two do not differ, so that there is nothing to recover.
        RuntimeError: all edges together do not give the clean run, on the first pair.
    """
    metrics = {side: torch.zeros(len(task)) for side in ("clean", "corrupt")}
    for side, values in metrics.items():
        for index, batch in task.buckets(_rows(sites, task)):
            values[index] = observe(sites, batch, (), side=side)[1].float().cpu()
    clean, corrupt = metrics["clean"], metrics["corrupt"]
    whole = circuit_metrics(sites, task.select([0]), all_edges(sites)[None, None])
    error = float((whole[0] - clean[:1]).abs())
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
    return clean, corrupt


# -- circuits as masks -----------------------------------------------------------------------------


def circuit_masks(
    sites: Sites, task: Any, circuits: nx.MultiDiGraph | Sequence[nx.MultiDiGraph]
) -> Bool[Tensor, "circuit pos writer reader"]:
    """Which writers each reader hears; the position axis has length 1 where all are alike.

    Raises:
        TypeError, ValueError: there is no circuit, one is not of this model, or one is by position
            and the task's prompts have several lengths.
    """
    graphs = [circuits] if isinstance(circuits, nx.Graph) else list(circuits)
    if not graphs:
        raise ValueError("`circuit` must be a graph or several; got none; pass at least one")
    for graph in graphs:
        check_circuit(graph)
    length = 1
    if any(g.graph["positions"] for g in graphs):
        length = int(task.lengths.max())
        if int(task.lengths.min()) < length:
            raise ValueError(
                "a circuit by position needs prompts of one length; the task has lengths "
                f"{sorted(set(task.lengths.tolist()))}; use a task of one length"
            )
    writers = {w: i for i, w in enumerate(sites.writers)}
    readers = {r: i for i, r in enumerate(sites.readers)}
    exists = all_edges(sites).tolist()
    masks = torch.zeros(len(graphs), length, len(writers), len(readers), dtype=torch.bool)
    for mask, graph in zip(masks, graphs, strict=True):
        found = []
        for u, _, _, data in real_edges(graph):
            pos, writer, reader = data["pos"], writers.get(u), readers.get(data["reader"])
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

    Each batch of pairs takes one corrupt run, however many circuits there are.

    Raises:
        ValueError: the model normalises what its blocks add (post-norm).
    """
    if any(b.post_norm for b in sites.blocks):
        raise ValueError(
            "edge ablation needs heads and MLPs that add to the residual stream directly; "
            f"{sites.model_name!r} normalises what they add (post-norm)"
        )
    entries = [*(b.name(p) for b in sites.blocks for p in ("resid", "z", "mlp")), "final"]
    entries += [b.name("mid") for b in sites.blocks if not b.parallel]
    rows = _rows(sites, task)
    found = torch.zeros(len(masks), len(task))
    with tqdm(total=found.numel(), desc="circuits", unit="run", disable=not progress,
              leave=False) as bar:  # fmt: skip
        for index, batch in task.buckets(rows):
            base, _ = observe(sites, batch, tuple(entries), side="corrupt")
            together = max(1, rows // len(batch))
            for at in range(0, len(masks), together):
                metric = _run(sites, batch, base, masks[at : at + together])
                found[at : at + together, index] = metric.float().cpu()
                bar.update(metric.numel())
    return found


def _rows(sites: Sites, task: Any) -> int:
    """Runs that fit one batch: circuits times pairs."""
    cfg = sites.model.cfg
    values = len(sites.writers) * int(cfg.d_model)
    if not task.metric.reads_answer_only:
        values += int(cfg.d_vocab)
    return max(1, BATCH_BYTES // (4 * int(task.lengths.max()) * values))


def _run(
    sites: Sites,
    task: Any,
    base: dict[str, Tensor],
    masks: Bool[Tensor, "circuit pos writer reader"],
) -> Float[Tensor, "circuit pair"]:
    """The metric of a few circuits on the clean prompts of a few pairs of one length."""
    count, device = len(masks), sites.device
    masks = masks.to(device)
    writers = {w: i for i, w in enumerate(sites.writers)}
    readers = {r: i for i, r in enumerate(sites.readers)}
    # what each writer adds now, minus what it added in the corrupt run
    change = torch.zeros(count, len(writers), *base["final"].shape, device=device)

    def note(first: int, value: Float[Tensor, "circuit writer pair pos d_model"]) -> None:
        change[:, first : first + value.shape[1]] = value

    def by_circuit(value: Tensor) -> Tensor:
        return value.unflatten(0, (count, -1))

    def inputs(
        circuit: int, names: Sequence[str], entry: str, known: int
    ) -> tuple[Float[Tensor, "row pair pos d_model"], Int[Tensor, " reader"]]:
        """What readers of one circuit get, and each reader's row: those who hear the same share it.

        `entry` is where they read the residual stream, `known` how many writers come before them.
        """
        keep = masks[circuit, :, :known, [readers[n] for n in names]]
        keep, row = torch.unique(keep, dim=2, return_inverse=True)
        if len(keep) == 1:
            heard = einsum(keep[0].float(), change[circuit, :known], "w r, w p t d -> r p t d")
        else:
            heard = einsum(keep.float(), change[circuit, :known], "t w r, w p t d -> r p t d")
        residual = base[entry]
        return (residual.float() + heard.to(residual.device)).to(residual.dtype), row

    def input_of(name: str, entry: str, known: int) -> Tensor:
        """What one reader gets in every circuit."""
        return torch.cat([inputs(c, (name,), entry, known)[0][0] for c in range(count)])

    edits: dict[str, Callable[[Tensor], Tensor]] = answers_only(sites, task, count)

    def attention(block: Block) -> None:
        """Rebuilds q, k and v from each head's own input when the first of them is passed."""
        rebuilt: dict[str, Tensor] = {}

        def rebuild() -> None:
            known = writers[block.head_names[0]]
            parts: dict[str, list[Tensor]] = {site: [] for site, _, _ in block.attention_readers}
            for circuit in range(count):
                x, row = inputs(circuit, block.readers[:-1], block.name("resid"), known)
                assert block.norm is not None  # post-norm models were refused
                x = block.norm(x)
                for site, projection, heads in block.attention_readers:
                    mine, row = x[row[:heads]], row[heads:]
                    w = rearrange(weight(projection), "(h d) m -> h d m", h=heads).to(x.dtype)
                    parts[site].append(torch.einsum("hptm,hdm->pthd", mine, w).flatten(2))
            for site, projection, _ in block.attention_readers:
                offset = bias(projection)
                rebuilt[site] = torch.cat(parts[site]) + (0 if offset is None else offset)

        def give(site: str) -> Callable[[Tensor], Tensor]:
            def edit(_: Tensor) -> Tensor:
                if not rebuilt:
                    rebuild()
                return rebuilt.pop(site)

            return edit

        edits.update({site: give(site) for site, _, _ in block.attention_readers})

    def listen(block: Block) -> None:
        """Notes what heads and MLP add, and rebuilds what the MLP reads."""
        first, mlp = writers[block.head_names[0]], writers[block.name("mlp")]

        def heads(z: Tensor) -> Tensor:
            step = by_circuit(z) - base[block.name("z")]
            added = head_outputs(block, step.flatten(0, 1))
            note(first, rearrange(added, "h (c p) t d -> c h p t d", c=count))
            return z

        def mlp_in(_: Tensor) -> Tensor:
            entry, known = ("resid", first) if block.parallel else ("mid", mlp)
            assert block.mlp_norm is not None
            return block.mlp_norm(input_of(f"{block.name('mlp')}.in", block.name(entry), known))

        def mlp_out(value: Tensor) -> Tensor:
            note(mlp, (by_circuit(value).float() - base[block.name("mlp")].float())[:, None])
            return value

        edits.update(
            {block.name("z"): heads, block.name("mlp_in"): mlp_in, block.name("mlp"): mlp_out}
        )

    def embed(value: Tensor) -> Tensor:
        note(0, (by_circuit(value).float() - base[ROOT].float())[:, None])
        return value

    edits[ROOT] = embed
    for block in sites.blocks:
        attention(block)
        listen(block)
    edits["final"] = lambda _: input_of("logits.in", "final", len(writers))
    with torch.no_grad(), editing(sites, edits):
        logits = sites.model(task.clean.to(device).repeat(count, 1))
    return torch.stack([task.metric(part) for part in logits.split(len(task))])
