"""How well a circuit does the task alone: every edge outside it carries the corrupt run's value.

The run is the clean one. What a reader gets is the corrupt residual stream plus, for each writer
whose edge to it is in the circuit, what that writer adds differently now. All edges give the clean
run, none the corrupt run. Many circuits are rows of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import networkx as nx
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.graph import check_circuit, real_edges
from relp.attribution import head_outputs
from relp.capture import ROOT, answers_only, observe
from relp.scores import Component, precedes
from relp.sites import Block, Sites, bias, editing, weight

__all__ = ["faithfulness"]

BATCH_BYTES = 256 << 20
"""Memory for the writers' changes of the circuits that share a run."""


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
        model: the `TransformerBridge` that the circuit is about.
        task: a `tasks.Task`.
        circuit: one graph, or a sequence of graphs that are evaluated together.
        progress: show a bar if there are several circuits.

    Returns:
        A float, or a list of floats for a sequence.

    Raises:
        ValueError: an edge of the circuit is not one of the model, the metric has no gap between
            clean and corrupt prompts, or the model normalises what its blocks add (post-norm).
    """
    single = isinstance(circuit, nx.Graph)
    circuits: list[Any] = [circuit] if single else list(circuit)
    if not circuits:
        raise ValueError("`circuit` must be a graph or several; got none; pass at least one")
    for graph in circuits:
        check_circuit(graph)
    sites = Sites.of(model)
    if any(b.post_norm for b in sites.blocks):
        raise ValueError(
            "edge ablation needs heads and MLPs that add to the residual stream directly; "
            f"{sites.model_name!r} normalises what they add (post-norm)"
        )
    length = int(task.lengths.max())
    positional = any(c.graph.get("positions", False) for c in circuits)
    if positional and len(task.lengths.unique()) > 1:
        raise ValueError(
            "a circuit by position needs prompts of one length; the task has lengths "
            f"{sorted(set(task.lengths.tolist()))}; use a task of one length"
        )
    masks = [_mask(sites, c, length) for c in circuits]
    # the whole model goes along, to prove that the rebuilt run is the model's own
    kept = torch.stack([torch.ones_like(masks[0]), *masks])
    clean, corrupt = torch.zeros(len(task)), torch.zeros(len(task))
    alone = torch.zeros(len(kept), len(task))
    buckets = list(task.buckets())
    with tqdm(total=len(kept) * len(buckets), desc="faithfulness", unit="circuit",
              disable=not progress or single, leave=False) as bar:  # fmt: skip
        for index, bucket in buckets:
            entries = [*(b.name(p) for b in sites.blocks for p in ("resid", "z", "mlp")), "final"]
            entries += [b.name("mid") for b in sites.blocks if not b.parallel]
            base, corrupt_metric = observe(sites, bucket, tuple(entries), side="corrupt")
            root, clean_metric = observe(sites, bucket, (ROOT,), side="clean")
            clean[index], corrupt[index] = clean_metric.float().cpu(), corrupt_metric.float().cpu()
            per_circuit = 4 * len(sites.writers) * base["final"].numel()
            size = max(1, BATCH_BYTES // per_circuit)
            for at in range(0, len(kept), size):
                part = kept[at : at + size, : int(bucket.lengths[0])]
                metric = _run(sites, bucket, base, root[ROOT], part.to(base["final"].device))
                alone[at : at + len(part), index] = metric.float().cpu()
                bar.update(len(part))
    whole, alone = alone[0], alone[1:]
    error = float((whole - clean).abs().max())
    if error > 1e-2 * max(1.0, float(clean.abs().max())):
        raise RuntimeError(
            "all edges together must give the clean run; the rebuilt run's metric misses it by "
            f"{error:.2g}; remove hooks that change activations, or run the model in float32"
        )
    gap = float(clean.mean() - corrupt.mean())
    if abs(gap) < 1e-6:
        raise ValueError(
            "faithfulness needs a metric that differs between clean and corrupt prompts; both "
            f"average {float(clean.mean()):.4g}; use prompts whose answers differ"
        )
    shares = [float(m.mean() - corrupt.mean()) / gap for m in alone]
    return shares[0] if single else shares


def _mask(
    sites: Sites, circuit: nx.MultiDiGraph, length: int
) -> Bool[Tensor, "#pos reader writer"]:
    """Which writer each reader still hears; the position axis has length 1 where all are alike."""
    writers = {w: i for i, w in enumerate(sites.writers)}
    readers = {r: i for i, r in enumerate(sites.readers)}
    positional = bool(circuit.graph.get("positions", False))
    mask = torch.zeros(length, len(readers), len(writers), dtype=torch.bool)
    for u, _, _, data in real_edges(circuit):
        reader = data["reader"]
        known = u in writers and reader in readers and data["pos"] < length
        if not known or not precedes(Component.parse(u), Component.of_reader(reader)[0]):
            raise ValueError(
                f"every edge of the circuit must be one of the model's; {u!r} -> {reader!r} is not "
                f"one of {sites.model_name!r}; evaluate the circuit on the model it was found in"
            )
        where = slice(data["pos"], data["pos"] + 1) if positional else slice(None)
        mask[where, readers[reader], writers[u]] = True
    return mask


def _run(
    sites: Sites,
    task: Any,
    base: dict[str, Tensor],
    root: Float[Tensor, "pair pos d_model"],
    kept: Bool[Tensor, "circuit pos reader writer"],
) -> Float[Tensor, "circuit pair"]:
    """The metric of each circuit alone, on the clean prompts of one bucket."""
    count = len(kept)
    writers = {w: i for i, w in enumerate(sites.writers)}
    readers = {r: i for i, r in enumerate(sites.readers)}
    # what each writer adds now, minus what it added in the corrupt run
    change = torch.zeros(len(writers), count, *root.shape, device=root.device)
    change[0] = root.float() - base[ROOT].float()
    alike = bool((kept == kept[:, :1]).all())

    def inputs(names: Sequence[str], entry: str, known: int) -> Tensor:
        """`[reader, circuit, pair, pos, d_model]`: what each reader gets."""
        keep = kept[:, :, [readers[n] for n in names], :known].float()
        if alike:
            heard = einsum(keep[:, 0], change[:known], "c r w, w c p t d -> r c p t d")
        else:
            heard = einsum(keep, change[:known], "c t r w, w c p t d -> r c p t d")
        return (base[entry].float() + heard).to(root.dtype)

    edits: dict[str, Callable[[Tensor], Tensor]] = answers_only(sites, task, count)

    def attention(block: Block) -> None:
        """Rebuilds q, k and v from each head's own input when the first of them is passed."""
        rebuilt: dict[str, Tensor] = {}
        known = writers[block.head_names[0]]

        def rebuild() -> None:
            names = block.readers[:-1]
            assert block.norm is not None  # post-norm models were refused
            x = block.norm(inputs(names, block.name("resid"), known).flatten(1, 2))
            for site, projection, heads in block.attention_readers:
                part, x = x[:heads], x[heads:]
                w = rearrange(weight(projection), "(h d) m -> h d m", h=heads)
                out = torch.einsum("hntm,hdm->nthd", part, w.to(part.dtype)).flatten(2)
                offset = bias(projection)
                rebuilt[site] = out if offset is None else out + offset

        def give(site: str) -> Callable[[Tensor], Tensor]:
            def edit(_: Tensor) -> Tensor:
                if not rebuilt:
                    rebuild()
                return rebuilt.pop(site)

            return edit

        for site, _, _ in block.attention_readers:
            edits[site] = give(site)

    def listen(block: Block) -> None:
        """Notes what heads and MLP add, and rebuilds what the MLP reads."""
        first, mlp = writers[block.head_names[0]], writers[block.name("mlp")]

        def heads(z: Tensor) -> Tensor:
            step = z.unflatten(0, (count, -1)) - base[block.name("z")]
            added = head_outputs(block, step.flatten(0, 1))
            change[first : first + block.heads] = added.unflatten(1, (count, -1))
            return z

        def mlp_in(_: Tensor) -> Tensor:
            entry = block.name("resid" if block.parallel else "mid")
            known = first if block.parallel else mlp
            x = inputs([f"{block.name('mlp')}.in"], entry, known)[0]
            assert block.mlp_norm is not None
            return block.mlp_norm(x.flatten(0, 1))

        def mlp_out(value: Tensor) -> Tensor:
            change[mlp] = value.unflatten(0, (count, -1)).float() - base[block.name("mlp")].float()
            return value

        edits.update(
            {block.name("z"): heads, block.name("mlp_in"): mlp_in, block.name("mlp"): mlp_out}
        )

    for block in sites.blocks:
        attention(block)
        listen(block)
    edits["final"] = lambda _: inputs(["logits.in"], "final", len(writers))[0].flatten(0, 1)
    with torch.no_grad(), editing(sites, edits):
        logits = sites.model(task.clean.to(sites.device).repeat(count, 1))
    return torch.stack([task.metric(part) for part in logits.split(len(task))])
